"""Studies: what is wrong is an error that names the key."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tiny import ROOT, tiny_study

from piebridge.config import (
    KEEP_LATENTS,
    METHODS,
    Study,
    StudyError,
    build_folder,
    load_study,
    notebook_study,
    study_folder,
)
from piebridge.methods import REGISTRY


def load(tmp_path, text, overrides=""):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return load_study(path, overrides)


def test_methods_are_the_registry():
    assert set(METHODS) == set(REGISTRY)
    assert len(METHODS) == len(set(METHODS))


def test_empty_study_has_the_defaults_and_its_files_name(tmp_path):
    assert load(tmp_path, "") == Study(name="mine")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("nonsense: 1", "nonsense"),
        ("training: {epoch: 3}", "training.epoch"),
        ("cloud: {subnets: [{width: 0.5}, {widht: 0.5}]}", "cloud.subnets.1.widht"),
        ("training: {epochs: many}", "training.epochs"),
        ("training: {epochs: 0}", "training.epochs"),
        ("training: {momentum: 1.0}", "training.momentum"),
        ("routing: {cost: 1.5}", "routing.cost"),
        ("elastic: {rho: 0}", "elastic.rho"),
        ("elastic: {interval: 0}", "elastic.interval"),
        ("elastic: {budget: 0.5}", "elastic.budget"),
        ("prune: {lasso_share: 1}", "prune.lasso_share"),
        ("prune: {threshold: 0}", "prune.threshold"),
        ("data: {name: cifar}", "data.name"),
        ("backbone: {resolution: 8}", "backbone.resolution"),
        ("cloud: {subnets: [{width: 0}]}", "cloud.subnets.0.width"),
        ("training: {methods: [pet, magic]}", "training.methods.1"),
        ("training: {methods: []}", "training.methods"),
        ("training: {learning_rate: {magic: 0.1}}", "magic"),
        ("training: {regime: other}", "training.regime"),
        ("training: {crop_area: 0}", "training.crop_area"),
        ("training: {learning_rate: {pet: -1}}", "training.learning_rate.pet"),
        ("training: 3", "training"),
        ("backbone: {resolution: 32}\ncloud: {subnets: [{resolution: 64}]}", "64"),
        ("backbone: {name: resnet18}", "characters"),
        ("name:", "name"),
        ("1: 2", "1"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, named):
    with pytest.raises(StudyError) as error:
        load(tmp_path, text)
    assert named in str(error.value)
    assert "mine.yaml" in str(error.value)


@pytest.mark.parametrize("method", KEEP_LATENTS)
def test_no_latents_are_kept_in_the_augmented_regime(method):
    with pytest.raises(StudyError, match=rf"training\.methods: .*{method} keeps latents.*leave {method} out"):
        tiny_study(f"training.regime=augmented training.methods='[pet, {method}]'")


def test_default_methods_are_those_that_the_regime_allows():
    assert tiny_study().training.methods == METHODS
    augmented = tiny_study("training.regime=augmented")
    assert set(augmented.training.methods) == set(METHODS) - {"cached", "piebridge_cached"}
    assert tiny_study("training.regime=augmented training.methods='[fixed, pet]'").training.methods == ("fixed", "pet")
    assert Study.model_validate_json(augmented.model_dump_json()) == augmented


def test_unknown_key_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(StudyError, match="width"):
        load(tmp_path, "cloud: {subnets: [{widht: 0.5}]}")


@pytest.mark.parametrize("text", ["[1, 2]", "just words"])
def test_a_study_is_a_mapping(tmp_path, text):
    with pytest.raises(StudyError, match="mapping"):
        load(tmp_path, text)


def test_invalid_yaml(tmp_path):
    with pytest.raises(StudyError, match=r"mine\.yaml: not valid YAML"):
        load(tmp_path, "training: {epochs: 3")


def test_exponents_are_numbers(tmp_path):
    text = "cloud: {learning_rate: 1e-3}\ntraining: {learning_rate: {pet: 2e-2}, learning_rates: [1e-1]}"
    study = load(tmp_path, text)
    assert study.cloud.learning_rate == 1e-3
    assert study.training.learning_rate == {"pet": 0.02}
    assert study.training.learning_rates == (0.1,)


def test_overrides_win(tmp_path):
    overrides = "training.epochs=3 seed=1 cloud.learning_rate=1e-4 training.methods='[pet, full]' pet.kind=lora"
    study = load(tmp_path, "training: {epochs: 9, batch_size: 2}", overrides)
    assert (study.training.epochs, study.training.batch_size, study.seed) == (3, 2, 1)
    assert study.cloud.learning_rate == 1e-4
    assert study.training.methods == ("pet", "full")
    assert study.pet.kind == "lora"


@pytest.mark.parametrize(
    "overrides", ["training.epochs", "=3", "seed=[1", "seed.deep=1", "training.epoch=3", "seed=-1", "seed='1"]
)
def test_bad_overrides(tmp_path, overrides):
    with pytest.raises(StudyError, match="override"):
        load(tmp_path, "seed: 0", overrides)


@given(st.integers(1, 10_000), st.floats(1e-6, 10.0))
def test_any_number_survives_an_override(epochs, rate):
    study = tiny_study(f"training.epochs={epochs} cloud.learning_rate={rate!r}")
    assert (study.training.epochs, study.cloud.learning_rate) == (epochs, rate)


def test_missing_study_is_answered_with_the_present_ones():
    with pytest.raises(StudyError, match="embedded"):
        load_study("no_such_study")


def test_a_study_is_found_by_name():
    assert load_study("embedded") == load_study(ROOT / "params" / "embedded.yaml")


def test_fingerprints_differ_with_any_value():
    studies = [tiny_study(), tiny_study("seed=1"), tiny_study("training.epochs=4"), tiny_study("pet.kind=lora")]
    assert len({study.fingerprint() for study in studies}) == len(studies)
    assert tiny_study().fingerprint() == tiny_study().fingerprint()
    assert study_folder(studies[0]) != study_folder(studies[1])


def test_the_build_folder_is_the_variables(build):
    assert build_folder() == build
    assert study_folder(tiny_study()).is_relative_to(build)


def test_a_study_is_immutable():
    with pytest.raises(ValueError, match="frozen"):
        tiny_study().seed = 3


def test_a_resolved_study_loads_again(tmp_path):
    study = tiny_study("training.epochs=5")
    again = load(tmp_path, yaml.safe_dump(study.model_dump(mode="json")))
    assert again == study


def test_a_notebook_takes_study_and_overrides():
    namespace = {"study": "embedded", "overrides": "seed=3", "_hidden": 1, "In": [], "get_ipython": None}
    assert notebook_study(namespace) == load_study("embedded", "seed=3")


def test_a_notebook_rejects_other_parameters():
    with pytest.raises(StudyError, match="nonsense"):
        notebook_study({"study": "embedded", "overrides": "", "nonsense": 1})


def test_a_notebook_reads_its_parameters_again_in_a_live_session():
    namespace = {"study": "embedded", "overrides": ""}
    notebook_study(namespace)
    namespace |= {"own_name": 1, "overrides": "seed=2"}
    assert notebook_study(namespace).seed == 2


def test_every_field_is_described():
    def undescribed(model, place):
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                yield from undescribed(field.annotation, f"{place}{name}.")
            elif not field.description:
                yield place + name

    assert list(undescribed(Study, "")) == []


def test_copies_are_one_number_a_folder():
    with pytest.raises(StudyError, match="2 numbers for 1 folders"):
        tiny_study("'cloud.copies=[2, 1]'")
    assert tiny_study("'cloud.data=[a, b]' 'cloud.copies=[2, 1]'").cloud.copies == (2, 1)
