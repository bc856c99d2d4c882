"""The race: what a coarse start sees, and how its times are compared."""

import pytest
import torch
from torch import nn

from benchmarks.race import SCHEDULES, CoarseFirst, report, times_faster
from medcook.methods import Batch, Moment
from medcook.networks import UNet
from medcook.recipes import find_recipe


class Watching(nn.Module):
    """Notes the shape of what it is given."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = UNet(classes=2, channels=(4, 4)), []

    def forward(self, images):
        self.seen.append(tuple(images.shape))
        return self.net(images)


def test_a_coarse_start_sees_half_the_resolution_then_fewer_whole_images():
    nets = nn.ModuleDict({"model": Watching()})
    batch = Batch(torch.randn(8, 1, 16, 16), torch.randint(0, 2, (8, 16, 16), dtype=torch.uint8))
    for step in (0, 6, 7, 9):
        assert CoarseFirst().training_step(nets, batch, None, Moment(step, 10)).isfinite()
    assert nets["model"].seen == [(8, 1, 8, 8)] * 2 + [(4, 1, 16, 16)] * 2


def test_labels_shrink_where_images_do():
    labels = torch.zeros(2, 16, 16, dtype=torch.uint8)
    labels[:, 4:12, 4:12] = 1
    images = labels[:, None].float()
    nets = nn.ModuleDict({"model": Sharp()})
    loss = CoarseFirst(loss="both").training_step(nets, Batch(images, labels), None, Moment(0, 10))
    assert loss < 1e-3


class Sharp(nn.Module):
    """Logits that say what the image says."""

    def forward(self, images):
        return torch.cat([20 - 40 * images, 40 * images - 20], dim=1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_the_books_network_with_other_settings(schedule):
    budget, differently = SCHEDULES[schedule]
    method, book = CoarseFirst(**differently), find_recipe("unet-acdc").method("full", "unet")
    assert (method.network, method.channels, method.loss) == (book.network, book.channels, book.loss)
    assert method.fine <= budget.batch and budget.steps < find_recipe("unet-acdc").scales["full"].budget.steps


def runs(*seconds, limit=400):
    return {str(k): {"reached": {"0.80": taken, "0.85": None, "0.90": None}, "best": 0.8, "seconds": limit}
            for k, taken in enumerate(seconds)}  # fmt: skip


def test_times_are_compared_by_their_means_and_misses_are_said():
    assert times_faster(runs(100, 140), runs(20, 28), "0.80") == "5.0"
    assert times_faster(runs(100, None), runs(50), "0.80") == "more than 5.0"
    assert times_faster(runs(100), runs(50, None), "0.80") == "not reached"


def test_the_report_has_a_number_a_seed():
    machine = {"threads": 2, "cores": 2, "cpu": "a processor"}
    results = {"tutorial": runs(100, None), "medcook, float32": runs(50, 60)}
    assert "load not noted" in report({"machine": machine, "results": results})
    results["tutorial"]["0"]["load_before"], results["tutorial"]["1"]["load_before"] = 0.1, 1.2
    text = report({"machine": machine, "results": results})
    assert "load before a run: 0.1 to 1.2; of 2 older runs it was not noted" in text
    assert "| tutorial | 100, not in 400 |" in text and "| medcook, float32 | 50, 60 |" in text
    assert "more than 4.5" in text
