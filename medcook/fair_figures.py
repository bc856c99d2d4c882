"""Pictures of groups: how each of them fares, whether a gap is more than noise, what a model sees and looks at."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from scipy.stats import binomtest
from torch import Tensor

from medcook import plots, statistics
from medcook.data.manifests import Manifest
from medcook.measures.fairness import by_group, dealt_gaps, gap_test
from medcook.sampling import trained
from medcook.teaching import with_interval

MARKERS = "osD^vP"
RESAMPLES = 500
"""Resamples behind an interval in figures of many AUCs, which are slow to resample; tables have more."""


def draw_groups(
    axes: Axes, parts: Mapping[str, pd.DataFrame], metric: str = "dice", group: str = "group", label: str = "Dice"
) -> None:
    """A line a part (an arm), a colour and marker a group: its mean with 95% interval. The legend says n patients."""
    tables = {name: by_group(frame, metric, group) for name, frame in parts.items()}
    sizes = pd.concat(tables.values())["n"].groupby(level=0).max()
    for number, (who, count) in enumerate(sizes.items()):
        offset = 0.62 * ((number + 0.5) / len(sizes) - 0.5)
        style = {"color": plots.colour(number), "fmt": MARKERS[number % len(MARKERS)], "markersize": 5, "capsize": 2}
        for row, table in enumerate(tables.values()):
            if who in table.index:
                bar(axes, *table.loc[who, ["mean", "low", "high"]], row + offset, **style)
        axes.plot([], [], style["fmt"], color=style["color"], label=f"{who} (n = {count:.0f})")
    axes.set_yticks(range(len(tables)), list(tables), fontsize=8)
    axes.set_ylim(len(tables) - 0.5, -0.5)
    axes.set_xlabel(f"{label}, mean and 95% interval", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def group_figure(
    parts: Mapping[str, pd.DataFrame], dataset: str, metric: str = "dice", group: str = "group", label: str = "Dice"
) -> Figure:
    """`draw_groups` as a figure of its own."""
    figure, axes = plots.panels(size=(7.5, 1.5 + 0.55 * len(parts)))
    draw_groups(axes, parts, metric, group, label)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return plots.credit(figure, dataset)


def null_figure(frame: pd.DataFrame, dataset: str, groups: Mapping[str, str], metric: str = "dice") -> Figure:
    """A panel a grouping: the gap that was measured, beside those of the same patients in groups dealt out at random.

    groups  {what the panel is called: column}
    """
    figure, row = plots.panels(1, len(groups), size=(3.2 * len(groups) + 0.6, 3.3), squeeze=False)
    for axes, (name, column) in zip(row[0], groups.items(), strict=True):
        gap, random, sizes = dealt_gaps(frame, metric, column)
        found = gap_test(frame, metric, column)
        axes.hist(random, bins=40, color="0.75", density=True, label="dealt out at random")
        axes.axvline(found.chance, color="0.4", linestyle="--", linewidth=1, label="95% of these stay below")
        axes.axvline(gap, color=plots.PALETTE[5], linewidth=2, label="measured")
        count = ", ".join(f"{who} {n}" for who, n in sizes.items())
        axes.set_title(f"by {name}: p = {found.p:.2g}\n{count}", fontsize=9)
        axes.set(xlabel=f"gap in {metric.replace('dice', 'Dice')}, best minus worst group", yticks=[])
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.spines[["top", "right", "left"]].set_visible(False)
    handles, labels = row[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return plots.credit(figure, dataset)


def gap_table(frame: pd.DataFrame, groups: Mapping[str, str], metric: str = "dice") -> pd.DataFrame:
    """One row a grouping: every group's mean and n, the gap with its interval, what chance makes, p before and after
    Holm over the rows, and whether the gap can be told from noise."""
    rows = []
    for name, column in groups.items():
        known = frame[frame[column] != ""].assign(dice=lambda rows: rows[metric], group=frame[column])
        found, estimate = gap_test(known, "dice"), statistics.interval(known, "dice_gap")
        means = by_group(known, "dice")
        rows.append(
            {
                "groups by": name,
                "means (n)": ", ".join(f"{who} {line['mean']:.3f} ({line['n']:.0f})" for who, line in means.iterrows()),
                "gap": with_interval(estimate.mean, estimate.low, estimate.high),
                "chance makes up to": round(found.chance, 3),
                "p": found.p,
            }
        )
    table = pd.DataFrame(rows).set_index("groups by")
    table["p after Holm"] = statistics.holm(table["p"])
    table["verdict"] = np.where(table["p after Holm"] < 0.05, "more than noise", "not told from noise")
    return table.assign(**{name: table[name].map("{:.2g}".format) for name in ("p", "p after Holm")})


def in_words(frame: pd.DataFrame, words: Mapping[str, Sequence[str]], column: str = "group") -> pd.DataFrame:
    """The frame with one column an attribute: which of its words stands in `column`; empty where none does."""
    said = frame[column].fillna("").str.split()
    return frame.assign(
        **{
            attribute: said.map(lambda those, known=known: next((word for word in those if word in known), ""))
            for attribute, known in words.items()
        }
    )


def worst_of_groups(fitted, frame: pd.DataFrame, count: int = 2) -> Figure:
    """The median case and the `count` worst of every group, by mean Dice of a table with the column `group`."""
    cases, titles = [], []
    for who, rows in frame.groupby("group"):
        order = rows.groupby("case_id")["dice"].mean().sort_values()
        chosen = dict.fromkeys([order.index[len(order) // 2], *order.index[:count]])
        for place, case_id in enumerate(chosen):
            kind = "median" if place == 0 else "low"
            cases.append(fitted.task.data.load(case_id))
            titles.append(f"{who}, {kind} of {len(order)}\nDice {order[case_id]:.2f}")
    predictions = [fitted.predict(case) for case in cases]
    return plots.compare_predictions(cases, predictions, titles, fitted.task.data.manifest)


def first_run(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of one training run: the first replicate."""
    return frame[frame["replicate"] == frame["replicate"].min()] if "replicate" in frame else frame


