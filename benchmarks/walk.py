"""Seconds and peak memory of whole prunings, this checkout against another one, side by side.

    git worktree add --detach ../before COMMIT
    python benchmarks/walk.py ../before              # writes data/results/walk_cpu.json

A random llama (1,024 wide, 8 blocks, 2,816 channels), 16,384 tokens, float32, with the paper's recipe and the
recommended one. Each run is a process of its own; the two checkouts take turns, so that a machine that slows down slows
both. Ratios are of medians. The units that stay are compared in the first round; the weights in a pair of float64 runs
of a smaller model, where rounding cannot hide a difference.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent.parent
TIMED = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "windows": 64, "seq": 256, "dtype": "float32",
}  # fmt: skip
COMPARED = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8,
    "windows": 64, "seq": 128, "dtype": "float64",
}  # fmt: skip
RECIPES = ("paper", "strongest")


def one_run(sizes: dict, recipe: str, out: str) -> None:
    """Prunes once with the package on PYTHONPATH; seconds, bytes and kept units go to stdout, weights to `out`."""
    import time

    import greedy_helpers as gh

    try:
        from greedy_helpers.course.cost import peak_memory
    except ImportError:  # the first edition
        from greedy_helpers.cost import peak_memory

    warnings.simplefilter("ignore")
    sizes = dict(sizes)
    windows, seq, dtype = sizes.pop("windows"), sizes.pop("seq"), getattr(torch, sizes.pop("dtype"))
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, vocab_size=512, max_position_embeddings=seq, initializer_range=0.05)
    model = LlamaForCausalLM(config).to(dtype).eval()
    tokens = torch.randint(512, (windows, seq))
    if hasattr(gh, "Recipe"):
        how = {"recipe": {"paper": gh.PAPER, "strongest": gh.Recipe("exact greedy", "both, residual")}[recipe]}
    elif recipe == "paper":  # the first edition's way to say it
        how = {"criterion": gh.second_moment, "refit": "pre"}
    else:
        how = {"criterion": gh.exact_greedy(), "refit": "both", "target": "residual"}
    with peak_memory() as memory:
        started = time.perf_counter()
        report = gh.prune(model, tokens, 0.25, **how, progress=False)
        seconds = time.perf_counter() - started
    if out:
        torch.save(model.state_dict(), out)
    print(json.dumps({"seconds": seconds, "rise": memory.rise, "keep": [step.keep.tolist() for step in report.steps]}))


def run(checkout: Path, sizes: dict, recipe: str, out: str = "") -> dict:
    command = [sys.executable, __file__, str(checkout), "--run", json.dumps(sizes), recipe, out]
    environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    said = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=checkout)
    if said.returncode:
        raise RuntimeError(said.stderr)
    return json.loads(said.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--run", nargs=3, metavar=("SIZES", "RECIPE", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        return one_run(json.loads(args.run[0]), *args.run[1:])
    from common import load_average, machine, results_file, save  # of this checkout; a run has another one's package

    checkouts = {"before": args.before.resolve(), "now": HERE}
    commits = {
        name: subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=place, text=True).strip()
        for name, place in checkouts.items()
    }
    rows = []
    for recipe in RECIPES:
        results = {name: [] for name in checkouts}
        for repeat in range(args.repeats):
            for name, place in checkouts.items():
                results[name].append(run(place, TIMED, recipe))
            print(recipe, repeat, {n: round(r[-1]["seconds"], 1) for n, r in results.items()}, flush=True)
        seconds = {name: statistics.median(r["seconds"] for r in part) for name, part in results.items()}
        peak = {name: statistics.median(r["rise"] for r in part) / 1e6 for name, part in results.items()}
        with tempfile.TemporaryDirectory() as folder:
            pair = [run(place, COMPARED, recipe, f"{folder}/{name}.pt") for name, place in checkouts.items()]
            one, other = (torch.load(f"{folder}/{name}.pt") for name in checkouts)
        difference = max(((one[k] - other[k]).norm() / one[k].norm()).item() for k in one)
        rows.append({
            "recipe": recipe,
            **{f"seconds {name}": round(value, 2) for name, value in seconds.items()},
            "times as fast": round(seconds["before"] / seconds["now"], 3),
            **{f"peak MB {name}": round(value, 1) for name, value in peak.items()},
            "same units kept": results["before"][0]["keep"] == results["now"][0]["keep"],
            "float64: same units kept": pair[0]["keep"] == pair[1]["keep"],
            "float64: largest relative difference of a weight": float(f"{difference:.2g}"),
        })  # fmt: skip
        print(rows[-1], flush=True)
    settings = {**machine("cpu"), "commits": commits, "repeats": args.repeats, "timed": TIMED, "compared": COMPARED}
    save({"settings": settings | {"load average": load_average()}, "rows": rows}, results_file("walk", "cpu"))


if __name__ == "__main__":
    main()
