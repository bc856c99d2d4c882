"""Pictures of probabilities and raters: what a network says beside what people say, and whether it may be believed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from medcook import plots
from medcook.data import IGNORE
from medcook.data.manifests import Manifest
from medcook.measures.calibration import reliability
from medcook.measures.disagreement import entropy
from medcook.sampling import trained
from medcook.tasks import Samples

SURE = 0.95
"""From this probability on a network counts as sure, of a structure or of its absence."""
DISPUTED = 0.2
"""A pixel is disputed where at least this share of the raters is against the rest."""
SURE_DISPUTED, UNSURE_DISPUTED = "#D55E00", "#F0E442"


@dataclass(frozen=True)
class Forecast:
    """What a method says of the images of a role, beside what their raters say; all on the network's grid.

    images (N, C, H, W), probabilities (N, classes, H, W), raters (N, R, H, W), case_of (N,) number of the case
    """

    images: Tensor
    probabilities: Tensor
    raters: Tensor
    case_of: Tensor
    manifest: Manifest


@torch.no_grad()
def forecast(fitted, role: str = "val") -> Forecast:
    """The forecast of a trained method; images without raters have their label as the only one."""
    trained(fitted)
    samples = fitted.task.samples(role)
    said = torch.cat([fitted.method.predict(fitted.nets, part).float() for part in samples.images.split(16)])
    raters = samples.labels[:, None] if samples.raters is None else samples.raters
    return Forecast(samples.images, said, raters, samples.case_of, fitted.task.data.manifest)


def votes(raters: Tensor, value: int) -> Tensor:
    """(N, H, W) the share of each pixel's raters (N, R, H, W) who mark it as `value`; 0 where nobody annotated."""
    known = (raters != IGNORE).sum(1)
    return (raters == value).sum(1) / known.clamp_min(1)


def disputed(raters: Tensor, value: int) -> Tensor:
    """(N, H, W) bool: where at least `DISPUTED` of the raters are against the rest."""
    share = votes(raters, value)
    return torch.minimum(share, 1 - share) >= DISPUTED - 1e-6


def sure_where_disputed(said: Forecast, value: int) -> float:
    """The share of disputed pixels on which the network is sure; NaN where nothing is disputed."""
    probability, open_question = said.probabilities[:, value], disputed(said.raters, value)
    sure = torch.maximum(probability, 1 - probability)[open_question] >= SURE
    return float(sure.float().mean()) if len(sure) else float("nan")


def most_disputed(said: Forecast | Samples, value: int, count: int = 2) -> list[int]:
    """The images with the largest disputed share of what any rater marks as `value`, one a case.

    said  a Forecast, or a task's samples with raters
    """
    area = disputed(said.raters, value).flatten(1).sum(1) / (said.raters == value).any(1).flatten(1).sum(1).clamp_min(1)
    area = area * ((said.raters == value).any(1).flatten(1).float().mean(1) > 0.01)
    chosen: list[int] = []
    for number in area.argsort(descending=True, stable=True).tolist():
        if said.case_of[number] not in said.case_of[chosen]:
            chosen.append(number)
    return chosen[:count]


def near_structures(raters: Tensor) -> Tensor:
    """Raters (N, R, H, W) with `IGNORE` outside the box, wider by a quarter, around all that any of them marks.

    Most of an image is easy background; counted along, it makes every calibration error small.
    """
    found = torch.full_like(raters, IGNORE)
    for number, maps in enumerate(raters):
        inside = ((maps > 0) & (maps != IGNORE)).any(0)
        if inside.any():
            place = tuple(_span(inside.any(axis)) for axis in (1, 0))
            found[number][:, *place] = maps[:, *place]
    return found


def _span(there: Tensor) -> slice:
    places = there.nonzero()[:, 0]
    first, last = int(places[0]), int(places[-1]) + 1
    margin = (last - first) // 4
    return slice(max(0, first - margin), last + margin)


