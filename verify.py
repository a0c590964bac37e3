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
import json
import math
import multiprocessing
import multiprocessing.connection
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
NUMBER = (r"(?<![\w.,^{/])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?[.,]?\d+(?: */ *\d+)?"
          r"(?: ?(?:\\?%|percent\b|pct\b|m²|[€£]))?")
# Answers without a box, tried in this order at the end of a finished text; the first that parses is taken.
UNBOXED = [re.compile(p, re.S | re.I) for p in (
    r"^(?=.{1,60}$)([^\n]*[\d\\][^\n]*|\w+)$",                                                # the whole text
    r"<answer>((?:(?!<answer>).)*)</answer>\W*$",
    r"####\s*([^\n]+)$",
    r".*\b(?:answers?|result)\W*(?:is|are|:|=)[\s:*]*(?!\W*$)([^\n]+)$",                      # the answer is ...
    r"\*\*([^*\n]+)\**\W*$",
    rf".*?({NUMBER})$",
    r"(?:.*[^\\])?\$(\$?[^$]*[^$\s][^$]*)\$+((?: ?(?:%|percent|pct))?)[^\d$]{0,40}$",         # $...$ and few words
    r".*\\[(\[](.+?)\\[)\]]()[^\d]{0,40}$",
    r"\(([A-J])\)\W*$",
    r"([^\n]*[\d\\=][^\n]*|^\w+)$",                                                           # the last line
    rf"(?:.*[\s$(=:])?({NUMBER})(?![\d/^])[^\n\d]*$")]                                        # its last number


def boxes(text: str) -> tuple[list[tuple[int, int, int, int]], int]:
    """(start, end, start and end of the content) of every complete box in the order they close, and the start of the
    last open one or -1. One pass with a stack: matching braces box by box is quadratic in thousands of open boxes."""
    stack, found, hanging = [], [], -1
    for m in BOX.finditer(text):
        token = m.group()
        if m["bare"]:
            found.append((*m.span(), *m.span("bare")))
        elif token == "{" or "box" in token and token[-1] == "{":
            stack.append((m.start(), m.end(), len(token) > 1))
        elif token == "}" and stack:
            start, inner, is_box = stack.pop()
            if is_box:
                found.append((start, m.end(), inner, m.start()))
        elif "box" in token:
            hanging = m.start()
    return found, max([start for start, _, is_box in stack if is_box] + [hanging])


def last_boxes(found: list[tuple[int, int, int, int]], text: str) -> str:
    """The content of the last box. Boxes joined only by a comma, "and" or "or" are one list: hedging over two
    boxes must be a list of guesses and not the luck of the last one."""
    start, parts = len(text), []
    for begin, end, left, right in reversed(found):
        if end <= start:
            if parts and (start - end > 60 or len(parts) > 60 or not BETWEEN.fullmatch(text, end, start)):
                break
            parts = [text[left:right].strip()] * (text[left:right].strip() not in parts) + parts
            start = begin
    return ", ".join(parts)


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
    found, hanging = boxes(text)
    if hanging > (found[-1][0] if found else -1):
        return None, "truncated"
    if found:
        answer = last_boxes(found, text)
        return (answer, "") if answer else (None, "no_answer")
    if finished is False:
        return None, "truncated"
    # 3. Without a box, what a finished text ends with.
    tail = text[-1500:]
    tail = tail[:CLOSING.search(tail).start()]
    # A long text that ends in mid-sentence or mid-formula was cut off, and what it ends with is a number in passing.
    if ended or len(text) < 150 or re.search(r"(?:[.!*$>]|\\[)\]]|\([A-J]\))$", text):
        for pattern in UNBOXED:    # those that begin with .* must find the last occurrence, which match() does
            m = pattern.match(tail) if pattern.pattern.startswith((".*", "(?:.*")) else pattern.search(tail)
            if m and (answer := "".join(m.groups("")).strip(" $*")) and try_parse(answer):
                return answer, ""
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
LETTER = r"\s*(\\?[a-zA-Z]+(?:_\{?\w+\}?)?)\s*\}\s*\{\s*d\s*[a-z]\s*"    # of dx/dt, up to its lower half
FRACTION = r"\\frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}"
REWRITES = [(re.compile(pattern), new) for pattern, new in (
    # 1. sub- and superscript characters, \left and \right, spacing
    (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda m: "^{" + m.group().translate(SMALL) + "}"),
    (r"[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m.group().translate(SMALL) + "}"),
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?", " "),
    (r"(?<=\d)(?:\{\s*,\s*\}|,\s*\\!|\\!\s*,|\\,|\\ )\s*(?=\d{3}(?!\d))", ""),    # 10{,}000 is explicit, 10,000 is not
    (r"(?<!\\)\\(?:[,;:!>~ \n]|(?:displaystyle|textstyle|limits|phantom)(?![a-zA-Z])|q?quad|hspace\{[^{}]*\})", " "),
    (r"(?<!\\)~|\\[()\[\]]|(?<!\\)\$", " "),
    # 2. font and text commands; matrices become one command
    (r"\\(?:mathbf|mathit|boldsymbol|bm|mathcal|vec|hat|bar|underline|boxed|fbox|angle|triangle)(?![a-zA-Z])", ""),
    (r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|operatorname\*?|hbox|rm)\s*\{([^{}]*)\}", lambda m: said(m[1])),
    (r"\\begin\s*\{(?:[pbB]|small)?matrix\}|\\begin\s*\{array\}\s*(?:\{[^{}]*\})?", r"\\mat{"),
    (r"\\end\s*\{[a-zA-Z]*\}", "}"), (r"\\mathbb\s*(?:\{\s*R\s*\}|R)", r"\\R "),
    # 3. fractions: \frac12 with braces, 0.\overline{3}, mixed numbers
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"), (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
    (r"\\frac\s*(\d)", r"\\frac{\1}"), (r"(\\frac\{[^{}]*\})\s*(\d)", r"\1{\2}"),
    (r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}", lambda m: (
        rf"\frac{{{m[1]}{m[2]}{m[3]}-{m[1] or 0}{m[2]}}}{{{'9' * len(m[3])}{'0' * len(m[2])}}}")),
    (r"\\overline(?![a-zA-Z])", ""),
    (rf"(?<![\w.^/])(\d+) ?{FRACTION}|(?<![\w.^/])(\d+) (\d+)/(\d+)", lambda m: mixed(m)),
    # 4. degrees, primes and derivatives: dx/dt, \dot{x} and x^\prime are all x'
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))", r"\\degree "),
    (r"\^\s*(?:\{\s*((?:\\prime\s*)+)\}|(\\prime))", r"\1\2"), (r"\\prime\s*", "'"),
    (r"\\(d?)dot(?:\s*\{\s*(\\?[a-zA-Z]+)\s*\}| (\\?[a-zA-Z]+))", lambda m: f"{m[2] or m[3]}'" + "'" * len(m[1])),
    (r"\\frac\s*\{\s*d\s*\^\s*\{?2\}?" + LETTER + r"\^\s*\{?2\}?\s*\}", r"\1''"),
    (r"\\frac\s*\{\s*d" + LETTER + r"\}|\bd([a-z])\s*/\s*d[a-z]\b", r"\1\2'"),
    # 5. a power behind a unit belongs to the unit; program notation; white space
    (r"(\\word\{[^{}]*)\}\s*\^\s*(?:\{(-?\d)\}|(\d))", r"\1^\2\3}"),
    (r"\bnp\.|\bmath\.", ""), (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times "), (r"\*\*", "^"),
    (r"\.\.\.+", r"\\ldots "), (r"\s+", " "))]


