"""What metric learning in subspaces is made of: a loss of pairs, clusters that keep their numbers, and the network."""

import math

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor, nn

from medcook.methods.frozen import PHOTOGRAPH
from medcook.networks.squeezenet import FIRES, POOLED, SqueezeNet

BETA, MARGIN, CUTOFF = 1.2, 0.2, 0.5
"""The boundary between near and far, the margin on either side, and the distance below which a negative is too hard."""
LAST, MAPS = "fire8", 512
"""The layer of SqueezeNet whose maps are used, before they are pooled, at an eighth of the image; their number."""
SCALE = 1 / 20
"""Of the maps: about what brings SqueezeNet's to a deviation of 1."""


def margin_loss(vectors: Tensor, kinds: Tensor) -> Tensor:
    """Wu et al., ICCV 2017: unit vectors (N, D) of one kind (N,) within beta - margin, others beyond beta + margin.

    Every pair of one kind counts. Of other kinds, each vector has as many partners as vectors have of their own kind
    on average: the nearest beyond the cutoff, and nearer ones where these do not suffice. The loss is the mean over
    all pairs that are not yet where they should be.
    """
    apart = (2 - 2 * vectors @ vectors.T).clamp_min(1e-8).sqrt()
    same = kinds[:, None] == kinds
    alike = same & ~torch.eye(len(kinds), dtype=torch.bool, device=kinds.device)
    count = max(1, int(alike.sum()) // len(kinds))
    order = (apart.detach() + 1e3 * (apart.detach() < CUTOFF)).masked_fill(same, math.inf)
    nearest = order.topk(min(count, len(kinds)), largest=False).indices
    other = torch.zeros_like(same).scatter(1, nearest, True) & ~same
    pull, push = (apart - BETA + MARGIN).relu()[alike], (BETA - apart + MARGIN).relu()[other]
    wrong = (pull > 0).sum() + (push > 0).sum()
    return (pull.sum() + push.sum()) / wrong.clamp_min(1)


def kmeans(points: Tensor, count: int, rounds: int = 25) -> tuple[Tensor, Tensor]:
    """(labels (N,), centres (count, D)) of points (N, D), by Lloyd's rule.

    It starts from the point nearest to the mean, and then each time the one that is farthest from those taken; a
    centre to which no point belongs stays where it is.
    """
    taken = [int(torch.cdist(points, points.mean(0, keepdim=True))[:, 0].argmin())]
    while len(taken) < count:
        taken.append(int(torch.cdist(points, points[taken]).amin(1).argmax()))
    centres = points[taken].clone()
    for _ in range(rounds):
        labels = torch.cdist(points, centres).argmin(1)
        for number in labels.unique().tolist():
            centres[number] = points[labels == number].mean(0)
    return torch.cdist(points, centres).argmin(1), centres


def renumbered(now: Tensor, before: Tensor, count: int) -> Tensor:
    """(count,) the number that each of `count` clusters is to have, so that most members (N,) keep theirs.

    There may have been fewer clusters before; a new one has the first number that is free.
    """
    overlap = torch.zeros(count, int(before.max()) + 1)
    overlap.index_put_((now, before), torch.ones(len(now)), accumulate=True)
    mine, theirs = linear_sum_assignment(-overlap.numpy())
    found = dict(zip(mine.tolist(), theirs.tolist(), strict=True))
    free = iter(sorted(set(range(count)) - set(found.values())))
    return torch.tensor([found[number] if number in found else next(free) for number in range(count)])


def agreement(vectors: Tensor, kinds: Tensor) -> float:
    """The normalised mutual information of kinds (N,) with as many clusters of the vectors (N, D)."""
    labels = kmeans(vectors, len(kinds.unique()))[0]
    return float(normalized_mutual_info_score(kinds.numpy(), labels.numpy()))


class Attention(nn.Sequential):
    """Maps (B, inputs, h, w) to how much each place counts (B, 1, h, w), from 0 to 1: three convolutions."""

    def __init__(self, inputs: int):
        super().__init__(
            nn.Conv2d(inputs, inputs // 8, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(inputs // 8, inputs // 32, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(inputs // 32, 1, 3, padding=1),
            nn.Sigmoid(),
        )


class Similarity(nn.Module):
    """SqueezeNet up to `LAST`, attention or none, and a linear layer: images (B, C, H, W) to (B, width).

    owner  (width,) the learner of each output; of a network without learners all belong to the first
    """

    def __init__(self, encoder: SqueezeNet, width: int, attention: bool):
        super().__init__()
        self.layers = nn.ModuleDict({name: getattr(encoder, name) for name in ("conv1", *FIRES) if name != "fire9"})
        self.attention = Attention(MAPS) if attention else None
        self.embedding = nn.Linear(MAPS, width)
        self.register_buffer("owner", torch.zeros(width, dtype=torch.long))

    def maps(self, images: Tensor) -> Tensor:
        """(B, 512, H / 8, W / 8), about, of z-scored images: the first channel as a grey photograph."""
        x = PHOTOGRAPH * images[:, :1].expand(-1, 3, -1, -1)
        for name, layer in self.layers.items():
            x = F.relu(layer(x)) if name == "conv1" else layer(x)
            if name in POOLED and name != LAST:
                x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
        return SCALE * x

    def pooled(self, images: Tensor) -> Tensor:
        """(B, 512) float32: the mean over the maps, each place as much as attention gives it."""
        maps = self.maps(images)
        if self.attention is not None:
            maps = maps * self.attention(maps)
        return maps.flatten(2).float().mean(2)

    def parts(self, raw: Tensor) -> list[Tensor]:
        """The learners' own outputs (B, n_k) of all (B, width), each of unit length."""
        return [F.normalize(raw[:, self.owner == k], dim=1) for k in range(int(self.owner.max()) + 1)]

    def whole(self, raw: Tensor) -> Tensor:
        """All outputs as one vector (B, width) of unit length, in which every learner counts as much."""
        return F.normalize(torch.cat(self.parts(raw), dim=1), dim=1)
