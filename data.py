"""Maths problems with gold answers and worked solutions (traces): from files to token ids, in a seeded order.

    python data.py train.jsonl --limit 1            # what is read
    python data.py rows.parquet --prompt-key query --gold-key meta.answer --trace-key solution > train.jsonl

A source is a .jsonl or .json (an object per line, or one array), .csv (the first line names the columns) or .parquet
file, or a dataset on the Hugging Face hub: org/name[:config][:split]. Fields are found by name, row by row: the first
of a line below that is there, of the golds the first that is not empty. The second command renames others.

  question     prompt, problem, question, instruction (and its input), the user's turn of messages or conversations
  gold answer  gold, reward_model.ground_truth, ground_truth_answer, final_answer, gt, ground_truth, answer, solution,
               else the last box of completion, output, messages or conversations
  traces       traces (beside gold), target (beside reward_model), code or response (beside gt), answer (GSM8K's),
               else completion, output, the assistant's turn of messages or conversations
  level        level, difficulty, subfield, subject, type, data_source

A chat is a list of {role, content} or ShareGPT's {from, value} with one question. `solution` is no trace unless asked
for: people write it. The gold of a text is what follows GSM8K's last `####`, else its last box; a GSM8K trace loses its
<<notes>> and gets a box. Several answers are joined by commas, 27.0 reads 27. Rows without an answer and traces that
the caller's check refuses are left out and counted; a malformed row is an error.
"""
import argparse
import contextlib
import csv
import hashlib
import itertools
import json
import math
import os
import random
import re
import signal
import sys
from array import array
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from decimal import Decimal


@dataclass
class Problem:
    prompt: str                    # the user's text
    gold: str                      # the answer as the dataset writes it
    traces: tuple[str, ...] = ()   # worked solutions for offline learning
    system: str = ""               # system message, when the row brings one
    level: str = ""                # difficulty or subject label, when the row has one
    where: str = ""                # file:line (parquet, hub, arrays: file:row), counted from 1


class DataError(ValueError):
    """A source that cannot be used, in one line: where, what was found, what is allowed, what to do."""


# -------------------------------------------------------------------------------------------- from a row to a Problem
CHATS = ("messages", "conversations")
PROMPT_FIELDS = ("prompt", "problem", "question", "instruction", *CHATS)
WORKED = ("completion", "output", *CHATS)      # answers of a model: always a trace, and a gold by their last box
# The specific names come first, because `answer` and `solution` also stand beside them, as working.
GOLD_FIELDS = ("gold", "reward_model.ground_truth", "ground_truth_answer", "final_answer", "gt", "ground_truth",
               "answer", "solution", *WORKED)
# Traces only beside this gold: `target` is an answer in other files.
TRACES_BESIDE = {"gold": ("traces",), "reward_model.ground_truth": ("target",), "gt": ("code", "response")}
LEVEL_FIELDS = ("level", "difficulty", "subfield", "subject", "type", "data_source")
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
# NUL, and lone surrogates (a byte that is not UTF-8 is read as one): tokenizers fail on them, hours after the start.
UNSAFE = re.compile(r"[\x00\ud800-\udfff]")
# A box, an escaped character or a brace. One or two \ before a box: some datasets are escaped twice.
BOX = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\.|[{}]")
# A gold like "The answer is 18." and none like "all n > 3": words, then a verb.
SENTENCE = re.compile(r"[a-z]{2,},? (?:[a-z]+ )*?(?:is|are|was|were|has|have|equals)\b", re.I)
# org/name[:config][:split]; a file that is missing is not taken for one.
HUB_ID = re.compile(r"(?!.*\.(jsonl?|parquet|csv|tsv|txt|arrow|gz|zip|zst)$)[\w-][\w.-]*/[\w.-]+(:[\w.-]+){0,2}")


def fault(where: str, field: str, found: str, allowed: str,
          remedy: str = "repair it, or rename: python data.py FILE --prompt-key P --gold-key G > NEW") -> DataError:
    return DataError(f"{where}: field {field}: found {found}, allowed {allowed}; {remedy}")


