r"""verify.py: is a model's answer to a math problem the same as the gold answer?

    extract the answer -> clean its LaTeX -> parse it into a tree -> compare with the tree of the gold answer

1. Values are compared: exact fractions, else 600-bit numbers at fixed sample points. No text is evaluated as code.
2. Work is counted and never timed: any thread may call `verify`, and the same input always gets the same verdict.
3. It fails closed: a gold that is not understood rewards the same string only, and `gold_problem` says why.
4. Precision: an exact gold takes an exact answer, or a decimal of 6 or more significant digits that is less than one
   unit in its last place away. A measured gold takes whatever rounds to its own digits; it shows that it was measured
   by a power of ten (4.5e33), a unit (2.5 cm) or four digits of no short fraction (2.683, not 1.25 or 3.125).
5. A base that only the gold writes is taken as said by the question: 132 is right for 132_4, and 30 is wrong.
6. Not read, being rare or of two meanings: sums to be computed, 4 h 30 min for 4.5 h, 1,5 for 1.5, 2i - j
   for (2, -1), ]1, 3[ for (1, 3), P(5, 3) for 60, choices without commas (BD). The same string is always right.

    python verify.py FILE.jsonl --response-key response --gold-key gold --score-key recorded_score

>>> verify(r"So it is $\boxed{\frac{2}{4}}$.", gold="0.5")
Verdict(correct=True, reason='correct', answer='\\frac{2}{4}')
"""
import argparse
import functools
import itertools
import json
import math
import operator
import re
import threading
import time
import zlib
from fractions import Fraction
from typing import NamedTuple

MAX_CHARS = 4000    # longest answer that is parsed; a longer one can only be the same string
MAX_DEPTH = 40      # nesting of the tree; every recursion below follows the tree, so this bounds the stack
MAX_BITS = 8000     # a fraction with more is rounded: the exact one would cost too much
MAX_WORK = 20_000   # cost of all evaluations of one comparison: a node counts 1, a function or a power 10
PRECISION = 600     # bits of the arithmetic; the same values differ in at most 100 of them
# What each thread has of its own: the work of its verdict, and an mpmath context, because that has state.
LOCAL = threading.local()


class Verdict(NamedTuple):
    correct: bool
    reason: str           # correct | wrong | no_answer | unparsed | budget | truncated
    answer: str | None    # the extracted answer as it was written


class Unparsed(Exception):
    """The text is no answer of this grammar, or has no value (1/0)."""


class Budget(Exception):
    """The comparison would cost more than the limits above allow."""


# ------------------------------------------------------------------ extraction

# Behind these a model may go on with another problem; the last one ends the answers of few-shot prompts.
END = re.compile(r"<\|(?:im_end|im_start|end_?of_?text|eot_id)\|>|</s>|<end_of_turn>|<｜end▁of▁sentence｜>"
                 r"|I hope (?:it|this) (?:is correct|helps)|\n\s*(?:Let me know|Feel free)")
BOX = re.compile(r"(?P<box>\\(?:boxed|fbox)(?![a-zA-Z])[ \t]*)(?:\{|(?P<bare>[-+]?\w+(?:[./]\w+)?))"
                 r"|(?<!\\)(?:\\\\)*\\[{}]|[{}]")    # \{ and \} are skipped, in linear time for a run of \
# What may stand between two boxes that are one answer: punctuation, "and", "or", "y =", or a short "cm and".
BETWEEN = re.compile(r"(?:[\s$,;:.&()\[\]\\{}]|quad|text|mbox|\b(?:and|or)\b|[A-Za-z]\w{0,3} *=)*"
                     r"|[^.\n\d=]*\b(?:and|or)\b[^.\n\d=]*")
# A unit of measurement behind the box belongs to the answer: \boxed{3}\text{ cm} is not 3 m.
BEHIND = re.compile(r"(?:\s|\\[ ,;:!)\]]|[$~])*(\\?%|\\(?:text|mathrm|textrm|mbox)\s*\{\s*(?:square |cubic |sq\.? )?"
                    r"([A-Za-z]+)[^{}]*\}(?:\^\{?\d\}?)?|(?:square |cubic )?(?!(?:in|min|mol|as|Pa)\b)([a-zA-Z]{2,})"
                    r"(?:\^\{?\d\}?| per [a-z]+| ?/ ?[a-z]+)*)")
NUMBER = (r"(?<![\w.,^{/])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?[.,]?\d+(?:(?: */ *|:)\d+)?"
          r"(?: ?(?:\\?%|percent\b|pct\b|m²|[€£]))?")
# Answers without a box at the end of a finished text: the first that parses of STATED, `concluding`, ENDS. Between the
# signs of a formula it need not parse, because it can still be the same string as the gold.
STATED = [re.compile(p, re.S | re.I) for p in (
    r"(?=.{1,60}$)(?!\**[a-z]{4,}[ :]|.*(?: [a-z]+){3})([^\n]*[\d\\][^\n]*|\w+)$",      # the whole text
    r".*<answer>((?:(?!<answer>).)*)</answer>\W*$",
    r".*####\s*([^\n]+)$",
    r".*\b(?:answers?|result|statement(?= is (?:true|false)))\W*(?:is|are|:|=)[\s:*]*(?!\W*$)([^\n]+)$",
    r".*\b(?:choice|option|answer)s?\W*(?:is|:)?\W*\(?((?-i:[A-J]))(?:\W*[).:,]|\W*$| is (?:the|correct))[^\n]*$",
    r".*?\*\*(?=\S)([^*\n]+)\**\W*$")]
ENDS = [re.compile(p, re.S | re.I) for p in (
    rf".*?({NUMBER})$",
    r"(?:.*[^\\])?(?P<formula>\$\$[^$]+|\$(?!\s*\n)(?:[^$\\]|\\.)+)\$+((?: ?(?:%|percent|pct))?)[^\d$]{0,40}$",
    r".*\\(?:\[|\((?!\s*\n))(?P<formula>.+?)\\[)\]][^\d]{0,40}$",
    r"(?:.*\n)?(?![a-z]{4,}[ :]|[^\n]*(?: [a-z]+){3})([^\n]*[\d\\=][^\n]*)$",                 # the last line
    rf"(?:.*(?:[\s$(=:]|\*\*))?({NUMBER})(?![\d/^])[^\n\d]*$")]    # its last number
# The sign of money is no sign of a formula, and a computation says less than what it is equal to.
MONEY = re.compile(r"\\\$(?=\d)|\$(?=\d[^$]*(?:\$\d|$))")
COMPUTED = re.compile(r"(?<![\w.^_{\\])\d[\d.,]*%?\s*(?:[-+*/×÷]|x(?= \d))(?:[\d\s.,%+*/×÷-]|x(?= \d))*=\s*(?=-?\d)")
# The number that a sentence is about stands behind these words, and not behind those that make it a circumstance.
SAID = (r"\b(?:is|are|was|were|be|equals?|has|have|had|needs?|takes?|costs?|pays?|earns?|(?<!to )makes?|gets?|gives?"
        "|leaves?|spends?|only|about|exactly|approximately)")
CLAIMED = rf"\s*({NUMBER})(?!\d|[,.]\d|\s*[-+*/=!%]|(?<=%) of)"
SUBJECT = [re.compile(p, re.I) for p in (
    rf".*({NUMBER})(?:\s[a-z]+)?,? (?:in total|in all|altogether)\b", rf".*?\btotal of{CLAIMED}",
    # "Bob is 30 and Amy is 24": two claims of equal weight are a list, as two boxes are.
    rf".*?{SAID}\s*({NUMBER})\D*\b(?:and|while|but)\b(?:\D*{SAID})?\s*({NUMBER})",
    rf".*?{SAID}{CLAIMED}", rf".*?={CLAIMED}")]
PASSING = ("in of the for at to after with per from by than every each these those all on within between among "
           "first last next her his their its").split()


def concluding(text: str) -> str:
    """What the last sentence says when it holds several numbers or formulas, "" if that is not clear."""
    sentence = re.split(r"(?<=[^\s.][.!?])\s+(?=[A-Z])|\n", re.sub(r"\\[()]", "$", text.replace("**", "").strip()))[-1]
    if m := re.search(r"(?:\$[^$]*\d[^$]*\$(?:,? ?(?:and|or) ?|, )){1,5}\$[^$]*\d[^$]*\$\W*$", sentence):
        return ", ".join(re.findall(r"\$([^$]+)\$", m[0]))
    if m := re.match(rf".*?{SAID}\s*\$((?:[^$a-z]|\\[a-z]+)*\d(?:[^$a-z]|\\[a-z]+)*)\$", sentence):
        return m[1]
    clause = re.split(r"\b(?:so|thus|therefore|hence)\b", re.sub(r"\$(-?[\d.,]*\d)\$", r"\1", sentence), flags=re.I)[-1]
    found = re.findall(rf"(\w*)[^\w-]{{0,3}}({NUMBER})", clause)
    if len(found) < 2 or re.search(r"\\|\$[^$]*[=(^_][^$]*\$", clause):
        return ""
    said = [", ".join(m.groups()) for pattern in SUBJECT if (m := pattern.match(clause))]
    said += [number for word, number in found if word.lower() not in PASSING]
    return said[0] if said else ""


