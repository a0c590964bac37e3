"""RAPID's update kernel: off-policy policy gradients on groups of sampled responses. Needs torch only; copy it alone.

RAPID (arXiv 2510.03515) samples once for H updates: a phase. After the first update the policy pi that learns is no
longer the policy mu that sampled, and importance weights correct for that. B prompts per update, G responses per prompt
(a group), Lbar mean response length of the phase, r_i reward of response y_i, sg: no gradient. [ours]: not the paper's.

    Eq. (1)  w_i  = exp(sum_t [log pi(y_it) - log mu(y_it)]),  wc_i = min(w_i, eta),  eta = 2            [RAPID]
    Eq. (2)  V    = (1/G) sum_j wc_j r_j                   value of the prompt                           [RAPID]
             V_-i = (1/(G-1)) sum_{j != i} wc_j r_j        leave-one-out, without V's bias; the default  [ours]
    Eq. (3)  A_i  = (r_i - V) / (std(r_1..r_G) + eps)      advantage; the division is optional           [RAPID]
    Eq. (4)  L    = -(1/(B G)) sum_i sg(wc_i A_i) sum_t log pi(y_it) / Lbar                       [RAPID; Lbar: ours]
    Eq. (5)  ESS  = (sum_i w_i)^2 / (N sum_i w_i^2)        a phase ends early when it falls              [ours]
    Eq. (6)  s_t  = -(p_t (log p_t + H_t) - sum_v p_v^2 (log p_v + H_t))   what token t does to the entropy H_t  [ours]

B G Lbar and a group's wc are known before a backward, so micro-batches, padding and ranks cannot change the gradient.
In another trainer, for every update (GRPO's loss is here to compare; there is no KL term):
    rollouts = [Rollout(prompt_ids, response_ids, logps_of_the_sampler, reward), ...]        # group after group
    metrics = rapid.accumulate(model, rollouts, group_size=G, denominator=B * G * Lbar)      # sum p.grad over ranks
    sample_again = rapid.phase_over(rapid.summarise(metrics)["ess"], 0.3)
"""
import math
import warnings
from dataclasses import dataclass

import torch

# Dims: N responses, T response tokens (padded), K all response tokens in one row, G responses per group, L tokens of a
# padded sequence (prompt and response), P prompts, W their padded width, D model width, V vocabulary, v a slice of it.

GRPO_CLIP = 0.8, 1.28   # bounds of pi/mu: 1 - 0.2 and 1 + 0.28, wider above so that rare tokens can grow (DAPO)


@dataclass
class Rollout:
    """One sampled response and what the sampler knew about it. Any sequence of ints is a prompt or a response."""
    prompt: list[int]         # prompt token ids
    response: list[int]       # sampled ids; the end-of-sequence token belongs to it when it was sampled
    mu: list[float]           # log mu of each response token, as the sampler returned it
    reward: float
    truncated: bool = False   # stopped by the length limit: there is no end-of-sequence token


