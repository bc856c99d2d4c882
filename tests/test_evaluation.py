"""The evaluation table, its summary, and the static proof that nothing else opens the test set."""

import ast
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import medcook
from medcook import evaluation
from medcook.data.case import IGNORE, Case
from medcook.data.splits import Split, guard_test
from medcook.errors import MedcookError

PACKAGE = Path(medcook.__file__).parent
STRUCTURES = {1: "left", 2: "right"}


def make_case(patient="p1", spacing=(1.0, 1.0), **attributes):
    label = np.zeros((8, 8), dtype=np.uint8)
    label[1:4, 1:4], label[1:4, 5:8] = 1, 2
    return Case(label[None].astype(np.float32), label, f"{patient}-a", patient, spacing, attributes=attributes)


class FakeDataset:
    """Three train, one val and two test patients, one case each; counts what is read."""

    def __init__(self):
        self.manifest = SimpleNamespace(name="fake", structures=STRUCTURES)
        self.split = Split(("p1", "p2", "p3"), ("p4",), ("t1", "t2"))
        self.read = []

    def cases(self, patients):
        for patient in patients:
            if patient in self.split.test:
                guard_test("fake", patient)
            self.read.append(patient)
            yield make_case(patient)


def perfect(case):
    return case.image[0].astype(np.uint8)


def blind_to_right(case):
    return (case.label == 1).astype(np.uint8)


def test_one_row_per_structure_with_ids_and_flags():
    case = make_case()
    left, right = evaluation.score_case(blind_to_right(case), case, STRUCTURES)
    assert (left["case_id"], left["patient_id"], left["structure"], left["dice"]) == ("p1-a", "p1", "left", 1)
    assert right["missed"] and right["n_voxels"] == 9 and right["unit"] == "mm"


def test_structures_nobody_annotated_are_skipped():
    case = make_case(annotated=[2])
    assert [row["structure"] for row in evaluation.score_case(perfect(case), case, STRUCTURES)] == ["right"]


def test_ignored_voxels_are_left_out():
    case = make_case()
    case.label[1:4, 4] = IGNORE
    prediction = perfect(case)
    prediction[1:4, 4] = 1
    assert evaluation.score_case(prediction, case, STRUCTURES)[0]["dice"] == 1


def test_a_prediction_on_another_grid_is_refused():
    with pytest.raises(MedcookError, match="p1-a"):
        evaluation.score_case(np.zeros((4, 4), np.uint8), make_case(), STRUCTURES)


def test_evaluate_gives_every_case_and_structure():
    frame = evaluation.evaluate(perfect, FakeDataset(), ["p1", "p4"])
    assert len(frame) == 4 and set(frame.patient_id) == {"p1", "p4"} and (frame.dice == 1).all()


def test_many_predictors_share_one_read_of_each_case():
    dataset = FakeDataset()
    tables = evaluation.evaluate_many({"good": perfect, "bad": blind_to_right}, dataset, ["p1", "p2"])
    assert dataset.read == ["p1", "p2"]
    assert tables["good"].dice.mean() == 1 and tables["bad"].dice.mean() == 0.5


def test_test_patients_are_refused_without_the_door():
    with pytest.raises(MedcookError, match="test case"):
        evaluation.evaluate(perfect, FakeDataset(), ["t1"])


def test_evaluate_test_opens_the_door_and_counts_the_reads():
    frame = evaluation.evaluate_test(perfect, FakeDataset(), "finished recipe")
    assert set(frame.patient_id) == {"t1", "t2"}
    assert frame.attrs["reads"] == {"count": 2, "reason": "finished recipe"}
    with pytest.raises(MedcookError):
        evaluation.evaluate(perfect, FakeDataset(), ["t1"])


def test_every_evaluation_counts_its_own_reads():
    for _ in range(2):
        assert evaluation.evaluate_test(perfect, FakeDataset(), "again").attrs["reads"]["count"] == 2


