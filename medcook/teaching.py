"""What a chapter shows besides its own code: the very source of a mechanism, tables of evidence, dataset cards."""

import html
import inspect
import textwrap

import pandas as pd
import yaml
from IPython.display import Code, display
from nbformat import NotebookNode

from medcook.data.manifests import Manifest, load_manifest
from medcook.ensemble import load_test_reading
from medcook.errors import MedcookError
from medcook.evidence import evidence_frame, load_summary
from medcook.papers import load_ledger
from medcook.paths import PAPERS
from medcook.records import Comparison, Summary

UNBROKEN = """<style>
.shown-code pre {white-space: pre !important; word-break: normal !important; overflow-x: auto}
</style>"""
"""Long lines of code scroll: JupyterLab breaks them inside words."""

NO_BREAK = "\u00a0"
"""A space at which no line breaks, so that an interval stays on its line."""


def show_code(*objects) -> None:
    """Display the source of functions and classes as it stands in the package: not a copy."""
    source = "\n\n".join(textwrap.dedent(inspect.getsource(thing)).rstrip() for thing in objects)
    page = Code(source, language="python")._repr_html_()
    display({"text/html": f'<div class="shown-code">{page}</div>{UNBROKEN}', "text/plain": source}, raw=True)


def with_interval(value: float | None, low: float | None, high: float | None, sign: bool = False) -> str:
    """`0.912 [0.901, 0.922]`, without a place to break; an unknown interval is left out."""
    if value is None:
        return "–"
    plus = "+" if sign else ""
    text = f"{value:{plus}.3f}"
    whole = text if low is None else f"{text} [{low:{plus}.3f}, {high:{plus}.3f}]"
    return whole.replace(" ", NO_BREAK)


def evidence_table(paper: str, profile: str = "full") -> pd.DataFrame:
    """One row an arm of the committed evidence: mean with interval, n, cost; of segmentations also HD95 and misses."""
    summary = need_summary(paper, profile)
    cases = evidence_frame(paper, profile)
    segmented = "hd95" in cases
    rows = [
        {
            "arm": name,
            f"{summary.metric.replace('_', ' ')} [95% interval]": with_interval(arm.mean, arm.low, arm.high),
            **(_segmentation(cases[cases["arm"] == name], arm) if segmented else {}),
            "patients": arm.patients,
            "steps": int(arm.cost["steps"]),
            f"seconds on {arm.cost['threads']:.0f} core": round(arm.cost["seconds"]),
        }
        for name, arm in summary.arms.items()
    ]
    return pd.DataFrame(rows).set_index("arm")


def _segmentation(cases: pd.DataFrame, arm) -> dict:
    """Columns of an arm that was scored on label maps; a miss counts in HD95 with the image diagonal."""
    return {
        "val-selected": "–" if arm.selected is None else f"{arm.selected:.3f}",
        **{structure: f"{value:.3f}" for structure, value in arm.structures.items()},
        f"HD95, {cases['unit'].iloc[0]}": f"{cases['hd95'].mean():.1f}",
        "missed": f"{arm.missed} of {arm.rows}".replace(" ", NO_BREAK),
    }


def show_evidence(paper: str, table: bool = False) -> None:
    """Display a paper's evidence at `full`: its figure, if asked for its arms, and the verdict; or how to make it."""
    from medcook.figures import evidence_figure

    if (summary := load_summary(paper, "full")) is None:
        print(f"{paper}: not measured yet. Make it: medcook reproduce {paper} --profile full")
        return
    display(evidence_figure(summary))
    if table:
        display(evidence_table(paper))
    display(verdict_table(paper))


def measured(chapter: str) -> list[str]:
    """The papers of a chapter that have evidence at `full`, in the ledger's order."""
    return [row.id for row in load_ledger() if row.chapter == chapter and load_summary(row.id, "full")]


def verdict_table(*papers: str, profile: str = "full") -> pd.DataFrame:
    """One row a claim: what is compared, the measured difference with interval and n, and the verdict by rule."""
    rows = [row for paper in papers for row in _claims(need_summary(paper, profile))]
    return pd.DataFrame(rows).set_index("claim")


def _claims(summary: Summary) -> list[dict]:
    compared = [part for part in (summary.comparison, summary.ablation) if part]
    if not compared:
        return [{"claim": summary.claim, "measured": _means(summary), "verdict": summary.verdict}]
    rows = [
        {"claim": summary.claim if part is compared[0] else f"(also) {part.a} against {part.b}", **_measured(part)}
        for part in compared
    ]
    return [{**row, "verdict": summary.verdict if number == 0 else ""} for number, row in enumerate(rows)]


