"""lm_eval's own tasks on the published files: the requests are those that the Hub's rows give."""

import json

import pytest

from greedy_helpers import load_model
from greedy_helpers.__main__ import main
from greedy_helpers.task_files import FILES, hub_rows, task_files
from greedy_helpers.tasks import PAPER_TASKS, on_files, zero_shot

ARC = [
    {
        "id": "x_1",
        "question": {
            "stem": "Which is a metal?",
            "choices": [{"text": "iron", "label": "A"}, {"text": "wood", "label": "B"}, {"text": "ice", "label": "C"}],
        },
        "answerKey": "A",
    },
    {
        "id": "x_2",
        "question": {"stem": "What floats?", "choices": [{"text": f"thing {i}", "label": str(i)} for i in range(1, 6)]},
        "answerKey": "4",
    },
]
ARC_ON_THE_HUB = [
    {
        "id": "x_1",
        "question": "Which is a metal?",
        "choices": {"text": ["iron", "wood", "ice"], "label": ["A", "B", "C"]},
        "answerKey": "A",
    },
    {
        "id": "x_2",
        "question": "What floats?",
        "choices": {
            "text": ["thing 1", "thing 2", "thing 3", "thing 4", "thing 5"],
            "label": ["1", "2", "3", "4", "5"],
        },
        "answerKey": "4",
    },
]
BOOK = {
    "id": "8-1",
    "question": {
        "stem": "Plants need",
        "choices": [{"text": t, "label": k} for t, k in zip(("sun", "tin"), "AB", strict=True)],
    },
    "answerKey": "A",
}
WINO = {"sentence": "Ann thanked Bea because _ had helped.", "option1": "Ann", "option2": "Bea", "answer": "2"}
SWAG = {
    "ind": 7,
    "activity_label": "Pets",
    "ctx_a": "How to wash a dog [title] Fill the tub. [step] Use warm water.",
    "ctx_b": "then",
    "ctx": "unused",
    "split": "val",
    "split_type": "indomain",
    "endings": ["[substeps] Call the dog.", "Go  home.", "Sing [loudly].", "Wait. [title] Rinse."],
    "source_id": "wikihow~1",
}
PASSAGE = {"question": "is tin a metal", "passage": "Tin -- Tin is {{ a metal }} \u2028 of old.", "idx": 0}
SOLUTIONS = {"goal": "Open a jar", "sol1": "twist the lid", "sol2": "sing to it"}

PUBLISHED = {
    "arc_easy": {"arc/ARC-Easy-Test.jsonl": ARC},
    "arc_challenge": {"arc/ARC-Challenge-Test.jsonl": ARC[::-1]},
    "boolq": {"boolq/val.jsonl": [PASSAGE | {"label": True}, PASSAGE | {"label": False}]},
    "hellaswag": {"hellaswag/hellaswag_val.jsonl": [SWAG | {"label": 3}]},
    "openbookqa": {"openbookqa/test.jsonl": [BOOK]},
    "piqa": {"piqa/valid.jsonl": [SOLUTIONS] * 2, "piqa/valid-labels.lst": [1, 0]},
    "winogrande": {"winogrande/dev.jsonl": [WINO, WINO | {"answer": "1"}]},
}
# The same items as their data sets' pages on the Hub show them: (split that lm_eval evaluates, rows).
HUB = {
    "arc_easy": ("test", ARC_ON_THE_HUB),
    "arc_challenge": ("test", ARC_ON_THE_HUB[::-1]),
    "boolq": ("validation", [PASSAGE | {"label": 1}, PASSAGE | {"label": 0}]),
    "hellaswag": ("validation", [SWAG | {"label": "3"}]),
    "openbookqa": (
        "test",
        [
            {
                "id": "8-1",
                "question_stem": "Plants need",
                "choices": {"text": ["sun", "tin"], "label": ["A", "B"]},
                "answerKey": "A",
            }
        ],
    ),
    "piqa": ("validation", [SOLUTIONS | {"label": 1}, SOLUTIONS | {"label": 0}]),
    "winogrande": ("validation", [WINO, WINO | {"answer": "1"}]),
}


def publish(folder, files):
    for name, rows in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


@pytest.fixture
def folder(tmp_path):
    for files in PUBLISHED.values():
        publish(tmp_path, files)
    return tmp_path


@pytest.fixture(scope="module")
def manager():
    pytest.importorskip("lm_eval", reason="needs greedy-helpers[eval]: make test EXTRAS=dev,lab,eval")
    from lm_eval.tasks import TaskManager

    return TaskManager()


def requests_of(manager, task):
    """What lm_eval asks the model and how it counts the answers."""
    (built,) = manager.load([str(task)])["tasks"].values()
    built.build_all_requests()
    asked = [instance.args for instance in built.instances]
    return asked, [built.doc_to_target(doc) for doc in built.eval_docs], built.config.metric_list, built.config.task


