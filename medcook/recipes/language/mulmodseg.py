"""MulModSeg: unpaired multi-modal segmentation with modality-conditioned text embedding and alternating training (Li,
Zhu, Sultan, Bagher-Ebadian, Khanduri, Indrin, Thind and Zhu, WACV 2025; arXiv 2411.15576).

Idea: one network for CT and MR, of patients who had the one or the other. Sentences of modality m and class k go
through a text encoder that does not learn; what they say becomes the weights of the head of this class. So a class has
other weights in each modality, while the rest is shared. Batches are of one modality each, and the modalities take
turns.

  t_k = relu(T e("A <modality m> of a <class k>.")),   g = mean over places of the deepest features
  w_k = C [g, t_k],   logits_k = w_k's three 1 x 1 convolutions of the last features

In miniature: hearts as they are, and as a simulated scanner shows them, half of the patients in each.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook import evaluation
from medcook.data import Case
from medcook.domains import PLAIN, DomainTask, as_shown
from medcook.errors import MedcookError
from medcook.losses import find_loss
from medcook.methods import Batch, Method, Moment
from medcook.networks import UNet
from medcook.pretraining import fresh, nothing
from medcook.recipes.domain_shift._settings import BASELINE, CHANNELS, scales
from medcook.recipes.few_shot.vlp_sam import TEXT, encode_text
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.synthesis import Bank

DARK = "dark blood"
LOOKS = (PLAIN, DARK)
"""The modalities, by group of a sample."""
MODALITIES = ("bright blood magnetic resonance imaging", "dark blood magnetic resonance imaging")
HEART = ("background", "right ventricle", "myocardium", "left ventricle")
WIDTH = 8
"""Channels of the heads that are made, as in the official code."""
SIZES = (WIDTH * WIDTH, WIDTH * WIDTH, WIDTH, WIDTH, WIDTH, 1)
"""Numbers in each part of a head: weights of three layers, then their biases."""


def sentences(names: tuple[str, ...], classes: int) -> list[list[str]]:
    """[modality][class]: what is said; a class without a name has a number."""
    known = (*names, *(f"structure {number}" for number in range(len(names), classes)))[:classes]
    return [[f"A {modality} of a {name}." for name in known] for modality in MODALITIES]


def headed(features: Tensor, heads: Tensor) -> Tensor:
    """Logits (B, K, H, W) of features (B, WIDTH, H, W): heads (B, K, sum(SIZES)) are three 1 x 1 convolutions each,
    with a ReLU after the first two."""
    *weights, one, two, three = heads.split(SIZES, dim=2)
    first, second, last = (part.unflatten(2, (-1, WIDTH)) for part in weights)
    x = torch.einsum("bkoc,bchw->bkohw", first, features) + one[..., None, None]
    x = torch.einsum("bkoc,bkchw->bkohw", second, F.relu(x)) + two[..., None, None]
    x = torch.einsum("bkoc,bkchw->bkohw", last, F.relu(x)) + three[..., None, None]
    return x[:, :, 0]


class TextHeaded(nn.Module):
    """A U-Net whose heads are made from sentences that do not learn: images (B, C, H, W) of one modality to logits."""

    def __init__(self, inputs: int, classes: int, channels: tuple[int, ...], names: tuple[str, ...], hidden: int = 64):
        super().__init__()
        self.net = UNet(inputs=inputs, classes=1, channels=channels)
        self.net.head = nn.Sequential(nn.GroupNorm(4, channels[0]), nn.ReLU(), nn.Conv2d(channels[0], WIDTH, 1))
        said = [torch.stack([encode_text(text) for text in row]) for row in sentences(names, classes)]
        self.register_buffer("said", torch.stack(said) * TEXT**0.5)
        self.hear = nn.Linear(TEXT, hidden)
        self.see = nn.Sequential(nn.GroupNorm(4, channels[-1]), nn.ReLU())
        self.image = nn.Linear(channels[-1], hidden)
        self.control = nn.Linear(2 * hidden, sum(SIZES))

    def forward(self, images: Tensor, modality: int) -> Tensor:
        features, deepest = self.both_ends(images)
        whole = self.image(self.see(deepest).flatten(2).mean(2))
        told = F.relu(self.hear(self.said[modality]))
        both = torch.cat([whole[:, None].expand(-1, len(told), -1), told.expand(len(whole), -1, -1)], dim=2)
        return headed(features, self.control(both))

    def both_ends(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The features that heads see (B, WIDTH, H, W), and the deepest ones of the U-Net."""
        maps = self.net.descend(images)
        return self.net.head(self.net.ascend(maps)[0]), maps[-1]


