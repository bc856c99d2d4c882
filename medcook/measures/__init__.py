"""Measures beyond overlap: calibration, disagreement, selection, detection, fairness."""
