"""Influence: explicit inverse Hessians, hand-worked values, and actual leave-one-out retraining, all in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import spearmanr

from alignax.diagnostics import influence
from alignax.types import ConfigError

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):
        yield


N, WIDTH, DECAY = 24, 3, 0.05
_DRAWS = np.random.default_rng(0)
X = _DRAWS.normal(size=(N, WIDTH)) * [1.0, 1.5, 0.5]
Y = X @ [1.0, -0.5, 2.0] + 0.5 * _DRAWS.normal(size=N)
QUERY_X, QUERY_Y = _DRAWS.normal(size=WIDTH), 0.7


def squared(params, example):
    """Half the squared error plus the ridge's penalty, of one example."""
    w = jnp.concatenate([params["a"], params["b"]])
    return 0.5 * (example["y"] - example["x"] @ w) ** 2 + DECAY / 2 * (w ** 2).sum()


def ridge(x, y):
    """The minimiser of the mean of `squared`, in closed form."""
    return np.linalg.solve(x.T @ x / len(y) + DECAY * np.eye(WIDTH), x.T @ y / len(y))


def query_loss(w):
    return 0.5 * (QUERY_Y - QUERY_X @ w) ** 2


@pytest.fixture(scope="module")
def problem():
    """(params, per-example gradients [n] trees, query gradient, explicit Hessian) at the ridge's minimiser."""
    w = ridge(X, Y)
    params = {"a": jnp.asarray(w[:1]), "b": jnp.asarray(w[1:])}
    grads = jax.jit(lambda p: influence.gradients(squared, p, {"x": jnp.asarray(X), "y": jnp.asarray(Y)}))(params)
    v = (QUERY_X @ w - QUERY_Y) * QUERY_X
    query = {"a": jnp.asarray(v[:1]), "b": jnp.asarray(v[1:])}
    return params, grads, query, X.T @ X / N + DECAY * np.eye(WIDTH)


def left_out():
    """Actual change of the query loss when each example is left out and the ridge is fitted anew."""
    full = query_loss(ridge(X, Y))
    return np.array([query_loss(ridge(np.delete(X, k, 0), np.delete(Y, k))) - full for k in range(N)])


def test_gradients_are_those_of_each_example(problem):
    params, grads, _, _ = problem
    w = np.concatenate([params["a"], params["b"]])
    by_hand = (X @ w - Y)[:, None] * X + DECAY * w
    np.testing.assert_allclose(influence.rows(grads), by_hand, rtol=1e-12)
    batched = influence.gradients(squared, params, {"x": jnp.asarray(X), "y": jnp.asarray(Y)}, batch=5,
                                  transform=lambda g: g["b"].sum())
    np.testing.assert_allclose(batched, by_hand[:, 1:].sum(1), rtol=1e-12)
    assert influence.wide(jnp.zeros(1, jnp.bfloat16)).dtype == jnp.float32


def test_solvers_equal_the_explicit_inverse(problem):
    params, grads, query, hessian = problem
    objective = lambda p: jax.vmap(squared, (None, 0))(p, {"x": jnp.asarray(X), "y": jnp.asarray(Y)}).mean()
    product = influence.hessian_product(objective, params)
    v = np.concatenate([query["a"], query["b"]])
    expected = -np.asarray(influence.rows(grads)) @ np.linalg.solve(hessian + 0.2 * np.eye(WIDTH), v)
    cg = influence.conjugate_gradients(product, query, damping=0.2, tolerance=1e-12)
    series = influence.lissa(product, query, damping=0.2, scale=4.0, iterations=400)
    for found in (cg, series):
        assert found.residual < 1e-9
        np.testing.assert_allclose(influence.influence(grads, found.vector), expected, rtol=1e-8, atol=1e-10)
    short = influence.conjugate_gradients(product, query, damping=0.2, iterations=1)
    assert short.residual > 1e-3  # a solver that did not arrive says so


