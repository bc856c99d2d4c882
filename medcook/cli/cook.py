"""Commands around the notebooks: doctor, cook, work, figures, publish, check, readme."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from medcook.errors import MedcookError
from medcook.profiles import resolve_profile

Chapters = Annotated[list[str] | None, typer.Argument(metavar="CHAPTER", help="Numbers or names; none: all.")]
Profile = Annotated[str | None, typer.Option(help="quick, full or paper; default: environment's PROFILE, then quick.")]


def doctor() -> None:
    """Say what this machine has, and what each profile will take on it."""
    from medcook.doctor import report

    table = Table(show_header=False, box=None)
    for what, finding in report().items():
        table.add_row(f"[bold]{what}[/bold]", finding)
    Console().print(table)


def cook(
    chapters: Chapters = None,
    profile: Profile = None,
    data: Annotated[Path | None, typer.Option(help="Folder with your own image and label pairs.")] = None,
    parameter: Annotated[list[str] | None, typer.Option("-p", "--parameter", metavar="NAME=VALUE")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run also what has not changed since it was last run.")
    ] = False,
) -> None:
    """Run chapters from the first cell to the last and show what they took; unchanged ones are not run again."""
    from medcook.notebooks import parameters as notebook_parameters
    from medcook.notebooks import runner
    from medcook.notebooks.chapters import find_chapters

    profile = resolve_profile(profile)
    given = notebook_parameters.parse(parameter or [])
    if data is not None:
        given["DATA"] = str(_inspected(data))
    found = find_chapters(chapters or [])
    for chapter in found:
        notebook_parameters.accept(chapter.read(), chapter.source.name, given)
    results = [runner.cook(chapter, profile, given, force=force) for chapter in found]
    _show(results, profile)
    if errors := [result.error for result in results if result.error]:
        raise MedcookError(" ".join(errors))


def _inspected(folder: Path) -> Path:
    """The folder as an absolute path, once it is known to hold pairs that can be trained on; else MedcookError."""
    from medcook.data.folder import open_folder

    open_folder(folder)
    return folder.resolve()


def _show(results: list, profile: str) -> None:
    table = Table(title=f"medcook cook, profile {profile}")
    table.add_column("chapter", no_wrap=True)
    for name in ("minutes", "peak MB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("run", no_wrap=True)
    table.add_column("figures", overflow="fold")
    for result in results:
        state = "[red]failed[/red]" if result.error else "unchanged" if result.cached else "now"
        figures = f"{len(result.figures)} in {result.notebook.with_suffix('')}" if result.figures else "none"
        table.add_row(result.chapter, f"{result.minutes:.1f}", f"{result.peak_mb:.0f}", state, figures)
    Console().print(table)


def work(
    chapter: str,
    into: Annotated[Path, typer.Option(help="Folder for your copies.")] = Path("work"),
    fresh: Annotated[str | None, typer.Option(help="Name of another copy, where one exists already.")] = None,
) -> None:
    """Copy a chapter into a folder of your own, to work in; nothing there is ever overwritten."""
    from medcook.notebooks.chapters import find_chapters, work_copy

    notebook, _ = work_copy(find_chapters([chapter])[0], into, fresh)
    typer.echo(f"{notebook}\nOpen it with: jupyter lab {notebook}")


def figures(
    check: Annotated[bool, typer.Option("--check", help="Compare with the committed images, change nothing.")] = False,
) -> None:
    """Redraw every evidence figure from the committed results."""
    from medcook import figures as evidence_figures

    if not check:
        for path in evidence_figures.redraw():
            typer.echo(path)
    elif found := evidence_figures.check():
        raise MedcookError("; ".join(found) + ".", "If the change is meant: medcook figures.")
    else:
        typer.echo("Every evidence figure is what its evidence draws.")


def publish(chapters: Chapters = None) -> None:
    """Write the committed notebooks from what `medcook cook --profile full` executed."""
    from medcook.notebooks.chapters import find_chapters
    from medcook.notebooks.publishing import publish

    for chapter in find_chapters(chapters or []):
        path = publish(chapter)
        typer.echo(f"{path} ({path.stat().st_size / 1000:.0f} kB)")


def readme() -> None:
    """Fill the README's tables from chapters, measurements and evidence."""
    from medcook.readme import write

    write()


def check(
    chapters: Chapters = None,
    update: Annotated[bool, typer.Option("--update", help="First bring the .ipynb up to date with the .py.")] = False,
) -> None:
    """Check that each notebook agrees with its source and keeps the rules of the book."""
    from medcook.notebooks import lint
    from medcook.notebooks.chapters import differences, find_chapters, generate, write_notebook
    from medcook.teaching import outdated

    found = []
    for chapter in find_chapters(chapters or []):
        if update:
            write_notebook(generate(chapter), chapter.pair)
        found += differences(chapter) + lint.problems(chapter.read(), chapter.source.name)
        if (committed := chapter.read_pair()) is not None:
            found += lint.output_problems(committed, chapter.pair.name)
            found += [
                f"{chapter.pair.name} has older tables than the evidence of {paper}: cook and publish it again"
                for paper in outdated(chapter.name, committed)
            ]
    if found:
        raise MedcookError("\n".join(found))
    typer.echo("All notebooks keep the rules.")
