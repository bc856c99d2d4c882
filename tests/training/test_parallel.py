"""Two processes of a CPU train what one trains, pause and resume together, and tell users what is wrong."""

import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from lightning_fabric import Fabric
from tiny import BUDGET, TASK
from torch import nn

from medcook import training
from medcook.errors import MedcookError, Paused
from medcook.methods import Batch, Supervised
from medcook.parallel import Alone, average_gradients, share
from medcook.runs import RunFolder
from medcook.tasks import Budget
from medcook.training import Loop

STEPS: Budget = replace(BUDGET, steps=6, checks=1)


@dataclass
class Plain(Supervised):
    """Without batch normalisation, which on CPUs sees only a process's share of a batch."""

    loss: str = "cross-entropy"

    def build(self, inputs, classes, dims):
        model = nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, classes, 1))
        average = nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, classes, 1))
        average.load_state_dict(model.state_dict())
        return nn.ModuleDict({"model": model, "average": average.requires_grad_(False)})


def loop(devices: int, budget: Budget = STEPS, deadline: float | None = None) -> Loop:
    labelled, val = TASK.samples("labelled"), TASK.samples("val")
    return Loop(Plain(), TASK, budget, "float32", 0, labelled, None, val, False, deadline, "cpu", devices)


class Two:
    """What `share` and `average_gradients` ask of Fabric, in the second of two processes, the first one's at hand."""

    world_size, global_rank, device = 2, 1, torch.device("cpu")

    def __init__(self, other: torch.Tensor | None = None):
        self.other = other

    def all_reduce(self, mine, reduce_op):
        assert reduce_op == "mean"
        return (mine + self.other) / 2


def test_two_processes_train_what_one_trains():
    one, two = loop(1).run(), loop(2).run()
    for name, weight in one.weights["last"].items():
        assert torch.allclose(weight, two.weights["last"][name], atol=1e-5), name
    moved = [weight - start for weight, start in zip(one.weights["last"].values(), start_weights(), strict=True)]
    assert max(change.abs().max() for change in moved) > 1e-3
    assert one.history["val_dice"] == pytest.approx(two.history["val_dice"], abs=1e-3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_one_device_trains_the_same_without_fabric_as_with_it(precision):
    alone = loop(1).train_on(Alone("cpu", precision), None)
    fabric = loop(1).train_on(Fabric(accelerator="cpu", devices=1, precision=precision), None)
    assert all(torch.equal(weight, fabric.weights["last"][name]) for name, weight in alone.weights["last"].items())
    assert alone.history == fabric.history


def test_fabric_is_loaded_for_several_devices_only():
    asked = "import sys, medcook.training; print('lightning_fabric' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", asked], text=True).strip() == "False"


def start_weights() -> list[torch.Tensor]:
    return list(loop(1).build().state_dict().values())


def test_paused_in_two_processes_it_goes_on_in_one(tmp_path):
    folder = RunFolder("0123456789abcdef")
    with folder.lock(), pytest.raises(Paused) as pause:
        loop(2, deadline=0.0).run(folder)
    assert (pause.value.step, folder.checkpoint()["state"]["step"]) == (1, 1)
    resumed, whole = loop(1).run(folder), loop(1).run()
    for name, weight in whole.weights["last"].items():
        assert torch.allclose(weight, resumed.weights["last"][name], atol=1e-5), name


def test_a_share_is_this_process_s_part():
    batch = Batch(torch.arange(8.0).view(4, 2), torch.arange(4), index=torch.arange(4))
    mine = share(batch, Two())
    assert mine.labels.tolist() == mine.index.tolist() == [2, 3] and mine.images.tolist() == [[4, 5], [6, 7]]
    assert mine.raters is None


def test_gradients_become_their_mean():
    used, by_other, by_none = (torch.zeros(2, requires_grad=True) for _ in range(3))
    used.grad = torch.tensor([1.0, 3.0])
    average_gradients([used, by_other, by_none], Two(torch.tensor([1.0, 1, 0, 3, 5, 2, 4, 0, 0])))
    assert used.grad.tolist() == [2, 4] and by_other.grad.tolist() == [1, 2] and by_none.grad is None


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(MedcookError, match="batch of 4 can't be shared by 3 devices"):
        loop(3).run()


def test_more_gpus_than_there_are_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(MedcookError, match="fewer GPUs than 2"):
        replace(loop(2), accelerator="auto").run()


def test_errors_for_users_come_from_the_processes(monkeypatch):
    broken = loop(2)
    broken.train.images[:] = torch.nan
    with pytest.raises(MedcookError, match="The loss became nan"):
        broken.run()


def test_fit_hands_on_the_number_of_devices(monkeypatch):
    seen = []
    monkeypatch.setattr(training.parallel, "launch", lambda loop, precision, folder: seen.append(loop.devices))
    monkeypatch.setattr(training, "behaviour", lambda method: {"loss": 1.0})
    training.fit(Plain(), TASK, STEPS, cache=False, progress=False, devices=2)
    assert seen == [2]
