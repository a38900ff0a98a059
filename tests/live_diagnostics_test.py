"""Live diagnostics: every number against a slow, explicit float64 computation, and the stage that writes them."""

from __future__ import annotations

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from alignax import configs, data, metrics, models, step, train
from alignax.diagnostics import (
    agreement,
    attribution,
    ches,
    entanglement,
    lens,
    live,
    noise,
    profile,
    properties,
    squeezing,
)
from alignax.types import ConfigError

pytestmark = pytest.mark.slow

CONFIG = models.DecoderConfig(vocab_size=17, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2,
                              num_kv_heads=1, head_dim=4, max_positions=32)
SPEC = step.ModelSpec(CONFIG)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@functools.cache
def _records():
    rng = np.random.default_rng(3)
    draw = lambda low, high: rng.integers(1, 17, rng.integers(low, high)).tolist()
    return tuple(data.token_record(f"r{i}", draw(2, 5), (draw(2, 6), draw(2, 6))) for i in range(4))


def batch():
    return data.padded(_records(), K=2, T=12, L=6, pad_id=0)


def params64():
    tree = models.init_params(CONFIG, jax.random.key(1))
    return {"model": jax.tree.map(lambda p: 3 * np.asarray(p, np.float64), tree)}


def logps(params, some):
    return step.compute(SPEC, params, None, some, {"logps"})["logps"]


def tilted(params, size=0.05):
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda p: p + size * rng.normal(size=p.shape), params)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


# --- pure functions --------------------------------------------------------------------------------------------------


def test_ches_is_the_published_score_and_padding_changes_nothing():
    rng = np.random.default_rng(0)
    hidden, mask = rng.normal(size=(3, 2, 5, 4)), np.arange(5) < rng.integers(1, 6, (3, 2, 1))
    score, normalised = ches.ches(jnp.asarray(hidden), jnp.asarray(mask))
    for b in range(3):
        won, lost = hidden[b, 0][mask[b, 0]], hidden[b, 1][mask[b, 1]]
        expected = won.sum(0) @ lost.sum(0) - won.sum(0) @ won.sum(0)
        np.testing.assert_allclose(score[b], expected, rtol=1e-5)
        np.testing.assert_allclose(normalised[b], won.mean(0) @ lost.mean(0) - won.mean(0) @ won.mean(0), rtol=1e-5)
    more = np.concatenate([hidden, 9 * np.ones((3, 2, 3, 4))], 2)
    longer = ches.ches(jnp.asarray(more), jnp.asarray(np.pad(mask, ((0, 0), (0, 0), (0, 3)))))
    np.testing.assert_allclose(longer, (score, normalised), rtol=1e-6)
    same = ches.ches(jnp.asarray(hidden[:, [0, 0]]), jnp.asarray(mask[:, [0, 0]]))
    np.testing.assert_allclose(same, 0, atol=1e-5)
    np.testing.assert_allclose(ches.ches(jnp.asarray(3 * hidden), jnp.asarray(mask))[0], 9 * score, rtol=1e-5)


