"""RAPID's update kernel: off-policy policy gradient on whole groups of responses, exact and without full logits.
Needs torch only and can be copied alone: `update` is one optimizer step, `accumulate` its gradient.

Differences from GRPO:
1. One large sampling phase serves several updates; sequence weights w = pi/mu, clipped from above, correct for the
   distance between the policy that sampled and the one that learns, Eq. (1)           [RAPID, arXiv 2510.03515]
2. The group's value is importance-weighted too, Eq. (2); leave-one-out, the default, removes its bias    [RAPID, ours]
3. No KL term and no PPO clip: the weighted policy gradient is the loss, Eq. (3) and (4)                  [RAPID]
4. The loss is a sum over tokens divided by a constant known beforehand, so that micro-batches, padding and the number
   of GPUs cannot change the gradient, Eq. (4)                                                            [ours]
5. A phase ends early when the effective sample size falls, Eq. (5)                                       [ours]
6. Log-probs come from hidden states in slices of the vocabulary; the [tokens, vocabulary] logits never exist.  [ours]
7. A prompt is computed once for all of its responses, where that saves much.                             [ours]

    python rapid.py                                          # self-demonstration on a CPU: memory, time, bias
    python rapid.py --head 8192 1536 151936 256 --repeats 1  # the head of Qwen2.5-1.5B: 15 GiB and 10 minutes
"""

import argparse
import math
import multiprocessing
import resource
import time
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch

# Dims: N responses, T response tokens (padded), M packed response tokens, G responses per group, L tokens of a padded
# sequence (prompt and response), P prompts, W their padded width, D width, V vocabulary, v one slice of it.


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
    written once, and a float32 master is cast slice by slice. One buffer, as new memory costs a CPU more than exp().
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        ctx.temperature, ctx.chunk = temperature, chunk
        buffer, half = _buffers(hidden, weight, chunk)                               # [v, M] each
        spare = torch.empty_like(buffer)                                             # [v, M]
        total = torch.zeros_like(buffer[0])                                          # [M] sum of exp(z - top)
        top, chosen, mean = total - torch.inf, total.clone(), total.clone()          # [M] each; mean: sum of exp() z
        for _, rows, z, inside, place in _slices(buffer, half, hidden, weight, targets, temperature):
            chosen = torch.where(inside, z.gather(0, place), chosen)[0]              # [M]
            higher = torch.maximum(top, z.amax(0))                                   # [M]
            shrink = (top - higher).exp()                                            # [M] of what is summed so far
            e = torch.sub(z, higher, out=spare[:len(z)]).exp_()                      # [v, M]
            total = total * shrink + e.sum(0)                                        # [M]
            mean = mean * shrink + e.mul_(z).sum(0)                                  # [M]
            top = higher                                                             # [M]
        log_z = top + total.log()                                                    # [M]
        entropy = log_z - mean / total                                               # [M] H = log Z - E[z]
        ctx.save_for_backward(hidden, weight, targets, log_z)
        ctx.mark_non_differentiable(entropy)
        return chosen - log_z, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, log_z = ctx.saved_tensors
        scale = grad[None] / ctx.temperature                                         # [1, M]
        grad_hidden = torch.zeros_like(hidden, dtype=log_z.dtype)                    # [M, D]
        product = torch.empty_like(grad_hidden)                                      # [M, D]
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None  # [V, D]; None: frozen
        buffer, half = _buffers(hidden, weight, ctx.chunk)                           # [v, M] each
        for lo, rows, z, inside, place in _slices(buffer, half, hidden, weight, targets, ctx.temperature):
            z.sub_(log_z).exp_().mul_(-scale)                                        # [v, M] d logp/d z = onehot - p
            z = half[:len(z)].copy_(z.scatter_add_(0, place, torch.where(inside, scale, 0.0)))  # [v, M]
            if grad_weight is not None:
                _matmul(z, hidden, out=grad_weight[lo:lo + len(rows)])               # [v, D]
            grad_hidden += _matmul(z.T, rows, out=product)                           # [M, D]
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def _buffers(hidden, weight, chunk):
    """Room for a slice's logits [v, M], v M about chunk V, in float32 (float64 if hidden is) and in hidden's dtype."""
    size = min(len(weight), max(32, chunk * len(weight) // max(1, len(hidden))))     # thinner slices only cost time
    half = hidden.new_empty(size, len(hidden))                                       # [v, M]
    wide = torch.promote_types(half.dtype, torch.float32)
    return half if half.dtype == wide else torch.empty_like(half, dtype=wide), half


def _slices(buffer, half, hidden, weight, targets, temperature):
    """Yield first row, weight rows [v, D], logits [v, M] in buffer, target inside? [1, M], its place or 0 [1, M]."""
    for lo in range(0, len(weight), len(buffer)):
        rows = weight[lo:lo + len(buffer)].to(hidden.dtype)                          # [v, D]
        place = (targets - lo)[None]                                                 # [1, M]
        inside = (place >= 0) & (place < len(rows))                                  # [1, M]
        z = _matmul(rows, hidden.T, out=buffer[:len(rows)], half=half[:len(rows)])   # [v, M]
        yield lo, rows, z.div_(temperature) if temperature != 1 else z, inside, place.where(inside, 0)


def _matmul(a, b, out, half=None):
    """a @ b in out's dtype. CUDA keeps a bfloat16 product in float32; elsewhere it is rounded to bfloat16."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda and not torch.version.hip:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(torch.mm(a, b, out=half))


def logps_and_entropy(hidden, head_weight, targets, *, temperature=1.0, chunk=256):
    """log softmax(hidden @ head_weight.T / temperature) at the targets, and the entropy of that distribution.

    hidden [M, D], head_weight [V, D], targets [M] -> logp [M], entropy [M] (no gradient), in nats, float32 (float64 if
    hidden is). The matmuls run in hidden's dtype, or in autocast's where that is on; head_weight may be a float32
    master and then gets a float32 gradient. chunk: about chunk * V logits exist at a time.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))             # [M, D]
    with torch.autocast(hidden.device.type, enabled=False):
        return _HeadLogps.apply(hidden, head_weight, targets, temperature, chunk)


