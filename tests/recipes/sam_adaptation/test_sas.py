"""SAS: thumbnails keep what they show and where, noise stays inside, and only real small slices are scored."""

import numpy as np
import pytest
import torch
from skimage.transform import resize

from medcook.data.transforms import NONE
from medcook.methods import Batch, Moment
from medcook.recipes.sam_adaptation import sas
from medcook.recipes.sam_adaptation.sas import SMALL, Sas, grainy, small_targets, thumbnails
from medcook.sam import adapting
from medcook.sam.model import PADDING, SmallSam


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(0)
    labels = torch.zeros(2, 64, 64, dtype=torch.uint8)
    labels[:, 16:48, 16:48] = 1
    labels[:, 24:40, 24:40] = 2
    return Batch(2.0 * labels[:, None] + 0.1 * torch.randn(2, 1, 64, 64), labels)


@pytest.mark.component("organ thumbnails on a black background")
class TestThumbnails:
    def test_they_are_the_image_made_small(self, batch):
        images, labels = thumbnails(batch.images, batch.labels, torch.tensor([0.5, 1.0]), torch.zeros(2, 2))
        wanted = resize(batch.images[0, 0].numpy(), (32, 32), order=1, anti_aliasing=True)
        assert np.corrcoef(images[0, 0, :32, :32].flatten(), wanted.flatten())[0, 1] > 0.99
        assert torch.equal(labels[0, :32, :32], batch.labels[0, ::2, ::2])
        assert torch.allclose(images[1], batch.images[1], atol=1e-5) and torch.equal(labels[1], batch.labels[1])

    def test_around_them_all_is_black_and_background(self, batch):
        images, labels = thumbnails(batch.images, batch.labels, torch.tensor([0.5, 0.5]), torch.ones(2, 2))
        outside = torch.ones(64, 64, dtype=torch.bool)
        outside[32:, 32:] = False
        assert (images[:, 0][:, outside] == batch.images.amin((2, 3))).all()
        assert not labels[:, outside].any() and labels[:, 32:, 32:].any()

    def test_a_method_shrinks_some_images(self, batch):
        method = Sas(shrink=0.5, noise=0.0, augmentation=NONE)
        rng = torch.Generator().manual_seed(0)
        many = Batch(batch.images.repeat(20, 1, 1, 1), batch.labels.repeat(20, 1, 1))
        area = (method.augment(many, rng).labels > 0).flatten(1).sum(1) / 1024
        assert 10 < (area < 0.9).sum() < 30 and area.min() < 0.3 and area.max() == 1


@pytest.mark.component("noise in regions of interest")
class TestNoise:
    def test_it_stays_inside(self, batch):
        change = grainy(batch.images, batch.labels, torch.tensor([0.5, 0.0]), torch.randn(2, 1, 64, 64)) - batch.images
        inside = batch.labels[0] > 0
        assert change[0, 0][inside].std() == pytest.approx(0.5, rel=0.1)
        assert not change[0, 0][~inside].any() and not change[1].any()

    def test_what_nobody_annotated_has_none(self, batch):
        unknown = torch.full_like(batch.labels, 255)
        assert torch.equal(grainy(batch.images, unknown, torch.ones(2), torch.ones(2, 1, 64, 64)), batch.images)

    def test_a_method_adds_it(self, batch):
        method = Sas(shrink=0.0, noise=1.0, augmentation=NONE)
        change = (method.augment(batch, torch.Generator().manual_seed(0)).images - batch.images).abs()[:, 0]
        assert change[batch.labels > 0].mean() > 0.01 and change[batch.labels == 0].max() < 1e-4


@pytest.mark.component("iterative point prompts")
def test_an_answer_is_corrected_by_a_click(batch, monkeypatch):
    monkeypatch.setattr(adapting, "start", lambda pretrained=True: SmallSam())
    asked, decode = [], SmallSam.decode
    monkeypatch.setattr(SmallSam, "decode", lambda self, e, prompts: asked.append(prompts) or decode(self, e, prompts))
    method = Sas()
    method.training_step(method.build(1, 3, 2), batch, None, Moment(0, 1))
    clicks = [(prompts.labels != PADDING).sum(1) for prompts in asked]
    assert [len(each) for each in clicks] == [4, 2], "half of the answers are corrected"
    assert set((clicks[1] - 1).tolist()) <= set(clicks[0].tolist())


def test_what_is_scored_is_small_and_real():
    class Task:
        dataset, structures = "embedded", {1: "one", 2: "two"}

        class preparation:
            images = staticmethod(lambda case: torch.arange(9.0)[:, None, None, None].expand(9, 1, 64, 64))

            @staticmethod
            def labels(case):
                found = torch.zeros(9, 64, 64, dtype=torch.uint8)
                for k in range(9):
                    found[k, : 2 * k, : 2 * k] = 1
                return found

    class Case:
        patient_id = "p"

    found = list(small_targets(Task, Case))
    sides = [int(target.image[0, 0]) for target in found]
    assert sides == [3, 4, 5] and pytest.approx(102.4) == SMALL * 64**2
    assert sas.SMALLEST == 30 and all(target.structure == "one" for target in found)
