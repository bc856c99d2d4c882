"""Slabs, whole volumes and priors: what each network sees, how predictions go together, and that no target leaks."""

import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn

from medcook.data import IGNORE, Case, Dataset
from medcook.data.manifests import load_manifest
from medcook.losses import cross_entropy_and_dice
from medcook.methods import Batch, Moment, Supervised
from medcook.recipes.volumes._head_and_neck import AXIAL, EMBEDDED, WINDOW, Focused, Partial, head_and_neck
from medcook.recipes.volumes._settings import BASELINE
from medcook.recipes.volumes.mediastinal_ln import (
    Views,
    detection,
    from_slabs,
    from_whole,
    fused,
    halved,
    organ_rows,
    random_slabs,
)

TINY = dict(channels=(2, 3, 4, 4))
NOW = Moment(0, 10)


class Tiny(Dataset):
    """One CT with the labels of openkbp, whose structures are `drawn`."""

    def __init__(self, drawn: list[int]):
        super().__init__(load_manifest("openkbp"))
        rng = np.random.default_rng(0)
        self.drawn, shape = drawn, (24, 20, 90)
        image = np.full((1, *shape), -1000, np.float32)
        image[:, 4:14, 6:18] = rng.uniform(-600, 600, (1, 10, 12, 90))
        label = np.zeros(shape, np.uint8)
        for value in drawn:
            label[5 + value, 8:14, 10 * value : 10 * value + 6] = value
        self.case = Case(image, label, "a", "a", attributes={"annotated": drawn})

    def index(self):
        return {"a": "a"}

    def attributes(self, case_id):
        return {"annotated": self.drawn}

    def load(self, case_id):
        return self.case


def batch(channels: int = 2, size: tuple[int, ...] = (16, 16, 24)) -> Batch:
    images = torch.randn(2, channels, *size)
    if channels == 2:
        images[:, 1] = (images[:, 1] > 1).float()
    return Batch(images, torch.randint(0, 3, (2, *size)).byte())


class TestTask:
    whole = Tiny([1, 2, 3, 4, 7])
    data = Focused(whole, (3, 1, 5))

    def test_targets_get_numbers_and_the_others_become_a_mask(self):
        case, label = self.data.load("a"), self.whole.case.label
        assert self.data.manifest.structures == {1: "right parotid", 2: "brainstem", 3: "esophagus"}
        assert np.array_equal(case.label, np.select([label == 3, label == 1], [1, 2], 0))
        assert np.array_equal(case.extras["organs"], np.isin(label, (2, 4, 7)))
        assert case.attributes["annotated"] == [1, 2] and case.attributes["missing"] == [3]
        assert case.image.min() == -160 and case.image.max() == 240
        assert self.data.hash != Focused(self.whole, (3, 1, 6)).hash

    def test_the_window_is_found_without_labels(self):
        image = self.whole.case.image[0]
        assert np.allclose(self.data.load("a").attributes["roi_centre"], head_and_neck(image))
        body = np.where(image > -900, 0, -1000)
        body[:, :, 80:] = 0
        assert np.allclose(head_and_neck(body), (8.5, 11.5, (WINDOW[2] - 1) / 2))

    def test_what_may_be_an_undrawn_target_is_not_labelled(self):
        case = self.data.load("a")
        preparation = Partial((16, 12, 72), centre="roi")
        labels, organs = preparation.labels(case), preparation.images(case)[:, 1]
        assert torch.equal(labels == IGNORE, (organs == 0) & ~torch.isin(labels, torch.tensor([1, 2])))
        complete = Focused(self.whole, (3, 1)).load("a")
        assert not (preparation.labels(complete) == IGNORE).any()

    def test_slices_may_come_first(self):
        case, turned = self.data.load("a"), Focused(self.whole, (3, 1, 5), axial=True).load("a")
        one, other = Partial((16, 12, 80), centre="roi"), Partial((80, 16, 12), centre="roi")
        assert torch.allclose(other.images(turned), one.images(case).moveaxis(-1, 2), atol=1e-5)
        assert torch.equal(other.labels(turned), one.labels(case).moveaxis(-1, 1))
        assert (WINDOW[2], *WINDOW[:2]) == AXIAL

    def test_the_mask_is_given_only_to_those_who_ask(self):
        case = self.data.load("a")
        alone, guided = (Partial((16, 12, 80), centre="roi", guided=guided).images(case) for guided in (False, True))
        assert torch.equal(alone, guided[:, :1])

    def test_it_is_the_same_recipe_on_embedded_brains(self):
        case = next(EMBEDDED.cases("val"))
        assert EMBEDDED.structures == {1: "grey matter", 2: "ventricles"}
        assert EMBEDDED.preparation.images(case).shape == (1, 2, 8, 64, 64)


