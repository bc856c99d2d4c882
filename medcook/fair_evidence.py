"""What chapter 07's evidence figures show: equity, AUC under maskings, what an audit's probes read."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from medcook import plots, pooled, statistics
from medcook.fair_figures import MARKERS, bar

MASKINGS = {"full": "whole image", "without": "without lungs", "only": "lungs only"}
"""The maskings under which classifiers are tested, {part of the column's name: what it shows}."""


def draw_equity(axes: Axes, frame: pd.DataFrame, arms: Sequence[str]) -> None:
    """Equity-scaled Dice of every arm by both formulas, with 95% intervals."""
    formulas = {"equity_scaled_dice": "by the sum", "equity_scaled_dice_std": "by the spread"}
    for number, (metric, label) in enumerate(formulas.items()):
        for row, name in enumerate(arms):
            found = statistics.interval(frame[frame["arm"] == name], metric)
            style = {"color": plots.colour(number + 2), "fmt": MARKERS[number + 2], "markersize": 5, "capsize": 2}
            bar(axes, found.mean, found.low, found.high, row + 0.3 * (number - 0.5), **style)
        axes.plot([], [], style["fmt"], color=style["color"], label=label)
    axes.set_xlabel("equity-scaled Dice, 95% interval", fontsize=8)
    axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def tested_under(frame: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """AUC of every arm (rows) where the test images are masked so (columns), the mean over replicates."""
    found = {}
    for name in arms:
        mine = frame[frame["arm"] == name]
        found[name] = {
            label: np.mean([pooled.auc(part[f"score_{key}"].to_numpy(), part["outcome"].to_numpy()) for part in parts])
            for key, label in MASKINGS.items()
            for parts in [list(_replicates(mine))]
        }
    return pd.DataFrame.from_dict(found, orient="index")


def _replicates(frame: pd.DataFrame) -> Iterator[pd.DataFrame]:
    return (part for _, part in frame.groupby("replicate"))


def draw_tested(axes: Axes, table: pd.DataFrame) -> None:
    """`tested_under` as numbers on colours: dark is chance, light is perfect."""
    axes.imshow(table.to_numpy(), cmap="cividis", vmin=0.5, vmax=1, aspect="auto")
    for row, column in np.ndindex(table.shape):
        value = table.iloc[row, column]
        shade = "black" if value > 0.75 else "white"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=shade)
    axes.set_xticks(range(table.shape[1]), table.columns, fontsize=8)
    axes.set_title("AUC when tested on ...", fontsize=9)


def probed(frame: pd.DataFrame, arms: Sequence[str]) -> dict[str, dict[str, pd.DataFrame]]:
    """For `draw_auc`: what an audit's probes say of sex, age and site."""
    prefixes = {"sex": "", "older": "age_", "site": "site_"}
    mine = {name: frame[frame["arm"] == name] for name in arms}
    return {
        kind: {
            name: rows.assign(score=rows[f"{prefix}score"], outcome=rows[f"{prefix}outcome"])
            for name, rows in mine.items()
        }
        for kind, prefix in prefixes.items()
    }


def drained(frame: pd.DataFrame, arms: Sequence[str]) -> dict[str, dict[str, pd.DataFrame]]:
    """For `draw_auc`: an audit's finding where the ill have no drain, and where all of them have one."""
    plain = frame.assign(score=frame["finding_score"], outcome=frame["finding_outcome"])
    with_drain = plain.assign(score=plain["score"].where(plain["outcome"] == 0, frame["drained_score"]))
    kinds = {"no drain": plain, "the ill have a simulated drain": with_drain}
    return {kind: {name: rows[rows["arm"] == name] for name in arms} for kind, rows in kinds.items()}
