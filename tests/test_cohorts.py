"""Tasks on part of a data set, with every rater, and on facts about patients."""

import dataclasses

import numpy as np
import pytest
import torch

from medcook.cohorts import CohortTask, GroupTask, OutcomeTask, RaterTask, outcome_rows
from medcook.data import IGNORE
from medcook.errors import MedcookError
from medcook.methods import Batch, Classifier, Supervised
from medcook.methods.classification import image_labels
from medcook.tasks import Budget
from medcook.training import Loop, fit


def test_a_cohort_keeps_only_the_patients_asked_for():
    task = CohortTask("embedded", keep=(("site", "island"),))
    for patients in (task.labelled_patients, task.val_patients):
        assert patients and all(task.data.attributes(p)["site"] == "island" for p in patients)
    assert set(task.labelled_patients) < set(CohortTask("embedded").labelled_patients)


def test_nobody_left_is_said():
    with pytest.raises(MedcookError, match="no patient has {'site': 'moon'}"):
        _ = CohortTask("embedded", keep=(("site", "moon"),)).labelled_patients


def test_raters_come_with_their_images_and_move_with_them():
    task = RaterTask("embedded", labelled=2)
    samples = task.samples("labelled")
    assert samples.raters.shape == (len(samples), 3, *samples.images.shape[2:])
    case = task.data.load(task.labelled_patients[0])
    assert np.array_equal(samples.raters[0, 1].numpy(), case.raters[1, 0])
    everyone = samples.labels[:, None].expand_as(samples.raters)
    batch = Batch(samples.images, samples.labels, raters=everyone)
    moved = Supervised().augment(batch, torch.Generator().manual_seed(0))
    assert not torch.equal(moved.labels, samples.labels)
    assert all(torch.equal(moved.raters[:, k], moved.labels) for k in range(3))


def test_augmentation_is_the_same_with_and_without_raters():
    samples = RaterTask("embedded", labelled=1).samples("labelled")
    plain, full = Batch(samples.images, samples.labels), Batch(samples.images, samples.labels, raters=samples.raters)
    views = [Supervised().augment(batch, torch.Generator().manual_seed(3)) for batch in (plain, full)]
    assert torch.equal(views[0].images, views[1].images) and torch.equal(views[0].labels, views[1].labels)


def test_the_loop_hands_raters_to_the_method():
    task, seen = RaterTask("embedded", labelled=1), []

    class Watching(Supervised):
        def training_step(self, nets, labelled, unlabelled, now):
            seen.append(labelled.raters.shape)
            return super().training_step(nets, labelled, unlabelled, now)

    budget = Budget(1, batch=2, precision="float32", checks=0)
    Loop(Watching(), task, budget, "float32", 0, task.samples("labelled"), None, None, progress=False).run()
    assert seen == [(2, 3, 96, 96)]


def test_a_changed_rater_changes_the_hash():
    samples = RaterTask("embedded", labelled=1).samples("labelled")
    other = dataclasses.replace(samples, raters=samples.raters.flip(1))
    assert samples.hash() != other.hash() != dataclasses.replace(samples, raters=None).hash()


def test_one_annotation_is_not_enough_for_raters():
    task = RaterTask("embedded", labelled=1)
    case = dataclasses.replace(task.data.load(task.labelled_patients[0]), raters=None)
    object.__setattr__(task, "cases", lambda role: [case])
    with pytest.raises(MedcookError, match="one annotation an image"):
        task.samples("labelled")


def test_groups_come_with_their_samples():
    task = GroupTask("embedded", attribute="site")
    assert task.group_names == ("island", "north", "south", "")
    for role in ("labelled", "val"):
        samples, cases = task.samples(role), list(task.cases(role))
        names = [task.group_names[number] for number in samples.groups]
        assert names == [cases[number].attributes["site"] for number in samples.case_of]


def test_false_is_a_group_and_not_unknown():
    task = GroupTask("embedded", attribute="sick")
    assert [task.group_of({"sick": sick}) for sick in (False, True, None)] == ["False", "True", ""]


def test_the_unknown_are_a_group_of_their_own():
    task = GroupTask("embedded", attribute="shoe size")
    assert task.group_names == ("",) and set(task.samples("val").groups.tolist()) == {0}


def test_the_loop_hands_groups_to_the_method():
    task, seen = GroupTask("embedded", labelled=4), []
    samples = task.samples("labelled")

    class Watching(Supervised):
        def training_step(self, nets, labelled, unlabelled, now):
            seen.append(torch.equal(labelled.groups, samples.groups[labelled.index]))
            return super().training_step(nets, labelled, unlabelled, now)

    budget = Budget(2, batch=8, precision="float32", checks=0)
    Loop(Watching(channels=(4, 8)), task, budget, "float32", 0, samples, None, None, progress=False).run()
    assert seen == [True, True] and len(samples.groups.unique()) > 1


def test_a_changed_group_changes_the_hash():
    samples = GroupTask("embedded", labelled=1).samples("labelled")
    other = dataclasses.replace(samples, groups=samples.groups + 1)
    assert samples.hash() != other.hash() != dataclasses.replace(samples, groups=None).hash()


ATROPHY = OutcomeTask("embedded", outcome="group", positive="atrophy")


def test_an_outcome_fills_the_image():
    samples = ATROPHY.samples("labelled")
    cases = list(ATROPHY.cases("labelled"))
    for number, case in enumerate(cases):
        expected = float(case.attributes["group"] == "atrophy")
        assert samples.labels[samples.case_of == number].float().unique().tolist() == [expected]
    assert ATROPHY.classes == 2 and ATROPHY.structures == {1: "group"}


def test_the_commonest_label_wins_over_the_border():
    labels = torch.zeros(3, 10, 10, dtype=torch.uint8)
    labels[0, :2] = 1
    labels[1, 0, 0] = 1
    labels[2] = IGNORE
    assert image_labels(labels, 2).tolist() == [1, 0, 0]


def test_a_classifier_runs_through_the_loop_and_scores_cases():
    fitted = fit(Classifier(channels=(8, 16)), ATROPHY, Budget(steps=2, batch=4, checks=0), progress=False, cache=False)
    case = next(iter(ATROPHY.cases("val")))
    probabilities = fitted.probabilities(case)
    assert probabilities.shape == (2, *case.spatial)
    (found,) = outcome_rows(fitted, case, group="sex")
    assert 0 < found["score"] < 1 and found["group"] == case.attributes["sex"]
    assert found["outcome"] == float(case.attributes["group"] == "atrophy")
    unknown = dataclasses.replace(case, attributes=case.attributes | {"group": None})
    assert outcome_rows(fitted, unknown) == []


def test_a_classifier_learns_brightness():
    """Its defining property: it can tell images by what fills them."""
    torch.manual_seed(0)
    method, outcome = Classifier(channels=(8, 16), dropout=0.0), torch.arange(16) % 2
    images = torch.randn(16, 1, 16, 16) * 0.1 + outcome.view(-1, 1, 1, 1)
    labels = outcome.view(-1, 1, 1).expand(16, 16, 16).to(torch.uint8)
    nets = method.build(1, 2, 2)
    optimiser = torch.optim.Adam(nets["model"].parameters(), 1e-2)
    for _ in range(30):
        loss = method.training_step(nets, Batch(images, labels), None, None)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    nets["average"] = nets["model"].eval()
    found = method.predict(nets, images)
    assert found.shape == (16, 2, 16, 16)
    assert (found[:, 1, 0, 0].round().long() == outcome).all()
