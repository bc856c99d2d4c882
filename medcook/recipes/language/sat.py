"""SAT: large-vocabulary segmentation for medical images with text prompts (Zhao, Zhang, Wu, Zhang, Zhou, Zhang, Wang
and Xie, npj Digital Medicine 2025; arXiv 2312.17183, "One model to rule them all").

One network for all data sets, asked by anatomical terms, in place of one network for each data set. The terms' encoder
first learns what is known of anatomy: texts about one structure are drawn together by a contrastive loss. Then a term
is a query.

  z = T(term),  q = D(z, features of every scale),  mask = sigmoid(pixel features . w(q))      D: a transformer decoder

The network is in `_queries.py`, the knowledge in `_knowledge.py`. Specialists are a U-Net for each data set, with a
channel for each structure; together they see the very same images in the same steps and learn by the same loss.

Looked at on validation patients, with a seed of its own, after 450 steps: Dice 0.66 of one model, 0.71 of specialists,
and 0.61 of the chapter's baseline. The hippocampus's two parts are what one model takes longest to tell apart. A layer
norm on the tokens did not help (0.63) and was left out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medcook.methods import Batch, Moment
from medcook.networks import UNet
from medcook.recipes.language._knowledge import teach
from medcook.recipes.language._queries import Queried, sheet, sheet_loss, values_of
from medcook.recipes.language._settings import BRAIN, NAMED, NAMED_BUDGET, NAMED_QUICK, named_rows, scales
from medcook.recipes.recipe import Arm, Component, Recipe


@dataclass
class Sat(Queried):
    """One network for all sets.

    taught  steps in which the text encoder learns what is known of anatomy, before the first image; 0: it knows nothing
    """

    taught: int = 30

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        if now.step == 0:
            teach(nets["model"].text, self.taught)
        return super().training_step(nets, labelled, unlabelled, now)


class OneForEachSet(nn.Module):
    """A U-Net for each data set, with a channel for each of its structures.

    sets  {number of the set: its label values}
    """

    def __init__(self, inputs: int, channels: tuple[int, ...], sets: dict[int, tuple[int, ...]]):
        super().__init__()
        self.sets = sets
        self.nets = nn.ModuleList(UNet(inputs=inputs, classes=len(own), channels=channels) for own in sets.values())

    def forward(self, images: Tensor, number: int) -> Tensor:
        """Logits (B, structures of the set, H, W) float32."""
        return self.nets[list(self.sets).index(number)](images).float()


@dataclass
class Specialists(Queried):
    """One network for each set: each learns from the images of its own, and answers for its own structures."""

    def network_for(self, inputs: int) -> OneForEachSet:
        numbers = sorted(set(self.language.sets)) or [0]
        return OneForEachSet(inputs, self.channels, {k: values_of(self.language, k) for k in numbers})

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """Every set's images go to its own network; the loss is over all masks, as with one network."""
        values, known = sheet(self.language, labelled)
        first, model = min(nets["model"].sets), nets["model"]
        groups = torch.full((len(values),), first) if labelled.groups is None else labelled.groups
        logits = torch.zeros(*values.shape, *labelled.images.shape[2:], device=values.device)
        for number in groups.unique().tolist():
            mine = groups == number
            found = model(labelled.images[mine], number)
            logits[mine, : found.shape[1]] = found
        return sheet_loss(logits, labelled.labels, values, known)

    def answer(self, nets: nn.ModuleDict, images: Tensor, sentences: tuple[str, ...]) -> Tensor:
        """Each name is answered by the network of its set; a name of no set is answered by nobody."""
        net, nothing = nets["average"], torch.zeros(len(images), *images.shape[2:], device=images.device)
        found: dict[str, Tensor] = {}
        for number, own in net.sets.items():
            names = [self.language.name(value) for value in own]
            if set(names) & set(sentences):
                found |= zip(names, net(images, number).sigmoid().unbind(1), strict=True)
        return torch.stack([found.get(sentence, nothing) for sentence in sentences], dim=1)


recipe = Recipe(
    paper="sat",
    title="SAT: one network for all sets, asked by anatomical terms",
    claim="One network that is asked by name on five data sets segments as well, within a Dice of 0.02, as five "
    "specialists, a network for each set, which share its images and steps.",
    arms={
        "one model": Arm(Sat()),
        "specialists": Arm(Specialists()),
        "without knowledge": Arm(Sat(taught=0)),
    },
    compare=("one model", "specialists"),
    ablation=("one model", "without knowledge"),
    expect="non-inferior",
    margin=0.02,
    score=named_rows,
    scales=scales(
        NAMED_QUICK,
        NAMED,
        "one model",
        "specialists",
        "without knowledge",
        budget=NAMED_BUDGET,
        methods={
            "one model": Sat(language=BRAIN),
            "specialists": Specialists(language=BRAIN),
            "without knowledge": Sat(language=BRAIN, taught=0),
        },
    ),
    source="the abstract; model/maskformer.py, model/knowledge_encoder.py and train/trainer.py in the authors' "
    "repository, github.com/zhaoziheng/SAT",
    components=(
        Component(
            "knowledge in the text encoder",
            "simplified",
            "54 short facts written for this book, of 17 structures: other names, definitions and how they lie to each "
            "other, in place of 6502 terms of UMLS and other sources. The contrastive loss is theirs, between texts; "
            "they also draw texts and an atlas's segmented regions together, which is left out. The encoder is the "
            "book's, one transformer block that knows no word before; 30 steps bring the loss from 4.8 to its floor, "
            "1.2. Theirs is frozen afterwards, in most of their runs; here it goes on learning",
        ),
        Component(
            "queries over features of every scale",
            "implemented",
            "features of every level of the U-Net's way down, averaged over the places of the deepest, side by side; "
            "two layers of a transformer decoder in place of six, width 64",
        ),
        Component(
            "a mask for every term at once",
            "implemented",
            "the product of the last features of the way up with a small network's answer to a query. That network "
            "ends without a nonlinearity and with a bias, since these features are never below zero. There is no deep "
            "supervision",
        ),
        Component(
            "specialists",
            "simplified",
            "a U-Net of the same widths for each set, in place of nnU-Nets, U-Mamba and SwinUNETR, each of which was "
            "trained to its end. Here five specialists share the images of 700 steps, about two and a half an image "
            "set and step, as one network sees them: so this asks whether sharing costs something, at equal work",
        ),
        Component(
            "many data sets as one",
            "simplified",
            "five sets and 14 structures in place of 72 and 497, slices of 64 x 64 in place of volumes; the seven "
            "organs of head and neck, of few patients and not all drawn, are the tail",
        ),
        Component("SAT-Nano and SAT-Pro", "absent", "110 and 447 million parameters; there are 0.4 here"),
        Component("external sets, fine-tuning", "absent", "every set here is one that was trained on"),
        Component("comparison with MedSAM and BiomedParse", "absent", "see the recipe of biomedparse for box and text"),
        Component("agent for language models", "absent", "no language model is at hand"),
    ),
)
