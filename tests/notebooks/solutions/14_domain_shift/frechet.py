def frechet(a, b):
    """Fréchet distance, squared, between sets of features (images, features), each taken for a Gaussian."""
    first, second = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(first @ second).real
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(first + second - 2 * root))
