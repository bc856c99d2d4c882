"""STL: a surface of triangles as stored, and the voxels that it encloses.

A binary file has 80 bytes of header, the number of triangles, and 50 bytes for each: its normal, three corners, and an
attribute. An ASCII file says the same in words. Neither knows a unit: lengths are taken for mm.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medcook.data.readers.damage import readable
from medcook.errors import MedcookError

HEADER = 84
TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
FACET = [b"facet", b"outer", b"vertex", b"vertex", b"vertex", b"endloop", b"endfacet"]
"""How the lines of a triangle begin in an ASCII file."""
FINEST = 1.0
"""Voxel size in mm, where the shape is not too large for it."""
LONGEST = 128
"""Most voxels along a side; a larger shape gets larger voxels."""
ROUNDING = 1e-4
"""In voxels: by so little a shape may reach beyond its last voxel, for corners are rounded to float32."""
AGAIN = "Get it again, or leave it out."


@dataclass(frozen=True)
class Solid:
    """What a surface encloses: `voxels` (X, Y, Z) bool, cubes of `spacing` mm.

    origin  the middle of the first voxel in the coordinates of the file, (x, y, z) in mm
    """

    voxels: np.ndarray
    spacing: float
    origin: tuple[float, float, float]


def read_solid(path: Path) -> Solid:
    """The inside of a file's surface; MedcookError when the file is damaged, or the surface open or without inside."""
    triangles = read_stl(path).astype(float)
    if count := open_edges(triangles):
        problem = f"{path}: an open surface has no inside, and at {count} edges this one is open"
        raise MedcookError(f"{problem}.", "Close it with a program for meshes, or leave it out.")
    solid = voxelised(triangles)
    if not solid.voxels.any():
        problem = f"{path}: the surface encloses the middle of no voxel of {solid.spacing:g} mm"
        raise MedcookError(f"{problem}.", "Scale it to mm, or leave it out.")
    return solid


def read_stl(path: Path) -> np.ndarray:
    """(T, 3, 3) float32: (x, y, z) of three corners a triangle; MedcookError when the file is damaged."""
    with readable(path, "STL file", AGAIN):
        content = path.read_bytes()
    if not content:
        raise MedcookError(f"{path}: the file is empty.", AGAIN)
    count = int.from_bytes(content[80:HEADER], "little")
    expected = HEADER + count * TRIANGLE.itemsize
    if len(content) == expected:
        triangles = np.frombuffer(content, TRIANGLE, count, HEADER)["corners"]
    elif content[:HEADER].lstrip()[:5].lower() == b"solid":
        triangles = from_words(content, path)
    else:
        problem = (
            f"{path}: neither an ASCII STL file nor a whole binary one, which takes {expected} bytes for the {count}"
        )
        raise MedcookError(f"{problem} triangles that it declares, and has {len(content)}.", AGAIN)
    if not len(triangles):
        raise MedcookError(f"{path}: an STL file without triangles.", AGAIN)
    if not np.isfinite(triangles).all():
        raise MedcookError(f"{path}: a corner of a triangle is NaN or infinite.", AGAIN)
    return triangles


def from_words(content: bytes, path: Path) -> np.ndarray:
    """The triangles (T, 3, 3) float32 of an ASCII file."""
    lines = [line.split() for line in content.lower().splitlines()]
    words = [line[0] for line in lines if line]
    facets = [word for word in words if word not in (b"solid", b"endsolid")]
    if words[-1] != b"endsolid" or facets != FACET * (len(facets) // len(FACET)):
        raise MedcookError(f"{path}: an ASCII STL file that is truncated or damaged.", AGAIN)
    with readable(path, "ASCII STL file", AGAIN, quoting=False), np.errstate(over="ignore"):
        corners = [[float(number) for number in line[1:]] for line in lines if line[:1] == [b"vertex"]]
        return np.array(corners).reshape(len(facets) // len(FACET), 3, 3).astype(np.float32)


def open_edges(triangles: np.ndarray) -> int:
    """How many edges of a surface (T, 3, 3) have an odd number of triangles: 0 where it is closed, in any winding.

    Corners are the same where they agree to the last bit, as they do in files that are written from a mesh.
    """
    corners = numbered(triangles.reshape(-1, 3)).reshape(-1, 3)
    edges = np.sort(np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [2, 0]]]), axis=1)
    edges = edges[edges[:, 0] != edges[:, 1]]
    counts = np.bincount(numbered(edges)) if len(edges) else np.zeros(0, int)
    return int((counts % 2).sum())


def numbered(rows: np.ndarray) -> np.ndarray:
    """(N,) whole numbers, the same for rows of (N, D) that are the same; faster than np.unique over rows."""
    numbers = np.zeros(len(rows), np.int64)
    for column in rows.T:
        values, index = np.unique(column, return_inverse=True)
        numbers = np.unique(numbers * len(values) + index, return_inverse=True)[1]
    return numbers


def voxelised(triangles: np.ndarray) -> Solid:
    """The voxels whose middle lies inside a closed surface (T, 3, 3) in mm, and a layer of empty ones around them.

    Voxels begin at the least coordinates of the surface. They are cubes of `FINEST` mm, or so large that no side has
    more than `LONGEST`. Inside is what a ray along x reaches after an odd number of crossings.
    """
    low, size = triangles.min((0, 1)), np.ptp(triangles, axis=(0, 1))
    spacing = max(FINEST, float(size.max()) / (LONGEST - 2))
    shape = np.maximum(np.ceil(size / spacing - ROUNDING), 1).astype(int)
    places = (triangles - low) / spacing - 0.5  # the middle of voxel k is at k
    upwards = np.take_along_axis(places, places[:, :, 2].argsort(axis=1, kind="stable")[:, :, None], axis=1)
    voxels = np.stack([inside_plane(upwards, z, shape[:2]) for z in range(shape[2])], axis=2)
    return Solid(np.pad(voxels, 1), spacing, tuple((low - spacing / 2).tolist()))


def inside_plane(triangles: np.ndarray, z: int, shape: np.ndarray) -> np.ndarray:
    """(X, Y) bool: which points with whole coordinates in the plane z lie inside a closed surface.

    triangles  (T, 3, 3), the corners of each from its lowest to its highest

    Each triangle cuts the plane in a segment, each segment the rays along x in points. An end is counted on one side
    alone, and is computed alike for both triangles that share it, so rays through edges and corners are none too many.
    """
    a, b, c = triangles[(triangles[:, 0, 2] <= z) & (z < triangles[:, 2, 2])].swapaxes(0, 1)
    above = (b[:, 2] <= z)[:, None]
    ends = np.stack([at(z, 2, a, c), at(z, 2, np.where(above, b, a), np.where(above, c, b))], axis=1)
    ends = np.take_along_axis(ends, ends[:, :, 1].argsort(axis=1, kind="stable")[:, :, None], axis=1)
    first, stop = np.ceil(ends[:, :, 1]).astype(int).T
    counts = stop - first
    y = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts - first, counts)
    ends = np.repeat(ends, counts, axis=0)
    x = np.ceil(at(y, 1, ends[:, 0], ends[:, 1])[:, 0]).astype(int)
    columns, rows = int(shape[0]), int(shape[1])
    crossed = np.bincount(x * rows + y, minlength=(columns + 1) * rows).reshape(columns + 1, rows)
    return crossed[:-1].cumsum(axis=0) % 2 == 1


def at(value, axis: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(N, D): the points on lines from `low` to `high` (N, D) whose coordinate on this axis has the value(s)."""
    share = (value - low[:, axis]) / (high[:, axis] - low[:, axis])
    return low + share[:, None] * (high - low)
