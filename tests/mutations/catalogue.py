"""Deliberate errors: what is changed in which file, and the tests that must notice."""

from typing import NamedTuple

from .recipes import RECIPES, TESTED_BY


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
PATHVG = [
    ("if OR not in slide:", "if True:"),
    ("accuracy=(iou > least)", "accuracy=(iou >= least)"),
]
AEROPATH = [
    ('label[masks["airways"]] = AIRWAYS', 'label[masks["airways"] & ~masks["lungs"]] = AIRWAYS'),
    ("if not np.array_equal(stored, mask * value):", "if False:"),
]
TREES = [
    ("found[there] / length[there] >= least", "found[there] / length[there] > least"),
    ("centre_line(truth), largest_part(guess)", "centre_line(truth), guess"),
]
DECATHLON = [
    ("np.moveaxis(image.array, -1, 0) if", "image.array if"),
    ('["training"]', '["test"]'),
]
SYNTHESIS = [
    ("if then.step < learning:", "if then.step <= learning:"),
    ("many = round(self.mixed * len(images))", "many = len(images)"),
    ("self.labels = torch.cat([self.labels, labels])", "self.labels = torch.cat([labels, self.labels])"),
    ("saved = state[prefix + name]", "saved = getattr(self, name)"),
]
REXGROUNDINGCT = [
    ("if entry.part == self.sides[entry.patient]:", "if True:"),
    ("return tuple(values[str(number)] for number in range(len(values)))", "return tuple(values.values())"),
    ("label[masks[number]] = value or IGNORE", "label[masks[number] & (label == 0)] = value or IGNORE"),
]
NCL_SM = [
    ("bool(2 * inside[role][number] > area[number])", "bool(inside[role][number])"),
    ("np.flatnonzero(area > SMALLEST)", "np.flatnonzero(area >= SMALLEST)"),
]
CACTUS = [
    ("match[2].upper() if match else view", "match[0] if match else view"),
    ('shown = table["view"].to_numpy() != VIEWS[0]', 'shown = table["view"].to_numpy() != ""'),
]
MEDTRINITY = [
    ("np.full(shape, 0 if boxes else IGNORE, np.uint8)", "np.full(shape, 0, np.uint8)"),
    ("(not inside.size or inside.mean() < 0.1)", "True"),
]
MED_GLIP = [
    ("or (mask & ~boxed(region, AROUND)).any()", "or False"),
    ("or min(box.width, box.height) <= 0 or over > EDGE:", "or min(box.width, box.height) <= 0:"),
    ("points[:, ::-1] - 0.5)", "points[:, ::-1])"),
    ("(runs[-2] if len(runs) > 2 else 0)", "(runs[-2] if len(runs) > 1 else 0)"),
]
CHEST_IMAGENOME = [
    ("np.argsort(-np.prod(", "np.argsort(np.prod("),
    ('if same != here.partition("_")[2]:', "if False:"),
]
CHESTXRAY8 = [
    ('own if over == "found" else own +', "own +"),
    ("np.full(shape, 0 if boxes else IGNORE, np.uint8)", "np.zeros(shape, np.uint8)"),
]
RADGENOME_CT = [
    ('(("structure", "anatomy", place), ("region"', '(("structure", "region", region), ("region"'),
    ("label[read_mask(path, label.shape)] = value", "label[read_mask(path, label.shape) & (label == 0)] = value"),
]
LANGUAGE = [
    ("src_key_padding_mask=empty", "src_key_padding_mask=None"),
    ("self.words(rows) + self.places[: rows.shape[1]]", "self.words(rows)"),
    ("return (words * there).sum(1) / there.sum(1)", "return words.mean(1)"),
    ("return maps * (1 + scale) + shift", "return maps * scale + shift"),
    ("mask[label == IGNORE] = IGNORE", "pass"),
    ("(1, 2) if each else (0, 1, 2)", "(0, 1, 2)"),
    ("number == group and number in self.partial", "False"),
    ("if name and value not in", "if value not in"),
]

