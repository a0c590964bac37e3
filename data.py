"""Read maths problems, their gold answers and their worked solutions (traces) from files.

    python data.py train.jsonl                      # the summary line and the first problem
    python data.py rows.parquet --prompt-key question --gold-key meta.answer --trace-key solutions

A source is a .jsonl, .json (an array, or one object per line) or .parquet file, or a dataset on the
Hugging Face hub: org/name, org/name:split or org/name:config:split.  Fields are found by name, row by
row; the first that is present and not null counts, and the summary says which were read:
  prompt  prompt (text, or a chat list with at most one system and one user message), problem, question
  gold    gold, reward_model.ground_truth, ground_truth_answer, final_answer, gt, answer, solution
  traces  traces (beside gold), target (beside reward_model), code or response (beside gt), and GSM8K's
          answer; a human `solution` is a trace only on request (--trace-key solution)
A text that ends in GSM8K's `#### x` has the gold x, and as a trace loses its <<calculator notes>> and
closes with \\boxed{x}, the form that a checker of boxes rewards.  Otherwise the last complete \\boxed{}
of a gold text is the gold.  Several answers are joined by commas, units left out, 27.0 reads 27.
Rows without an answer are skipped, counted and named, and so are traces that the caller's check
refuses; a malformed row is an error.  Equal prompts stay separate rows and are counted.
"""
import argparse
import json
import math
import os
import random
import re
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from decimal import Decimal


@dataclass(frozen=True)
class Problem:
    prompt: str                    # the user's text
    gold: str                      # the answer as the dataset writes it
    traces: tuple[str, ...] = ()   # worked solutions for offline learning
    system: str = ""               # system message, when the row brings one
    level: str = ""                # difficulty or subject label, when the row has one
    where: str = ""                # file:line (parquet, hub, arrays: file:row), counted from 1


class DataError(ValueError):
    """A source that cannot be read, in one line: where, what was found, what is allowed, what to do."""


PROMPT_FIELDS = ("prompt", "problem", "question")
# Gold field -> fields that may hold its traces. The order decides for a row that has several: the
# specific names come first, because `answer` and `solution` also stand beside them, as working.
GOLD_FIELDS = {"gold": ("traces",), "reward_model.ground_truth": ("target",), "ground_truth_answer": (),
               "final_answer": (), "gt": ("code", "response"), "answer": ("answer",), "solution": ()}
LEVEL_FIELDS = ("level", "difficulty", "subfield", "subject", "type", "data_source")
MAX_LINE = 64 << 20  # bytes: a file without line ends must not fill the memory
MAX_TEXT = 1_000_000  # characters of a prompt, gold or trace: far above any context length
# NUL and lone surrogates: tokenizers and UTF-8 writers fail on them, hours after the start.
UNSAFE = re.compile(r"[\x00\ud800-\udfff]")
# A box, an escaped character or a brace. One or two \ before a box: some datasets are escaped twice.
BOX = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\.|[{}]")
# org/name[:config][:split]; a file that is missing is not taken for one.
HUB_ID = re.compile(r"(?!.*\.(jsonl?|parquet|csv|tsv|txt|arrow|gz|zip|zst)$)[\w-][\w.-]*/[\w.-]+(:[\w.-]+){0,2}")


def fault(where: str, field: str, found: str, allowed: str,
          remedy: str = "repair the row or name another field with --prompt-key, --gold-key, --trace-key") -> DataError:
    return DataError(f"{where}: field {field}: found {found}, allowed {allowed}; {remedy}")


def kind(value) -> str:
    """What a value is, for a message: short, ASCII and on one line whatever the row holds."""
    return json.dumps(value)[:40] if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"


def listed(row: dict) -> str:
    return ", ".join(json.dumps(name[:60]) for name in list(row)[:20]) or "none"


def lookup(row: dict, paths, where: str):
    """(path, value) of the first dotted path that leads to a value, else (None, None). null is no value:
    parquet writes it for every field that a row lacks."""
    for path in paths:
        value, names = (row[path], []) if path in row else (row, path.split("."))
        for name in names:
            if not isinstance(value, dict):
                raise fault(where, path, f"{kind(value)} around {name}", "an object")
            value = value.get(name)
            if value is None:
                break
        if value is not None:
            return path, value
    return None, None


