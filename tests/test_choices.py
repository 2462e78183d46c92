"""Questions from held-out text hide nothing but the answer."""

import random
import re
from collections import Counter

import pytest

from greedy_helpers import load_model
from greedy_helpers.checkpoint import load_tokenizer
from greedy_helpers.course.choices import choice_judge, choice_tasks, continuation_items, identifier_items
from greedy_helpers.course.multiple_choice import multiple_choice
from greedy_helpers.data import documents

SOURCES = {"code": "code", "prose": "prose"}


@pytest.fixture(scope="module")
def tasks():
    return choice_tasks(SOURCES, 60)


@pytest.fixture(scope="module")
def held_out():
    """source -> its documents, white space made single in prose."""
    code, prose = (documents(source, "test")["text"] for source in SOURCES)
    return {"code": list(code), "prose": [" ".join(text.split()) for text in prose]}


@pytest.mark.parametrize("source", SOURCES)
def test_continuations_hide_nothing_but_the_answer(source, tasks, held_out):
    items, texts = tasks[f"{source} choices"], held_out[source]
    assert len(items) == 60
    at_home = 0
    for item in items:
        truth = item.choices[item.answer]
        others = [choice for choice in item.choices if choice != truth]
        homes = [text for text in texts if item.context + truth in text]
        assert homes, item
        assert len({*item.choices}) == 4
        assert not any(item.context + other in text for other in others for text in texts)
        assert not any(other.strip() in item.context for other in others)
        at_home += any(all(other.strip() in text for other in others) for text in homes)
        assert len({choice[: -len(choice.lstrip())] for choice in item.choices}) == 1, "one kind of place"
        lengths = [len(choice.strip()) for choice in item.choices]
        assert 30 <= min(lengths) <= max(lengths) <= 90
        assert all(1 / 1.151 < length / len(truth.strip()) < 1.151 for length in lengths)
    assert at_home >= 48  # short documents borrow from their neighbours
    assert max(Counter(item.answer for item in items).values()) < 30  # of 60: always the same guess is no strategy


def test_code_choices_are_whole_lines_of_one_indentation(tasks, held_out):
    lines = {line.rstrip() for text in held_out["code"] for line in text.split("\n")}
    for choice in (choice for item in tasks["code choices"] for choice in item.choices):
        assert choice.startswith("\n")
        assert lines.issuperset(line.rstrip() for line in choice.split("\n")[1:-1])


def test_items_do_not_share_text(tasks, held_out):
    """Drawn twice as often, no line of a truth would come up in another item's context."""
    for items in tasks.values():
        assert len({item.context + item.choices[item.answer] for item in items}) == len(items)
    longest = [max(item.choices[item.answer].split("\n"), key=len).strip() for item in tasks["code choices"]]
    unique = [line for line in longest if sum(text.count(line) for text in held_out["code"]) == 1]
    assert len(unique) > 30
    assert not any(line in item.context for line in unique for item in tasks["code choices"])


def test_the_seed_decides(tasks):
    assert continuation_items("code", 60) == tasks["code choices"]
    assert identifier_items(60) == tasks["identifiers"]
    assert continuation_items("code", 9, seed=1) != continuation_items("code", 9)


@pytest.mark.parametrize("name", ["llama-mini", "gpt2-mini"])
def test_contexts_end_where_tokens_end(name, tasks):
    tokenizer = load_tokenizer(name)
    for item in (item for items in tasks.values() for item in items):
        context = tokenizer(item.context)["input_ids"]
        for whole in tokenizer([item.context + choice for choice in item.choices])["input_ids"]:
            assert whole[: len(context)] == context, item
            assert len(whole) < 256  # both models' context


def test_identifiers_are_variables_seen_before(tasks, held_out):
    for item in tasks["identifiers"]:
        names = [re.match(r"\s*(\w+)", choice)[1] for choice in item.choices]
        assert len({*names, "self", "cls"}) == 4
        rests = {choice.replace(name, "", 1) for choice, name in zip(item.choices, names, strict=True)}
        assert len(rests) == 1, "the same code follows"
        assert all(re.search(rf"\b{name}\b", item.context) for name in names)
        assert any(item.context + item.choices[item.answer] in text for text in held_out["code"])


def test_no_distractor_stands_in_the_context(monkeypatch):
    """Every third line is the same: the nearest and most alike of all, and in every context."""
    same = "    everywhere(the_same_line, again)"
    lines = [same if i % 3 == 0 else f"    number_{i:03d} = something({i:03d}, {i:03d})" for i in range(300)]
    monkeypatch.setattr("greedy_helpers.course.choices.documents", lambda source, split: {"text": ["\n".join(lines)]})
    for item in continuation_items("code", 15):
        assert same in item.context
        assert sum(same.strip() in choice for choice in item.choices) == (same in item.choices[item.answer])


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
    monkeypatch.setattr("greedy_helpers.course.choices.documents", lambda source, split: {"text": [_FUNCTION]})
    with pytest.raises(ValueError, match="identifier_items: expected 2 places in the held-out split, found 1"):
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
    sentences = ["The " + " ".join(draw.choices(vocabulary, k=14)) + "." for _ in range(180)]
    paragraphs = [" ".join(sentences[i : i + 3]) for i in range(0, 180, 3)]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(paragraphs))
    for item in continuation_items(str(path), 4):
        assert sum(item.context + choice in text for choice in item.choices for text in paragraphs) == 1
    with pytest.raises(ValueError, match=r"text.txt'\): expected 500 places in the held-out split, found \d"):
        continuation_items(str(path), 500)
    for call in (lambda: continuation_items(str(path), 0), lambda: identifier_items(0)):
        with pytest.raises(ValueError, match="expected n >= 1, found 0"):
            call()


def test_judge_of_a_sweep():
    model, tokenizer = load_model("llama-mini")
    items = choice_tasks(SOURCES, 6, seed=2)
    assert list(items) == ["code choices", "prose choices", "identifiers"]
    expected = {label: multiple_choice(model, tokenizer, items[label]).acc_norm for label in items}
    assert choice_judge(6, seed=2)("llama-mini")(model) == expected
