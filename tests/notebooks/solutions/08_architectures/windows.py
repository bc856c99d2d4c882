def windows(image, side):
    """(C, H, W) to (windows, side * side, C): squares row by row, and so their pixels; H and W multiples of side."""
    channels, height, width = image.shape
    split = image.reshape(channels, height // side, side, width // side, side)
    return split.transpose(1, 3, 2, 4, 0).reshape(-1, side * side, channels)
