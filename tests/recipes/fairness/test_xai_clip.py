"""XAI-CLIP: the region that text finds, what is perturbed in it, and what becomes salient."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medcook.data import IGNORE, Case
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.methods.contrastive import contrast
from medcook.recipes.fairness import xai_clip
from medcook.recipes.fairness.xai_clip import (
    SENTENCES,
    OrganTask,
    XaiClip,
    boxes,
    elsewhere,
    most_salient,
    occlusion,
    organ,
    overlap,
    recipe,
    restrict,
    salient,
    windows,
)

TINY = dict(channels=(4, 8), reads=(8, 16), width=8, window=8, stride=4)
START = Moment(0, 10)


def scene(count: int = 4, side: int = 32) -> Batch:
    """Dark squares of a third of the side at random places in noise."""
    labels = torch.zeros(count, side, side, dtype=torch.uint8)
    for label, (row, column) in zip(labels, torch.randint(2, side // 2, (count, 2)).tolist(), strict=True):
        label[row : row + side // 2 - 2, column : column + side // 2 - 2] = 1
    return Batch(1 - 3.0 * labels[:, None] + 0.3 * torch.randn(count, 1, side, side), labels)


@pytest.fixture(scope="module")
def taught() -> tuple[XaiClip, nn.ModuleDict]:
    """Both networks after some steps on scenes."""
    torch.manual_seed(0)
    method = XaiClip(**TINY)
    nets = method.build(inputs=1, classes=2, dims=2)
    optimiser = torch.optim.Adam([p for p in nets.parameters() if p.requires_grad], lr=1e-2)
    for step in range(50):
        loss = method.training_step(nets, scene(8), None, START)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        method.after_step(nets, Moment(step, 50))
    return method, nets.eval()


def dice(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


@pytest.mark.component("region from image-text embeddings")
class TestRegion:
    def test_boxes_are_means_over_patches_and_know_their_share(self):
        maps, inside = torch.randn(2, 3, 6, 5), torch.rand(2, 24, 20) < 0.4
        vectors, share = boxes(maps, inside, 2)
        assert vectors.shape == (2 * 5 * 4, 3) and share.shape == (40,)
        at = 20 + 3 * 4 + 1  # of the second image, the box whose corner is patch (3, 1)
        torch.testing.assert_close(vectors[at], maps[1, :, 3:5, 1:3].mean((1, 2)))
        torch.testing.assert_close(share[at], inside[1, 12:20, 4:12].float().mean())

    def test_a_box_is_paired_with_the_sentence_that_says_its_share(self, monkeypatch):
        seen = []
        monkeypatch.setattr(xai_clip, "contrast", lambda *given: seen.append(given) or contrast(*given))
        method = XaiClip(**TINY, regions=10_000)
        nets = method.build(1, 2, 2)
        batch = scene()
        method.reading(nets["reader"], batch)
        _, texts, said, _ = seen[0]
        share = F.avg_pool2d((batch.labels == 1)[:, None].float(), 4, stride=2).flatten()
        expected = torch.where(share < 0.1, 0, torch.where(share <= 0.7, 1, 2))
        assert said.bincount().tolist() == expected.bincount().tolist()
        torch.testing.assert_close(texts, nets["reader"].texts(SENTENCES)[said])

    def test_the_word_finds_the_organ(self, taught):
        method, nets = taught
        batch = scene(6)
        with torch.no_grad():
            found = [method.text_region(nets, image) for image in batch.images]
        assert np.mean([dice(*pair) for pair in zip(found, batch.labels == 1, strict=True)]) > 0.7

    def test_it_is_the_word_that_finds_it(self, taught):
        """Ask for the outside instead, and what is found is not the organ."""
        method, nets = taught
        batch = scene(6)
        with torch.no_grad():
            found = [method.text_region(nets, image, "outside", "organ") for image in batch.images]
        assert np.mean([dice(*pair) for pair in zip(found, batch.labels == 0, strict=True)]) > 0.7

    def test_the_segmentation_learns_nothing_from_text(self):
        gradients = []
        for regions in (1, 64):
            torch.manual_seed(0)
            method = XaiClip(**TINY, regions=regions)
            nets = method.build(1, 2, 2)
            method.training_step(nets, scene(), None, START).backward()
            gradients.append([p.grad.clone() for p in nets["model"].parameters()])
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.component("region-aware perturbation")
class TestPerturbation:
    def test_windows_cover_everything(self):
        masks = windows((20, 14), 8, 5)
        assert masks.any(0).all() and (masks.sum((1, 2)) == 64).all()
        assert len(masks.flatten(1).unique(dim=0)) == len(masks)

    def test_only_the_region_is_ever_changed(self, taught):
        method, nets = taught
        image = scene(1).images[0]
        region = method.text_region(nets, image)
        seen = []

        def evidence(images):
            seen.append(images)
            return images.mean((1, 2, 3))

        masks = restrict(windows((32, 32), 8, 4), region)
        occlusion(evidence, image, masks, 9.0)
        changed = (torch.cat(seen)[1:] != image).any(1)
        assert torch.equal(changed, masks) and not (changed & ~region).any() and changed.any()

    def test_a_window_counts_where_a_quarter_of_it_lies_in_the_region(self):
        region = torch.zeros(16, 16, dtype=torch.bool)
        region[:, :5] = True
        masks = windows((16, 16), 8, 4)
        kept = restrict(masks, region)
        assert len(kept) == 3  # the windows of the first column of three: they have 5, 1 and 0 of 8 columns inside
        assert (kept <= region).all()

    @pytest.mark.parametrize("where", ["everywhere", "text", "random", "prediction"])
    def test_it_takes_as_many_predictions_as_it_says(self, taught, where, monkeypatch):
        method, nets = taught
        method = XaiClip(**TINY, where=where)
        count = []
        hook = nets["average"].register_forward_hook(lambda module, inputs, output: count.append(len(inputs[0])))
        image = scene(1).images[0]
        own = 2 + (where == "prediction")
        saliency, said = method.explain(nets, image)
        hook.remove()
        assert sum(count) == said + own and saliency.shape == (32, 32)
        assert said == len(windows((32, 32), 8, 4)) if where == "everywhere" else 0 < said < 49

    def test_occlusion_everywhere_is_captums(self, taught):
        captum = pytest.importorskip("captum.attr")
        _, nets = taught
        image = scene(1, side=16).images[0]
        evidence = lambda images: nets["average"](images)[:, 1].mean((1, 2))  # noqa: E731
        with torch.no_grad():
            mine = occlusion(evidence, image, windows((16, 16), 4, 4), 2.0)
            theirs = captum.Occlusion(evidence).attribute(image[None], (1, 4, 4), strides=(1, 4, 4), baselines=2.0)
        torch.testing.assert_close(mine, theirs[0, 0].float().clamp_min(0), atol=1e-4, rtol=1e-3)

    def test_where_windows_overlap_their_losses_are_averaged(self):
        """Evidence that is a weighted sum of pixels: a window's loss is known, and so is the mean over windows."""
        weight, image = torch.rand(12, 12), torch.rand(1, 12, 12) + 1
        masks = windows((12, 12), 4, 2)
        found = occlusion(lambda images: (images[:, 0] * weight).sum((1, 2)), image, masks, 0.5)
        lost = [(weight * (image[0] - 0.5) * mask).sum() for mask in masks]
        covering = [loss for loss, mask in zip(lost, masks, strict=True) if mask[5, 7]]
        assert len(covering) == 4
        torch.testing.assert_close(found[5, 7], torch.stack(covering).mean())


