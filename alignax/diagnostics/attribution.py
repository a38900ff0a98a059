"""Exact attribution of displacement: which part of the optimiser's actual update moves which completion.

An update u is a sum of parts, and one forward-mode product J u of log-probs on a probe is the sum of those of its
parts. The split holds the preconditioner fixed at its value after the step, where the update is linear in the gradient:

- sgd: u = -lr (g + m t) with the trace t before the step; Nesterov: -lr ((1 + m) g + m^2 t).
- adam, adamw: u = -lr [b1 m + (1 - b1) g] / (1 - b1^k) / (sqrt(v / (1 - b2^k) + eps_root) + eps) - lr wd theta, with
  m the first moment before the step, v the second moment after it, k the step's number.
- rmsprop: u = -lr g / sqrt(v + eps) (or / (sqrt(v) + eps)) with v after the step.

g is a sum of the chosen side's gradient, the rejected side's and what belongs to neither, so that the parts are
`chosen`, `rejected`, `other`, `earlier` (the momentum of earlier steps) and `decay`, and their sum is the update. The
preconditioner itself depends on all sides; that dependence is nobody's part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignax.types import ConfigError

OPTIMIZERS = ("adam", "adamw", "rmsprop", "sgd")
_REFUSED = {"adam": ("nesterov",), "adamw": ("nesterov", "mask"), "rmsprop": ("centered", "momentum",
            "bias_correction", "nesterov"), "sgd": ()}


def check(name: str, options: Mapping[str, Any], where: str) -> None:
    """Refuses an optimiser whose update this file cannot split. where: the config key, for the message."""
    if name not in OPTIMIZERS:
        raise ConfigError(f"{where}: attribution cannot split an update of {name!r}; allowed: {', '.join(OPTIMIZERS)}")
    used = [key for key in _REFUSED[name] if options.get(key)]
    if used:
        raise ConfigError(f"{where}: attribution cannot split an update of {name} with {', '.join(used)}; allowed: "
                          "without")


def clip_factor(norm: Any, clip_norm: float) -> Any:
    """What optax.clip_by_global_norm multiplies a gradient of that norm by; 1 where clip_norm is 0 (none)."""
    return jnp.where(norm < clip_norm, 1.0, clip_norm / norm) if clip_norm else jnp.ones_like(norm)


def _state(tree: Any, *fields: str) -> Any:
    """The optimiser's state that has these fields; ConfigError where there is not exactly one."""
    has = lambda node: isinstance(node, tuple) and set(fields) <= set(getattr(node, "_fields", ()))
    found = [node for node in jax.tree.leaves(tree, is_leaf=has) if has(node)]
    if len(found) != 1:
        raise ConfigError(f"attribution: found {len(found)} optimiser states with {', '.join(fields)}; allowed: one")
    return found[0]


def split_update(name: str, options: Mapping[str, Any], rate: Any, before: Any, after: Any,
                 grads: Mapping[str, Any], params: Any) -> dict[str, Any]:
    """Part -> its share of the update, trees like params; they sum to what the optimiser returned.

    name, options: of the optax optimiser; rate: the learning rate of this step. before, after: its state around the
    step. grads: part -> gradient after clipping; their sum is what the optimiser was given. Further parts: `earlier`,
    where the optimiser has momentum, and `decay`, where it decays weights.
    """
    scaled = lambda factor, tree: jax.tree.map(lambda g: factor * g, tree)
    if name == "sgd":
        momentum = options.get("momentum")
        if momentum is None:
            return {part: scaled(-rate, g) for part, g in grads.items()}
        now, then = (1 + momentum, momentum ** 2) if options.get("nesterov") else (1.0, momentum)
        return {part: scaled(-rate * now, g) for part, g in grads.items()} | {
            "earlier": scaled(-rate * then, _state(before, "trace").trace)}
    if name == "rmsprop":
        eps, moment = options.get("eps", 1e-8), _state(after, "nu").nu
        inside = options.get("eps_in_sqrt", True)
        root = lambda v: jnp.sqrt(v + eps) if inside else jnp.sqrt(v) + eps
        return {part: jax.tree.map(lambda g, v: -rate * g / root(v), g, moment) for part, g in grads.items()}
    b1, b2, eps = options.get("b1", 0.9), options.get("b2", 0.999), options.get("eps", 1e-8)
    old, new = _state(before, "mu", "nu"), _state(after, "mu", "nu")
    count = new.count  # an integer, as optax takes it: in float32 the rounding of 1 - b2^k is then the same
    root = lambda v: jnp.sqrt(v / (1 - b2 ** count).astype(v.dtype) + options.get("eps_root", 0.0)) + eps
    step = -rate / (1 - b1 ** count)
    share = lambda factor, tree: jax.tree.map(lambda g, v: (step * factor).astype(v.dtype) * g / root(v), tree, new.nu)
    out = {part: share(1 - b1, g) for part, g in grads.items()} | {"earlier": share(b1, old.mu)}
    if name == "adamw" and (decay := options.get("weight_decay", 1e-4)):
        out["decay"] = scaled(-rate * decay, params)
    return out


def side_cotangents(cotangent: Mapping[str, jax.Array], paired: Mapping[str, bool]) -> dict[str, Any]:
    """Part -> cotangents like `cotangent`, the loss's derivative by its inputs, cut into sides that sum to it.

    paired: for each input whether its axis 1 is the pair's completions; the rest belongs to `other`, which is left out
    where there is none.
    """
    def one(side):
        def cut(name, value):
            if not paired[name]:
                return value if side == "other" else jnp.zeros_like(value)
            first = jnp.arange(value.shape[1]).reshape((1, -1) + (1,) * (value.ndim - 2)) == 0
            keep = {"chosen": first, "rejected": ~first, "other": False}[side]
            return jnp.where(keep, value, 0)
        return {name: cut(name, value) for name, value in cotangent.items()}

    sides = ("chosen", "rejected") if all(paired.values()) else ("chosen", "rejected", "other")
    return {side: one(side) for side in sides}


def changes(logps: Callable[[Any], jax.Array], params: Any, parts: Mapping[str, Any], update: Any,
            ) -> tuple[dict[str, jax.Array], jax.Array]:
    """(part -> predicted first-order change J u_part, measured change) of logps(params), arrays of its shape.

    update: the whole update, which the measured change adds as optax.apply_updates does.
    """
    at, along = jax.linearize(logps, params)
    like = lambda tree: jax.tree.map(lambda u, p: u.astype(p.dtype), tree, params)
    predicted = {part: along(like(tree)) for part, tree in parts.items()}
    return predicted, logps(optax.apply_updates(params, update)) - at


def r_squared(predicted: Any, measured: Any) -> float:
    """1 - sum (measured - predicted)^2 / sum (measured - mean)^2 over all entries; NaN where nothing varies."""
    predicted, measured = np.asarray(predicted, np.float64).ravel(), np.asarray(measured, np.float64).ravel()
    spread = ((measured - measured.mean()) ** 2).sum()
    return float(1 - ((measured - predicted) ** 2).sum() / spread) if spread > 0 else float("nan")
