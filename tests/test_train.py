"""The script that trained the embedded models: schedule, order of data, a run killed and resumed, what it shipped."""

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from greedy_helpers import evaluation_tokens, load_model, perplexity

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "train.py"


@pytest.fixture
def train(monkeypatch):
    """The script as a module, with a tiny model and a tiny text in place of the real ones."""
    spec = importlib.util.spec_from_file_location("train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = "\n".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(400))
    monkeypatch.setattr(module, "training_texts", lambda: ([text], [text[::-1]]))
    monkeypatch.setattr(module, "evaluation_tokens", lambda tokenizer, **_: torch.arange(64).view(2, 32))
    monkeypatch.setattr(module, "VOCABULARY", 300)
    monkeypatch.setattr(module, "WINDOW", 32)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    monkeypatch.setitem(module.CONFIGS, "llama-mini", config)
    return module


def arguments(folder: Path) -> list[str]:
    return (
        f"llama-mini --tokens {12 * 4 * 32} --batch 4 --save-every 3 --warmup 2 --device cpu --dtype float32 "
        f"--work-dir {folder}/work --out {folder}/model"
    ).split()


def test_a_killed_run_ends_where_an_uninterrupted_one_does(train, tmp_path, monkeypatch):
    train.main(arguments(tmp_path / "straight"))
    schedule, killed_at = train.lr_factor, 7

    def killed(step, *rest):
        if step == killed_at:
            raise KeyboardInterrupt
        return schedule(step, *rest)

    monkeypatch.setattr(train, "lr_factor", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main(arguments(tmp_path / "killed"))
    assert torch.load(tmp_path / "killed/work/llama-mini.pt")["step"] == 6
    monkeypatch.setattr(train, "lr_factor", schedule)
    train.main(arguments(tmp_path / "killed"))

    models = [load_model(tmp_path / run / "model", device="cpu")[0] for run in ("straight", "killed")]
    for (name, a), (_, b) in zip(*(model.named_parameters() for model in models), strict=True):
        assert torch.equal(a, b), name
    record = json.loads((tmp_path / "straight/model/training.json").read_text())
    assert record["steps"] == 12
    assert record["training_tokens"] == 12 * 4 * 32
    assert [entry["step"] for entry in record["history"]] == [3, 6, 9, 12]
    assert "1,536 tokens" in (tmp_path / "straight/model/README.md").read_text()


def test_every_window_once_per_pass(train):
    windows = torch.arange(50)
    order = train.batches_of_epoch(windows, 3, 8, seed=1)
    assert order.shape == (6, 8)
    assert len(set(order.flatten().tolist())) == 48
    assert torch.equal(order, train.batches_of_epoch(windows, 3, 8, seed=1))
    assert not torch.equal(order, train.batches_of_epoch(windows, 4, 8, seed=1))


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_schedule(train, decay):
    factors = [train.lr_factor(step, 100, 10, decay) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(1.0)
    assert all(a >= b for a, b in itertools.pairwise(factors[9:]))
    assert factors[55] == pytest.approx(0.5, abs=0.01)
    assert factors[-1] == pytest.approx(0.02)


def test_tokenizer_reads_any_text_back(train):
    tokenizer = train.make_tokenizer(["def f():\n    return 1\n"] * 20)
    for text in ("    indented\n\ttabs", "naïve café ☃ 漢字", "x != y\r\n"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize(("name", "code", "prose"), [("llama-mini", 18, 45), ("gpt2-mini", 22, 55)])
def test_shipped_models_keep_their_promises(name, code, prose):
    """The bars hold for the recorded numbers (all held-out text) and for a sample measured now."""
    folder = SCRIPT.parent / name
    record = json.loads((folder / "training.json").read_text())
    model, tokenizer = load_model(name, device="cpu")
    for domain, bar in {"code": code, "prose": prose}.items():
        assert record["perplexity"][domain] <= bar
        measured = perplexity(model, evaluation_tokens(tokenizer, 48, 256, domain))
        assert measured == pytest.approx(record["perplexity"][domain], rel=0.15)  # other windows, another Python
    assert all(path.stat().st_size <= 16e6 for path in folder.iterdir())
    assert model.config.num_attention_heads >= 8
    assert model.config.num_hidden_layers >= 6
