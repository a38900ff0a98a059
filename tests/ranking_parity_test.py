"""Ranking losses against rax and optax: the members that coincide, value and gradient, on ragged lists with ties.

rax scores lists by s, labels y and a mask; here s = beta lr, y = the scores. rax reduces over the batch, so lists are
compared one by one or under its own reduction. Where both differ on purpose, the relation is spelled out.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignax import losses
from alignax.ops.reductions import reduce_terms

pytestmark = pytest.mark.slow
rax = pytest.importorskip("rax", reason="rax is missing: pip install '.[parity]'")

B, K, BETA = 5, 6, 0.7


@pytest.fixture(scope="module")
def lists():
    """(log-probs, reference, labels in [0, 1] with ties, mask): full and ragged lists, absent ones anywhere."""
    rng = np.random.default_rng(3)
    valid = np.ones((B, K), bool)
    valid[1, 4:] = False
    valid[2, [0, 3]] = False
    valid[3, 1:] = False  # a list without a comparison
    scores = np.round(rng.random((B, K)), 1)
    scores[0, :2] = scores[0, 2]
    return rng.normal(-20, 3, (B, K)), rng.normal(-20, 3, (B, K)), scores, valid


def values(result):
    """What a loss returned for each list."""
    return result.terms["loss"].values if hasattr(result, "terms") else result


def same(ours, theirs, at):
    """Equal values and gradients of two functions of the log-probs, both to all digits of float64 that rounding leaves.

    Their arrays of several ranks meet without explicit axes, which this suite forbids.
    """
    with jax.numpy_rank_promotion("allow"):
        expected, slope = theirs(at), jax.jacobian(theirs)(at)
    found = ours(at)
    assert found.dtype == jnp.float64 and np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(jax.jacobian(ours)(at), slope, rtol=1e-9, atol=1e-12)


def one_by_one(loss, **options):
    """A loss of rax as a function of [B, K] scores, labels and mask that gives the sum over each list, [B]."""
    each = lambda s, y, m: loss(s, y, where=m, reduce_fn=jnp.sum, **options)
    return lambda s, y, m: jax.vmap(each)(s, y, m)


MEMBERS = {
    "list_mle": one_by_one(rax.listmle_loss),
    "pair_logistic": one_by_one(rax.pairwise_logistic_loss),
    "pair_hinge": one_by_one(rax.pairwise_hinge_loss),
    "point_mse": one_by_one(rax.pointwise_mse_loss),
    "point_sigmoid": one_by_one(rax.pointwise_sigmoid_loss),
    "softmax": one_by_one(rax.softmax_loss, label_fn=lambda y, where: y / y.sum(-1, keepdims=True)),
}


@pytest.mark.parametrize("member", MEMBERS)
def test_members_of_lipo_are_those_of_rax(lists, member):
    with jax.enable_x64(True):
        logps, ref, scores, valid = map(jnp.asarray, lists)
        same(lambda x: values(losses.lipo(x, ref, scores, valid, beta=BETA, member=member)),
             lambda x: MEMBERS[member](BETA * (x - ref), scores, valid), logps)


def test_lambda_weights_are_those_of_rax(lists):
    """Per list they differ by the base of the logarithm and by rax's factor, the width of the array."""
    with jax.enable_x64(True):
        logps, ref, scores, valid = map(jnp.asarray, lists)
        theirs = one_by_one(rax.pairwise_logistic_loss, lambdaweight_fn=rax.dcg_lambdaweight)
        same(lambda x: values(losses.lipo(x, ref, scores, valid, beta=BETA)),
             lambda x: theirs(BETA * (x - ref), scores, valid) / (K * np.log(2)), logps)


def test_the_reduction_of_rax(lists):
    """On full lists; on ragged ones rax multiplies by the width of the array, which padding would change."""
    with jax.enable_x64(True):
        logps, ref, scores, _ = map(jnp.asarray, lists)
        full = jnp.ones((B, K), bool)
        same(lambda x: reduce_terms(losses.lipo(x, ref, scores, full, beta=BETA, rax_reduction=True))[0],
             lambda x: rax.pairwise_logistic_loss(BETA * (x - ref), scores, lambdaweight_fn=rax.dcg_lambdaweight),
             logps)


def test_plackett_luce_is_list_mle(lists):
    """A list ordered best first has falling labels."""
    with jax.enable_x64(True):
        logps, ref, _, valid = map(jnp.asarray, lists)
        falling = jnp.broadcast_to(jnp.arange(K, 0, -1.0)[None], (B, K))
        same(lambda x: losses.plackett_luce(x, ref, valid, beta=BETA),
             lambda x: MEMBERS["list_mle"](BETA * (x - ref), falling, valid), logps)


def test_dpo_is_pairwise_logistic(lists):
    with jax.enable_x64(True):
        logps, ref = (jnp.asarray(x)[:, :2] for x in lists[:2])
        both = jnp.ones((B, 2), bool)
        same(lambda x: losses.dpo(x, ref, beta=BETA),
             lambda x: MEMBERS["pair_logistic"](BETA * (x - ref), jnp.broadcast_to(jnp.array([[1.0, 0.0]]), (B, 2)),
                                                both), logps)


def test_the_reward_model_on_lists_is_pairwise_logistic(lists):
    """`flat` is the mean over all pairs of the batch, as rax reduces."""
    with jax.enable_x64(True):
        rewards, _, scores, valid = map(jnp.asarray, lists)
        same(lambda x: reduce_terms(losses.bt_rm_list(x, scores, valid, flat=True))[0],
             lambda x: rax.pairwise_logistic_loss(x, scores, where=valid), rewards)


@pytest.mark.parametrize("theirs", ["rax", "optax"])
@pytest.mark.parametrize("name", ["lipo", "info_nca"])
def test_list_softmax_is_that_of_both_libraries(lists, name, theirs):
    """The target is the labels' share, or softmax(scores / alpha) over the answers that exist."""
    library = {"rax": rax.softmax_loss, "optax": optax.losses.ranking_softmax_loss}[theirs]
    with jax.enable_x64(True):
        logps, ref, scores, valid = map(jnp.asarray, lists)
        if name == "lipo":
            kept = jnp.where(valid, scores, 0)
            target = kept / kept.sum(-1, keepdims=True)
            ours = lambda x: values(losses.lipo(x, ref, scores, valid, beta=BETA, member="softmax"))
        else:
            target = jax.nn.softmax(jnp.where(valid, scores / 0.3, -jnp.inf), -1)
            ours = lambda x: losses.info_nca(x, ref, scores, valid, beta=BETA, alpha=0.3)
        same(ours, lambda x: library(BETA * (x - ref), target, where=valid, reduce_fn=None), logps)
