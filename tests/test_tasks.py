"""Multiple choice: items that hide nothing but the answer, scores that lm_eval gives, too."""

import math
import random
import re
import statistics
import sys
from collections import Counter

import pytest
import torch
from conftest import assert_untouched, state_of
from scipy.stats import binomtest

from greedy_helpers import (
    ChoiceScores,
    MultipleChoice,
    choice_judge,
    choice_tasks,
    continuation_items,
    depth2_modules,
    documents,
    identifier_items,
    load_model,
    load_tokenizer,
    multiple_choice,
    paired_accuracy,
    remove_units,
    write_lm_eval_task,
    zero_shot,
)
from greedy_helpers import tasks as module


@pytest.fixture(scope="module")
def tasks():
    return choice_tasks({"code": "code", "prose": "prose"}, 60)


@pytest.fixture(scope="module")
def mini():
    return load_model("llama-mini")


@pytest.fixture(scope="module")
def pruned():
    """llama-mini with other sizes in every block."""
    model, tokenizer = load_model("llama-mini")
    for i, part in enumerate(depth2_modules(model)):
        remove_units(part, torch.arange(part.n_units - 1 - i % 2))
    return model, tokenizer


# --- items


def _single_spaced(text):
    return " ".join(text.split())


@pytest.mark.parametrize("source", ["code", "prose"])
def test_continuations_hide_nothing_but_the_answer(source, tasks):
    items = tasks[f"{source} choices"]
    held_out = documents(source, "test")["text"]
    clean = str if source == "code" else _single_spaced
    texts = [clean(text) for text in held_out]
    assert len(items) == 60
    at_home = 0
    for item in items:
        truth = item.choices[item.answer]
        homes = [text for text in texts if item.context + truth in text]
        assert homes, item
        others = [choice for i, choice in enumerate(item.choices) if i != item.answer]
        assert len({truth, *others}) == 4
        assert not any(item.context + other in text for other in others for text in texts)
        assert not any(other.strip() in item.context for other in others)
        at_home += any(all(other.strip() in text for other in others) for text in homes)
        leads = {choice[: -len(choice.lstrip())] for choice in item.choices}
        assert len(leads) == 1
        lengths = [len(choice.strip()) for choice in item.choices]
        assert 30 <= min(lengths) <= max(lengths) <= 90
        assert all(1 / 1.151 < length / len(truth.strip()) < 1.151 for length in lengths)
    assert at_home >= 48  # short documents borrow from their neighbours
    assert max(Counter(item.answer for item in items).values()) < 30  # of 60: always the same guess is no strategy


def test_code_choices_are_whole_lines_of_one_indentation(tasks):
    lines = {line for text in documents("code", "test")["text"] for line in text.split("\n")}
    for item in tasks["code choices"]:
        for choice in item.choices:
            assert choice.startswith("\n")
            assert all(line.rstrip() in {one.rstrip() for one in lines} for line in choice.split("\n")[1:-1])


def test_items_do_not_share_text(tasks):
    """Drawn twice as often, no line of a truth would come up in another item's context."""
    for items in tasks.values():
        starts = [item.context + item.choices[item.answer] for item in items]
        assert len(set(starts)) == len(starts)
    longest = [max(item.choices[item.answer].split("\n"), key=len).strip() for item in tasks["code choices"]]
    unique = [line for line in longest if sum(text.count(line) for text in documents("code", "test")["text"]) == 1]
    assert len(unique) > 30
    assert not any(line in item.context for line in unique for item in tasks["code choices"])


def test_the_seed_decides(tasks):
    assert continuation_items("code", 60) == tasks["code choices"]
    assert identifier_items(60) == tasks["identifiers"]
    assert continuation_items("code", 9, seed=1) != continuation_items("code", 9)
    assert len(continuation_items("prose", 5, choices=2)[0].choices) == 2


@pytest.mark.parametrize("name", ["llama-mini", "gpt2-mini"])
def test_contexts_end_where_tokens_end(name, tasks):
    tokenizer = load_tokenizer(name)
    for label, items in tasks.items():
        longest = 0
        for item in items:
            context = tokenizer(item.context)["input_ids"]
            for choice in item.choices:
                whole = tokenizer(item.context + choice)["input_ids"]
                assert whole[: len(context)] == context, label
                longest = max(longest, len(whole))
        assert longest < 256  # both models' context


