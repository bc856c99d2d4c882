"""C3S3: who wins a competition and what that means; what is contrasted with what."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.metrics import log_loss
from torch import nn

from medcook.data import IGNORE
from medcook.losses import soft_dice
from medcook.methods import Batch, CrossPseudoSupervision, Moment
from medcook.recipes.semi_supervised import c3s3
from medcook.recipes.semi_supervised.c3s3 import C3S3, consistency, info_nce, rivalry, select, teach

TINY = dict(channels=(4, 8), samples=32)
EARLY, LATE = Moment(0, 10), Moment(9, 10)


@pytest.fixture
def nets() -> nn.ModuleDict:
    return C3S3(**TINY).build(inputs=1, classes=3, dims=2)


def batch(seed: int, known: bool = True) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (2, 16, 16), generator=rng).byte()
    images = labels[:, None] + torch.randn(2, 1, 16, 16, generator=rng)
    return Batch(images, labels if known else torch.full_like(labels, IGNORE))


def right(labels: torch.Tensor, sure: float) -> torch.Tensor:
    """Logits that say the labels, the surer the larger `sure`; below 0 they say anything else."""
    return sure * nn.functional.one_hot(labels.long(), 3).movedim(-1, 1).float()


def unit(*shape: int) -> torch.Tensor:
    return nn.functional.normalize(torch.randn(*shape), dim=-1)


@pytest.mark.component("dynamic complementary competition")
class TestCompetition:
    def free(self) -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))

    @pytest.mark.parametrize("first_is_better", [True, False])
    def test_the_one_better_on_labels_teaches_and_the_other_learns(self, first_is_better):
        labels, free = batch(0).labels, self.free()
        known = (right(labels, 3), right(labels, -3))
        known = known if first_is_better else known[::-1]
        loss = C3S3().competition(known, labels, free)
        winner, loser = free if first_is_better else free[::-1]
        assert loss.item() == pytest.approx(teach(winner, loser, 0.1).item())
        loss.backward()
        assert winner.grad is None and loser.grad.abs().max() > 0

    def test_without_competition_both_learn(self):
        labels, free = batch(0).labels, self.free()
        C3S3(compete=False).competition((right(labels, 3), right(labels, -3)), labels, free).backward()
        assert all(each.grad.abs().max() > 0 for each in free)

    def test_a_winner_learns_nothing_unlabelled_in_a_whole_step(self, nets, monkeypatch):
        """Of two networks, that with the lower rivalry loss has the same gradient as without unlabelled images."""
        monkeypatch.setattr(c3s3, "consistency", lambda first, second: first.new_zeros(()))
        gradients = []
        for weight in (0.0, 1.0):
            torch.manual_seed(1)
            nets.zero_grad()
            C3S3(**TINY, weight=weight, contrast=0.0).training_step(nets, batch(0), batch(1, False), LATE).backward()
            gradients.append([nets[name].head.weight.grad.clone() for name in ("model", "second")])
        mine, theirs = (rivalry(nets[name](batch(0).images), batch(0).labels, 0.8) for name in ("model", "second"))
        same = [torch.allclose(*pair, atol=1e-7) for pair in zip(*gradients, strict=True)]
        assert same == [bool(mine < theirs), bool(theirs <= mine)]

    def test_it_is_judged_by_cross_entropy_and_dice(self):
        labels = batch(0).labels
        logits = torch.randn(2, 3, 16, 16)
        table = logits.softmax(1).movedim(1, -1).flatten(0, 2).double().numpy()
        ce = log_loss(labels.flatten().numpy(), table / table.sum(1, keepdims=True))
        wanted = 0.8 * ce + 0.2 * soft_dice(logits, labels).item()
        assert rivalry(logits, labels, 0.8).item() == pytest.approx(wanted, abs=1e-5)

    def test_pseudo_labels_are_sharpened(self):
        teacher, student = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
        power = teacher.softmax(1).double().numpy() ** (1 / 0.1)
        sharp = power / power.sum(1, keepdims=True)
        wanted = ((student.softmax(1).numpy() - sharp) ** 2).mean()
        assert teach(teacher, student, 0.1).item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.component("outcome-driven contrastive learning")
class TestContrast:
    def test_agreement_gives_anchors_and_everything_else_negatives(self):
        first, second = torch.randint(0, 3, (2, 300))
        spaces = select(first, second, 3, 64)
        assert len(spaces) == 4
        for number, (anchors, negatives) in enumerate(spaces):
            structure = 1 + number // 2
            said = torch.stack([first == structure, second == structure])
            alike = said.all(0) if number % 2 == 0 else ~said.any(0)
            assert alike[anchors].all() and not alike[negatives].any()
            assert len(anchors) == len(negatives) == 64

    def test_where_they_differ_are_half_of_the_negatives_of_both_spaces(self):
        first = torch.zeros(300, dtype=torch.long)
        first[:100] = 1
        second = first.clone()
        second[95:100] = 0
        for _, negatives in select(first, second, 2, 64):
            assert (first != second)[negatives].sum() == 32

    def test_where_they_never_differ_there_are_other_negatives(self):
        first = torch.arange(300) % 2
        (inside, outside), (beyond, within) = select(first, first, 2, 64)
        assert (first[inside] == 1).all() and (first[outside] == 0).all()
        assert (first[beyond] == 0).all() and (first[within] == 1).all()

    def test_a_structure_nobody_sees_has_no_spaces(self):
        nothing = torch.zeros(30, dtype=torch.long)
        assert select(nothing, nothing, 3, 8) == []
        logits = [torch.tensor([9.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)] * 2
        assert C3S3().selection(nn.ModuleList(), [torch.zeros(1, 4, 4, 4)] * 2, logits).item() == 0

    def test_the_loss_is_info_nce(self):
        anchor, positive, negative = unit(2, 5, 8), unit(2, 5, 8), unit(2, 7, 8)
        terms = []
        for space in range(2):
            for a, p in zip(anchor[space].numpy(), positive[space].numpy(), strict=True):
                all_of_them = np.concatenate([[a @ p], negative[space].numpy() @ a]) / 0.1
                terms.append(logsumexp(all_of_them) - all_of_them[0])
        assert info_nce(anchor, positive, negative, 0.1).item() == pytest.approx(np.mean(terms), abs=1e-5)

    def test_it_pulls_agreement_together_and_pushes_the_rest_apart(self):
        """One structure in two columns; the second network's features of one side are free to move."""
        said = torch.zeros(1, 4, 4, dtype=torch.long)
        said[..., :2] = 1
        logits = [right(said, 9)[:, :2]] * 2
        features = torch.eye(4)[said].movedim(-1, 1)
        plain = nn.ModuleList([nn.Identity(), nn.Identity()])
        same = C3S3().selection(plain, [features, features], logits)
        swapped = C3S3().selection(plain, [features, features.flip(3)], logits)
        assert same < 0.05 < 5 < swapped

    def test_positives_lie_where_their_anchors_do(self):
        """Every voxel has a feature of its own, the same in both networks: only the own one fits."""
        said = torch.zeros(1, 4, 4, dtype=torch.long)
        said[..., :2] = 1
        logits = [right(said, 9)[:, :2]] * 2
        features = torch.eye(16).view(1, 16, 4, 4)
        plain = nn.ModuleList([nn.Identity(), nn.Identity()])
        method = C3S3(samples=64)
        wanted = np.log(np.exp(10) + 64) - 10
        assert method.selection(plain, [features, features], logits).item() == pytest.approx(wanted, abs=1e-4)

    def test_projectors_and_networks_learn_from_it(self, nets):
        C3S3(**TINY).training_step(nets, batch(0), batch(1, False), LATE).backward()
        assert all(p.grad.abs().max() > 0 for p in nets["projectors"].parameters() if p.ndim == 2)
        nets.zero_grad()
        C3S3(**TINY, contrast=0.0).training_step(nets, batch(0), batch(1, False), LATE).backward()
        assert all(p.grad is None for p in nets["projectors"].parameters())


