"""Golden values and published facts, per method.

The toy pair: S = (-10, -12), R = (-11, -11.5), n = (5, 8), so lr = (1, -0.5) and D = 1.5. Digits at the right are the
catalogue's; the arithmetic beside them is ours, so that a wrong digit on either side shows.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import losses
from alignax.ops.reductions import reduce_terms
from alignax.types import ConfigError

S, R, N = jnp.array([[-10.0, -12.0]]), jnp.array([[-11.0, -11.5]]), jnp.array([[5.0, 8.0]])
LW, LL, D = 1.0, -0.5, 1.5
ALL = jnp.ones((1, 2), bool)


def sp(z):
    return math.log1p(math.exp(z))


def sig(z):
    return 1 / (1 + math.exp(-z))


def odds(mean):
    return math.log(math.exp(mean) / (1 - math.exp(mean)))


def value(result):
    return float(reduce_terms(result)[0])


PW, PL = -10 / 5, -12 / 8
GOLDEN = [
    ("dpo", losses.dpo(S, R), sp(-0.1 * D), 0.620957),
    ("cdpo", losses.cdpo(S, R), 0.9 * sp(-0.1 * D) + 0.1 * sp(0.1 * D), 0.635957),
    ("robust_dpo", losses.robust_dpo(S, R), (0.9 * sp(-0.15) - 0.1 * sp(0.15)) / 0.8, 0.602207),
    ("ipo", losses.ipo(S, R, N), (D - 1 / 0.2) ** 2, 12.25),
    ("ipo averaged", losses.ipo(S, R, N, length_average=True), (LW / 5 - LL / 8 - 1 / 0.2) ** 2, 22.443906),
    ("slic_hf", losses.slic_hf(S), max(0, 1 - 2) + 0.1 * 10, 1.0),
    ("ln_dpo", losses.ln_dpo(S, R, N, beta=0.1), sp(-0.1 * (LW / 5 - LL / 8)), 0.680108),
    ("simpo", losses.simpo(S, N, beta=2.5, gamma=1.375), sp(-(2.5 * (PW - PL) - 1.375)), 2.694936),
    ("alpha_po", losses.alpha_po(S, N, beta=2.5, gamma=0.25, alpha=0.25),
     sp(-(2.5 * (math.exp(-0.25 * PL) - math.exp(-0.25 * PW)) / 0.25 - 0.25)), 2.293656),
    ("odpo", losses.odpo(S, R, jnp.array([[3.0, 1.0]])), sp(-(0.15 - math.log(3 - 1))), 1.001152),
    ("odpo half", losses.odpo(S, R, jnp.array([[3.0, 1.0]]), alpha=0.5), sp(-(0.15 - 0.5 * math.log(2))), 0.796256),
    ("h_dpo", losses.h_dpo(S, R, beta=0.1, alpha=0.9), sp(-(0.9 * 0.1 * 2 - 0.1 * 0.5)), 0.630258),
    ("dpo_shift", losses.dpo_shift(S, R, beta=0.1), sp(-(0.1 * LW - 0.95 * 0.1 * LL)), 0.622114),
    ("flex_dpo", losses.flex_dpo(S, R), sp(-(0.1 * LW - 0.08 * LL)), 0.625595),
    ("sft_dpo", losses.sft_dpo(S, R, gamma=0.01), sp(-0.15) + 0.01 * 10, None),
    ("r_dpo", losses.r_dpo(S, R, N), sp(-(0.15 + 0.02 * (5 - 8))), 0.649159),
    ("rpo average", losses.rpo(S, R, N, beta=0.1), sp(-0.15) + 0.2 * 10 / 5, 1.020957),
    ("rpo cumulative", losses.rpo(S, R, N, beta=0.1, eta=0.005, form="cumulative"), sp(-0.15) + 0.005 * 0.1 * 10,
     0.625957),
    ("cpo", losses.cpo(S, N), sp(-0.1 * 2) + 10 / 5, 2.598139),
    ("cpo paper", losses.cpo(S, N, nll="sequences"), sp(-0.1 * 2) + 10, None),
    ("orpo", losses.orpo(S, N), 10 / 5 + 0.1 * sp(-(odds(PW) - odds(PL))), 2.104206),
    ("asft", losses.asft(S, N), -1.1 * PW - 0.1 * math.log(1 - math.exp(PL)), 2.225248),
    ("nca pair", losses.nca(S, R, jnp.array([[1.0, 0.0]]), ALL, beta=0.1),
     sp(-0.1) + 0.5 * sp(0.1) + 0.5 * sp(-0.05), 1.350825),
    ("exo", losses.exo(S, R), sig(0.15) * (math.log(sig(0.15)) - math.log(0.999))
     + sig(-0.15) * (math.log(sig(-0.15)) - math.log(0.001)), 2.505517),
    ("apo_zero", losses.apo_zero(S, R), 1 - sig(0.1 * LW) + sig(0.1 * LL), 0.962523),
    ("apo_down", losses.apo_down(S, R), sig(0.1 * LW) + 1 - sig(0.15), 0.987549),
    ("kto summed", 2 * value(losses.kto(S, R, jnp.array([[1.0, 0.0]]), ALL, R, R)), 1 - sig(0.1) + sig(-0.05),
     0.962523),
    ("dpop", losses.dpop(S, R, beta=0.1), sp(-0.15), 0.620957),
    ("dpop falling", losses.dpop(S[:, ::-1], R[:, ::-1], beta=0.1, penalty=5.0), sp(-0.1 * (-D - 5 * 0.5)), 0.913015),
    ("f_dpo forward", losses.f_dpo(S, R), sp(-0.1 * (math.exp(0.5) - math.exp(-1))), 0.631154),
    ("f_dpo js", losses.f_dpo(S, R, divergence="js"), sp(-0.1 * (sp(0.5) - sp(-1))), 0.660652),
    ("f_dpo alpha", losses.f_dpo(S, R, divergence="alpha"),
     sp(-0.1 * (math.exp(0.25) - math.exp(-0.5)) / 0.5), 0.627691),
    ("cal_dpo", losses.cal_dpo(S, R, beta=0.1), sp(-D) + (LW - 5) ** 2 + (LL + 5) ** 2, 36.451413),
    ("discopop", losses.discopop(S, R, beta=0.1, tau=0.05),
     (1 - sig(3)) * sp(-0.15) + sig(3) * math.exp(-0.15), 0.849338),
    ("npo", losses.npo(S, R, jnp.array([[1.0, 0.0]]), ALL, N, retain_weight=0.0), 2 / 0.1 * sp(0.1 * LL), 13.369193),
]


@pytest.mark.parametrize("name, result, arithmetic, digits", GOLDEN, ids=[g[0] for g in GOLDEN])
def test_golden_value(name, result, arithmetic, digits):
    got = result if isinstance(result, float) else value(result)
    np.testing.assert_allclose(got, arithmetic, rtol=2e-6)
    if digits is not None:
        np.testing.assert_allclose(arithmetic, digits, atol=1e-6)


RATIOS = jnp.array([[1.0, -0.5], [-0.2, 0.3], [0.5, 0.0]])
ZERO = jnp.zeros_like


@pytest.mark.parametrize("name", ["dpo", "robust_dpo", "h_dpo", "dpo_shift", "flex_dpo", "dpop", "f_dpo", "aot"])
def test_policy_equal_to_reference_costs_log_two(name):
    loss = losses.get(name, alpha=1.0) if name == "h_dpo" else losses.get(name)
    np.testing.assert_allclose(value(loss({"logps": R, "ref_logps": R})), math.log(2), rtol=1e-6)


def test_dpo_gradient_and_prompt_invariance():
    gradient = jax.grad(lambda s: value_of(losses.dpo(s, R)))(S)
    np.testing.assert_allclose(gradient, [[-0.1 * sig(-0.15), 0.1 * sig(-0.15)]], rtol=1e-5)
    np.testing.assert_allclose(losses.dpo(S, R + 3.0), losses.dpo(S, R), rtol=1e-5)
    np.testing.assert_array_equal(jax.grad(lambda r: value_of(losses.dpo(S, r)))(R), ZERO(R))


def value_of(result):
    return reduce_terms(result)[0]


def test_odpo_offsets_and_what_has_none():
    three = lambda scores, **k: losses.odpo(jnp.tile(S, (3, 1)), jnp.tile(R, (3, 1)), jnp.array(scores), **k)
    mixed = three([[3.0, 1.0], [1.0, 1.0], [0.0, 2.0]])
    np.testing.assert_allclose(value(mixed), sp(-(0.15 - math.log(2))), rtol=1e-6)
    assert mixed.metrics["dropped"] == (2, 3)
    slope = jax.grad(lambda s: value_of(losses.odpo(s, R, jnp.array([[1.0, 1.0]]))))(S)
    np.testing.assert_array_equal(slope, 0)
    ratio = three([[6.0, 2.0], [6.0, -2.0], [2.0, 6.0]], offset="ratio")
    np.testing.assert_allclose(value(ratio), sp(-(0.15 - math.log(6 / 2))), rtol=1e-6)
    assert ratio.metrics["dropped"] == (2, 3)
    # A difference below 1 makes the pair easier than in DPO.
    assert value(losses.odpo(S, R, jnp.array([[1.5, 1.0]]))) < sp(-0.15)
    with pytest.raises(ConfigError, match="'difference', 'ratio'"):
        three([[3.0, 1.0]] * 3, offset="sum")


def test_cdpo_gradient_vanishes_at_the_assumed_odds():
    margin = math.log(0.9 / 0.1) / 0.1
    at = lambda m: float(jax.grad(lambda s: value_of(losses.cdpo(s, ZERO(S))))(jnp.array([[m, 0.0]]))[0, 0])
    assert abs(at(margin)) < 1e-8 and at(margin - 1) < 0 < at(margin + 1)


def test_robust_dpo_is_unbiased():
    clean, flipped = value(losses.robust_dpo(S, R)), value(losses.robust_dpo(S[:, ::-1], R[:, ::-1]))
    np.testing.assert_allclose(0.9 * clean + 0.1 * flipped, sp(-0.15), rtol=1e-6)


def test_ipo_target_and_start():
    at = ZERO(S).at[0, 0].set(1 / 0.2)
    assert value(losses.ipo(at, ZERO(S), N)) == 0
    np.testing.assert_allclose(value(losses.ipo(R, R, N)), 1 / (4 * 0.1**2), rtol=1e-6)
    np.testing.assert_allclose(value(losses.ipo(R, R, N, length_average=True)), 1 / (4 * 0.1**2), rtol=1e-6)


def test_simpo_gradient():
    gradient = jax.grad(lambda s: value_of(losses.simpo(s, N)))(S)
    margin = 2 * (PW - PL) - 0.5
    np.testing.assert_allclose(gradient[0], [-2 / 5 * sig(-margin), 2 / 8 * sig(-margin)], rtol=1e-5)


def test_alpha_po_tends_to_simpo():
    simpo = losses.simpo(S, N, beta=2.5, gamma=0.25)
    np.testing.assert_allclose(losses.alpha_po(S, N, alpha=1e-5), simpo, rtol=1e-4)
    np.testing.assert_allclose(losses.alpha_po(S, N, alpha=0.0), simpo, rtol=1e-6)
    assert np.isfinite(jax.grad(lambda a: value_of(losses.alpha_po(S, N, alpha=a)))(0.0))


def test_orpo_identity_with_asft_and_certainty():
    pw, pl = math.exp(PW), math.exp(PL)
    gap = 0.1 * math.log(pw * (1 - pl) + pl * (1 - pw))
    np.testing.assert_allclose(value(losses.orpo(S, N)), value(losses.asft(S, N)) + gap, rtol=1e-6)
    np.testing.assert_allclose(value(losses.orpo(S, N, lam=0.0)), 10 / 5)
    sure = jnp.array([[-5e-6, -12.0]])
    gradient = jax.grad(lambda s: value_of(losses.orpo(s, N)))(sure)
    assert np.isfinite(gradient).all()


def test_orpo_nll_is_a_token_mean_over_the_batch():
    logps, lengths = jnp.array([[-10.0, -1.0], [-3.0, -1.0]]), jnp.array([[5.0, 1.0], [1.0, 1.0]])
    total, parts = reduce_terms(losses.orpo(logps, lengths, lam=0.0))
    np.testing.assert_allclose(total, (10 + 3) / (5 + 1), rtol=1e-6)


def test_rpo_extra_gradient_ignores_the_rejected():
    extra = jax.grad(lambda s: value_of(losses.rpo(s, R, N, beta=0.1)) - value_of(losses.dpo(s, R)))(S)
    np.testing.assert_allclose(extra, [[-0.2 / 5, 0.0]], atol=1e-7)


def test_sft_weighs_every_token_the_same():
    logps, mask = jnp.array([[[-1.0, -2.0, 9.0]], [[-4.0, 9.0, 9.0]]]), jnp.array([[[1, 1, 0]], [[1, 0, 0]]], bool)
    np.testing.assert_allclose(value(losses.sft(logps, mask)), (1 + 2 + 4) / 3, rtol=1e-6)


def kto(logps, z, labels=((1.0, 0.0),), **hyper):
    return losses.kto(logps, R, jnp.array(labels), ALL, R + z, R, **hyper)


def test_kto_baseline_is_a_clamped_mean_without_gradient():
    np.testing.assert_allclose(value(kto(R, 0.0, desirable_weight=3.0, undesirable_weight=3.0)), 0.5 * 3)
    np.testing.assert_allclose(value(kto(S, -7.0)), value(kto(S, 0.0)))
    np.testing.assert_allclose(value(kto(S, 0.4)), (1 - sig(0.1 * (1 - 0.4)) + 1 - sig(0.1 * (0.4 + 0.5))) / 2,
                               rtol=1e-6)
    assert jax.grad(lambda z: value_of(kto(S, z)))(0.4) == 0
    # The clamp comes after the mean: +1 and -3 average to -1, which becomes 0.
    mixed = losses.kto(S, R, jnp.array([[1.0, 0.0]]), ALL, R + jnp.array([[1.0, -3.0]]), R)
    np.testing.assert_allclose(value(mixed), value(kto(S, 0.0)))


def test_kto_counts_valid_examples_only():
    half = jnp.array([[True, False]])
    result = losses.kto(S, R, jnp.array([[1.0, 0.0]]), half, R + jnp.array([[0.2, 50.0]]), R)
    np.testing.assert_allclose(value(result), 1 - sig(0.1 * (1 - 0.2)), rtol=1e-6)


GAPS = jnp.array([[1.5, 0.0], [-0.5, 0.0], [0.5, 0.0]])


def test_beta_dpo_first_batch():
    out = losses.beta_dpo(GAPS, ZERO(GAPS), losses.get("beta_dpo").init_state(), jax.random.key(0), drop=0.0)
    np.testing.assert_allclose(out.new_state["mean"], 0.1 * (1.5 - 0.5 + 0.5) / 3, rtol=1e-6)
    np.testing.assert_allclose(out.new_state["std"], 0.1 * 1.0, rtol=1e-6)
    batch_beta = 0.1 * (1 + 0.6 * (0.5 - 0.05))
    np.testing.assert_allclose(out.metrics["beta"][0], batch_beta, rtol=1e-6)
    np.testing.assert_allclose(batch_beta, 0.127)
    expected = sum(sp(-batch_beta * g) for g in (1.5, -0.5, 0.5)) / 3
    np.testing.assert_allclose(value(out), expected, rtol=1e-6)


def test_beta_dpo_filter_keeps_the_right_number_and_the_likely():
    state = {"mean": jnp.float32(0.0), "std": jnp.float32(0.1)}
    gaps = jnp.stack([jnp.where(jnp.arange(10) < 2, 50.0, 0.01 * jnp.arange(10)), jnp.zeros(10)], 1)
    run = jax.jit(lambda key, drop: losses.beta_dpo(gaps, ZERO(gaps), state, key, drop=drop,
                                                      momentum=1.0).terms["loss"].weight)
    for drop, kept in ((0.0, 10), (0.1, 9), (0.2, 8), (0.55, 4), (1.0, 1)):
        weight = run(jax.random.key(1), drop)
        assert weight.sum() == kept
    assert run(jax.random.key(2), 0.2)[:2].sum() == 0  # 500 deviations away


def test_beta_dpo_without_dynamics_is_dpo_and_beta_has_a_floor():
    state = losses.get("beta_dpo").init_state()
    plain = losses.beta_dpo(RATIOS, ZERO(RATIOS), state, jax.random.key(0), a=0.0, drop=0.0)
    np.testing.assert_allclose(value(plain), value(losses.dpo(RATIOS, ZERO(RATIOS))), rtol=1e-6)
    low = losses.beta_dpo(-100 * GAPS, ZERO(GAPS), state, jax.random.key(0), drop=0.0)
    np.testing.assert_allclose(low.metrics["beta"][0], 1e-3)
    single = losses.beta_dpo(GAPS[:1], ZERO(GAPS[:1]), state, jax.random.key(0))
    assert np.isfinite(value(single)) and single.new_state["std"] == 0


def test_plackett_luce():
    scores = jnp.array([[0.3, 0.1, -0.4]])
    every = jnp.ones((1, 3), bool)
    run = lambda r, valid=every: losses.plackett_luce(r / 0.1, ZERO(r), valid)
    e = [math.exp(x) for x in (0.3, 0.1, -0.4)]
    first = -math.log(e[0] / sum(e)) - math.log(e[1] / (e[1] + e[2]))
    np.testing.assert_allclose(value(run(scores)), first, rtol=1e-6)
    np.testing.assert_allclose(run(scores + 5.0), run(scores), rtol=1e-5)
    np.testing.assert_allclose(value(run(ZERO(scores))), math.log(math.factorial(3)), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda r: value_of(run(r)))(scores).sum(), 0, atol=1e-6)
    pair = jnp.array([[True, False, True]])
    np.testing.assert_allclose(value(run(scores, pair)), sp(-(0.3 + 0.4)), rtol=1e-6)
    assert value(run(scores, jnp.array([[False, True, False]]))) == 0
    np.testing.assert_allclose(value(losses.plackett_luce(S, R, ALL)), sp(-0.15), rtol=1e-6)


def test_plackett_luce_golden():
    """The catalogue's "PL" of s = (.3, .1, -.4)."""
    scores = jnp.array([[0.3, 0.1, -0.4]])
    assert abs(value(losses.plackett_luce(scores, ZERO(scores), jnp.ones((1, 3), bool), beta=1.0)) - 1.313623) < 2e-6


