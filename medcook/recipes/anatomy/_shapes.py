"""A structure of a case as a shape: voxels, a closed triangle mesh, and points on its surface."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes

from medcook import metrics
from medcook.data import Case
from medcook.errors import MedcookError


@dataclass(frozen=True)
class Shape:
    """One structure as voxels (*size) bool, as a closed mesh, and as points; lengths in mm, in voxels without spacing.

    The middle of the first voxel is the origin.
    """

    voxels: np.ndarray
    spacing: tuple[float, ...] | None = None
    name: str = "shape"

    def __post_init__(self):
        if not self.voxels.any():
            raise MedcookError(f"{self.name}: an empty mask has no shape.", "Leave the structure out.")

    @cached_property
    def mesh(self) -> tuple[np.ndarray, np.ndarray]:
        """Vertices (V, 3) and triangles (T, 3), seen from outside anticlockwise; closed also at the volume's border."""
        spacing = self.spacing or (1.0, 1.0, 1.0)
        found = marching_cubes(np.pad(self.voxels, 1).astype(np.float32), 0.5, spacing=spacing)
        return found[0].astype(float) - spacing, found[1][:, ::-1]

    @cached_property
    def corners(self) -> np.ndarray:
        """(T, 3, 3): the three corners of each triangle."""
        vertices, triangles = self.mesh
        return vertices[triangles]

    @cached_property
    def areas(self) -> np.ndarray:
        """(T,): the area of each triangle."""
        a, b, c = self.corners.swapaxes(0, 1)
        return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2

    @property
    def volume(self) -> float:
        """What the mesh encloses, by the divergence theorem: tetrahedra from the origin to each triangle, signed."""
        a, b, c = self.corners.swapaxes(0, 1)
        return float((a * np.cross(b, c)).sum() / 6)

    @property
    def facts(self) -> dict[str, float | str]:
        """What is known of the shape: its name, volume, area, and the unit of lengths."""
        area = float(self.areas.sum())
        return {"name": self.name, "volume": self.volume, "area": area, "unit": metrics.unit(self.spacing)}

    def points(self, count: int, seed: int = 0) -> np.ndarray:
        """(count, 3): random points on the mesh, everywhere equally dense."""
        rng = np.random.default_rng(seed)
        chosen = rng.choice(len(self.areas), count, p=self.areas / self.areas.sum())
        first, second = rng.random((2, count, 1))
        first = np.sqrt(first)  # the distance from corner a: a triangle is wider the farther from it
        a, b, c = self.corners[chosen].swapaxes(0, 1)
        return (1 - first) * a + first * ((1 - second) * b + second * c)


def load_shape(case: Case, value: int, name: str = "") -> Shape:
    """The structure of a case (a volume) that has this label value."""
    return Shape(case.label == value, case.spacing, f"{case.case_id}, {name or f'structure {value}'}")


def chamfer(one: np.ndarray, other: np.ndarray) -> float:
    """Mean distance from points (N, 3) to the nearest of others (M, 3), and back: the mean of both directions."""
    return float(cKDTree(other).query(one)[0].mean() + cKDTree(one).query(other)[0].mean()) / 2
