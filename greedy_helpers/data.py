"""Text to calibrate on and to evaluate on, as packed windows of token ids.

The default text needs no network: it is the Python on the reader's own machine. The standard library's source is the
domain `"code"`, the language reference in `pydoc_data.topics` the domain `"prose"`. A fixed hash of each module's path
decides what is held out, so every interpreter agrees on the split, and the embedded models never saw the `"test"` split
of either domain.

Every source is named by one string:

| source                                               | what it is                                                    |
|------------------------------------------------------|---------------------------------------------------------------|
| `"code"`, `"prose"`                                  | the two domains of :func:`python_corpus`                      |
| `"ptb"`, `"c4"`                                      | Penn Treebank, one shard of C4 (see :data:`PUBLISHED`)        |
| `"org/dataset"`, `"org/dataset:cfg"`                 | a Hub dataset, e.g. `"Salesforce/wikitext:wikitext-2-raw-v1"` |
| a path ending in .txt .md .json .jsonl .csv .parquet | a local file, split by a hash of each paragraph or row        |
| such a path and rows, `"c4.jsonl[:800]"`             | these rows (paragraphs), in either split                      |
| `"wiki.test.raw"`, or its folder                     | WikiText as published in raw form: a file is one split        |

Every window starts with what the model's tokenizer itself puts in front of a text: a begin-of-text token for Llama and
Gemma, nothing for GPT-2 and the embedded models.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset, load_dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .public import PUBLIC, hub_is_reachable
from .text_files import FORMATS, local_rows, read_rows, read_wikitext, wikitext_file

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
# Not prose, not code anybody would want continued: tests, generated tables, vendored wheels, grammars, and pydoc_data,
# whose topics are the held-out prose itself.
_SKIPPED_FOLDERS = frozenset(
    "test tests idle_test site-packages dist-packages __pycache__ encodings pydoc_data lib2to3 _bundled "
    "turtledemo".split()
)
_MIN_CHARACTERS = 200  # shorter files are little more than an import line
# Between pre-training documents. A chat model's end-of-text token may end a turn instead: SmolLM2's is <|im_end|>.
_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>")


def is_held_out(name: str) -> bool:
    """Whether a document belongs to the test split: a fixed hash of its name, the same on every machine.

    One name in ten is held out. For the standard library `name` is the module's posix path below the library's root
    (`"json/decoder.py"`), for local files it is the text itself.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") % _HELD_OUT_ONE_IN == 0


def python_corpus(split: Split, domain: Literal["code", "prose"] = "code") -> Dataset:
    """The running interpreter's own text: a Dataset with the columns `name` and `text`.

    | domain  | train                                                 | test                                        |
    |---------|-------------------------------------------------------|---------------------------------------------|
    | `code`  | source of nine in ten modules of the standard library | source of the held-out modules              |
    | `prose` | docstrings of those training modules                  | `pydoc_data.topics`, the language reference |

    One document per module (or topic), in a fixed order. The split depends on module paths only, so two Python versions
    differ in the text of a module but never in its side.

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

        named = sorted(topics.items())
    else:
        named = [(name, text) for name, text in _standard_library() if is_held_out(name) == (split == "test")]
        if domain == "prose":
            named = [(name, prose) for name, text in named if (prose := docstrings(text))]
    return Dataset.from_dict({"name": [name for name, _ in named], "text": [text for _, text in named]})


@lru_cache(maxsize=1)
def _standard_library() -> tuple[tuple[str, str], ...]:
    """(posix path below the root, text) of every module, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = []
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
            modules.append((relative.as_posix(), text))
    if not modules:
        raise FileNotFoundError(
            f"python_corpus: expected the standard library's .py files below {root}, found none; "
            "name another text source, e.g. a local .txt file"
        )
    return tuple(modules)


