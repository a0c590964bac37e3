"""verify.py: decide whether a model's answer to a math problem equals the gold answer.

    extract the answer -> clean the LaTeX -> parse it -> compare it with the gold answer

How it differs from the usual checkers:
1. A fixed parser builds the tree and nothing is ever evaluated as code. Equality is decided by value:
   exact fractions where possible, otherwise 400-bit arithmetic at fixed points, relative error only.
2. Work is counted, never timed: length, depth, digits, exponents and evaluations have limits, so there
   are no signals, threads or clocks in `verify`, and the same input always gives the same verdict.
3. It fails closed and says why: `Verdict.reason` is correct, wrong, no_answer, unparsed, budget or
   truncated. A gold answer that cannot be understood rewards only an equal string (`gold_problem`).
4. Precision: an exact gold needs an exact answer or one correctly rounded to >= 6 significant digits;
   a gold with a decimal point or a power of ten (2.68, 4.5e33) accepts what rounds to its own digits.

    python verify.py FILE.jsonl --response-key response --gold-key gold --score-key recorded_score
    python verify.py FILE.jsonl --show-wrong 20
    python verify.py FILE.jsonl --against math-verify

>>> verify(r"So it is $\\boxed{\\frac{2}{4}}$.", gold="0.5")
Verdict(correct=True, reason='correct', answer='\\\\frac{2}{4}')
"""

import argparse
import collections
import functools
import json
import math
import re
import threading
import time
import zlib
from fractions import Fraction
from typing import NamedTuple

MAX_CHARS = 4000         # longest answer that is parsed; longer ones can only be equal as strings
MAX_DEPTH = 40           # nesting of the parse tree
MAX_DIGITS = 1500        # digits of one literal
MAX_BITS = 100_000       # size of an exact fraction; beyond it 400-bit floats take over
MAX_WORK = 20_000        # tree nodes evaluated per verdict
PREC = 400               # bits of the inexact arithmetic
SAME_BITS = 330          # two inexact values are equal when they agree to this many bits


class Verdict(NamedTuple):
    correct: bool
    reason: str              # correct | wrong | no_answer | unparsed | budget | truncated
    answer: str | None       # the extracted answer as written, None when there is none


class Unparsed(ValueError):
    """The text is not an answer this grammar knows."""


class Budget(ValueError):
    """Deciding would cost more than the limits above allow."""


class Undefined(ValueError):
    """The expression has no value at this point (0/0, log 0)."""


# ---------------------------------------------------------------- 1. extraction

TURN_END = re.compile(r"<\|(?:im_end|im_start|endoftext|eot_id|end_of_text)\|>|</s>|<end_of_turn>|<｜end▁of▁sentence｜>")
BOX = re.compile(r"\\+f?boxed(?![a-zA-Z])[ \t]*(?:(\{)|([-+]?\w[\w/.]*))?|\\\\|\\[{}]|[{}]")
GAP = re.compile(r"[\s$,;:.&()\[\]\\{}]|quad|text|mbox|(?<![a-z])(?:and|or)(?![a-z])|[A-Za-z]\w?\s*=")
ANSWER_IS = re.compile(r"(?:answer|answers|result)\s*(?:\**\s*(?:is|are|:|=)\s*:?)+\s*\**", re.I)
CLOSING = re.compile(r"[.\s]*(?:I hope (?:it|this) is correct\.?)?[\s.*]*$")
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)?(?:[.,]?\d+)(?:\s*/\s*\d+)?")
MATH = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)


def boxes(text: str) -> tuple[list[tuple[int, int, str]], int]:
    """All complete boxes as (start, end, content) and the start of the last unterminated one (-1 if none).
    One pass with a stack, because matching braces per box is quadratic on thousands of open boxes."""
    stack, found = [], []
    for m in BOX.finditer(text):
        if m.group(0).endswith("{") and not m.group(0).startswith("\\{"):
            stack.append((m.start(), m.end(), m.group(1) is not None))
        elif m.group(2):
            found.append((m.start(), m.end(), m.group(2).rstrip(".")))
        elif m.group(0) == "}" and stack:
            start, inner, is_box = stack.pop()
            if is_box:
                found.append((start, m.end(), text[inner:m.start()]))
        elif "boxed" in m.group(0):
            stack.append((m.start(), m.end(), True))
    return found, max((s for s, _, is_box in stack if is_box), default=-1)


def last_answer_boxes(found: list[tuple[int, int, str]], text: str) -> str:
    """The content of the last box; boxes joined only by "and", "or" or a comma are one list, so that
    hedging over two boxes is a list of guesses and not a lucky last one."""
    start, _, content = found[-1]
    parts = [content.strip()]
    for s, e, c in reversed(found[:-1]):
        if e > start:
            continue
        if start - e > 60 or GAP.sub("", text[e:start]):
            break
        if c.strip() not in parts:
            parts.insert(0, c.strip())
        start = s
    return ", ".join(parts)


def extract(response: str, finished: bool | None = None) -> tuple[str | None, str]:
    """(answer, "") or (None, reason). `finished=False` (token limit hit) accepts only a complete box;
    None judges from the text, where unboxed answers must stand at the very end.

    >>> extract("thus it is **73**.")
    ('73', '')
    """
    text = TURN_END.split(response, maxsplit=1)[0]
    ended = finished or len(text) < len(response)
    cut = text.rfind("</think>")
    if text.rfind("<think>") > cut:
        return None, "truncated"
    text = text[cut + 8:] if cut >= 0 else text
    found, open_box = boxes(text)
    if open_box >= 0 and (not found or open_box > found[-1][0]):
        return None, "truncated"
    if found:
        answer = last_answer_boxes(found, text)
        return (answer, "") if answer.strip() else (None, "no_answer")
    if finished is False:
        return None, "truncated"
    answer = unboxed(text.strip(), bool(ended))
    return (answer, "") if answer else (None, "no_answer")


def unboxed(text: str, ended: bool) -> str | None:
    """The answer of a finished text without a box: a marked form first, then whatever ends the text."""
    tag = text.rfind("</answer>")
    if tag >= 0 and (start := text.rfind("<answer>", 0, tag)) >= 0:
        return text[start + 8:tag].strip()
    if (mark := text.rfind("####")) >= 0:
        return text[mark + 4:].strip().split("\n")[0].strip() or None
    tail = text[-1500:]
    tail = tail[:CLOSING.search(tail).start()] if CLOSING.search(tail) else tail
    done = ended or text[-1:] in ".!)]}*$" or len(text) < 150
    if not done:
        return None
    said = None
    for said in ANSWER_IS.finditer(tail):
        pass
    line = tail[said.end():] if said else tail.rsplit("\n", 1)[-1]
    if said and "\n\n" in line.strip():
        said, line = None, tail.rsplit("\n", 1)[-1]
    line = line.strip().strip('"')
    if m := re.search(r"\*\*([^*]{1,200})(?:\*\*)?[\s.]*$", line):
        return m.group(1).strip()
    if (maths := [m for m in MATH.finditer(tail)]) and len(tail[maths[-1].end():].strip(" \n.,;!*\"")) < 25:
        inner = next(x for x in maths[-1].groups() if x)
        rest = tail[maths[-1].end():].strip(" \n.,;!*\"")
        if maths[-1].end() >= len(tail) - len(line):
            return inner.strip() + (" " + rest if rest in ("%", "percent", "pct") else "")
    if said or len(line) < 60 and try_parse(line) is not None:
        if try_parse(line) is not None or not NUMBER.search(line):
            return line.rstrip(".") if len(line) < 200 else None
    if m := re.search(r"\(([A-J])\)[\s.]*$", line):
        return m.group(1)
    sentence = re.split(r"(?<=[a-z)])\. |\n", line)[-1]
    numbers = list(NUMBER.finditer(sentence))
    return sentence[numbers[-1].start():].strip(" .*") if numbers and len(sentence) < 300 else None


# ---------------------------------------------------------------- 2. cleaning

SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
SUBSCRIPT = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
UNICODE = str.maketrans({
    "−": "-", "–": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "∙": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "⁄": "/",
    "√": r"\sqrt ", "π": r"\pi ", "∞": r"\infty ", "°": r"\degree ", "º": r"\degree ", "≤": r"\le ", "≥": r"\ge ",
    "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "ℝ": r"\R ", "∅": r"\emptyset ", "≈": r"\approx ", "½": r"\frac12 ", "¼": r"\frac14 ", "¾": r"\frac34 ",
    "⅓": r"\frac13 ", "⅔": r"\frac23 ", "′": "'", "’": "'", "，": ",", "（": "(", "）": ")", "：": ":", "⟨": r"\langle ",
    "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "…": r"\ldots ",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "θ": r"\theta ", "λ": r"\lambda ", "μ": r"\mu ", "ω": r"\omega ",
    "€": r"\word{euro} ", "£": r"\word{pound} ", "\u200b": "", "\ufeff": "", "\u2061": "", "\x00": "?"})
SPACES = re.compile(r"(?<!\\)\\(?:[,;:!>~ \n]|quad\b|qquad\b|enspace\b|thinspace\b|displaystyle\b|textstyle\b|limits\b|hspace\{[^{}]*\}"
                    r"|phantom\{[^{}]*\})|(?<!\\)~")
SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?|middle)(?![a-zA-Z])\s*\.?(?![0-9])")
STYLES = re.compile(r"\\(?:mathbf|mathit|boldsymbol|bm|mathcal|mathsf|vec|hat|bar|underline|f?boxed|ensuremath)\s*\{([^{}]*)\}")
TEXTS = re.compile(r"\\(?:text(?:bf|it|rm|sf|normal)?|mbox|mathrm|operatorname\*?|hbox|rm)\s*\{([^{}]*)\}")
REWRITES = [(re.compile(p), r) for p, r in [
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"), (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
    (r"\\(?:\(|\)|\[|\])|(?<!\\)\$", " "), (r"\\mathbb\s*\{?\s*R\s*\}?", r"\\R "),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))", r"\\degree "), (r"\^\s*\{?\s*((?:\\prime\s*)+)\}?", r"\1"),
    (r"\\prime\s*", "'"), (r"\\ddot\s*(\{[^{}]*\}|\\?[a-zA-Z]+)", r"{\1}''"), (r"\\dot\s*(\{[^{}]*\}|\\?[a-zA-Z]+)", r"{\1}'"),
    (r"\\frac\s*\{\s*d\s*\^\s*\{?2\}?\s*(\\?[a-zA-Z]+(?:_\{?\w+\}?)?)\s*\}\s*\{\s*d\s*[a-z]\s*\^\s*\{?2\}?\s*\}", r"\1''"),
    (r"\\frac\s*\{\s*d\s*(\\?[a-zA-Z]+(?:_\{?\w+\}?)?)\s*\}\s*\{\s*d\s*[a-z]\s*\}|\bd([a-z])\s*/\s*d[a-z]\b", r"\1\2'"),
    (r"\bnp\.|\bmath\.", ""), (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times "), (r"\*\*", "^")]]
EXPLICIT_THOUSANDS = re.compile(r"(?<=\d)(?:\{\s*,\s*\}|,\s*\\!|\\!\s*,|\\,|\\ )\s*(?=\d{3}(?!\d))")
THOUSANDS = re.compile(r"(?<![\d.,_^])(\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+)(?![\d,]|\s*,\s*\d)")
CLOCK = re.compile(r"^(\d{1,2})(?::([0-5]\d))?(?::([0-5]\d))?\s*(?:([ap])\s*\.?\s*(?:m\s*)?\.*)?$", re.I)


def text_content(m: re.Match) -> str:
    r"""What stands for a \text{...}: a separator, plain content (numbers, lists, letters), or one word token."""
    t = m.group(1).strip(" .\\~$")
    if t in ("and", "or", ",", "and,"):
        return " , " if t != "or" else r" \or "
    if not t or re.search(r"\d|[,:\\]|^\(?[A-Z]\)?$|^[ei]$", t):
        return f" {t} "
    return rf"\word{{{t.strip('()')}}}"


@functools.lru_cache(maxsize=8192)
def clean(text: str) -> str:
    """LaTeX and unicode noise removed; what is left uses one spelling per construct."""
    s = re.sub(r"[\ue000-\uf8ff]", "?", text.strip())
    s = re.sub(r"\\{2,}(?=[a-zA-Z(\[,!$%])", r"\\", s) if r"\begin" not in s else s
    s = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda m: "^{" + m.group(0).translate(SUPERSCRIPT) + "}", s)
    s = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m.group(0).translate(SUBSCRIPT) + "}", s).translate(UNICODE)
    s = SIZES.sub(" ", s)
    s = EXPLICIT_THOUSANDS.sub("", s)
    s = SPACES.sub(" ", s)
    for _ in range(3):
        s = STYLES.sub(r"{\1}", s)
        s = TEXTS.sub(text_content, s)
    for pattern, new in REWRITES:
        s = pattern.sub(new, s)
    s = re.sub(r"\s+", " ", s).rstrip(" .,;!*`\"").lstrip(" ,;*`\"")
    if s.endswith(("\\", "/")):
        s = s[:-1]
    return s


# ---------------------------------------------------------------- 3. parsing

# A tree is a tuple (kind, ...): num value ulp digits sci | sym name | unit name | word text | + - * / ^ a b | neg a
# pm a b sign | call name args | seq open items close | rel ops sides | cup cap minus a b | mat rows | base digits b
TOKEN = re.compile(r"\s*(?:(?P<num>(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)|\\word\{(?P<word>[^{}]*)\}"
                   r"|(?P<cmd>\\[a-zA-Z]+|\\\\|\\.)|(?P<name>[a-zA-Z]+)|(?P<op><=|>=|!=|==|=>|:=|\S))")
FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "asin", "acos", "atan", "sinh", "cosh",
             "tanh", "log", "ln", "lg", "exp", "sqrt", "max", "min", "gcd", "lcm", "det", "arccot", "Re", "Im", "abs"}
GREEK = set("alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
            "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega hbar ell odot mho".split())
RELATIONS = {"=": "=", "==": "=", ":=": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", r"\le": "<=", r"\leq": "<=",
             r"\ge": ">=", r"\geq": ">=", r"\leqslant": "<=", r"\geqslant": ">=", r"\lt": "<", r"\gt": ">", r"\ne": "!=",
             r"\neq": "!=", r"\in": "in", r"\approx": "~", r"\equiv": "=", ":": ":", r"\colon": ":"}
PLUS = {"+", "-", r"\pm", r"\mp"}
TIMES = {"*": "*", "/": "/", r"\cdot": "*", r"\times": "*", r"\div": "/", r"\ast": "*"}
SETS = {r"\cup": "cup", r"\cap": "cap", r"\setminus": "minus", r"\backslash": "minus"}
CLOSERS = {"(": ")]", "[": ")]", r"\{": (r"\}",), "{": "}", r"\langle": (r"\rangle",)}
PLAIN_WORDS = {"or": r"\or", "and": ",", "infinity": r"\infty", "inf": r"\infty", "oo": r"\infty", "pi": r"\pi", "union": r"\cup"}


def tokens(text: str) -> list[tuple[str, str]]:
    """(kind, text) pairs; runs of letters become known names, whole words or single-letter symbols."""
    out = []
    for m in TOKEN.finditer(text):
        kind, t = m.lastgroup, m.group(m.lastgroup)
        if kind == "num" and sum(c.isdigit() for c in t) > MAX_DIGITS:
            raise Budget(f"a literal of {len(t)} digits, at most {MAX_DIGITS} are read")
        if kind == "name":
            after = text[m.end():m.end() + 12].lstrip()
            fresh = not out or out[-1][1] in (",", r"\or", "(", "=") or out[-1][0] == "word"
            if t in PLAIN_WORDS:
                out.append(("cmd", PLAIN_WORDS[t]))
            elif t in FUNCTIONS:
                out.append(("cmd", "\\" + t))
            elif out and (out[-1][0] == "num" or out[-1][1] in ("}", ")", "%")) and bare_unit(t, m.group(0)[0] == " ", after):
                out.append(("word", t))
            elif len(t) >= 3 and (t.isupper() or t[1:].islower()) and (fresh and (not after or after[0] in ",)" or after[0].isalpha())
                                                                        or t.isupper()):
                out.append(("word", t))
            elif len(t) == 2 and out and out[-1][0] == "word" or len(t) == 2 and fresh and after[:1].isalpha():
                out.append(("word", t))
            else:
                out.extend(split_name(t))
        else:
            out.append((kind, t))
    merged = []
    for kind, t in out:
        if kind == "word" and merged and merged[-1][0] == "word":
            merged[-1] = ("word", merged[-1][1] + " " + t)
        else:
            merged.append((kind, t))
    return merged


def split_name(t: str) -> list[tuple[str, str]]:
    """Letters without a meaning as a word: leading function names and pi, then one symbol per letter."""
    out, i = [], 0
    while i < len(t):
        name = next((t[i:i + n] for n in (6, 4, 3, 2) if t[i:i + n] in FUNCTIONS | {"pi"} and n > 1), None)
        out.append(("cmd", "\\" + name) if name else ("name", t[i]))
        i += len(name) if name else 1
    return out


def bare_unit(t: str, spaced: bool, after: str) -> bool:
    """Whether letters after a number are its unit: "5 cm", "12 apples", but not "5xy" or "2 mg" (m times g)."""
    if len(t) < 2 or t in ("mg", "ms", "mn", "ab", "am", "pm", "dt", "dx"):
        return t in ("am", "pm")
    return unit(t)[0] != "label" or spaced and len(t) >= 4 and t.islower()


