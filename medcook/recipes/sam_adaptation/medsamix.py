"""MedSAMix (Yang et al., 2025): a generalist and a specialist merged layer by layer, by search.

Two parents share an architecture: the generalist g knows every kind of object a little, the specialist s was fine-tuned
on one. A child takes each layer l from between them,
    w_l = (1 - a_l) g_l + a_l s_l,   a = argmax over a of Dice on validation patients,
and no gradient is needed: coefficients are tried out, the best so far is perturbed and tried again (zero-order).
Here the specialist was fine-tuned on the left ventricle alone, and all structures of the heart are asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from medcook.data import Case
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.sam_adaptation._prompting import mean_rows, scales
from medcook.recipes.uncertainty._validation import once
from medcook.sam.adapting import PromptedSam, fitted_in, restore, start, targets_of, with_boxes
from medcook.sam.model import SIZE, SmallSam
from medcook.sam.predictor import Predictor
from medcook.sam.prompts import Prompt, box_of
from medcook.sam.zero_shot import Target, dice

MERGES = ("generalist", "specialist", "better parent", "uniform", "layers")

Weights = dict[str, Tensor]


def layer_of(name: str) -> str:
    """The layer that a weight of the small SAM belongs to: a block of the encoder, or a part."""
    parts = name.split(".")
    if "layers" in parts and "vision_encoder" in parts:
        return f"block {parts[parts.index('layers') + 1]}"
    for part in ("neck", "vision_encoder", "prompt_encoder", "mask_decoder"):
        if part in parts:
            return part
    return "fine features"  # skips, drawn prompts and the refiner


def merged(generalist: Weights, specialist: Weights, shares: dict[str, float]) -> Weights:
    """Weights between those of both parents: 0 is the generalist, 1 the specialist, a share for each layer."""
    return {
        name: torch.lerp(weight.float(), specialist[name].float(), float(shares[layer_of(name)])).to(weight.dtype)
        for name, weight in generalist.items()
    }


def search(score: Callable[[np.ndarray], float], size: int, trials: int, rng: np.random.Generator) -> np.ndarray:
    """The best of `trials` vectors (size,) in 0 to 1: five constant ones, then perturbations of the best so far."""
    best, highest = None, -np.inf
    for trial in range(trials):
        if trial < 5:
            tried = np.full(size, trial / 4)
        else:
            moved = rng.random(size) < max(0.3, 1 / size)  # a few layers at a time
            tried = np.clip(best + moved * rng.normal(0, 0.3, size), 0, 1)
        if (found := score(tried)) > highest:
            best, highest = tried, found
    return best


@dataclass
class MedSamix(PromptedSam):
    """A specialist is trained; what answers in the end is a merge of it and the small SAM as it ships.

    specialty  the label that the specialist is fine-tuned on
    merge      one of `MERGES`
    trials     coefficients that are tried on validation patients
    """

    tuned: tuple[str, ...] = ("encoder", "prompts", "decoder")
    prompts: str = "box"
    rounds: int = 1
    specialty: int = 3
    merge: str = "layers"
    trials: int = 20

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        if self.merge not in MERGES:
            raise MedcookError(f"Nobody can merge by {self.merge!r}.", f"There is: {', '.join(MERGES)}.")
        return super().build(inputs, classes, dims)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """As any prompted model, on one structure."""
        alone = torch.where(labelled.labels == self.specialty, labelled.labels, torch.zeros_like(labelled.labels))
        return super().training_step(nets, labelled._replace(labels=alone), unlabelled, now)

    def child(self, specialist: SmallSam, score: Callable[[SmallSam], float]) -> tuple[SmallSam, dict[str, float]]:
        """The merge that `score` likes best among those that this method may choose from, and its shares by layer."""
        model = start(self.pretrained).eval()
        parents = {name: weight.clone() for name, weight in model.state_dict().items()}, specialist.state_dict()
        layers = sorted({layer_of(name) for name in parents[0]})

        def made(shares: np.ndarray) -> SmallSam:
            model.load_state_dict(
                merged(*parents, dict(zip(layers, np.broadcast_to(shares, len(layers)), strict=True)))
            )
            return model

        tried = lambda shares: score(made(shares))  # noqa: E731
        if self.merge in ("generalist", "specialist"):
            best = np.array([float(self.merge == "specialist")])
        elif self.merge == "better parent":
            best = max((np.zeros(1), np.ones(1)), key=tried)
        elif self.merge == "uniform":
            best = max(np.linspace(0, 1, self.trials)[:, None], key=tried)
        else:
            best = search(tried, len(layers), self.trials, np.random.default_rng(0))
        return made(best), dict(zip(layers, np.broadcast_to(best, len(layers)).tolist(), strict=True))


@torch.no_grad()
def boxed_dice(model: SmallSam, targets: list[Target]) -> float:
    """Mean Dice from tight boxes: over targets of a structure, then over structures."""
    found: dict[str, list[float]] = {}
    images = torch.stack([torch.from_numpy(target.image)[None] for target in targets])
    shape = tuple(images.shape[2:])
    for part, group in zip(images.split(16), [targets[k : k + 16] for k in range(0, len(targets), 16)], strict=True):
        boxes = torch.tensor([box_of(target.mask) for target in group]) * (SIZE / max(shape))
        embedding = model.embed(fitted_in(part))
        logits, _ = model.decode(embedding, with_boxes(boxes))
        answers = restore(model.refine(logits[:, :1], embedding), shape)[:, 0].numpy() > 0
        for target, answer in zip(group, answers, strict=True):
            found.setdefault(target.structure, []).append(dice(answer, target.mask))
    return float(np.mean([np.mean(values) for values in found.values()]))


MOST = 24
"""Validation targets that a merge is tried on: the middle one of each structure and patient, spread over these."""


@once
def chosen(fitted) -> Predictor:
    """The merged model, its coefficients searched on validation patients once a training."""
    fitted.nets.load_state_dict(fitted.weights["last"])
    targets = []
    for case in fitted.task.cases("val"):
        by_name = {target.structure: target for target in targets_of(fitted.task, case)}
        targets += by_name.values()
    targets = targets[:: -(-len(targets) // MOST)]
    model, _ = fitted.method.child(fitted.nets["average"].eval(), lambda model: boxed_dice(model, targets))
    return Predictor(model, zoom=False)


def merged_rows(fitted, case: Case) -> list[dict]:
    """Mean Dice from the tight box of each structure of a case, by the merged model."""
    predictor = chosen(fitted)
    ask = lambda target: {"dice": dice(predictor(target.image, Prompt(box=box_of(target.mask))).mask, target.mask)}  # noqa: E731
    return mean_rows(case, targets_of(fitted.task, case), ask)


recipe = Recipe(
    paper="medsamix",
    title="MedSAMix: merging a generalist and a specialist",
    claim="Merged layer by layer, with coefficients searched on validation patients, the small SAM and a copy "
    "fine-tuned on the left ventricle answer boxes around all heart structures better than the better of the two.",
    arms={
        "generalist": Arm(MedSamix(merge="generalist")),
        "specialist": Arm(MedSamix(merge="specialist")),
        "better parent": Arm(MedSamix(merge="better parent")),
        "uniform": Arm(MedSamix(merge="uniform")),
        "medsamix": Arm(MedSamix()),
    },
    compare=("medsamix", "better parent"),
    ablation=("medsamix", "uniform"),
    replicate="draw",
    scales=scales("better parent", "uniform", "medsamix", steps=120),
    score=merged_rows,
    published={"gain on specialised tasks, percent": 6.67, "gain on several tasks, percent": 4.37},
    source="abstract",
    components=(
        Component(
            "layer-wise merging",
            "implemented",
            "linear, a share for each block of the encoder and each other part; the paper also varies how to merge",
        ),
        Component(
            "zero-order search",
            "implemented",
            "five uniform merges, then perturbations of the best so far: 20 trials on 24 validation targets; the "
            "paper's optimiser fits a model of the score",
        ),
        Component(
            "single-task optimisation",
            "implemented",
            "the target is the mean Dice over the structures of one set",
        ),
        Component(
            "multi-objective optimisation",
            "absent",
            "one set: there is no second task whose loss would count",
        ),
        Component(
            "SAM and MedSAM",
            "simplified",
            "the small SAM as it ships, and the same fine-tuned on one structure of five patients within the run",
        ),
    ),
)
