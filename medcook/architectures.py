"""What chapter 08 looks at besides Dice: which pixels a network sees, what it costs, and where variants differ."""

from collections.abc import Mapping, Sequence
from copy import deepcopy

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medcook import plots, statistics
from medcook.networks import parameters
from medcook.records import Summary
from medcook.teaching import with_interval
from medcook.training import Fitted

SLICE = (128, 128)
"""Height and width in pixels of a slice as the hearts are prepared."""

MARKERS = "os^D"
PLACES = ("way down", "skips", "way up", "heads")
"""Where variants of the U-Net differ from it, in the order of the picture."""


def seen_by(network: nn.Module, image: Tensor, row: int, column: int) -> Tensor:
    """How much each pixel of an image (1, C, H, W) moves the answer at one pixel: (H, W), largest 1.

    The absolute gradient of that pixel's largest logit: the effective receptive field (Luo et al., NeurIPS 2016), here
    of one image instead of a mean over noise.
    """
    network.eval()
    with torch.enable_grad():
        image = image.detach().clone().requires_grad_(True)
        network(image)[0, :, row, column].max().backward()
    field = image.grad[0].abs().sum(0)
    network.zero_grad(set_to_none=True)
    return field / field.max().clamp_min(1e-12)


def reach(field: Tensor, row: int, column: int, share: float = 0.95) -> float:
    """The smallest distance, in pixels, within which `share` of a field's sum lies around (row, column)."""
    rows, columns = torch.meshgrid(*(torch.arange(size) for size in field.shape), indexing="ij")
    distance = ((rows - row) ** 2 + (columns - column) ** 2).double().sqrt().flatten()
    order = distance.argsort()
    within = field.double().flatten()[order].cumsum(0)
    return float(distance[order][int((within < share * within[-1]).sum())])


def multiply_adds(network: nn.Module, image: Tensor) -> int:
    """Multiplications that a forward pass of `image` (B, C, H, W) takes, counted by PyTorch in convolutions, matrix
    products and attention; what is element-wise is not counted."""
    network = deepcopy(network).requires_grad_(False).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    return counter.get_total_flops() // 2


def cost_table(networks: Mapping[str, nn.Module], image: Tensor) -> pd.DataFrame:
    """A row a network: parameters, multiply-adds of one image (1, C, H, W), both also over those of the first."""
    rows = [
        {"network": name, "parameters": parameters(network), "multiply-adds": multiply_adds(network, image)}
        for name, network in networks.items()
    ]
    table = pd.DataFrame(rows).set_index("network")
    for name in ("parameters", "multiply-adds"):
        table[f"{name}, times"] = table[name] / table[name].iloc[0]
    return table


def seen_figure(networks: Mapping[str, nn.Module], image: Tensor, pixel: tuple[int, int], credit: str) -> Figure:
    """The image with the pixel that is asked about, and for each network what its answer there depends on."""
    figure, row = plots.panels(1, len(networks) + 1, size=(2.5 * (len(networks) + 1), 3.5))
    plots.show_slice(row[0], image[0, 0].numpy(), title="the pixel that is asked about")
    row[0].plot(pixel[1], pixel[0], "+", color=plots.PALETTE[1], markersize=14, markeredgewidth=2)
    for axes, (name, network) in zip(row[1:], networks.items(), strict=True):
        field = seen_by(network, image, *pixel)
        axes.imshow(np.log10(field.numpy() + 1e-4), cmap="cividis", vmin=-4, vmax=0)
        axes.plot(pixel[1], pixel[0], "+", color=plots.PALETTE[1], markersize=14, markeredgewidth=2)
        axes.set_title(f"{name}\n95% within {reach(field, *pixel):.0f} pixels", fontsize=9)
        axes.set_axis_off()
    return plots.credit(figure, credit)


def gains(pairs: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]]) -> pd.DataFrame:
    """A row a pair of frames of per-case rows: the Dice of the first less that of the second, with its interval, p of
    the paired test, and p after Holm over all pairs."""
    found = {name: statistics.difference(*frames, "dice") for name, frames in pairs.items()}
    table = pd.DataFrame({name: [each.effect, each.low, each.high, each.p] for name, each in found.items()}).T
    table.columns = ["gain", "low", "high", "p"]
    return table.assign(holm=statistics.holm(table["p"].to_numpy(dtype=float)))


