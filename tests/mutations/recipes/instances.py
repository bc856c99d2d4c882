"""Deliberate errors in recipes of `instances`."""

ERRORS = {
    "_glass": [
        ("mask = largest_part(label > 0)", "mask = label > 0"),
        ("(mask & beyond, gap / 2)", "(mask & beyond, -gap / 2)"),
        ("(piece.label > 0) & (sections[here] == 0)", "(piece.label > 0)"),
        ("[*range(len(found)), *range(len(found) - 2, 0, -1)]", "[*range(len(found))]"),
        ("amounts[0] * (0.1 + dark)", "amounts[0] * (0.1 + grey)"),
    ],
    "_slides": [
        ("labels % CLASSES, labels // CLASSES", "labels // CLASSES, labels % CLASSES"),
        ("kinds, sections = (torch.full_like(part, IGNORE)", "kinds, _ = (torch.full_like(part, IGNORE)"),
    ],
    "slidesegmenter": [
        ("return np.argwhere(mask) - distance", "return np.argwhere(mask) + distance"),
        ("highest & (counts > np.percentile(counts, percentile))", "highest & (counts > 0)"),
        ("* tissue.sigmoid()[:, None] * self.distance", "* self.distance"),
        ("+ divergence(error).square().mean()", ""),
        ("labelled.raters is None", "True"),
    ],
    "co_seg": [
        ('"mutual": (INSTANCE, SEMANTIC)', '"mutual": (SEMANTIC, INSTANCE)'),
        ("range(1 if shared else 2)", "range(1)"),
        ("told(first.instance)", "first.instance"),
        ("(a.exp() - b.exp()) * (a - b)", "a.exp() * (a - b)"),
        ("return late / 2 + done", "return late + done"),
        ("np.where(kinds == value, instances, 0)", "np.where(kinds == value, 1, 0)"),
    ],
    "_prompted": [
        ("x = x + self.image(x, self.scan(read), size)", "x = x + self.image(x, read, size)"),
        ("rows, columns = lines[0].repeat_interleave", "rows, columns = 0 * lines[0].repeat_interleave"),
        ("self.tokens[int(second)]", "self.tokens[0]"),
        ("embedding + prompt, codes", "embedding, codes"),
    ],
    "_centroids": [
        ("mine / -low.clamp_max(-1e-3)", "mine / high.clamp_min(1e-3)"),
        ("torch.stack([down, down.T])", "torch.stack([down.T, down])"),
        ("((high - change)", "((change - low)"),
        ("found += mine * (places - centroid)", "found += mine * (centroid - places)"),
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
    "_centroids": "co_seg",
    "_prompted": "co_seg",
}
"""Whose tests notice, where these are not in a file of the same name."""
