"""LoRA retraining behind a cut, against least squares: the same units gone, the same calibration tokens, the same time.

    python benchmarks/lora.py --seed 0 1 2
    python benchmarks/lora.py --model smollm2-135m --calibration "c4.jsonl[:800]" --windows 160 \
        --text "WikiText-2=wiki.test.raw" "C4=c4.jsonl[800:1000]" --judged 32 --judged-seq 512

A cut is the set of units that a recipe keeps (`CUTS`). What follows it is one of `RECOVERIES`:

- `none`: the units are gone, all other weights are the dense model's.
- `repair`: level 2 of every module is refitted to the module's own outputs (`"post, local"`, OSSCAR's repair). The
  units are known, so that its time is that of measuring and solving alone.
- `LoRA x1`, `LoRA x10`: adapters are trained behind the bare cut for the repair's time, or ten times as long.
- `repair + LoRA x10`: the repair, then adapters for ten times its time.

Time is CPU time of this process, on one thread by default: other load on the machine hardly changes it. Choosing the
units is not part of it. Training ends with the step whose end is nearest to its time; the steps and tokens that it came
to are recorded. The adapters are LLM-Pruner's: rank 8, alpha 16, dropout 0.05, on all seven linears of a block; AdamW
without weight decay, the learning rate falling linearly to zero.

Where the learning rate starts is chosen once per model and recovery, on the first of `CUTS` with seed 0: cut, repaired
and trained with three quarters of the calibration windows, judged on the last quarter, at three neighbours of `RATES`
or more, until the best has a worse one on either side. Neither this choice nor merging counts as training time.

LLM-Pruner (arXiv 2305.11627), with which the paper compares, trains these adapters on 50,000 instructions (Alpaca) for
two epochs: far more text, from elsewhere. Here both sides see the calibration windows and nothing else.

Adds the rows that are missing to the file, one by one: run it again to go on. One file holds several models. Text is
recorded by the sha256 of its tokens.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from common import RESULTS, HeldOut, digest, load_average, machine, save
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

import greedy_helpers as gh
from greedy_helpers.data import calibration_tokens
from greedy_helpers.evaluate import perplexity
from greedy_helpers.recipes import Recipe

CUTS = {
    "exact greedy": Recipe("exact greedy", "none"),
    "OSSCAR": gh.OSSCAR,  # every choice is made behind blocks that are repaired already
    "Taylor vector": Recipe("Taylor vector", "none"),  # LLM-Pruner's
    "output energy": Recipe("output energy", "none"),
}
RECOVERIES = {  # name -> (repaired first?, training time as a multiple of the repair's)
    "none": (False, 0),
    "repair": (True, 0),
    "LoRA x1": (False, 1),
    "LoRA x10": (False, 10),
    "repair + LoRA x10": (True, 10),
}
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FIRST_RATE = 1e-3
BATCH = 4  # windows per step
LORA = LoraConfig(
    r=8, lora_alpha=16, lora_dropout=0.05, task_type="CAUSAL_LM",
    target_modules="q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split(),
)  # fmt: skip


def cut(dense: PreTrainedModel, calibration: Tensor, ratio: float, recipe: Recipe) -> tuple[PreTrainedModel, dict]:
    """A copy without the units that the recipe removes, all other weights as they were; the units kept, by module."""
    report = gh.prune(copy.deepcopy(dense), calibration, ratio, recipe, progress=False)
    kept = {step.name: step.keep for step in report.steps}
    bare = copy.deepcopy(dense)
    for module in gh.depth2_modules(bare):
        gh.remove_units(module, kept[module.name])
    return bare, kept


def repair(dense: PreTrainedModel, calibration: Tensor, kept: dict[str, Tensor]) -> tuple[PreTrainedModel, float]:
    """A copy with the same units, its level 2 refitted; and the CPU seconds that took."""
    model, scores = copy.deepcopy(dense), {}
    for module in gh.depth2_modules(model):
        scores[module.name] = torch.zeros(module.n_units).index_fill(0, kept[module.name], 1.0)
    plan = {name: len(units) for name, units in kept.items()}
    recipe, started = Recipe(functools.partial(gh.fixed_scores, scores=scores), "post, local"), time.process_time()
    gh.prune(model, calibration, None, recipe, plan=plan, progress=False)
    return model, time.process_time() - started


def train(model: PreTrainedModel, tokens: Tensor, rate: float, seconds: float, seed: int = 0) -> tuple[PeftModel, dict]:
    """The model with trained adapters, not merged yet, and what was spent: one step at least, in random order."""
    torch.manual_seed(seed)  # the adapters' first values, the order of the windows, dropout
    started = time.process_time()
    adapted = get_peft_model(model, LORA).train()
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), rate, weight_decay=0.0)
    batches, losses, spent = [], [], time.process_time() - started
    while not losses or spent + spent / len(losses) / 2 <= seconds:
        batches = batches or [*tokens[torch.randperm(len(tokens))].split(BATCH)]
        optimizer.param_groups[0]["lr"] = rate * max(0.0, 1 - spent / seconds)
        batch = batches.pop()
        loss = adapted(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss.item(), batch.numel()))
        spent = time.process_time() - started
    epoch = losses[-math.ceil(len(tokens) / BATCH) :]
    return adapted.eval(), {
        "training seconds": round(spent, 1), "steps": len(losses), "tokens seen": sum(n for _, n in losses),
        "training loss, last epoch": round(sum(loss * n for loss, n in epoch) / sum(n for _, n in epoch), 4),
    }  # fmt: skip


def best_rate(loss: Callable[[float], float]) -> float:
    """From the first rate up while the loss falls, or else down: its neighbours in the table are worse."""
    best = RATES.index(FIRST_RATE)
    for step in (1, -1):
        while 0 <= best + step < len(RATES) and loss(RATES[best + step]) < loss(RATES[best]):
            best += step
    return RATES[best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-mini", help="folder or name, as load_model takes it")
    parser.add_argument("--calibration", default="code+prose", help="text source")
    parser.add_argument("--text", nargs="+", default=["code=code", "prose=prose"], metavar="NAME=SOURCE")
    parser.add_argument("--cut", nargs="+", choices=CUTS, default=["exact greedy", "Taylor vector"])
    parser.add_argument("--recovery", nargs="+", choices=RECOVERIES, default=list(RECOVERIES))
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--windows", type=int, default=32, help="of 256 calibration tokens")
    parser.add_argument("--judged", type=int, default=24, help="windows per held-out text")
    parser.add_argument("--judged-seq", type=int, default=256, help="tokens per held-out window")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "lora.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    dense, tokenizer = gh.load_model(args.model, "cpu", torch.float32)
    judge = HeldOut(tokenizer, args.text, args.judged, args.judged_seq)
    calibrations = {
        seed: calibration_tokens(tokenizer, args.windows, 256, args.calibration, seed=seed) for seed in {0, *args.seed}
    }
    settings = {
        "ratio": args.ratio,
        "calibration": f"{args.windows} random windows of 256 tokens",
        "calibration tokens of seed 0, sha256": digest(calibrations[0]),
        **judge.settings,
        "windows per step": BATCH,
        **machine("cpu"),
        "peft": version("peft"),
    }
    found = json.loads(args.out.read_text()) if args.out.exists() else {"models": {}, "rows": []}
    fresh = {"settings": settings, "dense": {}, "held-out losses by learning rate": {}}
    about = found["models"].setdefault(args.model, fresh)
    if about["settings"] != settings:
        parser.error(f"{args.out} was measured with {about['settings']}, not {settings}; name another file")

    @functools.cache
    def pilot() -> tuple[PreTrainedModel, PreTrainedModel, float]:
        bare, kept = cut(dense, seen, args.ratio, next(iter(CUTS.values())))
        return bare, *repair(dense, seen, kept)

    def held_out_loss(recovery: str, rate: float) -> float:
        """In nats per token, of training with three quarters of the windows; measured once."""
        measured = about["held-out losses by learning rate"].setdefault(recovery, {})
        if f"{rate:g}" not in measured:
            bare, repaired, seconds = pilot()
            repaired_first, times = RECOVERIES[recovery]
            adapted, _ = train(copy.deepcopy(repaired if repaired_first else bare), seen, rate, times * seconds)
            loss = math.log(perplexity(adapted.merge_and_unload(), held_out, batch_size=4))
            measured[f"{rate:g}"] = round(loss, 4)
            print(recovery, measured, flush=True)
            save(found, args.out)
        return measured[f"{rate:g}"]

    about["dense"] = about["dense"] or judge.perplexities(dense)
    seen, held_out = calibrations[0].tensor_split([3 * args.windows // 4])
    rates = {name: best_rate(functools.partial(held_out_loss, name)) for name in args.recovery if RECOVERIES[name][1]}
    for seed, name in itertools.product(args.seed, args.cut):
        keys = [{"model": args.model, "cut": name, "recovery": recovery, "seed": seed} for recovery in args.recovery]
        keys = [key for key in keys if not any(row.items() >= key.items() for row in found["rows"])]
        if not keys:
            continue
        calibration = calibrations[seed]
        bare, kept = cut(dense, calibration, args.ratio, CUTS[name])
        repaired, seconds = repair(dense, calibration, kept)
        for key in keys:
            repaired_first, times = RECOVERIES[key["recovery"]]
            model, spent = copy.deepcopy(repaired if repaired_first else bare), {}
            if times:
                rate = rates[key["recovery"]]
                adapted, spent = train(model, calibration, rate, times * seconds, seed)
                model, spent = adapted.merge_and_unload(), {"learning rate": rate} | spent
            row = key | judge.perplexities(model) | {"repair seconds": round(seconds, 1)} | spent
            row |= {"parameters": gh.count_parameters(model)["total"], "units left": [len(u) for u in kept.values()]}
            row |= {"calibration tokens, sha256": digest(calibration), "load average": load_average()}
            print(row, flush=True)
            found["rows"].append(row)
            save(found, args.out)


if __name__ == "__main__":
    main()
