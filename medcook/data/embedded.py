"""The embedded cohort: 40 simulated patients made from the ICBM 152 template that ships inside nilearn. No network.

Each patient is the template under a smooth random deformation (with larger ventricles by age and disease, a larger
head by sex), seen by one of three scanners with its own contrast, bias field, blur and noise. The truth is known, so
three raters with known habits can be simulated too. Everything follows from the patient's number.
"""

import importlib.util
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage

from medcook.data.case import Case
from medcook.data.datasets import Dataset
from medcook.errors import MedcookError

PATIENTS = 40
SHAPE = (8, 96, 96)  # slices from below to above, rows from front to back, columns from left to right
SPACING = (6.0, 2.0, 2.0)  # mm
CENTRE = (16.0, -17.0, 0.0)  # of the slab, in template mm: up, forward, right
GRID = 2.0  # mm: the template is averaged to this resolution
TISSUES = ("grey matter", "white matter", "ventricles")  # label values 1, 2, 3
T2_MEANS = (0.10, 0.62, 0.42, 1.0)  # of background and the tissues, in the second contrast


@dataclass(frozen=True)
class Scanner:
    """What a site does to an image: contrast (gamma), bias field (strength), blur (voxels), noise (of the range)."""

    gamma: float
    bias: float
    blur: float
    noise: float
    gain: float


SITES = {
    "north": Scanner(gamma=1.0, bias=0.10, blur=0.3, noise=0.03, gain=1000.0),
    "south": Scanner(gamma=1.6, bias=0.25, blur=0.5, noise=0.04, gain=400.0),
    "island": Scanner(gamma=0.7, bias=0.30, blur=0.8, noise=0.07, gain=150.0),
}
SITE_ORDER = ("north", "north", "south", "island")
RATER_HABITS = (  # added to the log odds of background, grey, white, ventricles; the last: how unsteady the hand is
    ((0.0, 0.0, 0.0, 0.0), 0.3),
    ((-0.3, 0.3, -0.1, 0.0), 0.4),
    ((0.2, -0.2, 0.2, 0.3), 0.7),
)
HAND_SWAYS = np.float32([1.0, -1.0, 0.5, -0.5])[:, None, None, None]  # which border a wandering hand moves, how far


class Embedded(Dataset):
    """A case is one patient: image (1, 8, 96, 96), label 0 to 3, three raters, extras `t2` (8, 96, 96).

    attributes: simulated, site, sex, age, group (control, atrophy)
    """

    def index(self) -> dict[str, str]:
        return {f"brain{number:02d}": f"brain{number:02d}" for number in range(1, PATIENTS + 1)}

    def attributes(self, case_id: str) -> dict:
        return person_of(case_id)

    def read(self, case_id: str) -> Case:
        return deepcopy(simulated(case_id))


