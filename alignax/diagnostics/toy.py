"""The toy table of the 3D-properties study: four prompts, ten responses of one symbol each, and any preference loss.

A policy is a function params -> logits [P, A] over all prompts and responses, so that every probability is exact. The
pairs are (prompt, chosen, rejected); a loss of the index gets what it requests from the table (`supply`), training is
one `lax.scan` (`train`), and everything is a pure function of arrays: vmap it over seeds, starts and hyper-parameters.

Source: arXiv 2406.07327 (ICLR 2025) for the tables, the layout and the network's two layers of weights. The paper does
not give beta, width, activation, optimiser, learning rate or initialisation: `HIDDEN`, `SFT` and `DPO` are our own
choice, set to come near its first curve. What one draws from the records is in toy_curves.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignax import losses
from alignax.losses.loss import Loss
from alignax.ops.reductions import as_terms, reduce_terms
from alignax.types import REQUESTS, ConfigError

PROMPTS, RESPONSES, HIDDEN = 4, 10, 128
CHOSEN, REJECTED = (0, 1, 2, 3), (4, 6, 7, 5)
"""The pairs: prompt i prefers response i to REJECTED[i] (the published figure's permutation of 4..7)."""

SCENARIOS: Mapping[str, tuple[float, ...]] = {
    "both on-policy": (0.12,) * 8 + (0.03, 0.01),
    "chosen off-policy": (0.02,) * 4 + (0.12,) * 4 + (0.40, 0.04),
    "rejected off-policy": (0.12,) * 4 + (0.02,) * 4 + (0.40, 0.04),
    "both off-policy": (0.02,) * 8 + (0.80, 0.04),
}
"""The four starts S1 to S4: one row of probabilities, the same for every prompt."""

SFT = {"steps": 3000, "lr": 1e-3}
DPO = {"steps": 2000, "lr": 2e-4, "beta": 0.1}

Policy = Callable[[Any], jax.Array]


class Pairs(NamedTuple):
    """Preference pairs over a table: prompt, chosen, rejected int32 [N]; scores float32 [N, 2] of both."""

    prompt: Any
    chosen: Any
    rejected: Any
    scores: Any


def published_pairs() -> Pairs:
    """The four pairs of the study, scores 1 and 0."""
    scores = np.tile(np.array([1.0, 0.0], np.float32), (PROMPTS, 1))
    return Pairs(np.arange(PROMPTS), np.array(CHOSEN), np.array(REJECTED), scores)


def unseen_mask(pairs: Pairs, prompts: int = PROMPTS, responses: int = RESPONSES) -> np.ndarray:
    """bool [P, A]: responses of a prompt that stand in none of its own pairs. It depends on the pairs alone."""
    mask = np.ones((prompts, responses), bool)
    mask[np.asarray(pairs.prompt), np.asarray(pairs.chosen)] = False
    mask[np.asarray(pairs.prompt), np.asarray(pairs.rejected)] = False
    return mask


def mlp(key: jax.Array, sizes: Sequence[int] = (PROMPTS, HIDDEN, RESPONSES)) -> list[dict[str, jax.Array]]:
    """Weights of a network with these widths, uniform within +-1 / sqrt(fan-in); float32.

    The first layer's are [prompts, width], a row per prompt, the others' [out, in]. The hidden width is then the last
    axis of all of them: Adam on leaves with 10 in the last axis took three times as long on a CPU.
    """
    params = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        key, first, second = jax.random.split(key, 3)
        bound = fan_in ** -0.5
        weight = jax.random.uniform(first, (fan_in, fan_out), minval=-bound, maxval=bound)
        params.append({"weight": weight.T if params else weight,
                       "bias": jax.random.uniform(second, (fan_out,), minval=-bound, maxval=bound)})
    return params


def mlp_logits(params: list[dict[str, jax.Array]]) -> jax.Array:
    """Logits [P, A] of the network at all one-hot prompts, ReLU between layers. A one-hot input picks a row.

    One product per prompt: the gradient of a weight is then a sum of outer products, which the compiler fuses; as one
    product over the few prompts it made an update of a population 1.4 times as long on a CPU.
    """
    rows = list(params[0]["weight"] + params[0]["bias"][None])
    for layer in params[1:]:
        rows = [layer["weight"] @ jax.nn.relu(row) + layer["bias"] for row in rows]
    return jnp.stack(rows)


def table_logits(params: jax.Array) -> jax.Array:
    """The free table: the parameters [P, A] are the logits."""
    return params


def log_policy(policy: Policy, params: Any) -> jax.Array:
    """log pi [P, A] of a policy."""
    return jax.nn.log_softmax(policy(params), axis=-1)


def fit(params: Any, table: jax.Array, *, policy: Policy = mlp_logits, steps: int = SFT["steps"],
        lr: Any = SFT["lr"]) -> Any:
    """Parameters after full-batch Adam on the cross-entropy to the probabilities `table`, [A] or [P, A]."""
    adam = optax.adam(lr)

    def step(carry, _):
        params, memory = carry
        gradient = jax.grad(lambda p: -(table * log_policy(policy, p)).sum(-1).mean())(params)
        updates, memory = adam.update(gradient, memory)
        return (optax.apply_updates(params, updates), memory), None

    table = jnp.broadcast_to(table, jax.eval_shape(policy, params).shape)
    return jax.lax.scan(step, (params, adam.init(params)), None, steps)[0][0]


SUPPLIED = (
    "logps", "ref_logps", "token_logps", "ref_token_logps", "old_token_logps", "candidate_logps", "lengths", "mask",
    "diff", "valid", "labels", "scores", "margins", "weights", "ids", "annotator", "targets", "steps", "token_rewards",
    "segment_scores", "advantages", "entropy", "log_sum_sq", "ref_policy_kl", "policy_ref_kl", "kl_logps",
    "kl_ref_logps", "aux_prompt_logps", "aux_prompt_ref_logps", "reference_sample_logps", "prompt_embedding",
    "key", "state",
)
"""The requests that a table can answer; the others ask for heads or hidden states."""


def why_not(name: str) -> str:
    """Why a loss of the index cannot be trained on the table; empty where it can."""
    requests, _ = losses.split_signature(losses.INDEX[name])
    lacking = [request for request in requests if request not in SUPPLIED]
    if lacking:
        return "needs " + ", ".join(lacking)
    return "" if {"logps", "token_logps"} & set(requests) else "reads no log-probs of the policy"


def usable() -> tuple[str, ...]:
    """Ids of the losses that can be trained on the table, in the order of the index."""
    return tuple(name for name in losses.names() if not why_not(name))


def pair_logps(log_pi: jax.Array, pairs: Pairs, shift: int = 0) -> jax.Array:
    """[N, 2]: log pi of chosen and rejected; with `shift`, under the prompt that many places further on."""
    prompt = (jnp.asarray(pairs.prompt) + shift) % log_pi.shape[0]
    return jnp.stack([log_pi[prompt, pairs.chosen], log_pi[prompt, pairs.rejected]], -1)


def supply(requests: Sequence[str], log_pi: jax.Array, log_ref: jax.Array, pairs: Pairs, *, logps: Any = None,
           key: Any = None, state: Any = None) -> dict[str, Any]:
    """What a loss requests, from the table of the policy and that of the reference, [P, A] each.

    A response is one token. What a text would have and a table has not is its simplest value: lengths, weights and
    masks 1, steps and annotators 0, a token's reward its response's score. KTO's mismatched completions and the other
    prompt of Sr-DPO are the next prompt's. logps: the pairs' log-probs [N, 2], to differentiate by them; those of
    `log_pi` by default. Raises ConfigError for a request that a table cannot answer.
    """
    lacking = [name for name in requests if name not in SUPPLIED]
    if lacking:
        raise ConfigError(f"toy: a table cannot supply {', '.join(lacking)}; it has {', '.join(SUPPLIED)}")
    log_ref = jax.lax.stop_gradient(log_ref)
    prompt = jnp.asarray(pairs.prompt)
    logps = pair_logps(log_pi, pairs) if logps is None else logps
    ref_logps = pair_logps(log_ref, pairs)
    scores = jnp.asarray(pairs.scores, ref_logps.dtype)
    count, ones = prompt.shape[0], jnp.ones_like(ref_logps)

    def slots(per_prompt):  # [P] -> [N, 2, 1]
        return jnp.broadcast_to(per_prompt[prompt, None, None], (count, 2, 1))

    other, other_ref = (jax.lax.stop_gradient(pair_logps(x, pairs, 1)) for x in (log_pi, log_ref))
    made = {
        "logps": lambda: logps, "token_logps": lambda: logps[..., None],
        "ref_logps": lambda: ref_logps, "ref_token_logps": lambda: ref_logps[..., None],
        "old_token_logps": lambda: ref_logps[..., None], "candidate_logps": lambda: logps[..., None, None],
        "lengths": lambda: ones, "weights": lambda: ones[:, 0], "valid": lambda: ones > 0,
        "mask": lambda: ones[..., None] > 0, "diff": lambda: ones[..., None] > 0,
        "labels": lambda: jnp.stack([ones[:, 0], 0 * ones[:, 0]], -1),
        "scores": lambda: scores, "margins": lambda: scores[:, 0] - scores[:, 1],
        "token_rewards": lambda: scores[..., None], "segment_scores": lambda: scores[..., None],
        "advantages": lambda: (scores - scores.mean(1, keepdims=True))[..., None],
        "ids": lambda: jnp.arange(count, dtype=jnp.uint32), "annotator": lambda: jnp.zeros(count, jnp.int32),
        "targets": lambda: jnp.stack([jnp.asarray(pairs.chosen), jnp.asarray(pairs.rejected)], -1)[..., None],
        "steps": lambda: jnp.zeros((count, 2, 1), jnp.int32),
        "entropy": lambda: slots(entropy(log_pi)),
        "log_sum_sq": lambda: slots(jax.nn.logsumexp(2 * log_pi, axis=-1)),
        "ref_policy_kl": lambda: slots(kl(log_ref, log_pi)), "policy_ref_kl": lambda: slots(kl(log_pi, log_ref)),
        "kl_logps": lambda: other, "kl_ref_logps": lambda: other_ref,
        "aux_prompt_logps": lambda: other, "aux_prompt_ref_logps": lambda: other_ref,
        "reference_sample_logps": lambda: log_pi[prompt, jax.random.categorical(
            jax.random.fold_in(key, 1), log_ref[prompt])][:, None],
        "prompt_embedding": lambda: jax.nn.one_hot(prompt, log_pi.shape[0]),
        "key": lambda: key, "state": lambda: state,
    }
    wanted = {*requests}
    if "reference_sample_logps" in wanted and key is None:
        raise ConfigError("toy: reference_sample_logps needs a key")
    return {name: made[name]() for name in REQUESTS if name in wanted}


def entropy(log_pi: jax.Array) -> jax.Array:
    """Entropy over the last axis, nats; an entry of probability 0 adds 0."""
    return -jnp.where(jnp.isneginf(log_pi), 0, jnp.exp(log_pi) * log_pi).sum(-1)


def kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p || q) over the last axis, nats."""
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def expected(log_pi: jax.Array, reward: jax.Array) -> jax.Array:
    """Mean over prompts of the policy's expected reward; log_pi [..., P, A], reward [..., P, A]."""
    return (jnp.exp(log_pi) * reward).sum(-1).mean(-1)


