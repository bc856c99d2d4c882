"""MedImageInsight: An Open-Source Embedding Model for General Domain Medical Imaging.

Codella et al., arXiv 2410.06542, 2024. One embedding for all kinds of medical images, learnt from what is said of them,
and then used as it is. With v an image's and t a sentence's unit vector, UniCL (Yang et al., CVPR 2022) draws an image
to every sentence of its batch that says the same, and the other way round; P(i) are the images captioned like image i:

  loss of image i       -1/|P(i)| sum_{k in P(i)} log(exp(s v_i t_k) / sum_j exp(s v_i t_j)), likewise of sentences
  classification        the share of the nearest known images that have the finding; or by sentences alone
  search with evidence  the nearest known images of all kinds, with what is known of them
  operating point       the threshold that gives known images, each left out once, the sensitivity that is asked for

Architecture and reader of the published checkpoint are in `medcook.networks.unicl`; the weights themselves are not at
hand. The claim is tested in miniature: SqueezeNet, as ImageNet left it, goes on to learn from X-rays of Shenzhen with
captions of finding, sex and age, from hearts with captions of their disease, from hippocampi and necks. Then,
unchanged, it classifies and searches X-rays of a hospital that it never saw, Montgomery, against the features that it
started from. Rate and steps were looked at on held-out patients of Shenzhen, who are not scored. This is the second
evaluation: in the first (AUC 0.72) no image of another domain had reached the training.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.cohorts import Condition, first_attributes, meets
from medcook.data.transforms import Augment
from medcook.errors import MedcookError
from medcook.image_pool import PoolTask, origin
from medcook.methods import Batch, Moment
from medcook.methods.classification import image_labels
from medcook.methods.contrastive import ContrastiveImageText, ImageText, contrast
from medcook.networks.squeezenet import FEATURES, load_squeezenet
from medcook.networks.unicl import PUBLISHED, Davit
from medcook.recipes.fairness.cxr_clip_fairness import CaptionTask, captions
from medcook.recipes.pretraining._searching import NEAREST, insight_rows
from medcook.recipes.pretraining.bpd_finetune import Tuned
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.tasks import Budget, Samples, shared_dataset

SUBJECTS = {"chest_xray": "chest x-ray", "embedded": "brain mri"}
OTHERS = {
    "acdc": ("heart mri", {"NOR": "clear", "DCM": "dilated", "HCM": "thick", "MINF": "infarcted", "RV": "right"}),
    "hippocampus": ("hippocampus mri", {}),
    "openkbp": ("neck ct", {}),
    "embedded, negative": ("negative mri", {}),
}
"""What captions call the images of a set, and the word for each group of its patients."""
SAID = ("sex", "age")


def sentences(dataset: str, domains: tuple[str, ...], said: tuple[str, ...] = SAID) -> tuple[str, ...]:
    """All captions: of the set itself, an odd number where there is the finding, and then of the other domains."""
    own = [f"{SUBJECTS[dataset]} {caption}" for caption in captions(said)]
    return (*own, *(told(name, group) for name in domains for group in ("", *OTHERS[name][1])))


def told(name: str, group: str) -> str:
    """The caption of an image of another domain."""
    subject, groups = OTHERS[name]
    return " ".join(filter(None, (subject, groups.get(group, ""))))


@dataclass(frozen=True)
class DomainsTask(CaptionTask):
    """Images of all hospitals but one, with captions; the unlabelled samples and their captions are of other domains.

    new   the patients of the hospital that nobody learns from: those of the training part are known images, to be
          searched among (`reference_patients`), the held-out ones are scored
    most  images of other domains, as many of each
    """

    said: tuple[str, ...] = SAID
    domains: tuple[str, ...] = ()
    new: Condition = ("site", "Montgomery")
    most: int = 900

    @property
    def classes(self) -> int:
        return len(self.sentences)

    @property
    def sentences(self) -> tuple[str, ...]:
        return sentences(self.dataset, self.domains, self.said)

    @cached_property
    def labelled_patients(self) -> tuple[str, ...]:
        return self._side(0, False)

    @cached_property
    def unlabelled_patients(self) -> tuple[str, ...]:
        """Nobody of this set: where there is someone, a training asks for the images of other domains."""
        return self.labelled_patients if self.domains else ()

    @cached_property
    def reference_patients(self) -> tuple[str, ...]:
        return self._side(0, True)

    @cached_property
    def val_patients(self) -> tuple[str, ...]:
        return self._side(1, True)

    def _side(self, part: int, new: bool) -> tuple[str, ...]:
        """Who trains (0) or is held out (1), of the new hospital or of the others."""
        split = self.data.split
        patients = (split.train, split.val)[part] if self.fold is None else split.folds(self.folds)[self.fold][part]
        known = ((p, first_attributes(self.data, p)) for p in patients)
        asked = ((self.outcome, None),)
        found = tuple(p for p, facts in known if meets(facts, asked) and meets(facts, (self.new,)) == new)
        if not found:
            raise MedcookError(f"{self.dataset}: nobody is {'' if new else 'not '}of {self.new}.", "Change `new`.")
        return found

    def samples(self, role: str) -> Samples:
        if role != "unlabelled":
            return super().samples(role)
        pool = PoolTask(self.dataset, pool=self.domains, most=self.most).samples("unlabelled")
        come, known, numbers = origin(pool.groups), self.sentences, []
        cases = [self._groups(name) for name in self.domains]
        for domain, case in zip(come.set.tolist(), come.case.tolist(), strict=True):
            numbers.append(known.index(told(self.domains[domain], cases[domain][case])))
        maps = torch.tensor(numbers, dtype=torch.uint8).view(-1, 1, 1, 1).expand_as(pool.labels[:, None])
        return replace(pool, raters=maps.contiguous())

    def _groups(self, name: str) -> list[str]:
        """The group of each case of a domain's pool; empty where there is none."""
        data = shared_dataset(name.partition(", ")[0])
        cases = (case for patient in data.split.train for case in data.patients[patient])
        return [str(data.attributes(case).get("group") or "") for case in cases]


