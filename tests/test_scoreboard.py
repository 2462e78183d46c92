"""The course's measure, and the figure that closes every notebook."""

import math

import pytest

import greedy_helpers as gh
from greedy_helpers.course import scoreboard


@pytest.fixture(scope="module")
def mini():
    return gh.load_model("llama-mini")


def test_the_dense_model_has_no_excess_and_its_line_is_the_recorded_one(mini):
    judge = scoreboard.Judge(*mini, "llama-mini")
    assert {text: tuple(windows.shape) for text, windows in judge.held_out.items()} == {
        "code": (24, 256),
        "prose": (24, 256),
    }
    assert judge.excess(mini[0]) == {"code": 0.0, "prose": 0.0}
    assert judge.dense == pytest.approx(scoreboard._recorded("llama-mini")["dense"], rel=0.05)


def test_excess_is_a_difference_of_losses(mini, monkeypatch):
    judge = scoreboard.Judge(*mini, "llama-mini")
    monkeypatch.setattr(judge, "perplexity", lambda _: {text: 2 * value for text, value in judge.dense.items()})
    assert judge.excess(None) == pytest.approx({"code": math.log(2), "prose": math.log(2)})


@pytest.mark.parametrize("line", scoreboard.LINES, ids=lambda line: f"{line.notebook} {line.name}")
def test_every_line_has_three_recorded_runs_and_its_own_recipe(line):
    runs = scoreboard.recorded("llama-mini", line)
    assert len(runs) == 3
    assert all(0 < value < 2 for run in runs for value in run.values())
    names = [
        {key: row[key] for key in line.recipe.names}
        for row in scoreboard._recorded("llama-mini")["rows"]
        if row["recipe"] == line.name and row["calibration"] == line.calibration
    ]
    assert names[0] == line.recipe.names


@pytest.mark.parametrize("model", ["llama-mini", "smollm2"])
def test_the_frame_has_what_the_lines_have(model):
    """`runs_of` and `recorded` read the same file on ways of their own."""
    table = scoreboard.runs_of(model)
    found = scoreboard._recorded(model)
    assert len(table) == len(found["rows"]) * len(found["dense"])
    usual = table[table["usual"] & table["ratio"].eq(scoreboard.RATIO)]
    compared = 0
    for line in scoreboard.LINES:
        expected = scoreboard.recorded(model, line)
        if line.calibration == "code+prose" and expected:
            of_line = usual[usual["recipe"] == line.name].pivot_table("excess", "seed", "text", sort=False)
            assert of_line.to_dict("records") == [pytest.approx(run) for run in expected]
            compared += 1
    assert compared >= 5
    other = table[~table["usual"]]
    assert len(other), "KV heads, other text"
    assert not (other["unit"].eq("query") & other["calibration"].isin(usual["calibration"])
                & other["windows"].isin(usual["windows"])).any()  # fmt: skip


def test_the_board_shows_what_the_course_has_so_far_and_where_it_goes():
    def shown(*args):
        return [label.get_text() for label in scoreboard.draw(*args).axes[0].get_yticklabels()]

    assert shown("00") == ["random units (00)", "where the course goes (08)"]
    assert shown("02", {"mine": {"code": 0.1, "prose": 0.2}})[1:] == [
        "L2 magnitude (02)",
        "mine (now)",
        "where the course goes (08)",
    ]
    assert len(shown("12")) == len(scoreboard.LINES)


def test_a_line_that_is_not_there_and_a_record_that_does_not_agree(monkeypatch):
    with pytest.raises(ValueError, match=r"expected one of .*'random units'.*found .*'L3'"):
        scoreboard.line_of("02", "L3")
    monkeypatch.setattr(scoreboard, "recorded", lambda *_: [{"code": 0.1, "prose": 0.1}])
    with pytest.raises(AssertionError, match="expected what was recorded"):
        scoreboard.measure_again("00", "random units")
