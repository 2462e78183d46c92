"""What is written is whole or not there, whatever fails and whenever the process dies."""

import json
import os
import signal
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from greedy_helpers.files import remove_partial, replace_file, replace_folder, rows_as_json, sha256_of


@pytest.mark.parametrize("old", ["the old text", None])
@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_an_error_leaves_the_old_file_and_nothing_else(step, old, tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    if old is not None:
        path.write_text(old)

    def fails(*args):
        raise OSError("No space left on device")

    def write(partial):
        assert partial.parent.name.startswith(".")
        assert partial.parent.suffix == ".partial"
        partial.write_text("half of the n")
        partial.with_name(".tmpXXXXXX").write_text("a writer's own")
        if step == "write":
            fails()

    if step != "write":
        monkeypatch.setattr(os, step, fails)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, write)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == ({} if old is None else {path.name: old})


def test_content_and_name_are_forced_to_the_disk(tmp_path, monkeypatch):
    """The content before the rename, the folder (which holds the name) after it."""
    calls, fsync, replace = [], os.fsync, os.replace

    def synced(handle):
        calls.append(os.fstat(handle).st_ino)
        fsync(handle)

    def replaced(source, target):
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    replace_file(tmp_path / "file", lambda partial: partial.write_text("new"))
    assert calls == [(tmp_path / "file").stat().st_ino, "rename", tmp_path.stat().st_ino]
    assert (tmp_path / "file").read_text() == "new"


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    script = (
        "import os, signal, sys; from greedy_helpers.files import remove_partial, replace_file\n"
        "def write(partial): partial.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "replace_file(sys.argv[1], write)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, path], check=False).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_keeps_beside_its_file_goes_too(tmp_path):
    """safetensors 0.8 fills `.tmpXXXXXX` and renames it: no name of ours would find it again."""
    script = (
        "import os, signal, sys; from greedy_helpers.files import remove_partial, replace_file\n"
        "def write(partial):\n"
        "    partial.with_name('.tmpXXXXXX').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "replace_file(sys.argv[1], write)\n"
    )
    path = tmp_path / "block.safetensors"
    assert subprocess.run([sys.executable, "-c", script, path], check=False).returncode == -signal.SIGKILL
    remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_the_users(umask, tmp_path):
    """Whatever a writer gives its files: safetensors 0.8 lets their owner alone read them."""

    def write(file):
        save_file({"weight": torch.zeros(2)}, file)
        file.chmod(0o600)  # whatever the version does

    def write_folder(folder):
        (folder / "below").mkdir()
        write(folder / "below" / "file")

    old = os.umask(umask)
    try:
        replace_file(tmp_path / "file", write)
        replace_folder(tmp_path / "folder", write_folder)
    finally:
        os.umask(old)
    modes = {str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {name: (0o666 if name.endswith("file") else 0o777) & ~umask for name in modes}
    assert len(modes) == 4


@pytest.mark.parametrize("head", [{}, {"settings": {"seq": 64, "texts": []}, "name": "x"}])
def test_rows_are_lines_of_json(head):
    rows = [{"ratio": 0.25, "list": [1, 2]}, {"ratio": 0.5, "list": []}]
    text = rows_as_json({"rows": rows, **head})
    assert json.loads(text) == {**head, "rows": rows}
    assert [line for line in text.splitlines() if "ratio" in line] == [
        '  {"ratio": 0.25, "list": [1, 2]},',
        '  {"ratio": 0.5, "list": []}',
    ]


def test_checksum(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256_of(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
