"""Metrics against closed forms and MONAI, and the policy where libraries have none."""

import math

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric, compute_average_surface_distance, compute_hausdorff_distance
from scipy.ndimage import binary_erosion

from medcook import metrics
from medcook.data.case import IGNORE
from medcook.errors import MedcookError


def block(shape, start, size):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))] = True
    return mask


def ball(shape, centre, radius):
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return np.linalg.norm(grid - np.array(centre), axis=-1) <= radius


def random_pair(rng, shape):
    """Two overlapping random masks: blocks plus speckle, touching the border now and then."""
    masks = []
    for _ in range(2):
        start = [rng.integers(0, n - 3) for n in shape]
        mask = block(shape, start, [rng.integers(2, n) for n in shape])
        masks.append(mask ^ (rng.random(shape) < 0.03))
    return masks


def monai(function, pred, truth, **options):
    as_batch = [torch.from_numpy(mask)[None, None].float() for mask in (pred, truth)]
    return float(function(*as_batch, include_background=True, **options))


SPACINGS = {2: [None, (1.0, 1.0), (0.7, 2.5)], 3: [None, (3.0, 1.0, 0.5)]}


@pytest.mark.parametrize("shape", [(17, 23), (9, 12, 14)])
@pytest.mark.parametrize("seed", range(12))
def test_surface_distances_equal_monai(shape, seed):
    pred, truth = random_pair(np.random.default_rng(seed), shape)
    for spacing in SPACINGS[len(shape)]:
        expected = monai(compute_hausdorff_distance, pred, truth, percentile=95, spacing=spacing)
        assert metrics.hd95(pred, truth, spacing) == pytest.approx(expected, rel=1e-5)
        expected = monai(compute_hausdorff_distance, pred, truth, spacing=spacing)
        assert metrics.hausdorff(pred, truth, spacing) == pytest.approx(expected, rel=1e-5)
        expected = monai(compute_average_surface_distance, pred, truth, symmetric=True, spacing=spacing)
        assert metrics.assd(pred, truth, spacing) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_score_agrees_with_the_single_metrics(seed):
    pred, truth = random_pair(np.random.default_rng(seed), (8, 11, 10))
    spacing = (2.0, 1.0, 0.5)
    score = metrics.score(pred, truth, spacing)
    assert score.dice == metrics.dice(pred, truth)
    assert score.iou == metrics.iou(pred, truth)
    assert score.hd95 == metrics.hd95(pred, truth, spacing)
    assert score.assd == metrics.assd(pred, truth, spacing)
    assert score.n_voxels == truth.sum()


def test_shifted_cubes_have_the_closed_form():
    truth, pred = block((30, 30, 30), (5, 5, 5), (10, 10, 10)), block((30, 30, 30), (9, 5, 5), (10, 10, 10))
    assert metrics.dice(pred, truth) == pytest.approx(0.6)
    assert metrics.iou(pred, truth) == pytest.approx(6 / 14)
    assert metrics.hausdorff(pred, truth, (2.0, 1.0, 1.0)) == pytest.approx(8.0)
    assert metrics.hausdorff(pred, truth) == pytest.approx(4.0)


def test_parallel_planes_have_the_closed_form():
    truth, pred = block((20, 8, 8), (3, 0, 0), (1, 8, 8)), block((20, 8, 8), (10, 0, 0), (1, 8, 8))
    for measure in (metrics.assd, metrics.hd95, metrics.hausdorff):
        assert measure(pred, truth, (1.5, 1.0, 1.0)) == pytest.approx(10.5)


def test_concentric_balls_are_a_shell_apart():
    truth, pred = ball((41, 41, 41), (20, 20, 20), 12), ball((41, 41, 41), (20, 20, 20), 16)
    assert metrics.assd(pred, truth) == pytest.approx(4.0, abs=0.25)
    assert metrics.dice(pred, truth) == pytest.approx(2 * 12**3 / (12**3 + 16**3), abs=0.01)


def test_dice_equals_monai_where_both_are_defined():
    pred, truth = random_pair(np.random.default_rng(7), (12, 15))
    metric = DiceMetric(include_background=True)
    expected = metric(torch.from_numpy(pred)[None, None].float(), torch.from_numpy(truth)[None, None].float())
    assert metrics.dice(pred, truth) == pytest.approx(float(expected))


def test_hd95_takes_the_larger_direction():
    truth = block((40, 5), (0, 0), (1, 5))
    pred = truth | block((40, 5), (39, 2), (1, 1))
    assert metrics.hd95(pred, truth) == metrics.hd95(truth, pred) > 0


