"""Zero-shot multiple choice: accuracy where the paper reports it, on tasks built from held-out text and on lm_eval's.

A model answers by likelihood: it picks the choice that it finds most probable after the context. Three tasks need no
network:

| task                          | modelled on                   | question                            | chance |
|-------------------------------|-------------------------------|-------------------------------------|--------|
| `continuation_items("code")`  | HellaSwag (arXiv 1905.07830)  | which lines come next?              | 1/4    |
| `continuation_items("prose")` | HellaSwag                     | how does this sentence end?         | 1/4    |
| `identifier_items()`          | WinoGrande (arXiv 1907.10641) | which of two variables stands here? | 1/2    |

Items are text, not token ids: every model answers the same ones, whatever its tokenizer. Where the seven data sets of
the paper are reachable, :func:`zero_shot` runs them with EleutherAI's lm-evaluation-harness (lm_eval) on the model in
memory; :func:`write_lm_eval_task` hands our items to it.
"""

from __future__ import annotations

import ast
import copy
import difflib
import json
import logging
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint import load_tokenizer
from .data import default_sources, documents
from .evaluate import check_tokens

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

PAPER_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")

_CONTEXT = (100, 200)  # characters: about 25 to 64 tokens
_CONTINUATION = (30, 90)  # characters: about 8 to 24 tokens
_SIMILAR = 1.15  # lengths of choices and truth differ by at most this factor
_NEARBY = 12  # distractors are drawn from this many candidates, the nearest in the document
_WORDS = 4  # a sentence is cut where at least this many words are on either side


@dataclass(frozen=True)
class MultipleChoice:
    """One question: which of `choices` goes on after `context`?

    Attributes:
        context: what comes before. By convention without white space at its end: a choice begins with its own.
        choices: two or more texts; `context + choice` is what a model reads.
        answer: index of the true one.

    Raises:
        ValueError: an empty context, fewer than two choices, equal or empty ones, or no such answer.
    """

    context: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        if not self.context.strip():
            raise ValueError(f"MultipleChoice: expected a context to read first, found {self.context!r}")
        if len(self.choices) < 2 or len(set(self.choices)) < len(self.choices) or not all(map(str.strip, self.choices)):
            raise ValueError(f"MultipleChoice: expected two or more different choices, found {self.choices!r}")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"MultipleChoice: expected an answer in [0, {len(self.choices)}), found {self.answer}")


# --- scoring


