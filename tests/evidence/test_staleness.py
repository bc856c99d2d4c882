"""What is finished is not run again, what changed is, and evidence that no longer holds is called stale."""

from dataclasses import replace

import pytest
from toy import ToyMethod, ToyTask, brightness, make_recipe, reproduce

from medcook import evidence, fingerprints, training
from medcook.errors import Paused
from medcook.recipes.recipe import Arm, Scale
from medcook.tasks import Budget


def test_the_score_is_part_of_the_fingerprint(world):
    asked = []
    world.monkeypatch.setattr(fingerprints, "scored", lambda *run: asked.append(run) or {})
    evidence.fingerprint(make_recipe(), "full", "cut")
    assert not asked
    recipe = make_recipe(score=brightness)
    evidence.fingerprint(recipe, "full", "cut")
    assert asked == [(recipe, "full", "cut")]


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


def test_evidence_is_fresh_until_behaviour_moves(world):
    recipe = make_recipe()
    summary = reproduce(recipe)
    assert not evidence.is_stale(recipe, summary)
    world.monkeypatch.setattr(fingerprints, "behaviour", lambda method: {"loss": method.loses + 0.0005})
    assert not evidence.is_stale(recipe, summary)
    world.monkeypatch.setattr(fingerprints, "behaviour", lambda method: {"loss": method.loses + 0.01})
    assert "behaviour" in evidence.stale_because(recipe, summary)
    world.monkeypatch.setattr(ToyMethod, "trial_tolerance", 0.02)
    assert not evidence.is_stale(recipe, summary)


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
