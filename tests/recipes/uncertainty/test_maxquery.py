"""MaxQuery: pixels are sorted by queries, each class has queries of its own, and no query means unknown."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn

from medcook.data import IGNORE
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.recipes.uncertainty import maxquery
from medcook.recipes.uncertainty.maxquery import (
    Doubting,
    MaxQuery,
    UnknownStructureTask,
    combine,
    distribution_loss,
    doubt,
    inlier_dice,
    localisation,
    owners,
    responses,
    strangeness,
)

TINY = dict(channels=(4, 8, 8), queries=6, width=8)
NOW = Moment(5, 10)


@pytest.fixture
def nets() -> nn.ModuleDict:
    return MaxQuery(**TINY).build(inputs=1, classes=3, dims=2)


@pytest.fixture
def batch() -> Batch:
    labels = torch.randint(0, 3, (2, 16, 16)).byte()
    labels[0, :4] = IGNORE
    return Batch(labels[:, None].float() + torch.randn(2, 1, 16, 16), labels)


@pytest.mark.component("queries as cluster centres")
class TestQueries:
    def test_a_response_is_a_scaled_product(self):
        queries, pixels = torch.randn(2, 5, 8), torch.randn(2, 8, 3, 4)
        wanted = np.einsum("bnd,bdhw->bnhw", queries.double().numpy(), pixels.double().numpy()) / np.sqrt(8)
        assert np.allclose(responses(queries, pixels).numpy(), wanted, atol=1e-5)

    def test_a_pixel_has_the_classes_of_its_queries(self):
        response, scores = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3)
        assigned = softmax(response.double().numpy(), axis=1)
        wanted = (scores.double().numpy()[..., None, None] * assigned[:, :, None]).sum(1)
        assert np.allclose(combine(response, scores).numpy(), wanted, atol=1e-5)

    def test_a_pixel_that_is_all_one_querys_has_its_classes(self):
        scores = torch.randn(1, 5, 3)
        response = torch.zeros(1, 5, 1, 1)
        response[:, 2] = 100.0
        assert torch.allclose(combine(response, scores)[0, :, 0, 0], scores[0, 2])

    def test_queries_read_the_image(self, nets):
        """Other content elsewhere changes what the queries are, and so the response of a pixel's own embedding."""
        image = torch.randn(1, 1, 32, 32)
        other = image.clone()
        other[..., 16:] += 3.0
        _, (one, two) = nets["model"].respond(torch.cat([image, other]))
        assert one.shape == (6, 3) and (one - two).abs().max() > 1e-2

    def test_the_segmentation_loss_moves_queries_pixels_and_classes(self, nets, batch):
        MaxQuery(**TINY, distribution=0.0).training_step(nets, batch, None, NOW).backward()
        net = nets["model"]
        moved = [net.start, net.head.weight, net.classify.weight, net.read[0].weight, net.down[0][0].weight]
        assert all(part.grad.abs().max() > 0 for part in moved)

    def test_it_predicts_probabilities_of_the_known(self, nets, batch):
        found = MaxQuery(**TINY).predict(nets.eval(), batch.images)
        response, scores = nets["average"].respond(batch.images)
        assert torch.allclose(found, combine(response, scores).softmax(1), atol=1e-6)


@pytest.mark.component("MaxQuery")
class TestStrangeness:
    def test_a_pixel_like_a_query_is_familiar_and_one_like_none_is_strange(self):
        queries = torch.eye(4)[None, :3]
        pixels = torch.eye(4).view(1, 4, 1, 4).transpose(1, 3)[..., 0, :].view(1, 4, 1, 4)
        found = strangeness(responses(5 * queries, 5 * pixels))[0, 0]
        assert found[3] > found[:3].max() + 5

    def test_it_is_minus_the_best_response(self, nets, batch):
        """Of the averaged network, which predicts."""
        method, nets = MaxQuery(**TINY), nets.eval()
        nn.init.zeros_(nets["model"].start)
        response = nets["average"].respond(batch.images)[0].detach().numpy()
        assert np.allclose(method.strange(nets, batch.images).detach().numpy(), -response.max(axis=1), atol=1e-5)

    def test_the_baselines_ask_the_logits(self, batch):
        nets = Doubting(channels=(4, 8)).build(inputs=1, classes=3, dims=2).eval()
        logits = nets["average"](batch.images).detach().double().numpy()
        by_softmax = Doubting(channels=(4, 8)).strange(nets, batch.images)
        by_logit = Doubting(channels=(4, 8), by="logit").strange(nets, batch.images)
        assert np.allclose(by_softmax.detach().numpy(), 1 - softmax(logits, axis=1).max(1), atol=1e-5)
        assert np.allclose(by_logit.detach().numpy(), -logits.max(1), atol=1e-5)

    def test_a_sure_pixel_is_not_doubted(self):
        assert doubt(torch.tensor([9.0, 0, 0]).view(1, 3, 1, 1)) < 0.01 < 0.6 < doubt(torch.zeros(1, 3, 1, 1))


