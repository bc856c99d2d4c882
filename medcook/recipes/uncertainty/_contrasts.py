"""Two contrasts of the embedded cohort as channels, either of which may be spoilt (simulated)."""

import zlib
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from medcook.data import Case, Dataset
from medcook.data.intensity import bias_field
from medcook.preparation import Preparation
from medcook.tasks import Task, shared_dataset

CONTRASTS = ("T1", "T2")
STATES = ("both good", "T1 spoilt", "T2 spoilt")


class TwoContrasts(Dataset):
    """The embedded cohort with both contrasts as channels: image (2, 8, 96, 96).

    Every patient is three cases: both contrasts good, T1 spoilt, T2 spoilt; attribute `spoilt` says which.
    """

    version = "two contrasts, 1"

    def __init__(self, whole: Dataset):
        super().__init__(whole.manifest)
        self.whole = whole

    def index(self) -> dict[str, str]:
        return {f"{case} {state}": patient for case, patient in self.whole.index().items() for state in STATES}

    def attributes(self, case_id: str) -> dict:
        case, state = case_id.split(" ", 1)
        return self.whole.attributes(case) | {"spoilt": state}

    def load(self, case_id: str) -> Case:
        case = self.whole.load(case_id.split(" ")[0])
        image = np.stack([case.image[0], case.extras["t2"]])
        known = self.attributes(case_id)
        for channel, name in enumerate(CONTRASTS):
            if known["spoilt"].startswith(name):
                image[channel] = spoilt(image[channel], np.random.default_rng(zlib.crc32(case_id.encode())))
        return replace(case, image=image, case_id=case_id, attributes=known, raters=None)


def spoilt(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One contrast (slices, H, W) with noise, blur, a bias field or blank patches, of random kind and severity."""
    kind, severity = rng.integers(4), rng.uniform(0.5, 1)
    if kind == 0:
        image = image + severity * image.std() * rng.standard_normal(image.shape)
    elif kind == 1:
        image = ndimage.gaussian_filter(image, (0, 5 * severity, 5 * severity))
    elif kind == 2:
        image = image * bias_field(image.shape, 2 * severity, rng)
    else:
        image = image.copy()
        for row, column in rng.integers(0, image.shape[1] - 24, (round(10 * severity), 2)):
            image[:, row : row + 24, column : column + 24] = image.mean()
    return image.astype(np.float32)


class EachContrast(Preparation):
    """Every contrast has zero mean and unit variance of its own; no finer than two networks can learn in a minute."""

    def images(self, case: Case) -> Tensor:
        contrasts = [replace(case, image=contrast[None]) for contrast in case.image]
        return torch.cat([Preparation.images(self, contrast) for contrast in contrasts], dim=1)


@dataclass(frozen=True)
class ContrastTask(Task):
    """Two contrasts as channels, of which one may be spoilt."""

    @property
    def data(self) -> Dataset:
        return _two_contrasts(self.dataset)

    @cached_property
    def preparation(self) -> Preparation:
        return EachContrast(size=(64, 64), long_side=64)


@lru_cache(maxsize=1)
def _two_contrasts(dataset: str) -> Dataset:
    return TwoContrasts(shared_dataset(dataset))