# ---- 2. the estimator -----------------------------------------------------------------------------------------------

def _check_choice(name, value, *allowed):
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(allowed)}; choose one of these")


def importance_weights(logp, mu, mask, *, eta=2.0, level="sequence"):
    """Eq. (1): weights pi/mu, and the same clipped from above at eta. logp, mu, mask [N, T] -> (w, wc), detached:
    [N] for level "sequence", the exact correction; [N, T] for "token", biased, less variance on long responses."""
    _check_choice("level", level, "sequence", "token")
    log_ratio = torch.where(mask, logp.detach() - mu, 0.0)                           # [N, T]
    # Eq. (1): w_i = exp(sum_t [log pi - log mu]);  wc_i = min(w_i, eta)
    w = log_ratio.sum(1).exp() if level == "sequence" else torch.where(mask, log_ratio.exp(), 0.0)  # [N] or [N, T]
    return w, w.clamp(max=eta)


def group_advantages(rewards, weights, group_size, *, baseline="loo", norm="std", eps=1e-6):
    """Eq. (2) and (3). rewards, weights [N], whole groups one after another -> (adv [N], zero_signal [N] bool).

    "group" is the paper's value; "loo" points the same way on-policy and has no bias off-policy. A group of equal
    rewards is zero-signal: norm "std" gives it advantage 0, "none" keeps it, as Eq. (4) is biased off-policy without.
    """
    _check_choice("baseline", baseline, "group", "loo")
    _check_choice("norm", norm, "std", "none")
    if group_size < 2 or len(rewards) % group_size or not len(rewards):
        raise ValueError(f"group_size: {group_size} for {len(rewards)} responses; need >= 2 and whole groups")
    r = rewards.view(-1, group_size)                                                 # [N/G, G]
    weighted = weights.view_as(r) * r                                                # [N/G, G]
    # Eq. (2): V(x) = (1/G) sum_j wc_j r_j, or leave-one-out: V_-i(x) = (1/(G-1)) sum_{j != i} wc_j r_j
    value = weighted.mean(1, keepdim=True)                                           # [N/G, 1]
    if baseline == "loo":
        value = (weighted.sum(1, keepdim=True) - weighted) / (group_size - 1)        # [N/G, G]
    zero_signal = (r == r[:, :1]).all(1, keepdim=True).expand_as(r)                  # [N/G, G]
    # Eq. (3): A_i = (r_i - V(x)) / (std(r_1..r_G) + eps), std over G (not G - 1); the division is optional
    adv = r - value                                                                  # [N/G, G]
    if norm == "std":
        adv = torch.where(zero_signal, 0.0, adv / (r.std(1, keepdim=True, correction=0) + eps))  # [N/G, G]
    return adv.reshape(-1), zero_signal.reshape(-1)


