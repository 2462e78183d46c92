"""Measure what the notebooks plot: each experiment fills one file of data/results. A killed run goes on when repeated.

python data/experiments.py criteria        # every criterion, nothing repaired
python data/experiments.py recovery        # every remedy, and the recommended recipe, three calibration seeds
"""

from __future__ import annotations

import argparse
from pathlib import Path

from greedy_helpers.compare import CRITERIA, FLAP, RECOMMENDED, Recipe, Settings, sweep

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = ("llama-mini", "gpt2-mini")


def criteria() -> None:
    """Notebook 04: criteria without remedies at three ratios; random three times."""
    settings, ratios, out = Settings(evaluation=32), (0.1, 0.25, 0.5), RESULTS / "criteria.json"
    names = [name for name in CRITERIA if name != "exact greedy"]
    sweep(out, MODELS, [Recipe(name) for name in names], ratios, settings=settings)
    sweep(out, MODELS, [Recipe("random")], ratios, seeds=(0, 1, 2), settings=settings)


def recovery() -> None:
    """Notebooks 08 and 09: recipes at 25 and 50% with three calibration sets; criteria times remedies with one."""
    out, settings = RESULTS / "recovery.json", Settings(evaluation=32)
    main = [
        *(Recipe("second moment", remedy) for remedy in ("none", "two-step (paper)", "both", "recommended")),
        FLAP,
        Recipe("FLAP WIFV", "none", "adaptive"),
        Recipe("FLAP WIFV", "bias (FLAP)"),
        Recipe("output energy", "recommended"),
        RECOMMENDED,
        Recipe("exact greedy", "recommended", "cost"),
    ]
    criteria = ("random", "L2", "Wanda-sp", "FLAP WIFV", "Taylor mix", "second moment", "output energy", "exact greedy")
    remedies = ("none", "bias (FLAP)", "two-step (paper)", "recommended")
    grid = [Recipe(criterion, remedy) for criterion in criteria for remedy in remedies]
    sweep(out, MODELS, main, (0.25, 0.5), settings=settings)
    sweep(out, MODELS, main, (0.25, 0.5), seeds=(1, 2), settings=settings)
    sweep(out, MODELS, grid, (0.25, 0.5), settings=settings)
    sweep(out, MODELS, main, (0.2,), settings=settings)


EXPERIMENTS = {"criteria": criteria, "recovery": recovery}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=EXPERIMENTS)
    for name in parser.parse_args().experiments:
        EXPERIMENTS[name]()
