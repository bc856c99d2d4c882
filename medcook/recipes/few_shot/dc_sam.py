"""DC-SAM: positive and negative prompts by cycle-consistent attention (Qi et al., arXiv 2504.12080, 2025).

One example says what to segment. Two branches, one for the structure and one for what it is not, turn it into prompt
tokens for a frozen SAM: learned tokens ask the support, then the query. A place counts for a token only if going there
and back (place, the token that likes it most, that token's favourite place) ends in a place of the same kind.

  fused   F = W [f, SAM's features];  prior_c(x) = max_{y in c} cos([f, SAM](x), [f, SAM](y)), scaled to 0 .. 1
  branch  X_s = M [F_s, mean F_s in c, m_c], X_q = M [F_q, mean F_s in c, prior_c], c the structure or the rest
  cycle   i(j) = argmax_i A_ij, j'(j) = argmax_j A_i(j)j;  A_ij <- -inf where m(j'(j)) != m(j)
  prompts t = softmax(A_tq) X_q after t = softmax(A_ts) X_s, plus SAM's code of a point on, or beside, the object
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.few_shot import PrototypeNetwork, Shots, novel_dice
from medcook.few_shot.method import masked_mean, resize
from medcook.recipes.few_shot._prompting import (
    NearestFeature,
    SamFewShot,
    decoded,
    embedded,
    mask_priors,
    on_both,
    shown,
)
from medcook.recipes.few_shot._settings import EPISODES, PLACE, scales
from medcook.recipes.recipe import Component, Recipe
from medcook.sam.model import small_config
from medcook.tasks import Budget

HIDDEN = small_config().mask_decoder_config.hidden_size
SHARE = 0.3
"""Weight of SAM's features beside the others where places are compared."""


def cycle_bias(attention: Tensor, kind: Tensor) -> Tensor:
    """(B, 1, N) of 0 and -inf: which places a cycle through their token brings back to a place of the same kind.

    attention (B, T, N) of tokens to places, kind (B, N) bool. The token and place that like each other best remain.
    """
    token_of = attention.argmax(1)
    place_of = attention.argmax(2)
    back = place_of.gather(1, token_of)
    return torch.zeros_like(attention[:, :1]).masked_fill((kind.gather(1, back) != kind)[:, None], float("-inf"))


