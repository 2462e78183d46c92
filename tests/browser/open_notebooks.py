"""Notebooks in a real browser: JupyterLab under headless Chromium opens them, runs all cells, moves the sliders.

    .venv-browser/bin/python tests/browser/open_notebooks.py          # `make browser-test`
    .venv-browser/bin/python tests/browser/open_notebooks.py --explorer-only    # a notebook of one slider, one minute

Notebooks are copied to a temporary folder, so nothing committed changes. JupyterLab is that of .venv. Without Chromium
and its driver the test is skipped, with a message. It is not part of `make test`: it takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).resolve().parent.parent.parent
LAB = ROOT / ".venv" / "bin" / "jupyter-lab"
# A notebook of its own, so that the slider is tested even where no committed notebook has one.
EXPLORER = """import torch
from greedy_helpers.course import widgets

places = torch.tensor([0.0, 0.1, 0.2, 0.5, 0.9])
widgets.tau_explorer((places[:, None] - places).abs(), [0.05, 0.15, 0.35, 0.5], start=0.15)"""
SKIPPED = "skipped: no chromium with chromedriver here (Debian: apt-get install chromium chromium-driver)"
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1400,1200""".split()


def chromium() -> tuple[str, str] | None:
    """Browser and driver, or None where one is missing."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


def explorer_notebook(path: Path) -> None:
    cell = {"cell_type": "code", "id": "explorer", "metadata": {}, "outputs": [], "execution_count": None}
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    notebook = {"cells": [cell | {"source": EXPLORER}], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(notebook), encoding="utf-8")


class Lab:
    """A JupyterLab server on a free port, with the notebooks of `folder`."""

    def __init__(self, folder: Path) -> None:
        settings = folder / ".settings"  # the reader's own settings and workspaces stay out of it
        tracker = settings / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
        tracker.parent.mkdir(parents=True)
        tracker.write_text('{"windowingMode": "none"}')  # all cells are in the page, not only those on the screen
        environment = os.environ | {
            "JUPYTERLAB_SETTINGS_DIR": str(settings),
            "JUPYTERLAB_WORKSPACES_DIR": str(settings),
            "JUPYTER_DATA_DIR": str(settings / "data"),
            "JUPYTER_RUNTIME_DIR": str(settings / "runtime"),
        }
        command = [str(LAB), "--no-browser", "--allow-root", "--port=0", "--ServerApp.port_retries=0"]
        command += [f"--ServerApp.root_dir={folder}", "--IdentityProvider.token=", "--expose-app-in-browser"]
        command += ["--ServerApp.disable_check_xsrf=True"]
        self.log = (folder / "server.log").open("w+")
        self.process = subprocess.Popen(command, env=environment, stdout=self.log, stderr=self.log)
        wait(lambda: list((settings / "runtime").glob("jpserver-*.json")), 120, "JupyterLab to start")
        (info,) = (settings / "runtime").glob("jpserver-*.json")
        self.url = json.loads(info.read_text())["url"]
        wait(self._answers, 120, "JupyterLab to answer")

    def _answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}api", timeout=5).status == 200
        except OSError:
            return False

    def close(self) -> None:
        with urllib.request.urlopen(f"{self.url}api/kernels", timeout=60) as answer:
            kernels = json.load(answer)
        for kernel in kernels:
            urllib.request.urlopen(urllib.request.Request(f"{self.url}api/kernels/{kernel['id']}", method="DELETE"))
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


def wait(condition: Callable[[], object], seconds: float, what: str, every: float = 0.5) -> object:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(every)
    raise TimeoutError(f"waited {seconds:.0f} s for {what}")


def open_browser(folder: Path) -> webdriver.Chrome:
    browser, driver = chromium()
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    return webdriver.Chrome(options, webdriver.ChromeService(driver))


def run_all(page: webdriver.Chrome, lab: Lab, path: Path, seconds: float) -> dict:
    """Open the notebook, run all of its cells, save it; the notebook as saved."""
    page.get(f"{lab.url}lab/tree/{path.name}?reset")
    WebDriverWait(page, 180).until(lambda page: page.find_elements(By.CSS_SELECTOR, ".jp-NotebookPanel .jp-CodeCell"))
    wait(lambda: page.execute_script(_IS_IDLE), 180, "a kernel")
    for name in ("runmenu:run-all", "notebook:run-all-cells"):
        if page.execute_script(_RUN_COMMAND, name):
            break
    else:
        raise RuntimeError("JupyterLab has no command to run all cells")

    def finished() -> dict | None:
        if page.find_elements(By.CSS_SELECTOR, ".jp-Dialog"):
            raise RuntimeError(f"{path.name}: {page.find_element(By.CSS_SELECTOR, '.jp-Dialog').text}")
        page.execute_script(_RUN_COMMAND, "docmanager:save")
        try:
            saved = json.loads(path.read_text())
        except json.JSONDecodeError:  # just being written
            return None
        cells = [cell for cell in saved["cells"] if cell["cell_type"] == "code"]
        errors = [o for cell in cells for o in cell["outputs"] if o["output_type"] == "error"]
        if errors:
            raise AssertionError(f"{path.name}: {errors[0]['ename']}: {errors[0]['evalue']}")
        done = all(cell["execution_count"] for cell in cells) and page.execute_script(_IS_IDLE)
        return saved if done else None

    time.sleep(1)
    return wait(finished, seconds, f"{path.name} to run", every=5)  # each look saves the notebook


# JupyterLab started with --expose-app-in-browser has its application as window.jupyterapp.
_RUN_COMMAND = """const app = window.jupyterapp, name = arguments[0];
if (!app || !app.commands.hasCommand(name)) return false;
app.commands.execute(name); return true;"""

_IS_IDLE = """const panel = window.jupyterapp && window.jupyterapp.shell.currentWidget;
const context = panel && panel.sessionContext;
return Boolean(context && context.isReady && context.session && context.session.kernel
               && context.session.kernel.status === 'idle');"""


# A progress bar is a box, too: only those with a slider and a picture.
_EXPLORER = ".jp-OutputArea-output > .widget-box:has(.noUi-handle, input[type=range]):has(img)"


def move_sliders(page: webdriver.Chrome, seconds: float = 60) -> list[tuple[str, str]]:
    """Press an arrow key on each explorer's slider; its sentences before and after, once its picture has changed."""
    boxes = WebDriverWait(page, seconds).until(lambda page: page.find_elements(By.CSS_SELECTOR, _EXPLORER))
    return [move_slider(page, box, seconds) for box in boxes]


