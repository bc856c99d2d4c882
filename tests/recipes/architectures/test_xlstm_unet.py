"""xLSTM-UNet: the parallel form against the recurrence, the block around it, and what is left without memory."""

import pytest
import torch
import torch.nn.functional as F

from medcook.recipes.architectures.xlstm_unet import (
    HeadLinear,
    LstmPair,
    MatrixMemory,
    VisionLstm,
    Xlstm,
    XlstmUNet,
    mlstm,
)


def sequence(length: int = 12, size: int = 4, spread: float = 1.0) -> list[torch.Tensor]:
    """Queries, keys, values, log of input and forget gates; two sequences, three heads, in double precision."""
    parts = [torch.randn(2, 3, length, size) for _ in range(3)]
    gates = torch.randn(2, 3, length) * spread, F.logsigmoid(torch.randn(2, 3, length) * spread)
    return [part.double() for part in (*parts, *gates)]


def recurrent(queries, keys, values, log_input, log_forget) -> torch.Tensor:
    """The memory as it is written, one token after the other."""
    size = queries.shape[-1]
    memory, norm, out = torch.zeros(2, 3, size, size).double(), torch.zeros(2, 3, size).double(), []
    for t in range(queries.shape[2]):
        i, f, key = log_input[:, :, t].exp(), log_forget[:, :, t].exp(), keys[:, :, t] / size**0.5
        memory = f[..., None, None] * memory + i[..., None, None] * values[:, :, t, :, None] * key[..., None, :]
        norm = f[..., None] * norm + i[..., None] * key
        query = queries[:, :, t]
        below = (norm * query).sum(-1).abs().clamp_min(1)
        out.append((memory @ query[..., None])[..., 0] / below[..., None])
    return torch.stack(out, dim=2)


@pytest.mark.component("matrix memory")
@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_the_parallel_form_is_the_recurrence(spread):
    """Values, and the gradients of all five arguments; gates almost alike, mixed, and almost shut or wide open."""
    given = [part.requires_grad_() for part in sequence(spread=spread)]
    found, wanted = mlstm(*given), recurrent(*given)
    assert torch.allclose(found.double(), wanted, rtol=1e-3, atol=1e-4)
    weights = torch.randn_like(wanted)
    gradients = [torch.autograd.grad((told * weights).sum(), given) for told in (found, wanted)]
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-2, atol=1e-3)


@pytest.mark.component("matrix memory")
def test_exponential_gates_do_not_overflow():
    """An input gate of exp(200): what it lets in is all that counts, in single precision."""
    queries, keys, values, log_input, log_forget = (part.float() for part in sequence())
    log_input[:, :, 5] = 200.0
    log_forget[:] = 0.0
    told = mlstm(queries, keys, values, log_input, log_forget)
    assert torch.isfinite(told).all()
    sign = (queries[:, :, 5:] * keys[:, :, 5:6]).sum(-1, keepdim=True).sign()
    assert torch.allclose(told[:, :, 5:], sign * values[:, :, 5:6].expand_as(told[:, :, 5:]), atol=1e-3)


@pytest.mark.component("matrix memory")
def test_a_forget_gate_that_shuts_empties_the_memory():
    queries, keys, values, log_input, log_forget = sequence()
    log_forget[:, :, 6] = -100.0
    alone = mlstm(*(part[:, :, 6:] for part in (queries, keys, values, log_input, log_forget)))
    assert torch.allclose(mlstm(queries, keys, values, log_input, log_forget)[:, :, 6:], alone, atol=1e-4)


@pytest.mark.component("matrix memory")
def test_the_gates_start_open_and_belong_to_the_token():
    memory = MatrixMemory(16, heads=4)
    assert torch.allclose(memory.gates.bias[4:], torch.linspace(3, 6, 4)) and memory.gates.bias[:4].abs().max() < 1
    with torch.no_grad():
        memory.gates.weight.normal_()
    near, x = torch.randn(1, 10, 16), torch.randn(1, 10, 16)
    q, k, v = memory.query(near), memory.key(near), memory.value(x)
    gates = (torch.cat([q, k, v], dim=-1) @ memory.gates.weight.T + memory.gates.bias).transpose(1, 2)
    split = lambda part: part.reshape(1, 10, 4, 4).transpose(1, 2)  # noqa: E731
    told = mlstm(split(q), split(k), split(v), gates[:, :4], torch.log(torch.sigmoid(gates[:, 4:])))
    told = told.transpose(1, 2)  # (1, 10, heads, 4), normalised within a head
    centred = told - told.mean(-1, keepdim=True)
    wanted = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(memory(near, x), wanted.flatten(2), atol=1e-3)


