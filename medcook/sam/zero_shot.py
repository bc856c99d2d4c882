"""How well a promptable method segments what it never saw: from a box, and from one to five clicks.

The same prompts go to every method: the tight box of the truth; or a first click in the middle of the structure and
then, for each method on its own answers, a click in the middle of its largest error.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from medcook.data import Case
from medcook.sam.prompts import Prompt, box_of, first_click, next_click

Promptable = Callable[[np.ndarray, Prompt], np.ndarray]
"""(image (height, width), prompt) -> mask (height, width) bool."""

SLICED = {"acdc": 0, "hippocampus": 2, "openkbp": 2, "embedded": 0}
"""The axis across which a volume of a set is cut into images."""
TOGETHER = {"hippocampus": {"hippocampus": (1, 2)}}
"""Structures that are made of several labels."""
SLICES = 3
"""Images a volume and structure: a quarter, half and three quarters of the way through it."""
SMALLEST = 30
"""Pixels below which a slice of a structure is left out."""
CLICKS = (1, 3, 5)
HOUNSFIELD = (-160.0, 240.0)
"""CT values are cut to this soft-tissue window."""


@dataclass(frozen=True)
class Target:
    """One structure in one image: image (height, width) float32, mask (height, width) bool."""

    dataset: str
    patient: str
    structure: str
    image: np.ndarray
    mask: np.ndarray


def targets(dataset: str, case: Case, structures: Mapping[int, str]) -> Iterator[Target]:
    """The targets of a case; structures that nobody annotated in it are none."""
    annotated = case.attributes.get("annotated", structures)
    named = TOGETHER.get(dataset) or {name: (value,) for value, name in structures.items() if value in annotated}
    image = np.clip(case.image[0], *HOUNSFIELD) if dataset == "openkbp" else case.image[0]
    for name, values in named.items():
        mask = np.isin(case.label, values)
        for number, (plane, truth) in enumerate(slices(dataset, image, mask)):
            yield Target(dataset, case.patient_id, name, plane, truth)
            if number + 1 == SLICES:
                break


def slices(dataset: str, image: np.ndarray, mask: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(image, mask) planes: a flat image itself, or `SLICES` planes of a volume, spread over those that show it."""
    if image.ndim == 2:
        if mask.sum() >= SMALLEST:
            yield image, mask
        return
    image, mask = (np.moveaxis(array, SLICED.get(dataset, 0), 0) for array in (image, mask))
    there = np.flatnonzero(mask.sum((1, 2)) >= SMALLEST)
    for share in (
        sorted({round(float(q)) for q in np.linspace(0, len(there) - 1, SLICES + 2)[1:-1]}) if len(there) else ()
    ):
        yield image[there[share]], mask[there[share]]


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Dice of two masks that are not both empty."""
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def from_box(method: Promptable, target: Target) -> float:
    """Dice from the tight box."""
    return dice(method(target.image, Prompt(box=box_of(target.mask))), target.mask)


def from_clicks(method: Promptable, target: Target) -> dict[int, float]:
    """{clicks: Dice}, each click after the first on what is still wrong."""
    prompt, found = first_click(target.mask), {}
    for count in range(1, max(CLICKS) + 1):
        answer = method(target.image, prompt)
        if count in CLICKS:
            found[count] = dice(answer, target.mask)
        prompt = next_click(prompt, answer, target.mask)
    return found


def score(methods: Mapping[str, Promptable], every: Iterable[Target], clicks: bool = True) -> pd.DataFrame:
    """Rows dataset, patient_id, structure, method, prompt (`box`, `1 click`, ...), dice."""
    rows = []
    for target in every:
        for name, method in methods.items():
            found = {"box": from_box(method, target)}
            if clicks:
                found |= {f"{k} click{'s' * (k > 1)}": value for k, value in from_clicks(method, target).items()}
            identity = {"dataset": target.dataset, "patient_id": target.patient, "structure": target.structure}
            rows += [identity | {"method": name, "prompt": prompt, "dice": value} for prompt, value in found.items()]
    return pd.DataFrame(rows)