def rapid_loss(logp, mask, wc, adv, *, denominator):
    """Eq. (4) -> scalar. logp, mask [N, T], wc [N] or [N, T], adv [N]; denominator = B G Lbar over all ranks."""
    # Eq. (4): L_on = -(1/(B G)) sum_i sg(wc_i A_i) sum_t log pi(y_it) / Lbar
    coefficient = ((wc if wc.dim() == 2 else wc[:, None]) * adv[:, None]).detach()   # [N, T] or [N, 1]
    return -torch.where(mask, coefficient * logp, 0.0).sum() / denominator


def grpo_loss(logp, mu, mask, adv, *, denominator, clip_low=0.2, clip_high=0.28):
    """The baseline: PPO's clipped ratio per token -> scalar. logp, mu, mask [N, T], adv [N]; denominator as Eq. (4)."""
    ratio = torch.where(mask, logp - mu, 0.0).exp()                                  # [N, T]
    gain = torch.minimum(ratio * adv[:, None], ratio.clamp(1 - clip_low, 1 + clip_high) * adv[:, None])  # [N, T]
    return -torch.where(mask, gain, 0.0).sum() / denominator


def phase_over(ess, min_ess):
    """Eq. (5): sample afresh when the effective sample size of the last update fell below min_ess (NaN counts so)."""
    return not ess >= min_ess


# ---- 3. scoring with a model ----------------------------------------------------------------------------------------

def micro_batches(lengths, token_budget, among=None):
    """Indices (all or `among`) in lists of similar length, padded tokens <= token_budget; a longer one goes alone. Past
    an eighth of the budget a list also ends before a tenth of it would be padding.

    >>> micro_batches([7, 20, 8, 2], 16)
    [[1], [2, 0], [3]]
    """
    batches = [[]]  # longest first, so that the first of a batch sets its padded width
    for i in sorted(range(len(lengths)) if among is None else among, key=lambda i: -lengths[i]):
        more = batches[-1] + [i]
        padded = len(more) * lengths[more[0]]
        wasteful = padded > token_budget / 8 and sum(lengths[k] for k in more) < 0.9 * padded
        if batches[-1] and (padded > token_budget or wasteful):
            batches.append([])
        batches[-1].append(i)
    return batches if batches[0] else []


def check_head(model):
    """Raise where the model does more to its logits than hidden @ weight.T, which is all that is computed here."""
    config, head = getattr(model.config, "text_config", None) or model.config, model.get_output_embeddings()
    names = ("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling", "lm_head_multiplier")
    found = {name: getattr(config, name, None) for name in names if getattr(config, name, None) not in (None, 1)}
    if found or getattr(head, "bias", None) is not None:
        raise ValueError(f"model: {found or 'a bias of the head'} changes the logits, which cannot be scored here; "
                         "allowed: None or 1 and no bias, choose another model")


def pad(rows, device, dtype=torch.long):
    """Lists of different lengths -> their values [N, T], 0 at padding on the right, and mask [N, T], False there."""
    lengths = torch.tensor([len(row) for row in rows])[:, None]                      # [N, 1]
    mask = torch.arange(int(lengths.max())) < lengths                                # [N, T]
    flat = torch.tensor([x for row in rows for x in row], dtype=dtype)               # [M]
    return torch.zeros(mask.shape, dtype=dtype).masked_scatter(mask, flat).to(device), mask.to(device)


