"""How long runs would take on this machine: a few steps of each arm, timed on random images; no data is read."""

from collections import Counter

import torch
from tqdm.auto import tqdm

from medcook import evidence
from medcook.errors import MedcookError
from medcook.methods import Method
from medcook.precision import resolve_precision
from medcook.tasks import Budget, Samples, Task
from medcook.training import Loop

STEPS, BATCH = 4, 2
"""What is timed: steps at 0, 1/4, 1/2 and 3/4 of the training, so that every phase counts by its length."""


def refuse_without_gpu(recipe, profile: str, replicates: int | None = None) -> None:
    """MedcookError saying how long the runs still to be made would take, where there is no GPU to make them on."""
    if torch.cuda.is_available():
        return
    if not (todo := evidence.unfinished(recipe, profile, replicates)):
        return
    steps = recipe.scales[profile].budget.steps
    needed = duration(estimate(recipe, profile, todo))
    raise MedcookError(
        f"Without a CUDA GPU, {len(todo)} runs of {steps} steps would take about {needed} on this machine.",
        f"`--profile full` is made for such a one{_taken(recipe.paper)}; `--anyway` starts all the same.",
    )


def estimate(recipe, profile: str, todo: list[tuple[str, int]]) -> float:
    """Seconds of training for the runs (arm, replicate) in `todo`."""
    counts = Counter(arm for arm, _ in todo)
    seconds = 0.0
    for arm in tqdm(counts, desc="timing a few steps of each arm", leave=False):
        method, task, budget, _ = recipe.run(profile, arm, 0)
        seconds += counts[arm] * budget.steps * step_seconds(method, task, budget)
    return seconds


def step_seconds(method: Method, task: Task, budget: Budget) -> float:
    """Seconds of a mean training step, timed with a small batch and scaled up to the budget's."""
    precision = resolve_precision(budget.precision)
    labelled = random_samples(task)
    extra = labelled if method.uses_unlabelled and task.unlabelled_patients else None
    small = Budget(STEPS, BATCH, precision, checks=0)
    fitted = Loop(method, task, small, precision, 0, labelled, extra, None, progress=False).run()
    return fitted.cost["seconds"] / STEPS * budget.batch / BATCH


def random_samples(task: Task) -> Samples:
    """A batch of noise with random labels, in the size in which the task's cases come to the network."""
    rng = torch.Generator().manual_seed(0)
    size = task.preparation.size
    images = torch.randn(BATCH, 1, *size, generator=rng)
    labels = torch.randint(0, task.classes, (BATCH, *size), generator=rng, dtype=torch.uint8)
    return Samples(images, labels, torch.arange(BATCH))


def duration(seconds: float) -> str:
    """In the unit that suits: `20 minutes`, `7 hours`, `12 days`."""
    for unit, length, limit in (("minute", 60, 90), ("hour", 3600, 48), ("day", 86400, float("inf"))):
        if seconds < limit * length:
            count = max(1, round(seconds / length))
            return f"{count} {unit}{'s' * (count > 1)}"
    raise ValueError(f"{seconds} seconds are no duration")


def _taken(paper: str) -> str:
    """How long the evidence at full took, in brackets; empty where there is none."""
    summary = evidence.load_summary(paper, "full")
    if summary is None:
        return ""
    seconds = sum(arm.cost.get("seconds", 0) for arm in summary.arms.values()) * len(summary.seeds)
    return f" (its {len(summary.arms) * len(summary.seeds)} runs took {duration(seconds)})"
