"""FoB: background prompts hold SAM back (Focus on Background; code at github.com/primebo1/FoB_SAM).

From a click on an organ SAM takes its neighbours too, where borders are faint. So few-shot segmentation becomes finding
prompts: places around the structure are taken from the support whatever the structure is, localised in the query, and
given to a frozen SAM as points beside the object. These places form a ring, and the ring corrects single places.

  places    q_0 the middle of the mask; q_k a little beyond its border in direction 2 pi k / K
  context   e_k = transformer(f_s(q_k) + role_k; the other e, f_q): prompts hear of each other and of the query
  heat      h_k(x) = softmax_x(e_k . f_q(x) / sqrt(d) + g cos(f_s(q_k), f_q(x))),  p_k = sum_x x h_k(x)
  structure c, s = argmin sum_k |p_k - c - s (q_k - q_0)|^2;  h_k <- h_k(x) exp(-|x - c - s (q_k - q_0)|^2 / 2 v_r^2)
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import Case
from medcook.evaluation import row
from medcook.few_shot import Shots
from medcook.few_shot.baselines import SHARPNESS
from medcook.few_shot.scoring import answers
from medcook.metrics import dice
from medcook.recipes.few_shot._prompting import NearestFeature, SamFewShot, asked, on_both
from medcook.recipes.few_shot._settings import EPISODES, PLACE, scales
from medcook.recipes.recipe import Component, Recipe
from medcook.sam.prompts import Prompt, middle_of
from medcook.tasks import Budget


def places_around(mask: np.ndarray, count: int, gap: float) -> np.ndarray:
    """(1 + count, 2) x, y, each -1 to 1 over the image: the middle of a mask (H, W), then places around it.

    Direction k is 2 pi k / count; the place lies `gap` beyond the farthest pixel of the mask in that sector.
    """
    height, width = mask.shape
    x0, y0 = middle_of(mask)
    rows, columns = np.nonzero(mask)
    x, y = columns + 0.5 - x0, rows + 0.5 - y0
    angle, far = np.arctan2(y, x), np.hypot(x, y)
    found = [(x0, y0)]
    for k in range(count):
        turn = 2 * math.pi * k / count
        off = np.abs((angle - turn + math.pi) % (2 * math.pi) - math.pi)
        inside = off <= math.pi / count
        reach = (far[inside].max() if inside.any() else 0.0) + gap * max(height, width) / 2
        found.append((x0 + reach * math.cos(turn), y0 + reach * math.sin(turn)))
    unit = np.array(found) / (width, height) * 2 - 1
    return unit.clip(-1, 1).astype(np.float32)


def spread(size: tuple[int, int], device=None) -> Tensor:
    """(h * w, 2) x, y of the cells of a map, -1 to 1 over the image."""
    y, x = ((torch.arange(side, device=device) + 0.5) / side * 2 - 1 for side in size)
    return torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1).flatten(0, 1)


def ring_fit(places: Tensor, model: Tensor) -> Tensor:
    """Places (Q, P, 2) as the model (P, 2), moved and scaled for each query to fit them best (least squares)."""
    centre, middle = places.mean(1, keepdim=True), model.mean(0)
    shape = model - middle
    scale = ((places - centre) * shape).sum((1, 2), keepdim=True) / (shape**2).sum().clamp_min(1e-6)
    return centre + scale.clamp(0.4, 2.5) * shape


class Localiser(nn.Module):
    """Places in the support and features of both images to heat maps in the query."""

    def __init__(self, width: int, places: int, keys: int = 64):
        super().__init__()
        self.project = nn.Conv2d(width, keys, 1)
        self.norm = nn.LayerNorm(keys)
        self.where = nn.Linear(8, keys)
        self.roles = nn.Parameter(0.1 * torch.randn(places, keys))
        self.gain = nn.Parameter(torch.tensor(SHARPNESS))
        self.context = nn.TransformerDecoderLayer(keys, 4, 2 * keys, dropout=0.0, batch_first=True, norm_first=True)

    def features(self, maps: Tensor) -> Tensor:
        """(N, h * w, keys) of maps (N, width, h, w), with where each cell lies."""
        at = spread(tuple(maps.shape[2:]), maps.device)
        return self.norm(self.project(maps).flatten(2).transpose(1, 2)) + self.coded(at)

    def coded(self, at: Tensor) -> Tensor:
        """(..., keys) of places (..., 2)."""
        waves = torch.cat([at * math.pi / 2, at * math.pi], dim=-1)
        return self.where(torch.cat([waves.sin(), waves.cos()], dim=-1))

    def forward(self, support: Tensor, places: Tensor, query: Tensor) -> Tensor:
        """(Q, P, h * w) logits of support maps (S, width, h, w), places (S, P, 2) and query maps (Q, width, h, w)."""
        seen = F.grid_sample(self.project(support), places[:, :, None], align_corners=False)[..., 0].transpose(1, 2)
        prompts = (self.norm(seen) + self.coded(places)).mean(0) + self.roles
        memory = self.features(query)
        prompts = self.context(prompts.expand(len(query), -1, -1), memory)
        return prompts @ memory.transpose(1, 2) / memory.shape[-1] ** 0.5 + self.gain * alike(support, places, query)


def alike(support: Tensor, places: Tensor, query: Tensor) -> Tensor:
    """(Q, P, h * w): cosine of the support's features at the places with those of every cell of the query."""
    seen = F.grid_sample(F.avg_pool2d(support, 3, 1, 1), places[:, :, None], align_corners=False)[..., 0].mean(0)
    return torch.einsum("dp,qdn->qpn", F.normalize(seen, dim=0), F.normalize(query, dim=1).flatten(2))


