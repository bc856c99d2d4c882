"""What chapter 19 looks at: who is told what from which part of an image, where a classifier looks, who ranks best."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from medcook import plots, pooled
from medcook.data.manifests import Manifest

OUTLINE = plots.colour(1)


class Diagnosed(NamedTuple):
    """An image (H, W), the mask (H, W) bool of what is diagnosed, what it is, and {who: probability of the outcome}."""

    image: np.ndarray
    mask: np.ndarray
    truth: str
    probabilities: Mapping[str, float]


def diagnosed_figure(shown: Sequence[Diagnosed], manifest: Manifest, side: int = 32, outcome: str = "malignant"):
    """Whole images, their surroundings of `side` pixels, and how probable everyone holds the outcome to be."""
    size, heights = (1.75 * len(shown) + 1.0, 5.0), {"height_ratios": (3, 3, 2)}
    figure, axes = plots.panels(3, len(shown), size=size, squeeze=False, gridspec_kw=heights)
    for number, (whole, near, bars) in enumerate(axes.T):
        one = shown[number]
        plots.show_slice(whole, one.image, title=one.truth)
        whole.contour(one.mask, [0.5], colors=OUTLINE, linewidths=1.2)
        plots.show_slice(near, cut_around(one.image, one.mask, side))
        draw_probabilities(bars, one.probabilities, names=number == 0)
    axes[2, 0].set_xlabel(f"probability: {outcome}", fontsize=8, loc="left")
    return plots.credit(figure, manifest)


def draw_probabilities(axes: Axes, probabilities: Mapping[str, float], names: bool = True) -> None:
    """A bar for everyone, and a line at one half."""
    places = range(len(probabilities))
    colours = [plots.colour(2 + number) for number in places]
    axes.barh(places, list(probabilities.values()), color=colours, height=0.7)
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "½", "1"], fontsize=8)
    axes.set_yticks(places, list(probabilities) if names else [""] * len(probabilities), fontsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def cut_around(image: np.ndarray, mask: np.ndarray, side: int) -> np.ndarray:
    """A square (side, side) of an image (H, W) around the middle of a mask, or of the image; moved to lie inside."""
    places = np.argwhere(mask) if mask.any() else np.array(image.shape)[None] // 2
    low = [
        int(np.clip(round(middle) - side // 2, 0, max(length - side, 0)))
        for middle, length in zip(places.mean(0), image.shape, strict=True)
    ]
    return image[low[0] : low[0] + side, low[1] : low[1] + side]


def roc_figure(frames: Mapping[str, pd.DataFrame], dataset: str) -> Figure:
    """How many of the sick are found at which price in false alarms; frames have columns `score` and `outcome`."""
    figure, axes = plots.panels(size=(4.6, 4.2))
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    for number, (name, frame) in enumerate(frames.items()):
        alarms, found, _ = roc_curve(frame.outcome, frame.score)
        area = pooled.auc(frame.score.to_numpy(), frame.outcome.to_numpy())
        style = ("-", "--", "-.")[number % 3]
        axes.plot(alarms, found, style, color=plots.colour(2 + number), label=f"{name}: {area:.2f}")
    axes.set_xlabel("false alarms among those without (1 - specificity)")
    axes.set_ylabel("found among those with it (sensitivity)")
    axes.set_aspect("equal")
    axes.legend(title="area under the curve", fontsize=8, title_fontsize=8, loc="lower right")
    return plots.credit(figure, dataset)


def questions_figure(frame: pd.DataFrame, value: str, label: str, dataset: str) -> Figure:
    """A line for each `structure` of a frame, and on it each arm's mean of a column, in the order of the rows."""
    means = frame.pivot_table(index="structure", columns="arm", values=value, sort=False)
    figure, axes = plots.panels(size=(6.4, 0.42 * len(means) + 1.3))
    for number, (arm, column) in enumerate(means.items()):
        style = {"marker": "osD^v"[number % 5], "color": plots.colour(number), "linestyle": "none"}
        places = np.arange(len(means)) + 0.13 * (number - (means.shape[1] - 1) / 2)
        axes.plot(column, places, label=arm, markersize=6, **style)
    axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(means)), means.index)
    axes.set_ylim(len(means) - 0.5, -0.5)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlabel(label)
    axes.locator_params(axis="x", nbins=6)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return plots.credit(figure, dataset)


def maps_figure(rows: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]], manifest: Manifest) -> Figure:
    """Where a classifier looks: a row for each name, of images (H, W), maps (H, W) from 0 to 1, and masks (H, W)."""
    columns = max(map(len, rows.values()))
    size = (1.9 * columns + 1.2, 2.0 * len(rows) + 0.5)
    figure, axes = plots.panels(len(rows), columns, size=size, squeeze=False)
    for panels, (name, shown) in zip(axes, rows.items(), strict=True):
        for axes_, (image, heat, mask) in zip(panels, shown, strict=False):
            plots.show_slice(axes_, image)
            drawn = axes_.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.55 * np.clip(heat * 2, 0, 1))
            if mask.any() and not mask.all():
                axes_.contour(mask, [0.5], colors=plots.colour(0), linewidths=1.0)
        for axes_ in panels[len(shown) :]:
            axes_.set_axis_off()
        where = {"transform": panels[0].transAxes, "rotation": 90, "ha": "right", "va": "center"}
        panels[0].text(-0.06, 0.5, name, fontsize=9, **where)
    figure.colorbar(drawn, ax=axes, shrink=0.6, label="activation")
    return plots.credit(figure, manifest)
