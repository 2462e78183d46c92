"""Zero-shot accuracy on the paper's seven tasks, by EleutherAI's lm-evaluation-harness on the model in memory.

Without a network: :mod:`greedy_helpers.course.choices`.
"""

from __future__ import annotations

import copy
import difflib
import glob
import json
import logging
import math
import random
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .task_files import Row, hub_rows

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

PAPER_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
_COLUMNS = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = PAPER_TASKS,
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
) -> pd.DataFrame:
    """Run tasks of lm_eval on the model in memory, with any sizes per module: it is neither reloaded nor moved.

    lm_eval fetches each task's data set from the Hugging Face Hub, or takes it from the cache. With `data` the items
    come from local files instead; prompts, choices and metrics are those of lm_eval's own definition either way. Items
    that are longer than the model's context lose their beginning there (lm_eval warns).

    Args:
        tasks: names of lm_eval's tasks, or paths of YAML files in its format. Default: the paper's seven.
        data: folder with the published files of the paper's tasks, see :mod:`greedy_helpers.task_files`.
        limit: items per task, the first ones; None: all. Only whole tasks give numbers to compare with others'.

    Returns:
        A row per task and a last one `"mean"`, with `items`, `acc`, `acc_stderr`, `acc_norm`, `acc_norm_stderr`. Shares
        in [0, 1]; NaN where lm_eval defines no length-normalised accuracy for a task (BoolQ, WinoGrande), and for the
        standard error of one item. The means are over the tasks that have the number.

    Raises:
        ImportError: lm_eval is not installed.
        ValueError: no tasks, or a name that lm_eval does not have; with `data`, a task that is not one of the paper's,
            or a file that is not in its published form.
        FileNotFoundError: `data` lacks a file of a task.
        ConnectionError: the data of a task (which is named) is neither cached nor reachable.
    """
    if not tasks or isinstance(tasks, str):
        raise ValueError(f"zero_shot: expected a list of task names, found {tasks!r}")
    check_lm_eval()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    local = {} if data is None else {name: hub_rows(data, name) for name in tasks}
    logger = logging.getLogger("lm_eval")
    level, was_training, random_state = logger.level, model.training, random.getstate()
    logger.setLevel(logging.ERROR)  # it warns that a model object is not a name
    folder = TemporaryDirectory(ignore_cleanup_errors=True)  # its Arrow files stay open on Windows
    try:
        # Only for names: reading thousands of files takes long.
        manager = TaskManager(include_defaults=not all(Path(name).is_file() for name in tasks))
        named = [on_files(manager, name, local[name], Path(folder.name)) if name in local else name for name in tasks]
        loaded = [task for name in named for task in _load_task(manager, name)]
        results = lm_eval.simple_evaluate(
            # A copy of the tokenizer: HFLM gives it a padding token.
            model=HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size),
            tasks=loaded,
            num_fewshot=0,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            random_seed=None,  # the caller's random state is not lm_eval's to set
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    finally:
        folder.cleanup()
        logger.setLevel(level)
        model.train(was_training)
        random.setstate(random_state)  # lm_eval draws from it
    return _table(results)


def check_lm_eval() -> None:
    """Nothing, if lm_eval can be imported.

    Raises:
        ImportError: with the command that installs it.
    """
    try:
        import lm_eval.models.huggingface
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"zero_shot needs lm_eval: pip install 'greedy-helpers[eval]' ({error}). The questions in "
            "greedy_helpers.course.choices need nothing more"
        ) from error


def _table(results: dict) -> pd.DataFrame:
    table = pd.DataFrame.from_dict(
        {
            name: {"items": results["n-samples"][name]["effective"]}
            | {column: _number(numbers.get(f"{column},none")) for column in _COLUMNS}
            for name, numbers in results["results"].items()
        },
        orient="index",
    )
    mean = {"items": table["items"].sum()}
    for column in ("acc", "acc_norm"):
        errors = table.loc[table[column].notna(), f"{column}_stderr"]
        mean |= {
            column: table[column].mean(),
            f"{column}_stderr": math.hypot(*errors) / len(errors) if len(errors) else math.nan,
        }
    table.loc["mean"] = mean
    return table.astype({"items": int})


def _number(value: float | str | None) -> float:
    """lm_eval writes "N/A" for the standard error of one item."""
    return value if isinstance(value, (int, float)) else math.nan


def on_files(manager: TaskManager, task: str, rows: Sequence[Row], folder: Path) -> str:
    """Path of a task file in `folder`: lm_eval's definition of `task`, with these rows as its only split."""
    items = folder / f"{task}.jsonl"
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "include": str(manager.task_index[task].yaml_path),
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": glob.escape(str(items))}, "cache_dir": str(folder / "cache")},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
    if "query" in rows[0]:  # HellaSwag as lm_eval's process_docs leaves it; a second time would change it
        config["process_docs"] = None
    path = folder / f"{task}.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return str(path)


def _load_task(manager: TaskManager, name: str) -> list:
    """The task objects behind a name (a group has several), with their data."""
    if name not in manager.all_tasks and not Path(name).is_file():
        near = difflib.get_close_matches(name, manager.all_tasks, 3)
        raise ValueError(
            f"zero_shot: lm_eval has no task {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
        )
    try:
        return list(manager.load([name])["tasks"].values())
    except Exception as error:  # datasets raises a different class for each way of being offline
        raise ConnectionError(
            f"zero_shot: the data of the task {name!r} is neither cached nor reachable ({type(error).__name__}: "
            f"{error}). greedy_helpers.course.choices builds tasks that need no network"
        ) from error
