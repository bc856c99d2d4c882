def fused(front, back, levels, highest):
    """Two images (H, W) mixed by `levels` (H, W), 0 to `highest`: which share of each pixel is the front's."""
    share = levels / highest
    return share * front + (1 - share) * back
