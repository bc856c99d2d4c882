"""Medical SAM3: a name is a prompt, what tuning reaches, how boxes are made less than exact, and real checkpoints."""

import json

import numpy as np
import pytest
import torch
import transformers

from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.recipes.sam_adaptation import _concepts as concepts
from medcook.recipes.sam_adaptation.medical_sam3 import KINDS, recipe, tight_boxes, wider
from medcook.sam import adapting
from medcook.sam.checkpoints import load_sam3
from medcook.sam.model import PADDING, SIZE, SmallSam
from medcook.sam.prompts import box_of


@pytest.fixture(autouse=True)
def random_weights(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(adapting, "start", lambda pretrained=True: SmallSam())


def batch() -> Batch:
    labels = torch.zeros(2, 64, 64, dtype=torch.uint8)
    labels[:, 10:30, 10:30], labels[:, 35:55, 20:50] = 1, 2
    return Batch(labels[:, None] + 0.1 * torch.randn(2, 1, 64, 64), labels)


def gradients(arm: str) -> torch.nn.Module:
    """The network of an arm after the backward pass of a step."""
    method = recipe.arms[arm].method
    nets = method.build(1, 3, 2)
    nets.zero_grad()
    method.training_step(nets, batch(), None, Moment(0, 1)).backward()
    return nets["model"]


def learns(part: torch.nn.Module) -> bool:
    return any(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())


@pytest.mark.component("full fine-tuning")
@pytest.mark.parametrize("arm, reached", [("names alone", 0), ("decoder tuning", 1), ("full tuning", 2)])
def test_an_arm_tunes_what_it_says(arm, reached):
    model = gradients(arm)
    parts = (model.concepts, model.sam.mask_decoder, model.sam.vision_encoder)
    assert [learns(part) for part in parts] == [True, reached >= 1, reached >= 2]


class TestNames:
    def logits(self, value: int, **given) -> torch.Tensor:
        net = recipe.arms["full tuning"].method.build(1, 3, 2)["model"].eval()
        image = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            embedding = net.embed(adapting.fitted_in(image))
            return concepts.given_logits(net, embedding, torch.tensor([value]), (64, 64), **given)

    def test_another_name_is_another_answer(self):
        torch.manual_seed(0)
        one = self.logits(1)
        torch.manual_seed(0)
        assert one.shape == (1, 64, 64) and not torch.allclose(one, self.logits(2), atol=1e-4)

    def test_unnamed_all_names_are_alike(self):
        box = torch.tensor([[20.0, 20, 80, 80]])
        torch.manual_seed(0)
        one = self.logits(1, concept=False, boxes=box)
        torch.manual_seed(0)
        assert torch.allclose(one, self.logits(2, concept=False, boxes=box), atol=1e-5)

    def test_unnamed_is_sams_own_mask_token(self):
        net = recipe.arms["full tuning"].method.build(1, 4, 2)["model"]
        found = net.concepts()
        assert found.shape[0] == 4 and not found[0].any() and found[1:].flatten(1).any(1).all()

    def test_names_are_drawn_with_and_without_boxes(self):
        given = concepts.drawn(KINDS, 200)
        assert 0.6 < given["concept"].float().mean() < 0.9 and 0.1 < given["box"].float().mean() < 0.4
        assert (given["concept"] | given["box"]).all() and not given["exemplar"].any()

    def test_absent_structures_are_asked_for_by_name_and_have_empty_masks(self):
        asked = concepts.ask(batch(), classes=4, objects=3)
        assert sorted(asked.values.tolist()) == [1, 1, 2, 2, 3, 3] and asked.owner.tolist() == [0, 0, 0, 1, 1, 1]
        assert asked.masks.flatten(1).any(1).tolist() == (asked.values < 3).tolist()

    def test_every_class_is_predicted_by_its_name(self):
        method = recipe.arms["full tuning"].method
        nets = method.build(1, 3, 2).eval()
        found = method.predict(nets, torch.randn(2, 1, 64, 64))
        assert found.shape == (2, 3, 64, 64) and torch.allclose(found.sum(1), torch.ones(2, 64, 64))


@pytest.mark.component("reliance on ground-truth boxes")
class TestBoxes:
    def test_tight_boxes_are_those_of_the_predictor(self):
        masks = torch.zeros(3, 64, 48, dtype=torch.bool)
        masks[0, 10:30, 5:40], masks[1, 60:, 47:] = True, True
        wanted = [np.array(box_of(mask.numpy())) * SIZE / 64 for mask in masks[:2]]
        assert np.allclose(tight_boxes(masks)[:2], wanted) and tight_boxes(masks)[2].isnan().all()

    def test_a_wider_box_reaches_a_quarter_further_on_every_side(self):
        found = wider(torch.tensor([[40.0, 40, 80, 60], [0, 0, 160, 160]]))
        assert found.tolist() == [[30, 35, 90, 65], [0, 0, 160, 160]]

    def test_a_box_is_asked_without_a_name(self, monkeypatch):
        heard, answers = [], concepts.answers
        monkeypatch.setattr(concepts, "answers", lambda *given: heard.append(given[-1].item()) or answers(*given))
        net = recipe.arms["full tuning"].method.build(1, 3, 2)["model"].eval()
        embedding = net.embed(torch.randn(1, 1, SIZE, SIZE))
        concepts.given_logits(net, embedding, torch.tensor([2]), (64, 64), concept=False, boxes=torch.ones(1, 4))
        concepts.given_logits(net, embedding, torch.tensor([2]), (64, 64))
        assert heard == [0, 2]


class TestRealWeights:
    def test_a_folder_without_them_says_where_they_are(self, tmp_path):
        with pytest.raises(MedcookError, match="no SAM 3 checkpoint") as error:
            load_sam3(tmp_path)
        assert "huggingface.co/facebook/sam3" in str(error.value)

    def test_another_model_is_named(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
        with pytest.raises(MedcookError, match="holds a 'bert' model"):
            load_sam3(tmp_path)

    def test_what_is_missing_is_named(self, tmp_path, monkeypatch):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "sam3"}))
        monkeypatch.setattr(transformers.utils, "is_torchvision_available", lambda: False)
        with pytest.raises(MedcookError, match="needs torchvision"):
            load_sam3(tmp_path)


def test_no_points_are_among_the_prompts(monkeypatch):
    asked = []
    prompted = SmallSam.prompted
    monkeypatch.setattr(
        SmallSam, "prompted", lambda self, e, prompts: asked.append(prompts) or prompted(self, e, prompts)
    )
    gradients("full tuning")
    assert (asked[0].labels == PADDING).all()
