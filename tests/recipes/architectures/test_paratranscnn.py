"""ParaTransCNN: two encoders of one image, what each of them sees, and how their channels are weighed."""

import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks import ChannelSELayer
from monai.networks.nets.resnet import ResNetBlock

from medcook.methods import Batch, Moment
from medcook.recipes.architectures.paratranscnn import (
    ChannelAttention,
    ParallelEncoders,
    ParaTransCnn,
    Residual,
    TransformerEncoder,
    TransformerLayer,
    enlarged,
)

SMALL = (4, 8, 8, 16, 16)
ARMS = [{}, {"transformer": False}, {"convolutional": False}, {"attention": False}]


def net(**settings) -> ParaTransCnn:
    return ParaTransCnn(inputs=1, classes=3, channels=SMALL, **settings)


@pytest.mark.component("parallel encoders")
def test_both_encoders_read_the_image_itself():
    network, image, read = net(), torch.randn(1, 1, 32, 48), []
    for encoder in network.encoders:
        encoder.register_forward_hook(lambda _, inputs, output: read.append((inputs[0], output)))
    network(image)
    sizes = [(8, 12), (4, 6), (2, 3)]
    assert len(read) == 2
    for seen, levels in read:
        assert torch.equal(seen, image)
        assert [tuple(level.shape[2:]) for level in levels] == sizes
    assert [level.shape[1] for level in read[0][1]] == [8, 16, 16]
    assert [level.shape[1] for level in read[1][1]] == [16, 32, 64]


@pytest.mark.component("parallel encoders")
def test_convolutions_see_what_is_near_and_attention_all():
    """Of a pixel far away the first level of the one encoder hears nothing, that of the other something."""
    image = torch.randn(1, 1, 128, 128, requires_grad=True)
    for encoder, everywhere in zip(net().eval().encoders, (False, True), strict=True):
        (gradient,) = torch.autograd.grad(encoder(image)[0][0, :, 0, 0].square().sum(), image)
        assert gradient[..., :8, :8].abs().sum() > 0
        assert bool(gradient[..., 64:, 64:].abs().sum() > 0) == everywhere


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(6, 6, 1), (4, 6, 2)])
def test_a_residual_block_is_that_of_monai(inputs, outputs, stride):
    mine = Residual(inputs, outputs, stride).eval()
    shortcut = mine.shortcut if stride == 2 else None
    theirs = ResNetBlock(inputs, outputs, spatial_dims=2, stride=stride, downsample=shortcut).eval()
    theirs.conv1.load_state_dict(mine.convolutions[0].state_dict())
    theirs.conv2.load_state_dict(mine.convolutions[3].state_dict())
    x = torch.randn(2, inputs, 9, 8)
    assert torch.allclose(mine(x), theirs(x), atol=1e-6)


@pytest.mark.component("pyramid transformer branch")
@pytest.mark.parametrize("reduction", [1, 2])
def test_tokens_attend_to_the_whole_image(reduction):
    """Against the equations, head by head, each step added to what it was given."""
    layer, x = TransformerLayer(8, heads=2, reduction=reduction).eval(), torch.randn(2, 8, 4, 6)
    tokens = x.flatten(2).transpose(1, 2)
    asking = layer.first_norm(tokens)
    heard = asking
    if reduction == 2:
        grid = F.unfold(asking.transpose(1, 2).reshape(x.shape), 2, stride=2).transpose(1, 2)
        heard = grid @ layer.reduce.weight.flatten(1).T + layer.reduce.bias
        assert heard.shape == (2, 6, 8)
    weights, biases = (p.chunk(3) for p in (layer.attention.in_proj_weight, layer.attention.in_proj_bias))
    entered = zip((asking, heard, heard), weights, biases, strict=True)
    split = [F.linear(*one).split(4, dim=-1) for one in entered]
    heads = [(q @ k.transpose(1, 2) / 2).softmax(-1) @ v for q, k, v in zip(*split, strict=True)]
    tokens = tokens + layer.attention.out_proj(torch.cat(heads, dim=-1))
    first, _, second = layer.alone
    tokens = tokens + second(F.gelu(first(layer.second_norm(tokens))))
    assert torch.allclose(layer(x), tokens.transpose(1, 2).reshape(x.shape), atol=1e-5)


