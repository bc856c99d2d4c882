"""A training of seconds, shared by the tests of the loop."""

from dataclasses import replace

from medcook.methods import Method, Supervised
from medcook.tasks import Budget, Task
from medcook.training import Fitted, fit

METHOD = Supervised(channels=(4, 8))
TASK = Task("embedded", labelled=2, evaluation="test")
BUDGET = Budget(steps=12, batch=4, precision="float32", checks=3)
SHORT = replace(BUDGET, steps=3, checks=0)
BEHAVIOUR = {"loss": 1.0}


def train(method: Method = METHOD, task: Task = TASK, budget: Budget = SHORT, seed: int = 0, **options) -> Fitted:
    return fit(method, task, budget, seed, progress=False, **options)
