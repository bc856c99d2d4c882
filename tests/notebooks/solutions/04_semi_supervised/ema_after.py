def ema_after(decay, steps, warm_up):
    """Share of its random start that is left in the teacher after `steps` steps."""
    share = 1.0
    for k in range(steps):
        share *= min(decay, (k + 1) / (k + 10)) if warm_up else decay
    return share
