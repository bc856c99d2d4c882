"""CT-SSG: the graph, its spectral convolution, and that a stack of slices is one sample."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.polynomial import chebyshev
from torch import nn

from medcook.data import Case
from medcook.methods import Batch, Moment
from medcook.networks.encoder import Encoder
from medcook.preparation import Preparation
from medcook.recipes.findings._stacks import Stacked, spread
from medcook.recipes.findings.spectral_graph_ct import (
    ARMS,
    BRAINS,
    HEARTS,
    METHOD,
    ChebyshevConvolution,
    SliceGraph,
    SpectralBlock,
    TripletEncoder,
    abnormality_rows,
    laplacian,
    recipe,
)
from medcook.training import Fitted

TINY = replace(METHOD, channels=(4, 8), dropout=0.0)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def net(edges: str = "near", **settings) -> SliceGraph:
    torch.manual_seed(0)
    given = {"inputs": 1, "outputs": 4, "channels": (4, 8), "dropout": 0.0} | settings
    return SliceGraph(**given, edges=edges)


def stack(slices: int = 5) -> Case:
    """Slice k is a disc of k + 1 times the brightness in noise, its label is k."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, slices, 20, 20)) + np.arange(1, slices + 1)[:, None, None] * 5
    label = np.broadcast_to(np.arange(slices)[:, None, None], (slices, 20, 20)).astype(np.uint8)
    return Case(image.astype(np.float32), label, "one", "one", attributes={"group": "HCM", "phase": "ES"})


@pytest.mark.component("structured graph of a volume")
class TestGraph:
    def test_edges_are_the_stronger_the_nearer_and_none_are_long(self):
        """By a loop over pairs."""
        weights = np.zeros((7, 7))
        for i in range(7):
            for j in range(7):
                if 0 < abs(i - j) <= 2:
                    weights[i, j] = 1 / (1 + abs(i - j))
        degree = np.diag(weights.sum(1) ** -0.5)
        np.testing.assert_allclose(laplacian(7, 2).numpy(), np.eye(7) - degree @ weights @ degree, atol=1e-6)

    @pytest.mark.parametrize("count", [2, 3, 10, 31])
    def test_eigenvalues_are_those_of_a_normalised_laplacian(self, count):
        values = np.linalg.eigvalsh(laplacian(count).double().numpy())
        assert values.min() == pytest.approx(0, abs=1e-5) and values.max() <= 2 + 1e-6
        scaled = np.linalg.eigvalsh(net().graph(count).double().numpy())
        np.testing.assert_allclose(scaled, values - 1, atol=1e-5)

    def test_one_node_alone_has_no_edges(self):
        assert torch.isfinite(laplacian(1)).all() and torch.isfinite(net()(normal(2, 1, 1, 16, 16))).all()

    def test_the_ablation_has_the_same_graph_with_its_nodes_in_another_order(self):
        near, shuffled = net().train(), net("shuffled").train()
        torch.manual_seed(5)
        drawn = [shuffled.graph(9) for _ in range(5)]
        assert len({tuple(graph.flatten().tolist()) for graph in drawn}) == 5
        for graph in drawn:
            values = [torch.linalg.eigvalsh(each) for each in (graph, near.graph(9))]
            torch.testing.assert_close(*values, atol=1e-5, rtol=1e-5)
            assert not torch.equal(graph, near.graph(9)) and (graph.diagonal() == near.graph(9).diagonal()).all()
        assert torch.equal(shuffled.eval().graph(9), shuffled.graph(9))
        assert not torch.equal(shuffled.graph(9), near.graph(9))

    def test_arms_differ_by_their_edges_alone(self):
        method, baseline, without = (ARMS[name] for name in [*recipe.compare, recipe.ablation[1]])
        assert replace(baseline, edges="near") == method == replace(without, edges="near")
        assert net("none").block is None
        one, other = (net(edges).state_dict() for edges in ("near", "shuffled"))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.component("slice triplets as nodes")
