"""X-rays from sentences: latents, words, guidance, labels of what was made, and the classifier that learns from it."""

from dataclasses import replace

import numpy as np
import pytest
import stable_diffusion_weights as stable
import torch
from sklearn.decomposition import PCA

from medcook.errors import MedcookError
from medcook.methods import Batch, Classifier, Moment
from medcook.networks import latents, stable_diffusion
from medcook.recipes.synthesis import roentgen
from medcook.recipes.synthesis.roentgen import (
    DIFFUSION,
    EMPTY,
    SENTENCES,
    STEPS,
    Autoencoder,
    PromptTask,
    TextEncoder,
    TextToXray,
    guided,
    recipe,
    sentences_of,
)
from medcook.tasks import Budget
from medcook.training import Loop

METHODS = {name: arm.method for name, arm in recipe.arms.items()}
BOTH, REAL = (METHODS[name] for name in recipe.compare)
SHUFFLED = METHODS[recipe.ablation[1]]
TASK = PromptTask("embedded", labelled=4, outcome="group", positive="atrophy", side=32)


def batch(size: tuple[int, int] = (32, 32), count: int = 6, told: bool = True) -> Batch:
    rng = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, EMPTY, (count,), generator=rng)
    labels = (numbers % 2).byte().view(-1, 1, 1).expand(-1, *size).contiguous()
    images = torch.nn.functional.interpolate(torch.randn(count, 1, 8, 8, generator=rng), size, mode="bilinear")
    return Batch(images, labels, groups=numbers if told else None)


def awake(inputs: int = 1) -> TextToXray:
    """A generator of which no layer is zero any more, as at the start some are, and that has seen images."""
    torch.manual_seed(0)
    generator = TextToXray(inputs)
    for name, tensor in generator.named_parameters():
        torch.nn.init.normal_(tensor, std=0.3 if "text" in name or "attend" in name else 0.1)
    generator.autoencoder.see(batch().images)
    return generator.eval()


@pytest.mark.component("latent diffusion")
class TestLatents:
    def test_the_autoencoder_is_principal_component_analysis_of_blocks(self):
        images, coder = torch.randn(5, 1, 24, 16).cumsum(2).cumsum(3), Autoencoder(1, latents=3)
        for part in images.split(2):
            coder.see(part)
        blocks = images.numpy().reshape(5, 6, 4, 4, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 16)
        other = PCA(3, whiten=True).fit(blocks)
        latents = coder.encode(images)
        assert latents.shape == (5, 3, 6, 4)
        mine, theirs = latents.movedim(1, -1).flatten(0, -2).numpy(), other.transform(blocks)
        np.testing.assert_allclose(np.abs(mine), np.abs(theirs), rtol=2e-2, atol=2e-2)
        again = coder.decode(latents).numpy().reshape(5, 6, 4, 4, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 16)
        np.testing.assert_allclose(again, other.inverse_transform(theirs), rtol=1e-2, atol=2e-2)

    def test_with_as_many_latents_as_pixels_nothing_is_lost_also_under_autocast(self):
        images, coder = batch((48, 32)).images, Autoencoder(1, latents=16)
        with torch.autocast("cpu", torch.bfloat16):
            coder.see(images)
            torch.testing.assert_close(coder.decode(coder.encode(images)), images, rtol=1e-3, atol=1e-3)

    def test_it_sees_the_first_images_and_then_stands_still(self):
        torch.manual_seed(0)
        nets, data = BOTH.build(1, 2, 2).train(), batch()
        coder = nets["generator"].autoencoder
        for step in range(BOTH.coding):
            BOTH.learn(nets, data, None, Moment(step, 99)).backward()
            assert coder.count == 6 * 64 * (step + 1)
        before = {name: value.clone() for name, value in coder.state_dict().items()}
        BOTH.learn(nets, data, None, Moment(BOTH.coding, 99)).backward()
        assert all(torch.equal(value, before[name]) for name, value in coder.state_dict().items())

    def test_the_loss_is_that_of_noised_latents(self):
        generator, data = awake(), batch()
        torch.manual_seed(5)
        found = generator.loss(data.images, data.groups)
        torch.manual_seed(5)
        latents = generator.autoencoder.encode(data.images)
        t, noise = torch.randint(DIFFUSION.times, (6,)), torch.randn_like(latents)
        given = generator.denoiser(DIFFUSION.noised(latents, noise, t), t, tokens=generator.text(data.groups))
        torch.testing.assert_close(found, (given - DIFFUSION.wanted(latents, noise, t)).square().mean())

    def test_images_are_sampled_latents_decoded(self, monkeypatch):
        asked = []
        monkeypatch.setattr(
            type(DIFFUSION), "sample", lambda self, net, start, count: asked.append((start, count)) or start
        )
        generator, start = awake(), torch.randn(2, 4, 8, 8)
        made = generator.paint(torch.tensor([1, 2]), start, 2.0)
        assert torch.equal(made, generator.autoencoder.decode(start)) and made.shape == (2, 1, 32, 32)
        assert asked[0][0] is start and asked[0][1] == STEPS


