"""The probabilistic U-Net: its divergence, who sees the annotation, what a latent changes, the pieces of its loss."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from medcook.data import IGNORE
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.methods.probabilistic_unet import Gaussian, ProbabilisticUNet, divergence, draw_annotations

METHOD = ProbabilisticUNet(channels=(4, 8, 8), raters=2, guesses=3)
NOW = Moment(0, 10)


@pytest.fixture
def nets() -> nn.ModuleDict:
    return METHOD.build(inputs=1, classes=3, dims=2)


def batch(raters: int = 2) -> Batch:
    annotations = torch.randint(0, 3, (2, raters, 16, 16)).byte()
    return Batch(annotations[:, :1] + torch.randn(2, 1, 16, 16), annotations[:, 0], raters=annotations)


def gaussian(*shape: int) -> Gaussian:
    return Gaussian(torch.randn(*shape), torch.randn(*shape))


class TestDivergence:
    def test_equal_gaussians_have_none(self):
        one = gaussian(4, 6)
        assert divergence(one, one).abs().max() < 1e-6

    def test_it_is_that_of_torch(self):
        q, p = gaussian(5, 4, 6), gaussian(4, 6)
        theirs = kl_divergence(Normal(q.mean, q.log_sd.exp()), Normal(p.mean, p.log_sd.exp())).sum(-1)
        assert torch.allclose(divergence(q, p), theirs, rtol=1e-4)

    def test_noise_becomes_a_draw(self):
        q = Gaussian(torch.tensor([2.0]), torch.tensor([3.0]).log())
        drawn = q.at(torch.randn(20000, 1))
        assert drawn.mean().item() == pytest.approx(2, abs=0.1) and drawn.std().item() == pytest.approx(3, abs=0.1)


class TestNetworks:
    def test_the_posterior_sees_the_annotation(self, nets):
        model, given = nets["model"], batch()
        first, second = model.posterior(given.images, given.raters.transpose(0, 1)).mean
        assert first.shape == (2, METHOD.latent) and not torch.allclose(first, second)

    def test_every_annotation_has_its_own_posterior(self, nets):
        """One by one or together: the same, where normalisation does not go by the batch."""
        model, given = nets["model"].eval(), batch()
        together = model.posterior(given.images, given.raters.transpose(0, 1))
        for rater, mean in enumerate(together.mean):
            alone = model.posterior(given.images, given.raters[:, rater][None])
            assert torch.allclose(alone.mean[0], mean, atol=1e-6)

    def test_the_prior_does_not_see_it(self, nets):
        """The loss reaches the annotation's first convolution in the posterior net; the prior net has none for it."""
        model, given = nets["model"], batch()
        METHOD.training_step(nets, given, None, NOW).backward()
        seen = {net: getattr(model, net).encoder.down[0][0].weight.grad for net in ("prior", "posterior_net")}
        assert seen["prior"].shape[1] == 1 and seen["posterior_net"].shape[1] == 1 + 3
        assert (seen["posterior_net"].abs().sum((0, 2, 3)) > 0).all()

    def test_an_open_pixel_is_seen_as_no_class(self, nets):
        model, seen = nets["model"], []
        model.posterior_net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0]))
        annotation = torch.tensor([[0, 2], [IGNORE, 1]], dtype=torch.uint8).repeat(8, 8)
        model.posterior(torch.zeros(2, 1, 16, 16), annotation.expand(1, 2, 16, 16))
        assert torch.equal(seen[0][0, 1:, 0, 1], torch.tensor([0.0, 0, 1]))
        assert torch.equal(seen[0][0, 1:, 1, 0], torch.zeros(3))

    def test_features_and_latent_are_joined_as_if_stacked(self, nets):
        """The first 1 x 1 convolution in two parts is one convolution of the stack of both."""
        combine = nets["model"].combine
        features, latent = torch.randn(2, 4, 5, 5), torch.randn(3, 2, METHOD.latent)
        weight = torch.cat([combine.of_features.weight, combine.of_latent.weight[..., None, None]], dim=1)
        for k in range(3):
            stack = torch.cat([features, latent[k, :, :, None, None].expand(-1, -1, 5, 5)], dim=1)
            wanted = combine.rest(F.conv2d(stack, weight, combine.of_features.bias))
            assert torch.allclose(combine(features, latent)[k], wanted, atol=1e-5)


