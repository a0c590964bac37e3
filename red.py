"""red.py: RED on top of RAPID, the whole training loop for one node in one file.

RED (arXiv 2508.16677) puts RL with verifiable rewards and SFT on distilled traces into one objective; RAPID
(arXiv 2510.03515) samples in large batches and follows with several importance-weighted off-policy updates.
What differs from GRPO:

1. One inference phase serves H updates. Eq. (1) corrects each response by one weight pi/mu, clipped at eta = 2,
   where GRPO clips token by token around the policy that sampled; Eq. (5) ends a phase early if the weights degenerate.
2. The group value of Eq. (2) is importance-weighted too. There is no KL term and no reference model.
3. A response counts by its tokens over one constant per phase (Eq. 4), so neither short nor long ones are favoured.
4. Prompts that come with a distilled trace add the offline term of Eq. (8)-(11): its advantage stands beside the model's
   own group, its behaviour probability is set by the group's accuracy.
5. Eq. (6)-(7) weigh that term by how much each side still moves the entropy; Eq. (12) is the sum.

    python red.py                                                   the built-in task, on a laptop, in minutes
    python red.py --model DIR_OR_HUB_ID --train FILE --eval FILE    your model, your data
    python red.py --eval-only --model RUN --eval FILE --samples 4   mean@k and pass@k of a finished run
"""
import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
import rapid
import verify

VERSION = "0.1"


# ---------------------------------------------------------------------------------------------------------- settings
def opt(default, help, group=""):
    """A Config field: its default, its line in --help, and (on the first field of a group) the group's title."""
    return field(default=default, metadata={"help": help, "group": group})


@dataclass
class Config:
    """Every setting of a run; the command line is made from it (`--updates-per-phase 8` sets updates_per_phase)."""

    model: str = opt("", "model directory, finished run or hub id; empty: the built-in tiny model", "Model and data")
    train: str = opt("", "training file (.jsonl, .json, .parquet) or hub dataset id; empty: the built-in task")
    eval: str = opt("", "evaluation files, comma-separated; empty: the built-in held-out set, or none with --train")
    prompt_key: str = opt("", "field of the prompt, dots for nesting, where the schema is not recognised")
    gold_key: str = opt("", "field of the gold answer, likewise")
    trace_key: str = opt("", "field of the distilled trace or list of traces, likewise")
    limit: int = opt(0, "use the first N training problems; 0: all")
    eval_limit: int = opt(0, "use the first N problems of each evaluation file; 0: all")
    traced_problems: int = opt(0, "keep the traces of the first N problems that have any, drop the others'; 0: keep all")
    instruction: str = opt("Please reason step by step, and put your final answer within \\boxed{}.",
                           "system message of prompts that bring none; empty: none")
    trust_remote_code: bool = opt(False, "let the model directory run its own Python code")
    preset: str = opt("", "settings under the flags given: builtin (set by itself for the built-in task)")

    algo: str = opt("red", "red: Eq. (12) | rapid: Eq. (4) alone | grpo: token-level PPO clip | sft: traces alone", "Algorithm")
    prompts: int = opt(128, "B, prompts per update, over all ranks (sft: traces per update)")
    group: int = opt(8, "G, responses per prompt")
    updates_per_phase: int = opt(8, "H, updates per inference phase; 1: on-policy (no RAPID)")
    min_ess: float = opt(0.3, "Eq. (5): end the phase when the effective sample size falls below this fraction; 0: never")
    eta: float = opt(2.0, "Eq. (1): importance weights are clipped from above here")
    is_level: str = opt("sequence", "Eq. (1): one weight per sequence, or per token (less variance, biased)")
    baseline: str = opt("group", "Eq. (2): group value, or loo: without the response itself (unbiased)")
    adv_norm: str = opt("std", "Eq. (3): divide by the group's std, or none")
    off_weight: str = opt("dynamic", "Eq. (7): dynamic, or a number that replaces lam")
    entropy_decay: float = opt(0.9, "Eq. (6): smoothing d of the two entropies; 0: raw")
    policy_shift: str = opt("accuracy", "Eq. (8): accuracy | accuracy-reversed | on-policy | off-policy")
    shift_gamma: float = opt(0.1, "Eq. (8): gamma, the largest teacher weight beta")
    trace_fraction: float = opt(-1.0, "share of an update's prompts drawn from those with a trace; -1: as the data has them")

    temperature: float = opt(1.0, "sampling temperature of rollouts (the same in training)", "Sampling")
    max_prompt_tokens: int = opt(1024, "prompts with more tokens are left out and counted")
    max_new_tokens: int = opt(3072, "a response is cut here and counts as truncated; longer traces are left out")
    engine: str = opt("auto", "auto | hf (transformers) | vllm")
    sample_rows: int = opt(512, "hf engine: sequences sampled side by side")

    updates: int = opt(500, "optimizer steps", "Optimisation")
    lr: float = opt(1e-6, "learning rate of AdamW")
    warmup: int = opt(10, "updates of linear warm-up")
    weight_decay: float = opt(0.0, "decoupled weight decay")
    max_grad_norm: float = opt(1.0, "gradient norm is clipped here")
    tokens_per_microbatch: int = opt(16384, "padded tokens of one forward and backward pass")
    chunk: int = opt(1024, "tokens whose logits exist at one time")
    grad_checkpointing: bool = opt(False, "recompute activations in backward: less memory, about 1/3 more time")
    dtype: str = opt("auto", "compute: auto (bfloat16 autocast on GPU, float32 on CPU) | bfloat16 | float32; weights stay float32")

    eval_every: int = opt(50, "updates between evaluations; also before the first and after the last", "Evaluation")
    samples: int = opt(1, "responses per problem in evaluation: mean@k, pass@k")
    eval_temperature: float = opt(0.6, "sampling temperature of evaluation; 0: greedy")
    eval_only: bool = opt(False, "evaluate --model on --eval and stop")

    run: str = opt("", "run directory; empty: runs/ALGO-sSEED, numbered when taken", "Run")
    resume: str = opt("", "continue this run directory from its newest checkpoint; auto: the newest run under runs/")
    seed: int = opt(0, "seed of data order, sampling and initialisation")
    save_every: int = opt(50, "updates between checkpoints; there is one at the end too")
    keep: int = opt(2, "checkpoints kept")
    show_every: int = opt(20, "updates between printed samples, one right and one wrong; 0: never")
    device: str = opt("auto", "auto | cpu | cuda")
    threads: int = opt(0, "CPU threads of torch; 0: torch's own choice")
    max_bad_updates: int = opt(3, "stop after this many updates in a row whose loss or gradient is not finite")
    workers: int = opt(0, "processes that check answers; 0: in this one")


# The built-in task is small: a policy of 0.2 M parameters wants a learning rate 500 times that of a 1.5B model, and one
# thread (two wait for each other at this size: nine times slower on a busy two-core machine).
PRESETS = {
    "builtin": dict(prompts=32, group=4, updates_per_phase=4, lr=5e-4, updates=160, traced_problems=200, trace_fraction=0.5, max_prompt_tokens=32,
                    max_new_tokens=48, eval_every=40, samples=4, eval_temperature=1.0, warmup=5, save_every=40, show_every=40,
                    tokens_per_microbatch=32768, threads=1, instruction="", sample_rows=1024),
}
CHOICES = dict(algo="red rapid grpo sft", is_level="sequence token", baseline="group loo", adv_norm="std none",
               policy_shift="accuracy accuracy-reversed on-policy off-policy", engine="auto hf vllm",
               dtype="auto bfloat16 float32", device="auto cpu cuda")
