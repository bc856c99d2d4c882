"""VLP-SAM: a reference image and a name prompt SAM (Sakurai et al., arXiv 2502.00719, 2025).

An annotated reference shows how a structure looks; its name says which structure is meant, in every patient. Both
become maps beside the query's features, from which learned tokens make prompt embeddings for a frozen SAM. The names'
own encoding is fixed: hashed runs of 3 and 4 letters, so that "left ventricle" and "right ventricle" share a part.

  text    e(name) = sum over runs g of the name: +-1 at hash(g), scaled to length one
  merge   X = M [F_q, mean of F_s in the mask, T e, prior, a],  a(x) = cos(F_q(x), T e)
  prompts t = transformer(tokens; X), for SAM's decoder; prior and a linear map of X as a rough mask
"""

import zlib
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import Case, open_dataset
from medcook.few_shot import FewShotTask, Shots, novel_dice
from medcook.few_shot.method import class_episodes, masked_mean
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.recipes.few_shot._prompting import (
    NearestFeature,
    SamFewShot,
    decoded,
    embedded,
    mask_priors,
    on_both,
    shown,
)
from medcook.recipes.few_shot._settings import OWN, PLACE, QUICK
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.sam.model import small_config
from medcook.tasks import Budget

HIDDEN = small_config().mask_decoder_config.hidden_size
TEXT = 128
"""Length of a name's encoding."""


def encode_text(name: str, length: int = TEXT) -> Tensor:
    """(length,) of length one: the runs of 3 and 4 letters of a name, hashed with a sign (Weinberger et al. 2009)."""
    padded, found = f" {name.lower()} ", torch.zeros(length)
    for size in (3, 4):
        for start in range(len(padded) - size + 1):
            code = zlib.crc32(padded[start : start + size].encode())
            found[code % length] += 1.0 if code >> 31 else -1.0
    return F.normalize(found, dim=0)


@dataclass
class VLPSam(SamFewShot):
    """Prompt embeddings from a reference image and a name, for a frozen SAM.

    names       of the structures that training shows, by label; `name` is what is asked for (see `called`)
    text, image False: prompts hear of the reference image alone, or of the name alone
    tokens      of the prompt; `keys` channels; `stride` cells of features are pooled to one
    """

    count: int = 2
    views: int = 1
    names: tuple[str, ...] = ()
    name: str = ""
    text: bool = True
    image: bool = True
    tokens: int = 8
    keys: int = 64
    stride: int = 2

    def parts(self, inputs: int) -> dict[str, nn.Module]:
        rough = nn.Conv2d(self.keys, 1, 1)
        nn.init.zeros_(rough.weight)
        nn.init.zeros_(rough.bias)
        prompts = nn.TransformerDecoderLayer(
            self.keys, 4, 2 * self.keys, dropout=0.0, batch_first=True, norm_first=True
        )
        learned = nn.Embedding(self.tokens, self.keys)
        return super().parts(inputs) | {
            "project": nn.Conv2d(self.width, self.keys, 1),
            "say": nn.Linear(TEXT, self.keys),
            "merge": nn.Sequential(nn.Conv2d(3 * self.keys + 2, self.keys, 1), nn.ReLU()),
            "tokens": learned,
            "prompts": prompts,
            "out": nn.Linear(self.keys, HIDDEN),
            "rough": rough,
        }

    def called(self, name: str) -> "VLPSam":
        """The method, asked for the structure of this name."""
        return replace(self, name=name)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """Episodes of base structures that two images show, each with its name."""
        net = nets["model"]
        with torch.set_grad_enabled(bool(self.base)):
            known = Shots(labelled.images, self.encode(net, labelled.images), labelled.labels)
        named = F.interpolate(net["head"](known.maps), known.images.shape[2:], mode="bilinear", align_corners=False)
        loss = (self.base or 1.0) * find_loss(self.loss)(named, known.masks)
        values = torch.randint(1, 1 + len(self.names), (self.count,)).tolist()
        episodes = [(value, *pair) for value in values for pair in episodes_of(known, value, self.views)]
        for value, support, query in episodes:
            asked = self.called(self.names[value - 1])
            loss = loss + asked.query_loss(asked.logits(net, support, query), query) / len(episodes)
        return loss

    def logits(self, net: nn.ModuleDict, support: Shots, query: Shots) -> Tensor:
        merged, prior = self.merged(net, support, query)
        tokens = net["prompts"](net["tokens"].weight.expand(len(merged), -1, -1), merged.flatten(2).transpose(1, 2))
        rough = torch.tanh(2 * prior + net["rough"](merged)[:, 0])
        size = tuple(query.images.shape[2:])
        found = decoded(net["sam"], embedded(net["sam"], query.images), net["out"](tokens), rough, size)
        return torch.stack([-found / 2, found / 2], dim=1)

    def merged(self, net: nn.ModuleDict, support: Shots, query: Shots) -> tuple[Tensor, Tensor]:
        """What prompts are made of (Q, keys, h, w), and the prior of the reference image (Q, h, w), -1 to 1."""
        theirs, mine = (F.avg_pool2d(each.maps, self.stride) for each in (support, query))
        inside = shown(support.masks, tuple(theirs.shape[2:]))
        background, structure = mask_priors(theirs, inside, mine).unbind(1)
        prior = self.image * (structure - background)
        keys = net["project"](mine)
        look = self.image * masked_mean(net["project"](theirs), inside.float())
        word = self.text * net["say"](encode_text(self.name).to(keys.device))
        match = self.text * F.cosine_similarity(keys, word[None, :, None, None].expand_as(keys), dim=1)
        wide = [each[None, :, None, None].expand_as(keys) for each in (look, word)]
        return net["merge"](torch.cat([keys, *wide, prior[:, None], match[:, None]], dim=1)), prior


