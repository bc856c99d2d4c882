"""What every recipe of the chapter shares, so that nobody gets more than another: chapter 12's, on tasks as large."""

from medcook.recipes.imperfect_labels._settings import BASELINE, BUDGET, CHANNELS, scales

__all__ = ["BASELINE", "BUDGET", "CHANNELS", "scales"]