def text_of(value, field: str, where: str, numbers: bool = False) -> str:
    """Checked text. Numbers, where allowed, are written out (27.0 -> 27, 1e-5 -> 0.00001), because a
    gold is compared with what a model writes; NaN and true are not numbers here."""
    number = numbers and isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and abs(value) < math.inf:
        # repr is the shortest text that reads back as this number; + 0 turns -0.0 into 0.0.
        return format(Decimal(repr(value + 0)), "f").removesuffix(".0")
    if not isinstance(value, str):
        raise fault(where, field, kind(value), "text, a finite number or a list of them" if numbers else "text")
    if len(value) > MAX_TEXT:
        raise fault(where, field, f"{len(value)} characters", f"at most {MAX_TEXT}", "shorten or remove the row")
    if bad := UNSAFE.search(value):
        raise fault(where, field, f"the character U+{ord(bad[0]):04X} at position {bad.start() + 1}",
                    "text without NUL and lone surrogates", "remove that character")
    return value


def last_box(text: str) -> str | None:
    """Content of the \\boxed{} or \\fbox{} that closes last. One pass with a stack: looking for the end
    of each of a hundred thousand unclosed boxes would take hours."""
    starts, content = [], None
    # The stack holds, for each open brace, where the content of its box starts; None for a plain brace.
    for token in BOX.finditer(text):
        if token[0] == "{" or len(token[0]) > 2:
            starts.append(token.end() if len(token[0]) > 1 else None)
        elif token[0] == "}" and starts:
            start = starts.pop()
            content = content if start is None else text[start:token.start()].strip()
    return content


def gsm8k(text: str) -> tuple[str, str]:
    """(answer, trace that boxes it) of a text whose last line is `#### answer`, else ("", text). Only
    the last line counts: language models write #### for headings too."""
    # String methods, because a pattern with two runs of blanks takes quadratic time on a long one.
    working, _, last = text.rstrip().rpartition("\n")
    answer = last[4:].strip() if last.startswith("####") else ""
    working = re.sub(r"<<[^<>]*>>", "", working).strip()
    return answer, f"{working}\nThe answer is \\boxed{{{answer}}}.".lstrip() if answer else text


def read_gold(value, field: str, where: str, chosen: bool) -> str:
    """The gold answer, "" when there is none. A field that the user chose is taken as it stands when
    nothing in it is marked; else a `solution`, or an `answer` of several lines, has no result."""
    if isinstance(value, list):
        entries = [text_of(entry, f"{field}[{n}]", where, True).strip() for n, entry in enumerate(value)]
        if any(entries) and not all(entries):
            raise fault(where, f"{field}[{entries.index('')}]", "an empty answer among others", "text")
        return ", ".join(filter(None, entries))
    text = text_of(value, field, where, True).strip()
    boxed, working = last_box(text), field == "solution" or field == "answer" and "\n" in text
    return gsm8k(text)[0] or (boxed if boxed is not None else "" if working and not chosen else text)


def read_chat(messages: list, field: str, where: str, order: str) -> dict[str, str]:
    """Role -> text of a chat list. A second user turn or a prefilled answer is refused by the order, a
    pattern of initials, because a Problem could only hold such a talk cut short."""
    said, initials = {"system": "", "user": "", "assistant": ""}, ""
    for n, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in tuple(said):  # a tuple: a role that is a list cannot be hashed
            raise fault(where, f"{field}[{n}].role", kind(role), "system, user or assistant")
        said[role] = text_of(message.get("content"), f"{field}[{n}].content", where)
        initials += role[0]
    if not re.fullmatch(order, initials):
        raise fault(where, field, f"the roles {initials[:20] or '(none)'}", f"{order} (initials, ? for optional)")
    return said


