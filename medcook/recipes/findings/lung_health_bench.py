"""AI in lung health: detection and diagnosis of nodules (Tushar, Wang, Dahal, Harowicz, Lafata, Tailor and Lo, arXiv
2405.04605, 2024).

A detector finds nodules, a classifier says which are cancer. Where shall the classifier start? Strategic warm start:
its network first tells true nodules from what the detector takes for nodules, in patches drawn evenly from what it is
sure and not so sure of, and is then tuned for cancer: it has seen the tissue that its task is about. Compared are the
same network from random weights and after self-supervision; the detector is measured by the competition performance
metric of LUNA16, with the sensitivities s at seven rates of false positives per image,

    CPM = (s(1/8) + s(1/4) + s(1/2) + s(1) + s(2) + s(4) + s(8)) / 7.

Here nodules are drawn into chest X-rays of two hospitals, one of which no training patient is from. What was looked at,
once for each arm, in a seed that is not scored and on validation images: the random start first, after 180 steps of the
detector and 180 of diagnosis, CPM 1.00 and AUC 0.70. So the detector got 120 steps, and diagnosis 300; with these, the
warm start had a CPM of 1.00 and an AUC of 0.88. The random start was not looked at again.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import Case
from medcook.data.transforms import Augment
from medcook.methods import Batch, Moment
from medcook.pretraining import Pretrained, Projector, info_nce, nothing, one_cycle
from medcook.recipes.findings import _detection as boxes
from medcook.recipes.findings._detection import RATES, Detector, Images, detection_loss, objects_of, one_kind
from medcook.recipes.findings._nodules import has_nodule, malignant, nodule_rows, patches, squares
from medcook.recipes.findings._settings import AUGMENT, NODULE_BUDGET, NODULES, NODULES_QUICK, scales
from medcook.recipes.language._reading import Reader
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sampling import once, trained

PATCH, WIDTH = 32, 64
"""Pixels of a candidate's side; numbers in which the self-supervised network compares patches."""
DETECTING = 0.6
"""Share of the steps before cancer that trains the detector: 120 of 200."""
PEAKS, SURE = 12, 3
"""Places at which the detector suspects a nodule; so many of them, the surest false ones, are their own stratum."""

Start = Literal["random", "candidates", "shuffled", "contrast"]


@torch.no_grad()
def suspected(detector: Detector, images: Tensor) -> list[Tensor]:
    """For each image the middles (N, 2) of the places that the detector is surest of, the surest first."""
    found = []
    for heat, sides in zip(*detector.eval()(images), strict=True):
        box = boxes.peaks(heat, sides, 2, PEAKS)[2]
        found.append((box[:, :2] + box[:, 2:]) / 2)
    return found


