def to_unit(hounsfield, level, width):
    """Hounsfield units to 0..1: `level` becomes 0.5, and `width` HU around it fill the range."""
    return np.clip((hounsfield - level) / width + 0.5, 0, 1)
