"""A background and a few cut-outs: what is seen of each, how they are blended, and chains against Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage
from torch import nn

from medcook.data import IGNORE
from medcook.data.transforms import NONE
from medcook.losses import cross_entropy_and_dice
from medcook.methods import Batch, Moment
from medcook.recipes.synthesis import _chains, surgical_background
from medcook.recipes.synthesis._chains import OPERATIONS, chain, mixed
from medcook.recipes.synthesis.surgical_background import (
    MARGIN,
    Blended,
    SeedTask,
    blend,
    painted_over,
    recipe,
    standardised,
)

TINY = dict(channels=(4, 8))
NOW = Moment(0, 10)


class Sees(nn.Module):
    """A network that keeps what it is shown."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(1, 2, 1)

    def forward(self, images):
        self.seen = images
        return self.head(images)


def cells(count: int = 4, size: tuple[int, int] = (32, 40)) -> Batch:
    """Images with a bar of label 1 in each, at another place."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.zeros(count, *size, dtype=torch.uint8)
    for number in range(count):
        labels[number, 6 + number : 12 + number, 12:30] = 1
    return Batch(torch.randn(count, 1, *size, generator=rng) + 3 * labels[:, None], labels)


def backgrounds(count: int = 4, size: tuple[int, int] = (32, 40)) -> Batch:
    images = torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(1)).expand(count, -1, -1, -1)
    return Batch(images, torch.full((count, *size), IGNORE, dtype=torch.uint8))


def step(method: Blended, front: Batch, back: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the network is shown in a step, and its loss."""
    torch.manual_seed(0)
    nets = nn.ModuleDict({"model": Sees()})
    torch.manual_seed(3)
    loss = method.training_step(nets, front, back, NOW)
    return nets["model"].seen, loss


