"""DVPT: what the prompts find in a sample, and how it comes back to the tokens."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import nn

from medcook.recipes.sam_adaptation.dvpt import Dvpt, DynamicPrompts
from medcook.sam import adapting
from medcook.sam.model import SIZE, SmallSam, small_config


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A model of three blocks with random weights."""
    torch.manual_seed(0)
    monkeypatch.setattr(adapting, "start", lambda pretrained=True: SmallSam(small_config(depth=3)))


@pytest.fixture
def beside() -> DynamicPrompts:
    module = DynamicPrompts(12, bottleneck=6, prompts=3)
    module.up.weight.data.normal_()
    return module


def by_hand(module: DynamicPrompts, tokens: torch.Tensor, dynamic: bool = True) -> np.ndarray:
    """The equations of one sample, in numpy."""
    seen = nn.functional.gelu(module.down(tokens)).detach().numpy().reshape(-1, 6)
    prompts = module.prompts.detach().numpy()
    if dynamic:
        prompts = softmax(prompts @ seen.T / np.sqrt(6), axis=1) @ seen
    given = softmax(seen @ prompts.T / np.sqrt(6), axis=1) @ prompts
    added = (seen + given) @ module.up.weight.detach().numpy().T + module.up.bias.detach().numpy()
    return added.reshape(*tokens.shape[:2], -1)


@pytest.mark.component("dynamic prompts")
class TestPrompts:
    def test_they_are_what_the_queries_find_in_the_sample(self, beside):
        tokens = torch.randn(2, 4, 5, 12)
        found = beside(tokens).detach().numpy()
        for mine, sample in zip(found, tokens, strict=True):
            assert np.allclose(mine, by_hand(beside, sample), atol=1e-5)

    def test_static_ones_do_not_look(self, beside):
        beside.dynamic = False
        tokens = torch.randn(2, 4, 5, 12)
        assert np.allclose(beside(tokens)[1].detach().numpy(), by_hand(beside, tokens[1], dynamic=False), atol=1e-5)

    @pytest.mark.parametrize("dynamic", [True, False])
    def test_what_a_token_is_given_depends_on_the_rest_of_the_sample_only_if_dynamic(self, beside, dynamic):
        beside.dynamic = dynamic
        tokens = torch.randn(1, 4, 5, 12)
        other = tokens.clone()
        other[:, 2:] += 1
        assert torch.allclose(beside(tokens)[:, 0], beside(other)[:, 0], atol=1e-6) != dynamic


@pytest.mark.component("bottleneck")
def test_it_costs_a_third_of_a_percent_and_the_frozen_encoder_learns_nothing(monkeypatch):
    monkeypatch.setattr(adapting, "start", lambda pretrained=True: SmallSam())
    model = Dvpt().build(1, 4, 2)["model"]
    learning = {name: p.numel() for name, p in model.sam.sam.vision_encoder.named_parameters() if p.requires_grad}
    assert sum(learning.values()) == 25344 and all(".beside." in name for name in learning)
    assert 0.003 < 25344 / sum(p.numel() for p in model.parameters()) < 0.004


@pytest.mark.component("projection and aggregation")
class TestAggregation:
    def test_it_starts_as_the_frozen_encoder(self):
        torch.manual_seed(1)
        plain = adapting.AdaptedSam().build(1, 3, 2)["model"].sam
        torch.manual_seed(1)
        adapted = Dvpt().build(1, 3, 2)["model"].sam
        images = torch.randn(2, 1, SIZE, SIZE)
        assert torch.allclose(plain.embed(images).coarse, adapted.embed(images).coarse, atol=1e-5)

    def test_it_is_added_to_what_the_layer_says(self):
        layer = Dvpt().build(1, 3, 2)["model"].sam.sam.vision_encoder.layers[0]
        layer.beside.up.weight.data.normal_()
        tokens = torch.randn(1, 10, 10, 192)
        added = layer(tokens) - layer.layer(tokens)
        assert torch.allclose(added, layer.beside(tokens), atol=1e-4) and added.abs().max() > 0.1


@pytest.mark.component("sharing between layers")
@pytest.mark.parametrize("shared", [True, False])
def test_layers_share_a_module(shared):
    nets = Dvpt(shared=shared).build(1, 3, 2)
    for net in (nets["model"], nets["average"]):
        modules = {id(layer.beside) for layer in net.sam.sam.vision_encoder.layers}
        assert len(modules) == (1 if shared else 3)
