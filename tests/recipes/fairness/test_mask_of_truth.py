"""What classifiers see of masked images, and what is measured on them."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from medcook.data.case import Case
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.pooled import POOLED
from medcook.recipes.fairness.mask_of_truth import (
    MASKINGS,
    MaskedClassifier,
    RegionTask,
    WithRegion,
    attribution_inside,
    box,
    grown,
    hide,
    likeness,
    masking_rows,
    recipe,
    score_under,
    visible,
)
from medcook.training import Fitted

TINY = {"channels": (4, 8), "dropout": 0.0}


def ring(size: int = 16) -> torch.Tensor:
    """(2, 1, size, size): an L-shaped region, and none."""
    region = torch.zeros(2, 1, size, size)
    region[0, 0, 3:10, 5:7] = region[0, 0, 8:10, 5:12] = 1
    return region


def images(size: int = 16) -> torch.Tensor:
    """(2, 2, size, size): noise with a trend, and the region."""
    noise = torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(0)) + torch.linspace(0, 3, size)
    return torch.cat([noise, ring(size)], dim=1)


def case() -> Case:
    label = ring()[0, 0].numpy().astype(np.uint8)
    image = images()[0, :1].numpy() * 40 + 100
    return Case(image, label, "one", "one", attributes={"group": "atrophy", "site": "north"})


class FewPatients(RegionTask):
    """Six patients to train on, the same in every draw."""

    @property
    def labelled_patients(self):
        return self.data.split.train[:6]


def sick(**settings) -> RegionTask:
    """Who of a few simulated patients is sick."""
    return FewPatients("embedded", outcome="group", positive="atrophy", **settings)


@pytest.fixture(params=["full", "without", "only"])
def fitted(request) -> Fitted:
    task = RegionTask("embedded", outcome="group", positive="atrophy")
    object.__setattr__(task, "preparation", WithRegion(size=(16, 16)))
    method = MaskedClassifier(**TINY, masking=request.param)
    torch.manual_seed(3)
    nets = method.build(2, 2, 2)
    return Fitted(method, task, nets, {"last": nets.state_dict()}, {}, {"precision": "float32"})


@pytest.mark.component("masking of the region")
class TestMasking:
    def test_what_is_hidden_changes_nothing(self):
        """The defining property: other grey values under the mask, however wild, and the network sees the same."""
        for masking in set(MASKINGS) - {"full"}:
            method, some = MaskedClassifier(masking=masking, grow=2), images()
            shown = visible(some[:, 1:], masking, 2)
            other = some.clone()
            other[:, :1] = torch.where(shown, some[:, :1], 1000.0)
            if masking == "silhouette":
                other[:, :1] = 1000.0
            assert torch.equal(method.view(some), method.view(other)), masking

    def test_what_is_shown_has_zero_mean_and_unit_variance(self):
        some = images()
        shown = visible(some[:, 1:], "without", 0)
        view = hide(some[:, :1], shown)
        seen = view[0][shown[0]]
        assert seen.mean().item() == pytest.approx(0, abs=1e-6) and seen.std(unbiased=False).item() == pytest.approx(1)
        assert (view[0][~shown[0]] == 0).all()

    def test_a_full_image_is_standardised_and_nothing_else(self):
        some = images()
        x = some[0, 0]
        assert torch.allclose(MaskedClassifier().view(some)[0, 0], (x - x.mean()) / x.std(unbiased=False), atol=1e-5)

    def test_a_silhouette_is_the_region(self):
        view = MaskedClassifier(masking="silhouette").view(images())
        assert view[0].unique().numel() == 2 and torch.equal(view[0] > 0, ring()[0] > 0)
        assert (view[1] == 0).all()

    def test_where_nothing_is_shown_there_is_nothing(self):
        view = MaskedClassifier(masking="only").view(images())
        assert torch.isfinite(view).all() and (view[1] == 0).all()

    def test_growing_agrees_with_scipy(self):
        wanted = ndimage.binary_dilation(ring()[0, 0].numpy(), np.ones((3, 3)), iterations=3)
        assert np.array_equal(grown(ring() > 0, 3)[0, 0].numpy(), wanted)

    def test_the_box_is_the_smallest(self):
        wanted = np.zeros((16, 16), bool)
        wanted[ndimage.find_objects(ring()[0, 0].numpy().astype(int))[0]] = True
        found = box(ring() > 0)
        assert np.array_equal(found[0, 0].numpy(), wanted) and not found[1].any()

    def test_inside_and_outside_share_the_image(self):
        region = ring()
        assert torch.equal(visible(region, "only", 0), ~visible(region, "without", 0))
        assert torch.equal(visible(region, "only box", 0), ~visible(region, "without box", 0))
        assert (visible(region, "without grown", 2) <= visible(region, "without", 2)).all()
        assert torch.equal(visible(region, "without grown", 2), ~grown(region > 0, 2))

    def test_an_unknown_masking_is_named(self):
        with pytest.raises(MedcookError, match="Unknown masking 'liver'"):
            visible(ring(), "liver", 0)

    def test_volumes_are_masked_too(self):
        region = torch.zeros(1, 1, 6, 6, 6)
        region[..., 2:4, 1:3, 2:5] = 1
        assert box(region > 0).sum() == region.sum() and grown(region > 0, 1).sum() == 4 * 4 * 5


class TestRegion:
    def test_images_come_with_their_region(self):
        found = WithRegion(size=(16, 16)).images(case())
        assert found.shape == (1, 2, 16, 16) and torch.equal(found[0, 1], ring()[0, 0])
        assert found[0, 0].mean().item() == pytest.approx(0, abs=1e-5)

    def test_it_moves_with_the_image_and_keeps_its_values(self):
        some = torch.cat([ring() * 5, ring()], dim=1)
        method = MaskedClassifier()
        moved = method.augment(Batch(some, torch.ones(2, 16, 16).byte()), torch.Generator().manual_seed(1))
        assert not torch.equal(moved.images[:, 1], some[:, 1]) and moved.images[:, 1].amax() <= 1
        inside, outside = (
            moved.images[0, 0][mask].mean() for mask in (moved.images[0, 1] > 0.9, moved.images[0, 1] < 0.1)
        )
        assert inside > 3 and outside < 1
        assert (moved.labels == 1).all(), "an outcome fills the image"

    def test_shuffled_outcomes_are_the_same_ones_dealt_out_anew(self):
        plain, dealt, again, other = (
            sick(shuffled=shuffled, draw=draw).samples("labelled")
            for shuffled, draw in ((False, 0), (True, 0), (True, 0), (True, 1))
        )
        assert torch.equal(dealt.labels, again.labels) and torch.equal(dealt.images, plain.images)
        assert not torch.equal(dealt.labels, plain.labels) and not torch.equal(dealt.labels, other.labels)
        first = [int((samples.case_of == 0).sum()) for samples in (plain, dealt)]
        assert first[0] == first[1]
        outcomes = [samples.labels[:: first[0], 0, 0] for samples in (plain, dealt)]
        assert outcomes[0].sum() == outcomes[1].sum(), "as many patients have the outcome"
        for number in dealt.case_of.unique():
            assert dealt.labels[dealt.case_of == number].unique().numel() == 1

    def test_validation_outcomes_are_never_shuffled(self):
        assert torch.equal(*(sick(shuffled=on).samples("val").labels for on in (False, True)))


@pytest.mark.component("training on one masking, testing on another")
class TestUnderAnotherMasking:
    def test_the_score_is_that_of_the_other_masking(self, fitted):
        for masking in ("full", "without", "only"):
            view = MaskedClassifier(masking=masking).view(fitted.task.preparation.images(case()))
            wanted = fitted.nets.eval()["average"](view).softmax(1)[0, 1]
            assert score_under(fitted, case(), masking) == pytest.approx(wanted.item(), abs=1e-5)

    def test_rows_hold_every_score(self, fitted):
        (row,) = masking_rows(fitted, case())
        assert row["score"] == row[f"score_{fitted.method.masking}"] and row["outcome"] == 1 and row["group"] == "north"
        assert len({row["score_full"], row["score_without"], row["score_only"]}) == 3
        assert ("attribution" in row) == (fitted.method.masking == "full")

    def test_a_case_without_a_known_outcome_is_left_out(self, fitted):
        unknown = case()
        unknown.attributes["group"] = None
        assert masking_rows(fitted, unknown) == []


@pytest.mark.component("above random")
def test_the_control_differs_in_its_outcomes_alone():
    better, control = recipe.compare
    assert recipe.arms[better].method.settings() == recipe.arms[control].method.settings()
    assert recipe.arms[control].changes == {"shuffled": True} and not recipe.arms[better].changes
    assert POOLED[recipe.metric].value(np.array([0.1, 0.9]), np.array([0, 1])) == 1
    masked = {arm.method.masking for arm in recipe.arms.values()}
    assert masked == set(MASKINGS), "every masking is an arm"


class TestAttribution:
    def test_nothing_hidden_gets_any(self, fitted):
        inside, area = attribution_inside(fitted, case())
        assert area == pytest.approx(ring()[0].mean().item())
        wanted = {"without": 0, "only": 1}
        if fitted.method.masking in wanted:
            assert inside == pytest.approx(wanted[fitted.method.masking], abs=1e-6)
        else:
            assert 0 < inside < 1

    def test_a_network_that_looks_everywhere_alike_has_the_share_of_what_it_sees(self, fitted):
        """Its logit is the sum of the pixels: every pixel gets its own value."""

        class Sum(torch.nn.Module):
            def forward(self, x):
                return torch.stack([-x.sum((1, 2, 3)), x.sum((1, 2, 3))], dim=1)

        fitted.nets = torch.nn.ModuleDict({"average": Sum()})
        fitted.weights = {"last": {}}
        view = fitted.method.view(fitted.task.preparation.images(case())).abs()
        wanted = (view * ring()[:1]).sum() / view.sum()
        assert attribution_inside(fitted, case())[0] == pytest.approx(wanted.item(), abs=1e-5)

    def test_nothing_attributed_is_undefined(self, fitted):
        torch.nn.init.zeros_(fitted.nets["average"][2].weight)
        fitted.weights = {"last": fitted.nets.state_dict()}
        assert math.isnan(attribution_inside(fitted, case())[0])


def test_likeness_is_one_for_the_own_masking(fitted):
    assert likeness(fitted, case(), fitted.method.masking) == pytest.approx(1, abs=1e-6)
    other = "only" if fitted.method.masking != "only" else "full"
    assert likeness(fitted, case(), other) < 1


def test_it_learns_from_what_it_sees():
    """Bright inside the region or not: told from the inside, and not from the outside."""
    outcome = torch.arange(16) % 2
    region = ring()[:1].expand(16, 1, 16, 16)
    bright = torch.linspace(-1, 1, 16).expand(16, 16) * region * (2 * outcome - 1).view(-1, 1, 1, 1)
    labels = outcome.view(-1, 1, 1).expand(16, 16, 16).to(torch.uint8)
    losses = {}
    for masking in ("only", "without"):
        torch.manual_seed(0)
        method = MaskedClassifier(**TINY, masking=masking)
        net = method.build(2, 2, 2)
        optimiser = torch.optim.Adam(net["model"].parameters(), 1e-2)
        for _ in range(25):
            some = torch.cat([0.3 * torch.randn(16, 1, 16, 16) + bright, region], dim=1)
            loss = method.training_step(net, Batch(some, labels), None, Moment(0, 10))
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        losses[masking] = loss.item()
    assert losses["only"] < 0.3 and losses["without"] > 0.5