def person_of(case_id: str) -> dict:
    """Who a patient is: simulated, site, sex, age, group."""
    number = int(case_id.removeprefix("brain"))
    rng = np.random.default_rng([152, number])
    return {
        "simulated": True,
        "site": SITE_ORDER[number % 4],
        "sex": "FM"[(number // 4) % 2],
        "age": int(rng.integers(20, 85)),
        "group": ("control", "atrophy")[number % 3 == 0],
    }


@lru_cache(maxsize=PATIENTS)
def simulated(case_id: str) -> Case:
    """A patient, made once a process (0.1 s, 0.9 MB)."""
    person = person_of(case_id)
    rng = np.random.default_rng([153, int(case_id.removeprefix("brain"))])
    t1, odds = anatomy(person, rng)
    scanner = SITES[person["site"]]
    t2 = np.tensordot(np.float32(T2_MEANS), np.exp(odds), 1)
    return Case(
        image=scan(t1, scanner, rng)[None],
        label=odds.argmax(0).astype(np.uint8),
        case_id=case_id,
        patient_id=case_id,
        spacing=SPACING,
        raters=np.stack([annotate(odds, *habit, rng) for habit in RATER_HABITS]),
        attributes=person,
        extras={"t2": scan(t2, scanner, rng)},
    )


def anatomy(person: dict, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The deformed template: T1 (8, 96, 96) in 0 to 1, and log probabilities (4, 8, 96, 96) of the classes."""
    head = 1.0 + (0.03 if person["sex"] == "M" else -0.01) + rng.normal(0, 0.015)
    widening = 0.05 + 0.35 * (person["age"] - 20) / 65 + (0.30 if person["group"] == "atrophy" else 0.0)
    points = sampling_points(head, widening + rng.normal(0, 0.04), rng)
    maps = [ndimage.map_coordinates(volume, points, order=1, output=np.float32) for volume in template()]
    t1, *tissues = maps
    tissues = np.stack(tissues)
    background = np.clip(1 - tissues.sum(0), 0, 1)
    probabilities = np.concatenate([background[None], tissues])
    return t1, np.log(np.clip(probabilities, 0.01, None) / np.clip(probabilities, 0.01, None).sum(0))


def sampling_points(head: float, widening: float, rng: np.random.Generator) -> np.ndarray:
    """Template voxel (3, 8, 96, 96) that each voxel of the patient shows."""
    axes = [(np.arange(n) - (n - 1) / 2) * size for n, size in zip(SHAPE, SPACING, strict=True)]
    offset = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32) / np.float32(head)
    offset += np.stack([smooth_field(rng) for _ in range(3)]) * np.float32([3.0, 4.0, 4.0])[:, None, None, None]
    distance = (offset**2 / np.float32([20, 30, 22])[:, None, None, None] ** 2).sum(0)
    offset *= 1 - np.float32(widening) * np.exp(-distance / 2)
    up, back, right = offset
    millimetres = np.stack([CENTRE[2] + right, CENTRE[1] - back, CENTRE[0] + up])
    origin = np.float32([-98, -134, -72])[:, None, None, None] + GRID / 4  # pooled voxels of 2 mm begin half a mm later
    return (millimetres - origin) / np.float32(GRID)


def smooth_field(rng: np.random.Generator, waves: tuple[int, int, int] = (2, 5, 5)) -> np.ndarray:
    """Random field (8, 96, 96) of mean 0 and standard deviation 1: a few cosines per axis, long ones stronger."""
    bases = [np.cos(np.pi * np.outer(np.arange(n) + 0.5, np.arange(k)) / n) for n, k in zip(SHAPE, waves, strict=True)]
    strength = 1 / (1 + sum(np.meshgrid(*(np.arange(k) for k in waves), indexing="ij")))
    weights = rng.standard_normal(waves) * strength
    weights[0, 0, 0] = 0
    field = np.einsum("abc,za,yb,xc->zyx", weights, *bases, optimize=True)
    return (field / field.std()).astype(np.float32)


def scan(signal: np.ndarray, scanner: Scanner, rng: np.random.Generator) -> np.ndarray:
    """The signal (8, 96, 96) in 0 to 1 as the scanner shows it: contrast, bias field, blur, Rician noise, gain."""
    seen = np.clip(signal, 0, 1) ** np.float32(scanner.gamma) * np.exp(scanner.bias * smooth_field(rng, (2, 3, 3)))
    seen = ndimage.gaussian_filter(seen, (0, scanner.blur, scanner.blur))
    real, imaginary = rng.standard_normal((2, *SHAPE), dtype=np.float32) * scanner.noise
    return np.float32(scanner.gain) * np.hypot(seen + real, imaginary).astype(np.float32)


def annotate(odds: np.ndarray, habit: tuple[float, ...], unsteady: float, rng: np.random.Generator) -> np.ndarray:
    """One rater's label (8, 96, 96): the most likely class after the rater's habit and a slowly wandering hand."""
    hand = smooth_field(rng, (8, 24, 24)) * np.float32(unsteady)
    swayed = odds + np.float32(habit)[:, None, None, None]
    swayed += hand * HAND_SWAYS
    return swayed.argmax(0).astype(np.uint8)


@lru_cache(maxsize=1)
def template() -> tuple[np.ndarray, ...]:
    """T1 and the probabilities of grey matter, white matter and ventricles: (98, 116, 94) float32 in 0 to 1, 2 mm."""
    t1, grey, white = (pool(read_template(kind)) for kind in ("t1", "gm", "wm"))
    return t1, grey, white, ventricles(t1, grey + white)


def ventricles(t1: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """Probability of fluid inside the brain: dark holes of the tissue, in its middle, in axial slices."""
    inside = np.stack([ndimage.binary_fill_holes(plane) for plane in np.moveaxis(tissue > 0.5, 2, 0)], axis=2)
    holes, count = ndimage.label(inside & (tissue < 0.5))
    sizes = np.bincount(holes.ravel())
    sizes[0] = 0
    largest = ndimage.binary_dilation(np.isin(holes, np.flatnonzero(sizes > 100)))
    return np.where(largest, np.clip(1 - tissue, 0, 1), 0).astype(np.float32)


def pool(volume: np.ndarray) -> np.ndarray:
    """Mean of blocks of 2 x 2 x 2, scaled from 0-255 to 0-1."""
    even = volume[tuple(slice(0, n // 2 * 2) for n in volume.shape)]
    x, y, z = (n // 2 for n in even.shape)
    return even.reshape(x, 2, y, 2, z, 2).mean((1, 3, 5), dtype=np.float32) / np.float32(255)


def read_template(kind: str) -> np.ndarray:
    """One of the template's volumes as stored, uint8; found without importing nilearn, which would take seconds."""
    spec = importlib.util.find_spec("nilearn")
    folder = Path(spec.submodule_search_locations[0]) if spec else Path("nilearn")
    path = folder / "datasets" / "data" / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz"
    if not path.exists():
        raise MedcookError(f"{path}: the brain template is missing.", "Install nilearn (it ships the template).")
    return np.asarray(nibabel.load(path).dataobj)
