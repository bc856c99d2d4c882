"""Med3D: every volume through one encoder and the decoder of its own set, which is then dropped."""

from dataclasses import replace

import pytest
import torch
from pretexts import assert_both_phases_work, built
from torch import nn

from medcook.data import IGNORE
from medcook.data.transforms import NONE
from medcook.errors import MedcookError
from medcook.image_pool import CASES, PLACES
from medcook.methods import Batch, Moment
from medcook.pretraining import encoded
from medcook.recipes.pretraining.med3d import BRAINS, CoTrained, astray, balanced, coarser, recipe

TINY = dict(channels=(4, 8, 8), structures=3)
SIZE = (8, 12, 16)
NOW = Moment(0, 10)


def batch(sets: tuple[int, ...] = (0, 1, 0, 1), size: tuple[int, ...] = SIZE) -> Batch:
    """Volumes of these sets, with annotations."""
    rng = torch.Generator().manual_seed(0)
    raters = torch.randint(0, 4, (len(sets), 1, *size), generator=rng).byte()
    images = raters + torch.randn(len(sets), 1, *size, generator=rng)
    groups = (torch.tensor(sets) * CASES + torch.arange(len(sets))) * PLACES
    return Batch(images, torch.full((len(sets), *size), IGNORE).byte(), raters=raters, groups=groups)


@pytest.mark.component("a decoder for each set")
class TestBranches:
    def test_the_loss_is_that_of_each_volume_by_its_own_decoder(self):
        """Three volumes of one set and one of another: a mean over volumes, not over sets."""
        method, images = CoTrained(**TINY, augmentation=NONE), batch((1, 0, 1, 1))
        nets = built(method)
        found = method.pretext(nets, images, NOW)
        maps = encoded(nets["model"], images.images)
        wanted = 0
        for number, mine in ((0, [1]), (1, [0, 2, 3])):
            logits = nets["pretext"][number](maps[mine])
            assert logits.shape[1:] == (4, 4, 6, 8)
            labels = coarser(images.raters[mine, 0], (4, 6, 8))
            wanted += len(mine) / 4 * balanced(logits, labels)
        assert found.item() == pytest.approx(wanted.item(), rel=1e-4)

    def test_a_set_moves_its_own_decoder_alone(self):
        method = CoTrained(**TINY)
        nets = built(method)
        method.pretext(nets, batch((1, 1, 1)), NOW).backward()
        assert all(weight.grad is None for weight in nets["pretext"][0].parameters())
        assert all(
            weight.grad.abs().max() > 0
            for name, weight in nets["pretext"][1].named_parameters()
            if "0.bias" not in name
        )

    def test_more_sets_than_decoders_are_an_error(self):
        method = CoTrained(**TINY)
        with pytest.raises(MedcookError, match="decoders"):
            method.pretext(built(method), batch((0, 2)), NOW)

    def test_coarse_labels_are_those_at_the_middle_of_cells(self):
        labels = torch.arange(6).view(1, 6, 1, 1).repeat(1, 1, 3, 3).byte()
        found = coarser(labels, (2, 1, 1))
        assert found.flatten().tolist() == [1, 4] and found.dtype == torch.uint8
        assert (coarser(torch.full((1, 4, 4, 4), IGNORE).byte(), (2, 2, 2)) == IGNORE).all()


@pytest.mark.component("segmentation loss")
def test_rare_classes_weigh_as_much_as_common_ones():
    logits, labels = torch.randn(2, 4, 3, 4, 5), torch.zeros(2, 3, 4, 5).byte()
    labels[0, 0, 0, :2], labels[1, 2, 3, 4], labels[1, 0] = 2, 3, IGNORE
    sums, counts = [0.0] * 4, [0] * 4
    for b, z, y, x in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 4, 5))).tolist():
        if (k := labels[b, z, y, x].item()) != IGNORE:
            sums[k] -= logits[b, :, z, y, x].log_softmax(0)[k].item()
            counts[k] += 1
    assert counts == [97, 0, 2, 1]
    wanted = sum(sums[k] / counts[k] for k in (0, 2, 3)) / 3
    assert balanced(logits, labels).item() == pytest.approx(wanted, rel=1e-5)
    assert balanced(logits, torch.full_like(labels, IGNORE)).item() == 0


