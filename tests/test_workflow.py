"""The runs as a graph: what is planned, and that Snakemake does it, goes on after a kill and repeats nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

import pytest
from typer.testing import CliRunner

from medcook import cli, evidence, workflow
from medcook.errors import MedcookError
from medcook.paths import ROOT

WORKER = """
import pathlib, sys, time
paper, arguments = sys.argv[1], sys.argv[2:]
log = pathlib.Path({log!r})
arm = arguments[arguments.index("--arm") + 1] if "--arm" in arguments else "summary"
with open(log, "a") as file:
    file.write(f"{{paper}} {{arm}}\\n")
if arm == "bad":
    sys.exit("no")
while arm == "stuck" and not log.with_name("go on").exists():
    time.sleep(0.1)
"""


@dataclass
class ToyRecipe:
    paper: str
    scales: dict = field(default_factory=lambda: {"full": None})


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder for plans; `current` holds the papers whose runs are all there, and summaries of `summaries`."""
    current, summaries = set(), set()
    runs = [("the method", 0), ("base", 0)]
    monkeypatch.setattr(workflow, "plan_folder", lambda profile: tmp_path / profile)
    monkeypatch.setattr(evidence, "unfinished", lambda recipe, *_: [] if recipe.paper in current else runs)
    monkeypatch.setattr(evidence, "load_summary", lambda paper, _: paper if paper in summaries else None)
    return current, summaries


def planned(*papers: str) -> dict:
    path = workflow.make_plan({paper: ToyRecipe(paper) for paper in papers}, "full")
    return json.loads(path.read_text())["runs"]


def test_every_run_without_a_record_is_planned(world):
    assert planned("a") == {"a": {"the_method-0": ["the method", 0], "base-0": ["base", 0]}}


def test_what_is_current_and_judged_is_left_out(world):
    current, summaries = world
    current |= {"a", "b"}
    summaries |= {"a", "c"}
    assert set(planned("a", "b", "c")) == {"b", "c"}


def test_a_paper_whose_plan_was_cut_off_before_judging_is_judged(world, tmp_path):
    current, summaries = world
    current.add("a")
    summaries.add("a")
    (tmp_path / "full" / "a").mkdir(parents=True)
    assert planned("a") == {"a": {}}
    (tmp_path / "full" / "a" / "summary.done").touch()
    assert planned("a") == {}


def test_marks_of_an_earlier_plan_do_not_count(world, tmp_path):
    mark = tmp_path / "full" / "a" / "base-0.run.done"
    mark.parent.mkdir(parents=True)
    mark.touch()
    planned("a")
    assert not mark.exists()


def test_a_recipe_without_the_profile_is_left_out(world):
    assert workflow.make_plan({"a": ToyRecipe("a", {"quick": None})}, "full").read_text().count('"a"') == 0


def test_an_unknown_cluster_names_those_there_are(tmp_path):
    with pytest.raises(MedcookError, match="no Snakemake profile 'moon'. There is: local, slurm"):
        workflow.command(tmp_path / "plan.json", 2, "moon")


def test_without_snakemake_it_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(workflow.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MedcookError, match="Snakemake is not installed"):
        workflow.start(tmp_path / "plan.json", 2)


def call(*arguments: str):
    return CliRunner().invoke(cli.app, ["reproduce", *arguments], env={"NO_COLOR": "1", "TERM": "dumb"})


@pytest.mark.parametrize("arguments", [[], ["bcp", "--all"]])
def test_one_paper_or_all(arguments):
    result = call(*arguments)
    assert result.exit_code == 1 and "Name one paper, or take --all." in result.stderr


def test_one_run_alone_is_asked_for_by_arm_and_replicate(monkeypatch):
    asked = []
    monkeypatch.setattr(evidence, "_run", lambda recipe, *what: asked.append((recipe.paper, *what[:3])))
    assert call("labels", "--profile", "full", "--arm", "all labels", "--replicate", "2").exit_code == 1
    from medcook.recipes import find_recipe

    arm = find_recipe("labels").arms_at("full")[0]
    assert call("labels", "--profile", "full", "--arm", arm, "--replicate", "2").exit_code == 0
    assert asked == [("labels", "full", arm, 2)]


def test_the_command_plans_and_starts(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(workflow, "make_plan", lambda recipes, *what: seen.append((len(recipes) > 9, what)) or tmp_path)
    monkeypatch.setattr(workflow, "start", lambda *what: seen.append(what))
    result = call("--all", "--profile", "full", "--engine", "snakemake", "--cores", "3", "--cluster", "slurm")
    assert result.exit_code == 0
    assert seen == [(True, ("full", None, "")), (tmp_path, 3, "slurm")]


@pytest.fixture
def plan(tmp_path):
    """(the plan of three runs of a worker that logs what it was asked and gets stuck in one, its log)."""
    pytest.importorskip("snakemake", reason="needs Snakemake: pip install -e .[cluster]")
    worker, log = tmp_path / "worker.py", tmp_path / "log.txt"
    worker.write_text(WORKER.format(log=str(log)))
    runs = {"a": {"first-0": ["first", 0], "stuck-0": ["stuck", 0]}, "b": {"the_last-0": ["the last", 0]}}
    content = {"profile": "full", "command": f"{sys.executable} {worker}", "options": "", "runs": runs}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    return path, log


def test_a_killed_workflow_goes_on_and_repeats_nothing(plan):
    path, log = plan
    command = workflow.command(path, 1, "local")
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE)
    end = time.monotonic() + 300
    while not (log.exists() and "a stuck" in log.read_text()):
        assert process.poll() is None and time.monotonic() < end, process.stderr.read().decode()
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = log.read_text().split("\n")[:-1]
    assert not (path.parent / "a" / "summary.done").exists()
    (path.parent / "go on").touch()
    workflow.start(path, 1)
    after = log.read_text().split("\n")[:-1]
    again = set(before) & set(after[len(before) :])
    assert again == {"a stuck"}
    assert set(after) == {"a first", "a stuck", "a summary", "b the last", "b summary"}
    assert after.index("a summary") > max(k for k, line in enumerate(after) if line == "a stuck")


def test_a_run_that_fails_fails_the_command_and_not_the_others(plan):
    path, log = plan
    content = json.loads(path.read_text())
    content["runs"]["a"] = {"bad-0": ["bad", 0]}
    path.write_text(json.dumps(content))
    with pytest.raises(MedcookError, match="Snakemake ended with status"):
        workflow.start(path, 1)
    assert (path.parent / "b" / "summary.done").exists() and not (path.parent / "a" / "summary.done").exists()
