"""Deliberate errors in recipes of `uncertainty`."""

ERRORS = {
    "pulaski": [
        ("return apart - within / 2 - among / 2", "return apart - among / 2"),
        ("annotations if self.alone else annotations[:1]", "annotations"),
    ],
    "maxquery": [
        ("share = assigned[labels == value].mean(0)", "share = assigned[labels != value].mean(0)"),
        ("return -response.amax(1)", "return -response.mean(1)"),
    ],
}
