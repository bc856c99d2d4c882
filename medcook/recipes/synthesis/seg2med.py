"""seg2med: segmentation-based medical image generation with denoising diffusion (arXiv 2504.09182, 2025).

Masks of organs say where anatomy is, and nothing of its grey values. A diffusion model that gets them beside the noisy
image makes an image to fit. Whether it does is asked of a segmenter that has only ever seen real images: what it finds
in the made image is compared with the masks that the image was made from.

  condition   c = (one map a structure, one map a tissue); tissues are what the masks of organs leave out: the outline
              of the body and the like, here three classes of brightness of a coarse image
  generator   E |f(x_t, c, t) - x|^2 over noised real images x_t of x, then from noise back with the same c
  fidelity    Dice(segmenter(made image), masks), and SSIM and PSNR of the made against the real image

Here these are slices of hearts. One run trains both networks, first the generator. The segmenter learns from real
pairs, the same to the last bit in every arm; arms differ in which image of a case it is shown.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from monai.metrics.regression import PSNRMetric, SSIMMetric
from torch import Tensor, nn

from medcook import evaluation, metrics
from medcook.data import Case
from medcook.data.transforms import Augment
from medcook.methods import Batch, Moment
from medcook.precision import autocast
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.synthesis._denoiser import Denoiser
from medcook.recipes.synthesis._diffusion import Diffusion
from medcook.recipes.synthesis._settings import scales
from medcook.sampling import trained
from medcook.synthesis import SmallTask, Synthesising

COARSE = 8
"""Pixels of which the mean brightness is known to the tissue maps, along each side: a 64th of the image's numbers."""
LEVELS = (-0.5, 0.5)
"""Brightness, in standard deviations from a case's mean, between the tissues: dark, middle and bright."""
DIFFUSION = Diffusion(target="image")
STEPS = 20
"""Steps of DDIM."""
MOST = 100.0
"""Decibels that are counted at most: a real image is no further from itself."""


def structure_maps(labels: Tensor, classes: int) -> Tensor:
    """(B, classes - 1, *size) float32, 1 where a structure is; from labels (B, *size). Unlabelled pixels have none."""
    return torch.stack([labels == value for value in range(1, classes)], dim=1).float()


def tissue_maps(images: Tensor) -> Tensor:
    """(B, 3, *size) float32, one-hot: where the coarse image is dark, middle or bright; from images (B, C, *size).

    It is the first channel, averaged over blocks of `COARSE` pixels, with straight lines between their centres.
    """
    blocks = F.avg_pool2d(images[:, :1].float(), COARSE)
    coarse = F.interpolate(blocks, images.shape[2:], mode="bilinear", align_corners=False)
    level = sum((coarse[:, 0] > bound).long() for bound in LEVELS)
    return F.one_hot(level, len(LEVELS) + 1).movedim(-1, 1).float()


