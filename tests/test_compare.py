"""A sweep measures what single calls measure, goes on where it stopped, and keeps settings apart."""

import json
import math

import pytest
from conftest import calibration
from tiny import tiny_model

from greedy_helpers import (
    PAPER,
    RECOMMENDED,
    Recipe,
    calibration_tokens,
    compare,
    count_parameters,
    depth2_modules,
    evaluation_tokens,
    load_model,
    perplexity,
    prune,
    random_scores,
)
from greedy_helpers.allocation import unit_parameters
from greedy_helpers.compare import Settings, frame, recipe_of, sweep
from greedy_helpers.recipes import ALLOCATIONS

SMALL = Settings(calibration=4, evaluation=2, seq=48)


def test_allocations_remove_as_much_as_uniform():
    """At least as many parameters, and at most one unit more: the last one taken."""
    left = {}
    for allocation in ALLOCATIONS:
        model = tiny_model("llama")
        prune(model, calibration(16), 0.5, Recipe("output energy", "none", allocation=allocation), progress=False)
        left[allocation] = count_parameters(model)["blocks"]
    dearest = max(unit_parameters(module) for module in depth2_modules(tiny_model("llama")))
    for allocation in ("adaptive", "cost"):
        assert 0 <= left["uniform"] - left[allocation] < dearest


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
    with pytest.raises(ValueError, match=r"holds results of .* name another file"):
        sweep(out, ["llama-mini"], recipes, [0.25], settings=Settings(calibration=5), progress=False)


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
