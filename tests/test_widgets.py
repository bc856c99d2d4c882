"""Widgets redraw when a control moves."""

import numpy as np
import pandas as pd
from tiny import BUDGET

from medcook import widgets
from medcook.data import open_dataset
from medcook.film import watch
from medcook.methods import MeanTeacher
from medcook.tasks import Task


def test_the_picture_follows_slice_outlines_and_window():
    data = open_dataset("embedded")
    case = next(data.cases(data.split.train[:1]))
    box = widgets.slice_viewer(case, data.manifest, np.zeros_like(case.label))
    controls, image = box.children[0].children, box.children[1]
    slider, outlines, window = controls
    assert (slider.min, slider.max) == (0, len(case.label) - 1)
    seen = [bytes(image.value)]
    for control, value in ((slider, 1), (outlines, False), (window, (window.min, (window.min + window.max) / 2))):
        control.value = value
        seen.append(bytes(image.value))
    assert all(png.startswith(b"\x89PNG") for png in seen) and len(set(seen)) == 4


def test_the_film_moves_with_its_slider():
    method = MeanTeacher(channels=(4, 8))
    film = watch(method, Task("embedded", labelled=2), BUDGET, count=3, frames=2)
    box = widgets.film_viewer(film)
    (frame, number), image = box.children[0].children, box.children[1]
    seen = [bytes(image.value)]
    frame.value = 1
    seen.append(bytes(image.value))
    number.value = (number.value + 1) % 3
    seen.append(bytes(image.value))
    assert len(set(seen)) == 3


def test_handing_over_more_moves_the_picture():
    rng = np.random.default_rng(0)
    parts = {"uncertainty": rng.random(30), "error": rng.random(30), "replicate": 0}
    frame = pd.concat([pd.DataFrame(parts | {"arm": arm}) for arm in ("net", "other")])
    box = widgets.handover_slider(frame, "embedded", "other")
    (share, which), image = box.children[0].children, box.children[1]
    seen = [bytes(image.value)]
    share.value = 0.5
    seen.append(bytes(image.value))
    assert which.value == "other"
    which.value = "net"
    seen.append(bytes(image.value))
    assert len(set(seen)) == 3


def test_model_attribute_and_threshold_move_the_picture():
    rng = np.random.default_rng(0)
    parts = {"score": rng.random(30), "outcome": np.arange(30) % 2, "replicate": 0}
    groups = {"sex": np.where(np.arange(30) % 3, "man", "woman"), "site": np.where(np.arange(30) % 5, "north", "south")}
    frame = pd.concat([pd.DataFrame(parts | groups | {"arm": arm}) for arm in ("net", "other")])
    frame.loc[frame["arm"] == "other", "score"] **= 2
    box = widgets.threshold_explorer(frame, "embedded", ["sex", "site"])
    controls, image = box.children[0].children, box.children[1]
    seen = [bytes(image.value)]
    for control, value in zip(controls, ("other", "site", 0.2), strict=True):
        control.value = value
        seen.append(bytes(image.value))
    assert len(set(seen)) == 4
