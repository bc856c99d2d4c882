"""The tasks of chapter 14: what is source and what is target, and that a simulated scanner changes images alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from medcook import domains
from medcook.data import IGNORE
from medcook.domains import LOOKS, PLAIN, DomainTask, Look, LooksTask, as_shown, shown
from medcook.errors import MedcookError
from medcook.evidence import data_kind
from medcook.preparation import zscore
from medcook.tasks import Task

SITES = DomainTask("embedded", source="north", target="south")
SCANNERS = DomainTask("embedded", look="negative")


@pytest.fixture
def images():
    return zscore(torch.randn(3, 1, 20, 24, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", list(LOOKS))
def test_a_look_keeps_shape_mean_and_variance(images, name):
    found = shown(images, LOOKS[name], np.random.default_rng(0))
    assert found.shape == images.shape and found.dtype == torch.float32
    assert found.mean().abs() < 1e-5 and found.std().item() == pytest.approx(1, abs=1e-4)


def test_an_empty_look_changes_nothing(images):
    assert torch.allclose(shown(images, Look(), np.random.default_rng(0)), images, atol=1e-6)


def test_a_curve_maps_brightness_and_holds_it_beyond_its_ends(images):
    found = shown(images, Look(((-1, 1), (1, -1))), np.random.default_rng(0))
    assert torch.allclose(found, zscore(-images.clamp(-1, 1)), atol=1e-5)


def test_blur_is_a_gaussian_within_each_image(images):
    found = shown(images, Look(blur=2.0), np.random.default_rng(0))
    wanted = np.stack([ndimage.gaussian_filter(image, 2.0) for image in images[:, 0].numpy()])
    assert torch.allclose(found[:, 0], zscore(torch.from_numpy(wanted)), atol=1e-5)


def test_shade_is_a_smooth_factor_above_zero():
    flat = torch.ones(1, 1, 64, 64)
    flat[..., :32] = -1
    found = shown(flat, Look(shade=0.3), np.random.default_rng(0))[0, 0]
    factor = torch.cat([-found[:, :32], found[:, 32:]], dim=1)  # up to the mean, which is nearly zero
    assert (factor > 0).all() and factor.std() > 0.1
    assert factor[:, 33:].diff(dim=1).abs().max() < 0.05 and factor.diff(dim=0).abs().max() < 0.05


def test_noise_has_the_size_that_is_said(images):
    found = shown(images, Look(noise=1.0), np.random.default_rng(0))
    assert np.corrcoef(found.ravel(), images.ravel())[0, 1] == pytest.approx(1 / np.sqrt(2), abs=0.05)


def test_sites_divide_into_source_and_target_and_the_target_is_scored():
    site = lambda patient: SITES.data.attributes(SITES.data.patients[patient][0])["site"]  # noqa: E731
    assert {site(p) for p in SITES.labelled_patients} == {"north"}
    assert {site(p) for p in SITES.unlabelled_patients} == {site(p) for p in SITES.val_patients} == {"south"}
    assert all(SITES.is_target(p) == (site(p) == "south") for p in SITES.data.split.train)


def test_half_of_the_training_patients_are_seen_by_the_scanner_and_all_who_are_scored():
    source, target = set(SCANNERS.labelled_patients), set(SCANNERS.unlabelled_patients)
    everyone = Task("embedded")
    assert not source & target and source | target == set(everyone.labelled_patients)
    assert abs(len(source) - len(target)) <= 1 and SCANNERS.val_patients == everyone.val_patients
    assert not any(SCANNERS.is_target(p) for p in source) and all(SCANNERS.is_target(p) for p in SCANNERS.val_patients)


@pytest.mark.parametrize("task", [SITES, SCANNERS], ids=["sites", "scanners"])
def test_target_labels_are_hidden(task):
    samples = task.samples("unlabelled")
    assert (samples.labels == IGNORE).all()
    assert set(task.samples("labelled").groups.tolist()) == {0}


def test_the_scanner_changes_the_target_and_not_the_source():
    plain = Task("embedded")
    for role, patients, same in (
        ("labelled", SCANNERS.labelled_patients, True),
        ("unlabelled", SCANNERS.unlabelled_patients, False),
    ):
        case = plain.data.load(plain.data.patients[patients[0]][0])
        before = plain.preparation.images(case)
        after = SCANNERS.samples(role).images[: len(before)]
        assert torch.equal(before, after) == same
        if not same:
            assert np.corrcoef(before.ravel(), after.ravel())[0, 1] < -0.95
            assert torch.equal(after, SCANNERS.preparation.images(case)), "noise follows from the case's name"
    assert torch.equal(plain.samples("val").labels, SCANNERS.samples("val").labels)


def test_known_target_patients_come_with_labels_and_are_marked():
    task = replace(SCANNERS, known=2)
    samples = task.samples("labelled")
    assert task.labelled_patients == SCANNERS.labelled_patients + SCANNERS.target_patients[:2]
    assert task.unlabelled_patients == SCANNERS.target_patients[2:]
    known = samples.groups == 1
    assert set(samples.case_of[known].tolist()) == {
        len(SCANNERS.labelled_patients),
        len(SCANNERS.labelled_patients) + 1,
    }
    assert (samples.labels[known] > 0).any() and not (samples.labels == IGNORE).any()


def test_the_oracle_has_all_target_labels_and_no_source():
    task = replace(SCANNERS, known=None, sides="target")
    assert task.labelled_patients == SCANNERS.target_patients and task.unlabelled_patients == ()
    assert (task.samples("labelled").groups == 1).all()


def test_more_known_patients_than_there_are_and_an_unknown_site_are_one_sentence():
    with pytest.raises(MedcookError, match="known target patients"):
        replace(SCANNERS, known=999).labelled_patients  # noqa: B018
    with pytest.raises(MedcookError, match="no patient has site 'moon'"):
        replace(SITES, target="moon").val_patients  # noqa: B018
    with pytest.raises(MedcookError, match="Unknown look 'x-ray'"):
        domains.find_look("x-ray")


def test_nobody_is_trained_on_and_scored_in_the_same_fold():
    task = replace(SCANNERS, fold=1)
    assert not set(task.labelled_patients) & set(task.val_patients)
    assert not set(task.unlabelled_patients) & set(task.val_patients)


def test_several_scanners_take_turns_and_a_case_can_be_shown_by_any():
    task = LooksTask("embedded", looks=(PLAIN, "negative"))
    plain = Task("embedded")
    for place, patient in enumerate(task.labelled_patients[:4]):
        case = plain.data.load(plain.data.patients[patient][0])
        seen, before = task.preparation.images(case), plain.preparation.images(case)
        assert torch.equal(seen, before) == (place % 2 == 0)
        assert torch.equal(task.preparation.images(as_shown(case, PLAIN)), before)
        assert not torch.equal(task.preparation.images(as_shown(case, "negative")), before)
    assert {task.preparation.look_of(case) for case in task.cases("val")} <= {PLAIN, "negative"}


def test_real_hearts_under_a_simulated_scanner_do_not_count_as_real():
    assert data_kind(DomainTask("acdc", look="negative")) == "real-anatomy-simulated"
    assert data_kind(LooksTask("acdc")) == "real-anatomy-simulated"
    assert data_kind(DomainTask("acdc", look=PLAIN)) == data_kind(DomainTask("chest_xray")) == "real"
    assert data_kind(LooksTask("acdc", looks=(PLAIN,))) == "real"
    assert data_kind(SCANNERS) == data_kind(SITES) == "simulated"