@pytest.mark.component("consistency of views")
class TestConsistency:
    def test_it_is_the_angle_between_logits(self):
        first, second = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
        a, b = first.double().numpy(), second.double().numpy()
        wanted = 1 - ((a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))).mean()
        assert consistency(first, second).item() == pytest.approx(wanted, abs=1e-5)
        assert consistency(first, 2 * first).item() == pytest.approx(0, abs=1e-5)

    def test_it_is_part_of_a_step(self, nets):
        def cost() -> float:
            torch.manual_seed(1)
            return C3S3(**TINY).training_step(nets, batch(0), batch(1, False), LATE).item()

        before = cost()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(c3s3, "consistency", lambda first, second: torch.tensor(7.0))
            with_seven = cost()
            patch.setattr(c3s3, "consistency", lambda first, second: torch.tensor(0.0))
            assert with_seven - cost() == pytest.approx(7, abs=1e-4)
        assert before < with_seven

    def test_each_network_has_its_own_view_of_what_is_unlabelled(self, nets):
        seen = {"model": [], "second": []}
        for name, views in seen.items():
            nets[name].down[0].register_forward_pre_hook(lambda block, images, views=views: views.append(images[0]))
        C3S3(**TINY).training_step(nets, batch(0), batch(1, False), LATE)
        assert all(len(views) == 2 and torch.equal(views[0], batch(0).images) for views in seen.values())
        noise = [views[1] - batch(1).images for views in seen.values()]
        assert all(0.05 < each.std() < 0.15 for each in noise)
        assert abs(torch.corrcoef(torch.stack([each.flatten() for each in noise]))[0, 1]) < 0.2


@pytest.mark.component("two sub-networks")
def test_two_networks_start_apart_and_learn_the_labels_alone_at_first(nets):
    assert not torch.equal(nets["model"].head.weight, nets["second"].head.weight)
    early = C3S3(**TINY).training_step(nets, batch(0), batch(1, False), EARLY)
    plain = CrossPseudoSupervision(channels=(4, 8)).training_step(nets, batch(0), None, EARLY)
    assert early.item() == pytest.approx(plain.item(), abs=1e-6)
    assert C3S3(**TINY).training_step(nets, batch(0), None, LATE).item() == pytest.approx(plain.item(), abs=1e-6)


def test_unlabelled_images_leave_the_statistics_alone(nets):
    def statistics(unlabelled: Batch | None) -> list[torch.Tensor]:
        fresh = deepcopy(nets)
        C3S3(**TINY).training_step(fresh, batch(0), unlabelled, LATE)
        return [value for name, value in fresh.named_buffers() if "running" in name]

    for one, other in zip(statistics(None), statistics(batch(1, False)), strict=True):
        assert torch.equal(one, other)


def test_it_works_on_volumes():
    method = C3S3(**TINY)
    nets = method.build(inputs=1, classes=3, dims=3)
    labels = torch.randint(0, 3, (2, 8, 8, 8)).byte()
    images = labels[:, None].float()
    loss = method.training_step(nets, Batch(images, labels), Batch(images, torch.full_like(labels, IGNORE)), LATE)
    loss.backward()
    assert torch.isfinite(loss) and nets["projectors"][1][0].weight.grad.abs().max() > 0
