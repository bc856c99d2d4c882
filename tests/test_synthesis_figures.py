"""Figures and the widget of chapter 15."""

import ipywidgets
import numpy as np
import pandas as pd
import pytest
import torch

from medcook import synthesis_figures as figures
from medcook import widgets
from medcook.data.manifests import load_manifest
from medcook.recipes.synthesis._diffusion import Diffusion

MANIFEST = load_manifest("embedded")
DIFFUSION = Diffusion(target="image")


@pytest.fixture
def image():
    return torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)


def knowing(image):
    return lambda noisy, t: image.expand_as(noisy)


def test_an_image_drowns(image):
    found = figures.drowned(DIFFUSION, image, [0, 500, 999], seed=1)
    apart = [float((noisy - image).square().mean()) for noisy in found.values()]
    assert apart[0] < 0.1 < apart[1] < apart[2]
    assert torch.equal(found[500], figures.drowned(DIFFUSION, image, [500], seed=1)[500])


def test_the_way_back_is_kept(image):
    seen = figures.way_back(DIFFUSION, knowing(image), torch.randn(2, 1, 16, 16), 5)
    assert list(seen) == DIFFUSION.steps(5) and all(
        torch.equal(one, image.expand(2, -1, -1, -1)) for one in seen.values()
    )


def test_what_a_network_believes_is_its_clean_image(image):
    noisy, clean = figures.believed(DIFFUSION, knowing(image), image, 700)
    assert torch.equal(clean, image) and torch.equal(noisy, figures.drowned(DIFFUSION, image, [700])[700])
    titles = [
        axes.get_title() for axes in figures.noise_figure(DIFFUSION, knowing(image), image, 700, 0, MANIFEST).axes
    ]
    assert titles[-1] == "away by 0.00" and "t = 700" in titles[1]


def test_a_gallery_shares_its_greys_along_a_row():
    grey = np.arange(16.0).reshape(4, 4)
    rows = {
        "one": {"a": figures.Shown(grey), "b": figures.Shown(3 * grey), "c": figures.Shown(grey, limits=(0.0, 1.0))},
        "two": {"a": figures.Shown(grey, np.eye(4, dtype=np.uint8))},
    }
    axes = figures.gallery(rows, MANIFEST, legend=True).axes
    limits = [panel.images[0].get_clim() for panel in axes if panel.images]
    assert limits[0] == limits[1] != limits[2] == (0.0, 1.0)
    assert [panel.get_title() for panel in axes[:3]] == ["a", "b", "c"] and not axes[4].axison


def test_measures_are_drawn_a_dot_a_patient():
    frame = pd.DataFrame(
        [(arm, p, k, p + (arm == "b")) for arm in "ab" for p in range(3) for k in (0, 1)],
        columns=["arm", "patient_id", "replicate", "psnr"],
    )
    (axes,) = figures.suppression_figure(frame, {"psnr": "PSNR in dB"}, "openkbp").axes
    dots, line = axes.lines[2], axes.lines[3]
    assert sorted(dots.get_xdata()) == [1, 2, 3] and line.get_xdata()[0] == 2
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"] and axes.get_xlabel() == "PSNR in dB"


def test_noise_can_be_explored(image):
    box = widgets.diffusion_explorer(DIFFUSION, {"one": knowing(image), "two": knowing(-image)}, image, MANIFEST)
    picture, controls = box.children[1], box.children[0].children
    assert isinstance(picture, ipywidgets.Image)
    for control, value in zip(controls, ("two", 900, 3), strict=True):
        before = picture.value
        control.value = value
        assert picture.value != before
