"""How long an answer of the small SAM takes: one more click, and the first click on a new image."""

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
    """Median milliseconds of a click on an image that is embedded, and of one on a new image, on two threads."""
    predictor, rng = Predictor(load_small()), np.random.default_rng(0)
    images = rng.normal(size=(REPEATS + 1, SIDE, SIDE)).astype(np.float32)
    with threads(THREADS), torch.inference_mode():
        first = [answered(predictor, image, (100.0, 120.0)) for image in images]
        again = [answered(predictor, images[-1], (80.0 + k, 90.0)) for k in range(REPEATS)]
    return {
        "threads": THREADS,
        "side": SIDE,
        "click_ms": round(statistics.median(again), 1),
        "first_click_ms": round(statistics.median(first[1:]), 1),
    }


def answered(predictor: Predictor, image: np.ndarray, point: tuple[float, float]) -> float:
    """Milliseconds until a click on an image is answered."""
    began = time.perf_counter()
    predictor(image, Prompt(foreground=(point,)))
    return 1000 * (time.perf_counter() - began)