def test_entanglement_products_are_those_of_each_pairs_gradients(x64):
    params, some = params64(), batch()
    each, mean = jax.jit(lambda p: entanglement.per_example(logps, p, step.split_batch(some, 4)))(params)
    jacobian = jax.jit(jax.jacrev(lambda p: logps(p, some)))(params)
    grads = np.stack([flat(jax.tree.map(lambda j, i=i, k=k: j[i, k], jacobian)) for i in range(4)
                      for k in range(2)]).reshape(4, 2, -1)
    np.testing.assert_allclose(each.chosen, (grads[:, 0] ** 2).sum(-1), rtol=1e-9)
    np.testing.assert_allclose(each.rejected, (grads[:, 1] ** 2).sum(-1), rtol=1e-9)
    np.testing.assert_allclose(each.inner, (grads[:, 0] * grads[:, 1]).sum(-1), rtol=1e-9)
    whole = grads.mean(0)
    np.testing.assert_allclose([mean.chosen, mean.rejected, mean.inner],
                               [whole[0] @ whole[0], whole[1] @ whole[1], whole[0] @ whole[1]], rtol=1e-9)
    # The formulas against a tiny step of gradient descent on one pair, d_w = 2 and d_l = 0.5.
    moved = jax.tree.map(lambda j: 2 * j[1, 0] - 0.5 * j[1, 1], jacobian)
    eta = 1e-10
    after = jax.jit(lambda p: logps(p, some))(jax.tree.map(lambda p, g: p + eta * g, params, moved))
    before = jax.jit(lambda p: logps(p, some))(params)
    up, down = entanglement.first_order(each, 2.0, 0.5)
    np.testing.assert_allclose((after - before)[1] / eta, [up[1], down[1]], rtol=1e-3)
    found = entanglement.numbers(each, mean, 2.0, 0.5)
    broken = grads[:, 0] @ grads[:, 1].T
    assert float(found["chosen_falls"]) == np.mean(np.diag(broken) > 4 * (grads[:, 0] ** 2).sum(-1))
    assert float(found["rejected_rises"]) == np.mean(np.diag(broken) > 0.25 * (grads[:, 1] ** 2).sum(-1))


def test_entangled_gradients_fall_together_and_never_both_conditions_fail_wrongly():
    # |g_w| = 1, |g_l| = 2, parallel: the chosen falls. The other way round the rejected rises.
    found = entanglement.Products(*(jnp.array(x) for x in ([1.0, 4.0], [4.0, 1.0], [2.0, 2.0])))
    up, down = entanglement.first_order(found, 1.0, 1.0)
    np.testing.assert_array_equal(up, [1 - 2, 4 - 2])
    np.testing.assert_array_equal(down, [2 - 4, 2 - 1])
    told = entanglement.numbers(found, entanglement.Products(*(x.mean() for x in found)))
    assert float(told["chosen_falls"]) == 0.5 and float(told["rejected_rises"]) == 0.5
    assert float(told["condition_ratio"]) == 2.0 and float(told["cosine"]) == 1.0


def test_noise_estimates_recover_mean_and_trace(x64):
    rng = np.random.default_rng(0)
    mean, n, dims = np.array([0.3, -0.2, 0.5]), 64, 3
    examples = jnp.asarray(mean + 0.7 * rng.normal(size=(400, n, dims)))
    squares, whole = jax.vmap(lambda x: noise.per_example(lambda part: part, jnp.zeros(dims), x))(examples)
    signal, trace = noise.estimates(squares.mean(1), whole, 1, n)
    assert float(signal.mean()) == pytest.approx(mean @ mean, rel=0.03)
    assert float(trace.mean()) == pytest.approx(dims * 0.49, rel=0.03)
    # E |g|^2 over b examples is |G|^2 + trace / b; at 4 and 10 examples both come back exactly.
    np.testing.assert_allclose(noise.estimates(2.0 + 3.0 / 4, 2.0 + 3.0 / 10, 4, 10), (2.0, 3.0), rtol=1e-12)
    equal = noise.per_example(lambda part: part, jnp.zeros(dims), jnp.broadcast_to(jnp.asarray(mean), (5, dims)))
    assert float(noise.estimates(equal[0].mean(), equal[1], 1, 5)[1]) == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(noise.numbers(*equal)["norm_max"], np.linalg.norm(mean))


