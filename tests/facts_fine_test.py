"""Published facts and hand-worked values of methods that look inside the response: tokens, steps, turns, values.

Two completions of three tokens unless a test says otherwise: log-ratios l_w = (1, 0.5, -0.25), l_l = (-0.5, 0.25, -1).
"""

import csv
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from facts_test import sig, sp, value, value_of

from alignax import losses
from alignax.types import ConfigError

T = jnp.array([[[-1.0, -2.0, -0.5], [-1.5, -0.75, -3.0]]])
W, X = (1.0, 0.5, -0.25), (-0.5, 0.25, -1.0)
REF = T - jnp.array([[W, X]])
MASK = jnp.ones((1, 2, 3), bool)
ONES = jnp.ones((1, 2, 3))
KL = jnp.array([[[0.1, 0.2, 0.3], [0.3, 0.1, 0.4]]])
LOG2 = math.log(2)


def steps(*ids):
    return jnp.array([ids], jnp.int32)


def gradient(function, at):
    return np.asarray(jax.grad(lambda x: value_of(function(x)))(at))


def dpo(weights=ONES, beta=0.1):
    """DPO on weighted sums, by hand."""
    w, x = (float((np.asarray(weights)[0, k] * np.asarray(r)).sum()) for k, r in enumerate((W, X)))
    return sp(-beta * (w - x))


def near(result, expected, rtol=1e-6):
    np.testing.assert_allclose(value(result), expected, rtol=rtol)


AT_REFERENCE = {
    "sparse_po": lambda r: losses.sparse_po(T, r, 0 * KL, 2 * ONES, 3 * ONES, MASK),
    "sparse_po:common": lambda r: losses.sparse_po_common(T, r, 0 * KL, 2 * ONES, MASK),
    "sparse_po:mapo": lambda r: losses.sparse_po_mapo(T, r, 0 * KL, 0.3 * ONES, MASK),
    "bmc": lambda r: losses.bmc(T, r, MASK, MASK),
    "step_dpo": lambda r: losses.step_dpo(T, r, steps((0, 0, 1), (0, 1, 1)), steps((1, 2, 3), (1, 4, 5)), MASK),
    "scdpo": lambda r: losses.scdpo(T, r, steps((0, 0, 1), (0, 1, 1)), steps((1, 2, 3), (1, 4, 5)), MASK),
    "sdpo": lambda r: losses.sdpo(T, r, steps((0, 1, 2), (0, 1, 2)), MASK),
    "dmpo": lambda r: losses.dmpo(T, r, steps((0, 1, 2), (0, 0, 1)), MASK),
    "multi_turn_dpo": lambda r: losses.multi_turn_dpo(T.sum(-1), r.sum(-1)),
    "implicit_prm:dpo": lambda r: losses.implicit_prm_dpo(T.sum(-1), r.sum(-1)),
}


@pytest.mark.parametrize("name", AT_REFERENCE)
def test_a_pair_at_the_reference_costs_log_two(name):
    near(AT_REFERENCE[name](T), LOG2)
    assert abs(value(AT_REFERENCE[name](REF)) - LOG2) > 1e-3


# --- token weights ------------------------------------------------------------------------------------------------


def test_sparse_po():
    u, d = 2 * (1.25 + 1.25), 0.5 * (0.8 - 0.6)
    near(losses.sparse_po(T, REF, KL, 2 * ONES, 0.5 * ONES, MASK), sp(-0.8 * (u - d)))
    run = lambda up, down, **k: losses.sparse_po(T, REF, KL, up, down, MASK, beta=0.1, **k)
    near(run(ONES, ONES), value(losses.tdpo1(T, REF, KL, MASK)))
    near(run(ONES, 0 * ONES), dpo())
    near(run(ONES, 0 * ONES, reward_l1=0.01, kl_l1=5.0), dpo() + 0.01 * 6)
    # One mask in both places, its size counted once: half of either coefficient.
    weights = jnp.array([[[0.5, 0.0, 2.0], [1.0, 0.25, 0.0]]])
    common = losses.sparse_po_common(T, REF, KL, weights, MASK, beta=0.1, l1=0.02)
    near(common, value(run(weights, weights, reward_l1=0.01, kl_l1=0.01)))
    near(common, value(losses.sparse_po_mapo(T, REF, KL, weights, MASK, beta=0.1)) + 0.02 * 3.75)
    learned = jax.grad(lambda m: value_of(losses.sparse_po_common(T, REF, KL, m, MASK)))(weights)
    assert (np.abs(learned) > 1e-4).all()
    fixed = jax.grad(lambda m: value_of(losses.sparse_po_mapo(T, REF, KL, m, MASK)))(weights)
    assert not fixed.any()


