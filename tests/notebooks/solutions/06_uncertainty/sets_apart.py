def sets_apart(samples, raters):
    """2 E|s - y| - E|s - s'| - E|y - y'| of two sets of numbers; every pair counts, also a number with itself."""

    def apart(a, b):
        return np.abs(a[:, None] - b[None]).mean()

    return 2 * apart(samples, raters) - apart(samples, samples) - apart(raters, raters)