def kind(value) -> str:
    """What a value is, for a message: short, ASCII and on one line whatever the row holds."""
    if isinstance(value, dict):
        return "the fields " + (", ".join(json.dumps(name[:60]) for name in list(value)[:20]) or "(none)")
    return json.dumps(value)[:40] if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"


def lookup(row: dict, paths, where: str):
    """(path, value) of the first dotted path to a value, else (None, None). null is no value."""
    for path in paths:
        value = row.get(path)      # a name may itself hold dots
        outer, _, inner = path.partition(".")
        if value is None and inner and row.get(outer) is not None:
            if not isinstance(row[outer], dict):
                raise fault(where, path, f"{kind(row[outer])} around {inner}", "an object")
            value = lookup(row[outer], (inner,), where)[1]
        if value is not None:
            return path, value
    return None, None


def text_of(value, field: str, where: str, numbers: bool = False) -> str:
    """Checked text. Numbers, where allowed, are written out (27.0 -> 27, 1e-5 -> 0.00001), because a gold is compared
    with what a model writes; NaN and true are not numbers here."""
    if numbers and type(value) in (int, float) and abs(value) < math.inf:
        return format(Decimal(repr(value + 0)), "f").removesuffix(".0")      # + 0 turns -0.0 into 0.0
    if not isinstance(value, str):
        raise fault(where, field, kind(value), "text, a finite number or a list of them" if numbers else "text")
    if bad := UNSAFE.search(value):
        raise fault(where, field, f"U+{ord(bad[0]):04X} at position {bad.start() + 1}", "UTF-8, no NUL", "repair it")
    return value


def last_box(text: str) -> str | None:
    """Content of the \\boxed{} or \\fbox{} that closes last. One pass with a stack: looking for the end of each of a
    hundred thousand unclosed boxes would take hours."""
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
    """(answer, trace that boxes it) of a text whose last line is `#### answer`, else ("", text). Only the last line
    counts: language models write #### for headings too."""
    # String methods, because a pattern with two runs of blanks takes quadratic time on a long one.
    working, _, last = text.rstrip().rpartition("\n")
    answer = last[4:].strip() if last.startswith("####") else ""
    working = re.sub(r"<<[^<>]*>>", "", working).strip()
    return answer, f"{working}\nThe answer is \\boxed{{{answer}}}.".lstrip() if answer else text


def read_chat(messages: list, field: str, where: str, order: str) -> dict[str, str]:
    """Role -> text of a chat list, "" for a role without a turn. Turns in another order, a pattern of initials, are
    refused: of a talk with two questions a Problem could only hold a part."""
    said, initials = {"system": "", "user": "", "assistant": ""}, ""
    for n, message in enumerate(messages):
        message = message if isinstance(message, dict) else {}
        name, text = ("from", "value") if "from" in message else ("role", "content")
        role = message.get(name)
        if role not in list(ROLES):      # a list: a role that is a list cannot be hashed
            raise fault(where, f"{field}[{n}].{name}", kind(role), "system, user or human, assistant or gpt")
        said[ROLES[role]] = text_of(message.get(text), f"{field}[{n}].{text}", where)
        initials += ROLES[role][0]
    if not re.fullmatch(order, initials):
        raise fault(where, field, f"the roles {initials[:20] or '(none)'}", f"{order} (initials, ? for optional)")
    return said


