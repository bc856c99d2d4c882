"""How long `paper` would take without a GPU: timed on noise, said in one sentence, and nothing started."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import METHOD
from typer.testing import CliRunner

from medcook import cli, estimates, evidence, paths
from medcook.data.datasets import Dataset
from medcook.methods import MeanTeacher
from medcook.recipes.recipe import Arm, Recipe, Scale
from medcook.tasks import Budget, Task

TASK = Task("acdc", labelled=3)
STEPS = Budget(steps=1000, batch=8, precision="float32")
RECIPE = Recipe(
    paper="leakage",
    title="T",
    claim="C.",
    arms={"slow": Arm(METHOD), "fast": Arm(replace(METHOD, rate=1e-4))},
    scales={name: Scale(TASK, STEPS, replicates=2) for name in ("full", "paper")},
)


@pytest.fixture
def without_gpu(monkeypatch, tmp_path):
    """A machine without a GPU or evidence, on which a step takes a minute, of the fast arm half of one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(paths, "EVIDENCE", tmp_path)
    monkeypatch.setattr(estimates, "step_seconds", lambda method, *_: 60.0 if method == METHOD else 30.0)
    monkeypatch.setattr("medcook.recipes.find_recipe", lambda paper: RECIPE)
    started = []
    monkeypatch.setattr(evidence, "reproduce", lambda *what, **how: started.append(what[1:]))
    monkeypatch.setattr("medcook.cli.reproduce.print_summary", lambda *_: None)
    return started


def call(*options: str):
    return CliRunner().invoke(cli.app, ["reproduce", "leakage", *options])


def test_a_step_is_timed_without_reading_data(monkeypatch):
    monkeypatch.setattr(Dataset, "load", lambda *_: pytest.fail("a case was read"))
    before = torch.get_rng_state()
    monkeypatch.setattr(estimates.Loop, "run", timed := counted(estimates.Loop.run))
    method = MeanTeacher(channels=(4, 8))
    seconds = estimates.step_seconds(method, TASK, STEPS)
    (loop, fitted), grid = timed.calls[0], (128, 128)
    assert loop.train.images.shape == (2, 1, *grid) and loop.extra is not None
    assert loop.train.labels.max() < TASK.classes and loop.train.labels.shape == (2, *grid)
    assert seconds == pytest.approx(fitted.cost["seconds"] / 4 * (8 / 2))
    assert torch.equal(torch.get_rng_state(), before)


def counted(original):
    def run(self):
        run.calls.append((self, original(self)))
        return run.calls[-1][1]

    run.calls = []
    return run


def test_without_a_gpu_paper_says_how_long_it_would_take(without_gpu):
    result = call("--profile", "paper")
    assert result.exit_code == 1 and without_gpu == []
    said = result.stderr[result.stderr.index("medcook: ") :]
    # 2 replicates x 1000 steps x (60 + 30) seconds
    assert said == (
        "medcook: Without a CUDA GPU, 4 runs of 1000 steps would take about 2 days on this machine. "
        "`--profile full` is made for such a one; `--anyway` starts all the same.\n"
    )


def test_it_says_how_long_full_took(without_gpu, monkeypatch):
    arms = {name: SimpleNamespace(cost={"seconds": seconds}) for name, seconds in (("slow", 100), ("fast", 80))}
    summary = SimpleNamespace(arms=arms, seeds=[0, 1, 2])
    monkeypatch.setattr(evidence, "load_summary", lambda paper, profile: summary)
    assert "such a one (its 6 runs took 9 minutes);" in call("--profile", "paper").stderr


def test_anyway_starts_it(without_gpu):
    assert call("--profile", "paper", "--anyway").exit_code == 0 and without_gpu == [("paper", None)]


def test_other_profiles_start_at_once(without_gpu):
    assert call("--profile", "full").exit_code == 0 and without_gpu == [("full", None)]


def test_with_cuda_paper_starts_at_once(without_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(estimates, "step_seconds", lambda *_: pytest.fail("timed"))
    assert call("--profile", "paper").exit_code == 0 and without_gpu == [("paper", None)]


def test_what_is_there_already_is_shown(without_gpu, monkeypatch):
    monkeypatch.setattr(evidence, "unfinished", lambda *_: [])
    assert call("--profile", "paper").exit_code == 0 and without_gpu == [("paper", None)]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(5, "1 minute"), (1200, "20 minutes"), (5400, "2 hours"), (86400, "24 hours"), (1e6, "12 days")],
)
def test_durations_come_in_the_unit_that_suits(seconds, said):
    assert estimates.duration(seconds) == said