def read_traces(value, field: str, where: str) -> tuple[str, ...]:
    """Traces from one text, a list of texts, or a chat list that ends with the assistant's."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = read_chat(value, field, where, "s?u?a")["assistant"]
    if not isinstance(value, (str, list)):
        raise fault(where, field, kind(value), "text, a list of texts or a chat list")
    texts = [value] if isinstance(value, str) else value
    return tuple(gsm8k(text_of(text, f"{field}[{n}]", where))[1] for n, text in enumerate(texts))


def read_level(row: dict) -> str:
    """A label for the metrics. It is decoration: what does not look like one is no reason to stop."""
    labels = (str(row[field]).strip() for field in LEVEL_FIELDS
              if isinstance(row.get(field), (str, int, float)) and not isinstance(row[field], bool))
    return next((label for label in labels if label and len(label) <= 100 and label.isprintable()), "")


def read_row(row, where: str, prompt_key, gold_key, trace_key) -> tuple[Problem, tuple]:
    """(problem, names of the prompt, gold and trace fields); gold is "" when the row has no answer."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {kind(row)}, allowed a JSON object; write one object per row")
    prompt_field, prompt = lookup(row, (prompt_key,) if prompt_key else PROMPT_FIELDS, where)
    if prompt is None:
        raise fault(where, prompt_key or "prompt", f"nothing (fields: {listed(row)})", "prompt, problem or question")
    gold_field, gold = lookup(row, (gold_key,) if gold_key else GOLD_FIELDS, where)
    # The default trace fields depend on the gold field: math8k's `target` is an answer, verl's a solution.
    trace_field, traces = lookup(row, (trace_key,) if trace_key else GOLD_FIELDS.get(gold_field, ()), where)
    said = read_chat(prompt, prompt_field, where, "s?u") if isinstance(prompt, list) else {"user": prompt}
    prompt, system = text_of(said["user"], prompt_field, where), said.get("system", "")
    if not prompt.strip():
        raise fault(where, prompt_field, "a blank", "a question", "repair or remove the row")
    gold = "" if gold is None else read_gold(gold, gold_field, where, bool(gold_key))
    # Only GSM8K writes the working into `answer`: a plain answer is no trace to learn from.
    if not trace_key and trace_field == "answer" and not (isinstance(traces, str) and gsm8k(traces)[0]):
        trace_field = None
    traces = read_traces(traces, trace_field, where) if trace_field else ()
    # OlympiadBench keeps what several questions share apart; our own rows may bring a system message.
    if gold_field == "final_answer" and row.get("context"):
        prompt = text_of(row["context"], "context", where) + "\n\n" + prompt
    if gold_field == "gold" and not system and row.get("system") is not None:
        system = text_of(row["system"], "system", where)
    problem = Problem(prompt, gold, traces, system, read_level(row), where)
    return problem, (prompt_field, gold_field, trace_field)


def unique_keys(pairs: list) -> dict:
    """json keeps the last of two equal keys, so a wrong answer could silently replace the right one."""
    row = dict(pairs)
    if len(row) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {json.dumps(twice[:40])} appears twice")
    return row


