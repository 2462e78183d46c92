"""Checkpoints as others publish them: codes under any name and in any file, weights under older names, spare heads."""

import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_doors import LAZY, TOKENS, edit, logits, saved
from tiny import tiny_config, tiny_model

from greedy_helpers import load_model, save_pruned
from greedy_helpers.checkpoint import load_pruned


def rewritten(folder, change):
    """The folder with other tensors in its file: `change` maps (name, tensor) to the entries in their place."""
    weights = load_file(folder / "model.safetensors")
    entries = {k: v.clone().contiguous() for pair in weights.items() for k, v in change(*pair).items()}
    save_file(entries, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def loaded(folder, lazy):
    """What a folder holds, as a model that runs."""
    model, _ = load_model(folder, "cpu", lazy=lazy)
    return load_pruned(save_pruned(model, folder / "again"), "cpu")[0] if lazy else model


# --- codes without a word in the config


def beside(*endings):
    """Tensors that stand beside, or in the place of, the weights of the linears."""

    def change(name, value):
        if "proj.weight" not in name:
            return {name: value}
        codes = {name.removesuffix("weight") + ending: torch.zeros(4, 4, dtype=torch.uint8) for ending in endings}
        return codes if "weight" not in endings else codes | {name: value}

    return change


@LAZY
@pytest.mark.parametrize(
    "endings",
    [("weight_blocks", "weight_scales"), ("weight._data", "weight._scale"), ("weight", "weight_scale_inv"), ("W_q",)],
    ids=["mxfp4", "quanto", "fp8 scales", "hqq"],
)
def test_what_stands_in_the_place_of_weights_is_called_quantized(endings, lazy, tmp_path):
    folder = rewritten(saved(tiny_model("llama", torch.float32), tmp_path / "model"), beside(*endings))
    with pytest.raises(ValueError, match=r"is quantized \(.*down_proj\..*load the full-precision checkpoint"):
        load_model(folder, lazy=lazy)


@LAZY
def test_biases_as_codes_are_refused(lazy, tmp_path):
    def change(name, value):
        return {name: value.to(torch.int8) if name.endswith("bias") else value}

    folder = rewritten(saved(tiny_model("llama-gqa", torch.float32), tmp_path / "model"), change)
    with pytest.raises(ValueError, match=r"is quantized \(model\.layers\.0\.mlp\.down_proj\.bias is stored as I8\)"):
        load_model(folder, lazy=lazy)


@pytest.mark.parametrize(("dtype", "zipped"), [(torch.int8, True), (torch.int8, False), (torch.float8_e4m3fn, True)])
def test_codes_in_pickled_weights_are_refused(dtype, zipped, tmp_path):
    folder = saved(tiny_model("llama", torch.float32), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    whole = weights["model.layers.1.mlp.up_proj.weight"]
    for stored in (whole, whole.to(dtype)):
        weights["model.layers.1.mlp.up_proj.weight"] = stored
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        if stored is whole:
            load_model(folder, "cpu")
    with pytest.raises(ValueError, match=rf"is quantized \(.*up_proj\.weight is stored as {dtype}\)"):
        load_model(folder, "cpu")


@LAZY
def test_an_empty_word_about_quantization_is_none(lazy, tmp_path):
    model = tiny_model("llama", torch.float32)
    assert torch.equal(logits(loaded(saved(model, tmp_path / "model", quantization_config={}), lazy)), logits(model))


# --- older names


OLDER = {
    "gpt_neox": lambda name: name.replace("lm_head.", "embed_out."),
    "bert": lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    ),
    "gpt2": lambda name: name.removeprefix("transformer."),
    "opt": lambda name: name.removeprefix("model."),
    "bloom": lambda name: name.removeprefix("transformer."),
}


@LAZY
@pytest.mark.parametrize("name", OLDER)
def test_weights_under_older_names(name, lazy, tmp_path):
    model = tiny_model(name, torch.float32)
    folder = rewritten(saved(model, tmp_path / "model"), lambda key, value: {OLDER[name](key): value})
    assert torch.equal(logits(loaded(folder, lazy)), logits(model))


@LAZY
@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("gpt_bigcode", "transformer.h.0.attn.bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias"),
        ("falcon-7b", "transformer.h.0.self_attention.rotary.inv_freq"),
    ],
)
def test_tables_of_code_that_is_gone(name, table, lazy, tmp_path):
    model = tiny_model(name, torch.float32)
    mask = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    folder = rewritten(saved(model, tmp_path / "model"), lambda key, value: {key: value, table: mask})
    assert torch.equal(logits(loaded(folder, lazy)), logits(model))


# --- heads that a class does not have


@LAZY
@pytest.mark.parametrize("architectures", [["BertForMaskedLM"], ["BertLMHeadModel"], None])
def test_berts_other_heads_are_named_and_left_out(architectures, lazy, tmp_path):
    """As BERT is published: with the head for pairs of sentences and the pooler, for a class with neither."""
    torch.manual_seed(0)
    published = transformers.BertForPreTraining(tiny_config("bert")).eval()
    folder = saved(published, tmp_path / "model", architectures=architectures)
    rewritten(folder, lambda key, value: {OLDER["bert"](key): value})
    with pytest.warns(UserWarning, match=r"does not have, bert\.pooler\.dense\.bias, .*seq_relationship.* 1 more"):
        load_model(folder, "cpu", lazy=lazy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = loaded(folder, lazy)
    assert type(model).__name__ == (architectures or ["BertLMHeadModel"])[0]
    if architectures == ["BertForMaskedLM"]:
        with torch.no_grad():
            assert torch.equal(logits(model), published(TOKENS).prediction_logits)


@LAZY
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("llama", "lm_head.bias"),
        ("llama", "lm_head.dense.weight"),
        ("llama", "model.layers.0.self_attn.q_norm.weight"),
        ("llama", "model.layers.2.mlp.up_proj.weight"),
        ("llama", "layers.0.self_attn.q_norm.weight"),
        ("llama", "model.embed_norm.weight"),
        ("gpt2", "h.0.attn.gate.weight"),
        ("bert", "cls.predictions.scale.weight"),
    ],
)
def test_weights_that_would_change_the_numbers_are_no_spare_heads(name, key, lazy, tmp_path):
    model = tiny_model(name, torch.float32)
    folder = rewritten(saved(model, tmp_path / "model"), lambda k, value: {k: value, key: torch.ones(48)})
    with pytest.raises(ValueError, match=rf"holds weights that are not of .*: {key}"):
        load_model(folder, "cpu", lazy=lazy)


@LAZY
def test_a_value_head_beside_a_language_model_is_named(lazy, tmp_path):
    model = tiny_model("llama", torch.float32)
    folder = rewritten(
        saved(model, tmp_path / "model"), lambda key, value: {key: value, "v_head.summary.weight": torch.ones(1, 48)}
    )
    with pytest.warns(UserWarning, match=r"heads that LlamaForCausalLM does not have, v_head\.summary\.weight: they"):
        assert torch.equal(logits(loaded(folder, lazy)), logits(model))


def test_a_headless_class_does_not_leave_the_only_head_behind(tmp_path):
    folder = saved(tiny_model("gpt2", torch.float32, tie_word_embeddings=False), tmp_path / "model")
    with pytest.raises(ValueError, match=r"holds weights that are not of GPT2Model.*: lm_head\.weight"):
        load_model(edit(folder, architectures=["GPT2Model"]))
