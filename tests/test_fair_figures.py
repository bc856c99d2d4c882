"""Pictures of groups: counts, means and rates against their definition, and figures that show them."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from medcook import fair_evidence, pooled, statistics
from medcook import fair_figures as fair
from medcook.data.manifests import load_manifest
from medcook.measures.fairness import by_group, gap_test


def cases(gap: float = 0.2, replicates: int = 2, count: int = 20) -> pd.DataFrame:
    """Dice of `count` patients, every fourth in a small group that is `gap` lower."""
    rng, parts = np.random.default_rng(0), []
    small = np.arange(count) % 4 == 0
    for replicate in range(replicates):
        dice = 0.9 - gap * small + rng.normal(0, 0.01, count)
        table = pd.DataFrame({"dice": dice, "group": np.where(small, "south", "north"), "replicate": replicate})
        parts.append(table.assign(patient_id=[f"p{number}" for number in range(count)], arm="net"))
    return pd.concat(parts, ignore_index=True)


def audited(count: int = 24, replicates: int = 2) -> pd.DataFrame:
    rng, parts = np.random.default_rng(1), []
    names = ("score", "age_score", "site_score", "finding_score", "drained_score", "first", "second")
    for replicate in range(replicates):
        number = np.arange(count)
        table = pd.DataFrame({name: rng.random(count) for name in names}).assign(replicate=replicate, arm="net")
        for name, period in (("outcome", 2), ("age_outcome", 3), ("site_outcome", 4), ("finding_outcome", 5)):
            table[name] = (number % period == 0).astype(float)
        table["group"] = [f"south {'old' if n % 3 else 'young'} {'woman' if n % 2 else 'man'}" for n in number]
        parts.append(table.assign(patient_id=[f"p{n}" for n in number]))
    return pd.concat(parts, ignore_index=True)


def bars(axes) -> list[float]:
    """Where the error bars' middles are."""
    return [float(part[0].get_xdata()[0]) for part in axes.containers]


def test_groups_show_their_means_and_their_size():
    frame = cases()
    figure = fair.group_figure({"net": frame, "again": frame}, "embedded")
    table = by_group(frame)
    assert sorted(bars(figure.axes[0])) == pytest.approx(sorted([*table["mean"]] * 2))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["north (n = 15)", "south (n = 5)"]


def test_a_group_of_one_patient_has_no_interval():
    frame = cases(count=4)
    axes = fair.group_figure({"net": frame}, "embedded").axes[0]
    assert len(axes.containers) == 2 and sum(part.has_xerr for part in axes.containers) == 1


def test_the_null_is_drawn_beside_the_gap():
    frame = cases().assign(coin=lambda rows: np.where(rows["patient_id"].str[1:].astype(int) % 2, "a", "b"))
    left, right = fair.null_figure(frame, "embedded", {"site": "group", "coin": "coin"}).axes
    assert left.lines[1].get_xdata()[0] == pytest.approx(gap_test(frame).gap)
    assert left.lines[0].get_xdata()[0] == pytest.approx(gap_test(frame).chance)
    assert "north 15, south 5" in left.get_title() and "a 10, b 10" in right.get_title()


