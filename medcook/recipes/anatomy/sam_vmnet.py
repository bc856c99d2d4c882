"""SAM-VMNet: vessels in coronary angiograms and their stenoses (Huang, Luo, Wei, He, Shao, Zeng and Zhang, Medical
Physics 2025, 10.1002/mp.17970).

A U-Net of Mamba's scans (VM-UNet) finds the vessels. To its deepest tokens d the frozen image encoder of a large
segmentation model (MedSAM) adds what it sees, after a 1 x 1 convolution W and adaptive max pooling:

    d' = d + W pool(MedSAM(image)).

The mask is thinned to a centre line, the largest disc around each of its points gives the diameter, and where the
diameter falls and rises again along a branch, a stenosis is reported with its degree (`_centrelines`, `_stenoses`).
No angiograms are at hand: trees are drawn into real X-rays, with stenoses of known place and degree (`_angiograms`).

What was looked at, three times, on patients of train and val; after 60 steps an IoU of 0.61 by the U-Net and 0.42 by
the method. Radii that are measured come out about 0.15 pixel too small, which was found after the evidence, and left.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from medcook import evaluation, metrics
from medcook.data import Case
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.networks import UNet
from medcook.recipes.anatomy import _stenoses, _vmunet
from medcook.recipes.anatomy._angiograms import AngiogramTask
from medcook.recipes.anatomy._centrelines import FINER, finer_grid, parsed
from medcook.recipes.anatomy._settings import BASELINE, CHANNELS
from medcook.recipes.anatomy._trees import Tree
from medcook.recipes.architectures._settings import Architecture
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.sam.adapting import average_of, fitted_in, start
from medcook.tasks import Budget

ANGIOGRAMS = AngiogramTask("chest_xray", evaluation="test")
ANGIOGRAMS_QUICK = AngiogramTask("embedded", side=48, zoom=1.0)


class Encoder(nn.Module):
    """The image encoder of the small SAM, frozen: images (B, C, H, W) to what it sees (B, 160, 10, 10)."""

    def __init__(self):
        super().__init__()
        self.encoder = start().sam.vision_encoder.requires_grad_(False)
        self.width = self.encoder.config.output_channels

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(fitted_in(images)).last_hidden_state


class UNetTold(UNet):
    """The book's U-Net, to whose deepest map other features are added as in `VMUNet`."""

    def __init__(self, *, told: int, **sizes):
        super().__init__(**sizes)
        self.told = nn.Conv2d(told, sizes["channels"][-1], 1)

    def forward(self, image: Tensor, told: Tensor) -> Tensor:
        *finer, deepest = self.descend(image)
        deepest = deepest + _vmunet.added(self.told, told, deepest.shape[2:])
        return self.head(self.ascend([*finer, deepest])[0])


class SamVMNet(nn.Module):
    """Images (B, C, H, W) to logits (B, classes, H, W): a segmenter, and the encoder that tells it more, if any."""

    def __init__(self, segmenter: nn.Module, encoder: Encoder | None):
        super().__init__()
        self.segmenter, self.encoder = segmenter, encoder

    def forward(self, images: Tensor) -> Tensor:
        told = () if self.encoder is None else (self.encoder(images),)
        return self.segmenter(images, *told)


@dataclass
class SamVM(Architecture):
    """VM-UNet with the features of the small SAM.

    widths, patch, states  see `VMUNet`
    sam    False: VM-UNet alone
    scans  False: the book's U-Net in place of VM-UNet
    """

    widths: tuple[int, ...] = (16, 32, 64, 96)
    patch: int = 3
    states: int = 1
    sam: bool = True
    scans: bool = True

    def model(self, inputs: int, classes: int) -> SamVMNet:
        encoder = Encoder() if self.sam else None
        told = {"told": encoder.width} if self.sam else {}
        if self.scans:
            sizes = {name: getattr(self, name) for name in ("widths", "patch", "states")}
            return SamVMNet(_vmunet.VMUNet(inputs=inputs, classes=classes, **sizes, **told), encoder)
        network = UNetTold if self.sam else UNet
        return SamVMNet(network(inputs=inputs, classes=classes, channels=CHANNELS, **told), encoder)

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """As any architecture; the frozen encoder is shared by the network and its average."""
        model = super().build(inputs, classes, dims)["model"]
        return nn.ModuleDict({"model": model, "average": average_of(model)})

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        if nets["model"].encoder is not None:
            nets["model"].encoder.eval()
        return find_loss(self.loss)(nets["model"](labelled.images).float(), labelled.labels)


def diameter_error(soft: np.ndarray, tree: Tree) -> float:
    """Mean difference in pixels from the true diameter, over the true centre line where it was found (H, W); NaN where
    nothing of it was."""
    mask = finer_grid(soft, FINER) > 0.5
    depth = (ndimage.distance_transform_edt(mask) - 0.5) / FINER
    points, radius = (np.concatenate([getattr(one, name) for one in tree]) for name in ("points", "radius"))
    cells = tuple(((points + 0.5) * FINER - 0.5).round().astype(int).T)
    there = mask[cells]
    return float(2 * np.abs(depth[cells] - radius)[there].mean()) if there.any() else float("nan")