def test_identifiers_are_variables_seen_before(tasks):
    texts = documents("code", "test")["text"]
    for item in tasks["identifiers"]:
        names = [re.match(r"\s*(\w+)", choice)[1] for choice in item.choices]
        assert len(set(names)) == 2
        assert not {"self", "cls"} & set(names)
        rests = {choice.replace(name, "", 1) for choice, name in zip(item.choices, names, strict=True)}
        assert len(rests) == 1  # the same code follows
        assert all(re.search(rf"\b{name}\b", item.context) for name in names)
        assert any(item.context + item.choices[item.answer] in text for text in texts)


_FUNCTION = '''
def area(width, height):
    """A docstring of some length, so that there is enough context before the place in question, and more."""
    label = "an area"
    self = width
    total = height * 2 + f"{label} of {width}" + len("some more code that follows in this line")
    return label
'''


def test_no_question_where_only_one_variable_could_stand(monkeypatch):
    """`total` is bound by its own line, `self` is no choice, columns inside f-strings are not to be trusted."""
    monkeypatch.setattr(module, "documents", lambda source, split: {"text": [_FUNCTION]})
    with pytest.raises(ValueError, match="expected 2 places in the held-out code of this Python, found 1"):
        identifier_items(2)
    (item,) = identifier_items(1)
    assert item.choices[item.answer].startswith((" height * 2 +", " label"))
    for seed in range(20):
        (item,) = identifier_items(1, seed=seed)
        assert {choice.split()[0] for choice in item.choices} <= {"height", "width", "label"}


