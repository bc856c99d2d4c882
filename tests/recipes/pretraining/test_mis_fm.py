"""Volume Fusion: what is blended, what is asked for, and what of the network is kept."""

import pytest
import torch
from pretexts import assert_both_phases_work, built, unlabelled
from torch import nn

from medcook.data import IGNORE
from medcook.data.transforms import NONE
from medcook.losses import cross_entropy_and_dice
from medcook.methods import Batch, Moment
from medcook.recipes.pretraining import mis_fm
from medcook.recipes.pretraining.mis_fm import (
    Restoration,
    VolumeFusion,
    box,
    fuse,
    hidden,
    paint,
    recipe,
    strengths,
)

TINY = dict(channels=(4, 8))
SIZE = (16, 12, 20)
NOW = Moment(0, 10)


def batch(size: tuple[int, ...] = SIZE, count: int = 3) -> Batch:
    return unlabelled(size, count)


class Sees(nn.Module):
    """A network that keeps what it is shown, and whose last map is that, as often as it has channels."""

    def __init__(self, channels: int = 4):
        super().__init__()
        self.channels = channels

    def features(self, images):
        self.seen = images
        return images.expand(-1, self.channels, *images.shape[2:])


@pytest.mark.component("volume fusion")
class TestFusion:
    def test_it_is_the_weighted_sum_voxel_by_voxel(self):
        front, back = torch.randn(2, 2, 1, 3, 4, 5)
        k = torch.randint(0, 5, (2, 3, 4, 5)).byte()
        found = fuse(front, back, k, 4)
        for b, z, y, x in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 4, 5))).tolist():
            a = k[b, z, y, x].item() / 4
            wanted = a * front[b, 0, z, y, x] + (1 - a) * back[b, 0, z, y, x]
            assert found[b, 0, z, y, x].item() == pytest.approx(wanted.item(), abs=1e-6)

    def test_the_ends_are_the_volumes_themselves(self):
        front, back = torch.randn(2, 1, 1, 4, 4, 4)
        assert torch.equal(fuse(front, back, torch.zeros(1, 4, 4, 4).byte(), 4), back)
        assert torch.equal(fuse(front, back, torch.full((1, 4, 4, 4), 4).byte(), 4), front)

    def test_the_foreground_is_another_volume_of_the_step(self, monkeypatch):
        """Without augmentation, where all is foreground, the network sees the volume before."""
        monkeypatch.setattr(mis_fm, "strengths", lambda size, levels: torch.full(size, levels, dtype=torch.uint8))
        images, method = batch(), VolumeFusion(**TINY, augmentation=NONE)
        nets = nn.ModuleDict({"model": Sees(), "pretext": nn.Conv3d(4, 5, 1)})
        method.pretext(nets, images, NOW)
        assert torch.allclose(nets["model"].seen, images.images[[2, 0, 1]], atol=1e-4)


@pytest.mark.component("discrete fusion coefficients")
class TestStrengths:
    def test_all_strengths_occur_and_none_else(self):
        torch.manual_seed(0)
        found = torch.stack([strengths(SIZE, 4) for _ in range(20)])
        assert found.dtype == torch.uint8 and found.unique().tolist() == [0, 1, 2, 3, 4]
        shares = found.flatten().bincount() / found.numel()
        assert shares[1:].min() > 0.5 * shares[1:].max()  # each is as likely as the next
        assert strengths(SIZE, 1).unique().tolist() == [0, 1]

    def test_the_ablation_differs_in_nothing_but_their_number(self):
        arms = {name: arm.method.settings() for name, arm in recipe.arms.items()}
        full, cut = arms["volume fusion"], arms["cut and paste"]
        assert {key for key in full if full[key] != cut[key]} == {"levels"} and cut["levels"] == 1

    def test_there_is_a_class_for_each(self):
        for levels in (1, 4):
            assert built(VolumeFusion(**TINY, levels=levels))["pretext"].out_channels == levels + 1


@pytest.mark.component("random patches")
class TestBoxes:
    def test_later_boxes_cover_earlier_ones(self, monkeypatch):
        places = iter([(slice(0, 3),) * 3, (slice(2, 4),) * 3])
        numbers = iter([2, 1, 3])
        monkeypatch.setattr(mis_fm, "box", lambda size, sides: next(places))
        monkeypatch.setattr(mis_fm, "between", lambda low, high: next(numbers))
        found = strengths((4, 4, 4), 4)
        assert found[1, 1, 1] == 1 and found[2, 2, 2] == found[3, 3, 3] == 3 and found[0, 3, 0] == 0

    def test_sides_and_places_are_spread_over_what_is_allowed(self):
        torch.manual_seed(0)
        found = [box((32, 8), (1 / 8, 5 / 8)) for _ in range(500)]
        for axis, (whole, least, most) in enumerate([(32, 4, 20), (8, 1, 5)]):
            lengths = [len(range(whole)[each[axis]]) for each in found]
            assert max(lengths) == most and min(lengths) <= least
            inner = [each[axis] for each in found if each[axis].start > 0 and each[axis].stop < whole]
            assert {each.stop - each.start for each in inner} == set(range(least, most + 1))
            middle = torch.tensor([(each[axis].start + each[axis].stop) / 2 / whole for each in found])
            assert middle.min() < 0.15 and middle.max() > 0.85

    def test_a_volume_has_ten_to_forty(self, monkeypatch):
        counts = []
        for _ in range(200):
            drawn = []
            monkeypatch.setattr(mis_fm, "box", lambda size, sides, drawn=drawn: drawn.append(1) or (slice(0, 1),))
            strengths((4,), 4)
            counts.append(len(drawn))
        assert min(counts) == 10 and max(counts) == 40

    def test_they_follow_from_torchs_generator(self):
        found = []
        for _ in range(2):
            torch.manual_seed(3)
            found.append(strengths(SIZE, 4))
        assert torch.equal(*found)


