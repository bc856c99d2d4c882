"""DAUGS: what overlapping patches say of a pixel, how uncertain that makes a network, and whose solution is taken."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import nn

from medcook.cohorts import CohortTask
from medcook.methods import Batch, Moment
from medcook.recipes.uncertainty import daugs
from medcook.recipes.uncertainty._validation import once
from medcook.recipes.uncertainty.daugs import (
    Pool,
    elected,
    external_rows,
    grid,
    least_uncertain,
    patchwise,
    random_patches,
    uncertainty,
)
from medcook.sampling import trained

TINY = dict(channels=(4, 8), members=3)
NOW = Moment(0, 10)


def batch() -> Batch:
    labels = torch.randint(0, 2, (4, 16, 16)).byte()
    return Batch(labels[:, None] + torch.randn(4, 1, 16, 16), labels)


def by_position(patches: torch.Tensor) -> torch.Tensor:
    """Probabilities that depend on where in the patch a pixel lies, and on the image."""
    ramp = torch.linspace(0, 1, patches[0, 0].numel()).view(patches.shape[2:])
    return torch.cat([ramp * patches, 1 - ramp * patches], dim=1)


@pytest.mark.component("pool of networks")
class TestPool:
    def test_members_differ_in_their_start_alone(self):
        nets = Pool(**TINY).build(inputs=1, classes=2, dims=2)
        assert len(nets["model"]) == len(nets["average"]) == 3
        heads = [net.head.weight for net in nets["model"]]
        assert not torch.equal(heads[0], heads[1]) and heads[0].shape == heads[1].shape
        assert all(
            torch.equal(a.head.weight, b.head.weight) for a, b in zip(nets["model"], nets["average"], strict=True)
        )

    def test_all_of_them_learn_and_all_averages_follow(self):
        method, nets = Pool(**TINY), Pool(**TINY).build(inputs=1, classes=2, dims=2)
        method.training_step(nets, batch(), None, NOW).backward()
        assert all(net.head.weight.grad.abs().max() > 0 for net in nets["model"])
        with torch.no_grad():
            [net.head.weight.add_(1) for net in nets["model"]]
        before = [net.head.weight.clone() for net in nets["average"]]
        method.after_step(nets, NOW)
        assert all((net.head.weight > old).all() for net, old in zip(nets["average"], before, strict=True))


@pytest.mark.component("sliding-patch analysis")
class TestPatches:
    @pytest.mark.parametrize(("size", "side", "steps"), [(16, 8, 4), (21, 8, 4), (7, 7, 4), (5, 3, 8)])
    def test_they_cover_the_axis_and_end_with_it(self, size, side, steps):
        starts = grid(size, side, steps)
        assert starts[0] == 0 and starts[-1] == size - side and len(set(starts)) == len(starts)
        assert max(np.diff(starts), default=0) <= max(1, side // steps)

    def test_their_mean_is_that_of_sliding_windows(self):
        images = torch.rand(2, 1, 16, 24)
        mean, _ = patchwise(by_position, images, (8, 12), 4)
        wanted = sliding_window_inference(images, (8, 12), 4, by_position, overlap=0.75, mode="constant")
        assert torch.allclose(mean, wanted, atol=1e-5)

    def test_a_network_is_trained_on_patches(self):
        images = torch.arange(2 * 64.0).view(2, 1, 8, 8)
        found = [random_patches(images, images[:, 0].byte(), (4, 6)) for _ in range(50)]
        assert {tuple(patches.shape) for patches, _ in found} == {(2, 1, 4, 6)}
        assert all(torch.equal(patches[:, 0].byte(), labels) for patches, labels in found)
        corners = {int(patches[0, 0, 0, 0]) for patches, _ in found}
        assert corners == {8 * down + right for down in range(5) for right in range(3)}
        assert any(patches[1, 0, 0, 0] - 64 != patches[0, 0, 0, 0] for patches, _ in found)

    def test_members_are_shown_patches_of_their_own(self):
        nets, seen = Pool(**TINY).build(inputs=1, classes=2, dims=2), []
        for net in nets["model"]:
            net.down[0].register_forward_pre_hook(lambda _, images: seen.append(images[0]))
        Pool(**TINY).training_step(nets, batch(), None, NOW)
        assert [tuple(images.shape) for images in seen] == [(4, 1, 8, 8)] * 3
        assert not torch.equal(seen[0], seen[1])


@pytest.mark.component("uncertainty map")
class TestMap:
    def test_it_is_the_deviation_of_what_patches_say(self):
        """Pixel by pixel against numpy, from every patch that holds the pixel."""
        images, (side, steps) = torch.rand(1, 1, 12, 12), (8, 4)
        _, found = patchwise(by_position, images, (side, side), steps)
        said = [[[] for _ in range(12)] for _ in range(12)]
        for top in range(0, 5, 2):
            for left in range(0, 5, 2):
                part = by_position(images[:, :, top : top + side, left : left + side])[0, 1]
                for y, x in np.ndindex(side, side):
                    said[top + y][left + x].append(part[y, x].item())
        wanted = [[np.std(values, ddof=1) if len(values) > 1 else 0 for values in line] for line in said]
        assert np.allclose(found[0], wanted, atol=1e-3)
        assert found[0, 0, 0] == 0 and found.max() > 0.05

    def test_a_network_that_repeats_itself_is_certain(self):
        _, found = patchwise(lambda part: torch.cat([part, 1 - part], 1), torch.rand(2, 1, 16, 16), (8, 8), 4)
        assert found.max() < 1e-3

    def test_structures_add_up(self):
        def three(part):
            ramp = by_position(part)[:, 1:]
            return torch.cat([1 - ramp, ramp / 2, ramp / 2], 1)

        images = torch.rand(1, 1, 12, 12)
        one, both = patchwise(by_position, images, (8, 8), 4)[1], patchwise(three, images, (8, 8), 4)[1]
        assert torch.allclose(both, one / 2**0.5, atol=1e-3)


@pytest.mark.component("selection by uncertainty")
class TestSelection:
    def solution(self, area: int) -> torch.Tensor:
        inside = (torch.arange(16) < area).float().view(1, 4, 4)
        return torch.stack([1 - inside, inside], 1)

    def test_uncertainty_is_the_squared_norm_by_the_area(self):
        deviation = torch.rand(1, 4, 4)
        found = uncertainty(self.solution(5), deviation).item()
        assert found == pytest.approx(np.linalg.norm(deviation[0].numpy(), "fro") ** 2 / 5, rel=1e-5)

    def test_nothing_segmented_never_wins(self):
        assert uncertainty(self.solution(0), torch.zeros(1, 4, 4)).item() == np.inf

    def test_each_image_gets_its_least_uncertain_solution(self):
        solutions = torch.arange(3.0).view(3, 1, 1, 1, 1).expand(3, 2, 2, 4, 4)
        chosen = least_uncertain(solutions, torch.tensor([[0.3, 0.1], [0.2, 0.4], [0.1, 0.2]]))
        assert (
            chosen.shape == (2, 2, 4, 4) and chosen[0].unique().tolist() == [2] and chosen[1].unique().tolist() == [0]
        )

    @pytest.mark.parametrize("winner", range(3))
    def test_the_method_hands_out_the_network_that_does_not_contradict_itself(self, winner):
        def steady(part):
            return torch.cat([part - 9, 9 - part], 1)

        def unsteady(part):
            return 4 * by_position(part) - 2

        nets = {"average": [steady if k == winner else unsteady for k in range(3)]}
        images = torch.rand(2, 1, 16, 16)
        handed = Pool(**TINY).predict(nets, images)
        assert torch.allclose(handed, steady(images).softmax(1), atol=1e-5)


class TestOtherChoices:
    def answers(self, choice: str, **more) -> torch.Tensor:
        nets = {"average": [lambda part, k=k: torch.cat([part, part + k], 1) for k in range(3)]}
        return Pool(**TINY, choice=choice).answers(nets, torch.zeros(2, 1, 16, 16), **more)[:, 0, 1, 0, 0]

    def test_what_they_hand_out(self):
        each = torch.arange(3.0).sigmoid()
        assert torch.allclose(self.answers("any"), each, atol=1e-5)
        assert torch.allclose(self.answers("average"), each.mean()[None], atol=1e-5)
        assert torch.allclose(self.answers("best on validation", elected=2), each[2:], atol=1e-5)

    def test_one_network_on_whole_images_is_plain_prediction(self):
        method = Pool(channels=(4, 8), members=1, side=1.0, choice="average")
        nets = method.build(inputs=1, classes=2, dims=2).eval()
        images = torch.randn(2, 1, 16, 16)
        assert torch.allclose(method.predict(nets, images), nets["average"][0](images).softmax(1), atol=1e-5)


class TestScore:
    @pytest.fixture(scope="class")
    def fitted(self):
        task = CohortTask("embedded", labelled=2, keep=(("site", "north"),))
        method = Pool(**TINY, choice="any")
        nets = method.build(inputs=1, classes=4, dims=2)
        return SimpleNamespace(method=method, task=task, nets=nets, weights={"last": nets.state_dict()})

    def test_the_training_site_is_left_out(self, fitted):
        case = next(iter(fitted.task.cases("val")))
        assert external_rows(fitted, case) == []

    def test_a_row_is_the_mean_of_what_may_be_handed_out(self, fitted, monkeypatch):
        data = fitted.task.data
        case = next(data.load(p) for p in data.split.train if data.attributes(p)["site"] != "north")
        truth = fitted.task.preparation.labels(case).long()
        right = nn.functional.one_hot(truth, 4).movedim(-1, 1).float()
        nothing = torch.zeros_like(right)
        nothing[:, 0] = 1
        monkeypatch.setattr(Pool, "answers", lambda self, nets, images, best: torch.stack([right, nothing]))
        rows = external_rows(fitted, case)
        assert [row["structure"] for row in rows] == list(fitted.task.structures.values())
        assert all(row["dice"] == pytest.approx(0.5, abs=0.02) and row["failed"] == 0.5 for row in rows)

    def test_the_elected_network_is_the_best_on_validation_patients(self, fitted, monkeypatch):
        wanted = fitted.nets["average"][1]
        monkeypatch.setattr(daugs, "validation_dice", lambda one, nets, val: float(one.net is wanted))
        assert elected(fitted) == 1

    def test_a_choice_is_made_once_for_each_model(self, fitted):
        calls = []
        choose = once(lambda model: calls.append(model) or len(calls))
        other = SimpleNamespace(nets=nn.ModuleDict())
        assert [choose(fitted), choose(fitted), choose(other), choose(fitted)] == [1, 1, 2, 1]

    def test_the_last_weights_are_loaded(self, fitted):
        with torch.no_grad():
            fitted.weights = {"last": {name: value.clone() for name, value in fitted.nets.state_dict().items()}}
            fitted.nets["average"][0].head.bias.add_(5)
        loaded = trained(fitted)
        assert not loaded.training
        assert torch.equal(loaded["average"][0].head.bias, fitted.weights["last"]["average.0.head.bias"])
