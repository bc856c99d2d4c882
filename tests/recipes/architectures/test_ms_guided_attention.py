"""Guided attention: who hears whom, what guides the second stage, and what the losses between modules compare."""

import pytest
import torch
import torch.nn.functional as F

from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.recipes.architectures.ms_guided_attention import (
    ChannelAttention,
    GuidedAttention,
    GuidedAttentionNet,
    PositionAttention,
    Refinement,
    Stage,
    guidance,
    resized,
)

SMALL = (4, 6, 8, 8)


def net(**settings) -> GuidedAttentionNet:
    return GuidedAttentionNet(inputs=1, classes=3, channels=SMALL, width=8, **settings)


def batch(side: int = 32) -> Batch:
    return Batch(torch.randn(2, 1, side, side), torch.randint(0, 3, (2, side, side)).byte())


@pytest.mark.component("multi-scale features")
def test_four_scales_have_one_size_and_are_fused():
    network, image, fused = net().eval(), torch.randn(1, 1, 32, 32), []
    network.fuse.register_forward_hook(lambda _, inputs, output: fused.append((inputs[0], output)))
    found = network.scales(image)
    network(image)
    assert [x.shape for x in found] == 4 * [(1, 8, 8, 8)]
    assert torch.equal(fused[0][0], torch.cat(found, dim=1))
    entered = network.refine(image).stages[0].entered
    assert torch.allclose(entered, torch.cat([torch.cat(found), fused[0][1].expand(4, -1, -1, -1)], dim=1), atol=1e-6)