@pytest.mark.component("Vision-LSTM block")
def test_blocks_hear_in_their_direction():
    """One hears what came before, the next what comes after; a pair hears everything."""
    x = torch.randn(1, 20, 8)
    other = x.clone()
    other[:, 10] += torch.arange(8.0)
    changed = lambda block: (block(other) - block(x)).abs().amax(-1)[0] > 1e-7  # noqa: E731
    there, back = VisionLstm(8, back=False), VisionLstm(8, back=True)
    assert torch.equal(changed(there), torch.arange(20) >= 10)
    assert torch.equal(changed(back), torch.arange(20) <= 10)
    assert changed(torch.nn.Sequential(there, back)).all()


@pytest.mark.component("Vision-LSTM block")
def test_the_block_is_its_equation():
    block, x = VisionLstm(8, back=True), torch.randn(2, 9, 8)
    with torch.no_grad():
        block.skip.normal_()
    first, gate = (block.norm(x.flip(1)) @ block.enter.weight.T).split(16, dim=-1)
    near = torch.zeros(2, 9, 16)
    for t in range(9):
        for lag in range(min(4, t + 1)):
            near[:, t] += block.near.weight[:, 0, 3 - lag] * first[:, t - lag]
    near = F.silu(near + block.near.bias)
    told = (block.memory(near, first) + block.skip * near) * F.silu(gate)
    assert torch.allclose(block(x), x + (told @ block.leave.weight.T).flip(1), atol=1e-5)


@pytest.mark.component("Vision-LSTM block")
def test_keys_and_queries_come_from_groups_of_four_channels():
    layer, x = HeadLinear(8), torch.randn(3, 8)
    whole = torch.block_diag(*layer.weight)
    assert torch.allclose(layer(x), x @ whole.T, atol=1e-6)


@pytest.mark.component("U-Net with local features")
def test_pairs_there_and_back_follow_the_deepest_convolutions():
    network, lengths = XlstmUNet(inputs=1, classes=4), []
    for pair in (module for module in network.modules() if isinstance(module, LstmPair)):
        assert [block.back for block in pair.blocks] == [False, True]
        pair.blocks.register_forward_hook(lambda _, given, out: lengths.append(tuple(given[0].shape[1:])))
    with torch.no_grad():
        network(torch.randn(1, 1, 128, 128))
    assert lengths == [(16 * 16, 64), (8 * 8, 64)]


@pytest.mark.parametrize("size", [(32, 32), (40, 36), (33, 47)])
def test_any_size_comes_back(size):
    network = XlstmUNet(inputs=1, classes=3, channels=(4, 8, 8))
    assert network(torch.randn(1, 1, *size)).shape == (1, 3, *size)


def test_the_ablation_has_no_memory():
    """All else equal: what it lacks are queries, keys, values, gates and their norm; a token hears three before it."""
    full, bare = ({name for name, _ in Xlstm(memory=on).model(1, 3).named_parameters()} for on in (True, False))
    assert bare < full and all(".memory." in name for name in full - bare)
    block, x = VisionLstm(8, back=False, memory=False), torch.randn(1, 20, 8)
    other = x.clone()
    other[:, 10] += torch.arange(8.0)
    changed = (block(other) - block(x)).abs().amax(-1)[0] > 1e-7
    assert changed.nonzero().flatten().tolist() == [10, 11, 12, 13]


def test_every_parameter_learns():
    network = XlstmUNet(inputs=1, classes=3, channels=(4, 8, 8))
    network(torch.randn(2, 1, 32, 32)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())