@pytest.mark.component("self-supervised segmentation")
class TestSegmentation:
    def test_the_loss_is_that_of_segmentation_with_strengths_as_classes(self, monkeypatch):
        k = torch.randint(0, 5, SIZE).byte()
        monkeypatch.setattr(mis_fm, "strengths", lambda size, levels: k)
        method = VolumeFusion(**TINY, augmentation=NONE)
        nets = nn.ModuleDict({"model": Sees(), "pretext": nn.Conv3d(4, 5, 1)})
        found = method.pretext(nets, batch(), NOW)
        logits = nets["pretext"](nets["model"].features(nets["model"].seen))
        assert found.item() == pytest.approx(cross_entropy_and_dice(logits, k.expand(3, *SIZE)).item(), rel=1e-5)

    def test_no_label_takes_part(self):
        losses = []
        for value in (IGNORE, 1):
            torch.manual_seed(1)
            images = batch()._replace(labels=torch.full((3, *SIZE), value).byte())
            losses.append(VolumeFusion(**TINY).pretext(built(VolumeFusion(**TINY)), images, NOW).item())
        assert losses[0] == losses[1]

    def test_all_but_the_last_layer_is_pre_trained(self):
        method = VolumeFusion(**TINY)
        nets = built(method)
        method.training_step(nets, batch(), batch(), NOW).backward()
        for name, weight in nets["model"].named_parameters():
            assert (weight.grad is None) == name.startswith("head.")
        assert all(weight.grad.abs().max() > 0 for weight in nets["pretext"].parameters())


@pytest.mark.component("other self-supervised training")
class TestRestoration:
    def test_hidden_voxels_are_noise_and_others_stay(self):
        images, where = torch.randn(2, 1, 8, 8, 8), torch.rand(2, 8, 8, 8) > 0.5
        images[1] *= 10
        found = paint(images, where)
        assert torch.equal(found[:, 0][~where], images[:, 0][~where])
        for mine, before, marked in zip(found, images, where, strict=True):
            noise = mine[0][marked]
            assert before.min() <= noise.min() and noise.max() <= before.max()
            assert torch.corrcoef(torch.stack([noise, before[0][marked]]))[0, 1].abs() < 0.3
            assert noise.std() == pytest.approx((before.max() - before.min()).item() / 12**0.5, rel=0.1)

    def test_little_is_hidden_or_nearly_all_or_nothing(self):
        torch.manual_seed(0)
        shares = torch.tensor([hidden((24, 24, 24)).float().mean() for _ in range(400)])
        assert (shares == 0).float().mean().item() == pytest.approx(0.1, abs=0.05)
        assert ((shares > 0) & (shares < 0.2)).float().mean().item() == pytest.approx(0.18, abs=0.06)
        assert (shares > 0.4).float().mean().item() == pytest.approx(0.72, abs=0.08)

    def test_the_loss_is_the_distance_from_the_volume_before(self):
        torch.manual_seed(0)
        images, method = batch(), Restoration(**TINY, augmentation=NONE)
        nets = nn.ModuleDict({"model": Sees(1), "pretext": nn.Identity()})
        found = method.pretext(nets, images, NOW)
        assert not torch.allclose(nets["model"].seen, images.images, atol=0.1)
        assert found.item() == pytest.approx((nets["model"].seen - images.images).square().mean().item(), rel=1e-3)

    def test_brightness_changes_what_is_seen_and_not_what_is_asked(self, monkeypatch):
        monkeypatch.setattr(mis_fm, "hidden", lambda size: torch.zeros(size, dtype=torch.bool))
        losses = []
        for augmentation in (NONE, Restoration().augmentation):
            nets = nn.ModuleDict({"model": Sees(1), "pretext": nn.Identity()})
            losses.append(Restoration(**TINY, augmentation=augmentation).pretext(nets, batch(), NOW).item())
        assert losses[0] < 1e-6 and losses[1] > 1e-3


@pytest.mark.parametrize("size", [(8, 64, 64), (32, 56, 40), (16, 16, 16), (9, 10, 11)])
def test_any_size(size):
    for method in (VolumeFusion(), Restoration()):
        images = batch(size, 2)
        assert torch.isfinite(method.pretext(built(method), images, NOW))


@pytest.mark.component("head and neck, thoracic and abdominal organs")
def test_it_runs_on_volumes_of_the_hippocampus_with_three_labelled_patients():
    task = recipe.scales["full"].task
    assert task.dataset == "hippocampus" and task.labelled == 3 and task.evaluation == "test"


@pytest.mark.parametrize("arm", recipe.arms)
def test_every_arm_goes_through_both_phases(arm):
    assert_both_phases_work(recipe.arms[arm].method, batch())
