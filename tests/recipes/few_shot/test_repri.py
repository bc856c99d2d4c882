"""RePRI: the three terms against independent formulas, and what each does to a classifier."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import log_loss
from torch import nn
from torch.nn.functional import normalize

from medcook.few_shot import Shots
from medcook.few_shot.baselines import SHARPNESS
from medcook.few_shot.method import class_episodes
from medcook.methods import Batch, Moment
from medcook.recipes.few_shot.repri import RePRI, classify, entropy, kl, proportion, recipe, support_loss

NOTHING = nn.ModuleDict()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shots(count: int = 1) -> Shots:
    """Slices with random features; those of the structure, the right third, lean the same way."""
    masks = torch.zeros(count, 24, 24, dtype=torch.uint8)
    masks[..., 16:] = 1
    maps = torch.randn(count, 8, 6, 6)
    maps[:, 0] += 3 * masks[:, ::4, ::4].float() - 1
    return Shots(torch.zeros(count, 1, 24, 24), normalize(maps, dim=1), masks)


def plain(logits: torch.Tensor) -> np.ndarray:
    """(pixels, 2) probabilities of two classes."""
    inside = 1 / (1 + np.exp(-logits.double().numpy().ravel()))
    return np.stack([1 - inside, inside], 1)


@pytest.mark.component("linear classifier of the features")
class TestClassifier:
    def test_logits_are_sharpened_cosines_with_a_bias(self):
        maps, weight, bias = normalize(torch.randn(2, 5, 3, 3), dim=1), torch.randn(2, 5), torch.randn(2)
        f, w = maps[1, :, 2, 0].numpy(), weight[1].numpy()
        wanted = SHARPNESS * f @ w / np.linalg.norm(f) / np.linalg.norm(w) - bias[1].item()
        assert classify(maps, weight, bias)[1, 2, 0].item() == pytest.approx(wanted, abs=1e-4)

    def test_it_starts_at_the_prototype_with_the_mean_logit_as_bias(self):
        support, query = shots(2), normalize(torch.randn(3, 8, 6, 6), dim=1)
        weight, bias = RePRI().start(support, query)
        inside = (support.masks[:, ::4, ::4] == 1)[:, None]
        mean = (support.maps * inside).sum((0, 2, 3)) / inside.sum()
        assert torch.allclose(weight, mean.expand(3, -1), atol=1e-5)
        assert classify(query, weight, bias).mean((1, 2)).abs().max() < 1e-4

    def test_query_slices_do_not_mix(self):
        support, query = shots(), shots(3)
        together = RePRI().logits(NOTHING, support, query)
        alone = RePRI().logits(NOTHING, support, query.take([1]))
        assert torch.allclose(together[1], alone[0], atol=1e-4)


@pytest.mark.component("cross-entropy on the support")
class TestSupport:
    def test_it_is_the_log_loss(self):
        support, weight, bias = shots(2), torch.randn(1, 8), torch.randn(1)
        logits = classify(support.maps, weight.expand(2, -1), bias.expand(2)).double().numpy().ravel()
        truth = support.masks[:, ::4, ::4].numpy().ravel()
        wanted = np.logaddexp(0, np.where(truth == 1, -logits, logits)).mean()
        assert support_loss(support, weight, bias).item() == pytest.approx(wanted, rel=1e-5)

    def test_the_classifier_learns_the_support(self):
        support = shots()
        query = Shots(support.images, support.maps)
        method = RePRI(entropy=False, kl=False)
        before = support_loss(support, *method.start(support, query.maps))
        logits = method.logits(NOTHING, support, query)[:, 1]
        after = log_loss(support.masks[:, ::4, ::4].numpy().ravel(), plain(logits))
        assert after < 0.5 * before.item()


@pytest.mark.component("entropy of query pixels")
class TestEntropy:
    def test_it_is_shannons(self):
        logits = 3 * torch.randn(1, 4, 4)
        assert entropy(logits).item() == pytest.approx(stats.entropy(plain(logits), axis=1).mean(), abs=1e-5)

    def test_it_makes_predictions_decided(self):
        support, query = shots(), shots(2)
        undecided, decided = (
            entropy(RePRI(entropy=on, kl=False).logits(NOTHING, support, query)[:, 1]).mean() for on in (False, True)
        )
        assert decided < undecided


@pytest.mark.component("foreground-proportion KL")
class TestProportion:
    def test_it_is_the_divergence_from_the_wanted_proportion(self):
        found, wanted = torch.tensor([0.2, 0.7]), torch.tensor([0.5, 0.6])
        expected = [stats.entropy([1 - p, p], [1 - q, q]) for p, q in zip(found, wanted, strict=True)]
        assert np.allclose(kl(found, wanted).numpy(), expected, atol=1e-5)
        assert kl(found, found).abs().max() < 1e-6

    def test_the_proportion_is_the_mean_probability(self):
        logits = torch.randn(2, 5, 5)
        assert proportion(logits)[1].item() == pytest.approx(plain(logits[1])[:, 1].mean(), abs=1e-5)

    def test_it_weighs_more_after_the_update(self):
        support, query, wanted = shots(), shots(), torch.tensor([0.3])
        weight, bias = RePRI().start(support, query.maps)
        early, late = (RePRI().loss_of(support, query.maps, weight, bias, wanted, extra) for extra in (0.0, 1.0))
        only = kl(proportion(classify(query.maps, weight, bias)), wanted)
        assert (late - early).item() == pytest.approx(only.item(), abs=1e-5)
        without = RePRI(kl=False).loss_of(support, query.maps, weight, bias, wanted, 0.0)
        assert (early - without).item() == pytest.approx(only.item(), abs=1e-5)

    def test_it_holds_the_proportion(self):
        """The query shows less of the structure than the support: entropy alone may lose or inflate it."""
        support, query = shots(), shots(2)
        method = RePRI(update=1000)
        wanted = proportion(classify(query.maps, *method.start(support, query.maps)))
        kept, free = (
            (proportion(RePRI(kl=on, update=1000).logits(NOTHING, support, query)[:, 1]) - wanted).abs().mean()
            for on in (True, False)
        )
        assert kept < free


def test_more_shots_weigh_the_query_less():
    query, wanted = shots(), torch.tensor([0.3])
    weights = []
    for count in (1, 4):
        support = shots(count)
        weight, bias = RePRI().start(support, query.maps)
        loss = RePRI(kl=False).loss_of(support, query.maps, weight, bias, wanted, 0.0)
        rest = loss - support_loss(support, weight, bias)
        weights.append((rest / entropy(classify(query.maps, weight, bias))).item())
    assert weights == pytest.approx([1.0, 0.25], abs=1e-4)


def test_training_has_no_episodes():
    method = RePRI(channels=(4, 4, 8, 8))
    nets = method.build(1, 3, 2)
    labels = torch.randint(0, 3, (2, 32, 32)).byte()
    batch = Batch(labels[:, None].float(), labels)
    assert method.practise(nets["model"], batch)[1] == []
    assert class_episodes(Shots(batch.images, batch.images, labels), 1, 1)
    method.training_step(nets, batch, None, Moment(0, 10)).backward()
    assert nets["model"]["features"].out.weight.grad is None


def test_all_arms_share_their_training():
    trained = ("prototypes", "repri", "without KL", "support only")
    common = {(recipe.arms[arm].method.episodes, recipe.arms[arm].method.base) for arm in trained}
    assert common == {("none", 0.0)}
