"""Med-PerSAM: a net that bends images, prompts from the bent mask, rounds of asking."""

import numpy as np
import pytest
import torch

from medcook.few_shot import Shots
from medcook.methods import Batch, Moment
from medcook.recipes.few_shot.med_persam import (
    SIDE,
    MedPerSam,
    WarpNet,
    local_correlation,
    parts_of,
    prompt_of,
    roughness,
    small,
    warped,
)
from medcook.recipes.few_shot.med_persam import F as functional


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def squares(*left: int, side: int = 64) -> torch.Tensor:
    """(N, side, side) masks of a square of 16 pixels that starts at a column."""
    masks = torch.zeros(len(left), side, side)
    for mask, column in zip(masks, left, strict=True):
        mask[24:40, column : column + 16] = 1
    return masks


def shots(masks: torch.Tensor) -> Shots:
    return Shots(masks[:, None] + 0.0, torch.zeros(len(masks), 1, 2, 2), masks.to(torch.uint8))


class Fake:
    """A predictor that gives out fixed logits and remembers what it was asked."""

    def __init__(self, logits: np.ndarray):
        self.logits, self.prompts = logits[None], []

    def __call__(self, image, prompt):
        self.prompts.append(prompt)
        return self


class Shift(torch.nn.Module):
    """Stands for a trained warping net: every query place looks 16 pixels to the left."""

    def forward(self, reference, query):
        grid = functional.affine_grid(torch.eye(2, 3)[None], [1, 1, SIDE, SIDE], align_corners=False)
        grid = grid - torch.tensor([2 * 16 / SIDE, 0.0])
        return grid.expand(len(query), -1, -1, -1), None


@pytest.mark.component("lightweight warping model")
class TestWarping:
    def test_it_starts_as_no_warp(self):
        images = torch.randn(2, 1, SIDE, SIDE)
        grid, field = WarpNet()(images, images.flip(0))
        assert torch.allclose(warped(images, grid), images, atol=1e-4) and field.abs().max() == 0

    def test_it_is_light(self):
        assert sum(p.numel() for p in WarpNet().parameters()) < 1e5

    def test_correlation_is_that_of_numpy(self):
        a, b = torch.randn(1, 1, 17, 17), torch.randn(1, 1, 17, 17)
        wanted = np.corrcoef(a.flatten(), b.flatten())[0, 1]
        assert local_correlation(a, b).item() == pytest.approx(wanted, abs=0.01)
        assert local_correlation(a, 3 * a + 2).item() == pytest.approx(1, abs=0.01)

    def test_roughness_is_none_for_a_shift(self):
        assert roughness(torch.ones(1, 2, 8, 8)) == 0
        assert roughness(torch.arange(8.0).expand(1, 2, 8, 8)).item() == pytest.approx(1)

    def test_it_learns_to_bend_one_image_into_another(self):
        images = functional.avg_pool2d(squares(16, 24)[:, None], 5, 1, 2) + 0.01 * torch.randn(2, 1, 64, 64)
        method = MedPerSam(bends=0.1)
        nets = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"warp": WarpNet()})})
        optimiser = torch.optim.AdamW(nets.parameters(), lr=2e-3)
        batch = Batch(images, torch.zeros(2, 64, 64, dtype=torch.uint8))
        losses = []
        for _ in range(40):
            loss = method.training_step(nets, batch, None, Moment(0, 1))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]

    def test_the_mask_goes_where_the_image_goes(self):
        support, query = shots(squares(16)), shots(squares(32))
        net = {"warp": Shift()}
        found = MedPerSam(ask=False).segment(net, support, query)
        assert torch.allclose(found, squares(32), atol=1e-3)
        assert torch.equal(MedPerSam(ask=False, warp=False).segment(net, support, query), squares(16))

    def test_no_annotation_is_learned_from(self):
        method = MedPerSam()
        nets = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"warp": WarpNet()})})
        losses = []
        for value in (0, 1):
            torch.manual_seed(1)
            batch = Batch(squares(16, 24)[:, None], torch.full((2, 64, 64), value, dtype=torch.uint8))
            losses.append(method.training_step(nets, batch, None, Moment(0, 1)))
        assert losses[0] == losses[1]

    def test_images_are_scaled_one_by_one(self):
        found = small(torch.randn(3, 2, 80, 80) * 5 + 2)
        assert found.shape == (3, 1, SIDE, SIDE)
        assert torch.allclose(found.mean((1, 2, 3)), torch.zeros(3), atol=1e-5)


@pytest.mark.component("automated prompts")
class TestPrompts:
    def test_every_part_has_its_own(self):
        soft = np.zeros((40, 40), np.float32)
        soft[5:15, 5:15], soft[20:35, 20:35], soft[0, 39] = 0.9, 0.8, 1.0
        parts = parts_of(soft)
        assert sorted(part.sum() for part in parts) == [100, 225]  # the crumb is none

    def test_box_point_and_mask(self):
        soft = np.zeros((40, 40), np.float32)
        soft[5:14, 10:19], soft[30:38, 30:38] = 0.75, 1.0
        prompt = prompt_of(soft == 0.75, soft)
        assert prompt.box == (10, 5, 19, 14)
        assert prompt.foreground == ((14.5, 9.5),) and not prompt.background
        assert prompt.mask[8, 12] == pytest.approx(4) and prompt.mask[34, 34] == -8 and prompt.mask[0, 0] == -8


@pytest.mark.component("iterative refinement")
class TestRounds:
    prior = squares(16)[0].numpy()

    def test_answers_refine_the_prompts(self):
        answer = np.where(squares(28)[0].numpy() + self.prior > 0, 20.0, -20.0).astype(np.float32)
        fake = Fake(answer)
        MedPerSam(rounds=3, trust=0.6).refined(fake, None, self.prior)
        assert [prompt.box for prompt in fake.prompts] == [(16, 24, 32, 40), (16, 24, 44, 40), (16, 24, 44, 40)]

    def test_the_prior_keeps_its_say(self):
        fake = Fake(np.full((64, 64), 20.0, np.float32))
        MedPerSam(rounds=2, trust=0.4).refined(fake, None, self.prior)
        assert fake.prompts[1].box == (16, 24, 32, 40)

    def test_one_round_asks_once_and_gives_the_answer(self):
        fake = Fake(np.where(self.prior > 0, -20.0, 20.0).astype(np.float32))
        found = MedPerSam(rounds=1).refined(fake, None, self.prior)
        assert len(fake.prompts) == 1 and np.allclose(found, 1 - self.prior, atol=1e-6)

    def test_nothing_to_ask_for(self):
        fake = Fake(np.zeros((64, 64), np.float32))
        assert not MedPerSam().refined(fake, None, np.zeros((64, 64), np.float32)).any() and not fake.prompts


@pytest.mark.component("no training of SAM")
def test_sam_is_frozen_and_answers():
    nets = MedPerSam(pretrained=False).build(1, 2, 2)
    assert not any(p.requires_grad for p in nets["model"]["sam"].parameters())
    assert all(p.requires_grad for p in nets["model"]["warp"].parameters())
    support = shots(squares(16))
    found = MedPerSam(rounds=1).segment(nets["average"].eval(), support, support)
    assert found.shape == (1, 64, 64) and not torch.equal(found[0], squares(16)[0])
