"""A film of a training: what the teacher says of some unlabelled images while it goes on, and where it is wrong."""

from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from medcook import plots
from medcook.data.manifests import Manifest
from medcook.methods import Method
from medcook.precision import resolve_precision
from medcook.tasks import Budget, Task, prepare
from medcook.training import Loop

SURE = 0.95
"""From this probability on a pseudo-label counts as confident."""
CONFIDENT_ERROR, UNSURE_ERROR = "#D55E00", "#F0E442"


@dataclass(frozen=True)
class Film:
    """images (N, C, H, W) of unlabelled training patients and the labels (N, H, W) that the training never saw.

    steps          when a frame was taken; probabilities (frames, N, classes, H, W) of the predicting average
    """

    images: Tensor
    labels: Tensor
    steps: list[int]
    probabilities: Tensor
    manifest: Manifest

    @property
    def pseudo(self) -> Tensor:
        """(frames, N, H, W) the hard pseudo-labels."""
        return self.probabilities.argmax(2)

    @property
    def sure(self) -> Tensor:
        """(frames, N, H, W) bool: where they are confident."""
        return self.probabilities.amax(2) >= SURE

    @property
    def relevant(self) -> Tensor:
        """(frames, N, H, W) bool: pixels in a structure, of the truth or of the pseudo-label."""
        return (self.labels > 0) | (self.pseudo > 0)

    def quality(self) -> pd.DataFrame:
        """For each frame, over the relevant pixels: share confident, share right, share right among the confident."""
        right, rows = self.pseudo == self.labels, []
        for frame, step in enumerate(self.steps):
            here = self.relevant[frame]
            sure = here & self.sure[frame]
            rows.append(
                {
                    "step": step,
                    "confident": share(self.sure[frame], here),
                    "right": share(right[frame], here),
                    "right where confident": share(right[frame], sure),
                }
            )
        return pd.DataFrame(rows).set_index("step")

    def survival(self, frame: int) -> dict[str, float]:
        """Of the errors in a frame, the share that is still wrong in the last one: the confident ones, the others."""
        wrong, last = self.pseudo[frame] != self.labels, self.pseudo[-1] != self.labels
        sure = self.sure[frame]
        return {"confident errors": share(last, wrong & sure), "unsure errors": share(last, wrong & ~sure)}

    def most_biased(self) -> int:
        """The image with the largest share of confident errors in the last frame."""
        wrong = (self.pseudo[-1] != self.labels) & self.sure[-1]
        return int((wrong.flatten(1).sum(1) / self.relevant[-1].flatten(1).sum(1).clamp_min(1)).argmax())


def share(mask: Tensor, among: Tensor) -> float:
    """Share of True in `mask` among the pixels where `among` is True; NaN where there are none."""
    return float(mask[among].float().mean()) if among.any() else float("nan")


def watch(method: Method, task: Task, budget: Budget, seed: int = 0, *, count: int = 24, frames: int = 9) -> Film:
    """Train (again, nothing is cached) and look at `count` images of unlabelled patients `frames` times."""
    truth = prepare(task.data, task.preparation, task.unlabelled_patients)
    shown = (truth.labels > 0).flatten(1).any(1).nonzero()[:, 0]
    shown = shown[torch.linspace(0, len(shown) - 1, min(count, len(shown))).long()]
    images, seen = truth.images[shown], {}
    stops = {int(step) for step in np.linspace(budget.steps / frames, budget.steps, frames)}
    watched = copy(method)

    def after_step(nets, now):
        method.after_step(nets, now)
        if now.step + 1 in stops:
            nets.eval()
            with torch.no_grad():
                device = next(nets.parameters()).device
                seen[now.step + 1] = method.predict(nets, images.to(device)).cpu()

    watched.after_step = after_step
    precision = resolve_precision(budget.precision)
    parts = (task.samples("labelled"), task.samples("unlabelled"))
    Loop(watched, task, replace(budget, checks=0), precision, seed, *parts, None).run()
    return Film(images, truth.labels[shown], list(seen), torch.stack(list(seen.values())), task.data.manifest)


def draw_frame(axes: Axes, film: Film, number: int, frame: int) -> None:
    """One image with its pseudo-label of a frame as outlines, and its errors filled: confident or unsure."""
    image, guess = film.images[number, 0].numpy(), film.pseudo[frame, number].numpy()
    wrong, sure = guess != film.labels[number].numpy(), film.sure[frame, number].numpy()
    plots.show_slice(axes, image, guess, title=f"step {film.steps[frame]}", fill=0.0)
    for mask, colour in ((wrong & ~sure, UNSURE_ERROR), (wrong & sure, CONFIDENT_ERROR)):
        plots.tint(axes, mask, colour)


def strip(film: Film, number: int, *, count: int = 5) -> Figure:
    """The truth of one image, and what the teacher said of it in `count` frames."""
    figure, axes = plots.panels(1, count + 1, size=(2.1 * (count + 1), 2.9))
    plots.show_slice(axes[0], film.images[number, 0].numpy(), film.labels[number].numpy(), title="hidden truth")
    for cell, frame in zip(axes[1:], np.linspace(0, len(film.steps) - 1, count).round().astype(int), strict=True):
        draw_frame(cell, film, number, int(frame))
    figure.legend(handles=error_handles(), loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return plots.credit(figure, film.manifest)


def error_handles() -> list[Patch]:
    """Legend entries of the two kinds of error."""
    return [
        Patch(color=CONFIDENT_ERROR, label=f"wrong, and confident (p of at least {SURE})"),
        Patch(color=UNSURE_ERROR, label="wrong, and unsure"),
    ]


def quality_figure(films: dict[str, Film]) -> Figure:
    """The three shares of `Film.quality` against steps, a line a method."""
    names = ["right", "confident", "right where confident"]
    figure, axes = plots.panels(1, len(names), size=(3.4 * len(names), 3.1), sharex=True, sharey=True)
    for number, (method, film) in enumerate(films.items()):
        table = film.quality()
        for cell, name in zip(axes, names, strict=True):
            style = dict(color=plots.colour(number), marker="os^D"[number % 4], markersize=4, linewidth=1.4)
            cell.plot(table.index, table[name], label=method, **style)
            cell.set_title(name, fontsize=9)
            cell.set_xlabel("step")
            cell.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of the pixels of structures")
    axes[0].legend(frameon=False, fontsize=8)
    return plots.credit(figure, next(iter(films.values())).manifest)
