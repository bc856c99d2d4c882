"""The model card's scores, by one command: `python -m medcook.sam.card` measures (resuming) and writes MODEL_CARD.md.

With `--development` only some training patients of the development sets are scored, for weights that may still change.

acdc and hippocampus are development sets: the design was chosen on their training patients, so they are scored on their
test patients. No choice was made on chest_xray, bubil and openkbp: the card reads them once a state of the model.
"""

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from medcook.data import open_dataset
from medcook.errors import MedcookError
from medcook.evaluation import evaluate_many, evaluate_test_many
from medcook.sam import zero_shot
from medcook.sam.checkpoints import SMALL, load_small
from medcook.sam.classical import COMPETITORS
from medcook.sam.predictor import Predictor
from medcook.statistics import RESAMPLES

HERE = Path(__file__).parent
SCORES, CARD = HERE / "scores.json", HERE / "MODEL_CARD.md"
DEVELOPMENT, READ_ONCE = ("acdc", "hippocampus"), ("chest_xray", "bubil", "openkbp")
WATCHED = {"acdc": slice(30, 36), "hippocampus": slice(30, 42)}
"""Training patients of the development sets that the design was chosen on."""
MARGIN = 0.02
"""By how much the small SAM may be worse than the best competitor on a structure."""
SAME = 0.01
"""How far answers on simulated images may lie apart for the model to count as the same, on another machine."""
OURS = "small SAM"


def measure(dataset: str) -> pd.DataFrame:
    """The rows of `zero_shot.score` of one set, their mean a patient: test patients; all where nothing was chosen."""
    data = open_dataset(dataset)
    methods = {OURS: mask_of(Predictor(load_small())), **COMPETITORS}
    bar = tqdm(desc=dataset, unit="case", leave=False)

    def score(methods, case) -> list[dict]:
        bar.update()
        found = zero_shot.targets(dataset, case, data.manifest.structures)
        return zero_shot.score(methods, found).to_dict("records")

    tables = [evaluate_test_many({"all": methods}, data, f"model card {dataset}", score)["all"]]
    if dataset in READ_ONCE and dataset != "chest_xray":  # 138 test patients are enough there
        tables.append(evaluate_many({"all": methods}, data, data.split.train + data.split.val, score)["all"])
    bar.close()
    table = pd.concat(tables, ignore_index=True)
    identity = ["dataset", "patient_id", "structure", "method", "prompt"]
    return table.groupby(identity, sort=False, as_index=False)["dice"].mean()


def mask_of(predictor: Predictor) -> zero_shot.Promptable:
    """A predictor as the protocol asks it: the mask that it trusts most."""
    return lambda image, prompt: predictor(image, prompt).mask


def measured(path: Path = SCORES, processes: int = 1) -> pd.DataFrame:
    """All rows; sets that were not measured for this model are, and what is measured is kept in `path`."""
    if not SMALL.exists():
        hint = "Make them: python -m medcook.sam.pretraining --out FOLDER, then python -m medcook.sam.export FOLDER."
        raise MedcookError(f"{SMALL}: the small SAM's weights are not there.", hint)
    weights, said = sha256(SMALL.read_bytes()).hexdigest()[:12], answers()
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("weights") != weights or not np.allclose(kept.get("answers", np.nan), said, atol=SAME):
        kept = {"weights": weights, "answers": said, "sets": {}}
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        jobs = {pool.submit(measure, name): name for name in (*DEVELOPMENT, *READ_ONCE) if name not in kept["sets"]}
        for job in as_completed(jobs):
            table = job.result()
            kept["sets"][jobs[job]] = table.assign(dice=table["dice"].round(4)).to_dict("list")
            path.write_text(json.dumps(kept) + "\n")
    return stored(path)


def answers() -> list[float]:
    """Dice of answers to a box and to clicks on three noisy ellipses; they move when what is asked or answered does."""
    rng, ask, found = np.random.default_rng(0), mask_of(Predictor(load_small())), []
    rows, columns = np.indices((96, 128)) + 0.5
    for x, y, width in ((40, 50, 30), (80, 40, 18), (64, 48, 10)):
        mask = ((columns - x) / width) ** 2 + ((rows - y) / 14) ** 2 < 1
        image = (mask + rng.normal(0, 1.2, mask.shape)).astype(np.float32)
        target = zero_shot.Target("simulated", "", "disc", image, mask)
        found += [zero_shot.from_box(ask, target), *zero_shot.from_clicks(ask, target).values()]
    return [round(value, 3) for value in found]


