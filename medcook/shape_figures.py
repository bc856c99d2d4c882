"""What chapter 16 looks at: forms of a shape, contours that move, what a hidden square does, completed parts."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from torch import Tensor

from medcook import plots
from medcook.data.manifests import Manifest
from medcook.imperfect import signed_distance

LIGHT = np.array([0.4, -0.5, 0.77])
"""Where the light comes from."""


def draw_surface(axes, corners: np.ndarray, shade: str, alpha: float = 1.0) -> None:
    """Triangles (T, 3, 3) in a 3D panel."""
    colours = np.c_[lit(corners, shade), np.full(len(corners), alpha)]
    axes.add_collection3d(Poly3DCollection(corners, facecolors=colours))
    frame(axes, corners.reshape(-1, 3))


def lit(corners: np.ndarray, shade: str) -> np.ndarray:
    """(T, 3): the colour of each triangle (T, 3, 3), brighter where it faces the light."""
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    towards = normals @ LIGHT / np.linalg.norm(normals, axis=1).clip(1e-9)
    return np.outer(0.6 + 0.4 * towards.clip(-1, 1), to_rgb(shade)).clip(0, 1)


def draw_points(axes, points: np.ndarray, shade: str) -> None:
    """Points (N, 3) in a 3D panel."""
    axes.scatter(*points.T, s=2, color=shade, depthshade=False)
    frame(axes, points)


def frame(axes, points: np.ndarray) -> None:
    """Make a 3D panel hold these points (N, 3) and all before them, at one scale along its axes."""
    seen = np.vstack([points.min(0), points.max(0), *getattr(axes, "seen", [])])
    axes.seen = [seen.min(0), seen.max(0)]
    low, high = axes.seen
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), zlim=(low[2], high[2]))
    axes.set_box_aspect(np.maximum(high - low, 1e-9), zoom=1.1)
    axes.set_axis_off()
    axes.view_init(elev=25, azim=-60)


def forms_figure(image: np.ndarray, mask: np.ndarray, rings: np.ndarray, shape, *manifests: Manifest) -> Figure:
    """One shape in five forms.

    image, mask   (H, W): a slice and a structure in it, shown as pixels, landmarks and a level set
    rings         (rings, N, 2): its contours as (x, y) in pixels
    shape         a 3D structure with `corners` and `points`, shown as a mesh and as points
    """
    figure = plots.Shown(figsize=(13, 3.3), layout="constrained")
    panels = [figure.add_subplot(1, 5, number, projection="3d" if number > 3 else None) for number in range(1, 6)]
    for axes, title in zip(panels, ("pixels", "landmarks", "a level set", "a mesh", "points"), strict=True):
        axes.set_title(title, fontsize=9)
    for axes in panels[:2]:
        plots.show_slice(axes, image, title=axes.get_title())
    plots.tint(panels[0], mask, plots.PALETTE[4], 0.6)
    draw_rings(panels[1], rings)
    draw_level_set(panels[2], signed_distance(mask[None])[0])
    draw_surface(panels[3], shape.corners, plots.PALETTE[4])
    draw_points(panels[4], shape.points(1500), plots.PALETTE[0])
    return plots.credit(figure, *manifests)


def draw_rings(axes: Axes, rings: np.ndarray) -> None:
    """Closed contours (rings, N, 2) of (x, y) with their points."""
    for ring in rings:
        axes.plot(*np.vstack([ring, ring[:1]]).T, "-o", color=plots.PALETTE[1], markersize=2.5, linewidth=1)


def draw_level_set(axes: Axes, level: np.ndarray) -> None:
    """A function (H, W) of which the contour is where it is zero."""
    limit = np.abs(level[np.isfinite(level)]).max()
    axes.imshow(level, cmap="PuOr", vmin=-limit, vmax=limit)
    axes.contour(level, [0], colors="black", linewidths=1.4)
    axes.set_axis_off()


def covered_figure(
    image: np.ndarray, truth: np.ndarray, answers: Mapping[str, np.ndarray], manifest: Manifest
) -> Figure:
    """An image (H, W) of which a part is hidden, what is true (H, W) and what each method says (H, W)."""
    figure, row = plots.panels(1, 1 + len(answers), size=(2.9 * (1 + len(answers)), 3.5))
    for axes, (title, mask) in zip(row, {"reference": truth, **answers}.items(), strict=True):
        plots.show_slice(axes, image, mask.astype(np.uint8), title=title)
    return plots.credit(figure, manifest)


def completion_figure(
    given: np.ndarray, answers: Mapping[str, tuple[np.ndarray, float]], corners, manifest: Manifest
) -> Figure:
    """What is left of a shape and how it was completed; parts added are orange.

    given    (*size) bool: what is left
    answers  {name: (what was added (*size) bool, Dice or NaN)}
    corners  makes triangles (T, 3, 3) of a mask
    """
    figure = plots.Shown(figsize=(2.9 * (1 + len(answers)), 3.2), layout="constrained")
    for number, (name, (added, score)) in enumerate({"what is left": (given & False, np.nan), **answers}.items()):
        axes = figure.add_subplot(1, 1 + len(answers), number + 1, projection="3d")
        draw_surface(axes, corners(given), plots.PALETTE[4])
        if added.any():
            draw_surface(axes, corners(added), plots.PALETTE[1])
        axes.set_title(name if np.isnan(score) else f"{name}: Dice {score:.2f}", fontsize=9)
    share_frame(figure)
    return plots.credit(figure, manifest)


def share_frame(figure: Figure) -> None:
    """Give all 3D panels of a figure the same limits, so that what is moved is seen to be."""
    seen = np.vstack([corner for axes in figure.axes for corner in axes.seen])
    for axes in figure.axes:
        frame(axes, seen)


@torch.no_grad()
def movement(contour, image: Tensor, level: Tensor, moments: int = 4) -> list[np.ndarray]:
    """A level set (H, W) at the start and at `moments` equally spaced times of a contour's way over (1, 1, H, W)."""
    views, level = contour.views(image.float()), level[None, None]
    found = [level[0, 0].numpy()]
    for _ in range(moments):
        for _ in range(contour.steps // moments):
            level = contour.moved(level, views)
        found.append(level[0, 0].numpy())
    return found


def starts_figure(
    image: np.ndarray, truth: np.ndarray, moves: Mapping[str, Sequence[np.ndarray]], manifest: Manifest
) -> Figure:
    """Contours that move over an image (H, W): one row a method, one panel a moment.

    truth   (H, W) bool, dotted
    moves   {name: level sets (H, W) at some moments}, negative or positive inside; the zero line is drawn
    """
    moments = max(len(levels) for levels in moves.values())
    figure, grid = plots.panels(len(moves), moments, size=(2.3 * moments, 2.4 * len(moves)), squeeze=False)
    for row, (name, levels) in zip(grid, moves.items(), strict=True):
        for number, (axes, level) in enumerate(zip(row, levels, strict=False)):
            plots.show_slice(axes, image, title=f"{name}: start" if not number else f"after {number}/{moments - 1}")
            axes.contour(truth, [0.5], colors="white", linewidths=1, linestyles=":")
            if level.min() < 0 < level.max():
                axes.contour(level, [0], colors=plots.PALETTE[1], linewidths=1.5)
    return plots.credit(figure, manifest)
