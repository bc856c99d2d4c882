"""Several data sets, each of another modality, as one: for models that must answer prompts on all of them.

Volumes become slices along the axis that `zero_shot` cuts them at, every set keeps its own preparation, and its labels
are numbered behind those of the sets before it. Names of cases and patients begin with that of their set.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from medcook.data import IGNORE, Case, Dataset
from medcook.data.splits import Split
from medcook.preparation import Preparation, preparation_for
from medcook.sam.adapting import targets_of
from medcook.sam.zero_shot import HOUNSFIELD, SLICED, SMALLEST, Target
from medcook.tasks import Samples, Task, shared_dataset

Part = tuple[str, int, int, int]
"""(data set, patients to train on, to validate on and to test on): the first ones of its split; 0 means all."""


CLOSER = {"openkbp": Preparation(size=(128, 128), long_side=256)}
"""Sets that are looked at more closely than by their own preparation: organs are a few of openkbp's 4 mm voxels."""


def prepared_as(dataset: str) -> Preparation:
    return CLOSER.get(dataset, preparation_for(dataset))


class Several(Dataset):
    """The sets that `parts` name, as one. A case's attribute `set` is its set's name, `modality` its number."""

    def __init__(self, parts: tuple[Part, ...]):
        self.parts = parts
        self.sets = {name: shared_dataset(name) for name, *_ in parts}
        self.offsets, names = {}, {0: "background"}
        for name, data in self.sets.items():
            self.offsets[name] = len(names) - 1
            names |= {self.offsets[name] + value: title for value, title in data.manifest.structures.items()}
        first = self.sets[parts[0][0]].manifest
        facts = first.facts.model_copy(
            update={"patients": None, "cases": None, "label_values": sorted(names), "foreground_in_every_case": False}
        )
        super().__init__(first.model_copy(update={"classes": names, "facts": facts}))

    def index(self) -> dict[str, str]:
        return {
            f"{name}:{case}": f"{name}:{patient}"
            for name, data in self.sets.items()
            for case, patient in data.index().items()
        }

    def attributes(self, case_id: str) -> dict:
        name, case = case_id.split(":", 1)
        return self.sets[name].attributes(case) | {"set": name, "modality": list(self.sets).index(name)}

    @cached_property
    def split(self) -> Split:
        chosen = []
        for role, number in (("train", 1), ("val", 2), ("test", 3)):
            chosen.append(
                tuple(
                    f"{part[0]}:{patient}"
                    for part in self.parts
                    for patient in getattr(self.sets[part[0]].split, role)[: part[number] or None]
                )
            )
        return Split(*chosen, source=f"the first patients of the splits of {', '.join(self.sets)}")

    @cached_property
    def hash(self) -> str:
        parts = [repr(self.parts), *(data.hash for data in self.sets.values())]
        return sha256("\n".join(parts).encode()).hexdigest()[:12]

    def load(self, case_id: str) -> Case:
        """As the set itself reads it (which refuses test cases, and logs them), renumbered, slices first."""
        name, own = case_id.split(":", 1)
        case = self.sets[name].load(own)
        image, label, offset = case.image, case.label, self.offsets[name]
        if image.ndim == 4:
            image, label = np.moveaxis(image, SLICED.get(name, 0) + 1, 1), np.moveaxis(label, SLICED.get(name, 0), 0)
        label = np.where((label > 0) & (label != IGNORE), label + offset, label).astype(np.uint8)
        known = case.attributes | self.attributes(case_id)
        if "annotated" in known:
            known["annotated"] = [value + offset for value in known["annotated"]]
        if name == "openkbp":
            image = np.clip(image, *HOUNSFIELD)
        patient = f"{name}:{case.patient_id}"
        return replace(
            case,
            image=np.ascontiguousarray(image),
            label=np.ascontiguousarray(label),
            case_id=case_id,
            patient_id=patient,
            spacing=None,
            raters=None,
            attributes=known,
            extras={},
        )


@dataclass(frozen=True)
class EachItsOwn(Preparation):
    """The preparation of the set that a case comes from."""

    def own(self, case: Case) -> Preparation:
        return prepared_as(case.attributes["set"])

    def window(self, case: Case):
        return self.own(case).window(case)

    def images(self, case: Case) -> Tensor:
        return self.own(case).images(case)

    def labels(self, case: Case, values: np.ndarray | None = None) -> Tensor:
        return self.own(case).labels(case, values)


@lru_cache(maxsize=4)
def several(parts: tuple[Part, ...]) -> Several:
    """The sets as one; the same object for every task of a process."""
    return Several(parts)


@dataclass(frozen=True)
class ModalitiesTask(Task):
    """Several sets as one task; groups of samples are their modalities.

    parts     further sets beside `dataset`, with patients to train on, to validate on and to test on
    counts    patients of `dataset` to train on, to validate on and to test on
    balanced  in training every modality has as many slices as the largest: those of the others repeat
    """

    parts: tuple[Part, ...] = ()
    counts: tuple[int, int, int] = (0, 0, 0)
    balanced: bool = False

    @property
    def data(self) -> Several:
        return several(((self.dataset, *self.counts), *self.parts))

    @cached_property
    def preparation(self) -> EachItsOwn:
        return EachItsOwn(size=preparation_for(self.dataset).size)

    @property
    def modalities(self) -> int:
        return 1 + len(self.parts)

    def samples(self, role: str) -> Samples:
        """Slices that show something, with their modality as group."""
        found = super().samples(role)
        patients = getattr(self, f"{role}_patients")
        cases = [case for patient in patients for case in self.data.patients[patient]]
        modality = torch.tensor([self.data.attributes(case)["modality"] for case in cases])[found.case_of]
        there = ((found.labels > 0) & (found.labels != IGNORE)).flatten(1).sum(1) >= SMALLEST
        kept = there.nonzero()[:, 0] if role != "unlabelled" else torch.arange(len(there))
        if self.balanced and role == "labelled":
            kept = kept[balanced(modality[kept])]
        return Samples(found.images[kept], found.labels[kept], found.case_of[kept], None, modality[kept])


def balanced(groups: Tensor) -> Tensor:
    """Positions in `groups` (N,): each once, those of the smaller groups repeated until all groups are as large."""
    members = [(groups == group).nonzero()[:, 0] for group in groups.unique()]
    most = max(map(len, members))
    return torch.cat([each[torch.arange(most) % len(each)] for each in members])


def targets_here(task: ModalitiesTask, case: Case) -> Iterator[Target]:
    """The targets of a case; structures that nobody annotated in it are none."""
    annotated = case.attributes.get("annotated", task.structures)
    names = {task.structures[value] for value in annotated if value in task.structures}
    yield from (target for target in targets_of(task, case) if target.structure in names)


EMBEDDED = ModalitiesTask("embedded", counts=(3, 0, 0))
"""What `quick` runs: one modality, whose patients are those of the embedded cohort."""
