"""How good a model is: perplexity, text. What it costs is in cost.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .data import Split, documents, prefix_ids, separator_id
from .structure import check_tokens, eval_mode, input_device


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: Tensor, batch_size: int = 16) -> float:
    """exp of the mean negative log-likelihood over the n * (seq - 1) targets of non-overlapping windows.

    Each window of `tokens` (long [n, seq]) starts with an empty context, so the number depends on seq: quote it.
    Log-probabilities are taken in float32 whatever the model's dtype and summed in float64, so the result does not
    depend on `batch_size` beyond rounding.

    Raises:
        TypeError, ValueError: see :func:`check_tokens`.
        FloatingPointError: the model returned NaN or Inf.
    """
    total = sum(losses.sum().item() for losses in token_losses(model, tokens, batch_size))
    return math.exp(total / (tokens.shape[0] * (tokens.shape[1] - 1)))


@torch.no_grad()
def token_losses(model: PreTrainedModel, tokens: Tensor, batch_size: int = 16) -> Iterator[Tensor]:
    """Negative log-likelihood in nats of every token but the first of each window, batch by batch.

    float64 [batch, seq - 1] on the CPU, from float32 log-probabilities. A model in training mode is back in it when
    the last batch has been taken.

    Raises:
        As :func:`perplexity`.
    """
    check_tokens(model, tokens, packed=True)
    with eval_mode(model):
        for batch in tokens.split(batch_size):
            batch = batch.to(input_device(model))
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            losses = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten().long(), reduction="none")
            if not losses.isfinite().all():
                raise FloatingPointError(f"perplexity: {type(model).__name__} returned NaN or Inf logits")
            yield losses.double().view(len(batch), -1).cpu()


@dataclass(frozen=True)
class Text:
    """A text as one stream of tokens that remembers where each token comes from.

    Attributes:
        ids: long [t]: the documents end to end, each behind a separator (where the tokenizer has one).
        document: long [t], the number of the document.
        size: long [t], how many bytes of the document's UTF-8 the token stands for (separators: 0); None if the
            tokenizer cannot say.
        prefix: ids and names of the tokens that every window starts with, as the tokenizer's texts do.
    """

    ids: Tensor
    document: Tensor
    size: Tensor | None
    prefix: Sequence[tuple[int, str]] = ()


def read_text(
    tokenizer: PreTrainedTokenizerBase, source: str = "code", split: Split = "test", column: str = "text"
) -> Text:
    """One side of a text source (see :mod:`greedy_helpers.data`), tokenized once and ready to be scored.

    Only "fast" tokenizers say which characters a token stands for: with another there are no bits per byte.

    Raises:
        TypeError: no tokenizer. Otherwise as :func:`~greedy_helpers.data.documents`.
    """
    prefix = prefix_ids(tokenizer)
    separator = separator_id(tokenizer)
    head = [] if separator is None else [separator]
    ids, document, size = [], [], []
    for number, text in enumerate(documents(source, split, column, tokenizer)["text"]):
        if not text:
            continue
        offsets = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
        encoded = tokenizer(text, add_special_tokens=False, verbose=False, **offsets)
        if not encoded["input_ids"]:
            continue
        ids.append(torch.tensor(head + encoded["input_ids"]))
        document.append(torch.full((len(ids[-1]),), number))
        if tokenizer.is_fast:
            size += [torch.zeros(len(head), dtype=torch.long), _bytes_of(text, encoded["offset_mapping"])]
    if not ids:
        raise ValueError(f"read_text: no text in split {split!r} of {source!r}")
    names = [(token, tokenizer.convert_ids_to_tokens(token)) for token in prefix]
    return Text(torch.cat(ids), torch.cat(document), torch.cat(size) if size else None, names)


def _bytes_of(text: str, offsets: Sequence[tuple[int, int]]) -> Tensor:
    """How many bytes of the UTF-8 of `text` each token stands for: long [t].

    A token begins where the one before it ended (offsets may leave blanks out), and the last takes what is left. A
    character that is spread over several tokens counts with the first of them.
    """
    ends = torch.tensor([end for _, end in offsets[:-1]] + [len(text)]).cummax(0).values
    bytes_up_to = torch.tensor([0, *accumulate(len(character.encode("utf-8", "replace")) for character in text)])
    return bytes_up_to[ends].diff(prepend=torch.zeros(1, dtype=torch.long))


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text, with all that has to be said beside the number.

    Attributes:
        seq, stride, windows: how the text was cut, see :func:`evaluate_text`.
        clusters: what the standard error treats as independent: `"documents"`, or `"windows"` where there are fewer
            than ten documents.
        nats, targets, size: per cluster: summed negative log-likelihood (float64), predicted tokens, and their bytes
            (None if the tokenizer does not count them).
        prefix: the tokens that every window starts with, in words; none of them is predicted.
    """

    seq: int
    stride: int
    windows: int
    clusters: Literal["documents", "windows"]
    nats: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    size: Tensor | None = field(repr=False)
    prefix: str = ""

    @property
    def tokens(self) -> int:
        """How many tokens were predicted."""
        return int(self.targets.sum())

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood in nats per token."""
        return (self.nats.sum() / self.targets.sum()).item()

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits needed per byte of text: comparable between tokenizers, which perplexity per token is not.

        None if the tokenizer does not say how many bytes its tokens stand for.
        """
        return None if self.size is None else (self.nats.sum() / self.size.sum()).item() / math.log(2)

    @property
    def loss_error(self) -> float:
        """Standard error of the loss, in nats per token: what another sample of such documents would change."""
        return _bootstrap(self.nats, self.targets)

    @property
    def perplexity_error(self) -> float:
        """Standard error of the perplexity (first order)."""
        return self.perplexity * self.loss_error

    def minus(self, other: TextScore) -> tuple[float, float]:
        """Difference of the losses in nats per token, and its standard error on the *same* documents.

        Much smaller than the errors of both: a hard document is hard for either model.

        Raises:
            ValueError: the two were not scored on the same tokens.
        """
        sizes = [score.targets if score.size is None else score.size for score in (self, other)]
        if not (self.targets.equal(other.targets) and sizes[0].equal(sizes[1])):
            raise ValueError("TextScore.minus: expected two scores of the same windows of the same text")
        return self.loss - other.loss, _bootstrap(self.nats - other.nats, self.targets)

    def __str__(self) -> str:
        bits = "" if self.size is None else f", {self.bits_per_byte:.3f} bits per byte"
        start = f", each behind {self.prefix}" if self.prefix else ""
        return (
            f"perplexity {self.perplexity:.2f} +- {self.perplexity_error:.2f}{bits} ({self.tokens:,} tokens in "
            f"{self.windows} windows of {self.seq}{start}, stride {self.stride}; {len(self.nats)} {self.clusters})"
        )

    def to_dict(self) -> dict[str, float | int | str | None]:
        """The numbers, without the tensors: ready for JSON."""
        names = "perplexity perplexity_error bits_per_byte loss loss_error tokens windows seq stride clusters prefix"
        return {name: getattr(self, name) for name in names.split()}


