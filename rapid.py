"""RAPID's update kernel: off-policy policy gradients on groups of sampled responses. Needs torch only; copy it alone.

RAPID (arXiv 2510.03515) samples many responses at once and makes several updates from them: a phase. After the first
update, the policy pi that learns is no longer the policy mu that sampled. Importance weights correct for that.
B prompts per update, G responses per prompt (a group), H updates per phase, Lbar mean response length of the phase,
r_i reward of response y_i, N importance weights, sg: no gradient flows through. [ours]: not from the paper.

    Eq. (1)  w_i  = exp(sum_t [log pi(y_it) - log mu(y_it)]),  wc_i = min(w_i, eta),  eta = 2            [RAPID]
    Eq. (2)  V    = (1/G) sum_j wc_j r_j                   value of the prompt                           [RAPID]
             V_-i = (1/(G-1)) sum_{j != i} wc_j r_j        leave-one-out, without V's bias; the default  [ours]
    Eq. (3)  A_i  = (r_i - V) / (std(r_1..r_G) + eps)      advantage; the division is optional           [RAPID]
    Eq. (4)  L    = -(1/(B G)) sum_i sg(wc_i A_i) sum_t log pi(y_it) / Lbar                       [RAPID; Lbar: ours]
    Eq. (5)  ESS  = (sum_i w_i)^2 / (N sum_i w_i^2)        a phase ends early when it falls              [ours]

B G Lbar is known before the first micro-batch, so micro-batches, padding and the number of GPUs cannot change the
gradient. There is no KL term. GRPO's loss is here as a baseline. In another trainer, once per update:

    rollouts = [Rollout(prompt_ids, response_ids, logps_of_the_sampler, reward), ...]        # group after group
    metrics = rapid.update(model, optimizer, rollouts, group_size=G, denominator=B * G * Lbar)
    sample_again = rapid.phase_over(rapid.summarise(metrics)["ess"], 0.5)
"""
import math
from dataclasses import dataclass

import torch

# Dims: N responses, T response tokens (padded), K all response tokens in one row, G responses per group, L tokens of a
# padded sequence (prompt and response), P prompts, W their padded width, D model width, V vocabulary, v a slice of it.

GRPO_CLIP = 1 - 0.2, 1 + 0.28   # bounds of pi/mu; the upper one is wider, so that rare tokens can grow (DAPO)


@dataclass
class Rollout:
    """One sampled response and what the sampler knew about it. Any sequence of ints is a prompt or a response."""
    prompt: list[int]         # prompt token ids
    response: list[int]       # sampled ids; the end-of-sequence token belongs to it when it was sampled
    mu: list[float]           # log mu of each response token, as the sampler returned it
    reward: float
    truncated: bool = False   # stopped by the length limit: there is no end-of-sequence token