DOMAINS = ("acdc", "hippocampus", "openkbp")
BRAINS = DomainsTask(
    "embedded",
    outcome="group",
    positive="atrophy",
    new=("site", "north"),
    domains=("embedded, negative",),
    folds=3,
    fold=0,
)


class Grey(nn.Module):
    """An encoder of RGB images that is shown grey ones (B, C, H, W), the first channel three times."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images[:, :1].expand(-1, 3, -1, -1))


SMALL = PUBLISHED["IMAGE_ENCODER"]["SPEC"] | {"DIM_EMBED": [16, 32, 64, 128], "DEPTHS": [1] * 4, "WINDOW_SIZE": 6}
SMALL |= {"NUM_HEADS": [1, 2, 4, 8], "NUM_GROUPS": [1, 2, 4, 8]}
"""The published image encoder with a sixteenth of the channels, and one block a stage."""


@dataclass
class Insight(ContrastiveImageText):
    """The embedding of several domains.

    encoder  `imagenet`: SqueezeNet with what ImageNet taught it; `davit`: the published one, small, from nothing
    tuned    whether the encoder learns; if not, its features as they are take the embedding's place
    others   of a batch, images of other domains as a share of its X-rays
    """

    rate: float = 5e-4
    augmentation: Augment = Augment(rotate=10, scale=0.1, shift=0.05, gamma=0.2, noise=0.05, flip=True)
    encoder: Literal["imagenet", "davit"] = "imagenet"
    tuned: bool = True
    others: float = 0.25

    uses_unlabelled = True
    axes = 2
    trial = BRAINS

    def image_text(self, sentences: tuple[str, ...], inputs: int, dims: int) -> ImageText:
        if dims != 2:
            raise MedcookError("These encoders see images, not volumes.", "Take a data set that is prepared as slices.")
        pretrained = self.encoder == "imagenet"
        width = FEATURES if pretrained else SMALL["DIM_EMBED"][-1]
        space = {"channels": (width,), "width": self.width, "heat": self.heat}
        model = ImageText(sentences=sentences, inputs=1, dims=2, **space)
        model.image = Tuned(load_squeezenet(), nn.Identity()) if pretrained else Grey(Davit(SMALL))
        model.image.requires_grad_(self.tuned)
        return model

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        model, images = nets["model"], labelled.images
        numbers = image_labels(labelled.labels, len(model.sentences))
        some = round(self.others * len(images)) if unlabelled is not None and unlabelled.raters is not None else 0
        if some:
            images = torch.cat([images, unlabelled.images[:some]])
            numbers = torch.cat([numbers, image_labels(unlabelled.raters[:some, 0], len(model.sentences))])
        texts = model.texts(tuple(model.sentences[number] for number in numbers.tolist()))
        return contrast(model.images(images), texts, numbers, model.scale)

    def embed(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of images."""
        return super().embed(nets, images) if self.tuned else F.normalize(nets["average"].image(images).float(), dim=1)


