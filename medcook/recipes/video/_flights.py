"""Flights through real volumes, where an endoscope's video is not at hand.

No real video is among the data of this book. So a camera flies through a volume along one of its axes, goes in, comes
back, dwells, hesitates, turns round, and drifts and rolls in the plane, as an endoscope does; every frame is what the
volume shows at that place. Now and then a frame is blurred, dark, hazy or noisy. What is real: the anatomy, its labels
in every frame, the patients. What is simulated: the path, the drift, the disturbances, and what four centres' cameras
make of it. A video has much that a flight has not: colour, light, instruments, tissue that moves.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from medcook.cohorts import CohortTask
from medcook.data import Case
from medcook.domains import Look, shown
from medcook.preparation import Preparation, preparation_for, zscore
from medcook.synthesis import small

AXES = {"hippocampus": 1}
"""The axis along which a volume is flown through; that of its slices where no other is named."""
MARGIN = {"embedded": 2, "acdc": 1}
"""Empty slices that are added at both ends, where a volume begins and ends within what is labelled."""
WAYS = {"ahead": (0.65, (0.4, 1.6)), "dwell": (0.2, (0.0, 0.1)), "back": (0.15, (-1.2, -0.3))}
"""{what a camera does for a while: (how often, its speeds)}; speeds are scaled so that it arrives in time."""
WHILE = (3, 12)
"""Frames for which a camera keeps its speed."""
DRIFT, ROLL = 0.06, 8.0
"""How far a camera drifts, as a share of the frame's side, and rolls, in degrees: standard deviations."""
DISTURBANCES = ("blur", "darkness", "haze", "noise")
BURST = (4, 14)
"""Frames of a disturbance."""
CENTRES = (
    Look(),
    Look(((-2, -1.6), (0, -0.5), (1, 0.6), (4, 4.5)), shade=0.25, noise=0.1),
    Look(((-2, -1.2), (0, 0.3), (1, 0.9), (4, 1.8)), blur=0.7, noise=0.15),
    Look(blur=0.5, shade=0.4, noise=0.3),
)
"""What the cameras of four centres make of an image; the first leaves it as it is."""


class Flight(NamedTuple):
    """frames (T, H, W) float32, label maps (T, H, W) uint8, slices (T,) int64 that they show, bursts (T,): the number
    in `DISTURBANCES` of what disturbs a frame, -1 where nothing does."""

    frames: Tensor
    labels: Tensor
    slices: np.ndarray
    bursts: np.ndarray


def leg(frames: int, rng: np.random.Generator) -> np.ndarray:
    """A way from 0 to 1 in so many frames (T,): ahead, with rests and steps back; it never leaves 0 to 1."""
    names, chances = list(WAYS), [WAYS[name][0] for name in WAYS]
    speeds: list[float] = []
    while len(speeds) < frames:
        low, high = WAYS[names[rng.choice(len(names), p=chances)]][1]
        speeds += [rng.uniform(low, high)] * rng.integers(*WHILE, endpoint=True)
    way = np.cumsum([0.0, *speeds])[:frames]
    if way[-1] < 0.7 * way.max():  # it ends where it did not mean to
        way = np.arange(float(frames))
    way = way / max(way[-1], 1e-9)
    return np.clip(way, 0, 1)


def course(frames: int, rng: np.random.Generator) -> np.ndarray:
    """Where a camera is in every frame (T,), from 0 (the entry) to 1 (the far end) and back to 0."""
    inwards = round(frames * rng.uniform(0.35, 0.55))
    return np.concatenate([leg(inwards, rng), 1 - leg(frames - inwards, rng)])


def wander(frames: int, rng: np.random.Generator) -> np.ndarray:
    """A smooth random walk (T,) of about unit deviation: a few slow waves."""
    waves, time = np.arange(1, 5), np.arange(frames) / max(frames, 1)
    phases = rng.uniform(0, 2 * np.pi, len(waves))
    heights = rng.standard_normal(len(waves)) / np.sqrt(2)
    return (heights * np.sin(2 * np.pi * np.outer(time, waves) + phases)).sum(1)


