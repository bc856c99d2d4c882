"""From a manifest to cases: fetching, checking, reading, splitting, transforming."""

from medcook.data.case import IGNORE, Case
from medcook.data.datasets import Dataset, open_dataset

__all__ = ["IGNORE", "Case", "Dataset", "open_dataset"]
