"""What every recipe promises. One test of each promise, run for each recipe there is."""

import json

import pytest
import torch

from medcook.data import open_dataset
from medcook.errors import MedcookError
from medcook.evaluation import MEASURES
from medcook.methods import Batch, Moment
from medcook.recipes import Recipe, all_recipes

EVERY = pytest.mark.parametrize("recipe", all_recipes().values(), ids=all_recipes())
PROFILES = [(recipe, profile) for recipe in all_recipes().values() for profile in recipe.scales]
AT_EVERY_PROFILE = pytest.mark.parametrize(
    ("recipe", "profile"), PROFILES, ids=[f"{recipe.paper}-{profile}" for recipe, profile in PROFILES]
)
SIDE = {2: 32, 3: 16}


def runs(recipe: Recipe, profile: str) -> list[tuple]:
    """(arm, number, method, task, budget, seed) of every run of a profile."""
    numbers = range(recipe.scales[profile].replicates)
    return [(arm, k, *recipe.run(profile, arm, k)) for arm in recipe.arms_at(profile) for k in numbers]


@EVERY
def test_it_is_found_by_its_name(recipe):
    assert all_recipes()[recipe.paper] is recipe
    assert recipe.title and recipe.claim.endswith(".")


@EVERY
def test_it_compares_arms_that_exist(recipe):
    for pair in (recipe.compare, recipe.ablation):
        assert pair is None or (len(set(pair)) == 2 and set(pair) <= set(recipe.arms))
    assert recipe.compare or not recipe.ablation
    assert recipe.metric in MEASURES or recipe.score
    assert recipe.margin > 0 or recipe.expect in ("superior", "association")


@EVERY
def test_the_claim_is_tested_at_full(recipe):
    assert {"quick", "full"} <= set(recipe.scales)
    for profile in recipe.scales:
        assert set(recipe.arms_at(profile)) <= set(recipe.arms)
    compared = {*(recipe.compare or ()), *(recipe.ablation or ())}
    assert compared <= set(recipe.arms_at("full"))
    assert recipe.scales["full"].replicates >= 3


@EVERY
def test_quick_needs_no_download(recipe):
    assert recipe.scales["quick"].task.dataset == "embedded"


def needs_attributes(task) -> None:
    """Skip where who takes part depends on facts about patients, and these are not on this machine."""
    try:
        _ = task.labelled_patients
    except MedcookError as error:
        if "not on this machine" not in str(error):
            raise
        pytest.skip(f"{task.dataset} is not on this machine")


@AT_EVERY_PROFILE
def test_runs_are_what_the_recipe_says(recipe, profile):
    scale = recipe.scales[profile]
    for arm, number, method, task, budget, seed in runs(recipe, profile):
        assert method is recipe.method(profile, arm) and seed == number
        assert budget == scale.budget  # no arm gets more than another
        assert type(task) is type(scale.task) and task.dataset == scale.task.dataset
        assert all(getattr(task, name) == value for name, value in recipe.arms[arm].changes.items())
        assert recipe.replicate == "seed" or getattr(task, recipe.replicate) == number
        split = open_dataset(task.dataset).split
        needs_attributes(task)
        assert task.labelled_patients and task.val_patients
        assert not {*task.labelled_patients, *task.val_patients} & set(split.test)
        assert not set(task.labelled_patients) & set(task.val_patients)


@EVERY
def test_only_a_published_setting_changes_the_methods(recipe):
    """And then each stays what its arm says it is: the same mechanism with the same switches.

    At `quick`, where other structures have other names and no pre-trained encoder is at hand, just these may differ.
    """
    for profile, scale in recipe.scales.items():
        assert not scale.methods or profile in ("quick", "paper")
        for arm, method in scale.methods.items():
            assert arm in recipe.arms_at(profile) and isinstance(method, type(recipe.arms[arm].method))
            if profile == "quick":
                own = vars(recipe.arms[arm].method)
                assert {name for name, value in vars(method).items() if value != own[name]} <= {"language", "encoder"}
            switches = {name: on for name, on in vars(recipe.arms[arm].method).items() if isinstance(on, bool)}
            assert switches.items() <= vars(method).items()


@AT_EVERY_PROFILE
def test_every_run_is_another(recipe, profile):
    found = [json.dumps([m.settings(), t.describe(), seed]) for _, _, m, t, _, seed in runs(recipe, profile)]
    assert len(set(found)) == len(found)


@EVERY
def test_one_step_of_every_arm_learns(recipe):
    tried = [run for profile in ("quick", "paper") if profile in recipe.scales for run in runs(recipe, profile)]
    for method, task in {json.dumps(m.settings()): (m, t) for _, _, m, t, _, _ in tried}.values():
        dims = task.preparation.dims
        rng = torch.Generator().manual_seed(0)
        labels = torch.randint(0, task.classes, (2, *[SIDE[dims]] * dims), generator=rng).byte()
        batch = method.augment(Batch(labels[:, None].float(), labels), rng)
        nets = method.build(1, task.classes, dims)
        unlabelled = batch._replace(labels=torch.full_like(batch.labels, 255)) if method.uses_unlabelled else None
        for now in (Moment(0, 10), Moment(9, 10)):
            nets.zero_grad()
            loss = method.training_step(nets, batch, unlabelled, now)
            loss.backward()
            assert torch.isfinite(loss)
            gradients = [p.grad for p in nets.parameters() if p.requires_grad]
            learns = any(g is not None and g.abs().max() > 0 for g in gradients)
            assert learns or (now.step == 0 and loss.item() == 0), "only who waits for labels may stand still"
            method.after_step(nets, now)
        assert method.predict(nets.eval(), batch.images).shape == (2, task.classes, *labels.shape[1:])
