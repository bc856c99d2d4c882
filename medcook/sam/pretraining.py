"""How the small SAM learns: on scenes alone, prompted, corrected, asked how sure it is. One command, resumable.

    python -m medcook.sam.pretraining --out FOLDER [--plan gpu --device cuda] [--minutes N]

Each step embeds a few scenes, or close-ups of them, and asks for several targets in each. The first prompt is a click,
a box, a scribble, or several of these; then clicks on what is still wrong correct the answer, as in SAM. Of three masks
for one click the best one learns (a click on a ventricle may mean the ventricle or the heart); every other prompt
trains the single mask. Everything random is a function of (seed, step).
"""

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW
from tqdm.auto import tqdm

from medcook.methods import follow
from medcook.sam.asking import corrected, first_prompts
from medcook.sam.model import DENSE, FINE, Embedding, Prompts, SmallSam
from medcook.sam.plan import PLANS, Plan, drawing

CHECKPOINT_SECONDS = 120.0
LOGGED = 20
"""Steps between two lines of the log."""


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


def step_loss(model: SmallSam, plan: Plan, drawn: tuple[Tensor, Tensor], rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The loss of answering prompts for the targets of scenes, see `draw`, and the mean IoU of the last answers."""
    images, targets = drawn
    masks = targets.flatten(0, 1)
    prompts, single = first_prompts(masks, rng)
    embedding = model.embed(images).at(torch.arange(len(masks), device=masks.device) // plan.objects)
    mixed = (torch.rand(len(masks), 1, 1, 1, generator=rng, device=rng.device) >= plan.plain).float()
    return answering_loss(model, embedding, masks, prompts, single, plan.rounds, rng, mixed)


def answering_loss(
    model: SmallSam,
    embedding: Embedding,
    masks: Tensor,
    prompts: Prompts,
    single: Tensor,
    rounds: int,
    rng: torch.Generator,
    mixed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of answering prompts for masks (M, SIZE, SIZE) bool, a row of the embedding each; mean IoU at the end.

    single  (M,) bool: which prompts are a click that may mean several things, so that the best of three masks learns
    rounds  answers to a prompt: the first, and those after a correcting click, each for half of those before it
    rng     corrections are drawn on its device
    mixed   (M, 1, 1, 1) how much the model's mixer counts, if not fully
    """
    device = embedding.coarse.device
    low, fine = (F.adaptive_avg_pool2d(masks[:, None].float(), side)[:, 0].to(device) for side in (DENSE, FINE))
    single, total = single.to(device), 0.0
    for round_ in range(1, rounds + 1):
        asked = Prompts(*(part.to(device) for part in prompts))
        logits, predicted = model.decode(embedding, asked, *([] if mixed is None else [mixed]))
        logits, predicted = logits.float(), predicted.float()
        losses = mask_loss(logits, low[:, None].expand_as(logits))
        best = torch.where(single & (round_ == 1), losses[:, 1:].argmin(1) + 1, 0)[:, None]
        chosen = lambda each: each.gather(1, best)[:, 0]  # noqa: B023, E731
        overlap = iou(logits.detach(), low[:, None])
        answer = logits.gather(1, best[:, :, None, None].expand(-1, 1, *logits.shape[2:]))[:, 0]
        total = total + chosen(losses).mean() + extent_loss(answer, low).mean() + F.mse_loss(predicted, overlap)
        score = chosen(overlap).mean()
        if round_ < rounds:  # half of them: a correction costs as much as a first answer, and is learned faster
            embedding, prompts = (
                Embedding(*(part[::2] for part in embedding)),
                Prompts(*(part[::2] for part in prompts)),
            )
            answer, low, fine, single = answer[::2], low[::2], fine[::2], single[::2]
            mixed = None if mixed is None else mixed[::2]
            prompts = corrected(prompts, answer.detach().to(rng.device), low.to(rng.device), round_, rng)
    sharp = model.refine(answer[:, None], embedding)[:, 0].float()
    return total + mask_loss(sharp, fine).mean(), score


def iou(logits: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of logits above 0 with truth above one half."""
    guess, real = logits > 0, truth > 0.5
    return (guess & real).sum((-2, -1)) / (guess | real).sum((-2, -1)).clamp_min(1)


class Learner:
    """Turns the scenes of a step into gradients: __call__(step, drawn) gives loss and mean IoU."""

    def __init__(self, model: SmallSam, plan: Plan, device: str, low_precision: bool):
        self.model, self.plan, self.device, self.low_precision = model, plan, device, low_precision

    def __call__(self, step: int, drawn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        rng = torch.Generator(self.device).manual_seed(self.plan.seed * 1_000_003 + step)
        self.model.zero_grad(set_to_none=True)
        return self.learn(tuple(part.to(self.device) for part in drawn), rng)

    def learn(self, drawn: tuple[Tensor, Tensor], rng: torch.Generator) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.low_precision, cache_enabled=False):
            loss, score = step_loss(self.model, self.plan, drawn, rng)
        loss.backward()
        return loss.detach(), score


class Replayed(Learner):
    """The same on a GPU, recorded once and replayed: its thousands of small kernels take longer to launch than to run.

    Prompts are drawn by the GPU's own generator, so a run that was interrupted ends alike, not with the same bits.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, step: int, drawn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if self.graph is None:
            self.record(drawn)
        for mine, given in zip(self.drawn, drawn, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return tuple(part.clone() for part in self.found)

    def record(self, drawn: tuple[Tensor, Tensor]) -> None:
        """Three steps to warm up on a stream of their own, then one that is recorded; none of them changes weights."""
        self.drawn = tuple(part.to(self.device) for part in drawn)
        rng, side = torch.cuda.default_generators[torch.cuda.current_device()], torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.learn(self.drawn, rng)
                self.model.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.found = self.learn(self.drawn, rng)


def pretrain(
    plan: Plan,
    folder: Path,
    minutes: float | None = None,
    device: str = "cpu",
    low_precision: bool | None = None,
    workers: int = 0,
) -> SmallSam:
    """Train for the plan's steps, or for so many minutes; goes on from folder/state.pt where that is there.

    low_precision  bfloat16; if nothing is said, on a GPU and where it was timed to be faster
    workers        processes that draw scenes ahead

    Writes folder/log.jsonl (one line every 20 steps) and state.pt. Returns the moving average of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)
    model, average = SmallSam().to(device), SmallSam().to(device).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    on_gpu = device != "cpu"
    optimiser = AdamW(model.parameters(), plan.rate, betas=(0.9, 0.98), weight_decay=plan.decay, fused=on_gpu)
    first, seconds, path = 0, 0.0, folder / "state.pt"
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        first, seconds = state["step"], state["seconds"]
    if first >= plan.steps:
        return average
    began = saved = time.monotonic()
    spent = lambda: seconds + time.monotonic() - began  # noqa: E731
    losses, scores = [], []
    low_precision = on_gpu or _bfloat16_pays() if low_precision is None else low_precision
    learn = (Replayed if on_gpu else Learner)(model, plan, device, low_precision)
    bar = tqdm(drawing(plan, first, workers), initial=first, total=plan.steps, mininterval=30)
    for step, drawn in enumerate(bar, start=first):
        for group in optimiser.param_groups:
            group["lr"] = plan.rate_at(step)
        loss, score = learn(step, drawn)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        follow(average, model, min(plan.average, (step + 1) / (step + 10)))
        losses.append(loss)
        scores.append(score)
        late = minutes is not None and time.monotonic() - began > 60 * minutes
        if len(losses) == LOGGED:
            means = {"loss": torch.stack(losses).mean().item(), "iou": torch.stack(scores).mean().item()}
            with (folder / "log.jsonl").open("a") as log:
                line = {"step": step + 1, **{k: round(v, 4) for k, v in means.items()}, "seconds": round(spent())}
                log.write(json.dumps(line) + "\n")
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
    parser.add_argument("--plan", choices=PLANS, default="laptop")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int, help="another number of steps than the plan's")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    plan = PLANS[args.plan] if args.steps is None else replace(PLANS[args.plan], steps=args.steps)
    workers = 0 if args.device == "cpu" else max(1, (os.cpu_count() or 1) - 1)
    pretrain(plan, args.out, args.minutes, args.device, workers=workers)


if __name__ == "__main__":
    main()
