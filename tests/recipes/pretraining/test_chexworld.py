"""CheXWorld: masks, crops and changed appearances against ramps, SciPy and closed forms; the loss against loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradients import assert_every_parameter_is_trained
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from medcook.methods import Batch, Moment
from medcook.recipes.pretraining._tokens import (
    MaskedAutoencoder,
    Predictor,
    TokenPretrained,
    crops,
    grid_places,
    sinusoids,
)
from medcook.recipes.pretraining.chexworld import (
    LEAST,
    UNCHANGED,
    CheXWorld,
    changed,
    drawn_actions,
    hide,
    recipe,
    rectangles,
)

TINY = dict(channels=(4, 4, 8, 8), width=16, depth=1, narrow=16, short=1)
SIZE = (24, 20)


def images(count: int = 2, size: tuple[int, int] = SIZE, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, *size, generator=torch.Generator().manual_seed(seed))


def built(method: TokenPretrained) -> nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(1, 3, 2).train()


def step(method: TokenPretrained, nets: nn.ModuleDict) -> Tensor:
    torch.manual_seed(1)
    return method.pretext(nets, Batch(images(), None), Moment(0, 10))


@pytest.mark.component("local anatomical structures")
class TestHiding:
    @pytest.mark.parametrize("size", [(16, 16), (12, 14)])
    def test_a_context_keeps_nothing_that_is_hidden(self, size):
        for seed in range(20):
            torch.manual_seed(seed)
            kept, hidden = hide(3, size)
            assert kept.shape[1] >= LEAST and hidden.shape[1] > 0.15 * 0.8 * size[0] * size[1]
            for mine, missing in zip(kept.tolist(), hidden.tolist(), strict=True):
                assert not set(mine) & set(missing)
                assert len(set(mine)) == len(mine) and len(set(missing)) == len(missing)

    def test_what_is_hidden_is_four_blocks(self, monkeypatch):
        """Their union, in the image that has fewest; of others so many tokens of theirs."""
        drawn = []

        def noted(*arguments):
            drawn.append(rectangles(*arguments))
            return drawn[-1]

        monkeypatch.setattr("medcook.recipes.pretraining.chexworld.rectangles", noted)
        torch.manual_seed(3)
        kept, hidden = hide(5, (16, 16))
        assert len(drawn) == 5
        union = torch.stack(drawn[:4]).any(0)
        assert hidden.shape[1] == union.sum(1).min()
        assert union.gather(1, hidden).all() and not union.gather(1, kept).any() and drawn[4].gather(1, kept).all()
        assert all(0.12 * 256 <= count <= 0.23 * 256 for count in drawn[0].sum(1))
        assert (drawn[4].sum(1) >= 0.7 * 256).all()

    def test_rectangles_are_whole(self):
        found = rectangles(50, (6, 7), (2, 3)).view(50, 6, 7)
        assert (found.any(2).sum(1) == 2).all() and (found.any(1).sum(1) == 3).all() and (found.sum((1, 2)) == 6).all()
        assert found.any(0).all()

    @pytest.mark.parametrize("size", [(2, 2), (4, 4), (3, 9)])
    def test_small_grids_keep_something(self, size):
        for seed in range(10):
            torch.manual_seed(seed)
            kept, hidden = hide(4, size)
            assert kept.shape[1] >= min(LEAST, size[0] * size[1]) and hidden.shape[1] >= 1

    def test_the_context_encoder_never_sees_the_rest(self):
        encoder, x = built(CheXWorld(**TINY))["model"].encoder, images()
        kept = torch.tensor([[0, 7, 12], [29, 3, 4]])
        seen = torch.zeros(2, 30)
        seen.scatter_(1, kept, 1.0)
        blank = x * F.interpolate(seen.view(2, 1, 6, 5), scale_factor=4)
        assert torch.equal(encoder(x, kept), encoder(blank, kept))
        assert not torch.allclose(encoder(x)[:, 0], encoder(x, kept)[:, 0])


@pytest.mark.component("global anatomical layouts")
class TestLayout:
    def test_the_shift_is_where_the_second_crop_lies(self):
        """Rows and columns as brightness: each crop shows where it was cut."""
        torch.manual_seed(0)
        rows = ((torch.arange(64.0) + 0.5) / 64)[:, None].expand(64, 48)
        columns = ((torch.arange(48.0) + 0.5) / 48).expand(64, 48)
        views, shift = crops(torch.stack([rows, columns]).expand(6, 2, 64, 48))
        first, second = views.chunk(2)
        for axis, side in ((0, 64), (1, 48)):
            middle = [(view[:, axis, 32, 24] + view[:, axis, 31, 23]) / 2 for view in (first, second)]
            high = (first[:, axis, 40, 30] - first[:, axis, 24, 18]) / ((16, 12)[axis] / side)
            assert torch.allclose((middle[1] - middle[0]) / high, shift[:, axis], atol=1e-3)
            assert torch.allclose((second[:, axis, 40, 30] - second[:, axis, 24, 18]) / ((16, 12)[axis] / side), high)
            assert (high > 0.45).all() and (high <= 1.001).all()
        assert views.shape == (12, 2, 64, 48) and shift.abs().max() > 0.1

    def test_positions_are_sinusoids_of_row_and_column(self):
        found = sinusoids(torch.tensor([[2.5, -1.0]]), 16)[0].tolist()
        turns = [[place / 10_000 ** (k / 4) for k in range(4)] for place in (2.5, -1.0)]
        wanted = [f(turn) for line in turns for f in (math.sin, math.cos) for turn in line]
        assert found == pytest.approx(wanted, abs=1e-6)

    def test_the_other_crop_is_asked_for_where_it_lies(self):
        """A shift by whole tokens asks for the same places as the tokens that lie there."""
        method = CheXWorld(**TINY)
        nets, asked = built(method), []
        nets["pretext"]["predictor"].register_forward_pre_hook(lambda _, given: asked.append(given[2]))
        scene = method.scene(images())
        scene = scene._replace(shift=torch.tensor([[1 / 6, 2 / 5], [0.5, -0.2]]))
        method.surprise(nets, scene)
        own, others = asked[0].chunk(2)
        places = grid_places((6, 5))
        assert torch.equal(own, places[scene.hidden])
        move = torch.tensor([[1.0, 2], [3, -1], [-1, -2], [-3, 1]])
        assert torch.allclose(others, places[scene.hidden[[2, 3, 0, 1]]] + move[:, None], atol=1e-6)

    def test_not_told_it_has_to_guess(self):
        method, asked = CheXWorld(**TINY, told=False), []
        nets = built(method)
        nets["pretext"]["predictor"].register_forward_pre_hook(lambda _, given: asked.extend(given[2:]))
        scene = method.scene(images())
        method.surprise(nets, scene)
        assert torch.equal(asked[0][4:], grid_places((6, 5))[scene.hidden[[2, 3, 0, 1]]]) and not asked[1].any()


@pytest.mark.component("domain variations")
class TestDomains:
    def test_nothing_changes_without_an_action(self):
        assert torch.allclose(changed(images(), torch.tensor([UNCHANGED] * 2)), images(), atol=1e-5)

    def test_actions_are_brightness_contrast_gamma_and_blur(self):
        x = images(3, (32, 30))
        actions = torch.tensor([[1.3, 0.7, 1.8, 0.0], [0.7, 1.4, 0.6, 1.5], [1.0, 1.0, 1.0, 0.8]])
        found = changed(x, actions)
        for image, (bright, contrast, gamma, blur), mine in zip(x, actions.tolist(), found, strict=True):
            low, high = image.min().item(), image.max().item()
            unit = np.clip((image[0].numpy() - low) / (high - low) * bright, 0, 1)
            unit = np.clip(unit.mean() + contrast * (unit - unit.mean()), 0, 1) ** gamma
            unit = gaussian_filter(unit, blur, mode="nearest", radius=6) if blur else unit
            assert np.allclose(mine[0].numpy(), unit * (high - low) + low, atol=1e-3)

    def test_draws_stay_in_their_ranges(self):
        torch.manual_seed(0)
        actions = drawn_actions(2000)
        low, high = actions.amin(0).tolist(), actions.amax(0).tolist()
        assert low == pytest.approx([0.6, 0.6, 0.5, 0], abs=0.01) and high == pytest.approx([1.4, 1.4, 2, 2], abs=0.02)
        same = (actions == torch.tensor(UNCHANGED)).float().mean(0)
        assert same.tolist() == pytest.approx([0.2, 0.2, 0.2, 0.8], abs=0.03)
        assert (drawn_actions(50, exposure_only=True)[:, 2:] == torch.tensor(UNCHANGED[2:])).all()

    def test_the_context_is_the_target_after_its_action(self):
        scene = CheXWorld(**TINY).scene(images())
        assert torch.allclose(scene.contexts, changed(scene.views, scene.actions), atol=1e-5)
        assert not torch.allclose(scene.contexts, scene.views)
        plain = CheXWorld(**TINY, domains=False).scene(images())
        assert torch.equal(plain.contexts, plain.views)

    def test_the_prediction_depends_on_the_action(self):
        predictor = Predictor(8, 16, 1, 2, 8, actions=4)
        given = torch.randn(1, 3, 8), grid_places((1, 3))[None], grid_places((1, 2))[None]
        one, two = (predictor(*given, torch.tensor([action])) for action in (UNCHANGED, (1.3, 1.0, 1.0, 0.0)))
        assert not torch.allclose(one, two)
        assert Predictor(8, 16, 1, 2, 8).policy is None


@pytest.mark.component("unified framework")
class TestUnified:
    @pytest.mark.parametrize(("layout", "domains"), [(True, True), (False, False), (True, False)])
    def test_the_loss_is_the_mean_of_four_predictions(self, layout, domains):
        """Each crop from each context, written out: token by token, with the formulas of the module's docstring."""
        method = CheXWorld(**TINY, layout=layout, domains=domains)
        nets = built(method)
        for parameter in (nets["pretext"]["target"].embed.weight, *nets["pretext"]["target"].norm.parameters()):
            nn.init.normal_(parameter)
        scene, losses = method.scene(images()), []
        model, predictor, target = nets["model"].encoder, nets["pretext"]["predictor"], nets["pretext"]["target"]
        for b in range(2):
            for i, j in [(0, 0), (1, 1), (0, 1), (1, 0)] if layout else [(0, 0), (1, 1)]:
                mine, theirs = 2 * i + b, 2 * j + b
                move = (j - i) * scene.shift[b]
                known = model(scene.contexts[mine][None], scene.kept[mine][None])
                there = torch.tensor([[divmod(k, 5) for k in scene.kept[mine].tolist()]]).float()
                asked = [[k // 5 + 6 * move[0], k % 5 + 5 * move[1]] for k in scene.hidden[theirs].tolist()]
                guess = predictor(known, there, torch.tensor([asked]), scene.actions[mine][None])
                truth = target(scene.views[theirs][None])[:, scene.hidden[theirs]]
                truth = (truth - truth.mean(2, keepdim=True)) / (truth.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
                losses.append((guess - truth).square().mean())
        assert method.surprise(nets, scene).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)

    def test_one_pass_serves_all_four(self):
        method, calls = CheXWorld(**TINY), []
        nets = built(method)
        for module in (nets["model"].encoder, nets["pretext"]["target"], nets["pretext"]["predictor"]):
            module.register_forward_hook(lambda *given: calls.append(len(given[2])))
        step(method, nets)
        assert calls == [4, 4, 8]


@pytest.mark.component("joint-embedding prediction")
class TestTarget:
    def test_only_encoder_and_predictor_learn(self):
        method = CheXWorld(**TINY)
        nets = built(method)
        step(method, nets).backward()
        assert all(p.grad is None for p in nets["pretext"]["target"].parameters())
        for module in (nets["model"].encoder, nets["pretext"]["predictor"]):
            assert all(p.grad.abs().max() > 0 for name, p in module.named_parameters() if "in_proj_bias" not in name)

    @pytest.mark.parametrize(("at", "expected"), [(0, 0.9), (5, 0.95), (9, None)])
    def test_it_follows_ever_more_slowly(self, at, expected):
        method = CheXWorld(**TINY, momentum=0.9)
        nets = built(method)
        nn.init.constant_(nets["model"].encoder.norm.weight, 0.0)
        method.after_pretext(nets, Moment(at, 10))
        last = 1 - 0.1 * (1 + math.cos(0.9 * math.pi)) / 2
        assert nets["pretext"]["target"].norm.weight.tolist() == pytest.approx([expected or last] * 16)

    def test_it_is_what_labels_start_from(self):
        method = CheXWorld(**TINY)
        nets = built(method)
        for at in (8, 9):
            nn.init.normal_(nets["model"].encoder.embed.weight)
            method.after_pretext(nets, Moment(at, 10))
            mine, theirs = nets["model"].encoder.state_dict(), nets["pretext"]["target"].state_dict()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine) == (at == 9)


@pytest.mark.component("comparison with other self-supervised methods")
class TestMaskedAutoencoder:
    def test_it_learns_the_hidden_pixels_of_normalised_patches(self):
        method = MaskedAutoencoder(**TINY)
        nets, seen = built(method), []
        nets["pretext"].register_forward_hook(lambda _, given, found: seen.append((given, found)))
        nets["model"].encoder.register_forward_hook(lambda _, given, __: seen.append(given))
        loss = step(method, nets)
        (views, kept), ((_, there, asked), guess) = seen
        assert kept.shape == (4, 8) and asked.shape == (4, 22, 2)
        losses = []
        for b in range(4):
            together = {tuple(place) for place in torch.cat([there, asked], dim=1)[b].int().tolist()}
            assert together == {(row, column) for row in range(6) for column in range(5)}
            for k, (row, column) in enumerate(asked[b].int().tolist()):
                pixels = views[b, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten()
                pixels = (pixels - pixels.mean()) / (pixels.var(correction=0) + 1e-5).sqrt()
                losses.append((guess[b, k] - pixels).square().mean())
        assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


class TestNetwork:
    @pytest.mark.parametrize("size", [(24, 20), (33, 18), (9, 9)])
    def test_any_size_comes_back_and_everything_learns(self, size):
        assert_every_parameter_is_trained(TokenPretrained(**TINY, share=0.0), size)

    def test_all_arms_have_the_same_network(self):
        nets = [built(type(arm.method)(**TINY, share=arm.method.share)) for name, arm in recipe.arms.items()
                if name != "u-net from scratch"]  # fmt: skip
        weights = [list(net["model"].state_dict().values()) for net in nets]
        assert all(torch.equal(a, b) for other in weights[1:] for a, b in zip(weights[0], other, strict=True))
        assert "pretext" not in nets[0]

    def test_the_ablation_differs_in_two_switches(self):
        arms = {name: arm.method.settings() for name, arm in recipe.arms.items()}
        one, other = arms["chexworld"], arms["local structure alone"]
        assert {key for key in one if one[key] != other[key]} == {"layout", "domains"}

    @pytest.mark.parametrize("method", [CheXWorld(**TINY), MaskedAutoencoder(**TINY)])
    def test_bfloat16_works(self, method):
        nets = built(method)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = step(method, nets)
        loss.backward()
        assert loss.dtype == torch.float32 and torch.isfinite(loss)
        assert loss.item() == pytest.approx(step(method, nets).item(), rel=0.05)
