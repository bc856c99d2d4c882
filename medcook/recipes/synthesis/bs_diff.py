"""BS-Diff, bone suppression by diffusion (Chen, Sun, Ge, Qin, Pan, Deng, Liu, Min, Elazab, Wan and Wang, ISBI 2024).

Idea: what an X-ray would be without bones is made from noise by a conditional diffusion model, which sees the X-ray
beside what it makes; then an autoencoder, trained on what was made, restores the detail that this lost.

  first   E |f(y_t, t, x) - target|^2, y_t the noised X-ray without bones, x the X-ray itself
  made    y' from noise, by f, for the training patients; kept
  second  y'' = y' + A(y'),   loss |y'' - y| + (1 - SSIM(y'', y)) + a J(y''),   J the opinion of a judge, a = 0.01

Both are trained one after the other in one run, as there: the autoencoder never sees the X-ray with bones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medcook.methods import Batch, Moment
from medcook.pretraining import follow, fresh, nothing
from medcook.projections import suppression_rows
from medcook.recipes.imperfect_labels._adversarial import PatchJudge
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.synthesis._bones import (
    CALLS,
    DIFFUSION,
    PhasedSuppression,
    PixelDiffusion,
    UNetSuppression,
    hybrid_loss,
    noise_like,
    seeing,
)
from medcook.recipes.synthesis._denoiser import Denoiser, folded, unfolded
from medcook.recipes.synthesis._settings import HEADS, NECKS, XRAY_BUDGET, scales
from medcook.synthesis import Bank


class Enhancer(nn.Module):
    """An autoencoder that adds to an image (B, 1, H, W) what it finds missing; nothing before it has learnt.

    In between there are 8 numbers for each 4 x 4 pixels, half as many as there were: the share of the official one.
    """

    def __init__(self, width: int = 32, latents: int = 8, fold: int = 2):
        super().__init__()
        self.fold = fold
        self.inward = nn.Sequential(
            nn.Conv2d(fold**2, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, latents, 3, padding=1),
        )
        self.outward = nn.Sequential(
            nn.Conv2d(latents, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, fold**2, 3, padding=1),
        )
        nn.init.zeros_(self.outward[-1].weight), nn.init.zeros_(self.outward[-1].bias)

    def forward(self, images: Tensor) -> Tensor:
        return images + unfolded(self.outward(self.inward(folded(images, self.fold))), self.fold).float()


class Generator(nn.Module):
    """What the first phase trains: a denoiser, the average of its weights, and a bank of what that made."""

    def __init__(self):
        super().__init__()
        self.denoiser = Denoiser(inputs=2)
        self.sampler, self.made = fresh(self.denoiser), Bank()

    def make(self, xrays: Tensor, calls: int) -> Tensor:
        """X-rays (B, 1, H, W) without their bones, from the same noise each time."""
        return DIFFUSION.sample(seeing(self.sampler, xrays), noise_like(xrays), calls)


@dataclass
class BSDiff(PhasedSuppression):
    """Diffusion for `share` of the steps, then enhancement of what it made in the last `making` of these.

    enhanced  False: nothing happens in the steps of making and enhancing, which then come before the others
    calls     of the denoiser, in a row, for an image
    """

    share: float = 0.7
    making: int = 12
    enhanced: bool = True
    calls: int = CALLS

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        nets = super().build(inputs, classes, dims)
        nets["judge"] = PatchJudge(1)
        return nets

    def model(self, inputs: int, classes: int, dims: int) -> nn.Module:
        return Enhancer()

    def pretext_parts(self, model: nn.Module, inputs: int, dims: int) -> nn.Module:
        return Generator()

    def phase(self, now: Moment) -> tuple[bool, Moment]:
        if self.enhanced:
            return super().phase(now)
        first = self.first(now.steps)
        waits = now.steps - max(1, first - self.making)
        return now.step >= waits, Moment(max(now.step - waits, 0), first)

    def learning(self, now: Moment) -> bool:
        """Whether the denoiser learns in a step of its phase; afterwards it makes images."""
        return now.step < max(1, now.steps - self.making)

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        xrays, soft = self.pair(images.images)
        generator = nets["pretext"]
        if self.learning(now):
            return DIFFUSION.loss(seeing(generator.denoiser, xrays), soft)
        self.fill(generator, images)
        return nothing()

    def fill(self, generator: Generator, images: Batch) -> None:
        """Put what is made of X-rays (B, 2, H, W), and what it should be, into the bank."""
        xrays, soft = self.pair(images.images)
        generator.made.put(torch.cat([generator.make(xrays, self.calls), soft], dim=1), images.labels)

    def after_pretext(self, nets: nn.ModuleDict, now: Moment) -> None:
        if self.learning(now):
            follow(nets["pretext"].sampler, nets["pretext"].denoiser, now.decay(self.average))

    def supervised(self, nets: nn.ModuleDict, labelled: Batch, now: Moment) -> Tensor:
        """The enhancer's loss on pairs from the bank: the patients' X-rays themselves take no part."""
        if not self.enhanced:
            return nothing()
        if not len(nets["pretext"].made):
            self.fill(nets["pretext"], labelled)
        made, soft = nets["pretext"].made.draw(len(labelled.images))[0].chunk(2, dim=1)
        return hybrid_loss(nets["model"](made), soft, nets["judge"])

    def suppress(self, nets: nn.ModuleDict, xrays: Tensor) -> Tensor:
        made = nets["pretext"].make(xrays, self.calls)
        return nets["average"](made) if self.enhanced else made


recipe = Recipe(
    paper="bs-diff",
    title="Bones taken out of X-rays by diffusion, and the detail put back",
    claim="Conditional diffusion with an enhancement module takes more of the bones out of X-rays than a U-Net that "
    "has as many steps and does it at once.",
    arms={
        "u-net": Arm(UNetSuppression()),
        "bs-diff": Arm(BSDiff()),
        "without enhancement": Arm(BSDiff(enhanced=False)),
        "diffusion, all steps": Arm(PixelDiffusion()),
    },
    compare=("bs-diff", "u-net"),
    ablation=("bs-diff", "without enhancement"),
    replicate="fold",
    metric="suppression",
    score=suppression_rows,
    scales=scales(HEADS, NECKS, "u-net", "bs-diff", "without enhancement", budget=XRAY_BUDGET),
    published={"bone suppression ratio, SZCH-X-Rays": 0.92428, "bone suppression ratio, JSRT": 0.88707},
    source="official code, github.com/Benny0323/BS-Diff (Stage1/Train.py, Stage1/Test.py, "
    "Stage2/Hybridloss_autoencoder.py, metrics.py); figures as measured again by its authors, "
    "github.com/diaoquesang/GL-LCM; abstract",
    components=(
        Component(
            "conditional diffusion model",
            "implemented",
            "a small U-Net sees the X-ray beside the noised one without bones, as there; 0.6 million parameters and no "
            "attention. It gives the clean image, as a change of the X-ray, and not the noise: two training patients "
            "who were held back decided so. There the way back is 1000 calls, each of which is handed the clean image "
            "that the last one saw; here 20 of DDIM, whose images were no different from 50",
        ),
        Component(
            "enhancement module",
            "implemented",
            "trained on what diffusion made for the training patients, and it never sees the X-ray, as there. It adds "
            "to the image what it finds missing, where there all of the image must pass through it: 180 steps, as many "
            "as are left here, did not teach MONAI's VQ-VAE to give an X-ray back (errors of 0.18 of what bones are). "
            "On the two patients, with a higher rate of diffusion, it changed next to nothing, 0.871 after 0.872: what "
            "diffusion had made looked right but for teeth, and no noise was left in it",
        ),
        Component(
            "hybrid loss",
            "implemented",
            "distance, structural dissimilarity and a judge's opinion in the official weights. The similarity has one "
            "scale instead of five, for which 64 pixels have no room. The distance of VGG features, of weight 0.001 "
            "there, is left out: no such network is at hand",
        ),
        Component(
            "bone suppression ratio",
            "simplified",
            "as 1 less the squared error's share of the bones' squares. There errors count on one side only, after the "
            "means are made equal, so that images too bright by the same everywhere lose nothing",
        ),
        Component(
            "pulmonary vessels",
            "absent",
            "necks, not lungs: in CT of the chest a ray is known no better, but there is none at hand. The column "
            "`detail` measures gradients",
        ),
        Component(
            "dual-energy X-rays of 120 patients",
            "simplified",
            "X-rays projected from CT of nine patients, of whom what bones add is known exactly; parallel rays of one "
            "energy, nine sides, 64 x 64",
        ),
        Component("clinical evaluation", "absent", "nobody is asked"),
    ),
)
