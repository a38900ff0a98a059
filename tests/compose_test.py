"""Composed losses: equal to the methods that they spell, lawful like them, and clear about what they refuse."""

import functools

import jax
import jax.numpy as jnp
import laws_test
import numpy as np
import pytest

from alignax import configs, losses
from alignax.losses import parts
from alignax.losses.composed import users
from alignax.ops.reductions import as_terms, reduce_terms
from alignax.types import ConfigError, Terms

B, L = 4, 5


@functools.cache
def base():
    """Float64 leaves from which all requests follow, with spread that reaches every branch."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, L + 1, (B, 2))
    lengths[0] = L, 2
    mask = np.arange(L)[None, None] < lengths[..., None]
    floats = {"tokens": rng.uniform(-3, -0.1, (B, 2, L)), "ref_tokens": rng.uniform(-3, -0.1, (B, 2, L)),
              "sq": rng.uniform(-2, -0.1, (B, 2, L)), "aux": rng.normal(size=(B, 2)),
              "aux_ref": rng.normal(size=(B, 2)),
              "samples": rng.uniform(-9, -1, (B, 1)), "scores": rng.normal(size=(B, 2)) + [1.0, 0.0],
              "margins": rng.normal(size=B)}
    return floats, {"mask": mask, "diff": rng.random((B, 2, L)) < 0.5, "lengths": lengths}


def inputs_of(floats, rest, loss):
    """Every request a composed loss may make, sums and tokens in agreement."""
    total = lambda x: jnp.where(rest["mask"], x, 0).sum(-1)
    logps = total(floats["tokens"])
    return {"token_logps": floats["tokens"], "ref_token_logps": floats["ref_tokens"], "log_sum_sq": floats["sq"],
            "logps": logps, "ref_logps": total(floats["ref_tokens"]), "mask": rest["mask"], "diff": rest["diff"],
            "lengths": jnp.asarray(rest["lengths"], logps.dtype), "scores": floats["scores"],
            "margins": floats["margins"], "aux_prompt_logps": floats["aux"], "aux_prompt_ref_logps": floats["aux_ref"],
            "reference_sample_logps": floats["samples"], "weights": jnp.arange(1.0, B + 1),
            "labels": jnp.tile(jnp.array([[1.0, 0.0]]), (B, 1)), "state": loss.init_state(), "key": jax.random.key(1)}


def value_and_grad(loss):
    floats, rest = base()
    run = lambda f: reduce_terms(loss(inputs_of(f, rest, loss)))[0]
    return jax.value_and_grad(run)(jax.tree.map(jnp.asarray, floats))


SUM, MEAN, TOKENS = dict(extra="nll"), dict(extra="nll_mean"), dict(extra="nll_tokens")
SPELLED = [
    ("dpo", {}, dict()),
    ("dpo", dict(label_smoothing=0.2), dict(link="smoothed", label_smoothing=0.2)),
    ("cdpo", {}, dict(link="smoothed")),
    ("robust_dpo", {}, dict(link="debiased")),
    ("ipo", {}, dict(link="square", beta=1.0)),
    ("ipo", dict(length_average=True, tau=0.3), dict(reward="mean_log_ratio", link="square", beta=1.0, tau=0.3)),
    ("slic_hf", {}, dict(reward="logp", link="hinge", beta=1.0) | SUM),
    ("rso_hinge_norm", {}, dict(link="hinge", beta=0.05)),
    ("ln_dpo", {}, dict(reward="mean_log_ratio", beta=5.0)),
    ("simpo", {}, dict(reward="mean_logp", offset="constant", beta=2.0)),
    ("alpha_po", {}, dict(reward="shaped_logp", offset="constant", beta=2.5, gamma=0.25)),
    ("odpo", dict(alpha=0.5), dict(offset="scores", offset_scale=0.5)),
    ("rdpo_refined", {}, dict(offset="score_difference")),
    ("sequential_po", dict(lam=0.7), dict(offset="margins", offset_scale=0.7)),
    ("h_dpo", {}, dict(reward="sharpened_log_ratio", beta=0.01)),
    ("dpo_shift", {}, dict(beta=0.01, rejected_scale=0.95)),
    ("flex_dpo", {}, dict(beta=0.1, rejected_scale=0.8)),
    ("r_dpo", {}, dict(offset="lengths")),
    ("ilr_dpo", dict(alpha=0.05), dict(offset="lengths", length_alpha=0.05)),
    ("rpo", {}, dict(beta=0.5, extra_weight=0.2) | MEAN),
    ("rpo", dict(form="cumulative"), dict(beta=0.5, extra_weight=0.1) | SUM),
    ("sft_dpo", {}, dict(extra_weight=0.01) | SUM),
    ("orpo", {}, dict(reward="log_odds", beta=1.0, preference_weight=0.1, extra_weight=1.0) | TOKENS),
    ("cpo", {}, dict(reward="logp", extra_weight=1.0) | TOKENS),
    ("cpo", dict(nll="sequences"), dict(reward="logp", extra_weight=1.0) | SUM),
    ("tpo_triple", {}, dict(reward="logp", beta=0.01, extra_weight=1.0) | TOKENS),
    ("tpo_l", {}, dict(reward="mean_logp", beta=2.0, offset="constant", extra_weight=1.0) | TOKENS),
    ("cpl", {}, dict(reward="logp", beta=0.1, rejected_scale=0.5)),
    ("cpl_kl", {}, dict(beta=0.2, rejected_scale=0.75)),
    ("dpop", dict(penalty=5.0), dict(offset="dpop", beta=0.3, penalty=5.0)),
    ("f_dpo", {}, dict(reward="f_divergence")),
    ("f_dpo", dict(divergence="js"), dict(reward="f_divergence", divergence="js")),
    ("f_dpo", dict(divergence="alpha", alpha=0.3), dict(reward="f_divergence", divergence="alpha", f_alpha=0.3)),
    ("wpo", {}, dict(weight="wpo", beta=0.01)),
    ("exo", {}, dict(link="reverse_kl")),
    ("discopop", {}, dict(link="blend", beta=0.05)),
    ("focal_po", {}, dict(link="focal", beta=0.01)),
    ("minor_dpo", {}, dict(reward="one_sided_log_ratio")),
    ("gpo", {}, dict(link="squared_hinge")),
    ("gpo", dict(link="savage"), dict(link="savage")),
    ("gpo", dict(link="exponential"), dict(link="exponential")),
    ("simper", {}, dict(reward="likelihood", link="linear", beta=1.0)),
    ("cal_dpo", {}, dict(beta=1.0, extra="calibration", extra_weight=1.0)),
    ("c2_dpo", {}, dict(extra="constraint", extra_weight=2e-4)),
    ("sr_dpo", {}, dict(offset="aux_prompt", offset_scale=0.5)),
    ("sr_ipo", dict(beta=0.2), dict(link="square", beta=1.0, tau=0.2, offset="aux_prompt", offset_scale=0.5 * 0.2)),
    ("typo", {}, dict(reward="logp", beta=1.0, extra="reference_sample")),
    ("alpha_dpo", {}, dict(reward="mean_logp", beta=2.5, offset="adaptive")),
    ("humanline", {}, dict(reward="clipped_tokens")),
    ("span_dpo", {}, dict(reward="edited_tokens")),
    ("ld_dpo", {}, dict(reward="leading_tokens")),
]


@pytest.mark.parametrize("method, hyper, made_of", SPELLED, ids=[f"{m}-{i}" for i, (m, _, _) in enumerate(SPELLED)])
def test_a_method_spelled_in_parts_is_the_method(method, hyper, made_of):
    """Value and gradients with respect to everything, in float64, to rounding."""
    with jax.enable_x64(True):
        value, gradient = value_and_grad(losses.get(method, **hyper))
        composed, composed_gradient = value_and_grad(losses.compose(**made_of))
        np.testing.assert_allclose(composed, value, rtol=1e-12)
        for name in gradient:
            np.testing.assert_allclose(composed_gradient[name], gradient[name], rtol=1e-10, atol=1e-13, err_msg=name)


def test_every_part_is_spelled_by_some_method():
    """A part that no method checks would be checked by nothing: those left out here have tests of their own."""
    used = {(kind, name) for _, _, made_of in SPELLED for kind, name in made_of.items() if kind in parts.KINDS}
    used |= {("reward", "log_ratio"), ("link", "logistic")}
    every = {(kind, name) for kind, table in parts.KINDS.items() for name in table}
    assert every - used == {("link", "sigmoid"), ("weight", "weights")}


def test_sigmoid_link_and_record_weights():
    loss = losses.compose(link="sigmoid", weight="weights")
    with jax.enable_x64(True):
        inputs = inputs_of(*base(), loss)
        out = loss(inputs)
        chosen, rejected = np.asarray(inputs["logps"] - inputs["ref_logps"]).T
        expected = 1 - 1 / (1 + np.exp(-0.1 * (chosen - rejected)))
        np.testing.assert_allclose(reduce_terms(out)[0], np.average(expected, weights=[1, 2, 3, 4]), rtol=1e-12)


def test_a_shared_hyper_parameter_has_one_default():
    found = {}
    for table in parts.KINDS.values():
        for part in table.values():
            for key, value in (part.__kwdefaults__ or {}).items():
                assert found.setdefault(key, value) == value, key
    assert losses.defaults("compose") | found == losses.defaults("compose")
    assert set(users()) == set(found)


# As lawful as a method of the index

LAWFUL = {
    "everything": dict(reward="shaped_logp", link="smoothed", offset="lengths", weight="wpo", extra="nll_tokens"),
    "stateful": dict(reward="mean_logp", offset="adaptive", extra="calibration"),
    "tokens": dict(reward="leading_tokens", link="exponential", clip=60.0, offset="scores", weight="weights"),
}
SUMS = {"sum": ({"dpo": 1.0, "sft": 0.2, "alpha_dpo": 0.5}, {"dpo": {"beta": 0.2}})}
LAWS = (laws_test.test_compiled_equals_eager, laws_test.test_every_float_hyper_parameter_may_be_traced,
        laws_test.test_the_order_of_the_batch_does_not_matter, laws_test.test_examples_are_independent_unless_declared,
        laws_test.test_policy_at_the_reference_is_finite, laws_test.test_gradients_stop_where_the_request_table_says,
        laws_test.test_float64_stays_float64)


@pytest.fixture(params=[*LAWFUL, *SUMS])
def as_method(request, monkeypatch):
    """A name under which the law table finds a composed loss."""
    name = request.param
    loss = losses.compose(**LAWFUL[name]) if name in LAWFUL else losses.weighted_sum(SUMS[name][0], **SUMS[name][1])
    monkeypatch.setattr(losses, "get", lambda _: loss)
    return name


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__.removeprefix("test_"))
def test_composed_losses_obey_the_laws(as_method, law):
    law(as_method)


@pytest.mark.parametrize("scale", [1e4, 1e-7])
def test_extremes_stay_finite(as_method, scale):
    laws_test.test_extremes_stay_finite(as_method, scale)


def test_masked_tokens_change_nothing(monkeypatch):
    loss = losses.compose(reward="leading_tokens", weight="wpo")
    monkeypatch.setattr(losses, "get", lambda _: loss)
    laws_test.test_masked_entries_change_nothing_and_get_no_gradient("masked tokens", np.nan)


# Sums


def test_a_sum_is_the_sum_of_its_parts():
    weights = {"dpo": 1.0, "simpo": -0.5, "orpo": 2.0}
    loss = losses.weighted_sum(weights, dpo={"beta": 0.3}, simpo={"gamma": 1.0})
    with jax.enable_x64(True):
        value, gradient = value_and_grad(loss)
        one = {"dpo": losses.get("dpo", beta=0.3), "simpo": losses.get("simpo", gamma=1.0), "orpo": losses.get("orpo")}
        apart = {name: value_and_grad(part) for name, part in one.items()}
        np.testing.assert_allclose(value, sum(w * apart[n][0] for n, w in weights.items()), rtol=1e-12)
        np.testing.assert_allclose(gradient["tokens"], sum(w * apart[n][1]["tokens"] for n, w in weights.items()),
                                   rtol=1e-10, atol=1e-13)
    assert loss.requests == ("logps", "ref_logps", "lengths")
    assert loss.hyper["weights.simpo"] == -0.5 and loss.hyper["dpo.beta"] == 0.3 and loss.hyper["simpo.gamma"] == 1.0


def test_a_supervised_part_sees_the_chosen_completion_alone():
    loss = losses.weighted_sum({"dpo": 1.0, "sft": 0.2})
    inputs = inputs_of(*base(), loss)
    terms = as_terms(loss(inputs))
    assert list(terms) == ["dpo.loss", "sft.nll"]
    only = {name: inputs[name][:, :1] for name in ("token_logps", "mask")}
    np.testing.assert_allclose(reduce_terms({"nll": terms["sft.nll"]._replace(scale=1.0)})[0],
                               reduce_terms(losses.get("sft")(only))[0], rtol=1e-6)
    assert not loss.info.chosen_only and loss.info.completions == 2
    assert losses.weighted_sum({"sft": 1.0, "dft": 1.0}).info.chosen_only
    assert {n for n in losses.names() if losses.get(n).info.chosen_only} >= {"sft", "dft", "unlikelihood:token"}


def test_state_and_keys_of_the_parts_stay_apart():
    loss = losses.weighted_sum({"beta_dpo": 1.0, "alpha_dpo": 1.0, "sampo": 1.0, "dpo": 1.0})
    state = loss.init_state()
    assert set(state) == {"beta_dpo", "alpha_dpo"} and loss.info.couples_batch
    inputs = inputs_of(*base(), loss) | {"ids": jnp.arange(B)}
    out = loss(inputs)
    assert isinstance(out, Terms) and jax.tree.structure(out.new_state) == jax.tree.structure(state)
    alone = losses.get("alpha_dpo")(inputs | {"state": state["alpha_dpo"]})
    np.testing.assert_allclose(out.new_state["alpha_dpo"]["std"], alone.new_state["std"], rtol=1e-6)
    drawn = losses.get("beta_dpo")(inputs | {"state": state["beta_dpo"]})  # the first part that draws: the key itself
    np.testing.assert_array_equal(out.terms["beta_dpo.loss"].weight, drawn.terms["loss"].weight)
    own = losses.get("sampo")(inputs | {"key": jax.random.fold_in(inputs["key"], 1)})
    np.testing.assert_array_equal(out.terms["sampo.loss"].values, own)
    assert "beta_dpo.kept" in out.metrics and "alpha_dpo.margin_target" in out.metrics


def test_sums_nest_and_hold_composed_losses():
    section = losses.section("dpo+0.5*compose", compose={"link": "hinge", "delta": 2.0})
    loss = losses.from_section(section)
    inputs = inputs_of(*base(), loss)
    expected = reduce_terms(losses.get("dpo")(inputs))[0] + 0.5 * reduce_terms(losses.compose(link="hinge", delta=2.0)(
        inputs))[0]
    np.testing.assert_allclose(reduce_terms(loss(inputs))[0], expected, rtol=1e-6)
    assert loss.hyper["compose.delta"] == 2.0


# What a config may say


def test_sections_of_configs_round_trip():
    section = configs.loss_section("compose", link="hinge", delta=0.5)
    assert section.name == "compose" and section.link == "hinge" and section.delta == 0.5 and section.gamma == 0.5
    assert losses.from_section(section.to_dict()).hyper["delta"] == 0.5
    section = configs.loss_section("dpo+0.2*sft", dpo={"beta": 0.3})
    assert section.name == "sum" and section.weights.sft == 0.2 and section.dpo.beta == 0.3
    section.dpo.beta = 0.4
    assert losses.from_section(section.to_dict()).hyper["dpo.beta"] == 0.4
    stage = configs.train_stage("compose", hyper=dict(reward="logp"))
    assert stage.reference == "none" and configs.train_stage("simpo+0.1*dpo").reference == "frozen"


@pytest.mark.parametrize("make, words", [
    (lambda: losses.compose(link="hing"), r"link = 'hing' \(did you mean hinge\?\); allowed: logistic, .*focal"),
    (lambda: losses.compose(reward="none"), r"reward = 'none'; allowed: log_ratio"),
    (lambda: losses.compose(offset="gap"), r"offset = 'gap'.*; allowed: none, constant"),
    (lambda: losses.compose(delta=2.0), r"delta = 2.0 has no effect with reward=log_ratio.* link hinge"),
    (lambda: losses.compose(betta=1.0), r"unknown hyper-parameter betta \(did you mean beta"),
    (lambda: losses.compose(link="debiased", label_smoothing=0.5), "allowed: 0.0 to 0.499"),
    (lambda: losses.compose(reward="f_divergence", divergence="tv"), "divergence = 'tv'; allowed: reverse_kl"),
    (lambda: losses.get("sum"), "no parts; give weights"),
    (lambda: losses.weighted_sum({"dpo": 1.0}, sft={}), "sft has no weight; allowed: dpo"),
    (lambda: losses.weighted_sum({"dpo": 1.0, "sft": 1.0}, dpo={"tau": 1.0}), "unknown hyper-parameter tau"),
    (lambda: losses.weighted_sum({"dpo": 1.0, "dpoo": 1.0}), "loss = 'dpoo'"),
    (lambda: losses.section("dpo+much*sft"), "'much' is no number"),
    (lambda: losses.section("dpo+0.2*"), "names no loss"),
], ids=range(13))
def test_what_cannot_be_composed_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
