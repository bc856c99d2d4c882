"""Plain text as Markdown and as HTML. `Code` between backticks stays code in both."""

import html
import re

SPECIAL = re.compile(r"([\\*_{}\[\]<>#|$~^])")
CODE = re.compile(r"(`[^`]+`)")
SPACE = re.compile(r"[ \t\n]+")
"""Not the space at which no line breaks."""

ALIGNED = re.compile(r"\S {2,}\S|^ +\S")
"""A line that is set in columns, or indented."""


def markdown(text: str) -> str:
    """Text in which Markdown sees nothing but what is between backticks."""
    parts = CODE.split(SPACE.sub(" ", text.strip()))
    return "".join(part if number % 2 else SPECIAL.sub(r"\\\1", part) for number, part in enumerate(parts))


def paragraphs(text: str) -> list[tuple[list[str], bool]]:
    """(lines, whether they are set in columns) of each paragraph of a docstring."""
    found = (part.splitlines() for part in re.split(r"\n\s*\n", text.strip("\n")))
    return [(lines, any(ALIGNED.search(line) for line in lines)) for lines in found]


def prose(text: str) -> str:
    """A docstring as Markdown: what is set in columns stays so."""
    parts = paragraphs(text)
    return "\n\n".join(
        "```text\n" + "\n".join(lines) + "\n```" if aligned else markdown(" ".join(lines)) for lines, aligned in parts
    )


def inline(text: str) -> str:
    """Text as HTML without tags, code between backticks aside."""
    return CODE.sub(
        lambda found: f"<code>{found[1][1:-1]}</code>", html.escape(SPACE.sub(" ", text.strip()), quote=False)
    )


def table(head: list[str], rows: list[list[str]], name: str = "", attributes: list[str] | None = None) -> str:
    """An HTML table in a box that scrolls; cells are HTML already, and no line is empty (it would end the block).

    attributes  of each column's heading, such as `data-filter`
    """
    attributes = attributes or [""] * len(head)
    headings = "".join(f"<th {more}>{inline(cell)}</th>" for cell, more in zip(head, attributes, strict=True))
    lines = [
        "<tr>" + "".join(cell if cell[:3] == "<td" else f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows
    ]
    identity = f' id="{name}"' if name else ""
    return "\n".join(
        [
            '<div class="table-wrapper">',
            f'<table class="docutils"{identity}>',
            f"<thead><tr>{headings}</tr></thead>",
            "<tbody>",
            *lines,
            "</tbody></table></div>",
        ]
    )


def mark(word: str | None) -> str:
    """A status or verdict as a coloured mark; a dash where there is none."""
    return f'<span class="mark mark-{word.replace(" ", "-")}">{word.replace(" ", "&nbsp;")}</span>' if word else "–"


def details(title: str, content: str) -> str:
    """Markdown that is folded away under a title."""
    return f"<details><summary>{inline(title)}</summary>\n\n{content}\n\n</details>"


def python(source: str) -> str:
    """A block of Python code."""
    return f"```python\n{source.rstrip()}\n```"