@pytest.mark.component("text prompts")
class TestWords:
    def test_a_sentence_says_what_is_known_and_its_number_goes_along(self):
        samples = TASK.samples("labelled")
        cases = list(TASK.cases("labelled"))
        for case, number in zip(samples.case_of, samples.groups, strict=True):
            known, said = cases[int(case)].attributes, SENTENCES[number].split()
            assert said[0] == ("diseased" if known["group"] == "atrophy" else "clear") and known["site"] in said
            assert ("man" in said) == (known["sex"] == "M") and ("woman" in said) == (known["sex"] == "F")
        assert torch.equal(samples.groups % 2, samples.labels[:, 0, 0].long())

    def test_tokens_are_of_words_and_their_places(self):
        torch.manual_seed(0)
        text = TextEncoder().eval()
        one, other = (SENTENCES.index(s) for s in ("clear Shenzhen young man", "diseased Shenzhen young man"))
        assert not torch.allclose(text(torch.tensor([one])), text(torch.tensor([other])))
        words = text.words[torch.tensor([one])]
        torch.testing.assert_close(text(torch.tensor([one])), text.mix(text.embed(words) + text.places))
        assert (text.words[EMPTY] == 0).all() and len(text.words.unique(dim=0)) == len(SENTENCES)

    def test_the_denoiser_listens(self):
        generator, start = awake(), torch.randn(1, 4, 8, 8)
        made = [generator.paint(torch.tensor([number]), start, 1.0) for number in (0, 1)]
        assert (made[0] - made[1]).abs().max() > 1e-3
        torch.testing.assert_close(made[0], generator.paint(torch.tensor([0]), start, 1.0), rtol=0, atol=0)

    @pytest.mark.parametrize("size", [(64, 64), (96, 96), (32, 48)])
    def test_every_weight_learns_at_every_size(self, size):
        generator = awake()
        data = batch(size)
        generator.loss(data.images, data.groups).backward()
        for name, p in generator.named_parameters():
            assert p.grad is not None and (p.grad.abs().max() > 0 or "in_proj_bias" in name), name

    def test_where_a_task_tells_none_sentences_name_the_finding(self):
        data = batch(told=False)
        said = [SENTENCES[number] for number in sentences_of(data)]
        assert said == [("clear", "diseased")[label] for label in data.labels[:, 0, 0]]
        assert torch.equal(sentences_of(batch()), batch().groups)

    def test_few_patients_train_and_all_others_are_scored_as_before(self):
        whole, few = (replace(recipe.scales["quick"].task, few=number) for number in (None, 5))
        assert len(few.labelled_patients) == 5 < len(whole.labelled_patients)
        assert set(few.labelled_patients) <= set(whole.labelled_patients) and few.val_patients == whole.val_patients
        assert not few.unlabelled_patients


@pytest.mark.component("classifier-free guidance")
class TestGuidance:
    def test_it_goes_from_no_sentence_past_the_sentence(self):
        generator, x, t = awake(), torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
        numbers = torch.tensor([3, 8])
        tokens = torch.cat([generator.text(torch.tensor([EMPTY, EMPTY])), generator.text(numbers)])
        empty, told = (generator.denoiser(x, t, tokens=part) for part in tokens.chunk(2))
        for strength in (0.0, 1.0, 3.0):
            expected = (1 - strength) * empty + strength * told
            found = guided(generator.denoiser, x, t, tokens, strength)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_each_xray_is_guided_away_from_the_empty_sentence(self, monkeypatch):
        generator, given = awake(), []
        monkeypatch.setattr(roentgen, "guided", lambda net, x, t, tokens, w: given.append((tokens, w)) or x)
        generator.paint(torch.tensor([3, 8]), torch.randn(2, 4, 8, 8), 3.0)
        torch.testing.assert_close(given[0][0], generator.text(torch.tensor([EMPTY, EMPTY, 3, 8])))
        assert given[0][1] == 3.0

    def test_sentences_are_left_out_as_often_as_it_says(self):
        torch.manual_seed(0)
        numbers = torch.arange(2000) % EMPTY
        told = replace(BOTH, dropped=0.1).told(numbers)
        out = told == EMPTY
        assert 150 < out.sum() < 250 and torch.equal(told[~out], numbers[~out])


