def combine(first, second):
    """The one step (decay, gain) that does what `first` and then `second` do; a step is h -> decay * h + gain."""
    return first[0] * second[0], second[0] * first[1] + second[1]
