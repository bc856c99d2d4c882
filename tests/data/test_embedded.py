"""The embedded cohort: no network, always the same, and different where it says it is."""

import socket

import numpy as np
import pytest

from medcook.data.datasets import open_dataset
from medcook.data.embedded import PATIENTS, SHAPE, SITES, simulated


@pytest.fixture(scope="module")
def cohort():
    dataset = open_dataset("embedded")
    return [dataset.read(case_id) for case_id in dataset.index()]


def test_no_network_is_needed(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the embedded cohort must not open a connection")

    monkeypatch.setattr(socket, "socket", refuse)
    simulated.cache_clear()
    dataset = open_dataset("embedded")
    assert dataset.load(dataset.split.train[0]).image.shape == (1, *SHAPE)


def test_every_case_is_what_the_manifest_says(cohort):
    dataset = open_dataset("embedded")
    assert len(cohort) == PATIENTS == len(dataset.patients)
    for case in cohort:
        assert case.image.dtype == np.float32 and np.isfinite(case.image).all()
        assert case.label.shape == case.spatial and set(np.unique(case.label)) == {0, 1, 2, 3}
        assert case.raters.shape == (3, *SHAPE) and case.extras["t2"].shape == SHAPE
        assert case.attributes["simulated"] is True and case.spacing == (6.0, 2.0, 2.0)


def test_a_patient_is_the_same_each_time_and_unlike_the_next(cohort):
    simulated.cache_clear()
    again = open_dataset("embedded").read("brain01")
    assert np.array_equal(again.image, cohort[0].image) and np.array_equal(again.raters, cohort[0].raters)
    assert not np.array_equal(cohort[1].label, cohort[0].label)


def test_who_changes_a_patient_changes_it_for_nobody_else(cohort):
    mine = open_dataset("embedded").read("brain01")
    mine.image[:], mine.label[:], mine.raters[:], mine.attributes["site"] = 0, 0, 0, "moon"
    again = open_dataset("embedded").read("brain01")
    assert np.array_equal(again.image, cohort[0].image) and np.array_equal(again.label, cohort[0].label)
    assert np.array_equal(again.raters, cohort[0].raters) and again.attributes == cohort[0].attributes


def test_sites_differ_in_intensity_and_noise(cohort):
    def mean_of(site, measure):
        return np.mean([measure(case.image) for case in cohort if case.attributes["site"] == site])

    assert mean_of("north", np.median) > 2 * mean_of("island", np.median)
    noise = {site: mean_of(site, lambda image: image[0, :, :8, :8].std()) / SITES[site].gain for site in SITES}
    assert noise["north"] < noise["south"] < noise["island"]


def test_ventricles_grow_with_atrophy(cohort):
    size = {group: [] for group in ("control", "atrophy")}
    for case in cohort:
        size[case.attributes["group"]].append((case.label == 3).mean())
    assert np.mean(size["atrophy"]) > 1.05 * np.mean(size["control"])


def test_raters_agree_mostly_and_the_third_least(cohort):
    agreement = np.mean([[(rater == case.label).mean() for rater in case.raters] for case in cohort], axis=0)
    assert 0.8 < agreement[2] < agreement[1] < agreement[0] < 0.99


def test_image_shows_the_anatomy(cohort):
    """White matter is brighter than grey, grey brighter than the ventricles, in most patients of every site."""
    for case in cohort:
        grey, white, fluid = (case.image[0][case.label == value].mean() for value in (1, 2, 3))
        assert white > grey > fluid, case.case_id
