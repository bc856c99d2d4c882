"""How long an answer of the small SAM takes: the first click on a new image and on an embedded one, and the next."""

import statistics
import time
from collections import defaultdict

import numpy as np
import pandas as pd
import torch

from medcook.precision import PRECISIONS
from medcook.sam.checkpoints import load_small
from medcook.sam.predictor import Predictor
from medcook.sam.prompts import Prompt
from medcook.training import threads

SIDE, REPEATS, ROUNDS, THREADS = 256, 20, 5, 2
NEAR = 50
"""Pixels within which, along either axis, a second click lies from the first."""


def click_times() -> dict:
    """Milliseconds on two threads, in either precision: asked from all distances, and from the whole image alone.

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
    """Median milliseconds of `REPEATS` clicks, and of embedding an image.

    new        a click on a new image, of which nothing is embedded
    embedding  no click: all that a first click on it is looked at from
    first      that click
    second     another one; the windows that show both are not all embedded
    rested     the same, where the pointer rested before, so that they are
    """
    rng, found = np.random.default_rng(seed), defaultdict(list)
    for _ in range(REPEATS):
        other, image = rng.normal(size=(2, SIDE, SIDE)).astype(np.float32)
        at = [tuple(point) for point in rng.uniform(NEAR, SIDE - NEAR, (2, 2)).tolist()]
        beside = [tuple(point) for point in (np.array(at[1]) + rng.uniform(-NEAR, NEAR, (2, 2))).tolist()]
        found["new"].append(milliseconds(predictor, other, Prompt((at[0],))))
        found["embedding"].append(milliseconds(predictor, image, None))
        found["first"].append(milliseconds(predictor, image, Prompt((at[1],))))
        found["second"].append(milliseconds(predictor, image, Prompt((at[1], beside[0]))))
        predictor.look_ahead(image, Prompt((at[1], beside[1])))
        found["rested"].append(milliseconds(predictor, image, Prompt((at[1], beside[1]))))
    return {name: statistics.median(each) for name, each in found.items()}


def milliseconds(predictor: Predictor, image: np.ndarray, prompt: Prompt | None) -> float:
    """Milliseconds until a prompt is answered; without one, until an image is embedded for a first click."""
    began = time.perf_counter()
    if prompt:
        predictor(image, prompt)
    else:
        predictor.look_ahead(image)
    return 1000 * (time.perf_counter() - began)
