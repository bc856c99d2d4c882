"""CoSAM: where a mask is wrong, what the corrected one asks, and the loop of both."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from medcook.methods import Batch, Moment
from medcook.recipes.sam_adaptation import cosam
from medcook.recipes.sam_adaptation.cosam import CoSam, SelfCorrecting, boxes_of, correct, prompts_of, spoilt
from medcook.sam import adapting
from medcook.sam.adapting import fitted_in
from medcook.sam.model import DENSE, PADDING, SIZE, SmallSam, small_config
from medcook.sam.prompts import box_of


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A model of one block with random weights."""
    torch.manual_seed(0)
    monkeypatch.setattr(adapting, "start", lambda pretrained=True: SmallSam(small_config(depth=1)))


@pytest.fixture
def model() -> SelfCorrecting:
    return CoSam().build(1, 3, 2)["model"].eval()


@pytest.fixture
def truth() -> torch.Tensor:
    """(2, 1, 40, 40): a rectangle, and nothing."""
    found = torch.zeros(2, 1, DENSE, DENSE)
    found[0, 0, 10:30, 5:20] = 1
    return found


@pytest.mark.component("prompt-free coarse masks")
def test_the_loop_starts_from_what_the_segmenter_says_without_prompts(model):
    images = torch.randn(2, 1, 32, 32)
    embedding = model.first.embed(fitted_in(images))
    mask = model.loop(embedding, model.first.masks(embedding))[0][0][0]
    wanted = model.first.masks(embedding).softmax(1)[:, 1:].reshape(4, 1, DENSE, 2, DENSE, 2).mean((3, 5))
    assert torch.allclose(mask, wanted, atol=1e-5)


@pytest.mark.component("generalized error decoder")
class TestErrors:
    def test_a_sure_error_turns_the_mask_over(self):
        mask, error = torch.tensor([0.9, 0.9, 0.2, 0.2]), torch.tensor([0.0, 1.0, 1.0, 0.5])
        assert torch.allclose(correct(mask, error), torch.tensor([0.9, 0.1, 0.8, 0.5]))

    def test_it_is_taught_where_the_mask_is_wrong(self):
        mask, truth, logits = torch.rand(2, 1, 5, 5), torch.rand(2, 1, 5, 5), torch.randn(2, 1, 5, 5)
        wrong = (mask > 0.5) != (truth > 0.5)
        wanted = log_loss(wrong.flatten().numpy(), logits.sigmoid().flatten().double().numpy())
        assert cosam.error_loss(mask, logits, truth).item() == pytest.approx(wanted, abs=1e-5)

    def test_true_masks_are_spoilt(self, truth):
        shares = [((spoilt(truth) > 0.5) != (truth > 0.5)).float().mean().item() for _ in range(20)]
        assert min(shares) > 0 and 0.02 < np.mean(shares) < 0.4 and len(set(shares)) == 20

    def test_it_sees_image_and_mask(self, model, truth):
        embedding = model.first.embed(torch.randn(2, 1, SIZE, SIZE))
        other = model.first.embed(torch.randn(2, 1, SIZE, SIZE))
        found = model.error(embedding, truth)
        assert found.shape == (2, 1, DENSE, DENSE)
        assert (model.error(other, truth) - found).abs().max() > 1e-3
        assert (model.error(embedding, 1 - truth) - found).abs().max() > 1e-3

    def test_it_learns_to_find_what_was_spoilt(self, truth):
        """A few steps on one image's mask, spoilt anew each time."""
        net = cosam.ErrorDecoder(hidden=8, width=8)
        sides = [torch.nn.functional.adaptive_avg_pool2d(truth[:1], size) for size in (10, 20, DENSE)]
        shown = [side.expand(-1, channels, -1, -1) for side, channels in zip(sides, (8, 2, 1), strict=True)]
        embedding = cosam.Embedding(*shown, torch.zeros(1, 16, 80, 80))
        optimiser = torch.optim.Adam(net.parameters(), 1e-2)
        losses = []
        for _ in range(60):
            mask = spoilt(truth[:1])
            losses.append(cosam.error_loss(mask, net(embedding, mask), truth[:1]))
            optimiser.zero_grad()
            losses[-1].backward()
            optimiser.step()
        assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.component("prompts from corrected masks")
