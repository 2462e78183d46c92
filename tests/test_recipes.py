"""A recipe is plain data: its words are checked at once, and the report repeats them."""

from functools import partial

import pytest
import torch
from conftest import assert_same_model, assert_same_report, calibration
from tiny import tiny_model

from greedy_helpers import (
    FLAP,
    PAPER,
    RECOMMENDED,
    Recipe,
    depth2_modules,
    exact_greedy,
    fixed_scores,
    flap,
    output_energy,
    prune,
    second_moment,
    weight_norm,
)
from greedy_helpers.criteria import by_kind
from greedy_helpers.recipes import CRITERIA, OSSCAR, PREPARED, name_of
from greedy_helpers.remedies import REMEDIES, Remedy, refit_survivors
from greedy_helpers.similarity import redundant_first


@pytest.mark.parametrize("field", ["criterion", "remedy", "allocation"])
def test_unknown_words_are_refused_with_the_known_ones(field):
    with pytest.raises(ValueError, match=rf"expected a {field} among .*; .*: found 'magic'"):
        Recipe(**{field: "magic"})
    with pytest.raises(TypeError, match=f"expected as {field} .*, found 3"):
        Recipe(**{field: 3})


@pytest.mark.parametrize("criterion", [*CRITERIA, *PREPARED])
def test_every_criterion_of_the_tables_runs(criterion):
    model = tiny_model("mistral")
    for unit, left in {"query": [4, 60], "kv": [1, 40]}.items():  # the second time on 4 query heads of 2 KV heads
        plan = dict(zip([m.name for m in depth2_modules(model)], left * 2, strict=True))
        report = prune(model, calibration(8), None, Recipe(criterion, "none"), plan=plan, unit=unit, progress=False)
        assert [step.units_after for step in report.steps] == left * 2
        assert [step.unit for step in report.steps[:2]] == [{"query": "query head", "kv": "KV head"}[unit], "channel"]
        assert report.criterion == criterion
    assert [m.n_units for m in depth2_modules(model)] == [2, 40, 2, 40]


@pytest.mark.parametrize("remedy", REMEDIES)
def test_a_name_stands_for_the_object_in_its_table(remedy):
    models = tiny_model("gpt2"), tiny_model("gpt2")
    recipes = Recipe("L2", remedy), Recipe(CRITERIA["L2"], REMEDIES[remedy])
    reports = [prune(m, calibration(), 0.25, recipe, progress=False) for m, recipe in zip(models, recipes, strict=True)]
    assert_same_model(*models)
    assert_same_report(*reports)
    assert {report.remedy for report in reports} == {remedy}
    assert {report.criterion for report in reports} == {"L2"}


@pytest.mark.parametrize("recipe", [RECOMMENDED, PAPER, FLAP, OSSCAR])
def test_reports_repeat_the_recipe(recipe):
    report = prune(tiny_model("llama"), calibration(), 0.5, recipe, progress=False)
    assert {key: getattr(report, key) for key in recipe.names} == recipe.names


def test_recipes_in_words():
    assert str(RECOMMENDED) == "exact greedy, loss metric, loss prices + post, local"
    assert Recipe() == OSSCAR
    assert str(OSSCAR) == "exact greedy + post, local"
    assert str(FLAP) == "FLAP WIFV, adaptive + bias"
    assert str(Recipe(second_moment, "none")) == "second moment"
    assert str(Recipe(second_moment, "none", allocation="floor")) == "second moment"  # equal shares by either rule
    assert Recipe("L2", Remedy(after=lambda *_: None)).names["remedy"].startswith("Remedy(")


class Counting:
    """A criterion that is an object; its default repr would hold an address."""

    def __call__(self, module, seen):
        return torch.arange(module.n_units)


def test_names_of_functions_and_their_options():

    def wanted(block, module, seen, share):
        return torch.ones(module.n_units) * share * (module.block == block)

    greedy_heads = partial(by_kind, attention=partial(exact_greedy, swaps=3), ffn=output_energy)
    names = {
        "second moment": second_moment,
        "L2": weight_norm,
        "magic": "magic",
        "flap(published_code=True)": partial(flap, published_code=True),
        "exact_greedy(swaps=3, whole_path=True)": partial(exact_greedy, swaps=3, whole_path=True),
        "by_kind(attention=exact_greedy(swaps=3), ffn=output energy)": greedy_heads,
        "wanted(3, share=0.5)": partial(wanted, 3, share=0.5),
        "Counting": Counting(),
        "L1": partial(weight_norm, p=1),  # like the table's
        "post, local": Remedy(after=refit_survivors, target="local"),
        "Remedy(after=refit_survivors, target='residual', reads_means=True)": Remedy(
            after=refit_survivors, target="residual", reads_means=True
        ),
        "redundant_first(criterion=second moment, tau=0.2)": partial(redundant_first, criterion=second_moment, tau=0.2),
    }
    assert [name_of(part) for part in names.values()] == list(names)


def test_different_known_scores_have_different_names():
    """A work folder tells two runs apart by them; the same scores in another dtype or order of memory are the same."""
    names = [m.name for m in depth2_modules(tiny_model("llama"))]
    scores = {name: torch.arange(6.0).view(2, 3).T.flatten() for name in names}
    other = scores | {names[2]: scores[names[2]] + 1e-6}
    turned = scores | {names[2]: scores[names[2]].flip(0)}
    elsewhere = {f"{name}.x": value for name, value in scores.items()}
    named = [name_of(partial(fixed_scores, scores=each)) for each in (scores, other, turned, elsewhere)]
    assert len(set(named)) == 4
    assert named[0] == name_of(partial(fixed_scores, scores={name: s.double() for name, s in scores.items()}))
    assert named[0].startswith("fixed_scores(scores=<4 modules, ")
