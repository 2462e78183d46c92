"""Build the static site from the committed notebooks: nothing is executed, nothing is fetched.

    .venv-site/bin/python site/build.py         # `make site`; the result is build/site/_build/html/index.html

The sources are put together in build/site: the pages of this folder, the notebooks that exist, a table of contents that
follows them, and a page of the reference for each module of the package. Then jupyter-book runs. It fails on every
warning of Sphinx, such as a link, a picture or a download that leads nowhere.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

SITE = Path(__file__).resolve().parent
ROOT = SITE.parent
sys.path.append(str(ROOT / "notebooks"))
from badges import BRANCH, repository, without_badge  # noqa: E402 - scripts beside the notebooks
from parts import table  # noqa: E402

BUILD = ROOT / "build" / "site"
_EDITION = re.compile(r"\]\(exercises/\w+\.ipynb\)")  # the site hands editions out on a page of their own
_FOLDED = {"setup": "hide-cell", "solution": "hide-input"}  # tag in the notebook -> tag that folds it on the page


def notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def lectures() -> list[Path]:
    """One page per notebook for whoever teaches it."""
    return sorted((SITE / "lectures").glob("[0-9]*.md"))


def modules() -> list[str]:
    """Public modules of the package in the order of its table of contents: first as imported, then the rest."""
    package = ROOT / "greedy_helpers"
    found = {path.stem for path in package.glob("*.py") if not path.stem.startswith("_")}
    named = re.findall(r"^from \.(\w+) import", (package / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    return [*(name for name in named if name in found), *sorted(found - set(named)), *nested_modules()]


def nested_modules() -> dict[str, Path]:
    """Modules in the folders of the package, large/ and course/: name -> its file."""
    package = ROOT / "greedy_helpers"
    paths = [*package.glob("*/[a-z]*.py"), *package.glob("*/*/__init__.py")]
    return dict(sorted((path.parent.name if path.stem == "__init__" else path.stem, path) for path in paths))


def page_of(notebook: dict) -> dict:
    """The notebook as a page: set-up and solutions folded, pictures described, no badge.

    What JupyterLab folds by metadata, the page folds by tags; once the repository has an
    address it has a button of its own that opens Colab.
    """
    for cell in notebook["cells"]:
        metadata = cell["metadata"]
        metadata["tags"] = [*(tags := metadata.get("tags", [])), *(_FOLDED[tag] for tag in tags if tag in _FOLDED)]
        if "alt" in metadata:
            metadata["mystnb"] = {"image": {"alt": metadata.pop("alt")}}
    head = without_badge("".join(notebook["cells"][0]["source"]))
    notebook["cells"][0]["source"] = _EDITION.sub("](../exercises.md)", head)
    return notebook


def contents(paths: list[Path], names: list[str]) -> dict:
    """jupyter-book's table of contents for these notebooks and these modules."""
    pages = ("troubleshooting", "exercises", "glossary", "notation", "errata", "instructors")
    return {
        "format": "jb-book",
        "root": "intro",
        "parts": [
            {"caption": "The course", "chapters": [{"file": f"notebooks/{path.stem}"} for path in paths]},
            {"caption": "Beside the course", "chapters": [{"file": page} for page in pages]},
            {"caption": "Lecture pages", "chapters": [{"file": f"lectures/{path.stem}"} for path in lectures()]},
            {
                "caption": "The package",
                "chapters": [{"file": "api/index", "sections": [{"file": f"api/{name}"} for name in names]}],
            },
        ],
    }


def exercises() -> str:
    """The page that hands out the exercise editions."""
    rows = [f"- {{download}}`{path.name} <exercise_editions/{path.name}>`" for path in editions()]
    return (
        "# Exercise editions\n\nThe notebooks without their solutions. Where a solution stands there is a stub, and "
        "behind it the checker that says what is still wrong. In a clone they are in `notebooks/exercises/`.\n\n"
        + "\n".join(rows)
        + "\n"
    )


def editions() -> list[Path]:
    return sorted((ROOT / "notebooks" / "exercises").glob("[0-9]*.ipynb"))


def reference(name: str) -> str:
    options = "   :members:\n" + "   :imported-members:\n" * (name == "exercises")  # it only collects its files' names
    module = ".".join(path_of(name).relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return f"# {name}\n\n```{{eval-rst}}\n.. automodule:: {module}\n{options}```\n"


def path_of(name: str) -> Path:
    return nested_modules().get(name, ROOT / "greedy_helpers" / f"{name}.py")


def reference_index(names: list[str]) -> str:
    first_lines = []
    for name in names:
        first = re.match(r'"""(.+?)(?:\n|""")', path_of(name).read_text(encoding="utf-8"))[1].strip()
        first_lines.append(f"| [{name}]({name}.md) | {first.replace('|', chr(92) + '|')} |")
    return (
        "# The package\n\n`import greedy_helpers as gh` has the names that are needed most; the others are imported "
        "from their modules. Shapes are written `[tokens, d]`; units and errors are in every docstring.\n\n"
        "| module | |\n|---|---|\n" + "\n".join(first_lines) + "\n"
    )


def configuration() -> str:
    """Of the book; with buttons that lead to the repository and to Colab as soon as its address is known."""
    address, config = repository(), (SITE / "_config.yml").read_text(encoding="utf-8")
    if address is None:
        return config
    buttons = "html:\n  use_repository_button: true\n  use_issues_button: true\n"
    return config.replace("html:\n", buttons) + (
        f"repository:\n  url: {address}\n  branch: {BRANCH}\n"
        "launch_buttons:\n  colab_url: https://colab.research.google.com\n"
    )


def mathjax() -> Path | None:
    """The folder of the MathJax that requirements.txt installs."""
    found = importlib.util.find_spec("jupyter_server_mathjax")
    return None if found is None else Path(found.origin).parent / "static"


def assemble(target: Path) -> None:
    """Write all sources of the book into the empty folder `target`."""
    paths, names = notebooks(), modules()
    for folder in ("notebooks", "api", "exercise_editions"):
        (target / folder).mkdir(parents=True)
    for page in SITE.glob("*.md"):
        text = page.read_text(encoding="utf-8").replace("<!-- timings -->", table(paths))
        (target / page.name).write_text(text, encoding="utf-8")
    shutil.copytree(SITE / "lectures", target / "lectures")
    for folder in ("_static", "_ext"):
        shutil.copytree(SITE / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (target / "extra").mkdir()
    if mathjax() is not None:
        shutil.copytree(mathjax(), target / "extra" / "mathjax")
    for path in paths:
        page = page_of(json.loads(path.read_text(encoding="utf-8")))
        (target / "notebooks" / path.name).write_text(json.dumps(page), encoding="utf-8")
    for path in editions():
        shutil.copy(path, target / "exercise_editions")
    (target / "exercises.md").write_text(exercises(), encoding="utf-8")
    (target / "api" / "index.md").write_text(reference_index(names), encoding="utf-8")
    for name in names:
        (target / "api" / f"{name}.md").write_text(reference(name), encoding="utf-8")
    (target / "_toc.yml").write_text(json.dumps(contents(paths, names), indent=1), encoding="utf-8")  # JSON is YAML
    (target / "_config.yml").write_text(configuration(), encoding="utf-8")


def main() -> int:
    shutil.rmtree(BUILD, ignore_errors=True)
    assemble(BUILD)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["--warningiserror", "--keep-going"]  # all warnings, then failure
    command = [str(Path(sys.executable).parent / "jupyter-book"), "build", str(BUILD), *options]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
