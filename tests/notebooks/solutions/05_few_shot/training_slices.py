def training_slices(labels, novel, setting):
    """Numbers of the slices that may be trained on, and their label maps, of labels (N, H, W)."""
    hidden = np.isin(labels, list(novel))
    kept = np.flatnonzero(~hidden.any((1, 2))) if setting == 2 else np.arange(len(labels))
    return kept, np.where(hidden, 0, labels)[kept]
