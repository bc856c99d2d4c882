"""I-MedSAM: spectra beside the encoder, answers at points, and which points are looked at again."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from medcook.methods import Batch, Moment
from medcook.recipes.sam_adaptation.i_medsam import IMedSam, Implicit, PointDecoder, code, grid, read, spectrum
from medcook.sam import adapting
from medcook.sam.adapting import fitted_in
from medcook.sam.model import SmallSam, small_config


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A model of one block with random weights."""
    torch.manual_seed(0)
    monkeypatch.setattr(adapting, "start", lambda pretrained=True: SmallSam(small_config(depth=1)))


@pytest.fixture
def model() -> Implicit:
    return IMedSam().build(1, 3, 2)["model"].eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 1, 24, 32)


@pytest.mark.component("frequency adapter")
class TestFrequency:
    def test_the_spectrum_is_numpys(self, images):
        found = np.log1p(np.abs(np.fft.fftshift(np.fft.fft2(images[0, 0].numpy()))))
        wanted = (found - found.min()) / (found.max() - found.min())
        assert np.allclose(spectrum(images)[0, 0].numpy(), wanted, atol=1e-5)

    def test_it_starts_as_the_encoder_and_keeps_the_image_s_finer_features(self, model, images):
        images = fitted_in(images)
        for mine, theirs in zip(model.embed(images), model.first.embed(images), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)

    def test_then_the_spectrum_is_heard(self, model, images):
        images = fitted_in(images)
        plain = model.embed(images).coarse
        model.gains.data.fill_(1.0)
        assert (model.embed(images).coarse - plain).abs().max() > 1e-3


@pytest.mark.component("implicit decoder")
class TestPoints:
    def test_features_are_read_between_pixels(self):
        features, points = torch.randn(1, 4, 10, 12), torch.rand(1, 50, 2) * 1.6 - 0.8
        rows, columns = (points[0, :, 1] + 1) * 5 - 0.5, (points[0, :, 0] + 1) * 6 - 0.5
        wanted = [ndimage.map_coordinates(one.numpy(), [rows, columns], order=1) for one in features[0]]
        assert np.allclose(read(features, points)[0].T.numpy(), wanted, atol=1e-5)

    def test_the_code_of_a_coordinate_is_sines_and_cosines(self):
        found = code(torch.tensor([[[0.3, -0.7]]]))[0, 0].numpy()
        angles = np.pi * np.array([0.3, -0.7])[:, None] * 2.0 ** np.arange(6)
        assert np.allclose(found, [0.3, -0.7, *np.sin(angles).ravel(), *np.cos(angles).ravel()], atol=1e-4)

    def test_the_answer_depends_on_features_and_on_the_place(self):
        decoder = PointDecoder(5, 3, choose="none")
        features, points, start = torch.randn(1, 9, 5), torch.rand(1, 9, 2), torch.zeros(1, 9, 3)
        said = decoder(features, points, start)[0]
        assert (decoder(features + 1, points, start)[0] - said).abs().max() > 1e-4
        assert (decoder(features, points / 2, start)[0] - said).abs().max() > 1e-4
        assert torch.allclose(decoder(features, points, start + 2)[0], said + 2, atol=1e-5)


@pytest.mark.component("output at any resolution")
class TestResolution:
    def test_without_points_it_is_the_segmenter(self, images):
        model = IMedSam(frequency=False, implicit=False).build(1, 3, 2)["model"].eval()
        assert torch.allclose(model(images), model.first(images), atol=1e-4)

    def test_a_grid_three_times_as_fine_holds_the_coarser_one(self, model, images):
        """Every point's coarse answer is the same, whatever grid it is asked on."""
        model.points.choose = "none"
        plain, finer = model(images), model(images, (72, 96))
        assert finer.shape == (2, 3, 72, 96)
        assert torch.allclose(finer[:, :, 1::3, 1::3], plain, atol=1e-4)

    def test_pixel_centres_lie_on_the_padded_square(self):
        points = grid(2, 4)
        assert torch.allclose(points[:4, 0], torch.tensor([-0.75, -0.25, 0.25, 0.75]))
        assert torch.allclose(points[[0, 4], 1], torch.tensor([-0.75, -0.25]))


@pytest.mark.component("uncertainty-guided sampling")
class TestSampling:
    def test_doubt_is_the_variance_of_two_halves(self):
        decoder = PointDecoder(5, 3)
        decoder.answer.weight.data.normal_()
        hidden, start = torch.randn(1, 40, 64), torch.randn(1, 40, 3)
        said = []
        for first in (0, 1):
            half = torch.zeros_like(hidden)
            half[..., first::2] = 2 * hidden[..., first::2]
            said.append((start + decoder.answer(half)).softmax(-1).detach().numpy())
        wanted = np.var(said, axis=0, ddof=1).mean(-1)
        assert np.allclose(decoder.doubt(hidden, start + decoder.answer(hidden)).numpy(), wanted, atol=1e-5)

    @pytest.mark.parametrize("choose", ["unsure", "spread"])
    def test_only_the_chosen_points_get_another_answer(self, choose):
        decoder = PointDecoder(5, 3, choose=choose)
        decoder.answer.weight.data.normal_()
        decoder.fine[-1].bias.data.fill_(3.0)
        features, points, start = torch.randn(2, 80, 5), torch.rand(2, 80, 2), torch.zeros(2, 80, 3)
        coarse, final = decoder(features, points, start)
        changed = (final - coarse).abs().amax(-1) > 1
        assert changed.sum(1).tolist() == [10, 10]
        if choose == "spread":
            assert changed[0].nonzero()[:, 0].tolist() == list(range(0, 80, 8))
        else:
            doubt = decoder.doubt(decoder.coarse(torch.cat([features, code(points)], -1)), coarse)
            assert all(doubt[k][changed[k]].min() >= doubt[k][~changed[k]].max() for k in range(2))


@pytest.mark.component("LoRA encoder")
def test_a_step_is_about_random_points_and_lora_learns_with_the_rest():
    method = IMedSam(sampled=64)
    nets = method.build(1, 3, 2)
    batch = Batch(torch.randn(2, 1, 24, 32), torch.randint(0, 3, (2, 24, 32)).byte())
    method.training_step(nets, batch, None, Moment(0, 10)).backward()
    named = dict(nets["model"].named_parameters())
    encoder = {name: p for name, p in named.items() if "vision_encoder" in name}
    assert all(("lora_" in name) == p.requires_grad for name, p in encoder.items())
    for name in ("gains", "points.coarse.0.weight", "points.fine.0.weight", "first.tokens"):
        assert named[name].grad.abs().max() > 0
