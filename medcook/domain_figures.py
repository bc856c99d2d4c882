"""What chapter 14 looks at: what scanners do to an image, what that costs a network, and what a remedy brings."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from medcook import evaluation, plots
from medcook.data import Case
from medcook.data.manifests import Manifest
from medcook.domains import Look, as_shown, shown
from medcook.metrics import dice
from medcook.preparation import zscore
from medcook.training import Fitted

BINS = 60


def looks_figure(image: Tensor, label: np.ndarray, looks: Mapping[str, Look], manifest: Manifest) -> Figure:
    """A prepared slice (H, W) under each look, with its label (H, W), over the brightness of each structure."""
    figure, axes = plots.panels(2, len(looks), size=(2.5 * len(looks), 5.4), squeeze=False, height_ratios=(2.2, 1))
    for column, (name, look) in enumerate(looks.items()):
        seen = shown(image[None, None], look, np.random.default_rng(0))[0, 0].numpy()
        plots.show_slice(axes[0, column], seen, label, title=name, fill=0)
        for value in (0, *manifest.structures):
            brightness_curve(axes[1, column], seen[label == value], value)
        axes[1, column].set_yticks([])
        axes[1, column].set_xlabel("brightness", fontsize=9)
        axes[1, column].spines[["top", "right", "left"]].set_visible(False)
    figure.legend(
        *legend_of(manifest.structures), loc="outside upper center", ncols=len(manifest.structures) + 1, frameon=False
    )
    return plots.credit(figure, manifest)


def brightness_curve(axes, values: np.ndarray, value: int) -> None:
    """How often each brightness occurs among the pixels of one label value; background in grey."""
    if values.size:
        heights, edges = np.histogram(values, bins=BINS, range=(-3, 4), density=True)
        axes.stairs(heights, edges, color=shade_of(value), linewidth=1.6)


def shade_of(value: int) -> str:
    """The colour of a label value; the background's is grey."""
    return plots.colour(value - 1) if value else "0.6"


def legend_of(structures: Mapping[int, str]) -> tuple[list, list[str]]:
    """Handles and names of a legend with the background."""
    names = {0: "background", **structures}
    handles = [plots.Line2D([], [], color=shade_of(value), linewidth=2) for value in names]
    return handles, list(names.values())


def across_looks(fitted: Mapping[str, Fitted], looks: Sequence[str], patients: Sequence[str]) -> pd.DataFrame:
    """Mean Dice over structures and cases of each network (a row) under each look (a column)."""
    one = next(iter(fitted.values()))
    scores = {name: {look: [] for look in looks} for name in fitted}
    for case in one.task.data.cases(patients):
        for look in looks:
            seen = as_shown(case, look)
            for name, network in fitted.items():
                answer = network.predict(seen)
                scores[name][look] += [dice(answer == value, case.label == value) for value in network.task.structures]
    return pd.DataFrame({name: {look: np.mean(found) for look, found in of.items()} for name, of in scores.items()}).T


def matrix_figure(table: pd.DataFrame, credit: str) -> Figure:
    """Dice of networks (rows) under looks (columns): dark is good; every cell has its number."""
    figure, axes = plots.panels(size=(1.9 + 1.35 * table.shape[1], 1.5 + 0.55 * len(table)))
    axes.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(table.to_numpy()):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.55 else "black")
    axes.set_xticks(range(table.shape[1]), table.columns)
    axes.set_yticks(range(len(table)), table.index)
    axes.set_xlabel("scored on", fontsize=9)
    axes.set_ylabel("learnt from", fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return plots.credit(figure, credit)


def matched(images: Tensor, reference: np.ndarray) -> Tensor:
    """Prepared images whose brightness is distributed as `reference`: the order of pixels stays."""
    ranks = images.flatten().argsort().argsort().double() / max(images.numel() - 1, 1)
    quantiles = np.interp(ranks.numpy(), np.linspace(0, 1, len(reference)), np.sort(reference))
    return torch.from_numpy(quantiles).float().view(images.shape)


def with_images(fitted: Fitted, case: Case, images: Tensor) -> np.ndarray:
    """The network's label map of a case, of which it is shown these prepared images (N, C, *size)."""
    return fitted.task.preparation.restore(fitted.answer(images), case).argmax(0).to(torch.uint8).numpy()


def remedies_figure(scores: Mapping[str, pd.DataFrame], credit: str) -> Figure:
    """Mean Dice of each remedy with its 95% interval over patients, in the order given."""
    figure, axes = plots.panels(size=(7, 1.1 + 0.42 * len(scores)))
    for place, frame in enumerate(scores.values()):
        line = evaluation.summary(frame).loc["all"]
        axes.plot([line["low"], line["high"]], [place, place], color=plots.PALETTE[0], linewidth=2)
        axes.plot(line["dice"], place, "o", color=plots.PALETTE[0], markersize=7)
        axes.annotate(f"{line['dice']:.2f}", (line["dice"], place), (0, 7), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(scores)), list(scores))
    axes.set_ylim(len(scores) - 0.5, -0.7)
    axes.set_xlim(0, 1)
    axes.set_xlabel("mean Dice on the other scanner's patients", fontsize=9)
    axes.grid(axis="x", color="0.9")
    axes.spines[["top", "right", "left"]].set_visible(False)
    return plots.credit(figure, credit)


def by_size(
    a: np.ndarray, b: np.ndarray, distance: Callable[[np.ndarray, np.ndarray], float], sizes: Sequence[int], draws: int
) -> np.ndarray:
    """(draws, sizes): distances between so many images of each set of features (N, D) and (M, D), drawn anew."""
    rng = np.random.default_rng(0)
    some = lambda rows, count: rows[rng.choice(len(rows), count, replace=False)]  # noqa: E731
    return np.array([[distance(some(a, size), some(b, size)) for size in sizes] for _ in range(draws)])


def distance_figure(curves: Mapping[str, tuple[Sequence[float], np.ndarray]], credit: str) -> Figure:
    """A distance between image sets against their size, over that of the largest: {name: (sizes, (draws, sizes))}."""
    figure, axes = plots.panels(size=(6, 3.6))
    for number, (name, (sizes, found)) in enumerate(curves.items()):
        plots.band(axes, sizes, found / found[:, -1:].mean(), number, name)
    axes.axhline(1, color="0.7", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_xticks(list(sizes), [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("images in each set", fontsize=9)
    axes.set_ylabel("distance, in units of the largest sets'", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return plots.credit(figure, credit)


def scanner_view(
    fitted: Fitted, image: Tensor, label: np.ndarray, look: Look, tilt: float, manifest: Manifest
) -> Figure:
    """A prepared slice (H, W) under a look, the network's answer to it, and its mean Dice with the label (H, W).

    tilt  1 leaves brightness alone, -1 turns it round, between them contrast fades
    """
    seen = zscore(shown(image[None, None], look, np.random.default_rng(0)) * tilt)
    answer = fitted.answer(seen).argmax(1)[0].numpy()
    there = [value for value in manifest.structures if (label == value).any()]
    mean = np.mean([dice(answer == value, label == value) for value in there]) if there else np.nan
    figure, row = plots.panels(1, 2, size=(7.6, 4.4))
    plots.show_slice(row[0], seen[0, 0].numpy(), label, title="what the expert drew")
    plots.show_slice(row[1], seen[0, 0].numpy(), answer, title=f"what the network says: Dice {mean:.2f}")
    plots.structure_legend(figure, manifest.structures)
    return plots.credit(figure, manifest)
