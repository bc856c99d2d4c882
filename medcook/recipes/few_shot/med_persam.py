"""Med-PerSAM: a reference mask, warped to the query, prompts SAM (Yoon et al., arXiv 2411.16123, 2024).

Points from the most similar pixels cluster and err where tissues look alike. So a light network learns, without any
annotation, to bend one image into another. It carries the mask of the one annotated reference to the query, where it
becomes box, point and rough mask for a frozen SAM; the answers refine the prompts.

  warp    u, A = net(r, x); w(p) = r(A p + u(p)), trained on pairs of images: 1 - LNCC(w, x) + a |grad u|^2
  prior   p_0 = mask warped by the same A, u
  rounds  m_k = SAM(box(p_k), middle(p_k), p_k), p_{k+1} = (1 - b) p_0 + b m_k, part by part
"""

from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from medcook.few_shot import FewShotTask, Shots, novel_dice
from medcook.few_shot.method import resize
from medcook.methods import Batch, Moment
from medcook.recipes.few_shot._prompting import NearestFeature, SamFewShot, on_both, predictor_of
from medcook.recipes.few_shot._settings import OWN, QUICK
from medcook.recipes.recipe import Component, Recipe, Scale
from medcook.sam.adapting import start, tune
from medcook.sam.predictor import Predictor
from medcook.sam.prompts import Prompt, box_of, middle_of
from medcook.tasks import Budget

SIDE = 64
"""Images are registered at this size."""
GENTLE = 0.05
"""What the warping net's outputs are multiplied with, so that its first steps do not leap out of the image."""
PART = 0.2
"""Connected parts of a mask with a smaller share of its largest one are not asked for."""


