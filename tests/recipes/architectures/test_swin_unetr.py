"""Swin UNETR: who attends to whom, what shifting adds, and that the encoder is MONAI's."""

import pytest
import torch
import torch.nn.functional as F

from medcook.recipes.architectures.swin_unetr import (
    Merge,
    Swin,
    SwinBlock,
    SwinEncoder,
    SwinUNETR,
    WindowAttention,
    joined,
    relative_position,
    strangers,
    windows,
)


def as_in_monai(state: dict) -> dict:
    """Our parameters by MONAI's names."""
    pairs = (("attention.bias", "attn.relative_position_bias_table"), ("attention", "attn"), ("mlp.0", "mlp.linear1"))
    renamed = {}
    for key, value in state.items():
        for ours, theirs in (*pairs, ("mlp.2", "mlp.linear2")):
            key = key.replace(ours, theirs)
        renamed[key] = value
    return renamed


def heard(block: SwinBlock, height: int, width: int, row: int, column: int) -> torch.Tensor:
    """(height, width): where what a block's attention says changes when one token changes."""
    x = torch.randn(1, height, width, 4)
    other = x.clone()
    other[0, row, column] += 1
    return (block.attend(other) - block.attend(x)).abs().amax((0, 3)) > 1e-6


@pytest.mark.component("shifted windows")
def test_windows_and_masks_are_those_of_monai():
    from monai.networks.nets.swin_unetr import compute_mask, window_partition, window_reverse

    x = torch.randn(2, 8, 12, 3)
    assert torch.equal(windows(x, 4).flatten(0, 1), window_partition(x, (4, 4)))
    assert torch.equal(joined(windows(x, 4), 4, 8, 12), x)
    assert torch.equal(window_reverse(windows(x, 4).flatten(0, 1), (4, 4), (2, 8, 12)), x)
    assert torch.equal(strangers(8, 12, 4, (2, 2)), compute_mask([8, 12], (4, 4), (2, 2), "cpu") < 0)