@pytest.mark.component("multi-scale features")
def test_the_last_four_levels_are_the_scales():
    """Against the levels, by hand: each through its 1 x 1 convolution, then to a quarter of the image."""
    network = GuidedAttentionNet(inputs=1, classes=3, channels=(4, 4, 6, 8, 8), width=8).eval()
    x, levels = torch.randn(1, 1, 48, 32), []
    for level, block in enumerate(network.down):
        levels.append(block(F.max_pool2d(levels[-1], 2) if level else x))
    wanted = [resized(f(y), (12, 8)) for f, y in zip(network.reduce, levels[1:], strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(network.scales(x), wanted, strict=True))


@pytest.mark.component("position attention")
@pytest.mark.parametrize("pool", [1, 2])
def test_a_position_hears_all_positions(pool):
    """Against a loop over positions, and over those heard."""
    attention, x = PositionAttention(8, pool), torch.randn(2, 8, 4, 6)
    torch.nn.init.constant_(attention.gamma, 0.5)
    rows, columns = range(0, 4, pool), range(0, 6, pool)
    means = torch.stack([x[:, :, i : i + pool, j : j + pool].mean((2, 3)) for i in rows for j in columns], dim=2)
    query = attention.query(x).flatten(2)
    key, value = (f(means[..., None])[..., 0] for f in (attention.key, attention.value))
    wanted = x.flatten(2).clone()
    for image in range(2):
        for i in range(24):
            weights = torch.stack([query[image, :, i] @ k for k in key[image].T]).softmax(0)
            wanted[image, :, i] += 0.5 * sum(w * v for w, v in zip(weights, value[image].T, strict=True))
    assert torch.allclose(attention(x).flatten(2), wanted, atol=1e-5)


@pytest.mark.component("channel attention")
def test_a_channel_hears_the_channels_least_like_it():
    """Against a loop over channels, with the maximum taken off as in the published code."""
    attention, x = ChannelAttention(), torch.randn(2, 5, 3, 4)
    torch.nn.init.constant_(attention.gamma, 0.5)
    flat, wanted = x.flatten(2), x.flatten(2).clone()
    for image in range(2):
        for i in range(5):
            alike = torch.stack([flat[image, i] @ flat[image, j] for j in range(5)])
            weights = (alike.max() - alike).softmax(0)
            wanted[image, i] += 0.5 * sum(weights[j] * flat[image, j] for j in range(5))
    assert torch.allclose(attention(x).flatten(2), wanted, atol=1e-5)


@pytest.mark.component("channel attention")
def test_similarities_are_not_rounded():
    """288 and 289 are the same number in bfloat16, and weights by the softmax of them quite different ones."""
    attention, x = ChannelAttention(), torch.full((1, 2, 8, 16), 1.5)
    x[:, 1] = torch.where(torch.arange(16) < 8, 3.0, 0.0103)
    torch.nn.init.ones_(attention.gamma)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(x.bfloat16())
    weight = torch.sigmoid(torch.tensor(1.0))
    assert torch.allclose(found[:, 0].float(), x[:, 0] + weight * x[:, 0] + (1 - weight) * x[:, 1], atol=0.03)


@pytest.mark.component("position attention")
@pytest.mark.component("channel attention")
def test_attention_begins_as_the_identity():
    x = torch.randn(2, 8, 5, 6)
    assert torch.equal(PositionAttention(8)(x), x) and torch.equal(ChannelAttention()(x), x)


@pytest.mark.component("guided refinement")
def test_a_refinement_weighs_both_attentions_by_what_was_decoded():
    refine, entered, decoded = Refinement(8, attention=True).eval(), *torch.randn(2, 2, 16, 6, 7)
    both = refine.position(entered) + refine.channel(entered)
    assert torch.allclose(refine(entered, decoded), refine.out(both * refine.semantic(decoded)), atol=1e-6)
    assert [type(refine.position[3]), type(refine.channel[3])] == [PositionAttention, ChannelAttention]


@pytest.mark.component("guided refinement")
def test_the_second_stage_is_guided_by_the_first():
    """What enters it are the features again, and the fused ones times the first attention."""
    network, image = net().eval(), torch.randn(1, 1, 32, 32)
    found, (_, late, (one, two)) = network.scales(image), network.refine(image)
    fused = network.fuse(torch.cat(found, dim=1))
    for i in range(4):
        attended = network.stages[0][i](one.entered[[i]], one.decoded[[i]])
        assert torch.allclose(two.entered[[i]], torch.cat([found[i], attended * fused], dim=1), atol=1e-6)
        refined = network.stages[1][i](two.entered[[i]], two.decoded[[i]])
        assert torch.allclose(late[i], network.late[i](refined), atol=1e-6)


@pytest.mark.component("losses between modules")
def test_guidance_is_a_quarter_of_codes_and_a_tenth_of_what_is_rebuilt():
    """Summed over four scales, of which each has a mean squared difference of its own."""
    first, second = (Stage(*(torch.randn(8, c, side, side) for c, side in ((16, 4), (8, 1), (16, 4)))) for _ in "ab")
    wanted = 0.0
    for scale in torch.arange(8).split(2):
        wanted += 0.25 * (first.code[scale] - second.code[scale]).square().mean()
        wanted += 0.1 * sum((s.decoded[scale] - s.entered[scale]).square().mean() for s in (first, second))
    assert guidance(first, second).item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.component("losses between modules")
def test_codes_hold_all_that_is_decoded():
    """From a sixteenth of the positions: the reconstruction has no other way around."""
    network, x = net().eval(), torch.randn(1, 16, 8, 8)
    module, codes = network.codes[0], []
    module.decode[0].register_forward_hook(lambda _, inputs, __: codes.append(inputs[0]))
    code, decoded = module(x)
    assert code.shape == (1, 8, 2, 2) and decoded.shape == x.shape
    assert torch.equal(codes[0], code)


@pytest.mark.component("losses between modules")
@pytest.mark.component("deep supervision")
@pytest.mark.parametrize("guided", [True, False])
def test_eight_heads_and_the_guidance_are_one_loss(guided):
    method, data = GuidedAttention(channels=SMALL, guided=guided), batch()
    nets = method.build(1, 3, 2)
    early, late, stages = nets["model"].refine(data.images)
    losses = [find_loss("both")(resized(x, (32, 32)), data.labels) for x in [*early, *late]]
    wanted = (sum(losses) + guidance(*stages) * guided) / 8
    assert len(losses) == 8
    assert torch.allclose(method.training_step(nets, data, None, Moment(0, 10)), wanted, atol=1e-5)


@pytest.mark.component("deep supervision")
def test_the_refined_scales_predict_together():
    network, image = net().eval(), torch.randn(1, 1, 32, 32)
    wanted = sum(resized(x, (32, 32)) for x in network.refine(image).late) / 4
    assert torch.allclose(network(image), wanted, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (40, 36), (33, 47)])
def test_any_size_comes_back(size):
    assert net()(torch.randn(2, 1, *size)).shape == (2, 3, *size)


def test_the_ablation_has_no_attention():
    full, bare = (GuidedAttention(attention=attention, channels=SMALL).model(1, 3) for attention in (True, False))
    names = [{name for name, _ in network.named_parameters()} for network in (full, bare)]
    inside = ("query", "key", "value", "gamma")
    assert names[0] - names[1] == {name for name in names[0] if any(part in name for part in inside)}
    assert names[1] < names[0]


@pytest.mark.parametrize("settings", [{}, {"attention": False}, {"guided": False}])
def test_every_parameter_is_trained(settings):
    method = GuidedAttention(channels=SMALL, **settings)
    nets = method.build(1, 3, 2)
    method.training_step(nets, batch(), None, Moment(0, 10)).backward()
    assert all(p.grad is not None for p in nets["model"].parameters())