class Record(NamedTuple):
    """What `train` keeps, before the first update and after every `every` ones.

    log_pi: [T + 1, P, A]. slopes: [T + 1, N, 2], the derivative of a pair's loss by its two log-probs (N times that of
    the mean over pairs). loss: [T + 1]. state: the loss's state at the end.
    """

    log_pi: jax.Array
    slopes: jax.Array
    loss: jax.Array
    state: Any


def train(loss: Loss, params: Any, pairs: Pairs, *, policy: Policy = mlp_logits, log_ref: Any = None,
          steps: int = DPO["steps"], every: int = 1, lr: Any = DPO["lr"], hyper: Mapping[str, Any] | None = None,
          key: jax.Array | None = None, optimiser: Callable[[Any], Any] = optax.adam,
          batch: int | None = None, pairs_of: Callable[[jax.Array, jax.Array], Pairs] | None = None,
          weights: Any = None) -> tuple[Any, Record]:
    """(parameters, Record) after `steps` updates by `optimiser(lr)`, full batch unless `batch` is given.

    log_ref: the reference's table [P, A]; the start's own by default. hyper: hyper-parameters over those of `loss`,
    traced or not; lr may be traced too. batch: pairs drawn with replacement for every update. pairs_of(key, log_pi):
    pairs made anew for every update, of the shape of `pairs` (on-policy data); `pairs` are then those of the record.
    weights: [N] of the pairs in every mean over pairs, for exact expectations over labels; full batch only. A loss
    that trains on chosen completions alone sees nothing else.
    Raises ConfigError where `every` does not divide `steps`, and for a loss that a table cannot serve.
    """
    if steps % every:
        raise ConfigError(f"toy.train: every = {every} must divide steps = {steps}")
    key = jax.random.key(0) if key is None else key
    rule = optimiser(lr)
    log_ref = log_policy(policy, params) if log_ref is None else log_ref
    count = jnp.shape(pairs.prompt)[0]

    def value(log_pi, data, key, state, logps=None):
        inputs = supply(loss.requests, log_pi, log_ref, data, logps=logps, key=key, state=state)
        if loss.info.chosen_only:
            inputs = {name: x[:, :1] if REQUESTS[name].axes[:2] == "BK" else x for name, x in inputs.items()}
        result = loss(inputs, **(hyper or {}))
        terms = as_terms(result)
        if weights is not None:
            terms = {name: term._replace(weight=term.weight * weights) for name, term in terms.items()}
        return reduce_terms(terms)[0], getattr(result, "new_state", None)

    def drawn(key, log_pi):
        if pairs_of is not None:
            return pairs_of(jax.random.fold_in(key, 2), log_pi)
        if batch is None:
            return pairs
        chosen = jax.random.randint(jax.random.fold_in(key, 2), (batch,), 0, count)
        return Pairs(*(jnp.asarray(x)[chosen] for x in pairs))

    def update(carry, number):
        params, memory, state = carry
        here = jax.random.fold_in(key, number)
        data = drawn(here, jax.lax.stop_gradient(log_policy(policy, params)))
        gradient, new = jax.grad(lambda p: value(log_policy(policy, p), data, here, state), has_aux=True)(params)
        updates, memory = rule.update(gradient, memory, params)
        return (optax.apply_updates(params, updates), memory, state if new is None else new), None

    def look(carry, number):
        params, _, state = carry
        log_pi = log_policy(policy, params)
        here = jax.random.fold_in(key, number)
        total, slopes = jax.value_and_grad(lambda x: value(log_pi, pairs, here, state, x)[0])(pair_logps(log_pi, pairs))
        return Record(log_pi, count * slopes, total, None)

    def stretch(carry, first):
        seen = look(carry, first)
        return jax.lax.scan(update, carry, first + jnp.arange(every))[0], seen

    carry = (params, rule.init(params), loss.init_state())
    carry, seen = jax.lax.scan(stretch, carry, jnp.arange(0, steps, every))
    last = look(carry, steps)
    whole = Record(*(jnp.concatenate([a, b[None]]) for a, b in zip(seen[:3], last[:3], strict=True)), carry[2])
    return carry[0], whole