def boxed(text: str) -> tuple[str | None, bool]:
    r"""The content of the last box, None without one, and whether a later box was opened and never closed. Boxes
    joined by a comma, "and" or "or" are one list: a hedge over two boxes must not be the luck of the last one. One pass
    with a stack, because to match the braces of each box is quadratic."""
    opened, found = [], []
    for m in BOX.finditer(text):
        if m["bare"]:
            found.append((m.start(), m.start("bare"), m.end(), m.end()))
        elif m[0] == "{" or m["box"]:
            opened.append(m)
        elif m[0] == "}" and opened:
            brace = opened.pop()
            if brace["box"]:
                found.append((brace.start(), brace.end(), m.start(), m.end()))
    hanging = max([m.start() for m in opened if m["box"]], default=-1)
    if not found:
        return None, hanging > -1
    start, parts = len(text), []
    for box_start, inner_start, inner_end, box_end in reversed(found):
        if box_end > start:    # a box inside the one behind it
            continue
        if parts and (start - box_end > 60 or len(parts) > 60 or not BETWEEN.fullmatch(text, box_end, start)):
            break
        start, content = box_start, text[inner_start:inner_end].strip()
        parts += [content] if content not in parts else []
    answer, behind = ", ".join(reversed(parts)), BEHIND.match(text, found[-1][3])
    if behind and not re.search(r"[a-zA-Z%]\W*$", answer):
        dimension, _ = unit(behind[2] or behind[3] or "meter")
        if dimension and not dimension.startswith("label"):
            answer += " " + behind[1]
    return answer, hanging > found[-1][0]


def first_of(patterns: list[re.Pattern], tail: str) -> str:
    for pattern in patterns:
        m = pattern.match(tail)
        answer = re.sub(r"\*\*(?=[.,;:! ])", "", "".join(m.groups(""))).strip(" $*") if m else ""
        if answer and ("formula" in pattern.groupindex or not gold_problem(answer)):
            return answer
    return ""


def extract(response: str, finished: bool | None = None) -> tuple[str | None, str]:
    """(answer, "") or (None, reason). finished=False (stopped by the token limit) takes only a complete box; with None
    an answer without a box must stand at the very end.
    >>> extract("We get 70 + 3, so it is **73**."), extract("First we find 70 and then", finished=False)
    (('73', ''), (None, 'truncated'))
    """
    # Only what stands before the end of the turn and after the thinking is an answer.
    text = END.split(response, maxsplit=1)[0]
    ended, thought = finished or len(text) < len(response), text.rfind("</think>")
    if text.rfind("<think>") > thought:    # a box inside unfinished thinking is not an answer
        return None, "truncated"
    text = text[thought + 8:].strip() if thought >= 0 else text.strip()
    # A box that was opened later and never closed means that the answer was being revised.
    answer, hanging = boxed(text)
    if hanging or answer is None and finished is False:
        return None, "truncated"
    if answer is None:
        tail = COMPUTED.sub("", MONEY.sub("", text[-1500:].rstrip(" \n.")))
        # A text that ends in mid-sentence may have been cut off: a short one must say that this is its answer.
        if ended or re.search(r"(?:[.!*$>€²]|\\[)\]]|\([A-J]\))$", text):
            answer = first_of(STATED, tail) or concluding(tail) or first_of(ENDS, tail)
        elif len(text) < 150:
            answer = first_of(STATED[:5], tail)
    return (answer, "") if answer else (None, "no_answer")


# ------------------------------------------------------------------ cleaning

# dimension: name=size in one common unit of the dimension. A word in no row is a label: apples are only apples.
UNITS = {}
for dimension, row in {
    "": "percent=.01 pct=.01 percentage=.01 degree=0 deg=0 unit=1 rad=1 radian=1 time=1",
    "L": "m=1 meter=1 metre=1 km=1000 kilometer=1000 kilometre=1000 cm=.01 centimeter=.01 centimetre=.01 mm=.001 "
         "millimeter=.001 inch=.0254 inches=.0254 in=.0254 foot=.3048 feet=.3048 ft=.3048 yard=.9144 mile=1609.344",
    "L^3": "l=.001 liter=.001 litre=.001 L=.001 ml=1e-6 mL=1e-6 milliliter=1e-6",
    "T": "s=1 sec=1 second=1 ms=.001 min=60 minute=60 h=3600 hr=3600 hour=3600 day=86400 week=604800 year=31557600",
    "M": "g=1 gram=1 kg=1000 kilogram=1000 pound=453.59237 lb=453.59237 ounce=28.349523 oz=28.349523",
    "$": "dollar=1 cent=.01", "E": "J=1 joule=1 kJ=1000", "N": "N=1 newton=1",
}.items():
    for pair in row.split():
        name, size = pair.split("=")
        UNITS[name] = UNITS[name + "s"] = dimension, Fraction(size)
FUNC = "(?:sin|cos|tan)h|(?:a|arc)?(?:sin|cos|tan|cot|sec|csc)|log|ln|lg|exp|sqrt|abs|cis|frac|binom|floor|ceil"
OPERATORS = "det|gcd|lcm|tr|rank"
NAMED = ("alpha|beta|[gG]amma|[dD]elta|(?:var)?epsilon|zeta|eta|[tT]heta|kappa|[lL]ambda|mu|nu|xi|rho|[sS]igma|tau|chi|"
         "(?:var)?phi|Phi|[pP]si|[oO]mega|hbar|ell|odot|[pP]i|infty|emptyset|varnothing|R|Z|N|Q|C|[lc]?dots|max|min")
PROSE = set("is are the if or but maybe probably answer than to so because then since therefore i we it".split())
COMMANDS = ("×times ·cdot ∙cdot ⋅cdot √sqrt πpi ∞infty °degree ºdegree ≤le ≥ge ⩽le ⩾ge ≠ne ±pm ∓mp ∪cup ∩cap ∈in ℝR ℤZ "
            "∅emptyset ≈approx ½frac12 ¼frac14 ¾frac34 ⅓frac13 ⅔frac23 ⟨langle ⟩rangle ⌊lfloor ⌋rfloor ⌈lceil ⌉rceil "
            "…ldots αalpha βbeta γgamma δdelta θtheta λlambda μmu ωomega φphi σsigma τtau €text{euro} £text{pound}")
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
UNICODE = str.maketrans(
    dict(zip("−–‑⁄÷′’‘，（）：；", "---//" + "'" * 3 + ",():;")) | {"\u200b": "", "\ufeff": "", "\u2061": ""}
    | {code: chr(code - 0xFEE0) for code in range(0xFF10, 0xFF5B)}    # full-width digits and letters
    | {pair[0]: rf"\{pair[1:]} " for pair in COMMANDS.split()})
THOUSANDS = re.compile(r"(?<![\d.,_^])\d{1,3}(?:,\d{3}(?!\d))+(?!,?\s*\d)|(?<![\d.,_^])\d{1,3}(?: \d{3}(?!\d))+")
NUMERALS = dict(one=1, two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10, twelve=12, sixteen=16)


def unit(word: str) -> tuple[str, Fraction]:
    """(dimension, size) of a unit word or its plural; a label is a dimension of its own."""
    return UNITS.get(word) or UNITS.get(word.lower()) or ("label " + word.lower().removesuffix("s"), Fraction(1))


def joined(text: str) -> str:
    """1,234 and 1 234 as 1234, except inside brackets, where a comma separates: (100,200) is a pair."""
    listed = re.search(r"[(\[]|\\\{|\\langle", text)
    return text if listed else THOUSANDS.sub(lambda m: re.sub("[, ]", "", m[0]), text)


def said(m: re.Match) -> str:
    r"""What stands for \text{...}: plain content (numbers, lists, letters, "and"), or words marked with @."""
    inner = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", m[1])    # 4th
    text = inner.strip(" .\\~$")
    if re.fullmatch(rf"{FUNC}|{OPERATORS}", text):    # \operatorname{lcm}
        return rf" \{text} "
    # \text{A. } 15 and \text{C) It doubles} keep their marks, \text{A and C} its letters
    marked = r"\s*(?:\(?[A-J]|\([a-j])[.):]|\s*\(?[A-J]\b\)?(?:(?:,| and| or|, and) *\(?[A-J]\b\)?)+\s*$"
    if re.match(marked, inner) or re.search(r"\d|[,:\\]|^\(?[A-Z]\)?$|^[ei]$|^(?:and|or),?$", text):
        return f" {inner} "
    return " " + re.sub(r"(?<![^\W\d_])(?!(?:and|or)\b)[^\W\d_]+", r"@\g<0>", text.strip("()")) + " "


