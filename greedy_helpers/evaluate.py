"""How good a model is: perplexity, text. What it costs is in cost.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import Split, documents, separator_id
from .structure import check_tokens, input_device


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
    check_tokens(model, tokens)
    was_training = model.training
    model.eval()
    try:
        for batch in tokens.split(batch_size):
            batch = batch.to(input_device(model))
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            losses = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten().long(), reduction="none")
            if not losses.isfinite().all():
                raise FloatingPointError(f"perplexity: {type(model).__name__} returned NaN or Inf logits")
            yield losses.double().view(len(batch), -1).cpu()
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class Text:
    """A text as one stream of tokens that remembers where each token comes from.

    Attributes:
        ids: long [t]: the documents end to end, each behind a separator (where the tokenizer has one).
        document: long [t], the number of the document.
        size: long [t], how many bytes of the document's UTF-8 the token stands for (separators: 0).
    """

    ids: Tensor
    document: Tensor
    size: Tensor


def read_text(tokenizer: PreTrainedTokenizerBase, source: str = "code", split: Split = "test") -> Text:
    """One side of a text source (see :mod:`greedy_helpers.data`), tokenized once and ready to be scored.

    Raises:
        ValueError: the tokenizer cannot say which characters a token stands for (only "fast" tokenizers can).
            Otherwise as :func:`~greedy_helpers.data.documents`.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"read_text: expected a fast tokenizer, which counts characters; found {type(tokenizer)}")
    separator = separator_id(tokenizer)
    ids, document, size = [], [], []
    for number, text in enumerate(documents(source, split)["text"]):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in encoded["offset_mapping"]]
        if not ends:
            continue
        # What a token stands for begins where the one before it ended (offsets may leave blanks out), and the last
        # takes what is left. A character that is spread over several tokens counts with the first of them.
        ends[-1] = len(text)
        ends = torch.tensor(ends).cummax(0).values
        bytes_up_to = torch.tensor([0, *accumulate(len(character.encode("utf-8", "replace")) for character in text)])
        head = [] if separator is None else [separator]
        ids.append(torch.tensor(head + encoded["input_ids"]))
        size.append(bytes_up_to[ends].diff(prepend=torch.zeros(1 + len(head), dtype=torch.long)))
        document.append(torch.full((len(ids[-1]),), number))
    if not ids:
        raise ValueError(f"read_text: no text in split {split!r} of {source!r}")
    return Text(torch.cat(ids), torch.cat(document), torch.cat(size))


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text, with all that has to be said beside the number.

    Attributes:
        seq, stride, windows: how the text was cut, see :func:`evaluate_text`.
        clusters: what the standard error treats as independent: `"documents"`, or `"windows"` where there are fewer
            than ten documents.
        nats, targets, size: per cluster: summed negative log-likelihood (float64), predicted tokens, and their bytes.
    """

    seq: int
    stride: int
    windows: int
    clusters: Literal["documents", "windows"]
    nats: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    size: Tensor = field(repr=False)

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
    def bits_per_byte(self) -> float:
        """Bits needed per byte of text: comparable between tokenizers, which perplexity per token is not."""
        return (self.nats.sum() / self.size.sum()).item() / math.log(2)

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
        if not (self.targets.equal(other.targets) and self.size.equal(other.size)):
            raise ValueError("TextScore.minus: expected two scores of the same windows of the same text")
        return self.loss - other.loss, _bootstrap(self.nats - other.nats, self.targets)

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.2f} +- {self.perplexity_error:.2f}, {self.bits_per_byte:.3f} bits per byte "
            f"({self.tokens:,} tokens in {self.windows} windows of {self.seq}, stride {self.stride}; "
            f"{len(self.nats)} {self.clusters})"
        )

    def to_dict(self) -> dict[str, float | int | str]:
        """The numbers, without the tensors: ready for JSON."""
        names = "perplexity perplexity_error bits_per_byte loss loss_error tokens windows seq stride clusters"
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

    Args:
        seq: tokens per window; windows: how many, evenly spaced, None for all.

    Raises:
        ValueError: a stride outside [1, seq], a text shorter than one window or than `windows` of them; and as
            :func:`perplexity`.
    """
    stride = seq if stride is None else stride
    if not 1 <= stride <= seq or seq < 2:
        raise ValueError(f"evaluate_text: expected seq >= 2 and a stride in [1, seq], found seq={seq}, stride={stride}")
    available = max(0, (len(text.ids) - seq) // stride + 1)
    n = available if windows is None else windows
    if not 1 <= n <= available:
        raise ValueError(
            f"evaluate_text: expected 1 <= windows <= {available}, as many as {len(text.ids)} tokens hold at seq={seq} "
            f"and stride={stride}, found windows={windows}"
        )
    starts = torch.arange(n) * available // n * stride
    places = starts[:, None] + torch.arange(seq)  # [n, seq]
    counted = torch.zeros(n, seq - 1, dtype=torch.bool)
    counted[:, -min(stride, seq - 1) :] = True
    counted[starts == 0] = True
    losses = torch.cat(list(token_losses(model, text.ids[places], batch_size)))[counted]
    targets = places[:, 1:][counted]
    clusters = text.document[targets].unique(return_inverse=True)[1]
    kind: Literal["documents", "windows"] = "documents"
    if clusters.max() < 9:
        kind, clusters = "windows", torch.arange(n)[:, None].expand(n, seq - 1)[counted]
    size = clusters.bincount(text.size[targets]).long()
    return TextScore(seq, stride, n, kind, clusters.bincount(losses), clusters.bincount(), size)


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

    Stops at the end-of-text token, after `max_new_tokens`, or where the model's context ends.

    Raises:
        ValueError: a prompt of no token, or one that fills the context.
    """
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(input_device(model))
    n_prompt = encoded["input_ids"].shape[1]
    if n_prompt == 0:
        raise ValueError("generate_text: expected a prompt of at least one token, found an empty one")
    context = getattr(model.config, "max_position_embeddings", n_prompt + max_new_tokens)
    if n_prompt >= context:
        raise ValueError(f"generate_text: expected a prompt shorter than the context of {context}, found {n_prompt}")
    if temperature > 0:
        torch.manual_seed(seed)
    output = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=min(max_new_tokens, context - n_prompt),
        repetition_penalty=repetition_penalty,
        pad_token_id=tokenizer.eos_token_id,
        **({"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}),
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)
