"""The published files of the paper's seven tasks, as rows with the columns that lm_eval's task definitions read.

lm_eval's definitions name columns of the Hub's copies. The files that the data sets' authors publish hold the same
items under other names:

| task            | file below the folder             | what it is                                                |
|-----------------|-----------------------------------|-----------------------------------------------------------|
| `arc_easy`      | `arc/ARC-Easy-Test.jsonl`         | test split of ARC-V1-Feb2018                              |
| `arc_challenge` | `arc/ARC-Challenge-Test.jsonl`    | the same                                                  |
| `boolq`         | `boolq/val.jsonl`                 | validation split of SuperGLUE's BoolQ                     |
| `hellaswag`     | `hellaswag/hellaswag_val*.jsonl`  | validation split, or a part of it; also in OLMES's form   |
| `openbookqa`    | `openbookqa/test.jsonl`           | test split, main                                          |
| `piqa`          | `piqa/valid.jsonl`, `valid-labels.lst` | validation split                                     |
| `winogrande`    | `winogrande/dev.jsonl`            | validation split of winogrande_1.1                        |
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

Row = dict[str, object]


def _of_arc(row: Row) -> Row:
    return {"question": row["question"]["stem"], **_choices(row)}


def _of_openbookqa(row: Row) -> Row:
    return {"question_stem": row["question"]["stem"], **_choices(row)}


def _choices(row: Row) -> Row:
    choices = row["question"]["choices"]
    columns = {key: [choice[key] for choice in choices] for key in ("text", "label")}
    return {"choices": columns, "answerKey": row["answerKey"]}


def _of_boolq(row: Row) -> Row:
    return {"passage": row["passage"], "question": row["question"], "label": int(row["label"])}


def _of_hellaswag(row: Row) -> Row:
    """The published columns, or those that lm_eval makes of them where a file (OLMES's form) has only these."""
    if "ctx_a" in row:
        return {key: row[key] for key in ("activity_label", "ctx_a", "ctx_b", "endings")} | {"label": str(row["label"])}
    return {"query": row["query"], "choices": row["choices"], "label": str(row["gold"])}


def _same(*columns: str) -> Callable[[Row], Row]:
    return lambda row: {column: row[column] for column in columns}


FILES: dict[str, tuple[tuple[str, ...], Callable[[Row], Row]]] = {
    "arc_easy": (("arc/ARC-Easy-Test.jsonl",), _of_arc),
    "arc_challenge": (("arc/ARC-Challenge-Test.jsonl",), _of_arc),
    "boolq": (("boolq/val.jsonl",), _of_boolq),
    "hellaswag": (("hellaswag/hellaswag_val*.jsonl",), _of_hellaswag),
    "openbookqa": (("openbookqa/test.jsonl",), _of_openbookqa),
    "piqa": (("piqa/valid.jsonl", "piqa/valid-labels.lst"), _same("goal", "sol1", "sol2", "label")),
    "winogrande": (("winogrande/dev.jsonl",), _same("sentence", "option1", "option2", "answer")),
}


def task_files(folder: str | Path, task: str) -> list[Path]:
    """The files of one task below `folder`: items first, then labels where they are in a file of their own.

    Raises:
        ValueError: no task of :data:`FILES`, or several files where one is expected.
        FileNotFoundError: a file is not there.
    """
    if task not in FILES:
        raise ValueError(f"zero_shot: published files are read for {', '.join(FILES)}; found the task {task!r}")
    paths = []
    for pattern in FILES[task][0]:
        found = sorted(Path(folder).glob(pattern))
        if not found:
            raise FileNotFoundError(f"zero_shot: expected the data of {task!r} in {Path(folder) / pattern}, found none")
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"zero_shot: expected one file {Path(folder) / pattern}, found {names}")
        paths += found
    return paths


def hub_rows(folder: str | Path, task: str) -> list[Row]:
    """The items of one task, in the order of its file, with the columns of the Hub's copy that lm_eval reads.

    Raises:
        As :func:`task_files`. ValueError: a file that is not in its published form (named, with the line).
    """
    path, *labels = task_files(folder, task)
    rows = []
    for number, line in enumerate(_lines(path), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"zero_shot: {path}, line {number}: expected a JSON object ({error})") from error
    for label_path in labels:
        answers = _lines(label_path)
        if len(answers) != len(rows) or not set(answers) <= {"0", "1"}:
            raise ValueError(
                f"zero_shot: expected a line 0 or 1 in {label_path} for each of the {len(rows)} items of {path.name}, "
                f"found {len(answers)} lines of {', '.join(sorted(set(answers))[:4])}"
            )
        rows = [row | {"label": int(answer)} for row, answer in zip(rows, answers, strict=True)]
    if not rows:
        raise ValueError(f"zero_shot: expected items in {path}, found an empty file")
    converted = []
    for number, row in enumerate(rows, 1):
        try:
            converted.append(FILES[task][1](row))
        except (KeyError, TypeError, ValueError) as error:
            found = ", ".join(row) if isinstance(row, dict) else repr(row)[:80]
            raise ValueError(
                f"zero_shot: {path}, line {number}: expected an item of {task!r} in its published form, "
                f"found {found} ({type(error).__name__}: {error})"
            ) from error
    return converted


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text("utf-8").split("\n") if line.strip()]  # not at U+2028, as splitlines
    except UnicodeDecodeError as error:
        raise ValueError(f"zero_shot: {path} is not utf-8 ({error})") from error