def rows(m: re.Match) -> str:
    r"""A matrix as the tuple of its rows; a column is the tuple of its cells."""
    cells = re.sub(r"(?:\\\\|\s)+$", "", joined(m[1]))    # without \\ behind the last row
    lines = [line.replace("&", ",") for line in cells.split(r"\\")]
    return r"\langle " + ",".join(rf"\langle {x} \rangle" if "," in x else x for x in lines) + r" \rangle "


def in_base(m: re.Match) -> str:
    """A number in another base as one symbol: 204_5 is neither 204_6 nor 54. The base ten changes nothing."""
    digits, base = m[1] or m[2], m[3] or m[4] or m[5]
    base = NUMERALS.get(base) or int(base)
    fits = all(int(digit, 16) < base for digit in digits)
    return m[0] if not fits else digits if base == 10 else rf" \zeta_{{base{base}digits{digits}}} "


def unit_behind(m: re.Match) -> str:
    """Letters behind a number as its unit: 5 cm, 12 apples; but 5xy, 2mg (m times g), 3ab are products."""
    before, word = m[1], m[2]
    label = before.endswith(" ") and len(word) > 3 and word.islower()
    known = before[0] == "@" or label or not unit(word)[0].startswith("label")
    return f"{before}@{word}" if known else m[0]


# One spelling per construct, by these rules in this order: pattern ⟶ replacement or function. A word is marked with @,
# so that its letters are no product. && stands between short rules, a line behind spaces goes on with the one above.
RULES = r"""
[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+ ⟶ raised() && (?<=[\d.])\\(?:overline|dot)\s*\{(\d+)\} ⟶ ~\1
\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.? ⟶ " " && \{([^{}]*)\\choose([^{}]*)\} ⟶ \\binom{\1}{\2}
(?<=\d)(?: ?\{ ?, ?\}|, ?\\!|\\! ?,|\\,|\\ ) ?(?=\d{3}(?!\d)) ⟶ ""
(?<!\\)\\[,;:!>~ \n]|\\(?:hspace|(?:text)?color) ?\{[^{}]*\}|\\q?quad|(?<!\\)(?:\$|~(?!\d))|\\[()\[\]]|(?:\bm ?)?
    \\(?:displaystyle|textstyle|limits|phantom|mathbf|mathbb|mathit|boldsymbol|bm|mathcal|vec|hat|bar|overline|underline
    |boxed|fbox|angle|triangle)(?![a-zA-Z]) ⟶ " "
(?<=[\d}])\s*\\(?:text|mathrm)\s*\{\s*([A-Z])\s*\} ⟶ " @\1"
\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|operatorname\*?|hbox|rm)\s*\{([^{}]*)\} ⟶ said()
\\begin\s*\{(?:(?:[pbB]|small)?matrix\}|array\}\s*(?:\{[^{}]*\})?)(.*?)\\end\s*\{[a-zA-Z]*\} ⟶ rows()
^([ {]*)\\(?:i*int|lim|sum|prod|Pr|max|min|Re|Im)(?![a-zA-Z]).*=(?=[^=]*$) ⟶ \1
\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\} ⟶ \\frac{\1}{\2} && \\[dtc](frac|binom)(?![a-zA-Z]) ⟶ \\\1
\\(frac|binom)\s*(\d) ⟶ \\\1{\2} && (?<![a-zA-Z\\@])C ?\( ?([^(),]+) ?, ?([^(),]+) ?\) ⟶ \\binom{\1}{\2}
(?:\{ ?\}|^|(?<=[-+*/=(,])) ?[_^] ?(?:\{([^{}]+)\}|(\w)) ?C ?_ ?(?:\{([^{}]+)\}|(\w)) ⟶ \\binom{\1\2}{\3\4}
(?<![a-zA-Z\\@])C ?_ ?(?:\{([a-zA-Z][^{}]*|\d\d+|[3-9])\}|([a-zA-Z3-9]))\^ ?(?:\{([^{}]+)\}|(\w)) ⟶ \\binom{\1\2}{\3\4}
(?<![\w.^/])(\d+) (\d+)/(\d+) ⟶ \1\\frac{\2}{\3} && \^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degree ⟶ "@degree "
@degrees? *@?([CF])(?:elsius|ahrenheit)?(?![a-zA-Z]) ⟶ " @temperature\1 " && \\?% ⟶ "@percent "
(?<=\d) ?(?:\^ ?\{ ?@?(?:st|nd|rd|th) ?\}|@(?:st|nd|rd|th)(?![a-z])) ⟶ "" && ^ *\{([^{}]*)\}[\s.,;*`"]*$ ⟶ \1
(?i:(?:@?the *)?@?\b(?:(first|1(?:st)?)|(second|2(?:nd)?)|(third|3(?:rd)?)|(fourth|4(?:th)?)) *@?quadrant\b
    |@?quadrant *@?(?:(1|I)|(2|II)|(3|III)|(4|IV))\b) ⟶ quadrant()
\^\s*\{\s*((?:\\prime\s*)+)\}|\^\s*(?=\\prime) ⟶ \1 && \\prime\s* ⟶ ' && \\ddot *\{? *(\\?[a-zA-Z]+) *\}? ⟶ \1''
\\frac ?\{ ?d ?(\\?[a-zA-Z]+(?:_\{?\w+\}?)?) ?\} ?\{ ?d ?[a-z] ?\} ⟶ \1' && \s+ ⟶ " " && (?<=[^. ])(?: ?\.){1,2} ?$ ⟶ ""
^ ?(?:\\approx|@[Tt]he(?: @\w+)* @(?:is|are)|@[Tt]here @(?:is|are)|@[Tt]he @point) ⟶ ""
^ ?@(?:[Aa]n?|[Tt]he) (?=@) ⟶ "" && ^ ?@?(?:[Oo]ption|[Cc]hoice):? ?@?(?=\(?[A-J](?![a-z])) ⟶ ""
^ ?@?[Nn]o(?: @?real)?(?: @?integer)? @?solutions? ?$ ⟶ "\\emptyset " && \\\{ ?\\\} ⟶ "\\emptyset "
^ ?@?[Ii]nfinitely @?many(?: @?solutions?)? ?$ ⟶ "\\infty " && ^ ?@?[Aa]ll @?real(?: @?numbers)? ?$ ⟶ "\\R "
(?i:^[ @a-z]*?(?:DNE|does @?not @?exist|undefined) ?$) ⟶ @DNE && ^ ?@?(<BASES>) ?$ ⟶ numeral()
(?i:^ ?@?(yes|no|true|false) ?(?:[,.:;]? ?@?(?:because|since|it|th[aeio]\w+|such)\b(?!.*\b(?:yes|true|or)\b).*)?$) ⟶ @\1
(?:^|(?<=^[ {]))[IVX]{2,}(?=[ .}]*$)|(?<![\\@a-zA-Z])[A-Z]{3,}(?![a-zA-Z_]) ⟶ @\g<0>
(?<![\w.^\\@])(?:\( ?(<DIGITS>) ?\)(?= ?_)|(<DIGITS>))(?: ?_ ?\{[ (]*(?:@base ?)?@?(<BASES>)[ )]*\}| ?_ ?@?(<BASES>)
    | ?\(? ?(?:@?in )?@?base ?@?(<BASES>)(?: ?\))?) ⟶ in_base()
(?<=\d)\s*[xX]\s*(?=10\s*\^) ⟶ "\\times " && (?<![\d.])(\d[\d.]*)[eE]([-+]?\d+) ⟶ (\1*10^{\2})
\.\.\.+ ⟶ "\\ldots " && (\.\d{0,12}?)(\d{1,6}?)\2{1,20} ?\\[lc]?dots(?! ?,) ⟶ \1~\2
\( ?(?:or|\\approx|@?about|@?approximately)\b([^()]*)\) ⟶ " or \1"
[,;]?\s*\( ?([kmn]) ?\\in *\{? *\\?([ZN]) *\}? *\)(?=[\s.}]*$) ⟶ ", \1 \\in \\\2 "
,? *@?\b(?:where|with|for)\b(?: *@?(?:any|all|every|some|an|each))* *(?:@?integers? +([kmn])\b
    |([kmn]) +@?is +@?an +@?integer|([kmn]) *\\in *\{? *\\?Z *\}?) ⟶ ", \1\2\3 \\in \\Z "
(?<=\d) ?@?([apAP])(?:\.* ?@?[mM]|(?<=:\d\d.))\b\.* ⟶ " @\1m" && @?\bmph\b ⟶ @miles/@hour && \\\$ ⟶ "@dollar "
([\d)}%] ?|\\pi ?|@[a-zA-Z]+(?:\^\{?-?\d\}?)?(?: ?/ ?| ))(?!(?:and|or)\b)([a-zA-Z]{2,})(?![a-zA-Z(]) ⟶ unit_behind()
\ ?@per\b ?|(?<=[a-z]) per (?=[@a-z]) ⟶ / && @?\b(?:square|sq)\b\.? *@?([a-z]+) ⟶ " @\1^2"
(@[a-zA-Z]+ ?/ ?)([a-zA-Z]+) ⟶ \1@\2 && (?<![\\@a-zA-Z])and(?![a-zA-Z]) ⟶ " , " && ([,;])(?: *[,;])+ ⟶ \1
(?:, *)*(?<![\\@a-zA-Z])or(?![a-zA-Z])(?: *,)* ⟶ " \\or " && ^ ?(\d+) @?to (\d+) ?$ ⟶ \1:\2
(?:^|(?<=[,(={])|(?<=\\or ))\s*(?!(?:[a-zA-Z]+ +)*(?:<FUNC>|infinity|inf)\b)(?:[a-zA-Z]{3,}(?=\s*(?:[,)}]|\\or|\.?$))
    |[a-zA-Z]{2,}(?: +[a-zA-Z]+)+) ⟶ marked()
(?:^|(?<=,)) *[A-Z](?= ?\([^()]*,[^()]*\)[ .]*(?:,|$)) ⟶ "" && ^ ?@There @are(?= \d) ⟶ ""
"""
PLACES = {"<FUNC>": FUNC, "<DIGITS>": r"\d[\dA-F]*|[A-F]{2,}\d*", "<BASES>": "|".join([r"\d+", *NUMERALS])}
CHANGES = {f"{f.__name__}()": f for f in (said, rows, in_base, unit_behind)}
CHANGES["marked()"] = lambda m: re.sub("[a-zA-Z]+", r"@\g<0>", m[0])
CHANGES["quadrant()"] = lambda m: " @" + ("IV", "I", "II", "III")[m.lastindex % 4]
CHANGES["numeral()"] = lambda m: str(NUMERALS.get(m[1], m[1]))
CHANGES["raised()"] = lambda m: "^{" + m[0].translate(SUPERSCRIPTS) + "}"
REWRITES = []
for rule in re.sub(r"\n +", "", RULES.strip()).replace(" && ", "\n").split("\n"):
    pattern, new = rule.split(" ⟶ ")
    pattern = re.sub("<[A-Z]+>", lambda m: PLACES[m[0]], pattern)
    REWRITES.append((re.compile(pattern, re.S), CHANGES.get(new, new.strip('"'))))


