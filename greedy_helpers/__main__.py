"""The package on the command line: `python -m greedy_helpers --help`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_args

import pandas as pd
import torch
import typer
from transformers import PreTrainedTokenizerBase
from typer import Argument, Option
from typer.core import TyperGroup

from .allocation import check_ratio
from .checkpoint import MANIFEST, check_config, load_model, load_tokenizer, model_without_weights, save_pruned
from .compare import Settings, frame, recipe_of, sweep
from .course.choices import choice_tasks
from .course.multiple_choice import multiple_choice
from .data import EMBEDDED, calibration_tokens, default_sources
from .data_free import self_generated_tokens
from .evaluate import Text, evaluate_text, generate_text, prompt_ids, read_text, window_starts
from .large import distributed
from .pruning import prune as prune_model
from .recipes import ALLOCATIONS, CRITERIA, FLAP, OSSCAR, PAPER, PREPARED, RECOMMENDED, Recipe
from .reconstruct import HELD_OUT
from .remedies import REMEDIES
from .structure import Unit, check_tokens, count_parameters, depth2_modules
from .task_files import hub_rows
from .tasks import check_lm_eval, zero_shot

_EXAMPLES = """\b
examples:
  python -m greedy_helpers prune llama-mini pruned --ratio 0.25
  python -m greedy_helpers prune org/model pruned --recipe paper --ratio 0.2
  python -m greedy_helpers prune org/model pruned --lazy --work-dir work --device cuda
  torchrun --nproc-per-node 2 -m greedy_helpers prune org/model pruned
  python -m greedy_helpers evaluate llama-mini pruned --windows 48
  python -m greedy_helpers evaluate llama-mini pruned --windows 48 --choices 150
  python -m greedy_helpers evaluate org/model pruned --tasks boolq --tasks piqa --tasks hellaswag
  python -m greedy_helpers evaluate org/model pruned --sources wiki.test.raw --seq 2048 --tasks piqa --data folder
  python -m greedy_helpers compare llama-mini --criteria L2 --criteria "output energy" --remedies none --out sweep.json
  python -m greedy_helpers generate pruned --prompt "import os"

exit codes: 0 done, 1 refused (the message says why; nothing was changed), 2 wrong arguments
"""
_REFUSALS = (ValueError, OSError, FloatingPointError, TypeError, LookupError, ImportError)


class _Commands(TyperGroup):
    """Prints what a command returns, (result, the same in words), or in one sentence why it was refused."""

    def invoke(self, ctx: typer.Context) -> None:
        try:
            found, words = super().invoke(ctx)
        except Exception as error:
            if ctx.params["debug"] or hasattr(error, "exit_code") or isinstance(error, typer.Abort):
                raise  # exit_code: typer's own
            typer.echo(f"{ctx.invoked_subcommand}: {_sentence(error)}", err=True)
            raise typer.Exit(1) from error
        if os.environ.get("RANK", "0") == "0":  # of several processes only one speaks
            typer.echo(json.dumps(found, indent=1) if ctx.params["json"] else words)


def _sentence(error: Exception) -> str:
    """An error's message and notes on one line; its class too, if the message was not written for the reader."""
    message = error.args[0] if isinstance(error, KeyError) and error.args else error  # str() of a KeyError is a repr
    words = " ".join(" ".join([str(message), *getattr(error, "__notes__", ())]).split())
    return words if words and isinstance(error, _REFUSALS) else f"{type(error).__name__}: {words} (--debug shows where)"


