"""FLAIR's architecture and checkpoint, see medcook/networks/flair.py; the recipe is tested elsewhere."""

from pathlib import Path

import numpy as np
import pytest
import torch
from flair_weights import HEADS, WORDS, Reference, published_state

from medcook.errors import MedcookError
from medcook.networks import flair
from medcook.networks.flair import Flair, Published, load_flair, prepared


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("flair") / "flair_resnet.pth"
    torch.save(published_state(), path)
    return path


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return path


def test_images_are_seen_as_by_an_implementation_of_its_own(weights):
    images, reference = torch.rand(2, 3, 40, 37), Reference(published_state())
    with torch.no_grad():
        found = load_flair(weights, HEADS).images(images)
    expected = torch.stack([reference.image(image) for image in images])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_sentences_are_heard_as_by_an_implementation_of_its_own(weights):
    tokens, reference = [[2, 5, 6, 7, 8, 3], [2, 5, 6, 7, 9, 3]], Reference(published_state())
    with torch.no_grad():
        found = load_flair(weights, HEADS).texts(torch.tensor(tokens), torch.ones(2, 6, dtype=torch.long))
    torch.testing.assert_close(found, torch.stack([reference.text(row) for row in tokens]), atol=1e-4, rtol=1e-3)


def test_the_published_sizes_are_those_of_resnet_50_and_bert_base():
    with torch.device("meta"):
        model = Flair()
    count = lambda part: sum(weight.numel() for weight in part.parameters())  # noqa: E731
    assert count(model.resnet) == 23_508_032, "torchvision's resnet50 without its last layer"
    assert count(model.bert) == 108_310_272, "bert-base-cased"
    assert model.see.weight.shape == (512, 2048) and model.hear.weight.shape == (512, 768)


def test_every_published_weight_finds_its_place(weights):
    state, model = published_state(), load_flair(weights, HEADS)
    mine = {name: tensor for name, tensor in model.state_dict().items() if "num_batches" not in name}
    theirs = {flair.renamed(name): tensor for name, tensor in state.items() if "num_batches" not in name}
    assert mine.keys() == theirs.keys() and not model.training
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_an_image_fills_the_longer_side_and_zeros_the_rest():
    image = np.full((20, 40, 3), 255, np.uint8)
    found = prepared(image, 10)
    assert found.shape == (1, 3, 10, 10)
    assert (found[0, :, :5] > 0.99).all() and (found[0, :, 5:] == 0).all()
    assert torch.equal(prepared(image[..., 0], 10), found)


def test_a_category_is_the_mean_of_its_descriptions(weights, vocabulary):
    model, image = Published(weights, vocabulary, HEADS), np.random.default_rng(0).integers(0, 256, (30, 44, 3))
    reference = Reference(published_state())
    known_words = ("A", "fundus", "photograph", "of")

    def row(word):
        return [2, *(WORDS.index(one) if one in WORDS else 1 for one in (*known_words, word)), 3]

    vectors = {"drusen": [row("drusen")], "healthy": [row("healthy"), row("red")]}
    known = torch.stack([torch.stack([reference.text(one) for one in rows]).mean(0) for rows in vectors.values()])
    seen = reference.image(prepared(image)[0])
    expected = (torch.tensor(2.0).exp() * known @ seen).softmax(0)
    found = model.zero_shot(image, {"drusen": ["drusen"], "healthy": ["healthy", "red"]})
    assert list(found) == ["drusen", "healthy"]
    torch.testing.assert_close(torch.tensor(list(found.values())), expected, atol=1e-4, rtol=1e-3)


def test_a_missing_checkpoint_says_where_it_is(tmp_path, weights):
    with pytest.raises(MedcookError, match=r"nothing\.pth: there is no FLAIR checkpoint") as error:
        load_flair(tmp_path / "nothing.pth")
    assert "github.com/jusiro/FLAIR" in str(error.value)
    with pytest.raises(MedcookError, match="there is no vocabulary"):
        Published(weights, tmp_path / "vocab.txt", HEADS)


@pytest.mark.parametrize("lost", ["text_model.model.encoder.layer.1.output.dense.bias", "logit_scale"])
def test_a_missing_weight_is_named(tmp_path, lost):
    state = published_state()
    del state[lost]
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(MedcookError, match=flair.renamed(lost).replace(".", r"\.")):
        load_flair(tmp_path / "short.pth", HEADS)


def test_a_damaged_checkpoint_and_one_that_would_run_code_are_refused(tmp_path, weights):
    (tmp_path / "broken.pth").write_bytes(weights.read_bytes()[:700])
    torch.save({"logit_scale": Path}, tmp_path / "code.pth")
    for name in ("broken", "code"):
        with pytest.raises(MedcookError, match=rf"{name}\.pth: the checkpoint cannot be read"):
            load_flair(tmp_path / f"{name}.pth", HEADS)