class TestNodes:
    def test_a_node_is_a_slice_with_its_two_neighbours_in_a_2d_encoder(self):
        """By the book's encoder in two dimensions, triplet by triplet, with the same weights."""
        torch.manual_seed(0)
        net, volume = TripletEncoder(1, (4, 8)).eval(), normal(2, 1, 5, 16, 24)
        flat = Encoder(inputs=3, channels=(4, 8)).eval()
        flat.load_state_dict({k: v.squeeze(2) if v.ndim == 5 else v for k, v in net.state_dict().items()})
        for node in range(5):
            triplet = [volume[:, 0, min(max(node + step, 0), 4)] for step in (-1, 0, 1)]
            torch.testing.assert_close(net(volume)[:, node], flat(torch.stack(triplet, 1)), atol=1e-5, rtol=1e-4)

    def test_nodes_know_where_they_are(self):
        graph = net().eval()
        nn.init.normal_(graph.places)
        volume = normal(1, 1, 1, 16, 16).expand(1, 1, 16, 16, 16)
        found = graph.nodes(volume) - graph.encoder(volume)
        torch.testing.assert_close(found[0], graph.places[0].T, atol=1e-5, rtol=1e-4)
        between = graph.nodes(volume[:, :, :31].repeat(1, 1, 2, 1, 1)[:, :, :31])
        middle = between[0, 1] - graph.encoder(volume)[0, 1]
        torch.testing.assert_close(middle, graph.places[0, :, :2].mean(1), atol=1e-5, rtol=1e-4)

    def test_a_case_is_one_volume_of_evenly_spread_slices(self):
        case = stack()
        preparation = Stacked((3, 16, 16))
        plain = Preparation((16, 16))
        assert spread(5, 3).tolist() == [0, 2, 4] and spread(2, 4).tolist() == [0, 0, 1, 1]
        assert torch.equal(preparation.images(case)[0, 0], plain.images(case)[[0, 2, 4], 0])
        assert preparation.labels(case)[0, :, 8, 8].tolist() == [0, 2, 4]

    def test_what_is_found_comes_back_on_the_cases_own_grid(self):
        case = stack()
        found = F.one_hot(torch.tensor([0, 1, 2]), 3).T.float()[None, :, :, None, None].expand(1, 3, 3, 20, 20)
        back = Stacked((3, 20, 20)).restore(found, case)
        assert back.shape == (3, 5, 20, 20) and back.argmax(0)[:, 10, 10].tolist() == [0, 0, 1, 2, 2]