def docstrings(source: str, min_characters: int = 80) -> str:
    """All docstrings of at least `min_characters` of one module's source, in order, blank lines between.

    Source that does not parse (written for another Python) has none: the result is `""`.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, nodes))
    return "\n\n".join(text for text in texts if text and len(text) >= min_characters)


def documents(
    source: str = "code",
    split: Split = "train",
    column: str = "text",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Dataset:
    """The documents of any source as a Dataset with a column `text` (see the table at the top of this file).

    WikiText's rows are lines; they are joined with blank lines into one document, the convention behind every published
    WikiText-2 perplexity. Other local files have no split of their own: :func:`is_held_out` of a paragraph's or row's
    text decides, unless the source names its rows (`"c4.jsonl[800:1000]"`, as in a Python slice).

    Args:
        column: of a table, with text or chat messages (lists of role and content). A table without the column `text`
            is read from `messages`.
        tokenizer: its chat template makes text of chat messages.

    Raises:
        ValueError: the source has no such column, it holds something else, a local file is damaged or not in a Unicode
            encoding, nothing is left on that side of the split, or there is no chat template for chat messages.
        FileNotFoundError: a local path that does not exist.
        ConnectionError: a Hub dataset that is neither cached nor reachable.
    """
    if source in ("code", "prose"):
        return python_corpus(split, source)
    if wikitext := wikitext_file(source, split):
        return Dataset.from_dict({"text": [read_wikitext(wikitext)]})
    if local := local_rows(source):
        return _in_text(_local_documents(*local, split, column), source, tokenizer)
    if source in PUBLISHED:
        known = PUBLISHED[source]
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
            f"Expected 'code', 'prose', a local {'/'.join(FORMATS)} file, or 'ptb', 'c4' or a Hub dataset "
            "that is cached or reachable; offline, 'code' and 'prose' always work"
        ) from error
    dataset = _with_text(dataset, column, source)
    if join is not None:
        return Dataset.from_dict({"text": [join.join(dataset["text"])]})
    return _in_text(dataset, source, tokenizer)


def default_sources(model_name: str) -> dict[str, str]:
    """label -> source of the text to judge a model by: both Python domains for the embedded models, else WikiText-2.

    The public models of :mod:`greedy_helpers.public` are for machines without a network, too: they are judged by
    `"prose"` where the Hub is not reachable.
    """
    if model_name in EMBEDDED:
        return {"code": "code", "prose": "prose"}
    if model_name in PUBLIC and not hub_is_reachable():
        return {"prose": "prose"}
    return {"WikiText-2": WIKITEXT2}


def _local_documents(path: Path, rows: slice | None, split: Split, column: str) -> Dataset:
    """The rows that the source names, or else this split's side of the hash."""
    dataset = read_rows(path, rows)
    texts = _with_text(dataset, "text" if FORMATS[path.suffix.lower()] == "text" else column, str(path))["text"]
    kind = type(_first_text(texts))
    if (odd := next((row for row in texts if row and not isinstance(row, kind)), None)) is not None:
        raise ValueError(f"documents: expected rows of one kind in {path}, found {str(odd)[:80]!r} among them")
    # what a conversation is rendered to depends on the tokenizer, its side of the split must not
    names = (row if isinstance(row, str) else json.dumps(row, sort_keys=True) for row in texts)
    kept = [
        row
        for row, name in zip(texts, names, strict=True)
        if row and (rows is not None or is_held_out(name) == (split == "test"))
    ]
    if not kept:
        raise ValueError(
            f"documents: {path} has {len(dataset)} paragraphs (with blank lines between them) or rows, none of them in "
            f"split {split!r}; one in {_HELD_OUT_ONE_IN} is for 'test'"
        )
    return Dataset.from_dict({"text": kept})


def _with_text(dataset: Dataset, column: str, source: str) -> Dataset:
    """The column alone, as `text`: strings or chat messages."""
    names = dataset.column_names
    chosen = "messages" if column == "text" and column not in names and "messages" in names else column
    if chosen not in names:
        raise ValueError(
            f"documents: expected a column {column!r} in {source!r}, found {names}; name one with column= (--column)"
        )
    first = _first_text(dataset[chosen])
    if not isinstance(first, str) and not (
        isinstance(first, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in first)
    ):
        raise ValueError(
            f"documents: expected text, or chat messages with role and content, in the column {chosen!r} of "
            f"{source!r}, found {str(first)[:80]!r}"
        )
    dataset = dataset.select_columns([chosen])
    return dataset if chosen == "text" else dataset.rename_column(chosen, "text")


def _first_text(rows: Iterable[object]) -> object:
    return next((row for row in rows if row), "")


def _in_text(dataset: Dataset, source: str, tokenizer: PreTrainedTokenizerBase | None) -> Dataset:
    """Rows of text as they are; rows of chat messages through the tokenizer's chat template, when they are read."""
    if isinstance(_first_text(dataset["text"]), str):
        return dataset
    if getattr(tokenizer, "chat_template", None) is None:
        found = "no tokenizer" if tokenizer is None else "a tokenizer without one"
        raise ValueError(
            f"documents: {source!r} holds chat messages, which need a tokenizer's chat template, found {found}; "
            "name a column of plain text with column= (--column)"
        )

    def render(messages: list[dict]) -> str:
        try:  # tables fill what a message does not have with None
            messages = [{key: value for key, value in m.items() if value is not None} for m in messages]
            return tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # templates are programs
            raise ValueError(f"documents: the chat template refuses a conversation of {source!r}: {error}") from error

    return dataset.with_transform(lambda batch: {"text": [row and render(row) for row in batch["text"]]})