@pytest.mark.component("anatomical priors")
def test_the_second_channel_is_the_mask_of_the_organs_and_holds_no_target():
    whole = Tiny([1, 2, 3, 4, 7])
    case, preparation = Focused(whole, (3, 1)).load("a"), Partial((16, 12, 72), centre="roi")
    mask = preparation.images(case)[0, 1]
    window = preparation.window(case).points()
    inside = [((p >= 0) & (p < n)).numpy() for p, n in zip(window, case.spatial, strict=True)]
    wanted = np.zeros((16, 12, 72), np.float32)
    grid = np.ix_(*[p[i].numpy().astype(int) for p, i in zip(window, inside, strict=True)])
    wanted[np.ix_(*inside)] = np.isin(whole.case.label, (2, 4, 7))[grid]
    assert mask.sum() > 0 and np.array_equal(mask.numpy(), wanted)
    without = Tiny([2, 4, 7])
    without.case = Case(
        whole.case.image, np.where(np.isin(whole.case.label, (1, 3)), 0, whole.case.label).astype(np.uint8), "a", "a"
    )
    assert torch.equal(preparation.images(Focused(without, (3, 1)).load("a")), preparation.images(case))


@pytest.mark.component("anatomical priors")
def test_priors_are_seen_only_where_asked_for():
    images = batch().images.requires_grad_()
    for priors in (True, False):
        method = Views(priors=priors, **TINY)
        nets = method.build(2, 3, 3).eval()
        (gradient,) = torch.autograd.grad(method.predict(nets, images)[:, 1].square().sum(), images, retain_graph=True)
        assert bool(gradient[:, 1].any()) == priors and gradient[:, 0].any()


@pytest.mark.component("anatomical priors")
def test_missing_priors_are_empty():
    method = Views(priors=True, **TINY)
    nets, image = method.build(1, 3, 3).eval(), torch.randn(1, 1, 16, 16, 24)
    empty = torch.cat([image, torch.zeros_like(image)], dim=1)
    assert torch.equal(method.predict(nets, image), method.predict(nets, empty))


@pytest.mark.component("anatomical priors")
def test_augmentation_moves_the_mask_and_leaves_its_values():
    given = batch(size=(16, 16, 16))
    mask = torch.zeros(2, 16, 16, 16)
    mask[:, 4:11, 5:12, 6:13] = 1
    given = given._replace(images=torch.stack([mask, mask], dim=1), labels=mask.byte())
    moved = Views().augment(given, torch.Generator().manual_seed(0))
    seen, mask = moved.images.unbind(1)
    assert mask.min() > -1e-5 and mask.max() < 1 + 1e-5 and not torch.allclose(seen, mask, atol=0.05)
    assert ((mask > 0.5) == (moved.labels == 1)).float().mean() > 0.97
    one = given._replace(images=given.images[:, :1])
    mine, theirs = (m.augment(one, torch.Generator().manual_seed(1)) for m in (Views(), BASELINE))
    assert torch.equal(mine.images, theirs.images) and torch.equal(mine.labels, theirs.labels)


@pytest.mark.component("slabs")
def test_slabs_are_neighbouring_slices_of_image_and_labels_alike():
    labels = torch.arange(30).expand(2, 8, 8, 30).byte()
    starts = set()
    for _ in range(60):
        slabs, truth = random_slabs(labels[:, None].float(), labels, 16)
        assert slabs.shape == (2, 1, 8, 8, 16) and torch.equal(slabs[:, 0].byte(), truth)
        assert (truth.diff(dim=-1) == 1).all()
        starts |= set(truth[:, 0, 0, 0].tolist())
    assert {0, 14} <= starts <= set(range(15)) and len(starts) > 10
    assert random_slabs(labels[:, None].float(), labels, 40)[1].shape == labels.shape


@pytest.mark.component("slabs")
@pytest.mark.parametrize(("thickness", "stride"), [(8, 8), (8, 4), (8, 1), (6, 2)])
@pytest.mark.parametrize("depth", [8, 13, 24])
def test_stitching_returns_every_slice_to_its_place(thickness, stride, depth):
    images = torch.randn(2, 1, 8, 9, depth)
    assert torch.equal(from_slabs(nn.Identity(), images, thickness, stride), images)


@pytest.mark.component("slabs")
def test_a_slice_is_predicted_from_the_slab_around_it():
    """Against MONAI, whose windows do not overlap; and slice by slice with windows cut by hand."""
    network, images = nn.Conv3d(1, 2, (3, 3, 7), padding=(1, 1, 3)), torch.randn(1, 1, 8, 8, 24)
    inferer = SlidingWindowInferer((8, 8, 8), overlap=0)
    assert torch.allclose(from_slabs(network, images, 8, 8), inferer(images, network), atol=1e-5)
    found = from_slabs(network, images, 8, 2)
    repeated = torch.cat([images[..., :1]] * 3 + [images] + [images[..., -1:]] * 8, dim=-1)
    for k in range(0, 24, 2):
        around = network(repeated[..., k : k + 8])[..., 3:5]
        assert torch.allclose(found[..., k : k + 2], around, atol=1e-5)


@pytest.mark.component("whole volume")
def test_the_whole_volume_is_seen_at_half_the_resolution():
    images, seen = torch.randn(2, 1, 16, 20, 24), []
    network = nn.Identity()
    network.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    assert from_whole(network, images).shape == images.shape
    assert torch.allclose(seen[0], images.unfold(2, 2, 2).unfold(3, 2, 2).unfold(4, 2, 2).mean((-1, -2, -3)), atol=1e-6)
    assert halved(torch.zeros(1, 1, 8, 64, 64)).shape[2:] == (8, 32, 32)


