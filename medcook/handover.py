"""What uncertainty is worth at the bedside: hand over the least certain cases, or promise a bound and keep it."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from medcook import plots, pooled, statistics
from medcook.data.manifests import Manifest
from medcook.measures.conformal import choose_lambda
from medcook.measures.selective import handed_over
from medcook.teaching import with_interval

SHARES = np.linspace(0, 0.9, 46)
"""Shares of the cases that are handed over, in figures."""
RESAMPLES = 500
"""For the intervals of `handover_table`, whose measures are computed anew for each."""
KEPT, HANDED = plots.PALETTE[0], plots.PALETTE[1]


def rest_error(uncertainty, error, shares: Sequence[float] = SHARES) -> np.ndarray:
    """Mean error of the rest when each share of the cases, the most uncertain first, is handed to a person."""
    return np.array([handed_over(uncertainty, error, share)[1] for share in shares])


def mean_curve(frame: pd.DataFrame, by: str = "uncertainty") -> np.ndarray:
    """`rest_error` of one arm, the mean of its replicates; folds are put together, they are one data set.

    by  the column that orders the cases; `error` for the order of somebody who knows every error beforehand
    """
    together = "replicate" not in frame or pooled.is_nested(frame)
    parts = [frame] if together else [part for _, part in frame.groupby("replicate")]
    return np.mean([rest_error(part[by], part["error"]) for part in parts], axis=0)


def handover_figure(frame: pd.DataFrame, dataset: str, arms: Sequence[str], share: float = 0.1) -> Figure:
    """Error of the rest against the share handed over, a colour an arm.

    Dashed: the same cases in the order of their true errors, which nobody has; dotted: in any order at all.
    """
    figure, axes = plots.panels(size=(6.6, 3.9))
    draw_handover(axes, frame, arms, share)
    return plots.credit(figure, dataset)


def draw_handover(axes: Axes, frame: pd.DataFrame, arms: Sequence[str], share: float = 0.1) -> None:
    """The curves of `handover_figure`."""
    for number, name in enumerate(arms):
        mine, colour = frame[frame["arm"] == name], plots.colour(number)
        axes.plot(SHARES, mean_curve(mine), color=colour, linewidth=1.8)
        axes.plot(SHARES, mean_curve(mine, "error"), color=colour, linewidth=1, linestyle="--")
        axes.axhline(mine["error"].mean(), color=colour, linewidth=1, linestyle=":")
    axes.axvline(share, color="0.7", linewidth=1, zorder=0)
    axes.set(xlabel="share of the cases that a person looks at", ylabel="mean error (1 − Dice) of the rest")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], color=plots.colour(number), label=name) for number, name in enumerate(arms)]
    for style, label in (("--", "if every error were known"), (":", "cases drawn at random")):
        handles.append(Line2D([], [], color="0.4", linestyle=style, linewidth=1, label=label))
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="lower left")


def handover_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row an arm: what handing over a tenth of the cases gains, and how well uncertainty ranks errors."""
    rows = []
    for name in dict.fromkeys(frame["arm"]):
        mine = frame[frame["arm"] == name]
        gain, rank = (statistics.interval(mine, name, RESAMPLES) for name in ("handover_gain", "rank_correlation"))
        best = mean_curve(mine, "error")
        rows.append(
            {
                "arm": name,
                "error of all": f"{mine['error'].mean():.3f}",
                "gain, a tenth handed over": with_interval(gain.mean, gain.low, gain.high, sign=True),
                "best possible gain": f"{mine['error'].mean() - np.interp(0.1, SHARES, best):+.3f}",
                "rank correlation": with_interval(rank.mean, rank.low, rank.high),
                "area under the curve": f"{pooled.value(mine, 'aurc'):.3f}",
                "patients": gain.n_patients,
            }
        )
    return pd.DataFrame(rows).set_index("arm")


def handover_view(frame: pd.DataFrame, arm: str, share: float, dataset: str) -> Figure:
    """One training run of an arm: every case by its uncertainty and error, those handed over in orange; and what is
    left of the error."""
    mine = frame[frame["arm"] == arm]
    mine = mine[mine["replicate"] == mine["replicate"].min()]
    order = mine.sort_values("uncertainty", kind="stable", ignore_index=True)
    everything, rest = handed_over(order["uncertainty"], order["error"], share)
    kept = len(order) - int(np.ceil(share * len(order) - 1e-9))
    figure, (left, right) = plots.panels(1, 2, size=(9, 3.9), width_ratios=(1.2, 1))
    dots = {"linestyle": "", "marker": "o", "markersize": 4, "alpha": 0.7, "markeredgewidth": 0}
    places = np.arange(1, len(order) + 1)
    left.plot(places[:kept], order["error"][:kept], color=KEPT, label="the network's answer is used", **dots)
    left.plot(places[kept:], order["error"][kept:], color=HANDED, label="a person looks", **{**dots, "marker": "D"})
    left.axhline(everything, color="0.5", linewidth=1, linestyle=":")
    left.hlines(rest, 1, max(1, kept), color=KEPT, linewidth=1.5)
    left.set(xlabel="cases, from certain to uncertain", ylabel="error (1 − Dice)")
    left.set_ylim(0, 1.2 * max(1e-3, order["error"].max()))
    left.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    left.set_title(f"{arm}: {len(order) - kept} of {len(order)} handed over", fontsize=9)
    _draw_curve(right, order, share, rest)
    right.set_title(f"error of all {everything:.3f}, of the rest {rest:.3f}", fontsize=9)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return plots.credit(figure, dataset)


