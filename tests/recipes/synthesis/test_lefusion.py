"""LeFusion: what is asked of the network, what it sees on the way back, what it is told, and the pairs it makes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scarred_hearts import free, labelled
from sklearn.cluster import KMeans
from torch import nn

from medcook.data import IGNORE
from medcook.data.transforms import NONE
from medcook.methods import Moment
from medcook.recipes.synthesis import _scars, lefusion
from medcook.recipes.synthesis._diffusion import Diffusion
from medcook.recipes.synthesis._scars import CORE, INFARCT, ScarTask, alignment
from medcook.recipes.synthesis.lefusion import (
    BINS,
    HIGH,
    LOW,
    CopyPaste,
    LeFusion,
    LesionMaker,
    clusters,
    fill,
    focused_loss,
    histograms,
    lesion_masks,
    perturbed,
    recipe,
)

DIFFUSION = Diffusion(target="image")
NOW = Moment(0, 100)
TINY = dict(channels=(8, 8), steps_back=3)


def built(method: lefusion.MadeLesions, classes: int = 3) -> nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(1, classes, 2)


@pytest.mark.component("lesion-focused loss")
class TestLoss:
    def asked(self, focused: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks, and the gradient of the loss with respect to what a network gives."""
        batch, given = labelled(), torch.randn(4, 2, 32, 32, requires_grad=True)
        masks = lesion_masks(batch.labels, 2)
        loss = focused_loss(DIFFUSION, lambda x, t: given, batch.images, masks, focused)
        loss.backward()
        pixels = masks if focused else torch.ones_like(masks)
        expected = ((given - batch.images) ** 2 * pixels).sum() / pixels.sum()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        return masks, given.grad

    def test_nothing_is_asked_but_lesions(self):
        masks, gradient = self.asked(True)
        assert torch.equal(gradient != 0, masks > 0) and 0 < masks.mean() < 0.1

    def test_without_focus_everything_is_asked(self):
        assert (self.asked(False)[1] != 0).all()

    def test_a_step_is_this_loss_on_images_with_lesions(self, monkeypatch):
        seen, batch = [], labelled(6)
        batch = batch._replace(labels=batch.labels * torch.tensor([1, 0, 0, 1, 0, 0], dtype=torch.uint8)[:, None, None])
        monkeypatch.setattr(
            lefusion, "focused_loss", lambda d, net, images, masks, focused: seen.append((images, masks, focused))
        )
        for focused in (True, False):
            method = LeFusion(**TINY, focused=focused)
            method.learn(built(method), batch, None, NOW)
        for images, masks, _ in seen:
            assert (masks.flatten(1).sum(1) > 0).all()
            assert all(any(torch.equal(image, batch.images[k]) for k in (0, 3)) for image in images)
        assert [focused for *_, focused in seen] == [True, False]

    def test_no_lesion_no_step(self):
        method, batch = LeFusion(**TINY), labelled()
        loss = method.learn(built(method), batch._replace(labels=torch.zeros_like(batch.labels)), None, NOW)
        assert loss.item() == 0

    def test_the_ablation_differs_in_it_alone(self):
        arms = {name: arm.method.settings() for name, arm in recipe.arms.items()}
        for other, setting in (("without lesion focus", "focused"), ("without histograms", "told")):
            assert {key for key, value in arms["lefusion"].items() if arms[other][key] != value} == {setting}


class Spy:
    """A network that gives what it is told to, and keeps what it saw."""

    def __init__(self, given: torch.Tensor):
        self.given, self.seen = given, []

    def __call__(self, x, t):
        self.seen.append((x, t))
        return self.given


