"""Measure what the notebooks plot: each experiment fills one file of data/results. A killed run goes on when repeated.

python data/experiments.py criteria        # notebook 04: every criterion, nothing repaired
python data/experiments.py recovery        # notebook 09: the main recipes, three calibration sets
python data/experiments.py grid            # notebook 08: targets and plans, three calibration sets of code alone
python data/experiments.py comparison      # notebook 09: criteria times remedies, three ratios, three calibration sets
python data/experiments.py choices         # notebook 09: multiple choice, main recipes, three calibration sets

--models restricts the last two, which write a file per model, so that two processes can share the work.

A ratio is the paper's share of every module's units, rounded down: allocation "floor". The recorded rows with the
allocations "adaptive" and "cost" were measured when these two removed as many parameters as that rule. Today they
remove the ratio itself: on these models the same at 25 and 50%, up to 0.03% of the parameters, and more at 20%.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from greedy_helpers.compare import Settings, sweep
from greedy_helpers.course.choices import choice_judge
from greedy_helpers.recipes import CRITERIA, FLAP, OSSCAR, PAPER, PREPARED, Recipe

floor = partial(Recipe, allocation="floor")
RESULTS = Path(__file__).resolve().parent / "results"
MODELS = ("llama-mini", "gpt2-mini")
SEEDS = (0, 1, 2)


def criteria() -> None:
    """Notebook 04: criteria without remedies at three ratios; random three times."""
    settings, ratios, out = Settings(evaluation=32), (0.1, 0.25, 0.5), RESULTS / "criteria.json"
    names = [name for name in (*CRITERIA, *PREPARED) if "greedy" not in name]  # those presume a refit
    sweep(out, MODELS, [floor(name, "none") for name in names], ratios, settings=settings)
    sweep(out, MODELS, [floor("random", "none")], ratios, seeds=SEEDS, settings=settings)


def recovery() -> None:
    """Notebook 09: recipes at 25 and 50%, calibration sets that hold both kinds of text."""
    settings = Settings(evaluation=24, source="code+prose")
    recipes = [
        *(floor("second moment", remedy) for remedy in ("none", "pre", "both, residual")),
        FLAP,
        floor("FLAP WIFV", "bias"),
        replace(OSSCAR, allocation="floor"),
        *(floor(name) for name in ("Wanda-sp", "output energy", "energy heads, greedy FFN")),
        floor(),
    ]
    for seed in SEEDS:  # hours on two cores: stop it where you like
        sweep(RESULTS / "recovery.json", MODELS, recipes, (0.25, 0.5), seeds=(seed,), settings=settings)


def grid() -> None:
    """Calibrated on code alone, at 25 and 50%: main recipes with three calibration sets; criteria times remedies."""
    settings, out = Settings(evaluation=32), RESULTS / "recovery_code.json"
    main = [
        *(floor("second moment", remedy) for remedy in ("none", "pre", "both", "both, residual")),
        FLAP,
        Recipe("FLAP WIFV", "none", allocation="adaptive"),
        floor("FLAP WIFV", "bias"),
        *(floor(name) for name in ("output energy", "energy heads, greedy FFN")),
        floor(),
        Recipe(allocation="cost"),
    ]
    criteria = ("random", "L2", "Wanda-sp", "FLAP WIFV", "Taylor mix", "second moment", "output energy", "exact greedy")
    remedies = ("none", "bias", "pre", "both, residual")
    sweep(out, MODELS, main, (0.25, 0.5), seeds=SEEDS, settings=settings)
    everything = [floor(criterion, remedy) for criterion in criteria for remedy in remedies]
    sweep(out, MODELS, everything, (0.25, 0.5), settings=settings)  # hours on two cores


def comparison(models: Sequence[str] = MODELS) -> None:
    """Notebook 09: criteria times remedies at 20, 25 and 50%, three calibration sets of both kinds of text."""
    settings = Settings(calibration=16, evaluation=16, source="code+prose")
    criteria = "random|L2|Wanda-sp|FLAP WIFV|Taylor mix|second moment|output energy|exact greedy".split("|")
    remedies = ("none", "bias", "pre", "both, residual")
    recipes = [FLAP, *(floor(criterion, remedy) for criterion in criteria for remedy in remedies)]
    for seed in SEEDS:  # about two hours per model on one core
        for model in models:
            sweep(RESULTS / f"comparison_{model}.json", [model], recipes, (0.25, 0.5, 0.2), (seed,), settings)


def choices(models: Sequence[str] = MODELS) -> None:
    """Notebook 09: multiple choice beside perplexity for the main recipes, three calibration sets."""
    settings = Settings(calibration=16, evaluation=16, source="code+prose")
    recipes = [floor("random", "none"), floor("second moment", "none"), PAPER, FLAP, floor()]
    for seed in SEEDS:  # about fifteen minutes per model on one core
        for model in models:
            out = RESULTS / f"choices_{model}.json"
            sweep(out, [model], recipes, (0.25, 0.5), (seed,), settings, extra=choice_judge(n=100))


PER_MODEL = {"comparison": comparison, "choices": choices}
EXPERIMENTS = {"criteria": criteria, "recovery": recovery, "grid": grid} | PER_MODEL

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=EXPERIMENTS)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    args = parser.parse_args()
    for name in args.experiments:
        EXPERIMENTS[name](*([args.models] if name in PER_MODEL else []))
