"""Attention-based Dynamic Subspace Learners for Medical Image Analysis.

Adiga V., Dolz and Lombaert, IEEE Journal of Biomedical and Health Informatics 2022. Images are alike in many ways, and
one distance does not know them all. So an embedding is made of subspaces, each with a learner of its own that sees one
cluster of the images. How many there should be is not known beforehand: it starts with one, and when that gets no
better, the outputs that matter stay its own and the others begin anew as those of another learner. An attention map
says which places of an image count.

  v_k       = the outputs of learner k, of unit length, of z = W mean(A * f) + b; f the maps, A = sigmoid(conv f)
  clusters  k-means of the means of A * f, with as many clusters as learners, formed anew now and then
  loss      = sum over clusters k of the share of its images times the margin loss of their v_k
  score_j   = |mean of z_j dloss/dz_j|, scaled to 0 .. 1 over the last learner's outputs; what is above 1/2 stays
  grows     when clusters of images that nobody learns from agree no better with their kinds, for `patience` looks

In the last part of the training all outputs are one embedding, of all images. Then the nearest known image is to be of
the same kind. A kind is what was found in an X-ray, and the hospital where it was taken: one is what a reader looks
for, the other an artefact of the machine, and an embedding that is to find images like a given one has to know both.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data.transforms import Augment
from medcook.errors import MedcookError
from medcook.methods import Batch, Method, Moment
from medcook.methods.classification import image_labels
from medcook.networks.squeezenet import SqueezeNet, load_squeezenet
from medcook.pretraining import fresh
from medcook.recipes.language._reading import AUGMENT
from medcook.recipes.pretraining._kinds import KindsTask, kind_rows
from medcook.recipes.pretraining._subspaces import (
    ENOUGH,
    Similarity,
    State,
    agreement,
    in_clusters,
    margin_loss,
    shown,
    split,
)
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.tasks import Budget

XRAYS = KindsTask("chest_xray", folds=3)
BRAINS = KindsTask("embedded", told=("site",), folds=3)


@dataclass
class Alike(Method):
    """A network whose vectors are alike for images of one kind; each of its methods says what a loss is.

    start  `imagenet`, or `random` where there is no network to fetch weights
    """

    rate: float = 5e-4
    augmentation: Augment = field(default_factory=lambda: AUGMENT)
    start: Literal["imagenet", "random"] = "imagenet"

    axes = 2
    trial = replace(BRAINS, fold=0)

    def network_for(self, encoder: SqueezeNet, classes: int) -> Similarity:
        raise NotImplementedError

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        if dims != 2:
            raise MedcookError("SqueezeNet sees images, not volumes.", "Take a data set that is prepared as slices.")
        encoder = load_squeezenet() if self.start == "imagenet" else SqueezeNet(features_only=True)
        model = self.network_for(encoder, classes)
        return nn.ModuleDict({"model": model, "average": fresh(model)})

    def kinds_of(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        raise NotImplementedError

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Probabilities of kinds (B, classes, H, W), constant over each image."""
        found = self.kinds_of(nets, images).float().softmax(1)
        return found[:, :, None, None].expand(*found.shape, *images.shape[2:])


