"""The notebooks run from top to bottom, on a copy, and their last cells say what the text claims."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "notebooks" / "quickstart.ipynb"


def test_notebooks_are_stored_without_outputs():
    cells = json.loads(QUICKSTART.read_text(encoding="utf-8"))["cells"]
    assert [c["id"] for c in cells if c.get("outputs") or c.get("execution_count")] == []


@pytest.mark.slow
def test_quickstart_runs_and_aligns(tmp_path, monkeypatch):
    """Executes a copy; the last cell prints one JSON object of the results."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is missing: pip install '.[notebooks]'")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is missing: pip install '.[notebooks]'")
    pytest.importorskip("ipykernel", reason="ipykernel is missing: pip install '.[notebooks]'")
    # The kernel starts in the copy's folder, from which a checkout that is not installed could not be imported.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    copy = tmp_path / QUICKSTART.name
    copy.write_bytes(QUICKSTART.read_bytes())
    notebook = nbformat.read(copy, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3",
                            resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    images = [out for cell in code for out in cell.outputs if "image/png" in out.get("data", {})]
    assert len(images) == 2
    summary = json.loads("".join(out["text"] for out in code[-1].outputs if out.output_type == "stream"))
    # Margins 2 and -2 at beta 0.5: -log sigmoid(+-1). The hinge at gap 3: 3 - 2 and 3 + 2.
    assert summary["dpo_values"] == pytest.approx([math.log1p(math.exp(-1)), math.log1p(math.exp(1))], rel=1e-5)
    assert summary["hinge_values"] == pytest.approx([1.0, 5.0])
    assert summary["win_rate"] > 0.6 and summary["gold_after"] > summary["gold_before"] + 0.5
    assert 0 < summary["kl"] < 30