class Parser:
    """Recursive descent over the tokens of one answer. State: the position, the depth, whether inside |...|."""

    def __init__(self, text: str):
        self.toks = tokens(text) + [("end", "")]
        self.i, self.depth, self.bars = 0, 0, 0

    def peek(self) -> str:
        return self.toks[self.i][1]

    def kind(self) -> str:
        return self.toks[self.i][0]

    def take(self, want: str | None = None) -> str:
        t = self.peek()
        if want is not None and t != want or self.kind() == "end" and want is None:
            raise Unparsed(f"expected {want or 'more'} but found {t or 'the end'!r}")
        self.i += 1
        return t

    def top(self) -> tuple:
        items, union = self.items()
        if self.kind() != "end":
            raise Unparsed(f"unexpected {self.peek()!r}")
        return items[0] if len(items) == 1 else ("seq", "or" if union else "", tuple(items), "")

    def items(self) -> tuple[list, bool]:
        """Comma separated relations. The flag says that an "or" stood between them."""
        items, union = [], False
        while True:
            while self.peek() in (",", ";", r"\or", r"\land", r"\lor"):
                union |= self.take() in (r"\or", r"\lor")
            if self.kind() == "end" or self.peek() in (")", "]", "}", r"\}", r"\rangle", r"\end"):
                break
            items.append(self.relation())
            if self.peek() not in (",", ";", r"\or", r"\land", r"\lor"):
                break
        if not items:
            raise Unparsed("empty")
        return items, union

    def relation(self) -> tuple:
        if self.peek() == r"\approx":          # "\approx 8.24": the mark says nothing the digits do not say
            self.take()
        sides, ops = [self.sets()], []
        while self.peek() in RELATIONS:
            ops.append(RELATIONS[self.take()])
            sides.append(self.sets())
        if "~" in ops:                         # "2/3 \approx 0.67" claims the exact value
            keep = ops.index("~")
            if keep == 0 and sides[0][0] in ("sym", "call"):
                ops[0], keep = "=", ops[1:].index("~") + 1 if "~" in ops[1:] else len(ops)
            sides, ops = sides[:keep + 1], ops[:keep]
        return ("rel", tuple(ops), tuple(sides)) if ops else sides[0]

    def sets(self) -> tuple:
        left = self.sum()
        while self.peek() in SETS:
            left = (SETS[self.take()], left, self.sum())
        return left

    def sum(self) -> tuple:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Budget(f"nested deeper than {MAX_DEPTH}")
        left = None
        if self.peek() in PLUS:
            op = self.take()
            a = self.product()
            left = a if op == "+" else ("neg", a) if op == "-" else ("pm", None, a, op)
        else:
            left = self.product()
        while self.peek() in PLUS:
            op = self.take()
            right = self.product()
            left = (op, left, right) if op in "+-" else ("pm", left, right, op)
        self.depth -= 1
        return left

    def product(self) -> tuple:
        left = self.signed()
        while True:
            if self.peek() in TIMES:
                op = TIMES[self.take()]
                left = (op, left, self.signed())
            elif self.starts_operand(left):
                left = ("*", left, self.power())
            else:
                return left

    def signed(self) -> tuple:
        if self.peek() in ("-", "+"):
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise Budget(f"nested deeper than {MAX_DEPTH}")
            op, inner = self.take(), self.signed()
            self.depth -= 1
            return ("neg", inner) if op == "-" else inner
        return self.power()

    def starts_operand(self, left: tuple) -> bool:
        """Whether the next token can be multiplied on without a sign between."""
        kind, t = self.toks[self.i]
        if kind == "num":
            return left[0] not in ("num", "mixed") and self.toks[self.i - 1][0] != "num"
        if kind in ("name", "word") or t in ("(", "{", r"\{", r"\%", "%", r"\$", r"\langle", r"\lfloor", r"\lceil", r"\lvert", r"\degree"):
            return t != r"\{"
        if t == "|":
            return self.bars == 0
        return kind == "cmd" and (t[1:] in FUNCTIONS or t[1:] in GREEK or t in (
            r"\frac", r"\pi", r"\binom", r"\infty", r"\begin", r"\overline"))

    def power(self) -> tuple:
        left = self.atom()
        while True:
            t = self.peek()
            if t == "^":
                self.take()
                self.depth += 1
                if self.depth > MAX_DEPTH:
                    raise Budget(f"nested deeper than {MAX_DEPTH}")
                left = ("^", left, self.argument(whole=True))
                self.depth -= 1
            elif t == "!":
                self.take()
                left = ("call", "!", (left,))
            elif t in (r"\%", "%", r"\degree"):
                self.take()
                left = ("*", left, ("unit", "degree" if t == r"\degree" else "percent"))
            else:
                return left

    def argument(self, whole: bool = False) -> tuple:
        r"""One LaTeX argument: {...}, or a single token, of which \frac12 takes one digit and 2^10 the number."""
        if self.peek() == "{":
            return self.group()
        if self.peek() == "-" and whole:
            self.take()
            return ("neg", self.argument(True))
        kind, t = self.toks[self.i]
        if kind == "num" and not whole and len(t) > 1:
            self.toks[self.i:self.i + 1] = [("num", t[0]), ("num", t[1:])]
        return self.atom(bare=True)

    def group(self) -> tuple:
        self.take("{")
        items, _ = self.items()
        self.take("}")
        return items[0] if len(items) == 1 else ("seq", "", tuple(items), "")

    def atom(self, bare: bool = False) -> tuple:
        kind, t = self.toks[self.i]
        if kind == "num":
            return self.number(bare)
        if kind == "word":
            self.i += 1
            prev = self.toks[self.i - 2][0] if self.i >= 2 else "end"
            return ("word", t) if self.i == 1 or self.toks[self.i - 2][1] in (",", "(", r"\or", "=", r"\{", "{") and prev != "num" else units(t)
        if kind == "name" or kind == "cmd" and t[1:] in GREEK:
            return self.symbol(bare)
        if t in ("(", "[", r"\{", r"\langle", "{"):
            return self.brackets()
        self.take()
        if t in ("|", r"\lvert"):
            return self.fence("abs", "|" if t == "|" else r"\rvert")
        if t in (r"\lfloor", r"\lceil"):
            return self.fence(t[2:], "\\r" + t[2:])
        if t == r"\$":
            return ("unit", "dollar")
        if t == r"\begin":
            return self.matrix()
        if t == r"\overline":
            return ("call", "overline", (self.argument(),))
        if t in (r"\pi", r"\infty", r"\emptyset", r"\varnothing", r"\R", r"\ldots", r"\dots", r"\cdots"):
            return ("sym", {r"\varnothing": "emptyset", r"\dots": "ldots", r"\cdots": "ldots"}.get(t, t[1:]))
        if t in (r"\frac", r"\binom"):
            top, bottom = self.argument(), self.argument()
            return ("/", top, bottom) if t == r"\frac" else ("call", "binom", (top, bottom))
        if t == r"\sqrt":
            return self.root()
        if t[:1] == "\\" and t[1:] in FUNCTIONS:
            return self.function(t[1:])
        raise Unparsed(f"cannot read {t!r}")

    def number(self, bare: bool) -> tuple:
        """A literal; behind it a base (204_5), repeating digits (0.\\overline{3}) or the fraction of a mixed number."""
        t = self.take()
        node = literal(t)
        nxt = self.toks[self.i:self.i + 5]
        if bare:
            return node
        if self.peek() == "_":
            self.take()
            base = self.argument(whole=True)
            if base[0] != "num" or base[1].denominator != 1:
                raise Unparsed("a subscript that is no base")
            return ("base", t, int(base[1]))
        if self.peek() == r"\overline" and "." in t:
            self.take()
            rep = self.argument(whole=True)
            places = len(t.split(".")[1])
            digits = len(str(rep[1])) if rep[0] == "num" else 0
            if not digits:
                raise Unparsed("overline without digits")
            return ("num", node[1] + rep[1] / (10 ** places * (10 ** digits - 1)), None, 0, False)
        if node[2] is None and len(nxt) > 2 and (nxt[0][1] == r"\frac" or nxt[0][0] == "num" and nxt[1][1] == "/" and nxt[2][0] == "num"):
            mark = self.i
            toks = list(self.toks)
            if nxt[0][1] == r"\frac":
                part = self.atom()
            else:
                part = ("/", literal(self.take()), (self.take(), literal(self.take()))[1])
            if all(p[0] == "num" and p[2] is None for p in part[1:]) and 0 < part[1][1] < part[2][1]:
                return ("num", node[1] + part[1][1] / part[2][1], None, 0, False)
            self.i, self.toks = mark, toks
        return node

    def symbol(self, bare: bool) -> tuple:
        """A letter with its subscript and primes; f(x) is a call where the letter usually names a function."""
        name = self.take().lstrip("\\")
        if self.peek() == "_":
            self.take()
            start = self.i
            self.argument(whole=True)
            name += "_" + "".join(t for _, t in self.toks[start:self.i] if t not in "{}")
        while self.peek() == "'":
            name += self.take()
        if bare or self.peek() != "(":
            return ("sym", name)
        inside = self.toks[self.i + 1:self.i + 3]
        if len(inside) == 2 and inside[1][1] == ")" and name != "i" and (
                inside[0][0] == "num" or name[0] in "fghFGHPQpquyvIT" and inside[0][0] == "name" or len(name) > 2) or name in ("f", "g", "h"):
            self.take("(")
            items, _ = self.items()
            self.take(")")
            return ("call", "?" + name, tuple(items))
        return ("sym", name)

    def brackets(self) -> tuple:
        open_ = self.take()
        if open_ == r"\{" and self.peek() == r"\}":
            self.take()
            return ("sym", "emptyset")
        bars, self.bars = self.bars, 0
        items, _ = self.items()
        if open_ == r"\{" and self.peek() in ("|", r"\mid"):
            self.take()
            cond, union = self.items()
            self.take(r"\}")
            self.bars = bars
            return ("such", items[0], ("seq", "or" if union else "", tuple(cond), ""))
        self.bars = bars
        close = self.take()
        if close not in CLOSERS[open_]:
            raise Unparsed(f"{open_} closed by {close}")
        if open_ == r"\{" and len(items) == 1 and items[0][0] == "rel" and items[0][1][0] == ":":
            return ("such", items[0][2][0], ("rel", items[0][1][1:], items[0][2][1:]))
        if len(items) == 1 and open_ in "([{" and (open_ + close) in ("()", "[]", "{}"):
            return items[0]
        if open_ == r"\langle":
            open_, close = "(", ")"
        return ("seq", "" if open_ == "{" else open_, tuple(items), "" if open_ == "{" else close)

    def fence(self, name: str, close: str) -> tuple:
        bars, self.bars = self.bars, 1 if close == "|" else 0
        inner = self.sum()
        self.take(close)
        self.bars = bars
        return ("call", name, (inner,))

    def root(self) -> tuple:
        degree = None
        if self.peek() == "[":
            self.take()
            degree = self.sum()
            self.take("]")
        inner = self.argument(whole=True) if self.peek() != "(" else self.brackets()
        return ("call", "root", (inner, degree) if degree else (inner,))

    def function(self, name: str) -> tuple:
        power = base = None
        while self.peek() in ("^", "_"):
            if self.take() == "^":
                power = self.argument(whole=True)
            else:
                base = self.argument(whole=True)
        if self.peek() in ("(", "{", "["):
            arg = self.brackets() if self.peek() != "{" else self.group()
        else:
            arg = self.signed() if self.peek() == "-" else self.power()
            while self.starts_operand(arg) and self.peek()[1:] not in FUNCTIONS and self.kind() != "word":
                arg = ("*", arg, self.power())
        args = arg[2] if arg[0] == "seq" else (arg,)
        if power is not None and power[0] == "neg" and power[1][:2] == ("num", 1):
            return ("call", "arc" + name, args)
        node = ("call", name, args + ((base,) if base else ()))
        return ("^", node, power) if power is not None else node

    def matrix(self) -> tuple:
        self.take("{")
        env = ""
        while self.peek() != "}":
            env += self.take()
        self.take("}")
        if not re.fullmatch(r"[pbBv]?(small)?matrix|array", env):
            raise Unparsed(f"environment {env}")
        if env == "array" and self.peek() == "{":
            while self.take() != "}":
                pass
        rows, row = [], []
        while self.peek() != r"\end":
            if self.peek() == r"\\":
                self.take()
                rows.append(tuple(row))
                row = []
            elif self.peek() == "&":
                self.take()
            else:
                row.append(self.relation())
        rows = [r for r in rows + [tuple(row)] if r]
        self.take()
        while self.take() != "}":
            pass
        if not rows or len({len(r) for r in rows}) != 1:
            raise Unparsed("a matrix with rows of unequal length")
        return ("mat", tuple(rows)) if env != "vmatrix" else ("call", "det", (("mat", tuple(rows)),))


