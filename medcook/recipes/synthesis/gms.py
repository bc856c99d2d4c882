"""GMS, generative medical segmentation (Huo, Ouyang, Ourselin and Sparks, AAAI 2025; arXiv 2403.18198).

Idea: an autoencoder that gives images back also gives back a picture of a label map. So it may stay as it was trained
before, and segmentation is to find, from the latents of an image, those of its label map; the decoder draws the rest.
With the frozen encoder E and decoder D, a label map M painted as an image, and a small network f, which alone learns:

    z_I   = E(I), in half of the steps a sample of its posterior;   z_M = E(M)
    loss  = |f(z_I) - z_M|^2 + Dice loss(D(f(z_I)), M)          latent matching, and what is drawn
    M'    = D(f(E(I)))

f has few weights: less to overfit with.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.methods import Batch, Moment
from medcook.pretraining import Pretrained
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.synthesis._denoiser import folded, unfolded
from medcook.recipes.synthesis._painting import grey, painted, shares
from medcook.recipes.synthesis._settings import BASELINE, BRAINS, HEARTS, scales

LATENT = 4
"""Numbers at each of the latents' positions, which stand for 4 x 4 pixels; four for 8 x 8 in the paper."""

LEVELS = 3
"""How many of the mapping's last blocks say what the latents are, and are asked for both losses; as in the code."""

KL = 1e-4
"""Weight of the divergence of the autoencoder's posterior; on this scale Stable Diffusion's is smaller still."""


class Norm(nn.GroupNorm):
    """Group normalisation, which is several times as fast on images that are stored channel by channel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous())


def normal_layer(width: int) -> list[nn.Module]:
    """Normalisation, activation and a 3 x 3 convolution that keep the width."""
    return [Norm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)]


class Residual(nn.Sequential):
    """Two layers around which the input passes."""

    def __init__(self, width: int):
        super().__init__(*normal_layer(width), *normal_layer(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Autoencoder(nn.Module):
    """E and D: images (B, colours, H, W) to latents (B, LATENT, H / 4, W / 4) and back. H and W are multiples of 4.

    What others see has about unit variance: it is divided by `spread`, the running standard deviation of latents.
    """

    def __init__(self, colours: int, width: int = 16):
        super().__init__()
        self.colours, wide = colours, 2 * width
        self.enter = nn.Sequential(
            nn.Conv2d(4 * colours, width, 3, padding=1),
            Residual(width),
            nn.Conv2d(width, wide, 3, padding=1, stride=2),
            Residual(wide),
            *normal_layer(wide)[:2],
            nn.Conv2d(wide, 2 * LATENT, 1),
        )
        self.leave = nn.Sequential(
            nn.Conv2d(LATENT, wide, 3, padding=1),
            Residual(wide),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(wide, width, 3, padding=1),
            Residual(width),
            *normal_layer(width)[:2],
            nn.Conv2d(width, 4 * colours, 3, padding=1),
        )
        self.register_buffer("spread", torch.ones(()))

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of latents, as they are."""
        mean, logarithm = self.enter(folded(images, 2)).float().chunk(2, dim=1)
        return mean, (logarithm.clamp(-30, 20) / 2).exp()

    def drawn(self, latents: Tensor) -> Tensor:
        """Images of latents, as they are."""
        return unfolded(self.leave(latents), 2).float()

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of latents of unit variance."""
        mean, deviation = self.posterior(images)
        return mean / self.spread, deviation / self.spread

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents of unit variance."""
        return self.drawn(latents * self.spread)

    def loss(self, images: Tensor) -> Tensor:
        """Mean absolute error of what comes back of images, and KL times the divergence from a normal distribution."""
        mean, deviation = self.posterior(images)
        with torch.no_grad():
            self.spread.lerp_(mean.std(), 0.1)
        divergence = (mean.square() + deviation.square() - 1 - 2 * deviation.log()).mean() / 2
        return F.l1_loss(self.drawn(mean + deviation * torch.randn_like(mean)), images) + KL * divergence


