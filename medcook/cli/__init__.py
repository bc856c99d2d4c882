"""The `medcook` command.

A sub-command's module is imported when the sub-command is called, so that nothing waits for what it does not use.
Exit status: 0 all well, 1 a problem explained on one line, 2 wrong usage, 75 paused (the same command goes on),
130 interrupted.
"""

import sys
from importlib import import_module

import typer
from typer.core import TyperGroup

from medcook import __version__
from medcook.errors import MedcookError

COMMANDS = {
    "doctor": "medcook.cli.cook:doctor",
    "data": "medcook.cli.data:app",
    "cook": "medcook.cli.cook:cook",
    "work": "medcook.cli.cook:work",
    "reproduce": "medcook.cli.reproduce:reproduce",
    "figures": "medcook.cli.cook:figures",
    "papers": "medcook.cli.papers:app",
    "publish": "medcook.cli.cook:publish",
    "check": "medcook.cli.cook:check",
    "readme": "medcook.cli.cook:readme",
}
"""Sub-command: where its function, or the Typer application with its own sub-commands, is found."""


class LazyGroup(TyperGroup):
    """A group that imports a sub-command on use and reports problems as one sentence."""

    def list_commands(self, ctx) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx, cmd_name: str):
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        found = getattr(import_module(module), attribute)
        if not isinstance(found, typer.Typer):
            function, found = found, typer.Typer(add_completion=False)
            found.command(cmd_name)(function)
        command = typer.main.get_command(found)
        command.name = cmd_name
        return command

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except MedcookError as error:
            typer.echo(f"medcook: {error}", err=True)
            raise typer.Exit(error.status) from error
        except KeyboardInterrupt as error:
            typer.echo("\nmedcook: interrupted; run the same command to resume.", err=True)
            raise typer.Exit(130) from error


app = typer.Typer(name="medcook", cls=LazyGroup, add_completion=False, pretty_exceptions_enable=False)


@app.callback(no_args_is_help=True, invoke_without_command=True)
def medcook(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    """A cookbook for medical image segmentation in which every number can be made again."""
    if version:
        typer.echo(__version__)
        raise typer.Exit()


def main() -> None:
    """Entry point of the console script and of `python -m medcook`."""
    app(prog_name="medcook" if not sys.argv[0].endswith("__main__.py") else "python -m medcook")