def test_squeezing_factors_are_the_stated_ones_and_one_real_step():
    p = jnp.array([0.55, 0.25, 0.15, 0.04, 0.01])
    np.testing.assert_allclose(squeezing.step_factors(p, 4, 1.0), [1.160, 0.860, 0.778, 0.697, 0.249], atol=1e-3)
    logits = jnp.log(p)
    after = jax.nn.softmax(logits - 1.0 * jax.grad(lambda z: jax.nn.log_softmax(z)[4])(logits))
    np.testing.assert_allclose(squeezing.step_factors(p, 4, 1.0), after / p, rtol=1e-5)
    up = squeezing.step_factors(p, 4, -1.0)
    assert np.all(np.diff(np.asarray(up)[:4]) > 0)  # raising one: the likeliest other loses most
    found = squeezing.moved(jnp.log(p), jnp.log(after), jnp.array(4))
    assert float(found["freed"]) == pytest.approx(float(p[4] - after[4]), rel=1e-4)
    assert float(found["top_log_ratio"]) == pytest.approx(math.log(1.160), abs=1e-3)
    assert float(found["fell"]) == 0.75
    assert float(found["other_log_ratio"]) == pytest.approx(
        math.log(float(after[1:4].sum() / p[1:4].sum())), abs=1e-5)
    told = squeezing.numbers({k: v[None] for k, v in found.items()}, jnp.array([True]))
    assert float(told["to_top"]) == pytest.approx(float((after[0] - p[0]) / (p[4] - after[4])), rel=1e-4)


def test_ranking_accuracy_and_the_idealised_one():
    policy = jnp.array([[-1.0, -2.0], [-3.0, -1.0], [-2.0, -2.0]])
    ref = jnp.array([[-5.0, 0.0], [-1.0, 0.0], [0.0, -1.0]])
    assert float(agreement.ranking_accuracy(policy)) == pytest.approx(2 / 3)
    lengths = jnp.array([[1.0, 4.0], [6.0, 1.0], [1.0, 1.0]])
    assert float(agreement.ranking_accuracy(policy, lengths)) == pytest.approx(2 / 3)
    # a = 0.75 at beta 0.1 moves the log-ratio by 10 log 3 = 10.986; at beta 1 by 1.0986.
    assert float(agreement.idealised_accuracy(ref, 0.1, 0.75)) == 1.0
    assert float(agreement.idealised_accuracy(ref, 1.0, 0.75)) == pytest.approx(2 / 3)
    assert float(agreement.idealised_accuracy(ref, 1.0, 1.0)) == pytest.approx(1.0)  # log 999 = 6.9 > 5
    x, y = np.random.default_rng(0).normal(size=(2, 20))
    found = agreement.correlation(jnp.asarray(x), jnp.asarray(y))
    assert float(found) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-5)
    assert float(agreement.correlation(jnp.ones(4), jnp.arange(4.0))) == 0.0


def test_thirds_and_the_first_divergence_count_scored_tokens():
    values = jnp.array([[1.0, 2, 3, 4, 5, 6, 99], [7.0, 99, 99, 99, 99, 99, 99]])
    mask = jnp.array([[True] * 6 + [False], [True] + [False] * 6])
    found = profile.thirds(values, mask)
    expected = {"first": 4.0, "begin": 10 / 3, "middle": 3.5, "end": 5.5}
    assert {k: float(v) for k, v in found.items()} == pytest.approx(expected)
    targets = jnp.array([[[1, 2, 3], [1, 4, 3]], [[1, 2, 3], [1, 2, 3]], [[5, 2, 3], [1, 4, 3]]])
    mask = jnp.ones((3, 2, 3), bool).at[1, 1, 2].set(False)
    slot, there = profile.first_divergence(targets, mask)
    assert slot.tolist() == [1, 0, 0] and there.tolist() == [True, False, True]


def test_the_last_layer_of_the_lens_is_the_model(x64):
    params, some = params64(), batch()
    stream = some.streams["pair"]
    gather = lambda hidden: step.gather_at(hidden, stream, stream.row[:, 0, 0], stream.col[:, 0, 0])
    found = lens.by_layer(CONFIG, params["model"], stream, gather)
    assert found.shape == (2, 4, 17)
    token = np.take_along_axis(np.asarray(found[-1]), stream.targets[:, 0, 0][:, None], -1)[:, 0]
    np.testing.assert_allclose(token, step.compute(SPEC, params, None, some, {"token_logps"})["token_logps"][:, 0, 0],
                               rtol=1e-9)
    one = models.DecoderConfig(**{f: getattr(CONFIG, f) for f in ("vocab_size", "hidden_size", "intermediate_size",
                               "num_heads", "num_kv_heads", "head_dim", "max_positions")}, num_layers=1)
    cut = {**params["model"], "layers": jax.tree.map(lambda p: p[:1], params["model"]["layers"])}
    hidden = models.forward(one, cut, stream.tokens, stream.segment, stream.prefix, stream.position)
    np.testing.assert_allclose(found[0], jax.nn.log_softmax(models.logits(one, cut, gather(hidden))), rtol=1e-9)


