"""Site-Level Fine-Tuning with Progressive Layer Freezing (Goedicke-Fritz et al., arXiv 2507.12269, 2025).

163 preterm infants' X-rays of the first day, and a lung disease to be foreseen: too few to train on. A network that
knows adults' X-rays is tuned carefully instead. At first only a linear probe on its features learns; then, while that
goes on, its layers thaw from the last downwards, each at a lower rate than the one above; the first never do.

  thawing   layer 4, 3, 2 after 10%, 30%, 60% of the steps that follow the probe; stem and layer 1 stay frozen
  rates     of layer 4, 3, 2: 1/2, 1/4, 1/10 of the head's, all along one cycle
  CutMix    a box of a partner's image is pasted; of the loss, lam is for the own label and 1 - lam for the partner's,
            with lam the share of the image that is still its own (not while the probe learns)

Here the few X-rays are those of Montgomery, the adults' those of Shenzhen, and both networks start from ImageNet: one
sees Shenzhen's patients in half of its steps, the other Montgomery's in all of them. Every Montgomery patient outside
the test set is scored once. That the authors' rates suit this network was looked at on Shenzhen's patients alone.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from medcook.cohorts import Condition, OutcomeTask, having, meets, outcome_rows
from medcook.data.transforms import Augment
from medcook.errors import MedcookError
from medcook.methods import Batch, Classifier, Moment
from medcook.methods.classification import image_labels
from medcook.methods.frozen import PHOTOGRAPH
from medcook.networks.squeezenet import FEATURES, SqueezeNet, load_squeezenet
from medcook.pretraining import Pretrained, TwoPhases, one_cycle, pooled
from medcook.recipes.pretraining._settings import BUDGET
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.tasks import Budget, Samples

STAGES = (("conv1", "fire2", "fire3"), ("fire4", "fire5"), ("fire6", "fire7"), ("fire8", "fire9"))
"""SqueezeNet from the image upwards: its stem, and what stands for layers 2, 3 and 4 of the paper's ResNet-50."""
THAWED = (1.0, 0.6, 0.3, 0.1)
"""After which share of the steps that follow the probe a stage learns; 1: never."""
SHARES = (0.0, 0.1, 0.25, 0.5)
"""The stages' rates as shares of the head's."""
EVEN = 0.25
"""The same where all stages have one rate: in the pretext, and without progressive freezing."""


@dataclass(frozen=True)
class OtherHospitalsTask(OutcomeTask):
    """An outcome of the patients who meet `keep`; of the other training patients a finding is known.

    These are the unlabelled samples, the finding their one rater: 1 all over the image where it has `finding`'s value.
    """

    finding: Condition = ("tuberculosis", True)

    @cached_property
    def unlabelled_patients(self) -> tuple[str, ...]:
        split = self.data.split
        training = split.train if self.fold is None else split.folds(self.folds)[self.fold][0]
        known = having(self.data, training, ((self.finding[0], None),))
        return tuple(patient for patient in known if patient not in self.labelled_patients)

    def samples(self, role: str) -> Samples:
        samples = super().samples(role)
        if role != "unlabelled":
            return samples
        cases = (
            self.data.attributes(case) for patient in self.unlabelled_patients for case in self.data.patients[patient]
        )
        facts = torch.tensor([meets(attributes, (self.finding,)) for attributes in cases], dtype=torch.uint8)
        maps = facts[samples.case_of].view(-1, *[1] * samples.labels.ndim).expand_as(samples.labels[:, None])
        return replace(samples, raters=maps.contiguous())


ATROPHY = {"outcome": "group", "positive": "atrophy", "finding": ("group", "atrophy")}
BRAINS = OtherHospitalsTask("embedded", **ATROPHY, keep=(("site", "north"),), folds=3, fold=0)


def cut_mixed(images: Tensor) -> tuple[Tensor, Tensor, float]:
    """(images (B, C, H, W) with a box out of each one's partner, the partners (B,), the share lam that is left).

    As large as 1 - u of the image before it is cut at the border, with u uniform (alpha = 1); one box for all.
    """
    partner = torch.randperm(len(images), device=images.device)
    across = math.sqrt(1 - float(torch.rand(())))
    box = [slice(None), slice(None)]
    for side in images.shape[2:]:
        centre, half = int(torch.randint(side, ())), int(side * across) // 2
        box.append(slice(max(0, centre - half), min(side, centre + half)))
    mixed = images.clone()
    mixed[tuple(box)] = images[partner][tuple(box)]
    inside = (box[2].stop - box[2].start) * (box[3].stop - box[3].start)
    return mixed, partner, 1 - inside / math.prod(images.shape[2:])


