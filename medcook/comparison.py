"""Many methods at several numbers of labelled patients, as one table and one figure.

The evidence of such a comparison has arms named `method, count` (`medcook.recipes.semi_supervised.few_labels`).
"""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from medcook import plots, statistics
from medcook.records import Comparison, Summary
from medcook.teaching import NO_BREAK, with_interval
from medcook.verdicts import LOWER_IS_BETTER, gains

REFERENCES = ("supervised", "mean teacher")


def by_method(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of arms named `method, count`, with the columns `method` and `labelled` (int); other arms are left out."""
    parts = frame["arm"].str.extract(r"^(?P<method>.+), (?P<labelled>\d+)$")
    rows = frame.assign(method=parts["method"], labelled=pd.to_numeric(parts["labelled"]))
    return rows.dropna(subset="labelled").astype({"labelled": int})


def compare_methods(frame: pd.DataFrame, references: Sequence[str] = REFERENCES, metric: str = "dice") -> pd.DataFrame:
    """One row a method and number of labelled patients, numbers throughout.

    mean, low, high; for each reference the paired difference (`against <reference>`, `low`, `high`, `p`) and p after
    Holm over all differences of the table; hd95 in which a miss is the diagonal, misses, patients, replicates
    """
    rows, found = by_method(frame), []
    for (labelled, method), part in rows.groupby(["labelled", "method"], sort=False):
        line = {"method": method, "labelled": labelled} | _spread(part, metric)
        for reference in references:
            other = rows[(rows["labelled"] == labelled) & (rows["method"] == reference)]
            line |= _against(part, other, reference, metric) if method != reference and len(other) else {}
        found.append(line)
    table = pd.DataFrame(found).sort_values("labelled", kind="stable").set_index(["labelled", "method"])
    names = [name for name in table.columns if name.startswith("p ")]
    adjusted = statistics.holm(table[names].to_numpy(dtype=float).ravel()).reshape(len(table), len(names))
    return table.assign(**{f"Holm {name}": adjusted[:, number] for number, name in enumerate(names)})


def _spread(part: pd.DataFrame, metric: str) -> dict:
    estimate = statistics.interval(part, metric)
    return {
        "mean": estimate.mean,
        "low": estimate.low,
        "high": estimate.high,
        "hd95": part["hd95"].mean(),
        "missed": int(part["missed"].sum()),
        "rows": len(part),
        "patients": estimate.n_patients,
        "draws": estimate.n_replicates,
    }


def told_apart(table: pd.DataFrame, reference: str = REFERENCES[0]) -> pd.DataFrame:
    """A row a number of labelled patients: which methods of `compare_methods` are better or worse than the reference by
    their interval, and which are not told apart, each with its difference."""
    rows = table.dropna(subset=f"against {reference}").reset_index()
    better, worse = rows[f"low {reference}"] > 0, rows[f"high {reference}"] < 0
    rows["found"] = np.select([better, worse], ["better", "worse"], "not told apart")
    rows["shown"] = [f"{m} {gain:+.3f}" for m, gain in zip(rows["method"], rows[f"against {reference}"], strict=True)]
    rows = rows.sort_values(f"against {reference}", ascending=False)
    found = rows.groupby(["labelled", "found"])["shown"].agg(", ".join).unstack()
    return found.reindex(columns=["better", "not told apart", "worse"]).fillna("–")


def _against(part: pd.DataFrame, other: pd.DataFrame, reference: str, metric: str) -> dict:
    found = statistics.difference(part, other, metric)
    names = (f"against {reference}", f"low {reference}", f"high {reference}", f"p {reference}")
    return dict(zip(names, (found.effect, found.low, found.high, found.p), strict=True))


def readable(table: pd.DataFrame, summary: Summary, references: Sequence[str] = REFERENCES) -> pd.DataFrame:
    """The table of `compare_methods` for reading: intervals in brackets, p after Holm, cost from the summary."""
    lines = []
    for (labelled, method), row in table.iterrows():
        line = {"labelled": labelled, "method": method, "Dice": with_interval(row["mean"], row["low"], row["high"])}
        for name in references:
            tested = row[f"p {name}"] == row[f"p {name}"]
            effect = with_interval(row[f"against {name}"], row[f"low {name}"], row[f"high {name}"], sign=True)
            line[f"− {name}"] = effect if tested else "–"
            line[f"p, {name}"] = f"{row[f'Holm p {name}']:.2g}" if tested else "–"
        arm = summary.arms[f"{method}, {labelled}"]
        line |= {
            "val-selected": "–" if arm.selected is None else f"{arm.selected:.3f}",
            "HD95, pixels": f"{row['hd95']:.1f}",
            "missed": f"{row['missed']:.0f} of {row['rows']:.0f}".replace(" ", NO_BREAK),
            "seconds": round(arm.cost["seconds"]),
        }
        lines.append(line)
    return pd.DataFrame(lines).set_index(["labelled", "method"])


def comparison_figure(frame: pd.DataFrame, summary: Summary, ceiling: str, metric: str = "dice") -> Figure:
    """A panel a method: its mean and 95% band (one count: a bar); the supervised baseline in grey.

    ceiling  the arm with all labels: a dashed line
    """
    rows = by_method(frame)
    there = set(rows["method"]) - {REFERENCES[0]}
    methods = [name for name in dict.fromkeys(arm.rpartition(", ")[0] for arm in summary.arms) if name in there]
    columns = min(6, len(methods))
    lines = -(-len(methods) // columns)
    figure, axes = plots.panels(lines, columns, size=(2 * columns, 2.1 * lines + 0.7), sharex=True, sharey=True)
    cells = np.atleast_1d(axes).ravel()
    for cell, method in zip(cells, methods, strict=False):
        cell.axhline(summary.arms[ceiling].mean, color="0.35", linestyle="--", linewidth=1)
        for name, colour in ((REFERENCES[0], "0.45"), (method, plots.PALETTE[0])):
            _curve(cell, rows[rows["method"] == name], metric, colour)
        counts = sorted(rows["labelled"].unique())
        cell.set_xscale("log")
        cell.set_xticks(counts, [str(count) for count in counts])
        cell.minorticks_off()
        cell.set_title(method, fontsize=9)
        cell.spines[["top", "right"]].set_visible(False)
    for cell in cells[len(methods) :]:
        cell.set_axis_off()
    for cell in cells[max(0, len(methods) - columns) : len(methods)]:
        cell.set_xlabel("labelled patients", fontsize=8)
        cell.tick_params(labelbottom=True)
    figure.supylabel(f"test {metric}", fontsize=9)
    handles = [
        Line2D([], [], color=plots.PALETTE[0], marker="o", markersize=4, label="the method, 95% interval"),
        Line2D([], [], color="0.45", marker="o", markersize=4, label="supervised on the same labels"),
        Line2D([], [], color="0.35", linestyle="--", label="all 70 labelled"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return plots.credit(figure, summary.dataset)


def forest(summaries: Sequence[Summary]) -> Figure:
    """What each paper's method gains over its comparator (squares) and over itself without the claimed ingredient
    (circles), with 95% intervals; right of zero is better. Each metric has an axis of its own."""
    groups: dict[str, list[Summary]] = {}
    for summary in summaries:
        groups.setdefault(summary.metric, []).append(summary)
    heights = [len(members) for members in groups.values()]
    options = dict(height_ratios=heights, squeeze=False)
    figure, grid = plots.panels(len(groups), 1, size=(8, 0.8 + 0.55 * sum(heights) + 0.5 * len(groups)), **options)
    for axes, members in zip(grid[:, 0], groups.values(), strict=True):
        axes.axvline(0, color="0.6", linewidth=1)
        for row, summary in enumerate(members):
            for part, offset, marker, number in ((summary.comparison, -0.13, "s", 0), (summary.ablation, 0.13, "o", 1)):
                if part:
                    _gain(axes, part, summary.metric, row + offset, marker, plots.colour(number))
        axes.set_yticks(range(len(members)), [f"{s.paper}\n{s.comparison.b}" for s in members], fontsize=8)
        axes.set_ylim(len(members) - 0.5, -0.5)
        axes.set_xlabel(gain_label(members[0]), fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D([], [], color=plots.colour(0), marker="s", label="over the comparator named under the paper"),
        Line2D([], [], color=plots.colour(1), marker="o", label="over itself without the claimed ingredient"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return plots.credit(figure, *dict.fromkeys(summary.dataset for summary in summaries))


def tally(summaries: Sequence[Summary]) -> str:
    """In a sentence, what `forest` shows: how many gains have an interval above zero, of either kind."""
    counts = []
    for name in ("comparison", "ablation"):
        parts = [(getattr(summary, name), summary.metric) for summary in summaries]
        lows = [gains(metric, part.low, part.high, ())[0] for part, metric in parts if part and part.low is not None]
        counts.append(f"{sum(low > 0 for low in lows)} of {len(lows)}")
    over, without = (f"{count} over {what}" for count, what in zip(counts, ("the comparator", "itself"), strict=True))
    return f"Gains with an interval above zero: {over}, {without} without the claimed ingredient."


def every_arm(summaries: Sequence[Summary]) -> pd.DataFrame:
    """Every arm's mean, and how many structures of how many it misses altogether."""
    rows = [
        (one.paper, one.metric, arm, round(found.mean, 3), found.missed, found.rows)
        for one in summaries
        for arm, found in one.arms.items()
    ]
    columns = ["paper", "metric", "arm", "mean", "missed", "of"]
    return pd.DataFrame(rows, columns=columns).set_index(columns[:3])


def gain_label(summary: Summary) -> str:
    """What a gain in the summary's metric is called."""
    if summary.metric == "dice":
        return "gain, Dice"
    if summary.metric in ("hd95", "assd"):
        return f"gain, {summary.unit or 'pixels'} of distance saved"
    if after := re.fullmatch(r"dice_(\d+)", summary.metric):
        return f"gain, Dice after {after[1]} clicks"
    name = summary.metric.replace("dice_", "Dice, ").replace("_", " ")
    return f"gain, {name} saved" if summary.metric in LOWER_IS_BETTER else f"gain, {name}"


def _gain(axes, part: Comparison, metric: str, height: float, marker: str, colour: str) -> None:
    sign = -1 if metric in LOWER_IS_BETTER else 1
    ends = [part.effect if end is None else end for end in (part.low, part.high)]
    low, high = sorted(sign * end for end in ends)
    effect = sign * part.effect
    bars = [[max(0, effect - low)], [max(0, high - effect)]]
    axes.errorbar(effect, height, xerr=bars, fmt=marker, color=colour, capsize=2, markersize=5, linewidth=1.3)


def _curve(axes, rows: pd.DataFrame, metric: str, colour: str) -> None:
    counts = sorted(rows["labelled"].unique())
    estimates = [statistics.interval(rows[rows["labelled"] == count], metric) for count in counts]
    axes.plot(counts, [e.mean for e in estimates], color=colour, marker="o", markersize=4, linewidth=1.4)
    low, high = [e.low for e in estimates], [e.high for e in estimates]
    if len(counts) > 1:
        axes.fill_between(counts, low, high, color=colour, alpha=0.2, linewidth=0)
    else:
        axes.vlines(counts, low, high, color=colour, linewidth=1.4)
