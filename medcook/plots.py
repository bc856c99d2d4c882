"""Figures. Colours are Okabe and Ito's, which colour-blind readers can tell apart; images carry their credit."""

import io
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from medcook.data import Case
from medcook.data.manifests import Manifest, load_manifest
from medcook.statistics import interval

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")

CREDIT_CHARACTERS = 15
"""Characters of a credit that fit into an inch of its figure."""


def colour(number: int) -> str:
    """The colour of arm or structure `number`, counted from 0."""
    return PALETTE[number % len(PALETTE)]


class Shown(Figure):
    """A figure that a notebook shows where a cell returns or displays it, and only there (pyplot shows it twice)."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=88)
        return buffer.getvalue()


def panels(rows: int = 1, columns: int = 1, *, size: tuple[float, float], **options):
    """A new figure of `size` inches and its axes."""
    figure = Shown(figsize=size, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)
    return figure, figure.subplots(rows, columns, **options)


def credit(figure: Figure, *manifests: Manifest | str) -> Figure:
    """Write where the images come from, their licence, and whether they are simulated, under a figure; each once."""
    lines = []
    for manifest in manifests:
        manifest = load_manifest(manifest) if isinstance(manifest, str) else manifest
        simulated = "Simulated data. " if manifest.simulated else ""
        lines.append(f"{simulated}{manifest.title}. Licence: {manifest.licence}.")
    width = int(CREDIT_CHARACTERS * figure.get_figwidth())
    wrapped = [part for line in dict.fromkeys(lines) for part in textwrap.wrap(line, width=width)]
    figure.supxlabel("\n".join(wrapped), fontsize=7, color="0.4")
    return figure


def show_slice(
    axes: Axes,
    image: np.ndarray,
    label: np.ndarray | None = None,
    *,
    title: str = "",
    fill: float = 0.35,
    limits: tuple[float, float] | None = None,
    aspect: float = 1.0,
):
    """Grey image (H, W) with the structures of a label map (H, W) as coloured outlines over a light fill.

    limits  values shown black and white (None: nearly the whole range); `aspect` is a row's size over a column's
    """
    low, high = np.percentile(image, [1, 99.5]) if limits is None else limits
    axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
    if label is not None:
        draw_label(axes, label, fill)
    axes.set_aspect(aspect)
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def draw_label(axes: Axes, label: np.ndarray, fill: float = 0.35, line: float = 1.2) -> None:
    """Fill and outline every structure of a label map (H, W) that occurs in it."""
    for value in np.unique(label[(label > 0) & (label < 255)]):
        mask = label == value
        shade = ListedColormap([colour(value - 1)])
        axes.imshow(np.ma.masked_where(~mask, mask), cmap=shade, alpha=fill, interpolation="nearest")
        axes.contour(mask, levels=[0.5], colors=[colour(value - 1)], linewidths=line)


def tint(axes: Axes, mask: np.ndarray, shade: str, opacity: float = 0.75) -> None:
    """Lay a colour (#RRGGBB) over the pixels of a mask (H, W) bool."""
    layer = np.zeros((*mask.shape, 4))
    layer[mask] = (*to_rgb(shade), opacity)
    axes.imshow(layer, interpolation="nearest")


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
    figure, grid = panels(len(rows), len(chosen), squeeze=False, size=size)
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
    figure, grid = panels(2, len(cases), squeeze=False, size=size)
    for column, (case, prediction, title) in enumerate(zip(cases, predictions, titles, strict=True)):
        images, labels, guess = as_slices(case), as_slices(case, case.label), as_slices(case, prediction)
        number = int((labels != guess).sum(axis=(1, 2)).argmax())
        window = around(np.maximum(labels[number] % 255, guess[number]))
        show_slice(grid[0, column], images[number][window], labels[number][window], title=f"{title}\nreference")
        show_slice(grid[1, column], images[number][window], guess[number][window], title="prediction")
    structure_legend(figure, manifest.structures)
    return credit(figure, manifest)


def compare_methods(case: Case, answers: Mapping[str, np.ndarray], manifest: Manifest) -> Figure:
    """The label and every method's answer to one case, on the slice where they disagree most with it together."""
    maps = {"reference": as_slices(case, case.label)} | {name: as_slices(case, each) for name, each in answers.items()}
    labels, *guesses = maps.values()
    number = int(sum((labels != guess).sum(axis=(1, 2)) for guess in guesses).argmax())
    window = around(np.max([each[number] % 255 for each in maps.values()], axis=0))
    figure, grid = panels(1, len(maps), squeeze=False, size=(2.3 * len(maps), 2.9))
    for axes, (name, each) in zip(grid[0], maps.items(), strict=True):
        show_slice(axes, as_slices(case)[number][window], each[number][window], title=name)
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
    """Training loss and held-out Dice against steps: mean line, and a band from the lowest to the highest run.

    Where nobody was held out, of the loss alone.
    """
    checked = any(len(run["val_step"]) for runs in histories.values() for run in runs)
    figure, axes = panels(1, 1 + checked, size=(9 if checked else 5.4, 3.4))
    left, right = axes if checked else (axes, None)
    for number, (name, runs) in enumerate(histories.items()):
        losses = [smooth(run["loss"]) for run in runs]
        steps = runs[0].get("step") or range(1, len(losses[0]) + 1)
        band(left, steps, losses, number, name)
        if checked:
            band(right, runs[0]["val_step"], [run["val_dice"] for run in runs], number, name)
    left.set(xlabel="step", ylabel="training loss")
    if checked:
        right.set(xlabel="step", ylabel="Dice, held-out patients")
    for each in figure.axes:
        each.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.axes[-1].legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure


def band(axes: Axes, x, curves: Sequence[Sequence[float]], number: int, name: str) -> None:
    """A mean line with a band from the lowest to the highest curve."""
    stacked = np.asarray(curves, dtype=float)
    marker = "o" if len(x) <= 12 else None
    axes.plot(x, stacked.mean(0), color=colour(number), label=name, marker=marker, markersize=4)
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
    figure, axes = panels(size=(6, 3.8))
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


def raters_figure(case: Case, manifest: Manifest, names: Sequence[str], value: int = 1, *, number: int = 0) -> Figure:
    """One structure as every rater drew it: the outlines (slice `number`), and how many raters claim each pixel.

    names  one per rater, WHO or WHO_TOOL; outlines have a colour by who and a dash by tool
    """
    image, drawn = as_slices(case)[number], case.raters == value
    drawn = drawn if drawn.ndim == 3 else drawn[:, number]
    window = around(drawn.any(0), margin=12)
    people, tools = [list(dict.fromkeys(part)) for part in zip(*(split_name(name) for name in names), strict=True)]
    figure, (left, right) = panels(1, 2, size=(9.5, 4.4))
    show_slice(left, image[window], title=f"{case.case_id}: {manifest.structures[value]}, {len(names)} annotations")
    for name, mask in zip(names, drawn, strict=True):
        who, tool = split_name(name)
        style = ("solid", "dashed")[tools.index(tool) % 2]
        line = {"colors": [colour(people.index(who))], "linestyles": style, "linewidths": 1.1}
        left.contour(mask[window], levels=[0.5], **line)
    handles = [Line2D([], [], color=colour(place), label=who) for place, who in enumerate(people)]
    handles += [
        Line2D([], [], color="0.4", linestyle=("solid", "dashed")[place % 2], label=tool)
        for place, tool in enumerate(tools)
        if tool
    ]
    left.legend(handles=handles, fontsize=7, loc="upper left", bbox_to_anchor=(-0.02, -0.01), ncols=4, frameon=False)
    votes = right.imshow(drawn[:, *window].sum(0), cmap="cividis", vmin=0, vmax=len(names))
    right.set_title("how many annotations contain the pixel", fontsize=9)
    right.set_axis_off()
    figure.colorbar(votes, ax=right, shrink=0.8, ticks=MaxNLocator(integer=True))
    return credit(figure, manifest)


def split_name(name: str) -> tuple[str, str]:
    """WHO and TOOL of WHO_TOOL; the tool is empty where none is named."""
    who, _, tool = name.partition("_")
    return who, tool


def histograms(treatments: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """One panel a treatment, one curve an image: the density of its grey values."""
    figure, row = panels(1, len(treatments), size=(4.6 * len(treatments), 3.4), squeeze=False)
    for axes, (title, images) in zip(row[0], treatments.items(), strict=True):
        low = min(np.percentile(image, 0.1) for image in images.values())
        high = max(np.percentile(image, 99.8) for image in images.values())
        for number, (name, image) in enumerate(images.items()):
            share, edges = np.histogram(image, bins=40, range=(low, high))
            axes.plot((edges[1:] + edges[:-1]) / 2, smooth(share / share.sum(), 3), color=colour(number), label=name)
        axes.set(xlabel="grey value", ylabel="share of voxels", title=title)
        axes.spines[["top", "right"]].set_visible(False)
    row[0, 0].legend(fontsize=8, frameon=False)
    return figure


def class_balance(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    """Share of voxels of every structure, {data set: {structure: share}}, on a logarithmic axis."""
    rows = [(data, name, share) for data, known in shares.items() for name, share in known.items()]
    figure, axes = panels(size=(8, 0.9 + 0.27 * len(rows)))
    sets = list(shares)
    for place, (data, _, share) in enumerate(rows):
        axes.barh(place, share, color=colour(sets.index(data)))
        axes.text(share * 1.12, place, f"{share:.2%}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [name for _, name, _ in rows], fontsize=8)
    axes.set(xscale="log", xlabel="share of annotated voxels", ylim=(len(rows) - 0.4, -0.6))
    axes.set_xlim(10 ** np.floor(np.log10(min(share for *_, share in rows))), 1)
    axes.legend(handles=[Patch(color=colour(n), label=data) for n, data in enumerate(sets)], frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
