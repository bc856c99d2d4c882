"""H-SAM: the first decoder, what its masks do to the second, and the finer pixels at the end."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import nn

from medcook.methods import Batch, Moment
from medcook.recipes.sam_adaptation import h_sam
from medcook.recipes.sam_adaptation.h_sam import Hierarchy, HSam, MaskGuidedAttention, balanced_noise, steering
from medcook.sam import adapting
from medcook.sam.adapting import Segmenter, fitted_in
from medcook.sam.model import FINE, SmallSam, small_config


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A model of one block with random weights."""
    torch.manual_seed(0)
    monkeypatch.setattr(adapting, "start", lambda pretrained=True: SmallSam(small_config(depth=1)))


@pytest.fixture
def model() -> Hierarchy:
    return HSam().build(1, 3, 2)["model"].eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 1, 40, 48)


@pytest.mark.component("prior mask of SAM's decoder")
def test_the_first_decoder_is_the_segmenter(model, images):
    """And the second one, without guidance, starts as its copy: only the refiner, zero at first, is another."""
    assert torch.allclose(model.both(images)[0], model.first(images), atol=1e-4)
    model.guided = False
    first, second = model.both(images)
    assert torch.allclose(first, second, atol=1e-4)


@pytest.mark.component("learnable mask cross-attention")
class TestSteering:
    def test_it_is_the_log_of_the_prior_by_class(self):
        logits = torch.randn(2, 3, 40, 40)
        prior = softmax(logits.numpy(), axis=1).reshape(2, 3, 10, 4, 10, 4).mean((3, 5)).reshape(2, 3, 100)
        wanted = np.array([1, 0, 2])[:, None] * np.log(0.05 + prior)
        assert np.allclose(steering(logits, torch.tensor([1.0, 0.0, 2.0]), 10).numpy(), wanted, atol=1e-5)

    def test_a_token_looks_where_its_prior_is(self, model):
        """What a token takes up from the image is, with a sharp prior, what lies in its own place."""
        image, sparse = torch.randn(1, 160, 10, 10), torch.zeros(1, 1, 2, 160)
        steer = torch.zeros(1, 3, 100)
        steer[:, 1], steer[:, 1, 42] = -1e4, 0.0
        other = image.clone()
        other[..., 0, 0] += 5.0  # not where token 1 looks, in the layers that are steered
        seen = []
        layer = model.transformer.layers[0].cross_attn_token_to_image
        layer.register_forward_hook(lambda module, given, out: seen.append(out[0][0, 0, 1:]))
        for each in (image, other):
            h_sam.decode(model.first, model.transformer, each, model.tokens, sparse, steer)
        changed = (seen[0] - seen[1]).abs().amax(1)
        assert changed[1] < 1e-5 and changed[0] > 1e-4 and changed[2] > 1e-4

    def test_the_second_decoder_is_steered_and_the_first_is_not(self, model, images, monkeypatch):
        plain, steer = model.both(images), 10 * torch.randn(1, 3, 100)
        monkeypatch.setattr(h_sam, "steering", lambda logits, strength, side: steer)
        changed = model.both(images)
        assert torch.equal(plain[0], changed[0]) and not torch.equal(plain[1], changed[1])


@pytest.mark.component("class-balanced mask-guided self-attention")
class TestGate:
    def test_noise_is_stronger_where_the_class_is_rare(self):
        labels = torch.zeros(1, 20, 20, dtype=torch.uint8)
        labels[:, :4, :4], labels[:, 10:, :] = 2, 1  # 16, 200 and 184 pixels
        strength = balanced_noise(labels, 4, 10).view(10, 10)
        assert strength[0, 0].item() == pytest.approx(1 - 16 / 200)
        assert strength[9, 9].item() == 0 and strength[4, 4].item() == pytest.approx(1 - 184 / 200)

    def test_classes_attend_to_one_another(self):
        gate = MaskGuidedAttention(3, 100)
        maps = torch.randn(2, 3, 100)
        other = maps.clone()
        other[:, 2] = torch.randn(2, 100)
        gate.select.weight.data = torch.tensor([[1.0, 0.0, 0.0]])  # reads the first class alone
        found = gate(maps)
        assert found.shape == (2, 1, 100) and found.min() > 0 and found.max() < 1
        assert (found - gate(other)).abs().max() > 1e-3

    def test_it_enhances_the_embedding_of_the_second_decoder(self, model, images, monkeypatch):
        plain = model.both(images)
        monkeypatch.setattr(model.gate, "forward", lambda maps: torch.ones(len(maps), 1, 100))
        changed = model.both(images)
        assert torch.equal(plain[0], changed[0]) and (plain[1] - changed[1]).abs().max() > 1e-4

    def test_noise_comes_with_labels_and_changes_the_second_decoder(self, model, images):
        labels = torch.zeros(2, 40, 48, dtype=torch.uint8)
        labels[:, 5:20, 5:20] = 1
        plain, noisy = model.both(images), model.both(images, labels)
        assert torch.equal(plain[0], noisy[0]) and (plain[1] - noisy[1]).abs().max() > 0


@pytest.mark.component("hierarchical pixel decoder")
def test_it_goes_to_the_finer_grid_with_the_features_of_both(model):
    model.pixels[-1].weight.data.normal_()
    mine, theirs, fine = torch.randn(1, 20, 40, 40), torch.randn(1, 20, 40, 40), torch.randn(1, 16, FINE, FINE)
    found = model.pixel_decoder(mine, theirs, fine)
    assert found.shape == (1, 20, FINE, FINE)
    for other in ((mine + 1, theirs, fine), (mine, theirs + 1, fine), (mine, theirs, fine + 1)):
        assert (model.pixel_decoder(*other) - found).abs().max() > 1e-3


@pytest.mark.component("LoRA encoder")
def test_both_decoders_and_lora_learn_and_the_encoder_stays():
    method = HSam()
    nets = method.build(1, 3, 2)
    batch = Batch(torch.randn(2, 1, 32, 32), torch.randint(0, 3, (2, 32, 32)).byte())
    method.training_step(nets, batch, None, Moment(0, 10)).backward()
    named = dict(nets["model"].named_parameters())
    encoder = {name: p for name, p in named.items() if "vision_encoder" in name}
    assert all(("lora_" in name) == p.requires_grad for name, p in encoder.items())
    for name in ("tokens", "strength", "transformer.layers.0.mlp.lin1.weight", "first.tokens"):
        assert named[name].grad.abs().max() > 0
    one = HSam(second=False).build(1, 3, 2)["model"]
    assert isinstance(one, Segmenter) and isinstance(nets["model"].heads, nn.ModuleList)
    assert one(fitted_in(batch.images)).shape == (2, 3, 160, 160)
