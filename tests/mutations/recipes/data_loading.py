"""Deliberate errors in recipes of `data_loading`."""

ERRORS = {
    "leakage": [
        ("return order[side::2]", "return order[::2]"),
        ("_halved(self.dataset, 1), self.preparation", "_halved(self.dataset, 0), self.preparation"),
    ],
}
