"""Behaviour: a regular expression that would match for ever is refused, wherever one comes from."""

import json
import time

import pytest
import torch
from peft import get_peft_model

import onecard
from onecard.adapter.layers import lora_config
from onecard.adapter.load import with_adapter
from onecard.adapter.targets import check_names
from onecard.adapter.update import read_adapter
from onecard.config import LoraSettings, make_config
from onecard.errors import UserError
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.skeleton import read_model
from onecard.patterns import MAX_CHARACTERS, MAX_SECONDS, check_syntax, check_time
from tests.conftest import make_checkpoint

ENDLESS = r"([a-z_.0-9]+)+!"  # takes twice the time with each character
NAMED = r".*\.(q_proj|down_proj)"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("base"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    settings = make_config(LoraSettings, {"r": 4, "target_modules": ["q_proj", "down_proj"]})
    get_peft_model(load(base), lora_config(settings)).save_pretrained(folder)
    return folder


def load(base):
    return onecard.load_model(str(base), compute_dtype=torch.float32, device="cpu")


ENDLESS_FIELDS = {
    "target_modules": ENDLESS,
    "exclude_modules": ENDLESS,
    "modules_to_save": [ENDLESS],
    "alpha_pattern": {ENDLESS: 8},
    "rank_pattern": {ENDLESS: 4},
}


@pytest.mark.parametrize("field", ENDLESS_FIELDS)
def test_an_adapter_s_pattern_without_end_is_refused_soon(field, base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("onecard.patterns.MAX_SECONDS", 1)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {field: ENDLESS_FIELDS[field]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    reader = with_adapter if field == "target_modules" else lambda _, folder: read_adapter(tmp_path)
    model, begin = load(base), time.monotonic()
    with pytest.raises(UserError, match="within 1 s"):
        reader(model, str(tmp_path))
    assert time.monotonic() - begin < 30


def test_a_run_s_pattern_without_end_is_refused_and_a_sound_one_is_not(base):
    model = read_model(inspect_checkpoint(base))
    check_names(model, make_config(LoraSettings, {"target_modules": NAMED}))
    with pytest.raises(UserError, match=f"within {MAX_SECONDS} s"):
        check_names(model, make_config(LoraSettings, {"target_modules": ENDLESS}))


def test_an_adapter_with_sound_patterns_is_read(base, adapter, tmp_path):
    patterns = {"target_modules": NAMED, "alpha_pattern": {r"layers\.\d+\..*q_proj": 8}}
    config = json.loads((adapter / "adapter_config.json").read_text()) | patterns
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    tuned = with_adapter(load(base), str(tmp_path))
    assert tuned.base_model.model.model.layers[0].self_attn.q_proj.scaling == {"default": 2.0}
    updates = read_adapter(tmp_path).updates
    assert updates["model.layers.0.self_attn.q_proj.weight"].scaling == 2.0
    assert updates["model.layers.0.mlp.down_proj.weight"].scaling == config["lora_alpha"] / 4


@pytest.mark.parametrize("pattern", ["(", "a{99999999999999999999}", "(" * 3000 + ")" * 3000])
def test_what_is_no_regular_expression_is_refused(pattern):
    with pytest.raises(UserError, match="must be a regular expression"):
        make_config(LoraSettings, {"target_modules": pattern})


def test_the_form_in_which_peft_takes_a_pattern_must_be_an_expression(adapter, tmp_path):
    """Flags may stand at an expression's start alone."""
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"alpha_pattern": {"(?i)Q_PROJ": 8}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    with pytest.raises(UserError, match="global flags"):
        read_adapter(tmp_path)


def test_expressions_that_take_long_to_compile_are_refused():
    check_syntax(["a|" * (MAX_CHARACTERS // 2)])
    with pytest.raises(ValueError, match="characters"):
        check_syntax(["a|" * (MAX_CHARACTERS // 2), "b"])


def test_names_need_no_process(monkeypatch):
    monkeypatch.setattr("subprocess.run", None)
    check_time([], ["model.layers.0"], "target_modules")
