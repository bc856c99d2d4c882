def panoptic(found, truth):
    mine, theirs = (np.setdiff1d(part, 0) for part in (found, truth))
    if not len(mine) + len(theirs):
        return 1.0
    matched = []
    for a in mine:
        for b in theirs:
            iou = np.sum((found == a) & (truth == b)) / np.sum((found == a) | (truth == b))
            if iou > 0.5:
                matched.append(iou)
    return sum(matched) / ((len(mine) + len(theirs)) / 2)