def test_the_table_of_gaps_says_which_are_noise():
    frame = cases().assign(coin=lambda rows: np.where(rows["patient_id"].str[1:].astype(int) // 4 % 2, "a", "b"))
    table = fair.gap_table(frame, {"site": "group", "coin": "coin"})
    assert table["verdict"].tolist() == ["more than noise", "not told from noise"]
    assert table.loc["site", "gap"].startswith(f"{gap_test(frame).gap:.3f}")
    assert "south 0.6" in table.loc["site", "means (n)"] and "(5)" in table.loc["site", "means (n)"]


def test_words_become_columns():
    frame = pd.DataFrame({"group": ["south young man", "north woman", None]})
    found = fair.in_words(frame, {"sex": ("woman", "man"), "age": ("young", "old")})
    assert found[["sex", "age"]].to_numpy().tolist() == [["man", "young"], ["woman", ""], ["", ""]]


def test_rates_count_what_the_threshold_calls():
    frame = pd.DataFrame({"score": [0.9, 0.5, 0.2, 0.4, 0.6], "outcome": [1, 1, 1, 0, 0], "sex": ["F"] * 5})
    found = fair.rates(frame, 0.5, "sex").loc["F"]
    assert (found["sensitivity"], found["sensitivity n"]) == (pytest.approx(2 / 3), 3)
    assert (found["specificity"], found["specificity n"]) == (0.5, 2)
    assert found["sensitivity low"] < 2 / 3 < found["sensitivity high"]
    assert np.isnan(fair.rates(frame[frame["outcome"] == 1], 0.5, "sex").loc["F", "specificity"])


def test_the_threshold_view_shows_one_run_and_every_patient():
    rows = fair.in_words(audited(), {"sex": ("woman", "man")})
    rows = rows.assign(score=rows["finding_score"], outcome=rows["finding_outcome"])
    left, right = fair.threshold_view(rows, "sex", 0.3, "embedded").axes
    assert sum(len(line.get_xdata()) for line in left.lines[:-1]) == 24
    table = fair.rates(fair.first_run(rows), 0.3, "sex")
    assert sorted(bars(right)) == pytest.approx(sorted([*table["sensitivity"], *table["specificity"]]))
    assert {text.get_text() for text in right.texts} == {
        f"n = {count}" for count in [*table["sensitivity n"], *table["specificity n"]]
    }


def test_the_plane_and_subgroups_show_every_patient_once():
    rows = fair.in_words(audited(), {"sex": ("woman", "man"), "age": ("young", "old")})
    figure = fair.plane_figure(rows, ["sex", "age"], "embedded")
    assert [sum(len(line.get_xdata()) for line in axes.lines) for axes in figure.axes] == [24, 24]
    columns = ["subgroup", "patients", "diseased", "auc", "low", "high"]
    table = pd.DataFrame([["all", 9, 4, 0.8, 0.6, 0.9], ["one", 1, 0, np.nan, np.nan, np.nan]], columns=columns)
    axes = fair.subgroup_figure({"net": table}, "embedded").axes[0]
    assert bars(axes) == [0.8] and [text.get_text() for text in axes.texts] == ["4 of 9", "0 of 1"]


def test_audit_frames_are_what_the_columns_say():
    frame = audited()
    asked = fair_evidence.probed(frame, ["net"])
    assert asked["older"]["net"]["score"].tolist() == frame["age_score"].tolist()
    kinds = fair_evidence.drained(frame, ["net"])
    ill = frame["finding_outcome"] == 1
    drained = kinds["the ill have a simulated drain"]["net"]["score"]
    assert (drained[ill] == frame["drained_score"][ill]).all() and (drained[~ill] == frame["finding_score"][~ill]).all()
    _, axes = fair.plots.panels(size=(5, 3))
    fair.draw_auc(axes, kinds, "AUC")
    wanted = [statistics.interval(kinds[kind]["net"], "auc").mean for kind in kinds]
    assert bars(axes) == pytest.approx(wanted)


def test_tested_under_is_the_mean_auc_of_the_runs():
    frame = audited().assign(
        score_full=lambda rows: rows["score"], score_without=0.5, score_only=lambda r: r["outcome"]
    )
    table = fair_evidence.tested_under(frame, ["net"])
    runs = [pooled.auc(part["score"].to_numpy(), part["outcome"].to_numpy()) for _, part in frame.groupby("replicate")]
    assert table.loc["net"].tolist() == pytest.approx([np.mean(runs), 0.5, 1.0])
    _, axes = fair.plots.panels(size=(5, 3))
    fair_evidence.draw_tested(axes, table)
    assert [text.get_text() for text in axes.texts][1:] == ["0.50", "1.00"]


def test_both_formulas_are_drawn():
    frame = cases()
    _, axes = fair.plots.panels(size=(5, 3))
    fair_evidence.draw_equity(axes, frame, ["net"])
    wanted = [statistics.interval(frame, name).mean for name in ("equity_scaled_dice", "equity_scaled_dice_std")]
    assert bars(axes) == pytest.approx(wanted)


def test_sheets_show_a_panel_for_each_image_and_way():
    images = torch.rand(2, 1, 8, 8)
    figure = fair.view_sheet({"whole": images, "nothing": images * 0}, load_manifest("embedded"), ["one", "two"])
    assert len(figure.axes) == 4 and "Simulated" in figure._supxlabel.get_text()
    truth = torch.zeros(2, 8, 8, dtype=torch.bool)
    truth[:, 2:5, 2:5] = True
    maps = {"everywhere": [images[0, 0], images[1, 0]], "guided": [images[0, 0] * 0] * 2}
    regions = {"everywhere": [truth | True] * 2, "guided": [truth[0]] * 2}
    notes = {name: ["a", "b"] for name in maps}
    manifest = load_manifest("embedded")
    figure = fair.saliency_sheet(images[:, 0], truth, maps, manifest, regions=regions, notes=notes)
    assert len(figure.axes) == 6 and figure.axes[1].get_title() == "everywhere\na"
    assert [len(axes.collections) for axes in figure.axes[1:3]] == [1, 2], "a region that is everything has no border"


def test_the_worst_of_every_group_are_shown():
    from medcook.data import open_dataset

    data = open_dataset("embedded")
    names = data.split.val[:3]
    frame = pd.DataFrame({"case_id": names, "dice": [0.9, 0.1, 0.5], "group": ["north", "north", "south"]})
    task = SimpleNamespace(data=data)
    figure = fair.worst_of_groups(SimpleNamespace(task=task, predict=lambda case: case.label), frame, count=1)
    titles = [axes.get_title() for axes in figure.axes if "reference" in axes.get_title()]
    assert titles == [
        f"{who} of {n}\nDice {dice}\nreference"
        for who, n, dice in [("north, median", 2, "0.90"), ("north, low", 2, "0.10"), ("south, median", 1, "0.50")]
    ]


def test_explanations_come_with_their_cost():
    class Method:
        def explain(self, nets, image, seed):
            return image[0], 7

        def region(self, nets, image, seed):
            return image[0] > 0

    samples = SimpleNamespace(images=torch.rand(3, 1, 4, 4), labels=torch.ones(3, 4, 4))
    task = SimpleNamespace(samples=lambda role: samples)
    fitted = SimpleNamespace(task=task, nets=torch.nn.ModuleDict(), weights={"last": {}})
    found = fair.explain(fitted, {"mine": Method()}, [2, 0], lambda saliency, truth: 0.25)
    assert (
        torch.equal(found["images"], samples.images[[2, 0], 0]) and found["notes"]["mine"][0] == "Dice 0.25, 7 windows"
    )