def vessel_rows(fitted, case: Case) -> list[dict]:
    """A row for each angiogram of a case.

    dice, iou, sensitivity, specificity   of the vessels' pixels
    diameter_error                        in pixels
    tpr, ppv, degree_error, extra         of stenoses, see `_stenoses.agreement`
    tpr_truth, ...                        the same measured on the true mask: as good as measuring can be
    """
    rows, answers = [], fitted.answer(fitted.task.preparation.images(case))
    for number, (planted, answer) in enumerate(zip(fitted.task.preparation.planted(case), answers, strict=True), 1):
        soft, truth, tree = answer[1].numpy(), planted.label > 0, planted.trees["vessels"]
        found, wanted = metrics.score(soft > 0.5, truth, None), _stenoses.true_stenoses(tree)
        values = {"dice": found.dice, "iou": found.iou}
        values |= {"sensitivity": float((soft > 0.5)[truth].mean()), "specificity": float((soft <= 0.5)[~truth].mean())}
        values["diameter_error"] = diameter_error(soft, tree)
        for suffix, mask in (("", soft), ("_truth", truth)):
            judged = _stenoses.agreement(_stenoses.stenoses_of(parsed(mask)), wanted)
            values |= {f"{name}{suffix}": value for name, value in judged.items()}
        rows.append(evaluation.row(case, f"vessels {number}", **values))
    return rows


recipe = Recipe(
    paper="sam-vmnet",
    title="SAM-VMNet: vessels, their diameter and stenoses",
    claim="In angiograms a U-Net of scans that is told the features of a small SAM finds vessels with a higher "
    "intersection over union than a U-Net.",
    arms={
        "unet": Arm(BASELINE),
        "sam-vmnet": Arm(SamVM()),
        "without sam": Arm(SamVM(sam=False)),
        "without scans": Arm(SamVM(scans=False)),
    },
    compare=("sam-vmnet", "unet"),
    ablation=("sam-vmnet", "without sam"),
    metric="iou",
    score=vessel_rows,
    scales={
        "quick": Scale(ANGIOGRAMS_QUICK, Budget(steps=20, batch=4, precision="float32", checks=0), replicates=1),
        "full": Scale(
            ANGIOGRAMS,
            Budget(steps=260, batch=6, precision="float32", checks=0),
            arms=("unet", "sam-vmnet", "without sam"),
        ),
    },
    published={
        "mixed, IoU": 0.6308,
        "mixed, sensitivity": 0.9772,
        "mixed, specificity": 0.9903,
        "stenoses, TPR": 0.5867,
        "stenoses, PPV": 0.5911,
    },
    source="abstract; layers, fusion and the search for stenoses follow the official code, "
    "github.com/qimingfan10/SAM-VMNet",
    components=(
        Component(
            "VM-UNet",
            "implemented",
            "four levels of one gated four-way block each way; patch merging and expanding, skips that are added, as "
            "in the code, there two blocks and widths from 96 to 768. Tokens of 3 x 3 pixels in images of 96 (there 4 "
            "x 4 of 256), one state a channel (there 16), from scratch (there from ImageNet)",
        ),
        Component(
            "MedSAM features",
            "simplified",
            "the book's small SAM, which knows drawn scenes alone, frozen; its 10 x 10 embedding is max-pooled to the "
            "deepest grid, goes through a 1 x 1 convolution and is added, as in the code (64 x 64 to 8 x 8 there)",
        ),
        Component(
            "points of a first network",
            "absent",
            "the code asks MedSAM at ten points of a first network's mask, then takes the embedding of the image, "
            "which no prompt changes. So no first network is needed",
        ),
        Component(
            "ablation",
            "implemented",
            "VM-UNet alone; and the SAM's features in the book's U-Net, `without scans`, which `full` leaves out",
        ),
        Component(
            "centreline extraction",
            "implemented",
            "thinning of the mask, four times finer, short spurs removed; there of the mask at 800 x 600",
        ),
        Component(
            "vessel diameter",
            "implemented",
            "of the largest disc around each point, by a distance transform in place of circles that grow",
        ),
        Component(
            "degree of stenosis",
            "implemented",
            "bottom of a V against the mean of its two tops, from 0.25 on, in wide vessels only, as in the code. Along "
            "branches between forks, smoothed by 1.5 pixels; there along paths between forks in the order of a list",
        ),
        Component(
            "dynamic cohort",
            "implemented",
            "the code's queue of turning points along a path: top, bottom, top, of which every V is judged",
        ),
        Component(
            "ARCADE, DCA1 and GH",
            "absent",
            "angiograms are not at hand: trees are drawn into real chest X-rays, with the absorption of their depth. "
            "None of their branches cross, and nothing moves",
        ),
    ),
)
