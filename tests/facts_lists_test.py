"""Published facts and hand-worked values of the losses on lists and on single labelled completions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from facts_test import ALL, N, R, S, sig, sp, value, value_of

from alignax import losses
from alignax.types import ConfigError

EVERY = jnp.ones((1, 3), bool)
PSI = jnp.array([[0.9, 0.6, 0.1]])
ONE = jnp.ones((1, 3))
PAIR_LABELS = jnp.array([[1.0, 0.0]])


def gradient(function, at):
    return np.asarray(jax.grad(lambda x: value_of(function(x)))(at))


def zeros(x):
    return jnp.zeros_like(x)


def test_exo_on_lists():
    r = [0.2, -0.1, 0.0]
    f = np.exp(r) / np.exp(r).sum()
    t = np.exp([0.9, 0.6, 0.1]) / np.exp([0.9, 0.6, 0.1]).sum()
    kl = float((f * (np.log(f) - np.log(t))).sum())
    rewards = jnp.array([r])
    run = lambda x, scores=PSI, **k: losses.exo_list(x, zeros(x), scores, EVERY, **{"beta": 1.0, "score_beta": 1.0} | k)
    np.testing.assert_allclose(kl, 0.036062, atol=1e-6)
    np.testing.assert_allclose(value(run(rewards)), kl, rtol=1e-5)
    # No loss and no slope where beta lr - scores / score_beta is the same for all.
    fitted = PSI / 0.5 / 0.25 + 3.0
    assert abs(value(run(fitted, beta=0.25, score_beta=0.5))) < 1e-6
    np.testing.assert_allclose(gradient(lambda x: run(x, beta=0.25, score_beta=0.5), fitted), 0, atol=1e-6)
    # With two answers and the scores of label smoothing it is the pair loss.
    logits = jnp.array([[math.log(0.999), math.log(0.001)]])
    listed = losses.exo_list(S, R, logits, ALL, beta=0.1, score_beta=1.0)
    np.testing.assert_allclose(value(listed), value(losses.exo(S, R)), rtol=1e-5)
    # A missing answer leaves the loss of the others.
    short = losses.exo_list(rewards, zeros(rewards), PSI, jnp.array([[True, True, False]]), beta=1.0, score_beta=1.0)
    two = losses.exo_list(rewards[:, :2], zeros(rewards[:, :2]), PSI[:, :2], ALL, beta=1.0, score_beta=1.0)
    np.testing.assert_allclose(value(short), value(two), rtol=1e-6)


S3 = jnp.array([[0.3, 0.1, -0.4]])


def lipo(rewards, scores=PSI, valid=EVERY, **hyper):
    return losses.lipo(rewards, zeros(rewards), scores, valid, **{"beta": 1.0} | hyper)


def lambda_by_hand():
    s, gain, d = [0.3, 0.1, -0.4], [2**0.9, 2**0.6, 2**0.1], [math.log(1 + k) for k in (1, 2, 3)]
    return sum((gain[i] - gain[j]) * (1 / d[i] - 1 / d[j]) * sp(-(s[i] - s[j])) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_lipo_lambda():
    by_hand = lambda_by_hand()
    np.testing.assert_allclose([by_hand, by_hand * 3 * math.log(2) / 3], [0.382345, 0.265021], atol=1e-6)
    np.testing.assert_allclose(value(lipo(S3)), by_hand, rtol=1e-5)
    np.testing.assert_allclose(value(lipo(S3, rax_reduction=True)), by_hand * 3 * math.log(2) / 3, rtol=1e-5)
    np.testing.assert_allclose(value(lipo(S3 + 5.0)), by_hand, rtol=1e-5)
    factor = (2**0.9 - 2**0.6) * (1 / math.log(2) - 1 / math.log(3))
    pair = losses.lipo(S, R, PSI[:, :2], ALL, beta=0.1)
    np.testing.assert_allclose(value(pair), factor * sp(-0.15), rtol=1e-5)
    assert value(lipo(S3, jnp.array([[0.5, 0.5, 0.5]]))) == 0  # ties make no term
    # Neighbours that swap ranks change weights only: the derivative inside one order is that of fixed weights.
    slope = gradient(lipo, S3)[0]
    d = [1 / math.log(1 + k) for k in (1, 2, 3)]
    gain = [2**0.9, 2**0.6, 2**0.1]
    first = -sum((gain[0] - gain[j]) * (d[0] - d[j]) * sig(-(0.3 - s)) for j, s in ((1, 0.1), (2, -0.4)))
    np.testing.assert_allclose(slope[0], first, rtol=1e-5)
    np.testing.assert_allclose(slope.sum(), 0, atol=1e-6)
    swapped = jnp.array([[0.1, 0.3, -0.4]])
    order = [1, 0, 2]
    by_ranks = sum(abs(gain[i] - gain[j]) * abs(d[order[i]] - d[order[j]]) * sp(-(b - a))
                   for (i, b), (j, a) in (((0, 0.1), (1, 0.3)), ((0, 0.1), (2, -0.4)), ((1, 0.3), (2, -0.4))))
    np.testing.assert_allclose(value(lipo(swapped)), by_ranks, rtol=1e-5)
    # At the reference all rewards are equal; ranks then follow the list, so that there is a slope to start from.
    assert np.abs(gradient(lipo, zeros(S3))).max() > 0.01


def test_lipo_members():
    s, psi = [0.3, 0.1, -0.4], [0.9, 0.6, 0.1]
    gaps = [s[i] - s[j] for i, j in ((0, 1), (0, 2), (1, 2))]
    log_softmax = [x - math.log(sum(math.exp(y) for y in s)) for x in s]
    expected = {
        "pair_logistic": sum(sp(-g) for g in gaps),
        "pair_hinge": sum(max(0, 1 - g) for g in gaps),
        "list_mle": -log_softmax[0] + sp(-(0.1 + 0.4)),
        "softmax": -sum(p * q for p, q in zip(psi, log_softmax, strict=True)) / sum(psi),
        "point_mse": sum((p - x) ** 2 for p, x in zip(psi, s, strict=True)),
        "point_sigmoid": sum(p * sp(-x) + (1 - p) * sp(x) for p, x in zip(psi, s, strict=True)),
    }
    shuffle = jnp.array([2, 0, 1])
    short = jnp.array([[True, True, False]])
    for member, by_hand in expected.items():
        np.testing.assert_allclose(value(lipo(S3, member=member)), by_hand, rtol=1e-5, err_msg=member)
        # The order is in the labels, not in the list.
        np.testing.assert_allclose(value(lipo(S3[:, shuffle], PSI[:, shuffle], member=member)), by_hand, rtol=1e-5)
        dirty = S3.at[0, 2].set(jnp.nan)
        cut, clean = lipo(dirty, valid=short, member=member), lipo(S3[:, :2], PSI[:, :2], ALL, member=member)
        np.testing.assert_allclose(value(cut), value(clean), rtol=1e-5, err_msg=member)
        slope = gradient(lambda x, member=member: lipo(x, valid=short, member=member), dirty)
        assert np.isfinite(slope).all() and slope[0, 2] == 0
    np.testing.assert_allclose(value(lipo(S3, member="list_mle")),
                               value(losses.plackett_luce(S3, zeros(S3), EVERY, beta=1.0)), rtol=1e-6)
    with pytest.raises(ConfigError, match="member = 'lambada'"):
        lipo(S3, member="lambada")
    with pytest.raises(ConfigError, match="rax_reduction"):
        lipo(S3, member="softmax", rax_reduction=True)


def test_rrhf():
    s = jnp.array([[-1.5, -1.0, -1.2]])
    run = lambda x, scores=PSI, **k: losses.rrhf(x, ONE, scores, EVERY, **k)
    by_hand = (-1.0 + 1.5) + (-1.2 + 1.5) + 0
    np.testing.assert_allclose(by_hand, 0.8)
    np.testing.assert_allclose(value(run(s)), by_hand + 1.5, rtol=1e-6)
    np.testing.assert_allclose(value(run(s, rank_weight=100.0)), 100 * by_hand + 1.5, rtol=1e-6)
    rank = lambda x, **k: run(x, **k).terms["rank"].values.sum()
    ordered = jnp.array([[-1.0, -1.2, -1.5]])
    assert rank(ordered) == 0 and not np.asarray(jax.grad(rank)(ordered)).any()
    assert rank(s, scores=jnp.array([[1.0, 1.0, 1.0]])) == 0
    # Length power and NLL: sums of 4 and 2 tokens.
    pair = lambda **k: losses.rrhf(jnp.array([[-8.0, -2.0]]), jnp.array([[4.0, 2.0]]), PSI[:, :2], ALL, **k)
    np.testing.assert_allclose(value(pair()), (-1 + 2) + 8, rtol=1e-6)
    np.testing.assert_allclose(value(pair(nll="average")), (-1 + 2) + 2, rtol=1e-6)
    np.testing.assert_allclose(value(pair(length_power=2.0)), 0.0 + 8, rtol=1e-6)
    slic = losses.slic_hf(jnp.array([[-2.0, -1.0]]), delta=0.0).terms["calibration"].values
    np.testing.assert_allclose(pair().terms["rank"].values, slic)
    with pytest.raises(ConfigError, match="'sequences', 'average'"):
        pair(nll="tokens")


def test_pro():
    s = jnp.array([[-1.0, -1.2, -1.5]])
    run = lambda x, scores=PSI, **k: losses.pro(x, ONE, scores, EVERY, **{"sft_weight": 0.0} | k)
    e = lambda x, g: math.exp(x * g)
    first = -math.log(e(-1, 0.8) / (e(-1, 0.8) + e(-1.2, 0.3) + e(-1.5, 0.8)))
    second = -math.log(e(-1.2, 0.5) / (e(-1.2, 0.5) + e(-1.5, 0.5)))
    np.testing.assert_allclose(first + second, 1.791278, atol=1e-6)
    np.testing.assert_allclose(value(run(s)), first + second, rtol=1e-6)
    np.testing.assert_allclose(value(run(s, PSI + 7.0)), first + second, rtol=1e-5)
    np.testing.assert_allclose(value(run(s, sft_weight=0.05)), first + second + 0.05 * 2**2 * 1.0, rtol=1e-6)
    # Equal rewards: log of how many remain, and no slope.
    np.testing.assert_allclose(value(run(s, ONE)), math.log(3) + math.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient(lambda x: run(x, ONE), s), 0, atol=1e-7)
    # Two answers, also as what is left of three.
    pair = sp(-(0.9 - 0.6) * (-1.0 + 1.2))
    two = losses.pro(s[:, :2], ONE[:, :2], PSI[:, :2], ALL, sft_weight=0.0)
    np.testing.assert_allclose(value(two), pair, rtol=1e-6)
    ragged = losses.pro(s, ONE, PSI, jnp.array([[True, True, False]]), sft_weight=0.05)
    np.testing.assert_allclose(value(ragged), pair + 0.05 * 1.0, rtol=1e-6)
    # Gaps of 1 everywhere (0/1 rewards of two answers) are Plackett-Luce.
    unit = losses.pro(s[:, :2], ONE[:, :2], PAIR_LABELS, ALL, sft_weight=0.0)
    plain = losses.plackett_luce(s[:, :2], zeros(s[:, :2]), ALL, beta=1.0)
    np.testing.assert_allclose(value(unit), value(plain), rtol=1e-6)


POSITIVE, NEGATIVE = (-0.5, -0.8), (-1.0, -0.6)
FOUR = jnp.array([[*POSITIVE, *NEGATIVE]])
RIGHT = jnp.array([[1.0, 1.0, 0.0, 0.0]])


def aft(x, labels=RIGHT, **hyper):
    return losses.aft(x, jnp.ones_like(x), labels, jnp.ones(x.shape, bool), **{"sft_weight": 0.0} | hyper)


def test_aft_values():
    plain = math.log(1 + sum(math.exp(q - p) for p in POSITIVE for q in NEGATIVE))
    limit = {p: 2 * (min(POSITIVE) - 0.15) - p for p in POSITIVE}
    boundary = math.log(1 + sum(math.exp(q - p) + math.exp(limit[p] - q) for p in POSITIVE for q in NEGATIVE))
    np.testing.assert_allclose([plain, boundary], [1.515457, 1.971650], atol=1e-6)
    np.testing.assert_allclose(value(aft(FOUR, constraint="none")), plain, rtol=1e-6)
    np.testing.assert_allclose(value(aft(FOUR, constraint="detached")), plain, rtol=1e-6)
    np.testing.assert_allclose(value(aft(FOUR)), boundary, rtol=1e-6)
    np.testing.assert_allclose(value(aft(FOUR, constraint="none", sft_weight=1.0)), plain + 0.5, rtol=1e-6)
    with pytest.raises(ConfigError, match="none, detached, boundary"):
        aft(FOUR, constraint="hard")


def test_aft_gradients():
    assert (gradient(lambda x: aft(x, constraint="detached"), FOUR)[0, 2:] == 0).all()
    assert (gradient(lambda x: aft(x, constraint="none"), FOUR)[0, 2:] > 0).all()
    pair = lambda q: jnp.array([[-0.5, q]])
    np.testing.assert_allclose(value(aft(pair(-0.9), PAIR_LABELS, constraint="none")), sp(-0.9 + 0.5), rtol=1e-6)
    slope = lambda q: gradient(lambda x: aft(x, PAIR_LABELS), pair(q))[0, 1]
    assert abs(slope(-0.5 - 0.15)) < 1e-6 and slope(-0.5) > 0 > slope(-0.9)
    for labels in (RIGHT * 0, RIGHT * 0 + 1):  # an empty group
        for constraint in ("none", "detached", "boundary"):
            run = lambda x, c=constraint, labels=labels: aft(x, labels, constraint=c)
            assert value(run(FOUR)) == 0 and np.isfinite(gradient(run, FOUR)).all()


def test_aft_ranking():
    s = [-0.5, -0.8, -0.6]
    run = lambda **k: losses.aft_ranking(jnp.array([s]), ONE, PSI, EVERY, **{"sft_weight": 0.0} | k)
    pairs = ((0, 1), (0, 2), (1, 2))
    plain = sum(math.exp(s[j] - s[i]) for i, j in pairs)
    lowest = {1: s[0], 2: min(s[0], s[1])}
    extra = sum(math.exp(2 * (lowest[j] - 0.15) - s[i] - s[j]) for i, j in pairs)
    np.testing.assert_allclose(value(run(constraint="none")), math.log(1 + plain), rtol=1e-6)
    np.testing.assert_allclose(value(run()), math.log(1 + plain + extra), rtol=1e-6)
    # Two classes of scores are the labelled form.
    listed = losses.aft_ranking(FOUR, jnp.ones_like(FOUR), RIGHT, jnp.ones((1, 4), bool), sft_weight=0.0)
    np.testing.assert_allclose(value(listed), value(aft(FOUR)), rtol=1e-6)


def bco(logps, labels=PAIR_LABELS, state=None, weights=1.0, **hyper):
    state = losses.get("bco").init_state() if state is None else state
    valid = jnp.ones(logps.shape, bool)
    return losses.bco(logps, R, labels, valid, jnp.full(logps.shape[0], weights), state, **{"beta": 0.1} | hyper)


def test_bco():
    delta = (0.1 - 0.05) / 2
    by_hand = sp(-(0.1 - delta)) + sp(-0.05 - delta)
    np.testing.assert_allclose(by_hand, 1.312700, atol=1e-6)
    out = bco(S)
    np.testing.assert_allclose(2 * value(out), by_hand, rtol=1e-6)
    np.testing.assert_allclose(out.metrics["delta"][0], delta, rtol=1e-5)
    assert 2 * value(out) >= sp(-0.15)  # an upper bound of DPO
    # The weight of a bad example is held in [0.5, 10]; the good ones keep weight 1.
    for weight, held in ((0.1, 0.5), (3.0, 3.0), (99.0, 10.0)):
        np.testing.assert_allclose(2 * value(bco(S, weights=weight)), sp(-(0.1 - delta)) + held * sp(-0.05 - delta),
                                   rtol=1e-6)
    # No gradient through delta: that of the two logistic terms at a constant delta.
    np.testing.assert_allclose(gradient(bco, S)[0],
                               [-0.05 * sig(-(0.1 - delta)), 0.05 * sig(-0.05 - delta)], rtol=1e-5)
    # The same constant on all rewards moves delta along and nothing else.
    np.testing.assert_allclose(value(bco(S + 7.0)), value(bco(S)), rtol=1e-5)
    # delta = 0 on a pair: half the sum of two plain logistic terms.
    even = R + jnp.array([[1.0, -1.0]])
    np.testing.assert_allclose(2 * value(bco(even)), 2 * sp(-0.1), rtol=1e-6)


def test_bco_running_mean_weighs_the_classes_equally():
    state = {k: jnp.float32(v) for k, v in
             {"good_sum": 3.0, "good_count": 9.0, "bad_sum": 0.0, "bad_count": 0.0}.items()}
    out = bco(S, state=state)
    good, bad = (3.0 + 0.1) / 10, -0.05
    np.testing.assert_allclose(out.metrics["delta"][0], (good + bad) / 2, rtol=1e-5)
    np.testing.assert_allclose([out.new_state[k] for k in ("good_sum", "good_count", "bad_sum", "bad_count")],
                               [3.1, 10, -0.05, 1], rtol=1e-6)
    pooled = bco(S, state=state, pooled=True)
    np.testing.assert_allclose(pooled.metrics["delta"][0], (3.1 - 0.05) / 11, rtol=1e-5)
    only = bco(S, labels=jnp.ones((1, 2)))  # no bad example so far
    np.testing.assert_allclose(only.metrics["delta"][0], (0.1 - 0.05) / 2, rtol=1e-5)


def test_apo_zero_unpaired():
    pair = losses.apo_zero_unpaired(S, R, PAIR_LABELS, ALL)
    np.testing.assert_allclose(2 * value(pair), value(losses.apo_zero(S, R)), rtol=1e-6)
    np.testing.assert_allclose(value(pair), value(losses.kto(S, R, PAIR_LABELS, ALL, R, R)), rtol=1e-6)
    good = losses.apo_zero_unpaired(S[:, :1], R[:, :1], ALL[:, :1], ALL[:, :1])
    np.testing.assert_allclose(value(good), 1 - sig(0.1), rtol=1e-6)


def test_sppo():
    hard = (1 - 5) ** 2 + (-0.5 + 5) ** 2
    np.testing.assert_allclose(hard / 2, 18.125)
    np.testing.assert_allclose(value(losses.sppo(S, R, PAIR_LABELS, ALL, beta=0.1)), hard / 2, rtol=1e-6)
    np.testing.assert_allclose(value(losses.sppo_hard(S, R, beta=0.1)), hard, rtol=1e-6)
    calibration = value(losses.cal_dpo(S, R, beta=0.1)) - sp(-1.5)
    np.testing.assert_allclose(value(losses.sppo_hard(S, R, beta=0.1)), calibration, rtol=1e-6)
    # Win rates from scores s: each answer against all, itself included, or against the others.
    win, scores = sig(3.0 - 1.0), jnp.array([[3.0, 1.0]])
    for how, rate in (("list", (0.5 + win) / 2), ("others", win)):
        expected = ((1 - (rate - 0.5) / 0.1) ** 2 + (-0.5 - (0.5 - rate) / 0.1) ** 2) / 2
        got = losses.sppo(S, R, scores, ALL, beta=0.1, win_rates=how)
        np.testing.assert_allclose(value(got), expected, rtol=1e-5, err_msg=how)
    assert value(losses.sppo(R, R, jnp.full((1, 2), 0.5), ALL)) == 0
    # Separable: the slope on one answer does not see the other.
    slope = lambda s: gradient(lambda x: losses.sppo(x, R, PAIR_LABELS, ALL, beta=0.1), s)[0, 0]
    assert slope(S) == slope(S.at[0, 1].set(-40.0))
    with pytest.raises(ConfigError, match="given, list, others"):
        losses.sppo(S, R, scores, ALL, win_rates="guess")


def test_bt_rm_on_lists():
    rewards, scores = jnp.array([[2.0, 0.5, 1.0], [1.0, 0.0, 9.0]]), jnp.array([[3.0, 1.0, 1.0], [2.0, 1.0, 7.0]])
    valid = jnp.array([[True, True, True], [True, True, False]])
    run = lambda r, s=scores, v=valid, **k: losses.bt_rm_list(r, s, v, **k)
    first, second = (sp(-1.5) + sp(-1.0)) / 2, sp(-1.0)
    np.testing.assert_allclose(value(run(rewards)), (first + second) / 2, rtol=1e-6)
    np.testing.assert_allclose(value(run(rewards, flat=True)), (sp(-1.5) + sp(-1.0) + sp(-1.0)) / 3, rtol=1e-6)
    np.testing.assert_allclose(value(run(rewards, margin_weight=0.5)), ((sp(-0.5) + sp(0.0)) / 2 + sp(-0.5)) / 2,
                               rtol=1e-6)
    extra = value(run(rewards, centering=0.01)) - value(run(rewards))
    np.testing.assert_allclose(extra, 0.01 * ((2.5**2 + 3.0**2) / 2 + 1.0**2) / 2, rtol=1e-4)
    np.testing.assert_allclose(value(run(zeros(rewards))), math.log(2), rtol=1e-6)
    np.testing.assert_allclose(value(run(rewards + jnp.array([[5.0], [-3.0]]))), value(run(rewards)), rtol=1e-5)
    np.testing.assert_allclose(gradient(run, rewards).sum(-1), 0, atol=1e-7)
    pair = losses.bt_rm_list(rewards[:, :2], scores[:, :2], valid[:, :2])
    np.testing.assert_allclose(value(pair), value(losses.bt_rm(rewards[:, :2], jnp.zeros(2))), rtol=1e-6)


def test_retaining_and_forgetting_share_one_batch():
    """One good and one bad completion of 5 and 8 tokens: token means on either side."""
    simnpo = losses.simnpo(S, N, PAIR_LABELS, ALL, beta=2.5, forget_weight=1.0, retain_weight=0.0)
    np.testing.assert_allclose(2 / 2.5 * sp(-2.5 * 12 / 8), 0.018596, atol=1e-6)
    np.testing.assert_allclose(value(simnpo), 2 / 2.5 * sp(-2.5 * 12 / 8), rtol=1e-5)
    both = value(losses.simnpo(S, N, PAIR_LABELS, ALL))
    np.testing.assert_allclose(both, 0.125 * 2 / 4.5 * sp(-4.5 * 12 / 8) + 10 / 5, rtol=1e-5)
    npo = losses.npo(S, R, PAIR_LABELS, ALL, N, forget_weight=3.0)
    np.testing.assert_allclose(value(npo), 3 * 20 * sp(-0.05) + 10 / 5, rtol=1e-5)
