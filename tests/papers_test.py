"""The reproductions: their docstrings, the verdict, the page, the bandits they share, and a few run in small."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments.papers import all as papers  # noqa: E402  (needs the path)
from experiments.papers import compare_losses, gradient_field, harness, overoptimisation, squeezing, worlds  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", papers.NAMES)
def test_every_docstring_has_its_parts(name):
    module = importlib.import_module(f"experiments.papers.{name}")
    title, text = papers.parts(module.__doc__)
    assert set(text) == set(harness.LABELS) and title
    assert text["Command"] == f"python -m experiments.papers.{name}"


def test_a_missing_part_is_named():
    with pytest.raises(ValueError, match="no paragraph Published, Here, Command"):
        papers.parts("Title.\n\nClaim: x.\n")


def test_the_list_is_the_folder():
    """A file that nobody runs, or a name without a file, is a mistake."""
    helpers = {"__init__", "all", "harness", "worlds"}
    assert {path.stem for path in (ROOT / "experiments/papers").glob("*.py")} - helpers == set(papers.NAMES)


def test_the_verdict_is_counted():
    assert harness.verdict({"a": True, "b": True})[0] == "reproduced"
    assert harness.verdict({"a": True, "b": np.bool_(False)}) == ("partly", "holds: a; does not hold: b")
    assert harness.verdict({"a": False})[0] == "not"


def test_intervals():
    mean, half = harness.mean_ci([1.0, 2.0, 3.0, float("nan")])
    assert mean == 2 and half == pytest.approx(4.302652729911275 / 3 ** 0.5)
    assert np.isnan(harness.mean_ci([1.0])[1])


def test_reading_at_a_kl():
    """Between two records in proportion; NaN where the level is never reached."""
    kl = np.array([[0.0, 1.0, 3.0], [0.0, 0.5, 0.9]])
    found = harness.at_kl(kl, np.array([[0.0, 10.0, 20.0], [0.0, 1.0, 2.0]]), 2.0)
    assert found[0] == 15 and np.isnan(found[1])


def test_bandits():
    """Two different responses, scores that belong to them, the better first without noise, and flips at their rate."""
    place = worlds.world(jax.random.key(0), 4, 6)
    np.testing.assert_allclose(place.reward.mean(1), 0, atol=1e-6)
    clean = worlds.draw(jax.random.key(1), place, 2000, scale=jnp.inf)
    assert (clean.chosen != clean.rejected).all() and (clean.scores[:, 0] > clean.scores[:, 1]).all()
    np.testing.assert_array_equal(clean.scores[:, 1], place.reward[clean.prompt, clean.rejected])
    turned = worlds.draw(jax.random.key(1), place, 2000, scale=jnp.inf, flip=0.3)
    assert float((turned.scores[:, 0] < turned.scores[:, 1]).mean()) == pytest.approx(0.3, abs=0.04)
    assert float(worlds.ranking_accuracy(place.log_ref + place.reward, place)) == pytest.approx(1)
    assert float(worlds.ranking_accuracy(place.log_ref - place.reward, place)) == pytest.approx(0)
    pairs, weight = worlds.all_pairs(place, 1.0)
    assert float(weight.sum()) == pytest.approx(4 * 6 * 5 / 2)  # p and 1 - p of every pair


def test_squeezing_factors():
    """The catalogue's numbers, and their opposite order under a positive gradient."""
    p = jnp.array([0.55, 0.25, 0.15, 0.04, 0.01])
    np.testing.assert_allclose(squeezing.factors(p, 4, 1.0), [1.160, 0.860, 0.778, 0.697, 0.249], atol=6e-4)
    assert (np.diff(np.asarray(squeezing.factors(p, 4, -1.0))[:4]) > 0).all()


def test_the_gradient_field_is_the_formula():
    """-beta x2^beta / (x1 (x1^beta + x2^beta)) and beta x2^(beta - 1) / (x1^beta + x2^beta)."""
    x1, x2, beta = np.array([0.1, 1.0, 1.9]), np.array([1.5, 1.0, 0.2]), 0.3
    d1, d2 = gradient_field.slopes(x1, x2, beta)
    np.testing.assert_allclose(d1, -beta * x2 ** beta / (x1 * (x1 ** beta + x2 ** beta)), rtol=1e-12)
    np.testing.assert_allclose(d2, beta * x2 ** (beta - 1) / (x1 ** beta + x2 ** beta), rtol=1e-12)


