"""Deliberate errors in recipes of `imperfect_labels`."""

ERRORS = {
    "spatial_noise": [
        ("trace = squared(spread, rho, rho**2) / sigma**2", "trace = squared(spread, rho, rho) / sigma**2"),
        ("offset = -back @ grid.mean", "offset = back @ grid.mean"),
        ("others - own)", "own - others)"),
    ],
    "adele": [
        ("(present & open_to).gather", "open_to.expand_as(present).gather"),
        ("np.geomspace(1, 0.1, len(curve))", "np.geomspace(0.1, 1, len(curve))"),
        ("mean.flatten(1).amax(1).exp() >= agreed", "mean.flatten(1).amax(1).exp() >= 0"),
    ],
    "ripu": [
        ('{"ripu": impurity * uncertainty,', '{"ripu": impurity,'),
        ("return squares * begun // len(self.rounds)", "return squares"),
        ("return torch.where(known, target.labels, IGNORE)", "return target.labels"),
    ],
    "scribble_aag": [
        ("features * attention[:, 1:].sum(1, keepdim=True)", "features * attention.sum(1, keepdim=True)"),
        ('nets["judge"](detached(seen))', 'nets["judge"](seen)'),
    ],
    "_adversarial": [
        ("{name: weight.detach() for name, weight", "{name: weight for name, weight"),
        ("(fake.float() + 1).square()", "fake.float().square()"),
    ],
    "ael_noisy_pseudo": [
        ("return self.head(features * weights)", "return self.head(features)"),
        ("weights = certainty(told) if self.weighted", "weights = torch.ones_like(told[:, 0]) if self.weighted"),
    ],
    "citizen_science": [
        ("judge(torch.cat([real, fake.detach()]))", "judge(torch.cat([real, fake]))"),
        ("frozen(judge, fake)", "judge(fake)"),
        ("labels = torch.cat([labels, masks])", "labels = torch.cat([labels, labels[: len(masks)]])"),
    ],
}
TESTED_BY = {
    "_adversarial": "scribble_aag",
}
"""Whose tests notice, where these are not in a file of the same name."""
