"""Two hospitals, two scanners: the tasks of chapter 14, and simulated scanners for where real ones are missing.

The source has labels. Of the target there are images, and labels of a few patients at most; the target is scored.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from types import MappingProxyType
from zlib import crc32

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from medcook.cohorts import CohortTask, first_attributes, need
from medcook.data import Case
from medcook.errors import MedcookError
from medcook.preparation import Preparation, zscore
from medcook.tasks import Samples

PLAIN = "as it is"
"""The look of a case that no simulated scanner has touched."""


@dataclass(frozen=True)
class Look:
    """How a simulated scanner shows an image that has zero mean and unit variance.

    curve  (before, after): brightness is mapped along straight lines between these points, and held beyond them
    blur   standard deviation of a Gaussian, in pixels of the prepared image
    shade  how strongly brightness drifts across the image: standard deviation of the log of a smooth field
    noise  standard deviation of what is added, independent from pixel to pixel
    """

    curve: tuple[tuple[float, float], ...] = ()
    blur: float = 0.0
    shade: float = 0.0
    noise: float = 0.0


LOOKS: Mapping[str, Look] = MappingProxyType(
    {
        PLAIN: Look(),
        "washed out": Look(((-2, -1.2), (0, 0.2), (1, 0.6), (4, 1.0)), blur=1.0, shade=0.2, noise=0.3),
        "dark blood": Look(((-2, -1.2), (-0.7, -0.6), (0.2, 1.2), (1, 0.2), (3, -1.0)), noise=0.15),
        "negative": Look(((-4, 4), (4, -4)), noise=0.1),
    }
)
"""Scanners by name. `washed out`: little contrast, blurred, shaded, noisy. `dark blood`: what is of middle brightness
becomes bright and what is bright becomes dark. `negative`: bright is dark."""


def shown(images: Tensor, look: Look, rng: np.random.Generator) -> Tensor:
    """Prepared images (N, C, *size) as another scanner shows them; zero mean and unit variance over all of them."""
    values = images.numpy()
    if look.curve:
        before, after = zip(*look.curve, strict=True)
        values = np.interp(values, before, after)
    axes = images.ndim - 2
    if look.blur:
        values = ndimage.gaussian_filter(values, (0, 0, *[look.blur] * axes))
    if look.shade:
        field_of = ndimage.gaussian_filter(rng.standard_normal(images.shape[2:]), [n / 5 for n in images.shape[2:]])
        values = values * np.exp(look.shade * field_of / max(field_of.std(), 1e-12))
    values = values + look.noise * rng.standard_normal(values.shape)
    return zscore(torch.from_numpy(values).float())


@dataclass(frozen=True)
class LookPreparation(Preparation):
    """A preparation after which a simulated scanner shows the image.

    looks      (patient, look) for patients of whom it is known
    otherwise  the look of everybody else

    A case whose attributes have a `look` is shown by that one: so a score may look at one patient in several ways.
    """

    looks: tuple[tuple[str, str], ...] = ()
    otherwise: str = PLAIN

    @cached_property
    def _looks(self) -> dict[str, str]:
        return dict(self.looks)

    def look_of(self, case: Case) -> str:
        return case.attributes.get("look") or self._looks.get(case.patient_id, self.otherwise)

    def images(self, case: Case) -> Tensor:
        """As ever, and then as the case's scanner shows it; its noise follows from the case's name."""
        plain = super().images(case)
        name = self.look_of(case)
        if name == PLAIN:
            return plain
        return shown(plain, find_look(name), np.random.default_rng(crc32(f"{case.case_id} {name}".encode())))


def find_look(name: str) -> Look:
    """A simulated scanner by name."""
    if name not in LOOKS:
        raise MedcookError(f"Unknown look {name!r}.", f"Known: {', '.join(LOOKS)}.")
    return LOOKS[name]


def with_looks(plain: Preparation, looks: Mapping[str, str], otherwise: str) -> LookPreparation:
    """A preparation with a simulated scanner behind it."""
    kept = {part.name: getattr(plain, part.name) for part in fields(Preparation)}
    return LookPreparation(**kept, looks=tuple(looks.items()), otherwise=otherwise)


def kind_of_data(task: CohortTask, looks: Iterable[str]) -> str:
    """What evidence under these looks counts as, see `medcook.evidence.data_kind`: real images lose it by a scanner."""
    if task.data.manifest.simulated:
        return "simulated"
    return "real-anatomy-simulated" if set(looks) - {PLAIN, ""} else "real"


@dataclass(frozen=True)
class DomainTask(CohortTask):
    """Labelled cases are the source's, unlabelled ones the target's, and the target's patients validate.

    A method that `uses_unlabelled` gets both in every step. A labelled sample's group is 0 (source) or 1 (target).

    attribute, source, target  a fact about patients, and its values here and there; or
    look                       every other training patient makes the target, together with all whom nobody trains on:
                               a simulated scanner of `LOOKS` shows them. Source patients stay as they are
    known                      how many target patients come with their labels (None: all); they are then labelled cases
    sides                      `both`; `target`: there is no source, and only the `known` target patients are labelled
    """

    attribute: str = "site"
    source: str = "Montgomery"
    target: str = "Shenzhen"
    look: str = ""
    known: int | None = 0
    sides: str = "both"

    @cached_property
    def _everyone(self) -> tuple[str, ...]:
        """All training patients, in the order of the plain task's."""
        plain = {part.name: getattr(self, part.name) for part in fields(CohortTask)}
        return CohortTask(**plain).labelled_patients

    @cached_property
    def source_patients(self) -> tuple[str, ...]:
        return self._everyone[::2] if self.look else self._of(self.source, self._everyone)

    @cached_property
    def target_patients(self) -> tuple[str, ...]:
        """Training patients of the target; the first `known` of them come with labels."""
        return self._everyone[1::2] if self.look else self._of(self.target, self._everyone)

    @cached_property
    def labelled_patients(self) -> tuple[str, ...]:
        known = self.target_patients[: self.known]
        labelled = known if self.sides == "target" else self.source_patients + known
        if not labelled or len(known) < (self.known or 0):
            raise MedcookError(
                f"{self.dataset}: {self.known} known target patients of {len(self.target_patients)}.",
                "Ask for fewer, or for a source.",
            )
        return labelled

    @cached_property
    def unlabelled_patients(self) -> tuple[str, ...]:
        return () if self.known is None else self.target_patients[self.known :]

    @cached_property
    def val_patients(self) -> tuple[str, ...]:
        everyone = super().val_patients
        return everyone if self.look else self._of(self.target, everyone)

    def _of(self, value: str, patients: tuple[str, ...]) -> tuple[str, ...]:
        return need(self.data, patients, self.attribute, value)

    @cached_property
    def preparation(self) -> Preparation:
        plain = super().preparation
        return with_looks(plain, dict.fromkeys(self.source_patients, PLAIN), self.look) if self.look else plain

    @property
    def data_kind(self) -> str:
        return kind_of_data(self, (self.look,))

    def is_target(self, patient: str) -> bool:
        """Whether a patient belongs to the target; also of those whom nobody trains on."""
        if self.look:
            return patient not in self.source_patients
        return first_attributes(self.data, patient).get(self.attribute) == self.target

    def samples(self, role: str) -> Samples:
        samples = super().samples(role)
        if role != "labelled":
            return samples
        cases = [patient for patient in self.labelled_patients for _ in self.data.patients[patient]]
        groups = torch.tensor([int(self.is_target(patient)) for patient in cases])[samples.case_of]
        return Samples(samples.images, samples.labels, samples.case_of, samples.raters, groups)


@dataclass(frozen=True)
class LooksTask(CohortTask):
    """Patients come from several scanners at once: each is shown by one of `looks`, in turn.

    Patients whom nobody trains on have a look that follows from their name; a score may ask for another (see
    `LookPreparation`, and `as_shown`).
    """

    looks: tuple[str, ...] = field(default=tuple(LOOKS))

    @property
    def data_kind(self) -> str:
        return kind_of_data(self, self.looks)

    @cached_property
    def preparation(self) -> Preparation:
        everyone = sorted(self.data.patients)
        place = {patient: number for number, patient in enumerate(self.labelled_patients)}
        number = {patient: place.get(patient, crc32(patient.encode())) for patient in everyone}
        looks = {patient: self.looks[number[patient] % len(self.looks)] for patient in everyone}
        return with_looks(super().preparation, looks, PLAIN)


def as_shown(case: Case, look: str) -> Case:
    """The same case, marked to be shown by one look, whatever the task's."""
    find_look(look)
    return replace(case, attributes={**case.attributes, "look": look})