# --- attribution -----------------------------------------------------------------------------------------------------

OPTIMIZERS = [("sgd", {}), ("sgd", {"momentum": 0.8}), ("sgd", {"momentum": 0.8, "nesterov": True}),
              ("adam", {"b1": 0.7}), ("adamw", {"weight_decay": 0.3, "eps_root": 1e-6}),
              ("rmsprop", {}), ("rmsprop", {"eps_in_sqrt": False, "eps": 1e-4})]


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_the_parts_of_an_update_sum_to_it(x64, name, options):
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(3, 2))), "b": jnp.asarray(rng.normal(size=4))}
    draw = lambda: jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
    rule = optax.chain(optax.clip_by_global_norm(1.5), getattr(optax, name)(0.01, **options))
    state = rule.init(params)
    for _ in range(3):
        sides = {"chosen": draw(), "rejected": draw()}
        whole = jax.tree.map(jnp.add, *sides.values())
        before = state
        update, state = rule.update(whole, before, params)
        clip = attribution.clip_factor(optax.tree.norm(whole), 1.5)
        clipped = {k: jax.tree.map(lambda g: clip * g, v) for k, v in sides.items()}  # noqa: B023
        parts = attribution.split_update(name, options, 0.01, before, state, clipped, params)
        np.testing.assert_allclose(sum(map(flat, parts.values())), flat(update), rtol=1e-9)
        params = optax.apply_updates(params, update)
    earlier = {"earlier"} if "momentum" in options or "adam" in name else set()
    assert set(parts) == {"chosen", "rejected"} | earlier | ({"decay"} if name == "adamw" else set())
    # A side alone: the same preconditioner, so that the parts scale with their gradients.
    double = attribution.split_update(name, options, 0.01, before, state, {"chosen": jax.tree.map(
        lambda g: 2 * clip * g, sides["chosen"])}, params)
    np.testing.assert_allclose(flat(double["chosen"]), 2 * flat(parts["chosen"]), rtol=1e-9)


