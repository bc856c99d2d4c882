"""Saliency-driven contours: flows that are gradients, energies that fall, and answers that know no start."""

from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.segmentation import morphological_chan_vese
from torch import Tensor

from medcook.data import IGNORE, Case
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.metrics import dice
from medcook.recipes.anatomy._boxes import BoxPreparation, BoxTask
from medcook.recipes.anatomy._level_sets import (
    STARTS,
    blurred,
    divergence,
    impulse,
    initial,
    means,
    slope,
    standard,
    step_up,
)
from medcook.recipes.anatomy.saliency_acm import (
    NOISE,
    RAMP,
    Contour,
    from_everywhere,
    recipe,
    saliency,
    salient,
    versions,
    widest,
)

ARMS = {name: arm.method for name, arm in recipe.arms.items()}
EVERY = pytest.mark.parametrize("arm", list(ARMS))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def disc(radius: float = 0.5, side: int = 40, at: tuple[float, float] = (0.1, -0.1)) -> Tensor:
    """(side, side) bool."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    return (y - at[0]).square() + (x - at[1]).square() < radius**2


def picture(**where) -> Tensor:
    """(1, 1, side, side): a bright disc, softened, with some noise, of unit variance."""
    image = blurred(disc(**where).float()[None, None], 0.8)
    return standard(image + 0.1 * torch.randn_like(image))


def of(answer: Tensor) -> Tensor:
    return answer[0, 0] > 0.5


class TestGrid:
    def test_gaussian_against_scipy(self):
        maps = torch.randn(2, 3, 20, 13)
        for sigma in (0.9, 3.0, 8.0):
            expected = ndimage.gaussian_filter(maps.numpy(), (0, 0, sigma, sigma), mode="mirror", truncate=2)
            assert np.allclose(blurred(maps, sigma), expected, atol=1e-5)
        assert torch.allclose(blurred(torch.ones(1, 1, 5, 40), 32.0), torch.ones(1, 1, 5, 40), atol=1e-5)

    def test_divergence_is_minus_the_transpose_of_the_slope(self):
        maps, field = torch.randn(2, 1, 7, 9).double(), slope(torch.randn(2, 1, 7, 9).double())
        assert torch.allclose((slope(maps) * field).sum(), -(maps * divergence(field)).sum())

    def test_impulse_is_the_derivative_of_the_step(self):
        f = torch.linspace(-6, 6, 25, dtype=torch.double).requires_grad_()
        (slopes,) = torch.autograd.grad(step_up(f, 1.5).sum(), f)
        assert torch.allclose(impulse(f, 1.5), slopes)
        assert step_up(f, 1.5)[12] == 0.5 and step_up(f, 1.5)[0] < 0.1

    def test_means_in_windows_pixel_by_pixel(self):
        values, inside = torch.randn(1, 1, 9, 8), torch.rand(1, 1, 9, 8)
        one, two = means(values, inside, 1.5)
        for y, x in np.ndindex(9, 8):
            spot = torch.zeros(1, 1, 9, 8)
            spot[..., y, x] = 1
            weights = torch.stack([blurred(torch.eye(72)[k].view(1, 1, 9, 8), 1.5)[0, 0, y, x] for k in range(72)])
            weights = weights.view(1, 1, 9, 8)
            within, without = weights * inside, weights * (1 - inside)
            assert one[0, 0, y, x].item() == pytest.approx(((within * values).sum() / within.sum()).item(), abs=1e-4)
            assert two[0, 0, y, x].item() == pytest.approx(((without * values).sum() / without.sum()).item(), abs=1e-4)

    def test_means_of_all(self):
        values, inside = torch.randn(2, 1, 9, 8), disc(side=9)[None, None, :, :8].float()
        one, two = means(values, inside, None)
        assert torch.allclose(one[1, 0, 0, 0], values[1, 0][inside[0, 0] == 1].mean(), atol=1e-5)
        assert torch.allclose(two[1, 0, 0, 0], values[1, 0][inside[0, 0] == 0].mean(), atol=1e-5)


@pytest.mark.component("level set with regularisation")
class TestFlow:
    @EVERY
    def test_it_is_minus_the_gradient_of_the_energy(self, arm):
        method = replace(ARMS[arm], length=0.3, distance=0.2)
        views = method.views(picture().double().float())
        f = torch.randn(1, 1, 40, 40).requires_grad_()
        (gradient,) = torch.autograd.grad(method.energy(f, views).sum(), f)
        assert torch.allclose(method.flow(f.detach(), views), -gradient, atol=2e-5)

    @pytest.mark.parametrize("term", ["length", "distance", "image"])
    def test_every_term_alone(self, term):
        nothing = dict(image=0.0, saliency=0.0, length=0.0, distance=0.0)
        method = Contour(**nothing | {term: 1.0})
        views = method.views(picture())
        f = (2 * torch.randn(1, 1, 40, 40)).requires_grad_()
        (gradient,) = torch.autograd.grad(method.energy(f, views).sum(), f)
        assert torch.allclose(method.flow(f.detach(), views), -gradient, atol=2e-5) and gradient.abs().max() > 1e-3

    def test_chan_vese_goes_down_with_its_means_too(self):
        """The means are the best there are: that they move as well changes nothing in the gradient."""
        image, f = picture(), torch.randn(1, 1, 40, 40).requires_grad_()
        inside = step_up(f, 1.5)
        one, two = (inside * image).sum() / inside.sum(), ((1 - inside) * image).sum() / (1 - inside).sum()
        energy = (inside * (image - one).square() + (1 - inside) * (image - two).square()).sum() / 2
        (gradient,) = torch.autograd.grad(energy, f)
        method = replace(ARMS["chan-vese"], length=0.0, distance=0.0)
        assert torch.allclose(method.flow(f.detach(), method.views(image)), -gradient, atol=1e-5)

    @EVERY
    def test_energy_falls(self, arm):
        method, image = ARMS[arm], picture()
        views, f = method.views(image), initial("corner", (40, 40))[None, None]
        energies = [method.energy(f, views).item()]
        for _ in range(60):
            f = method.moved(f, views)
            energies.append(method.energy(f, views).item())
        falls = np.diff(energies) < 1e-3 * energies[0]
        assert energies[-1] < 0.95 * energies[0] and falls.mean() > 0.95

    def test_length_shrinks_what_nothing_holds_and_distance_flattens(self):
        free = Contour(image=0.0, saliency=0.0, length=2.0, distance=0.0, steps=60)
        f = initial("small", (40, 40))[None, None]
        after = f
        for _ in range(60):
            after = free.moved(after, [])
        assert (after > 0).sum() < 0.7 * (f > 0).sum()
        steep = Contour(image=0.0, saliency=0.0, length=0.0, distance=0.1)
        after = 5 * f
        for _ in range(60):
            after = steep.moved(after, [])
        assert slope(after).abs().max() < 0.5 * slope(5 * f).abs().max()

    def test_lif_smooths_instead(self):
        method, f = ARMS["lif"], torch.randn(1, 1, 20, 20)
        assert torch.allclose(method.moved(f, []), blurred(f, 0.9)) and not method.length + method.distance


class TestAgainstOthers:
    @EVERY
    def test_a_disc_is_found(self, arm):
        """Also with light and dark exchanged, but for what is salient: that is bright."""
        image = picture()
        assert dice(of(ARMS[arm].enclosed(image)).numpy(), disc().numpy()) > 0.93
        if not ARMS[arm].saliency:
            assert dice(of(ARMS[arm].enclosed(-image)).numpy(), disc().numpy()) > 0.95

    def test_chan_vese_is_scikit_images(self):
        image = picture() + 0.4 * torch.randn(1, 1, 40, 40)
        theirs = morphological_chan_vese(
            image[0, 0].numpy(), 60, init_level_set=initial("middle", (40, 40)).numpy() > 0
        )
        assert dice(of(ARMS["chan-vese"].enclosed(image)).numpy(), theirs > 0) > 0.93


@pytest.mark.component("local image fitting (LIF)")
def test_windows_cope_with_uneven_light():
    """A ramp three times as strong as the edge: means of the whole image halve it, means in windows follow it."""
    ramp = torch.linspace(-3, 3, 40).expand(40, 40)
    image = standard(picture(radius=0.4) + ramp)
    local, everywhere = Contour(saliency=0.0, window=3.0, steps=300), ARMS["chan-vese"]
    found = [of(replace(method, start="middle").enclosed(image)).numpy() for method in (local, everywhere)]
    scores = [dice(mask & disc(0.7).numpy(), disc(0.4).numpy()) for mask in found]
    assert scores[0] > 0.8 > scores[1] + 0.1


@pytest.mark.component("saliency map")
class TestSaliency:
    def test_it_is_the_distance_from_the_mean(self):
        image = torch.randn(1, 1, 24, 20)
        smooth = ndimage.gaussian_filter(image[0, 0].numpy(), 2, mode="mirror", truncate=2)
        assert np.allclose(saliency(image, 2.0)[0, 0], np.abs(smooth - image.mean().item()), atol=1e-5)

    def test_what_is_bright_and_unlike_the_rest_is_salient(self):
        image = torch.zeros(1, 1, 40, 40)
        image[..., :10, :] = 0.5
        image[..., :, :6] = -1.0
        image[..., 20:28, 20:28] = 2.0
        found = salient(standard(image), 1.0)[0, 0]
        bright, rim, dark = found[22:26, 22:26].mean(), found[2:8, 10:].mean(), found[15:, 1:4].mean()
        assert bright > 2 and bright > 4 * rim and abs(dark - found.min()) < 0.1
        assert found.mean().abs() < 1e-5 and found.square().mean() == pytest.approx(1, abs=1e-4)

    def test_both_terms_pull_with_their_weights(self):
        image, f = picture(), torch.randn(1, 1, 40, 40)
        bare = dict(length=0.0, distance=0.0)
        parts = [Contour(**bare, image=a, saliency=b) for a, b in ((2.0, 0.0), (0.0, 3.0), (2.0, 3.0))]
        one, other, both = (method.flow(f, method.views(image)) for method in parts)
        assert torch.allclose(one + other, both, atol=1e-5) and min(one.abs().max(), other.abs().max()) > 1e-3
        assert [view.window for view in parts[2].views(image)] == [16.0, 32.0]
        assert torch.equal(parts[1].views(image)[0].values, salient(image, 2.0))

    def test_without_saliency_the_rest_stays(self):
        assert {k for k, v in asdict(ARMS["saliency-driven"]).items() if asdict(ARMS["without saliency"])[k] != v} == {
            "saliency"
        }


@pytest.mark.component("contour initialization independence")
class TestStarts:
    def test_they_are_what_they_say(self):
        sizes = {name: (initial(name, (41, 41)) > 0).float().mean().item() for name in STARTS}
        assert sizes["small"] == pytest.approx(0.2**2 * np.pi / 4, rel=0.1)
        assert sizes["large"] > 0.6 > sizes["middle"] > sizes["corner"]
        assert initial("corner", (41, 41))[10, 10] > 0 > initial("corner", (41, 41))[20, 20]
        assert ndimage.label(initial("many", (41, 41)).numpy() > 0)[1] == 9
        with pytest.raises(MedcookError, match="initial contour"):
            initial("nowhere", (8, 8))

    def test_the_start_is_used_and_answers_agree(self):
        image = picture()
        answers = [of(replace(ARMS["saliency-driven"], start=start).enclosed(image)).numpy() for start in STARTS]
        assert min(dice(answers[0], other) for other in answers) > 0.97
        at_once = [of(replace(ARMS["saliency-driven"], start=start, steps=0).enclosed(image)) for start in STARTS]
        assert not any(torch.equal(at_once[0], other) for other in at_once[1:])

    def test_the_object_is_the_side_with_less_of_the_border(self):
        still = Contour(steps=0)
        found = still.enclosed(picture())
        assert torch.equal(of(found), initial("middle", (40, 40)) > 0)
        everywhere = replace(still, start="large")
        STARTS["large"], kept = [(0.0, 0.0, 9.0)], STARTS["large"]
        try:
            assert everywhere.enclosed(picture()).max() < 0.5
        finally:
            STARTS["large"] = kept


def box_case() -> Case:
    """A volume of three slices; the structure 3 is widest in the second, and 1 is elsewhere."""
    label = np.zeros((3, 60, 50), np.uint8)
    label[0, 20:26, 12:18], label[1, 18:30, 10:22], label[:, 40:50, 30:45] = 3, 3, 1
    image = (label == 3) * 2.0 + (label == 1) * 0.5
    image += 0.1 * np.random.default_rng(0).standard_normal(image.shape)
    return Case(image[None].astype(np.float32), label, "case", "patient", spacing=(5.0, 1.0, 1.0))


class TestTask:
    def test_the_window_is_around_the_structure(self):
        case, preparation = box_case(), BoxPreparation(size=(64, 64), structure=3)
        window = preparation.window(case)
        assert window.centre == (23.5, 15.5) and window.scale == 64 / 24
        assert (preparation.labels(case)[1] == 3).float().mean() == pytest.approx(0.25, abs=0.02)
        assert BoxPreparation(size=(64, 64)).window(case).scale < window.scale
        empty = replace(case, label=np.full_like(case.label, IGNORE))
        assert preparation.window(empty) == BoxPreparation(size=(64, 64)).window(empty)

    def test_the_widest_slice(self):
        case = box_case()
        found = widest(case, case.label == 3)
        assert np.array_equal(found.label, case.label[1]) and np.array_equal(found.image, case.image[:, 1])
        assert found.spacing == (1.0, 1.0) and widest(found, found.label == 3) is found

    def test_labels_are_those_of_one_structure(self):
        task = BoxTask("embedded", labelled=1, structure=2)
        assert task.classes == 2 and task.structures == {1: "white matter"}
        assert task.samples("labelled").labels.unique().tolist() == [0, 1]
        assert task.describe() != BoxTask("embedded", labelled=1, structure=1).describe()


@pytest.mark.component("noise insensitivity")
class TestScore:
    def test_versions(self):
        image = picture()
        seen = versions(image, torch.Generator().manual_seed(3))
        assert list(seen) == ["clean", "noisy", "uneven"] and torch.equal(seen["clean"], image)
        assert np.corrcoef(image.ravel(), seen["noisy"].ravel())[0, 1] == pytest.approx(
            1 / np.sqrt(1 + NOISE**2), abs=0.02
        )
        axes = torch.meshgrid(torch.linspace(-1, 1, 40), torch.linspace(-1, 1, 40), indexing="ij")
        known = torch.stack([image.ravel(), *(axis.ravel() for axis in axes)], dim=1)
        weights = torch.linalg.lstsq(known, seen["uneven"].ravel()[:, None]).solution
        assert torch.allclose(known @ weights, seen["uneven"].view(-1, 1), atol=1e-4)
        assert weights[1:].norm() / weights[0] == pytest.approx(RAMP, abs=1e-3)

    def test_rows(self):
        case, method = box_case(), replace(ARMS["saliency-driven"], steps=60)
        task = SimpleNamespace(preparation=BoxPreparation(size=(64, 64), structure=3), structures={1: "ventricle"})
        fitted = SimpleNamespace(task=task, method=method, nets=method.build(1, 2, 2))
        (row,) = from_everywhere(fitted, case)
        assert row["structure"] == "ventricle" and row["case_id"] == "case"
        assert row["dice"] == pytest.approx((row["clean"] + row["noisy"] + row["uneven"]) / 3)
        assert row["worst"] < min(row["clean"], row["noisy"], row["uneven"]) + 1e-9 and row["dice"] > 0.85
        assert 0.85 < row["agreement"] <= 1
        assert from_everywhere(fitted, case) == [row]
        still = SimpleNamespace(task=task, method=replace(method, steps=0), nets=fitted.nets)
        assert from_everywhere(still, case)[0]["agreement"] < 0.5
        assert from_everywhere(fitted, replace(case, label=np.zeros_like(case.label))) == []


@EVERY
def test_nothing_is_learnt_and_any_size_and_number_of_classes_will_do(arm):
    method = ARMS[arm]
    nets = method.build(1, 4, 2)
    batch = Batch(torch.randn(2, 1, 33, 20), torch.zeros(2, 33, 20).byte())
    before = replace(method, steps=5).predict(nets, batch.images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = method.training_step(nets, batch, None, Moment(0, 2))
        assert torch.allclose(replace(method, steps=5).predict(nets, batch.images), before, atol=1e-6)
    loss.backward()
    assert nets["nothing"].weight.grad.abs().max() > 0 and method.after_step(nets, Moment(0, 2)) is None
    nets["nothing"].weight.data.fill_(7)
    assert torch.equal(replace(method, steps=5).predict(nets, batch.images), before)
    assert before.shape == (2, 4, 33, 20) and torch.allclose(before.sum(1), torch.ones(2, 33, 20), atol=1e-6)
    alone = replace(method, steps=5).predict(nets, batch.images[:1])
    assert torch.allclose(alone, before[:1], atol=1e-5)
