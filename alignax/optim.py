"""Optimisers and schedules from plain numbers, all of them optax's, and float32 master weights around any of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from alignax.types import ConfigError

OPTIMIZERS = {
    "adamw": optax.adamw,
    "adam": optax.adam,
    "sgd": optax.sgd,
    "rmsprop": optax.rmsprop,
    "lion": optax.lion,
    "adafactor": optax.adafactor,
}
SCHEDULES = ("constant", "linear", "cosine")


def schedule(name: str, learning_rate: float, total_steps: int, warmup_steps: int = 0) -> optax.Schedule:
    """Learning rate against step: linear warm-up from 0, then constant, linear to 0, or cosine to 0.

    With no warm-up the first step runs at `learning_rate`. Raises ConfigError for another name, or a warm-up that
    is longer than the run.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"optim.schedule={name!r}; allowed: {', '.join(SCHEDULES)}")
    if not 0 <= warmup_steps <= max(total_steps, 1):
        raise ConfigError(f"optim.warmup_steps={warmup_steps}; allowed: 0 to the number of steps, {total_steps}")
    rest = max(total_steps - warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(learning_rate),
        "linear": optax.linear_schedule(learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(learning_rate, rest),
    }[name]
    if not warmup_steps:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup_steps), after], [warmup_steps])


def make(*, name: str = "adamw", learning_rate: float = 1e-4, schedule_name: str = "constant", total_steps: int = 1,
         warmup_steps: int = 0, clip_norm: float = 0.0, master: bool = False,
         **options) -> optax.GradientTransformation:
    """An optax optimiser behind a clip of the global norm (`clip_norm`; 0 switches it off).

    `options` go to the optax function by its own argument names (`weight_decay`, `b1`, ...). master: see
    master_weights; the clip too is then computed in float32.
    Raises ConfigError for an unknown optimiser or an option that it does not take, with the legal ones.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"optim.name={name!r}; allowed: {', '.join(OPTIMIZERS)}")
    legal = [p for p in inspect.signature(OPTIMIZERS[name]).parameters if p != "learning_rate"]
    for key in options:
        if key not in legal:
            raise ConfigError(f"optim.{key} is not an option of {name}; allowed: {', '.join(legal)}")
    rate = schedule(schedule_name, learning_rate, total_steps, warmup_steps)
    inner = OPTIMIZERS[name](rate, **options)
    chained = optax.chain(optax.clip_by_global_norm(clip_norm), inner) if clip_norm else inner
    return master_weights(chained) if master else chained


def from_section(section: Mapping[str, Any], total_steps: int) -> optax.GradientTransformation:
    """`make` from a config's optimiser section as a plain mapping (name, learning_rate, schedule, ..., options)."""
    return make(name=section["name"], learning_rate=section["learning_rate"], schedule_name=section["schedule"],
                warmup_steps=section["warmup_steps"], clip_norm=section["clip_norm"], master=section["master"],
                total_steps=total_steps, **dict(section["options"]))


class MasterState(NamedTuple):
    """master: like the parameters, float32 where those are narrower, an empty node where they are wide enough already.
    inner: the wrapped optimiser's state, about the wide parameters."""

    master: Any
    inner: Any


def master_weights(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on float32 copies of narrower parameters, which live in the optimiser's state.

    A bfloat16 number has 8 significant bits: adding to it what is smaller than 1/512 of it changes nothing, so that
    small updates are lost one by one. Here gradients, moments and the sum are float32, and the parameters are the
    master rounded once: p = bfloat16(master) (arXiv 1710.03740). The transformation returns the differences that
    optax.apply_updates adds in float32; a difference that rounds is mended by the next step, since each is taken
    from the parameters as they are. `update` needs params. Parameters of float32 or wider are left to `inner`, with no
    copy.
    """
    def narrow(leaf) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 32

    def wide(master, params):
        return jax.tree.map(lambda m, p: p if _is_empty(m) else m, master, params, is_leaf=_is_empty)

    def init(params):
        master = jax.tree.map(lambda p: p.astype(jnp.float32) if narrow(p) else optax.MaskedNode(), params)
        return MasterState(master, inner.init(wide(master, params)))

    def update(grads, state, params=None):
        if params is None:
            raise ValueError("master_weights: update(grads, state, params) needs the parameters, found None")
        grads = jax.tree.map(lambda g: g.astype(jnp.promote_types(jnp.float32, g.dtype)), grads)
        before = wide(state.master, params)
        moves, after = inner.update(grads, state.inner, before)
        new = optax.apply_updates(before, moves)
        keep = lambda m, w: m if _is_empty(m) else w
        master = jax.tree.map(keep, state.master, new, is_leaf=_is_empty)
        # bfloat16(master) - parameter in float32; a parameter that is its own master moves as `inner` says.
        difference = lambda m, w, p, u: u if _is_empty(m) else w.astype(p.dtype).astype(w.dtype) - p.astype(w.dtype)
        return (jax.tree.map(difference, state.master, new, params, moves, is_leaf=_is_empty),
                MasterState(master, after))

    return optax.GradientTransformation(init, update)


def _is_empty(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
