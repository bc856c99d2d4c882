def rescaled(weight, scale, shift):
    """The weight with its largest singular values scaled and shifted."""
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    values[: len(scale)] = scale * values[: len(scale)] + shift
    return (left * values) @ right
