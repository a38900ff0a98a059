"""The optimiser as configured: where a schedule turns and ends, and what the clip is applied to."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from alignax import optim
from alignax.types import ConfigError

PEAK, TOTAL, WARM = 0.8, 10, 4


@pytest.mark.parametrize("name, after", [
    ("constant", lambda done: PEAK),
    ("linear", lambda done: PEAK * (1 - done)),
    ("cosine", lambda done: PEAK * (1 + math.cos(math.pi * done)) / 2),
], ids=optim.SCHEDULES)
def test_a_schedule_turns_at_the_end_of_the_warm_up_and_ends_with_the_run(name, after):
    warm = [PEAK * step / WARM for step in range(WARM)]
    rest = [after((step - WARM) / (TOTAL - WARM)) for step in range(WARM, TOTAL + 1)]
    rate = optim.schedule(name, PEAK, TOTAL, WARM)
    np.testing.assert_allclose([float(rate(step)) for step in range(TOTAL + 1)], warm + rest, rtol=1e-6, atol=1e-7)
    plain = optim.schedule(name, PEAK, TOTAL)
    np.testing.assert_allclose([float(plain(step)) for step in (0, 5, TOTAL)], [after(d) for d in (0, 0.5, 1)],
                               rtol=1e-6, atol=1e-7)


def test_impossible_schedules_are_refused():
    with pytest.raises(ConfigError, match="constant, linear, cosine"):
        optim.schedule("steps", PEAK, TOTAL)
    with pytest.raises(ConfigError, match="warmup_steps=11; allowed: 0 to the number of steps, 10"):
        optim.schedule("linear", PEAK, TOTAL, 11)


def test_the_gradient_is_clipped_before_the_optimiser_sees_it():
    """SGD with momentum: the velocity holds 3/5 and 4/5 of the clip, then twice that; a clipped update would not."""
    optimizer = optim.make(name="sgd", learning_rate=10.0, clip_norm=0.5, momentum=1.0)
    params, gradient = {"a": jnp.zeros(()), "b": jnp.zeros(())}, {"a": jnp.float32(30.0), "b": jnp.float32(40.0)}
    state = optimizer.init(params)
    for turn in (1, 2):
        move, state = optimizer.update(gradient, state, params)
        np.testing.assert_allclose([move["a"], move["b"]], [-10 * turn * 0.3, -10 * turn * 0.4], rtol=1e-6)
    small = {"a": jnp.float32(0.03), "b": jnp.float32(0.04)}
    move, _ = optimizer.update(small, optimizer.init(params), params)
    np.testing.assert_allclose([move["a"], move["b"]], [-0.3, -0.4], rtol=1e-6)
