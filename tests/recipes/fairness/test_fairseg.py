"""Fair error-bound scaling, and what it is compared with."""

import math

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss

from medcook.data import IGNORE
from medcook.errors import MedcookError
from medcook.losses import cross_entropy_and_dice
from medcook.measures.equity import equity_scaled
from medcook.methods import Batch, Moment, Supervised
from medcook.pooled import POOLED
from medcook.recipes.fairness.fairseg import (
    FairErrorBoundScaling,
    GroupDRO,
    GroupMemory,
    GroupWeighted,
    InverseFrequency,
    RareGroupTask,
    ScaledPredictions,
    group_losses,
    group_rows,
    recipe,
    squared_dice,
)
from medcook.training import Fitted

TINY = {"channels": (4, 8)}
NOW = Moment(0, 10)


def batch(groups=(0, 0, 0, 1)) -> Batch:
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (len(groups), 8, 8), generator=rng).byte()
    return Batch(torch.randn(len(groups), 1, 8, 8, generator=rng), labels, groups=torch.tensor(groups))


def memory(losses=(0.2, 0.6), seen=(90.0, 10.0)) -> GroupMemory:
    made = GroupMemory(len(losses), pace=0.5)
    made.bound, made.seen = torch.tensor(losses), torch.tensor(seen)
    return made


def loss_of(method, nets, labelled) -> torch.Tensor:
    return method.training_step(nets, labelled, None, NOW)


@pytest.mark.component("fair error-bound scaling")
class TestWeights:
    def test_a_group_weighs_by_its_error_over_the_best(self):
        weights = FairErrorBoundScaling(gamma=1.0).weights(memory())
        assert weights[1] / weights[0] == pytest.approx(3)
        weights = FairErrorBoundScaling(gamma=2.0).weights(memory())
        assert weights[1] / weights[0] == pytest.approx(9)

    def test_the_mean_weight_of_a_sample_is_one(self):
        weights = FairErrorBoundScaling().weights(memory())
        assert float(0.9 * weights[0] + 0.1 * weights[1]) == pytest.approx(1)

    def test_gamma_nought_makes_all_equal(self):
        assert FairErrorBoundScaling(gamma=0.0).weights(memory()).tolist() == pytest.approx([1, 1])

    def test_groups_not_seen_yet_change_nothing(self):
        with_strangers = memory((0.2, 0.6, 0.0), (90.0, 10.0, 0.0))
        assert with_strangers.ratio(1.0).tolist() == pytest.approx([1, 1 / 3, 1])
        found, wanted = (FairErrorBoundScaling().weights(m)[:2] for m in (with_strangers, memory()))
        assert torch.allclose(found, wanted)

    def test_the_step_is_the_weighted_sum_of_the_groups_losses(self):
        method, labelled = FairErrorBoundScaling(**TINY, pace=1.0), batch()
        nets = method.build(1, 2, 2)
        nets["memory"].bound[:2], nets["memory"].seen[:2] = torch.tensor([0.1, 0.1]), torch.tensor([6.0, 1.0])
        logits = nets["model"](labelled.images).detach().float()
        parts = [(logits[:3], labelled.labels[:3]), (logits[3:], labelled.labels[3:])]
        a, b = (float(squared_dice(*part)) for part in parts)  # the bounds: pace 1 forgets what was before
        w, v = a / min(a, b), b / min(a, b)
        even = 11 / (9 * w + 2 * v)  # 9 and 2 samples are seen by then
        first, second = (float(cross_entropy_and_dice(*part)) for part in parts)
        wanted = even * (0.75 * w * first + 0.25 * v * second)
        assert a != b and loss_of(method, nets, labelled).item() == pytest.approx(wanted, rel=1e-4)

    def test_a_hard_group_pulls_harder(self):
        """The gradient of the rare group's image grows by its weight against that of equal weights."""

        def pull(gamma: float) -> torch.Tensor:
            method = FairErrorBoundScaling(**TINY, gamma=gamma)
            logits = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
            labelled = batch()
            present, losses, sizes = group_losses(cross_entropy_and_dice, logits, labelled.labels, labelled.groups)
            method.total(memory(), present, losses, sizes / 4, labelled).backward()
            return logits.grad.flatten(1).norm(dim=1)

        ratio = pull(1.0) / pull(0.0)
        assert ratio[3] / ratio[0] == pytest.approx(3, rel=1e-4) and ratio[3] > 1 > ratio[0]


