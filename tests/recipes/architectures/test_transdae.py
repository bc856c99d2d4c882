"""TransDAE: two attentions against their definitions, what the skips hear, and what each switch takes away."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from medcook.recipes.architectures.transdae import (
    Channel,
    DualBlock,
    InterScale,
    MixedFeedForward,
    Spatial,
    TransDae,
    TransDaeNet,
    channel_attention,
    efficient_attention,
)


def three(tokens: int = 10, channels: int = 8) -> list[torch.Tensor]:
    """Queries, keys and values (2, tokens, channels)."""
    return [torch.randn(2, tokens, channels) for _ in range(3)]


@pytest.mark.component("efficient spatial attention")
def test_it_is_an_attention_with_two_softmaxes():
    """Against the N x N matrix written out, whose rows are weights: they sum to one."""
    queries, keys, values = three()
    matrix = queries.softmax(dim=2) @ keys.softmax(dim=1).transpose(1, 2)
    assert torch.allclose(matrix.sum(-1), torch.ones(2, 10), atol=1e-6)
    assert torch.allclose(efficient_attention(queries, keys, values), matrix @ values, atol=1e-6)


@pytest.mark.component("efficient spatial attention")
def test_twice_the_pixels_cost_twice_as_much():
    counts = []
    for tokens in (64, 128):
        with FlopCounterMode(display=False) as counter:
            efficient_attention(*three(tokens))
        counts.append(counter.get_total_flops())
    assert counts == [2 * 2 * 2 * 64 * 8 * 8, 2 * 2 * 2 * 128 * 8 * 8]


@pytest.mark.component("efficient spatial attention")
def test_a_pixel_hears_all_others():
    layer, x = Spatial(8), torch.randn(1, 4, 5, 8)
    other = x.clone()
    other[:, 3, 0] += torch.arange(8.0)
    assert ((layer(other) - layer(x)).abs().amax(-1) > 1e-6).all()


@pytest.mark.component("channel attention")
def test_it_is_attention_with_channels_as_tokens():
    """Against torch's, head by head, on transposed and normalised queries and keys."""
    queries, keys, values = three()
    scale = torch.tensor([0.5, 2.0])
    found = channel_attention(queries, keys, values, scale)
    for head in (0, 1):
        here = slice(4 * head, 4 * head + 4)
        q, k, v = (x[..., here].transpose(1, 2) for x in (queries, keys, values))
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        wanted = F.scaled_dot_product_attention(q, k, v, scale=float(scale[head]))
        assert torch.allclose(found[..., here], wanted.transpose(1, 2), atol=1e-5)


@pytest.mark.component("channel attention")
def test_the_order_of_pixels_does_not_matter_to_channels():
    """The same weights mix the channels of every pixel: to move pixels is to move what comes out."""
    layer, x = Channel(8, heads=2), torch.randn(1, 4, 5, 8)
    assert torch.allclose(layer(x.flip(1)), layer(x).flip(1), atol=1e-6)
    with torch.no_grad():
        layer.scale.fill_(1000.0)
    _, keys, values = three()
    sharp = channel_attention(keys, keys, values, layer.scale)
    assert torch.allclose(sharp, values, atol=1e-4)  # each channel is most like itself


@pytest.mark.component("inter-scale interaction module")
def test_both_scales_are_heard_over_a_large_kernel():
    """An impulse in either reaches 23 x 23 pixels (24 x 24 from the deeper); without interaction only itself."""
    skip, deep = torch.randn(1, 4, 40, 40), torch.randn(1, 6, 20, 20)
    for interaction, sides in ((True, (23, 24)), (False, (1, 2))):
        module = InterScale(4, 6, interaction=interaction).double()
        before = module(skip.double(), deep.double())
        fine, coarse = skip.double(), deep.double()
        fine[:, :, 20, 20] += 1
        coarse[:, :, 10, 10] += 1
        for after, side in zip((module(fine, deep.double()), module(skip.double(), coarse)), sides, strict=True):
            changed = ((after - before).abs() > 1e-12).any(1)[0]
            assert changed.any(0).sum() == side and changed.any(1).sum() == side


