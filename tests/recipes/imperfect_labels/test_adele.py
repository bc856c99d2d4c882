"""ADELE: when a class's curve has flattened, which labels are corrected then, and agreement across scales."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import jaccard_score
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.losses import find_loss
from medcook.methods import Batch, Moment, Supervised
from medcook.recipes.imperfect_labels.adele import (
    ADELE,
    LearningCurves,
    corrected,
    disagreement,
    has_flattened,
    recipe,
    rising,
    slope,
)

TINY = dict(channels=(4, 8, 8))
NOW = Moment(5, 10)


def batch(side: int = 16) -> Batch:
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (3, 4, 4), generator=rng).byte()
    labels = labels.repeat_interleave(side // 4, 1).repeat_interleave(side // 4, 2)
    return Batch(labels[:, None] + 0.5 * torch.randn(3, 1, side, side, generator=rng), labels)


def built(method: ADELE) -> nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(inputs=1, classes=3, dims=2).train()


@pytest.mark.component("memorisation detected per category")
class TestMoments:
    @pytest.mark.parametrize("slowness", [1.5, 3.0, 5.0])
    @pytest.mark.parametrize("fall", [0.8, 0.9])
    def test_it_is_when_an_exponential_has_lost_that_share_of_its_slope(self, slowness, fall):
        """Of 1 - exp(-t / c) the slope is exp(-(t - 1) / c) of its first: 1 - fall at t = 1 - c ln(1 - fall)."""
        curve = 0.8 * (1 - np.exp(-np.arange(1, 18) / slowness))
        found = [has_flattened(curve[:n], fall) for n in range(1, 18)]
        assert found == [n >= 3 and n >= 1 - slowness * math.log(1 - fall) for n in range(1, 18)]

    @pytest.mark.parametrize("power", [0.5, 0.9])
    def test_the_slope_is_the_curves(self, power):
        for time in (1.0, 2.0, 7.0):
            step = np.array([time - 1e-4, time + 1e-4])
            low, high = rising(step, 0.8, power, 2.0)
            assert slope(time, 0.8, power, 2.0) == pytest.approx((high - low) / 2e-4, rel=1e-4)

    def test_what_comes_before_it_is_learnt_is_left_out(self):
        curve = 0.8 * (1 - np.exp(-np.arange(1, 12) / 1.5))
        late = np.concatenate([np.linspace(0, 0.05, 6), curve])
        for n in range(3, 12):
            shifted = has_flattened(np.concatenate([[0.05], curve[:n]]), 0.9)
            assert has_flattened(late[: 6 + n], 0.9) == shifted
        assert not has_flattened(np.linspace(0, 0.05, 30), 0.9)

    def test_a_curve_of_small_steps_begins_as_well(self):
        curve = np.array([0.0, 0.05, 0.14, 0.2, 0.23, 0.25, 0.26, 0.26, 0.26, 0.26, 0.26])
        assert has_flattened(curve, 0.9) and not has_flattened(curve[:4], 0.9)

    def test_a_curve_that_still_rises_has_not_flattened(self):
        assert not has_flattened(np.linspace(0.1, 0.9, 8), 0.9)
        assert not has_flattened(np.array([]), 0.9) and not has_flattened(np.array([0.1, 0.9]), 0.9)

    def test_the_curve_is_the_iou_of_all_pixels_of_the_period(self):
        curves, rng = LearningCurves(4, 3), torch.Generator().manual_seed(0)
        predicted = torch.randint(0, 3, (2, 5, 8, 8), generator=rng)
        labels = torch.randint(0, 3, (2, 5, 8, 8), generator=rng).byte()
        labels[0, 0] = IGNORE
        for one, other in zip(predicted, labels, strict=True):
            curves.watch(one, other)
        curves.close(0.9, True)
        known = labels != IGNORE
        expected = jaccard_score(labels[known], predicted[known], average=None)
        assert curves.iou[0].numpy() == pytest.approx(expected, abs=1e-6)
        curves.watch(labels[1].long(), labels[1])
        curves.close(0.9, True)
        assert curves.iou[1].tolist() == [1, 1, 1] and curves.past == 2

    def fed(self, per_class: bool) -> list[list[bool]]:
        """`begun` after every period: class 1 is learnt at once, class 2 slowly."""
        curves, found = LearningCurves(12, 3), []
        for period in range(12):
            curves.overlap += torch.tensor([99, 90, 8 * (period + 1)])
            curves.union += 100
            if period == 0:
                curves.overlap[1] = 10
            curves.close(0.9, per_class)
            found.append(curves.begun.tolist())
        return found

    def test_every_class_has_its_own_moment(self):
        found = np.array(self.fed(per_class=True))
        assert not found[:, 0].any()
        assert found[:, 1].argmax() in (2, 3) and found[-1, 1]
        assert (np.diff(found[:, 1].astype(int)) >= 0).all()
        assert not found[:, 2].any() or found[:, 2].argmax() > found[:, 1].argmax() + 2

    def test_or_all_have_one(self):
        found = np.array(self.fed(per_class=False))
        assert np.array_equal(found[:, 1], found[:, 2]) and not found[:, 0].any()

    @pytest.mark.parametrize("steps", [8, 20, 50])
    def test_a_training_has_its_periods(self, steps):
        method = ADELE(**TINY)
        nets = built(method)
        for step in range(steps):
            method.after_step(nets, Moment(step, steps))
        assert nets["curves"].past == min(steps, 20)
        assert {"curves.iou", "curves.begun", "curves.overlap", "curves.past"} <= set(nets.state_dict())


def told(classes: list[int], sure: list[float]) -> Tensor:
    """(1, 4, 1, n) probabilities: this class with this probability, the rest spread."""
    each = zip(classes, sure, strict=True)
    found = torch.stack([torch.full((4,), (1 - p) / 3).index_fill(0, torch.tensor(c), p) for c, p in each])
    return found.T[None, :, None]


@pytest.mark.component("adaptive label correction")
class TestCorrection:
    def correct(self, labels: list[int], classes: list[int], sure: list[float], begun: tuple[int, ...]) -> list[int]:
        there = torch.tensor([value in begun for value in range(4)])
        return corrected(torch.tensor([[labels]]).byte(), told(classes, sure), there, 0.7)[0, 0].tolist()

    def test_only_where_the_output_is_sure(self):
        assert self.correct([0, 0, 1, 1], [1, 1, 0, 0], [0.69, 0.71, 0.69, 0.71], (1,)) == [0, 1, 1, 0]

    def test_only_between_background_and_classes_whose_moment_has_come(self):
        labels, classes = [0, 1, 2, 1, 2, 0], [2, 2, 1, 0, 0, 1]
        assert self.correct(labels, classes, [0.9] * 6, (1,)) == [0, 1, 2, 0, 2, 1]
        assert self.correct(labels, classes, [0.9] * 6, (1, 2)) == classes
        assert self.correct(labels, classes, [0.9] * 6, ()) == labels

    def test_no_class_that_the_image_lacks(self):
        assert self.correct([0, 1, 0], [3, 3, 1], [0.9] * 3, (1, 3)) == [0, 1, 1]

    def test_unlabelled_pixels_stay_so(self):
        assert self.correct([IGNORE, 1], [1, 0], [0.9] * 2, (1,)) == [IGNORE, 0]

    def test_images_do_not_mix(self):
        labels = torch.tensor([[[1, 0]], [[0, 0]]]).byte()
        found = corrected(
            labels, told([1, 1], [0.9, 0.9]).expand(2, -1, -1, -1), torch.tensor([0, 1, 0, 0]).bool(), 0.7
        )
        assert found.tolist() == [[[1, 1]], [[0, 0]]] and found.dtype == torch.uint8

    @pytest.mark.parametrize("begun", [False, True])
    def test_the_averaged_network_corrects_what_is_learnt(self, begun):
        method = ADELE(**TINY, weight=0.0)
        nets, sample = built(method), batch()
        logits = nets["model"](sample.images).detach()
        answer = 9.0 * F.one_hot(((sample.labels + 1) % 3).long(), 3).movedim(-1, 1)
        nets["average"] = Told(answer)
        nets["curves"].begun[1:] = begun
        expected = answer.argmax(1).byte() if begun else sample.labels
        found = method.training_step(nets, sample, None, NOW)
        assert found.item() == pytest.approx(find_loss("both")(logits, expected).item(), rel=1e-4)
        never = ADELE(**TINY, weight=0.0, correct=False).training_step(nets, sample, None, NOW)
        assert never.item() == pytest.approx(find_loss("both")(logits, sample.labels).item(), rel=1e-4)

    def test_it_begins_when_the_curves_say_so(self):
        method = ADELE(**TINY)
        nets = built(method)
        for period, share in enumerate([0.1, 0.6, 0.8, 0.85, 0.86, 0.86, 0.86]):
            nets["curves"].overlap += int(1000 * share)
            nets["curves"].union += 1000
            method.after_step(nets, Moment(period, 20))
        assert nets["curves"].begun.tolist() == [False, True, True]


class Told(nn.Module):
    """Answers with given logits."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


