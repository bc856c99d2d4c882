"""One function for each recipe whose evidence deserves a figure of its own; `medcook.figures` calls them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medcook import fair_evidence, fair_figures, pooled
from medcook.comparison import comparison_figure
from medcook.figures import draws
from medcook.handover import draw_handover
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


class Panel(NamedTuple):
    """One panel of `measures_figure`: a column or pooled measure, what the axis says, and whether less is better.

    structure  the rows of one structure alone; empty: all rows
    """

    metric: str
    label: str
    less: bool = False
    structure: str = ""


def measures_figure(summary: Summary, frame: pd.DataFrame, measures: Sequence[Panel]) -> Figure:
    """A panel a measure, a line an arm: mean with 95% interval, grey dots its replicates. The judged arms are blue."""
    names = list(summary.arms)
    size = (2.2 + 2.5 * len(measures), 1.5 + 0.36 * len(names))
    figure, row = panels(1, len(measures), size=size, squeeze=False, sharey=True)
    judged = (summary.comparison.a, summary.comparison.b) if summary.comparison else ()
    for axes, panel in zip(row[0], measures, strict=True):
        rows = frame[frame["structure"] == panel.structure] if panel.structure else frame
        for place, name in enumerate(names):
            shade = PALETTE[0] if name in judged else "0.3"
            _estimate(axes, rows[rows["arm"] == name], panel.metric, place, shade)
        axes.set_xlabel(f"{panel.label}\n({'less' if panel.less else 'more'} is better)", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    row[0, 0].set_yticks(range(len(names)), names)
    row[0, 0].set_ylim(len(names) - 0.5, -0.6)
    figure.suptitle(f"{summary.title}: {summary.verdict}", fontsize=9)
    return credit(figure, summary.dataset)


def _estimate(axes: Axes, rows: pd.DataFrame, metric: str, place: int, shade: str) -> None:
    """Mean, interval and replicates of an arm's rows, on line `place`; nothing where the measure is not defined."""
    columns = pooled.POOLED[metric].columns if metric in pooled.POOLED else (metric,)
    if not set(columns) <= set(rows.columns) or rows[list(columns)].isna().all().any():
        return
    dots = pooled.of_replicates(rows, metric)
    axes.plot(dots, np.full(len(dots), place + 0.2), "o", color="0.65", markersize=3)
    found = interval(rows, metric)
    bars = [[max(0, found.mean - found.low)], [max(0, found.high - found.mean)]]
    axes.errorbar(found.mean, place, xerr=bars, fmt="s", color=shade, capsize=3, markersize=5)


MEASURES = {
    "curvas": (
        Panel("ece", "calibration error", less=True),
        Panel("ece_near", "calibration error\nnear the cell", less=True),
        Panel("crps", "CRPS of the area", less=True),
        Panel("dice", "Dice, where raters agree"),
    ),
    "pulaski": (
        Panel("energy_distance", "energy distance\nof samples to raters", less=True),
        Panel("samples_to_raters", "mean 1 − IoU,\nsample to rater", less=True),
        Panel("dice", "Dice of the mean\nwith the majority"),
    ),
    "ius-prescreen": (
        Panel("frame_error", "wrong frames", less=True),
        Panel("false_frames", "found where\nnothing is", less=True),
        Panel("missed_frames", "missed frames", less=True),
        Panel("dice", "Dice of found frames"),
    ),
    "daugs": (
        Panel("dice", "Dice, the other site"),
        Panel("failed", "share of failures", less=True),
    ),
    "maxquery": (
        Panel("auroc", "AUROC, unknown pixels"),
        Panel("average_precision", "average precision"),
        Panel("fpr95", "false alarms\nat 95% found", less=True),
        Panel("dice", "Dice, known structures"),
    ),
    "autopaint": (
        Panel("auc", "AUC, tuberculosis"),
        Panel("simulated", "AUROC of planted\nopacities (simulated)"),
    ),
    "mefn": (
        Panel("dice", "Dice, both good", structure="both good"),
        Panel("dice", "Dice, T1 spoilt", structure="T1 spoilt"),
        Panel("dice", "Dice, T2 spoilt", structure="T2 spoilt"),
        Panel("rank_correlation", "uncertainty\nranks errors"),
    ),
    "repri": (
        Panel("dice", "Dice"),
        Panel("dice", "Dice,\nleft ventricle", structure="left ventricle"),
        Panel("dice", "Dice,\nright ventricle", structure="right ventricle"),
    ),
    "fob": (
        Panel("precision", "precision"),
        Panel("dice", "Dice"),
        Panel("excess", "marked outside, as a\nshare of the structure", less=True),
    ),
    "sam-med2d": (
        Panel("dice", "Dice, mean of these"),
        Panel("box", "from a tight box"),
        Panel("click_1", "from a click"),
        Panel("click_3", "from three clicks"),
    ),
    "sas": (
        Panel("dice", "Dice, mean of these"),
        Panel("box", "from a tight box"),
        Panel("click_1", "from a click"),
        Panel("click_3", "from three clicks"),
    ),
    "medical-sam3": (
        Panel("dice", "Dice from the name,\nall slices"),
        Panel("box", "from a tight box,\nslices that show it"),
        Panel("wide_box", "from a box that is\nhalf as wide again"),
    ),
    "i-medsam": (
        Panel("hd95", "HD95, pixels", less=True),
        Panel("dice", "Dice"),
    ),
    "distillfss": (
        Panel("dice", "Dice"),
        Panel("mega_operations", "million operations\na slice", less=True),
    ),
    "xai-clip": (
        Panel("dice", "Dice of what is salient\nwith the lungs"),
        Panel("iou", "IoU of the same"),
        Panel("evaluations", "predictions it took", less=True),
        Panel("faithfulness", "evidence lost with\nthe most salient tenth"),
    ),
}
"""What the evidence figures of chapters 03 and 05 to 07 show besides the judged measure."""


