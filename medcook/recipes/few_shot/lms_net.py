"""LMS-Net: a learned Mumford-Shah energy, unrolled (Zhang et al., arXiv 2502.05473, 2025).

Prototypes and mask are the two unknowns of one energy over the query image, and a network is what the alternating
descent looks like after a few rounds. The region term is the classical one with features in place of grey values; the
length of the contour gives way to a prior that is learned.

  energy      E(u, c) = sum_x sum_k u_k(x) |f(x) - c_k|^2 + a sum_k |c_k - s_k|^2 + R(u) - e H(u),  u_0 + u_1 = 1
  prototypes  c_k = (a s_k + sum_x u_k(x) f(x)) / (a + sum_x u_k(x)), the exact minimum, s_k the support's prototype
  mask        u_1 = sigmoid((|f - c_0|^2 - |f - c_1|^2 - r(u)) / e), a step of mirror descent, r = the derivative of R
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.few_shot import FewShot, LocalPrototypes, PrototypeNetwork, Shots, novel_dice
from medcook.few_shot.baselines import SHARPNESS, prototypes
from medcook.recipes.few_shot._settings import EPISODES, PLACE, both, scales
from medcook.recipes.recipe import Component, Recipe


class Stage(nn.Module):
    """What one round of the descent has learned: trust in the support, sharpness of the mask, derivative of the prior.

    prior  maps (Q, D + 1, h, w), features and mask, to r(u) (Q, h, w); it starts at zero
    """

    def __init__(self, width: int, hidden: int = 16):
        super().__init__()
        self.trust = nn.Parameter(torch.tensor(0.0))
        self.sharpness = nn.Parameter(torch.tensor(math.log(SHARPNESS / 2)))
        self.context = nn.Sequential(
            nn.Conv2d(width + 1, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, hidden, 5, padding=2), nn.ReLU()
        )
        self.last = nn.Conv2d(hidden, 1, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def prior(self, maps: Tensor, inside: Tensor) -> Tensor:
        """(Q, h, w): how much the learned prior speaks against structure at each place."""
        return self.last(self.context(torch.cat([maps, inside[:, None]], dim=1)))[:, 0]


@dataclass
class LMSNet(FewShot):
    """`rounds` of prototype and mask updates, each with weights of its own; all of them are trained.

    prior   False: no learned prior, the region term alone
    update  False: prototypes stay the support's
    """

    episodes: str = EPISODES
    rounds: int = 3
    prior: bool = True
    update: bool = True

    def parts(self, inputs: int) -> dict[str, nn.Module]:
        return super().parts(inputs) | {"stages": nn.ModuleList(Stage(self.width) for _ in range(self.rounds))}

    def descend(self, net: nn.ModuleDict, support: Shots, query: Shots) -> list[Tensor]:
        """Logits (Q, h, w) of the mask: by the support's prototypes, and after every round."""
        maps = F.normalize(query.maps, dim=1)
        given = F.normalize(prototypes(support), dim=1).expand(len(maps), -1, -1)
        found = [(contrast(maps, given) * net["stages"][0].sharpness.exp())]
        for stage in net["stages"]:
            inside = found[-1].sigmoid()
            points = move(maps, inside, given, stage.trust.exp()) if self.update else given
            against = stage.prior(maps, inside) if self.prior else 0.0
            found.append((contrast(maps, points) - against) * stage.sharpness.exp())
        return found

    def logits(self, net: nn.ModuleDict, support: Shots, query: Shots) -> Tensor:
        return two_classes(self.descend(net, support, query)[-1])

    def episode_loss(self, net: nn.ModuleDict, support: Shots, query: Shots) -> Tensor:
        """The loss of the mask before the first and after every round, the mean of them."""
        found = [two_classes(each) for each in self.descend(net, support, query)]
        return sum(self.query_loss(each, query) for each in found) / len(found)


def contrast(maps: Tensor, points: Tensor) -> Tensor:
    """|f - c_0|^2 - |f - c_1|^2 (Q, h, w) of maps (Q, D, h, w) and prototypes (Q, 2, D): positive for structure."""
    distance = (maps[:, None] - points[..., None, None]).square().sum(2)
    return distance[:, 0] - distance[:, 1]


def move(maps: Tensor, inside: Tensor, given: Tensor, trust: Tensor) -> Tensor:
    """The prototypes (Q, 2, D) that minimise the energy for masks (Q, h, w), near the given ones.

    trust  weight of the given prototypes, against a mask that covers all of the image (a / number of pixels)
    """
    masks = torch.stack([1 - inside, inside], dim=1)
    mass = masks.mean((2, 3))[..., None]
    sums = torch.einsum("qkhw,qdhw->qkd", masks, maps) / inside[0].numel()
    return (trust * given + sums) / (trust + mass)


def two_classes(logits: Tensor) -> Tensor:
    """(Q, 2, h, w) of logits (Q, h, w) of the structure against the background."""
    return torch.stack([torch.zeros_like(logits), logits], dim=1)


recipe = Recipe(
    paper="lms-net",
    title="An unrolled Mumford-Shah energy",
    claim="Trained on the same episodes, unrolled updates of prototypes and mask with a learned prior raise the "
    "volume Dice of held-out structures against the support's prototypes alone, with one annotated patient.",
    arms=both(
        {
            "prototypes": PrototypeNetwork(episodes=EPISODES),
            "lms-net": LMSNet(),
            "without prior": LMSNet(prior=False),
            "without prototype update": LMSNet(update=False),
            "local prototypes": LocalPrototypes(),
        },
        place=PLACE,
    ),
    compare=("lms-net", "prototypes"),
    ablation=("lms-net", "without prior"),
    replicate="draw",
    scales=scales("prototypes", "local prototypes", "lms-net", "without prior"),
    metric="dice",
    score=novel_dice,
    components=(
        Component(
            "learned Mumford-Shah model",
            "implemented",
            "region term on unit features, a learned prior in place of the contour's length; how its terms are built "
            "is our reading: no official code is published",
        ),
        Component(
            "prototype update",
            "simplified",
            "the exact minimum of the energy for the current mask, with a learned trust in the support; the paper has "
            "a transformer with momentum there",
        ),
        Component(
            "mask update",
            "simplified",
            "a step of mirror descent with a small convolutional network as the prior's derivative; the paper unrolls "
            "a primal-dual scheme with a learned denoiser",
        ),
        Component("unfolding", "implemented", "three rounds, each with parameters of its own, all of them supervised"),
    ),
)
