"""The losses of HALOs, EasyDeL, gemma and ParlAI, stated anew in NumPy, beside ours: which options give their form.

Read in ContextualAI/HALOs (train/trainers.py, 4831988), erfanzar/EasyDeL (trainers' `_fn.py`, f13a196 for DPO, 05063fe
for CPO, KTO and BCO, 80eaad6 for ORPO), google-deepmind/gemma (gm/losses, 0360c66 and 05eb215) and, for unlikelihood by
label, facebookresearch/ParlAI (projects/dialogue_unlikelihood, 00286c5). Every function below states one of their
formulas in our words, and its docstring says where it differs from ours, if it does.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from alignax import losses
from alignax.ops.reductions import reduce_terms

pytestmark = pytest.mark.slow

B, L, BETA, SMOOTH = 6, 5, 0.3, 0.2


def sp(x):
    """log(1 + e^x)."""
    return np.logaddexp(0, x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.fixture(scope="module")
def data():
    """Token log-probs [B, 2, L] of policy and reference on ragged completions, float64, and what follows from them."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, L + 1, (B, 2))
    mask = np.arange(L) < lengths[..., None]
    policy, reference, kl_policy, kl_reference = -rng.exponential(1.0, (4, B, 2, L)) * mask
    out = {"token_logps": policy, "ref_token_logps": reference, "mask": mask, "lengths": lengths.astype(float),
           "logps": policy.sum(-1), "ref_logps": reference.sum(-1), "kl_logps": kl_policy.sum(-1) + 4,
           "kl_ref_logps": kl_reference.sum(-1), "labels": np.tile([1.0, 0.0], (B, 1)), "valid": np.ones((B, 2), bool),
           "scores": np.tile([1.0, 0.0], (B, 1)), "weights": np.ones(B)}
    return out | {"lr": out["logps"] - out["ref_logps"], "mean": out["logps"] / out["lengths"]}


def ours(name, data, **hyper):
    """The scalar of our loss in float64; the state of a loss is that before its first update."""
    loss = losses.get(name)
    with jax.enable_x64(True):
        inputs = {k: jax.numpy.asarray(v) for k, v in data.items()} | {"state": loss.init_state()}
        return float(reduce_terms(loss(inputs, **hyper))[0])


def nll_of_chosen(d):
    """Token mean over the batch of the chosen completions."""
    return -d["logps"][:, 0].sum() / d["lengths"][:, 0].sum()


# Each takes the data and returns the scalar; beside it stands our loss with the options that give the same.

def halos_dpo(d):
    """Token ratios summed, no smoothing."""
    return sp(-BETA * (d["lr"][:, 0] - d["lr"][:, 1])).mean()


def halos_cdpo(d):
    """Both labels, weighted 1 - epsilon and epsilon; epsilon 0.2 by default, ours 0.1."""
    m = BETA * (d["lr"][:, 0] - d["lr"][:, 1])
    return ((1 - SMOOTH) * sp(-m) + SMOOTH * sp(m)).mean()


def halos_ipo(d):
    """Mean over the tokens whose ratio is not exactly 0, not the paper's sum."""
    ratio = d["token_logps"] - d["ref_token_logps"]
    r = ratio.sum(-1) / (ratio != 0).sum(-1)
    return ((r[:, 0] - r[:, 1] - 1 / (2 * BETA)) ** 2).mean()


def halos_simpo(d):
    """The margin is given as its ratio to beta, inside the bracket that beta multiplies; 10 and 0.3 by default."""
    return sp(-BETA * (d["mean"][:, 0] - d["mean"][:, 1] - 0.4)).mean()


def halos_kto(d):
    """The baseline is a mean over mismatched completions whose ratio is not 0, at least 0; a mean over all examples."""
    kl = d["kl_logps"] - d["kl_ref_logps"]
    z0 = max(kl.sum() / max((kl != 0).sum(), 1), 0)
    good, bad = 1.5 * (1 - sigmoid(BETA * (d["lr"][:, 0] - z0))), 0.7 * (1 - sigmoid(BETA * (z0 - d["lr"][:, 1])))
    return np.concatenate([good, bad]).mean()


