"""Files and folders that are written whole or not at all; their checksums and sizes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A place to write to in a folder of its own beside `path`; the folder goes with all that is left in it.

    Writers keep files of their own under way: safetensors fills `.tmpXXXXXX` beside the file that it was asked for.
    """
    private = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield private / path.name
    finally:
        shutil.rmtree(private, ignore_errors=True)


def remove_partial(folder: Path, name: str = "*") -> None:
    """Remove what killed processes have left of `name` in `folder`; no other process may be writing there."""
    for left_over in folder.glob(f".{name}.*.partial"):
        shutil.rmtree(left_over, ignore_errors=True)


def replace_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then rename it to `path`: all or nothing.

    The content is forced to the disk before the rename, and the new name after it. An error leaves the old file and
    nothing else; a killed process may leave a folder `.NAME.XXXXXXXX.partial` beside it.

    Raises:
        What `write` raises; OSError: the file cannot be written.
    """
    path = Path(path)
    with _beside(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        os.chmod(partial, mode)  # safetensors makes a file that its owner alone can read
        _force_to_disk(partial)
        os.replace(partial, path)
    _force_to_disk(path.parent)


def _force_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(folder: str | Path, write: Callable[[Path], object], overwrite: bool = False) -> Path:
    """Let `write` fill a folder beside `folder`, then rename it to `folder`: all or nothing. Returns `folder`.

    An error leaves what was there before and nothing else.

    Raises:
        FileExistsError: `folder` is a file, or is not empty and `overwrite` is not set.
        OSError: the folder cannot be written. Otherwise what `write` raises.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"expected a folder, or nothing, at {folder}, found a file")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} exists and is not empty; pass overwrite=True to replace it")
    with ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = stack.enter_context(_beside(folder))
            partial.mkdir()
        except OSError as error:
            raise OSError(f"cannot write to {folder.parent}: {error}") from error
        mode = partial.stat().st_mode & 0o666
        write(partial)
        for file in partial.rglob("*"):
            if file.is_file():
                os.chmod(file, mode)  # as in replace_file
        if folder.is_dir():
            # Nothing is there: Windows renames onto no folder. Not in the private folder, which goes whatever happens.
            replaced = partial.parent.with_suffix(".replaced")
            os.replace(folder, replaced)
            try:
                os.replace(partial, folder)
            except BaseException:
                os.replace(replaced, folder)
                raise
            shutil.rmtree(replaced, ignore_errors=True)  # the new folder is in its place: no failure any more
        else:
            os.replace(partial, folder)
    return folder


def sha256_of(path: str | Path) -> str:
    """The SHA-256 checksum of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rows_as_json(found: Mapping[str, Any]) -> str:
    """A JSON object whose `"rows"` come last, one per line: a new measurement changes one line of a diff."""
    head = json.dumps({**{key: value for key, value in found.items() if key != "rows"}, "rows": []}, indent=1)
    rows = ",\n".join("  " + json.dumps(row) for row in found["rows"])
    return head.removesuffix("[]\n}") + f"[\n{rows}\n ]\n}}\n"


def disk_bytes(folder: str | Path) -> int:
    """Bytes of the weight files in a saved model's folder.

    Raises:
        FileNotFoundError: no `*.safetensors` there.
    """
    found = [path.stat().st_size for path in Path(folder).glob("*.safetensors")]
    if not found:
        raise FileNotFoundError(f"disk_bytes: expected *.safetensors in {folder}, found none")
    return sum(found)
