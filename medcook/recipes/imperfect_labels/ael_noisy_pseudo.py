"""Unpaired masks, pseudo-labels and noise (Wang, Guo, Wang and Zhang, IEEE TMI 2021; arXiv 2012.14584).

No training image has an annotation, but there are masks of other patients. A cycle-consistent GAN translates images to
masks and back; a discriminator of masks works in the latent space of a variational auto-encoder, where what counts is
shape. The masks of the images are pseudo-labels, and wrong in places; a segmentation network learns from them in
rounds, each time from the labels of the round before, with a Dice loss in which doubtful pixels count less.

    cycles     |G(E(x)) - x| and the cross-entropy of E(G(z)) and z, for images x and masks z
    adversary  least squares: z against E(x), as maps and as latents of the auto-encoder, and x against G(z)
    noise      1 - 2 sum_i w_i p_i y_i / sum_i w_i (p_i + y_i), w_i from 0 to 1, how sure of y_i its labeller was

The mechanism was developed on phantoms. Twice, for 300 steps each, it was looked at on validation patients of fold 4,
which is not scored; the first look showed that the segmentation network has to start before the rate has fallen.
"""

import math
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.errors import MedcookError
from medcook.imperfect import PartlyLabelled, UnpairedTask
from medcook.methods import Batch, Moment
from medcook.methods.method import follow
from medcook.methods.semi_supervised import noisy
from medcook.networks.unet import UNet
from medcook.recipes.imperfect_labels._adversarial import PatchJudge, frozen, played, structures
from medcook.recipes.imperfect_labels._settings import scales
from medcook.recipes.recipe import Arm, Component, Recipe


class CalibratedUNet(UNet):
    """A U-Net whose last features are weighted, channel by channel, by what a judge of masks feels about its output."""

    def __init__(self, *, feedback: int, inputs: int, classes: int, channels: tuple[int, ...]):
        super().__init__(inputs=inputs, classes=classes, channels=channels, dims=2)
        if feedback:
            self.calibration = nn.Sequential(
                nn.Conv2d(feedback, channels[0], 1), nn.ReLU(), nn.Conv2d(channels[0], channels[0], 1)
            )

    def calibrated(self, image: Tensor, judge: PatchJudge) -> Tensor:
        """Logits (B, classes, H, W) after a first answer was shown to the judge, which stays as it is."""
        features = self.features(image)
        felt = frozen(judge.body, shown(self.head(features)))
        weights = 2 * self.calibration(F.adaptive_avg_pool2d(felt, 1)).sigmoid()
        return self.head(features * weights)


