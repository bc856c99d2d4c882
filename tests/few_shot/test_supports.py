"""Other supports, other answers: numbers agree with the score, pictures with the numbers."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from medcook import statistics, widgets
from medcook.few_shot import FewShotTask, PrototypeNetwork, novel_dice
from medcook.few_shot import supports as pictures
from medcook.few_shot.supports import ask, spread, spread_figure, spread_table
from medcook.tasks import Budget
from medcook.training import Loop

TASK = FewShotTask("embedded", novel=(3,), supports=2, labelled=6)


@pytest.fixture(scope="module")
def fitted():
    budget = Budget(1, batch=4, precision="float32", checks=0)
    method = PrototypeNetwork(channels=(4, 4, 6, 6), episodes="none")
    return Loop(method, TASK, budget, "float32", 0, TASK.samples("labelled"), None, None, progress=False).run()


@pytest.fixture(scope="module")
def cases():
    return [TASK.data.load(patient) for patient in TASK.val_patients[:2]]


def test_answers_are_those_of_the_score(fitted, cases):
    rows = novel_dice(fitted, cases[0])
    found = ask(fitted, cases[0], 3, supports=2)
    assert [answer.dice for answer in found] == pytest.approx([row["dice"] for row in rows])
    assert [answer.patients for answer in found] == [row["group"] for row in rows]
    assert np.array_equal(found[0].truth, cases[0].label == 3)


def test_the_spread_has_a_row_for_every_shot_support_and_case(fitted, cases):
    frame = spread(fitted, cases, supports=2, shots=(1, 3))
    assert frame[["shots", "replicate", "case_id"]].drop_duplicates().shape[0] == len(frame) == 2 * 2 * 2
    three = replace(fitted, task=replace(TASK, shots=3))
    wanted = [row["dice"] for case in cases for row in novel_dice(three, case)]
    assert frame[frame["shots"] == 3]["dice"].tolist() == pytest.approx(wanted)


def table(count: int = 4) -> pd.DataFrame:
    """Supports differ by 0.1, patients by 0.01."""
    rows = [
        {"shots": shots, "replicate": k, "patient_id": f"p{p}", "case_id": f"p{p}", "structure": "s", "dice": dice}
        for shots in (1, 3)
        for k in range(count)
        for p in range(count)
        for dice in [0.1 * k + 0.01 * p + 0.1 * (shots == 3)]
    ]
    return pd.DataFrame(rows)


def test_the_table_tells_the_two_spreads_apart():
    frame = table()
    found, wanted = spread_table(frame), statistics.interval(frame[frame["shots"] == 1])
    assert found.loc[1, "Dice"] == f"{wanted.mean:.3f}" == "0.165"
    assert found.loc[1, "worst support"] == "0.015" and found.loc[1, "best support"] == "0.315"
    deviation = np.std(range(4), ddof=1)
    assert found.loc[3, "sd between supports"] == f"{0.1 * deviation:.3f}"
    assert found.loc[3, "sd between patients"] == f"{0.01 * deviation:.3f}"


def test_the_figure_shows_every_support_and_the_mean():
    axes = spread_figure({"one": table(), "other": table()}, "embedded").axes[0]
    dots = [line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata()) == 4]
    assert len(dots) == 4 and dots[0].get_ydata() == pytest.approx([0.015, 0.115, 0.215, 0.315])
    squares = [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "s"]
    assert squares == pytest.approx([0.165, 0.265] * 2)


def test_pictures_name_the_supports_and_their_dice(fitted, cases):
    found = ask(fitted, cases[0], 3, supports=2)
    axes = pictures.support_sheet(fitted, cases[0], 3, supports=2).axes
    assert [a.get_title().split("\n")[1] for a in axes[:2]] == [answer.patients for answer in found]
    assert [a.get_title() for a in axes[2:]] == [f"Dice {answer.dice:.2f}" for answer in found]
    view = pictures.support_view(fitted, cases[0], 3, 1)
    assert f"volume Dice {found[1].dice:.2f}" in view.legends[0].get_title().get_text()
    assert len(view.axes) == 2 * TASK.chunks


def test_shown_is_the_slice_with_most_of_the_structure_and_its_chunk(cases):
    case = replace(cases[0], image=np.zeros((1, 9, 4, 4)), label=np.zeros((9, 4, 4), np.uint8))
    for place, count in ((2, 3), (3, 5), (6, 9), (7, 4)):
        case.label[place].flat[:count] = 3
    assert pictures.largest(case, 3, 3) == (2, 6)  # slices 2 to 7 in chunks of two
    assert pictures.largest(case, 3, 1) == (0, 6)


def test_the_best_answer_comes_first_then_the_worst_of_each_case(fitted, cases):
    dice = [[row["dice"] for row in novel_dice(fitted, case)] for case in cases]
    axes = pictures.worst_answers(fitted, cases, count=2, supports=2).axes
    shown = [float(a.get_title().split("Dice ")[1]) for a in axes[3:]]
    assert shown == pytest.approx([max(map(max, dice)), *sorted(map(min, dice))], abs=0.006)


def test_picking_another_support_changes_the_picture(fitted, cases):
    box = widgets.support_picker(fitted, cases, supports=2)
    (which, number, case), image = box.children[0].children, box.children[1]
    assert which.options[0] == ("ventricles", 3) and number.options[0][0] == ask(fitted, cases[0], 3, 1)[0].patients
    seen = [bytes(image.value)]
    for control, value in ((number, 1), (case, 1)):
        control.value = value
        seen.append(bytes(image.value))
    assert len(set(seen)) == 3
