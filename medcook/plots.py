"""Figures. Colours are Okabe and Ito's, which colour-blind readers can tell apart; images carry their credit."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from medcook.data import Case
from medcook.data.manifests import Manifest, load_manifest
from medcook.figures import draws
from medcook.records import Summary
from medcook.statistics import interval

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def colour(number: int) -> str:
    """The colour of arm or structure `number`, counted from 0."""
    return PALETTE[number % len(PALETTE)]


def credit(figure: Figure, *manifests: Manifest | str) -> Figure:
    """Write where the images come from, their licence, and whether they are simulated, under a figure."""
    lines = []
    for manifest in manifests:
        manifest = load_manifest(manifest) if isinstance(manifest, str) else manifest
        simulated = "Simulated data. " if manifest.simulated else ""
        lines.append(f"{simulated}{manifest.title}. Licence: {manifest.licence}.")
    figure.supxlabel("\n".join(lines), fontsize=7, color="0.4")
    return figure


def show_slice(axes: Axes, image: np.ndarray, label: np.ndarray | None = None, *, title: str = "", fill: float = 0.35):
    """Grey image (H, W) with the structures of a label map (H, W) as coloured outlines over a light fill."""
    low, high = np.percentile(image, [1, 99.5])
    axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
    if label is not None:
        draw_label(axes, label, fill)
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def draw_label(axes: Axes, label: np.ndarray, fill: float = 0.35, line: float = 1.2) -> None:
    """Fill and outline every structure of a label map (H, W) that occurs in it."""
    for value in np.unique(label[(label > 0) & (label < 255)]):
        mask = label == value
        shade = ListedColormap([colour(value - 1)])
        axes.imshow(np.ma.masked_where(~mask, mask), cmap=shade, alpha=fill, interpolation="nearest")
        axes.contour(mask, levels=[0.5], colors=[colour(value - 1)], linewidths=line)


def structure_legend(figure: Figure, structures: Mapping[int, str]) -> None:
    """One legend of the structures' colours above the figure."""
    handles = [Patch(color=colour(value - 1), label=name) for value, name in structures.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8, frameon=False)


def as_slices(case: Case, volume: np.ndarray | None = None) -> np.ndarray:
    """(slices, H, W) of a case's first channel, or of a map on its grid; a single image becomes one slice."""
    volume = case.image[0] if volume is None else volume
    return volume[None] if volume.ndim == 2 else volume


def montage(case: Case, manifest: Manifest, *, count: int = 6, prediction: np.ndarray | None = None) -> Figure:
    """`count` slices of a case, evenly spread, with its label (and below it a prediction)."""
    images, labels = as_slices(case), as_slices(case, case.label)
    rows = (
        [("label", labels)] if prediction is None else [("label", labels), ("prediction", as_slices(case, prediction))]
    )
    chosen = np.unique(np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int))
    size = (1.7 * len(chosen), 1.9 * len(rows) + 0.7)
    figure, grid = plt.subplots(len(rows), len(chosen), figsize=size, squeeze=False, layout="constrained")
    for row, (name, maps) in zip(grid, rows, strict=True):
        for axes, number in zip(row, chosen, strict=True):
            show_slice(
                axes,
                images[number],
                maps[number],
                title=f"{name}, slice {number}" if name != "label" else f"slice {number}",
            )
    structure_legend(figure, manifest.structures)
    return credit(figure, manifest)


def compare_predictions(
    cases: Sequence[Case], predictions: Sequence[np.ndarray], titles: Sequence[str], manifest: Manifest
) -> Figure:
    """One column a case: its label above, the prediction below, on the slice where they disagree most."""
    size = (2.3 * len(cases), 5.2)
    figure, grid = plt.subplots(2, len(cases), figsize=size, squeeze=False, layout="constrained")
    for column, (case, prediction, title) in enumerate(zip(cases, predictions, titles, strict=True)):
        images, labels, guess = as_slices(case), as_slices(case, case.label), as_slices(case, prediction)
        number = int((labels != guess).sum(axis=(1, 2)).argmax())
        window = around(np.maximum(labels[number] % 255, guess[number]))
        show_slice(grid[0, column], images[number][window], labels[number][window], title=f"{title}\nexpert")
        show_slice(grid[1, column], images[number][window], guess[number][window], title="prediction")
    structure_legend(figure, manifest.structures)
    return credit(figure, manifest)