@pytest.mark.component("inter-scale interaction module")
def test_the_parts_are_one_large_kernel():
    """5 x 5, then 7 x 7 with gaps: one depthwise 23 x 23, away from the border; it weights what is joined."""
    module = InterScale(3, 4)
    both = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        module.near.bias.zero_()
        impulse = torch.zeros(1, 3, 45, 45)
        impulse[:, :, 22, 22] = 1
        kernel = module.far(module.near(impulse)) - module.far.bias[:, None, None]
        kernel = kernel[:, :, 11:34, 11:34].flip(2, 3).transpose(0, 1)
    wanted = F.conv2d(both, kernel, module.far.bias, groups=3)
    assert torch.allclose(module.far(module.near(both))[:, :, 11:-11, 11:-11], wanted, atol=1e-4)
    with torch.no_grad():
        module.join.weight.copy_(torch.eye(3, 6)[..., None, None]), module.join.bias.zero_()
    weights = module.point(module.far(module.near(both)))
    assert torch.allclose(module(both, torch.randn(1, 4, 20, 20)), both * (1 + weights), atol=1e-5)


@pytest.mark.component("hierarchical transformer")
def test_three_scales_with_overlapping_patches():
    network, sizes = TransDaeNet(inputs=1, classes=4), []
    for block in network.down:
        block.register_forward_hook(lambda _, given, out: sizes.append(tuple(out.shape[1:])))
    with torch.no_grad():
        assert network(torch.randn(1, 1, 128, 128)).shape == (1, 4, 128, 128)
    assert sizes == [(32, 32, 32), (64, 16, 16), (64, 8, 8)]
    assert all(patches.conv.kernel_size[0] > patches.conv.stride[0] for patches in network.patches)


@pytest.mark.component("hierarchical transformer")
def test_a_block_is_two_attentions_with_residuals():
    """Channels, feed-forward, pixels, feed-forward, each on its norm and added."""
    block = DualBlock(8)
    image = torch.randn(2, 8, 3, 5)
    x = image.permute(0, 2, 3, 1)
    assert [type(step) for step in block.steps] == [Channel, MixedFeedForward, Spatial, MixedFeedForward]
    for norm, step in zip(block.norms, block.steps, strict=True):
        x = x + step(norm(x))
    assert torch.allclose(block(image), x.permute(0, 3, 1, 2), atol=1e-6)


@pytest.mark.component("hierarchical transformer")
def test_the_feed_forward_layer_tells_where():
    """A pixel hears its neighbours and no others: without positions, attention alone would not know them."""
    layer, x = MixedFeedForward(8), torch.randn(1, 5, 5, 8)
    other = x.clone()
    other[:, 2, 2] += torch.arange(8.0)
    changed = (layer(other) - layer(x)).abs().amax(-1)[0] > 1e-6
    wanted = torch.zeros(5, 5, dtype=torch.bool)
    wanted[1:4, 1:4] = True
    assert torch.equal(changed, wanted)


@pytest.mark.parametrize("size", [(32, 32), (40, 36), (33, 47)])
def test_any_size_comes_back(size):
    network = TransDaeNet(inputs=1, classes=3, channels=(16, 32, 32))
    assert network(torch.randn(1, 1, *size)).shape == (1, 3, *size)


@pytest.mark.parametrize(("switch", "kind"), [("channel", Channel), ("spatial", Spatial)])
def test_a_switch_takes_one_attention_away(switch, kind):
    """With its norm; the other attention and both feed-forward layers stay."""
    full, bare = (DualBlock(8, **{switch: on}) for on in (True, False))
    kinds = [type(step) for step in bare.steps]
    assert kinds == [type(step) for step in full.steps if not isinstance(step, kind)] and len(kinds) == 3
    network = TransDae(**{switch: False}).model(1, 3)
    assert not any(isinstance(module, kind) for module in network.modules())


def test_without_interaction_the_skips_join_alone():
    full, bare = (set(dict(TransDae(interaction=on).model(1, 3).named_parameters())) for on in (True, False))
    assert bare < full
    assert {name.split(".")[2] for name in full - bare} == {"near", "far", "point"}


def test_every_parameter_learns():
    network = TransDaeNet(inputs=1, classes=3, channels=(16, 32, 32))
    network(torch.randn(2, 1, 32, 32)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())
