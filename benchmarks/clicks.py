"""How long an answer of the small SAM takes: one more click, a click elsewhere, the first click on a new image."""

import statistics
import time

import numpy as np
import torch

from medcook.sam.checkpoints import load_small
from medcook.sam.predictor import Predictor
from medcook.sam.prompts import Prompt
from medcook.training import threads

SIDE, REPEATS, THREADS = 256, 20, 2


def click_times() -> dict:
    """Median milliseconds of an answer on two threads, from all distances and from the whole image alone.

    click        beside an earlier one, whose windows are embedded
    elsewhere    where the image is embedded, but not the windows around the click
    first_click  on a new image
    """
    rng = np.random.default_rng(0)
    images = rng.normal(size=(REPEATS + 1, SIDE, SIDE)).astype(np.float32)
    found = {"threads": THREADS, "side": SIDE}
    with threads(THREADS), torch.inference_mode():
        for name, zoom in (("", True), ("whole_", False)):
            predictor = Predictor(load_small(), zoom=zoom)
            first = [answered(predictor, image, (100.0, 120.0)) for image in images]
            again = [answered(predictor, images[-1], (100.0 + k / REPEATS, 120.0)) for k in range(REPEATS)]
            places = [(20.0 + 11 * k, 230.0 - 10 * k) for k in range(REPEATS)]
            elsewhere = [answered(predictor, images[-1], place) for place in places]
            found[f"{name}click_ms"] = round(statistics.median(again), 1)
            found[f"{name}elsewhere_ms"] = round(statistics.median(elsewhere), 1)
            found[f"{name}first_click_ms"] = round(statistics.median(first[1:]), 1)
    return found


def answered(predictor: Predictor, image: np.ndarray, point: tuple[float, float]) -> float:
    """Milliseconds until a click on an image is answered."""
    began = time.perf_counter()
    predictor(image, Prompt(foreground=(point,)))
    return 1000 * (time.perf_counter() - began)