@dataclass
class ClassNetwork(Alike):
    """Learns to name the kind of an image; its pooled maps are the vector, and its class activation map is what counts.

    The linear layer of `Similarity` gives the logits.
    """

    def network_for(self, encoder: SqueezeNet, classes: int) -> Similarity:
        return Similarity(encoder, classes, attention=False)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        model, learns = nets["model"], shown(labelled)
        logits = model.embedding(model.pooled(labelled.images)).float()
        each = F.cross_entropy(logits, image_labels(labelled.labels, logits.shape[1]), reduction="none")
        return each[learns].sum() / learns.sum().clamp_min(1)

    def kinds_of(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        return nets["average"].embedding(self.embed(nets, images))

    def embed(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """(B, 512)."""
        return nets["average"].pooled(images)

    def look(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """(B, h, w) the class activation map (Zhou et al., CVPR 2016) of the likeliest kind."""
        weights = nets["average"].embedding.weight[self.kinds_of(nets, images).argmax(1)]
        return torch.einsum("bchw,bc->bhw", nets["average"].maps(images).float(), weights)


@dataclass
class SubspaceLearners(Alike):
    """Learners of subspaces, one or a growing number.

    grows      False: one learner to the end
    attention  False: every place counts as much
    width      outputs of all learners together
    looks      how often in a training it is looked how learning goes, and clusters are formed anew
    patience   looks without anything better, after which there is one learner more
    joint      the share of the training, at its end, in which all outputs are one embedding
    """

    grows: bool = True
    attention: bool = True
    width: int = 128
    looks: int = 20
    patience: int = 2
    joint: float = 1 / 6

    def network_for(self, encoder: SqueezeNet, classes: int) -> Similarity:
        return Similarity(encoder, self.width, self.attention)

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        nets = super().build(inputs, classes, dims)
        nets["state"] = State(self.width, classes)
        return nets

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        model, state, learns = nets["model"], nets["state"], shown(labelled)
        joint = now.fraction >= 1 - self.joint
        if not joint and self.is_look(now):
            self.review(nets)
        kinds, pooled = image_labels(labelled.labels, state.classes), model.pooled(labelled.images)
        with torch.autocast(pooled.device.type, enabled=False):
            raw = model.embedding(pooled)
            state.held.add(model.whole(raw)[~learns], kinds[~learns])
            state.seen.add(pooled[learns], kinds[learns])
            if joint:
                return 0 * raw.sum() + margin_loss(model.whole(raw)[learns], kinds[learns])
            loss = in_clusters(model.parts(raw), kinds, state.clusters(pooled), learns) + 0 * raw.sum()
            if self.grows:
                state.taylor += (raw * torch.autograd.grad(loss, raw, retain_graph=True)[0]).detach().sum(0)
        return loss

    def is_look(self, now: Moment) -> bool:
        return now.step > 0 and now.step % max(1, round(now.steps / self.looks)) == 0

    def review(self, nets: nn.ModuleDict) -> None:
        """There may be one learner more; clusters are formed anew, and scores begin anew."""
        state = nets["state"]
        vectors, kinds = state.held.all()
        if self.grows and len(kinds) >= ENOUGH and len(kinds.unique()) > 1:
            found = agreement(vectors, kinds)
            if found > state.best:
                state.best.fill_(found), state.waited.zero_(), state.ready.fill_(True)
            else:
                state.waited += 1
                if state.ready and state.waited >= self.patience and split(nets["model"], nets["average"], state):
                    state.ready.fill_(False)
        if state.learners > 1:
            state.regroup()
        state.taylor.zero_()

    def kinds_of(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """By the angle with the mean vector of each kind, of the images remembered."""
        average, (seen, kinds) = nets["average"], nets["state"].seen.all()
        known = F.one_hot(kinds, nets["state"].classes).float().T @ average.whole(average.embedding(seen))
        return self.embed(nets, images) @ F.normalize(known, dim=1).T / 0.1

    def embed(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Unit vectors (B, width)."""
        return nets["average"].whole(nets["average"].embedding(nets["average"].pooled(images)).float())

    def look(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """(B, h, w) attention; without it the mean of the maps."""
        maps = nets["average"].maps(images)
        return nets["average"].attention(maps)[:, 0] if self.attention else maps.mean(1)


def arms(start: Literal["imagenet", "random"], suffix: str = "") -> dict[str, Arm]:
    """The learners, what is taken from them, and the network of classes."""
    found = {
        "dynamic learners": SubspaceLearners(start=start),
        "one learner": SubspaceLearners(start=start, grows=False),
        "without attention": SubspaceLearners(start=start, attention=False),
        "classification network": ClassNetwork(start=start),
    }
    return {name + suffix: Arm(method) for name, method in found.items()}


RANDOM = ", random start"
FULL_ARMS = ("dynamic learners", "one learner", "classification network")

recipe = Recipe(
    paper="dynamic-subspace",
    title="Learners of subspaces, as many as it takes",
    claim="The nearest training X-ray is more often of the same kind, in finding and hospital, in an embedding of "
    "dynamic subspace learners than in the features of a classification network.",
    arms=arms("imagenet") | arms("random", RANDOM),
    compare=("dynamic learners", "classification network"),
    ablation=("dynamic learners", "one learner"),
    replicate="fold",
    metric="recall",
    score=kind_rows,
    scales={
        "quick": Scale(
            BRAINS,
            Budget(steps=30, batch=6, precision="float32", checks=0),
            replicates=1,
            arms=tuple(arms("random", RANDOM)),
        ),
        "full": Scale(XRAYS, Budget(steps=180, batch=20, checks=0), arms=FULL_ARMS),
    },
    source="the authors' code, github.com/adigasu/Dynamic_subspace_learners (train.py, lib/); abstract",
    components=(
        Component(
            "multiple learners in subspaces",
            "implemented",
            "128 outputs, margin loss and clusters by k-means as in the authors' code, whose clusters also keep their "
            "numbers by the Hungarian method. All learners see their share of every batch, where there each has "
            "batches of its own, balanced by kind; each pair that is not yet where it should be weighs the same",
        ),
        Component(
            "learners are added while training",
            "implemented",
            "by the authors' rule: 10 outputs or more of the last learner whose scores are above one half stay its "
            "own. What must stop rising is the agreement of clusters and kinds, looked at 20 times, on a sixth of "
            "the training images from which no arm learns; the authors look at the test images. It is adjusted for "
            "chance, since these images are few",
        ),
        Component(
            "attention module",
            "implemented",
            "three convolutions to one map, as in the authors' code, on SqueezeNet's maps of 15 x 15; the encoder is "
            "SqueezeNet with ImageNet's weights for a ResNet-50",
        ),
        Component(
            "image retrieval",
            "implemented",
            "recall at 1 decides; at 4 in column `recall_4`. Known are the patients that trained, the authors search "
            "among the test images. `site` and `finding` say what is alike",
        ),
        Component(
            "image clustering",
            "implemented",
            "`clustering` in _kinds.py: normalised mutual information of the nearest of as many clusters as kinds",
        ),
        Component(
            "weakly supervised segmentation",
            "simplified",
            "column `dice`: the attention map itself, above half of its range, with the lungs, against the class "
            "activation map of the classification network. The paper trains a network with such proxy labels. Nothing "
            "says that lungs are what tells a kind: tuberculosis lies in them, the hospital may be seen elsewhere",
        ),
        Component(
            "comparison with a classification network",
            "implemented",
            "the same encoder, images, rate and steps, cross-entropy, no attention; its pooled maps are the vectors",
        ),
        Component(
            "baselines with several learners",
            "simplified",
            "one learner is the ablation; a fixed number above one is not run",
        ),
        Component(
            "three public data sets",
            "simplified",
            "X-rays of two hospitals, with and without tuberculosis: four kinds. Skin lesions, bones and endoscopy are "
            "not at hand. Nothing was looked at on any patients before the evaluation",
        ),
    ),
)
