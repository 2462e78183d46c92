"""What comes in, through a folder or live, is what it says and can be pruned, or is refused by name."""

import json
import os

import pytest
import torch
import transformers
from conftest import assert_untouched, calibration, quiet, state_of
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, tiny_config, tiny_model, unit_sets
from torch import nn

from greedy_helpers import (
    FAMILIES,
    blocks_of,
    depth2_modules,
    export_plain,
    load_model,
    remove_units,
    save_pruned,
)
from greedy_helpers.__main__ import main
from greedy_helpers.checkpoint import load_tokenizer
from greedy_helpers.structure import UnsupportedModule

TOKENS = calibration(4, 16, seed=2)
LAZY = pytest.mark.parametrize("lazy", [False, True], ids=["in memory", "lazy"])


@torch.no_grad()
def logits(model):
    return model(TOKENS)[0]


def pruned(name="llama", **sizes):
    """Other sizes in every module."""
    model = tiny_model(name, torch.float32, **sizes)
    for i, module in enumerate(depth2_modules(model)):
        sets = unit_sets(module)
        remove_units(module, sets[:, : max(1, sets.shape[1] - 1 - i)].flatten())
    return model


def edit(folder, **entries):
    """Other entries in config.json; None takes one out."""
    config = json.loads((folder / "config.json").read_text()) | entries
    text = json.dumps({key: value for key, value in config.items() if value is not None})
    (folder / "config.json").write_text(text)
    return folder


def saved(model, folder, **entries):
    model.save_pretrained(folder)
    return edit(folder, **entries)


# --- quantized


QUANTIZED = {
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "compression_config": {"compression_config": {"format": "int-quantized"}},
    "awq": {"text_config": {"quantization_config": {"quant_method": "awq"}}},
}


@LAZY
@pytest.mark.parametrize("method", QUANTIZED)
def test_a_quantized_config_is_refused(method, lazy, tmp_path):
    folder = saved(tiny_model("llama", torch.float32), tmp_path / "model", **QUANTIZED[method])
    with pytest.raises(ValueError, match=rf"is quantized \({method}\); load the full-precision checkpoint"):
        load_model(folder, lazy=lazy)


@LAZY
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_codes_in_the_place_of_weights_are_refused(dtype, lazy, tmp_path):
    """Whatever the config says: from_pretrained casts them to numbers, silently."""
    folder = saved(tiny_model("llama", torch.float32), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].to(dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"is quantized \({name} is stored as "):
        load_model(folder, lazy=lazy)


def test_quantizing_while_loading_is_refused():
    with pytest.raises(ValueError, match="load_in_8bit: quantized weights cannot be pruned"):
        load_model("llama-mini", load_in_8bit=True)


@pytest.mark.parametrize("name", ["model/q4.gguf", "model"])
def test_gguf_is_refused(name, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "q4.gguf").write_bytes(b"GGUF")
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="GGUF weights are quantized; load the full-precision checkpoint"):
        load_model(tmp_path / name)


class Packed(nn.Module):
    """As GPTQ, AWQ and HQQ store a layer: integers, several codes in each, and scales."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(linear.in_features // 8, linear.out_features, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, linear.out_features))

    def forward(self, x):
        return x


class Flat(nn.Linear):
    """As bitsandbytes stores a layer: one row of bytes."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter(torch.zeros(linear.weight.numel() // 2, dtype=torch.uint8), requires_grad=False)


def as_codes(linear, dtype):
    linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
    return linear


def dynamic(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def with_last_layer(change):
    def quantize(model):
        mlp = blocks_of(model)[-1].mlp
        mlp.down_proj = change(mlp.down_proj)
        return model

    return quantize


def by_config(model):
    model.config.quantization_config = {"quant_method": "fp8"}
    return model


class LoraLinear(nn.Module):
    """As PEFT wraps a layer."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer, self.lora_A = linear, nn.ModuleDict({"default": nn.Linear(linear.in_features, 2, bias=False)})


class PeftModelForCausalLM(nn.Module):
    """As PEFT wraps a model: attributes that it lacks are the model's."""

    def __init__(self, model):
        super().__init__()
        self.base_model, self.peft_config = model, {"default": {}}

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)


LIVE = {
    "torch.ao": (dynamic, "found a quantized LlamaForCausalLM"),
    "packed": (with_last_layer(Packed), r"quantized LlamaForCausalLM \(model\.layers\.1\.mlp\.down_proj: Packed\)"),
    "int8": (with_last_layer(lambda linear: as_codes(linear, torch.int8)), r"quantized .*down_proj: Linear"),
    "float8": (with_last_layer(lambda linear: as_codes(linear, torch.float8_e4m3fn)), r"quantized .*down_proj: Linear"),
    "1-d codes": (with_last_layer(Flat), r"quantized LlamaForCausalLM \(model\.layers\.1\.mlp\.down_proj: Flat\)"),
    "config": (by_config, r"quantized LlamaForCausalLM \(its config says so\)"),
    "PeftModel": (PeftModelForCausalLM, r"PEFT adapters in PeftModelForCausalLM: merge them first.*merge_and_unload"),
    "adapters": (with_last_layer(LoraLinear), r"adapters in LlamaForCausalLM \(at model\.layers\.1\.mlp\.down_proj\)"),
    "DataParallel": (nn.DataParallel, r"found DataParallel; it wraps one: pass \.module of it"),
}