def test_leaving_one_out_of_a_ridge(problem):
    """Exact influence against retraining, and the approximations' rank correlations with it.

    Measured: exact .998, empirical Fisher .92, DataInf .83, no inverse at all .65; each is bounded somewhat below.
    """
    _, grads, query, hessian = problem
    actual = left_out()
    v = np.concatenate([query["a"], query["b"]])
    solved = np.linalg.solve(hessian, v)
    exact = influence.removal(influence.influence(grads, {"a": solved[:1], "b": solved[1:]}), N)
    assert np.corrcoef(exact, actual)[0, 1] > 0.9
    assert spearmanr(exact, actual).statistic > 0.95
    # To first order also in size: an example out of 24 of a ridge changes little else.
    assert 0.7 < (exact @ actual) / (exact @ exact) < 1.4
    rank = lambda scores: float(spearmanr(influence.removal(scores, N), actual).statistic)
    assert rank(influence.fisher(grads, query)) > 0.85
    assert rank(influence.datainf(grads, query)) > 0.75
    assert rank(influence.influence(grads, query)) > 0.55


def test_leaving_one_out_of_preferences():
    """A Bradley-Terry model on 16 pairs, trained anew without each: the order of the actual effects is found."""
    draws = np.random.default_rng(3)
    features = draws.normal(size=(16, 3))
    flips = np.where(draws.random(16) < 0.2, -1.0, 1.0)
    features = features * np.sign(features @ [1.0, -1.0, 0.5])[:, None] * flips[:, None]
    query = np.array([0.5, -1.0, 1.0])

    def fit(x):
        w = np.zeros(3)
        for _ in range(30):
            p = 1 / (1 + np.exp(x @ w))
            hessian = (x.T * (p * (1 - p))) @ x / len(x) + 0.1 * np.eye(3)
            w = w - np.linalg.solve(hessian, -(p @ x) / len(x) + 0.1 * w)
        return w

    loss = lambda w, x: -jax.nn.log_sigmoid(x @ w) + 0.05 * (w ** 2).sum()
    ask = lambda w: np.log1p(np.exp(-query @ w))
    w = fit(features)
    actual = np.array([ask(fit(np.delete(features, k, 0))) - ask(w) for k in range(16)])
    x = jnp.asarray(features)
    grads = influence.gradients(loss, jnp.asarray(w), x)
    assert float(jnp.abs(grads.mean(0)).max()) < 1e-10  # at the minimum
    v = jax.grad(lambda w: -jax.nn.log_sigmoid(jnp.asarray(query) @ w))(jnp.asarray(w))
    product = influence.hessian_product(lambda w: jax.vmap(loss, (None, 0))(w, x).mean(), jnp.asarray(w))
    solved = influence.conjugate_gradients(product, v, tolerance=1e-12).vector
    scores = influence.removal(influence.influence(grads, solved), 16)
    assert spearmanr(scores, actual).statistic > 0.95
    assert np.corrcoef(scores, actual)[0, 1] > 0.9


def test_an_example_supports_itself(problem):
    _, grads, _, _ = problem
    own = jax.tree.map(lambda g: g[4], grads)
    assert influence.fisher(grads, own)[4] < 0 and influence.datainf(grads, own)[4] < 0
    assert influence.tracin([grads], [own], [0.1])[4] > 0


def test_datainf_is_exact_for_one_example():
    draws = np.random.default_rng(1)
    grads = {"a": jnp.asarray(draws.normal(size=(1, 2, 3))), "b": jnp.asarray(draws.normal(size=(1, 4)))}
    query = {"a": jnp.asarray(draws.normal(size=(2, 3))), "b": jnp.asarray(draws.normal(size=4))}
    expected = 0.0
    for name in grads:
        g, v = np.asarray(grads[name]).reshape(-1), np.asarray(query[name]).reshape(-1)
        expected -= g @ np.linalg.solve(np.outer(g, g) + 0.1 * (g ** 2).mean() * np.eye(g.size), v)
    np.testing.assert_allclose(influence.datainf(grads, query), [expected], rtol=1e-10)
    np.testing.assert_allclose(influence.fisher(grads, query), [expected], rtol=1e-10)


