"""The notebooks run from top to bottom, on a copy, and their last cells say what the text claims."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"


def test_notebooks_are_stored_without_outputs():
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert [c["id"] for c in cells if c.get("outputs") or c.get("execution_count")] == [], path.name


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """Executes a copy of a notebook: (what its last cell prints as one JSON object, the number of its figures)."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is missing: pip install '.[notebooks]'")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is missing: pip install '.[notebooks]'")
    pytest.importorskip("ipykernel", reason="ipykernel is missing: pip install '.[notebooks]'")
    # The kernel starts in the copy's folder, from which a checkout that is not installed could not be imported.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))

    def execute(name: str) -> tuple[dict, int]:
        copy = tmp_path / name
        copy.write_bytes((NOTEBOOKS / name).read_bytes())
        notebook = nbformat.read(copy, as_version=4)
        nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3",
                                resources={"metadata": {"path": str(tmp_path)}}).execute()
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        images = [out for cell in code for out in cell.outputs if "image/png" in out.get("data", {})]
        return json.loads("".join(out["text"] for out in code[-1].outputs if out.output_type == "stream")), len(images)

    return execute


@pytest.mark.slow
def test_quickstart_runs_and_aligns(executed):
    summary, images = executed("quickstart.ipynb")
    assert images == 2
    # Margins 2 and -2 at beta 0.5: -log sigmoid(+-1). The hinge at gap 3: 3 - 2 and 3 + 2.
    assert summary["dpo_values"] == pytest.approx([math.log1p(math.exp(-1)), math.log1p(math.exp(1))], rel=1e-5)
    assert summary["hinge_values"] == pytest.approx([1.0, 5.0])
    assert summary["win_rate"] > 0.6 and summary["gold_after"] > summary["gold_before"] + 0.5
    assert 0 < summary["kl"] < 30


@pytest.mark.slow
def test_a_new_loss_is_written_checked_and_trained(executed):
    summary, images = executed("write_a_loss.ipynb")
    assert images == 2
    assert summary["broken_at_first"] == ["gradients stop where they should"] and summary["broken"] == []
    # As written the loss is lost far out; repaired it is log(pi |m|) there, and by hand log 2 at 0, -log 3/4 at 1.
    written, repaired = map(float, summary["far"])
    assert not math.isfinite(written) and repaired == pytest.approx(math.log(math.pi * 1e8), rel=1e-5)
    assert summary["values"] == pytest.approx([math.log(2), -math.log(0.75)], rel=1e-5)
    assert summary["losses"] == ["dpo", "cauchy"]
    spent = {name: [kl for policy, (kl, _) in summary["frontier"].items() if policy.startswith(name)]
             for name in summary["losses"]}
    for kl in spent.values():  # the weaker the pull to the reference, the farther from it
        assert len(kl) == 3 and kl[0] > kl[1] > kl[2] > 0
    rewards = [reward for _, reward in summary["frontier"].values()]
    assert max(rewards) > summary["before"] + 0.1


@pytest.mark.slow
def test_the_sweep_runs_and_is_reported(executed):
    summary, images = executed("sweep.ipynb")
    assert images == 2 and summary["code"] == 0 and summary["page"]
    assert summary["finished"] == 12 and summary["configurations"] == 4 and summary["seeds"] == 3
    assert summary["factors"] == ["method.loss.beta", "method.optim.learning_rate"]
    assert summary["best"] > 0.55


@pytest.mark.slow
def test_looking_inside_a_run_shows_what_the_text_says(executed):
    summary, images = executed("look_inside_a_run.ipynb")
    assert images == 4 and summary["code"] == 0 and summary["page"] and summary["rows"] == 26
    assert all(fit > 0.8 for fit in summary["fits"].values()), summary["fits"]
    # The pair was trained on: its margin of credit is positive; fresh samples lose the baseline and no more.
    assert summary["margin"] > 0 and summary["credit"][0] > summary["credit"][1]
    assert summary["prompts"] == 32 and abs(summary["check"]) < 1.0
