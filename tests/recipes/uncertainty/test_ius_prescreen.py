"""Pre-screening: frames and back, what several observers teach, who opens the gate and at which threshold."""

from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skimage.util import view_as_windows
from torch import nn

from medcook.data import IGNORE, Case
from medcook.losses import cross_entropy_and_dice
from medcook.methods import Batch, Moment
from medcook.recipes.uncertainty import ius_prescreen
from medcook.recipes.uncertainty.ius_prescreen import (
    Frames,
    FrameTask,
    Prescreen,
    frame_rows,
    holds_target,
    sample,
    screened,
    soft_loss,
)

TINY = dict(channels=(4, 8, 8))
NOW = Moment(0, 10)


def one_hot(labels: torch.Tensor, classes: int = 2) -> torch.Tensor:
    return nn.functional.one_hot(labels.long(), classes).movedim(-1, 1).float()


def batch(raters: int = 3) -> Batch:
    annotations = torch.randint(0, 2, (4, raters, 16, 16)).byte()
    annotations[:2] = 0
    return Batch(torch.randn(4, 1, 16, 16), annotations[:, 0], raters=annotations)


class TestFrames:
    preparation = Frames((24, 32), frame=8, stride=4)

    def test_they_are_windows_of_the_image(self):
        image = np.random.default_rng(0).normal(size=(1, 24, 32)).astype(np.float32)
        label = (image[0] > 1).astype(np.uint8)
        case = Case(image, label, "a", "a")
        scaled = (image[0] - image.mean()) / image.std(ddof=1)
        wanted = view_as_windows(scaled, 8, 4).reshape(-1, 8, 8)
        assert np.allclose(self.preparation.images(case)[:, 0], wanted, atol=1e-5)
        assert np.array_equal(self.preparation.labels(case), view_as_windows(label, 8, 4).reshape(-1, 8, 8))
        other = self.preparation.labels(case, values=1 - label)
        assert torch.equal(other, 1 - self.preparation.labels(case))

    def test_they_go_together_again(self):
        slices = torch.randn(3, 2, 24, 32)
        assert torch.allclose(self.preparation.mosaic(self.preparation.cut(slices)), slices, atol=1e-6)
        case = Case(np.zeros((1, 24, 32), np.float32), np.zeros((24, 32), np.uint8), "a", "a")
        whole = one_hot(torch.randint(0, 2, (1, 24, 32)))
        assert torch.allclose(self.preparation.restore(self.preparation.cut(whole), case), whole[0], atol=1e-5)


@pytest.mark.component("negative frames")
def test_frames_with_and_without_target_come_with_all_their_raters():
    task = FrameTask("embedded", labelled=1, window=((160, 160), None), frame=32)
    samples = task.samples("labelled")
    assert samples.images.shape == (8 * 81, 1, 32, 32) and samples.raters.shape == (8 * 81, 3, 32, 32)
    case = task.data.load(task.labelled_patients[0])
    wanted = view_as_windows(np.pad(case.raters[2, 5], 32), 32, 16).reshape(-1, 32, 32)
    assert np.array_equal(samples.raters[5 * 81 : 6 * 81, 2], wanted)
    present = (samples.labels > 0).flatten(1).any(1)
    assert 0.2 < (~present).float().mean() < 0.8


