"""PraNet: what the decoder multiplies, what is erased for whom, and how the maps follow from each other."""

import pytest
import torch
import torch.nn.functional as F

from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.recipes.architectures.pranet import (
    PartialDecoder,
    Pra,
    PraNet,
    ReceptiveField,
    ReverseAttention,
    resized,
    reverse,
)

SMALL = (4, 6, 8, 8)


def net(**settings) -> PraNet:
    return PraNet(inputs=1, classes=3, channels=SMALL, width=4, **settings)


@pytest.mark.component("parallel partial decoder")
def test_a_receptive_field_is_twenty_three_wide():
    """Branches of 1, 9, 15 and 21 pixels, and a 3 x 3 convolution that joins them."""
    block, image = ReceptiveField(2, 3).eval().double(), torch.randn(1, 2, 41, 41).double().requires_grad_()
    sides = [1, 9, 15, 21]
    for module, side in [*zip(block.branches, sides, strict=True), (block.join, None), (block, 23)]:
        if side is None:
            continue
        (gradient,) = torch.autograd.grad(module(image)[0, :, 20, 20].square().sum(), image)
        seen = gradient[0].abs().amax(0) > 0
        assert seen.any(0).sum() == seen.any(1).sum() == side
        assert seen[20 - side // 2, 20 - side // 2] and seen[20 + side // 2, 20 + side // 2]


@pytest.mark.component("parallel partial decoder")
def test_levels_are_multiplied():
    """Biases aside, a silent deep level silences the map, and a silent middle level leaves the deep one alone."""
    decoder = PartialDecoder(4, 3).eval()
    fine, middle, deep = (torch.randn(1, 4, side, side) for side in (16, 8, 4))
    nothing = decoder.head.bias[:, None, None].expand(1, 3, 16, 16)
    assert torch.allclose(decoder(fine, middle, torch.zeros_like(deep)), nothing, atol=1e-6)
    silent = torch.zeros_like(middle)
    assert torch.allclose(decoder(fine, silent, deep), decoder(torch.zeros_like(fine), silent, deep), atol=1e-6)
    assert not torch.allclose(decoder(fine, middle, deep), decoder(torch.zeros_like(fine), middle, deep), atol=1e-6)
    assert not torch.allclose(decoder(fine, silent, deep), nothing, atol=1e-6)


@pytest.mark.component("parallel partial decoder")
def test_only_the_three_deepest_levels_are_decoded():
    """The global map is on the grid of the third deepest level, whatever the number of levels."""
    for channels, side in ((SMALL, 16), ((4, 4, 4, 6, 8), 8)):
        network, found = PraNet(inputs=1, classes=3, channels=channels, width=4), []
        network.decoder.register_forward_hook(lambda _, __, output, found=found: found.append(output.shape))
        network(torch.randn(1, 1, 32, 32))
        assert found == [(1, 3, side, side)]


@pytest.mark.component("reverse attention")
def test_with_two_classes_it_is_one_minus_sigmoid():
    foreground = torch.randn(2, 1, 5, 7)
    logits = torch.cat([torch.zeros_like(foreground), foreground], dim=1)
    assert torch.allclose(reverse(logits)[:, 1:], 1 - torch.sigmoid(foreground), atol=1e-6)
    assert torch.allclose(reverse(torch.randn(2, 4, 5, 7)).sum(1), torch.full((2, 5, 7), 3.0))


@pytest.mark.component("reverse attention")
def test_each_class_sees_features_from_which_it_is_erased():
    """Against a loop over classes that erases first and convolves then."""
    attention = ReverseAttention(6, 3, kernel=3, depth=1, width=2).eval()
    features, logits = torch.randn(2, 6, 9, 8), torch.randn(2, 3, 9, 8)
    found, convolution = attention.correction(features, logits), attention.convolutions[0]
    scale = (1 + attention.norm.eps) ** -0.5
    for k, own in enumerate(torch.arange(6).split(2)):
        left = features * (1 - logits.softmax(1)[:, k : k + 1])
        x = scale * F.conv2d(left, attention.reduce.weight[own])
        x = F.relu(scale * F.conv2d(x, convolution[0].weight[own], padding=1))
        wanted = F.conv2d(x, attention.head.weight[[k]], attention.head.bias[[k]])
        assert torch.allclose(found[:, k : k + 1], wanted, atol=1e-5)


@pytest.mark.component("reverse attention")
def test_what_is_found_is_not_seen_again():
    """Where class 1 is certain, its correction hears nothing of the features; without erasing it does."""
    features, logits = torch.randn(1, 6, 8, 8, requires_grad=True), torch.zeros(1, 3, 8, 8)
    logits[:, 1, :, :4] = 200
    for erase in (True, False):
        attention = ReverseAttention(6, 3, kernel=3, depth=2, width=4, erase=erase).eval()
        (gradient,) = torch.autograd.grad(attention.correction(features, logits)[:, 1].square().sum(), features)
        assert bool((gradient[..., :4] == 0).all()) == erase
        assert (gradient[..., 4:] != 0).any()


@pytest.mark.component("cooperation of areas and boundaries")
def test_each_map_is_the_one_before_and_a_correction():
    """Without corrections the global map is passed on from the deepest grid to the finest."""
    network, image = net().eval(), torch.randn(1, 1, 32, 32)
    before = network.outputs(image)
    for attention in network.corrections:
        torch.nn.init.zeros_(attention.head.weight), torch.nn.init.zeros_(attention.head.bias)
    found, whole = network.outputs(image), torch.Size((32, 32))
    maps = []
    network.decoder.register_forward_hook(lambda _, __, output: maps.append(output))
    network.outputs(image)
    for side in (4, 8, 16):
        maps.append(resized(maps[-1], torch.Size((side, side))))
    assert len(found) == 4
    assert all(torch.allclose(a, resized(b, whole), atol=1e-6) for a, b in zip(found, reversed(maps), strict=True))
    assert torch.equal(before[-1], found[-1]) and not torch.allclose(before[0], found[0])


@pytest.mark.component("cooperation of areas and boundaries")
def test_the_deepest_level_corrects_first():
    network, order = net(), []
    for attention in network.corrections:
        attention.register_forward_hook(lambda _, inputs, __: order.append(tuple(inputs[0].shape[1:])))
    network(torch.randn(1, 1, 32, 32))
    assert order == [(8, 4, 4), (8, 8, 8), (6, 16, 16)]


@pytest.mark.component("deep supervision")
@pytest.mark.parametrize("deep", [True, False])
def test_all_maps_are_supervised_alike(deep):
    method = Pra(channels=SMALL, deep=deep)
    nets = method.build(1, 3, 2)
    batch = Batch(torch.randn(2, 1, 32, 32), torch.randint(0, 3, (2, 32, 32)).byte())
    losses = [find_loss("both")(logits, batch.labels) for logits in nets["model"].outputs(batch.images)]
    wanted = sum(losses) / 4 if deep else losses[0]
    assert len(losses) == 4
    assert torch.allclose(method.training_step(nets, batch, None, Moment(0, 10)), wanted, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (40, 36), (33, 47)])
