"""The loop: same seed, same bits; interrupted or killed, it ends the same; trained once, and anew when changed."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from tiny import BEHAVIOUR, BUDGET, METHOD, SHORT, TASK, train

from medcook import tasks, training
from medcook.data import splits
from medcook.data.datasets import Dataset
from medcook.errors import MedcookError, Paused
from medcook.methods import Method, Supervised
from medcook.runs import RunFolder
from medcook.training import fit

ELSEWHERE = f"""
import sys, torch
from pathlib import Path
from medcook import training
from medcook.methods import Supervised
from medcook.runs import RunFolder
from medcook.tasks import Budget, Task
METHOD, TASK, BUDGET = Supervised(channels=(4, 8)), {TASK!r}, {BUDGET!r}
training.behaviour, training.SHORT_RUN = lambda method: {BEHAVIOUR!r}, 0
"""
"""The same method, task and budget in another process."""


def elsewhere(code: str) -> subprocess.Popen:
    """Run code in another process, after the lines of ELSEWHERE."""
    return subprocess.Popen([sys.executable, "-c", ELSEWHERE + code], env=os.environ.copy())


def same(one: dict[str, dict], other: dict[str, dict]) -> bool:
    """Whether two sets of weights are equal, bit by bit."""
    return one.keys() == other.keys() and all(
        one[kept].keys() == other[kept].keys() and all(torch.equal(one[kept][n], other[kept][n]) for n in one[kept])
        for kept in one
    )


def stop_at(step: int, stop, monkeypatch) -> list[int]:
    """Call `stop` in the training step of this number; the list returned grows by each step done."""
    done: list[int] = []

    def training_step(self, nets, labelled, unlabelled, now):
        if now.step == step:
            stop()
        done.append(now.step)
        return Method.training_step(self, nets, labelled, unlabelled, now)

    monkeypatch.setattr(Supervised, "training_step", training_step)
    return done


def interrupt():
    raise KeyboardInterrupt


def test_the_loss_goes_down(reference):
    losses = reference.history["loss"]
    assert len(losses) == BUDGET.steps and sum(losses[-3:]) < sum(losses[:3]) - 0.3


def test_same_seed_same_bits_in_another_process(reference, tmp_path):
    path = tmp_path / "weights.pt"
    code = f"torch.save(training.fit(METHOD, TASK, BUDGET, cache=False, progress=False).weights, {str(path)!r})"
    assert elsewhere(code).wait() == 0
    assert same(torch.load(path, weights_only=True), reference.weights)


def test_another_seed_is_another_run(reference):
    other = fit(METHOD, TASK, BUDGET, 1, cache=False, progress=False)
    assert not same(other.weights, reference.weights) and other.history["loss"][0] != reference.history["loss"][0]


def test_training_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    train()
    assert torch.equal(torch.get_rng_state(), before)


def test_an_interrupted_run_ends_the_same(reference, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    with monkeypatch.context() as patched:
        stop_at(7, interrupt, patched)
        with pytest.raises(KeyboardInterrupt):
            train(budget=BUDGET)
    done = stop_at(-1, interrupt, monkeypatch)
    resumed = train(budget=BUDGET)
    assert done == [7, 8, 9, 10, 11] and not resumed.cached
    assert same(resumed.weights, reference.weights) and resumed.history == reference.history
    assert resumed.weights.keys() == {"last", "selected"}


def in_slices(**changes) -> tuple[training.Fitted, list[int]]:
    """A run that is paused after every step and taken up again, and the steps at which it paused."""
    paused = []
    while True:
        try:
            return train(**changes, deadline=0.0), paused
        except Paused as pause:
            paused.append(pause.step)


def test_a_run_in_slices_ends_the_same(reference):
    fitted, paused = in_slices(budget=BUDGET)
    assert paused == list(range(1, 12)) and not fitted.cached
    assert same(fitted.weights, reference.weights) and fitted.history == reference.history
    assert not (RunFolder(fitted.key).path / "checkpoint.pt").exists()


def test_before_the_deadline_nothing_pauses():
    assert not train(deadline=time.monotonic() + 3600).cached
    fit(METHOD, TASK, SHORT, cache=False, progress=False, deadline=0.0)  # without a folder there is no state to save


def test_a_killed_run_ends_the_same(reference, monkeypatch):
    killed = elsewhere(
        """
import os, signal
training.CHECKPOINT_SECONDS = 0
class Loop(training.Loop):
    def batches(self, step, rng, fabric):
        if step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batches(step, rng, fabric)
