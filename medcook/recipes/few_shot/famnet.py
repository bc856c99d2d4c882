"""FAMNet: match support and query in frequency bands, across domains (Bo, Zhu, Li and Zhang, AAAI 2025).

The features of the structure in the support, and of what a first prototype finds in the query, are each pooled to the
same number, laid out as a square and split into three bands by the Fourier transform. Bands are matched one by one:
in the middle band what agrees counts, in the low and high ones, where domains differ, what agrees is damped. The bands
are fused by cross-attention into the prototype that segments the query.

  bands   x_b = F^-1(M_b F(x)): radius r <= c R low, r >= (1 - c) R high, the rest middle; R the corner's, c = 0.3
  weight  w = sigmoid(cos(s_b, q_b)) pixel by pixel; middle: w, low and high: 1 - w
  match   m_b = relu(fc([w relu(fc_s(s_b)), w relu(fc_q(q_b))]))
  fusion  A(m_mid, m_low) + m_mid + A'(m_mid, m_high), A(q, k) = softmax(q k / sqrt(D)) v
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.few_shot import FewShot, LocalPrototypes, PrototypeNetwork, Shots, novel_dice
from medcook.few_shot.baselines import SHARPNESS, prototypes
from medcook.few_shot.method import cosine, shrink
from medcook.recipes.few_shot._settings import EPISODES, both, crossing
from medcook.recipes.recipe import Component, Recipe

SIDE = 8
LOW, MIDDLE, HIGH = 0, 1, 2


def bands(features: Tensor, cutoff: float) -> Tensor:
    """(3, ..., N) low, middle and high frequencies of features (..., N), N = side * side; their sum is the input."""
    side = math.isqrt(features.shape[-1])
    square = features.unflatten(-1, (side, side))
    spectrum = torch.fft.fft2(square)
    parts = torch.stack([torch.fft.ifft2(spectrum * mask).real for mask in band_masks(side, cutoff)])
    return parts.flatten(-2)


def band_masks(side: int, cutoff: float) -> Tensor:
    """(3, side, side), 0 or 1: which frequencies, in the order of `torch.fft.fft2`, are low, middle and high."""
    steps = torch.fft.fftfreq(side) * side
    radius = (steps[:, None].square() + steps[None].square()).sqrt()
    most = math.hypot(side // 2, side // 2)
    low, high = radius <= cutoff * most, radius >= (1 - cutoff) * most
    return torch.stack([low, ~(low | high), high]).float()


class Matching(nn.Module):
    """One band of the support and of the query, (Q, D, N) each, to what they have in common (Q, D, N)."""

    def __init__(self, count: int):
        super().__init__()
        self.support, self.query = (self.bottleneck(count, count // 4, count) for _ in range(2))
        self.fuse = self.bottleneck(2 * count, count // 2, count)

    @staticmethod
    def bottleneck(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs), nn.ReLU())

    def forward(self, support: Tensor, query: Tensor, damped: bool) -> Tensor:
        weight = agreement(support, query, damped)
        return self.fuse(torch.cat([weight * self.support(support), weight * self.query(query)], dim=-1))


def agreement(support: Tensor, query: Tensor, damped: bool) -> Tensor:
    """(Q, 1, N): sigmoid of the cosine of each pair of features, or one minus that where agreement is damped."""
    alike = F.cosine_similarity(support, query, dim=1)[:, None].sigmoid()
    return 1 - alike if damped else alike


class CrossAttention(nn.Module):
    """Features (Q, D, N) that ask, and those that answer, to answers (Q, D, N)."""

    def __init__(self, width: int):
        super().__init__()
        self.ask, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, asking: Tensor, answering: Tensor) -> Tensor:
        asking, answering = asking.transpose(1, 2), answering.transpose(1, 2)
        scores = self.ask(asking) @ self.key(answering).transpose(1, 2) / math.sqrt(asking.shape[2])
        return (scores.softmax(-1) @ self.value(answering)).transpose(1, 2)


@dataclass
class FAMNet(FewShot):
    """A prototype made from matched and fused frequency bands, added to the support's.

    cutoff  share of the largest radius that is low, and share that is high
    bands   False: all frequencies are matched as the middle band is, and there is nothing to fuse
    damp    False: low and high bands are weighted as the middle one
    """

    episodes: str = EPISODES
    cutoff: float = 0.3
    bands: bool = True
    damp: bool = True

    def parts(self, inputs: int) -> dict[str, nn.Module]:
        fusion = nn.ModuleDict({"low": CrossAttention(self.width), "high": CrossAttention(self.width)})
        gain = nn.ParameterDict({"gain": torch.tensor(0.1)})
        return super().parts(inputs) | {"matching": Matching(SIDE * SIDE), "fusion": fusion, "scalars": gain}

    def logits(self, net: nn.ModuleDict, support: Shots, query: Shots) -> Tensor:
        return self.coarse_and_fine(net, support, query)[1]

    def coarse_and_fine(self, net: nn.ModuleDict, support: Shots, query: Shots) -> tuple[Tensor, Tensor]:
        """Logits (Q, 2, h, w) by the support's prototypes alone, and with what the bands add to the structure's."""
        background, structure = F.normalize(prototypes(support), dim=1)
        coarse = SHARPNESS * cosine(query.maps, torch.stack([background, structure]))
        said = coarse.softmax(1)[:, 1].detach()
        theirs = foreground(support.maps, shrink(support.masks, support.maps.shape[2:]))
        mine = torch.cat([foreground(*each) for each in zip(query.maps.split(1), said.split(1), strict=True)])
        added = self.matched(net, theirs.expand_as(mine), mine).mean(2)
        found = structure + net["scalars"]["gain"] * F.normalize(added, dim=1)
        fine = [
            cosine(maps[None], torch.stack([background, each])) for maps, each in zip(query.maps, found, strict=True)
        ]
        return coarse, SHARPNESS * torch.cat(fine)

    def matched(self, net: nn.ModuleDict, support: Tensor, query: Tensor) -> Tensor:
        """(Q, D, N) of the structure's features in support and query, both (Q, D, N)."""
        if not self.bands:
            return net["matching"](support, query, damped=False)
        pairs = zip(bands(support, self.cutoff), bands(query, self.cutoff), strict=True)
        low, middle, high = (
            net["matching"](*pair, damped=self.damp and band != MIDDLE) for band, pair in enumerate(pairs)
        )
        return net["fusion"]["low"](middle, low) + middle + net["fusion"]["high"](middle, high)

    def episode_loss(self, net: nn.ModuleDict, support: Shots, query: Shots) -> Tensor:
        """The loss of the first and of the final segmentation."""
        return sum(self.query_loss(each, query) for each in self.coarse_and_fine(net, support, query))


