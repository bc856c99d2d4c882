"""SqueezeNet: its compressed weights, decoded; shapes, and what became of its layers."""

import numpy as np
import pytest
import skimage.data
import torch

from medcook.errors import MedcookError
from medcook.networks import parameters
from medcook.networks.squeezenet import (
    CODES,
    FEATURES,
    SqueezeNet,
    _pretrained,
    decode,
    layers,
    load_squeezenet,
    read_compressed,
)

SHAPES = [(4, 3, 3, 3), (2, 4, 1, 1), (40, 2, 1, 1)]


def encode(weights: list[np.ndarray], biases: list[np.ndarray]) -> bytes:
    """The compressed file of layers whose values are whole numbers from 0 to 255: code k stands for the value k."""
    entries = []
    for weight in weights:
        codes, runs, gap = [], [], 0
        for value in weight.ravel().astype(int):
            if value or gap == 15:
                codes, runs, gap = [*codes, value], [*runs, gap], 0
            else:
                gap += 1
        entries.append((codes, runs))
    content = np.array([len(codes) for codes, _ in entries], dtype="<u4").tobytes()
    for (codes, runs), bias in zip(entries, biases, strict=True):
        even = runs + [0] * (len(runs) % 2)
        halves = [low | high << 4 for low, high in zip(even[::2], even[1::2], strict=True)]
        content += np.arange(CODES, dtype="<f4").tobytes() + bias.astype("<f4").tobytes() + bytes(codes) + bytes(halves)
    return content


@pytest.fixture
def sparse() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Layers of which one weight in twenty is not zero, so that runs of more than 15 zeros occur."""
    rng = np.random.default_rng(0)
    weights = [rng.integers(1, CODES, shape) * (rng.random(shape) < 0.05) for shape in SHAPES]
    weights[0][-1, -1, -1, -1] = 7
    return [weight.astype(np.float32) for weight in weights], [rng.normal(size=shape[0]) for shape in SHAPES]


def test_what_was_encoded_is_decoded(sparse):
    found = decode(encode(*sparse), SHAPES)
    for (weight, bias), expected, offset in zip(found, *sparse, strict=True):
        assert weight.dtype == bias.dtype == torch.float32
        np.testing.assert_array_equal(weight, expected)
        np.testing.assert_allclose(bias, offset, rtol=1e-6)


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-5], lambda content: content + b"x", lambda content: b"ab"]
)
def test_a_damaged_file_is_named(sparse, damage, tmp_path):
    path = tmp_path / "weights.net"
    path.write_bytes(damage(encode(*sparse)))
    with pytest.raises(MedcookError, match=r"weights\.net"):
        read_compressed(path, SHAPES)


def test_counts_that_do_not_fit_a_layer_are_an_error(sparse, tmp_path):
    path = tmp_path / "weights.net"
    path.write_bytes(encode(*sparse))
    smaller = [(1, 3, 3, 3), *SHAPES[1:]]
    with pytest.raises(MedcookError, match=r"weights\.net"):
        read_compressed(path, smaller)


@pytest.mark.parametrize("side", [32, 128])
def test_shapes(side):
    network, images = SqueezeNet().eval(), torch.randn(2, 3, side, side)
    assert network(images).shape == (2, 1000)
    assert network.features(images).shape[:2] == (2, FEATURES)
    assert len(layers(network)) == 26 and parameters(network) == 1_248_424  # Iandola et al.: 1.25 million
    assert SqueezeNet(features_only=True)(images).shape == network.features(images).shape


@pytest.mark.mirror
def test_the_published_weights_fit_to_the_last_byte(mirror):
    whole = load_squeezenet(features_only=False)
    kept = sum(int((layer.weight != 0).sum()) for layer in layers(whole)) / parameters(whole)
    assert 0.3 < kept < 0.4  # two thirds of the weights are pruned
    assert [len(set(layer.weight.unique().tolist())) <= CODES for layer in layers(whole)] == [True] * 26
    features = load_squeezenet()
    assert features.conv10 is None and not features.training
    images = torch.randn(1, 3, 64, 64) * 60
    torch.testing.assert_close(features(images), whole.features(images))


@pytest.mark.mirror
def test_the_first_loading_draws_as_few_random_numbers_as_the_next(mirror):
    _pretrained.cache_clear()
    following = []
    for _ in range(2):
        torch.manual_seed(0)
        load_squeezenet()
        following.append(torch.rand(1).item())
    assert following[0] == following[1]


@pytest.mark.mirror
def test_it_knows_coffee_when_red_comes_first(mirror):
    """scikit-image's photograph of a cup of espresso is class 967 of ImageNet; with red and blue swapped it is not."""
    photograph = torch.from_numpy(skimage.data.coffee()[:, 100:500].copy()).permute(2, 0, 1)[None].float()
    small = torch.nn.functional.interpolate(photograph, size=(227, 227), mode="bilinear", antialias=True)
    network = load_squeezenet(features_only=False)
    images = small - torch.tensor(SqueezeNet.MEAN).view(1, 3, 1, 1)
    assert network(images).argmax() == 967
    assert network(images.flip(1)).argmax() != 967
