"""RIPU: what is asked for, never more than the budget, and the losses on source and target."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.data.transforms import NONE, Augment
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.recipes.imperfect_labels.ripu import (
    Asked,
    Ripu,
    best_squares,
    borders,
    first_visits,
    local_consistency,
    negative_learning,
    recipe,
    region_impurity,
    region_uncertainty,
    window,
)

TINY = dict(channels=(4, 8))
BEFORE, AMID, AFTER = Moment(0, 10), Moment(36, 100), Moment(9, 10)


def batch(size: tuple[int, int] = (40, 32)) -> Batch:
    """Two source images, then two target images; the oracle knows all labels."""
    rng = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 3, (4, size[0] // 8, size[1] // 8), generator=rng).byte()
    truth = truth.repeat_interleave(8, 1).repeat_interleave(8, 2)
    images = truth[:, None] + 0.3 * torch.randn(4, 1, *truth.shape[1:], generator=rng)
    groups = torch.tensor([0, 0, 1, 1])
    labels = torch.where(groups.view(-1, 1, 1) == 0, truth, IGNORE)
    return Batch(images, labels, torch.tensor([3, 0, 7, 5]), raters=truth[:, None], groups=groups)


def built(method: Ripu) -> nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(1, 3, 2).train()


def step(method: Ripu, nets: nn.ModuleDict, now: Moment, given: Batch | None = None) -> Tensor:
    torch.manual_seed(1)
    return method.training_step(nets, given or batch(), None, now)


def asked(nets: nn.ModuleDict, method: Ripu, size: tuple[int, int] = (40, 32)) -> Tensor:
    """(2, H, W) bool: what the oracle of the two target images was asked."""
    return window(nets["asked"].recall(torch.tensor([7, 5])), size, method.radius)


class Says(nn.Module):
    """A network whose logits are given; it keeps what it was shown."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> Tensor:
        self.shown = images
        return self.logits[: len(images)]


