def pseudo_gain(pseudo, confidence, truth, threshold):
    """(coverage, precision): the share of pixels that are confident, and the share of these that are right, or None."""
    sure = confidence >= threshold
    return sure.mean(), (pseudo == truth)[sure].mean() if sure.any() else None