def reliability_of(said: Forecast, bins: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(confidence, accuracy, share of pixels) of each bin near the structures; every rater of a pixel counts once."""
    raters = near_structures(said.raters)
    everyone = said.probabilities.repeat(raters.shape[1], 1, 1, 1).transpose(0, 1)
    return reliability(everyone, raters.transpose(0, 1).flatten(0, 1), bins)


def calibration_error(curve: tuple[np.ndarray, np.ndarray, np.ndarray]) -> float:
    """The expected calibration error of what `reliability_of` found."""
    confidence, accuracy, share = curve
    return float(np.nansum(share * np.abs(accuracy - confidence)))


def reliability_diagram(said: Mapping[str, Forecast], bins: int = 10) -> Figure:
    """A panel a method: how often the likeliest class is right (raters as judges), against how sure the method was.

    Below the diagonal it promises too much; the orange bars are the gaps, and a dot's area the share of the pixels.
    """
    columns = min(5, len(said))
    rows = -(-len(said) // columns)
    figure, grid = plots.panels(rows, columns, size=(2.4 * columns, 2.7 * rows + 0.5), squeeze=False, sharex=True)
    for axes, (name, one) in zip(grid.ravel(), said.items(), strict=False):
        draw_reliability(axes, reliability_of(one, bins))
        axes.set_title(f"{name}\nECE {calibration_error(reliability_of(one, bins)):.3f}", fontsize=9)
    for axes in grid.ravel()[len(said) :]:
        axes.set_axis_off()
    grid[0, 0].set_ylabel("share that is right", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("said probability", fontsize=8)
    return plots.credit(figure, next(iter(said.values())).manifest)


def draw_reliability(axes: Axes, curve: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """Confidence against accuracy with the gap between them; bins with less than a thousandth of the pixels are left
    out."""
    confidence, accuracy, share = (part[curve[2] >= 1e-3] for part in curve)
    axes.plot([0, 1], [0, 1], color="0.5", linewidth=1, linestyle="--")
    axes.vlines(confidence, accuracy, confidence, color=plots.PALETTE[5], alpha=0.6, linewidth=4)
    axes.plot(confidence, accuracy, color=plots.PALETTE[0], linewidth=1)
    axes.scatter(confidence, accuracy, s=12 + 120 * share, color=plots.PALETTE[0], zorder=3)
    axes.set(xlim=(0.25, 1.03), ylim=(0.25, 1.03), aspect="equal")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def confidence_figure(said: Forecast, numbers: Sequence[int], value: int = 1) -> Figure:
    """A row an image: the raters' outlines, the share of them who mark a pixel, the network's probability, and the
    disputed pixels: orange where the network is sure all the same."""
    figure, grid = plots.panels(len(numbers), 4, size=(10.4, 2.7 * len(numbers) + 0.6), squeeze=False)
    share, question = votes(said.raters, value), disputed(said.raters, value)
    titles = ["every rater's outline", "share of the raters", "the network's probability", "where raters differ"]
    for row, number in zip(grid, numbers, strict=True):
        window = plots.around((said.raters[number] == value).any(0).numpy(), margin=8)
        image, probability = said.images[number, 0].numpy()[window], said.probabilities[number, value].numpy()[window]
        draw_raters(row[0], image, said.raters[number][:, *window].numpy() == value)
        for axes, values in ((row[1], share[number].numpy()[window]), (row[2], probability)):
            shown = axes.imshow(values, cmap="cividis", vmin=0, vmax=1)
            axes.set_axis_off()
        sure = np.maximum(probability, 1 - probability) >= SURE
        plots.show_slice(row[3], image)
        here = question[number].numpy()[window]
        for mask, colour in ((here & ~sure, UNSURE_DISPUTED), (here & sure, SURE_DISPUTED)):
            plots.tint(row[3], mask, colour)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    figure.colorbar(shown, ax=grid[:, 1:3].ravel().tolist(), location="bottom", shrink=0.5, aspect=40)
    handles = [
        Patch(color=SURE_DISPUTED, label=f"raters differ, the network is sure (p of at least {SURE})"),
        Patch(color=UNSURE_DISPUTED, label="raters differ, and the network is unsure"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return plots.credit(figure, said.manifest)


def draw_raters(axes: Axes, image: np.ndarray, masks: np.ndarray, title: str = "") -> None:
    """An image (H, W) with the outline of each mask (R, H, W) bool in a colour of its own."""
    plots.show_slice(axes, image, title=title)
    for number, mask in enumerate(masks):
        if mask.any():
            axes.contour(mask, levels=[0.5], colors=[plots.colour(number)], linewidths=1.0)


def sample_sheet(image: np.ndarray, rows: Mapping[str, np.ndarray], manifest: Manifest, *, count: int = 5) -> Figure:
    """A row a set of masks (K, H, W) bool, the raters' first: `count` of them, all outlines, and the share of them.

    image  (H, W)
    """
    count = min(count, max(map(len, rows.values())))
    figure, grid = plots.panels(len(rows), count + 2, size=(1.75 * (count + 2), 1.95 * len(rows) + 0.4), squeeze=False)
    everything = np.concatenate(list(rows.values())).any(0)
    window = plots.around(everything, margin=8)
    for line, (name, masks) in zip(grid, rows.items(), strict=True):
        for axes, mask in zip(line, masks[:count], strict=False):
            plots.show_slice(axes, image[window], 2 * mask[window].astype(np.uint8), fill=0.25)
        for axes in line[len(masks) :][: max(0, count - len(masks))]:
            axes.set_axis_off()
        draw_raters(line[count], image[window], masks[:, *window])
        line[count + 1].imshow(masks.mean(0)[window], cmap="cividis", vmin=0, vmax=1)
        line[count + 1].set_axis_off()
        line[0].set_title(name, fontsize=9, loc="left")
    grid[0, count].set_title(f"all of {len(next(iter(rows.values())))}", fontsize=9)
    grid[0, count + 1].set_title("share", fontsize=9)
    return plots.credit(figure, manifest)


def score_sheet(
    images: np.ndarray, marked: np.ndarray, maps: Mapping[str, np.ndarray], manifest: Manifest, *, what: str
) -> Figure:
    """A row an image: it with what is to be found outlined, then each map of scores on it, on a scale of its own.

    images (N, H, W), marked (N, H, W) bool, maps {title: (N, H, W)}; the outline is drawn into every panel
    """
    size = (2.2 * (len(maps) + 1), 2.2 * len(images) + 0.7)
    figure, grid = plots.panels(len(images), len(maps) + 1, size=size, squeeze=False)
    for number, row in enumerate(grid):
        plots.show_slice(row[0], images[number])
        for axes, scores in zip(row[1:], maps.values(), strict=True):
            low, high = np.percentile(scores, [1, 99.5])
            axes.imshow(scores[number], cmap="magma", vmin=low, vmax=max(high, low + 1e-6))
            axes.set_axis_off()
        for axes in row:
            if marked[number].any():
                axes.contour(marked[number], levels=[0.5], colors=[plots.PALETTE[4]], linewidths=1.2)
    for axes, title in zip(grid[0], ["image", *maps], strict=True):
        axes.set_title(title, fontsize=9)
    handles = [Line2D([], [], color=plots.PALETTE[4], label=what)]
    figure.legend(handles=handles, loc="outside upper center", frameon=False, fontsize=8)
    return plots.credit(figure, manifest)


def image_table(said: Forecast) -> pd.DataFrame:
    """A row an image: mean entropy of its pixels, and error (1 - Dice) of all that is not background."""
    guess, truth = said.probabilities.argmax(1) > 0, (said.raters[:, 0] > 0) & (said.raters[:, 0] != IGNORE)
    overlap, size = (each.flatten(1).sum(1) for each in (guess & truth, guess.int() + truth.int()))
    dice = torch.where(size > 0, 2 * overlap / size.clamp_min(1), 1.0)
    doubt = [float(entropy(each.numpy()).mean()) for each in said.probabilities]
    return pd.DataFrame({"uncertainty": doubt, "error": 1 - dice.numpy()})


def caught_and_missed(said: Forecast, count: int = 4) -> Figure:
    """Above, the images of which the network is least certain; below, the worst of the half of which it is surest.

    Filled: the prediction; the outline: the label.
    """
    table = image_table(said)
    count = min(count, len(table) // 2)
    order = table["uncertainty"].sort_values(kind="stable", ascending=False).index
    surest = table.loc[order[len(order) // 2 :], "error"].sort_values(kind="stable", ascending=False).index
    figure, grid = plots.panels(2, count, size=(2.1 * count, 5.2), squeeze=False)
    for line, numbers in zip(grid, (order[:count], surest[:count]), strict=True):
        for axes, number in zip(line, numbers, strict=True):
            place = int((order == number).argmax()) + 1
            title = f"error {table['error'][number]:.3f}\nuncertain: {place} of {len(table)}"
            plots.show_slice(axes, said.images[number, 0].numpy(), title=title)
            plots.tint(axes, (said.probabilities[number].argmax(0) > 0).numpy(), plots.PALETTE[0], 0.35)
            if (said.raters[number, 0] > 0).any():
                axes.contour(said.raters[number, 0].numpy() > 0, [0.5], colors=[plots.PALETTE[1]], linewidths=1.2)
    handles = [
        Patch(color=plots.PALETTE[0], alpha=0.5, label="prediction"),
        Line2D([], [], color=plots.PALETTE[1], label="label"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return plots.credit(figure, said.manifest)
