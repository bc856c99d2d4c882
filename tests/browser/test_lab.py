"""What a student does: open a chapter, run it, move what can be moved, solve an exercise wrongly, then rightly."""

from pathlib import Path

import pytest

SOLUTIONS = Path(__file__).parents[1] / "notebooks" / "solutions"
WIDGETS = {
    "01_data_loading": "slice",
    "02_unet_baseline": "slice",
    "04_semi_supervised": "image",
    "05_few_shot": "support",
    "06_uncertainty": "handed over",
    "07_fairness": "threshold",
    "08_architectures": "image",
    "09_volumes": "slice",
    "11_language": "kind",
    "12_imperfect_labels": "amount",
    "13_pretraining": "slice",
    "14_domain_shift": "noise",
    "15_synthesis": "t",
    "16_anatomy_and_shape": "row",
    "17_instances": "gap",
    "18_video": "frame",
    "19_findings": "spicules",
}
"""Chapter: the label of a control that changes a picture."""


EMBEDDED = """
session = next(box.state["session"] for box in Out.values() if hasattr(box, "state") and "session" in box.state)
from medcook.sam.views import first_windows
print(len(session.predictor.remembered), "embedded, without rests:", len(first_windows(session.target.image.shape)) + 1)
""".strip()
"""Embeddings that the click widget remembers, and those of any first click and of the box after it."""


@pytest.mark.parametrize("name", WIDGETS)
def test_a_chapter_runs_and_its_widget_changes_the_picture(opened, name):
    notebook = opened(name)
    notebook.run_all()
    notebook.leaf_through()
    assert notebook.errors() == []
    before, after = notebook.turn(WIDGETS[name])
    assert before != after


def test_clicks_and_a_box_are_answered(opened):
    notebook = opened("03_sam_adaptation")
    notebook.run_all()
    assert notebook.errors() == []
    box = notebook.reach(".jupyter-matplotlib-canvas-div").bounding_box()
    mouse, x, y = notebook.page.mouse, box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.5
    shots = [notebook.shot("widget")]
    mouse.click(x, y)
    notebook.page.wait_for_timeout(3000)
    shots.append(notebook.shot("clicked"))
    mouse.move(x + 90, y - 90, steps=4)
    notebook.page.wait_for_timeout(2000)
    mouse.move(x - 60, y - 60)
    mouse.down()
    mouse.move(x + 60, y + 60, steps=8)
    mouse.up()
    notebook.page.wait_for_timeout(3000)
    shots.append(notebook.shot("box"))
    assert len(set(shots)) == 3
    notebook.run_cell("def low_rank(", EMBEDDED)
    counts = notebook.page.locator(".jp-OutputArea-output:has-text('embedded, without rests:')").first.inner_text()
    embedded, expected = map(int, counts.split("embedded, without rests:"))
    assert embedded > expected, "where the pointer rests, what is around it is embedded before a click"


def test_an_exercise_tells_a_wrong_answer_from_a_right_one(opened):
    notebook = opened("01_data_loading")
    notebook.run_cell("from medcook.exercises import check")
    solution = (SOLUTIONS / "01_data_loading" / "window.py").read_text()
    output = ".jp-CodeCell:has-text('check(\"01/window\"') .jp-OutputArea-output"
    for what, answer, said in (
        ("wrong", solution.replace("+ 0.5", "+ 0.6"), "not solved yet"),
        ("right", solution, "solved"),
    ):
        notebook.run_cell("def to_unit(", answer)
        notebook.run_cell('check("01/window"')
        text = notebook.page.locator(output).first.inner_text()
        notebook.shot(f"exercise-{what}")
        assert said in text and ("not" in text) == (what == "wrong"), text
