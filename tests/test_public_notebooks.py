"""Three notebooks on the public model, with little text: what they say of the embedded models only, they assert so."""

import importlib.util
from pathlib import Path

import pytest
from conftest import needs_public_model

from greedy_helpers.course.samples import n_windows

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


@needs_public_model
@pytest.mark.parametrize("stem", ["00_quickstart", "01_structure", "05_pruning"])
def test_it_runs_on_the_public_model(stem, monkeypatch):
    monkeypatch.setenv("GREEDY_MODEL", "smollm2-135m")
    monkeypatch.setenv("GREEDY_WINDOWS", "2")
    spec = importlib.util.spec_from_file_location("run", NOTEBOOKS / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    notebook, _ = run.execute(NOTEBOOKS / f"{stem}.ipynb")  # raises what a cell raises
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


def test_a_larger_model_gets_other_amounts_of_text_and_a_limit_holds_for_all(monkeypatch):
    monkeypatch.delenv("GREEDY_WINDOWS", raising=False)
    assert [n_windows(name, 48, 6) for name in ("llama-mini", "gpt2-mini", "org/model")] == [48, 48, 6]
    monkeypatch.setenv("GREEDY_WINDOWS", "7")
    assert [n_windows(name, 48, 6) for name in ("llama-mini", "org/model")] == [7, 6]
