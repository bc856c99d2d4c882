def split_cases(case_ids, test_share, seed):
    """Two lists of case ids (train, test): `test_share` of the patients, with all their cases, are in test."""
    patients = sorted({case_id.split("_")[0] for case_id in case_ids})
    order = np.random.default_rng(seed).permutation(patients)
    held_out = set(order[: round(test_share * len(patients))])
    train = [case_id for case_id in case_ids if case_id.split("_")[0] not in held_out]
    return train, [case_id for case_id in case_ids if case_id.split("_")[0] in held_out]
