"""The study of 2.5D: what each scheme sees beyond its slice, and what is concluded from the table."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from medcook import statistics
from medcook.architectures import multiply_adds
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.networks import UNet, parameters
from medcook.recipes.volumes import study_2_5d as study
from medcook.recipes.volumes._slices import SliceUNet, neighbours

SMALL = (4, 6, 8)
EVERY = pytest.mark.parametrize("name", [*study.SCHEMES, "2d", "one plane"])


def small(name: str):
    return type(study.recipe.arms[name].method)(**{**vars(study.recipe.arms[name].method), "channels": SMALL})


def net(name: str) -> torch.nn.Module:
    return small(name).model(1, 3)


def seen(network: torch.nn.Module, volume: torch.Tensor, place: tuple[int, int, int]) -> list[list[int]]:
    """Along each axis, which positions of a volume (1, 1, D, H, W) the answer at a place depends on."""
    volume = volume.double().requires_grad_()
    logits = network.double().eval()(volume)[(0, slice(None), *place)]
    (gradient,) = torch.autograd.grad(logits.square().sum(), volume)
    found = gradient[0, 0].abs() > 0
    return [found.movedim(axis, 0).flatten(1).any(1).nonzero()[:, 0].tolist() for axis in range(3)]


@pytest.mark.component("2D baseline")
@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_2d_u_net_on_every_slice(training):
    """Batch normalisation too: with the slices of all volumes as one batch."""
    flat, wanted = SliceUNet(inputs=2, classes=3, channels=SMALL), UNet(inputs=2, classes=3, channels=SMALL, dims=2)
    wanted.load_state_dict({k: v.squeeze(2) if v.ndim == 5 else v for k, v in flat.state_dict().items()})
    flat.train(training), wanted.train(training)
    volume = torch.randn(2, 2, 5, 13, 16)
    slices = wanted(volume.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 5)).transpose(1, 2)
    assert torch.allclose(flat(volume), slices, atol=1e-4)


@pytest.mark.component("2D baseline")
def test_2d_sees_its_slice_alone():
    assert seen(net("2d"), torch.randn(1, 1, 7, 8, 8), (3, 4, 4)) == [[3], [*range(8)], [*range(8)]]


@pytest.mark.component("3D baseline")
def test_3d_is_the_chapters_baseline():
    from medcook.recipes.volumes._settings import BASELINE

    assert study.METHODS["3d"] is BASELINE
    same = {name: value for name, value in vars(BASELINE).items() if name != "network"}
    for method in study.METHODS.values():
        assert same.items() <= vars(method).items()


def test_neighbours_against_a_loop():
    volume = torch.randn(2, 3, 4, 2, 2)
    found = neighbours(volume, 5).unflatten(1, (5, 3))
    for place in range(4):
        for step in range(5):
            assert torch.equal(found[:, step, :, place], volume[:, :, min(max(place + step - 2, 0), 3)])


@pytest.mark.component("slices as channels")
def test_the_stack_is_seen_as_channels_and_its_middle_is_answered():
    """Against a 2D U-Net on each stack, made by hand."""
    stacked = study.StackUNet(inputs=1, classes=3, channels=SMALL, count=3).eval()
    plain = UNet(inputs=3, classes=3, channels=SMALL, dims=2).eval()
    plain.load_state_dict({k: v.squeeze(2) if v.ndim == 5 else v for k, v in stacked.state_dict().items()})
    volume = torch.randn(1, 1, 5, 8, 8)
    padded = F.pad(volume, (0, 0, 0, 0, 1, 1), mode="replicate")
    for place in range(5):
        assert torch.allclose(stacked(volume)[:, :, place], plain(padded[:, 0, place : place + 3]), atol=1e-5)
    assert seen(net("slices as channels"), torch.randn(1, 1, 7, 8, 8), (3, 4, 4))[0] == [2, 3, 4]


@pytest.mark.component("inter-slice fusion")
def test_attention_over_slices_is_that_of_torch():
    """At one place, without the bias, over the slices within reach; the border counts its own slice twice."""
    attention, x = study.SliceAttention(6, 3), torch.randn(1, 6, 5, 1, 1)
    query, key, value = (each.weight.flatten(1) for each in (attention.query, attention.key, attention.value))
    tokens = x[0, :, :, 0, 0].T
    for place in range(5):
        near = tokens[[max(place - 1, 0), place, min(place + 1, 4)]]
        q, k, v = tokens[place] @ query.T, near @ key.T, near @ value.T
        wanted = tokens[place] + F.scaled_dot_product_attention(q[None, None], k[None], v[None])[0, 0]
        assert torch.allclose(attention(x)[0, :, place, 0, 0], wanted, atol=1e-5)


@pytest.mark.component("inter-slice fusion")
def test_the_bias_says_which_neighbour_counts():
    attention, x = study.SliceAttention(4, 3), torch.randn(2, 4, 5, 3, 2)
    assert torch.allclose(attention.weights(x).sum(1), torch.ones(2, 5, 3, 2))
    with torch.no_grad():
        attention.bias.copy_(torch.tensor([0.0, 0.0, 1e4]))
        attention.value.weight.copy_(torch.eye(4)[..., None, None, None])
    assert torch.allclose(attention(x)[:, :, :-1], x[:, :, :-1] + x[:, :, 1:], atol=1e-6)


@pytest.mark.component("inter-slice fusion")
def test_each_pooled_level_reaches_a_slice_further():
    network = net("inter-slice fusion")
    assert seen(network, torch.randn(1, 1, 9, 8, 8), (4, 4, 4))[0] == [2, 3, 4, 5, 6]
    assert sum(isinstance(module, study.SliceAttention) for module in network.modules()) == len(SMALL) - 1


@pytest.mark.component("multi-view fusion")
def test_each_view_sees_one_plane():
    network = net("multi-view fusion").eval()
    for axis in range(3):
        view = lambda volume, axis=axis: network.outputs(volume)[axis]  # noqa: E731
        gradient = torch.autograd.functional.jacobian(
            lambda v, view=view: view(v)[0, :, 3, 4, 5].sum(), volume := torch.randn(1, 1, 8, 8, 8)
        )
        places = (gradient[0, 0].abs() > 0).nonzero()
        assert places[:, axis].unique().tolist() == [(3, 4, 5)[axis]]
        assert all(len(places[:, other].unique()) > 1 for other in range(3) if other != axis)
        assert network.outputs(volume)[axis].shape == (1, 3, 8, 8, 8)


@pytest.mark.component("multi-view fusion")
def test_the_mean_probability_predicts():
    network, volume = net("multi-view fusion").eval(), torch.randn(2, 1, 8, 9, 10)
    views = [network.views[0](volume)]
    views.append(network.views[1](volume.transpose(2, 3)).transpose(2, 3))
    views.append(network.views[2](volume.permute(0, 1, 4, 2, 3)).permute(0, 1, 3, 4, 2))
    wanted = sum(logits.softmax(1) for logits in views) / 3
    method = small("multi-view fusion")
    assert torch.allclose(method.predict(torch.nn.ModuleDict({"average": network}), volume), wanted, atol=1e-5)


@pytest.mark.component("multi-view fusion")
def test_every_view_learns_alone():
    """A third of the gradient that it has when its loss is the only one."""
    method = small("multi-view fusion")
    nets = method.build(1, 3, 3)
    batch = Batch(torch.randn(2, 1, 8, 8, 8), torch.randint(0, 3, (2, 8, 8, 8)).byte())
    method.training_step(nets, batch, None, Moment(0, 10)).backward()
    for view, axis in zip(nets["model"].views, (0, 1, 2), strict=True):
        found = [parameter.grad.clone() for parameter in view.parameters()]
        labels = batch.labels.movedim(1 + axis, 1)
        loss = find_loss("both")(view(batch.images.movedim(2 + axis, 2)), labels)
        wanted = torch.autograd.grad(loss, list(view.parameters()))
        assert all(torch.allclose(3 * a, b, atol=1e-4, rtol=1e-3) for a, b in zip(found, wanted, strict=True))


def test_the_ablation_has_three_networks_of_one_plane():
    fused, alone = net("multi-view fusion"), net("one plane")
    assert parameters(fused) == parameters(alone) == 3 * parameters(net("2d"))
    volume = torch.randn(1, 1, 8, 9, 10)
    alone.load_state_dict(fused.state_dict())
    same, other = fused.eval().outputs(volume), alone.eval().outputs(volume)
    assert torch.equal(same[0], other[0]) and not torch.equal(same[1], other[1])
    assert all(torch.equal(view(volume), logits) for view, logits in zip(alone.views, other, strict=True))
    assert seen(alone, torch.randn(1, 1, 7, 8, 8), (3, 4, 4))[0] == [3]


@EVERY
@pytest.mark.parametrize("size", [(8, 8, 8), (9, 16, 11)])
def test_any_size_comes_back(name, size):
    assert net(name)(torch.randn(2, 1, *size)).shape == (2, 3, *size)


@EVERY
def test_every_parameter_is_trained(name):
    method = small(name)
    nets = method.build(1, 3, 3)
    batch = Batch(torch.randn(2, 1, 8, 8, 8), torch.randint(0, 3, (2, 8, 8, 8)).byte())
    method.training_step(nets, batch, None, Moment(0, 10)).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in nets["model"].parameters())


@pytest.mark.component("computation cost")
def test_costs_are_those_of_the_methods():
    table = study.costs()
    assert list(table.index) == list(study.METHODS)
    network = study.METHODS["3d"].build(1, 3, 3)["model"]
    assert table.loc["3d", "parameters"] == parameters(network)
    assert table.loc["3d", "multiply-adds"] == multiply_adds(network, torch.zeros(1, 1, *study.VOLUME))
    times = table["multiply-adds, times"]
    assert times["2d"] == 1 < times["slices as channels"] < times["3d"]
    assert (
        table.loc["multi-view fusion", "parameters"]
        == 3 * table.loc["2d", "parameters"]
        < table.loc["3d", "parameters"] * 1.01
    )


@pytest.fixture
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    gains = {"2d": 0.0, "3d": 0.02, "slices as channels": 0.05, "inter-slice fusion": 0.0, "multi-view fusion": 0.015}
    rows = [
        {"arm": arm, "replicate": fold, "case_id": f"{fold}-{k}", "patient_id": f"{fold}-{k}", "structure": "head"}
        | {"dice": 0.8 + gain + 0.005 * rng.normal()}
        for arm, gain in {**gains, "one plane": 0.3}.items()
        for fold in range(3)
        for k in range(10)
    ]
    return pd.DataFrame(rows)


@pytest.mark.component("comparison")
def test_every_method_is_compared_with_2d(frame):
    table, arms = study.comparison(frame), dict(list(frame.groupby("arm")))
    assert set(table.index) == set(study.METHODS) - {"2d"}
    for name, row in table.iterrows():
        found = statistics.difference(arms[name], arms["2d"])
        assert (row["gain"], row["p"]) == (found.effect, found.p)
        assert row["dice"] == pytest.approx(arms[name]["dice"].mean())
        assert row["multiply-adds"] == study.costs().loc[name, "multiply-adds"]
    np.testing.assert_allclose(table["holm"], statistics.holm(table["p"].to_numpy()))


@pytest.mark.component("comparison")
def test_conclusions_follow_from_the_table(frame):
    found = study.conclusions(study.comparison(frame))
    assert found["gain on 2D"] == ["slices as channels", "multi-view fusion"]
    assert found["do not"] == ["inter-slice fusion"]
    assert found["above 3D"] == ["slices as channels"]