def on_the_hub(manager, monkeypatch, task):
    """The official task, its data set answered by hand with every split that its definition names."""
    from datasets import Dataset, load_dataset

    split, rows = HUB[task]
    other = dict.fromkeys(("train", "validation", "test"), Dataset.from_list(rows[:1]))

    def answer(path, **options):
        if path == "json":
            return load_dataset(path, **options)
        return other | {split: Dataset.from_list(rows)}

    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", answer)
    return requests_of(manager, task)


@pytest.mark.parametrize("task", PAPER_TASKS)
def test_the_requests_are_those_of_the_hubs_rows(task, manager, monkeypatch, folder, tmp_path_factory):
    official = on_the_hub(manager, monkeypatch, task)
    path = on_files(manager, task, hub_rows(folder, task), tmp_path_factory.mktemp("tasks"))
    assert len(official[1]) == len(HUB[task][1])
    assert requests_of(manager, path) == official


def test_hellaswag_in_olmes_form(manager, monkeypatch, tmp_path):
    """Contexts and endings as process_docs leaves them, with the blank that it leaves where a bracket was."""
    official = on_the_hub(manager, monkeypatch, "hellaswag")
    query = "Pets: How to wash a dog. Fill the tub. Use warm water. Then"
    row = {"ind": 7, "query": query, "choices": [" Call the dog.", "Go home.", "Sing .", "Wait.. Rinse."], "gold": 3}
    publish(tmp_path, {"hellaswag/hellaswag_val_olmes1000.jsonl": [row]})
    assert requests_of(manager, on_files(manager, "hellaswag", hub_rows(tmp_path, "hellaswag"), tmp_path)) == official


def test_accuracies_from_a_folder(manager, monkeypatch, folder, capsys):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **given: manager)
    table = zero_shot(*load_model("llama-mini"), ["piqa", "arc_easy"], data=folder)
    assert list(table.index) == ["piqa", "arc_easy", "mean"]
    assert list(table["items"]) == [2, 2, 4]
    assert table.loc["piqa", "acc"] == 0.5  # the same item twice, with both answers

    text = ["--windows", "1", "--seq", "16", "--sources", "prose"]
    assert main(["--json", "evaluate", "llama-mini", *text, "--tasks", "piqa", "--data", str(folder)]) == 0
    found = json.loads(capsys.readouterr().out)["llama-mini"]["tasks"]
    assert found["piqa"] == table.loc["piqa"].to_dict()


@pytest.mark.parametrize(
    ("task", "file", "content", "error", "message"),
    [
        ("boolq", "boolq/val.jsonl", None, FileNotFoundError, r"expected the data of 'boolq' in .*val\.jsonl, found n"),
        ("piqa", "piqa/valid-labels.lst", None, FileNotFoundError, r"valid-labels\.lst, found none"),
        ("piqa", "piqa/valid-labels.lst", "1\n", ValueError, r"valid-labels\.lst for each of the 2 items .* found 1 l"),
        ("piqa", "piqa/valid-labels.lst", "1\n2\n", ValueError, r"expected a line 0 or 1 .* found 2 lines of 1, 2"),
        ("boolq", "boolq/val.jsonl", "", ValueError, r"expected items in .*val\.jsonl, found an empty file"),
        ("boolq", "boolq/val.jsonl", '{"a": 1}\n{', ValueError, r"val\.jsonl, line 2: expected a JSON object"),
        (
            "boolq",
            "boolq/val.jsonl",
            "[1]",
            ValueError,
            r"val\.jsonl, line 1: expected an item of 'boolq' .* found \[",
        ),
        ("arc_easy", "arc/ARC-Easy-Test.jsonl", '{"query": 1}', ValueError, r"Easy.*line 1: .* found query \(KeyError"),
        ("winogrande", "winogrande/dev.jsonl", '{"sentence": 1}', ValueError, r"line 1: .* \(KeyError: 'option1'\)"),
        (
            "hellaswag",
            "hellaswag/hellaswag_val_2.jsonl",
            "",
            ValueError,
            r"expected one file .*val\.jsonl, hell",
        ),
        ("sciq", "sciq.jsonl", "", ValueError, r"published files are read for arc_easy, .*; found the task 'sciq'"),
    ],
)
def test_refused_files(task, file, content, error, message, folder):
    pytest.importorskip("lm_eval")
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(error, match=message):
        zero_shot(None, None, [task], data=folder)


def test_every_paper_task_has_files(folder):
    assert set(FILES) == set(PAPER_TASKS)
    assert [path.name for path in task_files(folder, "piqa")] == ["valid.jsonl", "valid-labels.lst"]
