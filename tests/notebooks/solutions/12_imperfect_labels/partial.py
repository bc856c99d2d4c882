def partial(probabilities, scribble):
    """Cross-entropy of (classes, H, W) and a scribble (H, W): the mean over drawn pixels, 0 if none; 255 is undrawn."""
    rows, columns = np.nonzero(scribble != 255)
    if not len(rows):
        return 0.0
    return -np.log(probabilities[scribble[rows, columns], rows, columns]).mean()