def mixed(m: re.Match) -> str:
    """2\\frac12 and 1 1/4 as sums; an improper fraction behind a number is a factor."""
    whole, top, bottom = [m[k] or m[k + 3] for k in (1, 2, 3)]
    return rf"({whole}+{top}/{bottom})" if len(top) <= len(bottom) < 99 and int(top) < int(bottom) else m[0]


def said(text: str) -> str:
    r"""What stands for \text{...}: a separator, plain content (numbers, lists, letters), or one word token."""
    text = text.strip(" .\\~$")
    if text in ("and", "or", "", "and,", "or,"):
        return r" \or " if "or" in text else " , " if text else " "
    return f" {text} " if re.search(r"\d|[,:\\]|^\(?[A-Z]\)?$|^[ei]$", text) else rf"\word{{{text.strip('()')}}}"


@functools.lru_cache(maxsize=1024)
def clean(text: str) -> str:
    r"""One spelling per construct, noise removed.

    >>> clean(r"$\left(\dfrac{1}{2},\; 90^{\circ}\right)$.")
    '(\\frac{1}{2}, 90\\degree )'
    """
    if r"\begin" not in text:
        text = re.sub(r"\\{2,}(?=[a-zA-Z(\[,!$%{])", r"\\", text)    # doubly escaped LaTeX
    text = text.translate(UNICODE)
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    return re.sub(r"^\{([^{}]*)\}$", r"\1", text.rstrip(" .,;*`\"\\").lstrip(" ,;*`\"")).strip()


# ------------------------------------------------------------------ parsing

# A node is a tuple: (num value ulp digits sci) (sym name) (unit name) (word text) (neg a) (+ ...) (* ...)
# (/ ^ ∪ ∩ ∖ such a b) (pm a b sign) (call name args) (rel ops sides) (seq open items close) (mat rows).
TOKEN = re.compile(
    r"\s*(?:(?P<numeral>(?:\d[\dA-F.]*|[A-F]+\d[\dA-F]*) ?_ ?(?:\{ ?\d+ ?\}|\d))"
    r"|(?P<num>(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
    r"|\\word\{(?P<word>[^{}]*)\}|(?P<cmd>\\[a-zA-Z]+|\\.)|(?P<name>[^\W\d_]+)|(?P<op>[<>!=:]=|\S))")
FUNCTIONS = set("sin cos tan cot sec csc arcsin arccos arctan arccot asin acos atan sinh cosh tanh log ln lg exp "
                "sqrt abs".split())
SYMBOLS = set("alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi varphi "
              "chi psi omega Gamma Delta Theta Lambda Pi Sigma Phi Psi Omega hbar ell odot mho pi infty emptyset R "
              "ldots max min".split())
FACTORS = set(r"( [ { | \$ \langle \lfloor \lceil \frac \binom \mat".split()) | {"\\" + t for t in FUNCTIONS | SYMBOLS}
BINARY = {op: (level, kind) for level, row in enumerate((
    r"= = == = := = \equiv = < < <= <= \le <= \leq <= \leqslant <= > > >= >= \ge >= \geq >= \geqslant >= \lt < \gt > "
    r"!= != \ne != \neq != \in ∈ \approx ~ : :", r"\cup ∪ \cap ∩ \setminus ∖ \backslash ∖", r"+ + - - \pm ± \mp ∓",
    r"* * / / \cdot * \times * \ast * \div /"), 1) for op, kind in zip(row.split()[::2], row.split()[1::2])}
RENAMED = dict(pair.split("→") for pair in (
    r"or→\or and→, infinity→\infty inf→\infty oo→\infty pi→\pi \varnothing→\emptyset \dots→\ldots \cdots→\ldots "
    r"\lor→\or \land→, \lvert→| \rvert→| \mid→| \vert→| \|→| \rbrack→] \lbrack→[ \,→, \[→[ \]→] \%→%"
).split()) | {f: "\\" + f for f in FUNCTIONS}
PAIRS = {"(": ") ]", "[": ") ]", "{": "}", r"\{": r"\}", r"\langle": r"\rangle"}
END = set(") ] } \\} | \\rangle \\rfloor \\rceil & \\\\".split()) | {""}


def tokens(text: str) -> list[tuple[str, str]]:
    """(kind, text) of each token; runs of letters become known names, words, units, or one symbol per letter."""
    out = [("start", "")]
    for m in TOKEN.finditer(text):
        kind, t, (before, last) = m.lastgroup, m[m.lastgroup], out[-1]
        if len(t) > MAX_DIGITS:
            raise Budget(f"a token of {len(t)} characters, at most {MAX_DIGITS} are read")
        if kind != "word" and t in RENAMED:
            kind, t = "cmd", RENAMED[t]
        if kind == "name" and len(t) > 1:
            after = text[m.end():m.end() + 9].lstrip()
            fresh = before in ("start", "word") or last in (",", r"\or", "(", "=")
            alone = fresh and (not after or after[0] in ",)" or after[0].isalpha())
            unit_like = (before == "num" or last in ("}", ")", "%")) and bare_unit(t, m[0][0] == " ")
            shouted = len(t) > 2 and t.isupper()    # LQSX is a word: its letters must not commute
            if unit_like or shouted or alone and (len(t) > 2 or before == "word" or after[:1].isalpha()):
                kind = "word"
            else:    # letters without a meaning as a word: leading function names, then single symbols
                parts = re.findall("|".join(sorted(FUNCTIONS | {"pi"}, key=len, reverse=True)) + "|.", t)
                out += [("cmd", "\\" + p) if len(p) > 1 else ("name", p) for p in parts]
                continue
        if kind == before == "word":
            kind, t = out.pop()[0], last + " " + t
        out.append((kind, t))
    return out[1:] + [("end", "")]