def rates(frame: pd.DataFrame, threshold: float, group: str) -> pd.DataFrame:
    """Sensitivity and specificity of every group, with Wilson's 95% intervals and the counts they are made from.

    frame  columns score, outcome (0 or 1) and `group`; a score that reaches the threshold is called ill
    """
    rows = {}
    for who, part in frame[frame[group] != ""].groupby(group):
        called, ill = part["score"] >= threshold, part["outcome"] == 1
        rows[who] = _rate("sensitivity", called & ill, ill) | _rate("specificity", ~called & ~ill, ~ill)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(group)


def _rate(name: str, right: pd.Series, among: pd.Series) -> dict:
    hits, count = int(right.sum()), int(among.sum())
    bounds = binomtest(hits, count).proportion_ci(method="wilson") if count else (np.nan, np.nan)
    found = {name: hits / count if count else np.nan, f"{name} low": bounds[0], f"{name} high": bounds[1]}
    return found | {f"{name} n": count}


def threshold_view(frame: pd.DataFrame, attribute: str, threshold: float, dataset: str) -> Figure:
    """One training run: every patient's score by group, and what the threshold makes of it for each group.

    frame  columns score, outcome and the attribute
    """
    rows = first_run(frame)
    rows = rows[rows[attribute] != ""]
    table = rates(rows, threshold, attribute)
    figure, (left, right) = plots.panels(1, 2, size=(9.5, 1.9 + 0.6 * len(table)), width_ratios=(1.15, 1), sharey=True)
    for number, who in enumerate(table.index):
        part = rows[rows[attribute] == who]
        for ill, offset in ((1, -0.15), (0, 0.15)):
            scores = np.sort(part.loc[part["outcome"] == ill, "score"])
            spread = number + offset + 0.1 * np.sin(2.4 * np.arange(len(scores)))
            left.plot(scores, spread, MARKERS[1 - ill], color=plots.colour(1 - ill), markersize=4, alpha=0.7, mew=0)
        for place, name in enumerate(("sensitivity", "specificity")):
            value, low, high, count = table.loc[who, [name, f"{name} low", f"{name} high", f"{name} n"]]
            height, style = number + 0.3 * (place - 0.5), {"fmt": MARKERS[place], "color": plots.colour(place)}
            bar(right, value, low, high, height, **style, capsize=3, markersize=6)
            right.text(1.04, height, f"n = {count:.0f}", va="center", fontsize=8, color=style["color"])
    left.axvline(threshold, color="black", linewidth=1.2)
    left.set_yticks(range(len(table)), list(table.index))
    left.set(ylim=(len(table) - 0.5, -0.5), xlim=(-0.03, 1.03))
    left.set_xlabel(f"score; from {threshold:.2f} on a patient is called ill", fontsize=8)
    right.set(xlim=(-0.03, 1.2), xticks=[0, 0.5, 1])
    right.set_xlabel("share that is called rightly, 95% interval", fontsize=8)
    handles = [
        Line2D([], [], color=plots.colour(0), marker=MARKERS[0], linestyle="", label="ill; sensitivity"),
        Line2D([], [], color=plots.colour(1), marker=MARKERS[1], linestyle="", label="not ill; specificity"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return plots.credit(figure, dataset)


def plane_figure(frame: pd.DataFrame, attributes: Sequence[str], dataset: str) -> Figure:
    """A panel an attribute: the first two principal components of every patient's embedding in one training run."""
    rows = first_run(frame)
    figure, row = plots.panels(1, len(attributes), size=(3.3 * len(attributes), 3.6), squeeze=False, sharey=True)
    for axes, attribute in zip(row[0], attributes, strict=True):
        for number, (who, part) in enumerate(rows[rows[attribute] != ""].groupby(attribute)):
            style = {"color": plots.colour(number), "marker": MARKERS[number % len(MARKERS)]}
            label = f"{who} ({len(part)})"
            axes.plot(part["first"], part["second"], linestyle="", markersize=5, alpha=0.7, mew=0, label=label, **style)
        axes.set_xlabel("first component", fontsize=8)
        axes.set_title(f"by {attribute}", fontsize=9)
        axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    row[0, 0].set_ylabel("second component", fontsize=8)
    return plots.credit(figure, dataset)


def subgroup_figure(tables: Mapping[str, pd.DataFrame], dataset: str) -> Figure:
    """A panel a model: the AUC of every subgroup with its interval, the number of patients and how many are ill."""
    figure, row = plots.panels(1, len(tables), size=(4 * len(tables) + 1, 3.6), squeeze=False, sharey=True)
    names = list(next(iter(tables.values()))["subgroup"])
    for number, (axes, (name, table)) in enumerate(zip(row[0], tables.items(), strict=True)):
        for place, line in enumerate(table.itertuples()):
            bar(axes, line.auc, line.low, line.high, place, fmt="s", color=plots.colour(number), capsize=3)
            axes.text(1.03, place, f"{line.diseased} of {line.patients}", va="center", fontsize=8)
        axes.axvline(table["auc"].iloc[0], color="0.7", linewidth=1, zorder=0)
        axes.axvline(0.5, color="0.5", linewidth=1, linestyle=":")
        axes.set(xlim=(0.2, 1.25), xticks=[0.25, 0.5, 0.75, 1], ylim=(len(names) - 0.5, -0.5))
        axes.set_xlabel("AUC, 95% interval; right: ill of all patients", fontsize=8)
        axes.set_title(name, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    row[0, 0].set_yticks(range(len(names)), names)
    return plots.credit(figure, dataset)


def view_sheet(views: Mapping[str, Tensor], manifest: Manifest, names: Sequence[str] = ()) -> Figure:
    """A column a view, a row an image (N, 1, H, W): what each classifier is shown. `names` of the rows."""
    count = len(next(iter(views.values())))
    size = (1.75 * len(views) + 0.3, 1.85 * count + 0.8)
    figure, grid = plots.panels(count, len(views), size=size, squeeze=False)
    for column, (name, images) in enumerate(views.items()):
        for row, image in enumerate(images):
            limits = tuple(np.percentile(image, [0.5, 99.5])) if float(image.max()) > float(image.min()) else (-1, 1)
            plots.show_slice(grid[row, column], image[0].numpy(), title=name if row == 0 else "", limits=limits)
    for cell, name in zip(grid[:, 0], names, strict=False):
        cell.text(-0.08, 0.5, name, rotation=90, va="center", ha="right", transform=cell.transAxes, fontsize=8)
    return plots.credit(figure, manifest)


def saliency_sheet(
    images: Tensor,
    truth: Tensor,
    maps: Mapping[str, Sequence[Tensor]],
    manifest: Manifest,
    *,
    regions: Mapping[str, Sequence[Tensor]] | None = None,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """A row an image (N, H, W) with its true structure; a column a way to explain: saliency from black to yellow,
    blue the border of where it searched.

    truth (N, H, W) bool; maps {name: N times (H, W)}; `notes` stand above each map
    """
    regions, notes = regions or {}, notes or {}
    figure, grid = plots.panels(
        len(images), len(maps) + 1, size=(2.25 * (len(maps) + 1), 2.35 * len(images) + 0.6), squeeze=False
    )
    for row, (image, there) in enumerate(zip(images, truth, strict=True)):
        title = "image and reference" if row == 0 else ""
        plots.show_slice(grid[row, 0], image.numpy(), there.numpy().astype(np.uint8), title=title, fill=0.15)
        for cell, (name, found) in zip(grid[row, 1:], maps.items(), strict=True):
            heat = found[row].numpy()
            cell.imshow(heat, cmap="inferno", vmin=0, vmax=max(float(heat.max()), 1e-6))
            cell.contour(there.numpy(), levels=[0.5], colors="white", linewidths=1)
            if name in regions and not bool(regions[name][row].all()):
                cell.contour(regions[name][row].numpy(), levels=[0.5], colors=[plots.PALETTE[4]], linewidths=1.4)
            said = f"{name}\n" if row == 0 else ""
            cell.set_title(said + (notes[name][row] if name in notes else ""), fontsize=8)
            cell.set_axis_off()
    handles = [
        Line2D([], [], color="0.6", label="reference (white on the maps)"),
        Line2D([], [], color=plots.PALETTE[4], label="where occlusion was tried"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return plots.credit(figure, manifest)


def draw_auc(axes: Axes, frames: Mapping[str, Mapping[str, pd.DataFrame]], label: str) -> None:
    """A line an arm, a colour a kind of question {kind: {arm: rows with score and outcome}}: AUC with 95% interval."""
    for number, (kind, parts) in enumerate(frames.items()):
        offset = 0.5 * ((number + 0.5) / len(frames) - 0.5)
        style = {"color": plots.colour(number), "fmt": MARKERS[number], "markersize": 5, "capsize": 2}
        for row, part in enumerate(parts.values()):
            found = statistics.interval(part, "auc", RESAMPLES)
            bar(axes, found.mean, found.low, found.high, row + offset, **style)
        axes.plot([], [], style["fmt"], color=style["color"], label=kind)
    names = list(next(iter(frames.values())))
    axes.axvline(0.5, color="0.5", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label, fontsize=8)
    if len(frames) > 1:
        axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    axes.spines[["top", "right"]].set_visible(False)


def bar(axes: Axes, mean: float, low: float, high: float, height: float, **style) -> None:
    """A mean with its interval on a line; only the mean where there is no interval, nothing where it is not known."""
    if not np.isfinite(mean):
        return
    ends = [[max(0.0, mean - low)], [max(0.0, high - mean)]] if np.isfinite([low, high]).all() else None
    axes.errorbar(mean, height, xerr=ends, linewidth=1.3, **style)


@torch.no_grad()
def explain(fitted, methods: Mapping[str, object], numbers: Sequence[int], overlap) -> dict:
    """Arguments for `saliency_sheet`: what each method says of images `numbers` of the validation samples.

    fitted   its networks; methods {name: a method with `explain` and `region`} share them
    overlap  (saliency (H, W), truth (H, W)) -> a number for the note above a map
    """
    trained(fitted)
    samples = fitted.task.samples("val")
    images, truth = samples.images[list(numbers)], samples.labels[list(numbers)] == 1
    maps, regions, notes = ({name: [] for name in methods} for _ in range(3))
    for seed, (image, there) in enumerate(zip(images, truth, strict=True)):
        for name, method in methods.items():
            saliency, tried = method.explain(fitted.nets, image, seed)
            maps[name].append(saliency)
            regions[name].append(method.region(fitted.nets, image, seed))
            notes[name].append(f"Dice {overlap(saliency, there):.2f}, {tried} windows")
    return {"images": images[:, 0], "truth": truth, "maps": maps, "regions": regions, "notes": notes}
