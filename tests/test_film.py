"""A film of a training: frames in time, truth that the training never saw, and shares that add up."""

import pytest
import torch
from tiny import BUDGET

from medcook.data import IGNORE
from medcook.film import SURE, Film, share, strip, watch
from medcook.film import quality_figure as draw_quality
from medcook.methods import MeanTeacher
from medcook.tasks import Task
from medcook.training import fit

METHOD = MeanTeacher(channels=(4, 8))
TASK = Task("embedded", labelled=2)


@pytest.fixture(scope="module")
def film() -> Film:
    return watch(METHOD, TASK, BUDGET, count=4, frames=3)


def made_up() -> Film:
    """Two pixels right, two wrong in the first frame; of the wrong ones the confident one stays wrong."""
    labels = torch.tensor([[[1, 1], [1, 1]]], dtype=torch.uint8)
    first = torch.tensor([[[0.01, 0.4], [0.97, 0.6]]])  # probability of background
    last = torch.tensor([[[0.01, 0.2], [0.97, 0.3]]])
    probabilities = torch.stack([torch.stack([frame, 1 - frame], 1) for frame in (first, last)])
    return Film(torch.zeros(1, 1, 2, 2), labels, [1, 2], probabilities, None)


def test_frames_are_spread_over_the_training_and_end_with_it(film):
    assert film.steps == [4, 8, 12]
    assert film.probabilities.shape == (3, 4, 4, *film.images.shape[2:])
    assert torch.allclose(film.probabilities.sum(2), torch.ones(()), atol=1e-5)


def test_the_images_are_unlabelled_training_patients_with_their_hidden_labels(film):
    assert not (film.labels == IGNORE).any() and (film.labels > 0).flatten(1).any(1).all()
    unlabelled = TASK.samples("unlabelled").images
    assert all((unlabelled == image).flatten(1).all(1).any() for image in film.images)


def test_watching_changes_nothing(film):
    fitted = fit(METHOD, TASK, BUDGET, cache=False, progress=False)
    with torch.no_grad():
        assert torch.allclose(METHOD.predict(fitted.nets.eval(), film.images), film.probabilities[-1], atol=1e-5)
    assert "after_step" not in vars(METHOD)


def test_shares():
    table = made_up().quality()
    assert table.loc[1].tolist() == pytest.approx([0.5, 0.5, 0.5])  # confident, right, right where confident
    assert table.loc[2].tolist() == pytest.approx([0.5, 0.75, 0.5])
    assert share(torch.tensor([True]), torch.tensor([False])) != share(torch.tensor([True]), torch.tensor([False]))


def test_survival_tells_confident_errors_from_the_others():
    assert made_up().survival(0) == {"confident errors": 1.0, "unsure errors": 0.0}
    assert SURE > 0.6


@pytest.mark.parametrize("place", [0, 1])
def test_most_biased_has_the_largest_share_of_confident_errors(place):
    one = made_up()
    right = torch.stack([torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)], dim=2)  # sure of the structure everywhere
    parts = [right, right]
    parts[place] = one.probabilities
    pair = Film(one.images.repeat(2, 1, 1, 1), one.labels.repeat(2, 1, 1), one.steps, torch.cat(parts, dim=1), None)
    assert pair.most_biased() == place


def test_figures(film):
    assert len(strip(film, 0, count=2).axes) == 3
    lines = draw_quality({"a": film, "b": film}).axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["a", "b"]
