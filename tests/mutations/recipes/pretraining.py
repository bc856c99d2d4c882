"""Deliberate errors in recipes of `pretraining`."""

ERRORS = {
    "bpd_finetune": [
        ("model.freeze(self.frozen(now))", "model.freeze((False,) * len(STAGES))"),
        ("return mixed, partner, 1 - inside", "return mixed, partner, inside"),
        ("shares = SHARES if self.progressive else", "shares ="),
    ],
    "medimageinsight": [
        ("meets(facts, (self.new,)) == new", "True"),
        (
            "numbers = torch.cat([numbers, image_labels(unlabelled.raters[:some, 0], len(model.sentences))])",
            "numbers = torch.cat([numbers, numbers[:some]])",
        ),
    ],
    "_searching": [
        ("np.fill_diagonal(similarity, -np.inf)", "pass"),
        ("ill = np.sort(scores[findings == 1])", "ill = np.sort(scores)"),
    ],
    "chexworld": [
        ("truth = torch.cat([truth, other(truth)])", "truth = torch.cat([truth, truth])"),
        ("torch.cat([scene.shift, -scene.shift])", "torch.cat([scene.shift, scene.shift])"),
        ("contexts = changed(views, actions) if self.domains else views", "contexts = views"),
    ],
    "lvm_med": [
        ("(indicators(found) - indicators(pushed))", "(indicators(pushed) - indicators(found))"),
        ("* (there + back.T)", "* (there + back)"),
        ("joined * edge_affinity(*found), counts + joined", "joined * edge_affinity(*found), counts"),
    ],
    "mis_fm": [
        ("share = (k.float() / levels)[:, None]", "share = (k.float() / (levels + 1))[:, None]"),
        ("background.roll(1, dims=0)", "background"),
    ],
    "voco": [
        ("(y - alike).abs()", "alike"),
        ("(side - distance).clamp_min(0) / side", "1 - distance / side"),
    ],
    "med3d": [
        ("each[labels == k].mean() for k in shown", "each[labels == k].sum() for k in shown"),
        ("found[mine] = labels[mine.roll(1)]", "found[mine] = labels[mine]"),
    ],
    "gl_contrast": [
        ("positive = (same | here & other_volume)", "positive = (same | here)"),
        (
            "torch.cat([self.augmentation.intensity(images.images, rng) for _ in range(2)])",
            "torch.cat([self.augmentation(images.images, None, rng)[0] for _ in range(2)])",
        ),
        ("(where.place * count).long()", "(where.place * 2).long()"),
    ],
    "joint_ssl_2d3d": [
        ("        q = q / q.sum(0, keepdim=True)\n", "        q = q / q.sum()\n"),
        ("return rest + REACH * apart * moves", "return rest + moves * 0"),
        ("shown = torch.where(where[..., None], self.token, slices)", "shown = slices"),
        ("hidden_error(slices.detach(),", "hidden_error(slices,"),
    ],
    "_stages": [("one_cycle(*self.stage(then)[1])", "one_cycle(*then)")],
    "_dino": [
        ("((scores - centre) / TEACHER_HEAT)", "(scores / TEACHER_HEAT)"),
        ("if number != other", "if number <= other"),
        ("self.centre.lerp_(torch.cat(teacher).mean(0), 1 - CENTRE)", "pass"),
        ("(torch.rand(count, 2, generator=rng) * 2 - 1) * (1 - side)[:, None]", "torch.zeros(count, 2)"),
    ],
    "ssl_diversity": [("net.conv1.weight.sum(1, keepdim=True)", "net.conv1.weight.mean(1, keepdim=True)")],
    "_pyramid": [("x = smooth(fine + F.interpolate", "x = smooth(0 * fine + F.interpolate")],
    "barlow_swin": [
        ("(z - z.mean(0)) / (z.std(0, unbiased=False) + 1e-5)", "z - z.mean(0)"),
        ("LAMBDA * (found.square().sum() - own.square().sum())", "LAMBDA * found.square().sum()"),
        ("heads, side, shift) for shift in (0, 1)", "heads, side, shift) for shift in (0, 0)"),
        ("return self.inner(x) + self.around(x)", "return self.inner(x)"),
    ],
    "dinov2_radiology": [
        ('share = self.slower if self.tunes == "all" else 1.0', "share = 1.0"),
        ("F.instance_norm(maps.float()) for maps", "maps.float() for maps"),
    ],
    "_probing": [('one.assign(score=one["knn"])', "one")],
    "dynamic_subspace": [
        ("state.ready and state.waited >= self.patience", "state.waited >= self.patience"),
        ("return each[learns].sum() / learns.sum().clamp_min(1)", "return each.mean()"),
        ("margin_loss(model.whole(raw)[learns], kinds[learns])", "margin_loss(model.whole(raw), kinds)"),
    ],
    "_subspaces": [
        ("rest = mine[~stays]", "rest = mine[stays]"),
        ("linear_sum_assignment(-overlap.numpy())", "linear_sum_assignment(overlap.numpy())"),
    ],
    "_kinds": [
        ('there.vectors @ vector, kind="stable")[:NEAR]', 'there.vectors @ vector, kind="stable")[-NEAR:]'),
    ],
    "segbook": [
        ("if now.step + 1 == now.steps:", "if now.step == now.steps:"),
        ("found[size] = one - other", "found[size] = other - one"),
    ],
}
TESTED_BY = {
    "_probing": "dinov2_radiology",
    "_subspaces": "dynamic_subspace",
    "_kinds": "dynamic_subspace",
    "_dino": "ssl_diversity",
    "_pyramid": "ssl_diversity",
    "_stages": "joint_ssl_2d3d",
    "_searching": "medimageinsight",
}
"""Whose tests notice, where these are not in a file of the same name."""