def test_bmc_weighs_unsure_tokens_of_the_diff():
    logps = jnp.log(jnp.array([[[0.5, 0.1, 0.8], [0.25, 0.9, 0.4]]]))
    ref = logps - jnp.array([[W, X]])
    diff = jnp.array([[[True, True, False], [False, True, False]]])
    lam = np.array([[1 + 2, 1 + 3, 1], [1, 1 + 1 / 0.9, 1]])  # pi = 0.5 gives 3; pi = 0.1, held at delta 3, gives 4
    near(losses.bmc(logps, ref, diff, MASK, beta=0.1), dpo([lam]))
    near(losses.bmc(logps, ref, ~MASK, MASK, beta=0.1), dpo())
    near(losses.bmc(logps, ref, diff, MASK, beta=0.1, delta=1.0), dpo(1 + diff))
    theirs = 1 + np.asarray(diff[0]) * np.minimum(np.exp(-np.asarray(ref[0], np.float64)), 3)
    both = lam * np.asarray(logps[0]) - theirs * np.asarray(ref[0])
    near(losses.bmc(logps, ref, diff, MASK, beta=0.1, ref_weights="self"), sp(-0.1 * (both[0].sum() - both[1].sum())),
         rtol=1e-5)
    slope = sig(-0.1 * float((lam[0] * W).sum() - (lam[1] * X).sum()))
    np.testing.assert_allclose(gradient(lambda t: losses.bmc(t, ref, diff, MASK, beta=0.1), logps)[0],
                               -0.1 * slope * lam * [[1], [-1]], rtol=1e-5)
    with pytest.raises(ConfigError, match="allowed: policy, self"):
        losses.bmc(logps, ref, diff, MASK, ref_weights="both")


# --- steps and turns ----------------------------------------------------------------------------------------------


def test_step_dpo_compares_the_first_step_that_differs():
    """The prefix is shared (same ids, same log-probs); step 1 is tokens 1-2 of one and 1 of the other."""
    ids, targets = steps((0, 1, 1, 2), (0, 1, 2, 2)), steps((7, 1, 2, 3), (7, 4, 2, 3))
    logps = jnp.array([[[-1.0, -2.0, -0.5, -1.0], [-1.0, -0.75, -3.0, -2.0]]])
    ref = logps - jnp.array([[[0.5, 1.0, 0.5, 9.0], [0.5, 0.25, 7.0, 3.0]]])
    mask = jnp.ones((1, 2, 4), bool)
    near(losses.step_dpo(logps, ref, ids, targets, mask), sp(-0.4 * (1.5 - 0.25)))
    moved = gradient(lambda t: losses.step_dpo(t, ref, ids, targets, mask), logps)[0] != 0
    np.testing.assert_array_equal(moved, [[False, True, True, False], [False, True, False, False]])
    near(losses.scdpo(logps, ref, ids, targets, mask, beta=0.4), sp(-0.4 * (10.5 - 10.25)))
    # The prefix cancels, so that scoring it or not gives one loss; sharing none is DPO on the sums.
    cut = ids.at[:, :, 0].set(-1)
    near(losses.scdpo(logps, ref, cut, targets, mask), value(losses.scdpo(logps, ref, ids, targets, mask)))
    near(losses.step_dpo(logps, ref, cut, targets, mask), value(losses.step_dpo(logps, ref, ids, targets, mask)))
    near(losses.dpo(logps.sum(-1), ref.sum(-1)), value(losses.scdpo(logps, ref, ids, targets, mask)))
    other = targets.at[0, 1, 0].set(9)
    near(losses.step_dpo(logps, ref, ids, other, mask), LOG2)  # equal log-ratios on the first step
    near(losses.scdpo(logps, ref, ids, other, mask), sp(-0.1 * (11.0 - 10.75)))
    # One step each: DPO. Equal texts: nothing to compare.
    one = jnp.zeros((1, 2, 4), jnp.int32)
    for loss in (losses.step_dpo, losses.scdpo):
        near(loss(logps, ref, one, other, mask, beta=0.1), sp(-0.1 * (11.0 - 10.75)))
        near(loss(logps, ref, ids, steps((7, 1, 2, 3), (7, 1, 2, 3)), mask), LOG2)
    # A response that ends inside what the other goes on with: the step that it lacks counts for the other alone.
    ended = mask.at[0, 1, 2:].set(False)
    same = steps((7, 1, 2, 3), (7, 1, 0, 0))
    near(losses.step_dpo(logps, ref, steps((0, 0, 1, 1), (0, 0, 1, 1)), same, ended), sp(-0.4 * 9.5))


