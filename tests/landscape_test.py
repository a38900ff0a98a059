"""Landscapes and distances: parabolas in closed form, a permuted network's barrier, filter norms, values by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignax.diagnostics import landscape, weights
from alignax.types import ConfigError, DataError

pytestmark = pytest.mark.slow

ALPHAS = np.linspace(-0.5, 1.5, 21)


def bowl(params):
    """A quadratic of a tree, and a second number beside it."""
    value = 0.5 * (params["w"] ** 2).sum() + params["b"].sum() ** 2
    return {"loss": value, "first": params["b"][0]}


START = {"w": jnp.asarray([[1.0, -2.0], [0.5, 0.0]]), "b": jnp.asarray([1.0, 0.5])}
END = {"w": jnp.asarray([[0.0, 1.0], [1.5, 2.0]]), "b": jnp.asarray([-1.0, 0.0])}


def test_a_line_of_a_quadratic_is_a_parabola():
    found = landscape.line(bowl, START, END, ALPHAS)
    np.testing.assert_allclose(found["loss"][5], bowl(START)["loss"], rtol=1e-6)
    np.testing.assert_allclose(found["loss"][15], bowl(END)["loss"], rtol=1e-6)
    np.testing.assert_allclose(found["first"], 1 - 2 * ALPHAS, atol=1e-6)
    # By hand: |d|^2 of w = 1 + 9 + 1 + 4, of b's sum -2.5: L'' = 15 + 2 * 6.25.
    second = np.diff(np.asarray(found["loss"], np.float64), 2) / 0.1 ** 2
    np.testing.assert_allclose(second, 27.5, rtol=1e-3)
    height = landscape.barrier(ALPHAS, found["loss"])
    assert height.height <= 1e-6 and landscape.connected(height)


def test_endpoints_are_exact_and_dtypes_stay():
    for alpha, tree in ((0, START), (1, END)):
        jax.tree.map(np.testing.assert_array_equal, landscape.interpolate(START, END, alpha), tree)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), START)
    assert landscape.interpolate(half, half, 0.3)["w"].dtype == jnp.bfloat16


def test_barrier_by_hand():
    """Ends 1 and 3, 5 at .25: the chord is 1.5 there; the 9 beyond the end does not count."""
    found = landscape.barrier([0, 0.25, 0.5, 1, 1.5], [1, 5, 2, 3, 9])
    assert found == (3.5, 0.25) and not landscape.connected(found)
    with pytest.raises(DataError, match="allowed: 0 and 1 among them"):
        landscape.barrier([0.1, 1], [1, 2])
    with pytest.raises(DataError, match=r"shapes \[2\] and \[3\]"):
        landscape.barrier([0, 1], [1, 2, 3])


def test_projection_on_the_line():
    """Start (0, 0), end (4, 0), at (3, 2): coordinate 3/4, 2 across."""
    tree = lambda x, y: {"a": jnp.asarray(x), "b": jnp.asarray(y)}
    found = landscape.onto_line(tree(3.0, 2.0), tree(0.0, 0.0), tree(4.0, 0.0))
    np.testing.assert_allclose(found, (0.75, 2.0))


def mlp(params, x):
    """A regression network of one hidden layer."""
    return jnp.tanh(x @ params["in"]) @ params["out"]


@pytest.fixture(scope="module")
def network():
    """(loss, trained parameters, the same function with hidden units permuted)."""
    draws = np.random.default_rng(0)
    x = jnp.asarray(draws.normal(size=(64, 3)), jnp.float32)
    teacher = {"in": jnp.asarray(draws.normal(size=(3, 6)), jnp.float32),
               "out": jnp.asarray(draws.normal(size=(6, 1)), jnp.float32)}
    y = mlp(teacher, x)
    permuted = {"in": teacher["in"][:, ::-1], "out": teacher["out"][::-1]}
    return lambda p: ((mlp(p, x) - y) ** 2).mean(), teacher, permuted


def test_a_permutation_makes_a_barrier_and_a_curve_goes_around(network):
    loss, start, end = network
    grid = np.linspace(0, 1, 11)
    straight = landscape.line(loss, start, end, grid)
    assert abs(float(straight[0])) < 1e-6 and abs(float(straight[-1])) < 1e-6
    high = landscape.barrier(grid, straight)
    assert high.height > 0.1 and not landscape.connected(high)
    curve = landscape.connect(loss, start, end, jax.random.key(0), steps=400, optimiser=optax.adam(3e-2))
    low = landscape.barrier(grid, landscape.along(loss, start, curve.control, end, grid))
    assert curve.losses.shape == (400,) and low.height < 0.5 * high.height
    with pytest.raises(ConfigError, match=r"connect\(steps=\): found 0"):
        landscape.connect(loss, start, end, jax.random.key(0), steps=0)


def test_bezier_by_hand():
    """t = 1/4 of 16, 0, 32: 9/16 * 16 + 0 + 1/16 * 32 = 11; a control point in the middle makes it the line."""
    point = lambda x: {"a": jnp.asarray(x)}
    np.testing.assert_allclose(landscape.bezier(point(16.0), point(0.0), point(32.0), 0.25)["a"], 11.0)
    np.testing.assert_allclose(landscape.bezier(point(16.0), point(24.0), point(32.0), 0.25)["a"], 20.0)


def test_filters_have_the_norm_of_their_weights():
    params = {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 3)), jnp.float32),
              "bias": jnp.ones(3)}
    params["kernel"] = params["kernel"].at[1, :, 2].set(0)
    norm = lambda x, axes: np.sqrt((np.asarray(x) ** 2).sum(axes))
    columns = landscape.filter_direction(jax.random.key(0), params, (0, -1))
    np.testing.assert_allclose(norm(columns["kernel"], 1), norm(params["kernel"], 1), rtol=1e-5)
    assert not columns["bias"].any() and not columns["kernel"][1, :, 2].any()
    merged = landscape.filter_direction(jax.random.key(0), params)
    np.testing.assert_allclose(norm(merged["kernel"], (0, 1)), norm(params["kernel"], (0, 1)), rtol=1e-5)
    assert not np.allclose(norm(merged["kernel"], 1), norm(params["kernel"], 1))
    rows = landscape.filter_direction(jax.random.key(0), params, lambda path, leaf: (1,))
    np.testing.assert_allclose(norm(rows["kernel"], (0, 2)), norm(params["kernel"], (0, 2)), rtol=1e-5)


def test_slices_are_the_loss_at_the_grid():
    first, second = START, END
    a, b = np.array([-1.0, 0.0]), np.array([0.0, 0.5, 1.0])
    found = landscape.slice_2d(lambda p: bowl(p)["loss"], START, first, second, a, b)
    by_hand = [[float(bowl(jax.tree.map(lambda s, f, g, x=x, y=y: s + x * f + y * g, START, first, second))["loss"])
                for y in b] for x in a]
    np.testing.assert_allclose(found, by_hand, rtol=1e-5)
    np.testing.assert_allclose(landscape.slice_1d(lambda p: bowl(p)["loss"], START, second, b), by_hand[1], rtol=1e-5)


def test_distances_by_hand():
    """diag(3, 4) to diag(3, 1): change diag(0, -3), l2 3, relative 3/5, cosine 13 / (5 sqrt 10), spectral 3."""
    before = {"layers": {"mlp": jnp.asarray([np.diag([3.0, 4.0]), np.eye(2)])}, "norm": jnp.asarray([1.0, 2.0])}
    after = {"layers": {"mlp": jnp.asarray([np.diag([3.0, 1.0]), 2 * np.eye(2)])}, "norm": jnp.asarray([1.0, 2.0])}
    found = weights.distances(before, after)
    assert list(found) == ["layers/0/mlp", "layers/1/mlp", "norm"]
    np.testing.assert_allclose(found["layers/0/mlp"], (3, 0.6, 13 / (5 * np.sqrt(10)), 3), rtol=1e-12)
    np.testing.assert_allclose(found["layers/1/mlp"], (np.sqrt(2), 1, 1, 1), rtol=1e-12)
    np.testing.assert_allclose(found["norm"], (0, 0, 1, np.nan))
    # All together: 9 + 2 of change, 25 + 2 + 5 of weights; inner product 13 + 4 + 5, after 10 + 8 + 5.
    whole = weights.distances(before, after, group=lambda path: "all")["all"]
    np.testing.assert_allclose(whole, (np.sqrt(11), np.sqrt(11 / 32), 22 / np.sqrt(32 * 23), 3), rtol=1e-12)
    layers = weights.distances(before, after, group=weights.by_layer)
    assert list(layers) == ["layers/0", "layers/1", "norm"]


def test_distances_of_equal_and_zero_weights():
    same = weights.distances(START, START)
    assert all(found.l2 == 0 and found.relative == 0 for found in same.values())
    np.testing.assert_allclose([found.cosine for found in same.values()], 1)
    zero = weights.distances({"w": np.zeros((2, 2))}, {"w": np.ones((2, 2))})["w"]
    assert zero.l2 == 2 and np.isinf(zero.relative) and np.isnan(zero.cosine) and zero.spectral == pytest.approx(2)
    with pytest.raises(ConfigError, match="b"):
        weights.distances(START, {"w": START["w"]})
    with pytest.raises(ConfigError, match=r"w: found shapes \[2, 2\] and \[4\]"):
        weights.distances(START, {**START, "w": START["w"].reshape(-1)})
