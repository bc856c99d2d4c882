"""BenchX: a unified benchmark framework for medical vision-language pretraining on chest X-rays.

Zhou, Faith, Xu, Leng, Xu, Liu and Goh, NeurIPS 2024, datasets and benchmarks (arXiv 2410.21969). What reads X-rays with
their reports was published with data, splits and fine-tuning of its own. Here all methods read the same reports with
the same encoder and as many steps, and are then tuned in one way:

  head      logits = W norm(features) + b; W starts small (truncated normal), norm standardises each image's features
  rates     the encoder's is a tenth of the head's
  choice    from the same pre-trained weights two tunings start, at two rates; the one with the higher AUC on the
            validation patients predicts. Test patients choose nothing

ConVIRT is of 2020, GLoRIA of 2021, MeDSLIP of 2024. `ConVIRT, as it was` is tuned as in its own recipe. On validation
patients, with a draw of labels that is not scored and rates that training patients chose, the AUC of ConVIRT was 0.84;
nothing else was looked at.
"""

from dataclasses import dataclass, replace

from medcook.cohorts import outcome_rows
from medcook.data import Case
from medcook.methods.method import Method
from medcook.recipes.language._bench import BRAINS, Benched, BenchTask, GLoRIA, SimCLR
from medcook.recipes.language._reading import FEW, scales
from medcook.recipes.language.convirt import ConVIRT
from medcook.recipes.language.medslip import MeDSLIP
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.sampling import trained
from medcook.tasks import Budget


@dataclass
class BenchConVIRT(Benched, ConVIRT):
    """ConVIRT under the protocol."""


@dataclass
class BenchGLoRIA(Benched, GLoRIA):
    """GLoRIA under the protocol."""


@dataclass
class BenchMeDSLIP(Benched, MeDSLIP):
    """MeDSLIP under the protocol."""


@dataclass
class BenchSimCLR(Benched, SimCLR):
    """SimCLR, which reads nothing, under the protocol."""


XRAYS = BenchTask("chest_xray", labelled=FEW, evaluation="test")


def bench_rows(fitted, case: Case) -> list[dict]:
    """As `outcome_rows`; `rate` is the head's rate that was chosen, `gain` the AUC on validation patients by which it
    was better than the other."""
    model = trained(fitted)["average"]
    values = model.values()
    chosen = {"rate": fitted.method.rates[model.best()], "gain": max(values) - min(values)}
    return [row | chosen for row in outcome_rows(fitted, case)]


def arms(start: str, suffix: str = "") -> dict[str, Arm]:
    """The arms with encoders that start from `imagenet` or `random`."""
    convirt = BenchConVIRT(start=start)
    found: dict[str, Method] = {
        "ConVIRT": convirt,
        "GLoRIA": BenchGLoRIA(start=start),
        "MeDSLIP": BenchMeDSLIP(start=start),
        "ConVIRT, as it was": replace(convirt, rates=(ConVIRT.rate,), encoder_share=1.0, standardised=False),
        "one way": replace(convirt, image_weight=1.0),
        "SimCLR": BenchSimCLR(start=start),
    }
    return {name + suffix: Arm(method) for name, method in found.items()}


LARGE, SMALL = arms("imagenet"), arms("random", ", small encoder")
FULL_ARMS = tuple(LARGE)[:4]
QUICK = scales(*FULL_ARMS, quick_arms=tuple(SMALL))["quick"]

recipe = Recipe(
    paper="benchx",
    title="BenchX: readers of reports under one protocol",
    claim="Tuned in one way, at a rate chosen on validation patients, ConVIRT of 2020 tells tuberculosis from 36 "
    "labels better than MeDSLIP of 2024, by AUC.",
    arms=LARGE | SMALL,
    compare=("ConVIRT", "MeDSLIP"),
    ablation=("ConVIRT", "ConVIRT, as it was"),
    replicate="draw",
    metric="auc",
    score=bench_rows,
    scales={
        "quick": replace(QUICK, task=BRAINS),
        "full": Scale(XRAYS, Budget(steps=400, batch=12, checks=0), arms=FULL_ARMS),
    },
    source="abstract; official code, github.com/yangzhou12/BenchX",
    components=(
        Component(
            "unified fine-tuning protocol",
            "implemented",
            "one head that standardises features and starts with small weights, a tenth of its rate for the encoder, "
            "as in the official settings; 36 labels, 120 steps for each of two rates. The ablation has none of this: "
            "one rate for all, 5e-4, and features as they are",
        ),
        Component(
            "parameter selection on validation patients",
            "implemented",
            "two rates of the head, 1e-3 and 5e-3, tuned at once; 77 patients choose by AUC, from the averages of "
            "the last quarter of the steps. Official settings have one rate for each method and set",
        ),
        Component(
            "the same data and splits",
            "implemented",
            "the reports of 340 X-rays, the same 280 steps of batches of 12 less those who choose, the same encoder, "
            "augmentation and optimiser, where published weights saw different data",
        ),
        Component(
            "nine methods",
            "simplified",
            "ConVIRT, GLoRIA and MeDSLIP, which is later than the paper's latest; `one way` (images look for texts, "
            "not the other way round) and SimCLR, which reads nothing, are arms that `full` does not run",
        ),
        Component(
            "local attention between words and places (GLoRIA)",
            "implemented",
            "as in its code, temperatures 4, 5 and 10, and the contrast of whole reports beside it; equal ones share",
        ),
        Component("segmentation, report generation, retrieval", "absent", "one classification task"),
        Component("nine data sets, MIMIC-CXR for pre-training", "absent", "they are not at hand"),
        Component("vision transformers", "absent", "one encoder for all, a SqueezeNet with ImageNet weights"),
    ),
)
