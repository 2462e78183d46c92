"""Recipes side by side on one model: perplexity behind the same budget, calibration text and unit.

    python benchmarks/recipes.py --model smollm2-135m --calibration "c4.jsonl[:800]" \
        --text "WikiText-2=wiki.test.raw" "C4=c4.jsonl[800:1000]" --out data/results/smollm2_recipes.json
    python benchmarks/recipes.py --model llama-mini --calibration code+prose --windows 32 \
        --text code=code prose=prose --judged 24 --judged-seq 256 --out data/results/llama-mini_recipes.json

A recipe "on our plan" spends the budget by prices in nats (allocation "loss prices"), which are computed once per
calibration set and serve all recipes and ratios. The other way round, "recommended, influence T" is our choice of units
and our repair on MoDeGPT's plan with temperature T, "recommended, slope S" on ATP's, where the last block loses S times
the ratio more than the first. "recommended, twice" spends half of the budget, takes metric and prices anew from the
pruned model, and spends the rest. "blocks dropped" removes whole blocks, those of least influence (ShortGPT), as many
as do not exceed the ratio, and repairs nothing.

Adds the rows that are missing to the file, one by one: run it again to go on. Text is recorded by its sha256. With
`--picture FILE.png` nothing is measured: what is recorded in `--out` is drawn, as the README shows it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import statistics
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from common import HeldOut, Record, digest, load_average, machine
from transformers import PreTrainedModel

import greedy_helpers as gh
from greedy_helpers.allocation import Plan, asked_parameters
from greedy_helpers.course import scoreboard
from greedy_helpers.data import calibration_tokens
from greedy_helpers.data_free import self_generated_tokens
from greedy_helpers.depth import block_influence, influence_shares, plan_of_shares, slope_shares
from greedy_helpers.prices import loss_metric
from greedy_helpers.pruning import loss_prices
from greedy_helpers.recipes import Recipe
from greedy_helpers.structure import Depth2Module, blocks_of

RECIPES = {line.name: line.recipe for line in scoreboard.LINES}
RECIPES |= {
    "exact greedy, both, residual": Recipe("exact greedy", "both, residual"),
    "recommended, uniform": replace(gh.RECOMMENDED, allocation="uniform"),
}
# The recommended recipe with one part exchanged.
RECIPES |= {
    "recommended, plain search": replace(gh.RECOMMENDED, criterion="exact greedy"),
    "recommended, residual target": replace(gh.RECOMMENDED, remedy="post, residual"),
    "recommended, residual target, both refits": replace(gh.RECOMMENDED, remedy="both, residual"),
    "recommended, no repair": replace(gh.RECOMMENDED, remedy="none"),
    "recommended, damping 0.01": replace(gh.RECOMMENDED, damp=0.01),
}
MARKS = ("<!-- record: written by benchmarks/recipes.py -->", "<!-- end of record -->")
ON_OUR_PLAN = ("OSSCAR", "paper", "Wanda-sp", "output energy, no repair")
RECIPES |= {f"{name}, on our plan": replace(RECIPES[name], allocation="loss prices") for name in ON_OUR_PLAN}
TEMPERATURES = {f"recommended, influence {temperature:g}": temperature for temperature in (0.1, 0.3, 1.0)}
SLOPES = {f"recommended, slope {slope:g}": slope for slope in (0.5, 1.0)}
RECIPES |= dict.fromkeys([*TEMPERATURES, *SLOPES], RECIPES["recommended, uniform"])
RECIPES["recommended, twice"] = gh.RECOMMENDED
RECIPES["blocks dropped"] = None  # nothing is scored unit by unit


def depth_plan(name: str, modules: list[Depth2Module], influence: list[float], ratio: float) -> Plan:
    """The plan of a recipe that spreads the budget over the blocks by a rule of others."""
    if name in TEMPERATURES:
        return plan_of_shares(modules, influence_shares(influence, ratio, TEMPERATURES[name]))
    n = len(influence)
    return plan_of_shares(modules, slope_shares(n, ratio, SLOPES[name] * ratio / (n - 1)))


def drop_blocks(model: PreTrainedModel, influence: list[float], ratio: float) -> dict:
    """The blocks of least influence go; what was removed, for the row."""
    before, blocks = gh.count_parameters(model), blocks_of(model)
    order = sorted(range(len(blocks)), key=lambda index: influence[index])
    dropped = sorted(order[: int(ratio * len(blocks))])
    for index in reversed(dropped):
        del blocks[index]
    after = gh.count_parameters(model)
    shares = {f"{part} removed": round(1 - after[part] / before[part], 5) for part in ("total", "blocks")}
    return {"dropped": dropped} | shares


def shown(found: dict, ratio: float, recipes: list[str]) -> list[dict]:
    """Rows for a picture or a table: of the calibration text, in kind and size, that most rows were made with."""
    ((most, _),) = Counter((row["calibration"], row["windows"]) for row in found["rows"]).most_common(1)
    wanted = [row for row in found["rows"] if (row["calibration"], row["windows"]) == most]
    return [row for row in wanted if row["ratio"] == ratio and row["recipe"] in recipes]


def draw(found: dict, file: Path, ratio: float, recipes: list[str]) -> None:
    """Excess log-perplexity per recipe and unit, a mark per text: the mean over seeds, a line lowest to highest."""
    from matplotlib import pyplot as plt

    from greedy_helpers.course import plots

    plots.use_course_style()
    by_name = {}
    for row in shown(found, ratio, recipes):
        name = f"{row['recipe']} ({'query' if row['unit'] == 'query' else 'KV'} heads)"
        by_name.setdefault(name, []).append({t: math.log(row[t] / d) for t, d in found["dense"].items()})
    names = sorted(by_name, key=lambda name: -statistics.mean(sum(row.values()) for row in by_name[name]))
    fig, ax = plt.subplots(figsize=(8, 0.42 * len(names) + 1.2), layout="constrained", facecolor="white")
    for number, (text, dense) in enumerate(found["dense"].items()):
        for y, name in enumerate(names):
            excess = [row[text] for row in by_name[name]]
            mean, label = statistics.mean(excess), None if y else f"{text} (dense perplexity {dense:.1f})"
            ax.plot([min(excess), max(excess)], [y, y], color=f"C{number}", linewidth=1)
            ax.plot(mean, y, "os"[number], color=f"C{number}", label=label)
            ax.annotate(f"{dense * math.exp(mean):.0f}", (mean, y), (0, 6 if number == 0 else -11), ha="center",
                        textcoords="offset points", fontsize=8, color=f"C{number}")  # fmt: skip
    ax.set_yticks(range(len(names)), names)
    ax.set_xlim(0, 1.08 * ax.get_xlim()[1])
    ax.set_xlabel("excess loss, nats per token (the numbers: perplexity)")
    fig.suptitle(f"SmolLM2-135M without {ratio:.0%} of its blocks' parameters, no retraining", fontsize=13)
    ax.margins(y=0.12)
    ax.grid(axis="y", alpha=0.3)
    fig.legend(loc="outside lower center", ncols=2)
    fig.savefig(file, dpi=110)


def lines_of(found: dict, ratio: float, recipes: list[str]) -> str:
    """The README's lines: perplexity behind the cut, the mean of the losses over the calibration sets; query heads."""
    texts = [*found["dense"]]
    table = [[f"{ratio:.0%} removed, no retraining", *texts, "calibration sets"], ["---", *["---:"] * (len(texts) + 1)]]
    table.append(["dense", *(f"{perplexity:.1f}" for perplexity in found["dense"].values()), ""])
    for name in recipes:
        rows = [row for row in shown(found, ratio, [name]) if row["unit"] == "query"]
        means = [math.exp(statistics.mean(math.log(row[text]) for row in rows)) for text in texts]
        table.append([name, *(f"{mean:.1f}" for mean in means), str(len(rows))])
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="folder or name, as load_model takes it")
    parser.add_argument("--calibration", help="text source, or self-generated")
    parser.add_argument("--text", nargs="+", default=[], metavar="NAME=SOURCE", help="held-out text")
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--unit", nargs="+", choices=["query", "kv"], default=["query", "kv"])
    parser.add_argument("--ratio", nargs="+", type=float, default=[0.25])
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--windows", nargs="+", type=int, default=[160], help="of 256 calibration tokens")
    parser.add_argument("--judged", type=int, default=32, help="windows of held-out tokens per text")
    parser.add_argument("--judged-seq", type=int, default=512, help="tokens of each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep every pruned model in a folder below")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--readme", type=Path, help="nothing is measured: the file's table is written again")
    args = parser.parse_args()
    if args.readme:
        before, rest = args.readme.read_text().split(MARKS[0])
        lines = lines_of(json.loads(args.out.read_text()), args.ratio[0], args.recipe)
        args.readme.write_text(f"{before}{MARKS[0]}\n{lines}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
        return None
    if args.picture:
        return draw(json.loads(args.out.read_text()), args.picture, args.ratio[0], args.recipe)
    if not args.calibration or not args.text:
        parser.error("--calibration and --text are needed to measure")
    torch.set_num_threads(args.threads)

    dense, tokenizer = gh.load_model(args.model, "cpu", torch.float32)
    held_out = HeldOut(tokenizer, args.text, args.judged, args.judged_seq)
    settings = {"calibration": "random windows of 256 tokens", **held_out.settings, **machine("cpu")}
    record = Record(args.out, {"settings": settings, "dense": {}}, parser)
    found = record.found
    if not found["dense"]:
        found["dense"] = held_out.perplexities(dense)
        print(found["dense"], flush=True)

    text = "self-generated" if args.calibration == "self-generated" else Path(args.calibration).name

    @functools.cache
    def calibration_of(windows: int, seed: int) -> torch.Tensor:
        if text == "self-generated":
            return self_generated_tokens(dense, tokenizer, windows, 256, seed=seed)
        return calibration_tokens(tokenizer, windows, 256, args.calibration, seed=seed)

    @functools.cache
    def influence_of(windows: int, seed: int) -> list[float]:
        return block_influence(dense, calibration_of(windows, seed), batch_size=16)

    @functools.cache
    def metric_of(windows: int, seed: int) -> tuple[dict[str, torch.Tensor], float]:
        started = time.process_time()
        metric = loss_metric(dense, calibration_of(windows, seed), batch_size=16)
        return metric, time.process_time() - started

    @functools.cache
    def prices_of(windows: int, seed: int, unit: str) -> tuple[dict[str, torch.Tensor], float]:
        (metric, _), started = metric_of(windows, seed), time.process_time()
        prices = loss_prices(dense, calibration_of(windows, seed), unit=unit, metric=metric, batch_size=16)
        return prices, time.process_time() - started

    for windows, seed, ratio, unit, name in itertools.product(
        args.windows, args.seed, args.ratio, args.unit, args.recipe
    ):
        key = {"recipe": name, "ratio": ratio, "unit": unit, "calibration": text, "windows": windows, "seed": seed}
        if record.known(**key):
            continue
        calibration, sample = calibration_of(windows, seed), (windows, seed)
        model, recipe, budget, spent = copy.deepcopy(dense), RECIPES[name], {"ratio": ratio}, {}
        modules = gh.depth2_modules(dense, unit=unit)
        if name == "similar heads first":
            model.set_attn_implementation("eager")
        if name == "random units":
            recipe = replace(recipe, criterion=functools.partial(gh.random_scores, seed=seed))
        twice = name == "recommended, twice"
        shared = None if twice else recipe  # what may use metric and prices of the dense model
        if shared and "loss" in shared.names["criterion"] + shared.names["allocation"]:
            metric, spent["cpu_seconds of the metric"] = metric_of(*sample)
            if recipe.criterion == "exact greedy, loss metric":
                recipe = replace(recipe, criterion=functools.partial(gh.exact_greedy, metric=metric))
        if shared and shared.allocation == "loss prices":
            prices, spent["cpu_seconds of the prices"] = prices_of(*sample, unit)
            budget = {"plan": gh.cost_plan(modules, prices, asked_parameters(modules, ratio))}
        elif name in TEMPERATURES | SLOPES | {"blocks dropped": None}:
            influence = influence_of(*sample)
            if recipe:
                budget = {"plan": depth_plan(name, modules, influence, ratio)}
        started, cpu = time.perf_counter(), time.process_time()
        if recipe is None:
            done = drop_blocks(model, influence, ratio)
        else:
            how = {"unit": unit, "batch_size": 16, "progress": False}
            left: dict[str, float] = {}
            for part in [{"ratio": ratio / 2}, {"ratio": ratio / (2 - ratio)}] if twice else [budget]:
                report = gh.prune(model, calibration, recipe=recipe, **part, **how)
                left = {key: left.get(key, 1) * (1 - share) for key, share in report.removed.items()}
            done = {f"{part} removed": round(1 - share, 5) for part, share in left.items()}
            done |= {"units left": [step.units_after for step in report.steps]}
            if not twice:  # there the second report compares with the model between the two
                done |= {"stream error": round(report.stream_errors[-1], 5)}
        spent |= {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
        row = key | (RECIPES[name].names if recipe else {}) | held_out.perplexities(model) | done
        row |= {"calibration tokens, sha256": digest(calibration)}
        row |= {k: round(v, 1) for k, v in spent.items()} | {"load average": load_average()}
        if args.save and recipe:
            folder = args.save / ", ".join(f"{value}" for value in key.values())
            gh.save_pruned(model, folder, tokenizer, report=report, overwrite=True)
        record.add(row)


if __name__ == "__main__":
    main()
