"""DistillFSS: what a support says, distilled into a layer (Marinis et al., arXiv 2512.05613, 2025).

The teacher compares every pixel of a query with every pixel of the support: its cost grows with the shots. When a
support arrives, a small convolutional layer learns to say what the teacher says, on augmented views of the support
itself. Then the support can go: the student is the teacher with that layer in place of the comparison.

  teacher  coarse(x) = sum_y a(x, y) m(y) / sum_y a(x, y), a(x, y) = exp(t cos(f(x), f(y))) / n(y), y over the pixels
           of all shots, m their mask, n how many pixels are of y's class; logits = mix(coarse, f)
  student  coarse'(x) = conv1(relu(conv3(conv1(f))))(x), logits' = mix(coarse', f) with the same f and mix
  loss     |coarse' - coarse|^2 + KL(logits || logits') + CE and Dice of logits' and mask
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from medcook.data import Case
from medcook.few_shot import FewShot, PrototypeNetwork, Shots, novel_dice
from medcook.few_shot.baselines import SHARPNESS
from medcook.few_shot.method import shrink
from medcook.few_shot.scoring import supported
from medcook.recipes.few_shot._settings import EPISODES, PLACE, both, scales
from medcook.recipes.recipe import Component, Recipe

SHOTS, HIDDEN = 3, 32


@dataclass
class Attention(FewShot):
    """The teacher: dense cross-attention from query to support pixels (DCAMA, Shi et al. 2022), mixed with features."""

    episodes: str = EPISODES

    def parts(self, inputs: int) -> dict[str, nn.Module]:
        mix = nn.Sequential(nn.Conv2d(self.width + 1, HIDDEN, 1), nn.ReLU(), nn.Conv2d(HIDDEN, 2, 3, padding=1))
        return super().parts(inputs) | {"mix": mix}

    def logits(self, net: nn.ModuleDict, support: Shots, query: Shots) -> Tensor:
        return mixed(net, self.coarse(support, query), query.maps)

    def coarse(self, support: Shots, query: Shots) -> Tensor:
        """(Q, 1, h, w): the share of structure among the support's pixels that each query pixel attends to."""
        return attend(query.maps, support.maps, shrink(support.masks, support.maps.shape[2:]))


class Student(nn.Sequential):
    """The layer: features (Q, D, h, w) to a coarse mask (Q, 1, h, w)."""

    def __init__(self, width: int):
        super().__init__(
            nn.Conv2d(width, HIDDEN, 1), nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1), nn.ReLU(),
            nn.Conv2d(HIDDEN, 1, 1), nn.Sigmoid(),
        )  # fmt: skip


def attend(queries: Tensor, keys: Tensor, inside: Tensor) -> Tensor:
    """(Q, 1, h, w) in 0 to 1, of queries (Q, d, h, w), keys (S, d, h', w') and masks (S, h', w').

    Structure and background weigh the same, however many pixels they have: 1/2 means that neither is more alike.
    """
    flat, inside = F.normalize(keys, dim=1).movedim(1, -1).flatten(0, 2), inside.flatten()
    alike = torch.einsum("qdhw,nd->qhwn", SHARPNESS * F.normalize(queries, dim=1), flat)
    values = torch.stack([(1 - inside) / (1 - inside).sum().clamp_min(1e-5), inside / inside.sum().clamp_min(1e-5)], 1)
    background, structure = (alike.sub_(SHARPNESS).exp_() @ values).unbind(-1)
    return (structure / (background + structure).clamp_min(1e-12))[:, None]


def mixed(net: nn.ModuleDict, coarse: Tensor, maps: Tensor) -> Tensor:
    """(Q, 2, h, w) of a coarse mask (Q, 1, h, w) and features: the mask's own say, and what `mix` has to add."""
    signed = 4 * coarse - 2
    return torch.cat([-signed, signed], dim=1) + net["mix"](torch.cat([signed, maps], dim=1))