@pytest.mark.component("whole volume")
def test_it_comes_back_without_a_shift():
    ramp = torch.arange(24.0).expand(1, 1, 16, 16, 24)
    assert torch.allclose(from_whole(nn.Identity(), ramp)[..., 1:-1], ramp[..., 1:-1], atol=1e-5)


@pytest.mark.component("ensemble")
def test_the_ensemble_is_the_mean_of_its_networks():
    method, images = Views(**TINY), batch().images
    nets = method.build(2, 3, 3).eval()
    slabs, whole = nets["average"]
    alone = from_slabs(slabs, images[:, :1], 16, 4).softmax(1), from_whole(whole, images[:, :1]).softmax(1)
    assert not torch.allclose(*alone, atol=1e-3)
    assert torch.allclose(method.predict(nets, images), (alone[0] + alone[1]) / 2, atol=1e-6)


@pytest.mark.component("ensemble")
def test_the_maximum_of_one_structure_is_what_any_network_finds():
    each = torch.rand(3, 2, 2, 4, 4, 4).softmax(2) ** 4
    each = each / each.sum(2, keepdim=True)
    both = fused(each, "maximum")
    assert torch.equal(both.argmax(1) == 1, (each.argmax(2) == 1).any(0))
    several = fused(torch.randn(2, 2, 4, 4, 4, 4).softmax(2), "maximum")
    assert torch.allclose(several.sum(1), torch.ones(2, 4, 4, 4)) and (several >= 0).all()


@pytest.mark.component("ensemble")
def test_each_network_learns_from_its_own_view():
    method, given = Views(thickness=24, **TINY), batch()
    nets = method.build(2, 3, 3)
    slabs, whole = nets["model"]
    found = method.training_step(nets, given, None, NOW)
    losses = [
        cross_entropy_and_dice(logits, given.labels)
        for logits in (slabs(given.images[:, :1]), from_whole(whole, given.images[:, :1]))
    ]
    assert torch.allclose(found, sum(losses), atol=1e-4)


@pytest.mark.component("detection")
def test_parts_are_counted():
    truth, prediction = np.zeros((2, 12, 12), bool), np.zeros((2, 12, 12), bool)
    truth[0, 1:3, 1:3] = truth[0, 6:8, 6:8] = truth[1, 10, 1:3] = True
    truth[1, 8, 8] = True  # a corner away from the second: the same part
    prediction[0, 2, 2:5] = prediction[1, 8, 8] = True
    prediction[0, 10:12, 10:12] = prediction[1, 1, 10] = True
    assert detection(prediction, truth) == (pytest.approx(2 / 3), 2)
    assert detection(truth, truth) == (1, 0)
    assert detection(truth & False, truth) == (0, 0)
    recall, wrong = detection(truth, truth & False)
    assert np.isnan(recall) and wrong == 3


@pytest.mark.component("detection")
def test_rows_say_what_is_found():
    label = np.zeros((8, 8, 8), np.uint8)
    label[1:3, 1:3, 1:3], label[5:7, 5:7, 5:7] = 1, 2
    prediction = np.where(label == 1, 1, 0).astype(np.uint8)
    prediction[7, 0, 0] = 1

    class Fitted:
        task = EMBEDDED

        def predict(self, case):
            return prediction

    first, second = organ_rows(Fitted(), Case(np.zeros((1, 8, 8, 8), np.float32), label, "a", "a"))
    assert (first["recall"], first["false_positives"]) == (1, 1) and first["dice"] == pytest.approx(16 / 17)
    assert (second["recall"], second["false_positives"]) == (0, 0) and second["missed"]


@pytest.mark.parametrize("size", [(16, 16, 16), (8, 24, 24), (9, 17, 21)])
def test_any_size_comes_back(size):
    method = Views(priors=True, **TINY)
    found = method.predict(method.build(2, 3, 3).eval(), torch.randn(2, 2, *size))
    assert found.shape == (2, 3, *size) and torch.allclose(found.sum(1), torch.ones(2, *size), atol=1e-5)


def test_networks_are_those_of_the_baseline():
    for views in (("slabs",), ("whole",), ("slabs", "whole")):
        nets = Views(views=views).build(2, 4, 3)
        theirs = BASELINE.build(1, 4, 3)["model"].state_dict()
        assert len(nets["model"]) == len(views)
        for network in nets["model"]:
            assert {k: v.shape for k, v in network.state_dict().items()} == {k: v.shape for k, v in theirs.items()}
    assert isinstance(Views(), Supervised) and Views().augmentation == BASELINE.augmentation


@pytest.mark.parametrize("settings", [{}, {"priors": True}, {"views": ("whole", "whole")}])
def test_every_parameter_is_trained(settings):
    method = Views(**settings, **TINY)
    nets = method.build(2, 3, 3)
    method.training_step(nets, batch(), None, NOW).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in nets["model"].parameters())
