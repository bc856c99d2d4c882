def slabs(depth, size, step):
    """First slices of slabs of `size` slices, `step` apart, that cover 0 .. depth - 1; the last slab ends at depth."""
    starts = list(range(0, depth - size, step))
    return [*starts, depth - size]
