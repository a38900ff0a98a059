"""The toy table of 3D-properties: the theory's identities in float64, what a loss is supplied with, and training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import losses
from alignax.diagnostics import toy, toy_curves
from alignax.ops.reductions import reduce_terms
from alignax.types import REQUESTS, ConfigError

pytestmark = pytest.mark.slow

PAIRS = toy.published_pairs()
P0, Q0 = 0.3, 0.2


def slopes(name: str, p, q, **hyper) -> tuple[np.ndarray, np.ndarray]:
    """(dl/dp, dl/dq) of one pair in float64; p, q: [N] probabilities of the chosen and the rejected."""
    with jax.enable_x64(True):
        loss = losses.get(name, **hyper)
        ones = jnp.ones((1, 2), jnp.float64)

        def value(x):
            logps = jnp.log(x)[None]
            inputs = {"logps": logps, "ref_logps": jnp.log(ones * jnp.array([[P0, Q0]])), "lengths": ones}
            return reduce_terms(loss(inputs))[0]

        found = jax.vmap(jax.grad(value))(jnp.stack([jnp.asarray(p, jnp.float64), jnp.asarray(q, jnp.float64)], -1))
        return np.asarray(found[:, 0]), np.asarray(found[:, 1])


GRID = np.array([(p, q) for p in (1e-6, 0.01, 0.3, 0.7) for q in (1e-9, 1e-3, 0.2, 0.25)]).T


@pytest.mark.parametrize("name,hyper,factor", [
    ("dpo", {"beta": 0.1}, 1.0), ("dpo", {"beta": 2.0}, 1.0), ("ipo", {"tau": 0.3}, 1.0),
    ("flex_dpo", {"beta_chosen": 0.1, "beta_rejected": 0.08}, 0.8),
    ("flex_dpo", {"beta_chosen": 0.1, "beta_rejected": 0.01}, 0.1),
    ("dpo_shift", {"beta": 0.1, "shift": 0.75}, 0.75),
])
def test_the_slopes_stand_in_the_ratio_minus_p_over_q(name, hyper, factor):
    """3D-properties C1: (dl/dq) / (dl/dp) = -(beta-/beta+) p/q for every strength."""
    p, q = GRID
    first, second = slopes(name, p, q, **hyper)
    np.testing.assert_allclose(second / first, -factor * p / q, rtol=1e-10)


def test_dpo_slopes_are_the_formula():
    p, q = GRID
    first, second = slopes("dpo", p, q, beta=0.1)
    pull = 0.1 / (1 + np.exp(0.1 * (np.log(p / P0) - np.log(q / Q0))))
    np.testing.assert_allclose(first, -pull / p, rtol=1e-12)
    np.testing.assert_allclose(second, pull / q, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_powers_as_the_rejected_vanishes(beta):
    """3D-properties C2: dl/dp falls as q^beta, dl/dq grows as q^(beta - 1), with the stated constants."""
    p, q = 0.4, np.array([1e-200, 1e-190]) if beta < 0.5 else np.array([1e-60, 1e-50])
    first, second = slopes("dpo", np.full(2, p), q, beta=beta)
    log_slope = np.diff(np.log(np.abs([first, second])), axis=1)[:, 0] / np.diff(np.log(q))[0]
    np.testing.assert_allclose(log_slope, [beta, beta - 1], atol=1e-6)
    a = (P0 / Q0) ** beta
    np.testing.assert_allclose(first, -a * beta * p ** (-beta - 1) * q ** beta, rtol=1e-6)
    np.testing.assert_allclose(second, a * beta * p ** -beta * q ** (beta - 1), rtol=1e-6)


def test_flex_power_and_the_terms_that_stay():
    """Flex: dl/dq ~ a beta- p^-beta+ q^(beta- - 1). SFT-DPO: dl/dp -> -gamma / p. SLiC: the hinge's two cases."""
    q = np.array([1e-200, 1e-190])
    _, second = slopes("flex_dpo", [0.4, 0.4], q, beta_chosen=0.1, beta_rejected=0.05)
    a = P0 ** 0.1 / Q0 ** 0.05
    np.testing.assert_allclose(second, a * 0.05 * 0.4 ** -0.1 * q ** -0.95, rtol=1e-4)
    first, _ = slopes("sft_dpo", [0.4], [1e-300], beta=0.5, gamma=0.01)
    np.testing.assert_allclose(first, -0.01 / 0.4, rtol=1e-12)
    p, q = np.array([0.3]), np.array([0.2])
    first, second = slopes("slic_hf", p, q, delta=1.0, lam=0.1)
    np.testing.assert_allclose(second / first, -p / (q * 1.1), rtol=1e-12)
    assert slopes("slic_hf", [0.4], [1e-3], delta=1.0, lam=0.1)[1] == 0


