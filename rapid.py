"""RAPID's update kernel: off-policy policy gradient on whole groups of responses, exact and without full logits.

Differences from GRPO:
1. One large sampling phase serves several updates; sequence weights w = pi/mu, clipped from above, correct for the
   distance between the policy that sampled and the one that learns, Eq. (1)           [RAPID, arXiv 2510.03515]
2. The group's value is importance-weighted too, Eq. (2); a leave-one-out variant removes its bias        [RAPID, ours]
3. No KL term and no PPO clip: the weighted policy gradient is the loss, Eq. (3) and (4)                  [RAPID]
4. The loss is a sum over tokens divided by a constant known beforehand, so that micro-batches, padding and the number
   of GPUs cannot change the gradient, Eq. (4)                                                            [ours]
5. A phase ends early when the effective sample size falls, Eq. (5)                                       [ours]
6. Log-probs come from hidden states in slices of the vocabulary; the [tokens, vocabulary] logits never exist.  [ours]

    python rapid.py                            # self-demonstration on a CPU: memory, time, exactness, bias tables
    python rapid.py --bench-head ours --tokens 8192 --width 1536 --vocab 151936 --dtype bfloat16

The file needs torch only and can be copied alone: `update` is one optimizer step, `accumulate` its gradient.
"""

import argparse
import math
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch

# Dims: N responses, T response tokens (padded), M packed response tokens, G responses per group, L tokens of a padded
# sequence (prompt and response), D width, V vocabulary, v one slice of it.


@dataclass
class Rollout:
    """One sampled response with what the sampler knew about it."""
    prompt: list[int]         # prompt token ids
    response: list[int]       # sampled ids; the end-of-sequence token belongs to it when it was sampled
    mu: list[float]           # log mu of each response token, as the sampler returned it
    reward: float
    truncated: bool = False   # stopped by the length limit: there is no end-of-sequence token


# ---- 1. log-probabilities without logits ----------------------------------------------------------------------------

