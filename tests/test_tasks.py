"""Tasks: roles never share a patient, the test patients are out of reach, unlabelled means unlabelled."""

import sys
from pathlib import Path

import pytest
import torch

from medcook.data import IGNORE, open_dataset
from medcook.data.manifests import load_manifest, manifest_names
from medcook.errors import MedcookError
from medcook.paths import cache_dir
from medcook.tasks import Prepared, Samples, Task, VolumeTask, _prepared, prepare, shared_dataset

COMMITTED = [name for name in manifest_names() if load_manifest(name).splits]


def roles(task: Task) -> list[set[str]]:
    return [
        set(task.labelled_patients),
        set(task.unlabelled_patients),
        set(task.val_patients),
        set(task.data.split.test),
    ]


def tasks(dataset: str) -> list[Task]:
    drawn = [Task(dataset, labelled=count, draw=draw) for count in (1, 3) for draw in range(4)]
    return [Task(dataset), *drawn, *[Task(dataset, fold=fold) for fold in range(5)]]


@pytest.mark.parametrize("dataset", COMMITTED)
def test_no_patient_has_two_roles(dataset):
    for task in tasks(dataset):
        found = roles(task)
        assert found[0] and found[2]
        assert len(set().union(*found)) == sum(map(len, found)), task


@pytest.mark.parametrize("dataset", COMMITTED)
def test_held_out_folds_make_up_train_and_val(dataset):
    split = open_dataset(dataset).split
    folds = [Task(dataset, fold=fold) for fold in range(5)]
    held_out = [patient for task in folds for patient in task.val_patients]
    assert sorted(held_out) == sorted(split.train + split.val)
    assert not set(held_out) & set(split.test)
    for task in folds:
        assert sorted(task.labelled_patients + task.val_patients) == sorted(split.train + split.val)


def test_labelled_and_unlabelled_make_up_train():
    task = Task("embedded", labelled=2, draw=1)
    assert len(task.labelled_patients) == 2
    assert sorted(task.labelled_patients + task.unlabelled_patients) == sorted(task.data.split.train)
    assert Task("embedded").unlabelled_patients == ()


def test_draws_differ_and_stay():
    chosen = [Task("embedded", labelled=3, draw=draw).labelled_patients for draw in range(3)]
    assert len(set(chosen)) == 3 and chosen[0] == open_dataset("embedded").split.train[:3]
    assert Task("embedded", labelled=3, draw=2).labelled_patients == chosen[2]


def test_fold_and_labelled_exclude_each_other():
    with pytest.raises(MedcookError, match="either `fold` or `labelled`"):
        Task("embedded", labelled=2, fold=1).samples("labelled")


def test_unlabelled_cases_lose_their_labels():
    data = shared_dataset("embedded")
    task = Task("embedded", labelled=len(data.split.train) - 1)
    samples = task.samples("unlabelled")
    assert len(samples) == 8 and (samples.labels == IGNORE).all()
    assert samples.images.std() > 0.5  # the images are there
    kept = prepare(data, task.preparation, task.unlabelled_patients)
    assert set(kept.labels.unique().tolist()) == {0, 1, 2, 3}  # blanked in a copy


def test_samples_keep_cases_together_and_in_order():
    task = Task("embedded", labelled=2)
    samples = task.samples("labelled")
    assert samples.case_of.tolist() == [0] * 8 + [1] * 8
    second = list(task.cases("labelled"))[1]
    assert torch.equal(samples.images[8:], task.preparation.images(second))
    assert torch.equal(samples.labels[8:], task.preparation.labels(second))


def test_a_case_is_read_once_and_other_processes_have_files_of_their_own(monkeypatch):
    task, read = Task("embedded", labelled=2), []
    load = task.data.load
    monkeypatch.setattr(task.data, "load", lambda case_id: read.append(case_id) or load(case_id))
    prepared = Prepared(task.data, task.preparation)
    case_id = next(task.cases("labelled")).case_id
    read.clear()
    first, again = prepared(case_id), prepared(case_id)
    assert read == [case_id] and all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert _prepared(task.data, task.preparation, 1) is not _prepared(task.data, task.preparation, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped")
def test_samples_lie_in_a_file():
    samples = Task("embedded", labelled=2).samples("labelled")
    for tensor in (samples.images, samples.labels):
        lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
        ranges = [(*(int(end, 16) for end in line[0].split("-")), line[-1]) for line in lines]
        [where] = [name for start, end, name in ranges if start <= tensor.data_ptr() < end]
        assert where.startswith(str(cache_dir())) and where.endswith("(deleted)")


def test_one_voxel_changes_the_hash():
    def samples():
        return Samples(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2))

    image, label, shape = samples(), samples(), samples()
    image.images[1, 0, 3, 3] = 1e-6
    label.labels[1, 3, 3] = 1
    shape.images = shape.images.view(2, 1, 2, 8)
    assert samples().hash() == samples().hash()
    assert len({part.hash() for part in (samples(), image, label, shape)}) == 4


def test_test_patients_are_out_of_reach():
    task = Task("embedded", evaluation="test")
    for read in (task.samples, task.cases):
        with pytest.raises(AttributeError):
            read("test")
    with pytest.raises(MedcookError, match="is a test case"):
        prepare(task.data, task.preparation, task.data.split.test[:1])
    with pytest.raises(MedcookError, match="is a test case"):
        next(task.data.cases(task.data.split.test))


def test_val_selects_only_where_test_is_scored():
    assert Task("embedded", evaluation="test").select and not Task("embedded").select


def test_every_field_is_part_of_the_identity():
    others = [dict(labelled=2), dict(draw=1), dict(fold=1), dict(folds=4), dict(evaluation="test")]
    identities = [str(Task("embedded", **changes).describe()) for changes in ({}, *others)]
    assert len(set(identities)) == 1 + len(others) and str(Task("acdc").describe()) not in identities


def test_classes_come_from_the_manifest():
    task = Task("embedded")
    assert task.classes == 4 and list(task.structures) == [1, 2, 3]


def test_no_patients_is_said():
    with pytest.raises(MedcookError, match="no cases"):
        prepare(shared_dataset("embedded"), Task("embedded").preparation, ())


def test_the_embedded_cohort_as_volumes():
    assert VolumeTask("embedded").preparation.dims == 3
    assert VolumeTask("hippocampus").preparation.size == (32, 56, 40)