def _bootstrap(values: Tensor, weights: Tensor, draws: int = 2000) -> float:
    """Standard error of sum(values) / sum(weights) when the entries are drawn again with replacement."""
    n = len(values)
    generator = torch.Generator().manual_seed(0)
    counts = torch.stack([torch.randint(n, (n,), generator=generator).bincount(minlength=n) for _ in range(draws)])
    counts = counts.double()
    return ((counts @ values) / (counts @ weights.double())).std().item()


def evaluate_text(
    model: PreTrainedModel,
    text: Text,
    seq: int = 256,
    stride: int | None = None,
    windows: int | None = None,
    batch_size: int = 16,
) -> TextScore:
    """Perplexity, bits per byte and standard errors of a text at a declared sequence length and stride.

    With `stride == seq` (the default) windows do not overlap and each starts with an empty context, as in
    :func:`perplexity`, whose number this gives. With a shorter stride windows overlap and only the last `stride`
    tokens of each are counted (of the first window: all), so that every counted token has at least `seq - stride`
    tokens of context: a lower number for the same model.

    A window starts with the text's prefix, where its tokenizer has one. The prefix counts in `seq`, and so it shortens
    the longest stride, but it is never predicted.

    Args:
        seq: tokens per window; windows: how many, evenly spaced, None for all.

    Raises:
        TypeError: no :class:`Text`.
        ValueError: see :func:`window_starts`; and as :func:`perplexity`.
    """
    starts, stride = window_starts(text, seq, stride, windows)
    n, prefix = len(starts), torch.tensor([token for token, _ in text.prefix], dtype=torch.long)
    body = seq - len(prefix)
    n_targets = min(body, seq - 1)  # of a window: its first token has no context
    places = starts[:, None] + torch.arange(body)
    counted = torch.zeros(n, n_targets, dtype=torch.bool)
    counted[:, -min(stride, n_targets) :] = True
    counted[starts == 0] = True
    losses = token_losses(model, torch.cat([prefix.expand(n, -1), text.ids[places]], dim=1), batch_size)
    losses = torch.cat(list(losses))[:, -n_targets:][counted]
    targets = places[:, -n_targets:][counted]
    clusters = text.document[targets].unique(return_inverse=True)[1]
    kind: Literal["documents", "windows"] = "documents"
    if clusters.max() < 9:
        kind, clusters = "windows", torch.arange(n)[:, None].expand(n, n_targets)[counted]
    size = None if text.size is None else clusters.bincount(text.size[targets]).long()
    name = " ".join(name for _, name in text.prefix)
    return TextScore(seq, stride, n, kind, clusters.bincount(losses), clusters.bincount(), size, name)


