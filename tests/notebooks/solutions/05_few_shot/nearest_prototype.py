def nearest_prototype(support, mask, query):
    """(M,) bool: which query features (M, D) are more like the structure's prototype than like the background's."""

    def cosines(prototype):
        return query @ prototype / np.linalg.norm(query, axis=1) / np.linalg.norm(prototype)

    return cosines(support[mask].mean(0)) > cosines(support[~mask].mean(0))
