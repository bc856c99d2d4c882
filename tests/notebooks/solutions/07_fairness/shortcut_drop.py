def shortcut_drop(plain, drained, ill):
    """(AUC with drains, AUC without, the drop): scores of images as they are and with a drain, and who is ill."""
    plain, drained, ill = np.asarray(plain, float), np.asarray(drained, float), np.asarray(ill, bool)

    def auc(positive):
        difference = positive[:, None] - plain[~ill][None]
        return np.mean((difference > 0) + 0.5 * (difference == 0))

    with_drain, without = auc(drained[ill]), auc(plain[ill])
    return with_drain, without, with_drain - without