def halos_slic(d):
    """With the SFT term as a sum over tokens; see also test_slic_of_halos_adds_a_matrix_to_a_vector."""
    return (np.maximum(1.3 - d["logps"][:, 0] + d["logps"][:, 1], 0) - 0.2 * d["logps"][:, 0]).mean()


def halos_humanline(d):
    """Token ratios held in [log_epsilon_P, log_epsilon_R] before anything else."""
    r = np.clip(d["token_logps"] - d["ref_token_logps"], -0.5, 0.8).sum(-1)
    return sp(-BETA * (r[:, 0] - r[:, 1])).mean()


def easydel_hinge(d):
    """relu(1 - beta D)."""
    return np.maximum(1 - BETA * (d["lr"][:, 0] - d["lr"][:, 1]), 0).mean()


def easydel_ipo(d):
    """Its forward pass divides the sums by their lengths for this loss."""
    r = d["lr"] / d["lengths"]
    return ((r[:, 0] - r[:, 1] - 1 / (2 * BETA)) ** 2).mean()


def easydel_kto_pair(d):
    """The key `kto` of its DPO trainer: smoothed DPO, without KTO's baseline."""
    return halos_cdpo(d)


def easydel_robust(d):
    m = BETA * (d["lr"][:, 0] - d["lr"][:, 1])
    return (((1 - SMOOTH) * sp(-m) - SMOOTH * sp(m)) / (1 - 2 * SMOOTH)).mean()


def easydel_exo(d):
    """Smoothing of at least 1e-3."""
    m, e = BETA * (d["lr"][:, 0] - d["lr"][:, 1]), max(0.0, 1e-3)
    return (sigmoid(m) * (-sp(-m) - np.log(1 - e)) + sigmoid(-m) * (-sp(m) - np.log(e))).mean()


def easydel_nca(d):
    r = BETA * d["lr"]
    return (sp(-r[:, 0]) + 0.5 * sp(r[:, 0]) + 0.5 * sp(r[:, 1])).mean()


def easydel_sppo(d):
    return ((d["lr"][:, 0] - 0.5 / BETA) ** 2 + (d["lr"][:, 1] + 0.5 / BETA) ** 2).mean()


def easydel_aot(d):
    """Its `aot` sorts differences inside pairs."""
    high, low = d["logps"][:, 0] - d["logps"][:, 1], d["ref_logps"][:, 0] - d["ref_logps"][:, 1]
    m = BETA * (np.sort(high) - np.sort(low))
    return ((1 - SMOOTH) * sp(-m) + SMOOTH * sp(m)).mean()


def easydel_aot_pair(d):
    """Its `aot_pair` sorts the two sides: the form for unpaired data."""
    m = BETA * (np.sort(d["lr"][:, 0]) - np.sort(d["lr"][:, 1]))
    return ((1 - SMOOTH) * sp(-m) + SMOOTH * sp(m)).mean()


def easydel_apo_zero(d):
    return (1 - sigmoid(BETA * d["lr"][:, 0]) + sigmoid(BETA * d["lr"][:, 1])).mean()


def easydel_apo_down(d):
    return (sigmoid(BETA * d["lr"][:, 0]) + 1 - sigmoid(BETA * (d["lr"][:, 0] - d["lr"][:, 1]))).mean()


def easydel_discopop(d):
    """tau 1 by default, the paper's and ours 0.05."""
    m = BETA * (d["lr"][:, 0] - d["lr"][:, 1])
    return (sp(-m) * (1 - sigmoid(m)) + np.exp(-m) * sigmoid(m)).mean()


def easydel_cpo(d):
    return sp(-BETA * (d["logps"][:, 0] - d["logps"][:, 1])).mean() + 0.7 * nll_of_chosen(d)


