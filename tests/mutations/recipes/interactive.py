"""Deliberate errors in recipes of `interactive`."""

ERRORS = {
    "interactive_fcn": [
        ("chance = (depth - most).exp() - (-most).exp()", "chance = (depth > 0).double()"),
        ("truth, known, pick=deep_pixels)", "truth, pick=deep_pixels)"),
    ],
    "interformer": [
        ("seen = [grid + local(grid) for", "seen = [grid for"),
        ("y = self.third(y, y)", "y = self.third(y, deep)"),
    ],
    "nuclick": [
        ("torch.where(others, 2.0, 1.0))", "1.0)"),
        ("(label != IGNORE) & ~mine].unique()", "(label != IGNORE)].unique()"),
    ],
    "sdl_seg": [
        ("return gaussians(markers, self.sigma)", "return markers.float()"),
        ("torch.manual_seed(zlib.crc32(case.case_id.encode()))", "pass"),
    ],
    "scribbleprompt": [
        ("self.made(kind, ~mask & sure, whole(0, MOST))", "self.made(kind, ~mask, whole(0, MOST))"),
        ("else broken(sort(mask))", "else sort(mask)"),
    ],
    "_asking": [
        ("target[number], values[-1] = self.piece(image[0]).to(target.device), 0", "values[-1] = 0"),
    ],
    "imis_bench": [
        ('if kind != "name" or value)', "if True)"),
        ("count - len(kinds) + 1 for count in (3, 5)", "count for count in (3, 5)"),
    ],
    "prism": [
        ("confidence.argmax(1)", "confidence.argmin(1)"),
        ("self.error(x).float() * self.correction(x).float()", "self.correction(x).float()"),
    ],
}
TESTED_BY = {
    "_asking": "scribbleprompt",
}
"""Whose tests notice, where these are not in a file of the same name."""
