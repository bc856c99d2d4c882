def back(noisy, noise, signal, following):
    image = (noisy - np.sqrt(1 - signal) * noise) / np.sqrt(signal)
    return np.sqrt(following) * image + np.sqrt(1 - following) * noise
