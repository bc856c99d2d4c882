def overlap(corner, corners, side):
    """Which share of its area a square at `corner` (row, column) has in common with each of those at (N, 2)."""
    sides = np.clip(side - np.abs(np.asarray(corners) - np.asarray(corner)), 0, None)
    return sides.prod(1) / side**2