class Parser:
    """Precedence climbing over the tokens of one answer. State: position, nesting, and whether a | would close."""

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

    def deeper(self) -> None:
        """Counts one level of nesting; the enclosing expression takes it back."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Budget(f"nested deeper than {MAX_DEPTH}")

    def items(self) -> tuple:
        """Expressions between commas up to a closing token: the one expression, or a bare list of them."""
        found, kind = [], ""
        while True:
            while self.next in (",", ";", r"\or"):
                kind = "or" if self.take() == r"\or" else kind
            if self.next in END and (self.next != "|" or self.bars):
                break
            found.append(self.expression())
            if self.next not in (",", ";", r"\or", *END):
                raise Unparsed(f"unexpected {self.next}")
        if not found:
            raise Unparsed("nothing to read")
        return found[0] if len(found) == 1 else ("seq", kind, tuple(found), "")

    def expression(self, level: int = 1) -> tuple:
        """What binds at least as tightly as level: 1 relations, 2 sets, 3 sums, 4 products, 5 powers and signs."""
        entry = self.depth
        self.deeper()
        if self.next == r"\approx" and level == 1:    # "\approx 8.24": the digits already say how precise it is
            self.take()
        if self.next in ("-", "+", r"\pm", r"\mp"):
            sign, inner = BINARY[self.take()][1], self.expression(max(level, 4))
            left = inner if sign == "+" else ("neg", inner) if sign == "-" else ("pm", None, inner, sign)
        else:
            left = self.powers()
        ops, sides = [], [left]
        while True:
            own, op = BINARY.get(self.next, (0, ""))
            if own >= level:
                self.take()
                if op not in "+-*":    # sums and products grow wide, everything else grows deep
                    self.deeper()
                right = self.expression(own + 1)
                if own == 1:
                    ops.append(op)
                    sides.append(right)
                else:
                    sides[-1] = ("pm", sides[-1], right, op) if op in "±∓" else chain(op, sides[-1], right)
            elif level <= 4 and self.starts_factor():
                if sides[-1][0] == "word":
                    raise Unparsed("prose")
                sides[-1] = chain("*", sides[-1], self.powers())
            else:
                break
        self.depth = entry
        if "~" in ops:    # "2/3 \approx 0.67" claims the exact value, "x \approx 5" the 5
            first = ops.index("~", 1) if ops[0] == "~" and sides[0][0] == "sym" and "~" in ops[1:] else ops.index("~")
            first = len(ops) if first == 0 and sides[0][0] == "sym" else first
            ops, sides = ["=" if o == "~" else o for o in ops[:first]], sides[:first + 1]
        return ("rel", tuple(ops), tuple(sides)) if ops else sides[0]

    def starts_factor(self) -> bool:
        """Whether the next token is multiplied on without a sign, as in 2x, 3\\sqrt{2}, 5 cm; "2 3" is no product."""
        kind, t = self.tokens[self.i]
        if kind == "num" or t == "|":
            return not self.bars if t == "|" else self.tokens[self.i - 1][0] != "num"
        return kind in ("name", "word") or t in FACTORS

    def powers(self) -> tuple:
        """An atom with what binds to it from behind: 2^10, n!, 28%, 90\\degree."""
        left = self.atom()
        while self.next in ("^", "!", "%", r"\degree"):
            t = self.take()
            self.deeper()
            left = ("^", left, self.argument()) if t == "^" else ("call", "!", (left,)) if t == "!" else chain(
                "*", left, ("unit", "percent" if t == "%" else "degree"))
        return left

    def argument(self) -> tuple:
        """What ^ or a command takes: {...}, or one token; 2^10 takes the whole number."""
        self.deeper()    # left to the enclosing expression to undo
        if self.next in ("-", "+"):
            return ("neg", self.argument()) if self.take() == "-" else self.argument()
        return ("sym", self.take()) if self.tokens[self.i][0] == "name" else self.atom()

    def atom(self) -> tuple:
        """The smallest complete piece: a literal, a symbol, a word, a bracket or a command with its arguments."""
        kind, t = self.tokens[self.i]
        if kind == "name" or t[:1] == "\\" and t[1:] in SYMBOLS:
            return self.symbol()
        if t in PAIRS:
            return self.bracket()
        self.take()
        if kind == "num":
            return number(t)
        if kind == "numeral":
            return numeral(*re.findall(r"[\dA-F.]+", t))
        if kind == "word":
            if self.i > 1 and self.tokens[self.i - 2][1] not in (",", "(", r"\or", "=", r"\{", "{"):
                return units(t)
            if len(t.split()) > 4 or PROSE & set(t.lower().split()):
                raise Unparsed(f"prose: {t}")
            return ("word", t)
        if t in ("|", r"\lfloor", r"\lceil"):
            bars, self.bars = self.bars, t == "|"
            inner = self.expression(2)
            self.take(t.replace(r"\l", r"\r"))
            self.bars = bars
            return ("call", "abs" if t == "|" else t[2:], (inner,))
        if t in (r"\frac", r"\binom"):
            pair = self.argument(), self.argument()
            return ("/", *pair) if t == r"\frac" else ("call", "binom", pair)
        if t == r"\$":
            return ("unit", "dollar")
        if t == r"\mat":
            return self.matrix()
        if t[1:] in FUNCTIONS:
            return self.function(t[1:])
        raise Unparsed(f"cannot read {t}")

    def symbol(self) -> tuple:
        """A letter with subscript and primes. x(3), f(t), \\theta(t) are calls; n(n-1) and a(b) are products."""
        name = self.take().lstrip("\\")
        while self.next in ("_", "'"):
            start = self.i
            if self.take() == "_":
                self.argument()
            name += "".join(t for _, t in self.tokens[start:self.i] if t not in "{}")
        (kind, _), (_, after) = (self.tokens + [("", "")] * 2)[self.i + 1:self.i + 3]
        function = name in ("f", "g", "h") or after == ")" and (kind == "num" or kind == "name" and (
            name[0] in "fghFGHPQWpquyvxIT" or len(name) > 1))
        if self.next != "(" or name == "i" or not function:
            return ("sym", name)
        args = self.bracket()
        return ("call", "?" + name, args[2] if args[0] == "seq" else (args,))

    def bracket(self) -> tuple:
        """(...), [...], {...}, \\{...\\}, or an interval such as (0, 1]. The kind of bracket stays in the tree, because
        (1, 2), [1, 2] and \\{1, 2\\} are three different answers; (x) and {x} are just x."""
        opened, bars = self.take(), self.bars
        if opened == r"\{" and self.next == r"\}":
            self.take()
            return ("sym", "emptyset")
        self.bars = opened == r"\{"    # inside a set a bar separates the condition
        inner = self.items()
        if opened == r"\{" and self.next == "|":
            self.take()
            inner = ("such", inner, self.items())
        elif opened == r"\{" and inner[0] == "rel" and ":" in inner[1][:2] and inner[1][-1] != ":":
            cut = inner[1].index(":") + 1
            element = inner[2][0] if cut == 1 else ("rel", inner[1][:1], inner[2][:2])
            inner = ("such", element, ("rel", inner[1][cut:], inner[2][cut:]))
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
            if self.next == "^":
                self.take()
                power = self.argument()
            else:
                extra = self.bracket() if self.next == "[" else (self.take(), self.argument())[1]
        if self.next in PAIRS or name == "sqrt":
            arg = self.argument()
        else:
            arg = self.expression(5)
            while self.starts_factor() and self.next[1:] not in FUNCTIONS and self.tokens[self.i][0] != "word":
                arg = chain("*", arg, self.powers())
        if power == ("neg", exact(1)):
            name, power = "a" + name, None
        node = ("call", name, (arg, extra) if extra else (arg,))
        return ("^", node, power) if power else node

    def matrix(self) -> tuple:
        """The cells of \\mat{a & b \\\\ c & d}, which `clean` makes of every matrix environment."""
        self.take("{")
        rows = [[]]
        while self.next != "}":
            if self.next in ("&", r"\\"):
                rows += [[]] if self.take() == r"\\" else []
            else:
                rows[-1].append(self.expression())
        self.take("}")
        rows = [tuple(row) for row in rows if row]
        if len(set(map(len, rows))) != 1:
            raise Unparsed("a matrix with rows of unequal length")
        return ("mat", tuple(rows))


def chain(op: str, left: tuple, right: tuple) -> tuple:
    """Sums and products have any number of terms, so that a long one is wide and not deep."""
    if op == "-":
        op, right = "+", ("neg", right)
    return (*left, right) if op in "+*" and left[0] == op else (op, left, right)


def exact(x) -> tuple:
    """A number that carries no rounding."""
    return ("num", Fraction(x), None, 0, False)


def number(text: str) -> tuple:
    """A literal as (num, value, unit in the last place or None if an integer, significant digits, has an exponent)."""
    mantissa, _, power = text.lower().partition("e")
    whole, _, decimals = mantissa.partition(".")
    if len(power) > 4 or not (whole + decimals).isascii():
        raise Budget(f"the literal {text[:20]}: an exponent may have 3 digits")
    ulp = Fraction(10) ** (int(power or 0) - len(decimals))
    value = int(whole + decimals or 0) * ulp
    return ("num", value, ulp, len((whole + decimals).lstrip("0")), bool(power)) if decimals or power else exact(value)


def numeral(digits: str, base: str) -> tuple:
    """204_5 as a value times an unknown factor for base 5, so that it equals neither 204_6 nor 54."""
    try:
        value, scale = int(digits.replace(".", ""), int(base)), int(base) ** len(digits.partition(".")[2])
        return ("*", exact(Fraction(value, scale)), ("sym", "base " + base))
    except ValueError as why:
        raise Unparsed(f"{digits} in base {base[:9]}: {why}") from why


# ------------------------------------------------------------------ units

# dimension: name=size in one common unit of the dimension. A word in no row is a label: apples agree only with apples.
UNITS = {name: (dim, size) for dim, row in {
    "": "percent=.01 pct=.01 percentage=.01 degree=deg deg=deg unit=1 rad=1 radian=1 time=1",
    "L": "m=1 meter=1 metre=1 inch=.0254 inches=.0254 in=.0254 foot=.3048 feet=.3048 ft=.3048 yard=.9144 yd=.9144 "
         "mile=1609.344 mi=1609.344 pc=3.0857e16 parsec=3.0857e16 au=1.496e11 angstrom=1e-10",
    "T": "s=1 sec=1 second=1 min=60 minute=60 h=3600 hr=3600 hour=3600 day=86400 week=604800 month=2629800 "
         "year=31557600 yr=31557600",
    "M": "g=1 gram=1 gm=1 pound=453.59237 lb=453.59237 ounce=28.349523 oz=28.349523 ton=1e6",
    "$": "dollar=1 cent=.01 cents=.01", "V": "l=1 liter=1 litre=1 L=1", "E": "J=1 joule=1 erg=1e-7 cal=4.184",
    "W": "W=1 watt=1", "U": "V=1 volt=1", "A": "A=1 ampere=1", "K": "K=1 kelvin=1", "N": "N=1 newton=1 dyne=1e-5",
    "P": "Pa=1 pascal=1 bar=1e5 atm=101325", "f": "Hz=1 hertz=1", "eV": "eV=1", "mol": "mol=1 mole=1",
}.items() for name, size in (pair.split("=") for pair in row.split())}
PREFIXES = {prefix: f"e{n}" for n, both in {
    -9: "n nano", -6: "u μ micro", -3: "m milli", -2: "c centi", 3: "k kilo", 6: "M mega", 9: "G giga"
}.items() for prefix in both.split()}
PROSE = set("is are the if or but maybe probably answer than to so because then since therefore i we it".split())


@functools.lru_cache(maxsize=1024)
def unit(word: str) -> tuple[str, str]:
    """(dimension, size) of a unit word with its plural and SI prefix; a label is a dimension of its own."""
    for w in (word, word.lower(), word.removesuffix("s").lower(), word.removesuffix("s")):
        if w in UNITS:
            return UNITS[w]
        for n in (5, 4, 1):
            if w[:n] in PREFIXES and UNITS.get(w[n:], ("", ""))[1] == "1":
                return UNITS[w[n:]][0], "1" + PREFIXES[w[:n]]
    return "label " + word.lower().removesuffix("s"), "1"


def bare_unit(word: str, spaced: bool) -> bool:
    """Whether letters behind a number are its unit: 5 cm, 12 apples; but 5xy, 2mg (m times g), 3ab are products."""
    if word in ("mg", "ms", "mm", "gm", "mW", "mV", "au", "cal", "pc") and not spaced or word in ("mg", "ms", "ab"):
        return word == "mm"
    known = not unit(word)[0].startswith("label") or word in ("am", "pm", "mph")
    return known or spaced and len(word) > 3 and word.islower()


def units(text: str) -> tuple:
    """The tree of a unit phrase behind a number: "square inches", "miles per hour", "m/s", "students"."""
    words = re.findall(r"[^\W\d_]+|/|-?\d", text.replace("mph", "mile per hour"))
    if not words or len(words) > 8 or PROSE & {w.lower() for w in words}:
        raise Unparsed(f"prose behind a number: {text}")
    node, op, power = exact(1), "*", 1
    for w in words:
        if w in ("per", "/"):
            op = "/"
        elif w in ("square", "sq", "cubic"):
            power = 3 if w == "cubic" else 2
        elif (w[-1].isdigit() or w in ("squared", "cubed")) and len(node) == 3:
            node = (*node[:2], ("^", node[2], exact({"squared": 2, "cubed": 3}.get(w) or int(w))))
        elif not w[-1].isdigit() and w not in ("of", "a", "an"):
            node, op, power = (op, node, ("^", ("unit", w), exact(power)) if power > 1 else ("unit", w)), "*", 1
    return node


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
    if isinstance(a, m.matrix):
        if b not in range(1, 9) or a.rows != a.cols:
            raise Unparsed("a power of a matrix")
        return a ** int(b)
    if not a:
        if m.re(b) > 0:
            return a
        raise Unparsed("a power of 0")
    if max(m.mag(b), m.mag(m.mag(a))) > 64:
        raise Budget("a power too large")
    return m.power(a, b)


def call(name: str, x: list, point):
    """A function of values, each within the range where it costs microseconds."""
    m, a = real(), x[0]
    if name[0] == "?":    # an unknown function is any fixed generic one
        h = zlib.crc32(name.encode())
        generic = sum((h % 89 + 1 + i + (v + h % 7) * v * (i + 3) / 7 for i, v in enumerate(x)), m.mpf(0))
        return generic if isinstance(point, int) else point
    if any(isinstance(v, m.matrix) or m.isinf(v) for v in x):
        raise Unparsed(f"{name} of this")
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
        return m.log(a) / m.log(x[1] if len(x) > 1 else 10) if len(x) > 1 or name == "lg" else m.log(a)
    if m.mag(a) > (60 if name in ("exp", "sinh", "cosh", "tanh") else 900):
        raise Budget(f"{name} of a huge number")
    return abs(a) if name == "abs" else getattr(m, re.sub("^a(?:rc)?(?=sin|cos|tan|cot)", "a", name))(a)


def value(node: tuple, at: At):
    """The value of a tree: an mpmath number or matrix. Errors: Unparsed where it has none, Budget over the limits."""
    kind, m = node[0], real()
    spend(at, 200 if kind == "call" and node[1] in ("!", "binom") else 10 if kind in ("call", "^") else 1)
    if kind == "num":
        return m.mpf(node[1].numerator) / node[1].denominator
    if kind == "sym":
        known = {"pi": m.pi, "e": m.e, "i": m.j, "infty": m.inf}
        return +known[node[1]] if node[1] in known else sample(node[1], at.point)
    if kind == "unit":
        dim, size = unit(node[1])
        scale = m.pi / 180 if size == "deg" else m.mpf(Fraction(size).numerator) / Fraction(size).denominator
        return m.mpf(1) if not at.units else scale * sample("unit " + dim, at.point) if dim else scale
    if kind == "mat":
        return m.matrix([[value(cell, at) for cell in row] for row in node[1]])
    try:
        if kind == "call":    # inside a function a degree is always a degree: sin 30^\circ
            return call(node[1], [value(arg, at._replace(units=True)) for arg in node[2]], at.point)
        x = [value(arg, at) for arg in node[1:]]
        if kind in ("neg", "^", "/"):
            return -x[0] if kind == "neg" else power(*x) if kind == "^" else x[0] / x[1]
        if kind in ("+", "*"):
            return functools.reduce(add if kind == "+" else lambda a, b: a * b, x)
    except (ZeroDivisionError, TypeError, AttributeError, ValueError) as why:    # log 0, gamma poles, matrix sizes
        if isinstance(why, Budget):
            raise
        raise Unparsed(f"no value: {why}") from why
    raise Unparsed(f"{kind} has no value")


def walk(tree: tuple):
    """Every node of a tree."""
    stack = [tree]
    while stack:
        node = stack.pop()
        if node and isinstance(node[0], str):
            yield node
        stack.extend(part for part in node if isinstance(part, tuple))


def names(*trees: tuple) -> set[str]:
    """The free symbols: everything that gets a sample value."""
    return {n[1] for t in trees for n in walk(t) if n[0] == "sym"} - {"pi", "e", "i", "infty", "R", "emptyset"}


# ------------------------------------------------------------------ comparison of expressions


def measure(node: tuple) -> tuple | None:
    """The one literal that carries the precision of -2.68, 5.0 cm or 4.5 \\times 10^{33}; None for anything else."""
    parts = list(walk(node))
    inexact = [n for n in parts if n[0] == "num" and n[2] is not None]
    if len(inexact) != 1 or any(n[0] not in ("num", "unit", "neg", "*", "/", "^") for n in parts):
        return None
    return inexact[0][:4] + (inexact[0][4] or any(n[0] == "^" and n[1] == exact(10) for n in parts),)


def close(x, y, gold: tuple, answer: tuple) -> bool:
    """Whether the values x of gold and y of answer agree under the precision rule of the module docstring."""
    m = real()
    if m.isinf(x) or m.isinf(y):    # no large number is infinite enough
        return x == y
    d = add(x, -y)
    if not d or not x or not y:    # 0 has no relative error: only 0 equals it
        return not d
    off, mine, measured = abs(d / x), measure(answer), measure(gold)
    decimals = [n for n in walk(answer) if n[0] == "num" and n[2] is not None]
    if decimals and min(n[3] for n in decimals) >= 6:
        if not mine or not mine[1]:    # several rounded literals, 1.414214 + 1.732051: no single last place to go by
            return bool(off < 1e-6)
        ulp = m.mpf(mine[2].numerator) / mine[2].denominator / abs(m.mpf(mine[1].numerator) / mine[1].denominator)
        steps = x / (ulp * y)    # an integer when these digits suffice to write x exactly: then nothing was cut off
        cut_off = not measured and abs(y) < abs(x) and off < ulp and not m.almosteq(m.nint(steps), steps, 1e-9)
        if off <= ulp / 2 or off < 1e-14 or cut_off:
            return True
    if measured and measured[1] and (measured[4] or measured[3] > 1 and measured[1].denominator > 1):
        ulp = abs(measured[2] / measured[1])
        return bool(off <= m.mpf(ulp.numerator) / ulp.denominator / 2 * (1 + m.ldexp(1, -60)))
    return False


def as_units(node, letters: set[str]):
    """The tree with these symbols read as units."""
    if isinstance(node, tuple) and node[:1] == ("sym",) and node[1] in letters:
        return ("unit", node[1])
    return tuple(as_units(part, letters) for part in node) if isinstance(node, tuple) else node


def equal(gold: tuple, answer: tuple, work: list) -> bool:
    """Equality by value. Units count when both sides have them, and 28% is also 0.28, 90 degrees also pi/2."""
    # Sin 30 degrees aside, a unit that only one side writes is ignored: cm after a gold without cm. Percent and degree
    # have plain sizes, so for them the other side may also have converted: 28% and 0.28. If both sides have units they
    # must agree in dimension and size, which the sample value of each dimension sees to.
    has = [any(n[0] == "unit" for n in walk(t)) for t in (gold, answer)]
    if has == [True, False]:    # 9.8 m/s^2 where the gold says \text{m/s}^2: the letters are units
        answer = as_units(answer, set(UNITS) - names(gold))
        has[1] = any(n[0] == "unit" for n in walk(answer))
    elif not any(has) and answer[0] == "*" and not names(gold, *answer[1:-1]):    # 5 m where the gold says 5
        answer = (*answer[:-1], as_units(answer[-1], {u for u in UNITS if len(u) == 1}))
        has[1] = any(n[0] == "unit" for n in walk(answer))
    for with_units in [True] if all(has) else [False, True] if any(has) else [False]:
        agreed = 0
        for point in range(6 if names(gold, answer) or with_units else 1):
            try:
                x, y = (value(t, At(point, with_units, work)) for t in (gold, answer))
            except (Unparsed, Absorbed) as why:    # e^x + 1 has no usable value at the large points
                if isinstance(why, Absorbed) and not agreed:
                    raise
                continue
            m = real()
            cells = [(x, y)]    # a matrix is compared cell by cell
            if isinstance(x, m.matrix) or isinstance(y, m.matrix):
                fits = isinstance(x, m.matrix) and isinstance(y, m.matrix) and (x.rows, x.cols) == (y.rows, y.cols)
                cells = list(zip(x, y)) if fits else [(m.mpf(0), m.mpf(1))]
            # sqrt(1/n) and 1/sqrt(n) differ only where they leave the reals, which is not their domain
            elif agreed and (m.im(x) or m.im(y)):
                continue
            if not all(close(p, q, gold, answer) for p, q in cells):
                agreed = 0
                break
            agreed += 1
        if agreed:    # at least one point where both have a value: 1/0 equals nothing
            return True
    return False


def proportional(f: tuple, g: tuple, work: list) -> bool:
    """Whether f = c g with one constant c other than 0: the equations f = 0 and g = 0 are the same."""
    ratios = []
    for point in range(6):
        try:
            x, y = value(f, At(point, True, work)), value(g, At(point, True, work))
        except (Unparsed, Absorbed):
            continue
        if isinstance(x, real().matrix) or isinstance(y, real().matrix) or not x or not y:
            return False
        ratios.append(x / y)
    return len(ratios) > 1 and names(f) == names(g) != set() and not any(add(r, -ratios[0]) for r in ratios)


# ------------------------------------------------------------------ comparison of sets of reals


def compares(node: tuple) -> bool:
    """Whether a node is an inequality or a list of nothing but inequalities."""
    if node[0] == "seq":
        return node[1] in ("", "or") and all(map(compares, node[2]))
    return node[0] == "rel" and not set(node[1]) & set("=∈:")


def borders(node: tuple, work: list) -> list:
    """The finite numbers at which membership in the set can change: ends, elements and roots of linear inequalities."""
    out, m = [], real()
    for n in walk(node):
        if n[0] == "seq" and n[1] in ("(", "[", r"\{"):
            if names(n):
                raise Unparsed("an end that is not a number")
            out += [value(end, At(0, False, work)) for end in n[2]]
        elif n[0] == "rel" and n[1] != ("∈",):
            for left, right in zip(n[2], n[2][1:]):
                for xs in ([m.mpf(x) / 10 for x in (1, 12, 10137)], [m.mpf(x) / -10 for x in (1, 12, 10093)]):
                    ys = [value(left, At(x, False, work)) - value(right, At(x, False, work)) for x in xs]
                    if any(map(m.isinf, ys)):
                        continue
                    slope = (ys[1] - ys[0]) / (xs[1] - xs[0])
                    if not add(ys[1], -ys[0]) or add(ys[2] - ys[0], slope * (xs[0] - xs[2])):
                        raise Unparsed("an inequality that is not linear on either side of 0")
                    out += [m.mpf(0), xs[0] - ys[0] / slope]
    if any(m.im(x) for x in out):
        raise Unparsed("a complex end")
    return [x for x in out if not m.isinf(x)]


def inside(node: tuple, x, work: list) -> bool:
    """Whether the number x belongs to the set."""
    kind = node[0]
    if kind == "rel" and node[1] == ("∈",):
        return inside(node[2][1], x, work)
    if kind == "rel":
        sides = [value(side, At(x, False, work)) for side in node[2]]
        gaps = [a - b if real().isinf(a) or real().isinf(b) else add(a, -b) for a, b in zip(sides, sides[1:])]
        return all({"<": gap < 0, "<=": gap <= 0, ">": gap > 0, ">=": gap >= 0, "!=": gap != 0}[op]
                   for op, gap in zip(node[1], gaps))
    if kind == "such":    # {2x | x > 1} and {x in Z | x > 1} are other sets than their condition
        if node[1][0] != "sym" and node[1] != ("rel", ("∈",), (node[1][2][0], ("sym", "R"))):
            raise Unparsed("not a set of numbers")
        return inside(node[2], x, work)
    if kind in "∪∩∖":
        a, b = (inside(n, x, work) for n in node[1:])
        return a or b if kind == "∪" else a and b if kind == "∩" else a and not b
    if kind == "seq" and compares(node):
        return (any if node[1] == "or" else all)([inside(n, x, work) for n in node[2]])
    if kind == "seq" and node[1]:
        ends = [value(n, At(0, False, work)) for n in node[2]]
        gaps = [x - e if real().isinf(e) else add(x, -e) for e in ends]
        if node[1] == r"\{":
            return not all(gaps)
        if len(ends) == 2 and ends[0] <= ends[1]:
            above = gaps[0] >= 0 if node[1] == "[" else gaps[0] > 0
            return above and (gaps[1] <= 0 if node[3] == "]" else gaps[1] < 0)
    if node in (("sym", "R"), ("sym", "emptyset")) or kind == "word" and "real" in node[1]:
        return node[1] != "emptyset"
    raise Unparsed("not a set of numbers")


def same_set(gold: tuple, answer: tuple, work: list) -> bool:
    """Whether two sets of reals agree: at every border of either, between neighbours and beyond the ends."""
    try:
        unknown = [{n[1] for n in walk(t) if n[0] == "call" and n[1][0] == "?"} or names(t) for t in (gold, answer)]
        if max(map(len, unknown)) > 1:
            return False
        edges = sorted(borders(gold, work) + borders(answer, work)) or [real().mpf(0)]
        grid = [edges[0] - 1, *edges, edges[-1] + 1, *(add(a, b) / 2 for a, b in zip(edges, edges[1:]) if add(a, -b))]
        rows = [[inside(t, x, work) for x in grid] for t in (gold, answer)]
        for k, t in enumerate((gold, answer)):    # "x < 1, x > 3" cannot mean both at once
            if t[0] == "seq" and compares(t) and not any(rows[k]):
                rows[k] = [any(inside(n, x, work) for n in t[2]) for x in grid]
        return rows[0] == rows[1]
    except Unparsed:
        return False


# ------------------------------------------------------------------ comparison of answers


def variants(node: tuple) -> list[tuple]:
    r"""A tree with \pm as its readings: both signs of each, coupled when a \mp shows that they belong together."""
    signs = [n for n in walk(node) if n[0] == "pm"]
    linked = any(n[3] == "∓" for n in signs)
    if len(signs) > 4:
        raise Budget(r"more than 4 signs \pm")

    def pick(n, plus):
        if not isinstance(n, tuple) or n[:1] != ("pm",):
            return tuple(pick(part, plus) for part in n) if isinstance(n, tuple) else n
        positive = plus >> (0 if linked else [s is n for s in signs].index(True)) & 1 != (n[3] == "∓")
        term = pick(n[2], plus)
        term = term if positive else ("neg", term)
        return term if n[1] is None else ("+", pick(n[1], plus), term)
    return [pick(node, plus) for plus in range(2 ** (min(1, len(signs)) if linked else len(signs)))]


def named(node: tuple) -> bool:
    """Whether a left side only names the answer: x, f(x), (x, y), AB, |AB|, V_1/V_2; 11a + c and 2x do not."""
    kinds = {n[0] for n in walk(node)}
    return node[0] == "word" or node[0] == "call" and node[1][0] == "?" or (
        names(node) != set() and kinds <= {"sym", "seq", "call", "*", "/"})


def unnamed(node: tuple) -> tuple:
    r"""x = 3, x \in S and x = 1 + 2 = 3 without the name, 1:2 as a fraction."""
    while node[0] == "rel" and (node[1] == ("∈",) or "=" in node[1] and set(node[1]) <= set("=:") and (
            named(node[2][0]) or len(node[1]) > 1 or not names(node[2][0]) and node[2][0][0] != "num")):
        cut = len(node[1]) - node[1][::-1].index("=") if "=" in node[1] else 1
        node = ("rel", node[1][cut:], node[2][cut:]) if node[1][cut:] else node[2][-1]
    return ("/", *node[2]) if node[0] == "rel" and node[1] == (":",) else node


def members(node: tuple) -> list[tuple] | None:
    r"""The elements of a bare list, of a set in braces or of what \pm stands for; None for a single answer."""
    if node[0] == "rel" and node[1] == ("=",) and named(node[2][0]):
        node = node[2][1] if members(node[2][1]) else node
    if node[0] == "seq" and node[1] in ("", "or", r"\{"):
        return [v for item in node[2] for v in (members(item) or [item])]
    found = variants(node)
    return found if len(found) > 1 else None


def is_set(node: tuple) -> bool:
    """Whether a node can only be a set of numbers; (1, 2) and [1, 2] can also be a pair."""
    return node[0] in ("∪", "∩", "∖", "such") or node in (("sym", "R"), ("sym", "emptyset")) or (
        node[0] == "word" and "real" in node[1])


def same(gold: tuple, answer: tuple, work: list) -> bool:
    """Whether two trees are the same answer: containers element by element, everything else by value."""
    spend(At(0, False, work), 1)
    if compares(gold) or compares(answer) or is_set(unnamed(gold)) or is_set(unnamed(answer)):
        return same_set(gold, answer, work) or gold[0] == answer[0] == "rel" and same_chain(gold, answer, work)
    # Lists and sets: as many different elements on both sides, each with a partner of its own. A subset of the
    # solutions, and a list of guesses around the right one, both fail here.
    g, a = (m and list(dict.fromkeys(m)) for m in (members(gold), members(answer)))
    if g and a:
        left = list(a)
        for item in g if len(g) == len(left) else ():
            match = next((i for i, other in enumerate(left) if same(item, other, work)), None)
            if match is None:
                return False
            del left[match]
        return not left
    if gold[0] == answer[0] == "rel" and not g and not a and ("=" in gold[1]) == ("=" in answer[1]):
        return same_chain(gold, answer, work)
    x, y = unnamed(gold), unnamed(answer)
    if g or a:
        pair, other = g or a, y if g else x
        if all(n[0] == "rel" and n[2][0][0] == "sym" for n in pair):    # y = 2, x = 1 for the pair (1, 2)
            pair = sorted(pair, key=lambda n: n[2][0])
        pair = [unnamed(item) for item in pair]
        if other[0] == "seq" and other[1] == "(" and (x if g else y)[1] != r"\{":    # 1, 3 for the pair (1, 3)
            other = other[2]
        elif len(pair) == 1:
            other = (other,)
        else:
            return False
        return len(pair) == len(other) and all(same(*((p, o) if g else (o, p)), work) for p, o in zip(pair, other))
    # Tuples and intervals: the same brackets and the same order.
    if x[0] == "seq" == y[0]:
        return x[1::2] == y[1::2] and len(x[2]) == len(y[2]) and all(same(p, q, work) for p, q in zip(x[2], y[2]))
    if {x[0], y[0]} in ({"mat"}, {"mat", "seq"}):    # a column is also a tuple
        rows = [[(c,) for c in t[2]] if t[0] == "seq" and t[1] == "(" else list(t[1]) for t in (x, y)]
        return [len(r) for r in rows[0]] == [len(r) for r in rows[1]] and all(
            same(p, q, work) for r, s in zip(*rows) for p, q in zip(r, s))
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
        if len(g) == len(a) == 2 and proportional(chain("-", *g), chain("-", *a), work):
            return True
    if set(ops + other) == {":"}:
        return len(g) == len(a) and all(same(("/", g[0], p), ("/", a[0], q), work) for p, q in zip(g[1:], a[1:]))
    back = tuple(op.translate(str.maketrans("<>", "><")) for op in reversed(other))
    turned = back, a[::-1]
    return any(ops == signs and all(same(p, q, work) for p, q in zip(g, sides))
               for signs, sides in ((other, a), turned))


# ------------------------------------------------------------------ verdicts

RATIONAL = re.compile(r"(-?)(?:(\d{1,999})(?:\.0*)?|\\frac\{(-?\d{1,999})\}\{(\d{1,999})\}|(\d{1,999})/(\d{1,999}))")
CHOICE = re.compile(r"\(?([A-J])(?:\)[.:]?|[.:])\s*(\S.*)", re.S)
CLOCK = re.compile(r"(\d{1,2})(?::([0-5]\d))?(?::([0-5]\d))?(?:([ap])\.?(?:m\.?)?)?\.*", re.I)
THOUSANDS = re.compile(r"(?<![\d.,_^])\d{1,3}(?:,\d{3}(?!\d))+(?!,?\s*\d)|(?<![\d.,_^])\d{1,3}(?: \d{3}(?!\d))+")


def build(text: str) -> tuple:
    """The tree of a cleaned text. Errors: Unparsed when it is not in the grammar, Budget when over the limits."""
    if len(text) > MAX_CHARS:
        raise Budget(f"{len(text)} characters, at most {MAX_CHARS} are read")
    parser = Parser(text)
    tree = parser.items()
    if parser.next:
        raise Unparsed(f"unexpected {parser.next}")
    return tree


remembered = functools.lru_cache(maxsize=8192)(build)


def parse(text: str) -> tuple:
    """`build`, remembered for the short texts that golds and most answers are: long ones would fill the memory."""
    return remembered(text) if len(text) <= 200 else build(text)


def try_parse(text: str) -> tuple | None:
    """The tree of a text that may be no answer at all, None then."""
    try:
        return parse(joined(clean(text)))
    except (Unparsed, Budget):
        return None


def joined(text: str) -> str:
    """1,234 and 1 234 as 1234, except inside brackets, where a comma separates."""
    if re.search(r"[(\[]|\\\{", text):    # (100,200) is a pair
        return text
    return THOUSANDS.sub(lambda m: m[0].replace(",", "").replace(" ", ""), text)


def rational(text: str) -> Fraction | None:
    """An integer or a plain fraction without parsing: two thirds of real verdicts end here or at equal strings."""
    m = RATIONAL.fullmatch(text)
    if not m or m[2] is None and not int(m[4] or m[6]):
        return None
    return (-1 if m[1] else 1) * Fraction(int(m[2] or m[3] or m[5]), int(m[4] or m[6] or 1))


def clock(text: str) -> tuple | None:
    """(hour, minute, second, "a", "p" or None) of a time of day; 3:10 may be a ratio and is left to the parser."""
    m = CLOCK.fullmatch(re.sub(r"\\word\{([^{}]*)\}|[{} ]", r"\1", text))
    return (int(m[1]), int(m[2] or 0), int(m[3] or 0), m[4] and m[4].lower()) if m and (m[4] or m[3] or m[2]) else None


@functools.lru_cache(maxsize=8192)
def gold_text(gold: str) -> str:
    """The cleaned gold; a whole solution given as gold is reduced to its box."""
    found = boxes(gold)[0]
    gold = last_boxes(found, gold) if found else gold
    return clean(gold) if len(gold) <= MAX_CHARS else gold


def decide(gold: str, answer: str) -> str:
    """The reason of the verdict on an extracted answer."""
    g = gold_text(gold)
    if max(len(answer), len(g)) > MAX_CHARS:
        return "correct" if answer.strip() == gold.strip() else "budget"
    a = clean(answer)
    # Equal strings, then two rationals, then two times of day, and only then trees. "2 3" is not 23.
    if re.sub(r"(?<!\d) | (?!\d)", "", g) == re.sub(r"(?<!\d) | (?!\d)", "", a):
        return "correct" if a else "no_answer"
    x, y = rational(joined(g)), rational(joined(a))
    if x is not None and y is not None and (x == y or "," not in g + a):
        return "correct" if x == y else "wrong"
    if clock(g) and clock(a) and (clock(g)[3] or clock(a)[3]):
        return "correct" if clock(g)[:3] == clock(a)[:3] and len({clock(g)[3], clock(a)[3], None}) < 3 else "wrong"
    # A comma separates thousands or list items, or is the decimal comma of an answer; "(C) 12" is a choice with its
    # text. Each reading is compared in turn.
    pairs = [(joined(g), joined(a))] + [(g, a)] * ((joined(g), joined(a)) != (g, a))
    if m := CHOICE.fullmatch(a):
        pairs = [(g.strip("()"), m[1])] if re.fullmatch(r"\(?[A-J]\)?", g) else pairs + [(joined(g), joined(m[2]))]
    elif re.fullmatch(r"-?\d+,\d+", a) and re.fullmatch(r"-?\d*\.\d+", g):
        pairs.append((g, a.replace(",", ".")))
    reason = "unparsed"    # unless some reading of the answer and of the gold could be compared
    for p, q in pairs:
        try:
            if compare(parse(p), parse(q)):
                return "correct"
            reason = "wrong"
        except Unparsed:
            continue
        except (Budget, RecursionError):    # the latter only where the caller has used up the stack
            return "budget"
    return reason


def compare(gold: tuple, answer: tuple) -> bool:
    """`same` in the first precision that loses no term of a sum."""
    m = real()
    for m.prec in PRECISIONS[:-1]:
        try:
            return same(gold, answer, [0])
        except Absorbed:
            continue
    try:
        m.prec = PRECISIONS[-1]
        return same(gold, answer, [MAX_WORK - 1000])
    finally:
        m.prec = PRECISIONS[0]


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


def serve(pipe) -> None:
    """One worker: answers rows until the parent closes the pipe or sends None."""
    while (row := pipe.recv()) is not None:
        pipe.send(verify(row[0], gold=row[1], finished=row[2]))


def verify_many(responses: list[str], golds: list[str], *, workers: int = 0, finished: list | None = None,
                stuck_after: float = 30.0) -> list[Verdict]:
    """The verdicts in order, from this process (workers=0) or from that many child processes.

    A child that dies, or that answers nothing for stuck_after seconds, is killed and replaced, and its row alone
    becomes "budget". This is a net below `verify`, which needs no clock. Errors: ValueError when the lengths differ.
    """
    finished = [None] * len(responses) if finished is None else list(finished)
    if not len(responses) == len(golds) == len(finished):
        lengths = f"{len(responses)} responses, {len(golds)} golds, {len(finished)} finished flags"
        raise ValueError(f"lengths differ: {lengths}; give one gold and one flag per response")
    rows = list(zip(responses, golds, finished))
    if not workers or not rows:
        return [verify(r, gold=g, finished=f) for r, g, f in rows]
    out, todo, busy, idle = [Verdict(False, "budget", None)] * len(rows), list(range(len(rows)))[::-1], {}, []
    try:
        while todo or busy:
            while todo and len(busy) < workers:
                pipe, child = idle.pop() if idle else start_worker()
                try:
                    pipe.send(rows[todo[-1]])
                except ConnectionError:    # it died while idle; the row goes to the next worker
                    child.join()
                    continue
                busy[pipe] = (child, todo.pop(), time.monotonic() + stuck_after)
            first = min(deadline for _, _, deadline in busy.values())
            ready = multiprocessing.connection.wait(list(busy), max(0.0, first - time.monotonic()))
            for pipe in ready or [p for p, (_, _, deadline) in busy.items() if deadline <= time.monotonic()]:
                child, row, _ = busy.pop(pipe)
                try:
                    if pipe not in ready:
                        raise EOFError("stuck")
                    out[row] = pipe.recv()
                    idle.append((pipe, child))
                except (EOFError, ConnectionError):
                    child.kill()
                    child.join()
        return out
    finally:
        for child in [c for _, c in idle] + [c for c, _, _ in busy.values()]:
            child.kill()
            child.join()


def start_worker():
    """A pipe to a new child process that runs `serve`, and the child. Forked where possible: it needs no import."""
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    ours, theirs = context.Pipe()
    child = context.Process(target=serve, args=(theirs,), daemon=True)
    child.start()
    theirs.close()
    return ours, child


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
