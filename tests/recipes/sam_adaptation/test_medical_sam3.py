"""Medical SAM3: a name is a prompt, what tuning reaches, how boxes are made less than exact, and real checkpoints."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer, Sam3Config, Sam3Model

from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.recipes.sam_adaptation import _concepts as concepts
from medcook.recipes.sam_adaptation.medical_sam3 import KINDS, recipe, tight_boxes, wider
from medcook.sam import adapting
from medcook.sam.model import PADDING, SIZE, SmallSam
from medcook.sam.prompts import box_of
from medcook.sam.sam3 import Sam3, centred, load_sam3, pixels, roi_align


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of SAM 3 with small random weights, and a tokenizer of a few words."""
    path = tmp_path_factory.mktemp("sam3")
    torch.manual_seed(0)
    Sam3Model(tiny_config()).save_pretrained(path)
    names = ["<|pad|>", "<|startoftext|>", "<|endoftext|>", "heart</w>", "lung</w>", "visual</w>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    CLIPTokenizer(vocab=vocabulary, merges=[], unk_token="<|pad|>", pad_token="<|pad|>").save_pretrained(path)
    return path


def tiny_config() -> Sam3Config:
    small = {"hidden_size": 32, "num_attention_heads": 2}
    layers = small | {"intermediate_size": 32, "num_layers": 1}
    vit = {"model_type": "sam3_vit_model", "image_size": 112, "pretrain_image_size": 56, "window_size": 4}
    vit |= small | {"intermediate_size": 32, "num_hidden_layers": 2, "global_attn_indexes": [1]}
    sizes = [[32, 32], [16, 16], [8, 8]]
    text = small | {"intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 6, "projection_dim": 32}
    text |= {"max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return Sam3Config(
        vision_config={"backbone_config": vit, "fpn_hidden_size": 32, "backbone_feature_sizes": sizes},
        text_config=text,
        geometry_encoder_config=layers,
        detr_encoder_config=layers,
        detr_decoder_config=layers | {"num_queries": 5},
        mask_decoder_config=small,
    )


@pytest.mark.component("checkpoint")
class TestCheckpoint:
    def test_a_folder_comes_back_as_it_was_saved(self, folder):
        torch.manual_seed(0)
        saved, model = Sam3Model(tiny_config()).state_dict(), load_sam3(folder)
        assert saved.keys() == model.state_dict().keys() and not model.training
        assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())

    def test_a_folder_without_one_says_where_they_are(self, tmp_path):
        with pytest.raises(MedcookError, match="no SAM 3 checkpoint") as error:
            load_sam3(tmp_path)
        assert "huggingface.co/facebook/sam3" in str(error.value)

    def test_another_model_is_named(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
        with pytest.raises(MedcookError, match="holds a 'bert' model"):
            load_sam3(tmp_path)

    def test_damaged_weights_are_named(self, folder, tmp_path):
        broken = shutil.copytree(folder, tmp_path / "broken")
        weights = broken / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
        with pytest.raises(MedcookError, match=r"broken: the checkpoint cannot be read"):
            load_sam3(broken)

    def test_missing_weights_are_named(self, folder, tmp_path):
        short = shutil.copytree(folder, tmp_path / "short")
        state = load_file(short / "model.safetensors")
        lost = next(name for name in state if name.startswith("mask_decoder."))
        save_file({name: tensor for name, tensor in state.items() if name != lost}, short / "model.safetensors")
        with pytest.raises(MedcookError, match=f"another architecture \\(no {lost}"):
            load_sam3(short)

    def test_a_missing_tokenizer_is_said(self, folder, tmp_path):
        bare = tmp_path / "bare"
        bare.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(folder / name, bare)
        with pytest.raises(MedcookError, match="bare holds no tokenizer"):
            Sam3(bare)


@pytest.mark.component("architecture")
class TestArchitecture:
    IMAGE = np.random.default_rng(0).normal(size=(60, 80)).astype(np.float32)

    @pytest.fixture(scope="class")
    def sam3(self, folder) -> Sam3:
        return Sam3(folder)

    def test_an_answer_is_a_mask_of_the_image(self, sam3):
        found = sam3(self.IMAGE, "heart")
        assert found.shape == (60, 80) and found.dtype == bool

    def test_words_and_boxes_reach_the_answer(self, sam3, monkeypatch):
        answers = []
        forward = Sam3Model.forward
        keep = lambda model, **given: answers.append(forward(model, **given).semantic_seg) or forward(model, **given)  # noqa: E731
        monkeypatch.setattr(Sam3Model, "forward", keep)
        sam3(self.IMAGE, "heart"), sam3(self.IMAGE, "lung"), sam3(self.IMAGE, "heart")
        sam3(self.IMAGE, "heart", (10, 10, 40, 30)), sam3(self.IMAGE, "heart", (30, 30, 70, 50))
        heart, lung, again, boxed, elsewhere = answers
        assert torch.equal(heart, again)
        for one, other in ((heart, lung), (heart, boxed), (boxed, elsewhere)):
            assert (one - other).abs().max() > 1e-5

    def test_a_box_outside_the_image_is_refused(self, sam3):
        with pytest.raises(MedcookError, match="outside the image of 80 x 60 pixels"):
            sam3(self.IMAGE, box=(10, 10, 90, 30))

    def test_boxes_are_shares_of_the_image(self):
        assert torch.allclose(centred((10, 20, 30, 60), (80, 40)), torch.tensor([[[0.5, 0.5, 0.5, 0.5]]]))

    def test_images_are_stretched_to_a_square_from_black_to_white(self):
        found = pixels(self.IMAGE, 32)
        assert found.shape == (1, 3, 32, 32) and found.min() >= -1 and found.max() <= 1
        assert torch.equal(found[:, 0], found[:, 2]) and pixels(np.zeros((9, 9), np.float32), 8).eq(-1).all()

    def test_pooling_in_a_box_is_exact_where_features_are_linear(self):
        rows, columns = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
        features = torch.stack([rows, columns, 2 * rows - columns])[None]
        left, top, right, bottom = 3.3, 2.1, 24.3, 16.8
        found = roi_align(features, (torch.tensor([[left, top, right, bottom]]),), 7)
        down = top + (torch.arange(7) + 0.5) * (bottom - top) / 7
        across = left + (torch.arange(7) + 0.5) * (right - left) / 7
        assert found.shape == (1, 3, 7, 7)
        assert torch.allclose(found[0, 0], down[:, None].expand(7, 7), atol=1e-4)
        assert torch.allclose(found[0, 1], across.expand(7, 7), atol=1e-4)

    def test_pooling_takes_the_mean_of_all_pixels_of_a_part(self):
        features = torch.zeros(2, 1, 12, 12)
        features[1, 0, 5, 5] = 16.0
        boxes = (torch.zeros(0, 4), torch.tensor([[0.5, 0.5, 8.5, 8.5]]))
        assert roi_align(features, boxes, 2)[0, 0].tolist() == [[0, 0], [0, pytest.approx(1.0, abs=1e-5)]]


def test_no_points_are_among_the_prompts(monkeypatch):
    asked = []
    prompted = SmallSam.prompted
    monkeypatch.setattr(
        SmallSam, "prompted", lambda self, e, prompts: asked.append(prompts) or prompted(self, e, prompts)
    )
    gradients("full tuning")
    assert (asked[0].labels == PADDING).all()
