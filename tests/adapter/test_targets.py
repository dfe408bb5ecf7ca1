"""Behaviour: a name in target_modules that LoRA cannot learn or merge is refused before the weights load."""

import pytest

from onecard.adapter.targets import check_names
from onecard.config import LoraSettings, make_config
from onecard.errors import UserError
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.skeleton import read_model
from tests.conftest import make_checkpoint


def check(folder, targets):
    check_names(read_model(inspect_checkpoint(folder)), make_config(LoraSettings, {"target_modules": targets}))


def test_fused_names(tmp_path):
    folder = make_checkpoint(tmp_path / "phi3", "phi3")
    usual = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with pytest.raises(UserError, match='"q_proj" matches none') as error:
        check(folder, usual)
    assert "gate_up_proj" in error.value.do and "qkv_proj" in error.value.do
    check(folder, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
    check(folder, "all-linear")
    check(folder, r".*layers\.1\..*_proj")
    with pytest.raises(UserError, match="matches none"):
        check(folder, r".*\.q_proj")


def test_shared_weights(tmp_path):
    tied = make_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    apart = make_checkpoint(tmp_path / "apart")
    check(apart, ["q_proj", "lm_head"])
    with pytest.raises(UserError, match="tied to the embedding"):
        check(tied, ["q_proj", "lm_head"])
    for folder in (tied, apart):
        with pytest.raises(UserError, match="an embedding"):
            check(folder, ["embed_tokens"])
        with pytest.raises(UserError, match="LlamaMLP"):
            check(folder, ["mlp"])
