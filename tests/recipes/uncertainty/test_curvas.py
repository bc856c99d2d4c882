"""CURVAS: every measure of the protocol against an independent one, and what the arms learn from the raters."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from monai.metrics import DiceMetric
from scipy.integrate import trapezoid
from scipy.stats import energy_distance as cdf_distance
from scipy.stats import norm, spearmanr
from torchmetrics.classification import MulticlassCalibrationError

from medcook import pooled, training
from medcook.data import IGNORE, Case
from medcook.methods import Supervised
from medcook.methods.uncertainty import RandomRater, Tempered, fit_temperature
from medcook.recipes.uncertainty import curvas
from medcook.recipes.uncertainty.curvas import (
    MultiRaterTask,
    against_raters,
    around,
    consensus_dice,
    ensemble_volume_score,
    rater_calibration,
    recipe,
    volume_score,
)
from medcook.tasks import Budget
from medcook.training import fit

SIZE = (24, 30)
COLUMNS = {"dice", "ece", "crps", "ece_near", "brier", "ensemble_crps", "energy_distance", "uncertainty", "error"}


def discs(radii, centre=(12, 15)):
    rows, columns = np.ogrid[: SIZE[0], : SIZE[1]]
    distance = np.hypot(rows - centre[0], columns - centre[1])
    return np.stack([distance <= radius for radius in radii]).astype(np.uint8)


RATERS = discs([4, 5, 6.5])


def soft(radius, width=1.5):
    """(2, *SIZE) probabilities of a disc with a soft edge."""
    rows, columns = np.ogrid[: SIZE[0], : SIZE[1]]
    inside = 1 / (1 + np.exp((np.hypot(rows - 12, columns - 15) - radius) / width))
    return np.stack([1 - inside, inside]).astype(np.float32)


def case(raters=RATERS):
    image = np.zeros((1, *SIZE), np.float32)
    return Case(image=image, label=raters[0], case_id="a", patient_id="a", raters=raters)


def forecaster(probabilities, method=None):
    """What a score is handed: a run that says `probabilities` of every case."""
    task = SimpleNamespace(structures={1: "cell"})
    method = method or Supervised()
    return SimpleNamespace(method=method, task=task, probabilities=lambda case: torch.from_numpy(probabilities))


@pytest.mark.component("consensus and dissensus")
class TestConsensus:
    def test_it_is_dice_with_the_disputed_voxels_cut_out(self):
        prediction = soft(5.8).argmax(0)
        agreed = RATERS.min(0) == RATERS.max(0)
        one, other = (torch.from_numpy(mask[agreed].copy())[None, None] for mask in (prediction, RATERS[0]))
        expected = DiceMetric()(one.float(), other.float()).item()
        assert consensus_dice(prediction, RATERS, (1,)) == pytest.approx(expected, abs=1e-6)

    def test_what_raters_dispute_cannot_be_wrong(self):
        for rater in RATERS:
            assert consensus_dice(rater, RATERS, (1,)) == 1
        beyond = discs([9])[0]
        assert consensus_dice(beyond, RATERS, (1,)) < 0.8

    def test_structures_are_disputed_one_by_one(self):
        """Raters dispute 1 against 2: then neither counts there, and 3 is untouched by it."""
        raters = np.array([[1, 1, 2, 3, 0, 0], [1, 2, 2, 3, 0, IGNORE]])
        prediction = np.array([1, 1, 1, 3, 3, 0])
        assert consensus_dice(prediction, raters, (1,)) == pytest.approx(2 / 3)
        assert consensus_dice(prediction, raters, (2,)) == 0
        assert consensus_dice(prediction, raters, (1, 3)) == pytest.approx(2 / 3)


@pytest.mark.component("expected calibration error over raters")
class TestCalibration:
    def test_it_is_the_challenges(self):
        probabilities = soft(5.3)
        flat = torch.from_numpy(probabilities.reshape(2, -1).T.copy())
        truth = [torch.from_numpy(rater.reshape(-1).astype(int)) for rater in RATERS]
        expected = np.mean([MulticlassCalibrationError(2, n_bins=50)(flat, each).item() for each in truth])
        assert rater_calibration(probabilities, RATERS) == pytest.approx(expected, abs=1e-5)

    def test_near_the_cell_background_does_not_dilute_it(self):
        found = against_raters(forecaster(soft(5.3)), case())[0]
        assert found["ece_near"] > 1.3 * found["ece"] > 0
        rows, columns = around(RATERS)
        assert (rows.start, rows.stop, columns.start, columns.stop) == (3, 22, 6, 25)
        nobody = np.zeros((2, 4, 4))
        assert nobody[:, *around(nobody)].shape == nobody.shape


@pytest.mark.component("continuous ranked probability score of volumes")
class TestVolumes:
    def test_it_integrates_the_raters_normal_distribution_against_the_predicted_volume(self):
        probabilities = soft(5.3)
        volumes = RATERS.reshape(3, -1).sum(1)
        mean, deviation = volumes.mean(), volumes.std()
        v = np.linspace(mean - 12 * deviation, mean + 12 * deviation, 400_001)
        expected = trapezoid((norm(mean, deviation).cdf(v) - (v >= probabilities[1].sum())) ** 2, v) / mean
        assert volume_score(probabilities, RATERS, (1,)) == pytest.approx(expected, abs=1e-4)

    def test_it_is_lowest_at_the_raters_mean(self):
        radii = np.linspace(3, 8, 21)
        volumes = [abs(soft(radius)[1].sum() - RATERS.reshape(3, -1).sum(1).mean()) for radius in radii]
        scores = [volume_score(soft(radius), RATERS, (1,)) for radius in radii]
        assert np.argmin(scores) == np.argmin(volumes)

    def test_of_an_ensemble_it_compares_two_distributions(self):
        samples = np.stack([soft(radius) for radius in (4, 5, 7)])
        predicted, volumes = samples[:, 1].sum((1, 2)), RATERS.reshape(3, -1).sum(1)
        expected = cdf_distance(predicted, volumes) ** 2 / 2 / volumes.mean()
        assert ensemble_volume_score(samples, RATERS, (1,)) == pytest.approx(expected, rel=1e-5)
        certain = np.stack([1 - RATERS, RATERS], axis=1)
        assert ensemble_volume_score(certain, RATERS, (1,)) == pytest.approx(0, abs=1e-9)


@pytest.mark.component("multi-rater ground truth")
class TestGroundTruth:
    task = MultiRaterTask("embedded", fold=0, folds=3)

    def test_training_labels_are_the_majority_and_not_the_gold_standard(self):
        samples = self.task.samples("calibration")
        votes = (samples.raters == 1).sum(1)
        assert torch.equal(samples.labels[votes >= 2], torch.ones_like(samples.labels[votes >= 2]))
        assert not (samples.labels[votes == 0] == 1).any()
        gold = torch.cat([self.task.preparation.labels(each) for each in self.task.cases("calibration")])
        assert not torch.equal(samples.labels, gold)

    def test_calibration_patients_are_nobody_elses_whatever_is_asked_first(self):
        for order in (("labelled", "calibration"), ("calibration", "labelled")):
            task = replace(self.task)
            found = {role: set(getattr(task, f"{role}_patients")) for role in order}
            assert len(found["calibration"]) == 3 and not found["calibration"] & found["labelled"]
            everyone = found["calibration"] | found["labelled"]
            assert not everyone & set(task.val_patients) and not everyone & set(task.data.split.test)
            assert everyone | set(task.val_patients) == {*task.data.split.train, *task.data.split.val}

    def test_one_arm_learns_from_a_random_rater_and_the_rest_from_the_majority(self):
        found = {name for name, arm in recipe.arms.items() if isinstance(arm.method, RandomRater)}
        assert found == {"random rater"}

    def test_a_temperature_is_fitted_on_them(self, monkeypatch):
        monkeypatch.setattr(training, "behaviour", lambda method: {})
        budget = Budget(steps=2, batch=2, precision="float32", checks=0)
        fitted = fit(Tempered(channels=(4, 8)), self.task, budget, progress=False, cache=False)
        each = next(iter(self.task.cases("val")))
        score = against_raters(fitted, each)[0]
        warm = replace(fitted, method=replace(fitted.method, temperature=fit_temperature(fitted, "calibration")))
        expected = rater_calibration(warm.probabilities(each).numpy(), each.raters)
        assert score["ece"] == pytest.approx(expected, abs=1e-6)
        assert score["ece"] != pytest.approx(rater_calibration(fitted.probabilities(each).numpy(), each.raters))


@pytest.mark.component("calibration goes with quality")
def test_better_calibrated_images_have_the_higher_dice():
    """Forecasts that miss the cell by more and more: their errors and their Dice rank the other way round."""
    found = [against_raters(forecaster(soft(radius)), case())[0] for radius in (5, 7, 8.5, 10, 11)]
    frame = pd.DataFrame(found)
    correlation = pooled.measure(frame, "ece_dice_correlation")
    assert correlation == pytest.approx(spearmanr(frame.ece, frame.dice).statistic) and correlation < -0.8


def test_a_row_holds_every_measure_as_a_plain_number():
    found = against_raters(forecaster(soft(5.3)), case())
    assert len(found) == 1 and found[0].keys() >= COLUMNS
    assert all(type(found[0][name]) is float for name in COLUMNS)
    assert found[0]["error"] == 1 - found[0]["dice"]


def test_a_forecast_that_is_the_share_of_the_raters_beats_a_certain_one():
    share = RATERS.mean(0)
    honest = against_raters(forecaster(np.stack([1 - share, share]).astype(np.float32)), case())[0]
    certain = against_raters(forecaster(np.stack([1 - RATERS[1], RATERS[1]]).astype(np.float32)), case())[0]
    for measure in ("ece", "brier", "crps"):
        assert honest[measure] < certain[measure]


@pytest.mark.component("the teams' models")
def test_six_ways_to_a_probability_train_one_network_alike():
    methods = [arm.method for arm in recipe.arms.values()]
    assert len({type(method) for method in methods}) == len(methods) == 6
    shared = vars(recipe.arms["softmax"].method)
    assert all({name: vars(method)[name] for name in shared} == shared for method in methods)
    assert curvas.BINS == 50
