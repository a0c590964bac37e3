r"""verify.py: decide whether a model's answer to a math problem equals the gold answer.

    extract the answer -> clean its LaTeX -> parse it into a tree -> compare with the tree of the gold answer

What differs from the checkers commonly used as a reward:
1. Equality is decided by value: exact fractions, else 600-bit arithmetic at fixed sample points with relative error
   only. A fixed grammar builds the tree and no text is ever evaluated as code.
2. Work is counted and never timed (length, depth, digits, exponents, evaluations): no signal, thread or clock
   inside `verify`, any thread may call it, and the same input always gets the same verdict.
3. It fails closed and says why. A gold answer that cannot be understood rewards an equal string and nothing else;
   `gold_problem` names it when the data is loaded.
4. Precision: an exact gold takes an exact answer, or a decimal of 6 or more significant digits that it rounds or
   truncates to. A measured gold (2.68 or 4.5e33, not 0.5 or 27.0) takes whatever rounds to its own digits.

    python verify.py FILE.jsonl --response-key response --gold-key gold --score-key recorded_score
    python verify.py FILE.jsonl --show-wrong 20
    python verify.py FILE.jsonl --against math-verify

>>> verify(r"So it is $\boxed{\frac{2}{4}}$.", gold="0.5")
Verdict(correct=True, reason='correct', answer='\\frac{2}{4}')
"""
import argparse
import collections
import functools
import itertools
import json
import math
import multiprocessing
import re
import threading
import time
import zlib
from fractions import Fraction
from typing import NamedTuple

MAX_CHARS = 4000    # longest answer that is parsed; a longer one can only be equal as a string
MAX_DEPTH = 40      # nesting of the tree; every recursion below follows the tree, so this bounds the stack
MAX_DIGITS = 1000   # digits of one literal
MAX_BITS = 8000     # a fraction with more is rounded: the exact one would cost too much
MAX_WORK = 20_000   # cost of all evaluations of one comparison: a node counts 1, a function or a power 10
PRECISION = 600     # bits of the arithmetic; equal values agree in all but 100 of them


class Verdict(NamedTuple):
    correct: bool
    reason: str           # correct | wrong | no_answer | unparsed | budget | truncated
    answer: str | None    # the extracted answer as it was written


class Unparsed(ValueError):
    """The text is no answer of this grammar, or has no value (1/0)."""


class Budget(ValueError):
    """Deciding would cost more than the limits above allow."""


# ------------------------------------------------------------------ extraction

TURN_END = re.compile(
    r"<\|(?:im_end|im_start|endoftext|eot_id|end_of_text)\|>|</s>|<end_of_turn>|<｜end▁of▁sentence｜>")
BOX = re.compile(r"(?P<box>\\(?:boxed|fbox)(?![a-zA-Z])[ \t]*)(?:\{|(?P<bare>[-+]?\w+(?:[./]\w+)?))?"
                 r"|(?<!\\)(?:\\\\)*\\[{}]|[{}]")    # the second row skips \{ and \}, in linear time for a run of \
# What may stand between two boxes that are one answer: punctuation, "and", "or", "y =", or a short "cm and".
BETWEEN = re.compile(r"(?:[\s$,;:.&()\[\]\\{}]|quad|text|mbox|\b(?:and|or)\b|[A-Za-z]\w{0,3} *=)*"
                     r"|[^.\n\d=]*\b(?:and|or)\b[^.\n\d=]*")
CLOSING = re.compile(r"(?:\s|\.|I hope (?:it|this) is correct)*$")
FINAL = re.compile(r".*[Ff]inal answer is:?\s*([^\n]{1,200}?)\.? I hope (?:it|this) is correct", re.S)
NUMBER = (r"(?<![\w.,^{/])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?[.,]?\d+(?: */ *\d+)?"
          r"(?: ?(?:\\?%|percent\b|pct\b|m²|[€£]))?")
# Answers without a box, tried in this order at the end of a finished text. The first that parses is taken; between
# the signs of a formula it need not parse, because it can still be the same string as the gold.
UNBOXED = [re.compile(p, re.S | re.I) for p in (
    r"(?=.{1,60}$)(?![a-z]{4,}[ :])([^\n]*[\d\\][^\n]*|\w+)$",                                # the whole text
    r".*<answer>((?:(?!<answer>).)*)</answer>\W*$",
    r".*####\s*([^\n]+)$",
    r".*\b(?:answers?|result)\W*(?:is|are|:|=)[\s:*]*(?!\W*$)([^\n]+)$",                      # the answer is ...
    r".*?\*\*([^*\n]+)\**\W*$",
    rf".*?({NUMBER})$",
    r"(?:.*[^\\])?(?P<formula>\$\$[^$]+|\$(?!\s*\n)(?:[^$\\]|\\.)+)\$+((?: ?(?:%|percent|pct))?)[^\d$]{0,40}$",
    r".*\\(?:\[|\((?!\s*\n))(?P<formula>.+?)\\[)\]][^\d]{0,40}$",
    r".*\(([A-J])\)\W*$",
    r"(?:.*\n)?(?![a-z]{4,}[ :])([^\n]*[\d\\=][^\n]*)$",                                      # the last line
    rf"(?:.*[\s$(=:])?({NUMBER})(?![\d/^])[^\n\d]*$")]                                        # its last number


def boxed(text: str) -> tuple[str | None, bool]:
    r"""The content of the last box, None without one, and whether a later box was opened and never closed.

    Boxes joined only by a comma, "and" or "or" are one list: hedging over two boxes must be a list of guesses and
    not the luck of the last one. One pass with a stack, because to match the braces of each box is quadratic.
    >>> boxed(r"\boxed{1} or \boxed{2}"), boxed(r"\boxed{1}, no: \boxed{2")
    (('1, 2', False), ('1', True))
    """
    stack, found, hanging = [], [], -1
    first = re.search(r"\\(?:boxed|fbox)", text)
    for m in BOX.finditer(text, first.start()) if first else ():
        if m["bare"]:
            found.append((m.start(), m.end(), slice(*m.span("bare"))))
        elif m[0] == "{" or m["box"] and m[0][-1] == "{":
            stack.append((m.start(), m.end(), bool(m["box"])))
        elif m["box"]:
            hanging = m.start()
        elif m[0] == "}" and stack:
            start, inner, is_box = stack.pop()
            if is_box:
                found.append((start, m.end(), slice(inner, m.start())))
    hanging = max([start for start, _, is_box in stack if is_box] + [hanging])
    start, parts = len(text), []
    for begin, end, inner in reversed(found):
        if end <= start:
            if parts and (start - end > 60 or len(parts) > 60 or not BETWEEN.fullmatch(text, end, start)):
                break
            content = text[inner].strip()
            start, parts = begin, [content] * (content not in parts) + parts
    return (", ".join(parts) if found else None), hanging > (found[-1][0] if found else -1)


def extract(response: str, finished: bool | None = None) -> tuple[str | None, str]:
    """(answer, "") or (None, reason). finished=False (stopped by the token limit) takes only a complete box; None
    judges from the text: an answer without a box must then stand at the very end.
    >>> extract("We get 70 + 3, so it is **73**."), extract("First we find 70 and then", finished=False)
    (('73', ''), (None, 'truncated'))
    """
    # 1. The finished answer: before the end of the turn, after the thinking.
    text = TURN_END.split(response, maxsplit=1)[0]
    ended, thought = finished or len(text) < len(response), text.rfind("</think>")
    if text.rfind("<think>") > thought:    # a box inside unfinished thinking is not an answer
        return None, "truncated"
    text = text[thought + 8:].strip() if thought >= 0 else text.strip()
    # 2. Its last complete box; one that was opened later and never closed means the answer was being revised.
    answer, hanging = boxed(text)
    if hanging or answer is None and finished is False:
        return None, "truncated"
    if answer is not None:
        return (answer, "") if answer else (None, "no_answer")
    # 3. Without a box, the sentence that declares an answer final, or else what a finished text ends with.
    if m := FINAL.match(text[-20_000:]):
        return m[1].strip(" $*"), ""
    tail = text[-1500:]
    tail = tail[:CLOSING.search(tail).start()]
    # A text that ends in mid-sentence or mid-formula may have been cut off, and what it ends with is a number in
    # passing: a short one must say that this is its answer.
    complete = ended or re.search(r"(?:[.!*$>€²]|\\[)\]]|\([A-J]\))$", text)
    for pattern in UNBOXED if complete else UNBOXED[:4] if len(text) < 150 else ():
        m = pattern.match(tail)
        answer = "".join(m.groups("")).strip(" $*") if m else ""
        if answer and ("formula" in pattern.groupindex or not gold_problem(answer)):
            return answer.strip(), ""
    return None, "no_answer"


# ------------------------------------------------------------------ cleaning