# ---- 1. log-probabilities without logits ----------------------------------------------------------------------------
class _HeadLogps(torch.autograd.Function):
    """log pi(target) and entropy, one slice of the vocabulary at a time, with a hand-written backward.

    Slices of the vocabulary, not of the tokens: a row of the weight's gradient is then one matmul over all tokens,
    written once. Buffers are reused for every slice, since new memory costs a CPU more than exp() does.
    """

    @staticmethod
    def forward(ctx, hidden, head_weight, targets, temperature, chunk):
        buffers = _buffers(hidden, head_weight, chunk)
        exps = torch.empty_like(buffers[0])                                          # [v, K]
        total = torch.zeros_like(exps[0])                                            # [K] sum of exp(z - top)
        total_z = torch.zeros_like(total)                                            # [K] sum of exp(z - top) z
        top = torch.full_like(total, -torch.inf)                                     # [K] largest logit so far
        chosen = torch.zeros_like(total)                                             # [K] the target's logit
        for first, rows, z in _slices(hidden, head_weight, temperature, *buffers):
            row = (targets - first)[None]                                            # [1, K]
            place = row.clamp(0, len(rows) - 1)                                      # [1, K]
            inside = row == place                                                    # [1, K] is the target here?
            chosen = torch.where(inside, z.gather(0, place), chosen)[0]              # [K]
            higher = torch.maximum(top, z.amax(0))                                   # [K]
            shrink = (top - higher).exp()                                            # [K] of what is summed so far
            e = torch.sub(z, higher, out=exps[:len(z)]).exp_()                       # [v, K]
            total = total * shrink + e.sum(0)                                        # [K]
            total_z = total_z * shrink + e.mul_(z).sum(0)                            # [K]
            top = higher
        log_z = top + total.log()                                                    # [K]
        entropy = log_z - total_z / total                                            # [K] H = log Z - E[z]
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.save_for_backward(hidden, head_weight, targets, log_z)
        ctx.mark_non_differentiable(entropy)
        return chosen - log_z, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, head_weight, targets, log_z = ctx.saved_tensors
        scale = grad[None] / ctx.temperature                                         # [1, K]
        grad_hidden = torch.zeros_like(hidden, dtype=log_z.dtype)                    # [K, D]
        product = torch.empty_like(grad_hidden)                                      # [K, D]
        frozen = not ctx.needs_input_grad[1]
        grad_weight = None if frozen else torch.empty_like(head_weight)              # [V, D]
        logits, rounded = _buffers(hidden, head_weight, ctx.chunk)                   # [v, K] each
        for first, rows, z in _slices(hidden, head_weight, ctx.temperature, logits, rounded):
            row = (targets - first)[None]                                            # [1, K]
            place = row.clamp(0, len(rows) - 1)                                      # [1, K]
            inside = row == place                                                    # [1, K] is the target here?
            z.sub_(log_z).exp_().mul_(-scale)                                        # [v, K] -scale p
            z.scatter_add_(0, place, torch.where(inside, scale, 0.0))                # [v, K] scale (onehot - p)
            z = rounded[:len(z)].copy_(z)                                            # [v, K]
            if not frozen:
                _matmul(z, hidden, out=grad_weight[first:first + len(rows)])         # [v, D]
            grad_hidden += _matmul(z.T, rows, out=product)                           # [K, D]
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def _buffers(hidden, head_weight, chunk):
    """Room for the logits of a slice [v, K] in float32 (float64 if hidden is), and for them in hidden's dtype."""
    size = max(32, chunk * len(head_weight) // max(1, len(hidden)))                  # thinner slices only cost time
    rounded = hidden.new_empty(min(size, len(head_weight)), len(hidden))             # [v, K]
    dtype = torch.promote_types(rounded.dtype, torch.float32)
    return (rounded if rounded.dtype == dtype else torch.empty_like(rounded, dtype=dtype)), rounded


def _slices(hidden, head_weight, temperature, logits, rounded):
    """Yield each slice of the vocabulary: its first row, the head's rows [v, D], the logits [v, K] in their buffer."""
    for first in range(0, len(head_weight), len(logits)):
        rows = head_weight[first:first + len(logits)].to(hidden.dtype)               # [v, D]
        z = _matmul(rows, hidden.T, logits[:len(rows)], rounded[:len(rows)])         # [v, K]
        if temperature != 1:
            z.div_(temperature)
        yield first, rows, z


def _matmul(a, b, out, rounded=None):
    """a @ b in out's dtype. CUDA keeps a bfloat16 product in float32; elsewhere it is rounded to bfloat16."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda and not torch.version.hip:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(torch.mm(a, b, out=rounded))


def logps_and_entropy(hidden, head_weight, targets, *, temperature=1.0, chunk=256):
    """log softmax(hidden @ head_weight.T / temperature) at the targets, and the entropy of that distribution.

    hidden [K, D], head_weight [V, D], targets [K] -> logp [K], entropy [K] (no gradient), in nats, float32 or float64.
    The matmuls run in hidden's dtype, or in autocast's where that is on; a float32 head_weight gets a float32
    gradient. About chunk * V logits exist at a time.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))                         # [K, D]
    with torch.autocast(device, enabled=False):
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
    w = torch.where(mask, log_ratio.exp(), 0.0)                                      # [N, T]
    if level == "sequence":
        w = log_ratio.sum(1).exp()                                                   # [N]
    return w, w.clamp(max=eta)


