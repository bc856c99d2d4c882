"""Made-up X-rays with lungs, and cases of which everything is known."""

import numpy as np
import torch
from torch import Tensor

from medcook.recipes.findings import _mined as mined
from medcook.recipes.findings._mined import Known

SIZE = (40, 60)


def xrays(count: int, side: int = 48) -> Tensor:
    """(count, 2, side, side): noise, and lungs of 25 % of an image of 48 pixels, the right one with 60 % of it."""
    images = torch.randn(count, 2, side, side, generator=torch.Generator().manual_seed(1))
    images[:, 1] = 0
    images[:, 1, 8:32, 4:19] = images[:, 1, 8:32, 28:37] = 1
    return images


def lungs(top: int = 5, bottom: int = 30) -> np.ndarray:
    """A right lung of 12 columns, which is on the left, and a left lung of 10."""
    mask = np.zeros(SIZE, bool)
    mask[top:bottom, 8:20] = mask[top + 3 : bottom, 35:45] = True
    return mask


def known(count: int = 12) -> Known:
    """Half of the patients are ill on the right; images are brighter at the top where they are, lungs end lower."""
    rng, truths, images, reports = np.random.default_rng(0), [], [], []
    for number in range(count):
        ill = number % 2 == 0
        report = "PTB in the right upper field" if ill else "normal"
        image = rng.normal(size=SIZE).astype(np.float32) + lungs()
        image[:20] += 3 * ill
        truths.append(mined.truths_of(lungs(bottom=36 if ill else 28), ill, report))
        images.append(image), reports.append(report)
    return Known(torch.from_numpy(np.stack(images))[:, None], truths, tuple(reports))