def test_svpo():
    logps, ref = T.sum(-1), REF.sum(-1)
    reward, q = jnp.arctanh(jnp.array([[0.6, 0.2]])), jnp.array([[1.0, -1.0]])
    squared = ((0.6 - 1) ** 2 + (0.2 + 1) ** 2) / 2
    near(losses.svpo(logps, ref, reward, q, value_weight=0.5, margin_weight=2.0, margin=0.5),
         dpo() + 0.5 * squared + 2 * (0.5 - 0.4), rtol=1e-5)
    near(losses.svpo(logps, ref, reward, q, value_weight=0.0, link="logistic"), dpo() + sp(-0.4))
    assert float(losses.svpo(logps, ref, reward, q).terms["margin"].values[0]) == 0  # ordered, margin 0
    with pytest.raises(ConfigError, match="hinge, logistic"):
        losses.svpo(logps, ref, reward, q, link="square")


def test_sdpo():
    turns = steps((0, 1, 2), (0, 1, 2))
    near(losses.sdpo(T, REF, turns, MASK), dpo())  # whole dialogues with equal turns
    near(losses.sdpo(T, REF, steps((-1, 1, -1), (-1, 1, -1)), MASK), sp(-0.1 * (0.5 - 0.25)))
    # A shared first turn has equal log-ratios on both sides and cancels.
    shared, ref = T.at[0, 1, 0].set(T[0, 0, 0]), REF.at[0, 1, 0].set(REF[0, 0, 0])
    near(losses.sdpo(shared, ref, turns, MASK), value(losses.sdpo(shared, ref, turns.at[:, :, 0].set(-1), MASK)))
    two = lambda x: jnp.concatenate([x, x])
    uneven = jnp.concatenate([turns, steps((0, 0, 1), (0, 1, 2))])
    dropped = losses.sdpo(two(T), two(REF), uneven, two(MASK))
    near(dropped, dpo())
    assert dropped.metrics["equal_turns"] == (1, 2)
    cut = np.array([[1, 1, 1], [1, 1, 0]])
    near(losses.sdpo(two(T), two(REF), uneven, two(MASK), unequal="truncate"), (dpo() + dpo([cut])) / 2)
    with pytest.raises(ConfigError, match="drop, truncate"):
        losses.sdpo(T, REF, turns, MASK, unequal="pad")


def test_dmpo_discounts_turns():
    def phi(gamma, count, **option):
        """The weights of the chosen trajectory, from its gradient."""
        ids = steps((*range(count), *(-1,) * (3 - count)), (-1, -1, -1))
        g = gradient(lambda t: losses.dmpo(t, t, ids, MASK, beta=2.0, gamma=gamma, **option), T)[0, 0]
        return -g[:count] / (2.0 * 0.5)

    by_hand = [0.7**t * (1 - 0.7 ** (3 - t)) / (1 - 0.7**3) for t in range(3)]
    np.testing.assert_allclose(by_hand, (1, 0.54338, 0.22374), atol=1e-5)
    np.testing.assert_allclose(phi(0.7, 3), by_hand, rtol=1e-5)
    printed = [(1 - 0.7 ** (3 - t)) / (1 - 0.7**3) for t in range(3)]
    np.testing.assert_allclose(printed, (1, 0.77626, 0.45662), atol=1e-5)
    np.testing.assert_allclose(phi(0.7, 3, phi_leading_discount=False), printed, rtol=1e-5)
    np.testing.assert_allclose(phi(1.0, 2), (1, 0.5), rtol=1e-6)
    np.testing.assert_allclose(phi(0.999999, 3), (1, 2 / 3, 1 / 3), rtol=1e-5)
    np.testing.assert_array_equal(phi(0.0, 3), (1, 0, 0))
    near(losses.dmpo(T, REF, steps((0, 0, 0), (5, 5, 5)), MASK), dpo())  # one turn each
    second = 0.5 * (1 - 0.5) / (1 - 0.25)  # gamma = 0.5, T = 2
    near(losses.dmpo(T, REF, steps((0, 1, -1), (3, 3, 4)), MASK, gamma=0.5),
         sp(-0.1 * (1 + second * 0.5 - (-0.25 + second * -1))))


def test_multi_turn():
    sums, ref = T.sum(-1), REF.sum(-1)
    near(losses.multi_turn_dpo(sums, ref), value(losses.dpo(sums, ref)))
    near(losses.multi_turn_dpo(sums, ref, nll_weight=0.1), dpo() + 0.1 * 3.5)
    labels, exists = jnp.array([[1.0, 0.0]]), jnp.ones((1, 2), bool)
    near(losses.m_kto(sums, ref, labels, exists, sums, ref, beta=0.5),
         (sig(-0.5 * (1.25 - 0)) + sig(-0.5 * (0 + 1.25))) / 2)  # z0 = mean (1.25, -1.25) = 0
    near(losses.m_kto(sums, ref, labels, exists, sums, ref), value(losses.kto(sums, ref, labels, exists, sums, ref)))


