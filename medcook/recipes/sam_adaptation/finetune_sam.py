"""How to build the best medical image segmentation algorithm using foundation models (Gu et al., MELBA 2025).

A grid study of fine-tuning the Segment Anything Model: which component learns, and how. Here its two questions about
strategy, on the small SAM: the mask decoder alone or the image encoder as well; all their weights, or parameter-
efficiently by adapter blocks or by LoRA; with few and with all labels, beside a U-Net from scratch.

    full      every weight w of a component learns
    adapter   h <- h + up(gelu(down(h)))        after every attention and every MLP; `up` is zero at first
    LoRA      W <- W + 2 B A                    in every linear layer of the transformer; B is zero at first

The tokens that ask for the classes, and the heads that turn these into masks, are new and learn in every arm.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from medcook.methods import Supervised
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.sam_adaptation._adapters import DECODER_LINEAR, LINEAR, Bottleneck, lora, scales
from medcook.sam.adapting import AdaptedSam, Segmenter, tune

ENDS = {"encoder": ("proj", "lin2"), "decoder": ("out_proj", "lin2")}
"""The last linear layer of every attention and of every MLP, by component: an adapter follows it."""


def add_adapters(part: nn.Module, layers: tuple[str, ...], hidden: int) -> None:
    """A `Bottleneck` after every linear layer of `part` that has one of these names."""
    found = [(parent, name) for parent in part.modules() for name in layers if hasattr(parent, name)]
    for parent, name in found:
        layer = getattr(parent, name)
        setattr(parent, name, nn.Sequential(layer, Bottleneck(layer.out_features, hidden)))


def components_of(model: Segmenter) -> dict[str, nn.Module]:
    """The two transformers that adapters and LoRA go into."""
    return {"encoder": model.sam.sam.vision_encoder, "decoder": model.sam.sam.mask_decoder.transformer}


@dataclass
class FinetunedSam(AdaptedSam):
    """One cell of the grid.

    component  what is adapted
    how        every weight, or adapter blocks, or LoRA
    hidden     width of an adapter's bottleneck; `rank` of LoRA: about as many trainable weights in the encoder
    """

    tuned: tuple[str, ...] = ()
    component: Literal["decoder", "encoder and decoder"] = "encoder and decoder"
    how: Literal["full", "adapter", "lora"] = "lora"
    hidden: int = 16
    rank: int = 4

    def adapt(self, model: Segmenter) -> nn.Module:
        chosen = tuple(self.component.split(" and "))
        tune(model.sam, chosen if self.how == "full" else self.tuned)
        for name, part in components_of(model).items():
            if name in chosen and self.how == "adapter":
                add_adapters(part, ENDS[name], self.hidden)
            if name in chosen and self.how == "lora":
                lora(part, self.rank, LINEAR if name == "encoder" else DECODER_LINEAR)
        return model


UNET = Supervised(channels=(8, 16, 32, 64, 64))
ALL = {"labelled": None}
"""An arm with the labels of every training patient."""

recipe = Recipe(
    paper="finetune-sam",
    title="Fine-tuning SAM: which component, and by which means",
    claim="With three labelled patients, parameter-efficient tuning of encoder and decoder gives a higher Dice than "
    "tuning the whole decoder alone.",
    arms={
        "decoder": Arm(FinetunedSam(component="decoder", how="full")),
        "decoder, adapter": Arm(FinetunedSam(component="decoder", how="adapter")),
        "decoder, lora": Arm(FinetunedSam(component="decoder", how="lora")),
        "both": Arm(FinetunedSam(how="full")),
        "both, adapter": Arm(FinetunedSam(how="adapter")),
        "both, lora": Arm(FinetunedSam(how="lora")),
        "u-net": Arm(UNET),
        "decoder, all labels": Arm(FinetunedSam(component="decoder", how="full"), ALL),
        "both, all labels": Arm(FinetunedSam(how="full"), ALL),
        "both, lora, all labels": Arm(FinetunedSam(how="lora"), ALL),
        "u-net, all labels": Arm(UNET, ALL),
    },
    compare=("both, lora", "decoder"),
    ablation=("both, lora", "decoder, lora"),
    replicate="draw",
    scales=scales(
        "decoder",
        "decoder, lora",
        "both",
        "both, adapter",
        "both, lora",
        "u-net",
        "decoder, all labels",
        "both, lora, all labels",
    ),  # fmt: skip
    source="the paper's abstract: findings (1) and (2), which name no figures",
    components=(
        Component(
            "model components",
            "implemented",
            "decoder, or encoder and decoder; the convolution stem's skips and the refiner of the small SAM count as "
            "decoder",
        ),
        Component(
            "parameter-efficient tuning",
            "implemented",
            "adapter blocks one after the other (the paper also has a parallel one beside the MLP), and peft's LoRA",
        ),
        Component("few and all labels", "implemented", "3 and all 70 training patients of ACDC, the same steps"),
        Component("earlier methods", "simplified", "a U-Net from scratch stands for these"),
        Component(
            "backbone architectures", "absent", "the book has one small SAM; the paper finds them to matter little"
        ),
        Component(
            "self-supervised continued training", "absent", "another question; the small SAM has one pre-training"
        ),
        Component("prompt-based setting", "absent", "other recipes of the chapter answer prompts"),
    ),
)