MINIMUM = dict(prompts=1, group=2, updates_per_phase=1, updates=1, max_prompt_tokens=1, max_new_tokens=1, sample_rows=1,
               tokens_per_microbatch=1, chunk=1, samples=1, eval_every=1, save_every=1, keep=1, max_bad_updates=1, warmup=0, limit=0, eval_limit=0, traced_problems=0,
               show_every=0, threads=0, workers=0, temperature=1e-6, eval_temperature=0, lr=0, weight_decay=0, max_grad_norm=1e-12,
               eta=1e-12, min_ess=0, entropy_decay=0, shift_gamma=0)


class Stop(Exception):
    """A user's mistake or an impossible situation: main() prints it as one line and exits with code 2."""


def validate(cfg):
    """Refuse impossible settings before anything is loaded: flag, what was found, what is allowed, the remedy."""
    for name, allowed in CHOICES.items():
        if getattr(cfg, name) not in allowed.split():
            raise Stop(f"--{flag(name)}: found {getattr(cfg, name)!r}, allowed are {', '.join(allowed.split())}")
    for name, least in MINIMUM.items():
        if not (least <= getattr(cfg, name) < math.inf):
            why = " (a group of one has no advantage: its own mean is its reward)" if name == "group" else ""
            raise Stop(f"--{flag(name)}: found {getattr(cfg, name)}, allowed is {least} or more{why}")
    for name in ("min_ess", "shift_gamma", "entropy_decay"):
        if getattr(cfg, name) > 1:
            raise Stop(f"--{flag(name)}: found {getattr(cfg, name)}, allowed is 0 to 1")
    if cfg.trace_fraction != -1 and not 0 <= cfg.trace_fraction <= 1:
        raise Stop(f"--trace-fraction: found {cfg.trace_fraction}, allowed is 0 to 1, or -1 for the data's own share")
    if cfg.off_weight != "dynamic":
        try:
            ok = 0 <= float(cfg.off_weight) < math.inf
        except ValueError:
            ok = False
        if not ok:
            raise Stop(f"--off-weight: found {cfg.off_weight!r}, allowed are dynamic or a number from 0")
    if cfg.model and not cfg.train and not cfg.eval_only:
        raise Stop("--train: missing; a model of your own needs a training file (--train builtin for the built-in task)")
    if cfg.eval_only and not (cfg.model and cfg.eval):
        raise Stop("--eval-only: needs --model DIR_OR_RUN and --eval FILE (or --eval builtin)")


def flag(name):
    return name.replace("_", "-")


def parse(argv):
    """Command line -> (Config, the flags given). Order of precedence: flags given, then --preset, then the defaults above."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     epilog="Commands:\n" + __doc__.split("\n\n")[-1],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser
    for f in dataclasses.fields(Config):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        text = f.metadata["help"].replace("%", "%%") + ("" if f.default in ("", False) else f" [{f.default}]")
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type, "metavar": f.type.__name__.upper()}
        group.add_argument("--" + flag(f.name), default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(argv))
    preset = given.get("preset", "")
    builtin = given.get("train", "" if not given.get("model") else None) in ("", "builtin") or given.get("eval") == "builtin"
    if not preset and builtin:
        preset = "builtin"
    if preset and preset not in PRESETS:
        raise Stop(f"--preset: found {preset!r}, allowed are {', '.join(PRESETS)}")
    cfg = Config(**{**PRESETS.get(preset, {}), **given, "preset": preset})
    validate(cfg)
    return cfg, given


# ------------------------------------------------------------------------------------------------- the RED objective
def entropy_change(previous, h, decay):
    """Eq. (6): e(k) = d e(k-1) + (1-d) h(k), and |e(k) - e(k-1)|. Returns (e, change); no previous value: (h, None)."""
    if previous is None:
        return h, None
    e = decay * previous + (1 - decay) * h
    return e, abs(e - previous)


def offline_weight(d_on, d_off, group, update):
    """Eq. (7): lam = clip(dH_off / (dH_on + 1e-8), 1, G): a trace counts for one rollout at least, a whole group at most.

    d_on, d_off: the entropy changes of Eq. (6) (None while unknown). The first two updates (update = 1, 2) have lam = 1.
    """
    if update <= 2 or d_on is None or d_off is None:
        return 1.0
    return min(max(d_off / (d_on + 1e-8), 1.0), float(group))


def teacher_weight(accuracy, policy_shift, gamma):
    """Eq. (8): beta, how far a trace counts as a certain teacher's (beta) rather than the model's own (1 - beta)."""
    return {"accuracy": gamma * (1 - accuracy), "accuracy-reversed": gamma * accuracy, "on-policy": 0.0, "off-policy": gamma}[policy_shift]


def offline_advantage(rewards, eps=1e-6):
    """Eq. (10): the verified trace (r_off = 1) as one more member of the group `rewards`; 0 when all rollouts are right."""
    r = torch.tensor([*rewards, 1.0], dtype=torch.float64)                       # [G+1]
    return float((r[-1] - r.mean()) / (r.std(unbiased=False) + eps))


def offline_loss(logp, mask, adv, beta, *, traces):
    """Eq. (8), (9), (11): L_off = -(1/M) sum_x A_off(x) (1/|o|) sum_t rho_t, a sum over the rows given.

    logp, mask [n, T]: log pi of the trace tokens; adv, beta [n]; traces: M over the whole update and all ranks.
    Returns (loss [], mean rho of all trace tokens as a sum over tokens []).
    """
    # In logs: with beta = 0 the ratio is 1 also for a token whose probability underflows, where p / p would be 0 / 0.
    log_off = torch.logaddexp(beta.log()[:, None], (1 - beta).log()[:, None] + logp).detach()   # [n, T]  Eq. (8)
    rho = (logp - log_off).exp() * mask                                          # [n, T]  Eq. (9), value in [0, 1]
    per_trace = rho.sum(1) / mask.sum(1)                                         # [n]     (1/|o|) sum_t rho_t
    return -(adv * per_trace).sum() / traces, rho.sum().detach()                 # []      Eq. (11)


# --------------------------------------------------------------------------------------------- model, tokenizer, text
TINY_VOCABULARY = ["<pad>", "<end>", "<unk>", *"0123456789+-x=;", "\\boxed{", "}"]


def tiny_model(seed):
    """The built-in causal LM and its tokenizer: a two-layer Qwen2 of 0.2 M parameters over characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(TINY_VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), behavior="isolated")
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>",
                                        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}"
    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=len(TINY_VOCABULARY), hidden_size=96, intermediate_size=256, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
                         initializer_range=0.08, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    return Qwen2ForCausalLM(config), tokenizer


