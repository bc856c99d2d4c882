"""What chapter 18 looks at: frames of a flight with what was followed in them, stages over time, what corruption costs.

`flight_explorer` is for a live notebook; its static twin is `strip_figure`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ipywidgets
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from medcook import plots, statistics
from medcook.data.manifests import Manifest
from medcook.recipes.video import _tracker
from medcook.widgets import live

TRUE, FOUND = plots.colour(1), plots.colour(0)
DISTURBED = "0.88"
"""The grey behind frames that something disturbs."""


class Followed(NamedTuple):
    """A flight in which a structure was followed: frames (T, H, W), where it truly is (T, H, W) bool, {who: where it
    was found (T, H, W) bool}, and which frames are disturbed (T,) bool."""

    frames: np.ndarray
    truth: np.ndarray
    answers: Mapping[str, np.ndarray]
    disturbed: np.ndarray


def overlaps(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(T,) Jaccard indices of masks (T, H, W) bool; 1 where nothing is there and nothing was found."""
    return _tracker.overlaps(torch.from_numpy(found), torch.from_numpy(truth)).numpy()


def strip_figure(shown: Followed, numbers: Sequence[int], manifest: Manifest) -> Figure:
    """Some frames of a flight, a row for everybody who followed: outlined the truth, filled what was found."""
    size = (1.35 * len(numbers) + 1.0, 1.45 * len(shown.answers) + 0.7)
    figure, grid = plots.panels(len(shown.answers), len(numbers), size=size, squeeze=False)
    for place, (row, (name, found)) in enumerate(zip(grid, shown.answers.items(), strict=True)):
        for axes, number in zip(row, numbers, strict=True):
            title = f"frame {number}{' *' * bool(shown.disturbed[number])}"
            draw_frame(axes, shown, found, number, "" if place else title)
        beside = {"transform": row[0].transAxes, "rotation": 90, "ha": "right", "va": "center", "fontsize": 8}
        row[0].text(-0.06, 0.5, name.replace(", ", ",\n"), **beside)
    handles = [Line2D([], [], color=TRUE, label="truth"), Patch(color=FOUND, alpha=0.5, label="found")]
    handles += [Line2D([], [], linestyle="", label="* disturbed")] * bool(shown.disturbed[list(numbers)].any())
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return plots.credit(figure, manifest)


def draw_frame(axes: Axes, shown: Followed, found: np.ndarray, number: int, title: str = "") -> None:
    """One frame with the truth as an outline and a mask of `found` (T, H, W) as a tint."""
    plots.show_slice(axes, shown.frames[number], title=title, limits=tuple(np.percentile(shown.frames, [1, 99.5])))
    plots.tint(axes, found[number], FOUND, opacity=0.45)
    if shown.truth[number].any():
        axes.contour(shown.truth[number], [0.5], colors=TRUE, linewidths=1.2)


def overlap_figure(shown: Followed, manifest: Manifest, marks: Mapping[str, int] | None = None) -> Figure:
    """Overlap with the truth in every frame, a line for everybody; marks {who: the frame from which it followed}."""
    figure, axes = plots.panels(size=(8.5, 3.2))
    shade_bursts(axes, shown.disturbed)
    for number, (name, found) in enumerate(shown.answers.items()):
        values, style = overlaps(found, shown.truth), ("-", "--", "-.", ":")[number % 4]
        axes.plot(values, style, color=plots.colour(number), label=f"{name}: {values.mean():.2f}")
        if marks and name in marks:
            axes.plot(marks[name], values[marks[name]], "o", color=plots.colour(number))
    absent = ~shown.truth.any((1, 2))
    axes.fill_between(range(len(absent)), -0.06, -0.02, where=absent, color="0.3", step="mid")
    axes.set(xlabel="frame (black below: it is not there; grey: disturbed)", ylabel="Jaccard index", ylim=(-0.07, 1.03))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="outside upper center", ncols=2)
    return plots.credit(figure, manifest)