def easydel_simpo(d):
    """gamma / beta inside the bracket, so that gamma is the margin itself, as ours; its NLL term switched off."""
    return sp(-BETA * (d["mean"][:, 0] - d["mean"][:, 1] - 0.5 / BETA)).mean()


def easydel_alpha_po(d):
    r = (1 - np.exp(d["mean"]) ** -0.25) / 0.25
    return sp(-BETA * (r[:, 0] - r[:, 1] - 0.5 / BETA)).mean()


def easydel_orpo(d):
    """Minus beta log sigmoid of the log odds. Its NLL also counts the prompt's tokens: here there are none."""
    odds = d["mean"] - np.log1p(-np.exp(d["mean"]))
    return nll_of_chosen(d) + 0.4 * sp(-(odds[:, 0] - odds[:, 1])).mean()


def easydel_kto(d):
    """Sigmoids of arguments held in +-30; the mismatched completion is the one before, ours the one after."""
    z0 = max((d["kl_logps"] - d["kl_ref_logps"]).mean(), 0)
    good = 1.5 * (1 - sigmoid(np.clip(BETA * (d["lr"][:, 0] - z0), -30, 30)))
    bad = 0.7 * (1 - sigmoid(np.clip(BETA * (z0 - d["lr"][:, 1]), -30, 30)))
    return (good.sum() + bad.sum()) / (2 * B)


def easydel_apo_unpaired(d):
    return ((1 - sigmoid(BETA * d["lr"][:, 0])).sum() + sigmoid(BETA * d["lr"][:, 1]).sum()) / (2 * B)


def gemma_dpo(d):
    """tau stands for beta."""
    return halos_cdpo(d)


def parlai_unlikelihood(d):
    """Token means over the completions of either label; 1 - p of at least 1e-20, ours 1e-5 by default."""
    good, bad = d["mask"][:, 0], d["mask"][:, 1]
    wrong = -np.log(np.maximum(1 - np.exp(d["token_logps"][:, 1]), 1e-20)) * bad
    return -(d["token_logps"][:, 0] * good).sum() / good.sum() + 0.6 * wrong.sum() / bad.sum()


EQUAL = {
    halos_dpo: ("dpo", dict(beta=BETA)),
    halos_cdpo: ("cdpo", dict(beta=BETA, label_smoothing=SMOOTH)),
    halos_ipo: ("ipo", dict(tau=BETA, length_average=True)),
    halos_simpo: ("simpo", dict(beta=BETA, gamma=BETA * 0.4)),
    halos_kto: ("kto", dict(beta=BETA, desirable_weight=1.5, undesirable_weight=0.7)),
    halos_slic: ("slic_hf", dict(delta=1.3, lam=0.2)),
    halos_humanline: ("humanline", dict(beta=BETA, log_low=-0.5, log_high=0.8)),
    easydel_hinge: ("rso:hinge_norm", dict(gamma=BETA)),
    easydel_ipo: ("ipo", dict(tau=BETA, length_average=True)),
    easydel_kto_pair: ("dpo", dict(beta=BETA, label_smoothing=SMOOTH)),
    easydel_robust: ("robust_dpo", dict(beta=BETA, label_smoothing=SMOOTH)),
    easydel_exo: ("exo", dict(beta=BETA, label_smoothing=1e-3)),
    easydel_nca: ("nca", dict(beta=BETA)),
    easydel_sppo: ("sppo:hard", dict(beta=BETA)),
    easydel_aot: ("aot", dict(beta=BETA, label_smoothing=SMOOTH)),
    easydel_aot_pair: ("aot", dict(beta=BETA, label_smoothing=SMOOTH, paired=False)),
    easydel_apo_zero: ("apo:zero", dict(beta=BETA)),
    easydel_apo_down: ("apo:down", dict(beta=BETA)),
    easydel_discopop: ("discopop", dict(beta=BETA, tau=1.0)),
    easydel_cpo: ("cpo", dict(beta=BETA, lam=0.7)),
    easydel_simpo: ("simpo", dict(beta=BETA, gamma=0.5)),
    easydel_alpha_po: ("alpha_po", dict(beta=BETA, gamma=0.5, alpha=0.25)),
    easydel_orpo: ("orpo", dict(lam=0.4)),
    easydel_kto: ("kto", dict(beta=BETA, desirable_weight=1.5, undesirable_weight=0.7)),
    easydel_apo_unpaired: ("apo:zero_unpaired", dict(beta=BETA)),
    gemma_dpo: ("dpo", dict(beta=BETA, label_smoothing=SMOOTH)),
    parlai_unlikelihood: ("unlikelihood", dict(alpha=0.6, clamp=1e-20)),
}


