"""Which loss: cross-entropy, soft Dice, or their sum, everything else equal."""

from medcook.methods import Supervised
from medcook.recipes.recipe import Arm, Recipe, Scale
from medcook.tasks import Budget, Task

recipe = Recipe(
    paper="losses",
    title="Cross-entropy, Dice, or both",
    claim="Adding the Dice loss to cross-entropy raises Dice.",
    arms={
        "both": Arm(Supervised(loss="both")),
        "cross-entropy": Arm(Supervised(loss="cross-entropy")),
        "dice": Arm(Supervised(loss="dice")),
    },
    compare=("both", "cross-entropy"),
    ablation=("both", "dice"),
    replicate="fold",
    scales={
        "quick": Scale(Task("embedded"), Budget(steps=40, batch=8, checks=2), replicates=1),
        "full": Scale(Task("acdc"), Budget(steps=160)),
    },
)
