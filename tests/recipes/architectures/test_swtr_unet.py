"""SWTR-Unet: whom a token hears in a pair of blocks, and what reaches the decoder."""

import pytest
import torch
import torch.nn.functional as F

from medcook.methods import Batch, Moment
from medcook.recipes.architectures.swtr_unet import Swtr, Tokens

SMALL = (4, 6, 8, 16)


def net(**settings) -> torch.nn.Module:
    torch.manual_seed(0)
    return Swtr(channels=SMALL, side=4, **settings).model(1, 3)


def masked_attention(block, x: torch.Tensor) -> torch.Tensor:
    """The attention of a block on tokens (1, H, W, C), among all at once: who is not in one's window is masked out."""
    _, height, width, channels = x.shape
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    row, column = row.flatten(), column.flatten()
    window = torch.stack([torch.div(at - block.shift, block.side, rounding_mode="floor") for at in (row, column)])
    apart = (window[:, :, None] != window[:, None]).any(0)
    down, right = (at[:, None] - at[None] + block.side - 1 for at in (row, column))
    number = (down * (2 * block.side - 1) + right).clamp(0, len(block.attention.bias) - 1)
    bias = block.attention.bias[number].permute(2, 0, 1).masked_fill(apart, -torch.inf)
    heads = block.attention.heads
    queries, keys, values = (
        part.reshape(1, -1, heads, channels // heads).transpose(1, 2)
        for part in block.attention.qkv(x.flatten(1, 2)).chunk(3, -1)
    )
    told = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias[None])
    return block.attention.proj(told.transpose(1, 2).flatten(2)).reshape(x.shape)


@pytest.mark.component("transformer blocks")
@pytest.mark.parametrize("shift", [True, False])
def test_tokens_pass_two_blocks_between_projections(shift):
    """Against attention among all tokens with masks; in the second block windows begin half a side further."""
    torch.manual_seed(0)
    layer, x = Tokens(32, side=4, shift=shift), torch.randn(1, 32, 8, 12)
    tokens = layer.enter(x.movedim(1, -1))
    for block, by in zip(layer.blocks, (0, 2 if shift else 0), strict=True):
        assert block.shift == by
        torch.nn.init.normal_(block.attention.bias)
        tokens = tokens + masked_attention(block, block.norm1(tokens))
        tokens = tokens + block.mlp(block.norm2(tokens))
    wanted = layer.leave(F.layer_norm(tokens, (32,))).movedim(-1, 1)
    assert torch.allclose(layer(x), wanted, atol=1e-5)


@pytest.mark.component("transformer blocks")
def test_tokens_across_a_border_meet_if_windows_are_shifted():
    heard = {}
    for name, settings in {"shifted": {}, "same": {"shift": False}, "none": {"blocks": 0}}.items():
        layer, x = Tokens(16, side=4, **settings), torch.randn(1, 16, 8, 8, requires_grad=True)
        (gradient,) = torch.autograd.grad(layer(x)[0, :4, 3, 3].sum(), x)
        heard[name] = gradient[0].abs().amax(0) > 0
    assert heard["shifted"].all()
    assert heard["same"][:4, :4].all() and heard["same"].sum() == 16
    assert heard["none"].sum() == 1 and heard["none"][3, 3]


@pytest.mark.component("transformer blocks")
def test_the_three_deepest_levels_pass_them_on_the_way_to_the_decoder_alone():
    """The encoder is convolutions throughout; the decoder gets what the blocks make of its deep levels."""
    network, image, given, made = net().eval(), torch.randn(1, 1, 32, 32), [], []
    for tokens in network.tokens:
        tokens.register_forward_hook(lambda _, inputs, __: given.append(inputs[0]))
        tokens.register_forward_hook(lambda _, __, output: made.append(output))
    taken = []
    for block in network.up:
        block.register_forward_hook(lambda _, inputs, __: taken.append(inputs[0]))
    network(image)
    levels = network.encoded(image)
    assert all(torch.equal(a, b) for a, b in zip(given, levels[1:], strict=True))
    assert [len(tokens.blocks) for tokens in network.tokens] == [2, 2, 2]
    skips = [made[1], made[0], levels[0]]
    assert all(torch.equal(x[:, : skip.shape[1]], skip) for x, skip in zip(taken, skips, strict=True))
    deep = F.interpolate(made[2], size=made[1].shape[2:], mode="bilinear", align_corners=False)
    assert torch.equal(taken[0][:, made[1].shape[1] :], deep)


@pytest.mark.component("U-Net decoder")
def test_every_level_reaches_the_mask(monkeypatch):
    network, image = net().eval(), torch.randn(1, 1, 32, 32)
    levels, before = network.encoded(image), network(image)
    assert [tuple(level.shape[1:]) for level in levels] == [(4, 32, 32), (6, 16, 16), (8, 8, 8), (16, 4, 4)]
    for silent in range(4):
        changed = [level * (number != silent) for number, level in enumerate(levels)]
        monkeypatch.setattr(network, "encoded", lambda _, changed=changed: list(changed))
        assert not torch.allclose(network(image), before, atol=1e-6)


@pytest.mark.component("U-Net decoder")
def test_it_is_the_decoder_of_the_book():
    """With the features of the book's own encoder, and nothing in between, the masks are those of the book's U-Net."""
    from medcook.networks import UNet

    torch.manual_seed(0)
    book, network, image = UNet(classes=3, channels=SMALL).eval(), net(blocks=0).eval(), torch.randn(1, 1, 32, 32)
    network.up.load_state_dict(book.up.state_dict()), network.head.load_state_dict(book.head.state_dict())
    network.tokens = torch.nn.ModuleList(torch.nn.Identity() for _ in network.tokens)
    levels = [book.down[0](image)]
    for block in book.down[1:]:
        levels.append(block(F.max_pool2d(levels[-1], 2)))
    network.encoded = lambda _: levels
    assert torch.allclose(network(image), book(image), atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (40, 36), (33, 47), (16, 18)])
def test_any_size_comes_back(size):
    assert net()(torch.randn(2, 1, *size)).shape == (2, 3, *size)


def test_the_ablation_lacks_the_blocks_alone():
    full, bare = (dict(net(blocks=blocks).named_parameters()) for blocks in (2, 0))
    lost = {name for name in full if ".blocks." in name}
    assert lost and set(full) - lost == set(bare)
    assert all(full[name].shape == bare[name].shape for name in bare)
    assert {name.split(".")[2] for name in bare if name.startswith("tokens")} == {"enter", "leave", "norm"}


def test_without_shift_nothing_else_changes():
    full, bare = net(), net(shift=False)
    bare.load_state_dict(full.state_dict())
    image = torch.randn(1, 1, 32, 32)
    assert [block.shift for level in full.tokens for block in level.blocks] == [0, 2] * 3
    assert [block.shift for level in bare.tokens for block in level.blocks] == [0, 0] * 3
    assert not torch.equal(full.eval()(image), bare.eval()(image))


@pytest.mark.parametrize("settings", [{}, {"blocks": 0}, {"shift": False}])
def test_every_parameter_is_trained(settings):
    method = Swtr(channels=SMALL, side=4, **settings)
    nets = method.build(1, 3, 2)
    batch = Batch(torch.randn(2, 1, 32, 32), torch.randint(0, 3, (2, 32, 32)).byte())
    method.training_step(nets, batch, None, Moment(0, 10)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in nets["model"].parameters())


def test_it_works_in_half_precision():
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(net()(torch.randn(2, 1, 32, 32)).float()).all()