def window_starts(text: Text, seq: int, stride: int | None = None, windows: int | None = None) -> tuple[Tensor, int]:
    """Where the windows of :func:`evaluate_text` start in the text, long [n], and the stride that this is.

    Raises:
        TypeError: no :class:`Text`.
        ValueError: a stride outside [1, seq], a text shorter than one window or than `windows` of them.
    """
    if not isinstance(text, Text):
        raise TypeError(f"evaluate_text: expected a Text, as read_text returns it, found {type(text).__name__}")
    stride, body = seq if stride is None else stride, seq - len(text.prefix)
    if not 1 <= stride <= seq or seq < 2 or body < 1:
        raise ValueError(
            f"evaluate_text: expected seq >= {max(2, len(text.prefix) + 1)} and a stride in [1, seq], found seq={seq}, "
            f"stride={stride}"
        )
    stride = min(stride, body)
    available = max(0, (len(text.ids) - body) // stride + 1)
    n = available if windows is None else windows
    if not 1 <= n <= available:
        raise ValueError(
            f"evaluate_text: expected 1 <= windows <= {available}, as many as {len(text.ids)} tokens hold at seq={seq} "
            f"and stride={stride}, found windows={windows}"
        )
    return torch.arange(n) * available // n * stride, stride


@torch.no_grad()
def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 48,
    *,
    temperature: float = 0.0,
    repetition_penalty: float = 1.1,
    seed: int = 0,
) -> str:
    """`prompt` and what the model writes after it. Temperature 0 is greedy decoding, the same on every run.

    Stops at the end-of-text token, after `max_new_tokens`, or where the model's context ends. What the tokenizer puts
    in front of a text (a begin-of-text token) stands in front of the prompt, and is not returned.

    Raises:
        TypeError: no tokenizer.
        ValueError: a prompt of no token, or one that fills the context.
    """
    ids = prompt_ids(model.config, tokenizer, prompt)
    n_prompt, prefix = len(ids), prefix_ids(tokenizer)
    context = getattr(model.config, "max_position_embeddings", n_prompt + max_new_tokens)
    if temperature > 0:
        torch.manual_seed(seed)
    tokens = torch.tensor([ids], device=input_device(model))
    output = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=min(max_new_tokens, context - n_prompt),
        repetition_penalty=repetition_penalty,
        pad_token_id=tokenizer.eos_token_id,
        **({"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}),
    )
    return tokenizer.decode(output[0, len(prefix) :], skip_special_tokens=True)


def prompt_ids(config: PreTrainedConfig | None, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The tokens that :func:`generate_text` goes on from: the prompt behind what the tokenizer puts in front of a text.

    Raises:
        TypeError: no tokenizer.
        ValueError: a prompt of no token, or one that fills the context that the config (if there is one) names.
    """
    prefix, ids = prefix_ids(tokenizer), tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError("generate_text: expected a prompt of at least one token, found an empty one")
    if ids[: len(prefix)] != prefix:  # a chat template has written it already
        ids = prefix + ids
    context = getattr(config, "max_position_embeddings", len(ids) + 1)
    if len(ids) >= context:
        raise ValueError(f"generate_text: expected a prompt shorter than the context of {context}, found {len(ids)}")
    return ids
