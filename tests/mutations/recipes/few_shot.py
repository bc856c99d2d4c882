"""Deliberate errors in recipes of `few_shot`."""

ERRORS = {
    "repri": [
        ("loss = loss + (1 / shots + extra) * kl(", "loss = loss + (1 / shots) * kl("),
        ("return (found * (found / wanted).log()).sum(0)", "return (wanted * (wanted / found).log()).sum(0)"),
    ],
}
