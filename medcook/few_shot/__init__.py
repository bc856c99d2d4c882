"""Few-shot segmentation: structures hidden in training, supports by draw, and the chapter's baselines."""

from medcook.few_shot.baselines import FineTuning, LocalPrototypes, PrototypeNetwork
from medcook.few_shot.method import FewShot, Shots
from medcook.few_shot.scoring import novel_dice
from medcook.few_shot.task import FewShotTask, chunks

__all__ = [
    "FewShot",
    "FewShotTask",
    "FineTuning",
    "LocalPrototypes",
    "PrototypeNetwork",
    "Shots",
    "chunks",
    "novel_dice",
]
