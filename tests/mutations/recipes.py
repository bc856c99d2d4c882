"""Deliberate errors in recipes: {chapter/file: [(what stands there, what is put in its place)]}."""

RECIPES = {
    "data_loading/leakage": [
        ("return order[side::2]", "return order[::2]"),
        ("_halved(self.dataset, 1), self.preparation", "_halved(self.dataset, 0), self.preparation"),
    ],
    "sam_adaptation/salt": [
        ("return values * (1 + scale) + shift", "return values * (1 + scale)"),
        ("(self.left[:, self.top :] @ self.down)", "(self.left[:, : self.down.shape[0]] @ self.down)"),
    ],
    "sam_adaptation/medsamix": [
        (
            "torch.where(labelled.labels == self.specialty, labelled.labels,",
            "torch.where(labelled.labels > 0, labelled.labels,",
        ),
    ],
    "sam_adaptation/sam_med2d": [("nn.Parameter(torch.zeros(width, 1, 1))", "nn.Parameter(torch.ones(width, 1, 1))")],
    "sam_adaptation/sas": [
        ("return images + inside * levels", "return images + levels"),
        ("new_labels = torch.zeros_like(labels)", "new_labels = labels.clone()"),
    ],
    "sam_adaptation/h_sam": [
        ("strength = 1 - counts / counts.max()", "strength = counts / counts.max()"),
        ("strength[:, None] * (FLOOR + prior).log()", "strength[:, None] * prior"),
    ],
    "sam_adaptation/lesion_sam3": [("same = case_of[mine] == case_of[theirs]", "same = case_of[mine] >= 0")],
    "sam_adaptation/medical_sam3": [("boxes[:, 2:] + slack]", "boxes[:, 2:] - slack]")],
    "semi_supervised/bcp": [
        ("IGNORE), pseudo.masked_fill(box, IGNORE)", "IGNORE), pseudo"),
        ("outward = copy_paste(unlabelled.images, labelled.images, box)", "outward = unlabelled.images"),
        ('largest_parts(nets["average"](images)', '(nets["average"](images)'),
    ],
    "semi_supervised/sasnet": [
        ("torch.where(self.seen[slot], (before + now) / 2, now)", "now"),
        ("distance[inwards == 1] = 0", "pass"),
    ],
    "few_shot/repri": [
        ("loss = loss + (1 / shots + extra) * kl(", "loss = loss + (1 / shots) * kl("),
        ("return (found * (found / wanted).log()).sum(0)", "return (wanted * (wanted / found).log()).sum(0)"),
    ],
    "uncertainty/pulaski": [
        ("return apart - within / 2 - among / 2", "return apart - among / 2"),
        ("annotations if self.alone else annotations[:1]", "annotations"),
    ],
    "uncertainty/maxquery": [
        ("share = assigned[labels == value].mean(0)", "share = assigned[labels != value].mean(0)"),
        ("return -response.amax(1)", "return -response.mean(1)"),
    ],
    "architectures/wau": [
        ("return smooth + self.attend(deep, skip) if self.attention else smooth", "return smooth"),
        ("attn_mask=self.bias.to(queries.dtype)", "attn_mask=None"),
    ],
    "architectures/unetpp": [
        ("range(0 if self.dense else column - 1, column)", "range(column - 1, column)"),
        ("range(depth + 1)", "range(self.depth + 1)"),
    ],
    "architectures/m2snet": [
        ("both = fine - coarse if subtract else fine + coarse", "both = fine + coarse"),
    ],
    "architectures/pranet": [("return 1 - logits.float().softmax(1)", "return logits.float().softmax(1)")],
    "architectures/_scan": [
        ("states[:, c].addcmul_(passed[:, c], states[:, before, last, None])", "pass"),
        ("torch.mul(for_added[:, 1:], states[:, :-1], out=for_decay[:, 1:])", "pass"),
    ],
    "architectures/msvm_unet": [
        ("[(side - weight.shape[-1]) // 2] * 4", "[0, side - weight.shape[-1]] * 2"),
        ("heard = heard + scan(tokens[:, way])[:, inverse(way)]", "heard = heard + scan(tokens[:, way])"),
    ],
    "architectures/swtr_unet": [
        ("side // 2 if shift and number % 2 else 0", "side // 2 if shift else 0"),
        (
            "[tokens(level) for tokens, level in zip(self.tokens, levels[first:], strict=True)]",
            "[level for tokens, level in zip(self.tokens, levels[first:], strict=True)]",
        ),
    ],
    "architectures/symbolic_seg": [
        ("heard = self.embedding(sentence[-1])", "pass"),
        (
            "return F.gumbel_softmax(logits, temperature, hard=True)",
            "return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)",
        ),
    ],
    "architectures/u_bench": [
        ("return 2 * quality * efficient / (quality + efficient)", "return (quality + efficient) / 2"),
    ],
    "volumes/stu_net": [
        ("+ self.shortcut(x))", ")"),
        (
            'own[name] if name.startswith("head.") else known[name]',
            "known[name] if known[name].shape == own[name].shape else own[name]",
        ),
        (', mode="nearest")', ', mode="trilinear")'),
    ],
    "volumes/cads": [
        (
            "told, truth = (only | ~known)[:, 1:], only[:, 1:]",
            "told, truth = torch.ones_like(known)[:, 1:], only[:, 1:]",
        ),
        ("among = probabilities * known", "among = probabilities"),
    ],
    "volumes/totalsegmentator": [
        ("found = measures(case, fitted.predict(case), structures)", "found = measures(case, case.label, structures)"),
        ("(known == value).mean() / 2", "(known == value).mean()"),
    ],
    "volumes/study_2_5d": [
        ("return views.mean(0).clamp_min(1e-12).log()", "return views[0].clamp_min(1e-12).log()"),
        (
            "super().features(neighbours(image, self.count))",
            "super().features(neighbours(image, 1).repeat(1, self.count, 1, 1, 1))",
        ),
    ],
    "volumes/h_denseunet": [
        ("scores.float().softmax(1).to(volume.dtype)", "scores.to(volume.dtype)"),
        ("self.fusion(self.inter(known) + within)", "self.fusion(self.inter(known))"),
    ],
    "volumes/_slices": [("(places + step).clamp(0, last)", "(places + step) % (last + 1)")],
    "volumes/d_former": [
        (
            "pairs = zip(sides, counts, strict=True) if dilated else zip(counts, sides, strict=True)",
            "pairs = zip(counts, sides, strict=True)",
        ),
        ("seen = None if real.all() else real[:, None, None].repeat(batch, 1, 1, 1)", "seen = None"),
        ("return x + self.convolution(x.float().movedim(-1, 1)).movedim(1, -1)", "return x"),
    ],
    "volumes/cross_d_conv": [
        (
            "return -angle * torch.linalg.cross(axis, torch.ones_like(axis))",
            "return angle * torch.linalg.cross(axis, torch.ones_like(axis))",
        ),
        ("self.rotation(x)))[:, :, side // 2]", "self.rotation(x)))[:, :, 0]"),
    ],
    "volumes/mediastinal_ln": [
        ("margin = images.shape[-1], (thickness - stride) // 2", "margin = images.shape[-1], 0"),
        ("return probabilities.mean(0)", "return probabilities[0]"),
    ],
    "volumes/_head_and_neck": [
        ("organs = ((case.label > 0) & (label == 0)).astype(np.uint8)", "organs = (case.label > 0).astype(np.uint8)"),
    ],
    "volumes/deeporgan": [
        ("density = logits.detach().softmax(1)", "density = logits.softmax(1)"),
        (".softmax(2).mean(0)", ".softmax(2)[0]"),
        ("/ SIDE * scale", "/ SIDE"),
    ],
    "volumes/mpu_net": [
        ("self.level(level) + self.below(below)", "self.level(level)"),
        ("missed * (there - hits) + 1)", "missed * (found - hits) + 1)"),
        ("matches.softmax(-1) @", "matches.softmax(-2) @"),
    ],
    "imperfect_labels/spatial_noise": [
        ("trace = squared(spread, rho, rho**2) / sigma**2", "trace = squared(spread, rho, rho) / sigma**2"),
        ("offset = -back @ grid.mean", "offset = back @ grid.mean"),
        ("others - own)", "own - others)"),
    ],
    "imperfect_labels/adele": [
        ("(present & open_to).gather", "open_to.expand_as(present).gather"),
        ("np.geomspace(1, 0.1, len(curve))", "np.geomspace(0.1, 1, len(curve))"),
        ("mean.flatten(1).amax(1).exp() >= agreed", "mean.flatten(1).amax(1).exp() >= 0"),
    ],
    "imperfect_labels/ripu": [
        ('{"ripu": impurity * uncertainty,', '{"ripu": impurity,'),
        ("return squares * begun // len(self.rounds)", "return squares"),
        ("return torch.where(known, target.labels, IGNORE)", "return target.labels"),
    ],
    "imperfect_labels/scribble_aag": [
        ("features * attention[:, 1:].sum(1, keepdim=True)", "features * attention.sum(1, keepdim=True)"),
        ('nets["judge"](detached(seen))', 'nets["judge"](seen)'),
    ],
    "imperfect_labels/_adversarial": [
        ("{name: weight.detach() for name, weight", "{name: weight for name, weight"),
        ("(fake.float() + 1).square()", "fake.float().square()"),
    ],
    "imperfect_labels/ael_noisy_pseudo": [
        ("return self.head(features * weights)", "return self.head(features)"),
        ("weights = certainty(told) if self.weighted", "weights = torch.ones_like(told[:, 0]) if self.weighted"),
    ],
    "imperfect_labels/citizen_science": [
        ("judge(torch.cat([real, fake.detach()]))", "judge(torch.cat([real, fake]))"),
        ("frozen(judge, fake)", "judge(fake)"),
        ("labels = torch.cat([labels, masks])", "labels = torch.cat([labels, labels[: len(masks)]])"),
    ],
    "interactive/interactive_fcn": [
        ("chance = (depth - most).exp() - (-most).exp()", "chance = (depth > 0).double()"),
        ("truth, known, pick=deep_pixels)", "truth, pick=deep_pixels)"),
    ],
    "interactive/interformer": [
        ("seen = [grid + local(grid) for", "seen = [grid for"),
        ("y = self.third(y, y)", "y = self.third(y, deep)"),
    ],
    "interactive/nuclick": [
        ("torch.where(others, 2.0, 1.0))", "1.0)"),
        ("(label != IGNORE) & ~mine].unique()", "(label != IGNORE)].unique()"),
    ],
    "interactive/sdl_seg": [
        ("return gaussians(markers, self.sigma)", "return markers.float()"),
        ("torch.manual_seed(zlib.crc32(case.case_id.encode()))", "pass"),
    ],
    "interactive/scribbleprompt": [
        ("self.made(kind, ~mask & sure, whole(0, MOST))", "self.made(kind, ~mask, whole(0, MOST))"),
        ("else broken(sort(mask))", "else sort(mask)"),
    ],
    "interactive/_asking": [
        ("target[number], values[-1] = self.piece(image[0]).to(target.device), 0", "values[-1] = 0"),
    ],
    "interactive/imis_bench": [
        ('if kind != "name" or value)', "if True)"),
        ("count - len(kinds) + 1 for count in (3, 5)", "count for count in (3, 5)"),
    ],
    "interactive/prism": [
        ("confidence.argmax(1)", "confidence.argmin(1)"),
        ("self.error(x).float() * self.correction(x).float()", "self.correction(x).float()"),
    ],
    "anatomy/hybridgnet": [
        ("between = (step + torch.roll(step, 1, 1)) / 2", "between = (step + torch.roll(step, -1, 1)) / 2"),
        ("[x, look_up(features, places), places] if", "[x, 0 * look_up(features, places), places] if"),
    ],
    "anatomy/medshapenet": [
        ("unknown[value - 1] = cut", "unknown[value - 1] = False"),
        ("2 * seen - (1 - unknown)", "2 * seen - 1"),
    ],
    "anatomy/_shapes": [
        ("first = np.sqrt(first)", "first = first + 0"),
        ("found[1][:, ::-1]", "found[1]"),
    ],
    "domain_shift/ct_mr_prior": [
        (
            'self.structure * self.segmentation(frozen(nets["model"], made), labels)',
            'self.structure * self.segmentation(frozen(nets["model"], made.detach()), labels)',
        ),
        ("* cycles + sum(games)", "* cycles + games[1]"),
    ],
    "domain_shift/frd": [
        ("for root in roots) - 2 * shared)", "for root in roots) - shared)"),
        ("scores.mean() + NORMAL_95 * scores.std()", "scores.mean() + scores.std()"),
    ],
    "domain_shift/_radiomics": [
        ("high = COIFLET[::-1] * (-1.0) ** np.arange(1, 7)", "high = COIFLET * (-1.0) ** np.arange(1, 7)"),
        ("(pairs + pairs.T) / (2 * pairs.sum())", "pairs / pairs.sum()"),
    ],
    "domain_shift/sfda": [
        ('with forgetful(nets["ended"]):', "if True:"),
        ("if self.keeps:", "if True:"),
    ],
    "domain_shift/mrsegmentator": [
        ("fitted.predict(as_shown(case, look))", "fitted.predict(case)"),
        ("return torch.where(there[0] | there[1], truth, proposed)", "return torch.where(there[0], truth, proposed)"),
        ('nets["annotations"].known(index) | (dice', "(dice"),
    ],
    "domain_shift/graphecho": [
        ("here, there = torch.isin(kinds, others), torch.isin(others, kinds)", "here, there = kinds >= 0, others >= 0"),
        ("plan.masked_fill(~same, 0).amax(1)", "plan.amax(1)"),
    ],
    "anatomy/saliency_acm": [
        ("pull + weight * (one - two) * (values - fitted)", "pull + (one - two) * (values - fitted)"),
        ("torch.where(swapped, 1 - found, found)", "found"),
    ],
    "pretraining/bpd_finetune": [
        ("model.freeze(self.frozen(now))", "model.freeze((False,) * len(STAGES))"),
        ("return mixed, partner, 1 - inside", "return mixed, partner, inside"),
        ("shares = SHARES if self.progressive else", "shares ="),
    ],
    "pretraining/medimageinsight": [
        ("meets(facts, (self.new,)) == new", "True"),
        (
            "numbers = torch.cat([numbers, image_labels(unlabelled.raters[:some, 0], len(model.sentences))])",
            "numbers = torch.cat([numbers, numbers[:some]])",
        ),
    ],
    "pretraining/_searching": [
        ("np.fill_diagonal(similarity, -np.inf)", "pass"),
        ("ill = np.sort(scores[findings == 1])", "ill = np.sort(scores)"),
    ],
    "pretraining/chexworld": [
        ("truth = torch.cat([truth, other(truth)])", "truth = torch.cat([truth, truth])"),
        ("torch.cat([scene.shift, -scene.shift])", "torch.cat([scene.shift, scene.shift])"),
        ("contexts = changed(views, actions) if self.domains else views", "contexts = views"),
    ],
    "pretraining/lvm_med": [
        ("(indicators(found) - indicators(pushed))", "(indicators(pushed) - indicators(found))"),
        ("* (there + back.T)", "* (there + back)"),
        ("joined * edge_affinity(*found), counts + joined", "joined * edge_affinity(*found), counts"),
    ],
    "pretraining/mis_fm": [
        ("share = (k.float() / levels)[:, None]", "share = (k.float() / (levels + 1))[:, None]"),
        ("background.roll(1, dims=0)", "background"),
    ],
    "pretraining/voco": [
        ("(y - alike).abs()", "alike"),
        ("(side - distance).clamp_min(0) / side", "1 - distance / side"),
    ],
    "pretraining/med3d": [
        ("each[labels == k].mean() for k in shown", "each[labels == k].sum() for k in shown"),
        ("found[mine] = labels[mine.roll(1)]", "found[mine] = labels[mine]"),
    ],
    "pretraining/gl_contrast": [
        ("positive = (same | here & other_volume)", "positive = (same | here)"),
        (
            "torch.cat([self.augmentation.intensity(images.images, rng) for _ in range(2)])",
            "torch.cat([self.augmentation(images.images, None, rng)[0] for _ in range(2)])",
        ),
        ("(where.place * count).long()", "(where.place * 2).long()"),
    ],
    "pretraining/joint_ssl_2d3d": [
        ("        q = q / q.sum(0, keepdim=True)\n", "        q = q / q.sum()\n"),
        ("return rest + REACH * apart * moves", "return rest + moves * 0"),
        ("shown = torch.where(where[..., None], self.token, slices)", "shown = slices"),
        ("hidden_error(slices.detach(),", "hidden_error(slices,"),
    ],
    "pretraining/_stages": [("one_cycle(*self.stage(then)[1])", "one_cycle(*then)")],
    "pretraining/_dino": [
        ("((scores - centre) / TEACHER_HEAT)", "(scores / TEACHER_HEAT)"),
        ("if number != other", "if number <= other"),
        ("self.centre.lerp_(torch.cat(teacher).mean(0), 1 - CENTRE)", "pass"),
        ("(torch.rand(count, 2, generator=rng) * 2 - 1) * (1 - side)[:, None]", "torch.zeros(count, 2)"),
    ],
    "pretraining/ssl_diversity": [("net.conv1.weight.sum(1, keepdim=True)", "net.conv1.weight.mean(1, keepdim=True)")],
    "pretraining/_pyramid": [("x = smooth(fine + F.interpolate", "x = smooth(0 * fine + F.interpolate")],
    "pretraining/barlow_swin": [
        ("(z - z.mean(0)) / (z.std(0, unbiased=False) + 1e-5)", "z - z.mean(0)"),
        ("LAMBDA * (found.square().sum() - own.square().sum())", "LAMBDA * found.square().sum()"),
        ("heads, side, shift) for shift in (0, 1)", "heads, side, shift) for shift in (0, 0)"),
        ("return self.inner(x) + self.around(x)", "return self.inner(x)"),
    ],
    "fairness/fairseg": [
        ("return weights * self.seen.sum() / (weights * self.seen).sum()", "return weights"),
        ("bound[known].min() / bound) ** gamma", "bound[known].max() / bound) ** gamma"),
        ("said = said * factors", "said = said / factors"),
    ],
    "synthesis/seg2med": [
        ("structures if self.told else torch.zeros_like(structures)", "structures"),
        ("F.avg_pool2d(images[:, :1].float(), COARSE)", "images[:, :1].float()"),
    ],
    "synthesis/roentgen": [
        ("finding = (numbers % 2).to(torch.uint8)", "finding = (numbers % 3 % 2).to(torch.uint8)"),
    ],
    "synthesis/medsyn": [("maps = enlarged(spoilt(low))", "maps = enlarged(low)")],
    "synthesis/_denoiser": [("return without + guidance * (told - without)", "return told")],
    "synthesis/bs_diff": [
        ("torch.cat([generator.make(xrays, self.calls), soft], dim=1)", "torch.cat([xrays, soft], dim=1)"),
        ("return images + unfolded(", "return unfolded("),
    ],
    "synthesis/_bones": [
        (
            "return lambda x, t: xrays + net(x, t, maps=xrays).float()",
            "return lambda x, t: xrays + net(x, t, maps=0 * xrays).float()",
        )
    ],
    "synthesis/bs_ldm": [
        ("*like.shape[:2], 1, 1,", "*like.shape,"),
        ("return FIRST + RATE * (DIFFUSION.times - 1 - t)", "return FIRST + RATE * t"),
        ("rare = self.taken < self.least", "rare = self.taken < 0"),
    ],
    "synthesis/gl_lcm": [
        ("return skip * noisy + out * clean", "return clean"),
        ("residual = steepness(local - whole, inside, inside)", "residual = steepness(local, inside, inside)"),
        ("r = (t - SKIP).clamp_min(0)", "r = t"),
    ],
    "synthesis/lefusion": [
        ("masks if focused else None", "None"),
        ("net(torch.where(masks > 0, x, context), t)", "net(x, t)"),
    ],
    "synthesis/_scars": [
        (
            "case = replace(case, image=scarred(case, self.wall, self.cavity).image)",
            "case = scarred(case, self.wall, self.cavity)",
        ),
        ("torch.where(target[:, 0] > 0, labels, 0)", "labels"),
    ],
    "synthesis/surgical_background": [
        ("return share * front + (1 - share) * back", "return inside * front + (1 - inside) * back"),
        ("np.where(known, image - other, 0.0)", "(image - other)"),
    ],
    "synthesis/_chains": [
        ("return kept * image + (1 - kept) * changed", "return changed"),
        ("below = torch.cumsum(counts, 0) - counts", "below = torch.cumsum(counts, 0)"),
    ],
    "synthesis/gms": [
        ("requires_grad_(not self.frozen)", "requires_grad_(True)"),
        ("self.matching * matched + sum", "sum"),
        ("mean + sampled * deviation *", "mean + deviation *"),
        ("return mean / self.spread, deviation / self.spread", "return mean, deviation"),
    ],
    "synthesis/_painting": [("structures / total.clamp_min(1)", "structures")],
    "synthesis/medsegfactory": [
        ("1 - number if self.joint else number", "number"),
        ("key(own), value(own)", "key(asking), value(asking)"),
        ("value=stream) for stream", "value=0) for stream"),
        ("grey(image, image.shape[1])", "image"),
    ],
    "synthesis/paxray": [
        (
            "sure = drawn.all(1)[:, None, None, None] | (nothing == 0)",
            "sure = torch.ones_like(nothing, dtype=torch.bool)",
        ),
        ("regions[view, answer - 1] if answer", "regions[view, number] if answer"),
    ],
    "synthesis/_overlapping": [
        ("masks[:, [value not in drawn for value in self.values]] = IGNORE", "pass"),
        ("torch.inf).min(1)", "-torch.inf).max(1)"),
    ],
    "language/_findings": [
        ("columns < middle), lungs & (columns >= middle)", "columns >= middle), lungs & (columns < middle)"),
        ("np.clip((distance - 0.35) / 0.3, -0.4, 1)", "1"),
        ("(label == value_of(finding)).any()", "False"),
        ("if value not in there)\n        value = one_of", ")\n        value = one_of"),
    ],
    "language/convirt": [
        ("if self.shuffled:", "if False:"),
        ("pairs(vectors, texts, said, self.heat, self.image_weight)", "pairs(vectors, texts, said, self.heat)"),
    ],
    "language/_kept": [
        ("vectors.masked_fill(empty[..., None], -torch.inf)", "vectors"),
        ("len(mine | theirs) if", "len(mine) if"),
    ],
    "language/medslip": [
        ("(found[right].mean() - found[left].mean())", "(found[left].mean() - found[right].mean())"),
    ],
    "language/_streams": [
        ("place = sides | fields or place", "place = sides | fields"),
        ("return share * patches, (1 - share) * patches", "return patches, patches"),
        ("masked_fill(pairs[own] != 0, -torch.inf)", "masked_fill(pairs[own] == 2, -torch.inf)"),
    ],
    "language/flair": [("one_of((NAMES[category], *DESCRIPTIONS[category]))", "NAMES[category]")],
    "language/benchx": [("encoder_share=1.0, ", "")],
    "language/_bench": [
        ("read = (images.raters == IGNORE).flatten(1).all(1)", "read = (images.raters >= 0).flatten(1).all(1)"),
        ("return max(range(len(values)), key=values.__getitem__)", "return 0"),
    ],
    "language/lsms": [
        ("return self.mix(found) * x", "return self.mix(found)"),
        ("seen = self.everything(torch.cat(tokens, dim=1))", "seen = torch.cat(tokens, dim=1)"),
    ],
    "language/pathvg": [
        (
            "said = [estranged(sentence, self.hide) for sentence in sentences] if self.training else sentences",
            "said = sentences",
        ),
        (
            "facts = [facts_about(sentence) if self.knowledge else () for sentence in sentences]",
            "facts = [facts_about(sentence) for sentence in sentences]",
        ),
    ],
    "language/_terms": [("one_of(IMPLICIT[word]) if", "UNHEARD[word] if")],
    "language/structuralglip": [
        ("of_places = (of_places + before) / 2", "pass"),
        (
            "told = similar.masked_fill(~heard[:, None, None], -torch.inf).softmax(3)",
            "told = similar.masked_fill(empty[:, None, None], -torch.inf).softmax(3)",
        ),
    ],
    "language/_described": [
        ("known = [each for each in CATEGORIES if each not in HELD_OUT]", "known = list(CATEGORIES)"),
    ],
    "language/_boxes": [
        ("free.pop(int(np.argmax(overlaps)))", "pass"),
        ("np.maximum.accumulate((right", "np.copy((right"),
    ],
    "language/med_glip": [
        ("found | torch.isin(regions.long() + REGION, values)", "found | torch.isin(regions.long(), values)"),
        (
            "others = F.binary_cross_entropy_with_logits(scores[~own], truth[~own].float())",
            "others = F.binary_cross_entropy_with_logits(scores[own], truth[own].float())",
        ),
    ],
    "language/mulmodseg": [
        ("told = F.relu(self.hear(self.said[modality]))", "told = F.relu(self.hear(self.said[0]))"),
        (
            "waiting.images, waiting.labels = batch.images[~mine], batch.labels[~mine]",
            "waiting.images, waiting.labels = batch.images[:0], batch.labels[:0]",
        ),
    ],
    "language/flans": [
        (
            "back = torch.stack([turned(logits, turn) for turn in range(TURNS)], dim=1)",
            "back = torch.stack([upright(logits, turn) for turn in range(TURNS)], dim=1)",
        ),
        ('turns[[kind == "position" for kind in kinds]] = 0', "pass"),
    ],
    "language/_captions": [
        (
            "weight = (hard * each[some]).masked_fill(same[some], -torch.inf).log_softmax(1)",
            "weight = (hard * each[some]).log_softmax(1)",
        ),
    ],
    "language/_saliency": [
        ("return not self.weak or now.step < max(1, now.steps - self.making)", "return True"),
    ],
    "language/medclip_sam": [
        ("scores[chosen] = (net.images(seen) @ text.T)[:, 0] / heat", "scores[chosen] = slope[0].mean((1, 2))[chosen]"),
        ("apart / (2 * alike**2)", "0 * apart"),
    ],
    "language/medclip_samv2": [("weight * capacity(kept, features[0]).mean() - fit, gate", "-fit, gate")],
    "language/sat": [
        ("if now.step == 0:", "if now.step == 1:"),
        ("found = model(labelled.images[mine], number)", "found = model(labelled.images[mine], first)"),
    ],
    "language/medvlsm": [
        ("self.film(self.reduce[3](maps[3]), self.text(sentences))", "self.reduce[3](maps[3])"),
        ("prompt(name, wrong(words))", "prompt(name, words)"),
    ],
    "language/biomedparse": [
        ("cell[0] = one_of(others)", "cell[0] = 1"),
        ("p < LEVEL for _, p in false", "p >= LEVEL for _, p in false"),
    ],
    "language/medal_s": [
        ("answer(rough * ~half), answer(rough * half)", "answer(rough * half), answer(rough * ~half)"),
        (
            "dotted(pixels if rough is None else self.bound(pixels, weights, rough), weights)",
            "dotted(pixels, weights)",
        ),
    ],
    "language/_queries": [
        ("tgt_key_padding_mask=nobody)", "tgt_key_padding_mask=None)"),
        ("(there | ~partial[:, None])", "(values > 0)"),
    ],
    "language/_knowledge": [
        ("return pairs(text(left), text(right), owners)", "return pairs(text(left), text(right), left)"),
    ],
    "language/_attributes": [("('left', 'center', 'right')[across]", "('right', 'center', 'left')[across]")],
    "language/_parsing": [
        ("2 * np.minimum(below, 1 - below)", "below"),
        ("(masks[other] & mask).sum() <= shared * mask.sum()", "True"),
    ],
    "language/rexgroundingct": [
        ("key=rank.get)[:most]", "key=rank.get)"),
        ("masks[:, kinds_of(sentence)].amax(1)", "masks[:, kinds_of(sentence)[0]]"),
    ],
    "language/_reports": [
        ("frozenset, (sides, fields, signs)", "frozenset, (sides & set(), fields, signs)"),
        (" | {side for side, _ in lobes}", ""),
        ("if positive[n] == (k == 0)", "if True"),
    ],
    "language/_reading": [
        ("numbered(reports).to(similarity.device), image_weight)", "numbered(reports).to(similarity.device))"),
        ("matched(similarity, numbered(reports)", "matched(similarity, torch.arange(len(reports))"),
    ],
    "synthesis/_regions": [("sums[image, top, left]) / (end", "0) / (end")],
    "synthesis/_phrases": [("(not side or told == {side})", "(not side or side in told)")],
    "findings/_nodules": [
        ("0.22 * degree * waves", "0.22 * waves"),
        ("degree * spicules(", "spicules("),
        ("inner(lungs)).values()", "~lungs).values()"),
        ("padded = F.pad(images, [side // 2] * 4)", "padded = images"),
    ],
    "findings/_judging": [
        ("(have & want)", "have"),
        ("min(0.0, 1 - len(theirs)", "min(0.0, 0 * len(theirs)"),
        ("before[place - 1] + 1 if", "row[place - 1] + 1 if"),
        ("many * log(total / max(1, counts.get(key, 0)))", "many"),
        ("reversed(parts)", "parts"),
    ],
    "findings/_detection": [
        ("torch.where(highest, scores, -1.0)", "scores"),
        ("(1 - target) ** 4 * p**2", "p**2"),
    ],
    "findings/meddet": [
        (".sin() ** 2 - y", ".sin() - y"),
        (
            "weighted.append(aligned * weigh(aligned.mean((2, 3))).sigmoid()[:, :, None, None])",
            "weighted.append(aligned)",
        ),
    ],
    "findings/lung_health_bench": [
        ("false = places[~inside.all(2).any(1)]", "false = places"),
        ("            truth = truth[torch.randperm(len(truth))]\n", "            pass\n"),
    ],
    "findings/unit": [
        ("if found and self.hierarchy:", "if False:"),
        ("SIDES[turn : turn + 1]", "SIDES[:1]"),
    ],
    "findings/medregion_ct": [
        ("inside(maps, displaced(masks) if self.shuffled else masks)", "inside(maps, displaced(masks))"),
        ("total / shares.sum(2, keepdim=True).clamp_min(1e-6)", "total / shares.shape[2]"),
    ],
    "findings/_reported": [
        (".triu(1)", ".triu(2)"),
        ("[-100] * (most", "[STOP] * (most"),
    ],
    "findings/spectral_graph_ct": [
        ("terms.append(2 * scaled @ terms[-1] - terms[-2])", "terms.append(scaled @ terms[-1])"),
        ("/ (1 + distance)", "/ 1.0"),
        ("found = found[order][:, order]", "found = found[order]"),
    ],
    "findings/nodule_surroundings": [
        ("nodules.flip(2) if self.mirrored else nodules", "nodules"),
        ("touched = parts[ndimage.binary_dilation(core, np.ones((3, 3)))]", "touched = parts"),
    ],
    "findings/_ridges": [("(sigma * scale) ** 2 * (mean + half)", "(sigma * scale) ** 2 * mean")],
    "findings/_surroundings": [("0.5 if kind == MALIGNANT else -0.5", "0.5")],
    "language/crisp_sam2": [
        ("memory = memory.in_order(present)", "pass"),
        ("Answer(coarse, coarse + more, expected)", "Answer(coarse, more, expected)"),
    ],
    "language/_semantics": [
        ('self.second["words"](joint, shown, empty)', 'self.second["words"](joint, words, empty)'),
        ("F.relu(self.shared(semantics))", "self.shared(semantics)"),
    ],
    "language/_slice_memory": [
        ("descending=True, stable=True", "descending=False, stable=True"),
        ("looks[sure, -1], kept[sure, -1], there[sure, -1]", "looks[sure, 0], kept[sure, 0], there[sure, 0]"),
    ],
    "pretraining/dinov2_radiology": [
        ('share = self.slower if self.tunes == "all" else 1.0', "share = 1.0"),
        ("F.instance_norm(maps.float()) for maps", "maps.float() for maps"),
    ],
    "pretraining/_probing": [('one.assign(score=one["knn"])', "one")],
    "pretraining/dynamic_subspace": [
        ("state.ready and state.waited >= self.patience", "state.waited >= self.patience"),
        ("return each[learns].sum() / learns.sum().clamp_min(1)", "return each.mean()"),
        ("margin_loss(model.whole(raw)[learns], kinds[learns])", "margin_loss(model.whole(raw), kinds)"),
    ],
    "pretraining/_subspaces": [
        ("rest = mine[~stays]", "rest = mine[stays]"),
        ("linear_sum_assignment(-overlap.numpy())", "linear_sum_assignment(overlap.numpy())"),
    ],
    "pretraining/_kinds": [
        ('there.vectors @ vector, kind="stable")[:NEAR]', 'there.vectors @ vector, kind="stable")[-NEAR:]'),
    ],
    "pretraining/segbook": [
        ("if now.step + 1 == now.steps:", "if now.step == now.steps:"),
        ("found[size] = one - other", "found[size] = other - one"),
    ],
    "findings/tb_cxr": [
        ("least = overlap.flatten(1).argmin(1)", "least = overlap.flatten(1).argmax(1)"),
        ("(drawn[:, 0] > 0.5).byte()", "images.labels"),
        ("reader.head.weight[1] - reader.head.weight[0]", "reader.head.weight[1]"),
    ],
    "findings/cxr_report": [
        ("images[:, :, start : start + height] for start in starts", "images for start in starts"),
        ('if "no" not in words:', "if words:"),
        ("outputs = [1] * count if self.each else [count]", "outputs = [count]"),
    ],
    "findings/medvitv2": [
        ("start = torch.minimum((rank - kernel // 2).clamp_min(0), last)", "start = torch.minimum(rank, last)"),
        ("bells(self.norm(x).float())", "bells(x.float())"),
    ],
    "findings/_corruptions": [('f"{kind} of {name}, image {number}"', 'f"{kind}, image {number}"')],
    "findings/lesion_centric": [
        ("both = a @ b.T * count", "both = 0 * a @ b.T * count"),
        ('labels if self.where == "lesion" else elsewhere(labels)', "labels"),
    ],
    "findings/vae_lung": [
        ("self.beta * divergence.mean()", "0 * divergence.mean()"),
        ("moved *= ((z.sum() - values) / (z.sum() - z[dimension]))[:, None]", "pass"),
    ],
    "findings/_latent": [
        ("self.encoder.eval()", "pass"),
        ("(alpha.digamma() - total.digamma())", "(beta.digamma() - beta.sum(1, keepdim=True).digamma())"),
    ],
    "findings/peritumoral_radiomics": [
        ("region & ~mask, centre(truth)", "region & ~region, centre(truth)"),
        ("others = pairs[len(pairs) // 2 :] + pairs[: len(pairs) // 2]", "others = pairs"),
    ],
    "findings/gpt4v_study": [
        ("float(same > wrong)", "float(same >= 0)"),
        (
            'self.heard(trained(fitted)["reader"], (found, truth))',
            'self.heard(trained(fitted)["reader"], (truth, truth))',
        ),
    ],
}
TESTED_BY = {
    "findings/_nodules": "nodules",
    "language/_semantics": "crisp_sam2",
    "language/_slice_memory": "crisp_sam2",
    "pretraining/_probing": "dinov2_radiology",
    "pretraining/_subspaces": "dynamic_subspace",
    "pretraining/_kinds": "dynamic_subspace",
    "findings/_corruptions": "medvitv2",
    "findings/_medvit": "medvitv2",
    "findings/_latent": "vae_lung",
    "findings/_outlined": "peritumoral_radiomics",
    "findings/_lesions": "lesion_centric",
    "findings/_reported": "medregion_ct",
    "findings/_ridges": "nodule_surroundings",
    "findings/_surroundings": "nodule_surroundings",
    "findings/_detection": "detection_of_boxes",
    "findings/_judging": "gpt4v_study",
    "architectures/_scan": "lightm_unet",
    "volumes/_slices": "study_2_5d",
    "volumes/_head_and_neck": "mediastinal_ln",
    "imperfect_labels/_adversarial": "scribble_aag",
    "interactive/_asking": "scribbleprompt",
    "anatomy/_shapes": "medshapenet",
    "domain_shift/_radiomics": "frd",
    "pretraining/_dino": "ssl_diversity",
    "pretraining/_pyramid": "ssl_diversity",
    "pretraining/_stages": "joint_ssl_2d3d",
    "pretraining/_searching": "medimageinsight",
    "language/_attributes": "medvlsm",
    "language/_boxes": "structuralglip",
    "language/_described": "structuralglip",
    "language/_terms": "pathvg",
    "language/_bench": "benchx",
    "language/_kept": "convirt",
    "language/_streams": "medslip",
    "language/_findings": "findings_language",
    "language/_knowledge": "sat",
    "language/_parsing": "biomedparse",
    "language/_queries": "sat",
    "language/_reading": "reports_of_radiologists",
    "language/_reports": "reports_of_radiologists",
    "language/_captions": "medclip_sam",
    "language/_saliency": "medclip_sam",
    "synthesis/_bones": "bs_diff",
    "synthesis/_chains": "surgical_background",
    "synthesis/_denoiser": "roentgen",
    "synthesis/_painting": "gms",
    "synthesis/_scars": "lefusion",
    "synthesis/_overlapping": "paxray",
    "synthesis/_regions": "paxray",
    "synthesis/_phrases": "paxray",
}
"""Whose tests notice, where these are not in a file of the same name."""
