"""Cross-D Conv (Yavuz and Yang, arXiv 2411.02441, 2024).

Slices with labels are plenty, volumes are few. A layer keeps 3D kernels and is trained on slices: it looks at a slice,
predicts a small rotation, moves its 3D kernels by a phase in the Fourier domain that follows from the rotation, and
convolves with the plane that now lies in the middle. So slices train kernels that volumes use as they are.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.networks import UNet
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.volumes._settings import BASELINE, VolumeNetwork, scales


def rotation_shift(axis: Tensor, angle: Tensor) -> Tensor:
    """How far a rotation moves a kernel: axes (N, 3) of length 1, angles (N, 1) to shifts in voxels (N, 3).

    The paper rotates the frequencies, f' = R f with R = I + angle K, where K is the matrix of the cross product with
    the axis, and multiplies by exp(-2 pi i (f'_1 + f'_2 + f'_3)). This sum is f . R' 1, a shift by
    R' 1 = 1 - angle (axis x 1). The constant 1 is left out: without a rotation nothing moves.
    """
    return -angle * torch.linalg.cross(axis, torch.ones_like(axis))


def shifted(kernels: Tensor, shifts: Tensor) -> Tensor:
    """Kernels (M, K, K, K) moved by each of N shifts (N, 3) in voxels, a fraction too: (N, M, K, K, K).

    The spectrum times exp(-2 pi i f . shift); what leaves a kernel on one side comes back on the other.
    """
    side = kernels.shape[-1]
    frequencies = torch.fft.fftfreq(side, device=kernels.device)
    grid = torch.stack(torch.meshgrid(frequencies, frequencies, frequencies, indexing="ij"))
    turns = torch.einsum("na,axyz->nxyz", shifts.float(), grid)
    phases = torch.polar(torch.ones_like(turns), -2 * math.pi * turns)
    return torch.fft.ifftn(torch.fft.fftn(kernels.float(), dim=(-3, -2, -1)) * phases[:, None], dim=(-3, -2, -1)).real


class Rotation(nn.Module):
    """What is seen, (N, inputs, H, W), to a rotation: axes (N, 3) of length 1 and angles (N, 1) up to 45 degrees.

    Each of the four numbers is an average over the pixels that weighs large values more, by their softmax.
    """

    def __init__(self, inputs: int, width: int = 16):
        super().__init__()
        self.maps = nn.Sequential(
            nn.Conv1d(inputs, width, 1), nn.BatchNorm1d(width), nn.ReLU(inplace=True), nn.Conv1d(width, 4, 1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.maps(x.flatten(2)).float()
        found = (maps * maps.softmax(-1)).sum(-1)
        return F.normalize(found[:, :3], dim=1), torch.tanh(found[:, 3:]) * math.pi / 4


class CrossConv(nn.Conv3d):
    """A 3D convolution that slices can train: on (B, C, D, H, W) plain, on (N, C, H, W) with planes of its kernels.

    phases  False: always the middle plane, as it is
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool = False, phases: bool = True):
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
        self.rotation = Rotation(inputs) if phases and kernel > 1 else None

    def planes(self, x: Tensor) -> Tensor:
        """The kernels for each slice, (N, outputs, inputs, K, K).

        A shift is linear: it is enough to shift the K^3 kernels that are 1 in one place, and to combine them.
        """
        side = self.kernel_size[0]
        units = torch.eye(side**3, device=x.device).unflatten(1, (side, side, side))
        moved = shifted(units, rotation_shift(*self.rotation(x)))[:, :, side // 2]
        return torch.einsum("oiu,nuyx->noiyx", self.weight.float().flatten(2), moved)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 5:
            return super().forward(x)
        if self.rotation is None:
            return F.conv2d(x, self.weight[:, :, self.kernel_size[0] // 2], self.bias, padding=self.padding[0])
        with torch.autocast(x.device.type, enabled=False):
            count, x = len(x), x.float()
            kernels = self.planes(x).flatten(0, 1)
            return F.conv2d(x.flatten(0, 1)[None], kernels, padding=self.padding[0], groups=count)[0].unflatten(
                0, (count, -1)
            )


def in_three_planes(kernels: Tensor) -> Tensor:
    """2D kernels (O, I, K, K) as 3D ones (O, I, K, K, K): each third of the outputs lies across another axis."""
    beyond = (0, 0, 0, 0, kernels.shape[-1] // 2, kernels.shape[-1] // 2)
    return torch.cat([F.pad(part[:, :, None], beyond).movedim(2, 2 + i) for i, part in enumerate(kernels.chunk(3))])


class AcsConv(nn.Conv3d):
    """Axial, coronal and sagittal convolutions (Yang et al., IEEE JBHI 2021): 2D kernels that also see volumes."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool = False):
        super().__init__(inputs, outputs, (1, kernel, kernel), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        flat, half = self.weight[:, :, 0], self.kernel_size[-1] // 2
        if x.dim() == 4:
            return F.conv2d(x, flat, self.bias, padding=half)
        return F.conv3d(x, in_three_planes(flat), self.bias, padding=half)


class EitherNorm(nn.BatchNorm3d):
    """Batch normalisation of slices or volumes."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (4, 5):
            raise ValueError(f"slices or volumes are expected, not {input.dim()} axes")


class CrossUNet(UNet):
    """The book's U-Net for slices (N, inputs, H, W) and for volumes (B, inputs, D, H, W), with the same weights.

    kernels  "shifted" and "fixed": `CrossConv` with phases and without; "acs": `AcsConv`
    """

    def __init__(self, *, inputs: int, classes: int, channels: tuple[int, ...], kernels: str = "shifted"):
        super().__init__(inputs=inputs, classes=classes, channels=channels, dims=3)

        def layer(plain: nn.Conv3d) -> nn.Module:
            shape = plain.in_channels, plain.out_channels, plain.kernel_size[0]
            settings = {} if kernels == "acs" else {"phases": kernels == "shifted"}
            return (AcsConv if kernels == "acs" else CrossConv)(*shape, bias=plain.bias is not None, **settings)

        for block in (*self.down, *self.up):
            for place, part in enumerate(block):
                if isinstance(part, nn.Conv3d):
                    block[place] = layer(part)
                elif isinstance(part, nn.BatchNorm3d):
                    block[place] = EitherNorm(part.num_features)
        self.head = layer(self.head)

    def features(self, image: Tensor) -> Tensor:
        flat = image.dim() == 4
        self.pool, self.mode = (F.max_pool2d, "bilinear") if flat else (F.max_pool3d, "trilinear")
        return super().features(image)


@dataclass
class CrossD(VolumeNetwork):
    """First a network for slices, then, with the same weights, one for volumes.

    kernels  see `CrossUNet`
    flat     share of the steps on slices: all those of the batch, along the first axis, each on its own
    """

    kernels: str = "shifted"
    flat: float = 0.5

    trial_tolerance = 0.02
    """Of its fingerprint. Rounding grows fast here: weights changed by 1e-7 of themselves have a loss that differs by
    0.01 after 20 steps, and so do processors of two kinds. Without phases the Dice differs by 0.04."""

    def model(self, inputs: int, classes: int) -> nn.Module:
        return CrossUNet(inputs=inputs, classes=classes, channels=self.channels, kernels=self.kernels)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        if now.fraction >= self.flat:
            return super().training_step(nets, labelled, unlabelled, now)
        slices, labels = labelled.images.transpose(1, 2).flatten(0, 1), labelled.labels.flatten(0, 1)
        return find_loss(self.loss)(nets["model"](slices).float(), labels)


recipe = Recipe(
    paper="cross-d-conv",
    title="Cross-D Conv: 3D kernels that slices train",
    claim="A network that spends half of its steps on slices, whose 2D kernels are planes of its 3D kernels after a "
    "learned phase shift, has a Dice on hippocampi at most 0.01 below that of a plain 3D U-Net.",
    arms={
        "unet": Arm(BASELINE),
        "cross-d": Arm(CrossD()),
        "without learned phases": Arm(CrossD(kernels="fixed")),
        "acs convolutions": Arm(CrossD(kernels="acs")),
    },
    compare=("cross-d", "unet"),
    ablation=("cross-d", "without learned phases"),
    expect="non-inferior",
    margin=0.01,
    replicate="fold",
    scales=scales("unet", "cross-d", "without learned phases"),
    published={
        "volumes, mean of six sets, pre-trained on ImageNet": 0.535,
        "volumes, mean of six sets, pre-trained on ImageNet, ACS": 0.525,
        "volumes, mean of six sets, pre-trained on RadImageNet": 0.549,
        "volumes, mean of six sets, pre-trained on RadImageNet, ACS": 0.545,
    },
    source="table 3 in the README of github.com/convergedmachine/Cross-D-Conv",
    components=(
        Component(
            "learned phase shift in the Fourier domain",
            "implemented",
            "axis and angle are predicted from each slice, as in the code; its first-order rotation of the frequencies "
            "comes to a shift of the kernel, and the constant shift by one voxel that its formula also has is left "
            "out, so that 2D and 3D kernels lie in the same place",
        ),
        Component(
            "weights move between 2D and 3D",
            "implemented",
            "one layer, one set of weights; in a volume the 3D kernels are used without a phase, as in the code, so "
            "that the network is then a plain 3D one and has no fewer parameters",
        ),
        Component(
            "2D training for a 3D network",
            "simplified",
            "the slices are those of the training volumes, in the first half of the steps of every run, in place of "
            "ImageNet or RadImageNet; batch normalisation goes along",
        ),
        Component(
            "comparison with ACS convolutions",
            "implemented",
            "not in the abstract, but what the paper compares with in 3D; the same steps on slices and volumes",
        ),
        Component("feature quality of classifiers", "absent", "Dice of segmentation in place of probing a ResNet-18"),
        Component("multimodal pre-training", "absent", "one MR sequence"),
    ),
)