@functools.lru_cache(maxsize=1024)
def clean(text: str) -> str:
    r"""One spelling per construct, noise removed."""
    text = " ".join(text.translate(UNICODE).split()).lstrip(" ,;*`\"")
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    return text.rstrip(" .,;*`\"\\").lstrip(" ,;*`\"")


# ------------------------------------------------------------------ parsing

class Node(NamedTuple):
    """One node of the tree of an answer.
    kind: num, sym, word, call, + * / ^, rel (a relation, or a chain of them), seq (a list, pair, set or interval),
    ∪ ∩ ∖, such (a set with its condition).
    text: the name of a sym, word or call (?f is a function that is not known); the signs of a rel, one character each;
    the brackets of a seq, "" for a list without any and "or" for one that is joined so.
    """
    kind: str
    text: str = ""
    parts: tuple = ()
    value: Fraction | None = None    # of a num, with the unit in its last place (None if it is exact)
    ulp: Fraction | None = None
    size: int = 1     # nodes of the whole tree
    depth: int = 1

    def walk(self):
        """Every node of the tree."""
        yield self
        for part in self.parts:
            yield from part.walk()

    def swap(self, change):
        """The tree with change(node) in place of each node for which that is not None."""
        new = change(self)
        if new is not None or not self.parts:
            return self if new is None else new
        return tree(self.kind, self.text, *(part.swap(change) for part in self.parts))

    def kinds(self) -> set[str]:
        return {n.kind for n in self.walk()}

    def decimals(self) -> list:
        return [n for n in self.walk() if n.ulp]

    def unknown(self) -> bool:
        """Whether this is f(x), of a function that is not known."""
        return self.kind == "call" and self.text[0] == "?"

    def restricts(self) -> bool:
        """Whether this says that a letter is any integer: k in Z."""
        return self.kind == "rel" and self.text == "∈" and self.parts[1].text in ("Z", "N")


def tree(kind: str, text: str, *parts: Node) -> Node:
    """A node above its parts. Its size is known before anything is done with it, so that work can be charged first."""
    size, depth = 1 + sum(p.size for p in parts), 1 + max(p.depth for p in parts)
    if depth > 2 * MAX_DEPTH or size > MAX_WORK:    # x^2^2^2... nests only the tree, a multiple of a vector widens it
        raise Budget(f"{size} nodes, {depth} deep; at most {MAX_WORK} and {2 * MAX_DEPTH}")
    return Node(kind, text, parts, size=size, depth=depth)


def extend(left: Node, right: Node, text: str = "") -> Node:
    """left with one more part. Lists, relations, sums and products take any number: long ones are wide, not deep."""
    parts, depth = (*left.parts, right), max(left.depth, right.depth + 1)
    return left._replace(text=text, parts=parts, size=left.size + right.size, depth=depth)


def names(*trees: Node) -> set[str]:
    """The free symbols: everything that gets a sample value."""
    return {n.text for t in trees for n in t.walk() if n.kind == "sym"} - {"pi", "e", "i", "infty", "R", "emptyset"}


# The vocabulary: all spellings of a token, the levels of the binary operators (loosest first), the brackets.
SPELLED = {";": ","}
for row in (
        r"= == := \equiv \approx; < \lt; ≤ <= \le \leq \leqslant; > \gt; ≥ >= \ge \geq \geqslant; ≠ != \ne \neq; "
        r"∈ \in; ∪ \cup; ∩ \cap; ∖ \setminus \backslash; * \cdot \times \ast; / \div; | \lvert \rvert \mid \vert \|; "
        r"^ **; , \, and \land; or \or \lor; infty infinity inf oo; emptyset varnothing; ldots dots cdots").split("; "):
    SPELLED |= dict.fromkeys(row.split(), row.split()[0])
LEVELS = {op: i for i, row in enumerate((", or", "= < ≤ > ≥ ≠ ∈ :", "∪ ∩ ∖", "+ -", "* /")) for op in row.split()}
PAIRS = {"(": ") ]", "[": ") ]", "{": "}", r"\{": r"\}", r"\langle": r"\rangle", "|": "|",
         r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}    # (0, 1] is an interval
ORDER = {"<": operator.lt, "≤": operator.le, ">": operator.gt, "≥": operator.ge, "≠": operator.ne}
CALLED = {"|": "abs", r"\lfloor": "floor", r"\lceil": "ceil"}
LIST, SET = ("", "or"), r"\{\}"    # the text of a list without brackets, and of a set
SIGN = re.compile(r"\\(?:pm|mp)(?![a-zA-Z])|\+/-")
# A name takes its subscript and primes along. Letters that usually name functions are called before a bracket with a
# single number or letter, f always is: x(3), f(t + 1) and \theta(t) are calls; n(n-1) and a(b) are products.
SUFFIX = r"(?:\ ?_\ ?(?:\{[^{}]*\}|[^\W_])|')"
TOKEN = re.compile(rf"""\s*(?:
    (?P<num>(?:\d+\.?\d*|\.\d+)(?:~\d+)?) | @(?P<word>[^\W\d_]+)
  | (?P<func>\\(?:{FUNC}|{OPERATORS})(?![a-zA-Z])|{FUNC})
  | (?P<op>[<>!=:]=|\*\*)
  | (?P<call>[fgh](?=\ ?\()|(?:[FGHPQWpquyvxIT]|[a-zA-Z]{SUFFIX}|\\(?!pi)(?:{NAMED})){SUFFIX}*
        (?=\ ?\(\ ?(?:[\d.]+|\\?[a-zA-Z]+)\ ?\)))
  | (?P<name>(?:\\(?:{NAMED})(?![a-zA-Z])|pi|(?<![a-zA-Z])(?:infinity|inf|oo)(?![a-zA-Z])|[^\W\d_]){SUFFIX}*)
  | (?P<cmd>\\[a-zA-Z]+|\\.) | (?P<sign>\S))""", re.X)


def number(text: str) -> Node:
    """A literal, where it has decimals with the unit in its last place. 0.1~6 is 0.1666..."""
    text, _, period = text.partition("~")
    whole, _, decimals = text.partition(".")
    ulp = Fraction(1, 10 ** len(decimals))
    value = int(whole + decimals) * ulp
    if period:
        value += ulp * Fraction(int(period), 10 ** len(period) - 1)
    return Node("num", value=value, ulp=ulp if decimals and not period else None)


def signed(sign: str, node: Node) -> Node:
    if sign == "+":
        return node
    return node._replace(value=-node.value) if node.kind == "num" else chain("*", number("-1"), node)