def _by_measures(summary: Summary, frame: pd.DataFrame) -> Figure:
    return measures_figure(summary, frame, MEASURES[summary.paper])


for _paper in MEASURES:
    draws(_paper)(_by_measures)


@draws("sam4mis")
def survey_figure(summary: Summary, frame: pd.DataFrame) -> Figure:
    """A line a target, set by set: each arm's mean over patients with 95% interval, from a box and from a click."""
    targets = frame.groupby(["group", "structure"])["box"].mean()
    figure, row = panels(1, 2, size=(10, 1.6 + 0.4 * len(targets)), sharey=True)
    for axes, (column, label) in zip(row, (("box", "from a tight box"), ("click_1", "from one click")), strict=True):
        for number, arm in enumerate(summary.arms):
            mine = frame[frame["arm"] == arm].groupby(["group", "structure"])
            found = [interval(mine.get_group(target), column) for target in targets.index]
            places = np.arange(len(targets)) + 0.22 * (number - (len(summary.arms) - 1) / 2)
            means = np.array([each.mean for each in found])
            bars = np.abs(np.array([[each.low, each.high] for each in found]).T - means)
            shape = {"fmt": "osD"[number % 3], "color": colour(number), "markersize": 4, "elinewidth": 1}
            axes.errorbar(means, places, xerr=bars, label=arm, **shape)
        axes.set(xlabel=f"Dice {label}, 95% interval over patients", xlim=(-0.02, 1.02))
        axes.grid(axis="y", color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
    row[0].set_yticks(range(len(targets)), [f"{structure}, {dataset}" for dataset, structure in targets.index])
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(f"{summary.title}: {summary.verdict}", fontsize=9)
    return credit(figure, *dict.fromkeys(dataset for dataset, _ in targets.index))


@draws("chexmask-u")
def landmarks_figure(summary: Summary, frame: pd.DataFrame) -> Figure:
    """What handing cases over gains with each arm's uncertainty, and how that grows when images are damaged."""
    compared = [summary.comparison.a, summary.comparison.b]
    figure, (left, right) = panels(1, 2, size=(10, 4.1))
    draw_handover(left, frame, compared)
    for number, name in enumerate([*compared, *(arm for arm in summary.arms if arm not in compared)]):
        mine = frame[frame["arm"] == name]
        start = mine["uncertainty_0"].mean()
        noisy = [mine[f"uncertainty_{level}"].mean() / start for level in range(4)]
        covered = [1.0] + [mine[f"uncertainty_covered_{level}"].mean() / start for level in range(1, 4)]
        right.plot(range(4), noisy, "o-", color=colour(number), markersize=4, label=name)
        right.plot(range(4), covered, "s--", color=colour(number), markersize=4, linewidth=1)
    right.set(xlabel="level of damage (solid: noise, dashed: a box blanked)", xticks=range(4))
    right.set_ylabel("uncertainty, undamaged = 1")
    right.legend(fontsize=8, frameon=False)
    right.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{summary.title}: {summary.verdict}", fontsize=9)
    return credit(figure, summary.dataset)


@draws("fairseg")
def fairseg_figure(summary: Summary, frame: pd.DataFrame) -> Figure:
    """Every group's Dice by arm, and the equity-scaled Dice that is made of it by either formula."""
    arms = list(summary.arms)
    figure, (left, right) = panels(1, 2, size=(10, 1.8 + 0.42 * len(arms)), sharey=True, width_ratios=(1.2, 1))
    fair_figures.draw_groups(left, {name: frame[frame["arm"] == name] for name in arms})
    fair_evidence.draw_equity(right, frame, arms)
    left.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    figure.suptitle(f"{summary.title}: {summary.verdict}", fontsize=9)
    return credit(figure, summary.dataset)


@draws("mask-of-truth")
def masking_figure(summary: Summary, frame: pd.DataFrame) -> Figure:
    """What can be told from each view of the image, and what classifiers make of views they were not trained on."""
    arms = list(summary.arms)
    figure, (left, right) = panels(1, 2, size=(10, 1.8 + 0.4 * len(arms)), sharey=True, width_ratios=(1.4, 1))
    own = {name: frame[frame["arm"] == name] for name in arms}
    fair_evidence.draw_tested(right, fair_evidence.tested_under(frame, arms))
    fair_figures.draw_auc(left, {"": own}, "AUC under its own view, 95% interval")
    left.set_title("trained on ...", fontsize=9, loc="left")
    figure.suptitle(f"{summary.title}: {summary.verdict}", fontsize=9)
    return credit(figure, summary.dataset)


@draws("cxr-clip-fairness")
def audit_figure(summary: Summary, frame: pd.DataFrame) -> Figure:
    """What is read from embeddings, and what a simulated drain does to the AUC of the finding."""
    figure, (left, right) = panels(1, 2, size=(11, 1.8 + 0.5 * len(summary.arms)), sharey=True)
    fair_figures.draw_auc(left, fair_evidence.probed(frame, list(summary.arms)), "AUC of what is read, 95% interval")
    fair_figures.draw_auc(right, fair_evidence.drained(frame, list(summary.arms)), "AUC of the finding, 95% interval")
    figure.suptitle(f"{summary.title}: {summary.verdict}", fontsize=9)
    return credit(figure, summary.dataset)
