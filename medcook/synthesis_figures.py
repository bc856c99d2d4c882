"""What chapter 15 looks at: an image that drowns in noise and comes back, and made images beside real ones."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from medcook import plots
from medcook.data.manifests import Manifest


class Shown(NamedTuple):
    """An image (H, W), with a label map (H, W) or none; `limits`: what is shown black and white."""

    image: np.ndarray
    label: np.ndarray | None = None
    limits: tuple[float, float] | None = None


def gallery(rows: Mapping[str, Mapping[str, Shown]], manifest: Manifest, legend: bool = False) -> Figure:
    """A row of images for each name; where an image names no limits, a row shares those of its first image."""
    columns = max(map(len, rows.values()))
    figure, axes = plots.panels(len(rows), columns, size=(1.55 * columns + 1.2, 1.85 * len(rows)), squeeze=False)
    for panels, (name, shown) in zip(axes, rows.items(), strict=True):
        first = next(iter(shown.values())).image
        shared = tuple(np.percentile(first, [0.5, 99.8]))
        for panel, (title, (image, label, limits)) in zip(panels, shown.items(), strict=False):
            plots.show_slice(panel, image, label, title=title, fill=0.25, limits=limits or shared)
        for panel in panels[len(shown) :]:
            panel.set_axis_off()
        panels[0].text(-0.08, 0.5, name, transform=panels[0].transAxes, ha="right", va="center", fontsize=9)
    if legend:
        plots.structure_legend(figure, manifest.structures)
    return plots.credit(figure, manifest)


def drowned(diffusion, image: Tensor, times: Sequence[int], seed: int = 0) -> dict[int, Tensor]:
    """{t: x_t (1, 1, H, W)} of an image (1, 1, H, W), with the same noise at every time."""
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    return {t: diffusion.noised(image, noise, torch.tensor([t])) for t in times}


def way_back(diffusion, net, start: Tensor, count: int) -> dict[int, Tensor]:
    """{t: what the network takes for the clean image (B, C, H, W)} on the way from noise, in `count` steps."""
    seen = {}

    def keep(clean: Tensor, t: int) -> Tensor:
        seen[t] = clean
        return clean

    diffusion.sample(net, start, count, change=keep)
    return seen


def believed(diffusion, net, image: Tensor, t: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x_t of an image (1, 1, H, W), and what the network takes for the image behind it."""
    noisy = drowned(diffusion, image, [t], seed)[t]
    with torch.no_grad():
        said = net(noisy, torch.tensor([t])).float()
    return noisy, diffusion.seen(said, noisy, torch.tensor([t]))[0]


def noise_figure(diffusion, net, image: Tensor, t: int, seed: int, manifest: Manifest) -> Figure:
    """An image, the same with the noise of time t, what a network makes of it, and where it is wrong."""
    noisy, clean = believed(diffusion, net, image, t, seed)
    away = (clean - image).abs()
    share = float(diffusion.signal[t])
    shown = {
        "image": Shown(image[0, 0].numpy()),
        f"t = {t}: signal {share:.3f}": Shown(noisy[0, 0].numpy(), limits=(-3.0, 3.0)),
        "what the network sees in it": Shown(clean[0, 0].numpy()),
        f"away by {float(away.square().mean().sqrt()):.2f}": Shown(away[0, 0].numpy(), limits=(0.0, 2.0)),
    }
    return gallery({"": shown}, manifest)


def suppression_figure(frame: pd.DataFrame, measures: Mapping[str, str], dataset: str) -> Figure:
    """Patients' measures by arm: a dot a patient, a line where the mean is.

    frame     columns arm, patient_id and the measures
    measures  {column: its name in the figure}
    """
    arms = list(dict.fromkeys(frame["arm"]))
    figure, axes = plots.panels(
        1, len(measures), size=(3.1 * len(measures) + 1.2, 0.42 * len(arms) + 1.3), squeeze=False
    )
    means = frame.groupby(["arm", "patient_id"])[list(measures)].mean()
    for number, (panel, (column, name)) in enumerate(zip(axes[0], measures.items(), strict=True)):
        for place, arm in enumerate(arms):
            values = means.loc[arm, column].to_numpy()
            jitter = np.linspace(-0.18, 0.18, len(values))
            panel.plot(values, place + jitter, "o", color=plots.colour(place), markersize=4, alpha=0.7)
            panel.plot([values.mean()] * 2, [place - 0.32, place + 0.32], color="black", linewidth=2)
        panel.set_yticks(range(len(arms)), arms if number == 0 else [""] * len(arms))
        panel.set(xlabel=name, ylim=(len(arms) - 0.5, -0.5))
        panel.spines[["top", "right"]].set_visible(False)
    return plots.credit(figure, dataset)
