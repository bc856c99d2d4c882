"""What the recipes of chapter 03 stand on: parts that learn, a segmenter without prompts, prompts drawn from labels."""

import numpy as np
import pytest
import torch

from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.sam import adapting
from medcook.sam.adapting import (
    AdaptedSam,
    PromptedSam,
    Segmenter,
    asked_for,
    box_prompts,
    click_prompts,
    fitted_in,
    no_prompts,
    tune,
    with_boxes,
)
from medcook.sam.model import PADDING, SIZE, SmallSam


@pytest.fixture(autouse=True)
def random_weights(monkeypatch):
    """No test here depends on what was learnt."""
    monkeypatch.setattr(adapting, "start", lambda pretrained=True: SmallSam())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SmallSam().eval()


@pytest.fixture
def labels():
    """(2, 96, 96): an image with structures 1 and 2, one with nothing but a few stray voxels."""
    found = torch.zeros(2, 96, 96, dtype=torch.uint8)
    found[0, 10:40, 20:50], found[0, 60:90, 50:80], found[1, :2, :2] = 1, 2, 1
    return found


@pytest.mark.parametrize("parts", [(), ("decoder",), ("encoder", "prompts")])
def test_only_the_named_parts_learn(model, parts):
    tune(model, parts)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    prefixes = tuple(name for part in parts for name in adapting.PARTS[part])
    wanted = {name for name, _ in model.named_parameters() if prefixes and name.startswith(prefixes)}
    assert learning == wanted - {"sam.shared_image_embedding.positional_embedding"}
    assert not model.sam.prompt_encoder.shared_embedding.positional_embedding.requires_grad


def test_the_parts_are_all_of_it_but_the_position_codes(model):
    tune(model, tuple(adapting.PARTS))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert set(frozen) <= {"sam.shared_image_embedding.positional_embedding"}


def test_an_unknown_part_is_named(model):
    with pytest.raises(MedcookError, match="no part 'neck'"):
        tune(model, ("neck",))


