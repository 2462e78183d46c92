"""Measure what the notebooks plot: each experiment fills one file of data/results. A killed run goes on when repeated.

python data/experiments.py criteria        # notebook 04: every criterion, nothing repaired
python data/experiments.py recovery        # notebook 09: the main recipes, three calibration sets
python data/experiments.py grid            # notebook 09: three calibration sets of code alone; criteria times remedies
"""

from __future__ import annotations

import argparse
from pathlib import Path

from greedy_helpers.compare import CRITERIA, FLAP, RECOMMENDED, Recipe, Settings, sweep

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = ("llama-mini", "gpt2-mini")
SEEDS = (0, 1, 2)


def criteria() -> None:
    """Notebook 04: criteria without remedies at three ratios; random three times."""
    settings, ratios, out = Settings(evaluation=32), (0.1, 0.25, 0.5), RESULTS / "criteria.json"
    names = [name for name in CRITERIA if name != "exact greedy"]
    sweep(out, MODELS, [Recipe(name) for name in names], ratios, settings=settings)
    sweep(out, MODELS, [Recipe("random")], ratios, seeds=SEEDS, settings=settings)


def recovery() -> None:
    """Notebook 09: recipes at 25 and 50%, calibration sets that hold both kinds of text."""
    settings = Settings(evaluation=24, source="code+prose")
    recipes = [
        *(Recipe("second moment", remedy) for remedy in ("none", "two-step (paper)", "recommended")),
        FLAP,
        Recipe("FLAP WIFV", "bias (FLAP)"),
        *(Recipe(name, "recommended") for name in ("Wanda-sp", "output energy", "exact greedy")),
        Recipe("energy heads, greedy FFN", "recommended"),
        RECOMMENDED,
    ]
    for seed in SEEDS:  # hours on two cores: stop it where you like
        sweep(RESULTS / "recovery.json", MODELS, recipes, (0.25, 0.5), seeds=(seed,), settings=settings)


def grid() -> None:
    """Calibrated on code alone, at 25 and 50%: main recipes with three calibration sets; criteria times remedies."""
    settings, out = Settings(evaluation=32), RESULTS / "recovery_code.json"
    main = [
        *(Recipe("second moment", remedy) for remedy in ("none", "two-step (paper)", "both", "recommended")),
        FLAP,
        Recipe("FLAP WIFV", "none", "adaptive"),
        Recipe("FLAP WIFV", "bias (FLAP)"),
        *(Recipe(name, "recommended") for name in ("output energy", "exact greedy", "energy heads, greedy FFN")),
        RECOMMENDED,
        Recipe("exact greedy", "recommended", "cost"),
    ]
    criteria = ("random", "L2", "Wanda-sp", "FLAP WIFV", "Taylor mix", "second moment", "output energy", "exact greedy")
    remedies = ("none", "bias (FLAP)", "two-step (paper)", "recommended")
    sweep(out, MODELS, main, (0.25, 0.5), seeds=SEEDS, settings=settings)
    everything = [Recipe(criterion, remedy) for criterion in criteria for remedy in remedies]
    sweep(out, MODELS, everything, (0.25, 0.5), settings=settings)  # hours on two cores


EXPERIMENTS = {"criteria": criteria, "recovery": recovery, "grid": grid}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=EXPERIMENTS)
    for name in parser.parse_args().experiments:
        EXPERIMENTS[name]()
