"""The reference: one page a module or package, written by Sphinx from the docstrings."""

import ast
import re
from pathlib import Path

from medcook.book.markup import paragraphs
from medcook.paths import ROOT

APART = ("cli", "book", "exercises", "__main__")
"""Commands have their help, exercises their chapters."""


def modules(package: Path = ROOT / "medcook") -> dict[str, str]:
    """{module: first line of its docstring} of everything public; recipes have pages of their own."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[0] in APART or (parts[0] == "recipes" and len(parts) == 3 and parts[-1] != "__init__"):
            continue
        names = [part for part in parts if part != "__init__"]
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if docstring and not any(name.startswith("_") for name in names):
            found[".".join([package.name, *names])] = docstring.splitlines()[0]
    return found


def pages(found: dict[str, str]) -> dict[str, list[str]]:
    """{page: its modules}: one page for each module or package directly below the top."""
    grouped: dict[str, list[str]] = {}
    for module in found:
        grouped.setdefault(".".join(module.split(".")[:2]), []).append(module)
    return grouped


def page(name: str, members: list[str]) -> str:
    """The page of a module, or of a package with its modules."""
    parts = [f"# {name}"]
    for module in members:
        parts += [f"## {module}"] if module != name else []
        directive = f".. automodule:: {module}\n   :members:\n   :member-order: bysource\n   :ignore-module-all:"
        parts.append(f"```{{eval-rst}}\n{directive}\n```")
    return "\n\n".join(parts) + "\n"


def as_rest(docstring: list[str]) -> list[str]:
    """Our docstrings, plain text, as reStructuredText: a paragraph in columns stays as it is set."""
    lines: list[str] = []
    for rows, aligned in paragraphs("\n".join(docstring)):
        if aligned:
            lines += ["::", "", *(f"   {row}" for row in rows), ""]
        else:
            lines += [*map(_escaped, rows), ""]
    return lines


def _escaped(line: str) -> str:
    """Backticks make code; nothing else is markup."""
    parts = re.split(r"(`[^`]+`)", line)
    return "".join(
        f"`{part}`" if number % 2 else re.sub(r"([*|_\\`])", r"\\\1", part) for number, part in enumerate(parts)
    )
