"""benchmarks/public_model.py on a small model and made-up files: what it records, and that it goes on."""

import json
import sys
from pathlib import Path

import pytest
from test_task_files import PUBLISHED, publish

from greedy_helpers import OSSCAR, calibration_tokens, evaluate_text, load_model, prune, save_pruned
from greedy_helpers.evaluate import read_text


@pytest.fixture
def script(monkeypatch):
    pytest.importorskip("lm_eval", reason="needs greedy-helpers[eval]: make test EXTRAS=dev,lab,eval")
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import public_model

    return public_model


def test_rows_are_added_and_replaced(script, monkeypatch, tmp_path):
    publish(tmp_path, PUBLISHED["piqa"])
    raw = tmp_path / "wiki.test.raw"
    raw.write_text("".join(f" = Part {i} = \n \n It has a few words , and a number . \n" for i in range(40)))
    monkeypatch.setattr(script, "TEXTS", {"text 32": (raw.name, "", 32)})
    out = tmp_path / "found.json"

    def run(*arguments):
        common = ["--model", "llama-mini", "--data", str(tmp_path), "--weights", str(raw), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["public_model.py", *common, *arguments])
        script.main()
        return json.loads(out.read_text())

    first = run("--part", "text 32", "piqa", "--limit", "1")
    text, piqa = first["rows"]
    model, tokenizer = load_model("llama-mini")
    assert text["perplexity"] == evaluate_text(model, read_text(tokenizer, str(raw)), 32).perplexity
    assert text["sha256"] == first["weights"] == {raw.name: script.sha256_of(raw)}
    assert (piqa["items"], piqa["items in the file"], set(piqa["sha256"])) == (
        1,
        2,
        {"valid.jsonl", "valid-labels.lst"},
    )

    assert run("--part", "text 32", "piqa", "--limit", "1")["rows"] == first["rows"]
    again = run("--part", "text 32", "piqa")["rows"]
    assert again[0] == text
    assert [(row["part"], row.get("items"), row.get("acc")) for row in again[1:]] == [("piqa", 2, 0.5)]

    monkeypatch.setattr(script, "machine", lambda device: {"hardware": "another"})
    with pytest.raises(SystemExit):
        run("--part", "text 32")
    assert json.loads(out.read_text())["rows"] == again


def test_a_pruned_model_says_how_it_was_pruned(script, monkeypatch, tmp_path):
    publish(tmp_path, PUBLISHED["piqa"])
    model, tokenizer = load_model("llama-mini")
    report = prune(model, calibration_tokens(tokenizer, 8, 32), 0.25, OSSCAR, blocks=[1], progress=False)
    folder, out = save_pruned(model, tmp_path / "model", tokenizer, report=report), tmp_path / "found.json"
    asked = ["--model", str(folder), "--data", str(tmp_path), "--part", "piqa", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["public_model.py", *asked])
    script.main()
    found = json.loads(out.read_text())
    assert [row["part"] for row in found["rows"]] == ["piqa"]
    assert "published, full precision" not in found
    assert (found["pruned"]["criterion"], found["pruned"]["tokens"]) == ("exact greedy", 256)
    assert found["pruned"]["removed"] == report.removed
