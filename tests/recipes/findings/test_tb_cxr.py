"""Lungs first, then tuberculosis: what the U-Net learns, what the classifier sees of it, and where it looks."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.recipes.findings._settings import AUGMENT
from medcook.recipes.findings.tb_cxr import (
    BRAINS,
    BUDGET,
    LARGE,
    SegmentedLungs,
    activation,
    detection_rows,
    elsewhere,
    recipe,
    share_inside,
)
from medcook.tasks import Budget
from medcook.training import Loop

TINY = SegmentedLungs(start="random", channels=(4, 8), lungs=(4, 8))
SEGMENTS, TELLS = Moment(0, 9), Moment(8, 9)
SIZES = pytest.mark.parametrize("size", [(32, 32), (37, 50), (96, 96)])


def built(method: SegmentedLungs = TINY) -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(2, 2, 2)


def images(count: int = 4, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    """(count, 2, *size): noise, and two drawn lungs that are bright in it."""
    noise = torch.randn(count, 1, *size, generator=torch.Generator().manual_seed(1))
    drawn = torch.zeros(count, 1, *size)
    height, width = size
    drawn[:, :, height // 4 : -height // 4, width // 8 : width // 3] = 1
    drawn[:, :, height // 4 : -height // 4, -width // 3 : -width // 8] = 1
    return torch.cat([noise + 4 * drawn, drawn], dim=1)


def batch() -> Batch:
    outcome = torch.tensor([0, 1, 0, 1]).byte().view(-1, 1, 1).expand(-1, 32, 32)
    return Batch(images(), outcome)


def finding(monkeypatch, masks: torch.Tensor) -> None:
    """The U-Net finds these."""
    monkeypatch.setattr(SegmentedLungs, "found", lambda self, nets, given: masks[: len(given)])


@pytest.mark.component("segmentation of X-rays by U-nets")
class TestSegmentation:
    def test_the_u_net_learns_the_drawn_lungs_and_finds_them(self):
        nets = built()
        optimiser = torch.optim.Adam(nets["model"].parameters(), 1e-2)
        for step in range(40):
            loss = TINY.training_step(nets, batch(), None, SEGMENTS)
            loss.backward()
            optimiser.step(), optimiser.zero_grad()
            TINY.after_step(nets, Moment(step, 90))
        other = images(2, (48, 40))
        found = TINY.found(nets, other)
        drawn = other[:, 1:] > 0.5
        assert 2 * (found & drawn).sum() / (found.sum() + drawn.sum()) > 0.8

    def test_its_loss_is_that_of_the_second_channel_whatever_the_outcome(self):
        nets, given = built(), batch()
        found = TINY.training_step(nets, given, None, SEGMENTS)
        logits = nets["model"].lungs(given.images[:, :1])
        torch.testing.assert_close(found, find_loss("both")(logits, given.images[:, 1].byte()))
        other = given._replace(labels=1 - given.labels)
        assert TINY.training_step(nets, other, None, SEGMENTS).item() == pytest.approx(found.item())

    def test_drawn_lungs_are_not_needed_any_more(self):
        """The defining property: what is drawn changes neither what is found nor what is told."""
        nets, given = built().eval(), images()
        other = torch.cat([given[:, :1], 1 - given[:, 1:]], dim=1)
        assert torch.equal(TINY.found(nets, given), TINY.found(nets, other))
        assert torch.equal(TINY.predict(nets, given), TINY.predict(nets, other))
        assert torch.equal(TINY.predict(nets, given), TINY.predict(nets, given[:, :1]))

    def test_every_part_learns_in_its_phase_in_either_precision(self):
        for now, part in ((SEGMENTS, "unet"), (TELLS, "reader")):
            for mixed in (False, True):
                nets = built()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                    loss = TINY.training_step(nets, batch(), None, now)
                loss.backward()
                assert loss.dtype == torch.float32 and torch.isfinite(loss)
                for name, module in nets["model"].named_children():
                    moved = [p.grad is not None and bool(p.grad.abs().max() > 0) for p in module.parameters()]
                    assert all(moved) if name == part else not any(moved), name

    def test_while_the_classifier_learns_the_u_net_stays(self):
        nets = built().train()
        before = {name: value.clone() for name, value in nets["model"].unet.state_dict().items()}
        TINY.training_step(nets, batch(), None, TELLS).backward()
        assert all(torch.equal(before[name], value) for name, value in nets["model"].unet.state_dict().items())

    @SIZES
    def test_any_size(self, size):
        nets = built().eval()
        assert nets["model"].lungs(images(2, size)[:, :1]).shape == (2, 2, *size)
        for method in (TINY, replace(TINY, sees="elsewhere"), replace(TINY, sees="whole")):
            found = method.predict(nets, images(2, size))
            assert found.shape == (2, 2, *size) and torch.allclose(found.sum(1), torch.ones(2, *size))


@pytest.mark.component("classification of segmented lungs and of whole X-rays")
class TestWhatIsSeen:
    def test_only_lungs_are_seen_by_the_scale_of_lungs(self, monkeypatch):
        nets, given, lungs = built(), images(), images()[:, 1:] > 0.5
        finding(monkeypatch, lungs)
        view = TINY.view(nets, given)
        inside = given[0, 0][lungs[0, 0]]
        wanted = (inside - inside.mean()) / inside.std(unbiased=False)
        torch.testing.assert_close(view[0, 0][lungs[0, 0]], wanted, atol=1e-4, rtol=1e-4)
        assert (view[~lungs] == 0).all()
        hidden = torch.cat([torch.where(lungs, given[:, :1], 99.0), given[:, 1:]], dim=1)
        assert torch.equal(TINY.view(nets, hidden), view)

    def test_the_baseline_sees_everything(self, monkeypatch):
        finding(monkeypatch, images()[:, 1:] > 0.5)
        view = replace(TINY, sees="whole").view(built(), images())
        x = images()[0, 0]
        torch.testing.assert_close(view[0, 0], (x - x.mean()) / x.std(unbiased=False), atol=1e-4, rtol=1e-4)

    def test_where_no_lungs_are_found_the_image_is_seen_whole(self, monkeypatch):
        finding(monkeypatch, torch.zeros(4, 1, 32, 32, dtype=torch.bool))
        whole = replace(TINY, sees="whole").view(built(), images())
        for sees in ("lungs", "elsewhere"):
            assert torch.equal(replace(TINY, sees=sees).view(built(), images()), whole)

    def test_the_ablation_sees_as_much_elsewhere(self, monkeypatch):
        lungs = images()[:, 1:] > 0.5
        finding(monkeypatch, lungs)
        view = replace(TINY, sees="elsewhere").view(built(), images())
        seen = view != 0
        assert torch.equal(seen, elsewhere(lungs))
        assert (seen.flatten(1).sum(1) == lungs.flatten(1).sum(1)).all() and not (seen & lungs).any()

    def test_elsewhere_is_the_move_of_least_overlap(self):
        rng = torch.Generator().manual_seed(4)
        masks = torch.rand(3, 1, 9, 12, generator=rng) > 0.6
        for mask, moved in zip(masks[:, 0], elsewhere(masks)[:, 0], strict=True):
            every = [torch.roll(mask, (down, across), (0, 1)) for down in range(9) for across in range(12)]
            least = min(int((mask & other).sum()) for other in every)
            assert int((mask & moved).sum()) == least
            assert any(torch.equal(moved, other) for other in every)

    def test_arms_differ_in_what_they_see_alone(self):
        methods = [recipe.arms[name].method for name in (*recipe.compare, recipe.ablation[1])]
        assert [method.sees for method in methods] == ["lungs", "whole", "elsewhere"]
        assert all(replace(method, sees="lungs") == methods[0] for method in methods)
        assert not any(arm.changes for arm in recipe.arms.values())

    def test_the_classifier_learns_in_two_thirds_of_the_steps(self):
        method = LARGE["segmented lungs"].method
        assert BUDGET.steps - method.first(BUDGET.steps) == 240 and method.augmentation == AUGMENT

    def test_lungs_move_with_the_image(self):
        moved = TINY.augment(batch(), torch.Generator().manual_seed(1)).images
        bright, drawn = moved[:, 0], moved[:, 1]
        assert not torch.equal(drawn, batch().images[:, 1]) and drawn.max() <= 1
        assert bright[drawn > 0.9].mean() > 2 + bright[drawn < 0.1].mean()


@pytest.fixture(scope="module")
def fitted():
    budget = Budget(steps=6, batch=4, precision="float32", checks=0)
    return Loop(TINY, BRAINS, budget, "float32", 0, BRAINS.samples("labelled"), None, None, False, "cpu").run()


@pytest.mark.component("visualization of what the network learns from")
class TestActivation:
    def test_its_mean_is_what_decides(self):
        """The defining property: the mean of the map and the biases make the difference of the logits."""
        reader, view = built()["model"].reader.eval(), images()[:, :1]
        logits = reader(view)
        mean = activation(reader, view).mean((1, 2)) + reader.head.bias[1] - reader.head.bias[0]
        torch.testing.assert_close(mean, logits[:, 1] - logits[:, 0], atol=1e-5, rtol=1e-4)

    def test_its_share_in_a_region(self):
        found, region = torch.zeros(1, 4, 4), torch.zeros(1, 1, 4, 4)
        found[0, 0, 0], found[0, 3, 3], found[0, 1, 1] = 3.0, 1.0, -5.0
        region[..., :2, :2] = 1
        assert share_inside(found, region) == pytest.approx(0.75)
        assert math.isnan(share_inside(-found.abs(), region))

    def test_what_looks_everywhere_alike_has_the_regions_area(self):
        region = images(1)[:, 1:]
        assert share_inside(torch.ones(1, 4, 4), region) == pytest.approx(region.mean().item(), rel=1e-5)

    def test_rows_say_how_well_and_where(self, fitted):
        case = next(iter(BRAINS.cases("val")))
        (row,) = detection_rows(fitted, case)
        nets, given = fitted.nets.eval(), BRAINS.preparation.images(case)
        drawn = given[:, 1:]
        with torch.no_grad():
            found, view = TINY.found(nets, given).numpy(), TINY.view(nets, given)
            wanted = share_inside(activation(nets["average"].reader, view), drawn)
        assert row["area"] == pytest.approx(drawn.mean().item()) and row["outcome"] in (0, 1)
        assert row["inside"] == pytest.approx(wanted, abs=1e-4, nan_ok=True)
        truth = drawn.numpy() > 0.5
        assert row["lungs"] == pytest.approx(2 * np.sum(found & truth) / (found.sum() + truth.sum()))
        assert row["correct"] == float((row["score"] > 0.5) == row["outcome"])

    def test_an_unknown_outcome_has_no_row(self, fitted):
        case = next(iter(BRAINS.cases("val")))
        case.attributes["group"] = None
        assert detection_rows(fitted, case) == []
