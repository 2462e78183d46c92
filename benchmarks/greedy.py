"""Time of the exact greedy elimination against the number of channels, blocked and one by one.

    python benchmarks/greedy.py                       # up to 4,096 channels, on the CPU
    python benchmarks/greedy.py --device cuda --channels 4096 8192 11008 --outputs 4096

Random correlated inputs, float64, a quarter of the channels removed; writes data/results/greedy_cost_DEVICE.json.
"""

from __future__ import annotations

import argparse
import time

import torch
from common import machine, results_file, save

from greedy_helpers.greedy import eliminate


def problem(channels: int, outputs: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """H and the solution of a module with correlated channels, on `device`."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2 * channels, channels, generator=generator).to(device)
    z = z + 0.5 * z.roll(1, 1)
    h = (z.T @ z).double()
    h += 1e-2 * h.diagonal().mean() * torch.eye(channels, dtype=torch.float64, device=device)
    solution = torch.randn(channels, outputs, generator=generator, dtype=torch.float64).to(device)
    return h, solution, torch.arange(channels)[:, None]


def seconds(h: torch.Tensor, solution: torch.Tensor, index: torch.Tensor, block: int) -> float:
    started = time.perf_counter()
    eliminate(h, solution, index, len(index) - len(index) // 4, block=block)
    if h.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--channels", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--outputs", type=int, default=1024)
    parser.add_argument("--one-by-one-up-to", type=int, default=1024, help="time block=1 up to this many channels")
    args = parser.parse_args()
    rows = []
    for channels in args.channels:
        inputs = problem(channels, args.outputs, args.device)
        row = {"channels": channels, "outputs": args.outputs, "removed": channels // 4}
        row["seconds, blocks of 32"] = round(seconds(*inputs, block=32), 3)
        if channels <= args.one_by_one_up_to:
            row["seconds, one by one"] = round(seconds(*inputs, block=1), 3)
        rows.append(row)
        print(row, flush=True)
    settings = machine(args.device) | {"dtype": "float64"}
    save({"settings": settings, "rows": rows}, results_file("greedy_cost", args.device))


if __name__ == "__main__":
    main()
