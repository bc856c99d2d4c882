"""Reproducing: every run recorded, none repeated, test reads counted, staleness seen. Training itself is faked."""

import json
import time
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medcook import evaluation, evidence, fingerprints, paths, records, training
from medcook.data.case import Case
from medcook.data.splits import Split, guard_test
from medcook.errors import MedcookError, Paused
from medcook.recipes.recipe import Arm, Recipe, Scale
from medcook.tasks import Budget


class Toy:
    """A data set of squares: eight train and val patients, two test patients."""

    manifest = SimpleNamespace(name="toy", structures={1: "square"}, simulated=False)
    split = Split(tuple("abcd"), tuple("efgh"), ("t", "u"))
    hash = "toyhash"

    def cases(self, patients):
        for patient in patients:
            if patient in self.split.test:
                guard_test("toy", patient)
            label = np.zeros((12, 12), np.uint8)
            label[2:8, 2 : 6 + ord(patient) % 4] = 1
            yield Case(label[None].astype(np.float32), label, f"{patient}-1", patient)


@dataclass(frozen=True)
class ToyTask:
    evaluation: str = "val"
    fold: int | None = None

    data = Toy()

    @property
    def val_patients(self):
        return self.data.split.val if self.fold is None else self.data.split.folds(5)[self.fold][1]

    def describe(self):
        return {"kind": "ToyTask", "evaluation": self.evaluation, "fold": self.fold}


@dataclass(frozen=True)
class ToyMethod:
    """Predicts the square, without its first `loses` rows."""

    loses: int = 0

    def settings(self):
        return {"method": "ToyMethod", "loses": self.loses}


@dataclass
class ToyFitted:
    method: ToyMethod
    seed: int
    weights: dict = field(default_factory=lambda: {"last": {}})
    key: str = "key"
    cost: dict = field(default_factory=lambda: {"steps": 3, "seconds": 1.5, "device": "cpu"})
    history: dict = field(default_factory=lambda: {"loss": [1.0] * 100, "val_step": [50], "val_dice": [0.5]})

    def predict(self, case, checkpoint="last"):
        guess = case.label.copy()
        guess[: 2 + self.method.loses + self.seed % 2] = 0
        return guess


def make_recipe(**changes):
    values = {
        "paper": "toy-paper",
        "title": "Toy",
        "claim": "More rows are better.",
        "arms": {"whole": Arm(ToyMethod()), "cut": Arm(ToyMethod(2)), "no rows": Arm(ToyMethod(6))},
        "compare": ("whole", "cut"),
        "ablation": ("whole", "no rows"),
        "scales": {name: Scale(ToyTask(), Budget(steps=3)) for name in ("quick", "full")},
    }
    return Recipe(**(values | changes))


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    """Evidence in a temporary folder, training counted and faked, behaviour by settings."""
    fitted = []

    def fit(method, task, budget, seed, progress=True, deadline=None, devices=1):
        if deadline is not None and deadline <= time.monotonic():
            raise Paused(2, budget.steps)
        fitted.append((method, seed))
        extra = {"selected": {}} if task.evaluation == "test" else {}
        return ToyFitted(method, seed, weights={"last": {}} | extra)

    monkeypatch.setattr(paths, "EVIDENCE", tmp_path)
    monkeypatch.setattr(training, "fit", fit)
    monkeypatch.setattr(fingerprints, "behaviour", lambda method: {"loss": float(method.loses)})
    return SimpleNamespace(fitted=fitted, folder=tmp_path / "toy-paper", monkeypatch=monkeypatch)


def reproduce(recipe, profile="full", **options):
    return evidence.reproduce(recipe, profile, progress=False, **options)


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


def brightness(fitted, case):
    """A recipe's own score: an uncertainty, an error and a name for every case but one."""
    if case.case_id == "e-1":
        return []
    values = {
        "uncertainty": ord(case.patient_id) / 200 * (1 - fitted.method.loses),
        "error": ord(case.patient_id) / 300,
    }
    return [evaluation.row(case, "all", group="FM"[fitted.seed % 2], **values)]


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


def test_the_score_is_part_of_the_fingerprint(world):
    asked = []
    world.monkeypatch.setattr(fingerprints, "scored", lambda *run: asked.append(run) or {})
    evidence.fingerprint(make_recipe(), "full", "cut")
    assert not asked
    recipe = make_recipe(score=brightness)
    evidence.fingerprint(recipe, "full", "cut")
    assert asked == [(recipe, "full", "cut")]


