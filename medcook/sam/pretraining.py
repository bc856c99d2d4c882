"""How the small SAM learns: on scenes alone, prompted, corrected, asked how sure it is. One command, resumable.

    python -m medcook.sam.pretraining --out FOLDER [--minutes N]

Each step embeds a few scenes and asks for several targets in each. The first prompt is a click, a box, a scribble, or
several of these; then clicks on what is still wrong correct the answer, as in SAM. Of three masks for one click the
best one learns (a click on a ventricle may mean the ventricle or the heart); every other prompt trains the single mask.
Everything random is a function of (seed, step).
"""

import json
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW
from tqdm.auto import tqdm

from medcook.methods import follow
from medcook.sam.model import DENSE, FINE, MOST_POINTS, PADDING, SIZE, Embedding, Prompts, SmallSam
from medcook.sam.scenes import Scene, appearance, scene

CHECKPOINT_SECONDS = 120.0


@dataclass(frozen=True)
class Plan:
    """Every number of a pre-training.

    images, objects   scenes a step, and targets in each
    rounds            answers to a prompt: the first, and those after a correcting click
    bank              scenes that are built and kept; their appearance is drawn anew at every use
    rate, warmup, cooldown   learning rate: up over the first steps, constant, down to zero over the last share
    average           decay per step of the moving average of the weights, which is what is kept
    """

    steps: int = 2600
    images: int = 8
    objects: int = 4
    rounds: int = 2
    bank: int = 4000
    rate: float = 1e-3
    decay: float = 0.02
    warmup: int = 150
    cooldown: float = 0.3
    average: float = 0.998
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Learning rate of a step."""
        left = (self.steps - step) / (self.cooldown * self.steps)
        return self.rate * min(1.0, (step + 1) / self.warmup, left)


@lru_cache(maxsize=8000)
def remembered(seed: int) -> Scene:
    """A scene of the bank."""
    return scene(seed)


def draw(plan: Plan, step: int) -> tuple[Tensor, Tensor]:
    """The scenes of a step: images (B, 1, SIZE, SIZE) and targets (B, objects, SIZE, SIZE) bool."""
    images, targets = [], []
    for k in range(plan.images):
        rng = np.random.default_rng([plan.seed, step, k])
        found = remembered(int(rng.integers(plan.bank)))
        image = appearance(found.regions, rng)
        chosen = rng.choice(len(found.targets), plan.objects, replace=len(found.targets) < plan.objects)
        masks = np.stack([found.mask(number) for number in chosen])
        turns, mirrored = int(rng.integers(4)), rng.random() < 0.5
        image, masks = (np.rot90(part, turns, axes=(-2, -1)) for part in (image, masks))
        if mirrored:
            image, masks = image[..., ::-1], masks[..., ::-1]
        images.append(torch.from_numpy(image.copy())[None])
        targets.append(torch.from_numpy(masks.copy()))
    return torch.stack(images), torch.stack(targets)


def first_prompts(masks: Tensor, rng: torch.Generator) -> tuple[Prompts, Tensor]:
    """Random prompts for masks (M, SIZE, SIZE), and (M,) bool: which are a single click and may mean several things."""
    kind = torch.rand(len(masks), generator=rng)
    single = kind < 0.3
    boxed = (kind >= 0.3) & (kind < 0.75)
    scribbled = kind >= 0.85
    points = torch.zeros(len(masks), MOST_POINTS, 2)
    labels = torch.full((len(masks), MOST_POINTS), PADDING)
    count = torch.where(single, 1, torch.randint(1, 4, (len(masks),), generator=rng))
    count = torch.where(boxed & (kind < 0.65), 0, count)
    inside = pick(masks, 3, rng)
    for k in range(3):
        here = count > k
        points[here, k], labels[here, k] = inside[here, k], 1
    boxes = torch.where(boxed[:, None], loose_boxes(masks, rng), torch.nan)
    dense = torch.zeros(len(masks), 3, DENSE, DENSE)
    draw_box(dense, boxes)
    draw_points(dense, points, labels)
    strokes = scribbles(masks[scribbled], rng)
    dense[scribbled, 2] = torch.maximum(dense[scribbled, 2], strokes)
    return Prompts(points, labels, boxes, dense), single


def pick(masks: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """(M, count, 2) random points x, y inside masks (M, H, W), in input pixels."""
    height, width = masks.shape[-2:]
    where = torch.multinomial(masks.flatten(1).float() + 1e-9, count, generator=rng)
    xy = torch.stack([where % width, where // width], dim=2).float() + 0.5
    return xy * (SIZE / width)


def loose_boxes(masks: Tensor, rng: torch.Generator) -> Tensor:
    """(M, 4) left, top, right, bottom of masks, each side moved by up to a twentieth of the box, or two pixels."""
    rows, columns = masks.any(2), masks.any(1)
    left, top = columns.float().argmax(1), rows.float().argmax(1)
    right, bottom = SIZE - columns.flip(1).float().argmax(1), SIZE - rows.flip(1).float().argmax(1)
    boxes = torch.stack([left, top, right, bottom], dim=1).float()
    slack = ((boxes[:, 2:] - boxes[:, :2]) / 20).clamp_min(2).repeat(1, 2)
    calm = (torch.rand(len(masks), 1, generator=rng) < 0.7).float()  # mostly tight boxes
    return (boxes + (torch.rand(boxes.shape, generator=rng) * 2 - 1) * slack * (1 - 0.75 * calm)).clamp(0, SIZE)


def draw_box(dense: Tensor, boxes: Tensor) -> None:
    """Draw boxes (M, 4) into channel 1 of the dense prompts; rows without a box (NaN) stay 0."""
    centres = (torch.arange(DENSE) + 0.5) * (SIZE / DENSE)
    left, top, right, bottom = boxes[:, :, None].unbind(1)
    inside = ((centres > top) & (centres < bottom))[:, :, None] & ((centres > left) & (centres < right))[:, None]
    dense[:, 1] = torch.where(boxes.isnan().any(1)[:, None, None], 0.0, inside * 2.0 - 1)


def draw_points(dense: Tensor, points: Tensor, labels: Tensor) -> None:
    """Draw points as soft dots into channel 2 of the dense prompts: 1 for foreground, -1 for background."""
    centres = (torch.arange(DENSE) + 0.5) * (SIZE / DENSE)
    near = lambda k: torch.exp(-(((points[..., k, None] - centres) / 5.0) ** 2))  # noqa: E731
    dots = near(1)[..., :, None] * near(0)[..., None, :]
    dense[:, 2] = (dots * (labels == 1)[..., None, None]).amax(1) - (dots * (labels == 0)[..., None, None]).amax(1)


def scribbles(masks: Tensor, rng: torch.Generator) -> Tensor:
    """(M, DENSE, DENSE) strokes: straight lines between three points of each mask, where they run inside it."""
    ends = pick(masks, 4, rng)
    along = torch.linspace(0, 1, 40)[:, None]
    path = torch.cat([ends[:, None, k] * (1 - along) + ends[:, None, k + 1] * along for k in range(3)], dim=1)
    strokes = torch.zeros(len(masks), DENSE, DENSE)
    for stroke, mask, line in zip(strokes, masks, path, strict=True):
        x, y = line.long().clamp(0, SIZE - 1).unbind(1)
        kept = mask[y, x]
        stroke[y[kept] * DENSE // SIZE, x[kept] * DENSE // SIZE] = 1.0
    return strokes


def corrected(prompts: Prompts, logits: Tensor, truth: Tensor, round_: int, rng: torch.Generator) -> Prompts:
    """The prompts with a click on a random wrong pixel of logits (M, DENSE, DENSE), and with the answer itself."""
    wrong = (logits > 0) != (truth > 0.5)
    point = pick(wrong, 1, rng)[:, 0]
    x, y = (point * (DENSE / SIZE)).long().clamp(0, DENSE - 1).unbind(1)
    label = (truth[torch.arange(len(truth)), y, x] > 0.5).long()
    label = torch.where(wrong.flatten(1).any(1), label, PADDING)
    points, labels = prompts.points.clone(), prompts.labels.clone()
    points[:, 2 + round_], labels[:, 2 + round_] = point, label
    dense, strokes = prompts.dense.clone(), prompts.dense[:, 2]
    draw_points(dense, points, labels)
    dense[:, 2] = torch.where(strokes.abs() > dense[:, 2].abs(), strokes, dense[:, 2])
    dense[:, 0] = (logits / 8).clamp(-1, 1)
    return Prompts(points, labels, prompts.boxes, dense)


def mask_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """(...,) cross-entropy, weighted towards the uncertain (focal), and soft Dice of logits (..., H, W)."""
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    soft = logits.sigmoid()
    focal = (entropy * (0.25 + (soft - truth).abs() ** 2)).mean((-2, -1))
    dice = 1 - (2 * (soft * truth).sum((-2, -1)) + 1) / ((soft + truth).sum((-2, -1)) + 1)
    return 4 * focal + dice


def extent_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """(M,) soft Dice of what masks (M, H, W) cover of each axis: an answer should reach where the object ends.

    As in BoxInst (Tian et al., CVPR 2021), which learns from boxes alone.
    """
    soft, total = logits.sigmoid(), 0.0
    for axis in (-1, -2):
        mine, theirs = soft.amax(axis), truth.amax(axis)
        total = total + 1 - (2 * (mine * theirs).sum(-1) + 1) / ((mine**2).sum(-1) + (theirs**2).sum(-1) + 1)
    return total


def step_loss(model: SmallSam, plan: Plan, step: int, device: str = "cpu") -> tuple[Tensor, float]:
    """The loss of a step and the mean IoU of its last answers."""
    rng = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
    images, targets = draw(plan, step)
    masks = targets.flatten(0, 1)
    prompts, single = first_prompts(masks, rng)
    embedding = model.embed(images.to(device)).at(torch.arange(plan.images).repeat_interleave(plan.objects))
    return answering_loss(model, embedding, masks, prompts, single, plan.rounds, rng)


def answering_loss(
    model: SmallSam,
    embedding: Embedding,
    masks: Tensor,
    prompts: Prompts,
    single: Tensor,
    rounds: int,
    rng: torch.Generator,
) -> tuple[Tensor, float]:
    """The loss of answering prompts for masks (M, SIZE, SIZE) bool, a row of the embedding each; mean IoU at the end.

    single  (M,) bool: which prompts are a click that may mean several things, so that the best of three masks learns
    rounds  answers to a prompt: the first, and those after a correcting click, each for half of those before it
    """
    device = embedding.coarse.device
    low, fine = (F.adaptive_avg_pool2d(masks[:, None].float(), side)[:, 0].to(device) for side in (DENSE, FINE))
    total = 0.0
    for round_ in range(1, rounds + 1):
        logits, predicted = model.decode(embedding, Prompts(*(part.to(device) for part in prompts)))
        logits, predicted = logits.float(), predicted.float()
        losses = mask_loss(logits, low[:, None].expand_as(logits))
        best = torch.where(single.to(device) & (round_ == 1), losses[:, 1:].argmin(1) + 1, 0)
        rows = torch.arange(len(best), device=device)
        overlap = iou(logits.detach(), low[:, None])
        answer = logits[rows, best]
        total = total + losses[rows, best].mean() + extent_loss(answer, low).mean() + F.mse_loss(predicted, overlap)
        if round_ < rounds:  # half of them: a correction costs as much as a first answer, and is learned faster
            half = torch.randperm(len(rows), generator=rng)[: (len(rows) + 1) // 2]
            prompts, answer = Prompts(*(part[half] for part in prompts)), answer.detach().cpu()[half]
            half = half.to(device)
            embedding, low, fine, single = embedding.at(half), low[half], fine[half], single.to(device)[half]
            prompts = corrected(prompts, answer, low.cpu(), round_, rng)
    sharp = model.refine(answer[:, None], embedding)[:, 0].float()
    total = total + mask_loss(sharp, fine).mean()
    return total, float(overlap[rows, best].mean())


def iou(logits: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of logits above 0 with truth above one half."""
    guess, real = logits > 0, truth > 0.5
    return (guess & real).sum((-2, -1)) / (guess | real).sum((-2, -1)).clamp_min(1)