@pytest.mark.component("forward-diffused background")
class TestBackground:
    def filled(self, count: int = 8) -> tuple[Spy, torch.Tensor, torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        images, masks = 3 * free().images, lesion_masks(labelled().labels, 2)
        spy = Spy(torch.randn(4, 2, 32, 32))
        return spy, images, masks, fill(DIFFUSION, spy, images, masks, count)

    def test_outside_of_the_lesions_the_image_is_real_to_the_bit(self):
        _, images, masks, found = self.filled()
        outside = masks.sum(1, keepdim=True) == 0
        assert torch.equal(found[outside], images[outside]) and not (found == images)[~outside].any()

    def test_what_the_network_sees_there_is_the_real_image_noised_to_its_time(self):
        spy, images, masks, _ = self.filled()
        outside, noises = (masks.sum(1, keepdim=True) == 0).expand(-1, 2, -1, -1), []
        for x, t in spy.seen:
            a, b = DIFFUSION.parts(t, x)
            noise = ((x - a * images) / b)[outside]
            noises.append(noise)
            assert noise.std().item() == pytest.approx(1, abs=0.05) and noise.mean().abs() < 0.05
        assert abs(torch.corrcoef(torch.stack(noises[2:4]))[0, 1]) < 0.1  # every time anew
        assert len({int(t[0]) for _, t in spy.seen}) == 8

    def test_a_lesion_begins_with_noise_and_becomes_what_the_network_says(self):
        spy, _, masks, found = self.filled()
        start = spy.seen[0][0][masks > 0]
        assert start.std().item() == pytest.approx(1, abs=0.15)
        expected = (spy.given.clamp(-4, 4) * masks).sum(1, keepdim=True)
        torch.testing.assert_close(found[masks.sum(1, keepdim=True) > 0], expected[masks.sum(1, keepdim=True) > 0])


@pytest.mark.component("multi-channel decomposition")
class TestChannels:
    def test_every_class_is_made_by_its_own_channel(self):
        masks = lesion_masks(labelled().labels, 2)
        given = torch.tensor([3.0, -2.0])[None, :, None, None].expand(4, 2, 32, 32)
        found = fill(DIFFUSION, lambda x, t: given, torch.zeros(4, 1, 32, 32), masks, 5)
        assert torch.equal(found, 3 * masks[:, :1] - 2 * masks[:, 1:])

    def test_in_the_others_mask_a_channel_sees_what_the_other_has_made(self):
        masks, seen = lesion_masks(labelled().labels, 2), []
        given = torch.tensor([3.0, -2.0])[None, :, None, None].expand(4, 2, 32, 32)
        fill(DIFFUSION, lambda x, t: seen.append((x, t)) or given, torch.zeros(4, 1, 32, 32), masks, 5)
        for x, t in seen[1:]:
            a, b = DIFFUSION.parts(t, x)
            for mine, other, made in ((0, 1, -2.0), (1, 0, 3.0)):
                noise = ((x - a * made) / b)[:, mine][masks[:, other] > 0]
                assert noise.std().item() == pytest.approx(1, abs=0.25) and noise.mean().abs() < 0.35

    def test_a_copy_of_the_image_for_every_class(self):
        seen, masks = [], lesion_masks(labelled().labels, 2)
        images = 20 * labelled().images
        focused_loss(Diffusion(times=1, target="image"), lambda x, t: seen.append(x) or x, images, masks)
        assert seen[0].shape == (4, 2, 32, 32)
        assert torch.corrcoef(torch.stack([seen[0][:, 0].flatten(), images.flatten()]))[0, 1] > 0.3
        assert not torch.equal(seen[0][:, 0], seen[0][:, 1])  # each with noise of its own


@pytest.mark.component("histogram-based texture control")
class TestHistograms:
    def test_they_are_numpys(self):
        batch = labelled()
        masks = lesion_masks(batch.labels, 3)
        found = histograms(batch.images, masks)
        for b in range(4):
            for k in (0, 1):
                values = batch.images[b, 0][masks[b, k] > 0].clamp(LOW, HIGH - 1e-4).numpy()
                expected = np.histogram(values, bins=BINS, range=(LOW, HIGH))[0] / len(values)
                np.testing.assert_allclose(found[b, k], expected, atol=1e-6)
        assert (found[:, 2] == 0).all()

    def test_what_is_outside_of_the_range_counts_at_its_ends(self):
        found = histograms(torch.tensor([[[[-50.0, 50.0]]]]), torch.ones(1, 1, 1, 2))[0, 0]
        assert found[0] == found[-1] == 0.5

    def test_clusters_are_those_of_k_means(self):
        rng = np.random.default_rng(0)
        points = torch.from_numpy(rng.standard_normal((60, 5)) + 8 * rng.integers(0, 3, (60, 1))).float()
        found = clusters(points, 3)
        expected = KMeans(3, n_init=10, random_state=0).fit(points.numpy()).cluster_centers_
        np.testing.assert_allclose(sorted(found.tolist()), sorted(expected.tolist()), atol=1e-4)

    def test_equal_lesions_are_no_problem(self):
        assert torch.isfinite(clusters(torch.ones(5, 4), 3)).all()

    def test_a_centre_changes_by_a_tenth_at_most(self):
        told = torch.rand(50, 32)
        change = (perturbed(told) - told).abs() / told
        assert change.max().item() == pytest.approx(0.1, rel=1e-3) and change.mean() > 0.01

    @pytest.mark.parametrize("told", [True, False])
    def test_the_network_is_told_the_lesions_histogram_in_training_and_a_cluster_when_it_makes(self, told, monkeypatch):
        method, heard = LeFusion(**TINY, told=told), []
        nets, batch = built(method), labelled()
        batch = batch._replace(images=batch.images + torch.arange(4.0)[:, None, None, None])
        plain = LesionMaker.forward
        monkeypatch.setattr(
            LesionMaker, "forward", lambda self, x, t, told: heard.append(told) or plain(self, x, t, told)
        )
        method.learn(nets, batch, None, NOW)
        learned = nets["generator"].seen()
        torch.testing.assert_close(heard[0], BINS / 4 * learned if told else torch.zeros(4, 32))
        nets["sampler"].load_state_dict(nets["generator"].state_dict())
        method.make(nets, batch, free())
        if told:
            distance = torch.cdist(heard[-1] * 4 / BINS, clusters(learned, 3)).amin(1)
            assert (distance > 0).all() and distance.max() < 0.1
        else:
            assert (heard[-1] == 0).all()

    def test_only_the_last_lesions_are_remembered(self):
        maker = LesionMaker(3)
        for number in range(5):
            maker.remember(torch.full((100, 32), float(number)))
        assert len(maker.seen()) == 256 and maker.seen().unique().tolist() == [2, 3, 4]

    def test_what_it_is_told_decides_what_it_makes(self):
        """A generator that learned from bright and dark lesions makes either."""
        torch.manual_seed(0)
        maker, batch, method = LesionMaker(2), labelled(4), LeFusion()
        masks = (batch.labels > 0).float()[:, None]
        level = torch.tensor([2.0, -1.5]).repeat(2)[:, None, None, None]
        images = torch.where(masks > 0, level + 0.2 * torch.randn(4, 1, 32, 32), batch.images)
        told = method.telling(histograms(images, masks).flatten(1))
        optimiser = torch.optim.Adam(maker.parameters(), lr=3e-3)
        for _ in range(60):
            optimiser.zero_grad()
            focused_loss(DIFFUSION, lambda x, t: maker(x, t, told), images, masks).backward()
            optimiser.step()
        made = fill(DIFFUSION, lambda x, t: maker(x, t, told.flip(0)), free().images, masks, 6)
        means = (made * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3))
        assert means[1::2].min() > 0.8 and means[::2].max() < -0.5