@pytest.mark.component("boundary-aware saliency")
class TestSaliency:
    def test_nothing_outside_the_region_is_salient(self, taught):
        method, nets = taught
        image = scene(1).images[0]
        saliency, _ = method.explain(nets, image)
        region = method.text_region(nets, image)
        assert saliency[~region].abs().max() == 0 and saliency[region].max() > 0

    def test_cut_down_windows_keep_the_boundary(self, taught):
        """With the organ itself as region, what is salient ends where it ends; whole windows reach beyond."""
        method, nets = taught
        batch = scene(4)
        cut, whole = [], []
        with torch.no_grad():
            for image, truth in zip(batch.images, batch.labels == 1, strict=True):
                evidence, masks = method.evidence(nets, image), windows((32, 32), 8, 4)
                touching = masks[(masks & truth).flatten(1).any(1)]
                cut.append(dice(salient(occlusion(evidence, image, restrict(masks, truth), 3.0)), truth))
                whole.append(dice(salient(occlusion(evidence, image, touching, 3.0)), truth))
        assert np.mean(cut) > np.mean(whole)

    def test_what_cannot_be_told_apart_is_not_salient(self):
        assert not salient(torch.zeros(8, 8)).any()
        assert occlusion(lambda images: images.sum(), torch.zeros(1, 4, 4), torch.zeros(0, 4, 4).bool(), 0.0).sum() == 0

    def test_the_most_salient_tenth_is_a_tenth(self):
        saliency = torch.rand(20, 20)
        chosen = most_salient(saliency)
        assert chosen.sum() == 40 and saliency[chosen].min() >= saliency[~chosen].max()
        assert most_salient(torch.zeros(20, 20)).sum() == 40


class TestArms:
    def test_a_random_region_has_the_same_size(self):
        region = torch.zeros(16, 16, dtype=torch.bool)
        region[2:7, 3:9] = True
        moved = elsewhere(region, 1)
        assert moved.sum() == region.sum() and not torch.equal(moved, region)
        assert torch.equal(moved, elsewhere(region, 1)) and not torch.equal(moved, elsewhere(region, 2))

    def test_all_arms_train_the_same_networks(self):
        methods = [arm.method for arm in recipe.arms.values()]
        assert len({method.where for method in methods}) == len(methods)
        assert all(XaiClip(**{**vars(method), "where": "text"}) == XaiClip() for method in methods)

    def test_all_structures_are_one_organ(self):
        labels = torch.tensor([[0, 1, 3, IGNORE]], dtype=torch.uint8)
        assert organ(labels).tolist() == [[0, 1, 1, IGNORE]]
        samples = OrganTask("embedded", labelled=1).samples("labelled")
        assert samples.images.shape[2:] == (64, 64) and samples.labels.unique().tolist() == [0, 1]

    def test_a_row_says_what_was_measured(self, taught):
        method, nets = taught
        batch = scene(1)
        case = Case(batch.images[0].numpy(), batch.labels[0].numpy(), "a", "a")
        prepare = SimpleNamespace(images=lambda case: batch.images, labels=lambda case: batch.labels)
        task = SimpleNamespace(preparation=prepare)
        fitted = SimpleNamespace(method=method, nets=nets, task=task, weights={"last": nets.state_dict()})
        row = overlap(fitted, case)[0]
        saliency, evaluations = method.explain(nets, batch.images[0])
        truth = batch.labels[0] == 1
        assert row["dice"] == pytest.approx(dice(salient(saliency), truth))
        assert row["iou"] == pytest.approx(row["dice"] / (2 - row["dice"]))
        assert row["evaluations"] == evaluations and row["segmentation_dice"] > 0.8 and row["faithfulness"] > 0

    def test_it_is_of_images(self):
        with pytest.raises(MedcookError, match="not of volumes"):
            XaiClip().build(1, 2, 3)
