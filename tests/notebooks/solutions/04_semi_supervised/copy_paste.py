def copy_paste(labelled, labels, unlabelled, pseudo, box):
    """The mixed image, its labels and their weights in the loss: three new arrays of one shape."""
    return np.where(box, labelled, unlabelled), np.where(box, labels, pseudo), np.where(box, 1.0, 0.5)
