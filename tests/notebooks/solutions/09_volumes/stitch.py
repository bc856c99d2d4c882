def stitch(parts, starts, depth):
    """Probabilities (depth, H, W): the mean of all slabs that contain a slice; slab k begins at slice starts[k]."""
    total, count = np.zeros((depth, *parts[0].shape[1:])), np.zeros((depth, 1, 1))
    for part, start in zip(parts, starts, strict=True):
        total[start : start + len(part)] += part
        count[start : start + len(part)] += 1
    return total / count