def test_datainf_by_hand():
    """Two examples in one dimension, g = 1, 3, v = 2: damping .1 * 5 = .5, r = (2 - (2/1.5 + 18/9.5)/2) / .5."""
    r = (2 - (2 * 1 / 1.5 * 1 + 2 * 3 / 9.5 * 3) / 2) / 0.5
    found = influence.datainf(jnp.asarray([[1.0], [3.0]]), jnp.asarray([2.0]))
    np.testing.assert_allclose(found, [-r, -3 * r], rtol=1e-12)
    dead = influence.datainf({"w": jnp.asarray([[1.0], [3.0]]), "dead": jnp.zeros((2, 2))},
                             {"w": jnp.asarray([2.0]), "dead": jnp.ones(2)})
    np.testing.assert_allclose(dead, found)


def test_fisher_equals_the_explicit_inverse_of_each_layer():
    draws = np.random.default_rng(2)
    grads = {"a": jnp.asarray(draws.normal(size=(6, 4))), "b": jnp.asarray(draws.normal(size=(6, 2, 5)))}
    query = {"a": jnp.asarray(draws.normal(size=4)), "b": jnp.asarray(draws.normal(size=(2, 5)))}
    expected = np.zeros(6)
    for name in grads:
        g, v = np.asarray(grads[name]).reshape(6, -1), np.asarray(query[name]).reshape(-1)
        expected -= g @ np.linalg.solve(g.T @ g / 6 + 0.1 * (g ** 2).mean() * np.eye(v.size), v)
    np.testing.assert_allclose(influence.fisher(grads, query), expected, rtol=1e-9)
    whole = np.asarray(influence.rows(grads))
    v = np.concatenate([np.asarray(query["a"]), np.asarray(query["b"]).reshape(-1)])
    expected = -whole @ np.linalg.solve(whole.T @ whole / 6 + 0.3 * np.eye(v.size), v)
    np.testing.assert_allclose(influence.fisher(jnp.asarray(whole), jnp.asarray(v), damping=0.3), expected, rtol=1e-9)
    assert not influence.fisher(jnp.zeros((6, 2)), jnp.ones(2)).any()
    with pytest.raises(ConfigError, match=r"fisher\(damping=\): found 0"):
        influence.fisher(jnp.asarray(whole), jnp.asarray(v), damping=0)


def test_tracin_by_hand_and_identity():
    """Two checkpoints: .1 * <(1,2),(3,1)> + .2 * <(0,1),(1,-1)> = .5 - .2 = .3."""
    first, second = jnp.asarray([[1.0, 2.0]]), jnp.asarray([[0.0, 1.0]])
    queries = [jnp.asarray([3.0, 1.0]), jnp.asarray([1.0, -1.0])]
    np.testing.assert_allclose(influence.tracin([first, second], queries, [0.1, 0.2]), [0.3])
    np.testing.assert_allclose(influence.influence(first, queries[0]),
                               -influence.tracin([first], queries[:1], [1.0]))
    with pytest.raises(ConfigError, match="found 2 training, 1 query"):
        influence.tracin([first, second], queries[:1], [0.1, 0.2])


