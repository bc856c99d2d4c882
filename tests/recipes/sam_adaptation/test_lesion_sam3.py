"""The study on SAM 3: what each kind of prompt gives to the decoder, and how a prior travels through a volume."""

import pytest
import torch

from medcook.data import IGNORE
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.recipes.sam_adaptation import _concepts as concepts
from medcook.recipes.sam_adaptation import lesion_sam3
from medcook.recipes.sam_adaptation.lesion_sam3 import LesionSam, beside, outwards, recipe
from medcook.sam import adapting
from medcook.sam.model import DENSE, SIZE, Embedding, SmallSam


@pytest.fixture(autouse=True)
def random_weights(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(adapting, "start", lambda pretrained=True: SmallSam())


@pytest.fixture
def heard(monkeypatch) -> list[dict]:
    """What the decoder is given at each question of a volume; every answer is empty."""
    found = []

    def listening(model, embedding, values, shape, **given):
        found.append({"values": values, **given})
        return torch.full((len(values), *shape), -1.0)

    monkeypatch.setattr(lesion_sam3, "given_logits", listening)
    return found


def asked_volume(method: LesionSam) -> torch.Tensor:
    embedding = Embedding(*(torch.zeros(5, 1, 2, 2) for _ in range(4)))
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(5, 1)
    boxes[0] = torch.nan
    return method.volume(None, embedding, 2, (16, 16), boxes, torch.ones(160))


def batch() -> Batch:
    labels = torch.zeros(2, 64, 64, dtype=torch.uint8)
    labels[:, 10:30, 10:30], labels[:, 35:55, 20:50] = 1, 2
    images = labels[:, None] + 0.1 * torch.randn(2, 1, 64, 64)
    return Batch(images, labels, raters=torch.stack([labels, torch.full_like(labels, IGNORE)], dim=1))


@pytest.mark.component("boxes")
def test_boxes_are_given_where_there_is_something_to_box(heard):
    found = asked_volume(LesionSam(asked="box"))
    assert len(heard) == 1 and heard[0]["boxes"].shape == (4, 4) and not heard[0]["concept"]
    assert found.shape == (5, 16, 16)


@pytest.mark.component("image prompts")
class TestExemplars:
    def test_a_mark_is_the_mean_inside_the_mask(self):
        embedding = Embedding(torch.randn(2, 6, 10, 10), *(torch.zeros(2),) * 3)
        masks = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
        masks[:, 32:64, 16:80] = True
        wanted = embedding.coarse[:, :, 2:4, 1:5].mean((2, 3))
        assert torch.allclose(concepts.pooled(embedding, masks), wanted, atol=1e-5)

    def test_they_come_from_another_image_where_there_is_one(self):
        masks = torch.ones(4, 2, 2, dtype=torch.bool)
        masks[3] = False
        asked = concepts.Asked(masks, torch.tensor([1, 2, 1, 3]), torch.tensor([0, 0, 1, 1]), torch.zeros(4, 1, 1))
        assert concepts.donor_of(asked).tolist() == [2, 1, 0, -1]

    def test_they_are_all_that_is_given(self, heard):
        asked_volume(LesionSam(asked="exemplar"))
        assert torch.equal(heard[0]["marks"], torch.ones(5, 160)) and not heard[0]["concept"]

    def test_their_projection_learns(self):
        method = LesionSam(kinds=("exemplar",))
        nets = method.build(1, 3, 2)
        method.training_step(nets, batch(), None, Moment(0, 1)).backward()
        assert nets["model"].exemplars.weight.grad.abs().max() > 0


@pytest.mark.component("adjacent-slice predictions")
class TestPriors:
    def test_neighbours_are_of_the_same_case(self):
        labels = torch.arange(5, dtype=torch.uint8)[:, None, None].expand(5, 2, 2)
        case_of = torch.tensor([0, 0, 0, 1, 1])
        assert beside(labels, case_of, 1)[:, 0, 0].tolist() == [IGNORE, 0, 1, IGNORE, 3]
        assert beside(labels, case_of, -1)[:, 0, 0].tolist() == [1, 2, IGNORE, 4, IGNORE]

    def test_a_prior_says_where_the_neighbour_shows_the_structure(self):
        neighbour = torch.zeros(64, 64, dtype=torch.uint8)
        neighbour[:32], neighbour[32:] = 1, 2
        found = concepts.prior_of(neighbour, 2)
        assert found.shape == (DENSE, DENSE) and (found[:19] == -1).all() and (found[21:] == 1).all()
        neighbour[0] = IGNORE
        assert not concepts.prior_of(neighbour, 2).any()

    def test_they_are_given_as_the_mask_prompt(self, monkeypatch):
        asked, prompted = [], SmallSam.prompted
        spy = lambda self, e, prompts: asked.append(prompts.dense) or prompted(self, e, prompts)  # noqa: E731
        monkeypatch.setattr(SmallSam, "prompted", spy)
        for kind in ("concept+prior", "concept"):
            method = LesionSam(kinds=(kind,))
            method.training_step(method.build(1, 3, 2), batch(), None, Moment(0, 1))
        assert asked[0][:, 0].any() and not asked[1][:, 0].any()

    def test_every_answer_is_the_prior_of_the_next_from_the_middle_outwards(self):
        order = []

        def ask(rows, prior):
            order.append((rows.item(), prior.mean().item()))
            return torch.full((1, 8, 8), 1.0 if rows.item() > 2 else -1.0)

        alone = torch.zeros(5, 8, 8, dtype=torch.bool)
        alone[2] = True
        found = outwards(alone, ask)
        assert order == [(3, 1.0), (4, 1.0), (1, 1.0), (0, -1.0)]
        assert found.flatten(1).all(1).tolist() == [False, False, True, True, True]

    def test_only_the_arm_with_neighbours_asks_again(self, heard):
        asked_volume(recipe.arms["name and neighbour"].method)
        assert [len(each["values"]) for each in heard] == [5, 1, 1, 1, 1]
        heard.clear()
        asked_volume(recipe.arms["name, not the neighbour"].method)
        assert len(heard) == 1 and heard[0]["priors"] is None


@pytest.mark.component("decoder, adapter and full tuning")
@pytest.mark.parametrize("arm, own, added", [("name, decoder", 0, 0), ("name, adapters", 0, 1), ("name, full", 1, 0)])
def test_tuning_reaches_what_it_says(arm, own, added):
    encoder = recipe.arms[arm].method.build(1, 3, 2)["model"].sam.vision_encoder
    layer = encoder.layers[0]
    assert layer.attn.qkv.weight.requires_grad == bool(own)
    assert isinstance(layer.mlp, torch.nn.Sequential) == bool(added)
    assert not added or layer.mlp[0].scale.requires_grad


def test_an_unknown_kind_of_prompt_is_named():
    with pytest.raises(MedcookError, match="prompt with 'scent'"):
        LesionSam(kinds=("concept+scent",)).build(1, 3, 2)
