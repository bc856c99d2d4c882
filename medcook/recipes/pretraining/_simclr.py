"""SimCLR, to which pretexts of their own are compared."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medcook.methods import Batch, Moment
from medcook.pretraining import Pretrained, Projector, encoded, info_nce, pooled


@dataclass
class SimCLR(Pretrained):
    """Each image's two views become closer to each other than to any other (Chen et al., ICML 2020).

    width  of the vectors that are compared
    """

    width: int = 32

    def pretext_parts(self, model: nn.Module, inputs: int, dims: int) -> nn.Module:
        return Projector(self.channels[-1], self.channels[-1], self.width)

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        views = torch.cat([self.view(images.images) for _ in range(2)])
        return info_nce(*nets["pretext"](pooled(encoded(nets["model"], views))).chunk(2))
