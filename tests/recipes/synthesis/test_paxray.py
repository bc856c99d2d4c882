"""PAXRay: structures that overlap on X-rays, and regions for phrases."""

from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from skimage.measure import regionprops
from torch import nn

from medcook.data import IGNORE, Case
from medcook.methods import Batch, Moment
from medcook.projections import Beam, views
from medcook.recipes.synthesis._overlapping import THICK, OverlappingPreparation, OverlappingTask, masks_of
from medcook.recipes.synthesis._phrases import SYNONYMS, meant, phrases
from medcook.recipes.synthesis._regions import LEAST, box_iou, boxes_of, described, proposals, region
from medcook.recipes.synthesis.paxray import (
    SMALLEST,
    Anatomy,
    Matcher,
    Proposals,
    grounded,
    grounding_rows,
    one_label_loss,
    overlapping_loss,
    recipe,
)

CT = Beam((2, 1, 0), pixel=2.0)
NECK = {1: "brainstem", 2: "spinal cord", 3: "right parotid", 4: "left parotid", 5: "esophagus", 6: "larynx"}


def block(**attributes) -> Case:
    """Water, with structure 1 behind structure 2 (rays run along the first axis), and 3 beside them."""
    image = np.full((1, 40, 40, 20), -1000.0, dtype=np.float32)
    image[0, 5:35, 5:35] = 0
    label = np.zeros((40, 40, 20), np.uint8)
    label[25:30, 15:25, 4:12] = 1
    label[10:13, 18:22, 2:16] = 2
    label[15:20, 26:30, 5:9] = 3
    return Case(image, label, "box", "box", (2.0, 2.0, 2.0), attributes=attributes)


def prepared(*angles: float, values=(1, 2, 3)) -> OverlappingPreparation:
    return OverlappingPreparation((20, 40), beam=CT, angles=angles, values=values)


