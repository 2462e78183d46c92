"""How good, how large and how fast a model is: perplexity, parameters, bytes on disk, latency, text."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .structure import blocks_of


def check_tokens(model: PreTrainedModel, tokens: Tensor) -> None:
    """Refuse token ids the model cannot read, before any work is done.

    Raises:
        TypeError: not an integer tensor.
        ValueError: not of shape [n, seq] with seq >= 2, empty, longer than the model's context, or ids outside the
            vocabulary.
    """
    if tokens.dtype not in (torch.long, torch.int):
        raise TypeError(f"expected token ids as a long tensor [n, seq], found dtype {tokens.dtype}")
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(f"expected token ids of shape [n >= 1, seq >= 2], found {list(tokens.shape)}")
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and tokens.shape[1] > context:
        raise ValueError(
            f"expected windows of at most {context} tokens, the context of {type(model).__name__}, "
            f"found {tokens.shape[1]}"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"expected token ids in [0, {vocabulary}), the vocabulary of {type(model).__name__}, "
            f"found ids from {low} to {high}; were the tokens made by another model's tokenizer?"
        )


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: Tensor, batch_size: int = 16) -> float:
    """exp of the mean negative log-likelihood over the n * (seq - 1) targets of non-overlapping windows.

    Each window of `tokens` (long [n, seq]) starts with an empty context, so the number depends on seq: quote
    it. Log-probabilities are taken in float32 whatever the model's dtype and summed in float64, so the result
    does not depend on `batch_size` beyond rounding.

    Raises:
        TypeError, ValueError: see :func:`check_tokens`.
        FloatingPointError: the model returned NaN or Inf.
    """
    check_tokens(model, tokens)
    was_training = model.training
    model.eval()
    total = 0.0
    try:
        for batch in tokens.split(batch_size):
            batch = batch.to(model.device)
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten().long(), reduction="none")
            total += loss.double().sum().item()
    finally:
        model.train(was_training)
    mean = total / (tokens.shape[0] * (tokens.shape[1] - 1))
    if not math.isfinite(mean):
        raise FloatingPointError(f"perplexity: {type(model).__name__} returned NaN or Inf logits")
    return math.exp(mean)


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of the whole model (tied ones once) and of its blocks alone.

    A ratio is of the blocks' units, so "25% pruned" is less than 25% of the model: quote both.
    """
    total = {id(p): p.numel() for p in model.parameters()}
    return {"total": sum(total.values()), "blocks": sum(p.numel() for p in blocks_of(model).parameters())}


@torch.no_grad()
def compare_latency(models: Mapping[str, PreTrainedModel], tokens: Tensor, repeats: int = 9) -> dict[str, float]:
    """Median seconds of one forward pass over `tokens` (long [batch, seq]) per model, measured side by side.

    The models take turns within every repeat, so a machine that slows down slows all of them: compare the numbers
    of one call with each other, not with those of another day. Two untimed passes come first.
    """
    for model in models.values():
        check_tokens(model, tokens)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(-2, repeats):
        for name, model in models.items():
            batch = tokens.to(model.device)
            _synchronize(model.device)
            start = time.perf_counter()
            model(input_ids=batch, use_cache=False)
            _synchronize(model.device)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":  # kernels are launched asynchronously
        torch.cuda.synchronize(device)


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
    """
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    n_prompt = encoded["input_ids"].shape[1]
    if n_prompt == 0:
        raise ValueError("generate_text: expected a prompt of at least one token, found an empty one")
    context = getattr(model.config, "max_position_embeddings", n_prompt + max_new_tokens)
    if n_prompt >= context:
        raise ValueError(f"generate_text: expected a prompt shorter than the context of {context}, found {n_prompt}")
    if temperature > 0:
        torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=min(max_new_tokens, context - n_prompt),
        repetition_penalty=repetition_penalty,
        pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)
