"""Diffusion over label maps: the forward process, sampling, pseudo-labels, and prototypes that only labels move."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.methods import Batch, Moment
from medcook.recipes.semi_supervised.noisy_pseudo_diffusion import (
    TIMESTEPS,
    LabelDiffusion,
    Prototypes,
    flipped,
    process,
    sample,
    scaled,
    told,
)

TINY = dict(channels=(4, 8))
EARLY, LATE = Moment(0, 10), Moment(9, 10)
SIGNAL = np.cumprod(1 - np.linspace(1e-4, 2e-2, TIMESTEPS))
"""abar of Ho et al., by numpy."""


def batches() -> tuple[Batch, Batch]:
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 16, 16), generator=rng).byte()
    images = torch.randn(2, 2, 1, 16, 16, generator=rng)
    return Batch(images[0], labels), Batch(images[1], torch.full_like(labels, IGNORE))


def built(method: LabelDiffusion) -> nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(inputs=1, classes=3, dims=2).train()


def step(method: LabelDiffusion, nets: nn.ModuleDict, now: Moment, unlabelled: Batch | None = None) -> Tensor:
    torch.manual_seed(1)
    labelled, free = batches()
    return method.training_step(nets, labelled, unlabelled or free, now)


class Oracle(nn.Module):
    """Knows the label map whatever it sees, and keeps what it saw."""

    def __init__(self, labels: Tensor, classes: int, sureness: float = 50.0):
        super().__init__()
        self.answer, self.seen = scaled(labels, classes) * sureness, []
        self.head = nn.Identity()

    def features(self, seen: Tensor) -> Tensor:
        self.seen.append(seen)
        return self.answer.expand(len(seen), *self.answer.shape[1:])

    def forward(self, seen: Tensor) -> Tensor:
        return self.features(seen)


@pytest.mark.component("denoising diffusion")
def test_noise_is_added_in_closed_form():
    x, noise = torch.randn(2, 5, 3, 4, 4).unbind()
    times = torch.tensor([0, 10, 300, 700, 999])
    signal = torch.tensor(SIGNAL[times], dtype=torch.float32).view(-1, 1, 1, 1)
    found = process().add_noise(x, noise, times)
    assert torch.allclose(found, signal.sqrt() * x + (1 - signal).sqrt() * noise, atol=1e-4)
    assert (found[0] - x[0]).abs().max() < 0.05  # nearly clean at first
    assert (found[4] - noise[4]).abs().max() < 0.05  # nearly nothing left at last


@pytest.mark.component("denoising diffusion")
def test_the_network_is_told_image_noisy_labels_and_time():
    images, x = torch.randn(3, 1, 8, 8), torch.randn(3, 4, 8, 8)
    seen = told(images, x, torch.tensor([0, 999, 333]))
    assert torch.equal(seen[:, :1], images) and torch.equal(seen[:, 1:5], x)
    assert seen[:, 5].flatten(1).std(1).max() == 0
    assert seen[:, 5, 0, 0].tolist() == pytest.approx([-1, 1, -1 / 3])


@pytest.mark.component("denoising diffusion")
def test_labels_are_scaled():
    x = scaled(torch.tensor([[0, 2, IGNORE]], dtype=torch.uint8), 3)
    assert x[0].T.tolist() == [[1, -1, -1], [-1, -1, 1], [0, 0, 0]]


@pytest.mark.component("denoising diffusion")
@pytest.mark.parametrize("pure", [0.0, 0.5, 1.0])
def test_training_shows_labels_under_the_noise_of_their_time(pure):
    labels = torch.randint(0, 3, (16, 16, 16), dtype=torch.uint8)
    nets = {"model": Oracle(labels, 3), "prototypes": Prototypes(3, 3)}
    torch.manual_seed(0)
    LabelDiffusion(pure=pure, **TINY).denoise(nets, torch.zeros(16, 1, 16, 16), labels)
    (seen,) = nets["model"].seen
    times = ((seen[:, 4, 0, 0] + 1) / 2 * (TIMESTEPS - 1)).round().long()
    last = (times == TIMESTEPS - 1).float().mean()
    assert last == pure if pure != 0.5 else 0.2 < last < 0.8
    assert pure == 1 or len(times.unique()) > 4
    signal = torch.tensor(SIGNAL[times], dtype=torch.float32).view(-1, 1, 1, 1)
    noise = (seen[:, 1:4] - signal.sqrt() * scaled(labels, 3)) / (1 - signal).sqrt()
    assert abs(noise.mean()) < 0.05 and noise.std() == pytest.approx(1, abs=0.05)


@pytest.mark.component("denoising diffusion")
@pytest.mark.parametrize(("steps", "times"), [(1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])])
def test_sampling_steps_from_noise_to_labels(steps, times):
    labels = torch.randint(0, 3, (2, 8, 8), dtype=torch.uint8)
    network, noise = Oracle(labels, 3), torch.randn(2, 3, 8, 8)
    found = sample(network, torch.zeros(2, 1, 8, 8), noise, steps)
    assert torch.equal(found.argmax(1), labels.long())
    assert torch.equal(network.seen[0][:, 1:4], noise)
    expected, before = noise, SIGNAL[times[0]]
    for seen, time in zip(network.seen, times, strict=True):  # DDIM, eq. 12, with what the oracle tells
        assert torch.allclose(seen[:, 4], torch.tensor(2 * time / 999 - 1).float())
        if time != 999:
            guess = (expected - math.sqrt(before) * scaled(labels, 3)) / math.sqrt(1 - before)
            before = SIGNAL[time]
            expected = math.sqrt(before) * scaled(labels, 3) + math.sqrt(1 - before) * guess
        assert torch.allclose(seen[:, 1:4], expected, atol=1e-3)


@pytest.mark.component("denoising diffusion")
def test_an_image_has_one_answer():
    method = LabelDiffusion(**TINY)
    nets, images = built(method).eval(), batches()[0].images
    torch.manual_seed(5)
    with torch.no_grad():
        first = method.predict(nets, images)
        state = torch.random.get_rng_state()
        assert torch.equal(first, method.predict(nets, images))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.allclose(first[1:], method.predict(nets, images[1:]), atol=1e-5)
    assert torch.allclose(first.sum(1), torch.ones(2, 16, 16), atol=1e-5)


@pytest.mark.component("denoising diffusion")
def test_the_network_learns_to_tell_the_labels():
    method = LabelDiffusion(**TINY)
    nets = built(method)
    step(method, nets, EARLY).backward()
    assert all(p.grad is not None for p in nets["model"].parameters())
    assert all(nets["model"].down[0][0].weight.grad[:, part].abs().max() > 0 for part in range(5))
    labels = batches()[0].labels
    sure = {"model": Oracle(labels, 3), "prototypes": Prototypes(3, 3)}
    wrong = {"model": Oracle((labels + 1) % 3, 3), "prototypes": Prototypes(3, 3)}
    right, other = (LabelDiffusion(contrast=0.0).denoise(n, torch.zeros(2, 1, 16, 16), labels) for n in (sure, wrong))
    assert right < 0.01 < 1 < other


@pytest.mark.component("pseudo-labels")
def test_pseudo_labels_are_sampled_by_the_average():
    method = LabelDiffusion(steps=4, **TINY)
    answer = torch.randint(0, 3, (2, 16, 16), dtype=torch.uint8)
    nets = {"average": Oracle(answer, 3), "prototypes": Prototypes(3, 4)}
    found = method.sampled(nets, batches()[1].images)
    assert found.dtype == torch.uint8 and torch.equal(found, answer)
    assert len(nets["average"].seen) == 4
    one, other = nets["average"].seen[0][:, 1:4]
    assert one.std() == pytest.approx(1, abs=0.1) and not torch.equal(one, other)


@pytest.mark.component("pseudo-labels")
def test_unlabelled_images_learn_them_once_labels_have_been_learnt(monkeypatch):
    calls = []
    monkeypatch.setattr(LabelDiffusion, "sampled", lambda self, nets, images: torch.full((2, 16, 16), 2).byte())
    monkeypatch.setattr(
        LabelDiffusion,
        "denoise",
        lambda self, nets, images, labels, anchor=False: calls.append((images, labels, anchor)) or torch.tensor(1.0),
    )
    method, nets, (labelled, unlabelled) = LabelDiffusion(weight=0.5, **TINY), nn.ModuleDict(), batches()
    nets["model"], nets["prototypes"] = nn.Identity(), Prototypes(3, 4)
    assert step(method, nets, EARLY) == 1 and len(calls) == 1
    assert step(method, nets, LATE) == 1.5 and len(calls) == 3
    (images, labels, anchor), (views, pseudo, free) = calls[1:]
    assert torch.equal(images, labelled.images) and torch.equal(labels, labelled.labels) and anchor and not free
    assert (pseudo == 2).all() and 0 < (views - unlabelled.images).abs().max() < 0.3


def test_unlabelled_images_leave_nothing_behind():
    method = LabelDiffusion(**TINY)
    kept = []
    for shift in (0.0, 5.0):
        nets, unlabelled = built(method), batches()[1]
        step(method, nets, LATE, unlabelled._replace(images=unlabelled.images * (1 + shift) + shift))
        kept.append([buffer.clone() for name in ("model", "prototypes") for buffer in nets[name].buffers()])
    assert all(torch.equal(one, other) for one, other in zip(*kept, strict=True) if one.is_floating_point())


@pytest.mark.component("class prototypes")
def test_prototypes_are_moving_averages_of_labelled_features():
    labels = torch.tensor([[0, 0, 1, IGNORE]], dtype=torch.uint8)
    features = torch.tensor([[2.0, 0, 0], [0, 3, 0], [0, 0, 5], [9, 9, 9]]).T[None]
    prototypes = Prototypes(3, 3)
    prototypes.remember(features, labels, 0.9)
    half = math.sqrt(0.5)
    assert torch.allclose(prototypes.anchors, torch.tensor([[half, half, 0], [0, 0, 1], [0, 0, 0]]))
    assert prototypes.seen.tolist() == [True, True, False]
    turned = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]]).T[None]
    prototypes.remember(turned, labels, 0.9)
    first = np.array([0.9 * half + 0.1, 0.9 * half, 0])
    assert prototypes.anchors[0].numpy() == pytest.approx(first / np.linalg.norm(first), abs=1e-6)
    assert prototypes.anchors[1].numpy() == pytest.approx(np.array([0, 0.1, 0.9]) / math.hypot(0.1, 0.9), abs=1e-6)
    assert set(prototypes.state_dict()) == {"anchors", "seen"} and not list(prototypes.parameters())


@pytest.mark.component("class prototypes")
def test_labels_alone_move_them(monkeypatch):
    nets = built(method := LabelDiffusion(**TINY))
    labelled, unlabelled = batches()
    method.denoise(nets, unlabelled.images, labelled.labels)
    assert not nets["prototypes"].seen.any()
    method.denoise(nets, labelled.images, labelled.labels, anchor=True)
    assert nets["prototypes"].seen.all()
    assert torch.allclose(nets["prototypes"].anchors.norm(dim=1), torch.ones(3))


def anchored() -> Prototypes:
    prototypes = Prototypes(3, 3)
    prototypes.anchors.copy_(torch.eye(3))
    prototypes.seen.fill_(True)
    return prototypes


@pytest.mark.component("prototype-based contrastive consistency")
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_contrast_is_least_at_ones_own_prototype(temperature):
    labels = torch.randint(0, 3, (2, 8, 8), dtype=torch.uint8)
    labels[0, 0] = IGNORE
    own = torch.eye(3)[torch.where(labels == IGNORE, 0, labels).long()].movedim(-1, 1) * 7
    least = anchored().contrast(own, labels, temperature)
    assert least.item() == pytest.approx(math.log(1 + 2 * math.exp(-1 / temperature)), abs=1e-6)
    for _ in range(3):
        assert anchored().contrast(own + torch.randn_like(own), labels, temperature) > least
    assert anchored().contrast(own.roll(1, 1), labels, temperature) > 1 / temperature


@pytest.mark.component("prototype-based contrastive consistency")
def test_every_class_counts_the_same():
    labels = torch.tensor([[0] * 9 + [1, IGNORE]], dtype=torch.uint8)
    features = torch.randn(1, 3, 11)
    similarity = torch.nn.functional.normalize(features, dim=1)[0].T.numpy() / 0.2
    each = -np.log(np.exp(similarity) / np.exp(similarity).sum(1, keepdims=True))
    expected = (each[:9, 0].mean() + each[9, 1]) / 2
    assert anchored().contrast(features, labels, 0.2).item() == pytest.approx(expected, rel=1e-4)
    strangers = anchored()
    strangers.seen[1] = False
    assert strangers.contrast(features, labels, 0.2).item() == pytest.approx(each[:9, 0].mean(), rel=1e-4)
    assert anchored().contrast(features, torch.full_like(labels, IGNORE), 0.2) == 0


@pytest.mark.component("prototype-based contrastive consistency")
def test_features_are_pulled_to_their_prototype_and_pushed_from_the_others():
    features = torch.randn(1, 3, 8, 8, requires_grad=True)
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    anchored().contrast(features, labels, 0.1).backward()
    nearer = torch.nn.functional.normalize(features - 1e-2 * features.grad, dim=1)
    before, after = ((f / 0.1).log_softmax(1)[:, 0] for f in (torch.nn.functional.normalize(features, dim=1), nearer))
    assert (after >= before - 1e-5).all() and (after > before).float().mean() > 0.5


@pytest.mark.component("prototype-based contrastive consistency")
@pytest.mark.parametrize("anchor", [True, False])
def test_labels_and_pseudo_labels_are_contrasted(anchor):
    def loss(contrast: float) -> float:
        nets = built(method := LabelDiffusion(contrast=contrast, **TINY))
        nets["prototypes"].anchors.copy_(torch.eye(4)[:3])
        nets["prototypes"].seen.fill_(True)
        torch.manual_seed(1)
        return method.denoise(nets, batches()[0].images, batches()[0].labels, anchor).item()

    assert loss(1.0) - loss(0.0) > 0.1
    assert loss(2.0) - loss(1.0) == pytest.approx(loss(1.0) - loss(0.0), abs=1e-4)


@pytest.mark.component("noisy pseudo-labels")
def test_a_share_of_every_label_map_is_flipped_in_blobs():
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (4, 32, 32), dtype=torch.uint8)
    found = flipped(labels, 0.2, 3)
    changed = found != labels
    assert found.dtype == torch.uint8 and found.max() <= 2
    assert changed.flatten(1).float().mean(1).tolist() == pytest.approx([0.2] * 4, abs=0.01)
    assert max(ndimage.label(one)[1] for one in changed.numpy()) < 12
    assert torch.equal(flipped(labels, 0.0, 3), labels)
    assert flipped(labels[:, None].expand(-1, 8, -1, -1), 0.2, 3).shape == (4, 8, 32, 32)


@pytest.mark.component("noisy pseudo-labels")
def test_pseudo_labels_are_flipped_and_labels_are_not(monkeypatch):
    calls = []
    monkeypatch.setattr(LabelDiffusion, "sampled", lambda self, nets, images: torch.zeros(2, 16, 16).byte())
    monkeypatch.setattr(
        LabelDiffusion,
        "denoise",
        lambda self, nets, images, labels, anchor=False: calls.append(labels) or torch.tensor(0.0),
    )
    nets = nn.ModuleDict({"model": nn.Identity(), "prototypes": Prototypes(3, 4)})
    step(LabelDiffusion(flip=0.25, **TINY), nets, LATE)
    assert torch.equal(calls[0], batches()[0].labels)
    assert (calls[1] > 0).float().mean() == pytest.approx(0.25, abs=0.01)
