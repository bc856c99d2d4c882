def ratio(probabilities, prior):
    """Kullback-Leibler divergence (natural logarithm) of the mean class ratios of (classes, H, W) from a prior."""
    mean = probabilities.mean((1, 2))
    there = mean > 0
    return float(np.sum(mean[there] * np.log(mean[there] / prior[there])))
