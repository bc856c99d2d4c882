"""What every recipe of the chapter shares, so that nobody gets more than another.

Three kinds of flights (see `_flights`): whole procedures, of which every frame has a stage (`PROCEDURES`); shorter
flights, in which structures are followed (`FLIGHTS`); and such with structures of which nothing was seen in training
(`UNSEEN`).
"""

from medcook.data.transforms import Augment
from medcook.methods import Method
from medcook.recipes.recipe import Scale
from medcook.recipes.video._flights import FlightTask
from medcook.recipes.video._procedures import ProcedureTask
from medcook.recipes.video._prompted import UnseenTask
from medcook.tasks import Budget, Task

AUGMENT = Augment(rotate=10, scale=0.1, shift=0.05, gamma=0.2, contrast=0.2, brightness=0.2, noise=0.1)
"""Of single frames. Nothing is mirrored: right and left stay what they are."""

PROCEDURES = ProcedureTask("hippocampus", fold=0)
PROCEDURES_QUICK = ProcedureTask("embedded", frames=48, fold=0)
PROCEDURE_BUDGET = Budget(steps=400, batch=8, precision="float32", checks=0)
FLIGHTS = FlightTask("hippocampus", frames=80, side=32, many=5.0, evaluation="test")
FLIGHTS_QUICK = FlightTask("embedded", frames=24, side=32, many=5.0)
FLIGHT_BUDGET = Budget(steps=350, batch=6, precision="float32", checks=0)
UNSEEN = UnseenTask("hippocampus", frames=48, side=32, evaluation="test")
UNSEEN_QUICK = UnseenTask("embedded", frames=16, side=32)
UNSEEN_BUDGET = Budget(steps=300, batch=6, precision="float32", checks=0)
LITTLE = Budget(steps=30, batch=4, precision="float32", checks=0)


def scales(
    quick: Task,
    full: Task,
    *arms: str,
    budget: Budget,
    replicates: int = 3,
    methods: dict[str, Method] | None = None,
) -> dict[str, Scale]:
    """{profile: Scale}; `full` runs these arms alone, if any are named.

    methods  {arm: Method} of arms that call structures by other names at `quick`
    """
    return {
        "quick": Scale(quick, LITTLE, replicates=1, methods=methods or {}),
        "full": Scale(full, budget, replicates=replicates, arms=arms or None),
    }
