"""The small SAM: its promises of size and shape, what a prompt can and cannot reach, and that it can learn."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import SamModel

from medcook.networks import parameters
from medcook.sam.asking import corrected, draw_box, draw_points, first_prompts, loose_boxes, pick, scribbles
from medcook.sam.likeness import certainty
from medcook.sam.model import (
    DENSE,
    FINE,
    MOST_POINTS,
    PADDING,
    SIZE,
    DirectAttention,
    Prompts,
    Refiner,
    SmallSam,
    masks_of,
)
from medcook.sam.plan import Plan, draw, drawing
from medcook.sam.pretraining import Learner, extent_loss, iou, mask_loss, pretrain

PLAN = Plan(steps=4, images=2, objects=2, bank=3, warmup=1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SmallSam().eval()


def nothing(count: int) -> Prompts:
    points, labels = torch.zeros(count, MOST_POINTS, 2), torch.full((count, MOST_POINTS), PADDING)
    return Prompts(points, labels, torch.full((count, 4), torch.nan), torch.zeros(count, 3, DENSE, DENSE))


def click(x: float, y: float, label: int = 1) -> Prompts:
    prompts = nothing(1)
    prompts.points[0, 0], prompts.labels[0, 0] = torch.tensor([x, y]), label
    return prompts


def test_it_is_a_sam_of_at_most_nine_and_a_half_million_parameters(model):
    assert isinstance(model.sam, SamModel) and parameters(model) <= 9.5e6
    assert len(model.sam.vision_encoder.layers) == 8


@torch.no_grad()
def test_an_image_is_embedded_once_and_asked_often(model):
    embedding = model.embed(torch.randn(2, 1, SIZE, SIZE))
    assert [part.shape[-1] for part in embedding] == [SIZE // 16, SIZE // 8, DENSE, FINE]
    several = embedding.at(torch.tensor([0, 0, 1]))
    logits, predicted = model.decode(several, nothing(3))
    assert logits.shape == (3, 4, DENSE, DENSE) and predicted.shape == (3, 4)
    assert torch.allclose(logits[0], logits[1], atol=1e-5) and not torch.allclose(logits[0], logits[2])
    assert model.refine(logits, several).shape == (3, 4, FINE, FINE)


@torch.no_grad()
def test_direct_attention_is_sams(model):
    layer, tokens = model.sam.vision_encoder.layers[0].attn, torch.randn(2, 10, 10, 192)
    torch.testing.assert_close(DirectAttention(layer)(tokens)[0], layer(tokens)[0], atol=1e-5, rtol=1e-5)


def test_in_bfloat16_it_attends_directly_and_twice_is_as_once(model):
    twice = model.in_bfloat16().in_bfloat16()
    assert {type(layer.attn) for layer in twice.sam.vision_encoder.layers} == {DirectAttention}
    assert not any(isinstance(part, DirectAttention) for part in model.modules())
    assert twice.embed(torch.randn(1, 1, SIZE, SIZE)).coarse.dtype == torch.bfloat16


@torch.no_grad()
def test_every_part_of_a_prompt_is_heard(model):
    embedding = model.embed(torch.randn(1, 1, SIZE, SIZE))
    answer = lambda prompts: model.decode(embedding, prompts)[0]  # noqa: E731
    base = answer(nothing(1))
    boxed = nothing(1)._replace(boxes=torch.tensor([[20.0, 20.0, 90.0, 100.0]]))
    drawn = nothing(1)._replace(dense=torch.ones(1, 3, DENSE, DENSE))
    for prompts in (click(40, 50), click(40, 50, label=0), click(90, 50), boxed, drawn):
        assert not torch.allclose(answer(prompts), base, atol=1e-4)
    assert not torch.allclose(answer(click(40, 50)), answer(click(40, 50, label=0)), atol=1e-4)


@torch.no_grad()
def test_the_predicted_overlap_follows_how_certain_the_mask_is(model):
    embedding = model.embed(torch.randn(1, 1, SIZE, SIZE))
    logits, predicted = model.decode(embedding, click(40, 50))
    model.trust.add_(1)
    assert torch.allclose(model.decode(embedding, click(40, 50))[1] - predicted, certainty(logits), atol=1e-5)


@torch.no_grad()
def test_the_prior_favours_what_lies_deep_in_the_box(model):
    embedding, boxed = model.embed(torch.randn(1, 1, SIZE, SIZE)), nothing(1)
    boxed = boxed._replace(boxes=torch.tensor([[40.0, 40.0, 120.0, 120.0]]))
    before = model.decode(embedding, boxed)[0]
    model.prior.add_(1)
    gained = model.decode(embedding, boxed)[0] - before
    middle, corner, outside = (gained[0, :, at, at] for at in (20, 11, 2))
    assert middle.tolist() == pytest.approx([4] * 4, abs=1e-4) and (corner < middle).all()
    assert outside.tolist() == pytest.approx([-4] * 4, abs=1e-4)
    without = model.decode(embedding, nothing(1))[0]
    model.prior.zero_()
    assert torch.equal(model.decode(embedding, nothing(1))[0], without), "no box, no prior"


@torch.no_grad()
def test_points_that_are_not_there_change_nothing_wherever_they_lie(model):
    embedding = model.embed(torch.randn(1, 1, SIZE, SIZE))
    prompts, other = click(40, 50), click(40, 50)
    other.points[0, 1:] = 77.0
    assert torch.allclose(model.decode(embedding, prompts)[0], model.decode(embedding, other)[0], atol=1e-5)


@torch.no_grad()
def test_without_finer_features_the_masks_are_those_of_transformers(model):
    """`masks_of` against SamMaskDecoder itself: the single mask, and the three."""
    embedding = model.embed(torch.randn(1, 1, SIZE, SIZE))
    bare = embedding._replace(eighth=torch.zeros(1, 1, 1, 1), quarter=torch.zeros(1, 1, 1, 1))
    sparse = torch.randn(1, 1, 3, embedding.coarse.shape[1])
    ours, predicted = masks_of(
        model.sam,
        bare,
        sparse,
        model.sam.mask_decoder.mask_tokens.weight,
        model.sam.mask_decoder.output_hypernetworks_mlps,
    )
    for several, mine in ((False, slice(0, 1)), (True, slice(1, None))):
        theirs, their_iou = model.sam.mask_decoder(
            image_embeddings=bare.coarse,
            image_positional_embeddings=model.sam.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=torch.zeros_like(bare.coarse),
            multimask_output=several,
        )[:2]
        assert torch.allclose(ours[:, mine], theirs[:, 0], atol=1e-4)
        assert torch.allclose(predicted[:, mine], their_iou[:, 0], atol=1e-4)


@torch.no_grad()
def test_box_tokens_are_those_of_transformers(model):
    box = torch.tensor([[10.0, 20.0, 90.0, 80.0]])
    theirs, _ = model.sam.prompt_encoder(None, None, box[:, None], None)
    assert torch.allclose(model.box_tokens(box), theirs, atol=1e-5)
    assert torch.allclose(
        model.box_tokens(box * torch.nan)[0, 0, 0], model.sam.prompt_encoder.not_a_point_embed.weight[0]
    )


@torch.no_grad()
def test_the_refiner_starts_as_plain_upscaling():
    logits, fine = torch.randn(2, 1, DENSE, DENSE), torch.randn(2, 16, FINE, FINE)
    plain = torch.nn.functional.interpolate(logits, (FINE, FINE), mode="bilinear", align_corners=False)
    assert torch.equal(Refiner()(logits, fine), plain)


def disc() -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    return ((rows - 60) ** 2 + (columns - 90) ** 2 < 25**2)[None]


def test_drawn_prompts_lie_where_they_are_given():
    mask, rng = disc(), torch.Generator().manual_seed(0)
    for x, y in pick(mask, 20, rng)[0].tolist():
        assert mask[0, int(y), int(x)]
    dense = torch.zeros(1, 3, DENSE, DENSE)
    draw_box(dense, torch.tensor([[65.0, 35.0, 116.0, 86.0]]))
    small = torch.nn.functional.avg_pool2d(mask[None].float(), SIZE // DENSE)[0, 0] > 0.5
    assert (dense[0, 1][small] == 1).all() and dense[0, 1, 0, 0] == -1
    draw_points(dense, torch.tensor([[[90.0, 60.0], [10.0, 150.0]]]), torch.tensor([[1, 0]]))
    at = lambda x, y: float(dense[0, 2, int(y * DENSE / SIZE), int(x * DENSE / SIZE)])  # noqa: E731
    assert at(90, 60) > 0.7 and at(10, 150) < -0.7 and abs(at(10, 10)) < 1e-3
    stroke = scribbles(mask, rng)[0]
    assert stroke.sum() > 2 and not stroke[~small].any()


def test_boxes_are_loose_but_hold_the_object():
    mask = disc().expand(200, -1, -1)
    boxes = loose_boxes(mask, torch.Generator().manual_seed(0))
    exact = torch.tensor([66.0, 36.0, 115.0, 85.0])
    assert ((boxes - exact).abs() <= 2.6).all() and boxes.std(0).min() > 0.3


def test_first_prompts_are_of_every_kind_and_never_empty():
    prompts, single = first_prompts(disc().expand(300, -1, -1), torch.Generator().manual_seed(0))
    points, boxed = (prompts.labels == 1).sum(1), ~prompts.boxes.isnan().any(1)
    assert ((points > 0) | boxed).all()
    assert (points[single] == 1).all() and not boxed[single].any() and 60 < single.sum() < 120
    assert boxed.sum() > 90 and (boxed & (points == 0)).any() and (boxed & (points > 0)).any()
    assert (prompts.dense[:, 2].flatten(1).amax(1) > 0.5).sum() == (points > 0).sum()


def test_a_correction_clicks_on_an_error_and_shows_the_answer():
    truth = torch.zeros(2, DENSE, DENSE)
    truth[:, 10:20, 10:20] = 1
    logits = torch.full_like(truth, -4.0)
    logits[1, 10:20, 10:30] = 4.0
    prompts = corrected(nothing(2), logits, truth, 1, torch.Generator().manual_seed(0))
    assert prompts.labels[:, 3].tolist() == [1, 0]
    for row, inside in ((0, truth[0] == 1), (1, (logits[1] > 0) & (truth[1] == 0))):
        x, y = (prompts.points[row, 3] * DENSE / SIZE).long().tolist()
        assert inside[y, x]
    right = corrected(nothing(2), truth * 8 - 4, truth, 1, torch.Generator().manual_seed(0))
    assert (right.labels == PADDING).all()


def test_half_of_the_corrections_show_the_answer_that_they_correct():
    truth, logits = torch.zeros(400, DENSE, DENSE), torch.full((400, DENSE, DENSE), 4.0)
    shown = corrected(nothing(400), logits, truth, 1, torch.Generator().manual_seed(0)).dense[:, 0]
    whole = (shown == 0.5).all((1, 2))
    assert (whole | (shown == 0).all((1, 2))).all() and 150 < whole.sum() < 250


def test_careful_clicks_lie_deeper():
    rng = torch.Generator().manual_seed(0)
    far = lambda careful: (pick(disc(), 400, rng, careful)[0] - torch.tensor([90.0, 60.0])).norm(dim=1).mean()  # noqa: E731
    assert far(1.0) < far(0.0) - 2 and far(0.0) == pytest.approx(25 * 2 / 3, abs=1)


@torch.no_grad()
def test_without_its_mixer_an_answer_is_that_of_a_mixer_that_adds_nothing(model):
    embedding = model.embed(torch.randn(2, 1, SIZE, SIZE))
    for layer in model.mixer.leave:
        torch.nn.init.normal_(layer.weight)
    prompts = Prompts(*(part.repeat_interleave(2, 0) for part in click(40, 50)))
    both = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)
    some, all_ = model.decode(embedding, prompts, both)[0], model.decode(embedding, prompts)[0]
    for layer in model.mixer.leave:
        torch.nn.init.zeros_(layer.weight)
    none = model.decode(embedding, prompts)[0]
    assert torch.allclose(some[0], all_[0], atol=1e-4) and torch.allclose(some[1], none[1], atol=1e-4)
    assert not torch.allclose(all_[1], none[1], atol=1e-2)


def test_losses_and_overlap_of_a_perfect_and_a_wrong_answer():
    truth = disc().float()
    perfect, wrong = truth * 40 - 20, 20 - truth * 40
    assert mask_loss(perfect, truth).item() < 1e-3 < 1 < mask_loss(wrong, truth).item()
    assert iou(perfect, truth).item() == 1 and iou(wrong, truth).item() == 0


def test_extent_counts_how_far_a_mask_reaches_and_not_what_fills_it():
    truth = torch.zeros(1, 20, 20)
    truth[:, 5:15, 5:15] = 1
    ring, short = truth.clone(), truth.clone()
    ring[:, 8:12, 8:12] = 0
    short[:, :8] = 0
    perfect, hollow, cut = (extent_loss(mask * 40 - 20, truth).item() for mask in (truth, ring, short))
    assert perfect < 1e-3 and hollow < 1e-3
    assert cut == pytest.approx(1 - (2 * 7 + 1) / (7 + 10 + 1), abs=1e-3), "one axis falls short, the other does not"


def test_a_step_is_a_function_of_its_number():
    one, two = draw(PLAN, 3), draw(PLAN, 3)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], draw(PLAN, 4)[0])
    assert one[0].shape == (2, 1, SIZE, SIZE) and one[1].shape == (2, 2, SIZE, SIZE) and one[1].any((2, 3)).all()


def test_scenes_drawn_ahead_by_other_processes_are_the_same():
    for step, ahead in enumerate(drawing(dataclasses.replace(PLAN, steps=3), 1, workers=2), start=1):
        assert all(torch.equal(a, b) for a, b in zip(ahead, draw(PLAN, step), strict=True))
    assert step == 2


def test_the_rate_warms_up_and_cools_down():
    plan = Plan(steps=1000, warmup=100, cooldown=0.2, rate=1.0)
    rates = [plan.rate_at(step) for step in (0, 49, 99, 500, 800, 900, 999)]
    assert rates == pytest.approx([0.01, 0.5, 1, 1, 1, 0.5, 0.005])


def test_an_interrupted_pretraining_ends_like_an_uninterrupted_one(tmp_path):
    whole = pretrain(PLAN, tmp_path / "whole", low_precision=False)
    pretrain(PLAN, tmp_path / "parts", minutes=0, low_precision=False)
    assert torch.load(tmp_path / "parts" / "state.pt", weights_only=True)["step"] == 1
    parts = pretrain(PLAN, tmp_path / "parts", low_precision=False)
    for mine, theirs in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_one_scene_can_be_learnt(tmp_path):
    plan = dataclasses.replace(PLAN, bank=1, rounds=1)
    torch.manual_seed(0)
    model = SmallSam()
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    learn, drawn, losses = Learner(model, plan, "cpu", low_precision=False), draw(plan, 0), []
    for _ in range(12):
        losses.append(learn(0, drawn)[0].item())
        optimiser.step()
    assert np.mean(losses[-3:]) < 0.75 * losses[0]
