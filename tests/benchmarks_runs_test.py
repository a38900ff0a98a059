"""Benchmarks of whole runs at toy size: time to a win rate, a sweep against runs in a row, live diagnostics."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

pytestmark = pytest.mark.slow


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def test_the_first_snapshot_that_reaches_a_level_is_taken(scripts):
    win_rate = scripts("win_rate")
    way = lambda clocks: [{"snapshots": [
        dict(update=5 * n, clock=clock, updates_clock=clock - 3, win_rate=rate, kl=kl)
        for n, (clock, rate, kl) in enumerate(zip(clocks, (0.6, 0.75, 0.85), (0.5, 1.5, 2.5), strict=True), 1)]}]
    runs = {win_rate.OURS: way((4.0, 5.0, 6.0)) * 2, win_rate.TRL: way((8.0, 9.0, 12.0)) + way((9.0, 10.0, 15.0))}
    table, numbers = win_rate.level_table(runs, 0.8, 3.0)
    assert numbers["clock"][1] == (12 / 6 + 15 / 6) / 2 and numbers["updates_clock"][1] == (9 / 3 + 12 / 3) / 2
    assert table["rows"][0][:2] == ["0, alignax", "15"] and table["rows"][-1][0] == "median, seeds: 2"
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    table, numbers = win_rate.level_table(runs, 0.8, 2.0)
    assert numbers == {} and table["rows"][0][1] == "not reached" and "median" not in str(table["rows"])
    assert win_rate.level_table(runs, 0.7, 2.0)[0]["rows"][0][1] == "10"


def test_a_run_is_timed_and_its_snapshots_are_judged(scripts, shared, tmp_path):
    result = scripts("win_rate").main(["--quick", "--json", str(tmp_path / "win_rate.json"), "--model",
                                       str(shared / "models" / "stories260K")], quiet())
    assert json.loads((tmp_path / "win_rate.json").read_text())["tables"] == result["tables"]
    assert result["could_not_run"]["TRL, fp32"] == "no python executable was given for it"
    snapshots = result["data"]["runs"]["alignax"][0]["snapshots"]
    assert [one["update"] for one in snapshots] == [2, 4]
    assert 0 < snapshots[0]["clock"] < snapshots[1]["clock"]
    assert 0 < snapshots[0]["updates_clock"] < snapshots[1]["updates_clock"] < snapshots[1]["clock"]
    assert all(0 <= one["low"] <= one["win_rate"] <= one["high"] <= 1 for one in snapshots)
    assert snapshots[0]["kl"] != snapshots[1]["kl"], "every snapshot has parameters of its own"
    assert str(shared) not in (tmp_path / "win_rate.json").read_text()
    assert "Time to a win rate" in scripts("page").page(tmp_path)


def test_one_program_makes_the_runs_of_a_row(scripts, tmp_path):
    result = scripts("sweep_peers").main(["--quick", "--json", str(tmp_path / "sweep_peers.json")], quiet())
    titles = [row[0] for row in result["tables"][0]["rows"]]
    assert titles == ["2 x alignax, one program", "2 x alignax, a process for each run"]
    one, alone = (result["data"]["measured"][title]["losses"] for title in titles)
    assert np.shape(one) == (2, 3)
    np.testing.assert_allclose(one, alone, atol=1e-5)
    assert np.ptp(alone, axis=0)[-1] > 1e-4, "the runs differ"
    assert set(result["could_not_run"]) == {"TRL, fp32", "Tunix, fp32"}
    assert "A sweep against runs in a row" in scripts("page").page(tmp_path)


def test_looks_are_timed_on_both_models(scripts, tmp_path):
    result = scripts("live_diagnostics").main(["--quick", "--json", str(tmp_path / "live_diagnostics.json")], quiet())
    assert [row[0] for row in result["tables"][0]["rows"]] == ["quickstart: displacement", "large: displacement"]
    small, large = result["data"].values()
    assert small["parameters"] < large["parameters"] and small["every"] > 1
    [[update, look]] = small["times"]
    assert small["cost"][1] == pytest.approx((small["every"] * update + look) / (small["every"] * update))
    assert "Live diagnostics" in scripts("page").page(tmp_path)


def test_sizes_on_disk_follow_what_is_required(scripts):
    sizes = scripts("install_size")
    found, absent = sizes.closure("rich")
    assert {"rich", "pygments", "markdown-it-py", "mdurl"} == set(found) and absent == []
    files = [file for file in found["mdurl"].files if file.suffix == ".py"]
    assert sum(file.size for file in files) <= sizes.size_of(found["mdurl"]) < sizes.size_of(found["pygments"])
    assert sizes.closure("no-such-package") == ({}, ["no-such-package"])


def test_the_grid_has_no_run_twice(scripts, tmp_path):
    members = scripts("sweep_peers").members_of(32, tmp_path)
    assert len({tuple(one.values()) for one in members}) == 32
    first = scripts("sweep_peers").members_of(8, tmp_path)
    assert members[:8] == first and {key: len({one[key] for one in first}) for key in first[0]} == {
        "beta": 2, "rate": 2, "pairs": 2}
    assert all(first[0][key] != first[1][key] for key in first[0]), "two runs differ in everything"