def test_items_of_a_local_file(tmp_path):
    """Every paragraph is a document of its own there: distractors come from its neighbours."""
    draw = random.Random(0)
    vocabulary = "river mountain valley forest meadow village harbour island bridge castle".split()

    def sentence():
        return "The " + " ".join(draw.choices(vocabulary, k=14)) + "."

    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(" ".join(sentence() for _ in range(3)) for _ in range(60)))
    items = continuation_items(str(path), 4)
    paragraphs = path.read_text().split("\n\n")
    for item in items:
        assert sum(item.context + choice in text for choice in item.choices for text in paragraphs) == 1
    with pytest.raises(ValueError, match=r"expected 500 places in the held-out split of .*text.txt'.*, found \d"):
        continuation_items(str(path), 500)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: continuation_items("code", 0), "expected n >= 1 and choices >= 2, found 0 and 4"),
        (lambda: continuation_items("code", 5, choices=1), "found 5 and 1"),
        (lambda: continuation_items("code", 5, cut="page"), "found 'page'"),
        (lambda: identifier_items(0), "found 0"),
        (lambda: MultipleChoice(" ", ("a", "b"), 0), "expected a context"),
        (lambda: MultipleChoice("x", ("a", "a"), 0), "different choices"),
        (lambda: MultipleChoice("x", ("a", " "), 0), "different choices"),
        (lambda: MultipleChoice("x", ("a", "b"), 2), r"an answer in \[0, 2\), found 2"),
    ],
)
def test_refused_items(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- scores


def test_log_likelihoods_by_hand(mini):
    """One token at a time: softmax, log, sum. White space at a context's end goes to the choice."""
    model, tokenizer = mini
    items = [MultipleChoice("import os\nimport ", ("sys", "zebra, sys"), 0), MultipleChoice("def", (" f(x):", " ("), 0)]
    scores = multiple_choice(model, tokenizer, items)
    for item, found in zip(items, scores.log_likelihoods, strict=True):
        for choice, total in zip(item.choices, found, strict=True):
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
def test_the_batch_size_changes_nothing(name, tasks):
    model, tokenizer = load_model(name)
    model.train()
    items = tasks["prose choices"][:2] + tasks["identifiers"][:3]
    together, alone = (multiple_choice(model, tokenizer, items, size) for size in (7, 1))
    assert model.training
    for a, b in zip(together.log_likelihoods, alone.log_likelihoods, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_both_models_beat_chance_and_leave_room(mini, tasks):
    """30 items: chance is 25%, a standard error 9%."""
    model, tokenizer = mini
    scores = multiple_choice(model, tokenizer, tasks["code choices"][:30] + tasks["prose choices"][:30])
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
        multiple_choice(model, tokenizer, [MultipleChoice("import", (" os", " re"), 0), long])
    with pytest.raises(ValueError, match="at least one item"):
        multiple_choice(model, tokenizer, [])
    broken, _ = load_model("llama-mini")
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        multiple_choice(broken, tokenizer, [MultipleChoice("import", (" os", " re"), 0)])


def test_judge_of_a_sweep(mini):
    model, tokenizer = mini
    judged = choice_judge(3)("llama-mini")(model)
    expected = {label: multiple_choice(model, tokenizer, items).acc_norm
                for label, items in choice_tasks({"code": "code", "prose": "prose"}, 3).items()}  # fmt: skip
    assert judged == expected
    assert list(judged) == ["code choices", "prose choices", "identifiers"]


# --- lm_eval


@pytest.fixture
def lm_eval():
    return pytest.importorskip("lm_eval", reason="needs greedy-helpers[eval]: make test EXTRAS=dev,lab,eval")


def test_lm_eval_agrees(lm_eval, pruned, tasks, tmp_path):
    """Other code, same numbers, on a model with other sizes in every block, which lm_eval leaves as it was."""
    model, tokenizer = pruned
    braces = MultipleChoice("x = {{1: 2}}\ny =", (" {{y}}", " {% z %}", " [0] * 3"), 2)  # nothing is a template
    prose = tasks["prose choices"][:3]
    moved = [MultipleChoice(i.context + " ", tuple(choice[1:] for choice in i.choices), i.answer) for i in prose]
    ours = {"code_choices": [*tasks["code choices"][:6], braces], "moved_space": moved}
    paths = [str(write_lm_eval_task(tmp_path, name, items)) for name, items in ours.items()]
    before, random_states = state_of(model), (torch.get_rng_state().tolist(), random.getstate())
    table = zero_shot(model, tokenizer, paths, batch_size=5)
    assert_untouched(model, before)
    assert (torch.get_rng_state().tolist(), random.getstate()) == random_states
    assert tokenizer.pad_token is None
    assert list(table.index) == [*ours, "mean"]
    for name, items in ours.items():
        scores = multiple_choice(model, tokenizer, items).to_dict()
        for column in ("items", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
            assert table.loc[name, column] == pytest.approx(scores[column]), (name, column)
    assert table.loc["mean", "acc"] == pytest.approx(table["acc"][:-1].mean())
    assert table.loc["mean", "acc_stderr"] == pytest.approx(math.hypot(*table["acc_stderr"][:-1]) / 2)
    assert zero_shot(model, tokenizer, paths[:1], limit=2).loc["code_choices", "items"] == 2


def test_log_likelihoods_are_lm_evals(lm_eval, mini, tasks):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = mini
    items = tasks["code choices"][6:8] + tasks["identifiers"][:2]
    requests = [Instance("loglikelihood", {}, (i.context, choice), 0) for i in items for choice in i.choices]
    judge = HFLM(pretrained=model, tokenizer=load_tokenizer("llama-mini"))
    theirs = [total for total, _ in judge.loglikelihood(requests)]
    ours = [total for scores in multiple_choice(model, tokenizer, items).log_likelihoods for total in scores]
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_tasks_by_name(lm_eval, mini, tmp_path, monkeypatch):
    """Of lm_eval's own list, and of a folder; one whose data is not here, and one that does not exist."""
    write_lm_eval_task(tmp_path, "imports", [MultipleChoice("import", (" os", " zebra"), 0)] * 2)
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path))  # reading its files takes long: once is enough
    options = []
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **given: options.append(given) or manager)
    assert zero_shot(*mini, ["imports"], include_path=tmp_path).loc["imports", "acc"] == 1
    assert options == [{"include_path": str(tmp_path), "include_defaults": True}]
    with pytest.raises(ConnectionError, match="the data of the task 'piqa' is neither cached nor reachable"):
        zero_shot(*mini, ["imports", "piqa"])
    with pytest.raises(ValueError, match=r"no task 'helaswag'; did you mean .*hellaswag"):
        zero_shot(*mini, ["helaswag"])
    assert set(module.PAPER_TASKS) <= set(manager.all_tasks)


def test_without_lm_eval(mini, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'greedy-helpers\[eval\]'"):
        zero_shot(*mini)


def test_refused_exports(tmp_path, mini):
    with pytest.raises(ValueError, match="at least one item"):
        write_lm_eval_task(tmp_path, "x", [])
    with pytest.raises(ValueError, match="found 'a/b'"):
        write_lm_eval_task(tmp_path, "a/b", [MultipleChoice("import", (" os", " re"), 0)])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="a list of task names, found 'piqa'"):
        zero_shot(*mini, tasks="piqa")