def pack(
    token_ids: Iterable[list[int]], seq: int, separator: int | None = None, prefix: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Cut documents of token ids into windows without padding and without losing a token.

    The documents are laid end to end, each preceded by `separator` (if given), and cut so that every window has `seq`
    tokens, `prefix` included, with which it starts. Padding would put positions into the calibration statistics that no
    reader ever writes.

    Returns:
        windows: long [n, seq].
        rest: long [r], r < seq: the tokens after the last full window; what follows the prefixes, and `rest`, is all.

    Raises:
        ValueError: `seq` is below 2 or leaves no room behind the prefix.
    """
    body = seq - len(prefix)
    if seq < 2 or body < 1:
        raise ValueError(f"pack: expected windows of at least {max(2, len(prefix) + 1)} tokens, found seq={seq}")
    head = [] if separator is None else [separator]
    parts = [torch.tensor([*head, *ids], dtype=torch.long) for ids in token_ids]
    stream = torch.cat([torch.empty(0, dtype=torch.long), *parts])
    n = len(stream) // body
    starts = torch.tensor(prefix, dtype=torch.long).expand(n, -1)
    return torch.cat([starts, stream[: n * body].view(n, body)], dim=1), stream[n * body :]


def _packed_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], seq: int, enough: float = math.inf
) -> Tensor:
    """Windows [n, seq] of tokenized texts; stops reading once `enough` tokens are there."""

    def token_ids() -> Iterator[list[int]]:
        remaining, seen = (text for text in texts if text is not None), 0
        while seen < enough and (batch := list(islice(remaining, 32))):
            # verbose=False: documents are meant to be longer than the model's context; pack() cuts them.
            for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
                seen += len(ids) + 1
                yield ids

    prefix = prefix_ids(tokenizer)
    return pack(token_ids(), seq, separator_id(tokenizer), prefix)[0]


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token between packed documents: that of pre-training where it has a known name, else eos, else bos."""
    vocabulary = tokenizer.get_vocab()
    candidates = [*map(vocabulary.get, _SEPARATORS), tokenizer.eos_token_id, tokenizer.bos_token_id]
    return next((token for token in candidates if token is not None), None)


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts in front of a text: a begin-of-text token, or nothing.

    Raises:
        TypeError: no tokenizer.
    """
    if tokenizer is None:
        raise TypeError("expected the model's tokenizer, found None: its folder has none; pass the base model's")
    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase,
    n: int = 128,
    seq: int = 128,
    source: str = "code",
    seed: int = 0,
    column: str = "text",
) -> Tensor:
    """`n` random windows of the training split: long [n, seq] on the CPU.

    The documents are shuffled by `seed`, read until they hold sixteen times the tokens asked for (or all of them are
    read), packed, and `n` windows are drawn without replacement. The paper uses n=16 for its criterion and n=1024 for
    its reconstruction, at seq=128 (LLaMA) or 1024 (GPT-2).

    Args:
        source: one text source, or several joined by `+` (`"code+prose"`), whose windows come in turn.
        column: of text or chat messages, see :func:`documents`.

    Raises:
        ValueError: the source holds fewer than `n` windows of `seq` tokens; and as :func:`documents`.
        TypeError: no tokenizer.
    """
    if n < 1:
        raise ValueError(f"calibration_tokens: expected at least 1 window, found n={n}")
    local = local_rows(source)
    sources = [source] if Path(source).exists() or (local and local[0].exists()) else source.split("+")
    if len(sources) > 1:
        k = len(sources)
        sizes = [len(range(first, n, k)) for first in range(min(n, k))]
        pairs = zip(sizes, sources, strict=False)
        parts = [calibration_tokens(tokenizer, m, seq, one, seed, column) for m, one in pairs]
        return torch.stack([parts[i % k][i // k] for i in range(n)])
    generator = torch.Generator().manual_seed(seed)
    texts = documents(source, "train", column, tokenizer)["text"]
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
    column: str = "text",
) -> Tensor:
    """Windows of the held-out split: long [n, seq] on the CPU.

    All windows, or `n` of them evenly spaced over the split (always the same ones: comparing two models on different
    windows would measure the windows). With `part="validation"` the `n` windows halfway between those: for choosing
    between methods, so that the test windows judge the choice.

    Raises:
        ValueError: the source holds fewer than `n` windows of `seq` tokens.
    """
    if n is not None and n < 1:
        raise ValueError(f"evaluation_tokens: expected at least 1 window, found n={n}")
    windows = _packed_windows(tokenizer, documents(source, "test", column, tokenizer)["text"], seq)
    available, validation = len(windows), part == "validation"
    needed = 1 if n is None else n * (1 + validation)
    if available < needed:
        raise ValueError(
            f"evaluation_tokens: expected {needed} windows of {seq} tokens in the held-out split of {source!r}"
            + f" to set {n} of them aside for validation" * validation
            + f", found {available}"
        )
    if n is None:
        return windows
    return windows[(torch.arange(n) * available + validation * (available // 2)) // n]
