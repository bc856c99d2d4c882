"""What is wrong with the built book: links that lead nowhere, missing pictures, things loaded from elsewhere."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {("img", "src"), ("script", "src"), ("link", "href"), ("source", "src"), ("iframe", "src")}
"""What a browser loads by itself; from elsewhere, that would be a page that breaks without network."""

NOT_LOADED = {"canonical", "next", "prev", "search", "index", "author", "help"}
"""Kinds of <link> that are only named."""


class Page(HTMLParser):
    """The links, the loaded files and the anchors of one page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Sort one tag's attributes."""
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        for name in ("src", "href"):
            if (tag, name) in LOADED and found.get(name) and found.get("rel") not in NOT_LOADED:
                self.loaded.append(found[name])


def problems(folder: Path) -> list[str]:
    """One line a problem, page by page; empty where all is well."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    if not pages:
        return [f"{folder} holds no pages"]
    found = []
    for path, page in pages.items():
        name = path.relative_to(folder)
        for link in [*page.links, *page.loaded]:
            if problem := _problem(link, path, pages):
                found.append(f"{name}: {link} {problem}")
        found += [f"{name}: {link} is loaded from elsewhere" for link in page.loaded if _is_outside(link)]
    return list(dict.fromkeys(found))


def _is_outside(link: str) -> bool:
    parts = urlsplit(link)
    return bool(parts.netloc) or parts.scheme in ("http", "https")


def _problem(link: str, path: Path, pages: dict[Path, Page]) -> str:
    """What is wrong with a link inside the book; empty where nothing is, or where it leads outside."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return ""
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
    if not target.is_file():
        return "leads nowhere"
    page = pages.get(target) or pages.get(path.parent / unquote(parts.path))
    anchor = unquote(parts.fragment)
    return "names a place that is not on the page" if page and anchor and anchor not in page.anchors else ""