def candidates(suspicions: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number of the image (N,), place (N, 2) and whether it is a nodule (N,): four candidates of every image at most.

    Twice the nodule, moved by up to two pixels; one false suspicion of the surest `SURE`, and one of all others. A
    suspicion is false where it lies more than two pixels outside of the nodule's box.
    """
    numbers, _, true = objects_of(labels)
    rows = []
    for number, places in enumerate(suspicions):
        mine = true[numbers == number]
        for box in mine:
            middle = (box[:2] + box[2:]) / 2
            rows += [(number, middle + torch.randint(-2, 3, (2,)), True) for _ in range(2)]
        inside = (places[:, None] > mine[:, :2] - 2) & (places[:, None] < mine[:, 2:] + 2)
        false = places[~inside.all(2).any(1)]
        for stratum in (false[:SURE], false[SURE:]):
            if len(stratum):
                rows.append((number, stratum[torch.randint(len(stratum), ())], False))
    numbers, places, truth = zip(*rows, strict=True)
    return torch.tensor(numbers), torch.stack(places), torch.tensor(truth)


@dataclass
class Bench(Pretrained):
    """A detector first, candidates then, at last cancer: a patch around the nodule says whether it is malignant.

    start  what the classifier does while there are candidates: it waits (`random`), tells nodules from false suspicions
           (`candidates`), the same with the answers of a batch dealt out anew (`shuffled`), or finds which patches are
           views of the same one (`contrast`)
    """

    channels: tuple[int, ...] = (16, 32, 64, 128)
    rate: float = 1e-3
    share: float = 0.4
    augmentation: Augment = field(default_factory=lambda: AUGMENT)
    start: Start = "candidates"

    uses_unlabelled = False
    axes = 2
    trial = NODULES_QUICK

    def model(self, inputs: int, classes: int, dims: int) -> Reader:
        return Reader("random", inputs, 2, self.channels)

    def pretext_parts(self, model: Reader, inputs: int, dims: int) -> nn.ModuleDict:
        parts = {"detector": Detector(inputs, 1, (8, 16, 32, 64), 16)}
        if self.start == "contrast":
            parts["project"] = Projector(model.width, model.width, WIDTH)
        elif self.start != "random":
            parts["tell"] = nn.Linear(model.width, 2)
        return nn.ModuleDict(parts)

    def rate_at(self, now: Moment) -> float:
        """Up and down once for the detector, once with candidates, once for cancer."""
        is_pretext, then = self.phase(now)
        detecting = round(DETECTING * then.steps)
        if not is_pretext:
            return self.rate * one_cycle(*then)
        if then.step < detecting:
            return self.pretext_rate * one_cycle(then.step, detecting)
        return self.rate * one_cycle(then.step - detecting, then.steps - detecting)

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        parts = nets["pretext"]
        if now.step < round(DETECTING * now.steps):
            return detection_loss([(parts["detector"](images.images), 2)], images.labels, one_kind)
        if self.start == "random":
            return nothing()
        numbers, places, truth = candidates(suspected(parts["detector"], images.images), images.labels)
        found = squares(images.images, numbers.tolist(), places, PATCH)
        if self.start == "contrast":
            views = (parts["project"](nets["model"].features(self.view(found))) for _ in range(2))
            return info_nce(*views)
        if self.start == "shuffled":
            truth = truth[torch.randperm(len(truth))]
        return F.cross_entropy(parts["tell"](nets["model"].features(found)).float(), truth.long())

    def supervised(self, nets: nn.ModuleDict, labelled: Batch, now: Moment) -> Tensor:
        logits = nets["model"](patches(labelled.images, labelled.labels, PATCH)).float()
        return F.cross_entropy(logits, malignant(labelled.labels).long())

    def scores(self, nets: nn.ModuleDict, images: Tensor, labels: Tensor) -> Tensor:
        """(N,) probabilities that the nodule of each image is malignant."""
        return nets["average"](patches(images, labels, PATCH)).float().softmax(1)[:, 1]

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Nothing, benign, malignant, (B, 3, H, W): the detector's heat, and the diagnosis where it is surest."""
        heat = F.interpolate(nets["pretext"]["detector"](images)[0].sigmoid(), size=images.shape[2:])
        places = torch.stack([each[0] for each in suspected(nets["pretext"]["detector"], images)])
        found = nets["average"](squares(images, range(len(images)), places, PATCH)).float().softmax(1)
        return torch.cat([1 - heat, heat * found[:, :, None, None]], 1)


def detected(detector: Detector, images: Tensor, labels: Tensor) -> Images:
    """What the detector finds in each image (N, C, H, W), and the true boxes of its label map (N, H, W)."""
    found = []
    for part, truth in zip(images.split(16), labels.split(16), strict=True):
        for heat, sides, label in zip(*detector(part), truth, strict=True):
            found.append((boxes.detections(heat, sides, 2)[0], boxes.true_boxes(label, one_kind, 1)[0]))
    return found


@torch.no_grad()
def bench_rows(fitted, case: Case) -> list[dict]:
    """`nodule_rows`, and of the detector, at levels that validation patients say are those of the seven rates:

    cpm    the share of the levels at which this nodule is found
    found, false_positives  whether it is found, and how much else, at one false positive per image
    """
    nets = trained(fitted)
    detector, val = nets["pretext"]["detector"], fitted.task.samples("val")
    levels = once(fitted, "levels", lambda: boxes.levels_at(detected(detector, val.images, val.labels)))
    images, labels = fitted.task.preparation.both(case)
    there = has_nodule(labels)
    rows = nodule_rows(fitted.method.scores(nets, images, labels), case, labels)
    one = levels[RATES.index(1)]
    for number, (row, image) in enumerate(zip(rows, detected(detector, images[there], labels[there]), strict=True), 1):
        surely = sum(score >= one for score, _ in image[0])
        found = boxes.cpm([image], (one,))
        row |= {"cpm": boxes.cpm([image], levels), "found": found, "false_positives": float(surely - found)}
        row |= {"structure": "nodule", "support": float(number)}  # an AUC is that of all, not of each version
    return rows


recipe = Recipe(
    paper="lung-health-bench",
    title="AI in lung health: a warm start on what a detector suspects",
    claim="A classifier that first told nodules from a detector's false suspicions tells malignant from benign nodules "
    "better, by AUC, than the same classifier from random weights.",
    arms={
        "random": Arm(Bench(start="random")),
        "warm start": Arm(Bench()),
        "shuffled candidates": Arm(Bench(start="shuffled")),
        "self-supervised": Arm(Bench(start="contrast")),
    },
    compare=("warm start", "random"),
    ablation=("warm start", "shuffled candidates"),
    metric="auc",
    score=bench_rows,
    scales=scales(NODULES_QUICK, replace(NODULES, keep=(("site", "Shenzhen"),)), budget=NODULE_BUDGET),
    source="abstract; README and classifiers of the official code, github.com/fitushar/AI-in-Lung-Health-Benchmarking-"
    "Detection-and-Diagnostic-Models-Across-Multiple-CT-Scan-Datasets, which has no code of the warm start",
    components=(
        Component(
            "strategic warm start",
            "implemented",
            "120 steps of the detector, 80 with candidates, 300 with cancer; each image gives its nodule twice and one "
            "false suspicion of either stratum, which are ranks of one detector. All suspicions count, however low "
            "their score, as a trained detector makes few mistakes here. The published strata were not at hand. The "
            "ablation deals the answers of a batch's candidates out at random",
        ),
        Component(
            "classifiers compared",
            "simplified",
            "from random weights, warm start, and a self-supervised one, which finds views of the same candidates "
            "(SimCLR's loss) and is tuned, where FMCB's features are kept and classified. A small encoder instead of "
            "ResNet50. Models Genesis and Med3D are absent: they are weights for CT",
        ),
        Component(
            "nodule detection",
            "simplified",
            "a small detector without anchors where MONAI's RetinaNet is; every arm trains the same",
        ),
        Component(
            "competition performance metric",
            "implemented",
            "column cpm; a nodule is found where boxes overlap by a tenth of their union. The levels are those of the "
            "seven rates on validation patients. Drawn nodules are easily found: the metric is near 1",
        ),
        Component(
            "internal and external data",
            "simplified",
            "all training patients are from Shenzhen, those scored from there and from Montgomery (column group). The "
            "paper trains on one set of CTs and tests on others",
        ),
        Component(
            "Duke Lung Cancer Screening Dataset",
            "absent",
            "not at hand, nor LUNA16, LUNA25 and NLST: chest X-rays instead of CTs, nodules drawn into them",
        ),
    ),
)
