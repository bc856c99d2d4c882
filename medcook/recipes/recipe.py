"""The Recipe: a claim, the arms that test it, and what result the claim predicts."""

from dataclasses import dataclass, field, replace
from typing import Literal

from medcook.evaluation import Score
from medcook.methods import Method
from medcook.tasks import Budget, Task

Replicate = Literal["seed", "draw", "fold"]
Expectation = Literal["superior", "non-inferior", "cheaper-at-equal-quality", "association"]


@dataclass(frozen=True)
class Component:
    """One mechanism that the paper names, and what became of it here."""

    name: str
    status: Literal["implemented", "simplified", "absent"]
    note: str = ""


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: a method, and what it changes in the recipe's task (mostly nothing)."""

    method: Method
    changes: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Scale:
    """What one profile runs: the task, the budget of a run, how many replicates, and which arms (None: all).

    methods     {arm: Method} of arms whose published setting differs at this profile by more than task and budget, or
                which at `quick` must call other structures by other names
    claim       the recipe's claim in the words of this setting, where it is another one
    """

    task: Task
    budget: Budget
    replicates: int = 3
    arms: tuple[str, ...] | None = None
    methods: dict[str, Method] = field(default_factory=dict)
    claim: str = ""


@dataclass(frozen=True)
class Recipe:
    """One paper (or one claim of the book's own), ready to be tested.

    paper       id in the ledger, or the name of a claim of the book's own
    arms        {name: Arm}; `compare` and `ablation` name (better, reference) pairs of them; a recipe
                without `compare` measures and passes no verdict
    scales      {profile: Scale}
    replicate   what a replicate varies besides the random seed: nothing more, the draw of labelled
                patients, or the held-out fold
    metric      a column of the evaluation table; `expect` the shape of the claim, with `margin` in its units
    score       (fitted, case) -> rows, where a table of Dice and distances is not what the claim is about;
                see `medcook.evaluation.row`. It measures what the method predicts, and belongs to no mechanism
    cost        the entry of a run's cost that cheaper-at-equal-quality compares
    published   figures from the paper, {setting: value}, each checked at its source
    """

    paper: str
    title: str
    claim: str
    arms: dict[str, Arm]
    scales: dict[str, Scale]
    compare: tuple[str, str] | None = None
    ablation: tuple[str, str] | None = None
    replicate: Replicate = "seed"
    metric: str = "dice"
    expect: Expectation = "superior"
    margin: float = 0.0
    components: tuple[Component, ...] = ()
    published: dict[str, float] = field(default_factory=dict)
    source: str = ""
    score: Score | None = None
    cost: str = "seconds"

    def run(self, profile: str, arm: str, number: int) -> tuple[Method, Task, Budget, int]:
        """Method, task, budget and seed of replicate `number` of an arm."""
        scale = self.scales[profile]
        changes = dict(self.arms[arm].changes)
        if self.replicate != "seed":
            changes[self.replicate] = number
        return self.method(profile, arm), replace(scale.task, **changes), scale.budget, number

    def method(self, profile: str, arm: str) -> Method:
        """What an arm runs at a profile."""
        return self.scales[profile].methods.get(arm, self.arms[arm].method)

    def arms_at(self, profile: str) -> tuple[str, ...]:
        """Names of the arms that a profile runs."""
        return self.scales[profile].arms or tuple(self.arms)
