"""RoentGen (Chambon, Bluethgen, Delbrouck, Van der Sluijs, Polacin, Zambrano Chaves, Abraham, Purohit, Langlotz and
Chaudhari, arXiv 2211.12737, 2022; Bluethgen et al., Nature Biomedical Engineering 2024).

X-rays that fit a sentence: a diffusion model in the small space of an autoencoder, told by the sentence's words what to
show. Where the sentence names a finding, the X-ray comes with a label, so a classifier can learn from what was made.

  autoencoder  z = E(x), x about D(z); it is fitted first, and then stands still           (Rombach et al., CVPR 2022)
  words        tokens = T(sentence); the denoiser's deepest map attends to them. T learns along with the denoiser
  guidance     f(z_t, empty) + w (f(z_t, sentence) - f(z_t, empty)); in training the sentence is left out now and then
                                                                                  (Ho and Salimans, 2021, section 3.2)

Here everything starts from nothing, where the authors tune Stable Diffusion, and sentences say what is known of a
patient. The same 120 X-rays teach the generator and the classifier, which has as many steps in every arm. Every
patient outside the test set is scored once. What works was looked at on training patients of the first fold, whom the
other folds score.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from medcook.cohorts import OutcomeTask, outcome_rows
from medcook.data.transforms import Augment
from medcook.methods import Batch, Classifier, Moment
from medcook.methods.classification import image_labels
from medcook.preparation import Preparation
from medcook.recipes.fairness.cxr_clip_fairness import FINDING, captions, word
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.recipes.synthesis._denoiser import Denoiser, folded, guided, unfolded
from medcook.recipes.synthesis._diffusion import Diffusion
from medcook.synthesis import Synthesising, small
from medcook.tasks import Budget, Samples

SAID = ("site", "age", "sex")
"""What sentences tell beside the finding, where it is known."""
SENTENCES = (*captions(SAID), "")
"""By number; odd numbers are of patients with the finding, and the last sentence says nothing."""
EMPTY = len(SENTENCES) - 1
VOCABULARY = sorted({name for sentence in SENTENCES for name in sentence.split()})
WORDS = 4
"""In the longest sentence."""
DIFFUSION = Diffusion()
STEPS = 20
"""Steps of DDIM."""


@dataclass(frozen=True)
class PromptTask(OutcomeTask):
    """An outcome, and of every training image the number of its patient's sentence: the group.

    few  how many of the training patients train, evenly from their list; None: all
    """

    side: int = 64
    few: int | None = None

    @cached_property
    def labelled_patients(self) -> tuple[str, ...]:
        everyone = super().labelled_patients
        return tuple(everyone[k * len(everyone) // self.few] for k in range(self.few)) if self.few else everyone

    @cached_property
    def preparation(self) -> Preparation:
        return small(super().preparation, self.side)

    def sentence(self, attributes: dict) -> str:
        """What is known of a patient, in words."""
        told = (word(attribute, attributes) for attribute in SAID)
        return " ".join(filter(None, (FINDING[self.is_positive(attributes)], *told)))

    def samples(self, role: str) -> Samples:
        samples = super().samples(role)
        if role == "unlabelled":
            return samples
        cases = [case for patient in getattr(self, f"{role}_patients") for case in self.data.patients[patient]]
        numbers = [SENTENCES.index(self.sentence(self.data.attributes(case))) for case in cases]
        return Samples(samples.images, samples.labels, samples.case_of, None, torch.tensor(numbers)[samples.case_of])


class Autoencoder(nn.Module):
    """Images (B, C, *size) to `latents` maps of unit variance, a quarter as large on each side, and back.

    The best linear one for blocks of `fold` x `fold` pixels, their principal components: it needs no gradient, only
    the blocks' means and covariances over the images that it was shown.
    """

    def __init__(self, inputs: int, latents: int = 4, fold: int = 4):
        super().__init__()
        self.fold, pixels = fold, inputs * fold**2
        for name, start in (
            ("count", torch.zeros(())),
            ("sums", torch.zeros(pixels)),
            ("products", torch.zeros(pixels, pixels)),
            ("mean", torch.zeros(pixels)),
            ("axes", torch.eye(pixels)[:, :latents]),
            ("spread", torch.ones(latents)),
        ):
            self.register_buffer(name, start)

    @torch.no_grad()
    def see(self, images: Tensor) -> None:
        """Take images into account."""
        with torch.autocast(images.device.type, enabled=False):
            blocks = folded(images.float(), self.fold).movedim(1, -1).flatten(0, -2)
            self.count += len(blocks)
            self.sums += blocks.sum(0)
            self.products += blocks.T @ blocks
            mean = self.sums / self.count
            values, vectors = torch.linalg.eigh(self.products / self.count - torch.outer(mean, mean))
        latents = len(self.spread)
        self.mean.copy_(mean), self.axes.copy_(vectors[:, -latents:].flip(1))
        self.spread.copy_(values[-latents:].flip(0).clamp_min(1e-6).sqrt())

    def encode(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            blocks = folded(images.float(), self.fold).movedim(1, -1) - self.mean
            return (blocks @ self.axes / self.spread).movedim(-1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            blocks = (latents.float().movedim(1, -1) * self.spread) @ self.axes.T + self.mean
            return unfolded(blocks.movedim(-1, 1), self.fold)


class TextEncoder(nn.Module):
    """Numbers of sentences (B,) to tokens (B, WORDS, width): words, their places, and one layer of self-attention."""

    def __init__(self, width: int = 32):
        super().__init__()
        known = {name: number for number, name in enumerate(VOCABULARY, start=1)}
        rows = [[known[name] for name in sentence.split()] for sentence in SENTENCES]
        self.register_buffer("words", torch.tensor([row + [0] * (WORDS - len(row)) for row in rows]))
        self.embed = nn.Embedding(len(known) + 1, width)
        self.places = nn.Parameter(0.02 * torch.randn(WORDS, width))
        self.mix = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.mix(self.embed(self.words[numbers]) + self.places)


class TextToXray(nn.Module):
    """Latent diffusion: an autoencoder, a text encoder, and a denoiser of latents that attends to tokens."""

    def __init__(self, inputs: int, latents: int = 4, tokens: int = 32):
        super().__init__()
        self.autoencoder = Autoencoder(inputs, latents)
        self.text = TextEncoder(tokens)
        self.denoiser = Denoiser(latents, latents, channels=(32, 64, 64), tokens=tokens, fold=1)

    def loss(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Of the denoiser, told the sentences (B,), in the latents of a standing autoencoder."""
        tokens = self.text(numbers)
        return DIFFUSION.loss(lambda x, t: self.denoiser(x, t, tokens=tokens), self.autoencoder.encode(images))

    def paint(self, numbers: Tensor, start: Tensor, guidance: float) -> Tensor:
        """Images (B, C, *size) for sentences (B,), from noise (B, latents, *small)."""
        tokens = torch.cat([self.text(torch.full_like(numbers, EMPTY)), self.text(numbers)])
        net = lambda x, t: guided(self.denoiser, x, t, tokens, guidance)  # noqa: E731
        return self.autoencoder.decode(DIFFUSION.sample(net, start, STEPS))


