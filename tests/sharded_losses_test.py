"""Eight devices give the gradient of one, for every loss of the index: data and fsdp, data and tensor."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from accumulation_test import one_hot, together
from packing_test import CONFIG, SPEC, batch_of, flat, lists, model

from alignax import losses, models, sharding, step

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[1]
EIGHT = """
import sys
sys.path.insert(0, {tests!r})
import conftest
import numpy as np
import sharded_losses_test as t
np.savez({out!r}, **t.gradients({sizes!r}))
"""


def gradients(sizes):
    """Loss -> [its value, its gradient...] of one update of the real decoder on a mesh; None: one device.

    Two programs, of pairs and of lists, hold all losses and every request that they make.
    """
    out = {}
    with jax.enable_x64(True):
        mesh = sharding.make_mesh(sizes) if sizes else None
        spec = dataclasses.replace(SPEC, activations=sharding.over_activations(mesh) if mesh else None)
        place = lambda p: jax.device_put(p, sharding.param_shardings(p, mesh)) if mesh else p
        heads = {name: tree for name, tree in model(0).items() if name != "model"}
        tree = jax.tree.map(lambda a: 3 * jnp.asarray(a, jnp.float64), models.init_params(CONFIG, jax.random.key(0)))
        rng = np.random.default_rng(1)  # a reference near the policy, as in training
        near = jax.tree.map(lambda a: a + 3e-3 * rng.normal(size=a.shape), tree)
        start = jax.tree.map(jnp.asarray, {"model": tree, **heads})
        optimizer = optax.sgd(1.0)
        for ragged in (False, True):
            names = tuple(name for name in losses.names() if lists(name) == ragged)
            loss, batch = together(names), batch_of("padded", ragged)
            batch = sharding.shard_batch(batch, mesh) if mesh else batch
            policy = place(start)
            state = step.TrainState(jnp.zeros((), jnp.int32), policy, optimizer.init(policy), loss.init_state())
            update = jax.jit(step.make_update(spec, loss, optimizer))
            for name in names:
                new, metrics = update(state, place({"model": near}), batch, one_hot(names, name), jax.random.key(3))
                out[name] = np.concatenate([[float(metrics["loss"][0])], flat(start) - flat(new.params)])
    return out


@pytest.fixture(scope="module")
def single():
    return gradients(None)


@pytest.mark.parametrize("sizes", [{"data": 4, "fsdp": 2}], ids=str)
def test_eight_devices_give_the_gradient_of_one(single, sizes, tmp_path):
    script = EIGHT.format(tests=str(ROOT / "tests"), out=str(tmp_path / "out.npz"), sizes=sizes)
    env = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=8", JAX_PLATFORMS="cpu")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=ROOT,
                          timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    sharded = np.load(tmp_path / "out.npz")
    assert set(sharded.files) == set(losses.names()) == set(single)
    for name, expected in single.items():
        found = sharded[name]
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, err_msg=name)
        size, apart = np.linalg.norm(expected[1:]), np.linalg.norm(found[1:] - expected[1:])
        assert size > 1e-7 and apart <= 1e-5 * size, (name, apart, size)