def chain(op: str, left: Node, right: Node) -> Node:
    """left op right, where "" is a product without a sign."""
    if op in (",", "or"):
        left = left if left.kind == "seq" and left.text in LIST else tree("seq", "", left)
        return extend(left, right, "or" if op == "or" else left.text)
    if LEVELS.get(op) == 1:
        left = left if left.kind == "rel" else tree("rel", "", left)
        return extend(left, right, left.text + op)
    if LEVELS.get(op) == 3:
        op, right = "+", signed(op, right)
    if right.text == "()" and op in ("", "*") and left.kind != "seq":    # a multiple of a vector or matrix, and a sum
        return tree("seq", "()", *(chain("*", left, cell) for cell in right.parts))
    if right.text == left.text == "()" and op == "+" and len(left.parts) == len(right.parts):
        return tree("seq", "()", *map(functools.partial(chain, "+"), left.parts, right.parts))
    if not op and left.kind == "num" and not left.ulp and right.kind == "/":
        above, below = (part.value for part in right.parts)
        if above and below and 0 < above < below:    # 2\frac12, not 2\frac53
            return tree("+", "", left, signed("-" if left.value < 0 else "+", right))
    op = op or "*"
    return extend(left, right) if op in "+*" and left.kind == op else tree(op, "", left, right)