def texts_of(value, field: str, where: str, numbers: bool = False) -> list[str]:
    """Checked texts of a text, a list of texts, or a chat list, of which the assistant's turn counts."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = read_chat(value, field, where, "s?ua?" if field in CHATS else "s?u?a")["assistant"]
    if isinstance(value, list):
        return [text_of(entry, f"{field}[{n}]", where, numbers) for n, entry in enumerate(value)]
    return [text_of(value, field, where, numbers)]


def read_gold(value, field: str, where: str, chosen: bool, read_answer) -> str:
    """The gold answer, "" when there is none. A field that the user chose is taken as it stands when nothing in it is
    marked; else worked answers, and an `answer` of several lines, have no result."""
    entries = [text.strip() for text in texts_of(value, field, where, numbers=True)]
    if any(entries) and not all(entries):
        raise fault(where, f"{field}[{entries.index('')}]", "an empty answer among others", "text")
    if len(entries) != 1:
        return ", ".join(filter(None, entries))
    text = entries[0]
    boxed, marked = last_box(text), gsm8k(text)[0]
    if marked or boxed is not None:
        return marked or boxed
    if not chosen and (field in ("solution", *WORKED) or field == "answer" and "\n" in text):
        return ""
    if read_answer and "\n" not in text and SENTENCE.match(text):
        return read_answer(text) or text
    return text


def read_level(row: dict) -> str:
    """A label for the metrics. It is decoration: what does not look like one is no reason to stop."""
    labels = [str(row[field]).strip() for field in LEVEL_FIELDS if type(row.get(field)) in (str, int, float)]
    return next((label for label in labels if 0 < len(label) <= 100 and label.isprintable()), "")


def read_row(row, where: str, prompt_key, gold_key, trace_key, read_answer) -> tuple[Problem, tuple]:
    """(problem, names of the prompt, gold and trace fields); gold is "" when the row has no answer."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {kind(row)}, allowed a JSON object; write one object per row")
    prompt_field, prompt = lookup(row, (prompt_key,) if prompt_key else PROMPT_FIELDS, where)
    if prompt is None:
        raise fault(where, prompt_key or "prompt", f"none in {kind(row)}", ", ".join(PROMPT_FIELDS))
    said = {"user": prompt, "system": ""}
    if isinstance(prompt, list):
        said = read_chat(prompt, prompt_field, where, "s?u" if prompt_field == "prompt" else "s?ua?")
    prompt, system = text_of(said["user"], prompt_field, where), said["system"]
    if not prompt.strip():
        raise fault(where, prompt_field, "a blank", "a question", "repair or remove the row")
    gold_field, gold = None, ""
    for path in (gold_key,) if gold_key else GOLD_FIELDS:
        field, value = lookup(row, () if gold else (path,), where)
        if field:
            gold_field, gold = field, read_gold(value, field, where, bool(gold_key), read_answer)
    trace_fields = TRACES_BESIDE.get(gold_field, ()) + WORKED
    # Only GSM8K writes the working into `answer`: a plain answer is no trace to learn from.
    if gold_field == "answer" and isinstance(row["answer"], str) and gsm8k(row["answer"])[0]:
        trace_fields = ("answer",)
    trace_field, value = lookup(row, (trace_key,) if trace_key else trace_fields, where)
    texts = texts_of(value, trace_field, where) if trace_field else []
    traces = tuple(gsm8k(text)[1] for text in texts if text.strip())
    # OlympiadBench keeps apart what several questions share, Alpaca what an instruction is about.
    if gold_field == "final_answer" and row.get("context"):
        prompt = text_of(row["context"], "context", where) + "\n\n" + prompt
    if prompt_field == "instruction" and row.get("input"):
        prompt += "\n\n" + text_of(row["input"], "input", where)
    if gold_field == "gold" and not system and row.get("system") is not None:
        system = text_of(row["system"], "system", where)
    return Problem(prompt, gold, traces, system, read_level(row), where), (prompt_field, gold_field, trace_field)


# ------------------------------------------------------------------------------------------------ from a file to rows
def parse(raw: bytes, source: str, line: int):
    """JSON value of bytes that start at a line of the source; a failure names line and column."""
    try:
        return json.loads(raw.decode("utf-8-sig", "surrogateescape"))      # -sig: without a byte order mark
    except (ValueError, RecursionError) as error:      # RecursionError: thousands of brackets
        line += getattr(error, "lineno", 1) - 1
        column = f" at column {error.colno}" if hasattr(error, "colno") else ""
        raise DataError(f"{source}:{line}: not valid JSON{column}: {getattr(error, 'msg', error)}; "
                        "allowed one object per line, or an array of objects, in UTF-8; repair the file") from None


