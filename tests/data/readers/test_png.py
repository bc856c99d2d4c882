"""PNG: grey values, masks either way round, label maps."""

import numpy as np
import pytest
from PIL import Image

from medcook.data.readers.png import read_gray, read_labels, read_mask
from medcook.errors import MedcookError

MASK = np.array([[0, 255, 255], [0, 0, 255]], np.uint8)


def save(path, array):
    Image.fromarray(array).save(path)
    return path


def test_gray_values_are_kept_and_colour_is_averaged(tmp_path):
    gray = read_gray(save(tmp_path / "a.png", MASK))
    assert gray.dtype == np.float32 and np.array_equal(gray, MASK)
    colour = np.stack([MASK, MASK * 0, MASK * 0], -1)
    assert np.allclose(read_gray(save(tmp_path / "b.png", colour)), MASK / 3)


@pytest.mark.parametrize("stored", [MASK, MASK > 0, np.stack([MASK] * 3, -1)])
def test_masks_of_any_kind_and_inverted_ones(tmp_path, stored):
    path = save(tmp_path / "a.png", stored)
    assert np.array_equal(read_mask(path), MASK // 255)
    assert np.array_equal(read_mask(path, inverted=True), 1 - MASK // 255)


def test_black_mask_is_empty(tmp_path):
    assert read_mask(save(tmp_path / "a.png", MASK * 0)).sum() == 0


def test_colour_is_no_label_map(tmp_path):
    with pytest.raises(MedcookError, match="a.png: a label map needs one channel, not 3"):
        read_labels(save(tmp_path / "a.png", np.stack([MASK] * 3, -1)))


def test_truncated_file_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (50, 50), dtype=np.uint8)
    path = save(tmp_path / "a.png", noise)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(MedcookError, match="a.png: not a readable PNG"):
        read_gray(path)
