def dots(shape, clicks, sigma):
    """A map of (height, width): exp(-d^2 / (2 sigma^2)), d the distance to the nearest click (row, column); or 0."""
    rows, columns = np.indices(shape)
    found = np.zeros(shape)
    for row, column in clicks:
        squared = (rows - row) ** 2 + (columns - column) ** 2
        found = np.maximum(found, np.exp(-squared / (2 * sigma**2)))
    return found