class TestMemory:
    def test_the_first_loss_is_taken_as_it_is_and_later_ones_followed(self):
        made = GroupMemory(3, pace=0.25)
        made.remember(torch.tensor([0, 2]), torch.tensor([1.0, 4.0]), torch.tensor([5.0, 6.0]), torch.tensor([3, 1]))
        assert made.bound.tolist() == [1, 0, 4] and made.seen.tolist() == [3, 0, 1]
        made.remember(torch.tensor([2]), torch.tensor([0.0]), torch.tensor([2.0]), torch.tensor([2]))
        assert made.loss.tolist() == [5, 0, 5] and made.bound.tolist() == [1, 0, 3] and made.seen.tolist() == [3, 0, 3]

    def test_it_is_saved_with_the_networks(self):
        nets = FairErrorBoundScaling(**TINY).build(1, 2, 2)
        loss_of(FairErrorBoundScaling(**TINY), nets, batch())
        state = nets.state_dict()
        assert state["memory.seen"].tolist()[:3] == [3, 1, 0] and state["memory.bound"][1] > 0

    def test_no_gradient_flows_into_it(self):
        nets = FairErrorBoundScaling(**TINY).build(1, 2, 2)
        loss_of(FairErrorBoundScaling(**TINY), nets, batch()).backward()
        assert not nets["memory"].bound.requires_grad and not list(nets["memory"].parameters())


class TestOneGroup:
    @pytest.mark.parametrize("kind", [GroupWeighted, FairErrorBoundScaling, InverseFrequency, GroupDRO])
    def test_one_group_is_supervised_training(self, kind):
        method, labelled = kind(**TINY), batch()
        for groups in (None, torch.full((4,), 5)):
            nets = method.build(1, 2, 2)
            wanted = Supervised(**TINY).training_step(nets, labelled, None, NOW).item()
            assert loss_of(method, nets, labelled._replace(groups=groups)).item() == pytest.approx(wanted, rel=1e-5)

    def test_too_many_groups_are_named(self):
        method = FairErrorBoundScaling(**TINY, groups=1)
        with pytest.raises(MedcookError, match="room for 1 groups"):
            loss_of(method, method.build(1, 2, 2), batch())


@pytest.mark.component("scaling of predictions")
class TestScaledPredictions:
    def test_unscaled_it_is_the_dice_loss_of_monai(self):
        logits, labels = torch.randn(3, 3, 6, 6), torch.randint(0, 3, (3, 6, 6)).byte()
        reference = DiceLoss(
            softmax=True, to_onehot_y=True, squared_pred=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5
        )
        wanted = reference(logits, labels[:, None].long())
        assert squared_dice(logits, labels).item() == pytest.approx(wanted.item(), abs=1e-6)

    def test_perfect_predictions_of_a_scaled_group_still_cost(self):
        labels = torch.ones(1, 4, 4, dtype=torch.uint8)
        labels[:, :2] = 0
        sure = torch.stack([labels == 0, labels == 1], dim=1).float() * 100
        w = 0.4
        assert squared_dice(sure, labels, torch.tensor([w])).item() == pytest.approx(1 - 2 * w / (w**2 + 1), abs=1e-4)

    def test_the_factor_is_tanh_of_the_ratio(self):
        method, labelled = ScaledPredictions(), batch()
        logits = torch.randn(4, 2, 8, 8)
        found = method.total(memory(), None, None, None, labelled._replace(images=logits))
        factors = torch.tensor([math.tanh(1)] * 3 + [math.tanh(1 / 3)])
        ce = torch.nn.functional.cross_entropy(logits, labelled.labels.long())
        assert found.item() == pytest.approx((ce + squared_dice(logits, labelled.labels, factors)).item(), rel=1e-5)

    def test_a_hard_group_pulls_less_hard(self):
        """What the module says of this form: two copies of one image, the second's group is three times as bad."""
        one = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(2))
        logits = torch.cat([one, one]).requires_grad_()
        labels = batch((0,)).labels.expand(2, 8, 8)
        squared_dice(logits, labels, torch.tanh(memory().ratio(1.0))).backward()
        easy, hard = logits.grad.flatten(1).norm(dim=1)
        assert hard < 0.6 * easy

    def test_unlabelled_pixels_do_not_count(self):
        logits, labels = torch.randn(1, 2, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8)
        labels[:, 4:] = IGNORE
        half = squared_dice(logits[:, :, :4], labels[:, :4], torch.ones(1))
        assert squared_dice(logits, labels, torch.ones(1)).item() == pytest.approx(half.item())