class Grey(nn.Module):
    """Logits that a pixel's own grey value decides: the same at every scale but for interpolation."""

    def __init__(self):
        super().__init__()
        self.sizes, self.head = [], nn.Conv2d(1, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(tuple(images.shape[2:]))
        return self.head(images)


class TestScales:
    def test_disagreement_is_the_divergence_from_the_mean(self):
        outputs = list(torch.randn(3, 2, 4, 5, 5, generator=torch.Generator().manual_seed(0)) * 3)
        p = torch.stack([logits.softmax(1) for logits in outputs])
        mean = p.mean(0)
        expected = sum(F.kl_div(mean.log(), one, reduction="none").sum(1).mean() for one in p)
        assert torch.allclose(disagreement(outputs, 0.0), expected, rtol=1e-4)
        assert disagreement([outputs[0]] * 3, 0.0).abs() < 1e-6

    def test_images_that_nothing_is_sure_of_do_not_count(self):
        outputs = [torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)]
        outputs[0][:, 0, 0, 0] = torch.tensor([9.0, 1.0])
        outputs[1][:, 0, 0, 0] = torch.tensor([4.0, 0.0])
        outputs[0][:, 1, 1, 1] = 1.0
        both, sure = disagreement(outputs, 0.0), disagreement(outputs, 0.9)
        alone = disagreement([one[:1] for one in outputs], 0.0)
        assert sure < both and torch.allclose(sure, alone / 2)

    def test_the_image_is_seen_at_three_scales(self):
        method, sample = ADELE(**TINY), batch(20)
        nets = built(method)
        nets["model"] = Grey()
        method.training_step(nets, sample, None, NOW)
        assert nets["model"].sizes == [(20, 20), (14, 14), (30, 30)]

    @pytest.mark.parametrize("weight", [1.0, 3.0])
    def test_the_loss_is_the_mean_over_scales_and_their_agreement(self, weight):
        method, sample = ADELE(**TINY, weight=weight, share=1.0, agreed=0.0), batch()
        nets = built(method)
        outputs = [nets["model"](sample.images)]
        for scale in (0.7, 1.5):
            images = F.interpolate(sample.images, size=[round(16 * scale)] * 2, mode="bilinear")
            outputs.append(F.interpolate(nets["model"](images), size=(16, 16), mode="bilinear"))
        expected = sum(find_loss("both")(one, sample.labels) for one in outputs) + weight * disagreement(outputs, 0.0)
        found = method.training_step(nets, sample, None, NOW)
        assert found.item() == pytest.approx(expected.item() / 3, rel=1e-4)

    def test_other_scales_leave_nothing_behind(self):
        kept = []
        for weight in (0.0, 1.0):
            method = ADELE(**TINY, weight=weight)
            nets = built(method)
            method.training_step(nets, batch(), None, NOW)
            kept.append([b.clone() for b in nets["model"].buffers() if b.is_floating_point()])
        assert all(torch.equal(one, other) for one, other in zip(*kept, strict=True))

    def test_some_images_are_enough(self):
        images, seen = torch.randn(8, 1, 16, 16), []
        nets = built(method := ADELE(**TINY))
        nets["model"].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        method.training_step(nets, Batch(images, torch.zeros(8, 16, 16).byte()), None, NOW)
        assert [len(one) for one in seen] == [8, 2, 2]
        assert torch.equal(seen[1], F.interpolate(images[:2], size=(11, 11), mode="bilinear"))

    @pytest.mark.parametrize("side", [16, 20, 36])
    def test_any_size_and_every_gradient(self, side):
        method = ADELE(**TINY)
        nets, sample = built(method), batch(side)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = method.training_step(nets, sample, None, NOW)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in nets["model"].parameters())
        assert method.predict(nets.eval(), sample.images).shape == (3, 3, side, side)


def test_without_either_it_is_the_baseline():
    method, sample = ADELE(**TINY, correct=False, weight=0.0), batch()
    nets = built(method)
    expected = Supervised(**TINY).training_step(nets, sample, None, NOW)
    assert torch.allclose(method.training_step(nets, sample, None, NOW), expected, rtol=1e-4)


def test_the_ablation_takes_the_correction_alone():
    method, without = (recipe.arms[name].method.settings() for name in recipe.ablation)
    assert {name for name in method if method[name] != without[name]} == {"correct"}
