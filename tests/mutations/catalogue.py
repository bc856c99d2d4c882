"""Deliberate errors: what is changed in which file, and the tests that must notice."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """`old` stands exactly once in medcook/<file>; with `new` in its place some test of tests/<tests> must fail."""

    file: str
    old: str
    new: str
    tests: str


METRICS = [
    (
        "return 2 * overlap / (n_pred + n_truth) if n_pred + n_truth else 1.0",
        "return 2 * overlap / (n_pred + n_truth or 1)",
    ),
    ("union = n_pred + n_truth - overlap", "union = n_pred + n_truth"),
    ("far = average = diagonal(pred.shape, spacing) if n_pred", "far = average = diagonal(pred.shape) if n_pred"),
    ("float(max(np.percentile(forth, percentile)", "float(min(np.percentile(forth, percentile)"),
    ("missed=n_truth > 0 and n_pred == 0", "missed=n_pred == 0"),
    ("distance_transform_edt(~truth_edge, sampling=steps)", "distance_transform_edt(~truth_edge)"),
    ("found[[0, -1]] = False", "pass"),
]
LOSSES = [
    ("return total / (labels != IGNORE).sum().clamp_min(1)", "return total / labels.numel()"),
    ("soft = logits.softmax(1)[:, 1:] * known[:, None]", "soft = logits.softmax(1)[:, 1:]"),
]
EVALUATION = [
    ('annotated = case.attributes.get("annotated", structures)', "annotated = structures"),
    ("count = len(log) - before", "count = len(log)"),
    ("dataset, dataset.split.test, score)", "dataset, dataset.split.val, score)"),
]
VERDICTS = [
    ("if low > bar and all(value > replicate_bar for value in per_replicate):", "if low > bar:"),
    ('if profile == "quick" or len(per_replicate) < MIN_REPLICATES:', 'if profile == "quick":'),
    ('if profile == "paper" and data == "real":', 'if profile == "paper":'),
    ("return -high, -low,", "return -low, -high,"),
    ('return quality if cost_ratio < 1 else "not supported"', "return quality"),
]
STATISTICS = [
    ("np.maximum.accumulate(given[order] * factors)", "given[order] * factors"),
    ('on=keys, how="outer"', 'on=keys, how="inner"'),
    ("2 * float(beyond + 1) / (len(samples) + 1)", "2 * float(beyond) / len(samples)"),
    (
        '(np.isfinite(table).sum(axis=0) == 1).all() else "crossed"',
        '(np.isfinite(table).sum(axis=0) == 1).any() else "crossed"',
    ),
    ("means.unstack", "means.rank().unstack"),
]
SPLITS = [
    ("if sum(map(len, groups)) != len(set().union(*groups)):", "if False:"),
    ("patients = sorted(self.train + self.val)", "patients = sorted(self.train + self.val + self.test)"),
    ('random.Random(f"draw {draw}").shuffle(order)', "random.shuffle(order)"),
]
DOOR = [("if not _open_for:", "if False:"), ("_open_for.pop()", "pass")]
AUGMENTATION = [
    ('grid, mode="nearest", align_corners=False)[:, 0]', 'grid, mode="bilinear", align_corners=False)[:, 0]'),
    ("= -torch.sin(angles), torch.sin(angles)", "= torch.sin(angles), torch.sin(angles)"),
    (" + draw(self.brightness)", ""),
    ("mirror = torch.randint(0, 2, (batch, 1), generator=rng) * 2.0 - 1", "mirror = -1.0"),
]
SUMMARIES = [
    ("data = weakest_kind(run.data for run in everything)", "data = first.data"),
    ('"missed": int(frame.missed.sum())', '"missed": 0'),
    ("cost_a / cost_b if cost_a", "cost_b / cost_a if cost_a"),
    ("gains(recipe.metric, *bounds", 'gains("dice", *bounds'),
    ("test_reads=sum(", "test_reads=len(everything) or sum("),
]
POOLED = [
    ("(is_nested(frame) and not own_scale)", "is_nested(frame)"),
    ("- negative / 2)).sum(1)", ")).sum(1)"),
    ("ranks = np.cumsum(count, axis=1) - (count - 1) / 2", "ranks = np.cumsum(count, axis=1)"),
]
PROMPTS = [
    ("missing if largest_part(missing) >= largest_part(extra) else", "missing if missing.sum() >= extra.sum() else"),
    ("distance_transform_edt(np.pad(largest, 1))", 'distance_transform_edt(np.pad(largest, 1, mode="edge"))'),
    ("float(columns[-1] + 1), float(rows[-1] + 1)", "float(columns[-1]), float(rows[-1])"),
]
PREDICTOR = [
    ("return torch.where(inside, shifted, shifted.clamp_max(-1))", "return shifted"),
    ("shifted = logits - THRESHOLDS", "shifted = logits + THRESHOLDS"),
    ("self.remembered.pop(key, None) for key", "self.remembered.get(key) for key"),
]
VIEWS = [
    ("weights = iou.clamp(0.01, 1) * obedience(chances, prompt)", "weights = iou.clamp(0.01, 1)"),
    ("best = int((2 * both / total.clamp_min(1) @ weights).argmax())", "best = 8"),
    ("return mean.clamp(1e-6, 1 - 1e-6).logit() - CUTS[best].logit(), overlap", "return mean.logit(eps=1e-6), overlap"),
    ("max(share * max(shape), AROUND * apart, SMALLEST_OF_CLICKS)", "max(share * max(shape), SMALLEST_OF_CLICKS)"),
    ("step = side / (COARSE if apart < side / 4 else FINE)", "step = side / COARSE"),
    ("(range(round(end / step) + 1) for end in shape)", "(range(round(end / step)) for end in shape)"),
]
SAM3 = [
    ("(torch.arange(samples) + 0.5) * length / samples", "torch.arange(samples) * length / samples"),
    ('for name in sorted(found["missing_keys"]):', "for name in ():"),
    ('asked["input_boxes"] = centred(box, image.shape)', 'asked["input_boxes"] = torch.full((1, 1, 4), 0.5)'),
    ("return (square * 2 - 1).expand(1, 3, side, side)", "return square.expand(1, 3, side, side)"),
]
PAXRAY = [
    ("label[mask] = value", "label[mask & (label == 0)] = value"),
    ("if sides.setdefault(entry.patient, entry.part) != entry.part:", "if False:"),
]
SYNTHESIS = [
    ("if then.step < learning:", "if then.step <= learning:"),
    ("many = round(self.mixed * len(images))", "many = len(images)"),
    ("self.labels = torch.cat([self.labels, labels])", "self.labels = torch.cat([labels, self.labels])"),
    ("saved = state[prefix + name]", "saved = getattr(self, name)"),
]
PROJECTIONS = [
    ("mu = soft + EXCESS * (mu - soft)", "mu = soft + (mu - soft)"),
    ("for part in (mu, soft, bone)]) * length", "for part in (mu, soft, bone)])"),
    ("top + rows * beam.pixel / along", "rows * beam.pixel / along"),
    ("xrays = images[:, :1]", "xrays = images[:, -1:]"),
]
CORE = {
    ("data/sets/paxray.py", "data/sets/test_paxray.py"): PAXRAY,
    ("synthesis.py", "test_synthesis.py"): SYNTHESIS,
    ("projections.py", "test_projections.py"): PROJECTIONS,
    ("metrics.py", "test_metrics.py"): METRICS,
    ("losses.py", "test_losses.py"): LOSSES,
    ("evaluation.py", "test_evaluation.py"): EVALUATION,
    ("verdicts.py", "test_verdicts.py"): VERDICTS,
    ("statistics.py", "test_statistics.py"): STATISTICS,
    ("data/splits.py", "data/test_splits.py"): SPLITS,
    ("data/splits.py", "test_evaluation.py"): DOOR,
    ("data/transforms.py", "data/test_transforms.py"): AUGMENTATION,
    ("pooled.py", "test_pooled.py"): POOLED,
    ("sam/prompts.py", "sam/test_prompts.py"): PROMPTS,
    ("sam/predictor.py", "sam/test_predictor.py"): PREDICTOR,
    ("sam/views.py", "sam/test_views.py"): VIEWS,
    ("sam/model.py", "sam/test_model.py"): [
        ("(query * self.scale @ key.transpose(1, 2))", "(query @ key.transpose(1, 2))"),
    ],
    ("sam/sam3.py", "recipes/sam_adaptation/test_medical_sam3.py"): SAM3,
    ("data/embedded.py", "data/test_embedded.py"): [
        ("return deepcopy(simulated(case_id))", "return simulated(case_id)"),
    ],
    ("sam/card.py", "sam/test_card.py"): [
        ("best = table.drop(columns=OURS).mean().idxmax()", "best = table.drop(columns=OURS).mean().idxmin()"),
    ],
    ("summaries.py", "test_summaries.py"): SUMMARIES,
    ("methods/method.py", "test_methods.py"): [
        ("list(model.parameters()), 1 - decay)", "list(model.parameters()), decay)"),
    ],
    ("methods/semi_supervised.py", "methods/test_semi_supervised.py"): [
        ("layer.momentum = 0.0", "pass"),
        ("if time < 0:", "if time < -1:"),
    ],
    ("volumes.py", "test_volumes.py"): [
        ("return second / first", "return first / second"),
        ("end = min(number - there[0], there[-1] - number)", "end = number - there[0]"),
    ],
    ("imperfect.py", "test_imperfect.py"): [
        ("batch.labels + 1, grid)", "batch.labels, grid)"),
        ("return self._everyone[1::2]", "return self._everyone[::2]"),
        ("labels = torch.where(known, samples.labels, IGNORE)", "labels = samples.labels"),
        ("limit = np.quantile(noise, 1 - amount,", "limit = np.quantile(noise, 1 - amount / 2,"),
        ("return torch.where(inside, drawn, IGNORE)", "return drawn"),
    ],
    ("data/readers/stl.py", "data/readers/test_stl.py"): [
        (".cumsum(axis=0) % 2 == 1", ".cumsum(axis=0) > 0"),
    ],
    ("data/sets/medshapenet.py", "data/sets/test_medshapenet.py"): [
        ("(patient, structure) if patient", "(name, structure) if patient"),
    ],
    ("domains.py", "test_domains.py"): [
        ("self._everyone[1::2] if self.look", "self._everyone[::2] if self.look"),
        ("return zscore(torch.from_numpy(values).float())", "return torch.from_numpy(values).float()"),
        ("dict.fromkeys(self.source_patients, PLAIN), self.look)", "{}, self.look)"),
        ("return () if self.known is None else", "return"),
        ("samples.raters, groups)", "samples.raters)"),
        ('return case.attributes.get("look") or', "return"),
    ],
    ("domain_figures.py", "test_domain_figures.py"): [
        ("np.interp(ranks.numpy(),", "np.interp(1 - ranks.numpy(),"),
        ("seen = as_shown(case, look)", "seen = case"),
    ],
    ("networks/caformer.py", "recipes/pretraining/test_surgenetxl.py"): [
        ("x = self.res_scale1(x) + self.token_mixer", "x = x + self.token_mixer"),
        ('if not name.startswith("head.")', "if name"),
        ("x = F.relu(self.pwconv1(x)).permute(0, 3, 1, 2)", "x = self.pwconv1(x).permute(0, 3, 1, 2)"),
    ],
    ("networks/unicl.py", "recipes/pretraining/test_medimageinsight.py"): [
        ("torch.arange(len(x)), tokens.argmax(1)", "torch.arange(len(x)), -1"),
        ("src_key_padding_mask=mask == 0", "src_key_padding_mask=None"),
    ],
    ("training.py", "training/test_runs_end_the_same.py"): [
        ('nets.load_state_dict(weights["last"])\n            return', "return"),
    ],
    ("pretraining.py", "test_pretraining.py"): [
        ("return not self.waits", "return True"),
        ("patients = self.unlabelled_patients if own else data.split.train", "patients = data.split.train"),
        ("torch.full_like(found.labels, IGNORE) if own else found.labels", "found.labels"),
        ("kept = images.flatten(1).std(1) > 0.1 * spread", "kept = images.flatten(1).std(1) > -1"),
        ("return batch if (batch.labels == IGNORE).all() else super()", "return super()"),
        ("super().after_step(nets, then)", "super().after_step(nets, now)"),
        ("self.optimizer.state.clear()", "pass"),
        ("(self.pretext_rate if is_pretext else self.rate)", "self.rate"),
        ("similarity.fill_diagonal_(-math.inf)", "pass"),
        ("* PLACES // counts", "* PLACES // counts.max()"),
    ],
    ("pretraining_figures.py", "test_pretraining_figures.py"): [
        ("found, seen = [], {int(case_of[query])}", "found, seen = [], set()"),
        ("vectors - vectors.mean(0) * centre", "vectors"),
        ("order < round(share * rows * columns)", "order <= round(share * rows * columns)"),
    ],
    ("shape_figures.py", "test_shape_figures.py"): [
        ("normals @ LIGHT", "-normals @ LIGHT"),
        ("for axes in figure.axes for corner in axes.seen", "for axes in figure.axes[:1] for corner in axes.seen"),
    ],
    ("imperfect_figures.py", "test_imperfect_figures.py"): [
        ("(given != truth) & (given != IGNORE)", "given != truth"),
        ("return int(torch.where(kinds == kinds.max(), sizes, -1).argmax())", "return int(sizes.argmax())"),
    ],
    ("interactive.py", "test_interactive.py"): [
        ("marks | torch.stack([clicks & more, clicks & ~more], dim=1)", "marks | torch.stack([clicks] * 2, dim=1)"),
        ("MEANT if sizes[MEANT] >= sizes[BESIDE] else BESIDE", "MEANT"),
        (
            "return replace(samples, labels=torch.where(hidden, IGNORE",
            "return replace(samples, labels=torch.where(hidden, 0",
        ),
        ("answer = logits.detach()", "answer = logits"),
        ("before = method.respond(net, state, marks, before)", "before = method.respond(net, state, marks, None)"),
    ],
    ("interactive_figures.py", "test_interactive_figures.py"): [
        ("before = self.before if self.points < points else None", "before = self.before"),
        (
            "min(int(y), shape[0] - 1), min(int(x), shape[1] - 1)",
            "min(int(x), shape[0] - 1), min(int(y), shape[1] - 1)",
        ),
    ],
    ("fingerprints.py", "test_fingerprints.py"): [("task = method.trial or ", "task = ")],
    ("data/sets/cads.py", "data/sets/test_cads.py"): [
        ("groups[group] + np.uint8(first(group) - 1)", "groups[group]"),
    ],
    ("data/sets/totalsegmentator.py", "data/sets/test_totalsegmentator.py"): [
        ('if row["split"] == part', 'if row["split"]'),
    ],
    ("measures/calibration.py", "measures/test_calibration.py"): [
        ("np.abs(accuracy - confidence)", "(accuracy - confidence)")
    ],
    ("measures/selective.py", "measures/test_selective.py"): [("- math.ceil(share", "- math.floor(share")],
    ("measures/disagreement.py", "measures/test_disagreement.py"): [("found[(votes == top).sum(0) > 1] = 0", "pass")],
    ("measures/fairness.py", "measures/test_fairness.py"): [("p = (1 + np.sum(random", "p = (np.sum(random")],
    ("measures/equity.py", "measures/test_fairness.py"): [("groups.std(ddof=1)", "groups.std()")],
    ("measures/conformal.py", "measures/test_conformal.py"): [
        ("(losses.sum(0) + bound) / (count + 1) <= alpha", "losses.mean(0) <= alpha"),
    ],
}
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
    "synthesis/_regions": [("sums[image, top, left]) / (end", "0) / (end")],
    "synthesis/_phrases": [("(not side or told == {side})", "(not side or side in told)")],
}
TESTED_BY = {
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


def _catalogue() -> list[Mutation]:
    found = [Mutation(file, *change, tests) for (file, tests), changes in CORE.items() for change in changes]
    for recipe, changes in RECIPES.items():
        chapter, name = recipe.split("/")
        tests = TESTED_BY.get(recipe, name)
        found += [Mutation(f"recipes/{recipe}.py", *one, f"recipes/{chapter}/test_{tests}.py") for one in changes]
    return found


MUTATIONS = _catalogue()
