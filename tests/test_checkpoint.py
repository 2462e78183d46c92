"""What is saved comes back with the same logits, in this process and in a fresh one; what fails leaves no trace."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, quiet
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import VOCABULARY, tiny_model, unit_sets

from greedy_helpers import (
    count_parameters,
    depth2_modules,
    files,
    load_model,
    load_pruned,
    remove_units,
    save_pruned,
)
from greedy_helpers.files import disk_bytes


@pytest.fixture(scope="module")
def tokenizer():
    return load_model("llama-mini")[1]


def pruned_model(name, dtype=torch.float32, unit="query"):
    """Another size in every module: nothing about a checkpoint may assume uniform ratios."""
    model = tiny_model(name, dtype)
    for i, module in enumerate(depth2_modules(model, unit=unit)):
        sets = unit_sets(module)
        most = sets.shape[1]
        remove_units(module, sets[:, : most - 1 - i if most > 4 else 1 + i // 2].flatten())
    return model


@pytest.mark.parametrize("unit", ["query", "kv"])
@pytest.mark.parametrize("name", [*TINY, "mistral"])
def test_same_logits_after_reload(name, unit, tmp_path, tokenizer, tokens):
    model = pruned_model(name, unit=unit)
    folder = save_pruned(model, tmp_path / "pruned", tokenizer)
    again, _ = load_model(folder, device="cpu")
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    for unit in ("query", "kv"):
        left, saved = ([m.n_units for m in depth2_modules(one, unit=unit)] for one in (again, model))
        assert left == saved
    again.set_attn_implementation("eager")  # the class must still be one that transformers can switch
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_reload_in_a_fresh_process(tmp_path, tokenizer, tokens):
    model = pruned_model("gpt2")
    save_pruned(model, tmp_path / "pruned", tokenizer)
    script = (
        "import sys, torch; from greedy_helpers import load_model\n"
        "model, _ = load_model(sys.argv[1], device='cpu')\n"
        "tokens, logits = torch.load(sys.argv[2])\n"
        "assert torch.equal(model(tokens).logits, logits), 'logits differ'\n"
    )
    torch.save((tokens, model(tokens).logits.detach()), tmp_path / "logits.pt")
    command = [sys.executable, "-c", script, str(tmp_path / "pruned"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("units", [("query", "kv"), ("kv", "query")])
def test_prune_again_after_reload_and_save_again(units, tmp_path, tokenizer, tokens):
    """Query heads, then KV heads, and the other way round."""
    save_pruned(pruned_model("mistral", unit=units[0]), tmp_path / "once", tokenizer)
    model, _ = load_model(tmp_path / "once", device="cpu")
    quiet(model, torch.randint(0, VOCABULARY, (8, 24)), 0.5, remedy="both", unit=units[1])
    save_pruned(model, tmp_path / "twice", tokenizer)
    again, _ = load_model(tmp_path / "twice", device="cpu")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert count_parameters(again) == count_parameters(model)


def test_a_dense_model_stays_a_plain_transformers_folder(tmp_path, tokenizer):
    save_pruned(tiny_model("llama", torch.float32), tmp_path / "dense", tokenizer)
    assert "pruned_units" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert load_model(tmp_path / "dense", device="cpu")[0].num_parameters() == tiny_model("llama").num_parameters()


def test_float16_on_disk_is_half_the_bytes(tmp_path, tokenizer):
    model = pruned_model("llama")
    save_pruned(model, tmp_path / "full", tokenizer)
    save_pruned(model, tmp_path / "half", tokenizer, dtype=torch.float16)
    assert disk_bytes(tmp_path / "half") == pytest.approx(disk_bytes(tmp_path / "full") / 2, rel=0.05)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    again, _ = load_model(tmp_path / "half", device="cpu", dtype=torch.float16)
    assert again.dtype == torch.float16
    assert next(model.parameters()).dtype == torch.float32  # the model itself keeps its dtype


def test_an_existing_folder_is_not_overwritten_unless_asked(tmp_path, tokenizer):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_pruned(tiny_model("llama", torch.float32), folder, tokenizer)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]
    save_pruned(tiny_model("llama", torch.float32), folder, tokenizer, overwrite=True)
    assert "thesis.txt" not in os.listdir(folder)
    assert os.listdir(tmp_path) == ["mine"]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, tokenizer, monkeypatch):
    folder = save_pruned(tiny_model("llama", torch.float32), tmp_path / "model", tokenizer)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def disk_full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_pruned(pruned_model("llama"), folder, tokenizer, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["model"]


def test_a_place_that_cannot_be_written(tmp_path, tokenizer):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="cannot write to"):
        save_pruned(tiny_model("llama", torch.float32), tmp_path / "file" / "model", tokenizer)
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_in_the_place_of_the_folder(tmp_path, tokenizer):
    (tmp_path / "thesis").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"expected a folder, or nothing, at .*thesis, found a file"):
            save_pruned(tiny_model("llama", torch.float32), tmp_path / "thesis", tokenizer, overwrite=overwrite)
    assert (tmp_path / "thesis").read_text() == "years of work"
    assert os.listdir(tmp_path) == ["thesis"]


def test_a_rename_that_fails_puts_the_old_checkpoint_back(tmp_path, tokenizer, monkeypatch):
    folder = save_pruned(tiny_model("llama", torch.float32), tmp_path / "model", tokenizer)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    replace, calls = os.replace, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError("Input/output error")
        replace(source, target)

    monkeypatch.setattr(files, "os", SimpleNamespace(replace=second_fails, chmod=os.chmod))
    with pytest.raises(OSError, match="Input/output error"):
        save_pruned(pruned_model("llama"), folder, tokenizer, overwrite=True)
    assert len(calls) == 3
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["model"]


def test_renames_that_keep_failing_lose_nothing(tmp_path, tokenizer, monkeypatch):
    folder = save_pruned(tiny_model("llama", torch.float32), tmp_path / "model", tokenizer)
    before, replace, calls = {path.name: path.read_bytes() for path in folder.iterdir()}, os.replace, []

    def only_the_first(source, target):
        calls.append(source)
        if len(calls) > 1:
            raise OSError("Input/output error")
        replace(source, target)

    monkeypatch.setattr(files, "os", SimpleNamespace(replace=only_the_first, chmod=os.chmod))
    with pytest.raises(OSError, match="Input/output error"):
        save_pruned(pruned_model("llama"), folder, tokenizer, overwrite=True)
    (kept,) = tmp_path.iterdir()
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_half_a_checkpoint_is_refused(lost, tmp_path, tokenizer):
    folder = save_pruned(pruned_model("llama"), tmp_path / "model", tokenizer)
    (folder / lost).unlink()
    with pytest.raises(FileNotFoundError, match=r"not a complete model folder: expected config\.json and"):
        load_model(folder)


def test_a_cut_off_weight_file_is_refused(tmp_path, tokenizer):
    folder = save_pruned(pruned_model("llama"), tmp_path / "model", tokenizer)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file that was saved: expected SHA-256"):
        load_model(folder)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # one bit, the same length
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file that was saved"):
        load_pruned(folder)
    load_pruned(folder, verify=False)


def test_a_cut_off_weight_file_of_a_dense_model_is_refused(tmp_path, tokenizer):
    ours = save_pruned(tiny_model("llama", torch.float32), tmp_path / "ours", tokenizer)
    plain = tmp_path / "plain"
    tiny_model("llama", torch.float32).save_pretrained(plain)
    for folder, error, message in (
        (ours, ValueError, "is not the file that was saved"),
        (plain, FileNotFoundError, "is not a complete model folder"),
    ):
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
        with pytest.raises(error, match=message):
            load_model(folder)


@pytest.mark.parametrize("name", ["adapter.safetensors", "pytorch_model.bin"])
def test_weight_files_that_do_not_belong_are_refused(name, tmp_path, tokenizer):
    folder = save_pruned(pruned_model("llama"), tmp_path / "model", tokenizer)
    (folder / name).write_bytes(b"from elsewhere")
    with pytest.raises(ValueError, match=f"not saved with it: {name}"):
        load_model(folder)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, r"has no pruned\.json"),
        ("half a manif", "is not JSON"),
        ("[]", "expected a manifest of .*'version': 1.*found .*None"),
        ('{"format": "greedy_helpers pruned model", "version": 2}', "found .*'version': 2"),
        ('{"format": "greedy_helpers pruned model", "version": 1}', "expected a manifest of .* with checksums"),
    ],
)
def test_foreign_manifests_are_refused(manifest, message, tmp_path, tokenizer):
    folder = save_pruned(pruned_model("llama"), tmp_path / "model", tokenizer)
    (folder / "pruned.json").unlink()
    if manifest is not None:
        (folder / "pruned.json").write_text(manifest)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_loading_reads_no_pickle(tmp_path, tokenizer, monkeypatch):
    folder = save_pruned(pruned_model("gpt2"), tmp_path / "model", tokenizer)

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    load_pruned(folder)


def test_without_a_tokenizer(tmp_path):
    save_pruned(pruned_model("llama"), tmp_path / "model")
    assert load_model(tmp_path / "model")[1] is None


def test_the_manifest_and_the_card_say_how_it_was_pruned(tmp_path, tokenizer, tokens):
    model = tiny_model("llama", torch.float32)
    report = quiet(model, tokens, 0.25, remedy="both")
    folder = save_pruned(model, tmp_path / "model", tokenizer, report=report, details={"perplexity before": 14.25})
    manifest = json.loads((folder / "pruned.json").read_text())
    assert manifest["units"]["model.layers.1.mlp"] == {"dense": 80, "left": 60}
    assert manifest["report"]["ratio"] == 0.25
    assert [step["units_after"] for step in manifest["report"]["steps"]] == [3, 60, 3, 60]
    card = (folder / "README.md").read_text()
    for fact in (
        "| asked for | 25% of the parameters of 4 modules in blocks 0 to 1 |",
        "| criterion | second moment |",
        "| calibration | 144 tokens |",
        "| perplexity before | 14.25 |",
        "| remedy | both (damping 0.01) |",
    ):
        assert fact in card


def test_the_card_counts_what_was_removed(tmp_path):
    """One of 4 heads and 20 of 80 channels, and what share of the parameters that is, norms included."""
    model = tiny_model("llama", torch.float32)
    before = count_parameters(model)
    for module in depth2_modules(model):
        remove_units(module, torch.arange(module.n_units * 3 // 4))
    once, after = save_pruned(model, tmp_path / "once"), count_parameters(model)
    remove_units(depth2_modules(model)[0], torch.arange(1))
    expected = {"attention heads": (6, 4), "FFN channels": (120, 120)}
    for kind, (first, second) in expected.items():
        whole = first * 4 // 3
        assert f"{kind} | {first} of {whole} left |" in (once / "README.md").read_text()
        twice = save_pruned(model, tmp_path / "twice", overwrite=True)
        assert f"{kind} | {second} of {whole} left |" in (twice / "README.md").read_text()
    for name, key in {"the blocks": "blocks", "the model": "total"}.items():
        share = 1 - after[key] / before[key]
        row = f"| parameters of {name} | {after[key]:,} of {before[key]:,} left ({share:.2%} removed) |"
        assert row in (once / "README.md").read_text()


@pytest.mark.parametrize(
    ("base", "expected"),
    [("org/model", "org/model"), ("llama-mini", None), ("/a/folder", None), ("my/folder", None), (None, None)],
)
def test_the_card_links_a_base_model_of_the_hub(base, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "folder").mkdir(parents=True)
    folder = save_pruned(tiny_model("llama", torch.float32), tmp_path / "model", details={"base model": base})
    data = ModelCard.load(folder / "README.md").data
    assert data.base_model == expected
    assert data.library_name == "greedy-helpers"
    assert "structured-pruning" in data.tags


def test_tied_weights_stay_tied(tmp_path, tokenizer, tokens):
    model = pruned_model("gpt2")
    again, _ = load_model(save_pruned(model, tmp_path / "model", tokenizer), device="cpu")
    assert again.lm_head.weight is again.transformer.wte.weight
    assert model.lm_head.weight is model.transformer.wte.weight


def test_sizes_that_do_not_fit(tmp_path, tokenizer):
    folder, attention = save_pruned(pruned_model("mistral"), tmp_path / "model", tokenizer), "model.layers.0.self_attn"
    config = json.loads((folder / "config.json").read_text())
    for units, message in (
        ({"model.layers.7.mlp": 3}, r"names the module 'model\.layers\.7\.mlp', which the model lacks"),
        ({"model.layers.1.mlp": 81}, r"layers\.1\.mlp: expected 1 to 80 channels, found 81"),
        ({"model.layers.1.mlp": 0}, r"layers\.1\.mlp: expected 1 to 80 channels, found 0"),
        ({attention: 3}, r"layers\.0\.self_attn: expected 1 to 2 KV heads, found 3"),
        ({attention: {"kv": 2, "query": 5}}, r"expected 2 to 6 query heads, a multiple of 2, found 5"),
        ({attention: {"kv": 1, "query": 4}}, r"expected 1 to 3 query heads, found 4"),
        ({attention: {"query": 4}}, r"expected 1 to 2 KV heads, found None"),
        ({attention: {"kv": 2, "heads": 4}}, r"expected the numbers of KV and query heads, found .*'heads'"),
        ({attention: "2"}, r"expected 1 to 2 KV heads, found '2'"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {"pruned_units": units}))
        with pytest.raises(ValueError, match=message):
            load_pruned(folder, verify=False)
    with pytest.raises(ValueError, match=r"config\.json is not the file that was saved"):
        load_pruned(folder)


@pytest.mark.parametrize("name", ["openai-community/gpt2", "no-such-model", "./no/such/folder", "/no/such/folder"])
def test_names_that_lead_nowhere_offline(name):
    with pytest.raises(FileNotFoundError, match="load_model"):
        load_model(name)
