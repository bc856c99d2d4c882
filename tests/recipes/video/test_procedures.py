"""Stages of a procedure, both protocols of the benchmark, its measures."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn import metrics

from medcook.recipes.video import _procedures
from medcook.recipes.video._flights import centre_of
from medcook.recipes.video._procedures import Fold, frame_measures, stages_of
from medcook.recipes.video._settings import PROCEDURES_QUICK

VIDEOS = {cohort: [f"{cohort:03d}-{number:03d}" for number in range(1, 16)] for cohort in range(4)}
"""As in REAL-Colon: four cohorts of fifteen videos."""


def labels(*rows):
    """(S, 1, 3) label maps."""
    return torch.tensor(rows, dtype=torch.uint8)[:, None]


def test_a_slice_is_named_after_its_larger_structure():
    maps = labels([0, 0, 0], [2, 0, 0], [2, 2, 1], [0, 0, 0], [1, 1, 2], [1, 0, 0], [0, 0, 0])
    assert _procedures.regions(maps, (1, 2)).tolist() == [0, 4, 4, 4, 3, 3, 2]
    assert _procedures.regions(maps * 0, (1, 2)).tolist() == [0] * 7


def test_until_the_far_end_is_reached_everything_inside_is_insertion():
    of_slice = np.array([0, 4, 4, 3, 2])
    slices = np.array([0, 1, 2, 1, 0, 1, 3, 3, 4, 4, 3, 2, 3, 4, 2, 1, 0, 1])
    wanted = [0, 1, 1, 1, 0, 1, 1, 1, 2, 2, 3, 4, 3, 2, 4, 4, 0, 4]
    assert _procedures.stages(slices, of_slice).tolist() == wanted
    assert _procedures.stages(np.array([0, 1, 3]), of_slice).tolist() == [0, 1, 1]


def test_labels_are_the_stage_all_over_the_frame():
    case = next(PROCEDURES_QUICK.cases("val"))
    preparation = PROCEDURES_QUICK.preparation
    (flight,) = preparation.flights(case)
    found = stages_of(flight.labels[None])[0]
    assert (flight.labels == found[:, None, None]).all() and found[0] == 0 and found[-1] == 0
    of_slice = _procedures.regions(preparation.slices(case)[1], preparation.values)
    assert found.tolist() == _procedures.stages(flight.slices, of_slice).tolist()
    assert {0, 1, 2} < set(found.tolist()) <= set(PROCEDURES_QUICK.structures)
    assert PROCEDURES_QUICK.classes == len(PROCEDURES_QUICK.structures) == 6


class TestFiveFolds:
    folds = _procedures.five_folds(VIDEOS)

    def test_each_video_is_tested_once_and_nobody_has_two_parts(self):
        tested = [video for fold in self.folds for video in fold.test]
        assert len(self.folds) == 5 and sorted(tested) == sorted(sum(VIDEOS.values(), []))
        for fold in self.folds:
            assert sorted(fold.train + fold.val + fold.test) == sorted(tested)

    def test_each_cohort_gives_as_many_as_in_the_official_lists(self):
        for fold in self.folds:
            for cohort, videos in VIDEOS.items():
                counts = [sum(video in videos for video in part) for part in fold]
                assert counts == [11, 1, 3], cohort

    def test_it_is_drawn_and_always_the_same(self):
        assert self.folds == _procedures.five_folds({cohort: videos[::-1] for cohort, videos in VIDEOS.items()})
        assert self.folds[0].test != tuple(video for videos in VIDEOS.values() for video in videos[:3])


class TestFourFolds:
    folds = _procedures.four_folds(VIDEOS)

    def test_the_tested_cohort_was_never_seen(self):
        of = lambda part: {int(video[:3]) for video in part}  # noqa: E731
        assert [of(fold.test) for fold in self.folds] == [{3}, {2}, {1}, {0}]
        assert [of(fold.val) for fold in self.folds] == [{2}, {1}, {0}, {3}]
        assert [of(fold.train) for fold in self.folds] == [{0, 1}, {0, 3}, {2, 3}, {1, 2}]
        assert all(len(fold.train) == 30 and len(fold.test) == 15 for fold in self.folds)


class TestTask:
    def test_folds_zero_to_eight_are_both_protocols(self):
        tasks = [replace(PROCEDURES_QUICK, fold=number) for number in range(9)]
        everyone = sorted(tasks[0].data.split.train + tasks[0].data.split.val)
        assert sorted(p for task in tasks[:5] for p in task.val_patients) == everyone
        assert sorted(p for task in tasks[5:] for p in task.val_patients) == everyone
        for task in tasks:
            assert isinstance(task.protocol, Fold) and task.protocol.train == task.labelled_patients
            assert not {*task.labelled_patients} & {*task.val_patients, *task.protocol.val}
        for task in tasks[5:]:
            tested = {centre_of(patient) for patient in task.val_patients}
            assert len(tested) == 1 and not tested & {centre_of(patient) for patient in task.labelled_patients}

    def test_without_a_fold_it_is_the_committed_split(self):
        task = replace(PROCEDURES_QUICK, fold=None)
        assert task.protocol is None and task.val_patients == task.data.split.val
        assert task.labelled_patients == task.data.split.train


@pytest.mark.parametrize("seed", range(4))
def test_measures_are_scikits(seed):
    rng = np.random.default_rng(seed)
    found, truth = rng.integers(0, 4, 60), rng.integers(0, 5, 60)  # class 5 is nowhere, class 4 never found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = {
            "accuracy": metrics.accuracy_score(truth, found),
            "macro_f1": metrics.f1_score(truth, found, average="macro"),
            "weighted_f1": metrics.f1_score(truth, found, average="weighted"),
            "jaccard": metrics.jaccard_score(truth, found, average="macro"),
            "weighted_jaccard": metrics.jaccard_score(truth, found, average="weighted"),
            "withdrawal": abs((found >= 2).sum() - (truth >= 2).sum()) / (truth >= 2).sum(),
        }
    assert frame_measures(found, truth, 6) == pytest.approx(wanted)


def test_perfect_and_wrong_answers():
    truth = np.array([0, 1, 2, 3])
    assert frame_measures(truth, truth, 5) == dict.fromkeys(frame_measures(truth, truth, 5), 1.0) | {"withdrawal": 0.0}
    assert frame_measures(0 * truth + 4, truth, 5)["weighted_f1"] == 0