def test_nca_lists_golden():
    rewards, psi = jnp.array([[0.2, -0.1, 0.0]]), jnp.array([[0.9, 0.6, 0.1]])
    every = jnp.ones((1, 3), bool)
    arguments = (rewards, ZERO(rewards), psi, every)
    q = np.exp([0.9, 0.6, 0.1]) / np.exp([0.9, 0.6, 0.1]).sum()
    r = np.array([0.2, -0.1, 0.0])
    info = -(q * (r - np.log(np.exp(r).sum()))).sum()
    both = (q * np.log1p(np.exp(-r)) + np.log1p(np.exp(r)) / 3).sum()
    np.testing.assert_allclose([info, both], [1.082338, 1.378997], atol=1e-6)
    np.testing.assert_allclose(value(losses.info_nca(*arguments, beta=1.0, alpha=1.0)), info, rtol=1e-6)
    np.testing.assert_allclose(value(losses.nca(*arguments, beta=1.0, alpha=1.0)), both, rtol=1e-6)
    hard = losses.info_nca(S, R, jnp.array([[1.0, 0.0]]), ALL, beta=0.1)
    np.testing.assert_allclose(value(hard), sp(-0.15), rtol=1e-6)


def test_aot_golden_and_identities():
    zero = ZERO(RATIOS)
    u, v = sorted([1, -0.2, 0.5]), sorted([-0.5, 0.3, 0])
    unpaired = sum(sp(-0.1 * (a - b)) for a, b in zip(u, v, strict=True)) / 3
    np.testing.assert_allclose(unpaired, 0.668493, atol=1e-6)
    run = lambda ratios, **k: value(losses.aot(ratios, ZERO(ratios), beta=0.1, **k))
    np.testing.assert_allclose(run(RATIOS, paired=False), unpaired, rtol=1e-6)
    policy = jnp.array([[2.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    reference = jnp.array([[0.5, 0.0], [1.5, 0.0], [-1.5, 0.0]])
    paired = (sp(-0.1 * (-1 + 1.5)) + sp(-0.1 * (1 - 0.5)) + sp(-0.1 * (2 - 1.5))) / 3
    np.testing.assert_allclose(paired, 0.668460, atol=1e-6)
    np.testing.assert_allclose(value(losses.aot(policy, reference, beta=0.1)), paired, rtol=1e-6)
    shuffled = RATIOS.at[:, 1].set(RATIOS[jnp.array([2, 0, 1]), 1])
    np.testing.assert_allclose(run(shuffled, paired=False), run(RATIOS, paired=False), rtol=1e-6)
    assert run(RATIOS, paired=False) <= value(losses.dpo(RATIOS, zero))
    for flag in (True, False):
        np.testing.assert_allclose(value(losses.aot(S, R, beta=0.1, paired=flag)), sp(-0.15), rtol=1e-6)


TOKENS = jnp.array([[[-1.0, -2.0, -7.0], [-3.0, -1.0, -9.0]]])
REF_TOKENS = jnp.array([[[-1.5, -2.5, -1.0], [-2.5, -1.0, -1.0]]])
KLS = jnp.array([[[0.1, 0.2, 5.0], [0.3, 0.4, 6.0]]])
MASK = jnp.array([[[1, 1, 0], [1, 1, 0]]], bool)


def test_tdpo_values_and_where_its_gradient_stops():
    u, kw, kl = (0.5 + 0.5) - (-0.5 + 0.0), 0.1 + 0.2, 0.3 + 0.4
    run = lambda kls, **k: losses.tdpo(TOKENS, REF_TOKENS, kls, MASK, **k)
    first = lambda kls: losses.tdpo1(TOKENS, REF_TOKENS, kls, MASK)
    np.testing.assert_allclose(value(run(KLS)), sp(-0.1 * (u - 0.5 * (kl - kw))), rtol=1e-6)
    np.testing.assert_allclose(value(first(KLS)), sp(-0.1 * (u - (kl - kw))), rtol=1e-6)
    np.testing.assert_allclose(value(run(KLS, alpha=0.0)), sp(-0.1 * u), rtol=1e-6)
    np.testing.assert_allclose(value(run(KLS, alpha=1.0)), value(first(KLS)), rtol=1e-6)
    second, both = (jax.grad(lambda k, f=f: value_of(f(k)))(KLS) for f in (run, first))
    np.testing.assert_array_equal(second[0, 0], 0)
    assert second[0, 1, 0] > 0 and both[0, 1, 0] > 0 > both[0, 0, 0]


def test_wpo_weight_is_capped_and_constant():
    every = jnp.ones((1, 2, 1), bool)
    run = lambda tokens, sums: losses.wpo(tokens, ZERO(tokens), sums, every, beta=0.1)
    tokens = jnp.array([[[-1.0], [-2.0]]])
    np.testing.assert_allclose(value(run(tokens, tokens)), sp(-0.1), rtol=1e-6)
    np.testing.assert_allclose(value(run(tokens, tokens - 3)), sp(-0.1), rtol=1e-6)
    np.testing.assert_allclose(value(run(tokens, tokens + 0.5)), math.exp(-0.5 - 0.5) * sp(-0.1), rtol=1e-6)
    gradient = jax.grad(lambda t: value_of(run(t, tokens + 0.5)))(tokens)
    np.testing.assert_allclose(gradient[0, :, 0], np.array([-1, 1]) * math.exp(-1) * 0.1 * sig(-0.1), rtol=1e-5)


def test_bt_rm():
    rewards, margins = jnp.array([[2.0, 0.5]]), jnp.array([0.25])
    run = lambda r, **k: losses.bt_rm(r, margins, **k)
    np.testing.assert_allclose(value(run(rewards)), sp(-1.5), rtol=1e-6)
    np.testing.assert_allclose(value(run(rewards, margin_weight=1.0)), sp(-(1.5 - 0.25)), rtol=1e-6)
    np.testing.assert_allclose(value(run(rewards, centering=0.01)), sp(-1.5) + 0.01 * 2.5**2, rtol=1e-6)
    np.testing.assert_allclose(value(run(ZERO(rewards))), math.log(2), rtol=1e-6)
    gradient = jax.grad(lambda r: value_of(run(r, margin_weight=1.0)))(rewards)
    np.testing.assert_allclose(gradient, [[-sig(-1.25), sig(-1.25)]], rtol=1e-5)


def test_exo_and_discopop_landmarks():
    at = lambda loss, m: value(loss(jnp.array([[m, 0.0]]), jnp.zeros((1, 2))))
    logit = math.log(0.999 / 0.001)
    assert abs(at(losses.exo, logit / 0.1)) < 1e-6
    slope = jax.grad(lambda m: value_of(losses.exo(jnp.array([[1.0, 0.0]]) * m, jnp.zeros((1, 2)))))(0.0)
    np.testing.assert_allclose(slope, 0.1 * 0.25 * (0 - logit), rtol=1e-5)
    np.testing.assert_allclose(at(losses.discopop, 0.0), (math.log(2) + 1) / 2, rtol=1e-6)
    curve = jax.grad(lambda m: value_of(losses.discopop(jnp.array([[1.0, 0.0]]) * m, jnp.zeros((1, 2)))))
    np.testing.assert_allclose([curve(-2.3714), curve(1.4401)], 0, atol=1e-4)


def test_apo_and_nca_gradients_at_the_reference():
    grad = lambda f: jax.grad(lambda s: value_of(f(s)))(R)[0]
    np.testing.assert_allclose(grad(lambda s: losses.apo_zero(s, R)), [-0.1 / 4, 0.1 / 4], rtol=1e-6)
    np.testing.assert_allclose(grad(lambda s: losses.apo_down(s, R)), [0, 0.1 / 4], atol=1e-8)
    one_hot = jnp.array([[1.0, 0.0]])
    np.testing.assert_allclose(grad(lambda s: losses.nca(s, R, one_hot, ALL, beta=1.0)), [-1 / 4, 1 / 4], rtol=1e-6)
    # NPO at the reference is gradient ascent on the NLL: weight 1.
    np.testing.assert_allclose(grad(lambda s: losses.npo(s, R, one_hot, ALL, N, retain_weight=0.0)), [0, 1], rtol=1e-6)


def test_cousins_meet_where_they_should():
    d = value(losses.dpo(S, R, beta=0.1))
    same = [
        losses.robust_dpo(S, R, label_smoothing=0.0), losses.cdpo(S, R, label_smoothing=0.0),
        losses.h_dpo(S, R, beta=0.1, alpha=1.0), losses.dpo_shift(S, R, beta=0.1, shift=1.0),
        losses.flex_dpo(S, R, beta_rejected=0.1), losses.r_dpo(S, R, N, alpha=0.0),
        losses.dpop(S, R, beta=0.1, penalty=0.0), losses.odpo(S, R, jnp.array([[2.0, 1.0]])),
        losses.f_dpo(S, R, divergence="reverse_kl"), losses.rpo(S, R, N, beta=0.1, eta=0.0),
        losses.sft_dpo(S, R, gamma=0.0), losses.cpo(S - R, N, lam=0.0),
    ]
    np.testing.assert_allclose([value(x) for x in same], d, rtol=1e-6)
