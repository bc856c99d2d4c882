"""What chapter 09 looks at: what is seen of a cube, planes in their proportions, slices against closed forms."""

import numpy as np
import pytest

from medcook import metrics, volumes, widgets
from medcook.data import Case
from medcook.data.manifests import load_manifest

MANIFEST = load_manifest("hippocampus")


def ball(radius: float, shape=(16, 20, 12), spacing=(1.0, 2.0, 3.0)) -> Case:
    """A volume with one structure: a ball in voxels."""
    distance = np.sqrt(sum((axis - side // 2) ** 2 for axis, side in zip(np.indices(shape), shape, strict=True)))
    image = np.random.default_rng(0).random((1, *shape), dtype=np.float32)
    label = (distance <= radius).astype(np.uint8)
    return Case(image=image, label=label, spacing=spacing, case_id="ball", patient_id="p1")


def test_what_each_scheme_sees():
    counts = {sight: int(volumes.seen_voxels(sight, 7).sum()) for sight in volumes.SIGHTS}
    assert list(counts.values()) == [49, 147, 3 * 49 - 3 * 7 + 1, 245, 27]
    assert all(volumes.seen_voxels(sight, 7)[3, 3, 3] or "other" in sight for sight in volumes.SIGHTS)


def test_a_plane_is_a_slice_with_the_later_axis_upwards():
    volume = np.arange(24).reshape(2, 3, 4)
    assert np.array_equal(volumes.plane(volume, 0, 1), volume[1].T[::-1])
    assert np.array_equal(volumes.plane(volume, 2, 3), volume[:, :, 3].T[::-1])


@pytest.mark.parametrize(("axis", "wanted"), [(0, 3 / 2), (1, 3 / 1), (2, 2 / 1)])
def test_pixels_are_as_high_as_the_later_axis_is_coarse(axis, wanted):
    assert volumes.aspect((1.0, 2.0, 3.0), axis) == wanted
    assert volumes.aspect(None, axis) == 1


def test_the_slice_with_most_errors():
    case, answer = ball(4), ball(4).label.copy()
    answer[3, 5, 7:9] = 1
    answer[3, 9, 8] = 1
    assert volumes.most_wrong(case, [answer, case.label]) == (3, 5, 8)
    assert volumes.most_wrong(case, []) == (8, 10, 6)  # the middle of the ball


def test_jumps_of_a_box_are_its_faces():
    label = np.zeros((10, 10, 10), np.uint8)
    label[2:5, 2:6, 2:7] = 1
    assert [volumes.jumps(label, axis) for axis in range(3)] == [2 * 4 * 5, 2 * 3 * 5, 2 * 3 * 4]


def test_an_answer_with_every_other_slice_empty_is_ragged_along_that_axis_alone():
    case = ball(4)
    ragged = case.label.copy()
    ragged[:, :, ::2] = 0
    table = volumes.jump_table([case, case], {"same": [case.label] * 2, "ragged": [ragged] * 2})
    assert table.loc["same"].tolist() == [1, 1, 1]
    assert table.loc["ragged", "along the third axis"] > 2
    assert (table.loc["ragged"][:2] < 1).all()


def test_slices_are_scored_from_both_ends():
    case = ball(3)
    answer = case.label.copy()
    answer[:, :, case.label.any((0, 1)).argmax()] = 0
    table = volumes.slice_scores(case, answer, axis=2)
    assert table["from_end"].tolist() == [0, 1, 2, 3, 2, 1, 0]
    assert table["dice"].tolist() == [0, 1, 1, 1, 1, 1, 1]


def test_a_slice_has_the_dice_of_its_masks():
    case, other = ball(4), np.roll(ball(4).label, 1, axis=0)
    table = volumes.slice_scores(case, other, axis=1)
    numbers = np.flatnonzero(case.label.any((0, 2)))
    wanted = [metrics.dice(other[:, n] == 1, case.label[:, n] == 1) for n in numbers]
    assert table["dice"].tolist() == wanted


def test_a_case_without_structures_has_no_slices():
    case = ball(-1)
    assert volumes.slice_scores(case, case.label, 0).empty


def test_the_figure_of_ends_shows_the_means():
    case = ball(3)
    answers = {"all": [case.label, case.label], "none": [case.label * 0, case.label * 0]}
    figure = volumes.ends_figure([case, case], answers, 2, "hippocampus")
    for line, wanted in zip(figure.axes[0].containers, (1, 0), strict=True):
        assert np.allclose(line[0].get_ydata(), wanted)
        assert np.allclose(np.array(line[0].get_xdata(), float).round(), range(4))


def test_figures_are_drawn():
    case = ball(4)
    assert len(volumes.sights_figure({"one slice": "2D"}).axes) == len(volumes.SIGHTS)
    grid = volumes.planes_figure(case, {"a": case.label, "b": case.label * 0}, MANIFEST)
    assert len(grid.axes) == 9 and grid.axes[0].get_aspect() == 1.5
    alone = volumes.planes_figure(case, {}, MANIFEST)
    assert [axes.get_aspect() for axes in alone.axes] == [1.5, 3.0, 2.0]
    view = volumes.plane_view(case, case.label, 2, 99, MANIFEST, "a")
    assert "slice 11" in view.axes[0].get_title()


def test_the_explorer_redraws():
    case = ball(4)
    box = widgets.plane_explorer(case, {"a": case.label, "b": case.label * 0}, MANIFEST)
    (which, axis, number), image = box.children[0].children, box.children[1]
    assert [which.value, axis.value, number.value] == ["a", 0, 8]
    before = image.value
    axis.value = 2
    assert number.max == 11 and number.value <= 11 and image.value != before
    before = image.value
    which.value = "b"
    assert image.value != before
