"""Peak memory of pruning against the depth of the model: blocks in memory, and blocks on the disk.

    python benchmarks/streaming.py             # models of 4, 8 and 16 blocks; writes data/results/streaming_cpu.json

Random models of LLaMA's shape, saved as safetensors. Each run is a process of its own, so that nothing an earlier one
left behind counts; what is measured is the rise of its resident memory from before the model is loaded to the peak of
pruning (see greedy_helpers.course.cost.peak_memory).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import machine, results_file, save
from transformers import LlamaConfig, LlamaForCausalLM

import greedy_helpers as gh
from greedy_helpers.course.cost import peak_memory

SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "vocab_size": 512}
RECIPE = gh.Recipe("second moment", "both")


def one_run(folder: Path, lazy: bool) -> None:
    """Prunes the model in `folder` and prints the rise in bytes; runs in a process of its own."""
    torch.manual_seed(0)
    tokens = torch.randint(0, SIZES["vocab_size"], (16, 64))

    def run(place: Path) -> None:
        with tempfile.TemporaryDirectory() as work:
            model, _ = gh.load_model(place, "cpu", lazy=lazy)
            gh.prune(model, tokens, 0.25, RECIPE, work_dir=work if lazy else None, progress=False)

    with tempfile.TemporaryDirectory() as tiny:  # the first run brings libraries into memory: not the model's
        LlamaForCausalLM(LlamaConfig(**SIZES | {"hidden_size": 64}, num_hidden_layers=1)).save_pretrained(tiny)
        run(Path(tiny))
    with peak_memory() as memory:
        run(folder)
    print(json.dumps(memory.rise))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--run", nargs=2, metavar=("FOLDER", "MODE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        one_run(Path(args.run[0]), lazy=args.run[1] == "disk")
        return
    rows = []
    for depth in args.depths:
        with tempfile.TemporaryDirectory() as place:
            model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=depth))
            model.save_pretrained(place)
            row = {"blocks": depth, "one block, MB": sum(p.nbytes for p in gh.blocks_of(model)[0].parameters()) / 1e6}
            row["all blocks, MB"] = depth * row["one block, MB"]
            for mode in ("memory", "disk"):
                command = [sys.executable, "-W", "ignore", __file__, "--run", place, mode]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                row[f"peak with blocks in {mode}, MB"] = round(json.loads(said.splitlines()[-1]) / 1e6, 1)
        rows.append({key: round(value, 1) for key, value in row.items()})
        print(rows[-1], flush=True)
    save({"settings": {**machine("cpu"), **SIZES, "tokens": 16 * 64}, "rows": rows}, results_file("streaming", "cpu"))


if __name__ == "__main__":
    main()
