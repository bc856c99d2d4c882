def volume_ml(mask, spacing):
    """Volume of a boolean mask in millilitres, from the voxel sizes in mm; None where they are not known."""
    return None if spacing is None else float(mask.sum() * np.prod(spacing) / 1000)
