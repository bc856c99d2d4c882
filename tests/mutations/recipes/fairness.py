"""Deliberate errors in recipes of `fairness`."""

ERRORS = {
    "fairseg": [
        ("return weights * self.seen.sum() / (weights * self.seen).sum()", "return weights"),
        ("bound[known].min() / bound) ** gamma", "bound[known].max() / bound) ** gamma"),
        ("said = said * factors", "said = said / factors"),
    ],
}
