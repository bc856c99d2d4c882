"""What a step of each semi-supervised method costs, as a multiple of the supervised step, back to back."""

import statistics
import time

import torch

from medcook.methods import Batch, Method, Moment
from medcook.recipes.semi_supervised._settings import FULL, SUPERVISED
from medcook.recipes.semi_supervised.few_labels import BASELINES, PAPERS

ROUNDS = 5
FIRST, SECOND = Moment(0, 100), Moment(99, 100)
"""A moment of each phase: labels alone, and both."""


def method_costs() -> list[dict]:
    """For each method: both phases' step over the supervised step, and their mean as a run has it; float32.

    In every round all methods take one step of each phase, so that what slows the machine slows them alike.
    """
    methods = BASELINES | PAPERS
    runners = {name: Runner(method) for name, method in methods.items()}
    taken = {(name, phase): [] for name in methods for phase in (FIRST, SECOND)}
    for _ in range(ROUNDS + 1):
        for (name, phase), seconds in taken.items():
            seconds.append(runners[name].step(phase))
    median = {key: statistics.median(seconds[1:]) for key, seconds in taken.items()}
    reference = median["supervised", FIRST]
    return [cost(name, method, median, reference) for name, method in methods.items()]


def cost(name: str, method: Method, median: dict, reference: float) -> dict:
    """One line of the table."""
    first, second = (median[name, phase] / reference for phase in (FIRST, SECOND))
    share = getattr(method, "start", 1.0)
    return {
        "method": name,
        "labels_alone": round(first, 2),
        "with_unlabelled": round(second, 2),
        "mean": round(share * first + (1 - share) * second, 2),
    }


class Runner:
    """A method with its networks and a made-up batch in the size of the chapter's `full`."""

    def __init__(self, method: Method):
        torch.manual_seed(0)
        size, count = FULL.task.preparation.size, FULL.budget.batch
        labels = torch.randint(0, 4, (count, 1, 8, 8)).float()
        labels = torch.nn.functional.interpolate(labels, size)[:, 0].byte()
        images = labels[:, None] + torch.randn(count, 1, *size)
        self.method, self.nets = method, method.build(1, 4, len(size))
        batch = Batch(images, labels, torch.arange(count))
        self.labelled = method.augment(batch, torch.Generator().manual_seed(0))
        self.unlabelled = method.augment(batch, torch.Generator().manual_seed(1))
        trained = [p for p in self.nets.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=SUPERVISED.rate, fused=True)

    def step(self, now: Moment) -> float:
        """Seconds of one training step."""
        began = time.perf_counter()
        loss = self.method.training_step(self.nets, self.labelled, self.unlabelled, now)
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.method.after_step(self.nets, now)
        return time.perf_counter() - began
