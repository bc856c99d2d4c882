def receptive_field(layers):
    """Pixels of the image, in a row, that one output of the last layer sees; layers are (kernel, stride)."""
    field, step = 1, 1
    for kernel, stride in layers:
        field += (kernel - 1) * step
        step *= stride
    return field