class Parser:
    """Precedence climbing over the tokens of one answer. State: the position, how deep the grammar is nested, and
    whether a bar or colon would close what is open, as in |x| and {x | x > 0}."""

    def __init__(self, text: str):
        self.tokens, self.i, self.depth, self.bars = [], 0, 0, False
        for m in TOKEN.finditer(text):
            kind, t = m.lastgroup, m[m.lastgroup]
            t = re.sub(r"[\\{} ]|(?<=a)rc", "", t) if kind in ("name", "call", "func") else t
            self.tokens.append((kind, t if kind == "word" else SPELLED.get(t, t)))
        self.tokens.append(("end", ""))
        self.kind, self.next = self.tokens[0]

    def take(self, wanted: str = "") -> str:
        """The next token, which must be one of the wanted ones if any are named."""
        t = self.next
        if not t or wanted and t not in wanted.split():
            raise Unparsed(f"expected {wanted or 'more'} but found {t or 'the end'}")
        self.i += 1
        self.kind, self.next = self.tokens[self.i]
        return t

    def expression(self, level: int = 0) -> Node:
        """What binds at least as tightly as level: 0 lists, 1 relations, 2 sets, 3 sums, 4 products, 5 powers."""
        left = self.powers()
        while True:
            own = LEVELS.get(self.next, -1)
            if own >= level and not (self.next == ":" and self.bars):
                op = self.take()
                left = chain(op, left, self.expression(own + 1))
            elif level <= 4 and self.starts_factor():
                if left.kind == "word" and unit(left.text)[0].startswith("label"):
                    raise Unparsed("prose")
                left = chain("", left, self.powers())
            else:
                return left

    def starts_factor(self) -> bool:
        """Whether the next token is multiplied on without a sign, as in 2x, 3\\sqrt{2}, 5 cm; "2 3" is no product."""
        if self.kind in ("num", "name", "word", "func", "call"):
            return self.kind != "num" or self.tokens[self.i - 1][0] != "num"
        return self.next in PAIRS and not (self.next == "|" and self.bars)

    def powers(self) -> Node:
        """An atom with its signs and with what binds to it from behind: -2^10, n!."""
        sign = "+"
        while self.next in ("-", "+"):
            sign = "-" if sign != self.take() else "+"
        left = self.atom()
        while self.next in ("^", "!"):
            left = tree("^", "", left, self.argument()) if self.take() == "^" else tree("call", "!", left)
        return signed(sign, left)

    def argument(self) -> Node:
        """What ^ or a command takes: {...}, or one token; 2^10 takes the whole number."""
        sign = self.take() if self.next in ("-", "+") else "+"
        return signed(sign, self.atom())

    def atom(self) -> Node:
        """The smallest complete piece. Every recursion of the grammar passes here, so it counts the nesting."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Budget(f"nested deeper than {MAX_DEPTH}")
        kind, t = self.kind, self.take()
        if kind == "num":
            node = number(t)
        elif kind == "name":
            node = Node("sym", t)
        elif kind in ("func", "call"):
            node = self.function(t, kind == "call" or t in OPERATORS.split("|"))
        elif t in PAIRS:
            node = self.bracket(t)
        else:
            while kind == "word" and self.kind == "word":
                t += " " + self.take()
            # A command that is not known is a word: it is the same as itself only.
            if kind not in ("word", "cmd") or PROSE & set(t.lower().split()):
                raise Unparsed(f"cannot read {t}")
            node = Node("word", t)
        self.depth -= 1
        return node

    def function(self, name: str, opaque: bool) -> Node:
        r"""\frac12, \sin^2 x, \log_2 8, \sqrt[3]{x}, \sin 2\pi t: in brackets or a product. f(x), \det B and \gcd(4, 6)
        are opaque: names of what follows "="."""
        extra = {}
        while self.next in ("^", "_") or self.next == "[" and name == "sqrt":
            key = self.take() if self.next != "[" else "_"
            extra[key] = self.argument()
        low, power = extra.get("_"), extra.get("^")
        if name in ("frac", "binom"):
            above, below = self.argument(), self.argument()
            return tree("/", "", above, below) if name == "frac" else tree("call", name, above, below)
        if self.next in PAIRS or name == "sqrt":
            inner = self.argument()
        else:
            inner = self.expression(5)
            while self.starts_factor() and (self.kind not in ("func", "word") or self.next == "degree"):
                inner = chain("*", inner, self.powers())
        if opaque:
            return tree("call", "?" + name, *(inner.parts if inner.kind == "seq" else [inner]))
        name, power = ("a" + name, None) if power and power.value == -1 else (name, power)
        node = tree("call", name, inner, low) if low else tree("call", name, inner)
        return tree("^", "", node, power) if power else node

    def bracket(self, opened: str) -> Node:
        """(...), [...], {...}, \\{...\\}, |...|, or an interval such as (0, 1]. The kind of bracket stays in the tree,
        because (1, 2), [1, 2] and \\{1, 2\\} are three different answers; (x) and {x} are just x."""
        bars, self.bars = self.bars, opened in (r"\{", "|")    # inside a set a bar or colon separates the condition
        inner, condition = self.expression(), None
        if opened == r"\{" and self.next in ("|", ":"):
            self.take()
            self.bars = bars
            condition = self.expression()
        self.bars = bars
        close = self.take(PAIRS[opened])
        if condition:
            # {k pi | k in Z} is the same family as "k pi, k in Z"
            family = condition.restricts() and inner.kind not in ("sym", "rel")
            if condition.kind == "seq" and condition.parts[0].text == "=" and condition.parts[0].parts[0] == inner:
                return condition    # {x | x = k pi, k in Z}
            return tree("seq" if family else "such", "", inner, condition)
        if opened in CALLED:
            return tree("call", CALLED[opened], inner)
        bare = inner.kind == "seq" and inner.text in LIST
        joined_by_or = opened == "(" and bare and inner.text    # (x < 1 or x > 2)
        if opened == "{" or joined_by_or or not bare and opened + close in ("()", "[]"):
            return inner
        return tree("seq", "()" if opened == r"\langle" else opened + close, *(inner.parts if bare else [inner]))


@functools.lru_cache(maxsize=16)
def parse(text: str) -> Node:
    r"""The tree of a cleaned text, with \pm the set of the trees for both signs of each; remembered for the responses
    to one problem, which follow each other. Errors: Unparsed when it is not in the grammar, Budget over the limits."""
    texts = [text]
    while SIGN.search(texts[0]):
        texts = [SIGN.sub(sign, t, count=1) for t in texts for sign in "+-"]
        if len(texts) > 16:
            raise Budget(r"more than 4 signs \pm")
    trees = []
    for text in texts:
        if len(text) > MAX_CHARS:
            raise Budget(f"{len(text)} characters, at most {MAX_CHARS} are read")
        parser = Parser(text)
        trees.append(parser.expression())
        if parser.next:
            raise Unparsed(f"unexpected {parser.next}")
    return tree("seq", SET, *trees) if len(trees) > 1 else trees[0]


# ------------------------------------------------------------------ values

def real():
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


def bits(*numbers) -> int:
    return sum(max(abs(x.numerator), x.denominator).bit_length() for x in numbers if isinstance(x, Fraction))


def bounded(x):
    """A value: a Fraction as long as that is cheap, so that 10^{100} + 1 is not 10^{100}, else an mpmath number."""
    return x if isinstance(x, Fraction) and bits(x) <= MAX_BITS else real().convert(x)


def sample(name: str, point: int = 0, integers=(), fixed=()):
    """A fixed "random" number for a name; negative and large at some points, where |x - 500| is not 500 - x. The
    integers follow each other at first, so that every remainder occurs; a name such as x takes them at odd points."""
    point = 0 if name in fixed else point
    h, counts = zlib.crc32(f"{name}@{point}".encode()), name[0] in "ijklmnpqrstNM"    # the names of integers
    if name in integers and (counts or point % 2):
        follows = 2 + zlib.crc32(name.encode()) % 4 + (point if counts else point // 2)
        return Fraction(12 + h % 40 if point > 5 else follows)
    scale = (1, -1, 41, 13, 1009, 100_003)[point % 6]
    return real().mpf((400 + h % 3001) * scale * (-1 if point in (3, 5) and h % 2 else 1)) / 997


def add(a, b):
    """a + b, exactly 0 where all but rounding cancels. A term lost in the rounding of the other is refused, because
    \\sqrt{2} + 2^{9999} would otherwise be 2^{9999}."""
    m, total = real(), a + b
    if isinstance(total, Fraction) or not a or not b or m.isinf(a) or m.isinf(b):
        return bounded(total)
    low, high = sorted((m.mag(a), m.mag(b)))
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
    short = isinstance(a, Fraction) and abs(b) * bits(a) <= MAX_BITS
    return a ** int(b) if short and m.isint(b) else m.power(a, m.convert(b))


def combine(kind: str, a, b):
    """a + b, a b, a/b or a^b, charged by the length of its fractions before it is computed."""
    spend(1 + bits(a, b) // 400)
    if kind == "+":
        return add(a, b)
    if kind == "^":
        return power(a, b)
    return bounded(a * b if kind == "*" else a / b if isinstance(b, Fraction) else real().convert(a) / b)


def call(name: str, x: list):
    """A function of values, each within the range where it costs microseconds."""
    m, a = real(), x[0]
    if name[0] == "?":    # an unknown function is any fixed one, other for each name and each order of the arguments
        h = zlib.crc32(name.encode())
        terms = [(i + 2) * (v**3 + h % 97 * v) for i, v in enumerate(x)]
        return m.sqrt(h) * (sum(terms) + h % 89 + 1)
    if name in ("!", "binom"):
        if not all(m.isint(v) and 0 <= v <= 3000 for v in x):
            raise Unparsed("only of integers to 3000")
        spend(int(max(x)) // 10)
        return bounded(Fraction((math.factorial if name == "!" else math.comb)(*map(int, x))))
    if name == "sqrt":
        degree = x[1] if len(x) > 1 else Fraction(2)
        # the cube root of -8 is -2, not the complex principal root
        odd = not m.im(a) and m.re(a) < 0 and degree in (3, 5, 7, 9)
        return -power(-a, 1 / degree) if odd else power(a, 1 / degree)
    if name in ("log", "ln", "lg"):
        return m.log(a) / m.log(x[1] if len(x) > 1 else 10 if name == "lg" else m.e)
    if name != "abs" and m.mag(a) > 60:
        raise Budget(f"{name} of a huge number")
    if name in ("floor", "ceil"):
        tiny = m.ldexp(1, -PRECISION // 3)    # \lfloor (\sqrt{2})^2 \rfloor is 2
        return m.floor(m.convert(a) + tiny) if name == "floor" else m.ceil(m.convert(a) - tiny)
    return getattr(m, {"abs": "fabs", "cis": "expj"}.get(name, name))(a)


def value(node: Node, at):
    """The value of a tree, a Fraction or an mpmath number, where at(name) is the value of a symbol.
    Errors: Unparsed where there is no value, Budget over the limits."""
    kind, m = node.kind, real()
    spend(10 if kind in ("call", "^") else 1)
    if kind == "num":
        return node.value
    if kind == "sym":
        known = {"pi": m.pi, "e": m.e, "i": m.j, "infty": m.inf}
        return +known[node.text] if node.text in known else at(node.text)
    if kind == "word":
        dim, size = unit(node.text)
        base, _, exponent = dim.partition("^")
        scale = at("unit " + base) ** int(exponent or 1) if dim else 1
        return size * scale if size else m.pi / 180    # the degree
    if kind not in ("call", "+", "*", "/", "^"):
        raise Unparsed(f"{kind} has no value")
    try:
        x = [value(part, at) for part in node.parts]
        return call(node.text, x) if kind == "call" else functools.reduce(functools.partial(combine, kind), x)
    except (ZeroDivisionError, TypeError, AttributeError, ValueError) as why:    # log 0, gamma poles, (1,2) + 1
        raise Unparsed(f"no value: {why}") from why


# ------------------------------------------------------------------ comparison

def precision(node: Node) -> tuple:
    """(relative unit in the last place, digits, whether measured) of -2.68, 5.0 cm or 4.5 \\times 10^{33}, where one
    literal carries the precision; (0, 0, False) for anything else. A short fraction has a denominator below 50."""
    inexact = node.decimals()
    if len(inexact) != 1 or not inexact[0].value or node.kinds() - {"num", "word", "*", "/", "^"}:
        return 0, 0, False
    literal, fraction = inexact[0], inexact[0].value.denominator
    digits = len(str(int(abs(literal.value / literal.ulp))))
    words = {unit(n.text)[0].split(" ")[0] for n in node.walk() if n.kind == "word"}
    scientific = any(n.kind == "^" and n.parts[0].value == 10 for n in node.walk())
    measured = scientific or fraction > 1 and words - {"", "$", "label"} or digits > 3 and fraction >= 50
    return real().convert(abs(literal.ulp / literal.value)), digits, measured


def values(trees: list[Node], points: int, fixed=()):
    """The values of the trees at each sample point where all of them have one. A name is sampled at integers where
    something is different or has a meaning only there: floors, factorials, binomials, powers of negative numbers."""
    integers = set()
    for n in itertools.chain(*map(Node.walk, trees)):
        if n.text in ("floor", "ceil", "!", "binom") or n.kind == "^" and (n.parts[0].value or 0) < 0:
            integers |= names(n)
    for point in range(points + 2 * bool(integers)):
        at = functools.partial(sample, point=point, integers=integers, fixed=fixed)
        try:
            yield [value(t, at) for t in trees]
        except (Unparsed, Budget) as why:    # e^x + 1 has no usable value at the later points, which are large
            if isinstance(why, Budget) and (point == 0 or LOCAL.work > MAX_WORK):
                raise


def same_values(gold: Node, answer: Node) -> bool:
    """Whether the values are the same at every sample point, under rule 4 of the module docstring; there must be one,
    1/0 is the same as nothing."""
    m, found = real(), False
    last_place, digits, _ = precision(answer)
    gold_place, _, measured = precision(gold)
    margin = m.ldexp(1, -60)    # half of a measured last place is right, a whole last place of an answer is too far
    for x, y in values([gold, answer], 6 if names(gold, answer) or "word" in gold.kinds() else 1):
        # sqrt(1/n) and 1/sqrt(n) differ only where they leave the reals, which is not their domain
        if found and (m.im(x) or m.im(y)):
            continue
        found, same = True, x == y
        if not (m.isinf(x) or m.isinf(y)):    # no large number is infinite enough
            d = abs(m.convert(add(x, -y)))
            rounds = measured and d <= abs(x) * gold_place / 2 * (1 + margin)
            same = not d or x and y and (rounds or digits >= 6 and d < abs(y) * last_place * (1 - margin))
        if not same:
            return False
    return found


def same_expression(gold: Node, answer: Node) -> bool:
    """Comparison by value. A unit that only one side writes is ignored: cm after a gold without cm. Percent and degree
    have plain sizes, there the other side may also have converted: 28% and 0.28. Units on both sides must be the same
    in dimension and size, which the sample value of each dimension sees to."""
    # Letters behind a number are units in 5 m, 9.8 m/s^2 where the gold has no letters.
    first = next(n for n in answer.walk() if not n.parts)
    if answer.kind in ("*", "/") and not names(first) and not names(gold):
        answer = answer.swap(lambda n: Node("word", n.text) if n.kind == "sym" and n.text in UNITS else None)
    if same_values(gold, answer):
        return True
    # without the units, but inside a function a degree is always a degree: sin 30^\circ
    def without(n: Node) -> Node | None:
        return number("1") if n.kind == "word" else n if n.kind == "call" else None
    plain = gold.swap(without), answer.swap(without)
    return ("word" in gold.kinds()) != ("word" in answer.kinds()) and same_values(*plain)


def same_equation(f: Node, g: Node) -> bool:
    """Whether the equations f = 0 and g = 0 are the same: f = c g with one constant c. In a differential equation all
    but the unknown functions is constant: m y'' = m g is y'' = g."""
    letters = names(f, g)
    functions = {name.rstrip("'") for name in letters if name[-1] == "'"}
    fixed = {name for name in letters if functions and name.rstrip("'") not in functions}
    rows = list(values([f, g], 6, fixed))
    if len(rows) < 2 or not names(f) - fixed == names(g) - fixed != set() or not all(map(all, rows)):
        return False
    ratios = [real().convert(x) / y for x, y in rows]
    return not any(add(ratio, -ratios[0]) for ratio in ratios)


def is_set(node: Node) -> bool:
    """Whether a node can only be a set of reals: an inequality, a union, R; (1, 2) and [1, 2] can also be a pair."""
    if node.kind == "rel":
        return is_set(node.parts[1]) if node.text == "∈" else set(node.text) <= ORDER.keys()
    if node.kind == "seq":    # "x <= 5, x in R", "x < 0 or x = 1"
        fits = all(is_set(n) or n.kind == "rel" and n.text == "=" for n in node.parts)
        return node.text in LIST and fits and any(map(is_set, node.parts))
    return node.kind in ("∪", "∩", "∖", "such") or node.text in ("R", "emptyset")


def number_of(node: Node):
    """The value of a tree without names, units and unknown functions, or None."""
    closed = not (names(node) or node.kinds() & {"word", "rel"} or any(map(Node.unknown, node.walk())))
    try:
        return value(node, sample) if closed else None
    except Unparsed:
        return None


def inside(node: Node, x) -> bool:
    """Whether the number x belongs to the set that a tree stands for. Errors: Unparsed when it is none."""
    kind, text, parts = node.kind, node.text, node.parts
    spend(1)
    if kind == "rel" and text == "=" and parts[0].kind == "sym" and not names(parts[1]):
        return not add(x, -value(parts[1], sample))
    if kind == "rel" and set(text) <= ORDER.keys() and names(node) and not node.kinds() & {"word", "seq"}:
        try:
            sides = [value(side, lambda name: x) for side in parts]
            steps = [add(a, -b) for a, b in zip(sides, sides[1:])]
            return all(ORDER[sign](step, 0) for sign, step in zip(text, steps))
        except (Unparsed, TypeError):    # 1/x has no value at 0, \sqrt{x} no order below it
            return False
    # {2x | x > 1} and {x in Z | x > 1} are other sets than their condition
    such = kind == "such" and (parts[0].kind == "sym" or parts[0].text == "∈" and parts[0].parts[1].text == "R")
    if such or kind == "rel" and text == "∈":
        return inside(parts[1], x)
    if kind in ("∪", "∩", "∖"):
        a, b = inside(parts[0], x), inside(parts[1], x)
        return {"∪": a or b, "∩": a and b, "∖": a and not b}[kind]
    if kind == "seq" and (text == "or" or is_set(node)):    # a comma between inequalities is "and"
        members = [inside(part, x) for part in parts]
        return any(members) if text == "or" else all(members)
    if kind == "seq" and text and not names(node):
        steps = [add(x, -value(part, sample)) for part in parts]
        if text == SET:
            return not all(steps)
        if len(steps) == 2 and add(steps[0], -steps[1]) >= 0:
            above, below = "≥" if text[0] == "[" else ">", "≤" if text[1] == "]" else "<"
            return ORDER[above](steps[0], 0) and ORDER[below](steps[1], 0)
    if kind == "sym" and is_set(node):
        return text == "R"
    raise Unparsed("not a set of numbers")


def same_set(*sets: Node) -> bool:
    """Whether two sets of reals in one unknown, x or g(x), have the same elements: at every number written in them and
    its negative, very near to these, half way between, and at fixed other points: no end can hide a difference."""
    sets = [t.swap(lambda n: Node("sym", n.text) if n.unknown() and names(n) else None) for t in sets]
    m, spots = real(), {real().mpf(0)}
    for node in itertools.chain(*map(Node.walk, sets)):
        spend(node.size)
        x = number_of(node)
        if x is not None and not m.isinf(x) and not m.im(x):
            spots |= {m.convert(x), -m.convert(x)}
    spots = sorted(spots)
    spend(len(spots) ** 2)    # each test goes through the ends of its set
    middle = [(a + b) / 2 for a, b in zip(spots, spots[1:])]
    near = [x + s * m.ldexp(1 + abs(x), -99) for x in spots for s in (1, -1)]
    spots += near + middle + [sample("x", i) for i in range(6)]
    try:
        return len(names(*sets)) < 2 and all(inside(sets[0], x) == inside(sets[1], x) for x in spots)
    except (Unparsed, TypeError):    # complex numbers have no order
        return False


def named(node: Node, loose: bool = False) -> bool:
    r"""Whether the left side of an equation only says what the right side is: x, f(x), (x, y), AB, |AB|, V_1/V_2; not
    11a + c, 2x. loose: also B^{-1}, and x + y, g^{-1}(t) or whatever else has two letters; not 2x, x^2."""
    if node.kind == "word" or node.unknown():
        return True
    inverse = node.kind == "^" and node.parts[1].value == -1 and node.parts[0].text.isupper()
    letters, plain = names(node), node.kinds() <= {"sym", "seq", "call", "*", "/"}
    functions = any(n.kind == "call" and n.text != "abs" and not n.unknown() for n in node.walk())
    return bool(letters) and plain and not functions or loose and (inverse or len(letters) > 1)


def unnamed(node: Node, gold: Node | None = None) -> Node:
    r"""x = 3, x \in S and x = 1 + 2 = 3 without the name, 1:2 as a fraction. With a gold that is a right side more is a
    name, x + y = 7 for 7; but 0 is the right side of any equation, 2x - y + 4 = 0."""
    loose = gold is not None and gold.kind != "rel" and gold.value != 0
    if node.kind == "rel" and node.text == "∈":
        return node.parts[1]
    if node.kind == "rel" and "=" in node.text and set(node.text) <= {"=", ":"}:
        # A chain of equalities claims its last side. Of two sides the left one must be a name, so that 5 = 5 is no 5.
        left, right = node.parts[0], node.parts[-1]
        computed = not names(left) and (left.kind != "num" or right.kind != "num" and not names(right))
        if len(node.text) > 1 or computed or named(left, loose):
            cut = node.text.rindex("=") + 1
            node = node._replace(text=node.text[cut:], parts=node.parts[cut:]) if node.text[cut:] else right
    return tree("/", "", *node.parts) if node.kind == "rel" and node.text == ":" else node


def forms(answer: Node) -> list[Node]:
    """The answer, and the exact form of a value that it writes twice (2/3 = 0.667, 0.75 or 3/4); nothing for an
    answer such as x = 5 = 6, which says that different numbers are the same."""
    chained = answer.kind == "rel" and set(answer.text) == {"="}
    listed = answer.kind == "seq" and answer.text in LIST
    parts = answer.parts if chained or listed else ()
    known = [(part, real().convert(x)) for part in parts if (x := number_of(part)) is not None]
    if len(set(parts)) < 2 or len(known) < 2 or listed and len(known) < len(parts):
        return [answer]
    best, x = ([pair for pair in known if not pair[0].decimals()] or known)[-1]
    for part, y in known:
        last_place = real().convert(sum(n.ulp for n in part.decimals()))
        if add(x, -y) and abs(x - y) > min(last_place, abs(x) / 100):    # 3/4 or 0.76, 101 or 100 are hedges
            return [] if chained else [answer]
    return [answer, best]


def members(node: Node, gold: Node | None = None) -> tuple[str, list[Node]]:
    r"""(brackets, members): "()", "[)" ...; "" for a bare list, a set or the one member of anything else."""
    inner = unnamed(node, gold)
    if inner.kind != "seq":
        return "", [node]
    if inner.text not in (*LIST, SET):
        return inner.text, list(inner.parts)
    found = []
    for item in inner.parts:
        # "pi/4 + k pi, k in Z" is one answer, but Z restricts an inequality
        if not item.restricts() or any(map(is_set, inner.parts)):
            brackets, own = members(item)
            found += [item] if brackets else own
    # A set holds a member once; in a list of solutions a double root may count, see `same_answer`.
    return "", list(dict.fromkeys(found)) if inner.text == SET else found


def same_answer(gold: Node, answer: Node) -> bool:
    """Whether two trees are the same answer: a set of reals by its elements, a list or set by pairing, a pair or matrix
    cell by cell, anything else as a single value or relation."""
    spend(1 + (gold.size + answer.size) // 8)
    x, y = unnamed(gold), unnamed(answer, gold)
    if (is_set(x) or is_set(y)) and same_set(x, y):
        return True
    (brackets, g), (other, a) = members(gold), members(answer, gold)
    # a list for a pair, in order or with names: y = 2, x = 1 for (1, 2)
    if brackets + other == "()" and len(g) == len(a) and SET not in (x.text, y.text):
        for side in (g, a):
            if all(n.kind == "rel" and n.parts[0].kind == "sym" for n in side):
                side.sort(key=lambda n: n.parts[0].text)
        return all(map(same_answer, g, a))
    if brackets or other:
        return brackets == other and len(g) == len(a) and all(map(same_answer, g, a))
    if len(set(g)) == len(g):    # a solution found twice is one, but a gold with a double root wants it twice
        a = list(dict.fromkeys(a))
    # As many different members on both sides, each with a partner of its own: a subset of the solutions, and a list of
    # guesses around the right one, both fail here.
    if len(g) != len(a) or len(g) < 2:
        return len(g) == len(a) == 1 and same_single(g[0], a[0])
    for item in g:
        partner = next((n for n in a if same_answer(item, n)), None)
        if partner is None:
            return False
        a.remove(partner)
    return True


def same_single(gold: Node, answer: Node) -> bool:
    """Equations up to a factor, and chains of relations side by side in either direction; everything else by value."""
    if not gold.kind == answer.kind == "rel" or ("=" in gold.text) != ("=" in answer.text) or gold.text == ":":
        x, y = unnamed(gold), unnamed(answer, gold)
        return x.kind != "rel" != y.kind and same_expression(x, y)
    g, a = gold.parts, answer.parts
    if set(gold.text + answer.text) == {"="}:
        if named(g[0]) and g[0] == a[0] or g[0].unknown() and a[0].text == "y":
            return same_answer(g[-1], a[-1])
        if len(g) == len(a) == 2 and same_equation(*(tree("+", "", side[0], signed("-", side[1])) for side in (g, a))):
            return True
    # a < b <= c is also c >= b > a
    back = answer.text[::-1].translate(str.maketrans("<>≤≥", "><≥≤"))
    forward = gold.text == answer.text and all(map(same_answer, g, a))
    return forward or gold.text == back and all(map(same_answer, g, a[::-1]))


# ------------------------------------------------------------------ verdicts

CHOICE = re.compile(r"\(?([A-J]) ?(?:\)[.:]?|[.:])\s*((?!,|\\or|\(?[A-J]\)?$)\S.*)", re.S)
BASE = re.compile(r"\\zeta_\{base\d+digits(\w+)\}")
EXACT = re.compile(r"([^,=]*\\(?:pi|sqrt|frac|ln|log)[^,=]*)\\approx ?\d*\.?\d+(?: ?@[^,=\d]*[\d^]*)?")
DIMENSIONS = re.compile(r"[\d.]+(?: ?@\w+)?(?: ?\\times ?[\d.]+(?: ?@\w+)?){2,}")


def readings(gold: str, answer: str) -> list[tuple[str, str]]:
    r"""The readings of two cleaned texts, of which one must be the same. A comma separates thousands or list items;
    "(C) 12" is a choice with its text; three dimensions are a list, not a product; 2\pi \approx 6.28 is exact."""
    if DIMENSIONS.fullmatch(gold):
        gold, answer = (text.replace(r"\times", ",") for text in (gold, answer))
    if re.search("@[ap]m", gold) or ":" in gold and re.search("@[ap]m", answer):    # 4:30 p.m. is no ratio
        gold, answer = (re.sub(r":(?=\d\d)", ".", text) for text in (gold, answer))
    if "@temperature" not in gold:
        answer = re.sub("@temperature[CF]", "@degree", answer)
    choice = re.fullmatch(r"\(?[A-J]\)?", gold)
    answer = answer.upper() if choice and re.fullmatch(r"\([a-j]\)", answer) else answer
    pairs = [(joined(gold), joined(answer)), (gold, answer)]
    if m := CHOICE.fullmatch(answer):
        pairs = [(gold.strip("()"), m[1])] if choice else [*pairs, (joined(gold), joined(m[2]))]
    elif m := CHOICE.fullmatch(gold):
        pairs += [(m[1], answer.strip("()")), (joined(m[2]), joined(answer))]
    elif m := EXACT.fullmatch(answer):
        pairs.append((gold, m[1]))
    return list(dict.fromkeys(pairs))


def same_text(gold: str, answer: str) -> bool:
    """Whether one reading of two cleaned texts is the same answer."""
    g, a = parse(gold), parse(answer)
    if g.kind == a.kind == "rel":    # x for x(t) where the other side leaves the argument out
        letters = {"?" + name for name in names(g, a)}
        g, a = (t.swap(lambda n: Node("sym", n.text[1:]) if n.text in letters else None) for t in (g, a))
    # Arbitrary constants named as in the gold: n for k in Z, K or c for C where there is also a variable such as x.
    family = any(map(Node.restricts, (*g.walk(), *a.walk())))
    variable = {name[0] for name in names(g)} & set("xtyuzθr")
    free = re.compile("[klmn]" if family else r"[CcK](_\d)?" if variable else "$")
    new = sorted(filter(free.fullmatch, names(g) - names(a)))
    old = sorted(filter(free.fullmatch, names(a) - names(g)))
    if [name[1:] for name in new] == [name[1:] for name in old]:
        a = a.swap({Node("sym", o): Node("sym", w) for o, w in zip(old, new)}.get)
    return any(same_answer(g, form) for form in forms(a))


def judge(gold: str, answer: str) -> str:
    """The reason of the verdict on an extracted answer."""
    LOCAL.work = 0
    if answer.strip() == gold.strip():
        return "correct" if answer.strip() else "no_answer"
    gold = boxed(gold)[0] or gold    # of a whole solution given as gold, its box
    if max(len(answer), len(gold)) > MAX_CHARS:
        return "budget"
    g, a = clean(gold), clean(answer)
    # The same but for spaces, as two thirds of real verdicts are, and only then trees. "2 3" is not 23.
    spelled, based = (re.sub(r"(?<!\d) | (?!\d)", "", t) for t in (a, g))
    if spelled in (based, BASE.sub(r"\1", based)):
        return "correct" if a else "no_answer"
    reason = "unparsed"    # unless some reading of the answer and of the gold could be compared
    for pair in readings(g, a):
        try:
            if same_text(*pair):
                return "correct"
            reason = "wrong"
        except Unparsed:
            continue
        except (Budget, RecursionError):    # the latter only where the caller has used up the stack
            return "budget"
    return reason


def verify(response: str, *, gold: str, finished: bool | None = None) -> Verdict:
    r"""Whether the final answer of a response is the same as the gold answer.
    response: the model's text; what precedes </think> or follows an end-of-turn token is ignored.
    gold: the raw string of the dataset. finished: False when the token limit stopped the response, None if unknown.
    Errors: TypeError when either text is not a str; nothing else, for no input.
    """
    if not isinstance(response, str) or not isinstance(gold, str):
        raise TypeError(f"response and gold must be str, not {type(response).__name__} and {type(gold).__name__}")
    answer, reason = extract(response, finished)
    reason = reason or judge(gold, answer)
    return Verdict(reason == "correct", reason, answer)


def gold_problem(gold: str) -> str | None:
    r"""None when the gold answer is understood, otherwise one line saying why not."""
    LOCAL.work = 0
    try:
        text = joined(clean((boxed(gold)[0] or gold)[:MAX_CHARS + 1]))
        return None if same_text(text, text) else "it has no value that could be compared"
    except (Unparsed, Budget, RecursionError) as why:
        return str(why)


# ------------------------------------------------------------------ command line

def scored(line: str, where: str, args: argparse.Namespace) -> tuple[str, str, bool | None]:
    """(response, gold, recorded score or None) of one line. Errors: SystemExit naming the file and line."""
    try:
        row = json.loads(line)
    except ValueError as why:
        raise SystemExit(f"{where}: not JSON: {why}; write one object per line") from None
    if not isinstance(row, dict):
        raise SystemExit(f"{where}: {line.strip()[:60]} is no object; write one per line")
    for key, types in ((args.response_key, str), (args.gold_key, (str, int, float))):
        if not isinstance(row.get(key), types):
            found = f"is {json.dumps(row[key])[:60]}" if key in row else f"is missing among {', '.join(row)[:200]}"
            raise SystemExit(f"{where}: field {key!r} {found}, not a text; --response-key and --gold-key name others")
    score = row.get(args.score_key)
    return row[args.response_key], str(row[args.gold_key]), score and str(score).lower() in ("true", "1", "1.0")


def main() -> None:
    parser = argparse.ArgumentParser(description="Score the responses of a JSON-lines file.")
    parser.add_argument("file", help="one JSON object per line")
    parser.add_argument("--response-key", default="response", help="field of the model's text (%(default)s)")
    parser.add_argument("--gold-key", default="gold", help="field of the gold answer (%(default)s)")
    parser.add_argument("--score-key", default="recorded_score", help="field of a true/false to compare (%(default)s)")
    parser.add_argument("--show-wrong", type=int, default=0, metavar="N", help="print N rows that are not correct")
    args = parser.parse_args()
    try:
        with open(args.file, encoding="utf-8") as lines:
            rows = [scored(line, f"{args.file}:{n}", args) for n, line in enumerate(lines, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as why:
        raise SystemExit(f"{args.file}: cannot be read: {why}") from None
    if not rows:
        raise SystemExit(f"{args.file}: no lines; write one object per line")
    began = time.perf_counter()
    verdicts = [verify(response, gold=gold) for response, gold, _ in rows]
    seconds = time.perf_counter() - began
    reasons = [verdict.reason for verdict in verdicts]
    counts = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    print(f"{reasons.count('correct')} of {len(rows)} correct, {seconds / len(rows) * 1e3:.2f} ms each, {counts}")
    for (_, gold, score), verdict in zip(rows, verdicts):
        if score not in (None, verdict.correct):
            print(f"differs: {verdict.reason} here, {score} there; gold {gold!r}, answer {verdict.answer!r}")
    wrong = [(gold, verdict) for (_, gold, _), verdict in zip(rows, verdicts) if not verdict.correct]
    for gold, verdict in wrong[:args.show_wrong]:
        print(f"{verdict.reason}: gold {gold!r}, answer {verdict.answer!r}")


if __name__ == "__main__":
    main()
