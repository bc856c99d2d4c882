"""Deliberate errors in recipes of `language`."""

ERRORS = {
    "_findings": [
        ("columns < middle), lungs & (columns >= middle)", "columns >= middle), lungs & (columns < middle)"),
        ("np.clip((distance - 0.35) / 0.3, -0.4, 1)", "1"),
        ("(label == value_of(finding)).any()", "False"),
        ("if value not in there)\n        value = one_of", ")\n        value = one_of"),
    ],
    "convirt": [
        ("if self.shuffled:", "if False:"),
        ("pairs(vectors, texts, said, self.heat, self.image_weight)", "pairs(vectors, texts, said, self.heat)"),
    ],
    "_kept": [
        ("vectors.masked_fill(empty[..., None], -torch.inf)", "vectors"),
        ("len(mine | theirs) if", "len(mine) if"),
    ],
    "medslip": [
        ("(found[right].mean() - found[left].mean())", "(found[left].mean() - found[right].mean())"),
    ],
    "_streams": [
        ("place = sides | fields or place", "place = sides | fields"),
        ("return share * patches, (1 - share) * patches", "return patches, patches"),
        ("masked_fill(pairs[own] != 0, -torch.inf)", "masked_fill(pairs[own] == 2, -torch.inf)"),
    ],
    "flair": [("one_of((NAMES[category], *DESCRIPTIONS[category]))", "NAMES[category]")],
    "benchx": [("encoder_share=1.0, ", "")],
    "_bench": [
        ("read = (images.raters == IGNORE).flatten(1).all(1)", "read = (images.raters >= 0).flatten(1).all(1)"),
        ("return max(range(len(values)), key=values.__getitem__)", "return 0"),
    ],
    "lsms": [
        ("return self.mix(found) * x", "return self.mix(found)"),
        ("seen = self.everything(torch.cat(tokens, dim=1))", "seen = torch.cat(tokens, dim=1)"),
    ],
    "pathvg": [
        (
            "said = [estranged(sentence, self.hide) for sentence in sentences] if self.training else sentences",
            "said = sentences",
        ),
        (
            "facts = [facts_about(sentence) if self.knowledge else () for sentence in sentences]",
            "facts = [facts_about(sentence) for sentence in sentences]",
        ),
    ],
    "_terms": [("one_of(IMPLICIT[word]) if", "UNHEARD[word] if")],
    "structuralglip": [
        ("of_places = (of_places + before) / 2", "pass"),
        (
            "told = similar.masked_fill(~heard[:, None, None], -torch.inf).softmax(3)",
            "told = similar.masked_fill(empty[:, None, None], -torch.inf).softmax(3)",
        ),
    ],
    "_described": [
        ("known = [each for each in CATEGORIES if each not in HELD_OUT]", "known = list(CATEGORIES)"),
    ],
    "_boxes": [
        ("free.pop(int(np.argmax(overlaps)))", "pass"),
        ("np.maximum.accumulate((right", "np.copy((right"),
    ],
    "med_glip": [
        ("found | torch.isin(regions.long() + REGION, values)", "found | torch.isin(regions.long(), values)"),
        (
            "others = F.binary_cross_entropy_with_logits(scores[~own], truth[~own].float())",
            "others = F.binary_cross_entropy_with_logits(scores[own], truth[own].float())",
        ),
    ],
    "mulmodseg": [
        ("told = F.relu(self.hear(self.said[modality]))", "told = F.relu(self.hear(self.said[0]))"),
        (
            "waiting.images, waiting.labels = batch.images[~mine], batch.labels[~mine]",
            "waiting.images, waiting.labels = batch.images[:0], batch.labels[:0]",
        ),
    ],
    "flans": [
        (
            "back = torch.stack([turned(logits, turn) for turn in range(TURNS)], dim=1)",
            "back = torch.stack([upright(logits, turn) for turn in range(TURNS)], dim=1)",
        ),
        ('turns[[kind == "position" for kind in kinds]] = 0', "pass"),
    ],
    "_captions": [
        (
            "weight = (hard * each[some]).masked_fill(same[some], -torch.inf).log_softmax(1)",
            "weight = (hard * each[some]).log_softmax(1)",
        ),
    ],
    "_saliency": [
        ("return not self.weak or now.step < max(1, now.steps - self.making)", "return True"),
    ],
    "medclip_sam": [
        ("scores[chosen] = (net.images(seen) @ text.T)[:, 0] / heat", "scores[chosen] = slope[0].mean((1, 2))[chosen]"),
        ("apart / (2 * alike**2)", "0 * apart"),
    ],
    "medclip_samv2": [("weight * capacity(kept, features[0]).mean() - fit, gate", "-fit, gate")],
    "sat": [
        ("if now.step == 0:", "if now.step == 1:"),
        ("found = model(labelled.images[mine], number)", "found = model(labelled.images[mine], first)"),
    ],
    "medvlsm": [
        ("self.film(self.reduce[3](maps[3]), self.text(sentences))", "self.reduce[3](maps[3])"),
        ("prompt(name, wrong(words))", "prompt(name, words)"),
    ],
    "biomedparse": [
        ("cell[0] = one_of(others)", "cell[0] = 1"),
        ("p < LEVEL for _, p in false", "p >= LEVEL for _, p in false"),
    ],
    "medal_s": [
        ("answer(rough * ~half), answer(rough * half)", "answer(rough * half), answer(rough * ~half)"),
        (
            "dotted(pixels if rough is None else self.bound(pixels, weights, rough), weights)",
            "dotted(pixels, weights)",
        ),
    ],
    "_queries": [
        ("tgt_key_padding_mask=nobody)", "tgt_key_padding_mask=None)"),
        ("(there | ~partial[:, None])", "(values > 0)"),
    ],
    "_knowledge": [
        ("return pairs(text(left), text(right), owners)", "return pairs(text(left), text(right), left)"),
    ],
    "_attributes": [("('left', 'center', 'right')[across]", "('right', 'center', 'left')[across]")],
    "_parsing": [
        ("2 * np.minimum(below, 1 - below)", "below"),
        ("(masks[other] & mask).sum() <= shared * mask.sum()", "True"),
    ],
    "rexgroundingct": [
        ("key=rank.get)[:most]", "key=rank.get)"),
        ("masks[:, kinds_of(sentence)].amax(1)", "masks[:, kinds_of(sentence)[0]]"),
    ],
    "_reports": [
        ("frozenset, (sides, fields, signs)", "frozenset, (sides & set(), fields, signs)"),
        (" | {side for side, _ in lobes}", ""),
        ("if positive[n] == (k == 0)", "if True"),
    ],
    "_reading": [
        ("numbered(reports).to(similarity.device), image_weight)", "numbered(reports).to(similarity.device))"),
        ("matched(similarity, numbered(reports)", "matched(similarity, torch.arange(len(reports))"),
    ],
    "crisp_sam2": [
        ("memory = memory.in_order(present)", "pass"),
        ("Answer(coarse, coarse + more, expected)", "Answer(coarse, more, expected)"),
    ],
    "_semantics": [
        ('self.second["words"](joint, shown, empty)', 'self.second["words"](joint, words, empty)'),
        ("F.relu(self.shared(semantics))", "self.shared(semantics)"),
    ],
    "_slice_memory": [
        ("descending=True, stable=True", "descending=False, stable=True"),
        ("looks[sure, -1], kept[sure, -1], there[sure, -1]", "looks[sure, 0], kept[sure, 0], there[sure, 0]"),
    ],
}
TESTED_BY = {
    "_semantics": "crisp_sam2",
    "_slice_memory": "slice_memory",
    "_attributes": "medvlsm",
    "_boxes": "structuralglip",
    "_described": "structuralglip",
    "_terms": "pathvg",
    "_bench": "benchx",
    "_kept": "convirt",
    "_streams": "medslip",
    "_findings": "findings_language",
    "_knowledge": "sat",
    "_parsing": "biomedparse",
    "_queries": "sat",
    "_reading": "reports_of_radiologists",
    "_reports": "reports_of_radiologists",
    "_captions": "captions",
    "_saliency": "medclip_sam",
}
"""Whose tests notice, where these are not in a file of the same name."""