def test_both_empty_is_perfect_and_no_miss():
    empty = np.zeros((6, 8), dtype=bool)
    score = metrics.score(empty, empty, (1.0, 1.0))
    assert (score.dice, score.iou, score.hd95, score.assd) == (1, 1, 0, 0)
    assert not score.missed and not score.false_alarm
    assert metrics.hd95(empty, empty) == metrics.assd(empty, empty) == 0


def test_a_missed_structure_costs_the_diagonal():
    truth, empty = block((6, 8), (1, 1), (2, 2)), np.zeros((6, 8), dtype=bool)
    score = metrics.score(empty, truth, (2.0, 2.0))
    assert (score.dice, score.hd95, score.assd) == (0, 20, 20)
    assert score.missed and not score.false_alarm
    assert metrics.hd95(empty, truth, (2.0, 2.0)) == metrics.assd(empty, truth, (2.0, 2.0)) == 20


def test_a_false_alarm_is_told_from_a_miss():
    pred, empty = block((6, 8), (1, 1), (2, 2)), np.zeros((6, 8), dtype=bool)
    score = metrics.score(pred, empty)
    assert score.false_alarm and not score.missed
    assert (score.dice, score.hd95, score.unit) == (0, 10, "pixels")
    assert math.isnan(score.volume_ratio)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("missing", ["prediction", "truth", "both"])
def test_libraries_have_no_finite_answer_for_empty_masks_and_we_do(missing):
    full, empty = block((6, 8), (1, 1), (2, 2)), np.zeros((6, 8), dtype=bool)
    pred = full if missing == "truth" else empty
    truth = full if missing == "prediction" else empty
    assert not math.isfinite(monai(compute_average_surface_distance, pred, truth, symmetric=True))
    assert not math.isfinite(monai(compute_hausdorff_distance, pred, truth, percentile=95))
    assert math.isfinite(metrics.assd(pred, truth)) and math.isfinite(metrics.hd95(pred, truth))


def test_library_dice_averages_empty_truth_away_and_ours_counts_the_false_alarm():
    full, empty = block((6, 8), (1, 1), (2, 2)), np.zeros((6, 8), dtype=bool)
    metric = DiceMetric(include_background=True)
    assert torch.isnan(metric(torch.from_numpy(full)[None, None].float(), torch.from_numpy(empty)[None, None].float()))
    assert metrics.dice(full, empty) == 0


def test_without_spacing_distances_are_called_pixels():
    mask = block((6, 8), (1, 1), (2, 2))
    assert metrics.score(mask, mask).unit == "pixels"
    assert metrics.score(mask, mask, (1.0, 1.0)).unit == "mm"


def test_volumes_carry_the_spacing():
    truth, pred = block((9, 9, 9), (1, 1, 1), (2, 2, 2)), block((9, 9, 9), (1, 1, 1), (4, 2, 2))
    score = metrics.score(pred, truth, (2.0, 1.0, 0.5))
    assert score.volume_difference == pytest.approx(8.0)
    assert score.volume_ratio == pytest.approx(2.0)


def test_cropping_changes_nothing():
    small = random_pair(np.random.default_rng(3), (9, 9))
    large = [np.pad(mask, 25) for mask in small]
    assert metrics.hd95(*large) == metrics.hd95(*small)
    assert metrics.assd(*large) == metrics.assd(*small)


def test_ignored_voxels_count_on_neither_side():
    label = np.array([[1, 1, IGNORE, 0], [1, 1, IGNORE, 0]], dtype=np.uint8)
    pred = np.array([[1, 1, 1, 0], [1, 1, 1, 0]], dtype=np.uint8)
    kept_pred, kept_label = metrics.without_ignored(pred, label)
    assert metrics.dice(kept_pred == 1, kept_label == 1) == 1
    assert IGNORE not in kept_label


def test_wrong_shapes_and_spacings_are_named():
    mask = block((6, 8), (1, 1), (2, 2))
    with pytest.raises(MedcookError, match="shape"):
        metrics.dice(mask, mask[:-1])
    for spacing in [(1.0,), (1.0, 0.0), (1.0, math.nan)]:
        with pytest.raises(MedcookError, match="Spacing"):
            metrics.hd95(mask, mask, spacing)


@pytest.mark.parametrize("shape", [(40,), (17, 23), (1, 9, 12), (6, 11, 8)])
def test_the_surface_is_what_erosion_takes(shape):
    rng = np.random.default_rng(0)
    for density in (0.5, 0.9, 0.99, 1.0):
        mask = rng.random(shape) < density
        assert np.array_equal(metrics.surface(mask), mask & ~binary_erosion(mask))


def test_an_empty_mask_has_no_surface():
    mask = block((6, 8), (1, 1), (2, 2))
    with pytest.raises(MedcookError, match="no surface"):
        metrics.surface_distances(mask, np.zeros_like(mask))
