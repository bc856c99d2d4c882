"""The small detector against other implementations: its targets, its loss, its boxes and what measures them."""

import numpy as np
import pytest
import torch
from monai.data.box_utils import non_max_suppression
from monai.metrics import compute_froc_curve_data, compute_froc_score

from medcook.recipes.findings import _detection
from medcook.recipes.findings._detection import (
    RATES,
    Detector,
    cpm,
    detection_loss,
    detections,
    froc,
    heat_loss,
    heat_of,
    kinds_of_findings,
    levels_at,
    mean_average_precision,
    objects_of,
    one_kind,
    peaks,
    sides_loss,
    spread,
    suppressed,
    true_boxes,
)
from medcook.recipes.language._findings import FINDINGS, KINDS


def labels_with(*boxes: tuple[int, int, int, int], size: int = 32) -> torch.Tensor:
    """A label map (1, size, size) with boxes of the values 1, 2, ..."""
    labels = torch.zeros(1, size, size, dtype=torch.uint8)
    for value, (top, left, bottom, right) in enumerate(boxes, 1):
        labels[0, top:bottom, left:right] = value
    return labels


def perfect(boxes: torch.Tensor, size: int, stride: int, kinds: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Heat and sides of a detector that is sure of boxes (N, 4) of the first kind."""
    heat, sides = torch.full((kinds, size, size), -9.0), torch.zeros(4, size, size)
    for number, (top, left, bottom, right) in enumerate(boxes.tolist()):
        row, column = int((top + bottom) / 2 / stride), int((left + right) / 2 / stride)
        down, across = (row + 0.5) * stride, (column + 0.5) * stride
        heat[0, row, column] = 9.0 - number
        sides[:, row, column] = torch.tensor([down - top, across - left, bottom - down, right - across])
    return heat, (sides.clamp_min(0.1) / stride).log()


def test_objects_are_the_values_of_each_image_without_what_is_unlabelled():
    labels = torch.cat([labels_with((2, 3, 7, 9), (20, 20, 24, 31)), labels_with()])
    labels[1, :4] = 255
    labels[1, 10:12, 5:6] = 36
    image, values, boxes = objects_of(labels)
    assert image.tolist() == [0, 0, 1] and values.tolist() == [1, 2, 36]
    assert boxes.tolist() == [[2, 3, 7, 9], [20, 20, 24, 31], [10, 5, 12, 6]]
    assert true_boxes(labels[0], one_kind, 1) == [[(2, 3, 7, 9), (20, 20, 24, 31)]]
    assert all(len(part) == 0 for part in objects_of(torch.zeros(2, 8, 8).byte()))


def test_kinds_are_those_of_the_findings():
    numbers = kinds_of_findings(torch.arange(1, len(FINDINGS) + 1))
    assert [KINDS[k] for k in numbers.tolist()] == [finding.kind for finding in FINDINGS]


def test_heat_is_one_in_the_middle_and_a_gaussian_around_it():
    labels = labels_with((4, 4, 16, 28), (10, 10, 13, 13))
    objects = objects_of(labels)
    heat = heat_of((objects[0], torch.tensor([0, 0]), objects[2]), torch.Size((1, 2, 16, 16)), 2)
    one = lambda r, c, dev: np.exp(-((np.arange(16)[:, None] - r) ** 2 + (np.arange(16) - c) ** 2) / 2 / dev**2)  # noqa: E731
    assert np.allclose(heat[0, 0], np.maximum(one(5, 8, 1.0), one(5, 5, 0.5)), atol=1e-6) and not heat[0, 1].any()


def test_focal_loss_is_centernets():
    torch.manual_seed(0)
    logits, target = torch.randn(1, 2, 4, 4), torch.rand(1, 2, 4, 4)
    target[0, 0, 1, 2] = target[0, 1, 3, 3] = 1.0
    known, total = torch.ones(1, 1, 4, 4), 0.0
    known[..., 0] = 0
    for k, row, column in np.ndindex(2, 4, 3):
        p, y = torch.sigmoid(logits[0, k, row, column + 1]), target[0, k, row, column + 1]
        total += (1 - p) ** 2 * p.log() if y == 1 else (1 - y) ** 4 * p**2 * (1 - p).log()
    assert torch.isclose(heat_loss(logits, target, known), -total / 2, atol=1e-6)


def test_loss_of_sides_is_that_of_overlaps_near_the_middles():
    labels = labels_with((4, 6, 14, 20))
    objects = objects_of(labels)
    _, sides = perfect(objects[2], 16, 2)
    sides[:, 3:6, 5:8] = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(1))
    losses = []
    for row, column in np.ndindex(16, 16):
        down, across = 2 * row + 1, 2 * column + 1
        if abs(down - 9) >= 3 or abs(across - 13) >= 3:
            continue
        top, left, bottom, right = (2 * sides[:, row, column].exp()).tolist()
        found = torch.tensor([down - top, across - left, down + bottom, across + right])
        losses.append(-torch.log(_detection.box_iou(found, objects[2][0])))
    assert len(losses) == 9
    assert torch.isclose(sides_loss(sides[None], objects, 2), torch.stack(losses).mean(), atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_what_minimises_the_loss_gives_the_true_boxes_back(stride):
    labels = labels_with((4, 6, 14, 20), (20, 3, 25, 8), (17, 20, 29, 30))
    boxes = objects_of(labels)[2]
    heat, sides = perfect(boxes, 32 // stride, stride)
    found = detections(heat, sides, stride)[0][:3]
    assert np.allclose([box for _, box in found], boxes, atol=1e-4)
    worse = detection_loss([((torch.full_like(heat, -2.0)[None], sides[None] + 1), stride)], labels, one_kind)
    assert detection_loss([((heat[None], sides[None]), stride)], labels, one_kind) < worse


def test_nothing_to_find_is_no_error():
    heat, sides = torch.zeros(2, 3, 8, 8, requires_grad=True), torch.zeros(2, 4, 8, 8, requires_grad=True)
    loss = detection_loss([((heat, sides), 2)], torch.zeros(2, 16, 16).byte(), kinds_of_findings)
    loss.backward()
    assert torch.isfinite(loss) and heat.grad.abs().max() > 0
    unlabelled = detection_loss([((heat, sides), 2)], torch.full((2, 16, 16), 255).byte(), kinds_of_findings)
    assert unlabelled == 0


def test_suppression_is_monais():
    rng = np.random.default_rng(0)
    corner, size = rng.uniform(0, 20, (40, 2)), rng.uniform(2, 12, (40, 2))
    boxes, scores = torch.tensor(np.hstack([corner, corner + size])), torch.tensor(rng.random(40))
    for overlap in (0.1, 0.3, 0.5):
        kept = suppressed(boxes, scores, overlap)
        assert kept == non_max_suppression(boxes, scores, overlap).tolist() and 1 < len(kept) < 40


def test_peaks_are_local_maxima_of_each_kind_the_surest_first():
    heat = torch.full((2, 8, 8), -5.0)
    heat[0, 2, 2], heat[0, 2, 3], heat[1, 2, 3], heat[1, 6, 6] = 3.0, 2.0, 1.0, 2.5
    scores, kinds, boxes = peaks(heat, torch.zeros(4, 8, 8), 2, most=3)
    assert kinds.tolist() == [0, 1, 1] and torch.allclose(scores, torch.tensor([3.0, 2.5, 1.0]).sigmoid())
    assert boxes[0].tolist() == [3, 3, 7, 7]


def test_average_precision_of_a_case_done_by_hand():
    """Ranks 1, 3 and 4 are right, of four: precisions 1, 2/3, 3/4 at recalls 1/4, 2/4, 3/4; what is later lifts what
    is earlier. Of the second kind, which is nowhere, nothing is said; the third is missed."""
    true = [(0, 0, 4, 4), (10, 10, 14, 14)]
    images = [
        ([(0.9, true[0]), (0.8, (20, 20, 24, 24)), (0.7, true[1])], true),
        ([(0.6, true[0]), (0.5, true[0])], true),
    ]
    by_hand = (26 * 1 + 25 * 3 / 4 + 25 * 3 / 4 + 25 * 0) / 101
    assert mean_average_precision([images]) == pytest.approx(by_hand)
    nowhere, missed = [([(0.9, true[0])], [])], [([], true)]
    assert mean_average_precision([images, nowhere, missed]) == pytest.approx(by_hand / 2)
    assert np.isnan(mean_average_precision([nowhere]))


def made_up(count: int = 12):
    rng, images = np.random.default_rng(1), []
    for _ in range(count):
        true = [(int(x), 0, int(x) + 4, 4) for x in (0, 10, 20)[: rng.integers(1, 4)]]
        found = [(float(rng.random()), (s := int(rng.integers(0, 40)), 0, s + 4, 4)) for _ in range(8)]
        images.append((found, true))
    return images


def test_free_response_curve_is_monais():
    images = made_up()
    rows = [row for found, true in images for row in _detection.matched(found, true, 0.1)]
    wrong, right = (np.array([score for score, is_right in rows if is_right == kind]) for kind in (False, True))
    false, sensitivity = compute_froc_curve_data(wrong, right, sum(len(true) for _, true in images), len(images))
    _, mine, found = froc(images)
    assert np.allclose(mine[:-1], false[-2::-1]) and np.allclose(found[:-1], sensitivity[-2::-1])
    theirs = compute_froc_score(false, sensitivity, RATES)
    assert cpm(images, levels_at(images)) == pytest.approx(theirs, abs=0.05), "there, between points lies a line"


def test_at_its_levels_a_curve_has_no_more_false_positives_than_asked_for():
    images = made_up()
    levels, false, sensitivity = froc(images)
    chosen = levels_at(images)
    assert list(chosen) == sorted(chosen, reverse=True)
    for rate, level in zip(RATES, chosen, strict=True):
        reached = levels >= level
        assert false[reached].max(initial=0) <= rate and (reached.all() or false[~reached].min() > rate)
    best = [max(sensitivity[false <= rate], default=0.0) for rate in RATES]
    assert cpm(images, chosen) == pytest.approx(np.mean(best))
    assert cpm([([], [(0, 0, 4, 4)])], chosen) == 0 and levels_at([([], [])]) == (np.inf,) * len(RATES)


def test_classes_share_the_heat_of_their_kind():
    torch.manual_seed(0)
    heat = torch.rand(2, 3, 4, 4)
    found = spread(heat, 37, kinds_of_findings)
    assert torch.allclose(found.sum(1), torch.ones(2, 4, 4)) and torch.allclose(found[:, 0], (1 - heat).prod(1))
    assert torch.allclose(found[:, 1:13].sum(1) / found[:, 13:25].sum(1), heat[:, 0] / heat[:, 1])
    assert torch.allclose(spread(heat[:, :1], 3, one_kind)[:, 1:], heat[:, :1].expand(-1, 2, -1, -1) / 2)


@pytest.mark.parametrize(("size", "skip"), [((64, 64), 1), ((33, 47), 1), ((16, 18), 0)])
def test_any_size_comes_back_and_the_pyramid_hands_down(size, skip):
    torch.manual_seed(0)
    net = Detector(1, 3, (4, 8, 8), 8, skip).eval()
    stride = 2**skip
    heat, sides = net(torch.zeros(2, 1, *size))
    assert heat.shape == (2, 3, size[0] // stride, size[1] // stride) and sides.shape[1] == 4
    assert torch.allclose(heat.sigmoid(), torch.full_like(heat, 0.1), atol=0.05)
    maps = net.pyramid(torch.randn(1, 1, *size))
    assert [each.shape[2] for each in maps] == [size[0] // 2**k for k in range(skip, 3)]
    before = net.pyramid(torch.zeros(1, 1, *size))[0]
    with torch.no_grad():
        net.across[-1].bias.add_(1)
    assert not torch.allclose(net.pyramid(torch.zeros(1, 1, *size))[0], before), "the finest hears of the coarsest"
