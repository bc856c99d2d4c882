"""The survey's protocol: the table by set and target, the gap between sets, and the same prompts for every arm."""

import numpy as np
import pandas as pd
import pytest

from medcook.recipes.sam_adaptation import sam4mis
from medcook.recipes.sam_adaptation._prompting import every_prompt
from medcook.recipes.sam_adaptation.sam4mis import first_of_each, recipe, table, unevenness
from medcook.sam.zero_shot import Target


@pytest.fixture
def rows() -> pd.DataFrame:
    """Two sets; patient a of the first has two cases."""
    columns = ["group", "structure", "patient_id", "dice"]
    found = [("mr", "x", "a", 0.2), ("mr", "x", "a", 0.4), ("mr", "x", "b", 0.9), ("mr", "y", "a", 0.8)]
    return pd.DataFrame([*found, ("ct", "z", "c", 0.1)], columns=columns)


@pytest.mark.component("benchmark over modalities and targets")
class TestBenchmark:
    def test_the_table_is_a_mean_over_patients(self, rows):
        found = table(rows)["dice"]
        assert found["mr", "x"] == pytest.approx(0.6) and found["mr", "y"] == 0.8 and found["ct", "z"] == 0.1

    def test_a_target_is_asked_by_box_and_by_click(self):
        mask = np.zeros((32, 32), bool)
        mask[8:20, 8:20] = True
        target = Target("embedded", "p", "one", mask.astype(np.float32), mask)
        asked = []

        def answer(image, prompt):
            asked.append(prompt)
            return mask if prompt.box else ~mask

        found = every_prompt(answer, target, sam4mis.CLICKS)
        assert found == {"dice": 0.5, "box": 1.0, "click_1": 0.0}
        assert asked[0].box == (8, 8, 20, 20) and len(asked[1].foreground) == 1 and asked[1].box is None

    def test_one_slice_a_structure(self):
        targets = [Target("embedded", "p", name, None, None) for name in ("one", "one", "two")]
        assert [target.structure for target in first_of_each(iter(targets))] == ["one", "two"]

    def test_four_sets_at_full(self):
        task = recipe.scales["full"].task
        assert {task.dataset, *(part[0] for part in task.parts)} == {"acdc", "chest_xray", "bubil", "openkbp"}


@pytest.mark.component("unevenness")
def test_unevenness_is_the_gap_between_the_best_and_the_worst_set(rows):
    assert unevenness(rows) == pytest.approx(0.7 - 0.1)


@pytest.mark.component("adaptation")
def test_the_arms_adapt_nothing_the_decoder_or_everything():
    arms = {name: arm.method for name, arm in recipe.arms.items()}
    assert arms["zero-shot"].rate < 1e-9 < arms["decoder"].rate
    assert "encoder" not in arms["decoder"].tuned and "encoder" in arms["everything"].tuned
