"""What a refit aims at: each target against a slow computation with whole models and stored activations."""

import copy
from functools import partial

import pytest
import torch
from slow import recorded, refit_slowly
from tiny import VOCABULARY, tiny_model

from greedy_helpers import (
    UnsupportedModule,
    blocks_of,
    depth2_modules,
    fixed_scores,
    flap,
    load_pruned,
    output_energy,
    prune,
    remove_units,
    save_pruned,
    scores_of,
    weight_of,
)

quiet = partial(prune, progress=False)
NAMES = ("llama", "llama-gqa", "gpt2", "gpt_neox", "phi")  # the last two add attention and FFN in parallel


def tokens_(n=20, seed=5):
    return torch.randint(0, VOCABULARY, (n, 24), generator=torch.Generator().manual_seed(seed))


def stream_in_front(model, number, tokens):
    """The residual stream in front of module `number`: the block's input plus what this block has added so far."""
    modules = depth2_modules(model)
    block = model.get_submodule(modules[number].name.rsplit(".", 1)[0] if "." in modules[number].name else "")
    seen = []
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(tokens)
    handle.remove()
    stream = seen[0].flatten(0, -2)
    for earlier in range(number - number % 2, number):
        stream = stream + recorded(model, modules[earlier].level2.linear, tokens)[1]
    return stream


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", ["dense", "residual", "local"])
def test_post_refit_equals_the_slow_one(name, target):
    model, tokens = tiny_model(name), tokens_()
    dense, slow = copy.deepcopy(model), copy.deepcopy(model)
    report = quiet(model, tokens, 0.5, criterion=output_energy, refit="post", target=target, batch_size=7)
    for number, step in enumerate(report.steps):
        module, original = depth2_modules(slow)[number], depth2_modules(dense)[number]
        linear = module.level2.linear
        aim = recorded(dense, original.level2.linear, tokens)[1]
        if target == "local":
            aim = recorded(slow, linear, tokens)[1]
        if target == "residual":
            aim = aim + stream_in_front(dense, number, tokens) - stream_in_front(slow, number, tokens)
        remove_units(module, step.keep)
        refit_slowly(linear, recorded(slow, linear, tokens)[0], aim, damp=1e-2)
        error = (recorded(slow, linear, tokens)[1] - aim).square().sum() / aim.square().sum()
        assert step.error == pytest.approx(error.item(), rel=1e-4)
    fresh = tokens_(seed=9)
    with torch.no_grad():
        torch.testing.assert_close(model(fresh).logits, slow(fresh).logits, rtol=1e-5, atol=1e-5)
        hidden = [m(tokens, output_hidden_states=True).hidden_states[1] for m in (dense, model)]
    lost = ((hidden[0] - hidden[1]).square().sum() / hidden[0].square().sum()).item()
    assert report.stream_errors[0] == pytest.approx(lost, rel=1e-4)


def test_the_residual_target_follows_modules_that_are_not_cut():
    """Only the FFN is pruned, the attention behind a broken prefix is not: its drift counts all the same."""
    model, tokens = tiny_model("llama"), tokens_()
    dense = copy.deepcopy(model)
    report = quiet(model, tokens, 0.5, refit="post", target="residual", kinds={"gated_ffn"}, criterion=output_energy)
    assert [step.kind for step in report.steps] == ["gated_ffn"] * 2
    with torch.no_grad():
        hidden = [m(tokens, output_hidden_states=True) for m in (dense, model)]
    aimless = copy.deepcopy(dense)
    other = quiet(aimless, tokens, 0.5, refit="post", target="dense", kinds={"gated_ffn"}, criterion=output_energy)
    assert report.stream_errors[1] < other.stream_errors[1]
    assert report.stream_errors[0] == pytest.approx(other.stream_errors[0])  # in the first block nothing is broken yet
    assert hidden[0].logits.shape == hidden[1].logits.shape


@pytest.mark.parametrize("name", ["gemma2", "granite", "olmo2", "bert"])
@pytest.mark.filterwarnings("ignore:.*stays whole")
def test_blocks_that_do_not_simply_add_are_refused(name):
    """A norm behind level 2, a multiplier, attention that the table leaves out: the residual target would be wrong."""
    model = tiny_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for block in blocks_of(model):
        if name == "granite":
            block.residual_multiplier = 0.5
    with pytest.raises(UnsupportedModule, match=r"target='residual' needs .* block 0 does not .* Use target='dense'"):
        quiet(model, tokens_(4), 0.25, refit="post", target="residual")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_targets_and_refits_that_do_not_exist():
    model = tiny_model("llama")
    for options, message in [
        ({"refit": "after"}, "'post', 'both' or 'bias', found 'after'"),
        ({"target": "output"}, "'dense', 'local' or 'residual', found 'output'"),
        ({"refit": "both", "target": "local"}, "expected refit='post', found 'both'"),
    ]:
        with pytest.raises(ValueError, match=message):
            quiet(model, tokens_(2), 0.25, **options)


# --- FLAP's remedy


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_bias_is_the_dense_mean_of_what_was_removed(name, tmp_path):
    model, tokens = tiny_model(name), tokens_()
    dense = copy.deepcopy(model)
    scores = scores_of(dense, tokens, flap)
    report = quiet(model, tokens, 0.5, criterion=fixed_scores(scores, "FLAP"), refit="bias", batch_size=7)
    assert report.criterion == "FLAP"
    for step, original, module in zip(report.steps, depth2_modules(dense), depth2_modules(model), strict=True):
        gone = torch.tensor([u for u in range(step.units_before) if u not in step.keep.tolist()])
        channels = original.level2.index[gone].flatten()
        z, _ = recorded(dense, original.level2.linear, tokens)
        expected = weight_of(original.level2.linear)[:, channels] @ z.mean(0)[channels]
        if original.level2.linear.bias is not None:
            expected = expected + original.level2.linear.bias
        torch.testing.assert_close(module.level2.linear.bias.detach(), expected.detach())
    assert report.steps[0].error < report.steps[0].error_cut
    save_pruned(model, tmp_path / "flap")
    loaded, _ = load_pruned(tmp_path / "flap", dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


def test_added_biases_go_when_something_fails():
    model, tokens = tiny_model("llama"), tokens_(4)

    def breaks(module, seen):
        if module.block == 1:
            raise RuntimeError("stop here")
        return output_energy(module, seen)

    with pytest.raises(RuntimeError, match="stop here"):
        quiet(model, tokens, 0.5, criterion=breaks, refit="bias")
    assert all(module.level2.linear.bias is None for module in depth2_modules(model))
    assert "bias" not in " ".join(name for name, _ in model.named_parameters())


def test_fixed_scores_refuse_other_modules_and_sizes():
    model, tokens = tiny_model("llama"), tokens_(4)
    scores = scores_of(model, tokens, output_energy)
    first, second = depth2_modules(model)[:2]
    with pytest.raises(KeyError, match=r"layers\.0\.mlp: no scores; there are some for model\.layers\.0\.self_attn"):
        fixed_scores({first.name: scores[first.name]})(second)
    remove_units(second, torch.arange(7))
    with pytest.raises(ValueError, match=r"the scores are for 80 units, found 7"):
        fixed_scores(scores)(depth2_modules(model)[1])