def score(model, rollouts, *, temperature=1.0, chunk=256, share_prompts=True):
    """log pi and entropy of every response token -> logp [N, T], entropy [N, T], mask [N, T] (zeros at padding).

    rollouts: anything with .prompt and .response. The mask comes from lengths alone: an id that equals the padding id
    is a token like any other. The head runs at response positions only, all under the caller's autocast and grad mode.
    share_prompts: a prompt is computed once for all of its responses, where that saves a quarter of the positions.
    """
    check_head(model)
    for k, item in enumerate(rollouts):
        if not item.prompt or not item.response:
            raise ValueError(f"rollouts[{k}]: empty prompt or response; both need at least one token")
    weight = model.get_output_embeddings().weight                                    # [V, D]
    targets, mask = pad([item.response for item in rollouts], weight.device)         # [N, T] each
    backbone = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    prompts = list(dict.fromkeys(tuple(item.prompt) for item in rollouts))           # P different ones
    together = len(prompts) * max(map(len, prompts)) + mask.numel()                  # padded positions
    apart = len(rollouts) * max(len(item.prompt) + len(item.response) for item in rollouts)
    if share_prompts and together <= 0.75 * apart and cache_is_all(model):
        hidden = _hidden_of_shared_prompts(backbone, rollouts, mask, prompts)        # [M, D]
    else:
        # no attention mask: padding is on the right, where a causal model cannot see it, and kernels are faster without
        ids, _ = pad([item.prompt + item.response for item in rollouts], weight.device)  # [N, L]
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state          # [N, L, D]
        # position t predicts token t + 1, so a response is read off from the prompt's last position on
        before = torch.tensor([len(item.prompt) - 1 for item in rollouts], device=weight.device)  # [N]
        row, t = mask.nonzero(as_tuple=True)                                         # [M] each
        hidden = hidden[row, before[row] + t]                                        # [M, D]
    packed = logps_and_entropy(hidden, weight, targets[mask], temperature=temperature, chunk=chunk)  # [M], [M]
    logp, entropy = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in packed)  # [N, T] each
    return logp, entropy, mask


def _hidden_of_shared_prompts(backbone, rollouts, mask, prompts):
    """Hidden states [M, D] that predict the response tokens, each of the P prompts computed once: its keys and values
    serve all of its responses, whose gradients meet in them."""
    which = torch.tensor([prompts.index(tuple(item.prompt)) for item in rollouts], device=mask.device)  # [N]
    ids, seen = pad(prompts, mask.device)                                            # [P, W] each
    first = backbone(input_ids=ids, use_cache=True)
    length, cache = seen.sum(1)[which], first.past_key_values                        # [N]
    hidden = first.last_hidden_state[which, length - 1][:, None]                     # [N, 1, D]
    if mask.shape[1] > 1:                                        # a response's last token predicts nothing: left out
        cache.batch_select_indices(which)
        tokens, _ = pad([item.response[:-1] for item in rollouts], mask.device)      # [N, T-1]
        # a prompt's padding lies between it and its responses, which must not see it
        visible = torch.cat([seen[which], torch.ones_like(mask[:, 1:])], 1).long()   # [N, W+T-1]
        later = backbone(input_ids=tokens, attention_mask=visible, past_key_values=cache, use_cache=True,
                         position_ids=length[:, None] + torch.arange(tokens.shape[1], device=mask.device))
        hidden = torch.cat([hidden, later.last_hidden_state], 1)                     # [N, T, D]
    return hidden[mask]


def cache_is_all(model):
    """Do keys and values hold all that the model keeps of the past? Not with recurrent states or attention windows,
    and with gradient checkpointing transformers keeps none."""
    config = getattr(model.config, "text_config", None) or model.config
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    kinds = getattr(config, "layer_types", None) or ["window" if any(windows) else "full_attention"]
    checkpointing = model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    return set(kinds) == {"full_attention"} and not getattr(model, "_is_stateful", False) and not checkpointing


# ---- 4. one update --------------------------------------------------------------------------------------------------

def plan(lengths, live, token_budget, group_size):
    """Micro-batches of the live responses (whole groups, in order) -> (index lists, is a forward pass needed before?).

    Eq. (2) needs the weights of a whole group before any backward. Micro-batches of whole groups have them in one
    pass but pad more; those by length pad least but need a forward pass first, about a third more work.
    """
    groups = [live[k:k + group_size] for k in range(0, len(live), group_size)]
    widths = [group_size * max(lengths[i] for i in group) for group in groups]       # padded tokens of each group
    by_group = [[i for g in batch for i in groups[g]] for batch in micro_batches(widths, token_budget)]
    by_length = micro_batches(lengths, token_budget, live)
    cost = [sum(len(batch) * max(lengths[i] for i in batch) for batch in batches) for batches in (by_group, by_length)]
    fits = max(widths, default=0) <= max(token_budget, *lengths)
    return (by_group, False) if fits and cost[0] <= 4 / 3 * cost[1] else (by_length, True)


