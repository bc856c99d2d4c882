"""SegBook: organs first, all weights but the last layer's go over, and targets that differ in how many have labels."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from pretexts import assert_both_phases_work, built

from medcook.data import IGNORE
from medcook.data.transforms import NONE
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.networks import parameters
from medcook.recipes.pretraining.med3d import balanced
from medcook.recipes.pretraining.segbook import FULL_ARMS, SIZES, FineTuned, gains, recipe
from medcook.recipes.volumes.stu_net import LARGE, SMALL

TINY = FineTuned(channels=(2, 4, 8), structures=3, augmentation=NONE)
SCRATCH = replace(TINY, waits=True)
SIZE = (8, 12, 16)
FIRST, LAST_OF_PRETEXT, LABELS = Moment(0, 9), Moment(2, 9), Moment(3, 9)


def batch(size: tuple[int, ...] = SIZE) -> Batch:
    """Three volumes with annotations, as they come from a pool."""
    rng = torch.Generator().manual_seed(0)
    raters = torch.randint(0, 4, (3, 1, *size), generator=rng).byte()
    return Batch(raters + torch.randn(3, 1, *size, generator=rng), torch.full((3, *size), IGNORE).byte(), raters=raters)


def labelled(size: tuple[int, ...] = SIZE) -> Batch:
    labels = torch.randint(0, 3, (3, *size), generator=torch.Generator().manual_seed(1)).byte()
    return Batch(labels[:, None].float(), labels)


def same(one, other) -> set[str]:
    """Names of the weights that two networks share."""
    theirs = other.state_dict()
    return {
        name
        for name, weight in one.state_dict().items()
        if weight.shape == theirs[name].shape and torch.equal(weight, theirs[name])
    }


@pytest.mark.component("supervised pre-training on CT")
class TestPretext:
    def test_organs_are_segmented_by_a_network_with_their_number_of_classes(self):
        nets, pool = built(TINY), batch()
        logits = nets["pretext"](pool.images)
        assert logits.shape == (3, 4, *SIZE)
        wanted = balanced(logits, pool.raters[:, 0])
        torch.testing.assert_close(TINY.training_step(nets, labelled(), pool, FIRST), wanted)

    def test_only_this_network_learns(self):
        nets = built(TINY)
        TINY.training_step(nets, labelled(), batch(), FIRST).backward()
        assert all(weight.grad is not None for weight in nets["pretext"].parameters())
        assert all(weight.grad is None for weight in nets["model"].parameters())

    def test_annotations_move_with_the_volumes(self, monkeypatch):
        """What shows its own annotation still does so after augmentation."""
        method, seen = replace(TINY, augmentation=replace(NONE, rotate=30.0, shift=0.2)), []
        nets, raters = built(method), torch.zeros(2, 1, 16, 16, 16).byte()
        raters[:, :, 4:12, 4:12, 4:12] = 2
        nets["pretext"].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
        loss = lambda logits, labels: seen.append(labels) or logits.mean()  # noqa: E731
        monkeypatch.setattr("medcook.recipes.pretraining.segbook.balanced", loss)
        method.pretext(nets, Batch(raters.float(), torch.full_like(raters[:, 0], IGNORE), raters=raters), FIRST)
        shown, labels = seen
        assert not torch.equal(labels, raters[:, 0])
        assert ((shown[:, 0] > 1) == (labels == 2)).float().mean() > 0.98

    def test_without_annotations_there_is_nothing_to_learn(self):
        loss = TINY.training_step(built(TINY), labelled(), batch()._replace(raters=None), FIRST)
        assert loss.item() == 0

    def test_at_full_the_pool_is_ct_with_organs(self):
        task = recipe.scales["full"].task
        assert task.pool == ("openkbp",) and task.annotated and task.dataset == "hippocampus"


@pytest.mark.component("fine-tuning")
class TestFineTuning:
    def test_all_weights_but_the_last_layers_go_over_with_the_last_step(self):
        nets = built(TINY)
        head = nets["model"].head.weight.detach().clone()
        TINY.after_step(nets, Moment(1, 9))
        assert not {name for name in same(nets["model"], nets["pretext"]) if name.endswith("first.weight")}
        TINY.after_step(nets, LAST_OF_PRETEXT)
        for name in ("model", "average"):
            names = {name for name, _ in nets[name].named_parameters()}
            assert same(nets[name], nets["pretext"]) == names - {"head.weight", "head.bias"}
        assert torch.equal(nets["model"].head.weight, head)

    def test_what_was_learned_of_organs_has_a_say_in_what_follows(self):
        losses = []
        for factor in (1.0, 1.5):
            nets = built(TINY)
            with torch.no_grad():
                nets["pretext"].stem[0].first.weight[0] *= factor
                nets["pretext"].join[0][0].shortcut.weight *= factor
            TINY.after_step(nets, LAST_OF_PRETEXT)
            losses.append(TINY.training_step(nets, labelled(), batch(), LABELS).item())
        assert losses[0] != losses[1]

    def test_all_weights_learn_on_the_labels(self):
        nets = built(TINY)
        TINY.training_step(nets, labelled(), batch(), LABELS).backward()
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in nets["model"].parameters())
        assert all(weight.grad is None for weight in nets["pretext"].parameters())

    def test_from_scratch_nothing_happens_before_and_then_the_same(self):
        nets = built(SCRATCH)
        assert "pretext" not in nets
        before = {name: weight.clone() for name, weight in nets["model"].named_parameters()}
        SCRATCH.training_step(nets, labelled(), batch(), FIRST).backward()
        SCRATCH.after_step(nets, LAST_OF_PRETEXT)
        assert all(weight.grad is None for weight in nets["model"].parameters())
        assert all(torch.equal(before[name], weight) for name, weight in nets["model"].named_parameters())
        assert SCRATCH.first(216) == TINY.first(216) == 72
        rates = [method.rate_at(Moment(step, 216)) for method in (TINY, SCRATCH) for step in (72, 100, 215)]
        assert rates[:3] == rates[3:]

    def test_arms_of_a_size_differ_in_the_start_alone(self):
        for before in ("", "larger, "):
            for size, count in SIZES.items():
                one, other = (recipe.arms[f"{before}{start}, {size}"] for start in ("pre-trained", "scratch"))
                assert replace(other.method, waits=False) == one.method and other.method.waits
                assert one.changes == other.changes == {"labelled": count}


@pytest.mark.component("sizes of the target set")
class TestSizes:
    def test_more_patients_have_labels_from_size_to_size(self):
        tasks = [recipe.run("quick", f"pre-trained, {size}", 0)[1] for size in ("few", "all")]
        few, everybody = (task.labelled_patients for task in tasks)
        assert len(few) == SIZES["few"] == 3 and set(few) < set(everybody)
        assert set(everybody) == set(tasks[0].data.split.train)
        counts = [3 if size == "few" else count for size, count in SIZES.items()]
        assert counts == [3, 24, None]

    def test_gains_are_differences_of_what_there_is(self):
        dice = {"pre-trained, few": 0.7, "scratch, few": 0.4, "pre-trained, all": 0.9, "scratch, all": 0.95}
        tables = {name: pd.DataFrame({"dice": [value - 0.05, value + 0.05]}) for name, value in dice.items()}
        assert gains(tables) == {"few": pytest.approx(0.3), "all": pytest.approx(-0.05)}

    def test_full_runs_the_smallest_and_the_largest(self):
        assert recipe.scales["full"].arms == FULL_ARMS and recipe.compare == ("pre-trained, few", "scratch, few")
        assert recipe.scales["full"].task.evaluation == "test"


@pytest.mark.component("multiple model scales")
def test_the_larger_network_has_more_of_both():
    small, large = (recipe.arms[name].method for name in ("pre-trained, few", "larger, pre-trained, few"))
    assert (small.channels, large.channels) == (SMALL, LARGE) and large.depth == 2 * small.depth
    counts = [parameters(built(method)["model"]) for method in (small, large)]
    assert counts[1] > 8 * counts[0]


@pytest.mark.component("transfer to other modalities")
def test_a_set_of_the_pool_is_never_the_target():
    for profile in ("quick", "full"):
        task = recipe.scales[profile].task
        assert task.dataset not in task.pool


@pytest.mark.parametrize("size", [(8, 64, 64), (32, 56, 40), (16, 16, 16), (9, 10, 11)])
def test_any_size(size):
    nets = built(FineTuned())
    assert torch.isfinite(FineTuned().pretext(nets, batch(size), FIRST))
    assert FineTuned().predict(nets.eval(), batch(size).images).shape == (3, 3, *size)


@pytest.mark.parametrize("method", [TINY, SCRATCH])
def test_every_arm_goes_through_both_phases(method):
    assert_both_phases_work(method, batch())


def test_slices_are_refused():
    with pytest.raises(MedcookError, match="volumes"):
        TINY.build(1, 3, 2)
