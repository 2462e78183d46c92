"""Time and peak memory of every stage of pruning against the size of the model, beside naive implementations.

    python benchmarks/stages.py                    # what is missing in data/results/stages_cpu.json (one thread)
    python benchmarks/stages.py --limit 300        # the same, but start nothing new after five minutes
    python benchmarks/stages.py --quick            # tiny sizes, result printed and not saved
    python benchmarks/stages.py --device cuda --exact-up-to 4096 --fresh

Random models of LLaMA's shape: one block of growing width, and width 256 with growing depth. Each row is one stage on
one model; the fits say how a stage grows: the exponent of a power law, and for the depth also a straight line with its
R^2. On the CPU they are made on the processor's seconds, in which other jobs on the machine hardly show; on CUDA on the
clock's. Memory is the peak above what is there before the stage begins (see greedy_helpers.course.cost.peak_memory).

Before anything is measured, every naive twin has to give what the package gives.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from common import load_average, machine, results_file, save
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import greedy_helpers as gh
from greedy_helpers.course.cost import peak_memory
from greedy_helpers.criteria import Criterion
from greedy_helpers.measure import ModulePasses
from greedy_helpers.similarity import divergences_of
from greedy_helpers.structure import ChannelGroup, Depth2Module

WINDOWS, SEQ, BATCH = 8, 256, 2
RATIO = 0.25
WIDTHS, DEPTHS, FIXED_WIDTH = [256, 512, 1024, 2048], [2, 4, 8, 16], 256
QUICK = {"widths": [64, 128], "depths": [1, 2]}

Stage = Callable[[PreTrainedModel, Tensor], Callable[[], object]]  # sets up, and returns what is measured


def random_model(width: int, blocks: int, device: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=blocks,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=SEQ,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device).eval()


def eager(model: PreTrainedModel) -> PreTrainedModel:
    model.set_attn_implementation("eager")
    return model


# --- the package's stages


def stream(model: PreTrainedModel, tokens: Tensor) -> None:
    states = gh.BlockStream(model, tokens, BATCH)
    for block in gh.blocks_of(model):
        states.advance(block)


def moments(model: PreTrainedModel, tokens: Tensor) -> Iterator[tuple[Depth2Module, gh.Seen]]:
    """Second moments of what both levels of every module read, one module at a time."""
    states = gh.BlockStream(model, tokens, BATCH)
    for block in gh.blocks_of(model):
        for module in gh.depth2_modules(model, [states.position]):
            n_keep = module.n_units - int(RATIO * module.n_units)
            passes = ModulePasses(states, block, module)
            yield module, gh.Seen(*passes.moments(1, 2), n_keep=n_keep)
        states.advance(block)


def score(criterion: Criterion) -> Stage:
    def setup(model: PreTrainedModel, tokens: Tensor) -> Callable[[], object]:
        known = list(moments(model, tokens))
        return lambda: [criterion(module, seen) for module, seen in known]

    return setup


def whole_prune(remedy: str) -> Stage:
    def setup(model: PreTrainedModel, tokens: Tensor) -> Callable[[], object]:
        victim, recipe = copy.deepcopy(model), gh.Recipe("second moment", remedy)
        return lambda: gh.prune(victim, tokens, RATIO, recipe, batch_size=BATCH, progress=False)

    return setup


# --- their naive twins


@torch.no_grad()
def stored_maps(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """Similarity with the attention maps of all blocks and batches in memory."""
    batches = [eager(model)(batch, output_attentions=True).attentions for batch in tokens.split(BATCH)]
    modules = gh.depth2_modules(model, kinds=["attention"])
    return {m.name: gh.head_divergence([maps[m.block] for maps in batches]) for m in modules}


def watched_linears(module: Depth2Module) -> list[ChannelGroup]:
    return [next(iter(module.level1.values())), module.level2]


@torch.no_grad()
def stored_activations(model: PreTrainedModel, tokens: Tensor) -> list[list[gh.Moments]]:
    """Moments with what every linear reads kept in memory: one pass over the model, one product at the end."""
    modules = gh.depth2_modules(model)
    kept: dict[str, list[Tensor]] = {group.path: [] for module in modules for group in watched_linears(module)}
    handles = [
        group.linear.register_forward_pre_hook(lambda _, args, to=kept[group.path]: to.append(args[0].flatten(0, -2)))
        for module in modules
        for group in watched_linears(module)
    ]
    for batch in tokens.split(BATCH):
        model.model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    found = []
    for module in modules:
        pair = []
        for group in watched_linears(module):
            pair.append(gh.Moments(group.path))
            pair[-1].update(torch.cat(kept[group.path]))
        found.append(pair)
    return found


@torch.no_grad()
def full_passes(model: PreTrainedModel, tokens: Tensor) -> Iterator[list[gh.Moments]]:
    """Moments with one pass over the whole model per module, as if each was pruned before the next is looked at."""
    for module in gh.depth2_modules(model):
        pair = [gh.Moments(group.path) for group in watched_linears(module)]
        handles = [
            group.linear.register_forward_pre_hook(lambda _, args, to=found: to.update(args[0].flatten(0, -2)))
            for group, found in zip(watched_linears(module), pair, strict=True)
        ]
        for batch in tokens.split(BATCH):
            model.model(batch, use_cache=False)
        for handle in handles:
            handle.remove()
        yield pair


def drain(values: Iterator) -> None:
    for _ in values:
        pass


STAGES: dict[str, Stage] = {
    "stream": lambda model, tokens: lambda: stream(model, tokens),
    "stream + moments": lambda model, tokens: lambda: drain(moments(model, tokens)),
    "score (second moment)": score(gh.second_moment),
    "score (exact greedy)": score(gh.exact_greedy),
    "similarity": lambda model, tokens: lambda: divergences_of(eager(model), tokens, batch_size=BATCH),
    "prune, no refit": whole_prune("none"),
    "prune, refit post": whole_prune("post"),
    "prune, refit both": whole_prune("both"),
    "naive similarity: all maps stored": lambda model, tokens: lambda: stored_maps(model, tokens),
    "naive moments: activations stored": lambda model, tokens: lambda: stored_activations(model, tokens),
    "naive moments: a full pass per module": lambda model, tokens: lambda: drain(full_passes(model, tokens)),
}


def check_the_twins(device: str) -> None:
    """Naive and streamed agree, and everything has run once: no first-call costs in the measurements."""
    model = random_model(64 * 2, 2, device)
    tokens = gh.random_tokens(model, WINDOWS, SEQ)
    for name, divergence in divergences_of(eager(model), tokens, batch_size=BATCH).items():
        torch.testing.assert_close(divergence, stored_maps(model, tokens)[name].cpu(), rtol=1e-4, atol=1e-6)
    model = random_model(64 * 2, 2, device)
    for (_, seen), *twins in zip(
        moments(model, tokens), stored_activations(model, tokens), full_passes(model, tokens), strict=True
    ):
        for twin in twins:
            for streamed, naive in zip((seen.level1, seen.level2), twin, strict=True):
                torch.testing.assert_close(streamed.xx, naive.xx, rtol=1e-4, atol=1e-4 * streamed.xx.abs().max().item())
    for stage in STAGES.values():
        stage(random_model(64 * 2, 2, device), tokens)()


def measure(stage: Stage, width: int, blocks: int, device: str) -> dict[str, float]:
    """Medians over three runs of what takes less than half a second of work, otherwise one; each on a new model."""
    seconds, cpu_seconds, peaks = [], [], []
    while len(seconds) < (3 if sum(cpu_seconds[:1]) < 0.5 else 1):
        model = random_model(width, blocks, device)
        run = stage(model, gh.random_tokens(model, WINDOWS, SEQ))
        with peak_memory(device) as memory:
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - wall)
            cpu_seconds.append(time.process_time() - cpu)
        peaks.append(memory.rise)
        del run, model
    return {
        "seconds": round(statistics.median(seconds), 4),
        "cpu_seconds": round(statistics.median(cpu_seconds), 4),
        "peak_mb": round(max(peaks) / 1e6, 1),
        "runs": len(seconds),
    }


def growth(rows: list[dict], of: str) -> dict[str, dict]:
    """How each stage's seconds and memory grow, by axis: fits over the rows of that axis."""
    found: dict[str, dict] = {}
    for axis, stage in itertools.product(("width", "blocks"), STAGES):
        points = sorted((row for row in rows if row["axis"] == axis and row["stage"] == stage), key=lambda r: r[axis])
        if len(points) < 3:
            continue
        sizes = np.array([row[axis] for row in points], dtype=float)
        fits = {"sizes": [row[axis] for row in points]}
        for quantity in (of, "peak_mb"):
            values = np.array([row[quantity] for row in points])
            if (values <= 0).any():
                continue
            fits[f"{quantity} exponent"] = round(np.polyfit(np.log(sizes), np.log(values), 1)[0], 2)
            if axis == "blocks":
                slope, start = np.polyfit(sizes, values, 1)
                left = ((values - slope * sizes - start) ** 2).sum() / ((values - values.mean()) ** 2).sum()
                fits |= {f"{quantity} per block": round(slope, 4), f"{quantity} R^2": round(1 - left, 4)}
        found.setdefault(axis, {})[stage] = fits
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1: CPU seconds then mean work)")
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS)
    parser.add_argument("--depths", type=int, nargs="*", default=DEPTHS)
    parser.add_argument("--stages", nargs="+", default=[""], help="only stages whose name contains one of these")
    parser.add_argument("--exact-up-to", type=int, default=1024, help="widest model for the exact greedy elimination")
    parser.add_argument("--limit", type=float, default=float("inf"), help="start nothing new after so many seconds")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, print only")
    args = parser.parse_args()
    began = time.monotonic()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", "(?s).*determined by the damping")  # the work is the same
    warnings.filterwarnings("ignore", ".*less than one")  # of the one head of a narrow model
    widths, depths = (QUICK["widths"], QUICK["depths"]) if args.quick else (args.widths, args.depths)

    out = results_file("stages", args.device)
    settings = machine(args.device) | {
        "model": "LLaMA's shape, random weights, heads of 64, FFN 11/4 of the width, float32",
        "tokens": f"{WINDOWS} windows of {SEQ}, {BATCH} per batch",
        "ratio": RATIO,
        "fits": "cpu_seconds" if args.device == "cpu" else "seconds",
    }
    found = {"settings": settings, "load average": [], "growth": {}, "rows": []}
    if out.exists() and not (args.fresh or args.quick):
        found = json.loads(out.read_text())
        if found["settings"] != settings:
            parser.error(f"{out} was measured with {found['settings']}, not {settings}; --fresh starts again")
    done = {(row["axis"], row["width"], row["blocks"], row["stage"]) for row in found["rows"]}
    sizes = [("width", width, 1) for width in widths] + [("blocks", FIXED_WIDTH, depth) for depth in depths]
    if args.quick:
        sizes = [(axis, 64 if axis == "blocks" else width, blocks) for axis, width, blocks in sizes]

    check_the_twins(args.device)
    found["load average"].append(load_average())
    for axis, width, blocks in sizes:
        for name, stage in STAGES.items():
            skip = "exact" in name and width > args.exact_up_to
            if skip or (axis, width, blocks, name) in done or not any(part in name for part in args.stages):
                continue
            if time.monotonic() - began > args.limit:
                print("the time is up; run the same command again for the rest")
                return
            row = {"axis": axis, "width": width, "blocks": blocks, "stage": name}
            row |= measure(stage, width, blocks, args.device)
            print(*row.values(), sep="\t", flush=True)
            found["rows"].append(row)
            found["growth"] = growth(found["rows"], settings["fits"])
            if not args.quick:
                save(found, out)
    print(json.dumps(found["growth"], indent=1))


if __name__ == "__main__":
    main()
