"""Contours from a graph: how nodes are unpooled, what is looked up where, what is trained, and what is hidden."""

import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chest import chest
from scipy import ndimage
from torch import nn
from torch.distributions import Normal, kl_divergence

from medcook import metrics
from medcook.cohorts import first_attributes
from medcook.data import Case
from medcook.data.landmarks import filled, landmarks
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.preparation import Preparation
from medcook.recipes.anatomy import hybridgnet
from medcook.recipes.anatomy.hybridgnet import ContourNet, GraphBlock, occluded, pieces, unpooling
from medcook.recipes.uncertainty.chexmask_u import look_up, scaled_laplacian

TINY = dict(channels=(4, 8, 8), latents=6, nodes=12, width=8, order=3)
LATE = Moment(9, 10)


def method(**settings) -> ContourNet:
    return ContourNet(**TINY | settings)


def batch(count: int = 2) -> Batch:
    torch.manual_seed(1)
    labels = chest().expand(count, -1, -1)
    return Batch(labels[:, None] + 0.3 * torch.randn(count, 1, 32, 32), labels)


def a_net(**settings) -> nn.Module:
    torch.manual_seed(0)
    return method(**settings).build(1, 2, 2)["model"].eval()


@pytest.mark.component("graph convolutions decode anatomy")
def test_a_node_in_between_is_the_mean_of_its_neighbours_on_its_own_ring():
    x = torch.randn(8, 3)
    wanted = []
    for ring in x.split(4):
        for number in range(4):
            wanted += [ring[number], (ring[number] + ring[(number + 1) % 4]) / 2]
    assert torch.allclose(unpooling(8) @ x, torch.stack(wanted), atol=1e-6)


@pytest.mark.component("graph convolutions decode anatomy")
def test_half_the_landmarks_unpooled_are_nearly_all_of_them():
    """Every other landmark of a ring is what the coarse graph has: so its truth is the truth's every other point."""
    y, x = np.mgrid[:64, :64]
    label = torch.from_numpy((np.hypot(y - 32, x - 16) < 12) | (np.hypot(y - 30, x - 46) < 10)).byte()[None]
    points, _ = landmarks(label, 40)
    assert (unpooling(40) @ points[:, ::2] - points).abs().max() < 0.02
    assert torch.equal((unpooling(40) @ points[:, ::2])[:, ::2], points[:, ::2])


@pytest.mark.component("graph convolutions decode anatomy")
def test_neighbours_hear_each_other_and_nobody_hears_the_other_structure():
    torch.manual_seed(0)
    block = GraphBlock(3, 4, 2, scaled_laplacian(8))
    x = torch.randn(1, 16, 3)
    moved = x.clone()
    moved[0, 0] += 1
    heard = (block(moved) - block(x)).abs().amax((0, 2)) > 1e-6
    assert heard.nonzero()[:, 0].tolist() == [0, 1, 7]


@pytest.mark.component("graph convolutions decode anatomy")
def test_stages_are_coarse_then_fine_and_correct_each_other():
    net, seen = a_net(), batch()
    z, _, maps = net.encode(seen.images)
    few, places, last = net.decode(z, maps)
    assert few.shape == (2, 12, 2) and places.shape == last.shape == (2, 24, 2)
    for head in net.heads[1:]:
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    few, places, last = net.decode(z, maps)
    assert torch.allclose(last, unpooling(12) @ few) and torch.equal(places, last)
    asked = []
    net.refine.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0]))
    net.correct.register_forward_hook(lambda *parts: asked.append(parts[2]))
    net.decode(z, maps)
    assert torch.allclose(asked[1], net.unpool @ asked[0])


@pytest.mark.component("convolutional encoder")
def test_latents_come_from_the_deepest_features_of_all_the_image():
    net, seen = a_net(), batch()
    mean, log_variance, maps = net.encode(seen.images)
    assert [tuple(one.shape[1:]) for one in maps] == [(4, 32, 32), (8, 16, 16), (8, 8, 8)]
    assert torch.allclose(maps[-1], net.encoder.maps(seen.images))
    wanted = net.distribution(F.adaptive_avg_pool2d(maps[-1], 8).flatten(1))
    assert torch.allclose(mean, wanted[:, :6]) and torch.allclose(log_variance, wanted[:, 6:].clamp(-12, 6))


