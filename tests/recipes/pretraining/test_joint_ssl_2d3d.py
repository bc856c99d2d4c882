"""Joint clustering of slices and volumes: Sinkhorn, attention to places that move, what is hidden, and the stages."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.methods import Batch, Moment, Supervised
from medcook.networks import UNet
from medcook.pretraining import one_cycle
from medcook.recipes.pretraining.joint_ssl_2d3d import (
    DeformableAttention,
    JointClustering,
    SliceClusters,
    VolumeClusters,
    at,
    hidden,
    recipe,
    sinkhorn,
    slice_features,
    swapped,
)

TINY = dict(channels=(4, 6, 8))
SLICES, MASKED, VOLUMES, LABELS = (Moment(step, 32) for step in (0, 6, 8, 12))
"""Steps of a run of 32: six of slices, two of hidden ones, four of slices and volumes, twenty on labels."""


def batch(size: tuple[int, int, int] = (8, 16, 20)) -> Batch:
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (3, *size), generator=rng).byte()
    return Batch(torch.randn(3, 1, *size, generator=rng) + torch.arange(size[0]).view(-1, 1, 1) / 4, labels)


def built(method: JointClustering) -> nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(1, 3, 3).train()


def step(method: JointClustering, nets: nn.ModuleDict, now: Moment, given: Batch | None = None) -> Tensor:
    torch.manual_seed(1)
    return method.training_step(nets, given or batch(), given or batch(), now)


@pytest.mark.component("contrastive clustering of 2D slices")
class TestSlices:
    def test_sinkhorn_is_the_loop_and_shares_the_prototypes_out(self):
        scores = F.normalize(torch.randn(24, 16), dim=1) @ F.normalize(torch.randn(6, 16), dim=1).T
        q = np.exp(scores.double().numpy() / 0.05)
        for _ in range(3):
            for k in range(6):
                q[:, k] /= q[:, k].sum() * 6
            for n in range(24):
                q[n] /= q[n].sum() * 24
        found = sinkhorn(scores)
        assert np.allclose(found, q * 24, atol=1e-4)
        assert torch.allclose(found.sum(1), torch.ones(24), atol=1e-5)
        favoured = sinkhorn(scores + torch.tensor([0.3, 0, 0, 0, 0, 0]))  # a prototype that all would like best
        assert (favoured.sum(0) - 4).abs().max() < 2 and torch.allclose(favoured, found, atol=1e-3)

    def test_each_view_predicts_the_others_clusters(self):
        first, second, prototypes = torch.randn(7, 5), torch.randn(7, 5), torch.randn(4, 5)
        unit = [[v / v.norm() for v in rows] for rows in (first, second, prototypes)]
        scores = [torch.tensor([[v @ c for c in unit[2]] for v in view]) for view in unit[:2]]
        total = 0.0
        for asked, told in ((scores[0], scores[1]), (scores[1], scores[0])):
            q = sinkhorn(asked)
            for n in range(7):
                chances = [math.exp(told[n, k] / 0.1) for k in range(4)]
                total -= sum(q[n, k].item() * math.log(chances[k] / sum(chances)) for k in range(4))
        assert swapped(first, second, prototypes).item() == pytest.approx(total / 14, rel=1e-4)

    def test_no_gradient_flows_through_the_clusters(self):
        first, second, prototypes = (torch.randn(n, 5, requires_grad=True) for n in (7, 7, 4))
        swapped(first, second, prototypes).backward()
        parts = [F.normalize(v, dim=1) for v in (first, second, prototypes)]
        scores = [view @ parts[2].T for view in parts[:2]]
        q = [sinkhorn(s).detach() for s in scores]
        fixed = -(q[0] * (scores[1] / 0.1).log_softmax(1) + q[1] * (scores[0] / 0.1).log_softmax(1)).sum() / 14
        wanted = torch.autograd.grad(fixed, [first, second, prototypes])
        assert all(
            torch.allclose(v.grad, w, atol=1e-5) for v, w in zip((first, second, prototypes), wanted, strict=True)
        )

    def test_features_are_means_of_every_level_slice_by_slice(self):
        nets, seen = built(JointClustering(**TINY)), []
        for block in nets["model"].down:
            block.register_forward_hook(lambda _, __, out: seen.append(out))
        found = slice_features(nets["model"].eval(), batch().images)
        assert found.shape == (3, 8, 4 + 6 + 8 * 16)
        for b, n in ((0, 0), (2, 5)):
            parts = [level[b, :, n].mean((1, 2)) for level in seen[:2]]
            parts.append(F.adaptive_avg_pool2d(seen[2][b, :, n], 4).flatten())
            wanted = torch.cat([part / part.norm() for part in parts])
            assert torch.allclose(found[b, n], wanted, atol=1e-5)

    def test_slices_differ_from_the_start(self):
        """What batch normalisation is for: features of a random network hardly differ, embeddings do."""
        clusters = SliceClusters((4, 6, 8), 5).train()
        features = F.normalize(1 + 0.001 * torch.randn(6, 8, 138), dim=2)
        vectors = F.normalize(clusters.embed(features).flatten(0, 1), dim=1)
        assert (vectors @ vectors.T).mean() < 0.1

    def test_a_step_clusters_all_slices_of_both_views(self, monkeypatch):
        seen = []
        monkeypatch.setattr(
            "medcook.recipes.pretraining.joint_ssl_2d3d.swapped",
            lambda *given: seen.append(given) or swapped(*given),
        )
        method = JointClustering(**TINY)
        loss = step(method, built(method), SLICES)
        assert [tuple(v.shape) for v in seen[0]] == [(24, 64), (24, 64), (32, 64)] and len(seen) == 1
        assert loss.item() == pytest.approx(swapped(*seen[0]).item())

    def test_a_view_moves_no_slice_to_another(self):
        images = torch.arange(8.0).view(1, 1, 8, 1, 1).expand(2, 1, 8, 16, 20)
        method = JointClustering(**TINY, augmentation=replace(JointClustering().augmentation, noise=0.0))
        found = method.in_plane(images)
        assert torch.allclose(found.std((3, 4)), torch.zeros(2, 1, 8), atol=1e-5)
        assert (found[..., 0, 0].diff(dim=2) > 0).all() and not torch.equal(found[0], found[1])


@pytest.mark.component("deformable self-attention over slices")
class TestAttention:
    def test_between_slices_values_are_those_of_numpy(self):
        slices, places = torch.randn(2, 9, 3), torch.tensor([[0.0, 2.25, 7.5, 12.0], [-3.0, 8.0, 4.9, 1.0]])
        found = at(slices, places)
        for b in range(2):
            for c in range(3):
                wanted = np.interp(places[b], np.arange(9), slices[b, :, c])
                assert np.allclose(found[b, :, c], wanted, atol=1e-5)

    def test_a_place_for_every_four_slices_moves_by_what_is_asked(self):
        attention, queries = DeformableAttention(), torch.randn(2, 16, 64)
        nn.init.zeros_(attention.offset[2].weight)
        assert torch.allclose(attention.places(queries)[0], torch.tensor([1.5, 5.5, 9.5, 13.5]))
        nn.init.normal_(attention.offset[2].weight, std=10.0)
        moves = attention.places(queries) - torch.tensor([1.5, 5.5, 9.5, 13.5])
        assert 4 < moves.abs().max() <= 8 and not torch.allclose(moves[0], moves[1])

    def test_it_is_the_loop_over_slices_heads_and_places(self):
        attention, x = DeformableAttention(), torch.randn(1, 8, 64)
        queries = attention.query(x)
        places = attention.places(queries)[0]
        there = at(x, places[None])
        keys, values = attention.key(there)[0], attention.value(there)[0]
        wanted = torch.zeros(8, 64)
        for i in range(8):
            for h in range(4):
                part = slice(16 * h, 16 * h + 16)
                scores = []
                for k, place in enumerate(places):
                    apart = i - place
                    logged = apart.sign() * (1 + apart.abs()).log()
                    scores.append(queries[0, i, part] @ keys[k, part] / 4 + attention.bias(logged.view(1, 1))[0, h])
                wanted[i, part] = torch.stack(scores).softmax(0) @ values[:, part]
        assert torch.allclose(attention(x)[0], attention.answer(wanted), atol=1e-5)

    def test_the_places_learn(self):
        attention = DeformableAttention()
        attention(torch.randn(2, 16, 64)).square().sum().backward()
        assert all(p.grad.abs().max() > 0 for p in attention.parameters())


@pytest.mark.component("clustering agreement of 3D volumes")
class TestVolumes:
    def test_volumes_are_clustered_by_the_mean_over_slices(self, monkeypatch):
        seen = []
        monkeypatch.setattr(
            "medcook.recipes.pretraining.joint_ssl_2d3d.swapped", lambda *given: seen.append(given) or given[0].sum()
        )
        clusters, slices = VolumeClusters(5).eval(), torch.randn(6, 8, 64)
        clusters.loss(slices)
        whole = clusters.apart(torch.stack([clusters.transformer(one[None])[0].mean(0) for one in slices]))
        assert torch.allclose(seen[0][0], whole[:3], atol=1e-5) and torch.allclose(seen[0][1], whole[3:], atol=1e-5)

    def test_a_step_adds_it_to_the_clustering_of_slices(self):
        method = JointClustering(**TINY)
        nets, seen = built(method), []
        nets["pretext"]["slices"].apart.register_forward_hook(lambda _, __, out: seen.append(out.unflatten(0, (6, 8))))
        loss = step(method, nets, VOLUMES)
        slices = nets["pretext"]["slices"].loss(seen[0])
        volumes = nets["pretext"]["volumes"].loss(seen[0])
        assert loss.item() == pytest.approx((slices + volumes).item(), rel=1e-5)

    def test_the_encoder_learns_from_it(self):
        method = JointClustering(**TINY)
        nets = built(method)
        features = slice_features(nets["model"], torch.cat([batch().images, batch().images]))
        nets["pretext"]["volumes"].loss(nets["pretext"]["slices"].embed(features)).backward()
        assert all(p.grad.abs().max() > 0 for p in nets["model"].down.parameters())


@pytest.mark.component("masked embedding prediction")
class TestHidden:
    @pytest.mark.parametrize(("slices", "count"), [(32, 4), (8, 1), (20, 2)])
    def test_a_tenth_of_each_volume_is_hidden(self, slices, count):
        where = hidden(5, slices)
        assert (where.sum(1) == count).all() and len({tuple(row.tolist()) for row in hidden(50, slices)}) > 1

    def test_the_transformer_sees_the_token_in_their_place_and_is_told_by_them_alone(self):
        clusters, slices, where, seen = VolumeClusters(5), torch.randn(3, 8, 64), hidden(3, 8), []
        clusters.transformer.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
        error = clusters.hidden_error(slices, where)
        shown, out = seen[0]
        assert torch.equal(shown[~where], slices[~where])
        assert torch.equal(shown[where], clusters.token.expand(3, 64))
        wanted = (clusters.guess(out)[where] - slices[where]).square().mean()
        assert error.item() == pytest.approx(wanted.item(), rel=1e-5)
        other = torch.where(where[..., None], slices + 3, slices)
        clusters.hidden_error(other, where)
        assert torch.equal(seen[1][0], shown)


@pytest.mark.component("weights for 2D and for 3D tasks")
def test_the_network_that_is_prepared_is_one_for_slices():
    """Its weights are a 2D U-Net's, and what it says of a slice depends on no other."""
    nets = built(JointClustering(**TINY))
    flat = UNet(inputs=1, classes=3, channels=TINY["channels"], dims=2).eval()
    state = nets["model"].state_dict()
    flat.load_state_dict({name: state[name].view_as(tensor) for name, tensor in flat.state_dict().items()})
    images = batch().images
    found = nets["model"].eval()(images)
    assert torch.allclose(found[:, :, 3], flat(images[:, :, 3]), atol=1e-4)


