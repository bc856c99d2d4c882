"""The published setting: what the official scripts use, and that it can be made in slices like everything else."""

from dataclasses import replace

import pytest
import torch

from medcook import training
from medcook.data import Case
from medcook.data.transforms import NONE
from medcook.errors import Paused
from medcook.methods import Moment
from medcook.recipes.semi_supervised._published import REFLECTIONS, ReflectOrTilt, WholeSlices
from medcook.recipes.semi_supervised.bcp import recipe
from medcook.tasks import Budget, Task


def test_bcp_runs_as_published():
    for arm in recipe.arms:
        method, task, budget, _ = recipe.run("paper", arm, 1)
        assert task.labelled == 7 and task.draw == 1 and task.evaluation == "test" and task.dataset == "acdc"
        assert task.preparation.size == (256, 256) and task.describe()["kind"] == "WholeSlices"
        assert (budget.steps, budget.batch) == (40_000, 12) and method.start * budget.steps == 10_000
        assert method.channels == (16, 32, 64, 128, 256) and method.average == 0.99
        optimiser, schedule = method.optimise([torch.nn.Parameter(torch.ones(3))], budget.steps)
        (group,) = optimiser.param_groups
        assert type(optimiser) is torch.optim.SGD and group["momentum"] == 0.9 and group["weight_decay"] == 1e-4
        for _ in range(8):
            assert group["lr"] == 0.01
            optimiser.step()
            schedule.step()


def test_the_ablation_takes_copy_paste_alone():
    one, other = (recipe.method("paper", arm) for arm in recipe.ablation)
    assert one.mix and other == replace(one, mix=False)
    assert one.rising(Moment(9_999, 40_000)) == 0 and one.rising(Moment(10_000, 40_000)) == 1


@pytest.mark.parametrize("shape", [(3, 100, 160), (2, 300, 256)])
def test_a_whole_slice_comes_in_and_goes_back(shape):
    label = torch.zeros(shape, dtype=torch.uint8)
    label[:, 20:50, 30:90] = 1
    case = Case(label[None].float().numpy(), label.numpy(), "a-1", "a")
    preparation = WholeSlices("acdc").preparation
    assert preparation.images(case).shape == (shape[0], 1, 256, 256)
    prepared = torch.nn.functional.one_hot(preparation.labels(case).long(), 2).movedim(-1, 1).float()
    back = preparation.restore(prepared, case).argmax(0)
    assert back.shape == shape and (back == label).float().mean() > 0.99


def test_half_are_reflected_a_quarter_tilted_the_rest_left_alone():
    maps = ReflectOrTilt().affine(4000, 2, torch.Generator().manual_seed(0))
    linear, still = maps[:, :, :2], torch.eye(2)
    reflected = torch.linalg.det(linear) < 0
    left = (linear == still).all((1, 2))
    tilted = linear[~reflected & ~left]
    angle = torch.atan2(tilted[:, 1, 0], tilted[:, 0, 0]).rad2deg()
    assert reflected.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert left.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert 19 < angle.abs().max() <= 20.001 and angle.abs().min() < 0.5 and (maps[:, :, 2] == 0).all()


def test_a_reflection_moves_pixels_and_labels_alike_and_changes_no_value(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.full(size, 0.1))
    labels = torch.randint(0, 4, (32, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    rng = torch.Generator().manual_seed(1)
    with monkeypatch.context() as patch:
        patch.setattr(ReflectOrTilt, "intensity", lambda self, images, rng: images)
        images, moved = ReflectOrTilt()(labels[:, None].float(), labels, rng)
    assert torch.allclose(images[:, 0], moved.float(), atol=1e-3)
    turned = [torch.rot90(labels, k, (1, 2)).flip(axis) for k in range(4) for axis in (1, 2)]
    matches = torch.stack([(moved == other).flatten(1).all(1) for other in turned])
    assert matches.any(0).all() and matches.any(1).all()  # each image one of them, each of them seen
    assert len(REFLECTIONS) == 4 and not (moved == labels).flatten(1).all(1).any()


def test_grey_values_stay():
    images = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    still = replace(ReflectOrTilt(), rotate=0)
    assert torch.allclose(still.intensity(images, torch.Generator()), NONE.intensity(images, torch.Generator()))


def test_it_can_be_made_in_slices(tmp_path, monkeypatch):
    """With the momentum of the steps before, the weights after the last one are the same bits."""
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path))
    monkeypatch.setattr(training, "behaviour", lambda method: {})
    method = replace(recipe.run("paper", "bcp", 0)[0], channels=(4, 8))
    what = method, Task("embedded", labelled=2), Budget(steps=4, batch=2, precision="float32", checks=0)
    whole = training.fit(*what, cache=False, progress=False)
    for step in (1, 2, 3):
        with pytest.raises(Paused, match=f"step {step} of 4"):
            training.fit(*what, progress=False, deadline=0.0)
    found = training.fit(*what, progress=False, deadline=0.0)
    for name, weights in whole.weights["last"].items():
        assert torch.equal(found.weights["last"][name], weights), name
