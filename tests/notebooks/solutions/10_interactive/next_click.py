def next_click(answer, truth):
    """(row, column, belongs): the deepest pixel of the larger error, missing or too much; None where all is right."""
    missing, extra = truth & ~answer, answer & ~truth
    if not (missing | extra).any():
        return None
    belongs = missing.sum() >= extra.sum()
    depth = ndimage.distance_transform_edt(np.pad(missing if belongs else extra, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    return row, column, belongs
