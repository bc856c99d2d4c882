"""What few-shot methods share: a feature network, episodes to train it, and an answer made from a support."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from skimage.segmentation import felzenszwalb
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.errors import MedcookError
from medcook.few_shot.imagenet import WIDTH, ImageNetFeatures
from medcook.losses import find_loss
from medcook.methods import Batch, Method, Moment
from medcook.networks.unet import DoubleConv


class Shots(NamedTuple):
    """Slices and their features: images (N, C, H, W), maps (N, D, h, w); masks (N, H, W) uint8, None of queries."""

    images: Tensor
    maps: Tensor
    masks: Tensor | None = None

    def take(self, where) -> "Shots":
        """Some of the slices."""
        return Shots(self.images[where], self.maps[where], None if self.masks is None else self.masks[where])


class FeatureNet(nn.Module):
    """(B, inputs, H, W) to features (B, channels[-1], H / 4, W / 4): down to an eighth, and one step up again.

    Every side of the image must be at least 16.
    """

    def __init__(self, *, inputs: int = 1, channels: tuple[int, ...] = (16, 24, 32, 48)):
        super().__init__()
        stem, first, second, third = channels
        self.stem = nn.Sequential(
            nn.Conv2d(inputs, stem, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU()
        )
        self.down = nn.ModuleList(DoubleConv(i, o, 2) for i, o in ((stem, first), (first, second), (second, third)))
        self.up = nn.Sequential(
            nn.Conv2d(second + third, third, 3, padding=1, bias=False), nn.BatchNorm2d(third), nn.ReLU()
        )
        self.out = nn.Conv2d(third, third, 1)

    def forward(self, images: Tensor) -> Tensor:
        quarter = self.down[1](F.max_pool2d(self.down[0](self.stem(images)), 2))
        eighth = self.down[2](F.max_pool2d(quarter, 2))
        wide = F.interpolate(eighth, size=quarter.shape[2:], mode="bilinear", align_corners=False)
        return self.out(self.up(torch.cat([quarter, wide], dim=1)))


@dataclass
class FewShot(Method):
    """A network that learns features; subclasses say in `logits` how a support and features make a segmentation.

    encoder     what makes the features: a network of our own, from scratch, or a frozen one of ImageNet and a learned
                linear change of low rank
    place       how much the place in the image counts beside features of length one; 0: not at all
    episodes    what a training step practises: `classes`, base structures in other images of the batch;
                `superpixels`, pieces of an image in augmented views of it (Ouyang et al. 2022); `none`
    count       episodes a step; `views` query images of each
    base        weight of the cross-entropy of base structures in training features. The head that names them always
                learns, so that there is something to predict without a support; with 0 it shapes no features.
    """

    channels: tuple[int, ...] = (16, 24, 32, 48)
    rate: float = 1e-3
    average: float = 0.95
    encoder: Literal["own", "imagenet"] = "own"
    place: float = 0.0
    episodes: Literal["classes", "superpixels", "none"] = "classes"
    count: int = 3
    views: int = 2
    base: float = 0.0

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """`model` and its moving average `average`, each a dictionary of modules."""
        if dims != 2:
            raise MedcookError("Few-shot methods see slices, not volumes.", "Use a FewShotTask: it prepares slices.")
        model = nn.ModuleDict(self.parts(inputs))
        model["head"] = nn.Conv2d(self.width, classes, 1)
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def parts(self, inputs: int) -> dict[str, nn.Module]:
        """Everything that is learned, but for the head; `features` makes maps (B, width, h, w) of images."""
        if self.encoder == "imagenet":
            return {"features": ImageNetFeatures()}
        return {"features": FeatureNet(inputs=inputs, channels=self.channels)}

    @property
    def width(self) -> int:
        """Channels of the features."""
        return (WIDTH if self.encoder == "imagenet" else self.channels[-1]) + 2 * bool(self.place)

    def encode(self, net: nn.ModuleDict, images: Tensor) -> Tensor:
        """Features (B, width, h, w) of images."""
        maps = net["features"](images)
        return with_place(maps, self.place) if self.place else maps

    def logits(self, net: nn.ModuleDict, support: Shots, query: Shots) -> Tensor:
        """(Q, 2, h, w) of background and structure in the query slices, all with the same support."""
        raise NotImplementedError

    def adapt(self, net: nn.ModuleDict, supports: list[Shots]) -> nn.ModuleDict:
        """What is done once when a support volume (one `Shots` a chunk) arrives; the network that then answers."""
        return net

    def segment(self, net: nn.ModuleDict, support: Shots, query: Shots) -> Tensor:
        """(Q, H, W) probability of the structure in the query slices."""
        return resize(self.logits(net, support, query).float(), query.images.shape[2:]).softmax(1)[:, 1]

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        net = nets["model"]
        known, episodes = self.practise(net, labelled)
        named = resize(net["head"](known.maps if self.base else known.maps.detach()).float(), known.images.shape[2:])
        loss = (self.base or 1.0) * find_loss(self.loss)(named, known.masks)
        if episodes:
            loss = loss + sum(self.episode_loss(net, *episode) for episode in episodes) / len(episodes)
        return loss

    def practise(self, net: nn.ModuleDict, batch: Batch) -> tuple[Shots, list[tuple[Shots, Shots]]]:
        """Images with their label maps and features, for the head, and the (support, query) episodes of a step.

        Queries have masks, from which `episode_loss` learns.
        """
        if self.episodes == "superpixels":
            return self.superpixel_episodes(net, batch)
        with torch.set_grad_enabled(bool(self.base) or self.episodes == "classes"):
            known = Shots(batch.images, self.encode(net, batch.images), batch.labels)
        return known, class_episodes(known, self.count, self.views) if self.episodes == "classes" else []

    def superpixel_episodes(self, net: nn.ModuleDict, batch: Batch) -> tuple[Shots, list[tuple[Shots, Shots]]]:
        """A piece of an image, and `views` augmented views of both, for `count` images; others are not looked at."""
        chosen = torch.randperm(len(batch.images))[: self.count]
        images, count = batch.images[chosen], len(chosen)
        pieces = torch.stack([random_superpixel(image[0]) for image in images]).to(images.device)
        rng = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        repeated = (each.repeat_interleave(self.views, 0) for each in (images, pieces))
        views, moved = self.augmentation(*repeated, rng)
        everything = torch.cat([images, views])
        shots = Shots(everything, self.encode(net, everything), torch.cat([pieces, moved]))
        queries = torch.arange(count, len(everything)).view(count, self.views)
        episodes = [(shots.take([k]), shots.take(queries[k])) for k in range(count)]
        return Shots(images, shots.maps[:count], batch.labels[chosen]), episodes

    def episode_loss(self, net: nn.ModuleDict, support: Shots, query: Shots) -> Tensor:
        """The loss of the query slices."""
        return self.query_loss(self.logits(net, support, query), query)

    def query_loss(self, logits: Tensor, query: Shots) -> Tensor:
        """`loss` of logits (Q, 2, h, w) against the masks of the query slices, at their size."""
        return find_loss(self.loss)(resize(logits.float(), query.images.shape[2:]), query.masks)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Base structures, by the head: without a support there is no novel one to find."""
        net = nets["average"]
        return resize(net["head"](self.encode(net, images)).float(), images.shape[2:]).softmax(1)