@dataclass
class RoentGen(Synthesising, Classifier):
    """X-rays are made from the sentences of training patients; a classifier learns from them, too.

    each      how many X-rays are made of a sentence
    coding    in how many of the first steps the autoencoder still takes images into account
    dropped   how often a sentence is left out in training, which guidance needs
    guidance  w
    shuffled  in training each image has the sentence of another image of its batch
    """

    channels: tuple[int, ...] = (16, 32, 64, 128)
    rate: float = 2e-3
    loss: str = "cross-entropy"
    dropout: float = 0.2
    augmentation: Augment = Augment(rotate=10, scale=0.1, shift=0.05)
    each: int = 2
    coding: int = 8
    dropped: float = 0.1
    guidance: float = 3.0
    shuffled: bool = False

    uses_unlabelled = False
    trial = PromptTask("embedded", outcome="group", positive="atrophy", fold=0, folds=3, few=4)

    def model(self, inputs: int, classes: int, dims: int) -> nn.Module:
        return Classifier.build(self, inputs, classes, dims)["model"]

    def generator(self, inputs: int, classes: int) -> nn.Module:
        return TextToXray(inputs)

    def learn(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        images, generator = labelled.images, nets["generator"]
        if now.step < self.coding:
            generator.autoencoder.see(images)
        return generator.loss(images, self.told(sentences_of(labelled)))

    def told(self, numbers: Tensor) -> Tensor:
        """The sentences (B,) that a step of training tells of images with these sentences."""
        if self.shuffled:
            numbers = numbers[torch.randperm(len(numbers), device=numbers.device)]
        left_out = torch.rand(len(numbers), device=numbers.device) < self.dropped
        return torch.where(left_out, EMPTY, numbers)

    def make(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None) -> tuple[Tensor, Tensor]:
        numbers, generator = sentences_of(labelled).repeat(self.each), nets["sampler"]
        maps = generator.autoencoder.encode(labelled.images).shape[1:]
        images = generator.paint(numbers, torch.randn(len(numbers), *maps, device=numbers.device), self.guidance)
        finding = (numbers % 2).to(torch.uint8)
        return images, finding.view(-1, 1, 1).expand(-1, *labelled.labels.shape[1:])


def sentences_of(batch: Batch) -> Tensor:
    """(B,) int64 numbers of the sentences of a batch; where a task tells none they name the finding alone."""
    return image_labels(batch.labels, 2) if batch.groups is None else batch.groups


X_RAYS = PromptTask("chest_xray", fold=0, folds=3, few=120)
BRAINS = PromptTask("embedded", outcome="group", positive="atrophy", fold=0, folds=3)

recipe = Recipe(
    paper="roentgen",
    title="X-rays from sentences, and a classifier that learns from them",
    claim="A classifier of tuberculosis that learns from real X-rays and from X-rays that text-conditioned latent "
    "diffusion made has a higher AUC than one that has as many steps on the real X-rays alone.",
    arms={
        "real": Arm(RoentGen(making=0)),
        "real and made": Arm(RoentGen()),
        "made": Arm(RoentGen(mixed=1.0)),
        "real and made, sentences shuffled": Arm(RoentGen(shuffled=True)),
    },
    compare=("real and made", "real"),
    ablation=("real and made", "real and made, sentences shuffled"),
    replicate="fold",
    metric="auc",
    score=outcome_rows,
    scales={
        "quick": Scale(BRAINS, Budget(steps=40, batch=6, precision="float32", checks=2), replicates=1),
        "full": Scale(X_RAYS, Budget(steps=900, batch=16, checks=3)),
    },
    published={
        "a classifier's gain, real and synthetic X-rays": 0.05,
        "a classifier's gain, a larger and purely synthetic set": 0.03,
    },
    source="the abstract; the authors' repository, github.com/StanfordMIMI/RoentGen, has no code",
    components=(
        Component(
            "latent diffusion",
            "simplified",
            "trained from nothing in 524 steps, velocity, 20 steps of DDIM. The autoencoder is linear, the principal "
            "components of 4 x 4 pixels: in place of Stable Diffusion's, of which there are no weights here. A "
            "convolutional one that learned for 100 steps left four times as much error, and X-rays were blurred. Of "
            "those made now lungs, heart and ribs are seen, and the frame of each hospital; many are "
            "blotchy, and at guidance 3 their contrast is too high",
        ),
        Component(
            "text prompts",
            "simplified",
            "sentences say tuberculosis or not, site, age and sex, where reports say much more; words, places and one "
            "layer of self-attention, from nothing, in place of CLIP's text encoder. It learns with the denoiser, as "
            "theirs does",
        ),
        Component("classifier-free guidance", "implemented", "w = 3; a tenth of the sentences is left out"),
        Component(
            "augmentation with made X-rays",
            "implemented",
            "half of each batch is made. 512 X-rays are made, from the training patients' sentences",
        ),
        Component(
            "purely synthetic training",
            "implemented",
            "the arm `made`: 512 X-rays made by a generator that saw 120",
        ),
        Component(
            "architecture",
            "implemented",
            "Stable Diffusion 1's autoencoder and U-Net, 84 and 860 million weights, in `medcook.networks.latents` and "
            "`.stable_diffusion`, tested against an implementation of its own; the arms' networks are small ones",
        ),
        Component(
            "checkpoint",
            "implemented",
            "a folder in the format of diffusers, with older names of weights, too, is read offline and makes images "
            "of sentences; tested on a small one. RoentGen's own weights are given out on request, and not at hand",
        ),
        Component("adapting a pre-trained model", "absent", "weights of Stable Diffusion are not at hand"),
        Component("image quality, diversity, human experts", "absent", "a classifier's AUC is the measure here"),
        Component("knowledge distilled into the text encoder", "absent", "nothing was known to it before"),
    ),
)