@pytest.mark.component("spectral graph convolution")
class TestConvolution:
    @pytest.mark.parametrize("order", [1, 2, 3, 5])
    def test_it_is_the_polynomial_of_the_laplacian(self, order):
        """T_k of the eigenvalues, by numpy, between the eigenvectors of the Laplacian."""
        torch.manual_seed(0)
        convolution, x = ChebyshevConvolution(4, 6, order).double(), normal(2, 7, 4).double()
        normalised = laplacian(7).double()
        values, vectors = np.linalg.eigh(normalised.numpy())
        wanted = convolution.lines[0].bias.detach().numpy()
        for k, line in enumerate(convolution.lines):
            terms = vectors @ np.diag(chebyshev.chebval(values - 1, np.eye(order)[k])) @ vectors.T
            wanted = wanted + terms @ x.numpy() @ line.weight.detach().numpy().T
        found = convolution(x, normalised - torch.eye(7))
        np.testing.assert_allclose(found.detach().numpy(), wanted, atol=1e-6)

    def test_a_node_hears_of_others_so_many_edges_away_and_of_none_beyond(self):
        torch.manual_seed(0)
        convolution, x = ChebyshevConvolution(4, 4, 3), normal(1, 12, 4)
        scaled, other = laplacian(12, 2) - torch.eye(12), x.clone()
        other[0, 0] += 1
        moved = (convolution(x, scaled) - convolution(other, scaled)).abs().amax(2)[0] > 1e-6
        assert moved.tolist() == [True] * 5 + [False] * 7

    def test_a_block_adds_what_was_heard_and_then_what_was_thought(self):
        torch.manual_seed(0)
        block, x, scaled = SpectralBlock(8, 0.0), normal(2, 5, 8), net().graph(5)
        standard = lambda y: (y - y.mean(2, keepdim=True)) / (y.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()  # noqa: E731
        y = x + block.convolution(standard(x), scaled)
        torch.testing.assert_close(block(x, scaled), y + block.mlp(standard(y)), atol=1e-5, rtol=1e-4)

    def test_volumes_are_the_mean_over_nodes(self):
        graph, volume = net().eval(), normal(2, 1, 6, 16, 16)
        wanted = graph.head(graph.block(graph.nodes(volume), graph.graph(6)).mean(1))
        torch.testing.assert_close(graph(volume), wanted)
        plain = net("none").eval()
        torch.testing.assert_close(plain(volume), plain.head(plain.nodes(volume).mean(1)))

    def test_order_matters_to_the_graph_alone(self):
        """With nodes that do not know their place: the mean of the baseline is the same in any order."""
        for edges, same in (("near", False), ("none", True)):
            graph = net(edges).eval()
            x, turned = normal(1, 6, 8), torch.tensor([3, 0, 5, 1, 4, 2])
            ends = [
                graph.head((each if graph.block is None else graph.block(each, graph.graph(6))).mean(1))
                for each in (x, x[:, turned])
            ]
            assert torch.allclose(*ends, atol=1e-5) == same


@pytest.mark.component("multi-label head")
class TestMultiLabel:
    def test_each_abnormality_has_a_sigmoid_of_its_own(self):
        torch.manual_seed(0)
        nets, images = TINY.build(1, 5, 3).train(), normal(3, 1, 5, 16, 16)
        labels = torch.tensor([0, 2, 4]).view(3, 1, 1, 1).expand(3, 5, 16, 16).byte()
        chances = nets["model"](images).sigmoid()
        truth = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
        wanted = -(truth * chances.log() + (1 - truth) * (1 - chances).log()).mean()
        found = TINY.training_step(nets, Batch(images, labels), None, Moment(0, 10))
        assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
        torch.testing.assert_close(TINY.scores(nets.eval(), images), nets["average"](images).sigmoid())

    def test_probabilities_sum_to_one(self):
        found = TINY.predict(TINY.build(1, 5, 3).eval(), normal(2, 1, 5, 16, 20))
        assert found.shape == (2, 5, 5, 16, 20) and torch.allclose(found.sum(1), torch.ones(2, 5, 16, 20))

    def test_rows_are_of_frames_and_abnormalities(self):
        nets = TINY.build(1, 5, 3)
        task = replace(HEARTS)
        object.__setattr__(task, "preparation", Stacked((4, 16, 16)))
        fitted = Fitted(TINY, task, nets, {"last": nets.state_dict()}, {}, {"precision": "float32"})
        rows = abnormality_rows(fitted, stack())
        assert [(row["structure"], row["outcome"]) for row in rows] == [("MINF", 0), ("DCM", 0), ("HCM", 1), ("RV", 0)]
        scores = TINY.scores(nets.eval(), task.preparation.images(stack()))[0]
        assert [row["score"] for row in rows] == pytest.approx(scores.tolist()) and rows[0]["phase"] == "ES"

    def test_labels_are_the_patients(self):
        samples = BRAINS.samples("val")
        cases = list(BRAINS.cases("val"))
        assert samples.images.shape == (len(cases), 1, 8, 64, 64)
        wanted = [int(case.attributes["group"] == "atrophy") for case in cases]
        assert samples.labels[:, 0, 0, 0].tolist() == wanted and (samples.labels == samples.labels[:, :1, :1, :1]).all()


@pytest.mark.parametrize("edges", ["near", "shuffled", "none"])
@pytest.mark.parametrize("mixed", [False, True])
def test_every_weight_learns(edges, mixed):
    torch.manual_seed(0)
    method = replace(TINY, edges=edges)
    nets = method.build(1, 5, 3).train()
    labels = torch.tensor([0, 2, 4]).view(3, 1, 1, 1).expand(3, 5, 16, 16).byte()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        loss = method.training_step(nets, Batch(normal(3, 1, 5, 16, 16), labels), None, Moment(0, 10))
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert all(w.grad is not None and w.grad.isfinite().all() for w in nets["model"].parameters())


def test_slices_of_a_volume_are_changed_alike_within_their_plane():
    volume = normal(1, 1, 1, 16, 16).repeat(2, 1, 4, 1, 1)
    quiet = replace(METHOD, augmentation=replace(METHOD.augmentation, noise=0.0))
    given = Batch(volume, torch.ones(2, 4, 16, 16, dtype=torch.uint8))
    moved = quiet.augment(given, torch.Generator().manual_seed(0))
    assert moved.images.shape == volume.shape and torch.equal(moved.labels, given.labels)
    assert torch.allclose(moved.images[:, :, :1].expand_as(volume), moved.images, atol=1e-5)
    assert not torch.allclose(moved.images[0], moved.images[1]) and not torch.allclose(moved.images, volume)
