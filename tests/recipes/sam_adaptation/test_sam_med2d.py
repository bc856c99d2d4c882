"""SAM-Med2D: what an adapter does to tokens, what learns, which prompts are asked and corrected."""

import numpy as np
import pytest
import torch
from torch import nn

from medcook.methods import Batch, Moment
from medcook.recipes.sam_adaptation.sam_med2d import FASTER, Adapter, SamMed2D, adapted, recipe
from medcook.sam import adapting
from medcook.sam.model import PADDING, SIZE, SmallSam


@pytest.fixture(autouse=True)
def random_weights(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(adapting, "start", lambda pretrained=True: SmallSam())


def batch() -> Batch:
    labels = torch.zeros(2, 64, 64, dtype=torch.uint8)
    labels[:, 10:30, 10:30], labels[:, 35:55, 20:50] = 1, 2
    return Batch(labels[:, None] + 0.1 * torch.randn(2, 1, 64, 64), labels)


@pytest.fixture
def asked(monkeypatch) -> list:
    """Every prompt that the decoder is asked."""
    found, decode = [], SmallSam.decode

    def listening(self, embedding, prompts):
        found.append(prompts)
        return decode(self, embedding, prompts)

    monkeypatch.setattr(SmallSam, "decode", listening)
    return found


@pytest.mark.component("adapter layers")
class TestAdapter:
    def test_it_starts_as_the_identity(self):
        images = torch.randn(1, 1, SIZE, SIZE)
        model = SmallSam().eval()
        before = model.embed(images).coarse
        assert torch.allclose(adapted(model).embed(images).coarse, before, atol=1e-6)

    def test_every_block_has_one(self):
        model = adapted(SmallSam())
        blocks = model.sam.vision_encoder.layers
        assert all(sum(isinstance(part, Adapter) for part in block.modules()) == 1 for block in blocks)

    def test_channels_are_reweighted_by_squeeze_and_excitation(self):
        adapter, maps = Adapter(8), torch.randn(2, 8, 10, 10)
        mean = maps.numpy().mean((2, 3))
        first, second = (adapter.channel[k].weight.detach().numpy() for k in (0, 2))
        weight = 1 / (1 + np.exp(-(np.maximum(mean @ first.T, 0) @ second.T)))
        wanted = maps.numpy() * weight[:, :, None, None]
        assert np.allclose(adapter.reweighted(maps).detach().numpy(), wanted, atol=1e-6)

    def test_a_token_hears_its_neighbours_and_no_far_one(self):
        """Down by 3 and up by 4 pixels, both of stride 2: a token reaches 3 tokens, and is heard beside itself."""
        adapter = Adapter(4)
        nn.init.ones_(adapter.scale)
        nn.init.ones_(adapter.down.weight)
        nn.init.ones_(adapter.up.weight)
        maps = torch.zeros(1, 4, 10, 10)
        maps[..., 4, 4] = 1.0
        heard = adapter.mixed(maps)[0, 0] > 0
        rows, columns = heard.nonzero().unbind(1)
        assert heard[4, 5] and heard[5, 4]
        assert max((rows - 4).abs().max(), (columns - 4).abs().max()) <= 3

    def test_both_halves_and_the_skip_make_the_answer(self):
        adapter, tokens = Adapter(8), torch.randn(2, 10, 10, 8)
        nn.init.constant_(adapter.scale, 1 / FASTER)
        maps = tokens.permute(0, 3, 1, 2)
        wanted = maps + adapter.mixed(adapter.reweighted(maps))
        assert torch.allclose(adapter(tokens), wanted.permute(0, 2, 3, 1), atol=1e-6)

    def test_adapters_learn_while_the_encoder_stays(self):
        nets = SamMed2D(rounds=1).build(1, 3, 2)
        SamMed2D(rounds=1).training_step(nets, batch(), None, Moment(0, 1)).backward()
        layer = nets["model"].sam.vision_encoder.layers[0]
        assert layer.mlp[0].scale.grad.abs().max() > 0
        assert all(p.grad is None for p in [*layer.attn.parameters(), *layer.mlp[1].parameters()])


@pytest.mark.component("fine-tuned prompt encoder and decoder")
def test_prompt_encoder_and_decoder_learn_as_a_whole():
    model = SamMed2D().build(1, 3, 2)["model"]
    parts = (model.sam.mask_decoder, model.sam.prompt_encoder.mask_embed, model.sam.prompt_encoder.point_embed)
    assert all(p.requires_grad for part in parts for p in part.parameters())
    without = SamMed2D(adapters=False).build(1, 3, 2)["model"]
    assert not any(p.requires_grad for p in without.sam.vision_encoder.parameters())


@pytest.mark.component("points, boxes and masks as prompts")
def test_every_kind_of_prompt_is_asked(asked):
    method = SamMed2D(rounds=2)
    masks = torch.zeros(64, SIZE, SIZE, dtype=torch.bool)
    masks[:, 40:90, 50:100] = True
    prompts, single = method.ask(masks)
    boxed, clicked = ~prompts.boxes.isnan().any(1), (prompts.labels == 1).any(1)
    assert (boxed & ~clicked).any() and (clicked & ~boxed).any() and (boxed & clicked).any() and single.any()
    method.training_step(method.build(1, 3, 2), batch(), None, Moment(0, 1))
    assert not asked[0].dense[:, 0].any() and asked[1].dense[:, 0].any()  # the first answer is the second's mask prompt


@pytest.mark.component("iterative correction")
def test_each_round_adds_a_click_on_what_is_wrong(asked):
    method = SamMed2D()
    method.training_step(method.build(1, 3, 2), batch(), None, Moment(0, 1))
    clicks = [(prompts.labels != PADDING).sum(1) for prompts in asked]
    assert [len(each) for each in clicks] == [4, 2], "half of the answers are corrected"
    assert set((clicks[1] - 1).tolist()) <= set(clicks[0].tolist())


def test_zero_shot_learns_nothing():
    method = recipe.arms["zero-shot"].method
    nets = method.build(1, 3, 2)
    before = {name: tensor.clone() for name, tensor in nets.state_dict().items()}
    optimiser, _ = method.optimise([p for p in nets.parameters() if p.requires_grad], 10)
    for _ in range(3):
        method.training_step(nets, batch(), None, Moment(0, 10)).backward()
        optimiser.step()
    after = nets.state_dict()
    assert all(torch.allclose(after[name], before[name], atol=1e-9) for name in before)
