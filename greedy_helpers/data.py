"""Text to calibrate on and to evaluate on, as packed windows of token ids.

The default text needs no network: it is the Python on the reader's own machine. The standard
library's source is the domain `"code"`, the language reference in `pydoc_data.topics` the domain
`"prose"`. A fixed hash of each module's path decides what is held out, so every interpreter agrees on
the split, and the embedded models never saw the `"test"` split of either domain.

Every source is named by one string:

| source                               | what it is                                                     |
|--------------------------------------|----------------------------------------------------------------|
| `"code"`, `"prose"`                  | the two domains of :func:`python_corpus`                         |
| `"ptb"`, `"c4"`                      | Penn Treebank, one shard of C4 (see :data:`PUBLISHED`) |
| `"org/dataset"`, `"org/dataset:cfg"` | a Hugging Face dataset, e.g. `"Salesforce/wikitext:wikitext-2-raw-v1"` |
| a path ending in .txt .md .jsonl .csv .parquet | a local file, split by a hash of each paragraph or row |
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset, load_dataset
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

Split = Literal["train", "test"]
EMBEDDED = ("llama-mini", "gpt2-mini")  # the models in data/, trained on this file's own corpus
WIKITEXT2 = "Salesforce/wikitext:wikitext-2-raw-v1"  # the parquet repo; script datasets no longer load

# Sources that need more than a name: the arguments of load_dataset per split, the column, and what joins the rows
# (None: every row is a document of its own). PTB's script repository no longer loads; the Hub's own parquet copy of it
# does. LLM-Pruner, whose dense perplexities the paper repeats, judges by PTB's *validation* split.
_PTB = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/{}/0000.parquet"
PUBLISHED = {
    "ptb": {
        "train": {"path": "parquet", "data_files": {"train": _PTB.format("train")}},
        "test": {"path": "parquet", "data_files": {"train": _PTB.format("validation")}},
        "column": "sentence",
        "join": "\n\n",
    },
    "c4": {
        "train": {"path": "allenai/c4", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}},
        "test": {"path": "allenai/c4", "data_files": {"train": "en/c4-validation.00000-of-00008.json.gz"}},
        "column": "text",
        "join": None,
    },
}

_HELD_OUT_ONE_IN = 10
# Not prose, not code anybody would want continued: tests, generated tables, vendored wheels, grammars,
# and pydoc_data, whose topics are the held-out prose itself.
_SKIPPED_FOLDERS = frozenset(
    "test tests idle_test site-packages dist-packages __pycache__ encodings pydoc_data lib2to3 _bundled "
    "turtledemo".split()
)
_MIN_CHARACTERS = 200  # shorter files are little more than an import line
_LOCAL_FORMATS = {".txt": "text", ".md": "text", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def is_held_out(name: str) -> bool:
    """Whether a document belongs to the test split: a fixed hash of its name, the same on every machine.

    One name in ten is held out. For the standard library `name` is the module's posix path below the
    library's root (`"json/decoder.py"`), for local files it is the text itself.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") % _HELD_OUT_ONE_IN == 0


def python_corpus(split: Split, domain: Literal["code", "prose"] = "code") -> Dataset:
    """The running interpreter's own text: a Dataset with the columns `name` and `text`.

    | domain  | train                                              | test                              |
    |---------|----------------------------------------------------|-----------------------------------|
    | `code`  | source of nine in ten modules of the standard library | source of the held-out modules    |
    | `prose` | docstrings of those training modules               | `pydoc_data.topics`, the language reference |

    One document per module (or topic), in a fixed order. The split depends on module paths only, so two
    Python versions differ in the text of a module but never in its side.

    Raises:
        ValueError: `split` or `domain` is not one of the above.
        FileNotFoundError: the interpreter has no standard library in source form (a zipped or frozen one).
    """
    if split not in ("train", "test"):
        raise ValueError(f"python_corpus: expected split 'train' or 'test', found {split!r}")
    if domain not in ("code", "prose"):
        raise ValueError(f"python_corpus: expected domain 'code' or 'prose', found {domain!r}")
    if domain == "prose" and split == "test":
        from pydoc_data.topics import topics

        documents = sorted(topics.items())
    else:
        documents = [(name, text) for name, text in _standard_library() if is_held_out(name) == (split == "test")]
        if domain == "prose":
            documents = [(name, prose) for name, text in documents if (prose := docstrings(text))]
    return Dataset.from_dict({"name": [name for name, _ in documents], "text": [text for _, text in documents]})


