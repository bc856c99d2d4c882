"""Augmentation: image and label move together, each image by a draw of its own, and only where asked to."""

import pytest
import torch

from medcook.data import transforms
from medcook.data.transforms import NONE, Augment

MOVES = Augment(gamma=0, contrast=0, brightness=0, noise=0)
STILL = dict(rotate=0, scale=0, shift=0, gamma=0, contrast=0, brightness=0, noise=0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blob(batch: int, dims: int, size: int = 32) -> torch.Tensor:
    """(batch, *size) uint8: the same off-centre box in each."""
    label = torch.zeros(batch, *[size] * dims, dtype=torch.uint8)
    label[(slice(None), slice(10, 19), *[slice(12, 25)] * (dims - 1))] = 1
    return label


def dice(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


@pytest.fixture
def widest(monkeypatch):
    """Every draw takes the end of its range."""
    monkeypatch.setattr(transforms, "_uniform", lambda count, half_width, rng: torch.full((count,), float(half_width)))


@pytest.mark.parametrize("dims", [2, 3])
def test_image_and_label_move_together(dims):
    label = blob(6, dims)
    image, moved = MOVES(label[:, None].float(), label, generator())
    assert image.shape == (6, 1, *[32] * dims) and moved.shape == label.shape and moved.dtype == torch.uint8
    for number in range(6):
        assert dice(image[number, 0] > 0.5, moved[number] == 1) > 0.95
    assert min(dice(label[n] == 1, moved[n] == 1) for n in range(6)) < 0.8


def test_labels_take_no_values_in_between():
    label = blob(6, 2) * 200
    _, moved = MOVES(label[:, None].float(), label, generator())
    assert set(moved.unique().tolist()) == {0, 200}


def test_each_image_has_its_own_draw():
    label = blob(4, 2)
    image, moved = Augment()(label[:, None].float(), label, generator())
    for first in range(4):
        for second in range(first):
            assert not torch.equal(moved[first], moved[second])
    bright, _ = Augment(**{**STILL, "brightness": 0.5})(label[:, None].float(), None, generator())
    assert len({round(float(level), 4) for level in bright[:, 0, 0, 0]}) == 4


def test_the_same_generator_gives_the_same_batch():
    image, label = torch.rand(3, 2, 16, 16), blob(3, 2, 16)
    first, again, other = (Augment(flip=True)(image, label, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_none_changes_nothing():
    image, label = torch.randn(3, 2, 16, 16), blob(3, 2, 16)
    same, same_label = NONE(image, label, generator())
    assert torch.allclose(same, image, atol=1e-4) and torch.equal(same_label, label)


def test_images_without_labels():
    image, label = Augment()(torch.rand(2, 1, 8, 8), None, generator())
    assert image.shape == (2, 1, 8, 8) and label is None


def test_flips_mirror_the_last_axis_of_about_half_the_images():
    image = torch.rand(1, 1, 8, 8).expand(16, 1, 8, 8)
    flipped, _ = Augment(**STILL, flip=True)(image, None, generator())
    mirrored = [torch.allclose(one, image[0].flip(-1), atol=1e-4) for one in flipped]
    kept = [torch.allclose(one, image[0], atol=1e-4) for one in flipped]
    assert 3 <= sum(mirrored) <= 13 and sum(mirrored) + sum(kept) == 16


def test_a_quarter_turn(widest):
    image, label = torch.rand(1, 1, 8, 8), blob(1, 2)[:, 8:16, 8:16].contiguous()
    turned, turned_label = Augment(**{**STILL, "rotate": 90})(image, label, generator())
    ways = [k for k in (1, 3) if torch.allclose(turned, image.rot90(k, (2, 3)), atol=1e-4)]
    assert len(ways) == 1
    assert torch.equal(turned_label, label.rot90(ways[0], (1, 2)))


def test_a_shift_by_a_part_of_the_half_image(widest):
    image = torch.rand(1, 1, 8, 8)
    shifted, _ = Augment(**{**STILL, "shift": 0.5})(image, None, generator())
    assert torch.allclose(shifted[..., :6, :6], image[..., 2:, 2:], atol=1e-4)


def test_a_scale_is_a_factor_on_a_log_scale(widest):
    ramp = torch.linspace(-1, 1, 64).expand(1, 1, 64, 64)
    scaled, _ = Augment(**{**STILL, "scale": 0.25})(ramp, None, generator())
    slope = float(scaled[0, 0, 32, 40] - scaled[0, 0, 32, 24]) / float(ramp[0, 0, 32, 40] - ramp[0, 0, 32, 24])
    assert slope == pytest.approx(torch.exp(torch.tensor(0.25)).item(), abs=1e-3)


def test_a_window_beyond_the_image_is_background_for_the_label(widest):
    label = torch.ones(1, 8, 8, dtype=torch.uint8)
    image, moved = Augment(**{**STILL, "shift": 0.5})(label[:, None].float(), label, generator())
    assert (moved[:, :, 6:] == 0).all() and (moved[:, :6, :6] == 1).all()
    assert torch.allclose(image, torch.ones_like(image), atol=1e-4)  # the border goes on


def test_contrast_and_brightness_in_closed_form(widest):
    image = torch.rand(2, 1, 8, 8)
    changed, _ = Augment(**{**STILL, "contrast": 0.35, "brightness": 0.3})(image, None, generator())
    assert torch.allclose(changed, image * torch.exp(torch.tensor(0.35)) + 0.3, atol=1e-4)


def test_gamma_bends_the_range_and_keeps_its_ends(widest):
    image = torch.linspace(2, 6, 64).view(1, 1, 8, 8)
    bent, _ = Augment(**{**STILL, "gamma": 0.4})(image, None, generator())
    expected = 2 + 4 * ((image - 2) / 4) ** torch.exp(torch.tensor(0.4))
    assert torch.allclose(bent, expected, atol=1e-3)


def test_noise_has_the_strength_asked_for_at_most():
    image = torch.zeros(8, 1, 64, 64)
    noisy, _ = Augment(**{**STILL, "noise": 0.15})(image, None, generator())
    spread = noisy.flatten(1).std(1)
    assert spread.max() < 0.16 and spread.min() > 0 and spread.max() > 2 * spread.min()


def test_a_constant_image_stays_finite():
    image, _ = Augment()(torch.full((4, 2, 8, 8), 3.0), None, generator())
    assert torch.isfinite(image).all()
