"""What a sentence needs of an image: the bottleneck, clusters of saliency, and networks at the ends of cycles."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import nn
from torch.distributions import Normal, kl_divergence

from medcook.data.transforms import NONE
from medcook.methods import Batch, Moment
from medcook.recipes.language import medclip_samv2
from medcook.recipes.language._captions import CaptionNet, dhn_nce
from medcook.recipes.language._saliency import largest
from medcook.recipes.language.medclip_samv2 import MedClipSamV2, bottleneck, capacity, recipe, two_clusters

TINY = dict(channels=(4, 8), augmentation=NONE)


class OneCell(nn.Module):
    """Its vector says how large one number of the features is; nothing else counts."""

    def cells(self, maps):
        return maps

    def pooled(self, cells):
        return F.normalize(torch.stack([cells[:, 1, 2, 3], torch.ones(len(cells))], dim=1), dim=1)


@pytest.mark.component("multi-modal information bottleneck")
class TestBottleneck:
    def test_what_passes_is_a_divergence(self):
        torch.manual_seed(0)
        kept, features = torch.rand(4, 5), torch.randn(4, 5)
        expected = kl_divergence(Normal(kept * features, 1 - kept), Normal(0.0, 1.0))
        torch.testing.assert_close(capacity(kept, features), expected, atol=1e-5, rtol=1e-4)
        assert capacity(torch.zeros(1), torch.ones(1)).item() == 0 and capacity(torch.ones(1), torch.ones(1)).isfinite()

    def test_only_what_the_text_needs_passes(self):
        torch.manual_seed(0)
        features, text = torch.randn(1, 4, 5, 6), torch.tensor([[1.0, 0.0]])
        features[0, 1, 2, 3] = 4.0
        found = bottleneck(OneCell(), features, text, weight=0.1, steps=10)
        assert found.shape == (4, 5, 6) and found.argmax() == np.ravel_multi_index((1, 2, 3), (4, 5, 6))
        others = found.flatten()[torch.arange(120) != found.argmax()]
        assert found.max() > 5 * others.max()

    def test_first_step_against_autograd(self):
        """One step of Adam moves every gate by its rate, against the slope of compression less fit."""
        torch.manual_seed(0)
        net, features = CaptionNet(1).eval(), torch.randn(1, 48, 4, 5).relu()
        text = F.normalize(torch.randn(1, 64), dim=1)
        gate = torch.full((48, 4, 5), 5.0, requires_grad=True)
        share = gate.sigmoid()
        noise = torch.randn(10, 48, 4, 5, generator=torch.Generator().manual_seed(0))
        fit = F.cosine_similarity(net.pooled(net.cells(share * features + (1 - share) * noise)), text).mean()
        passed = kl_divergence(Normal(share * features[0], 1 - share), Normal(0.0, 1.0))
        (0.1 * passed.mean() - fit).backward()
        expected = (5 - gate.grad.sign()).sigmoid()
        found = bottleneck(net, features, text, weight=0.1, steps=1)
        torch.testing.assert_close(found, capacity(expected, features[0]).detach(), atol=1e-3, rtol=1e-2)

    def test_saliency_is_of_the_sentence_but_for_the_ablation(self):
        torch.manual_seed(0)
        net, image = CaptionNet(1).eval(), torch.randn(1, 1, 16, 20)
        for text in (True, False):
            one, again, other = (
                MedClipSamV2(text=text).saliency(net, image, said) for said in ("nodule", "nodule", "large patch")
            )
            assert torch.equal(one, again) and one.shape == (16, 20) and one.min() == 0 and one.max() <= 1
            assert torch.equal(one, other) != text
        arms = {name: arm.method.settings() for name, arm in recipe.arms.items()}
        for other, key in (("without compression", "weight"), ("image alone", "text")):
            assert {k for k, value in arms["medclip-samv2"].items() if arms[other][k] != value} == {key}
        assert recipe.ablation == ("medclip-samv2", "without compression")

    def test_without_compression_nothing_that_does_not_matter_is_closed(self):
        torch.manual_seed(0)
        features, text = torch.rand(1, 4, 5, 6) + 0.5, torch.tensor([[1.0, 0.0]])
        closed, left = (bottleneck(OneCell(), features, text, weight, steps=10) for weight in (0.1, 0.0))
        others = torch.arange(120) != np.ravel_multi_index((1, 2, 3), (4, 5, 6))
        open_still = capacity(torch.full((1,), 5.0).sigmoid(), features[0])
        torch.testing.assert_close(left.flatten()[others], open_still.flatten()[others])
        assert closed.flatten()[others].max() < 0.2 * left.flatten()[others].min()

    def test_the_sum_over_channels_is_shown(self, monkeypatch):
        passed = torch.rand(48, 4, 5)
        monkeypatch.setattr(medclip_samv2, "bottleneck", lambda *args: passed)
        found = MedClipSamV2().saliency(CaptionNet(1).eval(), torch.randn(1, 1, 16, 20), "nodule")
        expected = F.interpolate(passed.sum(0)[None, None], (16, 20), mode="bilinear")[0, 0]
        expected = (expected - expected.min()) / (expected.max() - expected.min())
        torch.testing.assert_close(found, expected)


@pytest.mark.component("saliency to prompts")
def test_two_clusters_are_those_of_k_means():
    rng = np.random.default_rng(0)
    for _ in range(5):
        values = np.concatenate([rng.normal(0.2, 0.1, 300), rng.normal(0.8, 0.1, 40)]).reshape(20, 17)
        means = KMeans(2, n_init=5, random_state=0).fit(values.reshape(-1, 1))
        expected = (means.labels_ == means.cluster_centers_.argmax()).reshape(20, 17)
        assert np.array_equal(two_clusters(values), expected)
    assert not two_clusters(np.ones((3, 3))).any()
    values[0, 0] = 0.9
    found = MedClipSamV2().rough(values, values)
    assert np.array_equal(found, largest(two_clusters(values))) and found.sum() == 40


@pytest.mark.component("DHN-NCE loss")
def test_captions_are_learnt_by_it():
    torch.manual_seed(0)
    net, images, said = CaptionNet(1).eval(), torch.randn(3, 1, 16, 16), ("nodule", "patch", "cavity")
    found = net.images(images) @ net.texts(said).T / 0.1
    expected = dhn_nce(found, torch.eye(3, dtype=torch.bool), 0.15)
    torch.testing.assert_close(MedClipSamV2().match(net, images, said), expected)


@pytest.mark.component("zero-shot segmentation by SAM")
def test_sam_is_asked_with_the_box_of_what_passes(monkeypatch):
    rows, columns = np.indices((64, 64))
    disc = np.hypot(rows - 30, columns - 40) < 8
    image = torch.from_numpy(disc + 0.05 * np.random.default_rng(0).standard_normal((64, 64))).float()[None, None]
    method = MedClipSamV2(**TINY)
    monkeypatch.setattr(method, "saliency", lambda net, image, said: torch.from_numpy(disc).float())
    answer = method.answer(method.build(1, 37, 2), image, ("nodule",))[0, 0].numpy() > 0
    assert 2 * (answer & disc).sum() / (answer.sum() + disc.sum()) > 0.9


@pytest.mark.component("weak supervision with checkpoints")
class TestCycles:
    def method(self) -> MedClipSamV2:
        return MedClipSamV2(**TINY, weak=True, making=1, share=0.5)

    def test_the_rate_falls_again_and_again(self):
        method = self.method()
        rates = [method.rate_at(Moment(step, 60)) for step in range(60)]
        ends = [step for step in range(30, 60) if rates[step] < 1e-4]
        assert ends == [39, 49, 59] and max(rates[30:40]) == pytest.approx(method.rate)
        assert rates[30:40] == rates[40:50] == rates[50:60]
        numbers = [method.cycle(Moment(step, 11))[0] for step in range(11)]
        assert numbers == sorted(numbers) and set(numbers) == {0, 1, 2}
        assert [method.cycle(Moment(step, 11))[1].step for step in (0, 4, 8)] == [0, 0, 0]

    def test_networks_at_the_ends_answer_together(self):
        torch.manual_seed(0)
        method = self.method()
        nets, kept = method.build(1, 37, 2), []
        for step in range(12):
            with torch.no_grad():
                nets["model"].head.bias.add_(torch.tensor([0.0, 0.3]))
            method.after_step(nets, Moment(step, 12))
            if step in (7, 9, 11):
                kept.append(nets["model"].head.bias.clone())
        assert all(torch.equal(net.head.bias, bias) for net, bias in zip(nets["ends"], kept, strict=True))
        images = torch.randn(2, 1, 16, 16)
        expected = sum(net.eval()(images).softmax(1)[:, 1] for net in nets["ends"]) / 3
        torch.testing.assert_close(method.answer(nets.eval(), images, ("x",))[:, 0], expected)
        assert len({round(net(images).mean().item(), 4) for net in nets["ends"]}) == 3

    def test_uncertainty_is_entropy_around_the_mask(self, monkeypatch):
        method, share = self.method(), torch.full((1, 8, 8), 0.25)
        share[0, 3:5, 3:5] = 0.75
        monkeypatch.setattr(method, "unet", lambda nets, images: share)
        each = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))
        assert method.uncertainty(None, None) == pytest.approx(64 * each / 12, rel=1e-4)
        assert np.isnan(MedClipSamV2().uncertainty(None, None))

    def test_a_short_run_of_the_method(self):
        torch.manual_seed(0)
        method = self.method()
        nets = method.build(1, 37, 2)
        labels = torch.zeros(3, 32, 32, dtype=torch.uint8)
        labels[0, 4:9, 4:9], labels[1, 9:14, 9:14], labels[2, 20:25, 3:8] = 1, 20, 36
        data = Batch(torch.randn(3, 1, 32, 32) + 3 * (labels[:, None] > 0), labels)
        for step in range(8):
            loss = method.training_step(nets, data, None, Moment(step, 8))
            assert torch.isfinite(loss)
            if loss:
                loss.backward()
            method.after_step(nets, Moment(step, 8))
        assert len(nets["made"]) == 3
        assert all(p.grad is not None for name in ("captions", "model") for p in nets[name].parameters())
        assert method.predict(nets.eval(), data.images).shape == (3, 37, 32, 32)
