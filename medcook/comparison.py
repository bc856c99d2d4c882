"""Many methods at several numbers of labelled patients, as one table and one figure.

The evidence of such a comparison has arms named `method, count` (`medcook.recipes.semi_supervised.few_labels`).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from medcook import plots, statistics
from medcook.records import Summary

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
    table = pd.DataFrame(found).set_index(["labelled", "method"])
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


def _against(part: pd.DataFrame, other: pd.DataFrame, reference: str, metric: str) -> dict:
    found = statistics.difference(part, other, metric)
    names = (f"against {reference}", f"low {reference}", f"high {reference}", f"p {reference}")
    return dict(zip(names, (found.effect, found.low, found.high, found.p), strict=True))


def comparison_figure(frame: pd.DataFrame, summary: Summary, ceiling: str, metric: str = "dice") -> Figure:
    """A panel a method: its mean and 95% band over the labelled patients, the supervised baseline's in grey behind it.

    ceiling  the arm with all labels: a dashed line
    """
    rows = by_method(frame)
    methods = [name for name in dict.fromkeys(rows["method"]) if name != REFERENCES[0]]
    columns = min(5, len(methods))
    lines = -(-len(methods) // columns)
    figure, axes = plots.panels(lines, columns, size=(2.3 * columns, 2.1 * lines + 0.7), sharex=True, sharey=True)
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
        Line2D([], [], color=plots.PALETTE[0], marker="o", markersize=4, label="the method, 95% band"),
        Line2D([], [], color="0.45", marker="o", markersize=4, label="supervised on the same labels"),
        Line2D([], [], color="0.35", linestyle="--", label="all 70 labelled"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return plots.credit(figure, summary.dataset)


def _curve(axes, rows: pd.DataFrame, metric: str, colour: str) -> None:
    counts = sorted(rows["labelled"].unique())
    estimates = [statistics.interval(rows[rows["labelled"] == count], metric) for count in counts]
    axes.plot(counts, [e.mean for e in estimates], color=colour, marker="o", markersize=4, linewidth=1.4)
    low, high = [e.low for e in estimates], [e.high for e in estimates]
    axes.fill_between(counts, low, high, color=colour, alpha=0.2, linewidth=0)
