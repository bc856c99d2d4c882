"""Deliberate errors in recipes of `video`."""

ERRORS = {
    "_flights": [
        ("1 - leg(frames - inwards, rng)", "leg(frames - inwards, rng)"),
        ("torch.lerp(images[low], images[high], share[:, None, None])", "images[low]"),
        ("nearest = labels[torch.from_numpy(np.rint(places)).long()]", "nearest = labels[low]"),
        ("frame + 0.85 * strength * (0.8 - frame)", "frame + 0.85 * strength * 0.8"),
        ("rng.poisson(many * frames / 100)", "rng.poisson(many)"),
        ("image.swapaxes(2, 3)[:, :, ::-1]", "image.swapaxes(2, 3)"),
        ("rng.spawn(1)[0])[:, 0]", "rng)[:, 0]"),
    ],
    "_procedures": [
        ("(np.arange(len(found)) < first) & (found > FAR_END)", "found > FAR_END"),
        ("found[: there[0]], found[there[-1] + 1 :] = OUTSIDE, FAR_END", "pass"),
        ("if video not in {*tested[k], *val}]", "if video not in tested[k]]"),
        ("((2, 3), 0, 1)", "((2, 3), 1, 0)"),
        ("f1[there].mean()", "f1.mean()"),
        ("(jaccard * sizes).sum() / sizes.sum()", "jaccard.mean()"),
    ],
    "_ms_tcn": [
        ("stage(found[-1].softmax(1))", "stage(found[-1])"),
        (".clamp_max(SUDDEN**2)", ""),
    ],
    "_frames": [("self.pool = pool_slices", "pass")],
    "colontcn": [
        ("return F.relu(x + self.convolve(x))", "return F.relu(self.convolve(x))"),
        ("2**k if dilated else 1, dropout", "1, dropout"),
        ("return self.counts.sum() / self.counts", "return torch.ones_like(self.counts)"),
        ("        self.eval()\n", ""),
        ("if number not in self.kept:", "if True:"),
    ],
}
TESTED_BY = {
    "_flights": "flights",
    "_procedures": "procedures",
    "_ms_tcn": "colontcn",
    "_frames": "colontcn",
}
"""Whose tests notice, where these are not in a file of the same name."""
