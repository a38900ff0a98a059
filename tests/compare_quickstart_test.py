"""The comparison on the quickstart's model: run in small and resumed, and how its results are read."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from alignax import data, losses, rewards

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments.papers import compare_on_quickstart as compare  # noqa: E402  (needs the path)
from experiments.papers import quickstart_page as page  # noqa: E402
from experiments.papers import quickstart_runs as runs  # noqa: E402

pytestmark = pytest.mark.slow


def test_a_small_run_and_its_resumption(tmp_path, monkeypatch, capsys):
    """Two populations are trained, measured and kept; what is kept is not run again, also after a torn line."""
    arguments = ["--out", str(tmp_path), "--quick"]
    assert compare.main(arguments) == 0
    rows = compare.done(tmp_path, compare.QUICK)
    assert set(rows) == {"best of n", "dpo", "sft"}
    kl, gold = np.asarray(rows["dpo"]["kl"]), np.asarray(rows["dpo"]["gold"])
    assert kl.shape == gold.shape == (2, 1, 3, compare.QUICK.prompts)
    np.testing.assert_allclose(kl[:, :, 0], 0, atol=1e-3)  # before the first update
    assert (kl[:, :, -1].mean(-1) > 0.01).all() and np.asarray(rows["dpo"]["chosen"])[..., -1].any()
    assert (tmp_path / "frontiers.png").stat().st_size > 10_000
    text = (tmp_path / compare.RESULTS).read_text(encoding="utf-8")
    (tmp_path / compare.RESULTS).write_text(text + '{"name": "si', encoding="utf-8")
    monkeypatch.setattr(runs, "World", None)  # a second run would need one
    assert compare.main(arguments) == 0 and "| dpo " in capsys.readouterr().out
    compare.append(tmp_path, {"name": "x", "sizes": json.loads(text.splitlines()[0])["sizes"]})
    assert set(compare.done(tmp_path, compare.QUICK)) == {"best of n", "dpo", "sft", "x"}
    assert compare.done(tmp_path, runs.Sizes()) == {}


def test_twenty_losses_with_equal_budgets():
    assert len(compare.ENTRIES) == 20 and set(compare.ORDER) <= {*compare.ENTRIES, *compare.CONTROLS}
    for entry in (*compare.ENTRIES.values(), *compare.CONTROLS.values()):
        assert len(set(entry.values)) == runs.Sizes().strengths and entry.why
        own = {} if entry.key == "learning_rate" else {entry.key: entry.values[0]}
        assert losses.section(entry.loss, **{**entry.fixed, **own})


def test_the_reward_of_words_is_that_of_the_text():
    """Token by token on the grammar's own texts."""
    tokenizer = data.stories_tokenizer()
    worth = rewards.lexicon_reward(tokenizer.token(i) for i in range(tokenizer.vocab_size))
    texts = [row["completion"] for row in data.generate_corpus(60, 3)]
    sums = [worth[np.asarray(tokenizer.encode_completion(text))].sum() for text in texts]
    np.testing.assert_array_equal(sums, rewards.lexicon_reward(texts))
    assert len(set(sums)) > 2


def test_best_of_n_is_the_mean_over_all_draws():
    values = np.asarray([[3.0, 1.0, 4.0, 1.0, 5.0], [0.0, 0.0, 2.0, 7.0, -1.0]])
    for n in (1, 2, 4, 5):
        whole = [[max(some) for some in itertools.combinations(row, n)] for row in values]
        np.testing.assert_allclose(runs.best_of(values, n), np.mean(whole, 1), rtol=1e-12)


def test_every_prompt_gives_its_furthest_pair():
    row = lambda prompt, *scores: {"prompt_id": prompt, "scores": list(scores)}
    rows = [row("a", 0, 1), row("b", 2, 2), row("a", 3, 0), row("a", 1, 4), row("b", 1, 2)]
    assert runs.furthest(rows) == [rows[2], rows[4]]


def test_the_setting_is_chosen_on_the_other_seeds():
    """Seed 2 alone likes setting 1; setting 2 does not reach the level in seed 0."""
    reward = np.asarray([[2.0, 2.0, 0.0], [1.0, 1.0, 9.0], [np.nan, 5.0, 5.0]])
    index = page.pick(reward)
    np.testing.assert_array_equal(index, [1, 1, 0])
    np.testing.assert_array_equal(page.chosen(reward, index), [1, 1, 0])
    nowhere = np.full((2, 3), np.nan)
    assert (page.pick(nowhere) == -1).all() and np.isnan(page.chosen(nowhere, page.pick(nowhere))).all()
    both = page.pick(np.stack([reward, reward[::-1]]))
    np.testing.assert_array_equal(both, [[1, 1, 0], [1, 1, 2]])


def made(gain, seed=0):
    """A line of results: KL 4 u at update fraction u, gold reward gain * KL plus noise that all losses share."""
    sizes, noise = runs.Sizes(), np.random.default_rng(7).normal(size=(1, 3, 1, 80))
    kl = np.linspace(0, 1, 5)[:, None] * np.asarray([4.0, 12.0])[:, None, None, None] * np.ones((2, 3, 5, 80))
    curve = np.zeros((2, 3, 5)) - kl.mean(-1)
    return {"sizes": sizes, "cpu_seconds": 60.0, "kl": kl, "gold": gain * kl + noise, "diverged": np.zeros((2, 3)),
            **dict.fromkeys(("chosen", "rejected", "entropy", "length"), curve)}


def test_a_report_of_known_curves(tmp_path):
    """Rewards are read at the KL; the paired difference is far tighter than either interval, and has the sign."""
    rows = {"dpo": made(0.5), "ipo": made(0.6), compare.SHUFFLED: made(0.0),
            "best of n": {"cpu_seconds": 1.0, "n": [1, 2, 64], "kl": [0.0, 0.19, 3.17],
                          "gold": np.asarray([[0.0], [1.0], [3.0]]) * np.ones(80)}}
    shown = {n: e for n, e in {**compare.ENTRIES, **compare.CONTROLS}.items() if n in rows}
    report = page.Report(rows, shown, runs.Sizes(), "dpo", compare.SHUFFLED, "best of n")
    shift = np.random.default_rng(7).normal(size=(1, 3, 1, 80)).mean()
    assert report.value("dpo", 3.0) == pytest.approx(1.5 + shift)
    difference, (low, high) = report.behind("ipo")
    assert difference == pytest.approx(0.3) and 0.25 < low <= high < 0.35
    wide = np.diff(report.interval(report.draws["ipo"][3.0]))[0]
    assert wide > 0.1 and report.order[0] == "ipo"
    lines = report.table().splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 5
    text = report.text("COMMAND", "figure.png", ["kto"])
    assert "lies above 0 for ipo, below 0 for none" in text and "Not run yet: kto." in text
    assert "become less likely under 2 of the 2" in text
    assert report.figure(tmp_path / "f.png").stat().st_size < 200_000
