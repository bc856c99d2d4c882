"""Probabilities beside raters: every number against its definition, every picture against what it was given."""

import numpy as np
import pytest
import torch
from tiny import BUDGET

from medcook import reliability
from medcook.cohorts import RaterTask
from medcook.data import IGNORE
from medcook.data.manifests import load_manifest
from medcook.measures.calibration import expected_calibration_error
from medcook.methods import Supervised
from medcook.reliability import (
    Forecast,
    disputed,
    forecast,
    near_structures,
    reliability_of,
    sure_where_disputed,
    votes,
)
from medcook.training import fit

MANIFEST = load_manifest("embedded")


def made_up(seed: int = 0, images: int = 3, raters: int = 4) -> Forecast:
    """Random probabilities of two classes and random annotations in a square."""
    rng = torch.Generator().manual_seed(seed)
    probability = torch.rand(images, 16, 20, generator=rng)
    drawn = torch.zeros(images, raters, 16, 20, dtype=torch.uint8)
    drawn[:, :, 4:12, 5:13] = torch.randint(0, 2, (images, raters, 8, 8), generator=rng, dtype=torch.uint8)
    both = torch.stack([1 - probability, probability], dim=1)
    return Forecast(torch.rand(images, 1, 16, 20, generator=rng), both, drawn, torch.arange(images), MANIFEST)


def test_votes_leave_missing_raters_out():
    raters = torch.tensor([1, 1, 0, IGNORE], dtype=torch.uint8).view(1, 4, 1, 1)
    assert votes(raters, 1).item() == pytest.approx(2 / 3)
    assert votes(torch.full_like(raters, IGNORE), 1).item() == 0


@pytest.mark.parametrize(("yes", "said"), [(0, False), (1, False), (2, True), (5, True), (8, True), (9, False)])
def test_two_of_ten_make_a_dispute(yes, said):
    raters = torch.tensor([1] * yes + [0] * (10 - yes), dtype=torch.uint8).view(1, 10, 1, 1)
    assert disputed(raters, 1).item() is said


def test_sure_where_disputed_counts_disputed_pixels_only():
    one = made_up()
    probability = torch.tensor([0.99, 0.5, 0.01, 0.99]).view(1, 1, 4)
    raters = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 1]], dtype=torch.uint8).T.reshape(1, 2, 1, 4)
    both = torch.stack([1 - probability, probability], dim=1)
    found = Forecast(one.images, both, raters, one.case_of, MANIFEST)
    assert sure_where_disputed(found, 1) == pytest.approx(2 / 3)
    agreed = Forecast(one.images, both, raters[:, :1], one.case_of, MANIFEST)
    assert np.isnan(sure_where_disputed(agreed, 1))


def test_the_most_disputed_images_are_of_different_cases():
    said = made_up()
    quiet = said.raters.clone()
    quiet[0] = quiet[0, :1]
    ranked = reliability.most_disputed(Forecast(said.images, said.probabilities, quiet, said.case_of, MANIFEST), 1, 3)
    assert ranked[-1] == 0
    one_case = Forecast(said.images, said.probabilities, said.raters, torch.zeros(3, dtype=torch.long), MANIFEST)
    assert len(reliability.most_disputed(one_case, 1, 3)) == 1


def test_near_structures_keeps_the_box_of_all_raters():
    raters = torch.zeros(1, 2, 20, 20, dtype=torch.uint8)
    raters[0, 0, 4:8, 5], raters[0, 1, 7:12, 9] = 1, 1
    kept = near_structures(raters)[0, 0] != IGNORE
    assert kept[2:14, 4:11].all() and kept.sum() == 12 * 7
    assert (near_structures(torch.zeros_like(raters)) == IGNORE).all()


def test_reliability_counts_every_rater_once():
    said = made_up()
    curve = reliability_of(said, bins=10)
    near = near_structures(said.raters)
    every = [expected_calibration_error(said.probabilities.transpose(0, 1), near[:, rater], 10) for rater in range(4)]
    assert curve[2].sum() == pytest.approx(1)
    assert reliability.calibration_error(curve) <= np.mean(every) + 1e-9
    alone = Forecast(said.images, said.probabilities, said.raters[:, :1], said.case_of, MANIFEST)
    own = near_structures(said.raters[:, :1])[:, 0]
    wanted = expected_calibration_error(said.probabilities.transpose(0, 1), own, 10)
    assert reliability.calibration_error(reliability_of(alone, 10)) == pytest.approx(wanted, abs=1e-6)


def test_a_forecast_is_what_the_method_predicts():
    fitted = fit(Supervised(channels=(4, 8)), RaterTask("embedded", labelled=2), BUDGET, cache=False, progress=False)
    said = forecast(fitted)
    assert said.raters.shape[1] == 3 and len(said.images) == len(said.probabilities) == len(said.case_of)
    with torch.no_grad():
        again = fitted.method.predict(fitted.nets.eval(), said.images[:2])
    assert torch.allclose(said.probabilities[:2], again, atol=1e-5)


def test_the_diagram_draws_the_curve_and_names_its_error():
    said = made_up()
    figure = reliability.reliability_diagram({"one": said, "two": made_up(1)})
    confidence, accuracy, share = reliability_of(said)
    there = share >= 1e-3
    np.testing.assert_allclose(figure.axes[0].lines[1].get_xdata(), confidence[there])
    np.testing.assert_allclose(figure.axes[0].lines[1].get_ydata(), accuracy[there])
    assert f"ECE {reliability.calibration_error(reliability_of(said)):.3f}" in figure.axes[0].get_title()


def test_sheets_have_a_panel_for_everything():
    said = made_up()
    assert len(reliability.confidence_figure(said, [0, 2]).axes) == 2 * 4 + 1
    masks = said.raters[0].numpy() == 1
    sheet = reliability.sample_sheet(said.images[0, 0].numpy(), {"raters": masks, "net": masks[:2]}, MANIFEST, count=3)
    assert len(sheet.axes) == 2 * 5 and sheet.axes[0].get_title(loc="left") == "raters"
    images = said.images[:2, 0].numpy()
    scores = reliability.score_sheet(images, images > 0.9, {"softmax": images, "query": images}, MANIFEST, what="it")
    assert [axes.get_title() for axes in scores.axes[:3]] == ["image", "softmax", "query"]


def sure_and_not() -> Forecast:
    """Four images: sure and right, sure and wrong, unsure and right, unsure and wrong (of the whole image)."""
    probability = torch.tensor([0.99, 0.98, 0.6, 0.55]).view(4, 1, 1).expand(4, 6, 6)
    truth = torch.tensor([1, 0, 1, 0], dtype=torch.uint8).view(4, 1, 1, 1).repeat(1, 1, 6, 6)
    both = torch.stack([1 - probability, probability], dim=1)
    return Forecast(torch.rand(4, 1, 6, 6), both, truth, torch.arange(4), MANIFEST)


def test_the_table_of_images():
    table = reliability.image_table(sure_and_not())
    assert table["error"].tolist() == [0, 1, 0, 1]
    assert (np.diff(table["uncertainty"]) > 0).all()
    assert table["uncertainty"][3] == pytest.approx(-(0.55 * np.log(0.55) + 0.45 * np.log(0.45)), abs=1e-6)


def test_what_was_sure_and_wrong_is_shown_below():
    titles = [axes.get_title() for axes in reliability.caught_and_missed(sure_and_not(), 2).axes]
    assert titles[0] == "error 1.000\nuncertain: 1 of 4" and titles[1] == "error 0.000\nuncertain: 2 of 4"
    assert titles[2] == "error 1.000\nuncertain: 3 of 4"