def test_per_step_advantages():
    advantages = jnp.array([[[0.5, 0.5, -1.0], [0.0, 0.0, 2.0]]])
    by_hand = (3 * math.exp(0.25) + 0.5 * math.exp(-0.5) + 2.25 + 3 * math.exp(1)) / 2
    near(losses.per_step_advantage(T, advantages, MASK, beta=2.0), by_hand)
    for plain in (losses.per_step_advantage(T, 0 * T, MASK), losses.per_step_advantage(T, advantages, MASK, beta=1e8)):
        near(plain, (3.5 + 5.25) / 2)
    held = losses.per_step_advantage(T, advantages, MASK, max_log_weight=1.0)
    near(held, (3 * math.exp(0.5) + 0.5 * math.exp(-1) + 2.25 + 3 * math.exp(1)) / 2)
    assert held.metrics["clipped"] == (1, 6)


# --- trees --------------------------------------------------------------------------------------------------------


def tree(sums, scores, hidden=None, ids=None):
    """tpo_tree on single-step responses (or with ids) of which every token has its log-ratio."""
    ratio = jnp.asarray(sums, jnp.float32)[None]
    size, length = ratio.shape[1:]
    hidden = jnp.eye(size)[None, :, None, :] * jnp.ones((1, 1, length, 1)) if hidden is None else hidden
    ids = jnp.zeros((1, size, length), jnp.int32) if ids is None else ids
    return losses.tpo_tree(ratio, 0 * ratio, hidden, ids, jnp.array([scores]), jnp.ones(ratio.shape, bool),
                           jnp.ones((1, size), bool))


def test_tpo_tree_weights():
    """Orthogonal steps: plain margins under the ranking weights."""
    lam = lambda a, b, i, j: abs(2**a - 2**b) * abs(1 / math.log(1 + i) - 1 / math.log(1 + j))
    found = lam(1, 0.5, 1, 2), lam(1, 0, 1, 3), lam(0.5, 0, 2, 3)
    np.testing.assert_allclose(found, (0.31191, 0.72135, 0.07824), atol=1e-5)
    near(tree([[3.0], [2.0], [0.5]], [1.0, 0.5, 0.0]),
         found[0] * sp(-0.5 * 1) + found[1] * sp(-0.5 * 2.5) + found[2] * sp(-0.5 * 1.5))
    # Equal values are not compared and may change places.
    near(tree([[3.0], [2.0], [0.5]], [1.0, 0.5, 0.5]), value(tree([[3.0], [0.5], [2.0]], [1.0, 0.5, 0.5])))


