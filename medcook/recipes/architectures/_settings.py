"""What the architectures of chapter 08 share: hearts, budget, and a method that trains the network of a recipe."""

from copy import deepcopy
from dataclasses import dataclass

from torch import Tensor, nn

from medcook.errors import MedcookError
from medcook.losses import find_loss
from medcook.methods import Batch, Moment, Supervised
from medcook.recipes.recipe import Scale
from medcook.tasks import Budget, Task

CHANNELS = (8, 16, 32, 64, 64)
"""Half the widths of chapter 02, as in chapter 04, so that a dozen architectures fit into an afternoon of two cores."""

BASELINE = Supervised(channels=CHANNELS)

BUDGET = Budget(steps=400, batch=8, checks=4)
"""A minute for the U-Net on one core; every architecture gets as many steps, whatever a step of it costs.

As many as in chapter 04: with fewer, comparisons are about who finds a structure at all.
"""


@dataclass
class Architecture(Supervised):
    """The book's baseline with another network: the same loss, augmentation, optimiser and moving average.

    A recipe's subclass says in `model` which network; its further fields are what an ablation takes away.
    """

    network: str = "own"
    channels: tuple[int, ...] = CHANNELS

    axes = 2

    def model(self, inputs: int, classes: int) -> nn.Module:
        """A network from (B, inputs, *size) to logits (B, classes, *size)."""
        raise NotImplementedError(f"{type(self).__name__}.model")

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """The recipe's network, and the average that follows it; for images of `axes` dimensions alone."""
        if dims != self.axes:
            kind = {2: "slices", 3: "volumes"}[self.axes]
            raise MedcookError(f"{type(self).__name__} is a network for {kind}.", f"Choose a task on {kind}.")
        model = self.model(inputs, classes)
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})


@dataclass
class DeeplySupervised(Architecture):
    """An architecture with several heads: `outputs` of its network gives their logits, that which predicts first.

    deep  False: the first head alone is supervised
    """

    deep: bool = True

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The mean of the losses of all heads, each at the size of the labels (Lee et al., AISTATS 2015)."""
        outputs = nets["model"].outputs(labelled.images)
        losses = [find_loss(self.loss)(logits.float(), labelled.labels) for logits in outputs]
        return sum(losses) / len(losses) if self.deep else losses[0]


def scales(*arms: str) -> dict[str, Scale]:
    """{profile: Scale} of an architecture; at `full` three folds of the hearts, and `arms` if any are named."""
    return {
        "quick": Scale(Task("embedded"), Budget(steps=30, batch=6, checks=2), replicates=1),
        "full": Scale(Task("acdc"), BUDGET, arms=arms or None),
    }
