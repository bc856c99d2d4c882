"""MedShapeNet: shapes in their three forms, and how a part that was cut away is completed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from skimage.measure import euler_number, mesh_surface_area

from medcook import metrics
from medcook.data import IGNORE, Case
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.preparation import Preparation
from medcook.recipes.anatomy import medshapenet
from medcook.recipes.anatomy._shapes import Shape, chamfer, load_shape
from medcook.recipes.anatomy.medshapenet import (
    CUTS,
    Completion,
    NearestShapes,
    completion_rows,
    draw_cut,
    fit,
    shifted,
    spectrum,
)

SMALL = (4, 4, 4, 4)
SIZE = (16, 16, 16)
NOW = Moment(0, 10)


def ball(radius: float, spacing=(1.0, 1.0, 1.0), side: float = 12) -> np.ndarray:
    """A ball of this radius in mm in the middle of a cube of 2 side + 1 mm."""
    axes = [np.arange(-side, side + 1e-6, step) for step in spacing]
    return sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij")) <= radius**2


def blocks(first: int = 4) -> torch.Tensor:
    """(16, 16, 16) labels: a box of 1 and behind it a box of 2."""
    label = torch.zeros(SIZE, dtype=torch.uint8)
    label[first : first + 5, 4:12, 5:10] = 1
    label[first + 5 : first + 8, 5:11, 5:10] = 2
    return label


def case_of(label: torch.Tensor, number: int = 0, spacing=(2.0, 1.0, 1.0)) -> Case:
    return Case(np.zeros((1, *label.shape), np.float32), label.numpy(), f"p{number}", f"p{number}", spacing)


def trained(method, labels: list[torch.Tensor], classes: int = 3) -> SimpleNamespace:
    """What a score is handed: a method that was not trained, on a task with these training labels."""
    nets = method.build(1, classes, 3)
    task = SimpleNamespace(
        structures={1: "front", 2: "back"},
        classes=classes,
        preparation=Preparation(size=SIZE),
        samples=lambda role: SimpleNamespace(labels=torch.stack(labels)),
    )
    cost = {"precision": "float32"}
    return SimpleNamespace(method=method, task=task, nets=nets, weights={"last": nets.state_dict()}, cost=cost)


@pytest.mark.component("voxels")
def test_a_structure_of_a_case_is_loaded_with_what_is_known_of_it():
    shape = load_shape(case_of(blocks()), 2, "back")
    assert shape.voxels.sum() == 3 * 6 * 5 and shape.spacing == (2.0, 1.0, 1.0)
    assert shape.facts["name"] == "p0, back" and shape.facts["unit"] == "mm"
    assert all(np.isfinite(shape.facts[name]) and shape.facts[name] > 0 for name in ("volume", "area"))
    assert Shape(shape.voxels).facts["unit"] == "pixels"


@pytest.mark.component("voxels")
def test_an_empty_mask_is_refused_in_one_sentence():
    with pytest.raises(MedcookError, match="p0, structure 7: an empty mask has no shape"):
        load_shape(case_of(blocks()), 7)


@pytest.mark.component("mesh")
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.5, 0.75, 1.0)])
def test_the_mesh_of_a_ball_is_closed_and_as_large_as_the_ball(spacing):
    """Every edge is in two triangles, once in each direction; corners of voxels make the area up to a tenth larger."""
    voxels = ball(10, spacing)
    shape = Shape(voxels, spacing)
    vertices, triangles = shape.mesh
    edges = np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]])
    assert len(np.unique(edges, axis=0)) == len(edges)
    assert set(map(tuple, edges)) == set(map(tuple, edges[:, ::-1]))
    assert len(vertices) - len(edges) // 2 + len(triangles) == 2
    assert shape.volume == pytest.approx(voxels.sum() * np.prod(spacing), rel=0.02)
    assert shape.volume == pytest.approx(4 / 3 * np.pi * 10**3, rel=0.02)
    assert shape.facts["area"] == pytest.approx(mesh_surface_area(vertices, triangles))
    assert 1 <= shape.facts["area"] / (4 * np.pi * 10**2) < 1.12
    assert vertices.mean(0) == pytest.approx([12, 12, 12], abs=0.5)


@pytest.mark.component("mesh")
def test_a_mesh_is_closed_at_the_border_and_knows_a_hole_through_it():
    assert Shape(np.ones((3, 4, 5), bool)).volume == pytest.approx(60, rel=0.1)
    ring = ball(10) & ~(np.hypot(*np.meshgrid(np.arange(-12, 13), np.arange(-12, 13))) < 4)
    vertices, triangles = Shape(ring).mesh
    assert len(vertices) - len(triangles) // 2 == 0 == 2 * euler_number(ring, connectivity=3)


@pytest.mark.component("point cloud")
def test_points_are_as_dense_everywhere_on_the_surface():
    """On a box: in proportion to the area of its sides, and on a large triangle as its moments say."""
    voxels = np.zeros((12, 12, 12), bool)
    voxels[1:11, 1:11, 3:6] = True
    shape = Shape(voxels, (1.0, 1.0, 2.0))
    points, centres = shape.points(20000), shape.corners.mean(1)
    top = shape.areas[centres[:, 2] > 8].sum() / shape.areas.sum()
    left = shape.areas[centres[:, 0] < 3].sum() / shape.areas.sum()
    assert (points[:, 2] > 8).mean() == pytest.approx(top, abs=0.02)
    assert (points[:, 0] < 3).mean() == pytest.approx(left, abs=0.02)
    assert np.array_equal(points, shape.points(20000)) and not np.array_equal(points, shape.points(20000, seed=1))


@pytest.mark.component("point cloud")
def test_inside_a_triangle_points_have_its_centre_and_its_spread():
    """Of a uniform point in a triangle: mean of the corners, and covariance sum (corner - mean)^2 / 12."""
    shape = Shape(np.ones((1, 1, 1), bool))
    corners = np.array([[0.0, 0, 0], [3, 0, 0], [0, 6, 0]])
    vars(shape)["corners"], vars(shape)["areas"] = corners[None], np.array([9.0])
    points = shape.points(40000)
    apart = corners - corners.mean(0)
    assert points.mean(0) == pytest.approx(corners.mean(0), abs=0.03)
    assert np.cov(points.T) == pytest.approx(apart.T @ apart / 12, abs=0.05)


def test_the_chamfer_distance_is_that_of_all_pairs():
    one, other = np.random.default_rng(0).random((2, 40, 3))
    pairs = np.linalg.norm(one[:, None] - other[:30][None], axis=-1)
    assert chamfer(one, other[:30]) == pytest.approx((pairs.min(1).mean() + pairs.min(0).mean()) / 2)


@pytest.mark.component("shape completion")
@pytest.mark.parametrize("kind", CUTS)
def test_a_cut_takes_a_part_and_is_drawn_again_from_the_same_numbers(kind):
    mask = blocks() == 1
    shares = []
    for seed in range(20):
        cut = draw_cut(mask, kind, torch.Generator().manual_seed(seed))
        assert torch.equal(cut, draw_cut(mask, kind, torch.Generator().manual_seed(seed)))
        shares.append(float((cut & mask).sum() / mask.sum()))
    if kind == "whole":
        assert cut.all()
    else:
        assert 0.28 < min(shares) < 0.45 < 0.55 < max(shares) < 0.76 and not cut.all()


@pytest.mark.component("shape completion")
def test_cuts_are_half_spaces_and_balls():
    """What is cut and what is not are separated by a plane; no voxel of a ball is farther than one that is left."""
    mask = blocks() == 1
    places = torch.stack(torch.meshgrid(*[torch.arange(16)] * 3, indexing="ij"), -1).reshape(-1, 3).double()
    side = 2.0 * draw_cut(mask, "half-space", torch.Generator().manual_seed(3)).flatten().double() - 1
    design = torch.cat([places, torch.ones(len(places), 1)], dim=1)
    parted = linprog(np.zeros(4), -(side[:, None] * design).numpy(), -np.ones(len(places)), bounds=(None, None))
    assert parted.success
    drawn = draw_cut(mask, "ball", torch.Generator().manual_seed(3))
    ranks = [(places - centre).norm(dim=1) for centre in places[mask.flatten()]]
    assert any(far[drawn.flatten()].max() < far[~drawn.flatten()].min() for far in ranks)


@pytest.mark.component("multi-class anatomy completion")
def test_what_is_cut_away_is_not_seen_and_its_neighbours_are():
    label, cut = blocks(), torch.zeros(SIZE, dtype=torch.bool)
    cut[:7] = True
    front, back, no_front, no_back = Completion().partial(label, 1, cut, 3)
    assert torch.equal(front.bool(), (label == 1) & ~cut) and torch.equal(no_front.bool(), cut)
    assert torch.equal(back.bool(), label == 2) and not no_back.any()
    front, back, no_front, no_back = Completion(neighbours=False).partial(label, 1, cut, 3)
    assert torch.equal(front.bool(), (label == 1) & ~cut) and torch.equal(no_front.bool(), cut)
    assert not back.any() and no_back.all()


@pytest.mark.component("multi-class anatomy completion")
def test_one_structure_is_asked_for_where_it_was_cut():
    label = blocks()
    label[0] = IGNORE
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        partial, answer, value = Completion().example(label, 3)
        cut = partial[2 + value - 1].bool()
        seen.add(value)
        assert torch.equal(answer != IGNORE, cut & (label != IGNORE))
        assert torch.equal(answer == 1, cut & (label == value))
        assert torch.equal(partial[value - 1].bool() | (answer == 1), label == value)
    assert seen == {1, 2}
    _, answer, _ = Completion().example(torch.zeros_like(label), 3)
    assert (answer == IGNORE).all()


@pytest.mark.component("3D U-Net on partial labels")
@pytest.mark.parametrize("method", [Completion(channels=SMALL), Completion(channels=SMALL, neighbours=False)])
def test_it_learns_from_labels_alone_and_every_parameter_takes_part(method):
    nets = method.build(1, 3, 3)
    batch = Batch(torch.randn(4, 1, *SIZE), torch.stack([blocks(k) for k in (2, 3, 4, 5)]))
    torch.manual_seed(1)
    loss = method.training_step(nets, batch, None, NOW)
    torch.manual_seed(1)
    other = batch._replace(images=torch.zeros_like(batch.images))
    assert torch.equal(loss, method.training_step(nets, other, None, NOW))
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in nets["model"].parameters())
    nets = method.build(1, 4, 3).eval()
    for size in ((8, 16, 24), (9, 10, 11)):
        said = method.predict(nets, torch.randn(2, 1, *size))
        assert said.shape == (2, 4, *size) and torch.equal(said[0], said[1])
        assert said.sum(1) == pytest.approx(torch.ones(2, *size), abs=1e-5)


def test_the_ablation_has_the_same_all_but_the_neighbours():
    arms = {name: arm.method.settings() for name, arm in medshapenet.recipe.arms.items()}
    different = {key for key, value in arms["completed"].items() if arms["without neighbours"][key] != value}
    assert different == {"neighbours"}


@pytest.mark.component("shape prior")
def test_the_fit_is_that_of_every_shift_tried_in_turn():
    torch.manual_seed(0)
    shapes = torch.stack([torch.rand(2, 8, 16, 16) < 0.3, torch.rand(2, 8, 16, 16) < 0.6])
    shapes[:, :, [0, 1, -2, -1]] = shapes[:, :, :, [0, 1, 2, -3, -2, -1]] = False
    shapes[..., [0, 1, 2, -3, -2, -1]] = False
    target, unknown = shifted(shapes[0, 0], [1, -2, 1]), torch.zeros(2, 8, 16, 16)
    unknown[0, :, :8], unknown[1] = 1, 1
    seen = torch.stack([target, target]).float() * (1 - unknown)
    differ, shifts = fit(spectrum(shapes), seen, unknown)
    for number, shape in enumerate(shapes):
        tried = {
            (i, j, k): int(((torch.stack([shifted(s, [i, j, k]) for s in shape]) != seen) * (1 - unknown)).sum())
            for i in (-1, 0, 1)
            for j in (-2, -1, 0, 1, 2)
            for k in (-2, -1, 0, 1, 2)
        }
        assert int(differ[number]) == min(tried.values()) == tried[tuple(shifts[number].tolist())]
    assert differ[0] == 0 and shifts[0].tolist() == [1, -2, 1]


@pytest.mark.component("shape prior")
def test_the_majority_of_the_shapes_that_fit_best_completes():
    """A shape that was seen in training, shifted: it is found; the mean of all is another, and neighbours stay."""
    other = torch.zeros(SIZE, dtype=torch.uint8)
    other[2:14, 2:14, 2:5] = 1
    fitted = trained(NearestShapes(count=1), [other, other, blocks(4)])
    label = blocks(5)
    cut = torch.zeros(SIZE, dtype=torch.bool)
    cut[:8] = True
    partial = fitted.method.partial(label, 1, cut, 3)[None]
    assert torch.equal(fitted.method.complete(fitted, partial, 1)[0], label == 1)
    fitted.method.count = None
    mean = fitted.method.complete(fitted, partial, 1)[0]
    assert not torch.equal(mean, label == 1) and not (mean & (label == 2)).any()


@pytest.mark.component("completion benchmark")
def test_the_score_is_about_the_missing_part(monkeypatch):
    """Whoever answers with the truth has all of it, whoever answers nothing has none; what is seen does not count."""
    fitted, label = trained(Completion(channels=SMALL), [blocks()]), blocks()
    case = case_of(label)
    monkeypatch.setattr(Completion, "complete", lambda self, f, partial, value: (label == value).expand(3, *SIZE))
    rows = completion_rows(fitted, case)
    assert [row["structure"] for row in rows] == ["front", "back"]
    assert all(row["dice"] == row["dice_whole"] == 1 and not row["missed"] for row in rows)
    assert all(row["chamfer"] < 1 and row["unit"] == "mm" for row in rows)
    monkeypatch.setattr(Completion, "complete", lambda self, f, partial, value: partial[:, value - 1].bool())
    seen_alone = completion_rows(fitted, case)
    assert all(row["dice"] == row["dice_ball"] == row["dice_whole"] == 0 and row["missed"] for row in seen_alone)
    assert all(a["chamfer"] > b["chamfer"] for a, b in zip(seen_alone, rows, strict=True))
    assert not completion_rows(fitted, case_of(torch.zeros_like(label)))


@pytest.mark.component("completion benchmark")
def test_every_method_is_asked_the_same_and_a_case_always_so(monkeypatch):
    fitted, asked = trained(Completion(channels=SMALL), [blocks()]), []

    def complete(self, fitted, partial, value):
        asked.append(partial)
        return partial[:, value - 1].bool()

    monkeypatch.setattr(Completion, "complete", complete)
    completion_rows(fitted, case_of(blocks()))
    torch.rand(7)
    completion_rows(fitted, case_of(blocks()))
    completion_rows(fitted, case_of(blocks(), 1))
    assert torch.equal(asked[0], asked[2]) and torch.equal(asked[1], asked[3])
    assert not torch.equal(asked[0], asked[4])


@pytest.mark.component("completion benchmark")
def test_nothing_found_is_charged_the_diagonal():
    full = blocks() == 1
    assert medshapenet.distance(full & False, full, (2.0, 1.0, 1.0)) == metrics.diagonal(SIZE, (2.0, 1.0, 1.0))
    rows = completion_rows(trained(NearestShapes(count=1), [blocks()]), case_of(blocks()))
    assert all(row["dice"] == row["dice_whole"] == 1 for row in rows)
