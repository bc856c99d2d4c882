"""MedSyn: sentences about volumes, two stages, masks along with the image, and how its anatomy is looked at."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from medcook.data import Case
from medcook.methods import Batch, Moment
from medcook.networks import parameters
from medcook.recipes.synthesis import medsyn
from medcook.recipes.synthesis._denoiser import guided
from medcook.recipes.synthesis._diffusion import Diffusion
from medcook.recipes.synthesis._sentences import EMPTY, SENTENCES, SIZES, Facts, Text
from medcook.recipes.synthesis.medsyn import (
    Cascade,
    MedSyn,
    anatomy_rows,
    enlarged,
    keeping,
    likeness,
    recipe,
    reduced,
    spoilt,
)
from medcook.synthesis import Bank

LOW, FINE = (8, 16), (8, 8, 16)
TINY = dict(channels=(4, 8), low=LOW, fine=FINE, volumes=9)
SIZE = (16, 16, 16)


def labels(whole: int, first: int, size: tuple[int, ...] = SIZE) -> torch.Tensor:
    """(1, *size) with so many voxels of all structures, of which so many of the first."""
    flat = torch.zeros(int(np.prod(size)), dtype=torch.uint8)
    flat[:whole], flat[:first] = 2, 1
    return flat.view(1, *size)


def batch(count: int = 4, size: tuple[int, ...] = SIZE) -> Batch:
    rng = torch.Generator().manual_seed(0)
    some = torch.cat([labels(300 + 100 * n, 100 + 30 * n, size) for n in range(count)])
    return Batch(torch.randn(count, 1, *size, generator=rng), some)


def awake(net: nn.Module) -> nn.Module:
    """What starts at zero would be deaf until it has learnt."""
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net


def cascade(structures: int = 2, low: tuple[int, ...] = LOW) -> Cascade:
    torch.manual_seed(0)
    return awake(Cascade(1, structures, low, FINE)).eval()


class Says(nn.Module):
    """A network that says the same of all, and keeps what it was asked."""

    def __init__(self, says):
        super().__init__()
        self.says, self.asked = says, []

    def forward(self, x, t, **told):
        self.asked.append((x, told))
        return self.says(x, **told)


@pytest.mark.component("radiology reports")
class TestSentences:
    def test_facts_are_counted(self):
        found = Facts.measured(torch.cat([labels(99, 25), labels(999, 900)]))
        assert found[:, 0].exp().tolist() == pytest.approx([100, 1000], rel=1e-4)
        assert found[:, 1].tolist() == pytest.approx([0.25, 0.9])

    def test_a_third_is_small_and_a_third_is_large(self):
        rng, facts = np.random.default_rng(0), Facts()
        wholes, parts = np.exp(rng.normal(6, 0.3, 600)).astype(int), rng.normal(0.5, 0.05, 600)
        some = torch.cat([labels(w, int(w * p)) for w, p in zip(wholes, parts, strict=True)])
        for part in some.split(20):
            facts.see(part)
        levels = facts.levels(some)
        for fact, values in enumerate((wholes, parts)):
            assert (torch.bincount(levels[:, fact], minlength=3) / 600).tolist() == pytest.approx([1 / 3] * 3, abs=0.04)
            assert np.corrcoef(levels[:, fact], values)[0, 1] > 0.8

    def test_the_sentence_is_true(self):
        facts = Facts()
        for whole, share in product((200, 500, 1250), (0.3, 0.5, 0.7)):
            facts.see(labels(whole, int(whole * share)))
        numbers = [facts.number(labels(w, int(w * s))).item() for w, s in ((200, 0.7), (500, 0.5), (1250, 0.3))]
        assert [SENTENCES[number] for number in numbers] == [
            "a small organ with a large first part",
            "a medium organ with a medium first part",
            "a large organ with a small first part",
        ]
        assert len(set(SENTENCES)) == len(SIZES) ** 2


@pytest.mark.component("text guidance")
class TestGuidance:
    def test_tokens_are_words_and_places(self):
        text = Text(6)
        tokens = text(torch.arange(len(SENTENCES) + 1))
        vectors = {}
        for sentence, found in zip(SENTENCES, tokens, strict=False):
            for place, word in enumerate(sentence.split()):
                vector = found[place] - text.places[place]
                torch.testing.assert_close(vectors.setdefault(word, vector), vector)
        assert len({tuple(vector.tolist()) for vector in vectors.values()}) == len(vectors) == 8
        silent = tokens[EMPTY] - text.places
        torch.testing.assert_close(silent, silent[:1].expand_as(silent), atol=1e-6, rtol=1e-5)

    def test_guidance_is_that_of_the_noise(self):
        """The official code goes from images to noise, guides there, and back."""
        diffusion, x, t = Diffusion(target="image"), torch.randn(2, 1, 4), torch.tensor([300, 600])
        without, told = torch.randn(2, 2, 1, 4)
        net = lambda twice, times, tokens: torch.cat([without, told]) + 0 * tokens  # noqa: E731
        found = guided(net, x, t, torch.zeros(4, 1, 1), 2.5)
        noises = [diffusion.seen(image, x, t)[1] for image in (without, told)]
        noise = noises[0] + 2.5 * (noises[1] - noises[0])
        torch.testing.assert_close(found, Diffusion(target="noise").seen(noise, x, t)[0], rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("low", [LOW, ()])
    def test_what_is_made_follows_the_sentence_and_more_with_guidance(self, low):
        net, numbers, found = cascade(low=low), torch.tensor([0, 8]), []
        for guidance in (0.0, 1.0, 4.0):
            torch.manual_seed(1)
            found.append(net.paint(numbers, SIZE, guidance))
        torch.manual_seed(1)
        other = net.paint(numbers.flip(0), SIZE, 0.0)
        assert torch.equal(found[0], other)
        assert 0 < (found[1] - found[0]).abs().mean() < (found[2] - found[0]).abs().mean()

    def test_a_tenth_of_the_texts_is_left_out(self):
        torch.manual_seed(0)
        told = MedSyn().told(torch.full((5000,), 3))
        assert set(told.tolist()) == {3, EMPTY}
        assert (told == EMPTY).float().mean().item() == pytest.approx(0.1, abs=0.02)

    def test_a_step_of_training_tells_the_sentences_of_its_volumes(self, monkeypatch):
        method, nets, seen = MedSyn(**TINY, left_out=0.0), nn.ModuleDict({"generator": cascade()}), []
        monkeypatch.setattr(Cascade, "loss", lambda self, volumes, numbers: seen.append(numbers) or torch.zeros(()))
        method.learn(nets, batch(), None, Moment(0, 10))
        assert torch.equal(seen[0], nets["generator"].facts.number(batch().labels)) and len(seen[0].unique()) > 1


@pytest.mark.component("low resolution first")
class TestStages:
    def test_low_resolution_is_the_mean_of_blocks(self):
        x = torch.randn(2, 3, 8, 12, 4)
        low = reduced(x)
        assert low.shape == (2, 3, 2, 3, 1)
        for z, y in product(range(2), range(3)):
            block = x[:, :, 4 * z : 4 * z + 4, 4 * y : 4 * y + 4]
            torch.testing.assert_close(low[:, :, z, y, 0], block.mean((2, 3, 4)))
            assert (enlarged(low)[:, :, 4 * z : 4 * z + 4, 4 * y : 4 * y + 4] == low[:, :, z, y, None, None]).all()

    def test_the_second_stage_learns_from_spoilt_volumes(self):
        torch.manual_seed(0)
        low = 5 * torch.ones(400, 1, 4, 4, 4)
        found = spoilt(low)
        shares = 1 - found.mean((1, 2, 3, 4)) / 5
        torch.testing.assert_close(found.std((1, 2, 3, 4)), shares, atol=0.1, rtol=0.2)
        assert shares.min() < 0.05 and 0.35 < shares.max() < 0.48
        assert shares.mean().item() == pytest.approx(0.2, abs=0.02)

    def test_the_loss_is_that_of_both(self):
        """Of networks that give zeros: the mean squares of the volumes themselves, which is the wanted answer."""
        net, x = cascade(), enlarged(torch.randn(2, 3, 4, 4, 4)) + torch.randn(2, 3, *SIZE)
        net.low, net.fine = Says(lambda x, **_: 0 * x), Says(lambda x, **_: 0 * x)
        found = net.loss(x, torch.tensor([1, 2]))
        assert found.item() == pytest.approx((reduced(x).square().mean() + x.square().mean()).item(), rel=1e-5)
        (low, told), (fine, mapped) = net.low.asked[0], net.fine.asked[0]
        assert low.shape[2:] == (4, 4, 4) and set(told) == {"tokens"}
        assert fine.shape == x.shape and set(mapped) == {"maps"} and mapped["maps"].shape == x.shape
        assert not torch.allclose(mapped["maps"], enlarged(reduced(x)), atol=0.01)
        assert torch.corrcoef(torch.stack([mapped["maps"].flatten(), enlarged(reduced(x)).flatten()]))[0, 1] > 0.8

    def test_detail_is_added_to_what_the_first_stage_made(self):
        net, low = cascade(), torch.randn(2, 3, 4, 4, 4)
        net.low = Says(lambda x, **_: low.repeat(2, 1, 1, 1, 1))
        net.fine = Says(lambda x, maps: maps)
        torch.testing.assert_close(net.paint(torch.tensor([1, 2]), SIZE, 2.0), enlarged(low))

    def test_arms_differ_in_what_they_are_called(self):
        settings = {name: arm.method.settings() for name, arm in recipe.arms.items()}
        changed = {
            name: {key for key, value in mine.items() if value != settings["medsyn"][key]}
            for name, mine in settings.items()
        }
        assert changed["without joint anatomy"] == {"joint"}
        assert changed["one stage"] == {"joint", "low", "fine"} and changed["one stage, joint"] == {"low", "fine"}

    def test_one_stage_has_as_many_parameters_as_two(self):
        one, two = (parameters(recipe.arms[arm].method.generator(1, 3)) for arm in ("one stage", "medsyn"))
        assert one == pytest.approx(two, rel=0.1)

    @pytest.mark.parametrize("low", [LOW, ()])
    def test_no_convolution_is_two_slices_deep_at_full(self, low):
        """There the gradient of a convolution in bfloat16 reads memory that nobody has written."""
        net, depths = Cascade(1, 2, low, FINE), set()
        for part in net.modules():
            if isinstance(part, nn.Conv3d) and part.kernel_size[0] > 1:
                part.register_forward_hook(lambda part, inputs, out: depths.add(inputs[0].shape[2]))
        net.loss(torch.randn(1, 3, 32, 56, 40), torch.tensor([0]))
        assert depths == {4, 8, 16}


@pytest.mark.component("masks along with the image")
class TestMasks:
    def test_they_are_further_channels(self):
        found = cascade().volumes(batch().images, batch().labels)
        assert torch.equal(found[:, :1], batch().images)
        for value in (1, 2):
            assert torch.equal(found[:, value] == 1, batch().labels == value)
            assert torch.equal(found[:, value] == -1, batch().labels != value)
        assert torch.equal(cascade(structures=0).volumes(batch().images, batch().labels), batch().images)

    def test_labels_are_what_the_masks_say(self, monkeypatch):
        """And images are as bright as prepared ones."""
        some = batch(9)
        paint = lambda self, numbers, size, guidance: self.volumes(3 * some.images + 7, some.labels)  # noqa: E731
        monkeypatch.setattr(Cascade, "paint", paint)
        nets = nn.ModuleDict({"sampler": cascade(), "made": Bank()})
        images, made = MedSyn(**TINY).make(nets, batch(), None)
        assert torch.equal(made, some.labels.long())
        torch.testing.assert_close(images.mean((1, 2, 3, 4)), torch.zeros(9), atol=1e-5, rtol=0)
        torch.testing.assert_close(images.std((1, 2, 3, 4)), torch.ones(9))

    def test_sentences_take_turns(self, monkeypatch):
        seen = []
        paint = lambda self, numbers, size, guidance: (  # noqa: E731
            seen.append(numbers) or torch.randn(len(numbers), 3, *size)
        )
        monkeypatch.setattr(Cascade, "paint", paint)
        nets = nn.ModuleDict({"sampler": cascade(), "made": Bank()})
        for _ in range(3):
            nets["made"].put(*replace(MedSyn(**TINY), volumes=6).make(nets, batch(), None))
        assert torch.cat(seen).tolist() == [*range(9), *range(9)] and len(nets["made"]) == 18


@pytest.mark.component("images for given anatomy")
class TestGivenAnatomy:
    @pytest.mark.parametrize("low", [LOW, ()])
    def test_masks_stand_and_the_image_fits_them(self, low):
        net, numbers, made = cascade(low=low), torch.tensor([1, 2]), []
        for given in (batch(2).labels, batch(2).labels.flip(1)):
            known = net.volumes(torch.zeros(2, 1, *SIZE), given)
            torch.manual_seed(1)
            made.append(net.paint(numbers, SIZE, 2.0, known))
            assert torch.equal(made[-1][:, 1:], known[:, 1:]) and made[-1][:, 0].std() > 0
        assert not torch.allclose(made[0][:, 0], made[1][:, 0], atol=1e-3)

    def test_the_first_stage_is_held_to_their_reduced_selves(self):
        net, known = cascade(), torch.randn(2, 3, *SIZE)
        net.low, net.fine = Says(lambda x, **_: 0 * x), Says(lambda x, maps: maps)
        net.paint(torch.tensor([1, 2]), SIZE, 2.0, known)
        for _, told in net.fine.asked:
            torch.testing.assert_close(told["maps"][:, 1:], enlarged(reduced(known))[:, 1:])
            assert (told["maps"][:, 0] == 0).all()

    def test_what_is_known_is_not_changed(self):
        clean, known = torch.zeros(1, 3, 2), torch.ones(1, 3, 2)
        found = keeping(known, slice(1, None))(clean, 5)
        assert found[0, :, 0].tolist() == [0, 1, 1] and (clean == 0).all()


@pytest.mark.component("anatomical features retained")
class TestScore:
    def test_it_is_the_mean_dice(self):
        found, truth = torch.rand(4, 6, 6) > 0.5, torch.rand(6, 6) > 0.5
        dice = lambda a, b: 2 * (a & b).sum().item() / (a.sum() + b.sum()).item()  # noqa: E731
        pairs = [dice(found[i], found[j]) for i in range(4) for j in range(i)]
        scores = likeness(found.numpy(), truth.numpy())
        assert scores["anatomy"] == pytest.approx(np.mean([dice(mask, truth) for mask in found]))
        assert scores["alike"] == pytest.approx(np.mean(pairs))
        assert likeness(found[:1].numpy(), truth.numpy())["alike"] == 1

    def test_a_case_sees_the_volumes_of_its_sentence(self):
        """Two volumes for each sentence, which show labels of which it is true; their own masks are shifted."""
        facts, bank, truths = Facts(), Bank(), []
        for whole, share in product((200, 500, 1250), (0.3, 0.5, 0.7)):
            truths.append(labels(whole, int(whole * share)))
            facts.see(truths[-1])
        every = torch.cat(truths * 2)
        bank.put(every[:, None], every.roll(1, dims=1))
        nets = nn.ModuleDict({"sampler": nn.ModuleDict({"facts": facts}), "made": bank})
        fitted = SimpleNamespace(
            method=MedSyn(),
            nets=nets,
            weights={"last": nets.state_dict()},
            task=SimpleNamespace(
                preparation=SimpleNamespace(labels=lambda case: torch.from_numpy(case.label)[None]),
                structures={1: "one", 2: "two"},
            ),
            answer=lambda images: nn.functional.one_hot(images[:, 0].long(), 3).movedim(-1, 1).float(),
        )
        for truth in truths:
            case = Case(np.zeros((1, *SIZE), np.float32), truth[0].numpy(), (1.0, 1.0, 1.0), "a case", "a patient")
            rows = anatomy_rows(fitted, case)
            assert [row["structure"] for row in rows] == ["one", "two"]
            for row in rows:
                assert row["anatomy"] == row["alike"] == row["obeyed"] == 1 and row["agreement"] < 0.9
        fitted.method = MedSyn(joint=False)
        assert np.isnan(anatomy_rows(fitted, case)[0]["agreement"])


@pytest.mark.component("GANs and other diffusion models")
def test_the_segmenter_is_the_same_in_every_arm(monkeypatch):
    """To the last bit: arms differ in what is made alone."""
    monkeypatch.setattr(medsyn, "STEPS", 1)
    weights = []
    for low, joint in product((LOW, ()), (True, False)):
        torch.manual_seed(0)
        method = replace(MedSyn(**TINY), making=1, low=low, joint=joint)
        nets = method.build(1, 3, 3)
        optimiser, schedule = method.optimise([p for p in nets.parameters() if p.requires_grad], 10)
        for step in range(10):
            torch.manual_seed(step)
            now = Moment(step, 10)
            method.training_step(nets.train(), batch(), None, now).backward()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            method.after_step(nets, now)
        assert len(nets["made"]) == 9 and nets["sampler"].facts.seen[0, 0] == 5 * 4
        weights.append(nets["average"].state_dict())
    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())


@pytest.mark.parametrize("low", [LOW, ()])
def test_every_parameter_learns(low):
    net = cascade(low=low)
    net.loss(net.volumes(batch(3).images, batch(3).labels), torch.tensor([0, 5, EMPTY])).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("size", [(8, 64, 64), (32, 56, 40), SIZE])
@pytest.mark.parametrize("low", [LOW, ()])
def test_any_size(size, low, monkeypatch):
    monkeypatch.setattr(medsyn, "STEPS", 2)
    monkeypatch.setattr(medsyn, "FINE_STEPS", 1)
    with torch.no_grad():
        assert cascade(low=low).paint(torch.tensor([4]), size, 2.0).shape == (1, 3, *size)