def foreground(maps: Tensor, inside: Tensor) -> Tensor:
    """(1, D, SIDE * SIDE): features of maps (S, D, h, w) where inside (S, h, w) is over 1/2, pooled in their order.

    Where no place is, the one that is most so stands for it.
    """
    chosen = inside.flatten() > 0.5
    if not chosen.any():
        chosen = inside.flatten() == inside.max()
    features = maps.movedim(1, 0).flatten(1)[:, chosen]
    return F.adaptive_avg_pool1d(features[None], SIDE * SIDE)


recipe = Recipe(
    paper="famnet",
    title="Matching in frequency bands, across domains",
    claim="Trained on hearts in MR, matching support and query in frequency bands raises the Dice of lungs in chest "
    "X-rays against the support's prototypes alone, with one annotated patient.",
    arms=both(
        {
            "prototypes": PrototypeNetwork(episodes=EPISODES),
            "local prototypes": LocalPrototypes(),
            "famnet": FAMNet(),
            "without bands": FAMNet(bands=False),
            "without damping": FAMNet(damp=False),
        }
    ),
    compare=("famnet", "prototypes"),
    ablation=("famnet", "without bands"),
    replicate="draw",
    scales=crossing("prototypes", "local prototypes", "famnet", "without bands"),
    metric="dice",
    score=novel_dice,
    components=(
        Component(
            "frequency-aware matching",
            "implemented",
            "three bands of pooled foreground features, 0.3 of the radius as in the official code, 64 features for 900",
        ),
        Component(
            "suppression of domain-variant bands",
            "implemented",
            "as in the official code: agreement is damped in the low and the high band",
        ),
        Component(
            "multi-spectral fusion",
            "implemented",
            "the middle band asks, the low and the high one answer; without the last ReLU: features here have signs",
        ),
        Component(
            "coarse prediction of the query",
            "simplified",
            "support prototypes of structure and background; the official code has one prototype and a learned "
            "threshold. What the bands say is added to the support's prototype here, times a learned factor that "
            "starts at 0.1; it replaces that prototype there",
        ),
        Component(
            "cross-domain benchmarks", "simplified", "MR to X-ray; the paper: CT and MR, two MR sequences, two sites"
        ),
    ),
)
