"""SASNet: two branches, what is remembered of them, views that change places, and distances."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.data.transforms import NONE, Augment
from medcook.errors import MedcookError
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.networks import UNet
from medcook.recipes.semi_supervised.sasnet import (
    Confidence,
    SASNet,
    TwoBranchUNet,
    change_view,
    signed_distance,
    signed_distances,
)

TINY = dict(channels=(4, 8, 8), slots=8)
EARLY, LATE = Moment(0, 10), Moment(9, 10)
HERE = F.affine_grid(torch.eye(2, 3)[None], [1, 1, 32, 32], align_corners=False)
"""The grid that moves nothing."""


@pytest.fixture
def nets() -> nn.ModuleDict:
    return SASNet(**TINY).build(inputs=1, classes=3, dims=2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(seed: int, known: bool = True, side: int = 16) -> Batch:
    rng = generator(seed)
    labels = torch.randint(0, 3, (2, 4, 4), generator=rng).byte().repeat_interleave(side // 4, 1)
    labels = labels.repeat_interleave(side // 4, 2)
    images = labels[:, None] + torch.randn(2, 1, side, side, generator=rng)
    return Batch(images, labels if known else torch.full_like(labels, IGNORE), torch.tensor([3, 5]))


def views(seed: int = 0) -> tuple[Batch, Batch]:
    """An augmented batch with labels and one without."""
    return tuple(SASNet().augment(batch(seed + k, known), generator(seed + k)) for k, known in enumerate((True, False)))


@pytest.mark.component("dual-branch architecture")
class TestBranches:
    def test_the_low_level_branch_never_sees_the_deepest_level(self, nets):
        model = nets["model"].eval()
        before, _ = model.branches(batch(0).images)
        with torch.no_grad():
            model.down[-1][0].weight.mul_(-3)
        after, _ = model.branches(batch(0).images)
        assert not torch.allclose(before[0], after[0]) and torch.equal(before[1], after[1])

    def test_they_share_the_encoder(self, nets):
        logits, _ = nets["model"].branches(batch(0).images)
        for branch in logits:
            (gradient,) = torch.autograd.grad(branch.square().sum(), nets["model"].down[0][0].weight, retain_graph=True)
            assert gradient.abs().max() > 0

    def test_the_high_level_branch_is_the_u_net_of_the_book_and_predicts(self, nets):
        nets, images = nets.eval(), batch(0).images
        plain = UNet(inputs=1, classes=3, channels=TINY["channels"]).eval()
        plain.load_state_dict({name: nets["average"].state_dict()[name] for name in plain.state_dict()})
        logits, distances = nets["average"].branches(images)
        assert logits.shape == (2, 2, 3, 16, 16) and distances.shape == (2, 2, 2, 16, 16)
        assert torch.equal(plain(images), logits[0])
        assert torch.equal(SASNet(**TINY).predict(nets, images), logits[0].softmax(1))

    def test_each_learns_the_labels(self, nets):
        nets.train()
        labelled, unlabelled = views()
        loss = SASNet(**TINY).training_step(nets, labelled, unlabelled, EARLY)
        logits, _ = nets["model"].branches(labelled.images)
        parts = [find_loss("both")(branch, labelled.labels).item() for branch in logits]
        assert loss.item() == pytest.approx(sum(parts) / 2, rel=1e-5)
        assert SASNet(**TINY).training_step(nets, labelled, None, LATE).item() == pytest.approx(
            sum(parts) / 2, rel=1e-5
        )

    def test_each_follows_the_others_sharpened_output(self):
        """p ** (1 / T), normalised: written out for logits that stand in for the network's."""
        (high, low), labelled, unlabelled = torch.randn(2, 4, 3, 16, 16).double(), *views()
        method = SASNet(distances=False, temperature=0.5)
        loss = method.training_step(stand_in(high, low), labelled, unlabelled, LATE)
        both = [branch.softmax(1).numpy() for branch in (high, low)]
        sharp = [p**2 / (p**2).sum(1, keepdims=True) for p in both]
        supervised = sum(find_loss("both")(branch[:2], labelled.labels).item() for branch in (high, low)) / 2
        follow = np.square(both[0] - sharp[1]).mean() + np.square(both[1] - sharp[0]).mean()
        assert loss.item() == pytest.approx(supervised + follow, rel=1e-6)

    def test_a_target_is_held_constant(self):
        """A branch that is sure learns nothing by following, and nothing by being followed, however soft its target."""
        high, low = torch.zeros(4, 3, 16, 16), torch.zeros(4, 3, 16, 16)
        high[:, 0] = 60.0
        high.requires_grad_(), low.requires_grad_()
        labelled, unlabelled = views()
        method = SASNet(distances=False, temperature=60.0)
        method.training_step(stand_in(high, low), labelled, unlabelled, LATE).backward()
        assert high.grad[2:].abs().max() < 1e-9 < low.grad[2:].abs().max()


