"""ESP-MedSAM: a light student, what the teacher judges and what not, patches that become a prompt."""

import pytest
import torch
from torch import nn

from medcook.methods import Batch, Moment
from medcook.networks import parameters
from medcook.recipes.sam_adaptation.esp_medsam import EspMedSam, Inverted, SelfPrompts, TinyBlock, shares_of
from medcook.sam import adapting
from medcook.sam.adapting import AdaptedSam, Segmenter
from medcook.sam.model import SIZE, SmallSam

NOW = Moment(0, 2)


@pytest.fixture(autouse=True)
def random_weights(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(adapting, "start", lambda pretrained=True: SmallSam())


@pytest.fixture
def nets() -> nn.ModuleDict:
    return EspMedSam().build(1, 3, 2)


@pytest.fixture
def batch() -> Batch:
    labels = torch.zeros(2, 64, 64, dtype=torch.uint8)
    labels[0, :32, :32], labels[1, 20:40] = 1, 2
    return Batch(torch.randn(2, 1, 64, 64) + labels[:, None], labels)


def student_of(nets):
    return nets["model"].segmenter.sam.sam.vision_encoder


@pytest.mark.component("lightweight encoder")
def test_it_is_lighter_and_fits_in_the_encoders_place(nets):
    whole = AdaptedSam(tuned=("encoder", "prompts", "decoder")).build(1, 3, 2)
    assert parameters(nets) < 0.5 * parameters(whole)
    images = torch.randn(1, 1, SIZE, SIZE)
    embedding = nets["model"].segmenter.sam.embed(images)
    assert [part.shape[-1] for part in embedding] == [10, 20, 40, 80]
    torch.testing.assert_close(embedding.coarse, student_of(nets)(images).last_hidden_state)


@pytest.mark.component("lightweight encoder")
def test_its_stem_starts_as_the_teachers():
    model = Segmenter(SmallSam(), 3)
    teacher = model.sam.sam.vision_encoder
    images = torch.randn(1, 1, SIZE, SIZE)
    first = EspMedSam().adapt(model).segmenter.sam.sam.vision_encoder.patch_embed
    teacher.patch_embed(images), first(images)
    torch.testing.assert_close(first.finer[0], teacher.patch_embed.finer[0])
    x = torch.randn(1, 8, 4, 4)
    block = Inverted(8)
    torch.testing.assert_close(block(x) - x, block.layers(x))


@pytest.mark.component("lightweight encoder")
def test_attention_is_that_of_torch():
    block = TinyBlock(12, heads=3).eval()
    reference = nn.MultiheadAttention(12, 3, batch_first=True)
    reference.in_proj_weight.data, reference.in_proj_bias.data = block.qkv.weight.data, block.qkv.bias.data
    reference.out_proj.load_state_dict(block.project.state_dict())
    x = torch.randn(2, 4, 4, 12)
    tokens = x.flatten(1, 2)
    torch.testing.assert_close(block.attend(x, None).flatten(1, 2), reference(tokens, tokens, tokens)[0])


@pytest.mark.component("modality controller")
def test_the_controller_adds_a_token_and_an_mlp(nets):
    student = student_of(nets)
    tokens = torch.randn(1, 10, 10, 192)
    plain = student.embed(tokens, controlled=False)
    student.control.token.data.zero_()
    attended, alone = student.block.attend(tokens, student.control), student.block.attend(tokens, None)
    assert not torch.allclose(attended, alone)  # a key of zeros takes a share of the attention
    nn.init.normal_(student.control.mlp[2].weight)
    assert (student.embed(tokens) - plain).abs().max() > 0.1
    torch.testing.assert_close(student.embed(tokens, controlled=False), plain)


@pytest.mark.component("multi-modal decoupled knowledge distillation")
def test_the_teacher_judges_what_is_common(nets, batch, monkeypatch):
    """A teacher that agrees costs nothing; the controller does not learn from it, and the teacher not at all."""
    common = nets["model"].answer(batch.images)[2]
    assert common.shape == (2, 160, 10, 10)

    def loss(distilling: float) -> torch.Tensor:
        return EspMedSam(distilling=distilling).training_step(nets, batch, None, NOW)

    taught = nets["teacher"](adapting.fitted_in(batch.images)).last_hidden_state
    wanted = ((common - taught) ** 2).mean()
    torch.testing.assert_close(loss(2.0) - loss(0.0), 2 * wanted, atol=1e-3, rtol=1e-3)
    wanted.backward()
    assert all(p.grad is None for p in (*student_of(nets).control.parameters(), *nets["teacher"].parameters()))
    assert student_of(nets).block.qkv.weight.grad.abs().max() > 0


@pytest.mark.component("self-patch prompt generator")
def test_patches_are_decided_and_drawn():
    prompts = SelfPrompts(16, 2)
    coarse = torch.randn(1, 16, 10, 10, requires_grad=True)
    logits, prompt = prompts(coarse)
    torch.testing.assert_close(prompt, prompts.dense((logits > 0).float()))
    prompt.sum().backward()
    assert coarse.grad is None and prompts.patches[0].weight.grad is None
    assert prompts.dense[0].weight.grad.abs().max() > 0


@pytest.mark.component("self-patch prompt generator")
def test_the_prompt_reaches_the_decoder(nets, batch):
    before = nets["model"](batch.images)
    nets["model"].prompter.dense[1].bias.data += 3 * torch.randn(160)
    assert (nets["model"](batch.images) - before).abs().max() > 1e-3
    assert EspMedSam(prompting=0.0).build(1, 3, 2)["model"].answer(batch.images)[1] is None


@pytest.mark.component("self-patch prompt generator")
def test_patches_learn_each_structures_share(nets, batch):
    shares = shares_of(batch.labels, 2)
    assert shares.shape == (2, 2, 10, 10) and shares[0, 0, :5, :5].min() == 1 and shares[0, 0].mean() == 0.25
    torch.testing.assert_close(shares[1, 1].mean(), torch.tensor(20 / 64), atol=0.005, rtol=0)
    wide = torch.zeros(1, 20, 40, dtype=torch.uint8)
    wide[:, :, 20:] = 1
    assert shares_of(wide, 1)[0, 0, :5, 5:].min() == 1 and shares_of(wide, 1)[0, 0, 5:].max() == 0
    EspMedSam(distilling=0.0).training_step(nets, batch, None, NOW).backward()
    assert nets["model"].prompter.patches[0].weight.grad.abs().max() > 0
    with torch.no_grad():
        logits = nets["model"].answer(batch.images)[1]
        parts = [EspMedSam(distilling=0.0, prompting=w).training_step(nets, batch, None, NOW) for w in (3.0, 1.0)]
    entropy = nn.BCEWithLogitsLoss()(logits, shares)
    torch.testing.assert_close(parts[0] - parts[1], 2 * entropy, atol=1e-3, rtol=1e-3)


@pytest.mark.component("query-decoupled modality decoder")
def test_each_structure_has_a_query_and_a_head(nets, batch):
    segmenter = nets["model"].segmenter
    assert len(segmenter.tokens) == len(segmenter.heads) == 3
    before = nets["model"](batch.images)
    segmenter.heads[1].proj_out.weight.data.zero_()
    segmenter.heads[1].proj_out.bias.data.zero_()
    after = nets["model"](batch.images)
    torch.testing.assert_close(after[:, 0], before[:, 0])
    assert not torch.allclose(after[:, 1], before[:, 1])
