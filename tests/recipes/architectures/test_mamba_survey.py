"""The survey's layers: what each order visits, what each scan computes, and what attention and scans cost."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from medcook.recipes.architectures._scan import SelectiveStateSpace, selective_scan
from medcook.recipes.architectures.mamba_survey import (
    MIXERS,
    ORDERS,
    S4,
    S5,
    AttentionMixer,
    Mixed,
    MixedUNet,
    Mixing,
    ScanMixer,
    columns,
    inverse,
    multiply_adds,
    rows,
    snake,
    time_invariant_scan,
)

EVERY_ORDER = [order for several in ORDERS.values() for order in several]


def counted(mixer: str, side: int, width: int = 32) -> int:
    """Multiply-adds of the matrix products of a mixer on a map of side x side, counted by torch."""
    layer = MIXERS[mixer](width, "rows")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        layer(torch.randn(1, side * side, width), (side, side))
    return counter.get_total_flops() // 2


class Elements(TorchDispatchMode):
    """Counts the numbers that elementwise operations write."""

    total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if operation.overloadpacket in (torch.ops.aten.mul, torch.ops.aten.addcmul_, torch.ops.aten.exp):
            self.total += out.numel()
        return out


@pytest.mark.component("linear cost")
@pytest.mark.parametrize("mixer", ["self-attention", "s6"])
def test_the_closed_form_is_what_torch_counts(mixer):
    for side in (4, 8, 16):
        assert counted(mixer, side) == multiply_adds(mixer, side * side, 32)


@pytest.mark.component("linear cost")
def test_a_scan_is_linear_and_attention_quadratic():
    """Four times the tokens: four times the cost of a scan, and of attention, with many tokens, sixteen times."""
    growth = {name: multiply_adds(name, 4 * 10**6, 64) / multiply_adds(name, 10**6, 64) for name in MIXERS}
    assert growth["s6"] == 4 and growth["self-attention"] == pytest.approx(16, abs=0.01)
    assert multiply_adds("s6", 1024, 64) < multiply_adds("self-attention", 1024, 64) / 4


@pytest.mark.component("linear cost")
def test_the_scan_itself_is_linear():
    """What torch does not count as products: the elementwise steps of the recurrence, chunks and all."""
    totals = []
    for length in (1024, 4096):
        x, written, read = (torch.randn(1, length, n) for n in (4, 2, 2))
        with Elements() as counter, torch.no_grad():
            selective_scan(x, x.exp(), -torch.rand(4, 2), written, read, torch.ones(4))
        totals.append(counter.total)
    assert totals[1] == pytest.approx(4 * totals[0], rel=0.01)


@pytest.mark.component("scan orders")
@pytest.mark.parametrize("order", EVERY_ORDER)
def test_every_order_visits_every_pixel_once(order):
    way = order(5, 7)
    assert torch.equal(way.sort().values, torch.arange(35))
    x = torch.randn(2, 35, 3)
    assert torch.equal(x[:, way][:, inverse(way)], x)


@pytest.mark.component("scan orders")
def test_orders_go_where_their_names_say():
    assert rows(2, 3).tolist() == [0, 1, 2, 3, 4, 5]
    assert columns(2, 3).tolist() == [0, 3, 1, 4, 2, 5]
    assert snake(3, 3).tolist() == [0, 1, 2, 5, 4, 3, 6, 7, 8]
    way = snake(6, 5)
    steps = (way // 5).diff().abs() + (way % 5).diff().abs()
    assert (steps == 1).all()
    forwards, back, down, up = (order(4, 6) for order in ORDERS["cross"])
    assert torch.equal(forwards, back.flip(0)) and torch.equal(down, up.flip(0))
    assert torch.equal(forwards.reshape(4, 6), down.reshape(6, 4).T)


@pytest.mark.component("scan orders")
def test_a_pixel_hears_those_scanned_before_it():
    """Of the middle pixel: with rows what comes later, with cross-scan everything."""
    x = torch.randn(1, 25, 16)
    other = x.clone()
    other[:, 12] += torch.arange(16.0)
    heard = {}
    for order in ("rows", "columns", "cross"):
        mixer = ScanMixer(16, order=order)
        heard[order] = (mixer(other, (5, 5)) - mixer(x, (5, 5))).abs().amax(-1)[0] > 1e-7
    assert torch.equal(heard["rows"], torch.arange(25) >= 12)
    assert torch.equal(heard["columns"].reshape(5, 5).T.flatten(), torch.arange(25) >= 12)
    assert heard["cross"].all()


@pytest.mark.component("scan orders")
def test_columns_are_rows_of_the_turned_map():
    """With the same weights, to turn the map before and after is to scan the other way."""
    across, down = ScanMixer(8, order="rows"), ScanMixer(8, order="columns")
    down.load_state_dict(across.state_dict())
    x = torch.randn(1, 3, 4, 8)
    turned = across(x.transpose(1, 2).flatten(1, 2), (4, 3)).unflatten(1, (4, 3)).transpose(1, 2)
    assert torch.allclose(down(x.flatten(1, 2), (3, 4)).unflatten(1, (3, 4)), turned, atol=1e-6)


@pytest.mark.component("scan orders")
def test_a_mixer_is_a_gated_scan_in_its_order():
    """Linear(scan(silu(half of Linear x)), put back, * silu(the other half))."""
    mixer, x = ScanMixer(8, order="snake"), torch.randn(2, 12, 8)
    first, gate = mixer.enter(x).split(8, dim=-1)
    way = snake(3, 4)
    scanned = torch.empty_like(first)
    scanned[:, way] = mixer.scans[0](F.silu(first[:, way]))
    assert torch.allclose(mixer(x, (3, 4)), mixer.leave(scanned * F.silu(gate)), atol=1e-6)


@pytest.mark.component("S4, S5 and S6")
def test_a_time_invariant_scan_is_a_selective_one_that_does_not_select():
    x, rate = torch.randn(2, 40, 6), -torch.rand(6, 3) - 0.1
    delta, written, read, past = torch.rand(6), torch.randn(6, 3), torch.randn(6, 3), torch.randn(6)
    found = time_invariant_scan(x, delta, rate, written, read, past)
    for channel in range(6):
        here = slice(channel, channel + 1)
        same = [part[channel].expand(2, 40, 3) for part in (written, read)]
        wanted = selective_scan(x[..., here], delta[here].expand(2, 40, 1), rate[here], *same, past[here])
        assert torch.allclose(found[..., here], wanted, atol=1e-4)


@pytest.mark.component("S4, S5 and S6")
def test_s5_is_one_state_for_all_channels():
    """Step by step: a state of eight numbers, whatever the width."""
    layer = S5(6)
    x, state, wanted = torch.randn(2, 20, 6), torch.zeros(2, 8), []
    delta = F.softplus(layer.step)
    for token in x.unbind(1):
        state = torch.exp(-delta * layer.log_rate.exp()) * state + delta * (token @ layer.written.weight.T)
        wanted.append(state @ layer.heard.weight.T + layer.past * token)
    assert torch.allclose(layer(x), torch.stack(wanted, dim=1), atol=1e-5)


@pytest.mark.component("S4, S5 and S6")
def test_only_s6_selects():
    """What does not depend on the token is linear in it."""
    x = torch.randn(1, 20, 8)
    for kind, selects in ((S4, False), (S5, False), (SelectiveStateSpace, True)):
        layer = kind(8, 8)
        assert torch.allclose(layer(2 * x), 2 * layer(x), atol=1e-4) != selects


@pytest.mark.component("U-Net hybrids")
def test_a_mixer_is_added_on_the_three_deepest_levels():
    network, sizes = MixedUNet(inputs=1, classes=4), []
    for mixing in (module for module in network.modules() if isinstance(module, Mixing)):
        mixing.register_forward_hook(lambda _, given, out: sizes.append(tuple(out.shape[1:])))
    with torch.no_grad():
        network(torch.randn(1, 1, 128, 128))
    assert sizes == [(32, 32, 32), (64, 16, 16), (64, 8, 8)]
    mixing, x = Mixing(8, "s6", "cross"), torch.randn(2, 8, 6, 5)
    tokens = F.layer_norm(x.permute(0, 2, 3, 1).reshape(2, 30, 8), (8,))
    added = mixing.mixer(tokens, (6, 5)).reshape(2, 6, 5, 8).permute(0, 3, 1, 2)
    assert torch.allclose(mixing(x), x + added, atol=1e-6)


def test_self_attention_is_torch_s():
    layer, reference = AttentionMixer(32), torch.nn.MultiheadAttention(32, 2, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(layer.enter.weight), reference.in_proj_bias.copy_(layer.enter.bias)
        reference.out_proj.weight.copy_(layer.leave.weight), reference.out_proj.bias.copy_(layer.leave.bias)
    x = torch.randn(2, 12, 32)
    assert torch.allclose(layer(x, (3, 4)), reference(x, x, x)[0], atol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("size", [(32, 32), (40, 36), (33, 47)])
def test_any_size_comes_back(mixer, size):
    network = MixedUNet(inputs=1, classes=3, channels=(4, 8, 8, 8), mixer=mixer)
    assert network(torch.randn(1, 1, *size)).shape == (1, 3, *size)


def test_arms_differ_in_the_mixer_alone():
    """Their other parameters have the same names and shapes; and the mixers are about as large."""
    own, sizes = {}, {}
    for name in MIXERS:
        shapes = {key: value.shape for key, value in Mixed(mixer=name).model(1, 3).named_parameters()}
        own[name] = {key: shape for key, shape in shapes.items() if ".mixer." not in key}
        sizes[name] = sum(shape.numel() for key, shape in shapes.items() if ".mixer." in key)
    assert own["s6"] == own["s4"] == own["s5"] == own["self-attention"]
    assert max(sizes.values()) < 1.5 * min(sizes.values())


def test_the_ablation_does_not_select():
    bare = Mixed(mixer="s4").model(1, 3)
    assert not any(isinstance(module, SelectiveStateSpace) for module in bare.modules())
    assert sum(isinstance(module, S4) for module in bare.modules()) == 12  # four orders on three levels


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_parameter_learns(mixer):
    network = MixedUNet(inputs=1, classes=3, channels=(4, 8, 8, 8), mixer=mixer)
    network(torch.randn(2, 1, 32, 32)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())