@dataclass(frozen=True)
class ChoiceScores:
    """What one model makes of a list of items, item by item.

    Attributes:
        log_likelihoods: per item, every choice's log-likelihood, the sum over its tokens, in nats.
        characters: per item, the length of every choice.
        answers: the true choices.
    """

    log_likelihoods: tuple[tuple[float, ...], ...]
    characters: tuple[tuple[int, ...], ...]
    answers: tuple[int, ...]

    @property
    def correct(self) -> Tensor:
        """Which items have the true choice as their likeliest: bool [n]."""
        return torch.tensor(
            [_best(scores) == answer for scores, answer in zip(self.log_likelihoods, self.answers, strict=True)]
        )

    @property
    def correct_norm(self) -> Tensor:
        """The same by log-likelihood per character (lm_eval's acc_norm): bool [n]."""
        per_character = [
            [score / length for score, length in zip(scores, lengths, strict=True)]
            for scores, lengths in zip(self.log_likelihoods, self.characters, strict=True)
        ]
        return torch.tensor(
            [_best(scores) == answer for scores, answer in zip(per_character, self.answers, strict=True)]
        )

    @property
    def acc(self) -> float:
        """Share of :attr:`correct`."""
        return self.correct.double().mean().item()

    @property
    def acc_norm(self) -> float:
        """Share of :attr:`correct_norm`."""
        return self.correct_norm.double().mean().item()

    @property
    def acc_stderr(self) -> float:
        """Standard error of :attr:`acc`: over the draw of the items, the only thing that is random here."""
        return _standard_error(self.correct)

    @property
    def acc_norm_stderr(self) -> float:
        """Standard error of :attr:`acc_norm`."""
        return _standard_error(self.correct_norm)

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing."""
        return sum(1 / len(scores) for scores in self.log_likelihoods) / len(self.log_likelihoods)

    def to_dict(self) -> dict[str, float]:
        """The summary: items, chance, and both accuracies with their standard errors."""
        return {name: getattr(self, name) for name in ("chance", *_COLUMNS)} | {"items": len(self.answers)}


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)  # the first of equals


def _standard_error(values: Tensor) -> float:
    return (values.double().std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan


@torch.no_grad()
def multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[MultipleChoice],
    batch_size: int = 32,
) -> ChoiceScores:
    """Answer `items` by likelihood, without solved examples before them (zero-shot).

    Tokens and numbers are lm_eval's: white space at the end of a context moves to the choice; `context + choice` is
    tokenized as one text, with the special tokens that the tokenizer adds by itself (Llama's begin-of-text; none for
    the embedded models); of its tokens, those behind as many as the context has alone are scored. Rows are padded on
    the right, where a causal model does not look; log-probabilities are taken in float32 and summed in float64, so
    `batch_size` changes nothing but rounding.

    Raises:
        ValueError: no items, an item that is longer than the model's context, or one that leaves nothing to score.
        TypeError, ValueError: see :func:`~greedy_helpers.evaluate.check_tokens`.
        FloatingPointError: the model returned NaN or Inf.
    """
    if not items:
        raise ValueError("multiple_choice: expected at least one item, found none")
    rows = _encode(tokenizer, [(item.context, choice) for item in items for choice in item.choices])
    limit = getattr(model.config, "max_position_embeddings", None)
    owners = [number for number, item in enumerate(items) for _ in item.choices]
    for owner, (ids, n_scored) in zip(owners, rows, strict=True):
        if limit is not None and len(ids) - 1 > limit:
            raise ValueError(
                f"multiple_choice: item {owner} has a choice of {len(ids)} tokens with its context, expected at most "
                f"{limit + 1} for the context of {type(model).__name__}; build shorter items"
            )
        if not 1 <= n_scored < len(ids):
            raise ValueError(f"multiple_choice: item {owner}: {n_scored} of its {len(ids)} tokens are left to score")
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))  # like lengths together: little padding
    sums = [0.0] * len(rows)
    was_training = model.training
    model.eval()
    try:
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            for row, total in zip(batch, _log_likelihoods(model, [rows[row] for row in batch]), strict=True):
                sums[row] = total
    finally:
        model.train(was_training)
    remaining = iter(sums)
    return ChoiceScores(
        tuple(tuple(next(remaining) for _ in item.choices) for item in items),
        tuple(tuple(map(len, item.choices)) for item in items),
        tuple(item.answer for item in items),
    )


def _encode(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """(token ids of context + choice, how many of them are scored) for every pair, split where lm_eval splits."""
    contexts = tokenizer([context.rstrip() for context, _ in pairs], verbose=False)["input_ids"]
    wholes = tokenizer([context + choice for context, choice in pairs], verbose=False)["input_ids"]
    return [
        (context + whole[len(context) :], len(whole) - len(context))
        for context, whole in zip(contexts, wholes, strict=True)
    ]


def _log_likelihoods(model: PreTrainedModel, rows: Sequence[tuple[list[int], int]]) -> list[float]:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row, _ in rows], batch_first=True)
    check_tokens(model, ids[:, : max(2, ids.shape[1] - 1)])  # the last token is never read
    inputs, targets = ids[:, :-1], ids[:, 1:]
    place = torch.arange(targets.shape[1])
    end = torch.tensor([len(row) - 1 for row, _ in rows])[:, None]
    scored = (place < end) & (place >= end - torch.tensor([n for _, n in rows])[:, None])
    logits = model(input_ids=inputs.to(model.device), use_cache=False).logits[scored.to(model.device)]
    found = logits.float().log_softmax(-1).gather(1, targets[scored].to(model.device)[:, None])[:, 0].double().cpu()
    if not found.isfinite().all():
        raise FloatingPointError(f"multiple_choice: {type(model).__name__} returned NaN or Inf logits")
    return torch.zeros(scored.shape, dtype=torch.float64).masked_scatter(scored, found).sum(1).tolist()


@dataclass(frozen=True)
class PairedAccuracy:
    """How two models differ on the same items, where most of the items' own difficulty cancels.

    Attributes:
        difference: accuracy of the second model minus that of the first.
        stderr: its standard error, over the draw of the items: of the per-item differences, not of two accuracies.
        only_first, only_second: items that one model has right and the other has not.
        p_value: exact McNemar test, two-sided: how likely a split of those items at least as uneven is if either model
            were as likely to be the one that is right.
    """

    difference: float
    stderr: float
    only_first: int
    only_second: int
    p_value: float


def paired_accuracy(first: ChoiceScores, second: ChoiceScores, *, normalised: bool = True) -> PairedAccuracy:
    """Compare two models item by item, by acc_norm or (`normalised=False`) by acc.

    Raises:
        ValueError: the scores are of different items.
    """
    if (first.answers, first.characters) != (second.answers, second.characters):
        raise ValueError(
            f"paired_accuracy: expected scores of the same items, found {len(first.answers)} and {len(second.answers)} "
            "items with other answers or choices"
        )
    a, b = (scores.correct_norm if normalised else scores.correct for scores in (first, second))
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    differing = only_first + only_second
    tail = sum(math.comb(differing, k) for k in range(min(only_first, only_second) + 1)) / 2**differing
    difference = b.double() - a.double()
    return PairedAccuracy(
        difference.mean().item(), _standard_error(difference), only_first, only_second, min(1.0, 2 * tail)
    )


# --- lm_eval


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = PAPER_TASKS,
    *,
    limit: int | None = None,
    num_fewshot: int = 0,
    include_path: str | Path | None = None,
    batch_size: int = 16,
) -> pd.DataFrame:
    """Run tasks of lm_eval on the model in memory, with any sizes per module: it is neither reloaded nor moved.

    lm_eval fetches each task's data set from the Hugging Face Hub, or takes it from the cache. Items that are longer
    than the model's context lose their beginning there (lm_eval warns).

    Args:
        tasks: names of lm_eval's tasks, or paths of YAML files as :func:`write_lm_eval_task` writes them. Default:
            the paper's seven.
        limit: items per task, the first ones; None: all. Only whole tasks give numbers to compare with others'.
        num_fewshot: solved examples before each item.
        include_path: a folder with more task files.

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
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            f"zero_shot needs lm_eval: pip install 'greedy-helpers[eval]' ({error}). multiple_choice needs nothing more"
        ) from error
    logger = logging.getLogger("lm_eval")
    level, was_training, random_state = logger.level, model.training, random.getstate()
    logger.setLevel(logging.ERROR)  # it warns that a model object is not a name
    try:
        manager = TaskManager(
            include_path=None if include_path is None else str(include_path),
            include_defaults=not all(Path(name).is_file() for name in tasks),  # reading thousands of files takes long
        )
        loaded = [_load_task(manager, name) for name in tasks]
        # A copy of the tokenizer: HFLM gives it a padding token.
        judge = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        found = lm_eval.simple_evaluate(
            model=judge,
            tasks=[task for tasks_of_name in loaded for task in tasks_of_name],
            num_fewshot=num_fewshot,
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
    rows = {}
    for name, numbers in found["results"].items():
        columns = {column: numbers.get(f"{column},none", math.nan) for column in _COLUMNS}
        rows[name] = {"items": found["n-samples"][name]["effective"]} | columns
    table = pd.DataFrame.from_dict(rows, orient="index")
    mean = {"items": table["items"].sum()}
    for column in ("acc", "acc_norm"):
        errors = table[f"{column}_stderr"].dropna()
        mean |= {column: table[column].mean(), f"{column}_stderr": math.hypot(*errors) / max(1, len(errors))}
    table.loc["mean"] = mean
    return table.astype({"items": int})


_COLUMNS = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")


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
            f"{error}). continuation_items and identifier_items need no network"
        ) from error


def write_lm_eval_task(folder: str | Path, name: str, items: Sequence[MultipleChoice]) -> Path:
    """Write items as a task of lm_eval: `name.jsonl` and `name.yaml`, whose path is returned.

    `zero_shot(model, tokenizer, [path])` runs it, and so does `lm_eval --tasks path`; the accuracies are those of
    :func:`multiple_choice`. The YAML names the data by its absolute path.

    Raises:
        ValueError: no items, or a name that is no file name.
    """
    if not items:
        raise ValueError("write_lm_eval_task: expected at least one item, found none")
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"write_lm_eval_task: expected a name of letters, digits, - and _, found {name!r}")
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data, task = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    data.write_text("".join(json.dumps(asdict(item)) + "\n" for item in items), encoding="utf-8")
    # Fields are named, not written as Jinja templates: those would read the braces of code.
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",  # choices begin with their own white space
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
        "metadata": {"version": 1.0},
    }
    task.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return task