@pytest.mark.component("variational latent")
def test_the_loss_is_the_errors_of_all_stages_and_the_divergence_of_drawn_latents(monkeypatch):
    one, seen, drawn = method(beta=0.7), batch(), []
    nets = one.build(1, 2, 2).eval()
    truth, _ = landmarks(seen.labels, 12)
    answers = [truth[:, ::2] + 0.3, truth + 0.1, truth - 0.2]
    monkeypatch.setattr(nets["model"], "decode", lambda z, maps: drawn.append(z) or answers)
    mean, log_variance, _ = nets["model"].encode(seen.images)
    divergence = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).mean()
    torch.manual_seed(5)
    loss = one.training_step(nets, seen, None, LATE)
    torch.manual_seed(5)
    assert torch.allclose(drawn[0], mean + torch.randn(2, 6) * (log_variance / 2).exp())
    assert loss.item() == pytest.approx(0.09 + 0.01 + 0.04 + 0.7 * divergence.item(), rel=1e-4)
    nothing = seen._replace(labels=torch.zeros_like(seen.labels))
    assert one.training_step(nets, nothing, None, LATE).item() == pytest.approx(0.7 * divergence.item(), rel=1e-4)


@pytest.mark.component("variational latent")
def test_prediction_decodes_the_mean_and_is_the_same_each_time():
    one, seen, drawn = method(), batch(), []
    torch.manual_seed(0)
    nets = one.build(1, 4, 2).eval()
    decode = nets["average"].decode
    nets["average"].decode = lambda z, maps: drawn.append(z) or decode(z, maps)
    with torch.no_grad():
        first, second = (one.predict(nets, seen.images) for _ in range(2))
        mean, _, maps = nets["average"].encode(seen.images)
        inside = filled(decode(mean, maps)[-1], (32, 32)).float()
    assert torch.equal(first, second) and torch.equal(drawn[0], mean)
    assert first.shape == (2, 4, 32, 32) and torch.equal(first.sum(1), torch.ones(2, 32, 32))
    assert torch.equal(first[:, 1], inside) and not first[:, 2:].any()


@pytest.mark.component("image-to-graph skip connections")
def test_each_node_sees_the_features_where_its_landmark_is_believed_to_be():
    """The deepest map but one at the few landmarks, the next finer one at all of them; else places alone."""
    net, bare, seen = a_net(), a_net(skips=False), batch()
    for one in (net, bare):
        asked = []
        for block in (one.correct, one.finish):
            block.register_forward_pre_hook(lambda _, inputs, asked=asked: asked.append(inputs[0]))
        z, _, maps = one.encode(seen.images)
        few, places, _ = one.decode(z, maps)
        for given, features, where in zip(asked, (maps[-2], maps[-3]), (few, places), strict=True):
            assert torch.equal(given[:, :, -2:], where)
            if one is net:
                assert torch.allclose(given[:, :, 8:-2], look_up(features, where)) and given.shape[2] > 10
            else:
                assert given.shape[2] == 10


@pytest.mark.component("image-to-graph skip connections")
def test_with_skips_local_features_move_landmarks_and_without_them_nothing_but_latents_does():
    seen = batch()
    for skips in (True, False):
        net = a_net(skips=skips)
        z, _, maps = net.encode(seen.images)
        before = net.decode(z, maps)
        for level, changed in ((1, [False, True, True]), (0, [False, False, True])):
            other = [one + (number == level) for number, one in enumerate(maps)]
            moved = [not torch.equal(*pair) for pair in zip(before, net.decode(z, other), strict=True)]
            assert moved == [skips and one for one in changed]


def test_it_learns_where_lungs_are():
    torch.manual_seed(0)
    one, seen = method(), batch(4)
    nets = one.build(1, 2, 2)
    optimiser = torch.optim.Adam(nets["model"].parameters(), 3e-3)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        losses.append(one.training_step(nets, seen, None, LATE))
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.component("anatomically plausible by construction")
def test_what_is_found_are_two_filled_contours():
    """The inside of the landmarks of a mask is the mask."""
    points, _ = landmarks(chest().expand(2, -1, -1), 60)
    one = method()
    nets = one.build(1, 2, 2).eval()
    nets["average"].decode = lambda z, maps: [points]
    inside = one.predict(nets, batch().images)[0, 1] > 0.5
    assert metrics.dice(inside.numpy(), chest()[0].numpy() > 0) > 0.9
    assert pieces(inside.numpy()) == 2


@pytest.mark.component("anatomically plausible by construction")
def test_pieces_are_parts_and_holes():
    ring = np.zeros((12, 12), bool)
    ring[2:8, 2:8] = True
    ring[4:6, 4:6] = False
    assert pieces(ring) == 2 and pieces(ring & False) == 0
    dots = ring.copy()
    dots[10, 10] = dots[0, 0] = True
    assert pieces(dots) == 4
    assert pieces(np.stack([ring, dots, ring & False])) == 3
    full = np.ones((4, 4), bool)
    assert pieces(full) == ndimage.label(full)[1]


