"""MPU-Net: who attends to whom, what is weighted by what, which maps are averaged, and the hybrid loss."""

import pytest
import torch
import torch.nn.functional as F
from monai.losses import TverskyLoss
from torch import nn

from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.recipes.volumes.mpu_net import (
    CrossAttention,
    MPUNet,
    PositionAttention,
    Serialised,
    hybrid_loss,
    logarithm,
    serialised,
)

SMALL = (2, 3, 4, 8)


def net(**settings) -> MPUNet:
    return MPUNet(inputs=1, classes=3, channels=SMALL, **settings)


def awake(attention: PositionAttention) -> PositionAttention:
    """One that is trained: its share has left zero."""
    nn.init.constant_(attention.share, 0.5)
    return attention


def batch(side: int = 16) -> Batch:
    return Batch(torch.randn(2, 1, side, side, side), torch.randint(0, 3, (2, side, side, side)).byte())


@pytest.mark.component("image serialisation")
def test_a_volume_is_a_sequence_of_its_voxels():
    volume = torch.randn(2, 5, 3, 4, 2)
    found = serialised(volume)
    assert found.shape == (2, 24, 5)
    for place, (z, y, x) in enumerate([(z, y, x) for z in range(3) for y in range(4) for x in range(2)]):
        assert torch.equal(found[:, place], volume[:, :, z, y, x])


@pytest.mark.component("image serialisation")
def test_all_voxels_of_the_deepest_grid_are_attended_to_at_once():
    network, seen = net(), []
    (attention,) = [module for module in network.modules() if isinstance(module, PositionAttention)]
    attention.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    network(torch.randn(1, 1, 16, 24, 32))
    assert seen == [(1, 8, 2, 3, 4)]


@pytest.mark.component("position attention module")
def test_position_attention_is_that_of_torch_without_its_scale():
    attention, x = awake(PositionAttention(16)), torch.randn(2, 16, 2, 3, 4)
    query, key, value = (serialised(part(x)) for part in (attention.query, attention.key, attention.value))
    said = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    assert query.shape == (2, 24, 2) and value.shape == (2, 24, 16)
    assert torch.allclose(attention(x), x + 0.5 * said.mT.reshape(x.shape), atol=1e-5)