class TestPrompts:
    def test_boxes_are_tight(self, truth):
        boxes = boxes_of(truth[:, 0] > 0.5)
        assert boxes[0].tolist() == [4 * edge for edge in box_of(truth[0, 0].numpy() > 0.5)]
        assert boxes[1].isnan().all()

    def test_points_lie_where_a_correction_is_surest_and_say_what_is_there(self, truth):
        error = torch.zeros_like(truth)
        error[:, 0, 20, 8], error[:, 0, 35, 30] = 0.9, 0.8  # one inside, one outside
        prompts = prompts_of(truth * 0.9 + 0.05, error)
        assert prompts.points[0, 0].tolist() == [34.0, 82.0] and prompts.labels[0, 0] == 1
        assert prompts.points[0, 2].tolist() == [122.0, 142.0] and prompts.labels[0, 2] == 0
        assert prompts.labels[1].tolist()[:2] == [PADDING] * 2, "nothing is inside an empty mask"
        assert prompts.dense[0, 2, 20, 8] > 0.5 and prompts.dense[0, 2, 35, 30] < -0.5

    def test_the_mask_is_given_as_logits(self, truth):
        mask = truth * 0.9 + 0.05
        wanted = np.log(mask[0, 0] / (1 - mask[0, 0])) / 8
        assert torch.allclose(prompts_of(mask, truth * 0).dense[0, 0], wanted, atol=1e-5)


@pytest.mark.component("self-correcting loop")
class TestLoop:
    def test_every_round_starts_from_the_last_answer(self, model):
        model.rounds = 3
        embedding = model.first.embed(torch.randn(2, 1, SIZE, SIZE))
        checked, answers = model.loop(embedding, model.first.masks(embedding))
        assert len(checked) == len(answers) == 3
        for answer, (mask, _) in zip(answers, checked[1:], strict=False):
            assert torch.allclose(mask, answer.sigmoid().view(4, 1, DENSE, 2, DENSE, 2).mean((3, 5)), atol=1e-5)

    def test_the_last_answer_is_what_is_handed_out(self, model):
        images = torch.randn(2, 1, SIZE, SIZE)
        embedding = model.first.embed(images)
        answer = model.loop(embedding, model.first.masks(embedding))[1][-1]
        logits = adapting.restore(answer.view(2, 2, 80, 80), (SIZE, SIZE))
        assert torch.allclose(model(images)[:, 1:], logits, atol=1e-4) and model(images)[:, 0].abs().max() == 0

    def test_what_prompts_is_the_corrected_mask(self, model, monkeypatch):
        embedding = model.first.embed(torch.randn(2, 1, SIZE, SIZE))
        asked = []
        original = cosam.prompts_of
        monkeypatch.setattr(cosam, "prompts_of", lambda mask, error: asked.append(mask) or original(mask, error))
        mask, wrong = model.loop(embedding, model.first.masks(embedding))[0][0]
        assert torch.allclose(asked[0], correct(mask, wrong.sigmoid()))
        model.errors = False
        asked.clear()
        assert torch.equal(model.loop(embedding, model.first.masks(embedding))[0][0][0], asked[0])

    def test_all_of_it_learns(self):
        method = CoSam()
        nets = method.build(1, 3, 2)
        batch = Batch(torch.randn(2, 1, 32, 32), torch.randint(0, 3, (2, 32, 32)).byte())
        method.training_step(nets, batch, None, Moment(0, 10)).backward()
        named = dict(nets["model"].named_parameters())
        for name in ("first.tokens", "error.coarse.0.weight", "first.sam.drawn.weight"):
            assert named[name].grad.abs().max() > 0
        assert all(p.grad is None for name, p in named.items() if "vision_encoder" in name)


def test_the_training_site_is_not_scored():
    fitted = SimpleNamespace(task=SimpleNamespace(keep=(("site", "a"),), structures={1: "lung"}))
    fitted.predict = lambda case: np.array([[1, 1, 0, 0]])
    case = lambda site: SimpleNamespace(  # noqa: E731
        attributes={"site": site}, label=np.array([[1, 0, 0, 0]]), case_id="c", patient_id="p"
    )
    assert cosam.external_rows(fitted, case("a")) == []
    assert cosam.external_rows(fitted, case("b"))[0]["dice"] == pytest.approx(2 / 3)
