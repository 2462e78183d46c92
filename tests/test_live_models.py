"""What is handed over in the place of a plain model: other objects, compiled models, weights that torch computes."""

import pytest
import torch
import transformers
from conftest import assert_untouched, quiet, state_of
from test_doors import TOKENS, logits
from tiny import tiny_model
from torch import nn
from torch.nn.utils import parametrizations, prune

from greedy_helpers import (
    count_parameters,
    depth2_modules,
    export_plain,
    load_model,
    remove_units,
    save_pruned,
    scores_of,
)
from greedy_helpers.structure import UnsupportedModule


class Pipeline:
    def __init__(self, model):
        self.model = model


OTHERS = {
    "DataParallel": (nn.DataParallel, r"found DataParallel; it wraps one: pass \.module of it"),
    "pipeline": (Pipeline, r"found Pipeline; it wraps one: pass \.model of it"),
    "load_model": (lambda model: (model, None), r"found tuple; load_model returns a model and a tokenizer"),
    "state dict": (lambda model: model.state_dict(), "found OrderedDict$"),
    "name": (lambda model: "llama-mini", "found str$"),
    "None": (lambda model: None, "found NoneType$"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_model_is_named(kind, tmp_path):
    wrap, message = OTHERS[kind]
    other = wrap(tiny_model("llama", torch.float32))
    calls = [
        lambda: depth2_modules(other),
        lambda: quiet(other, TOKENS, 0.25),
        lambda: scores_of(other, TOKENS),
        lambda: count_parameters(other),
        lambda: save_pruned(other, tmp_path / "model"),
        lambda: export_plain(other, tmp_path / "model"),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=f"expected a transformers model, {message}"):
            call()
    assert not any(tmp_path.iterdir())


# --- compiled models


@pytest.mark.parametrize("how", ["torch.compile", "model.compile", "blocks"])
def test_compiled_models_are_pruned_and_saved_like_others(how, tmp_path):
    model, plain = tiny_model("llama", torch.float32), tiny_model("llama", torch.float32)
    if how == "torch.compile":
        model = torch.compile(model, backend="eager")
    elif how == "model.compile":
        model.compile(backend="eager")
    else:
        for block in model.model.layers:
            block.compile(backend="eager")
    logits(model)  # compiled for the dense sizes
    for one in (model, plain):
        quiet(one, TOKENS, 0.25, remedy="both")
    assert torch.equal(logits(model), logits(plain))
    again, _ = load_model(save_pruned(model, tmp_path / "model"), "cpu")
    assert torch.equal(logits(again), logits(plain))
    for module in depth2_modules(model):
        remove_units(module, torch.arange(2))
    again = transformers.AutoModelForCausalLM.from_pretrained(export_plain(model, tmp_path / "plain"))
    assert torch.equal(logits(again), logits(model))


def test_a_compiled_part_is_named_when_saved(tmp_path):
    model = tiny_model("llama", torch.float32)
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, backend="eager")
    with pytest.raises(ValueError, match=r"^save_pruned: model\.layers\.0\.mlp\._orig_mod\..* would be lost"):
        save_pruned(model, tmp_path / "model")
    assert not any(tmp_path.iterdir())


# --- weights that are computed from others


def norm(linear):
    parametrizations.weight_norm(linear)


def mask(linear):
    prune.l1_unstructured(linear, "weight", 0.5)


@pytest.mark.parametrize("change", [norm, mask])
def test_weights_that_torch_computes_are_refused_by_name(change):
    model = tiny_model("llama", torch.float32)
    change(model.model.layers[1].mlp.up_proj)
    before = state_of(model)
    for call in (
        lambda: quiet(model, TOKENS, 0.25, remedy="both"),
        lambda: remove_units(depth2_modules(model)[3], torch.arange(9)),
    ):
        with pytest.raises(
            UnsupportedModule, match=r"layers\.1\.mlp\.up_proj: expected a weight of its own, found one"
        ):
            call()
    assert_untouched(model, before)
    quiet(model, TOKENS, 0.25, blocks=[0])  # the others can be cut


# --- models whose blocks are on the disk


def test_save_pretrained_of_a_lazy_model_names_save_pruned(tmp_path):
    for folder in ("llama-mini", save_pruned(tiny_model("llama", torch.float32), tmp_path / "pruned")):
        model, tokenizer = load_model(folder, "cpu", lazy=True)
        with pytest.raises(ValueError, match=r"blocks on the disk; use greedy_helpers\.save_pruned"):
            model.save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model").exists()
        save_pruned(model, tmp_path / f"again {model.config.hidden_size}", tokenizer)


def test_kinds_that_a_family_lacks_are_said():
    model = tiny_model("llama", torch.float32)
    before = state_of(model)
    with pytest.warns(UserWarning, match=r"no modules of the kinds \{'ffn'\}: nothing is removed"):
        quiet(model, TOKENS, 0.25, kinds={"ffn"})
    assert_untouched(model, before)
