"""`medcook papers`: the ledger."""

import difflib
import json
from collections import Counter
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medcook import evidence, paths
from medcook.errors import MedcookError
from medcook.papers import (
    Facts,
    find_row,
    gather,
    load_ledger,
    overview,
    own_claims,
    recompute,
    requirements,
    stale_state,
    status,
)
from medcook.records import Comparison, Summary

WIDTH = 140
STYLES = {"works": "green", "partial": "yellow", "missing": "dim"}

app = typer.Typer(add_completion=False, help="The ledger of papers: claims, verdicts, evidence.")

NoCheck = Annotated[bool, typer.Option("--no-check", help="Do not recompute fingerprints; freshness stays unknown.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object for each paper.")]


@app.callback(invoke_without_command=True)
def papers(ctx: typer.Context, as_json: AsJson = False, no_check: NoCheck = False) -> None:
    """List all papers by chapter with their status, verdict, effect and freshness."""
    if ctx.invoked_subcommand:
        return
    if not no_check:
        recompute([row.id for row in load_ledger() if evidence.load_summary(row.id)])
    entries = overview(check=not no_check)
    if as_json:
        typer.echo(json.dumps(entries, indent=1, allow_nan=False))
        return
    console = wide_console()
    console.print(ledger_table(entries))
    console.print(totals(entries))
    if claims := own_claims(check=not no_check):
        console.print(claims_table(claims))


@app.command()
def show(paper: Annotated[str, typer.Argument(metavar="ID")], no_check: NoCheck = False) -> None:
    """Everything about one paper or one of the book's own claims."""
    from medcook.recipes import find_recipe

    console, row = wide_console(), find_row(paper)
    if row:
        facts = gather(row, check=not no_check)
        console.print(f"[bold]{escape(row.title)}[/]\n{row.id} | {row.kind} | chapter {row.chapter}", highlight=False)
        console.print(f"Idea: {escape(row.idea)}\nClaim: {escape(row.claim)}")
        console.print(f"Status: {status(row, facts)}")
        for name, met in requirements(row, facts).items():
            console.print(f"  {'yes' if met else 'no '}  {name}", highlight=False)
    else:
        recipe, summary = find_recipe(paper), evidence.load_summary(paper)
        if recipe is None:
            raise unknown(paper)
        facts = Facts(recipe, summary=summary, stale=stale_state(recipe, summary, not no_check))
        console.print(f"[bold]{escape(recipe.title)}[/]\nClaim of the book's own: {escape(recipe.claim)}")
    if facts.summary is None:
        console.print("No evidence yet." + (f" Make it: medcook reproduce {paper}" if facts.recipe else ""))
        return
    print_summary(console, facts.summary)
    freshness = "not checked" if facts.stale is None else f"stale: {facts.stale}" if facts.stale else "fresh"
    console.print(f"Evidence of {facts.summary.date}: {freshness}", highlight=False)


@app.command()
def new(paper: Annotated[str, typer.Argument(metavar="ID", help="A paper of the ledger without a recipe.")]) -> None:
    """Begin a recipe: write it and its test as stubs, and say what comes next."""
    from medcook.stubs import next_steps, write_stubs

    row = find_row(paper)
    if row is None:
        raise unknown(paper)
    for path in write_stubs(row):
        typer.echo(f"written: {path.relative_to(paths.ROOT)}")
    typer.echo(next_steps(row))


def unknown(paper: str) -> MedcookError:
    """The error for an id that nobody knows, with the nearest known ones."""
    from medcook.recipes import recipe_modules

    known = dict.fromkeys([row.id for row in load_ledger()] + list(recipe_modules()))
    near = difflib.get_close_matches(paper, known)
    hint = f"Did you mean {' or '.join(near)}?" if near else "`medcook papers` lists all."
    return MedcookError(f"There is no paper {paper!r}.", hint)


def print_summary(console: Console, summary: Summary) -> None:
    """Arms, comparisons, verdict, published figures and environment."""
    console.print(arms_table(summary))
    for name, compared in (("compared", summary.comparison), ("ablation", summary.ablation)):
        if compared:
            console.print(f"{name}: {escape(sentence(compared, summary.metric))}", highlight=False)
    if summary.verdict == "inconclusive here" and summary.comparison.smallest_effect is not None:
        seen = summary.comparison.smallest_effect
        console.print(f"smallest effect that this run could have seen: {seen:.4f}", highlight=False)
    console.print(f"verdict at {summary.profile}: [bold]{summary.verdict}[/] ({summary.expect})", highlight=False)
    for setting, value in summary.published.items():
        source = f" ({summary.source})" if summary.source else ""
        console.print(escape(f"published: {setting}: {value}{source}"), highlight=False)
    hashes = f"data {summary.dataset_hash}, split {summary.split_hash}, test reads {summary.test_reads}"
    console.print(escape(f"{summary.dataset} ({summary.data}), {hashes}"), highlight=False)
    provenance = ", ".join(f"{name} {value}" for name, value in summary.environment.items() if value is not None)
    console.print(escape(provenance), highlight=False)


