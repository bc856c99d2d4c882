"""Flights: the path, what is seen on it, what disturbs it, and that labels stay those of the slice."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from medcook import volumes
from medcook.data import Case
from medcook.recipes.video import _flights
from medcook.recipes.video._flights import CENTRES, DISTURBANCES, FlightTask, centre_of

BRAINS = FlightTask("embedded", frames=24, side=32)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_a_leg_arrives_with_rests_and_steps_back():
    ways = [_flights.leg(60, rng(seed)) for seed in range(20)]
    for way in ways:
        assert len(way) == 60 and way[0] == 0 and way[-1] == 1 and way.min() >= 0 and way.max() <= 1
    steps = np.concatenate([np.diff(way) for way in ways])
    assert (steps < -0.002).mean() > 0.05 and (abs(steps) < 0.002).mean() > 0.1 and (steps > 0.002).mean() > 0.4


def test_a_course_reaches_the_far_end_and_comes_back():
    turns = []
    for seed in range(20):
        way = _flights.course(80, rng(seed))
        assert len(way) == 80 and way[0] == way[-1] == 0 and way.max() == 1
        turns.append(int(way.argmax()))
    assert min(turns) > 8 and len(set(turns)) > 5


def test_frames_are_slices_or_lie_between_them():
    images, labels = torch.randn(4, 10, 12), torch.randint(0, 3, (4, 10, 12)).byte()
    still = torch.zeros(4, 3)
    frames, seen = _flights.filmed(images, labels, np.array([0.0, 2.0, 1.25, 3.0]), still)
    torch.testing.assert_close(frames[:2], images[[0, 2]], atol=1e-5, rtol=0)
    torch.testing.assert_close(frames[2], 0.75 * images[1] + 0.25 * images[2], atol=1e-5, rtol=0)
    assert torch.equal(seen, labels[[0, 2, 1, 3]])


def test_image_and_labels_drift_and_roll_together():
    labels = torch.zeros(1, 20, 20, dtype=torch.uint8)
    labels[0, 5:9, 8:14] = 1
    images = labels.float()
    sway = torch.tensor([[2 * 3 / 20, -2 * 2 / 20, 0.0], [0.0, 0.0, 90.0]])
    frames, seen = _flights.filmed(images, labels, np.zeros(2), sway)
    assert torch.equal(seen[0], labels[0].roll((-3, 2), (0, 1)))
    assert torch.equal(seen[1], labels[0].rot90(1)) or torch.equal(seen[1], labels[0].rot90(-1))
    assert torch.equal(frames > 0.5, seen == 1)


def test_each_disturbance_is_what_its_name_says():
    frame = rng().random((30, 30))
    changed = {kind: _flights.disturbed(frame, kind, 0.8, rng(1)) for kind in DISTURBANCES}
    np.testing.assert_allclose(changed["darkness"], 0.24 * frame)
    np.testing.assert_allclose(changed["haze"], 0.32 * frame + 0.68 * 0.8)
    np.testing.assert_allclose(changed["blur"], ndimage.gaussian_filter(frame, 0.8 * 1.8))
    assert (changed["noise"] - frame).std() == pytest.approx(0.2, rel=0.1)
    for kind in DISTURBANCES:
        np.testing.assert_allclose(_flights.disturbed(frame, kind, 0.0, rng()), frame)
    with pytest.raises(ValueError, match="fog"):
        _flights.disturbed(frame, "fog", 1.0, rng())


def test_bursts_leave_all_other_frames_alone():
    frames = torch.randn(200, 12, 12)
    found, kinds = _flights.with_bursts(frames, 5.0, rng(3))
    torch.testing.assert_close(found[kinds < 0], frames[kinds < 0], atol=1e-5, rtol=0)
    assert set(kinds[kinds >= 0]) <= set(range(len(DISTURBANCES))) and 0.1 < (kinds >= 0).mean() < 0.9
    assert (found[kinds >= 0] - frames[kinds >= 0]).abs().mean() > 0.2
    assert (_flights.with_bursts(frames, 0.0, rng())[1] < 0).all()


def test_there_are_as_many_bursts_as_asked_for():
    starts = [
        np.flatnonzero(np.diff((_flights.bursts_of(400, 1.0, rng(seed))[1] > 0).astype(int)) > 0) for seed in range(40)
    ]
    assert np.mean([len(found) for found in starts]) == pytest.approx(4, abs=1)


def test_planes_across_another_axis_stand_upright():
    volume = rng().random((5, 6, 7)).astype(np.float32)
    case = Case(volume[None], (volume > 0.5).astype(np.uint8), "a", "a")
    turned = _flights.sliced(case, 1)
    for number in range(6):
        assert np.array_equal(turned.image[0, number], volumes.plane(volume, 1, number))
        assert np.array_equal(turned.label[number], volumes.plane(case.label, 1, number))
    assert np.array_equal(_flights.sliced(case, 0).image, case.image)


def test_a_flight_shows_its_slices_with_their_own_labels(monkeypatch):
    monkeypatch.setattr(_flights, "wander", lambda frames, rng: np.zeros(frames))
    task = replace(BRAINS, many=0.0)
    case = next(task.cases("val"))
    images, labels = task.preparation.slices(case)
    assert len(images) == 8 + 2 * _flights.MARGIN["embedded"] and not labels[[0, 1, -2, -1]].any()
    (flight,) = task.preparation.flights(case)
    assert torch.equal(flight.labels, labels[flight.slices]) and flight.slices.max() == len(images) - 1
    number = int((flight.labels > 0).flatten(1).sum(1).argmax())
    pair = torch.stack([flight.frames[number], images[flight.slices[number]]]).flatten(1)
    alike = torch.corrcoef(pair)[0, 1]
    assert alike > 0.9 and flight.frames.mean().abs() < 1e-4 and flight.frames.std() == pytest.approx(1, abs=1e-3)


def test_the_case_decides_how_it_is_flown_through():
    task = replace(BRAINS, versions=2)
    first, second = [case for case, _ in zip(task.cases("val"), range(2), strict=False)]
    one, other = (task.preparation.flights(first) for _ in range(2))
    assert all(
        torch.equal(a.frames, b.frames) and (a.slices == b.slices).all() for a, b in zip(one, other, strict=True)
    )
    assert (one[0].slices != one[1].slices).any() and (
        task.preparation.flights(second)[0].slices != one[0].slices
    ).any()
    images, labels = task.preparation.both(first)
    assert images.shape == (2, 1, 24, 32, 32) and labels.shape == (2, 24, 32, 32)
    assert torch.equal(images[1, 0], one[1].frames) and torch.equal(labels[1], one[1].labels)


def test_a_centre_changes_what_is_seen_and_nothing_else():
    plain, filmed = BRAINS.preparation, replace(BRAINS, centres=True).preparation
    cases = list(BRAINS.cases("labelled"))
    assert {centre_of(case.patient_id) for case in cases} == set(range(len(CENTRES)))
    for case in cases[:8]:
        (one,), (other,) = plain.flights(case), filmed.flights(case)
        assert torch.equal(one.frames, other.frames) == (centre_of(case.patient_id) == 0)
        assert torch.equal(one.labels, other.labels)
        assert (one.slices == other.slices).all() and (one.bursts == other.bursts).all()


def test_what_it_counts_as():
    assert BRAINS.data_kind == "simulated" and FlightTask("hippocampus").data_kind == "real-anatomy-simulated"
    samples = BRAINS.samples("val")
    assert samples.images.shape[1:] == (1, 24, 32, 32) and samples.labels.shape[1:] == (24, 32, 32)