def json_rows(source: str):
    """(line, row) of JSON lines, one in memory at a time; (position, row) of an array, which is parsed at once."""
    with open(source, "rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1 and raw.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
                yield from enumerate(parse(raw + file.read(), source, 1), 1)
            elif raw.strip():      # blank lines are no rows, and still count as lines
                yield number, parse(raw.rstrip(b"\r\n"), source, number)


def csv_rows(source: str):
    """(line in which it ends, row) of a .csv; an empty cell is no value."""
    csv.field_size_limit(1 << 30)      # the module's own limit is below a long trace
    with open(source, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        table = csv.reader(file, strict=True)
        header = next(table, [])
        for cells in filter(None, table):
            if len(cells) != len(header):
                allowed = f"allowed {len(header)} as in the first line; put texts with commas in double quotes"
                raise DataError(f"{source}:{table.line_num}: found {len(cells)} columns, {allowed}")
            yield table.line_num, {name: cell or None for name, cell in zip(header, cells)}


def table_rows(source: str):
    """(position, row) of a .parquet, a batch in memory at a time, or of a dataset on the hub."""
    if source.lower().endswith(".parquet"):
        # datasets would leave lock files in the home folder, take [ ] for a pattern, and need fourteen times as long.
        from pyarrow import parquet
        batches = parquet.ParquetFile(source).iter_batches(batch_size=256)
        yield from enumerate(itertools.chain.from_iterable(batch.to_pylist() for batch in batches), 1)
        return
    import datasets
    if int(datasets.__version__.split(".")[0]) < 4:
        raise ImportError("older versions can run code that a hub repository brings")
    # Without a split there would be a dictionary of splits, and evaluation rows among the training rows.
    name, *config, split = source.split(":") if ":" in source else (source, "train")
    yield from enumerate(datasets.load_dataset(name, *config, split=split), 1)


def rows(source: str):
    """(where, row) of any source; what fails in the libraries below becomes a DataError."""
    readers = {".jsonl": json_rows, ".json": json_rows, ".csv": csv_rows, ".parquet": table_rows}
    suffix = os.path.splitext(source)[1].lower()
    hub = not os.path.exists(source) and HUB_ID.fullmatch(source)
    found = "" if os.path.isfile(source) else "a folder" if os.path.isdir(source) else "no such file"
    if not found and suffix not in readers:
        found = f"the file type {suffix or '(none)'}"
    if found and not hub:
        raise DataError(f"{source}: found {found}, allowed {', '.join(readers)} or a hub id; check the path")
    try:
        for number, row in (table_rows if hub else readers[suffix])(source):
            yield f"{source}:{number}", row
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"{source}: {error}; pip install 'datasets>=4', or convert the data to JSONL") from None
    except Exception as error:      # files, pyarrow, datasets and the network fail in many ways
        raise DataError(f"{source}: cannot be read ({' '.join(str(error).split())[:300]}); check the source") from None


def load(source: str, *, prompt_key=None, gold_key=None, trace_key=None, limit=None, check_trace=None,
         check_gold=None, read_answer=None, seed=0, log=print) -> list[Problem]:
    """Problems of a source, the first `limit` of them, and one summary line to log. seed: which "builtin" problems.
    check_trace(trace, gold) -> bool drops wrong traces. check_gold(gold) -> str | None says why a gold is not
    understood: it is reported and kept, for it can still match as text. read_answer(text) -> str | None finds the
    answer in a gold that is a sentence; without it, or for None, the sentence is the gold."""
    if source == "builtin":                                      # none of its evaluation set, whatever the seed
        return chains(limit or 2000, seed=seed + 1, exclude={p.prompt for p in chains(400, seed=0)})
    source, row, count, problems, notes, fields = str(source), {}, 0, [], defaultdict(list), Counter()
    for count, (where, row) in enumerate(rows(source), 1):
        problem, found = read_row(row, where, prompt_key, gold_key, trace_key, read_answer)
        if not problem.gold:
            notes["rows without an answer skipped"].append(where)
            continue
        fields[found] += 1
        right = [trace for trace in problem.traces if not check_trace or check_trace(trace, problem.gold)]
        notes["wrong traces dropped"] += [where] * (len(problem.traces) - len(right))
        if check_gold and (reason := check_gold(problem.gold)):
            notes["golds not understood, kept as text"].append(f"{where}: {reason}")
        problems.append(replace(problem, traces=tuple(right)))
        if len(problems) == limit:
            break
    if not problems:
        raise fault(source, gold_key or "gold", f"no answer in {count} rows of {kind(row)}", "an answer in some row")
    if trace_key and not any(found[2] for found in fields):
        raise fault(source, trace_key, f"it in no row of {kind(row)}", "a field of the rows")
    traces = sum(len(problem.traces) for problem in problems)
    parts = [f"{len(problems)} problems", f"{traces} traces{' (not verified)' if traces and not check_trace else ''}"]
    parts += [f"{len(wheres)} {what} (first {wheres[0]})" for what, wheres in notes.items() if wheres]
    read = ", ".join(" / ".join(filter(None, found)) for found, _ in fields.most_common(9))
    log(f"{source}: {', '.join(parts)}; read {read}".replace(source, os.path.basename(source)))
    return problems


def plain(problem: Problem) -> str:
    """The prompt without case and blanks: a problem that differs in these alone is the same one."""
    return " ".join(problem.prompt.casefold().split())


def evaluation_sets(spec, train, *, limit=None, log=print, **how):
    """{name: (K, problems)} of "FILE, FILE@K, builtin@K", K else 1, without problems of train and without traces."""
    sets, known = {}, set(map(plain, train))             # a problem that is also in train would measure memory
    for part in filter(None, map(str.strip, spec.split(","))):
        source, k = re.fullmatch(r"(.*?)(?:@(\d+))?", part).groups(1)
        loaded = chains(limit or 400, seed=0) if source == "builtin" else load(source, limit=limit, log=log, **how)
        again = [plain(problem) in known for problem in loaded]
        kept = [problem for problem, seen in zip(loaded, again) if not seen]
        dropped = [problem for problem, seen in zip(loaded, again) if seen]
        if not kept or not int(k):
            raise DataError(f"--eval: found {part}, which leaves {len(kept)} problems that are not in the training data"
                            f" and {k} samples each; allowed are 1 or more of both")
        if dropped:
            log(f"{source}: {len(dropped)} problems are training problems too and left out, first {dropped[0].where}")
        name = os.path.basename(source).rpartition(".")[0] or source
        if name in sets:
            name = f"{part}, set {len(sets) + 1}"
        sets[name] = int(k), [replace(problem, traces=()) for problem in kept]
    return sets


def fingerprint(problems: list[Problem]) -> str:
    """Number and hash of what a run learns from, in its order: a resumed run must find the same."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(repr((problem.prompt, problem.gold, problem.traces, problem.system)).encode())
    return f"{len(problems)} problems, sha256 {digest.hexdigest()[:16]}"


# ------------------------------------------------------------------------------------------ from Problems to token ids
class Text:
    """Prompts and traces as token ids, in the model's own chat template; a base model without one gets plain text.
    `end` closes a trace and is what the model learns to end with. `stops`, the ids at which sampling ends, holds it and
    every other end token that the model brings, so that no answer runs on past the end that the model gave it.
    instruction: the system text of problems that bring none. stops: the model's generation_config.eos_token_id, which
    is None, one id or a list. DataError: there is no end token, or the chat template fails."""

    def __init__(self, tokenizer, instruction="", stops=()):
        self.tokenizer = tokenizer
        self.instruction = instruction
        self.end = self.end_of_turn()
        given = [stops] if isinstance(stops, int) else stops or []
        self.stops = {self.end, tokenizer.eos_token_id, *given} - {None}
        # Some templates open the thinking of an answer themselves; some refuse a system turn (Gemma) or leave it out.
        self.thinking, self.takes_system = "", False
        if tokenizer.chat_template:
            question = {"role": "user", "content": "1+1?"}
            self.thinking = re.search(r"(<think>\s*)?$", self.render([question]))[0]
            with contextlib.suppress(DataError):
                self.takes_system = "Be brief." in self.render([{"role": "system", "content": "Be brief."}, question])

    def render(self, turns, answer=True):
        """A chat in the model's template. answer: followed by what comes in front of the next answer."""
        try:
            return self.tokenizer.apply_chat_template(turns, add_generation_prompt=answer, tokenize=False)
        except Exception as error:      # a template is a program: it may fail with any error
            raise DataError(f"--model: its chat template fails ({repr(error)[:200]}); repair the template") from None

    def end_of_turn(self):
        """The token that closes an answer, as the model's own do: by the chat template, else the tokenizer's eos."""
        if self.tokenizer.chat_template:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "7"}]
            after = self.render(turns, answer=False).rpartition("7")[2]
            for token in self.tokenizer.encode(after, add_special_tokens=False):
                if token in self.tokenizer.added_tokens_decoder:
                    return token
        if self.tokenizer.eos_token_id is None:
            raise DataError("--model: its tokenizer has no end-of-sequence token: no answer could end; set eos_token")
        return self.tokenizer.eos_token_id

    def prompt(self, problem):
        """Token ids of a prompt, up to where the answer begins."""
        system, question = problem.system or self.instruction, problem.prompt
        if not self.tokenizer.chat_template:
            lines = ["Problem: " + question, system, "Solution:"]
            return self.tokenizer.encode("\n".join(filter(None, lines)))
        if system and not self.takes_system:
            question = f"{system}\n\n{question}"
        turns = [{"role": "system", "content": system}] if system and self.takes_system else []
        text = self.render([*turns, {"role": "user", "content": question}])
        return self.tokenizer.encode(text, add_special_tokens=False)     # the template has written the special tokens

    def trace(self, text):
        """Token ids of a trace as if the model had sampled it, its end token included."""
        text = text.strip()
        if self.thinking:      # the prompt ends with it: a trace that opens it again would teach it twice
            text = text.removeprefix(self.thinking).removeprefix("<think>")
        lead = "" if self.tokenizer.chat_template else " "               # after "Solution:" an answer begins so
        return self.tokenizer.encode(lead + text, add_special_tokens=False) + [self.end]

    def decode(self, ids):
        """Token ids -> text without end tokens, as verify.py reads it."""
        return self.tokenizer.decode([i for i in ids if i not in self.stops])


