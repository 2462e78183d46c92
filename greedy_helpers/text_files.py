"""Local files of text or of chat messages, as the rows of a data set."""

from __future__ import annotations

import codecs
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset, load_dataset

FORMATS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_MARKS = {  # the longer marks first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


def read_rows(path: Path) -> Dataset:
    """The paragraphs of a text file (column `text`), or the rows of a table with all their columns.

    A byte order mark decides the encoding; without one it is UTF-8.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: another ending than those of :data:`FORMATS`, another encoding, or a file that is damaged.
    """
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