training.Loop = Loop
training.fit(METHOD, TASK, BUDGET, progress=False)
"""
    )
    assert killed.wait() == -signal.SIGKILL
    done = stop_at(-1, interrupt, monkeypatch)
    resumed = train(budget=BUDGET)
    assert done == [7, 8, 9, 10, 11]
    assert same(resumed.weights, reference.weights) and resumed.history == reference.history


def test_a_finished_run_is_read_not_repeated(monkeypatch):
    first = train()
    done = stop_at(-1, interrupt, monkeypatch)
    again = train()
    case = next(TASK.cases("val"))
    assert again.cached and not first.cached and not done and again.key == first.key
    assert again.history == first.history and again.cost == first.cost
    assert torch.equal(again.probabilities(case), first.probabilities(case))
    assert (again.predict(case) == first.predict(case)).all()


def test_the_networks_of_a_run_that_is_read_are_the_trained_ones():
    first, again = train(), train()
    assert again.cached and same({"last": again.nets.state_dict()}, {"last": first.nets.state_dict()})


CHANGES = {
    "seed": dict(seed=1),
    "setting": dict(method=replace(METHOD, rate=1e-3)),
    "nested setting": dict(method=replace(METHOD, augmentation=replace(METHOD.augmentation, noise=0.2))),
    "steps": dict(budget=replace(SHORT, steps=4)),
    "precision": dict(budget=replace(SHORT, precision="bfloat16")),
    "draw": dict(task=replace(TASK, draw=1)),
    "evaluation": dict(task=replace(TASK, evaluation="val")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_input_trains_again(change):
    first, other = train(), train(**change)
    assert not other.cached and other.key != first.key


def test_a_changed_behaviour_trains_again(monkeypatch):
    first = train()
    monkeypatch.setattr(training, "behaviour", lambda method: {"loss": 1.001})
    other = train()
    assert not other.cached and other.key != first.key


def test_a_short_run_goes_by_its_source_code_instead(monkeypatch):
    def behaviour(method):
        raise AssertionError("to find this out takes as long as the run")

    monkeypatch.setattr(training, "SHORT_RUN", SHORT.steps)
    monkeypatch.setattr(training, "behaviour", behaviour)
    first = train()
    assert train().cached
    monkeypatch.setattr(training, "source_hash", lambda kind: "another state of the source")
    other = train()
    assert not other.cached and other.key != first.key


@pytest.mark.parametrize("role", ["labelled", "val"])
def test_a_changed_voxel_trains_again(role, monkeypatch):
    first = train()
    original, touched = tasks.Prepared.__call__, TASK.data.patients[getattr(TASK, f"{role}_patients")[0]][0]

    def prepared(self, case_id):
        images, labels = original(self, case_id)
        if case_id == touched:
            images = images.clone()
            images[0, 0, 0, 0] += 1e-3
        return images, labels

    monkeypatch.setattr(tasks.Prepared, "__call__", prepared)
    other = train()
    assert not other.cached and other.key != first.key


def test_damaged_weights_are_trained_again():
    first = train()
    path = RunFolder(first.key).path / "weights.pt"
    path.write_bytes(path.read_bytes()[:100])
    again = train()
    assert not again.cached and same(again.weights, first.weights)
    assert train().cached


def test_two_processes_train_once(tmp_path, monkeypatch):
    """While this process trains, another asks for the same run: it waits at the lock and reads the result."""
    waiting, answer = tmp_path / "waiting", tmp_path / "answer"
    others = []

    def start_another():
        others.append(
            elsewhere(
                f"""
lock = RunFolder.lock
RunFolder.lock = lambda folder: Path({str(waiting)!r}).touch() or lock(folder)
fitted = training.fit(METHOD, TASK, BUDGET, progress=False)
Path({str(answer)!r}).write_text(str(fitted.cached))
"""
            )
        )
        while not waiting.exists() and others[0].poll() is None:
            time.sleep(0.05)
        time.sleep(0.5)  # it must not have gone past the lock

    stop_at(5, start_another, monkeypatch)
    assert not train(budget=BUDGET).cached
    assert others[0].wait() == 0 and answer.read_text() == "True"


def test_val_selects_the_best_look(monkeypatch):
    seen = []

    def scripted(method, nets, val):
        seen.append(training.cpu_state(nets))
        return [0.2, 0.9, 0.5][len(seen) - 1]

    monkeypatch.setattr(training, "validation_dice", scripted)
    fitted = train(budget=BUDGET)
    assert fitted.history["val_dice"] == [0.2, 0.9, 0.5] and fitted.history["val_step"] == [4, 8, 12]
    assert same(fitted.weights, {"last": seen[2], "selected": seen[1]})
    assert not same({"last": seen[2]}, {"last": seen[1]})


def test_nothing_is_selected_on_the_patients_that_are_scored():
    fitted = train(task=replace(TASK, evaluation="val"), budget=replace(SHORT, checks=1))
    assert fitted.weights.keys() == {"last"} and len(fitted.history["val_dice"]) == 1
    with pytest.raises(MedcookError, match="kept no 'selected' checkpoint"):
        fitted.predict(next(TASK.cases("val")), checkpoint="selected")


def test_the_checkpoint_asked_for_predicts(reference):
    case = next(TASK.cases("val"))
    empty = {name: torch.zeros_like(weights) for name, weights in reference.weights["last"].items()}
    fitted = replace(reference, weights={"last": reference.weights["last"], "selected": empty})
    last, selected = fitted.probabilities(case), fitted.probabilities(case, checkpoint="selected")
    assert torch.allclose(selected, torch.full_like(selected, 0.25)) and not torch.allclose(last, selected)
    assert torch.equal(fitted.probabilities(case), last)


def test_training_never_reads_a_test_patient(monkeypatch):
    tasks.shared_dataset.cache_clear()  # so that every case is read anew
    read, original = [], Dataset.load
    monkeypatch.setattr(Dataset, "load", lambda self, case_id: read.append(case_id) or original(self, case_id))
    log = len(splits._reads)
    train(budget=replace(SHORT, checks=1))
    assert set(read) == {*TASK.labelled_patients, *TASK.val_patients} and not set(read) & set(TASK.data.split.test)
    assert len(splits._reads) == log


def test_predictions_are_on_the_cases_own_grid(reference):
    case = next(TASK.cases("val"))
    probabilities = reference.probabilities(case)
    assert probabilities.shape == (4, *case.spatial) and reference.predict(case).dtype == case.label.dtype
    assert torch.allclose(probabilities.sum(0), torch.ones(case.spatial), atol=1e-4)
    assert (reference.predict(case) == probabilities.argmax(0).numpy()).all()
