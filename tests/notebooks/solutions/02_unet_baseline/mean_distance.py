def mean_distance(distances, missed, diagonal):
    """Mean of a list of distances in which a missed case counts as the diagonal."""
    return sum(diagonal if gone else d for d, gone in zip(distances, missed, strict=True)) / len(distances)