@pytest.mark.component("one background image")
class TestBackground:
    def bowl(self) -> np.ndarray:
        return ((np.arange(96) - 49.5) / 24)[None] ** 2 + ((np.arange(64) - 31.5) / 16)[:, None] ** 2

    def scene(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A grainy dish that is darkest in the middle, the same with a bright cell there, and where that is."""
        dish = self.bowl() + 0.5 * np.random.default_rng(0).standard_normal((64, 96))
        mask = np.zeros((64, 96), dtype=bool)
        mask[28:36, 40:60] = True
        return dish, np.where(mask, 9.0, dish), mask

    def test_what_is_not_near_the_cell_stays(self):
        _, image, mask = self.scene()
        far = ~ndimage.binary_dilation(mask, iterations=MARGIN)
        np.testing.assert_array_equal(painted_over(image, mask)[far], image[far].astype(np.float32))

    def test_the_hole_has_the_brightness_and_the_grain_of_its_surroundings(self):
        dish, image, mask = self.scene()
        found = painted_over(image, mask)
        hole = ndimage.binary_dilation(mask, iterations=MARGIN)
        for part in (np.s_[:, 36:50], np.s_[:, 50:64]):
            inside = hole[part]
            assert found[part][inside].mean() == pytest.approx(dish[part][inside].mean(), abs=0.5)
        residual = (found - self.bowl())[hole]
        assert residual.std() == pytest.approx(0.5, rel=0.25) and found[hole].max() < 4

    def test_it_is_the_first_seed_alone(self):
        task = SeedTask("embedded", labelled=3)
        seeds, found = task.samples("labelled"), task.samples("unlabelled")
        assert len(found) == 1 and (found.labels == IGNORE).all()
        first = seeds.images[(seeds.case_of == 0) & (seeds.labels != 0).flatten(1).any(1)][:1]
        same = (found.images == first).float().mean()
        assert 0.05 < same < 1
        alone = SeedTask("embedded", labelled=1).samples("unlabelled")
        assert torch.equal(found.images, alone.images)

    def test_all_that_lies_between_the_cells_is_background(self):
        """Whatever else an image with a cell shows leaves no trace."""
        method, front = Blended(**TINY, augmentation=NONE), cells()
        near = torch.nn.functional.max_pool2d(front.labels.float()[:, None], 9, 1, 4) > 0
        other = front._replace(images=torch.where(near, front.images, 1000.0))
        (seen, loss), (again, same) = (step(method, each, backgrounds()) for each in (front, other))
        torch.testing.assert_close(seen, again)
        assert loss.item() == pytest.approx(same.item(), rel=1e-5)

    def test_another_background_is_another_image(self):
        one, _ = step(Blended(**TINY, augmentation=NONE), cells(), backgrounds())
        other, _ = step(
            Blended(**TINY, augmentation=NONE), cells(), backgrounds()._replace(images=torch.rand(4, 1, 32, 40))
        )
        assert not torch.allclose(one, other, atol=0.1)


@pytest.mark.component("a few foreground images")
class TestForeground:
    def test_labels_are_the_masks_of_what_is_seen(self):
        """A foreground of 100 on 0: after standardisation the label is what is bright."""
        method = Blended(soft=0.0, second=0.0)
        front = cells()._replace(images=torch.full((4, 1, 32, 40), 100.0))
        images, labels = method.compose(front, torch.zeros(4, 1, 32, 40))
        assert torch.equal(labels, front.labels) and torch.equal(images[:, 0] > 0, labels > 0)

    def test_some_images_have_two_and_the_first_lies_above(self):
        torch.manual_seed(0)
        front = cells(2)
        images = torch.stack([torch.full((1, 32, 40), value) for value in (50.0, 100.0)])
        seen, labels = Blended(soft=0.0, second=1.0).compose(front._replace(images=images), torch.zeros(2, 1, 32, 40))
        assert torch.equal(labels > 0, (front.labels | front.labels.roll(1, 0)) > 0)
        top = seen[1, 0][(front.labels[1] > 0)].unique()
        assert len(top) == 1 and top.item() == pytest.approx(seen[1].max().item())
        assert len(seen[0].unique()) == 3
        many = cells(1000, (12, 31))
        found = Blended().compose(many._replace(labels=many.labels * 0 + 1), torch.zeros(1000, 1, 12, 31))[1]
        assert found.min() == 1

    def test_a_fifth_of_the_images_has_a_second(self):
        torch.manual_seed(0)
        labels = torch.zeros(1000, 2, 2, dtype=torch.uint8)
        labels[::2, 0, 0], labels[1::2, 1, 1] = 1, 1
        found = Blended().compose(Batch(torch.rand(1000, 1, 2, 2), labels), torch.rand(1000, 1, 2, 2))[1]
        assert ((found > 0).sum((1, 2)) == 2).float().mean().item() == pytest.approx(0.2, abs=0.04)

    def test_cells_and_dishes_move_each_on_their_own(self):
        method = Blended()
        rng = torch.Generator().manual_seed(0)
        front, back = method.augment(cells(), rng), method.augment(backgrounds(), rng)
        assert not torch.equal(front.labels, cells().labels)
        assert len({round(image.std().item(), 3) for image in back.images}) == 4
        inside = front.images[:, 0][front.labels > 0]
        assert inside.mean().item() == pytest.approx(3, abs=0.6)


@pytest.mark.component("blending")
class TestBlending:
    def test_the_border_is_a_blurred_mask(self):
        labels = cells().labels
        found = blend(torch.full((4, 1, 32, 40), 5.0), labels, torch.full((4, 1, 32, 40), -1.0), 1.0)
        for image, label in zip(found, labels, strict=True):
            share = ndimage.gaussian_filter(label.numpy().astype(float), 1.0, mode="nearest", truncate=3)
            np.testing.assert_allclose(image[0], 6 * share - 1, atol=1e-4)

    def test_without_blur_it_is_pasted(self):
        front, back = cells(), torch.rand(4, 1, 32, 40)
        assert torch.equal(
            blend(front.images, front.labels, back, 0.0), torch.where(front.labels[:, None] > 0, front.images, back)
        )


def picture() -> Image.Image:
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.standard_normal((40, 50)), 4)
    return Image.fromarray(np.uint8(30 + 170 * (smooth - smooth.min()) / np.ptp(smooth)))


def unit(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).float()[None] / 255


@pytest.mark.component("chained augmentation mixing")
class TestChains:
    @pytest.mark.parametrize("level", [0.5, 2.9])
    def test_operations_are_pillows(self, level):
        share = level * 1.8 / 10 + 0.1
        image = picture()
        expected = {
            "autocontrast": ImageOps.autocontrast(image),
            "equalize": ImageOps.equalize(image),
            "posterize": ImageOps.posterize(image, 4 - int(level * 4 / 10)),
            "solarize": ImageOps.solarize(image, 256 - int(level * 256 / 10)),
            "contrast": ImageEnhance.Contrast(image).enhance(share),
            "brightness": ImageEnhance.Brightness(image).enhance(share),
            "sharpness": ImageEnhance.Sharpness(image).enhance(share),
        }
        assert [operation.__name__ for operation in OPERATIONS] == list(expected)
        for operation in OPERATIONS:
            torch.testing.assert_close(
                operation(unit(image), level), unit(expected[operation.__name__]), atol=1.6 / 255, rtol=0
            )

    def test_flat_images_stay_flat(self):
        for operation in OPERATIONS:
            found = operation(torch.full((1, 8, 8), 0.5), 2.0)
            assert torch.isfinite(found).all() and found.std() < 1e-6

    def test_what_is_mixed_is_the_image_and_its_changed_versions(self, monkeypatch):
        """Chains that give 0, 0 and 1: what is left of the image x says m, and what is added says a weight."""
        image, kept, weights = torch.rand(1, 6, 7), [], []
        for seed in range(300):
            torch.manual_seed(seed)
            given = iter([0.0, 0.0, 1.0])
            monkeypatch.setattr(_chains, "chain", lambda x, most, given=given: torch.full_like(x, next(given)))
            found = mixed(image, 3, 3.0)
            slope, added = np.polyfit(image.flatten().numpy(), found.flatten().numpy(), 1)
            kept.append(slope), weights.append(added / (1 - slope))
        assert np.mean(kept) == pytest.approx(0.5, abs=0.06) and np.std(kept) == pytest.approx(12**-0.5, abs=0.03)
        assert np.mean(weights) == pytest.approx(1 / 3, abs=0.06) and min(weights) >= 0 and max(weights) <= 1
        assert np.std(weights) == pytest.approx(18**-0.5, abs=0.03)  # Dirichlet(1, 1, 1)

    def test_a_chain_has_one_to_three_operations_at_levels_up_to_the_most(self, monkeypatch):
        calls = []
        monkeypatch.setattr(_chains, "OPERATIONS", (lambda x, level: calls.append(level) or x + 1,))
        lengths = {int(chain(torch.zeros(1, 2, 2), 3.0).max()) for _ in range(60)}
        assert lengths == {1, 2, 3} and min(calls) >= 0.1 and 2.5 < max(calls) <= 3.0

    def test_no_pixel_moves(self):
        """Two halves, dark and bright, remain two halves."""
        image = torch.zeros(1, 8, 16)
        image[:, :, 8:] = 0.8
        for seed in range(30):
            torch.manual_seed(seed)
            found = mixed(image, 3, 3.0)
            assert found[0, :, :5].std() < 1e-5 and found[0, :, 11:].std() < 1e-5

    def test_every_image_of_a_step_is_mixed_anew_and_the_seed_decides(self):
        images, found = cells(1).images.expand(3, -1, -1, -1), []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            found.append(Blended().chained(images))
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
        assert not torch.allclose(found[0][0], found[0][1], atol=0.01)
        torch.testing.assert_close(found[0], standardised(found[0]))

    def test_the_ablation_differs_in_it_alone(self):
        arms = {name: arm.method.settings() for name, arm in recipe.arms.items()}
        differ = {key for key, value in arms["blended"].items() if arms["without chained mixing"][key] != value}
        assert differ == {"chains"} and recipe.ablation == ("blended", "without chained mixing")
        method = Blended(**TINY, augmentation=NONE, chains=0)
        seen, _ = step(method, cells(), backgrounds())
        torch.manual_seed(3)
        torch.randint(2**62, ())
        torch.testing.assert_close(seen, method.compose(cells(), backgrounds().images)[0], atol=1e-4, rtol=1e-4)


def test_nothing_but_what_was_composed_is_trained_on():
    method = Blended(**TINY, augmentation=NONE, chains=0, second=0.0)
    _, loss = step(method, cells(), backgrounds())
    torch.manual_seed(0)
    composed = standardised(blend(cells().images, cells().labels, backgrounds().images, 1.0))
    assert loss.item() == pytest.approx(cross_entropy_and_dice(Sees()(composed), cells().labels).item(), rel=1e-4)


def test_seeds_have_labels_and_arms_have_the_same_setting():
    task = recipe.scales["full"].task
    assert task.labelled == 3 and task.evaluation == "test" and task.dataset == "bubil"
    assert recipe.arms["all images"].changes == {"labelled": None}
    methods = [arm.method for arm in recipe.arms.values()]
    assert len({(m.channels, m.loss, m.rate, m.augmentation) for m in methods}) == 1
    assert surgical_background.LABELLED == 3


@pytest.mark.parametrize("size", [(32, 32), (37, 50)])
def test_any_size_and_precision(size):
    method = Blended(**TINY)
    for bfloat16 in (False, True):
        torch.manual_seed(0)
        nets = method.build(1, 2, 2)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            loss = method.training_step(nets, cells(4, size), backgrounds(4, size), NOW)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in nets["model"].parameters())
    assert method.predict(nets.eval(), cells(4, size).images).shape == (4, 2, *size)
