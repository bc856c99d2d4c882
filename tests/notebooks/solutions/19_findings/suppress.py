def suppress(boxes, scores, limit):
    def overlap(one, other):
        height = max(0, min(one[2], other[2]) - max(one[0], other[0]))
        width = max(0, min(one[3], other[3]) - max(one[1], other[1]))
        area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
        return height * width / (area - height * width)

    kept = []
    for number in np.argsort(-scores):
        if all(overlap(boxes[number], boxes[other]) <= limit for other in kept):
            kept.append(number)
    return kept
