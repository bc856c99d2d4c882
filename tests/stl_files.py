"""Small surfaces, and STL files of them."""

import itertools
import struct

import numpy as np

SQUARES = {0: ((0, 1, 2), (1, 3, 2)), 1: ((0, 2, 1), (1, 2, 3))}


def box(low=(0, 0, 0), high=(1, 1, 1)) -> np.ndarray:
    """(12, 3, 3): the triangles of a box, seen from outside anticlockwise."""
    triangles = []
    for axis, side in itertools.product(range(3), (0, 1)):
        first, second = (axis + 1) % 3, (axis + 2) % 3
        square = np.zeros((4, 3))
        square[:, axis], square[[1, 3], first], square[[2, 3], second] = side, 1, 1
        triangles += [square[list(corners)] for corners in SQUARES[1 - side]]
    low, high = np.asarray(low, float), np.asarray(high, float)
    return low + np.array(triangles) * (high - low)


def binary(triangles: np.ndarray, header: bytes = b"") -> bytes:
    """A binary file of triangles (T, 3, 3), without normals."""
    facets = b"".join(bytes(12) + corners.astype("<f4").tobytes() + bytes(2) for corners in triangles)
    return header.ljust(80, b" ") + struct.pack("<I", len(triangles)) + facets


def in_words(triangles: np.ndarray) -> bytes:
    """An ASCII file of triangles (T, 3, 3), as programs write them."""
    facets = ("".join(f"   vertex {x:.8e} {y:.8e} {z:.8e}\n" for x, y, z in corners) for corners in triangles)
    text = "".join(f" facet normal 0 0 0\n  outer loop\n{lines}  endloop\n endfacet\n" for lines in facets)
    return f"solid a name of several words\n{text}endsolid a name\n".encode()