def _draw_curve(axes: Axes, cases: pd.DataFrame, share: float, rest: float) -> None:
    axes.plot(SHARES, rest_error(cases["uncertainty"], cases["error"]), color=KEPT, label="by uncertainty")
    known = rest_error(cases["error"], cases["error"])
    axes.plot(SHARES, known, color="0.4", linestyle="--", linewidth=1, label="if every error were known")
    axes.axhline(cases["error"].mean(), color="0.5", linestyle=":", linewidth=1, label="at random")
    axes.plot([share], [rest], "o", color=HANDED, markersize=8, zorder=3)
    axes.set(xlabel="share of the cases handed over", ylabel="mean error of the rest")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


THRESHOLDS = np.concatenate([[0.999, 0.99, 0.98, 0.95], np.linspace(0.9, 0.05, 18), [0.02, 0.01, 0.001, 0.0]])
"""Probabilities from which a pixel is marked, from strict to careful: the lambdas of a conformal promise."""


def as_cases(values: Tensor, case_of: Tensor) -> Tensor:
    """(N, H, W) slices of cases with equally many slices: (cases, slices * H, W)."""
    return torch.stack([values[case_of == number].flatten(0, 1) for number in case_of.unique()])


def missed_shares(probability: Tensor, truth: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> np.ndarray:
    """(N, thresholds) the share of each structure that is not marked where p reaches the threshold.

    probability (N, H, W) of the structure, truth (N, H, W) bool; 0 where there is nothing to miss
    """
    size = truth.flatten(1).sum(1).clamp_min(1)
    return _over(lambda level: (truth & (probability < level)).flatten(1).sum(1) / size, thresholds)


def marked_shares(probability: Tensor, truth: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> np.ndarray:
    """(N, thresholds) the marked area over the true one: what a careful threshold costs."""
    size = truth.flatten(1).sum(1).clamp_min(1)
    return _over(lambda level: (probability >= level).flatten(1).sum(1) / size, thresholds)


def _over(measure, thresholds: Sequence[float]) -> np.ndarray:
    return torch.stack([measure(level) for level in thresholds], dim=1).double().numpy()


def promises(
    here: np.ndarray, alpha: float, count: int, elsewhere: np.ndarray | None = None, draws: int = 500, seed: int = 0
) -> pd.DataFrame:
    """What becomes of a promise, over many draws of the calibration cases.

    here       losses (cases, lambdas) of exchangeable cases: `count` of them choose lambda, the others are scored
    elsewhere  losses of cases from another place, scored with the same lambda
    Columns: chosen (position of lambda), here, elsewhere (mean losses at it).
    """
    rng, rows = np.random.default_rng(seed), []
    for _ in range(draws):
        order = rng.permutation(len(here))
        chosen = choose_lambda(here[order[:count]], alpha)
        row = {"chosen": chosen, "here": here[order[count:], chosen].mean()}
        rows.append(row if elsewhere is None else row | {"elsewhere": elsewhere[:, chosen].mean()})
    return pd.DataFrame(rows)


def promise_figure(table: pd.DataFrame, alpha: float, names: tuple[str, str], manifest: Manifest | str) -> Figure:
    """How much is missed, on average over further cases, in each draw of the calibration cases: here and elsewhere."""
    columns = [name for name in ("here", "elsewhere") if name in table]
    top = 1.1 * max(alpha, table[columns].to_numpy().max())
    figure, axes = plots.panels(size=(7, 3.5))
    edges = np.linspace(0, top, 45)
    for number, column in enumerate(columns):
        axes.hist(table[column], edges, color=plots.colour(number), alpha=0.6, label=names[number])
        axes.axvline(table[column].mean(), color=plots.colour(number), linewidth=1.5)
    axes.axvline(alpha, color="black", linestyle="--", linewidth=1.2, label=f"promised: at most {alpha} on average")
    axes.set(xlabel="share of the structure that is missed, mean over cases", ylabel="draws", xlim=(0, top))
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return plots.credit(figure, manifest)
