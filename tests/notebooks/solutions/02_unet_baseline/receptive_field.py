def receptive_field(level):
    """Side in input pixels of what a unit of this encoder level depends on."""
    side, stride = 5, 1
    for _ in range(level - 1):
        side, stride = side + stride, 2 * stride
        side += 4 * stride
    return side
