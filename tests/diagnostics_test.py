"""Comparisons, tables and figures of `alignax.diagnostics`."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread
from rich.console import Console
from scipy import stats

from alignax.diagnostics import compare, figures, style, tables

# --- compare ---------------------------------------------------------------------------------------------------------


def test_win_rate_counts_ties_half():
    rate, lo, hi = compare.win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 5.0, -1.0])
    assert rate == (1 + 0.5 + 0 + 1) / 4
    assert 0 <= lo < rate < hi <= 1


def test_win_rate_interval_is_wilsons():
    a = np.array([1.0] * 13 + [0.0] * 27)
    rate, lo, hi = compare.win_rate(a, 1 - a)
    expected = stats.binomtest(13, 40).proportion_ci(0.95, method="wilson")
    assert rate == 13 / 40
    np.testing.assert_allclose([lo, hi], [expected.low, expected.high], rtol=1e-9)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_win_rate_keeps_a_width_at_the_ends(sign):
    rate, lo, hi = compare.win_rate(np.full(20, sign), np.zeros(20))
    assert 0 <= lo <= rate <= hi <= 1
    assert hi - lo > 0.1


def test_win_rate_is_antisymmetric():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, 50), rng.integers(0, 4, 50)
    rate, lo, hi = compare.win_rate(a, b)
    np.testing.assert_allclose(compare.win_rate(b, a), (1 - rate, 1 - hi, 1 - lo), atol=1e-12)


def test_win_rate_interval_covers_the_true_rate_about_95_percent_of_the_time():
    rng = np.random.default_rng(1)
    outcomes = rng.choice([1.0, 0.0, -1.0], size=(800, 100), p=[0.55, 0.1, 0.35])  # true rate 0.6
    intervals = [compare.win_rate(row, np.zeros(100)) for row in outcomes]
    covered = np.mean([lo <= 0.6 <= hi for _, lo, hi in intervals])
    assert 0.93 <= covered <= 0.995  # ties put it on the wide side


@pytest.mark.parametrize(
    "a, b, message",
    [
        ([], [], "N >= 1"),
        ([1.0], [1.0, 2.0], "1 and 2"),
        ([[1.0]], [[1.0]], r"\[1, 1\]"),
        ([math.nan], [0.0], "1 of 1"),
    ],
)
def test_comparisons_refuse_bad_input(a, b, message):
    for function in (compare.win_rate, compare.kl_on_policy):
        with pytest.raises(ValueError, match=message):
            function(a, b)


def test_distinct_n_pools_over_texts_and_does_not_cross_them():
    texts = [[1, 2, 1, 2], [1, 2], [9]]
    assert compare.distinct_n(texts, 1) == 3 / 7
    assert compare.distinct_n(texts, 2) == 2 / 4  # (1,2) (2,1) (1,2) | (1,2); no (2,1) between the texts
    assert compare.distinct_n(["aa", "ab"], 1) == 2 / 4
    assert math.isnan(compare.distinct_n(texts, 5))
    with pytest.raises(ValueError, match="found 0"):
        compare.distinct_n(texts, 0)


def test_kl_on_policy_recovers_a_known_kl():
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    y = np.random.default_rng(0).choice(3, size=20_000, p=p)
    mean, error = compare.kl_on_policy(np.log(p)[y], np.log(q)[y])
    exact = float(np.sum(p * np.log(p / q)))
    spread = math.sqrt(np.sum(p * np.log(p / q) ** 2) - exact**2)
    assert abs(mean - exact) < 4 * error
    assert error == pytest.approx(spread / math.sqrt(20_000), rel=0.05)


def test_kl_on_policy_by_hand():
    mean, error = compare.kl_on_policy([-1.0, -2.0, -3.0], [-2.0, -4.0, -6.0])  # log-ratios 1, 2, 3
    assert mean == 2.0
    assert error == pytest.approx(math.sqrt((1 + 0 + 1) / (3 - 1)) / math.sqrt(3))


def test_kl_on_policy_of_one_sample_has_no_standard_error():
    mean, error = compare.kl_on_policy([-1.0], [-3.0])
    assert mean == 2.0 and math.isnan(error)


def test_best_of_n_in_closed_form():
    np.testing.assert_allclose(compare.best_of_n_kl([1, 2, 4]), [0, math.log(2) - 1 / 2, math.log(4) - 3 / 4])
    np.testing.assert_allclose(compare.best_of_n_win_rate([1, 2, 4]), [1 / 2, 2 / 3, 4 / 5])
    # The density of the best of n among uniform scores is n u^(n-1); its KL and win rate by quadrature, n = 3.5.
    u = (np.arange(200_000) + 0.5) / 200_000
    density = 3.5 * u**2.5
    assert compare.best_of_n_kl(3.5) == pytest.approx(np.mean(density * np.log(density)), abs=1e-6)
    assert compare.best_of_n_win_rate(3.5) == pytest.approx(np.mean(density * u), abs=1e-6)
    with pytest.raises(ValueError, match="0.5"):
        compare.best_of_n_kl(0.5)


# --- tables ----------------------------------------------------------------------------------------------------------


def _lines(table) -> list[str]:
    console = Console(width=120, color_system=None, file=io.StringIO())
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


def test_table_aligns_decimal_points_and_shows_the_change():
    table = tables.before_after(
        {"loss": 0.6931, "reward": -12.5, "tokens": 512, "old": 1.0},
        {"loss": np.float32(0.5), "reward": 3.25, "tokens": 640, "new": 2.0},
        title="DPO", units={"reward": "nats"},
    )
    rows = {line.split("│")[1].strip(): line.split("│") for line in _lines(table) if line.startswith("│")}
    assert list(rows) == ["loss", "reward", "tokens", "old", "new"]
    assert [cell.strip() for cell in rows["loss"][2:5]] == ["0.693", "0.500", "-0.193"]
    assert [cell.strip() for cell in rows["reward"][2:6]] == ["-12.500", "3.250", "+15.750", "nats"]
    assert [cell.strip() for cell in rows["tokens"][2:5]] == ["512", "640", "+128"]
    assert [cell.strip() for cell in rows["old"][2:5]] == ["1.000", "–", "–"]
    assert [cell.strip() for cell in rows["new"][2:5]] == ["–", "2.000", "–"]
    for column in (2, 3, 4):
        assert rows["loss"][column].index(".") == rows["reward"][column].index(".")
    units_column = rows["tokens"][2]
    assert units_column.rstrip().endswith("512") and len(units_column.rstrip()) == rows["loss"][2].index(".")


def test_table_shows_non_finite_numbers_and_refuses_unknown_units():
    lines = _lines(tables.before_after({"a": math.nan}, {"a": math.inf}))
    (row,) = [line for line in lines if line.startswith("│")]
    assert [cell.strip() for cell in row.split("│")[1:5]] == ["a", "nan", "inf", "+nan"]
    with pytest.raises(ValueError, match="reword"):
        tables.before_after({"reward": 1.0}, {"reward": 2.0}, units={"reword": "nats"})


def test_comparison_shows_every_policy_beside_the_baseline():
    row = {"win_rate": 0.5, "win_low": 0.45, "win_high": 0.55, "kl_on_policy": 0.0, "kl_se": 0.0, "gold_reward": -0.25,
           "gold_sd": 1.0, "length": 31.0, "distinct_2": 0.4, "unfinished": 2, "prompts": 512}
    better = {"policy": "dpo", "win_rate": 0.873, "win_low": 0.84, "win_high": 0.9, "kl_on_policy": 12.5, "kl_se": 0.31}
    table = tables.comparison({"policy": "sft", **row}, [{**row, **better}, {**row, "policy": "ipo"}])
    rows = {line.split("│")[1].strip(): line.split("│")[2:] for line in _lines(table) if line.startswith("│")}
    assert list(rows) == ["sft", "dpo", "ipo"]
    cells = [cell.strip() for cell in rows["dpo"]]
    assert cells[:6] == ["-0.25", "0.873 [0.840, 0.900]", "12.50 (0.31)", "31.0", "0.400", "2"]
    assert [cell.strip() for cell in rows["sft"]][:3] == ["-0.25", "", ""]


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """The axes of every figure that is drawn, in order."""
    axes: list[Axes] = []
    original = style.axes

    def recording(figure, *place):
        axes.append(original(figure, *place))
        return axes[-1]

    monkeypatch.setattr(style, "axes", recording)
    return axes


def _is_a_drawing(path) -> bool:
    """The file is a PNG of sensible size with ink on it."""
    pixels = imread(path)
    return path.read_bytes()[:4] == b"\x89PNG" and min(pixels.shape[:2]) > 300 and pixels[..., :3].std() > 0.01


def test_training_curves(tmp_path, drawn):
    history = [{"step": i, "loss": 1 / (i + 1), "note": "text", "flag": True} for i in range(10)]
    history[4]["loss"] = math.nan
    history[9]["win_rate"] = 0.5
    path = figures.training_curves(history, tmp_path / "figures" / "curves.png")
    assert _is_a_drawing(path)
    assert [axes.get_title(loc="left") for axes in drawn] == ["loss", "win_rate"]
    line = drawn[0].lines[0]
    np.testing.assert_array_equal(line.get_xdata(), range(10))
    assert np.isnan(line.get_ydata()).sum() == 1 and line.get_ydata()[9] == 0.1
    assert drawn[0].get_title(loc="right") == "1 of 10 not finite"


def test_training_curves_refuse_what_they_cannot_draw(tmp_path):
    path = tmp_path / "curves.png"
    with pytest.raises(ValueError, match=r"history\[1\]"):
        figures.training_curves([{"step": 0, "loss": 1.0}, {"loss": 1.0}], path)
    with pytest.raises(ValueError, match="acc.*loss"):
        figures.training_curves([{"step": 0, "loss": 1.0}], path, keys=["acc"])
    with pytest.raises(ValueError, match="0 rows"):
        figures.training_curves([], path)
    assert not path.exists()


def test_displacement(tmp_path, drawn):
    steps = np.arange(0, 50, 10)
    series = {"chosen": -steps / 20, "rejected": -steps / 5, "unseen": -steps / 10}
    path = figures.displacement(steps, series, -steps / 11, tmp_path / "displacement.png")
    assert _is_a_drawing(path)
    assert "nats per sequence" in drawn[0].get_ylabel()
    assert {text.get_text() for text in drawn[0].texts} == {*series, "−KL(ref ‖ policy)"}
    ends = {text.get_text(): text.get_position()[1] for text in drawn[0].texts}
    assert ends["chosen"] > ends["−KL(ref ‖ policy)"] > ends["unseen"] > ends["rejected"]
    dashed = [line for line in drawn[0].lines if line.get_linestyle() == "--"]
    np.testing.assert_allclose(dashed[0].get_ydata(), -steps / 11)
    figures.displacement(steps, series, -1.5, path)
    np.testing.assert_array_equal([li for li in drawn[1].lines if li.get_linestyle() == "--"][0].get_ydata(), -1.5)
    with pytest.raises(ValueError, match=r"'chosen' has shape \[2\], steps have \[5\]"):
        figures.displacement(steps, {"chosen": [0.0, 1.0]}, None, path)


def test_labels_are_spread_without_changing_their_order():
    placed = style.spread([0.0, 0.01, 5.0, -0.01], 1.0)
    np.testing.assert_allclose(placed, [0.0, 1.0, 5.0, -1.0])
    assert style.spread([3.0, 1.0], 0.5) == [3.0, 1.0]


def test_frontier(tmp_path, drawn):
    points = [
        {"kl": 1.0, "kl_se": 0.1, "win_rate": 0.6, "lo": 0.5, "hi": 0.7, "label": "DPO"},
        {"kl": 4.0, "kl_se": 0.2, "win_rate": 0.7, "lo": 0.6, "hi": 0.8, "label": "SimPO"},
    ]
    path = figures.frontier(points, tmp_path / "frontier.png")
    assert _is_a_drawing(path)
    axes = drawn[0]
    curve = next(line for line in axes.lines if len(line.get_xdata()) > 100)
    x, y = curve.get_xdata(), curve.get_ydata()
    assert (x[0], y[0]) == (0.0, 0.5) and x[-1] >= axes.get_xlim()[1]
    np.testing.assert_allclose(x, np.log(y / (1 - y)) - (2 * y - 1) / y, atol=1e-9)  # n = y / (1 - y)
    marks = next(line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata()) > 2)
    np.testing.assert_allclose(marks.get_ydata()[:4], [1 / 2, 2 / 3, 4 / 5, 8 / 9])
    labels = {text.get_text() for text in axes.texts}
    assert {"DPO", "SimPO", "n = 2", "4"} <= labels
    assert "nats" in axes.get_xlabel()


def test_frontier_refuses_bad_points(tmp_path):
    point = {"kl": 1.0, "kl_se": 0.1, "win_rate": 0.6, "lo": 0.5, "hi": 0.7, "label": "DPO"}
    for change, message in (
        ({"kl": math.nan}, r"points\[0\]\['kl'\]"),
        ({"lo": 0.65}, "lo <= win_rate <= hi"),
        ({"kl_se": None}, "kl_se"),
    ):
        with pytest.raises(ValueError, match=message):
            figures.frontier([{**point, **change}], tmp_path / "frontier.png")
