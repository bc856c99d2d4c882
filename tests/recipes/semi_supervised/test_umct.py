"""Multi-view co-training: what each view sees, how sure it is, and what the others tell it."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medcook.losses import cross_entropy_and_dice
from medcook.methods import Batch, Moment
from medcook.recipes.semi_supervised.umct import UMCT, MultiView, fuse, recipe, sample, soft_loss, turn, turn_back

TINY = dict(channels=(4, 8), dropout=0.0)
EARLY, LATE = Moment(0, 10), Moment(9, 10)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def nets_of(method: MultiView, dims: int = 2) -> nn.ModuleDict:
    return method.build(inputs=1, classes=3, dims=dims)


def batch(*size: int) -> Batch:
    return Batch(torch.randn(2, 1, *size), torch.randint(0, 3, (2, *size)).byte())


def own_logits(nets: nn.ModuleDict, images: Tensor) -> list[Tensor]:
    return [turn_back(net(turn(images, view)), view) for view, net in enumerate(nets["model"])]


class Head(nn.Module):
    """Logits 0 and gain * feature + shift."""

    def __init__(self, gain: float, shift: float = 0.0):
        super().__init__()
        self.gain, self.shift = gain, shift

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(features), self.gain * features + self.shift], dim=1)


class View(nn.Module):
    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head


@pytest.mark.component("views by rotating and permuting")
class TestViews:
    def test_each_axis_is_the_last_one_once(self):
        volume = torch.randn(1, 1, 3, 4, 5)
        assert [turn(volume, view).shape[-1] for view in range(3)] == [5, 3, 4]
        assert [turn(torch.randn(1, 1, 3, 4), view).shape[-1] for view in range(2)] == [4, 3]

    def test_later_views_are_half_a_turn(self):
        slices = torch.randn(2, 1, 4, 6)
        half = np.rot90(slices.numpy(), 2, axes=(2, 3))
        assert np.array_equal(turn(slices, 2).numpy(), half)
        assert np.array_equal(turn(slices, 3).numpy(), half.swapaxes(2, 3))

    @pytest.mark.parametrize("view", range(6))
    @pytest.mark.parametrize("size", [(4, 6), (3, 4, 5)])
    def test_the_way_back(self, size, view):
        volume = torch.randn(2, 3, *size)
        assert torch.equal(turn_back(turn(volume, view), view), volume)

    def test_a_network_sees_its_view_and_answers_in_the_common_frame(self):
        method = MultiView(**TINY)
        nets = nets_of(method)
        images = batch(16, 12).images
        seen = method.features(nets["model"], images)
        assert [one.shape[2:] for one in seen] == [(16, 12), (12, 16), (16, 12)]
        for mine, expected in zip(method.logits(nets["model"], seen), own_logits(nets, images), strict=True):
            assert torch.allclose(mine, expected, atol=1e-5)

    def test_the_mean_of_all_views_predicts(self):
        method = MultiView(**TINY)
        nets = nets_of(method, dims=3).eval()
        images = torch.randn(1, 1, 8, 6, 4)
        expected = torch.stack([logits.softmax(1) for logits in own_logits(nets, images)]).mean(0)
        assert torch.allclose(method.predict(nets, images), expected, atol=1e-5)


@pytest.mark.component("asymmetric kernels")
class TestKernels:
    def test_the_encoder_is_flat_and_the_decoder_is_not(self):
        for net in nets_of(MultiView(**TINY), dims=3)["model"]:
            kernels = [
                [m.kernel_size for m in part.modules() if isinstance(m, nn.Conv3d)] for part in (net.down, net.up)
            ]
            assert set(kernels[0]) == {(3, 3, 1)} and set(kernels[1]) == {(3, 3, 3)}

    def test_a_level_of_the_encoder_looks_along_its_plane_only(self):
        block = nets_of(MultiView(**TINY))["model"][0].down[0].eval()
        image = torch.randn(1, 1, 16, 16)
        changed = image.clone()
        changed[0, 0, 8, 8] += 5
        moved = (block(image) - block(changed)).abs().sum(1)[0] > 1e-6
        rows, columns = moved.nonzero(as_tuple=True)
        assert set(columns.tolist()) == {8} and len(set(rows.tolist())) > 1


@pytest.mark.component("Bayesian uncertainty")
class TestUncertainty:
    def test_variance_of_one_feature_is_that_of_a_coin(self):
        rate, passes = 0.3, 200
        mean, variance = sample(Head(gain=1.0), torch.full((1, 1, 16, 16), 1.4), rate, passes)
        kept, dropped = 1 / (1 + np.exp(-1.4 / (1 - rate))), 0.5
        assert mean[:, 1].mean().item() == pytest.approx((1 - rate) * kept + rate * dropped, abs=2e-3)
        expected = 2 * rate * (1 - rate) * (kept - dropped) ** 2  # of both classes
        assert variance.shape == (1, 1, 16, 16)
        assert variance.mean().item() == pytest.approx(expected, rel=0.02)

    def test_without_dropout_there_is_none(self):
        assert sample(Head(1.0), torch.randn(1, 1, 4, 4), 0.0, 3)[1].abs().max() < 1e-12

    def test_the_network_is_trained_with_the_same_dropout(self):
        model, features = nn.ModuleList([View(nn.Identity())]), [torch.ones(1, 2, 16, 16)]
        dropped = MultiView(dropout=0.5).logits(model, features)[0]
        assert set(dropped.unique().tolist()) == {0.0, 2.0}


@pytest.mark.component("uncertainty-weighted label fusion")
class TestFusion:
    def test_it_is_the_weighted_mean_of_the_others(self):
        predictions, confidence = torch.rand(3, 2, 3, 4, 4).softmax(2), torch.rand(3, 2, 1, 4, 4) + 0.1
        fused = fuse(predictions, confidence)
        for view in range(3):
            others = [other for other in range(3) if other != view]
            expected = np.average(
                predictions[others].numpy(), axis=0, weights=confidence[others].expand(-1, -1, 3, -1, -1).numpy()
            )
            assert np.allclose(fused[view].numpy(), expected, atol=1e-5)
        assert torch.allclose(fused.sum(2), torch.ones(3, 2, 4, 4), atol=1e-5)

    @pytest.mark.parametrize(("weighted", "expected"), [(True, 0.05), (False, 0.41)])
    def test_a_sure_view_outweighs_an_unsure_one(self, weighted, expected):
        unsure, sure = Head(gain=2.0), Head(gain=0.0, shift=-3.0)  # 1/2 or 1, by chance; always 0.047
        model = nn.ModuleList(View(head) for head in (unsure, unsure, sure))
        method = UMCT(dropout=0.5, passes=64, weighted=weighted)
        target = method.targets(model, [torch.full((1, 1, 8, 8), 2.0)] * 3)[0, :, 1]
        assert target.mean().item() == pytest.approx(expected, abs=0.02)

    def test_votes_are_fused_in_the_common_frame(self):
        model = nn.ModuleList(View(Head(gain=1.0)) for _ in range(3))
        logits = torch.randn(1, 1, 6, 4)
        targets = UMCT(dropout=0.0).targets(model, [turn(logits, view) for view in range(3)])
        assert all(torch.allclose(one[:, 1], logits[:, 0].sigmoid(), atol=1e-5) for one in targets)


@pytest.mark.component("multi-view co-training")
class TestCoTraining:
    def test_labels_alone_first(self):
        method, labelled, unlabelled = UMCT(**TINY), batch(16, 16), batch(16, 16)
        nets = nets_of(method)
        expected = sum(cross_entropy_and_dice(one, labelled.labels) for one in own_logits(nets, labelled.images))
        loss = method.training_step(nets, labelled, unlabelled, EARLY)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-4)

    def test_then_every_view_learns_from_the_others(self):
        method, labelled, unlabelled = UMCT(**TINY, weight=0.7), batch(16, 16), batch(16, 16)
        nets = nets_of(method)
        early, late = (method.training_step(nets, labelled, unlabelled, now).item() for now in (EARLY, LATE))
        logits = own_logits(nets, unlabelled.images)
        soft = [one.softmax(1).detach() for one in logits]
        others = [(soft[1] + soft[2]) / 2, (soft[0] + soft[2]) / 2, (soft[0] + soft[1]) / 2]
        expected = sum(soft_loss(mine, theirs) for mine, theirs in zip(logits, others, strict=True)).item()
        assert late - early == pytest.approx(0.7 * expected, abs=1e-4)

    def test_normalisation_remembers_labelled_volumes_alone(self):
        method, labelled = UMCT(**TINY), batch(16, 16)
        nets = nets_of(method)
        twin = deepcopy(nets)
        method.training_step(nets, labelled, batch(16, 16), LATE)
        method.training_step(twin, labelled, None, LATE)
        states = (one["model"].state_dict().items() for one in (nets, twin))
        for (name, mine), (_, theirs) in zip(*states, strict=True):
            assert name.endswith("num_batches_tracked") or torch.equal(mine, theirs)

    def test_a_target_is_no_way_back_to_its_teachers(self):
        model = nets_of(UMCT(**TINY))["model"]
        seen = MultiView(**TINY).features(model, batch(16, 16).images)
        assert not UMCT(**TINY).targets(model, seen).requires_grad

    def test_without_unlabelled_volumes_it_is_multi_view_training(self):
        nets, labelled = nets_of(UMCT(**TINY)), batch(16, 16)
        losses = [kind(**TINY).training_step(nets, labelled, None, LATE).item() for kind in (UMCT, MultiView)]
        assert losses[0] == losses[1]

    def test_the_loss_on_sure_targets_is_that_on_labels(self):
        labelled, logits = batch(16, 16), torch.randn(2, 3, 16, 16)
        target = nn.functional.one_hot(labelled.labels.long(), 3).movedim(-1, 1).float()
        assert soft_loss(logits, target).item() == pytest.approx(
            cross_entropy_and_dice(logits, labelled.labels).item(), abs=1e-5
        )


def test_the_ablation_takes_the_weights_away_and_nothing_else():
    settings, without = (recipe.arms[arm].method.settings() for arm in recipe.ablation)
    assert {name for name in settings if settings[name] != without[name]} == {"weighted"}
