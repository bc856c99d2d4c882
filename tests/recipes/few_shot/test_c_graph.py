"""C-Graph: edges, layers, matching and contrast against loops that say the same."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax

from medcook.few_shot import Shots
from medcook.few_shot.baselines import SHARPNESS
from medcook.recipes.few_shot.c_graph import CGraph, PriorLayer, edges, match, node_contrast, recipe

SMALL = {"channels": (4, 4, 6, 6)}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shots(count: int, size: int = 32) -> Shots:
    masks = torch.zeros(count, size, size, dtype=torch.uint8)
    masks[..., size // 2 :] = 1
    maps = 0.7 * torch.randn(count, 6, size // 4, size // 4)
    maps[:, 0] += 2.0 * masks[:, ::4, ::4] - 1
    return Shots(torch.zeros(count, 1, size, size), maps, masks)


def heard(net: torch.nn.Module) -> torch.nn.Module:
    """Layers as if they had been trained: what nodes hear counts nothing at first."""
    for layer in net.modules():
        if isinstance(layer, PriorLayer):
            torch.nn.init.normal_(layer.own.weight)
            torch.nn.init.normal_(layer.prior.weight)
    return net


def cosines(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    a, b = a.detach().double().numpy(), b.detach().double().numpy()
    return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T


@pytest.mark.component("features as graphs")
class TestGraph:
    def test_edges_lead_to_the_most_alike(self):
        nodes, others = torch.randn(4, 5), torch.randn(7, 5)
        alike, found = cosines(nodes, others), edges(nodes, others, 3, 2.0).numpy()
        for row, weights in zip(alike, found, strict=True):
            best = np.argsort(row)[-3:]
            assert set(np.flatnonzero(weights)) == set(best)
            assert np.allclose(weights[best], softmax(2 * row[best]), atol=1e-5)

    def test_nodes_are_squares_of_cells(self):
        method = CGraph(**SMALL, layers=0)
        support, query = shots(1), shots(2)
        net = method.build(1, 3, 2)["model"]
        nodes, inside = method.graphs(net, support, query)
        assert nodes.shape == (3, 16, 6) and inside.shape == (1, 16) and inside.sum() == 8
        assert torch.allclose(nodes[1, 5], query.maps[0, :, 2:4, 2:4].mean((1, 2)), atol=1e-6)

    def test_a_small_structure_has_a_node(self):
        support = shots(1)
        support.masks.zero_()
        support.masks[0, 9, 9] = 1
        method = CGraph(**SMALL)
        _, inside = method.graphs(method.build(1, 3, 2)["model"], support, shots(1))
        assert inside.nonzero().tolist() == [[0, 5]]


@pytest.mark.component("structural prior graph layers")
class TestLayer:
    def test_a_node_hears_neighbours_and_structure(self):
        layer, nodes, structure = heard(PriorLayer(5)), torch.randn(1, 6, 5), torch.randn(3, 5)
        own = edges(nodes, nodes, 2, SHARPNESS) @ nodes
        theirs = edges(nodes, structure, 2, SHARPNESS) @ structure
        wanted = nodes + own.relu() @ layer.own.weight.T + theirs.relu() @ layer.prior.weight.T
        assert torch.allclose(layer(nodes, structure, 2, True), wanted, atol=1e-5)
        without = layer(nodes, structure, 2, False)
        assert torch.allclose(without, nodes + own.relu() @ layer.own.weight.T, atol=1e-5)

    def test_the_support_changes_the_querys_nodes_through_it(self):
        method, support, query = CGraph(**SMALL), shots(1), shots(1)
        net = heard(method.build(1, 3, 2)["model"])
        other = support._replace(masks=1 - support.masks)
        one, two = (method.graphs(net, each, query)[0][1] for each in (support, other))
        assert not torch.allclose(one, two, atol=1e-4)
        plain = CGraph(**SMALL, prior=False)
        one, two = (plain.graphs(net, each, query)[0][1] for each in (support, other))
        assert torch.equal(one, two)


@pytest.mark.component("subgraph matching decoding")
class TestMatching:
    def test_a_match_is_the_mean_of_the_best(self):
        nodes, others = torch.randn(1, 4, 5), torch.randn(6, 5)
        wanted = np.sort(cosines(nodes[0], others), axis=1)[:, -3:].mean(1)
        assert np.allclose(match(nodes, others, 3)[0].numpy(), wanted, atol=1e-5)

    def test_each_subgraph_speaks_for_its_class(self):
        method, support = CGraph(**SMALL, layers=0), shots(1)
        query = Shots(support.images.flip(3), support.maps.flip(3))
        inside = method.segment(method.build(1, 3, 2)["model"], support, query)
        assert inside[..., :10].mean() > 0.9 > 0.1 > inside[..., 22:].mean()

    def test_neighbours_have_a_say(self):
        method, support, query = CGraph(**SMALL, layers=0), shots(1), shots(1)
        net = method.build(1, 3, 2)["model"]
        alone = CGraph(**SMALL, layers=0, relations=False).logits(net, support, query).flatten(2)
        nodes = method.graphs(net, support, query)[0][1]
        weights = edges(nodes, nodes, 8, SHARPNESS)
        wanted = (alone[0].T + weights @ alone[0].T) / 2
        assert torch.allclose(method.logits(net, support, query).flatten(2)[0].T, wanted, atol=1e-4)


@pytest.mark.component("confusion-minimizing node contrast")
class TestContrast:
    def test_it_is_supervised_contrast_weighted_by_confusion(self):
        nodes, truth, confusion = torch.randn(1, 6, 4), torch.tensor([[1, 1, 0, 0, 0, 1]]).bool(), torch.rand(1, 6)
        alike, terms = 5 * cosines(nodes[0], nodes[0]), []
        for i in range(6):
            others = [j for j in range(6) if j != i]
            same = [j for j in others if truth[0, j] == truth[0, i]]
            terms.append(logsumexp(alike[i, others]) - logsumexp(alike[i, same]))
        wanted = np.average(terms, weights=confusion[0].numpy())
        assert node_contrast(nodes, truth, confusion).item() == pytest.approx(wanted, abs=1e-5)

    def test_a_node_that_is_not_confused_does_not_count(self):
        nodes, truth = torch.randn(1, 6, 4), torch.tensor([[1, 1, 0, 0, 0, 1]]).bool()
        confusion = torch.ones(1, 6)
        confusion[0, 0] = 0
        assert not torch.isclose(node_contrast(nodes, truth, confusion), node_contrast(nodes, truth, torch.ones(1, 6)))

    def test_a_lonely_node_is_left_out(self):
        nodes = torch.randn(1, 3, 4, requires_grad=True)
        loss = node_contrast(nodes, torch.tensor([[True, False, False]]), torch.ones(1, 3))
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(nodes.grad).all()

    def test_it_is_part_of_an_episode(self):
        support, query = shots(1), shots(2)
        net = CGraph(**SMALL).build(1, 3, 2)["model"]
        none, some, more = (CGraph(**SMALL, contrast=w).episode_loss(net, support, query).item() for w in (0, 0.2, 0.4))
        assert some > none and more - some == pytest.approx(some - none, abs=1e-5)

    def test_layers_learn(self):
        method = CGraph(**SMALL)
        net = method.build(1, 3, 2)["model"]
        method.episode_loss(net, shots(1), shots(2)).backward()
        assert all(p.grad.abs().max() > 0 for p in net["layers"].parameters())


def test_training_and_test_are_of_different_data():
    full = recipe.scales["full"].task
    assert full.source == "acdc" and full.dataset == "chest_xray"