def parse(raw: bytes, source: str, line: int):
    """JSON value of bytes that start at a line of the source; a failure names line and column."""
    column = 0
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        column, reason = error.start - raw.rfind(b"\n", 0, error.start), "a byte that is not UTF-8"
    except json.JSONDecodeError as error:
        line, column, reason = line + error.lineno - 1, error.colno, error.msg
    # RecursionError: thousands of brackets. ValueError: equal keys, or a number of 5,000 digits.
    except (RecursionError, ValueError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    raise DataError(f"{source}:{line}: not valid JSON{f' at column {column}' if column else ''}: {reason}; "
                    "allowed one object per line, in .json also an array of objects, in plain UTF-8; repair the file")


def json_rows(source: str):
    """(where, row) for lines of JSON with one line in memory at a time, or for the array in a .json,
    which is parsed whole."""
    with open(source, "rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            if number == 1 and source.lower().endswith(".json") and raw.lstrip().startswith(b"["):
                raw += file.read()
                yield from ((f"{source}:{n}", row) for n, row in enumerate(parse(raw, source, 1), 1))
            elif len(raw) > MAX_LINE:
                raise DataError(f"{source}:{number}: found a line above {MAX_LINE} bytes; write one object per line")
            # Blank lines separate and end files; they are no rows, and still count as lines.
            elif raw.strip():
                yield f"{source}:{number}", parse(raw.rstrip(b"\r\n"), source, number)


def table_rows(source: str):
    """(where, row) of a parquet file, a batch in memory at a time, or of a dataset on the hub."""
    if source.lower().endswith(".parquet"):
        # pyarrow is what datasets reads with. datasets itself would leave lock files in the home folder,
        # take [ ] in a path for a pattern, and need fourteen times as long.
        from pyarrow import parquet
        table = (row for batch in parquet.ParquetFile(source).iter_batches(batch_size=256) for row in batch.to_pylist())
    else:
        import datasets
        if int(datasets.__version__.split(".")[0]) < 4:
            raise ImportError("older versions can run code that a hub repository brings")
        # Without a split there would be a dictionary of splits, and evaluation rows among the training rows.
        name, *config, split = source.split(":") if ":" in source else (source, "train")
        try:
            table = datasets.load_dataset(name, *config, split=split)
        except datasets.exceptions.DatasetsError as error:
            raise OSError(str(error)) from None
    yield from ((f"{source}:{n}", row) for n, row in enumerate(table, 1))


def rows(source: str):
    """(where, row) of any source; what fails in the libraries below becomes a DataError."""
    suffix, there = os.path.splitext(source)[1].lower(), os.path.exists(source)
    hub = not there and HUB_ID.fullmatch(source)
    found = ("no such file" if not there else "a folder" if os.path.isdir(source) else
             "no plain file" if not os.path.isfile(source) else
             f"the file type {suffix or '(none)'}" if suffix not in (".jsonl", ".json", ".parquet") else
             "an empty file" if not os.path.getsize(source) else "")
    if found and not hub:
        raise DataError(f"{source}: found {found}, allowed .jsonl, .json, .parquet or a hub id; check the path")
    try:
        yield from (table_rows if hub or suffix == ".parquet" else json_rows)(source)
    except ImportError as error:
        raise DataError(f"{source}: {error}; pip install 'datasets>=4', or convert the data to JSONL") from None
    # NotImplementedError: pyarrow on a compression or type that it was built without.
    except (OSError, ValueError, NotImplementedError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{source}: cannot be read ({' '.join(str(error).split())[:300]}); check the source") from None


def load(source: str, *, prompt_key=None, gold_key=None, trace_key=None, limit=None, check_trace=None,
         check_gold=None, log=print) -> list[Problem]:
    """Problems of a source, the first `limit` of them, and one summary line to log.
    check_trace(trace, gold) -> bool drops wrong traces; check_gold(gold) -> str | None says why a gold
    cannot be understood, which is reported; the problem is kept, for it can still match as text."""
    if limit is not None and limit < 1:
        raise DataError(f"{source}: limit: found {limit}, allowed 1 or more; leave it out to read all rows")
    source, row, problems, notes, fields = str(source), {}, [], defaultdict(list), Counter()
    for where, row in rows(source):
        problem, found = read_row(row, where, prompt_key, gold_key, trace_key)
        fields[found] += 1
        if not problem.gold:
            notes["rows without an answer skipped"].append(where)
            continue
        right = tuple(t for t in problem.traces if t.strip() and (not check_trace or check_trace(t, problem.gold)))
        if len(right) < len(problem.traces):
            notes["wrong or empty traces dropped"] += [where] * (len(problem.traces) - len(right))
        if check_gold and (reason := check_gold(problem.gold)):
            notes["golds not understood, kept as text"].append(f"{where}: {reason}")
        problems.append(replace(problem, traces=right))
        if len(problems) == limit:
            break
    if not problems:
        raise fault(source, gold_key or "gold", f"no answer in {fields.total()} rows (fields: {listed(row)})",
                    gold_key or " or ".join(GOLD_FIELDS))
    # A misspelt --trace-key would otherwise train without a single trace and say nothing.
    if trace_key and not any(found[2] for found in fields):
        raise fault(source, trace_key, f"it in no row (fields: {listed(row)})", "a field of the rows")
    traces = sum(len(problem.traces) for problem in problems)
    # Hashes, because a set of the prompts themselves would hold the file twice.
    repeated = len(problems) - len({hash(normal(problem.prompt)) for problem in problems})
    parts = [f"{len(problems)} problems", f"{traces} traces{' (not verified)' if traces and not check_trace else ''}"]
    parts += [f"{len(wheres)} {what} (first {wheres[0]})" for what, wheres in notes.items()]
    parts += [f"{repeated} repeated prompts kept"] if repeated else []
    read = ", ".join(" / ".join(filter(None, found)) for found, _ in fields.most_common(3))
    log(f"{source}: {', '.join(parts)}; read {read}".replace(source, os.path.basename(source)))
    return problems


def normal(prompt: str) -> str:
    """What makes two prompts the same question: the text but for case and blanks."""
    return " ".join(prompt.casefold().split())


def held_out(train: list[Problem], test: list[Problem]) -> tuple[list[Problem], list[Problem]]:
    """(kept, dropped) of test: a problem whose prompt is also in train would measure memory."""
    known = {normal(problem.prompt) for problem in train}
    kept = [problem for problem in test if normal(problem.prompt) not in known]
    return kept, [problem for problem in test if normal(problem.prompt) in known]


def chain(rng, length, times):
    """One chain of `length` operations, evaluated left to right modulo 10, and its worked steps.
    `5-2x4+7=` is ((5-2)*4+7) mod 10 = 9, worked as `5-2=3;3x4=2;2+7=9;`. `times`: at least one x.

    >>> chain(random.Random(4), 3, True)
    ('6+7-2x2=', '2', '6+7=3;3-2=1;1x2=2;')
    """
    operators = [rng.choice("+-x" if times else "+-") for _ in range(length)]
    if times and "x" not in operators:
        operators[rng.randrange(length)] = "x"
    value = rng.randrange(10)
    prompt, steps = str(value), ""
    for operator in operators:
        operand = rng.randint(2, 4) if operator == "x" else rng.randrange(10)
        result = {"+": value + operand, "-": value - operand, "x": value * operand}[operator] % 10
        prompt, steps = prompt + operator + str(operand), steps + f"{value}{operator}{operand}={result};"
        value = result
    return prompt + "=", str(value), steps


def chains(count, *, seed, exclude=()):
    """The built-in task: `count` different problems, half of them with an x, each with its worked chain as a trace.

    level "recall": only + and -, which the base model works step by step now and then; level "extend": with x,
    which it has only seen answered directly. A trace is the worked chain with the answer in a box.
    exclude: prompts not to use (the training set, when the evaluation set is drawn).
    """
    rng, seen, problems = random.Random(seed), set(exclude), []
    while len(problems) < count:
        times = len(problems) % 2 == 1
        prompt, gold, steps = chain(rng, rng.randint(2, 5), times)
        if prompt in seen:
            continue
        seen.add(prompt)
        problems.append(Problem(prompt, gold, (steps + "\\boxed{" + gold + "}",), level="extend" if times else "recall",
                                where=f"builtin:{len(problems) + 1}"))
    return problems


def base_example(rng):
    """One (prompt, answer) pair of the corpus behind the base policy: it works + and - through in 60 % of the cases and
    answers at once otherwise; chains with an x it has only seen answered at once."""
    times = rng.random() < 0.5
    prompt, gold, steps = chain(rng, rng.randint(2, 5), times)
    worked = not times and rng.random() < 0.6
    return prompt, (steps if worked else "") + "\\boxed{" + gold + "}"


def main(argv: list[str] | None = None) -> None:
    """The command line of this file: what a training or evaluation file holds."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("source", help=".jsonl, .json or .parquet file, or hub id org/name[:config][:split]")
    for key in ("prompt", "gold", "trace"):
        parser.add_argument(f"--{key}-key", help=f"field of the {key}, dots lead inwards: reward_model.ground_truth")
    parser.add_argument("--limit", type=int, help="stop after this many problems")
    # JSON with ASCII only: what a row holds cannot drive the terminal or fail on its encoding.
    try:
        print(json.dumps(asdict(load(**vars(parser.parse_args(argv)))[0]), indent=1))
    except DataError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