@dataclass
class Seg2Med(Synthesising):
    """A generator of images from masks, and a segmenter that never sees what it makes but when it is scored.

    making    in how many steps images are made, to be looked at; 0: no generator learns, real images are scored
    told      the generator knows where the structures are; False: only the tissues
    diffuses  False: the same network gives the image from the maps in one step, by least squares
    """

    making: int = 1
    mixed: float = 0.0
    augmentation: Augment = Augment(rotate=15, scale=0.15, shift=0.1)
    told: bool = True
    diffuses: bool = True

    uses_unlabelled = False

    def generator(self, inputs: int, classes: int) -> nn.Module:
        maps = classes - 1 + len(LEVELS) + 1
        return Denoiser(inputs + maps, inputs, channels=(32, 64, 64), fold=2)

    def maps(self, images: Tensor, labels: Tensor, classes: int) -> Tensor:
        """The condition (B, classes + 2, *size) of images (B, C, *size) and labels (B, *size)."""
        structures = structure_maps(labels, classes)
        return torch.cat([structures if self.told else torch.zeros_like(structures), tissue_maps(images)], dim=1)

    def learn(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        images, generator = labelled.images, nets["generator"]
        maps = self.maps(images, labelled.labels, classes_of(generator, images))
        if self.diffuses:
            return DIFFUSION.loss(lambda x, t: generator(x, t, maps=maps), images)
        return (at_once(generator, images, maps) - images).square().mean()

    @torch.no_grad()
    def image_of(self, nets: nn.ModuleDict, maps: Tensor, start: Tensor) -> Tensor:
        """Images (B, C, *size) made from maps (B, M, *size), and from noise of the images' shape."""
        sampler = nets["sampler"]
        if not self.diffuses:
            return at_once(sampler, start, maps)
        return DIFFUSION.sample(lambda x, t: sampler(x, t, maps=maps), start, STEPS)

    def make(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None) -> tuple[Tensor, Tensor]:
        maps = self.maps(labelled.images, labelled.labels, classes_of(nets["sampler"], labelled.images))
        return self.image_of(nets, maps, torch.randn_like(labelled.images)), labelled.labels

    def shown(self, nets: nn.ModuleDict, images: Tensor, labels: Tensor, classes: int) -> Tensor:
        """What the segmenter sees of a case (N, C, *size): its images, or what is made from its masks (N, *size)."""
        if not self.makes_pairs:
            return images
        start = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        return self.image_of(nets, self.maps(images, labels, classes), start)


def classes_of(generator: Denoiser, images: Tensor) -> int:
    """How many classes a generator's maps tell apart: its maps are one more than structures and tissues."""
    inputs = generator.enter.in_channels // generator.fold**generator.dims
    return inputs - images.shape[1] - len(LEVELS)


def at_once(generator: Denoiser, images: Tensor, maps: Tensor) -> Tensor:
    """(B, C, *size) float32 from maps alone: nothing but zeros stands where the noisy image would be."""
    never = torch.zeros(len(images), dtype=torch.long, device=images.device)
    return generator(torch.zeros_like(images), never, maps=maps).float()


@torch.no_grad()
def fidelity_rows(fitted, case: Case) -> list[dict]:
    """One row a structure, on the grid that the networks see: what the segmenter finds in the image that it is shown.

    dice and the rest  against the case's masks, all slices together; distances are in pixels
    ssim, psnr         of the shown image against the real one, means over the slices; both held within the real
                       image's darkest and brightest percent and scaled to 0 to 1 (of itself: 1 and 100 dB)
    """
    task, method = fitted.task, fitted.method
    images, labels = task.preparation.images(case), task.preparation.labels(case)
    trained(fitted)
    with autocast(fitted.cost):
        shown = method.shown(fitted.nets, images, labels, task.classes).float()
    found, likeness = fitted.answer(shown).argmax(1), alike(shown, images)
    rows = []
    for value, name in task.structures.items():
        score = metrics.score((found == value).numpy(), (labels == value).numpy())
        rows.append(evaluation.row(case, name, **asdict(score), **likeness))
    return rows


def alike(shown: Tensor, real: Tensor) -> dict[str, float]:
    """ssim (a Gaussian window of 11 pixels) and psnr of images (N, 1, *size), see `fidelity_rows`."""
    low, high = torch.quantile(real.flatten()[:: max(1, real.numel() // 100_000)], torch.tensor([0.01, 0.99]))
    shown, real = (((image - low) / (high - low).clamp_min(1e-6)).clamp(0, 1) for image in (shown, real))
    similar, signal = SSIMMetric(2, data_range=1.0)(shown, real), PSNRMetric(max_val=1.0)(shown, real)
    return {"ssim": float(similar.mean()), "psnr": float(signal.clamp(max=MOST).mean())}


HEARTS = SmallTask("acdc", evaluation="test")
BRAINS = SmallTask("embedded")

recipe = Recipe(
    paper="seg2med",
    title="Images from masks, and whether a segmenter finds the masks again",
    claim="A segmenter trained on real images finds the masks in images that diffusion made from them as well as in "
    "the real images, within 0.03 Dice.",
    arms={
        "real": Arm(Seg2Med(making=0)),
        "made": Arm(Seg2Med()),
        "made, without masks": Arm(Seg2Med(told=False)),
        "one step": Arm(Seg2Med(diffuses=False)),
    },
    compare=("made", "real"),
    ablation=("made", "made, without masks"),
    expect="non-inferior",
    margin=0.03,
    score=fidelity_rows,
    scales=scales(BRAINS, HEARTS),
    published={
        "SSIM, CT of real patients": 0.94,
        "SSIM, MR of real patients": 0.89,
    },
    source="the abstract; no code was found",
    components=(
        Component(
            "diffusion conditioned on masks",
            "implemented",
            "beside the noisy image, as there; the network gives the clean image, on a cosine schedule: after "
            "539 steps of training the velocity left speckles, in which the segmenter lost 0.06 to 0.19 Dice. This was "
            "looked at on validation patients, and so were the images: hearts and chest walls are where they should "
            "be; what no map tells (vessels, trabeculae, the texture of the liver) is blurred or invented",
        ),
        Component(
            "tissue maps",
            "simplified",
            "TotalSegmentator knows many organs and the paper adds more outlines; acdc has three structures. "
            "Brightness of the image at an eighth of its resolution, in three classes, stands for the rest. Its maps "
            "come near the heart, too: the ablation, which has them alone, says how much they give away",
        ),
        Component(
            "anatomical fidelity",
            "implemented",
            "a U-Net trained on real pairs in the second phase of the same run stands for TotalSegmentator; three "
            "structures in place of 59, on slices of 64 x 64. Expert labels are the masks: the segmenter's own errors "
            "on real images are in the baseline",
        ),
        Component(
            "similarity to the real image",
            "simplified",
            "SSIM and PSNR on the networks' grid, within the real image's brightness. FSIM and FID are left out: no "
            "network for the latter is at hand",
        ),
        Component(
            "one-step regression",
            "implemented",
            "not the paper's: the same network without diffusion, to see what diffusion adds to the condition",
        ),
        Component("XCAT phantoms", "absent", "they are licensed, and not at hand"),
        Component(
            "CT and MR: pairs and conversion",
            "absent",
            "no patient here was seen by both. A simulated scanner (`medcook.domains`) maps brightness along a curve, "
            "which would be found again: nothing of anatomy would be learnt",
        ),
    ),
)
