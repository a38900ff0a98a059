"""Scores of pairs as plain numbers: what a summary says, what a histogram shows, and where a rule cuts."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from alignax.diagnostics import pair_scores, style

pytestmark = pytest.mark.slow


def test_a_share_is_rounded_and_keeps_one():
    """0.4 of 4 is 1.6, so 2; half of 5 is 2.5, so 3; the least share still keeps a pair."""
    for share, count, wanted in ((0.4, 4, 2), (0.3, 4, 1), (0.5, 5, 3), (1e-6, 7, 1), (1.0, 7, 7)):
        for kind in ("lowest", "highest"):
            assert pair_scores.kept(np.arange(count), pair_scores.Keep(kind, share)).sum() == wanted, (kind, share)


def test_a_summary_against_its_definitions():
    """Mean, deviation, the 5%, 50% and 95% points, and the correlation with how much longer the chosen one is."""
    values, tokens = np.arange(101.0) ** 2, np.stack([np.arange(101) + 7, np.full(101, 7)], 1)
    found = pair_scores.summary({"up": values, "down": -values, "flat": np.ones(101)}, tokens)
    assert found["up"] == pytest.approx({"mean": values.mean(), "sd": values.std(), "low": 25.0, "median": 2500.0,
                                         "high": 9025.0, "length": 1.0})
    assert found["down"]["length"] == pytest.approx(-1.0) and found["down"]["low"] == -9025.0
    assert np.isnan(found["flat"]["length"]) and found["flat"]["mean"] == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # equal lengths are no accident of the data: nothing to warn of
        assert np.isnan(pair_scores.summary({"up": values}, np.full((101, 2), 7))["up"]["length"])


def test_ranks_count_from_the_highest():
    assert pair_scores.ranks(np.asarray([0.5, 9.0, -1.0, 2.0])).tolist() == [3, 1, 4, 2]


def test_difficulty_falls_with_the_margin():
    """Without NaN for margins whose exponential overflows, and log 2 where policy and reference agree."""
    logp = np.asarray([[0.0, 0.0], [-1e4, 0.0], [0.0, -1e4]])
    values = {"ches": np.zeros(3), "ches_normalised": np.zeros(3), "logp": logp, "tokens": np.ones((3, 2)),
              "ref_logp": np.zeros((3, 2))}
    found = pair_scores.scores(values, beta=1.0)["difficulty"]
    np.testing.assert_allclose(found, [np.log(2), 1e4, 0], atol=1e-12)


@pytest.fixture
def drawn(monkeypatch):
    """Figures that `histograms` saved, kept instead of written."""
    made = []
    monkeypatch.setattr(style, "save", lambda figure, path: made.append(figure) or path)
    return made


def test_histograms_show_every_pair_and_what_was_kept(drawn, tmp_path):
    """Bars hold each pair once, extreme ones in the outermost bars; kept and dropped stand at their own values."""
    values = np.concatenate([np.linspace(0, 1, 400), [1e6]])
    keep = values < 0.5
    pair_scores.histograms({"margin": values, "ches": np.ones(401)}, keep, "margin", tmp_path / "x.png")
    first, second = drawn[0].axes
    kept, dropped = first.containers
    assert [sum(p.get_height() for p in bars) for bars in (kept, dropped)] == [keep.sum(), (~keep).sum()]
    middle = lambda bars: [p.get_x() + p.get_width() / 2 for p in bars if p.get_height()]
    assert max(middle(kept)) < 0.55 and min(middle(dropped)) > 0.45 and max(middle(dropped)) < 1.5
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["kept", "dropped", "median of all"]
    assert first.get_title(loc="left") == "filtered by this score" and not second.get_title(loc="left")
    assert sum(p.get_height() for bars in second.containers for p in bars) == 401  # all equal: still drawn
    assert min(p.get_width() for p in second.patches) > 0.01


def test_histograms_without_a_rule_have_one_series(drawn, tmp_path):
    pair_scores.histograms({"margin": np.arange(50.0)}, np.ones(50, bool), "", tmp_path / "x.png")
    (axes,) = drawn[0].axes
    assert sum(p.get_height() for bars in axes.containers for p in bars) == 50
    assert not axes.get_title(loc="left") and len(axes.get_legend().get_texts()) == 2
