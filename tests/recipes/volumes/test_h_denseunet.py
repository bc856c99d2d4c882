"""H-DenseUNet: what each of its two networks sees, what one tells the other, and what is supervised."""

import pytest
import torch
import torch.nn.functional as F

from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.networks import parameters
from medcook.recipes.volumes._slices import neighbours
from medcook.recipes.volumes.h_denseunet import FLAT, DenseBlock, DenseUNet, HDense, HDenseUNet, recipe

EVERY = pytest.mark.parametrize(
    "settings", [{}, {"parts": "2d"}, {"parts": "3d"}, {"context": False}, {"deep": False}], ids=str
)


def net(**settings) -> HDenseUNet:
    return HDenseUNet(inputs=1, classes=3, **{"stem": 4, "growth": 3, "layers": (1, 2), **settings})


def seen(answer, depth: int) -> list[int]:
    """Which slices of 12 the answer in one of them depends on."""
    volume = torch.randn(1, 1, 12, 12, 12).double().requires_grad_()
    (gradient,) = torch.autograd.grad(answer(volume)[:, :, depth].square().sum(), volume)
    return gradient[0, 0].abs().flatten(1).amax(1).nonzero()[:, 0].tolist()


def test_a_dense_layer_sees_all_before_it():
    """Against a loop that keeps every output: BN, ReLU, 1 x 1, BN, ReLU, 3 x 3, with four times `growth` in between."""
    block, x = DenseBlock(5, 3, 3, FLAT).eval(), torch.randn(2, 5, 4, 6, 6)
    outputs, scale = [x], (1 + 1e-5) ** -0.5
    for number, (first, second) in enumerate(block.layers):
        inside = F.conv3d(F.relu(scale * torch.cat(outputs, dim=1)), first[2].weight)
        assert inside.shape[1] == 12 and first[2].in_channels == 5 + 3 * number
        outputs.append(F.conv3d(F.relu(scale * inside), second[2].weight, padding=(0, 1, 1)))
    assert torch.allclose(block(x), torch.cat(outputs, dim=1), atol=1e-5)


def test_channels_are_halved_between_blocks():
    network = DenseUNet(inputs=1, stem=4, growth=3, layers=(2, 2, 1), flat=True)
    assert [line.in_channels for line in network.lines] == [4, 10, 11]  # 4 + 6, 10 / 2 + 6
    assert [line.out_channels for line in network.lines] == [10, 11, 8]  # 11 / 2 + 3
    assert [up[0].out_channels for up in network.up] == [4, 10, 11]


@pytest.mark.parametrize("flat", [True, False])
def test_levels_are_added_on_the_way_up(flat):
    """The deepest features, twice upsampled and convolved, meet the level beside them, here by a loop."""
    network, volume = DenseUNet(inputs=1, stem=4, growth=3, layers=(1, 2), flat=flat).eval(), torch.randn(1, 1, 8, 8, 8)
    step = (1, 2, 2) if flat else 2
    fine = network.stem(volume)
    half = network.blocks[0](F.avg_pool3d(fine, step))
    deep = F.relu(network.blocks[1](F.avg_pool3d(network.transitions[1](half), step)) * (1 + 1e-5) ** -0.5)
    larger = lambda x, like: F.interpolate(x, like.shape[2:], mode="trilinear", align_corners=False)  # noqa: E731
    x = network.up[1](network.lines[1](half) + larger(deep, half))
    assert torch.allclose(network(volume), network.up[0](network.lines[0](fine) + larger(x, fine)), atol=1e-6)
    assert half.shape[2:] == ((8, 4, 4) if flat else (4, 4, 4))


@pytest.mark.component("auto-context")
def test_the_3d_network_reads_volume_and_probabilities():
    network, volume, given = net().eval(), torch.randn(2, 1, 8, 8, 8), []
    network.inter.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    result, scores = network.outputs(volume)
    assert torch.equal(given[0][:, :1], volume)
    assert torch.allclose(given[0][:, 1:], scores.softmax(1), atol=1e-6)
    assert torch.equal(scores, network.score(network.intra(neighbours(volume, 3))))
    assert result.shape == (2, 3, 8, 8, 8)