def move_slider(page: webdriver.Chrome, box: WebElement, seconds: float) -> tuple[str, str]:
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
    handle = box.find_element(By.CSS_SELECTOR, ".noUi-handle, input[type=range]")

    def seen() -> tuple[str, str]:
        picture = page.execute_async_script(_PIXELS, box.find_element(By.TAG_NAME, "img"))
        return picture, [label.text for label in box.find_elements(By.CSS_SELECTOR, ".widget-label") if label.text][-1]

    before = seen()
    handle.send_keys(Keys.ARROW_RIGHT)

    def changed() -> tuple[str, str] | None:
        try:
            now = seen()
        except StaleElementReferenceException:
            return None
        return now if now[0] != before[0] and now[1] != before[1] else None

    return before[1], wait(changed, seconds, "the picture to change")[1]


# The picture's bytes: its address is a new blob whenever it is set, changed or not.
_PIXELS = """const done = arguments[arguments.length - 1], image = arguments[0];
const go = () => { const canvas = document.createElement('canvas');
  canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
  canvas.getContext('2d').drawImage(image, 0, 0); done(canvas.toDataURL()); };
image.complete && image.naturalWidth ? go() : image.addEventListener('load', go, {once: true});"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", default=["00_quickstart", "03_similarity"], help="names without .ipynb")
    parser.add_argument("--explorer-only", action="store_true", help="only a small notebook with one slider")
    parser.add_argument("--seconds", type=float, default=1200, help="patience with each notebook (default 1200)")
    parser.add_argument("--screenshots", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if chromium() is None:
        print(SKIPPED)
        return 0
    if not LAB.is_file():
        print(f"expected JupyterLab at {LAB}; `make lab` or `make demo` installs it", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        explorer_notebook(folder / "explorer.ipynb")
        names = [] if args.explorer_only else args.notebooks
        for notebook in names:
            shutil.copy(ROOT / "notebooks" / f"{notebook}.ipynb", folder)
        lab = page = None
        try:
            lab = Lab(folder)
            page = open_browser(folder)
            for notebook in ("explorer", *names):
                saved = run_all(page, lab, folder / f"{notebook}.ipynb", args.seconds)
                print(f"{notebook}: {sum(c['cell_type'] == 'code' for c in saved['cells'])} code cells ran", flush=True)
                if notebook == "explorer" or "explorer(" in json.dumps(saved):
                    for before, after in move_sliders(page):
                        print(f"  slider moved, the picture changed\n  before: {before}\n  after:  {after}", flush=True)
                if args.screenshots:
                    args.screenshots.mkdir(parents=True, exist_ok=True)
                    page.save_screenshot(str(args.screenshots / f"{notebook}.png"))
        except BaseException:
            if lab is not None:
                lab.log.flush()
                print((folder / "server.log").read_text()[-3000:], file=sys.stderr)
            if page is not None and args.screenshots:
                page.save_screenshot(str(args.screenshots / "failed.png"))
            raise
        finally:
            if page is not None:
                page.quit()
            if lab is not None:
                lab.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
