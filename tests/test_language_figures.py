"""Figures and the widget of chapter 11."""

import ipywidgets
import numpy as np
import pytest
import torch

from medcook import language_figures as figures
from medcook import widgets
from medcook.data.manifests import load_manifest
from medcook.language import Question
from medcook.language_figures import Answered
from medcook.tasks import Samples

MANIFEST = load_manifest("embedded")


class Echo:
    """Answers every sentence with the brighter half; `small` ones with nothing."""

    def answer(self, nets, images, sentences):
        found = [(images[:, 0] > 0).float() * ("small" not in sentence) for sentence in sentences]
        return torch.stack(found, dim=1)


@pytest.fixture
def halves():
    image = torch.full((1, 16, 16), -1.0)
    image[:, 8:] = 1
    label = torch.zeros(16, 16, dtype=torch.uint8)
    label[8:] = 3
    return image, label


def test_an_answer_knows_what_its_sentence_means(halves):
    found = figures.answered(
        Echo(), None, *halves, [Question("large", (3,)), Question("small", (3, 4)), Question("x", ())]
    )
    assert [shown.sentence for shown in found] == ["large", "small", "x"]
    assert found[0].truth.sum() == found[1].truth.sum() == 128 and not found[2].truth.any()
    assert (found[0].answer > 0.5).sum() == 128 and not found[1].answer.any()


def test_titles_say_how_good_an_answer_is(halves):
    image = halves[0][0].numpy()
    truth, nothing = image > 0, np.zeros((16, 16), bool)
    rows = [
        [Answered(image, "right", truth * 1.0, truth), Answered(image, "silent", nothing * 1.0, nothing)],
        [Answered(image, "invented", truth * 1.0, nothing)],
    ]
    figure = figures.answers_figure(rows, MANIFEST)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["right\nDice 1.00", "silent\nnothing, rightly", "invented\n128 pixels, of nothing", ""]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["answer", "what the sentence means"]


def test_cosines_are_without_what_all_share():
    vectors = {"a": torch.tensor([9.0, 1.0]), "b": torch.tensor([9.0, -1.0])}
    table = figures.cosines(vectors)
    assert table.loc["a", "a"] == pytest.approx(1) and table.loc["a", "b"] == pytest.approx(-1)
    axes = figures.similarity_figure(table).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b"]


def test_words_that_are_chosen_make_the_question(halves, monkeypatch):
    image, label = halves
    samples, asked = Samples(image[None].repeat(2, 1, 1, 1), label[None].repeat(2, 1, 1), torch.arange(2)), []

    def ask(**words):
        asked.append(words)
        return Question(" ".join(words.values()) or "all", (3,))

    choices = {"size": ("any", "small", "large"), "side": ("any", "left")}
    box = widgets.question_explorer(Echo(), None, samples, MANIFEST, choices, ask)
    controls, picture = box.children
    before = picture.value
    assert asked == [{}] and isinstance(picture, ipywidgets.Image)
    controls.children[1].value = "small"
    controls.children[2].value = "left"
    assert asked[1:] == [{"size": "small"}, {"size": "small", "side": "left"}] and picture.value != before