def literal(t: str) -> tuple:
    """("num", value, unit in the last place or None, significant digits, written with an exponent)."""
    mantissa, _, exponent = t.lower().partition("e")
    if exponent and abs(int(exponent)) > 5000:
        raise Budget(f"exponent {exponent} in a literal, at most 5000")
    scale = Fraction(10) ** int(exponent or 0)
    whole, dot, frac = mantissa.partition(".")
    value = Fraction(int((whole + frac) or 0), 10 ** len(frac)) * scale
    if not frac and not exponent:
        return ("num", value, None, 0, False)
    return ("num", value, scale / 10 ** len(frac), len((whole + frac).lstrip("0")), bool(exponent))


# ---------------------------------------------------------------- 4. units

DIMENSIONS = {  # dimension: "name=factor" in a common base unit; names that never need a prefix
    "1": "percent=1/100 pct=1/100 degree=pi deg=pi percentage=1/100 unit=1 radian=1 rad=1 time=1 piece=1",
    "L": "inch=.0254 in=.0254 foot=.3048 feet=.3048 ft=.3048 yard=.9144 yd=.9144 mile=1609.344 mi=1609.344 pc=3.0857e16 "
         "au=1.496e11 angstrom=1e-10 Å=1e-10 ly=9.4607e15",
    "T": "min=60 minute=60 hour=3600 hr=3600 h=3600 day=86400 week=604800 month=2629800 year=31557600 yr=31557600 sec=1 second=1",
    "M": "pound=.45359237 lb=.45359237 lbs=.45359237 ounce=.028349523 oz=.028349523 ton=1000 tonne=1000 gm=.001",
    "$": "dollar=1 cent=1/100 buck=1 usd=1", "C": "°C=1 celsius=1 degC=1", "F": "°F=1 fahrenheit=1", "€": "euro=1",
    "E": "erg=1e-7 cal=4.184 calorie=4.184"}
SI = {"m": "L", "meter": "L", "metre": "L", "s": "T", "second": "T", "g": "M", "gram": "M", "L": "V", "l": "V", "liter": "V",
      "litre": "V", "J": "E", "joule": "E", "W": "W", "watt": "W", "V": "U", "volt": "U", "A": "A", "ampere": "A", "N": "N",
      "newton": "N", "Pa": "P", "pascal": "P", "Hz": "Hz", "hertz": "Hz", "eV": "eV", "mol": "mol", "mole": "mol", "K": "K",
      "kelvin": "K", "ohm": "ohm", "T": "Tesla", "pc": "L", "bit": "bit", "byte": "byte", "bar": "P", "coulomb": "Q"}
PREFIX = {"n": -9, "nano": -9, "u": -6, "μ": -6, "micro": -6, "m": -3, "milli": -3, "c": -2, "centi": -2, "d": -1, "k": 3,
          "kilo": 3, "M": 6, "mega": 6, "G": 9, "giga": 9, "T": 12}
UNITS = {name: (dim, factor) for dim, row in DIMENSIONS.items() for name, factor in (f.split("=") for f in row.split())}
STOP = set("is are not the if or but maybe probably answer no than to so because then since therefore question".split())


@functools.lru_cache(maxsize=1024)
def unit(word: str) -> tuple[str, str]:
    """(dimension, factor) of one unit word; ("label", word) for a noun such as apples."""
    for w in (word, word.lower(), word.lower().removesuffix("s"), word.lower().removesuffix("es")):
        if w in UNITS:
            return UNITS[w]
        if w in SI:
            return SI[w], "1/1000" if SI[w] == "M" else "1"
        for n in (5, 4, 1):
            if w[:n] in PREFIX and w[n:] in SI and len(w) > n:
                return SI[w[n:]], f"1e{PREFIX[w[:n]] - 3 * (SI[w[n:]] == 'M')}"
    return "label", word.lower().removesuffix("s")


def units(text: str) -> tuple:
    """The unit tree of a phrase: "square inches", "miles per hour", "m/s", "students"."""
    words = re.findall(r"[^\W\d_]+|[/^()-]|\d+|°[CF]?", text.replace("mph", "mile per hour").replace("km/h", "km/hour"))
    if len(words) > 8 or STOP & {w.lower() for w in words} or not words:
        raise Unparsed(f"prose after a number: {text!r}")
    node, op, power, prev = None, "*", 1, None
    for w in words:
        low = w.lower()
        if low in ("per", "/"):
            op = "/"
        elif low in ("square", "sq", "squared", "cubic", "cubed"):
            exponent = 2 if low.startswith("sq") else 3
            if low.endswith("ed") and node:
                node = ("^", node, ("num", Fraction(exponent), None, 0, False))
            else:
                power = exponent
        elif w.isdigit() and node:
            node = ("^", node, ("num", Fraction(int(w[:2])), None, 0, False))
        elif w not in "^()-" and w not in ("of", "a", "an", "in") or len(words) == 1:
            u = ("unit", w)
            if power != 1:
                u, power = ("^", u, ("num", Fraction(power), None, 0, False)), 1
            node = (op, node or ("num", Fraction(1), None, 0, False), u)
            op = "*"
    return node or ("unit", "unit")


# ---------------------------------------------------------------- 5. values

LOCAL = threading.local()      # mpmath contexts carry their precision as state, so every thread owns one


def mp():
    """This thread's 400-bit mpmath context (mpmath comes with sympy); made on first use."""
    if not hasattr(LOCAL, "mp"):
        from mpmath.ctx_mp import MPContext
        LOCAL.mp = MPContext()
        LOCAL.mp.prec = PREC
    return LOCAL.mp


class Env:
    """Where an expression is evaluated: which sample point, whether units count, and the work done so far."""

    def __init__(self, point: int = 0, with_units: bool = False, work: list | None = None):
        self.point, self.with_units, self.work = point, with_units, work if work is not None else [0]

    def symbol(self, name: str) -> Fraction:
        """A fixed "random" rational per name and point; points 2 and 3 include negative numbers, so that
        sqrt(x^2) differs from x."""
        h = zlib.crc32(f"{name}@{self.point}".encode())
        size = Fraction(400 + h % 3001, 997)
        return -size if self.point == 2 or self.point == 3 and h % 2 else size


