def shifted(signal, by):
    """A periodic signal moved `by` samples to the right, which need not be a whole number; its length is odd."""
    frequency = np.fft.fftfreq(len(signal))
    return np.fft.ifft(np.fft.fft(signal) * np.exp(-2j * np.pi * frequency * by)).real
