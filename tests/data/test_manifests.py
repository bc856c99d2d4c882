"""Every manifest is valid and complete; a typo is found and named."""

import pytest
import yaml

from medcook.data.datasets import READERS, open_dataset
from medcook.data.manifests import load_manifest, manifest_names
from medcook.errors import MedcookError
from medcook.paths import MANIFESTS

NAMES = [
    *("acdc", "aeropath", "bubil", "cactus", "cads", "chest_imagenome", "chest_xray", "chestxray8", "chexmask_u"),
    *("embedded", "fairseg", "hippocampus", "kits21", "med_glip", "medshapenet", "medtrinity", "ncl_sm", "openkbp"),
    *("pathvg", "paxray", "radgenome_ct", "rexgroundingct", "totalsegmentator"),
]


def test_all_sets_are_there_and_the_decathlon_has_ten_tasks():
    names = manifest_names()
    assert [name for name in names if "/" not in name] == NAMES
    assert [name[4:10] for name in names if name.startswith("msd/")] == [f"Task{n:02d}" for n in range(1, 11)]


@pytest.mark.parametrize("name", manifest_names())
def test_manifest_agrees_with_itself(name):
    manifest = load_manifest(name)
    assert manifest.name == name and manifest.reader in READERS
    assert sorted(manifest.classes) == manifest.facts.label_values
    assert manifest.access == "embedded" or manifest.registry or manifest.archive or manifest.apply_at
    for path in filter(None, [manifest.registry, manifest.splits]):
        assert (MANIFESTS / path).exists()
    if manifest.registry:
        dataset = open_dataset(name)
        assert (len(dataset.index()), len(dataset.patients)) == (manifest.facts.cases, manifest.facts.patients)


def write(folder, **changes):
    content = yaml.safe_load((MANIFESTS / "acdc.yaml").read_text()) | changes
    (folder / "acdc.yaml").write_text(yaml.safe_dump(content))


def test_typo_in_a_field_is_named(tmp_path):
    write(tmp_path, lisence="CC BY")
    with pytest.raises(MedcookError, match="acdc.yaml: field 'lisence'"):
        load_manifest("acdc", tmp_path)


def test_wrong_value_is_named(tmp_path):
    write(tmp_path, access="secret")
    with pytest.raises(MedcookError, match="acdc.yaml: field 'access'"):
        load_manifest("acdc", tmp_path)


def test_broken_yaml_is_named(tmp_path):
    (tmp_path / "acdc.yaml").write_text("name: [acdc")
    with pytest.raises(MedcookError, match="acdc.yaml: "):
        load_manifest("acdc", tmp_path)
