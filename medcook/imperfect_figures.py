"""What chapter 12 looks at: kinds of imperfect labels, and whom a network believes where a label is wrong."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from scipy import ndimage
from torch import Tensor

from medcook import plots
from medcook.data import IGNORE
from medcook.data.manifests import Manifest
from medcook.imperfect import noisy_borders, noisy_regions
from medcook.metrics import dice
from medcook.sampling import trained
from medcook.training import Fitted

BELIEFS = ("the truth", "the mistake", "neither")
BLOB = 6.0
"""Width of a blob in the figures, in pixels."""


def fullest(labels: Tensor) -> int:
    """Which of (N, H, W) label maps has most of its structures, and of these as many as there are."""
    kinds = torch.tensor([len(label[(label > 0) & (label != IGNORE)].unique()) for label in labels])
    sizes = ((labels > 0) & (labels != IGNORE)).flatten(1).sum(1)
    return int(torch.where(kinds == kinds.max(), sizes, -1).argmax())


def kinds_figure(image: np.ndarray, kinds: Mapping[str, np.ndarray], manifest: Manifest) -> Figure:
    """One image (H, W) under each kind of annotation (H, W): {title: label map, `IGNORE` where nobody drew}.

    Where parts are unlabelled, what is drawn stands out as it is, the background in white; else outlines as ever.
    """
    figure, row = plots.panels(1, len(kinds), size=(2.3 * len(kinds), 3.3))
    for axes, (title, label) in zip(np.atleast_1d(row), kinds.items(), strict=True):
        partial = (label == IGNORE).any()
        plots.show_slice(axes, image, None if partial else label, title=title)
        if partial:
            draw_marks(axes, label)
    plots.structure_legend(figure, manifest.structures)
    return plots.credit(figure, manifest)


def draw_marks(axes, label: np.ndarray, line: int = 1) -> None:
    """Lay every drawn pixel of a label map (H, W) over an image, `line` pixels wider than it is; background white."""
    for value in np.setdiff1d(np.unique(label), [IGNORE]):
        mark = ndimage.binary_dilation(label == value, iterations=line) if line else label == value
        shade = ListedColormap(["white" if value == 0 else plots.colour(value - 1)])
        axes.imshow(np.ma.masked_where(~mark, mark), cmap=shade, interpolation="nearest")


def believed(answer: np.ndarray, truth: np.ndarray, given: np.ndarray) -> dict[str, float]:
    """Of the pixels whose `given` label is wrong, the shares where `answer` is the truth, the mistake, or neither.

    Label maps of one shape; the shares are of `BELIEFS`, sum to 1, and are NaN where no label is wrong.
    """
    wrong = (given != truth) & (given != IGNORE)
    if not wrong.any():
        return dict.fromkeys(BELIEFS, float("nan"))
    right, fooled = float((answer == truth)[wrong].mean()), float((answer == given)[wrong].mean())
    return dict(zip(BELIEFS, (right, fooled, 1 - right - fooled), strict=True))


@torch.no_grad()
def answers_on(fitted: Fitted, images: Tensor) -> np.ndarray:
    """(N, H, W) label maps of prepared images, by the last weights."""
    trained(fitted)
    return torch.cat([fitted.method.predict(fitted.nets, part).argmax(1) for part in images.split(16)]).numpy()


def beliefs_table(fitted: Mapping[str, Fitted], images: Tensor, truth: Tensor, given: Tensor) -> pd.DataFrame:
    """A row for each trained method: shares of `believed` over training images (N, C, H, W), and their Dice.

    truth, given  (N, H, W): labels of the experts, and those that were learnt from
    """
    rows = {}
    for name, one in fitted.items():
        answer = answers_on(one, images)
        scores = [dice(answer == value, truth.numpy() == value) for value in range(1, one.task.classes)]
        rows[name] = believed(answer, truth.numpy(), given.numpy()) | {"Dice with the experts": float(np.mean(scores))}
    return pd.DataFrame(rows).T


def beliefs_figure(table: pd.DataFrame, credit: str) -> Figure:
    """Bars of `beliefs_table`: of the wrongly labelled pixels, whom each network believes."""
    figure, axes = plots.panels(size=(7.5, 1.2 + 0.45 * len(table)))
    start = np.zeros(len(table))
    for name, shade in zip(BELIEFS, (plots.PALETTE[0], plots.PALETTE[1], "0.75"), strict=True):
        bars = axes.barh(range(len(table)), table[name], left=start, color=shade, label=name, height=0.62)
        axes.bar_label(bars, [f"{share:.0%}" if share > 0.05 else "" for share in table[name]], label_type="center")
        start += table[name].to_numpy()
    axes.set_yticks(range(len(table)), table.index)
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel("share of the training pixels whose label is wrong", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return plots.credit(figure, credit)


def dose_figure(amounts: Sequence[float], given: Sequence[float], learnt: Sequence[float], credit: str) -> Figure:
    """How good labels are (`given`, Dice with the experts) and how good the network becomes, against the amount."""
    figure, axes = plots.panels(size=(5.5, 3.6))
    axes.plot(amounts, learnt, "o-", color=plots.PALETTE[0], label="network, on other patients")
    axes.plot(amounts, given, "s--", color=plots.PALETTE[1], label="labels that it learnt from")
    axes.set_xlabel("borders moved by up to … pixels")
    axes.set_ylabel("mean Dice with the experts")
    axes.set_xticks(list(amounts))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return plots.credit(figure, credit)


def label_quality(given: np.ndarray, truth: np.ndarray, classes: int) -> float:
    """Mean Dice over the structures of two sets of label maps (N, H, W)."""
    return float(np.mean([dice(given == value, truth == value) for value in range(1, classes)]))


def noise_view(image: np.ndarray, label: np.ndarray, kind: str, amount: float, draw: int, manifest: Manifest) -> Figure:
    """An image (H, W), its label as the expert drew it, and as it is after mistakes.

    kind  `borders`, `amount` times 10 pixels; `regions`, a share `amount` of the pixels
    """
    rng, classes = np.random.default_rng(draw), max(manifest.classes) + 1
    if kind == "borders":
        width = 10 * amount
        noisy, said = noisy_borders(label[None], width, rng)[0], f"borders moved by up to {width:.1f} pixels"
    else:
        noisy, said = noisy_regions(label[None], classes, amount, BLOB, rng)[0], f"{amount:.0%} of the pixels wrong"
    figure, row = plots.panels(1, 2, size=(7.6, 4.4))
    plots.show_slice(row[0], image, label, title="as the expert drew it")
    plots.show_slice(row[1], image, noisy, title=f"{said}: Dice {label_quality(noisy, label, classes):.2f}")
    plots.structure_legend(figure, manifest.structures)
    return plots.credit(figure, manifest)
