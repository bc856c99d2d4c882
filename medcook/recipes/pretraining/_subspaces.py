"""What learners of subspaces are made of: a loss of pairs, clusters that keep their numbers, the network, its split."""

import math

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor, nn

from medcook.methods import Batch
from medcook.methods.frozen import PHOTOGRAPH
from medcook.networks.squeezenet import FIRES, POOLED, SqueezeNet

BETA, MARGIN, CUTOFF = 1.2, 0.2, 0.5
"""The boundary between near and far, the margin on either side, and the distance below which a negative is too hard."""
LAST, MAPS = "fire8", 512
"""The layer of SqueezeNet whose maps are used, before they are pooled, at an eighth of the image; their number."""
SCALE = 1 / 40
"""Of the maps: about what brings SqueezeNet's to a deviation of 1."""
MOST = 8
"""Learners there may be."""
KEPT, SPLIT, LEAST = 0.5, 10, 5
"""The score above which an output stays, what a learner's outputs must exceed for a split, and the least of a part."""
HELD = 6
"""Of so many training images one is held out, to see whether learning goes on."""
REMEMBERED, HELD_BACK, ENOUGH = 256, 64, 4
"""Training images, and held-out ones, whose vectors are remembered; how many of these make a look."""


def margin_loss(vectors: Tensor, kinds: Tensor) -> Tensor:
    """Wu et al., ICCV 2017: unit vectors (N, D) of one kind (N,) within beta - margin, others beyond beta + margin.

    Every pair of one kind counts. Of other kinds, each vector has as many partners as vectors have of their own kind
    on average: the nearest beyond the cutoff, and nearer ones where these do not suffice. The loss is the mean over
    all pairs that are not yet where they should be.
    """
    apart = ((vectors[:, None] - vectors).square().sum(2) + 1e-8).sqrt()
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
    """The mutual information of kinds (N,) and as many clusters of vectors (N, D), from 0 (as by chance) to 1."""
    labels = kmeans(vectors, len(kinds.unique()))[0]
    return float(adjusted_mutual_info_score(kinds.numpy(), labels.numpy()))


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


class Ring(nn.Module):
    """The latest vectors (most, width) and their kinds (most,); kind -1: none yet."""

    def __init__(self, most: int, width: int):
        super().__init__()
        self.register_buffer("vectors", torch.zeros(most, width))
        self.register_buffer("kinds", torch.full((most,), -1))
        self.register_buffer("next", torch.zeros((), dtype=torch.long))

    def add(self, vectors: Tensor, kinds: Tensor) -> None:
        where = (self.next + torch.arange(len(kinds), device=kinds.device)) % len(self.kinds)
        self.vectors[where], self.kinds[where] = vectors.detach().float(), kinds
        self.next += len(kinds)

    def all(self) -> tuple[Tensor, Tensor]:
        """(vectors, kinds) of those there are."""
        there = self.kinds >= 0
        return self.vectors[there], self.kinds[there]


class State(nn.Module):
    """What the learners remember: vectors, clusters, scores of outputs, and how learning went."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.classes = classes
        self.seen, self.held = Ring(REMEMBERED, MAPS), Ring(HELD_BACK, width)
        self.register_buffer("centres", torch.zeros(MOST, MAPS))
        self.register_buffer("taylor", torch.zeros(width))
        self.register_buffer("learners", torch.ones((), dtype=torch.long))
        self.register_buffer("best", torch.tensor(-1.0))
        self.register_buffer("waited", torch.zeros((), dtype=torch.long))
        self.register_buffer("ready", torch.tensor(True))

    def clusters(self, pooled: Tensor) -> Tensor:
        """(B,) the cluster, and so the learner, of each image's pooled maps (B, 512)."""
        return torch.cdist(F.normalize(pooled.detach(), dim=1), self.centres[: int(self.learners)]).argmin(1)

    def regroup(self) -> None:
        """Clusters are formed anew, as many as there are learners; most images keep their number."""
        vectors = F.normalize(self.seen.all()[0], dim=1)
        count = int(self.learners)
        if len(vectors) < count:
            return
        before = self.clusters(vectors)
        labels, centres = kmeans(vectors, count)
        self.centres[renumbered(labels, before, count)] = centres


def important(taylor: Tensor) -> Tensor:
    """Which outputs of a learner stay its own, by their mean z dloss/dz (n,): bool (n,)."""
    size = taylor.abs()
    return (size - size.min()) / (size.max() - size.min()).clamp_min(1e-12) > KEPT


@torch.no_grad()
def split(model: Similarity, average: Similarity, state: State) -> bool:
    """The last learner keeps what matters, and a new one begins with the rest; False where there is too little."""
    last, weights = int(state.learners) - 1, model.embedding
    mine = (model.owner == last).nonzero()[:, 0]
    stays = important(state.taylor[mine])
    rest = mine[~stays]
    if len(mine) <= SPLIT or min(int(stays.sum()), len(rest)) < LEAST or last + 1 >= MOST:
        return False
    new = nn.Linear(weights.in_features, len(rest), device=weights.weight.device)
    nn.init.xavier_normal_(new.weight)
    for net in (model, average):
        net.embedding.weight[rest], net.embedding.bias[rest] = new.weight, new.bias
        net.owner[rest] = last + 1
    state.learners += 1
    return True


def shown(batch: Batch) -> Tensor:
    """(B,) bool: which images one may learn from."""
    if batch.index is None:
        return torch.ones(len(batch.images), dtype=torch.bool)
    return (batch.index % HELD != HELD - 1).to(batch.images.device)


def in_clusters(parts: list[Tensor], kinds: Tensor, clusters: Tensor, learns: Tensor) -> Tensor | float:
    """The margin loss of each learner's part (B, n_k) on the images (B,) of its cluster, by their share."""
    total = 0.0
    for number, part in enumerate(parts):
        mine = learns & (clusters == number)
        if mine.sum() > 1:
            total = total + mine.sum() / learns.sum() * margin_loss(part[mine], kinds[mine])
    return total
