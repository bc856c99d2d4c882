def permutation_p(values, groups, times, rng):
    """p of the gap between the best and the worst group's mean, by dealing the groups out `times` times."""
    values, groups = np.asarray(values, float), np.asarray(groups)

    def gap(dealt):
        means = [values[dealt == name].mean() for name in np.unique(groups)]
        return max(means) - min(means)

    measured = gap(groups)
    reached = sum(gap(rng.permutation(groups)) >= measured - 1e-12 for _ in range(times))
    return (1 + reached) / (1 + times)
