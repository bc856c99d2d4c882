"""ColonTCN's blocks against formulas, how far it sees, its competitor, what is frozen, and what a score tells."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medcook.methods import Batch, Moment
from medcook.networks import parameters
from medcook.networks.encoder import Encoder
from medcook.recipes.video import _ms_tcn, _procedures, colontcn
from medcook.recipes.video._frames import FrameEncoder
from medcook.recipes.video._procedures import four_folds, frame_measures, stages_of
from medcook.recipes.video.colontcn import ColonTCN, StageTagger, TemporalBlock, overlooked, recipe, stage_rows
from medcook.tasks import Budget
from medcook.training import Loop

SMALL = {"blocks": 3, "kernel": 5, "dilated": True, "dropout": 0.0}


def reach(net, length=161, inputs=4):
    """Which frames (T,) the answer in the middle depends on."""
    x = torch.randn(1, inputs, length, requires_grad=True)
    net.eval()(x)[-1][0, :, length // 2].sum().backward()
    return x.grad[0].abs().sum(0) > 0


@pytest.mark.component("custom temporal convolutional blocks")
class TestBlocks:
    def test_a_block_is_its_formula(self):
        block = TemporalBlock(3, 5, 2, 0.0)
        x, y = torch.randn(2, 3, 20), None
        y = x
        for conv in (block.convolve[0], block.convolve[3]):
            length, v = (part.detach() for part in conv.parametrizations.weight.parameters())
            weight = length * v / v.flatten(1).norm(dim=1)[:, None, None]
            padded = F.pad(y, (4, 4))
            y = sum(torch.einsum("oi,bit->bot", weight[:, :, k], padded[:, :, 2 * k : 2 * k + 20]) for k in range(5))
            y = (y + conv.bias[:, None]).clamp_min(0)
        torch.testing.assert_close(block(x), (x + y).clamp_min(0), atol=1e-5, rtol=1e-4)

    def test_dropout_follows_each_convolution(self):
        kinds = [type(layer).__name__ for layer in TemporalBlock(3, 5, 2, 0.4).convolve]
        assert [kind.removeprefix("Parametrized") for kind in kinds] == 2 * ["Conv1d", "ReLU", "Dropout"]

    @pytest.mark.parametrize(("kernel", "blocks", "dilated"), [(5, 3, True), (7, 3, True), (7, 3, False), (1, 3, True)])
    def test_it_sees_as_far_as_its_dilations_say_both_ways(self, kernel, blocks, dilated):
        net = ColonTCN(4, 3, 8, blocks=blocks, kernel=kernel, dilated=dilated, dropout=0.0)
        for block in net.blocks:  # nothing shall be hidden by a ReLU
            for name in (0, 3):
                block.convolve[name].bias.data.fill_(9.0)
        seen = reach(net).nonzero().flatten()
        count = overlooked(kernel, blocks, dilated)
        assert len(seen) == count and seen[0] == 80 - count // 2 and seen[-1] == 80 + count // 2

    def test_the_recipe_overlooks_a_whole_procedure(self):
        method = recipe.arms["colontcn"].method
        frames = recipe.scales["full"].task.frames
        assert overlooked(method.kernel, method.blocks) // 2 >= 0.9 * frames
        assert overlooked(method.kernel, method.blocks, False) // 2 < frames / 4
        (answer,) = StageTagger().build(1, 5, 3)["model"](torch.randn(2, 48, 30))
        assert answer.shape == (2, 5, 30)


@pytest.mark.component("low parameter count")
class TestCompetitor:
    def test_it_has_twice_as_many_weights(self):
        mine, theirs = (parameters(recipe.arms[name].method.build(1, 5, 3)["model"]) for name in recipe.compare)
        assert 1.7 < theirs / mine < 2.3
        assert parameters(recipe.arms["without dilation"].method.build(1, 5, 3)["model"]) == mine

    def test_a_layer_is_its_formula(self):
        layer = _ms_tcn.ResidualLayer(3, 4, 0.0)
        x = torch.randn(2, 3, 20)
        inner = F.relu(F.conv1d(F.pad(x, (4, 4)), layer.dilated.weight, layer.dilated.bias, dilation=4))
        torch.testing.assert_close(layer(x), x + F.conv1d(inner, layer.mix.weight, layer.mix.bias))

    def test_later_stages_see_probabilities_alone(self):
        net = _ms_tcn.MultiStageTCN(4, 3, 8, steps=2, layers=2, dropout=0.0).eval()
        first, second = net(torch.randn(1, 4, 15))
        torch.testing.assert_close(second, net.stages[1](first.softmax(1)))
        torch.testing.assert_close(second, net.stages[1]((first + 5).softmax(1)), atol=1e-5, rtol=1e-4)
        assert first.shape == second.shape == (1, 3, 15)

    def test_smoothness_counts_steps_of_log_probabilities(self):
        logs = torch.tensor([[0.5, 0.5, 0.9], [0.5, 0.5, 0.1]]).log()[None]
        steps = (logs[0, :, 2] - logs[0, :, 1]).square()
        assert _ms_tcn.unsteady(logs).item() == pytest.approx((steps.sum() / 4).item(), abs=1e-5)
        assert _ms_tcn.unsteady(torch.tensor([[[50.0, -50], [-50, 50]]])).item() == pytest.approx(16)


@pytest.mark.component("dual k-fold protocol")
def test_replicates_are_the_folds_of_both_protocols():
    scale = recipe.scales["full"]
    assert recipe.replicate == "fold" and scale.replicates == 9 and scale.task.evaluation == "val"
    videos = {cohort: [f"{cohort}{number}" for number in range(15)] for cohort in range(4)}
    fold = four_folds(videos)[0]
    assert {name[0] for name in fold.train} == {"0", "1"} and {name[0] for name in fold.test} == {"3"}
    folds = _procedures.five_folds(videos)
    assert all(len(set(map(len, part))) == 1 for part in zip(*folds, strict=True))
    assert sorted(sum((fold.test for fold in folds), ())) == sorted(sum(videos.values(), []))


@pytest.mark.component("ablation")
def test_arms_differ_in_one_thing():
    full = recipe.arms["colontcn"].method
    changes = {"frames alone": {"kernel": 1}, "ms-tcn": {"tagger": "ms-tcn"}, "without dilation": {"dilated": False}}
    for name, change in changes.items():
        assert recipe.arms[name].method == replace(full, **change)
    net = replace(full, dilated=False).build(1, 5, 3)["model"]
    assert {block.convolve[0].dilation for block in net.blocks} == {(1,)}
    deep = full.build(1, 5, 3)["model"]
    assert [block.convolve[3].dilation[0] for block in deep.blocks] == [1, 2, 4, 8, 16]


def flights(count=3, frames=12, side=16, classes=5):
    rng = torch.Generator().manual_seed(0)
    stages = torch.randint(0, classes, (count, frames), generator=rng)
    labels = stages[:, :, None, None].expand(-1, -1, side, side).byte()
    return Batch(
        torch.randn(count, 1, frames, side, side, generator=rng) + labels[:, None], labels, torch.arange(count)
    )


@pytest.mark.component("class weights")
class TestWeights:
    def test_they_are_all_frames_over_those_of_a_class(self):
        eye = StageTagger(channels=(4, 8)).build(1, 5, 3)["eye"]
        eye.counts.copy_(torch.tensor([10.0, 20, 5, 5, 60]))
        assert eye.weights().tolist() == [10, 5, 20, 20, pytest.approx(100 / 60)]

    def test_they_are_counted_while_the_encoder_learns_and_used_by_both_losses(self):
        method, batch = StageTagger(channels=(4, 8), width=8, blocks=2, dropout=0.0), flights()
        nets = method.build(1, 5, 3)
        method.training_step(nets, batch, None, Moment(0, 10))
        counted = torch.bincount(stages_of(batch.labels).flatten(), minlength=5) + 1
        assert nets["eye"].counts.tolist() == counted.tolist()
        loss = method.training_step(nets, batch, None, Moment(9, 10))
        logits = nets["model"](nets["eye"].features(batch.images))[0]
        wanted = F.cross_entropy(logits, stages_of(batch.labels), counted.sum() / counted)
        assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)
        assert nets["eye"].counts.tolist() == counted.tolist()


class TestFrozenEncoder:
    def test_it_is_the_books_encoder_on_every_frame(self):
        flat, plain = FrameEncoder(channels=(4, 8)).eval(), Encoder(channels=(4, 8)).eval()
        plain.load_state_dict({name: w[:, :, 0] if w.ndim == 5 else w for name, w in flat.state_dict().items()})
        x = torch.randn(2, 1, 5, 16, 16)
        torch.testing.assert_close(flat(x), torch.stack([plain(x[:, :, t]) for t in range(5)], 2), atol=1e-5, rtol=1e-4)

    def test_each_phase_trains_its_own_network(self):
        method, batch = StageTagger(channels=(4, 8), width=8, blocks=2), flights()
        nets = method.build(1, 5, 3)
        for step, learns, rests in ((0, "eye", "model"), (9, "model", "eye")):
            nets.zero_grad()
            method.training_step(nets, batch, None, Moment(step, 10)).backward()
            assert all(p.grad is None for p in nets[rests].parameters())
            assert all(p.grad is not None for p in nets[learns].parameters())

    def test_it_does_not_go_on_changing_with_what_it_sees(self):
        nets, batch = StageTagger(channels=(4, 8)).build(1, 5, 3).train(), flights()
        before = {name: tensor.clone() for name, tensor in nets["eye"].state_dict().items()}
        found = nets["eye"].features(batch.images)
        assert all(torch.equal(tensor, before[name]) for name, tensor in nets["eye"].state_dict().items())
        torch.testing.assert_close(found, nets["eye"].eval().encoder(batch.images), atol=1e-5, rtol=1e-4)

    def test_features_are_found_once_and_kept(self, monkeypatch):
        eye, batch, asked = StageTagger(channels=(4, 8)).build(1, 5, 3)["eye"], flights(), []
        plain = eye.features
        monkeypatch.setattr(eye, "features", lambda flights: asked.append(len(flights)) or plain(flights))
        first = eye.remembered(batch.images, batch.index)
        again = eye.remembered(batch.images[[2, 0]], batch.index[[2, 0]])
        assert asked == [1, 1, 1] and torch.equal(again, first[[2, 0]]) and not first.requires_grad
        torch.testing.assert_close(first, plain(batch.images))

    def test_training_frames_come_from_their_own_flights(self):
        method, batch = StageTagger(channels=(4, 8), looks=50), flights()
        images = stages_of(batch.labels)[:, None, :, None, None].expand_as(batch.images).float()
        nets, seen = method.build(1, 5, 3), []
        method.view = lambda frames: seen.append(frames) or frames
        nets["eye"].forward = lambda frames: 20 * F.one_hot(frames[:, 0, 0, 0].long(), 5).float()
        loss = method.pretext(nets, batch._replace(images=images), Moment(0, 4))
        assert loss.item() < 1e-3 and seen[0].shape == (150, 1, 16, 16) and len(seen[0].unique()) > 3


@pytest.fixture(scope="module")
def fitted():
    task = replace(recipe.scales["quick"].task, frames=16, side=16)
    method = StageTagger(channels=(4, 8), width=8, blocks=2, kernel=3)
    budget = Budget(steps=4, batch=2, precision="float32", checks=0)
    return Loop(
        method, task, budget, "float32", 0, task.samples("labelled"), None, None, False, accelerator="cpu"
    ).run()


@pytest.mark.component("measures of the benchmark")
class TestRows:
    def test_a_row_measures_the_answer_to_a_flight(self, fitted):
        case = next(fitted.task.cases("val"))
        (row,) = stage_rows(fitted, case)
        (flight,) = fitted.task.preparation.flights(case)
        truth = stages_of(flight.labels[None])[0].numpy()
        found = fitted.answer(flight.frames[None, None])[0, :, :, 0, 0].argmax(0).numpy()
        assert {name: row[name] for name in frame_measures(found, truth, 6)} == frame_measures(found, truth, 6)
        assert row["weights"] == parameters(fitted.nets["model"]) and row["structure"] == "flight 1"
        alone = fitted.nets["eye"](flight.frames[:, None]).argmax(1).numpy()
        assert row["single"] == frame_measures(alone, truth, 6)["weighted_f1"]

    def test_segments_are_counted(self):
        assert colontcn.changes(np.array([0, 0, 1, 1, 0, 2])) == 3

    def test_probabilities_are_the_same_all_over_a_frame(self, fitted):
        found = fitted.answer(torch.randn(2, 1, 16, 16, 16))
        assert found.shape == (2, 6, 16, 16, 16) and (found == found[..., :1, :1]).all()
        torch.testing.assert_close(found.sum(1), torch.ones(2, 16, 16, 16))
