"""What a model costs: parameters, multiply-accumulates, bytes, peak memory, latency."""

from __future__ import annotations

import ctypes
import gc
import inspect
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..data_free import forward_cached
from ..files import disk_bytes
from ..structure import blocks_of, check_tokens, count_parameters, depth2_modules, eval_mode, linears_of

T = TypeVar("T")
_PEAK_RESET = Path("/proc/self/clear_refs")  # man 5 proc
_WARM_UP = 2  # untimed rounds: lazy initialisation, caches, clock frequencies


def count_macs(
    model: PreTrainedModel, seq: int, batch: int = 1, cache: int = 0, *, logits_to_keep: int = 0
) -> dict[str, int]:
    """Multiply-accumulates of one forward pass over `batch` windows of `seq` new tokens, read off the actual shapes.

    - `"linears"`: the linear layers of the blocks, one per weight and token.
    - `"attention"`: the products QK' and PV, `2 * query channels * queries * keys` per block.
    - `"head"`: the linear layers outside the blocks, which is the language-model head (0 for a bare decoder).
    - `"total"`: their sum. A multiply-accumulate is two floating-point operations (FLOPs).

    Convention: attention counts the full rectangle of `seq` queries and `cache + seq` keys, which is what eager
    attention computes before it masks half of it away, and what torch's `FlopCounterMode` counts for sdpa, too. A fused
    causal kernel skips the masked tiles, so with an empty cache its attention is down to about half of this. Norms,
    activations, rotary embeddings, softmax and the look-up of embeddings are not counted.

    Args:
        cache: tokens already in the KV cache, of each window. A block with a sliding window holds at most window - 1.
        logits_to_keep: the head is applied to the last so many positions of each window; 0, as in transformers: to all.

    Raises:
        ValueError: seq or batch below 1, or a negative number of cached tokens or logits.
        UnknownFamily, UnsupportedModule: see :func:`~greedy_helpers.structure.family_of`.
    """
    if seq < 1 or batch < 1 or cache < 0 or logits_to_keep < 0:
        raise ValueError(
            "count_macs: expected seq >= 1, batch >= 1, cache >= 0, logits_to_keep >= 0, found "
            f"seq={seq}, batch={batch}, cache={cache}, logits_to_keep={logits_to_keep}"
        )
    blocks, last = blocks_of(model), model.get_output_embeddings()
    inside = set(linears_of(blocks).values())
    linears = batch * seq * sum(linear.weight.numel() for linear in inside)
    positions = {last: min(seq, logits_to_keep or seq)}
    outside = set(linears_of(model).values()) - inside
    head = batch * sum(positions.get(linear, seq) * linear.weight.numel() for linear in outside)
    attention = sum(
        2 * batch * channels * seq * (cached + seq)
        for channels, cached in zip(_query_channels(model), _cached(model, len(blocks), cache), strict=True)
    )
    return {"linears": linears, "attention": attention, "head": head, "total": linears + attention + head}


def _query_channels(model: PreTrainedModel) -> list[int]:
    """Per block: query heads that are left times their dimension."""
    config = model.config
    heads = config.num_attention_heads
    whole = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    channels = [whole] * len(blocks_of(model))  # attention that cannot be cut is as the config says
    for module in depth2_modules(model):
        if module.kind == "attention":
            channels[module.block] = module.level2.n_channels
    return channels


def _cached(model: PreTrainedModel, n_blocks: int, cache: int) -> list[int]:
    """Per block: how many of `cache` earlier tokens its cache still holds."""
    # only transformers knows which blocks of which family slide; a cache that knows no layers holds everything
    layers = DynamicCache(config=model.config).layers or [None] * n_blocks
    windows = [getattr(layer, "sliding_window", None) for layer in layers]
    return [cache if window is None else min(cache, window - 1) for window in windows]


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters in memory, tied ones once: a safetensors file is larger only by its header."""
    return sum(parameter.nbytes for parameter in model.parameters())


# --- peak memory


@dataclass
class PeakMemory:
    """What :func:`peak_memory` measures; complete when its `with` block has ended.

    Attributes:
        start, peak: bytes in use when the block began, and the most at any moment of it.
    """

    start: int
    peak: int

    @property
    def rise(self) -> int:
        """Bytes above the start: what the work itself took."""
        return self.peak - self.start


@contextmanager
def peak_memory(device: str | torch.device = "cpu") -> Iterator[PeakMemory]:
    """Measures how much memory the body of the `with` takes at its peak::

        with peak_memory() as memory:
            prune(model, calibration, 0.25)
        print(memory.rise)

    On CUDA: bytes of tensors, from torch's own allocator (`max_memory_allocated`); other processes do not count.

    On the CPU: resident pages of this process, all threads together. Linux keeps the high-water mark itself and lets a
    process reset its own, so no peak falls between two samples; freed memory that the C library holds back is returned
    to the system first. What stays inexact, by some MB: a page counts when it is first written, what Python allocates
    counts too, and pages that an earlier computation left behind in the C library are used again without a rise. Where
    the mark cannot be reset (macOS, some sandboxes) only a rise above the process's highest peak so far is seen: a
    lower bound, exact in a fresh process. One measurement at a time: an inner one resets the outer one's mark.

    Raises:
        RuntimeError: a system without a record of the peak (Windows).
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start, read = torch.cuda.memory_allocated(device), lambda: torch.cuda.max_memory_allocated(device)
    else:
        read = _resident_peak()
        start = read()
    memory = PeakMemory(start, start)
    try:
        yield memory
    finally:
        _synchronize(device)
        memory.peak = max(start, read())


