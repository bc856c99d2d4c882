"""The cell tagged `parameters`: what a notebook can be told from outside."""

import ast
from typing import Any

from nbformat import NotebookNode

from medcook.errors import MedcookError


def declared(notebook: NotebookNode, name: str) -> dict[str, Any]:
    """{NAME: default} of the parameters cell; MedcookError unless it holds plain NAME = literal lines only."""
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise MedcookError(f"{name} has {len(cells)} cells tagged `parameters`.", "Tag exactly its first code cell.")
    found = {}
    try:
        for statement in ast.parse(cells[0].source).body:
            key, value = _assignment(statement)
            found[key] = ast.literal_eval(value)
    except (ValueError, SyntaxError) as error:
        raise MedcookError(
            f"{name}: the parameters cell holds more than NAME = literal.", "Move everything else to the next cell."
        ) from error
    return found


def _assignment(statement: ast.stmt) -> tuple[str, ast.expr]:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id, statement.value
    raise ValueError("not an assignment")


def accept(notebook: NotebookNode, name: str, given: dict[str, Any]) -> None:
    """MedcookError when `given` holds a parameter that the notebook does not declare."""
    known = declared(notebook, name)
    for key in given:
        if key not in known:
            raise MedcookError(f"{name} has no parameter {key!r}.", f"It has {', '.join(known) or 'none'}.")


def parse(texts: list[str]) -> dict[str, Any]:
    """{NAME: value} from `NAME=VALUE` on the command line; a value that is no Python literal is a string."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise MedcookError(f"{text!r} is not a parameter.", "Write NAME=VALUE, for example SEED=1.")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found
