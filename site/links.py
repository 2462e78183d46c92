"""Check that every internal link and anchor of a built site leads somewhere. No network.

python site/links.py build/site/_build/html
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag != "link" or given.get("rel") != "canonical":
            self.links += [given[key] for key in ("href", "src") if given.get(key)]


def read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def broken(site: Path) -> list[str]:
    """What does not lead anywhere: one line per link, `page: link: reason`."""
    pages = {path: read(path) for path in sorted(site.rglob("*.html")) if "_static" not in path.relative_to(site).parts}
    found = []
    for path, page in pages.items():
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link in ("#", "?"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            target = target / "index.html" if target.is_dir() else target
            if not target.is_relative_to(site.resolve()):
                found.append(f"{path.relative_to(site)}: {link}: outside the site")
            elif not target.is_file():
                found.append(f"{path.relative_to(site)}: {link}: no such file")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{path.relative_to(site)}: {link}: no such anchor")
    return found


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print("expected one argument, the folder of a built site", file=sys.stderr)
        return 2
    site = Path(sys.argv[1]).resolve()
    found = broken(site)
    print("\n".join(found) or f"all internal links of {len(list(site.rglob('*.html')))} pages lead somewhere")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
