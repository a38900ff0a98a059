"""Optimisers and schedules from plain numbers, all of them optax's."""

from __future__ import annotations

import inspect

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
         warmup_steps: int = 0, clip_norm: float = 0.0, **options) -> optax.GradientTransformation:
    """An optax optimiser behind a clip of the global norm (`clip_norm`; 0 switches it off).

    `options` go to the optax function by its own argument names (`weight_decay`, `b1`, ...).
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
    return optax.chain(optax.clip_by_global_norm(clip_norm), inner) if clip_norm else inner