def test_an_image_is_fitted_in_without_changing_its_shape():
    wide = fitted_in(torch.rand(1, 2, 40, 80))
    assert wide.shape == (1, 1, SIZE, SIZE)
    assert torch.equal(wide[..., SIZE // 2 :, :], wide[..., SIZE // 2 - 1 : SIZE // 2, :].expand(-1, -1, SIZE // 2, -1))


def test_a_segmenter_is_the_decoder_with_a_token_a_class(model):
    """With SAM's own four tokens its first mask is SAM's single mask; masks lie on the image's own grid."""
    torch.manual_seed(0)
    images = torch.randn(2, 1, 64, 48)
    segmenter = Segmenter(model, 4).eval()
    assert segmenter(images).shape == (2, 4, 64, 48)
    single = model.sam.mask_decoder.mask_tokens.weight
    noise = (segmenter.tokens - single[0]).detach()
    assert abs(noise.mean()) < 0.1 and noise.std().item() == pytest.approx(adapting.APART, rel=0.1)
    segmenter.tokens.data = single
    embedding = model.embed(fitted_in(images))
    logits, _ = model.decode(embedding, no_prompts(2))
    assert torch.allclose(segmenter.masks(embedding)[:, :1], model.refine(logits[:, :1], embedding), atol=1e-5)


def test_the_moving_average_shares_what_is_frozen_and_copies_what_learns():
    nets = AdaptedSam(tuned=("decoder",)).build(1, 3, 2)
    pairs = list(zip(nets["model"].parameters(), nets["average"].parameters(), strict=True))
    assert {learnt.requires_grad for learnt, _ in pairs} == {True, False}
    assert all((learnt is mean) != learnt.requires_grad for learnt, mean in pairs)
    assert not any(mean.requires_grad for _, mean in pairs)


def test_no_prompts_say_nothing(model):
    sparse = model.prompted(model.embed(torch.randn(1, 1, SIZE, SIZE)), no_prompts(1))[1]
    nothing = model.sam.prompt_encoder.not_a_point_embed.weight
    assert torch.equal(sparse[0, 0, -2:], nothing.expand(2, -1))


def test_structures_are_asked_for_by_their_image(labels):
    torch.manual_seed(0)
    masks, owner = asked_for(labels, objects=2)
    assert masks.shape == (2, SIZE, SIZE) and owner.tolist() == [0, 0]
    assert masks.flatten(1).sum(1).sub(2500).abs().max() < 5  # 30 x 30 of 96, on a grid of 160
    assert len(asked_for(labels, objects=1)[0]) == 1
    assert len(asked_for(torch.full_like(labels, 255), 2)[0]) == 0


def test_boxes_hold_the_masks_and_clicks_lie_inside(labels):
    torch.manual_seed(0)
    masks, _ = asked_for(labels, objects=2)
    boxes = box_prompts(masks).boxes
    assert ((boxes[:, 2:] - boxes[:, :2]).prod(1) / masks.flatten(1).sum(1)).sub(1).abs().max() < 0.3
    clicks = click_prompts(masks, 3)
    x, y = clicks.points[:, :3].long().unbind(2)
    assert masks[torch.arange(2)[:, None], y, x].all()
    assert (clicks.labels[:, 3:] == PADDING).all() and clicks.boxes.isnan().all()


@pytest.mark.parametrize("prompts", ["mixed", "box", "click"])
def test_a_prompted_model_learns_from_what_is_there(labels, prompts):
    torch.manual_seed(0)
    method = PromptedSam(prompts=prompts)
    nets = method.build(1, 4, 2)
    batch = Batch(torch.randn(2, 1, 96, 96), labels)
    method.training_step(nets, batch, None, Moment(0, 1)).backward()
    assert nets["model"].sam.mask_decoder.mask_tokens.weight.grad.abs().max() > 0
    assert nets["model"].sam.vision_encoder.pos_embed.grad is None
    empty = batch._replace(labels=torch.zeros_like(labels))
    assert method.training_step(nets, empty, None, Moment(0, 1)).item() == 0


def test_without_a_prompt_class_one_is_what_a_box_around_everything_means(labels):
    method = PromptedSam()
    nets = method.build(1, 4, 2).eval()
    images = torch.randn(2, 1, 96, 96)
    found = method.predict(nets, images)
    assert found.shape == (2, 4, 96, 96) and torch.allclose(found.sum(1), torch.ones(2, 96, 96))
    model = nets["average"]
    embedding = model.embed(fitted_in(images))
    logits, _ = model.decode(embedding, with_boxes(torch.tensor([[0.0, 0.0, SIZE, SIZE]]).expand(2, 4)))
    assert torch.allclose(
        adapting.restore(model.refine(logits[:, :1], embedding), (96, 96))[:, 0].sigmoid(), found[:, 1]
    )


def test_volumes_are_refused():
    for method in (AdaptedSam(), PromptedSam()):
        with pytest.raises(MedcookError, match="not volumes"):
            method.build(1, 2, 3)


def test_targets_are_spread_over_the_slices_that_show_a_structure():
    class Task:
        dataset, structures = "embedded", {1: "one", 2: "two"}

        class preparation:
            images = staticmethod(lambda case: torch.arange(9.0)[:, None, None, None].expand(9, 1, 32, 32))

            @staticmethod
            def labels(case):
                found = torch.zeros(9, 32, 32, dtype=torch.uint8)
                found[2:7, 4:20, 4:20] = 1
                return found

    class Case:
        patient_id = "p"

    found = list(adapting.targets_of(Task, Case))
    assert [(target.structure, target.image[0, 0]) for target in found] == [("one", 3), ("one", 4), ("one", 5)]
    assert all(np.array_equal(np.argwhere(target.mask)[[0, -1]], [[4, 4], [19, 19]]) for target in found)
