"""Exact: the config refuses what it does not know, and says what it found."""

import pytest

from onecard.config import ExportConfig, LoraSettings, TrainConfig, make_config
from onecard.documents import read_yaml
from onecard.errors import UserError

GOOD = {"model": "m", "data": "d", "output": "o"}


def test_a_pattern_of_modules_is_a_regular_expression():
    with pytest.raises(UserError, match="regular expression"):
        make_config(LoraSettings, {"target_modules": "(q|v_proj"}, "test")


def test_defaults_are_the_fields_own():
    config = make_config(TrainConfig, GOOD)
    assert (config.quant_type, config.blocksize, config.double_quant) == ("nf4", 64, True)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"block_size": 64}, 'did you mean "blocksize"?'),
        ({"blocksize": 63}, "must be one of 32"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"eval_data": "e", "validation_split": 0.1}, "not both"),
        ({"quant_type": "nf3"}, "'nf3'"),
        ({"learning_rate": True}, "learning_rate: must be a number"),
        ({"max_steps": True}, "found: true"),
        ({"output": ""}, "at least 1 character"),
    ],
)
def test_a_wrong_field_is_named(fields, said):
    with pytest.raises(UserError) as error:
        make_config(TrainConfig, {**GOOD, **fields})
    assert said in str(error.value)


def test_what_an_export_does_not_use_is_no_field_of_it():
    with pytest.raises(UserError, match="compute_dtype"):
        make_config(ExportConfig, {"format": "gguf", "model": "m", "output": "o", "compute_dtype": "float16"})


def test_a_missing_field_is_named():
    with pytest.raises(UserError, match="data"):
        make_config(TrainConfig, {"model": "m", "output": "o"})


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "just words"])
def test_yaml_must_be_a_mapping(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"run\.yaml"):
        read_yaml(path)


@pytest.mark.parametrize(
    "given, taken",
    [
        ("all-linear", "all-linear"),
        (["all-linear"], "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        ([r".*\.(q|v)_proj"], r".*\.(q|v)_proj"),
    ],
)
def test_target_modules_are_names_or_a_pattern(given, taken):
    assert make_config(LoraSettings, {"target_modules": given}).target_modules == taken


@pytest.mark.parametrize("given", [[], "", ["q_proj", ".*v"], [""]])
def test_target_modules_that_are_neither(given):
    with pytest.raises(UserError, match="q_proj"):
        make_config(LoraSettings, {"target_modules": given})


def test_a_yaml_key_twice_is_an_error(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("r: 8\nr: 16\n")
    with pytest.raises(UserError, match='"r" twice'):
        read_yaml(path)
