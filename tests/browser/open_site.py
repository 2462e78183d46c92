"""The static site in a real browser: pages open, formulas and pictures are there, search finds, dark mode is legible.

    .venv-browser/bin/python tests/browser/open_site.py       # `make browser-test`, after `make site`

The site is served from this machine; a page that asks another machine for anything fails. Without Chromium and its
driver the test is skipped, with a message.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import sys
import tempfile
import threading
from pathlib import Path

from open_notebooks import SKIPPED, chromium, open_browser, wait
from selenium import webdriver
from selenium.webdriver.common.by import By

SITE = Path(__file__).resolve().parent.parent.parent / "build" / "site" / "_build" / "html"
# Said by jupyter-book's scripts and MathJax's font test on every page, and without effect.
_NOISE = ("THEBE_JS_URL", "favicon.ico", "Got invalid theme mode", "about:blank", "/fonts/HTML-CSS/TeX/otf/")
_QUERY, _EXPECTED = "jensen shannon", "03_similarity"


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def serve(folder: Path) -> http.server.ThreadingHTTPServer:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def pages(folder: Path) -> list[str]:
    hidden = {"_static", "_sources", "_downloads", "mathjax"}
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*.html")))
    return [path.as_posix() for path in found if path.parts[0] not in hidden]


def open_page(page: webdriver.Chrome, url: str, seconds: float = 120) -> None:
    """Open it and wait until MathJax has nothing left to do."""
    page.get(url)
    wait(lambda: page.execute_script(_IS_READY), seconds, f"{url} to be ready", every=0.1)


_IS_READY = """if (document.readyState !== 'complete') return false;
if (!document.querySelector('.math.notranslate')) return true;
return Boolean(window.MathJax && MathJax.Hub && MathJax.Hub.queue && !MathJax.Hub.queue.running
               && !MathJax.Hub.queue.pending && document.querySelector('.MathJax, .MathJax_Display'));"""

# What is wrong with a page as it is seen, in words.
_COMPLAINTS = """const found = [], bad = what => found.push(what);
for (const image of document.querySelectorAll('main img')) {
  const name = image.src.split('/').pop().slice(-40);
  if (!image.complete || !image.naturalWidth) bad('picture does not load: ' + name);
  const described = image.alt.length >= 40 && !image.alt.includes('.png');
  if (image.closest('.cell_output') && !described) bad('picture without a description: ' + name);
}
for (const error of document.querySelectorAll('.MathJax_Error, .merror')) bad('formula: ' + error.textContent);
for (const piece of document.querySelectorAll('.math.notranslate')) {
  if (!piece.querySelector('.MathJax, .MathJax_Display, .MathJax_Preview + *'))
    bad('formula not set: ' + piece.textContent.slice(0, 60)); }
for (const entry of performance.getEntriesByType('resource'))
  if (!entry.name.startsWith(location.origin) && !entry.name.startsWith('data:') && !entry.name.startsWith('blob:'))
    bad('asks for ' + entry.name);
return found.map(what => what.toWellFormed());"""

# Contrast of text and ground (WCAG), and whether pictures lie on a light ground, as they were drawn for.
_DARK = """document.documentElement.dataset.mode = 'dark'; document.documentElement.dataset.theme = 'dark';
const numbers = color => color.match(/[\\d.]+/g).map(Number);
const light = color => { const [r, g, b] = numbers(color).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const ground = element => { for (let e = element; e; e = e.parentElement) {
    const color = numbers(getComputedStyle(e).backgroundColor);
    if (color.length < 4 || color[3] > 0.5) return getComputedStyle(e).backgroundColor; } return 'rgb(255,255,255)'; };
const contrast = element => { const a = light(getComputedStyle(element).color), b = light(ground(element));
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); };
const found = [];
if (light(ground(document.querySelector('main'))) > 0.1) found.push('dark mode is not dark');
for (const selector of ['main p', '.cell_output pre', '.cell_output td', '.cell_output th', '.MathJax', 'summary'])
  for (const element of document.querySelectorAll(selector)) {
    if (!element.innerText || !element.offsetParent) continue;
    const c = contrast(element);
    if (c < 4) { found.push(`${selector} has contrast ${c.toFixed(1)}: ${element.innerText.slice(0, 40)}`); break; } }
for (const image of document.querySelectorAll('.cell_output img')) {
  const canvas = document.createElement('canvas'); canvas.width = canvas.height = 1;
  const context = canvas.getContext('2d'); context.drawImage(image, 2, 2, 1, 1, 0, 0, 1, 1);
  const [r, g, b, alpha] = context.getImageData(0, 0, 1, 1).data;
  if ((alpha < 200 && light(ground(image)) < 0.7) || (alpha >= 200 && r + g + b < 600))
    found.push('picture on a dark ground: ' + image.src.split('/').pop()); }
return found.map(what => what.toWellFormed());"""


def look(page: webdriver.Chrome, url: str, folder: Path, screenshots: Path | None) -> list[str]:
    """All complaints about all pages."""
    found = []
    names = pages(folder)
    for name in names:
        open_page(page, url + name)
        complaints = page.execute_script(_COMPLAINTS)
        said = [line["message"] for line in page.get_log("browser") if line["level"] == "SEVERE"]
        complaints += [f"console: {line[:200]}" for line in said if not any(noise in line for noise in _NOISE)]
        complaints += [f"dark mode: {what}" for what in page.execute_script(_DARK)]
        found += [f"{name}: {what}" for what in complaints]
        if screenshots and name.startswith("notebooks/"):
            page.save_screenshot(str(screenshots / f"site_{Path(name).stem}_dark.png"))
    print(f"{len(names)} pages opened, light and dark", flush=True)
    open_page(page, f"{url}search.html?q={_QUERY.replace(' ', '+')}")
    hits = wait(lambda: page.find_elements(By.CSS_SELECTOR, "#search-results li a"), 60, "search results")
    if not any(_EXPECTED in hit.get_attribute("href") for hit in hits):
        found.append(f"search for {_QUERY!r} does not find {_EXPECTED}")
    print(f"search for {_QUERY!r}: {len(hits)} pages", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, default=SITE)
    parser.add_argument("--screenshots", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if chromium() is None:
        print(SKIPPED)
        return 0
    if not (args.site / "index.html").is_file():
        print(f"expected the built site at {args.site}; `make site` builds it", file=sys.stderr)
        return 2
    if args.screenshots:
        args.screenshots.mkdir(parents=True, exist_ok=True)
    server = serve(args.site)
    with tempfile.TemporaryDirectory() as name:
        page = open_browser(Path(name))
        try:
            found = look(page, f"http://127.0.0.1:{server.server_port}/", args.site, args.screenshots)
        finally:
            page.quit()
            server.shutdown()
    print("\n".join(found), file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
