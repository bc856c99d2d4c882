"""Calibration against torchmetrics, scikit-learn, and forecasters whose calibration is known."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss
from torchmetrics.classification import MulticlassCalibrationError

from medcook.measures.calibration import brier, expected_calibration_error, reliability, temper


def forecast(classes=3, size=(20, 30), seed=0):
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(classes, 0.5), size=size).astype(np.float32)
    return np.moveaxis(probabilities, -1, 0), rng.integers(0, classes, size).astype(np.uint8)


@pytest.mark.parametrize("bins", [1, 10, 15, 50])
def test_ece_agrees_with_torchmetrics(bins):
    probabilities, labels = forecast()
    theirs = MulticlassCalibrationError(3, n_bins=bins, norm="l1")
    flat = torch.from_numpy(probabilities.reshape(3, -1).T.copy())
    expected = theirs(flat, torch.from_numpy(labels.reshape(-1).astype(int))).item()
    assert expected_calibration_error(probabilities, labels, bins) == pytest.approx(expected, abs=1e-5)
    assert expected_calibration_error(torch.from_numpy(probabilities), labels, bins) == pytest.approx(
        expected, abs=1e-5
    )


def test_a_perfect_forecaster_makes_no_error():
    labels = forecast()[1]
    certain = np.moveaxis(np.eye(3)[labels], -1, 0)
    assert expected_calibration_error(certain, labels) == 0 and brier(certain, labels) == 0


def test_a_forecaster_that_is_right_as_often_as_it_says_is_calibrated():
    """Says 0.75 and is right in three of four; the same with 0.95 is wrong by 0.2."""
    labels = np.array([1, 1, 1, 0] * 50)
    for said, error in ((0.75, 0.0), (0.95, 0.2)):
        probabilities = np.stack([np.full(200, 1 - said), np.full(200, said)])
        assert expected_calibration_error(probabilities, labels) == pytest.approx(error)


def test_reliability_adds_up():
    probabilities, labels = forecast()
    confidence, accuracy, share = reliability(probabilities, labels, 10)
    assert share.sum() == pytest.approx(1)
    assert np.nansum(share * accuracy) == pytest.approx((probabilities.argmax(0) == labels).mean())
    assert np.nansum(share * confidence) == pytest.approx(probabilities.max(0).mean(), abs=1e-6)
    low, high = np.arange(10) / 10, np.arange(1, 11) / 10
    there = share > 0
    assert (confidence[there] >= low[there]).all() and (confidence[there] <= high[there]).all()
    assert np.isnan(confidence[~there]).all() and not there[:3].any()  # three classes: the top one has 1/3 or more


def test_what_is_unlabelled_does_not_count():
    probabilities, labels = forecast()
    hidden = labels.copy()
    hidden[:7] = 255
    for measure in (expected_calibration_error, brier):
        assert measure(probabilities, hidden) == pytest.approx(measure(probabilities[:, 7:], labels[7:]))
        assert math.isnan(measure(probabilities, np.full_like(labels, 255)))


@pytest.mark.parametrize("classes", [2, 4])
def test_brier_agrees_with_scikit_learn(classes):
    probabilities, labels = forecast(classes)
    flat = probabilities.reshape(classes, -1).T.astype(float)
    flat /= flat.sum(1, keepdims=True)
    expected = brier_score_loss(labels.reshape(-1), flat, labels=range(classes), scale_by_half=True)
    assert brier(probabilities, labels) == pytest.approx(expected, abs=1e-6)


def test_tempering_divides_the_logits():
    logits = torch.randn(2, 3, 5, 5) * 3
    tempered = temper(logits.softmax(1), 2.5, axis=1)
    assert torch.allclose(tempered, (logits / 2.5).softmax(1), atol=1e-5)
    array = logits.softmax(1)[0].numpy()
    assert np.allclose(temper(array, 1.0), array, atol=1e-6) and isinstance(temper(array, 2.0), np.ndarray)