@dataclass
class FoB(SamFewShot):
    """Localises the support's background places in the query and gives them to SAM as points beside the object.

    places      around the structure; `gap` how far beyond its border, in half sides of the image
    background  False: SAM is only clicked on the structure, at the same place
    refining    rounds in which the ring corrects its places; `looseness` is how far they may stray in the first
    """

    episodes: str = EPISODES
    count: int = 2
    places: int = 6
    gap: float = 0.12
    background: bool = True
    refining: int = 2
    looseness: float = 0.3

    def parts(self, inputs: int) -> dict[str, nn.Module]:
        return super().parts(inputs) | {"localiser": Localiser(self.width, 1 + self.places)}

    def around(self, masks: Tensor) -> Tensor:
        """(N, 1 + places, 2) of masks (N, H, W) that are not empty."""
        found = [places_around((mask == 1).cpu().numpy(), self.places, self.gap) for mask in masks]
        return torch.from_numpy(np.stack(found)).to(masks.device)

    def localise(self, net: nn.ModuleDict, support: Shots, query: Shots) -> tuple[Tensor, list[Tensor]]:
        """Heat maps' logits (Q, P, h * w), and places (Q, P, 2): the first guess, then those of each refining round."""
        theirs = self.around(support.masks)
        logits = net["localiser"](support.maps, theirs, query.maps)
        at = spread(tuple(query.maps.shape[2:]), logits.device)
        found = [logits.softmax(-1) @ at]
        for k in range(self.refining):
            expected = ring_fit(found[-1], theirs.mean(0))
            away = ((at - expected[:, :, None]) ** 2).sum(-1)
            reach = self.looseness / 2**k
            found.append((logits - away / (2 * reach**2)).softmax(-1) @ at)
        return logits, found

    def episode_loss(self, net: nn.ModuleDict, support: Shots, query: Shots) -> Tensor:
        """Heat maps like dots at the query's own places, and the distance to these after every round."""
        shown = (query.masks == 1).flatten(1).any(1)
        if not shown.any() or not (support.masks == 1).flatten(1).any(1).all():
            return 0.0 * sum(p.sum() for p in net["localiser"].parameters())
        query = query.take(shown)
        truth = self.around(query.masks)
        logits, found = self.localise(net, support, query)
        at = spread(tuple(query.maps.shape[2:]), logits.device)
        dots = (-((at - truth[:, :, None]) ** 2).sum(-1) / (2 * 0.1**2)).softmax(-1)
        return F.cross_entropy(logits.flatten(0, 1), dots.flatten(0, 1)) + sum(
            F.smooth_l1_loss(each, truth, beta=0.1) for each in found
        )

    def segment(self, net: nn.ModuleDict, support: Shots, query: Shots) -> Tensor:
        prompts = self.prompts(net, support, query)
        return asked(net, query.images, prompts).sigmoid()

    def prompts(self, net: nn.ModuleDict, support: Shots, query: Shots) -> list[Prompt]:
        """A click on the structure, and those around it, for each query."""
        _, found = self.localise(net, support, query)
        height, width = query.images.shape[2:]
        pixels = ((found[-1] + 1) / 2 * torch.tensor([width, height])).tolist()
        return [
            Prompt((tuple(middle),), tuple(map(tuple, ring)) if self.background else ()) for middle, *ring in pixels
        ]


def over_segmentation(fitted, case: Case) -> list[dict]:
    """As `novel_dice`, and `precision`, the share of the answer that is right: 0 where there is no answer.

    `excess` is the volume of what is wrongly taken, in volumes of the structure.
    """
    return [
        row(
            case,
            name,
            precision=float((mask & truth).sum() / max(1, mask.sum())),
            excess=float((mask & ~truth).sum() / truth.sum()),
            dice=dice(mask, truth),
            support=float(number),
            group=patients,
            missed=not mask.any(),
        )
        for name, number, patients, mask, truth in answers(fitted, case)
    ]


ARMS = ("nearest feature", "fob", "foreground alone", "without structure")

recipe = Recipe(
    paper="fob",
    title="Background prompts hold SAM back",
    claim="Beside a click on a ventricle, localised background prompts raise the precision of a frozen SAM's answer: "
    "it takes less of what surrounds the ventricle. What this costs or gains in Dice stands beside it.",
    arms=on_both(
        {
            "nearest feature": NearestFeature(),
            "fob": FoB(),
            "foreground alone": FoB(background=False),
            "without structure": FoB(refining=0),
        },
        PLACE,
    ),
    compare=("fob", "foreground alone"),
    ablation=("fob", "without structure"),
    replicate="draw",
    scales=scales(*ARMS, budget=Budget(steps=120, batch=8, checks=1), supports=1),
    metric="precision",
    score=over_segmentation,
    components=(
        Component(
            "category-agnostic background prompts",
            "implemented",
            "our reading: six places a little beyond the mask's border, one in each direction from its middle",
        ),
        Component(
            "contextual information",
            "implemented",
            "our reading: one transformer layer, in which prompts attend to each other and to the query",
        ),
        Component(
            "localisation in the query", "implemented", "heat maps over the query's cells, learned on superpixels"
        ),
        Component(
            "structural constraint",
            "implemented",
            "our reading: the support's ring, moved and scaled to fit the places, draws them to itself in two rounds",
        ),
        Component("frozen SAM", "simplified", "the book's small SAM, pre-trained on synthetic scenes, not ViT-H"),
        Component("cross-domain generalisation", "absent", "one claim a recipe; famnet and c-graph cross domains here"),
    ),
)
