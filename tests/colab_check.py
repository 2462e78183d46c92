"""Rehearse the set-up cell's installation on Colab: nothing that is there already may change its version.

    .venv/bin/python tests/colab_check.py                  # with the versions of this environment
    .venv/bin/python tests/colab_check.py --colab          # `make colab-test`: with the versions Colab has

Both ask pip what it *would* install (`--dry-run --report`) for the checkout in place of the repository's address. The
second does it in .venv-colab, which holds only the metadata of Colab's packages: what pip decides depends on names and
versions, so gigabytes of PyTorch need not be downloaded. It needs PyPI; `make test` compares the requirements only.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import nbformat
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
# Colab's runtime of 2026-08 (googlecolab/backend-info). Packages of ours that are not listed are not on Colab.
COLAB = {
    "torch": "2.11.0+cu128",
    "transformers": "5.15.0",
    "tokenizers": "0.22.2",
    "huggingface-hub": "1.27.0",
    "datasets": "4.0.0",
    "accelerate": "1.14.0",
    "safetensors": "0.8.0",
    "numpy": "2.1.3",
    "pandas": "2.2.3",
    "matplotlib": "3.10.0",
    "networkx": "3.5",
    "tqdm": "4.67.1",
    "ipywidgets": "7.7.1",
}
KEPT = ("torch", "transformers", "numpy")


def unmet(versions: dict[str, str]) -> list[str]:
    """The package's requirements that installed `versions` (name -> version) do not meet: what pip would touch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [Requirement(text) for text in project["dependencies"]]
    return [str(one) for one in asked if not one.specifier.contains(versions.get(one.name, "0"), prereleases=True)]


def set_up_requirement() -> str:
    """What the set-up cell hands to pip, with this checkout in place of the repository's address.

    Raises:
        ValueError: the cell has no such line, or asks for more than the repository.
    """
    cells = nbformat.read(ROOT / "notebooks" / "00_quickstart.ipynb", as_version=4).cells
    (source,) = [cell.source for cell in cells if "setup" in cell.metadata.get("tags", [])]
    lines = re.findall(r"%pip install (.*)", source)
    if lines != ["--quiet git+{REPOSITORY}"]:
        raise ValueError(
            f"expected one line `%pip install --quiet git+{{REPOSITORY}}` in the set-up cell, found {lines}"
        )
    return str(ROOT)


def would_install(python: str) -> dict[str, str]:
    """Name -> version of all that pip would install or replace for the set-up cell's requirement.

    Raises:
        RuntimeError: pip failed; its last lines say why.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            python,
            "-m",
            "pip",
            "install",
            "--dry-run",
            "--quiet",
            "--report",
            str(report),
            set_up_requirement(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pip would fail: {done.stderr.strip()[-1500:]}")
        found = json.loads(report.read_text())["install"]
    return {item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"] for item in found}


def pretend(folder: Path) -> str:
    """A venv in which pip believes that Colab's packages are installed; its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    python = folder / "bin" / "python"
    asked = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(subprocess.run([str(python), "-c", asked], capture_output=True, text=True, check=True).stdout.strip())
    for name, version in COLAB.items():
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "INSTALLER").write_text("pip\n")
        (info / "RECORD").write_text("")
    return str(python)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--colab", action="store_true", help="with Colab's versions, in .venv-colab")
    args = parser.parse_args()
    found = would_install(pretend(ROOT / ".venv-colab") if args.colab else sys.executable)
    print("pip would install:", ", ".join(f"{name} {version}" for name, version in sorted(found.items())))
    there = set(COLAB) if args.colab else set(KEPT)
    if "greedy-helpers" not in found or there & found.keys():
        print(f"expected greedy-helpers and nothing that is there already, found {sorted(there & found.keys())}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