@pytest.mark.component("co-training of one encoder")
class TestEncoder:
    def test_every_set_moves_it(self):
        method = CoTrained(**TINY)
        for number in (0, 1):
            nets = built(method)
            method.pretext(nets, batch((number, number)), NOW).backward()
            assert all(weight.grad.abs().max() > 0 for weight in nets["model"].down.parameters())

    def test_volumes_of_all_sets_pass_through_it_together(self):
        method, calls = CoTrained(**TINY), []
        nets = built(method)
        nets["model"].down[0].register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
        method.pretext(nets, batch(), NOW)
        assert calls == [4]

    def test_annotations_move_with_their_volumes(self, monkeypatch):
        """Volumes that show their annotations still do so after augmentation."""
        method, seen = CoTrained(**TINY, augmentation=replace(NONE, rotate=30.0, shift=0.2)), []
        nets = built(method)
        monkeypatch.setattr(
            "medcook.recipes.pretraining.med3d.coarser", lambda labels, size: seen.append(labels) or labels
        )
        monkeypatch.setattr("medcook.recipes.pretraining.med3d.balanced", lambda logits, labels: logits.mean())
        nets["model"].down[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
        raters = torch.zeros(2, 1, 16, 16, 16).byte()
        raters[:, :, 4:12, 4:12, 4:12] = 2
        images = batch((0, 0), (16, 16, 16))._replace(images=raters.float(), raters=raters)
        method.pretext(nets, images, NOW)
        shown, labels = seen
        assert not torch.equal(labels, raters[:, 0])
        assert ((shown[:, 0] > 1) == (labels == 2)).float().mean() > 0.98


@pytest.mark.component("3DSeg-8")
def test_at_full_the_pool_is_annotated_and_another_set():
    task = recipe.scales["full"].task
    assert task.pool == ("openkbp",) and task.annotated and task.dataset == "hippocampus"
    assert len(BRAINS.pool) == 2 and BRAINS.annotated and CoTrained.trial is BRAINS


@pytest.mark.component("transfer")
class TestTransfer:
    def test_the_encoder_is_pre_trained_and_the_way_up_is_not(self):
        method = CoTrained(**TINY)
        nets = built(method)
        method.training_step(nets, batch(), batch(), NOW).backward()
        assert all(weight.grad.abs().max() > 0 for weight in nets["model"].down.parameters())
        assert all(weight.grad is None for weight in (*nets["model"].up.parameters(), *nets["model"].head.parameters()))

    def test_decoders_have_no_say_in_what_follows(self):
        method, losses = CoTrained(**TINY, augmentation=NONE), []
        labelled = batch()._replace(
            labels=torch.randint(0, 3, (4, *SIZE), generator=torch.Generator().manual_seed(1)).byte()
        )
        for value in (0.0, 1.0):
            nets = built(method)
            nn.init.constant_(nets["pretext"][0][0].weight, value)
            losses.append(method.training_step(nets, labelled, batch(), Moment(9, 10)).item())
        assert losses[0] == losses[1]

    def test_mismatched_annotations_stay_in_their_set_and_with_no_volume_of_their_own(self):
        labels = torch.arange(6).view(6, 1, 1, 1).byte()
        found = astray(labels, torch.tensor([0, 1, 0, 0, 1, 2])).flatten().tolist()
        assert (
            sorted(found) == list(range(6))
            and [found[k] in group for k, group in enumerate(((2, 3), (4,), (0, 3), (0, 2), (1,), (5,)))] == [True] * 6
        )

    def test_the_ablation_differs_in_nothing_else(self):
        arms = {name: arm.method.settings() for name, arm in recipe.arms.items()}
        full, other = arms["med3d"], arms["mismatched annotations"]
        assert {key for key in full if full[key] != other[key]} == {"matched"}
        losses = []
        for matched in (True, False):
            torch.manual_seed(0)
            method = CoTrained(**TINY, matched=matched, augmentation=NONE)
            losses.append(method.pretext(built(method), batch(), NOW).item())
        assert losses[0] != losses[1]


def test_without_annotations_nothing_moves():
    method = CoTrained(**TINY)
    loss = method.pretext(built(method), batch()._replace(raters=None), NOW)
    loss.backward()
    assert loss.item() == 0


@pytest.mark.component("faster convergence")
def test_both_have_as_many_steps_with_labels():
    steps = recipe.scales["full"].budget.steps
    found = {name: steps - arm.method.first(steps) for name, arm in recipe.arms.items()}
    assert found["med3d"] == found["from scratch"] == found["mismatched annotations"] == 2 * steps / 3
    assert found["scratch, all steps"] == steps


@pytest.mark.component("lungs, lung nodules and livers")
def test_three_patients_have_labels():
    task = recipe.scales["full"].task
    assert task.labelled == 3 and task.evaluation == "test"


@pytest.mark.parametrize("size", [(8, 64, 64), (32, 56, 40), (16, 16, 16), (9, 10, 11)])
def test_any_size(size):
    assert torch.isfinite(CoTrained().pretext(built(CoTrained()), batch((0, 1), size), NOW))


@pytest.mark.parametrize("arm", recipe.arms)
def test_every_arm_goes_through_both_phases(arm):
    assert_both_phases_work(recipe.arms[arm].method, batch())
