def equity_scaled(values, groups):
    """(by the sum, by the spread): both equity-scaled means of values, one a patient, with their groups."""
    values, groups = np.asarray(values, float), np.asarray(groups)
    overall = values.mean()
    means = np.array([values[groups == name].mean() for name in np.unique(groups)])
    return overall / (1 + np.abs(means - overall).sum()), overall / (1 + means.std(ddof=1))
