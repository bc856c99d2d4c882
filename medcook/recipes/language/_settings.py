"""What every recipe of the chapter shares, so that nobody gets more than another."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from medcook import evaluation, metrics
from medcook.data import Case
from medcook.data.transforms import Augment
from medcook.language import Names, Told
from medcook.methods import Method
from medcook.methods.semi_supervised import NARROW
from medcook.preparation import Preparation
from medcook.recipes.language._findings import FindingsTask, Spoken
from medcook.recipes.recipe import Scale
from medcook.recipes.sam_adaptation._modalities import EachItsOwn, ModalitiesTask, prepared_as
from medcook.sampling import trained
from medcook.synthesis import small
from medcook.tasks import Budget, Task

CHANNELS = NARROW
"""Half the widths of chapter 02, as in chapters 04, 08, 13 and 15."""

SIDE = 64

MILD = Augment(rotate=10, scale=0.1, shift=0.05, gamma=0.2, contrast=0.2, brightness=0.2, noise=0.1)
"""A field of a lung, a side and a size stay what they are called."""


@dataclass
class ToldOfFindings(Told):
    """The chapter's baseline on findings: the sentence is heard by the deepest features and by the head."""

    language: Spoken = Spoken()
    augmentation: Augment = field(default_factory=lambda: MILD)


FINDINGS = FindingsTask("chest_xray", evaluation="test")
FINDINGS_QUICK = FindingsTask("embedded", versions=1)
FINDINGS_BUDGET = Budget(steps=700, batch=12, checks=0)
BASELINE = ToldOfFindings()


@dataclass(frozen=True)
class SmallEach(EachItsOwn):
    """The preparation of the set that a case comes from, with fewer pixels."""

    def own(self, case: Case) -> Preparation:
        """A hippocampus volume's slices fill the image; of all others the image shows as much as ever."""
        name, side = case.attributes["set"], self.size[0]
        return Preparation((side, side), long_side=side) if name == "hippocampus" else small(prepared_as(name), side)


@dataclass(frozen=True)
class NamedTask(ModalitiesTask):
    """Several data sets as one, in slices of `SIDE` x `SIDE` pixels; samples have their set's number as group.

    only  the numbers of the sets that train, if not all: a specialist's. Labels keep their numbers
    """

    only: tuple[int, ...] = ()

    @cached_property
    def preparation(self) -> SmallEach:
        return SmallEach(size=(SIDE, SIDE))

    @cached_property
    def labelled_patients(self) -> tuple[str, ...]:
        everyone, sets = super().labelled_patients, list(self.data.sets)
        chosen = {sets[number] for number in self.only or range(len(sets))}
        return tuple(patient for patient in everyone if patient.split(":")[0] in chosen)


NAMED = NamedTask(
    "acdc",
    evaluation="test",
    counts=(20, 4, 10),
    parts=(("hippocampus", 20, 4, 15), ("openkbp", 0, 1, 0), ("chest_xray", 40, 4, 25), ("bubil", 12, 2, 12)),
    balanced=True,
)
"""Hearts and hippocampi in MR, head and neck in CT, chest X-rays, cells under the microscope."""
NAMED_QUICK = NamedTask("embedded", counts=(3, 1, 1))
NAMED_BUDGET = Budget(steps=700, batch=12, checks=0)

NAMES = (
    *("right ventricle of the heart", "myocardium of the left ventricle", "left ventricle of the heart"),
    *("anterior hippocampus", "posterior hippocampus"),
    *("brainstem", "spinal cord", "right parotid gland", "left parotid gland", "esophagus", "larynx", "mandible"),
    *("lungs", "cell"),
)
"""How the structures of `NAMED` are asked for, by label value."""
SETS = (0, 0, 0, 1, 1, *(2,) * 7, 3, 4)
"""The set that each name is from."""
EVERYTHING = Names(NAMES, SETS, partial=(2,))
"""In openkbp, what is not drawn may be there."""
BRAIN = Names(("grey matter", "white matter", "ventricles"))


@dataclass
class ToldOfNames(Told):
    """The chapter's baseline on structures: asked for one by its name."""

    language: Names = EVERYTHING
    each: bool = True


def named_rows(fitted, case: Case) -> list[dict]:
    """The usual table of a case: every structure that its set has and that was drawn here is asked for by name.

    An answer is what is above a probability of one half. A method that cannot be asked predicts its label map. What
    `EVERYTHING` has no name for is left out.
    A row has its set's name, too.
    """
    task, method = fitted.task, fitted.method
    drawn = case.attributes.get("annotated", own_values(task, case))
    values = [value for value in drawn if value in task.structures and EVERYTHING.plain(value)]
    if not values:
        return []
    masks = asked_for(fitted, case, tuple(values)) if isinstance(method, Told) else predicted(fitted, case, values)
    rows = []
    for value in values:
        found = metrics.score(masks[value].numpy(), case.label == value, case.spacing)
        row = evaluation.row(case, task.structures[value], dice=found.dice, set=case.attributes.get("set", ""))
        rows.append(row | {"missed": found.missed, "false_alarm": found.false_alarm})
    return rows


def own_values(task: Task, case: Case) -> list[int]:
    """The label values of the set that a case is from."""
    data, name = task.data, case.attributes.get("set")
    if name is None:
        return list(task.structures)
    return [data.offsets[name] + value for value in data.sets[name].manifest.structures]


@torch.no_grad()
def asked_for(fitted, case: Case, values: tuple[int, ...]) -> dict[int, Tensor]:
    """{label value: mask (*spatial) bool} of the answers to the names of these values."""
    nets, preparation = trained(fitted), fitted.task.preparation
    sentences = tuple(fitted.method.language.name(value) for value in values)
    parts = [fitted.method.answer(nets, part, sentences) for part in preparation.images(case).split(16)]
    answers = torch.cat(parts)
    found = {}
    for number, value in enumerate(values):
        pair = torch.stack([1 - answers[:, number], answers[:, number]], dim=1)
        found[value] = preparation.restore(pair, case)[1] > 0.5
    return found


def predicted(fitted, case: Case, values: list[int]) -> dict[int, Tensor]:
    """The same from a label map."""
    label = torch.from_numpy(fitted.predict(case))
    return {value: label == value for value in values}


def scales(quick: Task, full: Task, *arms: str, budget: Budget, methods: dict[str, Method] | None = None):
    """{profile: Scale}; `full` has three replicates, and runs these arms alone if any are named.

    methods  {arm: Method} of arms that speak another language at `quick`, whose structures have other names
    """
    little = Budget(steps=40, batch=6, precision="float32", checks=0)
    return {
        "quick": Scale(quick, little, replicates=1, methods=methods or {}),
        "full": Scale(full, budget, arms=arms or None),
    }
