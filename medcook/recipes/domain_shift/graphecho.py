"""GraphEcho (Yang, Ding, Zheng, Xu and Li, ICCV 2023, arXiv 2309.11145).

Idea: hearts look different in another centre, but have the same parts and beat alike. Pixels of each structure become
nodes of a graph in either centre, and the two graphs are matched. A recursive graph follows the frames of a beat, whose
description must not depend on the moment at which a clip begins, nor on the centre. X_s, X_t are the nodes, with labels
in the source and pseudo-labels in the target; E_s, E_t the attention among them; P comes of their affinity by Sinkhorn:

    nodes      CE(classifier(X_s, X_t), their classes)
    matching   mean over source nodes of FL(max of P over the same class, 1) + sum over other classes FL(P, 0)
               + |E_s P - P E_t|                                          FL is the focal loss (Lin et al., ICCV 2017)
    beat       -log exp(z z'/T) / sum over other clips exp(z z''/T),  z and z' of one video, begun at two moments
    loss       L(source) + nodes + matching + beat + (the target's answers, nodes, beats pass for the source's)

The weights were chosen on simulated brains. On fold 4, which is not scored, three arms were looked at once, for 200
steps and with pseudo-labels above 0.9: source only 0.24, adversarial 0.47, graphecho 0.48.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.data.transforms import warp
from medcook.domains import DomainTask
from medcook.methods import Batch
from medcook.methods.semi_supervised import forgetful
from medcook.recipes.domain_shift._output_space import Adversarial, NodeJudge, encoded
from medcook.recipes.domain_shift._settings import BASELINE, scales
from medcook.recipes.imperfect_labels._adversarial import played
from medcook.recipes.recipe import Arm, Component, Recipe


def sampled(maps: Tensor, labels: Tensor, classes: int, count: int) -> tuple[Tensor, Tensor]:
    """At most `count` random pixels of every class as nodes: values (n, C) of maps (B, C, H, W), and classes (n,)."""
    labels = F.interpolate(labels[:, None].float(), maps.shape[2:], mode="nearest")[:, 0].flatten()
    of_class = [(labels == value).nonzero().flatten() for value in range(classes)]
    places = [pixels[torch.randperm(len(pixels))[:count].to(pixels.device)] for pixels in of_class]
    kinds = torch.cat([torch.full_like(chosen, value) for value, chosen in enumerate(places)])
    return maps.movedim(1, -1).flatten(0, 2)[torch.cat(places)], kinds


def sinkhorn(scores: Tensor, turns: int = 20) -> Tensor:
    """A soft matching (n, m) of scores (n, m): rows and columns sum to at most 1, a slack takes what fits nowhere."""
    logs = F.pad(scores, (0, 1, 0, 1))
    for _ in range(turns):
        logs = torch.cat([logs[:-1] - logs[:-1].logsumexp(1, keepdim=True), logs[-1:]])
        logs = torch.cat([logs[:, :-1] - logs[:, :-1].logsumexp(0, keepdim=True), logs[:, -1:]], dim=1)
    return logs[:-1, :-1].exp()


def focal(probability: Tensor, of: bool, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of probabilities (...) of what is true (`of`) or is not."""
    p, weight = (probability, alpha) if of else (1 - probability, 1 - alpha)
    return -weight * (1 - p).pow(gamma) * p.clamp_min(1e-6).log()


def matching_loss(plan: Tensor, same: Tensor) -> Tensor:
    """Of a soft matching (n, m) and whether nodes are of the same class (n, m) bool: one partner each, of its class."""
    right = focal(plan.masked_fill(~same, 0).amax(1), True).mean()
    return right + focal(plan[~same], False).sum() / len(plan)


