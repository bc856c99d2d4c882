"""Variational autoencoders for feature exploration and malignancy prediction of lung lesions.

Keel, Quyn, Jayne and Relton, British Machine Vision Conference (BMVC) 2023; arXiv 2311.15719. A VAE learns what lesions
look like, without labels; an MLP then tells from its latent vector, which stays as it is, whether one is malignant. The
latent space is to be explored: by clusters, and by images of what a step along one of its directions changes.

  loss       mean |x - decoded(z)| + beta KL(q(z|x) || p(z)) / pixels
  Gaussian   q = N(m, s^2), p = N(0, 1):  KL = 1/2 sum(m^2 + s^2 - 1 - log s^2)
  Dirichlet  q = Dir(a), p = Dir(b), A and B the sums of a and b:
             KL = log G(A) - log G(B) + sum(log G(b) - log G(a)) + sum((a - b) (psi(a) - psi(A)))

with G the gamma function, psi its logarithm's derivative, a = log(1 + e^l) of the encoder's l (the official code's way;
a sample is differentiated by torch's `rsample`). The MLP gets m or l. The baseline's MLP gets as many principal
components of the same patches, the ablation's the m of an encoder that never learnt.

Looked at once on validation patients (seed 7), a first version had an AUC of 0.51, components 0.62. It had shown
patches worse than components do; network, steps and beta were then changed by how well training patches are shown,
whatever their kind. This version was not looked at.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.distributions import Dirichlet

from medcook.data import Case
from medcook.data.transforms import Augment
from medcook.methods import Batch, Moment
from medcook.pretraining import OptionalPretext, nothing
from medcook.recipes.findings._latent import (
    SIDE,
    LatentReader,
    LesionDecoder,
    LesionEncoder,
    Moments,
    Principal,
    Space,
    concentrations,
    dirichlet_kl,
    gaussian_kl,
)
from medcook.recipes.findings._lesions import AllOver, lesions
from medcook.recipes.findings._nodules import bodies, has_nodule, malignant
from medcook.recipes.findings._settings import AUGMENT, NODULES, NODULES_QUICK, diagnosis_rows, scales
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sampling import once, trained
from medcook.tasks import Budget

CLUSTERS = 8
BUDGET = Budget(steps=2500, batch=16, checks=0)
Kind = Literal["gaussian", "dirichlet", "principal"]


@dataclass
class LesionVAE(AllOver, OptionalPretext):
    """First a VAE of the patches around nodules, then an MLP on latent vectors of a VAE that no longer learns.

    kind    of latent space; `principal`: principal components of the patches that a VAE would have seen
    latent  how many numbers a patch becomes;   beta  weight of the KL divergence
    """

    channels: tuple[int, ...] = (16, 32, 64)
    share: float = 0.8
    rate: float = 2e-3
    pretext_rate: float = 3e-3
    augmentation: Augment = field(default_factory=lambda: AUGMENT)
    kind: Kind = "gaussian"
    latent: int = 32
    beta: float = 0.1
    dropout: float = 0.2

    axes = 2
    trial = NODULES_QUICK

    def model(self, inputs: int, classes: int, dims: int) -> LatentReader:
        if self.kind == "principal":
            return LatentReader(Principal(inputs, self.latent), self.latent, self.dropout)
        outputs = self.latent * (2 if self.kind == "gaussian" else 1)
        return LatentReader(LesionEncoder(inputs, self.channels, outputs), self.latent, self.dropout)

    def pretext_parts(self, model: nn.Module, inputs: int, dims: int) -> nn.Module:
        if self.kind == "principal":
            return Moments(inputs)
        return LesionDecoder(self.latent, self.channels, inputs)

    def posterior(self, encoded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What an encoder says (B, outputs) as the mean of z (B, L), a sample of it (B, L), and KL (B,); in float32.

        A Dirichlet's z sums to L, so that an entry is about 1, whatever L.
        """
        if self.kind == "gaussian":
            mean, log_variance = encoded.float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-10, 10)
            return mean, mean + torch.randn_like(mean) * (0.5 * log_variance).exp(), gaussian_kl(mean, log_variance)
        alpha = concentrations(encoded.float())
        mean, sample = alpha / alpha.sum(1, keepdim=True), Dirichlet(alpha).rsample()
        return self.latent * mean, self.latent * sample, dirichlet_kl(alpha)

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        patches = lesions(images.images, images.labels, SIDE)
        if self.kind == "principal":
            nets["pretext"].add(patches)
            return nothing()
        encoded = nets["model"].encoder(patches)
        with torch.autocast(patches.device.type, enabled=False):
            _, sample, divergence = self.posterior(encoded)
        error = (nets["pretext"](sample).float() - patches).abs().mean()
        return error + self.beta * divergence.mean() / patches[0].numel()

    def after_pretext(self, nets: nn.ModuleDict, now: Moment) -> None:
        if self.kind == "principal" and now.step == now.steps - 1:
            nets["pretext"].settle(nets["model"].encoder)

    def supervised(self, nets: nn.ModuleDict, labelled: Batch, now: Moment) -> Tensor:
        logits = nets["model"](lesions(labelled.images, labelled.labels, SIDE)).float()
        return F.cross_entropy(logits, malignant(labelled.labels).long())

    def scores(self, nets: nn.ModuleDict, images: Tensor, labels: Tensor) -> Tensor:
        """(N,) probabilities that the nodule of each image is malignant."""
        return nets["average"](lesions(images, labels, SIDE)).float().softmax(1)[:, 1]

    def decoded(self, nets: nn.ModuleDict, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Patches as the mean of their latent vectors shows them, and KL (B,); NaN of what there is not."""
        nothing_known, encoder = torch.full((len(patches),), torch.nan), nets["average"].encoder
        if not self.has_pretext:
            return torch.full_like(patches, torch.nan), nothing_known
        if self.kind == "principal":
            return self.shown(nets, encoder(patches)), nothing_known
        with torch.random.fork_rng():
            mean, _, divergence = self.posterior(encoder(patches))
        return self.shown(nets, mean), divergence

    def shown(self, nets: nn.ModuleDict, z: Tensor) -> Tensor:
        """Patches (B, C, 32, 32) of latent vectors (B, latent)."""
        return nets["average"].encoder.restored(z) if self.kind == "principal" else nets["pretext"](z).float()

    def traversed(self, z: Tensor, dimension: int, values: Tensor) -> Tensor:
        """Latent vectors (V, latent): z (latent,) with these values (V,) of one entry.

        Of a Dirichlet's z the other entries give way in proportion, so that the sum stays.
        """
        moved = z.repeat(len(values), 1)
        if self.kind == "dirichlet":
            moved *= ((z.sum() - values) / (z.sum() - z[dimension]))[:, None]
        moved[:, dimension] = values
        return moved


@torch.no_grad()
def space_of(fitted) -> Space:
    """The latent space of a trained run, with clusters of its training nodules (k-means)."""
    samples, net = fitted.task.samples("labelled"), trained(fitted)["average"]
    there = has_nodule(samples.labels)
    images, labels = samples.images[there], samples.labels[there]
    vectors = net.encoded(lesions(images, labels, SIDE)).double().numpy()
    scale = vectors.mean(0), np.maximum(vectors.std(0), 1e-9)
    vectors = (vectors - scale[0]) / scale[1]
    clusters = KMeans(CLUSTERS, n_init=4, random_state=0).fit(vectors)
    radius = (bodies(labels).flatten(1).sum(1) / np.pi).sqrt().numpy()
    return Space(scale, vectors, malignant(labels).numpy(), radius, clusters)


@torch.no_grad()
def latent_rows(fitted, case: Case) -> list[dict]:
    """`nodule_rows`, and what the latent space makes of each nodule.

    error, kl         mean difference of the patch and what its latent vector shows; KL divergence, in nats
    silhouette        how much nearer it is to training nodules of its own kind than to those of the other
    purity            the share of its own kind among the training nodules of its cluster
    cluster_radius    the mean radius of these, to compare with `radius`
    """
    rows = diagnosis_rows(fitted, case)
    if not rows:
        return []
    method, space, nets = fitted.method, once(fitted, "space", lambda: space_of(fitted)), trained(fitted)
    images, labels = fitted.task.preparation.both(case)
    there = has_nodule(labels)
    patches, ill = lesions(images[there], labels[there], SIDE), malignant(labels[there]).numpy()
    shown, divergence = method.decoded(nets, patches)
    vectors = space.placed(nets["average"].encoded(patches).double().numpy())
    share, radius = space.neighbours(vectors)
    columns = {
        "error": (shown - patches).abs().flatten(1).mean(1),
        "kl": divergence,
        "silhouette": space.silhouette(vectors, ill),
        "purity": np.where(ill, share, 1 - share),
        "cluster_radius": radius,
    }
    return [row | {name: float(column[i]) for name, column in columns.items()} for i, row in enumerate(rows)]


ARMS = {
    "Gaussian VAE": Arm(LesionVAE()),
    "principal components": Arm(LesionVAE(kind="principal")),
    "untrained encoder": Arm(LesionVAE(waits=True)),
    "Dirichlet VAE": Arm(LesionVAE(kind="dirichlet")),
}

recipe = Recipe(
    paper="vae-lung",
    title="Variational autoencoders of nodules, explored and used to tell malignant ones",
    claim="An MLP on the latent vectors of a Gaussian VAE of nodule patches tells malignant from benign nodules with a "
    "higher AUC than the same MLP on as many principal components of them.",
    arms=ARMS,
    compare=("Gaussian VAE", "principal components"),
    ablation=("Gaussian VAE", "untrained encoder"),
    scales=scales(replace(NODULES_QUICK, fold=0), NODULES, *ARMS, budget=BUDGET),
    metric="auc",
    score=latent_rows,
    published={"LIDC-IDRI, the best model": 0.98},
    source="abstract, arXiv 2311.15719; official code, github.com/benkeel/VAE_lung_lesion_BMVC (RandomSearchVAE.py, "
    "RandomSearch_Dirichlet_VAE.py, VAE_Dirichlet_joint_loss.py)",
    components=(
        Component(
            "Gaussian VAE",
            "implemented",
            "of patches of 32 x 32 around nodules drawn into real X-rays, with latent vectors of 32 numbers; there "
            "64 x 64 around lesions in slices of CT, and some hundred numbers. As there mean absolute error and a "
            "weight on KL; no structural similarity, no annealing",
        ),
        Component(
            "Dirichlet VAE",
            "implemented",
            "with the official code's concentrations and prior (0.99), and samples differentiated by torch. KL is that "
            "of the bound, from posterior to prior; the official code's is from prior to posterior",
        ),
        Component(
            "MLP on latent vectors",
            "implemented",
            "two hidden layers (there three or four, searched for), numbers on one scale, the VAE frozen. The official "
            "code's joint training of VAE and MLP is left out. A patient's two nodules are always on one side",
        ),
        Component(
            "clusters in the latent space",
            "implemented",
            "k-means, eight clusters of training nodules (there searched for, and CLASSIX). Columns `silhouette`, "
            "`purity` and `cluster_radius` ask of new nodules whether kind and size are kept apart; not of shape or "
            "patient",
        ),
        Component(
            "comparison of Gaussian and Dirichlet",
            "implemented",
            "arms of the same networks and steps, judged by AUC and the columns above; no measure of disentanglement",
        ),
        Component(
            "latent space traversals",
            "implemented",
            "`traversed` and `shown`, along the direction that `Space.meaning` finds to go with size or malignancy; "
            "whether a radiologist would call it meaningful is not asked",
        ),
    ),
)