def tiny_base(seed, folder, log):
    """Train the built-in base policy once and cache it: half-hearted steps for + and -, bare answers where there is an x."""
    path = Path(folder) / f"builtin-base-s{seed}"
    if path.is_dir():
        return path
    model, tokenizer = tiny_model(seed)
    steps, rows, lr, start = 550, 128, 2e-3, time.time()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    rng = random.Random(f"base {seed}")
    for step in range(steps):
        pairs = [data.base_example(rng) for _ in range(rows)]
        traces = [Trace(tokenizer.encode(prompt), tokenizer.encode(answer) + [1], 1.0, 0.0) for prompt, answer in pairs]
        for g in optimizer.param_groups:
            g["lr"] = lr * min(1, (step + 1) / 50, (steps - step) / (steps / 2))
        loss = sft_step(model, optimizer, traces, total=sum(len(t.response) for t in traces), temperature=1.0, token_budget=1 << 20,
                        chunk=1 << 14, max_grad_norm=1.0, world=World(alone=True))["loss"]
        if step % 100 == 99:
            log(f"base policy: step {step + 1}/{steps}  loss {loss:.3f}  {time.time() - start:.0f} s")
    save_model(path, model, tokenizer)
    return path


def load_model(cfg, source, device):
    """Model (float32 master weights) and tokenizer of a directory, a finished run or a hub id."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    path = Path(source)
    path = path / "model" if (path / "model" / "config.json").is_file() else path
    if path.exists() and not (path / "config.json").is_file():
        raise Stop(f"--model: {path} has no config.json; give a Hugging Face model directory or a finished run")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=cfg.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise Stop(f"--model: no tokenizer could be read from {path}: {first_line(error)}; save one beside the model") from error
    try:
        model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32, use_safetensors=True,
                                                     trust_remote_code=cfg.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise Stop(f"--model: {path} could not be loaded: {first_line(error)}") from error
    if cfg.grad_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(device), tokenizer


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def save_model(path, model, tokenizer):
    """Write a Hugging Face directory under a temporary name and rename it: a reader never sees half of one."""
    temporary = Path(f"{path}.tmp{os.getpid()}")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


class Text:
    """Prompts and traces as token ids, in the model's own chat template; a base model without one gets PLAIN."""

    PLAIN = "Problem: {prompt}\n{system}\nSolution:"

    def __init__(self, tokenizer, model, instruction):
        self.tokenizer, self.instruction = tokenizer, instruction
        stops = model.generation_config.eos_token_id
        self.stops = set(stops if isinstance(stops, list) else [stops]) | {tokenizer.eos_token_id}
        self.stops.discard(None)
        self.end = self.end_of_turn()
        self.stops.add(self.end)
        self.parameters = model.num_parameters()
        self.pad = self.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def end_of_turn(self):
        """The token that closes an answer: what the chat template writes after one (not always the tokenizer's eos)."""
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template([{"role": "user", "content": "a"}, {"role": "assistant", "content": "7"}], tokenize=False)
            for token in self.tokenizer.encode(text[text.rindex("7") + 1:], add_special_tokens=False):
                if token in self.tokenizer.all_special_ids or token in self.tokenizer.added_tokens_decoder:
                    return token
        if self.tokenizer.eos_token_id is None:
            raise Stop("--model: its tokenizer has no end-of-sequence token, so no answer could ever end; set eos_token")
        return self.tokenizer.eos_token_id

    def prompt(self, problem):
        """Token ids of a prompt, up to where the answer begins."""
        import jinja2
        system = problem.system or self.instruction
        if not self.tokenizer.chat_template:
            return self.tokenizer.encode(self.PLAIN.format(prompt=problem.prompt, system=system).replace("\n\n", "\n"))
        user = {"role": "user", "content": problem.prompt}
        turns = [{"role": "system", "content": system}, user] if system else [user]
        try:
            text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except jinja2.TemplateError:         # a template without a system role (Gemma): its text goes in front of the user's
            turns = [{"role": "user", "content": f"{system}\n\n{problem.prompt}"}]
            text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return self.tokenizer.encode(text, add_special_tokens=False)     # the template has written the special tokens

    def trace(self, text):
        """Token ids of a trace as if the model had sampled it, its end token included."""
        lead = "" if self.tokenizer.chat_template else " "
        return self.tokenizer.encode(lead + text.strip(), add_special_tokens=False) + [self.end]

    def decode(self, ids):
        return self.tokenizer.decode([i for i in ids if i not in self.stops])


# ------------------------------------------------------------------------------------------------------------ sampling
@dataclass
class Sample:
    """One sampled response: ids (the end token included), log mu of each, and whether it ended by itself."""

    ids: list
    logps: list
    finished: bool


class HFEngine:
    """Batched sampling with the transformers model that is being trained: no copy of the weights, nothing to push.

    Rows are sorted by prompt length, prompts are computed once and their cache repeated n times, finished rows leave
    the batch. Each row draws its uniforms from its own seed, so what a row samples does not depend on its batch.
    """

    def __init__(self, model, text, rows, autocast):
        self.model, self.text, self.rows, self.autocast = model, text, rows, autocast

    def push(self, model):
        """New weights before a phase: the engine samples from the trained model itself, so there is nothing to do."""

    @torch.no_grad()
    def generate(self, prompts, *, n, temperature, max_new_tokens, seeds, stopped=lambda: False):
        """prompts: lists of token ids; seeds: one integer per prompt, at least n apart. -> list of n Samples per prompt.

        temperature 0 is greedy (log-probs then those of temperature 1). stopped() is asked before every token; when it
        says yes, Interrupted is raised and nothing is kept.
        """
        self.model.eval()
        results = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        per_batch = max(1, self.rows // n)
        for start in range(0, len(order), per_batch):
            batch = order[start:start + per_batch]
            with self.autocast():
                samples = self.batch([prompts[i] for i in batch], n, temperature, max_new_tokens, [seeds[i] for i in batch], stopped)
            for k, i in enumerate(batch):
                results[i] = samples[k * n:(k + 1) * n]
        return results

    def batch(self, prompts, n, temperature, max_new_tokens, seeds, stopped):
        from transformers import DynamicCache
        device, width = self.model.device, max(map(len, prompts))
        # Left padding: the last column is every row's last prompt token. Positions count real tokens only.
        ids = torch.tensor([[self.text.pad] * (width - len(p)) + p for p in prompts], device=device)             # [P, W]
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)            # [P, W]
        padded = bool((mask == 0).any())
        out = self.model(input_ids=ids, attention_mask=mask if padded else None, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                         past_key_values=DynamicCache(config=self.model.config), use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[:, -1].repeat_interleave(n, 0)                          # [N, V]
        cache.batch_repeat_interleave(n)
        mask = mask.repeat_interleave(n, 0)                                                                      # [N, W]
        uniforms = torch.stack([torch.rand(max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + j))
                                for seed in seeds for j in range(n)]).to(device)                                # [N, T]
        rows = torch.arange(len(uniforms), device=device)      # which sample each live row of the batch is        [N]
        position = mask.sum(1)                                                                                   # [N]
        stops = torch.tensor(sorted(self.text.stops), device=device)
        tokens = torch.full((len(uniforms), max_new_tokens), -1, device=device)                                  # [N, T]
        logps = torch.zeros((len(uniforms), max_new_tokens), device=device)                                      # [N, T]
        ended = torch.zeros(len(uniforms), dtype=torch.bool, device=device)                                      # [N]
        for t in range(max_new_tokens):
            if stopped():
                raise Interrupted
            token, logp = draw(logits, uniforms[rows, t], temperature)                                           # [live]
            tokens[rows, t], logps[rows, t] = token, logp
            done = torch.isin(token, stops)                                                                      # [live]
            ended[rows] |= done
            alive = ~ended[rows]                                                                                 # [live]
            if t + 1 == max_new_tokens or not alive.any():
                break
            if alive.float().mean() < 0.8:       # shrinking copies the cache, so only when it pays
                keep = alive.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                rows, token, mask, position = rows[keep], token[keep], mask[keep], position[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)                                             # [live, W+t+1]
            out = self.model(input_ids=token[:, None], attention_mask=mask if padded else None, position_ids=position[:, None],
                             past_key_values=cache, use_cache=True)
            logits, position = out.logits[:, -1], position + 1
        return collect(tokens.tolist(), logps.tolist(), self.text.stops)


