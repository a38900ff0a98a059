"""Heads on the states that predict tokens: values, Q values, learned token weights; and their fresh parameters.

A state of token t is the hidden state from which t is predicted, before it is taken. Parameters of a policy's tree:
degree_head {"weight": [C, D], "bias": [C]}, value_head, prompt_value_head (scalar heads), q_head {"weight": [2, V, D],
"bias": [2, V]} and, where targets trail, target_q_head; reward_mask_head, kl_mask_head (see `token_weight`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from alignax.models.heads import init_scalar_head, scalar_head
from alignax.ops.head import Head
from alignax.types import Array

_NORM_EPS = 1e-5
_Q_STD = 0.02
DEGREES = 4
"""Classes of the degree head: versions of a completion that self-supervised preference optimisation tells apart."""
ON_REFERENCE = ("prompt_values", "reward_mask", "kl_mask")
"""Requests whose head reads the reference's states."""


def init_heads(requests: Iterable[str], hidden_size: int, vocab_size: int, key: Array,
               dtype=jnp.float32) -> dict[str, Any]:
    """Fresh parameters of the heads that the requests need, by name; {} where they need none.

    reward_head as init_scalar_head; degree and value heads all zero; Q heads small and different, so that their
    minimum means something; token weights close to 1 everywhere.
    """
    requests, out = set(requests), {}
    if "rewards" in requests:
        out["reward_head"] = init_scalar_head(jax.random.fold_in(key, 1), hidden_size, dtype=dtype)
    if "degree_logits" in requests:
        out["degree_head"] = {"weight": jnp.zeros((DEGREES, hidden_size), dtype), "bias": jnp.zeros((DEGREES,), dtype)}
    if requests & {"values", "detached_values"}:
        out["value_head"] = init_scalar_head(key, hidden_size, zero=True, dtype=dtype)
    if "prompt_values" in requests:
        out["prompt_value_head"] = init_scalar_head(key, hidden_size, zero=True, dtype=dtype)
    if requests & {"q_values", "q_logps", "target_q_values"}:
        draw = jax.random.normal(jax.random.fold_in(key, 2), (2, vocab_size, hidden_size), jnp.float32)
        out["q_head"] = {"weight": (_Q_STD * draw).astype(dtype), "bias": jnp.zeros((2, vocab_size), dtype)}
    for number, name in enumerate(("reward_mask", "kl_mask"), 3):
        if name in requests:
            own = init_scalar_head(jax.random.fold_in(key, number), hidden_size, dtype=dtype)
            out[f"{name}_head"] = {"weight": 0.1 * own["weight"], "bias": jnp.ones((), dtype),
                                   "scale": jnp.ones((hidden_size,), dtype),
                                   "shift": jnp.zeros((hidden_size,), dtype), "mix": jnp.ones((), dtype)}
    return out


def token_weight(params: Mapping[str, Array], states: Array) -> Array:
    """A token weight >= 0: ReLU(mix ReLU(LN(states) . weight + bias)); [..., D] -> [...], float32 or wider.

    LN has its own scale and shift. SparsePO (arXiv 2410.05102) mixes one such unit per layer of the reference; here
    it reads the last layer only.
    """
    full = jnp.promote_types(jnp.float32, states.dtype)
    x = states.astype(full)
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + _NORM_EPS)
    axes = (1,) * (x.ndim - 1) + (-1,)
    x = x * params["scale"].astype(full).reshape(axes) + params["shift"].astype(full).reshape(axes)
    return jax.nn.relu(params["mix"].astype(full) * jax.nn.relu(scalar_head(params, x)))


def activation_mask(states: Array, head: Head, mask: Array) -> Array:
    """A fixed weight in [0, 1] per scored token, from activations: [B,K,L,D], mask [B,K,L] -> [B,K,L], 0 outside.

    Of the last hidden state and of the logits: the mean over features, rescaled to [0, 1] over the scored tokens of the
    completion (0 where all are equal); then the mean of the two. MaPO (arXiv 2410.05102) takes every layer's
    activations; standardising first, as it does, changes nothing.
    """
    full = jnp.promote_types(jnp.float32, states.dtype)
    wide = states.astype(full)
    # The mean logit is the product with the mean row; a soft cap is left out, since it would need all the logits.
    row = head.weight.astype(full).mean(0)
    parts = (wide.mean(-1), jnp.einsum("bkld,d->bkl", wide, row))
    return sum(_rescaled(part, mask) for part in parts) / len(parts)


def _rescaled(x: Array, mask: Array) -> Array:
    low = jnp.min(x, -1, where=mask, initial=jnp.inf, keepdims=True)
    high = jnp.max(x, -1, where=mask, initial=-jnp.inf, keepdims=True)
    some = mask & (high > low)
    span = jnp.where(high > low, high - low, 1)
    return jnp.where(some, (jnp.where(some, x, 0) - jnp.where(some, low, 0)) / span, 0)


def q_statistics(params: Mapping[str, Array], states: Array, targets: Array,
                 statistics: Callable[..., Mapping[str, Array]]) -> tuple[Array, Array]:
    """(Q_j(s, target), log softmax of Q_j at the target), [B,K,L,2] each, of both heads; states [B,K,L,D].

    statistics(states, head, targets, want): `ops.head.head_stats` under the caller's settings, at temperature 1.
    """
    def one(_, head):
        stats = statistics(states, Head(*head), targets, ("logp", "log_z"))
        return None, (stats["logp"] + stats["log_z"], stats["logp"])

    # A loop, and not two calls: the gradients of two slices would be two more arrays of the size of both weights.
    _, (values, logps) = jax.lax.scan(one, None, (params["weight"], params["bias"]))
    return jnp.moveaxis(values, 0, -1), jnp.moveaxis(logps, 0, -1)


def policy_heads(names: Iterable[str], params: Mapping[str, Any], states: Array, targets: Array, mask: Array,
                 statistics: Callable[..., Mapping[str, Array]]) -> dict[str, Array]:
    """The requests among `names` that read the policy's states [B,K,L,D]; 0 outside the mask [B,K,L].

    statistics: as `q_statistics` takes it.
    """
    names, out = set(names), {}
    if "values" in names:
        out["values"] = jnp.where(mask, scalar_head(params["value_head"], states), 0)
    if "detached_values" in names:
        out["detached_values"] = jnp.where(mask, scalar_head(params["value_head"], jax.lax.stop_gradient(states)), 0)
    if names & {"q_values", "q_logps", "target_q_values"}:
        q, logps = q_statistics(params["q_head"], states, targets, statistics)
        target = q if "target_q_head" not in params else q_statistics(params["target_q_head"], states, targets,
                                                                      statistics)[0]
        found = {"q_values": q, "q_logps": logps, "target_q_values": jax.lax.stop_gradient(target)}
        out |= {name: jnp.where(mask[..., None], found[name], 0) for name in found.keys() & names}
    return out


def reference_heads(names: Iterable[str], params: Mapping[str, Any], states: Array, mask: Array) -> dict[str, Array]:
    """The requests among `names` that read the reference's states [B,K,L,D], which get no gradient."""
    names, out, states = set(names), {}, jax.lax.stop_gradient(states)
    if "prompt_values" in names:
        # Slot 0 of any completion is predicted from the prompt's last token.
        out["prompt_values"] = scalar_head(params["prompt_value_head"], states[:, 0, 0])
    for name in sorted(names & {"reward_mask", "kl_mask"}):
        out[name] = jnp.where(mask, token_weight(params[f"{name}_head"], states), 0)
    return out
