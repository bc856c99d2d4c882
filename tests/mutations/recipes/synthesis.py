"""Deliberate errors in recipes of `synthesis`."""

ERRORS = {
    "seg2med": [
        ("structures if self.told else torch.zeros_like(structures)", "structures"),
        ("F.avg_pool2d(images[:, :1].float(), COARSE)", "images[:, :1].float()"),
    ],
    "roentgen": [
        ("finding = (numbers % 2).to(torch.uint8)", "finding = (numbers % 3 % 2).to(torch.uint8)"),
    ],
    "medsyn": [("maps = enlarged(spoilt(low))", "maps = enlarged(low)")],
    "_denoiser": [("return without + guidance * (told - without)", "return told")],
    "bs_diff": [
        ("torch.cat([generator.make(xrays, self.calls), soft], dim=1)", "torch.cat([xrays, soft], dim=1)"),
        ("return images + unfolded(", "return unfolded("),
    ],
    "_bones": [
        (
            "return lambda x, t: xrays + net(x, t, maps=xrays).float()",
            "return lambda x, t: xrays + net(x, t, maps=0 * xrays).float()",
        )
    ],
    "bs_ldm": [
        ("*like.shape[:2], 1, 1,", "*like.shape,"),
        ("return FIRST + RATE * (DIFFUSION.times - 1 - t)", "return FIRST + RATE * t"),
        ("rare = self.taken < self.least", "rare = self.taken < 0"),
    ],
    "gl_lcm": [
        ("return skip * noisy + out * clean", "return clean"),
        ("residual = steepness(local - whole, inside, inside)", "residual = steepness(local, inside, inside)"),
        ("r = (t - SKIP).clamp_min(0)", "r = t"),
    ],
    "lefusion": [
        ("masks if focused else None", "None"),
        ("net(torch.where(masks > 0, x, context), t)", "net(x, t)"),
    ],
    "_scars": [
        (
            "case = replace(case, image=scarred(case, self.wall, self.cavity).image)",
            "case = scarred(case, self.wall, self.cavity)",
        ),
        ("torch.where(target[:, 0] > 0, labels, 0)", "labels"),
    ],
    "surgical_background": [
        ("return share * front + (1 - share) * back", "return inside * front + (1 - inside) * back"),
        ("np.where(known, image - other, 0.0)", "(image - other)"),
    ],
    "_chains": [
        ("return kept * image + (1 - kept) * changed", "return changed"),
        ("below = torch.cumsum(counts, 0) - counts", "below = torch.cumsum(counts, 0)"),
    ],
    "gms": [
        ("requires_grad_(not self.frozen)", "requires_grad_(True)"),
        ("self.matching * matched + sum", "sum"),
        ("mean + sampled * deviation *", "mean + deviation *"),
        ("return mean / self.spread, deviation / self.spread", "return mean, deviation"),
    ],
    "_painting": [("structures / total.clamp_min(1)", "structures")],
    "medsegfactory": [
        ("1 - number if self.joint else number", "number"),
        ("key(own), value(own)", "key(asking), value(asking)"),
        ("value=stream) for stream", "value=0) for stream"),
        ("grey(image, image.shape[1])", "image"),
    ],
    "paxray": [
        (
            "sure = drawn.all(1)[:, None, None, None] | (nothing == 0)",
            "sure = torch.ones_like(nothing, dtype=torch.bool)",
        ),
        ("regions[view, answer - 1] if answer", "regions[view, number] if answer"),
    ],
    "_overlapping": [
        ("masks[:, [value not in drawn for value in self.values]] = IGNORE", "pass"),
        ("torch.inf).min(1)", "-torch.inf).max(1)"),
    ],
    "_regions": [("sums[image, top, left]) / (end", "0) / (end")],
    "_phrases": [("(not side or told == {side})", "(not side or side in told)")],
}
TESTED_BY = {
    "_bones": "bs_diff",
    "_chains": "surgical_background",
    "_denoiser": "roentgen",
    "_painting": "gms",
    "_scars": "scars",
    "_overlapping": "paxray",
    "_regions": "paxray",
    "_phrases": "paxray",
}
"""Whose tests notice, where these are not in a file of the same name."""