@pytest.mark.component("lesion mask diffusion")
class TestMovedMasks:
    def test_a_wall_comes_to_lie_on_the_other(self):
        source, target = labelled().raters.float(), free().raters.float()
        for angle in (0.0, 1.0, 4.0):
            grid = alignment(source, target, torch.full((4,), angle))
            moved = F.grid_sample(source, grid, align_corners=False) > 0.5
            overlap = 2 * (moved & (target > 0)).sum() / (moved.sum() + target.sum())
            assert overlap > 0.85


@pytest.mark.component("pairs from lesion-free images")
@pytest.mark.parametrize("method", [LeFusion(**TINY), CopyPaste(channels=(8, 8))])
class TestPairs:
    def test_only_what_is_labelled_is_new(self, method):
        nets = built(method)
        assert method.learn(nets, labelled(), free(), NOW).requires_grad
        nets["sampler"].load_state_dict(nets["generator"].state_dict())
        torch.manual_seed(0)
        images, labels = method.make(nets, labelled(), free())
        same = (images == free().images)[:, 0]
        assert torch.equal(same, labels == 0) and set(labels.unique().tolist()) == {0, INFARCT, CORE}

    def test_before_there_was_a_lesion_none_is_made(self, method):
        batch = labelled()
        images, labels = method.make(built(method), batch._replace(labels=torch.zeros_like(batch.labels)), free())
        assert torch.equal(images, free().images) and not labels.any()

    def test_the_wall_moves_with_the_image(self, method):
        batch = labelled()
        batch = batch._replace(images=batch.raters.float())
        found = method.augment(batch, torch.Generator().manual_seed(0))
        agree = (found.images[:, 0] > 0.5) == (found.raters[:, 0] > 0)
        assert agree.float().mean() > 0.98 and not torch.equal(found.raters, batch.raters)