def _measured(part: Comparison) -> dict:
    effect = with_interval(part.effect, part.low, part.high, sign=True)
    return {
        "measured": f"{part.a} − {part.b}: {effect}",
        "n": f"{part.n_patients}{NO_BREAK}patients, {part.n_replicates}{NO_BREAK}runs",
    }


def _means(summary: Summary) -> str:
    return "; ".join(f"{name} {with_interval(arm.mean, arm.low, arm.high)}" for name, arm in summary.arms.items())


def outdated(chapter: str, notebook: NotebookNode) -> list[str]:
    """Papers of a chapter whose differences, as the evidence has them now, are not in the tables of its notebook."""
    outputs = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = html.unescape(" ".join(output.get("text/html", "") for output in outputs))
    return [paper for paper in measured(chapter) if any(text not in shown for text in verdict_table(paper)["measured"])]


def published_table(*papers: str) -> pd.DataFrame:
    """Our five-fold figure beside each published one: same metric, different setting, so never a verdict."""
    rows = []
    for paper in papers:
        summary = need_summary(paper)
        name, arm = next(iter(summary.arms.items()))
        rows.append(
            {"data": summary.dataset, "what": f"here: {name}", "Dice": with_interval(arm.mean, arm.low, arm.high)}
        )
        rows += [
            {"data": summary.dataset, "what": what, "Dice": f"{value:.3f}"} for what, value in summary.published.items()
        ]
    return pd.DataFrame(rows).set_index("data")


def literature(setting: str) -> pd.DataFrame:
    """Published figures of a setting (papers/published.yaml), each with where it was checked."""
    table = yaml.safe_load((PAPERS / "published.yaml").read_text(encoding="utf-8"))
    if setting not in table:
        raise MedcookError(f"There are no published figures of {setting!r}.", f"There are: {', '.join(table)}.")
    rows = [
        {"method": row["method"]}
        | {f"Dice, {count} labelled": f"{value:.1f}" for count, value in row["dice"].items()}
        | {"checked in": row["source"]}
        for row in table[setting]
    ]
    return pd.DataFrame(rows).set_index("method")


def test_table(*papers: str, profile: str = "full") -> pd.DataFrame:
    """The test set, read once for each finished recipe: the vote of its runs, reported whatever it says."""
    rows = []
    for paper in papers:
        if reading := load_test_reading(paper, profile):
            rows.append(
                {
                    "data": reading.dataset,
                    "test patients": reading.patients,
                    "vote of all runs": with_interval(reading.mean, reading.low, reading.high),
                    "single runs": f"{min(reading.single):.3f} to {max(reading.single):.3f}",
                    "by structure": ", ".join(f"{name} {value:.3f}" for name, value in reading.structures.items()),
                    "missed": reading.missed,
                    "read on": reading.date,
                }
            )
    return pd.DataFrame(rows).fillna("").set_index("data")


def need_summary(paper: str, profile: str = "full") -> Summary:
    """The committed summary of a paper; MedcookError saying how to make it where there is none."""
    if summary := load_summary(paper, profile):
        return summary
    raise MedcookError(
        f"There is no {profile} evidence for {paper}.", f"Run: medcook reproduce {paper} --profile {profile}"
    )


def chapter_papers(chapter: str) -> pd.DataFrame:
    """Every paper of a chapter: claim, status, effect with interval, verdict."""
    from medcook.papers import overview

    rows = [row for row in load_ledger() if row.chapter == chapter]
    return (
        pd.DataFrame(overview(rows, check=False))[["id", "title", "kind", "status", "verdict"]]
        .fillna("–")
        .set_index("id")
    )


def dataset_card(manifest: Manifest | str) -> pd.DataFrame:
    """What a reader must know of a data set, from its manifest."""
    manifest = load_manifest(manifest) if isinstance(manifest, str) else manifest
    fields = {
        "title": manifest.title,
        "modality": f"{manifest.modality}, {manifest.dimensions}D",
        "structures": ", ".join(f"{value} {name}" for value, name in manifest.structures.items()),
        "patients, cases": f"{manifest.facts.patients}, {manifest.facts.cases}",
        "licence": manifest.licence,
        "terms": manifest.terms,
        "citation": manifest.citation,
        "source": manifest.source,
        "access": manifest.access
        + (f"; a third-party copy: {manifest.third_party_copy}" if manifest.third_party_copy else ""),
    }
    return pd.DataFrame({manifest.name: fields})
