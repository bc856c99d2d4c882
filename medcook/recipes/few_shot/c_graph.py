"""C-Graph: images as graphs, matched node by node, across domains (Bo et al., arXiv 2512.21683, 2025).

What a structure looks like changes with the scanner; how its parts hang together does not. So cells of the feature map
are nodes, and their likeness is the strength of edges. Layers let nodes hear from their neighbours and from the
structure's nodes in the support; the answer comes from matching a query's nodes with both parts of the support's graph,
and from what their neighbours are matched with. A loss pulls apart nodes that are confused.

  edges   A_ij = softmax_j(t cos(x_i, x_j)) over the k most alike
  layer   x' = x + W relu(A x) + V relu(B x), B the edges to the support's nodes that show the structure
  match   s_c(i) = mean of the m largest cos(x_i, y), y the support's nodes of class c; then s <- (s + A s) / 2
  loss    sum_i h_i [-log sum_{j same} e^(t cos_ij) / sum_j e^(t cos_ij)] / sum_i h_i, h_i = 1 - p_i(true class)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.few_shot import FewShot, LocalPrototypes, PrototypeNetwork, Shots, novel_dice
from medcook.few_shot.baselines import SHARPNESS
from medcook.few_shot.method import shrink
from medcook.recipes.few_shot._settings import EPISODES, both, crossing
from medcook.recipes.recipe import Component, Recipe

STRIDE = 2
"""A node is a square of 2 x 2 cells of features: an image of 128 x 128 has 256 nodes."""


def edges(nodes: Tensor, others: Tensor, count: int, sharpness: float) -> Tensor:
    """(..., N, M) weights of sum 1: edges from nodes (..., N, D) to the `count` most alike of others (..., M, D)."""
    alike = F.normalize(nodes, dim=-1) @ F.normalize(others, dim=-1).transpose(-1, -2)
    least = alike.topk(min(count, alike.shape[-1]), dim=-1).values[..., -1:]
    return (sharpness * alike).masked_fill(alike < least, float("-inf")).softmax(-1)


class PriorLayer(nn.Module):
    """A structural prior graph layer: nodes (G, N, D) hear from neighbours, and from the structure's nodes (P, D).

    What they hear counts nothing at first: training begins with matching alone.
    """

    def __init__(self, width: int):
        super().__init__()
        self.own, self.prior = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.own.weight)
        nn.init.zeros_(self.prior.weight)

    def forward(self, nodes: Tensor, structure: Tensor, count: int, use_prior: bool) -> Tensor:
        heard = self.own(F.relu(edges(nodes, nodes, count, SHARPNESS) @ nodes))
        if use_prior and len(structure):
            heard = heard + self.prior(F.relu(edges(nodes, structure, count, SHARPNESS) @ structure))
        return nodes + heard


@dataclass
class CGraph(FewShot):
    """Graphs of support and query, layers that pass messages, matching of subgraphs, contrast of confused nodes.

    layers     of message passing; `neighbours` edges of a node; `matches` nodes that a match is the mean of
    prior      False: nodes hear from their own graph alone
    relations  False: a node is matched for itself, whatever its neighbours are
    contrast   weight of the node contrast; 0 takes it away
    """

    episodes: str = EPISODES
    layers: int = 2
    neighbours: int = 8
    matches: int = 3
    prior: bool = True
    relations: bool = True
    contrast: float = 0.2

    def parts(self, inputs: int) -> dict[str, nn.Module]:
        return super().parts(inputs) | {"layers": nn.ModuleList(PriorLayer(self.width) for _ in range(self.layers))}

    def logits(self, net: nn.ModuleDict, support: Shots, query: Shots) -> Tensor:
        graphs, inside = self.graphs(net, support, query)
        return self.matched(graphs, inside, query)

    def graphs(self, net: nn.ModuleDict, support: Shots, query: Shots) -> tuple[Tensor, Tensor]:
        """Nodes (S + Q, N, D) of all images after the layers, and which of the support's show structure (S, N) bool."""
        maps = F.avg_pool2d(torch.cat([support.maps, query.maps]), STRIDE)
        share = shrink(support.masks, maps.shape[2:]).flatten(1)
        inside = share > 0.5
        if not inside.any():
            inside = share == share.max()
        nodes = maps.flatten(2).transpose(1, 2)
        for layer in net["layers"]:
            nodes = layer(nodes, nodes[: len(inside)][inside], self.neighbours, self.prior)
        return nodes, inside

    def matched(self, graphs: Tensor, inside: Tensor, query: Shots) -> Tensor:
        """Logits (Q, 2, h, w) of query nodes by the support's two subgraphs, at the nodes' resolution."""
        theirs, mine = graphs[: len(inside)], graphs[len(inside) :]
        scores = torch.stack([match(mine, theirs[part], self.matches) for part in (~inside, inside)], dim=1)
        if self.relations:
            scores = (scores + scores @ edges(mine, mine, self.neighbours, SHARPNESS).transpose(1, 2)) / 2
        height, width = (side // STRIDE for side in query.maps.shape[2:])
        return SHARPNESS * scores.unflatten(2, (height, width))

    def episode_loss(self, net: nn.ModuleDict, support: Shots, query: Shots) -> Tensor:
        """The loss of the query, and the contrast of its nodes."""
        graphs, inside = self.graphs(net, support, query)
        logits = self.matched(graphs, inside, query).float()
        loss = self.query_loss(logits, query)
        if not self.contrast:
            return loss
        truth = shrink(query.masks, logits.shape[2:]).flatten(1) > 0.5
        right = logits.softmax(1).flatten(2).gather(1, truth[:, None].long())[:, 0]
        nodes = graphs[len(inside) :]
        return loss + self.contrast * node_contrast(nodes, truth, 1 - right.detach())


def match(nodes: Tensor, others: Tensor, count: int) -> Tensor:
    """(Q, N): mean cosine of nodes (Q, N, D) with the `count` most alike of a subgraph's nodes (M, D)."""
    alike = F.normalize(nodes, dim=-1) @ F.normalize(others, dim=-1).T
    return alike.topk(min(count, alike.shape[-1]), dim=-1).values.mean(-1)


def node_contrast(nodes: Tensor, truth: Tensor, confusion: Tensor, sharpness: float = 5.0) -> Tensor:
    """Supervised contrast among the nodes of each image, every node weighted by its confusion (Q, N).

    nodes (Q, N, D), truth (Q, N) bool; a node has all others of its image as company, and its class as positives.
    """
    unit = F.normalize(nodes, dim=-1)
    itself = torch.eye(nodes.shape[1], dtype=torch.bool, device=nodes.device)
    alike = (sharpness * unit @ unit.transpose(1, 2)).masked_fill(itself, float("-inf"))
    same = (truth[:, :, None] == truth[:, None]) & ~itself
    able = same.any(2)
    positive = alike.masked_fill(~same, float("-inf")).masked_fill(~able[..., None], 0.0).logsumexp(2)
    each = (alike.logsumexp(2) - positive) * able
    return (confusion * each).sum() / (confusion * able).sum().clamp_min(1e-5)


recipe = Recipe(
    paper="c-graph",
    title="Graphs of nodes, matched across domains",
    claim="Trained on hearts in MR, graph layers with subgraph matching and node contrast raise the Dice of lungs in "
    "chest X-rays against the support's prototypes alone, with one annotated patient.",
    arms=both(
        {
            "prototypes": PrototypeNetwork(episodes=EPISODES),
            "local prototypes": LocalPrototypes(),
            "c-graph": CGraph(),
            "without contrast": CGraph(contrast=0.0),
            "without prior": CGraph(prior=False),
        }
    ),
    compare=("c-graph", "prototypes"),
    ablation=("c-graph", "without contrast"),
    replicate="draw",
    scales=crossing("prototypes", "local prototypes", "c-graph", "without contrast"),
    metric="dice",
    score=novel_dice,
    components=(
        Component(
            "features as graphs", "implemented", "nodes are 2 x 2 cells of features, edges the 8 most alike nodes"
        ),
        Component(
            "structural prior graph layers",
            "implemented",
            "our reading of the abstract: messages within a graph, and from the structure's nodes in the support",
        ),
        Component(
            "subgraph matching decoding",
            "implemented",
            "our reading: the three best matches in either part of the support's graph, then those of the neighbours",
        ),
        Component(
            "confusion-minimizing node contrast",
            "implemented",
            "our reading: supervised contrast within the query, each node weighted by how wrong it was",
        ),
        Component(
            "accuracy on the source domain",
            "absent",
            "one claim a recipe; repri's and distillfss's tasks are within a domain",
        ),
    ),
)
