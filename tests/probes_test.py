"""Probes: planted directions, first-order conditions, decompositions by hand, identities of every intervention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax.diagnostics import probes
from alignax.types import ConfigError, DataError

pytestmark = pytest.mark.slow

DRAWS = np.random.default_rng(0)
W = DRAWS.normal(size=6)


def normal(*shape):
    return jnp.asarray(DRAWS.normal(size=shape), jnp.float32)


def test_a_probe_is_at_the_minimum_and_finds_a_planted_direction():
    x = DRAWS.normal(size=(400, 6))
    y = (DRAWS.random(400) < 1 / (1 + np.exp(-(3 * x @ W + 0.5)))).astype(float)
    found = probes.fit_probe(x, y, decay=0.01)
    p = 1 / (1 + np.exp(-found.logits(x)))
    np.testing.assert_allclose((p - y) @ x / 400 + 0.01 * found.weight, 0, atol=1e-6)
    assert abs(np.mean(p - y)) < 1e-6  # the bias is not decayed
    assert found.weight @ W / np.linalg.norm(found.weight) / np.linalg.norm(W) > 0.97
    clear = (x @ W > 0).astype(float)
    assert probes.fit_probe(x, clear, decay=1e-6).accuracy(x, clear) == 1.0
    held = DRAWS.normal(size=(2000, 6))
    shuffled = probes.fit_probe(x, DRAWS.permutation(clear))
    # Nothing to find: a weight of sampling noise (6 entries of about 2 / sqrt(400)), and chance on held-out labels.
    assert np.linalg.norm(shuffled.weight) < 0.6
    assert abs(shuffled.accuracy(held, DRAWS.random(2000) < 0.5) - 0.5) < 0.04


def test_probe_refusals():
    x = np.ones((3, 2))
    with pytest.raises(DataError, match="both present"):
        probes.fit_probe(x, [1, 1, 1])
    with pytest.raises(DataError, match="not finite"):
        probes.fit_probe(x * np.nan, [0, 1, 1])
    with pytest.raises(ConfigError, match=r"decay=\): found 0"):
        probes.fit_probe(x, [0, 1, 1], decay=0)


def test_principal_direction_of_planted_differences():
    """Separable answers give 100%; a constant per question changes nothing; shuffled answers give chance."""
    states = DRAWS.normal(size=(600, 4, 6))
    answers = DRAWS.integers(0, 4, 600)
    unit = W / np.linalg.norm(W)
    states -= (states @ unit)[..., None] * unit
    states[np.arange(600), answers] += 4 * unit
    pick = lambda s, a, shift=0: s[np.arange(300), (a[:300] + shift) % 4]
    fit = lambda s, a: probes.principal_direction(pick(s, a), pick(s, a, 1))
    direction = fit(states, answers)
    np.testing.assert_allclose(direction @ unit, 1, atol=0.02)
    assert probes.choice_accuracy(states[300:], direction, answers[300:]) == 1.0
    moved = states + DRAWS.normal(size=(600, 1, 6)) * 10
    np.testing.assert_allclose(fit(moved, answers), direction, atol=1e-10)
    assert probes.choice_accuracy(moved[300:], direction, answers[300:]) == 1.0
    # Labels drawn anew on states without a signal: chance is 1/4, three standard errors of 300 are .075.
    noise, wrong = DRAWS.normal(size=(600, 4, 6)), DRAWS.integers(0, 4, 600)
    assert abs(probes.choice_accuracy(noise[300:], fit(noise, wrong), wrong[300:]) - 0.25) < 0.075
    with pytest.raises(DataError, match="not all 0"):
        probes.principal_direction(np.ones((2, 3)), np.ones((2, 3)))


def test_decomposition_by_hand():
    """(3, 4) on (0, 2): 4 along, (3, 0) across, 16/25 of the square."""
    found = probes.decompose(jnp.asarray([[3.0, 4.0], [0.0, 0.0]]), jnp.asarray([0.0, 2.0]))
    np.testing.assert_allclose(found.along, [4, 0])
    np.testing.assert_allclose(found.across, [[3, 0], [0, 0]])
    np.testing.assert_allclose(found.share, [0.64, 0], rtol=1e-6)
    change, direction = normal(5, 6), normal(6)
    split = probes.decompose(change, direction)
    unit = direction / jnp.linalg.norm(direction)
    np.testing.assert_allclose(jnp.outer(split.along, unit) + split.across, change, atol=1e-5)
    np.testing.assert_allclose(split.across @ direction, np.zeros(5), atol=1e-5)


def test_value_vectors_rank_by_cosine():
    values = jnp.asarray([[1.0, 0.0], [5.0, 5.0], [-1.0, 0.0], [0.0, 0.0], [0.1, 0.01]])
    direction = jnp.asarray([2.0, 0.0])
    np.testing.assert_allclose(probes.cosines(values, direction)[:4], [1, 0.5 ** 0.5, -1, 0], rtol=1e-6)
    np.testing.assert_array_equal(probes.top_values(values, direction, 3), [0, 4, 1])
    np.testing.assert_array_equal(probes.top_values(values, 7 * direction, 3), [0, 4, 1])
    top = probes.value_directions(jnp.asarray([[3.0, 0.0], [9.0, 0.0], [0.0, 1.0]]))
    np.testing.assert_allclose(np.abs(top), np.eye(2), atol=1e-6)  # norms do not count, numbers do


def test_projections_sum_to_what_the_layer_writes():
    m, values, bias, direction = normal(7), normal(7, 6), normal(6), normal(6)
    output = m @ values + bias
    unit = direction / jnp.linalg.norm(direction)
    found = probes.neuron_projections(m, values, direction)
    np.testing.assert_allclose(found.sum() + bias @ unit, output @ unit, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(probes.neuron_projections(jnp.asarray([2.0]), jnp.asarray([[3.0, 4.0]]),
                                                         jnp.asarray([0.0, 5.0])), [8.0])


def test_groups_are_disjoint_and_reduce():
    before, after, values, direction = normal(200), normal(200), normal(200, 6), normal(6)
    groups = probes.neuron_groups(before, after, values, direction)
    drop = (probes.neuron_projections(before, values, direction)
            - probes.neuron_projections(after, values, direction))
    members = np.sum([np.asarray(group) for group in groups.values()], 0)
    assert members.max() == 1 and all(group.any() for group in groups.values())
    np.testing.assert_array_equal(members == 1, np.asarray(drop) > 0)
    # One neuron of each kind along v = +1, +1, -1, -1.
    signs = jnp.asarray([[1.0], [1.0], [-1.0], [-1.0]])
    one = probes.neuron_groups(jnp.asarray([1.0, -1.0, 1.0, -1.0]), jnp.asarray([0.5, -2.0, 2.0, -0.5]), signs,
                               jnp.asarray([1.0]))
    assert [int(np.flatnonzero(one[name])[0]) for name in probes.GROUPS] == [0, 1, 2, 3]
    # Patching all groups takes away their reductions and nothing else.
    patched = probes.patch(before, jnp.asarray(members == 1), after)
    np.testing.assert_allclose(probes.neuron_projections(patched, values, direction).sum(),
                               probes.neuron_projections(before, values, direction).sum()
                               - jnp.where(drop > 0, drop, 0).sum(), rtol=1e-4, atol=1e-4)


def test_interventions_have_their_identities():
    states, activations, keys = normal(2, 3, 6), normal(2, 3, 7), normal(6, 7)
    chosen = jnp.arange(7) % 2 == 0
    same = np.testing.assert_array_equal
    same(probes.steer(states, states[0, 0], 0.0), states)
    same(probes.patch(activations, chosen, activations), activations)
    same(probes.scale_keys(keys, chosen, 1.0), keys)
    scaled = probes.scale_keys(keys, chosen, 10.0)
    np.testing.assert_allclose((states @ scaled)[..., 0], 10 * (states @ keys)[..., 0], rtol=1e-4, atol=1e-5)
    same(scaled[:, 1], keys[:, 1])
    patched = probes.patch(activations, chosen, jnp.arange(7.0))
    same(patched[..., 2], np.full((2, 3), 2.0))
    same(patched[..., 1], activations[..., 1])
    np.testing.assert_allclose(probes.steer(jnp.asarray([1.0, 2.0]), jnp.asarray([1.0, -1.0]), 0.5), [0.5, 2.5])


def test_extrapolation_of_the_difference():
    start, aligned = {"w": normal(3, 2), "b": normal(2)}, {"w": normal(3, 2), "b": normal(2)}
    jax.tree.map(np.testing.assert_array_equal, probes.extrapolate(start, aligned, 0.0), aligned)
    back = probes.extrapolate(start, aligned, -1.0)
    soup = jax.tree.map(lambda s, a: 0.3 * s + 0.7 * a, start, aligned)
    inside = probes.extrapolate(start, aligned, -0.3)
    for name in start:
        np.testing.assert_allclose(back[name], start[name], atol=1e-6)
        np.testing.assert_allclose(inside[name], soup[name], atol=1e-6)
    beyond = probes.extrapolate(jnp.asarray([1.0]), jnp.asarray([2.0]), 0.5)
    np.testing.assert_allclose(beyond, [2.5])
    half = probes.extrapolate(jnp.ones(1, jnp.bfloat16), jnp.full(1, 2, jnp.bfloat16), 0.5)
    assert half.dtype == jnp.bfloat16 and half[0] == 2.5
