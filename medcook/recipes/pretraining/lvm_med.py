"""LVM-Med, contrastive pre-training as second-order graph matching (Nguyen et al., NeurIPS 2023).

D. M. H. Nguyen, H. Nguyen, N. T. Diep, T. N. Pham, T. Cao, B. T. Nguyen, P. Swoboda, N. Ho, S. Albarqouni, P. Xie,
D. Sonntag and M. Niepert.

Idea: two views of a batch are two graphs, and the images' vectors should be such that the best matching of the graphs
pairs each image with itself: not only are matched vertices alike, but also the edges between them, so that an image is
known by its neighbours too. A solver finds the matching; noise on the affinities and a second, pushed solution give an
estimate of the gradient through it. For images i, j of one view and a, b of the other:

    z^    = z and two graph convolutions of z = h(mean of the feature map) over the k nearest neighbours          (1)
    c_lo  = mean cos of feature vectors with those nearest in place, and with those nearest in feature      (2)
    c_v   = alpha cos(z^_i, z^_a) + (1 - alpha) (c_lo(i, a) + c_lo(a, i))                                   (3)
    c_e   = cos(z^_i - z^_j, z^_a - z^_b), where i has the neighbour j and a the neighbour b
    GM    = argmax over one-to-one v of sum c_v,ia v_ia + sum c_e,iajb v_ia v_jb                            (4)
    L     = v (1 - v*) + v* (1 - v), with v = GM(c + Gumbel noise) and v* the identity                      (5)
    dL/dc = (v - GM(c + the same noise - lambda dL/dv)) / lambda                                            (6)
"""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data.transforms import warp
from medcook.methods import Batch, Moment, own_generator
from medcook.pretraining import Pretrained, encoded
from medcook.recipes.pretraining._settings import BASELINE, BRAINS, HEARTS, scales
from medcook.recipes.pretraining._simclr import SimCLR
from medcook.recipes.recipe import Arm, Component, Recipe

ALPHA, LAMBDA = 0.8, 80.0
"""Weight of the global affinity, and the step of the gradient's estimate, as in the paper."""


@lru_cache(maxsize=8)
def matchings(nodes: int) -> Tensor:
    """All one-to-one matchings of graphs of so many vertices: (N!, N), the partner of each vertex."""
    return torch.tensor(list(itertools.permutations(range(nodes))))


@lru_cache(maxsize=8)
def matched_pairs(nodes: int) -> Tensor:
    """(N!, N^2) int32: for each matching and two vertices i, j with partners a, b, the place of (ia, jb) among N^4."""
    matched = torch.arange(nodes) * nodes + matchings(nodes)
    return (matched[:, :, None] * nodes**2 + matched[:, None]).flatten(1).int()


def best_matching(affinities: Tensor) -> Tensor:
    """GM (4), exactly: of affinities (S, N^2, N^2), whose diagonal is c_v and whose rest c_e, the best v (S, N, N).

    Every matching is scored, which takes milliseconds up to 8 vertices.
    """
    nodes = math.isqrt(affinities.shape[1])
    where = matched_pairs(nodes).to(affinities.device)
    scores = F.embedding_bag(where, affinities.flatten(1).T.contiguous(), mode="sum")
    best = matchings(nodes).to(scores.device)[scores.argmax(0)]
    return F.one_hot(best, nodes).to(affinities.dtype)


def indicators(matched: Tensor) -> Tensor:
    """(S, N^2, N^2): v_ia v_jb of matchings v (S, N, N); on the diagonal v_ia."""
    flat = matched.flatten(1)
    return flat[:, :, None] * flat[:, None]


class MatchingLoss(torch.autograd.Function):
    """The Hamming distance (5) of the best matching from the identity, and the estimate (6) of its gradient.

    affinity (N^2, N^2), noise (S, N^2, N^2), push (lambda): a number, the mean over the S samples of the noise.
    """

    @staticmethod
    def forward(ctx, affinity: Tensor, noise: Tensor, push: float) -> Tensor:
        found = best_matching(affinity + noise)
        truth = torch.eye(found.shape[1]).to(found)
        ctx.save_for_backward(affinity, noise, found, truth)
        ctx.push = push
        return (found * (1 - truth) + truth * (1 - found)).sum((1, 2)).mean()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        affinity, noise, found, truth = ctx.saved_tensors
        slope = (1 - 2 * truth).flatten()
        pushed = best_matching(affinity + noise - ctx.push * slope.diag())
        return upstream * (indicators(found) - indicators(pushed)).mean(0) / ctx.push, None, None


