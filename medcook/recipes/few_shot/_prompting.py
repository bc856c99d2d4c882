"""What the chapter's SAM recipes share: a frozen small SAM beside features that match, and a baseline that prompts it.

The small SAM knows what belongs together, not what anything is: its own features tell places apart poorly. So supports
and queries are compared in other features (see `encoder`), and SAM is asked with what was found.
"""

from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.few_shot import FewShot, Shots
from medcook.few_shot.imagenet import imagenet_maps
from medcook.few_shot.method import cosine, masked_mean, resize, shrink
from medcook.methods import Batch, Moment
from medcook.networks.squeezenet import load_squeezenet
from medcook.recipes.few_shot._settings import OWN
from medcook.recipes.recipe import Arm
from medcook.sam.adapting import fitted_in, no_prompts, start, tune
from medcook.sam.model import Embedding, Prompts, SmallSam, masks_of
from medcook.sam.predictor import Predictor, restore
from medcook.sam.prompts import Prompt, box_of


class FrozenFeatures(nn.Module):
    """(B, C, H, W) to (B, 512, H / 4, W / 4): two levels of ImageNet features, each of length one. Nothing learns."""

    def __init__(self):
        super().__init__()
        self.frozen = load_squeezenet().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        size = [side // 4 for side in images.shape[2:]]
        levels = imagenet_maps(self.frozen, images).values()
        return torch.cat([resize(F.normalize(maps, dim=1), size) for maps in levels], dim=1)


@dataclass
class SamFewShot(FewShot):
    """A few-shot method that asks a frozen small SAM; subclasses say in `segment` or `logits` what it is asked.

    pretrained  the book's SAM, else one with random weights
    """

    episodes: str = "none"
    pretrained: bool = True

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        nets = super().build(inputs, classes, dims)
        sam = tune(start(self.pretrained), ())
        for net in nets.values():
            net["sam"] = deepcopy(sam)
        return nets

    def parts(self, inputs: int) -> dict[str, nn.Module]:
        return {"features": FrozenFeatures()} if self.encoder == "imagenet" else super().parts(inputs)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """Where no features learn, one image a step teaches the head: no answer depends on it."""
        if self.episodes == "none" and not self.base:
            labelled = labelled._replace(images=labelled.images[:1], labels=labelled.labels[:1])
        return super().training_step(nets, labelled, unlabelled, now)


def on_both(methods: dict[str, FewShot], place: float = 0.0) -> dict[str, Arm]:
    """Every arm on ImageNet features, and on features from scratch, which also learn to name base structures.

    place  how much the place counts in every arm
    """
    methods = {name: replace(method, place=place) for name, method in methods.items()}
    pretrained = {name: Arm(replace(method, encoder="imagenet")) for name, method in methods.items()}
    return pretrained | {name + OWN: Arm(replace(method, base=1.0)) for name, method in methods.items()}


def embedded(sam: SmallSam, images: Tensor) -> Embedding:
    """What SAM makes of slices (N, C, H, W): scaled to its input, zero mean and unit variance each.

    Outside training the last slices are remembered.
    """
    if not torch.is_grad_enabled():
        rows = [predictor_of(sam).embed(image[0].numpy()) for image in images]
        return Embedding(*(torch.cat(part) for part in zip(*rows, strict=True)))
    found = fitted_in(images)
    mean, spread = found.mean((1, 2, 3), keepdim=True), found.std((1, 2, 3), keepdim=True)
    with torch.no_grad():
        return sam.embed((found - mean) / spread.clamp_min(1e-6))


def decoded(sam: SmallSam, embedding: Embedding, tokens: Tensor, dense: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, *size) logits of SAM's frozen decoder for prompt tokens (N, T, hidden) and rough masks (N, side, side).

    dense  -1 to 1, on any grid, as wide and high as the image; it takes the place of an earlier answer
    """
    prompts = with_masks(dense)
    prompted, sparse = sam.prompted(embedding, prompts)
    decoder = sam.sam.mask_decoder
    asked = torch.cat([sparse, tokens[:, None]], dim=2)
    single = decoder.mask_tokens.weight[:1], decoder.output_hypernetworks_mlps[:1]
    logits, _ = masks_of(sam.sam, prompted, asked, *single)
    return restore(sam.refine(logits, embedding), size)[:, 0]


def with_masks(rough: Tensor) -> Prompts:
    """Prompts that are a rough mask (N, h, w) each, -1 to 1, and nothing else; the image's long side is SAM's side."""
    prompts = no_prompts(len(rough), rough.device)
    dense = prompts.dense.clone()
    height, width = rough.shape[1:]
    square = F.pad(rough[:, None], (0, max(rough.shape[1:]) - width, 0, max(rough.shape[1:]) - height), value=-1.0)
    dense[:, 0] = resize(square, dense.shape[2:])[:, 0]
    return prompts._replace(dense=dense)


def predictor_of(sam: SmallSam) -> Predictor:
    """What asks a frozen SAM; it remembers the embeddings of the last slices, whatever structure they are asked for."""
    if not hasattr(sam, "predictor"):
        sam.predictor = Predictor(sam, zoom=False)
    return sam.predictor


def asked(net: nn.ModuleDict, images: Tensor, prompts: list[Prompt]) -> Tensor:
    """(N, H, W) logits of SAM's best mask for one prompt in each slice."""
    predictor = predictor_of(net["sam"])
    answers = (predictor(image[0].numpy(), prompt) for image, prompt in zip(images, prompts, strict=True))
    return torch.stack([torch.from_numpy(answer.logits[0]) for answer in answers])


def again(prompts: list[Prompt], logits: Tensor) -> list[Prompt]:
    """The prompts with SAM's own answer (N, H, W) and the box of it; unchanged where there is none."""
    masks = (logits > 0).numpy()
    return [
        Prompt(prompt.foreground, prompt.background, box_of(mask), answer.numpy()) if mask.any() else prompt
        for prompt, mask, answer in zip(prompts, masks, logits, strict=True)
    ]


def likeness(support: Shots, query: Shots) -> Tensor:
    """(Q, h, w): cosine of each place with the mean feature of the structure, less that with the background's."""
    inside = shrink(support.masks, support.maps.shape[2:])
    means = torch.stack([masked_mean(support.maps, inside), masked_mean(support.maps, 1 - inside)])
    structure, background = cosine(query.maps, means).unbind(1)
    return structure - background


def mask_priors(support: Tensor, inside: Tensor, query: Tensor) -> Tensor:
    """(Q, 2, h, w): cosine with the most alike support place of the background, and of the structure.

    Of query maps (Q, D, h, w) and support maps (S, D, h, w), each map scaled to 0 .. 1 (PFENet, Tian et al. 2020);
    inside (S, h, w) bool, of which at least one is True and one False.
    """
    places = F.normalize(support, dim=1).movedim(1, -1)
    alike = torch.einsum("qdhw,nd->qnhw", F.normalize(query, dim=1), places.flatten(0, 2))
    found = torch.stack([alike[:, part.flatten()].amax(1) for part in (~inside, inside)], dim=1)
    low, high = found.amin((2, 3), keepdim=True), found.amax((2, 3), keepdim=True)
    return (found - low) / (high - low).clamp_min(1e-5)


def shown(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (N, H, W) as (N, h, w) bool: cells that are mostly structure; with none, those that hold the most of it."""
    share = shrink(masks, size)
    found = share > 0.5
    found = found if found.any() else share == share.max()
    if found.all():
        found = share > share.min()
    if found.all():  # nothing but structure: the first cell stands for the rest
        found.view(-1)[0] = False
    return found


def peaks(maps: Tensor, size: tuple[int, int]) -> np.ndarray:
    """(Q, 2) x, y of the highest place of maps (Q, h, w), in the pixels of an image of `size`."""
    at = maps.flatten(1).argmax(1)
    height, width = maps.shape[1:]
    x, y = at % width + 0.5, at // width + 0.5
    return torch.stack([x * size[1] / width, y * size[0] / height], dim=1).numpy()


@dataclass
class NearestFeature(SamFewShot):
    """Training-free (PerSAM, Zhang et al. 2024): the most alike place is clicked on, the least alike beside the object.

    As in PerSAM the answer's box and logits are asked again. Alike means more like the structure than like the rest:
    on validation patients of acdc that finds the left ventricle in 85 of 100 slices.
    """

    rounds: int = 2

    def segment(self, net: nn.ModuleDict, support: Shots, query: Shots) -> Tensor:
        alike = likeness(support, query)
        size = tuple(query.images.shape[2:])
        on, beside = peaks(alike, size).tolist(), peaks(-alike, size).tolist()
        prompts = [Prompt((tuple(a),), (tuple(b),)) for a, b in zip(on, beside, strict=True)]
        logits = asked(net, query.images, prompts)
        for _ in range(self.rounds - 1):
            logits = asked(net, query.images, again(prompts, logits))
        return logits.sigmoid()