class TestOtherWeights:
    def test_inverse_frequency_lets_every_group_weigh_the_same(self):
        weights = InverseFrequency().weights(memory())
        assert float(weights[0] * 90) == pytest.approx(float(weights[1] * 10)) == pytest.approx(50)

    def test_group_dro_climbs_as_the_algorithm_says(self):
        method, made = GroupDRO(climb=0.5), memory((0.0, 0.0, 0.0), (1.0, 1.0, 0.0))
        q = np.array([0.5, 0.5])
        for losses in ([0.2, 1.0], [0.1, 0.9], [0.3, 0.8]):
            made.loss = torch.tensor([*losses, 0.0])
            found = method.total(made, torch.tensor([0, 1]), torch.tensor(losses), None, None)
            q = q * np.exp(0.5 * np.array(losses))
            q = q / q.sum()
            assert found.item() == pytest.approx(q @ losses, rel=1e-5)
        alone = method.total(made, torch.tensor([0]), torch.tensor([0.3]), None, None)
        q = q * np.exp(0.5 * np.array([0.3, 0.8]))
        assert alone.item() == pytest.approx(0.3 * q[0] / q.sum(), rel=1e-5), "the group that is not there climbs too"


@pytest.mark.component("equity-scaled segmentation metric")
def test_what_is_compared_is_the_sum_formula():
    dice, group = np.array([0.9, 0.9, 0.9, 0.5]), np.array(["a", "a", "a", "b"])
    assert POOLED[recipe.metric].value(dice, group) == pytest.approx(equity_scaled(0.8, [0.9, 0.5]))
    assert equity_scaled(0.8, [0.9, 0.5]) == pytest.approx(0.8 / 1.4)


@pytest.mark.component("fairness dataset")
def test_the_data_set_has_a_manifest_with_six_attributes():
    """Its reader is tested in tests/data/sets/test_fairseg.py."""
    from medcook.data import open_dataset
    from medcook.data.sets.fairseg import ATTRIBUTES

    manifest = open_dataset("fairseg").manifest
    assert manifest.facts.patients == 10_000 and set(manifest.classes) == {0, 1, 2}
    assert len({"age", *(name for name, _ in ATTRIBUTES.values())}) == 6


class TestRareGroup:
    def test_only_the_rare_group_is_thinned(self):
        task = RareGroupTask("embedded", rare="north", share=0.25)
        names = [task.data.attributes(patient)["site"] for patient in task.labelled_patients]
        everyone = [task.data.attributes(patient)["site"] for patient in task.data.split.train]
        assert names.count("north") == 4 and len(names) - 4 == len(everyone) - everyone.count("north") == 12

    def test_a_draw_keeps_others_but_as_many(self):
        first, second = (RareGroupTask("embedded", rare="north", share=0.25, draw=draw) for draw in (0, 1))
        assert set(first.labelled_patients) != set(second.labelled_patients)
        assert len(first.labelled_patients) == len(second.labelled_patients)
        assert RareGroupTask("embedded", rare="north", share=0.25, draw=1).labelled_patients == second.labelled_patients

    def test_more_than_there_are_is_refused(self):
        with pytest.raises(MedcookError, match="cannot be 90%"):
            _ = RareGroupTask("embedded", rare="north", share=0.9).labelled_patients

    def test_validation_keeps_everyone(self):
        task = RareGroupTask("embedded", rare="north")
        assert task.val_patients == task.data.split.val


def test_rows_hold_dice_and_the_group():
    task = RareGroupTask("embedded", rare="island", labelled=4)
    nets = FairErrorBoundScaling(**TINY).build(1, 4, 2)
    fitted = Fitted(
        FairErrorBoundScaling(**TINY), task, nets, {"last": nets.state_dict()}, {}, {"precision": "float32"}
    )
    case = next(iter(task.cases("val")))
    rows = group_rows(fitted, case)
    assert [row["structure"] for row in rows] == list(task.structures.values())
    assert all(row["group"] == case.attributes["site"] and 0 <= row["dice"] <= 1 for row in rows)
