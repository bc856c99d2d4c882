"""Episodes, prototypes and the baselines, on small arrays."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medcook.data import IGNORE
from medcook.errors import MedcookError
from medcook.few_shot import FineTuning, LocalPrototypes, PrototypeNetwork, Shots
from medcook.few_shot.baselines import SHARPNESS, fused, local_prototypes, prototypes
from medcook.few_shot.method import class_episodes, masked_mean, random_superpixel, shrink
from medcook.methods import Batch, Moment

NOW = Moment(0, 10)
SMALL = {"channels": (4, 4, 8, 8)}


def two_halves(size: int = 32) -> Shots:
    """An image, its mask and features: left is background with feature (1, 0), right the structure with (0, 1)."""
    mask = torch.zeros(1, size, size, dtype=torch.uint8)
    mask[..., size // 2 :] = 1
    inside = mask[:, ::4, ::4].float()
    return Shots(mask[:, None].float(), torch.stack([1 - inside, inside], dim=1), mask)


def batch() -> Batch:
    torch.manual_seed(0)
    labels = torch.zeros(6, 32, 32, dtype=torch.uint8)
    labels[:4, 4:16, 4:16] = 1
    labels[3:, 18:30, 18:30] = 2
    return Batch(labels[:, None].float() + 0.1 * torch.randn(6, 1, 32, 32), labels)


class TestEpisodes:
    def test_support_and_queries_show_one_structure_in_different_images(self):
        found = batch()
        names = torch.arange(6.0).view(6, 1, 1, 1)
        episodes = class_episodes(Shots(names, names, found.labels), 12, 3)
        assert len(episodes) == 12
        seen = set()
        for support, query in episodes:
            pairs = zip(*everything(support, query), strict=True)
            values = {found.labels[int(n)][mask == 1].unique().item() for n, mask in pairs}
            assert len(values) == 1
            seen |= values
            images = torch.cat([support.images, query.images]).flatten().tolist()
            assert len(support.images) == 1 and len(set(images)) == len(images) > 1
        assert seen == {1, 2}

    def test_unlabelled_pixels_stay_so(self):
        labels = torch.ones(2, 4, 4, dtype=torch.uint8)
        labels[:, 0] = IGNORE
        [(support, query)] = class_episodes(Shots(labels, labels, labels), 1, 1)
        assert (query.masks[:, 0] == IGNORE).all() and (support.masks[:, 1:] == 1).all()

    def test_without_a_structure_in_two_images_there_are_none(self):
        labels = torch.zeros(3, 4, 4, dtype=torch.uint8)
        labels[0] = 1
        assert class_episodes(Shots(labels, labels, labels), 3, 2) == []

    def test_a_superpixel_is_one_piece_of_an_image(self):
        image = torch.zeros(64, 64)
        image[:, 32:] = 5.0
        pieces = torch.stack([random_superpixel(image) for _ in range(20)])
        assert pieces.flatten(1).any(1).all()
        left, right = pieces[:, :, :24].flatten(1).any(1), pieces[:, :, 40:].flatten(1).any(1)
        assert left.any() and right.any() and not (left & right).any()

    def test_views_move_with_their_piece(self):
        method = LocalPrototypes(**SMALL, count=2, views=3)
        net = method.build(1, 3, 2)["model"]
        given = batch()
        known, episodes = method.superpixel_episodes(net, given)
        assert len(episodes) == len(known.images) == 2
        for image, labels in zip(known.images, known.masks, strict=True):
            [place] = [k for k, other in enumerate(given.images) if torch.equal(image, other)]
            assert torch.equal(labels, given.labels[place])
        for support, query in episodes:
            assert any(torch.equal(support.images[0], image) for image in given.images)
            assert len(query.images) == 3 and not torch.equal(query.masks[0], query.masks[1])
            assert query.maps.shape == (3, 8, 8, 8)


def everything(support: Shots, query: Shots) -> tuple:
    return torch.cat([support.images, query.images]).flatten(), torch.cat([support.masks, query.masks])


class TestPrototypes:
    def test_a_prototype_is_the_mean_feature_of_its_class(self):
        maps, mask = torch.randn(2, 5, 4, 4), torch.zeros(2, 16, 16, dtype=torch.uint8)
        mask[:, :8] = 1
        wanted = maps[:, :, :2].movedim(1, -1).reshape(-1, 5).mean(0)
        assert torch.allclose(prototypes(Shots(maps, maps, mask))[1], wanted, atol=1e-6)
        assert torch.allclose(masked_mean(maps, torch.ones(2, 4, 4)), maps.mean((0, 2, 3)), atol=1e-5)

    def test_cells_that_are_half_structure_count_half(self):
        mask = torch.zeros(1, 8, 8, dtype=torch.uint8)
        mask[0, 0, :2] = 1
        mask[0, 4] = IGNORE
        assert shrink(mask, (4, 4))[0, 0, 0] == 0.5 and shrink(mask, (4, 4)).sum() == 0.5

    def test_what_looks_like_the_support_is_found(self):
        support = two_halves()
        query = Shots(support.images.flip(3), support.maps.flip(3))
        for method in (PrototypeNetwork(), LocalPrototypes()):
            inside = method.segment(nn.ModuleDict(), support, query)
            assert inside.shape == (1, 32, 32)
            assert inside[..., :12].min() > 0.99 and inside[..., 20:].max() < 0.01

    def test_squares_of_one_class_are_prototypes_of_their_own(self):
        maps = torch.randn(1, 3, 8, 8)
        support = two_halves()._replace(maps=maps)
        background, structure = local_prototypes(support, 4)
        assert len(background) == len(structure) == 3
        assert torch.allclose(structure[0], maps[..., 4:].mean((0, 2, 3)), atol=1e-6)
        assert torch.allclose(structure[1], maps[0, :, :4, 4:].mean((1, 2)), atol=1e-6)

    def test_a_structure_in_two_looks_has_local_prototypes_for_both(self):
        """Its mean looks like the background: only local prototypes can tell."""
        support = two_halves()
        a, b = torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0])
        maps = torch.ones(1, 3, 8, 8) * (a + b).view(1, 3, 1, 1)
        maps[0, :, :4, 4:], maps[0, :, 4:, 4:] = a.view(3, 1, 1), b.view(3, 1, 1)
        support = support._replace(maps=maps)
        query = Shots(support.images, maps)
        assert PrototypeNetwork().segment(nn.ModuleDict(), support, query)[..., 20:].mean() < 0.6
        assert LocalPrototypes().segment(nn.ModuleDict(), support, query)[..., 20:].mean() > 0.95

    def test_prototypes_are_fused_by_their_softmax(self):
        maps, points = torch.randn(1, 4, 2, 2), torch.randn(3, 4)
        similarity = SHARPNESS * F.cosine_similarity(maps[:, None], points[None, :, :, None, None], dim=2).numpy()
        weights = np.exp(similarity) / np.exp(similarity).sum(1, keepdims=True)
        assert np.allclose(fused(maps, points).numpy(), (weights * similarity).sum(1), atol=1e-4)


class TestTraining:
    @pytest.mark.parametrize("method", [PrototypeNetwork(**SMALL), LocalPrototypes(**SMALL), FineTuning(**SMALL)])
    def test_features_learn(self, method):
        nets = method.build(1, 3, 2)
        method.training_step(nets, batch(), None, NOW).backward()
        assert nets["model"]["features"].out.weight.grad.abs().max() > 0
        assert nets["model"]["head"].weight.grad.abs().max() > 0
        assert method.predict(nets.eval(), batch().images).shape == (6, 3, 32, 32)

    def test_without_base_weight_the_head_shapes_no_features(self):
        method = PrototypeNetwork(**SMALL, episodes="none")
        nets = method.build(1, 3, 2)
        method.training_step(nets, batch(), None, NOW).backward()
        assert nets["model"]["features"].out.weight.grad is None
        assert nets["model"]["head"].weight.grad.abs().max() > 0

    def test_volumes_are_refused(self):
        with pytest.raises(MedcookError, match="slices, not volumes"):
            PrototypeNetwork().build(1, 2, 3)

    def test_fine_tuning_learns_the_support_and_leaves_the_network_alone(self):
        method = FineTuning(**SMALL, tuning=60, tuning_rate=1e-2)
        net = method.build(1, 3, 2)["average"].eval()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        support = two_halves()
        torch.manual_seed(0)
        tuned = method.adapt(net, [support])
        query = Shots(support.images, method.encode(tuned, support.images))
        inside = method.segment(tuned, support, query)
        assert inside[..., 20:].mean() > 0.8 > 0.2 > inside[..., :12].mean()
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
