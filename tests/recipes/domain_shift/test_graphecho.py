"""GraphEcho: nodes of every class, a soft matching, a graph that follows frames, and beats that know no beginning."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.data.transforms import NONE
from medcook.losses import cross_entropy_and_dice
from medcook.methods import Batch, Moment
from medcook.networks import UNet
from medcook.recipes.domain_shift._output_space import Adversarial, encoded, pyramid
from medcook.recipes.domain_shift.graphecho import (
    Attention,
    GraphEcho,
    GraphMatching,
    RecursiveGraph,
    beating,
    focal,
    matching_loss,
    pseudo_labels,
    recipe,
    same_beat,
    sampled,
    sinkhorn,
)

TINY = dict(channels=(4, 6, 8, 8), width=8, count=4, sure=0.3)
BEFORE, AFTER = Moment(0, 10), Moment(9, 10)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def batches(size: tuple[int, int] = (40, 32)) -> tuple[Batch, Batch]:
    """Source images with labels in blocks, and target images without."""
    rng = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 3, (2, 3, 4), generator=rng).float()
    truth = F.interpolate(truth[:, None], size, mode="nearest")
    images = truth + 0.3 * torch.randn(2, 1, *size, generator=rng)
    nothing = torch.full((2, *size), IGNORE, dtype=torch.uint8)
    return Batch(images, truth[:, 0].byte()), Batch(0.5 * images.flip(0) + 0.2, nothing)


def both_maps() -> list[list[Tensor]]:
    """Maps of two levels, of two images in either centre."""
    return [[torch.randn(2, 8, 10, 8).requires_grad_(), torch.randn(2, 6, 20, 16).requires_grad_()] for _ in range(2)]


def built(method: Adversarial) -> nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(1, 3, 2).train()


def step(method: Adversarial, nets: nn.ModuleDict, now: Moment = AFTER, given: tuple | None = None) -> Tensor:
    torch.manual_seed(1)
    return method.training_step(nets, *(given or batches()), now)


@pytest.mark.component("spatial-wise cross-domain graph matching")
class TestMatching:
    def test_nodes_are_pixels_of_every_class(self):
        labels = torch.randint(0, 3, (2, 6, 5)).byte()
        labels[0, 0] = IGNORE
        maps = torch.stack([torch.arange(60).view(2, 6, 5), labels.long()], dim=1).float()
        nodes, kinds = sampled(maps, labels, 3, 4)
        assert kinds.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert torch.equal(nodes[:, 1].long(), kinds) and len(nodes[:, 0].unique()) == 12
        nodes, kinds = sampled(maps, labels, 3, 99)
        assert len(nodes) == (labels != IGNORE).sum()

    def test_coarse_maps_have_the_labels_of_their_places(self):
        labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
        labels[:, :, 4:] = 1
        nodes, kinds = sampled(torch.arange(16.0).view(1, 1, 4, 4), labels, 2, 99)
        assert torch.equal((nodes[:, 0] % 4 >= 2).long(), kinds)

    def test_sinkhorn_against_loops(self):
        scores = torch.randn(5, 7).double()
        plan = np.ones((6, 8))
        plan[:5, :7] = np.exp(scores.numpy())
        for _ in range(20):
            plan[:5] /= plan[:5].sum(1, keepdims=True)
            plan[:, :7] /= plan[:, :7].sum(0, keepdims=True)
        found = sinkhorn(scores)
        assert np.allclose(found, plan[:5, :7], atol=1e-9)
        assert found.sum(0).max() <= 1 and found.sum(1).max() < 1.01

    def test_sinkhorn_finds_the_partners(self):
        order = torch.randperm(6)
        assert torch.equal(sinkhorn(20 * torch.eye(6)[order]).argmax(1), order)

    def test_focal_loss(self):
        p = torch.tensor([0.1, 0.5, 0.9])
        assert torch.allclose(focal(p, True), -0.25 * (1 - p) ** 2 * p.log())
        assert torch.allclose(focal(p, False), -0.75 * p**2 * (1 - p).log(), atol=1e-6)
        assert torch.isfinite(focal(torch.tensor([0.0, 1.0]), True)).all()

    def test_one_partner_of_the_class_and_none_of_another(self):
        same = torch.tensor([[1, 1, 0], [0, 0, 1]]).bool()
        good = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        assert matching_loss(good, same) < 1e-5
        assert matching_loss(good[:, [0, 2, 1]], same) > 1
        plan = torch.tensor([[0.2, 0.6, 0.2], [0.1, 0.3, 0.5]])
        wanted = (focal(plan[0, 1], True) + focal(plan[1, 2], True)) / 2
        wrong = focal(plan[0, 2], False) + focal(plan[1, 0], False) + focal(plan[1, 1], False)
        assert torch.allclose(matching_loss(plan, same), wanted + wrong / 2)

    def test_affinity_is_a_layer_of_every_pair(self):
        matcher = GraphMatching([4], 3, 8)
        source, target = torch.randn(5, 8), torch.randn(3, 8)
        weight = torch.cat([matcher.of_source.weight, matcher.of_target.weight], dim=1)
        bias = matcher.of_source.bias + matcher.of_target.bias
        pairs = [[F.linear(torch.cat([s, t]), weight, bias).relu() for t in target] for s in source]
        scores = torch.stack([torch.stack([matcher.fits(pair)[0] for pair in row]) for row in pairs])
        expected = F.instance_norm(scores[None, None])[0, 0]
        assert torch.allclose(matcher.affinity(source, target), expected, atol=1e-5)

    def test_attention_looks_at_the_others_and_keeps_itself(self):
        attention = Attention(8)
        nodes, others = torch.randn(3, 8), torch.randn(5, 8)
        found, edges = attention(nodes, others)
        assert (
            found.shape == (3, 8) and torch.allclose(edges.sum(1), torch.ones(3), atol=1e-5) and edges.shape == (3, 5)
        )
        assert torch.allclose(attention(nodes, others.flip(0))[0], found, atol=1e-5), "a graph has no order"
        assert not torch.allclose(attention(nodes, others + 1)[0], found, atol=1e-3)
        nn.init.zeros_(attention.look.out_proj.weight)
        assert torch.allclose(attention(nodes, others)[0], F.layer_norm(nodes, (8,)), atol=1e-5)

    def test_both_losses_fall_where_graphs_are_learnt(self):
        torch.manual_seed(0)
        matcher, kinds = GraphMatching([4], 3, 16), torch.arange(3).repeat_interleave(6)
        values = torch.randn(3, 16)
        optimiser, history = torch.optim.Adam(matcher.parameters(), 3e-3), []
        for _ in range(40):
            source, target = (values[kinds] + 0.3 * torch.randn(18, 16) for _ in range(2))
            losses = matcher(source, kinds, target, kinds)
            optimiser.zero_grad()
            sum(losses).backward()
            optimiser.step()
            history.append([loss.item() for loss in losses])
        (nodes, partners), (nodes_after, partners_after) = history[0], history[-1]
        assert nodes_after < 0.2 * nodes and partners_after < 0.7 * partners

    def test_pseudo_labels_are_those_it_is_sure_of(self):
        logits = torch.tensor([[4.0, 0, 0], [0.5, 0.4, 0.3], [0, 0, 3]]).T.reshape(1, 3, 1, 3)
        assert pseudo_labels(logits, 0.5).flatten().tolist() == [0, IGNORE, 2]

    def test_only_classes_of_both_centres_take_part(self):
        method = GraphEcho(**TINY)
        nets, (source, _) = built(method), batches()
        _, maps = pyramid(nets["model"], source.images)
        seen, matcher = [], nets["matcher"]
        matcher.forward = lambda *graph: seen.append(graph) or (maps[0].sum(),) * 2
        pseudo = torch.where(source.labels == 1, IGNORE, source.labels)
        method.matched(nets, source.labels, pseudo, [maps[:2]] * 2)
        _, kinds, _, others = seen[0]
        assert set(kinds.tolist()) == set(others.tolist()) == {0, 2}
        assert method.matched(nets, source.labels, torch.full_like(pseudo, IGNORE), [maps[:2]] * 2) == 0

    def test_features_of_both_centres_learn_from_it(self):
        method = GraphEcho(**TINY, beat=0.0)
        nets, (source, _) = built(method), batches()
        maps = both_maps()
        method.matched(nets, source.labels, source.labels, maps).backward()
        assert all((level.grad.abs() > 0).any() for centre in maps for level in centre)

    def test_pyramid_is_the_networks_own_decoder(self):
        model = UNet(classes=3, channels=(4, 6, 8, 8))
        images = torch.randn(2, 1, 40, 32)
        logits, maps = pyramid(model, images)
        assert [tuple(level.shape[1:]) for level in maps] == [(8, 10, 8), (6, 20, 16), (4, 40, 32)]
        assert torch.equal(model.head(maps[-1]), logits)
        assert not any(block._forward_hooks for block in model.up)


class TestFrames:
    def test_a_beat_returns_and_is_smallest_in_its_middle(self):
        y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
        disc = ((x.square() + y.square()).sqrt() < 0.5).float()[None, None]
        frames = beating(disc, torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0]]), 0.4)
        sizes = frames.sum((2, 3, 4))[0]
        assert frames.shape == (1, 5, 1, 64, 64) and torch.allclose(frames[:, 0], disc, atol=1e-4)
        assert sizes.argmin() == 2 and sizes[2] < 0.8 * sizes[0]
        assert torch.allclose(frames[:, 1], frames[:, 3], atol=1e-4)
        assert torch.allclose(frames[:, 0], frames[:, 4], atol=1e-4)

    def test_what_is_seen_comes_from_farther_out(self):
        """Of an image whose values are radii: r (1 + strength exp(-4 r^2)) at full contraction."""
        radius = lambda grid: grid.square().sum(-1).sqrt()  # noqa: E731
        grid = F.affine_grid(torch.eye(2, 3)[None], [1, 1, 65, 65], align_corners=False)
        frame = beating(radius(grid)[:, None], torch.full((1, 1), 0.5), 0.4)[0, 0, 0]
        inner = radius(grid)[0]
        away = (inner < 0.8) & (inner > 0.1)
        expected = inner * (1 + 0.4 * torch.exp(-4 * inner.square()))
        assert torch.allclose(frame[away], expected[away], atol=5e-3)


@pytest.mark.component("recursive graph over the frames")
class TestRecursiveGraph:
    def test_a_step_against_loops(self):
        graph = RecursiveGraph(3, 8, 2, side=3, neighbours=4)
        nodes, before = torch.randn(2, 9, 8), torch.randn(2, 9, 8)
        found = graph.step(nodes, before)
        for b in range(2):
            for i in range(9):
                near = F.cosine_similarity(nodes[b, i][None], before[b]).topk(4).indices
                most = torch.stack([before[b, j] - nodes[b, i] for j in near]).max(0).values
                assert torch.allclose(graph.join(torch.cat([nodes[b, i], most])), found[b, i], atol=1e-5)

    def test_every_frame_and_their_order_count(self):
        graph = RecursiveGraph(3, 8, 3, side=3)
        frames = torch.randn(1, 3, 3, 3, 3, requires_grad=True)
        found = graph(frames)
        assert found.shape == (1, 9, 8)
        found.square().sum().backward()
        assert (frames.grad.abs().amax((0, 2, 3, 4)) > 0).all()
        assert not torch.allclose(graph(frames[:, [1, 0, 2]]), found, atol=1e-3)

    def test_encoder_of_the_network(self):
        model = UNet(classes=3, channels=(4, 6, 8)).eval()
        deep = []
        model.down[-1].register_forward_hook(lambda block, given, made: deep.append(made))
        images = torch.randn(2, 1, 20, 24)
        model(images)
        assert torch.equal(encoded(model, images)[-1], deep[0])


@pytest.mark.component("temporal cycle consistency")
class TestBeat:
    def test_contrast_written_out(self):
        one, other = torch.randn(3, 5), torch.randn(3, 5)
        z, total = [*one, *other], 0.0
        for i in range(6):
            alike = [F.cosine_similarity(z[i], z[j], dim=0).item() / 0.1 for j in range(6)]
            total -= alike[(i + 3) % 6] - np.log(sum(np.exp(alike[j]) for j in range(6) if j != i))
        assert same_beat(one, other).item() == pytest.approx(total / 6, rel=1e-4)

    def test_clips_of_one_video_are_to_be_alike_and_others_not(self):
        z = torch.eye(4)
        assert (
            same_beat(z, z) < 1e-3 < same_beat(z, z.roll(1, 0)) and same_beat(torch.ones(4, 4), torch.ones(4, 4)) > 1.9
        )

    def test_clips_show_a_whole_beat_from_two_moments(self):
        method = GraphEcho(**TINY, videos=2)
        nets, seen = built(method), []
        nets["model"].down[0].register_forward_hook(lambda block, given, made: seen.append(given[0]))
        source, target = batches()
        method.beaten(nets, source.images, target.images)
        clips = seen[0].view(4, 2, method.frames, 40, 32)
        assert not torch.allclose(clips[:, 0], clips[:, 1], atol=1e-2), "two moments"
        assert not torch.allclose(clips[:, :, 0], clips[:, :, 1], atol=1e-2), "frames move"
        still = torch.cat([source.images, target.images])[:, 0]
        assert ((clips - still[:, None, None]).abs().mean((1, 2, 3, 4)) < 0.7 * still.std((1, 2))).all()

    def test_frames_leave_no_mark_on_the_statistics(self):
        method = GraphEcho(**TINY)
        nets, (source, target) = built(method), batches()
        before = {name: value.clone() for name, value in nets["model"].named_buffers() if "running" in name}
        method.beaten(nets, source.images, target.images).backward()
        after = dict(nets["model"].named_buffers())
        assert before and all(torch.equal(value, after[name]) for name, value in before.items())
        assert all(block[0].weight.grad.abs().max() > 0 for block in nets["model"].down)


@pytest.mark.component("adversarial alignment of answers, nodes and beats")
class TestAlignment:
    def test_a_judge_learns_and_the_target_is_to_pass_for_the_source(self):
        """The source's features do not move to please or to fool a judge."""
        method = GraphEcho(**TINY, nodes=0.0, matching=1e-9, beat=0.0, passing=1.0)
        nets, (source, _) = built(method), batches()
        maps = both_maps()
        method.matched(nets, source.labels, source.labels, maps).backward()
        here, there = (sum(level.grad.abs().sum() for level in centre) for centre in maps)
        assert there > 1e3 * here and nets["node judge"][0].weight.grad.abs().max() > 0

    @pytest.mark.parametrize("method", [Adversarial(channels=(4, 8)), GraphEcho(**TINY)])
    def test_without_weight_nothing_passes_for_anything(self, method):
        """The losses differ by the weighted terms, and the judges' own are there in any case."""
        nets, without = built(method), type(method)(**asdict(method) | {"alignment": 0.0, "augmentation": NONE})
        with_it, alone = step(method, nets).item(), step(without, nets).item()
        torch.manual_seed(1)
        source, target = batches()
        fooled = (nets["judge"](nets["model"](target.images).softmax(1)) - 1).square().mean() / 2
        assert with_it - alone == pytest.approx(method.alignment * fooled.item(), abs=2e-3 * method.alignment + 1e-6)

    def test_beats_are_aligned_too(self):
        method = GraphEcho(**TINY, beat=1e-9, passing=1.0)
        nets, (source, target) = built(method), batches()
        images = [source.images.clone().requires_grad_(), target.images.clone().requires_grad_()]
        method.beaten(nets, *images).backward()
        assert nets["beat judge"][0].weight.grad.abs().max() > 0 and images[1].grad.abs().max() > 1e-6


