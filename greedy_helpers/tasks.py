"""Zero-shot accuracy on the paper's seven tasks, by EleutherAI's lm-evaluation-harness on the model in memory.

Without a network: :mod:`greedy_helpers.course.choices`.
"""

from __future__ import annotations

import copy
import difflib
import logging
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

PAPER_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
_COLUMNS = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = PAPER_TASKS,
    *,
    limit: int | None = None,
    batch_size: int = 16,
) -> pd.DataFrame:
    """Run tasks of lm_eval on the model in memory, with any sizes per module: it is neither reloaded nor moved.

    lm_eval fetches each task's data set from the Hugging Face Hub, or takes it from the cache. Items that are longer
    than the model's context lose their beginning there (lm_eval warns).

    Args:
        tasks: names of lm_eval's tasks, or paths of YAML files in its format. Default: the paper's seven.
        limit: items per task, the first ones; None: all. Only whole tasks give numbers to compare with others'.

    Returns:
        A row per task and a last one `"mean"`, with `items`, `acc`, `acc_stderr`, `acc_norm`, `acc_norm_stderr`. Shares
        in [0, 1]; NaN where lm_eval defines no length-normalised accuracy for a task (BoolQ, WinoGrande). The means
        are over the tasks that have the number.

    Raises:
        ImportError: lm_eval is not installed.
        ValueError: no tasks, or a name that lm_eval does not have.
        ConnectionError: the data of a task (which is named) is neither cached nor reachable.
    """
    if not tasks or isinstance(tasks, str):
        raise ValueError(f"zero_shot: expected a list of task names, found {tasks!r}")
    check_lm_eval()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logger = logging.getLogger("lm_eval")
    level, was_training, random_state = logger.level, model.training, random.getstate()
    logger.setLevel(logging.ERROR)  # it warns that a model object is not a name
    try:
        # Only for names: reading thousands of files takes long.
        manager = TaskManager(include_defaults=not all(Path(name).is_file() for name in tasks))
        loaded = [task for name in tasks for task in _load_task(manager, name)]
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
            | {column: numbers.get(f"{column},none", math.nan) for column in _COLUMNS}
            for name, numbers in results["results"].items()
        },
        orient="index",
    )
    mean = {"items": table["items"].sum()}
    for column in ("acc", "acc_norm"):
        errors = table[f"{column}_stderr"].dropna()
        mean |= {column: table[column].mean(), f"{column}_stderr": math.hypot(*errors) / max(1, len(errors))}
    table.loc["mean"] = mean
    return table.astype({"items": int})


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
