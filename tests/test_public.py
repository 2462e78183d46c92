"""A public model from a package on PyPI: found, checked, converted once, and from then on a folder like any other."""

import importlib.metadata
import importlib.util
import json
import threading
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch
from conftest import assert_same_model, needs_public_model, quiet
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import tiny_model
from tokenizers.pre_tokenizers import ByteLevel

import greedy_helpers as gh
from greedy_helpers import public
from greedy_helpers.__main__ import main
from greedy_helpers.checkpoint import load_tokenizer
from greedy_helpers.data import prefix_ids, separator_id
from greedy_helpers.files import sha256_of

NAME, FILE = "tiny-public", "tiny.Q4_1.gguf"
needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed: make real")


def write_gguf(path, model) -> dict[str, torch.Tensor]:
    """A Llama as llama.cpp stores it: matrices in Q4_1, rows of queries and keys as its rotary embedding pairs them.

    Returns what the numbers in the file mean, by the names and in the order of transformers.
    """
    import gguf

    # 256 bytes as characters, special tokens before them and merges behind
    vocabulary = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ĠĠ", "in"]
    config, q4, meant = model.config, gguf.GGMLQuantizationType.Q4_1, {}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    writer.add_token_merges(["Ġ Ġ", "i n"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in model.named_parameters():  # the head is the embedding
        stored, kind = value.detach().numpy(), None
        if stored.ndim == 2:
            stored, kind = gguf.quants.quantize(stored, q4), q4
            meant[name] = torch.from_numpy(gguf.quants.dequantize(stored, q4))
            if n := heads.get(name.split(".")[-2]):
                stored = stored.reshape(n, 2, -1, stored.shape[-1]).swapaxes(1, 2).reshape(stored.shape)
        else:
            meant[name] = value.detach()
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(stored), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def llama(kv_heads=4):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "vocab_size": 261}
    return tiny_model("llama", torch.float32, **sizes, num_key_value_heads=kv_heads, tie_word_embeddings=True)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package whose code cannot be imported, with a file in it; our cache is empty; no Hub."""
    site = tmp_path / "site-packages"
    (site / "tiny_public").mkdir(parents=True)
    (site / "tiny_public" / "__init__.py").write_text("raise ImportError('needs a compiler')")
    file = site / "tiny_public" / FILE
    file.write_bytes(b"not a model")
    info = site / "tiny_public-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-public\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"tiny_public/__init__.py,,\ntiny_public/{FILE},,\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("GREEDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(public, "hub_is_reachable", lambda: False)
    expect(file, monkeypatch)
    return file


def expect(file, monkeypatch):
    """The file's checksum is the pinned one."""
    shipped = public.Shipped("org/tiny", "mit", "tiny-public==1.0", FILE, sha256_of(file), "4-bit integers")
    monkeypatch.setitem(public.PUBLIC, NAME, shipped)


@pytest.fixture
def copies(monkeypatch):
    """In place of the conversion: saves a tiny Llama. The list of what it wrote."""
    written = []

    def convert(name, file, folder):
        model = llama()
        model.config.dequantized_from = asdict(public.PUBLIC[name])
        model.save_pretrained(folder)
        written.append(folder)

    monkeypatch.setattr(public, "_convert", convert)
    return written


@needs_gguf
def test_a_gguf_becomes_a_plain_folder_that_is_used_from_then_on(package, tmp_path, monkeypatch):
    meant = write_gguf(package, llama(kv_heads=2))
    expect(package, monkeypatch)
    model, tokenizer = gh.load_model(NAME, "cpu")
    folder = tmp_path / "cache" / NAME
    assert {path.name for path in folder.parent.iterdir()} == {NAME, f".{NAME}.lock"}
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == meant.keys()
    assert all(torch.equal(stored[name], value) for name, value in meant.items()), "to the last bit"
    assert {value.dtype for value in stored.values()} == {torch.float32}
    values = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in values
    assert values["dequantized_from"] == asdict(public.PUBLIC[NAME])
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "org/tiny"
    assert "4-bit integers and are dequantised" in card.text
    assert public.PUBLIC[NAME].sha256 in card.text
    # digits one by one, the spaces in front of them together
    assert tokenizer("in  12").tokens() == ["in", "ĠĠ", "1", "2"]

    monkeypatch.setattr(public, "_convert", None)
    monkeypatch.setattr(public, "_installed", lambda wanted: None)  # uninstalled, even
    again, _ = gh.load_model(NAME, "cpu")
    assert_same_model(again, model)
    assert load_tokenizer(NAME)("in 12")["input_ids"] == tokenizer("in 12")["input_ids"]
    lazy, _ = gh.load_model(NAME, "cpu", lazy=True)
    assert all(parameter.is_meta for parameter in gh.blocks_of(lazy)[0].parameters())


def test_what_is_pruned_from_it_says_where_its_weights_are_from(package, copies, tmp_path):
    model, _ = gh.load_model(NAME, "cpu")
    report = quiet(model, torch.randint(0, 261, (8, 16)), 0.25)
    gh.save_pruned(model, tmp_path / "pruned", report=report, details={"base model": NAME})
    card = ModelCard.load(tmp_path / "pruned" / "README.md")
    assert (card.data.base_model, card.data.license) == ("org/tiny", "mit")
    assert f"| 4-bit integers, dequantised: {FILE} of tiny-public==1.0 |" in card.text
    again, _ = gh.load_model(tmp_path / "pruned", "cpu")
    assert_same_model(again, model)
    gh.export_plain(again, tmp_path / "plain")
    for folder, kind in {"pruned": "llama", "plain": "mistral"}.items():  # 64 is no multiple of 3 heads
        values = json.loads((tmp_path / folder / "config.json").read_text())
        assert values["model_type"] == kind
        assert values["dequantized_from"]["sha256"] == public.PUBLIC[NAME].sha256


def test_another_file_is_refused(package, copies):
    package.write_bytes(b"another model")
    with pytest.raises(ValueError, match=r"expected tiny.Q4_1.gguf with SHA-256 .* found .* 1\.0.*install tiny-public"):
        gh.load_model(NAME)
    package.unlink()
    with pytest.raises(ValueError, match="found no such file"):
        gh.load_model(NAME)
    assert copies == []


def test_nowhere_to_be_found(package, monkeypatch, capsys):
    def not_there(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", not_there)
    with pytest.raises(FileNotFoundError, match=r"`make real` installs it.*--no-deps tiny-public==1.0`"):
        gh.load_model(NAME)
    assert main(["generate", NAME, "--prompt", "a"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    monkeypatch.setattr(public, "hub_is_reachable", lambda: True)
    assert public.place_of(NAME) == "org/tiny"


def test_the_reader_of_the_file_is_missing(package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install gguf"):
        gh.load_model(NAME)


def test_a_conversion_that_failed_or_was_killed_leaves_nothing_in_the_way(package, copies, tmp_path, monkeypatch):
    good = public._convert

    def fails(name, file, folder):
        good(name, file, folder)
        raise OSError("No space left on device")

    monkeypatch.setattr(public, "_convert", fails)
    with pytest.raises(OSError, match=r"could not be converted into .*No space left.*GREEDY_CACHE"):
        gh.load_model(NAME)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f".{NAME}.lock"]
    (tmp_path / "cache" / f".{NAME}.killed.partial").mkdir()
    monkeypatch.setattr(public, "_convert", good)
    gh.load_model(NAME)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {NAME, f".{NAME}.lock"}


def test_several_at_once_convert_it_once(package, copies):
    good, begin, found = public._convert, threading.Barrier(4), []

    def ask():
        begin.wait()
        found.append(public.place_of(NAME))

    asking = [threading.Thread(target=ask) for _ in range(4)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == len(copies) == 1
    assert good is public._convert


def test_a_folder_from_another_file_is_converted_anew(package, copies, monkeypatch):
    gh.load_model(NAME)
    package.write_bytes(b"a newer model")
    expect(package, monkeypatch)
    model, _ = gh.load_model(NAME)
    assert len(copies) == 2
    assert model.config.dequantized_from["sha256"] == sha256_of(package)


def test_the_cache_can_be_moved(monkeypatch, tmp_path, package, copies):
    assert public.cache_folder() == tmp_path / "cache"
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError, match="GREEDY_CACHE moves it"):
        gh.load_model(NAME)
    monkeypatch.delenv("GREEDY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert public.cache_folder() == tmp_path / "xdg" / "greedy-helpers"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert public.cache_folder() == tmp_path / "home" / ".cache" / "greedy-helpers"


def test_offline_nobody_is_asked_and_the_text_is_the_one_that_needs_no_network(monkeypatch):
    asked = []
    monkeypatch.setattr(public, "get_session", lambda: asked.append("the Hub"))
    monkeypatch.setattr(public.constants, "HF_HUB_OFFLINE", True)
    assert not public.hub_is_reachable.__wrapped__()
    assert asked == []
    for reachable, sources in {False: {"prose": "prose"}, True: {"WikiText-2": gh.WIKITEXT2}}.items():
        monkeypatch.setattr("greedy_helpers.data.hub_is_reachable", lambda answer=reachable: answer)
        assert gh.default_sources("smollm2-135m") == sources
        assert gh.default_sources("org/model") == {"WikiText-2": gh.WIKITEXT2}


def test_without_an_answer_the_hub_is_not_reachable(monkeypatch):
    class Session:
        def head(self, url, timeout):
            raise ConnectionError("Name or service not known")

    monkeypatch.setattr(public, "get_session", Session)
    monkeypatch.setattr(public.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(public.datasets.config, "HF_HUB_OFFLINE", False)
    assert not public.hub_is_reachable.__wrapped__()
    monkeypatch.setattr(Session, "head", lambda self, url, timeout: "404")
    assert public.hub_is_reachable.__wrapped__()


@needs_public_model
def test_the_real_one(tmp_path):
    model, tokenizer = gh.load_model("smollm2-135m", "cpu")
    assert gh.count_parameters(model)["total"] == 134_515_008
    assert tokenizer.convert_ids_to_tokens(separator_id(tokenizer)) == "<|endoftext|>"
    assert prefix_ids(tokenizer) == []
    assert tokenizer("in\n  1984").tokens() == ["in", "ĊĠĠ", "1", "9", "8", "4"]
    assert "Paris" in gh.generate_text(model, tokenizer, "The capital of France is", 8)
    quiet(model, gh.calibration_tokens(tokenizer, 2, 32, "prose"), 0.5, blocks=range(2))
    gh.save_pruned(model, tmp_path / "pruned", tokenizer)
    again, _ = gh.load_model(tmp_path / "pruned", "cpu")
    assert_same_model(again, model)
    assert "4-bit" in (tmp_path / "pruned" / "README.md").read_text()