PROJECTIONS = [
    ("mu = soft + EXCESS * (mu - soft)", "mu = soft + (mu - soft)"),
    ("for part in (mu, soft, bone)]) * length", "for part in (mu, soft, bone)])"),
    ("top + rows * beam.pixel / along", "rows * beam.pixel / along"),
    ("xrays = images[:, :1]", "xrays = images[:, -1:]"),
]
CORE = {
    ("data/sets/paxray.py", "data/sets/test_paxray.py"): PAXRAY,
    ("data/sets/pathvg.py", "data/sets/test_pathvg.py"): PATHVG,
    ("data/sets/aeropath.py", "data/sets/test_aeropath.py"): AEROPATH,
    ("measures/trees.py", "measures/test_trees.py"): TREES,
    ("data/sets/decathlon.py", "data/sets/test_decathlon.py"): DECATHLON,
    ("data/sets/ncl_sm.py", "data/sets/test_ncl_sm.py"): NCL_SM,
    ("data/sets/cactus.py", "data/sets/test_cactus.py"): CACTUS,
    ("data/sets/medtrinity.py", "data/sets/test_medtrinity.py"): MEDTRINITY,
    ("data/sets/med_glip.py", "data/sets/test_med_glip.py"): MED_GLIP,
    ("data/sets/chest_imagenome.py", "data/sets/test_chest_imagenome.py"): CHEST_IMAGENOME,
    ("data/sets/chestxray8.py", "data/sets/test_chestxray8.py"): CHESTXRAY8,
    ("data/sets/radgenome_ct.py", "data/sets/test_radgenome_ct.py"): RADGENOME_CT,
    ("data/sets/rexgroundingct.py", "data/sets/test_rexgroundingct.py"): REXGROUNDINGCT,
    ("synthesis.py", "test_synthesis.py"): SYNTHESIS,
    ("language.py", "test_language.py"): LANGUAGE,
    ("methods/contrastive.py", "recipes/language/test_reports_of_radiologists.py"): [
        ("return image_weight * there + (1 - image_weight) * back", "return (there + back) / 2"),
    ],
    ("data/splits.py", "data/test_tables.py"): [("[: len(everyone) // one_in]", "[:one_in]")],
    ("data/readers/tables.py", "data/test_tables.py"): [('"\\t" if path.suffix == ".txt" else ","', '","')],
    ("networks/unet.py", "networks/test_unet.py"): [("return found[::-1]", "return found")],
    ("networks/flair.py", "recipes/language/test_flair.py"): [
        ("torch.stack([states[1], states[2], states[-1]])", "torch.stack([states[0], states[1], states[-1]])"),
    ],
    ("networks/medal_s.py", "recipes/language/test_medal_s.py"): [
        ("tokens + places, tokens, need_weights", "tokens + places, tokens + places, need_weights"),
        ("self.linear2(self.linear1(self.norm3(queries)).relu())", "self.linear2(self.linear1(queries).relu())"),
        ("there.sum(1).clamp_min(1e-9)", "mask.shape[1]"),
    ],
    ("networks/stable_diffusion.py", "recipes/synthesis/test_roentgen.py"): [
        ("[angles.cos(), angles.sin()]", "[angles.sin(), angles.cos()]"),
        ("noise = untold + guidance * (told - untold)", "noise = told"),
        ("value * F.gelu(gate)", "gate * F.gelu(value)"),
    ],
    ("networks/latents.py", "recipes/synthesis/test_roentgen.py"): [
        ("F.pad(x, (0, 1, 0, 1))", "F.pad(x, (1, 0, 1, 0))"),
        ("return SCALE * self.quant_conv", "return self.quant_conv"),
    ],
    ("language_figures.py", "test_language_figures.py"): [("stacked - stacked.mean(0)", "stacked")],
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
    ("networks/vila.py", "networks/test_vila.py"): [
        ("hidden_states[-2]", "hidden_states[-1]"),
        ("grid.permute(0, 1, 3, 2, 4, 5)", "grid.permute(0, 1, 3, 4, 2, 5)"),
        ("word if tell or word == IMAGE else IGNORED", "word"),
        ("if len(found) == 1 else None", "if found else None"),
    ],
    ("networks/seem.py", "recipes/language/test_biomedparse.py"): [
        ("outside = outside & ~outside.all(2, keepdim=True)", "pass"),
        ("scale = number % SCALES", "scale = 0"),
        ("tokens + token_places, tokens, attn_mask", "tokens + token_places, tokens + token_places, attn_mask"),
    ],
    ("networks/focalnet.py", "recipes/language/test_biomedparse.py"): [
        ("self.h(found / (levels + 1))", "self.h(found)"),
        ("x + self.gamma_2 * self.norm2(self.mlp(x))", "x + self.gamma_2 * self.mlp(self.norm2(x))"),
    ],
    ("networks/biomedparse.py", "recipes/language/test_biomedparse.py"): [
        ("tokens.argmax(1)]", "mask.sum(1) - 2]"),
        (".triu(1)", ".triu(2)"),
        ("(images - mean) / spread", "images / spread"),
    ],
    ("networks/caformer.py", "recipes/pretraining/test_surgenetxl.py"): [
        ("x = self.res_scale1(x) + self.token_mixer", "x = x + self.token_mixer"),
        ('if not name.startswith("head.")', "if name"),
        ("x = F.relu(self.pwconv1(x)).permute(0, 3, 1, 2)", "x = self.pwconv1(x).permute(0, 3, 1, 2)"),
    ],
    ("networks/unicl.py", "networks/test_unicl.py"): [
        ("torch.arange(len(x)), tokens.argmax(1)", "torch.arange(len(x)), -1"),
        ("src_key_padding_mask=mask == 0", "src_key_padding_mask=None"),
    ],
    ("training.py", "training/test_runs_end_the_same.py"): [
        ('nets.load_state_dict(weights["last"])\n            return', "return"),
    ],
    ("image_pool.py", "test_pretraining.py"): [
        ("patients = self.unlabelled_patients if own else data.split.train", "patients = data.split.train"),
        ("torch.full_like(found.labels, IGNORE) if own else found.labels", "found.labels"),
        ("kept = images.flatten(1).std(1) > 0.1 * spread", "kept = images.flatten(1).std(1) > -1"),
        ("* PLACES // counts", "* PLACES // counts.max()"),
    ],
    ("pretraining.py", "test_pretraining.py"): [
        ("return not self.waits", "return True"),
        ("return batch if (batch.labels == IGNORE).all() else super()", "return super()"),
        ("super().after_step(nets, then)", "super().after_step(nets, now)"),
        ("self.optimizer.state.clear()", "pass"),
        ("(self.pretext_rate if is_pretext else self.rate)", "self.rate"),
        ("similarity.fill_diagonal_(-math.inf)", "pass"),
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
    ("measures/instances.py", "measures/test_instances.py"): [
        ("iou > 0.5", "iou >= 0.5"),
        ("np.delete(area, best[touched]).sum()", "0"),
    ],
    ("instance_figures.py", "test_instance_figures.py"): [
        ("count(instances) - count(truth)", "count(truth) - count(instances)"),
    ],
    ("few_shot/supports.py", "few_shot/test_supports.py"): [(".sum((1, 2)).argmax()", ".sum((1, 2)).argmin()")],
    ("teaching.py", "test_teaching.py"): [("if any(text not in shown", "if all(text not in shown")],
    ("notebooks/lint.py", "notebooks/test_lint.py"): [("([^<]{4,})", "([^<]*)")],
    ("evidence.py", "evidence/test_staleness.py"): [
        ("tolerance = recipe.method(summary.profile, arm).trial_tolerance", "tolerance = 1e-3"),
    ],
    ("measures/conformal.py", "measures/test_conformal.py"): [
        ("(losses.sum(0) + bound) / (count + 1) <= alpha", "losses.mean(0) <= alpha"),
    ],
}


def _catalogue() -> list[Mutation]:
    found = [Mutation(file, *change, tests) for (file, tests), changes in CORE.items() for change in changes]
    for recipe, changes in RECIPES.items():
        chapter, name = recipe.split("/")
        tests = TESTED_BY.get(recipe, name)
        found += [Mutation(f"recipes/{recipe}.py", *one, f"recipes/{chapter}/test_{tests}.py") for one in changes]
    return found


MUTATIONS = _catalogue()
