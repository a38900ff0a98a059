"""The chunked head against a float64 oracle, and the leaf maths against closed forms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from alignax.ops import kl, links, reductions
from alignax.ops.head import STATS, Head, head_stats
from alignax.types import ConfigError, Term, Terms

B, K, L, D, V = 2, 2, 5, 3, 11
WHOLE, BY_LENGTH, BY_VOCAB = 10**9, B * K * V * 4 * 2 * 2, B * K * 4 * 2 * 4  # everything | l = 2 | 4 columns
SLOT = B * K * V * 4 * 2


def _case(bias=True, softcap=None, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    make = lambda *shape: rng.normal(size=shape).astype(dtype)
    head = Head(2 * make(V, D), make(V) if bias else None, softcap)
    other = Head(2 * make(V, D + 1), None, softcap)
    return make(B, K, L, D), head, rng.integers(0, V, (B, K, L)), (make(B, K, L, D + 1), other)


def _oracle_logits(hidden, head, temperature):
    z = np.asarray(hidden, np.float64) @ np.asarray(head.weight, np.float64).T
    z = z if head.bias is None else z + np.asarray(head.bias, np.float64)
    z = z if head.softcap is None else head.softcap * np.tanh(z / head.softcap)
    return z / temperature


def _oracle(hidden, head, targets, other, temperature):
    """Each statistic from its definition, float64 numpy."""
    z = _oracle_logits(hidden, head, temperature)
    p = scipy.special.softmax(z, -1)
    q = scipy.special.softmax(_oracle_logits(*other, temperature), -1)
    return {
        "logp": np.log(np.take_along_axis(p, targets[..., None], -1)[..., 0]),
        "entropy": -(p * np.log(p)).sum(-1),
        "log_sum_sq": np.log((p**2).sum(-1)),
        "log_z": np.log(np.exp(z).sum(-1)),
        "max_logit": z.max(-1),
        "kl_other_policy": (q * np.log(q / p)).sum(-1),
        "kl_policy_other": (p * np.log(p / q)).sum(-1),
    }


def _naive(hidden, head, targets, other, temperature):
    """The same with jax on full logits, for gradients."""
    def logits(h, head):
        z = jnp.einsum("bkld,vd->bklv", h, head.weight, precision="highest")
        z = z if head.bias is None else z + head.bias[None, None, None]
        return (z if head.softcap is None else head.softcap * jnp.tanh(z / head.softcap)) / temperature
    z = logits(hidden, head)
    p, q = jax.nn.softmax(z), jax.nn.softmax(logits(*other))
    return {
        "logp": jnp.log(jnp.take_along_axis(p, targets[..., None], -1)[..., 0]),
        "entropy": -(p * jnp.log(p)).sum(-1),
        "log_sum_sq": jnp.log((p**2).sum(-1)),
        "log_z": jnp.log(jnp.exp(z).sum(-1)),
        "max_logit": z.max(-1),
        "kl_other_policy": (q * jnp.log(q / p)).sum(-1),
        "kl_policy_other": (p * jnp.log(p / q)).sum(-1),
    }


@pytest.mark.parametrize("budget", [WHOLE, BY_LENGTH, BY_VOCAB])
@pytest.mark.parametrize("bias, softcap", [(True, None), (False, 2.0)])
def test_head_stats_equal_the_definitions(budget, bias, softcap):
    hidden, head, targets, other = _case(bias, softcap)
    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (hidden, head, other))
    got = head_stats(single[0], single[1], jnp.asarray(targets), want=STATS, other=single[2], temperature=0.7,
                     byte_budget=budget)
    for name, value in _oracle(hidden, head, targets, other, 0.7).items():
        assert got[name].dtype == jnp.float32 and got[name].shape == (B, K, L)
        np.testing.assert_allclose(got[name], value, atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("budget", [WHOLE, BY_LENGTH, BY_VOCAB])
def test_head_gradients_equal_those_of_the_naive_route(budget):
    hidden, head, targets, other = jax.tree.map(jnp.asarray, _case(True, 3.0, np.float32, seed=1))
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(len(STATS), B, K, L)), jnp.float32)

    def total(route, arguments):
        hidden, head, other, temperature = arguments
        stats = route(hidden, head, other, temperature)
        return sum(jnp.sum(w * stats[name]) for w, name in zip(weights, STATS, strict=True))

    ours = lambda h, head, other, t: head_stats(h, head, targets, want=STATS, other=other, temperature=t,
                                                byte_budget=budget)
    naive = lambda h, head, other, t: _naive(h, head, targets, other, t)
    arguments = (hidden, head, other, jnp.float32(0.8))
    got = jax.jit(jax.grad(functools.partial(total, ours)))(arguments)
    expected = jax.jit(jax.grad(functools.partial(total, naive)))(arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), got, expected)


def test_tied_embedding_collects_both_gradients():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(V, D)), jnp.float32)
    tokens = jnp.arange(B * K * L).reshape(B, K, L) % V

    def loss(table, budget):
        return head_stats(table[tokens], Head(table), tokens, byte_budget=budget)["logp"].sum()

    def naive(table):
        return jnp.take_along_axis(jax.nn.log_softmax(table[tokens] @ table.T), tokens[..., None], -1).sum()

    expected = jax.grad(naive)(table)
    for budget in (WHOLE, SLOT // 2):
        np.testing.assert_allclose(jax.grad(loss)(table, budget), expected, atol=2e-5)


@pytest.mark.parametrize("budget", [WHOLE, BY_LENGTH, BY_VOCAB])
def test_equal_distributions_have_zero_kl_and_zero_gradient(budget):
    hidden, head, targets, _ = jax.tree.map(jnp.asarray, _case(dtype=np.float32))

    def kls(h):
        return head_stats(h, head, targets, want=STATS[-2:], other=(hidden, head), byte_budget=budget)

    for name, value in kls(hidden).items():
        np.testing.assert_array_equal(value, jnp.zeros_like(value), err_msg=name)
    gradient = jax.grad(lambda h: sum(v.sum() for v in kls(h).values()))(hidden)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_chunked_logits_never_exist_whole():
    """No full [B,K,L,V] array is traced, forward or backward; the chunk that the budget allows is."""
    hidden, head, targets, other = jax.tree.map(jnp.asarray, _case(dtype=np.float32))
    for budget, columns in ((BY_LENGTH, 2 * V), (BY_VOCAB, 4)):
        jaxpr = str(jax.make_jaxpr(jax.grad(lambda h, budget=budget: head_stats(
            h, head, targets, want=STATS, other=other, byte_budget=budget)["entropy"].sum()))(hidden))
        assert f"[{B},{K},{L},{V}]" not in jaxpr
        shape = f"[{B},{K},2,{V}]" if columns == 2 * V else f"[{B},{K},1,4]"
        assert shape in jaxpr


def test_bfloat16_inputs_are_accumulated_in_float32():
    hidden, head, targets, other = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.bfloat16) if np.issubdtype(np.asarray(x).dtype, np.floating) else jnp.asarray(x),
        _case(dtype=np.float32))
    exact = _oracle(hidden, head, np.asarray(targets), other, 1.0)
    got = head_stats(hidden, head, targets, want=STATS, other=other, byte_budget=BY_LENGTH)
    for name, value in exact.items():
        assert got[name].dtype == jnp.float32
        np.testing.assert_allclose(got[name], value, atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("budget", [WHOLE, BY_VOCAB])
def test_extreme_logits_stay_finite(budget):
    hidden, head, targets, other = jax.tree.map(jnp.asarray, _case(dtype=np.float32))
    loud = dataclasses.replace(head, weight=1e3 * head.weight)

    def total(h):
        return sum(v.sum() for v in head_stats(h, loud, targets, want=STATS, other=other, byte_budget=budget).values())

    value, gradient = jax.value_and_grad(total)(hidden)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_head_errors_name_what_is_allowed():
    hidden, head, targets, other = _case(dtype=np.float32)
    with pytest.raises(ConfigError, match="log_sum_sq"):
        head_stats(hidden, head, targets, want=("logits",))
    with pytest.raises(ConfigError, match="needs other"):
        head_stats(hidden, head, targets, want=("kl_policy_other",))
    with pytest.raises(ValueError, match=r"\[B,K,L\]"):
        head_stats(hidden, head, targets[:, :, 1:])


@pytest.mark.parametrize("budget", [WHOLE, BY_VOCAB // 2])
def test_a_target_outside_the_vocabulary_shows(budget):
    hidden, head, targets, _ = jax.tree.map(jnp.asarray, _case(dtype=np.float32))
    wrong = targets.at[0, 0, 0].set(V).at[0, 0, 1].set(-1)
    bad = np.isnan(head_stats(hidden, head, wrong, byte_budget=budget)["logp"])
    assert bad[0, 0, :2].all() and bad.sum() == 2


# ---- links

GRID = np.array([-100.0, -5.0, -0.7, -1e-3, 0.4, 3.0, 90.0], np.float32)


def test_links_equal_their_formulas():
    m = jnp.asarray(GRID[1:-1])
    e = np.exp(-np.asarray(m, np.float64))
    np.testing.assert_allclose(links.logistic(m), np.log1p(e), rtol=1e-5)
    np.testing.assert_allclose(links.smoothed(m, 0.1), 0.9 * np.log1p(e) + 0.1 * np.log1p(1 / e), rtol=1e-5)
    np.testing.assert_allclose(links.debiased(m, 0.1), (0.9 * np.log1p(e) - 0.1 * np.log1p(1 / e)) / 0.8, rtol=1e-5)
    np.testing.assert_allclose(links.hinge(m, 1.0), np.maximum(0, 1 - np.asarray(m)), rtol=1e-6)
    np.testing.assert_allclose(links.square(m, 2.0), (np.asarray(m) - 2) ** 2, rtol=1e-6)
    np.testing.assert_allclose(links.exponential(m, 10.0), e, rtol=1e-5)


def test_exponential_is_clipped_with_zero_gradient():
    value, slope = jax.vmap(jax.value_and_grad(lambda m: links.exponential(m, 2.0)))(jnp.array([-1e4, -2.0, -1.0]))
    np.testing.assert_allclose(value, np.exp([2.0, 2.0, 1.0]), rtol=1e-6)
    np.testing.assert_allclose(slope, [0, -np.exp(2.0), -np.exp(1.0)], rtol=1e-6)
    assert links.exponential_clipped(jnp.array([-3.0, -1.0]), 2.0).tolist() == [True, False]


def test_log1mexp_is_accurate_and_smooth_on_both_branches():
    x = np.array([-1e-6, -0.1, -0.693, -0.694, -5.0, -80.0, -1e4], np.float32)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(links.log1mexp(jnp.asarray(x)),
                               np.where(wide > -1, np.log(-np.expm1(wide)), np.log1p(-np.exp(wide))), rtol=1e-5)
    slope = jax.vmap(jax.grad(links.log1mexp))(jnp.asarray(x))
    np.testing.assert_allclose(slope, 1 / -np.expm1(wide) * -np.exp(wide), rtol=1e-5)


def test_log_odds_are_finite_up_to_certainty():
    s = jnp.array([-1e-6, -1e-7, 0.0, -1.0, -1e4], jnp.float32)
    value, slope = jax.vmap(jax.value_and_grad(links.log_odds_from_mean_logp))(s)
    assert np.isfinite(value).all() and np.isfinite(slope).all()
    np.testing.assert_allclose(value[0], np.float64(s[0]) - np.log(-np.expm1(np.float64(s[0]))), rtol=1e-5)
    np.testing.assert_allclose(slope[3], 1 / (1 - np.exp(-1)), rtol=1e-5)
    assert slope[2] == 0 and value[2] == value[1]


# ---- reductions

def test_masked_entries_never_leak_and_real_nans_show():
    values, weight = jnp.array([1.0, jnp.nan, 3.0, jnp.inf]), jnp.array([1, 0, 1, 0])
    assert reductions.masked_mean(values, weight) == (1 + 3) / 2
    np.testing.assert_array_equal(jax.grad(lambda v: reductions.masked_mean(v, weight))(values), [1 / 2, 0, 1 / 2, 0])
    assert reductions.masked_mean(values, jnp.zeros(4)) == 0
    assert np.isnan(reductions.masked_mean(values, jnp.ones(4)))


def test_each_reduction_divides_by_its_own_denominator():
    values = jnp.array([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])
    mask = jnp.array([[[1, 1, 1], [1, 0, 0]]], bool)
    reduce = lambda name, **k: float(reductions.reduce_term(Term(values, mask, name), **k))
    assert reduce("tokens") == (1 + 2 + 3 + 4) / 4
    assert reduce("seq_mean_token_mean") == ((1 + 2 + 3) / 3 + 4) / 2
    np.testing.assert_allclose(reduce("fixed_len"), (1 + 2 + 3 + 4) / (2 * 3))
    assert reduce("tokens", denominator=8.0) == (1 + 2 + 3 + 4) / 8
    empty = Term(values, mask & jnp.array([[[True], [False]]]), "seq_mean_token_mean")
    assert reductions.reduce_term(empty) == (1 + 2 + 3) / 3
    assert reductions.denominator(empty) == 1
    assert reductions.reduce_term(Term(jnp.float32(7.0), reduction="whole", scale=0.5)) == 3.5
    with pytest.raises(ConfigError, match="allowed: pairs"):
        reductions.reduce_term(Term(values, reduction="mean"))


def test_bare_arrays_and_terms_reduce_to_a_scalar_and_sums():
    for shape, name in (((4,), "pairs"), ((4, 2), "sequences"), ((4, 2, 3), "tokens")):
        x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
        assert reductions.as_terms(x)["loss"].reduction == name
        scalar, parts = reductions.reduce_terms(x)
        assert scalar == x.mean() and parts["loss"] == (x.sum(), x.size)
    terms = Terms({"a": Term(jnp.array([1.0, 3.0])), "b": Term(jnp.array([2.0, 6.0]), jnp.array([1.0, 3.0]), scale=.5)})
    scalar, parts = reductions.reduce_terms(terms)
    assert scalar == (1 + 3) / 2 + 0.5 * (2 + 18) / 4 and parts["b"] == (2 + 18, 4)
    halves = [reductions.reduce_terms({"a": Term(jnp.array([x]))}, {"a": 2.0})[0] for x in (1.0, 3.0)]
    assert sum(halves) == (1 + 3) / 2
    with pytest.raises(ConfigError, match="bare array"):
        reductions.reduce_terms(jnp.float32(1.0))


# ---- KL

def test_kl_estimators_agree_with_the_exact_divergence():
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.25, 0.25])
    exact = float((p * np.log(p / q)).sum())
    logp, logq = jnp.log(jnp.asarray(p, jnp.float32)), jnp.log(jnp.asarray(q, jnp.float32))
    np.testing.assert_allclose(kl.categorical_kl(logp, logq), exact, rtol=1e-5)
    ratio = np.log(p / q)
    np.testing.assert_allclose((p * kl.k1(ratio)).sum(), exact, rtol=1e-5)
    np.testing.assert_allclose((p * kl.k3(jnp.asarray(ratio))).sum(), exact, rtol=1e-5)
    np.testing.assert_allclose(kl.k2(jnp.asarray(ratio)), ratio**2 / 2, rtol=1e-5)
    assert kl.categorical_kl(jnp.array([0.0, -jnp.inf]), jnp.array([0.0, -jnp.inf])) == 0
    estimate = kl.mean_and_stderr(jnp.array([1.0, 2.0, 6.0, jnp.nan]), jnp.array([1, 1, 1, 0]))
    np.testing.assert_allclose(estimate, [3, np.std([1, 2, 6], ddof=1) / np.sqrt(3), 3], rtol=1e-6)
    assert np.isnan(kl.mean_and_stderr(jnp.array([1.0])).stderr)
