"""The package on the command line: `python -m greedy_helpers --help`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import pandas as pd
import torch

from . import distributed
from .checkpoint import MANIFEST, load_model, save_pruned
from .compare import ALLOCATIONS, CRITERIA, RECOMMENDED, REMEDIES, Recipe, Settings, apply, frame, sweep
from .course.choices import choice_tasks
from .data import calibration_tokens, default_sources, self_generated_tokens
from .evaluate import evaluate_text, generate_text, read_text
from .structure import count_parameters
from .tasks import multiple_choice, zero_shot

_EXAMPLES = """examples:
  python -m greedy_helpers prune llama-mini pruned --ratio 0.25
  python -m greedy_helpers prune org/model pruned --criterion "second moment" --remedy "two-step (paper)"
  python -m greedy_helpers prune org/model pruned --criterion "exact greedy" --lazy --work-dir work --device cuda
  torchrun --nproc-per-node 2 -m greedy_helpers prune org/model pruned
  python -m greedy_helpers evaluate llama-mini pruned --windows 48
  python -m greedy_helpers evaluate llama-mini pruned --windows 48 --choices 150
  python -m greedy_helpers evaluate org/model pruned --tasks boolq piqa hellaswag
  python -m greedy_helpers compare llama-mini --criteria L2 "output energy" --remedies none recommended --out sweep.json
  python -m greedy_helpers generate pruned --prompt "import os"

exit codes: 0 done, 1 refused (the message says why; nothing was changed), 2 wrong arguments
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m greedy_helpers",
        description="Prune large language models without retraining.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    commands = parser.add_subparsers(dest="command", required=True)

    prune = commands.add_parser("prune", help="prune a model, repair it, and save it")
    prune.add_argument("model", help="embedded name, local folder or Hub id")
    prune.add_argument("folder", type=Path, help="where to save the pruned model")
    prune.add_argument("--ratio", type=float, default=0.25, help="share of every module's units (default 0.25)")
    prune.add_argument(
        "--criterion", default=RECOMMENDED.criterion, help=f"{', '.join(CRITERIA)}; default: %(default)s"
    )
    prune.add_argument("--remedy", default=RECOMMENDED.remedy, choices=REMEDIES)
    prune.add_argument("--allocation", default="uniform", choices=ALLOCATIONS)
    prune.add_argument("--blocks", type=_blocks, metavar="FIRST:END", help="prune these only, e.g. 4:30 (default: all)")
    prune.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    _text_arguments(prune, calibration=64)
    prune.add_argument("--damp", type=float, default=1e-2)
    prune.add_argument("--device")
    prune.add_argument("--batch-size", type=int, default=16, help="windows per forward pass (default %(default)s)")
    prune.add_argument("--work-dir", type=Path, help="commit finished blocks here: repeat the command to go on")
    prune.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the weights (default: float32 on a CPU, else as saved)",
    )
    prune.add_argument(
        "--store", help="where hidden states wait, e.g. cpu to save a GPU's memory (default: the device)"
    )
    prune.add_argument("--lazy", action="store_true", help="one block at a time in memory; needs --work-dir")

    evaluate = commands.add_parser("evaluate", help="perplexity, accuracy and parameters of models, dense or pruned")
    evaluate.add_argument("models", nargs="+")
    evaluate.add_argument("--windows", type=int, help="held-out windows per text (default: all)")
    evaluate.add_argument("--seq", type=int, default=256, help="tokens per window (default %(default)s)")
    evaluate.add_argument("--stride", type=int, help="tokens from window to window (default: --seq, no overlap)")
    evaluate.add_argument(
        "--sources",
        nargs="+",
        help="code, prose, ptb, c4, files, Hub datasets; default: code and prose for embedded models, else WikiText-2",
    )
    evaluate.add_argument(
        "--choices",
        type=_several,
        metavar="N",
        help="also N multiple-choice items per task, from the held-out texts",
    )
    evaluate.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="also tasks of lm_eval (needs greedy-helpers[eval]) or YAML files"
    )
    evaluate.add_argument("--limit", type=int, help="items per task of lm_eval (default: all)")
    evaluate.add_argument("--device")

    compare = commands.add_parser("compare", help="a grid of recipes, resumable: repeat the command to go on")
    compare.add_argument("models", nargs="+")
    compare.add_argument("--criteria", nargs="+", default=["second moment", RECOMMENDED.criterion])
    compare.add_argument("--remedies", nargs="+", default=["none", "recommended"], choices=REMEDIES)
    compare.add_argument("--ratios", nargs="+", type=float, default=[0.25])
    compare.add_argument("--seeds", nargs="+", type=int, default=[0])
    compare.add_argument("--windows", type=int, default=48, help="held-out windows per text")
    compare.add_argument("--out", type=Path, required=True, help="JSON file, written after every run")
    _text_arguments(compare, calibration=32, seed=False)

    generate = commands.add_parser("generate", help="let a model continue a prompt")
    generate.add_argument("model")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--tokens", type=int, default=64)
    generate.add_argument("--temperature", type=float, default=0.0)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--device")
    return parser


def _blocks(text: str) -> range:
    first, colon, end = text.partition(":")
    if not colon or not (first + end).isdigit() or not first or not end:
        raise argparse.ArgumentTypeError(f"expected FIRST:END, e.g. 4:30, found {text!r}")
    return range(int(first), int(end))


def _several(text: str) -> int:
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"expected at least 2 items, found {text!r}")
    return int(text)


