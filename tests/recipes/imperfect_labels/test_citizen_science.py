"""A crowd's labels merged, pix2pix with one optimiser, and the pairs that enlarge a small set."""

from copy import deepcopy
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import IGNORE, Case
from medcook.data.transforms import NONE
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.recipes.imperfect_labels import citizen_science
from medcook.recipes.imperfect_labels.citizen_science import (
    LAMBDA,
    Crowd,
    CrowdTask,
    Judge,
    adversarial,
    bend,
    boxed,
    merged,
    one_hot,
    one_of,
    recipe,
)

TINY = dict(channels=(4, 8), generator=(4, 8))
EARLY, LATE = Moment(0, 10), Moment(9, 10)


def batch(size: tuple[int, int] = (32, 24)) -> Batch:
    """Four images whose three annotators differ."""
    rng = torch.Generator().manual_seed(0)
    raters = torch.randint(0, 3, (4, 3, size[0] // 8, size[1] // 8), generator=rng).byte()
    raters = raters.repeat_interleave(8, 2).repeat_interleave(8, 3)
    images = raters[:, :1].float() + 0.3 * torch.randn(4, 1, *raters.shape[2:], generator=rng)
    return Batch(images, raters[:, 0], torch.tensor([4, 0, 1, 2]), raters=raters)


def built(method: Crowd) -> nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(1, 3, 2).train()


def step(method: Crowd, nets: nn.ModuleDict, now: Moment, given: Batch | None = None) -> Tensor:
    torch.manual_seed(1)
    given = method.augment(given or batch(), torch.Generator().manual_seed(2))
    return method.training_step(nets, given, None, now)


class Says(nn.Module):
    """A network that says the same of every pixel, and keeps what it was shown."""

    def __init__(self, channels: int):
        super().__init__()
        self.value = nn.Parameter(torch.linspace(-1, 1, channels))

    def forward(self, images: Tensor) -> Tensor:
        self.shown = images
        return self.value.view(1, -1, 1, 1).expand(len(images), -1, *images.shape[2:])


class TestMerging:
    def test_against_loops(self):
        """Two images, four annotators, one of whom is missing in one of them."""
        raters = torch.randint(0, 3, (2, 4, 6, 5)).byte()
        raters[1, 2] = IGNORE
        found = merged(raters, turns=2)
        for crowd, mask in zip(raters.numpy(), found.numpy(), strict=True):
            there = [annotation for annotation in crowd if annotation[0, 0] != IGNORE]
            weights = np.ones(len(there))
            for _ in range(2):
                mean = sum(w * np.stack([a == c for c in range(3)]) for w, a in zip(weights, there, strict=True))
                mean = mean / weights.sum()
                weights = []
                for annotation in there:
                    drawn = np.stack([annotation == c for c in (1, 2)])
                    both = (drawn * mean[1:]).sum()
                    weights.append((2 * both + 1) / (drawn.sum() + mean[1:].sum() + 1))
                weights = np.array(weights)
            votes = sum(w * np.stack([a == c for c in range(3)]) for w, a in zip(weights, there, strict=True))
            assert np.array_equal(mask, votes.argmax(0))

    def test_who_agrees_outvotes_a_careless_majority(self):
        truth = torch.zeros(20, 20, dtype=torch.uint8)
        truth[4:16, 4:16] = 1
        careful = torch.stack([truth, truth])
        careless = torch.zeros(3, 20, 20, dtype=torch.uint8)
        for number, columns in enumerate((slice(0, 5), slice(7, 12), slice(14, 19))):
            careless[number, :3, columns] = 1
            careless[number, 18:, :4] = 1  # all three mark a corner
        crowd = torch.cat([careful, careless])[None]
        assert torch.equal(merged(crowd)[0], truth)
        vote = one_hot(crowd, 2).sum(1).argmax(1)[0]
        assert vote[19, 0] == 1 and vote[8, 8] == 0  # what a plain vote would say

    def test_all_alike_none_at_all_and_one_alone(self):
        truth = torch.randint(0, 3, (2, 8, 8)).byte()
        assert torch.equal(merged(truth[:, None].expand(-1, 3, -1, -1)), truth)
        nobody = torch.full((2, 3, 8, 8), IGNORE, dtype=torch.uint8)
        assert (merged(nobody) == IGNORE).all()
        alone = nobody.clone()
        alone[:, 1] = truth
        alone[0, 1, 0, 0] = IGNORE
        assert torch.equal(merged(alone), alone[:, 1])

    def test_an_annotator_is_one_and_the_same_for_an_image(self):
        raters = torch.arange(5).byte().view(1, 5, 1, 1).expand(400, 5, 2, 2).clone()
        raters[:, 3] = IGNORE
        found = one_of(raters, torch.arange(400))
        assert torch.equal(found, one_of(raters, torch.arange(400))) and (found != IGNORE).all()
        assert torch.bincount(found[:, 0, 0].long(), minlength=5)[[0, 1, 2, 4]].min() > 60

    @pytest.mark.parametrize("labels", ["merged", "one", "expert"])
    def test_a_step_learns_what_its_arm_says(self, labels):
        given = batch()._replace(labels=torch.ones(4, 32, 24).byte())
        seen = Crowd(labels=labels, augmentation=NONE).augment(given, torch.Generator().manual_seed(0))
        expected = {
            "merged": merged(given.raters),
            "one": one_of(given.raters, given.index),
            "expert": given.labels,
        }
        assert torch.equal(seen.labels, expected[labels]) and torch.allclose(seen.images, given.images, atol=1e-4)

    def test_without_a_crowd_the_labels_stay(self):
        given = batch()._replace(raters=None)
        seen = Crowd(augmentation=NONE).augment(given, torch.Generator().manual_seed(0))
        assert torch.equal(seen.labels, given.labels)


class TestTask:
    def test_the_expert_is_not_of_the_crowd(self):
        task = CrowdTask("embedded", fold=0, few=2)
        assert task.labelled_patients == CrowdTask("embedded", fold=0, few=99).labelled_patients[:2]
        assert len(task.val_patients) > 2
        label = np.random.default_rng(0).integers(0, 4, (2, 96, 96)).astype(np.uint8)
        case = Case(np.zeros((1, 2, 96, 96), np.float32), label, "a", "a", raters=np.stack([label, label // 2]))
        drawn = task._raters(case, 3)
        assert (drawn[:, [0, 2]] == IGNORE).all() and np.array_equal(drawn[:, 1], label // 2)

    def test_samples_have_a_crowd_and_the_expert_s_label(self):
        task = CrowdTask("embedded", fold=0, few=1)
        samples = task.samples("labelled")
        case = task.data.load(task.data.patients[task.labelled_patients[0]][0])
        assert np.array_equal(samples.labels, case.label)
        assert np.array_equal(samples.raters.transpose(0, 1), case.raters)
        assert task.samples("val").raters is None


class TestAssistance:
    def ask(self, image: np.ndarray, prompt) -> SimpleNamespace:
        """Fills the box."""
        left, top, right, bottom = map(int, prompt.box)
        mask = np.zeros(image.shape, bool)
        mask[top:bottom, left:right] = True
        return SimpleNamespace(mask=mask)

    def test_each_structure_is_asked_for_by_its_box(self):
        mask = torch.zeros(8, 8, dtype=torch.uint8)
        mask[1, 1] = mask[3, 2] = 1
        mask[6, 5:7] = 2
        expected = torch.zeros_like(mask)
        expected[1:4, 1:3], expected[6, 5:7] = 1, 2
        assert torch.equal(boxed(np.zeros((8, 8)), mask, self.ask), expected)
        missing = torch.full_like(mask, IGNORE)
        assert torch.equal(boxed(np.zeros((8, 8)), missing, self.ask), missing)

    def test_the_small_sam_answers(self, monkeypatch):
        monkeypatch.setattr(citizen_science, "small_sam", lambda: self.ask)
        label = np.zeros((1, 96, 96), np.uint8)
        label[0, 20:40, 30:60] = 1
        drawn = np.zeros((2, 1, 96, 96), np.uint8)
        drawn[0, 0, 22:30, 22:30] = np.eye(8)
        case = Case(np.zeros((1, 1, 96, 96), np.float32), label, "a", "a", raters=drawn)
        plain, assisted = (CrowdTask("embedded", fold=0, assisted=on)._raters(case, 2) for on in (False, True))
        assert plain[0, 0].sum() == 8 and assisted[0, 0].sum() == 64
        assert assisted[0, 0, 22:30, 22:30].all() and not assisted[0, 1].any()


@pytest.mark.component("pix2pix")
class TestPix2Pix:
    def parts(self) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
        nets = built(Crowd(**TINY))
        given = batch()
        return nets["generator"], nets["judge"], one_hot(given.labels, 3), given.images

    def test_the_loss_is_that_of_both_players(self):
        """Written out with binary cross-entropy, for a generator that says the same whenever it is asked."""
        _, judge, masks, images = self.parts()
        generator = Says(1)
        made = generator(masks)
        real, fake = (judge(torch.cat([masks, x], 1)) for x in (images, made))
        ones, bce = torch.ones_like(real), F.binary_cross_entropy_with_logits
        expected = (bce(real, ones) + bce(fake, 0 * ones)) / 2 + (made - images).abs().mean() + bce(fake, ones) / LAMBDA
        assert adversarial(generator, judge, masks, images).item() == pytest.approx(expected.item(), rel=1e-5)

    def test_each_player_moves_by_its_own_loss(self):
        """Gradients against those of two optimisers that take turns: the other player is a constant."""
        _, judge, masks, images = self.parts()
        generator = nn.Conv2d(3, 1, 3, padding=1)
        adversarial(generator, judge, masks, images).backward()
        found = [p.grad.clone() for module in (generator, judge) for p in module.parameters()]
        bce, pair = F.binary_cross_entropy_with_logits, lambda x: judge(torch.cat([masks, x], 1))
        made = generator(masks)
        fooled = bce(pair(made), torch.ones_like(pair(made))) / LAMBDA + F.l1_loss(made, images)
        real, fake = pair(images), pair(made.detach())
        judged = (bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))) / 2
        expected = [
            *torch.autograd.grad(fooled, list(generator.parameters())),
            *torch.autograd.grad(judged, list(judge.parameters())),
        ]
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True))

    def test_the_judge_sees_patches_of_34_pixels_and_the_mask(self):
        judge = Judge(3)
        judge = nn.Sequential(*[layer for layer in judge if not isinstance(layer, nn.InstanceNorm2d)])  # sees it all
        pair = torch.randn(1, 3, 96, 96, requires_grad=True)
        says = judge(pair)
        says[0, 0, says.shape[2] // 2, says.shape[3] // 2].backward()
        seen = pair.grad[0].abs() > 0
        assert seen.any(1).sum(1).tolist() == [34] * 3 and seen.any(2).sum(1).tolist() == [34] * 3

    def test_the_noise_is_dropout(self):
        generator, _, masks, _ = self.parts()
        torch.manual_seed(0)
        one, other = generator(masks), generator(masks)
        assert one.shape == (4, 1, 32, 24) and not torch.allclose(one, other, atol=1e-3)
        torch.manual_seed(0)
        assert torch.equal(generator(masks), one)

    def test_it_learns_from_real_pairs_before_intensities_change(self, monkeypatch):
        asked = []
        monkeypatch.setattr(citizen_science, "adversarial", lambda *a: asked.append(a) or torch.tensor(5.0))
        method, given = Crowd(**TINY), batch()
        nets = built(method)
        seen = method.augment(given, torch.Generator().manual_seed(2))
        plain = Crowd(**TINY, extra="nothing")
        assert step(method, nets, EARLY).item() == pytest.approx(5 + step(plain, built(plain), EARLY).item(), abs=1e-5)
        (generator, judge, masks, images) = asked[0]
        assert generator is nets["generator"] and judge is nets["judge"]
        assert torch.equal(images, seen.images[:2]) and torch.equal(masks, one_hot(seen.labels[:2], 3))

    def test_everything_is_trained(self):
        method = Crowd(**TINY)
        nets = built(method)
        step(method, nets, LATE).backward()
        for name in ("model", "generator", "judge"):
            blind = {f"{k}.bias" for k, layer in enumerate(nets[name]) if k} if name == "judge" else set()
            for key, weight in nets[name].named_parameters():
                assert weight.grad is not None, key
                assert key in blind or weight.grad.abs().max() > 0, key  # instance norm takes away what a bias adds
        assert {name for name, p in nets.named_parameters() if not p.requires_grad} == {
            f"average.{name}" for name, _ in nets["average"].named_parameters()
        }


@pytest.mark.component("enlarged training set")
class TestEnlarging:
    def test_a_mask_bends_with_its_image(self):
        given = batch((64, 64))
        images, labels = bend(given.labels[:, None].float(), given.labels, 0.1, torch.Generator().manual_seed(0))
        assert (images[:, 0] - labels).abs().mean() < 0.15  # interpolated here, and nearest there
        assert 0.02 < (labels != given.labels).float().mean() < 0.7
        same, still = bend(given.images, given.labels, 0.0, torch.Generator().manual_seed(0))
        assert torch.allclose(same, given.images, atol=1e-4) and torch.equal(still, given.labels)

    def test_the_generator_draws_the_bent_masks(self):
        method, given = Crowd(**TINY), batch()
        nets = built(method)
        nets["generator"] = SimpleGenerator()
        images, masks = method.enlarge(nets, given.images, given.labels, torch.Generator().manual_seed(3))
        bent = bend(given.images[:2], given.labels[:2], method.strength, torch.Generator().manual_seed(3))
        assert torch.equal(masks, bent[1]) and torch.equal(images[:, 0], masks.float() * 10)
        copies = Crowd(**TINY, extra="copies")
        images, masks = copies.enlarge(nets, given.images, given.labels, torch.Generator().manual_seed(3))
        assert torch.equal(images, bent[0]) and torch.equal(masks, bent[1])

    @pytest.mark.parametrize("extra", ["pix2pix", "copies"])
    def test_the_network_learns_from_both_kinds_of_pairs(self, extra, monkeypatch):
        """From `start` on, half as many more, and the loss is that of all together."""
        monkeypatch.setattr(citizen_science, "adversarial", lambda *a: torch.tensor(0.0))
        more, masks = torch.full((2, 1, 32, 24), 7.0), torch.full((2, 32, 24), 2).byte()
        monkeypatch.setattr(Crowd, "enlarge", lambda self, nets, images, labels, rng: (more, masks))
        method = Crowd(**TINY, extra=extra, augmentation=NONE)
        nets = built(method)
        nets["model"] = Says(3)
        real = merged(batch().raters)
        for now, labels in ((EARLY, real), (Moment(39, 100), real), (LATE, torch.cat([real, masks]))):
            found = step(method, nets, now)
            shown = nets["model"].shown
            assert len(shown) == len(labels) and torch.allclose(shown[4:], more[: len(labels) - 4], atol=1e-4)
            expected = find_loss("both")(nets["model"](shown), labels)
            assert found.item() == pytest.approx(expected.item(), rel=1e-5)

    def test_synthetic_images_are_constants_of_the_segmentation(self, monkeypatch):
        monkeypatch.setattr(citizen_science, "adversarial", lambda *a: torch.tensor(0.0))
        method = Crowd(**TINY)
        nets = built(method)
        step(method, nets, LATE).backward()
        assert all(p.grad is None for name in ("generator", "judge") for p in nets[name].parameters())
        assert all(p.grad is not None for p in nets["model"].parameters())

    def test_all_arms_begin_alike_and_see_the_same_real_views(self):
        shown = []
        for arm in ("merged labels", "enlarged", "copies"):
            method = Crowd(
                **asdict(recipe.arms[arm].method) | TINY | {"augmentation": recipe.arms[arm].method.augmentation}
            )
            nets = built(method)
            start = deepcopy(nets["model"].state_dict())
            nets["model"] = Says(3)
            step(method, nets, LATE)
            shown.append((nets["model"].shown[:4], start["head.weight"]))
        for view, weight in shown[1:]:
            assert torch.equal(view, shown[0][0]) and torch.equal(weight, shown[0][1])

    def test_the_ablation_takes_the_generator_away_and_nothing_else(self):
        one, other = (asdict(recipe.arms[name].method) for name in recipe.ablation)
        assert {key for key in one if one[key] != other[key]} == {"extra"}
        assert recipe.arms["copies"].changes == recipe.arms["enlarged"].changes == {}


class SimpleGenerator(nn.Module):
    """Ten times the class."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.ModuleList([nn.Conv2d(3, 1, 1)])])

    def forward(self, masks: Tensor) -> Tensor:
        return 10 * masks.argmax(1, keepdim=True).float()


@pytest.mark.parametrize("size", [(33, 47), (16, 16)])
def test_any_size_and_precision(size):
    method = Crowd(channels=(4, 8), generator=(4, 8))
    nets = built(method)
    labels = torch.randint(0, 3, (3, *size)).byte()
    given = Batch(torch.randn(3, 1, *size), labels, torch.arange(3), raters=labels[:, None])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(step(method, nets, LATE, given))
    nets.eval()
    answer = method.predict(nets, given.images)
    assert answer.shape == (3, 3, *size) and torch.equal(answer, method.predict(nets, given.images))
