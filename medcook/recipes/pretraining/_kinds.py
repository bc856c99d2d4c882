"""Images of a kind: who is of which, and how well a network's vectors find and group those that are alike."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from medcook import evaluation, metrics
from medcook.cohorts import CohortTask, first_attributes, having
from medcook.data import Case
from medcook.recipes.fairness.cxr_clip_fairness import embedding
from medcook.recipes.pretraining._subspaces import kmeans
from medcook.sampling import once, trained
from medcook.tasks import Samples

NEAR = 4
"""How many known images are shown, beside the nearest alone."""


@dataclass(frozen=True)
class KindsTask(CohortTask):
    """What is alike: the label of an image is everywhere the number of its patient's kind.

    told  attributes whose values make a kind; who lacks one takes no part
    """

    told: tuple[str, ...] = ("site", "tuberculosis")

    @cached_property
    def kinds(self) -> tuple[tuple, ...]:
        """The values of `told` that training and validation patients have, sorted."""
        patients = having(self.data, (*self.data.split.train, *self.data.split.val), self._known)
        return tuple(sorted({self.values(first_attributes(self.data, patient)) for patient in patients}))

    @property
    def _known(self) -> tuple[tuple[str, None], ...]:
        return tuple((name, None) for name in self.told)

    def _kept(self, patients: tuple[str, ...]) -> tuple[str, ...]:
        return super()._kept(having(self.data, patients, self._known))

    def values(self, attributes: dict) -> tuple:
        return tuple(attributes.get(name) for name in self.told)

    @property
    def classes(self) -> int:
        return len(self.kinds)

    @property
    def structures(self) -> dict[int, str]:
        return {number: " ".join(map(str, kind)) for number, kind in enumerate(self.kinds) if number}

    def samples(self, role: str) -> Samples:
        samples = super().samples(role)
        numbers = [self.kinds.index(self.values(case.attributes)) for case in self.cases(role)]
        of_each = torch.tensor(numbers, dtype=torch.uint8)[samples.case_of]
        labels = of_each.view(-1, *[1] * (samples.labels.ndim - 1)).expand_as(samples.labels)
        return Samples(samples.images, labels.contiguous(), samples.case_of)


class Gallery(NamedTuple):
    """Known images: unit vectors (N, D), the numbers of their kinds (N,), and the centres of as many clusters."""

    vectors: np.ndarray
    kinds: np.ndarray
    centres: np.ndarray


def gallery_of(fitted) -> Gallery:
    """The patients that trained the network; made when first asked for."""
    return once(fitted, "gallery", lambda: _gallery(fitted))


def _gallery(fitted) -> Gallery:
    trained(fitted)
    task, cases = fitted.task, list(fitted.task.cases("labelled"))
    vectors = np.stack([unit(fitted, case) for case in cases])
    kinds = np.array([task.kinds.index(task.values(case.attributes)) for case in cases])
    return Gallery(vectors, kinds, kmeans(torch.from_numpy(vectors), len(set(kinds)))[1].numpy())


def unit(fitted, case: Case) -> np.ndarray:
    """(D,) the unit vector of a case, of slices their mean."""
    vector = embedding(fitted, case).astype(float)
    return vector / np.linalg.norm(vector)


def region(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, *size) bool: where maps (B, h, w), enlarged, are above the middle between their least and their most."""
    enlarged = F.interpolate(maps[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]
    low, high = (edge[:, None, None] for edge in enlarged.flatten(1).aminmax(dim=1))
    return enlarged > (low + high) / 2


def kind_rows(fitted, case: Case) -> list[dict]:
    """A case among the patients that trained:

    recall, recall_4  whether the nearest is of its kind, or one of the four nearest
    site, finding     whether the nearest has the first of the attributes that make a kind, or the last
    cluster, kind     the nearest cluster of the known images, and the number of its own kind
    dice              of what the network's map says to count, above half of its range, with the structures
    learners          of the network
    """
    task, there, nets = fitted.task, gallery_of(fitted), trained(fitted)
    own = task.values(case.attributes)
    if None in own:
        return []
    vector, images = unit(fitted, case), task.preparation.images(case)
    near = there.kinds[np.argsort(-there.vectors @ vector, kind="stable")[:NEAR]]
    nearest, kind = task.kinds[near[0]], task.kinds.index(own)
    with torch.no_grad():
        maps = fitted.method.look(nets, images)
    truth = task.preparation.labels(case) > 0
    values = {
        "recall": float(near[0] == kind),
        "recall_4": float(kind in near),
        "site": float(nearest[0] == own[0]),
        "finding": float(nearest[-1] == own[-1]),
        "cluster": float(np.linalg.norm(there.centres - vector, axis=1).argmin()),
        "kind": float(kind),
        "dice": metrics.dice(region(maps, truth.shape[1:]).numpy(), truth.numpy()),
        "learners": float(nets["average"].owner.max() + 1),
    }
    return [evaluation.row(case, "kind", **values)]


def clustering(frame: pd.DataFrame) -> float:
    """The normalised mutual information of clusters and kinds in an arm's table, the mean over replicates."""
    parts = [part for _, part in frame.groupby("replicate")] if "replicate" in frame else [frame]
    return float(np.mean([normalized_mutual_info_score(part["kind"], part["cluster"]) for part in parts]))