def big(x):
    """A float of this thread's precision; exact fractions are converted."""
    return mp().mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x


def size2(x) -> int:
    """log2 of |x|, rounded up; -10**9 for 0."""
    if isinstance(x, Fraction):
        return x.numerator.bit_length() - x.denominator.bit_length() + 1 if x else -10**9
    return mp().mag(x) if x else -10**9


def shrink(x):
    return big(x) if isinstance(x, Fraction) and max(x.numerator.bit_length(), x.denominator.bit_length()) > MAX_BITS else x


def add(a, b):
    if isinstance(a, tuple) or isinstance(b, tuple):
        if not (isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) and len(a[0]) == len(b[0])):
            raise Undefined("matrix + number")
        return tuple(tuple(add(x, y) for x, y in zip(r, s)) for r, s in zip(a, b))
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return shrink(a + b)
    a, b = big(a), big(b)
    c = a + b
    if mp().isinf(a) or mp().isinf(b) or not a or not b:
        return c
    high, low = max(size2(a), size2(b)), min(size2(a), size2(b))
    if high - low > SAME_BITS - 10:
        raise Budget("a sum of terms too different in size to be told apart")
    return Fraction(0) if size2(c) < high - SAME_BITS else c


def mul(a, b):
    if isinstance(a, tuple) and isinstance(b, tuple):
        if len(a[0]) != len(b):
            raise Undefined("matrix sizes")
        return tuple(tuple(functools.reduce(add, (mul(x, r[j]) for x, r in zip(row, b))) for j in range(len(b[0]))) for row in a)
    if isinstance(a, tuple) or isinstance(b, tuple):
        m, k = (a, b) if isinstance(a, tuple) else (b, a)
        return tuple(tuple(mul(x, k) for x in row) for row in m)
    return shrink(a * b) if isinstance(a, Fraction) and isinstance(b, Fraction) else big(a) * big(b)


def div(a, b):
    if isinstance(b, tuple) or not b:
        raise Undefined("division by zero")
    return mul(a, Fraction(1) / b if isinstance(b, Fraction) else 1 / b)


def power(a, b):
    if isinstance(a, tuple):
        if not isinstance(b, Fraction) or b.denominator != 1 or not 1 <= b <= 20:
            raise Undefined("matrix power")
        return functools.reduce(mul, [a] * int(b))
    if isinstance(b, tuple):
        raise Undefined("matrix exponent")
    if not a:
        if isinstance(b, Fraction) and b > 0:
            return Fraction(0)
        raise Undefined("0 to a power that is not positive") if b else Undefined("0^0")
    bits = abs(size2(a)) + 1
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        if b.denominator == 1 and max(a.numerator.bit_length(), a.denominator.bit_length()) * abs(b.numerator) <= MAX_BITS:
            return a ** b.numerator
    if size2(b) > 64 or (bits + 8) * 2 ** max(0, size2(b)) > 2 ** 64:
        raise Budget("a power too large")
    return mp().power(big(a), big(b))


def call(name: str, args: list, env: Env):
    """A named function of evaluated arguments, each within the range where it costs microseconds."""
    m, x = mp(), args[0]
    if isinstance(x, tuple):
        if name == "det" and len(x) == len(x[0]) <= 6:
            return determinant(x)
        raise Undefined(f"{name} of a matrix")
    if name.startswith("?"):           # an unknown function: any fixed generic one will do
        h = zlib.crc32(name.encode())
        return functools.reduce(add, (mul(Fraction(h % (89 + i) + 1, 7 + i), mul(a, add(a, Fraction(h % 13 + i, 3))))
                                      for i, a in enumerate(args)))
    if name in ("!", "binom") and max(size2(a) for a in args) > 40:
        raise Budget("a factorial too large")
    if name == "!":
        if isinstance(x, Fraction) and x.denominator == 1:
            if x < 0:
                raise Undefined("factorial of a negative number")
            if x <= 2000:
                return Fraction(math.factorial(int(x)))
        return m.gamma(big(x) + 1)
    if name == "binom":
        n, k = args
        if all(isinstance(a, Fraction) and a.denominator == 1 for a in args) and 0 <= n <= 3000:
            return Fraction(math.comb(int(n), int(k))) if k >= 0 else Fraction(0)
        return m.binomial(big(n), big(k))
    if name in ("max", "min", "gcd", "lcm"):
        if not all(isinstance(a, Fraction) for a in args) or name in ("gcd", "lcm") and any(a.denominator != 1 for a in args):
            raise Undefined(f"{name} of these arguments")
        return {"max": max, "min": min}[name](args) if name in ("max", "min") else Fraction(getattr(math, name)(*map(int, args)))
    if name in ("floor", "ceil"):
        if size2(x) > PREC - 60 or not isinstance(x, Fraction) and m.im(x):
            raise Budget("floor of a huge number")
        return Fraction(math.floor(x) if name == "floor" else math.ceil(x)) if isinstance(x, Fraction) else Fraction(int(getattr(m, name)(x)))
    if name == "abs":
        return abs(x)
    if name == "root":
        degree = args[1] if len(args) > 1 else Fraction(2)
        if not isinstance(degree, Fraction) or not degree:
            return power(x, div(Fraction(1), degree))
        real = isinstance(x, Fraction) or not m.im(x)
        if real and degree.denominator == 1 and degree.numerator % 2 and big(x) < 0:
            return -power(-x, 1 / degree)
        if degree == 2 and isinstance(x, Fraction) and x >= 0:
            top, low = math.isqrt(x.numerator), math.isqrt(x.denominator)
            if top * top == x.numerator and low * low == x.denominator:
                return Fraction(top, low)
        return power(x, 1 / degree)
    return elementary(name, big(x), args[1:])


def elementary(name: str, x, rest: list):
    m = mp()
    if name in ("log", "ln", "lg"):
        if not x:
            raise Undefined("log 0")
        base = big(rest[0]) if rest else m.mpf(10) if name == "lg" else None
        if base is not None and (not base or base == 1):
            raise Undefined("log base")
        return m.log(x) / m.log(base) if base is not None else m.log(x)
    if size2(x) > (60 if name in ("exp", "sinh", "cosh", "tanh") else 1000):
        raise Budget(f"{name} of a huge number")
    name = re.sub(r"^arc(?=sin|cos|tan)", "a", name.replace("arcsinh", "asinh"))
    name = {"arccot": "acot", "acot": "acot", "Re": "re", "Im": "im"}.get(name, name)
    try:
        return getattr(m, name)(x)
    except (AttributeError, ZeroDivisionError) as why:
        raise Undefined(f"{name}: {why}") from why


def determinant(rows):
    if len(rows) == 1:
        return rows[0][0]
    minors = (tuple(r[:j] + r[j + 1:] for r in rows[1:]) for j in range(len(rows)))
    return functools.reduce(add, (mul(mul(Fraction((-1) ** j), rows[0][j]), determinant(mn)) for j, mn in enumerate(minors)))


def value(node: tuple, env: Env):
    """The value of a tree: a Fraction while exact, an mpmath number otherwise, a tuple of tuples for a matrix."""
    env.work[0] += 1
    if env.work[0] > MAX_WORK:
        raise Budget(f"more than {MAX_WORK} evaluations")
    kind = node[0]
    if kind == "num":
        return node[1]
    if kind == "sym":
        return {"pi": lambda: +mp().pi, "e": lambda: +mp().e, "i": lambda: mp().mpc(0, 1), "infty": lambda: mp().inf}.get(
            node[1], lambda: env.symbol(node[1]))()
    if kind == "unit":
        dim, factor = unit(node[1])
        if not env.with_units or node[1] in ("unit", "units"):
            return Fraction(1)
        if dim == "label":
            return env.symbol("unit:" + factor)
        scale = mp().pi / 180 if factor == "pi" else Fraction(factor)
        return scale if dim == "1" else mul(scale, env.symbol("unit:" + dim))
    if kind == "neg":
        return mul(Fraction(-1), value(node[1], env))
    if kind in "+-":
        right = value(node[2], env)
        return add(value(node[1], env), right if kind == "+" else mul(Fraction(-1), right))
    if kind == "*":
        return mul(value(node[1], env), value(node[2], env))
    if kind == "/":
        return div(value(node[1], env), value(node[2], env))
    if kind == "^":
        return power(value(node[1], env), value(node[2], env))
    if kind == "call":
        inner = env if env.with_units or node[1].startswith("?") else Env(env.point, True, env.work)
        return call(node[1], [value(a, inner) for a in node[2]], env)
    if kind == "mat":
        return tuple(tuple(value(c, env) for c in row) for row in node[1])
    raise Undefined(f"{kind} has no value")


# ---------------------------------------------------------------- 6. comparison


def walk(node):
    """All tuples of a tree, the root first."""
    stack = [node]
    while stack:
        n = stack.pop()
        if n and isinstance(n[0], str):
            yield n
        stack.extend(c for c in n if isinstance(c, tuple))


