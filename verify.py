r"""verify.py: decide whether a model's answer to a math problem equals the gold answer.

    extract the answer -> clean its LaTeX -> parse it into a tree -> compare with the tree of the gold answer

What differs from the checkers commonly used as a reward:
1. Equality is decided by value, in 600-bit arithmetic at fixed sample points with relative error only; a fixed
   grammar builds the tree and no text is ever evaluated as code.
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
MAX_WORK = 20_000   # cost of all evaluations of one verdict: a node counts 1, a function or a power 10
# Bits of the arithmetic; the second where the first would lose a term of a sum. Equal values agree in all but 100.
PRECISIONS = (600, 4000)


class Verdict(NamedTuple):
    correct: bool
    reason: str           # correct | wrong | no_answer | unparsed | budget | truncated
    answer: str | None    # the extracted answer as it was written


class Unparsed(ValueError):
    """The text is no answer of this grammar, or has no value (1/0)."""


class Budget(ValueError):
    """Deciding would cost more than the limits above allow."""


class Absorbed(Budget):
    """A sum needs more precision than it was computed with."""


# ------------------------------------------------------------------ extraction

TURN_END = re.compile(
    r"<\|(?:im_end|im_start|endoftext|eot_id|end_of_text)\|>|</s>|<end_of_turn>|<｜end▁of▁sentence｜>")
BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])[ \t]*(?:\{|(?P<bare>[-+]?\w+(?:[./]\w+)?))?"
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
    """The content of the last box, None without one, and whether a later box was opened and never closed.

    Boxes joined only by a comma, "and" or "or" are one list: hedging over two boxes must be a list of guesses and
    not the luck of the last one. One pass with a stack, because to match the braces of each box is quadratic.
    """
    stack, found, hanging = [], [], -1
    for m in BOX.finditer(text):
        token = m.group()
        if m["bare"]:
            found.append((*m.span(), m["bare"]))
        elif token == "{" or "box" in token and token[-1] == "{":
            stack.append((m.start(), m.end(), len(token) > 1))
        elif token == "}" and stack:
            start, inner, is_box = stack.pop()
            if is_box:
                found.append((start, m.end(), slice(inner, m.start())))
        elif "box" in token:
            hanging = m.start()
    hanging = max([start for start, _, is_box in stack if is_box] + [hanging])
    start, parts = len(text), []
    for begin, end, inner in reversed(found):
        if end <= start:
            if parts and (start - end > 60 or len(parts) > 60 or not BETWEEN.fullmatch(text, end, start)):
                break
            content = (inner if isinstance(inner, str) else text[inner]).strip()
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
    # A long text that ends in mid-sentence or mid-formula was cut off, and what it ends with is a number in passing.
    if ended or len(text) < 150 or re.search(r"(?:[.!*$>]|\\[)\]]|\([A-J]\))$", text):
        for pattern in UNBOXED:
            m = pattern.match(tail)
            answer = "".join(m.groups("")).strip(" $*") if m else ""
            if answer and ("formula" in pattern.groupindex or try_parse(answer)):
                return answer.strip(), ""
    return None, "no_answer"


# ------------------------------------------------------------------ cleaning

UNICODE = str.maketrans(
    dict(zip("−–‑⁄÷′’‘，（）：；", "---//" + "'" * 3 + ",():;")) | {"\u200b": "", "\ufeff": "", "\u2061": ""}
    | {code: chr(code - 0xFEE0) for code in range(0xFF10, 0xFF5B)}    # full-width digits and letters
    | {pair[0]: rf"\{pair[1:]} " for pair in (
        "×times ·cdot ∙cdot ⋅cdot √sqrt πpi ∞infty °degree ºdegree ≤le ≥ge ⩽le ⩾ge ≠ne ±pm ∓mp ∪cup ∩cap ∈in ℝR "
        "∅emptyset ≈approx ½frac12 ¼frac14 ¾frac34 ⅓frac13 ⅔frac23 ⟨langle ⟩rangle ⌊lfloor ⌋rfloor ⌈lceil ⌉rceil "
        "…ldots αalpha βbeta γgamma δdelta θtheta λlambda μmu ωomega φphi σsigma τtau €word{euro} £word{pound}"
    ).split()})
SMALL = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ₀₁₂₃₄₅₆₇₈₉", "0123456789-+n0123456789")
WORDS = {"and": " , ", "and,": " , ", "or": r" \or ", "or,": r" \or ", "": " "}
REWRITES = [(re.compile(pattern, re.S), new) for pattern, new in (
    # 1. sub- and superscript characters, \left and \right, spacing
    (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda m: "^{" + m.group().translate(SMALL) + "}"),
    (r"[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m.group().translate(SMALL) + "}"),
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?", " "),
    (r"(?<=\d)(?: ?\{ ?, ?\}|, ?\\!|\\! ?,|\\,|\\ ) ?(?=\d{3}(?!\d))", ""),    # 10{,}000 is explicit, 10,000 is not
    (r"(?<!\\)\\(?:[,;:!>~ \n]|(?:displaystyle|textstyle|limits|phantom)(?![a-zA-Z])|q?quad|hspace\{[^{}]*\})", " "),
    (r"(?<!\\)~|\\[()\[\]]|(?<!\\)\$", " "),
    # 2. font and text commands; a matrix becomes one command with a list per row: \mat{a,b}{c,d}
    (r"\\(?:mathbf|mathit|boldsymbol|bm|mathcal|vec|hat|bar|underline|boxed|fbox|angle|triangle)(?![a-zA-Z])", ""),
    (r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|operatorname\*?|hbox|rm)\s*\{([^{}]*)\}", lambda m: said(m[1])),
    (r"\\begin\s*\{(?:(?:[pbB]|small)?matrix\}|array\}\s*(?:\{[^{}]*\})?)(.*?)\\end\s*\{[a-zA-Z]*\}",
     lambda m: rf"\mat{{{joined(m[1]).rstrip(' ' + chr(92))}}}".replace("&", ",").replace(r"\\", "}{")),
    # the arithmetic in unit phrases
    (r"\\word\{(?:of|an?|the)\} *(?=\\word)", ""), (r"\\word\{per\}|(?<=[a-z]) per (?=[a-z])", "/"),
    (r"\\word\{mph\}|\bmph\b", r"\\word{mile}/\\word{hour}"),
    (r"(?:\\word\{(?:square|sq)\}|\b(?:square|sq)\b)\.? *(\\word\{\w+\}|[a-z]+)", r" \1^2"),
    (r"(?:\\word\{cubic\}|\bcubic\b) *(\\word\{\w+\}|[a-z]+)", r" \1^3"),
    (r" *(?:\\word\{squared\}|\bsquared\b)", "^2"), (r" *(?:\\word\{cubed\}|\bcubed\b)", "^3"),
    (r"\\mathbb ?(?:\{ ?R ?\}|R)", r"\\R "), (r"\\mathbb ?(?:\{ ?([A-Z]) ?\}|([A-Z]))", r" \1\2 "),
    (r"[,;]?\s*\( ?([kmn]) ?\\in +([ZN]) +\)(?=[\s.}]*$)", r", \1 \\in \2"),
    # 3. fractions: \frac12 with braces, 0.\overline{3}, mixed numbers
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"), (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
    (r"\\frac\s*(\d)", r"\\frac{\1}"), (r"(\\frac\{[^{}]*\})\s*(\d)", r"\1{\2}"),
    (r"(?<!\d)(\d*)\.(\d*)\\overline\s*\{(\d+)\}", lambda m: (
        rf"\frac{{{m[1]}{m[2]}{m[3]}-{m[1] or 0}{m[2]}}}{{{'9' * len(m[3])}{'0' * len(m[2])}}}")),
    (r"\\overline(?![a-zA-Z])", ""),
    (r"(?<![\w.^/])(\d+) ?(?:\\frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}|(?<= )(\d+)/(\d+))", lambda m: mixed(m)),
    # 4. degrees, primes and derivatives: dx/dt, \dot{x} and x^\prime are all x'
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))", r"\\degree "),
    (r"\^\s*(?:\{\s*((?:\\prime\s*)+)\}|(\\prime))", r"\1\2"), (r"\\prime\s*", "'"),
    (r"\\(d?)dot(?:\s*\{\s*(\\?[a-zA-Z]+)\s*\}| (\\?[a-zA-Z]+))", lambda m: f"{m[2] or m[3]}'" + "'" * len(m[1])),
    (r"\\frac ?\{ ?d ?(\^ ?\{?2\}?)? ?(\\?[a-zA-Z]+(?:_\{?\w+\}?)?) ?\} ?\{ ?d ?[a-z] ?(?:\^ ?\{?2\}?)? ?\}",
     lambda m: m[2] + "'" * (2 if m[1] else 1)),
    (r"\bd([a-z])\s*/\s*d[a-z]\b", r"\1'"),
    # 5. program notation and white space
    (r"\bnp\.|\bmath\.", ""), (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times "), (r"\*\*", "^"),
    (r"(?<![\d.])(\d[\d.]*)[eE]([-+]?\d+)", r"(\1*10^{\2})"), (r"\.\.\.+", r"\\ldots "), (r"\s+", " "))]


def mixed(m: re.Match) -> str:
    """2\\frac12 and 1 1/4 as sums; an improper fraction behind a number is a factor."""
    top, bottom = m[2] or m[4], m[3] or m[5]
    return rf"({m[1]}+{top}/{bottom})" if len(top) <= len(bottom) < 99 and int(top) < int(bottom) else m[0]


def said(text: str) -> str:
    r"""What stands for \text{...}: a separator, plain content (numbers, lists, letters), or word tokens."""
    text = text.strip(" .\\~$")
    if text in WORDS or re.search(r"\d|[,:\\]|^\(?[A-Z]\)?$|^[ei]$", text):
        return WORDS.get(text, f" {text} ")
    return re.sub(r"[^\W\d_]+", r"\\word{\g<0>}", text.strip("()"))


@functools.lru_cache(maxsize=1024)
def clean(text: str) -> str:
    r"""One spelling per construct, noise removed.

    >>> clean(r"$\left(\dfrac{1}{2},\; 90^{\circ}\right)$.")
    '(\\frac{1}{2}, 90\\degree )'
    """
    if r"\begin" not in text:
        text = re.sub(r"\\{2,}(?=[a-zA-Z(\[,!$%{])", r"\\", text)    # doubly escaped LaTeX
    text = " ".join(text.translate(UNICODE).split())
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    text = re.sub(r"^\{([^{}]*)\}$", r"\1", text.rstrip(" .,;*`\"\\").lstrip(" ,;*`\"")).strip()
    if ";" in text and not re.search(r"[(\[{]", text):    # p=1, q=2; p=3, q=4: solutions of several unknowns
        text = "{" + text.replace(";", "},{") + "}"
    return text


# ------------------------------------------------------------------ words and units

# dimension: name=size in one common unit of the dimension. A word in no row is a label: apples agree only with apples.
UNITS = {name: (dim, size) for dim, row in {
    "": "percent=.01 pct=.01 percentage=.01 degree=deg deg=deg unit=1 rad=1 radian=1 time=1",
    "L": "m=1 meter=1 metre=1 inch=.0254 inches=.0254 in=.0254 foot=.3048 feet=.3048 ft=.3048 yard=.9144 mile=1609.344",
    "T": "s=1 sec=1 second=1 min=60 minute=60 h=3600 hr=3600 hour=3600 day=86400 week=604800 year=31557600",
    "M": "g=1 gram=1 pound=453.59237 lb=453.59237 ounce=28.349523 oz=28.349523",
    "L^3": "l=1e-3 liter=1e-3 litre=1e-3 L=1e-3",
    "$": "dollar=1 cent=.01 cents=.01", "E": "J=1 joule=1 erg=1e-7", "P": "Pa=1 pascal=1",
    "N": "N=1 newton=1 dyne=1e-5", "W": "W=1 watt=1", "U": "V=1 volt=1", "A": "A=1 ampere=1", "K": "K=1 kelvin=1",
    "f": "Hz=1 hertz=1", "mol": "mol=1 mole=1", "eV": "eV=1",
}.items() for name, size in (pair.split("=") for pair in row.split())}
PREFIXES = {prefix: f"e{n}" for n, both in {
    -9: "n nano", -6: "u μ micro", -3: "m milli", -2: "c centi", 3: "k kilo", 6: "M mega", 9: "G giga"
}.items() for prefix in both.split()}
PROSE = set("is are the if or but maybe probably answer than to so because then since therefore i we it".split())

@functools.lru_cache(maxsize=1024)
def unit(word: str) -> tuple[str, str | Fraction]:
    """(dimension, size) of a unit word with its plural and SI prefix; a label is a dimension of its own."""
    for w in (word, word.lower(), word.removesuffix("s").lower(), word.removesuffix("s")):
        if w in UNITS:
            return UNITS[w]
        for n in (5, 4, 1):
            dim, size = UNITS.get(w[n:], ("", ""))
            if w[:n] in PREFIXES and (size == "1" or dim == "L^3"):
                return dim, Fraction(size) * Fraction("1" + PREFIXES[w[:n]])
    return "label " + word.lower().removesuffix("s"), "1"


def bare_unit(word: str, spaced: bool) -> bool:
    """Whether letters behind a number are its unit: 5 cm, 12 apples; but 5xy, 2mg (m times g), 3ab are products."""
    known = not unit(word)[0].startswith("label")
    return known and (spaced or word not in ("gm", "mW", "mV")) and word not in ("mg", "ms") or (
        spaced and len(word) > 3 and word.islower())


# ------------------------------------------------------------------ tokens

# The vocabulary of the grammar, in the order in which a text meets it: spellings of one meaning become one token
# (RENAMED), which is an operator with its level (BINARY), the beginning of a factor (FACTORS), or a bracket (PAIRS).
TOKEN = re.compile(
    r"\s*(?:(?P<num>\d+\.?\d*|\.\d+)|\\word\{(?P<word>[^{}]*)\}|(?P<cmd>\\[a-zA-Z]+|\\.)"
    r"|(?P<name>[^\W\d_]+)|(?P<op>[<>!=:]=|\S))")
FUNCTIONS = set("sin cos tan cot sec csc arcsin arccos arctan arccot asin acos atan sinh cosh tanh log ln lg exp "
                "sqrt abs".split())
SYMBOLS = set("alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi varphi "
              "chi psi omega Gamma Delta Theta Lambda Pi Sigma Phi Psi Omega hbar ell odot mho pi infty emptyset R "
              "ldots max min".split())
# What a product goes on with without a sign. A command that is missing here ends the expression: the text is refused.
FACTORS = set(r"( [ { | \$ \langle \lfloor \lceil \frac \binom \mat \sum \prod".split()) | {
    "\\" + t for t in FUNCTIONS | SYMBOLS}
BINARY = {op: (level, kind) for level, row in enumerate((
    r"= = == = := = \equiv = < < <= <= \le <= \leq <= \leqslant <= > > >= >= \ge >= \geq >= \geqslant >= \lt < \gt > "
    r"!= != \ne != \neq != \in ∈ \approx ~ : :", r"\cup ∪ \cap ∩ \setminus ∖ \backslash ∖", r"+ + - - \pm ± \mp ∓",
    r"* * / / \cdot * \times * \ast * \div /"), 1) for op, kind in zip(row.split()[::2], row.split()[1::2])}
RENAMED = dict(pair.split("→") for pair in (
    r"or→\or and→, infinity→\infty inf→\infty oo→\infty pi→\pi \varnothing→\emptyset \dots→\ldots \cdots→\ldots "
    r"\lor→\or \land→, \lvert→| \rvert→| \mid→| \vert→| \|→| \rbrack→] \lbrack→[ \,→, \[→[ \]→] \%→%"
).split()) | {f: "\\" + f for f in FUNCTIONS}
# An interval may open and close differently: (0, 1].
PAIRS = {"(": ") ]", "[": ") ]", "{": "}", r"\{": r"\}", r"\langle": r"\rangle"}
SEPARATORS = (",", ";", r"\or")
END = set(") ] } \\} | : \\rangle \\rfloor \\rceil".split()) | {""}
SPELLED = re.compile("|".join(sorted(FUNCTIONS | {"pi"}, key=len, reverse=True)) + "|.")


def tokens(text: str) -> list[tuple[str, str]]:
    """(kind, text) of each token. A run of letters is a known name, a unit behind a number, a word where nothing but
    a word can stand, and otherwise a product of functions and symbols."""
    out = [("start", "")]
    for m in TOKEN.finditer(text):
        kind, t, (before, last) = m.lastgroup, m[m.lastgroup], out[-1]
        if len(t) > MAX_DIGITS:
            raise Budget(f"a token of {len(t)} characters, at most {MAX_DIGITS} are read")
        # Where a word can stand alone (fresh), and where letters continue a quantity (behind): "Monday" and "x = even"
        # are words, "12 apples" and "5 cm/s" have units, "abc" behind anything else is a product.
        behind = before in ("num", "unit") or last in ("}", ")", "%") or last == "/" and out[-2][0] == "unit"
        fresh = before in ("start", "word") or last in (*SEPARATORS, "(", "=", r"\{") or len(out) == 2 and last == "{"
        if kind != "word" and t in RENAMED:
            kind, t = "cmd", RENAMED[t]
        if kind == "name" and len(t) > 1:
            after = text[m.end():m.end() + 9].lstrip()
            alone = fresh and (not after or after[0] in ",)" or after[0].isalpha())
            if (behind and (before == "unit" or bare_unit(t, m[0][0] == " ")) or len(t) > 2 and t.isupper()
                    or alone and (len(t) > 2 or before == "word" or after[:1].isalpha())):
                kind = "word"    # LQSX too: its letters must not commute
            else:
                out += [("cmd", "\\" + p) if len(p) > 1 else ("name", p) for p in SPELLED.findall(t)]
                continue
        if kind == "word" and not fresh:
            kind = "unit"
            if t in PROSE or len(out) > 99:
                raise Unparsed(f"prose behind a number: {t}")
        if kind == before == "word":
            out[-1] = ("word", last + " " + t)
        else:
            out.append((kind, t))
    return out[1:] + [("end", "")]


# ------------------------------------------------------------------ parsing

# A node is a tuple: (num value ulp digits) (sym name) (unit name) (word text) (neg a) (+ ...) (* ...)
# (/ ^ ∪ ∩ ∖ such a b) (pm position sign) (call name args...) (rel ops sides) (seq open items close) (mat rows).


class Parser:
    """Precedence climbing over the tokens of one answer. State: the position, how deep the grammar is nested, and
    whether a bar or colon would close what is open, as in |x| and {x | x > 0}."""

    def __init__(self, text: str):
        self.tokens, self.i, self.depth, self.bars = tokens(text), 0, 0, False

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

    def items(self) -> tuple:
        """What stands between two brackets or in a whole answer: one expression, or a bare list of them."""
        found, kind, apart = [], "", True
        while self.next not in END or self.next in ("|", ":") and not self.bars:
            if self.next in SEPARATORS:
                kind, apart = "or" if self.take() == r"\or" else kind, True
                continue
            if not apart:
                raise Unparsed(f"unexpected {self.next}")
            item, apart = self.expression(), False
            if found and found[-1][:2] == ("rel", ("!=",)) and item[0] != "rel":    # x \ne 2, 3
                item = ("rel", ("!=",), (found[-1][2][0], item))
            found.append(item)
        if not found:
            raise Unparsed("nothing to read")
        return found[0] if len(found) == 1 else ("seq", kind, tuple(found), "")

    def expression(self, level: int = 1) -> tuple:
        """What binds at least as tightly as level: 1 relations, 2 sets, 3 sums, 4 products, 5 powers and signs."""
        if self.next == r"\approx" and level == 1:    # "\approx 8.24": the digits already say how precise it is
            self.take()
        signs = []
        while self.next in ("-", "+", r"\pm", r"\mp"):
            signs.append(BINARY[self.take()][1])
        left = self.expression(max(level, 4)) if signs else self.powers()
        for sign in reversed(signs):
            left = self.signed(sign, left)
        ops, sides = [], [left]
        while True:
            own, op = BINARY.get(self.next, (0, ""))
            if own >= level and not (op == ":" and self.bars):
                self.take()
                right = self.expression(own + 1)
                if own > 1:
                    op, right = ("+", self.signed(op, right)) if own == 3 else (op, right)
                    sides[-1] = (*sides[-1], right) if op in "+*" and sides[-1][0] == op else (op, sides[-1], right)
                elif op != "~" or sides[-1][0] == "sym":    # x \approx 5 claims 5, but 2/3 \approx 0.67 claims 2/3
                    ops, sides = ops + ["=" if op == "~" else op], sides + [right]
            elif level <= 4 and self.starts_factor():
                if sides[-1][0] == "word":
                    raise Unparsed("prose")
                sides[-1] = times(sides[-1], self.powers())
            else:
                break
        return ("rel", tuple(ops), tuple(sides)) if ops else sides[0]

    def signed(self, sign: str, node: tuple) -> tuple:
        r"""A term behind a sign; each \pm is a factor of its own, (pm position sign)."""
        return node if sign == "+" else ("neg", node) if sign == "-" else ("*", ("pm", self.i, sign), node)

    def starts_factor(self) -> bool:
        """Whether the next token is multiplied on without a sign, as in 2x, 3\\sqrt{2}, 5 cm; "2 3" is no product."""
        kind, t = self.tokens[self.i]
        if kind == "num" or t == "|":
            return not self.bars if t == "|" else self.tokens[self.i - 1][0] != "num"
        return kind in ("name", "word", "unit") or t in FACTORS

    def powers(self) -> tuple:
        """An atom with what binds to it from behind: 2^10, n!, 28%, 90\\degree, 204_5."""
        left = self.atom()
        self.depth -= 1
        while self.next in ("^", "!", "%", r"\degree") or self.next == "_" and left[0] == "num":
            t, start = self.take(), self.i
            if t == "^":
                left = ("^", left, self.argument())
            elif t == "_":    # an unknown factor for each base: 204_5 equals neither 204_6 nor 54
                self.argument()
                left = ("*", left, ("sym", "base " + "".join(t for _, t in self.tokens[start:self.i]).strip("{}")))
            else:
                left = ("call", "!", left) if t == "!" else times(left, ("unit", "percent" if t == "%" else "degree"))
        return left

    def argument(self) -> tuple:
        """What ^ or a command takes: {...}, or one token; 2^10 takes the whole number."""
        sign = self.take() if self.next in ("-", "+") else "+"
        if self.tokens[self.i][0] == "name":
            return self.signed(sign, ("sym", self.take()))
        node = self.atom()
        self.depth -= 1
        return self.signed(sign, node)

    def atom(self) -> tuple:
        """The smallest complete piece: a literal, a symbol, a word, a bracket or a command with its arguments.

        Every recursion of the grammar passes here, so it counts the nesting; its callers take the level back.
        """
        kind, t = self.tokens[self.i]
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Budget(f"nested deeper than {MAX_DEPTH}")
        if kind == "name" or t[:1] == "\\" and t[1:] in SYMBOLS:
            return self.symbol()
        if t in PAIRS:
            return self.bracket()
        self.take()
        if kind == "num":
            return number(t)
        if kind == "unit" or t == r"\$":
            return ("unit", "dollar" if t == r"\$" else t)
        if t in ("|", r"\lfloor", r"\lceil"):
            bars, self.bars = self.bars, t == "|"
            inner = self.expression(2)
            self.take(t.replace(r"\l", r"\r"))
            self.bars = bars
            return ("call", "abs" if t == "|" else t[2:], inner)
        if t in (r"\frac", r"\binom"):
            pair = self.argument(), self.argument()
            return ("/", *pair) if t == r"\frac" else ("call", "binom", *pair)
        if t in (r"\sum", r"\prod"):
            start, stop = [self.take("_ ^") and self.argument() for _ in range(2)]
            if start[0] != "rel" or start[1] != ("=",) or start[2][0][0] != "sym":
                raise Unparsed(f"{t} without k = ...")
            return ("call", t[1:], start[2][0], start[2][1], stop, self.expression(4))
        if t == r"\mat":
            rows = []
            while self.next == "{":    # a row each
                row = self.bracket()
                rows.append(row[2] if row[:2] == ("seq", "") else (row,))
            if len(set(map(len, rows))) != 1:
                raise Unparsed("a matrix with rows of unequal length")
            return ("mat", tuple(rows))
        if t[1:] in FUNCTIONS:
            return self.function(t[1:])
        # A command that is not known is a word: it equals only itself and has no value.
        if kind not in ("word", "cmd") or t in END or len(t.split()) > 4 or PROSE & set(t.lower().split()):
            raise Unparsed(f"cannot read {t}")
        return ("word", t)

    def symbol(self) -> tuple:
        """A letter with subscript and primes. x(3), f(t), \\theta(t) are calls; n(n-1) and a(b) are products."""
        name = self.take().lstrip("\\")
        while self.next in ("_", "'"):
            start = self.i
            if self.take() == "_":
                self.argument()
            name += "".join(t for _, t in self.tokens[start:self.i] if t not in "{}")
        # Letters that usually name functions, before a bracket with a single number or letter, are called; f always is.
        (kind, _), (_, after) = (self.tokens + [("", "")] * 2)[self.i + 1:self.i + 3]
        function = name in ("f", "g", "h") or after == ")" and (kind == "num" or kind == "name" and (
            name[0] in "fghFGHPQWpquyvxIT" or len(name) > 1))
        if self.next != "(" or name == "i" or not function:
            return ("sym", name)
        args = self.bracket()
        return ("call", "?" + name, *(args[2] if args[0] == "seq" else (args,)))

    def bracket(self) -> tuple:
        """(...), [...], {...}, \\{...\\}, or an interval such as (0, 1]. The kind of bracket stays in the tree, because
        (1, 2), [1, 2] and \\{1, 2\\} are three different answers; (x) and {x} are just x."""
        opened, bars = self.take(), self.bars
        if opened == r"\{" and self.next == r"\}":
            self.take()
            return ("sym", "emptyset")
        self.bars = opened == r"\{"    # inside a set a bar or colon separates the condition
        inner = self.items()
        if opened == r"\{" and self.next in ("|", ":"):
            self.take()
            self.bars = False
            inner = ("such", inner, self.items())
        self.bars = bars
        close = self.take(PAIRS[opened])
        bare = inner[0] == "seq" and inner[3] == ""
        if inner[0] == "such" or opened == "{" or not bare and opened + close in ("()", "[]"):
            return inner
        items = inner[2] if bare else (inner,)
        return ("seq", "(", items, ")") if opened == r"\langle" else ("seq", opened, items, close)

    def function(self, name: str) -> tuple:
        r"""\sin^2 x, \log_2 8, \sqrt[3]{x}, \sin 2\pi t: the argument is a bracket or else a product."""
        power = extra = None
        while self.next in ("^", "_") or self.next == "[" and name == "sqrt":
            if self.next != "[" and self.take() == "^":
                power = self.argument()
            else:
                extra = self.argument()
        if self.next in PAIRS or name == "sqrt":
            arg = self.argument()
        else:
            arg = self.expression(5)
            while self.starts_factor() and self.next[1:] not in FUNCTIONS and self.tokens[self.i][0] != "unit":
                arg = times(arg, self.powers())
        if power == ("neg", exact(1)):
            name, power = "a" + name, None
        node = ("call", name, arg, extra) if extra else ("call", name, arg)
        return ("^", node, power) if power else node


def times(left: tuple, right: tuple) -> tuple:
    """A product of any number of factors, so that a long one is wide and not deep, as sums are."""
    return (*left, right) if left[0] == "*" else ("*", left, right)


def exact(x) -> tuple:
    """A number that carries no rounding."""
    return ("num", Fraction(x), None, 0)


def number(text: str) -> tuple:
    """A literal as (num, value, unit in the last place or None if an integer, significant digits)."""
    whole, _, decimals = text.partition(".")
    ulp = Fraction(1, 10 ** len(decimals))
    value = int(whole + decimals) * ulp
    return ("num", value, ulp, len((whole + decimals).lstrip("0"))) if decimals else exact(value)


def build(text: str) -> tuple:
    """The tree of a cleaned text. Errors: Unparsed when it is not in the grammar, Budget when over the limits."""
    if len(text) > MAX_CHARS:
        raise Budget(f"{len(text)} characters, at most {MAX_CHARS} are read")
    parser = Parser(text)
    tree = parser.items()
    if parser.next:
        raise Unparsed(f"unexpected {parser.next}")
    layer = [tree]    # x^2^2^2... nests the tree where it does not nest the grammar
    for _ in range(2 * MAX_DEPTH):
        layer = [part for node in layer for part in node if isinstance(part, tuple)]
    if layer:
        raise Budget(f"nested deeper than {MAX_DEPTH}")
    return tree


remembered = functools.lru_cache(maxsize=8192)(build)


def parse(text: str) -> tuple:
    """`build`, remembered for the short texts that golds and most answers are: long ones would fill the memory."""
    return remembered(text) if len(text) <= 200 else build(text)


def walk(tree: tuple):
    """Every node of a tree."""
    stack = [tree]
    while stack:
        node = stack.pop()
        if node and isinstance(node[0], str):
            yield node
        stack.extend(part for part in node if isinstance(part, tuple))


def swap(node, change):
    """The tree with change(node) in place of each node for which that is not None."""
    if not isinstance(node, tuple):
        return node
    new = change(node) if node and isinstance(node[0], str) else None
    return tuple(swap(part, change) for part in node) if new is None else new


def names(*trees: tuple) -> set[str]:
    """The free symbols: everything that gets a sample value."""
    return {n[1] for t in trees for n in walk(t) if n[0] == "sym"} - {"pi", "e", "i", "infty", "R", "emptyset"}


# ------------------------------------------------------------------ values

LOCAL = threading.local()


def real():
    """This thread's mpmath context (mpmath comes with sympy). A context holds its precision as state while it computes,
    so threads must not share one."""
    if not hasattr(LOCAL, "mp"):
        from mpmath.ctx_mp import MPContext
        LOCAL.mp = MPContext()
        LOCAL.mp.prec = PRECISIONS[0]
    return LOCAL.mp


class At(NamedTuple):
    point: object    # which sample point, or the value that every symbol takes
    units: bool      # whether units have their sizes or count as 1
    work: list       # [cost so far] of the whole verdict
    ten: bool = False    # whether \log without a base is the decimal one


def sample(name: str, point):
    """A fixed "random" number for a name; negative and large at some points, where |x - 500| is not 500 - x."""
    if not isinstance(point, int):
        return point
    h, scale = zlib.crc32(f"{name}@{point}".encode()), (1, -1, 41, 13, 1009, 100_003)[point]
    return real().mpf((400 + h % 3001) * scale * (-1 if point in (3, 5) and h % 2 else 1)) / 997


def spend(at: At, cost: int) -> None:
    """Charges the verdict for work about to be done: a count, not a clock, so that a busy machine changes nothing."""
    at.work[0] += cost
    if at.work[0] > MAX_WORK:
        raise Budget(f"more work than {MAX_WORK}")


def add(a, b):
    """a + b, exactly 0 where all but rounding cancels. A term lost in the rounding of the other is refused, because
    2^9999 + 1 would otherwise equal 2^9999."""
    m = real()
    total = a + b
    if isinstance(total, m.matrix) or not a or not b or m.isinf(a) or m.isinf(b):
        return total
    high, low = max(m.mag(a), m.mag(b)), min(m.mag(a), m.mag(b))
    if high - low > m.prec - 120:
        raise Absorbed("a sum of terms too different in size")
    return m.mpf(0) if not total or m.mag(total) < high - m.prec + 100 else total


def power(a, b):
    """a ** b. The exponent is bounded before anything is computed: 9^{9^{9^9}} must cost nothing."""
    m = real()
    if not a:    # 0^0 and 0^{-1} have no value
        return a if m.re(b) > 0 else m.zero / m.zero
    if max(m.mag(b), m.mag(m.mag(a))) > 64:
        raise Budget("a power too large")
    return m.power(a, b)


def call(name: str, x: list, at: At):
    """A function of values, each within the range where it costs microseconds."""
    m, a = real(), x[0]
    if any(isinstance(v, m.matrix) or m.isinf(v) for v in x):
        raise Unparsed(f"{name} of this")
    if name[0] == "?":    # an unknown function is any fixed generic one
        h = zlib.crc32(name.encode())
        generic = sum((h % 89 + 1 + i + (v + h % 7) * v * (i + 3) / 7 for i, v in enumerate(x)), m.mpf(0))
        return generic if isinstance(at.point, int) else at.point
    if name in ("!", "binom"):
        if all(m.isint(v) and 0 <= v <= 2000 for v in x):
            return m.mpf((math.factorial if name == "!" else math.comb)(*map(int, x)))
        if max(map(m.mag, x)) > 40 or m.prec > PRECISIONS[0]:
            raise Budget("a factorial too large")
        return m.factorial(a) if name == "!" else m.binomial(*x)
    if name in ("floor", "ceil"):
        if m.im(a) or m.mag(a) > m.prec // 2:
            raise Unparsed("no floor")
        return getattr(m, name)(m.nint(a) if abs(a - m.nint(a)) < m.ldexp(1, 60 - m.prec // 2) else a)
    if name == "sqrt":
        degree = x[1] if len(x) > 1 else m.mpf(2)
        odd = not m.im(a) and m.re(a) < 0 and m.mag(degree) < 60 and m.isint(degree) and int(degree) % 2
        # the cube root of -8 is -2, not the complex principal root
        return -power(-a, 1 / degree) if odd else power(a, 1 / degree)
    if name in ("log", "ln", "lg"):
        base = x[1] if len(x) > 1 else 10 if name == "lg" or name == "log" and at.ten else None
        return m.log(a) / m.log(base) if base else m.log(a)
    if m.mag(a) > (60 if name in ("exp", "sinh", "cosh", "tanh") else 900):
        raise Budget(f"{name} of a huge number")
    return abs(a) if name == "abs" else getattr(m, re.sub("^a(?:rc)?(?=sin|cos|tan|cot)", "a", name))(a)


def total(name: str, index: tuple, start: tuple, stop: tuple, term: tuple, at: At):
    """A sum or product, term by term where its ends are numbers; otherwise a generic function of its parts, which is
    equal for equal parts."""
    m = real()
    first, last = value(start, at), value(stop, at)
    if not (m.isint(first) and m.isint(last)):
        return call("?" + name, [value(index, at), first, last, value(term, at)], at)
    if last - first > MAX_WORK:
        raise Budget(f"a {name} of too many terms")
    terms = [value(swap(term, lambda n: exact(k) if n == index else None), at)
             for k in range(int(first), int(last) + 1)]
    return functools.reduce(add, terms, m.mpf(0)) if name == "sum" else math.prod(terms, start=m.mpf(1))


def value(node: tuple, at: At):
    """The value of a tree: an mpmath number or matrix. Errors: Unparsed where it has none, Budget over the limits."""
    kind, m = node[0], real()
    spend(at, 200 if kind == "call" and node[1] in ("!", "binom") else 10 if kind in ("call", "^") else 1)
    # 1. leaves
    if kind == "num":
        return m.convert(node[1])
    if kind == "sym":
        known = {"pi": m.pi, "e": m.e, "i": m.j, "infty": m.inf}
        return +known[node[1]] if node[1] in known else sample(node[1], at.point)
    if kind == "unit":
        dim, size = unit(node[1])
        scale = m.pi / 180 if size == "deg" else m.convert(Fraction(size))
        base, _, exponent = dim.partition("^")
        if at.units and dim:
            scale *= sample("unit " + base, at.point) ** int(exponent or 1)
        return scale if at.units else m.mpf(1)
    # 2. everything that has parts; what goes wrong in them means that there is no value
    if kind == "mat":
        return m.matrix([[value(cell, at) for cell in row] for row in node[1]])
    try:
        if kind == "call" and node[1] in ("sum", "prod"):
            return total(*node[1:], at)
        if kind == "call":    # inside a function a degree is always a degree: sin 30^\circ
            return call(node[1], [value(arg, at._replace(units=True)) for arg in node[2:]], at)
        if kind in ("neg", "^", "/", "+", "*"):
            x = [value(arg, at) for arg in node[1:]]
            return (-x[0] if kind == "neg" else power(*x) if kind == "^" else x[0] / x[1] if kind == "/" else
                    functools.reduce(add if kind == "+" else lambda a, b: a * b, x))
    except (ZeroDivisionError, TypeError, AttributeError, ValueError) as why:    # log 0, gamma poles, matrix sizes
        if isinstance(why, Budget):
            raise
        raise Unparsed(f"no value: {why}") from why
    raise Unparsed(f"{kind} has no value")


# ------------------------------------------------------------------ comparison of expressions


def measure(node: tuple) -> tuple | None:
    """(relative unit in the last place, whether measured) of -2.68, 5.0 cm or 4.5 \\times 10^{33}, where one literal
    carries the precision; None for anything else. 0.5 and 27.0 are written exactly as often as they are measured."""
    parts = list(walk(node))
    inexact = [n for n in parts if n[0] == "num" and n[2] is not None]
    if len(inexact) != 1 or not inexact[0][1] or any(n[0] not in ("num", "unit", "neg", "*", "/", "^") for n in parts):
        return None
    _, number, ulp, digits = inexact[0]
    scientific = any(n[0] == "^" and n[1] == exact(10) for n in parts)
    return real().convert(ulp / number), scientific or digits > 1 and number.denominator > 1


def close(x, y, gold: tuple, answer: tuple) -> bool:
    """Whether the values x of gold and y of answer agree under the precision rule of the module docstring."""
    m = real()
    if m.isinf(x) or m.isinf(y):    # no large number is infinite enough
        return x == y
    d = add(x, -y)
    if not d or not x or not y:    # 0 has no relative error: only 0 equals it
        return not d
    off, mine, measured = abs(d / x), measure(answer), measure(gold)
    decimals = [n[3] for n in walk(answer) if n[0] == "num" and n[2] is not None]
    if decimals and min(decimals) >= 6:
        if not mine:    # several rounded literals, 1.414214 + 1.732051: no single last place to go by
            return bool(off < 1e-6)
        steps = x / (mine[0] * y)    # an integer when these digits suffice to write x exactly: then nothing was cut off
        cut_off = not (measured and measured[1]) and abs(y) < abs(x) and off < mine[0] and not m.almosteq(
            m.nint(steps), steps, 1e-9)
        if off <= mine[0] / 2 or off < 1e-14 or cut_off:
            return True
    return bool(measured and measured[1] and off <= measured[0] / 2 * (1 + m.ldexp(1, -60)))


def values(trees: list[tuple], reading: At, points: int):
    """The values of the trees at each sample point where all of them have one."""
    for point in range(points):
        try:
            yield [value(t, reading._replace(point=point)) for t in trees]
        except Absorbed:    # e^x + 1 has no usable value at the later points, which are large
            if point == 0:
                raise
        except Unparsed:
            continue


def equal(gold: tuple, answer: tuple, work: list) -> bool:
    """Equality by value, in any reading that both sides share.

    A unit that only one side writes is ignored: cm after a gold without cm. Percent and degree have plain sizes, so
    there the other side may also have converted: 28% and 0.28. If both sides have units they must agree in dimension
    and size, which the sample value of each dimension sees to. \\log is natural or decimal, the same on both sides.
    """
    # 1. Which letters of the answer are units: 5 m, 9.8 m/s^2 where the gold has no letters.
    head = answer
    while head[0] in ("*", "/"):
        head = head[1]
    if head is not answer and head[0] != "sym" and not names(gold):
        answer = swap(answer, lambda n: ("unit", n[1]) if n[0] == "sym" and n[1] in UNITS else None)
    # 2. The readings in which both sides may agree.
    nodes = [list(walk(t)) for t in (gold, answer)]
    has = [any(n[0] == "unit" for n in parts) for parts in nodes]
    tens = [False, True] if any(n[:2] == ("call", "log") and len(n) == 3 for n in sum(nodes, [])) else [False]
    for with_units in [True] if all(has) else [False, True] if any(has) else [False]:
        for ten in tens:
            reading = At(0, with_units, work, ten)
            if agree(gold, answer, reading, 6 if names(gold, answer) or with_units else 1):
                return True
    return False


def agree(gold: tuple, answer: tuple, reading: At, points: int) -> bool:
    """Whether the values agree at every sample point, of which there must be one: 1/0 equals nothing."""
    m, agreed = real(), False
    for x, y in values([gold, answer], reading, points):
        cells = [(x, y)]    # a matrix is compared cell by cell
        if isinstance(x, m.matrix) or isinstance(y, m.matrix):
            fits = isinstance(x, m.matrix) and isinstance(y, m.matrix) and (x.rows, x.cols) == (y.rows, y.cols)
            cells = list(zip(x, y)) if fits else [(m.mpf(0), m.mpf(1))]
        # sqrt(1/n) and 1/sqrt(n) differ only where they leave the reals, which is not their domain
        if agreed and any(m.im(v) for pair in cells for v in pair):
            continue
        if not all(close(p, q, gold, answer) for p, q in cells):
            return False
        agreed = True
    return agreed


def proportional(f: tuple, g: tuple, work: list) -> bool:
    """Whether the equations f = 0 and g = 0 are the same: f = c g with one constant c, if need be after multiplying
    by their denominators, as for y = 1/x and xy = 1."""
    below = [[n[2] for n in walk(t) if n[0] == "/" and names(n[2])] for t in (f, g)]
    rows = list(values([f, g, *(("*", exact(1), *d) for d in below)], At(0, True, work), 6))
    if len(rows) < 2 or not names(f) == names(g) != set() or any(
            isinstance(v, real().matrix) or not v for row in rows for v in row):
        return False
    # f = 0 and f d = 0 have the same solutions, because f has none where its denominator d is 0
    ratios = [[x / y for x, y, _, _ in rows], [x * d / (y * e) for x, y, d, e in rows]]
    return any(not any(add(r, -row[0]) for r in row) for row in ratios)


# ------------------------------------------------------------------ comparison of sets of reals

# A set of reals is (its cuts, belongs): the numbers where membership can change, and the test of membership.
CHECKS = {"<": lambda d: d < 0, "<=": lambda d: d <= 0, ">": lambda d: d > 0, ">=": lambda d: d >= 0,
          "!=": lambda d: d != 0}
JOINS = {"∪": lambda a, b: a or b, "∩": lambda a, b: a and b, "∖": lambda a, b: a and not b}


def solutions(op: str, left: tuple, right: tuple, work: list) -> tuple:
    """The set of the x with `left op right`, which must be linear on either side of 0."""
    m = real()

    def difference(x):
        return add(value(left, At(x, False, work)), -value(right, At(x, False, work)))
    cuts = [m.mpf(0)]
    for xs in ([m.mpf(x) / 10 for x in (1, 12, 10137)], [m.mpf(x) / -10 for x in (1, 12, 10093)]):
        ys = [difference(x) for x in xs]
        if not any(map(m.isinf, ys)):
            slope = (ys[1] - ys[0]) / (xs[1] - xs[0])
            if not add(ys[1], -ys[0]) or add(ys[2] - ys[0], slope * (xs[0] - xs[2])):
                raise Unparsed("an inequality that is not linear on either side of 0")
            cuts.append(add(xs[0], -ys[0] / slope))
    return cuts, lambda x: CHECKS[op](difference(x))


def region(node: tuple, work: list) -> tuple:
    """The set of reals that a tree stands for. Errors: Unparsed when it is none."""
    kind = node[0]
    if kind == "rel" and node[1] == ("∈",):
        return region(node[2][1], work)
    if kind == "such":    # {2x | x > 1} and {x in Z | x > 1} are other sets than their condition
        if node[1][0] != "sym" and node[1] != ("rel", ("∈",), (node[1][2][0], ("sym", "R"))):
            raise Unparsed("not a set of numbers")
        return region(node[2], work)
    if kind in JOINS:
        (cuts, a), (more, b) = region(node[1], work), region(node[2], work)
        return cuts + more, lambda x: JOINS[kind](a(x), b(x))
    if kind == "rel" and set(node[1]) <= set(CHECKS) or kind == "seq" and is_set(node):
        parts = ([solutions(op, *sides, work) for op, *sides in zip(node[1], node[2], node[2][1:])] if kind == "rel"
                 else [region(n, work) for n in node[2]])
        cuts, tests = sum((cuts for cuts, _ in parts), []), [belongs for _, belongs in parts]
        # a comma between inequalities is "and", but "x < 1, x > 3" cannot mean both at once
        either = node[1] == "or" or kind == "seq" and not any(all(test(x) for test in tests) for x in grid(cuts))
        return cuts, lambda x: (any if either else all)(test(x) for test in tests)
    if kind == "seq" and node[1] and not names(node):
        ends = [value(n, At(0, False, work)) for n in node[2]]
        if node[1] == r"\{":
            return ends, lambda x: any(not add(x, -end) for end in ends)
        if len(ends) == 2 and ends[0] <= ends[1]:
            low, high = CHECKS[">=" if node[1] == "[" else ">"], CHECKS["<=" if node[3] == "]" else "<"]
            return ends, lambda x: low(add(x, -ends[0])) and high(add(x, -ends[1]))
    if kind in ("sym", "word") and is_set(node):
        return [], lambda x: node[1] != "emptyset"
    raise Unparsed("not a set of numbers")


def grid(cuts: list) -> list:
    """Every cut, a number between each two neighbours, and one beyond either end."""
    xs = sorted(x for x in cuts if not real().isinf(x)) or [real().mpf(0)]
    return [xs[0] - 1, *xs, xs[-1] + 1, *(add(a, b) / 2 for a, b in zip(xs, xs[1:]) if add(a, -b))]


def is_set(node: tuple) -> bool:
    """Whether a node can only be a set of reals: an inequality, a union, R; (1, 2) and [1, 2] can also be a pair."""
    if node[0] == "rel":
        return is_set(node[2][1]) if node[1] == ("∈",) else set(node[1]) <= set(CHECKS)
    if node[0] == "seq":    # "x <= 5, x in R"
        return node[1] in ("", "or") and all(map(is_set, node[2]))
    return node[0] in ("∪", "∩", "∖", "such") or node[1] in ("R", "emptyset") or node[0] == "word" and "real" in node[1]


def same_set(gold: tuple, answer: tuple, work: list) -> bool:
    """Whether two sets of reals, in at most one unknown each, have the same elements at every point of their grid."""
    try:
        unknown = [{n[1] for n in walk(t) if n[0] == "call" and n[1][0] == "?"} or names(t) for t in (gold, answer)]
        free = [u for u, t in zip(unknown, (gold, answer)) if t[0] != "such"]    # {x | x > 0} is {y | y > 0}
        if max(map(len, unknown)) > 1 or len(set().union(*free)) > 1:
            return False
        (cuts, a), (more, b) = region(gold, work), region(answer, work)
        spend(At(0, False, work), len(cuts + more) ** 2)    # each test goes through the ends of its set
        return all(a(x) == b(x) for x in grid(cuts + more))
    except (Unparsed, TypeError):    # complex numbers have no order
        return False


# ------------------------------------------------------------------ comparison of answers


def variants(node: tuple) -> list[tuple]:
    r"""A tree with \pm as its readings: both signs of each, coupled when a \mp shows that they belong together."""
    signs = [n for n in walk(node) if n[0] == "pm"]
    if len(signs) > 4:
        raise Budget(r"more than 4 signs \pm")
    linked = any(n[2] == "∓" for n in signs)
    choices = [[s] * len(signs) for s in (1, -1)] if linked else itertools.product((1, -1), repeat=len(signs))
    picks = [{n: exact(-s if n[2] == "∓" else s) for n, s in zip(signs, choice)} for choice in choices]
    return [swap(node, pick.get) for pick in picks]


def named(node: tuple) -> bool:
    """Whether a left side only names the answer: x, f(x), (x, y), AB, |AB|, V_1/V_2; 11a + c and 2x do not."""
    return node[0] == "word" or node[0] == "call" and node[1][0] == "?" or (
        names(node) != set() and {n[0] for n in walk(node)} <= {"sym", "seq", "call", "*", "/"})


def unnamed(node: tuple) -> tuple:
    r"""x = 3, x \in S and x = 1 + 2 = 3 without the name, 1:2 as a fraction."""
    # A chain of equalities claims its last side. Of two sides the left one must be a name, so that 5 = 5 is no 5.
    while node[0] == "rel" and (node[1] == ("∈",) or "=" in node[1] and set(node[1]) <= set("=:") and (
            named(node[2][0]) or len(node[1]) > 1 or not names(node[2][0]) and node[2][0][0] != "num")):
        cut = len(node[1]) - node[1][::-1].index("=") if "=" in node[1] else 1
        node = ("rel", node[1][cut:], node[2][cut:]) if node[1][cut:] else node[2][-1]
    return ("/", *node[2]) if node[0] == "rel" and node[1] == (":",) else node


def members(node: tuple) -> list[tuple]:
    r"""The different elements of a bare list, a set in braces or what \pm stands for; none for a single answer."""
    if node[0] == "rel" and node[1] == ("=",) and named(node[2][0]) and members(node[2][1]):
        node = node[2][1]
    if node[0] == "seq" and node[1] in ("", "or", r"\{"):
        # "pi/4 + k pi, k in Z" is one answer, but Z restricts an inequality
        integer = [n[:2] == ("rel", ("∈",)) and n[2][1][1] in ("Z", "N") for n in node[2]]
        items = node[2] if any(map(is_set, node[2])) else [n for n, out in zip(node[2], integer) if not out]
        parts = [[] if item[:2] == ("seq", "") else members(item) for item in items]
        return list(dict.fromkeys(v for item, inner in zip(items, parts) for v in inner or [item]))
    found = list(dict.fromkeys(variants(node)))
    return found if len(found) > 1 else []


def same(gold: tuple, answer: tuple, work: list) -> bool:
    """Whether two trees are the same answer: containers element by element, everything else by value."""
    spend(At(0, False, work), 1)
    x, y = unnamed(gold), unnamed(answer)
    if (is_set(x) or is_set(y)) and same_set(x, y, work):
        return True
    g, a = members(gold), members(answer)
    # Lists and sets: as many different elements on both sides, each with a partner of its own. A subset of the
    # solutions, and a list of guesses around the right one, both fail here.
    if g and a:
        for item in g if len(g) == len(a) else ():
            partner = next((i for i, other in enumerate(a) if same(item, other, work)), None)
            if partner is None:
                return False
            del a[partner]
        return not a
    if gold[0] == answer[0] == "rel" and not g and not a and ("=" in gold[1]) == ("=" in answer[1]):
        return same_chain(gold, answer, work)
    if g or a:    # one side is a list: the same as one answer in braces, or as a pair with its coordinates in order
        items, other = g or a, y if g else x
        if all(n[0] == "rel" and n[2][0][0] == "sym" for n in items):    # y = 2, x = 1 for the pair (1, 2)
            items = sorted(items, key=lambda n: n[2][0])
        is_pair = other[0] == "seq" and other[1] == "(" and (x if g else y)[1] != r"\{"
        items, others = [unnamed(item) for item in items], other[2] if is_pair else [other]
        return len(items) == len(others) and all(same(*((p, o) if g else (o, p)), work) for p, o in zip(items, others))
    if x[0] == "seq" == y[0]:    # tuples and intervals: the same brackets and the same order
        return x[1::2] == y[1::2] and len(x[2]) == len(y[2]) and all(same(p, q, work) for p, q in zip(x[2], y[2]))
    if "mat" in (x[0], y[0]):    # a column is also a tuple
        x, y = (("mat", tuple((cell,) for cell in t[2])) if t[0] == "seq" and t[1] == "(" else t for t in (x, y))
    if "word" in (x[0], y[0]):
        texts = [re.sub(r"[^a-z0-9]", "", t[1].lower()) if t[0] in ("word", "sym") else "" for t in (x, y)]
        return texts[0] == texts[1] != ""
    return x[0] not in ("seq", "rel") and y[0] not in ("seq", "rel") and equal(x, y, work)


def same_chain(gold: tuple, answer: tuple, work: list) -> bool:
    """Equations up to a factor, ratios up to a factor, and chains of relations side by side in either direction."""
    (_, ops, g), (_, other, a) = gold, answer
    if set(ops + other) == {"="}:
        y_for_f = {g[0][0], a[0][0]} == {"call", "sym"} and "y" in (g[0][1], a[0][1])
        if named(g[0]) and named(a[0]) and (g[0] == a[0] or y_for_f):
            return same(g[-1], a[-1], work)
        if len(g) == len(a) == 2 and proportional(*(("+", left, ("neg", right)) for left, right in (g, a)), work):
            return True
    if set(ops + other) == {":"}:
        return len(g) == len(a) and all(same(("/", g[0], p), ("/", a[0], q), work) for p, q in zip(g[1:], a[1:]))
    # a < b <= c is also c >= b > a
    back = tuple(op.translate(str.maketrans("<>", "><")) for op in reversed(other))
    turned = back, a[::-1]
    return any(ops == signs and all(same(p, q, work) for p, q in zip(g, sides))
               for signs, sides in ((other, a), turned))


def compare(gold: tuple, answer: tuple) -> bool:
    """`same` in the first precision that loses no term of a sum."""
    m = real()
    try:
        return same(gold, answer, [0])
    except Absorbed:
        m.prec = PRECISIONS[1]
        return same(gold, answer, [MAX_WORK - 1000])    # slower arithmetic, so less of it
    finally:
        m.prec = PRECISIONS[0]


# ------------------------------------------------------------------ verdicts

CHOICE = re.compile(r"\(?([A-J])(?:\)[.:]?|[.:])\s*(\S.*)", re.S)
CLOCK = re.compile(r"(\d{1,2}(?::\d\d)*?)(?::00)?(?:(?<=:\d\d)([ap])|([ap])\.?m)?\.*m?\.*", re.I)
THOUSANDS = re.compile(r"(?<![\d.,_^])\d{1,3}(?:,\d{3}(?!\d))+(?!,?\s*\d)|(?<![\d.,_^])\d{1,3}(?: \d{3}(?!\d))+")


def clock(text: str) -> tuple[str, str] | None:
    """(digits, "a", "p" or "") of a time of day such as 4:30 p.m.; any number may be the hour."""
    m = CLOCK.fullmatch(re.sub(r"\\word\{([^{}]*)\}|[{} ]", r"\1", text))
    return m and (m[1], (m[2] or m[3] or "").lower())


def joined(text: str) -> str:
    """1,234 and 1 234 as 1234, except inside brackets, where a comma separates."""
    if re.search(r"[(\[]|\\\{|\\mat", text):    # (100,200) is a pair
        return text
    return THOUSANDS.sub(lambda m: m[0].replace(",", "").replace(" ", ""), text)


def try_parse(text: str) -> tuple | None:
    """The tree of a text that may be no answer at all, None then."""
    try:
        return parse(joined(clean(text)))
    except (Unparsed, Budget):
        return None


@functools.lru_cache(maxsize=8192)
def gold_text(gold: str) -> str:
    """The cleaned gold; a whole solution given as gold is reduced to its box or its final answer."""
    final = FINAL.match(gold)
    gold = boxed(gold)[0] or (final[1] if final else gold)
    return clean(gold) if len(gold) <= MAX_CHARS else gold


def readings(gold: str, answer: str) -> list[tuple[str, str]]:
    """The readings of two cleaned texts, of which one must agree. A comma separates thousands or list items or is
    the decimal comma of an answer (of a gold only behind a 0); "(C) 12" is a choice with its text."""
    pairs = list(dict.fromkeys([(joined(gold), joined(answer)), (gold, answer)]))
    if m := CHOICE.fullmatch(answer):
        choice = re.fullmatch(r"\(?[A-J]\)?", gold)
        return [(gold.strip("()"), m[1])] if choice else [*pairs, (joined(gold), joined(m[2]))]
    if re.fullmatch(r"-?\d+,\d+", answer) and re.fullmatch(r"-?\d*\.\d+", gold):
        pairs.append((gold, answer.replace(",", ".")))
    if re.fullmatch(r"-?0,\d{3,}", gold):
        pairs.append((gold.replace(",", "."), answer))
    return pairs


def decide(gold: str, answer: str) -> str:
    """The reason of the verdict on an extracted answer."""
    g = gold_text(gold)
    if max(len(answer), len(g)) > MAX_CHARS:
        return "correct" if answer.strip() == gold.strip() else "budget"
    a = clean(answer)
    # Equal strings, as two thirds of real verdicts are, then two times of day, and only then trees. "2 3" is not 23.
    if re.sub(r"(?<!\d) | (?!\d)", "", g) == re.sub(r"(?<!\d) | (?!\d)", "", a):
        return "correct" if a else "no_answer"
    times = [clock(t) for t in (g, a)]
    if all(times) and (halves := {t[1] for t in times} - {""}):    # 3:10 alone is a ratio
        return "correct" if times[0][0] == times[1][0] and len(halves) == 1 else "wrong"
    reason = "unparsed"    # unless some reading of the answer and of the gold could be compared
    for p, q in readings(g, a):
        try:
            if compare(parse(p), parse(q)):
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
        text = gold_text(gold)
        if not clock(text) and not compare(parse(joined(text)), parse(joined(text))):
            return "it has no value that could be compared"
    except (Unparsed, Budget) as why:
        return str(why)
    return None


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
        pool = context.Pool(workers)
        verdicts = pool.imap(row_verdict, rows[len(out):])
        try:
            while len(out) < len(rows):
                out.append(verdicts.next(stuck_after))
        except multiprocessing.TimeoutError:
            out.append(Verdict(False, "budget", None))
        finally:
            pool.terminate()
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
