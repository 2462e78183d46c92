"""benchmarks/lora.py on a tiny model: what the adapters do, what they leave alone, and what is recorded."""

import copy
import json
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_model, calibration, quiet
from tiny import tiny_model

from greedy_helpers import OSSCAR, depth2_modules, load_model, perplexity, prune

RATIO = 0.25


@pytest.fixture
def script(monkeypatch):
    """The benchmark; its clock counts how often it is asked, so that a step takes one second and so does a repair."""
    pytest.importorskip("peft", reason="needs greedy-helpers[train]")
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import lora

    monkeypatch.setattr(lora, "time", SimpleNamespace(process_time=count().__next__))
    return lora


def sizes(model):
    return [module.n_units for module in depth2_modules(model)]


def weights(model):
    return {name: weight.shape for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("family", ["llama", "mistral"])  # mistral's query heads share KV heads
def test_adapters_learn_and_merge_into_the_pruned_model(script, family):
    dense, tokens = tiny_model(family), calibration(4)
    bare, kept = script.cut(dense, tokens, RATIO, script.CUTS["exact greedy"])
    before = copy.deepcopy(bare)
    adapted, spent = script.train(bare, tokens, 1e-2, 12)
    assert spent["steps"] == spent["tokens seen"] / tokens.numel() == 11
    with torch.no_grad():
        logits = adapted(input_ids=tokens).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=tokens).logits, logits)
    assert perplexity(merged, tokens) < 0.95 * perplexity(before, tokens)
    assert sizes(merged) == sizes(before) == [len(units) for units in kept.values()] != sizes(dense)
    assert weights(merged) == weights(before)


def test_a_cut_changes_no_other_weight_and_oscars_repaired_is_oscar(script):
    dense, tokens = tiny_model("mistral"), calibration()
    bare, kept = script.cut(dense, tokens, RATIO, OSSCAR)
    for old, new in zip(depth2_modules(dense), depth2_modules(bare), strict=True):
        columns = old.level2.stays(kept[old.name])
        assert torch.equal(new.level2.linear.weight, old.level2.linear.weight[:, columns])
    repaired, _ = script.repair(dense, tokens, kept)
    whole = copy.deepcopy(dense)
    prune(whole, tokens, RATIO, OSSCAR, progress=False)
    assert_same_model(repaired, whole)
    unrepaired = copy.deepcopy(dense)
    quiet(unrepaired, tokens, RATIO, criterion="output energy")
    assert_same_model(unrepaired, script.cut(dense, tokens, RATIO, script.CUTS["output energy"])[0])


@pytest.mark.parametrize("best", [1e-5, 3e-4, 1e-3, 1e-2, 3e-2])
def test_the_rate_is_sought_until_it_has_worse_neighbours(script, best):
    asked = []

    def loss(rate):
        asked.append(rate)
        return abs(script.RATES.index(rate) - script.RATES.index(best))

    assert script.best_rate(loss) == best
    place = script.RATES.index(best)
    assert {*script.RATES[max(0, place - 1) : place + 2]} <= {*asked}


def test_rows_hold_what_was_spent(script, monkeypatch, tmp_path):
    _, tokenizer = load_model("llama-mini")
    dense = tiny_model("llama", torch.float32, vocab_size=len(tokenizer), max_position_embeddings=256)
    monkeypatch.setattr(script.gh, "load_model", lambda *_: (dense, tokenizer))
    monkeypatch.setattr(
        script, "RECOVERIES", script.RECOVERIES | {"LoRA x10": (False, 2), "repair + LoRA x10": (True, 4)}
    )
    text, out = tmp_path / "text.txt", tmp_path / "lora.json"
    text.write_text("\n\n".join(f"Paragraph {i} has a few words, and the number {i * i}." * 4 for i in range(60)))

    def run(*arguments):
        common = ["--calibration", f"{text}[:50]", "--text", f"own={text}[50:]", "--judged", "1", "--windows", "8"]
        monkeypatch.setattr(sys, "argv", ["lora.py", *common, "--out", str(out), *arguments])
        script.main()
        return json.loads(out.read_text())

    first = run("--cut", "exact greedy", "--recovery", "none", "LoRA x1")
    about = first["models"]["llama-mini"]
    assert {*about["held-out losses by learning rate"]} == {"LoRA x1"}
    found = run("--cut", "exact greedy")
    rows = {row["recovery"]: row for row in found["rows"]}
    assert found["rows"][:2] == first["rows"]
    assert {*rows} == {*script.RECOVERIES}
    assert [rows[name].get("steps") for name in script.RECOVERIES] == [None, None, 1, 1, 3]
    assert [rows[name].get("tokens seen") for name in script.RECOVERIES] == [None, None, 1024, 1024, 3 * 1024]
    for name, row in rows.items():
        assert row["units left"] == rows["none"]["units left"]
        assert row["parameters"] == rows["none"]["parameters"] < sum(p.numel() for p in dense.parameters())
        assert row["repair seconds"] == 1
        assert row["calibration tokens, sha256"] == about["settings"]["calibration tokens of seed 0, sha256"]
        assert row["own"] > 1
        if script.RECOVERIES[name][1]:
            losses = found["models"]["llama-mini"]["held-out losses by learning rate"][name]
            assert len(losses) >= 3
            assert losses[f"{row['learning rate']:g}"] == min(losses.values())
    assert run("--cut", "exact greedy")["rows"] == found["rows"]
    with pytest.raises(SystemExit):
        run("--ratio", "0.5")
