"""A sweep measures what single calls measure, goes on where it stopped, and keeps settings apart."""

import json
import math
from dataclasses import replace

import pytest
from conftest import calibration
from tiny import tiny_model

from greedy_helpers import (
    PAPER,
    RECOMMENDED,
    Recipe,
    calibration_tokens,
    compare,
    depth2_modules,
    evaluation_tokens,
    load_model,
    perplexity,
    prune,
    random_scores,
)
from greedy_helpers.allocation import asked_parameters, removed_parameters, unit_parameters
from greedy_helpers.compare import Settings, frame, recipe_of, sweep
from greedy_helpers.recipes import ALLOCATIONS

SMALL = Settings(calibration=4, evaluation=2, seq=48)


def test_what_a_ratio_is_by_each_allocation():
    """Of the parameters: to half a channel, per FFN where all are alike; of the units: 1 of 4 heads, 24 of 80."""
    modules = depth2_modules(tiny_model("llama"))
    asked, removed = asked_parameters(modules, 0.3), {}
    head, channel = (unit_parameters(module) for module in modules[:2])
    for allocation in ALLOCATIONS:
        recipe = Recipe("output energy", "none", allocation=allocation)
        report = prune(tiny_model("llama"), calibration(16), 0.3, recipe, progress=False)
        before, after = report.parameters["modules"]
        removed[allocation] = before - after
        assert after == before - removed_parameters(modules, {step.name: step.units_after for step in report.steps})
    assert abs(removed["uniform"] - asked) <= channel
    assert removed["floor"] == 2 * (head + 24 * channel)
    assert removed["floor"] < asked
    for allocation in ("adaptive", "cost", "stream prices", "loss prices"):
        assert abs(removed[allocation] - asked) <= channel / 2


@pytest.mark.parametrize("recipe", [RECOMMENDED, PAPER, Recipe("L2", "post, local", 0.1, "adaptive")])
def test_a_row_names_its_recipe(recipe):
    assert recipe_of(json.loads(json.dumps(recipe.names)), recipe.damp) == recipe


def test_random_scores_are_drawn_with_the_rows_seed():
    row = Recipe("random", "none").names
    assert recipe_of(row | {"seed": 0}).criterion == "random"
    module = depth2_modules(tiny_model("llama"))[1]
    assert recipe_of(row | {"seed": 3}).criterion(module, None).equal(random_scores(module, seed=3))


def test_a_killed_sweep_goes_on_and_measures_nothing_twice(tmp_path, monkeypatch):
    out, recipes = (
        tmp_path / "results" / "sweep.json",
        [Recipe("L2", "none"), Recipe("random", "none"), Recipe("output energy", "post")],
    )
    made, real = [], compare.prune

    def breaks(model, calibration, ratio, recipe, **options):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(str(recipe))
        return real(model, calibration, ratio, recipe, **options)

    monkeypatch.setattr(compare, "prune", breaks)
    with pytest.raises(KeyboardInterrupt):
        sweep(out, ["llama-mini"], recipes, [0.25], settings=SMALL, progress=False)
    assert [row["criterion"] for row in json.loads(out.read_text())["rows"]] == ["L2", "random"]
    monkeypatch.setattr(compare, "prune", real)
    share = {"accuracy": 0.5}
    found = sweep(out, ["llama-mini"], recipes, [0.25], settings=SMALL, progress=False, extra=lambda _: lambda _: share)
    assert [row["criterion"] for row in found["rows"]] == ["L2", "random", "output energy"]
    assert found["rows"][2]["accuracy"] == 0.5
    assert json.loads(out.read_text()) == found
    assert list(out.parent.iterdir()) == [out]

    older = json.loads(out.read_text())
    del older["settings"]["column"]  # which version 0.2.0 did not write
    out.write_text(json.dumps(older))
    assert sweep(out, ["llama-mini"], recipes, [0.25], settings=SMALL, progress=False)["rows"] == found["rows"]

    model, tokenizer = load_model("llama-mini")
    prune(model, calibration_tokens(tokenizer, 4, 48, "code", seed=0), 0.25, Recipe("random", "none"), progress=False)
    windows = evaluation_tokens(tokenizer, 2, 48, "prose")
    assert found["rows"][1]["prose"] == pytest.approx(perplexity(model, windows), rel=1e-4)
    table = frame(found)
    assert table["method"].tolist() == ["L2", "random", "output energy + post"]
    assert (table["code excess"] > 0).all()
    assert {name for name in table if name.endswith(" left")} == {"total left", "blocks left"}
    with pytest.raises(ValueError, match=r"holds results of .* name another file"):
        sweep(out, ["llama-mini"], recipes, [0.25], settings=Settings(calibration=5), progress=False)


def test_the_unit_is_a_setting(tmp_path, monkeypatch):
    """It reaches `prune`; a file of another is refused; a file of before, which says none, goes on."""
    out, asked, real = tmp_path / "sweep.json", [], compare.prune
    monkeypatch.setattr(compare, "prune", lambda *a, unit, **options: (asked.append(unit), real(*a, **options))[1])
    job = [["llama-mini"], [Recipe("L2", "none")], [0.25]]
    found = sweep(out, *job, settings=replace(SMALL, unit="kv"), progress=False)
    assert asked == ["kv"] == [found["settings"]["unit"]]
    with pytest.raises(ValueError, match=r"holds results of .*'unit': 'kv'.* name another file"):
        sweep(out, *job, settings=SMALL, progress=False)
    del found["settings"]["unit"]
    out.write_text(json.dumps(found))
    assert len(sweep(out, *job, settings=SMALL, progress=False)["rows"]) == len(asked) == 1


def test_excess_is_taken_of_perplexities_alone():
    row = {"model": "m", "ratio": 0.25, "criterion": "L2", "remedy": "none", "allocation": "uniform", "seed": 0}
    found = {
        "dense": {"m": {"code": 10.0, "accuracy": 0.5}},
        "texts": ["code"],
        "rows": [row | {"code": 20.0, "accuracy": 0.4}],
    }
    table = frame(found)
    assert table["code excess"].tolist() == pytest.approx([math.log(2)])
    assert "accuracy excess" not in table
