"""The command line does what the functions do, and says in its exit code whether it worked."""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from tiny import tiny_model

from greedy_helpers import (
    FLAP,
    OSSCAR,
    RECOMMENDED,
    Recipe,
    calibration_tokens,
    depth2_modules,
    exact_greedy,
    load_model,
    perplexity,
    prune,
    random_scores,
    recipes,
)
from greedy_helpers.__main__ import _recipe, main, parse
from greedy_helpers.course.choices import continuation_items
from greedy_helpers.course.multiple_choice import multiple_choice
from greedy_helpers.data import evaluation_tokens

README = Path(__file__).resolve().parent.parent / "README.md"
DATA = README.parent / "data"
CHATS = b"\n".join(b'{"messages": [{"role": "user", "content": "%d"}]}' % i for i in range(60))
FEW = ["--calibration", "4", "--seq", "64"]


def test_prune_evaluate_generate(tmp_path, capsys):
    folder = tmp_path / "pruned"
    arguments = ["llama-mini", str(folder), "--criterion", "output energy", "--remedy", "bias", *FEW]
    assert main(["--json", "prune", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["blocks"][1] < found["parameters"]["blocks"][0]

    assert main(["--json", "evaluate", "llama-mini", str(folder), "--windows", "8", "--seq", "128"]) == 0
    judged = json.loads(capsys.readouterr().out)
    model, tokenizer = load_model("llama-mini")
    calibration = calibration_tokens(tokenizer, 4, 64, "code+prose", seed=0)
    recipe = replace(RECOMMENDED, criterion="output energy", remedy="bias")
    prune(model, calibration, 0.25, recipe, progress=False)
    for label in ("code", "prose"):
        expected = perplexity(model, evaluation_tokens(tokenizer, 8, 128, label))
        assert judged[str(folder)]["texts"][label]["perplexity"] == pytest.approx(expected, rel=1e-4)
        assert judged["llama-mini"]["texts"][label]["perplexity"] < expected

    assert main(["generate", str(folder), "--prompt", "import os", "--tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("import os")

    assert main(["prune", *arguments]) == 1  # the folder is there
    assert "exists and is not empty; pass --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        ([], RECOMMENDED),
        (["--recipe", "flap", "--damp", "0.1"], replace(FLAP, damp=0.1)),
        (
            ["--recipe", "paper", "--remedy", "both", "--allocation", "cost"],
            Recipe("second moment", "both", 0.01, "cost"),
        ),
        (["--recipe", "osscar", "--damp", "held out"], replace(OSSCAR, damp="held out")),
        (["--criterion", "random", "--seed", "3"], replace(RECOMMENDED, criterion=partial(random_scores, seed=3))),
    ],
)
def test_options_override_the_recipe(options, recipe):
    found = parse(["prune", "model", "folder", *options])[1]
    given = {key: found[key] for key in ("criterion", "remedy", "allocation", "damp")}
    assert _recipe(found["recipe"], found["seed"], **given).names == recipe.names


def test_damping_reaches_the_criterion(tmp_path, monkeypatch, capsys):
    """One damping for selection and refit; singular without any is one sentence, not a traceback."""
    dampings = []

    def recording(module, seen):
        dampings.append(seen.damp)
        return exact_greedy(module, seen)

    monkeypatch.setitem(recipes.CRITERIA, "exact greedy", recording)
    few = ["--calibration", "8", "--seq", "128", "--blocks", "0:1"]
    for damp in ("1e-4", "0"):  # level 2 of an FFN has 1,024 tokens for 576 channels or more
        code = main(["prune", "llama-mini", str(tmp_path / damp), *few, "--criterion", "exact greedy", "--damp", damp])
        assert code in (0, 1)
        if code:
            assert capsys.readouterr().err.startswith("prune: ")
    assert set(dampings) == {1e-4, 0}


def test_some_blocks_calibrated_on_the_models_own_text(tmp_path):
    folder = tmp_path / "pruned"
    some = ["--blocks", "4:6", "--source", "self-generated", "--calibration", "2", "--seq", "24"]
    assert main(["prune", "llama-mini", str(folder), "--criterion", "L2", "--remedy", "none", *some]) == 0
    (dense, _), (pruned, _) = load_model("llama-mini"), load_model(str(folder))
    same = [a.n_units == b.n_units for a, b in zip(depth2_modules(dense), depth2_modules(pruned), strict=True)]
    assert all(same[:8])
    assert not all(same[8:])


def test_evaluate_adds_accuracies(monkeypatch, capsys):
    command = ["evaluate", "llama-mini", "--windows", "1", "--seq", "32", "--sources", "prose"]
    assert main(["--json", *command, "--choices", "4"]) == 0
    judged = json.loads(capsys.readouterr().out)["llama-mini"]["choices"]
    scores = multiple_choice(*load_model("llama-mini"), continuation_items("prose", 4))
    assert judged == {"prose choices": scores.to_dict()}

    assert main([*command, "--choices", "2"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^ +perplexity +perplexity_error .*\nprose +\d+\.\d", said, re.MULTILINE)
    assert re.search(r"^ +chance .* items\nprose choices +0\.25 .* 2$", said, re.MULTILINE)

    accuracy = pd.DataFrame({"items": [9], "acc": [0.5], "acc_stderr": [0.1], "acc_norm": [math.nan]}, index=["boolq"])
    monkeypatch.setattr("greedy_helpers.__main__.zero_shot", lambda model, tokenizer, tasks, data, limit: accuracy)
    assert main(["--json", *command, "--tasks", "boolq"]) == 0
    found = json.loads(capsys.readouterr().out)["llama-mini"]["tasks"]
    assert found == {"boolq": {"items": 9, "acc": 0.5, "acc_stderr": 0.1, "acc_norm": None}}
    assert main([*command, "--tasks", "boolq"]) == 0
    assert re.search(r"boolq +9 +0.5 +0.1 +-$", capsys.readouterr().out, re.MULTILINE)


def test_compare_goes_on(tmp_path, capsys):
    out = tmp_path / "sweep.json"
    common = ["compare", "llama-mini", "--remedies", "none", "--windows", "2", "--out", str(out), *FEW]
    assert main([*common, "--criteria", "L2"]) == 0
    assert main([*common, "--criteria", "L2", "--criteria", "random"]) == 0
    assert [row["criterion"] for row in json.loads(out.read_text())["rows"]] == ["L2", "random"]
    assert "blocks left" in capsys.readouterr().out


@pytest.mark.parametrize(("unit", "what"), [("query", "query heads"), ("kv", "KV heads")])
def test_units_of_grouped_queries(unit, what, tmp_path, capsys):
    tiny_model("mistral", torch.float32).save_pretrained(tmp_path / "dense")
    options = ["--unit", unit, "--source", "self-generated", "--calibration", "4", "--seq", "16", "--ratio", "0.5"]
    assert main(["prune", str(tmp_path / "dense"), str(tmp_path / "pruned"), *options]) == 0
    assert f"of {12 if unit == 'query' else 4} {what} and" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["prune", "no/such/model/here", "x"], 1, "found nothing there"),
        (["prune", "llama-mini", "x", "--ratio", "1.5", *FEW], 1, "expected a ratio in [0, 1)"),
        (["prune", "llama-mini", "x", "--criterion", "magic"], 2, "expected one of random, L1, "),
        (["prune", "llama-mini", "x", "--blocks", "5:2"], 2, "expected FIRST below END, found '5:2'"),
        (["generate", "llama-mini", "--prompt", "a", "--tokens", "0"], 2, "--tokens"),
        (["generate", "llama-mini", "--prompt", "a", "--temperature", "-1"], 2, "--temperature"),
        (["prune", "llama-mini", "x", "--blocks", "4"], 2, "expected FIRST:END, e.g. 4:30, found '4'"),
        (["prune", "llama-mini", "x", "--unit", "head"], 2, "expected one of query, kv; found 'head'"),
        (["prune", "llama-mini", "x", "--remedy", "prayer"], 2, "expected one of none, bias, pre, "),
        (
            ["prune", "llama-mini", "x", "--dtype", "int8"],
            2,
            "expected one of float32, bfloat16, float16; found 'int8'",
        ),
        (["evaluate", "llama-mini", "--choices", "1"], 2, "--choices"),
        (["evaluate", "llama-mini", "--faith", "1"], 2, "--faith"),
        (["compare", "llama-mini"], 2, "--out"),
    ],
)
def test_refusals(arguments, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_readmes_commands_are_understood():
    lines = re.findall(r"^python -m greedy_helpers (.*?)(?: {2,}#.*)?$", README.read_text(), re.MULTILINE)
    assert [parse(shlex.split(line))[0] for line in lines] == ["prune", "prune", "evaluate", "compare", "generate"]
    name, options = parse(["compare", "a", "b", "--criteria", "L1", "--criteria", "L2", "--out", "x.json"])
    assert (name, list(options["models"]), list(options["criteria"])) == ("compare", ["a", "b"], ["L1", "L2"])
    assert list(options["remedies"]) == ["none", RECOMMENDED.remedy]


def test_help_has_examples_and_wrong_arguments_exit_with_2():
    run = [sys.executable, "-m", "greedy_helpers"]
    shown = subprocess.run([*run, "--help"], capture_output=True, text=True, check=True)
    assert "examples:" in shown.stdout
    assert subprocess.run([*run, "prune"], capture_output=True, check=False).returncode == 2


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights fails the test."""

    def load(*_args, **_options):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("greedy_helpers.__main__.load_model", load)
    monkeypatch.setattr("greedy_helpers.compare.load_model", load)


def folder_without_tokenizer(place):
    folder = place / "bare"
    folder.mkdir()
    for file in (DATA / "llama-mini").iterdir():
        if not file.name.startswith("token"):
            shutil.copy(file, folder)
    return folder


def refused(arguments, message, capsys):
    assert main([str(argument) for argument in arguments]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, said), said
    assert said.startswith(f"{arguments[0]}: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "Größe und Maß".encode("latin-1"), "is not utf-8"),
        ("broken.jsonl", b'{"text": \n', "cannot be read as json"),
        ("chats.jsonl", CHATS, r"chat template, found a tokenizer without one; .* \(--column\)"),
        ("numbers.csv", b"text\n1\n2\n", "expected text, or chat messages"),
        ("other.csv", b"body,title\na,b\n", r"found \['body', 'title'\]; name one with column= \(--column\)"),
        ("missing.txt", None, "expected a text file at"),
        ("wiki.valid.raw", "Größe".encode("latin-1"), "is not utf-8"),
        ("rows.jsonl[5:9]", None, "expected a text file at .*rows.jsonl, found"),
        ("page.html", b"<p>", "expected a file that ends in"),
    ],
)
def test_text_that_cannot_be_read_is_refused_before_the_weights(name, content, message, tmp_path, no_weights, capsys):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    refused(["prune", "llama-mini", tmp_path / "out", "--source", path, *FEW], message, capsys)
    refused(["evaluate", "llama-mini", "--sources", path], message, capsys)
    assert not (tmp_path / "out").exists()


def test_evaluate_says_what_lm_eval_needs_before_the_weights(monkeypatch, no_weights, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(["evaluate", "llama-mini", "--tasks", "piqa"], r"pip install 'greedy-helpers\[eval\]'", capsys)


def test_what_the_config_rules_out_is_refused_before_the_weights(tmp_path, no_weights, capsys):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, message in (("Mixtral", "'mixtral' is not supported: mixture of"), ("Nemotron", "no layout for model")):
        config = getattr(transformers, f"{name}Config")(**sizes, num_key_value_heads=2)
        config.architectures = [f"{name}ForCausalLM"]
        folder = tmp_path / name
        config.save_pretrained(folder)
        (folder / "model.safetensors").write_bytes(b"")
        for command in (["prune", folder, tmp_path / "out"], ["evaluate", folder], ["compare", folder, "--out", "x"]):
            refused(command, message, capsys)


def test_a_pruned_model_has_the_context_of_its_base(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "pruned"
    assert main(["prune", "llama-mini", str(folder), "--criterion", "L2", "--remedy", "none", *FEW]) == 0
    capsys.readouterr()
    monkeypatch.setattr("greedy_helpers.__main__.load_model", lambda *_: pytest.fail("the weights were loaded"))
    refused(["evaluate", folder, "--seq", "9999"], "windows of at most 256 tokens", capsys)


def test_a_folder_without_a_tokenizer_is_refused_before_the_weights(tmp_path, no_weights, capsys):
    folder, message = folder_without_tokenizer(tmp_path), "bare' has no tokenizer that can be loaded; expected an emb"
    refused(["prune", folder, tmp_path / "out", *FEW], message, capsys)
    refused(["evaluate", "llama-mini", folder, "--windows", "1", "--seq", "16"], message, capsys)
    refused(["generate", folder, "--prompt", "a"], message, capsys)
    refused(["compare", folder, "--out", tmp_path / "x.json"], message, capsys)


def test_a_folder_without_a_tokenizer_is_pruned_on_its_own_text(tmp_path):
    folder, few = folder_without_tokenizer(tmp_path), ["--calibration", "2", "--seq", "16", "--blocks", "4:5"]
    options = ["--source", "self-generated", "--criterion", "L2", "--remedy", "none", *few]
    assert main(["prune", str(folder), str(tmp_path / "out"), *options]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "llama-mini", "x", "--ratio", "1.5"], r"expected a ratio in \[0, 1\)"),
        (["prune", "llama-mini", "x", "--device", "abacus"], "cannot use the device 'abacus'"),
        (["prune", "llama-mini", "x", "--store", "abacus"], "cannot use the device 'abacus'"),
        (["prune", "llama-mini", "x", "--lazy"], "needs a --work-dir"),
        (["prune", "llama-mini", "x", "--calibration", "0"], "at least 1 window"),
        (["prune", "llama-mini", "x", "--seq", "9999"], "at most 256 tokens, the context of LlamaForCausalLM, found"),
        (["prune", "llama-mini", "x", "--source", "self-generated", "--seq", "9999"], "at most 256 tokens"),
        (["prune", "llama-mini", "x", "--blocks", "4:9"], r"expected blocks in \[0, 6\), found 6"),
        (["evaluate", "gpt2-mini", "--seq", "9999"], "at most 256 tokens, the context of GPT2LMHeadModel"),
        (["compare", "llama-mini", "--seq", "9999", "--out", "x.json"], "at most 256 tokens"),
        (["compare", "llama-mini", "--source", "no.csv", "--out", "x.json"], "expected a text file at no.csv"),
        (["generate", "llama-mini", "--prompt", ""], "expected a prompt of at least one token"),
        (["generate", "llama-mini", "--prompt", "import os\n" * 999], "a prompt shorter than the context of 256"),
        (["evaluate", "llama-mini", "--windows", "99999"], "1 <= windows <= "),
        (["evaluate", "llama-mini", "--stride", "0"], "stride in"),
        (["evaluate", "llama-mini", "--choices", "4", "--column", "body"], "made from the column 'text' only"),
        (["evaluate", "llama-mini", "--data", "folder"], "name the tasks"),
        (["evaluate", "llama-mini", "--data", "folder", "--tasks", "piqa"], "'piqa' in folder.piqa.valid.jsonl, found"),
        (["generate", "llama-mini", "--prompt", "a", "--device", "abacus"], "cannot use the device 'abacus'"),
        (["compare", "llama-mini", "--ratios", "2", "--out", "x.json"], r"expected a ratio in \[0, 1\)"),
        (["generate", "no/where", "--prompt", "a"], "'no/where' has no tokenizer that can be loaded"),
    ],
)
def test_mistakes_are_refused_before_the_weights(arguments, message, tmp_path, monkeypatch, no_weights, capsys):
    monkeypatch.chdir(tmp_path)
    refused(arguments, message, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("one\n  two"), "generate: RuntimeError: one two (--debug shows where)"),
        (AttributeError(), "generate: AttributeError:  (--debug shows where)"),
        (KeyError("no such module"), "generate: no such module"),
        (ValueError("expected\nthis"), "generate: expected this"),
    ],
)
def test_any_error_is_one_line_and_debug_shows_where(error, said, monkeypatch, capsys):
    def load(*_args):
        raise error

    monkeypatch.setattr("greedy_helpers.__main__.load_model", load)
    command = ["generate", "llama-mini", "--prompt", "a"]
    assert main(command) == 1
    assert capsys.readouterr().err.strip() == said
    with pytest.raises(type(error)):
        main(["--debug", *command])


def test_a_column_of_a_table(tmp_path, capsys):
    path = tmp_path / "mine.csv"
    path.write_text("title,body\n" + "\n".join(f"{i},This is row {i} of a table that says so." for i in range(200)))
    command = ["evaluate", "llama-mini", "--windows", "1", "--seq", "16", "--sources", str(path), "--column", "body"]
    assert main(["--json", *command]) == 0
    assert json.loads(capsys.readouterr().out)["llama-mini"]["texts"][str(path)]["tokens"] == 15
    sweep = ["compare", "llama-mini", "--criteria", "L2", "--remedies", "none", "--windows", "1", "--seq", "16"]
    sweep += ["--calibration", "2", "--source", str(path), "--out", str(tmp_path / "sweep.json")]
    refused(sweep, r"found \['title', 'body'\]; name one with column= \(--column\)", capsys)
    assert main([*sweep, "--column", "body"]) == 0
    assert json.loads((tmp_path / "sweep.json").read_text())["settings"]["column"] == "body"
    some = ["--blocks", "5:6", "--calibration", "2", "--seq", "16", "--criterion", "L2", "--remedy", "none"]
    assert main(["prune", "llama-mini", str(tmp_path / "out"), "--source", str(path), "--column", "body", *some]) == 0
