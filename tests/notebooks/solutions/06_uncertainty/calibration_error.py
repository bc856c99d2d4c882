def calibration_error(confidence, right, bins):
    """Mean gap between confidence and accuracy over `bins` bins of equal width, weighted by their pixels."""
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        (place == k).mean() * abs(confidence[place == k].mean() - right[place == k].mean()) for k in np.unique(place)
    ]
    return sum(gaps)
