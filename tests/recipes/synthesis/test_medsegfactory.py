"""MedSegFactory: what the streams share, what they tell each other, and that a pair is one."""

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medcook.data.transforms import NONE, Augment
from medcook.methods import Batch, Moment
from medcook.recipes.synthesis import medsegfactory
from medcook.recipes.synthesis._painting import painted
from medcook.recipes.synthesis.medsegfactory import (
    DIFFUSION,
    GENTLE,
    JointCrossAttention,
    PairFactory,
    TwoStreams,
    noise_like,
    pairs_of,
    present,
    recipe,
    unpacked,
)
from medcook.synthesis import Synthesising

TOGETHER, APART = (recipe.arms[name].method for name in recipe.ablation)
LEARNS, MAKES, SEGMENTS = Moment(0, 100), Moment(59, 100), Moment(99, 100)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(side: int = 16, count: int = 4, classes: int = 4) -> Batch:
    labels = torch.arange(classes).repeat_interleave(side * side // classes).view(side, side).byte()
    labels = torch.stack([labels.clamp(max=classes - 1 - number % 2) for number in range(count)])
    return Batch(labels[:, None].float() + 0.1 * normal(count, 1, side, side), labels)


def lively(module: nn.Module) -> nn.Module:
    """What starts at zero would be deaf until it has learnt."""
    torch.manual_seed(1)
    for weight in module.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.2)
    return module


def joined(width: int = 8, joint: bool = True) -> JointCrossAttention:
    torch.manual_seed(0)
    return lively(JointCrossAttention(width, joint))


def still(images: torch.Tensor) -> torch.Tensor:
    """The grid that moves nothing."""
    return F.affine_grid(torch.eye(2, 3).expand(len(images), 2, 3), list(images.shape), align_corners=False)


def streams(joint: bool = True, colours: int = 3) -> TwoStreams:
    torch.manual_seed(0)
    return lively(TwoStreams(colours, joint, (8, 16)))


