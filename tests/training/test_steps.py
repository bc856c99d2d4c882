"""What happens in a step: batches, precision, clipping, schedule, the moving average, and looks at validation."""

from dataclasses import replace

import pytest
import torch
from tiny import BUDGET, METHOD, SHORT, TASK, train
from torch.optim.optimizer import register_optimizer_step_pre_hook

from medcook import training
from medcook.data import IGNORE
from medcook.data.transforms import NONE
from medcook.errors import MedcookError
from medcook.methods import MeanTeacher, Method, Supervised
from medcook.parallel import Alone
from medcook.tasks import Budget, Samples, Task
from medcook.training import Loop, batch_indices, fit, unlabelled_samples, validation_dice


def test_a_loss_that_is_no_number_is_said(monkeypatch):
    monkeypatch.setattr(Supervised, "training_step", lambda self, nets, *_: next(nets.parameters()).sum() * torch.nan)
    with pytest.raises(MedcookError, match="became nan at step 0.*learning rate"):
        train()


def test_gradients_are_clipped_and_the_rate_has_one_cycle(monkeypatch):
    norms, rates = [], []

    def spy(optimiser, *_):
        norms.append(torch.nn.utils.get_total_norm(p.grad for p in optimiser.param_groups[0]["params"]).item())
        rates.append(optimiser.param_groups[0]["lr"])

    def steep(self, *batch):
        return 1e5 * Method.training_step(self, *batch)

    monkeypatch.setattr(Supervised, "training_step", steep)
    hook = register_optimizer_step_pre_hook(spy)
    train(budget=replace(SHORT, steps=10))
    hook.remove()
    assert norms == pytest.approx([training.GRADIENT_NORM] * 10, rel=1e-3)
    peak = rates.index(max(rates))
    assert 0 < peak < 5 and max(rates) == pytest.approx(METHOD.rate) and rates[-1] < METHOD.rate / 1000
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)


class Plain(Supervised):
    """An optimiser and a schedule of its own."""

    def optimise(self, trained, steps):
        optimiser = torch.optim.SGD(trained, lr=self.rate)
        return optimiser, torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.5, total_iters=steps)


def test_a_method_may_bring_its_own_optimiser():
    seen = []
    hook = register_optimizer_step_pre_hook(lambda optimiser, *_: seen.append(optimiser))
    train(method=Plain(channels=(4, 8)))
    hook.remove()
    assert len(seen) == SHORT.steps and type(seen[0]) is torch.optim.SGD
    assert seen[0].param_groups[0]["lr"] == pytest.approx(Plain().rate / 2)


def test_the_average_has_moved(reference):
    start = Loop(METHOD, TASK, BUDGET, "float32", 0, TASK.samples("labelled"), None, None).build().state_dict()
    end, name = reference.weights["last"], "head.weight"
    assert not torch.equal(end[f"average.{name}"], start[f"average.{name}"])
    assert not torch.equal(end[f"average.{name}"], end[f"model.{name}"])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_precision_asked_for_is_used(precision, monkeypatch):
    seen = set()

    def training_step(self, nets, labelled, *_):
        seen.add(nets["model"](labelled.images).dtype)
        return Method.training_step(self, nets, labelled, *_)

    monkeypatch.setattr(Supervised, "training_step", training_step)
    fitted = train(budget=replace(SHORT, precision=precision))
    assert seen == {getattr(torch, precision)} and fitted.cost["precision"] == precision


def test_batches_are_augmented():
    def batch(method: Method):
        loop = Loop(method, TASK, BUDGET, "float32", 0, TASK.samples("labelled"), None, None)
        return loop.batches(2, torch.Generator().manual_seed(0), Alone("cpu"))[0]

    train, chosen = TASK.samples("labelled"), batch_indices(16, 4, 2, seed=0)
    still = batch(replace(METHOD, augmentation=NONE))
    assert torch.allclose(still.images, train.images[chosen], atol=1e-3)
    assert torch.equal(still.labels, train.labels[chosen])
    assert not torch.equal(batch(METHOD).labels, train.labels[chosen])


