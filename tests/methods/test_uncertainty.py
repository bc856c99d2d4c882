"""Methods that predict more than once: what differs between their samples, and what must not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import log_loss
from torch import nn
from torch.nn.functional import avg_pool2d

from medcook import training
from medcook.cohorts import RaterTask
from medcook.data import IGNORE
from medcook.data.transforms import NONE
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment, Supervised
from medcook.methods.uncertainty import (
    DeepEnsemble,
    MCDropout,
    RandomRater,
    Tempered,
    TestTime,
    best_temperature,
    draw_rater,
    fit_temperature,
    positions,
    tempered,
)
from medcook.tasks import Budget, Task
from medcook.training import fit

EVERY = (MCDropout, DeepEnsemble, TestTime, RandomRater, Tempered)
TINY = {"channels": (4, 8, 8)}
NOW = Moment(0, 10)


def built(method, dims=2):
    torch.manual_seed(0)
    return method.build(1, 3, dims).eval()


@pytest.mark.parametrize("kind", EVERY)
def test_all_train_as_the_baseline_does(kind):
    plain = vars(Supervised())
    assert {name: vars(kind())[name] for name in plain} == plain


class TestDropout:
    def test_samples_differ_and_their_mean_is_the_prediction(self, labelled):
        method = MCDropout(**TINY)
        nets = built(method)
        torch.manual_seed(0)
        samples = method.samples(nets, labelled.images, method.passes)
        assert samples.shape == (8, 2, 3, 16, 16) and samples.std(0).max() > 1e-3
        assert torch.allclose(method.predict(nets, labelled.images), samples.mean(0))

    def test_a_prediction_repeats_itself_and_leaves_the_random_numbers_alone(self, labelled):
        method = MCDropout(**TINY)
        nets = built(method)
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        once, again = (method.predict(nets, labelled.images) for _ in range(2))
        assert torch.equal(once, again) and torch.equal(torch.rand(3), expected)

    def test_at_rate_zero_all_samples_are_the_plain_prediction(self, labelled):
        method = MCDropout(**TINY, dropout=0.0)
        nets = built(method)
        samples = method.samples(nets, labelled.images, 3)
        plain = Supervised.predict(method, nets, labelled.images)
        assert all(torch.equal(sample, plain) for sample in samples)

    def test_only_the_deep_blocks_drop_and_only_while_sampling(self, labelled):
        method = MCDropout(**TINY, deep=1)
        nets = built(method)
        net = nets["average"]
        drops = [isinstance(block[-1], nn.Dropout2d) for block in [*net.down, *net.up]]
        assert drops == [False, False, True, False, True]
        method.samples(nets, labelled.images, 2)
        assert not any(layer.training for layer in nets.modules())

    def test_it_needs_our_u_net(self):
        with pytest.raises(MedcookError, match="no place"):
            MCDropout(network="monai-unet").build(1, 3, 2)

    def test_volumes(self):
        method = MCDropout(**TINY)
        assert method.predict(built(method, 3), torch.randn(1, 1, 8, 8, 8)).shape == (1, 3, 8, 8, 8)


class TestEnsemble:
    method = DeepEnsemble(**TINY, members=3)

    def test_members_start_apart_and_each_has_its_average(self):
        nets = built(self.method)
        heads = [net.head.weight for net in nets["model"]]
        assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])
        assert all(torch.equal(a.head.weight, b) for a, b in zip(nets["average"], heads, strict=True))
        with torch.no_grad():
            nets["model"][2].head.weight.fill_(7.0)
        self.method.after_step(nets, Moment(0, 10))
        assert nets["average"][2].head.weight.max() > 6 and nets["average"][0].head.weight.max() < 1

    def test_the_prediction_is_the_mean_of_the_members(self, labelled):
        nets = built(self.method)
        alone = torch.stack([net(labelled.images).softmax(1) for net in nets["average"]])
        assert torch.allclose(self.method.predict(nets, labelled.images), alone.mean(0), atol=1e-6)
        assert torch.allclose(self.method.samples(nets, labelled.images, 3), alone)
        assert torch.allclose(self.method.samples(nets, labelled.images, 5), alone[[0, 1, 2, 0, 1]])

    def test_each_member_sees_the_cases_in_a_view_of_its_own(self, labelled):
        assert self.method.augment(labelled, torch.Generator()) is labelled
        nets, seen = built(self.method).train(), []
        for net in nets["model"]:
            net.register_forward_pre_hook(lambda net, images: seen.append(images[0]))
        self.method.training_step(nets, labelled, None, NOW)
        assert len(seen) == 3 and not any(torch.allclose(view, labelled.images) for view in seen)
        assert not torch.allclose(seen[0], seen[1]) and not torch.allclose(seen[1], seen[2])

    def test_members_learn_apart(self, labelled):
        """A member's gradient is its share of the loss it would have alone: nothing leaks between members."""
        method = replace(self.method, augmentation=NONE)
        nets = built(method).train()
        loss = method.training_step(nets, labelled, None, NOW)
        loss.backward()
        total = 0.0
        for net in nets["model"]:
            mine = net.head.weight.grad.clone()
            net.zero_grad()
            alone = Supervised(**TINY).training_step(nn.ModuleDict({"model": net}), labelled, None, NOW)
            alone.backward()
            assert torch.allclose(mine * 3, net.head.weight.grad, atol=1e-4)
            total += alone.item() / 3
        assert loss.item() == pytest.approx(total, abs=1e-4)


