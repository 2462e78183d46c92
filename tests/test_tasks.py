"""Multiple choice: accuracies, their errors, and the numbers that lm_eval gives, too."""

import json
import math
import random
import statistics
import sys
from dataclasses import asdict

import pytest
import torch
import yaml
from conftest import assert_untouched, state_of
from scipy.stats import binomtest

from greedy_helpers import depth2_modules, load_model, remove_units
from greedy_helpers.checkpoint import load_tokenizer
from greedy_helpers.course.choices import choice_tasks
from greedy_helpers.course.multiple_choice import ChoiceScores, MultipleChoice, multiple_choice, paired_accuracy
from greedy_helpers.tasks import PAPER_TASKS, zero_shot

IMPORT = MultipleChoice("import", (" os", " zebra"), 0)


@pytest.fixture(scope="module")
def items():
    return choice_tasks({"code": "code", "prose": "prose"}, 30)


@pytest.fixture(scope="module")
def mini():
    return load_model("llama-mini")


# --- scores


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((" ", ("a", "b"), 0), "expected a context"),
        (("x", ("a", "a"), 0), "different choices"),
        (("x", ("a", " "), 0), "different choices"),
        (("x", ("a", "b"), 2), r"an answer in \[0, 2\), found 2"),
    ],
)
def test_refused_items(fields, message):
    with pytest.raises(ValueError, match=message):
        MultipleChoice(*fields)


def test_log_likelihoods_by_hand(mini):
    """One token at a time: softmax, log, sum. White space at a context's end goes to the choice."""
    model, tokenizer = mini
    questions = [
        MultipleChoice("import os\nimport ", ("sys", "zebra, sys"), 0),
        MultipleChoice("def", (" f(x):", " ("), 0),
    ]
    scores = multiple_choice(model, tokenizer, questions)
    for item, sums in zip(questions, scores.log_likelihoods, strict=True):
        for choice, total in zip(item.choices, sums, strict=True):
            ids = tokenizer(item.context + choice, return_tensors="pt")["input_ids"]
            n_context = len(tokenizer(item.context.rstrip())["input_ids"])
            by_hand = 0.0
            for position in range(n_context, ids.shape[1]):
                logits = model(ids[:, :position]).logits[0, -1]
                by_hand += math.log(torch.softmax(logits, -1)[ids[0, position]].item())
            assert total == pytest.approx(by_hand, rel=1e-5)
    assert scores.characters == ((3, 10), (6, 2))
    assert scores.correct[0]


