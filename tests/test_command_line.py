"""The command line does what the functions do, and says in its exit code whether it worked."""

import json
import subprocess
import sys

import pytest

from greedy_helpers import calibration_tokens, load_model, perplexity
from greedy_helpers.__main__ import main
from greedy_helpers.compare import Recipe, apply
from greedy_helpers.data import evaluation_tokens

FEW = ["--calibration", "4", "--seq", "64"]


def test_prune_evaluate_generate(tmp_path, capsys):
    folder = tmp_path / "pruned"
    arguments = ["llama-mini", str(folder), "--criterion", "output energy", "--remedy", "bias (FLAP)", *FEW]
    assert main(["--json", "prune", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["blocks"][1] < found["parameters"]["blocks"][0]

    assert main(["--json", "evaluate", "llama-mini", str(folder), "--windows", "2", "--seq", "64"]) == 0
    judged = json.loads(capsys.readouterr().out)
    model, tokenizer = load_model("llama-mini")
    calibration = calibration_tokens(tokenizer, 4, 64, "code+prose", seed=0)
    apply(model, calibration, 0.25, Recipe("output energy", "bias (FLAP)"), progress=False)
    for label in ("code", "prose"):
        expected = perplexity(model, evaluation_tokens(tokenizer, 2, 64, label))
        assert judged[str(folder)]["perplexity"][label] == pytest.approx(expected, rel=1e-4)
        assert judged["llama-mini"]["perplexity"][label] < expected

    assert main(["generate", str(folder), "--prompt", "import os", "--tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("import os")

    assert main(["prune", *arguments]) == 1  # the folder is there
    assert "exists and is not empty; pass --overwrite" in capsys.readouterr().err


def test_compare_goes_on(tmp_path, capsys):
    out = tmp_path / "sweep.json"
    common = ["compare", "llama-mini", "--remedies", "none", "--windows", "2", "--out", str(out), *FEW]
    assert main([*common, "--criteria", "L2"]) == 0
    assert main([*common, "--criteria", "L2", "random"]) == 0
    assert [row["criterion"] for row in json.loads(out.read_text())["rows"]] == ["L2", "random"]
    assert "blocks left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["prune", "no/such/model/here", "x"], 1, "found nothing there"),
        (["prune", "llama-mini", "x", "--ratio", "1.5", *FEW], 1, "expected a ratio in [0, 1)"),
        (["prune", "llama-mini", "x", "--criterion", "magic"], 1, "expected a criterion among"),
        (["generate", "llama-mini", "--prompt", ""], 1, "at least one token"),
    ],
)
def test_refusals(arguments, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_has_examples_and_wrong_arguments_exit_with_2():
    run = [sys.executable, "-m", "greedy_helpers"]
    shown = subprocess.run([*run, "--help"], capture_output=True, text=True, check=True)
    assert "examples:" in shown.stdout
    assert subprocess.run([*run, "prune"], capture_output=True, check=False).returncode == 2