def test_a_step_gets_as_many_unlabelled_images_where_the_method_asks(monkeypatch):
    seen = []

    class Semi(Supervised):
        uses_unlabelled = True

        def training_step(self, nets, labelled, unlabelled, step):
            seen.append((labelled, unlabelled))
            return super().training_step(nets, labelled, unlabelled, step)

    task = Task("embedded", labelled=len(TASK.data.split.train) - 1)
    fit(Semi(channels=(4, 8)), task, SHORT, cache=False, progress=False)
    labelled, unlabelled = seen[0]
    assert len(labelled.images) == len(unlabelled.images) == SHORT.batch
    assert not (labelled.labels == IGNORE).any() and (unlabelled.labels == IGNORE).all()
    assert len(seen) == SHORT.steps


def test_cost_is_reported(reference):
    cost = reference.cost
    assert cost["steps"] == 12 and cost["precision"] == "float32" and 0 < cost["loading_fraction"] < 1
    assert cost["parameters"] == sum(p.numel() for p in reference.nets["model"].parameters())
    assert cost["seconds"] > 0 and cost["peak_mb"] > 50


@pytest.mark.parametrize(("steps", "checks", "looks"), [(12, 3, [3, 7, 11]), (10, 1, [9]), (7, 0, []), (2, 5, [0, 1])])
def test_the_last_step_is_looked_at(steps, checks, looks):
    one = Samples(torch.zeros(1, 1, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(1))
    loop = Loop(METHOD, TASK, Budget(steps, checks=checks), "float32", 0, one, None, one)
    assert [step for step in range(steps) if loop.is_check(step)] == looks


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (16, 16), (3, 8)])
def test_each_sample_once_an_epoch(count, batch):
    steps = [batch_indices(count, batch, step, seed=3) for step in range(count)]
    assert all(len(chosen) == batch for chosen in steps)
    epochs = torch.cat(steps).view(-1, count)
    assert all(sorted(epoch.tolist()) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1  # shuffled anew


def test_a_batch_does_not_depend_on_those_before_it():
    late = batch_indices(10, 4, 7, seed=0)
    training._permutation.cache_clear()
    assert torch.equal(batch_indices(10, 4, 7, seed=0), late)
    assert not torch.equal(batch_indices(10, 4, 7, seed=1), late)


class Guess(Supervised):
    """Predicts what the image says: its values are the classes."""

    def predict(self, nets, images):
        return torch.nn.functional.one_hot(images[:, 0].long(), 3).movedim(-1, 1).float()


def test_validation_dice_is_the_mean_over_cases_and_structures():
    labels = torch.zeros(3, 4, 4, dtype=torch.uint8)
    labels[0, 0], labels[1, 1], labels[2, 0] = 1, 2, 1  # two slices of the first case, one of the second
    guess = labels.clone()
    guess[0, 1] = 1  # structure 1 of the first case: 2 * 4 / 12
    val = Samples(guess[:, None].float(), labels, torch.tensor([0, 0, 1]))
    nets = METHOD.build(1, 3, 2)
    assert validation_dice(Guess(), nets, val) == pytest.approx((2 / 3 + 1 + 1 + 1) / 4)
    labels[0, 1] = IGNORE  # the false voxels were never annotated
    assert validation_dice(Guess(), nets, val) == 1


def test_a_step_gets_unlabelled_images_where_there_are_any_and_the_method_wants_them():
    some, all_of_them = Task("embedded", labelled=2), Task("embedded")
    assert (unlabelled_samples(MeanTeacher(), some).labels == IGNORE).all()
    assert unlabelled_samples(Supervised(), some) is None
    assert unlabelled_samples(MeanTeacher(), all_of_them) is None


def test_a_method_that_wants_unlabelled_images_has_a_fingerprint_where_there_are_none(monkeypatch):
    from medcook.fingerprints import fingerprint

    monkeypatch.setattr(MeanTeacher, "trial", Task("embedded", fold=0))
    monkeypatch.setattr("medcook.fingerprints.STEPS", 1)
    assert fingerprint(MeanTeacher(channels=(8, 8))).keys() == {"loss", "dice"}
