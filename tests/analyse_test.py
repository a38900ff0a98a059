"""`alignax analyse`: every analysis of a run against explicit computations, its files, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import checkpoint, cli, configs, context, models, step
from alignax.analyses import credit, influence, landscape, of_run, probes, scaling, weights
from alignax.analyses import neurons as of_neurons
from alignax.diagnostics import neurons, scaling_fits
from alignax.diagnostics import probes as arithmetic
from alignax.types import ConfigError

pytestmark = pytest.mark.slow

WORDS = ("he smiled .", "she ate the kite .", "the dog was sad .", "he walked home and smiled .", "Leo saw her .")
PAIRS = [{"prompt": f"{who} saw a {what} .", "chosen": WORDS[n % 5], "rejected": WORDS[(n + 2) % 5], "id": f"p{n}"}
         for n, (who, what) in enumerate((w, t) for w in ("Tom", "Leo", "Emma") for t in ("dog", "cat", "puppy"))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run whose one DPO stage is finished, without the training: its end is the start moved a bit."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in PAIRS))
    config = configs.embedded_run("dpo", tiny=True)
    config.stages, config.method.init = ("method",), "model"
    config.method.data.path, config.method.data.eval_fraction = str(folder / "pairs.jsonl"), 0.0
    stored = json.loads(json.dumps(config.to_dict(), default=list))
    checkpoint.write_json(folder / "config.json", stored)
    tokenizer = context.load_tokenizer(stored["tokenizer"], "")
    _, initial = context.load_model(stored["model"], vocab_size=tokenizer.vocab_size, seed=0)
    keys = iter(jax.random.split(jax.random.key(5), 100))
    moved = jax.tree.map(lambda a: a + 0.05 * jax.random.normal(next(keys), a.shape), initial)
    context.save_stage_params(folder / "stages" / "method", moved, base="model", adapters=None)
    return folder


@pytest.fixture(scope="module")
def stage(run):
    return of_run.open_stage(run, "", prompts=9)


@pytest.fixture(scope="module")
def logps(stage):
    """(log pi_start, log pi_end) [9,2] of the pairs, one row at a time with room behind it, which no token reads, in
    float64 after the head."""
    config, ones, place = stage.ctx.spec.config, np.ones((1, 32), np.int32), np.arange(32, dtype=np.int32)[None]
    run = jax.jit(lambda p, ids: models.logits(config, p, models.forward(config, p, ids, ones, 0 * ones, place)))

    def one(params, record, k):
        text = np.concatenate([record.prompt, record.completions[k]])
        ids = np.pad(text, (0, 32 - len(text)))[None].astype(np.int32)
        logits = np.asarray(run(params["model"], ids), np.float64)[0, :len(text)]
        logp = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[len(record.prompt) - 1:-1]
        return logp[np.arange(len(record.completions[k])), record.completions[k]].sum()

    return tuple(np.asarray([[one(p, r, k) for k in range(2)] for r in stage.records])
                 for p in (stage.before, stage.after))


def test_the_stage_is_opened_with_both_ends(stage):
    assert (stage.name, stage.init, stage.stages) == ("method", "model", ["method"])
    assert [r.id for r in stage.records] == [f"p{n}" for n in range(9)]
    seen = [index.tolist() for index, _ in stage.batches()]
    assert seen == [[*range(8)], [8, *range(7)]]  # the last batch is filled up


def test_of_a_list_the_first_two_are_the_pair(run, stage, monkeypatch):
    """Whatever else a list holds is cut off with its scores, its labels and its columns. Scores may contradict the
    order, where labels were drawn: training goes by the order."""
    whole = of_run.examine.stage_setup.records_of

    def longer(*args):
        records, *rest = whole(*args)
        return [dataclasses.replace(r, completions=(*r.completions, r.completions[0]), scores=(1.0, 2.0, 0.0),
                                    labels=(1.0, 0.0, 1.0), completion_ended=(*r.completion_ended, True))
                for r in records], *rest

    monkeypatch.setattr(of_run.examine.stage_setup, "records_of", longer)
    opened = of_run.open_stage(run, "method", prompts=3)
    assert [r.id for r in opened.records] == ["p0", "p4", "p8"]
    assert all(r.scores == (1.0, 2.0) and r.labels == (1.0, 0.0) and len(r.completion_ended) == 2
               for r in opened.records)
    assert next(opened.batches())[1].streams["pair"].targets.shape[:2] == (3, 2)
    for mine, whole_one in zip(opened.records, stage.records[::4], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(mine.completions, whole_one.completions, strict=True))


def test_a_text_has_no_end_token_and_is_cut(stage):
    assert stage.text(0, 0) == "he smiled ." and stage.text(3, 0, 10) == "he walked…"


def test_losses_that_pairs_alone_cannot_give_are_refused(stage):
    of = lambda name: stage._replace(section={**stage.section, "loss": {"name": name}})
    assert of_run.loss_of_pairs(of("aot")).name and of_run.loss_of_pairs(of("ipo"), single=True).name
    with pytest.raises(ConfigError, match="depends on the other pairs"):
        of_run.loss_of_pairs(of("aot"), single=True)
    with pytest.raises(ConfigError, match="also reads kl_logps, kl_ref_logps"):
        of_run.loss_of_pairs(of("kto"))


def test_weights(stage):
    found = weights.analyse(stage).numbers["groups"]
    old, new = (np.asarray(p["model"]["layers"]["mlp"]["up"], np.float64)[1] for p in (stage.before, stage.after))
    assert {"layers/0/mlp", "layers/1/attention", "embedding", "all"} <= found.keys()
    assert found["layers/1/mlp"]["l2"] > np.linalg.norm(new - old)  # and the two other matrices
    total = sum(float(((np.asarray(a, np.float64) - np.asarray(b)) ** 2).sum()) for a, b in zip(
        jax.tree.leaves(stage.after["model"]), jax.tree.leaves(stage.before["model"]), strict=True))
    assert found["all"]["l2"] == pytest.approx(total ** 0.5, rel=1e-6)
    names = list(found)  # the way of a token: what stands before the layers, the layers by number, what stands behind
    assert names[0] == "embedding" and names[-1] == "all" and names.index("norm") > names.index("layers/1/mlp")
    assert names.index("layers/0/mlp") < names.index("layers/1/attention")


def test_landscape(stage, logps):
    result = landscape.analyse(stage)
    at = lambda name, alpha: result.numbers[name][result.numbers["alpha"].index(pytest.approx(alpha, abs=1e-9))]
    margin = (logps[1] - logps[0]) @ [1, -1]
    beta = stage.section["loss"]["beta"]
    assert at("loss", 0.0) == pytest.approx(np.log(2), abs=1e-5) and at("margin", 0.0) == pytest.approx(0, abs=1e-4)
    assert at("loss", 1.0) == pytest.approx(np.logaddexp(0, -beta * margin).mean(), abs=1e-4)
    assert at("margin", 1.0) == pytest.approx(margin.mean(), abs=1e-3)
    length = np.asarray([len(r.completions[0]) for r in stage.records])
    assert at("chosen", 0.0) == pytest.approx((logps[0][:, 0] / length).mean(), abs=1e-4)
    half = jax.tree.map(lambda a, b: (a + b) / 2, stage.before, stage.after)
    again = landscape.along(stage._replace(after=half), stage.before, half)
    assert again["margin"][np.isclose(landscape.ALPHAS, 1).argmax()] == pytest.approx(at("margin", 0.5), abs=1e-3)
    length = np.asarray([len(r.completions[1]) for r in stage.records])
    assert at("rejected", 1.0) == pytest.approx((logps[1][:, 1] / length).mean(), abs=1e-4)
    # To the end of another run, here one that ended where this one began: the same line, walked the other way.
    turned = landscape.analyse(stage, other=stage._replace(after=stage.before))
    assert turned.numbers["loss"] == pytest.approx(result.numbers["loss"][::-1], rel=1e-5)
    best = int(np.argmin(result.numbers["loss"]))
    assert f"{result.numbers['loss'][best]:.4g}, at {landscape.ALPHAS[best]:+.1f}" in result.notes[1]
    with pytest.raises(ConfigError, match="a model of another shape"):
        small = dataclasses.replace(stage.ctx.spec.config, num_layers=1)
        other = dataclasses.replace(stage.ctx, spec=dataclasses.replace(stage.ctx.spec, config=small))
        landscape.analyse(stage, other=stage._replace(ctx=other))


def test_credit(stage, logps):
    result = credit.analyse(stage, shown=2)
    for n, pair in enumerate(result.numbers["pairs"]):
        for k, side in enumerate(("chosen", "rejected")):
            assert len(pair[side]["tokens"]) == len(stage.records[n].completions[k])
            assert sum(pair[side]["credit"]) == pytest.approx(logps[1][n, k] - logps[0][n, k], abs=1e-3)
    assert len(result.rows) == 4
    pair = result.numbers["pairs"][1]["rejected"]
    name, total, count, best, worst = result.rows[3]
    assert name == "p1 rejected" and total == pytest.approx(sum(pair["credit"])) and count == len(pair["credit"])
    for shown, pick in ((best, np.argmax), (worst, np.argmin)):
        at = pick(pair["credit"])
        assert shown == f"{pair['tokens'][at].strip()} {pair['credit'][at]:+.2f}"


def test_lines_hold_every_token_once():
    tokens = ["x" * 7] * 40
    found = credit.lines(tokens)
    assert [number for line in found for number, _, _ in line] == list(range(40)) and len(found) == 4
    assert all(column + width <= 93 for line in found for _, column, width in line)


def test_influence_is_the_product_of_explicit_gradients(stage):
    found = influence.analyse(stage, query="chosen", method="tracin").numbers["scores"]
    spec, beta = stage.ctx.spec, stage.section["loss"]["beta"]

    @functools.partial(jax.jit, static_argnums=2)
    def gradients(params, batch, chosen):
        def value(p, n):
            held = step.compute(spec, p, stage.before, batch, {"logps", "ref_logps"})
            logps, ratio = held["logps"][n], (held["logps"] - held["ref_logps"])[n]
            return -logps[0] if chosen else -jax.nn.log_sigmoid(beta * (ratio[0] - ratio[1]))

        grads = jax.lax.map(lambda n: jax.grad(value)(params, n), jnp.arange(8))
        return jnp.concatenate([g.reshape(8, -1) for g in jax.tree.leaves(grads)], 1)

    asked, trained = [], []
    for index, batch in stage.batches():
        own = [place for place, n in enumerate(index) if n >= 8 or len(asked) == 0]
        asked.append(np.asarray(gradients(stage.after, batch, True), np.float64)[own])
        trained.append(np.asarray(gradients(stage.after, batch, False), np.float64)[own])
    asked, trained = np.concatenate(asked), np.concatenate(trained)
    assert len(asked) == 9
    np.testing.assert_allclose([s["influence"] for s in found], -trained @ asked.mean(0), rtol=1e-3, atol=1e-4)
    assert sum(abs(s["share"]) for s in found) == pytest.approx(1)
    # One sign for all methods: where the inverse of the curvature is nearly the identity, all tell the same.
    order = lambda method: [s["influence"] for s in influence.analyse(stage, method=method).numbers["scores"]]
    assert np.corrcoef(order("datainf"), [s["influence"] for s in found])[0, 1] > 0.5
    # More weight on pairs lowers their own loss at the end: the mean influence on it is below 0 under every method.
    own = influence.analyse(stage, query="loss", method="tracin").numbers["scores"]
    np.testing.assert_allclose([s["influence"] for s in own], -trained @ trained.mean(0), rtol=1e-3, atol=1e-4)
    of_rejected = influence.analyse(stage, query="rejected", method="tracin").numbers["scores"]
    assert np.corrcoef([s["influence"] for s in of_rejected], [s["influence"] for s in found])[0, 1] < 0.99
    with pytest.raises(ConfigError, match="--query=beauty"):
        influence.analyse(stage, query="beauty")


def test_projected_gradients_keep_the_order(stage, monkeypatch):
    """With so few pairs a projection to 1024 numbers keeps the products within its noise."""
    whole = np.asarray([s["influence"] for s in influence.analyse(stage, method="tracin").numbers["scores"]])
    monkeypatch.setattr(influence, "_WHOLE", 1)
    narrow = influence.analyse(stage, method="tracin").numbers
    assert narrow["projected"]
    assert np.corrcoef(whole, [s["influence"] for s in narrow["scores"]])[0, 1] > 0.7


def test_probes_of_planted_states_and_the_expressive_share(stage, logps):
    draws = np.random.default_rng(0)
    states = draws.normal(size=(40, 2, 6))
    assert abs(probes.cognitive(states) - 0.5) < 0.3
    halves = 0.01 * draws.normal(size=(40, 2, 6))
    halves[::2, 0, 0] += 5
    halves[1::2, 0, 1] += 5  # each half's direction tells its own pairs apart, and not those that it is tested on
    assert probes.cognitive(halves) < 0.9
    states[:, 0, 2] += 12
    assert probes.cognitive(states) == 1.0
    assert probes.cognitive(states[:, ::-1]) == 1.0  # the direction is found, not given: whichever side stands first
    told = probes.analyse(stage).numbers["phases"]
    length = np.asarray([[len(c) for c in r.completions] for r in stage.records])
    for name, values in zip(("model", "method"), logps, strict=True):
        assert told[name]["expressive"] == np.mean((values / length) @ [1, -1] > 0)
    with pytest.raises(ConfigError, match="found 4 pairs"):
        probes.analyse(stage._replace(records=stage.records[:4]))


# --- neurons --------------------------------------------------------------------------------------------------------


def test_reading_and_patching_a_decoder(stage):
    config, params = stage.ctx.spec.config, stage.after["model"]
    stream = next(stage.batches())[1].streams["pair"]
    grids = stream.tokens, stream.segment, stream.prefix, stream.position
    live = np.asarray(stream.segment)[..., None] > 0
    plain = np.asarray(models.forward(config, params, *grids)) * live
    hidden, inner = neurons.read(config, params, stream, lambda x: x)
    np.testing.assert_allclose(np.asarray(hidden) * live, plain, rtol=1e-5, atol=1e-5)
    assert inner.shape == (2, *stream.tokens.shape, config.intermediate_size)
    mlp = jax.tree.map(lambda a: np.asarray(a[0], np.float64), params["layers"]["mlp"])
    np.testing.assert_allclose(neurons.values(params)[:config.intermediate_size], mlp["down"])
    none = jnp.zeros(2 * config.intermediate_size, bool)
    same = neurons.patched(config, params, stream, none, 0.0 * none)
    np.testing.assert_allclose(np.asarray(same) * live, plain, rtol=1e-5, atol=1e-5)
    # All neurons of the last layer at 0: the model without its last MLP.
    last = none.at[config.intermediate_size:].set(True)
    without = {**params, "layers": {**params["layers"], "mlp": {
        **params["layers"]["mlp"], "down": params["layers"]["mlp"]["down"].at[1].set(0)}}}
    np.testing.assert_allclose(np.asarray(neurons.patched(config, params, stream, last, 0.0 * none)) * live,
                               np.asarray(models.forward(config, without, *grids)) * live, rtol=1e-5, atol=1e-5)
    # A factor on a key is a factor on the activation of a gated MLP, of the chosen neuron alone.
    one = none.at[3].set(True)
    scaled = neurons.read(config, neurons.scale_keys(params, one, 10.0), stream, lambda x: x)[1]
    ratio = np.where(np.arange(config.intermediate_size) == 3, 10.0, 1.0)
    np.testing.assert_allclose(scaled[0] * live, np.asarray(inner[0]) * ratio * live, rtol=1e-4, atol=1e-6)


def test_the_direction_before_the_norm_orders_states_alike():
    config = models.DecoderConfig(vocab_size=5, hidden_size=6, intermediate_size=8, num_layers=1, num_heads=1,
                                  num_kv_heads=1, head_dim=6, max_positions=8)
    draws = np.random.default_rng(1)
    weight, direction, state = (jnp.asarray(draws.normal(size=6), jnp.float32) for _ in range(3))
    normed = weight * state / jnp.sqrt((state ** 2).mean())
    found = neurons.before_norm(config, {"norm": weight}, direction)
    np.testing.assert_allclose(found @ state / jnp.sqrt((state ** 2).mean()), normed @ direction, rtol=1e-5)
    plus = neurons.before_norm(dataclasses.replace(config, norm="rms_plus_one"), {"norm": weight - 1}, direction)
    np.testing.assert_allclose(plus, found, rtol=1e-5)
    # A layer norm takes the mean out and divides by the deviation of what is left.
    layer = neurons.before_norm(dataclasses.replace(config, norm="layer"), {"norm": weight}, direction)
    centred = state - state.mean()
    normed = weight * centred / jnp.sqrt((centred ** 2).mean())
    np.testing.assert_allclose(layer @ state / jnp.sqrt((centred ** 2).mean()), normed @ direction, rtol=1e-5)


def test_the_neurons_analysis(stage, logps):
    told = of_neurons.analyse(stage).numbers
    names = list(told["policies"])
    assert names[0] == "start" and "end" in names and set(told["groups"]) == set(arithmetic.GROUPS)
    for name, values in (("start", logps[0]), ("end", logps[1])):
        assert told["policies"][name]["margin"] == pytest.approx((values @ [1, -1]).mean(), abs=1e-3)
    assert sum(g["share"] for g in told["groups"].values()) == pytest.approx(1, abs=1e-5)
    assert sum(g["reduction"] for g in told["groups"].values()) >= told["reduction"]
    policies = told["policies"]
    assert policies["start, all four patched"] != policies["start"]
    half = landscape.along(stage, stage.before, stage.after)["margin"][np.isclose(landscape.ALPHAS, 0.5).argmax()]
    undone = policies["end, half of the change undone"]["margin"] - policies["start"]["margin"]
    assert undone == pytest.approx(half, abs=1e-3)  # along() gives margins less the start's
    assert policies["end, keys of the nearest 7 x 10"] != policies["end"]
    assert told["neurons"] == sorted(told["neurons"], key=lambda n: -abs(n["reduction"]))


def test_the_probe_points_at_the_rejected_and_is_tested_on_other_pairs():
    draws = np.random.default_rng(3)
    states = draws.normal(size=(60, 2, 5))
    states[:, 1, 2] += 4
    probe, accuracy = of_neurons._probe(states)
    assert probe[2] > 0 and abs(probe[2]) == max(abs(probe)) and accuracy > 0.9
    assert of_neurons._probe(draws.normal(size=(60, 2, 200)))[1] < 0.75  # noise that the fitted half is told apart by


# --- several runs ---------------------------------------------------------------------------------------------------


def evaluated(folder, points):
    """A folder with a result.json of these (KL, gold) above a baseline of gold 1."""
    folder.mkdir(exist_ok=True)
    row = lambda name, kl, gold: {"policy": name, "kl_on_policy": kl, "gold_reward": gold}
    checkpoint.write_json(folder / "result.json", {"stages": {"evaluate": {"points": [
        row("sft", 0.0, 1.0), *(row(f"m{n}", kl, 1 + gold) for n, (kl, gold) in enumerate(points))]}}})
    return folder


def test_overoptimisation_finds_a_planted_law(tmp_path):
    d = np.asarray([0.5, 1.0, 1.5, 2.0, 3.0])
    points = list(zip((d ** 2).tolist(), (d * (2.0 - 0.4 * d)).tolist(), strict=True))
    folders = [evaluated(tmp_path / "a", points[:3]), evaluated(tmp_path / "b", points[3:])]
    law = scaling.overoptimisation(folders).numbers["laws"]["best_of_n"]
    assert (law["a"], law["b"], law["peak_d"]) == pytest.approx((2.0, 0.4, 2.5))
    assert scaling.overoptimisation(folders).rows[0][5] == pytest.approx(2.5)
    short = [evaluated(tmp_path / "c", [(x * x, x * (2.0 - 0.4 * x)) for x in (0.5, 1.0, 1.5)])]
    assert scaling.overoptimisation(short).rows[0][5:7] == [None, None]  # its peak lies beyond the policies
    assert scaling.overoptimisation(short).numbers["laws"]["best_of_n"]["peak_d"] == pytest.approx(2.5)
    with pytest.raises(ConfigError, match="found 2 evaluated policies with 2 different KL above 0; needed: 3"):
        scaling.overoptimisation(folders[1:])
    with pytest.raises(ConfigError, match="no result.json"):
        scaling.overoptimisation([tmp_path])


def test_scaling_finds_a_planted_law_and_says_what_it_lacks(monkeypatch, tmp_path):
    law = scaling_fits.PowerLaw(1e4, 0.1)
    rows = [{"run": str(n), "parameters": n, "tokens": 1e6, "loss": float(law(n))} for n in (1e3, 3e3, 1e4)]
    monkeypatch.setattr(scaling, "runs", lambda folders, stage: rows)
    found = scaling.scaling([])
    assert (found.numbers["fit"]["scale"], found.numbers["fit"]["exponent"]) == pytest.approx((1e4, 0.1), rel=1e-6)
    assert found.draw(tmp_path / "figure.png").exists()
    other = [{**row, "parameters": 5000, "tokens": float(row["parameters"])} for row in rows]
    monkeypatch.setattr(scaling, "runs", lambda folders, stage: other)
    assert scaling.scaling([]).numbers["law"] == "L = (scale / D)^exponent"
    monkeypatch.setattr(scaling, "runs", lambda folders, stage: rows[:1] * 3)
    with pytest.raises(ConfigError, match="3 or more runs that differ"):
        scaling.scaling([])


def test_the_figure_of_two_numbers_has_a_line_per_amount_of_tokens(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(scaling.style, "save", lambda figure, path: made.append(figure) or path)
    law = scaling_fits.Chinchilla(1.7, 400.0, 410.0, 0.34, 0.28)
    n, d = (np.ravel(x) for x in np.meshgrid([1e6, 1e7], [1e8, 1.01e8, 1e9]))  # 1% apart: one amount
    scaling._draw_both(n, d, law(n, d), law, tmp_path / "x.png")
    axes = made[0].axes[0]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["D = 100M", "D = 1B"]
    marks = [line for line in axes.lines if line.get_marker() == "o"]
    assert [len(line.get_xdata()) for line in marks] == [4, 2]
    assert [scaling.short(x) for x in (12.0, 999.9, 1234, 2.5e6, 7e9)] == ["12", "1k", "1.23k", "2.5M", "7B"]


def test_runs_reads_tokens_and_the_last_held_out_loss(run):
    rows = [{"stage": "method", "split": "train", "step": 1, "tokens": 50.0},
            {"stage": "method", "split": "train", "step": 2, "tokens": 70.0},
            {"stage": "method", "split": "eval", "step": 0, "loss": 3.0},
            {"stage": "method", "split": "eval", "step": 2, "loss": 2.0}]
    with pytest.raises(ConfigError, match="no loss on held-out records"):
        scaling.runs([run], "")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = scaling.runs([run], "")[0]
    assert (found["tokens"], found["loss"]) == (120.0, 2.0) and found["parameters"] > 1000
    # Rows that logging left out count like those that it wrote; what came after the last held-out loss does not.
    rows = [rows[1], {**rows[1], "step": 4}, {**rows[3], "step": 4}, {**rows[1], "step": 6}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert scaling.runs([run], "")[0]["tokens"] == 4 * 70


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weights", "credit", "landscape"])
def test_the_command_writes_table_figure_and_numbers(run, tmp_path, capsys, name):
    out = tmp_path / name
    assert cli.main(["analyse", name, str(run), "--out", str(out), "--prompts", "9"]) == 0
    shown = capsys.readouterr().out
    assert "method" in shown and "figure.png" in shown
    assert json.loads((out / "result.json").read_text())["analysis"] == name
    assert (out / "figure.png").stat().st_size > 5000 and (out / "figure.svg").exists()


@pytest.mark.parametrize("more, words", [
    (["weights", "{run}", "--stage", "sft"], ["sft", "method"]),
    (["weights", "no/where"], ["no/where", "config.json"]),
    (["influence", "{run}", "--method", "magic"], ["--method=magic", "datainf"]),
    (["credit", "{run}", "--shown", "0"], ["--shown=0"]),
    (["probes", "{run}", "--prompts", "1"], ["--prompts=1", "2 or more"]),
    (["overoptimisation", "{run}"], ["result.json"]),
    (["landscape", "{run}", "--other", "no/where"], ["no/where"]),
], ids=lambda value: " ".join(value[:1]))
def test_what_cannot_work_is_refused(run, capsys, more, words):
    assert cli.main(["analyse", *(word.format(run=run) for word in more)]) == cli.EXIT_ERROR
    shown = capsys.readouterr().err
    assert all(word in shown for word in words), shown