@lru_cache(maxsize=1)
def _standard_library() -> tuple[tuple[str, str], ...]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        try:
            with tokenize.open(path) as file:  # honours the PEP 263 encoding line
                text = file.read()
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        if len(text) >= _MIN_CHARACTERS:
            found.append((relative.as_posix(), text))
    if not found:
        raise FileNotFoundError(
            f"python_corpus: expected the standard library's .py files below {root}, found none; "
            "name another text source, e.g. a local .txt file"
        )
    return tuple(found)


def docstrings(source: str, min_characters: int = 80) -> str:
    """All docstrings of at least `min_characters` of one module's source, in order, blank lines between.

    Source that does not parse (written for another Python) has none: the result is `""`.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, nodes))
    return "\n\n".join(text for text in found if text and len(text) >= min_characters)


def documents(source: str = "code", split: Split = "train", column: str = "text") -> Dataset:
    """The documents of any source as a Dataset with a column `text` (see the table at the top of this file).

    WikiText's rows are lines; they are joined with blank lines into one document, the convention behind
    every published WikiText-2 perplexity. Local files have no split of their own: a paragraph or row is
    held out when :func:`is_held_out` says so of its text.

    Raises:
        ValueError: the source has no such column, or nothing is left on that side of the split.
        FileNotFoundError: a local path that does not exist.
        ConnectionError: a Hub dataset that is neither cached nor reachable.
    """
    if source in ("code", "prose"):
        return python_corpus(split, source)
    if Path(source).suffix in _LOCAL_FORMATS:
        return _local_documents(Path(source), split, column)
    known = PUBLISHED.get(source)
    if known is not None:
        arguments, column, join = known[split] | {"split": "train"}, known["column"], known["join"]
    else:
        path, _, config = source.partition(":")
        arguments = {"path": path, "name": config or None, "split": split}
        join = "\n\n" if "wikitext" in source else None
    try:
        dataset = load_dataset(**arguments)
    except Exception as error:  # datasets raises a different class for each way of being offline
        raise ConnectionError(
            f"documents: could not load the dataset {source!r}, split {split!r} ({type(error).__name__}: {error}). "
            "Expected 'code', 'prose', a local .txt/.md/.jsonl/.csv/.parquet file, or 'ptb', 'c4' or a Hub dataset "
            "that is cached or reachable; offline, 'code' and 'prose' always work"
        ) from error
    _require_column(dataset, column, source)
    if join is not None:
        return Dataset.from_dict({"text": [join.join(dataset[column])]})
    return dataset.rename_column(column, "text") if column != "text" else dataset


def default_sources(model_name: str) -> dict[str, str]:
    """label -> source of the text to judge a model by: both Python domains for the embedded models, else WikiText-2."""
    if model_name in EMBEDDED:
        return {"code": "code", "prose": "prose"}
    return {"WikiText-2": WIKITEXT2}


def _local_documents(path: Path, split: Split, column: str) -> Dataset:
    if not path.is_file():
        raise FileNotFoundError(f"documents: expected a text file at {path}, found nothing there")
    builder = _LOCAL_FORMATS[path.suffix]
    options = {"sample_by": "paragraph"} if builder == "text" else {}
    dataset = load_dataset(builder, data_files=str(path), split="train", **options)
    column = "text" if builder == "text" else column
    _require_column(dataset, column, str(path))
    texts = [text for text in dataset[column] if text and is_held_out(text) == (split == "test")]
    if not texts:
        raise ValueError(f"documents: {path} has {len(dataset)} paragraphs or rows, none of them in split {split!r}")
    return Dataset.from_dict({"text": texts})


def _require_column(dataset: Dataset, column: str, source: str) -> None:
    if column not in dataset.column_names:
        raise ValueError(f"documents: expected a column {column!r} in {source!r}, found {dataset.column_names}")


def pack(token_ids: Iterable[list[int]], seq: int, separator: int | None = None) -> tuple[Tensor, Tensor]:
    """Cut documents of token ids into windows without padding and without losing a token.

    The documents are laid end to end, each preceded by `separator` (if given), and cut every `seq` tokens.
    Padding would put positions into the calibration statistics that no reader ever writes.

    Returns:
        windows: long [n, seq].
        rest: long [r], r < seq: the tokens after the last full window. `windows.flatten()` and `rest` are the stream.
    """
    if seq < 2:
        raise ValueError(f"pack: expected windows of at least 2 tokens, found seq={seq}")
    parts = []
    for ids in token_ids:
        parts.append(torch.tensor(([] if separator is None else [separator]) + list(ids), dtype=torch.long))
    stream = torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
    n = len(stream) // seq
    return stream[: n * seq].view(n, seq), stream[n * seq :]


def _packed_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], seq: int, enough: int | None = None
) -> Tensor:
    """Windows [n, seq] of tokenized texts; stops reading once `enough` tokens are there."""

    def token_ids() -> Iterator[list[int]]:
        seen, batch = 0, []
        for text in texts:
            batch.append(text)
            if len(batch) < 32:
                continue
            for ids in _tokenize(tokenizer, batch):
                seen += len(ids) + 1
                yield ids
            batch = []
            if enough is not None and seen >= enough:
                return
        if batch:
            yield from _tokenize(tokenizer, batch)

    windows, _ = pack(token_ids(), seq, separator_id(tokenizer))
    return windows


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose=False: documents are meant to be longer than the model's context; pack() cuts them.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token between packed documents: end-of-text where the tokenizer has one, else beginning-of-text."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase, n: int = 128, seq: int = 128, source: str = "code", seed: int = 0
) -> Tensor:
    """`n` random windows of the training split: long [n, seq] on the CPU.

    `source` may name several, joined by `+` (`"code+prose"`): equal parts of each, one after the other in turn.

    The documents are shuffled by `seed`, read until they hold sixteen times the tokens asked for (or all of
    them are read), packed, and `n` windows are drawn without replacement. The paper uses n=16 for its
    criterion and n=1024 for its reconstruction, at seq=128 (LLaMA) or 1024 (GPT-2).

    Raises:
        ValueError: the source holds fewer than `n` windows of `seq` tokens.
    """
    if n < 1:
        raise ValueError(f"calibration_tokens: expected at least 1 window, found n={n}")
    sources = [source] if Path(source).exists() else source.split("+")
    if len(sources) > 1:
        sizes = [n // len(sources) + (place < n % len(sources)) for place in range(len(sources))]
        parts = [calibration_tokens(tokenizer, m, seq, one, seed) for m, one in zip(sizes, sources, strict=True) if m]
        places = [(row, part) for part, m in enumerate(sizes) for row in range(m)]
        return torch.stack([parts[part][row] for row, part in sorted(places)])
    generator = torch.Generator().manual_seed(seed)
    texts = documents(source, "train")["text"]
    order = torch.randperm(len(texts), generator=generator).tolist()
    windows = _packed_windows(tokenizer, (texts[i] for i in order), seq, enough=16 * n * seq)
    if len(windows) < n:
        raise ValueError(
            f"calibration_tokens: expected {n} windows of {seq} tokens from {source!r}, found {len(windows)}; "
            "ask for fewer or shorter windows or name a larger source"
        )
    return windows[torch.randperm(len(windows), generator=generator)[:n]]


def evaluation_tokens(
    tokenizer: PreTrainedTokenizerBase,
    n: int | None = None,
    seq: int = 256,
    source: str = "code",
    part: Literal["test", "validation"] = "test",
) -> Tensor:
    """Windows of the held-out split: long [n, seq] on the CPU.

    All windows, or `n` of them evenly spaced over the split (always the same ones: comparing two models
    on different windows would measure the windows). With `part="validation"` the `n` windows halfway between those:
    for choosing between methods, so that the test windows judge the choice.

    Raises:
        ValueError: the source holds fewer than `n` windows of `seq` tokens.
    """
    windows = _packed_windows(tokenizer, documents(source, "test")["text"], seq)
    available = len(windows)
    if available < (n or 1) or (n is not None and n < 1):
        raise ValueError(
            f"evaluation_tokens: expected {n or 'at least 1'} windows of {seq} tokens in the held-out split of "
            f"{source!r}, found {available}"
        )
    if n is None:
        return windows
    if part == "validation":
        if available < 2 * n:
            raise ValueError(
                f"evaluation_tokens: expected {2 * n} held-out windows of {seq} tokens in {source!r} to set {n} of "
                f"them aside for validation, found {available}"
            )
        return windows[(torch.arange(n) * available + available // 2) // n]
    return windows[torch.arange(n) * available // n]


# --- calibration without data (paper, sec. 4 and appendix D)


def random_tokens(vocabulary: int | PreTrainedModel, n: int = 16, seq: int = 128, seed: int = 0) -> Tensor:
    """Uniformly random token ids: long [n, seq] on the CPU.

    What the paper takes Sigma from when there is no data (appendix D): it shows the model's input at its most random.

    Args:
        vocabulary: the number of token ids, or a model.
    """
    if not isinstance(vocabulary, int):
        vocabulary = vocabulary.get_input_embeddings().num_embeddings
    if n < 1 or seq < 2 or vocabulary < 1:
        raise ValueError(f"random_tokens: expected n >= 1, seq >= 2, vocabulary >= 1, found {n}, {seq}, {vocabulary}")
    return torch.randint(vocabulary, (n, seq), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def self_generated_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    n: int = 128,
    seq: int = 128,
    *,
    start: Literal["separator", "random"] = "separator",
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """Text that the model writes itself, to calibrate on when there is no other: long [n, seq] on the CPU.

    Sampled with a KV cache, all windows of a batch side by side. An end-of-text token is a token like any other: what
    follows it is the next document, as in packed text. The draws are made per window, so the batch size changes
    nothing but rounding.

    Args:
        start: the first token of every window: the tokenizer's separator, or a random token of the vocabulary.
        temperature: 1 samples from the model's own distribution; lower is less varied.
        top_k: sample among the k likeliest tokens only; None: all.
        seed: of the draws.

    Raises:
        ValueError: longer than the model's context, temperature <= 0, or a separator asked for where there is none.
        FloatingPointError: NaN or Inf in the logits.
    """
    context = getattr(model.config, "max_position_embeddings", None) or seq
    if n < 1 or not 2 <= seq <= context:
        raise ValueError(f"self_generated_tokens: expected n >= 1 and 2 <= seq <= {context}, found n={n}, seq={seq}")
    if not temperature > 0 or (top_k is not None and top_k < 1):
        found = f"{temperature} and {top_k}"
        raise ValueError(f"self_generated_tokens: expected temperature > 0 and top_k >= 1, found {found}")
    generator = torch.Generator().manual_seed(seed)
    if start == "separator":
        first = None if tokenizer is None else separator_id(tokenizer)
        if first is None:
            raise ValueError("self_generated_tokens: this tokenizer has no separator to start from; use start='random'")
        begin = torch.full((n, 1), first)
    elif start == "random":
        begin = torch.randint(model.get_input_embeddings().num_embeddings, (n, 1), generator=generator)
    else:
        raise ValueError(f"self_generated_tokens: expected start 'separator' or 'random', found {start!r}")
    draws = torch.rand(n, seq - 1, generator=generator, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        parts = [
            _sample(model, tokens.to(model.device), uniform.to(model.device), temperature, top_k)
            for tokens, uniform in zip(begin.split(batch_size), draws.split(batch_size), strict=True)
        ]
    finally:
        model.train(was_training)
    return torch.cat(parts).cpu()


def forward_cached(
    model: PreTrainedModel, tokens: Tensor, cache: Cache | None = None, **options: int
) -> tuple[Tensor, Cache]:
    """Logits [batch, seq, vocabulary] of `tokens` (long [batch, seq]) behind what is in `cache`, and the longer cache.

    Args:
        cache: what an earlier call returned; it may be extended in place. None: nothing comes before.
        options: further arguments of the model's forward.
    """
    name = _cache_argument(type(model))
    output = model(input_ids=tokens, use_cache=True, **{name: cache}, **options)
    return output.logits, getattr(output, name)


@lru_cache
def _cache_argument(model_class: type[PreTrainedModel]) -> str:
    """What the class's forward calls its KV cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model_class.forward).parameters else "past_key_values"