def expand(node: tuple) -> list[tuple]:
    r"""The variants of a tree with \pm: both signs of each, coupled when a \mp shows that they belong together."""
    signs = [n for n in walk(node) if n[0] == "pm"]
    if not signs:
        return [node]
    if len(signs) > 4:
        raise Budget("more than 4 signs \\pm")
    linked = any(n[3] == r"\mp" for n in signs)

    def pick(n, choice):
        if not isinstance(n, tuple):
            return n
        if n and n[0] == "pm":
            k = 0 if linked else next(i for i, s in enumerate(signs) if s is n)
            plus = choice[k] != (n[3] == r"\mp")
            a = pick(n[2], choice)
            if n[1] is None:
                return a if plus else ("neg", a)
            return ("+" if plus else "-", pick(n[1], choice), a)
        return tuple(pick(c, choice) for c in n)
    count = 1 if linked else len(signs)
    return [pick(node, [bool(bits >> k & 1) for k in range(count)]) for bits in range(2 ** count)]


def members(node: tuple) -> list[tuple] | None:
    """The elements of a bare list or a set in braces, with every \\pm written out; None for anything else."""
    if node[0] == "seq" and node[1] in ("", "or", r"\{"):
        return [v for item in node[2] for v in (members(item) if item[0] == "seq" and item[1] == "" else expand(item))]
    if node[0] == "rel" and node[1] == ("=",) and named(node[2][0]) and (inner := members(node[2][1])):
        return inner
    variants = expand(node)
    return variants if len(variants) > 1 else None


def named(node: tuple) -> bool:
    """Whether a left side only gives the answer a name: x, f(x), (x, y)."""
    return node[0] == "sym" and node[1] not in ("pi", "e", "i", "infty") or node[0] == "call" and node[1][0] == "?" or (
        node[0] == "seq" and all(named(n) for n in node[2])) or node[0] == "word"


def unname(node: tuple) -> tuple:
    """`x = 3`, `f(x) = 3`, `x \\in S` and a chain `x = 1 + 2 = 3` without the name: the last side."""
    while node[0] == "rel" and (node[1] == ("in",) or set(node[1]) == {"="} and (named(node[2][0]) or len(node[1]) > 1)):
        node = node[2][-1]
    return node


def approx(node: tuple) -> tuple | None:
    """The one literal that carries the precision of a number like -2.68, 4.5 \\times 10^{33} or 5.0 cm."""
    if node[0] == "num":
        return node if node[2] is not None else None
    if node[0] == "neg":
        return approx(node[1])
    if node[0] in "*/" and all(n[0] in ("num", "unit", "*", "/", "^", "neg") for n in walk(node)):
        found = [n for n in walk(node) if n[0] == "num" and n[2] is not None]
        if len(found) == 1:
            ten = any(n[0] == "^" and n[1][:2] == ("num", 10) for n in walk(node))
            return found[0][:4] + (found[0][4] or ten,)
    return None


def close(x, y, gold: tuple, answer: tuple) -> bool:
    """Whether the values x (gold) and y (answer) agree, by the precision rule in the module docstring."""
    if mp().isinf(big(x)) or mp().isinf(big(y)):
        return x == y
    if isinstance(x, Fraction) and isinstance(y, Fraction) and x == y:
        return True
    diff = add(x, mul(Fraction(-1), y))
    if not diff:
        return True
    if not x or not y:
        return False
    off = abs(big(diff)) / abs(big(x))
    a, g = approx(answer), approx(gold)
    if a is not None and a[1]:
        ulp = a[2] / abs(a[1])
        if a[3] >= 6 and (off <= big(ulp) / 2 or off <= 1e-14):
            return True
        if a[3] >= 6 and g is None and off <= big(ulp) and abs(big(y)) < abs(big(x)) and not isinstance(x, Fraction):
            return True
        if a[3] >= 6 and g is None and off <= big(ulp) and isinstance(x, Fraction) and x.denominator != 1 and abs(big(y)) < abs(big(x)):
            return True
    elif any(n[0] == "num" and n[2] is not None for n in walk(answer)):
        if all(n[3] >= 6 for n in walk(answer) if n[0] == "num" and n[2] is not None) and off <= 1e-6:
            return True
    if g is not None and (g[4] or g[3] >= 2 and g[1].denominator != 1):
        fine = a is None or a[2] / abs(a[1] or 1) <= g[2] / abs(g[1]) * Fraction(1001, 1000)
        return bool(fine and off <= big(g[2] / abs(g[1])) / 2 * (1 + mp().mpf(2) ** -60))
    return False


def equal(gold: tuple, answer: tuple, work: list) -> bool:
    """Equality of two expressions: by value, or at four points when they have symbols."""
    has = [{n[1] for n in walk(t) if n[0] == "unit"} for t in (gold, answer)]
    free = {n[1] for t in (gold, answer) for n in walk(t) if n[0] == "sym"} - {"pi", "e", "i", "infty"}
    modes = [True] if all(has) else [False, True] if any(has) else [False]
    return any(all_points(gold, answer, mode, bool(free) or any(has) and mode, work) for mode in modes)


def all_points(gold: tuple, answer: tuple, with_units: bool, sampled: bool, work: list) -> bool:
    agreed = 0
    for point in range(4 if sampled else 1):
        try:
            x, y = (value(t, Env(point, with_units, work)) for t in (gold, answer))
        except Undefined:
            continue
        if isinstance(x, tuple) or isinstance(y, tuple):
            if not (isinstance(x, tuple) and isinstance(y, tuple)) or [len(r) for r in x] != [len(r) for r in y]:
                return False
            if not all(close(p, q, gold, answer) for r, s in zip(x, y) for p, q in zip(r, s)):
                return False
            agreed += 1
            continue
        # sqrt(1/n) and 1/sqrt(n) part only where the formulas leave the reals, which is not their domain
        if point >= 2 and agreed and (mp().im(big(x)) or mp().im(big(y))):
            continue
        if not close(x, y, gold, answer):
            return False
        agreed += 1
    return agreed > 0


def same(gold: tuple, answer: tuple, work: list) -> bool:
    """Whether two trees mean the same answer. Containers are compared here, their elements recursively."""
    g, a = members(gold), members(answer)
    if g is not None and a is not None:
        if inequalities(gold) and inequalities(answer):
            return regions(gold, answer, work)
        return unordered(g, a, work)
    gold_, answer_ = unname(gold), unname(answer)
    if gold[0] == "rel" and answer[0] == "rel":
        return relations(gold, answer, work)
    if (g is None) != (a is None):
        pair, other = (g, answer_) if g is not None else (a, gold_)
        if other[0] == "seq" and other[1] == "(" and gold_[1] != r"\{" and answer_[1] != r"\{":   # "1, 3" for the pair (1, 3)
            pair = [unname(p) for p in pair]
            return len(pair) == len(other[2]) and all(same(*((p, o) if g is not None else (o, p)), work) for p, o in zip(pair, other[2]))
        if other[0] in ("cup", "minus", "such") or inequalities(gold) or inequalities(answer):
            return regions(gold, answer, work)
        return len(pair) == 1 and (same(pair[0], answer_, work) if g is not None else same(gold_, pair[0], work))
    gold, answer = gold_, answer_
    kinds = {gold[0], answer[0]}
    if kinds & {"rel", "cup", "cap", "minus", "such"} or any(t[:2] in (("sym", "R"), ("sym", "emptyset")) for t in (gold, answer)):
        return regions(gold, answer, work)
    if kinds == {"seq"}:
        if (gold[1], gold[3]) != (answer[1], answer[3]) or len(gold[2]) != len(answer[2]):
            return False
        return all(same(x, y, work) for x, y in zip(gold[2], answer[2]))
    if kinds == {"mat"}:
        return [len(r) for r in gold[1]] == [len(r) for r in answer[1]] and all(
            same(x, y, work) for r, s in zip(gold[1], answer[1]) for x, y in zip(r, s))
    if kinds == {"mat", "seq"}:
        m, t = (gold, answer) if gold[0] == "mat" else (answer, gold)
        column = [r[0] for r in m[1]] if len(m[1][0]) == 1 else ()
        return t[1] == "(" and len(column) == len(t[2]) and all(same(x, y, work) for x, y in zip(column, t[2]))
    if "word" in kinds or "base" in kinds:
        return plain(gold) == plain(answer) is not None
    if "seq" in kinds:
        return False
    return equal(gold, answer, work)


def plain(node: tuple) -> str | None:
    """The letters of a text answer, or the digits and base of a numeral, as one comparable string."""
    if node[0] == "base":
        return f"{node[1].lstrip('0')}_{node[2]}"
    return re.sub(r"[^a-z0-9]", "", node[1].lower()) if node[0] in ("word", "sym") else None


def unordered(gold: list, answer: list, work: list) -> bool:
    """Equal as collections: same number of elements, each matched with a different partner."""
    if len(gold) != len(answer):
        return False
    left = list(answer)
    for g in gold:
        for i, a in enumerate(left):
            if same(g, a, work):
                del left[i]
                break
        else:
            return False
    return True