def around(label: np.ndarray, margin: int = 20) -> tuple[slice, slice]:
    """The square around the structures of a label map (H, W), with a margin; the whole image where there are none."""
    rows, columns = np.nonzero(label)
    if not len(rows):
        return slice(None), slice(None)
    side = max(np.ptp(rows), np.ptp(columns)) + 2 * margin
    middle = [(rows.min() + rows.max()) // 2, (columns.min() + columns.max()) // 2]
    return tuple(slice(max(0, m - side // 2), m + side // 2) for m in middle)


def worst_cases(fitted, frame: pd.DataFrame, *, count: int = 4, best: int = 1) -> Figure:
    """The best and the `count` worst cases by mean Dice of a table made by `evaluate(fitted.predict, ...)`."""
    order = frame.groupby("case_id")["dice"].mean().sort_values()
    chosen = list(order.index[-best:]) + list(order.index[:count])
    cases = [fitted.task.data.load(case_id) for case_id in chosen]
    titles = [f"{case.case_id}\nDice {order[case.case_id]:.2f}" for case in cases]
    return compare_predictions(cases, [fitted.predict(case) for case in cases], titles, fitted.task.data.manifest)


def learning_curves(histories: Mapping[str, Sequence[Mapping]], *, title: str = "") -> Figure:
    """Training loss and held-out Dice against steps: mean line, and a band from the lowest to the highest run."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for number, (name, runs) in enumerate(histories.items()):
        losses = [smooth(run["loss"]) for run in runs]
        steps = runs[0].get("step") or range(1, len(losses[0]) + 1)
        band(left, steps, losses, number, name)
        band(right, runs[0]["val_step"], [run["val_dice"] for run in runs], number, name)
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="step", ylabel="Dice, held-out patients")
    right.legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure


def band(axes: Axes, x, curves: Sequence[Sequence[float]], number: int, name: str) -> None:
    """A mean line with a band from the lowest to the highest curve."""
    stacked = np.asarray(curves, dtype=float)
    axes.plot(x, stacked.mean(0), color=colour(number), label=name)
    axes.fill_between(x, stacked.min(0), stacked.max(0), color=colour(number), alpha=0.2, linewidth=0)
    axes.spines[["top", "right"]].set_visible(False)


def smooth(values: Sequence[float], width: int = 9) -> np.ndarray:
    """Centred moving average that keeps the length."""
    padded = np.pad(np.asarray(values, dtype=float), width // 2, mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def dice_against_labels(frame: pd.DataFrame, *, metric: str = "dice") -> Figure:
    """Dice against the number of labelled patients (the arms' names): a dot a draw, mean line, 95% band."""
    counts = sorted(frame["arm"].unique(), key=int)
    estimates = [interval(frame[frame["arm"] == name], metric) for name in counts]
    x = [int(name) for name in counts]
    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    axes.plot(x, [e.mean for e in estimates], color=PALETTE[0], marker="s")
    axes.fill_between(
        x, [e.low for e in estimates], [e.high for e in estimates], color=PALETTE[0], alpha=0.2, linewidth=0
    )
    for name in counts:
        draws = frame[frame["arm"] == name].groupby("replicate")[metric].mean()
        axes.plot([int(name)] * len(draws), draws, "o", color="0.35", markersize=4, zorder=3)
    axes.set(xscale="log", xticks=x, xlabel="labelled patients", ylabel=f"test {metric}")
    axes.set_xticks(x, [str(count) for count in x])
    axes.minorticks_off()
    handles = [
        Line2D([], [], color=PALETTE[0], marker="s", label="mean and 95% interval"),
        Line2D([], [], color="0.35", marker="o", linestyle="", label="one draw of patients"),
    ]
    axes.legend(handles=handles, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


@draws("labels")
def labels_figure(summary: Summary, frame: pd.DataFrame) -> Figure:
    """The evidence of `labels`: Dice against the number of labelled patients."""
    figure = dice_against_labels(frame, metric=summary.metric)
    figure.axes[0].set_title(f"{summary.title}\n{summary.claim} {summary.verdict}", fontsize=9)
    return credit(figure, summary.dataset)


@draws("unet-acdc")
@draws("unet-hippocampus")
def structures_figure(summary: Summary, frame: pd.DataFrame) -> Figure:
    """One column a structure: a dot a held-out case, coloured by fold, and the mean with its 95% interval."""
    names = list(dict.fromkeys(frame["structure"]))
    figure, axes = plt.subplots(figsize=(1.6 + 1.6 * len(names), 4), layout="constrained")
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
