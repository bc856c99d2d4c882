"""The model card's scores: who is the best competitor, by how much, and where it is worst."""

import json
from concurrent.futures import Future
from hashlib import sha256

import numpy as np
import pandas as pd
import pytest

from medcook.errors import MedcookError
from medcook.sam import card
from medcook.sam.card import OURS, against_best, means, measured


def rows(ours: dict[str, float], theirs: dict[str, float], patients: int = 12) -> pd.DataFrame:
    """Dice of two competitors and ours: a set `one` with structures a and b, a set `two` with c."""
    rng, found = np.random.default_rng(0), []
    for structure, value in ours.items():
        dataset = "two" if structure == "c" else "one"
        for patient in range(patients):
            for method, mean in (
                (OURS, value),
                ("graph cut", theirs[structure]),
                ("ellipse", 0.1),
                ("random walker", 0.2),
            ):
                for prompt in ("box", "1 click", "3 clicks", "5 clicks"):
                    identity = {"dataset": dataset, "structure": structure, "patient_id": f"p{patient}"}
                    dice = mean + rng.normal(0, 0.01)
                    found.append(identity | {"method": method, "prompt": prompt, "dice": dice})
    return pd.DataFrame(found)


FRAME = rows({"a": 0.9, "b": 0.7, "c": 0.8}, {"a": 0.8, "b": 0.73, "c": 0.6})


def test_the_best_competitor_is_found_and_the_macro_mean_is_over_structures():
    found = against_best(FRAME, "box")
    assert found["competitor"] == "graph cut"
    assert found["gain"] == pytest.approx((0.1 - 0.03 + 0.2) / 3, abs=0.01)
    assert found["low"] < found["gain"] < found["high"] and found["low"] > 0
    assert found["worst"] == "one b" and found["worst gain"] == pytest.approx(-0.03, abs=0.01)
    assert found["macro"] == pytest.approx(means(FRAME).xs("box", level="prompt")[OURS].mean())


def test_the_card_has_a_line_for_every_prompt_and_structure():
    lines = card.card(FRAME).splitlines()
    assert len([line for line in lines if line.startswith(("| box", "| 1 click", "| 3 clicks", "| 5 clicks"))]) == 4
    assert len([line for line in lines if line.startswith(("| one", "| two"))]) == 3 * 4


def test_without_weights_the_way_to_them_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(card, "SMALL", tmp_path / "none.safetensors")
    with pytest.raises(MedcookError, match="weights are not there"):
        measured(tmp_path / "scores.json")


@pytest.fixture
def scores(monkeypatch, tmp_path):
    """A file of scores of all sets, measured for other weights than the shipped ones."""
    weights, path = tmp_path / "weights.safetensors", tmp_path / "scores.json"
    weights.write_bytes(b"weights")
    monkeypatch.setattr(card, "SMALL", weights)
    monkeypatch.setattr(card, "answers", lambda: [0.5, 0.75])
    sets = {name: FRAME.assign(dataset=name).to_dict("list") for name in (*card.DEVELOPMENT, *card.READ_ONCE)}
    path.write_text(json.dumps({"weights": sha256(b"weights").hexdigest()[:12], "answers": [0.5, 0.75], "sets": sets}))
    return path


def test_what_is_measured_for_this_model_is_not_measured_again(scores):
    assert len(measured(scores)) == 5 * len(FRAME)
    assert set(measured(scores, processes=2)["dataset"]) == {*card.DEVELOPMENT, *card.READ_ONCE}


@pytest.mark.parametrize("changed", ["weights", "answers"])
def test_another_model_is_measured_anew(scores, monkeypatch, changed):
    class Here:
        """Runs a job where it is submitted."""

        def __init__(self, *_):
            pass

        __enter__, __exit__ = lambda self: self, lambda *_: None

        def submit(self, job, name):
            done = Future()
            done.set_result(FRAME.assign(dataset=name, dice=0.25))
            return done

    monkeypatch.setattr(card, "ProcessPoolExecutor", Here)
    if changed == "weights":
        card.SMALL.write_bytes(b"others")
    else:
        monkeypatch.setattr(card, "answers", lambda: [0.5, 0.78])
    assert (measured(scores)["dice"] == 0.25).all()
    assert json.loads(scores.read_text())["answers"] == card.answers()


def test_the_committed_scores_are_those_of_what_ships():
    kept = json.loads(card.SCORES.read_text())
    assert kept["weights"] == sha256(card.SMALL.read_bytes()).hexdigest()[:12]
    assert kept["answers"] == pytest.approx(card.answers(), abs=card.SAME)


def test_content_is_put_between_its_marks():
    assert card.put("a <!--b--> old <!--e--> c", "<!--b-->", "<!--e-->", "new") == "a <!--b-->\nnew\n<!--e--> c"


def test_development_scores_are_a_line_a_prompt_and_method():
    index = pd.MultiIndex.from_product([["box", "1 click"], ["ours", "ellipse"]], names=["prompt", "method"])
    table = pd.DataFrame({"wall": [0.5, 0.75, 0, 0], "cavity": [1.0, 0.25, 0, 1]}, index=index)
    lines = card.development_card(table).splitlines()
    assert lines[0] == "| prompt | method | wall | cavity | mean |" and lines[2:] == [
        "| box | ours | 0.500 | 1.000 | 0.750 |",
        "| box | ellipse | 0.750 | 0.250 | 0.500 |",
        "| 1 click | ours | 0.000 | 0.000 | 0.000 |",
        "| 1 click | ellipse | 0.000 | 1.000 | 0.500 |",
    ]