def gains_over(
    summaries: Sequence[Summary],
    frames: Mapping[str, pd.DataFrame],
    networks: Mapping[str, nn.Module],
    size: tuple[int, ...] = SLICE,
) -> pd.DataFrame:
    """A row a paper: its method's Dice less its comparator's, with interval, p (raw, and after Holm over all rows), and
    the columns of `cost_table`, which are over the first of the networks.

    frames    {paper: per-case rows of its arms}; networks of {name: network} under the same names
    size      sides of the image whose multiply-adds are counted
    """
    pairs = {}
    for summary in summaries:
        frame, pair = frames[summary.paper], summary.comparison
        pairs[summary.paper] = tuple(frame[frame["arm"] == arm] for arm in (pair.a, pair.b))
    table = gains(pairs).rename_axis("paper")
    return table.join(cost_table(networks, torch.zeros(1, 1, *size)))


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `gains_over` for reading, the largest gain first."""
    ordered = table.sort_values("gain", ascending=False)
    shown = {
        "Dice gained [95% interval]": [
            with_interval(*row, sign=True) for row in ordered[["gain", "low", "high"]].itertuples(index=False)
        ],
        "p, Holm": [f"{p:.2g}" for p in ordered["holm"]],
        "parameters, times the U-Net's": ordered["parameters, times"].round(2).to_numpy(),
        "multiply-adds, times": ordered["multiply-adds, times"].round(2).to_numpy(),
    }
    return pd.DataFrame(shown, index=ordered.index)


def cost_figure(table: pd.DataFrame, credit: str) -> Figure:
    """What each variant gains over the U-Net (a table of `gains_over`), against its parameters and multiply-adds."""
    figure, row = plots.panels(1, 2, size=(11, 4.6), sharey=True)
    for axes, cost in zip(row, ("parameters", "multiply-adds"), strict=True):
        axes.axhline(0, color="0.6", linewidth=1)
        axes.axvline(1, color="0.6", linewidth=1)
        for number, (paper, line) in enumerate(table.iterrows()):
            bars = [[line["gain"] - line["low"]], [line["high"] - line["gain"]]]
            shade, marker = plots.colour(number), MARKERS[number // len(plots.PALETTE) % len(MARKERS)]
            axes.errorbar(line[f"{cost}, times"], line["gain"], bars, fmt=marker, color=shade, capsize=2, label=paper)
        axes.set(xscale="log", xlabel=f"{cost}, times the U-Net's")
        low, high = table[f"{cost}, times"].agg(["min", "max"])
        ticks = [tick for tick in (0.1, 0.25, 0.5, 1, 2, 4, 8) if low / 1.6 < tick < high * 1.6]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    row[0].set_ylabel("Dice gained over the U-Net, 95% interval")
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    return plots.credit(figure, credit)


def anatomy(changes: Mapping[str, Sequence[str]]) -> Figure:
    """The U-Net as blocks, and beside each of its `PLACES` the papers that change it."""
    figure, axes = plots.panels(size=(10, 4.6))
    blocks = [(x, 3 - abs(x - 3), 1.25 - 0.22 * (3 - abs(x - 3))) for x in range(7)]
    for x, depth, height in blocks:
        shade = plots.PALETTE[0] if x < 3 else plots.PALETTE[4] if x == 3 else plots.PALETTE[2]
        axes.add_patch(Rectangle((1.5 * x, -1.15 * depth), 0.55, height * 0.72, color=shade, alpha=0.85, linewidth=0))
    for x in range(6):
        (left, depth, _), (right, other, _) = blocks[x], blocks[x + 1]
        start, end = (1.5 * left + 0.6, -1.15 * depth + 0.3), (1.5 * right - 0.05, -1.15 * other + 0.3)
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color="0.35"))
    for x in range(3):
        start, end = (1.5 * x + 0.62, -1.15 * x + 0.5), (1.5 * (6 - x) - 0.07, -1.15 * x + 0.5)
        style = dict(arrowstyle="-|>", mutation_scale=9, color=plots.PALETTE[1], linestyle="--")
        axes.add_patch(FancyArrowPatch(start, end, **style))
    spots = {"way down": (-0.4, -2.0, "right"), "skips": (4.75, 1.25, "center"), "way up": (10.0, -2.0, "left")}
    spots["heads"] = (10.0, 0.45, "left")
    for place in PLACES:
        x, y, side = spots[place]
        text = f"{place}:\n" + "\n".join(changes.get(place, ()))
        if place == "skips":
            text = f"{place}: " + ", ".join(changes.get(place, ()))
        axes.text(x, y, text, ha=side, va="center", fontsize=9)
    axes.set(xlim=(-3.4, 13.2), ylim=(-3.9, 1.6))
    axes.set_axis_off()
    return figure


def fitted_network(fitted: Fitted) -> nn.Module:
    """The network of a training run that predicts, with its last weights, in evaluation mode."""
    fitted.nets.load_state_dict(fitted.weights["last"])
    return fitted.nets["average"].eval()
