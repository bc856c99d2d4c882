def xray(volume, voxel, depth):
    return 1 - np.exp(-volume.sum(axis=2) * voxel / depth)
