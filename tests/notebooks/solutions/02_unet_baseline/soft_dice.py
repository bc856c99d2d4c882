def soft_dice_of(p, g):
    """2 * sum(p * g) / (sum(p) + sum(g)), and 1.0 where both are empty."""
    total = p.sum() + g.sum()
    return 2 * (p * g).sum() / total if total else 1.0