@pytest.mark.component("several sources, 2D and 3D")
def test_the_pool_has_volumes_of_more_than_one_set():
    for profile in ("quick", "full"):
        task = recipe.scales[profile].task
        assert len(set(task.pool)) == 2 and task.pool[0] == task.dataset


class TestStages:
    def learning(self, method: JointClustering, now: Moment) -> set[str]:
        """Which parts of the networks get a gradient in a step; each part wholly."""
        nets = built(method)
        step(method, nets, now).backward()
        slices, volumes = nets["pretext"]["slices"], nets["pretext"]["volumes"]
        parts = {
            "down": list(nets["model"].down.parameters()),
            "up": [*nets["model"].up.parameters(), *nets["model"].head.parameters()],
            "slices": list(slices.parameters()),
            "transformer": list(volumes.transformer.parameters()),
            "guess": [volumes.token, *volumes.guess.parameters()],
            "prototypes": [volumes.prototypes, *volumes.apart.parameters()],
        }
        moved = {
            name: [p.grad is not None and bool(p.grad.abs().max() > 0) for p in part] for name, part in parts.items()
        }
        assert all(all(part) or not any(part) for part in moved.values()), moved
        return {name for name, part in moved.items() if all(part)}

    def test_each_stage_moves_its_own_part(self):
        method = JointClustering(**TINY)
        assert self.learning(method, SLICES) == {"down", "slices"}
        assert self.learning(method, MASKED) == {"transformer", "guess"}
        assert self.learning(method, VOLUMES) == {"down", "slices", "transformer", "prototypes"}
        assert self.learning(method, LABELS) == {"down", "up"}

    def test_only_slices_and_volumes_pay_for_maps_that_can_learn(self):
        """While slices are hidden the encoder is as it is, and no graph of it is kept."""
        method, kept = JointClustering(**TINY), []
        nets = built(method)
        nets["model"].down[0].register_forward_hook(lambda _, __, out: kept.append(out.requires_grad))
        for now in (SLICES, MASKED, VOLUMES):
            step(method, nets, now)
        assert kept == [True, False, True]

    def test_each_stage_has_its_own_schedule(self):
        method = JointClustering(pretext_rate=2.0, rate=1.0)
        found = [method.rate_at(Moment(k, 320)) for k in range(320)]
        cycles = [2 * one_cycle(k, n) for n in (60, 20, 40) for k in range(n)]
        assert found == pytest.approx(cycles + [one_cycle(k, 200) for k in range(200)])

    def test_fine_tuning_is_supervised_training(self):
        method = JointClustering(**TINY)
        nets = built(method)
        wanted = Supervised(**TINY).training_step(nets, batch(), None, LABELS)
        assert torch.equal(step(method, nets, LABELS), wanted)


@pytest.mark.parametrize("size", [(8, 16, 16), (11, 22, 19), (32, 56, 40)])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_any_size_and_precision(size, bfloat16):
    method = JointClustering(**TINY)
    nets = built(method)
    for now in (SLICES, MASKED, VOLUMES, LABELS):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            loss = step(method, nets, now, batch(size))
        assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert method.predict(nets.eval(), batch(size).images).shape == (3, 3, *size)


def test_all_arms_train_the_same_network():
    shapes = []
    for arm in recipe.arms.values():
        nets = built(arm.method)
        shapes.append({name: p.shape for name, p in nets["model"].named_parameters()})
        waits = recipe.arms["scratch"].method.waits and arm.method.waits
        assert ("pretext" in nets) is not waits
    assert all(shape == shapes[0] for shape in shapes)
    joint, alone = (recipe.arms[name].method for name in recipe.ablation)
    assert replace(alone, shares=joint.shares) == joint


def test_who_waits_learns_nothing_in_the_pretext():
    method = JointClustering(**TINY, waits=True)
    nets = built(method)
    step(method, nets, SLICES).backward()
    assert all(p.grad is None for p in nets.parameters())
