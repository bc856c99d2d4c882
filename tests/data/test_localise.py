"""The heart is found where things move."""

import numpy as np
import pytest

from medcook.data.datasets import open_dataset
from medcook.data.localise import OFFSET, heart_centre


def beating(centre: tuple[float, float], radius: float, shape=(4, 120, 160)) -> np.ndarray:
    y, x = np.ogrid[: shape[1], : shape[2]]
    disc = ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2).astype(np.float32)
    return np.broadcast_to(disc, shape)


def test_a_beating_disc_is_found_at_its_place_plus_the_mean_offset():
    frames = beating((70, 60), 20), beating((70, 60), 12)
    found = heart_centre(*frames)
    expected = 70 + OFFSET[0] * 160, 60 + OFFSET[1] * 160
    assert found == pytest.approx(expected, abs=1.0)
    assert heart_centre(*reversed(frames)) == pytest.approx(found)


def test_a_weaker_movement_elsewhere_changes_nothing():
    frames = beating((70, 60), 20), beating((70, 60), 12)
    elsewhere = 0.3 * beating((30, 130), 8)
    assert heart_centre(frames[0] + elsewhere, frames[1]) == pytest.approx(heart_centre(*frames), abs=1.0)


def test_nothing_moves_gives_the_middle():
    frame = beating((70, 60), 20)
    assert heart_centre(frame, frame) == (59.5, 79.5)


def test_a_window_of_half_the_long_side_holds_the_heart(mirror):
    """On train and val: 128 of 256 pixels around the found centre contain the heart in all but two patients."""
    dataset, missed = open_dataset("acdc"), []
    patients = dataset.split.train + dataset.split.val
    for patient in patients:
        case = dataset.load(dataset.patients[patient][0])
        half = max(case.spatial[1:]) / 4
        heart = np.argwhere(case.label.any(0))
        if (np.abs(heart - case.attributes["roi_centre"]) > half).any():
            missed.append(patient)
    assert len(missed) <= 2