@pytest.mark.component("augmentation with made X-rays")
class TestMaking:
    def test_a_made_xray_has_the_label_of_its_sentence_and_comes_from_the_sampler(self):
        torch.manual_seed(0)
        nets, data = BOTH.build(1, 2, 2).eval(), batch()
        nets["sampler"].load_state_dict(awake().state_dict())
        torch.manual_seed(7)
        images, labels = BOTH.make(nets, data, None)
        torch.manual_seed(7)
        twice = data.groups.repeat(2)
        torch.testing.assert_close(images, nets["sampler"].paint(twice, torch.randn(12, 4, 8, 8), BOTH.guidance))
        assert images.shape == (12, 1, 32, 32) and torch.equal(labels, data.labels.repeat(2, 1, 1))

    def test_a_run_makes_more_than_there_are_real_ones_and_all_arms_have_as_many_steps(self, monkeypatch):
        budget, seen = Budget(20, 4, "float32", 0), {}
        plain = Classifier.training_step
        for name, method in METHODS.items():
            mine = seen.setdefault(name, [])
            monkeypatch.setattr(
                Classifier, "training_step", lambda *told, mine=mine: mine.append(told[2]) or plain(*told)
            )
            method = replace(method, channels=(8, 16), making=min(method.making, 3))
            run = Loop(method, TASK, budget, "float32", 0, TASK.samples("labelled"), None, None, False).run()
            assert ("made" in run.nets and len(run.nets["made"]) == 24) == (name != "real")
        assert {name: len(steps) for name, steps in seen.items()} == dict.fromkeys(METHODS, 8)
        assert all(len(one.images) == 4 for steps in seen.values() for one in steps)

    def test_at_full_the_made_set_is_the_larger_one(self):
        scale = recipe.scales["full"]
        assert BOTH.making * BOTH.each * scale.budget.batch > 4 * scale.task.few


@pytest.mark.component("purely synthetic training")
def test_the_third_arm_learns_from_made_xrays_alone(monkeypatch):
    made = METHODS["made"]
    assert replace(made, mixed=0.5) == BOTH
    torch.manual_seed(0)
    nets, data, seen = made.build(1, 2, 2), batch(), []
    nets["made"].put(torch.full((3, 1, 32, 32), 50.0), torch.ones(3, 32, 32))
    monkeypatch.setattr(Classifier, "training_step", lambda self, nets, labelled, *_: seen.append(labelled))
    for method in (made, BOTH):
        method.supervised(nets, data, Moment(0, 9))
    assert [int((one.images.flatten(1).mean(1) > 5).sum()) for one in seen] == [6, 3]


def test_the_ablation_tells_each_image_the_sentence_of_another_and_nothing_else_changes():
    assert replace(SHUFFLED, shuffled=False) == BOTH and replace(REAL, making=BOTH.making) == BOTH
    torch.manual_seed(0)
    numbers = torch.arange(40)
    plain, shuffled = (replace(method, dropped=0.0).told(numbers) for method in (BOTH, SHUFFLED))
    assert torch.equal(plain, numbers)
    assert sorted(shuffled.tolist()) == numbers.tolist() and (shuffled != numbers).float().mean() > 0.8


def test_the_classifier_is_the_books():
    torch.manual_seed(0)
    nets = REAL.build(1, 2, 2).eval()
    other = Classifier()
    assert (REAL.channels, REAL.rate, REAL.loss, REAL.dropout) == (
        other.channels,
        other.rate,
        other.loss,
        other.dropout,
    )
    found = other.build(1, 2, 2)
    assert str(found["model"]) == str(nets["model"])
    found = REAL.predict(nets, batch().images)
    assert found.shape == (6, 2, 32, 32) and (found[..., :1, :1] == found).all()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return stable.write(tmp_path_factory.mktemp("roentgen") / "model")