class CycleAttention(nn.Module):
    """Tokens (B, T, D) take from places (B, N, D) of a kind (B, N) bool."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.ask, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.forward_on = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor, places: Tensor, kind: Tensor, consistent: bool) -> Tensor:
        asked, keys, values = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).flatten(0, 1)
            for layer, x in ((self.ask, self.before(tokens)), (self.key, places), (self.value, places))
        )
        attention = asked @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5
        if consistent:
            attention = attention + cycle_bias(attention, kind.repeat_interleave(self.heads, 0))
        taken = (attention.softmax(-1) @ values).unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)
        tokens = tokens + self.out(taken)
        return tokens + self.forward_on(self.after(tokens))


class Branch(nn.Module):
    """The prompts of one side: from fused features, masks and priors to tokens (Q, T, HIDDEN) and features."""

    def __init__(self, width: int, tokens: int):
        super().__init__()
        self.merge = nn.Sequential(nn.Conv2d(2 * width + 1, width, 1), nn.ReLU())
        self.tokens = nn.Parameter(torch.randn(tokens, width))
        self.from_support, self.from_query = CycleAttention(width), CycleAttention(width)
        self.out = nn.Linear(width, HIDDEN)

    def forward(self, support: Tensor, kind: Tensor, query: Tensor, prior: Tensor, consistent: bool):
        """Support (S, D, h, w), kind (S, h, w) bool, query (Q, D, h, w), prior (Q, h, w)."""
        mean = masked_mean(support, kind.float())[None, :, None, None]
        theirs, mine = (
            self.merge(torch.cat([maps, mean.expand_as(maps), mask[:, None].to(maps.dtype)], dim=1))
            for maps, mask in ((support, kind), (query, prior))
        )
        tokens = self.from_support(self.tokens[None], flat(theirs)[None].flatten(1, 2), kind.reshape(1, -1), consistent)
        places = flat(mine)
        tokens = self.from_query(tokens.expand(len(places), -1, -1), places, (prior > 0.5).flatten(1), consistent)
        return self.out(tokens), mine


def flat(maps: Tensor) -> Tensor:
    """(N, D, h, w) to (N, h * w, D)."""
    return maps.flatten(2).transpose(1, 2)


@dataclass
class DCSam(SamFewShot):
    """Prompt tokens of two branches, and the difference of their priors as a rough mask, for a frozen SAM.

    tokens      of each branch; `keys` channels of fused features; `stride` cells of features are pooled to one
    consistent  False: plain cross-attention, without the cycle
    dual        False: the positive branch alone
    fused       False: SAM's features take no part
    """

    episodes: str = EPISODES
    count: int = 2
    views: int = 1
    tokens: int = 4
    keys: int = 64
    stride: int = 2
    consistent: bool = True
    dual: bool = True
    fused: bool = True

    def parts(self, inputs: int) -> dict[str, nn.Module]:
        rough = nn.Conv2d(2 * self.keys, 1, 1)
        nn.init.zeros_(rough.weight)
        nn.init.zeros_(rough.bias)
        return super().parts(inputs) | {
            "fuse": nn.Conv2d(self.width + HIDDEN, self.keys, 1),
            "negative": Branch(self.keys, self.tokens),
            "positive": Branch(self.keys, self.tokens),
            "rough": rough,
        }

    def logits(self, net: nn.ModuleDict, support: Shots, query: Shots) -> Tensor:
        found, _, _ = self.answer(net, support, query)
        return torch.stack([-found / 2, found / 2], dim=1)

    def answer(self, net: nn.ModuleDict, support: Shots, query: Shots) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (Q, H, W), prompt tokens (Q, T, HIDDEN), and the rough mask (Q, h, w), -1 to 1."""
        embedding = embedded(net["sam"], torch.cat([support.images, query.images]))
        maps = self.joined(torch.cat([support.maps, query.maps]), embedding.coarse)
        theirs, mine = maps.split([len(support.maps), len(query.maps)])
        inside = shown(support.masks, tuple(maps.shape[2:]))
        tokens, rough = self.prompts(net, theirs, inside, mine)
        asked_of = embedding.at(torch.arange(len(support.maps), len(maps)))
        size = tuple(query.images.shape[2:])
        return decoded(net["sam"], asked_of, tokens, rough, size), tokens, rough

    def joined(self, maps: Tensor, coarse: Tensor) -> Tensor:
        """(N, D + HIDDEN, h, w): features of length one, pooled, beside SAM's, whose length is `SHARE`."""
        maps = F.normalize(F.avg_pool2d(maps, self.stride), dim=1)
        sam = SHARE * self.fused * F.normalize(resize(coarse, maps.shape[2:]), dim=1)
        return torch.cat([maps, sam], dim=1)

    def prompts(self, net: nn.ModuleDict, support: Tensor, inside: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (Q, T, HIDDEN) and a rough mask (Q, h, w) from joined features and the support's cells."""
        priors = mask_priors(support, inside, query)
        fused_support, fused_query = net["fuse"](support), net["fuse"](query)
        codes = net["sam"].sam.prompt_encoder.point_embed
        found, seen = [], []
        for number, name in enumerate(("negative", "positive")):
            kind = inside if number else ~inside
            tokens, mine = net[name](fused_support, kind, fused_query, priors[:, number], self.consistent)
            seen.append(mine)
            if number or self.dual:
                found.append(tokens + codes[number].weight)
        difference = priors[:, 1] - priors[:, 0] if self.dual else 2 * priors[:, 1] - 1
        seen[0] = seen[0] * self.dual
        return torch.cat(found, dim=1), torch.tanh(2 * difference + net["rough"](torch.cat(seen, dim=1))[:, 0])


ARMS = ("nearest feature", "dc-sam", "positive alone")

recipe = Recipe(
    paper="dc-sam",
    title="Dual consistency: prompts by a cycle, on and beside the object",
    claim="Prompt tokens of a positive and a negative branch with cycle-consistent attention raise a frozen SAM's "
    "Dice for the left ventricle, from one annotated patient, against the most and the least similar place.",
    arms=on_both(
        {
            "nearest feature": NearestFeature(),
            "prototypes": PrototypeNetwork(episodes=EPISODES),
            "dc-sam": DCSam(),
            "positive alone": DCSam(dual=False),
            "without cycle": DCSam(consistent=False),
            "without SAM features": DCSam(fused=False),
        },
        PLACE,
    ),
    compare=("dc-sam", "nearest feature"),
    ablation=("dc-sam", "positive alone"),
    replicate="draw",
    scales=scales(*ARMS, budget=Budget(steps=120, batch=8, checks=1), novel=(3,), supports=1),
    metric="dice",
    score=novel_dice,
    components=(
        Component("SAM features in the mask prior", "implemented", "beside ImageNet features, with a weight of 0.3"),
        Component(
            "cycle-consistent cross-attention",
            "implemented",
            "as in the official code: in support and in query, where the prior above one half stands for the mask",
        ),
        Component(
            "positive and negative branch", "implemented", "four tokens each, with SAM's codes of points on and beside"
        ),
        Component(
            "prompt tuning of a frozen SAM",
            "simplified",
            "the book's small SAM, which hardly hears tokens alone: it also gets a rough mask, from the priors",
        ),
        Component("mask-tube training and video", "absent", "the book has no video; the claim here is about images"),
    ),
)
