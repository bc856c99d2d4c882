"""U-Bench (Tang et al., preprint 2025, arXiv 2510.07041): a hundred variants of the U-Net under one protocol.

A table of Dice does not say whether a difference means anything, nor what it costs. The benchmark asks both: each
variant is tested against the U-Net, and U-Score weighs what it reaches against its size and computation. Here are this
chapter's variants, trained by their own recipes, with that protocol.
"""

from functools import cache

import numpy as np
import pandas as pd
import torch
from torch import nn

from medcook import evaluation
from medcook.architectures import SLICE, cost_table, gains, multiply_adds
from medcook.data import Case
from medcook.methods import Method
from medcook.recipes.architectures._settings import BASELINE, scales
from medcook.recipes.architectures.isnet_dis import ISNet
from medcook.recipes.architectures.lightm_unet import LightM
from medcook.recipes.architectures.mk_unet import MKNet
from medcook.recipes.architectures.paratranscnn import ParallelEncoders
from medcook.recipes.architectures.pranet import Pra
from medcook.recipes.architectures.transdae import TransDae
from medcook.recipes.architectures.unetpp import UNetPP
from medcook.recipes.architectures.wau import Wau
from medcook.recipes.architectures.xlstm_unet import Xlstm
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.training import Fitted

VARIANTS: dict[str, Method] = {
    "unet": BASELINE,
    "wau": Wau(),
    "pranet": Pra(),
    "paratranscnn": ParallelEncoders(),
    "lightm-unet": LightM(),
    "transdae": TransDae(),
    "mk-unet": MKNet(),
    "unet++": UNetPP(),
    "is-net": ISNet(),
    "xlstm-unet": Xlstm(),
}
COSTS = ("parameters", "multiply-adds")
QUANTILES = (0.1, 0.9)


@cache
def costs() -> pd.DataFrame:
    """Parameters, and multiply-adds of a slice, of every variant."""
    with torch.random.fork_rng():
        networks = {name: method.build(1, 4, 2)["model"] for name, method in VARIANTS.items()}
    return cost_table(networks, torch.zeros(1, 1, *SLICE))


def placed(value: float, pool: np.ndarray) -> float:
    """Where a cost lies in a pool, on a logarithmic scale: 1 up to its 10th percentile, 0 from its 90th on."""
    low, high = np.quantile(np.log(pool), QUANTILES)
    return float(np.clip((high - np.log(value)) / (high - low), 0, 1))


def efficiency(parameters: float, multiply_adds: float) -> float:
    """The mean of both costs' places among the variants, 0 to 1."""
    pool = costs()
    places = [
        placed(value, pool[name].to_numpy()) for name, value in zip(COSTS, (parameters, multiply_adds), strict=True)
    ]
    return sum(places) / len(places)


def u_score(quality: float, efficient: float) -> float:
    """The harmonic mean of quality (IoU) and efficiency, both 0 to 1: high where neither is low."""
    return 2 * quality * efficient / (quality + efficient) if quality + efficient else 0.0


def score(fitted: Fitted, case: Case) -> list[dict]:
    """Dice, IoU and U-Score of each structure."""
    network: nn.Module = fitted.nets["average"]
    size = sum(parameter.numel() for parameter in network.parameters())
    efficient = efficiency(size, multiply_adds(network, torch.zeros(1, 1, *SLICE)))
    rows = evaluation.score_case(fitted.predict(case), case, fitted.task.structures)
    return [{**row, "u_score": u_score(row["iou"], efficient), "efficiency": efficient} for row in rows]


def significance(frame: pd.DataFrame, reference: str = "unet") -> pd.DataFrame:
    """A row a variant: Dice less the reference's with its interval, p of the paired test, and p after Holm over all.

    frame  columns arm, replicate, case_id, patient_id, structure and dice
    """
    arms = {name: rows for name, rows in frame.groupby("arm", sort=False)}
    return gains({name: (rows, arms[reference]) for name, rows in arms.items() if name != reference})


def advise(table: pd.DataFrame, **limits: float) -> str:
    """The variant with the highest mean U-Score among those within the limits, such as parameters=1e5.

    table  a row a variant: u_score and the columns that are limited
    """
    fits = pd.concat([table[name] <= limit for name, limit in limits.items()], axis=1).all(axis=1) if limits else None
    return str((table if fits is None else table[fits])["u_score"].idxmax())


recipe = Recipe(
    paper="u-bench",
    title="U-Bench: variants of the U-Net under one protocol",
    claim="Weighed by U-Score, which counts what a network costs, the light MK-UNet is ahead of the U-Net on hearts.",
    arms={name: Arm(method) for name, method in VARIANTS.items()},
    compare=("mk-unet", "unet"),
    replicate="fold",
    metric="u_score",
    score=score,
    scales=scales(*VARIANTS),
    components=(
        Component("significance", "implemented", "paired test of each variant against the U-Net, after Holm"),
        Component(
            "U-Score",
            "simplified",
            "harmonic mean of IoU and efficiency; efficiency from parameters and multiply-adds alone, placed between "
            "the pool's percentiles on a logarithmic scale. The abstract gives no formula, so that this is our "
            "reading; frames a second are left out, for a timing would make the evidence differ from run to run",
        ),
        Component("model advisor", "simplified", "a rule in place of an agent: the best U-Score within limits"),
        Component("a hundred variants", "simplified", "ten, each with its own recipe in this chapter"),
        Component("zero-shot generalisation", "absent", "no second set of labelled hearts is at hand"),
        Component("28 data sets", "absent", "hearts alone"),
    ),
)
