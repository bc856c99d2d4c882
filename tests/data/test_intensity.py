"""Intensities: each function against a closed form or MONAI, and the bias field there and back."""

import numpy as np
import pytest
from monai.transforms import NormalizeIntensity, ScaleIntensityRange

from medcook.data import intensity


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def brain():
    """(image, mask, main): a ball of tissue 100 with a dark core of 60, on a background of 5."""
    z, y, x = np.ogrid[-1:1:12j, -1:1:40j, -1:1:40j]
    radius = z**2 + y**2 + x**2
    image = np.where(radius < 0.1, 60.0, np.where(radius < 0.8, 100.0, 5.0)).astype(np.float32)
    return image, radius < 0.8, (radius >= 0.1) & (radius < 0.8)


def test_a_window_has_its_level_in_the_middle_and_its_width_between_black_and_white():
    seen = intensity.window(np.array([-1000, -160, 40, 240, 3000]), level=40, width=400)
    assert seen.tolist() == [0, 0, 0.5, 1, 1] and seen.dtype == np.float32


@pytest.mark.parametrize("name", intensity.WINDOWS)
def test_a_window_is_monais_intensity_range(name, rng):
    level, width = intensity.WINDOWS[name]
    hounsfield = rng.uniform(-1024, 3000, (3, 8, 8)).astype(np.float32)
    theirs = ScaleIntensityRange(level - width / 2, level + width / 2, 0, 1, clip=True)(hounsfield)
    assert np.allclose(intensity.window(hounsfield, level, width), theirs, atol=1e-6)


def test_zscore_is_monais_normalisation_and_does_not_mind_the_scale(rng):
    image = rng.gamma(2, 100, (4, 9, 9)).astype(np.float32)
    scored = intensity.zscore(image)
    assert np.allclose(scored, NormalizeIntensity()(image), atol=1e-5) and scored.dtype == np.float32
    assert np.allclose(scored, intensity.zscore(image * 1000 + 7), atol=1e-4)


def test_zscore_within_a_mask_leaves_the_background_out(brain):
    image, mask, _ = brain
    inside = intensity.zscore(image, mask)[mask]
    assert abs(inside.mean()) < 1e-4 and inside.std() == pytest.approx(1, abs=1e-4)


def test_zscore_of_a_constant_image_is_zero():
    assert not intensity.zscore(np.full((3, 3), 7, np.float32)).any()


def test_clipping_moves_single_bright_voxels_and_nothing_else():
    image = np.linspace(0, 1, 1001, dtype=np.float32)
    image[-1] = 1e6
    clipped = intensity.clip_percentiles(image, 1, 99)
    assert clipped.max() < 1 and clipped.dtype == np.float32
    assert np.array_equal(clipped[20:-20], image[20:-20])


@pytest.mark.parametrize("shape", [(16, 16), (6, 16, 16), (1, 16, 16)])
def test_a_bias_field_is_smooth_and_as_strong_as_asked(shape, rng):
    field = intensity.bias_field(shape, 0.4, rng)
    assert field.shape == shape and np.abs(np.log(field)).max() == pytest.approx(0.4, abs=1e-5)
    assert np.abs(np.diff(np.log(field), axis=-1)).max() < 0.4


def test_a_bias_field_of_no_strength_changes_nothing(rng):
    assert np.allclose(intensity.bias_field((8, 8), 0.0, rng), 1)


@pytest.mark.parametrize("seed", range(3))
def test_what_was_put_in_is_found_again_although_there_are_two_tissues(seed, brain):
    image, mask, main = brain
    field = intensity.bias_field(image.shape, 0.4, np.random.default_rng(seed))
    found = intensity.estimate_bias(image * field, mask)
    error = np.log(found / field)[mask]
    assert error.std() < 0.01
    corrected = intensity.remove_bias(image * field, mask)[main]
    assert corrected.std() / corrected.mean() < 0.01 < (image * field)[main].std() / 100


def test_an_image_without_bias_is_left_as_it_is(brain):
    image, mask, main = brain
    assert np.allclose(intensity.remove_bias(image, mask)[main], 100, rtol=0.01)


def test_voxels_of_zero_do_not_spoil_the_logarithm(brain):
    image, mask, _ = brain
    image[6, 20, 20] = 0
    assert np.isfinite(intensity.remove_bias(image, mask)).all()


def test_polynomials_are_all_products_up_to_the_degree():
    terms = intensity.polynomials((5, 7), order=2)
    assert terms.shape == (6, 5, 7) and (terms[0] == 1).all()
    assert np.linalg.matrix_rank(terms.reshape(6, -1)) == 6
