"""Deliberate errors in recipes of `domain_shift`."""

ERRORS = {
    "ct_mr_prior": [
        (
            'self.structure * self.segmentation(frozen(nets["model"], made), labels)',
            'self.structure * self.segmentation(frozen(nets["model"], made.detach()), labels)',
        ),
        ("* cycles + sum(games)", "* cycles + games[1]"),
    ],
    "frd": [
        ("for root in roots) - 2 * shared)", "for root in roots) - shared)"),
        ("scores.mean() + NORMAL_95 * scores.std()", "scores.mean() + scores.std()"),
    ],
    "_radiomics": [
        ("high = COIFLET[::-1] * (-1.0) ** np.arange(1, 7)", "high = COIFLET * (-1.0) ** np.arange(1, 7)"),
        ("(pairs + pairs.T) / (2 * pairs.sum())", "pairs / pairs.sum()"),
    ],
    "sfda": [
        ('with forgetful(nets["ended"]):', "if True:"),
        ("if self.keeps:", "if True:"),
    ],
    "mrsegmentator": [
        ("fitted.predict(as_shown(case, look))", "fitted.predict(case)"),
        ("return torch.where(there[0] | there[1], truth, proposed)", "return torch.where(there[0], truth, proposed)"),
        ('nets["annotations"].known(index) | (dice', "(dice"),
    ],
    "graphecho": [
        ("here, there = torch.isin(kinds, others), torch.isin(others, kinds)", "here, there = kinds >= 0, others >= 0"),
        ("plan.masked_fill(~same, 0).amax(1)", "plan.amax(1)"),
    ],
}
TESTED_BY = {
    "_radiomics": "radiomics",
}
"""Whose tests notice, where these are not in a file of the same name."""