def group_advantages(rewards, weights, group_size, *, baseline="loo", norm="std", eps=1e-6):
    """Eq. (2) and (3). rewards, weights (wc) [N], group after group -> adv [N], zero_signal [N].

    baseline "group" is the paper's value; "loo" leaves response i out of its own, which removes the bias off-policy.
    zero_signal: all rewards of the group are equal. Its advantages are then 0 with norm "std"; with "none" they are
    kept, since off-policy the expected gradient is wrong without them.
    """
    _check_choice("baseline", baseline, "group", "loo")
    _check_choice("norm", norm, "std", "none")
    if group_size < 2 or len(rewards) % group_size or not len(rewards):
        raise ValueError(f"group_size: {group_size} for {len(rewards)} responses; need >= 2 and whole groups")
    r = rewards.view(-1, group_size)                                                 # [N/G, G]
    weighted = weights.view_as(r) * r                                                # [N/G, G]
    # Eq. (2): V = (1/G) sum_j wc_j r_j, or V_-i = (1/(G-1)) sum_{j != i} wc_j r_j
    value = weighted.mean(1, keepdim=True)                                           # [N/G, 1]
    if baseline == "loo":
        value = (weighted.sum(1, keepdim=True) - weighted) / (group_size - 1)        # [N/G, G]
    zero_signal = (r == r[:, :1]).all(1, keepdim=True).expand_as(r)                  # [N/G, G]
    # Eq. (3): A_i = (r_i - V) / (std(r_1..r_G) + eps), std over G (not G - 1); the division is optional
    adv = r - value                                                                  # [N/G, G]
    if norm == "std":
        adv = adv / (r.std(1, keepdim=True, correction=0) + eps)                     # [N/G, G]
        adv = torch.where(zero_signal, 0.0, adv)                                     # [N/G, G]
    return adv.reshape(-1), zero_signal.reshape(-1)


def rapid_loss(logp, mask, wc, adv, *, denominator):
    """Eq. (4) -> scalar. logp, mask [N, T], wc [N] or [N, T], adv [N]; denominator = B G Lbar over all ranks."""
    if wc.dim() == 1:
        wc = wc[:, None]                                                             # [N, 1]
    # Eq. (4): L = -(1/(B G)) sum_i sg(wc_i A_i) sum_t log pi(y_it) / Lbar
    coefficient = (wc * adv[:, None]).detach()                                       # [N, 1] or [N, T]
    return -torch.where(mask, coefficient * logp, 0.0).sum() / denominator


def grpo_loss(logp, mu, mask, adv, *, denominator, low=GRPO_CLIP[0], high=GRPO_CLIP[1]):
    """The baseline: PPO's clipped ratio per token -> scalar. logp, mu, mask [N, T], adv [N]; denominator as Eq. (4)."""
    ratio = torch.where(mask, logp - mu, 0.0).exp()                                  # [N, T]
    clipped = ratio.clamp(low, high)                                                 # [N, T]
    gain = torch.minimum(ratio * adv[:, None], clipped * adv[:, None])               # [N, T]
    return -torch.where(mask, gain, 0.0).sum() / denominator


def phase_over(ess, min_ess):
    """Eq. (5): sample afresh when the effective sample size of the last update fell below min_ess (NaN counts so)."""
    return not ess >= min_ess


# ---- 3. log-probabilities of responses ------------------------------------------------------------------------------
def micro_batches(lengths, token_budget, among=None):
    """Indices (all, or `among`) in lists of similar length, at most token_budget tokens with padding each. What is
    longer than the budget has a list of its own.

    >>> micro_batches([7, 20, 8, 2], 16)
    [[1], [2, 0], [3]]
    """
    indices = range(len(lengths)) if among is None else among
    batches = []
    for i in sorted(indices, key=lambda i: -lengths[i]):  # longest first: the first of a list sets its padded width
        if batches:
            more = batches[-1] + [i]
            padded = len(more) * lengths[more[0]]
            # a list of more than an eighth of the budget also ends before a tenth of it is padding
            wasteful = padded > token_budget / 8 and sum(lengths[k] for k in more) < 0.9 * padded
        if not batches or padded > token_budget or wasteful:
            batches.append([])
        batches[-1].append(i)
    return batches


def check_head(model):
    """Raise where the model does more to its logits than hidden @ weight.T, which is all that is computed here."""
    config = model.config.get_text_config()
    names = ("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling", "lm_head_multiplier")
    found = {name: getattr(config, name, None) for name in names}
    found = {name: value for name, value in found.items() if value not in (None, 1)}
    if found or getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ValueError(f"model: {found or 'a bias of the head'} changes the logits, which cannot be scored here; "
                         "allowed: None or 1 and no bias, choose another model")