def draw(logits, uniforms, temperature):
    """One token per row by inverse CDF, and its log-prob under exactly the distribution it was drawn from.

    logits [N, V], uniforms [N] in [0, 1). The running sum is float64: over 150,000 tokens float32 would lose the tail.
    """
    logp = torch.log_softmax(logits.float() / (temperature or 1.0), -1)                                          # [N, V]
    if temperature == 0:
        token = logp.argmax(-1)                                                                                  # [N]
    else:
        cdf = logp.double().exp().cumsum(-1)                                                                     # [N, V]
        token = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True).squeeze(1)                 # [N]
        token = token.clamp(max=logp.shape[1] - 1)
    return token, logp.gather(1, token[:, None]).squeeze(1)


def collect(tokens, logps, stops):
    """Rows of a finished batch -> Samples: cut after the first end token; a row without one is truncated."""
    samples = []
    for ids, lps in zip(tokens, logps):
        end = next((t for t, i in enumerate(ids) if i in stops or i < 0), len(ids))
        finished = end < len(ids) and ids[end] in stops
        end += finished
        samples.append(Sample(ids[:end], lps[:end], finished))
    return samples


class Interrupted(Exception):
    """A signal asked for a stop in the middle of sampling; the phase is drawn again on resume."""


# ---------------------------------------------------------------------------------------------------------------- data
@dataclass
class Item:
    """One training problem as token ids."""

    prompt: list
    gold: str
    traces: list          # token ids of each verified trace, end token included
    problem: data.Problem


@dataclass
class Trace:
    """A trace with what Eq. (11) needs; `prompt` and `response` are what rapid.score reads."""

    prompt: list
    response: list
    adv: float
    beta: float


def load_problems(cfg, log):
    """-> (training problems, {name: evaluation problems}); what is in both is left out of evaluation and said."""
    def check_trace(trace, gold):
        return verify.verify(trace, gold=gold).correct

    def read(source, limit, **more):
        return data.load(source, prompt_key=cfg.prompt_key or None, gold_key=cfg.gold_key or None, limit=limit or None,
                         check_gold=verify.gold_problem, log=log, **more)

    builtin = cfg.train in ("", "builtin")
    if cfg.eval_only:
        train = []
    elif builtin:
        train = data.chains(cfg.limit or 2000, seed=cfg.seed + 1)
    else:
        train = read(cfg.train, cfg.limit, trace_key=cfg.trace_key or None, check_trace=check_trace)
    if cfg.traced_problems:
        spare = [i for i, p in enumerate(train) if p.traces][cfg.traced_problems:]
        for i in spare:
            train[i] = dataclasses.replace(train[i], traces=())
    tests = {}
    for source in filter(None, cfg.eval.split(",")) if cfg.eval else (["builtin"] if builtin else []):
        if source == "builtin":
            tests[source] = data.chains(cfg.eval_limit or 400, seed=0, exclude={p.prompt for p in train})
            continue
        kept, dropped = data.held_out(train, read(source, cfg.eval_limit))
        if dropped:
            log(f"{source}: {len(dropped)} problems are in the training file and left out (first {dropped[0].where})")
        if not kept:
            raise Stop(f"--eval: every problem of {source} is in the training file; give held-out problems")
        tests[Path(source).stem] = kept
    return train, tests


def encode(cfg, text, problems, room, log):
    """Problems -> Items; prompts and traces that do not fit are left out, counted and said."""
    items, long_prompts, long_traces = [], [], 0
    for problem in problems:
        prompt = text.prompt(problem)
        if len(prompt) > cfg.max_prompt_tokens or len(prompt) + cfg.max_new_tokens > room:
            long_prompts.append((len(prompt), problem.where))
            continue
        traces = [text.trace(t) for t in problem.traces]
        kept = [t for t in traces if len(t) <= cfg.max_new_tokens]
        long_traces += len(traces) - len(kept)
        items.append(Item(prompt, problem.gold, kept, problem))
    if long_prompts:
        n, where = long_prompts[0]
        why = f"prompts longer than --max-prompt-tokens {cfg.max_prompt_tokens}, or than the context of {room} less --max-new-tokens {cfg.max_new_tokens}"
        if not items:
            raise Stop(f"{where}: all {len(long_prompts)} {why} (this one has {n} tokens); lower --max-new-tokens or raise --max-prompt-tokens")
        log(f"{len(long_prompts)} {why} left out (first {where}: {n} tokens)")
    if long_traces:
        log(f"{long_traces} traces longer than --max-new-tokens {cfg.max_new_tokens} left out")
    return items


def seed_of(*names):
    """A 62-bit seed for a named draw. Every draw of a run has one, so a resumed run has no generator to restore."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:8], "big") >> 2


class Queue:
    """Problems in random order, epoch after epoch, from two pools (with a trace, without); none lost, none twice."""

    def __init__(self, cfg, items):
        self.cfg, self.pools = cfg, {"all": list(range(len(items)))}
        if cfg.algo == "sft" or cfg.trace_fraction >= 0:
            self.pools = {"traced": [i for i, x in enumerate(items) if x.traces], "plain": [i for i, x in enumerate(items) if not x.traces]}
        self.state = {name: {"epoch": 0, "left": []} for name in self.pools}

    def take(self, name, n):
        state, taken = self.state[name], []
        while len(taken) < n:
            if not state["left"]:
                state["left"] = list(self.pools[name])
                random.Random(seed_of(self.cfg.seed, "order", name, state["epoch"])).shuffle(state["left"])
                state["epoch"] += 1
            need = n - len(taken)
            taken += state["left"][:need]
            state["left"] = state["left"][need:]
        return taken

    def draw(self, n):
        """Indices of one update's n problems."""
        if "all" in self.pools:
            return self.take("all", n)
        traced = n if self.cfg.algo == "sft" or not self.pools["plain"] else round(n * self.cfg.trace_fraction) if self.pools["traced"] else 0
        return self.take("traced", traced) + (self.take("plain", n - traced) if n > traced else [])

    def give_back(self, indices):
        """Problems of an ended phase that no update used: next in line."""
        for name, pool in self.pools.items():
            members = set(pool)
            self.state[name]["left"] = [i for i in indices if i in members] + self.state[name]["left"]


# ---------------------------------------------------------------------------------------------------------- one update
def offline_items(cfg, items, groups, update):
    """The Traces of an update: one per group whose problem has any, drawn by seed; Eq. (8) and (10) from the group's rewards."""
    traces = []
    for i, rollouts in groups:
        if items[i].traces:
            rewards = [r.reward for r in rollouts]
            pick = random.Random(seed_of(cfg.seed, "trace", update, i)).randrange(len(items[i].traces))
            beta = teacher_weight(sum(rewards) / len(rewards), cfg.policy_shift, cfg.shift_gamma)
            traces.append(Trace(items[i].prompt, items[i].traces[pick], offline_advantage(rewards), beta))
    return traces


