"""LightM-UNet: the scan against its recurrence, the layer around it, what it costs and what is left without it."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from medcook.recipes.architectures import _scan
from medcook.recipes.architectures._scan import Recurrence, SelectiveStateSpace, recurrence, selective_scan
from medcook.recipes.architectures._settings import BASELINE
from medcook.recipes.architectures.lightm_unet import (
    LightConv,
    LightM,
    LightMUNet,
    ResidualVisionMamba,
    VisionStateSpace,
)


def tokens(length: int = 70, width: int = 6, states: int = 3) -> list[torch.Tensor]:
    """x, delta, A, B, C, D of a scan over two sequences."""
    x, written, read = (torch.randn(2, length, n) for n in (width, states, states))
    delta = F.softplus(torch.randn(2, length, width))
    return [x, delta, -torch.rand(width, states) - 0.1, written, read, torch.randn(width)]


def slowly(x, delta, A, B, C, D) -> torch.Tensor:
    """The recurrence as it is written, one token after the other."""
    state, out = torch.zeros(len(x), *A.shape), []
    for t in range(x.shape[1]):
        state = torch.exp(delta[:, t, :, None] * A) * state + (delta[:, t] * x[:, t])[..., None] * B[:, t, None]
        out.append((state * C[:, t, None]).sum(-1) + D * x[:, t])
    return torch.stack(out, dim=1)


@pytest.mark.component("selective state space")
@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
def test_the_scan_is_its_recurrence(length):
    """Values, and the gradients of all six arguments; lengths below, at and above a chunk."""
    given = [part.requires_grad_() for part in tokens(length)]
    weights = torch.randn(2, length, 6)
    found, wanted = selective_scan(*given), slowly(*given)
    assert torch.allclose(found, wanted, atol=1e-5)
    for mine, theirs in zip(
        *(torch.autograd.grad((y * weights).sum(), given) for y in (found, wanted)),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, atol=1e-4)


@pytest.mark.component("selective state space")
def test_the_gradient_is_that_of_finite_differences():
    parts = (torch.rand(2, 5, 2, dtype=torch.float64), torch.randn(2, 5, 2, dtype=torch.float64))
    assert torch.autograd.gradcheck(Recurrence.apply, [part.requires_grad_() for part in parts])


@pytest.mark.component("selective state space")
def test_chunks_change_nothing(monkeypatch):
    """Any chunk gives the same; decays of zero and one, and steps of any size, do not overflow; inputs stay."""
    decay, added = torch.rand(1, 50, 4).round(decimals=0), torch.randn(1, 50, 4)
    before = decay.clone(), added.clone()
    wanted = recurrence(decay, added)
    for chunk in (1, 7, 50):
        monkeypatch.setattr(_scan, "CHUNK", chunk)
        assert torch.allclose(recurrence(decay, added), wanted, atol=1e-5)
    assert torch.equal(decay, before[0]) and torch.equal(added, before[1])
    x, delta, *rest = tokens()
    assert torch.isfinite(selective_scan(x, 1000 * delta, *rest)).all()


@pytest.mark.component("selective state space")
def test_a_token_chooses_what_is_kept():
    """With the same later tokens, another first one changes step, input and output; the past never hears the future."""
    layer = SelectiveStateSpace(8, states=4)
    x = torch.randn(1, 40, 8)
    other = x.clone()
    other[:, 20] += 1
    changed = (layer(other) - layer(x)).abs().amax(-1)[0] > 0
    assert not changed[:20].any() and changed[20:].all()
    doubled = layer(2 * x) - 2 * layer(x)
    assert doubled.abs().max() > 1e-3  # a time-invariant system would be linear


@pytest.mark.component("selective state space")
def test_it_starts_as_mamba_does():
    layer = SelectiveStateSpace(64, states=4)
    assert torch.allclose(-layer.log_rate.exp(), -torch.arange(1.0, 5).expand(64, 4))
    steps = F.softplus(layer.step.bias)
    assert steps.min() >= 9.99e-4 and steps.max() <= 0.1001 and steps.max() > 10 * steps.min()


@pytest.mark.component("residual vision Mamba layer")
def test_the_layer_is_its_equation():
    """Linear(norm(VSS(norm(x)) + s x)) at every pixel, with a learnt s."""
    layer = ResidualVisionMamba(8, 12)
    with torch.no_grad():
        layer.adjust.fill_(0.3)
    image = torch.randn(2, 8, 5, 7)
    x = image.permute(0, 2, 3, 1)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    mixed = F.layer_norm(layer.space(normed) + 0.3 * x, (8,))
    assert torch.allclose(layer(image), layer.project(mixed).permute(0, 3, 1, 2), atol=1e-5)
    assert ResidualVisionMamba(8, 12, residual=False).adjust is None


@pytest.mark.component("residual vision Mamba layer")
def test_the_module_has_two_branches():
    """The scan runs over the depthwise convolution row by row; the other branch gates its norm."""
    module = VisionStateSpace(4, expand=2)
    x = torch.randn(2, 3, 5, 4)
    first, gate = module.enter(x).chunk(2, dim=-1)
    near = F.silu(module.local(first.permute(0, 3, 1, 2)))
    rows = module.scan(near.flatten(2).transpose(1, 2)).reshape(2, 3, 5, 8)
    assert torch.allclose(module(x), module.leave(module.norm(rows) * F.silu(gate)), atol=1e-6)


@pytest.mark.component("residual vision Mamba layer")
def test_the_last_pixel_hears_the_first():
    """Through the scan; without it the layer hears no further than its 3 x 3 convolution."""
    image = torch.randn(1, 8, 9, 9)
    other = image.clone()
    other[:, :, 0, 0] += 1 + torch.arange(8)
    full, bare = ResidualVisionMamba(8, 8), ResidualVisionMamba(8, 8, scan=False)
    assert (full(other) - full(image))[:, :, 8, 8].abs().max() > 0
    changed = (bare(other) - bare(image)).abs().amax((0, 1)) > 1e-6
    assert changed[:2, :2].all() and changed.sum() == 4


@pytest.mark.component("linear complexity")
def test_four_times_the_pixels_cost_four_times_as_much():
    layer, counts = ResidualVisionMamba(8, 8), []
    for side in (4, 8, 16):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(torch.randn(1, 8, side, side))
        counts.append(counter.get_total_flops())
    assert counts[1] == 4 * counts[0] and counts[2] == 16 * counts[0]


@pytest.mark.component("lightweight U-Net")
def test_it_has_a_fraction_of_the_parameters():
    size = lambda network: sum(p.numel() for p in network.parameters())  # noqa: E731
    assert size(LightM().model(1, 4)) < 0.5 * size(BASELINE.build(1, 4, 2)["model"])


@pytest.mark.component("lightweight U-Net")
def test_a_light_convolution_is_depthwise_with_a_residual():
    """Each channel by its own 3 x 3 weights, then mixed at every pixel, plus s x; batch norm has seen nothing yet."""
    block, x = LightConv(6).eval(), torch.randn(1, 6, 5, 5)
    with torch.no_grad():
        block.adjust.fill_(2.0)
        near = torch.cat([F.conv2d(x[:, c : c + 1], block.near.weight[c : c + 1], padding=1) for c in range(6)], dim=1)
        mixed = torch.einsum("oc,bchw->bohw", block.point.weight[..., 0, 0], near)
        assert torch.allclose(block(x), F.relu(mixed + 2 * x), atol=1e-4)


@pytest.mark.component("lightweight U-Net")
def test_scans_run_on_the_deep_levels_alone():
    network, sizes = LightMUNet(inputs=1, classes=4), []
    for layer in network.modules():
        if isinstance(layer, SelectiveStateSpace):
            layer.register_forward_hook(lambda _, given, out: sizes.append(given[0].shape[1]))
    with torch.no_grad():
        network(torch.randn(1, 1, 128, 128))
    assert sizes == [32 * 32] + 2 * [16 * 16] + 4 * [8 * 8]


@pytest.mark.parametrize("size", [(32, 32), (40, 36), (33, 47)])
def test_any_size_comes_back(size):
    network = LightMUNet(inputs=1, classes=3, channels=(4, 4, 8, 8), depths=(1, 1))
    assert network(torch.randn(1, 1, *size)).shape == (1, 3, *size)


def test_the_ablation_has_no_state_space():
    full, bare = ({name for name, _ in LightM(scan=scan).model(1, 3).named_parameters()} for scan in (True, False))
    assert bare < full
    assert all(".scan." in name for name in full - bare) and not any(".scan." in name for name in bare)


def test_every_parameter_learns():
    network = LightMUNet(inputs=1, classes=3, channels=(4, 4, 8, 8), depths=(1, 2))
    network(torch.randn(2, 1, 32, 32)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())
