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


@pytest.mark.parametrize(
    ("allocation", "asked"),
    [
        ("uniform", "25% of the parameters of 4 modules in blocks 0 to 1"),
        ("floor", "25% of the units of each of 4 modules in blocks 0 to 1, rounded down"),
        ("adaptive", "25% of the parameters of 4 modules in blocks 0 to 1, spread by adaptive scores"),
        ("cost", "25% of the parameters of 4 modules in blocks 0 to 1, spread by cost scores"),
    ],
)
def test_words_for_what_was_asked(allocation, asked):
    model, before = tiny_model("llama"), tiny_model("llama").num_parameters()
    report = quiet(model, calibration(30), 0.25, criterion="output energy", allocation=allocation)
    gone = before - model.num_parameters()
    modules = 2 * (4 * 48 * 48 + 3 * 48 * 80)
    done = f"{gone / modules:.2%} of their parameters, {gone / (modules + 4 * 48):.2%} of the blocks' parameters, "
    assert f"asked: {asked}; removed: {done}{gone / before:.2%} of the model's ({before:,} ->" in str(report)


def test_nothing_to_prune_is_nothing_removed():
    report = quiet(tiny_model("llama"), calibration(), 0.25, blocks=[])
    assert report.removed == {"modules": 0.0, "blocks": 0.0, "total": 0.0}
    assert "asked: 25% of the parameters of no module; removed: 0.00% of their parameters" in str(report)
