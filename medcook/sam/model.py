"""The book's small SAM: the architecture of Segment Anything (Kirillov et al., ICCV 2023), scaled to a laptop.

`SamModel` of transformers, with some changes. A convolution stem in place of the patch embedding, whose finer features
join the mask decoder where it upscales (as in SAM 2), and a small refiner after it. Prompts are drawn as well as
encoded (the last answer, the box, the clicks) and compared with the image (`likeness`) by a small U-Net, because box
tokens alone hardly begin to learn without SAM's billion masks; position codes are of low frequency, for the same
reason. Encoder, prompt encoder and decoder stay SAM's, so that adapters, LoRA and prompts find the layers that their
papers speak of.
"""

from copy import deepcopy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionAttention

from medcook.sam.likeness import Mixer, Residual, certainty, depths, likeness

PATCH = 16
SIZE, DENSE, FINE = 10 * PATCH, 40, 80
"""Sides of the input image, of the dense prompt and the decoder's masks, and of the refined masks."""
MOST_POINTS = 8
"""Points that become tokens; all points of a longer scribble are drawn into the dense prompt."""
STEM = (48, 96)
"""Channels of the stem at a quarter and an eighth of the resolution."""
PADDING = -10
"""Label of points that are not there (SamPromptEncoder turns their tokens into zeros)."""


class Embedding(NamedTuple):
    """What is computed once an image, by the side of the features: (B, hidden, 10, 10), (B, hidden / 4, 20, 20),
    (B, hidden / 8, 40, 40) and (B, 16, 80, 80)."""

    coarse: Tensor
    eighth: Tensor
    quarter: Tensor
    fine: Tensor

    def at(self, index: Tensor) -> "Embedding":
        """The rows that `index` names: one for each prompt."""
        return Embedding(*(part.index_select(0, index.to(part.device)) for part in self))


class Prompts(NamedTuple):
    """One prompt a row: points (B, N, 2) x, y in input pixels; labels (B, N) 1, 0, PADDING; boxes (B, 4), maybe NaN;
    dense (B, 3, DENSE, DENSE): earlier logits / 8, box (1 inside, -1 outside, 0 for none), clicks (1 and -1)."""

    points: Tensor
    labels: Tensor
    boxes: Tensor
    dense: Tensor


class ConvStem(nn.Module):
    """Image (B, 1, SIZE, SIZE) to tokens (B, 10, 10, width) by strided convolutions, better than one projection of a
    patch when data are few (Xiao et al., NeurIPS 2021). Keeps the finer features of the last image for the decoder."""

    def __init__(self, width: int, fine: int = 16):
        super().__init__()
        sides = (1, fine, *STEM, width)
        self.steps = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.GroupNorm(8, o), nn.GELU())
            for i, o in zip(sides, sides[1:], strict=False)
        )
        for step, channels in zip(self.steps, sides[1:-1], strict=False):
            step.append(Residual(channels))
        self.finer: list[Tensor] = []

    def forward(self, pixel_values: Tensor) -> Tensor:
        x, self.finer = pixel_values[:, :1], []
        for step in self.steps:
            x = step(x)
            self.finer.append(x)
        return self.finer.pop().permute(0, 2, 3, 1)


class Refiner(nn.Module):
    """Sharpens masks: (M, 1, DENSE, DENSE) logits and (M, fine, FINE, FINE) features to (M, 1, FINE, FINE) logits."""

    def __init__(self, fine: int = 16, width: int = 16):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(fine + 1, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 1, 3, padding=1),
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, logits: Tensor, fine: Tensor) -> Tensor:
        larger = F.interpolate(logits, (FINE, FINE), mode="bilinear", align_corners=False)
        seen = torch.cat([larger.clamp(-10, 10) / 5, fine], dim=1)
        return larger + self.layers(seen.to(self.layers[0].weight.dtype))