@pytest.mark.component("shifted windows")
@pytest.mark.parametrize("shift", [0, 2])
def test_a_token_hears_its_own_window_alone(shift):
    """Windows of 4 x 4: where a token is heard is the (shifted) window that it is in, cut off at the edges."""
    block = SwinBlock(4, 2, 4, shift)
    for row, column in ((0, 0), (5, 6), (11, 3)):
        top, left = ((place - shift) // 4 * 4 + shift for place in (row, column))
        wanted = torch.zeros(12, 12, dtype=torch.bool)
        wanted[max(top, 0) : top + 4, max(left, 0) : left + 4] = True
        assert torch.equal(heard(block, 12, 12, row, column), wanted)


@pytest.mark.component("shifted windows")
def test_neighbours_across_a_border_meet_in_the_second_layer():
    still, shifted = (SwinBlock(4, 2, 4, shift) for shift in (0, 2))
    assert not heard(still, 8, 8, 3, 3)[4, 4] and heard(shifted, 8, 8, 3, 3)[4, 4]


@pytest.mark.component("shifted windows")
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(8, 12), (7, 10), (4, 8)])
def test_a_block_is_that_of_monai(shift, size):
    """With the same weights, also where zeros fill the last windows, and where one window is as high as the image."""
    from monai.networks.nets.swin_unetr import SwinTransformerBlock, compute_mask, get_window_size

    ours = SwinBlock(6, 3, 4, shift)
    reference = SwinTransformerBlock(6, 3, (4, 4), (shift, shift))
    missing = reference.load_state_dict(as_in_monai(ours.state_dict()), strict=False).missing_keys
    assert missing == ["attn.relative_position_index"]
    x, whole = torch.randn(2, *size, 6), [-(-length // 4) * 4 for length in size]
    by = get_window_size(size, (4, 4), (shift, shift))[1]
    hidden = strangers(*whole, 4, by) * -100.0
    if all(by):
        assert torch.equal(hidden, compute_mask(whole, (4, 4), by, "cpu"))
    assert torch.allclose(ours(x), reference(x, hidden), atol=1e-5)


@pytest.mark.component("shifted windows")
def test_the_bias_knows_the_relative_position_alone():
    """Pair by pair: the same number for the same displacement, another for another."""
    found = relative_position(3)
    seen = {}
    for a in range(9):
        for b in range(9):
            seen.setdefault((a // 3 - b // 3, a % 3 - b % 3), set()).add(int(found[a, b]))
    assert all(len(numbers) == 1 for numbers in seen.values())
    assert set.union(*seen.values()) == set(range(25))


@pytest.mark.component("shifted windows")
def test_attention_written_out():
    """One head, one window, token by token."""
    attention, tokens = WindowAttention(4, 1, 2), torch.randn(1, 1, 4, 4)
    q, k, v = attention.qkv(tokens[0, 0]).chunk(3, -1)
    hidden = torch.tensor([[a == 0 and b == 3 for b in range(4)] for a in range(4)])[None]
    told = torch.zeros(4, 4)
    for a in range(4):
        scores = [q[a] @ k[b] / 2 + attention.bias[attention.position[a, b], 0] for b in range(4)]
        weight = torch.stack(scores).exp() * ~hidden[0, a]
        told[a] = weight @ v / weight.sum()
    assert torch.allclose(attention(tokens, hidden)[0, 0], attention.proj(told), atol=1e-6)


@pytest.mark.component("hierarchical Swin encoder")
def test_the_encoder_is_that_of_monai():
    """Stage by stage, down to a last one where a single window is the whole image."""
    from monai.networks.nets.swin_unetr import SwinTransformer, compute_mask

    ours = SwinEncoder(1, 4, side=4)
    reference = SwinTransformer(1, 4, (4, 4), (2, 2), (2,) * 4, (1, 2, 4, 8), spatial_dims=2)
    stages = [layers[0] for layers in (reference.layers1, reference.layers2, reference.layers3, reference.layers4)]
    reference.patch_embed.proj.load_state_dict(ours.embed.state_dict())
    for (*blocks, merge), stage in zip(ours.stages, stages, strict=True):
        for block, theirs in zip(blocks, stage.blocks, strict=True):
            theirs.load_state_dict(as_in_monai(block.state_dict()), strict=False)
        stage.downsample.load_state_dict(merge.state_dict())
    image = torch.randn(2, 1, 64, 64)
    x = [reference.patch_embed(image).permute(0, 2, 3, 1)]
    for stage in stages:
        still, shifted = stage.blocks
        hidden = compute_mask(x[-1].shape[1:3], (4, 4), (2, 2), "cpu")
        x.append(stage.downsample(shifted(still(x[-1], None), hidden)))
    for found, wanted in zip(ours(image), x, strict=True):
        wanted = F.layer_norm(wanted, wanted.shape[-1:]).permute(0, 3, 1, 2)
        assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.component("hierarchical Swin encoder")
def test_merging_is_that_of_monai():
    from monai.networks.nets.swin_unetr import PatchMerging

    ours, reference = Merge(3), PatchMerging(3, spatial_dims=2)
    reference.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 8, 3)
    assert torch.equal(ours(x), reference(x)) and ours(x).shape == (2, 3, 4, 6)


@pytest.mark.component("skips at five resolutions to a CNN decoder")
def test_the_encoder_speaks_at_five_resolutions():
    """A half to a thirty-second, each normalised over the features of a token, and twice as wide as the one before."""
    found = SwinEncoder(1, 4, side=4)(torch.randn(1, 1, 64, 96))
    assert [x.shape[1:] for x in found] == [(4 * 2**i, 32 // 2**i, 48 // 2**i) for i in range(5)]
    for x in found:
        assert x.mean(1).abs().max() < 1e-4 and (x.var(1, unbiased=False) - 1).abs().max() < 0.1


@pytest.mark.component("skips at five resolutions to a CNN decoder")
def test_every_resolution_reaches_the_decoder():
    """The image itself and five features: without any of them the logits are others."""
    network = SwinUNETR(inputs=1, classes=3, size=4, side=4)
    image = torch.randn(2, 1, 64, 64)
    wanted = network(image)
    for block in network.skip:
        handle = block.register_forward_hook(lambda block, inputs, output: torch.zeros_like(output))
        assert not torch.allclose(network(image), wanted, atol=1e-4)
        handle.remove()
    assert torch.equal(network(image), wanted)


@pytest.mark.parametrize("size", [(32, 32), (40, 36), (33, 47)])
def test_any_size_comes_back(size):
    network = SwinUNETR(inputs=1, classes=3, size=4, side=4)
    assert network(torch.randn(2, 1, *size)).shape == (2, 3, *size)


def test_what_is_padded_is_zero():
    network = SwinUNETR(inputs=1, classes=3, size=4, side=4).eval()
    image = torch.randn(1, 1, 40, 36)
    wanted = network(F.pad(image, (0, 28, 0, 24)))[..., :40, :36]
    assert torch.equal(network(image), wanted)


def test_the_ablation_lacks_the_shift_alone():
    full, bare = (Swin(shift=shift, size=4, side=4).model(1, 3) for shift in (True, False))
    bare.load_state_dict(full.state_dict())
    assert [block.shift for block in full.modules() if isinstance(block, SwinBlock)] == [0, 2] * 4
    assert not any(block.shift for block in bare.modules() if isinstance(block, SwinBlock))
    image = torch.randn(1, 1, 64, 64)
    assert not torch.allclose(full.eval()(image), bare.eval()(image))
    for block in full.modules():
        if isinstance(block, SwinBlock):
            block.shift = 0
    assert torch.equal(full(image), bare(image))


def test_everything_is_trained():
    network = SwinUNETR(inputs=1, classes=3, size=4, side=4)
    network(torch.randn(2, 1, 32, 32)).square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())
