"""Images and sentences in one space: the loss, the words, and that a sentence becomes a classifier."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax
from torch import nn

from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.methods.contrastive import ContrastiveImageText, ImageText, contrast

CAPTIONS = ("dark north", "bright north", "dark south", "bright south")
TINY = dict(captions=CAPTIONS, channels=(4, 8), width=8)
START = Moment(0, 10)


@pytest.fixture
def method() -> ContrastiveImageText:
    return ContrastiveImageText(**TINY)


@pytest.fixture
def nets(method) -> nn.ModuleDict:
    return method.build(inputs=1, classes=4, dims=2)


def unit(count: int, width: int = 8) -> torch.Tensor:
    return F.normalize(torch.randn(count, width), dim=1)


def batch(captions: torch.Tensor, side: int = 16) -> Batch:
    """Images whose brightness and gradient follow from their caption."""
    bright, south = captions % 2, captions // 2
    ramp = torch.linspace(-1, 1, side).view(1, 1, side, 1)
    images = 2.0 * bright.view(-1, 1, 1, 1) - 1 + ramp * (1 - 2.0 * south.view(-1, 1, 1, 1))
    images = images.expand(-1, -1, -1, side) + 0.1 * torch.randn(len(captions), 1, side, side)
    return Batch(images, captions.view(-1, 1, 1).expand(-1, side, side).byte())


def test_with_captions_that_all_differ_it_is_the_loss_of_clip():
    """The pseudo-code of Radford et al.: cross-entropy with the diagonal as the right answer, over rows and columns."""
    images, texts, order = unit(5), unit(5), torch.arange(5)
    similarity = 7.0 * images @ texts.T
    expected = (F.cross_entropy(similarity, order) + F.cross_entropy(similarity.T, order)) / 2
    torch.testing.assert_close(contrast(images, texts, order, 7.0), expected)


def test_images_of_one_caption_share_their_probability():
    """Supervised contrast by hand: the mean of -log p over all that have the same caption, both ways."""
    images, texts, captions = unit(6), unit(6), torch.tensor([0, 1, 0, 2, 2, 0])
    similarity = (5.0 * images @ texts.T).numpy().astype(float)
    loss = contrast(images, texts, captions, 5.0).item()
    for way in (similarity, similarity.T):
        said = log_softmax(way, axis=1)
        loss += np.mean([said[k, (captions == captions[k]).numpy()].mean() for k in range(6)]) / 2
    assert loss == pytest.approx(0, abs=1e-6)


def test_a_sentence_is_a_bag_of_words(nets):
    one, other, third = nets["model"].texts(("dark north", "north dark", "bright north"))
    torch.testing.assert_close(one, other)
    assert (one - third).abs().max() > 1e-3
    torch.testing.assert_close(nets["model"].texts(("dark", "dark north"))[1], one)  # what fills up says nothing


def test_an_unknown_word_is_an_error(nets):
    with pytest.raises(MedcookError, match="'pneumonia' was in no caption"):
        nets["model"].texts(("dark pneumonia",))


def test_patches_are_the_image_before_the_mean(nets):
    model, images = nets["model"].eval(), batch(torch.tensor([1, 2])).images
    maps, patches = model.image.maps(images), model.patches(images)
    assert patches.shape == (2, 8, 8, 8)
    torch.testing.assert_close(patches[:, :, 3, 5], F.normalize(maps[:, :, 3, 5] @ model.project.weight.T, dim=1))
    torch.testing.assert_close(model.images(images), F.normalize(maps.mean((2, 3)) @ model.project.weight.T, dim=1))


def test_the_scale_never_leaves_clips_range():
    model = ImageText(sentences=("a",), inputs=1, channels=(4,), width=4, heat=0.1, dims=2)
    assert model.scale.item() == pytest.approx(10)
    model.log_scale.data.fill_(20)
    assert model.scale.item() == pytest.approx(100)


def test_numbers_without_a_caption_get_one(method):
    assert method.sentences(6) == (*CAPTIONS, "class 4", "class 5") and method.sentences(2) == CAPTIONS[:2]


def test_it_learns_to_classify_by_sentences_it_was_never_shown(method, nets):
    """After some steps `bright` alone tells bright from dark: no caption consists of that word."""
    optimiser = torch.optim.Adam(nets["model"].parameters(), lr=1e-2)
    for step in range(60):
        loss = method.training_step(nets, batch(torch.randint(0, 4, (16,))), None, START)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        method.after_step(nets, Moment(step, 60))
    captions = torch.randint(0, 4, (32,))
    nets.eval()
    images = batch(captions).images
    assert (method.predict(nets, images)[:, :, 0, 0].argmax(1) == captions).float().mean() > 0.9
    bright = method.zero_shot(nets, images, ("dark", "bright"))[:, 1] > 0.5
    assert (bright == captions.remainder(2).bool()).float().mean() > 0.9


def test_probabilities_are_constant_over_the_image(method, nets):
    found = method.predict(nets.eval(), torch.randn(2, 1, 16, 24))
    assert found.shape == (2, 4, 16, 24)
    torch.testing.assert_close(found.sum(1), torch.ones(2, 16, 24))
    assert (found == found[..., :1, :1]).all()
    torch.testing.assert_close(method.embed(nets, torch.randn(2, 1, 16, 24)).norm(dim=1), torch.ones(2))