class StandIn(nn.Module):
    """Branches that say what they are told, for the first two images and then for the rest."""

    def __init__(self, logits: Tensor, distances: Tensor):
        super().__init__()
        self.parts = [(logits[:, k], distances[:, k]) for k in (slice(2), slice(2, None))]

    def branches(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.parts.pop(0)


def stand_in(high: Tensor, low: Tensor, distances: Tensor | None = None) -> nn.ModuleDict:
    logits = torch.stack([high, low])
    distances = torch.zeros_like(logits[:, :, 1:]) if distances is None else distances
    return nn.ModuleDict({"model": StandIn(logits, distances), "memory": Confidence(8, 2)})


@pytest.mark.component("scale-aware adaptive reweight")
class TestReweight:
    def remember(self, memory: Confidence, value: Tensor, grid: Tensor = HERE, known: Tensor | None = None) -> None:
        """Both branches gave `value` (32, 32), seen through a grid, to the truth of sample 3."""
        known = torch.ones(1, *value.shape, dtype=torch.bool) if known is None else known
        memory.update(torch.tensor([3]), grid, value.expand(1, 2, *value.shape), known)

    def test_first_visit_counts_in_full_and_later_ones_by_half(self):
        memory, index = Confidence(8, 2), torch.tensor([3, 4])
        grid = HERE.expand(2, -1, -1, -1)
        assert (memory.recall(index, grid) == 0.5).all()
        for value, expected in ((0.9, 0.9), (0.5, 0.7), (0.1, 0.4)):
            self.remember(memory, torch.full((32, 32), value))
            mine, other = memory.recall(index, grid)
            assert torch.allclose(mine, torch.tensor(expected), atol=1e-3) and (other == 0.5).all()

    def test_places_out_of_sight_keep_what_they_had(self):
        memory = Confidence(8, 2)
        known = (torch.arange(32) < 10).expand(1, 32, 32)
        self.remember(memory, torch.full((32, 32), 0.9), known=known)
        seen = memory.recall(torch.tensor([3]), HERE)
        assert torch.allclose(seen[..., :10], torch.tensor(0.9), atol=1e-3) and (seen[..., 10:] == 0.5).all()
        self.remember(memory, torch.full((32, 32), 0.3), grid=HERE + 3)  # all of it came from outside
        assert torch.equal(memory.recall(torch.tensor([3]), HERE), seen)

    def test_what_is_remembered_is_where_it_was_in_the_sample(self):
        """Left and right of a sample, told through a view in which they stand on their heads."""
        memory, left = Confidence(8, 2), (torch.arange(32) < 16).float().expand(32, 32)
        turned = HERE.transpose(1, 2).flip(1, 2)  # rotated and mirrored
        through = F.grid_sample(left[None, None], turned, mode="nearest", align_corners=False)[0, 0]
        assert not torch.equal(through, left)
        self.remember(memory, through, turned)
        assert torch.allclose(memory.recall(torch.tensor([3]), HERE)[0, 0], left)
        assert torch.allclose(memory.recall(torch.tensor([3]), turned)[0, 0], through, atol=1e-3)

    def test_through_any_augmentation(self):
        """A smooth map of a larger image, told through random views of it, is what is recalled without one."""
        memory, axis = Confidence(8, 2), torch.linspace(-2, 2, 64)
        truth = torch.sigmoid(axis[:, None] + 2 * axis)
        plain = F.affine_grid(torch.eye(2, 3)[None], [1, 1, 64, 64], align_corners=False)
        for k in range(12):
            grid = Augment().grid(torch.zeros(1, 1, 64, 64), generator(k))
            view = F.grid_sample(truth[None, None], grid, padding_mode="border", align_corners=False)[0, 0]
            self.remember(memory, view, grid)
        assert (memory.recall(torch.tensor([3]), plain)[0, 0] - truth).abs().max() < 0.06

    def test_volumes_too(self):
        memory, front = Confidence(8, 3), (torch.arange(16) < 8).float()[:, None, None].expand(16, 16, 16)
        here = F.affine_grid(torch.eye(3, 4)[None], [1, 1, 16, 16, 16], align_corners=False)
        self.remember(memory, front, here)
        assert torch.allclose(memory.recall(torch.tensor([3]), here)[0, 0], front)

    @pytest.mark.parametrize(("strength", "second"), [(0.0, 0), (2.0, 0), (9.0, 1)])
    def test_the_surer_branch_decides(self, strength, second):
        """One branch prefers class 1 by 0.1, the other class 0 by 0.2: half the weight of the first is too little.

        With confidences 0.8 and 0.2 the weights are 1 and 1, 2.6 and 1.4, or 8.2 and 2.8.
        """
        memory = Confidence(8, 2)
        memory.value[3] = torch.tensor([[0.2], [0.8]])
        memory.value[5] = torch.tensor([[0.8], [0.2]])
        probabilities = torch.tensor([[0.45, 0.55], [0.6, 0.4]])[:, None].repeat(1, 4, 1)
        probabilities[:, 2:] = probabilities[:, 2:].flip(2)  # of unlabelled images, the mean
        probabilities = probabilities[..., None, None].expand(2, 4, 2, 32, 32)
        labelled = Batch(torch.zeros(2, 1, 32, 32), torch.zeros(2, 32, 32).byte(), torch.tensor([3, 5]))
        labelled = labelled._replace(grid=HERE.expand(2, -1, -1, -1))
        masks = SASNet(strength=strength).ensemble(memory, probabilities, labelled)
        assert [mask.unique().tolist() for mask in masks] == [[0], [second], [1], [1]]

    def test_it_remembers_the_probability_of_the_truth(self):
        memory, method = Confidence(8, 2), SASNet()
        labels = torch.arange(32).remainder(3).byte().expand(1, 32, 32).clone()
        labels[:, :4] = IGNORE
        probabilities = torch.rand(2, 1, 3, 32, 32).softmax(2)
        method.ensemble(memory, probabilities, Batch(torch.zeros(1, 1, 32, 32), labels, torch.tensor([3]), HERE))
        recalled = memory.recall(torch.tensor([3]), HERE)[0]
        for branch in range(2):
            for column in (0, 7, 20):
                expected = probabilities[branch, 0, column % 3, 4:, column]
                assert torch.allclose(recalled[branch, 4:, column], expected, atol=1e-3)
        assert (recalled[:, :4] == 0.5).all()

    def test_every_step_adds_to_it_and_checkpoints_keep_it(self, nets):
        labelled, unlabelled = views()
        for now in (EARLY, LATE):
            before = nets["memory"].value.clone()
            SASNet(**TINY).training_step(nets, labelled, unlabelled, now)
            changed = (nets["memory"].value != before).flatten(1).any(1)
            assert changed.nonzero().flatten().tolist() == [3, 5]
            nn.init.normal_(nets["model"].head.weight)  # the next step says something else
        assert torch.equal(nets.state_dict()["memory.value"], nets["memory"].value)

    def test_without_it_nothing_is_remembered(self, nets):
        SASNet(**TINY, strength=0.0).training_step(nets, *views(), LATE)
        assert not nets["memory"].seen.any()

    def test_a_sample_too_many(self):
        with pytest.raises(MedcookError, match="slots"):
            Confidence(2, 2).recall(torch.tensor([2]), HERE)


@pytest.mark.component("view variance enhancement")
class TestViews:
    def change(self, images: Tensor, labels: Tensor, seed: int = 0) -> tuple[Tensor, ...]:
        theta = torch.eye(labels.ndim - 1, labels.ndim).expand(len(images), -1, -1)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return change_view(images, labels, grid, generator(seed))

    def test_images_and_labels_are_transposed_or_stay(self):
        images, labels = torch.randn(32, 2, 8, 8), torch.randint(0, 3, (32, 8, 8)).byte()
        changed, moved, _ = self.change(images, labels)
        turned = torch.isclose(changed, images.transpose(2, 3), atol=1e-5).flatten(1).all(1)
        stayed = torch.equal(changed[~turned], images[~turned])
        assert stayed and 8 <= turned.sum() <= 24
        assert torch.equal(moved[turned], labels[turned].transpose(1, 2))
        assert torch.equal(moved[~turned], labels[~turned])

    @pytest.mark.parametrize("size", [(8, 8), (6, 6, 6), (5, 6, 6)])
    def test_the_grid_says_where_every_voxel_came_from(self, size):
        images, labels = torch.randn(8, 1, *size), torch.randint(0, 3, (8, *size)).byte()
        changed, _, grid = self.change(images, labels)
        assert not torch.allclose(changed, images, atol=1e-3)
        assert torch.allclose(F.grid_sample(images, grid, align_corners=False), changed, atol=1e-4)

    def test_volumes_change_each_axis_with_the_last(self):
        images = torch.randn(24, 1, 4, 4, 4)
        changed, _, _ = self.change(images, torch.zeros(24, 4, 4, 4).byte())
        ways = (images, images.transpose(2, 4), images.transpose(3, 4))
        which = torch.stack([torch.isclose(changed, way, atol=1e-5).flatten(1).all(1) for way in ways])
        assert which.any(0).all() and which.any(1).all()

    def test_axes_of_different_length_stay(self):
        images, labels = torch.randn(4, 1, 6, 8), torch.zeros(4, 6, 8).byte()
        assert torch.equal(self.change(images, labels)[0], images)

    def test_it_is_part_of_the_augmentation(self):
        whole = batch(0)
        same, turned = (SASNet(augmentation=NONE, views=on).augment(whole, generator(1)).images for on in (False, True))
        assert torch.allclose(same, whole.images, atol=1e-4)
        assert any(
            torch.allclose(one, other.transpose(1, 2), atol=1e-4) for one, other in zip(turned, same, strict=True)
        )


@pytest.mark.component("segmentation-regression consistency")
class TestDistances:
    def test_distances_are_those_to_the_nearest_pixel(self):
        """Against all pairs of pixels: outside to the mask, inside to its complement, each over its largest."""
        inside = np.random.default_rng(0).random((9, 11)) < 0.2
        inside[2:7, 2:8] = True
        place = np.argwhere(np.ones_like(inside)).astype(float)
        apart = np.linalg.norm(place[:, None] - place[None], axis=-1)
        flat = inside.ravel()
        out = np.where(flat, 0, apart[:, flat].min(1))
        deep = np.where(flat, apart[:, ~flat].min(1), 0)
        expected = np.where(deep == 1, 0, out / out.max() - deep / deep.max()).reshape(inside.shape)
        assert np.allclose(signed_distance(inside), expected, atol=1e-6)

    def test_a_disc(self):
        rows, columns = np.mgrid[:41, :41] - 20
        radius = np.hypot(rows, columns)
        distance = signed_distance(radius < 10)
        assert distance[20, 20] == -1 and distance[0, 0] == 1
        assert (distance[radius > 10] > 0).all() and (distance[radius < 8.5] < 0).all()
        outside, reach = radius > 10, radius.max() - 10
        assert np.allclose(distance[outside] * reach, radius[outside] - 10, atol=1)

    @pytest.mark.parametrize("all_of_it", [False, True])
    def test_no_boundary_no_distance(self, all_of_it):
        assert (signed_distance(np.full((8, 8), all_of_it)) == 0).all()

    def test_each_structure_has_its_own(self):
        masks = torch.zeros(2, 8, 8).long()
        masks[0, 1:4, 1:4], masks[0, 5:7, 5:7] = 1, 2
        found = signed_distances(masks, 3)
        assert found.shape == (2, 2, 8, 8) and (found[1] == 0).all()
        for value in (1, 2):
            assert np.array_equal(found[0, value - 1].numpy(), signed_distance((masks[0] == value).numpy()))

    def test_both_branches_regress_those_of_the_ensemble_everywhere(self):
        """No loss where they are met; else their squared difference, on labelled and unlabelled images."""
        high, low = torch.randn(2, 4, 3, 16, 16)
        labelled, unlabelled = views()
        ensemble = (high.softmax(1) + low.softmax(1)).argmax(1)
        exact = signed_distances(ensemble, 3).expand(2, -1, -1, -1, -1).clone()
        off = exact.clone()
        off[0, 3] += 0.3  # an unlabelled image
        off[1, 0] -= 0.2  # a labelled one

        def loss(distances: Tensor, on: bool = True) -> float:
            method = SASNet(distances=on, strength=0.0)
            return method.training_step(stand_in(high, low, distances), labelled, unlabelled, LATE).item()

        assert loss(exact) == pytest.approx(loss(exact, False), rel=1e-5) == loss(off, False)
        assert loss(off) - loss(exact) == pytest.approx((0.3**2 + 0.2**2) / 4, rel=1e-3)

    def test_confidence_decides_which_distances(self):
        """On labelled images the remembered confidence of a branch moves the boundary that both regress."""
        high, low = torch.zeros(4, 3, 16, 16), torch.zeros(4, 3, 16, 16)
        high[:, 1, 4:12, 4:12], low[:, 1, 6:10, 6:10] = 1.0, 1.05
        high[:, 0, :4], low[:, 0] = 1.0, low[:, 0] + 0.5
        labelled, unlabelled = views()
        losses = []
        for sure in (0, 1):
            nets = stand_in(high, low)
            nets["memory"].value[:, sure], nets["memory"].value[:, 1 - sure] = 1.0, 0.0
            losses.append(SASNet(strength=5.0).training_step(nets, labelled, unlabelled, LATE).item())
        assert losses[0] != pytest.approx(losses[1], rel=1e-4)

    def test_the_regressed_distances_are_bounded_and_trained(self, nets):
        SASNet(**TINY).training_step(nets, *views(), LATE).backward()
        assert all(head.weight.grad.abs().max() > 0 for head in nets["model"].distances)
        with torch.no_grad():
            nets["model"].distances[0].bias += 50
        _, distances = nets["model"].branches(batch(0).images)
        assert distances.abs().max() <= 1


def test_it_takes_volumes():
    model = TwoBranchUNet(inputs=1, classes=3, channels=(2, 4, 4), dims=3)
    logits, distances = model.branches(torch.randn(2, 1, 8, 8, 8))
    assert logits.shape == (2, 2, 3, 8, 8, 8) and distances.shape == (2, 2, 2, 8, 8, 8)
