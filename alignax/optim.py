"""Optimisers and schedules from plain numbers, all of them optax's, and float32 master weights around any of them.

The numbers of TRACED may be traced scalars, so that the members of a population, each with its own, share one program.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
_DECAYS = ("b1", "b2", "b3", "decay")
TRACED = ("learning_rate", "warmup_steps", "clip_norm", "weight_decay", "eps", "momentum", *_DECAYS)


def schedule(name: str, learning_rate: float, total_steps: int, warmup_steps: int = 0) -> optax.Schedule:
    """Learning rate against step: linear warm-up from 0, then constant, linear to 0, or cosine to 0.

    With no warm-up the first step runs at `learning_rate`. Raises ConfigError for another name, or a warm-up that
    is longer than the run. A traced warm-up is not checked.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"optim.schedule={name!r}; allowed: {', '.join(SCHEDULES)}")
    if isinstance(warmup_steps, jax.Array):
        return _traced_warmup(name, learning_rate, total_steps, warmup_steps)
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


def _traced_warmup(name: str, learning_rate: Any, total_steps: int, warmup_steps: jax.Array) -> optax.Schedule:
    """The same rates where the length of the warm-up is no Python number, which optax's schedules ask for."""

    def rate(count):
        rest = jnp.maximum(total_steps - warmup_steps, 1)
        done = jnp.clip(count - warmup_steps, 0, rest) / rest
        left = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + jnp.cos(jnp.pi * done))}[name]
        return learning_rate * jnp.where(count < warmup_steps, count / jnp.maximum(warmup_steps, 1), left)

    return rate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decay:
    """A decay b as a traced number with its complement, for optax's `1 - b`.

    In float32, 1 - 0.999 is 0.001 to five digits only; a Python number is subtracted before it is rounded, and so is
    `complement`, which `traced` fills."""

    value: jax.Array
    complement: jax.Array

    def __rsub__(self, one):
        """1 - b; optax subtracts from nothing else."""
        return self.complement

    def __mul__(self, other):
        """b * other."""
        return self.value * other

    __rmul__ = __mul__

    def __pow__(self, count):
        """b ** count."""
        return self.value ** count


def numbers(section: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an optimiser section that may differ inside one program: name -> value, names of TRACED."""
    every = {**section, **dict(section["options"])}
    plain = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
    return {name: every[name] for name in TRACED if name in every and plain(every[name])}


def traced(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """name -> numbers [N] of N members as `from_section(..., traced=)` takes them, one member's each: float32 arrays
    [N], decays with their complements, a clip of 0 (none) as infinity."""
    out = {}
    for name, given in values.items():
        wide = np.asarray(given, np.float64)
        if name == "clip_norm":
            wide = np.where(wide == 0, np.inf, wide)
        one = wide.astype(np.float32)
        out[name] = Decay(one, (1 - wide).astype(np.float32)) if name in _DECAYS else one
    return out


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
    clips = isinstance(clip_norm, jax.Array) or clip_norm
    chained = optax.chain(optax.clip_by_global_norm(clip_norm), inner) if clips else inner
    return master_weights(chained) if master else chained


def from_section(section: Mapping[str, Any], total_steps: int,
                 traced: Mapping[str, Any] | None = None) -> optax.GradientTransformation:
    """`make` from a config's optimiser section as a plain mapping (name, learning_rate, schedule, ..., options).

    traced: numbers of the section as traced scalars (see `numbers` and the function `traced`), which stand instead of
    the section's own. The transformation is the same to rounding."""
    traced = dict(traced or {})
    pick = lambda key: traced.pop(key, section[key])
    own = dict(name=section["name"], learning_rate=pick("learning_rate"), schedule_name=section["schedule"],
               warmup_steps=pick("warmup_steps"), clip_norm=pick("clip_norm"), master=section["master"],
               total_steps=total_steps)
    made = make(**own, **{**dict(section["options"]), **traced})
    return made if not traced and not isinstance(own["clip_norm"], jax.Array) else _same_dtypes(made)


def _same_dtypes(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` with the state's dtypes kept: a traced float32 number widens a bfloat16 moment, a Python number does
    not."""

    def update(grads, state, params=None):
        moves, after = inner.update(grads, state, params)
        return moves, jax.tree.map(lambda new, old: new.astype(old.dtype), after, state)

    return optax.GradientTransformation(inner.init, update)


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