@dataclass
class DistillFSS(Attention):
    """The same network; a support is distilled into a layer, which answers from then on.

    distilling    steps of it, on `copies` augmented views of every support slice; `pace` their learning rate
    from_teacher  False: the layer learns from the support's masks alone
    """

    distilling: int = 80
    copies: int = 4
    pace: float = 5e-3
    from_teacher: bool = True

    def adapt(self, net: nn.ModuleDict, supports: list[Shots]) -> nn.ModuleDict:
        """The network with a layer `student` that has learned this support; everything else is untouched."""
        student = Student(self.width)
        lessons = [self.lesson(net, each) for each in supports]
        optimiser = AdamW(student.parameters(), lr=self.pace)
        with torch.enable_grad():
            for step in range(self.distilling):
                loss = self.distillation(net, student, *lessons[step % len(lessons)])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        return nn.ModuleDict({**net, "student": student.requires_grad_(False)})

    @torch.no_grad()
    def lesson(self, net: nn.ModuleDict, support: Shots) -> tuple[Shots, Tensor]:
        """Augmented views of a chunk's support slices, and the teacher's coarse mask of each."""
        rng = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        images, masks = (each.repeat_interleave(self.copies, 0) for each in (support.images, support.masks))
        views, moved = self.augmentation(images, masks, rng)
        shots = Shots(views, self.encode(net, views), moved)
        return shots, self.coarse(support, shots)

    def distillation(self, net: nn.ModuleDict, student: nn.Module, views: Shots, coarse: Tensor) -> Tensor:
        """The student's loss on views whose coarse masks by the teacher are known."""
        mine = student(views.maps)
        logits = mixed(net, mine, views.maps)
        loss = self.query_loss(logits, views)
        if not self.from_teacher:
            return loss
        taught = mixed(net, coarse, views.maps).softmax(1)
        said = F.kl_div(logits.log_softmax(1), taught, reduction="none").sum(1).mean()
        return loss + F.mse_loss(mine, coarse) + said

    def logits(self, net: nn.ModuleDict, support: Shots, query: Shots) -> Tensor:
        if "student" not in net:
            return super().logits(net, support, query)
        return mixed(net, net["student"](query.maps), query.maps)


def dice_and_operations(fitted, case: Case) -> list[dict]:
    """The rows of `novel_dice`, with `mega_operations`: what answering one slice takes once its features are there.

    Multiplications and additions of matrix products and convolutions, counted, not timed; the encoder, which all arms
    share, is left out, and so are the features of the support, which can be kept.
    """
    rows = novel_dice(fitted, case)
    if rows:
        count = operations(fitted, next(iter(fitted.task.novel_structures)))
        rows = [each | {"mega_operations": count} for each in rows]
    return rows


@torch.no_grad()
def operations(fitted, value: int) -> float:
    """Millions of operations for one slice, with the first support of a structure."""
    net, supports = supported(fitted, 0, value)
    query = supports[0].take([0])._replace(masks=None)
    with FlopCounterMode(display=False) as counter:
        fitted.method.logits(net, supports[0], query)
    return counter.get_total_flops() / 1e6


recipe = Recipe(
    paper="distillfss",
    title="A support distilled into a layer",
    claim="With three annotated patients, a layer distilled from them keeps the volume Dice of the attention that "
    "compares with all of them, within 0.02, and answers without them.",
    arms=both(
        {
            "attention": Attention(),
            "distilled": DistillFSS(),
            "masks alone": DistillFSS(from_teacher=False),
            "prototypes": PrototypeNetwork(episodes=EPISODES),
        },
        place=PLACE,
    ),
    compare=("distilled", "attention"),
    ablation=("distilled", "masks alone"),
    replicate="draw",
    scales=scales("attention", "distilled", "masks alone", shots=SHOTS, supports=1),
    metric="dice",
    expect="non-inferior",
    margin=0.02,
    score=dice_and_operations,
    components=(
        Component(
            "teacher of support and query",
            "simplified",
            "cosine attention at one level of features, structure and background weighing the same; DCAMA attends at "
            "three levels",
        ),
        Component(
            "support knowledge in a dedicated layer",
            "implemented",
            "3 x 3 convolution, ReLU, 1 x 1, as in the official code, after a 1 x 1 one that makes 32 channels of 512; "
            "one for all chunks of the volume",
        ),
        Component("teacher-student distillation", "implemented", "coarse masks, logits and the support's own masks"),
        Component("no support at test time", "implemented", "operations for a slice are counted and stand in the rows"),
        Component(
            "fine-tuning of the whole network", "absent", "the encoder stays as it is, so that all arms share it"
        ),
        Component("cross-domain benchmark", "absent", "famnet and c-graph cross domains here"),
    ),
)
