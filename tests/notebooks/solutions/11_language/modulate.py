def modulate(maps, scale, shift):
    return maps * (1 + scale[:, None, None]) + shift[:, None, None]
