"""Deliberate errors in recipes of `instances`."""

ERRORS = {
    "_glass": [
        ("mask = largest_part(label > 0)", "mask = label > 0"),
        ("(mask & beyond, gap / 2)", "(mask & beyond, -gap / 2)"),
        ("fresh = mask & ~taken[here]", "fresh = mask"),
        ("order = [*range(len(found)), *range(len(found) - 2, 0, -1)]", "order = [*range(len(found))]"),
        ("amounts[0] * (0.1 + dark)", "amounts[0] * (0.1 + grey)"),
    ],
    "_slides": [
        ("labels % CLASSES, labels // CLASSES", "labels // CLASSES, labels % CLASSES"),
        ("kinds, sections = (torch.full_like(part, IGNORE)", "kinds, _ = (torch.full_like(part, IGNORE)"),
    ],
    "slidesegmenter": [
        ("found += mine * (places - centroid)", "found += mine * (centroid - places)"),
        ("return np.argwhere(mask) - distance", "return np.argwhere(mask) + distance"),
        ("highest & (counts > np.percentile(counts, percentile))", "highest & (counts > 0)"),
        ("* tissue.sigmoid()[:, None] * self.distance", "* self.distance"),
        ("+ divergence(error).square().mean()", ""),
        ("labelled.raters is None", "True"),
    ],
    "_parts": [
        ("large[0] = False", "pass"),
        ("np.hypot(*distance) * mask", "np.hypot(*distance) * (1 - mask)"),
    ],
}
TESTED_BY = {
    "_glass": "slides",
    "_slides": "slides",
    "_parts": "slidesegmenter",
}
"""Whose tests notice, where these are not in a file of the same name."""
