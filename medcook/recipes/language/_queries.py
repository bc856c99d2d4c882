"""Names that become queries: an image is looked at once, and every name's mask is decoded at the same time.

The network is SAT's (Zhao et al., npj Digital Medicine 2025): a U-Net, a text encoder, and a transformer decoder in
which the names ask the image's features of every scale. What has become of a name is multiplied with the features of
each pixel. In training every name of an image's set is asked for at once.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.language import Names, TextEncoder, Told, mask_loss
from medcook.methods import Batch, Moment
from medcook.networks import UNet
from medcook.recipes.language._settings import EVERYTHING
from medcook.recipes.pretraining._tokens import grid_places, sinusoids


class QueriedUNet(nn.Module):
    """Images (B, C, H, W) and names to logits (B, S, H, W), a channel for each name.

    layers  of the query decoder;   apart  names do not hear of each other: who asks for more gets the same answers
    """

    def __init__(self, inputs: int, channels: tuple[int, ...], width: int, layers: int, apart: bool = False):
        super().__init__()
        self.apart = apart
        self.net = UNet(inputs=inputs, classes=1, channels=channels)
        self.net.head = nn.Identity()
        self.text = TextEncoder(width)
        self.gather = nn.Sequential(nn.Linear(sum(channels), 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        layer = nn.TransformerDecoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.asking = nn.TransformerDecoder(layer, layers, nn.LayerNorm(width))
        self.mask = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, channels[0] + 1))

    def scene(self, maps: list[Tensor]) -> Tensor:
        """Tokens (B, h w, width) of feature maps of every scale, each averaged over the places of the deepest."""
        size = maps[-1].shape[2:]
        pooled = torch.cat([F.adaptive_avg_pool2d(each, size) for each in maps], dim=1)
        tokens = self.gather(pooled.flatten(2).transpose(1, 2))
        return tokens + sinusoids(grid_places(tuple(size)).to(tokens.device), tokens.shape[2])

    def encode(self, images: Tensor) -> list[Tensor]:
        """Feature maps of every level of images (B, C, H, W), the finest first."""
        return self.net.descend(images)

    def pixels(self, maps: list[Tensor]) -> Tensor:
        """Features (B, channels[0], H, W) of every pixel: the way up, which hears nothing."""
        return self.net.ascend(maps)[0]

    def ask(self, maps: list[Tensor], queries: Tensor, nobody: Tensor) -> Tensor:
        """(B, S, width): what queries (B, S, width) have become after asking; `nobody` (B, S) fills up."""
        if not self.apart:
            return self.asking(queries, self.scene(maps), tgt_key_padding_mask=nobody)
        others = ~torch.eye(queries.shape[1], dtype=torch.bool, device=queries.device)
        return self.asking(queries, self.scene(maps), tgt_mask=others)

    def forward(self, images: Tensor, queries: Tensor, nobody: Tensor) -> Tensor:
        """Logits (B, S, H, W) float32 for queries (B, S, width)."""
        maps = self.encode(images)
        return dotted(self.pixels(maps), self.mask(self.ask(maps, queries, nobody)))


def dotted(pixels: Tensor, weights: Tensor) -> Tensor:
    """(B, S, H, W) float32: features of pixels (B, C, H, W) times weights (B, S, C + 1), the last of which is added."""
    found = torch.einsum("bchw,bsc->bshw", pixels.float(), weights[..., :-1].float())
    return found / pixels.shape[1] ** 0.5 + weights[..., -1].float()[..., None, None]


def values_of(language: Names, group: int | None) -> tuple[int, ...]:
    """The label values that have a name in a set; without a group those of the first set."""
    first = min(language.sets, default=0) if group is None else group
    everyone = [value for value, name in enumerate(language.names, 1) if name]
    return tuple(value for value in everyone if not language.sets or language.sets[value - 1] == first)


def sheet(language: Names, batch: Batch) -> tuple[Tensor, Tensor]:
    """What every image is asked for: label values (B, S) int64, 0 where nothing is, and which answers are known (B, S).

    Where a set is not annotated in full, nothing is known of a name that is not there.
    """
    groups = [None] * len(batch.labels) if batch.groups is None else batch.groups.tolist()
    rows = [values_of(language, group) for group in groups]
    values = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long, device=batch.labels.device)
    for row, found in zip(values, rows, strict=True):
        row[: len(found)] = torch.tensor(found)
    there = (batch.labels[:, None] == values[..., None, None]).flatten(2).any(2)
    partial = torch.tensor([group in language.partial for group in groups], device=values.device)
    return values, (values > 0) & (there | ~partial[:, None])


def sheet_loss(logits: Tensor, labels: Tensor, values: Tensor, known: Tensor) -> Tensor:
    """Binary cross-entropy and Dice of every mask (B, S, H, W) whose answer is known; each has its own Dice."""
    if not known.any():
        return 0.0 * logits.sum()
    masks = (labels[:, None] == values[..., None, None]).byte()
    masks[(labels == IGNORE)[:, None].expand_as(masks)] = IGNORE
    return mask_loss(logits[known].float(), masks[known], each=True)


@dataclass
class Queried(Told):
    """Every step asks for all structures of an image's set by their names.

    layers  of the query decoder
    """

    language: Names = EVERYTHING
    layers: int = 2

    def network_for(self, inputs: int) -> nn.Module:
        return QueriedUNet(inputs, self.channels, self.width, self.layers)

    def chosen(self, labelled: Batch) -> tuple[Tensor, Tensor]:
        """Values (B, S) that are asked for, and which answers are known: all of a `sheet`."""
        return sheet(self.language, labelled)

    def named(self, values: Tensor) -> tuple[str, ...]:
        """The names of all label values up to the largest of a sheet, in one form, by torch's own generator."""
        form = self.language.forms[int(torch.randint(len(self.language.forms), ()))]
        return tuple(form.format(name=self.language.plain(v) or "nothing") for v in range(1, int(values.max()) + 1))

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        values, known = self.chosen(labelled)
        vectors = nets["model"].text(self.named(values))
        logits = self.asked(nets["model"], labelled, vectors[(values - 1).clamp_min(0)], values)
        return sheet_loss(logits, labelled.labels, values, known)

    def asked(self, net: nn.Module, labelled: Batch, queries: Tensor, values: Tensor) -> Tensor:
        """Logits (B, S, H, W) for the queries (B, S, width) of a sheet of values (B, S)."""
        return net(labelled.images, queries, values == 0)

    def answer(self, nets: nn.ModuleDict, images: Tensor, sentences: tuple[str, ...]) -> Tensor:
        if not sentences:
            return images.new_zeros(len(images), 0, *images.shape[2:])
        queries = nets["average"].text(sentences)[None].expand(len(images), -1, -1)
        nobody = torch.zeros(queries.shape[:2], dtype=torch.bool, device=images.device)
        return nets["average"](images, queries, nobody).sigmoid()