# dimension: name=size in one common unit of the dimension. A word in no row is a label: apples agree only with apples.
UNITS = {name: (dim, Fraction(size)) for dim, row in {
    "": "percent=.01 pct=.01 percentage=.01 degree=0 deg=0 unit=1 rad=1 radian=1 time=1",
    "L": "m=1 meter=1 metre=1 inch=.0254 inches=.0254 in=.0254 foot=.3048 feet=.3048 ft=.3048 yard=.9144 mile=1609.344",
    "T": "s=1 sec=1 second=1 min=60 minute=60 h=3600 hr=3600 hour=3600 day=86400 week=604800 year=31557600",
    "M": "g=1 gram=1 pound=453.59237 lb=453.59237 ounce=28.349523 oz=28.349523",
    "L^3": "l=1e-3 liter=1e-3 litre=1e-3 L=1e-3", "$": "dollar=1 cent=.01 cents=.01", "E": "J=1 joule=1 erg=1e-7",
    "P": "Pa=1 pascal=1", "N": "N=1 newton=1 dyne=1e-5", "W": "W=1 watt=1", "U": "V=1 volt=1", "A": "A=1 ampere=1",
    "K": "K=1 kelvin=1", "f": "Hz=1 hertz=1", "mol": "mol=1 mole=1", "eV": "eV=1",
}.items() for name, size in (pair.split("=") for pair in row.split())}
UNITS = UNITS | {prefix + name: (dim, size * Fraction(f"1e{n}")) for n, prefixes in {
    -9: "n nano", -6: "u μ micro", -3: "m milli", -2: "c centi", 3: "k kilo", 6: "M mega", 9: "G giga"
}.items() for prefix in prefixes.split() for name, (dim, size) in UNITS.items()
    if (dim and size == 1 or dim == "L^3") and prefix + name not in UNITS}
UNITS = {name + "s": entry for name, entry in UNITS.items()} | UNITS
FUNC = "|".join((
    "arcsin arccos arctan arccot asin acos atan sinh cosh tanh sin cos tan cot sec csc log ln lg exp sqrt abs frac "
    "binom sum prod floor ceil").split())
NAMED = "|".join((
    "alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi varphi chi psi "
    "omega Gamma Delta Theta Lambda Pi Sigma Phi Psi Omega hbar ell odot mho pi infty emptyset varnothing R Z N Q C "
    "ldots dots cdots max min").split())
PROSE = set("is are the if or but maybe probably answer than to so because then since therefore i we it".split())


def unit(word: str) -> tuple[str, Fraction]:
    """(dimension, size) of a unit word or its plural; a label is a dimension of its own.
    >>> unit("cm"), unit("Apples")
    (('L', Fraction(1, 100)), ('label apple', Fraction(1, 1)))
    """
    label = "label " + word.lower().removesuffix("s"), Fraction(1)
    return UNITS.get(word) or UNITS.get(word.lower()) or label


COMMANDS = (
    "×times ·cdot ∙cdot ⋅cdot √sqrt πpi ∞infty °degree ºdegree ≤le ≥ge ⩽le ⩾ge ≠ne ±pm ∓mp ∪cup ∩cap ∈in ℝR ℤZ "
    "∅emptyset ≈approx ½frac12 ¼frac14 ¾frac34 ⅓frac13 ⅔frac23 ⟨langle ⟩rangle ⌊lfloor ⌋rfloor ⌈lceil ⌉rceil "
    "…ldots αalpha βbeta γgamma δdelta θtheta λlambda μmu ωomega φphi σsigma τtau €text{euro} £text{pound}")
UNICODE = str.maketrans(
    dict(zip("−–‑⁄÷′’‘，（）：；", "---//" + "'" * 3 + ",():;")) | {"\u200b": "", "\ufeff": "", "\u2061": ""}
    | {code: chr(code - 0xFEE0) for code in range(0xFF10, 0xFF5B)}    # full-width digits and letters
    | {pair[0]: rf"\{pair[1:]} " for pair in COMMANDS.split()})
SMALL = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ₀₁₂₃₄₅₆₇₈₉", "0123456789-+n0123456789")
THOUSANDS = re.compile(r"(?<![\d.,_^])\d{1,3}(?:,\d{3}(?!\d))+(?!,?\s*\d)|(?<![\d.,_^])\d{1,3}(?: \d{3}(?!\d))+")


def joined(text: str) -> str:
    """1,234 and 1 234 as 1234, except inside brackets, where a comma separates: (100,200) is a pair.
    >>> joined("1,234"), joined("1,2,3"), joined("(100,200)")
    ('1234', '1,2,3', '(100,200)')
    """
    if re.search(r"[(\[]|\\\{|\\langle", text):
        return text
    return THOUSANDS.sub(lambda m: re.sub("[, ]", "", m[0]), text)


def said(m: re.Match) -> str:
    r"""What stands for \text{...}: plain content (numbers, lists, letters, "and"), or words marked with @."""
    if re.fullmatch(r"\s*\(?[A-J][.):]+\s*", m[1]):    # \text{A. } 15, with its mark
        return m[1]
    text = m[1].strip(" .\\~$")
    plain = re.search(r"\d|[,:\\]|^\(?[A-Z]\)?$|^[ei]$|^(?:and|or),?$", text)
    return f" {text} " if plain else " " + re.sub(r"[^\W\d_]+", r"@\g<0>", text.strip("()"))


def rows(m: re.Match) -> str:
    r"""A matrix as the tuple of its rows; a column is the tuple of its cells.
    >>> clean(r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}")
    '\\langle \\langle 1 , 2 \\rangle,\\langle 3 , 4 \\rangle \\rangle'
    """
    cells = re.sub(r"(?:\\\\|\s)+$", "", joined(m[1]))    # without \\ behind the last row
    lines = [line.replace("&", ",") for line in cells.split(r"\\")]
    return r"\langle " + ",".join(rf"\langle {x} \rangle" if "," in x else x for x in lines) + r" \rangle "


def unit_behind(m: re.Match) -> str:
    """Letters behind a number as its unit: 5 cm, 12 apples; but 5xy, 2mg (m times g), 3ab are products.
    >>> clean("5 cm, 5xy, 12 apples")
    '5 @cm, 5xy, 12 @apples'
    """
    word, known = m[2], not unit(m[2])[0].startswith("label")
    short = word in ("mg", "ms") or not m[1].endswith(" ") and word in ("gm", "mW", "mV")
    is_unit = m[1][0] == "@" or known and not short or m[1].endswith(" ") and len(word) > 3 and word.islower()
    return m[1] + ("@" if is_unit else "") + word


