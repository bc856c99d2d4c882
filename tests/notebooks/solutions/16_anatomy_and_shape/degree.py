def degree(radii):
    """The share of the diameter that is gone at the tightest place, of the mean of the widest before and after it."""
    at = radii.argmin()
    before, after = radii[: at + 1].max(), radii[at:].max()
    return 1 - 2 * radii[at] / (before + after)
