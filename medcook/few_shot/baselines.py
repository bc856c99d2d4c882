"""The chapter's baselines: one prototype a class, local prototypes, and fine-tuning on the support."""

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from medcook.few_shot.method import FewShot, Shots, cosine, masked_mean, resize, shrink
from medcook.losses import cross_entropy_and_dice

SHARPNESS = 50.0
"""What cosines are multiplied with before a softmax. PANet and ALPNet have 20 for features that were trained for long;
ImageNet's are all much alike."""


@dataclass
class PrototypeNetwork(FewShot):
    """Masked average pooling (PANet, Wang et al. 2019): the mean feature of the structure and of the rest."""

    def logits(self, net: nn.ModuleDict, support: Shots, query: Shots) -> Tensor:
        return SHARPNESS * cosine(query.maps, prototypes(support))


def prototypes(support: Shots) -> Tensor:
    """(2, D): mean feature of the background and of the structure."""
    inside = shrink(support.masks, support.maps.shape[2:])
    return torch.stack([masked_mean(support.maps, 1 - inside), masked_mean(support.maps, inside)])


@dataclass
class LocalPrototypes(FewShot):
    """Adaptive local prototypes, learned on superpixels (ALPNet, Ouyang et al. 2022).

    window  side of the squares of features of which each makes a prototype of its own, where it is all one class
    """

    episodes: str = "superpixels"
    window: int = 4

    def logits(self, net: nn.ModuleDict, support: Shots, query: Shots) -> Tensor:
        return torch.stack([fused(query.maps, each) for each in local_prototypes(support, self.window)], dim=1)


def local_prototypes(support: Shots, window: int, least: float = 0.95) -> list[Tensor]:
    """[(P, D) of the background, (P, D) of the structure]: the mean feature of all of it, and of every square of it.

    A square counts where a share of `least` of it is the class; the mean of everything stands in for small structures.
    """
    inside = shrink(support.masks, support.maps.shape[2:])
    squares = F.avg_pool2d(support.maps, window).movedim(1, -1).flatten(0, 2)
    found = []
    for weights in (1 - inside, inside):
        pure = F.avg_pool2d(weights[:, None], window).flatten() >= least
        found.append(torch.cat([masked_mean(support.maps, weights)[None], squares[pure]]))
    return found


def fused(maps: Tensor, prototypes: Tensor) -> Tensor:
    """(N, h, w): similarity to several prototypes of one class, each weighted by its softmax over them."""
    similarity = SHARPNESS * cosine(maps, prototypes)
    return (similarity.softmax(1) * similarity).sum(1)


@dataclass
class FineTuning(FewShot):
    """Trained on base structures without episodes; a copy is trained on every support, with a head for it.

    tuning       steps of fine-tuning on all slices of the support volume, augmented; `tuning_rate` their learning rate
    """

    episodes: str = "none"
    base: float = 1.0
    tuning: int = 40
    tuning_rate: float = 2e-3

    def adapt(self, net: nn.ModuleDict, supports: list[Shots]) -> nn.ModuleDict:
        """A copy of the network that has learned the support; random only by torch's global generator."""
        tuned = deepcopy(net).eval().requires_grad_(True)
        tuned["novel"] = nn.Conv2d(self.width, 2, 1)
        images, masks = (torch.cat([getattr(each, name) for each in supports]) for name in ("images", "masks"))
        rng = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        optimiser = AdamW(tuned.parameters(), lr=self.tuning_rate)
        with torch.enable_grad():
            for _ in range(self.tuning):
                views, labels = self.augmentation(images, masks, rng)
                logits = resize(tuned["novel"](self.encode(tuned, views)), images.shape[2:])
                loss = cross_entropy_and_dice(logits, labels)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        return tuned.requires_grad_(False)

    def logits(self, net: nn.ModuleDict, support: Shots, query: Shots) -> Tensor:
        return net["novel"](query.maps)