def test_ekfac_with_diagonal_factors_is_the_diagonal_gauss_newton():
    """All sign patterns of a and s at two magnitudes that go together: A and S are diagonal, Lambda is not A x S."""
    signs = np.array(np.meshgrid(*[[-1, 1]] * 4)).reshape(4, -1).T
    sizes = np.repeat([[1.0], [2.0]], 16, 0)
    a = np.tile(signs[:, :2], (2, 1)) * [1.0, 3.0] * sizes
    s = np.tile(signs[:, 2:], (2, 1)) * [2.0, 0.5] * sizes
    factors = influence.kronecker(jnp.asarray(a), jnp.asarray(s))
    v = np.array([[1.0, -2.0], [0.5, 3.0]])
    diagonal = ((s[:, :, None] * a[:, None, :]) ** 2).mean(0)
    np.testing.assert_allclose(influence.ekfac(factors, jnp.asarray(v)), v / (diagonal + 0.1 * diagonal.mean()),
                               rtol=1e-10)
    outer = np.outer((s ** 2).mean(0), (a ** 2).mean(0))
    np.testing.assert_allclose(influence.ekfac(factors, jnp.asarray(v), corrected=False),
                               v / (outer + 0.1 * outer.mean()), rtol=1e-10)
    assert not np.allclose(diagonal, outer)


def test_kfac_is_the_inverse_of_the_kronecker_product():
    draws = np.random.default_rng(4)
    a, s, v = draws.normal(size=(30, 3)), draws.normal(size=(30, 2)), draws.normal(size=(2, 3))
    full = np.kron(s.T @ s / 30, a.T @ a / 30)  # row-major [S, A]
    damping = 0.1 * np.trace(full) / 6
    expected = np.linalg.solve(full + damping * np.eye(6), v.reshape(-1)).reshape(2, 3)
    factors = influence.kronecker(jnp.asarray(a), jnp.asarray(s))
    np.testing.assert_allclose(influence.ekfac(factors, jnp.asarray(v), corrected=False), expected, rtol=1e-9)


def test_adam_direction_is_what_adam_would_do():
    """By hand with eps inside the root; and optax's step without bias correction's factors, at a tiny eps."""
    g, m, v = (jnp.asarray(x) for x in ([2.0, -1.0], [0.5, 0.5], [1.0, 4.0]))
    by_hand = [(0.9 * 0.5 + 0.2) / np.sqrt(0.999 + 0.004 + 0.1), (0.45 - 0.1) / np.sqrt(3.996 + 0.001 + 0.1)]
    np.testing.assert_allclose(influence.adam_direction(g, m, v, eps=0.1), by_hand, rtol=1e-12)
    rule = optax.scale_by_adam(eps=1e-12)
    state = rule.init(g)._replace(mu=m, nu=v, count=jnp.asarray(9))
    expected = rule.update(g, state)[0] * (1 - 0.9 ** 10) / np.sqrt(1 - 0.999 ** 10)
    np.testing.assert_allclose(influence.adam_direction(g, m, v, eps=1e-24), expected, rtol=1e-9)


def test_less_by_hand():
    """Features at 0 and 90 degrees; subtask 0 asks along both axes (mean .5 each), subtask 1 along the second."""
    features = [jnp.asarray([[2.0, 0.0], [0.0, 5.0], [0.0, 0.0]])] * 2
    queries = [jnp.asarray([[1.0, 0.0], [0.0, 3.0], [0.0, 1.0]]), jnp.asarray([[1.0, 0.0], [1.0, 0.0], [3.0, 4.0]])]
    # Rates 3 : 1. Example 0: subtask 0 .75 * .5 + .25 * 1 = .625, subtask 1 .25 * .6; example 1: subtask 1 .75 + .2.
    found = influence.less(features, queries, [0.3, 0.1], [0, 0, 1])
    np.testing.assert_allclose(found, [0.625, 0.95, 0.0], atol=1e-12)
    np.testing.assert_array_equal(influence.select(found, 0.5), [1, 0])
    with pytest.raises(ConfigError, match="one per query"):
        influence.less(features, queries, [0.3, 0.1], [0, 1])
    with pytest.raises(ConfigError, match=r"select\(share=\): found 0"):
        influence.select(found, 0)


