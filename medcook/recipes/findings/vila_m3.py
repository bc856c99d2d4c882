"""VILA-M3: Enhancing Vision-Language Models with Medical Expert Knowledge (Nath et al., CVPR 2025; arXiv 2411.12915).

A model that sees and writes (VILA) misses fine detail that models made for one task find. So it learns to call such an
expert by name, to read what that found, and to answer then. A conversation is one row of tokens; the model learns those
that it says itself:

  cards of experts, <image>, question | call of an expert | what it found, <image> with masks, question | answer
  loss = - mean of log p(token | all before it), over calls and answers

Architecture and reader of published checkpoints are in `medcook.networks.vila`; the weights are not at hand. Here the
same projector and a Llama of two layers stand behind SqueezeNet, and are asked about real X-rays (`_asked`). Experts
(`_experts`) learn first, each from half of the training patients, and say of a training image what those found who do
not know it: else the model would trust them more than they deserve.

Looked at on validation patients with seeds that are not scored: with eyes that were tuned, and rates as of classifiers,
the model had not learnt to read in 200 steps. With frozen eyes and the rate below it answers 0.765 of all questions
rightly, without experts 0.707, with findings of other patients 0.652; experts alone 0.646. Nothing was changed then.
"""

from dataclasses import dataclass, field, replace
from typing import Literal
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from medcook import evaluation
from medcook.data import Case
from medcook.data.transforms import Augment
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.methods.classification import image_labels
from medcook.networks.vila import LLAMAS, Photographs, Siglip, Vila
from medcook.precision import autocast
from medcook.pretraining import Pretrained
from medcook.recipes.fairness.mask_of_truth import MaskedClassifier, apart
from medcook.recipes.findings import _asked as asked
from medcook.recipes.findings._asked import TOPICS, UNKNOWN, AskedTask, Measure, Reply
from medcook.recipes.findings._experts import Experts, Findings, coloured, overlay
from medcook.recipes.findings._settings import AUGMENT, scales
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sampling import once, trained
from medcook.tasks import Budget

