def followed(found, truth):
    both, either = (found & truth).sum((1, 2)), (found | truth).sum((1, 2))
    return np.where(either > 0, both / np.maximum(either, 1), 1.0).mean()