def gumbel(shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
    """Gumbel(0, 1) noise from torch's own generator."""
    return -torch.empty(shape).exponential_().log().to(device)


def neighbours(vectors: Tensor, count: int) -> Tensor:
    """A (N, N): 1 where one of two vectors (N, D) is among the `count` nearest of the other."""
    apart = torch.cdist(vectors, vectors).fill_diagonal_(math.inf)
    nearest = apart.topk(min(count, len(vectors) - 1), largest=False).indices
    graph = torch.zeros_like(apart).scatter_(1, nearest, 1.0)
    return torch.maximum(graph, graph.T)


class MessagePassing(nn.Module):
    """g (1): two graph convolutions (Kipf and Welling, ICLR 2017) of vectors (N, width) with neighbours A (N, N).

    What they find is added to the vectors: two vertices with the same neighbours would else become one.
    """

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, vectors: Tensor, graph: Tensor) -> Tensor:
        spread = graph + torch.eye(len(graph)).to(graph)
        scale = spread.sum(1).rsqrt()
        spread = scale[:, None] * spread * scale
        return vectors + self.second(spread @ self.first(spread @ vectors).relu())


def local_affinity(one: Tensor, two: Tensor, places: Tensor, others: Tensor, best: int) -> Tensor:
    """c_lo (N, N) of feature vectors (N, P, D) at places (N, P, dims) in the original image, of either view.

    Each vector of one image is compared with the nearest of the other, in place and in feature; the `best` nearest
    pairs count.
    """
    alike = torch.einsum("ipd,aqd->iapq", F.normalize(one, dim=2), F.normalize(two, dim=2))
    means = []
    for mine, theirs in ((places, others), (one.detach(), two.detach())):
        apart = torch.cdist(mine.flatten(0, 1), theirs.flatten(0, 1))
        apart = apart.view(*mine.shape[:2], *theirs.shape[:2]).transpose(1, 2)
        distance, nearest = apart.min(3)
        pairs = alike.gather(3, nearest[..., None])[..., 0]
        means.append(pairs.gather(2, distance.topk(min(best, pairs.shape[2]), largest=False).indices).mean(2))
    return sum(means) / 2


def edge_affinity(one: Tensor, two: Tensor) -> Tensor:
    """c_e (N^2, N^2), rows ia and columns jb, of vectors (N, D) of either view, for all pairs of vertices."""
    first, second = (F.normalize(x[:, None] - x[None], dim=2) for x in (one, two))
    return torch.einsum("ijd,abd->iajb", first, second).reshape(len(one) * len(two), -1)


def edges(one: Tensor, two: Tensor) -> Tensor:
    """(N^2, N^2): 1 at ia, jb where j is a neighbour of i (N, N) and b one of a (N, N)."""
    return torch.einsum("ij,ab->iajb", one, two).reshape(one.numel(), -1)


