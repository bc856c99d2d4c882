"""Fingerprints: they move with what a method does, and are computed once for each state of the source."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from medcook import fingerprints
from medcook.cohorts import RaterTask
from medcook.fingerprints import agree, behaviour, fingerprint, source_hash
from medcook.methods import Supervised
from medcook.recipes.domain_shift.graphecho import GraphEcho

METHOD = Supervised(channels=(4, 8))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def reference() -> dict[str, float]:
    return fingerprint(METHOD)


@pytest.fixture
def counted(monkeypatch) -> list:
    """The methods whose fingerprint was computed, not read."""
    computed = []
    monkeypatch.setattr(fingerprints, "fingerprint", lambda method: computed.append(method) or {"loss": 1.0})
    return computed


def test_agreement_is_to_a_thousandth():
    one = {"loss": 1.0, "dice": 0.5}
    assert agree(one, {"loss": 1.001, "dice": 0.499})
    assert not agree(one, {"loss": 1.002, "dice": 0.5}) and not agree(one, {"loss": 1.0, "dice": 0.502})
    assert agree(one, {"loss": 1.015, "dice": 0.5}, tolerance=0.02)
    assert not agree(one, {"loss": 1.03, "dice": 0.5}, tolerance=0.02)
    assert not agree(one, {"loss": 1.0})
    assert agree({"operations": 1046.8}, {"operations": 1046.827}), "of large numbers, evidence keeps five digits"
    assert not agree({"operations": 1046.8}, {"operations": 1049.0})


def test_a_fingerprint_is_the_same_each_time(reference):
    assert fingerprint(METHOD) == reference and set(reference) == {"loss", "dice"}
    assert 0 < reference["dice"] < 1


class Shrinking(Supervised):
    """The same settings, another mechanism."""

    def training_step(self, nets, labelled, unlabelled, step):
        return 0.5 * super().training_step(nets, labelled, unlabelled, step)


class Semi(Shrinking):
    """Half of each batch is unlabelled."""

    uses_unlabelled = True


class OfOneRater(Supervised):
    """Learns from the second rater, where there are raters."""

    rater = 1

    def training_step(self, nets, labelled, unlabelled, step):
        if labelled.raters is not None:
            labelled = labelled._replace(labels=labelled.raters[:, self.rater])
        return super().training_step(nets, labelled, unlabelled, step)


class OfRaters(OfOneRater):
    """The same, and its trial has raters."""

    trial = RaterTask("embedded", labelled=2)


class OfAnother(OfRaters):
    """The third rater."""

    rater = 2


CHANGED = {
    "loss": replace(METHOD, loss="dice"),
    "rate": replace(METHOD, rate=1e-3),
    "augmentation": replace(METHOD, augmentation=replace(METHOD.augmentation, rotate=5)),
    "training step": Shrinking(channels=(4, 8)),
    "unlabelled": Semi(channels=(4, 8)),
}


@pytest.mark.parametrize("method", CHANGED.values(), ids=CHANGED)
def test_a_changed_mechanism_moves_it(method, reference):
    assert not agree(fingerprint(method), reference)


def test_what_only_its_own_trial_shows_moves_it_too(reference):
    plain, second, third = (fingerprint(kind(channels=(4, 8))) for kind in (OfOneRater, OfRaters, OfAnother))
    assert agree(plain, reference)
    assert not agree(second, reference) and not agree(third, second)


def test_it_is_computed_once(counted, tmp_path):
    assert behaviour(METHOD) == behaviour(METHOD) == {"loss": 1.0} and counted == [METHOD]
    behaviour(replace(METHOD, rate=1e-4))
    assert len(counted) == 2
    assert [json.loads(path.read_text()) for path in (tmp_path / "fingerprints").iterdir()] == [{"loss": 1.0}] * 2


def test_changed_source_is_computed_again(counted, monkeypatch):
    behaviour(METHOD)
    monkeypatch.setattr(fingerprints, "source_hash", lambda kind: "another state of the source")
    behaviour(METHOD)
    assert len(counted) == 2


def hash_with(monkeypatch, changed: str, kind: type = Supervised) -> str:
    """The source hash of a method as if the file of this name held one byte more."""
    original = Path.read_bytes
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", lambda path: original(path) + b"#" * (path.name == changed))
        source_hash.cache_clear()
        found = source_hash(kind)
    source_hash.cache_clear()
    return found


@pytest.mark.parametrize("name", ["training.py", "method.py", "losses.py", "transforms.py", "unet.py", "embedded.py"])
def test_the_core_is_part_of_the_source(name, monkeypatch):
    assert hash_with(monkeypatch, name) != source_hash(Supervised)


def test_what_cannot_change_a_run_is_not(monkeypatch):
    assert hash_with(monkeypatch, "plots.py") == source_hash(Supervised)


def test_the_recipe_of_a_method_is_part_of_its_source(tmp_path, monkeypatch):
    module = ModuleType("medcook.recipes.made_up")
    module.__file__ = str(tmp_path / "made_up.py")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    found = set()
    for content in ("a = 1", "a = 2"):
        Path(module.__file__).write_text(content)
        found.add(source_hash(type("MadeUp", (Supervised,), {"__module__": module.__name__})))
    assert len(found) == 2 and source_hash(Supervised) not in found


def test_what_a_recipe_imports_from_its_neighbours_is_part_of_its_source(monkeypatch):
    same = source_hash(GraphEcho)
    assert hash_with(monkeypatch, "_adversarial.py", GraphEcho) != same, "_output_space.py imports it"
    assert hash_with(monkeypatch, "ripu.py", GraphEcho) == same
