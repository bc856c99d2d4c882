def luck(dice, gain):
    """The share of pairs of supports whose mean Dice differs by at least `gain`; dice (supports, patients)."""
    means = dice.mean(1)
    first, second = np.triu_indices(len(means), 1)
    return (np.abs(means[first] - means[second]) >= gain).mean()