class _HeadLogps(torch.autograd.Function):
    """log pi(target) and entropy, one slice of the vocabulary at a time, with a hand-written backward.

    Slices of the vocabulary, not of the tokens: a row of the weight's gradient is then one matmul over all tokens,
    accumulated in float32 inside it and written once, and a float32 master weight is cast slice by slice.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = torch.zeros(hidden.shape[0], dtype=acc, device=hidden.device)        # [M] sum of exp(z - top)
        top, chosen, mean = total - torch.inf, total.clone(), total.clone()          # [M] each; mean: sum of exp() * z
        for lo, rows in _slices(weight, hidden, chunk):
            z = (hidden @ rows.T).to(acc)                                            # [M, v]
            z = z.div_(temperature) if temperature != 1 else z                       # [M, v]
            inside, column = _columns(targets, lo, z)                                # [M], [M, 1]
            chosen = torch.where(inside, z.gather(1, column)[:, 0], chosen)          # [M]
            higher = torch.maximum(top, z.amax(1))                                   # [M]
            shrink = (top - higher).exp()                                            # [M] what was summed so far
            e = (z - higher[:, None]).exp_()                                         # [M, v]
            total = total * shrink + e.sum(1)                                        # [M]
            mean = mean * shrink + torch.linalg.vecdot(e, z)                         # [M]
            top = higher
        lse = top + total.log()                                                      # [M]
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.temperature, ctx.chunk = temperature, chunk
        entropy = lse - mean / total                                                 # [M] H = log Z - E[z]
        ctx.mark_non_differentiable(entropy)
        return chosen - lse, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, lse = ctx.saved_tensors
        scale = (grad / ctx.temperature)[:, None]                                    # [M, 1]
        grad_hidden = torch.zeros(hidden.shape, dtype=lse.dtype, device=hidden.device) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None  # [V, D]
        for lo, rows in _slices(weight, hidden, ctx.chunk):
            z = (hidden @ rows.T).to(lse.dtype)                                      # [M, v]
            z = z.div_(ctx.temperature) if ctx.temperature != 1 else z               # [M, v]
            z = z.sub_(lse[:, None]).exp_().mul_(-scale)                             # [M, v] -p g / temperature
            inside, column = _columns(targets, lo, z)                                # [M], [M, 1]
            z.scatter_add_(1, column, torch.where(inside[:, None], scale, 0.0))      # d logp / d z = onehot - p
            z = z.to(hidden.dtype)                                                   # [M, v]
            if grad_weight is not None:
                grad_weight[lo:lo + len(rows)] = z.T @ hidden                        # [v, D]
            if grad_hidden is not None:
                grad_hidden += z @ rows                                              # [M, D]
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def _slices(weight, hidden, chunk):
    """Yield (first row, rows [v, D] in hidden's dtype), sized so that tokens * v is about chunk * V."""
    size = max(1, chunk * len(weight) // max(1, len(hidden)))
    for lo in range(0, len(weight), size):
        yield lo, weight[lo:lo + size].to(hidden.dtype)


def _columns(targets, lo, z):
    """Which targets lie in the slice that starts at lo [M], and their column in it [M, 1] (0 where they do not)."""
    inside = (targets >= lo) & (targets < lo + z.shape[1])                           # [M]
    return inside, torch.where(inside, targets - lo, 0)[:, None]


def logps_and_entropy(hidden, head_weight, targets, *, temperature=1.0, chunk=1024):
    """log softmax(hidden @ head_weight.T / temperature) at the targets, and the entropy of that distribution.

    hidden [M, D], head_weight [V, D], targets [M] -> logp [M], entropy [M] (no gradient), in nats, float32 (float64
    for float64 inputs). The matmuls run in hidden's dtype, or in autocast's where that is on; head_weight may be a
    float32 master and then gets a float32 gradient. chunk: about chunk * V logits exist at a time.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))                         # [M, D]
    with torch.autocast(device, enabled=False):
        return _HeadLogps.apply(hidden, head_weight, targets, temperature, chunk)


# ---- 2. the estimator -----------------------------------------------------------------------------------------------

def importance_weights(logp, mu, mask, *, eta=2.0, level="sequence"):
    """Eq. (1): weights pi/mu, and the same clipped from above at eta. logp, mu, mask [N, T] -> (w, wc), detached.

    level "sequence": [N], the exact correction. "token": [N, T], lower variance for long responses, biased; 0 at padding.
    """
    log_ratio = torch.where(mask, logp.detach() - mu, 0.0)                           # [N, T]
    # Eq. (1): w_i = exp(sum_t [log pi - log mu]);  wc_i = min(w_i, eta)
    if level == "sequence":
        w = log_ratio.sum(1).exp()                                                   # [N]
    elif level == "token":
        w = torch.where(mask, log_ratio.exp(), 0.0)                                  # [N, T]
    else:
        raise ValueError(f"level: {level!r} is not sequence or token; choose one of the two")
    return w, w.clamp(max=eta)


def group_advantages(rewards, weights, group_size, *, baseline="group", norm="std", eps=1e-6):
    """Eq. (2) and (3). rewards, weights [N], whole groups one after another -> (adv [N], zero_signal [N] bool).

    A group of equal rewards is zero-signal: norm "std" gives it advantage 0, norm "none" keeps it, because the
    unbiasedness of Eq. (4) off-policy needs it. All-ones weights give GRPO's plain group mean.
    """
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"group_size: {group_size} for {len(rewards)} responses; need >= 2 and whole groups")
    r = rewards.view(-1, group_size)                                                 # [N/G, G]
    weighted = weights.view_as(r) * r                                                # [N/G, G]
    if baseline == "group":   # Eq. (2): V(x) = (1/G) sum_j wc_j r_j
        value = weighted.mean(1, keepdim=True)                                       # [N/G, 1]
    elif baseline == "loo":   # Eq. (2), leave-one-out: V_-i(x) = (1/(G-1)) sum_{j != i} wc_j r_j
        value = (weighted.sum(1, keepdim=True) - weighted) / (group_size - 1)        # [N/G, G]
    else:
        raise ValueError(f"baseline: {baseline!r} is not group or loo; choose one of the two")
    zero_signal = (r == r[:, :1]).all(1, keepdim=True).expand_as(r)                  # [N/G, G]
    adv = r - value                                                                  # [N/G, G]
    if norm == "std":         # Eq. (3): A_i = (r_i - V(x)) / (std(r_1..r_G) + eps), std over G (not G - 1)
        adv = torch.where(zero_signal, 0.0, adv / (r.std(1, keepdim=True, correction=0) + eps))
    elif norm != "none":
        raise ValueError(f"norm: {norm!r} is not std or none; choose one of the two")
    return adv.reshape(-1), zero_signal.reshape(-1)


def rapid_loss(logp, mask, wc, adv, *, denominator):
    """Eq. (4) -> scalar. logp, mask [N, T], wc [N] or [N, T], adv [N]; denominator = B G Lbar over all ranks."""
    # Eq. (4): L_on = -(1/(B G)) sum_i sg(wc_i A_i) sum_t log pi(y_it) / Lbar
    wc = wc if wc.dim() == 2 else wc[:, None]                                        # [N, T] or [N, 1]
    coefficient = (wc * adv[:, None]).detach()                                       # [N, T] or [N, 1]
    return -torch.where(mask, coefficient * logp, 0.0).sum() / denominator


def grpo_loss(logp, mu, mask, adv, *, denominator, clip_low=0.2, clip_high=0.28):
    """The baseline: PPO's clipped ratio per token -> scalar. logp, mu, mask [N, T], adv [N]; denominator as Eq. (4)."""
    ratio = torch.where(mask, logp - mu, 0.0).exp()                                  # [N, T]
    adv = adv[:, None]                                                               # [N, 1]
    gain = torch.minimum(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)  # [N, T]
    return -torch.where(mask, gain, 0.0).sum() / denominator


def phase_over(ess, min_ess):
    """Eq. (5): sample afresh when the effective sample size of the last update fell below min_ess (NaN counts so)."""
    return not ess >= min_ess


# ---- 3. scoring with a model ----------------------------------------------------------------------------------------

def micro_batches(lengths, token_budget):
    """Indices of sequences of similar length, padded tokens <= token_budget; a longer sequence goes alone.

    >>> micro_batches([3, 9, 4, 2], 8)
    [[1], [2, 0], [3]]
    """
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # longest first, so the first of a batch sets its padded width
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= token_budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def check_head(model):
    """Raise where the model does more to its logits than hidden @ weight.T, which `logps_and_entropy` computes."""
    head, config = model.get_output_embeddings(), model.config
    config = getattr(config, "text_config", None) or config
    if getattr(head, "bias", None) is not None:
        raise ValueError("model: its output head has a bias, which rapid.py cannot score; use a head without bias")
    for name in ("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling", "lm_head_multiplier"):
        if (value := getattr(config, name, None)) not in (None, 1):
            raise ValueError(f"model: config.{name} = {value} changes the logits, which rapid.py cannot score; "
                             "only None or 1 is supported, choose another model")


def score(model, rollouts, *, temperature=1.0, chunk=1024):
    """log pi and entropy of every response token -> logp [N, T], entropy [N, T], mask [N, T] (zeros at padding).

    Right padding, the mask from lengths alone (an id equal to the padding id is a token like any other), and the head
    only at response positions. Runs under the caller's autocast and grad mode.
    """
    check_head(model)
    weight = model.get_output_embeddings().weight                                    # [V, D]
    for k, item in enumerate(rollouts):
        if not item.prompt or not item.response:
            raise ValueError(f"rollouts[{k}]: empty prompt or response; both need at least one token")
    prompts = torch.tensor([len(item.prompt) for item in rollouts])[:, None]         # [N, 1]
    lengths = torch.tensor([len(item.response) for item in rollouts])[:, None]       # [N, 1]
    position = torch.arange(int((prompts + lengths).max()))                          # [L]
    ids = torch.zeros(len(rollouts), len(position), dtype=torch.long)                # [N, L]
    for row, item in zip(ids, rollouts):
        row[:len(item.prompt) + len(item.response)] = torch.tensor(item.prompt + item.response)
    real = position < prompts + lengths                                              # [N, L]
    # position t predicts token t + 1, so a response is read off from the prompt's last position on
    predicts = (position >= prompts - 1) & (position < prompts + lengths - 1)        # [N, L]
    targets = ids.roll(-1, 1)[predicts].to(weight.device)                            # [M]
    backbone = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    hidden = backbone(input_ids=ids.to(weight.device), attention_mask=real.long().to(weight.device),
                      use_cache=False).last_hidden_state[predicts.to(weight.device)]  # [M, D]
    packed, packed_entropy = logps_and_entropy(hidden, weight, targets, temperature=temperature, chunk=chunk)  # [M], [M]
    mask = (torch.arange(int(lengths.max())) < lengths).to(weight.device)            # [N, T]
    logp = packed.new_zeros(mask.shape).masked_scatter(mask, packed)                 # [N, T]
    entropy = packed.new_zeros(mask.shape).masked_scatter(mask, packed_entropy)      # [N, T]
    return logp, entropy, mask


# ---- 4. one update --------------------------------------------------------------------------------------------------

def plan(lengths, token_budget, group_size):
    """Micro-batches for whole groups of these sequence lengths -> (index lists, needs a forward pass beforehand).

    The value of Eq. (2) needs the weights of a whole group before any backward. Micro-batches of whole groups have
    them in one pass but pad more; micro-batches by length pad least but need a forward pass first, about a third of
    the work of forward and backward. The cheaper one is taken.
    """
    by_length = micro_batches(lengths, token_budget)
    widths = [group_size * max(lengths[i:i + group_size]) for i in range(0, len(lengths), group_size)]
    by_group = [[g * group_size + k for g in batch for k in range(group_size)]
                for batch in micro_batches(widths, token_budget)]
    padded = [sum(len(b) * max(lengths[i] for i in b) for b in batches) for batches in (by_length, by_group)]
    if max(widths, default=0) <= token_budget and padded[1] <= 4 / 3 * padded[0]:
        return by_group, False
    return by_length, True


def accumulate(model, rollouts, *, group_size, denominator, algo="rapid", eta=2.0, is_level="sequence", baseline="group",
               adv_norm="std", temperature=1.0, token_budget=16384, chunk=1024, eps=1e-6, clip_low=0.2, clip_high=0.28):
    """Add the gradient of Eq. (4) over whole groups to p.grad and return metrics; no optimizer step.

    rollouts: group g is rollouts[g*G:(g+1)*G]. denominator: B G Lbar over all ranks, so the gradients and metrics of
    ranks and micro-batches add up. Metrics are sums and counts (max_*: maxima); `summarise` makes means of them.
    """
    if algo not in ("rapid", "grpo"):
        raise ValueError(f"algo: {algo!r} is not rapid or grpo; choose one of the two")
    for k, item in enumerate(rollouts):
        if len(item.mu) != len(item.response):
            raise ValueError(f"rollouts[{k}].mu: {len(item.mu)} log-probs for {len(item.response)} response tokens; "
                             "need one each, as the sampler returned them")
    how = dict(algo=algo, eta=eta, level=is_level, temperature=temperature, chunk=chunk, clip=(clip_low, clip_high))
    value = dict(baseline=baseline, norm=adv_norm, eps=eps)
    length = [len(item.prompt) + len(item.response) for item in rollouts]
    rewards = torch.tensor([float(item.reward) for item in rollouts], dtype=torch.float64)  # [N]
    weights = torch.ones_like(rewards)                                               # [N] wc of Eq. (2); GRPO: stays 1
    _, zero = group_advantages(rewards, weights, group_size, **value)                # [N]
    metrics = {"responses": len(rollouts), "groups": len(rollouts) // group_size,
               "zero_signal_groups": int(zero.sum()) // group_size, "truncated": sum(r.truncated for r in rollouts),
               "reward_sum": float(rewards.sum()), "reward_sq_sum": float(rewards.square().sum()), "loss": 0.0}

    # 1. silent: advantage 0 whatever the weights. Scored for the metrics, but without backward.
    silent = zero & (rewards == 0) if algo == "rapid" and adv_norm == "none" else zero  # [N]
    live = (~silent).nonzero()[:, 0].tolist()
    quiet = silent.nonzero()[:, 0].tolist()
    first = [[quiet[k] for k in batch] for batch in micro_batches([length[i] for i in quiet], token_budget)]
    # 2. GRPO's value has no weights: single rows as units, so by length and never a pass beforehand
    batches, two_passes = plan([length[i] for i in live], token_budget, group_size if algo == "rapid" else 1)
    batches = [[live[k] for k in batch] for batch in batches]
    for batch in first + (batches if two_passes else []):
        with torch.no_grad():
            *_, weights[batch], part = _loss_parts(model, [rollouts[i] for i in batch], **how)
        add_metrics(metrics, part)
    # 3. forward and backward
    for batch in batches:
        logp, mu, mask, wc, response_weight, part = _loss_parts(model, [rollouts[i] for i in batch], **how)
        if not two_passes:
            weights[batch] = response_weight
            add_metrics(metrics, part)
        adv, _ = group_advantages(rewards, weights, group_size, **value)             # [N]
        adv = adv[batch].to(logp)                                                    # [n]
        if algo == "rapid":
            loss = rapid_loss(logp, mask, wc, adv, denominator=denominator)          # []
        else:
            loss = grpo_loss(logp, mu, mask, adv, denominator=denominator, clip_low=clip_low, clip_high=clip_high)
        loss.backward()
        metrics["loss"] += float(loss.detach())
    return metrics


def _loss_parts(model, items, *, algo, eta, level, temperature, chunk, clip):
    """Score one micro-batch -> logp, mu, mask [n, T], wc, each response's weight in Eq. (2) [n], metrics."""
    logp, entropy, mask = score(model, items, temperature=temperature, chunk=chunk)  # [n, T] each
    mu = torch.zeros(mask.shape, dtype=logp.dtype)                                   # [n, T]
    for row, item in zip(mu, items):
        row[:len(item.mu)] = torch.tensor(item.mu, dtype=mu.dtype)
    mu = mu.to(logp.device)                                                          # [n, T]
    w, wc = importance_weights(logp, mu, mask, eta=eta, level="token" if algo == "grpo" else level)
    # Eq. (2) wants one weight per response: with token-level weights their mean over the response's tokens; GRPO: 1
    weight = wc if wc.dim() == 1 else wc.sum(1) / mask.sum(1)                        # [n]
    weight = torch.ones_like(weight) if algo == "grpo" else weight                   # [n]
    log_ratio = torch.where(mask, logp.detach() - mu, 0.0).cpu().double()            # [n, T]
    flat = (w if w.dim() == 1 else w[mask]).cpu().double()                           # [n] or [M]
    clipped = flat > eta if algo == "rapid" else (flat < 1 - clip[0]) | (flat > 1 + clip[1])  # as flat
    part = {"weights": flat.numel(), "w_sum": flat.sum(), "w_sq_sum": flat.square().sum(), "clipped": clipped.sum(),
            "tokens": mask.sum(), "entropy_sum": entropy.sum(),
            "kl_sum": (log_ratio.exp() - 1 - log_ratio).sum(),                       # k3 estimate of KL(mu || pi)
            "abs_logw_sum": log_ratio.abs().sum(), "max_abs_dlogp": log_ratio.abs().max(),
            "max_abs_logw": log_ratio.sum(1).abs().max()}
    return logp, mu, mask, wc, weight.cpu().double(), {name: float(v) for name, v in part.items()}


def add_metrics(total, part):
    """Add one micro-batch's or rank's metrics to total, in place: sums add, max_* take the maximum."""
    for name, v in part.items():
        total[name] = max(total.get(name, 0.0), v) if name.startswith("max_") else total.get(name, 0) + v


def summarise(m):
    """Readable means of `accumulate`'s metrics (after `add_metrics` over ranks). One line each: what over what."""
    n, tokens = m["responses"], m["tokens"]
    mean = m["reward_sum"] / n
    return {
        "loss": m["loss"],                                                 # Eq. (4), already divided by its constant
        "reward": mean,                                                    # per response
        "reward_std": math.sqrt(max(0.0, m["reward_sq_sum"] / n - mean ** 2)),
        "ess": m["w_sum"] ** 2 / (m["weights"] * m["w_sq_sum"]) if m["w_sq_sum"] > 0 else 0.0,  # 1 on-policy, -> 1/N
        "clip_frac": m["clipped"] / m["weights"],                          # weights above eta (GRPO: ratios clipped)
        "w_mean": m["w_sum"] / m["weights"],                               # 1 in expectation
        "kl": m["kl_sum"] / tokens,                                        # KL(mu || pi), k3, nats per token
        "entropy": m["entropy_sum"] / tokens,                              # of pi, nats per token
        "abs_dlogp": m["abs_logw_sum"] / tokens,                           # |log pi - log mu| per token
        "max_abs_dlogp": m["max_abs_dlogp"],                               # worst token
        "max_abs_logw": m["max_abs_logw"],                                 # worst response: |sum_t log pi - log mu|
        "zero_signal": m["zero_signal_groups"] / m["groups"],              # groups whose rewards are all equal
        "truncated": m["truncated"] / n,                                   # responses cut by the length limit
        "length": tokens / n,                                              # tokens per response
    }


def update(model, optimizer, rollouts, *, max_grad_norm=1.0, **settings):
    """One optimizer step on whole groups; settings as in `accumulate` -> its metrics and the gradient's norm.

    A gradient that is not finite changes nothing: the step is left out and counted in `skipped_steps`.
    """
    optimizer.zero_grad(set_to_none=True)
    metrics = accumulate(model, rollouts, **settings)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))
    if math.isfinite(norm):
        optimizer.step()
    return metrics | {"grad_norm": norm, "skipped_steps": int(not math.isfinite(norm))}
