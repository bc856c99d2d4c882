"""What chapter 10 looks at: the same widget clicks on a guided network, and tables say what clicks bring and cost."""

import numpy as np
import pandas as pd
import pytest
import torch
from test_interactive import Fitted, Listening

from medcook import interactive_figures
from medcook.interactive import BESIDE, MEANT, Guided, InteractiveTask
from medcook.sam.clicking import click_sheet, robot
from medcook.sam.prompts import Prompt
from medcook.sam.zero_shot import Target


class Remembering(Guided):
    """Notes whether an answer before was there, and how many marks."""

    def respond(self, net, state, marks, before):
        self.seen.append((before is not None, int(marks.sum())))
        return super().respond(net, state, marks, before)


@pytest.fixture
def predictor():
    method = Remembering()
    method.seen = []
    fitted = Fitted(method, torch.nn.ModuleDict({"average": Listening()}), {"precision": "float32"})
    fitted.weights = {"last": fitted.nets.state_dict()}
    return interactive_figures.GuidedPredictor(fitted)


def square() -> Target:
    mask = np.zeros((40, 40), bool)
    mask[4:15, 4:15] = mask[24:35, 24:35] = True
    return Target("embedded", "p", "square", np.zeros((40, 40), np.float32), mask)


def test_points_of_a_prompt_become_marks_row_first():
    marks = interactive_figures.marked(Prompt(((3.2, 1.9),), ((0.5, 4.0),), (2, 2, 6, 4)), (5, 8))
    assert marks[0, MEANT].nonzero().tolist() == [[1, 3], [3, 4]]
    assert marks[0, BESIDE].nonzero().tolist() == [[4, 0]]


def test_a_growing_prompt_is_answered_with_the_answer_before_and_another_one_is_not(predictor):
    image = np.zeros((40, 40), np.float32)
    first = Prompt(((9.5, 9.5),))
    answer = predictor(image, first)
    assert answer.masks.shape == (1, 40, 40) and answer.mask[9, 9] and 0 < answer.iou[0] <= 1
    predictor(image, first.adding((29.5, 29.5), True))
    predictor(image, Prompt(((20.5, 20.5),)))
    predictor(image.copy(), first)
    assert predictor.method.seen == [(False, 1), (True, 2), (False, 1), (False, 1)]


def test_the_books_sheet_of_clicks_takes_a_guided_network(predictor):
    session = robot(predictor, square(), 2)
    assert session.dice[1] > session.dice[0] > 0
    figure = click_sheet(predictor, [square()], clicks=(1, 2))
    assert [axes.get_title().split("\n")[0].split(", ")[1] for axes in figure.axes] == ["1 click", "2 clicks"]


def test_what_a_network_is_told_is_drawn(predictor):
    figure = interactive_figures.guidance_figure(square(), Guided(), square().mask)
    assert [axes.get_title() for axes in figure.axes][-1] == "the answer"
    channel = figure.axes[2].get_images()[-1].get_array()
    assert channel.max() == 1 and np.unravel_index(channel.argmax(), channel.shape) in [(9, 9), (29, 29)]


def test_targets_are_prepared_slices_with_most_of_each_structure():
    task = InteractiveTask("embedded", hidden=(3,), asked="known")
    case = next(task.cases("val"))
    found = interactive_figures.prepared_targets(task, case)
    assert list(found) == [task.structures[1], task.structures[2]]
    labels = task.preparation.labels(case)
    assert found[task.structures[1]].mask.sum() == (labels == 1).sum((1, 2)).max()


def frame() -> pd.DataFrame:
    rows = [
        {"arm": arm, "replicate": 0, "patient_id": f"p{k}", "dice": 0.5 + 0.01 * k, "dice_3": 0.7 + gain, "dice_5": 0.8}
        for arm, gain in (("guided", 0.1), ("other", 0.0))
        for k in range(5)
    ]
    return pd.DataFrame(rows)


def test_dice_after_each_click_of_each_arm():
    table = interactive_figures.clicks_table(frame())
    line = table[(table["arm"] == "guided") & (table["clicks"] == 3)].iloc[0]
    assert line["dice"] == pytest.approx(0.8) and line["low"] <= 0.8 <= line["high"]
    assert len(table) == 6
    figure = interactive_figures.clicks_figure({"a": table, "b": table}, "embedded")
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines][1] == pytest.approx([0.52, 0.7, 0.8])


def test_after_one_click_is_the_column_that_says_so():
    table = interactive_figures.clicks_table(frame().assign(dice_1=0.25))
    assert table[table["clicks"] == 1]["dice"].tolist() == pytest.approx([0.25, 0.25])


def test_what_is_worked_out_once_is_not_paid_again(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(interactive_figures.time, "perf_counter", lambda: clock[0])

    class Slow(Guided):
        def start(self, net, images):
            clock[0] += 0.5
            return images

        def respond(self, net, state, marks, before):
            clock[0] += 0.02
            return state

    table = interactive_figures.click_seconds({"slow": (Slow(), None)}, torch.ones(1, 1, 8, 8))
    assert table.loc["slow"].tolist() == pytest.approx([500, 20])


def test_best_and_worst():
    best, worst = interactive_figures.best_and_worst([{"dice": 0.2}, {"dice": 0.9}, {"dice": 0.5}])
    assert (best["dice"], worst["dice"]) == (0.9, 0.2)


def test_simulated_scribbles_are_drawn_beside_a_persons():
    target = square()
    drawn = np.zeros((40, 40), bool)
    drawn[9, 5:14] = True
    figure = interactive_figures.scribbles_figure(target, drawn, {"a line": drawn, "nothing": drawn & False})
    assert [axes.get_title() for axes in figure.axes] == ["a person's", "a line", "nothing"]
    assert "Simulated" in figure.get_supxlabel()


def test_kinds_of_prompts_have_their_means_and_intervals():
    frame = pd.DataFrame(
        {"patient_id": list("abcd"), "case_id": list("abcd"), "structure": "s", "dice": 0.5, "dice_box": [0.6, 0.8] * 2}
    )
    table = interactive_figures.kinds_table(frame, {"a click": "dice", "a box": "dice_box"})
    assert table["dice"].tolist() == pytest.approx([0.5, 0.7]) and table.loc["a box", "low"] < 0.7
    axes = interactive_figures.kinds_figure(table, "embedded").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a click", "a box"]
    assert axes.lines[0].get_xdata() == pytest.approx([0.5, 0.7])
