"""What notebooks/run.py keeps of the outputs: the same bytes for the same results."""

import importlib.util
import json
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

SCRIPT = Path(__file__).resolve().parent.parent / "notebooks" / "run.py"


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stream(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def table(values):
    styled = pd.DataFrame({"a": values}).style.set_properties(color="black")
    return new_output("execute_result", {"text/plain": repr(styled), "text/html": styled._repr_html_()})


def test_a_stream_cut_in_two_is_one_again(run):
    whole = run.committed([stream("one\ntwo\n"), table([1.0]), stream("three\n")], "x")
    cut = run.committed([stream("one\n"), stream("w", "stderr"), stream("two\n"), table([1.0]), stream("three\n")], "x")
    assert whole == cut
    assert [output.get("text") for output in cut] == ["one\ntwo\n", None, "three\n"]


def test_styled_tables_have_the_same_names_each_time_and_different_ones_in_a_notebook(run):
    first, again = (run.committed([table([1.0]), table([2.0])], "nb05-007") for _ in range(2))
    assert first == again
    for n, output in enumerate(first):
        assert output.data["text/plain"] == "<pandas.io.formats.style.Styler object>"
        assert f'<table id="T_nb05-007-{n}">' in output.data["text/html"]
        assert f"#T_nb05-007-{n}_row0_col0" in output.data["text/html"], "its rules know the new name"


PLOT = """from matplotlib import pyplot as plt
_ = plt.figure(figsize=(1, 1)).add_subplot()
plt.show()"""


def test_a_run_keeps_what_describes_a_picture_and_the_report_shows_it(run, tmp_path):
    cells = [
        new_code_cell(PLOT, metadata={"alt": 'A curve & a "line".', "tags": ["x"], "collapsed": True}),
        new_code_cell(PLOT),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "plots.ipynb")
    notebook, peak = run.execute(tmp_path / "plots.ipynb")
    assert [dict(cell.metadata) for cell in notebook.cells] == [{"alt": 'A curve & a "line".', "tags": ["x"]}, {}]
    page = run.report(notebook)
    assert page.count("<img alt=") == 2
    assert '<img alt="A curve &amp; a &quot;line&quot;."' in page
    assert '<img alt=""' in page
    assert "No description" not in page
    if Path("/proc/self/status").is_file():
        assert 0.01 < peak < 4, "gigabytes"


def test_time_and_memory_are_recorded_per_notebook(run, tmp_path):
    file = tmp_path / "runs.json"
    for stem, seconds in [("01_b", 10.4), ("00_a", 3), ("01_b", 20.6)]:
        run.record(file, stem, seconds, 1.26)
    found = json.loads(file.read_text())
    assert list(found) == ["00_a", "01_b"]
    assert found["01_b"]["seconds"] == 21
    assert found["01_b"]["memory, GB"] == 1.3
    assert "cores" in found["01_b"]["hardware"]
