def impurity(labels, classes, radius):
    """(H, W): entropy (natural logarithm) of the classes within `radius` rows and columns of each pixel of (H, W)."""
    found = np.zeros(labels.shape)
    for row, column in np.ndindex(labels.shape):
        patch = labels[max(0, row - radius) : row + radius + 1, max(0, column - radius) : column + radius + 1]
        share = np.bincount(patch.ravel(), minlength=classes) / patch.size
        share = share[share > 0]
        found[row, column] = -np.sum(share * np.log(share))
    return found
