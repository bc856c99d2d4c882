"""What chapter 09 looks at: a volume in three planes, what an answer sees of it, and where slices go wrong."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from medcook import metrics, plots
from medcook.data import Case
from medcook.data.manifests import Manifest

AXES = ("first", "second", "third")
SIDE = 7
"""Voxels along a side of the drawn cubes."""

SIGHTS = ("one slice", "neighbouring slices", "three views", "a slab", "whole, every other voxel")
FARTHEST = 5
"""Slices from the end of a structure from which on they are counted together."""


def seen_voxels(sight: str, side: int = SIDE) -> np.ndarray:
    """(side, side, side) bool: which voxels of a cube the answer at its middle can depend on; see `SIGHTS`."""
    middle = side // 2
    away = np.abs(np.indices((side, side, side)) - middle)
    if sight == "one slice":
        return away[2] == 0
    if sight == "neighbouring slices":
        return away[2] <= 1
    if sight == "three views":
        return (away == 0).any(0)
    if sight == "a slab":
        return away[2] <= 2
    return (away % 2 == 0).all(0)


def sights_figure(names: Mapping[str, str]) -> Figure:
    """A cube for each of `SIGHTS` with the voxels that an answer sees, the answer's own dark; {sight: text below}."""
    figure, row = plots.panels(1, len(SIGHTS), size=(13, 3.4), subplot_kw={"projection": "3d"})
    middle = SIDE // 2
    for axes, sight in zip(row, SIGHTS, strict=True):
        seen = seen_voxels(sight)
        shades = np.full(seen.shape, plots.PALETTE[4])
        shades[middle, middle, :] = plots.PALETTE[0]
        shades[middle, middle, middle] = plots.PALETTE[5]
        front = np.indices(seen.shape)[1] < middle  # cut away what hides the middle
        axes.voxels(seen & ~front, facecolors=shades, edgecolor="white", linewidth=0.3, alpha=0.9)
        draw_cube(axes, SIDE)
        axes.set_title(f"{sight}\n{seen.mean():.0%} of the voxels", fontsize=10)
        axes.text2D(0.5, -0.05, names.get(sight, ""), transform=axes.transAxes, ha="center", va="top", fontsize=8)
    return figure


def draw_cube(axes, side: int) -> None:
    """The edges of a cube, and nothing else of the axes."""
    for start in np.ndindex(2, 2, 2):
        for axis in range(3):
            if start[axis] == 0:
                end = [value + (place == axis) for place, value in enumerate(start)]
                axes.plot(*np.transpose([start, end]) * side, color="0.7", linewidth=0.8)
    axes.set(xlim=(0, side), ylim=(0, side), zlim=(0, side))
    axes.set_box_aspect((1, 1, 1))
    axes.view_init(elev=22, azim=-62)
    axes.set_axis_off()


def plane(volume: np.ndarray, axis: int, number: int) -> np.ndarray:
    """Slice `number` across an axis of (X, Y, Z): the other two axes, the later one upwards."""
    return np.take(volume, number, axis=axis).T[::-1]


def aspect(spacing: Sequence[float] | None, axis: int) -> float:
    """Height of a pixel of `plane` over its width; 1 where the spacing is not known."""
    if spacing is None:
        return 1.0
    first, second = (size for place, size in enumerate(spacing) if place != axis)
    return second / first


def most_wrong(case: Case, answers: Collection[np.ndarray]) -> tuple[int, int, int]:
    """In each axis the slice in which answers differ most from the label, together; with none, that with most of it."""
    wrong = sum((answer != case.label).astype(int) for answer in answers or [np.zeros_like(case.label)])
    return tuple(int(wrong.sum(axis=tuple({0, 1, 2} - {axis})).argmax()) for axis in range(3))


def draw_plane(axes, case: Case, label: np.ndarray | None, axis: int, number: int, title: str = "") -> None:
    """A slice across an axis of a volume, with a label map's outlines, in its true proportions."""
    outlined = None if label is None else plane(label, axis, number)
    image = plane(case.image[0], axis, number)
    limits = tuple(np.percentile(case.image, [1, 99.5]))
    plots.show_slice(axes, image, outlined, title=title, limits=limits, aspect=aspect(case.spacing, axis))