class WarpNet(nn.Module):
    """(B, 1, SIDE, SIDE) reference and query to where each query place looks in the reference: (B, SIDE, SIDE, 2).

    An affine map and a coarse field of displacements, -1 to 1 over the image; both are nothing before training.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        sides = (2, width // 2, width, 2 * width)
        self.encoder = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.GroupNorm(4, o), nn.ReLU())
                for i, o in zip(sides, sides[1:], strict=False)
            )
        )
        self.local = nn.Conv2d(2 * width, 2, 3, padding=1)
        self.whole = nn.Linear(2 * width * 16, 6)
        for layer in (self.local, self.whole):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, reference: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """The grid, and the field of displacements (B, 2, SIDE / 8, SIDE / 8)."""
        seen = self.encoder(torch.cat([reference, query], dim=1))
        whole = GENTLE * self.whole(F.adaptive_avg_pool2d(seen, 4).flatten(1)).view(-1, 2, 3)
        field = GENTLE * self.local(seen)
        grid = F.affine_grid(torch.eye(2, 3, device=whole.device) + whole, list(query.shape), align_corners=False)
        return grid + resize(field, query.shape[2:]).permute(0, 2, 3, 1), field


def small(images: Tensor) -> Tensor:
    """(N, C, H, W) to (N, 1, SIDE, SIDE), each with zero mean and unit variance."""
    images = F.interpolate(images[:, :1], (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    mean, spread = images.mean((2, 3), keepdim=True), images.std((2, 3), keepdim=True)
    return (images - mean) / spread.clamp_min(1e-6)


def warped(images: Tensor, grid: Tensor) -> Tensor:
    """Images (B, C, H, W) read at a grid (B, H, W, 2); beyond the border they repeat it."""
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def local_correlation(a: Tensor, b: Tensor, window: int = 17) -> Tensor:
    """Mean correlation coefficient, -1 to 1, of (B, 1, H, W) images in the windows around all places."""

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, window, stride=1)

    covariance = mean(a * b) - mean(a) * mean(b)
    spreads = [(mean(x * x) - mean(x) ** 2).clamp_min(0) for x in (a, b)]
    return (covariance / (spreads[0] * spreads[1] + 1e-2).sqrt()).mean()


def roughness(field: Tensor) -> Tensor:
    """Mean squared difference of neighbours in a field (B, 2, h, w)."""
    return (field.diff(dim=2) ** 2).mean() + (field.diff(dim=3) ** 2).mean()


def parts_of(soft: np.ndarray) -> list[np.ndarray]:
    """The connected parts (H, W) bool of a soft mask above one half, without crumbs."""
    labels, count = ndimage.label(soft > 0.5)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    return [labels == k + 1 for k in range(count) if sizes[k] >= PART * sizes.max()]


def prompt_of(part: np.ndarray, soft: np.ndarray) -> Prompt:
    """Box, point and rough mask of one part of a soft mask (H, W)."""
    alone = np.where(ndimage.binary_dilation(part, iterations=2), soft, 0.0)
    return Prompt((middle_of(part),), (), box_of(part), (16 * alone - 8).astype(np.float32))


@dataclass
class MedPerSam(SamFewShot):
    """Warps the reference's mask to the query and asks SAM with it.

    rounds      of asking; `trust` share of the last answer in the next round's prompts
    bends       weight of the roughness of displacements
    warp        False: the reference's mask is copied
    ask         False: the warped mask is the answer
    """

    rate: float = 2e-3
    rounds: int = 2
    trust: float = 0.5
    bends: float = 6.0
    warp: bool = True
    ask: bool = True

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """The warping network and the frozen SAM; nothing names structures, and no annotation is learned from."""
        model = nn.ModuleDict({"warp": WarpNet(), "sam": tune(start(self.pretrained), ())})
        model.classes = classes
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """Another image of the batch is bent into each."""
        query = small(labelled.images)
        reference = query.roll(int(torch.randint(1, max(2, len(query)), ())), 0)
        grid, field = nets["model"]["warp"](reference, query)
        return 1 - local_correlation(warped(reference, grid), query) + self.bends * roughness(field)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Background: without a reference there is nothing to find."""
        found = images.new_zeros(len(images), nets["model"].classes, *images.shape[2:])
        found[:, 0] = 1
        return found

    def encode(self, net: nn.ModuleDict, images: Tensor) -> Tensor:
        """No features are needed."""
        return images[:, :1, ::4, ::4]

    def segment(self, net: nn.ModuleDict, support: Shots, query: Shots) -> Tensor:
        prior = self.prior(net, support, query)
        if not self.ask:
            return prior
        predictor = predictor_of(net["sam"])
        pairs = zip(query.images[:, 0].numpy(), prior.numpy(), strict=True)
        return torch.stack([torch.from_numpy(self.refined(predictor, image, soft)) for image, soft in pairs])

    @torch.no_grad()
    def prior(self, net: nn.ModuleDict, support: Shots, query: Shots) -> Tensor:
        """(Q, H, W) mean over the shots of their masks, warped to each query."""
        masks, size = (support.masks == 1)[:, None].float(), query.images.shape[2:]
        if not self.warp:
            return masks.mean(0).expand(len(query.images), -1, -1)
        found = []
        for image in small(query.images):
            grid, _ = net["warp"](small(support.images), image[None].expand(len(masks), -1, -1, -1))
            large = resize(grid.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
            found.append(warped(masks, large).mean((0, 1)))
        return torch.stack(found)

    def refined(self, predictor: Predictor, image: np.ndarray, prior: np.ndarray) -> np.ndarray:
        """(H, W) SAM's answer to a prior, part by part, and again with its own answer; the prior where no part is."""
        soft = answer = prior
        for _ in range(self.rounds):
            if not (parts := parts_of(soft)):
                break
            logits = np.max([predictor(image, prompt_of(part, soft)).logits[0] for part in parts], axis=0)
            answer = (1 / (1 + np.exp(-logits.clip(-30, 30)))).astype(np.float32)
            soft = (1 - self.trust) * prior + self.trust * answer
        return answer


METHODS = {
    "nearest feature": NearestFeature(),
    "med-persam": MedPerSam(),
    "copied mask": MedPerSam(warp=False),
    "warped mask alone": MedPerSam(ask=False),
    "one round": MedPerSam(rounds=1),
}
QUICK_TASK = FewShotTask("embedded", novel=(3,), supports=2)
FULL_TASK = FewShotTask("chest_xray", source="chest_xray", supports=1, evaluation="test")

recipe = Recipe(
    paper="med-persam",
    title="A warped reference prompts SAM",
    claim="With one annotated chest X-ray, prompts from its warped lung masks raise the Dice of a frozen SAM against "
    "clicks at the most and least similar places.",
    arms=on_both(METHODS),
    compare=("med-persam", "nearest feature"),
    ablation=("med-persam", "copied mask"),
    replicate="draw",
    scales={
        "quick": Scale(QUICK_TASK, QUICK, replicates=1, arms=tuple(name + OWN for name in METHODS)),
        "full": Scale(FULL_TASK, Budget(steps=200, batch=8, checks=1), arms=tuple(METHODS)),
    },
    metric="dice",
    score=novel_dice,
    components=(
        Component(
            "lightweight warping model",
            "implemented",
            "our reading: affine map and a field of 8 x 8 displacements, 0.1 million parameters, trained on pairs of "
            "training images by local correlation; no annotation takes part",
        ),
        Component("automated prompts", "implemented", "box, point and rough mask for every connected part of the mask"),
        Component(
            "iterative refinement",
            "implemented",
            "our reading: SAM's answer and the warped mask, half and half, are the next round's prompts",
        ),
        Component("no training of SAM", "implemented", "the book's small SAM, frozen"),
        Component(
            "several data sets and foundation models",
            "absent",
            "one claim a recipe: lungs in chest X-rays, where one reference can be warped to all",
        ),
    ),
)