def episodes_of(known: Shots, value: int, views: int) -> list[tuple[Shots, Shots]]:
    """At most one (support, query) episode of a structure: none where fewer than two images show it."""
    other = (known.masks != value) & (known.masks != 255)
    return class_episodes(known._replace(masks=known.masks.masked_fill(other, 0)), 1, views)


def called_dice(fitted, case: Case) -> list[dict]:
    """The rows of `novel_dice`; methods that hear names are told which structure they are asked for."""
    rows = []
    for value, name in fitted.task.novel_structures.items():
        method = fitted.method.called(name) if isinstance(fitted.method, VLPSam) else fitted.method
        one = replace(fitted, method=method, task=replace(fitted.task, novel=(value,)))
        rows += novel_dice(one, case)
    return rows


def names_of(dataset: str) -> tuple[str, ...]:
    """The names of a data set's structures, in the order of their labels."""
    return tuple(open_dataset(dataset).manifest.structures.values())


def methods(dataset: str) -> dict[str, SamFewShot]:
    """Every arm, for structures that are called as they are in a data set."""
    both = VLPSam(names=names_of(dataset))
    return {
        "nearest feature": NearestFeature(),
        "vlp-sam": both,
        "image alone": replace(both, text=False),
        "text alone": replace(both, image=False),
    }


def arms() -> dict[str, Arm]:
    """Arms on ImageNet features speak of acdc, those on features from scratch of the embedded cohort."""
    found, quick = (on_both(methods(name), PLACE) for name in ("acdc", "embedded"))
    return {name: quick[name] if name.endswith(OWN) else arm for name, arm in found.items()}


recipe = Recipe(
    paper="vlp-sam",
    title="A reference image and a name prompt SAM",
    claim="For structures whose names training has heard, in other patients, prompts from a reference image and the "
    "name raise a frozen SAM's Dice against clicks at the most and the least similar place.",
    arms=arms(),
    compare=("vlp-sam", "nearest feature"),
    ablation=("vlp-sam", "image alone"),
    replicate="draw",
    scales={
        "quick": Scale(
            FewShotTask("embedded", novel=(1, 3), source="embedded", supports=1),
            QUICK,
            replicates=1,
            arms=tuple(name + OWN for name in methods("embedded")),
        ),
        "full": Scale(
            FewShotTask("acdc", novel=(1, 3), source="acdc", supports=1, evaluation="test"),
            Budget(steps=120, batch=6, checks=1),
            arms=tuple(methods("acdc")),
        ),
    },
    metric="dice",
    score=called_dice,
    components=(
        Component(
            "text embedding of the class name",
            "simplified",
            "a fixed code of hashed runs of letters in place of CLIP: it tells names apart but knows no meaning, so it "
            "can help with names that training has heard, and with no others",
        ),
        Component("visual reference", "implemented", "mean feature of the mask, and the prior of most alike places"),
        Component("image-text similarity map", "implemented", "cosine of the query's features and the projected name"),
        Component(
            "prompt embeddings into a frozen SAM",
            "simplified",
            "eight tokens; the book's small SAM, which hardly hears tokens alone, also gets a rough mask",
        ),
        Component("structures not named in training", "absent", "needs a text encoder that knows what words mean"),
    ),
)