def relations(gold: tuple, answer: tuple, work: list) -> bool:
    """Equations agree up to a non-zero factor; inequalities as regions, else side by side."""
    ops = set(gold[1]) | set(answer[1])
    if ops == {"="}:
        g, a = gold[2], answer[2]
        if named(g[0]) and named(a[0]):
            names = [t[0][1].lstrip("?") if t[0][0] == "sym" else t[0] for t in (g, a)]
            if names[0] == names[1] or {g[0][0], a[0][0]} == {"call", "sym"} or g[0][0] == "seq" == a[0][0] and same(g[0], a[0], work):
                return same(g[-1], a[-1], work)
        if len(gold[1]) == len(answer[1]) and all(same(x, y, work) for x, y in zip(g, a)):
            return True
        return len(g) == len(a) == 2 and proportional(("-", *g), ("-", *a), work)
    if ops == {":"}:
        if len(gold[1]) != len(answer[1]):
            return False
        return all(same(("/", gold[2][0], x), ("/", answer[2][0], y), work) for x, y in zip(gold[2][1:], answer[2][1:]))
    if region(gold, work) is not None and region(answer, work) is not None:
        return regions(gold, answer, work)
    flip = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
    for ops_, sides in ((answer[1], answer[2]), (tuple(flip.get(o, o) for o in reversed(answer[1])), answer[2][::-1])):
        if gold[1] == ops_ and all(same(x, y, work) for x, y in zip(gold[2], sides)):
            return True
    return False


def proportional(f: tuple, g: tuple, work: list) -> bool:
    """Whether f = c g with a constant c other than 0, at four points."""
    ratios = []
    for point in range(4):
        try:
            x, y = value(f, Env(point, True, work)), value(g, Env(point, True, work))
            ratios.append(div(x, y) if x else Fraction(0))
        except Undefined:
            continue
    free = [{n[1] for n in walk(t) if n[0] == "sym"} - {"pi", "e", "i"} for t in (f, g)]
    if len(ratios) < 2 or not ratios[0] or isinstance(ratios[0], tuple) or free[0] != free[1] or not free[0]:
        return False
    return all(not isinstance(r, tuple) and not add(r, mul(Fraction(-1), ratios[0])) for r in ratios[1:])


# Regions of the real line: sorted disjoint pieces (low, low_closed, high, high_closed) with values as ends.

def inequalities(node: tuple) -> bool:
    """Whether a node is an inequality or a list of nothing but inequalities."""
    if node[0] == "seq" and node[1] in ("", "or"):
        return all(inequalities(n) for n in node[2])
    return node[0] == "rel" and not set(node[1]) & {"=", "in", ":", "~"}


def regions(gold: tuple, answer: tuple, work: list) -> bool:
    g, a = region(gold, work), region(answer, work)
    if g is None or a is None or len(g) != len(a):
        return False
    num = ("num", Fraction(0), None, 0, False)
    return all(p[1] == q[1] and p[3] == q[3] and close(p[0], q[0], num, num) and close(p[2], q[2], num, num) for p, q in zip(g, a))


def region(node: tuple, work: list) -> list | None:
    """The set of reals a node describes, or None when it does not describe one."""
    inf = mp().inf
    if node[0] == "rel":
        if node[1] == ("in",):
            return region(node[2][1], work)
        return inequality(node, work)
    if node[:2] == ("sym", "R"):
        return [(-inf, False, inf, False)]
    if node[:2] == ("sym", "emptyset"):
        return []
    if node[0] == "word":
        return [(-inf, False, inf, False)] if plain(node) in ("allrealnumbers", "allreals", "realnumbers") else None
    if node[0] == "such":
        return region(node[2], work)
    if node[0] in ("cup", "cap", "minus"):
        parts = [region(n, work) for n in node[1:]]
        if None in parts:
            return None
        return merge(parts[0] + parts[1]) if node[0] == "cup" else intersect(
            parts[0], parts[1] if node[0] == "cap" else complement(parts[1]))
    if node[0] != "seq":
        return None
    if inequalities(node):
        parts = [region(n, work) for n in node[2]]
        if None in parts:
            return None
        both = functools.reduce(intersect, parts)
        return merge(sum(parts, [])) if node[1] == "or" or not both else both
    ends = [real(n, work) for n in node[2]]
    if None in ends:
        return None
    if node[1] == r"\{":
        return merge([(e, True, e, True) for e in ends])
    if node[1] in ("(", "[") and len(ends) == 2 and big(ends[0]) <= big(ends[1]):
        return merge([(ends[0], node[1] == "[", ends[1], node[3] == "]")])
    return None


def real(node: tuple, work: list):
    """The value of a real constant, None for anything else."""
    if any(n[0] in ("seq", "rel", "pm", "word", "base", "mat") or n[0] == "sym" and n[1] not in ("pi", "e", "infty") for n in walk(node)):
        return None
    try:
        x = value(node, Env(0, False, work))
    except Undefined:
        return None
    return x if isinstance(x, Fraction) or not mp().im(x) else None


def inequality(node: tuple, work: list) -> list | None:
    """A chain of inequalities, each linear in the same one symbol, as a region; None if it is not that."""
    names = {n[1] for n in walk(node) if n[0] == "sym"} - {"pi", "e", "infty"}
    if len(names) != 1 or any(n[0] in ("call", "seq", "word", "pm") for n in walk(node)):
        calls = {n for n in walk(node) if n[0] == "call" and n[1][0] == "?"}
        if len(calls) != 1 or calls.isdisjoint(node[2]) or len(names) > 1:
            return None
    out, inf = [(-mp().inf, False, mp().inf, False)], mp().inf
    for op, left, right in zip(node[1], node[2], node[2][1:]):
        if op not in ("<", "<=", ">", ">=", "!="):
            return None
        bound, factor = linear_root(left, right, work)
        if bound is None:
            return None
        if factor < 0:
            op = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}.get(op, op)
        piece = {"<": [(-inf, False, bound, False)], "<=": [(-inf, False, bound, True)], ">": [(bound, False, inf, False)],
                 ">=": [(bound, True, inf, False)], "!=": [(-inf, False, bound, False), (bound, False, inf, False)]}[op]
        out = intersect(out, merge(piece))
    return out


def linear_root(left: tuple, right: tuple, work: list):
    """(root, slope) of left - right when it is linear in its symbol; an infinite side is its own root."""
    if left[0] in ("sym", "call") and (r := real(right, work)) is not None:
        return r, 1
    if right[0] in ("sym", "call") and (r := real(left, work)) is not None:
        return r, -1
    xs, ys = [], []
    try:
        for point in range(3):
            env = Env(point, False, work)
            xs.append(env.symbol(next(n[1] for n in walk(("-", left, right)) if n[0] == "sym" and n[1] not in ("pi", "e", "i"))))
            ys.append(value(("-", left, right), env))
    except (Undefined, StopIteration):
        return None, 0
    slope = div(add(ys[1], mul(Fraction(-1), ys[0])), xs[1] - xs[0])
    other = div(add(ys[2], mul(Fraction(-1), ys[0])), xs[2] - xs[0])
    if not slope or isinstance(slope, tuple) or add(slope, mul(Fraction(-1), other)) or mp().im(big(slope)):
        return None, 0
    return add(xs[0], mul(Fraction(-1), div(ys[0], slope))), 1 if big(slope) > 0 else -1


def merge(pieces: list) -> list:
    """Sorted pieces with overlapping or touching ones joined and empty ones dropped."""
    kept = [p for p in pieces if big(p[0]) < big(p[2]) or p[0] == p[2] and p[1] and p[3]]
    out = []
    for p in sorted(kept, key=lambda p: (big(p[0]), not p[1])):
        if out and (big(p[0]) < big(out[-1][2]) or p[0] == out[-1][2] and (p[1] or out[-1][3])):
            last = out[-1]
            high, closed = max((big(last[2]), last[3]), (big(p[2]), p[3]))
            out[-1] = (last[0], last[1], last[2] if high == big(last[2]) else p[2], closed)
        else:
            out.append(p)
    return out


def intersect(a: list, b: list) -> list:
    out = []
    for p in a:
        for q in b:
            low, high = max((p, q), key=lambda t: (big(t[0]), not t[1])), min((p, q), key=lambda t: (big(t[2]), t[3]))
            out.append((low[0], low[1], high[2], high[3]))
    return merge(out)


def complement(a: list) -> list:
    inf, out, low, closed = mp().inf, [], -mp().inf, False
    for p in a:
        out.append((low, closed, p[0], not p[1]))
        low, closed = p[2], not p[3]
    return merge(out + [(low, closed, inf, False)])


# ---------------------------------------------------------------- 7. verdicts

RATIONAL = re.compile(r"(-?)(?:(\d{1,400})(?:\.0*)?|\\frac\{(-?\d{1,400})\}\{(\d{1,400})\}|(\d{1,400})/(\d{1,400}))$")
CHOICE = re.compile(r"^\(?([A-J])(?:\)[.:]?|[.:])\s*(\S.*)$", re.S)


@functools.lru_cache(maxsize=16384)
def parse(text: str) -> tuple:
    """The tree of an answer. Errors: Unparsed (not in the grammar), Budget (over the limits above)."""
    if len(text) > MAX_CHARS:
        raise Budget(f"{len(text)} characters, at most {MAX_CHARS} are read")
    try:
        return Parser(text).top()
    except RecursionError as why:
        raise Budget("nested too deeply") from why


def try_parse(text: str) -> tuple | None:
    try:
        return parse(clean(text))
    except (Unparsed, Budget):
        return None