@pytest.mark.component("region impurity and prediction uncertainty")
class TestAcquisition:
    @pytest.mark.parametrize("radius", [0, 1, 2])
    def test_both_measures_pixel_by_pixel(self, radius):
        p = torch.rand(2, 3, 7, 6).pow(4)
        p = p / p.sum(1, keepdim=True)
        impurity, uncertainty = region_impurity(p, radius), region_uncertainty(p, radius)
        for b, y, x in np.ndindex(2, 7, 6):
            square = p[b, :, max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1].flatten(1)
            shares = np.bincount(square.argmax(0), minlength=3) / square.shape[1]
            mixed = -sum(share * np.log(share) for share in shares if share) / np.log(3)
            unsure = -(square * square.log()).sum(0).mean().item() / np.log(3)
            assert impurity[b, y, x].item() == pytest.approx(mixed, abs=1e-5)
            assert uncertainty[b, y, x].item() == pytest.approx(unsure, abs=1e-5)

    def test_certain_predictions_have_no_uncertainty_and_one_class_no_impurity(self):
        p = F.one_hot(torch.randint(0, 3, (1, 8, 8)), 3).movedim(-1, 1).float()
        assert region_uncertainty(p, 1).abs().max() == 0 < region_impurity(p, 1).max()
        p = torch.tensor([0.4, 0.3, 0.3]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
        assert region_impurity(p, 1).abs().max() < 1e-6 and region_uncertainty(p, 1).min() > 0.9

    @pytest.mark.parametrize("select", ["ripu", "uncertainty", "impurity"])
    def test_what_is_mixed_and_unsure_is_asked_for(self, select):
        """Left an unsure border, in the middle an unsure patch of one class, on the right a certain border."""
        logits = torch.zeros(1, 3, 40, 32)
        logits[:, 0] = 20
        logits[:, 1, :, :3] = 20.02
        logits[:, 1, 10:30, 12:20] = 19.98
        logits[:, 1, :, 28:] = 60
        method = Ripu(select=select, budget=0.05)
        nets = nn.ModuleDict({"average": Says(logits.expand(2, -1, -1, -1)), "asked": Asked(8, 64)})
        method.ask(nets, Batch(torch.zeros(2, 1, 40, 32), batch().raters[2:, 0], torch.tensor([7, 5])), AFTER)
        columns = (asked(nets, method).nonzero()[:, 2]).unique()
        expected = {"ripu": {0, 1, 2, 3, 4}, "uncertainty": set(range(22)), "impurity": {*range(6), *range(25, 31)}}
        assert set(columns.tolist()) <= expected[select]
        if select == "ripu":
            assert {2, 3} <= set(columns.tolist())
        if select == "impurity":
            assert {2, 3, 27, 28} <= set(columns.tolist())

    def test_without_any_structure_chance_decides(self):
        method = Ripu(budget=0.05)
        logits = torch.tensor([9.0, 0, 0]).view(1, 3, 1, 1).expand(2, 3, 40, 32)
        places = []
        for seed in (0, 1):
            nets = nn.ModuleDict({"average": Says(logits), "asked": Asked(8, 64)})
            torch.manual_seed(seed)
            target = Batch(torch.zeros(2, 1, 40, 32), batch().raters[2:, 0], torch.tensor([7, 5]))
            method.ask(nets, target, AFTER)
            places.append(asked(nets, method))
        assert not torch.equal(*places) and places[0].nonzero()[:, 1].max() > 30

    def test_images_are_seen_as_they_are_by_the_network_that_predicts(self):
        method, given = Ripu(**TINY), batch()
        nets = built(method)
        nets["average"] = Says(torch.randn(2, 3, 40, 32))
        step(method, nets, AFTER, given)
        assert torch.equal(nets["average"].shown, given.images[2:])

    def test_nothing_is_left_behind_in_the_average(self):
        method = Ripu(**TINY)
        nets = built(method)
        before = {name: value.clone() for name, value in nets["average"].state_dict().items()}
        step(method, nets, AFTER)
        after = nets["average"].state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert nets["average"].training


@pytest.mark.component("region-based selection")
class TestSelection:
    def test_squares_of_centres(self):
        found = window(torch.tensor([[0, 13, -1], [29, -1, -1]]), (5, 6), 1)
        expected = torch.zeros(2, 5, 6, dtype=torch.bool)
        expected[0, :2, :2] = expected[0, 1:4, :3] = expected[1, 3:, 4:] = True
        assert torch.equal(found, expected)

    def test_the_best_first_and_never_over_another(self):
        """Against a greedy search with loops, with squares of an earlier round."""
        torch.manual_seed(0)
        score, taken = torch.rand(2, 12, 11), torch.tensor([[14, -1], [60, 100]])
        counts = torch.tensor([4, 6])
        chosen = best_squares(score, taken, counts, radius=1)
        for b in range(2):
            centres = [divmod(int(c), 11) for c in taken[b] if c >= 0]
            for place in range(int(counts[b])):
                free = [
                    (score[b, y, x].item(), y, x)
                    for y, x in np.ndindex(12, 11)
                    if all(max(abs(y - v), abs(x - u)) > 2 for v, u in centres)
                ]
                _, y, x = max(free)
                assert chosen[b, place] == y * 11 + x
                centres.append((y, x))
            assert (chosen[b, counts[b] :] == -1).all()

    def test_an_image_may_run_out_of_squares(self):
        chosen = best_squares(torch.rand(1, 4, 4), torch.full((1, 1), -1), torch.tensor([9]), radius=1)
        assert 1 <= (chosen >= 0).sum() <= 4 and chosen.shape == (1, 9)

    @pytest.mark.parametrize("select", ["ripu", "random", "uncertainty", "impurity"])
    @pytest.mark.parametrize(("radius", "budget"), [(1, 0.05), (0, 0.03), (2, 0.1)])
    def test_rounds_fill_the_budget_and_never_pass_it(self, select, radius, budget):
        method = Ripu(**TINY, select=select, radius=radius, budget=budget)
        nets, squares = built(method), int(budget * 40 * 32 / (2 * radius + 1) ** 2)
        before = torch.zeros(2, 40, 32, dtype=torch.bool)
        for k, start in enumerate((0.0, *method.rounds)):
            for _ in range(2):  # a second visit in the same round asks nothing
                step(method, nets, Moment(int(start * 100), 100))
            now = asked(nets, method)
            assert ((nets["asked"].centres >= 0).sum(1)[[7, 5]] == squares * k // 5).all()
            assert (now & before).sum() == before.sum()
            assert now.float().mean((1, 2)).max() <= budget
            before = now
        step(method, nets, AFTER)
        assert torch.equal(asked(nets, method), before)
        assert before.float().mean() > 0.6 * budget  # squares at the edge are smaller

    def test_a_late_first_visit_asks_for_all_rounds_at_once(self):
        method = Ripu(**TINY)
        nets = built(method)
        step(method, nets, AFTER)
        assert ((nets["asked"].centres >= 0).sum(1)[[7, 5]] == int(0.022 * 1280 / 9)).all()

    def test_source_images_and_others_ask_for_nothing_and_checkpoints_keep_it(self):
        method = Ripu(**TINY)
        nets = built(method)
        step(method, nets, AFTER)
        there = (nets["asked"].centres >= 0).any(1).nonzero().flatten().tolist()
        assert there == [5, 7]
        assert torch.equal(nets.state_dict()["asked.centres"], nets["asked"].centres)

    def test_twice_in_a_batch_is_once(self):
        assert first_visits(torch.tensor([4, 2, 4, 4, 1])).tolist() == [True, True, False, False, True]
        method, given = Ripu(**TINY), batch()
        nets = built(method)
        step(method, nets, AFTER, given._replace(index=torch.tensor([3, 0, 7, 7])))
        assert (nets["asked"].centres[7] >= 0).sum() == int(0.022 * 1280 / 9)

    def learnt(self, method: Ripu, now: Moment) -> Tensor:
        """Labels (2, H, W) of the target images that a step learns from."""
        nets, given = built(method), batch()
        return method.answers(nets, Batch(given.images[2:], given.raters[2:, 0], given.index[2:]), now)

    @pytest.mark.parametrize("select", ["ripu", "random"])
    def test_only_what_was_asked_for_is_learnt(self, select):
        method, truth = Ripu(**TINY, select=select), batch().raters[2:, 0]
        assert (self.learnt(method, BEFORE) == IGNORE).all()
        found = self.learnt(method, AFTER)
        known = found != IGNORE
        assert torch.equal(found[known], truth[known]) and 0 < known.float().mean() <= 0.022

    def test_other_ways_to_ask(self):
        truth = batch().raters[2:, 0]
        assert (self.learnt(Ripu(**TINY, select="nothing"), AFTER) == IGNORE).all()
        assert torch.equal(self.learnt(Ripu(**TINY, select="everything"), BEFORE), truth)
        whole = Ripu(**TINY, select="images", budget=1 / 7)  # samples 0, 7, 14, ...
        assert (self.learnt(whole, BEFORE) == IGNORE).all()
        found = self.learnt(whole, AFTER)
        assert torch.equal(found[0], truth[0]) and (found[1] == IGNORE).all()

    def test_an_oracle_that_was_not_asked_has_no_say(self):
        """Other answers where nobody asks: the same loss."""
        method, given = Ripu(**TINY), batch()
        nets = built(method)
        step(method, nets, AFTER)
        unseen = ~asked(nets, method)[:, None]
        other = given.raters.clone()
        other[2:] = torch.where(unseen, (other[2:] + 1) % 3, other[2:])
        one, two = (step(method, nets, AFTER, given._replace(raters=raters)).item() for raters in (given.raters, other))
        assert one == two
        other[2:] = (given.raters[2:] + 1) % 3
        assert step(method, nets, AFTER, given._replace(raters=other)).item() != one

    def test_every_arm_sees_the_same_views(self):
        shown = []
        for arm in recipe.arms.values():
            nets = built(Ripu(**asdict(arm.method) | TINY | {"augmentation": Augment()}))
            nets["model"] = Says(torch.zeros(4, 3, 40, 32))
            step(arm.method, nets, AFTER)
            shown.append(nets["model"].shown)
        assert all(torch.equal(view, shown[0]) for view in shown)
        assert not torch.allclose(shown[0], batch().images, atol=0.1)

    def test_too_many_samples_or_squares(self):
        with pytest.raises(MedcookError, match="slots"):
            Asked(2, 2).recall(torch.tensor([2]))
        with pytest.raises(MedcookError, match="most"):
            Asked(2, 2).add(torch.tensor([1]), torch.tensor([[4, 5, 6]]))


def loss(method: Ripu, logits: Tensor, given: Batch) -> float:
    nets = nn.ModuleDict({"model": Says(logits), "average": Says(logits[2:]), "asked": Asked(8, 64)})
    return step(method, nets, AFTER, given).item()


def test_source_and_queried_pixels_count_each_by_their_mean():
    """Cross-entropy written out, without augmentation and regularisers."""
    given, logits = batch(), torch.randn(4, 3, 40, 32)
    method = Ripu(select="everything", local=0.0, negative=0.0, augmentation=NONE)
    source = F.cross_entropy(logits[:2], given.labels[:2].long())
    target = F.cross_entropy(logits[2:], given.raters[2:, 0].long())
    assert loss(method, logits, given) == pytest.approx((source + target).item(), rel=1e-5)
    method = Ripu(select="nothing", local=0.0, negative=0.0, augmentation=NONE)
    assert loss(method, logits, given) == pytest.approx(source.item(), rel=1e-5)


@pytest.mark.component("local prediction consistency")
class TestLocalConsistency:
    def test_it_is_the_distance_to_the_neighbourhood_along_borders(self):
        torch.manual_seed(0)
        p, labels = torch.randn(2, 3, 7, 9).softmax(1), torch.randint(0, 2, (2, 3, 3))
        labels = labels.repeat_interleave(3, 1)[:, :7].repeat_interleave(3, 2).byte()
        labels[0, 0, 0] = IGNORE
        padded = np.pad(p.numpy(), [(0, 0), (0, 0), (1, 1), (1, 1)], mode="edge")
        found = []
        for b, y, x in np.ndindex(2, 7, 9):
            near = labels[b, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
            if labels[b, y, x] != IGNORE and (near != labels[b, y, x]).any():
                mean = padded[b, :, y : y + 3, x : x + 3].mean((1, 2))
                found.append(np.abs(p[b, :, y, x].numpy() - mean).sum())
        assert borders(labels).sum() == len(found)
        assert local_consistency(p, labels).item() == pytest.approx(np.mean(found), rel=1e-4)

    def test_no_border_no_loss(self):
        assert local_consistency(torch.rand(1, 3, 8, 8), torch.ones(1, 8, 8).byte()) == 0
        assert local_consistency(torch.rand(0, 3, 8, 8), torch.ones(0, 8, 8).byte()) == 0

    def test_a_step_asks_it_of_the_source_alone(self):
        given, logits = batch(), torch.randn(4, 3, 40, 32)
        on, off = (Ripu(local=weight, negative=0.0, augmentation=NONE) for weight in (0.1, 0.0))
        expected = 0.1 * local_consistency(logits[:2].softmax(1), given.labels[:2])
        assert loss(on, logits, given) - loss(off, logits, given) == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.component("negative learning loss")
class TestNegativeLearning:
    def test_unlikely_classes_are_pushed_down(self):
        p = torch.tensor([[0.9, 0.06, 0.04], [0.97, 0.02, 0.01]]).T.reshape(1, 3, 1, 2).requires_grad_()
        found = negative_learning(p)
        assert found.item() == pytest.approx(-np.log([0.96, 0.98, 0.99]).mean(), rel=1e-4)
        found.backward()
        assert (p.grad[0, :, 0] > 0).tolist() == [[False, False], [False, True], [True, True]]

    def test_nothing_unlikely_no_loss(self):
        assert negative_learning(torch.full((1, 3, 4, 4), 1 / 3)) == 0
        assert negative_learning(torch.rand(0, 3, 4, 4)) == 0

    def test_a_step_asks_it_of_the_target_alone(self):
        given, logits = batch(), 3 * torch.randn(4, 3, 40, 32)
        on, off = (Ripu(local=0.0, negative=weight, augmentation=NONE) for weight in (1.0, 0.0))
        expected = negative_learning(logits[2:].softmax(1))
        assert loss(on, logits, given) - loss(off, logits, given) == pytest.approx(expected.item(), abs=1e-5)


def test_what_moves_in_from_outside_is_unlabelled():
    """Of a target image whose labels are all class 1, no view says background."""
    given = batch()._replace(raters=torch.ones(4, 1, 40, 32).byte())
    logits = torch.zeros(4, 3, 40, 32)
    logits[2:, 1] = 30.0
    method = Ripu(select="everything", local=0.0, negative=0.0)
    source = Ripu(select="nothing", local=0.0, negative=0.0)
    assert loss(method, logits, given) == pytest.approx(loss(source, logits, given), abs=1e-6)


@pytest.mark.parametrize("groups", [[0, 0, 0, 0], [1, 1, 1, 1], None])
def test_batches_of_one_group(groups):
    given = batch()._replace(groups=None if groups is None else torch.tensor(groups))
    method = Ripu(**TINY)
    nets = built(method)
    found = step(method, nets, AFTER, given._replace(labels=given.raters[:, 0]))
    found.backward()
    assert torch.isfinite(found)


def test_all_of_the_network_learns():
    method = Ripu(**TINY)
    nets = built(method)
    step(method, nets, AFTER).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in nets["model"].parameters() if p.requires_grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(step(method, nets, AFTER, batch((41, 35))))


def test_ablation_and_comparator_differ_in_what_is_asked_for():
    arms = {name: asdict(arm.method) for name, arm in recipe.arms.items()}
    for other in ("random regions", "without impurity", "all target labels"):
        assert {key for key in arms["ripu"] if arms["ripu"][key] != arms[other][key]} == {"select"}
