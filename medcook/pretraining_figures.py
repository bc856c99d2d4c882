"""What chapter 13 looks at: tasks that need no labels, what a network then finds alike, and what labels still add."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from medcook import plots
from medcook.data import IGNORE
from medcook.data.manifests import Manifest
from medcook.pretraining import encoded, pooled
from medcook.tasks import Samples


def puzzles_figure(puzzles: Mapping[str, Mapping[str, np.ndarray]], manifest: Manifest) -> Figure:
    """A row of panels for each pretext: what the network is shown, and what it is asked for.

    puzzles  {pretext: {panel: image}}; an image (H, W) of whole numbers is a map of levels, any other one is grey
    """
    columns = max(map(len, puzzles.values()))
    figure, axes = plots.panels(len(puzzles), columns, size=(1.9 * columns + 1.2, 2.0 * len(puzzles)), squeeze=False)
    for row, (name, shown) in zip(axes, puzzles.items(), strict=True):
        for panel, (title, image) in zip(row, shown.items(), strict=False):
            draw_panel(panel, image, title)
        for panel in row[len(shown) :]:
            panel.set_axis_off()
        row[0].text(-0.08, 0.5, name, transform=row[0].transAxes, ha="right", va="center", fontsize=9)
    return plots.credit(figure, manifest)


def draw_panel(axes, image: np.ndarray, title: str) -> None:
    """A grey image, or where its values are whole numbers a map of levels, the more the brighter."""
    if np.issubdtype(image.dtype, np.integer):
        shades = colormaps["viridis"].resampled(int(image.max()) + 1)
        edges = BoundaryNorm(np.arange(image.max() + 2) - 0.5, shades.N)
        axes.imshow(image, cmap=shades, norm=edges, interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    else:
        plots.show_slice(axes, image, title=title)


def hidden(image: Tensor, share: float, patch: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A prepared slice (H, W) of which a share of the square patches is grey, and the mask (H, W) bool of these."""
    rows, columns = (-(-side // patch) for side in image.shape)
    order = torch.rand(rows * columns, generator=rng).argsort().view(rows, columns)
    mask = (order < round(share * rows * columns)).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    mask = mask[: image.shape[0], : image.shape[1]]
    return image.masked_fill(mask, float(image.mean())), mask


@torch.no_grad()
def embedded(net: nn.Module, images: Tensor, centre: bool = True) -> Tensor:
    """Unit vectors (N, D) of images by the deepest map of a U-Net; without their common part, unless asked for."""
    net.eval()
    vectors = torch.cat([pooled(encoded(net, part)) for part in images.split(16)])
    return F.normalize(vectors - vectors.mean(0) * centre, dim=1)


def neighbours(vectors: Tensor, case_of: Tensor, query: int, count: int) -> list[int]:
    """The images whose vectors are most like that of `query`, each of another case, and none of its own."""
    order = (vectors @ vectors[query]).argsort(descending=True).tolist()
    found, seen = [], {int(case_of[query])}
    for number in order:
        if int(case_of[number]) not in seen:
            found.append(number)
            seen.add(int(case_of[number]))
    return found[:count]


def misplaced(vectors: Tensor, case_of: Tensor, place: Tensor) -> float:
    """How far in its volume, as a share of the volume, a slice's nearest neighbour lies from where it lies itself."""
    nearest = [neighbours(vectors, case_of, number, 1)[0] for number in range(len(vectors))]
    return float((place - place[nearest]).abs().mean())


def alike_figure(
    networks: Mapping[str, Tensor], images: Tensor, case_of: Tensor, query: int, manifest: Manifest, count: int = 4
) -> Figure:
    """A slice and those of other patients that each network finds most like it.

    networks  {name: unit vectors (N, D)} of the images (N, 1, H, W)
    """
    size = (1.7 * (count + 1) + 1.3, 1.9 * len(networks))
    figure, axes = plots.panels(len(networks), count + 1, size=size, squeeze=False)
    for row, (name, vectors) in zip(axes, networks.items(), strict=True):
        shown = [query, *neighbours(vectors, case_of, query, count)]
        for panel, number, title in zip(row, shown, ("this slice", *map(str, range(1, count + 1))), strict=False):
            plots.show_slice(panel, images[number, 0].numpy(), title=title)
        for panel in row[len(shown) :]:
            panel.set_axis_off()
        row[0].text(-0.08, 0.5, name, transform=row[0].transAxes, ha="right", va="center", fontsize=9)
    return plots.credit(figure, manifest)


def labels_figure(scores: Mapping[str, Mapping[int, Sequence[float]]], credit: str) -> Figure:
    """Mean Dice against the number of labelled patients: {network: {patients: scores of its runs}}."""
    figure, axes = plots.panels(size=(6, 3.6))
    for number, (name, by_count) in enumerate(scores.items()):
        plots.band(axes, list(by_count), np.transpose(list(by_count.values())), number, name)
    counts = sorted({count for by_count in scores.values() for count in by_count})
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("patients with labels", fontsize=9)
    axes.set_ylabel("mean Dice on others", fontsize=9)
    axes.grid(axis="y", color="0.9")
    axes.legend(frameon=False, fontsize=9)
    return plots.credit(figure, credit)


@torch.no_grad()
def recalls(net: nn.Module, samples: Samples, most: int = 3000, seed: int = 0) -> dict[int, tuple[float, float]]:
    """{label value: (found by the network, found by a linear classifier of its last features)}, shares of the voxels.

    The classifier is a logistic regression with as many voxels of every value, at most `most`; half of them train it
    and the other half is counted: so it tells whether a structure is in the features, whatever the head makes of them.
    """
    net.eval()
    maps = torch.cat([net.features(part) for part in samples.images.split(8)])
    answers = torch.cat([net.head(part).argmax(1) for part in maps.split(8)]).flatten()
    features, labels = maps.movedim(1, -1).flatten(0, -2), samples.labels.flatten()
    rng = torch.Generator().manual_seed(seed)
    values = [int(value) for value in labels.unique() if value != IGNORE]
    places = {value: torch.where(labels == value)[0] for value in values}
    many = min(most, *map(len, places.values()))
    chosen = {value: place[torch.randperm(len(place), generator=rng)[:many]] for value, place in places.items()}
    train = torch.cat([place[::2] for place in chosen.values()])
    probe = LogisticRegression(max_iter=1000).fit(features[train], labels[train])
    share = lambda guess, value: float((np.asarray(guess) == value).mean())  # noqa: E731
    return {
        value: (share(answers[places[value]], value), share(probe.predict(features[chosen[value][1::2]]), value))
        for value in values
    }
