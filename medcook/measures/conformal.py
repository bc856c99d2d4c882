"""Conformal risk control (Angelopoulos, Bates, Fisch, Lei and Schuster, ICLR 2024)."""

import numpy as np

from medcook.errors import MedcookError


def choose_lambda(losses, alpha: float, bound: float = 1.0) -> int:
    """Position of the smallest lambda with n / (n + 1) * mean loss + bound / (n + 1) <= alpha.

    losses  (n, lambdas) of n calibration cases, lambdas ascending; no case's loss rises with lambda, none is above
            `bound`
    alpha   what the expected loss of a further, exchangeable case stays below
    Where no lambda will do (n + 1 < bound / alpha: too few cases) it is the last, most careful one, and the promise
    then rests on that one's loss.
    """
    losses = np.asarray(losses, dtype=float)
    if (np.diff(losses, axis=1) > 1e-6).any():
        raise MedcookError("A loss rises with lambda.", "Order the lambdas so that larger ones are more careful.")
    count = len(losses)
    enough = (losses.sum(0) + bound) / (count + 1) <= alpha
    return int(np.argmax(enough)) if enough.any() else losses.shape[1] - 1
