def next_click(answer, truth):
    """(row, column, on the object?) deepest inside the largest connected error."""
    best, found = 0, None
    for error, on_object in ((truth & ~answer, True), (answer & ~truth, False)):
        pieces, count = ndimage.label(error)
        for number in range(1, count + 1):
            piece = pieces == number
            if piece.sum() > best:
                depth = ndimage.distance_transform_edt(np.pad(piece, 1))[1:-1, 1:-1]
                best, found = piece.sum(), (*np.unravel_index(depth.argmax(), depth.shape), on_object)
    return found
