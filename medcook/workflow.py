"""All runs of a profile as a Snakemake graph: the plan lists what is still to be run, the rest is left out."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

from tqdm.auto import tqdm

from medcook import evidence, paths
from medcook.errors import MedcookError

COMMAND = f"{sys.executable} -m medcook reproduce"


def make_plan(recipes: dict, profile: str, replicates: int | None = None, options: str = "") -> Path:
    """Write the plan of every run without a current record; returns its path.

    recipes  {paper: Recipe}; those without this profile are left out. `options` of `medcook reproduce` for every job
    """
    folder = plan_folder(profile)
    runs = {}
    for paper, recipe in tqdm(recipes.items(), desc="what is to be run", leave=False):
        if profile not in recipe.scales:
            continue
        todo = unfinished(recipe, profile, replicates)
        if todo or not judged(folder / paper, paper, profile):
            runs[paper] = {run_name(arm, number): [arm, number] for arm, number in todo}
            forget(folder / paper)
    folder.mkdir(parents=True, exist_ok=True)
    count = f"--replicates {replicates}" if replicates else ""
    plan = {"profile": profile, "command": COMMAND, "options": f"{options} {count}".strip(), "runs": runs}
    path = folder / "plan.json"
    path.write_text(json.dumps(plan, indent=1), encoding="utf-8")
    return path


def plan_folder(profile: str) -> Path:
    """Where plan, logs and marks of a profile lie."""
    return paths.ROOT / "build" / "workflow" / profile


def unfinished(recipe, profile: str, replicates: int | None) -> list[tuple[str, int]]:
    """As `evidence.unfinished`; every run where that cannot be told here (data that only the nodes have)."""
    try:
        return evidence.unfinished(recipe, profile, replicates)
    except MedcookError:
        return evidence.runs_of(recipe, profile, replicates or recipe.scales[profile].replicates)


def judged(folder: Path, paper: str, profile: str) -> bool:
    """Whether there is a summary, and no earlier plan was interrupted before it came to judging."""
    interrupted = folder.exists() and not (folder / "summary.done").exists()
    return evidence.load_summary(paper, profile) is not None and not interrupted


def forget(folder: Path) -> None:
    """Take away the marks of an earlier plan: what is planned now is to be run, whatever was done before."""
    for mark in folder.glob("*.done"):
        mark.unlink()


def run_name(arm: str, number: int) -> str:
    """The name of a run as a file name."""
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '_', arm)}-{number}"


def start(plan: Path, cores: int, cluster: str = "local") -> None:
    """Let Snakemake do what is planned; MedcookError naming the logs where something failed."""
    if importlib.util.find_spec("snakemake") is None:
        raise MedcookError("Snakemake is not installed.", 'Run: pip install -e ".[cluster]" -c constraints.txt')
    done = subprocess.run(command(plan, cores, cluster), check=False)
    if done.returncode:
        raise MedcookError(
            f"Snakemake ended with status {done.returncode}; logs are in {plan.parent}.", "The same command goes on."
        )


def command(plan: Path, cores: int, cluster: str) -> list[str]:
    """Snakemake's command line. Its own lock would outlive a kill; runs are locked one by one by medcook."""
    profile = paths.ROOT / "workflow" / "profiles" / cluster
    profile = profile if profile.is_dir() else Path(cluster)
    if not (profile / "config.yaml").is_file():
        there = ", ".join(sorted(path.name for path in profile.parent.glob("*/") if (path / "config.yaml").exists()))
        raise MedcookError(f"There is no Snakemake profile {cluster!r}.", f"There is: {there or 'local, slurm'}.")
    return [
        *(sys.executable, "-m", "snakemake"),
        *("--snakefile", str(paths.ROOT / "workflow" / "Snakefile")),
        *("--directory", str(plan.parent), "--config", f"plan={plan}"),
        *("--workflow-profile", str(profile), "--cores", str(cores)),
        *("--nolock", "--rerun-incomplete", "--rerun-triggers", "mtime"),
    ]
