"""`medcook reproduce`: the command that makes the ledger's numbers."""

from typing import Annotated, Literal

import typer

from medcook import evidence
from medcook.cli.papers import interval_text, print_summary, unknown, wide_console
from medcook.errors import MedcookError
from medcook.papers import find_row
from medcook.profiles import resolve_profile

Paper = Annotated[
    str | None, typer.Argument(metavar="ID", help="A paper of the ledger, or one of the book's own claims.")
]
Minutes = Annotated[
    float | None, typer.Option(min=0, help="Pause after so long, with exit status 75; the same command goes on.")
]


def reproduce(
    paper: Paper = None,
    profile: Annotated[str | None, typer.Option(help="quick, full or paper.")] = None,
    replicates: Annotated[int | None, typer.Option(min=1, help="Replicates; default: as the recipe says.")] = None,
    minutes: Minutes = None,
    test: Annotated[bool, typer.Option("--test", help="Then the vote of all runs reads the test set, once.")] = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Start `paper` also on a machine without a GPU.")] = False,
    devices: Annotated[int, typer.Option(min=1, help="GPUs, or processes of a CPU, that share every batch.")] = 1,
    arm: Annotated[str | None, typer.Option(help="Only this arm, and no summary; see --replicate.")] = None,
    replicate: Annotated[int, typer.Option(min=0, help="Which replicate of --arm.")] = 0,
    everything: Annotated[bool, typer.Option("--all", help="Every recipe that has this profile.")] = False,
    engine: Annotated[Literal["loop", "snakemake"], typer.Option(help="How --all is run.")] = "loop",
    cores: Annotated[int, typer.Option(min=1, help="Of Snakemake: runs at a time on this machine.")] = 2,
    cluster: Annotated[str, typer.Option(help="Of Snakemake: a folder of workflow/profiles.")] = "local",
) -> None:
    """Run a paper's arms, print table, verdict and environment. Interrupted, it goes on where it stopped."""
    profile = resolve_profile(profile)
    if everything == (paper is not None):
        raise MedcookError("Name one paper, or take --all.", "For example: medcook reproduce bcp --profile full.")
    if engine == "snakemake":
        by_snakemake(everything, profile, replicates, cores, cluster, devices, anyway)
        return
    for recipe in chosen(paper, profile):
        if profile == "paper" and not anyway:
            from medcook.estimates import refuse_without_gpu

            refuse_without_gpu(recipe, profile, replicates)
        if arm is not None:
            evidence.run_one(recipe, profile, arm, replicate, minutes, devices)
            continue
        print_summary(wide_console(), evidence.reproduce(recipe, profile, replicates, minutes=minutes, devices=devices))
        if test:
            print_test(recipe, profile)


def chosen(paper: str | None, profile: str) -> list:
    """The recipe of a paper, or (None) all that have this profile; MedcookError where there is none."""
    from medcook.recipes import all_recipes, find_recipe

    if paper is None:
        return [recipe for recipe in all_recipes().values() if profile in recipe.scales]
    if recipe := find_recipe(paper):
        return [recipe]
    if find_row(paper):
        raise MedcookError(f"{paper} has no recipe yet.", f"Begin it: medcook papers new {paper}.")
    raise unknown(paper)


def by_snakemake(
    everything: bool, profile: str, replicates: int | None, cores: int, cluster: str, devices: int, anyway: bool
) -> None:
    """Plan what is still to be run and hand it to Snakemake."""
    from medcook import workflow
    from medcook.recipes import all_recipes

    if not everything:
        raise MedcookError("Snakemake runs all recipes.", "medcook reproduce --all --engine snakemake")
    options = " ".join([f"--devices {devices}"] * (devices > 1) + ["--anyway"] * anyway)
    plan = workflow.make_plan(all_recipes(), profile, replicates, options)
    workflow.start(plan, cores, cluster)


def print_test(recipe, profile: str) -> None:
    """Read the test set with the vote of all runs, once, and print what it says."""
    from medcook.ensemble import read_test_once

    reading = read_test_once(recipe, profile)
    where = f"{reading.patients} test patients, {reading.missed} missed, read on {reading.date}"
    interval = interval_text(reading.low, reading.high)
    wide_console().print(
        f"test: {reading.metric} of the vote {reading.mean:.4f}, {interval} ({where})", highlight=False
    )
