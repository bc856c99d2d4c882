"""Sessions of clicks: what is asked, undone, refused and shown; the widget reacts to the mouse."""

import asyncio

import numpy as np
import pytest
from matplotlib.backend_bases import MouseEvent

from medcook.errors import MedcookError
from medcook.sam.clicking import REST, Session, click_sheet, click_widget, robot, take
from medcook.sam.predictor import Answer
from medcook.sam.zero_shot import Target


def around(image, prompt) -> Answer:
    """Answers a disc of radius 6 around the mean of the clicks on the object, or the inside of the box."""
    rows, columns = np.indices(image.shape)
    if prompt.box:
        left, top, right, bottom = prompt.box
        mask = (columns >= left) & (columns < right) & (rows >= top) & (rows < bottom)
    else:
        x, y = np.mean(prompt.foreground or [(0, 0)], axis=0)
        mask = (columns + 0.5 - x) ** 2 + (rows + 0.5 - y) ** 2 < 36
    return Answer(mask[None], np.array([0.8]), np.where(mask, 5.0, -5.0)[None])


class Noting:
    """A predictor that notes what it is shown before it is asked."""

    def __init__(self):
        self.shown = []

    def __call__(self, image, prompt) -> Answer:
        return around(image, prompt)

    def look_ahead(self, image, prompt=None) -> None:
        self.shown.append(prompt)


@pytest.fixture
def target():
    mask = np.zeros((40, 50), bool)
    mask[10:30, 20:40] = True
    return Target("embedded", "p", "square", np.random.default_rng(0).random((40, 50)).astype(np.float32), mask)


@pytest.fixture
def session(target):
    return Session(around, target)


def test_clicks_add_up_and_a_box_takes_the_place_of_an_earlier_one(session):
    session.click(25, 15)
    session.click(5, 5, is_foreground=False)
    session.drag(40, 30, 20, 10)
    session.drag(19, 9, 41, 31)
    prompt = session.prompts[-1]
    assert (prompt.foreground, prompt.background, prompt.box) == (((25, 15),), ((5, 5),), (19, 9, 41, 31))
    assert session.dice[2] == 1 and session.dice[0] < session.dice[3] < 1


def test_every_step_can_be_undone(session):
    session.undo()
    session.click(25, 15)
    session.drag(20, 10, 40, 30)
    session.undo()
    assert len(session.prompts) == len(session.answers) == 1 and session.prompts[0].box is None
    session.restart()
    assert not session.prompts and "click" in session.caption


def test_a_refused_prompt_leaves_nothing_behind(session, monkeypatch):
    def refuse(image, prompt):
        raise MedcookError("Outside.", "Click inside.")

    monkeypatch.setattr(session, "predictor", refuse)
    with pytest.raises(MedcookError):
        session.click(999, 1)
    assert not session.prompts and not session.answers


def test_the_mouse_clicks_or_drags(session):
    take(session, (25, 15), (26, 15.5), beside=False)
    take(session, (3, 3), (3, 3), beside=True)
    take(session, (20, 10), (55, -2), beside=False)
    first, second, third = session.prompts
    assert first.foreground == ((25, 15),) and second.background == ((3, 3),)
    assert third.box == (20, 0, 50, 10), "a box ends at the image's border"
    take(session, (20, 10), (40, 10), beside=False)
    assert len(session.prompts) == 3, "a line is no box"


def test_the_robot_clicks_in_the_middle_then_on_the_largest_error(target):
    session = robot(around, target, 3)
    assert len(session.prompts) == 3
    assert session.prompts[0].foreground == ((29.5, 19.5),)
    assert all(target.mask[int(y), int(x)] for x, y in session.prompts[-1].foreground)


def test_the_sheet_has_a_panel_a_count_of_clicks(target):
    figure = click_sheet(around, [target, target], (1, 2))
    titles = [axes.get_title() for axes in figure.axes]
    assert len(titles) == 4 and titles[0].startswith("square, 1 click\n") and titles[1].startswith("square, 2 clicks\n")
    assert all("Dice" in title for title in titles)


def test_the_widget_answers_the_mouse_and_its_buttons(target):
    predictor = Noting()
    box = click_widget(predictor, {"one": target, "other": target})
    (which, undo, restart), canvas = box.children[0].children, box.children[1]
    picture = canvas.figure.axes[0]

    def mouse(name, x, y, button=1):
        MouseEvent(name, canvas, *picture.transData.transform((x, y)), button)._process()

    mouse("button_press_event", 25, 15)
    mouse("button_release_event", 25, 15)
    assert "true Dice" in picture.get_title() and len(box.state["session"].prompts) == 1
    mouse("button_press_event", 20, 10, 3)
    mouse("button_release_event", 20, 10, 3)
    assert box.state["session"].prompts[-1].background == (pytest.approx((20, 10)),)
    undo.click()
    assert len(box.state["session"].prompts) == 1
    restart.click()
    assert not box.state["session"].prompts
    box.state["session"].click(25, 15)
    which.value = "other"
    assert not box.state["session"].prompts
    assert predictor.shown == [None, None], "what is shown is embedded"


def test_where_the_pointer_rests_is_looked_at_before_it_clicks(target):
    predictor = Noting()
    canvas = (box := click_widget(predictor, {"one": target})).children[1]
    picture = canvas.figure.axes[0]

    def move(x, y):
        MouseEvent("motion_notify_event", canvas, *picture.transData.transform((x, y)))._process()

    async def hurry_then_rest():
        for x in (25, 28, 30):
            move(x, 15)
        await asyncio.sleep(4 * REST)
        box.state["session"].click(30, 15)
        move(500, 500)
        move(40, 20)
        await asyncio.sleep(4 * REST)

    asyncio.run(hurry_then_rest())
    anywhere, first, second = predictor.shown
    assert anywhere is None, "the image is embedded when it is shown"
    assert first.foreground == (pytest.approx((30, 15)),), "only where it rested"
    assert second.foreground == ((30, 15), pytest.approx((40, 20))), "what was clicked counts, too"
    move(10, 12)
    assert len(predictor.shown) == 4, "without an event loop, at once"


def test_no_targets_is_said():
    with pytest.raises(MedcookError, match="nothing to click on"):
        click_widget(around, {})