class Equivariant(nn.Module):
    """Commutes with every flip and quarter turn: class scores from the image and its neighbourhood's mean."""

    def forward(self, images):
        return torch.cat([images, avg_pool2d(images, 3, 1, 1), images**2], dim=1)


class TestViews:
    def test_an_equivariant_network_says_the_same_of_every_view(self, labelled):
        nets = nn.ModuleDict({"average": Equivariant()})
        samples = TestTime(intensity=0.0).samples(nets, labelled.images, 8)
        plain = Equivariant()(labelled.images).softmax(1)
        assert all(torch.allclose(sample, plain, atol=1e-6) for sample in samples)

    @pytest.mark.parametrize("size", [(6, 6), (4, 6), (4, 5, 6)])
    def test_every_position_is_another_and_is_undone(self, size):
        images = torch.randn(2, 1, *size)
        method = TestTime()
        count = len(positions(size))
        assert count == (8 if size == (6, 6) else 2 ** len(size))
        views = [method.turned(images, k) for k in range(count)]
        assert torch.equal(views[0], images) and all(view.shape == images.shape for view in views)
        for k, view in enumerate(views):
            assert torch.equal(method.turned(view, k, back=True), images)
            assert not any(torch.equal(view, other) for other in views[:k])

    def test_the_first_view_is_the_image_and_the_others_differ_in_intensity(self, labelled):
        method = TestTime(turn=False)
        assert torch.equal(method.view(labelled.images, 0), labelled.images)
        one, other = (method.view(labelled.images, k) for k in (1, 2))
        assert not torch.allclose(one, labelled.images) and not torch.allclose(one, other)

    def test_it_trains_as_a_single_network_does(self, labelled):
        method = TestTime(**TINY)
        losses = [m.training_step(built(m), labelled, None, NOW).item() for m in (method, Supervised(**TINY))]
        assert losses[0] == losses[1]


class TestRaters:
    def test_every_rater_has_a_turn_and_the_missing_none(self):
        raters = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
        raters[:, 1], raters[0, 2], raters[1, 2] = 1, 2, IGNORE
        batch = Batch(torch.zeros(2, 1, 4, 4), torch.full((2, 4, 4), 9, dtype=torch.uint8), raters=raters)
        drawn = torch.stack([draw_rater(batch)[:, 0, 0] for _ in range(60)])
        assert set(drawn[:, 0].tolist()) == {0, 1, 2} and set(drawn[:, 1].tolist()) == {0, 1}
        assert torch.equal(draw_rater(batch._replace(raters=None)), batch.labels)

    def test_the_loss_is_of_the_drawn_rater(self, labelled):
        method = RandomRater(**TINY)
        other = (labelled.labels + 1) % 3
        batch = labelled._replace(raters=other[:, None])
        expected = Supervised(**TINY).training_step(built(method), labelled._replace(labels=other), None, NOW)
        assert method.training_step(built(method), batch, None, NOW).item() == expected.item()


class TestTemperature:
    def test_it_undoes_an_overconfident_forecaster(self):
        """Logits that are three times too large, of labels that follow the true ones."""
        rng = np.random.default_rng(0)
        logits = rng.standard_normal((1, 3, 60, 60))
        truth = softmax(logits, axis=1)
        labels = (rng.random((1, 1, 60, 60)) > truth.cumsum(1)[:, :-1]).sum(1)
        said = torch.from_numpy(softmax(3 * logits, axis=1))
        assert best_temperature(said, torch.from_numpy(labels)[:, None]) == pytest.approx(3, rel=0.1)

    def test_no_other_temperature_has_a_lower_cross_entropy(self):
        said = torch.rand(2, 3, 8, 8).double().softmax(1)
        raters = torch.randint(0, 3, (2, 4, 8, 8)).byte()
        raters[0, 0] = IGNORE
        best = best_temperature(said, raters)

        def cost(temperature):
            flat = (said.log() / temperature).softmax(1).movedim(1, -1)[:, None].expand(2, 4, 8, 8, 3).reshape(-1, 3)
            known = raters.reshape(-1) != IGNORE
            return log_loss(raters.reshape(-1)[known], flat[known], labels=range(3))

        assert all(cost(best) <= cost(other) + 1e-5 for other in (best * 0.9, best * 1.1, 1.0))

    def test_it_is_fitted_after_training_and_never_on_what_is_scored(self, monkeypatch):
        monkeypatch.setattr(training, "behaviour", lambda method: {})
        budget = Budget(steps=3, batch=2, precision="float32", checks=0)
        task = RaterTask("embedded", labelled=2, evaluation="test")
        fitted = fit(Tempered(**TINY), task, budget, progress=False, cache=False)
        case = next(iter(task.cases("val")))
        before = fitted.probabilities(case)
        warm = tempered(fitted)
        assert warm.method.temperature == pytest.approx(fit_temperature(fitted)) != 1
        assert fitted.method.temperature == 1 and torch.equal(fitted.probabilities(case), before)
        assert not torch.allclose(warm.probabilities(case), before, atol=1e-3)
        with pytest.raises(MedcookError, match="scored"):
            fit_temperature(replace(fitted, task=Task("embedded", labelled=2)))