def test_projection_keeps_inner_products():
    draws = np.random.default_rng(5)
    tree = lambda: {"a": jnp.asarray(draws.normal(size=(3, 7))), "b": jnp.asarray(draws.normal(size=20))}
    one, two = tree(), tree()
    project = jax.jit(lambda t: influence.project(t, jax.random.key(0), 4096, block=16))
    flat = lambda t: influence.rows(jax.tree.map(lambda x: x[None], t))[0]
    scale = float(jnp.linalg.norm(flat(one)) * jnp.linalg.norm(flat(two)))
    assert abs(float(project(one) @ project(two) - flat(one) @ flat(two))) < 5 * scale / 64
    np.testing.assert_allclose(project(one) @ project(one), flat(one) @ flat(one), rtol=0.15)
    both = jax.tree.map(lambda x, y: 2 * x - y, one, two)
    np.testing.assert_allclose(project(both), 2 * project(one) - project(two), atol=1e-10)


def test_features_are_projected_example_by_example(problem):
    """LESS's training features in one pass, of float32 parameters, against one example at a time."""
    params = jax.tree.map(lambda x: x.astype(jnp.float32), problem[0])
    first, second = (jax.tree.map(lambda x, c=c: jnp.full_like(x, c), params) for c in (0.1, 0.2))
    data = {"x": jnp.asarray(X[:5], jnp.float32), "y": jnp.asarray(Y[:5], jnp.float32)}
    feature = lambda g: influence.project(influence.adam_direction(g, first, second), jax.random.key(1), 8, block=2)
    found = influence.gradients(squared, params, data, transform=feature, batch=2)
    assert found.shape == (5, 8) and found.dtype == jnp.float32
    one = feature(jax.grad(squared)(params, jax.tree.map(lambda x: x[3], data)))
    np.testing.assert_allclose(found[3], one, rtol=1e-5)


def test_the_correction_at_its_start_and_its_response():
    """Reconstruction of LANCET: log 2 at the start, nothing else; its pull lowers what harms most."""
    start = {"w": jnp.asarray([0.3, -0.2])}
    scores = jnp.asarray([2.0, -1.0, 0.5])
    x = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    ratios = lambda p: x @ (p["w"] - start["w"])
    loss = lambda p, strength: influence.influence_correction(
        0.0, p, start, ratios(p), scores, strength=strength, scale=0.1)
    np.testing.assert_allclose(loss(start, 1.0), np.log(2.0))
    np.testing.assert_allclose(loss(start, 0.0), 0.0)
    assert float(jnp.abs(jax.grad(loss)(start, 0.0)["w"]).max()) == 0
    # Pairs (i harms more than j): (0, 1), (0, 2), (2, 1); e_j - e_i at p = start + t.
    moved = {"w": start["w"] + jnp.asarray([1.0, 2.0])}
    gaps = np.array([2.0 - 1.0, 3.0 - 1.0, 2.0 - 3.0])
    np.testing.assert_allclose(loss(moved, 1.0), 0.5 * 5 + np.log1p(np.exp(-0.1 * gaps)).mean(), rtol=1e-12)
    step = jax.tree.map(lambda g: -g, jax.grad(loss)(start, 1.0))["w"]
    change = x @ step
    assert change[1] > change[0]
    equal = influence.influence_ranking_loss(jnp.zeros(3), jnp.zeros(3))
    assert float(equal) == 0


def test_the_proximal_response():
    """keep + (lam/2)|d|^2 + eps L(z): its minimiser is start - eps (G + lam)^-1 grad L + O(eps^2), here exactly."""
    hessian = jnp.asarray([[2.0, 0.5], [0.5, 1.0]])
    pull = jnp.asarray([1.0, -1.0])
    start = jnp.asarray([0.3, -0.2])
    eps, lam = 0.01, 0.4

    def objective(p):
        keep = 0.5 * (p - start) @ hessian @ (p - start)
        return influence.influence_correction(keep, p, start, jnp.zeros(2), jnp.zeros(2), proximity=lam,
                                              strength=0.0) + eps * pull @ p

    step = influence.conjugate_gradients(lambda x: hessian @ x, pull, damping=lam, tolerance=1e-12).vector
    np.testing.assert_allclose(jax.grad(objective)(start - eps * step), np.zeros(2), atol=1e-12)
