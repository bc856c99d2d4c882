"""What chapter 17 looks at: instances outlined and numbered, votes for centroids, who counts right, segments.

Colours alone never tell instances apart: each has its number in its middle, too.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import ipywidgets
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from scipy import ndimage

from medcook import plots
from medcook.data.manifests import Manifest
from medcook.widgets import live

SHOWN = 150
"""Votes that are drawn as lines."""
SHADES = 40
COMPOSED = "Composed slides: how sections lie, tears, stain, dust and pen are simulated."


class Counted(NamedTuple):
    """A slide's light (3, H, W), its true sections (H, W), and {who: the sections (H, W) that were found}."""

    light: np.ndarray
    truth: np.ndarray
    found: Mapping[str, np.ndarray]


def count(instances: np.ndarray) -> int:
    """How many instances a map (H, W) has."""
    return len(np.unique(instances[instances > 0]))


def credit(figure: Figure, manifest: Manifest) -> Figure:
    """Write under a figure what is simulated on its slides, and where the rest comes from."""
    plots.credit(figure, manifest)
    figure.supxlabel(f"{COMPOSED}\n{figure.get_supxlabel()}", fontsize=7, color="0.4")
    return figure


def show_light(axes: Axes, light: np.ndarray, title: str = "") -> None:
    """A slide (3, H, W), 0 to 1, in `SHADES` of its colours: noise that nobody sees would make large files."""
    axes.imshow(np.round(np.moveaxis(light, 0, -1) * SHADES) / SHADES, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def outline(axes: Axes, instances: np.ndarray, shade: str | None = None) -> None:
    """Every instance of a map (H, W) outlined, in a colour of its own or all in one, with its number in its middle."""
    height, width = instances.shape
    for position, number in enumerate(np.unique(instances[instances > 0])):
        mask, colour = instances == number, shade or plots.colour(position)
        axes.contour(np.pad(mask, 1), [0.5], colors=[colour], linewidths=1.4, extent=(-1, width, -1, height))
        row, column = ndimage.center_of_mass(mask)
        style = {"fontsize": 8, "weight": "bold", "ha": "center", "va": "center"}
        text = axes.text(column, row, str(position + 1), color=colour, **style)
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def counted_figure(shown: Sequence[Counted], manifest: Manifest, across: bool = False) -> Figure:
    """Slides with their true sections, and what everyone found; titles tell the counts. A slide is a column.

    across  a slide is a row
    """
    kinds, slides = 1 + len(shown[0].found), len(shown)
    rows, columns = (slides, kinds) if across else (kinds, slides)
    figure, grid = plots.panels(rows, columns, size=(2.0 * columns + 0.3, 2.15 * rows + 0.5), squeeze=False)
    for panels, (light, truth, found) in zip(grid if across else grid.T, shown, strict=True):
        for axes, (name, instances) in zip(panels, {"truth": truth, **found}.items(), strict=True):
            wrong = count(instances) - count(truth)
            show_light(axes, light, f"{name}: {count(instances)}" + (f" ({wrong:+d})" if wrong else ""))
            outline(axes, instances)
    return credit(figure, manifest)


class Election(NamedTuple):
    """votes (N, 2): for which place each pixel of tissue votes, in the order of `np.argwhere(sections > 0)`; counts
    (bins, bins): their smoothed histogram; places (P, 2): its peaks, in bins; sections (H, W): who went to which."""

    votes: np.ndarray
    counts: np.ndarray
    places: np.ndarray
    sections: np.ndarray


def votes_figure(light: np.ndarray, election: Election, manifest: Manifest) -> Figure:
    """From tissue to sections of a slide (3, H, W): votes of some pixels as lines, their histogram with its peaks, and
    who voted for which."""
    votes, counts, places, sections = election
    figure, (left, middle, right) = plots.panels(1, 3, size=(9.5, 3.7))
    show_light(left, light, "pixels of tissue, and what they vote for")
    pixels = np.argwhere(sections > 0)
    some = np.random.default_rng(0).permutation(len(pixels))[:SHOWN]
    lines = np.stack([pixels[some], votes[some]])
    left.plot(lines[..., 1], lines[..., 0], color="black", linewidth=0.5, alpha=0.6)
    left.plot(*votes[some].T[::-1], ".", color=plots.colour(6), markersize=4, markeredgewidth=0)
    left.set(xlim=(-0.5, light.shape[2] - 0.5), ylim=(light.shape[1] - 0.5, -0.5))
    drawn = middle.imshow(np.sqrt(counts), cmap="viridis", interpolation="nearest")
    middle.plot(*places.T[::-1], "o", markersize=11, markerfacecolor="none", color="white", markeredgewidth=1.6)
    middle.set_title(f"votes in bins: {len(places)} peaks", fontsize=9)
    middle.set_axis_off()
    figure.colorbar(drawn, ax=middle, shrink=0.7, label="square root of votes")
    show_light(right, light, "each pixel goes to the nearest peak")
    outline(right, sections)
    return credit(figure, manifest)


def segments_figure(
    light: np.ndarray,
    answers: Mapping[str, tuple[np.ndarray, np.ndarray]],
    structures: Mapping[int, str],
    manifest: Manifest,
) -> Figure:
    """Panoptic segmentations of a slide: classes as colours, instances outlined in black and numbered.

    answers  {who: (classes (H, W), instances (H, W))}
    """
    columns = 1 + len(answers)
    figure, (first, *others) = plots.panels(1, columns, size=(2.3 * columns + 0.3, 3.4))
    show_light(first, light, "slide")
    for axes, (name, (kinds, instances)) in zip(others, answers.items(), strict=True):
        show_light(axes, light, name)
        plots.draw_label(axes, kinds, fill=0.8, line=0)
        outline(axes, instances, "black")
    plots.structure_legend(figure, structures)
    return credit(figure, manifest)


def gap_explorer(arrange: Callable, answers: Mapping[str, Callable], manifest: Manifest) -> ipywidgets.VBox:
    """Tear one of two sections and move the other one nearer, and see how many everyone counts.

    arrange  (gap, near), pixels -> a slide's light (3, H, W) and its two sections (H, W)
    answers  {who: light (3, H, W) -> sections (H, W)}
    """
    gap = ipywidgets.IntSlider(0, min=0, max=8, step=2, description="gap")  # each half moves by a half of it
    near = ipywidgets.IntSlider(4, min=-2, max=12, description="apart")

    def draw(width: int, away: int) -> Figure:
        light, truth = arrange(width, away)
        shown = Counted(light, truth, {who: ask(light) for who, ask in answers.items()})
        return counted_figure([shown], manifest, across=True)

    return live(draw, gap, near)
