"""Deliberate errors in recipes of `anatomy`."""

ERRORS = {
    "aeropath": [
        ("seen.detach().softmax(1)], dim=1), loss", "seen.softmax(1)], dim=1), loss"),
        ("F.avg_pool2d(images, SHRINK)", "images[..., ::SHRINK, ::SHRINK]"),
        ("largest_part(guess, corners=True)", "guess"),
        ("zip(each, boxes, strict=True)", "zip(each, boxes[:1] * len(boxes), strict=True)"),
        ('planted.state != "healthy"', 'planted.state == "healthy"'),
    ],
    "hybridgnet": [
        ("between = (step + torch.roll(step, 1, 1)) / 2", "between = (step + torch.roll(step, -1, 1)) / 2"),
        ("[x, look_up(features, places), places] if", "[x, 0 * look_up(features, places), places] if"),
    ],
    "medshapenet": [
        ("unknown[value - 1] = cut", "unknown[value - 1] = False"),
        ("2 * seen - (1 - unknown)", "2 * seen - 1"),
    ],
    "_shapes": [
        ("first = np.sqrt(first)", "first = first + 0"),
        ("found[1][:, ::-1]", "found[1]"),
    ],
    "saliency_acm": [
        ("pull + weight * (one - two) * (values - fitted)", "pull + (one - two) * (values - fitted)"),
        ("torch.where(swapped, 1 - found, found)", "found"),
    ],
    "sam_vmnet": [
        ("deepest = deepest + _vmunet.added(self.told, told, deepest.shape[2:])", "deepest = deepest + 0"),
        ("encoder = Encoder() if self.sam else None", "encoder = Encoder()"),
        ("return float(2 * np.abs(depth[cells] - radius)", "return float(np.abs(depth[cells] - radius)"),
        ("_stenoses.stenoses_of(parsed(mask))", "_stenoses.stenoses_of(parsed(truth))"),
    ],
    "_vmunet": [
        ("heard = heard + scan(tokens[:, way])[:, inverse(way)]", "heard = heard + scan(tokens[:, way])"),
        ("* F.silu(gate))", "* 1.0)"),
        ("x = block(fitting(expand(x), skip.shape[1:3]) + skip)", "x = block(fitting(expand(x), skip.shape[1:3]))"),
        ("F.adaptive_max_pool2d(told, tuple(size))", "F.adaptive_avg_pool2d(told, tuple(size))"),
    ],
    "_trees": [
        ("last.radius[-1] * part ** (1 / 3)", "last.radius[-1] * part ** (1 / 2)"),
        ("(1 - degree * np.exp(-((away / width) ** 2) / 2))", "(1 - degree * np.exp(-((away / width) ** 2)))"),
        ("order = np.argsort(-values", "order = np.argsort(values"),
        ("chord = 2 * np.sqrt", "chord = np.sqrt"),
        ("points[: free(points, radius, (*tree, *beside)", "points[: free(points, radius, (*tree,)"),
    ],
    "_planted": [
        ("key = (self, case.case_id, crc32(np.ascontiguousarray(case.image)))", "key = (self, case.case_id)"),
        ('"simulated" if self.data.manifest.simulated else "real-anatomy-simulated"', '"real"'),
    ],
    "_angiograms": [
        ("shown = -(image + ", "shown = (image + "),
        ("for number in rng.permutation(fit)[: rng.integers(MOST + 1)]:", "for number in rng.permutation(fit)[:MOST]:"),
    ],
    "_centrelines": [
        ('order=1, mode="nearest") / finer', 'order=1, mode="nearest")'),
        ("return (places + 0.5) / finer - 0.5", "return places / finer"),
        ("< depth[cell] + finer:", "< 0:"),
        ("if len(meeting[knot]) != 2 or not others:", "if True:"),
        ("joined |= (parts == parts[at]) | bridge", "left.clear()"),
    ],
    "airmorph": [
        (".augment(batch, rng)._replace(raters=batch.labels[:, None])", ".augment(batch, rng)"),
        ("whole = bridged(soft, BREAK * len(soft) / _trees.ROWS)", "whole = soft"),
        ("== wanted) & mask[tuple(cells.T)][:, None]", "== wanted)"),
        ('(("score", SIGNATURE), ("score_plain", PLAIN))', '(("score", PLAIN), ("score_plain", SIGNATURE))'),
    ],
    "_airways": [
        ('mirrored = lobe[0] == "R"', "mirrored = False"),
        ("carina = np.array([row, np.mean(edges)])", "carina = np.array([row, edges[0]])"),
        ("hit = NAMES[branch.name].lobe and ", "hit = "),
        ("label[drawn.mask] = names[drawn.owner[drawn.mask]]", "label[drawn.mask] = 1"),
    ],
    "_signature": [
        ("return float(1 - radius.min() / radius.mean())", "return float(1 - radius.min() / radius.max())"),
        ("tree[number].length + found.get(tree[number].parent, 0.0)", "tree[number].length"),
        ("return branch.length / max(branch.chord, 1e-6)", "return branch.chord / max(branch.length, 1e-6)"),
        ("found += [child, *descendants(tree, child)]", "found += [child]"),
        ("for k in descendants(tree, number)} - {0}", "for k in descendants(tree, number)}"),
    ],
    "_branch_graph": [
        ("scores = scores + self.apart(steps).permute(0, 3, 1, 2)", "pass"),
        ("alike + (1 - alike) * self.speaks(x).sigmoid()", "alike"),
        ("below[:, number] |= below[:, branch.parent]", "below[branch.parent, number] = True"),
        ('if self.sight != "tree":', "if False:"),
        ("weights = weights * seen", "pass"),
        ("found = np.where(segment > 0, np.array(SEGMENT_VALUES)[segment], found)", "pass"),
    ],
    "tubule_sensitive": [
        ("self.weigh(of_rows[..., :, None] + of_columns[..., None, :])", "self.weigh(of_rows[..., :, None] + 0 * x)"),
        ("return found * (len(weights) / count)", "return found"),
        ("scores.clamp(max=MOST)", "scores"),
        ("wanted = attention(fine, fine.shape[2:])", "wanted = attention(coarse, fine.shape[2:])"),
        ("grey = self.augmentation.intensity(images[:, :GREY], rng)", "grey = images[:, :GREY]"),
        ("self.seen = inputs if prior else GREY", "self.seen = inputs"),
        ("branch.generation >= 2", "branch.generation >= 0"),
    ],
    "_lung_trees": [
        ("columns[-1] + 1] * -1.0", "columns[-1] + 1] * 0.0"),
        ("points = branch.points + side * (branch.radius + radius", "points = branch.points + side * (radius"),
        ("for value in (3, 2, 1):", "for value in (1, 2, 3):"),
        ("branch.parent + by if", "branch.parent if"),
    ],
    "_stenoses": [
        ("1 - 2 * values[bottom] / (values[before] + values[after])", "1 - values[bottom] / values[before]"),
        ("radius.mean() >= NARROW", "radius.mean() >= 0"),
        ("distance[one], distance[:, other] = np.inf, np.inf", "distance[one, other] = np.inf"),
        ("branch.radius[end] if fork else 0.0", "0.0"),
    ],
}
TESTED_BY = {
    "_airways": "airways",
    "_angiograms": "sam_vmnet",
    "_branch_graph": "airmorph",
    "_centrelines": "centrelines",
    "_lung_trees": "tubule_sensitive",
    "_planted": "trees",
    "_shapes": "medshapenet",
    "_signature": "airways",
    "_stenoses": "centrelines",
    "_trees": "trees",
    "_vmunet": "sam_vmnet",
}
"""Whose tests notice, where these are not in a file of the same name."""
