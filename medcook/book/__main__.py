"""`python -m medcook.book sources FOLDER` writes what Sphinx reads; `... check FOLDER` checks what it built."""

from pathlib import Path
from typing import Annotated

import typer

from medcook.errors import MedcookError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Folder = Annotated[Path, typer.Argument(metavar="FOLDER")]


@app.command()
def sources(folder: Folder) -> None:
    """Write the sources of the book."""
    from medcook.book.sources import write_sources

    typer.echo(f"{write_sources(folder)} pages in {folder}")


@app.command()
def check(folder: Folder) -> None:
    """Check the built book."""
    from medcook.book.checks import problems

    if found := problems(folder):
        typer.echo("\n".join(found), err=True)
        raise typer.Exit(1)
    typer.echo(f"{len(list(folder.rglob('*.html')))} pages: every link and image is there.")


try:
    app(prog_name="python -m medcook.book")
except MedcookError as error:
    raise SystemExit(f"medcook: {error}") from error
