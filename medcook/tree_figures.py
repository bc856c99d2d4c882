"""What chapter 16 looks at in trees: the diameter along vessels and where it falls, and the names of bronchi."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from medcook import plots
from medcook.data.manifests import Manifest

WIDE = plots.PALETTE[0]
TRUE = "0.35"
FOUND, MISSED = plots.PALETTE[5], plots.PALETTE[1]


def diameters_figure(
    image: np.ndarray, tree: Sequence, found: Sequence, truth: Sequence, manifest: Manifest, most: int = 3
) -> Figure:
    """An angiogram (H, W) with its centre lines, as wide as was measured, and the diameter along some branches.

    tree   branches that were measured, with `points` (N, 2), `radius` (N,) and `arc` (N,)
    found  stenoses that were found, with `place` and `degree`
    truth  branches that were drawn, with `stenoses`; the branches on which these lie are shown, at most so many,
           or the longest one
    """
    shown = of_interest(tree, truth, most)
    size = (4.2 + 3.4 * len(shown), 4.2)
    figure, row = plots.panels(1, 1 + len(shown), size=size, gridspec_kw={"width_ratios": [3.6] + [3] * len(shown)})
    panels = np.atleast_1d(row)
    plots.show_slice(panels[0], image, title="an image with drawn vessels")
    draw_tree(panels[0], tree)
    for number, branch in enumerate(shown):
        panels[0].text(*branch.points[len(branch.points) // 2, ::-1] + 2, "ABC"[number % 3], color="white", fontsize=11)
    for stenosis in found:
        panels[0].plot(*stenosis.place[::-1], "o", color=FOUND, markersize=11, fillstyle="none", markeredgewidth=1.8)
    for number, (axes, branch) in enumerate(zip(panels[1:], shown, strict=True)):
        draw_diameter(axes, branch, found, truth, f"branch {'ABC'[number % 3]}")
    return plots.credit(figure, manifest)


def of_interest(tree: Sequence, truth: Sequence, most: int) -> list:
    """The branches of a measured tree that are nearest to the stenoses that were drawn, the deepest first; else the
    longest."""
    drawn = [(branch.points[one.at], one.degree) for branch in truth for one in branch.stenoses]
    chosen = []
    for place, _ in sorted(drawn, key=lambda each: -each[1])[:most]:
        nearest = min(tree, key=lambda branch: np.linalg.norm(branch.points - place, axis=1).min(), default=None)
        chosen += [nearest] if nearest is not None and not any(nearest is one for one in chosen) else []
    return chosen or sorted(tree, key=lambda branch: -branch.length)[:1]


def draw_tree(axes: Axes, tree: Sequence, shade: str = WIDE) -> None:
    """Centre lines, and the two edges that their radii say, of branches over an image."""
    for branch in tree:
        way = np.gradient(branch.points, axis=0)
        normal = np.stack([-way[:, 1], way[:, 0]], 1) / np.linalg.norm(way, axis=1, keepdims=True).clip(1e-9)
        axes.plot(*branch.points.T[::-1], color=shade, linewidth=1.0)
        for side in (-1, 1):
            edge = branch.points + side * branch.radius[:, None] * normal
            axes.plot(*edge.T[::-1], color=shade, linewidth=0.6, linestyle=":")


def draw_diameter(axes: Axes, branch, found: Sequence, truth: Sequence, title: str) -> None:
    """The measured diameter along a branch, the true one at each of its points, and stenoses that were found on it."""
    axes.plot(branch.arc, 2 * branch.radius, color=WIDE, label="measured")
    axes.plot(branch.arc, true_diameter(branch, truth), color=TRUE, linestyle="--", label="true")
    for stenosis in found:
        away = np.linalg.norm(branch.points - stenosis.place, axis=1)
        if away.min() < 1e-6:
            at = away.argmin()
            axes.plot(branch.arc[at], 2 * branch.radius[at], "o", color=FOUND, fillstyle="none", markersize=11)
            below = {"xytext": (6, -12), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(f"{stenosis.degree:.0%} is gone", (branch.arc[at], 2 * branch.radius[at]), **below)
    axes.set(title=title, xlabel="pixels along the branch", ylabel="diameter in pixels", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower left")


def true_diameter(branch, truth: Sequence) -> np.ndarray:
    """(N,) the diameter that was drawn, nearest to each point of a branch; NaN without a tree."""
    if not len(truth):
        return np.full(len(branch.points), np.nan)
    points = np.concatenate([one.points for one in truth])
    radius = np.concatenate([one.radius for one in truth])
    return 2 * radius[np.linalg.norm(branch.points[:, None] - points, axis=-1).argmin(1)]


def frame(axes: Axes, points: Sequence[np.ndarray], margin: float = 4.0) -> None:
    """Make a panel hold these points (N, 2), rows downwards, and show nothing else of its axes."""
    low, high = np.concatenate(points).min(0) - margin, np.concatenate(points).max(0) + margin
    axes.set(xlim=(low[1], high[1]), ylim=(high[0], low[0]), aspect="equal")
    axes.set_axis_off()


def names_figure(
    image: np.ndarray, trees: Mapping[str, Sequence], lobe_of, name_of, lobes: Sequence[str], manifest: Manifest
) -> Figure:
    """An image (H, W) with airways, and trees of it whose branches have names, a colour for each lobe.

    trees    {title: branches with `points` and `radius`}
    lobe_of  of a branch, from 1; 0: none;   name_of  of a branch: what is written at its end, "" for nothing
    """
    figure, row = plots.panels(1, 1 + len(trees), size=(4.6 * (1 + len(trees)), 5.0))
    plots.show_slice(row[0], image, title="an image with drawn airways")
    for axes, (title, tree) in zip(row[1:], trees.items(), strict=True):
        axes.set_title(title)
        frame(axes, [branch.points for one in trees.values() for branch in one])
        for branch in tree:
            lobe = lobe_of(branch)
            shade = plots.colour(lobe - 1) if lobe else "0.5"
            axes.plot(*branch.points.T[::-1], color=shade, linewidth=0.8 + branch.radius.mean(), solid_capstyle="round")
            if name_of(branch):
                axes.text(*branch.points[-1, ::-1], name_of(branch), fontsize=6.5, ha="center", va="center")
    handles = [Line2D([], [], color=plots.colour(k), linewidth=3, label=name) for k, name in enumerate(lobes)]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(lobes), frameon=False, fontsize=8)
    return plots.credit(figure, manifest)