class Plain(nn.Module):
    """A U-Net that is not told which modality it sees."""

    def __init__(self, inputs: int, classes: int, channels: tuple[int, ...]):
        super().__init__()
        self.net = UNet(inputs=inputs, classes=classes, channels=channels)

    def forward(self, images: Tensor, modality: int) -> Tensor:
        return self.net(images)


class OneEach(nn.Module):
    """A U-Net for each modality."""

    def __init__(self, inputs: int, classes: int, channels: tuple[int, ...]):
        super().__init__()
        self.nets = nn.ModuleList(UNet(inputs=inputs, classes=classes, channels=channels) for _ in LOOKS)

    def forward(self, images: Tensor, modality: int) -> Tensor:
        return self.nets[modality](images)


def of_the_moment(net: nn.Module) -> nn.Module:
    """Its batch normalisation uses the batch at hand, also when it predicts, as that of the official U-Net does: over
    batches that take turns, a running mean would be of neither modality."""
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.track_running_stats, part.running_mean, part.running_var = False, None, None
            part.num_batches_tracked = None
    return net


@dataclass
class Alternating(Method):
    """Batches of one modality, in turn. Images of the other wait for the next step, so that all are seen once.

    heads     from `text`, or `plain` ones; `separate`: a network for each modality, of which every step trains one
    turns     False: every step sees the images at hand, each modality with its own loss, as many as there are of each
    names     of the classes, as they are put into sentences
    modality  of the images that are predicted: someone who has a scan knows what it is of
    """

    channels: tuple[int, ...] = CHANNELS
    heads: str = "text"
    turns: bool = True
    names: tuple[str, ...] = HEART
    modality: int = 0

    axes = 2
    trial = DomainTask("embedded", look=DARK, known=None)

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        if dims != 2:
            raise MedcookError("These heads are for images, not volumes.", "Take a task of slices.")
        if self.heads == "text":
            model = TextHeaded(inputs, classes, self.channels, self.names)
        else:
            model = {"plain": Plain, "separate": OneEach}[self.heads](inputs, classes, self.channels)
        model = model if self.heads == "separate" else of_the_moment(model)
        return nn.ModuleDict({"model": model, "average": fresh(model), "waiting": Bank()})

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        groups = labelled.groups
        if groups is None:  # where nobody says which modality an image is of, it is the step's
            groups = torch.full((len(labelled.labels),), now.step % len(LOOKS), device=labelled.labels.device)
        if self.turns:
            images, labels = self.turn(nets["waiting"], labelled, groups, now.step % len(LOOKS))
            parts = [(now.step % len(LOOKS), images, labels)]
        else:
            parts = [(k, labelled.images[groups == k], labelled.labels[groups == k]) for k in range(len(LOOKS))]
        total = sum(len(images) for _, images, _ in parts)
        loss = nothing()
        for number, images, labels in parts:
            if len(images):
                found = nets["model"](images.contiguous(memory_format=torch.channels_last), number).float()
                loss = loss + len(images) / total * find_loss(self.loss)(found, labels)
        return loss

    def turn(self, waiting: Bank, batch: Batch, groups: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Images and labels of modality `number`: those that wait, and those of the batch. The others begin to wait."""
        mine, images, labels = groups == number, batch.images[groups == number], batch.labels[groups == number]
        if len(waiting):
            images = torch.cat([waiting.images, images])
            labels = torch.cat([waiting.labels, labels])
        waiting.images, waiting.labels = batch.images[~mine], batch.labels[~mine]
        return images, labels

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        return nets["average"](images, self.modality).float().softmax(1)


def in_both(fitted, case: Case) -> list[dict]:
    """The usual rows of a case as each scanner shows it; a structure is named `structure, look`.

    A method that has modalities is told which one it sees.
    """
    rows, kept = [], ("dice", "hd95", "missed", "false_alarm")
    for number, look in enumerate(LOOKS):
        method = fitted.method
        told = replace(method, modality=number) if isinstance(method, Alternating) else method
        label = replace(fitted, method=told).predict(as_shown(case, look))
        for row in evaluation.score_case(label, case, fitted.task.structures):
            values = {name: row[name] for name in kept}
            rows.append(evaluation.row(case, f"{row['structure']}, {look}", **values))
    return rows


recipe = Recipe(
    paper="mulmodseg",
    title="MulModSeg: sentences make the heads, and modalities take turns",
    claim="On hearts of two appearances, each patient seen in one, heads made from sentences about the appearance, and "
    "batches that alternate, give one network a higher Dice than pooled training.",
    arms={
        "pooled": Arm(BASELINE),
        "mulmodseg": Arm(Alternating()),
        "without text": Arm(Alternating(heads="plain")),
        "one network each": Arm(Alternating(heads="separate")),
        "without turns": Arm(Alternating(turns=False)),
    },
    compare=("mulmodseg", "pooled"),
    ablation=("mulmodseg", "without text"),
    replicate="fold",
    score=in_both,
    scales=scales(
        DomainTask("embedded", look=DARK, known=None),
        DomainTask("acdc", look=DARK, known=None),
        "pooled",
        "mulmodseg",
        "without text",
        "one network each",
    ),
    source="the abstract; train.py and text_embedding/clip_emb_example.ipynb in the authors' repository, "
    "github.com/ChengyinLee/MulModSeg_2024; its model file is missing there, so that heads follow the one it is made "
    "from, github.com/ljwztc/CLIP-Driven-Universal-Model (model/Universal_model.py)",
    components=(
        Component(
            "modality-conditioned text embedding",
            "implemented",
            "their sentences, of modality and class; joined with the mean of the image's deepest features they make "
            "three layers of eight channels for every class, the background too. Names of modalities are the two "
            "appearances', bright and dark blood",
        ),
        Component(
            "frozen text encoder",
            "simplified",
            "hashed runs of letters in place of CLIP's: it tells sentences apart and does not know what they mean. On "
            "embedded brains, which only show that everything runs, the names are still those of the heart",
        ),
        Component(
            "alternating training",
            "implemented",
            "a step sees one modality, the next one the other. Batches are drawn from all patients, as in every arm; "
            "images of the modality whose turn it is not wait for the next step, so that each is seen once, and a "
            "batch has as many images as elsewhere, on average. Batch normalisation uses the batch at hand, to train "
            "and to predict, as that of the U-Net of the official code; `pooled`, the book's baseline, has running "
            "means. `without turns`, which `full` does not run, sees both in every step",
        ),
        Component(
            "unpaired CT and MR",
            "simplified",
            "two appearances of cardiac MR: half of the patients as they are, the others through a simulated scanner "
            "that makes blood dark. Nobody who trains is seen in both; who is scored is shown in both",
        ),
        Component(
            "single-modality training",
            "simplified",
            "`one network each`: every step trains the network whose turn it is, so that each has half of the steps, "
            "on its own modality alone. Nothing is tested against it",
        ),
        Component("no significant structural modifications", "implemented", "the book's U-Net, but for its last layer"),
        Component("convolutional and transformer backbones", "simplified", "a U-Net on slices; no Swin UNETR"),
        Component("abdominal organs of AMOS, cardiac substructures of MM-WHS", "absent", "not at hand"),
    ),
)