@pytest.mark.filterwarnings("ignore:.*quantiz", "ignore:.*deprecated")
@pytest.mark.parametrize("kind", LIVE)
def test_a_live_model_that_cannot_be_cut_is_refused(kind, tmp_path):
    wrap, message = LIVE[kind]
    model = wrap(tiny_model("llama", torch.float32))
    before = state_of(model)
    calls = {
        "modules": lambda: depth2_modules(model),
        "family given": lambda: depth2_modules(model, family=FAMILIES["llama"]),
        "save": lambda: save_pruned(model, tmp_path / "model"),
        "export": lambda: export_plain(model, tmp_path / "model"),
    }
    if kind != "DataParallel":  # it has no config to compare the tokens with
        calls["prune"] = lambda: quiet(model, TOKENS, 0.25)
    for call in calls.values():
        with pytest.raises((UnsupportedModule, TypeError), match=message):
            call()
    assert_untouched(model, before)
    assert not any(tmp_path.iterdir())


# --- other wrapped models

_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def gemma3():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=_TEXT | {"head_dim": 16}, vision_config=vision)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}
    vision = {"embed_dim": 16, "depth": 1, "num_heads": 2, "hidden_size": 48}
    config = transformers.Qwen2VLConfig(text_config=_TEXT | {"rope_parameters": rope}, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def test_a_vision_language_model_names_its_text_tower(tmp_path):
    model = gemma3()
    with pytest.raises(UnsupportedModule, match=r"'gemma3' .* model\.model\.language_model, of type 'gemma3_text'"):
        depth2_modules(model)
    again, _ = load_model(saved(model, tmp_path / "whole"), "cpu")
    assert torch.equal(logits(again), logits(model))
    quiet(model.model.language_model, TOKENS, 0.25, allocation="floor")
    tower = model.model.language_model
    again, _ = load_model(save_pruned(tower, tmp_path / "tower"), "cpu")
    assert depth2_modules(again)[1].n_units == 60
    assert torch.equal(logits(again), logits(tower))
    with pytest.raises(UnsupportedModule, match=r"model\.model\.language_model, of type 'qwen2_vl_text': which has no"):
        quiet(qwen2_vl(), TOKENS, 0.25)


def t5():
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, bos_token_id=0,
        eos_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


@pytest.mark.parametrize("build", [t5, whisper])
def test_encoder_and_decoder_are_refused_with_the_reason(build, tmp_path):
    model = build()
    with pytest.raises(UnsupportedModule, match="encoder and decoder with cross-attention"):
        depth2_modules(model)
    with pytest.raises(UnsupportedModule, match="encoder and decoder with cross-attention"):
        load_model(saved(model, tmp_path / "model"))


# --- the class in config.json


def head_of(name, kind, **sizes):
    torch.manual_seed(0)
    return getattr(transformers, name + kind)(tiny_config(name.lower(), **sizes)).eval()


@LAZY
@pytest.mark.parametrize(
    ("name", "kind"),
    [("Bert", "ForSequenceClassification"), ("Bert", "Model"), ("Llama", "Model"), ("GPT2", "ForTokenClassification")],
)
def test_heads_and_headless_models_come_back_as_they_are(name, kind, lazy, tmp_path):
    model = head_of(name, kind)
    folder = saved(model, tmp_path / "model")
    again, _ = load_model(folder, "cpu", lazy=lazy)
    assert type(again) is type(model)
    if not lazy:
        assert torch.equal(logits(again), logits(model))


@LAZY
@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], None, ["LlamaForSequenceClassification"]])
def test_missing_and_unexpected_weights_are_errors(architectures, lazy, tmp_path):
    whole = tiny_model("llama", torch.float32)
    folder = saved(whole.model, tmp_path / "headless", architectures=architectures)
    lost = "score" if architectures and "Sequence" in architectures[0] else "lm_head"
    with pytest.raises(ValueError, match=rf"lacks weights of Llama.*: {lost}\.weight"):
        load_model(folder, lazy=lazy)
    folder = saved(whole, tmp_path / "with head", architectures=["LlamaModel"])
    with pytest.raises(ValueError, match=r"holds weights that are not of LlamaModel.*: lm_head\.weight"):
        load_model(folder, lazy=lazy)


