"""TotalSegmentator: what is measured inside a structure, and how it is set against age."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from medcook.data import Case, open_dataset
from medcook.methods import Batch, Moment
from medcook.recipes.volumes.totalsegmentator import (
    Blind,
    Thresholded,
    attenuation,
    dark_inside,
    ramp,
    recipe,
    share,
    standing,
    study,
)

SMALL = (4, 4, 4, 4)


def patient(number: int, age: float | None, drawn: int, brightness: float = 1.0) -> Case:
    """A case of 10 x 10 whose lungs are `drawn` pixels large."""
    label = (np.arange(100) < drawn).reshape(10, 10).astype(np.uint8)
    image = np.where(label, brightness, -1.0)[None].astype(np.float32)
    return Case(image, label, f"p{number}", f"p{number}", attributes={"age": age})


class Cohort:
    """Training patients, and a predictor that finds so many pixels of each as `find` says."""

    def __init__(self, cases, find):
        self.task = SimpleNamespace(structures={1: "lungs"}, cases=lambda role: iter(cases))
        self.find = find

    def predict(self, case):
        return (np.arange(100) < self.find(case)).reshape(10, 10).astype(np.uint8)


@pytest.fixture
def cases():
    rng = np.random.default_rng(0)
    ages, sizes = rng.permutation(60)[:40] + 20, rng.permutation(90)[:40] + 5
    return [
        patient(k, float(a), int(s), 1 + b) for k, (a, s, b) in enumerate(zip(ages, sizes, rng.random(40), strict=True))
    ]


def rows_of(cohort, cases):
    return [row for case in cases for row in study(cohort, case)]


@pytest.mark.component("dataset of 104 structures")
def test_the_data_half_is_there():
    manifest = open_dataset("totalsegmentator").manifest
    assert manifest.facts.cases == 1204 and len(manifest.structures) == 104


@pytest.mark.component("organ volumetry")
def test_a_structures_share_times_the_image_is_its_volume():
    label = np.zeros((6, 5, 4), np.uint8)
    label[1:3, 1:4, :2], label[5] = 2, 1
    assert share(label, 2) * label.size == 12 and share(label, 1) * label.size == 20 and share(label, 3) == 0


@pytest.mark.component("organ volumetry")
def test_the_area_is_that_which_the_method_finds(cases):
    """Not that which was drawn: a method that finds 3 pixels less says so."""
    (row,) = study(Cohort(cases, lambda case: case.label.sum() - 3), cases[0])
    drawn = float(cases[0].label.mean())
    assert row["drawn_area"] == drawn and row["area"] == pytest.approx(drawn - 0.03)
    assert row["dice"] == pytest.approx(2 * (100 * drawn - 3) / (200 * drawn - 3)) and not row["missed"]


@pytest.mark.component("mean attenuation")
def test_attenuation_is_the_mean_inside_the_structure():
    image = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    label = np.array([[0, 1, 1, 0], [0, 1, 0, 0], [2, 0, 0, 0]], np.uint8)
    assert attenuation(image, label, 1) == pytest.approx((1 + 2 + 5) / 3) and attenuation(image, label, 2) == 8
    assert np.isnan(attenuation(image, label, 3))


@pytest.mark.component("correlation with age")
def test_where_a_value_stands():
    known = np.array([1.0, 2.0, 2.0, 5.0])
    assert [standing(v, known) / 12**0.5 for v in (0, 1, 2, 9)] == pytest.approx([-0.5, -0.375, 0.0, 0.5])
    assert np.isnan(standing(np.nan, known))


@pytest.mark.component("correlation with age")
def test_the_mean_is_spearmans_rank_correlation(cases):
    """Over the patients whose ranks are used, without ties, it is so up to (n^2 - 1) / n^2, for every measure."""
    cohort, n = Cohort(cases, lambda case: 100 - case.label.sum()), len(cases)
    rows = rows_of(cohort, cases)
    ages, sizes = [case.attributes["age"] for case in cases], [int(case.label.sum()) for case in cases]
    wanted = stats.spearmanr(ages, sizes).statistic * (n**2 - 1) / n**2
    assert np.mean([row["drawn_association"] for row in rows]) == pytest.approx(wanted)
    assert np.mean([row["association"] for row in rows]) == pytest.approx(-wanted)
    inside = [attenuation(case.image, cohort.predict(case), 1) for case in cases]
    wanted = stats.spearmanr(ages, inside).statistic
    assert np.mean([row["attenuation_association"] for row in rows]) == pytest.approx(wanted, abs=0.02)


@pytest.mark.component("correlation with age")
def test_a_measure_that_is_the_same_for_everyone_has_no_association(cases):
    rows = rows_of(Cohort(cases, lambda case: 30), cases)
    assert len(rows) == 40 and all(row["association"] == 0 for row in rows)


@pytest.mark.component("correlation with age")
def test_ranks_are_those_of_training_patients_and_only_adults_take_part(cases):
    """A new patient older and with larger lungs than all others: 12 / 4. Children and unknown ages have no row."""
    unknown = [patient(90, None, 99), patient(91, 5.0, 99)]
    cohort = Cohort([*cases, *unknown], lambda case: case.label.sum())
    (row,) = study(cohort, patient(92, 99.0, 98))
    assert row["association"] == pytest.approx(3.0) and row["age"] == 99
    assert not rows_of(cohort, unknown)


def test_without_the_image_everyone_is_predicted_the_same_and_all_else_is_as_it_was():
    batch = Batch(torch.randn(2, 1, 32, 24), torch.randint(0, 2, (2, 32, 24)).byte())
    method = Blind(channels=SMALL)
    shown = ramp(batch.images)
    assert shown[1, 0, [0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [-2, 0, 0, 2] and shown.shape == batch.images.shape
    assert {**method.settings(), "method": ""} == {
        **recipe.arms["segmented"].method.settings(),
        "channels": SMALL,
        "method": "",
    }
    nets = method.build(1, 2, 2)
    loss = method.training_step(nets, batch, None, Moment(0, 10))
    other = batch._replace(images=torch.rand_like(batch.images))
    assert torch.equal(loss, method.training_step(nets, other, None, Moment(0, 10)))
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in nets["model"].parameters())
    found = method.predict(nets.eval(), batch.images)
    assert torch.equal(found[0], found[1]) and found.shape == (2, 2, 32, 24)


def test_a_threshold_finds_what_is_dark_off_the_border():
    image = np.ones((16, 16), np.float32)
    image[:, :3] = image[5:9, 6:12] = 0
    found = dark_inside(image)
    assert found[5:9, 6:12].all() and found.sum() == 24
    assert not dark_inside(np.ones((4, 4), np.float32)).any()
    method = Thresholded(channels=SMALL)
    said = method.predict(method.build(1, 3, 2).eval(), torch.from_numpy(image)[None, None])
    assert said.shape == (1, 3, 16, 16) and torch.equal(said[0, 1] > 0.5, found) and said[0, 2].sum() == 0
