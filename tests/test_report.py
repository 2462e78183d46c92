"""A report says what was done, in numbers, JSON and a picture."""

import json

import matplotlib as mpl
import pytest
from conftest import calibration, quiet
from tiny import tiny_model

mpl.use("Agg")


@pytest.fixture(scope="module")
def report():
    return quiet(tiny_model("gpt2"), calibration(30), 0.5, criterion="exact greedy", remedy="both")


def test_json_holds_the_frame(report):
    found = json.loads(report.to_json())
    rows = report.to_frame().to_dict("records")
    assert found["steps"] == rows
    assert [row["rank"] for row in rows] == [24, 40, 24, 40]  # the survivors' channels, with 720 tokens
    assert all(row["condition"] > 1 for row in rows)
    recipe = {"criterion": "exact greedy", "remedy": "both", "damp": 0.01, "allocation": "uniform"}
    assert recipe.items() <= found.items()
    assert len(found["stream_errors"]) == 2
    with_tensors = json.loads(report.to_json(tensors=True))["steps"]
    assert [step["keep"] for step in with_tensors] == [step.keep.tolist() for step in report.steps]


def test_figure_shows_shares_and_errors(report):
    left, right = report.figure().axes
    assert sorted(bar.get_height() for bar in left.patches) == [0.5] * 4
    cut, end = (line.get_ydata().tolist() for line in right.lines)
    assert cut == [step.error_cut for step in report.steps]
    assert end == [step.error for step in report.steps]
