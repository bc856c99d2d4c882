"""One function for each recipe whose evidence deserves a figure of its own; `medcook.figures` calls them."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from medcook.comparison import comparison_figure
from medcook.figures import draws
from medcook.plots import PALETTE, colour, credit, dice_against_labels, panels
from medcook.records import Summary
from medcook.statistics import interval


@draws("leakage")
def leakage_figure(summary: Summary, frame: pd.DataFrame) -> Figure:
    """A dot a patient: both arms against each other, and the paired difference with its mean and 95% interval."""
    compared = summary.comparison
    table = frame.groupby(["patient_id", "arm"])[summary.metric].mean().unstack()
    gain = (table[compared.a] - table[compared.b]).to_numpy()
    figure, (left, right) = panels(1, 2, size=(9, 4.2), width_ratios=(1, 1.15))
    ends = [table.min().min() - 0.02, min(1.0, table.max().max() + 0.02)]
    dots = {"linestyle": "", "marker": "o", "markersize": 4, "alpha": 0.6, "color": PALETTE[0], "markeredgewidth": 0}
    left.plot(ends, ends, color="0.6", linewidth=1)
    left.plot(table[compared.b], table[compared.a], **dots)
    left.set(xlim=ends, ylim=ends, aspect="equal")
    left.set(xlabel=f"Dice, split {compared.b}", ylabel=f"Dice, split {compared.a}")
    left.set_title("a dot a patient; above the line leakage flatters", fontsize=9)
    right.axvline(0, color="0.6", linewidth=1)
    right.plot(np.sort(gain), np.arange(len(gain)), **dots)
    bounds = [[compared.effect - compared.low], [compared.high - compared.effect]]
    top = 1.08 * len(gain)
    right.errorbar(compared.effect, top, xerr=bounds, fmt="s", color="black", capsize=4, markersize=6)
    right.set(ylim=(-1, 1.16 * len(gain)), yticks=[], ylabel="patients, sorted")
    right.set_xlabel(f"Dice {compared.a} − Dice {compared.b}, on the same slices")
    text = f"mean {compared.effect:+.3f}, 95% interval {compared.low:+.3f} to {compared.high:+.3f}"
    right.set_title(f"{text}\n{compared.n_patients} patients: {summary.verdict}", fontsize=9)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return credit(figure, summary.dataset)


@draws("labels")
def labels_figure(summary: Summary, frame: pd.DataFrame) -> Figure:
    """The evidence of `labels`: Dice against the number of labelled patients."""
    figure = dice_against_labels(frame, metric=summary.metric)
    figure.axes[0].set_title(f"{summary.title}\n35 to 70 patients: {summary.verdict}", fontsize=9)
    return credit(figure, summary.dataset)


@draws("unet-acdc")
@draws("unet-hippocampus")
def structures_figure(summary: Summary, frame: pd.DataFrame) -> Figure:
    """One column a structure: a dot a held-out case, coloured by fold, and the mean with its 95% interval."""
    names = list(dict.fromkeys(frame["structure"]))
    figure, axes = panels(size=(1.6 + 1.6 * len(names), 4))
    scatter = np.random.default_rng(0)
    for column, name in enumerate(names):
        rows = frame[frame["structure"] == name]
        for fold, part in rows.groupby("replicate"):
            x = column + scatter.uniform(-0.28, 0.28, len(part))
            axes.plot(x, part[summary.metric], "o", markersize=3, alpha=0.5, color=colour(fold), markeredgewidth=0)
        estimate = interval(rows, summary.metric)
        bounds = [[estimate.mean - estimate.low], [estimate.high - estimate.mean]]
        axes.errorbar(column + 0.38, estimate.mean, bounds, fmt="s", color="black", capsize=3, markersize=5)
    axes.set_xticks(range(len(names)), names)
    axes.set(xlim=(-0.5, len(names) - 0.4), ylabel=summary.metric)
    axes.set_title(
        f"{summary.title}\ndots: held-out cases, a colour a fold; squares: mean and 95% interval", fontsize=9
    )
    axes.spines[["top", "right"]].set_visible(False)
    return credit(figure, summary.dataset)


@draws("few-labels")
def few_labels_figure(summary: Summary, frame: pd.DataFrame) -> Figure:
    """The evidence of `few-labels`: every method against the supervised baseline."""
    return comparison_figure(frame, summary, "all labels", summary.metric)