def test_copied_lesions_are_real_ones():
    method = replace(CopyPaste(channels=(8, 8)), augmentation=NONE)
    batch = labelled()
    torch.manual_seed(0)
    images, labels = method.make(built(method), batch, batch._replace(images=torch.zeros_like(batch.images)))
    assert images[:, 0][labels == INFARCT].mean().item() == pytest.approx(2, abs=0.4)
    assert images[:, 0][labels == CORE].mean() < 0


@pytest.mark.component("cardiac lesion MRI and lung nodule CT")
class TestScars:
    def test_the_pool_is_lesion_free_and_every_sample_knows_its_wall(self):
        task = ScarTask("embedded", labelled=2, side=32)
        labels, pool, val = (task.samples(role) for role in ("labelled", "unlabelled", "val"))
        assert task.classes == 3 and set(task.structures.values()) == {"infarct", "no-reflow"}
        assert (pool.labels == IGNORE).all() and (pool.raters.flatten(1).sum(1) >= _scars.LEAST).all()
        assert set(labels.labels.unique().tolist()) == {0, 1, 2} == set(val.labels.unique().tolist())
        assert (labels.raters[:, 0][labels.labels > 0] == 1).float().mean() > 0.99
        healthy = replace(task.preparation, healthy=True)
        case = next(iter(task.cases("unlabelled")))
        plain = super(type(healthy), healthy).images(case)
        torch.testing.assert_close(healthy.images(case), plain)
        assert not torch.allclose(task.preparation.images(case), plain, atol=0.1)
        assert task.data_kind == "simulated" and ScarTask("acdc", labelled=3).data_kind == "real-anatomy-simulated"


@pytest.mark.component("nnU-Net and SwinUNETR")
@pytest.mark.parametrize("kind", [LeFusion, CopyPaste])
def test_real_and_made_pairs_train_the_segmenter_of_the_chapter(kind):
    method = kind(channels=(8, 8), share=0.5, making=2)
    nets, steps = built(method), 8
    maker = {"generator"} if kind is LeFusion else set()
    for step in range(steps):
        nets.zero_grad()
        loss = method.training_step(nets, labelled(), free(), Moment(step, steps))
        loss.backward()
        assert torch.isfinite(loss)
        learned = {name.split(".")[0] for name, p in nets.named_parameters() if p.grad is not None and p.grad.any()}
        assert learned == (maker if step < 2 else set() if step < 4 else {"model"})
        method.after_step(nets, Moment(step, steps))
    assert len(nets["made"]) == 8
    everything = [p for name, p in nets.named_parameters() if name.startswith("model")]
    assert all(p.grad is not None for p in everything)
    assert method.predict(nets.eval(), free().images).shape == (4, 3, 32, 32)


def test_all_of_the_generator_learns_also_in_bfloat16():
    for bfloat16 in (False, True):
        method = LeFusion(**TINY)
        nets = built(method)
        for block in nets["generator"].modules():  # what begins at zero hides what is before it
            if isinstance(block, nn.Conv2d):
                nn.init.normal_(block.weight, std=0.1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            loss = method.learn(nets, labelled(), free(), NOW)
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in nets["generator"].parameters())
