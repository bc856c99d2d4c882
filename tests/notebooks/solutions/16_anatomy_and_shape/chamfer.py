def chamfer(a, b):
    """Mean distance of each point to the nearest of the other set, (n, 3) and (m, 3); of both directions the mean."""
    distances = np.linalg.norm(a[:, None] - b[None], axis=2)
    return (distances.min(1).mean() + distances.min(0).mean()) / 2