# One spelling per construct. A word is marked with @, so that its letters are no product.
REWRITES = [(re.compile(pattern, re.S), new) for pattern, new in (
    # 1. characters, commands that mean nothing, text
    (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda m: "^{" + m[0].translate(SMALL) + "}"),
    (r"[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m[0].translate(SMALL) + "}"),
    (r"\\\\\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|mm|cm)\s*\]", lambda m: r"\\"),    # the row gap of a matrix
    (r"(?<=[\d.])\\overline\s*\{(\d+)\}", r"~\1"),    # 0.1\overline{6} is 0.1~6
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?", " "),
    (r"(?<=\d)(?: ?\{ ?, ?\}|, ?\\!|\\! ?,|\\,|\\ ) ?(?=\d{3}(?!\d))", ""),    # 10{,}000 is explicit, 10,000 is not
    (r"(?<!\\)\\[,;:!>~ \n]|\\hspace\{[^{}]*\}|\\q?quad|(?<!\\)(?:\$|~(?!\d))|\\[()\[\]]|\\(?:displaystyle|textstyle"
     r"|limits|phantom|mathbf|mathit|boldsymbol|bm|mathcal|vec|hat|bar|overline|underline|boxed|fbox|angle|triangle)"
     r"(?![a-zA-Z])", " "),
    (r"(?<=[\d}])\s*\\(?:text|mathrm)\s*\{\s*([A-Z])\s*\}", r" @\1"),    # 1 \text{ L}
    (r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|operatorname\*?|hbox|rm)\s*\{([^{}]*)\}", said),
    (r"\\begin\s*\{(?:(?:[pbB]|small)?matrix\}|array\}\s*(?:\{[^{}]*\})?)(.*?)\\end\s*\{[a-zA-Z]*\}", rows),
    (r"\\l(floor|ceil)(?![a-zA-Z])", r"\\\1("), (r"\\r(?:floor|ceil)(?![a-zA-Z])", ")"),
    (r"\\\{ *\\\}", r"\\emptyset "), (r"\\mathbb ?(?:\{ ?([A-Z]) ?\}|([A-Z]))", r"\\\1\2 "),
    # 2. fractions, degrees, derivatives: dx/dt, \dot{x} and x^\prime are all x'
    (r"\\[dtc](frac|binom)(?![a-zA-Z])", r"\\\1"), (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\d)", r"\\frac{\1}"), (r"(\\frac\{[^{}]*\})\s*(\d)", r"\1{\2}"),
    (r"(?<![\w.^/])(\d+) (\d+)/(\d+)", r"\1\\frac{\2}{\3}"),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degree", "@degree "), (r"\\?%", "@percent "),
    (r"\^\s*(?:\{\s*((?:\\prime\s*)+)\}|(\\prime))", r"\1\2"), (r"\\prime\s*", "'"),
    (r"\\(d?)dot(?:\s*\{\s*(\\?[a-zA-Z]+)\s*\}| (\\?[a-zA-Z]+))", lambda m: f"{m[2] or m[3]}'" + "'" * len(m[1])),
    (r"\\frac ?\{ ?d ?(\^ ?\{?2\}?)? ?(\\?[a-zA-Z]+(?:_\{?\w+\}?)?) ?\} ?\{ ?d ?[a-z] ?(?:\^ ?\{?2\}?)? ?\}",
     lambda m: m[2] + "'" * (2 if m[1] else 1)),
    (r"\bd([a-z])\s*/\s*d[a-z]\b", r"\1'"),
    # 3. program notation and white space
    (r"(?<=\d) ?_ ?\{? ?(\d+) ?\}?", r" \\zeta_{base\1}"),    # an unknown factor for each base: 204_5 is not 204_6
    (r"\bnp\.|\bmath\.", ""), (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times "), (r"\*\*", "^"),
    (r"(?<![\d.])(\d[\d.]*)[eE]([-+]?\d+)", r"(\1*10^{\2})"), (r"\.\.\.+", r"\\ldots "), (r"\s+", " "),
    # 4. words: the range of an arbitrary integer, times of day, money, units, single words
    (r"[,;]?\s*\( ?([kmn]) ?\\in *\\?([ZN]) *\)(?=[\s.}]*$)", r", \1 \\in \\\2 "),
    (r",? *@?\b(?:where|with|for)\b(?: *@?(?:any|all|every|some|an|each))* *(?:@?integers? +([kmn])\b"
     r"|([kmn]) +@?is +@?an +@?integer|([kmn]) *\\in *\\?Z)", r", \1\2\3 \\in \\Z "),
    (r"(?<=\d):00(?=(?::00)? ?@?[apAP]\b)", ""),
    (r"(?<=\d) ?@?([apAP])(?:\.* ?@?[mM]|(?<=:\d\d.))\b\.*", lambda m: f" @{m[1].lower()}m"),
    (r"\\\$\s*(\d+(?:[,.]\d+)*|\.\d+)", r"\1 @dollar "), (r"\\\$", "@dollar "),
    (r"([\d)}%] ?|@[a-zA-Z]+(?:\^\{?-?\d\}?)?(?: ?/ ?| ))([a-zA-Z]{2,})(?![a-zA-Z(])", unit_behind),
    (r"@(?:of|an?|the) *(?=@)", ""), (r"@per\b|(?<=[a-z]) per (?=[@a-z])", "/"), (r"@?\bmph\b", "@mile/@hour"),
    (r"@?\b(?:square|sq)\b\.? *@?([a-z]+)", r" @\1^2"), (r"@?\bcubic *@?([a-z]+)", r" @\1^3"),
    (r" *@?\bsquared\b", "^2"), (r" *@?\bcubed\b", "^3"), (r"(@[a-zA-Z]+ ?/ ?)([a-zA-Z]+)", r"\1@\2"),
    (r"(?<![\\@a-zA-Z])and(?![a-zA-Z])", " , "), (r"(?<![\\@a-zA-Z])or(?![a-zA-Z])", r" \\or "),
    (r"(?<![\\@a-zA-Z])([A-Z]{3,})(?![a-zA-Z_])", r"@\1"),    # LQSX: its letters must not commute
    (rf"(?:^|(?<=[,(={{])|(?<=\\or ))\s*(?!(?:[a-zA-Z]+ +)*(?:{FUNC}|infinity|inf)\b)"
     r"(?:[a-zA-Z]{3,}(?=\s*(?:[,)}]|\\or|\.?$))|[a-zA-Z]{2,}(?: +[a-zA-Z]+)+)",    # Monday, x = even
     lambda m: re.sub("[a-zA-Z]+", r"@\g<0>", m[0])))]


@functools.lru_cache(maxsize=1024)
def clean(text: str) -> str:
    r"""One spelling per construct, noise removed.
    >>> clean(r"$\left(\dfrac{1}{2},\; 90^{\circ}\right)$.")
    '(\\frac{1}{2}, 90@degree )'
    """
    if r"\begin" not in text:
        text = re.sub(r"\\{2,}(?=[a-zA-Z(\[,!$%{])", r"\\", text)    # doubly escaped LaTeX
    text = " ".join(text.translate(UNICODE).split()).lstrip(" ,;*`\"")
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    text = re.sub(r"([,;])(?: *[,;])+", r"\1", re.sub(r",? *\\or\b *,?", r" \\or ", text))
    text = re.sub(r"^\{([^{}]*)\}$", r"\1", text.rstrip(" .,;*`\"\\").lstrip(" ,;*`\"")).strip()
    if ";" in text and not re.search(r"[(\[{]", text):    # p=1, q=2; p=3, q=4: solutions of several unknowns
        text = "{" + text.replace(";", "},{") + "}"
    return text


# ------------------------------------------------------------------ parsing

# The vocabulary: all spellings of a token, the levels of the binary operators (loosest first), the brackets.
SPELLED = {spelling: row.split()[0] for row in (
    r"= == := \equiv; < \lt; <= \le \leq \leqslant; > \gt; >= \ge \geq \geqslant; != \ne \neq; ∈ \in; ~ \approx; "
    r"∪ \cup; ∩ \cap; ∖ \setminus \backslash; ± \pm; ∓ \mp; * \cdot \times \ast; / \div; "
    r"| \lvert \rvert \mid \vert \|; [ \lbrack; ] \rbrack; , \, and \land; or \or \lor; infty infinity inf oo; "
    r"emptyset varnothing; ldots dots cdots").split("; ") for spelling in row.split()} | {";": ","}
LEVELS = {op: level for level, row in enumerate((
    ", or", "= < <= > >= != ∈ ~ :", "∪ ∩ ∖", "+ - ± ∓", "* /")) for op in row.split()}
PAIRS = {"(": ") ]", "[": ") ]", "{": "}", r"\{": r"\}", r"\langle": r"\rangle", "|": "|"}    # (0, 1] is an interval
# A name takes its subscript and primes along. Letters that usually name functions are called before a bracket with a
# single number or letter, f always is: x(3), f(t + 1) and \theta(t) are calls; n(n-1) and a(b) are products.
SUFFIX = r"(?:\ ?_\ ?(?:\{[^{}]*\}|[^\W_])|')"
TOKEN = re.compile(rf"""\s*(?:
    (?P<num>(?:\d+\.?\d*|\.\d+)(?:~\d+)?)
  | @(?P<word>[^\W\d_]+)
  | (?P<func>\\(?:{FUNC})(?![a-zA-Z])|{FUNC})
  | (?P<op>[<>!=:]=)
  | (?P<call>[fgh](?=\ ?\()|(?:[FGHPQWpquyvxIT]|[a-zA-Z]{SUFFIX}|\\(?!pi)(?:{NAMED})){SUFFIX}*
        (?=\ ?\(\ ?(?:[\d.]+|\\?[a-zA-Z]+)\ ?\)))
  | (?P<name>(?:\\(?:{NAMED})(?![a-zA-Z])|pi|(?<![a-zA-Z])(?:infinity|inf|oo)(?![a-zA-Z])|[^\W\d_]){SUFFIX}*)
  | (?P<cmd>\\[a-zA-Z]+|\\.)
  | (?P<sign>\S))""", re.X)


def exact(x) -> tuple:
    """A number that carries no rounding."""
    return ("num", Fraction(x), None, 0)


def number(text: str) -> tuple:
    """A literal as (num, value, unit in the last place or None if exact, significant digits). 0.1~6 is 0.1666...
    >>> number("12")[1:], number("0.50")[1:], number("0.1~6")[1]
    ((Fraction(12, 1), None, 0), (Fraction(1, 2), Fraction(1, 100), 2), Fraction(1, 6))
    """
    text, _, period = text.partition("~")
    whole, _, decimals = text.partition(".")
    ulp = Fraction(1, 10 ** len(decimals))
    value = int(whole + decimals) * ulp + (ulp * Fraction(int(period), 10 ** len(period) - 1) if period else 0)
    return ("num", value, ulp, len((whole + decimals).lstrip("0"))) if decimals and not period else exact(value)


def signed(sign: str, node: tuple, position: int = 0) -> tuple:
    """A term behind a sign; each ± is a factor of its own."""
    if sign != "-":
        return node if sign == "+" else ("*", ("pm", position, sign), node)
    return ("num", -node[1], *node[2:]) if node[0] == "num" else ("*", exact(-1), node)


def chain(op: str, left: tuple, right: tuple, position: int) -> tuple:
    """left op right. Lists, relations, sums and products take any number of parts: long ones are wide and not deep.
    >>> chain("<", ("sym", "x"), ("sym", "y"), 0), chain("+", ("+", "a", "b"), "c", 0)
    (('rel', ('<',), (('sym', 'x'), ('sym', 'y'))), ('+', 'a', 'b', 'c'))
    """
    if op in (",", "or"):
        if left[:2] == ("rel", ("!=",)) and right[0] != "rel":    # x \ne 2, 3
            right = ("rel", ("!=",), (left[2][0], right))
        kind, items = left[1:3] if left[0] == "seq" and left[1] in ("", "or") else ("", (left,))
        return ("seq", "or" if op == "or" else kind, (*items, right), "")
    if op == "~":    # x \approx 5 claims 5, but 2/3 \approx 0.67 claims 2/3
        return chain("=", left, right, position) if left[0] == "sym" else left
    if LEVELS.get(op) == 1:
        ops, sides = left[1:] if left[0] == "rel" else ((), (left,))
        return ("rel", (*ops, op), (*sides, right))
    if LEVELS.get(op) == 3:
        op, right = "+", signed(op, right, position)
    if op == "" and left[0] == "num" and left[2] is None and right[0] == "/" and {n[0] for n in right[1:]} == {"num"}:
        if 0 < right[1][1] < right[2][1]:    # 2\frac12, but an improper fraction is a factor
            return ("+", left, signed("-" if left[1] < 0 else "+", right))
    op = op or "*"
    if op == "*" and left[0] == right[0] == "seq" and {n[0] for n in left[2] + right[2]} == {"seq"}:
        if len(left[2] + right[2]) > 9:
            raise Budget("a product of large matrices")
        columns = list(zip(*(row[2] for row in right[2])))
        cells = [[("+", *(("*", x, y) for x, y in zip(row[2], column))) for column in columns] for row in left[2]]
        return ("seq", "(", tuple(("seq", "(", tuple(row), ")") for row in cells), ")")
    return (*left, right) if op in "+*" and left[0] == op else (op, left, right)


class Parser:
    """Precedence climbing over the tokens of one answer. State: the position, how deep the grammar is nested, and
    whether a bar or colon would close what is open, as in |x| and {x | x > 0}.

    A node is a tuple: (num value ulp digits) (sym name) (word text) (+ ...) (* ...) (/ a b) (^ a b) (pm position sign)
    (call name args...) (rel ops sides) (seq open items close) (∪ a b) (∩ a b) (∖ a b) (such a condition).
    """

    def __init__(self, text: str):
        self.tokens, self.i, self.depth, self.bars = [], 0, 0, False
        for m in TOKEN.finditer(text):
            kind, t = m.lastgroup, m[m.lastgroup]
            if len(t) > MAX_DIGITS:
                raise Budget(f"a token of {len(t)} characters, at most {MAX_DIGITS} are read")
            t = re.sub(r"[\\{} ]", "", t) if kind in ("name", "call", "func") else t
            self.tokens.append((kind, t if kind == "word" else SPELLED.get(t, t)))
        self.tokens.append(("end", ""))

    @property
    def next(self) -> str:
        return self.tokens[self.i][1]

    def take(self, wanted: str = "") -> str:
        """The next token, which must be one of the wanted ones where any are named."""
        t = self.next
        if not t or wanted and t not in wanted.split():
            raise Unparsed(f"expected {wanted or 'more'} but found {t or 'the end'}")
        self.i += 1
        return t

    def expression(self, level: int = 0) -> tuple:
        """What binds at least as tightly as level: 0 lists, 1 relations, 2 sets, 3 sums, 4 products, 5 powers."""
        if self.next == "~" and level <= 1:    # "\approx 8.24": the digits already say how precise it is
            self.take()
        left = self.powers()
        while True:
            own = LEVELS.get(self.next, -1)
            if own >= level and not (self.next == ":" and self.bars):
                op = self.take()
                left = chain(op, left, self.expression(own + 1), self.i)
            elif level <= 4 and self.starts_factor():
                if left[0] == "word" and unit(left[1])[0].startswith("label"):
                    raise Unparsed("prose")
                left = chain("", left, self.powers(), self.i)
            else:
                return left

    def starts_factor(self) -> bool:
        """Whether the next token is multiplied on without a sign, as in 2x, 3\\sqrt{2}, 5 cm; "2 3" is no product."""
        kind, t = self.tokens[self.i]
        if kind == "num":
            return self.tokens[self.i - 1][0] != "num"
        return kind in ("name", "word", "func", "call") or t in PAIRS and not (t == "|" and self.bars)

    def powers(self) -> tuple:
        """An atom with its signs and with what binds to it from behind: -2^10, n!."""
        signs = []
        while self.next in ("-", "+", "±", "∓"):
            signs.append(self.take())
        left = self.atom()
        while self.next in ("^", "!"):
            left = ("^", left, self.argument()) if self.take() == "^" else ("call", "!", left)
        for sign in reversed(signs):
            left = signed(sign, left, self.i)
        return left

    def argument(self) -> tuple:
        """What ^ or a command takes: {...}, or one token; 2^10 takes the whole number."""
        sign = self.take() if self.next in ("-", "+") else "+"
        return signed(sign, ("sym", self.take()) if self.tokens[self.i][0] == "call" else self.atom())

    def atom(self) -> tuple:
        """The smallest complete piece. Every recursion of the grammar passes here, so it counts the nesting."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Budget(f"nested deeper than {MAX_DEPTH}")
        kind, t = self.tokens[self.i][0], self.take()
        if kind == "num":
            node = number(t)
        elif kind == "name":
            node = ("sym", t)
        elif kind == "call":
            args = self.atom()
            node = ("call", "?" + t, *(args[2] if args[0] == "seq" else (args,)))
        elif kind == "func":
            node = self.function(t)
        elif t in PAIRS:
            node = self.bracket(t)
        else:
            while kind == "word" and self.tokens[self.i][0] == "word":
                t += " " + self.take()
            # A command that is not known is a word: it equals only itself and has no value.
            closes = t in " ".join(PAIRS.values()).split()
            if kind not in ("word", "cmd") or closes or len(t.split()) > 4 or PROSE & set(t.lower().split()):
                raise Unparsed(f"cannot read {t}")
            node = ("word", t)
        self.depth -= 1
        return node

    def function(self, name: str) -> tuple:
        r"""\frac12, \sin^2 x, \log_2 8, \sqrt[3]{x}, \sum_{k=1}^n k, \sin 2\pi t: in brackets or a product."""
        extra = {}
        while self.next in ("^", "_") or self.next == "[" and name == "sqrt":
            key = self.take() if self.next != "[" else "_"
            extra[key] = self.argument()
        low, power = extra.get("_"), extra.get("^")
        if name in ("sum", "prod"):
            if not power or not low or low[:2] != ("rel", ("=",)) or low[2][0][0] != "sym":
                raise Unparsed(f"{name} without k = ...")
            return ("call", name, *low[2], power, self.expression(4))
        if name in ("frac", "binom"):
            pair = self.argument(), self.argument()
            return ("/", *pair) if name == "frac" else ("call", name, *pair)
        if self.next in PAIRS or name == "sqrt":
            arg = self.argument()
        else:
            arg = self.expression(5)
            while self.starts_factor() and (self.tokens[self.i][0] not in ("func", "word") or self.next == "degree"):
                arg = ("*", arg, self.powers())
        name, power = ("a" + name, None) if power == exact(-1) else (name, power)
        node = ("call", name, arg, low) if low else ("call", name, arg)
        return ("^", node, power) if power else node

    def bracket(self, opened: str) -> tuple:
        """(...), [...], {...}, \\{...\\}, |...|, or an interval such as (0, 1]. The kind of bracket stays in the tree,
        because (1, 2), [1, 2] and \\{1, 2\\} are three different answers; (x) and {x} are just x."""
        bars, self.bars = self.bars, opened in (r"\{", "|")    # inside a set a bar or colon separates the condition
        inner = self.expression()
        if opened == r"\{" and self.next in ("|", ":"):
            self.take()
            self.bars = False
            inner = ("such", inner, self.expression())
        self.bars = bars
        close = self.take(PAIRS[opened])
        if opened == "|":
            return ("call", "abs", inner)
        bare = inner[0] == "seq" and inner[3] == ""
        if inner[0] == "such" or not bare and opened + close in ("()", "[]", "{}"):
            return inner
        items = inner[2] if bare else (inner,)
        return ("seq", "(", items, ")") if opened == r"\langle" else ("seq", opened, items, close)


@functools.lru_cache(maxsize=64)
def parse(text: str) -> tuple:
    """The tree of a cleaned text, remembered for the responses to one problem, which follow each other. Errors:
    Unparsed when it is not in the grammar, Budget when over the limits.
    >>> parse("(a, b]")
    ('seq', '(', (('sym', 'a'), ('sym', 'b')), ']')
    """
    if len(text) > MAX_CHARS:
        raise Budget(f"{len(text)} characters, at most {MAX_CHARS} are read")
    parser = Parser(text)
    tree = parser.expression()
    if parser.next:
        raise Unparsed(f"unexpected {parser.next}")
    layer = [tree]    # x^2^2^2... nests the tree where it does not nest the grammar
    for _ in range(2 * MAX_DEPTH):
        layer = [part for node in layer for part in node if isinstance(part, tuple)]
    if layer:
        raise Budget(f"nested deeper than {MAX_DEPTH}")
    return tree


def walk(tree: tuple):
    """Every node of a tree."""
    stack = [tree]
    while stack:
        node = stack.pop()
        if node and isinstance(node[0], str):
            yield node
        stack.extend(part for part in node if isinstance(part, tuple))


def swap(node, change):
    """The tree with change(node) in place of each node for which that is not None.
    >>> swap(parse("x + y"), {("sym", "x"): ("sym", "z")}.get)
    ('+', ('sym', 'z'), ('sym', 'y'))
    """
    if not isinstance(node, tuple):
        return node
    new = change(node) if node and isinstance(node[0], str) else None
    return tuple(swap(part, change) for part in node) if new is None else new


def names(*trees: tuple) -> set[str]:
    r"""The free symbols: everything that gets a sample value.
    >>> sorted(names(parse(r"x + \pi y_1")))
    ['x', 'y_1']
    """
    return {n[1] for t in trees for n in walk(t) if n[0] == "sym"} - {"pi", "e", "i", "infty", "R", "emptyset"}


# ------------------------------------------------------------------ values

# What each thread has of its own: an mpmath context (mpmath comes with sympy), because a context holds its precision
# as state while it computes, and the work spent on the verdict at hand.
LOCAL = threading.local()


def real():
    """This thread's mpmath context."""
    if not hasattr(LOCAL, "mp"):
        from mpmath.ctx_mp import MPContext
        LOCAL.mp = MPContext()
        LOCAL.mp.prec = PRECISION
    return LOCAL.mp


def spend(cost: int) -> None:
    """Charges the verdict for work about to be done: a count, not a clock, so that a busy machine changes nothing."""
    LOCAL.work += cost
    if LOCAL.work > MAX_WORK:
        raise Budget(f"more work than {MAX_WORK}")


# A value is a Fraction as long as it can be, so that 10^{100} + 1 is not 10^{100}, and an mpmath number from the first
# root, pi or sample value on.


def bounded(x):
    """A fraction as it is while that is cheap, any other value in the precision of the context."""
    small = isinstance(x, Fraction) and max(abs(x.numerator), x.denominator).bit_length() <= MAX_BITS
    return x if small else real().convert(x)


def sample(name: str, point):
    """A fixed "random" number for a name; negative and large at some points, where |x - 500| is not 500 - x."""
    if not isinstance(point, int):
        return point
    h, scale = zlib.crc32(f"{name}@{point}".encode()), (1, -1, 41, 13, 1009, 100_003)[point]
    return real().mpf((400 + h % 3001) * scale * (-1 if point in (3, 5) and h % 2 else 1)) / 997


def add(a, b):
    """a + b, exactly 0 where all but rounding cancels. A term lost in the rounding of the other is refused, because
    \\sqrt{2} + 2^{9999} would otherwise equal 2^{9999}."""
    m, total = real(), a + b
    if isinstance(total, Fraction) or not a or not b or m.isinf(a) or m.isinf(b):
        return bounded(total)
    high, low = max(m.mag(a), m.mag(b)), min(m.mag(a), m.mag(b))
    if high - low > PRECISION - 120:
        raise Budget("a sum of terms too different in size")
    return total if total and m.mag(total) >= high - PRECISION + 100 else Fraction(0)


def power(a, b):
    """a ** b. The exponent is bounded before anything is computed: 9^{9^{9^9}} must cost nothing."""
    m = real()
    if not a:    # 0^0 and 0^{-1} have no value
        return a if m.re(b) > 0 else m.zero / m.zero
    size = m.mag(m.mag(a))
    if max(m.mag(b), size) > 64:
        raise Budget("a power too large")
    short = isinstance(a, Fraction) and abs(b) * max(abs(a.numerator), a.denominator).bit_length() <= MAX_BITS
    return a ** int(b) if short and m.isint(b) else m.power(a, m.convert(b))


def call(name: str, x: list, point):
    """A function of values, each within the range where it costs microseconds."""
    m, a = real(), x[0]
    if any(map(m.isinf, x)):
        raise Unparsed(f"{name} of infinity")
    if name[0] == "?":    # an unknown function is any fixed generic one
        h = zlib.crc32(name.encode())
        generic = sum(((v + h % 7) * v * (i + 3) / 7 + h % 89 + 1 + i for i, v in enumerate(x)), m.mpf(0))
        return generic if isinstance(point, int) else point
    if name in ("!", "binom"):
        if all(m.isint(v) and 0 <= v <= 2000 for v in x):
            return bounded(Fraction((math.factorial if name == "!" else math.comb)(*map(int, x))))
        if max(map(m.mag, x)) > 40:
            raise Budget("a factorial too large")
        return m.factorial(a) if name == "!" else m.binomial(*x)
    if name in ("floor", "ceil"):
        if m.im(a) or m.mag(a) > PRECISION // 2:
            raise Unparsed("no floor")
        a = m.convert(a)
        return getattr(m, name)(m.nint(a) if abs(a - m.nint(a)) < m.ldexp(1, 60 - PRECISION // 2) else a)
    if name == "sqrt":
        degree = Fraction(2) if len(x) < 2 else x[1]
        odd = not m.im(a) and m.re(a) < 0 and m.mag(degree) < 60 and m.isint(degree) and int(degree) % 2
        # the cube root of -8 is -2, not the complex principal root
        return -power(-a, 1 / degree) if odd else power(a, 1 / degree)
    if name in ("log", "ln", "lg"):
        return m.log(a) / m.log(x[1] if len(x) > 1 else 10 if name == "lg" else m.e)
    if m.mag(a) > (60 if name in ("exp", "sinh", "cosh", "tanh") else 900):
        raise Budget(f"{name} of a huge number")
    return abs(a) if name == "abs" else getattr(m, re.sub("^a(?:rc)?(?=sin|cos|tan|cot)", "a", name))(a)


def value(node: tuple, point):
    """The value of a tree, a Fraction or an mpmath number. point: which sample point, or the value of every symbol.
    Errors: Unparsed where there is no value, Budget over the limits."""
    kind, m = node[0], real()
    spend(200 if kind == "call" and node[1] in ("!", "binom") else 10 if kind in ("call", "^") else 1)
    if kind == "num":
        return node[1]
    if kind == "sym":
        known = {"pi": m.pi, "e": m.e, "i": m.j, "infty": m.inf}
        return +known[node[1]] if node[1] in known else sample(node[1], point)
    if kind == "word":
        dim, size = unit(node[1])
        base, _, exponent = dim.partition("^")
        scale = sample("unit " + base, point) ** int(exponent or 1) if dim else 1
        return size * scale if size else m.pi / 180    # the degree
    # In sums and multiples of vectors each cell is the coefficient of an unknown, one set of unknowns for the rows of
    # a matrix and one for its columns, so that a transposed matrix differs.
    if kind == "seq" and node[1] + node[3] == "()" and ("sym", "infty") not in walk(node):
        level = node[2][0][0] == "seq"
        return value(("+", *(("*", cell, ("sym", f"cell {level} {i}")) for i, cell in enumerate(node[2]))), point)
    try:
        if kind == "call" and node[1] in ("sum", "prod"):
            _, name, index, start, stop, term = node
            ends = [value(start, point), value(stop, point)]
            if all(map(m.isint, ends)):
                spend(max(0, int(ends[1] - ends[0])))
                terms = (swap(term, {index: exact(k)}.get) for k in range(int(ends[0]), int(ends[1]) + 1))
                return value(("+" if name == "sum" else "*", exact(name == "prod"), *terms), point)
            return call("?" + name, [value(index, point), *ends, value(term, point)], point)
        x = [value(part, point) for part in node[2 if kind == "call" else 1:] if kind in ("call", "^", "/", "+", "*")]
        if kind in ("+", "*"):
            return functools.reduce(add if kind == "+" else lambda a, b: bounded(a * b), x)
        if kind in ("call", "^", "/"):
            return call(node[1], x, point) if kind == "call" else power(*x) if kind == "^" else bounded(
                x[0] / x[1] if isinstance(x[1], Fraction) else m.convert(x[0]) / x[1])
    except (ZeroDivisionError, TypeError, AttributeError, ValueError) as why:    # log 0, gamma poles, (1,2) + 1
        if isinstance(why, Budget):
            raise
        raise Unparsed(f"no value: {why}") from why
    raise Unparsed(f"{kind} has no value")


# ------------------------------------------------------------------ comparison of expressions


def measure(node: tuple) -> tuple | None:
    """(relative unit in the last place, whether measured) of -2.68, 5.0 cm or 4.5 \\times 10^{33}, where one literal
    carries the precision; None for anything else. 0.5 and 27.0 are written exactly as often as they are measured.
    >>> [bool(measure(parse(text))[1]) for text in ("2.68", "0.5", "4.5 * 10^3")]
    [True, False, True]
    """
    parts = list(walk(node))
    inexact = [n for n in parts if n[0] == "num" and n[2] is not None]
    if len(inexact) != 1 or not inexact[0][1] or any(n[0] not in ("num", "word", "*", "/", "^") for n in parts):
        return None
    _, number, ulp, digits = inexact[0]
    scientific = any(n[0] == "^" and n[1] == exact(10) for n in parts)
    return real().convert(abs(ulp / number)), scientific or digits > 1 and number.denominator > 1


def close(x, y, gold: tuple, answer: tuple) -> bool:
    """Whether the values x of gold and y of answer agree under the precision rule of the module docstring.
    >>> compare("2.68", "2.683"), compare("1/3", "0.33"), compare("1/3", "0.333333")
    (True, False, True)
    """
    m = real()
    if m.isinf(x) or m.isinf(y):    # no large number is infinite enough
        return x == y
    d = add(x, -y)
    if not d or not x or not y:    # 0 has no relative error: only 0 equals it
        return not d
    x, y, mine, measured = m.convert(x), m.convert(y), measure(answer), measure(gold)
    off = abs(m.convert(d) / x)
    digits = [n[3] for n in walk(answer) if n[0] == "num" and n[2] is not None]
    if digits and min(digits) >= 6:
        if not mine:    # several rounded literals, 1.414214 + 1.732051: no single last place to go by
            return bool(off < 1e-6)
        steps = x / (y * mine[0])    # an integer when these digits suffice to write x exactly: then nothing was cut off
        cut_off = not (measured and measured[1]) and abs(y) < abs(x) and off < mine[0] and not m.almosteq(
            m.nint(steps), steps, 1e-9)
        if off <= mine[0] / 2 or off < 1e-14 or cut_off:
            return True
    return bool(measured and measured[1] and off <= measured[0] / 2 * (1 + m.ldexp(1, -60)))


def values(trees: list[tuple], points: int):
    """The values of the trees at each sample point where all of them have one."""
    for point in range(points):
        try:
            yield [value(t, point) for t in trees]
        except Budget:    # e^x + 1 has no usable value at the later points, which are large
            if point == 0 or LOCAL.work > MAX_WORK:
                raise
        except Unparsed:
            continue


def agree(gold: tuple, answer: tuple) -> bool:
    """Whether the values agree at every sample point, of which there must be one: 1/0 equals nothing."""
    agreed = False
    labels = any(n[0] == "word" for n in walk(gold))
    for x, y in values([gold, answer], 6 if names(gold, answer) or labels else 1):
        # sqrt(1/n) and 1/sqrt(n) differ only where they leave the reals, which is not their domain
        if not (agreed and (real().im(x) or real().im(y))):
            if not close(x, y, gold, answer):
                return False
            agreed = True
    return agreed


def equal(gold: tuple, answer: tuple) -> bool:
    """Equality by value. A unit that only one side writes is ignored: cm after a gold without cm. Percent and degree
    have plain sizes, so there the other side may also have converted: 28% and 0.28. If both sides have units they
    must agree in dimension and size, which the sample value of each dimension sees to.
    >>> compare("5@cm", "50@mm"), compare("5@cm", "5"), compare("5@cm", "5@kg")
    (True, True, False)
    """
    # Letters of the answer are units in 5 m, 9.8 m/s^2 where the gold has no letters.
    head = answer
    while head[0] in ("*", "/"):
        head = head[1]
    if head is not answer and head[0] != "sym" and not names(gold):
        answer = swap(answer, lambda n: ("word", n[1]) if n[0] == "sym" and n[1] in UNITS else None)
    has = [any(n[0] == "word" for n in walk(t)) for t in (gold, answer)]
    if (agreed := agree(gold, answer)) or has[0] == has[1]:
        return agreed
    # without the units, but inside a function a degree is always a degree: sin 30^\circ
    plain = [swap(t, lambda n: exact(1) if n[0] == "word" else n if n[0] == "call" else None) for t in (gold, answer)]
    return agree(*plain)


def proportional(f: tuple, g: tuple) -> bool:
    """Whether the equations f = 0 and g = 0 are the same: f = c g with one constant c, if need be after multiplying
    by their denominators, as for y = 1/x and xy = 1.
    >>> compare("2x = y", "3y - 6x = 0"), compare("2x = y", "x = 2y")
    (True, False)
    """
    below = [("*", exact(1), *(n[2] for n in walk(t) if n[0] == "/" and names(n[2]))) for t in (f, g)]
    rows = list(values([f, g, *below], 6))
    if len(rows) < 2 or not names(f) == names(g) != set() or not all(v for row in rows for v in row):
        return False
    # f = 0 and f d = 0 have the same solutions, because f has none where its denominator d is 0
    m = real()
    ratios = [[m.convert(x) / y for x, y, _, _ in rows], [m.convert(x * d) / (y * e) for x, y, d, e in rows]]
    return any(not any(add(r, -row[0]) for r in row) for row in ratios)


# ------------------------------------------------------------------ comparison of sets of reals

# Two sets are the same if the same sample numbers belong to both. No inequality needs to be solved for that: whatever
# end one side writes down is among the samples, with neighbours so close that any other end shows.
CHECKS = {"<": lambda d: d < 0, "<=": lambda d: d <= 0, ">": lambda d: d > 0, ">=": lambda d: d >= 0,
          "!=": lambda d: d != 0}


def is_set(node: tuple) -> bool:
    """Whether a node can only be a set of reals: an inequality, a union, R; (1, 2) and [1, 2] can also be a pair."""
    if node[0] == "rel":
        return is_set(node[2][1]) if node[1] == ("∈",) else set(node[1]) <= set(CHECKS)
    if node[0] == "seq":    # "x <= 5, x in R", "x < 0 or x = 1"
        fits = all(is_set(n) or is_point(n) for n in node[2])
        return node[1] in ("", "or", "{") and fits and any(map(is_set, node[2]))
    return node[0] in ("∪", "∩", "∖", "such") or node[1] in ("R", "emptyset") or (
        node[0] == "word" and "real" in node[1])


def is_point(node: tuple) -> bool:
    """Whether a node gives its unknown one number: x = 1."""
    return node[:2] == ("rel", ("=",)) and node[2][0][0] == "sym" and len(node[2]) == 2 and not names(node[2][1])


def grid(*sets: tuple) -> list:
    """Where two sets are compared: at every number that is written in them and its negative, closely beside it, half
    way between, far out, and at fixed other points. Whatever end is written on either side cannot hide a difference."""
    m = real()
    spots = [m.mpf(0)]
    for node in (n for t in sets for n in walk(t) if n[0] not in ("sym", "word", "pm") and not names(n)):
        try:
            spots += [s * m.convert(value(node, 0)) for s in (1, -1)]
        except Unparsed:    # an interval; its ends come next
            continue
    spots = sorted({x for x in spots if not m.isinf(x) and not m.im(x)})
    spend(len(spots) ** 2)    # each test goes through the ends of its set
    near = [x + s * m.ldexp(1 + abs(x), -99) for x in spots for s in (1, -1)]
    return [*spots, *near, *((a + b) / 2 for a, b in zip(spots, spots[1:])), *(sample("x", i) for i in range(6))]


def inside(node: tuple, x) -> bool:
    """Whether the number x belongs to the set that a tree stands for. Errors: Unparsed when it is none."""
    kind = node[0]
    if kind == "rel" and node[1] == ("∈",):
        return inside(node[2][1], x)
    if is_point(node):
        return not add(x, -value(node[2][1], 0))
    if kind == "rel" and set(node[1]) <= set(CHECKS):
        if not names(node) or "word" in {side[0] for side in node[2]}:
            raise Unparsed("no inequality of an unknown number")
        for side in node[2]:
            value(side, 0)    # an inequality that cannot be read is no set
        try:
            sides = [value(side, x) for side in node[2]]
            return all(CHECKS[op](add(a, -b)) for op, a, b in zip(node[1], sides, sides[1:]))
        except (Unparsed, TypeError):    # 1/x has no value at 0, \sqrt{x} no order below it
            return False
    # {2x | x > 1} and {x in Z | x > 1} are other sets than their condition
    if kind == "such" and (node[1][0] == "sym" or node[1] == ("rel", ("∈",), (node[1][2][0], ("sym", "R")))):
        return inside(node[2], x)
    if kind in ("∪", "∩", "∖"):
        a, b = inside(node[1], x), inside(node[2], x)
        return a or b if kind == "∪" else a and b if kind == "∩" else a and not b
    if kind == "seq" and is_set(node):
        # a comma between inequalities is "and", but "x < 1, x > 3" cannot mean both at once
        either = node[1] == "or" or not any(all(inside(n, p) for n in node[2]) for p in grid(node))
        return (any if either else all)([inside(n, x) for n in node[2]])
    if kind == "seq" and node[1] in ("(", "[", r"\{") and not names(node):
        steps = [add(x, -value(end, 0)) for end in node[2]]
        if node[1] == r"\{":
            return not all(steps)
        if len(steps) == 2 and add(steps[0], -steps[1]) >= 0:
            closed = [{"[": ">=", "(": ">"}[node[1]], {"]": "<=", ")": "<"}[node[3]]]
            return all(CHECKS[op](step) for op, step in zip(closed, steps))
    if kind in ("sym", "word") and is_set(node):
        return node[1] != "emptyset"
    raise Unparsed("not a set of numbers")


def same_set(gold: tuple, answer: tuple) -> bool:
    """Whether two sets of reals, in at most one unknown each, have the same elements at every point of their grid.
    >>> compare("(-2, 2)", "x^2 < 4"), compare("(-2, 2)", "x^2 <= 4")
    (True, False)
    """
    try:
        unknown = [{n[1] for n in walk(t) if n[0] == "call" and n[1][0] == "?"} or names(t) for t in (gold, answer)]
        free = [u for u, t in zip(unknown, (gold, answer)) if t[0] != "such"]    # {x | x > 0} is {y | y > 0}
        if max(map(len, unknown)) > 1 or len(set().union(*free)) > 1:
            return False
        return all(inside(gold, x) == inside(answer, x) for x in grid(gold, answer))
    except (Unparsed, TypeError):    # complex numbers have no order
        return False


# ------------------------------------------------------------------ comparison of answers


# `same` decides by shape: a set of reals by its members, a list or set by pairing, a pair or matrix cell by cell, an
# equation or inequality by its sides, a word by its letters, and everything else by `equal`.


def named(node: tuple) -> bool:
    r"""Whether the left side of an equation is only a name: x, f(x), (x, y), AB, |AB|, V_1/V_2; not 11a + c, 2x."""
    return node[0] == "word" or node[0] == "call" and node[1][0] == "?" or (
        names(node) != set() and {n[0] for n in walk(node)} <= {"sym", "seq", "call", "*", "/"})


def unnamed(node: tuple) -> tuple:
    r"""x = 3, x \in S and x = 1 + 2 = 3 without the name, 1:2 as a fraction.
    >>> unnamed(parse("x = y + 1 = z")), unnamed(parse("a:b"))[0]
    (('sym', 'z'), '/')
    """
    # A chain of equalities claims its last side. Of two sides the left one must be a name, so that 5 = 5 is no 5.
    while node[0] == "rel" and (node[1] == ("∈",) or "=" in node[1] and set(node[1]) <= set("=:") and (
            named(node[2][0]) or len(node[1]) > 1 or not names(node[2][0]) and node[2][0][0] != "num")):
        cut = len(node[1]) - node[1][::-1].index("=") if "=" in node[1] else 1
        node = ("rel", node[1][cut:], node[2][cut:]) if node[1][cut:] else node[2][-1]
    return ("/", *node[2]) if node[0] == "rel" and node[1] == (":",) else node


def contradicts(node: tuple) -> bool:
    """Whether a name equals plain numbers that are more than 1 % apart: x = 5 = 6 claims neither."""
    if node[0] != "rel" or set(node[1]) != {"="} or {n[0] for n in node[2][1:]} != {"num"}:
        return False
    return any(abs(a[1] - b[1]) > abs(a[1]) / 100 for a, b in zip(node[2][1:], node[2][2:]))


def variants(node: tuple) -> list[tuple]:
    r"""A tree with ± as its readings: both signs of each, coupled when a ∓ shows that they belong together.
    >>> len(variants(parse(r"1 \pm 2 \pm 3"))), len(variants(parse(r"1 \pm 2 \mp 3")))
    (4, 2)
    """
    signs = [n for n in walk(node) if n[0] == "pm"]
    if len(signs) > 4:
        raise Budget(r"more than 4 signs \pm")
    linked = any(n[2] == "∓" for n in signs)
    choices = [[s] * len(signs) for s in (1, -1)] if linked else itertools.product((1, -1), repeat=len(signs))
    picks = [{n: exact(-s if n[2] == "∓" else s) for n, s in zip(signs, choice)} for choice in choices]
    return list(dict.fromkeys(swap(node, pick.get) for pick in picks))


def restricts(node: tuple) -> bool:
    """Whether a node says that its letter is any integer: k in Z."""
    return node[:2] == ("rel", ("∈",)) and node[2][1][1] in ("Z", "N")


BAGS = ("", r"\{\}")    # the collections without an order


def collection(node: tuple) -> tuple[str | None, list[tuple]]:
    r"""(brackets, members): "" for a bare list or what ± stands for, "\{\}", "()", "[)" ...; None for a single one.
    >>> collection(parse("x, y")), collection(parse("(x, y]"))[0]
    (('', [('sym', 'x'), ('sym', 'y')]), '(]')
    """
    inner = unnamed(node)
    if inner[0] == "seq" and inner[1] in ("", "or", "{", r"\{"):
        # "pi/4 + k pi, k in Z" is one answer, but Z restricts an inequality
        items = [n for n in inner[2] if not restricts(n) or any(map(is_set, inner[2]))]
        parts = [(None, []) if item[:2] == ("seq", "{") else collection(item) for item in items]
        found = [v for item, (kind, own) in zip(items, parts) for v in (own if kind in BAGS else [item])]
        # A set holds a member once; in a list of solutions a double root may count: see `same`.
        return (r"\{\}", list(dict.fromkeys(found))) if inner[1] == r"\{" else ("", found)
    if len(readings := variants(node)) > 1:
        return "", readings
    return (inner[1] + inner[3], list(inner[2])) if inner[0] == "seq" else (None, [node])


def same(gold: tuple, answer: tuple) -> bool:
    """Whether two trees are the same answer: collections member by member, everything else by value.
    >>> compare("1, 2", "2, 1"), compare("1, 2", "1"), compare("(1, 2)", "(2, 1)")
    (True, False, False)
    """
    spend(1)
    x, y = unnamed(gold), unnamed(answer)
    if (is_set(x) or is_set(y)) and same_set(x, y):
        return True
    (kind, g), (other, a) = collection(gold), collection(answer)
    # Lists and sets: as many different members on both sides, each with a partner of its own. A subset of the
    # solutions, and a list of guesses around the right one, both fail here.
    if kind in BAGS and other in BAGS:
        if len(set(g)) == len(g):    # a solution found twice is one, but a gold with a double root wants it twice
            a = list(dict.fromkeys(a))
        for item in g if len(g) == len(a) else ():
            partner = next((i for i, candidate in enumerate(a) if same(item, candidate)), None)
            if partner is None:
                return False
            del a[partner]
        return not a
    if gold[0] == answer[0] == "rel" and ("=" in gold[1]) == ("=" in answer[1]) and not {kind, other} & set(BAGS):
        return same_chain(gold, answer)
    if kind in BAGS and len(g) == 1:    # {3} for 3
        return same(g[0], answer)
    if other in BAGS and len(a) == 1:
        return same(gold, a[0])
    if {kind, other} == {"", "()"}:    # a list for a pair, in order or with names: y = 2, x = 1 for (1, 2)
        g, a = (sorted(n, key=lambda n: n[2][0]) if all(v[0] == "rel" and v[2][0][0] == "sym" for v in n) else n
                for n in (g, a))
        kind = other
    if kind is other is None:
        if "word" in (x[0], y[0]):
            texts = [re.sub(r"[^a-z0-9]", "", t[1].lower()) if t[0] in ("word", "sym") else "" for t in (x, y)]
            return texts[0] == texts[1] != ""
        return x[0] != "rel" != y[0] and equal(x, y)
    if None in (kind, other) and "()" in (kind, other):    # 1/5 (1, 2)
        return equal(x, y)
    return kind == other and len(g) == len(a) and all(map(same, g, a))


def same_chain(gold: tuple, answer: tuple) -> bool:
    """Equations up to a factor, ratios up to a factor, and chains of relations side by side in either direction.
    >>> compare("1:2:3", "2:4:6"), compare("f(1) < f(2)", "f(2) > f(1)")
    (True, True)
    """
    (_, ops, g), (_, other, a) = gold, answer
    if set(ops + other) == {"="}:
        x, y = g[0][2:], a[0][2:]    # the arguments in f(x) = x and f(n) = n
        if g[0][0] == "call" and g[0][:2] == a[0][:2] and {n[0] for n in x + y} == {"sym"}:
            a = a if names(*x) & names(*a) else swap(a, dict(zip(y, x)).get)
        y_for_f = {g[0][0], a[0][0]} == {"call", "sym"} and "y" in (g[0][1], a[0][1])
        if named(g[0]) and named(a[0]) and (g[0] == a[0] or y_for_f):
            return same(g[-1], a[-1])
        if len(g) == len(a) == 2 and proportional(*(("+", left, signed("-", right)) for left, right in (g, a))):
            return True
    if set(ops + other) == {":"} and not any(n[0] == "word" for n in walk(gold + answer)):    # 2:15 pm is not 4:30 pm
        return len(g) == len(a) and all(same(("/", g[0], p), ("/", a[0], q)) for p, q in zip(g[1:], a[1:]))
    # a < b <= c is also c >= b > a
    back = tuple(op.translate(str.maketrans("<>", "><")) for op in reversed(other))
    return any(ops == signs and all(map(same, g, sides)) for signs, sides in ((other, a), (back, a[::-1])))


def renamed(gold: tuple, answer: tuple) -> tuple:
    r"""The answer with its arbitrary constants named as in the gold: n for k in Z, K for C where there is also an x.
    >>> compare(r"k \pi, k \in \Z", r"n \pi, n \in \Z"), compare("2k", "2n")
    (True, False)
    """
    mine, theirs = names(gold), names(answer)
    integers = {n[2][0] for t in (gold, answer) for n in walk(t) if restricts(n)} if mine != theirs else ()

    def arbitrary(name: str) -> bool:
        return bool(integers) and (name in "kmnl" or ("sym", name) in integers) or (
            len(mine) > 1 and re.fullmatch(r"C|K|[Cc]_\d", name) is not None)
    old, new = sorted(filter(arbitrary, theirs - mine)), sorted(filter(arbitrary, mine - theirs))
    if [name[1:] for name in old] != [name[1:] for name in new]:
        return answer
    return swap(answer, {("sym", name): ("sym", wanted) for name, wanted in zip(old, new)}.get) if old else answer


# ------------------------------------------------------------------ verdicts

CHOICE = re.compile(r"\(?([A-J])(?:\)[.:]?|[.:])\s*(\S.*)", re.S)


@functools.lru_cache(maxsize=8192)
def gold_text(gold: str) -> str:
    """The cleaned gold; a whole solution given as gold is reduced to its box or its final answer."""
    final = FINAL.match(gold)
    gold = boxed(gold)[0] or (final[1] if final else gold)
    # 0.56 = 56% is a gold in two spellings
    return re.sub(r"^[\d.]+ ?= ?(?=[\d.]+ ?@percent)", "", clean(gold)) if len(gold) <= MAX_CHARS else gold


def readings(gold: str, answer: str) -> list[tuple[str, str]]:
    r"""The readings of two cleaned texts, of which one must agree. A comma separates thousands or list items or is
    the decimal comma of an answer (of a gold only behind a 0); "(C) 12" is a choice with its text; \log without a
    base is natural or decimal, the same on both sides.
    >>> readings("1,234", "1234")
    [('1234', '1234'), ('1,234', '1234')]
    """
    pairs = [(joined(gold), joined(answer)), (gold, answer)]
    if m := CHOICE.fullmatch(answer):
        choice = re.fullmatch(r"\(?[A-J]\)?", gold)
        pairs = [(gold.strip("()"), m[1])] if choice else [*pairs, (joined(gold), joined(m[2]))]
    if re.fullmatch(r"-?\d+,\d+", answer) and re.fullmatch(r"-?\d*\.\d+", gold):
        pairs.append((gold, answer.replace(",", ".")))
    if re.fullmatch(r"-?0,\d{3,}", gold):
        pairs.append((gold.replace(",", "."), answer))
    if "log" in gold + answer:
        pairs.append(tuple(joined(t).replace("log", "lg") for t in (gold, answer)))
    return list(dict.fromkeys(pairs))


def compare(gold: str, answer: str) -> bool:
    """Whether one reading of two cleaned texts is the same answer. Errors: Unparsed, Budget."""
    LOCAL.work = 0
    g, a = parse(gold), parse(answer)
    return not contradicts(a) and same(g, renamed(g, a))


def decide(gold: str, answer: str) -> str:
    """The reason of the verdict on an extracted answer.
    >>> decide("1/2", "0.5"), decide("1/2", "0.4"), decide("1/2", "1/0")
    ('correct', 'wrong', 'wrong')
    """
    g = gold_text(gold)
    if max(len(answer), len(g)) > MAX_CHARS:
        return "correct" if answer.strip() == gold.strip() else "budget"
    a = clean(answer)
    # Equal strings, as two thirds of real verdicts are, and only then trees. "2 3" is not 23.
    if re.sub(r"(?<!\d) | (?!\d)", "", g) == re.sub(r"(?<!\d) | (?!\d)", "", a):
        return "correct" if a else "no_answer"
    reason = "unparsed"    # unless some reading of the answer and of the gold could be compared
    for pair in readings(g, a):
        try:
            if compare(*pair):
                return "correct"
            reason = "wrong"
        except Unparsed:
            continue
        except (Budget, RecursionError):    # the latter only where the caller has used up the stack
            return "budget"
    return reason


def verify(response: str, *, gold: str, finished: bool | None = None) -> Verdict:
    r"""Whether the final answer of a response equals the gold answer.

    response: the model's text; what precedes </think> or follows an end-of-turn token is ignored.
    gold: the raw string of the dataset. finished: False when the token limit stopped the response, None if unknown.
    Errors: TypeError when either text is not a str; nothing else, for no input.

    >>> verify(r"\boxed{x = 1, 2}", gold="2, 1").reason, verify(r"\boxed{0.33}", gold=r"\frac13").reason
    ('correct', 'wrong')
    """
    if not isinstance(response, str) or not isinstance(gold, str):
        raise TypeError(f"response and gold must be str, not {type(response).__name__} and {type(gold).__name__}")
    answer, reason = extract(response, finished)
    if answer is not None:
        reason = decide(gold, answer)
    return Verdict(reason == "correct", reason, answer)


def gold_problem(gold: str) -> str | None:
    r"""None when the gold answer is understood, otherwise one line saying why not.
    >>> gold_problem(r"\frac{1}{2}"), gold_problem("(1, 2")
    (None, 'expected ) ] but found the end')
    """
    try:
        text = joined(gold_text(gold))
        return None if compare(text, text) else "it has no value that could be compared"
    except (Unparsed, Budget, RecursionError) as why:
        return str(why)


# ------------------------------------------------------------------ batches


def reasons(verdicts: list[Verdict]) -> dict[str, int]:
    """How many verdicts have each reason.
    >>> reasons([Verdict(True, "correct", "1"), Verdict(False, "wrong", "2"), Verdict(True, "correct", "3")])
    {'correct': 2, 'wrong': 1}
    """
    return dict(collections.Counter(v.reason for v in verdicts))


def row_verdict(row: tuple) -> Verdict:
    return verify(row[0], gold=row[1], finished=row[2])


def verify_many(responses: list[str], golds: list[str], *, workers: int = 0, finished: list | None = None,
                stuck_after: float = 30.0) -> list[Verdict]:
    """The verdicts in order, from this process (workers=0) or from that many child processes.

    A row whose child dies, or answers nothing for stuck_after seconds, becomes "budget"; the children are replaced and
    go on behind it. This is a net below `verify`, which needs no clock. Errors: ValueError when the lengths differ.
    """
    finished = [None] * len(responses) if finished is None else list(finished)
    if not len(responses) == len(golds) == len(finished):
        lengths = f"{len(responses)} responses, {len(golds)} golds, {len(finished)} finished flags"
        raise ValueError(f"lengths differ: {lengths}; give one gold and one flag per response")
    rows, out = list(zip(responses, golds, finished)), []
    if not workers:
        return [row_verdict(row) for row in rows]
    # Forked where possible, because a forked child has nothing to import.
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    while len(out) < len(rows):
        with context.Pool(workers) as pool:    # leaving it terminates the children
            verdicts = pool.imap(row_verdict, rows[len(out):])
            try:
                while len(out) < len(rows):
                    out.append(verdicts.next(stuck_after))
            except multiprocessing.TimeoutError:
                out.append(Verdict(False, "budget", None))
        pool.join()
    return out


# ------------------------------------------------------------------ command line


def against_math_verify(rows: list[tuple[str, str]]) -> list[bool]:
    """The verdicts of the math-verify package on (response, gold) rows, for comparison."""
    try:
        import math_verify
    except ImportError:
        raise SystemExit('math-verify is not installed: pip install "math-verify[antlr4_13_2]"') from None
    parsed = ((math_verify.parse(gold if "$" in gold else f"${gold}$"), math_verify.parse(text)) for text, gold in rows)
    return [bool(math_verify.verify(gold, answer)) for gold, answer in parsed]


def main() -> None:
    parser = argparse.ArgumentParser(description="Score the responses of a JSON-lines file.")
    parser.add_argument("file")
    parser.add_argument("--response-key", default="response")
    parser.add_argument("--gold-key", default="gold")
    parser.add_argument("--score-key", default="recorded_score", help="a recorded true/false to compare with")
    parser.add_argument("--show-wrong", type=int, default=0, metavar="N", help="print N rows that are not correct")
    parser.add_argument("--against", choices=["math-verify"], help="score with this package too and print both")
    args = parser.parse_args()
    with open(args.file, encoding="utf-8") as lines:
        data = [json.loads(line) for line in lines if line.strip()]
    rows = [(r[args.response_key], str(r[args.gold_key])) for r in data]
    began = time.perf_counter()
    verdicts = verify_many([r for r, _ in rows], [g for _, g in rows])
    seconds = time.perf_counter() - began
    right, each = sum(v.correct for v in verdicts), seconds / max(1, len(rows)) * 1e3
    print(f"{right} of {len(rows)} correct, {each:.2f} ms each, {reasons(verdicts)}")
    theirs = [str(r[args.score_key]).lower() in ("true", "1", "1.0") if args.score_key in r else None for r in data]
    if args.against:
        began = time.perf_counter()
        theirs = against_math_verify(rows)
        other = time.perf_counter() - began
        print(f"{sum(theirs)} of {len(rows)} correct by {args.against}, {other / seconds:.0f} x the time")
    for (_, gold), verdict, score in zip(rows, verdicts, theirs):
        if score not in (None, verdict.correct):
            print(f"differs: {verdict.reason} here, {score} there; gold {gold!r}, answer {verdict.answer!r}")
    for (_, gold), verdict in [(r, v) for r, v in zip(rows, verdicts) if not v.correct][:args.show_wrong]:
        print(f"{verdict.reason}: gold {gold!r}, answer {verdict.answer!r}")


if __name__ == "__main__":
    main()
