"""Names for the branches of a tree: what is known of each, how they hang together, and a transformer that names them.

After AirMorph's classifier: three stages name lobes, segments and subsegments, each told what the ones before made of
the branches. Attention between two branches knows how many forks lie between them. In the stages of segments and
subsegments a branch's answer is averaged over a soft subtree: with p_ij how much branches i and j seem to be of one
segment, k_i how much i speaks for what it supplies, and M_ij = 1 where i supplies j (or is j),

    w_ij = M_ij (p_ij + (1 - p_ij) k_i) + (1 - M_ij) p_ij,    answer_i = sum_j w_ij logits_j / sum_j w_ij.
"""

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.csgraph import shortest_path
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.recipes.anatomy._airways import CENTRAL, COUNTS, LOBES, NAMES, VALUE
from medcook.recipes.anatomy._centrelines import parsed
from medcook.recipes.anatomy._trees import Tree

Sight = Literal["tree", "all", "itself"]
FINER = 2
"""How much finer trees are parsed that are to be named."""
FARTHEST = 20
"""Steps from branch to branch that are told apart."""
UNKNOWN = -100
"""The target of a branch without a name."""
PLACES = len(CENTRAL) + len(LOBES)
STAGES = (PLACES, *COUNTS[1:])
"""Classes of each stage: central bronchi and lobes; segments; subsegments. The latter two have 0 for none."""


def _targets() -> np.ndarray:
    found = np.full((len(NAMES), 3), UNKNOWN)
    for value, named in enumerate(NAMES):
        if value:
            place = len(CENTRAL) + named.lobe - 1 if named.lobe else CENTRAL.index(named.name)
            found[value] = place, named.segment, named.subsegment
    return found


TARGETS = _targets()
"""(values, 3): what each stage is to say of a label value."""
SEGMENT_VALUES = [0] + [value for value, named in enumerate(NAMES) if named.segment and not named.subsegment]
SUBSEGMENT_VALUES = [0] + [value for value, named in enumerate(NAMES) if named.subsegment]
PLACE_VALUES = [VALUE[name] for name in CENTRAL] + [VALUE[f"{lobe} bronchus"] for lobe in LOBES]


class Graph(NamedTuple):
    """Branches as a graph, or several of them, padded, with one more axis in front.

    features (N, FEATURES);  steps (N, N) int64, branches from one to the other;  below (N, N) bool: M above
    targets (N, 3) int64;    there (N,) bool: False where a graph is padded
    """

    features: Tensor
    steps: Tensor
    below: Tensor
    targets: Tensor
    there: Tensor


FEATURES = 9


def features(tree: Tree, size: tuple[int, int]) -> np.ndarray:
    """(N, 9): generation; middle, length, extents and radius, in image halves; the direction's sine and cosine."""
    half, found = size[0] / 2, []
    for branch in tree:
        low, high = branch.points.min(0), branch.points.max(0)
        way = (branch.points[-1] - branch.points[0]) / max(branch.chord, 1e-6)
        shape = [
            *((low + high) / 2 / half - 1),
            branch.length / half,
            *((high - low) / half),
            branch.radius.mean() / half,
        ]
        found.append([branch.generation / 5, *shape, *way])
    return np.array(found, np.float32).reshape(-1, FEATURES)


def graph(tree: Tree, size: tuple[int, int], label: np.ndarray | None = None) -> Graph:
    """The graph of a tree in an image of this size; the name of a branch is the commonest of its points in a label map
    (H, W)."""
    count = len(tree)
    edges, below = np.zeros((count, count)), np.eye(count, dtype=bool)
    for number, branch in enumerate(tree):
        if branch.parent >= 0:
            edges[branch.parent, number] = 1
            below[:, number] |= below[:, branch.parent]
    steps = shortest_path(edges, directed=False, unweighted=True) if count else edges
    steps = np.where(np.isfinite(steps), steps, FARTHEST).clip(max=FARTHEST)
    targets = np.array([TARGETS[commonest(branch.points, label)] for branch in tree]).reshape(-1, 3)
    parts = torch.from_numpy(features(tree, size)), torch.from_numpy(steps).long(), torch.from_numpy(below)
    return Graph(*parts, torch.from_numpy(targets).long(), torch.ones(count, dtype=torch.bool))


def commonest(points: np.ndarray, label: np.ndarray | None) -> int:
    """The commonest value but 0 of a label map at points (N, 2); 0 where there is no other."""
    if label is None:
        return 0
    cells = points.round().astype(int).clip(0, np.array(label.shape) - 1)
    counts = np.bincount(label[tuple(cells.T)], minlength=len(NAMES))[: len(NAMES)]
    return int(counts[1:].argmax() + 1) if counts[1:].any() else 0


def root_of(label: np.ndarray) -> np.ndarray:
    """Where a tree is walked from: the uppermost pixel of a mask (H, W)."""
    return np.argwhere(label)[0]


@lru_cache(maxsize=2048)
def _graph_of(values: bytes, size: tuple[int, int]) -> Graph:
    label = np.frombuffer(values, np.uint8).reshape(size)
    mask = (label > 0) & (label != IGNORE)
    return graph(parsed(mask, root_of(mask) if mask.any() else None, FINER), size, label)


def graphs_of(labels: Tensor) -> Graph:
    """The graphs of label maps (B, H, W), padded; each is made once."""
    maps = labels.cpu().numpy().astype(np.uint8)
    return padded([_graph_of(label.tobytes(), label.shape) for label in maps])


