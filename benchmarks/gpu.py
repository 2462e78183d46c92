"""Seconds and memory of every stage of pruning a 7B model on a GPU, against what the card can do.

    python benchmarks/gpu.py                                   # Llama-2-7B's shapes, random bfloat16 weights, CUDA
    python benchmarks/gpu.py --shape llama-3-8b --home device  # the whole model on the card, not one block of it
    python benchmarks/gpu.py --layers 8                        # a quick look: two blocks are pruned, not 26
    python benchmarks/gpu.py --shape tiny --device cpu         # seconds on any machine; printed, not saved

Two runs with the paper's settings (25% of the units of all blocks but the first four and the last two, 1024 windows of
128 tokens): the paper's recipe, and the exact search with all refits. Weights are random,
so errors mean nothing here; times and bytes do not depend on them. The rates of the card (matrix products per dtype,
memory) are measured in the same run, and each stage is set against the one that should limit it. A stage is timed by
letting the CPU wait for the GPU before and after it, which costs a little.

Writes data/results/gpu_DEVICE.json: the rates, and one row per stage.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import torch
from accelerate import init_empty_weights
from common import RESULTS, load_average, machine, save
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import greedy_helpers as gh
from greedy_helpers import pruning, remedies
from greedy_helpers.allocation import middle_blocks
from greedy_helpers.course.cost import peak_memory
from greedy_helpers.criteria import Criterion
from greedy_helpers.large.lazy import entries, same_kind
from greedy_helpers.measure import ModulePasses
from greedy_helpers.recipes import CRITERIA
from greedy_helpers.stream import BlockStream

SHAPES = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000},
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "vocab_size": 128},
}  # fmt: skip
RUNS = {"paper": gh.PAPER, "exact greedy, both, residual": gh.Recipe("exact greedy", "both, residual")}


def build(shape: str, layers: int, device: torch.device, home: torch.device) -> LlamaForCausalLM:
    """A model of random weights, made on `device` and put to `home`."""
    config = LlamaConfig(**SHAPES[shape], num_hidden_layers=layers, max_position_embeddings=4096)
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(config)
    for _, holder, key, value in entries(model):
        if value.is_meta:
            new = torch.ones(value.shape) if value.ndim == 1 else 0.02 * torch.randn(value.shape, device=device)
            holder[key] = same_kind(value, new.to(home, torch.bfloat16))
    return model.to(home).eval()


def clock(device: torch.device) -> float:
    """Seconds, when everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def card_rates(device: torch.device) -> dict[str, float]:
    """What the card reaches: teraflops of square matrix products per dtype, and GB/s of copying memory."""
    on_cuda, rates = device.type == "cuda", {}
    for name, dtype, precision in (
        ("bfloat16", torch.bfloat16, "highest"),
        ("tf32", torch.float32, "high"),
        ("float32", torch.float32, "highest"),
        ("float64", torch.float64, "highest"),
    ):
        n = (4096 if dtype == torch.float64 else 8192) if on_cuda else 384
        a = torch.randn(n, n, device=device, dtype=torch.float32).to(dtype)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            rates[name] = 2 * n**3 / fastest(lambda a=a: a @ a, device) / 1e12
        finally:
            torch.set_float32_matmul_precision(before)
    a = torch.empty(2**28 if on_cuda else 2**22, device=device)
    rates["memory"] = 2 * a.nbytes / fastest(a.clone, device) / 1e9
    return rates


def fastest(action: Callable[[], Tensor], device: torch.device, repeats: int = 5) -> float:
    action()
    seconds = []
    for _ in range(repeats):
        started = clock(device)
        action()
        seconds.append(clock(device) - started)
    return min(seconds)


class Stages:
    """Seconds, calls and work of each stage of a run: wraps the functions that `prune` is made of."""

    def __init__(self, device: torch.device, precision: torch.dtype) -> None:
        self.device, self.solves = device, str(precision).removeprefix("torch.")
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.work: dict[str, float] = {}  # floating-point operations, or bytes where memory is the limit
        self.limit: dict[str, str] = {}

    def timed(self, stage: str, limit: str, action: Callable, work: Callable[..., float]) -> Callable:
        def wrapped(*args, **kwargs):
            started = clock(self.device)
            result = action(*args, **kwargs)
            self.seconds[stage] = self.seconds.get(stage, 0.0) + clock(self.device) - started
            self.calls[stage] = self.calls.get(stage, 0) + 1
            self.work[stage] = self.work.get(stage, 0.0) + work(result, *args, **kwargs)
            self.limit[stage] = limit
            return result

        return wrapped

    def watching(self) -> ExitStack:
        """Every stage is timed inside this `with`."""
        stack = ExitStack()
        for place, name, stage, limit, work in (
            (pruning, "advance_dense", "dense pass", "bfloat16", _of_dense_pass),
            (BlockStream, "advance", "pruned pass", "bfloat16", _of_pruned_pass),
            (ModulePasses, "moments", "moments, passes for them included", "tf32", _of_moments),
            (remedies, "refit", "refit", self.solves, _of_refit),
            (pruning, "remove_units", "cut", "memory", _of_cut),
            (pruning, "_stream_error", "stream error", "memory", _of_stream_error),
        ):
            timed = self.timed(stage, limit, getattr(place, name), work)
            stack.enter_context(mock.patch.object(place, name, timed))
        return stack

    def criterion(self, criterion: Criterion, greedy: bool) -> Criterion:
        if greedy:
            return self.timed("scores", "memory", criterion, _of_elimination)
        return self.timed("scores", self.solves, criterion, _of_second_moment)