def pretrain(
    plan: Plan, folder: Path, minutes: float | None = None, device: str = "cpu", low_precision: bool | None = None
) -> SmallSam:
    """Train for the plan's steps, or for so many minutes; goes on from folder/state.pt where that is there.

    low_precision  bfloat16; if nothing is said, on a GPU and where it was timed to be faster

    Writes folder/log.jsonl (one line every 20 steps) and state.pt. Returns the moving average of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)
    model, average = SmallSam().to(device), SmallSam().to(device).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    optimiser = AdamW(model.parameters(), lr=plan.rate, weight_decay=plan.decay, betas=(0.9, 0.98))
    step, seconds, path = 0, 0.0, folder / "state.pt"
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        step, seconds = state["step"], state["seconds"]
    began = saved = time.monotonic()
    spent = lambda: seconds + time.monotonic() - began  # noqa: E731
    losses, scores = [], []
    low_precision = device != "cpu" or _bfloat16_pays() if low_precision is None else low_precision
    bar = tqdm(range(step, plan.steps), initial=step, total=plan.steps, mininterval=30)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = plan.rate_at(step)
        with torch.autocast(device, torch.bfloat16, enabled=low_precision):
            loss, score = step_loss(model, plan, step, device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        follow(average, model, min(plan.average, (step + 1) / (step + 10)))
        losses.append(loss.item())
        scores.append(score)
        late = minutes is not None and time.monotonic() - began > 60 * minutes
        if len(losses) == 20:
            line = {"step": step + 1, "loss": np.mean(losses), "iou": np.mean(scores), "seconds": round(spent())}
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps({k: round(float(v), 4) for k, v in line.items()}) + "\n")
            losses, scores = [], []
        if late or step + 1 == plan.steps or time.monotonic() - saved > CHECKPOINT_SECONDS:
            parts = {"model": model, "average": average, "optimiser": optimiser}
            state = {name: part.state_dict() for name, part in parts.items()}
            _save(state | {"step": step + 1, "seconds": spent(), "plan": asdict(plan)}, path)
            saved = time.monotonic()
        if late:
            break
    return average


def _save(state: dict, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def _bfloat16_pays() -> bool:
    from medcook.precision import resolve_precision

    return resolve_precision("auto") == "bfloat16"


def main() -> None:
    """The command line of this module."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    pretrain(Plan(steps=args.steps), args.out, args.minutes, args.device)


if __name__ == "__main__":
    main()
