def activation(maps, weights):
    found = np.maximum((weights[:, None, None] * maps).sum(0), 0)
    return found / max(found.max(), 1e-12)
