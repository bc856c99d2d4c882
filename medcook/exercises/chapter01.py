"""Checks of chapter 01's exercises."""

import numpy as np

from medcook.exercises import exercise, expect, expect_close


@exercise("01/window")
def check_window(to_unit):
    hounsfield = np.array([-2000.0, -160.0, 40.0, 140.0, 240.0, 3000.0])
    expect_close(to_unit(hounsfield, 40, 400)[2], 0.5, "the level itself lies in the middle: 0.5")
    expect_close(to_unit(hounsfield, 40, 400)[[1, 4]], [0, 1], "half of the width lies below the level, half above")
    expect_close(to_unit(hounsfield, 40, 400), [0, 0, 0.5, 0.75, 1, 1], "outside the window everything is 0 or 1")
    expect_close(
        to_unit(hounsfield, -600, 1500)[1], 440 / 1500 + 0.5, "try another window: lung, level -600, width 1500"
    )
    expect_close(to_unit(hounsfield[:, None], 40, 400).shape, [6, 1], "keep the shape of the image")


@exercise("01/volume")
def check_volume(volume_ml):
    mask = np.zeros((4, 10, 10), bool)
    mask[1:3, 2:7, 2:7] = True
    expect_close(volume_ml(mask, (1.0, 1.0, 1.0)), 0.05, "50 voxels of 1 cubic mm; a ml has 1000 cubic mm")
    expect_close(volume_ml(mask, (6.0, 2.0, 0.5)), 0.3, "a voxel's volume is the product of all three sizes")
    expect_close(volume_ml(mask & False, (6.0, 2.0, 2.0)), 0.0, "an empty mask has no volume")
    expect(volume_ml(mask, None) is None, "without a spacing the volume is not known: return None, never a guess")


@exercise("01/split")
def check_split(split_cases):
    case_ids = [
        f"patient{person:02d}_frame{frame:02d}" for person in range(1, 21) for frame in (1, 2, 3)[: 1 + person % 3]
    ]
    train, test = split_cases(case_ids, 0.2, seed=0)
    expect(sorted([*train, *test]) == case_ids, "every case belongs to exactly one part")
    people = [{case_id.split("_")[0] for case_id in part} for part in (train, test)]
    expect(not people[0] & people[1], "a patient has cases in both parts: shuffle patients, not cases")
    expect(len(people[1]) == 4, f"a fifth of 20 patients is 4, and your test part has {len(people[1])}")
    again = split_cases(list(reversed(case_ids)), 0.2, seed=0)
    expect(
        sorted(again[1]) == sorted(test), "the same seed must give the same patients, whatever the order of the list"
    )
    draws = {tuple(sorted(split_cases(case_ids, 0.2, seed=seed)[1])) for seed in range(5)}
    expect(len(draws) > 1, "another seed should draw other patients")
