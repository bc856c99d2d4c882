"""The tasks of chapter 13 and its two phases: what a pool holds, and that a pretext sees no label."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from medcook.data import IGNORE
from medcook.errors import MedcookError, Paused
from medcook.image_pool import PoolTask, VolumePoolTask, blocks, cut, origin, packed, thinned
from medcook.methods import Batch, Moment, Supervised
from medcook.pretraining import (
    FromScratch,
    OptionalPretext,
    Pretrained,
    Projector,
    encoded,
    info_nce,
    one_cycle,
    pooled,
)
from medcook.tasks import Budget, Samples, Task
from medcook.training import Loop, fit

OWN = PoolTask("embedded", labelled=3, pool=("embedded",))
SHOWN = PoolTask("embedded", labelled=3, pool=("embedded", "embedded, negative"), annotated=True)


def test_the_own_part_of_a_pool_is_who_has_no_labels():
    plain, pool = Task("embedded", labelled=3).samples("unlabelled"), OWN.samples("unlabelled")
    assert torch.equal(pool.images, plain.images) and (pool.labels == IGNORE).all()
    assert torch.equal(origin(pool.groups).case, plain.case_of)
    assert torch.equal(OWN.samples("labelled").labels, Task("embedded", labelled=3).samples("labelled").labels)


def test_a_pool_holds_training_patients_alone():
    everyone = PoolTask("embedded", pool=("embedded",))
    assert everyone.unlabelled_patients == everyone.data.split.train
    assert len(everyone.samples("unlabelled")) == 8 * len(everyone.data.split.train)


def test_annotations_of_other_sets_come_along_and_the_own_stay_hidden():
    samples = SHOWN.samples("unlabelled")
    first = origin(samples.groups).set == 0
    assert (samples.labels == IGNORE).all()
    assert (samples.raters[first] == IGNORE).all()
    assert samples.raters[~first].unique().tolist() == [0, 1, 2, 3]
    assert samples.raters.shape == (len(samples), 1, 96, 96)
    assert PoolTask("embedded", labelled=3, pool=SHOWN.pool).samples("unlabelled").raters is None


def test_a_look_changes_the_images_of_its_part():
    samples = SHOWN.samples("unlabelled")
    second = origin(samples.groups).set == 1
    plain = PoolTask("embedded", pool=("embedded",)).samples("unlabelled").images
    assert torch.corrcoef(torch.stack([samples.images[second].flatten(), plain.flatten()]))[0, 1] < -0.9


def test_most_is_shared_by_the_sets_and_spread_over_their_patients():
    samples = PoolTask("embedded", labelled=3, pool=SHOWN.pool, most=40).samples("unlabelled")
    come = origin(samples.groups)
    assert come.set.bincount().tolist() == [20, 20]
    assert len(come.case[come.set == 0].unique()) >= 19


def test_origins_survive_packing():
    case_of = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    come = origin(packed(2, case_of))
    assert come.set.tolist() == [2] * 7
    assert torch.equal(come.case, case_of)
    assert come.place.tolist() == [0, 0.25, 0.5, 0.75, 0, 0.5, 0]


def test_volumes_come_as_volumes():
    samples = VolumePoolTask("embedded", labelled=3, pool=("embedded",)).samples("unlabelled")
    assert samples.images.shape == (21, 1, 8, 64, 64)


def test_blocks_are_the_parts_of_a_volume_and_keep_their_labels():
    images = torch.randn(2, 1, 8, 9, 4)
    labels = (images[:, 0] > 0).to(torch.uint8)
    images[1, 0, 4:] = 0
    found = blocks(Samples(images, labels, torch.tensor([5, 7])), (4, 3, 4))
    assert found.images.shape == (6 + 3, 1, 4, 3, 4)
    assert found.case_of.tolist() == [5] * 6 + [7] * 3
    assert torch.equal(found.images[4, 0], images[0, 0, 4:, 3:6])
    assert torch.equal(found.labels[4], labels[0, 4:, 3:6])


def test_incomplete_blocks_fall_away_and_too_small_volumes_are_an_error():
    volumes = torch.randn(1, 1, 5, 5, 5)
    assert torch.equal(cut(volumes, (4, 4, 4)), volumes[:, :, :4, :4, :4])
    with pytest.raises(MedcookError, match="no block"):
        blocks(Samples(volumes, volumes[:, 0], torch.tensor([0])), (6, 4, 4))


def test_thinning_keeps_what_belongs_together():
    samples = Samples(torch.arange(10.0).view(10, 1, 1), torch.arange(10).view(10, 1), torch.arange(10))
    few = thinned(samples, 5)
    assert few.case_of.tolist() == [0, 2, 4, 6, 8] and few.images.flatten().tolist() == [0, 2, 4, 6, 8]
    assert thinned(samples, 20) is samples and few.raters is None


def test_a_pool_of_nothing_is_an_error():
    with pytest.raises(MedcookError, match="pool"):
        PoolTask("embedded", labelled=3).samples("unlabelled")


@pytest.mark.parametrize("steps", [10, 20, 300])
def test_one_cycle_is_torchs(steps):
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    wanted = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1.0, total_steps=steps, pct_start=0.2, cycle_momentum=False)
    for step in range(steps):
        assert one_cycle(step, steps) == pytest.approx(optimiser.param_groups[0]["lr"], abs=1e-6)
        optimiser.step()
        if step + 1 < steps:
            wanted.step()


@dataclass
class Blank(Pretrained):
    """Its pretext asks for nothing of images but that they be there, and notes what it was given."""

    channels: tuple[int, ...] = (4, 4)

    def pretext_parts(self, model: nn.Module, inputs: int, dims: int) -> nn.Module:
        return nn.Linear(1, 1)

    def pretext(self, nets, images, now):
        vars(self).setdefault("seen", []).append((images, now))
        return nets["pretext"](torch.zeros(1, 1)).sum() + pooled(encoded(nets["model"], images.images)).square().mean()

    def fail(self, nets, now):
        raise AssertionError("moved")


@dataclass
class Small(Blank):
    """The same, without notes."""

    def pretext(self, nets, images, now):
        return pooled(encoded(nets["model"], self.view(images.images))).square().mean() + nets["pretext"].bias.sum()


@pytest.fixture(scope="module")
def run():
    """A method with a pretext, after ten steps, and the loop that trained it."""
    method, task = Blank(), OWN
    labelled, extra = task.samples("labelled"), task.samples("unlabelled")
    loop = Loop(method, task, Budget(steps=10, batch=4), "float32", 0, labelled, extra, None, progress=False)
    return method, loop.run(), extra


def test_the_pretext_gets_its_share_of_the_steps_and_unlabelled_images_as_they_are(run):
    method, _, extra = run
    assert [now for _, now in method.seen] == [Moment(step, 5) for step in range(5)]
    for batch, _ in method.seen:
        assert (batch.labels == IGNORE).all()
        assert torch.equal(batch.images, extra.images[batch.index])


def test_the_loss_of_the_second_phase_is_the_supervised_one(run):
    method, fitted, _ = run
    images, labels = torch.randn(2, 1, 16, 16), torch.randint(0, 4, (2, 16, 16), dtype=torch.uint8)
    nets = fitted.nets.train()
    wanted = Supervised(channels=(4, 4)).training_step(nets, Batch(images, labels), None, Moment(0, 4))
    assert torch.allclose(method.training_step(nets, Batch(images, labels), None, Moment(5, 10)), wanted)


def test_labelled_batches_are_augmented_and_others_are_not():
    images, labels = torch.randn(2, 1, 16, 16), torch.ones(2, 16, 16, dtype=torch.uint8)
    rng = torch.Generator().manual_seed(0)
    assert not torch.equal(Blank().augment(Batch(images, labels), rng).images, images)
    hidden = Batch(images, torch.full_like(labels, IGNORE))
    assert Blank().augment(hidden, rng) is hidden


def test_the_rate_rises_and_falls_once_in_each_phase():
    method = Blank(rate=1.0, pretext_rate=2.0)
    optimiser, schedule = method.optimise([nn.Parameter(torch.zeros(1))], 50)
    rates = []
    for _ in range(50):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert rates == pytest.approx([2 * one_cycle(k, 25) for k in range(25)] + [one_cycle(k, 25) for k in range(25)])
    assert max(rates[:25]) == pytest.approx(2) and max(rates[25:]) == pytest.approx(1)


def test_the_second_phase_has_an_optimiser_of_its_own():
    torch.manual_seed(0)
    start = torch.randn(3)
    method, weight, alone = Blank(rate=1.0, pretext_rate=1.0), nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimiser, schedule = method.optimise([weight], 20)
    for _ in range(10):  # large gradients, as a pretext may have
        weight.grad = 1000 * torch.ones(3)
        optimiser.step()
        schedule.step()
    assert not optimiser.state
    weight.data.copy_(start)
    fresh, own = FromScratch(rate=1.0, share=0.0).optimise([alone], 10)
    for _ in range(10):
        for one, (stepping, going) in ((weight, (optimiser, schedule)), (alone, (fresh, own))):
            one.grad = one.detach().clone()
            stepping.step()
            going.step()
    assert torch.allclose(weight, alone) and not torch.allclose(weight, start)


def test_the_average_forgets_the_pretext_when_labels_come():
    nets = Blank().build(1, 2, 2)
    nets["average"].requires_grad_(False)
    nn.init.constant_(nets["model"].head.weight, 1.0)
    nn.init.constant_(nets["average"].head.weight, 0.0)
    Blank().after_step(nets, Moment(5, 10))
    assert nets["average"].head.weight.mean().item() == pytest.approx(0.9)


def test_from_scratch_nothing_moves_until_labels_come():
    method, task = FromScratch(channels=(4, 4), share=0.5), OWN
    labelled, extra = task.samples("labelled"), task.samples("unlabelled")
    loop = Loop(method, task, Budget(steps=4, batch=2), "float32", 0, labelled, extra, None, progress=False)
    start = loop.build()["model"].state_dict()
    batch = Batch(labelled.images[:2], labelled.labels[:2])
    nets = loop.build()
    optimiser, schedule = method.optimise(list(nets["model"].parameters()), 4)
    for step in range(4):
        assert torch.equal(nets["model"].head.weight, start["head.weight"]) == (step <= 2)
        method.training_step(nets, batch, None, Moment(step, 4)).backward()
        optimiser.step()
        schedule.step()
    assert loop.run().history["loss"][:2] == [0.0, 0.0]


def test_without_waiting_all_steps_are_supervised():
    method = FromScratch(channels=(4, 4), share=0.0)
    assert not method.phase(Moment(0, 10))[0]
    batch = Batch(torch.randn(2, 1, 16, 16), torch.ones(2, 16, 16, dtype=torch.uint8))
    nets = method.build(1, 2, 2)
    same = Supervised(channels=(4, 4)).training_step(nets, batch, None, Moment(0, 10))
    assert torch.equal(method.training_step(nets, batch, None, Moment(0, 10)), same)


def test_a_pretext_may_be_left_out():
    class Either(OptionalPretext):
        pretext_parts, pretext, after_pretext = Small.pretext_parts, Small.pretext, Blank.fail

    batch = Batch(torch.randn(2, 1, 16, 16), torch.ones(2, 16, 16, dtype=torch.uint8))
    waits, learns = (Either(channels=(4, 4), waits=waits) for waits in (True, False))
    nets = waits.build(1, 2, 2)
    waits.training_step(nets, batch, None, Moment(0, 10)).backward()
    waits.after_step(nets, Moment(0, 10))
    assert "pretext" not in nets and all(p.grad is None for p in nets.parameters())
    waits.training_step(nets, batch, None, Moment(5, 10)).backward()
    assert all(p.grad is not None for p in nets["model"].parameters())
    nets = learns.build(1, 2, 2)
    learns.training_step(nets, batch, None, Moment(0, 10)).backward()
    assert nets["pretext"].bias.grad is not None
    with pytest.raises(AssertionError, match="moved"):
        learns.after_step(nets, Moment(0, 10))


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path))
    task, budget = PoolTask("embedded", labelled=3, pool=("embedded",), most=16), Budget(steps=12, batch=2)
    method = Small()
    whole = fit(method, task, budget, cache=False, progress=False)
    for _ in range(3):
        with pytest.raises(Paused):
            fit(method, task, budget, progress=False, deadline=0.0)
    parts = fit(method, task, budget, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.nets.parameters(), parts.nets.parameters(), strict=True))


def test_two_views_differ_and_follow_from_torchs_generator():
    images, method = torch.randn(2, 1, 16, 16), Blank()
    torch.manual_seed(0)
    first, second = method.view(images), method.view(images)
    torch.manual_seed(0)
    assert not torch.equal(first, second) and torch.equal(method.view(images), first)


def test_info_nce_is_the_loop_over_pairs():
    first, second = torch.randn(3, 5), torch.randn(3, 5)
    unit = [v / v.norm() for v in (*first, *second)]
    losses = []
    for k in range(6):
        scores = torch.tensor([unit[k] @ unit[j] / 0.1 for j in range(6) if j != k])
        partner = unit[k] @ unit[(k + 3) % 6] / 0.1
        losses.append(torch.logsumexp(scores, 0) - partner)
    assert info_nce(first, second).item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)


def test_the_way_down_of_a_u_net_is_its_own():
    nets = FromScratch(channels=(4, 8, 8)).build(1, 2, 2)
    images, deepest = torch.randn(2, 1, 16, 16), []
    nets["model"].down[-1].register_forward_hook(lambda _, __, out: deepest.append(out))
    nets["model"](images)
    assert torch.allclose(encoded(nets["model"], images), deepest[0], atol=1e-5)
    assert Projector(8, 16, 4)(pooled(deepest[0])).shape == (2, 4)