def test_tpo_tree_steps():
    weight = (2 - 1) * (1 / math.log(2) - 1 / math.log(3))
    alike = jnp.ones((1, 2, 2, 3))
    ids = steps((0, 1), (0, 1))
    # Parallel states double a step's difference, opposite ones cancel it.
    near(tree([[1.0, 2.0], [0.5, 0.0]], [1.0, 0.0], alike, ids), weight * sp(-0.5 * 2 * 2.5), rtol=1e-5)
    turned = alike.at[0, 1, 1].set(-1.0)
    near(tree([[1.0, 2.0], [0.5, 0.0]], [1.0, 0.0], turned, ids), weight * sp(-0.5 * 2 * 0.5), rtol=1e-5)
    # A step with equal log-ratios adds nothing, whatever its states; one without a partner counts once.
    near(tree([[1.0, 2.0], [1.0, 0.0]], [1.0, 0.0], turned.at[0, 1, 0].set(5.0), ids), weight * sp(0.0), rtol=1e-5)
    near(tree([[1.0, 2.0], [0.5, 0.25]], [1.0, 0.0], alike, steps((0, 1), (0, 0))),
         weight * sp(-0.5 * (2 * (1 - 0.75) + 2)), rtol=1e-5)
    # At an angle the cosine has a slope, which must not be followed.
    angled = turned.at[0, :, :, 0].set(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    states = jax.grad(lambda h: value_of(tree([[1.0, 2.0], [0.5, 0.0]], [1.0, 0.0], h, ids)))(angled)
    assert not states.any()


# --- offline reinforcement learning -------------------------------------------------------------------------------


def soft_bellman():
    """Two tokens of {a, b}, uniform reference, beta 1, reward 1 for "aa": policy, reference, V, R of the four paths."""
    root, after = math.log((math.e + 3) / 4), {"a": math.log((math.e + 1) / 2), "b": 0.0}
    np.testing.assert_allclose((root, after["a"]), (0.35737, 0.62011), atol=1e-5)
    rows, values, rewards = [], [], []
    for path in ("aa", "ab", "ba", "bb"):
        reward = float(path == "aa")
        rows.append([after[path[0]] - root, reward - after[path[0]]])
        values.append([root, after[path[0]]])
        rewards.append(reward)
    ratio = jnp.array([rows])
    ref = jnp.full(ratio.shape, -math.log(2))
    np.testing.assert_allclose(jnp.exp((ratio + ref).sum(-1)).sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[0, 0], (0.26274, 0.37989), atol=1e-5)
    return ratio + ref, ref, jnp.array([values]), jnp.array([rewards])


def oreos(logps, ref, v, kl, scores, mask, ids, **hyper):
    return (losses.oreo(logps, ref, v, kl, scores, mask, **hyper),
            losses.oreo_step(logps, ref, v, kl, scores, ids, mask, **hyper),
            losses.oreo_response(logps, ref, v, kl, scores, mask, **hyper))


def test_oreo_residuals_vanish_at_the_soft_optimum():
    logps, ref, v, rewards = soft_bellman()
    mask, ids = jnp.ones(logps.shape, bool), jnp.zeros(logps.shape, jnp.int32)
    for result in oreos(logps, ref, v, 0 * logps, rewards, mask, ids, beta=1.0):
        assert value(result) < 1e-12
        for name in ("policy", "value"):
            live = np.asarray(result.terms[name].weight)
            np.testing.assert_allclose(np.asarray(result.terms[name].values)[live], 0, atol=1e-12)


def test_oreo_by_hand():
    v, scores = jnp.array([[[0.2, 0.4, 0.1], [0.3, 0.3, 0.3]]]), jnp.array([[1.0, 0.0]])
    beta, mask = 0.5, MASK.at[0, 1].set(False)  # one response
    suffix = [1.25, 0.25, -0.25]
    token = [(a - 1 + beta * s) ** 2 for a, s in zip((0.2, 0.4, 0.1), suffix, strict=True)]
    step = [(0.2 - 1 + beta * 1.25) ** 2, (0.1 - 1 - beta * 0.25) ** 2]
    by_hand = (sum(token) / 3, sum(step) / 2, token[0])
    results = oreos(T, REF, v, KL, scores, mask, steps((0, 0, 1), (0, 0, 0)), beta=beta, alpha=0.0)
    for result, expected in zip(results, by_hand, strict=True):
        near(result, 2 * expected, rtol=1e-5)  # at equal values the two residuals are one
    near(oreos(T, REF, v, KL, scores, mask, mask * 0, beta=beta, value_weight=0.0)[0], sum(token) / 3 + 0.01 * 0.2,
         rtol=1e-5)
    # The gradient is that of the step's own tokens.
    logps = [gradient(lambda t, i=i: oreos(t, REF, v, KL, scores, mask, steps((0, 0, 1), (0, 0, 0)), beta=beta)[i],
                      T)[0] for i in range(3)]
    r = [a - 1 + beta * s for a, s in zip((0.2, 0.4, 0.1), suffix, strict=True)]
    np.testing.assert_allclose(logps[0][0], [2 * beta * x / 3 for x in r], rtol=1e-5)
    np.testing.assert_allclose(logps[1][0], [2 * beta * x / 2 for x in (r[0], r[0], r[2])], rtol=1e-5)
    np.testing.assert_allclose(logps[2][0], [2 * beta * r[0]] * 3, rtol=1e-5)
    assert not any(g[1].any() for g in logps)


def test_oreo_keeps_policy_and_value_apart():
    v, scores = jnp.array([[[0.2, 0.4, 0.1], [0.3, 0.3, 0.3]]]), jnp.array([[1.0, 0.0]])
    run = lambda t, v: losses.oreo(t, REF, v, KL, scores, MASK, beta=0.5)
    for name, reached in (("policy", (True, False)), ("value", (False, True)), ("kl", (False, False))):
        gradients = jax.grad(lambda x, name=name: value_of({name: run(*x).terms[name]}))((T, v))
        assert tuple(bool(g.any()) for g in gradients) == reached
    # At the reference the value is regressed on the return; zero loss of the response form is DPO's identity.
    start = losses.oreo(T, T, v, 0 * KL, scores, MASK)
    near({"value": start.terms["value"]}, (0.64 + 0.36 + 0.81 + 3 * 0.09) / 6)
    gap = (1.0 - 0.0) / 0.5
    ratio = jnp.array([[[gap, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    level = jnp.full(v.shape, 1.0 - 0.5 * gap)
    assert value(losses.oreo_response(ratio, 0 * ratio, level, 0 * KL, scores, MASK, beta=0.5)) == 0


def test_ilql_by_hand():
    """The middle token is an observation: no loss there, and the bootstrap reads the next action's value."""
    mask = jnp.array([[[True, False, True]]])
    v = jnp.array([[[0.5, 99.0, 0.2]]])
    q = jnp.array([[[[0.1, 0.3], [9.0, 9.0], [0.4, 0.8]]]])
    target = jnp.array([[[[0.9, 0.6], [9.0, 9.0], [0.1, 0.3]]]])
    logps = jnp.log(jnp.array([[[[0.5, 0.25], [0.1, 0.1], [0.2, 0.5]]]]))
    tokens, rewards = jnp.array([[[-1.0, -9.0, -2.0]]]), jnp.array([[[0.25, 5.0, 1.0]]])
    goal = (0.25 + 0.9 * 0.2, 1.0)
    fit = ((goal[0] - 0.1) ** 2 + (goal[0] - 0.3) ** 2 + (1 - 0.4) ** 2 + (1 - 0.8) ** 2) / 2
    level = (0.7 * 0.1**2 + 0.3 * 0.1**2) / 2  # u = 0.6 - 0.5 and 0.1 - 0.2
    near(losses.ilql(tokens, v, q, target, logps, rewards, mask, gamma=0.9, value_weight=2.0, cql_weight=0.1,
                     bc_weight=0.5), fit + 2 * level + 0.1 * (math.log(8) + math.log(10)) / 2 + 0.5 * 1.5, rtol=1e-5)
    near(losses.imagined_conversations(tokens, v, q, target, logps, rewards, mask),
         value(losses.ilql(tokens, v, q, target, logps, rewards, mask)))
    goal = (0.25 + 0.9 * 1.0, 1.0)
    fit = ((goal[0] - 0.1) ** 2 + (goal[0] - 0.3) ** 2 + (1 - 0.4) ** 2 + (1 - 0.8) ** 2) / 2
    near(losses.ilql_mc_returns(tokens, q, logps, rewards, mask, gamma=0.9, cql_weight=0.0, bc_weight=0.0), fit,
         rtol=1e-5)


def test_the_expectile_of_ilql():
    def loss(v, tau):
        """Two actions whose targets are 0 and 1, one common value."""
        q = jnp.array([[[[0.0, 2.0], [1.0, 1.0]]]])
        out = losses.ilql(jnp.zeros((1, 1, 2)), jnp.full((1, 1, 2), v), q, q, 0 * q, jnp.zeros((1, 1, 2)),
                          jnp.ones((1, 1, 2), bool), expectile=tau)
        return value_of({"value": out.terms["value"]})

    np.testing.assert_allclose(loss(0.3, 0.5), (0.3**2 + 0.7**2) / 4, rtol=1e-6)  # half the mean square
    np.testing.assert_allclose(jax.grad(loss)(0.7, 0.7), 0, atol=1e-7)  # the 0.7-expectile of {0, 1} is 0.7
    assert jax.grad(loss)(0.7, 0.9) < 0 < jax.grad(loss)(0.7, 0.5)


def test_a_lol():
    sums, ref, exists = T.sum(-1), REF.sum(-1), jnp.ones((1, 2), bool)
    scores, v = jnp.array([[1.0, 0.2]]), jnp.array([0.4])
    fit = (0.6**2 + 0.2**2) / 2
    near(losses.a_lol(sums, ref, scores, v, exists, value_weight=0.5), (0.6 * 1.9 * 3.5 + 0) / 2 + 0.5 * fit)
    near(losses.a_lol(sums, sums + 5, scores, v, exists, value_weight=0.0), 0.6 * 0.1 * 3.5 / 2)  # e^-5, held at 0.1
    by_token = [min(max(math.exp(x), 0.1), 1.9) for x in W]
    assert by_token[0] == 1.9
    near(losses.a_lol_seq(T, REF, scores, v, MASK, value_weight=0.0),
         0.6 * (by_token[0] * 1 + by_token[1] * 2 + by_token[2] * 0.5) / 2)
    near(losses.a_lol_ref_free(sums, scores, v, exists, value_weight=0.0), 0.6 * 3.5 / 2)
    near(losses.a_lol_ref_free(sums, scores, v, exists, value_weight=0.0, advantage="reward"),
         (1.0 * 3.5 + 0.2 * 5.25) / 2)
    near(losses.a_lol_kl(sums, ref, scores, v, exists, kappa=0.3, value_weight=0.0), 0.6 * 3.5 / 2 + 0.3 * 0)
    pi = [math.exp(x) for x in (-1, -2, -0.5)], [math.exp(x) for x in (-1.5, -0.75, -3)]
    floor = [[max(p, 0.1) for p in side] for side in pi]
    near(losses.a_lol_gold(T, scores, MASK), (floor[0][0] + 2 * floor[0][1] + 0.5 * floor[0][2]
         + 0.2 * (1.5 * floor[1][0] + 0.75 * floor[1][1] + 3 * 0.1)) / 2)
    with pytest.raises(ConfigError, match="value, reward"):
        losses.a_lol(sums, ref, scores, v, exists, advantage="none")


def test_a_lol_gradients():
    scores, v, exists = jnp.array([[1.0, 0.2]]), jnp.array([0.4]), jnp.ones((1, 2), bool)
    plain = -0.6 / 2 * np.array([[[1.0] * 3, [0.0] * 3]])  # the second advantage is negative: no gradient
    np.testing.assert_allclose(gradient(lambda t: losses.a_lol(t.sum(-1), T.sum(-1), scores, v, exists), T), plain,
                               rtol=1e-6)
    np.testing.assert_allclose(gradient(lambda t: losses.a_lol_seq(t, T, scores, v, MASK), T), plain, rtol=1e-6)
    np.testing.assert_allclose(gradient(lambda t: losses.a_lol_ref_free(t.sum(-1), scores, v, exists), T), plain,
                               rtol=1e-6)
    kl = gradient(lambda t: losses.a_lol_kl(t.sum(-1), REF.sum(-1), scores, v, exists, kappa=0.25), T)
    np.testing.assert_allclose(kl[0, :, 0], [-(0.6 - 0.25) / 2, 0.25 / 2], rtol=1e-6)
    # Only the value term reaches V.
    at = lambda weight: jax.grad(lambda v: value_of(losses.a_lol(T.sum(-1), REF.sum(-1), scores, v, exists,
                                                                 value_weight=weight)))(v)
    np.testing.assert_allclose(at(1.0), [(0.4 - 1) + (0.4 - 0.2)], rtol=1e-5)
    assert not at(0.0).any()


# --- text with scores ---------------------------------------------------------------------------------------------


def test_pretraining_with_preferences():
    scores = jnp.array([[[0.5, 0.5, -1.0], [-2.0, 1.0, 1.0]]])
    mle, everything = 8.75 / 6, -1e9
    near(losses.sft(T, MASK), mle)
    for same in (losses.phf_filtering(T, scores, MASK, threshold=everything),
                 losses.phf_unlikelihood(T, scores, MASK, threshold=everything),
                 losses.phf_rwr(T, scores, MASK, beta=1e9)):
        near(same, mle)
    # The means are 0 and 0: neither document is above 0, one is above -0.5 when a token is made worse.
    kept = losses.phf_filtering(T, scores.at[0, 1, 0].set(-5.0), MASK, threshold=-0.5)
    near(kept, 3.5 / 3)
    assert kept.metrics["kept"] == (1, 2) and value(losses.phf_filtering(T, scores, MASK)) == 0
    un = lambda logp: -math.log(1 - math.exp(logp))
    near(losses.phf_unlikelihood(T, scores, MASK, alpha=0.5),
         (1 + 2 + 0.5 * un(-0.5) + 0.5 * un(-1.5) + 0.75 + 3) / 6)
    weighted = (3 * math.exp(0.25) + 0.5 * math.exp(-0.5) + 1.5 * math.exp(-1) + 3.75 * math.exp(0.5)) / 6
    near(losses.phf_rwr(T, scores, MASK, beta=2.0), weighted)
    near(losses.phf_rwr(T, 3.0 + 0 * scores, MASK, beta=2.0), math.exp(1.5) * mle)
    near(losses.phf_rwr(T, 99.0 + 0 * scores, MASK, beta=2.0), 1000 * mle)


def test_awr():
    scores, v = jnp.array([[[0.5, 0.5, -1.0], [-2.0, 1.0, 1.0]]]), jnp.full((1, 2, 3), 0.25)
    squares = (2 * 0.25**2 + 1.25**2 + 2.25**2 + 2 * 0.75**2) / 6
    nll = (3 * math.exp(0.125) + 0.5 * math.exp(-1.25 / 2) + 1.5 * math.exp(-2.25 / 2) + 3.75 * math.exp(0.375)) / 6
    near(losses.phf_awr(T, v, scores, MASK, alpha=0.3, beta=2.0), 0.3 * nll + 0.7 * squares)
    near(losses.phf_awr(T, v, scores, MASK, alpha=0.3, beta=1e9), 0.3 * 8.75 / 6 + 0.7 * squares)
    near(losses.phf_awr(T, 0 * v, scores, MASK, alpha=1.0, beta=2.0),
         value(losses.phf_rwr(T, scores, MASK, beta=2.0)))
    reached = jax.grad(lambda v: value_of({"nll": losses.phf_awr(T, v, scores, MASK).terms["nll"]}))(v)
    assert not reached.any()


# --- reward models ------------------------------------------------------------------------------------------------


def test_implicit_prm():
    sums, ref, exists = T.sum(-1), REF.sum(-1), jnp.ones((1, 2), bool)
    labels = jnp.array([[1.0, 0.0]])
    near(losses.implicit_prm(sums, ref, labels, exists, beta=0.5), (sp(-0.5 * 1.25) + sp(0.5 * -1.25)) / 2)
    for label in (0.0, 1.0, 0.3):
        near(losses.implicit_prm(sums, sums, label + 0 * labels, exists), LOG2)
    slope = gradient(lambda s: losses.implicit_prm(s, ref, labels, exists, beta=0.5), sums)[0]
    np.testing.assert_allclose(slope, [0.5 * (sig(0.625) - 1) / 2, 0.5 * sig(-0.625) / 2], rtol=1e-6)
    near(losses.implicit_prm_dpo(sums, ref), sp(-0.05 * 2.5))


def test_direct_preference_heads():
    sums, ref = T.sum(-1), REF.sum(-1)
    top = math.log(0.9 / 0.1)
    lowest = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    np.testing.assert_allclose((top, lowest), (2.1972, 0.32508), atol=5e-5)
    head = lambda better, worse, **k: losses.dph(sums, ref, jnp.array([[better, worse]]), policy_weight=0.0, **k)
    near(head(top, -top), 2 * lowest, rtol=1e-5)
    near(head(top / 2, -top / 2, form="contrastive"), lowest, rtol=1e-5)
    near(head(top / 2 + 7, -top / 2 + 7, form="contrastive"), lowest, rtol=1e-5)
    assert value(head(top + 7, -top + 7)) > 2 * lowest + 1
    for form, best in (("separable", (top, -top)), ("contrastive", (top / 2, -top / 2))):
        slope = gradient(lambda r, form=form: losses.dph(sums, ref, r, form=form), jnp.array([best]))
        np.testing.assert_allclose(slope, 0, atol=1e-6)
    near(head(1.0, 0.25, form="contrastive", head_smoothing=0.0), sp(-0.75))
    near(head(1.0, 0.25, head_weight=0.5, head_smoothing=0.0), 0.5 * (sp(-1.0) + sp(0.25)))
    policy = losses.dph(sums, ref, jnp.zeros((1, 2)), head_weight=0.0)
    near(policy, 0.9 * sp(-0.25) + 0.1 * sp(0.25))
    with pytest.raises(ConfigError, match="separable, contrastive"):
        losses.dph(sums, ref, jnp.zeros((1, 2)), form="both")


def test_goal_conditioned_rewards():
    rewards, ids, key = jnp.array([[1.0, 0.25]]), jnp.array([3], jnp.uint32), jax.random.key(0)
    run = lambda hidden, mask=MASK, **k: losses.goal_conditioned_rm(rewards, hidden, mask, ids, key, **k)
    same, bounds = jnp.ones((1, 2, 3, 4)), -2 * math.log(sig(1))
    np.testing.assert_allclose(bounds, 0.62652, atol=1e-5)
    split = jnp.stack([same[:, 0], -same[:, 0]], 1)  # the chosen states agree, the rejected are opposite
    near(run(split), sp(-0.75) + 0.5 * bounds, rtol=1e-5)
    axes = jnp.zeros((1, 2, 3, 4)).at[0, 0, :, 0].set(1.0).at[0, 1, :, 1].set(1.0)
    near(run(axes), sp(-0.75) + 0.5 * (-math.log(sig(1)) + LOG2), rtol=1e-5)
    near(run(0 * same), sp(-0.75) + 0.5 * 2 * LOG2, rtol=1e-5)  # orthogonal throughout: p = q = 1/2
    near(run(axes, contrast_weight=0.0), sp(-0.75))
    near(run(axes, mean_goal=True), value(run(axes)), rtol=1e-5)
    # The source comes before the goal: with two places one is always the first, the other the second.
    order = jnp.zeros((1, 2, 3, 4)).at[0, 0, 0, 0].set(1.0).at[0, 0, 1, 1].set(1.0)
    near(run(order, MASK.at[:, :, 2].set(False)), sp(-0.75) + 0.5 * 2 * LOG2, rtol=1e-5)
    assert value(run(order.at[0, 0, 1].set(order[0, 0, 0]), MASK.at[:, :, 2].set(False))) < sp(-0.75) + LOG2 - 0.1
    empty = run(axes, MASK.at[0, 1].set(False))
    near(empty, sp(-0.75))


def test_the_fine_grained_catalogue_is_covered(shared):
    """Every loss of it, under its id or as variants of it, and the rewards and constructions that are losses too."""
    with (shared / "methods" / "ledger.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["catalogue"] == "fine_grained"]
    wanted = {r["id"] for r in rows if r["owner"] == "losses" and r["kind"] == "loss"}
    stems = {name.split(":")[0] for name in losses.names()}
    assert len(wanted) > 12
    assert sorted(wanted - stems) == []
    others = {"implicit_prm", "dph", "goal_conditioned_rm", "scdpo", "per_step_advantage"}
    assert others <= stems and others <= {r["id"] for r in rows}
