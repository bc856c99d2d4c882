"""Encode once, answer many clicks: what is seen when, what the attention is, and what an answer costs."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gradients import assert_every_parameter_is_trained
from torch import nn

from medcook.data import Case
from medcook.interactive import BESIDE, MEANT, click_rows, no_marks, session
from medcook.methods import Batch, Moment
from medcook.networks import parameters
from medcook.networks.unet import UNet
from medcook.preparation import Preparation
from medcook.recipes.interactive import interformer
from medcook.recipes.interactive.interformer import (
    Attention,
    InterFormer,
    Mixing,
    Pyramid,
    clicks_and_cost,
    embedded,
    multiply_adds_a_click,
    what_is_said,
)

SMALL = (4, 4, 8, 8, 8)


def method(**settings) -> InterFormer:
    return InterFormer(channels=SMALL, **settings)


def batch(count: int = 2, side: int = 33) -> Batch:
    torch.manual_seed(1)
    labels = torch.zeros(count, side, side, dtype=torch.uint8)
    labels[:, 8:20, 10:24] = 1
    return Batch(torch.randn(count, 1, side, side), labels)


def watch(net: nn.Module) -> list:
    """The images that the encoder sees from now on."""
    seen, levels = [], net.encoder.levels

    def noted(images):
        seen.append(images)
        return levels(images)

    net.encoder.levels = noted
    return seen


@pytest.mark.component("image preprocessed apart from clicks")
def test_features_are_those_of_a_unet_at_every_scale():
    torch.manual_seed(0)
    settings = {"inputs": 1, "classes": 4, "channels": SMALL, "dims": 2}
    pyramid, plain = Pyramid(**settings).eval(), UNet(**settings).eval()
    plain.load_state_dict(pyramid.state_dict())
    image, seen = torch.randn(2, 1, 37, 50), []
    for block in (*plain.up, plain.down[-1]):
        block.register_forward_hook(lambda *parts: seen.append(parts[2]))
    with torch.no_grad():
        wanted = plain(image)
        full, *coarser = pyramid.levels(image)
    assert torch.equal(full, wanted)
    deepest, *ups = seen
    assert len(coarser) == 4 and all(map(torch.equal, coarser, [*reversed(ups[:-1]), deepest]))


@pytest.mark.component("image preprocessed apart from clicks")
def test_an_image_is_encoded_once_however_often_somebody_clicks():
    torch.manual_seed(0)
    one, data = method(), batch()
    nets = one.build(1, 2, 2).eval()
    seen = watch(nets["average"])
    session(SimpleNamespace(method=one, nets=nets, cost={"precision": "float32"}), data.images, data.labels == 1)
    assert len(seen) == 1 and torch.equal(seen[0], data.images)
    trained = watch(nets["model"])
    one.training_step(nets.train(), data, None, Moment(0, 10))
    assert len(trained) == 1


@pytest.mark.component("light answer to a click")
def test_an_answer_follows_from_features_and_what_is_said_alone():
    one, data = method(), batch()
    torch.manual_seed(0)
    net = one.build(1, 2, 2)["model"].eval()
    marks = no_marks(data.labels)
    marks[:, MEANT, 12, 12] = True
    with torch.no_grad():
        state = one.start(net, data.images)
        net.encoder = None
        first = one.respond(net, state, marks, None)
        second = one.respond(net, state, marks, -first)
        other = one.respond(net, [torch.zeros_like(level) for level in state], marks, None)
        marks[:, BESIDE, 30, 30] = True
        third = one.respond(net, state, marks, None)
    assert first.shape == (2, 2, 33, 33)
    assert all((first - answer).abs().max() > 1e-4 for answer in (second, third, other))


@pytest.mark.component("interactive multi-head self attention")
def test_clicks_speak_for_what_is_near_and_the_last_answer_for_the_rest():
    marks = torch.zeros(1, 2, 20, 24, dtype=torch.bool)
    marks[0, MEANT, 5, 5] = marks[0, BESIDE, 5, 10] = True
    y, x = np.indices((20, 24))
    dots = [np.exp(-((y - 5) ** 2 + (x - at) ** 2) / (2 * 3.0**2)) for at in (10, 5)]
    sure = np.stack(dots) / np.maximum(sum(dots), 1)
    rest = 1 - sure.sum(0)
    torch.manual_seed(0)
    before = torch.randn(1, 2, 20, 24)
    chance = before.softmax(1)[0].numpy()
    said = what_is_said(marks, before, 3.0)[0]
    assert said.numpy() == pytest.approx(np.stack([0 * rest, *(rest * chance), *sure]), abs=1e-6)
    first = what_is_said(marks, None, 3.0)[0]
    assert first.numpy() == pytest.approx(np.stack([rest, 0 * rest, 0 * rest, *sure]), abs=1e-6)
    for shares in (said, first):
        assert shares.sum(0).numpy() == pytest.approx(1, abs=1e-6) and shares.min() >= 0


@pytest.mark.component("interactive multi-head self attention")
def test_kinds_are_embedded_and_added_to_the_features():
    torch.manual_seed(0)
    net = method().build(1, 2, 2)["model"].interaction
    said = torch.randint(0, 5, (2, 16, 12))
    kinds = torch.stack([said == kind for kind in range(5)], dim=1).float()
    whole = embedded(kinds, net.embedding, torch.Size((16, 12)))
    assert torch.allclose(whole, net.embedding(said).permute(0, 3, 1, 2))
    alike = torch.zeros_like(kinds)
    alike[:, 3] = 1
    assert torch.allclose(embedded(alike, net.embedding, torch.Size((4, 3)))[1, :, 2, 2], net.embedding.weight[3])
    levels = method().build(1, 2, 2)["model"].encoder.levels(torch.randn(2, 1, 32, 32))
    asked = []
    for block in (net.first, net.second, net.third):
        block.register_forward_pre_hook(lambda _, inputs: asked.append(inputs))
    kinds = torch.randn(2, 5, 32, 32).softmax(1)
    answer = net(levels, kinds)
    (x, features), (_, deeper), (own, same) = asked
    assert torch.equal(features, levels[2]) and torch.equal(deeper, levels[3]) and own is same
    assert torch.allclose(x, levels[2] + embedded(kinds, net.embedding, x.shape[2:]))
    with torch.no_grad():
        net.finer.weight[:] += 1
    assert not torch.allclose(net(levels, kinds), answer)


@pytest.mark.component("interactive multi-head self attention")
def test_attention_is_that_of_pytorch_over_features_pooled_to_grids():
    torch.manual_seed(0)
    mine, theirs = Attention(8, 2, (3, 2)), nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([mine.query.weight, mine.both.weight]))
        theirs.in_proj_bias.copy_(torch.cat([mine.query.bias, mine.both.bias]))
    theirs.out_proj.load_state_dict(mine.project.state_dict())
    x, features, cells = torch.randn(2, 8, 5, 6), torch.randn(2, 8, 6, 6), []
    for grid, local in zip((3, 2), mine.local, strict=True):
        step = 6 // grid
        pooled = features.unflatten(3, (grid, step)).unflatten(2, (grid, step)).amax((3, 5))
        cells.append((pooled + local(pooled)).flatten(2))
    keys = mine.norm(torch.cat(cells, dim=2).transpose(1, 2))
    assert keys.shape[1] == 13 and torch.allclose(mine.tokens(features), keys, atol=1e-6)
    wanted = theirs(x.flatten(2).transpose(1, 2), keys, keys, need_weights=False)[0]
    assert torch.allclose(mine(x, features), wanted.transpose(1, 2).view(2, 8, 5, 6), atol=1e-5)


@pytest.mark.component("interactive multi-head self attention")
@pytest.mark.parametrize("attention", [True, False])
def test_with_attention_a_click_reaches_the_whole_image_without_it_its_surroundings(attention):
    torch.manual_seed(0)
    part = Attention(8, 2, (3, 2)) if attention else Mixing(8)
    x, features = torch.randn(1, 8, 12, 12), torch.randn(1, 8, 12, 12)
    moved = features.clone()
    moved[:, :, 1, 1] += 5
    with torch.no_grad():
        change = (part(x, moved) - part(x, features)).abs().amax((0, 1)) > 1e-6
    assert change.all() if attention else change[:3, :3].all() and change.sum() == 9


def test_the_ablation_is_of_equal_size_and_otherwise_the_same():
    arms = {name: arm.method for name, arm in interformer.recipe.arms.items()}
    assert arms["without attention"] == replace(arms["interformer"], attention=False)
    nets = [arms[name].build(1, 4, 2)["model"] for name in ("interformer", "without attention")]
    assert parameters(nets[1]) == pytest.approx(parameters(nets[0]), rel=0.02)
    full, bare = ({name: p.shape for name, p in net.named_parameters() if ".attend." not in name} for net in nets)
    assert full == bare
    costs = [
        multiply_adds_a_click(arms[name], net.eval(), torch.zeros(1, 1, 128, 128))
        for name, net in zip(("interformer", "without attention"), nets, strict=True)
    ]
    assert costs[1] == pytest.approx(costs[0], rel=0.03)


@pytest.mark.component("light answer to a click")
def test_an_answer_takes_less_than_a_quarter_of_the_whole_networks():
    arms = {name: arm.method for name, arm in interformer.recipe.arms.items()}
    image = torch.zeros(1, 1, 128, 128)
    light, whole = (
        multiply_adds_a_click(arms[name], arms[name].build(1, 4, 2)["average"].eval(), image)
        for name in ("interformer", "unet")
    )
    channels, size = (4, 8, 16, 32, 64, 64), 128 * 128
    down = sum(9 * (i + o) * o * size / 4**k for k, (i, o) in enumerate(zip(channels, channels[1:], strict=False)))
    pairs = zip(channels[1:], channels[2:], strict=False)
    up = sum(9 * (s + d + s) * s * size / 4**k for k, (s, d) in enumerate(pairs))
    assert whole == pytest.approx((down + up + 2 * 8 * size) / 1e6)
    assert light < whole / 4


@pytest.mark.component("light answer to a click")
def test_every_row_says_what_a_click_costs():
    torch.manual_seed(0)
    one = method()
    nets = one.build(1, 2, 2).eval()
    task = SimpleNamespace(preparation=Preparation(size=(32, 32)), targets={1: "head"})
    weights, cost = {"last": nets.state_dict()}, {"precision": "float32"}
    fitted = SimpleNamespace(method=one, task=task, nets=nets, weights=weights, cost=cost)
    label = np.zeros((3, 32, 32), np.uint8)
    label[:2, 8:20, 8:20] = 1
    image = np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)
    case = Case(image=image, label=label, spacing=(1.0, 1.0, 1.0), case_id="a", patient_id="a")
    (row,) = clicks_and_cost(fitted, case)
    (plain,) = click_rows(fitted, case)
    alone = multiply_adds_a_click(one, nets["average"], torch.zeros(1, 1, 32, 32))
    assert row == plain | {"mega_multiply_adds": alone} and alone > 0


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("size", [(33, 47), (16, 16)])
def test_every_parameter_is_trained_at_any_size(attention, size):
    one = method(attention=attention)
    assert_every_parameter_is_trained(one, size)
