def elect(votes, size, least):
    counts = np.zeros(size)
    for row, column in votes:
        if 0 <= row < size[0] and 0 <= column < size[1]:
            counts[row, column] += 1
    framed = np.pad(counts, 1, constant_values=-1)
    around = [
        framed[1 + down : 1 + down + size[0], 1 + across : 1 + across + size[1]]
        for down in (-1, 0, 1)
        for across in (-1, 0, 1)
        if down or across
    ]
    return int(np.sum((counts > np.max(around, axis=0)) & (counts >= least)))
