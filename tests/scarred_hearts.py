"""Hearts with an infarct in the wall, and lesion-free ones."""

import numpy as np
import torch

from medcook.data import IGNORE
from medcook.methods import Batch
from medcook.recipes.synthesis._scars import CORE, INFARCT


def ring(size: int = 32, middle: tuple[int, int] = (15, 17), radii: tuple[int, int] = (5, 11)) -> torch.Tensor:
    """(size, size) bool: a wall around a cavity."""
    rows, columns = np.indices((size, size))
    away = np.hypot(rows - middle[0], columns - middle[1])
    return torch.from_numpy((away >= radii[0]) & (away < radii[1]))


def labelled(count: int = 4) -> Batch:
    """Hearts with a bright infarct at one side, and a dark core in it."""
    rng = torch.Generator().manual_seed(0)
    wall = ring().expand(count, -1, -1)
    labels = torch.zeros(count, 32, 32, dtype=torch.uint8)
    labels[:, 8:22, 22:28], labels[:, 12:18, 24:26] = INFARCT, CORE
    labels = torch.where(wall, labels, 0)
    level = torch.tensor([0.0, 2.0, -1.0])[labels.long()]
    images = level + 0.3 * torch.randn(count, 32, 32, generator=rng)
    return Batch(images[:, None], labels, raters=wall[:, None].to(torch.uint8))


def free(count: int = 4) -> Batch:
    """Lesion-free hearts, elsewhere and smaller."""
    wall = ring(middle=(18, 14), radii=(4, 9)).expand(count, 1, -1, -1).to(torch.uint8)
    images = torch.randn(count, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    return Batch(images, torch.full((count, 32, 32), IGNORE, dtype=torch.uint8), raters=wall)