def mixed_loss(logits: Tensor, targets: Tensor, partner: Tensor, lam: float) -> Tensor:
    """lam CE(logits, targets) + (1 - lam) CE(logits, the partners' targets); logits (B, classes), targets (B,)."""
    return lam * F.cross_entropy(logits, targets) + (1 - lam) * F.cross_entropy(logits, targets[partner])


class Tuned(nn.Module):
    """SqueezeNet and a linear head: images (B, C, H, W) to logits (B, classes)."""

    def __init__(self, encoder: SqueezeNet, head: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, head

    def features(self, images: Tensor) -> Tensor:
        """(B, 512) of z-scored grey images: the first channel, three times, as bright as a photograph."""
        return pooled(self.encoder.features(PHOTOGRAPH * images[:, :1].expand(-1, 3, -1, -1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def freeze(self, frozen: tuple[bool, ...]) -> None:
        """Stages that are frozen get no gradient, and so the optimiser leaves them alone."""
        for names, still in zip(STAGES, frozen, strict=True):
            for name in names:
                getattr(self.encoder, name).requires_grad_(not still)


def tensors_of_stages() -> list[int]:
    """How many weights and biases there are in each stage."""
    with torch.device("meta"):
        whole = SqueezeNet(features_only=True)
    return [sum(len(list(getattr(whole, name).parameters())) for name in names) for names in STAGES]


@dataclass
class SiteTuned(Pretrained, Classifier):
    """A finding of other hospitals' X-rays first (`share` of the steps), then the outcome of the own few.

    start         `imagenet`, or `random` where there is no network to fetch weights
    probe         share of the second phase in which the head alone learns, at `rate`; 1: a linear probe, to the end
    progressive   layers thaw one after the other, at rates of their own; False: all at once, at one rate
    cutmix        how often a batch is mixed
    rate, pretext_rate   of the head, in either phase
    """

    rate: float = 1e-3
    pretext_rate: float = 1e-3
    share: float = 0.5
    dropout: float = 0.1
    augmentation: Augment = Augment(rotate=10, scale=0.1, shift=0.05, gamma=0.2, noise=0.05, flip=True)
    start: Literal["imagenet", "random"] = "imagenet"
    probe: float = 1 / 3
    progressive: bool = True
    cutmix: float = 0.5

    axes = 2
    trial = BRAINS

    def model(self, inputs: int, classes: int, dims: int) -> nn.Module:
        if dims != 2:
            raise MedcookError("SqueezeNet sees images, not volumes.", "Take a data set that is prepared as slices.")
        encoder = load_squeezenet() if self.start == "imagenet" else SqueezeNet(features_only=True)
        return Tuned(encoder, self.head(classes))

    def pretext_parts(self, model: nn.Module, inputs: int, dims: int) -> nn.Module:
        return self.head(2)

    def head(self, classes: int) -> nn.Module:
        """(B, 512) to (B, classes)."""
        norm = nn.BatchNorm1d(FEATURES, affine=False)
        return nn.Sequential(norm, nn.Dropout(self.dropout), nn.Linear(FEATURES, classes))

    def probing(self, steps: int) -> int:
        """In how many of the second phase's steps the head alone learns."""
        return round(self.probe * steps)

    def frozen(self, then: Moment) -> tuple[bool, ...]:
        """Which stages do not learn in a step of the second phase."""
        first = self.probing(then.steps)
        if then.step < first:
            return (True,) * len(STAGES)
        done = (then.step - first) / (then.steps - first)
        return tuple(done < start for start in THAWED) if self.progressive else (False,) * len(STAGES)

    def rates(self, now: Moment) -> tuple[float, ...]:
        """The learning rate of each stage, of the head and of the pretext's head at a step of the run."""
        is_pretext, then = self.phase(now)
        if is_pretext:
            height = self.pretext_rate * one_cycle(*then, warm=0.3)
            return (*[EVEN * height] * len(STAGES), 0.0, height)
        first = self.probing(then.steps)
        if then.step < first:
            return (*[0.0] * len(STAGES), self.rate, 0.0)
        height = self.rate * one_cycle(then.step - first, then.steps - first, warm=0.3)
        shares = SHARES if self.progressive else (EVEN,) * len(STAGES)
        return (*(share * height for share in shares), height, 0.0)

    def optimise(self, trained: list[nn.Parameter], steps: int) -> tuple[Optimizer, LRScheduler]:
        """AdamW; a group with its own rate for each stage, for the head and for the pretext's head."""
        left, groups = list(trained), []
        for count in (*tensors_of_stages(), 2, 2):
            groups, left = [*groups, left[:count]], left[count:]
        there = [number for number, group in enumerate(groups) if group]
        optimiser = AdamW([{"params": groups[n]} for n in there], lr=1.0, weight_decay=self.decay, fused=True)
        rates = [lambda step, n=n: self.rates(Moment(step, steps))[n] for n in there]
        return optimiser, TwoPhases(optimiser, rates, self.first(steps))

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        """Cross-entropy of the other hospitals' finding; nothing is frozen."""
        nets["model"].freeze((False,) * len(STAGES))
        logits = nets["pretext"](nets["model"].features(self.view(images.images))).float()
        known = images.labels if images.raters is None else images.raters[:, 0]
        return F.cross_entropy(logits, image_labels(known, logits.shape[1]))

    def supervised(self, nets: nn.ModuleDict, labelled: Batch, now: Moment) -> Tensor:
        """Cross-entropy of the outcome, of mixed images once the probe has learned."""
        model = nets["model"]
        model.freeze(self.frozen(now))
        if now.step < self.probing(now.steps) or float(torch.rand(())) >= self.cutmix:
            return super().supervised(nets, labelled, now)
        images, partner, lam = cut_mixed(labelled.images)
        logits = model(images).float()
        return mixed_loss(logits, image_labels(labelled.labels, logits.shape[1]), partner, lam)


METHODS = {
    "ImageNet": SiteTuned(share=0.0),
    "in-domain": SiteTuned(),
    "all layers at once": SiteTuned(progressive=False),
    "linear probe": SiteTuned(probe=1.0),
    "without CutMix": SiteTuned(cutmix=0.0),
}
RANDOM = ", random start"

recipe = Recipe(
    paper="bpd-finetune",
    title="A hospital's few X-rays: in-domain pre-training and progressive freezing",
    claim="A network tuned on the few X-rays of one hospital tells tuberculosis better when it has seen another "
    "hospital's X-rays in half of its steps than when it comes straight from ImageNet.",
    arms={name: Arm(method) for name, method in METHODS.items()}
    | {"in-domain, told the sex": Arm(SiteTuned(), {"finding": ("sex", "M")})}
    | {name + RANDOM: Arm(replace(method, start="random")) for name, method in METHODS.items()},
    compare=("in-domain", "ImageNet"),
    ablation=("in-domain", "all layers at once"),
    replicate="fold",
    metric="auc",
    score=outcome_rows,
    scales={
        "quick": Scale(
            BRAINS,
            Budget(steps=30, batch=6, precision="float32", checks=1),
            replicates=1,
            arms=tuple(name + RANDOM for name in ("ImageNet", "in-domain", "all layers at once")),
        ),
        "full": Scale(
            OtherHospitalsTask("chest_xray", keep=(("site", "Montgomery"),), folds=3),
            BUDGET,
            arms=("ImageNet", "in-domain", "all layers at once", "linear probe"),
        ),
    },
    published={
        "BPD, 163 infants, pre-trained on adults' X-rays, AUROC": 0.783,
        "the same without freezing, probe and CutMix, AUROC": 0.761,
        "from ImageNet, progressive freezing, AUROC": 0.717,
    },
    source="the authors' code and its README, github.com/phflot/bpdneo-cxr; the abstract",
    components=(
        Component(
            "in-domain pre-training",
            "simplified",
            "about 293 adults of Shenzhen and their one finding, tuberculosis, from ImageNet, in half of the steps; "
            "the paper takes TorchXRayVision's ResNet-50, of many sets and findings. Here the finding is the outcome, "
            "too: nearer to the task than theirs. The arm `in-domain, told the sex` has another; `full` leaves it out. "
            "This is the second evaluation: in the first the optimiser kept the moments of the pretext's gradients, "
            "and the AUC in domain was 0.74",
        ),
        Component(
            "progressive layer freezing",
            "implemented",
            "the authors' moments; SqueezeNet's fire modules stand for layers 2 to 4 of the ResNet",
        ),
        Component(
            "discriminative learning rates",
            "implemented",
            "the authors' rates and their cycle; the ablation has their rates of full fine-tuning: the whole encoder "
            "at a quarter of the head's. Weight decay is that of the book's other methods",
        ),
        Component("CutMix", "implemented", "for half of the batches, alpha 1, as the authors' best model has it"),
        Component(
            "linear probing",
            "implemented",
            "before the layers thaw, a third of the second phase, as theirs; as an arm of its own to the end. The "
            "pooled features are normalised first, which a ResNet's last norm does there",
        ),
        Component("ImageNet initialisation", "implemented", "SqueezeNet's, with all steps on the own X-rays"),
        Component("class-balanced sampling", "absent", "46 of 110 patients have the disease: nearly balanced"),
        Component(
            "bronchopulmonary dysplasia, IRDS grades",
            "absent",
            "infants' X-rays are not at hand: tuberculosis in adults stands for the outcome, and no grade is known",
        ),
    ),
)
