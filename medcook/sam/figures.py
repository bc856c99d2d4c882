"""Chapter 03's own figures and tables: what the small SAM can do unadapted, and what an adaptation costs and brings."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from medcook.plots import colour, credit, panels
from medcook.records import Summary
from medcook.sam.card import OURS, means
from medcook.teaching import with_interval

MARKERS = ("o", "s", "D", "^")
ARM_MARKERS = "osD^vPX*<>ph"


def zero_shot_figure(rows: pd.DataFrame, prompts: Sequence[str] = ("box", "1 click", "5 clicks")) -> Figure:
    """Dice of each set and structure, a panel a prompt: the small SAM and its competitors, sorted by the first panel.

    rows  of the model card: columns dataset, structure, prompt, method, patient_id, dice
    """
    table = means(rows)
    order = table.xs(prompts[0], level="prompt")[OURS].sort_values().index
    figure, grid = panels(1, len(prompts), size=(3.1 * len(prompts) + 1.2, 0.42 * len(order) + 1.9), sharey=True)
    methods = [OURS, *(name for name in table.columns if name != OURS)]
    for axes, prompt in zip(np.atleast_1d(grid), prompts, strict=True):
        part = table.xs(prompt, level="prompt").loc[order]
        for number, method in enumerate(methods):
            shape = {"marker": MARKERS[number % len(MARKERS)], "color": colour(number), "linestyle": ""}
            size = 8 if method == OURS else 5
            axes.plot(part[method], range(len(order)), markersize=size, label=method, **shape)
        axes.set(xlim=(-0.03, 1.03), xlabel="Dice", title=prompt)
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    np.atleast_1d(grid)[0].set_yticks(range(len(order)), [f"{name}, {dataset}" for dataset, name in order])
    handles, labels = np.atleast_1d(grid)[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(methods), frameon=False)
    return credit(figure, *dict.fromkeys(dataset for dataset, _ in order))


def cost_table(*summaries: Summary) -> pd.DataFrame:
    """A row an arm: Dice (or what the recipe measures) with its interval, parameters trained, seconds of training."""
    rows = [
        {
            "paper": summary.paper,
            "arm": name,
            summary.metric: with_interval(arm.mean, arm.low, arm.high),
            "parameters trained": f"{arm.cost['parameters']:,.0f}",
            "seconds": f"{arm.cost['seconds']:.0f}",
        }
        for summary in summaries
        for name, arm in summary.arms.items()
    ]
    return pd.DataFrame(rows).set_index(["paper", "arm"])


def cost_figure(summary: Summary) -> Figure:
    """What a recipe measures of each arm, with its interval, against the parameters that the arm trains."""
    figure, axes = panels(size=(7.2, 4.2))
    for number, (name, arm) in enumerate(summary.arms.items()):
        bounds = [[arm.mean - arm.low], [arm.high - arm.mean]]
        trained = max(1.0, arm.cost["parameters"])
        marker = ARM_MARKERS[number % len(ARM_MARKERS)]
        label = f"{name} ({arm.cost['seconds']:.0f} s)"
        axes.errorbar(trained, arm.mean, yerr=bounds, fmt=marker, color=colour(number), capsize=3, label=label)
    axes.set_xscale("log")
    axes.xaxis.set(major_locator=LogLocator(subs=(1, 3)), major_formatter="{x:,.0f}", minor_formatter=NullFormatter())
    axes.set(xlabel="parameters trained", ylabel=summary.metric.replace("_", " "))
    axes.set_title(f"{summary.title}: {summary.verdict}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, title="arm (seconds of training)", fontsize=8)
    return credit(figure, summary.dataset)
