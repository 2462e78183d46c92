"""A public model, dense or pruned: perplexity and zero-shot accuracy on the data of the pruning literature.

    python benchmarks/public_model.py --model FOLDER --data FOLDER --weights FILE.gguf
    python benchmarks/public_model.py --model FOLDER --data FOLDER --part "c4 512" boolq --limit 500
    python benchmarks/public_model.py --model PRUNED --data FOLDER --part piqa boolq --out data/results/NAME.json

Adds the rows that are missing to data/results/smollm2_dense.json, one by one: run it again to go on, without --limit to
replace the rows of tasks that had one. Files are recorded by their sha256. `--data` is a folder with the data sets'
published files: wikitext2/wiki.test.raw, c4/*.jsonl (one file, at least the first 1,000 documents of the first training
shard) and those of greedy_helpers/task_files.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from common import RESULTS, load_average, machine, save
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import greedy_helpers as gh
from greedy_helpers.evaluate import evaluate_text, read_text
from greedy_helpers.files import sha256_of
from greedy_helpers.task_files import hub_rows, task_files
from greedy_helpers.tasks import zero_shot

OUT = RESULTS / "smollm2_dense.json"
TEXTS = {  # part -> the file below --data, the rows of it, tokens per window
    "wikitext2 512": ("wikitext2/wiki.test.raw", "", 512),
    "wikitext2 2048": ("wikitext2/wiki.test.raw", "", 2048),
    "c4 512": ("c4/*.jsonl", "[800:1000]", 512),
}
TASKS = ("arc_easy", "piqa", "openbookqa", "winogrande", "arc_challenge", "boolq", "hellaswag")
CONVENTIONS = {
    "wikitext2": "WikiText-2 test: the rows of wikitext-2-raw-v1 joined with blank lines, as GPTQ and its successors "
    "read them; one end-of-text token (<|endoftext|>, not in GPTQ's code) before the text; all non-overlapping windows "
    "from there, what is left after the last full one dropped; each window starts with an empty context, its first "
    "token is not predicted; exp of the mean over the windows * (seq - 1) targets",
    "c4": "C4 (200 documents of the first shard): documents 800 to 999 of en/c4-train.00000-of-01024, each behind one "
    "end-of-text token, laid end to end; windows and mean as above. Training text of C4, not its validation split",
    "tasks": "zero-shot, lm_eval's own definitions (prompts, choices, metrics) on the published files; acc by the sum "
    "of log-likelihoods, acc_norm by that sum per byte of the choice; no chat template; standard errors over items. "
    "Where items are fewer than those in the file, they are its first ones",
    "hellaswag": "query and choices of a file in OLMES's form are those that lm_eval's process_docs writes, which is "
    "not run on them again; the 1,000 items are a random part of the validation split's 10,042",
}

# Of the model in full precision, in percent, by others. None: no number that we know of.
CARD = "model card of HuggingFaceTB/SmolLM2-135M-Instruct, Evaluation, Instruction model: lighteval, zero-shot"
PUBLISHED = {
    "hellaswag": {"value": 40.9, "source": CARD, "differs": "all 10,042 items"},
    "piqa": {"value": 66.3, "source": CARD},
    "arc_easy, arc_challenge": {"value": 37.3, "source": f"{CARD}, 'ARC (Average)'", "differs": "one mean over both"},
    "boolq": {"value": None, "reason": "not on the card"},
    "openbookqa": {"value": None, "reason": "on the card for the base model only (34.6)"},
    "winogrande": {"value": None, "reason": "on the card for the base model only (51.3)"},
    "wikitext2": {"value": None, "reason": "no perplexity on the card"},
    "c4": {"value": None, "reason": "no perplexity on the card"},
    "by lm_eval, third party": {
        "value": {"arc_easy acc": 54.12, "arc_challenge acc_norm": 27.73, "hellaswag acc_norm": 42.99}
        | {"piqa acc_norm": 66.92},
        "source": "model card of lldois/SmolLM2-135M-Reasoning-SLERP-Champion, 'Benchmark Results (lm-eval, 0-shot)', "
        "column 'Baseline'",
        "differs": "we take the baseline to be SmolLM2-135M-Instruct, from which both merged models were trained",
    },
    "why ours may differ": "our weights were stored with 4 bits; lighteval has its own prompts and normalisation, and "
    "the card does not say which, nor whether a chat template was used: numbers beside ours, not to be reproduced",
}


PRUNED = ("criterion", "remedy", "allocation", "damp", "tokens", "parameters", "removed")  # recorded of a report


def tensors_sha256(model: PreTrainedModel) -> str:
    """Of the weights in memory, in the order of their names: the same however the model was stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def text_row(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, part: str) -> dict:
    pattern, rows, seq = TEXTS[part]
    (path,) = folder.glob(pattern)
    score = evaluate_text(model, read_text(tokenizer, f"{path}{rows}"), seq, batch_size=max(1, 1024 // seq))
    return {"sha256": {path.name: sha256_of(path)}, **score.to_dict()}


def task_row(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, task: str, limit: int | None
) -> dict:
    numbers = zero_shot(model, tokenizer, [task], data=folder, limit=limit, batch_size=8).loc[task]
    return {
        "sha256": {path.name: sha256_of(path) for path in task_files(folder, task)},
        "items in the file": len(hub_rows(folder, task)),
        **{key: None if value != value else value for key, value in numbers.items()},
        "items": int(numbers["items"]),
    }


def is_missing(part: str, rows: list[dict], folder: Path, limit: int | None) -> bool:
    """No row of that part, or one of a task with fewer items than are asked for now."""
    row = next((row for row in rows if row["part"] == part), None)
    if row is None or part in TEXTS:
        return row is None
    return row["items"] < min(len(hub_rows(folder, part)), limit or sys.maxsize)


def main() -> None:
    parts = [*TEXTS, *TASKS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name, as load_model takes it")
    parser.add_argument("--data", required=True, type=Path, help="folder with the published files")
    parser.add_argument("--weights", nargs="*", default=[], type=Path, help="files the model was made from")
    parser.add_argument("--part", nargs="+", choices=parts, default=parts, help="in this order; default: all")
    parser.add_argument("--limit", type=int, help="the first so many items of every task; default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model, tokenizer = gh.load_model(args.model, "cpu", torch.float32)
    packages = ("transformers", "datasets", "lm_eval")
    settings = machine("cpu") | {name: version(name) for name in packages}
    settings |= {"dtype": "float32", "weights in memory, sha256": tensors_sha256(model)}

    def load() -> dict:
        found = {"settings": settings, "weights": {}, "conventions": CONVENTIONS, "rows": []}
        if args.out.exists():
            found |= json.loads(args.out.read_text()) | {"conventions": CONVENTIONS}
        if found["settings"] != settings:
            parser.error(f"{args.out} was measured with {found['settings']}, not {settings}; move it away")
        return found

    found = load()
    files = [*args.weights, *(sorted(Path(args.model).glob("*.safetensors")) if Path(args.model).is_dir() else [])]
    about = Path(args.model) / "pruned.json"
    if about.exists():
        report = json.loads(about.read_text())["report"] or {}
        found["pruned"] = {key: report[key] for key in PRUNED if key in report}
    else:
        found["published, full precision"] = PUBLISHED
    found["weights"] |= {path.name: sha256_of(path) for path in files}
    save(found, args.out)
    for part in args.part:
        if not is_missing(part, found["rows"], args.data, args.limit):
            continue
        started, cpu_started = time.perf_counter(), time.process_time()
        if part in TEXTS:
            row = text_row(model, tokenizer, args.data, part)
        else:
            row = task_row(model, tokenizer, args.data, part, args.limit)
        row = {"part": part, **row, "seconds": round(time.perf_counter() - started, 1)}
        row |= {"cpu_seconds": round(time.process_time() - cpu_started, 1), "load average": load_average()}
        print(row, flush=True)
        found = load()  # another process may have measured other parts
        found["rows"] = [other for other in found["rows"] if other["part"] != part] + [row]
        save(found, args.out)


if __name__ == "__main__":
    main()
