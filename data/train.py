"""Train the embedded models on the Python found on this machine.

    python data/train.py llama-mini                       # two CPU cores: about an hour
    python data/train.py gpt2-mini --device cuda --batch 64 --tokens 400e6

Text: `python_corpus("train")` (source of the standard library's training modules, their docstrings) and the
docstrings of the installed packages; nothing from either held-out domain. A killed run continues from its last
checkpoint under --work-dir; the finished model is written to data/NAME as float16 with a model card.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import re
import sysconfig
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from greedy_helpers.data import docstrings, evaluation_tokens, pack, python_corpus
from greedy_helpers.evaluate import perplexity

HERE = Path(__file__).resolve().parent
END = "<|endoftext|>"
VOCABULARY = 4096
WINDOW = 256
PROMPT = "import os\n\ndef read_lines(path):\n    with open("  # what the model card shows a continuation of
# Packages whose docstrings are long and in plain English; a cap each, so that no package's house style dominates.
PACKAGES = (
    "torch transformers scipy sympy pandas networkx numpy matplotlib huggingface_hub datasets debugpy pip fontTools "
    "setuptools IPython mpmath tornado pydantic accelerate _pytest prompt_toolkit PIL babel rich pyparsing jinja2 "
    "click typer fsspec httpx anyio jupyter_server jupyterlab traitlets ipykernel nbclient nbconvert nbformat zmq "
    "tokenizers safetensors tqdm yaml regex attr psutil packaging"
).split()
CHARACTERS_PER_PACKAGE = 1_500_000

CONFIGS = {
    # 256, 768 and 1,024 channels stay multiples of 64 after removing a quarter or a half of them.
    "llama-mini": LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=8, head_dim=32, max_position_embeddings=WINDOW, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, attn_implementation="sdpa",
    ),
    "gpt2-mini": GPT2Config(
        vocab_size=VOCABULARY, n_embd=256, n_layer=6, n_head=8, n_positions=WINDOW, n_inner=1024,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, attn_implementation="sdpa",
    ),
}  # fmt: skip
CLASSES = {"llama-mini": LlamaForCausalLM, "gpt2-mini": GPT2LMHeadModel}


def training_texts() -> tuple[list[str], list[str]]:
    """(source files, docstrings), both free of the held-out text."""
    code = list(python_corpus("train", "code")["text"])
    prose = list(python_corpus("train", "prose")["text"])
    held_out = set(_long_lines(python_corpus("test", "code")["text"])) | set(
        _long_lines(python_corpus("test", "prose")["text"])
    )
    root = Path(sysconfig.get_path("purelib"))
    for package in tqdm(PACKAGES, desc="docstrings"):
        characters = 0
        # by hash rather than by name: with a cap, alphabetical order would keep whole subpackages and lose others
        paths = sorted((root / package).rglob("*.py"), key=lambda path: _digest(path.relative_to(root)))
        for path in paths:
            if "tests" in path.parts or characters > CHARACTERS_PER_PACKAGE:
                continue
            text = docstrings(path.read_text("utf-8", "ignore"), min_characters=200)
            lines = _long_lines([text])
            # Backports and vendored copies repeat the standard library's docstrings, held-out ones included.
            if text and sum(line in held_out for line in lines) <= 0.1 * len(lines):
                prose.append(text)
                characters += len(text)
    return code, prose


def _digest(path: Path) -> str:
    return hashlib.sha256(path.as_posix().encode()).hexdigest()


def _long_lines(texts: list[str]) -> list[str]:
    return [line for text in texts for raw in text.splitlines() if len(line := re.sub(r"\s+", " ", raw.strip())) >= 40]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every string has a tokenization, and runs of spaces (indentation) become one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, model_max_length=WINDOW, clean_up_tokenization_spaces=False
    )


def make_optimizers(model: torch.nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices (orthogonalised momentum: fewer tokens to the same loss), AdamW for the rest."""
    if args.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise SystemExit(f"--optimizer muon needs torch >= 2.9, found {torch.__version__}; use --optimizer adamw")
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        in_block = parameter.ndim == 2 and (".layers." in name or ".h." in name)
        (matrices if in_block and args.optimizer == "muon" else rest).append(parameter)
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.1 if args.optimizer == "adamw" else 0.0},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    found = [torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)]
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return found