def joined(s: str) -> str:
    """1,234 and 1 234 outside brackets as 1234."""
    def at_top(m):
        before = s[:m.start()]
        inside = sum(before.count(c) for c in "([") - sum(before.count(c) for c in ")]") > 0 or before.count(r"\{") > before.count(r"\}")
        return m.group(0) if inside else m.group(0).replace(",", "").replace(" ", "")
    return THOUSANDS.sub(at_top, s)


def rational(s: str) -> Fraction | None:
    m = RATIONAL.match(s)
    if not m:
        return None
    sign, whole, a, b, c, d = m.groups()
    if whole is None and not int(b or d):
        return None
    value_ = Fraction(int(whole)) if whole else Fraction(int(a or c), int(b or d))
    return -value_ if sign else value_


def clock(s: str) -> tuple | None:
    """(hour, minute, second, a|p|None) of a time of day; a bare number is not one."""
    m = CLOCK.match(re.sub(r"\\word\{([^{}]*)\}", r"\1", s).replace("{", "").replace("}", "").replace(" ", ""))
    if not m or not (m.group(4) or m.group(3) or (m.group(2) or "x")[0] == "0"):
        return None
    return int(m.group(1)), int(m.group(2) or 0), int(m.group(3) or 0), (m.group(4) or "").lower() or None


@functools.lru_cache(maxsize=16384)
def gold_text(gold: str) -> str:
    """The cleaned gold; a gold given as a whole solution is reduced to its box."""
    found, _ = boxes(gold)
    return clean(last_answer_boxes(found, gold) if found else gold)


def decide(gold: str, answer: str) -> str:
    """correct | wrong | unparsed | budget for an extracted answer."""
    if len(answer) > MAX_CHARS:
        return "correct" if answer.strip() == gold.strip() else "budget"
    g, a = gold_text(gold), clean(answer)
    if g.replace(" ", "") == a.replace(" ", ""):
        return "correct" if a and "?" not in a else "wrong"
    gj, aj = joined(g), joined(a)
    x, y = rational(gj.replace(" ", "") if gj.count(" ") < 9 else gj), rational(aj)
    if x is not None and y is not None:
        if x == y:
            return "correct"
        if "," not in g + a:
            return "wrong"
    if (t := clock(g)) and (u := clock(a)):
        return "correct" if t[:3] == u[:3] and (t[3] == u[3] or not t[3] or not u[3]) else "wrong"
    try:
        return "correct" if any(same(parse(p), parse(q), [0]) for p, q in readings(g, a, gj, aj)) else "wrong"
    except Unparsed:
        return "unparsed"
    except Budget:
        return "budget"


def readings(g: str, a: str, gj: str, aj: str):
    """The pairs of texts to compare: commas as thousands, as list separators, as a decimal comma of the
    answer, and the text or letter of a multiple-choice answer."""
    if m := CHOICE.match(a):
        letter, rest = m.groups()
        if re.fullmatch(r"\(?[A-J]\)?", g):
            yield g.strip("()"), letter
            return
        yield gj, joined(rest)
        return
    yield gj, aj
    if (gj, aj) != (g, a):
        yield g, a
    if re.fullmatch(r"-?\d+,\d+", a) and re.fullmatch(r"-?\d*\.\d+", g):
        yield g, a.replace(",", ".")


def verify(response: str, *, gold: str, finished: bool | None = None) -> Verdict:
    """Whether the response's final answer equals the gold answer.

    response: the model's text; what follows an end-of-turn token or precedes </think> is ignored.
    gold: the raw dataset string. finished: False when the response ran into the token limit, None if unknown.
    Raises TypeError when either text is not a str. Safe in any thread.

    >>> verify(r"\\boxed{x = 1, 2}", gold="2, 1").reason
    'correct'
    >>> verify(r"\\boxed{0.33}", gold=r"\\frac13").reason
    'wrong'
    """
    if not isinstance(response, str) or not isinstance(gold, str):
        raise TypeError(f"response and gold are str, got {type(response).__name__} and {type(gold).__name__}")
    answer, why = extract(response, finished)
    if answer is None:
        return Verdict(False, why, None)
    reason = decide(gold, answer)
    return Verdict(reason == "correct", reason, answer)


def gold_problem(gold: str) -> str | None:
    """None when the gold answer is understood, otherwise one line saying why it is not.

    >>> gold_problem(r"\\frac{1}{2}"), gold_problem("(1, 2")
    (None, "expected more but found 'the end'")
    """
    try:
        text = gold_text(gold)
        if clock(text):
            return None
        tree = parse(joined(text))
        if tree[0] == "word" and len(tree[1].split()) > 4:
            return f"prose ({plain(tree)!r})"
        return None if same(tree, tree, [0]) else "it does not equal itself: a symbol without a value"
    except (Unparsed, Budget) as why:
        return str(why)


# ---------------------------------------------------------------- 8. batches


def reasons(verdicts: list[Verdict]) -> dict[str, int]:
    """How many verdicts have each reason.

    >>> reasons([Verdict(True, "correct", "1"), Verdict(False, "wrong", "2")])
    {'correct': 1, 'wrong': 1}
    """
    return dict(collections.Counter(v.reason for v in verdicts))


def serve(pipe) -> None:
    """One worker: verdicts for the rows that arrive, until the pipe closes."""
    try:
        while (job := pipe.recv()) is not None:
            pipe.send(verify(job[0], gold=job[1], finished=job[2]))
    except EOFError:
        return


def verify_many(responses: list[str], golds: list[str], *, workers: int = 0, finished: list | None = None,
                stuck_after: float = 20.0) -> list[Verdict]:
    """Verdicts in order; workers=0 runs in this process, N > 0 in that many child processes.

    A child that dies or gives no answer for `stuck_after` seconds is killed and replaced; its row alone gets the
    reason "budget". That is a safety net: no input is known to need it. Raises ValueError for unequal lengths.
    """
    finished = [None] * len(responses) if finished is None else list(finished)
    if not len(responses) == len(golds) == len(finished):
        raise ValueError(f"{len(responses)} responses, {len(golds)} golds, {len(finished)} finished flags: lengths differ")
    jobs = list(zip(responses, golds, finished))
    if workers <= 0 or not jobs:
        return [verify(r, gold=g, finished=f) for r, g, f in jobs]
    import multiprocessing as mp_
    from multiprocessing.connection import wait
    ctx = mp_.get_context("fork" if "fork" in mp_.get_all_start_methods() else None)
    out: list = [None] * len(jobs)
    idle, busy, todo = [], {}, iter(range(len(jobs)))

    def start():
        here, there = ctx.Pipe()
        child = ctx.Process(target=serve, args=(there,), daemon=True)
        child.start()
        there.close()
        return here, child

    idle = [start() for _ in range(min(workers, len(jobs)))]
    try:
        while True:
            while idle and (row := next(todo, None)) is not None:
                here, child = idle.pop()
                here.send(jobs[row])
                busy[here] = (child, row, time.monotonic() + stuck_after)
            if not busy:
                return out
            ready = wait(list(busy), timeout=max(0.0, min(t for _, _, t in busy.values()) - time.monotonic()))
            for here in list(busy):
                child, row, deadline = busy[here]
                try:
                    if here in ready:
                        out[row] = here.recv()
                        del busy[here]
                        idle.append((here, child))
                    elif time.monotonic() >= deadline:
                        raise TimeoutError
                except (EOFError, OSError, TimeoutError):
                    out[row] = Verdict(False, "budget", None)
                    del busy[here]
                    child.kill()
                    child.join()
                    here.close()
                    idle.append(start())
    finally:
        for here, child in idle + [(h, c) for h, (c, _, _) in busy.items()]:
            child.kill()
            child.join()
            here.close()


# ---------------------------------------------------------------- 9. command line


def main() -> None:
    ap = argparse.ArgumentParser(description="Score the responses of a JSON-lines file.")
    ap.add_argument("file")
    ap.add_argument("--response-key", default="response")
    ap.add_argument("--gold-key", default="gold")
    ap.add_argument("--score-key", default="recorded_score")
    ap.add_argument("--show-wrong", type=int, default=0, metavar="N")
    ap.add_argument("--workers", type=int, default=0)
    args = ap.parse_args()
    with open(args.file, encoding="utf-8") as f:
        rows = [json.loads(line) for line in f if line.strip()]
    start = time.perf_counter()
    verdicts = verify_many([r[args.response_key] for r in rows], [str(r[args.gold_key]) for r in rows], workers=args.workers)
    seconds = time.perf_counter() - start
    n = max(1, len(rows))
    print(f"{sum(v.correct for v in verdicts)}/{len(rows)} correct, {1e3 * seconds / n:.3f} ms per response")
    print(reasons(verdicts))
    for r, v in zip(rows, verdicts):
        if args.score_key in r and (str(r[args.score_key]).lower() in ("true", "1", "1.0")) != v.correct:
            print(f"differs: recorded {r[args.score_key]}, verdict {v.reason}, gold {r[args.gold_key]!r}, answer {v.answer!r}")
    for r, v in [(r, v) for r, v in zip(rows, verdicts) if not v.correct][:args.show_wrong]:
        print(f"{v.reason}: gold {r[args.gold_key]!r}, answer {v.answer!r}")


if __name__ == "__main__":
    main()
