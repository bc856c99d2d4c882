"""STL: both kinds of file, the inside of closed surfaces against closed forms, and what is wrong with other files."""

import numpy as np
import pytest
from stl_files import binary, box, in_words

from medcook.data.readers.stl import FINEST, LONGEST, open_edges, read_solid, read_stl, voxelised
from medcook.errors import MedcookError
from medcook.recipes.anatomy._shapes import Shape


def ball(radius: float, steps: int = 60) -> np.ndarray:
    """(T, 3, 3): a ball around the origin, by rings of latitude; corners lie on the sphere."""
    height = np.linspace(0, np.pi, steps + 1)
    around = np.arange(2 * steps) * np.pi / steps
    grid = np.stack(
        [
            np.sin(height)[:, None] * np.cos(around),
            np.sin(height)[:, None] * np.sin(around),
            np.broadcast_to(np.cos(height)[:, None], (steps + 1, 2 * steps)),
        ],
        axis=-1,
    )
    grid[0], grid[-1] = [0, 0, 1], [0, 0, -1]
    turned = np.roll(grid, -1, axis=1)
    a, b, c, d = grid[:-1], grid[1:], turned[:-1], turned[1:]
    quads = np.concatenate([np.stack([a, b, d], 2).reshape(-1, 3, 3), np.stack([a, d, c], 2).reshape(-1, 3, 3)])
    return (radius * quads).astype(np.float32).astype(float)


def tight(voxels: np.ndarray) -> np.ndarray:
    """Voxels without the empty layers around them."""
    found = np.argwhere(voxels)
    return voxels[tuple(slice(low, high + 1) for low, high in zip(found.min(0), found.max(0), strict=True))]


def volume(triangles: np.ndarray) -> float:
    solid = voxelised(triangles)
    return float(solid.voxels.sum() * solid.spacing**3)


@pytest.mark.parametrize("write", [binary, in_words])
def test_both_kinds_of_file_hold_the_same_triangles(tmp_path, write):
    triangles = ball(9, 12)
    (tmp_path / "a.stl").write_bytes(write(triangles))
    found = read_stl(tmp_path / "a.stl")
    assert found.dtype == np.float32 and found.shape == triangles.shape
    assert np.array_equal(found, triangles.astype(np.float32))
    assert np.array_equal(read_solid(tmp_path / "a.stl").voxels, voxelised(triangles).voxels)


def test_a_binary_file_may_begin_as_an_ascii_one_does(tmp_path):
    (tmp_path / "a.stl").write_bytes(binary(box(), header=b"solid of a program that does not know better"))
    assert read_stl(tmp_path / "a.stl").shape == (12, 3, 3)


@pytest.mark.parametrize("size", [(10, 10, 10), (1, 2, 3), (17, 4, 9)])
def test_a_box_is_exact_and_has_one_empty_layer_around(size):
    solid = voxelised(box(high=size))
    assert solid.spacing == FINEST and solid.voxels.shape == tuple(side + 2 for side in size)
    assert solid.voxels[1:-1, 1:-1, 1:-1].all() and solid.voxels.sum() == np.prod(size)
    assert solid.origin == (-0.5, -0.5, -0.5), "the middle of the first voxel"


@pytest.mark.parametrize("radius", [12, 20, 50, 200])
def test_a_ball_has_the_volume_of_a_ball(radius):
    assert volume(ball(radius)) == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.02)


@pytest.mark.parametrize(("longest", "spacing"), [(100, 1), (126, 1), (252, 2), (315, 2.5)])
def test_large_shapes_get_larger_voxels_and_no_side_more_than_128(longest, spacing):
    solid = voxelised(box(high=(longest, 20, 40)))
    assert solid.spacing == pytest.approx(spacing) and max(solid.voxels.shape) <= LONGEST == 128
    assert solid.voxels.shape[0] == longest / spacing + 2
    assert solid.voxels.sum() * spacing**3 == pytest.approx(longest * 20 * 40)


def test_the_winding_of_triangles_does_not_matter():
    triangles, rng = ball(15, 20), np.random.default_rng(0)
    turned = np.stack([corners[rng.permutation(3)] for corners in triangles])
    assert not open_edges(turned)
    assert np.array_equal(voxelised(turned).voxels, voxelised(triangles).voxels)


@pytest.mark.parametrize("move", [(0.5, 0, 0), (0.31, -7.4, 1234.56), (-100, 1e-3, 2 / 3)])
def test_a_shift_moves_the_origin_alone(move):
    """To float32, as files hold it: voxels whose middle the surface touches may change sides."""
    triangles = ball(15, 20)
    moved = (triangles + move).astype(np.float32).astype(float)
    one, other = voxelised(triangles), voxelised(moved)
    assert one.voxels.shape == other.voxels.shape and (one.voxels != other.voxels).sum() <= 10
    assert np.subtract(other.origin, one.origin) == pytest.approx(move, abs=1e-3)