def accumulate(model, rollouts, *, group_size, denominator, algo="rapid", eta=2.0, is_level="sequence",
               baseline="loo", adv_norm="std", eps=1e-6, clip_low=0.2, clip_high=0.28, temperature=1.0,
               token_budget=16384, chunk=256, scorer=None):
    """Add the gradient of Eq. (4) over whole groups to p.grad and return metrics; no optimizer step.

    rollouts: group g is rollouts[g*G:(g+1)*G]. denominator: B G Lbar over all ranks, so the gradients and metrics of
    ranks and micro-batches add up. Metrics are sums (max_*: maxima), see `summarise`. scorer: in place of `score`.
    """
    _check_choice("algo", algo, "rapid", "grpo")
    for k, item in enumerate(rollouts):
        if len(item.mu) != len(item.response) or not all(map(math.isfinite, item.mu)):
            raise ValueError(f"rollouts[{k}].mu: {len(item.mu)} log-probs for {len(item.response)} response tokens; "
                             "need one finite number each, as the sampler returned them")
    how = dict(algo=algo, eta=eta, level=is_level, temperature=temperature, chunk=chunk, clip=(clip_low, clip_high))
    value = dict(baseline="group" if algo == "grpo" else baseline, norm=adv_norm, eps=eps)
    length = [len(item.prompt) + len(item.response) for item in rollouts]
    rewards = torch.tensor([float(item.reward) for item in rollouts], dtype=torch.float64)  # [N]
    weights = torch.ones_like(rewards)                                               # [N] wc of Eq. (2); GRPO: stays 1
    _, zero = group_advantages(rewards, weights, group_size, **value)                # [N]
    metrics = {"responses": len(rollouts), "groups": len(rollouts) // group_size,
               "zero_signal_groups": int(zero.sum()) // group_size, "truncated": sum(r.truncated for r in rollouts),
               "reward_sum": float(rewards.sum()), "reward_sq_sum": float(rewards.square().sum()), "loss": 0.0}

    # 1. silent: advantage 0 whatever the weights. Scored for the metrics, but without backward.
    silent = zero & (rewards == 0) if algo == "rapid" and adv_norm == "none" else zero  # [N]
    live, quiet = (~silent).nonzero()[:, 0].tolist(), silent.nonzero()[:, 0].tolist()
    # 2. GRPO's value has no weights: single responses as groups, so by length and never a pass before
    batches, two_passes = plan(length, live, token_budget, group_size if algo == "rapid" else 1)
    for batch in micro_batches(length, token_budget, quiet) + (batches if two_passes else []):
        with torch.no_grad():
            *_, weights[batch], part = _loss_parts(scorer, model, [rollouts[i] for i in batch], **how)
        add_metrics(metrics, part)
    # 3. forward and backward
    for batch in batches:
        logp, mu, mask, wc, response_weight, part = _loss_parts(scorer, model, [rollouts[i] for i in batch], **how)
        if not two_passes:
            weights[batch] = response_weight
            add_metrics(metrics, part)
        adv = group_advantages(rewards, weights, group_size, **value)[0][batch].to(logp)  # [n]
        loss = rapid_loss(logp, mask, wc, adv, denominator=denominator)              # []
        if algo == "grpo":
            loss = grpo_loss(logp, mu, mask, adv, denominator=denominator, clip_low=clip_low, clip_high=clip_high)
        loss.backward()
        metrics["loss"] += float(loss.detach())
    return metrics


