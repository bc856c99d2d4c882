"""Whose annotation it was: the same network and patients, answered with other supports, in numbers and in pictures."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from medcook import metrics, plots, statistics
from medcook.data import Case
from medcook.few_shot.scoring import answers
from medcook.few_shot.task import Support, chunks, extent


class Answer(NamedTuple):
    """What one support says of a case: its number and patients, and masks (*spatial) bool on the case's own grid."""

    structure: str
    number: int
    patients: str
    mask: np.ndarray
    truth: np.ndarray

    @property
    def dice(self) -> float:
        """Volume Dice."""
        return metrics.dice(self.mask, self.truth)


def ask(fitted, case: Case, value: int, supports: int = 6, shots: int = 1) -> list[Answer]:
    """The answers of several supports, of `shots` patients each, for one structure of a case."""
    name = fitted.task.novel_structures[value]
    asked = replace(fitted, task=replace(fitted.task, supports=supports, shots=shots))
    return [answer for answer in (Answer(*found) for found in answers(asked, case)) if answer.structure == name]


def spread(fitted, cases: Sequence[Case], supports: int = 6, shots: Sequence[int] = (1, 3, 5)) -> pd.DataFrame:
    """One row for each number of shots, support, case and structure, with its Dice; `replicate` is the support."""
    rows = []
    for count in shots:
        asked = replace(fitted, task=replace(fitted.task, supports=supports, shots=count))
        for case in cases:
            for answer in (Answer(*found) for found in answers(asked, case)):
                rows.append(
                    {
                        "shots": count,
                        "replicate": answer.number,
                        "patient_id": case.patient_id,
                        "case_id": case.case_id,
                        "structure": answer.structure,
                        "dice": answer.dice,
                    }
                )
    return pd.DataFrame(rows)


def spread_figure(frames: dict[str, pd.DataFrame], dataset: str) -> Figure:
    """Dice against shots, a colour a method: a dot a support, the mean over patients; squares with 95% intervals.

    frames  {method: table of `spread`}; intervals are over patients and supports
    """
    figure, axes = plots.panels(size=(6.6, 3.9))
    shots = sorted({count for frame in frames.values() for count in frame["shots"]})
    for number, frame in enumerate(frames.values()):
        shift, shade = (number - (len(frames) - 1) / 2) * 0.24, plots.colour(number)
        for place, count in enumerate(shots):
            mine = frame[frame["shots"] == count]
            means = mine.groupby("replicate")["dice"].mean()
            axes.plot([place + shift - 0.06] * len(means), means, "o", color=shade, alpha=0.45, markersize=4)
            found = statistics.interval(mine)
            ends = [[found.mean - found.low], [found.high - found.mean]]
            axes.errorbar(place + shift + 0.04, found.mean, yerr=ends, fmt="s", color=shade, capsize=3, markersize=5)
    axes.set_xticks(range(len(shots)), [str(count) for count in shots])
    axes.set(xlabel="annotated patients (shots)", ylabel="volume Dice")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], color=plots.colour(k), marker="s", label=name) for k, name in enumerate(frames)]
    handles.append(Line2D([], [], color="0.4", marker="o", alpha=0.45, linestyle="", label="one support"))
    axes.legend(handles=handles, frameon=False, fontsize=8)
    return plots.credit(figure, dataset)


