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
    "_tracker": [
        ("bank.there.any(1)[:, None, None, None], self.memory(deep, bank), deep)", "bank.there.any(), deep, deep)"),
        ("return (self.logits > 0) & (self.presence > 0)[:, None, None]", "return self.logits > 0"),
        ("first + RECENT + now - 1 - back", "first + RECENT + now - back"),
        ("(recent < keep[1]).cumprod(-1).bool()", "recent < keep[1]"),
        ("there.float() * there.any(1, keepdim=True)", "0 * there.float()"),
        ("torch.where(nothing, 1.0, contour)", "contour"),
        ("torch.where(either > 0, both / either.clamp_min(1), 1.0)", "both / either.clamp_min(1)"),
    ],
    "_following": [
        ("shown_in(label) or tuple", "() or tuple"),
        ("found.clamp_max(0.49)", "found"),
    ],
    "_referring": [
        ("self.scans[1](normed.flip(1)).flip(1)", "self.scans[1](normed)"),
        ("words * ~empty[..., None]", "words"),
        ("return self.answer(maps, words=heard, added=added)", "return self.answer(maps, words=heard)"),
    ],
    "resurgsam2": [
        ("last[-1][0] - last[0][0] != window - 1", "False"),
        ("max(last, key=lambda one: one[1])[0]", "last[-1][0]"),
        (".sum((1, 2)).argmin())", ".sum((1, 2)).argmax())"),
        ("self.looks[self.long[-1] if self.long else self.first]", "self.looks[self.first]"),
        ("            self.pool.clear()\n", "            pass\n"),
        ("[None if k in recent else k for k in self.long]", "list(self.long)"),
        ("if self.method.diverse and expected > KEEP:", "if self.method.diverse:"),
        ("(places - back).clamp_min(run)", "places"),
    ],
    "_prompted": [
        ("torch.where(there[:, None], 1, PADDING)", "torch.where(there[:, None], 1, 1)"),
        ('if role == "labelled" and self.learnt_on:', "if False:"),
        ("kinds = torch.randint(len(KINDS), (len(masks) // each,)).repeat_interleave(each)", "kinds = 0"),
    ],
    "sam2_robotic": [
        ("prompts[first : first + 1 if memory else None] = only", "prompts[first:] = only"),
        ("there[:, 1:] &= places[:, 1:] > firsts[:, None]", "pass"),
        ("found.masks & (firsts <= number)[:, None, None]", "found.masks"),
        ("STRENGTHS[kind][severity - 1]", "STRENGTHS[kind][0]"),
        ("for severity in SEVERITIES])) - values[column]", "for severity in SEVERITIES]))"),
        ("frames = [k for k in range(first, len(truth)) if truth[k].any()]", "frames = list(range(len(truth)))"),
        ("following.taken(labelled.labels, clip))", "following.taken(labelled.labels, clip * 0))"),
    ],
}
TESTED_BY = {
    "_flights": "flights",
    "_procedures": "procedures",
    "_ms_tcn": "colontcn",
    "_frames": "colontcn",
    "_tracker": "tracker",
    "_following": "following",
    "_referring": "resurgsam2",
    "_prompted": "sam2_robotic",
}
"""Whose tests notice, where these are not in a file of the same name."""
