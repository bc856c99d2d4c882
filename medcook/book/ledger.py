"""The ledger as a page: one table, which book/_static/ledger.js makes sortable and filterable."""

from collections import Counter

from medcook.book.markup import inline, mark, table
from medcook.teaching import with_interval

HEAD = ["chapter", "paper", "kind", "status", "verdict", "effect [95% interval]", "metric", "data", "replicates"]
ATTRIBUTES = ["data-filter", "", "data-filter", "data-filter", "data-filter", "data-number", "", "", "data-number"]
TEXT = """# The ledger

{counts} A status is given by rule, never by hand (`medcook papers show ID` says what is missing), and so is a verdict:
at `full` a claim is supported, not supported or inconclusive *here*; only the paper's own data and setting may
reproduce or contradict it. Whether evidence is still fresh, that is, whether the code still does what it did, is
recomputed by `medcook papers`. Click a heading to sort.

{table}

*Effect*: the first arm of the comparison minus the second, in the metric's units. *Own claims* are the book's own.
"""


def ledger_page(entries: list[dict], claims: list[dict]) -> str:
    """The page's Markdown; `entries` of `papers.overview`, `claims` of `papers.own_claims`."""
    states = Counter(entry["status"] for entry in entries)
    counts = (
        f"{len(entries)} papers: {states['works']} work, {states['partial']} in part, {states['missing']} to come; "
        f"and {len(claims)} claims of the book's own."
    )
    rows = [_row(entry) for entry in sorted([*entries, *claims], key=lambda entry: entry["chapter"])]
    return TEXT.format(counts=counts, table=table(HEAD, rows, "ledger", ATTRIBUTES))


def _row(entry: dict) -> list[str]:
    low, high = entry["interval"] or (None, None)
    effect = with_interval(entry["effect"], low, high, sign=True)
    number = "" if entry["effect"] is None else entry["effect"]
    return [
        inline(entry["chapter"].replace("_", " ")),
        f'<a href="papers/{entry["id"]}.html">{inline(entry["title"])}</a><br><code>{entry["id"]}</code>',
        inline(entry["kind"]),
        mark(entry.get("status")),
        mark(entry["verdict"]),
        f'<td data-value="{number}">{inline(effect)}</td>',
        inline((entry["metric"] or "–").replace("_", " ")),
        inline(f"{entry['dataset']}, {entry['data']}") if entry["dataset"] else "–",
        f'<td data-value="{entry["seeds"]}">{entry["seeds"] or "–"}</td>',
    ]