app = typer.Typer(cls=_Commands, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.callback(epilog=_EXAMPLES)
def _group(
    json: Annotated[bool, Option("--json", help="print the result as one JSON object")] = False,
    debug: Annotated[bool, Option("--debug", help="show where an error comes from")] = False,
) -> None:
    """Prune large language models without retraining."""


def _one_of(names: Collection[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise typer.BadParameter(f"expected one of {', '.join(names)}; found {text!r}")
        return text

    return parse


def _blocks(text: str) -> range:
    first, _, end = text.partition(":")
    if not (first.isdigit() and end.isdigit()):
        raise typer.BadParameter(f"expected FIRST:END, e.g. 4:30, found {text!r}")
    if int(first) >= int(end):
        raise typer.BadParameter(f"expected FIRST below END, found {text!r}, which are no blocks")
    return range(int(first), int(end))


def _damp(text: str | float) -> str | float:
    return text if text == HELD_OUT else float(text)


_DTYPES = ("float32", "bfloat16", "float16")
_Remedy = Option(parser=_one_of(REMEDIES), metavar="NAME", help=" | ".join(REMEDIES))
_Criterion = Option(parser=_one_of((*CRITERIA, *PREPARED)), metavar="NAME", help=" | ".join((*CRITERIA, *PREPARED)))
_Allocation = Option(
    parser=_one_of(ALLOCATIONS),
    metavar="NAME",
    help=f"{' | '.join(ALLOCATIONS)}; floor: --ratio is of every module's units, rounded down, as in the paper",
)
_Unit = Option(
    parser=_one_of(get_args(Unit)),
    metavar="NAME",
    help="query | kv: what goes where query heads share KV heads; kv: whole KV heads, which shrinks the cache",
)
_Dtype = Option(parser=_one_of(_DTYPES), metavar="NAME", help=f"{' | '.join(_DTYPES)}; default: float32 on a CPU")
_Damp = Option(
    parser=_damp,
    metavar="SHARE",
    help=f"damping of every refit, as a share of the mean diagonal; or '{HELD_OUT}': each chooses its own",
)
_Blocks = Option(parser=_blocks, metavar="FIRST:END", help="prune these only, e.g. 4:30; default: all")
_Calibration = Annotated[int, Option(help="windows to calibrate on")]
_Seq = Annotated[int, Option(help="tokens per window")]
_Several = Option(help="repeatable")
_Column = Annotated[str, Option(help="of a table of texts or of chat messages; default: text, else messages")]


_RECIPES = {"recommended": RECOMMENDED, "paper": PAPER, "flap": FLAP, "osscar": OSSCAR}
_Recipe = Option(parser=_one_of(_RECIPES), metavar="NAME", help="; ".join(f"{k}: {v}" for k, v in _RECIPES.items()))


def _recipe(name: str, seed: int, **given: str | float | None) -> Recipe:
    """A recipe by name, with what the other options say instead."""
    recipe = replace(_RECIPES[name], **{key: value for key, value in given.items() if value is not None})
    return recipe_of({**recipe.names, "seed": seed}, recipe.damp)


def _check_structure(name: str, seq: int, blocks: range | None = None) -> None:
    """Refuse what a model's config already rules out: its family, windows beyond its context, blocks it lacks."""
    if (model := model_without_weights(name)) is not None:
        depth2_modules(model, blocks)
        check_tokens(model, torch.zeros(1, seq, dtype=torch.long))


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(name)
    except FileNotFoundError:
        raise
    except Exception as error:  # transformers raises several classes, some of them with pages of text
        reason = str(error).strip().partition("\n")[0].rstrip(" :")
        raise ValueError(
            f"{name!r} has no tokenizer that can be loaded; expected an embedded model ({', '.join(EMBEDDED)}), or a "
            f"folder or Hub id with a tokenizer ({reason})"
        ) from error


def _check_device(*devices: str | None) -> None:
    for device in filter(None, devices):
        try:
            if torch.device(device).type != "cuda" or not torch.cuda.is_available():
                torch.empty(0, device=device)  # on a GPU it would take memory from the process that owns it
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(f"cannot use the device {device!r}: {error}") from error


@app.command()
def prune(
    model: Annotated[str, Argument(help="llama-mini, gpt2-mini, smollm2-135m, a local folder or a Hub id")],
    folder: Annotated[Path, Argument(help="where to save the pruned model")],
    ratio: Annotated[float, Option(help="share of the parameters of the modules to prune; see --allocation")] = 0.25,
    recipe: Annotated[str, _Recipe] = "recommended",
    criterion: Annotated[str | None, _Criterion] = None,
    remedy: Annotated[str | None, _Remedy] = None,
    allocation: Annotated[str | None, _Allocation] = None,
    damp: Annotated[Any, _Damp] = None,
    blocks: Annotated[Any, _Blocks] = None,
    unit: Annotated[str, _Unit] = "query",
    overwrite: Annotated[bool, Option("--overwrite", help="replace an existing folder")] = False,
    calibration: _Calibration = 64,
    seq: _Seq = 256,
    source: Annotated[str | None, Option(help="code, prose, code+prose, self-generated, a file, a Hub dataset")] = None,
    column: _Column = "text",
    seed: Annotated[int, Option(help="of the calibration windows and of random scores")] = 0,
    device: str | None = None,
    batch_size: Annotated[int | None, Option(help="windows per forward pass; default: 4,096 tokens")] = None,
    work_dir: Annotated[Path | None, Option(help="commit finished blocks there: repeat the command to go on")] = None,
    dtype: Annotated[str | None, _Dtype] = None,
    store: Annotated[str | None, Option(help="where hidden states wait, e.g. cpu; default: the device")] = None,
    lazy: Annotated[bool, Option("--lazy", help="one block at a time in memory; needs --work-dir")] = False,
) -> tuple[dict, str]:
    """Prune a model, repair it, and save it."""
    method = _recipe(recipe, seed, criterion=criterion, remedy=remedy, allocation=allocation, damp=damp)
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; pass --overwrite to replace it")
    if lazy and work_dir is None:
        raise ValueError("--lazy needs a --work-dir for the pruned blocks")
    check_ratio(ratio)
    _check_device(device, store)
    _check_structure(model, seq, blocks)
    place = distributed.start(device)
    source = source or "+".join(default_sources(model).values())
    if source != "self-generated":  # before the weights are loaded, as most mistakes are about text
        tokens = calibration_tokens(_tokenizer(model), calibration, seq, source, seed, column)
    whole, tokenizer = load_model(model, place, dtype and getattr(torch, dtype), lazy=lazy)
    if source == "self-generated":
        start = "random" if tokenizer is None else "separator"
        tokens = self_generated_tokens(whole, tokenizer, calibration, seq, start=start, seed=seed)
    how = {"blocks": blocks, "unit": unit, "batch_size": batch_size, "work_dir": work_dir, "store": store}
    if lazy:  # the embeddings are in the CPU's memory, the blocks come to the device
        how["device"] = place or ("cuda" if torch.cuda.is_available() else "cpu")
    report = prune_model(whole, tokens, ratio, method, **how)
    details = {"base model": model, "recipe": str(method), "calibration text": f"{source}, seed {seed}"}
    if distributed.is_first():
        save_pruned(whole, folder, tokenizer, report=report, details=details, overwrite=overwrite)
    distributed.finish()
    words = f"saved {folder}, by {method}\n{report}"
    return {"saved": str(folder), **details, **report.to_dict(tensors=False)}, words


@app.command()
def evaluate(
    models: list[str],
    windows: Annotated[int | None, Option(help="held-out windows per text; default: all")] = None,
    seq: _Seq = 256,
    stride: Annotated[int | None, Option(help="tokens from window to window; default: --seq, no overlap")] = None,
    sources: Annotated[list[str] | None, Option(help="code, prose, ptb, c4, a file, a Hub dataset; repeatable")] = None,
    column: _Column = "text",
    choices: Annotated[int | None, Option(min=2, help="also so many multiple-choice items per held-out text")] = None,
    tasks: Annotated[list[str] | None, Option(help="also a task of lm_eval, or a YAML file; repeatable")] = None,
    data: Annotated[Path | None, Option(help="folder with the tasks' published files; default: the Hub")] = None,
    limit: Annotated[int | None, Option(help="items per task of lm_eval; default: all")] = None,
    device: str | None = None,
) -> tuple[dict, str]:
    """Perplexity, accuracy and parameters of models, dense or pruned."""
    if choices is not None and column != "text":
        raise ValueError(f"--choices are made from the column 'text' only, found --column {column}")
    if data is not None:
        if not tasks:
            raise ValueError("--data is where --tasks find their files; name the tasks, e.g. --tasks piqa")
        for task in tasks:
            hub_rows(data, task)  # refuses what is not there
    _check_device(device)
    if tasks:
        check_lm_eval()
    for name in models:
        _check_structure(name, seq)
    found, asked = {}, {name: _texts(name, sources, column) for name in models}
    for texts in asked.values():
        for _, text in texts.values():
            window_starts(text, seq, stride, windows)  # refuses what the text does not hold
    for name in models:
        named = {label: source for label, (source, _) in asked[name].items()}
        model, tokenizer = load_model(name, device)
        texts = {label: text for label, (_, text) in asked[name].items()}
        scores = {label: evaluate_text(model, text, seq, stride, windows) for label, text in texts.items()}
        row = {"texts": {label: score.to_dict() for label, score in scores.items()}}
        row["parameters"] = count_parameters(model)
        if choices is not None:
            items = choice_tasks(named, choices)
            row["choices"] = {k: multiple_choice(model, tokenizer, task).to_dict() for k, task in items.items()}
        if tasks:
            table = zero_shot(model, tokenizer, tasks, data=data, limit=limit).astype(object)
            row["tasks"] = table.where(table.notna(), None).to_dict("index")  # JSON has no NaN
        found[name] = row
    return found, "\n".join(_in_words(name, row) for name, row in found.items())


def _texts(name: str, sources: Sequence[str] | None, column: str) -> dict[str, tuple[str, Text]]:
    """What to judge a model by: label -> (source, text)."""
    base = name if not Path(name).is_dir() else _base_of(Path(name))
    named = {source: source for source in sources} if sources else default_sources(base)
    tokenizer = _tokenizer(name)
    return {label: (source, read_text(tokenizer, source, column=column)) for label, source in named.items()}


def _base_of(folder: Path) -> str:
    """The model a checkpoint of ours was made from: it decides which text is held out."""
    manifest = folder / MANIFEST
    return json.loads(manifest.read_text())["details"].get("base model", "") if manifest.exists() else folder.name


def _in_words(name: str, row: dict) -> str:
    tables = [pd.DataFrame.from_dict(row[key], orient="index") for key in ("texts", "choices", "tasks") if key in row]
    words = [table.fillna(float("nan")).to_string(float_format="{:.4g}".format, na_rep="-") for table in tables]
    return "\n".join([f"{name}: {row['parameters']['total']:,} parameters", *words])


@app.command()
def compare(
    models: list[str],
    out: Annotated[Path, Option(help="JSON file, written after every run")],
    criteria: Annotated[list[str], _Criterion] = ("second moment", RECOMMENDED.criterion),
    remedies: Annotated[list[str], _Remedy] = ("none", RECOMMENDED.remedy),
    ratios: Annotated[list[float], _Several] = (0.25,),
    seeds: Annotated[list[int], _Several] = (0,),
    windows: Annotated[int, Option(help="held-out windows per text")] = 48,
    calibration: _Calibration = 32,
    seq: _Seq = 256,
    source: Annotated[str | None, Option(help="of the calibration windows, as for prune")] = None,
    column: _Column = "text",
    unit: Annotated[str, _Unit] = "query",
) -> tuple[dict, str]:
    """A grid of recipes, resumable: repeat the command to go on."""
    recipes = [Recipe(criterion, remedy) for criterion in criteria for remedy in remedies]
    for ratio in ratios:
        check_ratio(ratio)
    for name in models:
        _check_structure(name, seq)
        tokenizer = _tokenizer(name)  # refuses what has none
        if source is not None:
            calibration_tokens(tokenizer, calibration, seq, source, column=column)
    settings = Settings(calibration, windows, seq, source, unit=unit, column=column)
    found = sweep(out, models, recipes, ratios, seeds, settings)
    columns = ["model", "ratio", "method", "seed", *next(iter(found["dense"].values())), "blocks left", "seconds"]
    return found, frame(found)[columns].to_string(index=False, float_format="{:.3f}".format)


@app.command()
def generate(
    model: str,
    prompt: Annotated[str, Option()],
    tokens: Annotated[int, Option(min=1)] = 64,
    temperature: Annotated[float, Option(min=0)] = 0.0,
    seed: int = 0,
    device: str | None = None,
) -> tuple[dict, str]:
    """Let a model continue a prompt."""
    _check_device(device)
    config = check_config(model)
    prompt_ids(config, _tokenizer(model), prompt)  # refuses one that is empty, or too long
    found, tokenizer = load_model(model, device)
    text = generate_text(found, tokenizer, prompt, tokens, temperature=temperature, seed=seed)
    return {"text": text}, text


def parse(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(command, its arguments) of a command line without `--json`; checked, but nothing is run."""
    name, *rest = arguments
    return name, typer.main.get_command(app).commands[name].make_context(name, rest).params


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 if it worked, 1 if it was refused, 2 if it was not understood."""
    try:
        app(arguments, prog_name="python -m greedy_helpers")
    except SystemExit as end:
        return end.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
