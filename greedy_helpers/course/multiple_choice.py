"""Multiple choice by likelihood: a model picks the choice that it finds most probable after the context.

The scorer of the questions in :mod:`greedy_helpers.course.choices`, which need no network. Its numbers equal those of
lm_eval on the same items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..structure import check_tokens, eval_mode

_COLUMNS = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")


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
        """Which items have the true choice as their likeliest, the first of equals: bool [n]."""
        return _right(self.log_likelihoods, self.answers)

    @property
    def correct_norm(self) -> Tensor:
        """The same by log-likelihood per character (lm_eval's acc_norm): bool [n]."""
        pairs = zip(self.log_likelihoods, self.characters, strict=True)
        return _right([[score / n for score, n in zip(*pair, strict=True)] for pair in pairs], self.answers)

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
        """Standard error of :attr:`acc`: over the draw of the items, the only thing that is random."""
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


def _right(scores: Sequence[Sequence[float]], answers: Sequence[int]) -> Tensor:
    return torch.tensor([max(range(len(s)), key=s.__getitem__) == a for s, a in zip(scores, answers, strict=True)])


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
        TypeError, ValueError: see :func:`~greedy_helpers.structure.check_tokens`.
        FloatingPointError: the model returned NaN or Inf.
    """
    if not items:
        raise ValueError("multiple_choice: expected at least one item, found none")
    rows = _encode(tokenizer, items)
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    owners = [number for number, item in enumerate(items) for _ in item.choices]
    for owner, (ids, n_scored) in zip(owners, rows, strict=True):
        if len(ids) - 1 > limit:
            raise ValueError(
                f"multiple_choice: item {owner} has a choice of {len(ids)} tokens with its context, expected at most "
                f"{limit + 1} for the context of {type(model).__name__}; build shorter items"
            )
        if not 1 <= n_scored < len(ids):
            raise ValueError(f"multiple_choice: item {owner}: {n_scored} of its {len(ids)} tokens are left to score")
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))  # like lengths together: little padding
    sums = torch.zeros(len(rows), dtype=torch.float64)
    with eval_mode(model):
        for batch in torch.tensor(order).split(batch_size):
            sums[batch] = _log_likelihoods(model, [rows[row] for row in batch])
    return ChoiceScores(
        tuple(tuple(part.tolist()) for part in sums.split([len(item.choices) for item in items])),
        tuple(tuple(map(len, item.choices)) for item in items),
        tuple(item.answer for item in items),
    )


def _encode(tokenizer: PreTrainedTokenizerBase, items: Sequence[MultipleChoice]) -> list[tuple[list[int], int]]:
    """(token ids of context + choice, how many of them are scored) for every choice, split where lm_eval splits."""
    pairs = [(item.context, choice) for item in items for choice in item.choices]
    contexts = tokenizer([context.rstrip() for context, _ in pairs], verbose=False)["input_ids"]
    wholes = tokenizer([context + choice for context, choice in pairs], verbose=False)["input_ids"]
    return [
        (context + whole[len(context) :], len(whole) - len(context))
        for context, whole in zip(contexts, wholes, strict=True)
    ]


def _log_likelihoods(model: PreTrainedModel, rows: Sequence[tuple[list[int], int]]) -> Tensor:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row, _ in rows], batch_first=True)
    check_tokens(model, ids[:, : max(2, ids.shape[1] - 1)])  # the last token is never read
    inputs, targets = ids[:, :-1], ids[:, 1:]
    place = torch.arange(targets.shape[1])
    end = torch.tensor([len(row) - 1 for row, _ in rows])[:, None]
    scored = (place < end) & (place >= end - torch.tensor([n for _, n in rows])[:, None])
    logits = model(input_ids=inputs.to(model.device), use_cache=False).logits[scored.to(model.device)]
    log_p = logits.float().log_softmax(-1).gather(1, targets[scored].to(model.device)[:, None])[:, 0].double().cpu()
    if not log_p.isfinite().all():
        raise FloatingPointError(f"multiple_choice: {type(model).__name__} returned NaN or Inf logits")
    return torch.zeros(scored.shape, dtype=torch.float64).masked_scatter(scored, log_p).sum(1)


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


def paired_accuracy(first: ChoiceScores, second: ChoiceScores) -> PairedAccuracy:
    """Compare two models item by item, by acc_norm.

    Raises:
        ValueError: the scores are of different items.
    """
    if (first.answers, first.characters) != (second.answers, second.characters):
        raise ValueError(
            f"paired_accuracy: expected scores of the same items, found {len(first.answers)} and {len(second.answers)} "
            "items with other answers or choices"
        )
    a, b = first.correct_norm, second.correct_norm
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    differing = only_first + only_second
    tail = sum(math.comb(differing, k) for k in range(min(only_first, only_second) + 1)) / 2**differing
    difference = b.double() - a.double()
    return PairedAccuracy(
        difference.mean().item(), _standard_error(difference), only_first, only_second, min(1.0, 2 * tail)
    )