@dataclass
class LvmMed(Pretrained):
    """Two views of a batch have to be matched.

    second_order  edges count, beside vertices
    passing       vectors are told by their neighbours what these are
    alpha         weight of the global affinity; 1: without the local one
    noise         factor of the Gumbel noise; 0: none, and one sample
    samples       of the noise
    nodes         most vertices of a graph; a larger batch makes several
    nearest       neighbours of a vertex
    best          pairs of feature vectors that the local affinity counts
    """

    second_order: bool = True
    passing: bool = True
    alpha: float = ALPHA
    push: float = LAMBDA
    noise: float = 1.0
    samples: int = 8
    nodes: int = 8
    nearest: int = 2
    best: int = 20
    width: int = 32

    def pretext_parts(self, model: nn.Module, inputs: int, dims: int) -> nn.Module:
        parts = {"project": nn.Linear(self.channels[-1], self.width)}
        if self.passing:
            parts["passing"] = MessagePassing(self.width)
        return nn.ModuleDict(parts)

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        """The loss of the module's docstring, the mean over graphs."""
        (one, places), (two, others) = self.placed_view(images.images), self.placed_view(images.images)
        maps = encoded(nets["model"], torch.cat([one, two]))
        size = maps.shape[2:]
        views = [*maps.chunk(2), *(located(grid, size) for grid in (places, others))]
        graphs = math.ceil(len(one) / self.nodes)
        with torch.autocast(maps.device.type, enabled=False):
            parts = zip(*(part.float().flatten(2).tensor_split(graphs) for part in views), strict=True)
            return torch.stack([self.matching(nets["pretext"], *part) for part in parts]).mean()

    def placed_view(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Another view of images, and where each of its pixels comes from (B, dims, *size)."""
        rng = own_generator()
        grid = self.augmentation.grid(images, rng)
        return self.augmentation.intensity(warp(images, None, grid)[0], rng), grid.movedim(-1, 1)

    def matching(self, parts: nn.ModuleDict, one: Tensor, two: Tensor, places: Tensor, others: Tensor) -> Tensor:
        """The loss of one pair of graphs: feature maps (N, D, P) and places (N, dims, P) of either view."""
        found = [parts["project"](maps.mean(2)) for maps in (one, two)]
        graphs = [neighbours(vectors.detach(), self.nearest) for vectors in found]
        if self.passing:
            found = [parts["passing"](vectors, graph) for vectors, graph in zip(found, graphs, strict=True)]
        vertices = self.alpha * F.normalize(found[0], dim=1) @ F.normalize(found[1], dim=1).T
        if self.alpha < 1:
            one, two, places, others = (part.transpose(1, 2) for part in (one, two, places, others))
            there = local_affinity(one, two, places, others, self.best)
            back = local_affinity(two, one, others, places, self.best)
            vertices = vertices + (1 - self.alpha) * (there + back.T)
        affinity, counts = vertices.flatten().diag(), torch.eye(vertices.numel()).to(vertices)
        if self.second_order:
            joined = edges(*graphs)
            affinity, counts = affinity + joined * edge_affinity(*found), counts + joined
        samples = self.samples if self.noise else 1
        noise = self.noise * gumbel((samples, *affinity.shape), affinity.device) * counts
        return MatchingLoss.apply(affinity, noise, self.push)


def located(grid: Tensor, size: torch.Size) -> Tensor:
    """Where each place of a feature map comes from: the mean over the pixels (B, dims, *whole) in its place."""
    pool = F.adaptive_avg_pool2d if len(size) == 2 else F.adaptive_avg_pool3d
    return pool(grid, size)


recipe = Recipe(
    paper="lvm-med",
    title="Two views of a batch as graphs that have to be matched",
    claim="With three labelled patients' hearts and the other patients' images, pre-training by second-order graph "
    "matching gives a higher Dice than SimCLR.",
    arms={
        "from scratch": Arm(BASELINE),
        "lvm-med": Arm(LvmMed()),
        "without second order": Arm(LvmMed(second_order=False)),
        "simclr": Arm(SimCLR()),
        "without message passing": Arm(LvmMed(passing=False)),
        "without noise": Arm(LvmMed(noise=0.0)),
        "without local affinity": Arm(LvmMed(alpha=1.0)),
    },
    compare=("lvm-med", "simclr"),
    ablation=("lvm-med", "without second order"),
    replicate="draw",
    scales=scales(BRAINS, HEARTS, "from scratch", "lvm-med", "without second order", "simclr"),
    source="text, arXiv 2306.11925, with the pseudo-code and settings of its appendix A (the official code, "
    "github.com/duyhominhnguyen/LVM-Med, has the fine-tuning alone); figures: its tables 3 and 6, ResNet-50",
    published={
        "mean of five 2D segmentation tasks": 0.8305,
        "mean of five 2D segmentation tasks, without second order": 0.8021,
        "MMWHS-MRI, 3D IoU": 0.7859,
        "MMWHS-MRI, 3D IoU, SimCLR": 0.7654,
    },
    components=(
        Component(
            "combinatorial graph matching",
            "implemented",
            "graphs of 8 vertices, as a batch has, for 16; all 40320 matchings are scored at once, which is exact, "
            "where the paper has a heuristic solver by Lagrange decomposition",
        ),
        Component("structural constraints", "implemented", "edges to 2 of 7 vertices, both ways; in the paper 5 of 15"),
        Component(
            "global and local similarity",
            "implemented",
            "alpha 0.8; local affinities are means over the 20 nearest pairs of 64 places, in place and in feature, "
            "halved as in the pseudo-code and added both ways as in (3). The paper does not give the number of pairs",
        ),
        Component(
            "gradient estimation through the solver",
            "implemented",
            "lambda 80 and Gumbel(0, 1) noise, as in the paper; the mean of 8 samples of noise for one",
        ),
        Component(
            "message passing",
            "simplified",
            "two graph convolutions, with a rectifier between them. Their result is added to the vectors, which (1) "
            "does not do: among 8 vertices two often have the same neighbours and become one, the direction of the "
            "edge between them is rounding, and its gradient explodes. Seen on simulated vectors, where nothing was "
            "learned without this",
        ),
        Component(
            "comparison with other self-supervised methods",
            "simplified",
            "SimCLR alone, with the same views, encoder and steps; the paper's seven methods are given default "
            "settings there",
        ),
        Component(
            "pre-training on 1.3 million images of 55 data sets",
            "absent",
            "300 steps on the training patients' slices of one set, from random weights, where the paper starts from "
            "ImageNet's or SAM's. Views are the book's augmentation",
        ),
        Component(
            "fifteen tasks",
            "simplified",
            "one, hearts. Looked at before: one run on a draw that is not scored, where the pretext's loss fell from "
            "14, which is chance, to 10.4",
        ),
        Component("comparison with foundation models", "absent", "none is at hand"),
    ),
)