def test_adaptation_begins_after_a_start_and_needs_a_target():
    method = GraphEcho(**TINY)
    nets, (source, _) = built(method), batches()
    plain = cross_entropy_and_dice(nets["model"](source.images), source.labels)
    assert torch.allclose(step(method, nets, BEFORE), plain, atol=1e-5)
    assert step(method, nets) > step(method, nets, BEFORE)
    assert torch.isfinite(method.training_step(nets, source, None, AFTER))


@pytest.mark.component("normalisation by centre")
def test_the_network_that_predicts_has_the_targets_statistics():
    method = Adversarial(channels=(4, 8))
    nets, (source, target) = built(method), batches()
    step(method, nets, AFTER, (source, target))
    found = nets["model"].down[0][1].running_mean.clone()
    nets = built(method)
    nets["model"](target.images)
    assert torch.allclose(nets["model"].down[0][1].running_mean, found, atol=1e-6)


def test_labels_of_the_target_have_no_say():
    method = GraphEcho(**TINY)
    nets, (source, target) = built(method), batches()
    one = step(method, nets, AFTER, (source, target))
    nets = built(method)
    assert step(method, nets, AFTER, (source, target._replace(labels=source.labels))) == one


def test_all_of_it_learns_and_any_size_will_do():
    method = GraphEcho(**TINY)
    nets = built(method)
    step(method, nets).backward()
    idle = [
        name
        for name, p in nets.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.abs().max() > 0)
    ]
    assert not idle, idle
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(step(method, nets, AFTER, batches((41, 35))))


def test_ablations_and_comparator_keep_everything_else():
    arms = {name: asdict(arm.method) for name, arm in recipe.arms.items()}
    changed = lambda other: {key for key in arms[other] if arms["graphecho"][key] != arms[other][key]}  # noqa: E731
    assert changed("without matching") == {"nodes", "matching"} and changed("without beat") == {"beat"}
    assert changed("adversarial") == changed("source only") == set()
    assert {"matcher", "node judge"}.isdisjoint(built(recipe.arms["without matching"].method))