def test_token_level_gradients_through_the_softmax():
    """As q -> 0 the logit gradients of both sides have one scale: no blow-up of a single step."""
    with jax.enable_x64(True):
        other, p, beta, q = 0.3, 0.4, 0.1, 1e-12
        chosen = jnp.log(jnp.array([p, other, 1 - p - other]))
        rejected = jnp.log(jnp.array([q, other, 1 - q - other]))

        def loss(first, second):
            logps = jnp.stack([jax.nn.log_softmax(first)[0], jax.nn.log_softmax(second)[0]])[None]
            return losses.dpo(logps, jnp.log(jnp.array([[P0, Q0]])), beta=beta).sum()

        up, down = jax.grad(loss, (0, 1))(chosen, rejected)
        h = beta * (np.log(p / P0) - np.log(q / Q0))
        scale = beta / (1 + np.exp(h))
        np.testing.assert_allclose(up, scale * np.array([-(1 - p), other, 1 - p - other]), rtol=1e-9)
        np.testing.assert_allclose(down, -scale * np.array([-(1 - q), other, 1 - q - other]), rtol=1e-9)
        assert np.abs(down).max() / np.abs(up).max() < 2


def test_a_reward_model_is_balanced():
    """dl/dr_w = -1 / (1 + e^(r_w - r_l)) = -dl/dr_l."""
    with jax.enable_x64(True):
        rewards = jnp.array([[1.3, -0.4], [5.0, -5.0]])
        found = 2 * jax.grad(lambda r: reduce_terms(losses.bt_rm(r, jnp.zeros(2)))[0])(rewards)
        np.testing.assert_allclose(found[:, 0], -found[:, 1], rtol=1e-12)
        np.testing.assert_allclose(found[:, 0], -1 / (1 + np.exp(np.array([1.7, 10.0]))), rtol=1e-12)


def test_the_tables():
    """Rows sum to 1; the four published starts of `unseen`; which entries are unseen."""
    rows = np.array(list(toy.SCENARIOS.values()))
    np.testing.assert_allclose(rows.sum(1), 1, rtol=1e-12)
    assert toy.unseen_mask(PAIRS).sum(1).tolist() == [8, 8, 8, 8]
    curves = toy_curves.five(np.log(np.repeat(rows[:, None], toy.PROMPTS, 1)), PAIRS)
    np.testing.assert_allclose(np.exp(curves["avg unseen"]), [0.095, 0.1075, 0.1075, 0.12], rtol=1e-12)
    np.testing.assert_allclose(np.exp(curves["avg chosen"]), [0.12, 0.02, 0.12, 0.02], rtol=1e-12)
    np.testing.assert_allclose(np.exp(curves["max rejected"]), [0.12, 0.12, 0.02, 0.02], rtol=1e-12)
    assert sorted(toy.REJECTED) == [4, 5, 6, 7]


def test_underflow_leaves_the_wrong_mean_only():
    """Where 3 of 8 entries underflow, the wrong mean is 8/5 too high and the right one does not move."""
    log_pi = np.full((toy.PROMPTS, toy.RESPONSES), np.log(0.1))
    before = toy_curves.vanishing_unseen(log_pi, PAIRS)
    np.testing.assert_allclose(before[0], np.exp(toy_curves.five(log_pi, PAIRS)["avg unseen"]), rtol=1e-6)
    for prompt, rejected in enumerate(toy.REJECTED):
        log_pi[prompt, [r for r in toy.REJECTED if r != rejected]] = -120.0
    wrong, left = toy_curves.vanishing_unseen(log_pi, PAIRS)
    assert left == 4 * 5
    np.testing.assert_allclose(wrong / np.exp(toy_curves.five(log_pi, PAIRS)["avg unseen"]), 8 / 5, rtol=1e-6)