def padded(graphs: list[Graph]) -> Graph:
    """Graphs as one, (B, most branches, ...)."""
    most = max(1, *(len(each.there) for each in graphs)) if graphs else 1
    found = []
    for each in graphs:
        more = most - len(each.there)
        found.append(
            Graph(
                F.pad(each.features, (0, 0, 0, more)),
                F.pad(each.steps, (0, more, 0, more), value=FARTHEST),
                F.pad(each.below, (0, more, 0, more)),
                F.pad(each.targets, (0, 0, 0, more), value=UNKNOWN),
                F.pad(each.there, (0, more)),
            )
        )
    return Graph(*(torch.stack(part) for part in zip(*found, strict=True)))


class Stage(nn.Module):
    """Branches (B, N, width) to the same: attention that knows `steps`, a small network, both residual, then normed."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.apart = heads, nn.Embedding(FARTHEST + 1, heads)
        self.enter, self.leave = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.grow, self.shrink = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor, steps: Tensor | None, seen: Tensor) -> Tensor:
        """steps (B, N, N), None: how far apart branches are is not known;   seen (B, N, N) bool: who sees whom."""
        query, key, value = self.enter(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / key.shape[-1] ** 0.5
        if steps is not None:
            scores = scores + self.apart(steps).permute(0, 3, 1, 2)
        weights = scores.masked_fill(~seen[:, None], -1e4).softmax(-1)
        x = self.norms[0](x + self.leave((weights @ value).transpose(1, 2).flatten(2)))
        return self.norms[1](x + self.shrink(F.gelu(self.grow(x))))


class SoftSubtree(nn.Module):
    """w of the module's docstring: branches (B, N, width) to (B, N, N), from 0 to 1."""

    def __init__(self, width: int):
        super().__init__()
        self.one, self.other, self.speaks = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, x: Tensor, below: Tensor | None) -> Tensor:
        alike = (self.one(x) @ self.other(x).transpose(1, 2) / x.shape[-1] ** 0.5).sigmoid()
        if below is None:
            return alike
        return torch.where(below, alike + (1 - alike) * self.speaks(x).sigmoid(), alike)


def averaged(logits: Tensor, weights: Tensor, seen: Tensor) -> Tensor:
    """Logits (B, N, classes), of each branch the mean of those that it sees (B, N, N), by weights (B, N, N)."""
    weights = weights * seen
    return weights @ logits / weights.sum(-1, keepdim=True).clamp_min(1e-6)


class Labeller(nn.Module):
    """A graph to logits of each stage, (B, N, classes), and the soft subtree of segments (B, N, N).

    sight  `tree`: all of the module's docstring; `all`: every branch sees every other, but not how they hang together,
           and no branch knows its generation; `itself`: each branch is named by itself, without generation, too
    """

    def __init__(self, sight: Sight = "tree", width: int = 64, heads: int = 4):
        super().__init__()
        self.sight, self.embed = sight, nn.Linear(FEATURES, width)
        self.join = nn.ModuleList(nn.Linear((k + 1) * width, width) for k in range(len(STAGES)))
        self.stages = nn.ModuleList(Stage(width, heads) for _ in STAGES)
        self.heads = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, count)) for count in STAGES)
        self.subtree = SoftSubtree(width)

    def forward(self, graph: Graph) -> tuple[list[Tensor], Tensor]:
        known, found = graph.features, []
        seen = graph.there[:, None, :] | torch.eye(graph.there.shape[1], dtype=torch.bool, device=known.device)
        if self.sight == "itself":
            seen = torch.eye(graph.there.shape[1], dtype=torch.bool, device=known.device).expand_as(seen)
        if self.sight != "tree":
            known = torch.cat([torch.zeros_like(known[..., :1]), known[..., 1:]], -1)
        steps, below = (graph.steps, graph.below) if self.sight == "tree" else (None, None)
        made = [self.embed(known)]
        for number, (join, stage, head) in enumerate(zip(self.join, self.stages, self.heads, strict=True)):
            made.append(stage(join(torch.cat(made, -1)), steps, seen))
            logits = head(made[-1])
            if number == 1:
                weights = self.subtree(made[-1], below)
            found.append(averaged(logits, weights, seen) if number else logits)
        return found, weights


def naming_loss(answer: tuple[list[Tensor], Tensor], graph: Graph) -> Tensor:
    """Cross-entropy of each stage, and of which pairs of branches are of one segment; 0 without branches that have
    names."""
    logits, weights = answer
    if not (graph.targets != UNKNOWN).any():
        return 0.0 * sum(each.sum() for each in logits)
    loss = sum(
        F.cross_entropy(each.float().flatten(0, 1), target.flatten(), ignore_index=UNKNOWN)
        for each, target in zip(logits, graph.targets.unbind(-1), strict=True)
    )
    segment = graph.targets[..., 1]
    pairs = (segment > 0)[:, :, None] & (segment > 0)[:, None, :]
    same = (segment[:, :, None] == segment[:, None, :]).float()
    if pairs.any():
        loss = loss + F.binary_cross_entropy(weights.float().clamp(1e-4, 1 - 1e-4)[pairs], same[pairs])
    return loss


def values_of(logits: list[Tensor]) -> np.ndarray:
    """(N,) label values from each stage's logits (N, classes): the finest stage that names a branch decides."""
    place, segment, subsegment = (each.argmax(-1).cpu().numpy() for each in logits)
    found = np.array(PLACE_VALUES)[place]
    found = np.where(segment > 0, np.array(SEGMENT_VALUES)[segment], found)
    return np.where(subsegment > 0, np.array(SUBSEGMENT_VALUES)[subsegment], found)
