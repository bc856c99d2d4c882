"""Reproducing: every run recorded, test reads counted, a summary by rule. Training itself is faked."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from toy import Toy, ToyFitted, ToyMethod, ToyTask, brightness, make_recipe, reproduce

from medcook import evidence, fingerprints, records, training
from medcook.errors import MedcookError
from medcook.recipes.recipe import Scale
from medcook.tasks import Budget


def test_devices_are_handed_to_every_run(world):
    seen, fit = [], training.fit
    world.monkeypatch.setattr(
        training, "fit", lambda *a, devices, **options: seen.append(devices) or fit(*a, **options)
    )
    reproduce(make_recipe(), replicates=1, devices=2)
    assert seen == [2, 2, 2]


def test_every_arm_and_replicate_leaves_a_record(world):
    reproduce(make_recipe())
    names = sorted(path.name for path in (world.folder / "full").iterdir())
    assert len(world.fitted) == 9 and len(names) == 10
    assert {"whole-0.json", "cut-2.json", "no_rows-1.json", "summary.json"} <= set(names)


def test_a_recipe_may_score_in_its_own_way(world):
    world.monkeypatch.setattr(fingerprints, "scored", lambda recipe, profile, arm: {"score error": 0.1})
    recipe = make_recipe(score=brightness, metric="rank_correlation")
    summary = reproduce(recipe)
    assert summary.arms["whole"].mean == 1 and summary.arms["cut"].mean == -1
    assert summary.comparison.effect == 2 and summary.verdict == "supported"
    assert summary.arms["whole"].structures == {"all": 1} and summary.arms["whole"].patients == 4 - 1
    assert summary.arms["whole"].fingerprint["score error"] == 0.1
    frame = evidence.evidence_frame("toy-paper", "full")
    assert {"uncertainty", "error", "group"} <= set(frame.columns) and set(frame.group) == {"F", "M"}
    assert not frame.missed.any()


def test_summary_says_what_was_found():
    summary = reproduce(make_recipe())
    assert summary.verdict == "supported" and summary.data == "real" and summary.dataset == "toy"
    assert summary.seeds == [0, 1, 2] and summary.arms["no rows"].missed == 12
    assert summary.comparison.effect > 0 and summary.comparison.n_patients == 4
    assert summary.ablation.b == "no rows" and summary.ablation.low > 0
    assert summary.arms["whole"].cost["seconds"] == 1.5 and summary.arms["whole"].selected is None


def test_quick_is_not_judged():
    assert reproduce(make_recipe(), "quick").verdict == "not judged"


def test_a_profile_may_have_methods_of_its_own(world):
    scale = make_recipe().scales["full"]
    recipe = make_recipe(scales={"full": scale, "paper": replace(scale, methods={"cut": ToyMethod(4)}, claim="Yes.")})
    full, paper = reproduce(recipe, replicates=1), reproduce(recipe, "paper", replicates=1)
    assert [method.loses for method, _ in world.fitted] == [0, 2, 6, 0, 4, 6]
    assert (full.claim, paper.claim) == (recipe.claim, "Yes.")
    assert paper.arms["whole"].setting == full.arms["whole"].setting
    assert paper.arms["cut"].setting != full.arms["cut"].setting
    assert (full.arms["cut"].fingerprint["loss"], paper.arms["cut"].fingerprint["loss"]) == (2, 4)
    assert not evidence.is_stale(recipe, full) and not evidence.is_stale(recipe, paper)
    assert "settings" in evidence.stale_because(replace(recipe, scales={"paper": scale}), paper)


def test_folds_are_compared_nested():
    recipe = make_recipe(replicate="fold")
    summary = reproduce(recipe)
    assert summary.comparison.design == "nested"


def test_the_test_set_is_opened_for_tasks_that_say_so_and_counted(world):
    scales = {"full": Scale(ToyTask(evaluation="test"), Budget(steps=3))}
    summary = reproduce(make_recipe(scales=scales))
    assert summary.test_reads == 2 * 9
    record = json.loads((world.folder / "full" / "whole-0.json").read_text())
    assert record["test_reads"] == {"count": 2, "reason": "toy-paper full whole 0"}
    assert summary.arms["whole"].selected is not None


def test_val_tasks_read_no_test_case():
    assert reproduce(make_recipe()).test_reads == 0


def test_a_recipe_without_comparison_measures_and_passes_no_verdict():
    summary = reproduce(make_recipe(compare=None, ablation=None))
    assert summary.comparison is None and summary.verdict == "not judged" and summary.arms["whole"].mean > 0


def test_a_profile_without_the_compared_arms_is_not_judged():
    scales = {"full": Scale(ToyTask(), Budget(steps=3), arms=("whole", "no rows"))}
    summary = reproduce(make_recipe(scales=scales))
    assert set(summary.arms) == {"whole", "no rows"} and summary.comparison is None and summary.ablation


def test_a_profile_that_is_not_there_is_named():
    with pytest.raises(MedcookError, match="paper"):
        reproduce(make_recipe(), "paper")


def test_load_summary_takes_the_largest_profile():
    reproduce(make_recipe(), "quick", replicates=1)
    assert evidence.load_summary("toy-paper").profile == "quick"
    full = reproduce(make_recipe())
    assert evidence.load_summary("toy-paper") == full
    assert evidence.load_summary("toy-paper", "quick").profile == "quick"
    assert evidence.load_summary("unknown") is None


def test_evidence_frame_holds_every_row():
    reproduce(make_recipe())
    frame = evidence.evidence_frame("toy-paper", "full")
    assert len(frame) == 3 * 3 * 4
    assert {"arm", "replicate", "seed", "patient_id", "dice", "missed", "unit"} <= set(frame)
    assert frame.groupby("arm").dice.mean()["whole"] > frame.groupby("arm").dice.mean()["cut"]
    assert evidence.evidence_frame("toy-paper", "paper").empty


def test_damaged_evidence_is_named(world):
    (world.folder / "full").mkdir(parents=True)
    (world.folder / "full" / "summary.json").write_text('{"paper": "toy-paper"}')
    with pytest.raises(MedcookError, match="summary.json"):
        evidence.load_summary("toy-paper")


def test_rows_survive_packing():
    reproduce(make_recipe(), replicates=1)
    record = records.read(records.Record, evidence.folder("toy-paper", "full") / "no_rows-0.json")
    frame = records.unpack(record.rows)
    assert record.rows["missed"] is True and record.rows["unit"] == "pixels"
    assert frame.missed.all() and (frame.dice == 0).all() and len(frame) == 4


def test_evidence_is_small_and_strict_json(world):
    reproduce(make_recipe())
    for path in (world.folder / "full").iterdir():
        assert "NaN" not in path.read_text() and path.stat().st_size < 8_000
    record = json.loads((world.folder / "full" / "whole-0.json").read_text())
    assert len(record["history"]["loss"]) == records.CURVE_POINTS


def test_the_environment_is_recorded():
    summary = reproduce(make_recipe(), replicates=1)
    assert {"python", "torch", "monai", "numpy", "cpu", "threads", "device", "commit"} == set(summary.environment)


def test_simulated_data_is_called_so(monkeypatch):
    monkeypatch.setattr(Toy, "manifest", SimpleNamespace(name="toy", structures={1: "square"}, simulated=True))
    assert reproduce(make_recipe()).data == "simulated"


@pytest.mark.parametrize("last_is_best", [True, False])
def test_a_selected_checkpoint_that_is_the_last_is_not_scored_twice(last_is_best):
    asked = []

    class Counting(ToyFitted):
        def predict(self, case, checkpoint="last"):
            asked.append(checkpoint)
            return super().predict(case, checkpoint)

    states = {"last": {"w": torch.zeros(2)}, "selected": {"w": torch.full((2,), 0.0 if last_is_best else 1.0)}}
    fitted = Counting(ToyMethod(), 0, weights=states)
    tables, reads = evidence._score(fitted, ToyTask(), "a reason")
    assert set(tables) == {"last", "selected"} and reads is None
    assert set(asked) == ({"last"} if last_is_best else {"last", "selected"})
