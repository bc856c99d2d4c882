"""The Case: one image with its label and everything known about it."""

from dataclasses import dataclass, field

import numpy as np

IGNORE = 255
"""Label value of voxels that nobody annotated: counted neither as structure nor as background."""


@dataclass(frozen=True)
class Case:
    """One image and its annotation.

    image       (C, *spatial) float32, finite
    label       (*spatial) uint8; 0 is background, `IGNORE` is unlabelled
    case_id     unique in its data set; `patient_id` groups the cases of one person
    spacing     mm per spatial axis, in array order, or None where unknown (never guessed)
    raters      (R, *spatial) uint8, one annotation per rater, or None
    attributes  what is known of the patient: sex, age, site, group, ... and which label
                values were annotated at all (`annotated`), where that differs between cases
    extras      further arrays on the image's grid, by name (for example `scribble`)
    """

    image: np.ndarray
    label: np.ndarray
    case_id: str
    patient_id: str
    spacing: tuple[float, ...] | None = None
    raters: np.ndarray | None = None
    attributes: dict = field(default_factory=dict)
    extras: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def spatial(self) -> tuple[int, ...]:
        """Shape of the image without its channels."""
        return self.image.shape[1:]