def planes_figure(case: Case, answers: Mapping[str, np.ndarray], manifest: Manifest) -> Figure:
    """For each axis a slice across it: a row with reference and answers where these differ most, or one row of them."""
    where, maps = most_wrong(case, answers.values()), {"reference": case.label, **answers}
    heights = [f"across the {AXES[axis]} axis,\nslice {where[axis]}" for axis in range(3)]
    if not answers:
        figure, row = plots.panels(1, 3, size=(8.4, 3.6))
        for axis, axes in enumerate(row):
            draw_plane(axes, case, case.label, axis, where[axis], heights[axis])
    else:
        figure, grid = plots.panels(3, len(maps), size=(2.3 * len(maps), 7.2))
        beside = {"rotation": 90, "ha": "right", "va": "center", "fontsize": 8}
        for axis, row in enumerate(grid):
            for axes, (name, label) in zip(row, maps.items(), strict=True):
                draw_plane(axes, case, label, axis, where[axis], name if axis == 0 else "")
            row[0].text(-0.06, 0.5, heights[axis], transform=row[0].transAxes, **beside)
    plots.structure_legend(figure, manifest.structures)
    return plots.credit(figure, manifest)


def plane_view(case: Case, label: np.ndarray, axis: int, number: int, manifest: Manifest, name: str) -> Figure:
    """Reference and an answer on one slice across an axis; a slice beyond the last is the last."""
    number = min(number, case.label.shape[axis] - 1)
    figure, row = plots.panels(1, 2, size=(7.6, 4.4))
    for axes, (title, shown) in zip(row, {"reference": case.label, name: label}.items(), strict=True):
        draw_plane(axes, case, shown, axis, number, f"{title}: across the {AXES[axis]} axis, slice {number}")
    plots.structure_legend(figure, manifest.structures)
    return plots.credit(figure, manifest)


def jumps(label: np.ndarray, axis: int) -> int:
    """Neighbouring voxels along an axis that do not have the same label."""
    return int((np.diff(label.astype(np.int16), axis=axis) != 0).sum())


def jump_table(cases: Sequence[Case], answers: Mapping[str, Sequence[np.ndarray]]) -> pd.DataFrame:
    """A row a method: jumps along each axis over those of the reference, all cases together; 1 is as smooth as it."""
    reference = [sum(jumps(case.label, axis) for case in cases) for axis in range(3)]
    rows = {
        name: [sum(jumps(label, axis) for label in labels) / reference[axis] for axis in range(3)]
        for name, labels in answers.items()
    }
    return pd.DataFrame(rows, index=[f"along the {name} axis" for name in AXES]).T


def slice_scores(case: Case, prediction: np.ndarray, axis: int) -> pd.DataFrame:
    """A row for each slice across an axis that has a structure: structure, from_end (0: its first or last slice), dice.

    A slice with a structure in which nothing was found has a Dice of 0.
    """
    rows = []
    for value in np.unique(case.label[(case.label > 0) & (case.label < 255)]):
        truth, found = case.label == value, prediction == value
        there = np.flatnonzero(truth.any(axis=tuple({0, 1, 2} - {axis})))
        for number in there:
            dice = metrics.dice(np.take(found, number, axis), np.take(truth, number, axis))
            end = min(number - there[0], there[-1] - number)
            rows.append({"patient_id": case.patient_id, "structure": int(value), "from_end": int(end), "dice": dice})
    return pd.DataFrame(rows, columns=["patient_id", "structure", "from_end", "dice"])


def ends_figure(cases: Sequence[Case], answers: Mapping[str, Sequence[np.ndarray]], axis: int, credit: str) -> Figure:
    """Mean Dice of a slice across an axis against its distance from the structure's end, with its standard error."""
    figure, axes = plots.panels(size=(7, 3.8))
    for number, (name, labels) in enumerate(answers.items()):
        scored = pd.concat([slice_scores(case, label, axis) for case, label in zip(cases, labels, strict=True)])
        scored["from_end"] = scored["from_end"].clip(upper=FARTHEST)
        each = scored.groupby(["patient_id", "from_end"])["dice"].mean().unstack()
        places = each.columns + 0.06 * (number - (len(answers) - 1) / 2)
        style = {"color": plots.colour(number), "marker": "os^Dv"[number % 5], "capsize": 2, "label": name}
        axes.errorbar(places, each.mean(), each.std() / np.sqrt(each.count()), **style)
    ticks = [str(place) for place in range(FARTHEST)] + [f"{FARTHEST} or more"]
    axes.set_xticks(range(FARTHEST + 1), ticks)
    axes.set(xlabel="slices from the end of the structure", ylabel="Dice of a slice")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return plots.credit(figure, credit)
