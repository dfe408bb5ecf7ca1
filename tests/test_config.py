"""Exact: the config refuses what it does not know, and says what it found."""

import pytest

from onecard.config import TrainConfig, make_config, read_yaml
from onecard.errors import UserError

GOOD = {"model": "m", "data": "d", "output": "o"}


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
    ],
)
def test_a_wrong_field_is_named(fields, said):
    with pytest.raises(UserError) as error:
        make_config(TrainConfig, {**GOOD, **fields})
    assert said in str(error.value)


def test_a_missing_field_is_named():
    with pytest.raises(UserError, match="data"):
        make_config(TrainConfig, {"model": "m", "output": "o"})


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "just words"])
def test_yaml_must_be_a_mapping(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"run\.yaml"):
        read_yaml(path)