def filmed(images: Tensor, labels: Tensor, places: np.ndarray, sway: Tensor) -> tuple[Tensor, Tensor]:
    """Frames (T, H, W) and label maps (T, H, W) of slices (S, H, W), seen at places (T,) between 0 and S - 1.

    Brightness is interpolated between two slices, labels are those of the nearest one.
    sway  (T, 3): shift down and to the right, as shares of half the side, and roll in degrees
    """
    low = torch.from_numpy(np.floor(places)).long().clamp(0, len(images) - 1)
    high = (low + 1).clamp_max(len(images) - 1)
    share = torch.from_numpy(places).float() - low
    frames = torch.lerp(images[low], images[high], share[:, None, None])
    angle = sway[:, 2] * torch.pi / 180
    rows = [
        torch.stack([angle.cos(), -angle.sin(), sway[:, 1]], 1),
        torch.stack([angle.sin(), angle.cos(), sway[:, 0]], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [len(frames), 1, *frames.shape[1:]], align_corners=False)
    frames = F.grid_sample(frames[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
    nearest = labels[torch.from_numpy(np.rint(places)).long()]
    moved = F.grid_sample(nearest[:, None].float(), grid, mode="nearest", align_corners=False)[:, 0]
    return frames, moved.to(torch.uint8)


def disturbed(frame: np.ndarray, kind: str, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A frame (H, W) with values from 0 to 1, disturbed with a strength from 0 to 1."""
    match kind:
        case "blur":
            return ndimage.gaussian_filter(frame, strength * 0.06 * frame.shape[0])
        case "darkness":
            return frame * (1 - 0.95 * strength)
        case "haze":
            return frame + 0.85 * strength * (0.8 - frame)
        case "noise":
            return frame + rng.normal(0, 0.25 * strength, frame.shape)
    raise ValueError(f"There is no disturbance {kind!r}; known: {', '.join(DISTURBANCES)}.")


def bursts_of(frames: int, many: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of disturbances (T,), -1 for none, and strengths (T,): each burst grows and fades.

    many  bursts in a hundred frames, on average
    """
    kinds, strengths = np.full(frames, -1), np.zeros(frames)
    for _ in range(rng.poisson(many * frames / 100)):
        length, kind = rng.integers(*BURST, endpoint=True), rng.integers(len(DISTURBANCES))
        start = rng.integers(max(1, frames - length))
        part = slice(start, start + length)
        height = rng.uniform(0.6, 1.0) * np.sin(np.pi * (np.arange(length) + 0.5) / length)[: frames - start] ** 0.5
        kinds[part], strengths[part] = kind, height
    return kinds, strengths


def with_bursts(frames: Tensor, many: float, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
    """Frames (T, H, W), some of them disturbed, and `bursts` (T,) of a `Flight`."""
    kinds, strengths = bursts_of(len(frames), many, rng)
    low, high = frames.min(), frames.max()
    scaled = ((frames - low) / (high - low).clamp_min(1e-6)).numpy().copy()
    for number in np.flatnonzero(kinds >= 0):
        scaled[number] = disturbed(scaled[number], DISTURBANCES[kinds[number]], strengths[number], rng)
    return torch.from_numpy(scaled).float() * (high - low) + low, kinds


def sliced(case: Case, axis: int) -> Case:
    """The case with one axis of its volume first; planes across another than the first axis stand upright."""
    image, label = np.moveaxis(case.image, 1 + axis, 1), np.moveaxis(case.label, axis, 0)
    if axis:
        image, label = image.swapaxes(2, 3)[:, :, ::-1], label.swapaxes(1, 2)[:, ::-1]
    return replace(case, image=np.ascontiguousarray(image), label=np.ascontiguousarray(label))


@dataclass(frozen=True)
class Flown(Preparation):
    """A case is `versions` flights, which its name decides: (versions, 1, T, H, W) and labels (versions, T, H, W).

    size     (T, H, W) of a flight
    axis, margin  see `AXES` and `MARGIN`
    many     disturbances in a hundred frames, on average
    centres  whether each patient is filmed by one of `CENTRES`, else by the first
    """

    axis: int = 0
    margin: int = 0
    versions: int = 1
    many: float = 2.5
    centres: bool = False

    @property
    def plane(self) -> Preparation:
        """The preparation of a slice."""
        return Preparation(self.size[1:], self.long_side, self.centre, self.smooth)

    def slices(self, case: Case) -> tuple[Tensor, Tensor]:
        """The slices (S, H, W) that a camera passes, with the margin, and their label maps (S, H, W)."""
        turned = sliced(case, self.axis)
        images, labels = self.plane.images(turned)[:, 0], self.plane.labels(turned)
        ends = (0, 0, 0, 0, self.margin, self.margin)
        return F.pad(images, ends, value=float(images.min())), F.pad(labels, ends)

    def flights(self, case: Case) -> list[Flight]:
        """All flights through a case."""
        rng = np.random.default_rng(crc32(f"flights through {case.case_id}".encode()))
        images, labels = self.slices(case)
        return [self.flight(images, labels, case.patient_id, rng) for _ in range(self.versions)]

    def flight(self, images: Tensor, labels: Tensor, patient: str, rng: np.random.Generator) -> Flight:
        """One flight through slices (S, H, W) with label maps (S, H, W)."""
        frames = self.size[0]
        places = course(frames, rng) * (len(images) - 1)
        sway = np.stack(
            [2 * DRIFT * wander(frames, rng), 2 * DRIFT * wander(frames, rng), ROLL * wander(frames, rng)], 1
        )
        seen, moved = filmed(images, labels, places, torch.from_numpy(sway).float())
        if self.centres and centre_of(patient):
            seen = shown(seen[:, None], CENTRES[centre_of(patient)], rng.spawn(1)[0])[:, 0]
        seen, kinds = with_bursts(seen, self.many, rng)
        return Flight(zscore(seen), moved, np.rint(places).astype(int), kinds)

    def both(self, case: Case) -> tuple[Tensor, Tensor]:
        """Images (versions, 1, T, H, W) and label maps (versions, T, H, W)."""
        flights = self.flights(case)
        return torch.stack([one.frames[None] for one in flights]), torch.stack([one.labels for one in flights])

    def images(self, case: Case) -> Tensor:
        return self.both(case)[0]

    def labels(self, case: Case, values: np.ndarray | None = None) -> Tensor:
        return self.both(case)[1]


def centre_of(patient: str) -> int:
    """The number of the centre that films a patient."""
    return crc32(f"centre of {patient}".encode()) % len(CENTRES)


@dataclass(frozen=True)
class FlightTask(CohortTask):
    """Flights of `frames` frames of `side` x `side` pixels; the labels are those of the structures in every frame.

    Flights are on a grid of their own: `FlightTask.preparation` cannot restore them to the case's.
    """

    frames: int = 48
    side: int = 40
    versions: int = 1
    many: float = 2.5
    centres: bool = False

    preparer = Flown

    @cached_property
    def preparation(self) -> Flown:
        plain = self.plane
        kept = {part.name: getattr(plain, part.name) for part in fields(Preparation)} | {
            "size": (self.frames, *plain.size)
        }
        axis, margin = AXES.get(self.dataset, 0), MARGIN.get(self.dataset, 0)
        return self.preparer(**kept, axis=axis, margin=margin, **self.settings)

    @property
    def settings(self) -> dict:
        """What the preparation has to know besides."""
        return {"versions": self.versions, "many": self.many, "centres": self.centres}

    @property
    def plane(self) -> Preparation:
        """How a slice is prepared: as the book's slices, smaller; of a hippocampus's, a pixel is a millimetre."""
        if self.dataset == "hippocampus":
            return Preparation((self.side, self.side))
        return small(preparation_for(self.dataset), self.side)

    @property
    def data_kind(self) -> str:
        """What evidence on it counts as."""
        return "simulated" if self.data.manifest.simulated else "real-anatomy-simulated"
