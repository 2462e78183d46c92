"""Calibration without data (paper, sec. 4 and appendix D): random tokens, and text that the model writes itself."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from .data import prefix_ids, separator_id
from .structure import eval_mode


def random_tokens(vocabulary: int | PreTrainedModel, n: int = 16, seq: int = 128, seed: int = 0) -> Tensor:
    """Uniformly random token ids: long [n, seq] on the CPU.

    What the paper takes Sigma from when there is no data (appendix D): it shows the model's input at its most random.

    Args:
        vocabulary: the number of token ids, or a model.
    """
    if not isinstance(vocabulary, int):
        vocabulary = vocabulary.get_input_embeddings().num_embeddings
    if n < 1 or seq < 2 or vocabulary < 1:
        raise ValueError(f"random_tokens: expected n >= 1, seq >= 2, vocabulary >= 1, found {n}, {seq}, {vocabulary}")
    return torch.randint(vocabulary, (n, seq), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def self_generated_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    n: int = 128,
    seq: int = 128,
    *,
    start: Literal["separator", "random"] = "separator",
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """Text that the model writes itself, to calibrate on when there is no other: long [n, seq] on the CPU.

    Sampled with a KV cache, all windows of a batch side by side. An end-of-text token is a token like any other: what
    follows it is the next document, as in packed text. The draws are made per window, so the batch size changes
    nothing but rounding.

    Args:
        start: what every window starts with: what the tokenizer puts in front of a text, else its separator; or the
            first (if there is a tokenizer) and a random token of the vocabulary.
        temperature: 1 samples from the model's own distribution; lower is less varied.
        top_k: sample among the k likeliest tokens only; None: all.
        seed: of the draws.

    Raises:
        ValueError: longer than the model's context, temperature <= 0, or a separator asked for where there is none.
        FloatingPointError: NaN or Inf in the logits.
    """
    context = getattr(model.config, "max_position_embeddings", None) or seq
    if n < 1 or not 2 <= seq <= context:
        raise ValueError(f"self_generated_tokens: expected n >= 1 and 2 <= seq <= {context}, found n={n}, seq={seq}")
    if not temperature > 0 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"self_generated_tokens: expected temperature > 0 and top_k >= 1, found {temperature} and {top_k}"
        )
    generator = torch.Generator().manual_seed(seed)
    begin = torch.tensor([] if tokenizer is None else prefix_ids(tokenizer), dtype=torch.long).expand(n, -1)
    if start == "separator" and not begin.shape[1]:
        first = None if tokenizer is None else separator_id(tokenizer)
        if first is None:
            raise ValueError("self_generated_tokens: this tokenizer has no separator to start from; use start='random'")
        begin = torch.full((n, 1), first)
    elif start == "random":
        first = torch.randint(model.get_input_embeddings().num_embeddings, (n, 1), generator=generator)
        begin = torch.cat([begin, first], dim=1)
    elif start != "separator":
        raise ValueError(f"self_generated_tokens: expected start 'separator' or 'random', found {start!r}")
    draws = torch.rand(n, seq - begin.shape[1], generator=generator, dtype=torch.float64)
    with eval_mode(model):
        parts = [
            _sample(model, tokens.to(model.device), uniform.to(model.device), temperature, top_k)
            for tokens, uniform in zip(begin.split(batch_size), draws.split(batch_size), strict=True)
        ]
    return torch.cat(parts).cpu()


def forward_cached(
    model: PreTrainedModel, tokens: Tensor, cache: Cache | None = None, **options: int
) -> tuple[Tensor, Cache]:
    """Logits [batch, seq, vocabulary] of `tokens` (long [batch, seq]) behind what is in `cache`, and the longer cache.

    Args:
        cache: what an earlier call returned; it may be extended in place. None: nothing comes before.
        options: further arguments of the model's forward.
    """
    name = _cache_argument(type(model))
    output = model(input_ids=tokens, use_cache=True, **{name: cache}, **options)
    return output.logits, getattr(output, name)


@lru_cache
def _cache_argument(model_class: type[PreTrainedModel]) -> str:
    """What the class's forward calls its KV cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model_class.forward).parameters else "past_key_values"


def _sample(model: PreTrainedModel, tokens: Tensor, draws: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """Continue tokens [batch, k] by a token per column of `draws` (uniform in [0, 1)): inverts the distribution."""
    cache, latest = None, tokens
    for draw in draws.T:
        logits, cache = forward_cached(model, latest, cache)
        logits = logits[:, -1].double() / temperature
        if not logits.isfinite().all():
            raise FloatingPointError(f"self_generated_tokens: {type(model).__name__} returned NaN or Inf logits")
        if top_k is not None and top_k < logits.shape[1]:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
        cumulative = logits.softmax(-1).cumsum(-1)
        latest = torch.searchsorted(cumulative, (draw * cumulative[:, -1])[:, None], right=True)
        latest = latest.clamp(max=logits.shape[1] - 1)
        tokens = torch.cat([tokens, latest], dim=1)
    return tokens
