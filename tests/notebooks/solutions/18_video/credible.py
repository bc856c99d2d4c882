def credible(good, level, window):
    for start in range(len(good) - window + 1):
        part = good[start : start + window]
        if (part > level).all():
            return start + int(part.argmax())
    return None