def pad(rows, device, dtype=torch.long):
    """Lists of different lengths -> their values [N, T], 0 at padding on the right, and mask [N, T], False there."""
    lengths = torch.tensor([len(row) for row in rows])[:, None]                      # [N, 1]
    mask = torch.arange(int(lengths.max())) < lengths                                # [N, T]
    flat = torch.tensor([x for row in rows for x in row], dtype=dtype)               # [K]
    padded = torch.zeros(mask.shape, dtype=dtype).masked_scatter(mask, flat)         # [N, T]
    return padded.to(device), mask.to(device)


def response_logps(model, rollouts, *, temperature=1.0, chunk=256, share_prompts=True):
    """log pi and entropy of every response token -> logp [N, T], entropy [N, T], mask [N, T] (zeros at padding).

    rollouts: anything with .prompt and .response. The mask comes from lengths alone: the padding id in a response is a
    token like any other. The head runs at response positions only; autocast and grad mode are the caller's.
    share_prompts: compute a prompt once for all of its responses, where that saves a quarter of the positions.
    """
    check_head(model)
    for k, item in enumerate(rollouts):
        if not item.prompt or not item.response:
            raise ValueError(f"rollouts[{k}]: empty prompt or response; both need at least one token")
    head_weight = model.get_output_embeddings().weight                               # [V, D]
    backbone = model.get_decoder()
    targets, mask = pad([item.response for item in rollouts], head_weight.device)    # [N, T] each
    prompts = list(dict.fromkeys(tuple(item.prompt) for item in rollouts))           # P different ones
    together = len(prompts) * max(map(len, prompts)) + mask.numel()                  # padded positions
    apart = len(rollouts) * max(len(item.prompt) + len(item.response) for item in rollouts)
    if share_prompts and together <= 0.75 * apart and can_share_prompts(model):
        hidden = _hidden_with_shared_prompts(backbone, rollouts, mask, prompts)      # [K, D]
    else:
        hidden = _hidden(backbone, rollouts, mask)                                   # [K, D]
    scores = logps_and_entropy(hidden, head_weight, targets[mask], temperature=temperature, chunk=chunk)  # [K] each
    logp, entropy = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in scores)  # [N, T] each
    return logp, entropy, mask


def _hidden(backbone, rollouts, mask):
    """Hidden states [K, D] that predict the response tokens. Position t predicts token t + 1."""
    # no attention mask: padding is on the right, where a causal model cannot see it, and kernels are faster without
    ids, _ = pad([[*item.prompt, *item.response] for item in rollouts], mask.device)  # [N, L]
    hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state              # [N, L, D]
    before = torch.tensor([len(item.prompt) - 1 for item in rollouts], device=mask.device)  # [N]
    row, t = mask.nonzero(as_tuple=True)                                             # [K] each
    return hidden[row, before[row] + t]


def _hidden_with_shared_prompts(backbone, rollouts, mask, prompts):
    """The same [K, D], each of the P prompts computed once: its keys and values serve all of its responses, whose
    gradients meet in them."""
    which = torch.tensor([prompts.index(tuple(item.prompt)) for item in rollouts], device=mask.device)  # [N]
    ids, seen = pad(prompts, mask.device)                                            # [P, W] each
    first = backbone(input_ids=ids, use_cache=True)
    length = seen.sum(1)[which]                                                      # [N]
    hidden = first.last_hidden_state[which, length - 1][:, None]                     # [N, 1, D]
    if mask.shape[1] == 1:                                       # a response's last token predicts nothing: left out
        return hidden[mask]
    cache = first.past_key_values
    cache.batch_select_indices(which)
    tokens, _ = pad([item.response[:-1] for item in rollouts], mask.device)          # [N, T-1]
    positions = length[:, None] + torch.arange(tokens.shape[1], device=mask.device)  # [N, T-1]
    # a prompt's padding lies between it and its responses, which must not see it
    visible = torch.cat([seen[which], torch.ones_like(mask[:, 1:])], 1).long()       # [N, W+T-1]
    later = backbone(input_ids=tokens, attention_mask=visible, position_ids=positions, past_key_values=cache)
    return torch.cat([hidden, later.last_hidden_state], 1)[mask]


