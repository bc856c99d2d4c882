"""What chapter 11 looks at: images and the masks that sentences are answered with."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from medcook import plots
from medcook.data.manifests import Manifest
from medcook.metrics import dice

ANSWER, TRUTH = plots.colour(0), plots.colour(1)


class Answered(NamedTuple):
    """An image (H, W), the probabilities (H, W) of the answer to a sentence, and the mask (H, W) bool that it means."""

    image: np.ndarray
    sentence: str
    answer: np.ndarray
    truth: np.ndarray


def draw_answer(axes: Axes, shown: Answered, width: int = 24) -> None:
    """The image, the answer as a tint where it is above one half, and an outline around what the sentence means."""
    mask = shown.answer > 0.5
    if shown.truth.any():
        found = f"Dice {dice(mask, shown.truth):.2f}"
    else:
        found = "nothing, rightly" if not mask.any() else f"{int(mask.sum())} pixels, of nothing"
    plots.show_slice(axes, shown.image, title="\n".join([*textwrap.wrap(shown.sentence, width), found]))
    if mask.any():
        plots.tint(axes, mask, ANSWER, 0.55)
    if shown.truth.any() and not shown.truth.all():
        axes.contour(shown.truth, [0.5], colors=TRUTH, linewidths=1.4)
    axes.title.set_fontsize(8)


def answers_figure(rows: Sequence[Sequence[Answered]], manifest: Manifest) -> Figure:
    """A row of answered sentences for each image."""
    columns = max(map(len, rows))
    size = max(4.4, 1.95 * columns), 2.65 * len(rows) + 0.3
    figure, axes = plots.panels(len(rows), columns, size=size, squeeze=False)
    for panels, answered in zip(axes, rows, strict=True):
        for panel, shown in zip(panels, answered, strict=False):
            draw_answer(panel, shown)
        for panel in panels[len(answered) :]:
            panel.set_axis_off()
    handles = [Patch(facecolor=ANSWER, alpha=0.55, label="answer")]
    handles.append(Line2D([], [], color=TRUTH, label="what the sentence means"))
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return plots.credit(figure, manifest)


@torch.no_grad()
def answered(method, nets, image: Tensor, label: Tensor, questions: Sequence) -> list[Answered]:
    """What a method answers to questions about an image (C, H, W) with a label map (H, W)."""
    answers = method.answer(nets, image[None], tuple(question.sentence for question in questions))[0].float().numpy()
    truths = [torch.isin(label, torch.tensor(question.values, dtype=label.dtype)).numpy() for question in questions]
    found = zip(questions, answers, truths, strict=True)
    return [Answered(image[0].numpy(), question.sentence, answer, truth) for question, answer, truth in found]


def similarity_figure(table: pd.DataFrame) -> Figure:
    """How alike the vectors of sentences are: a square table of cosines, sentences in rows and columns."""
    count = len(table)
    figure, axes = plots.panels(size=(0.42 * count + 3.2, 0.42 * count + 2.0))
    drawn = axes.imshow(table, cmap="cividis", vmin=-1, vmax=1)
    axes.set_xticks(range(count), table.columns, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(count), table.index, fontsize=8)
    figure.colorbar(drawn, ax=axes, shrink=0.7, label="cosine")
    return figure


@torch.no_grad()
def cosines(vectors: Mapping[str, Tensor]) -> pd.DataFrame:
    """The table for `similarity_figure`, of vectors (width,) by sentence, without what all of them share."""
    stacked = torch.stack(list(vectors.values())).float()
    unit = torch.nn.functional.normalize(stacked - stacked.mean(0), dim=1)
    return pd.DataFrame((unit @ unit.T).numpy(), index=list(vectors), columns=list(vectors))