def accumulate_offline(model, traces, *, total, temperature, token_budget, chunk):
    """Add the gradient of Eq. (11) to p.grad. total: M over all ranks. -> sums: loss, rho, entropy, tokens, traces."""
    sums = dict(loss=0.0, rho_sum=0.0, entropy_sum=0.0, tokens=0, traces=len(traces), adv_sum=sum(t.adv for t in traces))
    for batch in rapid.micro_batches([len(t.prompt) + len(t.response) for t in traces], token_budget):
        rows = [traces[i] for i in batch]
        logp, entropy, mask = rapid.score(model, rows, temperature=temperature, chunk=chunk)                     # [n, T]
        adv = torch.tensor([t.adv for t in rows], device=logp.device, dtype=logp.dtype)                          # [n]
        beta = torch.tensor([t.beta for t in rows], device=logp.device, dtype=logp.dtype)                        # [n]
        loss, rho = offline_loss(logp, mask, adv, beta, traces=total)                                            # [], []
        loss.backward()
        for name, value in dict(loss=loss, rho_sum=rho, entropy_sum=(entropy * mask).sum(), tokens=mask.sum()).items():
            sums[name] += value.item()
    return sums


def sft_step(model, optimizer, rows, *, total, temperature, token_budget, chunk, max_grad_norm, world):
    """One step of supervised learning on traces: mean negative log-likelihood per trace token. total: tokens, all ranks."""
    sums = dict(loss=0.0, entropy_sum=0.0)
    optimizer.zero_grad(set_to_none=True)
    for batch in rapid.micro_batches([len(t.prompt) + len(t.response) for t in rows], token_budget):
        logp, entropy, mask = rapid.score(model, [rows[i] for i in batch], temperature=temperature, chunk=chunk)  # [n, T]
        loss = -(logp * mask).sum() / total                                                                      # []
        loss.backward()
        sums["loss"] += loss.item()
        sums["entropy_sum"] += (entropy * mask).sum().item()
    sums = world.sum(sums)
    world.sum_gradients(model.parameters())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
    skipped = not math.isfinite(norm + sums["loss"])
    if not skipped:
        optimizer.step()
    return dict(loss=sums["loss"], entropy_off=sums["entropy_sum"] / total, grad_norm=norm, skipped=skipped)


def sft_update(cfg, model, optimizer, items, indices, state, world):
    """--algo sft: the traces of `indices`, one each, drawn like those of red_update."""
    model.train()
    picks = [random.Random(seed_of(cfg.seed, "trace", state.update + 1, i)).randrange(len(items[i].traces)) for i in indices]
    rows = [Trace(items[i].prompt, items[i].traces[k], 1.0, 0.0) for i, k in zip(indices, picks)]
    return sft_step(model, optimizer, rows[world.rank::world.size], total=sum(len(t.response) for t in rows), world=world,
                    temperature=1.0, token_budget=state.token_budget, chunk=cfg.chunk, max_grad_norm=cfg.max_grad_norm)


def red_update(cfg, model, optimizer, items, groups, state, world):
    """One optimizer step on Eq. (12): L = L_on + (lam / G) L_off. groups: this rank's (index, rollouts). -> metrics.

    The gradients of the two terms are taken one after the other and kept apart until both entropies of Eq. (6), and so
    lam, are known; that costs one copy of the gradient and shows both norms, which is how a starving term is noticed.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    update = state.update + 1
    settings = dict(temperature=cfg.temperature, token_budget=state.token_budget, chunk=cfg.chunk)
    optimizer.zero_grad(set_to_none=True)
    model.train()

    # 1. The offline term, Eq. (8)-(11), alone in p.grad, then set aside.
    off, off_grads = None, None
    if cfg.algo == "red":
        traces = offline_items(cfg, items, groups, update)
        total = world.sum({"n": len(traces)})["n"]                       # M of Eq. (11), over all ranks
        if total:
            off = world.sum(accumulate_offline(model, traces, total=total, **settings))
            world.sum_gradients(parameters)
            off_grads = [p.grad for p in parameters]
            optimizer.zero_grad(set_to_none=True)

    # 2. The online term, Eq. (1)-(4). Its denominator B G Lbar is the whole update's, over all ranks.
    rollouts = [r for _, group in groups for r in group]
    sums = rapid.accumulate(model, rollouts, group_size=cfg.group, denominator=cfg.prompts * cfg.group * state.lbar,
                            algo="grpo" if cfg.algo == "grpo" else "rapid", eta=cfg.eta, is_level=cfg.is_level,
                            baseline=cfg.baseline, adv_norm=cfg.adv_norm, **settings)
    on = world.sum(sums)
    world.sum_gradients(parameters)
    metrics = rapid.summarise(on)
    metrics["grad_norm_on"] = grad_norm(p.grad for p in parameters)

    # 3. Eq. (6), (7): the weight of the offline term; Eq. (12): the sum.
    e_on, d_on = entropy_change(state.e_on, metrics["entropy"], cfg.entropy_decay)
    e_off = state.e_off
    if off:
        h_off = off["entropy_sum"] / off["tokens"]
        e_off, d_off = entropy_change(state.e_off, h_off, cfg.entropy_decay)
        lam = offline_weight(d_on, d_off, cfg.group, update) if cfg.off_weight == "dynamic" else float(cfg.off_weight)
        metrics.update(lam=lam, entropy_off=h_off, dH_on=d_on, dH_off=d_off, loss_off=off["loss"], rho=off["rho_sum"] / off["tokens"],
                       adv_off=off["adv_sum"] / off["traces"], traces=off["traces"],
                       grad_norm_off=grad_norm(off_grads) * lam / cfg.group)
        for p, g in zip(parameters, off_grads):
            if g is not None:
                p.grad = g.mul_(lam / cfg.group) if p.grad is None else p.grad.add_(g, alpha=lam / cfg.group)

    # 4. The step. A gradient that is not finite would stay in Adam's moments for ever: such an update changes nothing.
    metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm).item()
    metrics["skipped"] = not math.isfinite(metrics["grad_norm"] + metrics["loss"] + (off["loss"] if off else 0.0))
    if not metrics["skipped"]:
        optimizer.step()
        state.e_on, state.e_off = e_on, e_off
    return metrics


def grad_norm(grads):
    """Euclidean norm over a list of gradients (None where a parameter has none)."""
    return math.sqrt(sum(g.detach().double().square().sum().item() for g in grads if g is not None))


class World:
    """The ranks of a torchrun job (one without it). Sums over ranks are the only thing training needs of them."""

    def __init__(self, alone=False):
        if alone:                                # one rank does something by itself, such as training the built-in base
            self.rank, self.size, self.local = 0, 1, 0
            return
        self.rank, self.size, self.local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")

    def sum(self, numbers):
        """A dict of sums and counts (and max_* maxima) of this rank -> the same over all ranks."""
        if self.size == 1:
            return numbers
        parts, total = [None] * self.size, {}
        dist.all_gather_object(parts, numbers)
        for part in parts:
            rapid.add_metrics(total, part)
        return total

    def sum_gradients(self, parameters):
        """Sum p.grad over ranks in place; the losses are already divided by constants of the whole update."""
        if self.size == 1:
            return
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)

    def gather(self, thing):
        """-> on every rank the list of all ranks' `thing`."""
        parts = [thing] * self.size
        if self.size > 1:
            dist.all_gather_object(parts, thing)
        return parts