@pytest.mark.component("label sampling")
class TestSampling:
    raters = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]]).view(1, 3, 2, 2).byte()

    def test_the_mean_and_the_vote(self):
        share = sample(self.raters, 2, "mean")[0, 1].flatten()
        assert torch.allclose(share, self.raters.float().mean(1).flatten())
        assert sample(self.raters, 2, "vote")[0, 1].flatten().tolist() == [0, 0, 1, 1]

    def test_random_gives_each_rater_his_turn(self):
        many = self.raters.expand(3000, -1, -1, -1)
        found = sample(many, 2, "random")[:, 1]
        counts = [(found == rater).all(2).all(1).sum().item() for rater in self.raters[0]]
        assert sum(counts) == 3000 and min(counts) > 900

    def test_mixed_is_the_vote_half_of_the_time(self):
        """The vote is rater 0's label here, so that it comes up in half plus a sixth of the draws."""
        found = sample(self.raters.expand(3000, -1, -1, -1), 2, "mixed")[:, 1]
        share = (found == self.raters[0, 0]).all(2).all(1).float().mean().item()
        assert share == pytest.approx(2 / 3, abs=0.04)

    @pytest.mark.parametrize("how", ["random", "vote", "mixed", "mean"])
    def test_who_is_missing_has_no_say(self, how):
        missing = torch.full((1, 2, 2, 2), IGNORE, dtype=torch.uint8)
        raters = torch.cat([missing, self.raters[:, :1]], dim=1).expand(50, -1, -1, -1)
        assert torch.equal(sample(raters, 2, how), one_hot(self.raters[:, 0]).expand(50, -1, -1, -1))

    @pytest.mark.parametrize("how", ["random", "vote", "mixed", "mean"])
    def test_a_step_learns_from_what_was_sampled(self, how, monkeypatch):
        asked, sampled = [], one_hot(torch.ones(4, 16, 16))
        monkeypatch.setattr(ius_prescreen, "sample", lambda r, c, way: asked.append((r, way)) or sampled)
        method = Prescreen(**TINY, gate="none", labels=how)
        nets, given = method.build(1, 2, 2), batch()
        loss = method.training_step(nets, given, None, NOW)
        assert asked[0][0] is given.raters and asked[0][1] == how
        assert loss.item() == pytest.approx(soft_loss(nets["model"](given.images), sampled).item(), abs=1e-4)