class Attention(nn.Module):
    """One head: nodes (n, width) look at others (m, width); new nodes, and edges (n, m), whose rows sum to 1."""

    def __init__(self, width: int):
        super().__init__()
        self.look, self.norm = nn.MultiheadAttention(width, 1, batch_first=True), nn.LayerNorm(width)

    def forward(self, nodes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        seen, edges = self.look(nodes[None], others[None], others[None])
        return self.norm(nodes + seen[0]), edges[0]


class GraphMatching(nn.Module):
    """Graphs of the source's and the target's nodes, whose classes and partners are to be found.

    inputs  channels of the levels that nodes come from
    """

    def __init__(self, inputs: list[int], classes: int, width: int):
        super().__init__()
        self.ways_in = nn.ModuleList(nn.Linear(channels, width) for channels in inputs)
        norm = lambda: nn.LayerNorm(width, elementwise_affine=False)  # noqa: E731
        self.embed = nn.Sequential(nn.Linear(width, width), norm(), nn.ReLU(), nn.Linear(width, width), norm())
        self.within, self.across = Attention(width), Attention(width)
        self.classify = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, classes))
        self.of_source, self.of_target = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.fits = nn.Linear(2 * width, 1, bias=False)
        self.classes = classes

    def nodes(self, maps: list[Tensor], labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Nodes (n, width) of a centre, from maps (B, C, h, w) of every level and labels (B, H, W); classes (n,)."""
        found = [sampled(level, labels, self.classes, count) for level in maps]
        nodes = [way(level[0]) for way, level in zip(self.ways_in, found, strict=True)]
        return torch.cat(nodes), torch.cat([level[1] for level in found])

    def affinity(self, source: Tensor, target: Tensor) -> Tensor:
        """(n, m) of every pair of nodes: a layer of both together, and a number; zero mean and unit variance."""
        scores = self.fits((self.of_source(source)[:, None] + self.of_target(target)[None]).relu())[..., 0]
        return (scores - scores.mean()) / (scores.var(unbiased=False) + 1e-5).sqrt()

    def forward(self, source: Tensor, source_kinds: Tensor, target: Tensor, target_kinds: Tensor):
        """Losses of classes and of partners, of nodes (n, width) and (m, width) with classes (n,) and (m,)."""
        source, target = self.embed(source), self.embed(target)
        (source, source_edges), (target, target_edges) = self.within(source, source), self.within(target, target)
        source, target = self.across(source, target)[0], self.across(target, source)[0]
        nodes = F.cross_entropy(self.classify(torch.cat([source, target])), torch.cat([source_kinds, target_kinds]))
        plan = sinkhorn(self.affinity(source, target))
        structure = (source_edges.detach() @ plan - plan @ target_edges.detach()).abs().mean()
        return nodes, matching_loss(plan, source_kinds[:, None] == target_kinds[None]) + structure


def pseudo_labels(logits: Tensor, sure: float) -> Tensor:
    """(B, H, W) uint8 of logits (B, classes, H, W); `IGNORE` where no class has a probability above `sure`."""
    peak, found = logits.detach().float().softmax(1).max(1)
    return torch.where(peak > sure, found, IGNORE).to(torch.uint8)


def beating(images: Tensor, phases: Tensor, strength: float) -> Tensor:
    """Frames (B, T, C, H, W) of a heart that contracts around the middle of images (B, C, H, W) and relaxes again.

    phases (B, T): 0 and 1 are the image itself, at 1/2 it is smallest: what is at the radius r (half images) comes from
    r (1 + strength exp(-4 r^2)); to stay invertible, strength is at most 2.
    """
    count, size = phases.shape[1], images.shape[2:]
    theta = torch.eye(2, 3, device=images.device).expand(len(images) * count, 2, 3)
    grid = F.affine_grid(theta, [len(theta), 1, *size], align_corners=False)
    moment = (1 - torch.cos(2 * math.pi * phases)).flatten().view(-1, 1, 1, 1) / 2
    grid = grid * (1 + strength * moment * torch.exp(-4 * grid.square().sum(-1, keepdim=True)))
    return warp(images.float().repeat_interleave(count, 0), None, grid)[0].unflatten(0, (-1, count))


class RecursiveGraph(nn.Module):
    """Frame after frame, the nodes of a grid join the nearest of the graph before, and become the next graph."""

    def __init__(self, inputs: int, width: int, frames: int, side: int = 8, neighbours: int = 9):
        super().__init__()
        self.way_in = nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width))
        self.place = nn.Parameter(torch.randn(frames, side * side, width) * 0.02)
        self.join = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width))
        self.describe = nn.Linear(width, width)
        self.side, self.neighbours = side, neighbours

    def step(self, nodes: Tensor, before: Tensor) -> Tensor:
        """The next graph (B, N, width) of a frame's nodes and the graph before: each node is joined by the largest
        differences to its nearest neighbours there, channel by channel."""
        distance = torch.cdist(F.normalize(nodes.detach(), dim=-1), F.normalize(before.detach(), dim=-1))
        near = distance.topk(min(self.neighbours, before.shape[1]), largest=False).indices
        found = before.gather(1, near.flatten(1)[..., None].expand(-1, -1, before.shape[2])).unflatten(
            1, near.shape[1:]
        )
        return self.join(torch.cat([nodes, (found - nodes[:, :, None]).amax(2)], dim=-1))

    def forward(self, frames: Tensor) -> Tensor:
        """Maps (B, T, inputs, side, side) to the last graph (B, side * side, width)."""
        nodes = self.way_in(frames.flatten(3).transpose(2, 3)) + self.place
        graph = torch.zeros_like(nodes[:, 0])
        for frame in nodes.unbind(1):
            graph = self.step(frame, graph)
        return graph


def same_beat(one: Tensor, other: Tensor, temperature: float = 0.1) -> Tensor:
    """Contrast of descriptions (V, width): two clips of a video are to be told from all clips of other videos."""
    z = F.normalize(torch.cat([one, other]), dim=1)
    alike = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    return F.cross_entropy(alike, torch.arange(len(z), device=z.device).roll(len(one)))


@dataclass
class GraphEcho(Adversarial):
    """Graphs of nodes matched across centres, and a recursive graph of the heartbeat.

    nodes, matching   weights of the classes of nodes and of their partners; both 0: no graph matching
    beat              weight of the heartbeat's contrast; 0: no frames
    passing           weight of passing for the source's, of nodes and of beats
    sure              a pseudo-label needs a probability above this
    count             nodes of a class, a level and a centre, at most
    levels            how many levels of the decoder they come from, below the finest
    videos, frames    of a centre in a step, and of a clip, which shows one whole beat
    strength          of the contraction
    """

    nodes: float = 0.2
    matching: float = 0.1
    beat: float = 0.1
    passing: float = 0.01
    sure: float = 0.5
    count: int = 12
    levels: int = 2
    videos: int = 2
    frames: int = 3
    strength: float = 0.4
    width: int = 48

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """Also `matcher` and `beats`, each with its judge, where they are wanted."""
        nets = super().build(inputs, classes, dims)
        if self.nodes or self.matching:
            channels = self.channels[self.levels : 0 : -1]
            nets["matcher"] = GraphMatching(channels, classes, self.width)
            nets["node judge"] = NodeJudge(self.width)
        if self.beat:
            nets["beats"] = RecursiveGraph(sum(self.channels[-3:]), self.width, self.frames)
            nets["beat judge"] = NodeJudge(self.width)
        return nets

    def adapt(self, nets: nn.ModuleDict, source: Batch, target: Batch, logits: Tensor, maps: list) -> Tensor:
        loss = logits.new_zeros(())
        if self.nodes or self.matching:
            maps = [[level.float() for level in centre[-1 - self.levels : -1]] for centre in maps]
            with torch.autocast(logits.device.type, enabled=False):
                loss = loss + self.matched(nets, source.labels, pseudo_labels(logits, self.sure), maps)
        if self.beat:
            loss = loss + self.beaten(nets, source.images[: self.videos], target.images[: self.videos])
        return loss

    def matched(self, nets: nn.ModuleDict, labels: Tensor, pseudo: Tensor, maps: list[list[Tensor]]) -> Tensor:
        """Loss of the graphs of source labels and target pseudo-labels (B, H, W) with maps of either centre."""
        matcher = nets["matcher"]
        source, kinds = matcher.nodes(maps[0], labels, self.count)
        target, others = matcher.nodes(maps[1], pseudo, self.count)
        here, there = torch.isin(kinds, others), torch.isin(others, kinds)
        if not here.any():
            return source.new_zeros(())
        source, kinds, target, others = source[here], kinds[here], target[there], others[there]
        judged, fooled = played(nets["node judge"], source.detach(), target)
        told, partners = matcher(source, kinds, target, others)
        return self.nodes * told + self.matching * partners + judged + self.passing * fooled

    def beaten(self, nets: nn.ModuleDict, source: Tensor, target: Tensor) -> Tensor:
        """Loss of the heartbeat of images (V, C, H, W) of either centre: two clips of each, begun at two moments."""
        still = torch.cat([source, target])
        began = torch.rand(len(still), 2, 1, device=still.device)
        phases = (began + torch.arange(self.frames, device=still.device) / self.frames).flatten(1)
        frames = beating(still, phases, self.strength).flatten(0, 1)
        with forgetful(nets["model"]):
            deep = encoded(nets["model"], frames)[-3:]
        with torch.autocast(still.device.type, enabled=False):
            seen = torch.cat([F.adaptive_avg_pool2d(level.float(), nets["beats"].side) for level in deep], dim=1)
            graphs = nets["beats"](seen.unflatten(0, (-1, self.frames)))
            one, other = nets["beats"].describe(graphs.mean(1)).unflatten(0, (-1, 2)).unbind(1)
            here, there = graphs.split([2 * len(source), 2 * len(target)])
            judged, fooled = played(nets["beat judge"], here.detach().flatten(0, 1), there.flatten(0, 1))
        return self.beat * same_beat(one, other) + judged + self.passing * fooled


recipe = Recipe(
    paper="graphecho",
    title="GraphEcho: class graphs matched across centres, and the cycle of the heartbeat",
    claim="Where the target has no labels, matched graphs and the heartbeat raise Dice above adversarial adaptation.",
    arms={
        "source only": Arm(BASELINE),
        "adversarial": Arm(Adversarial()),
        "graphecho": Arm(GraphEcho()),
        "without matching": Arm(GraphEcho(nodes=0.0, matching=0.0)),
        "without beat": Arm(GraphEcho(beat=0.0)),
    },
    compare=("graphecho", "adversarial"),
    ablation=("graphecho", "without matching"),
    replicate="fold",
    scales=scales(
        DomainTask("embedded", look="washed out"),
        DomainTask("acdc", look="washed out"),
        "source only",
        "adversarial",
        "graphecho",
        "without matching",
    ),
    source="arXiv 2309.11145; code: github.com/xmed-lab/GraphEcho",
    published={"site G to site R, no adaptation, Dice": 0.485, "site R, all labels, Dice": 0.813},
    components=(
        Component(
            "spatial-wise cross-domain graph matching",
            "implemented",
            "after the authors' code, which follows SIGMA (Li et al., CVPR 2022). Ours: nodes of 48 channels from two "
            "levels of the decoder, 12 a class and level, sampled in masks (their code: in boxes around them); both "
            "parts of the matching are means over the source's nodes; a class that one centre lacks takes no part, in "
            "place of nodes made up from a memory. As nothing is pre-trained it begins after 40% of the steps, and the "
            "nodes' classes weigh 0.2 (theirs 1): on simulated brains, an early start at full weight kept wrong "
            "pseudo-labels",
        ),
        Component(
            "recursive graph over the frames",
            "implemented",
            "as the authors' code: 8 x 8 nodes a frame, 9 nearest in the graph before, largest difference by channel. "
            "Nodes are of the three deepest maps of the encoder; their attention to the spatial nodes is left out",
        ),
        Component(
            "temporal cycle consistency",
            "simplified",
            "there are no videos: each image is made to beat by a smooth contraction around the middle of the window, "
            "three frames a beat. So the contrast of clips is the paper's, and the motion is not: it is the same in "
            "every heart and shows nothing that a still image does not. Clips are compared within a step, of two "
            "videos of either centre, and not with a memory of all; as in their code no labels of frames are learnt",
        ),
        Component(
            "adversarial alignment of answers, nodes and beats",
            "simplified",
            "global alignment is at the output, as the comparator's, so that the comparison is about graphs; theirs is "
            "at all levels of the features. Judges have constant weights for whoever is to pass, without reversal",
        ),
        Component(
            "normalisation by centre",
            "implemented",
            "each centre's batch for itself, as in their network; ours predicts with the target's statistics, in all "
            "adapting arms alike. One normalisation of both let predictions vanish, on simulated brains",
        ),
        Component("CardiacUDA, CAMUS, EchoNet", "absent", "not at hand: hearts in MR, and a simulated second scanner"),
    ),
)