@pytest.mark.parametrize("theirs", EQUAL, ids=lambda f: f.__name__)
def test_the_options_give_their_form(theirs, data):
    name, hyper = EQUAL[theirs]
    np.testing.assert_allclose(ours(name, data, **hyper), theirs(data), rtol=1e-10)


def test_our_defaults_are_not_their_averages(data):
    """What the parity above would hide if the options were ignored: sums and means differ."""
    assert abs(ours("ipo", data, tau=BETA) - easydel_ipo(data)) > 0.1
    assert abs(ours("aot", data, beta=BETA, label_smoothing=SMOOTH) - easydel_aot_pair(data)) > 1e-3
    assert abs(ours("discopop", data, beta=BETA) - easydel_discopop(data)) > 1e-3


def test_npo_of_gemma_lacks_the_factor(data):
    """gemma's is sp(tau lr) with tau 1; the paper's, and ours, 2 / beta times that, which no rate hides when beta is
    swept. forget_weight = beta / 2 gives theirs."""
    forget = {**data, "labels": np.zeros((B, 2))}
    theirs = sp(BETA * data["lr"]).mean()
    np.testing.assert_allclose(ours("npo", forget, beta=BETA), 2 / BETA * theirs, rtol=1e-10)
    np.testing.assert_allclose(ours("npo", forget, beta=BETA, forget_weight=BETA / 2), theirs, rtol=1e-10)


def test_bco_pair_of_easydel_sums_and_differentiates_its_shift(data):
    """Its value is the sum of the two sides, ours on the first batch their mean; and its shift, the batch's own mean
    reward, carries a gradient, so that raising all rewards alike costs nothing. Ours is a running mean, held fixed."""
    def theirs(lr):
        rewards = BETA * lr
        shift = rewards.mean()
        return (sp(-(rewards[:, 0] - shift)) + sp(rewards[:, 1] - shift)).mean()

    np.testing.assert_allclose(theirs(data["lr"]), 2 * ours("bco", data, beta=BETA), rtol=1e-5)  # float32 state
    raised = theirs(data["lr"] + 0.3) - theirs(data["lr"])
    np.testing.assert_allclose(raised, 0, atol=1e-12)
    loss = losses.get("bco")
    with jax.enable_x64(True):
        inputs = {k: jax.numpy.asarray(v) for k, v in data.items()} | {"state": loss.init_state()}
        slope = jax.grad(lambda up: reduce_terms(loss(inputs | {"logps": inputs["logps"] + up}, beta=BETA))[0])(0.0)
    assert abs(float(slope)) > 1e-3


def test_slic_of_halos_adds_a_matrix_to_a_vector(data):
    """Since its log-probs are per token, the SFT term [B, T] meets the calibration [B]: NumPy's rules (and torch's)
    refuse it unless T is B, and then pair i's calibration is added to every pair's token i. Ours sums tokens."""
    calibration = np.maximum(1.3 - data["logps"][:, 0] + data["logps"][:, 1], 0)
    tokens = -data["token_logps"][:, 0]
    with pytest.raises(ValueError, match="broadcast"):
        calibration + 0.2 * tokens
    square = (calibration[:L] + 0.2 * tokens[:L]).mean()
    first = {k: v[:L] for k, v in data.items()}
    assert abs(square - ours("slic_hf", first, delta=1.3, lam=0.2)) > 0.1
