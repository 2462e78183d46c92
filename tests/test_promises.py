"""Promises of prune that are easily broken: nothing kept alive, modes, names, the pass of an allocation, odd models."""

import gc
import weakref
from functools import partial

import pytest
import torch
from conftest import calibration, quiet
from tiny import tiny_model

import greedy_helpers as gh
from greedy_helpers import greedy, measure, moments
from greedy_helpers.criteria import Seen

ALL = {"paper": gh.PAPER, "recommended": gh.RECOMMENDED, "flap": gh.FLAP, "osscar": gh.OSSCAR}


@pytest.mark.parametrize("recipe", ALL)
def test_nothing_of_a_block_outlives_the_run(recipe, monkeypatch):
    """Without the garbage collector, which would hide a cycle: on a GPU a cycle keeps gigabytes per block."""
    made = []
    for cls in (measure.DenseRecord, measure.Drift, measure.ModulePasses, moments.Moments, Seen):

        def init(self, *args, _init=cls.__init__, **options):
            made.append(weakref.ref(self))
            _init(self, *args, **options)

        monkeypatch.setattr(cls, "__init__", init)
    gc.disable()
    try:
        report = gh.prune(tiny_model("llama"), calibration(), 0.5, ALL[recipe], progress=False)
        assert len(made) > 10
        assert [type(one()).__name__ for one in made if one() is not None] == []
    finally:
        gc.enable()
    assert len(report.steps) == 4


def test_scores_keep_neither_a_graph_nor_what_they_are_a_view_of():
    def with_a_graph(module, seen):
        return module.level2.linear.weight.square().sum(0)[module.level2.index].sum(1)

    def a_view(module, seen):
        return seen.level2.xx.diagonal()[: module.n_units]

    for criterion in (with_a_graph, a_view):
        report = quiet(tiny_model("llama"), calibration(), 0.5, criterion=criterion)
        report.to_json(tensors=True)
        for step in report.steps:
            assert not step.scores.requires_grad
            assert step.scores.untyped_storage().nbytes() == step.scores.nbytes


def test_taylor_scores_know_no_dropout_and_no_frozen_weights(tmp_path):
    right = gh.taylor_scores(tiny_model("gpt2"), calibration())
    training, frozen = tiny_model("gpt2").train(), tiny_model("gpt2").requires_grad_(False)
    for model in (training, frozen):
        for name, values in gh.taylor_scores(model, calibration()).items():
            torch.testing.assert_close(values, right[name])
    assert training.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    tiny_model("llama", torch.float32).save_pretrained(tmp_path)
    lazy, _ = gh.load_model(tmp_path, "cpu", lazy=True)
    with pytest.raises(ValueError, match=r"taylor_scores: expected the whole model in memory, found .* on the disk"):
        gh.taylor_scores(lazy, calibration())


def test_every_module_is_back_in_its_own_mode():
    model = tiny_model("gpt2").train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    quiet(model, calibration(), 0.25)
    gh.scores_of(model, calibration())
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("allocation", ["adaptive", "cost"])
def test_the_pass_of_an_allocation_is_what_prune_was_asked_for(allocation, monkeypatch):
    """Its blocks and kinds only, its precision; and batches are halved there, too."""
    asked, dtypes, left = [], [], [1]

    class Counted(moments.Moments):
        def __init__(self, name, dtype, **options):
            dtypes.append(dtype)
            super().__init__(name, dtype, **options)

    def criterion(module, seen):
        asked.append(module.name)
        if left:
            left.pop()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return gh.output_energy(module, seen)

    monkeypatch.setattr(measure, "Moments", Counted)
    if allocation == "cost":
        left.clear()
    recipe = gh.Recipe(criterion, "none", allocation=allocation)
    how = {"blocks": [0], "kinds": ["attention"], "precision": torch.float32, "progress": False}
    if allocation == "adaptive":
        with pytest.warns(UserWarning, match=r"scores_of: out of memory .* going on with 6 windows per batch"):
            gh.prune(tiny_model("llama"), calibration(), 0.5, recipe, **how)
    else:
        gh.prune(tiny_model("llama"), calibration(), 0.5, recipe, **how)
    assert set(asked) == {"model.layers.0.self_attn"}
    assert set(dtypes) == {torch.float32}


def test_what_is_wrong_elsewhere_does_not_matter_and_here_it_is_named():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    for recipe in (gh.FLAP, gh.OSSCAR):
        gh.prune(model, calibration(), 0.25, recipe, blocks=[0], progress=False)
    with pytest.raises(FloatingPointError, match=r"layers\.1\.mlp\.up_proj\.weight: expected finite weights"):
        gh.prune(model, calibration(), 0.25, blocks=[0], progress=False)  # the loss hangs on all blocks
    with pytest.raises(FloatingPointError, match=r"layers\.1\.mlp\.up_proj\.weight: expected finite weights"):
        gh.prune(model, calibration(), 0.25, gh.FLAP, progress=False)


def test_a_block_that_adds_nothing_is_additive():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    report = gh.prune(model, calibration(), 0.25, progress=False)
    assert len(report.steps) == 4


@pytest.mark.parametrize("damp", [0.0, 1e-2])
@pytest.mark.parametrize("varying", [0, 1, 6, 12])
def test_channels_that_do_not_vary_keep_their_weights(damp, varying):
    """With a bias they say nothing: what is left of them after centring is rounding, and no reason for a weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 12, generator=generator).double() + 100
    x[:, varying:] = x[0, varying:]
    layer = torch.nn.Linear(12, 3).double()
    before, seen = gh.weight_of(layer).detach().clone(), gh.Moments()
    seen.update(x, torch.randn(40, 3, generator=generator).double())
    after = gh.solve(seen, before, layer.bias.detach(), damp).weight
    torch.testing.assert_close(after[:, varying:], before[:, varying:], rtol=0, atol=1e-6)
    assert (after - before)[:, :varying].abs().max() > 1e-3 if varying else True


def test_a_float32_elimination_is_not_factorised_again_without_a_reason(monkeypatch):
    states = []
    init = greedy._State.__init__
    monkeypatch.setattr(greedy._State, "__init__", lambda self, *args: (states.append(self), init(self, *args))[1])
    for dtype in (torch.float32, torch.float64):
        quiet(tiny_model("llama", torch.float32), calibration(40), 0.5, criterion=partial(gh.exact_greedy, dtype=dtype),
              remedy="post", precision=torch.float32)  # fmt: skip
    assert [state.refactorised for state in states] == [0] * 8


def test_something_else_than_a_recipe():
    for wrong in (gh.second_moment, "paper", {"criterion": "L2"}):
        with pytest.raises(TypeError, match=r"prune: expected a Recipe, e\.g\. gh\.PAPER"):
            gh.prune(tiny_model("llama"), calibration(), 0.25, wrong)
