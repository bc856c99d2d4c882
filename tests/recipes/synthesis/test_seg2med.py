"""Images from masks: the condition, the generator that is told it, and what a segmenter finds in what is made."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from medcook.methods import Batch, Moment
from medcook.recipes.synthesis import seg2med
from medcook.recipes.synthesis._diffusion import Diffusion
from medcook.recipes.synthesis.seg2med import (
    COARSE,
    DIFFUSION,
    LEVELS,
    Seg2Med,
    alike,
    fidelity_rows,
    recipe,
    structure_maps,
    tissue_maps,
)
from medcook.synthesis import SmallTask
from medcook.tasks import Budget
from medcook.training import Loop, fit

METHODS = {name: arm.method for name, arm in recipe.arms.items()}
MADE, REAL = (METHODS[name] for name in recipe.compare)
WITHOUT = METHODS[recipe.ablation[1]]
CLASSES = 4


def batch(size: tuple[int, int] = (32, 32), count: int = 3) -> Batch:
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (count, *size), generator=rng).byte()
    return Batch(labels[:, None] + torch.randn(count, 1, *size, generator=rng), labels)


def built(method: Seg2Med, awake: bool = False) -> torch.nn.ModuleDict:
    """Networks; `awake`: no layer of the generator is zero any more, as at the start some are."""
    torch.manual_seed(0)
    nets = method.build(1, CLASSES, 2)
    for name in ("generator", "sampler") if awake else ():
        torch.manual_seed(1)
        for tensor in nets[name].parameters():
            torch.nn.init.normal_(tensor, std=0.1)
    return nets.eval()


def made(method: Seg2Med, images, labels) -> torch.Tensor:
    return method.shown(built(method, awake=True), images, labels, CLASSES)


@pytest.mark.component("diffusion conditioned on masks")
class TestCondition:
    def test_structures_are_maps_of_their_own(self):
        labels = torch.tensor([[[0, 1], [3, 255]]], dtype=torch.uint8)
        assert structure_maps(labels, 4).tolist() == [[[[0, 1], [0, 0]], [[0, 0], [0, 0]], [[0, 0], [1, 0]]]]

    def test_the_loss_is_that_of_images_noised_beside_their_maps(self):
        nets, data = built(MADE, awake=True), batch()
        torch.manual_seed(5)
        found = MADE.learn(nets, data, None, Moment(0, 9))
        torch.manual_seed(5)
        t = torch.randint(DIFFUSION.times, (3,))
        noise = torch.randn_like(data.images)
        s = DIFFUSION.signal[t].view(-1, 1, 1, 1)
        x = s.sqrt() * data.images + (1 - s).sqrt() * noise
        maps = torch.cat([structure_maps(data.labels, CLASSES), tissue_maps(data.images)], 1)
        with torch.no_grad():
            given = nets["generator"](torch.cat([x, maps], 1), t)
        torch.testing.assert_close(found, (given - DIFFUSION.wanted(data.images, noise, t)).square().mean())

    def test_other_masks_make_another_image_and_only_who_is_told_them_knows(self):
        data = batch()
        other = data.labels.roll(1, 2)
        changed = (made(MADE, *data[:2]) - made(MADE, data.images, other)).abs().max()
        assert changed > 1e-3
        assert torch.equal(made(WITHOUT, *data[:2]), made(WITHOUT, data.images, other))

    def test_of_the_image_nothing_but_its_tissues_comes_through(self):
        data = batch()
        fine = torch.tensor([1.0, -1.0]).repeat(16).view(1, 1, 1, 32) * torch.randn(3, 1, 32, 1)
        assert not torch.equal(data.images, data.images + fine)
        torch.testing.assert_close(made(MADE, *data[:2]), made(MADE, data.images + fine, data.labels))

    def test_it_is_made_by_the_sampler_in_the_steps_of_diffusion(self, monkeypatch):
        asked = []
        plain = Diffusion.sample
        monkeypatch.setattr(
            Diffusion, "sample", lambda self, *rest, **more: asked.append(rest[2]) or plain(self, *rest)
        )
        nets, data = built(MADE, awake=True), batch()
        first = MADE.shown(nets, *data[:2], CLASSES)
        torch.testing.assert_close(MADE.shown(nets, *data[:2], CLASSES), first, rtol=0, atol=0)
        torch.nn.init.zeros_(nets["generator"].enter.weight)
        assert torch.equal(MADE.shown(nets, *data[:2], CLASSES), first) and asked == [seg2med.STEPS] * 3
        torch.nn.init.zeros_(nets["sampler"].enter.weight)
        assert not torch.equal(MADE.shown(nets, *data[:2], CLASSES), first)

    @pytest.mark.parametrize("size", [(64, 64), (96, 96), (32, 48)])
    def test_sizes_come_back_and_every_weight_learns(self, size):
        nets, data = built(MADE, awake=True).train(), batch(size, 2)
        MADE.learn(nets, data, None, Moment(0, 9)).backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in nets["generator"].parameters())
        assert made(MADE, *data[:2]).shape == data.images.shape


@pytest.mark.component("tissue maps")
class TestTissues:
    def test_they_are_levels_of_straight_lines_between_means_of_blocks(self):
        images = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 1, 24, 16))).float() * 3
        means = images[:, 0].unflatten(1, (3, COARSE)).unflatten(3, (2, COARSE)).mean((2, 4)).numpy()
        found = tissue_maps(images)
        assert found.shape == (2, 3, 24, 16) and (found.sum(1) == 1).all()
        for row, column in ((0, 0), (5, 9), (11, 4), (23, 15), (13, 12)):
            down, across = (
                np.clip((place + 0.5) / COARSE - 0.5, 0, many - 1) for place, many in ((row, 3), (column, 2))
            )
            a, b = int(down), int(across)
            c, d = min(a + 1, 2), min(b + 1, 1)
            lines = [(1 - down + a) * means[:, a, k] + (down - a) * means[:, c, k] for k in (b, d)]
            value = (1 - across + b) * lines[0] + (across - b) * lines[1]
            assert found[:, :, row, column].argmax(1).tolist() == np.digitize(value, LEVELS).tolist()

    def test_they_hold_much_less_than_the_image(self):
        image = torch.randn(1, 1, 64, 64)
        shuffled = image.unflatten(2, (8, 8)).unflatten(4, (8, 8))[:, :, :, torch.randperm(8)].flatten(4).flatten(2, 3)
        assert not torch.equal(image, shuffled)
        torch.testing.assert_close(tissue_maps(image), tissue_maps(shuffled))


@pytest.mark.component("anatomical fidelity")
class TestFidelity:
    def test_every_arm_has_the_same_segmenter_to_the_last_bit(self):
        task, found = SmallTask("embedded", labelled=2, side=32), {}
        for name, method in METHODS.items():
            loop = Loop(
                replace(method, channels=(8, 8)), task, Budget(10, 4, "float32", 0), "float32", 3, None, None, None
            )
            loop.train, loop.progress = task.samples("labelled"), False
            found[name] = loop.run()
        first, *others = (
            {n: w for n, w in f.weights["last"].items() if n.startswith("average")} for f in found.values()
        )
        assert all(torch.equal(other[name], value) for other in others for name, value in first.items())
        assert any(
            not torch.equal(value, built(REAL)["average"].state_dict().get(n[8:], value)) for n, value in first.items()
        )
        assert len(found[recipe.compare[0]].history["loss"]) == 10

    def test_a_real_image_is_shown_as_it_is_and_needs_no_generator(self):
        data = batch()
        assert REAL.shown(built(REAL), *data[:2], CLASSES) is data.images and "generator" not in built(REAL)

    def test_rows_are_of_what_the_segmenter_finds_in_what_it_is_shown(self, monkeypatch):
        task = SmallTask("embedded", labelled=2, side=32)
        fitted = fit(replace(REAL, channels=(8, 8)), task, Budget(4, 4, "float32", 1), cache=False, progress=False)
        case = next(iter(task.cases("val")))
        images, labels = task.preparation.images(case), task.preparation.labels(case)
        rows = fidelity_rows(fitted, case)
        assert [row["structure"] for row in rows] == list(task.structures.values())
        assert all(row["ssim"] == pytest.approx(1) and row["psnr"] == 100 for row in rows)
        monkeypatch.setattr(fitted.method, "shown", lambda nets, images, labels, classes: images.flip(3))
        found = fitted.answer(images.flip(3)).argmax(1)
        for value, row in zip(task.structures, fidelity_rows(fitted, case), strict=True):
            both, size = ((found == value) & (labels == value)).sum(), (found == value).sum() + (labels == value).sum()
            assert row["dice"] == pytest.approx(float(2 * both / size) if size else 1.0)
            assert row["missed"] == bool((labels == value).any() and not (found == value).any()) and row["ssim"] < 1

    def test_masks_are_the_cases_own(self, monkeypatch):
        task, given = SmallTask("embedded", labelled=2, side=32), []
        fitted = fit(replace(MADE, channels=(8, 8)), task, Budget(6, 2, "float32", 1), cache=False, progress=False)
        assert len(fitted.nets["made"]) == 2
        case = next(iter(task.cases("val")))
        plain = fitted.method.maps
        monkeypatch.setattr(fitted.method, "maps", lambda *told: given.append(told) or plain(*told))
        fidelity_rows(fitted, case)
        assert torch.equal(given[0][1], task.preparation.labels(case)) and given[0][2] == task.classes


@pytest.mark.component("similarity to the real image")
def test_likeness_agrees_with_others():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(3, 1, 32, 32)).astype(np.float32)
    other = real + 0.3 * rng.normal(size=real.shape).astype(np.float32)
    low, high = np.quantile(real, [0.01, 0.99])
    a, b = (np.clip((image - low) / (high - low), 0, 1) for image in (other, real))
    found = alike(torch.from_numpy(other), torch.from_numpy(real))
    psnr = np.mean([peak_signal_noise_ratio(b[i], a[i], data_range=1) for i in range(3)])
    ssim = np.mean(
        [
            structural_similarity(b[i, 0], a[i, 0], data_range=1, gaussian_weights=True, use_sample_covariance=False)
            for i in range(3)
        ]
    )
    assert found["psnr"] == pytest.approx(psnr, rel=1e-3) and found["ssim"] == pytest.approx(ssim, abs=0.02)


@pytest.mark.component("one-step regression")
def test_the_network_that_does_not_diffuse_is_the_same_and_sees_maps_alone():
    once = METHODS["one step"]
    assert replace(once, diffuses=True) == MADE
    nets, data = built(once, awake=True), batch()
    same = built(MADE, awake=True)["generator"].state_dict()
    assert all(torch.equal(value, same[name]) for name, value in nets["generator"].state_dict().items())
    maps = once.maps(*data[:2], CLASSES)
    expected = nets["sampler"](torch.cat([torch.zeros(3, 1, 32, 32), maps], 1), torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(once.shown(nets, *data[:2], CLASSES), expected.detach())
    loss = once.learn(nets, data, None, Moment(0, 9))
    torch.testing.assert_close(loss, (expected - data.images).square().mean())


def test_the_ablation_lacks_the_masks_alone():
    assert replace(WITHOUT, told=True) == MADE and replace(REAL, making=1) == MADE
    with_masks, without = (method.maps(*batch()[:2], CLASSES) for method in (MADE, WITHOUT))
    assert torch.equal(with_masks[:, 3:], without[:, 3:]) and not without[:, :3].any() and with_masks[:, :3].any()
