"""A sweep measures what single calls measure, goes on where it stopped, and keeps settings apart."""

import copy
import json
import math

import pytest
import torch
from tiny import VOCABULARY, tiny_model

from greedy_helpers import calibration_tokens, compare, count_parameters, load_model, perplexity, prune
from greedy_helpers.compare import CRITERIA, RECOMMENDED, REMEDIES, Recipe, Settings, apply, choose, frame, sweep

SMALL = Settings(calibration=4, evaluation=2, seq=48)


def tokens_(n=16, seed=5):
    return torch.randint(0, VOCABULARY, (n, 24), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_has_a_name_and_runs(criterion):
    model = tiny_model("llama-gqa")
    report = apply(model, tokens_(8), 0.5, Recipe(criterion), progress=False)
    assert [step.units_after for step in report.steps] == [1, 40, 1, 40]


@pytest.mark.parametrize("remedy", REMEDIES)
def test_a_recipe_is_a_call_of_prune(remedy):
    one, other = tiny_model("gpt2"), tiny_model("gpt2")
    apply(one, tokens_(), 0.25, Recipe("L2", remedy), progress=False)
    prune(other, tokens_(), 0.25, criterion=CRITERIA["L2"](None, None, 0), progress=False, **REMEDIES[remedy])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_allocations_remove_as_much_as_uniform():
    left = {}
    for allocation in compare.ALLOCATIONS:
        model = tiny_model("llama")
        apply(model, tokens_(), 0.5, Recipe("output energy", "none", allocation), progress=False)
        left[allocation] = count_parameters(model)["blocks"]
    assert left["adaptive"] == pytest.approx(left["uniform"], abs=2500)  # a head more or less
    assert left["cost"] == pytest.approx(left["uniform"], abs=2500)


def test_choose_judges_on_windows_it_did_not_fit():
    model, tokens = tiny_model("llama"), tokens_(16)
    recipes = [Recipe("random", "none"), Recipe("exact greedy", "recommended")]
    best, found = choose(model, tokens, 0.5, recipes, progress=False)
    for recipe in recipes:
        trial = copy.deepcopy(model)
        apply(trial, tokens[:12], 0.5, recipe, progress=False)
        assert found[recipe] == pytest.approx(perplexity(trial, tokens[12:]))
    assert found[best] == min(found.values())
    assert count_parameters(model) == count_parameters(tiny_model("llama"))
    with pytest.raises(ValueError, match="validation windows or at least 4 calibration windows, found 3"):
        choose(model, tokens[:3], 0.5, recipes)
    other = tokens_(4, seed=8)
    trial = copy.deepcopy(model)
    apply(trial, tokens, 0.5, recipes[1], progress=False)
    found = choose(model, tokens, 0.5, recipes, other, progress=False)[1]
    assert found[recipes[1]] == pytest.approx(perplexity(trial, other))
    report = apply(model, tokens, 0.5, RECOMMENDED, progress=False)
    assert report.target == "residual"


def test_recipes_refuse_unknown_words():
    for name, value in {"criterion": "magic", "remedy": "prayer", "allocation": "fair"}.items():
        with pytest.raises(ValueError, match=rf"expected a {name} among .* found '{value}'"):
            Recipe(**{name: value})
    assert str(Recipe("L2", "two-step (paper)", "adaptive")) == "L2, adaptive + two-step (paper)"


def test_a_killed_sweep_goes_on_and_measures_nothing_twice(tmp_path, monkeypatch):
    out, recipes = (
        tmp_path / "results" / "sweep.json",
        [Recipe("L2"), Recipe("random"), Recipe("output energy", "post")],
    )
    made, real = [], compare.apply

    def breaks(model, calibration, ratio, recipe, **options):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(str(recipe))
        return real(model, calibration, ratio, recipe, **options)

    monkeypatch.setattr(compare, "apply", breaks)
    with pytest.raises(KeyboardInterrupt):
        sweep(out, ["llama-mini"], recipes, [0.25], settings=SMALL, progress=False)
    assert [row["criterion"] for row in json.loads(out.read_text())["rows"]] == ["L2", "random"]
    monkeypatch.setattr(compare, "apply", real)
    share = {"accuracy": 0.5}
    found = sweep(out, ["llama-mini"], recipes, [0.25], settings=SMALL, progress=False, extra=lambda _: lambda _: share)
    assert [row["criterion"] for row in found["rows"]] == ["L2", "random", "output energy"]
    assert found["rows"][2]["accuracy"] == 0.5
    assert json.loads(out.read_text()) == found
    assert list(out.parent.iterdir()) == [out]

    model, tokenizer = load_model("llama-mini")
    apply(model, calibration_tokens(tokenizer, 4, 48, "code", seed=0), 0.25, Recipe("random"), seed=0, progress=False)
    windows = compare.evaluation_tokens(tokenizer, 2, 48, "prose")
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
