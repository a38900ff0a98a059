"""Published facts and hand-worked values of further reward shapes, links, aggregations and token choices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from facts_test import ALL, LL, LW, PL, PW, D, N, R, S, sig, sp, value, value_of

from alignax import losses
from alignax.types import ConfigError


def gradient(function, at):
    return np.asarray(jax.grad(lambda x: value_of(function(x)))(at))


def zeros(x):
    return jnp.zeros_like(x)


def pair_of(chosen, rejected):
    return jnp.array([[chosen, rejected]])


def ratios(loss, chosen, rejected, **hyper):
    """The loss at these log-ratios."""
    x = pair_of(chosen, rejected)
    return value(loss(x, zeros(x), **hyper))


def slopes(loss, chosen, rejected, **hyper):
    x = pair_of(chosen, rejected)
    return gradient(lambda s: loss(s, zeros(s), **hyper), x)[0]


def test_chi_po():
    by_hand = sp(-0.1 * (math.e + 1 - math.exp(-0.5) + 0.5))
    np.testing.assert_allclose(by_hand, 0.528778, atol=1e-6)
    np.testing.assert_allclose(value(losses.chi_po(S, R)), by_hand, rtol=1e-6)
    # Slope of the reward: beta (1 + e^lr); twice DPO's at the reference, DPO's far below.
    np.testing.assert_allclose(slopes(losses.chi_po, 0.0, 0.0), [-0.1, 0.1], rtol=1e-6)
    np.testing.assert_allclose(slopes(losses.chi_po, -60.0, -60.0), [-0.05, 0.05], rtol=1e-6)
    assert not slopes(losses.chi_po, 3.0, 0.0, reward_bound=0.5).any()
    np.testing.assert_allclose(ratios(losses.chi_po, 3.0, 0.0, reward_bound=0.5), sp(-1.0), rtol=1e-6)
    pure = ratios(losses.chi_po, 1.0, -0.5, mix=0.0)
    np.testing.assert_allclose(pure, sp(-0.1 * (math.e - math.exp(-0.5))), rtol=1e-6)
    assert losses.chi_po(pair_of(25.0, 0.0), pair_of(0.0, 0.0)).metrics["clipped"] == (1, 2)


def test_squared_po():
    by_hand = sp(-0.1 * (math.exp(-1) + 0.5 * math.exp(0.5)))
    np.testing.assert_allclose(by_hand, 0.635311, atol=1e-6)
    np.testing.assert_allclose(value(losses.squared_po(S, R)), by_hand, rtol=1e-6)
    np.testing.assert_allclose(slopes(losses.squared_po, 0.0, 0.0), [-0.05, 0.05], rtol=1e-6)
    assert abs(slopes(losses.squared_po, 1.0, 0.0)[0]) < 1e-8 < slopes(losses.squared_po, 1.5, 0.0)[0]
    assert losses.squared_po(pair_of(0.0, -25.0), pair_of(0.0, 0.0)).metrics["clipped"] == (1, 2)


def test_dr_dpo():
    margins = jnp.array([[15.0, 0.0], [-15.0, 0.0]])
    run = lambda x, **k: losses.dr_dpo(x, zeros(x), **k)
    np.testing.assert_allclose(-math.log((sig(1.5) + sig(-1.5)) / 2), math.log(2))
    np.testing.assert_allclose(value(run(margins)), math.log(2), rtol=1e-6)
    plain = (sp(-1.5) + sp(1.5)) / 2
    np.testing.assert_allclose(plain, 0.951413, atol=1e-6)
    np.testing.assert_allclose(value(run(margins, beta_prime=1e4)), plain, rtol=1e-3)
    np.testing.assert_allclose(value(run(margins, beta_prime=0.01)), sp(-1.5), atol=0.01)
    slope = gradient(run, margins)[:, 0]
    weights = slope / np.array([-0.1 * sig(-1.5), -0.1 * sig(1.5)])
    np.testing.assert_allclose(weights, [sig(1.5), sig(-1.5)], rtol=1e-5)
    np.testing.assert_allclose(weights, [0.817574, 0.182426], atol=1e-6)


def test_c2_dpo():
    np.testing.assert_allclose(value(losses.c2_dpo(S, R)), sp(-0.15) + 2e-4 * 0.5**2, rtol=1e-6)
    np.testing.assert_allclose(value(losses.c2_dpo(S, R, lam=0.1)), sp(-0.15) + 0.1 * 0.25, rtol=1e-6)
    np.testing.assert_allclose(value(losses.c2_dpo(S, R, lam=0.1, penalty="l1")), sp(-0.15) + 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_allclose([sp(-0.15) + 2e-4 * 0.25, sp(-0.15) + 0.025, sp(-0.15) + 0.05],
                               [0.621007, 0.645957, 0.670957], atol=1e-6)
    np.testing.assert_allclose(value(losses.c2_dpo(S, R, lam=0.0)), sp(-0.15), rtol=1e-6)
    extra = gradient(lambda s: losses.c2_dpo(s, R, lam=0.1), S) - gradient(lambda s: losses.dpo(s, R), S)
    np.testing.assert_allclose(extra, [[0.1, 0.1]], rtol=1e-5)  # 2 lam c on both
    with pytest.raises(ConfigError, match="allowed: l2, l1"):
        losses.c2_dpo(S, R, penalty="huber")


def test_focal_po():
    for gamma, digits in ((0.05, 0.601974), (1.0, 0.333721)):
        by_hand = sig(0.15) ** gamma * sp(-0.15)
        np.testing.assert_allclose(by_hand, digits, atol=1e-6)
        np.testing.assert_allclose(value(losses.focal_po(S, R, beta=0.1, gamma=gamma)), by_hand, rtol=1e-6)
    np.testing.assert_allclose(value(losses.focal_po(S, R, beta=0.1, gamma=0.0)), sp(-0.15), rtol=1e-6)
    full = lambda m: slopes(losses.focal_po, m, 0.0, beta=1.0, gamma=1.0)[0]
    p = sig(0.4)
    np.testing.assert_allclose(full(0.4), -(1 - p) * p * (1 + math.log(p)), rtol=1e-5)
    turn = math.log(math.exp(-1) / (1 - math.exp(-1)))
    assert full(turn - 0.1) > 0 > full(turn + 0.1)
    assert slopes(losses.focal_po, turn - 5, 0.0, beta=1.0, gamma=1.0, detach=True)[0] < 0


def test_minor_dpo():
    np.testing.assert_allclose([sp(-0.1), sp(0.1 * (0.5 + 1.0))], [0.644397, 0.770957], atol=1e-6)
    np.testing.assert_allclose(value(losses.minor_dpo(S, R)), sp(-0.1), rtol=1e-6)
    np.testing.assert_allclose(value(losses.minor_dpo(S[:, ::-1], R[:, ::-1])), sp(0.1 * (0.5 + 1.0)), rtol=1e-6)
    assert slopes(losses.minor_dpo, 1.0, -0.5)[1] == 0 == slopes(losses.minor_dpo, 0.0, 0.0)[1]
    np.testing.assert_allclose(ratios(losses.minor_dpo, 1.0, 0.5), ratios(losses.dpo, 1.0, 0.5), rtol=1e-6)


def test_bpo_balanced():
    np.testing.assert_allclose([sp(-0.1 * min(1, 0.5)), sp(-0.1 * min(1, 0.15))], [0.668460, 0.685675], atol=1e-6)
    np.testing.assert_allclose(value(losses.bpo_balanced(S, R, alpha=1.0)), sp(-0.05), rtol=1e-6)
    np.testing.assert_allclose(value(losses.bpo_balanced(S, R)), sp(-0.015), rtol=1e-6)
    assert value(losses.bpo_balanced(S, R, alpha=1.0)) >= sp(-0.15)
    assert slopes(losses.bpo_balanced, 0.1, -0.5)[1] == 0 and slopes(losses.bpo_balanced, 1.0, -0.5)[0] == 0


def test_gpo_links():
    m = 0.1 * D
    expected = {"exponential": (math.exp(-m), 0.860708), "truncated_square": (max(0, 1 - m) ** 2, 0.7225),
                "savage": ((1 / (1 + math.exp(m))) ** 2, 0.213971), "square": ((m - 1) ** 2, 0.7225),
                "hinge": (max(0, 1 - m), 0.85), "logistic": (sp(-m), 0.620957)}
    for link, (by_hand, digits) in expected.items():
        np.testing.assert_allclose(by_hand, digits, atol=1e-6)
        np.testing.assert_allclose(value(losses.gpo(S, R, link=link)), by_hand, rtol=1e-6, err_msg=link)
    np.testing.assert_allclose(value(losses.gpo(S, R, link="square")), 0.1**2 * value(losses.ipo(S, R, N, tau=0.1 / 2)),
                               rtol=1e-5)
    # Local strength of the regulariser, f''(0) / |f'(0)|.
    for link, strength in (("logistic", 0.5), ("exponential", 1), ("square", 1), ("truncated_square", 1), ("hinge", 0)):
        at = lambda m, link=link: losses.gpo(pair_of(1.0, 0.0) * m, zeros(S), beta=1.0, link=link)[0]
        np.testing.assert_allclose(jax.grad(jax.grad(at))(0.0) / -jax.grad(at)(0.0), strength, atol=1e-6)
    with pytest.raises(ConfigError, match="savage"):
        losses.gpo(S, R, link="probit")


def test_rpo_reward_aware():
    kl = lambda a, b: sig(a) * math.log(sig(a) / sig(b)) + sig(-a) * math.log(sig(-a) / sig(-b))
    scores = pair_of(3.0, 1.0)
    run = lambda s=S, scores=scores, **k: losses.rpo_reward_aware(s, R, scores, **{"beta": 0.1} | k)
    expected = {"sq": ((0.15 - 2) ** 2, 3.4225), "bwd_kl": (kl(2, 0.15), 0.273504), "fwd_kl": (kl(0.15, 2), 0.361726)}
    for distance, (by_hand, digits) in expected.items():
        np.testing.assert_allclose(by_hand, digits, atol=1e-6)
        np.testing.assert_allclose(value(run(distance=distance)), by_hand, rtol=1e-5, err_msg=distance)
        at = R + pair_of(2.0 / 0.1, 0.0)
        assert abs(value(run(at, distance=distance))) < 1e-6
        np.testing.assert_allclose(gradient(lambda s, d=distance: run(s, distance=d), at), 0, atol=1e-6)
    np.testing.assert_allclose(gradient(run, S)[0, 0], 0.1 * (sig(0.15) - sig(2)), rtol=1e-5)
    np.testing.assert_allclose(value(run(scores=pair_of(500.0, 0.0))), sp(-0.15), rtol=1e-6)
    eps = math.log(0.9 / 0.1)
    entropy = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    np.testing.assert_allclose(value(run(scores=pair_of(eps, 0.0))), value(losses.cdpo(S, R)) - entropy, rtol=1e-5)
    exo = losses.exo(S, R, label_smoothing=0.1)
    np.testing.assert_allclose(value(run(scores=pair_of(eps, 0.0), distance="fwd_kl")), value(exo), rtol=1e-5)
    np.testing.assert_allclose(value(run(distance="sq")), 0.1**2 * value(losses.ipo(S, R, N, tau=0.1 / 4)), rtol=1e-5)
    np.testing.assert_allclose(value(run(sft_weight=0.01)) - value(run()), 0.01 * 10, rtol=1e-4)


def test_rebel():
    run = lambda s, scores, **k: losses.rebel(s, R, pair_of(*scores), **k)
    np.testing.assert_allclose(value(run(S, (2.0, 0.5), eta=2.0)), (D / 2 - 1.5) ** 2, rtol=1e-6)
    assert value(run(R + pair_of(3.0, 1.0), (3.0, 1.0))) < 1e-10
    np.testing.assert_allclose(gradient(lambda s: run(s, (2.0, 0.5), eta=2.0), R)[0], [-1.5, 1.5], rtol=1e-6)
    ipo = losses.ipo(S, R, N, tau=1 / 2.0)
    np.testing.assert_allclose(value(run(S, (0.5, 0.0), eta=2.0)), value(ipo) / 2**2, rtol=1e-6)
    one = jnp.ones((1, 2, 1), bool)
    # With eta = 1 / beta it is PRDP without clipping, times beta^2.
    prdp = losses.prdp(S[..., None], R[..., None], R[..., None], pair_of(2.0, 0.5), one, ALL, beta=2.0, clip=1e9)
    np.testing.assert_allclose(value(prdp), (D - 1.5 / 2) ** 2, rtol=1e-5)
    np.testing.assert_allclose(value(run(S, (2.0, 0.5), eta=1 / 2.0)), 2.0**2 * value(prdp), rtol=1e-5)


def test_kto_pair():
    by_hand = (1 - sig(0.1 * (1 - 0)) + 1 - sig(0.1 * (1 + 0.5))) / 2
    np.testing.assert_allclose(by_hand, 0.468795, atol=1e-6)
    np.testing.assert_allclose(value(losses.kto_pair(S, R)), by_hand, rtol=1e-6)
    np.testing.assert_allclose(value(losses.kto_pair(R, R)), 0.5)
    low = S - 3.0  # both means below 0: half of APO-zero
    np.testing.assert_allclose(value(losses.kto_pair(low, R)), value(losses.apo_zero(low, R)) / 2, rtol=1e-6)
    np.testing.assert_allclose(gradient(lambda s: losses.kto_pair(s, R), S)[0],
                               [-0.05 * sig(0.1) * sig(-0.1), 0.05 * sig(0.15) * sig(-0.15)], rtol=1e-5)


def test_mpo_mixed_loss():
    state = losses.get("mpo_mixed_loss").init_state()
    run = lambda **k: losses.mpo_mixed_loss(S, R, N, state, **{"shift": "zero"} | k)
    by_hand = 0.8 * sp(-0.15) + 0.2 * (sp(-0.1) + sp(-0.05)) + 10 / 5
    np.testing.assert_allclose(by_hand, 2.759337, atol=1e-6)
    np.testing.assert_allclose(value(run()), by_hand, rtol=1e-6)
    only = {"preference_weight": 0.0, "quality_weight": 0.0, "generation_weight": 0.0}
    np.testing.assert_allclose(value(run(**only | {"preference_weight": 1.0})), value(losses.dpo(S, R)), rtol=1e-6)
    np.testing.assert_allclose(value(run(**only | {"generation_weight": 1.0})), 10 / 5, rtol=1e-6)
    quality = run(**only | {"quality_weight": 1.0}, shift="running")
    bco = losses.bco(S, R, pair_of(1.0, 0.0), ALL, jnp.ones(1), state, beta=0.1)
    np.testing.assert_allclose(value(quality), 2 * value(bco), rtol=1e-6)
    for key in state:
        np.testing.assert_allclose(quality.new_state[key], bco.new_state[key], rtol=1e-6)
    two = losses.mpo_mixed_loss(jnp.tile(S, (2, 1)), jnp.tile(R, (2, 1)), jnp.array([[5.0, 8.0], [20.0, 8.0]]), state,
                                **only | {"generation_weight": 1.0}, nll="tokens")
    np.testing.assert_allclose(value(two), 20 / 25, rtol=1e-6)


def test_alpha_dpo():
    # The state that leads to the catalogue's M = 0.1 and s = 0.5 with momentum 1.
    state = {"mean": jnp.float32(0.1), "std": jnp.float32(0.5)}
    run = lambda s=S, **k: losses.alpha_dpo(s, R, N, state, **{"momentum": 1.0, "alpha": 0.05, "gamma_ratio": 0.4} | k)
    u, gap = PW - PL, (PW - PL) - (-11 / 5 + 11.5 / 8)
    np.testing.assert_allclose([u, gap], [-0.5, 0.2625])
    by_hand = sp(-2.5 * (u - (0.4 + 0.05 * (gap - 0.1) / 0.5)))
    np.testing.assert_allclose(by_hand, 2.387028, atol=1e-6)
    np.testing.assert_allclose(value(run()), by_hand, rtol=1e-6)
    np.testing.assert_allclose(value(run(alpha=0.0)), value(losses.simpo(S, N, beta=2.5, gamma=2.5 * 0.4)), rtol=1e-6)
    margin = 2.5 * (u - (0.4 + 0.05 * (gap - 0.1) / 0.5))
    np.testing.assert_allclose(gradient(run, S)[0], [-2.5 / 5 * sig(-margin), 2.5 / 8 * sig(-margin)], rtol=1e-5)
    fresh = losses.get("alpha_dpo").init_state()
    two = losses.alpha_dpo(jnp.concatenate([S, R]), jnp.concatenate([R, R]), jnp.concatenate([N, N]), fresh)
    np.testing.assert_allclose(two.new_state["mean"], 0.1 * gap / 2, rtol=1e-5)
    np.testing.assert_allclose(two.new_state["std"], 0.1 * gap / math.sqrt(2), rtol=1e-5)
    alone = losses.alpha_dpo(S, R, N, fresh)  # one pair has no deviation yet: z = 0
    np.testing.assert_allclose(value(alone), sp(-2.5 * (u - 0.6)), rtol=1e-6)


def test_simper():
    np.testing.assert_allclose(-math.exp(PW) + math.exp(PL), 0.087795, atol=1e-6)
    np.testing.assert_allclose(value(losses.simper(S, N)), -math.exp(PW) + math.exp(PL), rtol=1e-6)
    np.testing.assert_allclose(gradient(lambda s: losses.simper(s, N), S)[0],
                               [-math.exp(PW) / 5, math.exp(PL) / 8], rtol=1e-5)


def test_mapo_margin():
    f = lambda e: 0.5 * e / (math.exp(0.5 * e) - 1)
    run = lambda w, r, **k: losses.mapo_margin(pair_of(-w, -r), jnp.ones((1, 2)), **k)
    by_hand = 0.2 + 0.1 * sp(-(f(0.2) - f(0.3)))
    np.testing.assert_allclose([f(0.2), f(0.3), by_hand], [0.950833, 0.926874, 0.268124], atol=1e-6)
    np.testing.assert_allclose(value(run(0.2, 0.3)), by_hand, rtol=1e-6)
    np.testing.assert_allclose(value(run(0.2, 0.3, steps=1000.0)), 0.2, atol=1e-6)
    np.testing.assert_allclose(value(run(0.4, 0.4)), 0.4 + 0.1 * math.log(2), rtol=1e-6)
    np.testing.assert_allclose(value(run(0.2, 0.3, beta=0.0)), 0.2, rtol=1e-6)
    near, far = (gradient(lambda s: losses.mapo_margin(s, jnp.ones((1, 2))), pair_of(-e, -e)) for e in (1e-7, 1e-3))
    np.testing.assert_allclose(near, far, rtol=1e-3)


def test_triple_po():
    np.testing.assert_allclose([sp(-0.01 * 2) + 2, sp(-(2 * (PW - PL) - 0.5)) + 2], [2.683197, 3.701413], atol=1e-6)
    np.testing.assert_allclose(value(losses.tpo_triple(S, N)), sp(-0.01 * 2) + 10 / 5, rtol=1e-6)
    np.testing.assert_allclose(value(losses.tpo_l(S, N)), sp(-(2 * (PW - PL) - 0.5)) + 10 / 5, rtol=1e-6)
    np.testing.assert_allclose(value(losses.tpo_triple(S, N, beta=0.1)), value(losses.cpo(S, N)), rtol=1e-6)
    triple, lengths = jnp.array([[-6.0, -10.0, -12.0]]), jnp.array([[4.0, 5.0, 8.0]])
    np.testing.assert_allclose(value(losses.tpo_triple(triple, lengths)), sp(-0.02) + 6 / 4, rtol=1e-6)
    slope = gradient(lambda s: losses.tpo_l(s, lengths), triple)[0]
    np.testing.assert_allclose(slope[0], -1 / 4, rtol=1e-6)  # the gold answer: NLL only
    assert not gradient(lambda s: losses.tpo_triple(s, lengths, alpha=0.0), triple)[0, 0]
    with pytest.raises(ConfigError, match="gold, chosen, rejected"):
        losses.tpo_triple(jnp.zeros((1, 4)), jnp.ones((1, 4)))


MASK = jnp.arange(8)[None, None] < jnp.array([[[5], [8]]])
LONG = jnp.where(MASK, jnp.array([[[LW / 5], [LL / 8]]]), 99.0)  # log-ratios against a reference of 0
NONE = zeros(LONG)


def test_ld_dpo():
    run = lambda x=LONG, **k: losses.ld_dpo(x, NONE, MASK, **k)
    by_hand = sp(-0.1 * (1 - (5 * -0.0625 + 0.5 * 3 * -0.0625)))
    np.testing.assert_allclose(by_hand, 0.625305, atol=1e-6)
    np.testing.assert_allclose(value(run()), by_hand, rtol=1e-6)
    np.testing.assert_allclose(value(run(alpha=1.0)), sp(-0.15), rtol=1e-6)
    tail = gradient(lambda x: run(x, alpha=0.0), LONG)[0]
    assert not tail[1, 5:].any() and tail[1, :5].all() and tail[0, :5].all() and not tail[0, 5:].any()
    even = MASK.at[0, 1].set(MASK[0, 0])
    equal = losses.ld_dpo(LONG, NONE, even, alpha=0.3)
    np.testing.assert_allclose(value(equal), sp(-0.1 * (1 + 5 * 0.0625)), rtol=1e-6)


def test_sampo():
    ids = jnp.array([3], jnp.uint32)
    run = lambda x, key, **k: losses.sampo(x, NONE, MASK, ids, key, **k)
    np.testing.assert_allclose(value(run(LONG, jax.random.key(0))), sp(-0.1 * 5 * (0.2 + 0.0625)), rtol=1e-6)
    slope = jax.jit(lambda x, key: jax.grad(lambda y: value_of(run(y, key)))(x))
    kept = np.stack([np.asarray(slope(LONG, jax.random.key(i)))[0] != 0 for i in range(60)])
    assert (kept[:, 0, :5]).all() and not kept[:, 0, 5:].any()  # the shorter keeps all
    assert (kept[:, 1].sum(-1) == 5).all()
    share = kept[:, 1].mean(0)  # uniform over positions: 5/8 each, +-3.5 standard errors
    assert (np.abs(share - 5 / 8) < 3.5 * math.sqrt(5 / 8 * 3 / 8 / 60)).all()
    uneven = LONG.at[0, 1].set(jnp.arange(8.0))
    same = losses.sampo(uneven, uneven, MASK, ids, jax.random.key(1))
    np.testing.assert_allclose(value(same), math.log(2), rtol=1e-6)  # the same positions for policy and reference
    other = losses.sampo(uneven, uneven, MASK, ids, jax.random.key(1), independent=True)
    assert abs(value(other) - math.log(2)) > 1e-3


def test_conf_po():
    tokens = jnp.log(jnp.array([[[0.9, 0.9, 0.1, 0.5], [0.5, 0.2, 0.5, 0.5]]]))
    mask = jnp.array([[[1, 1, 1, 0], [1, 1, 0, 0]]], bool)
    run = lambda t=tokens, m=mask, **k: losses.conf_po(t, m, **k)
    by_hand = sp(-(2 * (math.log(0.1) - math.log(0.2)) - 0.5))
    np.testing.assert_allclose(value(run()), by_hand, rtol=1e-6)
    slope = gradient(run, tokens)[0]
    assert {(int(k), int(t)) for k, t in zip(*np.nonzero(slope), strict=True)} == {(0, 2), (1, 1)}
    flat = jnp.full((1, 2, 4), math.log(0.3))
    assert value(run(flat)) == 0 and not gradient(run, flat).any()
    single = jnp.zeros_like(mask).at[..., 0].set(True)
    assert value(run(tokens, single)) == 0
    ref = tokens - 0.25
    with_ref = losses.conf_po_dpo(tokens + jnp.array([[[0.5], [0.0]]]), ref, mask)
    np.testing.assert_allclose(value(with_ref), sp(-0.1 * (0.75 - 0.25)), rtol=1e-5)


def test_humanline():
    x = jnp.array([[[0.5, 3.0, 7.0], [-4.0, -0.25, 7.0]]])
    mask = jnp.array([[[1, 1, 0], [1, 1, 0]]], bool)
    run = lambda x: losses.humanline(x, zeros(x), mask)
    np.testing.assert_allclose(value(run(x)), sp(-0.1 * (0.5 + 1.5 - (-1 - 0.25))), rtol=1e-6)
    slope = gradient(run, x)[0]
    assert {(int(k), int(t)) for k, t in zip(*np.nonzero(slope), strict=True)} == {(0, 0), (1, 1)}
    assert run(x).metrics["unclipped"] == (2, 4)
    wide = losses.humanline(x, zeros(x), mask, log_low=-1e9, log_high=1e9)
    np.testing.assert_allclose(value(wide), sp(-0.1 * (3.5 + 4.25)), rtol=1e-6)
    start = gradient(run, zeros(x))
    np.testing.assert_allclose(start[0, :, :2], [[-0.05] * 2, [0.05] * 2], rtol=1e-6)


def test_span_dpo():
    span = zeros(MASK).at[0, 1, 2:4].set(True)
    run = lambda x=LONG, **k: losses.span_dpo(x, NONE, span, MASK, **k)
    np.testing.assert_allclose(value(run(gamma=1.0)), sp(-0.15), rtol=1e-6)
    np.testing.assert_allclose(value(run()), sp(-0.1 * (0.5 * 1 - (2 + 0.5 * 6) * -0.0625)), rtol=1e-6)
    alone = gradient(lambda x: run(x, gamma=0.0), LONG)[0]
    assert not alone[0].any() and alone[1, 2:4].all() and not alone[1, :2].any()
    np.testing.assert_allclose(value(run(gamma=0.0)), sp(0.1 * 2 * -0.0625), rtol=1e-6)
    slope = gradient(run, LONG)[0, 1]
    np.testing.assert_allclose(slope[2] / slope[0], 1 / 0.5, rtol=1e-6)


def test_dft():
    tokens, mask = jnp.log(jnp.array([[[0.5, 0.2, 0.9]]])), jnp.array([[[1, 1, 0]]], bool)
    run = lambda t: losses.dft(t, mask)
    np.testing.assert_allclose(-0.5 * math.log(0.5), 0.346574, atol=1e-6)
    np.testing.assert_allclose(value(run(tokens)), -(0.5 * math.log(0.5) + 0.2 * math.log(0.2)) / 2, rtol=1e-6)
    np.testing.assert_allclose(gradient(run, tokens)[0, 0], [-0.5 / 2, -0.2 / 2, 0], rtol=1e-6)