XRAYS = AskedTask("chest_xray", evaluation="test")
BRAINS = AskedTask("embedded", outcome="group", positive="atrophy", fold=0, older=47)
BUDGET = Budget(steps=440, batch=12, checks=0)
LLAMA = LLAMAS["3B"] | {"vocab_size": 1 + len(asked.WORDS), "max_position_embeddings": 256, "initializer_range": 0.1}
LLAMA |= {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
SIGLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SIGLIP |= {"image_size": 48, "patch_size": 8}


@dataclass
class Consulting(Pretrained):
    """For `share` of the steps experts learn; then the model learns to answer, and to ask them.

    encoder   `imagenet`: SqueezeNet, which stays as it is; `siglip`: the published kind, small and from nothing
    language  when lungs are large, and larger on the right
    experts   there are some; else no conversation has cards, and nobody is called
    withheld  the share of questions without cards, so that the model can answer alone, too
    shuffled  experts are shown another patient's image, in training as in prediction
    speaker   who answers: the model, or the experts whom it would have called, and nobody else
    """

    channels: tuple[int, ...] = (16, 32, 64, 128)
    rate: float = 6e-3
    pretext_rate: float = 5e-4
    share: float = 0.3
    augmentation: Augment = field(default_factory=lambda: AUGMENT)
    encoder: Literal["imagenet", "siglip"] = "imagenet"
    language: Measure = Measure()
    experts: bool = True
    withheld: float = 0.2
    shuffled: bool = False
    speaker: Literal["model", "experts"] = "model"

    axes = 2
    trial = BRAINS
    uses_unlabelled = False

    augment = MaskedClassifier.augment

    def model(self, inputs: int, classes: int, dims: int) -> Vila:
        if dims != 2:
            raise MedcookError("These models see images, not volumes.", "Take a task of slices.")
        return Vila(Photographs() if self.encoder == "imagenet" else Siglip(SIGLIP), LLAMA)

    def pretext_parts(self, model: nn.Module, inputs: int, dims: int) -> Experts:
        return Experts("imagenet" if self.encoder == "imagenet" else "random", self.channels)

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        return nets["pretext"].loss(images, self.facts(images)[0])

    def facts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Halves (B,), and numbers of the true answers (B, topics); `UNKNOWN` where they are not known."""
        outcome, lungs = image_labels(batch.labels, 2), apart(batch.images)[1] > 0.5
        halves, person = torch.arange(len(outcome)) % 2, torch.full((len(outcome), 2), UNKNOWN)
        if batch.groups is not None:
            halves, person = asked.decoded(batch.groups)
        sizes = self.language.numbers(asked.measured(lungs)).to(outcome)
        return halves.to(outcome), torch.cat([outcome[:, None], sizes, person.to(outcome)], dim=1)

    def pictures(self, model: Vila, images: Tensor, found: Findings) -> Tensor:
        """Picture tokens (2 B, T, width): of the images (B, 1, H, W), then of these with what the expert drew."""
        return model.pictures(torch.cat([coloured(images), overlay(images, found.lungs)]))

    def supervised(self, nets: nn.ModuleDict, labelled: Batch, now: Moment) -> Tensor:
        """Every question of every image whose answer is known, each in one of its forms."""
        images, (halves, truths) = apart(labelled.images)[0], self.facts(labelled)
        seen = (images.roll(1, 0), halves.roll(1)) if self.shuffled else (images, halves)
        found = nets["pretext"].consult(*seen)
        lines, told, owners = [], [], []
        for number, (heard, numbers) in enumerate(zip(found.texts(), truths.tolist(), strict=True)):
            for name, answer in zip(TOPICS, numbers, strict=True):
                if answer != UNKNOWN:
                    forms = TOPICS[name].forms
                    question = forms[int(torch.randint(len(forms), ()))]
                    alone = not self.experts or bool(torch.rand(()) < self.withheld)
                    line = asked.conversation(name, question, TOPICS[name].answers[answer], None if alone else heard)
                    lines, told, owners = [*lines, line[0]], [*told, line[1]], [*owners, number]
        pictures = self.pictures(nets["model"], images, found)
        return nets["model"].loss(lines, told, pictures[asked.shown(lines, owners, len(images))])

    def heard(self, nets: nn.ModuleDict, images: Tensor, seen: Tensor | None = None) -> Findings:
        """What experts say about images (B, 1, H, W): `seen` is what they are shown if findings are shuffled."""
        if not self.shuffled:
            return nets["pretext"].consult(images)
        return nets["pretext"].consult(images.roll(1, 0) if seen is None else seen)

    @torch.no_grad()
    def replies(self, nets: nn.ModuleDict, images: Tensor, found: Findings, cards: bool = True) -> list[list[Reply]]:
        """For each image (B, 1, H, W) the replies to all questions, in the order of `TOPICS`."""
        model, count, texts = nets["average"], len(images), found.texts()
        pictures = self.pictures(model, images, found)
        owners = [number for number in range(count) for _ in TOPICS]
        replies = asked.talk(
            lambda lines: model.next_words(lines, pictures[asked.shown(lines, owners, count)]),
            questions=[topic.forms[0] for _ in images for topic in TOPICS.values()],
            heard=[texts[owner] for owner in owners],
            cards=cards and self.experts,
        )
        return [replies[start : start + len(TOPICS)] for start in range(0, len(replies), len(TOPICS))]

    def by_experts(self, found: Findings) -> list[list[str]]:
        """What experts alone answer, in the order of `TOPICS`; nothing where none of them knows."""
        outcome = (found.outcome > 0.5).long()[:, None]
        numbers = torch.cat([outcome, self.language.numbers(asked.measured(found.lungs)).to(outcome)], dim=1).tolist()
        topics = [topic for topic in TOPICS.values() if topic.expert]
        rest = [""] * (len(TOPICS) - len(topics))
        return [[topic.answers[n] for topic, n in zip(topics, line, strict=True)] + rest for line in numbers]

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """(B, 2, H, W), constant over each image: 1 for the answer on the outcome, a half for no answer."""
        images = apart(images)[0]
        found = self.heard(nets, images)
        said = [line[0].answer for line in self.replies(nets, images, found)]
        if self.speaker == "experts":
            said = [line[0] for line in self.by_experts(found)]
        yes = torch.tensor([{"yes": 1.0, "no": 0.0}.get(answer, 0.5) for answer in said], device=images.device)
        return torch.stack([1 - yes, yes], dim=1)[:, :, None, None].expand(-1, -1, *images.shape[2:])


@torch.no_grad()
def asked_rows(fitted, case: Case) -> list[dict]:
    """A row for each question whose answer is known of a case, means over its images:

    correct  whether the answer is right;   alone   that of the model without cards
    expert   whether the expert's own is; where there is none, the commonest answer among training patients
    called   whether the right expert is called, or none where none knows
    """
    nets, method, task = trained(fitted), fitted.method, fitted.task
    images, drawn = apart(task.preparation.images(case))
    usual = once(fitted, "commonest", lambda: asked.commonest(task.samples("labelled").groups))
    others = once(fitted, "others", lambda: task.samples("labelled").images[:, :1]) if method.shuffled else images
    seen = others[crc32(case.case_id.encode()) % len(others)][None].expand_as(images)
    with autocast(fitted.cost):
        found = method.heard(nets, images, seen)
        replies, alone = (method.replies(nets, images, found, cards) for cards in (True, False))
    experts = [[*line[: -len(usual)], *usual] for line in method.by_experts(found)]
    told = case.attributes.get(task.outcome)
    person = [UNKNOWN if told is None else int(task.is_positive(case.attributes)), *task.person(case.attributes)]
    sizes = method.language.numbers(asked.measured(drawn > 0.5)).tolist()
    truths = [[person[0], *size, *person[1:]] for size in sizes]
    rows = []
    for k, (name, topic) in enumerate(TOPICS.items()):
        if truths[0][k] == UNKNOWN:
            continue
        wanted = topic.expert if method.experts and topic.expert else None
        right = [topic.answers[truth[k]] for truth in truths]
        said = {"alone": [line[k].answer for line in alone], "expert": [line[k] for line in experts]}
        said["correct"] = said["expert"] if method.speaker == "experts" else [line[k].answer for line in replies]
        values = {column: np.mean(np.array(answers) == right) for column, answers in said.items()}
        values["called"] = np.mean([line[k].call == wanted for line in replies])
        rows.append(evaluation.row(case, name, **{column: float(value) for column, value in values.items()}))
    return rows


METHOD = Consulting()
ARMS = {
    "expert feedback": METHOD,
    "no experts": replace(METHOD, experts=False),
    "experts alone": replace(METHOD, speaker="experts"),
    "shuffled feedback": replace(METHOD, shuffled=True),
}
SMALL = {"encoder": "siglip", "language": Measure(sizes=(51.0, 55.0), larger=49.6)}
SCALES = scales(BRAINS, XRAYS, budget=BUDGET)
SCALES["quick"] = replace(SCALES["quick"], methods={name: replace(method, **SMALL) for name, method in ARMS.items()})

recipe = Recipe(
    paper="vila-m3",
    title="VILA-M3: a model that sees and writes, and asks experts",
    claim="A vision-language model that may call a classifier and a segmenter, and reads what they found, answers "
    "questions about real X-rays rightly more often than the same model without them.",
    arms={name: Arm(method) for name, method in ARMS.items()},
    compare=("expert feedback", "no experts"),
    ablation=("expert feedback", "shuffled feedback"),
    metric="correct",
    score=asked_rows,
    scales=SCALES,
    published={
        "CheXpert, 3B, with experts": 0.608,
        "CheXpert, 3B, without experts": 0.574,
        "CheXpert, experts alone": 0.515,
    },
    source="abstract; README and programs of github.com/Project-MONAI/VLM-Radiology-Agent-Framework (m3/README.md, "
    "m3/data_prepare/experts, m3/demo), read in a copy; projector, templates and layout of checkpoints: "
    "github.com/NVlabs/VILA",
    components=(
        Component(
            "architecture",
            "implemented",
            "SigLIP, projector and Llama of the published 3B, 8B and 13B models, in `networks/vila.py`, tested against "
            "an implementation of its own. What trains has the same projector and a Llama of two layers; its eyes are "
            "SqueezeNet at `full`, a small SigLIP from nothing at `quick`",
        ),
        Component(
            "checkpoint",
            "implemented",
            "the published folders' layout, in one file or in several, is read offline and tested on a small one; the "
            "published weights are not at hand, so none of their figures is tested here",
        ),
        Component(
            "the model calls an expert by a word",
            "implemented",
            "cards name the experts before the question; the model says <CXR()>, <LUNGS()>, or an answer. Column "
            "`called`. A fifth of the training questions come without cards, and are answered alone: column `alone`. "
            "Here the question decides who is called, there the kind of image as well",
        ),
        Component(
            "expert feedback in the conversation",
            "implemented",
            "of the classifier yes or no in words, of the segmenter a picture with its masks in colours and what they "
            "measure, as numbers; theirs names the colours only. The ablation has the feedback of another patient",
        ),
        Component(
            "expert-guided instruction fine-tuning",
            "implemented",
            "the loss is of calls and answers alone; projector and Llama learn, there the eyes, too. Experts say of a "
            "training image what those found who had learnt from other patients, as theirs come from other data",
        ),
        Component(
            "domain expert models",
            "simplified",
            "a SqueezeNet that tells tuberculosis and a U-Net for lungs, each trained twice on 224 patients, where "
            "theirs are ensembles of TorchXRayVision, VISTA3D and a model for brain tumours. The arm `experts alone` "
            "gives their answers, and where nobody knows the commonest one; so does column `expert`",
        ),
        Component(
            "three stages before: vision, vision and language, instructions",
            "simplified",
            "what ImageNet taught; a model of words and pictures that was trained beforehand is not at hand",
        ),
        Component(
            "question answering",
            "simplified",
            "five questions with few answers each, about facts that people or masks give; answers are compared as "
            "they are written",
        ),
        Component("report generation", "absent", "in this chapter by `medregion-ct` and `cxr-report`"),
        Component("comparison with Med-Gemini", "absent", "a service, and none of its answers is at hand"),
    ),
)