def can_share_prompts(model):
    """Do keys and values hold all that the model keeps of the past? Not with recurrent states or attention windows,
    and with gradient checkpointing transformers keeps none."""
    config = model.config.get_text_config()
    windows = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    kinds = getattr(config, "layer_types", None) or ["window" if windows else "full_attention"]
    checkpointing = model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    return set(kinds) == {"full_attention"} and not getattr(model, "_is_stateful", False) and not checkpointing


# ---- 4. one update --------------------------------------------------------------------------------------------------
def _plan(lengths, trained, token_budget, group_size):
    """Micro-batches of the responses with a gradient (whole groups, in order) -> index lists, is a pass needed before?

    Eq. (2) needs the weights of a whole group before any backward. Micro-batches of whole groups have them in one pass
    but pad more. Those by length pad least but need a forward pass before, a third more work.
    """
    groups = [trained[k:k + group_size] for k in range(0, len(trained), group_size)]
    widths = [group_size * max(lengths[i] for i in group) for group in groups]       # padded tokens of each group
    by_group = [[i for g in batch for i in groups[g]] for batch in micro_batches(widths, token_budget)]
    by_length = micro_batches(lengths, token_budget, trained)
    padded = sum(len(batch) * lengths[max(batch, key=lengths.__getitem__)] for batch in by_group)
    least = sum(len(batch) * lengths[batch[0]] for batch in by_length)
    fits = max(widths, default=0) <= max(token_budget, *lengths)
    return (by_group, False) if fits and padded <= 4 / 3 * least else (by_length, True)


def accumulate(model, rollouts, *, group_size, denominator, algo="rapid", eta=2.0, is_level="sequence",
               baseline="loo", adv_norm="std", temperature=1.0, token_budget=16384, chunk=256, share_prompts=True):
    """Add the gradient of Eq. (4) to p.grad and return metrics; no optimizer step.

    rollouts: whole groups, group g is rollouts[g*G:(g+1)*G]. denominator: B G Lbar over all ranks. Gradients and
    metrics of ranks and micro-batches then add up. Metrics are sums (max_*: maxima), see `summarise`.
    """
    _check_choice("algo", algo, "rapid", "grpo")
    for k, item in enumerate(rollouts):
        if len(item.mu) != len(item.response) or not all(map(math.isfinite, item.mu)):
            raise ValueError(f"rollouts[{k}].mu: {len(item.mu)} log-probs for {len(item.response)} response tokens; "
                             "need one finite number each, as the sampler returned them")
    if algo == "grpo":
        baseline, is_level = "group", "token"
    low, high = (0.0, eta) if algo == "rapid" else GRPO_CLIP   # weights beyond are "clipped"
    scoring = dict(temperature=temperature, chunk=chunk, share_prompts=share_prompts)
    weighing = dict(level=is_level, low=low, high=high)
    valuing = dict(baseline=baseline, norm=adv_norm)
    lengths = [len(item.prompt) + len(item.response) for item in rollouts]
    rewards = torch.tensor([float(item.reward) for item in rollouts], dtype=torch.float64)  # [N]
    weights = torch.ones_like(rewards)                                               # [N] wc of Eq. (2); GRPO: stays 1
    _, zero_signal = group_advantages(rewards, weights, group_size, **valuing)       # [N]
    metrics = {"responses": len(rollouts), "groups": len(rollouts) // group_size,
        "zero_signal_groups": int(zero_signal.sum()) // group_size,
        "truncated": sum(item.truncated for item in rollouts), "loss": 0.0,
        "reward_sum": float(rewards.sum()), "reward_sq_sum": float(rewards.square().sum())}
    # 1. Which responses have a gradient? Advantage 0 whatever the weights: only a forward pass, for the metrics.
    no_gradient = zero_signal                                                        # [N]
    if algo == "rapid" and adv_norm == "none":
        no_gradient = zero_signal & (rewards == 0)                                   # [N]
    trained = (~no_gradient).nonzero()[:, 0].tolist()
    not_trained = no_gradient.nonzero()[:, 0].tolist()
    # 2. Forward passes without gradient. GRPO needs none to train, so its groups may always be cut apart.
    batches, before = _plan(lengths, trained, token_budget, group_size if algo == "rapid" else 1)
    for batch in micro_batches(lengths, token_budget, not_trained) + (batches if before else []):
        items = [rollouts[i] for i in batch]
        with torch.no_grad():
            scores = response_logps(model, items, **scoring)
        *_, weights[batch], part = _weigh(items, *scores, **weighing)
        add_metrics(metrics, part)
    # 3. Forward and backward.
    for batch in batches:
        items = [rollouts[i] for i in batch]
        logp, entropy, mask = response_logps(model, items, **scoring)                # [n, T] each
        mu, wc, weight, part = _weigh(items, logp, entropy, mask, **weighing)
        if algo == "rapid":                                                          # GRPO's value has no weights
            weights[batch] = weight
        if not before:
            add_metrics(metrics, part)
        adv, _ = group_advantages(rewards, weights, group_size, **valuing)           # [N]
        adv = adv[batch].to(logp)                                                    # [n]
        if algo == "rapid":
            loss = rapid_loss(logp, mask, wc, adv, denominator=denominator)
        else:
            loss = grpo_loss(logp, mu, mask, adv, denominator=denominator)
        loss.backward()
        metrics["loss"] += float(loss.detach())
    return metrics


