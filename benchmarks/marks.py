"""Where benchmarks put their tables: between two marks of benchmarks/README.md."""

from pathlib import Path

from medcook.errors import MedcookError
from medcook.runs import write_atomically

README = Path(__file__).parent / "README.md"


def table(header: str, rows: list[list]) -> str:
    """A Markdown table; the header's columns are separated by |."""
    columns = [part.strip() for part in header.split("|")]
    lines = [columns, ["---"] * len(columns), *[[str(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def between_marks(text: str, new: str, begin: str, end: str) -> str:
    """The text with `new` in place of what stands between the marks."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        hint = f"Put these two lines where the table should stand:\n{begin}\n{end}"
        raise MedcookError("benchmarks/README.md lacks the marks of the table.", hint)
    return f"{text.split(begin)[0]}{begin}\n{new}{end}{text.split(end)[1]}"


def put(new: str, begin: str, end: str, path: Path = README) -> None:
    """Write `new` between the marks of the README."""
    write_atomically(path, between_marks(path.read_text(encoding="utf-8"), new, begin, end))
