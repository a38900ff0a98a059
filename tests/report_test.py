"""`alignax report` of a run: what is measured against explicit computations, the page, and what is refused."""

from __future__ import annotations

import io
import re

import jax
import numpy as np
import pytest
from rich.console import Console
from scipy.special import expit

from alignax import cli, configs, data, examine, metrics, models, step, train
from alignax.diagnostics import properties, report_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run with displacement and entanglement watched, and its folder's files with their times."""
    folder = tmp_path_factory.mktemp("run")
    config = configs.embedded_run("dpo", tiny=True)
    config.stages = ("sft", "sample", "method")
    config.sft.steps, config.method.steps, config.method.eval_every = 30, 6, 6
    config.method.diagnostics, config.method.diagnose_every = ("displacement", "entanglement"), 2
    train.run(config, folder, console=Console(quiet=True))
    return folder


@pytest.fixture(scope="module")
def measured(finished):
    ctx, config = examine.open_run(finished, Console(quiet=True))
    return ctx, config, examine.stage(ctx, config, "method", prompts=8, samples=3)


def test_scores_are_those_of_the_explicit_distributions(measured):
    ctx, config, _ = measured
    before, after = ctx.params_of("sft"), ctx.params_of("method")
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(3, ctx.tokenizer.vocab_size, n).tolist()
    texts = [data.token_record(f"t{i}", draw(3 + i), (draw(4), draw(6), draw(5))) for i in range(3)]
    found = examine._score(ctx, before, after, texts, 3)
    for i, record in enumerate(texts):
        states = []
        for k, completion in enumerate(record.completions):
            ids = np.concatenate([record.prompt, completion])[None].astype(np.int32)
            ones, place = np.ones_like(ids), np.arange(ids.shape[1], dtype=np.int32)[None]
            hidden = [models.forward(ctx.spec.config, p["model"], ids, ones, 0 * ones, place) for p in (before, after)]
            p, q = (np.asarray(jax.nn.log_softmax(models.logits(ctx.spec.config, tree["model"], h)), np.float64)[0]
                    for tree, h in zip((before, after), hidden, strict=True))
            where = slice(len(record.prompt) - 1, -1)
            pick = lambda logp: logp[where][np.arange(len(completion)), completion].sum()  # noqa: B023
            np.testing.assert_allclose([found["logps"][i, k], found["ref_logps"][i, k]], [pick(q), pick(p)], rtol=1e-4)
            np.testing.assert_allclose(found["kl"][i, k], (np.exp(p) * (p - q))[where].sum(), rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(found["entropy"][i, k], -(np.exp(q) * q)[where].sum(), rtol=1e-4)
            states.append(np.asarray(hidden[0][0, where], np.float64).mean(0))
        expected = states[0] @ states[1] - states[0] @ states[0]
        np.testing.assert_allclose(found["ches"][i], expected, rtol=1e-3, atol=1e-4)


def test_the_baseline_is_what_fresh_samples_lose(measured):
    _, _, told = measured
    assert told["prompts"] == 8 and told["change"]["fresh"].shape == (8,)
    assert (told["baseline"] <= 1e-6).all()
    found = report_run.summary(told, [])
    # Over samples of the start E[log-ratio] = -KL: the fresh samples' own excess is noise about 0.
    assert abs(found["check"].mean) < 4 * np.std(told["change"]["fresh"] - told["baseline"]) / np.sqrt(8) + 1e-3
    expected = np.mean(told["change"]["chosen"] - told["baseline"])
    assert found["excess"]["chosen"].mean == pytest.approx(expected)
    assert found["excess"]["chosen"].low <= expected <= found["excess"]["chosen"].high


def test_every_number_is_read_from_its_own_completion(measured, monkeypatch):
    ctx, config, told = measured
    score, seen = examine._score, {}

    def kept(ctx, before, after, texts, count):
        seen.update(texts=texts, found=score(ctx, before, after, texts, count))
        return seen["found"]

    monkeypatch.setattr(examine, "_score", kept)
    told = examine.stage(ctx, config, "method", prompts=8, samples=3)
    found = seen["found"]
    change = found["logps"] - found["ref_logps"]
    np.testing.assert_array_equal(told["baseline"], -found["kl"][:, 2:5].mean(1))
    for side, expected in (("chosen", change[:, 0]), ("rejected", change[:, 1]), ("fresh", change[:, 2:5].mean(1)),
                           ("greedy", change[:, 5])):
        np.testing.assert_array_equal(told["change"][side], expected)
    pairs = {r.id: r.completions for r in examine.sample.read_pairs(ctx.stage_dir("sample"), ctx.text.eos_ids)[0]}
    for text in seen["texts"][:3]:
        assert len(text.completions) == 6
        for k in range(2):
            np.testing.assert_array_equal(text.completions[k], pairs[text.id][k])
        # What greedy decoding wrote is likelier at its first token than any other completion's first token.
        record = data.padded([text], K=6, T=128, L=48, pad_id=ctx.text.pad_id)
        first = step.compute(ctx.spec, ctx.params_of("sft"), None, record, {"token_logps"})["token_logps"][0, :, 0]
        assert float(first[5]) >= float(first.max()) - 1e-5


def test_slopes_are_dpos_closed_form(measured):
    _, config, told = measured
    beta = config.method.loss.beta
    margin = told["change"]["chosen"] - told["change"]["rejected"]
    for where, h in (("start", 0 * margin), ("end", beta * margin)):
        pull, push, steep, flat = told["slopes"][where]
        np.testing.assert_allclose(pull, beta * expit(-h), rtol=1e-4)
        np.testing.assert_allclose(push, pull, rtol=1e-4)
        assert (steep > np.log10(pull)).all() and (flat > np.log10(push)).all()


def test_the_same_run_gives_the_same_numbers(measured):
    ctx, config, told = measured
    again = examine.stage(ctx, config, "method", prompts=8, samples=3)
    np.testing.assert_array_equal(again["change"]["fresh"], told["change"]["fresh"])


def test_curves_come_from_the_live_rows_then_from_the_probe(finished):
    rows = metrics.read_metrics(finished)
    live = properties.curves(rows, "method")
    assert live["step"].tolist() == [0, 2, 4, 6] and "greedy" in live
    probe = properties.curves([row for row in rows if row["split"] != "diagnostics"], "method")
    assert probe["step"].tolist() == [0, 6] and "greedy" not in probe
    assert properties.curves(rows, "sft") == {}


def test_the_page_is_one_file_with_verdicts_and_figures_and_the_run_is_left_alone(finished, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    out = tmp_path / "page"
    assert cli.main(["report", str(finished), "--out", str(out), "--prompts", "8", "--samples", "2"]) == 0
    said = capsys.readouterr().out
    for name in ("drastic drop", "degradation into", "dispersion to"):
        assert name in said
    text = (out / "report.html").read_text(encoding="utf-8")
    assert text.count("data:image/svg+xml;base64,") == 3  # curves, mass, gradients: no attribution was watched
    assert not re.search(r"(?:src|href)=\"(?!data:)", text)
    for verdict in ("drastic drop of the rejected", "degradation into suppression", "dispersion to other completions",
                    "drift from the start"):
        assert verdict in text
    assert "excess of the chosen" in text and "dpo, beta 0.1" in text
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_run_without_live_rows_is_reported_from_both_ends(measured, tmp_path):
    _, _, told = measured
    text = io.StringIO()
    page = report_run.write(tmp_path, [told], [], title="t", console=Console(file=text, width=160))
    assert "not judged" in text.getvalue() and "diagnostics=(" in page.read_text(encoding="utf-8")
    assert (tmp_path / "method_curves.svg").exists() and (tmp_path / "method_gradients.png").exists()
    blind = report_run.write(tmp_path / "b", [told | {"slopes": None}], [], title="t", console=Console(file=text))
    assert blind.read_text(encoding="utf-8").count("data:image/svg") == 2


@pytest.mark.parametrize(("arguments", "message"), [
    (["--stage", "sft"], "allowed: method"),
    (["--metric", "loss"], "--metric: compares the members of a sweep"),
    (["--higher"], "--higher: compares the members of a sweep"),
    (["--prompts", "1"], "--prompts=1; allowed: 2 or more"),
    (["--samples", "0"], "--samples=0; allowed: 1 or more"),
])
def test_what_does_not_fit_a_run_is_refused(finished, capsys, arguments, message):
    assert cli.main(["report", str(finished), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_other_folders_are_refused(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "or the folder of a run" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path), "--stage", "dpo"]) == 2
    assert "goes with the folder of a run" in capsys.readouterr().err
