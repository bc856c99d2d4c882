"""Evidence figures: redrawn from JSON, and compared so that a moved curve fails and anti-aliasing does not."""

import io
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from medcook import figures, paths
from medcook.errors import MedcookError


def curve(values, width: float = 1.5, size=(6, 3)) -> bytes:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(values, linewidth=width)
    axes.set_ylim(0, 1)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=100)
    return target.getvalue()


VALUES = np.linspace(0.2, 0.9, 10)


def test_the_same_figure_is_the_same():
    assert figures.compare(curve(VALUES), curve(VALUES)) is None


def test_antialiasing_noise_passes():
    assert figures.compare(curve(VALUES), curve(VALUES, width=1.7)) is None
    assert figures.compare(curve(VALUES), curve(VALUES + 0.001)) is None


@pytest.mark.parametrize("changed", [VALUES + 0.05, VALUES[::-1], np.where(np.arange(10) == 5, 0.3, VALUES)])
def test_a_changed_curve_fails(changed):
    assert "differs around pixel" in figures.compare(curve(VALUES), curve(changed))


def test_another_size_fails():
    assert "size is 600x300, drawn now 500x300" in figures.compare(curve(VALUES), curve(VALUES, size=(5, 3)))


def test_a_damaged_image_is_named():
    with pytest.raises(MedcookError, match="not a readable PNG"):
        figures.compare(b"\x89PNG broken", curve(VALUES))


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    """An evidence folder of one paper, whose figure is a curve through VALUES."""
    monkeypatch.setattr(paths, "EVIDENCE", tmp_path)
    folder = tmp_path / "tiny" / "full"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    monkeypatch.setattr(figures, "draw", lambda folder: curve(VALUES))
    return folder


def test_redrawn_figures_pass_the_check(evidence):
    assert figures.check() == [f"{evidence / 'figure.png'} is missing"]
    assert figures.redraw() == [evidence / "figure.png"]
    assert figures.check() == []
    assert sorted(path.name for path in evidence.iterdir()) == ["figure.png", "summary.json"]


def test_a_figure_that_its_evidence_does_not_draw_is_found(evidence):
    (evidence / "figure.png").write_bytes(curve(VALUES[::-1]))
    assert "differs" in figures.check()[0]


def test_a_figure_without_evidence_is_found(evidence):
    figures.redraw()
    (evidence / "summary.json").unlink()
    assert "no evidence belongs to it" in figures.check()[0]


def test_the_default_figure_shows_every_arm_with_interval_and_replicates():
    arm = SimpleNamespace(mean=0.8, low=0.75, high=0.85)
    without_interval = SimpleNamespace(mean=0.7, low=None, high=None)
    summary = SimpleNamespace(
        arms={"method": arm, "without_mixing": without_interval},
        metric="dice",
        unit="",
        title="Tiny",
        dataset="acdc",
        data="real",
        profile="full",
        verdict="supported",
    )
    frame = pd.DataFrame({"arm": ["method"] * 4, "replicate": [0, 0, 1, 1], "patient_id": ["a", "b"] * 2})
    frame["dice"] = [0.7, 0.8, 0.8, 0.9]
    figure = figures.draw_arms(summary, frame)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["method", "without mixing"]
    assert axes.lines[0].get_xdata().tolist() == pytest.approx([0.75, 0.85])
    assert "acdc (real), full: supported" in figure.get_suptitle()