@pytest.mark.component("auto-context")
def test_without_it_scores_change_nothing():
    volume = torch.randn(1, 1, 8, 8, 8)
    for context in (True, False):
        network = net(context=context).eval()
        before = network(volume)
        with torch.no_grad():
            network.score.weight.mul_(-3)
        assert torch.equal(network(volume), before) != context


@pytest.mark.component("hybrid feature fusion")
@pytest.mark.parametrize("context", [True, False])
def test_features_of_both_are_added(context):
    network, volume = net(context=context).eval(), torch.randn(1, 1, 8, 8, 8)
    within = network.intra(neighbours(volume, 3))
    known = torch.cat([volume, network.score(within).softmax(1)], dim=1) if context else volume
    joined = F.conv3d(within + network.inter(known), network.fusion[0].weight, padding=1)
    joined = F.relu(joined * (1 + 1e-5) ** -0.5)
    wanted = torch.einsum("kc,bcdhw->bkdhw", network.head.weight.flatten(1), joined)
    assert torch.allclose(network(volume), wanted + network.head.bias[:, None, None, None], atol=1e-5)


def test_the_2d_network_sees_three_slices_and_the_3d_network_more():
    within, across = net(parts="2d").double().eval(), net(parts="3d").double().eval()
    assert seen(within, 5) == [4, 5, 6]
    assert len(seen(across, 5)) > 5


@pytest.mark.component("end-to-end learning")
def test_both_networks_learn_from_the_result():
    """Also what decides the 2D scores, by way of the 3D network."""
    network = net()
    network.outputs(torch.randn(2, 1, 8, 8, 8))[0].square().sum().backward()
    for part in (network.intra, network.score, network.inter, network.fusion, network.head):
        assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in part.parameters())


@pytest.mark.component("end-to-end learning")
@pytest.mark.parametrize("deep", [True, False])
def test_the_2d_scores_are_supervised_too(deep):
    method = HDense(channels=(4, 8), deep=deep)
    nets = method.build(1, 3, 3)
    batch = Batch(torch.randn(2, 1, 8, 8, 8), torch.randint(0, 3, (2, 8, 8, 8)).byte())
    losses = [find_loss("both")(logits, batch.labels) for logits in nets["model"].outputs(batch.images)]
    assert len(losses) == 2
    wanted = sum(losses) / 2 if deep else losses[0]
    assert torch.allclose(method.training_step(nets, batch, None, Moment(0, 10)), wanted, atol=1e-5)


def test_the_ablation_is_the_hybrid_without_its_2d_half():
    whole, alone, other = (HDense(parts=parts).model(1, 3) for parts in ("both", "3d", "2d"))
    context = 3 * whole.inter.stem[0].weight[:, :1].numel()
    assert parameters(whole) == parameters(alone) + parameters(other) + context
    kept = {name: value for name, value in whole.state_dict().items() if not name.startswith(("intra", "score"))}
    kept["inter.stem.0.weight"] = kept["inter.stem.0.weight"][:, :1]
    alone.load_state_dict(kept)
    given, volume = [], torch.randn(1, 1, 8, 8, 8)
    alone.eval().inter.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    assert len(alone.outputs(volume)) == 1 and torch.equal(given[0], volume)
    arms = {name: vars(arm.method) for name, arm in recipe.arms.items()}
    assert arms["3d alone"] == {**arms["h-denseunet"], "parts": "3d"}
    assert arms["unet"].items() <= {**arms["h-denseunet"], "network": "unet"}.items()


@EVERY
@pytest.mark.parametrize("size", [(8, 8, 8), (9, 16, 11)])
def test_any_size_comes_back(settings, size):
    network = HDense(**settings).model(1, 3)
    assert all(logits.shape == (2, 3, *size) for logits in network.outputs(torch.randn(2, 1, *size)))


@EVERY
def test_every_parameter_is_trained(settings):
    method = HDense(**settings)
    nets = method.build(1, 3, 3)
    batch = Batch(torch.randn(2, 1, 16, 16, 16), torch.randint(0, 3, (2, 16, 16, 16)).byte())
    method.training_step(nets, batch, None, Moment(0, 10)).backward()
    assert all(p.grad is not None for p in nets["model"].parameters())