@pytest.mark.component("position attention module")
def test_opposite_corners_hear_each_other():
    attention, x = awake(PositionAttention(8)), torch.randn(1, 8, 4, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(attention(x)[0, :, 0, 0, 0].sum(), x)
    assert (gradient[0].abs().amax(0) > 0).all()


@pytest.mark.component("position attention module")
def test_it_starts_as_if_it_were_not_there():
    x = torch.randn(1, 8, 4, 4, 4)
    assert torch.equal(PositionAttention(8)(x), x)


@pytest.mark.component("position attention module")
def test_the_network_hears_from_afar_by_attention_alone():
    """At the bottom, with convolutions that see 3 voxels, a corner hears of the opposite one only by attention."""
    for attention in (True, False):
        network, heard = net(attention=attention, dropout=0.0).eval(), []
        for module in network.modules():
            if isinstance(module, PositionAttention):
                awake(module)
        network.bottom[2].register_forward_hook(lambda _, inputs, output, heard=heard: heard.extend([*inputs, output]))
        network(torch.randn(1, 1, 64, 16, 16))
        before, after = heard
        (gradient,) = torch.autograd.grad(after[0, :, 0, 0, 0].sum(), before)
        assert bool((gradient[0, :, -1, -1, -1] != 0).any()) == attention


@pytest.mark.component("cross-attention in the decoder")
def test_cross_attention_weighs_voxels_by_both():
    """Against the formula, with batch normalisation as it stands before training."""
    attention, scale = CrossAttention(4).eval(), (1 + 1e-5) ** -0.5
    level, below = torch.randn(2, 2, 4, 3, 5, 2).unbind(0)
    both = F.relu(scale * (attention.level[0](level) + attention.below[0](below)))
    weight = torch.sigmoid(scale * attention.weigh[0](both))
    assert weight.shape == (2, 1, 3, 5, 2)
    assert torch.allclose(attention(level, below), weight * level, atol=1e-6)


@pytest.mark.component("cross-attention in the decoder")
def test_what_came_from_below_decides():
    attention, level = CrossAttention(4).eval(), torch.rand(1, 4, 4, 4, 4) + 1
    share = [attention(level, torch.randn(1, 4, 4, 4, 4)) / level for _ in range(2)]
    assert not torch.allclose(*share)
    for each in share:
        assert (each > 0).all() and (each < 1).all()
        assert torch.allclose(each, each[:, :1].expand_as(each), atol=1e-6)


@pytest.mark.component("cross-attention in the decoder")
def test_every_level_of_the_decoder_has_one():
    network, sides = net(), []
    for attention in network.attend:
        attention.register_forward_hook(lambda _, inputs, __: sides.append([x.shape[-1] for x in inputs]))
    network(torch.randn(2, 1, 16, 16, 16))
    assert sides == [[2, 2], [4, 4], [8, 8], [16, 16]]


@pytest.mark.component("multi-scale module")
def test_the_mean_of_all_levels_predicts():
    network, image = net().eval(), torch.randn(1, 1, 16, 24, 16)
    maps, logits = network.maps(image), []
    for head in network.heads:
        head.register_forward_hook(lambda _, __, output: logits.append(output))
    found = network(image).softmax(1)
    assert [x.shape[2:] for x in logits] == [(2, 3, 2), (4, 6, 4), (8, 12, 8), (16, 24, 16)]
    for each, own in zip(maps, logits, strict=True):
        assert torch.allclose(each, F.interpolate(own, size=(16, 24, 16), mode="trilinear").softmax(1), atol=1e-6)
    assert torch.allclose(found, torch.stack(maps).mean(0), atol=1e-5)


@pytest.mark.component("multi-scale module")
@pytest.mark.parametrize("hybrid", [True, False])
def test_coarser_maps_are_supervised_less_and_less(hybrid):
    method = Serialised(channels=SMALL, hybrid=hybrid)
    nets, images = method.build(1, 3, 3), batch()
    nets["model"].drop.p = 0.0
    maps = nets["model"].maps(images.images)
    values = [
        hybrid_loss(p, images.labels) if hybrid else find_loss("both")(logarithm(p), images.labels)
        for p in (torch.stack(maps).mean(0), *maps)
    ]
    for step, weight in ((0, 0.4), (4, 0.4), (5, 0.32), (99, 0.4 * 0.8**19)):
        wanted = values[0] + weight * sum(values[1:4])
        assert torch.allclose(method.training_step(nets, images, None, Moment(step, 100)), wanted, atol=1e-4)


@pytest.mark.component("hybrid loss")
def test_the_hybrid_loss_is_tversky_of_monai_and_cross_entropy_of_torch():
    probabilities, labels = torch.randn(2, 3, 4, 5, 6).softmax(1), torch.randint(0, 3, (2, 4, 5, 6)).byte()
    truth = F.one_hot(labels.long(), 3).movedim(-1, 1).float()
    tversky = TverskyLoss(alpha=0.3, beta=0.7, smooth_nr=0, smooth_dr=1)(probabilities, truth)
    wanted = tversky + F.binary_cross_entropy(probabilities, truth)
    assert torch.allclose(hybrid_loss(probabilities, labels), wanted, atol=1e-6)


@pytest.mark.component("hybrid loss")
def test_a_miss_costs_more_than_a_find_too_much():
    labels = torch.zeros(1, 6, 6, 6).long()
    labels[:, 2:4, 2:4, 2:4] = 1
    small, large = labels.clone(), labels.clone()
    small[:, 2:4, 2:4, 3], large[:, 2:4, 2:4, 4] = 0, 1
    missed, extra = (
        hybrid_loss(0.02 + 0.96 * F.one_hot(x, 2).movedim(-1, 1).float(), labels.byte()) for x in (small, large)
    )
    assert missed > extra


@pytest.mark.component("hybrid loss")
def test_unlabelled_voxels_do_not_count():
    probabilities, labels = torch.randn(2, 3, 4, 4, 4).softmax(1), torch.randint(0, 3, (2, 4, 4, 4)).byte()
    masked, changed = labels.clone(), probabilities.clone()
    masked[:, 2:], changed[:, :, 2:] = 255, torch.randn(2, 3, 2, 4, 4).softmax(1)
    found = hybrid_loss(changed, masked)
    assert torch.allclose(found, hybrid_loss(probabilities, masked), atol=1e-6)
    assert torch.allclose(found, hybrid_loss(probabilities[:, :, :2], labels[:, :2]), atol=1e-6)


@pytest.mark.parametrize("size", [(16, 16, 16), (8, 24, 16), (9, 11, 14), (8, 8, 8)])
def test_any_size_comes_back(size):
    network = net()
    assert network(torch.randn(2, 1, *size)).shape == (2, 3, *size)
    assert all(each.shape == (2, 3, *size) for each in network.maps(torch.randn(2, 1, *size)))


def test_the_ablation_lacks_attention_alone():
    """With its weights, and attention that passes everything on, the whole network says the same."""
    whole, bare = (Serialised(channels=SMALL, attention=attention).model(1, 3).eval() for attention in (True, False))
    left = bare.load_state_dict(whole.state_dict(), strict=False)
    assert not left.missing_keys
    assert left.unexpected_keys and all(key.startswith(("attend.", "bottom.2.")) for key in left.unexpected_keys)
    image = torch.randn(1, 1, 16, 16, 16)
    assert not torch.allclose(whole(image), bare(image), atol=1e-4)
    for attention in whole.attend:
        nn.init.zeros_(attention.weigh[1].weight), nn.init.constant_(attention.weigh[1].bias, 40.0)
    assert torch.allclose(whole(image), bare(image), atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"attention": False}, {"hybrid": False}])
def test_every_parameter_is_trained(settings):
    method = Serialised(channels=SMALL, **settings)
    nets = method.build(1, 3, 3)
    for module in nets["model"].modules():
        if isinstance(module, PositionAttention):
            awake(module)
    method.training_step(nets, batch(), None, Moment(0, 10)).backward()
    assert all(p.grad is not None for p in nets["model"].parameters())
    weights = [p for name, p in nets["model"].named_parameters() if name.endswith(("weight", "share"))]
    assert all(p.grad.abs().max() > 0 for p in weights)