def _text_arguments(parser: argparse.ArgumentParser, calibration: int, seed: bool = True) -> None:
    parser.add_argument("--calibration", type=int, default=calibration, help="windows to calibrate on (%(default)s)")
    parser.add_argument("--seq", type=int, default=256, help="tokens per window (default %(default)s)")
    parser.add_argument(
        "--source",
        help="calibration text: code, prose, code+prose, a file, a Hub dataset; {}".format(
            "prune also takes self-generated (the model writes it)"
        ),
    )
    if seed:
        parser.add_argument("--seed", type=int, default=0, help="of the calibration windows and of random scores")


def _prune(args: argparse.Namespace) -> dict:
    recipe = Recipe(args.criterion, args.remedy, args.allocation)
    if args.folder.exists() and not args.overwrite and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise FileExistsError(f"{args.folder} exists and is not empty; pass --overwrite to replace it")
    device = distributed.start(args.device)
    model, tokenizer = load_model(args.model, device, args.dtype and getattr(torch, args.dtype), lazy=args.lazy)
    source = args.source or "+".join(default_sources(args.model).values())
    if source == "self-generated":
        calibration = self_generated_tokens(model, tokenizer, args.calibration, args.seq, seed=args.seed)
    else:
        calibration = calibration_tokens(tokenizer, args.calibration, args.seq, source, args.seed)
    how = {"damp": args.damp, "blocks": args.blocks, "batch_size": args.batch_size, "work_dir": args.work_dir}
    how["store"] = args.store
    if args.lazy:  # the embeddings are in the CPU's memory, the blocks come to the device
        how["device"] = device or ("cuda" if torch.cuda.is_available() else "cpu")
    report = apply(model, calibration, args.ratio, recipe, seed=args.seed, **how)
    details = {"base model": args.model, "recipe": str(recipe), "calibration text": f"{source}, seed {args.seed}"}
    if distributed.is_first():
        save_pruned(model, args.folder, tokenizer, report=report, details=details, overwrite=args.overwrite)
    distributed.finish()
    return {"saved": str(args.folder), **details, **report.to_dict(tensors=False)}


def _evaluate(args: argparse.Namespace) -> dict:
    found = {}
    for name in args.models:
        model, tokenizer = load_model(name, args.device)
        base = name if not Path(name).is_dir() else _base_of(Path(name))
        sources = {source: source for source in args.sources} if args.sources else default_sources(base)
        texts = {label: read_text(tokenizer, source) for label, source in sources.items()}
        scores = {
            label: evaluate_text(model, text, args.seq, args.stride, args.windows) for label, text in texts.items()
        }
        found[name] = {
            "texts": {label: score.to_dict() for label, score in scores.items()},
            "parameters": count_parameters(model),
        }
        if args.choices is not None:
            found[name]["choices"] = {
                label: multiple_choice(model, tokenizer, items).to_dict()
                for label, items in choice_tasks(sources, args.choices).items()
            }
        if args.tasks:
            table = zero_shot(model, tokenizer, args.tasks, limit=args.limit).astype(object)
            found[name]["tasks"] = table.where(table.notna(), None).to_dict("index")  # JSON has no NaN
    return found


def _base_of(folder: Path) -> str:
    """The model a checkpoint of ours was made from: it decides which text is held out."""
    manifest = folder / MANIFEST
    return json.loads(manifest.read_text())["details"].get("base model", "") if manifest.exists() else folder.name


def _compare(args: argparse.Namespace) -> dict:
    recipes = [Recipe(criterion, remedy) for criterion in args.criteria for remedy in args.remedies]
    settings = Settings(args.calibration, args.windows, args.seq, args.source)
    return sweep(args.out, args.models, recipes, args.ratios, args.seeds, settings)


def _generate(args: argparse.Namespace) -> dict:
    model, tokenizer = load_model(args.model, args.device)
    text = generate_text(model, tokenizer, args.prompt, args.tokens, temperature=args.temperature, seed=args.seed)
    return {"text": text}


def _in_words(command: str, found: dict) -> str:
    if command == "generate":
        return found["text"]
    if command == "compare":
        table = frame(found)
        columns = ["model", "ratio", "method", "seed", *next(iter(found["dense"].values())), "blocks left", "seconds"]
        return table[columns].to_string(index=False, float_format="{:.3f}".format)
    if command == "evaluate":
        lines = []
        for name, row in found.items():
            lines.append(f"{name}: {row['parameters']['total']:,} parameters")
            lines += [
                "  {label}: perplexity {perplexity:.2f} +- {perplexity_error:.2f}, {bits_per_byte:.3f} bits per byte "
                "({tokens:,} tokens, {windows} windows of {seq}, stride {stride})".format(label=label, **score)
                for label, score in row["texts"].items()
            ]
            lines += [
                "  {label}: {acc_norm:.1%} +- {acc_norm_stderr:.1%} right per character, {acc:.1%} by sum "
                "({items} items, chance {chance:.0%})".format(label=label, **score)
                for label, score in row.get("choices", {}).items()
            ]
            if "tasks" in row:
                table = pd.DataFrame.from_dict(row["tasks"], orient="index").astype(float)
                lines.append(table.to_string(float_format="{:.4g}".format, na_rep="-"))
        return "\n".join(lines)
    before, after = found["parameters"]["blocks"]
    return f"saved {found['saved']}: {after:,} of {before:,} block parameters left, by {found['recipe']}"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 if it worked, 1 if it was refused."""
    args = _parser().parse_args(arguments)
    run = {"prune": _prune, "evaluate": _evaluate, "compare": _compare, "generate": _generate}[args.command]
    first = os.environ.get("RANK", "0") == "0"
    try:
        found = run(args)
    except (ValueError, OSError, ConnectionError, FloatingPointError, TypeError, LookupError, ImportError) as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 1
    if first:  # of several processes only one speaks
        print(json.dumps(found, indent=1) if args.json else _in_words(args.command, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