@pytest.mark.parametrize("name", ["llama-mini", "gpt2-mini"])
def test_the_batch_size_changes_nothing(name, items):
    model, tokenizer = load_model(name)
    model.train()
    some = items["prose choices"][:2] + items["identifiers"][:3]
    together, alone = (multiple_choice(model, tokenizer, some, size) for size in (7, 1))
    assert model.training
    for a, b in zip(together.log_likelihoods, alone.log_likelihoods, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_the_model_beats_chance_and_leaves_room(mini, items):
    """60 items: chance is 25%, a standard error 6%."""
    scores = multiple_choice(*mini, items["code choices"] + items["prose choices"])
    assert 0.33 < scores.acc_norm < 0.75
    assert scores.chance == 0.25


def test_accuracies_and_their_errors():
    """A long choice loses by its sum and wins per character."""
    sums = ((-10.0, -9.0), (-5.0, -6.0, -7.0), (-3.0, -1.0), (-2.0, -2.0))
    scores = ChoiceScores(sums, ((20, 10), (5, 5, 5), (4, 4), (1, 1)), (0, 0, 0, 0))
    assert scores.correct.tolist() == [False, True, False, True]  # equal scores: the first counts
    assert scores.correct_norm.tolist() == [True, True, False, True]
    assert (scores.acc, scores.acc_norm) == (0.5, 0.75)
    assert scores.acc_norm_stderr == pytest.approx(statistics.stdev([1, 1, 0, 1]) / 2)
    assert scores.chance == pytest.approx((3 / 2 + 1 / 3) / 4)
    assert scores.to_dict()["items"] == 4


def _of(*right):
    """Scores of a model that has these items right."""
    sums = tuple((-1.0, -2.0) if r else (-2.0, -1.0) for r in right)
    return ChoiceScores(sums, ((1, 1),) * len(right), (0,) * len(right))


def test_two_models_on_the_same_items():
    first, second = _of(1, 1, 1, 1, 1, 1, 0, 0, 0), _of(1, 1, 0, 0, 0, 0, 1, 0, 0)
    paired = paired_accuracy(first, second)
    assert (paired.only_first, paired.only_second) == (4, 1)
    assert paired.difference == pytest.approx(second.acc - first.acc)
    assert paired.stderr == pytest.approx(statistics.stdev([0, 0, -1, -1, -1, -1, 1, 0, 0]) / 3)
    assert paired.p_value == pytest.approx(binomtest(1, 5).pvalue)
    assert paired_accuracy(first, first).p_value == 1
    with pytest.raises(ValueError, match="the same items, found 9 and 2"):
        paired_accuracy(first, _of(1, 0))


def test_refused_scores(mini):
    model, tokenizer = mini
    long = MultipleChoice("import os\n" * 300, ("import sys", "import re"), 0)
    with pytest.raises(ValueError, match=r"item 1 has a choice of \d+ tokens .* at most 257 .* LlamaForCausalLM"):
        multiple_choice(model, tokenizer, [IMPORT, long])
    with pytest.raises(ValueError, match="at least one item"):
        multiple_choice(model, tokenizer, [])
    broken, _ = load_model("llama-mini")
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        multiple_choice(broken, tokenizer, [IMPORT])


# --- lm_eval


@pytest.fixture
def lm_eval():
    return pytest.importorskip("lm_eval", reason="needs greedy-helpers[eval]: make test EXTRAS=dev,lab,eval")


def _as_lm_eval_task(folder, name, questions):
    """Path of a YAML file that lm_eval reads."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(asdict(item)) + "\n" for item in questions))
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        # Fields are named, not written as Jinja templates: those would read the braces of code.
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",  # choices begin with their own white space
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return str(folder / f"{name}.yaml")


def test_lm_eval_agrees(lm_eval, items, tmp_path):
    """Other code, same numbers, on a model with other sizes in every block, which lm_eval leaves as it was."""
    model, tokenizer = load_model("llama-mini")
    for i, part in enumerate(depth2_modules(model)):
        remove_units(part, torch.arange(part.n_units - 1 - i % 2))
    braces = MultipleChoice("x = {{1: 2}}\ny =", (" {{y}}", " {% z %}", " [0] * 3"), 2)  # nothing is a template
    prose = items["prose choices"][:3]
    moved = [MultipleChoice(i.context + " ", tuple(choice[1:] for choice in i.choices), i.answer) for i in prose]
    ours = {"code_choices": [*items["code choices"][:6], braces], "moved_space": moved}
    paths = [_as_lm_eval_task(tmp_path, name, questions) for name, questions in ours.items()]
    before, random_states = state_of(model), (torch.get_rng_state().tolist(), random.getstate())
    table = zero_shot(model, tokenizer, paths, batch_size=5)
    assert_untouched(model, before)
    assert (torch.get_rng_state().tolist(), random.getstate()) == random_states
    assert tokenizer.pad_token is None
    assert list(table.index) == [*ours, "mean"]
    for name, questions in ours.items():
        scores = multiple_choice(model, tokenizer, questions).to_dict()
        for column in ("items", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
            assert table.loc[name, column] == pytest.approx(scores[column]), (name, column)
    assert table.loc["mean", "acc"] == pytest.approx(table["acc"][:-1].mean())
    assert table.loc["mean", "acc_stderr"] == pytest.approx(math.hypot(*table["acc_stderr"][:-1]) / 2)
    assert zero_shot(model, tokenizer, paths[:1], limit=2).loc["code_choices", "items"] == 2


def test_log_likelihoods_are_lm_evals(lm_eval, mini, items):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = mini
    some = items["code choices"][6:8] + items["identifiers"][:2]
    requests = [Instance("loglikelihood", {}, (i.context, choice), 0) for i in some for choice in i.choices]
    judge = HFLM(pretrained=model, tokenizer=load_tokenizer("llama-mini"))
    theirs = [total for total, _ in judge.loglikelihood(requests)]
    ours = [total for sums in multiple_choice(model, tokenizer, some).log_likelihoods for total in sums]
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_tasks_by_name(lm_eval, mini, tmp_path, monkeypatch):
    """Of lm_eval's own list: one with data, one whose data is not here, and one that does not exist."""
    _as_lm_eval_task(tmp_path, "imports", [IMPORT] * 2)
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path))  # reading its files takes long: once is enough
    options = []
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **given: options.append(given) or manager)
    assert zero_shot(*mini, ["imports"]).loc["imports", "acc"] == 1
    assert options == [{"include_defaults": True}]
    with pytest.raises(ConnectionError, match="the data of the task 'piqa' is neither cached nor reachable"):
        zero_shot(*mini, ["imports", "piqa"])
    with pytest.raises(ValueError, match=r"no task 'helaswag'; did you mean .*hellaswag"):
        zero_shot(*mini, ["helaswag"])
    assert set(PAPER_TASKS) <= set(manager.all_tasks)


def test_refused_tasks(mini, monkeypatch):
    with pytest.raises(ValueError, match="a list of task names, found 'piqa'"):
        zero_shot(*mini, tasks="piqa")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'greedy-helpers\[eval\]'"):
        zero_shot(*mini)
