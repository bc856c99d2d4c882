"""MSVM-UNet: what the scales add up to, where a scan in four directions hears, how a map is expanded."""

import pytest
import torch
import torch.nn.functional as F

from medcook.methods import Batch, Moment
from medcook.recipes.architectures.msvm_unet import Block, Expand, FourWayScan, Msvm, MultiScale

SMALL = {"widths": (4, 6, 8)}


def net(**settings) -> torch.nn.Module:
    torch.manual_seed(0)
    return Msvm(**(SMALL | settings)).model(1, 3)


def image(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(1))


@pytest.mark.component("multi-scale convolutions")
@pytest.mark.parametrize("kernels", [(1, 3, 5), (3,), (5, 1)])
def test_it_is_the_sum_of_one_convolution_for_each_scale(kernels):
    layer, x = MultiScale(4, kernels), image(2, 9, 7, 4)
    wanted = x.movedim(-1, 1).clone()
    for conv, k in zip(layer.convolutions, kernels, strict=True):
        wanted += F.conv2d(x.movedim(-1, 1), conv.weight, padding=k // 2, groups=4)
    assert torch.allclose(layer(x).movedim(-1, 1), wanted, atol=1e-6)


@pytest.mark.component("multi-scale convolutions")
def test_every_scale_learns_and_no_channel_hears_another():
    layer, x = MultiScale(4), image(1, 9, 9, 4).requires_grad_()
    layer(x)[0, 4, 4, 0].backward()
    assert [conv.weight.grad[0].abs().gt(0).sum() for conv in layer.convolutions] == [1, 9, 25]
    assert x.grad[0, ..., 0].ne(0).sum() == 25 and not x.grad[..., 1:].any()


@pytest.mark.component("multi-scale convolutions")
def test_the_blocks_of_the_decoder_have_them_and_those_of_the_encoder_do_not():
    network = net()
    has = lambda blocks: [isinstance(block.scales, MultiScale) for level in blocks for block in level]  # noqa: E731
    assert has(network.up) == [True, True] and has(network.down) == [False] * 3
    sides = [[conv.kernel_size[0] for conv in level[0].scales.convolutions] for level in network.up]
    assert sides == [[1, 3, 5]] * 2


@pytest.mark.component("multi-scale convolutions")
def test_a_block_is_a_scan_and_a_small_network_both_residual():
    block, x = Block(4, (1, 3, 5)), image(1, 6, 5, 4)
    middle = x + block.scan(F.layer_norm(x, (4,)))
    grown = F.gelu(block.grow(F.layer_norm(middle, (4,))))
    assert torch.allclose(block(x), middle + block.shrink(block.scales(grown)), atol=1e-6)
    assert not torch.allclose(block.scales(grown), grown, atol=1e-3)


@pytest.mark.component("scans in four directions")
def test_it_is_a_scan_of_the_turned_map_for_each_direction():
    """Against maps that are turned and flipped, scanned by rows, and turned back."""
    layer, x = FourWayScan(6), image(2, 5, 4, 6)
    tokens = F.silu(layer.near(layer.enter(x).movedim(-1, 1))).movedim(1, -1)  # (B, H, W, width)
    turn = {
        "rows": (lambda m: m, lambda m: m),
        "rows back": (lambda m: m.flip(1, 2), lambda m: m.flip(1, 2)),
        "columns": (lambda m: m.transpose(1, 2), lambda m: m.transpose(1, 2)),
        "columns back": (lambda m: m.transpose(1, 2).flip(1, 2), lambda m: m.flip(1, 2).transpose(1, 2)),
    }
    heard = 0
    for (there, back), scan in zip(turn.values(), layer.scans, strict=True):
        turned = there(tokens)
        heard = heard + back(scan(turned.flatten(1, 2)).unflatten(1, turned.shape[1:3]))
    assert torch.allclose(layer(x), layer.leave(layer.norm(heard)), atol=1e-5)


@pytest.mark.component("scans in four directions")
def test_every_pixel_hears_every_other():
    """A single direction would hear what comes before alone; the convolution hears the next pixels."""
    layer, x = FourWayScan(6), image(1, 7, 7, 6).requires_grad_()
    with torch.no_grad():
        for scan in layer.scans:
            scan.step.bias.fill_(1.0)
    for row, column in ((0, 0), (6, 6), (3, 2)):
        (gradient,) = torch.autograd.grad(layer(x)[0, row, column, :3].sum(), x)
        assert (gradient[0].abs().amax(-1) > 0).all()


@pytest.mark.component("large-kernel patch expanding")
@pytest.mark.parametrize("times", [2, 4])
def test_channels_become_pixels(times):
    """Against a loop: pixel (t i + r, t j + s) of channel c is channel t^2 c + t r + s of pixel (i, j), normalised."""
    layer, x = Expand(6, 3, times=times).eval(), image(1, 4, 5, 6)
    grown = layer.near(F.relu(layer.norm_grown(layer.grow(x.movedim(-1, 1)))))
    found = layer(x)
    assert found.shape == (1, 4 * times, 5 * times, 3)
    for i in range(4 * times):
        for j in range(5 * times):
            own = [times**2 * c + times * (i % times) + j % times for c in range(3)]
            wanted = F.layer_norm(grown[:, own, i // times, j // times], (3,))
            assert torch.allclose(found[:, i, j], wanted, atol=1e-5)


@pytest.mark.component("large-kernel patch expanding")
def test_the_last_one_brings_tokens_back_to_pixels():
    network, sides = net(), []
    for layer in (*network.expand, network.last):
        layer.register_forward_hook(lambda _, inputs, output: sides.append((inputs[0].shape[1], output.shape[1])))
    network(torch.randn(1, 1, 64, 64))
    assert sides == [(4, 8), (8, 16), (16, 64)]


@pytest.mark.component("large-kernel patch expanding")
@pytest.mark.parametrize("near", [True, False])
def test_new_pixels_see_the_neighbours_of_the_old_one(near):
    layer, x = Expand(6, 16, near=near).eval(), image(1, 7, 7, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[0, 6, 6, :8].sum(), x)
    seen = gradient[0].abs().amax(-1) > 0
    assert seen[3, 3] and seen.sum() == (9 if near else 1)
    assert not seen[:2].any() and not seen[5:].any()


@pytest.mark.parametrize("size", [(32, 32), (40, 36), (33, 47), (16, 18)])
def test_any_size_comes_back(size):
    assert net()(torch.randn(2, 1, *size)).shape == (2, 3, *size)


def test_the_ablation_has_one_scale_and_is_otherwise_the_same():
    full, bare = net(), net(kernels=(3,))
    names, others = dict(full.named_parameters()), dict(bare.named_parameters())
    lost = [name for name in names if "scales.convolutions" in name]
    assert {name for name in names if name not in lost} == {name for name in others if "convolutions" not in name}
    assert len(lost) == 3 * len([name for name in others if "convolutions" in name]) == 6
    assert all(parameter.shape[-1] == 3 for name, parameter in others.items() if "convolutions" in name)


def test_patch_expanding_without_its_convolution_is_otherwise_the_same():
    full, bare = (dict(net(near=near).named_parameters()) for near in (True, False))
    assert set(full) - set(bare) == {name for name in full if ".near." in name and ("expand" in name or "last" in name)}
    assert set(bare) < set(full)


@pytest.mark.parametrize("settings", [{}, {"kernels": (3,)}, {"near": False}, {"depth": 2}])
def test_every_parameter_is_trained(settings):
    method = Msvm(**SMALL, **settings)
    nets = method.build(1, 3, 2)
    batch = Batch(torch.randn(2, 1, 32, 32), torch.randint(0, 3, (2, 32, 32)).byte())
    method.training_step(nets, batch, None, Moment(0, 10)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in nets["model"].parameters())


def test_it_works_in_half_precision():
    with torch.autocast("cpu", torch.bfloat16):
        found = net()(torch.randn(2, 1, 32, 32))
    assert torch.isfinite(found.float()).all()
