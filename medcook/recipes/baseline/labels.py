"""How many patients are enough: the same network and steps on 3, 7, 14, 35 and all 70 labelled patients."""

from medcook.methods import Supervised
from medcook.recipes.recipe import Arm, Recipe, Scale
from medcook.tasks import Budget, Task

recipe = Recipe(
    paper="labels",
    title="How many labelled patients are enough",
    claim="The last doubling of the labelled patients, from 35 to 70, still raises Dice.",
    arms={str(count): Arm(Supervised(), {"labelled": count}) for count in (3, 7, 14, 35, 70)},
    compare=("70", "35"),
    ablation=("70", "7"),
    replicate="draw",
    scales={
        "quick": Scale(Task("embedded"), Budget(steps=40, batch=8, checks=2), replicates=1, arms=("3", "7", "14")),
        "full": Scale(Task("acdc", evaluation="test"), Budget(steps=160)),
    },
)
