"""What the chapter's recipes share: the held-out structure, the budgets, the features, and the cross-domain pair."""

from dataclasses import replace

from medcook.few_shot import FewShot, FewShotTask
from medcook.recipes.recipe import Arm, Scale
from medcook.tasks import Budget

STEPS = Budget(steps=75, batch=8, checks=1)
QUICK = Budget(steps=40, batch=8, checks=1)
EPISODES = "superpixels"
"""What arms practise in training where the paper's claim is not about that."""
PLACE = 0.3
"""How much the place counts within hearts, all cut out around the same middle; chosen on validation patients."""
OWN = ", own features"


def both(methods: dict[str, FewShot], place: float = 0.0) -> dict[str, Arm]:
    """Every arm on frozen ImageNet features, which need the network once, and on features from scratch, for `quick`.

    place  how much the place counts in every arm: fair where support and query are cut out around the same organ.
    Features from scratch have to learn from something: from base structures, where there are no episodes.
    """
    methods = {name: replace(method, place=place) for name, method in methods.items()}
    pretrained = {name: Arm(replace(method, encoder="imagenet")) for name, method in methods.items()}
    scratch = {
        name + OWN: Arm(replace(method, base=1.0) if method.episodes == "none" else method)
        for name, method in methods.items()
    }
    return pretrained | scratch


def scales(*arms: str, budget: Budget = STEPS, **changes) -> dict[str, Scale]:
    """ACDC with both ventricles held out, in setting 1, and the embedded cohort; `changes` go into both tasks.

    Only the myocardium is named in training. A replicate is a draw of supports.
    """
    return _scales(FewShotTask("acdc", novel=(1, 3), supports=2, evaluation="test"), budget, arms, changes)


def crossing(*arms: str, budget: Budget = STEPS, **changes) -> dict[str, Scale]:
    """Trained on the heart in MR, scored on lungs in chest X-rays; at `quick` the embedded cohort, within itself."""
    return _scales(FewShotTask("chest_xray", source="acdc", evaluation="test"), budget, arms, changes)


def _scales(full: FewShotTask, budget: Budget, arms: tuple[str, ...], changes: dict) -> dict[str, Scale]:
    quick = replace(FewShotTask("embedded", novel=(3,), supports=2), **changes)
    return {
        "quick": Scale(quick, QUICK, replicates=1, arms=tuple(name + OWN for name in arms)),
        "full": Scale(replace(full, **changes), budget, arms=arms),
    }
