"""Stacks of slices as volumes, each prepared slice by slice, and which abnormality one shows."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from medcook.cohorts import CohortTask
from medcook.data import Case
from medcook.preparation import Preparation, preparation_for
from medcook.synthesis import small
from medcook.tasks import Samples


@dataclass(frozen=True)
class Stacked(Preparation):
    """A case is one volume: its slices, each prepared on its own, and of these `size[0]`, evenly spread."""

    @property
    def plane(self) -> Preparation:
        """The preparation of a slice."""
        return Preparation(self.size[1:], self.long_side, self.centre, self.smooth)

    def images(self, case: Case) -> Tensor:
        """(1, C, *size) float32."""
        slices = self.plane.images(case)
        return slices[spread(len(slices), self.size[0])].transpose(0, 1)[None].contiguous()

    def labels(self, case: Case, values=None) -> Tensor:
        """(1, *size) uint8."""
        slices = self.plane.labels(case, values)
        return slices[spread(len(slices), self.size[0])][None]

    def restore(self, probabilities: Tensor, case: Case) -> Tensor:
        """(1, classes, *size) back to (classes, *spatial): each slice gets those of the nearest one that was taken."""
        slices = probabilities[0].transpose(0, 1)
        return self.plane.restore(slices[spread(len(slices), case.spatial[0])], case)


def spread(many: int, wanted: int) -> Tensor:
    """(wanted,) numbers of slices, evenly from the first of `many` to the last; some twice where there are too few."""
    return torch.linspace(0, many - 1, wanted).round().long()


@dataclass(frozen=True)
class AbnormalityTask(CohortTask):
    """Which of several abnormalities a stack of slices shows: label k all over the volume where `attribute` is the k-th
    of `abnormalities`, 0 where it is none of them.

    depth, side  slices of a stack, and pixels of a side of each
    """

    attribute: str = "group"
    abnormalities: tuple[str, ...] = ("MINF", "DCM", "HCM", "RV")
    depth: int = 10
    side: int = 64

    @cached_property
    def preparation(self) -> Stacked:
        plane = small(preparation_for(self.dataset), self.side)
        return Stacked((self.depth, *plane.size), plane.long_side, plane.centre, plane.smooth)

    @property
    def classes(self) -> int:
        return 1 + len(self.abnormalities)

    @property
    def structures(self) -> dict[int, str]:
        return dict(enumerate(self.abnormalities, 1))

    def value_of(self, attributes: dict) -> int:
        """The label of a case."""
        found = attributes[self.attribute]
        return 1 + self.abnormalities.index(found) if found in self.abnormalities else 0

    def samples(self, role: str) -> Samples:
        samples = super().samples(role)
        if role == "unlabelled":
            return samples
        values = torch.tensor([self.value_of(case.attributes) for case in self.cases(role)], dtype=torch.uint8)
        labels = values[samples.case_of].view(-1, 1, 1, 1).expand_as(samples.labels)
        return replace(samples, labels=labels.contiguous())
