"""D-Former: who attends to whom, how patches are merged and expanded, and where positions come from."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from medcook.methods import Batch, Moment
from medcook.recipes.volumes.d_former import (
    Attention,
    DFormer,
    DFormerBlock,
    Dilated,
    PatchExpanding,
    PatchMerging,
    PositionEncoding,
    TokenNorm,
    grouped,
    joined,
)

SIZES = [(8, 8, 4), (5, 6, 9), (1, 7, 4), (3, 3, 3)]
SCOPES = [False, True]
"""Whether attention is dilated: the global scope; else it is the local one."""


def net(**settings) -> DFormer:
    torch.manual_seed(0)
    return DFormer(inputs=1, classes=3, **{"width": 8, "depths": (2, 2), **settings})


def together(size: tuple[int, ...], side: int, dilated: bool) -> torch.Tensor:
    """(tokens, tokens): whether two tokens are of one group, by their positions."""
    names = []
    for position in product(*map(range, size)):
        sides = [min(side, length) for length in size]
        counts = [-(-length // own) for length, own in zip(size, sides, strict=True)]
        names.append([p % c if dilated else p // s for p, c, s in zip(position, counts, sides, strict=True)])
    names = torch.tensor(names)
    return (names[:, None] == names[None]).all(-1)


@pytest.mark.parametrize("dilated", SCOPES)
@pytest.mark.parametrize("size", SIZES)
def test_attention_is_that_among_all_tokens_with_other_groups_masked(size, dilated):
    """Also where filling is needed: nobody sees it."""
    attention, x = Attention(6, 2, 4, dilated).double(), torch.randn(2, *size, 6).double()
    tokens = x.flatten(1, 3)
    scores, values = [], attention.qkv(tokens)[..., 12:]
    for head in (slice(0, 3), slice(3, 6)):
        queries, keys, _ = attention.qkv(tokens).chunk(3, dim=-1)
        score = queries[..., head] @ keys[..., head].transpose(1, 2) / 3**0.5
        scores.append(score.masked_fill(~together(size, 4, dilated), -torch.inf).softmax(-1) @ values[..., head])
    wanted = attention.proj(torch.cat(scores, dim=-1)).reshape(2, *size, 6)
    assert torch.allclose(attention(x), wanted, atol=1e-10)


@pytest.mark.component("local scope attention")
def test_local_attention_does_not_cross_windows():
    attention, x = Attention(4, 1, 4, False), torch.randn(1, 8, 8, 8, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(attention(x)[0, 1, 6, 2].square().sum(), x)
    seen = gradient[0].abs().sum(-1) > 0
    assert seen[:4, 4:, :4].all() and seen.sum() == 64


@pytest.mark.component("dilated global attention")
def test_dilated_attention_reaches_over_the_whole_volume_at_the_cost_of_a_window():
    attention, x = Attention(4, 1, 4, True), torch.randn(1, 8, 12, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(attention(x)[0, 3, 7, 2].square().sum(), x)
    seen = gradient[0].abs().sum(-1) > 0
    assert seen[1::2, 1::3].all() and seen.sum() == 64


@pytest.mark.parametrize("dilated", SCOPES)
def test_groups_are_joined_again(dilated):
    x = torch.randn(2, 8, 6, 4, 5)
    groups = grouped(x, (4, 3, 4), dilated)
    assert groups.shape == (2, 4, 48, 5)
    assert torch.equal(joined(groups, (4, 3, 4), (8, 6, 4), dilated), x)


@pytest.mark.component("dilated global attention")
def test_local_and_global_scopes_alternate():
    def scopes(block):
        return [module.dilated for module in block.modules() if isinstance(module, Attention)]

    assert scopes(DFormerBlock(8, 6, 4)) == [False, True] * 3
    assert scopes(DFormerBlock(8, 6, 4, dilated=False)) == [False] * 6


@pytest.mark.component("U-shaped encoder and decoder")
def test_merging_takes_eight_neighbours_and_expanding_gives_them_back():
    merge, expand, x = PatchMerging(4), PatchExpanding(16), torch.randn(2, 6, 4, 5, 4)
    eight = [F.pad(x, (0, 0, 0, 1))[:, i::2, j::2, k::2] for i, j, k in product((0, 1), repeat=3)]
    assert torch.allclose(merge(x), merge.reduction(F.layer_norm(torch.cat(eight, -1), (32,))), atol=1e-6)
    deep = torch.randn(2, 3, 2, 3, 16)
    found, parts = expand(deep, (6, 4, 5)), expand.expansion(deep).chunk(8, dim=-1)
    assert found.shape == (2, 6, 4, 5, 8)
    for (i, j, k), part in zip(product((0, 1), repeat=3), parts, strict=True):
        part = F.layer_norm(part, (8,))
        assert torch.allclose(found[:, i::2, j::2, k::2], part[:, :, :, : 3 - k], atol=1e-6)


@pytest.mark.component("U-shaped encoder and decoder")
def test_tokens_become_fewer_and_wider_and_many_again():
    network, seen = net(depths=(2, 2, 6, 2)), []
    for block in (*network.down, *network.up):
        block.register_forward_hook(lambda module, _, output: seen.append((len(module), *output.shape[1:])))
    network(torch.randn(1, 1, 16, 32, 16))
    levels = [(3, 8, 16, 8, 8), (3, 4, 8, 4, 16), (7, 2, 4, 2, 32), (3, 1, 2, 1, 64)]
    assert seen == [*levels, *levels[2::-1]]


@pytest.mark.component("U-shaped encoder and decoder")
def test_the_decoder_hears_of_fine_tokens_and_of_deep_ones():
    network, image = net(), torch.randn(1, 1, 16, 16, 16)
    for part in ("skip", "deep"):
        changed = net()
        changed.load_state_dict(network.state_dict())
        with torch.no_grad():
            columns = slice(8, 16) if part == "skip" else slice(0, 8)
            changed.mix[0].weight[:, columns] = 0
        assert not torch.allclose(changed(image), network(image), atol=1e-4)


@pytest.mark.component("dynamic position encoding")
def test_the_encoding_is_a_depthwise_convolution_that_is_added():
    encode, x = PositionEncoding(3), torch.randn(1, 4, 5, 6, 3)
    weight, padded = encode.convolution.weight[:, 0], F.pad(x, (0, 0, 1, 1, 1, 1, 1, 1))
    wanted = x + encode.convolution.bias
    for i, j, k in product(range(3), repeat=3):
        wanted = wanted + padded[:, i : i + 4, j : j + 5, k : k + 6] * weight[:, i, j, k]
    assert torch.allclose(encode(x), wanted, atol=1e-5)


@pytest.mark.component("dynamic position encoding")
@pytest.mark.parametrize("position", [True, False])
def test_without_it_no_token_knows_where_it_is(position):
    """Of an image of one grey value, all tokens of the deepest grid, four voxels apart, say the same."""
    logits = net(position=position)(torch.ones(1, 1, 16, 16, 12))[:, :, ::4, ::4, ::4]
    assert torch.allclose(logits, logits[:, :, :1, :1, :1].expand_as(logits), atol=1e-5) != position


@pytest.mark.parametrize("size", [(16, 16, 16), (8, 64, 64), (32, 56, 40), (9, 11, 8)])
def test_any_size_comes_back(size):
    assert net(depths=(1, 1, 2, 1))(torch.randn(1, 1, *size)).shape == (1, 3, *size)


@pytest.mark.component("U-shaped encoder and decoder")
def test_it_starts_with_what_is_rare_being_rare():
    network, image = net(foreground=0.05), torch.randn(2, 1, 16, 16, 16)
    shares = network(image).softmax(1).mean((0, 2, 3, 4))
    assert 0.02 < shares[1:].sum() < 0.12
    torch.nn.init.zeros_(network.head.weight)
    shares = network(image).softmax(1).mean((0, 2, 3, 4))
    assert torch.allclose(shares, torch.tensor([0.95, 0.025, 0.025]), atol=1e-5)


def test_the_norm_learns_from_many_tokens_in_bfloat16():
    """Here its bias, whose gradient is the sum of what comes back: 40,000 times 0.125."""
    norm, tokens = TokenNorm(4), torch.randn(40_000, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (0.125 * norm(tokens)).sum().backward()
    assert torch.allclose(norm.bias.grad, torch.full((4,), 5000.0), rtol=1e-3)
    with torch.no_grad():
        found = norm.double()(tokens.double())
    assert torch.allclose(found, F.layer_norm(tokens.double(), (4,)))


def test_the_ablation_is_local_twice_and_otherwise_the_same():
    full, local = (Dilated(dilated=dilated, width=8, depths=(2, 2)).model(1, 3) for dilated in (True, False))
    local.load_state_dict(full.state_dict())
    small, large = torch.randn(1, 1, 8, 8, 8), torch.randn(1, 1, 24, 16, 16)
    assert torch.equal(full(small), local(small))  # four tokens a side: both scopes are everything
    assert not torch.allclose(full(large), local(large), atol=1e-4)


def test_it_also_works_in_bfloat16():
    network, image = net().eval(), torch.randn(1, 1, 16, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = network(image)
    assert (rough.float() - network(image)).abs().mean() < 0.03


@pytest.mark.parametrize("settings", [{}, {"dilated": False}, {"position": False}])
def test_every_parameter_is_trained(settings):
    method = Dilated(width=8, depths=(2, 2), **settings)
    nets = method.build(1, 3, 3)
    batch = Batch(torch.randn(2, 1, 16, 16, 16), torch.randint(0, 3, (2, 16, 16, 16)).byte())
    method.training_step(nets, batch, None, Moment(0, 10)).backward()
    assert all(p.grad is not None for p in nets["model"].parameters())