def test_cotangents_are_cut_into_sides_and_linearised_changes_are_the_measured_ones(x64):
    cotangent = {"logps": jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), "extra": jnp.asarray([5.0, 6.0])}
    sides = attribution.side_cotangents(cotangent, {"logps": True, "extra": False})
    assert sides["chosen"]["logps"].tolist() == [[1, 0], [3, 0]] and sides["chosen"]["extra"].tolist() == [0, 0]
    assert sides["rejected"]["logps"].tolist() == [[0, 2], [0, 4]] and sides["other"]["extra"].tolist() == [5, 6]
    assert "other" not in attribution.side_cotangents({"logps": cotangent["logps"]}, {"logps": True})
    params, some = params64(), batch()
    direction = jax.tree.map(lambda p: 1e-8 * (tilted({"x": p}, 1.0)["x"] - p), params)
    half = jax.tree.map(lambda d: 0.5 * d, direction)
    predicted, measured = attribution.changes(lambda p: logps(p, some), params, {"a": half, "b": half}, direction)
    np.testing.assert_allclose(predicted["a"] + predicted["b"], measured, rtol=1e-3)
    np.testing.assert_allclose(predicted["a"], predicted["b"])
    assert attribution.r_squared([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1.0
    assert attribution.r_squared([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]) == 0.0
    assert math.isnan(attribution.r_squared([1.0], [1.0]))


# --- intervals, costs, settings --------------------------------------------------------------------------------------


def test_the_interval_grows_with_the_cost_and_holds_the_share():
    cells = dict(probe=640.0, pairs=160.0, batch=2560.0, layers=4)
    looks = {name: live.cost((name,), **cells) for name in live.GROUPS}
    assert all(value > 0 for value in looks.values())
    assert looks["attribution"] > looks["entanglement"] > looks["noise"]
    both = live.cost(("displacement", "agreement"), **cells)
    assert both == looks["displacement"]  # they share their passes
    every = live.interval(live.cost(tuple(live.GROUPS), **cells), 4 * 2560.0)
    spent = live.MARGIN * live.cost(tuple(live.GROUPS), **cells) / (4 * 2560.0)
    assert spent / every <= live.SHARE < spent / (every - 1)


@pytest.mark.parametrize(("change", "message"), [
    ({"diagnostics": ("displacment",)}, "allowed: each at most once of displacement"),
    ({"diagnostics": ("ches", "ches")}, "at most once"),
    ({"diagnose_every": 5}, "has no effect with config.method.diagnostics=()"),
    ({"diagnostics": ("ches",), "diagnose_every": -1}, "diagnose_every=-1"),
    ({"diagnostics": ("attribution",), "optim.name": "lion"}, "cannot split an update of 'lion'"),
    ({"diagnostics": ("attribution",), "optim.options": {"nesterov": True}}, "with nesterov"),
])
def test_settings_that_cannot_work_are_refused(change, message):
    config = configs.embedded_run("dpo", tiny=True)
    for key, value in change.items():
        section, _, last = ("method." + key).rpartition(".")
        target = config
        for part in section.split("."):
            target = target[part]
        with target.unlocked():
            target[last] = value
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(")", r"\)")):
        configs.check(config)
    for loss in ("sft", "bt_rm"):
        config = configs.embedded_run(loss, tiny=True)
        config.method.diagnostics = ("displacement",)
        with pytest.raises(ConfigError, match="allowed: \\(\\), or a loss of pairs"):
            configs.check(config)


def test_excess_is_zero_where_everything_follows_the_baseline_and_verdicts_follow_their_rules():
    base = -np.linspace(1, 3, 20)
    assert tuple(properties.excess(base, base)) == (0, 0, 0)
    shifted = properties.excess(base - 2, base)
    assert shifted == pytest.approx((-2, -2, -2))
    low, high = properties.Interval(-9.0, -10.0, -8.0), properties.Interval(1.0, 0.5, 1.5)
    steps = np.arange(5.0)
    falling = {"step": steps, "baseline": 0 * steps, "rejected": -3 * steps, "chosen": np.array([0, 2, 3, 2, 1.0])}
    told = [v.verdict for v in properties.judge(high, low, falling)]
    assert told == ["shown", "shown", "not shown"]
    rising = falling | {"chosen": steps}
    assert [v.verdict for v in properties.judge(high, low, rising)] == ["shown", "not shown", "not shown"]
    both = [v.verdict for v in properties.judge(properties.Interval(-6.0, -7.0, -5.0), low, {})]
    assert both == ["not shown", "not judged", "shown"]
    fell, rose = properties.Interval(-30.0, -33.0, -27.0), properties.Interval(2.0, 1.0, 3.0)
    for raw, excess, drift in ((fell, high, "shown"), (rose, high, "not shown"), (fell, low, "not shown")):
        assert properties.judge(excess, low, rising, raw)[3].verdict == drift
    wide = properties.Interval(-1.0, -3.0, 1.0)
    assert [v.verdict for v in properties.judge(wide, low, rising)][2] == "not shown"


# --- a run -----------------------------------------------------------------------------------------------------------


def small(steps: int, names=tuple(live.GROUPS), every: int = 1, **optim):
    config = configs.embedded_run("dpo", tiny=True)
    config.stages = ("sft", "sample", "method")
    config.sft.steps = 30
    config.method.steps, config.method.eval_every, config.method.checkpoint_every = steps, steps, steps // 2
    config.method.diagnostics, config.method.diagnose_every = names, every
    config.method.optim.update({"clip_norm": 0.1} | optim)  # below every gradient's norm, so that the clip matters
    return config


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    result = train.run(small(24), folder, console=Console(quiet=True))
    return folder, result, metrics.read_metrics(folder, stage="method", split="diagnostics")


def test_every_group_is_written_at_every_update(watched):
    _, _, rows = watched
    assert [row["step"] for row in rows] == list(range(25))
    for row in rows:
        groups = {key.split("/")[0] for key in row if "/" in key}
        assert groups == set(live.GROUPS) - ({"attribution"} if row["step"] == 0 else set())
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))
    first = rows[0]
    for side in live.SIDES:
        assert abs(first[f"displacement/{side}"]) < 1e-4
    assert first["entanglement/pull"] == pytest.approx(0.05, rel=1e-4)  # beta sigmoid(0)


