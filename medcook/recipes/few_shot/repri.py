"""RePRI: transductive inference in place of meta-learning (Boudiaf et al., CVPR 2021).

Features come from plain classification with cross-entropy, without episodes. Only at test time, for every query image
on its own, a linear classifier is fitted: to the support's pixels with their labels, and to the query's pixels without:
these should be decided, and as many of them be structure as expected.

  classifier  p(x) = sigmoid(t (cos(f(x), w) - b)), w starting at the support's prototype, b at the mean query logit
  eq. 1       min over w, b of CE(support) + l H(query) + l KL(p_query || pi), with l = 1 / shots
  entropy     H = mean over query pixels of -sum_k p_k log p_k
  eq. 3       KL = sum_k p_k log(p_k / pi_k), with p_query the mean prediction over the query image
  proportion  pi = the mean prediction before the first step, and again after ten; then the weight of KL rises by 1
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.few_shot import FewShot, LocalPrototypes, PrototypeNetwork, Shots, novel_dice
from medcook.few_shot.baselines import SHARPNESS, prototypes
from medcook.few_shot.method import shrink
from medcook.recipes.few_shot._settings import PLACE, both, scales
from medcook.recipes.recipe import Component, Recipe
from medcook.tasks import Budget

TINY = 1e-6


@dataclass
class RePRI(FewShot):
    """A classifier of support and query pixels, fitted anew for every query slice, on features without episodes.

    iterations, step  of gradient descent on the classifier
    update            after how many iterations the expected proportion is estimated anew
    entropy, kl       False takes one of the two terms on query pixels away
    """

    episodes: str = "none"
    iterations: int = 50
    step: float = 0.1
    update: int = 10
    entropy: bool = True
    kl: bool = True

    def logits(self, net: nn.ModuleDict, support: Shots, query: Shots) -> Tensor:
        support, query = (each._replace(maps=F.normalize(each.maps.detach(), dim=1)) for each in (support, query))
        with torch.enable_grad():
            weight, bias = self.start(support, query.maps)
            chosen = torch.optim.SGD([weight, bias], lr=self.step)
            wanted = proportion(classify(query.maps, weight, bias)).detach()
            for iteration in range(self.iterations):
                updated = iteration >= self.update
                if iteration == self.update:
                    wanted = proportion(classify(query.maps, weight, bias)).detach()
                loss = self.loss_of(support, query.maps, weight, bias, wanted, float(updated))
                chosen.zero_grad()
                loss.sum().backward()  # every query slice has a classifier of its own: their sum mixes nothing
                chosen.step()
        logits = classify(query.maps, weight, bias).detach()
        return torch.stack([torch.zeros_like(logits), logits], dim=1)

    def start(self, support: Shots, maps: Tensor) -> tuple[Tensor, Tensor]:
        """The classifiers (Q, D) and (Q,) of Q query slices before the first step."""
        weight = prototypes(support)[1].detach().expand(len(maps), -1).clone().requires_grad_(True)
        bias = classify(maps, weight, maps.new_zeros(len(maps))).mean((1, 2)).detach()
        return weight, bias.requires_grad_(True)

    def loss_of(
        self, support: Shots, maps: Tensor, weight: Tensor, bias: Tensor, wanted: Tensor, extra: float
    ) -> Tensor:
        """(Q,) eq. 1 of every query slice; `extra` is added to the weight of the KL term."""
        shots = len(support.maps)
        loss = support_loss(support, weight, bias)
        logits = classify(maps, weight, bias)
        if self.entropy:
            loss = loss + entropy(logits) / shots
        if self.kl:
            loss = loss + (1 / shots + extra) * kl(proportion(logits), wanted)
        return loss


def classify(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Logits (Q, h, w) of unit maps (Q, D, h, w), each by its own weight (Q, D) and bias (Q,)."""
    alike = (F.normalize(weight, dim=1)[:, None] @ maps.flatten(2))[:, 0].unflatten(1, maps.shape[2:])
    return SHARPNESS * alike - bias[:, None, None]


def support_loss(support: Shots, weight: Tensor, bias: Tensor) -> Tensor:
    """(Q,) mean cross-entropy of the support's unit features under Q classifiers; mixed cells count by their share."""
    inside = shrink(support.masks, support.maps.shape[2:]).flatten()
    logits = SHARPNESS * F.normalize(weight, dim=1) @ support.maps.movedim(1, 0).flatten(1) - bias[:, None]
    return F.binary_cross_entropy_with_logits(logits, inside.expand_as(logits), reduction="none").mean(1)


def entropy(logits: Tensor) -> Tensor:
    """(Q,) mean Shannon entropy of two-class predictions with logits (Q, h, w)."""
    return F.binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="none").mean((1, 2))


def proportion(logits: Tensor) -> Tensor:
    """(Q,) share of the structure: the mean probability of logits (Q, h, w)."""
    return logits.sigmoid().mean((1, 2))


def kl(found: Tensor, wanted: Tensor) -> Tensor:
    """(Q,) divergence of a proportion of structure from the wanted one, both (Q,)."""
    found, wanted = (torch.stack([1 - p, p]).clamp(TINY, 1 - TINY) for p in (found, wanted))
    return (found * (found / wanted).log()).sum(0)


recipe = Recipe(
    paper="repri",
    title="Transductive inference in place of meta-learning",
    claim="On the same features from plain classification, a classifier fitted to support and query pixels raises the "
    "volume Dice of held-out structures against prototypes, with one annotated patient.",
    arms=both(
        {
            "prototypes": PrototypeNetwork(episodes="none"),
            "repri": RePRI(),
            "without KL": RePRI(kl=False),
            "support only": RePRI(kl=False, entropy=False),
            "local prototypes": LocalPrototypes(episodes="none"),
            "prototypes, base classes": PrototypeNetwork(episodes="none", base=1.0),
            "repri, base classes": RePRI(base=1.0),
        },
        place=PLACE,
    ),
    compare=("repri", "prototypes"),
    ablation=("repri", "support only"),
    replicate="draw",
    scales=scales(
        "prototypes", "repri", "without KL", "support only", budget=Budget(steps=50, batch=8, checks=1), supports=1
    ),
    metric="dice",
    score=novel_dice,
    published={
        "PASCAL-5i, 1 shot, ResNet-50, mean IoU": 0.597,
        "PASCAL-5i, 5 shots, ResNet-50, mean IoU": 0.666,
        "COCO-20i to PASCAL VOC, 1 shot, ResNet-50, mean IoU": 0.631,
    },
    source="README of github.com/mboudiaf/RePRI-for-Few-Shot-Segmentation",
    components=(
        Component(
            "cross-entropy on the support",
            "implemented",
            "a feature cell that is partly structure counts by its share; the official code takes the nearest pixel",
        ),
        Component("entropy of query pixels", "implemented"),
        Component(
            "foreground-proportion KL",
            "implemented",
            "the proportion is estimated by the classifier itself, before the first step and after ten, as published",
        ),
        Component(
            "linear classifier of the features",
            "implemented",
            "cosine with a learned prototype and a bias, 50 steps; temperature 50 and steps of 0.1, chosen on "
            "validation patients, where the official code has 20 and 0.025",
        ),
        Component(
            "standard training on base classes",
            "simplified",
            "ImageNet's thousand classes, frozen, in place of the paper's fifteen",
        ),
        Component("domain shift between base and novel classes", "absent", "famnet and c-graph cross domains here"),
    ),
)
