"""How long an answer of the small SAM takes: one more click, a click elsewhere, the first click on a new image."""

import statistics
import time

import numpy as np
import pandas as pd
import torch

from medcook.precision import PRECISIONS
from medcook.sam.checkpoints import load_small
from medcook.sam.predictor import Predictor
from medcook.sam.prompts import Prompt
from medcook.training import threads

SIDE, REPEATS, ROUNDS, THREADS = 256, 20, 5, 2


def click_times() -> dict:
    """Milliseconds of an answer on two threads, in either precision: from all distances, from the whole image alone.

    Each is the least, the median and the most over `ROUNDS` of what `one_round` finds; the ways to ask take turns.
    """
    asked = {
        f"{'three distances' if zoom else 'the whole image'}, {precision}": Predictor(
            load_small(), zoom=zoom, precision=precision
        )
        for zoom in (True, False)
        for precision in PRECISIONS
    }
    with threads(THREADS), torch.inference_mode():
        rounds = [{name: one_round(predictor, k) for name, predictor in asked.items()} for k in range(1 + ROUNDS)]
    taken = {name: pd.DataFrame([one[name] for one in rounds[1:]]).round(1) for name in asked}
    ranges = {name: table.agg(["min", "median", "max"]).to_dict("list") for name, table in taken.items()}
    return {"threads": THREADS, "side": SIDE, "rounds": ROUNDS, "clicks": REPEATS, "ms": ranges}


def one_round(predictor: Predictor, seed: int) -> dict[str, float]:
    """Median milliseconds of `REPEATS` clicks.

    new        on a new image
    beside     an earlier one, whose windows are embedded
    elsewhere  where the image is embedded, but not the windows around the click
    rested     the same, where the pointer rested before, so that they are
    """
    images = np.random.default_rng(seed).normal(size=(REPEATS, SIDE, SIDE)).astype(np.float32)
    new = [answered(predictor, image, (100.0, 120.0)) for image in images]
    beside = [answered(predictor, images[-1], (100.0 + k / REPEATS, 120.0)) for k in range(REPEATS)]
    elsewhere = [answered(predictor, images[-1], (20.0 + 11 * k, 230.0 - 10 * k)) for k in range(REPEATS)]
    rested = [after_rest(predictor, images[-1], (25.0 + 11 * k, 20.0 + 9 * k)) for k in range(REPEATS)]
    found = {"new": new, "beside": beside, "elsewhere": elsewhere, "rested": rested}
    return {name: statistics.median(taken) for name, taken in found.items()}


def after_rest(predictor: Predictor, image: np.ndarray, point: tuple[float, float]) -> float:
    """Milliseconds until a click is answered where the pointer rested before."""
    predictor.look_ahead(image, Prompt(foreground=(point,)))
    return answered(predictor, image, point)


def answered(predictor: Predictor, image: np.ndarray, point: tuple[float, float]) -> float:
    """Milliseconds until a click on an image is answered."""
    began = time.perf_counter()
    predictor(image, Prompt(foreground=(point,)))
    return 1000 * (time.perf_counter() - began)
