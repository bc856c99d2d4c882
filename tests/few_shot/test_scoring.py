"""Volume Dice of novel structures: whose slices answer whom, and what is cached."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from medcook import metrics
from medcook.few_shot import FewShot, FewShotTask, PrototypeNetwork, Shots, novel_dice
from medcook.few_shot.scoring import answers
from medcook.tasks import Budget
from medcook.training import Loop

TASK = FewShotTask("embedded", novel=(3,), supports=2, labelled=4)


def fitted(method: FewShot, task: FewShotTask = TASK):
    budget = Budget(1, batch=4, precision="float32", checks=0)
    return Loop(method, task, budget, "float32", 0, task.samples("labelled"), None, None, progress=False).run()


@dataclass
class Oracle(FewShot):
    """Finds what is as bright as it is told: its maps are the images."""

    channels: tuple[int, ...] = (2, 2, 2, 2)
    adapts: bool = False

    def segment(self, net, support: Shots, query: Shots):
        self.__dict__.setdefault("seen", []).append((len(support.masks), len(query.images)))
        return (query.images[:, 0] < 0).float()

    def logits(self, net, support, query):
        return query.maps[:, :2]

    def adapt(self, net, supports):
        self.__dict__["adapted"] = self.__dict__.get("adapted", 0) + 1
        return net


def test_a_row_is_the_volume_dice_with_one_support():
    method = Oracle()
    run, case = fitted(method), TASK.data.load(TASK.val_patients[0])
    rows = novel_dice(run, case)
    assert [row["support"] for row in rows] == [0.0, 1.0]
    assert [row["group"] for row in rows] == [TASK.support_cases(k, 3)[0].patient_id for k in range(2)]
    images = TASK.preparation.images(case)
    truth = case.label == 3
    shown = np.flatnonzero(truth.any((1, 2)))
    dark = (images[:, 0] < 0).numpy()
    dark[: shown[0]] = dark[shown[-1] + 1 :] = False
    for row in rows:
        assert row["structure"] == "ventricles" and row["missed"] is False
        assert row["dice"] == pytest.approx(metrics.dice(dark, truth), abs=1e-6)


def test_every_slice_of_the_extent_is_asked_once_for_each_support():
    method = Oracle()
    run, case = fitted(method), TASK.data.load(TASK.val_patients[0])
    method.__dict__["seen"] = []
    novel_dice(run, case)
    shown = np.flatnonzero((case.label == 3).any((1, 2)))
    assert sum(queries for _, queries in method.seen) == 2 * (shown[-1] - shown[0] + 1)
    assert all(shots == 1 for shots, _ in method.seen)


def test_a_support_is_prepared_once_for_all_cases():
    method = Oracle()
    run = fitted(method)
    for patient in TASK.val_patients[:2]:
        novel_dice(run, TASK.data.load(patient))
    assert method.adapted == 2


def test_the_average_network_of_the_last_step_answers():
    run, case = fitted(PrototypeNetwork(channels=(4, 4, 8, 8))), TASK.data.load(TASK.val_patients[0])
    first = [row["dice"] for row in novel_dice(run, case)]
    with torch.no_grad():
        for parameter in run.nets.parameters():
            parameter.mul_(0)
    assert [row["dice"] for row in novel_dice(run, case)] == first


def test_masks_are_on_the_grid_of_the_case():
    task = FewShotTask("embedded", novel=(1, 3), supports=1, labelled=4)
    run, case = fitted(PrototypeNetwork(channels=(4, 4, 8, 8)), task), task.data.load(task.val_patients[0])
    found = list(answers(run, case))
    assert [name for name, *_ in found] == ["grey matter", "ventricles"]
    assert all(mask.shape == truth.shape == case.label.shape for *_, mask, truth in found)