def class_episodes(batch: Shots, count: int, views: int) -> list[tuple[Shots, Shots]]:
    """`count` episodes of random structures: one image that shows it supports, others that show it are queries.

    batch  its masks are label maps (B, H, W). No episodes where no structure is shown by two images.
    """
    values = [value for value in batch.masks.unique().tolist() if value not in (0, IGNORE)]
    shown = {value: (batch.masks == value).flatten(1).any(1).nonzero()[:, 0] for value in values}
    able = [value for value in values if len(shown[value]) > 1]
    found = []
    for pick in torch.randint(max(1, len(able)), (count if able else 0,)).tolist():
        where = shown[able[pick]]
        where = where[torch.randperm(len(where))[: 1 + views].to(where.device)]
        masks = torch.where(batch.masks == IGNORE, batch.masks, (batch.masks == able[pick]).to(batch.masks.dtype))
        episode = batch._replace(masks=masks)
        found.append((episode.take(where[:1]), episode.take(where[1:])))
    return found


def random_superpixel(image: Tensor) -> Tensor:
    """(H, W) uint8: one of the pieces that Felzenszwalb and Huttenlocher (2004) cut an image (H, W) into."""
    small = F.avg_pool2d(image[None, None].detach().float().cpu(), 2)[0, 0].numpy()
    pieces = felzenszwalb(small.astype(np.float64), scale=32.0, sigma=0.8, min_size=max(4, small.size // 160))
    piece = torch.from_numpy(pieces == int(torch.randint(int(pieces.max()) + 1, ())))
    return F.interpolate(piece[None, None].float(), size=image.shape)[0, 0].to(torch.uint8)


def resize(maps: Tensor, size) -> Tensor:
    """Maps (B, C, h, w) on a grid of another size, bilinear."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def shrink(masks: Tensor, size) -> Tensor:
    """Masks (N, H, W) as the share (N, h, w) that is structure in each cell of features; unlabelled counts as not."""
    return F.adaptive_avg_pool2d((masks == 1)[:, None].float(), tuple(size))[:, 0]


def with_place(maps: Tensor, weight: float) -> Tensor:
    """Maps (B, D, h, w), of length one, and two more channels: y and x from -1 to 1, times `weight`."""
    sides = [torch.linspace(-1, 1, side, device=maps.device) for side in maps.shape[2:]]
    places = weight * torch.stack(torch.meshgrid(*sides, indexing="ij"))
    return torch.cat([F.normalize(maps, dim=1), places.expand(len(maps), -1, -1, -1)], dim=1)


def masked_mean(maps: Tensor, weights: Tensor) -> Tensor:
    """(D,) mean of maps (N, D, h, w) by weights (N, h, w)."""
    return (maps * weights[:, None]).sum((0, 2, 3)) / weights.sum().clamp_min(1e-5)


def cosine(maps: Tensor, prototypes: Tensor) -> Tensor:
    """(N, P, h, w): cosine of every feature of maps (N, D, h, w) to prototypes (P, D)."""
    return torch.einsum("ndhw,pd->nphw", F.normalize(maps, dim=1), F.normalize(prototypes, dim=1))