def spread_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a number of shots: mean with interval, worst and best support, and which spread is the larger one.

    between supports  standard deviation of the supports' means; between patients: of the patients' means
    """
    rows = []
    for count, mine in frame.groupby("shots"):
        found = statistics.interval(mine)
        supports, patients = (mine.groupby(column)["dice"].mean() for column in ("replicate", "patient_id"))
        rows.append(
            {
                "shots": count,
                "Dice": f"{found.mean:.3f}",
                "95% interval": "–" if np.isnan(found.low) else f"{found.low:.3f} to {found.high:.3f}",
                "worst support": f"{supports.min():.3f}",
                "best support": f"{supports.max():.3f}",
                "sd between supports": f"{supports.std(ddof=1):.3f}",
                "sd between patients": f"{patients.std(ddof=1):.3f}",
            }
        )
    return pd.DataFrame(rows).set_index("shots")


def support_view(fitted, case: Case, value: int, number: int) -> Figure:
    """One support and its answer, chunk by chunk: the annotated slices above, below them what they say of the case."""
    answer = ask(fitted, case, value, number + 1)[number]
    shown = fitted.task.support(number, value)
    parts = chunks(extent(case, value), fitted.task.chunks)
    figure, grid = plots.panels(2, len(shown), squeeze=False, size=(2.5 * len(shown) + 0.6, 5.6))
    for column, (support, part) in enumerate(zip(shown, parts, strict=True)):
        draw_support(grid[0, column], support, title="annotated" if column else f"annotated: {answer.patients}")
        place = part[len(part) // 2]
        dice = metrics.dice(_slices(answer.mask)[place], _slices(answer.truth)[place])
        draw_answer(grid[1, column], case, answer, place, title=f"slice {place}: Dice {dice:.2f}")
    title = f"{case.case_id}, {answer.structure}: volume Dice {answer.dice:.2f}"
    return plots.credit(_legend(figure, title), fitted.task.data.manifest)


def support_sheet(fitted, case: Case, value: int, supports: int = 6) -> Figure:
    """A column a support: an annotated slice above, below the answer for the slice with most of the structure."""
    found = ask(fitted, case, value, supports)
    chunk, place = largest(case, value, fitted.task.chunks)
    figure, grid = plots.panels(2, supports, squeeze=False, size=(2 * supports, 4.9))
    for column, answer in enumerate(found):
        support = fitted.task.support(answer.number, value)[chunk]
        draw_support(grid[0, column], support, title=f"annotated:\n{answer.patients}")
        draw_answer(grid[1, column], case, answer, place, title=f"Dice {answer.dice:.2f}")
    title = f"{case.case_id}, {found[0].structure}: the same network, other supports"
    return plots.credit(_legend(figure, title), fitted.task.data.manifest)


def worst_answers(fitted, cases: Sequence[Case], count: int = 4, best: int = 1, supports: int = 3) -> Figure:
    """The best and the worst answers by volume Dice, one a case: the support above, the case's largest slice below."""
    everything = [
        [
            (case, value, answer)
            for value in fitted.task.novel_structures
            for answer in ask(fitted, case, value, supports)
        ]
        for case in cases
    ]

    def dice(found) -> float:
        return found[2].dice

    high, low = (sorted((choose(part, key=dice) for part in everything), key=dice) for choose in (max, min))
    chosen = high[::-1][:best] + low[:count]
    figure, grid = plots.panels(2, len(chosen), squeeze=False, size=(2.3 * len(chosen), 5.2))
    for column, (case, value, answer) in enumerate(chosen):
        chunk, place = largest(case, value, fitted.task.chunks)
        support = fitted.task.support(answer.number, value)[chunk]
        draw_support(grid[0, column], support, title=f"{answer.structure}\n{answer.patients} annotated")
        title = f"{case.case_id}\nDice {answer.dice:.2f}"
        draw_answer(grid[1, column], case, answer, place, title=title)
    return plots.credit(_legend(figure, "the best answer, and the worst ones"), fitted.task.data.manifest)


def largest(case: Case, value: int, count: int) -> tuple[int, int]:
    """The slice of a case that shows most of a structure, after the number of the chunk, of `count`, that it is in."""
    place = int((_slices(case.label) == value).sum((1, 2)).argmax())
    return next(k for k, part in enumerate(chunks(extent(case, value), count)) if place in part), place


def draw_support(axes: Axes, support: Support, title: str = "") -> None:
    """The first shot of a chunk with its annotation."""
    plots.show_slice(axes, support.images[0, 0].numpy(), support.masks[0].numpy(), title=title)


def draw_answer(axes: Axes, case: Case, answer: Answer, place: int, title: str = "") -> None:
    """One slice of a case, cut out around the structure: the answer filled, the truth as a black and white line."""
    image, mask, truth = (_slices(volume)[place] for volume in (case.image[0], answer.mask, answer.truth))
    window = plots.around(truth, margin=25)
    plots.show_slice(axes, image[window], mask[window].astype(np.uint8), title=title)
    for shade, width in (("black", 1.8), ("white", 0.9)):
        axes.contour(truth[window], levels=[0.5], colors=[shade], linewidths=width, linestyles="--")


def _slices(volume: np.ndarray) -> np.ndarray:
    """(slices, H, W); a single image becomes one slice."""
    return volume[None] if volume.ndim == 2 else volume


def _legend(figure: Figure, title: str) -> Figure:
    handles = [
        Line2D([], [], color=plots.colour(0), linewidth=5, alpha=0.6, label="annotation, answer"),
        Line2D([], [], color="0.3", linestyle="--", label="truth of the case"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize=8, frameon=False, title=title)
    return figure
