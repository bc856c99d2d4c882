"""Promptable segmentation: a small SAM of our own, the public checkpoints, prompts, and the scenes that train it."""
