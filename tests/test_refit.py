"""benchmarks/refit.py on a tiny model: what its rows mean, and that it goes on where it was stopped."""

import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from greedy_helpers import blocks_of, depth2_modules, load_model, set_weight, solve, zero_units
from greedy_helpers.data import calibration_tokens, evaluation_tokens
from greedy_helpers.evaluate import token_losses

SIZES = (6, 10)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import refit

    monkeypatch.setattr(refit, "SEQ", 32)
    return refit


@pytest.fixture
def world(script, monkeypatch, tmp_path):
    """A tiny model with llama-mini's tokenizer, a text, and a way to run the script on them."""
    _, tokenizer = load_model("llama-mini")
    model = tiny_model("llama", torch.float32, vocab_size=len(tokenizer), max_position_embeddings=64)
    monkeypatch.setattr(script.gh, "load_model", lambda *_: (copy.deepcopy(model), tokenizer))
    monkeypatch.setattr(script, "RUN", {(6, script.ALL, 1e-2)})
    text, out = tmp_path / "text.txt", tmp_path / "refit.json"
    text.write_text("\n\n".join(f"Paragraph {i} has a few words, and the number {i * i}." * 4 for i in range(60)))

    def run(*arguments):
        common = ["--block", "1", "--text", f"own={text}[50:]", "--judged", "8", "--windows", *map(str, SIZES)]
        monkeypatch.setattr(sys, "argv", ["refit.py", *common, "--out", str(out), *arguments])
        script.main()
        return json.loads(out.read_text())

    calibration = calibration_tokens(tokenizer, SIZES[-1], 32, f"{text}[:50]")
    held_out = evaluation_tokens(tokenizer, 8, 32, f"{text}[50:]")
    return model, calibration, held_out, run, f"same={text}[:50]"


def read(model, tokens, linear):
    """What a linear reads in a plain forward pass, [windows * seq, channels]."""
    found = []
    handle = linear.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return found[0].double()


def test_rows_are_what_a_plain_refit_gives(script, world):
    model, calibration, held_out, run, source = world
    rows = run("--calibration", source)["rows"]
    bare = next(row for row in rows if row.get("damp") == "none")
    ffn = depth2_modules(model, [1])[-1]
    linear, gone = ffn.level2.linear, torch.tensor(bare["removed channels"])
    stay = torch.tensor([c for c in range(ffn.n_units) if c not in {*gone.tolist()}])
    assert len(gone) == ffn.n_units // 4
    whole = linear.weight.detach().clone()

    def losses(weight):
        cut = torch.zeros_like(whole)
        cut[:, stay] = weight.to(whole)
        set_weight(linear, cut)
        found = torch.cat(list(token_losses(model, held_out[::4]))).mean(1)
        set_weight(linear, whole)
        return found

    z = {name: read(model, tokens, linear) for name, tokens in (("seen", calibration), ("new", held_out))}
    w, targets = whole.double(), {name: each @ whole.double().T for name, each in z.items()}
    moments = script.Moments("plain")
    moments.update(z["seen"][: 6 * 32][:, stay], targets["seen"][: 6 * 32])
    refitted = solve(moments, w[:, stay], damp=1e-2).weight

    def error(weight):
        return (z["new"][:, stay] @ weight.T - targets["new"]).square().sum().item()

    size = targets["new"].square().sum().item()
    assert math.isclose(bare["relative error, own"], error(w[:, stay]) / size, rel_tol=1e-3)
    key = {"tokens": 6 * 32, "which": script.ALL, "damp": 1e-2}
    row = next(row for row in rows if row.items() >= key.items())
    assert math.isclose(row["own"], error(refitted) / error(w[:, stay]), rel_tol=1e-3)
    dense = torch.cat(list(token_losses(model, held_out[::4]))).mean(1)
    torch.testing.assert_close(torch.tensor(row["rises, own"]).double(), losses(refitted) - dense, rtol=0, atol=1e-4)
    zero_units(ffn, gone)
    unrepaired = torch.cat(list(token_losses(model, held_out[::4]))).mean(1)
    torch.testing.assert_close(torch.tensor(bare["rises, own"]).double(), unrepaired - dense, rtol=0, atol=1e-4)


def test_it_goes_on_and_keeps_the_cut_for_another_text(script, world):
    model, _, _, run, source = world
    found = run("--calibration", source)
    rows = found["rows"]
    norms = [row for row in rows if "norms" in row]
    assert [row["norms"] for row in norms] == [*range(len(blocks_of(model)) + 1)]
    assert len(rows) == len(norms) + 1 + len(SIZES) * sum(map(len, script.DAMPS.values()))
    assert all(row["chosen"] in (*script.gh.reconstruct.DAMPS, "none") for row in rows if row.get("damp") == "held out")
    other = run("--calibration", source.replace("same=", "other="))
    assert other["rows"][: len(rows)] == rows
    added = other["rows"][len(rows) :]
    assert {row["calibration"] for row in added} == {"other"}
    bare = {key: value for key, value in rows[len(norms) + 1].items() if key != "calibration"}
    assert {key: value for key, value in added[0].items() if key != "calibration"} == bare, "the same text"
    assert run("--calibration", source) == other
    with pytest.raises(SystemExit):
        run("--calibration", source.replace("[:50]", "[:40]"))


def test_a_clipped_token_counts_like_the_median(script):
    weight = torch.eye(3)
    z = torch.tensor([[[10.0, 0, 0], [0, 1, 0], [0, 0, 0.5]]])
    clipped = script.of_tokens(z, script.CLIPPED, weight)
    assert torch.equal(clipped, torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 0, 0.5]]]))
    assert script.of_tokens(z, script.NO_FIRST, weight).shape == (1, 2, 3)
