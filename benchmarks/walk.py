"""Seconds and peak memory of whole prunings, this checkout against another one, side by side.

    git worktree add --detach ../before COMMIT
    python benchmarks/walk.py ../before              # writes data/results/walk_cpu.json

A random llama (1,024 wide, 8 blocks, 2,816 channels), 16,384 tokens, float32, with the paper's recipe and the
recommended one. Each run is a process of its own with one thread. The two checkouts run at the same time, so that a
machine that slows down slows both. Ratios are of medians over the rounds, of seconds on the clock and of seconds of
work. The units that stay are compared in the first round; the weights in a pair of float64 runs of a smaller model,
where rounding cannot hide a difference. The file is written after every round.
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
        started, worked = time.perf_counter(), time.process_time()
        report = gh.prune(model, tokens, 0.25, **how, progress=False)
        seconds, work = time.perf_counter() - started, time.process_time() - worked
    if out:
        torch.save(model.state_dict(), out)
    print(
        json.dumps(
            {
                "seconds": seconds,
                "work": work,
                "rise": memory.rise,
                "keep": [step.keep.tolist() for step in report.steps],
            }
        )
    )


def start(checkout: Path, sizes: dict, recipe: str, out: str = "") -> subprocess.Popen:
    command = [sys.executable, __file__, str(checkout), "--run", json.dumps(sizes), recipe, out]
    environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, cwd=checkout, **pipes)


def result(process: subprocess.Popen) -> dict:
    said, complaint = process.communicate()
    if process.returncode:
        raise RuntimeError(complaint)
    return json.loads(said.splitlines()[-1])


def side_by_side(checkouts: dict[str, Path], sizes: dict, recipe: str, folder: str = "") -> dict[str, dict]:
    """One run of each checkout, all at the same time."""
    out = {name: f"{folder}/{name}.pt" if folder else "" for name in checkouts}
    processes = {name: start(place, sizes, recipe, out[name]) for name, place in checkouts.items()}
    return {name: result(process) for name, process in processes.items()}


def summary(recipe: str, rounds: list[dict[str, dict]], equality: dict) -> dict:
    row: dict = {"recipe": recipe, "rounds": len(rounds)}
    for key, words in (("seconds", "seconds"), ("work", "seconds of work")):
        medians = {name: statistics.median(one[name][key] for one in rounds) for name in ("before", "now")}
        row |= {f"{words} {name}": round(value, 1) for name, value in medians.items()}
        row[f"times as fast, {words}"] = round(medians["before"] / medians["now"], 3)
    for name in ("before", "now"):
        row[f"peak MB {name}"] = round(statistics.median(one[name]["rise"] for one in rounds) / 1e6, 1)
    row["same units kept"] = rounds[0]["before"]["keep"] == rounds[0]["now"]["keep"]
    return row | equality


def same_weights(checkouts: dict[str, Path], recipe: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        pair = side_by_side(checkouts, COMPARED, recipe, folder)
        one, other = (torch.load(f"{folder}/{name}.pt") for name in checkouts)
    difference = max(((one[k] - other[k]).norm() / one[k].norm()).item() for k in one)
    return {
        "float64: same units kept": pair["before"]["keep"] == pair["now"]["keep"],
        "float64: largest relative difference of a weight": float(f"{difference:.2g}"),
    }


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
    settings = {**machine("cpu"), "threads": 1, "commits": commits, "timed": TIMED, "compared": COMPARED}
    equality = {recipe: same_weights(checkouts, recipe) for recipe in RECIPES}
    rounds: dict[str, list[dict]] = {recipe: [] for recipe in RECIPES}
    for _ in range(args.repeats):
        for recipe in RECIPES:
            rounds[recipe].append(side_by_side(checkouts, TIMED, recipe))
            rows = [summary(name, part, equality[name]) for name, part in rounds.items() if part]
            save({"settings": settings | {"load average": load_average()}, "rows": rows}, results_file("walk", "cpu"))
            print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