def lr_factor(step: int, steps: int, warmup: int, decay: str) -> float:
    """Linear warm-up, then linear or cosine decay to 2% of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    left = 1 - done if decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return max(0.02, left)


def batches_of_epoch(windows: torch.Tensor, epoch: int, batch: int, seed: int) -> torch.Tensor:
    """Row indices [n_batches, batch] of one pass: a function of (seed, epoch), so a resumed run sees the same."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed * 1_000 + epoch))
    return order[: len(order) // batch * batch].view(-1, batch)


def save_checkpoint(path: Path, **state: object) -> None:
    """Write beside, then rename: a killed run never leaves half a checkpoint."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(CONFIGS))
    parser.add_argument("--tokens", type=float, default=12e6, help="training tokens in all (default: 12e6)")
    parser.add_argument("--batch", type=int, default=16, help="windows of 256 tokens per step")
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default="muon")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate of AdamW")
    parser.add_argument("--muon-lr", type=float, default=5e-3, help="peak learning rate of Muon, in AdamW's units")
    parser.add_argument("--decay", choices=["linear", "cosine"], default="linear")
    parser.add_argument("--warmup", type=int, default=60, help="steps")
    parser.add_argument("--code-passes", type=int, default=3, help="passes over the source per pass over docstrings")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="autocast of the forward")
    parser.add_argument("--compile", action="store_true", help="torch.compile (needs a C compiler on CPU)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints and evaluations")
    parser.add_argument("--work-dir", type=Path, default=HERE.parent / "runs")
    parser.add_argument("--out", type=Path, default=None, help="where the model goes (default: data/NAME)")
    args = parser.parse_args(argv)
    out = args.out or HERE / args.name
    args.work_dir.mkdir(parents=True, exist_ok=True)

    prepared = args.work_dir / f"corpus-{args.seed}.pt"
    if not prepared.exists():
        code, prose = training_texts()
        tokenizer = make_tokenizer(code + prose)
        tokenizer.save_pretrained(args.work_dir / "tokenizer")
        ids = {
            kind: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            for kind, texts in {"code": code, "prose": prose}.items()
        }
        windows = {kind: pack(value, WINDOW, tokenizer.eos_token_id)[0].to(torch.int16) for kind, value in ids.items()}
        save_checkpoint(prepared, **windows)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.work_dir / "tokenizer")
    corpus = torch.load(prepared)
    windows = torch.cat([corpus["code"]] * args.code_passes + [corpus["prose"]])
    print(
        f"{corpus['code'].numel():,} tokens of source x {args.code_passes} + {corpus['prose'].numel():,} of docstrings",
        flush=True,
    )
    held_out = {domain: evaluation_tokens(tokenizer, source=domain, seq=WINDOW) for domain in ("code", "prose")}
    quick = {domain: tokens[:: max(1, len(tokens) // 64)] for domain, tokens in held_out.items()}

    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    model = CLASSES[args.name](CONFIGS[args.name]).to(device)
    optimizers = make_optimizers(model, args)
    steps = int(args.tokens) // (args.batch * WINDOW)
    first, seconds, history = 0, 0.0, []
    checkpoint = args.work_dir / f"{args.name}.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, seconds, history = state["step"], state["seconds"], state["history"]
        print(f"continuing {args.name} at step {first} of {steps}")

    forward = torch.compile(model) if args.compile else model
    autocast = torch.autocast(device.type, dtype=torch.bfloat16) if args.dtype == "bfloat16" else nullcontext()
    per_epoch = len(windows) // args.batch
    epoch, order = -1, None
    started = time.monotonic()
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=args.name, mininterval=30, smoothing=0.02)
    for step in bar:
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = batches_of_epoch(windows, epoch, args.batch, args.seed)
        tokens = windows[order[step % per_epoch]].long().to(device)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor(step, steps, args.warmup, args.decay)
        with autocast:
            logits = forward(input_ids=tokens, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % args.save_every == 0:
            found = {domain: perplexity(model, tokens) for domain, tokens in quick.items()}
            elapsed = seconds + time.monotonic() - started
            history.append({"step": step + 1, "tokens": (step + 1) * args.batch * WINDOW, **found})
            tqdm.write(f"step {step + 1}: perplexity {found} after {elapsed:.0f} s")
            save_checkpoint(
                checkpoint,
                model=model.state_dict(),
                optimizers=[optimizer.state_dict() for optimizer in optimizers],
                step=step + 1,
                seconds=elapsed,
                history=history,
            )
    seconds += time.monotonic() - started
    export(args, model, tokenizer, held_out, out, steps, seconds, history)


def export(args, model, tokenizer, held_out, out, steps, seconds, history) -> None:
    """float16 safetensors, tokenizer, model card; the numbers are those of the float16 weights that ship."""
    rounded = model.half().float().eval()
    found = {domain: perplexity(rounded, tokens) for domain, tokens in held_out.items()}
    counted = {domain: tokens.numel() for domain, tokens in held_out.items()}
    prompt = tokenizer(PROMPT, return_tensors="pt").to(rounded.device)
    continued = rounded.generate(**prompt, max_new_tokens=80, do_sample=False, repetition_penalty=1.1)
    record = {
        "model": args.name,
        "perplexity": found,
        "held_out_tokens": counted,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": steps * args.batch * WINDOW,
        "steps": steps,
        "hours": round(seconds / 3600, 2),
        "hardware": _hardware(args.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "settings": {k: str(v) for k, v in vars(args).items() if k not in ("work_dir", "out")},
        "history": history,
    }
    print(json.dumps({k: record[k] for k in ("model", "perplexity", "hours")}, indent=1))
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "README.md").write_text(_CARD.format(**record, continued=tokenizer.decode(continued[0]).rstrip()))


def _hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


_CARD = """---
license: mit
language: en
tags: [python, pruning, teaching]
---
# {model}

A small language model for teaching structured pruning without a network: it reads and writes Python source and the
English of Python's documentation. It is not useful for anything else.

| | |
|---|---|
| parameters | {parameters:,} (embeddings tied), float16 safetensors |
| training text | source of nine in ten modules of CPython {python}'s standard library; docstrings of those modules and of the installed packages |
| held out | the remaining modules (`code`), `pydoc_data.topics` (`prose`); see `greedy_helpers.data.python_corpus` |
| tokenizer | byte-level BPE, 4,096 tokens, trained on the training text |
| training | {steps:,} steps, {training_tokens:,} tokens, windows of 256, {hours} h on {hardware} |
| held-out perplexity (windows of 256, all {held_out_tokens[code]:,} / {held_out_tokens[prose]:,} tokens) | code {perplexity[code]:.2f}, prose {perplexity[prose]:.2f} |

Every setting and the learning curve are in `training.json`; `data/train.py` repeats the run.
Greedy continuation (repetition penalty 1.1) of the first four lines, up to `open(`:

```python
{continued}
```
"""  # noqa: E501


if __name__ == "__main__":
    main()
