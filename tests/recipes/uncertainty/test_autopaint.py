"""AutoPaint: what is hidden is painted from what surrounds it; what differs is found, painted over, and shown."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.methods import Batch, Moment
from medcook.recipes.uncertainty.autopaint import (
    Autoencoder,
    AutoPaint,
    HealthyTask,
    Reconstruction,
    anomaly_of,
    covered,
    find,
    holes,
    inside,
    paint,
    plant,
    repaint,
    smooth,
)

TINY = dict(channels=(4, 8))
NOW = Moment(5, 10)


class Surroundings(nn.Module):
    """Paints what is hidden with the mean of what it sees within `reach` pixels."""

    def __init__(self, reach: int = 8):
        super().__init__()
        self.reach = reach

    def forward(self, seen: Tensor) -> Tensor:
        def total(values: Tensor) -> Tensor:
            side = 2 * self.reach + 1
            return nn.functional.avg_pool2d(values, side, stride=1, padding=self.reach)

        return total(seen[:, :1]) / total(1 - seen[:, 1:]).clamp_min(1e-6)


def lesion(side: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    """A flat image with a bright square, the region in which to look, and the square: each (1, 1, side, side)."""
    image = torch.zeros(1, 1, side, side)
    image[..., 14:26, 14:26] = 2.0
    region = torch.zeros_like(image, dtype=torch.bool)
    region[..., 4:-4, 4:-4] = True
    return image, region, image > 0


@pytest.mark.component("inpainting of healthy anatomy")
class TestInpainting:
    def test_the_network_does_not_see_what_is_hidden(self):
        image, hidden = torch.randn(2, 1, 16, 16), torch.rand(2, 1, 16, 16) < 0.3
        other = torch.where(hidden, torch.randn_like(image), image)
        assert torch.equal(covered(image, hidden), covered(other, hidden))
        assert torch.equal(covered(image, hidden)[:, 1:].bool(), hidden)

    def test_only_what_is_hidden_is_painted(self):
        image, hidden = torch.randn(2, 1, 16, 16), torch.rand(2, 1, 16, 16) < 0.3
        painted = paint(Surroundings(), image, hidden)
        assert torch.equal(painted[~hidden], image[~hidden])
        assert (painted[hidden] - image[hidden]).abs().min() > 0

    def test_holes_lie_around_the_region(self):
        region = torch.zeros(4, 64, 64, dtype=torch.bool)
        region[:, 20:30, 40:50] = True
        found = holes(region, 6, (2.0, 5.0))[:, 0]
        near = torch.from_numpy(ndimage.distance_transform_cdt(~region[0].numpy(), "chessboard") <= 5)
        assert found.any(2).any(1).all() and not (found & ~near).any()
        assert found.float().mean() > 0.01

    def test_one_hole_is_an_ellipse_or_a_box_of_its_size(self):
        region = torch.zeros(200, 33, 33, dtype=torch.bool)
        region[:, 16, 16] = True
        areas = holes(region, 1, (6.0, 6.0)).sum((1, 2, 3))
        disc = sum(x * x + y * y <= 36 for x in range(-6, 7) for y in range(-6, 7))
        assert set(areas.tolist()) == {disc, 13 * 13}

    def test_without_a_region_there_are_holes_anywhere(self):
        assert holes(torch.zeros(2, 32, 32, dtype=torch.bool), 4, (2.0, 3.0)).any()

    def test_what_is_hidden_counts_six_times(self, monkeypatch):
        hidden = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
        hidden[..., :4] = True
        monkeypatch.setattr("medcook.recipes.uncertainty.autopaint.holes", lambda *_: hidden)
        images, labels = torch.randn(2, 1, 16, 16), torch.ones(2, 16, 16, dtype=torch.uint8)
        off = (images + torch.where(hidden, 0.5, 0.1)).detach()
        nets = {"model": lambda seen: off}
        loss = AutoPaint(**TINY).training_step(nets, Batch(images, labels), None, NOW)
        assert loss.item() == pytest.approx(6 * 0.5 + 0.1, abs=1e-5)


@pytest.mark.component("finding and painting over")
class TestFinding:
    def test_every_pixel_of_the_region_is_painted_once_without_being_seen(self):
        """A network that paints each hidden pixel 1 and shows no other: nothing of the region is left over."""
        image, region, _ = lesion()
        painted = repaint(lambda seen: torch.ones_like(seen[:, :1]), image, region, cell=5)
        assert (painted[region] == 1).all() and torch.equal(painted[~region], image[~region])

    def test_a_turn_hides_every_fourth_cell(self):
        image, seen = torch.zeros(1, 1, 16, 16), []

        def spy(given: Tensor) -> Tensor:
            seen.append(given[:, 1:])
            return given[:, :1]

        repaint(spy, image, torch.ones_like(image, dtype=torch.bool), cell=4)
        assert len(seen) == 4 and torch.equal(sum(seen), torch.ones_like(image))
        assert all(each.mean() == 0.25 and each[0, 0, 4:8, 4:8].unique().numel() == 1 for each in seen)

    def test_no_turn_sees_what_another_has_painted(self):
        def seven_or_fail(given: Tensor) -> Tensor:
            assert not (given[:, 0] == 7).any()
            return torch.full_like(given[:, :1], 7)

        image = torch.randn(1, 1, 16, 16)
        assert (repaint(seven_or_fail, image, torch.ones_like(image, dtype=torch.bool), cell=4) == 7).all()

    def test_the_largest_share_of_the_region_is_found(self):
        difference, region = torch.rand(3, 1, 32, 32), torch.ones(3, 1, 32, 32, dtype=torch.bool)
        region[0, :, :, 16:] = False
        difference[0, :, :, 16:] = 5.0
        found = find(difference, region, 0.02)
        assert not (found & ~region).any()
        for part, where, one in zip(difference, region, found, strict=True):
            values = part[where].numpy()
            core = (part >= np.sort(values)[-int(0.02 * len(values))]) & where
            near = ndimage.binary_dilation(core[0].numpy(), np.ones((5, 5))) & where[0].numpy()
            assert np.array_equal(one[0].numpy(), near)

    def test_what_is_abnormal_no_longer_paints_itself(self):
        """Painted in turns, the middle of a large lesion is painted by its rim; painted over first, it is not."""
        image, region, bright = lesion()
        settings = dict(**TINY, cell=4, window=3, share=0.15)
        nets = {"average": Surroundings(reach=6)}
        once = AutoPaint(**settings, rounds=0).healthy(nets, image, region)
        found = AutoPaint(**settings, rounds=3).healthy(nets, image, region)
        assert found[bright].mean() < 0.6 * once[bright].mean()

    def test_a_round_looks_for_differences_to_what_it_has_cleaned(self):
        image, region, bright = lesion()
        nets, settings = {"average": Surroundings(reach=6)}, dict(**TINY, cell=4, window=3, share=0.04)
        maps = [AutoPaint(**settings, rounds=k).anomaly(nets, image, region[:, 0]) for k in range(3)]
        means = [each[bright[:, 0]].mean().item() for each in maps]
        assert means[0] < means[1] < means[2]


@pytest.mark.component("segmenting the difference")
class TestDifference:
    def test_the_map_grows_with_the_difference_and_stays_in_the_region(self):
        image, region, bright = lesion()
        nets = {"average": lambda given: torch.zeros_like(given)}
        found = Reconstruction(**TINY, window=1).anomaly(nets, image, region[:, 0])
        assert torch.allclose(found[bright[:, 0]], 1 - torch.exp(torch.tensor(-2.0)))
        assert (found[~bright[:, 0]] == 0).all() and 0 <= found.min() <= found.max() <= 1

    def test_differences_are_averaged_within_the_region(self):
        values, region = torch.rand(1, 1, 12, 12), torch.rand(1, 1, 12, 12) < 0.6
        kernel = np.ones((3, 3))
        total = ndimage.convolve((values * region)[0, 0].double().numpy(), kernel, mode="constant")
        count = ndimage.convolve(region[0, 0].double().numpy(), kernel, mode="constant")
        wanted = np.where(region[0, 0].numpy(), total / np.maximum(count, 1), 0)
        assert np.allclose(smooth(values, region, 3)[0, 0].numpy(), wanted, atol=1e-5)

    def test_both_classes_are_predicted(self):
        method = AutoPaint(**TINY, cell=4)
        nets = method.build(inputs=1, classes=2, dims=2).eval()
        images = torch.randn(2, 1, 16, 16)
        found = method.predict(nets, images)
        assert torch.allclose(found.sum(1), torch.ones(2, 16, 16))
        whole = torch.ones(2, 16, 16, dtype=torch.bool)
        assert torch.equal(found[:, 1], method.anomaly(nets, images, whole))


class TestBaseline:
    def test_nothing_is_passed_across(self):
        """Two images with the same coarsest map are drawn the same, whatever their details."""
        net = Autoencoder(inputs=1, classes=1, channels=(4, 8), dims=2).eval()
        coarse = []
        net.down[1].register_forward_hook(lambda block, given, found: coarse.append(found) or torch.ones_like(found))
        one, two = net(torch.randn(1, 1, 16, 16)), net(torch.randn(1, 1, 16, 16))
        assert torch.equal(one, two) and not torch.equal(*coarse)

    def test_it_learns_to_redraw(self):
        method = Reconstruction(**TINY)
        nets = method.build(inputs=1, classes=2, dims=2)
        images = torch.randn(2, 1, 16, 16)
        loss = method.training_step(nets, Batch(images, torch.zeros(2, 16, 16, dtype=torch.uint8)), None, NOW)
        assert loss.item() == pytest.approx((nets["model"](images) - images).abs().mean().item(), rel=1e-4)


class TestTask:
    task = HealthyTask("embedded", keep=(("group", "control"),))

    def test_only_the_healthy_train_and_everybody_is_scored(self):
        groups = {role: {case.attributes["group"] for case in self.task.cases(role)} for role in ("labelled", "val")}
        assert groups == {"labelled": {"control"}, "val": {"control", "atrophy"}}

    def test_labels_are_the_region(self):
        assert inside(torch.tensor([0, 1, 3, IGNORE])).tolist() == [False, True, True, False]
        assert set(self.task.samples("val").labels.unique().tolist()) == {0, 1}


class TestScore:
    task = HealthyTask("embedded", keep=(("group", "control"),))

    def rows(self, group: str) -> dict:
        data = self.task.data
        ours = [p for p in (*data.split.train, *data.split.val) if data.attributes(p)["group"] == group]
        case = next(data.cases(ours[:1]))
        method = SimpleNamespace(anomaly=lambda nets, images, region: images[:, 0] * region)
        fitted = SimpleNamespace(task=self.task, method=method, nets=nn.ModuleDict(), weights={"last": {}})
        (row,) = anomaly_of(fitted, case)
        images, region = self.task.preparation.images(case), inside(self.task.preparation.labels(case))
        assert row["score"] == pytest.approx(images[:, 0][region].mean().item(), abs=1e-5)
        return row

    def test_the_ill_are_the_positives(self):
        assert self.rows("atrophy")["outcome"] == 1 and self.rows("control")["outcome"] == 0

    def test_a_planted_opacity_is_looked_for_in_the_healthy(self):
        assert np.isnan(self.rows("atrophy")["simulated"])
        found = self.rows("control")["simulated"]
        assert found > 0.5 and found == self.rows("control")["simulated"]

    def test_an_opacity_is_bright_and_in_the_region(self):
        images, region = torch.zeros(3, 1, 64, 64), torch.zeros(3, 64, 64, dtype=torch.bool)
        region[:, 20:40, 20:40] = True
        planted, where = plant(images, region, torch.Generator().manual_seed(0))
        assert not (where & ~region).any() and (where.flatten(1).sum(1) > 20).all()
        assert (planted[:, 0][~where] == 0).all() and planted[:, 0][where].mean() > 0.2