@pytest.mark.component("architecture")
class TestArchitecture:
    def test_the_published_sizes_are_those_of_stable_diffusion_1(self):
        with torch.device("meta"):
            unet, vae = stable_diffusion.UNet(), latents.Autoencoder()
        count = lambda model: sum(weight.numel() for weight in model.parameters())  # noqa: E731
        assert (count(unet), count(vae)) == (859_520_964, 83_653_863)

    def test_noise_is_found_as_by_an_implementation_of_its_own(self, checkpoint):
        rng, reference = torch.Generator().manual_seed(0), stable.Reference(stable.weights()["unet"], 1e-5)
        x, words, t = (
            torch.randn(2, 4, 8, 12, generator=rng),
            torch.randn(2, 5, 12, generator=rng),
            torch.tensor([7, 900]),
        )
        with torch.no_grad():
            found = stable_diffusion.StableDiffusion(checkpoint).unet(x, t, words)
        expected = torch.stack([reference.noise(*one) for one in zip(x, t.tolist(), words, strict=True)])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)

    def test_latents_are_made_and_read_as_by_an_implementation_of_its_own(self, checkpoint):
        rng, reference = torch.Generator().manual_seed(0), stable.Reference(stable.weights()["vae"], 1e-6)
        image, small = torch.randn(1, 3, 16, 24, generator=rng), torch.randn(1, 4, 4, 6, generator=rng)
        vae = stable_diffusion.StableDiffusion(checkpoint).vae
        with torch.no_grad():
            torch.testing.assert_close(vae.latents(image)[0], reference.encoded(image[0]), atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(vae.images(small)[0], reference.decoded(small[0]), atol=1e-4, rtol=1e-3)

    def test_noise_grows_as_published(self):
        signal = stable_diffusion.signals()
        betas = [(0.00085**0.5 + k / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2 for k in range(1000)]
        assert signal[0] == pytest.approx(1 - betas[0]) and signal[999] == pytest.approx(np.prod(1 - np.array(betas)))


@pytest.mark.component("checkpoint")
class TestCheckpoint:
    def test_sentences_become_images_offline_and_the_seed_decides(self, checkpoint):
        model = stable_diffusion.StableDiffusion(checkpoint)
        made = [model.images(["a b"], side=16, steps=2, seed=seed) for seed in (0, 0, 1)]
        assert made[0].shape == (1, 3, 16, 16) and made[0].min() >= 0 and made[0].max() <= 1
        assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])

    def test_guidance_goes_away_from_the_empty_sentence(self, checkpoint):
        model = stable_diffusion.StableDiffusion(checkpoint)
        plain, told = (model.images(["a b"], 16, 2, guidance) for guidance in (0.0, 1.0))
        assert torch.equal(plain, model.images([""], 16, 2, 5.0)) and not torch.equal(plain, told)

    def test_older_names_of_the_autoencoder_are_the_same(self, checkpoint, tmp_path):
        parts = stable.weights()
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            parts["vae"] = {
                name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): tensor
                for name, tensor in parts["vae"].items()
            }
        assert any("proj_attn" in name for name in parts["vae"])
        one, other = (
            stable_diffusion.StableDiffusion(folder).vae.state_dict()
            for folder in (checkpoint, stable.write(tmp_path / "old", parts))
        )
        assert all(torch.equal(one[name], other[name]) for name in one)

    @pytest.mark.parametrize("lost", ["mid_block.resnets.1.conv2.bias", "up_blocks.2.attentions.0.proj_in.weight"])
    def test_a_missing_weight_is_named(self, tmp_path, lost):
        parts = stable.weights()
        del parts["unet"][lost]
        with pytest.raises(MedcookError, match=rf"unet: this part .*{lost}"):
            stable_diffusion.StableDiffusion(stable.write(tmp_path / "short", parts))

    def test_damaged_folders_are_refused(self, tmp_path):
        folder = stable.write(tmp_path / "broken")
        weights = folder / "vae" / stable.FILE
        weights.write_bytes(weights.read_bytes()[:500])
        with pytest.raises(MedcookError, match="vae: this part of the checkpoint cannot be read"):
            stable_diffusion.StableDiffusion(folder)
        with pytest.raises(MedcookError, match="unet: this part"):
            stable_diffusion.StableDiffusion(tmp_path)

    def test_a_later_version_is_refused(self, tmp_path):
        folder = stable.write(tmp_path / "later")
        config = folder / "unet" / "config.json"
        config.write_text(config.read_text().replace('"attention_head_dim": 2', '"attention_head_dim": [2, 4, 4]'))
        with pytest.raises(MedcookError, match="Stable Diffusion 2 or later"):
            stable_diffusion.StableDiffusion(folder)