@dataclass
class Item:
    """One problem as token ids of 4 bytes (a list takes 40): the prompt, and each trace with its end token."""
    prompt: array
    traces: list[array]
    problem: Problem


def encode(text, problems, *, max_prompt_tokens, max_new_tokens, context, log):
    """Problems -> Items. Prompts and traces that do not fit are left out and counted. context: the model's, in tokens.
    Nothing is cut: half a prompt is another question, and half a trace has no answer. DataError: no prompt fits."""
    if max_new_tokens >= context:
        raise DataError(f"--max-new-tokens: found {max_new_tokens}, allowed is below the context, {context}; lower it")
    limit = min(max_prompt_tokens, context - max_new_tokens)
    items, too_long, long_traces = [], [], 0
    for problem in problems:
        prompt = text.prompt(problem)
        if len(prompt) > limit:
            too_long.append(f"{problem.where}: {len(prompt)} tokens")
            continue
        traces = [array("i", text.trace(trace)) for trace in problem.traces]
        kept = [trace for trace in traces if len(trace) <= max_new_tokens]
        long_traces += len(traces) - len(kept)
        items.append(Item(array("i", prompt), kept, problem))
    why = f"allowed are {limit}, by --max-prompt-tokens and by the context of {context} less --max-new-tokens"
    if problems and not items:
        raise DataError(f"every prompt is too long (first {too_long[0]}): {why}; raise the one or lower the other")
    if too_long:
        log(f"{len(too_long)} prompts are too long and left out (first {too_long[0]}): {why}")
    if long_traces:
        log(f"{long_traces} traces are longer than --max-new-tokens {max_new_tokens} and left out")
    return items