def _sample(model: PreTrainedModel, tokens: Tensor, draws: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """Continue tokens [batch, 1] by a token per column of `draws` (uniform in [0, 1)): inverts the distribution."""
    cache, latest = None, tokens
    for draw in draws.T:
        logits, cache = forward_cached(model, latest, cache)
        logits = logits[:, -1].double() / temperature
        if not logits.isfinite().all():
            raise FloatingPointError(f"self_generated_tokens: {type(model).__name__} returned NaN or Inf logits")
        if top_k is not None and top_k < logits.shape[1]:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
        cumulative = logits.softmax(-1).cumsum(-1)
        latest = torch.searchsorted(cumulative, (draw * cumulative[:, -1])[:, None], right=True)
        latest = latest.clamp(max=logits.shape[1] - 1)
        tokens = torch.cat([tokens, latest], dim=1)
    return tokens


@dataclass(frozen=True)
class CalibrationCard:
    """Where calibration tokens came from, and whether they could flatter the evaluation.

    Attributes:
        origin: in words, e.g. `"code, training split, seed 0"` or `"self-generated by llama-mini, temperature 1"`.
        windows, seq, tokens, distinct_tokens: how much there is.
        in_domain: evaluation text -> whether the calibration text is of its kind, as declared.
        shared: evaluation text -> share of its runs of `run` tokens that occur in the calibration tokens too. Text
            that was calibrated on and evaluated on would be near 1.
        fingerprint: SHA-256 of the token ids, so that two runs can tell whether they used the same.
    """

    origin: str
    windows: int
    seq: int
    tokens: int
    distinct_tokens: int
    in_domain: dict[str, bool]
    shared: dict[str, float]
    run: int
    fingerprint: str

    def __str__(self) -> str:
        lines = [
            f"{self.origin}: {self.windows} x {self.seq} = {self.tokens:,} tokens, {self.distinct_tokens:,} distinct",
            *(
                f"against {label}: {'in' if inside else 'out of'} domain, {self.shared[label]:.1%} of its "
                f"{self.run}-token runs occur here"
                for label, inside in self.in_domain.items()
            ),
            f"fingerprint {self.fingerprint[:12]}",
        ]
        return "\n".join(lines)


def calibration_card(
    tokens: Tensor, origin: str, domain: str | None = None, evaluation: Mapping[str, Tensor] | None = None, run: int = 8
) -> CalibrationCard:
    """Describe calibration `tokens` (long [n, seq]) beside the `evaluation` tokens (label -> long [m, seq]).

    Args:
        domain: the label that the calibration text belongs to; None: none of them (random tokens).
        run: length of the token runs that are compared.
    """

    def runs(windows: Tensor) -> set[tuple[int, ...]]:
        return set(map(tuple, windows.unfold(1, run, 1).reshape(-1, run).tolist()))

    mine, evaluation = runs(tokens), evaluation or {}
    shared = {}
    for label, windows in evaluation.items():
        theirs = runs(windows)
        shared[label] = len(theirs & mine) / max(1, len(theirs))
    return CalibrationCard(
        origin,
        *tokens.shape,
        tokens.numel(),
        len(tokens.unique()),
        {label: label == domain for label in evaluation},
        shared,
        run,
        hashlib.sha256(tokens.cpu().contiguous().numpy().tobytes()).hexdigest(),
    )