@pytest.mark.component("masks projected from CT")
class TestProjection:
    def test_a_structure_is_on_the_rays_of_the_xray(self):
        """A structure, projected as if it were the bone: the X-ray's own way of finding rays and pixels."""
        case, angles = block(), (-30.0, 0.0, 20.0)
        case.image[..., :3] = -1000  # the first row is not the first slice
        case.label[..., :3] = 0
        millimetres, _ = prepared(*angles).shadows(case)
        for value in (1, 2, 3):
            beam = replace(CT, hard=None, bone=value)
            expected = views(replace(case, image=case.image.clip(-1000, 0)), beam, angles, (20, 40)).bone
            torch.testing.assert_close(millimetres[:, value - 1], expected, rtol=1e-4, atol=1e-3)
            assert expected.max() > THICK

    def test_masks_overlap_and_one_label_is_that_of_the_front(self):
        case = block()
        masks, labels = prepared(0.0).masks(case)[0], prepared(0.0).labels(case)[0]
        flat = [torch.from_numpy((case.label == value).any(0).T) for value in (1, 2, 3)]
        for mask, seen in zip(masks, flat, strict=True):
            assert torch.equal(mask.bool(), seen)
        assert (flat[0] & flat[1]).any() and torch.equal(labels == 2, flat[1])
        assert torch.equal(labels == 1, flat[0] & ~flat[1]) and labels.dtype == masks.dtype == torch.uint8
        from_behind = prepared(180.0).labels(case)[0]
        assert torch.equal(from_behind == 1, flat[0].flip(1))
        assert torch.equal(from_behind == 2, (flat[1] & ~flat[0]).flip(1))

    def test_depth_is_the_middle_of_what_a_ray_passes(self):
        millimetres, depth = prepared(0.0).shadows(block())
        inside = millimetres[0] > THICK
        for number, (thick, middle) in enumerate(((10, 27), (6, 11), (10, 17))):
            assert millimetres[0, number][inside[number]].unique().tolist() == pytest.approx([thick], abs=1e-3)
            assert depth[0, number][inside[number]].numpy() == pytest.approx(middle, abs=1e-3)

    def test_what_nobody_drew_is_unknown(self):
        masks = prepared(0.0, 10.0).masks(block(annotated=[1, 3]))
        assert (masks[:, 1] == IGNORE).all() and masks[:, [0, 2]].max() == 1

    def test_the_xray_has_its_bones_and_no_truth(self):
        images = prepared(0.0, 10.0).images(block())
        assert images.shape == (2, 1, 20, 40) and images.mean().item() == pytest.approx(0, abs=1e-4)

    def test_a_task_hands_out_masks_that_move_with_the_images(self):
        task = OverlappingTask("embedded", labelled=1, angles=(-20.0, 0.0), side=32)
        samples = task.samples("labelled")
        assert samples.images.shape == (2, 1, 32, 32) and samples.raters.shape == (2, 3, 32, 32)
        assert task.classes == 4 and list(task.structures.values()) == ["grey matter", "white matter", "ventricles"]
        assert torch.equal(samples.labels > 0, (samples.raters == 1).any(1))
        assert task.data_kind == "real-anatomy-simulated"
        batch = Batch(samples.images, samples.labels, raters=samples.raters)
        moved = Anatomy().augment(batch, torch.Generator().manual_seed(0))
        assert torch.equal(moved.labels > 0, (moved.raters == 1).any(1)) and not torch.equal(moved.raters, batch.raters)

    def test_left_and_right_are_never_exchanged(self):
        assert not any(arm.method.augmentation.flip for arm in recipe.arms.values())


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, masks that overlap, and which were drawn: not the second structure on the second image."""
    rng = torch.Generator().manual_seed(0)
    masks = (torch.rand(2, 3, 8, 9, generator=rng) < 0.4).float()
    masks[1, 1] = 0
    return torch.randn(2, 4, 8, 9, generator=rng), masks, torch.tensor([[True] * 3, [True, False, True]])


@pytest.mark.component("multi-label segmentation of X-rays")
class TestSegmentation:
    def test_each_structure_is_learnt_by_itself(self):
        logits, masks, _ = example()
        drawn = torch.ones(2, 3, dtype=torch.bool)
        truth = torch.cat([1 - masks.amax(1, keepdim=True), masks], 1)
        entropy = F.binary_cross_entropy_with_logits(logits, truth) * 4
        dice = DiceLoss(sigmoid=True, batch=True, smooth_nr=1, smooth_dr=1)(logits[:, 1:], masks)
        assert overlapping_loss(logits, masks, drawn).item() == pytest.approx((entropy + dice).item(), rel=1e-5)

    def test_what_was_not_drawn_teaches_nothing(self):
        logits, masks, drawn = example()
        logits.requires_grad_()
        overlapping_loss(logits, masks, drawn).backward()
        assert (logits.grad[1, 2] == 0).all() and (logits.grad[0] != 0).all() and (logits.grad[1, [1, 3]] != 0).all()
        empty = masks[1, [0, 2]].sum(0) == 0
        assert (logits.grad[1, 0][empty] == 0).all() and (logits.grad[1, 0][~empty] != 0).all()

    def test_unknown_masks_are_told_from_empty_ones(self):
        raters = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
        raters[0, 1], raters[1, 2, 0, 0] = IGNORE, 1
        masks, drawn = masks_of(Batch(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4).byte(), raters=raters), 4)
        assert drawn.tolist() == [[True, False, True], [True] * 3] and masks.sum() == 1
        labels = torch.tensor([[[0, 1], [3, IGNORE]]], dtype=torch.uint8)
        masks, drawn = masks_of(Batch(torch.zeros(1, 1, 2, 2), labels), 4)
        assert drawn.all() and masks[0].tolist() == [[[0, 1], [0, 0]], [[0, 0], [0, 0]], [[0, 0], [1, 0]]]

    def test_a_pixel_may_be_of_two_structures(self):
        answers = {}
        for overlapping in (True, False):
            method = Anatomy(overlapping=overlapping)
            nets = {"average": lambda images: torch.tensor([-3.0, 2.0, 3.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)}
            answers[overlapping] = method.predict(nets, torch.zeros(1, 1, 2, 2))[0, :, 0, 0]
        assert (answers[True][1:] > 0.5).all() and answers[True][0] < 0.5
        assert answers[False].tolist() == [0, 0, 1]

    def test_one_label_a_pixel_is_cross_entropy_and_dice(self):
        logits, *_ = example()
        labels = torch.randint(0, 4, (2, 8, 9), generator=torch.Generator().manual_seed(1)).byte()
        drawn = torch.ones(2, 3, dtype=torch.bool)
        dice = DiceLoss(softmax=True, include_background=False, to_onehot_y=True, batch=True, smooth_nr=1, smooth_dr=1)
        expected = F.cross_entropy(logits, labels.long()) + dice(logits, labels[:, None])
        assert one_label_loss(logits, labels, drawn).item() == pytest.approx(expected.item(), rel=1e-5)
        drawn[1, 1] = False
        labels[labels == 2] = 0
        p = logits.softmax(1)
        nothing = torch.stack([p[0, 0], p[1, 0] + p[1, 2]])
        right = torch.where(labels == 0, nothing, p.gather(1, labels.long()[:, None])[:, 0])
        masks = F.one_hot(labels.long(), 4).movedim(-1, 1)[:, 1:].float()
        p, masks = p[:, 1:] * drawn[..., None, None], masks * drawn[..., None, None]
        share = (2 * (p * masks).sum((0, 2, 3)) + 1) / (p.sum((0, 2, 3)) + masks.sum((0, 2, 3)) + 1)
        expected = -right.log().mean() + 1 - share.mean()
        assert one_label_loss(logits, labels, drawn).item() == pytest.approx(expected.item(), rel=1e-5)

    def test_the_ablation_takes_the_overlap_and_nothing_else(self):
        mine, theirs = (asdict(recipe.arms[name].method) for name in recipe.ablation)
        assert {key for key in mine if mine[key] != theirs[key]} == {"overlapping"}
        one, other = (recipe.arms[name].method.build(1, 4, 2) for name in recipe.ablation)
        assert [p.shape for p in one.parameters()] == [p.shape for p in other.parameters()]

    @pytest.mark.parametrize("arm", list(recipe.arms))
    @pytest.mark.parametrize("size", [(32, 32), (48, 40)])
    def test_every_parameter_learns_in_half_precision(self, arm, size):
        method = recipe.arms[arm].method
        nets = method.build(1, 4, 2)
        rng = torch.Generator().manual_seed(0)
        raters = (torch.rand(2, 3, *size, generator=rng) < 0.3).byte()
        raters[1, 0] = IGNORE
        labels = torch.randint(0, 4, (2, *size), generator=rng).byte()
        batch = method.augment(Batch(torch.randn(2, 1, *size, generator=rng), labels, raters=raters), rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = method.training_step(nets, batch, None, Moment(0, 4))
            answer = method.predict(nets.eval(), batch.images)
        loss.backward()
        assert loss.dtype == torch.float32 and answer.shape == (2, 4, *size) and ((answer >= 0) & (answer <= 1)).all()
        assert all(p.grad.abs().max() > 0 for p in nets["model"].parameters())


def test_boxes_are_those_of_scikit():
    rng = np.random.default_rng(0)
    masks = np.zeros((4, 12, 15), np.uint8)
    for mask in masks[:3]:
        mask[rng.integers(2, 10, 3), rng.integers(2, 13, 3)] = 1
    found = boxes_of(torch.from_numpy(masks))
    assert found[:3].tolist() == [list(map(float, regionprops(mask)[0].bbox)) for mask in masks[:3]]
    assert found[3].tolist() == [0] * 4


def test_overlap_of_boxes_is_that_of_their_pixels():
    boxes = torch.tensor([[1, 2, 6, 7], [3, 4, 9, 8], [1, 2, 6, 7], [0, 0, 1, 2], [0, 0, 0, 0]]).float()
    drawn = torch.zeros(5, 10, 10, dtype=torch.bool)
    for mask, (top, left, bottom, right) in zip(drawn, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = True
    both, either = (drawn[:, None] & drawn).sum((2, 3)), (drawn[:, None] | drawn).sum((2, 3))
    torch.testing.assert_close(box_iou(boxes[:, None], boxes), both / either.clamp_min(1))


class TestProposals:
    def test_regions_and_their_neighbours_are_proposed(self):
        image = np.zeros((40, 40))
        image[5:20, 8:18], image[20:32, 8:18] = 1, 2
        for box in ([5, 8, 20, 18], [20, 8, 32, 18], [5, 8, 32, 18], [0, 0, 40, 40]):
            assert box_iou(proposals(image), torch.tensor(box).float()).max() > 0.85
        assert proposals(np.ones((16, 12))).tolist() == [[0, 0, 16, 12]]
        noise = proposals(np.random.default_rng(0).standard_normal((32, 32)))
        assert len(noise.unique(dim=0)) == len(noise) > 10
        assert ((noise[:, 2:] - noise[:, :2]).prod(1) >= LEAST).all()

    def test_what_is_known_of_boxes_is_what_a_loop_sees(self):
        maps = torch.randn(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))
        boxes = torch.tensor([[[0, 0, 20, 30], [3, 4, 11, 24]], [[18, 28, 20, 30], [5, 0, 6, 3]]]).float()
        found = described(maps, boxes)
        for number, stack in enumerate(maps):
            for place, (top, left, bottom, right) in enumerate(boxes[number].int().tolist()):
                h, w = bottom - top, right - left
                dy, dx = -(-h // 4), -(-w // 4)
                inside = stack[:, top:bottom, left:right].mean((1, 2))
                around = stack[:, max(top - dy, 0) : bottom + dy, max(left - dx, 0) : right + dx].mean((1, 2))
                expected = [(top + bottom) / 20 - 1, (left + right) / 30 - 1, np.log(h / 20), np.log(w / 30)]
                expected += [*inside.tolist(), *(inside - around).tolist()]
                assert found[number, place].tolist() == pytest.approx([float(x) for x in expected], abs=1e-4)

    def test_examples_are_boxes_of_pixels_near_structures_and_anywhere(self):
        truth = torch.tensor([[[10.0, 12.0, 20.0, 30.0], [0.0, 0.0, 0.0, 0.0]]])
        found = Proposals(tries=200).examples(truth, (32, 48))
        assert found.shape == (1, 600, 4) and torch.equal(found, found.round())
        assert (found[..., :2] >= 0).all() and (found[..., 2:] <= torch.tensor([32, 48])).all()
        assert (found[..., 2:] > found[..., :2]).all()
        near, anywhere = box_iou(found[0, :200], truth[0, 0]), box_iou(found[0, 400:], truth[0, 0])
        assert near.mean() > 0.4 > anywhere.mean() and near.std() > 0.05 and anywhere.max() > 0.2

    def test_the_best_match_is_taken(self):
        """Of one structure the box whose middle is most to the upper left, of the other the largest."""

        class Wanting:
            structures = 2

            def __call__(self, images, boxes):
                corner, end = boxes[..., :2], boxes[..., 2:]
                return torch.stack([-(corner + end).sum(-1), (end - corner).prod(-1)], -1)

        image = torch.zeros(1, 1, 40, 40)
        image[0, 0, 5:15, 5:15], image[0, 0, 20:38, 15:39] = 1, 2
        answer = Proposals().predict({"average": Wanting()}, image)[0]
        offered = proposals(image[0, 0].numpy())
        scores = Wanting()(image, offered)
        for mask, score in zip(answer[1:], scores.unbind(1), strict=True):
            assert boxes_of(mask).tolist() == offered[score.argmax()].tolist()
            assert mask.sum() == (offered[score.argmax(), 2:] - offered[score.argmax(), :2]).prod()
        assert torch.equal(answer[0], 1 - answer[1:].amax(0))

    def test_learning_finds_the_structures(self):
        """Two bright bars whose place changes: after some steps the best proposals are theirs."""
        torch.manual_seed(0)
        images, masks = torch.zeros(16, 1, 32, 32), torch.zeros(16, 2, 32, 32)
        for number in range(16):
            y, x = torch.randint(3, 12, (2,)).tolist()
            masks[number, 0, y : y + 8, x : x + 4], masks[number, 1, y + 9 : y + 14, x + 3 : x + 15] = 1, 1
        images[:, 0] = masks[:, 0] + 2 * masks[:, 1]
        batch = Batch(images, masks.argmax(1).byte(), raters=masks.byte())
        method, nets = Proposals(), {"model": Matcher(nn.Identity(), 1, 2)}  # brightness is all that it sees
        optimiser = torch.optim.AdamW(nets["model"].parameters(), 1e-2)
        for step in range(120):
            loss = method.training_step(nets, batch, None, Moment(step, 120))
            optimiser.zero_grad(), loss.backward(), optimiser.step()
        nets["average"] = nets["model"]
        found = method.predict(nets, images)[:, 1:]
        assert box_iou(boxes_of(found), boxes_of(masks)).mean() > 0.8


class TestPhrases:
    def test_sentences_are_about_the_structure_they_name(self):
        for value, name in NECK.items():
            said = phrases(name)
            assert len(set(said)) == len(said) >= 3 and {meant(phrase, NECK) for phrase in said} == {value}
            assert all(word in " ".join(said).lower() for word in SYNONYMS.get(name.split()[-1], ()))

    @pytest.mark.parametrize(
        ("phrase", "value"),
        [
            ("Swelling of the LEFT parotid gland", 4),
            ("The parotid is enlarged on the right.", 3),
            ("the myelon is displaced", 2),
            ("Spinal cord: no abnormality", 2),
            ("brain-stem, unremarkable", 1),
            ("parotid gland", None),
            ("left and right parotid", None),
            ("the recorder", None),
            ("", None),
        ],
    )
    def test_sides_and_other_words(self, phrase, value):
        assert meant(phrase, NECK) == value

    def test_both_sides_are_neither(self):
        assert meant("left and right parotid", {4: "left parotid"}) is None


def test_small_parts_of_a_region_are_left_out():
    mask = np.zeros((10, 12), bool)
    mask[1:5, 1:5], mask[7:9, 1:3], mask[7:9, 9], mask[0, 11] = True, True, True, True
    expected = mask.copy()
    expected[7:9, 9] = expected[0, 11] = False
    assert np.array_equal(region(mask), expected) and not region(np.zeros((4, 4), bool)).any()


@pytest.mark.component("grounding of phrases by anatomy")
class TestGrounding:
    def fitted(self, answers: torch.Tensor, masks: torch.Tensor, method=None):
        """A run that gives these answers, on a task with these masks."""
        task = SimpleNamespace(
            structures={1: "right parotid", 2: "left parotid", 3: "larynx"},
            preparation=SimpleNamespace(masks=lambda case: masks, images=lambda case: answers[:, :1]),
        )
        return SimpleNamespace(task=task, method=method or Anatomy(), answer=lambda images: answers)

    def masks(self) -> torch.Tensor:
        masks = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
        masks[:, 0, 2:8, 1:5] = masks[:, 1, 2:8, 10:14] = 1
        masks[0, 2, 10:14, 6:10], masks[1, 2, 15, 0] = 1, 1
        return masks

    def test_the_region_of_the_named_structure_is_compared_with_the_true_one(self):
        masks = self.masks()
        answers = torch.cat([torch.zeros(2, 1, 16, 16), masks.float() * 0.6], 1)
        answers[0, 2] = 0
        answers[0, 2, 2:8, 12:16] = 0.6
        answers[0, 1, 14, 14] = 0.9  # small parts do not count
        rows = {row["structure"]: row for row in grounding_rows(self.fitted(answers, masks), block())}
        right, left, larynx = (rows[name] for name in ("right parotid", "left parotid", "larynx"))
        assert [right[key] for key in ("iou", "hit", "pointing", "dice")] == [1] * 4 and not right["missed"]
        assert left["iou"] == pytest.approx((1 / 3 + 1) / 2) and left["dice"] == pytest.approx((1 / 2 + 1) / 2)
        assert left["hit"] == 0.5 and left["pointing"] == 0.5 and np.isnan(left["ceiling"])
        assert larynx["iou"] == 1, "the view with one pixel of it does not count"
        assert SMALLEST > 1

    def test_sides_are_not_interchangeable(self):
        masks = self.masks()
        answers = torch.cat([torch.zeros(2, 1, 16, 16), masks[:, [1, 0, 2]].float()], 1)
        rows = {row["structure"]: row for row in grounding_rows(self.fitted(answers, masks), block())}
        assert rows["right parotid"]["iou"] == rows["left parotid"]["iou"] == 0 < rows["larynx"]["iou"]

    def test_nothing_found_is_missed_and_what_nobody_drew_is_not_asked(self):
        masks = self.masks()
        masks[:, 2] = IGNORE
        rows = grounding_rows(self.fitted(torch.zeros(2, 4, 16, 16), masks), block())
        assert [row["structure"] for row in rows] == ["right parotid", "left parotid"]
        assert all(row["missed"] and row["iou"] == row["hit"] == row["pointing"] == row["dice"] == 0 for row in rows)

    def test_a_phrase_that_is_not_understood_finds_nothing(self, monkeypatch):
        from medcook.recipes.synthesis import paxray

        masks = self.masks()
        answers = torch.cat([torch.zeros(2, 1, 16, 16), masks.float()], 1)
        monkeypatch.setattr(paxray, "phrases", lambda name: [name, "something"])
        rows = grounding_rows(self.fitted(answers, masks), block())
        assert [row["iou"] for row in rows] == [0.5] * 3
        monkeypatch.setattr(paxray, "phrases", lambda name: [name, "the left parotid"])
        rows = grounding_rows(self.fitted(answers, masks), block())
        assert [row["iou"] for row in rows] == [0.5, 1, 0.5], "it is the phrase that tells where to look"

    def test_the_ceiling_is_the_best_proposal(self):
        masks = self.masks()
        answers = torch.cat([masks.float().sum(1, keepdim=True), 0 * masks.float()], 1)
        rows = grounding_rows(self.fitted(answers, masks, Proposals()), block())
        assert rows[0]["ceiling"] == 1 and rows[0]["iou"] == 0

    def test_pointing_is_the_middle_of_the_box(self):
        found, truth = torch.zeros(2, 12, 12, dtype=torch.bool)
        found[2:6, 2:10], truth[2:6, 5:12] = True, True
        assert grounded(found, truth) == {"iou": 0.5, "hit": 0.0, "pointing": 1.0, "dice": pytest.approx(40 / 60)}
        truth[:, :7] = False
        assert grounded(found, truth)["pointing"] == 0 and grounded(truth, found)["pointing"] == 1


def test_a_run_is_scored_on_held_out_patients():
    from medcook.tasks import Budget
    from medcook.training import fit

    task = OverlappingTask("embedded", labelled=2, angles=(0.0,), side=32)
    case = next(iter(task.cases("val")))
    for method in (Anatomy(channels=(8, 8)), Proposals(channels=(8, 8))):
        fitted = fit(method, task, Budget(4, 2, "float32", 1), cache=False, progress=False)
        rows = grounding_rows(fitted, case)
        assert rows and all(0 <= row["iou"] <= 1 and row["patient_id"] == case.patient_id for row in rows)
        assert all(0 < row["ceiling"] <= 1 for row in rows) == isinstance(method, Proposals)