@pytest.mark.component("pyramid transformer branch")
def test_a_level_is_made_of_the_one_above():
    encoder = TransformerEncoder(1).eval()
    first, second, third = encoder(torch.randn(1, 1, 32, 32))
    assert [tuple(x.shape) for x in (first, second, third)] == [(1, 16, 8, 8), (1, 32, 4, 4), (1, 64, 2, 2)]
    assert torch.allclose(encoder.stages[1](first), second, atol=1e-5)
    assert torch.allclose(encoder.stages[2](second), third, atol=1e-5)


@pytest.mark.component("merging by channel attention")
def test_it_is_squeeze_and_excitation():
    mine, theirs = ChannelAttention(32), ChannelSELayer(2, 32, r=16)
    with torch.no_grad():
        for layer, weight in ((0, mine.squeeze.weight), (2, mine.excite.weight)):
            theirs.fc[layer].weight.copy_(weight), theirs.fc[layer].bias.zero_()
    x = torch.randn(3, 32, 5, 6)
    assert torch.allclose(mine(x), theirs(x), atol=1e-6)


@pytest.mark.component("merging by channel attention")
def test_channels_of_both_encoders_are_weighed_together():
    """The weights of the convolutional features depend on the transformer's, and the other way round."""
    network, image = net().eval(), torch.randn(1, 1, 32, 32)
    convolutional, attended = (encoder(image) for encoder in network.encoders)
    for merge, a, b, found in zip(network.merge, convolutional, attended, network.merged(image), strict=True):
        assert torch.allclose(found, merge(torch.cat([a, b], dim=1)), atol=1e-6)
        other = merge(torch.cat([a, b + 1], dim=1))[:, : a.shape[1]]
        assert not torch.allclose(found[:, : a.shape[1]], other)


@pytest.mark.component("skip connections and bottleneck")
def test_the_decoder_hears_all_three_levels():
    network, entered = net().eval(), []
    image = torch.randn(1, 1, 32, 32)
    blocks = (network.bottom, network.middle, network.fine)
    for block in blocks:
        block.register_forward_hook(lambda _, inputs, __: entered.append(inputs[0]))
    fine, middle, bottom = network.merged(image)
    network(image)
    for merged, x in zip((bottom, middle, fine), entered, strict=True):
        assert torch.allclose(x[:, : merged.shape[1]], merged, atol=1e-6)
    assert torch.allclose(entered[1][:, middle.shape[1] :], enlarged(network.bottom(bottom), 2), atol=1e-6)
    assert torch.allclose(entered[2][:, fine.shape[1] :], enlarged(network.middle(entered[1]), 2), atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (40, 36), (33, 47)])
@pytest.mark.parametrize("settings", ARMS)
def test_any_size_comes_back(size, settings):
    assert net(**settings)(torch.randn(2, 1, *size)).shape == (2, 3, *size)


def test_the_ablation_has_no_transformer_and_the_same_decoder():
    full, bare = (ParallelEncoders(transformer=there, channels=SMALL).model(1, 3) for there in (True, False))
    assert not any(isinstance(module, TransformerEncoder) for module in bare.modules())
    assert [type(encoder).__name__ for encoder in bare.encoders] == ["ConvolutionalEncoder"]
    encoders = [{k: v.shape for k, v in network.encoders[0].state_dict().items()} for network in (full, bare)]
    decoders = [{k for k in network.state_dict() if not k.startswith("encoders")} for network in (full, bare)]
    assert encoders[0] == encoders[1] and decoders[0] == decoders[1]


def test_without_attention_features_are_side_by_side():
    network, image = net(attention=False).eval(), torch.randn(1, 1, 32, 32)
    levels = zip(*(encoder(image) for encoder in network.encoders), strict=True)
    for found, pair in zip(network.merged(image), levels, strict=True):
        assert torch.equal(found, torch.cat(pair, dim=1))


@pytest.mark.parametrize("settings", ARMS)
def test_every_parameter_is_trained(settings):
    method = ParallelEncoders(channels=SMALL, **settings)
    nets = method.build(1, 3, 2)
    batch = Batch(torch.randn(2, 1, 32, 32), torch.randint(0, 3, (2, 32, 32)).byte())
    method.training_step(nets, batch, None, Moment(0, 10)).backward()
    assert all(p.grad is not None for p in nets["model"].parameters())
