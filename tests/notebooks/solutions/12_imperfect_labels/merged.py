def merged(masks, weights):
    """One mask (H, W) bool of (annotators, H, W): True where those who drew have more than half of all weight."""
    return np.tensordot(weights, masks, 1) > weights.sum() / 2