def _loss_parts(scorer, model, items, *, algo, eta, level, temperature, chunk, clip):
    """Score one micro-batch -> logp, mu, mask [n, T], wc, each response's weight in Eq. (2) [n], metrics."""
    logp, entropy, mask = (scorer or score)(model, items, temperature=temperature, chunk=chunk)  # [n, T] each
    mu, _ = pad([item.mu for item in items], logp.device, logp.dtype)                # [n, T]
    w, wc = importance_weights(logp, mu, mask, eta=eta, level="token" if algo == "grpo" else level)
    # Eq. (2) has one weight per response: with token-level weights the mean over the response's tokens (GRPO: 1)
    weight = wc if wc.dim() == 1 else (mask if algo == "grpo" else wc).sum(1) / mask.sum(1)  # [n]
    log_ratio = torch.where(mask, logp.detach() - mu, 0.0).cpu().double()            # [n, T]
    flat = (w if w.dim() == 1 else w[mask]).cpu().double()                           # [n] or [M]
    clipped = flat > eta if algo == "rapid" else (flat < 1 - clip[0]) | (flat > 1 + clip[1])  # as flat
    part = {"weights": flat.numel(), "w_sum": flat.sum(), "w_sq_sum": flat.square().sum(), "clipped": clipped.sum(),
            "tokens": mask.sum(), "entropy_sum": entropy.sum(), "kl_sum": (log_ratio.exp() - 1 - log_ratio).sum(),
            "abs_logw_sum": log_ratio.abs().sum(), "max_abs_dlogp": log_ratio.abs().max(),
            "max_abs_logw": log_ratio.sum(1).abs().max()}
    return logp, mu, mask, wc, weight.cpu().double(), {name: float(v) for name, v in part.items()}


def add_metrics(total, part):
    """Add one micro-batch's or rank's metrics to total, in place: sums add, max_* take the maximum."""
    for name, v in part.items():
        total[name] = max(total.get(name, 0.0), v) if name.startswith("max_") else total.get(name, 0) + v


def summarise(m):
    """Readable means of `accumulate`'s metrics (after `add_metrics` over ranks). One line each: what over what."""
    n, tokens, mean = m["responses"], m["tokens"], m["reward_sum"] / m["responses"]
    return {
        "loss": m["loss"],                                                 # Eq. (4), already divided by its constant
        "reward": mean,                                                    # per response
        "reward_std": math.sqrt(max(0.0, m["reward_sq_sum"] / n - mean ** 2)),
        "ess": m["w_sum"] ** 2 / (m["weights"] * m["w_sq_sum"]) if m["w_sq_sum"] > 0 else 0.0,  # 1 on-policy, -> 1/N
        "clip_frac": m["clipped"] / m["weights"],                          # weights above eta (GRPO: ratios clipped)
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
    """One optimizer step on whole groups, settings as in `accumulate` -> its metrics, grad_norm (before clipping) and
    skipped_steps: 1 when the gradient was not finite, which changes no weight."""
    optimizer.zero_grad(set_to_none=True)
    metrics = accumulate(model, rollouts, **settings)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))
    if math.isfinite(norm):
        optimizer.step()
    return metrics | {"grad_norm": norm, "skipped_steps": int(not math.isfinite(norm))}


# ---- 5. self-demonstration ------------------------------------------------------------------------------------------

def toy_logps(theta):
    """Log-probs [9, 2] of all responses of two tokens of three; theta [4, 3]: logits of the first, of the second."""
    return torch.stack([theta[0].log_softmax(0).repeat_interleave(3), theta[1:].log_softmax(1).flatten()], 1)