def test_summary_says_what_was_found():
    summary = reproduce(make_recipe())
    assert summary.verdict == "supported" and summary.data == "real" and summary.dataset == "toy"
    assert summary.seeds == [0, 1, 2] and summary.arms["no rows"].missed == 12
    assert summary.comparison.effect > 0 and summary.comparison.n_patients == 4
    assert summary.ablation.b == "no rows" and summary.ablation.low > 0
    assert summary.arms["whole"].cost["seconds"] == 1.5 and summary.arms["whole"].selected is None


def test_quick_is_not_judged():
    assert reproduce(make_recipe(), "quick").verdict == "not judged"


def test_finished_runs_are_not_run_again(world):
    first = reproduce(make_recipe())
    world.fitted.clear()
    assert reproduce(make_recipe()) == first
    assert world.fitted == []


def test_an_interrupted_reproduction_goes_on_where_it_stopped(world):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    reproduce(make_recipe(), replicates=1)
    world.fitted.clear()
    with world.monkeypatch.context() as patch:
        patch.setattr(training, "fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reproduce(make_recipe())
    assert len(list((world.folder / "full").glob("*-0.json"))) == 3
    reproduce(make_recipe())
    assert len(world.fitted) == 6


def test_out_of_time_the_run_under_way_is_named():
    with pytest.raises(Paused) as pause:
        reproduce(make_recipe(), minutes=0)
    assert str(pause.value) == "Paused at step 2 of 3 of arm whole, replicate 0; the same command goes on."
    assert reproduce(make_recipe(), minutes=60).verdict == "supported"


def test_what_is_finished_is_known():
    recipe = make_recipe()
    assert len(evidence.unfinished(recipe, "full")) == 9
    reproduce(recipe, replicates=1)
    assert evidence.unfinished(recipe, "full", 1) == []
    assert evidence.unfinished(recipe, "full", 2) == [("whole", 1), ("cut", 1), ("no rows", 1)]


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


def test_a_changed_setting_runs_its_arm_again(world):
    reproduce(make_recipe())
    world.fitted.clear()
    arms = make_recipe().arms | {"cut": Arm(ToyMethod(3))}
    reproduce(make_recipe(arms=arms))
    assert [method.loses for method, _ in world.fitted] == [3, 3, 3]


def test_changed_behaviour_runs_again(world):
    reproduce(make_recipe(), replicates=1)
    world.fitted.clear()
    world.monkeypatch.setattr(fingerprints, "behaviour", lambda method: {"loss": method.loses + 0.5})
    reproduce(make_recipe(), replicates=1)
    assert len(world.fitted) == 3


def test_a_damaged_record_is_made_again(world):
    reproduce(make_recipe(), replicates=1)
    world.fitted.clear()
    (world.folder / "full" / "whole-0.json").write_text("{half")
    reproduce(make_recipe(), replicates=1)
    assert len(world.fitted) == 1


def test_asking_for_fewer_replicates_throws_none_away():
    reproduce(make_recipe())
    assert reproduce(make_recipe(), replicates=1).seeds == [0, 1, 2]


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


def test_evidence_is_fresh_until_behaviour_moves(world):
    recipe = make_recipe()
    summary = reproduce(recipe)
    assert not evidence.is_stale(recipe, summary)
    world.monkeypatch.setattr(fingerprints, "behaviour", lambda method: {"loss": method.loses + 0.0005})
    assert not evidence.is_stale(recipe, summary)
    world.monkeypatch.setattr(fingerprints, "behaviour", lambda method: {"loss": method.loses + 0.01})
    assert "behaviour" in evidence.stale_because(recipe, summary)


def test_evidence_is_stale_when_the_recipe_changes():
    recipe = make_recipe()
    summary = reproduce(recipe)
    longer = replace(recipe, scales={"full": Scale(ToyTask(), Budget(steps=4))})
    assert "budget" in evidence.stale_because(longer, summary)
    fewer = make_recipe(arms={name: recipe.arms[name] for name in ("whole", "cut")}, ablation=None)
    assert "arms" in evidence.stale_because(fewer, summary)


def test_evidence_is_stale_when_a_metric_changes(monkeypatch):
    recipe = make_recipe()
    summary = reproduce(recipe)
    moved = evidence.metrics_on_fixed_masks() | {"overlap hd95": 99.0}
    monkeypatch.setattr(evidence, "metrics_on_fixed_masks", lambda: moved)
    assert evidence.is_stale(recipe, summary)


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