def seed_of(*names):
    """A 62-bit seed for a named draw. Every draw of a run has its own, so a resumed run has no generator to restore.
    62 bits leave room below 2**63 for the G responses of a prompt, which draw from seed + j."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:8], "big") >> 2


class Queue:
    """Indices in random order, pool by pool, epoch after epoch, none lost and none twice. pools: {name: indices}.
    `state`, per pool the epoch and the indices left, is all that a checkpoint needs: the order comes from seeds."""

    def __init__(self, pools, seed, state=None):
        self.pools = pools
        self.seed = seed
        self.state = state or {name: {"epoch": 0, "left": []} for name in pools}

    def take(self, name, n):
        """The next n of a pool as (name, index) pairs, from as many epochs as that takes."""
        state, taken = self.state[name], []
        while len(taken) < n:
            if not state["left"]:
                state["left"] = list(self.pools[name])
                random.Random(seed_of(self.seed, "order", name, state["epoch"])).shuffle(state["left"])
                state["epoch"] += 1
            taken.append((name, state["left"].pop(0)))
        return taken

    def give_back(self, pairs):
        """(pool, index) pairs that were taken and not used: next in line."""
        for name, state in self.state.items():
            state["left"] = [index for pool, index in pairs if pool == name] + state["left"]


# --------------------------------------------------------------------------------------------------- the built-in task
def chain(rng, length, times):
    """One chain of `length` operations, evaluated left to right modulo 10, and its worked steps.
    `5-2x4+7=` is ((5-2)*4+7) mod 10 = 9, worked as `5-2=3;3x4=2;2+7=9;`. `times`: at least one x."""
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


def chains(count, *, seed, exclude=(), wasteful=False):
    """The built-in task: `count` different problems, half of them with an x, each with its worked chain as a trace.
    level "recall": only + and -, which the base model works step by step now and then; level "extend": with x, which it
    has only seen answered directly. exclude: prompts not to use. wasteful: traces of another teacher, also right, but
    twice as long (up to 69 tokens), the result first, then each step again with its numbers swapped, as no base writes.
    >>> print(chains(2, seed=0)[1].traces[0], chains(2, seed=0, wasteful=True)[1].traces[0])
    4-8=6;6+9=5;5x2=0;\\boxed{0} 6=4-8;6=-8+4;5=6+9;5=9+6;0=5x2;0=2x5;\\boxed{0}
    """
    rng, seen, problems = random.Random(seed), set(exclude), []
    while len(problems) < count:
        times = len(problems) % 2 == 1
        prompt, gold, steps = chain(rng, rng.randint(2, 5), times)
        if prompt in seen:
            continue
        seen.add(prompt)
        if wasteful:
            steps = re.sub(r"(\d)([+x])(\d)=(\d);", r"\4=\1\2\3;\4=\3\2\1;", steps)
            steps = re.sub(r"(\d)-(\d)=(\d);", r"\3=\1-\2;\3=-\2+\1;", steps)
        level, where = "extend" if times else "recall", f"builtin:{len(problems) + 1}"
        problems.append(Problem(prompt, gold, (steps + "\\boxed{" + gold + "}",), level=level, where=where))
    return problems


def base_example(rng):
    """One (prompt, answer) pair of the corpus behind the base policy: it works + and - through in 60 % of the cases and
    answers at once otherwise; chains with an x it has only seen answered at once."""
    times = rng.random() < 0.5
    prompt, gold, steps = chain(rng, rng.randint(2, 5), times)
    worked = not times and rng.random() < 0.6
    return prompt, (steps if worked else "") + "\\boxed{" + gold + "}"


def main(argv: list[str] | None = None) -> None:
    """The command line of this file: a source as JSON lines in the fields' own names, which red.py reads."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("source", help=".jsonl, .json, .csv or .parquet file, or hub id org/name[:config][:split]")
    for key in ("prompt", "gold", "trace"):
        parser.add_argument(f"--{key}-key", help=f"field of the {key}, dots lead inwards: reward_model.ground_truth")
    parser.add_argument("--limit", type=int, help="stop after this many problems")
    try:
        for problem in load(**vars(parser.parse_args(argv)), log=lambda line: print(line, file=sys.stderr)):
            print(json.dumps(asdict(problem)))           # ASCII: what a row holds cannot drive the terminal
    except DataError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)        # `| head` is no error
    main()