@LAZY
@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt_neo", "transformer.h.0.attn.attention.bias"),
        ("gpt_neo", "transformer.h.0.attn.attention.masked_bias"),
        ("gptj", "transformer.h.1.attn.masked_bias"),
        ("bert", "bert.embeddings.position_ids"),
    ],
)
def test_tables_of_older_versions_are_not_missed(name, table, lazy, tmp_path):
    model = tiny_model(name, torch.float32)
    folder = saved(model, tmp_path / "model")
    buffers = dict(model.named_buffers())
    weights = load_file(folder / "model.safetensors") | {table: buffers.get(table, torch.ones(1)).clone().contiguous()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    again, _ = load_model(folder, "cpu", lazy=lazy)
    if not lazy:
        assert torch.equal(logits(again), logits(model))


def test_a_class_that_does_not_fit_the_config_gives_way_to_the_usual_one(tmp_path):
    model = tiny_model("llama", torch.float32)
    for name in ("LLaMAForCausalLM", "GPT2LMHeadModel", "LlamaConfig"):
        folder = saved(model, tmp_path / name, architectures=[name])
        assert torch.equal(logits(load_model(folder, "cpu")[0]), logits(model))


# --- code that comes with a model


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    auto_map = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"}
    folder = saved(tiny_model("llama", torch.float32), tmp_path / "own", model_type="own", auto_map=auto_map)
    edit(folder, architectures=["OwnModel"])
    (folder / "code.py").write_text(
        "import os\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "os.environ['GREEDY_RAN'] = '1'\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    yield folder
    os.environ.pop("GREEDY_RAN", None)


@LAZY
def test_code_of_its_own_is_never_asked_about(lazy, own_code):
    with pytest.raises(ValueError, match=r"needs Python code of its own \(code\.OwnConfig, code\.OwnModel\), which is"):
        load_model(own_code, lazy=lazy)
    edit(own_code, model_type="llama")  # a known type, an own class: not the library's class in its place
    with pytest.raises(ValueError, match="pass trust_remote_code=True"):
        load_model(own_code, lazy=lazy)
    assert "GREEDY_RAN" not in os.environ


def test_code_of_its_own_runs_if_it_is_trusted(own_code):
    model, _ = load_model(own_code, "cpu", trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert torch.equal(logits(model), logits(tiny_model("llama", torch.float32)))
    assert os.environ["GREEDY_RAN"] == "1"


def test_a_tokenizer_with_code_of_its_own_is_never_asked_about(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder = saved(tiny_model("llama", torch.float32), tmp_path / "model")
    entries = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["code.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(entries))
    for load in (load_model, load_tokenizer):
        with pytest.raises(
            ValueError, match=r"the tokenizer of .* needs Python code of its own.*trust_remote_code=True"
        ):
            load(folder)


# --- configs


@LAZY
def test_a_llama_whose_heads_do_not_divide(lazy, tmp_path):
    model = tiny_model("mistral", torch.float32, num_attention_heads=5, num_key_value_heads=5, sliding_window=None)
    folder = saved(model, tmp_path / "model", model_type="llama", architectures=["LlamaForCausalLM"])
    again, _ = load_model(folder, "cpu", lazy=lazy)
    if not lazy:
        assert torch.equal(logits(again), logits(model))
        assert torch.equal(logits(load_model(save_pruned(again, tmp_path / "again"), "cpu")[0]), logits(model))


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("gemma2", {"hidden_size": "many"}),
        ("llama", {"hidden_size": "many"}),
        ("llama", {"num_attention_heads": 5, "head_dim": None}),
        ("granite", {"num_attention_heads": 5}),
    ],
)
def test_a_config_that_its_class_refuses_is_one_sentence(name, entries, tmp_path):
    folder = saved(tiny_model(name, torch.float32), tmp_path / "model", **entries)
    with pytest.raises(ValueError, match=rf"{folder}: .*(config\.json|expected)") as refused:
        load_model(folder)
    assert "\n" not in str(refused.value)


# --- the command line


@pytest.mark.parametrize(
    ("build", "entries", "message"),
    [
        (pruned, {}, "greedy_helpers.save_pruned"),
        (lambda: tiny_model("llama", torch.float32), QUANTIZED["gptq"], "is quantized (gptq)"),
        (lambda: tiny_model("llama", torch.float32), {"hidden_size": "many"}, "its config.json is not one of type"),
        (lambda: tiny_model("llama", torch.float32), {"model_type": "own", "auto_map": {"AutoConfig": "a.B"}}, "code"),
        (t5, {}, "encoder and decoder"),
    ],
    ids=["save_pretrained", "quantized", "config", "code", "t5"],
)
def test_the_command_line_says_why_in_one_sentence(build, entries, message, tmp_path, capsys):
    folder = saved(build(), tmp_path / "model", **entries)
    load_tokenizer("llama-mini").save_pretrained(folder)  # the command line looks for it first
    capsys.readouterr()
    assert main(["prune", str(folder), str(tmp_path / "pruned"), "--source", "code", "--seq", "32"]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]
    assert not any("LOAD REPORT" in line or "Traceback" in line for line in said)
    assert not (tmp_path / "pruned").exists()