def shade_bursts(axes: Axes, disturbed: np.ndarray) -> None:
    """Grey behind every run of disturbed frames (T,) bool."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], disturbed.astype(int), [0]])))
    for start, end in edges.reshape(-1, 2):
        axes.axvspan(start - 0.5, end - 0.5, color=DISTURBED, linewidth=0)


def ribbon_figure(
    truth: np.ndarray,
    answers: Mapping[str, np.ndarray],
    stages: Mapping[int, str],
    places: np.ndarray,
    disturbed: np.ndarray,
    manifest: Manifest,
) -> Figure:
    """Stages over time: the path of the camera, and below it a ribbon of the truth and of each answer, (T,) all."""
    rows = {"truth": truth, **answers}
    size, heights = (9, 1.7 + 0.42 * len(rows)), {"height_ratios": [3, *[1] * len(rows)]}
    figure, grid = plots.panels(1 + len(rows), 1, size=size, sharex=True, gridspec_kw=heights)
    shade_bursts(grid[0], disturbed)
    grid[0].plot(places, color="black", linewidth=1)
    grid[0].set_ylabel("slice", fontsize=8)
    grid[0].spines[["top", "right"]].set_visible(False)
    palette = ListedColormap([plots.colour(number) for number in range(max(stages) + 1)])
    for axes, (name, found) in zip(grid[1:], rows.items(), strict=True):
        extent = (-0.5, len(found) - 0.5, 0, 1)
        axes.imshow(found[None], cmap=palette, vmin=0, vmax=max(stages), aspect="auto", extent=extent)
        right = "" if name == "truth" else f" {np.mean(found == truth):.0%}"
        axes.set_ylabel(f"{name}{right}", rotation=0, ha="right", va="center", fontsize=8)
        axes.set_yticks([])
    grid[-1].set_xlabel("frame (grey: disturbed)", fontsize=8)
    handles = [Patch(color=plots.colour(value), label=name) for value, name in stages.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(6, len(handles)), fontsize=8, frameon=False)
    return plots.credit(figure, manifest)


def severity_figure(frame: pd.DataFrame, lines: Mapping[str, tuple[str, Mapping[int, str]]], dataset: str) -> Figure:
    """What corruption costs: means over patients with their 95% intervals, against its severity.

    frame  rows of evidence with a column `arm`;   lines {name: (arm, {severity: column})}
    """
    figure, axes = plots.panels(size=(8.2, 4.2))
    for number, (name, (arm, columns)) in enumerate(lines.items()):
        rows = frame[frame["arm"] == arm]
        found = [statistics.interval(rows, column) for column in columns.values()]
        means = np.array([one.mean for one in found])
        ends = [means - [one.low for one in found], [one.high for one in found] - means]
        places = np.array(list(columns)) + 0.07 * (number - (len(lines) - 1) / 2)
        style = {"color": plots.colour(number), "linestyle": ("-", "--", "-.", ":")[number % 4], "linewidth": 1.6}
        axes.errorbar(places, means, yerr=ends, marker="osD^vPX"[number % 7], capsize=2, label=name, **style)
    axes.set(
        xlabel="severity of the corruption", ylabel="Dice", xticks=sorted({s for _, c in lines.values() for s in c})
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return plots.credit(figure, dataset)


def frame_view(shown: Followed, name: str, number: int, manifest: Manifest) -> Figure:
    """One frame with what somebody found in it, and beside it how much of the flight went well."""
    figure, (left, right) = plots.panels(1, 2, size=(8.6, 3.6), gridspec_kw={"width_ratios": (2, 3)})
    values = overlaps(shown.answers[name], shown.truth)
    draw_frame(left, shown, shown.answers[name], number, f"frame {number}: Jaccard index {values[number]:.2f}")
    shade_bursts(right, shown.disturbed)
    right.plot(values, color=FOUND)
    right.axvline(number, color="black", linewidth=1)
    right.set(xlabel="frame (grey: disturbed)", ylabel="Jaccard index", ylim=(-0.03, 1.03), title=name)
    right.spines[["top", "right"]].set_visible(False)
    return plots.credit(figure, manifest)


def flight_explorer(flights: Mapping[str, Followed], manifest: Manifest) -> ipywidgets.VBox:
    """Fly: choose a flight, who follows, and a frame; see the mask in it (see `frame_view`)."""
    which = ipywidgets.Dropdown(options=list(flights), description="flight")
    who = ipywidgets.Dropdown(options=list(next(iter(flights.values())).answers), description="follows")
    last = min(len(one.frames) for one in flights.values()) - 1
    number = ipywidgets.IntSlider(last // 4, 0, last, description="frame")
    return live(lambda flight, name, frame: frame_view(flights[flight], name, frame, manifest), which, who, number)
