"""Deliberate errors in recipes of `data_loading`."""

ERRORS = {
    "_decathlon": [
        (".max() / shape.max()", ".max() / shape.min()"),
        ("min(1.0, found * MARGIN)", "min(1.0, found / MARGIN)"),
        ('hearts if name == "acdc" else replace(hearts, centre="image")', "hearts"),
    ],
    "_ranking": [
        ('alternative="greater"', 'alternative="two-sided"'),
        ('method="min"', 'method="average"'),
        ("total += int(metrics.surface(one).sum() + metrics.surface(other).sum())", "pass"),
        ('["mean"].reindex(known.index)', '["mean"].to_numpy()'),
    ],
    "msd": [
        ("labels = renumbered(labelled.labels[mine], sum(self.structures[:number]))", "labels = labelled.labels[mine]"),
        ('nets["average"][number](images)', 'nets["average"][0](images)'),
        ("if own in case.attributes", "if True or own in case.attributes"),
        ("if name in KNOWN else", "if name not in KNOWN else"),
    ],
    "leakage": [
        ("return order[side::2]", "return order[::2]"),
        ("_halved(self.dataset, 1), self.preparation", "_halved(self.dataset, 0), self.preparation"),
    ],
}
TESTED_BY = {"_decathlon": "msd", "_ranking": "msd"}
"""Whose tests notice, where these are not in a file of the same name."""