def stored(path: Path = SCORES) -> pd.DataFrame:
    """The committed rows, whatever the weights; MedcookError where there are none."""
    if not path.exists():
        raise MedcookError(f"{path}: the small SAM has not been scored.", "Score it: python -m medcook.sam.card.")
    kept = json.loads(path.read_text(encoding="utf-8"))
    return pd.concat([pd.DataFrame(columns) for columns in kept["sets"].values()], ignore_index=True)


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice by (set, structure, prompt) over patients, a column a method."""
    by = ["dataset", "structure", "prompt", "method"]
    patients = rows.groupby([*by, "patient_id"])["dice"].mean()
    return patients.groupby(by).mean().unstack("method")


def against_best(rows: pd.DataFrame, prompt: str, seed: int = 0) -> dict:
    """The small SAM minus the competitor with the best macro-mean: macro difference with its interval, worst structure.

    Patients are resampled within their set; the macro-mean is over set x structure.
    """
    rows = rows[rows["prompt"] == prompt]
    table = means(rows).droplevel("prompt")
    best = table.drop(columns=OURS).mean().idxmax()
    gain = table[OURS] - table[best]
    wide = rows.groupby(["dataset", "structure", "patient_id", "method"])["dice"].mean().unstack("method")
    drawn = list(_resampled(wide[OURS] - wide[best], np.random.default_rng(seed)))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {
        "competitor": best,
        "macro": float(table[OURS].mean()),
        "its macro": float(table[best].mean()),
        "gain": float(gain.mean()),
        "low": float(low),
        "high": float(high),
        "worst": " ".join(gain.idxmin()),
        "worst gain": float(gain.min()),
    }


def _resampled(gains: pd.Series, rng: np.random.Generator) -> Iterator[float]:
    """Macro-means of gains indexed by (dataset, structure, patient_id), patients of each set drawn anew."""
    sets = [
        part.unstack("structure") for _, part in gains.droplevel("dataset").groupby(gains.index.get_level_values(0))
    ]
    tables = [table.to_numpy() for table in sets]
    for _ in range(RESAMPLES):
        drawn = [table[rng.integers(len(table), size=len(table))] for table in tables]
        with np.errstate(all="ignore"):
            yield float(np.nanmean(np.concatenate([np.nanmean(part, axis=0) for part in drawn])))


def card(rows: pd.DataFrame) -> str:
    """The part of the model card that is measured, as Markdown."""
    lines = [
        "| prompt | small SAM | best competitor | gain [95% interval] | worst structure |",
        "|---|---|---|---|---|",
    ]
    for prompt in ["box", *(f"{k} click{'s' * (k > 1)}" for k in zero_shot.CLICKS)]:
        found = against_best(rows, prompt)
        interval = f"{found['gain']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
        rival = f"{found['competitor']} {found['its macro']:.3f}"
        lines.append(
            f"| {prompt} | {found['macro']:.3f} | {rival} | {interval} | {found['worst']} {found['worst gain']:+.3f} |"
        )
    table = means(rows)
    names = [OURS, *COMPETITORS]
    lines += ["", f"| set | structure | prompt | patients | {' | '.join(names)} |", "|---" * (4 + len(names)) + "|"]
    patients = rows.groupby(["dataset", "structure"])["patient_id"].nunique()
    for (dataset, structure, prompt), line in table.iterrows():
        values = " | ".join(f"{line[name]:.3f}" for name in names)
        lines.append(f"| {dataset} | {structure} | {prompt} | {patients[dataset, structure]} | {values} |")
    return "\n".join(lines)


def development() -> pd.DataFrame:
    """Mean Dice by (prompt, method) and structure on `WATCHED` training patients, which the design was chosen on."""
    model = load_small()
    methods = {
        OURS: mask_of(Predictor(model)),
        f"{OURS}, box not filled": mask_of(Predictor(model, tight=False)),
        f"{OURS}, one look": mask_of(Predictor(model, zoom=False)),
        f"{OURS}, bfloat16": mask_of(Predictor(model, precision="bfloat16")),
        **COMPETITORS,
    }
    rows = []
    for dataset, patients in WATCHED.items():
        data = open_dataset(dataset)
        for case in data.cases(data.split.train[patients]):
            rows.append(zero_shot.score(methods, zero_shot.targets(dataset, case, data.manifest.structures)))
    rows = pd.concat(rows)
    rows = rows[(rows["prompt"] == "box") | (rows["method"] != f"{OURS}, box not filled")]
    return rows.groupby(["prompt", "method", "structure"], sort=False)["dice"].mean().unstack("structure")


def development_card(table: pd.DataFrame) -> str:
    """The development scores as Markdown, with each method's mean over structures; prompts from the box onwards."""
    table = table.assign(mean=table.mean(axis=1))
    lines = [f"| prompt | method | {' | '.join(table.columns)} |", "|---" * (2 + len(table.columns)) + "|"]
    for prompt in table.index.unique("prompt"):
        for name, row in table.xs(prompt, level="prompt").iterrows():
            lines.append(f"| {prompt} | {name} | {' | '.join(f'{value:.3f}' for value in row)} |")
    return "\n".join(lines)


BEGIN, END = "<!-- scores: python -m medcook.sam.card -->", "<!-- end of scores -->"
DRAFT = "<!-- development: python -m medcook.sam.card --development -->", "<!-- end of development -->"


def put(text: str, begin: str, end: str, content: str) -> str:
    """The text with new content between two marks."""
    return f"{text.split(begin)[0]}{begin}\n{content}\n{end}{text.split(end)[1]}"


def main() -> None:
    """Measure what is asked for, and write it into the card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--development", action="store_true")
    parser.add_argument("--processes", type=int, default=1, help="sets measured at the same time")
    asked = parser.parse_args()
    if asked.development:
        marks, content = DRAFT, development_card(development())
    else:
        marks, content = (BEGIN, END), card(measured(processes=asked.processes))
    text = CARD.read_text(encoding="utf-8") if CARD.exists() else f"# The small SAM\n\n{marks[0]}{marks[1]}\n"
    CARD.write_text(put(text, *marks, content), encoding="utf-8")


if __name__ == "__main__":
    main()