def test_any_size_comes_back(size):
    network = net()
    assert all(logits.shape == (2, 3, *size) for logits in network.outputs(torch.randn(2, 1, *size)))
    assert network(torch.randn(2, 1, *size)).shape == (2, 3, *size)


def test_the_ablation_erases_nothing_and_is_otherwise_the_same():
    full, bare = (Pra(erase=erase, channels=SMALL).model(1, 3) for erase in (True, False))
    bare.load_state_dict(full.state_dict())
    image = torch.randn(1, 1, 32, 32)
    maps, others = full.eval().outputs(image), bare.eval().outputs(image)
    assert torch.equal(maps[-1], others[-1])
    assert not any(torch.equal(a, b) for a, b in zip(maps[:-1], others[:-1], strict=True))


def test_the_global_map_alone_has_no_corrections():
    bare = Pra(stages=0, channels=SMALL).model(1, 3)
    assert not any("corrections" in name for name, _ in bare.named_parameters())
    assert len(bare.outputs(torch.randn(1, 1, 32, 32))) == 1


@pytest.mark.parametrize("settings", [{}, {"erase": False}, {"stages": 0}, {"deep": False}])
def test_every_parameter_is_trained(settings):
    method = Pra(channels=SMALL, **settings)
    nets = method.build(1, 3, 2)
    batch = Batch(torch.randn(2, 1, 32, 32), torch.randint(0, 3, (2, 32, 32)).byte())
    method.training_step(nets, batch, None, Moment(0, 10)).backward()
    assert all(p.grad is not None for p in nets["model"].parameters())
