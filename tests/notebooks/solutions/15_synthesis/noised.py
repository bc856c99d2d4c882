def noised(image, noise, signal):
    return np.sqrt(signal) * image + np.sqrt(1 - signal) * noise
