"""The drawn nodules: what tells a malignant one from a benign one, where they lie, and what recipes get of them."""

import numpy as np
import pytest
import torch

from medcook.data import IGNORE
from medcook.recipes.findings import _nodules
from medcook.recipes.findings._settings import NODULES_QUICK

SIZE, CENTRE = (96, 96), (48.0, 48.0)


def drawn(degree, radius=5.0, seed=0):
    return _nodules.shaped(degree, radius, CENTRE, SIZE, np.random.default_rng(seed))


def test_a_smooth_nodule_is_a_disc():
    bright, mask = drawn(0.0)
    rows, columns = np.indices(SIZE)
    distance = np.hypot(rows - 48, columns - 48)
    assert (mask == (distance <= 5)).all()
    assert (bright[distance > 6] == 0).all() and bright[distance < 4].min() >= 0.85


def test_a_malignant_one_is_uneven_and_reaches_beyond_its_body():
    rows, columns = np.indices(SIZE)
    around = np.hypot(rows - 48, columns - 48) > 7.5
    light = [np.mean([drawn(degree, seed=seed)[0][around].sum() for seed in range(8)]) for degree in (0, 0.3, 0.6, 1)]
    assert light[0] == 0 and sorted(light) == light and light[3] > 5

    def unevenness(mask):
        places = np.argwhere(mask & ~np.roll(mask, 1, 0) | mask & ~np.roll(mask, -1, 0))
        return np.hypot(*(places - 48).T).std()

    assert unevenness(drawn(1.0)[1]) > 2 * unevenness(drawn(0.0)[1])


def test_sizes_scale_with_the_image():
    small = _nodules.shaped(0.0, 5.0, (24.0, 24.0), (48, 48), np.random.default_rng(0))[1]
    assert small.sum() == pytest.approx(drawn(0.0)[1].sum() / 4, rel=0.15)


def test_one_nodule_lies_in_the_lungs_and_its_kind_is_its_label():
    lungs = np.zeros(SIZE, bool)
    lungs[20:80, 10:40] = lungs[20:80, 55:85] = True
    image, kinds = np.zeros(SIZE), []
    for seed in range(12):
        painted, label = _nodules.with_nodule(image, lungs, np.random.default_rng(seed))
        values = set(np.unique(label)) - {0}
        kinds += values
        assert len(values) == 1 and lungs[tuple(np.argwhere(label).mean(0).round().astype(int))]
        assert painted[label > 0].mean() > 0.6
    assert set(kinds) == {_nodules.BENIGN, _nodules.MALIGNANT}
    painted, label = _nodules.with_nodule(image, np.zeros(SIZE, bool), np.random.default_rng(0))
    assert not label.any() and (painted == image).all()


def test_the_case_decides_what_is_drawn():
    case = next(iter(NODULES_QUICK.cases("val")))
    one, other = (NODULES_QUICK.preparation.both(case) for _ in range(2))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_patches_have_the_nodule_in_their_middle():
    images, labels = torch.rand(3, 1, 20, 20), torch.zeros(3, 20, 20, dtype=torch.uint8)
    labels[0, 4:7, 9:12], labels[1, 0, 0], labels[2] = 2, 1, IGNORE
    found = _nodules.patches(images, labels, 8)
    assert found.shape == (3, 1, 8, 8)
    assert torch.equal(found[0, 0], images[0, 0, 1:9, 6:14])
    assert torch.equal(found[1, 0, 4:, 4:], images[1, 0, :4, :4]) and not found[1, 0, :4].any()
    assert torch.equal(found[2, 0], images[2, 0, 6:14, 6:14])
    assert _nodules.malignant(labels).tolist() == [True, False, False]


def test_rows_tell_score_outcome_and_size():
    case = next(iter(NODULES_QUICK.cases("val")))
    labels = torch.zeros(3, 20, 20, dtype=torch.uint8)
    labels[0, :5, :5], labels[2, 3, 3:6] = 2, 1
    rows = _nodules.nodule_rows(torch.tensor([0.9, 0.5, 0.2]), case, labels)
    assert [row["structure"] for row in rows] == ["nodule 1", "nodule 3"]
    assert [row["outcome"] for row in rows] == [1, 0] and rows[0]["score"] == pytest.approx(0.9)
    assert rows[0]["radius"] == pytest.approx((25 / np.pi) ** 0.5)