# ---------------------------------------------------------------------------------------------------------- evaluation
def pass_at_k(n, c, k):
    """Unbiased estimate of P(at least one of k samples is right) from c right ones of n: 1 - C(n-c, k) / C(n, k)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def mean_se(values):
    """Mean and its standard error over problems."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def sample_and_verify(cfg, engine, text, prompts, golds, *, n, temperature, seeds, stopped=lambda: False):
    """-> per prompt a list of n (Sample, Verdict). A truncated response may hold an answer but earns no reward."""
    groups = engine.generate(prompts, n=n, temperature=temperature, max_new_tokens=cfg.max_new_tokens, seeds=seeds, stopped=stopped)
    flat = [(sample, gold) for group, gold in zip(groups, golds) for sample in group]
    verdicts = iter(verify.verify_many([text.decode(s.ids) for s, _ in flat], [g for _, g in flat],
                                       finished=[s.finished for s, _ in flat], workers=cfg.workers))
    return [[(sample, next(verdicts)) for sample in group] for group in groups]


def evaluate(cfg, engine, text, tests, update, seconds, world, stopped=lambda: False):
    """All evaluation sets in one batch -> (one metrics row per set, the responses). Seeds are the same at every update,
    so two evaluations differ by the policy alone."""
    jobs = [(name, i, item) for name, items in tests.items() for i, item in enumerate(items)]
    mine = jobs[world.rank::world.size]
    results = sample_and_verify(cfg, engine, text, [x.prompt for *_, x in mine], [x.gold for *_, x in mine], n=cfg.samples,
                                temperature=cfg.eval_temperature, stopped=stopped,
                                seeds=[seed_of(cfg.seed, "eval", name, i) for name, i, _ in mine])
    responses = [dict(eval=name, problem=i, level=x.problem.level, prompt=x.problem.prompt, gold=x.gold, response=text.decode(s.ids),
                      answer=v.answer, correct=bool(v.correct and s.finished), reason=v.reason if s.finished or not v.correct else "truncated",
                      tokens=len(s.ids), truncated=not s.finished)
                 for (name, i, x), group in zip(mine, results) for s, v in group]
    responses = [r for part in world.gather(responses) for r in part]
    rows = []
    for name, items in tests.items():
        own = [r for r in responses if r["eval"] == name]
        right = {i: 0 for i in range(len(items))}
        for r in own:
            right[r["problem"]] += r["correct"]
        mean, mean_error = mean_se([c / cfg.samples for c in right.values()])
        passed, pass_error = mean_se([pass_at_k(cfg.samples, c, cfg.samples) for c in right.values()])
        levels = sorted({x.problem.level for x in items if x.problem.level})
        rows.append(dict(update=update, eval=name, seconds=round(seconds, 2), problems=len(items), samples=cfg.samples,
                         mean=mean, mean_se=mean_error, **{"pass": passed}, pass_se=pass_error,
                         length=float(np.mean([r["tokens"] for r in own])), truncated=float(np.mean([r["truncated"] for r in own])),
                         levels={v: float(np.mean([r["correct"] for r in own if r["level"] == v])) for v in levels}))
    return rows, responses


def eval_line(row):
    levels = "  ".join(f"{name} {value:.3f}" for name, value in row["levels"].items()) if len(row["levels"]) <= 8 else ""
    return (f"eval {row['eval']} at update {row['update']}: mean@{row['samples']} {row['mean']:.3f} +- {row['mean_se']:.3f}  "
            f"pass@{row['samples']} {row['pass']:.3f} +- {row['pass_se']:.3f}  length {row['length']:.1f}  truncated {row['truncated']:.3f}  {levels}")


# ------------------------------------------------------------------------------------------- run directory, checkpoint
@dataclass
class State:
    """Where a run stands, besides weights and optimizer: plain numbers and lists, saved with every checkpoint."""

    update: int = 0                # optimizer steps taken
    phase: int = 0                 # inference phases drawn
    plan: list = field(default_factory=list)      # problem indices of each update left in this phase, all ranks
    batches: list = field(default_factory=list)   # this rank's (index, rollouts) of each of them: sampled, not yet used
    lbar: float = 0.0              # Lbar of Eq. (4): mean response length of this phase
    e_on: float = None             # e(k) of Eq. (6)
    e_off: float = None
    bad: int = 0                   # updates in a row that were not finite
    token_budget: int = 0          # --tokens-per-microbatch, halved when memory ran out
    seconds: float = 0.0           # training time so far, evaluation left out
    metrics_bytes: int = 0         # length of metrics.jsonl: what a killed run wrote beyond it is cut off on resume
    queue: dict = field(default_factory=dict)


