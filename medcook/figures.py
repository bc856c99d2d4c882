"""Evidence figures: drawn from the committed JSON of papers/evidence, and compared with the committed images.

A paper's figure is drawn by the function registered for it, in medcook/drawers.py, with

    @draws("unet")
    def unet_figure(summary: Summary, frame: pd.DataFrame) -> Figure: ...

(`frame` holds one row per replicate, arm, case and structure), else by `draw_arms`.
"""

import io
import os
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image, ImageFilter

from medcook import paths, pooled
from medcook.errors import MedcookError
from medcook.plots import panels
from medcook.records import Summary, read

Drawer = Callable[[Summary, pd.DataFrame], Figure]
_DRAWERS: dict[str, Drawer] = {}

TITLE_CHARACTERS = 72
"""Characters of a title that fit above a figure of seven inches."""

TILE = 24
"""Side in pixels of the tiles in which images are compared, so that one moved curve counts in a large figure."""

BOUND = 10.0
"""Mean absolute difference of a blurred tile, of 255, above which two images differ."""


def draws(paper: str) -> Callable[[Drawer], Drawer]:
    """Register the function that draws a paper's evidence."""

    def register(function: Drawer) -> Drawer:
        _DRAWERS[paper] = function
        return function

    return register


def evidence_folders() -> Iterator[Path]:
    """Every papers/evidence/<paper>/<profile> with a summary."""
    for summary in sorted(paths.EVIDENCE.glob("*/*/summary.json")):
        yield summary.parent


def redraw() -> list[Path]:
    """Draw every evidence figure into `figure.png` beside its summary; returns the paths."""
    written = []
    for folder in evidence_folders():
        target = folder / "figure.png"
        partial = target.with_suffix(".partial")
        partial.write_bytes(draw(folder))
        os.replace(partial, target)
        written.append(target)
    return written


def check() -> list[str]:
    """What is wrong with the committed figures: missing, left over, or not what the evidence draws."""
    folders = list(evidence_folders())
    found = [f"{path}: no evidence belongs to it" for path in _committed() if path.parent not in folders]
    for folder in folders:
        target = folder / "figure.png"
        if not target.exists():
            found.append(f"{target} is missing")
        elif problem := compare(target.read_bytes(), draw(folder)):
            found.append(f"{target}: {problem}")
    return found


def _committed() -> list[Path]:
    return sorted(paths.EVIDENCE.glob("*/*/figure.png"))


def draw(folder: Path) -> bytes:
    """The PNG of one evidence folder, the same bytes wherever matplotlib is the same."""
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        figure = evidence_figure(read(Summary, folder / "summary.json"))
        target = io.BytesIO()
        figure.savefig(target, format="png", dpi=100, metadata={"Software": None})
        plt.close(figure)
    return target.getvalue()


def evidence_figure(summary: Summary) -> Figure:
    """The figure of a paper's evidence, as its own drawer makes it."""
    import medcook.drawers  # noqa: F401  registers the drawers
    from medcook.evidence import evidence_frame

    frame = evidence_frame(summary.paper, summary.profile)
    return _DRAWERS.get(summary.paper, draw_arms)(summary, frame)


def draw_arms(summary: Summary, frame: pd.DataFrame) -> Figure:
    """Each arm's mean with its 95% interval, and its replicates as dots."""
    figure, axes = panels(size=(7, 1.4 + 0.5 * len(summary.arms)))
    for row, (name, arm) in enumerate(summary.arms.items()):
        values = pooled.of_replicates(frame[frame["arm"] == name], summary.metric)
        axes.plot(values, np.full(len(values), row + 0.18), "o", color="0.6", markersize=4)
        low, high = (arm.mean if bound is None else bound for bound in (arm.low, arm.high))
        axes.errorbar(arm.mean, row, xerr=[[arm.mean - low], [high - arm.mean]], fmt="s", color="C0", capsize=3)
    axes.set_yticks(range(len(summary.arms)), [name.replace("_", " ") for name in summary.arms])
    axes.set_ylim(len(summary.arms) - 0.5, -0.5)
    unit = f" ({summary.unit})" if summary.unit else ""
    axes.set_xlabel(f"{summary.metric}{unit}, mean and 95% interval; dots: replicates")
    title = textwrap.fill(summary.title, TITLE_CHARACTERS)
    figure.suptitle(f"{title}\n{summary.dataset} ({summary.data}), {summary.profile}: {summary.verdict}", size=10)
    return figure


def compare(committed: bytes, drawn: bytes) -> str | None:
    """None when two PNGs show the same up to anti-aliasing, else what differs."""
    old, new = (_pixels(png) for png in (committed, drawn))
    if old.shape != new.shape:
        return f"the size is {old.shape[1]}x{old.shape[0]}, drawn now {new.shape[1]}x{new.shape[0]}"
    difference = np.abs(old - new).max(axis=2)
    padding = [(0, -side % TILE) for side in difference.shape]
    tiles = np.pad(difference, padding).reshape(-(-difference.shape[0] // TILE), TILE, -1, TILE).mean(axis=(1, 3))
    row, column = np.unravel_index(tiles.argmax(), tiles.shape)
    if tiles.max() <= BOUND:
        return None
    return f"differs around pixel ({column * TILE}, {row * TILE}) by {tiles.max():.0f} of 255"


def _pixels(png: bytes) -> np.ndarray:
    """(height, width, 3) float, slightly blurred."""
    try:
        image = Image.open(io.BytesIO(png)).convert("RGB")
    except OSError as error:
        raise MedcookError("A committed figure is not a readable PNG.", "Redraw it: medcook figures.") from error
    return np.asarray(image.filter(ImageFilter.GaussianBlur(1)), dtype=float)