class AttentionBlock(nn.Module):
    """(B, inputs, h, w) to (B, outputs, h, w): two convolutions with a way past them, then self-attention."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        layers = [
            part
            for width in (inputs, outputs)
            for part in (Norm(width // 2, width), nn.PReLU(), nn.Conv2d(width, outputs, 3, padding=1))
        ]
        self.layers = nn.Sequential(*layers)
        self.past = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()
        self.norm = Norm(outputs // 2, outputs)
        self.asked, self.found = nn.Conv2d(outputs, 3 * outputs, 1), nn.Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.past(x) + self.layers(x)
        q, k, v = self.asked(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)
        weights = (q @ k.transpose(1, 2)).float().div(q.shape[2] ** 0.5).softmax(2)
        return x + self.found((weights.to(v) @ v).transpose(1, 2).reshape(x.shape))


class LatentMapping(nn.Module):
    """f: latents (B, LATENT, h, w) of images to those of label maps, as the last blocks see them; the last one counts.

    There are skips as in a U-Net, but no position is pooled away.
    """

    def __init__(self, width: int = 8, times: tuple[int, ...] = (1, 2, 4, 4)):
        super().__init__()
        widths = [width, *(width * each for each in times)]
        pairs = list(zip(widths, widths[1:], strict=False))
        self.enter = nn.Conv2d(LATENT, width, 3, padding=1)
        self.down = nn.ModuleList(AttentionBlock(i, o) for i, o in pairs)
        self.up = nn.ModuleList(AttentionBlock(i + o, i) for i, o in reversed(pairs))
        self.leave = nn.ModuleList(
            nn.Sequential(Norm(w // 2, w), nn.SiLU(), nn.Conv2d(w, LATENT, 3, padding=1, bias=False))
            for w in reversed(widths[:LEVELS])
        )
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="leaky_relu")
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, latents: Tensor) -> list[Tensor]:
        skips = [self.enter(latents)]
        for block in self.down:
            skips.append(block(skips[-1]))
        seen = [skips.pop()]
        for block in self.up:
            seen.append(block(torch.cat([skips.pop(), seen[-1]], dim=1)))
        return [leave(x).float() for leave, x in zip(self.leave, seen[-LEVELS:], strict=True)]


class Generator(nn.Module):
    """The autoencoder, and the mapping between its latents."""

    def __init__(self, colours: int):
        super().__init__()
        self.autoencoder, self.mapping = Autoencoder(colours), LatentMapping()


def random_maps(count: int, size: tuple[int, ...], classes: int) -> Tensor:
    """Label maps (count, *size) uint8 of nothing: nested regions of a smooth random field, named at random."""
    grid = [int(torch.randint(4, 13, ())) for _ in size]
    field = F.interpolate(torch.randn(count, 1, *grid), size=size, mode="bicubic", align_corners=False)
    region = (field > torch.randn(count, classes - 1, 1, 1)).sum(1)
    names = torch.rand(count, classes).argsort(1)
    return names.gather(1, region.flatten(1)).view(count, *size).to(torch.uint8)


def drawn_dice(found: Tensor, truth: Tensor) -> Tensor:
    """One minus the mean soft Dice of structures (B, K, *size), 0 to 1, each pooled over the batch."""
    axes = (0, *range(2, found.ndim))
    overlap, size = (found * truth).sum(axes), (found + truth).sum(axes)
    return 1 - ((2 * overlap + 1) / (size + 1)).mean()


@dataclass
class GMS(Pretrained):
    """The autoencoder learns from images without labels and from random maps; then the mapping, from labels.

    frozen    the autoencoder stays as it is while the mapping learns; else it learns on with it
    matching  weight of latent matching
    """

    share: float = 0.6
    frozen: bool = True
    matching: float = 1.0

    axes, trial = 2, BRAINS

    def model(self, inputs: int, classes: int, dims: int) -> nn.Module:
        return Generator(classes - 1)

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        """Views of images, and as many random maps."""
        net, shown = nets["model"].autoencoder.requires_grad_(True), self.view(images.images)
        maps = random_maps(len(shown), shown.shape[2:], net.colours + 1).to(shown.device)
        return net.loss(torch.cat([grey(shown, net.colours), painted(maps, net.colours + 1)]))

    def supervised(self, nets: nn.ModuleDict, labelled: Batch, now: Moment) -> Tensor:
        net, mapping = nets["model"].autoencoder.requires_grad_(not self.frozen), nets["model"].mapping
        mask = painted(labelled.labels, net.colours + 1)
        with torch.no_grad():
            wanted = net.encode(mask)[0]
        mean, deviation = net.encode(grey(labelled.images, net.colours))
        sampled = float(torch.rand(()) > 0.5)
        said = mapping(mean + sampled * deviation * torch.randn_like(mean))
        drawn = ((net.decode(torch.cat(said)) + 1) / 2).clamp(0, 1).chunk(LEVELS)
        matched = sum(F.mse_loss(found, wanted) for found in said)
        return self.matching * matched + sum(drawn_dice(each, (mask + 1) / 2) for each in drawn)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        net, mapping = nets["average"].autoencoder, nets["average"].mapping
        return shares(net.decode(mapping(net.encode(grey(images, net.colours))[0])[-1]))


recipe = Recipe(
    paper="gms",
    title="Segmentation as a mapping between latents of a frozen autoencoder",
    claim="With labels of three patients of acdc, a mapping between latents of a frozen autoencoder gives a higher "
    "Dice than a U-Net with three times as many trainable weights and as many steps with labels.",
    arms={
        "u-net": Arm(BASELINE),
        "gms": Arm(GMS()),
        "unfrozen": Arm(GMS(frozen=False)),
        "without latent matching": Arm(GMS(matching=0.0)),
    },
    compare=("gms", "u-net"),
    ablation=("gms", "unfrozen"),
    replicate="draw",
    scales=scales(BRAINS, HEARTS, "u-net", "gms", "unfrozen"),
    published={"BUS, GMS": 0.8842, "BUS, U-Net": 0.815, "BUSI to BUS, GMS": 0.8031, "BUSI to BUS, U-Net": 0.6299},
    source="official code, github.com/King-HAW/GMS, with tables; abstract, arXiv 2403.18198",
    components=(
        Component(
            "frozen autoencoder",
            "simplified",
            "for Stable Diffusion's, which photographs trained: a small one of 61 thousand weights. For 540 of 900 "
            "steps it learns from images of training patients, without labels, and as many random label maps; then it "
            "is frozen. There are as many colours as structures, each structure has its own; there images are grey on "
            "three colours, with one structure. 4 x 4 pixels become four numbers, there 8 x 8. Absolute error and "
            "divergence as there, without perceptual and adversarial losses. Looked at on validation patients of a "
            "draw that is not scored: images come back blurred, label maps with a Dice of 0.93 (right ventricle), 0.86 "
            "(myocardium) and 0.95 (left ventricle), which bounds what can be found; random maps had become finer "
            "after a first look at 0.83 for the myocardium",
        ),
        Component(
            "mapping from image to mask in latent space",
            "implemented",
            "eight blocks of two convolutions and self-attention with skips and without pooling, on 16 x 16 positions; "
            "8 to 32 channels, a quarter of the official ones; 360 steps with labels, there thousands",
        ),
        Component(
            "latent matching and Dice",
            "implemented",
            "with equal weights, on three levels of the mapping, as in the code. Dice is pooled over the batch, as in "
            "the book's loss. An arm that `full` does not run leaves latent matching out",
        ),
        Component(
            "decoding the predicted latents",
            "implemented",
            "a colour's brightness is the share of its structure; with one structure, the paper's threshold at a half",
        ),
        Component(
            "fewer trainable parameters",
            "implemented",
            "100 thousand learn from labels, of the U-Net 307 thousand; there 1.5 and 14 million. With the autoencoder "
            "unfrozen it is 161 thousand",
        ),
        Component(
            "less overfitting",
            "simplified",
            "three labelled patients, and an ablation in which the autoencoder learns on from labels. On those "
            "validation patients, one run each: 0.56, with both losses on the last level alone 0.54; the U-Net 0.74",
        ),
        Component(
            "discriminative and generative models",
            "simplified",
            "the book's U-Net, on the same grid; it makes no use of images without labels",
        ),
        Component("five public datasets", "absent", "acdc alone"),
        Component("generalisation across centres", "absent", "patients of acdc come from one hospital"),
    ),
)