class DirectAttention(nn.Module):
    """The attention of SamVisionAttention, whose softmax goes through float32 and back; this one stays in its own type.

    In bfloat16 that takes a quarter of the time.
    """

    def __init__(self, like: SamVisionAttention):
        super().__init__()
        self.qkv, self.proj, self.heads, self.scale = like.qkv, like.proj, like.num_attention_heads, like.scale

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, None]:
        """(B, height, width, channels) to the same."""
        rows, height, width, channels = hidden_states.shape
        split = self.qkv(hidden_states).view(rows, height * width, 3, self.heads, channels // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0)
        weights = (query * self.scale @ key.transpose(1, 2)).softmax(-1)
        mixed = (weights @ value).view(rows, self.heads, height, width, -1).permute(0, 2, 3, 1, 4)
        return self.proj(mixed.reshape(rows, height, width, channels)), None


def small_config(width: int = 192, depth: int = 8, heads: int = 6, hidden: int = 160) -> SamConfig:
    """The sizes of the small SAM, as transformers' configuration."""
    vision = SamVisionConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=SIZE,
        patch_size=PATCH,
        output_channels=hidden,
        window_size=0,
        global_attn_indexes=list(range(depth)),
        use_rel_pos=False,
        initializer_range=0.02,
        num_pos_feats=hidden // 2,
    )
    prompt = SamPromptEncoderConfig(hidden_size=hidden, image_size=SIZE, patch_size=PATCH)
    decoder = SamMaskDecoderConfig(
        hidden_size=hidden, mlp_dim=4 * hidden, num_attention_heads=4, iou_head_hidden_dim=hidden
    )
    return SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)