@pytest.mark.parametrize("basis", ["log", "square"])
def test_the_law_recovers_its_coefficients(basis):
    d = np.linspace(0.1, 5, 40)
    gain = d * (2.0 - 0.3 * (np.log(d) if basis == "log" else d))
    found, error = overoptimisation.law(d, gain, basis)
    np.testing.assert_allclose(found, [2.0, 0.3], rtol=1e-9)
    assert error < 1e-9


def test_a_setting_is_chosen_on_the_other_seeds():
    """The setting that is best for one seed alone does not report its own luck."""
    kl = np.broadcast_to(np.array([0.0, 2.0]), (2, 3, 2))
    reward = np.zeros((2, 3, 2))
    reward[0, :, 1], reward[1, :, 1] = [0.6, 0.6, 0.6], [0.0, 0.0, 1.5]
    curves = {"kl": kl, "reward": reward, "chosen": -reward, "entropy": reward}
    assert compare_losses.held_out(curves, 2.0)["reward"].tolist() == [0.0, 0.0, 0.6]
    assert np.isnan(compare_losses.held_out(curves, 3.0)["reward"]).all()


def test_best_of_n_and_the_best_policy():
    """Best-of-1 is the reference; no best-of-n lies above the best policy at its KL."""
    kl, reward, bon_kl, bon_reward = (x[0] for x in compare_losses.exact(1))
    assert abs(bon_kl[0]) < 1e-4
    assert (np.interp(bon_kl, kl, reward) >= bon_reward - 2e-3)[1:].all()


def test_strengths_are_hyper_parameters():
    from alignax import losses
    from alignax.diagnostics import toy

    for name in toy.usable():
        assert set(compare_losses.strength(name)) <= set(losses.defaults(name)), name
    assert compare_losses.strength("ipo") == ("tau",) and compare_losses.strength("simper") == ()


@pytest.mark.parametrize("names", [("h_dpo", "gradient_field")])
def test_the_page(names, tmp_path, monkeypatch):
    """Runs of two in small make a page whose figures exist and are small; a second run keeps the first's reports."""
    monkeypatch.setattr(harness, "OUT", tmp_path / "runs")
    console = Console(file=(tmp_path / "log").open("w"))
    for name in names:
        assert papers.main(["--quick", "--out", str(tmp_path), "--only", name], console) == 0
    page = (tmp_path / "reproductions.md").read_text(encoding="utf-8")
    assert set(json.loads((tmp_path / "reproductions/reports.json").read_text(encoding="utf-8"))) == set(names)
    for name in names:
        figure = tmp_path / f"reproductions/{name}.png"
        assert f"(reproductions/{name}.png)" in page and 5_000 < figure.stat().st_size < harness.PNG_LIMIT
    assert page.count("**Verdict:") == 2
    with pytest.raises(SystemExit):
        papers.main(["--quick"])


@pytest.mark.parametrize("name", ["ipo_deterministic", "odpo", "reference_strength", "squeezing"])
def test_reproductions_run_in_small(name, tmp_path):
    """A few of them, each a kind of its own; `python -m experiments.papers.all --quick --out FOLDER` runs all."""
    found = importlib.import_module(f"experiments.papers.{name}").run(tmp_path, quick=True)
    assert found["verdict"] in harness.VERDICTS and found["published"] and found["ours"]
    for figure in found["figures"]:
        assert figure.is_file() and figure.with_suffix(".svg").is_file()


def test_the_written_page_agrees_with_its_reports():
    """docs/reproductions.md is what its stored reports make; docstring changes need `all` to be run again."""
    store = ROOT / "docs/reproductions/reports.json"
    reports = json.loads(store.read_text(encoding="utf-8"))
    assert (ROOT / "docs/reproductions.md").read_text(encoding="utf-8") == papers.document(reports)
    for report in reports.values():
        for figure in report["figures"]:
            assert (store.parent / figure).stat().st_size <= harness.PNG_LIMIT
