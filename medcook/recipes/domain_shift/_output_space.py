"""Adversarial domain adaptation at the output (Tsai et al., CVPR 2018): what a finer method is to be better than."""

from dataclasses import dataclass

from torch import Tensor, nn

from medcook.domains import DomainTask
from medcook.errors import MedcookError
from medcook.losses import find_loss
from medcook.methods import Batch, Method, Moment
from medcook.methods.semi_supervised import forgetful
from medcook.recipes.domain_shift._settings import CHANNELS
from medcook.recipes.imperfect_labels._adversarial import PatchJudge, played


class NodeJudge(nn.Sequential):
    """Nodes (n, width) to judgements (n, 1): 1 for the source's."""

    def __init__(self, width: int):
        super().__init__(nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))


@dataclass
class Adversarial(Method):
    """Domain adaptation at the output (Tsai et al., CVPR 2018): a judge tells the source's answers from the target's.

    alignment  weight of passing for the source's
    start      adaptation begins after this share of the steps

    Each centre's batch is normalised for itself, and the network that predicts has the target's statistics (Li et al.,
    2017).
    """

    channels: tuple[int, ...] = CHANNELS
    alignment: float = 0.01
    start: float = 0.4

    uses_unlabelled = True
    axes = 2
    trial = DomainTask("embedded", look="washed out")

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """The networks, and the `judge` of answers."""
        if dims != self.axes:
            raise MedcookError(f"{type(self).__name__} is for slices.", "Choose a task on slices.")
        nets = super().build(inputs, classes, dims)
        nets["judge"] = PatchJudge(classes)
        return nets

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        if unlabelled is None:
            return super().training_step(nets, labelled, None, now)
        with forgetful(nets["model"]):
            source, maps = pyramid(nets["model"], labelled.images)
        target, others = pyramid(nets["model"], unlabelled.images)
        loss = find_loss(self.loss)(source, labelled.labels)
        if now.fraction < self.start:
            return loss
        judged, fooled = played(nets["judge"], source.detach().softmax(1), target.softmax(1))
        return loss + judged + self.alignment * fooled + self.adapt(nets, labelled, unlabelled, target, [maps, others])

    def adapt(self, nets: nn.ModuleDict, source: Batch, target: Batch, logits: Tensor, maps: list) -> Tensor:
        """What a subclass adds, given logits of the target and the decoder's maps in either centre."""
        return logits.new_zeros(())


def pyramid(model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, classes, H, W) of a U-Net, and the maps (B, C, h, w) of its decoder, coarse ones first."""
    maps: list[Tensor] = []
    handles = [block.register_forward_hook(lambda block, given, made: maps.append(made)) for block in model.up]
    logits = model(images).float()
    for handle in handles:
        handle.remove()
    return logits, maps


def encoded(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Maps (B, C, h, w) of a U-Net's encoder, fine ones first."""
    maps = [model.down[0](images)]
    for block in model.down[1:]:
        maps.append(block(model.pool(maps[-1], 2)))
    return maps