class Run:
    """The run directory: settings, metrics.jsonl, checkpoints, and a lock so that two processes cannot share it."""

    def __init__(self, cfg, world, log):
        self.cfg, self.world, self.log = cfg, world, log
        self.path = Path(cfg.resume or cfg.run)
        self.bar = sys.stdout.isatty()
        if world.rank:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / "lock", "w")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Stop(f"{self.path}: another process is training in this run directory; give another --run") from error
        except OSError as error:
            raise Stop(f"{self.path}: cannot be written: {error.strerror}; give another --run") from error

    def begin(self, cfg, world, text):
        """A new run's config.json: every setting, what it ran on, what it computes with."""
        if world.rank == 0:
            record = dict(settings=dataclasses.asdict(cfg), environment=environment(), ranks=world.size,
                          parameters=text.parameters, stop_tokens=sorted(text.stops))
            (self.path / "config.json").write_text(json.dumps(record, indent=2) + "\n")

    def write(self, row):
        """Append one row to metrics.jsonl, at once and whole."""
        if self.world.rank == 0:
            with open(self.path / "metrics.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")

    def responses(self, update, rows):
        """The responses of one evaluation, one per line; they replace what a killed run left of the same evaluation."""
        if self.world.rank == 0 and rows:
            with open(self.path / f"responses-{update:06d}.jsonl", "w") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)

    def progress(self, row, state):
        """One line that updates on a terminal; elsewhere a plain line for every tenth update and the last."""
        if self.world.rank or not (self.bar or row["update"] % 10 == 0 or row["update"] == self.cfg.updates):
            return
        left = state.seconds / row["update"] * (self.cfg.updates - row["update"])
        shown = [f"update {row['update']}/{self.cfg.updates}", f"phase {state.phase}"]
        for name, form in (("reward", ".3f"), ("accuracy", ".3f"), ("ess", ".2f"), ("lam", ".2f"), ("entropy", ".3f"), ("entropy_off", ".3f"),
                           ("loss", "+.4f"), ("length", ".1f"), ("tokens_per_second", ".0f")):
            if row.get(name) is not None:
                shown.append(f"{name.replace('tokens_per_second', 'tok/s')} {row[name]:{form}}")
        line = "  ".join([*shown, f"left {left:.0f} s"])
        print(("\r\033[K" + line) if self.bar else line, end="" if self.bar and row["update"] < self.cfg.updates else "\n", flush=True)

    def save(self, state, model, text, optimizer):
        """Checkpoint the run after an update: written beside, synced, renamed; the newest --keep are kept."""
        batches = self.world.gather([[(i, [dataclasses.asdict(r) for r in group]) for i, group in batch] for batch in state.batches])
        if self.world.rank:
            return
        whole = []                                       # the phase's unused rollouts of all ranks, in the plan's order
        for h, indices in enumerate(state.plan):
            row = [None] * len(indices)
            for rank, part in enumerate(batches):
                row[rank::self.world.size] = part[h]
            whole.append(row)
        metrics = self.path / "metrics.jsonl"
        state.metrics_bytes = metrics.stat().st_size if metrics.exists() else 0
        folder = self.path / "checkpoints"
        temporary, final = folder / f"tmp-{state.update:06d}", folder / f"{state.update:06d}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            model.save_pretrained(temporary / "model")
            text.tokenizer.save_pretrained(temporary / "model")
            torch.save(dict(state=dict(vars(state), batches=whole), optimizer=optimizer.state_dict(), version=VERSION), temporary / "trainer.pt")
            for file in [*temporary.rglob("*"), temporary]:
                sync(file)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            sync(folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise Stop(f"{final}: checkpoint could not be written: {error.strerror or error}; the one before it is whole: "
                       f"make room, then python red.py --resume {self.path}") from error
        for old in self.checkpoints()[:-self.cfg.keep]:
            shutil.rmtree(old)

    def checkpoints(self):
        return sorted(p for p in (self.path / "checkpoints").glob("[0-9]*") if p.is_dir())

    def load(self):
        """-> (folder, trainer dict) of the newest readable checkpoint, or (None, None)."""
        for folder in reversed(self.checkpoints()):
            try:
                return folder, torch.load(folder / "trainer.pt", weights_only=True)
            except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
                self.log(f"{folder} cannot be read ({first_line(error)}); falling back to the checkpoint before it")
        return None, None


def sync(path):
    """fsync a file or directory: after a power cut the renamed checkpoint must hold what was written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def restore(cfg, run, items, queue, optimizer, checkpoint, world):
    """Bring state, optimizer and queue to a checkpoint; cut metrics.jsonl to it."""
    saved = checkpoint["state"]
    state = State(**{k: v for k, v in saved.items() if k != "batches"})
    state.batches = [[(i, [rapid.Rollout(**r) for r in group]) for i, group in row[world.rank::world.size]] for row in saved["batches"]]
    optimizer.load_state_dict(checkpoint["optimizer"])
    queue.state = state.queue
    if world.rank == 0 and (run.path / "metrics.jsonl").exists():
        os.truncate(run.path / "metrics.jsonl", state.metrics_bytes)
    return state


# ---------------------------------------------------------------------------------------------------------------- loop
def draw_phase(cfg, engine, text, items, queue, state, world, log_row, stopped):
    """One inference phase [RAPID]: H*B problems, G responses each, in one large batch; verified, dealt into H updates."""
    start = time.time()
    before = json.dumps(queue.state)
    updates = min(cfg.updates_per_phase, cfg.updates - state.update)
    plan = [queue.draw(cfg.prompts) for _ in range(updates)]
    mine = [(h, i) for h, indices in enumerate(plan) for i in indices[world.rank::world.size]]
    places = [(h, k) for h in range(updates) for k in range(world.rank, cfg.prompts, world.size)]
    try:
        results = sample_and_verify(cfg, engine, text, [items[i].prompt for _, i in mine], [items[i].gold for _, i in mine], n=cfg.group,
                                    temperature=cfg.temperature, stopped=stopped,
                                    seeds=[seed_of(cfg.seed, "rollout", state.phase, place) for place in places])
    except Interrupted:
        queue.state = json.loads(before)         # the phase was not drawn: a resumed run draws it again, identically
        raise
    reasons, batches = {}, [[] for _ in plan]
    for (h, i), group in zip(mine, results):
        rollouts = []
        for sample, verdict in group:
            # A response that ran into the length limit earns nothing: else not stopping would be rewarded. [ours]
            reason = verdict.reason if sample.finished or not verdict.correct else "truncated"
            reasons[reason] = reasons.get(reason, 0) + 1
            rollouts.append(rapid.Rollout(items[i].prompt, sample.ids, sample.logps, float(reason == "correct"), not sample.finished))
        batches[h].append((i, rollouts))
    counts = world.sum(dict(tokens=sum(len(r.response) for b in batches for _, g in b for r in g),
                            responses=sum(len(g) for b in batches for _, g in b), **{"reason_" + k: n for k, n in reasons.items()}))
    state.plan, state.batches, state.phase = plan, batches, state.phase + 1
    state.lbar = counts["tokens"] / counts["responses"]                  # Lbar of Eq. (4): one constant for the whole phase
    return dict(phase=state.phase, sample_seconds=time.time() - start, sampled_tokens=counts["tokens"],
                reasons={k[7:]: n for k, n in sorted(counts.items()) if k.startswith("reason_")})


def train(cfg, run, world, model, text, engine, items, tests, queue, optimizer, state, log):
    """The whole loop: sample a phase, take its updates, evaluate, save. Returns when --updates are done or a signal asks."""
    signals = Signals()
    model_device = next(model.parameters()).device
    sampled = {}

    def measure():
        rows, responses = evaluate(cfg, engine, text, tests, state.update, state.seconds, world, signals.asked)
        for row in rows:
            run.write(row)
            log(eval_line(row))
        run.responses(state.update, responses)

    try:
        if state.update == 0 and tests:
            measure()
        while state.update < cfg.updates:
            start = time.time()

            # 1. Inference: a new phase when the last one is used up, Eq. (1)'s mu being the policy as it is now.
            if cfg.algo != "sft" and not state.batches:
                engine.push(model)
                sampled = draw_phase(cfg, engine, text, items, queue, state, world, run.write, signals.asked)

            # 2. One update, redone with half the micro-batch where the device runs out of memory.
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * min(1.0, (state.update + 1) / max(1, cfg.warmup))
            indices = queue.draw(cfg.prompts) if cfg.algo == "sft" else state.plan[0]
            if cfg.algo == "sft":
                metrics = sft_update(cfg, model, optimizer, items, indices, state, world)
            else:
                metrics = red_update(cfg, model, optimizer, items, state.batches[0], state, world)
                used = state.batches.pop(0)
                state.plan.pop(0)
            state.update += 1

            # 3. Eq. (5): weights that have degenerated end the phase; its unused problems go back to the queue.
            if state.plan and cfg.algo in ("red", "rapid") and rapid.phase_over(metrics["ess"], cfg.min_ess):
                queue.give_back([i for indices in state.plan for i in indices])
                state.plan, state.batches = [], []
                metrics["phase_ended"] = True

            # 4. Metrics, samples, evaluation, checkpoint.
            elapsed = time.time() - start
            state.seconds += elapsed
            row = dict(update=state.update, seconds=round(state.seconds, 2), **sampled, **metrics)
            sampled = {}
            run.write(row)
            run.progress(row, state)
            if cfg.show_every and state.update % cfg.show_every == 0 and cfg.algo != "sft":
                show_samples(text, items, used, log)
            if tests and (state.update % cfg.eval_every == 0 or state.update == cfg.updates):
                measure()
            if state.update % cfg.save_every == 0 or state.update == cfg.updates:
                state.queue = queue.state
                run.save(state, model, text, optimizer)
            if signals.asked():
                raise Interrupted
    except Interrupted:
        state.queue = queue.state
        run.save(state, model, text, optimizer)
        log(f"stopped by a signal after update {state.update}; continue with: python red.py --resume {run.path}")
        return False
    return True


class Signals:
    """SIGTERM and Ctrl-C ask for a stop (the loop saves and ends); a second one leaves at once."""

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
    """One right and one wrong response of the update, with the question and the gold answer."""
    for wanted in (1.0, 0.0):
        i, r = next(((i, r) for i, group in groups for r in group if r.reward == wanted), (None, None))
        if r:
            shown = items[i].problem.prompt[-300:] + " -> " + text.decode(r.response)[-500:]
            log(f"  {'right' if wanted else 'wrong'} (gold {items[i].gold}{', truncated' if r.truncated else ''}): {shown}")


def environment():
    """What a reader of a result needs to repeat it: versions, commit, hardware."""
    import transformers
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return dict(version=VERSION, torch=torch.__version__, transformers=transformers.__version__, python=sys.version.split()[0],
                commit=commit.stdout.strip() or None, device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                cpus=os.cpu_count(), threads=torch.get_num_threads())


def draw_curves(path, log):
    """curves.png from metrics.jsonl: accuracy by difficulty, reward, entropies, lam and ESS over updates."""
    try:
        import matplotlib
    except ImportError:
        log("curves.png is not drawn: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [json.loads(line) for line in open(path / "metrics.jsonl")]
    evals, updates = [r for r in rows if "eval" in r], [r for r in rows if "eval" not in r]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
    lines = {}
    for r in evals:
        lines.setdefault(r["eval"], []).append((r["update"], r["mean"]))
        for level, value in r["levels"].items() if len(r["levels"]) <= 8 else ():
            lines.setdefault(f"{r['eval']}: {level}", []).append((r["update"], value))
    panels = [("accuracy on held-out problems", lines)]
    for title, names in (("reward", ["reward"]), ("entropy, nats per token", ["entropy", "entropy_off"]), ("lam and ESS", ["lam", "ess"])):
        panels.append((title, {n: [(r["update"], r[n]) for r in updates if r.get(n) is not None] for n in names}))
    for axis, (title, series) in zip(axes.flat, panels):
        for name, points in series.items():
            if points:
                axis.plot(*zip(*points), label=name, linewidth=1.2)
        axis.set(title=title, xlabel="update")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.savefig(path / "curves.png", dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------- main
FREE_ON_RESUME = {"resume", "preset", "updates", "eval_every", "save_every", "keep", "show_every", "workers", "max_bad_updates", "engine",
                  "tokens_per_microbatch", "sample_rows", "device", "dtype", "grad_checkpointing", "threads"}


def settle(cfg, given):
    """Where the run lives: a new directory, or with --resume the old one with its own settings."""
    if cfg.resume:
        newest = sorted(Path("runs").glob("*/checkpoints"), key=lambda p: p.stat().st_mtime) if cfg.resume == "auto" else []
        if cfg.resume == "auto" and not newest:
            raise Stop("--resume auto: no run with a checkpoint under runs/; give the run directory")
        path = newest[-1].parent if newest else Path(cfg.resume)
        if not (path / "config.json").is_file():
            raise Stop(f"--resume: {path} holds no config.json; give a run directory that red.py has written")
        saved = json.loads((path / "config.json").read_text())["settings"]
        for name, value in given.items():
            if name not in FREE_ON_RESUME and name in saved and value != saved[name]:
                raise Stop(f"--{flag(name)}: found {value!r}, but {path} was started with {saved[name]!r}; leave the flag out, or start a new run")
        known = {f.name for f in dataclasses.fields(Config)}
        cfg = Config(**{**{k: v for k, v in saved.items() if k in known}, **given, "resume": str(path), "run": str(path)})
        validate(cfg)
        return cfg
    if not cfg.run:
        stem, k = f"runs/{'eval' if cfg.eval_only else cfg.algo}-s{cfg.seed}", 1
        while Path(stem + (f"-{k}" if k > 1 else "")).exists():
            k += 1
        cfg.run = stem + (f"-{k}" if k > 1 else "")
    elif any((Path(cfg.run) / name).exists() for name in ("metrics.jsonl", "checkpoints")):
        raise Stop(f"--run: {cfg.run} already holds a run; continue it with --resume {cfg.run}, or give another directory")
    return cfg


def open_run(cfg, world, log):
    """Data, model and evaluation sets, everything that can be refused, before anything is written."""
    device = torch.device(f"cuda:{world.local}" if cfg.device == "cuda" or cfg.device == "auto" and torch.cuda.is_available() else "cpu")
    train_set, test_sets = load_problems(cfg, log)
    if cfg.algo in ("red", "sft") and not cfg.eval_only and not any(p.traces for p in train_set):
        if cfg.algo == "sft":
            raise Stop(f"--algo sft: no problem of {cfg.train} has a trace that verifies; give traces (--trace-key), or use --algo rapid")
        log("no problem has a trace, so the offline term of Eq. (12) is empty: this run is RAPID alone")
    source = cfg.model or tiny_base(cfg.seed, "runs", log)
    model, tokenizer = load_model(cfg, source, device)
    text = Text(tokenizer, model, cfg.instruction)
    room = model.config.max_position_embeddings
    items = encode(cfg, text, train_set, room, log) if train_set else []
    tests = {name: encode(cfg, text, problems, room, log) for name, problems in test_sets.items()}
    return device, model, text, items, tests


def launch(argv):
    cfg, given = parse(argv)
    world = World()
    log = (lambda *a: print(*a, flush=True)) if world.rank == 0 else (lambda *a: None)
    cfg = settle(cfg, given)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.engine == "vllm":
        raise Stop("--engine: vllm is not built in yet; leave the flag out to sample with transformers")
    torch.manual_seed(cfg.seed)
    device, model, text, items, tests = open_run(cfg, world, log)
    use_bf16 = cfg.dtype == "bfloat16" or cfg.dtype == "auto" and device.type == "cuda"
    autocast = lambda: torch.autocast(device.type, torch.bfloat16) if use_bf16 else contextlib.nullcontext()
    engine = HFEngine(model, text, cfg.sample_rows, autocast)
    run = Run(cfg, world, log)
    run.begin(cfg, world, text)
    if cfg.eval_only:
        rows, responses = evaluate(cfg, engine, text, tests, 0, 0.0, world)
        for row in rows:
            run.write(row)
            log(eval_line(row))
        run.responses(0, responses)
        return 0
    queue = Queue(cfg, items)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay)
    state = State(token_budget=cfg.tokens_per_microbatch)
    if train(cfg, run, world, model, text, engine, items, tests, queue, optimizer, state, log) and world.rank == 0:
        save_model(run.path / "model", model, text.tokenizer)
        draw_curves(run.path, log)
        log(f"done: {run.path}/model  ({state.seconds:.0f} s of training)")
    return 0


def main(argv=None):
    """Exit codes: 0 done or stopped by a signal with a checkpoint, 2 a refusal, in one line."""
    try:
        return launch(sys.argv[1:] if argv is None else argv)
    except (Stop, data.DataError) as error:
        print(f"red.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
