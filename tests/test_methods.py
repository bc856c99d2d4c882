"""The Method contract: the average follows and predicts, and the settings say everything."""

import json
from dataclasses import fields

import pytest
import torch
from torch import nn

from medcook.data.transforms import Augment
from medcook.methods import Batch, Method, Moment, Supervised, follow, own_generator

TINY = dict(channels=(4, 8))
OTHER = dict(network="monai-unet", channels=(8, 16), rate=1e-4, decay=0.5, average=0.5, loss="dice")


@pytest.fixture
def nets():
    torch.manual_seed(0)
    return Supervised(**TINY).build(inputs=1, classes=3, dims=2)


def batch() -> Batch:
    rng = torch.Generator().manual_seed(0)
    return Batch(torch.randn(2, 1, 16, 16, generator=rng), torch.randint(0, 3, (2, 16, 16), generator=rng).byte())


def shifted(model: nn.Module, by: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by


def test_follow_is_the_moving_average(nets):
    model, average = nets["model"], nets["average"]
    before = [parameter.clone() for parameter in average.parameters()]
    shifted(model, 1.0)
    follow(average, model, 0.9)
    for old, new in zip(before, average.parameters(), strict=True):
        assert torch.allclose(new, old + 0.1, atol=1e-6)


def test_follow_copies_running_statistics(nets):
    nets["model"](batch().images * 3 + 2)  # moves the statistics of batch normalisation
    follow(nets["average"], nets["model"], 0.99)
    for mine, theirs in zip(nets["average"].buffers(), nets["model"].buffers(), strict=True):
        assert torch.equal(mine, theirs)
    assert nets["average"].down[0][1].num_batches_tracked == 1


@pytest.mark.parametrize(("step", "decay"), [(0, 0.1), (9, 10 / 19), (10_000, 0.99)])
def test_the_average_forgets_its_start(nets, step, decay):
    before = next(nets["average"].parameters()).clone()
    shifted(nets["model"], 1.0)
    Supervised(**TINY).after_step(nets, Moment(step, 20_000))
    assert torch.allclose(next(nets["average"].parameters()), before + 1 - decay, atol=1e-5)


def test_the_average_predicts(nets):
    method, nets = Supervised(**TINY), nets.eval()
    before = method.predict(nets, batch().images)
    assert torch.allclose(before.sum(1), torch.ones(2, 16, 16), atol=1e-5)
    shifted(nets["model"], 1.0)
    assert torch.equal(method.predict(nets, batch().images), before)
    shifted(nets["average"], 0.1)
    assert not torch.allclose(method.predict(nets, batch().images), before)


def test_the_loss_trains_the_model_alone(nets):
    loss = Supervised(**TINY).training_step(nets, batch(), None, Moment(0, 1))
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in nets["model"].parameters())
    assert not any(p.requires_grad for p in nets["average"].parameters())


def test_the_loss_is_the_one_named(nets):
    both, *parts = (
        Supervised(**TINY, loss=name).training_step(nets, batch(), None, Moment(0, 1)).item()
        for name in ("both", "cross-entropy", "dice")
    )
    assert both == pytest.approx(sum(parts), abs=1e-5)


def test_both_networks_start_alike(nets):
    for mine, theirs in zip(nets["average"].parameters(), nets["model"].parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine is not theirs


def test_a_batch_is_augmented_by_the_methods_augmentation():
    still = Augment(rotate=0, scale=0, shift=0, gamma=0, contrast=0, brightness=0, noise=0)
    same = Supervised(augmentation=still).augment(batch(), torch.Generator().manual_seed(0))
    moved = Supervised().augment(batch(), torch.Generator().manual_seed(0))
    assert torch.allclose(same.images, batch().images, atol=1e-4) and torch.equal(same.labels, batch().labels)
    assert not torch.equal(moved.images, batch().images) and not torch.equal(moved.labels, batch().labels)


def identity(method: Method) -> str:
    return json.dumps(method.settings(), sort_keys=True)


def test_settings_tell_methods_apart():
    others = [Method(**{name: value}) for name, value in OTHER.items()]
    others += [Method(augmentation=Augment(**{field.name: 0.5})) for field in fields(Augment)]
    assert set(OTHER) | {"augmentation"} == {field.name for field in fields(Method)}
    assert len({identity(method) for method in [Method(), Supervised(), *others]}) == 2 + len(others)
    assert identity(Supervised()) == identity(Supervised())


def test_an_average_remembers_less_in_the_first_steps():
    assert [Moment(step, 1000).decay(0.99) for step in (0, 1, 9)] == [1 / 10, 2 / 11, 10 / 19]
    assert Moment(900, 1000).decay(0.99) == 0.99


def test_what_has_no_parameters_is_followed_without_a_word():
    follow(torch.nn.Identity(), torch.nn.Identity(), 0.9)


def test_a_generator_of_its_own_follows_torchs():
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append([torch.rand(2, generator=own_generator()).tolist() for _ in range(2)])
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[0][1]