def arms_table(summary: Summary) -> Table:
    """One line an arm: mean with interval, misses, cost."""
    unit = f" ({summary.unit})" if summary.unit else ""
    table = Table(title=escape(f"{summary.paper}: {summary.claim}"), title_justify="left")
    columns = ("arm", f"{summary.metric}{unit}", "95% interval", "val-selected", "missed", "of", "patients", "s a run")
    for name in (*columns, "peak MB"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for name, arm in summary.arms.items():
        counts = (str(arm.missed), str(arm.rows), str(arm.patients))
        costs = [_number(arm.cost.get(key), ".0f") for key in ("seconds", "peak_mb")]
        means = (_number(arm.mean), interval_text(arm.low, arm.high), _number(arm.selected))
        table.add_row(escape(name), *means, *counts, *costs)
    return table


def sentence(compared: Comparison, metric: str) -> str:
    """A comparison in one line."""
    signs = " ".join(f"{value:+.4f}" for value in compared.per_replicate)
    p = "" if compared.p is None else f", p {compared.p:.3g}"
    where = f"{compared.n_patients} patients, {compared.n_replicates} replicates: {signs}"
    interval = interval_text(compared.low, compared.high, "+.4f")
    return f"{compared.a} - {compared.b}: {metric} {compared.effect:+.4f} {interval}{p} ({where})"


def ledger_table(entries: list[dict]) -> Table:
    """All papers, chapter by chapter."""
    table = Table(title=f"{len(entries)} papers", title_justify="left")
    for name in ("chapter", "id", "kind", "status", "verdict", "effect [95% interval]", "data", "evidence"):
        table.add_column(name, no_wrap=name in ("chapter", "id", "kind"))
    before = None
    for entry in sorted(entries, key=lambda entry: entry["chapter"]):
        chapter = entry["chapter"]
        if before not in (None, chapter):
            table.add_section()
        state = f"[{STYLES[entry['status']]}]{entry['status']}[/]"
        table.add_row(chapter if chapter != before else "", entry["id"], entry["kind"], state, *_findings(entry))
        before = chapter
    return table


def claims_table(entries: list[dict]) -> Table:
    """The book's own claims."""
    table = Table(title="The book's own claims", title_justify="left")
    for name in ("chapter", "id", "measured", "verdict", "effect [95% interval]", "data", "evidence"):
        table.add_column(name)
    for entry in entries:
        arms = ", ".join(f"{name} {_number(mean)}" for name, mean in entry["arms"].items())
        table.add_row(entry["chapter"], entry["id"], escape(arms) or "-", *_findings(entry))
    return table


def totals(entries: list[dict]) -> str:
    """Counts by status, works on simulated data apart, and by verdict."""
    states, verdicts = Counter(e["status"] for e in entries), Counter(e["verdict"] for e in entries if e["verdict"])
    simulated = sum(e["status"] == "works" and e["data"] not in (None, "real") for e in entries)
    parts = [f"{states[name]} {name}" for name in STYLES]
    parts[0] += f" ({simulated} of them on simulated data)" if simulated else ""
    parts += [f"{count} {name}" for name, count in verdicts.most_common()]
    return f"{len(entries)} papers: " + ", ".join(parts)


def _findings(entry: dict) -> tuple[str, str, str, str]:
    """Verdict, effect with interval, data and freshness of an entry, as cells."""
    if entry["profile"] is None:
        return "-", "-", "-", "-"
    freshness = {True: "stale", False: "fresh", None: "not checked"}[entry["stale"]]
    low, high = entry["interval"] or (None, None)
    effect = "-" if entry["effect"] is None else f"{entry['effect']:+.4f} [{interval_text(low, high)}]"
    data = f"{entry['dataset']}, {entry['data']}"
    made = f"{entry['profile']}, {entry['seeds']} {'replicate' if entry['seeds'] == 1 else 'replicates'}, {freshness}"
    return entry["verdict"], escape(effect), escape(data), made


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def interval_text(low: float | None, high: float | None, form: str = ".4f") -> str:
    return "no interval" if low is None else f"{low:{form}} to {high:{form}}"


def wide_console() -> Console:
    """A console at least as wide as the tables, so that nothing is cut where the output is piped."""
    console = Console()
    return console if console.is_terminal and console.width >= WIDTH else Console(width=WIDTH)
