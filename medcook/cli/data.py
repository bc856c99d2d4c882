"""`medcook data list | fetch | verify | show`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from medcook.data import fetch as fetching
from medcook.data.datasets import Dataset, open_dataset
from medcook.data.folder import Inspection, inspect_folder
from medcook.data.manifests import load_manifest, manifest_names
from medcook.errors import MedcookError

app = typer.Typer(name="data", help="Data sets: what there is, fetching, checking, looking.", no_args_is_help=True)
console = Console()


@app.command("list")
def list_() -> None:
    """List every data set with its size, licence and whether it is on this machine."""
    name_column = Column("name", no_wrap=True)
    table = Table(name_column, "modality", "patients", "structures", "access", "here", title="Data sets")
    for name in manifest_names():
        manifest = load_manifest(name)
        structures = ", ".join(manifest.structures.values())
        patients = str(manifest.facts.patients or "")
        table.add_row(name, manifest.modality, patients, structures, manifest.access, here(open_dataset(name)))
    console.print(table)


def here(dataset: Dataset) -> str:
    """Whether the files are on this machine; counted by name and size, not verified."""
    name, mirror = dataset.manifest.name, fetching.mirror_dir()
    if dataset.manifest.access == "embedded":
        return "yes"
    roots = [fetching.data_dir(name), *([mirror / name] if mirror else [])]
    if not dataset.registry:
        return "yes" if any(root.is_dir() for root in roots) else "no"
    count = sum(any((root / path).is_file() for root in roots) for path in dataset.registry)
    return "yes" if count == len(dataset.registry) else f"{count}/{len(dataset.registry)} files"


@app.command()
def fetch(names: Annotated[list[str], typer.Argument(help="Names from `medcook data list`.")]) -> None:
    """Bring data sets onto this machine, verified; run again to resume."""
    for name in names:
        dataset = open_dataset(name)
        dataset.fetch()
        what = f"{len(dataset.registry)} files, verified" if dataset.registry else "ready"
        console.print(f"{name}: {what}.")


@app.command()
def verify(name: Annotated[str, typer.Argument(help="A name from `medcook data list`.")]) -> None:
    """Check every file's checksum, the counts, and every case of train and val against the manifest."""
    dataset = open_dataset(name)
    problems = file_problems(dataset) or [*count_problems(dataset), *case_problems(dataset)]
    for problem in problems:
        console.print(f"[red]{problem}[/red]")
    if problems:
        raise MedcookError(f"{name}: {len(problems)} problems.", f"`medcook data fetch {name}` replaces damaged files.")
    console.print(
        f"{name}: {len(dataset.index())} cases of {len(dataset.patients)} patients, all as the manifest says."
    )


def file_problems(dataset: Dataset) -> list[str]:
    """Files that are missing or damaged."""
    problems = []
    for path in track(dataset.registry, description="checksums", console=Console(stderr=True), transient=True):
        try:
            if fetching.local(dataset.manifest.name, path) is None:
                problems.append(f"{path}: missing or damaged")
        except MedcookError as error:
            problems.append(error.problem)
    return problems


def count_problems(dataset: Dataset) -> list[str]:
    """Counts that differ from the manifest's facts."""
    facts = dataset.manifest.facts
    counted = {"patients": (len(dataset.patients), facts.patients), "cases": (len(dataset.index()), facts.cases)}
    return [f"{found} {what}, not {said}" for what, (found, said) in counted.items() if said not in (None, found)]


def case_problems(dataset: Dataset) -> list[str]:
    """Cases of train and val that loading refuses; test files are covered by their checksums."""
    problems = []
    patients = [*dataset.split.train, *dataset.split.val]
    cases = [case for patient in patients for case in dataset.patients[patient]]
    for case in track(cases, description="cases", console=Console(stderr=True), transient=True):
        try:
            dataset.load(case)
        except MedcookError as error:
            problems.append(error.problem)
    return problems


@app.command()
def show(what: Annotated[str, typer.Argument(help="A name from `medcook data list`, or your folder.")]) -> None:
    """Show a data set's card, or inspect a folder of image/label pairs."""
    if what not in manifest_names() and Path(what.removeprefix("folder:")).is_dir():
        inspection = inspect_folder(Path(what.removeprefix("folder:")))
        print_inspection(inspection)
        if inspection.fatal:
            raise MedcookError(f"{what}: {len(inspection.fatal)} cases cannot be trained on.", "See the list above.")
    else:
        console.print(card(open_dataset(what)))


def card(dataset: Dataset) -> Table:
    """The data set card, from the manifest and the split alone: no image is read."""
    manifest, facts = dataset.manifest, dataset.manifest.facts
    table = Table("", "", title=manifest.title, show_header=False, title_justify="left")
    rows = {
        "name": manifest.name,
        "modality": f"{manifest.modality}{', simulated' if manifest.simulated else ''}",
        "classes": ", ".join(f"{value} {name}" for value, name in manifest.classes.items()),
        "patients, cases": f"{facts.patients}, {facts.cases}",
        "split": split_sizes(dataset),
        "size": f"{sum(entry.bytes for entry in dataset.registry.values()) / 1e6:.0f} MB" if dataset.registry else "",
        "licence": manifest.licence,
        "terms": manifest.terms,
        "cite": manifest.citation,
        "source": manifest.source,
        "third-party copy": manifest.third_party_copy,
        "access": manifest.access,
        "apply at": manifest.apply_at,
        "hash": dataset.hash,
        "notes": "\n".join(manifest.notes),
    }
    for key, text in rows.items():
        if text:
            table.add_row(key, text.strip())
    return table


def split_sizes(dataset: Dataset) -> str:
    """Sizes of the three parts; a set without committed split is counted only where its files are here."""
    if not dataset.manifest.splits:
        return "by the hash of the patient's name: 70% train, 15% val, 15% test"
    split = dataset.split
    return f"train {len(split.train)}, val {len(split.val)}, test {len(split.test)} patients ({split.hash})"


def print_inspection(inspection: Inspection) -> None:
    """Table of the cases, the class balance, and every problem."""
    table = Table("case", "shape", "spacing (mm)", "label values", title=str(inspection.folder))
    for case in inspection.cases:
        spacing = " x ".join(f"{size:.3g}" for size in case.spacing) if case.spacing else "unknown"
        table.add_row(case.case_id, " x ".join(map(str, case.shape)), spacing, ", ".join(map(str, case.counts)))
    console.print(table)
    for value, share in inspection.balance.items():
        console.print(f"label {value}: {share:.2%} of all voxels")
    for problem in inspection.fatal:
        console.print(f"[red]problem: {problem}[/red]", highlight=False)
    for warning in inspection.warnings:
        console.print(f"[yellow]warning: {warning}[/yellow]", highlight=False)
    if not inspection.fatal and not inspection.warnings:
        console.print("No problems found.")
