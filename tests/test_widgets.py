"""Widgets redraw when a control moves."""

import numpy as np

from medcook import widgets
from medcook.data import open_dataset


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