@pytest.mark.component("joint cross-attention")
class TestJointCrossAttention:
    @pytest.mark.parametrize("joint", [True, False])
    def test_each_stream_finds_in_itself_what_the_other_asks_for(self, joint):
        """By torch's own attention, stream by stream and head by head."""
        net, x = joined(joint=joint), normal(4, 8, 3, 5)
        image, label = F.group_norm(x, 8, net.norm.weight, net.norm.bias).flatten(2).transpose(1, 2).chunk(2)
        wanted = []
        for own, other, (query, key, value) in ((image, label, net.streams[0]), (label, image, net.streams[1])):
            q, k, v = query(other if joint else own), key(own), value(own)
            heads = [
                F.scaled_dot_product_attention(*(p[..., cut] for p in (q, k, v))) for cut in (slice(4), slice(4, 8))
            ]
            wanted.append(net.out(torch.cat(heads, dim=2)))
        wanted = x + torch.cat(wanted).transpose(1, 2).reshape(x.shape)
        torch.testing.assert_close(net(x), wanted, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("stream", [0, 1])
    def test_they_hear_of_each_other_only_if_joint(self, stream):
        x = normal(4, 8, 3, 5)
        other = x.clone()
        other[2 - 2 * stream : 4 - 2 * stream] += normal(2, 8, 3, 5, seed=1)
        mine = slice(2 * stream, 2 * stream + 2)
        assert not torch.allclose(joined()(x)[mine], joined()(other)[mine], atol=1e-3)
        assert torch.equal(joined(joint=False)(x)[mine], joined(joint=False)(other)[mine])

    def test_a_whole_network_hears_in_both_directions(self):
        there, t = torch.ones(2, 3, dtype=torch.bool), torch.tensor([100, 700])
        x = normal(2, 6, 16, 16)
        for changed, kept in ((slice(3), slice(3, 6)), (slice(3, 6), slice(3))):
            other = x.clone()
            other[:, changed] = normal(2, 3, 16, 16, seed=1)
            for joint in (True, False):
                net = streams(joint)
                moved = (net(x, t, there=there)[:, kept] - net(other, t, there=there)[:, kept]).abs().max()
                assert moved > 1e-4 if joint else moved == 0


@pytest.mark.component("dual-stream diffusion model")
class TestStreams:
    def test_both_have_the_same_weights(self):
        """With the same words and the same part in what joins them, a pair the other way round comes out so."""
        net, x = streams(), normal(2, 6, 16, 16)
        with torch.no_grad():
            net.words.weight[1] = net.words.weight[0]
            for met in net.met:
                met.streams[1].load_state_dict(met.streams[0].state_dict())
        told = dict(there=torch.tensor([[True, False, True]] * 2))
        t = torch.tensor([5, 900])
        found, turned = net(x, t, **told), net(torch.cat(x.chunk(2, 1)[::-1], 1), t, **told)
        torch.testing.assert_close(torch.cat(turned.chunk(2, 1)[::-1], 1), found, rtol=1e-3, atol=1e-4)

    def test_the_clean_pair_is_asked_for_of_both_at_one_time(self, monkeypatch):
        seen, nets = [], nn.ModuleDict({"generator": TwoStreams(3)})

        def forward(x, t, *, there):
            seen.append((x, t, there))
            return torch.full_like(x, 0.5)

        nets["generator"].forward = forward
        monkeypatch.setattr(medsegfactory, "GENTLE", NONE)
        given = batch()
        found = TOGETHER.learn(nets, given, None, LEARNS)
        image, maps = F.avg_pool2d(given.images, 2), F.avg_pool2d(painted(given.labels, 4), 2)
        clean = torch.cat([image.repeat(1, 3, 1, 1), maps], dim=1)
        torch.testing.assert_close(found, (clean - 0.5).square().mean())
        x, t, there = seen[0]
        a, b = DIFFUSION.parts(t, x)
        noise = (x - a * clean) / b
        assert t.shape == (4,) and noise.std().item() == pytest.approx(1, abs=0.1)
        assert torch.equal(there, present(given.labels, 3))

    def test_noise_of_images_is_grey_and_that_of_labels_is_not(self):
        torch.manual_seed(0)
        image, maps = noise_like(torch.zeros(2, 6, 16, 16)).chunk(2, dim=1)
        assert torch.equal(image[:, 0], image[:, 2]) and image.std().item() == pytest.approx(1, abs=0.1)
        across = torch.corrcoef(torch.stack([image[:, 0].flatten(), *(maps[:, k].flatten() for k in range(3))]))
        assert (across - torch.eye(4)).abs().max() < 0.2

    def test_a_pair_at_half_the_resolution_comes_back_whole(self):
        labels = torch.zeros(1, 32, 32, dtype=torch.uint8)
        labels[:, 6:26, 6:26], labels[:, 12:20, 12:20] = 2, 3
        images = F.interpolate(normal(1, 1, 8, 8), size=(32, 32), mode="bilinear")
        pairs = pairs_of(images, labels, 3)
        assert pairs.shape == (1, 6, 16, 16)
        image, label = unpacked(pairs)
        assert (label != labels).float().mean() < 0.02 and F.l1_loss(image, images) < 0.1

    @pytest.mark.parametrize(("side", "colours"), [(32, 3), (16, 1), (12, 2)])
    def test_any_size_and_number_of_structures(self, side, colours):
        net = TwoStreams(colours)
        x = normal(2, 2 * colours, side, side)
        assert net(x, torch.tensor([1, 2]), there=torch.ones(2, colours, dtype=torch.bool)).shape == x.shape


@pytest.mark.component("user-defined prompts")
class TestPrompts:
    def test_words_say_the_stream_and_which_structures_there_are(self):
        net = TwoStreams(3)
        there = present(torch.tensor([[[0, 1], [0, 3]], [[0, 0], [0, 0]]]).byte(), 3)
        assert there.tolist() == [[True, False, True], [False, False, False]]
        words = net.words.weight
        wanted = [[0, 3, 4, 7], [0, 2, 4, 6], [1, 3, 4, 7], [1, 2, 4, 6]]
        assert torch.equal(net.prompts(there), torch.stack([words[torch.tensor(line)] for line in wanted]))

    def test_both_streams_listen(self):
        net, x, t = streams(joint=False), normal(2, 6, 16, 16), torch.tensor([300, 900])
        one, other = (net(x, t, there=torch.tensor([line] * 2)) for line in ([True] * 3, [True, True, False]))
        for stream in (slice(3), slice(3, 6)):
            assert (one[:, stream] - other[:, stream]).abs().amax((1, 2, 3)).min() > 1e-4

    def test_words_reach_the_network_by_attention_and_with_the_time(self):
        net, told, attended = streams(), [], []
        net.told.register_forward_hook(lambda part, given, out: told.append(given[0]))
        net.attend.register_forward_hook(lambda part, given, out: attended.append(given[1]))
        there = torch.tensor([[True, False, False]])
        net(normal(1, 6, 16, 16), torch.tensor([3]), there=there)
        assert torch.equal(attended[0], net.prompts(there)) and torch.equal(told[0], net.prompts(there).mean(1))


@pytest.mark.component("data scarcity: pairs supplement a training set")
class TestPairs:
    def test_they_are_what_the_average_generator_makes_of_the_prompts_at_hand(self):
        """Of one that knows what pair belongs to each prompt."""
        given = batch()
        clean, asked = pairs_of(given.images, given.labels, 3), []
        nets = nn.ModuleDict({"generator": nn.Identity(), "sampler": TwoStreams(3)})
        nets["sampler"].forward = lambda x, t, *, there: asked.append(there) or clean
        images, labels = TOGETHER.make(nets, given, None)
        assert len(asked) == medsegfactory.CALLS and torch.equal(asked[0], present(given.labels, 3))
        assert images.shape == given.images.shape and labels.shape == given.labels.shape
        torch.testing.assert_close(images, unpacked(clean)[0])
        assert torch.equal(labels, unpacked(clean)[1])

    def test_a_run_learns_makes_and_segments(self):
        torch.manual_seed(0)
        method, given = PairFactory(channels=(8, 8), making=2), batch()
        nets, steps = method.build(1, 4, 2).train(), 10
        for number in range(steps):
            now = Moment(number, steps)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = method.training_step(nets, given, None, now)
            assert loss.dtype == torch.float32 and torch.isfinite(loss)
            if loss.grad_fn is not None:
                nets.zero_grad()
                loss.backward()
                part = "generator" if number < 4 else "model"
                assert all(weight.grad is not None for weight in nets[part].parameters())
            method.after_step(nets, now)
        assert len(nets["made"]) == 8 and nets["made"].labels.max() <= 3

    def test_the_generator_sees_gentle_motion_and_the_segmenter_that_of_every_arm(self, monkeypatch):
        how = []
        monkeypatch.setattr(Augment, "grid", lambda self, images, rng: how.append(self) or still(images))
        monkeypatch.setattr(Synthesising, "supervised", lambda self, nets, labelled, now: labelled.images.sum())
        given = batch()
        assert TOGETHER.augment(given, torch.Generator()) is given
        nets = nn.ModuleDict({"generator": TwoStreams(3)})
        TOGETHER.learn(nets, given, None, LEARNS)
        TOGETHER.supervised(nets, given, SEGMENTS)
        assert how == [GENTLE, recipe.arms["real"].method.augmentation]


def test_a_pair_moves_as_one():
    torch.manual_seed(0)
    given = batch(32)
    given = given._replace(images=given.labels[:, None].float())
    moved = TOGETHER.moved(given, TOGETHER.augmentation)
    inside = moved.labels[:, 8:-8, 8:-8] > 0
    assert (moved.labels != given.labels).float().mean() > 0.05
    assert ((moved.images[:, 0] - moved.labels)[:, 8:-8, 8:-8][inside].abs() < 0.6).float().mean() > 0.95


def test_the_ablation_differs_by_who_is_asked_alone():
    one, other = asdict(TOGETHER), asdict(APART)
    assert {name for name in one if one[name] != other[name]} == {"joint"}
    states = []
    for method in (TOGETHER, APART):
        torch.manual_seed(0)
        states.append(method.build(1, 4, 2).state_dict())
    assert states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )
    assert TOGETHER.first(900) == recipe.arms["real"].method.first(900)