def fitted(look) -> SimpleNamespace:
    """A trained method that answers prepared images by `look`."""
    return SimpleNamespace(task=SimpleNamespace(preparation=Preparation(size=(32, 32))), answer=look)


def a_case(name: str) -> Case:
    image = np.random.default_rng(0).normal(size=(1, 32, 32)).astype(np.float32)
    attributes = {"site": "Shenzhen"}
    return Case(image=image, label=chest()[0].numpy(), case_id=name, patient_id=name, attributes=attributes)


@pytest.mark.component("image occlusion")
def test_a_square_is_hidden_at_a_place_that_follows_from_the_name():
    seen = []

    def threshold(images):
        seen.append(images)
        inside = (images > images.amin())[:, 0].float() * chest()[0]
        return torch.stack([1 - inside, inside], dim=1)

    rows = [occluded(fitted(threshold), a_case(name))[0] for name in ("a", "a", "b")]
    plain, covered, _, again, _, other = seen
    assert torch.equal(covered, again) and not torch.equal(covered, other)
    hidden = (covered != plain)[0, 0]
    assert torch.all(covered[0, 0][hidden] == plain.amin()) and 12 * 12 - 1 <= hidden.sum() <= 12 * 12
    centre = 0.25 + 0.5 * torch.rand(2, generator=torch.Generator().manual_seed(zlib.crc32(b"a")))
    assert hidden.nonzero().double().add(0.5).mean(0).numpy() == pytest.approx(32 * centre.numpy(), abs=1)
    truth = chest()[0].numpy() > 0
    assert rows[0] == rows[1] and rows[0]["group"] == "Shenzhen" and rows[0]["dice"] > 0.95
    mask = truth & (covered > covered.amin())[0, 0].numpy()
    assert rows[0]["dice_covered"] == pytest.approx(metrics.dice(mask, truth))
    assert rows[0]["hd95_covered"] == pytest.approx(metrics.hd95(mask, truth, None))
    assert rows[0]["pieces_covered"] == pieces(mask)


@pytest.mark.component("domain shift")
def test_one_hospital_is_learnt_from_and_all_are_tested():
    task = hybridgnet.recipe.scales["quick"].task

    def sites(patients) -> set[str]:
        return {first_attributes(task.data, patient)["site"] for patient in patients}

    assert sites(task.labelled_patients) == sites(task.val_patients) == {"north"}
    assert sites(task.data.split.test) > {"north"}
    full = hybridgnet.recipe.scales["full"].task
    assert full.evaluation == "test" and full.keep == (("site", "Shenzhen"),)
    inside = chest().float()
    row = occluded(fitted(lambda images: torch.stack([1 - inside, inside], dim=1)), a_case("a"))[0]
    assert row["group"] == "Shenzhen", "by which results are told apart"


def test_the_ablation_is_without_lookups_and_all_arms_are_augmented_alike():
    arms = {name: arm.method for name, arm in hybridgnet.recipe.arms.items()}
    assert arms["without skips"] == replace(arms["hybridgnet"], skips=False)
    assert len({str(arm.augmentation) for arm in arms.values()}) == 1
    whole, bare = (
        {name: p.shape for name, p in arms[arm].build(1, 2, 2)["model"].named_parameters()}
        for arm in ("hybridgnet", "without skips")
    )
    assert {name for name in whole if whole[name] != bare[name]} == {
        "correct.convolution.mix.weight",
        "finish.convolution.mix.weight",
    }
    assert whole.keys() == bare.keys()


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("size", [(33, 47), (16, 16)])
def test_every_parameter_is_trained_at_any_size_in_both_precisions(skips, size):
    torch.manual_seed(0)
    one = method(skips=skips)
    nets = one.build(1, 3, 2)
    labels = torch.zeros(3, *size, dtype=torch.uint8)
    labels[:, 3:12, 1:5], labels[:, 3:12, 9:14] = 1, 2
    data = Batch(torch.randn(3, 1, *size), labels)
    for enabled in (False, True):
        nets.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = one.training_step(nets, data, None, LATE)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in nets["model"].parameters())
    assert one.predict(nets.eval(), data.images).shape == (3, 3, *size)


def test_volumes_are_refused():
    with pytest.raises(MedcookError, match="slices"):
        method().build(1, 2, 3)