def test_axes_are_x_y_z_and_each_voxel_lies_where_it_should():
    """Of an ellipsoid off the origin: inside by its equation, all but where the surface passes a voxel's middle."""
    axes, middle = np.array([8.3, 13.7, 5.1]), np.array([3.0, -20.0, 7.5])
    solid = voxelised(ball(1) * axes + middle)
    places = np.moveaxis(np.indices(solid.voxels.shape), 0, -1) * solid.spacing + solid.origin
    far = np.linalg.norm((places - middle) / axes, axis=-1)
    assert solid.voxels[far < 0.98].all() and not solid.voxels[far > 1].any()


@pytest.mark.parametrize("seed", range(5))
def test_voxels_of_a_mesh_of_voxels_are_those_voxels(seed, tmp_path):
    """Marching cubes puts corners and edges right on the rays, and random voxels touch in all ways."""
    mask = np.random.default_rng(seed).random((9, 8, 7)) < (0.5 if seed else 2)
    shape = Shape(mask)
    (tmp_path / "a.stl").write_bytes(binary(shape.corners))
    solid = read_solid(tmp_path / "a.stl")
    assert np.array_equal(tight(solid.voxels), tight(mask))
    first = np.argwhere(mask).min(0) - np.argwhere(solid.voxels).min(0)
    assert solid.origin == pytest.approx(tuple(first), abs=1e-5)


def test_a_ball_goes_through_mesh_and_file_and_back(tmp_path):
    axes = np.meshgrid(*[np.arange(-12, 13)] * 3, indexing="ij")
    mask = sum(axis**2 for axis in axes) <= 11**2
    for write in (binary, in_words):
        (tmp_path / "ball.stl").write_bytes(write(Shape(mask, (1.0, 1.0, 1.0)).corners))
        solid = read_solid(tmp_path / "ball.stl")
        assert np.array_equal(tight(solid.voxels), tight(mask)) and solid.spacing == 1


def test_a_surface_within_a_surface_is_a_hollow():
    triangles = np.concatenate([box(high=(10, 10, 10)), box((3, 3, 3), (7, 7, 7))])
    assert voxelised(triangles).voxels.sum() == 1000 - 64
    assert voxelised(np.concatenate([box(high=(4, 4, 4)), box((6, 0, 0), (9, 4, 4))])).voxels.sum() == 64 + 48


def test_an_open_edge_is_one_with_an_odd_number_of_triangles():
    assert open_edges(box()) == 0 and open_edges(box()[1:]) == 3 and open_edges(box()[2:]) == 4
    flat = np.array([[[0, 0, 0], [0, 0, 0], [1, 1, 1]]])
    assert open_edges(np.concatenate([box(), flat])) == 0, "a triangle without area opens nothing"
    fin = np.array([[[0, 0, 0], [0, 0, 1], [-1, -1, 0]]])
    assert open_edges(np.concatenate([box(), fin])) == 3, "two of the fin's own, and one of three triangles"
    assert open_edges(np.where(box() == 0, -0.0, box())) == 0


WHOLE, WORDS = binary(box(high=(9, 9, 9))), in_words(box(high=(9, 9, 9)))
NAN = binary(np.where(box() == 1, np.nan, box()))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>" + b" not found" * 20, "neither an ASCII STL file nor a whole binary one"),
        (b"short", "neither an ASCII STL file nor a whole binary one"),
        (WHOLE[:-7], "takes 684 bytes for the 12 triangles that it declares, and has 677"),
        (WHOLE[:80] + b"\xff\xff\xff\xff" + WHOLE[84:], "4294967295 triangles that it declares, and has 684"),
        (binary(box()[:0]), "an STL file without triangles"),
        (b"solid nothing\nendsolid nothing\n", "an STL file without triangles"),
        (NAN, "NaN or infinite"),
        (WORDS.replace(b"9.00000000e+00", b"nan"), "NaN or infinite"),
        (WORDS.replace(b"9.00000000e+00", b"1e99"), "NaN or infinite"),
        (WORDS[: len(WORDS) // 2], "an ASCII STL file that is truncated or damaged"),
        (WORDS.replace(b"endfacet", b"", 1), "an ASCII STL file that is truncated or damaged"),
        (WORDS.replace(b"endsolid a name", b""), "an ASCII STL file that is truncated or damaged"),
        (WORDS.replace(b"9.00000000e+00", b"nine", 1), "not a readable ASCII STL file"),
        (WORDS.replace(b"9.00000000e+00", b"", 1), "not a readable ASCII STL file"),
        (binary(box(high=(9, 9, 9))[1:]), "an open surface has no inside, and at 3 edges this one is open"),
        (binary(box(high=(9, 9, 0.2))), "the surface encloses the middle of no voxel of 1 mm"),
        (binary(box(high=(9, 9, 0))), "the surface encloses the middle of no voxel of 1 mm"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_that_names_the_file(tmp_path, content, said):
    (tmp_path / "bad.stl").write_bytes(content)
    with pytest.raises(MedcookError) as caught:
        read_solid(tmp_path / "bad.stl")
    assert caught.value.problem.startswith(f"{tmp_path / 'bad.stl'}: ") and said in caught.value.problem
    assert "\n" not in caught.value.problem and caught.value.hint


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MedcookError, match="none.stl: not a readable STL file"):
        read_stl(tmp_path / "none.stl")
