"""What chapter 16 looks at: pictures of shapes that show what they are given."""

import numpy as np
import pytest

from medcook import shape_figures, widgets
from medcook.data.manifests import load_manifest
from medcook.methods import Supervised
from medcook.recipes.anatomy._shapes import Shape
from medcook.tasks import Budget, Task
from medcook.training import fit

MANIFEST = load_manifest("embedded")


def ball(radius: float, side: int = 15) -> np.ndarray:
    return sum((axis - side // 2) ** 2 for axis in np.indices([side] * 3)) <= radius**2


def corners(mask: np.ndarray) -> np.ndarray:
    return Shape(mask).corners


def test_a_shape_is_drawn_in_five_forms():
    mask = ball(5)[7]
    ring = np.array([[[2.0, 7.0], [7.0, 2.0], [12.0, 7.0]]])
    figure = shape_figures.forms_figure(mask * 1.0, mask, ring, Shape(ball(5)), MANIFEST)
    assert [axes.get_title() for axes in figure.axes] == ["pixels", "landmarks", "a level set", "a mesh", "points"]
    assert figure.axes[1].lines[0].get_xdata().tolist() == [2, 7, 12, 2], "a ring is closed"
    level = figure.axes[2].get_images()[0].get_array()
    assert level[7, 7] < 0 < level[0, 0]
    assert "Simulated" in figure.get_supxlabel()


def test_triangles_that_face_the_light_are_brighter():
    facing = np.array([[[0, 0, 0], [1, 0, 0], [0, 1, 0]]], float)  # its normal is (0, 0, 1)
    bright, dark = shape_figures.lit(np.concatenate([facing, facing[:, ::-1]]), "#808080")
    assert (bright > dark).all() and bright.max() <= 1
    assert bright == pytest.approx((0.6 + 0.4 * 0.77) * 128 / 255, rel=0.02)


def test_what_is_added_has_the_frame_of_what_is_left():
    whole = ball(5)
    left = whole.copy()
    left[:7] = False
    added = {"all": (whole & ~left, 1.0), "nothing": (whole & False, 0.0), "truth": (whole & ~left, np.nan)}
    figure = shape_figures.completion_figure(left, added, corners, MANIFEST)
    assert [axes.get_title() for axes in figure.axes] == [
        "what is left",
        "all: Dice 1.00",
        "nothing: Dice 0.00",
        "truth",
    ]
    assert len({tuple(axes.get_xlim()) for axes in figure.axes}) == 1
    assert figure.axes[0].get_xlim()[0] == pytest.approx(1.5), "the part that is gone fits into it, too"


def test_a_covered_image_is_drawn_with_every_answer():
    image, truth = np.zeros((16, 16)), np.zeros((16, 16), bool)
    truth[4:9, 4:9] = True
    figure = shape_figures.covered_figure(image, truth, {"one": truth, "none": truth & False}, MANIFEST)
    assert [axes.get_title() for axes in figure.axes] == ["reference", "one", "none"]
    assert [len(axes.get_images()) for axes in figure.axes] == [2, 2, 1]


def test_moving_contours_are_drawn_moment_by_moment():
    y, x = np.indices((16, 16)) - 8
    levels = [np.hypot(y, x) - radius for radius in (3.0, 5.0, 99.0)]
    figure = shape_figures.starts_figure(np.zeros((16, 16)), levels[1] < 0, {"a": levels, "b": levels}, MANIFEST)
    titles = [axes.get_title() for axes in figure.axes[:3]]
    assert titles == ["a: start", "after 1/2", "after 2/2"]
    drawn = [len([c for c in axes.collections if len(c.get_paths()[0].vertices)]) for axes in figure.axes[:3]]
    assert drawn == [2, 2, 1], "the truth, and the contour where there is one"


def test_a_square_can_be_moved_over_an_image():
    task = Task("embedded")
    network = fit(Supervised(channels=(4, 8)), task, Budget(steps=4, batch=4, checks=0), cache=False, progress=False)
    case = next(task.cases("val"))
    image, label = task.preparation.images(case)[4, 0].numpy(), task.preparation.labels(case)[4].numpy()
    box = widgets.hiding_explorer({"a network": network}, image, label > 0, MANIFEST)
    picture, sliders = box.children[1], box.children[0].children
    for slider in sliders:
        before = picture.value
        slider.value = slider.max
        assert picture.value != before
