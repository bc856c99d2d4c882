"""The Method contract, and the baselines that chapters share."""

from medcook.methods.classification import Classifier
from medcook.methods.co_training import CrossPseudoSupervision
from medcook.methods.consistency import FixMatch
from medcook.methods.mean_teacher import MeanTeacher, UncertaintyAwareMeanTeacher
from medcook.methods.method import Batch, Method, Moment, Supervised, follow, own_generator

__all__ = [
    "Batch",
    "Classifier",
    "CrossPseudoSupervision",
    "FixMatch",
    "MeanTeacher",
    "Method",
    "Moment",
    "Supervised",
    "UncertaintyAwareMeanTeacher",
    "follow",
    "own_generator",
]