def arms(method: Insight, task: DomainsTask, before: str, suffix: str = "") -> dict[str, Arm]:
    """The method, and what each of the others takes away from it; `before` names the encoder as it was."""
    findings = sentences(task.dataset, task.domains, ())
    found = {
        "embedding": Arm(method),
        before: Arm(replace(method, tuned=False)),
        "X-rays alone": Arm(replace(method, others=0.0)),
        "findings alone": Arm(replace(method, captions=findings), {"said": ()}),
    }
    return {name + suffix: arm for name, arm in found.items()}


XRAYS = DomainsTask("chest_xray", domains=DOMAINS, folds=3)
LARGE = arms(Insight(captions=XRAYS.sentences), XRAYS, "ImageNet features")
DAVIT = Insight(captions=BRAINS.sentences, encoder="davit", rate=1e-3)
LITTLE = arms(DAVIT, BRAINS, "untrained features", ", small DaViT")

recipe = Recipe(
    paper="medimageinsight",
    title="MedImageInsight: one embedding, used without fine-tuning",
    claim="The nearest known images of a hospital that was not trained on tell tuberculosis better in an embedding of "
    "medical images and captions than in the ImageNet features from which it started.",
    arms=LARGE | LITTLE,
    compare=("embedding", "ImageNet features"),
    ablation=("embedding", "X-rays alone"),
    replicate="fold",
    metric="auc",
    score=insight_rows,
    scales={
        "quick": Scale(
            BRAINS,
            Budget(steps=30, batch=8, precision="float32", checks=0),
            replicates=1,
            arms=tuple(LITTLE),
        ),
        "full": Scale(
            XRAYS,
            Budget(steps=300, batch=12, checks=0),
            arms=tuple(LARGE),
        ),
    },
    published={"search of X-rays, AUC above every other public model, at least": 0.06},
    source="abstract; config.yaml and program of the checkpoint, huggingface.co/lion-ai/MedImageInsights; UniCL: Yang "
    "et al., CVPR 2022",
    components=(
        Component(
            "architecture",
            "implemented",
            "both towers by the published config.yaml, 361 and 252 million weights, in `medcook.networks.unicl`: the "
            "DaViT is the one of transformers, tested against an implementation of its own. Small and from nothing it "
            "is trained at `quick`; at `full` a SqueezeNet takes its place, which has learnt from photographs as "
            "theirs had",
        ),
        Component(
            "checkpoint",
            "implemented",
            "the published folder's layout, and both forms of its names, are read offline and tested on a small one; "
            "the published weights are not at hand, so none of their figures is tested here",
        ),
        Component(
            "contrast of images, texts and labels (UniCL)",
            "implemented",
            "`medcook.methods.contrastive`. Images that are captioned alike have the very same sentence here, and then "
            "it is worth as much as CLIP's loss; it differs where one label is said in several ways. A sentence is the "
            "mean of its words. `findings alone` leaves out what captions tell beside the finding",
        ),
        Component(
            "many domains",
            "simplified",
            "X-rays, heart and hippocampus MR and neck CT, a fifth of a batch from the latter three; captions are made "
            "of what is known of patients; theirs has nine and more kinds of images, and reports",
        ),
        Component(
            "classification without fine-tuning",
            "implemented",
            f"the {NEAREST} nearest of about 73 known X-rays of the new hospital; column `zero_shot`: by captions",
        ),
        Component(
            "image-image search with evidence",
            "implemented",
            "among known X-rays and all other domains' images: `search`; columns `precision` and `same_kind`",
        ),
        Component(
            "sensitivity and specificity by need",
            "implemented",
            "a threshold for 90% sensitivity on known images, each left out once; `at_operating_point` says what it "
            "gives on new ones",
        ),
        Component(
            "fairness across age and sex",
            "implemented",
            "`fairness`: AUC with interval in each group; 110 patients leave every gap uncertain",
        ),
        Component("3D search, bone age, other diseases", "absent", "no such labels are at hand"),
        Component("report generation", "absent", "a text decoder on top; no reports are at hand"),
        Component("judgement by experts, comparison with GPT-4o", "absent", "needs experts, or a service"),
    ),
)
