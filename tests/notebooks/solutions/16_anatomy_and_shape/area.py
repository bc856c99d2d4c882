def area(points):
    """The area inside a closed contour of points (N, 2), in squares of their unit."""
    after = np.roll(points, -1, axis=0)
    return abs(np.sum(points[:, 0] * after[:, 1] - points[:, 1] * after[:, 0])) / 2
