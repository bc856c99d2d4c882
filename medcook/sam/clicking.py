"""Click to segment: a session of prompts on one image, a widget to play with it, and its static twin."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import ipywidgets as widgets
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from medcook.errors import MedcookError
from medcook.plots import colour, credit, panels, show_slice
from medcook.sam.predictor import Answer, Predictor
from medcook.sam.prompts import Prompt, first_click, next_click
from medcook.sam.zero_shot import Target, dice

DRAG = 3.0
"""Pixels that the mouse moves between press and release before it means a box."""
REST = 0.05
"""Seconds that the pointer rests somewhere before what is around it is embedded."""


@dataclass
class Session:
    """What was shown about one object so far, and what the model answered; every step can be undone.

    prompts, answers   one entry a step, the last one counts
    """

    predictor: Predictor
    target: Target
    prompts: list[Prompt] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    def click(self, x: float, y: float, is_foreground: bool = True) -> None:
        """One more click, in pixels of the image."""
        self._ask((self.prompts[-1] if self.prompts else Prompt()).adding((x, y), is_foreground))

    def hover(self, x: float, y: float) -> None:
        """The pointer rests somewhere: a click there will be answered sooner."""
        so_far = self.prompts[-1] if self.prompts else Prompt()
        self.predictor.look_ahead(self.target.image, so_far.adding((x, y), True))

    def drag(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """A box between two corners in any order; it takes the place of an earlier one, clicks stay."""
        before = self.prompts[-1] if self.prompts else Prompt()
        box = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
        self._ask(Prompt(before.foreground, before.background, box))

    def undo(self) -> None:
        """Take the last step back."""
        del self.prompts[-1:], self.answers[-1:]

    def restart(self) -> None:
        self.prompts.clear()
        self.answers.clear()

    def _ask(self, prompt: Prompt) -> None:
        self.answers.append(self.predictor(self.target.image, prompt))  # a wrong prompt is refused before it is kept
        self.prompts.append(prompt)

    @property
    def dice(self) -> list[float]:
        """The true Dice after each step."""
        return [dice(answer.mask, self.target.mask) for answer in self.answers]

    @property
    def caption(self) -> str:
        """Predicted IoU and true Dice of the last answer."""
        if not self.answers:
            return "click on the object, drag a box around it"
        return f"it expects an IoU of {self.answers[-1].iou[0]:.2f}; true Dice {self.dice[-1]:.2f}"


def draw_session(axes: Axes, session: Session) -> None:
    """The image, the answer filled, the truth as a line, clicks (+ on the object, x beside it) and the box."""
    target = session.target
    show_slice(axes, target.image, None, title=f"{target.structure}: {session.caption}")
    axes.contour(target.mask, [0.5], colors="white", linewidths=1, linestyles=":")
    if not session.answers:
        return
    mask, prompt = session.answers[-1].mask, session.prompts[-1]
    paint = np.zeros((*mask.shape, 4), np.float32)
    paint[mask] = (*to_rgb(colour(1)), 0.45)
    axes.imshow(paint, interpolation="nearest")
    for points, marker, tint in ((prompt.foreground, "P", "#009e73"), (prompt.background, "X", "#d55e00")):
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=70, marker=marker, c=tint, edgecolors="white", linewidths=1)
    if prompt.box:
        left, top, right, bottom = prompt.box
        axes.add_patch(
            Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="#f0e442", linewidth=1.5)
        )


def draw_progress(axes: Axes, session: Session) -> None:
    """Dice after each step."""
    axes.plot(range(1, len(session.dice) + 1), session.dice, marker="o", color="#0072b2")
    axes.set(xlim=(0.5, max(5, len(session.dice)) + 0.5), ylim=(0, 1), xlabel="step", ylabel="true Dice")
    axes.spines[["top", "right"]].set_visible(False)


def click_sheet(predictor: Predictor, targets: list[Target], clicks: tuple[int, ...] = (1, 3, 5)) -> Figure:
    """The static twin: a row a target, a column a count of clicks, each after the first on what is still wrong."""
    size = (2.9 * len(clicks), 3.1 * len(targets))
    figure, grid = panels(len(targets), len(clicks), size=size, squeeze=False)
    for row, target in zip(grid, targets, strict=True):
        session = robot(predictor, target, max(clicks))
        for axes, count in zip(row, clicks, strict=True):
            part = Session(predictor, target, session.prompts[:count], session.answers[:count])
            draw_session(axes, part)
            axes.set_title(f"{target.structure}, {count} click{'s' * (count > 1)}\n{_short(part)}", fontsize=9)
    credit(figure, targets[0].dataset)
    return figure


def robot(predictor: Predictor, target: Target, clicks: int) -> Session:
    """A session by rule: first in the middle of the object, then in the middle of the largest error."""
    session = Session(predictor, target)
    session._ask(first_click(target.mask))
    for _ in range(clicks - 1):
        session._ask(next_click(session.prompts[-1], session.answers[-1].mask, target.mask))
    return session


def click_widget(predictor: Predictor, targets: Mapping[str, Target]) -> widgets.VBox:
    """Click on an object (right button or Shift: beside it) or drag a box: mask, IoU expected, true Dice.

    Needs a live notebook with ipympl; the web shows `click_sheet`.
    """
    from ipympl.backend_nbagg import Canvas, FigureManager

    if not targets:
        raise MedcookError("There is nothing to click on.", "Give at least one target.")
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    canvas = Canvas(figure)
    FigureManager(canvas, 0)
    canvas.header_visible = canvas.toolbar_visible = canvas.footer_visible = False
    picture, progress = figure.subplots(1, 2, width_ratios=(3, 2))
    which = widgets.Dropdown(options=list(targets), description="object")
    undo, restart = widgets.Button(description="undo"), widgets.Button(description="start again")
    state = {"press": None, "resting": None}

    def show(_=None) -> None:
        target = targets[which.value]
        predictor.look_ahead(target.image)
        state["session"] = Session(predictor, target)

    def draw() -> None:
        for axes, paint in ((picture, draw_session), (progress, draw_progress)):
            axes.clear()
            paint(axes, state["session"])
        canvas.draw_idle()

    def acting(act: Callable[[], None]) -> Callable:
        def handler(_=None) -> None:
            act()
            draw()

        return handler

    def pressed(event) -> None:
        state["press"] = (event.xdata, event.ydata) if event.inaxes is picture else None

    def moved(event) -> None:
        if state["resting"]:
            state["resting"].cancel()
        if event.inaxes is picture and state["press"] is None:
            point = event.xdata, event.ydata
            state["resting"] = after_rest(lambda: state["session"].hover(*within(point, state["session"])))

    def released(event) -> None:
        if state["press"] is None or event.inaxes is not picture:
            return
        (x0, y0), (x1, y1), state["press"] = state["press"], (event.xdata, event.ydata), None
        take(state["session"], (x0, y0), (x1, y1), beside=event.button == 3 or event.key == "shift")
        draw()

    canvas.mpl_connect("motion_notify_event", moved)
    canvas.mpl_connect("button_press_event", pressed)
    canvas.mpl_connect("button_release_event", released)
    undo.on_click(acting(lambda: state["session"].undo()))
    restart.on_click(acting(lambda: state["session"].restart()))
    which.observe(acting(show), names="value")
    show()
    draw()
    box = widgets.VBox([widgets.HBox([which, undo, restart]), canvas])
    box.state = state
    return box


def within(point: tuple[float, float], session: Session) -> tuple[float, float]:
    """The point of the image that lies nearest."""
    height, width = session.target.image.shape
    return min(max(0.0, point[0]), width), min(max(0.0, point[1]), height)


def after_rest(act: Callable[[], None]) -> asyncio.TimerHandle | None:
    """Act in a moment, unless what this returns is cancelled; at once where no event loop runs."""
    try:
        return asyncio.get_running_loop().call_later(REST, act)
    except RuntimeError:
        act()


def take(session: Session, press: tuple[float, float], release: tuple[float, float], beside: bool) -> None:
    """A press and a release of the mouse, in pixels: a click where they are close, else a box."""
    (x0, y0), (x1, y1) = (within(point, session) for point in (press, release))
    if max(abs(x1 - x0), abs(y1 - y0)) < DRAG:
        session.click(x0, y0, not beside)
    elif x0 != x1 and y0 != y1:
        session.drag(x0, y0, x1, y1)


def _short(session: Session) -> str:
    return f"expects IoU {session.answers[-1].iou[0]:.2f}, Dice {session.dice[-1]:.2f}"
