"""Local files of text or of chat messages, as the rows of a data set; WikiText as it was published."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset, load_dataset

FORMATS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_MARKS = {  # the longer marks first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


_RANGE = re.compile(r"(.+)\[(\d*):(\d*)\]")


def local_rows(source: str) -> tuple[Path, slice | None] | None:
    """The local file that a source names, and which of its rows (`"c4.jsonl[:800]"`; None: it does not say).

    None if the source is no local file.
    """
    named = None if Path(source).is_file() else _RANGE.fullmatch(source)
    path = Path(named[1] if named else source)
    if path.suffix.lower() not in FORMATS and not path.is_file():
        return None
    return path, named and slice(int(named[2] or 0), int(named[3]) if named[3] else None)


def read_rows(path: Path, rows: slice | None = None) -> Dataset:
    """The paragraphs of a text file (column `text`), or the rows of a table with all their columns.

    A byte order mark decides the encoding; without one it is UTF-8.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: another ending than those of :data:`FORMATS`, another encoding, a file that is damaged, or one that
            does not have all the `rows`.
    """
    dataset = _all_rows(path)
    if rows is None:
        return dataset
    start, stop = rows.start, len(dataset) if rows.stop is None else rows.stop
    if not start < stop <= len(dataset):
        raise ValueError(f"documents: expected rows [{start}:{stop}] in {path}, found {len(dataset)} rows")
    return dataset.select(range(start, stop))


def wikitext_file(source: str, split: str) -> Path | None:
    """The file of WikiText's raw form for one split, `"train"` or `"test"`; None if the source is something else.

    A folder has a file for either. A file's own name says which split it is (wiki.test.raw). It is never used as the
    other one; a validation file, which is in neither, serves as either.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a name that does not say the split, or says the other one.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(file.name for file in path.glob("wiki.*.raw"))
        if found and f"wiki.{split}.raw" not in found:
            raise FileNotFoundError(f"documents: expected wiki.{split}.raw in {path}, found {', '.join(found)}")
        return path / f"wiki.{split}.raw" if found else None
    if path.suffix.lower() != ".raw":
        return None
    own = path.stem.rpartition(".")[2]
    if own not in ("train", "valid", "test"):
        raise ValueError(f"documents: expected wiki.train.raw, wiki.valid.raw or wiki.test.raw, found {path}")
    if own not in ("valid", split):
        raise ValueError(f"documents: expected text of split {split!r}, found {path}, which is WikiText's {own} split")
    if not path.is_file():
        raise FileNotFoundError(f"documents: expected WikiText's raw form at {path}, found nothing there")
    return path


def read_wikitext(path: Path) -> str:
    """One document, byte for byte what joining the rows of the Hub's copy (wikitext-2-raw-v1) with blank lines gives.

    There every line is a row that keeps its line break, and a line of blanks is an empty row. So each line break of
    the file becomes three. This is the text of published perplexities; the file itself, tokenized, has another one.

    Raises:
        ValueError: the file is not UTF-8.
    """
    try:
        lines = path.read_bytes().decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"documents: {path} is not utf-8 ({error}); expected WikiText's raw form") from error
    return "\n\n".join(line + "\n" if line.strip() else "" for line in lines)


def _all_rows(path: Path) -> Dataset:
    if not path.is_file():
        raise FileNotFoundError(f"documents: expected a text file at {path}, found nothing there")
    if (builder := FORMATS.get(path.suffix.lower())) is None:
        raise ValueError(f"documents: expected a file that ends in {', '.join(FORMATS)}, found {path}")
    options = {"split": "train"} | ({"sample_by": "paragraph"} if builder == "text" else {})
    encoding = "utf-8" if builder == "parquet" else _encoding_of(path)
    pattern = any(mark in str(path) for mark in ("*", "?", "[", "::"))  # to `datasets`: other files than this one
    try:
        if encoding == "utf-8" and not pattern:
            return load_dataset(builder, data_files=str(path), **options)
        with TemporaryDirectory() as folder:  # not all builders of `datasets` take other encodings
            copy = Path(folder) / f"copy{path.suffix}"
            text = path.read_bytes() if builder == "parquet" else path.read_text(encoding).encode("utf-8")
            copy.write_bytes(text)
            return load_dataset(builder, data_files=str(copy), cache_dir=folder, keep_in_memory=True, **options)
    except Exception as error:  # datasets raises a different class for each way of being damaged
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ValueError(f"documents: {path} cannot be read as {builder}: {reason}") from error


def _encoding_of(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(4)
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "utf-8")
    way_out = "; save it as UTF-8"
    try:
        with path.open(encoding=encoding) as file:
            while piece := file.read(2**20):
                if piece.count("\0") > len(piece) / 10:  # UTF-16 without a byte order mark, which is valid UTF-8
                    raise ValueError(f"documents: expected text in {path}, found zero bytes{way_out}")
    except UnicodeError as error:
        raise ValueError(f"documents: {path} is not {encoding} ({error}){way_out}") from error
    return encoding