def test_magnitudes_far_below_the_floats():
    """log magnitudes at probabilities that no float holds, against the formula."""
    log_pi = np.full((toy.PROMPTS, toy.RESPONSES), -2.0)
    log_pi[np.arange(4), toy.REJECTED] = -2000.0
    reference = np.full_like(log_pi, -2.0)
    told = toy_curves.theory(log_pi, reference, PAIRS, beta_chosen=0.1)
    pull = np.log(0.1) - np.logaddexp(0, 0.1 * 1998)
    np.testing.assert_allclose(told, [pull + 2, pull + 2000], rtol=1e-12)
    size = np.exp(pull) * np.array([[-1.0, 1.0]] * 4)
    np.testing.assert_allclose(toy_curves.log_magnitudes(log_pi, size, PAIRS), told, rtol=1e-9)


def test_every_request_has_its_shape():
    """What a table supplies stands in the request table with those axes and that dtype."""
    log_pi = jnp.log(jnp.full((4, 10), 0.1))
    made = toy.supply(toy.SUPPLIED, log_pi, log_pi, PAIRS, key=jax.random.key(0))
    assert set(made) == set(toy.SUPPLIED)
    sizes = {"B": 4, "K": 2, "L": 1}
    for name, value in made.items():
        request = REQUESTS[name]
        if request.provider in ("key", "state"):
            continue
        assert value.ndim == len(request.axes), name
        if name != "reference_sample_logps":  # K is its own there
            assert all(n == sizes.get(axis, n) for axis, n in zip(request.axes, value.shape, strict=True)), name
        assert value.dtype == request.dtype, name
    assert float(made["entropy"][0, 0, 0]) == pytest.approx(np.log(10))
    with pytest.raises(ConfigError, match="cannot supply hidden"):
        toy.supply(("hidden",), log_pi, log_pi, PAIRS)


def test_what_is_supplied_is_what_it_says():
    """Values against plain numpy: both divergences, the labels, the next prompt, no gradient where none belongs."""
    random = np.random.default_rng(0)
    log_pi, log_ref = (np.asarray(jax.nn.log_softmax(jnp.asarray(random.normal(size=(4, 10)), jnp.float32)))
                       for _ in range(2))
    made = toy.supply(toy.SUPPLIED, log_pi, log_ref, PAIRS, key=jax.random.key(0))
    backward, forward = (np.exp(log_ref) * (log_ref - log_pi)).sum(1), (np.exp(log_pi) * (log_pi - log_ref)).sum(1)
    np.testing.assert_allclose(made["ref_policy_kl"][:, 0, 0], backward, rtol=1e-5)
    np.testing.assert_allclose(made["policy_ref_kl"][:, 1, 0], forward, rtol=1e-5)
    np.testing.assert_allclose(made["log_sum_sq"][:, 0, 0], np.log((np.exp(log_pi) ** 2).sum(1)), rtol=1e-5)
    assert made["labels"].tolist() == [[1, 0]] * 4 and made["margins"].tolist() == [1] * 4
    rows = np.arange(4)
    np.testing.assert_array_equal(made["logps"], np.stack([log_pi[rows, toy.CHOSEN], log_pi[rows, toy.REJECTED]], 1))
    np.testing.assert_array_equal(made["kl_logps"][:, 0], log_pi[(rows + 1) % 4, toy.CHOSEN])
    np.testing.assert_array_equal(made["kl_ref_logps"][:, 1], log_ref[(rows + 1) % 4, toy.REJECTED])
    for name, flows in (("logps", True), ("ref_policy_kl", True), ("kl_logps", False)):
        slope = jax.grad(lambda x, name=name: toy.supply((name,), x, log_ref, PAIRS)[name].sum())(jnp.asarray(log_pi))
        assert bool(np.abs(slope).max() > 0) == flows, name


def test_which_losses_fit():
    """All pairwise losses that need no head do; the others say what they lack."""
    usable = toy.usable()
    assert {"dpo", "ipo", "slic_hf", "flex_dpo", "sft_dpo", "kto", "tdpo", "beta_dpo", "lcpo"} <= set(usable)
    for name in set(losses.names()) - set(usable):
        assert toy.why_not(name), name
    assert toy.why_not("bt_rm").startswith("needs rewards")


