"""LVM-Med: the solver against SciPy and loops, affinities against loops, the estimated gradient against a formula."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.neighbors import kneighbors_graph
from torch import Tensor, nn

from medcook.data.transforms import NONE, Augment
from medcook.methods import Batch, Moment
from medcook.pretraining import encoded, info_nce
from medcook.recipes.pretraining._simclr import SimCLR
from medcook.recipes.pretraining.lvm_med import (
    LvmMed,
    MatchingLoss,
    MessagePassing,
    best_matching,
    edge_affinity,
    edges,
    gumbel,
    indicators,
    local_affinity,
    located,
    neighbours,
    recipe,
)

TINY = dict(channels=(4, 8, 8), width=6)


def images(count: int = 6, size: tuple[int, ...] = (24, 20)) -> Tensor:
    return torch.randn(count, 1, *size, generator=torch.Generator().manual_seed(count))


def built(method: LvmMed | SimCLR, dims: int = 2) -> nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(1, 3, dims).train()


def graph_loss(method: LvmMed, one: Tensor, two: Tensor) -> Tensor:
    """Of feature maps (N, D, P) whose places are the same in both views."""
    places = torch.arange(one.shape[2]).float().expand(len(one), 1, -1)
    return method.matching(built(method)["pretext"], one, two, places, places)


@pytest.mark.component("combinatorial graph matching")
class TestSolver:
    def test_without_edges_it_is_linear_assignment(self):
        vertices = torch.randn(5, 7, 7)
        found = best_matching(torch.diag_embed(vertices.flatten(1)))
        for mine, costs in zip(found, vertices, strict=True):
            rows, columns = linear_sum_assignment(costs.numpy(), maximize=True)
            assert mine.argmax(1).tolist() == columns.tolist() and rows.tolist() == list(range(7))
            assert (mine.sum(0) == 1).all() and (mine.sum(1) == 1).all()

    def test_with_edges_no_matching_is_better(self):
        affinity = torch.randn(3, 16, 16)
        for mine, costs in zip(best_matching(affinity), affinity, strict=True):
            scores = {}
            for partners in itertools.permutations(range(4)):
                pairs = [4 * i + a for i, a in enumerate(partners)]
                scores[partners] = sum(costs[p, q].item() for p in pairs for q in pairs)
            assert tuple(mine.argmax(1).tolist()) == max(scores, key=scores.get)

    def test_indicators_are_products(self):
        matched = best_matching(torch.randn(2, 9, 9))
        found = indicators(matched).view(2, 3, 3, 3, 3)
        for i, a, j, b in itertools.product(range(3), repeat=4):
            assert torch.equal(found[:, i, a, j, b], matched[:, i, a] * matched[:, j, b])

    @pytest.mark.parametrize("wrong", [0, 2, 3])
    def test_the_loss_is_the_hamming_distance(self, wrong):
        """An assignment with so many wrong partners differs in two entries for each."""
        order = [*torch.arange(wrong).roll(1).tolist(), *range(wrong, 5)]
        vertices = torch.eye(5)[order]
        loss = MatchingLoss.apply(vertices.flatten().diag(), torch.zeros(1, 25, 25), 80.0)
        assert loss.item() == 2 * wrong

    def test_equal_views_match(self):
        maps = torch.randn(5, 8, 6)
        method = LvmMed(**TINY, noise=0.0)
        assert graph_loss(method, maps, maps).item() == 0
        assert graph_loss(method, maps, maps.roll(1, 0)).item() == 10


@pytest.mark.component("structural constraints")
class TestEdges:
    def test_edge_affinity_compares_differences(self):
        one, two = torch.randn(3, 5), torch.randn(3, 5)
        found = edge_affinity(one, two).view(3, 3, 3, 3)
        for i, a, j, b in itertools.product(range(3), repeat=4):
            wanted = 0.0 if i == j or a == b else F.cosine_similarity(one[i] - one[j], two[a] - two[b], 0).item()
            assert found[i, a, j, b].item() == pytest.approx(wanted, abs=1e-5)

    def test_edges_join_neighbours(self):
        one, two = neighbours(torch.randn(4, 3), 2), neighbours(torch.randn(4, 3), 1)
        found = edges(one, two).view(4, 4, 4, 4)
        for i, a, j, b in itertools.product(range(4), repeat=4):
            assert found[i, a, j, b] == one[i, j] * two[a, b]

    def test_neighbours_are_scikits(self):
        vectors = torch.randn(7, 3)
        graph = kneighbors_graph(vectors.numpy(), 3).toarray()
        assert np.array_equal(neighbours(vectors, 3).numpy(), np.maximum(graph, graph.T))
        assert neighbours(vectors[:1], 3).tolist() == [[0]] and neighbours(vectors[:2], 3).sum() == 2

    def test_edges_find_what_vertices_cannot(self):
        """All vertices are alike; in the second view they are in another order and moved in the same direction."""
        one, order = torch.randn(6, 4), torch.tensor([2, 0, 5, 1, 3, 4])
        two = one[order] + torch.tensor([9.0, -5, 7, 3])
        joined = edges(neighbours(one, 2), neighbours(two, 2)) * edge_affinity(one, two)
        found = best_matching(joined[None])[0].argmax(1)
        assert order[found].tolist() == list(range(6))

    @pytest.mark.parametrize("second_order", [True, False])
    def test_the_solver_is_given_edges_by_the_method_and_not_by_the_ablation(self, second_order, monkeypatch):
        """What lies beside the diagonal: edges of both graphs, with affinity and noise, or nothing."""
        one, two, seen = torch.randn(5, 8, 6), torch.randn(5, 8, 6), []
        method = LvmMed(**TINY, second_order=second_order)
        project = built(method)["pretext"]["project"]
        monkeypatch.setattr(MatchingLoss, "apply", lambda *given: seen.append(given) or given[0].sum())
        graph_loss(method, one, two)
        (affinity, noise, push), outside = seen[0], ~torch.eye(25, dtype=torch.bool)
        count = [int(neighbours(project(maps.mean(2)), 2).sum()) for maps in (one, two)]
        expected = count[0] * count[1] if second_order else 0
        assert affinity[outside].count_nonzero() == expected and push == 80
        assert all(each[outside].count_nonzero() == expected for each in noise) and len(noise) == 8
        assert (noise[:, ~outside] != 0).all()


@pytest.mark.component("global and local similarity")
class TestVertices:
    def test_local_affinity_is_that_of_the_nearest_pairs(self):
        one, two, places, others = torch.randn(2, 7, 5), torch.randn(2, 6, 5), torch.rand(2, 7, 2), torch.rand(2, 6, 2)
        found = local_affinity(one, two, places, others, 4)
        for i, a in itertools.product(range(2), repeat=2):
            means = []
            for mine, theirs in ((places[i], others[a]), (one[i], two[a])):
                pairs = []
                for p in range(7):
                    apart = [(mine[p] - theirs[q]).norm().item() for q in range(6)]
                    q = int(np.argmin(apart))
                    pairs.append((min(apart), F.cosine_similarity(one[i, p], two[a, q], 0).item()))
                means.append(sum(alike for _, alike in sorted(pairs)[:4]) / 4)
            assert found[i, a].item() == pytest.approx(sum(means) / 2, abs=1e-4)

    def test_both_add_up(self, monkeypatch):
        """On the diagonal that the solver is given: alpha of the cosine, the rest both ways of the local affinity."""
        one, two = torch.randn(3, 8, 6), torch.randn(3, 8, 6)
        places = torch.arange(6).float().expand(3, 1, -1)
        method, seen = LvmMed(**TINY, passing=False, second_order=False, best=4), []
        parts = built(method)["pretext"]
        monkeypatch.setattr(MatchingLoss, "apply", lambda affinity, *_: seen.append(affinity) or affinity.sum())
        method.matching(parts, one, two, places, places)
        vectors = [F.normalize(parts["project"](maps.mean(2)), dim=1) for maps in (one, two)]
        maps, places = (one.mT, two.mT), places.mT
        local = local_affinity(*maps, places, places, 4) + local_affinity(*maps[::-1], places, places, 4).T
        wanted = 0.8 * vectors[0] @ vectors[1].T + 0.2 * local
        assert torch.allclose(seen[0].diagonal().view(3, 3), wanted, atol=1e-5)

    def test_a_view_knows_where_it_comes_from(self):
        """Rows and columns of the original as brightness."""
        method = LvmMed(augmentation=replace(NONE, rotate=30.0, scale=0.2, shift=0.1))
        lines = [(torch.arange(float(side)) + 0.5) * 2 / side - 1 for side in (20, 24)]
        image = torch.stack(torch.meshgrid(lines[1], lines[0], indexing="ij")[::-1])[None]  # x first, as in a grid
        view, places = method.placed_view(image)
        inside = (places.abs() < 0.9).all(1, keepdim=True).expand_as(places)
        assert inside.float().mean() > 0.5 and torch.allclose(view[inside], places[inside], atol=1e-4)
        assert torch.allclose(located(places, (6, 5))[0, :, 1, 2], places[0, :, 4:8, 8:12].mean((1, 2)), atol=1e-5)

    def test_two_views_differ(self):
        method = LvmMed(augmentation=Augment())
        assert not torch.equal(method.placed_view(images())[0], method.placed_view(images())[0])


@pytest.mark.component("gradient estimation through the solver")
class TestGradient:
    def test_a_large_push_leads_to_the_truth(self):
        affinity, noise = torch.randn(16, 16), torch.randn(3, 16, 16)
        affinity.requires_grad_()
        (2 * MatchingLoss.apply(affinity, noise, 200.0)).backward()
        found, truth = best_matching(affinity.detach() + noise), torch.eye(4)[None]
        wanted = 2 * (indicators(found) - indicators(truth)).mean(0) / 200
        assert torch.allclose(affinity.grad, wanted) and affinity.grad.abs().max() > 0

    def test_a_small_push_estimates_the_slope_of_the_expected_loss(self):
        """Of two vertices: the loss is 4 where two logistic variables do not exceed what speaks for the truth."""
        torch.manual_seed(0)
        vertices = torch.tensor([[0.7, 0.1], [0.4, 0.5]])
        affinity = vertices.flatten().diag().requires_grad_()
        noise = gumbel((100_000, 4), torch.device("cpu")).diag_embed()
        MatchingLoss.apply(affinity, noise, 0.05).backward()
        grown = math.exp(0.7 + 0.5 - 0.1 - 0.4 + 4 * 0.05 / 2)  # in the middle of the push
        density = grown * (grown * (math.log(grown) - 2) + math.log(grown) + 2) / (grown - 1) ** 3
        slope = affinity.grad.diagonal().tolist()
        assert slope == pytest.approx([-4 * density, 4 * density, 4 * density, -4 * density], rel=0.06)

    def test_noise_is_gumbels(self):
        noise = gumbel((50_000,), torch.device("cpu"))
        assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
        assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.05)

    def test_descent_pairs_each_image_with_itself(self):
        """Vectors of two views that have nothing in common learn to match, through the solver alone."""
        torch.manual_seed(0)
        one, two = nn.Parameter(torch.randn(5, 8, 4)), torch.randn(5, 8, 4)
        method, losses = LvmMed(channels=(4, 8, 8), width=16, noise=0.3), []
        parts = built(method)["pretext"]
        optimiser = torch.optim.Adam([one, *parts.parameters()], lr=0.05)
        places = torch.arange(4).float().expand(5, 1, -1)
        for _ in range(40):
            optimiser.zero_grad()
            losses.append(method.matching(parts, one, two, places, places))
            losses[-1].backward()
            optimiser.step()
        assert losses[0] > 6 and sum(losses[-5:]) / 5 < 1


@pytest.mark.component("message passing")
class TestMessagePassing:
    def test_it_is_two_graph_convolutions(self):
        vectors, net = torch.randn(6, 4), MessagePassing(4)
        graph = neighbours(vectors, 3)
        whole = (graph + torch.eye(6)).numpy()
        scale = np.diag(whole.sum(1) ** -0.5)
        spread = scale @ whole @ scale
        first, second = (layer.weight.detach().numpy().T for layer in (net.first, net.second))
        wanted = vectors.numpy() + spread @ np.maximum(spread @ vectors.numpy() @ first, 0) @ second
        assert np.allclose(net(vectors, graph).detach().numpy(), wanted, atol=1e-5)

    def test_a_vector_is_told_by_its_neighbours(self):
        vectors, net = torch.randn(6, 4, requires_grad=True), MessagePassing(4)
        graph = torch.zeros(6, 6)
        graph[0, 1] = graph[1, 2] = 1
        net(vectors, graph)[0].sum().backward()
        assert vectors.grad.abs().sum(1).gt(0).tolist() == [True, True, True, False, False, False]


class TestPretext:
    def step(self, method, x: Tensor, nets: nn.ModuleDict) -> Tensor:
        torch.manual_seed(2)
        return method.pretext(nets, Batch(x, None), Moment(0, 10))

    @pytest.mark.parametrize("count", [2, 6, 9])
    def test_the_encoder_and_all_of_its_parts_learn(self, count):
        method = LvmMed(**TINY)
        nets = built(method)
        self.step(method, images(count), nets).backward()
        learning = [*nets["model"].down.parameters(), *nets["pretext"].parameters()]
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in learning)

    def test_a_large_batch_makes_several_graphs(self, monkeypatch):
        method, seen = LvmMed(**TINY, nodes=4), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                LvmMed, "matching", lambda _, parts, *maps: seen.append(maps) or maps[0].mean() * 0 + len(seen)
            )
            loss = self.step(method, images(9), built(method))
        assert [len(maps[0]) for maps in seen] == [3, 3, 3] and loss.item() == 2
        assert seen[0][0].shape == (3, 8, 30) and seen[0][2].shape == (3, 2, 30)

    def test_volumes_too(self):
        method = LvmMed(**TINY)
        assert torch.isfinite(self.step(method, images(3, (8, 12, 8)), built(method, 3)))

    @pytest.mark.parametrize("method", [LvmMed(**TINY), SimCLR(**TINY)])
    def test_bfloat16_works(self, method):
        nets = built(method)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = self.step(method, images(), nets)
        loss.backward()
        assert loss.dtype == torch.float32 and torch.isfinite(loss)

    def test_without_noise_it_has_one_answer(self):
        method = LvmMed(**TINY, noise=0.0)
        one, two = torch.randn(5, 8, 6), torch.randn(5, 8, 6)
        assert graph_loss(method, one, two) == graph_loss(method, one, two)

    def test_the_ablation_differs_in_one_setting(self):
        arms = {name: arm.method.settings() for name, arm in recipe.arms.items()}
        one, other = arms["lvm-med"], arms["without second order"]
        assert {key for key in one if one[key] != other[key]} == {"second_order"}
        assert len({arms[name]["share"] for name in ("lvm-med", "simclr")}) == 1


@pytest.mark.component("comparison with other self-supervised methods")
def test_simclr_compares_two_views():
    method = SimCLR(**TINY)
    nets, x = built(method), images()
    torch.manual_seed(3)
    loss = method.pretext(nets, Batch(x, None), Moment(0, 10))
    torch.manual_seed(3)
    views = torch.cat([method.view(x), method.view(x)])
    vectors = nets["pretext"](encoded(nets["model"], views).mean((2, 3)))
    assert loss.item() == pytest.approx(info_nce(vectors[:6], vectors[6:]).item(), rel=1e-5)