class ShapeJudge(nn.Module):
    """A variational auto-encoder of masks on a 32 x 32 grid, and a judge of its latents (B, latents): (B, 1)."""

    def __init__(self, inputs: int, latents: int = 16, width: int = 8):
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(inputs, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)),
            *(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Flatten()),
            nn.Linear(2 * width * 64, 2 * latents),
        )
        self.decoder = nn.Sequential(
            *(nn.Linear(latents, 2 * width * 64), nn.LeakyReLU(0.2), nn.Unflatten(1, (2 * width, 8, 8))),
            *(nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)),
            nn.ConvTranspose2d(width, inputs, 4, stride=2, padding=1),
        )
        self.verdict = nn.Sequential(nn.Linear(latents, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def distribution(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance, (B, latents) each."""
        return self.encoder(F.adaptive_avg_pool2d(masks, 32)).float().clamp(-8, 8).chunk(2, dim=1)

    def forward(self, masks: Tensor) -> Tensor:
        return self.verdict(sampled(*self.distribution(masks)))

    def evidence(self, masks: Tensor) -> Tensor:
        """Negative evidence lower bound of masks (B, structures, H, W), a mean over the pixels of the grid."""
        mean, log_variance = self.distribution(masks)
        logits = self.decoder(sampled(mean, log_variance)).float()
        told = F.binary_cross_entropy_with_logits(logits, F.adaptive_avg_pool2d(masks, 32))
        return told + divergence(mean, log_variance) / logits[0].numel()


def sampled(mean: Tensor, log_variance: Tensor) -> Tensor:
    return mean + torch.randn_like(mean) * (log_variance / 2).exp()


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the standard normal distribution, the mean over the batch."""
    return (mean.square() + log_variance.exp() - log_variance - 1).sum(1).mean() / 2


def shown(logits: Tensor) -> Tensor:
    """What judges see of logits (B, classes, H, W): probabilities of the structures."""
    return logits.float().softmax(1)[:, 1:]


def whole(maps: Tensor) -> Tensor:
    """Maps of the structures (B, structures, H, W) with the background in front: (B, classes, H, W)."""
    return torch.cat([1 - maps.sum(1, keepdim=True), maps], dim=1)


def certainty(probabilities: Tensor) -> Tensor:
    """(B, H, W) from probabilities (B, classes, H, W): 1 where one class is certain, 0 where all are as likely."""
    classes = probabilities.shape[1]
    return (classes * probabilities.amax(1) - 1) / (classes - 1)


def weighted_dice(logits: Tensor, labels: Tensor, weights: Tensor, smooth: float = 1.0) -> Tensor:
    """Noise-weighted Dice loss of pseudo-labels (B, H, W) with weights (B, H, W), the mean over structures."""
    soft, truth = shown(logits), structures(labels, logits.shape[1])
    overlap, size = ((weights[:, None] * part).sum((0, 2, 3)) for part in (soft * truth, soft + truth))
    return 1 - ((2 * overlap + smooth) / (size + smooth)).mean()


def hardened(probabilities: Tensor) -> Tensor:
    """The likeliest class as zeros and ones (B, structures, H, W), with the gradient of the probabilities.

    Shades of a soft mask could carry the whole image past the cycle; a hard mask has room for shapes alone.
    """
    hard = structures(whole(probabilities).argmax(1), probabilities.shape[1] + 1)
    return hard + probabilities - probabilities.detach()


@dataclass
class PseudoLabelled(PartlyLabelled):
    """A GAN makes pseudo-labels from images and unpaired masks, and a segmentation network learns from these.

    game        the GAN is trained up to this share of the steps
    start       the segmentation network from this share on, while the rate of learning is still high
    rounds      of learning from pseudo-labels, equally long: at first the GAN's, then those of the round before
    cycle       weight of the two cycles
    shape       whether a discriminator works in the latent space of masks
    calibrates  whether the discriminator of masks calibrates the generator's channels
    weighted    whether doubtful pixels count less
    """

    loss: str = "dice"
    game: float = 0.6
    start: float = 0.3
    rounds: int = 2
    cycle: float = 10.0
    shape: bool = True
    calibrates: bool = True
    weighted: bool = True

    axes = 2
    trial = UnpairedTask("embedded", own="nothing", labelled=4)

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """`model` and `average` segment; `generator` and `painter` translate; `labeller` and `before` are averages."""
        if dims != self.axes:
            raise MedcookError("PseudoLabelled is for slices.", "Choose a task on slices.")
        nets = super().build(inputs, classes, dims)
        nets["mask judge"], nets["image judge"] = PatchJudge(classes - 1), PatchJudge(inputs)
        if self.shape:
            nets["shape judge"] = ShapeJudge(classes - 1)
        feedback = nets["mask judge"].width if self.calibrates else 0
        kind = dict(inputs=inputs, classes=classes, channels=self.channels[:-1])
        nets["generator"] = CalibratedUNet(feedback=feedback, **kind)
        nets["painter"] = UNet(inputs=classes - 1, classes=inputs, channels=self.channels[:3], dims=2)
        nets["labeller"] = deepcopy(nets["generator"]).requires_grad_(False)
        nets["before"] = deepcopy(nets["average"]).requires_grad_(False)
        return nets

    def round(self, now: Moment) -> int:
        """Which round of learning from pseudo-labels it is, from 0; below 0 before the first."""
        return math.floor((now.fraction - self.start) / (1 - self.start) * self.rounds)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The GAN's loss and the segmentation network's, each in its time; neither looks at labels of the images."""
        if labelled.raters is None:
            return super().training_step(nets, labelled, None, now)
        loss = torch.zeros((), device=labelled.images.device)
        if now.fraction < self.game:
            loss = loss + self.play(nets, F.avg_pool2d(labelled.images, 2), labelled.raters[:, 0, 1::2, 1::2])
        if self.round(now) >= 0:
            loss = loss + self.learn(nets, labelled.images, now)
        return loss

    def translated(self, nets: nn.ModuleDict, images: Tensor, who: str = "generator") -> Tensor:
        """Logits (B, classes, H, W) of the masks of images, on the GAN's grid."""
        if self.calibrates:
            return nets[who].calibrated(images, nets["mask judge"]).float()
        return nets[who](images).float()

    def play(self, nets: nn.ModuleDict, images: Tensor, masks: Tensor) -> Tensor:
        """Cycles and the game of images (B, C, H, W) and masks (B, H, W), both on a grid of half the sides."""
        true = structures(masks, nets["model"].head.out_channels)
        made = shown(self.translated(nets, images))
        painted = nets["painter"](true).float()
        repainted = nets["painter"](hardened(made)).float()
        remade = self.translated(nets, painted)
        cycles = (repainted - images).abs().mean() + F.cross_entropy(remade, whole(true).argmax(1))
        judge, fool = played(nets["mask judge"], noisy(true, 0.2), noisy(made, 0.2))
        of_images = played(nets["image judge"], images, painted)
        judge, fool = judge + of_images[0], fool + of_images[1]
        if self.shape:
            of_shapes = played(nets["shape judge"], true, made)
            judge, fool = judge + of_shapes[0] + nets["shape judge"].evidence(true), fool + of_shapes[1]
        return self.cycle * cycles + judge + fool

    def learn(self, nets: nn.ModuleDict, images: Tensor, now: Moment) -> Tensor:
        """Noise-weighted Dice loss on the pseudo-labels of this round."""
        with torch.no_grad():
            told = self.told(nets, images, now)
        weights = certainty(told) if self.weighted else torch.ones_like(told[:, 0])
        return weighted_dice(nets["model"](images), told.argmax(1), weights)

    def told(self, nets: nn.ModuleDict, images: Tensor, now: Moment) -> Tensor:
        """Probabilities (B, classes, H, W) of whoever labels in this round, told anew for every view of an image."""
        if self.round(now) > 0:
            return nets["before"](images).float().softmax(1)
        logits = self.translated(nets, F.avg_pool2d(images, 2), "labeller")
        return F.interpolate(logits, images.shape[2:], mode="bilinear").softmax(1)

    def after_step(self, nets: nn.ModuleDict, now: Moment) -> None:
        """The average of whatever is being trained follows it; at the end of a round it becomes the next labeller."""
        if now.fraction < self.game:
            follow(nets["labeller"], nets["generator"], self.pace(now.step))
        if self.round(now) >= 0:
            follow(nets["average"], nets["model"], self.pace(now.step - math.ceil(self.start * now.steps)))
            if self.round(Moment(now.step + 1, now.steps)) > self.round(now):
                nets["before"].load_state_dict(nets["average"].state_dict())

    def pace(self, step: int) -> float:
        """Decay of a moving average at its own step 0, 1, ...: faster at first."""
        return min(self.average, (step + 1) / (step + 10))


PLAIN = dict(weighted=False, rounds=1)

recipe = Recipe(
    paper="ael-noisy-pseudo",
    title="Noisy pseudo-labels and adversarial learning",
    claim="Without any annotation of the training images, pseudo-labels of a GAN with a discriminator of shapes and "
    "noise-robust learning reach a higher Dice on lungs than those of a plain cycle GAN.",
    arms={
        "cycle GAN": Arm(PseudoLabelled(shape=False, calibrates=False, **PLAIN)),
        "noisy pseudo-labels": Arm(PseudoLabelled()),
        "without noise-robust learning": Arm(PseudoLabelled(**PLAIN)),
        "without shapes": Arm(PseudoLabelled(shape=False)),
        "without calibration": Arm(PseudoLabelled(calibrates=False)),
        "human labels": Arm(PartlyLabelled(loss="dice"), changes={"own": "labels"}),
    },
    compare=("noisy pseudo-labels", "cycle GAN"),
    ablation=("noisy pseudo-labels", "without noise-robust learning"),
    replicate="fold",
    scales=scales(
        UnpairedTask("embedded", own="nothing"),
        UnpairedTask("chest_xray", own="nothing"),
        "cycle GAN",
        "noisy pseudo-labels",
        "without noise-robust learning",
        "human labels",
        steps=600,  # a GAN and a segmentation network share them
    ),
    source="the abstract, and public notes of readers on the figures; neither the full text nor code was at hand",
    components=(
        Component(
            "cycle-consistent GAN",
            "simplified",
            "at half the resolution, with U-Nets of 8 to 64 and 8 to 32 channels and small patch discriminators with "
            "spectral normalisation and instance noise. One optimiser: judges learn from detached fakes, translators "
            "through judges whose weights are held constant. The mask that is painted from is hard, with the gradient "
            "of the soft one, so that its shades cannot hide the image",
        ),
        Component(
            "unpaired auxiliary masks",
            "implemented",
            "half of the patients give images without annotation, the others masks without images; a shape model in "
            "place of real masks is left out, since lungs have none",
        ),
        Component(
            "VAE-based discriminator",
            "implemented",
            "as we read it: true and made masks as samples of 16 latents, told apart by a small network; the encoder "
            "learns to tell apart and, on true masks, to describe (32 x 32 places)",
        ),
        Component(
            "discriminator-guided generator channel calibration",
            "implemented",
            "as we read it: global pooling of the mask discriminator's features of a first answer, two 1 x 1 "
            "convolutions, and a weight from 0 to 2 for each channel of the generator's last features",
        ),
        Component(
            "noise-weighted Dice loss",
            "implemented",
            "the weights are ours: the certainty of the labeller, from chance (0) to certain (1)",
        ),
        Component(
            "iterative learning",
            "simplified",
            "two rounds of a single network, which starts while the GAN is still being trained; pseudo-labels are told "
            "anew for every augmented image and none is left out for its quality",
        ),
        Component("optic disc, fetal head and liver", "absent", "not at hand; lungs in X-rays are among the paper's"),
    ),
)