def expected_gradient(theta, theta_mu, rewards, group_size, *, eta=math.inf, baseline="loo", norm="none"):
    """Exact E[-Lbar * gradient of Eq. (4)] and the exact policy gradient, [4, 3] each; eta None leaves w out.
    Every multiset of group_size responses goes through the functions above, weighted by its probability under mu."""
    theta = theta.clone().requires_grad_()
    logp, mu = toy_logps(theta), toy_logps(theta_mu)                                 # [9, 2] each
    exact, = torch.autograd.grad((logp.sum(1).exp() * rewards).sum(), theta, retain_graph=True)  # [4, 3]
    groups = list(combinations_with_replacement(range(9), group_size))               # K multisets
    orders = [math.factorial(group_size) // math.prod(math.factorial(g.count(i)) for i in set(g)) for g in groups]
    index = torch.tensor(groups)                                                     # [K, G]
    chance = torch.tensor(orders) * mu.sum(1)[index].sum(1).exp()                    # [K], sums to 1
    logp, mu, rewards = logp[index.flatten()], mu[index.flatten()], rewards[index.flatten()]  # [K G, 2] twice, [K G]
    mask = torch.ones_like(mu, dtype=torch.bool)                                     # [K G, 2]
    wc = torch.ones_like(rewards) if eta is None else importance_weights(logp, mu, mask, eta=eta)[1]  # [K G]
    adv, _ = group_advantages(rewards, wc, group_size, baseline=baseline, norm=norm)  # [K G]
    loss = rapid_loss(logp, mask, wc * chance.repeat_interleave(group_size), adv, denominator=group_size)
    return torch.autograd.grad(-loss, theta)[0], exact


def print_bias_table(policies=9):
    """Error of the expected gradient over the exact gradient's norm, median over random policies."""
    columns = {"w left out": (2, dict(eta=None)), **{f"group, G={n}": (n, dict(baseline="group")) for n in (2, 4, 8)},
               "loo, G=4": (4, {}), **{f"loo, eta={eta}": (2, dict(eta=eta)) for eta in (1, 2, 4, 8)}}
    print("\nError of the expected gradient / norm of the exact one, all groups enumerated; eta = inf unless given\n")
    print("| distance of mu | KL(mu, pi) | ESS |", " | ".join(columns), f"|\n{'|---' * (3 + len(columns))}|")
    rewards = torch.tensor([1, 0, 0, 0, 1, 0, 0, 1, 0], dtype=torch.float64)         # [9]
    for distance in (0, 0.25, 0.5, 1, 1.5):
        rows = []
        for seed in range(policies):
            theta, step = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            pi, mu = toy_logps(theta).sum(1), toy_logps(theta + distance * step).sum(1)  # [9] each
            pairs = [expected_gradient(theta, theta + distance * step, rewards, n, **kw) for n, kw in columns.values()]
            rows.append([(mu.exp() * (mu - pi)).sum(), 1 / (2 * pi - mu).exp().sum(),
                         *((got - exact).norm() / exact.norm() for got, exact in pairs)])
        cells = (f"{x:.3f}" if x > 1e-9 else f"{x:.0e}" for x in torch.tensor(rows).median(0).values.tolist())
        print(f"| {distance} |", " | ".join(cells), "|")


def bench_head(way, dtype, tokens, width, vocab, chunk):
    """Forward + backward of the head in this process -> CPU seconds, extra peak GiB above weights and inputs."""
    torch.set_num_threads(1)
    weight = torch.empty(vocab, width, dtype=dtype).normal_(0, 0.02).requires_grad_()  # [V, D]
    hidden = torch.empty(tokens, width, dtype=dtype).normal_().requires_grad_()      # [M, D]
    targets = torch.randint(vocab, (tokens,))                                        # [M]
    logps_and_entropy(hidden[:8].detach(), weight[:64].detach(), targets[:8] % 64)   # loads the libraries
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if way == "ours":
        logp, _ = logps_and_entropy(hidden, weight, targets, chunk=chunk)            # [M]
    else:  # the usual way, and without the entropy
        logp = (hidden @ weight.T).float().log_softmax(1).gather(1, targets[:, None])  # [M, 1]
    logp.sum().backward()
    seconds, after = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return seconds, (after - before) / 2 ** 20  # kilobytes, as Linux counts them


def print_head_table(sizes, repeats):
    """Full logits against slices of the vocabulary, alternating, each in a fresh process; medians."""
    print("Head, forward + backward: {} tokens, width {}, vocabulary {}, chunk {}, one thread".format(*sizes))
    print(f"\n| dtype | full logits, CPU s | ours | ratio | full logits, extra GiB | ours | ratio |\n{'|---' * 7}|")
    for dtype in (torch.float32, torch.bfloat16):
        runs = {"naive": [], "ours": []}
        for way in ("naive", "ours") * repeats:
            with multiprocessing.get_context("spawn").Pool(1) as fresh:
                runs[way].append(fresh.apply(bench_head, (way, dtype, *sizes)))
        (t0, m0), (t1, m1) = (torch.tensor(seen).median(0).values.tolist() for seen in runs.values())
        print(f"| {dtype} | {t0:.2f} | {t1:.2f} | {t1 / t0:.2f} | {m0:.3f} | {m1:.3f} | 1/{m0 / m1:.1f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Demonstrate the kernel on a CPU: memory, time, exactness.")
    parser.add_argument("--head", nargs=4, type=int, default=(2048, 256, 32768, 64), help="tokens, D, V, chunk")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes per way; the table shows their median")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print_head_table(args.head, args.repeats)
    print_bias_table()


if __name__ == "__main__":
    main()
