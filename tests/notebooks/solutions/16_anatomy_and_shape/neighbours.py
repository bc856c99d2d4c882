def neighbours(features, adjacency):
    """The mean of each node's neighbours: features (nodes, channels), adjacency (nodes, nodes) of zeros and ones."""
    counts = adjacency.sum(1, keepdims=True)
    return adjacency @ features / np.maximum(counts, 1)