class SmallSam(nn.Module):
    """Image to embedding, embedding and prompts to masks. `sam` is the SamModel that adaptations work on."""

    def __init__(self, config: SamConfig | None = None):
        super().__init__()
        config = config or small_config()
        self.sam = SamModel._from_config(config, attn_implementation="eager")  # the fused kernel is slow on CPUs
        self.sam.vision_encoder.patch_embed = ConvStem(config.vision_config.hidden_size)
        embed = self.sam.prompt_encoder.mask_embed
        embed.conv1 = nn.Conv2d(3, embed.conv1.out_channels, kernel_size=2, stride=2)
        hidden = config.mask_decoder_config.hidden_size
        self.skips = nn.ModuleList([nn.Conv2d(STEM[1], hidden // 4, 1), nn.Conv2d(STEM[0], hidden // 8, 1)])
        self.drawn = nn.Conv2d(3, hidden // 8, 3, padding=1)
        given = 5 + 3 * self.sam.vision_encoder.patch_embed.steps[0][0].out_channels
        self.mixer = Mixer(given, quarter=hidden // 8, eighth=hidden // 4, coarse=hidden)
        self.refiner = Refiner()
        masks = config.mask_decoder_config.num_multimask_outputs + 1
        self.trust, self.prior = nn.Parameter(torch.ones(masks)), nn.Parameter(torch.full((masks, 2), 0.5))
        codes = self.sam.shared_image_embedding.positional_embedding
        codes.data.div_(config.vision_config.scale)  # transformers draws them `scale` times as wide as SAM does
        nn.init.trunc_normal_(self.sam.vision_encoder.pos_embed, std=0.02)
        self.sam.prompt_encoder.shared_embedding.positional_embedding = codes

    def in_bfloat16(self) -> "SmallSam":
        """A copy that computes in bfloat16 what takes most of the time: encoder, mixer and refiner.

        Prompts, the mask decoder and the answers stay float32.
        """
        other = deepcopy(self)
        for part in (other.sam.vision_encoder, other.skips, other.mixer, other.refiner):
            part.to(torch.bfloat16)
        for layer in other.sam.vision_encoder.layers:
            layer.attn = DirectAttention(layer.attn) if isinstance(layer.attn, SamVisionAttention) else layer.attn
        return other

    def embed(self, images: Tensor) -> Embedding:
        """(B, 1, SIZE, SIZE), zero mean and unit variance each, to their embedding."""
        encoder = self.sam.vision_encoder
        coarse = encoder(images.to(encoder.pos_embed.dtype)).last_hidden_state
        fine, quarter, eighth = encoder.patch_embed.finer
        return Embedding(coarse, self.skips[0](eighth), self.skips[1](quarter), fine)

    def decode(self, embedding: Embedding, prompts: Prompts, mixed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, 4, DENSE, DENSE) and predicted IoU (B, 4) of all masks: the single one, then three sizes of it.

        A place deep in the box, or in its ellipse, is more likely object, by weights that are learned.
        """
        decoder = self.sam.mask_decoder
        embedding, sparse = self.prompted(embedding, prompts, mixed)
        tokens, heads = decoder.mask_tokens.weight, decoder.output_hypernetworks_mlps
        logits, overlap = masks_of(self.sam, embedding, sparse, tokens, heads)
        depth = depths(prompts.boxes / SIZE, DENSE).clamp(-0.5, 0.5)
        logits = logits + 4 * torch.einsum("kd,bdhw->bkhw", self.prior, depth)
        return logits, overlap + self.trust * certainty(logits.detach().float())

    def prompted(self, embedding: Embedding, prompts: Prompts, mixed: Tensor | None = None) -> tuple[Embedding, Tensor]:
        """The embedding with the dense prompts added, and the tokens (B, 1, tokens, hidden) of points and boxes.

        mixed (B, 1, 1, 1): how much it counts what the mixer makes of the drawn prompt, 1 where nothing is said
        """
        sparse, dense = self.sam.prompt_encoder(
            input_points=prompts.points[:, None],
            input_labels=prompts.labels[:, None],
            input_boxes=None,
            input_masks=prompts.dense,
        )
        sparse = torch.cat([sparse, self.box_tokens(prompts.boxes)], dim=2)
        coarse, quarter, eighth = embedding.coarse + dense, embedding.quarter, embedding.eighth
        looks = F.avg_pool2d(embedding.fine.float(), FINE // DENSE)
        depth = depths(prompts.boxes / SIZE, DENSE)
        seen = torch.cat([prompts.dense, depth, likeness(looks, prompts.dense, depth)], dim=1)
        finer, coarser = self.mixer(seen, quarter, eighth, coarse)
        if mixed is not None:
            finer, coarser = mixed * finer, mixed * coarser
        return Embedding(coarse, eighth + coarser, quarter + finer + self.drawn(prompts.dense), embedding.fine), sparse

    def box_tokens(self, boxes: Tensor) -> Tensor:
        """(B, 1, 2, hidden) corner tokens; those of no box (NaN) are SAM's token for no point."""
        encoder = self.sam.prompt_encoder
        none = boxes.isnan().any(1)
        corners = (boxes.nan_to_num() + 0.5).view(-1, 1, 2, 2)
        code = encoder.shared_embedding(corners, (SIZE, SIZE))
        code = code + torch.stack([encoder.point_embed[2].weight[0], encoder.point_embed[3].weight[0]])
        return torch.where(none.view(-1, 1, 1, 1), encoder.not_a_point_embed.weight, code)

    def refine(self, logits: Tensor, embedding: Embedding) -> Tensor:
        """(B, K, DENSE, DENSE) logits to (B, K, FINE, FINE) with the fine features."""
        count = logits.shape[1]
        fine = embedding.fine.repeat_interleave(count, dim=0)
        return self.refiner(logits.flatten(0, 1)[:, None], fine).view(-1, count, FINE, FINE)


def masks_of(
    sam: SamModel, embedding: Embedding, prompts: Tensor, tokens: Tensor, heads: nn.ModuleList
) -> tuple[Tensor, Tensor]:
    """SAM's mask decoder with any mask tokens: (B, K, DENSE, DENSE) logits, and the predicted IoU of SAM's own four.

    embedding with the dense prompts added, prompts (B, 1, N, hidden); tokens (K, hidden) and heads, a mask each. The
    decoder of transformers gives out either the single mask or the other three, and knows no finer features.
    """
    decoder, image = sam.mask_decoder, embedding.coarse
    side = image.shape[-1]
    asked = torch.cat([decoder.iou_token.weight, tokens]).expand(len(prompts), 1, -1, -1)
    attended, image = decoder.transformer(
        point_embeddings=torch.cat([asked.to(prompts.dtype), prompts], dim=2),
        image_embeddings=image,
        image_positional_embeddings=sam.get_image_wide_positional_embeddings().expand_as(image),
        attention_similarity=None,
    )
    image = image.transpose(2, 3).reshape(len(prompts), -1, side, side)
    image = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(image) + embedding.eighth))
    image = decoder.activation(decoder.upscale_conv2(image) + embedding.quarter)
    weights = torch.stack([head(attended[:, 0, 1 + k]) for k, head in enumerate(heads)], dim=1)
    return torch.einsum("bkc,bchw->bkhw", weights, image), decoder.iou_prediction_head(attended[:, 0, 0])
