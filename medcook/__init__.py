"""medcook: a Jupyter-first teaching and reproducibility cookbook for medical image segmentation."""

__version__ = "0.1.0"
