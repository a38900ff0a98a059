"""Published facts and hand-worked values: pairs with margins of their own, trajectories, unlearning."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from facts_test import ALL, LL, D, N, R, S, sig, sp, value, value_of

from alignax import losses
from alignax.types import ConfigError

GOOD_BAD = jnp.array([[1.0, 0.0]])


def gradient(function, at):
    return np.asarray(jax.grad(lambda x: value_of(function(x)))(at))


def zeros(x):
    return jnp.zeros_like(x)


def test_rso_hinge_norm():
    np.testing.assert_allclose(value(losses.rso_hinge_norm(S, R, gamma=0.1)), 1 - 0.1 * D, rtol=1e-6)
    assert value(losses.rso_hinge_norm(R, R)) == 1
    # relu(1 - gamma d) = gamma relu(1 / gamma - d): SLiC's calibration on log-ratios, scaled.
    slic = losses.slic_hf(S - R, delta=1 / 0.1).terms["calibration"].values
    np.testing.assert_allclose(losses.rso_hinge_norm(S, R, gamma=0.1), 0.1 * slic, rtol=1e-6)
    np.testing.assert_array_equal(gradient(lambda s: losses.rso_hinge_norm(s, R), S + jnp.array([[30.0, 0.0]])), 0)


def test_ilr_dpo_pushes_harder_where_the_chosen_is_shorter():
    np.testing.assert_allclose(value(losses.ilr_dpo(S, R, N)), sp(-(0.15 + 0.02 * (5 - 8))), rtol=1e-6)
    np.testing.assert_array_equal(losses.ilr_dpo(S, R, N), losses.r_dpo(S, R, N))
    slope = lambda lengths: -gradient(lambda s: losses.ilr_dpo(s, R, lengths), S)[0, 0]
    assert slope(N) > slope(N[:, ::-1])
    np.testing.assert_allclose(losses.ilr_dpo(S, R, ALL), losses.dpo(S, R), rtol=1e-6)


def test_rdpo_refined():
    run = lambda scores, s=S, **k: losses.rdpo_refined(s, R, jnp.array([scores]), **k)
    np.testing.assert_allclose(value(run((1.0, 0.0))), sp(-(0.15 - 1.0)), rtol=1e-6)
    np.testing.assert_allclose(value(run((1.0, 0.25), c=2.0)), sp(-(0.15 - 1.5)), rtol=1e-6)
    for same in (run((0.5, 0.5)), run((1.0, 0.0), c=0.0)):
        np.testing.assert_allclose(value(same), sp(-0.15), rtol=1e-6)
    weight = lambda scores: -gradient(lambda s: run(scores, s), S)[0, 0]
    assert weight((1.0, 0.0)) > weight((0.0, 0.0)) > weight((0.0, 1.0))
    # Dropped or relabelled where the revision is not better.
    two = lambda form: losses.rdpo_refined(jnp.tile(S, (3, 1)), jnp.tile(R, (3, 1)),
                                           jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), form=form)
    np.testing.assert_allclose(value(two("drop")), sp(-0.15), rtol=1e-6)
    np.testing.assert_allclose(value(two("relabel")), (sp(-0.15) + sp(0.15)) / 2, rtol=1e-6)
    with pytest.raises(ConfigError, match="offset, drop, relabel"):
        two("weigh")


def test_sequential_po():
    run = lambda margin, s=S, **k: losses.sequential_po(s, R, jnp.array([margin]), **k)
    by_hand = sp(-(0.15 - 0.5 * 0.1 * 0.8))
    np.testing.assert_allclose(by_hand, 0.639659, atol=1e-6)
    np.testing.assert_allclose(value(run(0.08, lam=0.5)), by_hand, rtol=1e-6)
    for first in (run(0.0), run(5.0, lam=0.0)):
        np.testing.assert_allclose(value(first), sp(-0.15), rtol=1e-6)
    weight = lambda margin: -gradient(lambda s: run(margin, s), S)[0, 0]
    assert weight(0.5) > weight(0.0) > weight(-0.5)


def test_self_refinement():
    aux, aux_ref = jnp.array([[-9.0, -13.0]]), jnp.array([[-10.0, -12.5]])  # log-ratios 1 and -0.5: D' = 1.5
    by_hand = sp(-(0.15 - 0.5 * 0.2))
    np.testing.assert_allclose(by_hand, 0.668460, atol=1e-6)
    wide = aux + jnp.array([[0.5, 0.0]])  # beta D' = 0.2
    np.testing.assert_allclose(value(losses.sr_dpo(S, R, wide, aux_ref)), by_hand, rtol=1e-6)
    np.testing.assert_allclose(value(losses.sr_ipo(S, R, wide, aux_ref)), (D - 0.5 * 0.2 - 5) ** 2, rtol=1e-6)
    np.testing.assert_allclose(value(losses.sr_dpo(S, R, wide, aux_ref, lam=0.0)), sp(-0.15), rtol=1e-6)
    np.testing.assert_allclose(losses.sr_ipo(S, R, wide, aux_ref, lam=0.0), losses.ipo(S, R, N), rtol=1e-6)
    # With an empty added prompt: DPO's slope at the margin (1 - lam) beta D, still scaled by beta.
    slope = jax.grad(lambda s: value_of(losses.sr_dpo(s, R, s, R)))(S)[0, 0]
    np.testing.assert_allclose(slope, -0.1 * sig(-0.5 * 0.15), rtol=1e-5)
    larger = lambda gap: -gradient(lambda s: losses.sr_dpo(s, R, aux + jnp.array([[gap, 0.0]]), aux_ref), S)[0, 0]
    assert larger(5.0) > larger(0.0)


def lcpo(s=S, r=R, n=N, who=None, eta=None, **hyper):
    state = losses.get("lcpo").init_state()
    state = state if eta is None else {"eta": jnp.full_like(state["eta"], eta)}
    return losses.lcpo(s, r, n, jnp.zeros(len(s), jnp.int32) if who is None else jnp.array(who), state, **hyper)


def flipmix(w, m):
    return w * sp(-m) + (1 - w) * sp(m)


def test_lcpo_on_dpo():
    p = sig(0.15)
    w = p * 0.9 / (p * 0.9 + (1 - p) * 0.1)
    np.testing.assert_allclose([w, flipmix(w, 0.15)], [0.912713, 0.634050], atol=1e-6)
    out = lcpo()
    np.testing.assert_allclose(value(out), flipmix(w, 0.15), rtol=1e-6)
    np.testing.assert_allclose(out.metrics["reliability"][0], w, rtol=1e-6)
    np.testing.assert_allclose(out.new_state["eta"][0], 0.9 * 0.9 + 0.1 * w, rtol=1e-6)
    np.testing.assert_allclose(out.new_state["eta"][1:], 0.9)
    np.testing.assert_allclose(value(lcpo(drop_normaliser=True)), value(out), rtol=1e-6)
    np.testing.assert_allclose(gradient(lcpo, S)[0, 0], 0.1 * (-w * sig(-0.15) + (1 - w) * sig(0.15)), rtol=1e-5)
    np.testing.assert_allclose(value(lcpo(eta=1.0)), sp(-0.15), rtol=1e-6)
    np.testing.assert_allclose(lcpo(s=R, eta=0.7).metrics["reliability"][0], 0.7, rtol=1e-6)  # p = 1/2
    assert lcpo(eta=1.0).new_state["eta"][0] == 1 and lcpo(eta=0.0).metrics["reliability"][0] == 0  # absorbing
    with pytest.raises(ConfigError, match="dpo, ipo, simpo, cpo"):
        lcpo(base="kto")


def test_lcpo_other_bases():
    w = lambda p: p * 0.9 / (p * 0.9 + (1 - p) * 0.1)
    ipo = sig(2 * D / 5.0)
    out = lcpo(base="ipo", tau=5.0)
    np.testing.assert_allclose(out.metrics["reliability"][0], w(ipo), rtol=1e-6)
    np.testing.assert_allclose(value(out), -w(ipo) * math.log(ipo) - (1 - w(ipo)) * math.log(1 - ipo), rtol=1e-5)
    dropped = w(ipo) * (D - 0.1) ** 2 + (1 - w(ipo)) * (D + 0.1) ** 2
    np.testing.assert_allclose(value(lcpo(base="ipo", tau=5.0, drop_normaliser=True)), dropped, rtol=1e-5)
    cpo = sig((1 + 0.1) * (-10 + 12))
    np.testing.assert_allclose(lcpo(base="cpo").metrics["reliability"][0], w(cpo), rtol=1e-6)
    margin = 2.0 * (-10 / 5 + 12 / 8)
    both = [sp(-(margin - 0.5)), sp(-(-margin - 0.5))]
    simpo = sig(both[1] - both[0])
    got = lcpo(base="simpo", beta=2.0, gamma=0.5, drop_normaliser=True)
    np.testing.assert_allclose(value(got), w(simpo) * both[0] + (1 - w(simpo)) * both[1], rtol=1e-5)
    np.testing.assert_allclose(value(losses.simpo(S, N)), both[0], rtol=1e-6)


def test_lcpo_learns_the_reliability_of_each_annotator():
    """Calibrated belief p = 3/4; who is right in a share q of the cases agrees with it in q p + (1 - q)(1 - p).

    So of 20 labels of annotators with q = 0.8 and 0.6, 13 and 11 agree, and the updates end at q from every start.
    """
    agree = jnp.array([1.0] * 13 + [-1.0] * 7 + [1.0] * 11 + [-1.0] * 9)
    s = jnp.stack([agree * math.log(3) / 0.1, jnp.zeros(40)], 1)
    who = jnp.repeat(jnp.arange(2), 20)
    step = lambda eta: losses.lcpo(s, zeros(s), zeros(s), who, {"eta": eta}, rate=1.0).new_state["eta"]
    run = jax.jit(lambda eta: jax.lax.fori_loop(0, 500, lambda _, e: step(e), eta))
    for start in (0.3, 0.7, 0.95):
        eta = run(jnp.full(64, start, jnp.float32))
        np.testing.assert_allclose(eta[:2], [0.8, 0.6], atol=1e-3)
        np.testing.assert_array_equal(eta[2:], jnp.float32(start))
    assert math.isnan(value(lcpo(who=[64])))  # an annotator beyond the table is not hidden


CHOSEN, REJECTED = (1.0, 0.2), (-0.5, 0.1)
MATRIX = jnp.array([[1.0, -0.5], [0.2, 0.1]])
EMBEDDED = jnp.array([[1.0, 0.0], [0.3, math.sqrt(1 - 0.3**2)]])  # cosine 0.3


def relative(embedding=EMBEDDED, ratios=MATRIX, **hyper):
    return losses.relative_po(ratios, zeros(ratios), embedding, **hyper)


def test_relative_po():
    near, far = math.exp(1 / 0.5), math.exp(0.3 / 0.5)
    own, other = near / (near + far), far / (near + far)
    np.testing.assert_allclose([own, other], [0.802184, 0.197816], atol=1e-6)
    grid = lambda weight, inside=True: sum(
        sp(-weight(i, j) * 0.1 * (CHOSEN[i] - REJECTED[j])) if inside else
        weight(i, j) * sp(-0.1 * (CHOSEN[i] - REJECTED[j])) for i in (0, 1) for j in (0, 1))
    by_hand = grid(lambda i, j: own if i == j else other) / 4
    np.testing.assert_allclose(by_hand, 0.673617, atol=1e-6)
    np.testing.assert_allclose(value(relative()), by_hand, rtol=1e-6)
    np.testing.assert_allclose(value(relative(weighting="uniform")), grid(lambda i, j: 0.5) / 4, rtol=1e-6)
    np.testing.assert_allclose(value(relative(tau=1e6)), grid(lambda i, j: 0.5) / 4, rtol=1e-5)
    np.testing.assert_allclose(value(relative(7 * jnp.ones((2, 2)))), grid(lambda i, j: 0.5) / 4, rtol=1e-6)
    diagonal = lambda i, j: 0.8 if i == j else 0.2
    np.testing.assert_allclose(value(relative(weighting="diagonal")), grid(diagonal) / 4, rtol=1e-6)
    np.testing.assert_allclose(value(relative(weighting="diagonal_loss")), grid(diagonal, False) / 2, rtol=1e-6)
    np.testing.assert_allclose(value(relative(ratios=zeros(MATRIX))), math.log(2), rtol=1e-6)
    for how in ("embedding", "uniform", "diagonal", "diagonal_loss"):
        one = losses.relative_po(S, R, EMBEDDED[:1], weighting=how)
        np.testing.assert_allclose(value(one), sp(-0.15), rtol=1e-6, err_msg=how)
    assert np.isfinite(value(relative(zeros(EMBEDDED))))
    with pytest.raises(ConfigError, match="embedding, uniform, diagonal, diagonal_loss"):
        relative(weighting="rows")


def test_typo():
    samples = jnp.array([[-3.0, -5.0]])
    run = lambda s, lam: losses.typo(s, samples, lam=lam)
    np.testing.assert_allclose(sp(-2), 0.126928, atol=1e-6)
    np.testing.assert_allclose(value(run(S, 0.0)), sp(-2), rtol=1e-6)
    np.testing.assert_allclose(value(run(S, 0.5)), sp(-2) + 0.5 * 4, rtol=1e-6)
    plain = losses.cpo(S, N, beta=1.0, lam=0.0)
    np.testing.assert_allclose(value(run(S, 0.0)), value(plain), rtol=1e-6)
    slope = jax.grad(lambda x: value_of(losses.typo(S, x, lam=0.5)))(samples)
    np.testing.assert_allclose(slope, [[-0.25, -0.25]])


def test_self_supervised_po():
    run = lambda logits, gamma: losses.self_supervised_po(S, R, logits, gamma=gamma)
    flat = jnp.zeros((1, 4, 4))
    np.testing.assert_allclose(value(run(flat, 0.0)), sp(-0.15), rtol=1e-6)
    np.testing.assert_allclose(value(run(flat, 0.1)), sp(-0.15) + 0.1 * math.log(4), rtol=1e-6)
    # Version k has class k: a logit of 2 on the right class of three versions.
    np.testing.assert_allclose(value(run(2 * jnp.eye(3)[None], 1.0)),
                               sp(-0.15) + math.log(1 + 2 * math.exp(-2)), rtol=1e-6)
    slope = jax.grad(lambda x: value_of(run(x, 0.1)))(flat)
    np.testing.assert_allclose(slope, 0.1 * (0.25 - jnp.eye(4)[None]) / 4, atol=1e-7)
    with pytest.raises(ConfigError, match="N <= C"):
        run(jnp.zeros((1, 4, 3)), 0.1)


MASK = jnp.array([[[1, 1, 1, 0], [1, 1, 0, 0]]], bool)
STEPS = jnp.array([[[-3.0, -3.0, -4.0, 9.0], [-5.0, -7.0, 9.0, 9.0]]])  # sums -10 and -12
REF_STEPS = jnp.array([[[-3.05, -3.02, -2.0, 5.0], [-5.0, -6.96, 5.0, 5.0]]])


def test_cpl():
    run = lambda labels=GOOD_BAD, steps=STEPS, **k: losses.cpl(steps, labels, MASK, **k)
    by_hand = sp(-(0.1 * -10 - 0.5 * 0.1 * -12))
    np.testing.assert_allclose(by_hand, 0.913015, atol=1e-6)
    np.testing.assert_allclose(value(run()), by_hand, rtol=1e-6)
    swapped = sp(-(0.1 * -12 - 0.5 * 0.1 * -10))
    np.testing.assert_allclose(value(run(GOOD_BAD[:, ::-1])), swapped, rtol=1e-6)
    for tie in (0.0, 0.5, 1.0):
        np.testing.assert_allclose(value(run(jnp.full((1, 2), tie))), (by_hand + swapped) / 2, rtol=1e-6)
    np.testing.assert_allclose(value(run(lam=1.0)), value(losses.cpo(S, N, lam=0.0)), rtol=1e-6)
    discounted = 0.1 * ((-3 - 0.9 * 3 - 0.81 * 4) - 0.5 * (-5 - 0.9 * 7))
    np.testing.assert_allclose(value(run(gamma=0.9)), sp(-discounted), rtol=1e-6)
    np.testing.assert_allclose(value(run(bc_weight=2.0)), by_hand + 2 * 22 / 5, rtol=1e-6)
    assert value(run(steps=STEPS - 1.0)) > value(run())  # both fall alike: the bias makes that dearer
    np.testing.assert_allclose(value(losses.cpl_kl(STEPS, REF_STEPS, GOOD_BAD, MASK, alpha=0.1, lam=1.0)),
                               sp(-0.1 * ((-10 + 8.07) - (-12 + 11.96))), rtol=1e-5)
    np.testing.assert_allclose(value(losses.cpl_kl(STEPS, REF_STEPS, GOOD_BAD, MASK)),
                               sp(-0.2 * ((-10 + 8.07) - 0.75 * (-12 + 11.96))), rtol=1e-5)


def d3po(steps=STEPS, labels=GOOD_BAD, mask=MASK, **hyper):
    return losses.d3po(steps, REF_STEPS, labels, mask, **hyper)


def test_d3po():
    # Steps that both have: log-ratios (0.05, 0.02) and (0, -0.04), all inside the window.
    by_hand = (sp(-0.1 * 0.05) + sp(-0.1 * (0.02 + 0.04))) / 2
    np.testing.assert_allclose(value(d3po()), by_hand, rtol=1e-6)
    # The ratio of the second step leaves the window: the bound counts, without gradient.
    jump = STEPS.at[0, 0, 1].set(-2.0)
    np.testing.assert_allclose(value(d3po(jump)), (sp(-0.1 * 0.05) + sp(-0.1 * (math.log(1.1) + 0.04))) / 2, rtol=1e-6)
    slope = gradient(d3po, jump)[0]
    assert slope[0, 1] == 0 and slope[0, 0] != 0 and slope[1, 1] != 0 and not slope[:, 2:].any()
    fall = STEPS.at[0, 0, 1].set(-9.0)
    np.testing.assert_allclose(value(d3po(fall)), (sp(-0.1 * 0.05) + sp(-0.1 * (math.log(0.9) + 0.04))) / 2, rtol=1e-6)
    tie = lambda s: d3po(s, jnp.ones((1, 2)))
    np.testing.assert_allclose(value(tie(STEPS)), math.log(2), rtol=1e-6)
    np.testing.assert_array_equal(gradient(tie, STEPS), 0)
    back = losses.d3po(STEPS[:, ::-1], REF_STEPS[:, ::-1], GOOD_BAD[:, ::-1], MASK[:, ::-1])
    np.testing.assert_allclose(value(back), by_hand, rtol=1e-6)
    path = d3po(form="trajectory")
    np.testing.assert_allclose(value(path), sp(-0.1 * ((-10 + 8.07) - (-12 + 11.96))), rtol=1e-5)
    single = jnp.zeros_like(MASK).at[..., 0].set(True)
    np.testing.assert_allclose(value(d3po(mask=single)), value(d3po(mask=single, form="trajectory")), rtol=1e-6)
    with pytest.raises(ConfigError, match="'step', 'trajectory'"):
        d3po(form="path")


TWO = jnp.ones((1, 2), bool)


def prdp(steps=STEPS, old=REF_STEPS, scores=(2.0, 0.0), mask=MASK, valid=TWO, **hyper):
    hyper = {"beta": 10.0, "clip": 1e9} | hyper
    return losses.prdp(steps, REF_STEPS, old, jnp.array([scores]), mask, valid, **hyper)


def test_prdp():
    one = jnp.ones((1, 2, 1), bool)
    toy = losses.prdp(S[..., None], R[..., None], R[..., None], jnp.array([[2.0, 0.0]]), one, TWO, beta=10.0, clip=1e9)
    np.testing.assert_allclose((D - 2 / 10) ** 2, 1.69)
    np.testing.assert_allclose(value(toy), (D - 2 / 10) ** 2, rtol=1e-6)
    gap = (-10 + 8.07) - (-12 + 11.96)
    np.testing.assert_allclose(value(prdp()), (gap - 0.2) ** 2, rtol=1e-5)
    mean = (-10 + 8.07) / 3 - (-12 + 11.96) / 2
    np.testing.assert_allclose(value(prdp(time_reduce="mean")), (mean - 0.2) ** 2, rtol=1e-5)
    # A constant gap of 1/2 is IPO with tau = beta.
    np.testing.assert_allclose(value(prdp(scores=(0.5, 0.0), beta=0.1)),
                               value(losses.ipo(jnp.array([[gap, 0.0]]), zeros(S), N)), rtol=1e-5)
    # Clipping per step around the snapshot, and the larger of the two losses.
    clipped = (0.05 + 0.02 - 0.1) - (0.0 - 0.04)
    for scores in ((2.0, 0.0), (-40.0, 0.0)):
        target = scores[0] / 10
        np.testing.assert_allclose(value(prdp(scores=scores, clip=0.1)),
                                   max((gap - target) ** 2, (clipped - target) ** 2), rtol=1e-5)
    held = gradient(lambda s: prdp(s, scores=(-40.0, 0.0), clip=0.1), STEPS)[0]
    assert held[0, 2] == 0 and held[0, 0] != 0  # the third step is outside, and the clipped loss is the larger
    # At the snapshot both losses and their gradients agree.
    at_old = lambda clip: gradient(lambda s: prdp(s, old=STEPS, clip=clip), STEPS)
    np.testing.assert_allclose(at_old(0.01), at_old(1e9), rtol=1e-6)
    with pytest.raises(ConfigError, match="'sum', 'mean'"):
        prdp(time_reduce="last")


def test_prdp_groups():
    """Three answers: zero loss where log-ratios follow the rewards; means over pairs, then prompts; ties may drop."""
    rewards = jnp.array([[1.0, 0.5, 0.5], [2.0, 0.0, 7.0]])
    valid = jnp.array([[True, True, True], [True, True, False]])
    mask = jnp.ones((2, 3, 1), bool)
    run = lambda steps, **k: losses.prdp(steps[..., None], jnp.zeros((2, 3, 1)), jnp.zeros((2, 3, 1)), rewards, mask,
                                         valid, **{"beta": 0.5, "clip": 1e9} | k)
    assert value(run(rewards / 0.5 + jnp.array([[3.0], [-1.0]]))) < 1e-10
    start = jnp.zeros((2, 3))
    np.testing.assert_allclose(value(run(start)), ((1 + 1 + 0) / 3 + 4**2) / 2, rtol=1e-6)
    np.testing.assert_allclose(value(run(start, skip_ties=True)), ((1 + 1) / 2 + 4**2) / 2, rtol=1e-6)


def test_gradient_difference():
    run = lambda s=S, **k: losses.grad_diff(s, N, GOOD_BAD, ALL, **k)
    np.testing.assert_allclose(value(run()), -12 / 8 + 10 / 5, rtol=1e-6)
    np.testing.assert_allclose(value(run(forget_weight=3.0, retain_weight=0.5)), -3 * 12 / 8 + 0.5 * 10 / 5, rtol=1e-6)
    np.testing.assert_allclose(value(run(retain_weight=0.0)), -12 / 8, rtol=1e-6)
    np.testing.assert_allclose(gradient(run, S), [[-1 / 5, 1 / 8]], rtol=1e-6)
    same = losses.grad_diff(jnp.array([[-9.0, -9.0]]), jnp.array([[4.0, 4.0]]), GOOD_BAD, ALL)
    assert value(same) == 0
    # Token means over the batch, not means of means.
    wide = losses.grad_diff(jnp.concatenate([S, 3 * S]), jnp.tile(N, (2, 1)), jnp.zeros((2, 2)),
                            jnp.ones((2, 2), bool))
    np.testing.assert_allclose(value(wide), -(10 + 12 + 30 + 36) / (2 * 13), rtol=1e-6)
    kl = jnp.array([[[0.1, 0.2, 0.3, 9.0], [0.4, 0.5, 9.0, 9.0]]])
    with_kl = losses.grad_diff_kl(STEPS, kl, GOOD_BAD, MASK)
    np.testing.assert_allclose(value(with_kl), -12 / 2 + (0.1 + 0.2 + 0.3) / 3, rtol=1e-6)


def test_npo_gradient_is_weighted_ascent():
    run = lambda s, beta: losses.npo(s, R, GOOD_BAD, ALL, N, beta=beta, retain_weight=0.0)
    weight = 2 * math.exp(0.1 * LL) / (1 + math.exp(0.1 * LL))
    np.testing.assert_allclose(gradient(lambda s: run(s, 0.1), S), [[0, weight]], rtol=1e-5)
    np.testing.assert_allclose(gradient(lambda s: run(s, 1e-4), S), [[0, 1]], rtol=1e-4)
    np.testing.assert_allclose(value(run(R, 0.1)), 2 / 0.1 * math.log(2), rtol=1e-6)


def test_unlikelihood_on_pairs():
    tokens = jnp.log(jnp.array([[[0.5, 0.2, 0.9], [0.3, 0.4, 0.9]]]))
    mask = jnp.array([[[1, 1, 0], [1, 1, 0]]], bool)
    run = lambda t, **k: losses.unlikelihood(t, GOOD_BAD, mask, **k)
    np.testing.assert_allclose(-math.log(1 - 0.3), 0.356675, atol=1e-6)
    nll, unlikely = -(math.log(0.5) + math.log(0.2)) / 2, -(math.log(0.7) + math.log(0.6)) / 2
    np.testing.assert_allclose(value(run(tokens)), nll + unlikely, rtol=1e-6)
    np.testing.assert_allclose(value(run(tokens, alpha=0.0)), nll, rtol=1e-6)
    # d/d lp of -log(1 - p) is p / (1 - p); times d lp / d logit = 1 - p gives +p.
    np.testing.assert_allclose(gradient(run, tokens)[0, 1, :2], [0.3 / 0.7 / 2, 0.4 / 0.6 / 2], rtol=1e-5)
    sure = run(tokens.at[0, 1, 0].set(-1e-9))
    np.testing.assert_allclose(value(sure), nll + (-math.log(1e-5) - math.log(0.6)) / 2, rtol=1e-5)
    assert sure.metrics["clamped"] == (1, 2)
    assert gradient(run, tokens.at[0, 1, 0].set(-1e-9))[0, 1, 0] == 0


def test_unlikelihood_on_candidates():
    """Tokens a b a c: candidates {} {a} {b} {a, b}; each counts once, the target never."""
    targets = jnp.array([[[7, 3, 7, 5, 3]]])
    mask = jnp.array([[[1, 1, 1, 1, 0]]], bool)
    p = np.full((5, 5), 0.99)
    p[1, 0], p[2, 1], p[3, 2], p[3, 1] = 0.1, 0.2, 0.3, 0.4
    p[3, 0] = p[3, 2]  # the same token
    own = jnp.log(jnp.full((1, 1, 5), 0.5))
    run = lambda own, c, **k: losses.unlikelihood_token(own, c, targets, mask, **k)
    candidates = jnp.log(jnp.asarray(p, jnp.float32))[None, None]
    penalty = -sum(math.log(1 - x) for x in (0.1, 0.2, 0.3, 0.4))
    np.testing.assert_allclose(value(run(own, candidates)), math.log(2) + penalty / 4, rtol=1e-5)
    np.testing.assert_allclose(value(run(own, candidates, alpha=0.0)), math.log(2), rtol=1e-6)
    near = -sum(math.log(1 - x) for x in (0.1, 0.2, 0.3))  # window 1: the token just before
    np.testing.assert_allclose(value(run(own, candidates, window=1)), math.log(2) + near / 4, rtol=1e-5)
    slope = np.asarray(jax.grad(lambda c: value_of(run(own, c)))(candidates))[0, 0]
    assert {(int(t), int(j)) for t, j in zip(*np.nonzero(slope), strict=True)} == {(1, 0), (2, 1), (3, 2), (3, 1)}


def test_unlikelihood_on_repeats():
    targets = jnp.array([[[1, 2, 3, 1, 2, 9, 1, 2]]])
    mask = jnp.ones((1, 1, 8), bool)
    tokens = jnp.log(jnp.linspace(0.1, 0.8, 8, dtype=jnp.float32))[None, None]
    run = lambda m=mask, **k: losses.unlikelihood_sequence(tokens, targets, m, **k)
    again = -sum(math.log(1 - x) for x in (0.4, 0.5, 0.7, 0.8))
    np.testing.assert_allclose(value(run(ngram=2)), again / 8, rtol=1e-5)
    cut = -sum(math.log(1 - x) for x in (0.4, 0.5))
    np.testing.assert_allclose(value(run(mask.at[..., 7].set(False), ngram=2)), cut / 7, rtol=1e-5)
    assert value(run(ngram=3)) == 0 and value(run(ngram=9)) == 0
    np.testing.assert_allclose(value(run(ngram=1)), again / 8, rtol=1e-5)
    with pytest.raises(ConfigError, match="ngram = 0"):
        run(ngram=0)
