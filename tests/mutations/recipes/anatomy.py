"""Deliberate errors in recipes of `anatomy`."""

ERRORS = {
    "hybridgnet": [
        ("between = (step + torch.roll(step, 1, 1)) / 2", "between = (step + torch.roll(step, -1, 1)) / 2"),
        ("[x, look_up(features, places), places] if", "[x, 0 * look_up(features, places), places] if"),
    ],
    "medshapenet": [
        ("unknown[value - 1] = cut", "unknown[value - 1] = False"),
        ("2 * seen - (1 - unknown)", "2 * seen - 1"),
    ],
    "_shapes": [
        ("first = np.sqrt(first)", "first = first + 0"),
        ("found[1][:, ::-1]", "found[1]"),
    ],
    "saliency_acm": [
        ("pull + weight * (one - two) * (values - fitted)", "pull + (one - two) * (values - fitted)"),
        ("torch.where(swapped, 1 - found, found)", "found"),
    ],
}
TESTED_BY = {
    "_shapes": "medshapenet",
}
"""Whose tests notice, where these are not in a file of the same name."""