def test_every_loss_traces_on_the_table():
    """One update of every usable loss, abstractly: shapes and dtypes hold together (nothing is compiled)."""
    params = jax.eval_shape(toy.mlp, jax.random.key(0))
    for name in toy.usable():
        loss = losses.get(name)
        _, record = jax.eval_shape(lambda p, loss=loss: toy.train(loss, p, PAIRS, steps=2, every=1), params)
        assert record.log_pi.shape == (3, 4, 10) and record.slopes.shape == (3, 4, 2), name


def test_training_refuses_a_remainder():
    with pytest.raises(ConfigError, match="every = 3 must divide steps = 10"):
        toy.train(losses.get("dpo"), toy.mlp(jax.random.key(0)), PAIRS, steps=10, every=3)


@pytest.fixture(scope="module")
def trained():
    """Records of DPO and its two remedies from S1 and S4, axes [scenario, seed, T]; two seeds, 2000 updates."""
    rows = jnp.array([toy.SCENARIOS["both on-policy"], toy.SCENARIOS["both off-policy"]])
    keys = jax.random.split(jax.random.key(0), 2)
    params = jax.jit(jax.vmap(lambda row: jax.vmap(lambda key: toy.fit(toy.mlp(key), row))(keys)))(rows)
    # The three methods are members of one family: one program, the strengths its population axis.
    hyper = {"beta_chosen": jnp.array([0.1, 0.1]), "beta_rejected": jnp.array([0.1, 0.08])}
    run = jax.vmap(jax.vmap(lambda p, h: toy.train(losses.get("flex_dpo"), p, PAIRS, hyper=h, every=20, steps=2000)[1],
                            (0, None)), (0, None))
    record = jax.jit(jax.vmap(run, (None, 0)))(params, hyper)
    plain = jax.jit(lambda p: toy.train(losses.get("dpo"), p, PAIRS, every=20, steps=200)[1])(
        jax.tree.map(lambda x: x[0, 0], params))
    return rows, record, plain


def test_the_three_properties(trained):
    """The fit meets its table; log rejected falls at every record; DPO's chosen peaks, and ends below Flex-DPO's."""
    rows, record, _ = trained
    log_pi = np.asarray(record.log_pi, np.float64)
    tables = np.broadcast_to(rows[:, None, None], (2, 2, 4, 10))
    np.testing.assert_allclose(np.exp(log_pi[0, :, :, 0]), tables, atol=2e-3)
    rejected = log_pi[..., np.arange(4), toy.REJECTED].mean(-1)
    assert (np.diff(rejected, axis=-1) < 0).all()
    dpo, flex = (toy_curves.properties(x, PAIRS) for x in log_pi)
    assert (dpo["drop"] > 2).all()
    least = np.exp(toy_curves.five(log_pi[0], PAIRS)["min chosen"])
    # Single seeds may still rise at the end; the mean over seeds has its maximum inside.
    least = least.mean(1)
    assert (least.max(-1) - least[..., -1] > 0.01).all()
    assert (flex["chosen end"] > 0.95).all() and (flex["chosen end"] > dpo["chosen end"] + 0.2).all()


def test_measured_gradients_are_the_theory(trained):
    _, record, _ = trained
    for strengths, log_pi, seen in zip((0.1, 0.08), np.asarray(record.log_pi, np.float64), record.slopes, strict=True):
        measured = toy_curves.log_magnitudes(log_pi, seen, PAIRS)
        told = toy_curves.theory(log_pi, log_pi[:, :, :1], PAIRS, beta_chosen=0.1, beta_rejected=strengths)
        np.testing.assert_allclose(measured, told, atol=1e-4)


def test_a_member_of_the_population_is_a_run_of_its_own(trained):
    """Flex-DPO at equal strengths inside the vmapped program is DPO alone."""
    _, record, plain = trained
    # Adam and ReLU amplify rounding later on: 200 updates.
    np.testing.assert_allclose(record.log_pi[0, 0, 0, :11], plain.log_pi, atol=1e-3)
    np.testing.assert_allclose(record.loss[0, 0, 0, :11], plain.loss, atol=1e-5)