class TestLoss:
    def test_of_certain_labels_it_is_the_book_s(self):
        logits, labels = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8)).byte()
        assert soft_loss(logits, one_hot(labels, 3)).item() == pytest.approx(
            cross_entropy_and_dice(logits, labels).item(), abs=1e-5
        )

    def test_cross_entropy_is_least_at_the_raters_share(self):
        """Of 0.3 for a structure everywhere, the logit with the least cross-entropy is log(0.3 / 0.7)."""
        target = torch.tensor([0.7, 0.3]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
        odds = torch.linspace(-3, 3, 601)
        losses = [nn.functional.cross_entropy(torch.tensor([[0.0, o]]), torch.tensor([[0.7, 0.3]])) for o in odds]
        assert odds[int(torch.stack(losses).argmin())].item() == pytest.approx(np.log(3 / 7), abs=0.01)
        logits = torch.stack([torch.zeros(4, 4), torch.full((4, 4), -1.0)])[None]
        entropy = nn.functional.cross_entropy(logits, target)
        soft = logits.softmax(1)[0, 1]
        dice = 1 - (2 * (soft * 0.3).sum() + 1) / (soft.sum() + 0.3 * 16 + 1)
        assert soft_loss(logits, target).item() == pytest.approx((entropy + dice).item(), abs=1e-5)


@pytest.mark.component("pre-screening classifier")
class TestClassifier:
    def test_it_learns_whether_the_sampled_label_holds_anything(self):
        nets = Prescreen(**TINY).build(1, 2, 2)
        nets["screen"].eval()
        given = batch(raters=1)
        loss = Prescreen(**TINY).training_step(nets, given, None, NOW)
        alone = Prescreen(**TINY, gate="none").training_step(deepcopy(nets), given, None, NOW)
        said = nets["screen"](given.images)[:, 0].sigmoid()
        wanted = -torch.cat([(1 - said[:2]).log(), said[2:].log()]).mean()
        assert (loss - alone).item() == pytest.approx(wanted.item(), abs=1e-4)

    def test_a_sliver_counts_in_part(self):
        target = torch.zeros(4, 3, 20, 20)
        target[:, 0] = 1
        target[1, :, 0, 0] = torch.tensor([0.0, 1.0, 0.0])
        target[2, :, 0, :8] = torch.tensor([0.5, 0.2, 0.3])[:, None]
        target[3, :, :9] = torch.tensor([0.0, 0.0, 1.0])[:, None, None]
        assert holds_target(target).tolist() == pytest.approx([0, 0.25, 1, 1], abs=1e-5)

    def test_it_has_a_network_of_its_own_that_moves_and_is_averaged(self):
        method, nets = Prescreen(**TINY), Prescreen(**TINY).build(1, 2, 2)
        method.training_step(nets, batch(), None, NOW).backward()
        assert all(nets["screen"][i].weight.grad.abs().max() > 0 for i in [2])
        with torch.no_grad():
            nets["screen"][2].weight.add_(1)
        before = nets["average screen"][2].weight.clone()
        method.after_step(nets, NOW)
        assert (nets["average screen"][2].weight > before).all()


@pytest.mark.component("screening before segmentation")
class TestGate:
    def test_a_shut_frame_is_background_and_an_open_one_untouched(self):
        probabilities = torch.rand(3, 2, 4, 4).softmax(1)
        found = screened(probabilities, torch.tensor([False, True, True]))
        assert torch.equal(found[1:], probabilities[1:])
        assert found[0, 0].eq(1).all() and found[0, 1].eq(0).all()

    def nets(self, area: float, odds: torch.Tensor) -> dict:
        """A segmentation that finds a share of every frame, and a classifier with given log odds."""
        inside = (torch.arange(400) < 400 * area).view(1, 20, 20).expand(len(odds), -1, -1)
        return {"average": lambda images: 9 * one_hot(inside), "average screen": lambda images: odds[:, None]}

    def found(self, gate: str, area: float, **settings) -> list[bool]:
        odds = torch.tensor([-3.0, -0.1, 0.1, 3.0])
        probabilities = Prescreen(gate=gate, **settings).predict(self.nets(area, odds), odds.view(4, 1, 1, 1))
        return (probabilities.argmax(1) > 0).flatten(1).any(1).tolist()

    def test_the_classifier_decides_whatever_the_segmentation_finds(self):
        assert self.found("classifier", 0.5) == [False, False, True, True]
        assert self.found("classifier", 0.5, threshold=0.9) == [False, False, False, True]

    def test_without_it_every_frame_is_segmented(self):
        assert self.found("none", 0.5) == self.found("none", 0.005) == [True] * 4

    def test_the_other_gate_goes_by_the_area(self):
        assert self.found("area", 0.5) == self.found("area", 0.01) == [True] * 4
        assert self.found("area", 0.0075) == [False] * 4

    def test_other_gates_need_no_classifier_and_segment_alike(self):
        many = [Prescreen(**TINY, gate=gate) for gate in ("classifier", "area", "none")]
        built = []
        for method in many:
            torch.manual_seed(3)
            built.append(method.build(1, 2, 2))
        assert [set(nets) - {"model", "average"} for nets in built] == [{"screen", "average screen"}, set(), set()]
        assert all(torch.equal(nets["model"].head.weight, built[0]["model"].head.weight) for nets in built)


class TestScore:
    def test_every_kind_of_frame(self, monkeypatch):
        """A hit at half the area, a miss, a false alarm, two quiet frames; and a sliver that does not count."""
        label = np.zeros((6, 20, 20), np.uint8)
        label[:2, :10] = 1
        label[5, 0, 0] = 1
        guess = torch.zeros(6, 20, 20)
        guess[0, :5] = guess[2, 0] = 1
        task = FrameTask("embedded", fold=0, window=((20, 20), None), frame=20)
        case = Case(np.random.default_rng(0).normal(size=(1, 6, 20, 20)).astype(np.float32), label, "a", "a")
        monkeypatch.setattr(Prescreen, "predict", lambda self, nets, images: one_hot(guess)[: len(images)])
        nets = nn.ModuleDict()
        (row,) = frame_rows(SimpleNamespace(method=Prescreen(), task=task, nets=nets, weights={"last": {}}), case)
        assert row["frame_error"] == pytest.approx(2 / 5)
        assert row["false_frames"] == pytest.approx(1 / 3) and row["missed_frames"] == pytest.approx(1 / 2)
        assert row["dice"] == pytest.approx(2 * 100 / 300)
