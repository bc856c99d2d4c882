"""Everything Sphinx reads, written into one folder."""

import re
import shutil
from pathlib import Path

from medcook import evidence, papers, paths, readme, recipes
from medcook.book import api
from medcook.book.chapters import title, write_chapter
from medcook.book.ledger import ledger_page
from medcook.book.markup import markdown
from medcook.book.papers import Page
from medcook.notebooks.chapters import all_chapters

DOCUMENTS = {
    "README.md": "index",
    "CONTRIBUTING.md": "contributing",
    "benchmarks/README.md": "benchmarks",
    "workflow/README.md": "workflow",
    "LICENSE-figures.md": "licences",
}
"""Documents of the repository that are pages of the book."""

ALIASES = {"benchmarks/": "benchmarks.md"}
COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)
LINK = re.compile(r"(\]\()([^)#:\s]+)(\))")

CONTENTS = """
```{{toctree}}
:hidden:
:caption: Chapters

{chapters}
```

```{{toctree}}
:hidden:
:caption: Beyond

ledger
api/index
contributing
workflow
benchmarks
licences
```
"""


def write_sources(folder: Path) -> int:
    """Write the sources into `folder`, which is emptied first; returns the number of pages."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("chapters", "papers", "api"):
        (folder / name).mkdir(parents=True)
    _write_chapters(folder)
    _write_documents(folder)
    _write_papers(folder)
    _write_api(folder)
    entries, claims = papers.overview(check=False), papers.own_claims(check=False)
    _write(folder / "ledger.md", ledger_page(entries, claims))
    return sum(path.suffix in (".md", ".ipynb") for path in folder.rglob("*"))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _write_chapters(folder: Path) -> None:
    chapters = all_chapters()
    for chapter in chapters:
        write_chapter(chapter, folder / "chapters")


def _write_documents(folder: Path) -> None:
    for name, page in DOCUMENTS.items():
        text = (paths.ROOT / name).read_text(encoding="utf-8")
        if page == "index":
            text = _with_claims_linked(readme.filled(text)) + _contents()
            for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
                _copy(paths.ROOT / picture, folder / picture)
            _copy(paths.ROOT / "CITATION.cff", folder / "CITATION.cff")
        _write(folder / f"{page}.md", relinked(COMMENT.sub("", text)))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def relinked(text: str) -> str:
    """Links between files of the repository as links between pages of the book; pictures keep their path."""

    def target(found: re.Match) -> str:
        link = found[2]
        if link.endswith(".ipynb"):
            link = f"chapters/{Path(link).name}"
        elif link in DOCUMENTS:
            link = f"{DOCUMENTS[link]}.md"
        return f"{found[1]}{ALIASES.get(link, link)}{found[3]}"

    return LINK.sub(target, text)


def _with_claims_linked(text: str) -> str:
    """Every claim of the table of results leads to its page."""
    for paper in recipes.recipe_modules():
        if summary := evidence.load_summary(paper, "full"):
            row = f"| {summary.claim} |"
            text = text.replace(row, f"| [{markdown(summary.claim)}](papers/{paper}.md) |")
    return text


def _contents() -> str:
    names = [f"{title(chapter)} <chapters/{chapter.name}>" for chapter in all_chapters()]
    return CONTENTS.format(chapters="\n".join(names))


def _write_papers(folder: Path) -> None:
    rows = {row.id: row for row in papers.load_ledger()}
    for paper in [*rows, *(set(recipes.recipe_modules()) - set(rows))]:
        page = Page(paper, rows.get(paper))
        summary = page.facts.summary
        figure = evidence.folder(paper, summary.profile) / "figure.png" if summary else None
        if there := figure is not None and figure.exists():
            _copy(figure, folder / "papers" / f"{paper}.png")
        _write(folder / "papers" / f"{paper}.md", page.markdown(there))


def _write_api(folder: Path) -> None:
    found = api.modules()
    pages = api.pages(found)
    rows = "\n".join(f"| [{name}]({name}.md) | {markdown(found[members[0]])} |" for name, members in pages.items())
    tree = "```{toctree}\n:hidden:\n\n" + "\n".join(pages) + "\n```\n"
    _write(folder / "api" / "index.md", f"# Reference\n\n| module | what it is |\n|---|---|\n{rows}\n\n{tree}")
    for name, members in pages.items():
        _write(folder / "api" / f"{name}.md", api.page(name, members))
