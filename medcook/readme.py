"""The README's tables, filled from chapters, measurements and evidence: no number in it is typed by hand."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import yaml

from medcook import papers, paths
from medcook.errors import MedcookError
from medcook.evidence import load_summary
from medcook.notebooks.chapters import all_chapters
from medcook.recipes import recipe_modules
from medcook.records import Summary
from medcook.teaching import with_interval

README = paths.ROOT / "README.md"
MEASURED = paths.ROOT / "benchmarks" / "results.json"
CITATION = paths.ROOT / "CITATION.cff"
BINDER, COLAB = "https://mybinder.org/v2/gh", "https://colab.research.google.com/github"
BADGES = {
    BINDER: "https://mybinder.org/badge_logo.svg",
    COLAB: "https://colab.research.google.com/assets/colab-badge.svg",
}


def filled(text: str) -> str:
    """The README's text with its marked tables made anew."""
    for name, table in {"chapters": chapters_table(), "results": results_table()}.items():
        pattern = re.compile(rf"(<!-- {name}:.*?-->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise MedcookError(
                f"README.md has no place marked {name!r}.", f"It needs <!-- {name}: ... --> and <!-- /{name} -->."
            )
        text = pattern.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)
    return text


def chapters_table() -> str:
    """One line a chapter: title, what `quick` took where the benchmarks were made, and badges that open it."""
    results = json.loads(MEASURED.read_text(encoding="utf-8"))["chapters"] if MEASURED.exists() else []
    measured = {result["chapter"]: result for result in results if result["profile"] == "quick"}
    home = repository()
    lines = ["| chapter | `quick`: minutes | peak MB |", "|---|---|---|"]
    if home:
        lines = [f"{line}{more}" for line, more in zip(lines, (" open |", "---|"), strict=True)]
    for chapter in all_chapters():
        title = re.search(r"^# # (.+)$", chapter.source.read_text(encoding="utf-8"), re.MULTILINE)[1]
        took = measured.get(chapter.name, {})
        minutes, peak = (f"{took['minutes']:.1f}", f"{took['peak_mb']:.0f}") if took else ("–", "–")
        opened = f" {badges(home, f'notebooks/{chapter.pair.name}')} |" if home else ""
        lines.append(f"| [{title}](notebooks/{chapter.pair.name}) | {minutes} | {peak} |{opened}")
    if home:
        lines += ["", f"In Colab, run `%pip install git+https://github.com/{home}` in a cell of its own first."]
    return "\n".join(lines)


def repository() -> str | None:
    """owner/name on GitHub, from `repository-code` of CITATION.cff; None where that names none."""
    address = yaml.safe_load(CITATION.read_text(encoding="utf-8")).get("repository-code", "")
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", address)
    return found and found[1]


def badges(home: str, notebook: str) -> str:
    """Markdown of the badges that open a notebook of a repository on Binder and in Colab."""
    where = {BINDER: f"{BINDER}/{home}/HEAD?labpath={notebook}", COLAB: f"{COLAB}/{home}/blob/HEAD/{notebook}"}
    names = {BINDER: "Binder", COLAB: "Colab"}
    return " ".join(f"[![{names[site]}]({BADGES[site]})]({address})" for site, address in where.items())


def results_table() -> str:
    """The state of the ledger, how claims fared, and one line for every claim with evidence at `full` or above."""
    entries = papers.overview(check=False)
    summaries = [summary for paper in recipe_modules() if (summary := load_summary(paper, "full"))]
    judged = [summary for summary in summaries if summary.verdict != "not judged"]
    lines = [
        f"**{len(entries)} papers: {counted(entries)}.** {len(judged)} claims were tested, the book's own among "
        f"them: {fared(judged)}. A verdict is about these data and these minutes of training, not about the paper.",
        "",
        "| claim | measured | n | verdict |",
        "|---|---|---|---|",
    ]
    for summary in summaries:
        if part := summary.comparison:
            effect = with_interval(part.effect, part.low, part.high, sign=True)
            measured = f"{summary.metric} of {part.a} − {part.b}: {effect}"
            count = f"{part.n_patients} patients, {part.n_replicates} runs"
        else:
            name, arm = next(iter(summary.arms.items()))
            measured = f"{summary.metric} of {name}: {with_interval(arm.mean, arm.low, arm.high)}"
            count = f"{arm.patients} patients, {len(summary.seeds)} runs"
        lines.append(f"| {summary.claim} | {measured} | {count} | {summary.verdict} |")
    return "\n".join(lines)


def counted(entries: Sequence[Mapping]) -> str:
    """How many papers of the ledger are in which state; states that no paper is in are left out."""
    states = Counter(entry["status"] for entry in entries)
    names = {"works": "work", "partial": "in part", "missing": "to come"}
    return ", ".join(f"{states[state]} {name}" for state, name in names.items() if states[state])


def fared(summaries: Sequence[Summary]) -> str:
    """How often each verdict was given, the most frequent first."""
    return ", ".join(f"{count} {verdict}" for verdict, count in Counter(one.verdict for one in summaries).most_common())


def write() -> None:
    """Fill README.md in place."""
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
