"""A step in micro-batches is the step of the whole batch, for every loss of the index, in float64.

One program serves all losses of a set of requests: their sum under weights that are arguments, of which one is 1. A
plain layer in float64 stands for the decoder, whose softmax runs in float32 and would blur the law.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from packing_test import SPEC, attend64, batch_of, flat, lists, model

from alignax import losses, step
from alignax.losses.info import MethodInfo
from alignax.losses.loss import Loss
from alignax.ops.reductions import reduce_terms
from alignax.types import REQUESTS, Term, Terms

pytestmark = pytest.mark.slow


def groups(names=None):
    """Losses by the set of requests that a model serves, pairs apart from lists: every structure of the step once."""
    out = {}
    for name in names or losses.names():
        asked = sorted(r for r in losses.get(name).requests if REQUESTS[r].passes)
        out.setdefault((lists(name), *asked), []).append(name)
    return out


def together(names):
    """sum of weights[name] * loss `name` as one loss; the weights are its hyper-parameters, by name."""
    parts = {name: losses.get(name) for name in names}
    requests = tuple(dict.fromkeys(r for loss in parts.values() for r in loss.requests))
    stateful = [name for name, loss in parts.items() if loss.info.init_state]

    def run(*arrays, **weights):
        inputs, total, states = dict(zip(requests, arrays, strict=True)), 0.0, {}
        for name, loss in parts.items():
            out = loss(inputs | ({"state": inputs["state"][name]} if name in stateful else {}))
            total = total + weights[name] * reduce_terms(out)[0]
            if name in stateful:
                states[name] = out.new_state
        return Terms({"sum": Term(total, reduction="whole")}, states or None)

    init = (lambda: {name: parts[name].init_state() for name in stateful}) if stateful else None
    info = MethodInfo("together", "Sum", "", "reconstruction", init_state=init)
    return Loss("together", run, requests, dict.fromkeys(parts, 0.0), info)


def one_hot(names, name):
    return {other: np.float64(other == name) for other in names}


@functools.cache
def moves(names, accumulation, ragged):
    """name -> (loss, gradient as one vector, the new loss state) of one step of plain gradient descent."""
    loss, optimizer = together(names), optax.sgd(1.0)
    update = jax.jit(step.make_update(SPEC, loss, optimizer, accumulation=accumulation))
    start = jax.tree.map(jnp.asarray, model(0))
    state = step.TrainState(jnp.zeros((), jnp.int32), start, optimizer.init(start), loss.init_state())
    batch, out = batch_of("padded", ragged), {}
    for name in names:
        new, metrics = update(state, model(1), batch, one_hot(names, name), jax.random.key(3))
        assert float(metrics["finite"][0]) == 1
        out[name] = float(metrics["loss"][0]), flat(start) - flat(new.params), new.loss_state
    return out


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(step, "forward", attend64)
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("key", groups(), ids=lambda key: ("lists-" if key[0] else "") + "-".join(key[1:]))
def test_micro_batches_give_the_whole_step(key, exact):
    names, ragged = tuple(groups()[key]), key[0]
    whole = moves(names, 1, ragged)
    for accumulation in (2, 4) if key[1:] == ("logps", "ref_logps") else (4,):
        parts = moves(names, accumulation, ragged)
        for name in names:
            (value, gradient, state), (again, other, state_again) = whole[name], parts[name]
            assert np.linalg.norm(gradient) > 1e-7, name
            np.testing.assert_allclose(again, value, rtol=1e-9, err_msg=name)
            apart = np.linalg.norm(other - gradient)
            assert apart <= 1e-9 * np.linalg.norm(gradient), (name, accumulation, apart)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), state, state_again)
            if losses.get(name).info.init_state:
                before = losses.get(name).init_state()
                moved = [np.any(np.asarray(a) != b) for a, b in
                         zip(jax.tree.leaves(state[name]), jax.tree.leaves(before), strict=True)]
                assert any(moved), name
