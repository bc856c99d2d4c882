"""What chapter 10 looks at: what a network is told, how an answer changes with each click, and what a click costs."""

import time
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from medcook import plots, statistics
from medcook.data import Case
from medcook.interactive import BESIDE, COUNTS, MEANT, Guided, InteractiveTask, careful_click, gaussians, no_marks
from medcook.sam.predictor import Answer
from medcook.sam.prompts import Prompt
from medcook.sam.zero_shot import Target
from medcook.training import Fitted

COLUMNS = dict(zip(COUNTS, ("dice", "dice_3", "dice_5"), strict=True))
"""{clicks: column of `medcook.interactive.click_rows`}."""


class GuidedPredictor:
    """A trained guided method behind the interface of the book's SAM, so that the same widget clicks on both.

    Images are planes (H, W) as prepared. A prompt that adds a point to the one before it gets an answer that knows the
    answer before; the IoU expected is that of the answer's own probabilities with its mask.
    """

    def __init__(self, fitted: Fitted):
        fitted.nets.load_state_dict(fitted.weights["last"])
        self.method, self.net = fitted.method, fitted.nets["average"].eval()
        self.image, self.state, self.before = None, None, None
        self.points = frozenset()

    @torch.no_grad()
    def look_ahead(self, image: np.ndarray, prompt: Prompt | None = None) -> None:
        """Work out what depends on the image alone."""
        if self.image is not image:
            self.image, self.before, self.points = image, None, frozenset()
            self.state = self.method.start(self.net, torch.from_numpy(image)[None, None])

    @torch.no_grad()
    def __call__(self, image: np.ndarray, prompt: Prompt) -> Answer:
        prompt.check(image.shape)
        self.look_ahead(image)
        marks = marked(prompt, image.shape)
        points = frozenset(map(tuple, marks.nonzero().tolist()))
        before = self.before if self.points < points else None
        self.before, self.points = self.method.respond(self.net, self.state, marks, before), points
        probability = self.before[0].float().softmax(0)[1]
        mask = probability > 0.5
        expected = probability[mask].sum() / torch.maximum(probability, mask.float()).sum().clamp_min(1e-6)
        logits = (self.before[0, 1] - self.before[0, 0]).float()
        return Answer(mask[None].numpy(), expected[None].numpy(), logits[None].numpy())


def marked(prompt: Prompt, shape: tuple[int, int]) -> Tensor:
    """Marks (1, 2, H, W) of a prompt's points; a box counts as a click in its middle."""
    marks = no_marks(torch.zeros(1, *shape))
    middle = () if prompt.box is None else (((prompt.box[0] + prompt.box[2]) / 2, (prompt.box[1] + prompt.box[3]) / 2),)
    for kind, points in ((MEANT, (*prompt.foreground, *middle)), (BESIDE, prompt.background)):
        for x, y in points:
            marks[0, kind, min(int(y), shape[0] - 1), min(int(x), shape[1] - 1)] = True
    return marks


def prepared_targets(task: InteractiveTask, case: Case) -> dict[str, Target]:
    """{structure: target} of a case of slices, as prepared: each on the slice that shows most of it."""
    images, labels = task.preparation.images(case)[:, 0].numpy(), task.preparation.labels(case).numpy()
    found = {}
    for value, name in task.targets.items():
        sizes = (labels == value).sum((1, 2))
        number = int(sizes.argmax())
        if sizes[number]:
            found[name] = Target(task.dataset, case.patient_id, name, images[number], labels[number] == value)
    return found


def guidance_figure(target: Target, method: Guided, answer: np.ndarray | None = None) -> Figure:
    """What a network is told: the image, the person's click, the channel that it makes, and the answer (H, W) bool."""
    truth = torch.from_numpy(target.mask)[None]
    marks = careful_click(no_marks(truth), torch.zeros_like(truth), truth)
    row, column = marks[0, MEANT].nonzero()[0].tolist()
    panels = 3 + (answer is not None)
    figure, cells = plots.panels(1, panels, size=(2.7 * panels, 3.2))
    for axes, title in zip(
        cells, ("what is meant", "a click", "the channel beside the image", "the answer"), strict=False
    ):
        plots.show_slice(axes, target.image, None, title=title)
    cells[0].contour(target.mask, [0.5], colors="white", linewidths=1.2, linestyles=":")
    cells[1].scatter([column], [row], s=90, marker="P", c=plots.PALETTE[2], edgecolors="white")
    cells[2].imshow(gaussians(marks, method.sigma)[0, MEANT].numpy(), cmap="cividis", vmin=0, vmax=1)
    if answer is not None:
        plots.tint(cells[3], answer, plots.PALETTE[1], 0.5)
        cells[3].contour(target.mask, [0.5], colors="white", linewidths=1.2, linestyles=":")
    return plots.credit(figure, target.dataset)


