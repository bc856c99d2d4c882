"""Deliberate errors in recipes of `volumes`."""

ERRORS = {
    "stu_net": [
        ("+ self.shortcut(x))", ")"),
        (
            'own[name] if name.startswith("head.") else known[name]',
            "known[name] if known[name].shape == own[name].shape else own[name]",
        ),
        (', mode="nearest")', ', mode="trilinear")'),
    ],
    "cads": [
        (
            "told, truth = (only | ~known)[:, 1:], only[:, 1:]",
            "told, truth = torch.ones_like(known)[:, 1:], only[:, 1:]",
        ),
        ("among = probabilities * known", "among = probabilities"),
    ],
    "totalsegmentator": [
        ("found = measures(case, fitted.predict(case), structures)", "found = measures(case, case.label, structures)"),
        ("(known == value).mean() / 2", "(known == value).mean()"),
    ],
    "study_2_5d": [
        ("return views.mean(0).clamp_min(1e-12).log()", "return views[0].clamp_min(1e-12).log()"),
        (
            "super().features(neighbours(image, self.count))",
            "super().features(neighbours(image, 1).repeat(1, self.count, 1, 1, 1))",
        ),
    ],
    "h_denseunet": [
        ("scores.float().softmax(1).to(volume.dtype)", "scores.to(volume.dtype)"),
        ("self.fusion(self.inter(known) + within)", "self.fusion(self.inter(known))"),
    ],
    "_slices": [("(places + step).clamp(0, last)", "(places + step) % (last + 1)")],
    "d_former": [
        (
            "pairs = zip(sides, counts, strict=True) if dilated else zip(counts, sides, strict=True)",
            "pairs = zip(counts, sides, strict=True)",
        ),
        ("seen = None if real.all() else real[:, None, None].repeat(batch, 1, 1, 1)", "seen = None"),
        ("return x + self.convolution(x.float().movedim(-1, 1)).movedim(1, -1)", "return x"),
        ("return super().forward(x.to(torch.promote_types(x.dtype, torch.float32)))", "return super().forward(x)"),
        ("[1 - foreground] + others * [foreground / others]", "others * [foreground / others] + [1 - foreground]"),
    ],
    "cross_d_conv": [
        (
            "return -angle * torch.linalg.cross(axis, torch.ones_like(axis))",
            "return angle * torch.linalg.cross(axis, torch.ones_like(axis))",
        ),
        ("self.rotation(x)))[:, :, side // 2]", "self.rotation(x)))[:, :, 0]"),
    ],
    "mediastinal_ln": [
        ("margin = images.shape[-1], (thickness - stride) // 2", "margin = images.shape[-1], 0"),
        ("return probabilities.mean(0)", "return probabilities[0]"),
    ],
    "_head_and_neck": [
        ("organs = ((case.label > 0) & (label == 0)).astype(np.uint8)", "organs = (case.label > 0).astype(np.uint8)"),
    ],
    "deeporgan": [
        ("density = logits.detach().softmax(1)", "density = logits.softmax(1)"),
        (".softmax(2).mean(0)", ".softmax(2)[0]"),
        ("/ SIDE * scale", "/ SIDE"),
    ],
    "mpu_net": [
        ("self.level(level) + self.below(below)", "self.level(level)"),
        ("missed * (there - hits) + 1)", "missed * (found - hits) + 1)"),
        ("matches.softmax(-1) @", "matches.softmax(-2) @"),
    ],
}
TESTED_BY = {
    "_slices": "study_2_5d",
    "_head_and_neck": "mediastinal_ln",
}
"""Whose tests notice, where these are not in a file of the same name."""
