"""What is saved comes back whole, or is refused when it is saved: every weight, what is shared, what is beside it."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import quiet
from test_doors import LAZY, TOKENS, logits, pruned, saved
from tiny import VOCABULARY, tiny_config, tiny_model
from torch import nn
from transformers import GenerationConfig

from greedy_helpers import count_parameters, depth2_modules, export_plain, load_model, remove_units, save_pruned
from greedy_helpers.files import disk_bytes
from greedy_helpers.structure import linears_of

# --- what is saved and what will be loaded


def add_bias(model, path):
    linear = linears_of(model)[path]
    linear.bias = nn.Parameter(torch.randn(linear.out_features))


@LAZY
@pytest.mark.parametrize(
    "path",
    ["lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"],
)
def test_biases_anywhere_come_back(path, lazy, tmp_path):
    model = pruned("qwen3")
    add_bias(model, path)
    folder = save_pruned(model, tmp_path / "model")
    again, _ = load_model(folder, "cpu", lazy=lazy)
    if lazy:
        again, _ = load_model(save_pruned(again, tmp_path / "again"), "cpu")
    assert torch.equal(logits(again), logits(model))


def lacks_a_bias(model):
    model.model.layers[0].self_attn.q_proj.bias = None


def has_a_layer_more(model):
    model.adapter = nn.Linear(48, 48)


def has_a_buffer_more(model):
    model.model.register_buffer("shift", torch.ones(3))


def has_another_head(model):
    model.lm_head = nn.Linear(48, 10, bias=False)


def shares_a_layer(model):
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[1].mlp.gate_proj.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lacks_a_bias, r"layers\.0\.self_attn\.q_proj\.bias \(not in the model\) would be lost.* has \[48\] there"),
        (has_a_layer_more, r"adapter\.bias \(\[48\]\) would be lost.*no such weight there \(and 1 more\)"),
        (has_a_buffer_more, r"model\.shift \(\[3\]\) would be lost"),
        (has_another_head, r"lm_head\.weight \(\[10, 48\]\) would be lost.* has \[96, 48\] there"),
        (shares_a_layer, r"gate_proj\.weight, .*up_proj\.weight: not shared as LlamaForCausalLM"),
    ],
)
def test_what_would_not_come_back_is_refused_when_saved(change, message, tmp_path):
    model = tiny_model("llama-gqa", torch.float32)
    change(model)
    with pytest.raises(ValueError, match=f"^save_pruned: .*{message}"):
        save_pruned(model, tmp_path / "model")
    assert not any(tmp_path.iterdir())


def test_a_class_of_ones_own_is_refused_when_saved(tmp_path):
    class Mine(transformers.LlamaForCausalLM):
        pass

    with pytest.raises(ValueError, match="expected a class of transformers, found Mine"):
        save_pruned(Mine(tiny_config("llama")), tmp_path / "model")


@LAZY
@pytest.mark.parametrize("now", [True, False])
def test_embeddings_are_shared_as_they_were(now, lazy, tmp_path):
    """Whatever the config says."""
    model = tiny_model("qwen2", torch.float32, tie_word_embeddings=not now)
    model.lm_head.weight = model.model.embed_tokens.weight if now else nn.Parameter(torch.randn(VOCABULARY, 48))
    folder = save_pruned(model, tmp_path / "model")
    again, _ = load_model(folder, "cpu", lazy=lazy)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == now
    if lazy:
        again, _ = load_model(save_pruned(again, tmp_path / "again"), "cpu")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_tied_weights_are_stored_once_in_another_dtype(name, tmp_path):
    model = tiny_model(name, torch.float32, tie_word_embeddings=True)
    full = disk_bytes(save_pruned(model, tmp_path / "full"))
    folder = save_pruned(model, tmp_path / "half", dtype=torch.float16)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert disk_bytes(folder) == pytest.approx(2 * parameters, rel=0.05)
    assert disk_bytes(folder) == pytest.approx(full / 2, rel=0.05)
    again, _ = load_model(folder, "cpu", torch.float16)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


# --- save_pretrained


def test_save_pretrained_of_a_loaded_pruned_model_loads_again(tmp_path):
    model, _ = load_model(save_pruned(pruned(), tmp_path / "ours"), "cpu")
    model.save_pretrained(tmp_path / "theirs")
    torch.save({}, tmp_path / "theirs" / "optimizer.pt")  # a trainer's checkpoint
    assert torch.equal(logits(load_model(tmp_path / "theirs", "cpu")[0]), logits(model))
    quiet(model, TOKENS, 0.5)  # further than its config says
    add_bias(model, "lm_head")
    model.save_pretrained(tmp_path / "theirs")
    again, _ = load_model(tmp_path / "theirs", "cpu")
    assert torch.equal(logits(again), logits(model))
    (tmp_path / "theirs" / "pruned.json").unlink()
    with pytest.raises(ValueError, match="save_pruned"):
        load_model(tmp_path / "theirs")


@LAZY
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_save_pretrained_of_a_model_pruned_in_memory_names_save_pruned(name, lazy, tmp_path):
    pruned(name).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"expected shape .* found .* saved with greedy_helpers\.save_pruned") as error:
        load_model(tmp_path / "model", lazy=lazy)
    assert "\n" not in str(error.value)


# --- pickle


@pytest.mark.parametrize("name", ["llama", "bloom", "phi3"])
def test_a_loaded_pruned_model_can_be_pickled(name, tmp_path):
    model, _ = load_model(save_pruned(pruned(name), tmp_path / "model"), "cpu")
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(model))
    torch.save(model, tmp_path / "model.pt")
    torch.save((TOKENS, logits(model)), tmp_path / "logits.pt")
    script = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "tokens, logits = torch.load(sys.argv[2])\n"
        "assert torch.equal(model(tokens)[0], logits), 'logits differ'\n"
        "model.save_pretrained(sys.argv[3])\n"
        "import greedy_helpers as gh\n"
        "assert torch.equal(gh.load_model(sys.argv[3], 'cpu')[0](tokens)[0], logits), 'logits differ'\n"
    )
    command = [sys.executable, "-c", script, *(str(tmp_path / n) for n in ("model.pt", "logits.pt", "again"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- generation config


@pytest.mark.parametrize(("heads", "class_name"), [(4, "LlamaForCausalLM"), (3, "MistralForCausalLM")])
def test_the_generation_config_goes_along_with_an_export(heads, class_name, tmp_path):
    model = tiny_model("llama", torch.float32, hidden_size=64)
    settings = {"eos_token_id": [0, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    model.generation_config = GenerationConfig(**settings)
    for module in depth2_modules(model):
        remove_units(module, torch.arange(heads if module.kind == "attention" else 60))
    again = transformers.AutoModelForCausalLM.from_pretrained(export_plain(model, tmp_path / "model"))
    assert type(again).__name__ == class_name
    assert {key: getattr(again.generation_config, key) for key in settings} == settings


def test_an_invalid_generation_config_does_not_hinder(tmp_path):
    model = pruned()
    for module in depth2_modules(model):
        remove_units(module, torch.arange(1))
    model.generation_config.update(do_sample=False, temperature=0.6)
    again, _ = load_model(export_plain(model, tmp_path / "plain"), "cpu")
    assert again.generation_config.temperature == 0.6
    again, _ = load_model(save_pruned(again, tmp_path / "model"), "cpu")
    assert again.generation_config.temperature == 0.6


# --- folders


def test_overwriting_where_nothing_can_be_renamed_onto_a_folder(tmp_path, monkeypatch):
    """As on Windows."""
    replace = os.replace

    def as_on_windows(source, target):
        if os.path.isdir(target):
            raise PermissionError(13, "Access is denied", str(target))
        replace(source, target)

    folder = save_pruned(tiny_model("llama", torch.float32), tmp_path / "model")
    model = pruned()
    monkeypatch.setattr(os, "replace", as_on_windows)
    save_pruned(model, folder, overwrite=True)
    assert os.listdir(tmp_path) == ["model"]
    assert torch.equal(logits(load_model(folder, "cpu")[0]), logits(model))
    (tmp_path / "empty").mkdir()
    save_pruned(model, tmp_path / "empty")
    assert sorted(os.listdir(tmp_path)) == ["empty", "model"]


@pytest.mark.parametrize("error", [PermissionError, OSError])
def test_a_folder_that_cannot_be_renamed_stays(error, tmp_path, monkeypatch):
    folder = save_pruned(tiny_model("llama", torch.float32), tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def refuse(source, target):
        raise error(16, "Device or resource busy")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(error, match="Device or resource busy"):
        save_pruned(pruned(), folder, overwrite=True)
    assert os.listdir(tmp_path) == ["model"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_lazy_model_saved_onto_its_own_source_goes_on(name, tmp_path):
    folder = saved(tiny_model(name, torch.float32), tmp_path / "model")
    model, _ = load_model(folder, "cpu", lazy=True)
    other, _ = load_model(folder, "cpu", lazy=True)
    quiet(model, TOKENS, 0.25, work_dir=tmp_path / "work")
    save_pruned(model, folder, overwrite=True)
    expected = logits(load_model(folder, "cpu")[0])
    assert torch.equal(logits(load_model(save_pruned(model, tmp_path / "twice"), "cpu")[0]), expected)
    with pytest.raises((FileNotFoundError, ValueError), match="was replaced after the model was loaded; load it again"):
        save_pruned(other, tmp_path / "other")
    again, _ = load_model(folder, "cpu", lazy=True)
    save_pruned(again, folder, overwrite=True)
    quiet(again, TOKENS, 0.5, work_dir=tmp_path / "more")
    assert count_parameters(again)["blocks"] < count_parameters(model)["blocks"]
