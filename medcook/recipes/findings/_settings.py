"""What every recipe of the chapter shares, so that nobody gets more than another.

Three tasks: tuberculosis in real X-rays (`XRAYS`), whose outcome is known and where it is not; several findings drawn
into an X-ray, of known kind and place (`FINDINGS`); one drawn nodule, benign or malignant (`NODULES`).
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import Case
from medcook.data.transforms import Augment
from medcook.methods import Batch, Classifier, Moment
from medcook.pretraining import fresh
from medcook.recipes.fairness.mask_of_truth import RegionTask
from medcook.recipes.findings._lesions import AllOver
from medcook.recipes.findings._nodules import NoduleTask, malignant, nodule_rows
from medcook.recipes.language._findings import FindingsTask
from medcook.recipes.language._reading import AUGMENT, Reader, Start
from medcook.recipes.recipe import Scale
from medcook.sampling import trained
from medcook.tasks import Budget, Task

XRAYS = RegionTask("chest_xray", evaluation="test")
"""Images (N, 2, 128, 128): the second channel is 1 in the lungs, as drawn by people. Outcome: tuberculosis."""
BRAINS = RegionTask("embedded", outcome="group", positive="atrophy")
FINDINGS = FindingsTask("chest_xray", evaluation="test")
FINDINGS_QUICK = FindingsTask("embedded", versions=1)
NODULES = NoduleTask("chest_xray", evaluation="test")
NODULES_QUICK = NoduleTask("embedded", side=48, versions=1)

FINDINGS_BUDGET = Budget(steps=600, batch=12, checks=0)
NODULE_BUDGET = Budget(steps=500, batch=16, checks=0)


@dataclass
class TellingNodules(AllOver, Classifier):
    """Tells malignant nodules from benign ones; it sees the whole image. A subclass sees something else (`view`).

    start   of the network: `imagenet` or `random`. `quick` takes `random`, since ImageNet's weights need the network
    """

    rate: float = 1e-3
    augmentation: Augment = field(default_factory=lambda: AUGMENT)
    dropout: float = 0.0
    start: Start = "random"

    trial = NODULES_QUICK

    def view(self, images: Tensor, labels: Tensor) -> Tensor:
        """What the network sees of images (B, C, H, W) with label maps (B, H, W)."""
        return images

    def network_for(self, inputs: int) -> nn.Module:
        """Views (B, inputs, H, W) to logits (B, 2), whatever the classes of the task."""
        return Reader(self.start, inputs, 2, self.channels)

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        model = self.network_for(inputs)
        return nn.ModuleDict({"model": model, "average": fresh(model)})

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        logits = nets["model"](self.view(labelled.images, labelled.labels)).float()
        return F.cross_entropy(logits, malignant(labelled.labels).long())

    def scores(self, nets: nn.ModuleDict, images: Tensor, labels: Tensor) -> Tensor:
        """(N,) probabilities that the nodule of each image is malignant."""
        return nets["average"](self.view(images, labels)).float().softmax(1)[:, 1]


@torch.no_grad()
def diagnosis_rows(fitted, case: Case) -> list[dict]:
    """`nodule_rows` of the method's `scores`."""
    images, labels = fitted.task.preparation.both(case)
    return nodule_rows(fitted.method.scores(trained(fitted), images, labels), case, labels)


def scales(quick: Task, full: Task, *arms: str, budget: Budget, quick_arms: tuple[str, ...] | None = None):
    """{profile: Scale}; `full` has three replicates; only the arms named run, if any are.

    quick_arms  those that start from random weights, where others need the network
    """
    little = Budget(steps=30, batch=6, precision="float32", checks=0)
    return {
        "quick": Scale(quick, little, replicates=1, arms=quick_arms),
        "full": Scale(full, budget, arms=arms or None),
    }
