def overlooked(kernel, dilations):
    return 1 + (kernel - 1) * sum(dilations)
