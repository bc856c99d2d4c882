def clicks_needed(curves, goal):
    """Mean number of clicks to a Dice of `goal`; curves (images, clicks): Dice after 1, 2, ... clicks; never: all."""
    reached = curves >= goal
    return np.where(reached.any(1), reached.argmax(1) + 1, curves.shape[1]).mean()