def test_the_door_closes_when_a_predictor_fails():
    with pytest.raises(ZeroDivisionError):
        evaluation.evaluate_test(lambda case: 1 / 0, FakeDataset(), "broken")
    with pytest.raises(MedcookError, match="test case"):
        guard_test("fake", "t1")


def test_summary_counts_misses_beside_the_mean():
    frame = evaluation.evaluate(blind_to_right, FakeDataset(), ["p1", "p2", "p3"])
    table = evaluation.summary(frame)
    assert list(table.index) == ["all", "left", "right"]
    assert table.loc["right", "missed"] == 3 and table.loc["right", "dice"] == 0
    assert table.loc["all", "dice"] == 0.5 and table.loc["all", "patients"] == 3


def sources(folder=PACKAGE):
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in folder.rglob("*.py")}


def mentions(tree, name):
    """Whether a module imports, calls or otherwise names `name`."""
    return any(
        (isinstance(node, ast.Name) and node.id == name)
        or (isinstance(node, ast.Attribute) and node.attr == name)
        or (isinstance(node, ast.alias) and node.name.split(".")[-1] == name)
        or (isinstance(node, ast.Constant) and node.value == name)
        for node in ast.walk(tree)
    )


def test_only_evaluation_opens_the_test_set():
    users = {path for path, tree in sources().items() if mentions(tree, "open_test")}
    assert users <= {"evaluation.py", "data/splits.py"} and "evaluation.py" in users
    assert [ast.unparse(call.func) for call in calls(sources()["evaluation.py"])].count("open_test") == 1


FILE_CALLS = {"open", "exec", "eval", "__import__"}
FILE_METHODS = {"read_text", "read_bytes", "write_text", "write_bytes", "open", "glob", "rglob", "iterdir", "memmap"}
FILE_METHODS |= {"loadtxt", "genfromtxt", "fromfile", "read_csv", "imread", "dcmread", "File", "import_module"}
FILE_MODULES = {"h5py", "nibabel", "pydicom", "imageio", "PIL", "os", "pathlib", "shutil", "subprocess", "io", "glob"}
FILE_MODULES |= {"importlib", "sqlite3", "zipfile", "tarfile", "pickle", "joblib"}
FORBIDDEN_NAMES = {"load", "_reads", "_open_for"}
ROUND_THE_GUARD = {"read", "file", "guard_test"}


def file_access(tree):
    """What a module could read files with, or go round a data set's guard with (`load` of a Dataset is guarded)."""
    modules, found = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FILE_MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in FILE_MODULES else []
            found += [alias.name for alias in node.names if alias.name in FILE_METHODS | FORBIDDEN_NAMES]
    for call in calls(tree):
        root, _, method = ast.unparse(call.func).rpartition(".")
        found += [method] if not root and method in FILE_CALLS else []
        found += [method] if root and method in FILE_METHODS | ROUND_THE_GUARD else []
        found += [f"{root}.load"] if method == "load" and root.split(".")[0] in modules else []
    return found


def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize(
    "code",
    [
        "open('x')",
        "import numpy as np\nnp.load('x')",
        "import torch\ntorch.serialization.load('x')",
        "from numpy import load",
        "import h5py",
        "from pathlib import Path",
        "path.read_bytes()",
        "dataset.read('case')",
        "dataset.file('image.nii')",
    ],
)
def test_the_ban_on_file_access_sees(code):
    assert file_access(ast.parse(code))


def test_the_ban_on_file_access_lets_ordinary_code_pass():
    assert not file_access(ast.parse("import torch\nx = torch.zeros(3).sum()\ny = dataset.load('case')"))


RECIPE_INDEX = "recipes/__init__.py"


def test_recipes_read_no_files():
    recipes = {path: tree for path, tree in sources(PACKAGE / "recipes").items() if path != RECIPE_INDEX}
    assert {path: found for path, tree in recipes.items() if (found := file_access(tree))} == {}
