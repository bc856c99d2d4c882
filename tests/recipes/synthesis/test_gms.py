"""GMS: what stays frozen, what is asked of the mapping, and how a label map becomes an image and comes back."""

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import nn
from torch.distributions import Normal, kl_divergence

from medcook.data import IGNORE
from medcook.methods import Batch, Moment
from medcook.networks import parameters
from medcook.recipes.synthesis._painting import grey, painted, shares
from medcook.recipes.synthesis._settings import BASELINE
from medcook.recipes.synthesis.gms import (
    GMS,
    KL,
    LATENT,
    LEVELS,
    AttentionBlock,
    Autoencoder,
    LatentMapping,
    drawn_dice,
    random_maps,
    recipe,
)

FIRST, LAST = Moment(0, 10), Moment(9, 10)


def batch(side: int = 32, count: int = 4, classes: int = 4) -> Batch:
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (count, side // 8, side // 8), generator=rng).byte()
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return Batch(labels[:, None].float() + 0.1 * torch.randn(count, 1, side, side, generator=rng), labels)


def built(method: GMS = recipe.arms["gms"].method, classes: int = 4) -> nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(1, classes, 2).train()


def step(method: GMS, nets: nn.ModuleDict, now: Moment) -> torch.Tensor:
    given = batch()
    hidden = given._replace(labels=torch.full_like(given.labels, IGNORE))
    loss = method.training_step(nets, given, hidden, now)
    loss.backward()
    return loss


@pytest.mark.component("frozen autoencoder")
class TestAutoencoder:
    def test_it_is_asked_for_the_image_and_for_a_normal_posterior(self):
        torch.manual_seed(0)
        net, images = Autoencoder(3), torch.randn(2, 3, 16, 16)
        torch.manual_seed(1)
        found = net.loss(images)
        torch.manual_seed(1)
        mean, deviation = net.posterior(images)
        back = net.drawn(mean + deviation * torch.randn_like(mean))
        divergence = kl_divergence(Normal(mean, deviation), Normal(0.0, 1.0)).mean()
        assert divergence * KL > 1e-6
        torch.testing.assert_close(found, (back - images).abs().mean() + KL * divergence)

    def test_others_see_latents_of_unit_variance_and_the_decoder_its_own(self):
        torch.manual_seed(0)
        net, images = Autoencoder(3), torch.randn(8, 3, 16, 16)
        with torch.no_grad():
            for _ in range(100):
                net.loss(images)
            mean, deviation = net.encode(images)
            assert mean.std().item() == pytest.approx(1, abs=0.02) and not 0.9 < net.posterior(images)[0].std() < 1.1
            torch.testing.assert_close(net.decode(mean), net.drawn(net.posterior(images)[0]))
            torch.testing.assert_close(deviation * net.spread, net.posterior(images)[1])

    def test_it_learns_to_give_an_image_back(self):
        torch.manual_seed(0)
        net, images = Autoencoder(1), painted(random_maps(4, (32, 32), 2), 2)
        optimiser = torch.optim.Adam(net.parameters(), 5e-3)
        losses = []
        for _ in range(60):
            losses.append(net.loss(images))
            optimiser.zero_grad()
            losses[-1].backward()
            optimiser.step()
        assert losses[-1] < 0.4 * losses[0]

    @pytest.mark.parametrize("arm", ["gms", "unfrozen"])
    def test_it_stays_as_it_is_while_the_mapping_learns_from_labels(self, arm):
        method = recipe.arms[arm].method
        nets = built(method)
        trained = [weight for weight in nets.parameters() if weight.requires_grad]
        optimiser, schedule = method.optimise(trained, 10)
        moved = {}
        for name, now in {"pretext": FIRST, "labels": LAST}.items():
            before = {key: value.clone() for key, value in nets["model"].state_dict().items()}
            optimiser.zero_grad(set_to_none=True)
            step(method, nets, now)
            optimiser.step()
            after = nets["model"].state_dict()
            moved[name] = {key.split(".")[0] for key in after if not torch.equal(after[key], before[key])}
        assert moved["pretext"] == {"autoencoder"}
        assert moved["labels"] == ({"mapping"} if arm == "gms" else {"mapping", "autoencoder"})

    def test_it_learns_from_views_of_images_without_labels_and_from_as_many_maps_of_nothing(self, monkeypatch):
        seen = []
        monkeypatch.setattr(Autoencoder, "loss", lambda self, images: seen.append(images) or images.sum())
        method, nets, given = GMS(), built(), batch()
        method.pretext(nets, given._replace(labels=torch.full_like(given.labels, IGNORE)), FIRST)
        images, maps = seen[0].chunk(2)
        assert seen[0].shape == (8, 3, 32, 32) and (images[:, :1] == images).all()
        assert not torch.equal(images, grey(given.images, 3))
        assert set(maps.unique().tolist()) == {-1.0, 1.0} and (maps > 0).sum(1).max() == 1

    def test_maps_of_nothing_are_smooth_nested_and_name_every_class(self):
        torch.manual_seed(0)
        maps = random_maps(100, (64, 64), 4)
        assert maps.dtype == torch.uint8 and maps.flatten().bincount().float().min() > 0.1 * maps.numel()
        changes = (maps[:, 1:] != maps[:, :-1]).float().mean()
        assert changes < 0.25, "noise changes at three of four neighbours"
        assert len(maps[:, 0, 0].unique()) == 4


@pytest.mark.component("mapping from image to mask in latent space")
class TestMapping:
    def test_attention_is_that_of_torch_beside_a_way_past(self):
        torch.manual_seed(0)
        block, x = AttentionBlock(8, 16), torch.randn(2, 8, 4, 6)
        before = block.past(x) + block.layers(x)
        q, k, v = block.asked(block.norm(before)).flatten(2).transpose(1, 2).chunk(3, dim=2)
        there = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        wanted = before + block.found(there.transpose(1, 2).reshape(before.shape))
        torch.testing.assert_close(block(x), wanted, rtol=1e-4, atol=1e-5)

    def test_no_position_is_pooled_away_and_skips_reach_across(self):
        torch.manual_seed(0)
        net, sizes, given = LatentMapping(), [], {}
        for name, part in net.named_modules():
            if isinstance(part, AttentionBlock):
                part.register_forward_hook(
                    lambda p, i, o, name=name: sizes.append(o.shape) or given.update({name: i[0]})
                )
        latents = torch.randn(2, LATENT, 8, 12)
        assert [said.shape for said in net(latents)] == [latents.shape] * LEVELS
        assert len(sizes) == 8 and {tuple(size[2:]) for size in sizes} == {(8, 12)}
        torch.testing.assert_close(given["up.3"][:, :8], net.enter(latents))
        torch.testing.assert_close(given["up.0"][:, :32], given["down.3"])

    @pytest.mark.parametrize("chance", [0.4, 0.6])
    def test_it_sees_the_mean_of_the_posterior_or_a_sample(self, chance, monkeypatch):
        method, nets, seen = GMS(), built(), []
        nets["model"].mapping.forward = lambda latents: seen.append(latents) or [latents] * LEVELS
        monkeypatch.setattr(torch, "rand", lambda *size, **how: torch.full(size[0] if size else (), chance))
        given = batch()
        method.supervised(nets, given, Moment(0, 5))
        mean, deviation = nets["model"].autoencoder.encode(grey(given.images, 3))
        if chance < 0.5:
            torch.testing.assert_close(seen[0], mean)
        else:
            noise = (seen[0] - mean) / deviation
            assert noise.std().item() == pytest.approx(1, abs=0.1) and noise.mean().abs() < 0.1


@pytest.mark.component("latent matching and Dice")
class TestLosses:
    @pytest.mark.parametrize("matching", [1.0, 0.0])
    def test_what_is_asked_for(self, matching):
        """Independently: Dice by MONAI, latents of the mask by the encoder alone."""
        method, nets, given = GMS(matching=matching), built(), batch()
        net, said = nets["model"].autoencoder, torch.randn(LEVELS, 4, LATENT, 8, 8)
        net.spread.fill_(0.5)
        nets["model"].mapping.forward = lambda latents: list(said)
        mask = torch.stack([given.labels == k for k in (1, 2, 3)], dim=1).float()
        with torch.no_grad():
            wanted = net.posterior(2 * mask - 1)[0] / 0.5
            total = 0.0
            for level in said:
                drawn = (net.drawn(0.5 * level) / 2 + 0.5).clamp(0, 1)
                dice = DiceLoss(batch=True, smooth_nr=1, smooth_dr=1)(drawn, mask)
                total = total + matching * (level - wanted).square().mean() + dice
            found = method.supervised(nets, given, Moment(0, 5))
        torch.testing.assert_close(found, total)

    def test_dice_is_that_of_monai(self):
        found, truth = torch.rand(2, 3, 8, 8), (torch.rand(2, 3, 8, 8) > 0.7).float()
        truth[:, 2] = 0
        torch.testing.assert_close(
            drawn_dice(found, truth), DiceLoss(batch=True, smooth_nr=1, smooth_dr=1)(found, truth)
        )

    def test_gradients_pass_the_frozen_decoder(self):
        method, nets = GMS(matching=0.0), built()
        step(method, nets, LAST)
        assert all(weight.grad.abs().max() > 0 for weight in nets["model"].mapping.parameters())
        assert all(weight.grad is None for weight in nets["model"].autoencoder.parameters())


@pytest.mark.component("decoding the predicted latents")
class TestDecoding:
    def test_a_painted_label_map_comes_back(self):
        labels = torch.randint(0, 4, (2, 8, 8)).byte()
        colours = painted(labels, 4)
        assert colours.shape == (2, 3, 8, 8) and torch.equal(shares(colours).argmax(1).byte(), labels)
        torch.testing.assert_close(shares(colours), F.one_hot(labels.long(), 4).movedim(-1, 1).float())

    def test_shares_are_probabilities_and_half_is_the_border(self):
        found = shares(2 * torch.randn(2, 3, 8, 8))
        assert found.min() >= 0
        torch.testing.assert_close(found.sum(1), torch.ones(2, 8, 8))
        assert shares(torch.tensor([0.02, -1.0]).view(1, 2, 1, 1)).argmax() == 1
        assert shares(torch.tensor([-0.02, -1.0]).view(1, 2, 1, 1)).argmax() == 0

    def test_the_prediction_is_what_the_decoder_draws_of_the_mapped_mean(self):
        method, nets, given = GMS(), built().eval(), batch()
        net = nets["average"].autoencoder
        net.spread.fill_(0.7)
        nets["average"].mapping.forward = lambda latents: [-latents, latents + 0.5]
        with torch.no_grad():
            found = method.predict(nets, given.images)
            drawn = net.drawn(0.7 * (net.posterior(given.images.repeat(1, 3, 1, 1))[0] / 0.7 + 0.5))
            assert torch.equal(found, method.predict(nets, given.images))
        torch.testing.assert_close(found, shares(drawn))


@pytest.mark.component("fewer trainable parameters")
def test_a_third_of_the_weights_of_the_u_net_learn_from_labels():
    counts = {}
    for name in ("gms", "unfrozen"):
        nets = built(recipe.arms[name].method)
        step(recipe.arms[name].method, nets, LAST)
        counts[name] = parameters(nets)
    u_net = parameters(BASELINE.build(1, 4, 2))
    assert counts["gms"] == parameters(LatentMapping()) < u_net / 3
    assert counts["gms"] < counts["unfrozen"] < u_net


@pytest.mark.component("less overfitting")
def test_the_ablation_differs_by_what_is_frozen_alone():
    one, other = (asdict(recipe.arms[name].method) for name in recipe.ablation)
    assert {name for name in one if one[name] != other[name]} == {"frozen"}
    states = [built(recipe.arms[name].method)["model"].state_dict() for name in recipe.ablation]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert recipe.arms["gms"].method.first(900) == BASELINE.first(900)


@pytest.mark.parametrize("arm", ["gms", "unfrozen", "without latent matching"])
def test_every_weight_learns_and_both_phases_work_in_bfloat16(arm):
    method = recipe.arms[arm].method
    nets, learnt = built(method), set()
    for now in (FIRST, LAST):
        nets.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = step(method, nets, now)
        assert loss.dtype == torch.float32 and torch.isfinite(loss)
        learnt |= {name for name, weight in nets["model"].named_parameters() if weight.grad is not None}
    assert learnt == {name for name, _ in nets["model"].named_parameters()}


@pytest.mark.parametrize(("side", "classes"), [(32, 4), (64, 4), (64, 2), (24, 3)])
def test_any_size_and_number_of_structures(side, classes):
    method, given = GMS(), batch(side, 2, classes)
    nets = built(method, classes)
    assert torch.isfinite(method.pretext(nets, given, FIRST)) and torch.isfinite(method.supervised(nets, given, FIRST))
    with torch.no_grad():
        assert method.predict(nets.eval(), given.images).shape == (2, classes, side, side)