# ---- 1. log-probabilities without logits ----------------------------------------------------------------------------
class _TokenScores(torch.autograd.Function):
    """log pi(target), entropy and Eq. (6) in slices of the vocabulary: a row of the weight's gradient is then written
    once, by one matmul over all tokens. Slices share their buffers: new memory costs a CPU more than exp() does."""

    @staticmethod
    def forward(ctx, hidden, head_weight, targets, temperature, chunk):
        buffers = _buffers(hidden, head_weight, chunk)
        # the sums read a slice many times; on a CPU in parts of 2^17 logits, which stay in its cache
        part = len(buffers[0]) if hidden.is_cuda else max(1, 2 ** 17 // len(hidden))
        exps = torch.empty_like(buffers[0][:part])                                   # [v, K]
        sums = exps.new_zeros(4, len(hidden))                                        # [4, K] of e, e z, e^2, e^2 z
        top = torch.full_like(sums[0], -torch.inf)                                   # [K] largest logit so far
        chosen = torch.zeros_like(top)                                               # [K] the target's logit
        for first, _, logits in _slices(hidden, head_weight, temperature, *buffers):
            for z in logits.split(part):                                             # [v, K]
                row = (targets - first)[None]                                        # [1, K]
                place = row.clamp(0, len(z) - 1)                                     # [1, K]
                chosen = torch.where(row == place, z.gather(0, place), chosen)[0]    # [K]
                old, top = top, torch.maximum(top, z.amax(0))                        # [K] each
                shrink = (old - top).exp()                                           # [K] for what is summed so far
                e = torch.sub(z, top, out=exps[:len(z)]).exp_()                      # [v, K] e = exp(z - top)
                sums[:2] *= shrink
                sums[2:] *= shrink ** 2
                sums[0] += e.sum(0)
                sums[1] += z.mul_(e).sum(0)
                sums[3] += z.mul_(e).sum(0)
                sums[2] += e.square_().sum(0)
                first += len(z)
        log_z = top + sums[0].log()                                                  # [K]
        mean = sums[1] / sums[0]                                                     # [K] E[z]
        logp, entropy = chosen - log_z, log_z - mean                                 # [K] each
        # Eq. (6): s = -(p (log p + H) - sum_v p_v^2 (log p_v + H)), where log p_v + H = z_v - E[z]
        mixed = (sums[3] - mean * sums[2]) / sums[0] ** 2                            # [K]
        slope = (mixed - logp.exp() * (chosen - mean)) / temperature ** 2            # [K] 1/tau in dz and in dH/dz
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.save_for_backward(hidden, head_weight, targets, log_z)
        ctx.mark_non_differentiable(entropy, slope)
        return logp, entropy, slope

    @staticmethod
    def backward(ctx, grad, *_):
        hidden, head_weight, targets, log_z = ctx.saved_tensors
        scale = -grad[:, None] / ctx.temperature                                     # [K, 1]
        scaled = (scale * hidden).to(hidden.dtype)                                   # [K, D]
        grad_hidden = torch.zeros_like(hidden, dtype=log_z.dtype)                    # [K, D]
        product = torch.empty_like(grad_hidden)                                      # [K, D]
        grad_weight = torch.empty_like(head_weight) if ctx.needs_input_grad[1] else None  # [V, D]
        logits, rounded = _buffers(hidden, head_weight, ctx.chunk)                   # [v, K] each
        for first, rows, z in _slices(hidden, head_weight, ctx.temperature, logits, rounded):
            row = (targets - first)[None]                                            # [1, K]
            place = row.clamp(0, len(rows) - 1)                                      # [1, K]
            error = z.sub_(log_z).exp_()                                             # [v, K]
            error.scatter_add_(0, place, -(row == place).to(z))                      # [v, K] p - onehot
            if rounded is not logits:
                error = rounded[:len(z)].copy_(error)                                # [v, K]
            if grad_weight is not None:
                _matmul(error, scaled, out=grad_weight[first:first + len(rows)])     # [v, D]
            grad_hidden += _matmul(error.T, rows, out=product)                       # [K, D]
        return grad_hidden.mul_(scale).to(hidden.dtype), grad_weight, None, None, None


def _buffers(hidden, head_weight, chunk):
    """Room for the logits of a slice [v, K] in float32 (float64 if hidden is), and for them in hidden's dtype."""
    size = max(32, chunk * len(head_weight) // len(hidden))                          # thinner slices only cost time
    rounded = hidden.new_empty(min(size, len(head_weight)), len(hidden))             # [v, K]
    return rounded.to(torch.promote_types(rounded.dtype, torch.float32)), rounded


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


def token_scores(hidden, head_weight, targets, *, temperature=1.0, chunk=256):
    """Scores of the targets under softmax(hidden @ head_weight.T / temperature) -> logp, entropy, slope, [K] each.
    hidden [K, D], head_weight [V, D], targets [K]. In nats, float32 or float64; only logp has a gradient. slope is
    Eq. (6): how the entropy changes, to first order, when gradient ascent on the logits raises logp. Matmuls run in
    hidden's dtype or autocast's; a float32 head_weight gets a float32 gradient. About chunk * V logits exist."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))                         # [K, D]
    with torch.autocast(device, enabled=False):
        return _TokenScores.apply(hidden, head_weight, targets, temperature, chunk)


# ---- 2. the estimator -----------------------------------------------------------------------------------------------
def _check_choice(name, value, *allowed):
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(allowed)}; choose one of these")


def importance_weights(logp, mu, mask, *, eta=2.0, level="sequence"):
    """Eq. (1): weights pi/mu, and the same clipped from above at eta. logp, mu, mask [N, T] -> (w, wc), detached:
    [N] for level "sequence", the exact correction; [N, T] for "token", biased, less variance on long responses."""
    _check_choice("level", level, "sequence", "token")
    log_ratio = torch.where(mask, logp.detach() - mu, 0.0)                           # [N, T]
    w = torch.where(mask, log_ratio.exp(), 0.0)                                      # [N, T]
    if level == "sequence":
        w = log_ratio.sum(1).exp()                                                   # [N]
    return w, w.clamp(max=eta)


def group_advantages(rewards, weights, group_size, *, baseline="loo", norm="std", eps=1e-6):
    """Eq. (2) and (3). rewards, weights (wc) [N], group after group -> adv [N], zero_signal [N].
    baseline "group" is the paper's value; "loo" leaves response i out of its own, which removes the bias off-policy.
    zero_signal: the group's rewards are all equal. Norm "std" then sets A to 0; "none" keeps r - V."""
    _check_choice("baseline", baseline, "group", "loo")
    _check_choice("norm", norm, "std", "none")
    if group_size < 2 or len(rewards) % group_size or not len(rewards):
        raise ValueError(f"group_size: {group_size} for {len(rewards)} responses; need >= 2 and whole groups")
    r = rewards.view(-1, group_size)                                                 # [N/G, G]
    weighted = weights.view_as(r) * r                                                # [N/G, G]
    total = weighted.sum(1, keepdim=True)                                            # [N/G, 1]
    value = total / group_size                                                       # [N/G, 1] Eq. (2): V
    if baseline == "loo":
        value = (total - weighted) / (group_size - 1)                                # [N/G, G] Eq. (2): V_-i
    zero_signal = (r == r[:, :1]).all(1, keepdim=True).expand_as(r)                  # [N/G, G]
    adv = r - value                                                                  # [N/G, G] Eq. (3)
    if norm == "std":
        adv = adv / (r.std(1, keepdim=True, correction=0) + eps)                     # [N/G, G] std over G, not G - 1
        adv = torch.where(zero_signal, 0.0, adv)                                     # [N/G, G]
    return adv.reshape(-1), zero_signal.reshape(-1)


def rapid_loss(logp, mask, wc, adv, *, denominator):
    """Eq. (4) -> scalar. logp, mask [N, T], wc [N] or [N, T], adv [N]; denominator = B G Lbar over all ranks."""
    wc = wc.view(len(adv), -1)                                                       # [N, 1] or [N, T]
    coefficient = (wc * adv[:, None]).detach()                                       # [N, 1] or [N, T] sg(wc_i A_i)
    return -torch.where(mask, coefficient * logp, 0.0).sum() / denominator


def grpo_loss(logp, mu, mask, adv, *, denominator):
    """To compare: PPO's clipped ratio per token -> scalar. logp, mu, mask [N, T], adv [N]; denominator as Eq. (4)."""
    ratio = torch.where(mask, logp - mu, 0.0).exp()                                  # [N, T]
    adv = adv[:, None]                                                               # [N, 1]
    gain = torch.minimum(ratio * adv, ratio.clamp(*GRPO_CLIP) * adv)                 # [N, T]
    return -torch.where(mask, gain, 0.0).sum() / denominator


def phase_over(ess, min_ess):
    """Eq. (5): sample afresh? ess: of the last update, or its share of the first update's (NaN counts as low)."""
    return not ess >= min_ess


# ---- 3. log-probabilities of responses ------------------------------------------------------------------------------
def micro_batches(lengths, token_budget, among=None):
    """Indices (all, or `among`) in lists of similar length, at most token_budget tokens with padding each. What is
    longer than the budget has a list of its own. micro_batches([7, 20, 8, 2], 16) -> [[1], [2, 0], [3]]"""
    batches, indices = [[]], range(len(lengths)) if among is None else among
    for i in sorted(indices, key=lambda i: -lengths[i]):  # longest first: the first of a list sets its padded width
        more = batches[-1] + [i]
        padded = len(more) * lengths[more[0]]
        # a list of more than an eighth of the budget also ends before a tenth of it is padding
        wasteful = padded > token_budget / 8 and sum(lengths[k] for k in more) < 0.9 * padded
        if len(more) > 1 and (padded > token_budget or wasteful):
            batches.append([])
        batches[-1].append(i)
    return batches if batches[0] else []


def check_head(model):
    """Raise where the model does more to its logits than hidden @ weight.T, which is all that is computed here."""
    config = model.config.get_text_config()
    names = ("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling", "lm_head_multiplier")
    found = [name for name in names if getattr(config, name, None) not in (None, 1)]
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        found.append("a bias of the head")
    if found:
        raise ValueError(f"model: {', '.join(found)} changes the logits, which is not computed; choose another model")


def pad(rows, device, dtype=torch.long):
    """Lists of different lengths -> their values [N, T], 0 at padding on the right, and mask [N, T], False there."""
    lengths = torch.tensor([len(row) for row in rows])[:, None]                      # [N, 1]
    mask = torch.arange(int(lengths.max())) < lengths                                # [N, T]
    flat = torch.tensor([x for row in rows for x in row], dtype=dtype)               # [K]
    padded = torch.zeros(mask.shape, dtype=dtype).masked_scatter(mask, flat)         # [N, T]
    return padded.to(device), mask.to(device)


def response_logps(model, rollouts, *, temperature=1.0, chunk=256, share_prompts=True):
    """`token_scores` of every response token -> logp, entropy, slope, mask, [N, T] each (zeros at padding).
    rollouts: anything with .prompt and .response. The mask comes from lengths alone: the padding id in a response is a
    token like any other. The head runs at response positions only; autocast and grad mode are the caller's.
    share_prompts: compute a prompt once for all its responses where that saves a quarter, or "always"."""
    check_head(model)
    for item in rollouts:
        if not item.prompt or not item.response:
            raise ValueError(f"rollout: {len(item.prompt)} prompt, {len(item.response)} response tokens; needs both")
    prompts = [tuple(item.prompt) for item in rollouts]
    tokens = sum(map(len, prompts)) + sum(len(item.response) for item in rollouts)
    saved = sum(map(len, prompts)) - sum(map(len, set(prompts)))
    share = share_prompts == "always"
    if share_prompts is True and saved >= tokens / 4 and can_share_prompts(model):
        if not hasattr(model, "shares_prompts"):                 # looked at once, on the first micro-batch
            model.shares_prompts = sharing_gap(model, rollouts) < 1e-3
        share = model.shares_prompts
    hidden_of = _hidden_with_shared_prompts if share else _hidden
    head_weight = model.get_output_embeddings().weight                               # [V, D]
    targets, mask = pad([item.response for item in rollouts], head_weight.device)    # [N, T] each
    hidden = hidden_of(model.get_decoder(), rollouts, targets, mask)                 # [K, D]
    scores = token_scores(hidden, head_weight, targets[mask], temperature=temperature, chunk=chunk)  # [K] each
    return *(x.new_zeros(mask.shape).masked_scatter(mask, x) for x in scores), mask


def _hidden(backbone, rollouts, targets, mask):
    """Hidden states [K, D] that predict the response tokens. Position t predicts token t + 1."""
    # no attention mask: a causal model cannot see padding on the right, and kernels are faster without
    ids, _ = pad([[*item.prompt, *item.response] for item in rollouts], mask.device)  # [N, L]
    hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state              # [N, L, D]
    marks = [[0] * (len(item.prompt) - 1) + [1] * len(item.response) for item in rollouts]
    marks, _ = pad(marks, mask.device, torch.bool)                                   # [N, L-1]
    return hidden[:, :-1][marks]


def _hidden_with_shared_prompts(backbone, rollouts, targets, mask):
    """The same [K, D], each of the P prompts computed once: its keys and values serve all of its responses."""
    prompts = {}                                                                     # prompt -> its row
    which = [prompts.setdefault(tuple(item.prompt), len(prompts)) for item in rollouts]
    which = torch.tensor(which, device=mask.device)                                  # [N]
    ids, seen = pad(prompts, mask.device)                                            # [P, W] each
    first = backbone(input_ids=ids, use_cache=True)
    length = seen.sum(1)[which]                                                      # [N]
    hidden = first.last_hidden_state[which, length - 1][:, None]                     # [N, 1, D]
    if mask.shape[1] == 1:                                       # a response's last token predicts nothing: left out
        return hidden[mask]
    first.past_key_values.batch_select_indices(which)
    positions = length[:, None] + torch.arange(mask.shape[1] - 1, device=mask.device)  # [N, T-1]
    # a prompt's padding lies between it and its responses, which must not see it
    visible = torch.cat([seen[which], torch.ones_like(mask[:, 1:])], 1)              # [N, W+T-1]
    later = backbone(input_ids=targets[:, :-1], attention_mask=visible, position_ids=positions,
                     past_key_values=first.past_key_values)
    return torch.cat([hidden, later.last_hidden_state], 1)[mask]


def can_share_prompts(model):
    """Is it known that a prompt's keys and values serve all of its responses? Only with rotary positions of fixed
    frequencies and full attention in every layer. With gradient checkpointing transformers keeps no keys and values."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    rotary = rope.get("rope_type") in ("default", "linear", "llama3", "yarn") and not getattr(config, "alibi", False)
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    layers = set(getattr(config, "layer_types", None) or ["window" if window else "full_attention"])
    no_cache = model.training and getattr(model, "is_gradient_checkpointing", False)
    return rotary and layers == {"full_attention"} and not no_cache and not getattr(model, "_is_stateful", False)


@torch.no_grad()
def sharing_gap(model, rollouts):
    """Largest difference of log pi (nats) with and without shared prompts, without autocast."""
    with torch.autocast(model.get_output_embeddings().weight.device.type, enabled=False):
        plain, *_ = response_logps(model, rollouts, share_prompts=False)                 # [N, T]
        shared, *_ = response_logps(model, rollouts, share_prompts="always")             # [N, T]
    gap = float((plain - shared).abs().max())
    if gap > 1e-3:
        warnings.warn(f"prompts are not shared: this model's log-probs would change by {gap:.3g} nats")
    return gap


@torch.no_grad()
def rescore(model, rollouts, *, token_budget=16384, **scoring):
    """Replace every mu by log pi under the present weights: w of Eq. (1) is then 1 until the next update. Returns the
    gap to the old mu as tokens and abs_dlogp_sum, for `add_metrics`. scoring: as in `response_logps`."""
    lengths = [len(item.prompt) + len(item.response) for item in rollouts]
    gap = {"tokens": 0, "abs_dlogp_sum": 0.0}
    for batch in micro_batches(lengths, token_budget):
        logp, *_ = response_logps(model, [rollouts[i] for i in batch], **scoring)    # [n, T]
        for i, row in zip(batch, logp.tolist()):
            old, rollouts[i].mu = rollouts[i].mu, row[:len(rollouts[i].response)]
            gap["tokens"] += len(old)
            gap["abs_dlogp_sum"] += sum(abs(x - mu) for x, mu in zip(row, old))
    return gap


# ---- 4. one update --------------------------------------------------------------------------------------------------
def _plan(lengths, rewards, idle, group_size, token_budget):
    """Micro-batches to score before any backward, those without gradient (idle), those with.
    Eq. (2) needs the weights of a group's rewarded responses. A group in one micro-batch has them in the same pass, but
    more padding. A group cut apart by length needs a forward pass before; a backward pass costs as much as two."""
    whole, widths, cut = [], [], []
    for k in range(0, len(lengths), group_size):
        group = range(k, k + group_size)
        own = lengths[k:k + group_size]
        width = group_size * max(own)
        rewarded = sum(lengths[i] for i in group if rewards[i])
        if idle[k]:
            continue
        if group_size == 1 or width <= token_budget and 3 * width <= 3 * sum(own) + rewarded:
            whole.append(group)
            widths.append(width)
        else:
            cut += group
    batches = micro_batches(lengths, token_budget, cut)
    for batch in micro_batches(widths, token_budget):
        batches.append([i for g in batch for i in whole[g]])
    before = micro_batches(lengths, token_budget, [i for i in cut if rewards[i]])
    return before, micro_batches(lengths, token_budget, torch.where(idle)[0].tolist()), batches


def accumulate(model, rollouts, *, group_size, denominator, algo="rapid", eta=2.0, is_level="sequence",
               baseline="loo", adv_norm="std", token_budget=16384, **scoring):
    """Add the gradient of Eq. (4) to p.grad and return metrics; no optimizer step. scoring: as in `response_logps`.
    rollouts: whole groups, group g is rollouts[g*G:(g+1)*G]. denominator: B G Lbar over all ranks. Gradients and
    metrics of ranks and micro-batches then add up. Metrics are sums (max_*: maxima), see `summarise`."""
    _check_choice("algo", algo, "rapid", "grpo")
    for k, item in enumerate(rollouts):
        if len(item.mu) != len(item.response) or not all(map(math.isfinite, item.mu)):
            raise ValueError(f"rollouts[{k}].mu: {len(item.mu)} log-probs for {len(item.response)} response tokens; "
                             "need one finite number each, as the sampler returned them")
    if algo == "grpo":
        baseline, is_level = "group", "token"
    lengths = [len(item.prompt) + len(item.response) for item in rollouts]
    rewards = torch.tensor([float(item.reward) for item in rollouts], dtype=torch.float64)  # [N]
    weights = torch.ones_like(rewards)                                               # [N] wc of Eq. (2); GRPO: stays 1
    valuing = dict(baseline=baseline, norm=adv_norm)
    _, zero_signal = group_advantages(rewards, weights, group_size, **valuing)       # [N]
    metrics = {
        "responses": len(rollouts), "truncated": sum(item.truncated for item in rollouts),
        "groups": len(rollouts) // group_size, "zero_signal_groups": int(zero_signal.sum()) // group_size,
        "reward_sum": float(rewards.sum()),
        "loss": 0.0, "h_on": 0.0}
    # 1. Advantage 0 whatever the weights: no gradient, only a forward pass for the metrics.
    idle = zero_signal                                                               # [N]
    if algo == "rapid" and adv_norm == "none":
        idle = zero_signal & (rewards == 0)                                          # [N]
    before, scored, trained = _plan(lengths, rewards, idle, group_size if algo == "rapid" else 1, token_budget)
    # 2. wc for Eq. (2), then the metrics of idle responses, then training. adv is final for its own batch only.
    for batches in (before, scored, trained):
        for batch in batches:
            items = [rollouts[i] for i in batch]
            with torch.set_grad_enabled(batches is trained):
                logp, entropy, slope, mask = response_logps(model, items, **scoring)  # [n, T] each
            mu, wc, weight, part = _weigh(items, logp, entropy, mask, eta, is_level, algo)
            if algo == "rapid":
                weights[batch] = weight
            if batches is not before:
                add_metrics(metrics, part)
            if batches is not trained:
                continue
            adv, _ = group_advantages(rewards, weights, group_size, **valuing)       # [N]
            adv = adv[batch].to(logp)                                                # [n]
            loss = rapid_loss(logp, mask, wc, adv, denominator=denominator)
            if algo == "grpo":
                loss = grpo_loss(logp, mu, mask, adv, denominator=denominator)
            logp.retain_grad()
            loss.backward()
            metrics["loss"] += float(loss.detach())
            # h_on of Eq. (6): the gradient at log pi is -wc_i A_i / (B G Lbar), for GRPO what its clip leaves
            metrics["h_on"] -= float((logp.grad * slope).sum())
    return metrics


def _weigh(items, logp, entropy, mask, eta, level, algo):
    """Eq. (1) for one micro-batch -> mu [n, T], wc [n] or [n, T], each response's weight in Eq. (2) [n], metrics."""
    mu, _ = pad([item.mu for item in items], logp.device, logp.dtype)                # [n, T]
    w, wc = importance_weights(logp, mu, mask, eta=eta, level=level)                 # [n] or [n, T]
    weight = wc if level == "sequence" else wc.sum(1) / mask.sum(1)                  # [n] mean of token-level weights
    w = (w if level == "sequence" else w[mask]).cpu().double()                       # [n] or [K]
    low, high = GRPO_CLIP if algo == "grpo" else (0.0, eta)
    log_ratio = torch.where(mask, logp.detach() - mu, 0.0).cpu().double()            # [n, T]
    part = {
        "w_count": w.numel(), "w_sum": w.sum(), "w_sq_sum": w.square().sum(),
        "clipped": ((w < low) | (w > high)).sum(), "tokens": mask.sum(), "entropy_sum": entropy.sum(),
        "kl_sum": (log_ratio.exp() - 1 - log_ratio).sum(),
        "abs_dlogp_sum": log_ratio.abs().sum(), "max_abs_logw": log_ratio.sum(1).abs().max()}
    return mu, wc, weight.cpu().double(), {name: float(value) for name, value in part.items()}


def add_metrics(total, part):
    """Add one micro-batch's or rank's metrics to total, in place: sums add, max_* take the maximum."""
    for name, value in part.items():
        old = total.get(name, 0)
        total[name] = max(old, value) if name.startswith("max_") else old + value


def summarise(m):
    """Means of `accumulate`'s metrics (after `add_metrics` over ranks). One line each: what over what."""
    n = m["responses"]
    tokens = m["tokens"]
    return {
        "loss": m["loss"],                                                 # Eq. (4), already divided by its constant
        "h_on": m["h_on"],                                                 # what Eq. (4) does to the entropy
        "reward": m["reward_sum"] / n,                                     # per response
        "ess": m["w_sum"] ** 2 / (m["w_count"] * m["w_sq_sum"]) if m["w_sq_sum"] > 0 else 0.0,  # 1 on-policy, -> 1/N
        "clip_frac": m["clipped"] / m["w_count"],                          # weights above eta (GRPO: ratios clipped)
        "kl": m["kl_sum"] / tokens,                                        # KL(mu || pi), k3, nats per token
        "entropy": m["entropy_sum"] / tokens,                              # of pi, nats per token
        "abs_dlogp": m["abs_dlogp_sum"] / tokens,                          # |log pi - log mu| per token
        "max_abs_logw": m["max_abs_logw"],                                 # worst response: |sum_t log pi - log mu|
        "zero_signal": m["zero_signal_groups"] / m["groups"],              # groups whose rewards are all equal
        "truncated": m["truncated"] / n,                                   # responses cut by the length limit
        "length": tokens / n,                                              # tokens per response
    }