def _resident_peak() -> Callable[[], int]:
    """Resets the process's peak where the system can; the function that reads it, in bytes."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc alone has it
    status = Path("/proc/self/status")
    try:
        _PEAK_RESET.write_text("5")  # VmHWM starts again from what is resident now
        return lambda: int(re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.M)[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError as error:
        raise RuntimeError("peak_memory: expected Linux or macOS, which record a process's peak memory") from error
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- latency


def compare_latency(models: Mapping[str, PreTrainedModel], tokens: Tensor, repeats: int = 9) -> dict[str, float]:
    """Median seconds of one forward pass over `tokens` (long [batch, seq]) per model, measured side by side.

    The models take turns within every repeat, so a machine that slows down slows all of them: compare the numbers
    of one call with each other, not with those of another day. Two untimed passes come first.

    Raises:
        TypeError, ValueError: tokens that a model cannot read, or repeats below 1.
    """
    if repeats < 1:
        raise ValueError(f"compare_latency: expected repeats >= 1, found {repeats}")
    for model in models.values():
        check_tokens(model, tokens)

    def forward(model: PreTrainedModel, batch: Tensor) -> dict[str, float]:
        return {"seconds": _timed(model.device, lambda: model(input_ids=batch, use_cache=False))[0]}

    return {
        name: float(rounds.seconds.median()) for name, rounds in _take_turns(models, tokens, forward, repeats).items()
    }


def latency_table(
    models: Mapping[str, PreTrainedModel],
    tokens: Tensor,
    *,
    batch_sizes: Iterable[int] = (1,),
    new_tokens: int = 16,
    repeats: int = 9,
    clock: Callable[[], float] = time.perf_counter,
) -> pd.DataFrame:
    """How long the two halves of generation take, the models side by side: one row per batch size, phase and model.

    Prefill reads the prompt at once and is limited by arithmetic, in proportion to :func:`count_macs`. Decoding reads
    all weights for every single token and is limited, at small batches, by memory traffic and by the fixed cost of
    launching each layer, which no pruning of units removes. Expect a smaller speed-up there.

    As in :func:`compare_latency` the models take turns, after two untimed rounds. The prompt fills the KV cache; then
    `new_tokens` steps of one token per window follow, all timed together. Where the model's forward takes
    `logits_to_keep`, the prefill computes the last position's logits only, as `generate` does.

    Args:
        tokens: long [n, seq], the prompts; a batch of size b is the first b of them.
        new_tokens: steps of decoding.
        clock: seconds so far. `time.process_time` counts the seconds of work instead: for one thread on a CPU that
            other jobs keep busy.

    Returns:
        Columns `model`, `phase` (`"prefill"`, `"decode"`), `batch`, `seq`, `seconds` (median; prefill: of the whole
        batch; decode: of one step, one token for every window), `iqr` (the interquartile range of the seconds over the
        repeats; differences below it mean nothing) and `tokens_per_second`.

    Raises:
        TypeError, ValueError: tokens that a model cannot read, batch sizes outside [1, n], repeats or new_tokens
            below 1, a context too short for the new tokens, or an encoder, which does not decode.
    """
    batch_sizes = list(batch_sizes)
    if new_tokens < 1 or repeats < 1 or not batch_sizes or not 1 <= min(batch_sizes) <= max(batch_sizes) <= len(tokens):
        raise ValueError(
            f"latency_table: expected repeats >= 1, new_tokens >= 1 and batch sizes in [1, {len(tokens)}], found "
            f"repeats={repeats}, new_tokens={new_tokens}, batch_sizes={batch_sizes}"
        )
    seq = tokens.shape[1]
    for name, model in models.items():
        check_tokens(model, tokens)
        context = getattr(model.config, "max_position_embeddings", None)
        if context is not None and seq + new_tokens > context:
            raise ValueError(
                f"latency_table: {name}: expected prompt and new tokens within the context of {context}, "
                f"found {seq} + {new_tokens}"
            )
        if not model.can_generate():
            raise ValueError(f"latency_table: {name}: expected a model that generates, found {type(model).__name__}")

    def generate(model: PreTrainedModel, prompt: Tensor) -> dict[str, float]:
        last_only = _last_logits_only(model)
        prefill, (_, cache) = _timed(model.device, lambda: forward_cached(model, prompt, None, **last_only), clock)

        def decode() -> None:
            longer = cache
            for _ in range(new_tokens):
                _, longer = forward_cached(model, prompt[:, -1:], longer)  # any token takes equally long

        return {"prefill": prefill, "decode": _timed(model.device, decode, clock)[0] / new_tokens}

    rows = []
    for size in batch_sizes:
        for name, rounds in _take_turns(models, tokens[:size], generate, repeats).items():
            for phase, n_tokens in {"prefill": size * seq, "decode": size}.items():
                low, median, high = rounds[phase].quantile([0.25, 0.5, 0.75])
                rows.append([name, phase, size, seq, median, high - low, n_tokens / median])
    return pd.DataFrame(rows, columns="model phase batch seq seconds iqr tokens_per_second".split())


def _last_logits_only(model: PreTrainedModel) -> dict[str, int]:
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


@torch.no_grad()
def _take_turns(
    models: Mapping[str, PreTrainedModel],
    tokens: Tensor,
    measure: Callable[[PreTrainedModel, Tensor], dict[str, float]],
    repeats: int,
) -> dict[str, pd.DataFrame]:
    """What `measure(model, tokens)` returns for every model in turn, in eval mode: one row per round.

    The first rounds are thrown away.
    """
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    with eval_mode(*models.values()):
        for _ in range(_WARM_UP + repeats):
            for name, model in models.items():
                rounds[name].append(measure(model, tokens.to(model.device)))
    return {name: pd.DataFrame(rows[_WARM_UP:]) for name, rows in rounds.items()}


def _timed(
    device: torch.device, action: Callable[[], T], clock: Callable[[], float] = time.perf_counter
) -> tuple[float, T]:
    """Seconds that `action` takes, its kernels included, and what it returns."""
    _synchronize(device)
    start = clock()
    result = action()
    _synchronize(device)
    return clock() - start, result


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":  # kernels are launched asynchronously
        torch.cuda.synchronize(device)


def cost_table(
    models: Mapping[str, PreTrainedModel],
    tokens: Tensor,
    *,
    new_tokens: int = 16,
    repeats: int = 9,
    clock: Callable[[], float] = time.perf_counter,
    folders: Mapping[str, str | Path] | None = None,
) -> pd.DataFrame:
    """Everything that pruning makes smaller, one row per model, each number with its ratio to the first model's.

    Faster is not the same as smaller: `ideal_speedup`, the inverse ratio of all parameters, stands beside the measured
    `prefill_speedup` and `decode_speedup`. It is what decoding gains where reading the weights takes all the time; for
    a long prefill, which reads no embedding matrix, the inverse of `prefill_macs_ratio` is the measure.

    Args:
        tokens: long [batch, seq], the prompts to count and to measure with.
        new_tokens, repeats, clock: see :func:`latency_table`; `repeats=0` measures nothing and leaves its columns out.
        folders: where the models were saved, for `disk_bytes`.

    Returns:
        Index: the models' names. Columns: `block_parameters`, `parameters`, `bytes` (of the weights in memory),
        `disk_bytes` (with `folders`), `prefill_macs`, `decode_macs` (see :func:`count_macs`; the first token after
        the prompt), `prefill_seconds`, `decode_seconds` (medians; per step), each followed by `..._ratio`;
        `prefill_iqr` and `decode_iqr`, the spread of the seconds; and the three speed-ups.

    Raises:
        As :func:`latency_table` and :func:`count_macs`. FileNotFoundError: a folder without weights.
    """
    batch, seq = tokens.shape
    rows = {}
    for name, model in models.items():
        parameters = count_parameters(model)
        rows[name] = {
            "block_parameters": parameters["blocks"],
            "parameters": parameters["total"],
            "bytes": weight_bytes(model),
            **({} if folders is None else {"disk_bytes": disk_bytes(folders[name])}),
            "prefill_macs": count_macs(model, seq, batch, **_last_logits_only(model))["total"],
            "decode_macs": count_macs(model, 1, batch, cache=seq)["total"],
        }
    costs = pd.DataFrame.from_dict(rows, orient="index")
    spreads = pd.DataFrame(index=costs.index)
    if repeats:
        how = {"new_tokens": new_tokens, "repeats": repeats, "clock": clock}
        measured = latency_table(models, tokens, batch_sizes=[batch], **how).set_index("model")
        for phase, times in measured.groupby("phase", sort=False):
            costs[f"{phase}_seconds"], spreads[f"{phase}_iqr"] = times.seconds, times.iqr
    ratios = costs / costs.iloc[0]
    pairs = [column for name in costs for column in (costs[name], ratios[name].rename(f"{name}_ratio"))]
    table = pd.concat([*pairs, spreads], axis=1)
    for name, cost in {"ideal": "parameters", "prefill": "prefill_seconds", "decode": "decode_seconds"}.items():
        if cost in costs:
            table[f"{name}_speedup"] = 1 / ratios[cost]
    return table