class TestSamples:
    def test_they_differ_where_the_latent_does_and_only_there(self, nets):
        nets.eval()
        images, noise = batch().images, torch.randn(1, 1, METHOD.latent)
        first, twin, other = METHOD.decode(nets, images, torch.cat([noise, noise, -noise]))
        assert torch.equal(first, twin) and (first - other).abs().max() > 1e-4

    def test_they_are_probabilities_drawn_from_the_global_generator(self, nets):
        nets.eval()
        images = batch().images
        first = METHOD.samples(nets, images, 4)
        assert first.shape == (4, 2, 3, 16, 16) and torch.allclose(first.sum(2), torch.ones(4, 2, 16, 16), atol=1e-5)
        assert not torch.equal(first, METHOD.samples(nets, images, 4))
        torch.manual_seed(5)
        one = METHOD.samples(nets, images, 4)
        torch.manual_seed(5)
        assert torch.equal(one, METHOD.samples(nets, images, 4))

    def test_they_spread_as_the_prior_does(self, nets):
        nets.eval()
        images, head = batch().images, nets["average"].prior.head
        with torch.no_grad():
            head.weight.zero_()
            head.bias[METHOD.latent :] = -20
        assert METHOD.samples(nets, images, 4).std(0).max() < 1e-5

    def test_a_prediction_can_be_repeated_and_does_not_depend_on_the_rest_of_the_batch(self, nets):
        nets.eval()
        images = batch().images
        whole = METHOD.predict(nets, images)
        torch.randn(7)
        assert torch.equal(whole, METHOD.predict(nets, images))
        assert torch.allclose(whole[1:], METHOD.predict(nets, images[1:]), atol=1e-5)


class TestLoss:
    def pieces(self, beta: float, given: Batch) -> tuple[float, dict]:
        method, seen = ProbabilisticUNet(channels=(4, 8, 8), raters=2, beta=beta), {}
        torch.manual_seed(2)
        model = method.build(1, 3, 2)["model"]
        for name in ("combine", "prior", "posterior_net"):
            getattr(model, name).register_forward_hook(
                lambda net, inputs, output, name=name: seen.update({name: (inputs, output)})
            )
        loss = method.training_step(nn.ModuleDict({"model": model}), given, None, NOW)
        return loss.item(), seen

    def test_it_is_cross_entropy_and_divergence_by_pixel(self):
        """Here with one annotation twice, so that the order in which raters are drawn does not matter."""
        given = batch()
        given = given._replace(raters=given.raters[:, :1].repeat(1, 2, 1, 1))
        loss, seen = self.pieces(3.0, given)
        logits, prior, posterior = (seen[name][1] for name in ("combine", "prior", "posterior_net"))
        ce = F.cross_entropy(logits.flatten(0, 1), given.raters.transpose(0, 1).flatten(0, 1).long())
        q, p = Normal(posterior.mean, posterior.log_sd.exp()), Normal(prior.mean, prior.log_sd.exp())
        both = Normal(p.mean.repeat(2, 1), p.stddev.repeat(2, 1))
        wanted = ce + 3.0 * kl_divergence(q, both).sum(1).mean() / 256
        assert loss == pytest.approx(wanted.item(), rel=1e-4)

    def test_beta_is_the_divergence_s_weight(self):
        given = batch()
        values = [self.pieces(beta, given)[0] for beta in (0.0, 1.0, 2.0)]
        assert values[2] - values[1] == pytest.approx(values[1] - values[0], rel=1e-2) and values[1] > values[0]

    def test_pixels_and_raters_that_say_nothing_count_nothing(self, nets):
        given = batch()
        raters = torch.cat([given.raters, torch.full_like(given.raters, IGNORE)], dim=1)
        raters[:, :, 3] = IGNORE
        loss = METHOD.training_step(nets, given._replace(raters=raters), None, NOW)
        loss.backward()
        assert torch.isfinite(loss)
        nothing = torch.full_like(given.raters, IGNORE)
        assert torch.isfinite(METHOD.training_step(nets, given._replace(raters=nothing), None, NOW))

    def test_without_raters_the_labels_stand_for_them(self, nets):
        given = batch()._replace(raters=None)
        METHOD.training_step(nets, given, None, NOW).backward()
        assert torch.equal(draw_annotations(given, 3), given.labels.expand(3, 2, 16, 16))


class TestDrawing:
    def numbered(self, *missing: int) -> Tensor:
        """(1, 5, 4, 4) annotations that each say their own number; some are missing."""
        raters = torch.arange(5, dtype=torch.uint8).view(1, 5, 1, 1).repeat(1, 1, 4, 4)
        raters[:, list(missing)] = IGNORE
        return raters

    def drawn(self, raters: Tensor, count: int) -> list[int]:
        found = draw_annotations(Batch(torch.zeros(1, 1, 4, 4), raters[:, 0], raters=raters), count)
        return found[:, 0, 0, 0].tolist()

    def test_each_rater_once_while_there_are_enough(self):
        assert sorted(self.drawn(self.numbered(), 5)) == [0, 1, 2, 3, 4]
        assert len(set(self.drawn(self.numbered(), 3))) == 3

    def test_all_raters_come_up(self):
        assert {self.drawn(self.numbered(), 1)[0] for _ in range(60)} == {0, 1, 2, 3, 4}

    def test_missing_ones_are_left_out_and_the_others_take_turns(self):
        assert sorted(self.drawn(self.numbered(0, 3), 6)) == [1, 1, 2, 2, 4, 4]

    def test_every_image_has_its_own_draw(self):
        raters = self.numbered().repeat(40, 1, 1, 1)
        found = draw_annotations(Batch(torch.zeros(40, 1, 4, 4), raters[:, 0], raters=raters), 1)[0, :, 0, 0]
        assert len(found.unique()) > 1


def test_volumes_are_refused():
    with pytest.raises(MedcookError, match="for slices"):
        METHOD.build(inputs=1, classes=2, dims=3)