@pytest.mark.component("query-distribution loss")
class TestDistribution:
    def test_half_of_the_queries_are_the_backgrounds(self):
        assert owners(16, 3).tolist() == [0] * 8 + [1] * 4 + [2] * 4
        assert torch.bincount(owners(16, 4)).tolist() == [8, 3, 3, 2]

    def test_it_is_minus_the_log_share_of_each_class(self, batch):
        response, owner = torch.randn(2, 6, 16, 16), owners(6, 3)
        assigned = softmax(response.double().numpy(), axis=1).transpose(0, 2, 3, 1)
        labels = batch.labels.numpy()
        wanted = [-np.log(assigned[labels == c].mean(0)[owner.numpy() == c].sum()) for c in range(3)]
        assert distribution_loss(response, batch.labels, owner).item() == pytest.approx(np.mean(wanted), abs=1e-5)

    def test_own_queries_cost_nothing_and_foreign_ones_much(self):
        labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
        labels[:, :2] = 1
        owner = torch.tensor([0, 0, 1, 1])
        own = torch.where(labels[:, None] == owner.view(1, -1, 1, 1), 30.0, 0.0)
        assert distribution_loss(own, labels, owner) < 1e-3
        assert distribution_loss(own.flip(1), labels, owner) > 10

    def test_it_is_indifferent_to_which_of_its_queries_a_class_takes(self):
        labels, owner = torch.ones(1, 4, 4, dtype=torch.uint8), torch.tensor([0, 0, 1, 1])
        response = torch.randn(1, 4, 4, 4)
        swapped = response[:, [0, 1, 3, 2]]
        one, two = (distribution_loss(each, labels, owner) for each in (response, swapped))
        assert one.item() == pytest.approx(two.item(), abs=1e-6)

    def test_a_small_structure_weighs_as_much_as_the_background(self):
        """Its pixels alone decide half of the loss, however few they are."""
        owner = torch.tensor([0, 1])
        labels = torch.zeros(1, 10, 10, dtype=torch.uint8)
        labels[0, 0, 0] = 1
        response = torch.zeros(1, 2, 10, 10)
        response[:, 0] = 8.0
        assert distribution_loss(response, labels, owner).item() == pytest.approx(8 / 2, abs=0.01)

    def test_what_is_not_labelled_says_nothing(self):
        labels = torch.full((1, 4, 4), IGNORE, dtype=torch.uint8)
        assert distribution_loss(torch.randn(1, 4, 4, 4), labels, owners(4, 2)).item() == 0

    def test_it_is_part_of_a_step(self, nets, batch):
        def cost(weight: float) -> float:
            return MaxQuery(**TINY, distribution=weight).training_step(nets.eval(), batch, None, NOW).item()

        response, scores = nets.eval()["model"].respond(batch.images)
        extra = distribution_loss(response, batch.labels, owners(6, 3)).item()
        assert cost(0.5) - cost(0.0) == pytest.approx(0.5 * extra, abs=1e-4)
        plain = find_loss("both")(combine(response, scores), batch.labels)
        assert cost(0.0) == pytest.approx(plain.item(), abs=1e-5)


class TestTask:
    task = UnknownStructureTask("embedded", labelled=1, unknown=2)

    def test_the_unknown_structure_is_unlabelled_and_the_others_close_ranks(self):
        assert self.task.classes == 3 and list(self.task.structures) == [1, 2]
        found = self.task.relabel(torch.tensor([0, 1, 2, 3, IGNORE], dtype=torch.uint8))
        assert found.tolist() == [0, 1, IGNORE, 2, IGNORE]

    def test_training_never_sees_its_label(self):
        assert set(self.task.samples("labelled").labels.unique().tolist()) == {0, 1, 2, IGNORE}


class Told(Doubting):
    """Knows the truth but for a noise, and finds each pixel as strange as that."""

    def __init__(self, strange: torch.Tensor, classes: torch.Tensor):
        self.parts, self.classes = list(strange.split(16)), list(classes.split(16))

    def strange(self, nets, images):
        return self.parts.pop(0)

    def predict(self, nets, images):
        return self.classes.pop(0)


@pytest.mark.component("MaxQuery")
def test_localisation_is_measured_over_all_pixels_of_a_case():
    task = UnknownStructureTask("embedded", labelled=1, unknown=3)
    case = next(iter(task.cases("val")))
    truth = task.preparation.labels(case)
    scores = (truth == 3).float() + torch.randn(truth.shape)
    classes = torch.randn(len(truth), 3, *truth.shape[1:]).softmax(1)
    nets = nn.ModuleDict()
    fitted = SimpleNamespace(task=task, method=Told(scores, classes), nets=nets, weights={"last": {}})
    (row,) = localisation(fitted, case)
    there = (truth == 3).flatten().numpy()
    assert row["auroc"] == pytest.approx(roc_auc_score(there, scores.flatten().numpy()), abs=1e-6)
    assert row["average_precision"] == pytest.approx(average_precision_score(there, scores.flatten().numpy()), abs=1e-6)
    doubts = 1 - classes.amax(1).flatten().numpy()
    assert row["auroc_softmax"] == pytest.approx(roc_auc_score(there, doubts), abs=1e-6)
    assert row["structure"] == "ventricles" and 0 <= row["dice"] <= 1


def test_pixels_of_the_unknown_structure_do_not_count_in_dice():
    truth = torch.tensor([0, 1, 1, IGNORE, IGNORE, 2], dtype=torch.uint8)
    guess = torch.tensor([0, 1, 0, 1, 2, 2])
    assert inlier_dice(guess, truth, 3) == pytest.approx((2 / 3 + 1) / 2)


def test_a_case_without_the_unknown_structure_is_left_out():
    task = UnknownStructureTask("embedded", labelled=1, unknown=3)
    case = next(iter(task.cases("val")))
    case.label[case.label == 3] = 0
    assert localisation(SimpleNamespace(task=task, method=None, nets=None), case) == []


def test_recipe_compares_the_same_budget():
    assert maxquery.recipe.ablation == ("maxquery", "without distribution")
