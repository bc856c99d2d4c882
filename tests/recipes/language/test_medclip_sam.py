"""From captions to masks: the loss, saliency, the random field, SAM's boxes, and a U-Net that learns from the masks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medcook.data.transforms import NONE
from medcook.losses import cross_entropy_and_dice
from medcook.methods import Batch, Moment
from medcook.recipes.language._captions import NOTHING, CaptionNet, clip_loss, dhn_nce, one_drawn
from medcook.recipes.language._findings import FINDINGS, fields_of, value_of
from medcook.recipes.language._saliency import asked_with_box, unit
from medcook.recipes.language.medclip_sam import MedClipSam, gscorecam, kernels, random_field, recipe

TINY = dict(channels=(4, 8), augmentation=NONE)


def labels(*values: int, side: int = 32, at: int = 8) -> torch.Tensor:
    """(B, side, side): a block of one value in each."""
    found = torch.zeros(len(values), side, side, dtype=torch.uint8)
    for label, value in zip(found, values, strict=True):
        label[at : at + 6, at : at + 6] = value
    return found


def batch(*values: int, **settings) -> Batch:
    torch.manual_seed(1)
    found = labels(*values, **settings)
    return Batch(torch.randn(len(values), 1, *found.shape[1:]), found)


@pytest.mark.component("DHN-NCE loss")
class TestLoss:
    def test_against_a_loop(self):
        found, total = 3 * torch.randn(5, 5), 0.0
        for each in (found, found.T):
            for b in range(5):
                others = [j for j in range(5) if j != b]
                weights = [torch.exp(0.15 * each[b, j]) for j in others]
                weights = [4 * weight / sum(weights) for weight in weights]
                pairs = zip(weights, others, strict=True)
                total = total - each[b, b] + torch.log(sum(w * torch.exp(each[b, j]) for w, j in pairs))
        torch.testing.assert_close(dhn_nce(found, torch.eye(5).bool(), 0.15), total / 10)

    def test_the_method_uses_it_and_the_ablation_the_other(self):
        arms = {name: arm.method.settings() for name, arm in recipe.arms.items()}
        differ = {key for key, value in arms["medclip-sam"].items() if arms["plain InfoNCE"][key] != value}
        assert differ == {"contrast"} and recipe.ablation == ("medclip-sam", "plain InfoNCE")
        torch.manual_seed(0)
        net, images, said = CaptionNet(1).eval(), torch.randn(3, 1, 16, 16), ("nodule", "patch", "cavity")
        found, different = net.images(images) @ net.texts(said).T / 0.1, torch.eye(3).bool()
        torch.testing.assert_close(MedClipSam().match(net, images, said), dhn_nce(found, different, 0.15))
        plain = MedClipSam(contrast="info-nce").match(net, images, said)
        torch.testing.assert_close(plain, clip_loss(found, different))


@pytest.mark.component("fine-tuned BiomedCLIP")
class TestCaptions:
    def test_only_which_finding_it_is_is_known(self):
        """Where it is drawn changes nothing: the same values elsewhere are the same caption and loss."""
        method, losses = MedClipSam(**TINY), []
        for at in (4, 20):
            torch.manual_seed(0)
            nets = method.build(1, 37, 2)
            data = batch(1, 20, 36, at=at)
            torch.manual_seed(5)
            losses.append(method.training_step(nets, data, None, Moment(9, 10)).item())
        assert losses[0] == losses[1] != 0

    def test_a_caption_describes_the_finding(self):
        torch.manual_seed(0)
        found = MedClipSam().captions(labels(1, 36, 0))
        for caption, value in zip(found[:2], (1, 36), strict=True):
            assert all(word in caption for word in FINDINGS[value - 1])
        assert found[2] == NOTHING
        assert len({MedClipSam().captions(labels(1))[0] for _ in range(30)}) == 3

    def test_it_learns_which_caption_belongs_to_which_image(self):
        torch.manual_seed(0)
        net, method = CaptionNet(1, channels=(4, 8, 8), cells=16, width=16), MedClipSam()
        optimiser = torch.optim.Adam(net.parameters(), 1e-2)
        places = {"in the right lung": (slice(2, 8), slice(2, 8)), "in the left lung": (slice(8, 14), slice(8, 14))}
        images = torch.zeros(2, 1, 16, 16)
        for image, place in zip(images, places.values(), strict=True):
            image[(0, *place)] = 1
        for _ in range(40):
            loss = method.match(net, images + 0.1 * torch.randn_like(images), tuple(places))
            optimiser.zero_grad(), loss.backward(), optimiser.step()
        found = net.eval().images(images) @ net.texts(tuple(places)).T
        assert found.argmax(1).tolist() == [0, 1] and loss < -5

    @pytest.mark.parametrize("size", [(32, 32), (37, 50)])
    def test_every_parameter_is_trained_at_any_size_and_precision(self, size):
        for enabled in (False, True):
            torch.manual_seed(0)
            net, images = CaptionNet(1), torch.randn(3, 1, *size)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                loss = MedClipSam().match(net, images, ("small nodule", "large patch", "cavity"))
            loss.backward()
            assert torch.isfinite(loss) and loss.dtype == torch.float32
            assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def alive() -> CaptionNet:
    """A network of random weights, none of whose channels is zero all over."""
    net = CaptionNet(1).eval()
    nn.init.constant_(net.mix[1].bias, 1.0)
    return net


@pytest.mark.component("gScoreCAM")
class TestSaliency:
    def test_against_a_loop(self):
        torch.manual_seed(0)
        net, image, said = alive(), torch.randn(1, 1, 20, 24), "large patch"
        found = gscorecam(net, image, said, top=3, heat=0.1)
        text = net.texts((said,))[0].detach()
        cells = net.cells(net.maps(image))
        cells.retain_grad()
        (net.pooled(cells)[0] @ text).backward()
        importance = cells.grad[0].mean((1, 2))
        maps, scores = cells[0].detach(), torch.zeros(len(importance))
        for channel in importance.argsort(descending=True)[:3].tolist():
            mask = F.interpolate(maps[None, channel : channel + 1], (20, 24), mode="bilinear")[0, 0]
            mask = (mask - mask.min()) / (mask.max() - mask.min())
            scores[channel] = (net.images(image * mask)[0] @ text).item() / 0.1
        weights = scores.exp() / scores.exp().sum()
        expected = sum(weight * one for weight, one in zip(weights, maps, strict=True)).clamp_min(0)
        expected = F.interpolate(expected[None, None], (20, 24), mode="bilinear")[0, 0]
        expected = (expected - expected.min()) / (expected.max() - expected.min())
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)

    def test_it_depends_on_the_sentence_and_leaves_no_gradient(self):
        torch.manual_seed(0)
        net, image = alive(), torch.randn(1, 1, 16, 16)
        one, other = (gscorecam(net, image, said, 5, 0.1) for said in ("small nodule", "large patch"))
        assert not torch.allclose(one, other, atol=1e-3) and not one.requires_grad
        assert one.min() == 0 and one.max() == pytest.approx(1) and all(p.grad is None for p in net.parameters())
        assert (unit(torch.full((3, 3), 2.0)) == 0).all()


@pytest.mark.component("conditional random field")
class TestField:
    def test_against_a_loop(self):
        torch.manual_seed(0)
        saliency, image = torch.rand(5, 6), torch.randn(5, 6)
        energies = {}
        for label, share in ((0, 1 - saliency), (1, saliency)):
            energies[label] = -torch.log(share + 1e-8) / (1.05 / (1 + torch.exp(-share)))
        before = 1 / (1 + torch.exp(energies[1] - energies[0]))
        expected = torch.zeros(5, 6, dtype=torch.bool)
        for y in range(5):
            for x in range(6):
                heard = torch.zeros(2)
                for weight, wide, alike in ((3.0, 1.0, None), (5.0, 5.0, 0.5)):
                    total, kernel = torch.zeros(2), 0.0
                    for v in range(max(0, y - 2), min(5, y + 3)):
                        for u in range(max(0, x - 2), min(6, x + 3)):
                            if (v, u) != (y, x):
                                k = np.exp(-((v - y) ** 2 + (u - x) ** 2) / (2 * wide**2))
                                if alike:
                                    k *= np.exp(-((image[v, u] - image[y, x]).item() ** 2) / (2 * alike**2))
                                total += k * torch.stack([1 - before[v, u], before[v, u]])
                                kernel += k
                    heard += weight * total / kernel
                expected[y, x] = heard[1] - energies[1][y, x] > heard[0] - energies[0][y, x]
        assert torch.equal(random_field(saliency, image, reach=2), expected) and expected.any() and not expected.all()

    def test_specks_go_and_edges_of_the_image_hold(self):
        saliency, image = torch.full((24, 24), 0.1), torch.zeros(24, 24)
        saliency[3, 3] = 0.7
        image[8:18, 8:18], saliency[9:19, 9:19] = 3.0, 0.75
        saliency[18, 9:19] = saliency[9:19, 18] = 0.45
        found = random_field(saliency, image)
        assert not found[3, 3] and found[10:17, 10:17].all() and not found[18].any()
        assert all(torch.allclose(kernel.sum(0), torch.ones(24 * 24)) for _, kernel in kernels(image, 3, 1.0, 5.0, 0.5))


class Fixed(MedClipSam):
    """Salient is what is bright."""

    def saliency(self, net, image, sentence):
        return unit(image[0, 0])


@pytest.mark.component("SAM prompted by text in a zero-shot setting")
class TestZeroShot:
    def test_sam_answers_to_the_box_of_what_is_salient(self):
        rows, columns = np.indices((64, 64))
        disc = np.hypot(rows - 30, columns - 40) < 8
        image = torch.from_numpy(disc + 0.05 * np.random.default_rng(0).standard_normal((64, 64))).float()[None, None]
        rough = disc.copy()
        rough[22:38, 40:48] = False
        rough[30, 32:48] = True  # half of the disc, as wide as it
        answer = asked_with_box(image[0, 0].numpy(), rough)
        assert 2 * (answer & disc).sum() / (answer.sum() + disc.sum()) > 0.9
        nets = Fixed(**TINY).build(1, 37, 2)
        for refined in (True, False):
            method = Fixed(**TINY, refined=refined)
            expected = method.rough(image[0, 0].numpy(), unit(image[0, 0]).numpy())
            expected = asked_with_box(image[0, 0].numpy(), expected) if refined else expected
            found = method.answer(nets, image, ("small nodule", "patch"))
            assert found.shape == (1, 2, 64, 64) and np.array_equal(found[0, 0].numpy() > 0, expected)

    def test_an_image_is_asked_for_the_description_that_fits_best(self):
        method = Fixed(**TINY)
        torch.manual_seed(0)
        nets = method.build(1, 5, 2).eval()
        images = torch.randn(2, 1, 32, 32)
        found = method.predict(nets, images)
        names = tuple(method.language.name(value) for value in range(1, 5))
        best = (nets["average"].images(images) @ nets["average"].texts(names).T).argmax(1)
        assert found.shape == (2, 5, 32, 32)
        for row, value in zip(found, best.tolist(), strict=True):
            others = [k for k in range(1, 5) if k != 1 + value]
            assert not row[others].any() and torch.equal(row[0], 1 - row[1 + value])

    def test_steps_without_captions_come_first_and_the_optimiser_starts_with_captions(self):
        method = MedClipSam(**TINY)
        nets = method.build(1, 37, 2)
        where = [method.phase(Moment(step, 10)) for step in range(10)]
        assert [here for here, _ in where] == [False] * 3 + [True] * 7 and where[3][1] == Moment(0, 7)
        assert method.training_step(nets, batch(1, 20), None, Moment(2, 10)).item() == 0
        assert method.optimise(list(nets.parameters()), 10)[1].first == 3
        assert MedClipSam(weak=True).optimise(list(nets.parameters()), 10)[1].first == 7
        assert recipe.scales["full"].budget.steps == 900  # of which 630, as `components` says, learn from captions


@pytest.mark.component("weak supervision")
class TestWeak:
    def method(self, **settings) -> MedClipSam:
        return Fixed(**TINY, weak=True, making=2, together=2, **settings)

    def test_masks_of_training_images_are_made_last(self, monkeypatch):
        method, asked = self.method(), []
        monkeypatch.setattr(
            method, "mask", lambda nets, image, said: asked.append(said) or (image[0, 0] > 0).to(torch.uint8)
        )
        nets, data = method.build(1, 37, 2), batch(1, 0, 20)
        for step in range(7):
            torch.manual_seed(step)
            loss = method.training_step(nets, data, None, Moment(step, 10))
            assert bool(loss) == (step < 5), "five steps of captions, then two of making"
            assert len(nets["made"]) == max(0, step - 4), "one of two images has a caption"
        assert all("nodule" in said for said in asked)
        assert torch.equal(nets["made"].labels[0] > 0, data.images[0, 0] > 0)

    def test_the_u_net_learns_from_these_and_from_no_label(self):
        method, nets = self.method(), None
        losses = []
        for at in (4, 20):
            torch.manual_seed(0)
            nets = method.build(1, 37, 2)
            images = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(2))
            nets["made"].put(images, images[:, 0] > 0)
            data = batch(1, 20, at=at)
            torch.manual_seed(3)
            losses.append(method.training_step(nets, data, None, Moment(8, 10)))
        assert losses[0].item() == losses[1].item()
        torch.manual_seed(3)
        drawn, masks = nets["made"].draw(2)
        expected = cross_entropy_and_dice(nets["model"](drawn), masks)
        assert losses[1].item() == pytest.approx(expected.item(), rel=1e-4)
        losses[1].backward()
        assert all(p.grad is not None for p in nets["model"].parameters())
        assert all(p.grad is None for p in nets["captions"].parameters())

    def test_it_answers_whatever_is_asked(self):
        method = self.method()
        nets = method.build(1, 37, 2).eval()
        images = torch.randn(2, 1, 32, 32)
        found = method.answer(nets, images, ("a nodule", "a patch"))
        expected = nets["mean"](images).softmax(1)[:, 1]
        assert found.shape == (2, 2, 32, 32) and torch.equal(found[:, 0], found[:, 1])
        torch.testing.assert_close(found[:, 0], expected)

    def test_averages_follow_in_their_own_phases(self):
        method = self.method()
        nets = method.build(1, 37, 2)
        with torch.no_grad():
            for name in ("captions", "model"):
                next(nets[name].parameters()).add_(1)
        moved = lambda one, other: not torch.equal(next(nets[one].parameters()), next(nets[other].parameters()))  # noqa: E731
        method.after_step(nets, Moment(6, 10))
        assert moved("average", "captions") and moved("mean", "model")
        before = [next(nets[name].parameters()).clone() for name in ("average", "mean")]
        method.after_step(nets, Moment(0, 10))
        method.after_step(nets, Moment(7, 10))
        after = [next(nets[name].parameters()) for name in ("average", "mean")]
        assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.component("breast, brain and lung images")
def test_every_image_has_one_finding_where_its_caption_says():
    lungs = np.zeros((64, 64), bool)
    lungs[10:58, 8:28], lungs[10:58, 36:56] = True, True
    seen = set()
    for seed in range(60):
        image, label = one_drawn(np.zeros((64, 64), np.float32), lungs, np.random.default_rng(seed))
        (value,) = set(np.unique(label)) - {0}
        finding = FINDINGS[value - 1]
        middle = np.argwhere(label > 0).mean(0).round().astype(int)
        rows, columns = (slice(at - 2, at + 3) for at in middle)
        assert fields_of(lungs)[finding.side, finding.field][rows, columns].any()
        assert value_of(finding) == value and image[label > 0].mean() > 0.1 and abs(image[0]).max() < 1e-4
        seen.add(value)
    assert len(seen) > 12
    assert not one_drawn(np.zeros((64, 64), np.float32), lungs & False, np.random.default_rng(0))[1].any()