def _block_flops(block: torch.nn.Module, hidden: list[Tensor]) -> float:
    tokens = sum(part.shape[0] * part.shape[1] for part in hidden)
    return 2 * tokens * sum(p.numel() for p in block.parameters())


def _of_dense_pass(_result, dense, block, _records) -> float:
    return _block_flops(block, dense.hidden)


def _of_pruned_pass(_result, stream, block) -> float:
    return _block_flops(block, stream.hidden)


def _of_moments(results, *_args) -> float:
    """The products alone: half of X'X, as it is symmetric."""
    return sum(m.n * len(m.xx) * (len(m.xx) + (0 if m.xy is None else 2 * m.xy.shape[1])) for m in results)


def _of_refit(_result, linears, moments, *_args, **_kwargs) -> float:
    n, d_y = len(moments.xx), sum(linear.weight.shape[0] for linear in linears)
    return n**3 / 3 + 4 * n**2 * d_y  # Cholesky, X'X W0', and the two triangular solves


def _of_cut(_result, module, _keep) -> float:
    return 2 * sum(group.linear.weight.nbytes for group in module.groups)


def _of_stream_error(_result, streams) -> float:
    return sum(part.nbytes for part in (*streams.dense.hidden, *streams.pruned.hidden))


def _of_second_moment(_scores, module, seen) -> float:
    d_x = len(seen.level1.xx)
    return (
        0 if module.kind == "attention" else sum(2 * g.linear.weight.shape[0] * d_x**2 for g in module.level1.values())
    )


def _of_elimination(_scores, module, seen) -> float:
    n, d_y = seen.level2.xy.shape
    width = module.level2.index.shape[1]
    removed = module.n_units - seen.n_keep
    each = n * d_y if width == 1 else n * (n + d_y) * 2  # a channel reads B; a head reads and writes H^-1 and B
    return seen.level2.xy.element_size() * removed * each


def measure(args: argparse.Namespace) -> dict:
    device = torch.device(args.device)
    home = device if args.home == "device" else torch.device("cpu")
    precision = getattr(torch, args.precision)
    torch.manual_seed(0)
    rates, rows = card_rates(device), []
    for run, recipe in RUNS.items():
        model = build(args.shape, args.layers, device, home)
        tokens = torch.randint(0, model.config.vocab_size, (args.windows, args.seq))
        stages = Stages(device, precision)
        criterion = CRITERIA[recipe.criterion]
        timed = replace(recipe, criterion=stages.criterion(criterion, greedy=criterion is gh.exact_greedy))
        where = {"device": device, "store": args.store, "precision": precision, "batch_size": args.batch_size}
        with peak_memory(device) as memory, stages.watching():
            started = clock(device)
            gh.prune(model, tokens, 0.25, timed, blocks=middle_blocks(model), **where, progress=False)
            seconds = clock(device) - started
        blocks = len(middle_blocks(model))
        del model
        for stage, spent in stages.seconds.items():
            unit, rate = (
                (1e9, rates["memory"]) if stages.limit[stage] == "memory" else (1e12, rates[stages.limit[stage]])
            )
            reached = float(f"{stages.work[stage] / unit / spent:.4g}")
            rows.append({
                "run": run, "stage": stage, "seconds": round(spent, 3), "calls": stages.calls[stage],
                "limit": stages.limit[stage], "reached": reached, "of the card": round(reached / rate, 3),
            })  # fmt: skip
        rest = seconds - sum(stages.seconds.values())
        rows.append({"run": run, "stage": "everything else", "seconds": round(rest, 3)})
        rows.append({
            "run": run, "stage": "total", "seconds": round(seconds, 3), "blocks pruned": blocks,
            "peak GB": round(memory.peak / 1e9, 3), "GB before": round(memory.start / 1e9, 3),
        })  # fmt: skip
        for row in rows[-len(stages.seconds) - 2 :]:
            print(row, flush=True)
    settings = {**machine(args.device), **vars(args), "load average": load_average()}
    units = "TFLOP/s of square matrix products, and GB/s of a copy"
    return {
        "settings": settings,
        "rates": {"unit": units, **{k: float(f"{v:.4g}") for k, v in rates.items()}},
        "rows": rows,
    }


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--home", choices=("cpu", "device"), default="cpu", help="where the blocks are that do not run")
    parser.add_argument("--store", help="where the hidden states wait (default: the device)")
    parser.add_argument("--precision", choices=("float64", "float32"), default="float64", help="of moments and solves")
    parser.add_argument("--layers", type=int, help="default: 32; tiny: 8")
    parser.add_argument("--windows", type=int, help="default: 1024; tiny: 8")
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64, help="windows per forward pass")
    args = parser.parse_args(arguments)
    args.layers = args.layers or (8 if args.shape == "tiny" else 32)
    args.windows = args.windows or (8 if args.shape == "tiny" else 1024)
    found = measure(args)
    if args.shape != "tiny":
        name = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else args.device
        out = RESULTS / f"gpu_{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
        save(found, out)
        print(f"written to {out}")
    return found


if __name__ == "__main__":
    main()