def test_attribution_predicts_the_measured_change_over_a_run(watched):
    _, _, rows = watched
    rows = rows[1:]
    assert len(rows) >= 20
    for side in live.SIDES:
        fit = attribution.r_squared([r[f"attribution/predicted_{side}"] for r in rows],
                                    [r[f"attribution/measured_{side}"] for r in rows])
        assert fit > 0.8, (side, fit)
    assert np.median([r["attribution/r_squared"] for r in rows]) > 0.98
    for row in rows:
        parts = [row[f"attribution/chosen_from_{p}"] for p in ("chosen", "rejected", "earlier", "decay")]
        assert sum(parts) == pytest.approx(row["attribution/predicted_chosen"], abs=1e-5)
    # The measured changes of the few prompts add up to how far those prompts have moved.
    assert sum(r["attribution/measured_chosen"] for r in rows) * rows[-1]["displacement/chosen"] > 0


def test_watching_changes_nothing_and_a_resumed_run_writes_the_same_rows(watched, tmp_path):
    _, result, rows = watched
    plain = train.run(small(24, (), 0), tmp_path / "plain", console=Console(quiet=True))
    assert plain["stages"]["method"]["fingerprint"] == result["stages"]["method"]["fingerprint"]
    assert metrics.read_metrics(tmp_path / "plain", split="diagnostics") == []


def test_a_stopped_run_goes_on_with_the_same_rows(watched, tmp_path, monkeypatch):
    _, result, rows = watched
    look, seen = train.watch.Watch.look, []

    def stops(self, state, *args):
        seen.append(1)
        if len(seen) == 18:
            raise KeyboardInterrupt
        return look(self, state, *args)

    monkeypatch.setattr(train.watch.Watch, "look", stops)
    with pytest.raises(KeyboardInterrupt):
        train.run(small(24), tmp_path / "run", console=Console(quiet=True))
    monkeypatch.setattr(train.watch.Watch, "look", look)
    again = train.run(small(24), tmp_path / "run", console=Console(quiet=True))
    assert again["stages"]["method"]["fingerprint"] == result["stages"]["method"]["fingerprint"]
    assert metrics.read_metrics(tmp_path / "run", stage="method", split="diagnostics") == rows


def test_adapters_micro_batches_and_a_precomputed_reference_are_watched_too(tmp_path):
    config = small(3, learning_rate=3e-4)
    config.method.lora.rank, config.method.accumulation, config.method.reference = 2, 2, "precomputed"
    train.run(config, tmp_path, console=Console(quiet=True))
    rows = metrics.read_metrics(tmp_path, stage="method", split="diagnostics")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows[1:]:
        assert row["attribution/r_squared"] > 0.9
        for side in live.SIDES:
            gap = abs(row[f"attribution/predicted_{side}"] - row[f"attribution/measured_{side}"])
            assert gap < 0.05 * abs(row[f"attribution/measured_{side}"]) + 1e-3


def test_the_default_interval_is_printed(tmp_path):
    with open(tmp_path / "log", "w", encoding="utf-8") as file:
        train.run(small(2, ("displacement",), 0), tmp_path / "run", console=Console(file=file, width=200))
    said = (tmp_path / "log").read_text(encoding="utf-8")
    assert "diagnostics displacement every" in said and "(chosen by cost)" in said
    rows = metrics.read_metrics(tmp_path / "run", stage="method", split="diagnostics")
    assert [row["step"] for row in rows] == [0, 2]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["method"]["diagnostics"] == ["displacement"]
