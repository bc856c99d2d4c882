"""Deliberate errors in recipes of `findings`."""

ERRORS = {
    "_nodules": [
        ("0.22 * degree * waves", "0.22 * waves"),
        ("degree * spicules(", "spicules("),
        ("inner(lungs)).values()", "~lungs).values()"),
        ("padded = F.pad(images, [side // 2] * 4)", "padded = images"),
    ],
    "_judging": [
        ("(have & want)", "have"),
        ("min(0.0, 1 - len(theirs)", "min(0.0, 0 * len(theirs)"),
        ("before[place - 1] + 1 if", "row[place - 1] + 1 if"),
        ("many * log(total / max(1, counts.get(key, 0)))", "many"),
        ("reversed(parts)", "parts"),
    ],
    "_detection": [
        ("torch.where(highest, scores, -1.0)", "scores"),
        ("(1 - target) ** 4 * p**2", "p**2"),
    ],
    "meddet": [
        (".sin() ** 2 - y", ".sin() - y"),
        (
            "weighted.append(aligned * weigh(aligned.mean((2, 3))).sigmoid()[:, :, None, None])",
            "weighted.append(aligned)",
        ),
    ],
    "lung_health_bench": [
        ("false = places[~inside.all(2).any(1)]", "false = places"),
        ("            truth = truth[torch.randperm(len(truth))]\n", "            pass\n"),
    ],
    "unit": [
        ("if found and self.hierarchy:", "if False:"),
        ("SIDES[turn : turn + 1]", "SIDES[:1]"),
    ],
    "medregion_ct": [
        ("inside(maps, displaced(masks) if self.shuffled else masks)", "inside(maps, displaced(masks))"),
        ("total / shares.sum(2, keepdim=True).clamp_min(1e-6)", "total / shares.shape[2]"),
    ],
    "_reported": [
        (".triu(1)", ".triu(2)"),
        ("[-100] * (most", "[STOP] * (most"),
    ],
    "spectral_graph_ct": [
        ("terms.append(2 * scaled @ terms[-1] - terms[-2])", "terms.append(scaled @ terms[-1])"),
        ("/ (1 + distance)", "/ 1.0"),
        ("found = found[order][:, order]", "found = found[order]"),
    ],
    "nodule_surroundings": [
        ("nodules.flip(2) if self.mirrored else nodules", "nodules"),
        ("touched = parts[ndimage.binary_dilation(core, np.ones((3, 3)))]", "touched = parts"),
    ],
    "_ridges": [("(sigma * scale) ** 2 * (mean + half)", "(sigma * scale) ** 2 * mean")],
    "_surroundings": [("0.5 if kind == MALIGNANT else -0.5", "0.5")],
    "tb_cxr": [
        ("least = overlap.flatten(1).argmin(1)", "least = overlap.flatten(1).argmax(1)"),
        ("(drawn[:, 0] > 0.5).byte()", "images.labels"),
        ("reader.head.weight[1] - reader.head.weight[0]", "reader.head.weight[1]"),
    ],
    "cxr_report": [
        ("images[:, :, start : start + height] for start in starts", "images for start in starts"),
        ('if "no" not in words:', "if words:"),
        ("outputs = [1] * count if self.each else [count]", "outputs = [count]"),
    ],
    "medvitv2": [
        ("start = torch.minimum((rank - kernel // 2).clamp_min(0), last)", "start = torch.minimum(rank, last)"),
        ("bells(self.norm(x).float())", "bells(x.float())"),
        ("(half, first, 2)", "(half, first, 1)"),
        ("*(corrupted(images, kind, case.case_id) for kind in KINDS)", "*(images for kind in KINDS)"),
        ('one.assign(score=one["score_clean"])', "one"),
    ],
    "_corruptions": [('f"{kind} of {name}, image {number}"', 'f"{kind}, image {number}"')],
    "vila_m3": [
        ("(images.roll(1, 0), halves.roll(1)) if self.shuffled else (images, halves)", "(images, halves)"),
        ("None if alone else heard", "heard"),
        ("cards=cards and self.experts", "cards=cards"),
        ("wanted = topic.expert if method.experts and topic.expert else None", "wanted = topic.expert"),
    ],
    "_experts": [
        ("F.one_hot(1 - halves, 2)", "F.one_hot(halves, 2)"),
        ("rows = halves == number", "rows = halves >= 0"),
    ],
    "_asked": [
        ("elif call and calls[k] is None:", "elif call:"),
        ("(2 * columns <= first + last)", "(2 * columns >= first + last)"),
        ("told + [mine] * len(words)", "told + [True] * len(words)"),
    ],
    "mllm_data_mining": [
        ("weights[kind] * skill", "skill"),
        ('"failed": ("failed", "late")', '"failed": ("failed",)'),
        ("spread / (kinds**2 *", "spread / (kinds *"),
    ],
    "_harness": [
        ("if REFUSAL.search(text):", "if False:"),
        (
            "found[0] if len(found) == 1 else None\n\n    return parse\n\n\ndef any_of",
            "found[0] if found else None\n\n    return parse\n\n\ndef any_of",
        ),
        ("(found[:, :2] < found[:, 2:]).all() and ", ""),
        ("corners[:, ::-1] - 0.5", "corners[:, ::-1]"),
        ("for _ in range(tries):", "for _ in range(1):"),
    ],
    "_mined": [
        ("if facts.sides or not outcome:", "if True:"),
        ("len(kinds) / counts", "1 / counts"),
        ("(score - chance) / max(1 - chance, 0.05)", "score - chance"),
        ("None, said_otherwise(text))", "None, text)"),
    ],
    "_writing": [
        ("[size[1], size[0]]).round()", "[size[0], size[1]]).round()"),
        ("sides[1][::-1]", "sides[1]"),
        ('if kind == "generation" else truth', "if False else truth"),
    ],
    "_miners": [
        ("reader.encoder.requires_grad_(False)", "pass"),
        ("[False] * len(given)", "[True] * len(given)"),
        ("if token == writing.STOP:", "if False:"),
        ("weights + mean", "weights"),
        ("np.argsort(-likeness,", "np.argsort(likeness,"),
    ],
    "lesion_centric": [
        ("both = a @ b.T * count", "both = 0 * a @ b.T * count"),
        ('labels if self.where == "lesion" else elsewhere(labels)', "labels"),
    ],
    "vae_lung": [
        ("self.beta * divergence.mean()", "0 * divergence.mean()"),
        ("moved *= ((z.sum() - values) / (z.sum() - z[dimension]))[:, None]", "pass"),
    ],
    "_latent": [
        ("self.encoder.eval()", "pass"),
        ("(alpha.digamma() - total.digamma())", "(beta.digamma() - beta.sum(1, keepdim=True).digamma())"),
    ],
    "peritumoral_radiomics": [
        ("region & ~mask, centre(truth)", "region & ~region, centre(truth)"),
        ("others = pairs[len(pairs) // 2 :] + pairs[: len(pairs) // 2]", "others = pairs"),
    ],
    "gpt4v_study": [
        ("float(same > wrong)", "float(same >= 0)"),
        (
            'self.heard(trained(fitted)["reader"], (found, truth))',
            'self.heard(trained(fitted)["reader"], (truth, truth))',
        ),
    ],
}
TESTED_BY = {
    "_nodules": "nodules",
    "_corruptions": "medvitv2",
    "_medvit": "medvitv2",
    "_latent": "vae_lung",
    "_outlined": "peritumoral_radiomics",
    "_lesions": "lesion_centric",
    "_reported": "medregion_ct",
    "_ridges": "nodule_surroundings",
    "_surroundings": "nodule_surroundings",
    "_detection": "detection_of_boxes",
    "_judging": "gpt4v_study",
    "_experts": "vila_m3",
    "_asked": "asked",
    "_harness": "mllm_data_mining",
    "_mined": "mllm_data_mining",
    "_writing": "writing",
    "_miners": "miners",
}
"""Whose tests notice, where these are not in a file of the same name."""