def _weigh(items, logp, entropy, mask, *, level, low, high):
    """Eq. (1) for one micro-batch -> mu [n, T], wc [n] or [n, T], each response's weight in Eq. (2) [n], metrics."""
    mu, _ = pad([item.mu for item in items], logp.device, logp.dtype)                # [n, T]
    w, wc = importance_weights(logp, mu, mask, eta=high, level=level)                # [n] or [n, T]
    # Eq. (2) has one weight per response: of token-level weights the mean over the response's tokens
    weight = wc if wc.dim() == 1 else wc.sum(1) / mask.sum(1)                        # [n]
    log_ratio = torch.where(mask, logp.detach() - mu, 0.0).cpu().double()            # [n, T]
    if level == "token":
        w = w[mask]                                                                  # [K]
    w = w.cpu().double()                                                             # [n] or [K]
    part = {
        "w_count": w.numel(), "w_sum": w.sum(), "w_sq_sum": w.square().sum(),
        "clipped": ((w < low) | (w > high)).sum(),
        "tokens": mask.sum(), "entropy_sum": entropy.sum(),
        "kl_sum": (log_ratio.exp() - 1 - log_ratio).sum(),
        "abs_dlogp_sum": log_ratio.abs().sum(), "max_abs_dlogp": log_ratio.abs().max(),
        "max_abs_logw": log_ratio.sum(1).abs().max()}
    return mu, wc, weight.cpu().double(), {name: float(value) for name, value in part.items()}


def add_metrics(total, part):
    """Add one micro-batch's or rank's metrics to total, in place: sums add, max_* take the maximum."""
    for name, value in part.items():
        if name.startswith("max_"):
            total[name] = max(total.get(name, 0.0), value)
        else:
            total[name] = total.get(name, 0) + value


def summarise(m):
    """Readable means of `accumulate`'s metrics (after `add_metrics` over ranks). One line each: what over what."""
    n, tokens = m["responses"], m["tokens"]
    reward = m["reward_sum"] / n
    variance = m["reward_sq_sum"] / n - reward ** 2
    return {
        "loss": m["loss"],                                                 # Eq. (4), already divided by its constant
        "reward": reward,                                                  # per response
        "reward_std": math.sqrt(max(0.0, variance)),
        "ess": m["w_sum"] ** 2 / (m["w_count"] * m["w_sq_sum"]) if m["w_sq_sum"] > 0 else 0.0,  # 1 on-policy, -> 1/N
        "clip_frac": m["clipped"] / m["w_count"],                          # weights above eta (GRPO: ratios clipped)
        "kl": m["kl_sum"] / tokens,                                        # KL(mu || pi), k3, nats per token
        "entropy": m["entropy_sum"] / tokens,                              # of pi, nats per token
        "abs_dlogp": m["abs_dlogp_sum"] / tokens,                           # |log pi - log mu| per token
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