def clicks_table(frame: pd.DataFrame) -> pd.DataFrame:
    """A row an arm and number of clicks: mean Dice over patients with its 95% interval (low, high).

    After one click it is the column `dice_1` where there is one: then `dice` is something else.
    """
    rows, columns = [], COLUMNS | {1: "dice_1" if "dice_1" in frame else COLUMNS[1]}
    for arm, part in frame.groupby("arm", sort=False):
        for count, column in columns.items():
            if column in part and part[column].notna().any():
                found = statistics.interval(part, column)
                rows.append({"arm": arm, "clicks": count, "dice": found.mean, "low": found.low, "high": found.high})
    return pd.DataFrame(rows)


def clicks_figure(tables: Mapping[str, pd.DataFrame], *credits: str) -> Figure:
    """A panel a paper: Dice against the number of clicks of each of its arms (`clicks_table`), with 95% bands."""
    columns = min(3, len(tables))
    lines = -(-len(tables) // columns)
    figure, grid = plots.panels(lines, columns, size=(3.7 * columns, 3.1 * lines), squeeze=False)
    for axes, (title, table) in zip(grid.flat, tables.items(), strict=False):
        for number, (arm, part) in enumerate(table.groupby("arm", sort=False)):
            shade = plots.colour(number)
            axes.plot(part["clicks"], part["dice"], "osD^v"[number % 5] + "-", color=shade, label=arm, markersize=5)
            axes.fill_between(part["clicks"], part["low"], part["high"], color=shade, alpha=0.15, linewidth=0)
        axes.set_xticks(list(COLUMNS))
        axes.set_xlabel("clicks or other interactions an image", fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.legend(fontsize=7, frameon=False, loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(tables) :]:
        axes.set_axis_off()
    figure.supylabel("Dice", fontsize=9)
    return plots.credit(figure, *credits)


@torch.no_grad()
def click_seconds(
    methods: Mapping[str, tuple[Guided, torch.nn.Module]], images: Tensor, repeats: int = 5
) -> pd.DataFrame:
    """Milliseconds, the median of `repeats`, of what is worked out once an image and of what each click takes."""
    marks, rows = no_marks(images[:, 0]), {}
    for name, (method, net) in methods.items():
        once, each = [], []
        for _ in range(repeats + 1):
            begun = time.perf_counter()
            state = method.start(net, images)
            ready = time.perf_counter()
            method.respond(net, state, marks, None)
            once.append(1000 * (ready - begun)), each.append(1000 * (time.perf_counter() - ready))
        rows[name] = {"once an image, ms": np.median(once[1:]), "each click, ms": np.median(each[1:])}
    return pd.DataFrame(rows).T


def best_and_worst(rows: Sequence[Mapping], column: str = "dice") -> tuple[Mapping, Mapping]:
    """The rows of `click_rows` with the highest and the lowest value."""
    ordered = sorted(rows, key=lambda one: one[column])
    return ordered[-1], ordered[0]


def scribbles_figure(target: Target, drawn: np.ndarray, simulated: Mapping[str, np.ndarray]) -> Figure:
    """A scribble of a person (H, W) bool beside simulated ones, on a target whose border is dotted."""
    figure, cells = plots.panels(1, 1 + len(simulated), size=(2.5 * (1 + len(simulated)), 3.0))
    for axes, (title, scribble) in zip(cells, {"a person's": drawn, **simulated}.items(), strict=True):
        plots.show_slice(axes, target.image, None, title=title)
        plots.tint(axes, scribble, plots.PALETTE[1], 1.0)
        axes.contour(target.mask, [0.5], colors="white", linewidths=1.0, linestyles=":")
    return plots.credit(figure, target.dataset)


def kinds_table(frame: pd.DataFrame, kinds: Mapping[str, str]) -> pd.DataFrame:
    """Mean Dice of a first answer, with its 95% interval over patients, to each kind of prompt ({name: column})."""
    found = {name: statistics.interval(frame, column) for name, column in kinds.items()}
    return pd.DataFrame({name: {"dice": one.mean, "low": one.low, "high": one.high} for name, one in found.items()}).T


def kinds_figure(table: pd.DataFrame, credit: str) -> Figure:
    """Dice of the first answer by kind of prompt (`kinds_table`), with 95% intervals."""
    figure, axes = plots.panels(size=(7.5, 1.1 + 0.4 * len(table)))
    places = np.arange(len(table))
    axes.hlines(places, table["low"], table["high"], color=plots.PALETTE[0], linewidth=2)
    axes.plot(table["dice"], places, "o", color=plots.PALETTE[0], markersize=7)
    for place, value in zip(places, table["dice"], strict=True):
        axes.annotate(f"{value:.2f}", (value, place), (0, 7), textcoords="offset points", ha="center", fontsize=9)
    axes.set_yticks(places, table.index)
    axes.set_ylim(len(table) - 0.5, -0.7)
    axes.set_xlabel("Dice of the first answer", fontsize=9)
    axes.grid(axis="x", color="0.9")
    axes.spines[["top", "right", "left"]].set_visible(False)
    return plots.credit(figure, credit)
