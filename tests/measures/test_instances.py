"""Panoptic quality and the aggregated Jaccard index, against torchmetrics, a loop over the definition and by hand."""

import numpy as np
import pytest
import torch
from torchmetrics.detection import PanopticQuality

from medcook.measures import instances

NOTHING = np.zeros((4, 6), int)
TRUTH = np.array([[1, 1, 1, 0, 5, 5], [1, 1, 1, 0, 5, 5], [0, 0, 0, 0, 0, 0], [2, 2, 0, 0, 0, 0]])
"""Of 6, 4 and 2 pixels."""


@pytest.fixture
def scattered():
    """Pairs of maps of overlapping blocks."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(5):
        truth = np.zeros((24, 24), int)
        for number in range(1, 8):
            top, left = rng.integers(0, 18, 2)
            truth[top : top + 6, left : left + 6] = number
        found = np.roll(truth, rng.integers(-1, 2), 0) * 3
        found[rng.random(found.shape) < 0.2] = 0
        found[found == 6] = 3
        pairs.append((found, truth))
    return pairs


def test_panoptic_quality_is_that_of_torchmetrics(scattered):
    for found, truth in scattered:
        pair = [torch.from_numpy(np.stack([part > 0, part], -1)).int()[None] for part in (found, truth)]
        theirs = PanopticQuality(things={1}, stuffs={0}, return_per_class=True)(*pair)
        assert instances.quality(found, truth).panoptic == pytest.approx(float(theirs[0, 0]), abs=1e-6)


def test_panoptic_quality_by_hand():
    found = np.where(TRUTH == 5, 9, 0)
    found[0, :3], found[1, :2] = 4, 4
    panoptic, detection, segmentation = instances.quality(found, TRUTH)
    assert detection == pytest.approx(2 / (2 + 1 / 2)) and segmentation == pytest.approx((5 / 6 + 1) / 2)
    assert panoptic == pytest.approx(detection * segmentation)
    assert instances.quality(7 * TRUTH, TRUTH) == (1, 1, 1)
    assert instances.quality(NOTHING, TRUTH) == instances.quality(TRUTH, NOTHING) == (0, 0, 0)
    assert instances.quality(NOTHING, NOTHING) == (1, 1, 1)
    half = np.where(TRUTH == 1, TRUTH, 0)
    half[1] = 0
    assert instances.quality(half, TRUTH).detection == 0, "an overlap of exactly one half is none"


def by_its_definition(found, truth):
    """The algorithm of the paper, one instance after the other."""
    shared, together, used = 0, 0, set()
    for value in set(truth[truth > 0].tolist()):
        mine = truth == value
        ious = {
            other: (mine & (found == other)).sum() / (mine | (found == other)).sum() for other in set(found[mine]) - {0}
        }
        best = max(ious, key=ious.get) if ious else None
        shared += (mine & (found == best)).sum() if ious else 0
        together += (mine | (found == best)).sum() if ious else mine.sum()
        used.add(best)
    return shared / (together + sum((found == other).sum() for other in set(found[found > 0].tolist()) - used))


def test_the_aggregated_jaccard_index_is_its_definition(scattered):
    for found, truth in scattered:
        assert instances.aggregated_jaccard(found, truth) == pytest.approx(by_its_definition(found, truth))


def test_the_aggregated_jaccard_index_by_hand():
    found = np.where(TRUTH == 5, 3, 0)
    found[3, 4:] = 8
    assert instances.aggregated_jaccard(found, TRUTH) == pytest.approx(4 / (6 + 4 + 2 + 2))
    merged = (TRUTH > 0) * 1
    assert instances.aggregated_jaccard(merged, TRUTH) == pytest.approx(12 / 36)
    assert instances.aggregated_jaccard(2 * TRUTH, TRUTH) == 1 == instances.aggregated_jaccard(NOTHING, NOTHING)
    assert instances.aggregated_jaccard(NOTHING, TRUTH) == 0 == instances.aggregated_jaccard(TRUTH, NOTHING)
