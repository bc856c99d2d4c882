def promise(losses, alpha):
    """Position of the first lambda that keeps the promise, or None; losses (cases, lambdas) fall along a row."""
    enough = (losses.sum(0) + 1) / (len(losses) + 1) <= alpha + 1e-12
    return int(enough.argmax()) if enough.any() else None
