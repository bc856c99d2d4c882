"""CC-SAM: two frozen encoders, weights between them that are a random variable, adapters, words."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from medcook.methods import Batch, Moment
from medcook.networks.squeezenet import SqueezeNet
from medcook.recipes.sam_adaptation import cc_sam
from medcook.recipes.sam_adaptation.cc_sam import (
    CCSam,
    CCSamMethod,
    FeatureAdapter,
    PositionAdapter,
    TextPrompt,
    VariationalFusion,
    divergence,
)
from medcook.sam import adapting
from medcook.sam.adapting import Segmenter
from medcook.sam.model import SIZE, SmallSam


@pytest.fixture(autouse=True)
def random_weights(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(adapting, "start", lambda pretrained=True: SmallSam())
    monkeypatch.setattr(cc_sam, "load_squeezenet", lambda: SqueezeNet(features_only=True).eval())


@pytest.fixture
def model() -> CCSam:
    return CCSam(Segmenter(SmallSam(), 3), cnn="imagenet", adapters=True, description="a faint and a dark shape").eval()


@pytest.fixture
def images():
    return torch.randn(2, 1, 64, 64)


def test_without_additions_it_is_the_segmenter(images):
    segmenter = Segmenter(SmallSam(), 3).eval()
    plain = CCSam(segmenter, cnn="none", adapters=True, description="").eval()
    torch.testing.assert_close(plain(images), segmenter(images), atol=1e-4, rtol=1e-4)


@pytest.mark.component("frozen CNN branch")
def test_what_the_cnn_sees_joins_the_embedding(model, images):
    assert model.local(torch.randn(1, 1, SIZE, SIZE)).shape == (1, 160, 10, 10)
    before = model(images)
    model.project[1].weight.data *= -3
    assert not torch.allclose(model(images), before)


@pytest.mark.component("frozen CNN branch")
def test_it_works_in_low_precision(model, images):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = model(images).float()
    assert (low.softmax(1) - model(images).softmax(1)).abs().mean() < 0.05


@pytest.mark.component("frozen CNN branch")
def test_its_weights_are_imagenets_or_random(monkeypatch):
    made = SqueezeNet(features_only=True)
    monkeypatch.setattr(cc_sam, "load_squeezenet", lambda: made)
    ask = lambda cnn: CCSam(Segmenter(SmallSam(), 2), cnn=cnn, adapters=False, description="").cnn  # noqa: E731
    assert ask("imagenet") is made and ask("random") is not made and ask("none") is None


@pytest.mark.component("frozen CNN branch")
def test_both_encoders_stay_and_the_rest_learns(images):
    method = CCSamMethod()
    nets = method.build(1, 3, 2)
    for adapter in nets["model"].features:
        nn.init.normal_(adapter.up.weight, std=0.1)
    nn.init.normal_(nets["model"].fusion.infer[2].weight, std=0.1)
    labels = (images[:, 0] > 0).byte()
    method.training_step(nets, Batch(images, labels), None, Moment(0, 2)).backward()
    learning = {name for name, p in nets["model"].named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert not any(name.startswith("cnn") or "vision_encoder" in name for name in learning)
    for part in ("features", "positions", "project", "fusion", "text", "segmenter.tokens", "segmenter.heads"):
        assert any(name.startswith(part) for name in learning), part


@pytest.mark.component("variational attention fusion")
class TestFusion:
    def test_at_first_nine_parts_are_the_transformers(self):
        fusion = VariationalFusion(8).eval()
        vit, cnn = torch.randn(2, 8, 3, 3), torch.randn(2, 8, 3, 3)
        fused, kl = fusion(vit, cnn)
        torch.testing.assert_close(fused, 0.9 * vit + 0.1 * cnn)
        assert kl.item() == pytest.approx(0, abs=1e-6)

    def test_weights_are_sampled_while_learning_alone(self):
        fusion = VariationalFusion(4).train()
        vit, cnn = torch.ones(4000, 4, 1, 1), torch.zeros(4000, 4, 1, 1)
        fused, _ = fusion(vit, cnn)  # the transformer's weight itself
        logits = torch.logit(fused.double().clamp(1e-6, 1 - 1e-6)).flatten()
        assert logits.mean().item() == pytest.approx(torch.logit(torch.tensor(0.9)).item(), abs=0.05)
        assert logits.std().item() == pytest.approx(2**0.5, abs=0.05)  # of the difference of two unit Gaussians
        assert fusion.eval()(vit, cnn)[0].std() < 1e-6

    def test_they_are_read_from_both_branches(self):
        fusion = VariationalFusion(4).eval()
        nn.init.normal_(fusion.infer[2].weight)
        vit, cnn = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
        share = lambda vit, cnn: fusion(vit, cnn)[1]  # noqa: E731
        assert share(vit, cnn) != share(vit + 1, cnn) and share(vit, cnn) != share(vit, cnn + 1)

    def test_divergence_is_that_of_gaussians(self):
        shift, log_spread = torch.randn(2, 5, 7)
        prior = torch.randn(5, 7)
        wanted = kl_divergence(Normal(prior + shift, log_spread.exp()), Normal(prior, 1.0)).mean()
        torch.testing.assert_close(divergence(shift, log_spread), wanted)

    def test_divergence_is_part_of_the_loss(self, images):
        nets = CCSamMethod().build(1, 3, 2)
        nn.init.normal_(nets["model"].fusion.infer[2].bias)
        batch = Batch(images, (images[:, 0] > 0).byte())
        nets["model"].eval()
        losses = [CCSamMethod(beta=b).training_step(nets, batch, None, Moment(0, 2)) for b in (0.0, 2.0)]
        torch.testing.assert_close(losses[1] - losses[0], 2 * nets["model"].answer(images)[1], atol=1e-4, rtol=1e-3)


@pytest.mark.component("feature and position adapters")
def test_adapters_start_as_the_identity_and_are_in_the_encoder(model, images):
    tokens = torch.randn(1, 10, 10, 192)
    features, positions = FeatureAdapter(192), PositionAdapter(192)
    assert torch.equal(features(tokens), tokens) and torch.equal(positions(tokens), tokens)
    fitted = adapting.fitted_in(images)
    plain = model.embed(fitted).coarse
    torch.testing.assert_close(plain, model.segmenter.embed(fitted).coarse, atol=1e-4, rtol=1e-4)
    nn.init.normal_(model.features[3].up.weight)
    adapted = model.embed(fitted).coarse
    nn.init.normal_(model.positions.conv.bias)
    assert not torch.allclose(adapted, plain) and not torch.allclose(model.embed(fitted).coarse, adapted)
    nn.init.dirac_(positions.conv.weight, groups=192)
    torch.testing.assert_close(positions(tokens), 2 * tokens)


@pytest.mark.component("text description prompts")
def test_words_are_tokens_of_the_prompt(model, images):
    text = TextPrompt("a faint and a dark shape", 16)
    assert text().shape == (1, 6, 16)
    torch.testing.assert_close(text()[0, 0], text()[0, 3])  # the same word
    assert not torch.allclose(text()[0, 0], text()[0, 1])
    before = model(images)
    model.text.embedding.weight.data += 3 * torch.randn_like(model.text.embedding.weight)
    assert not torch.allclose(model(images), before)
