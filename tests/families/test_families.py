"""No worse than plain: each family equals transformers + peft + AdamW on the same weights, or is refused in words."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import onecard
from onecard.adapter.layers import lora_config
from onecard.config import LoraSettings
from onecard.errors import UserError
from onecard.hf.load import find_checkpoint
from onecard.hf.skeleton import read_config
from tests.conftest import make_checkpoint
from tests.families.build import families, make_family, shrunk
from tests.families.check import check
from tests.families.table import FILE, line

DEFAULT = (
    "bert bitnet cohere2 deepseek_v3 falcon falcon_h1 gemma2 gemma3 gemma3n_text gemma4_text gpt2 gpt_neox granite "
    "jamba laguna llama4_text longcat_flash mamba minimax mistral3 nemotron phimoe qwen2_5_vl qwen3_moe rwkv xlnet"
).split()
WRITTEN = {row.split(" | ")[0].removeprefix("| "): row for row in FILE.read_text(encoding="utf-8").splitlines()}


@pytest.mark.parametrize(
    "family", [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in families()]
)
def test_a_family_is_as_plain_or_refused(family, tmp_path):
    outcome = check(family, tmp_path)
    assert line(outcome) == WRITTEN[family], "python -m tests.families.table"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_adapters_on_experts_are_as_plain_peft_s(family, tmp_path):
    outcome = check(family, tmp_path, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    assert outcome.path == "fast" and not outcome.unmerged
    assert outcome.gaps.keys() >= {"losses", "plain peft", "read again", "merged"}


def test_a_linear_whose_weight_is_read_stays_whole_and_takes_no_adapter(tmp_path):
    folder = make_family(tmp_path, "mamba")
    model = onecard.load_model(str(folder), compute_dtype="float32", device="cpu")
    mixer = model.backbone.layers[0].mixer
    assert type(mixer.dt_proj) is torch.nn.Linear and type(mixer.in_proj) is not torch.nn.Linear
    assert "dt_proj" not in lora_config(LoraSettings(), model).target_modules
    with pytest.raises(UserError, match=r"dt_proj, whose weight"):
        lora_config(LoraSettings(target_modules=["dt_proj"]), model)


def test_a_weight_that_is_read_may_be_in_4_bits_in_the_checkpoint(tmp_path, monkeypatch):
    folder = make_family(tmp_path / "base", "mamba")
    with monkeypatch.context() as patch:  # as bitsandbytes stores it
        patch.setattr("onecard.nn.linears.read_directly", lambda model: set())
        stored = onecard.load_model(str(folder), compute_dtype="float32", device="cpu")
    stored.save_pretrained(tmp_path / "4bit")
    model = onecard.load_model(str(tmp_path / "4bit"), compute_dtype="float32", device="cpu")
    before, after = (m.backbone.layers[0].mixer.dt_proj for m in (stored, model))
    assert torch.equal(after.weight, before.dequantize())
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_a_read_in_a_branch_that_the_settings_rule_out_does_not_count(tmp_path):
    model = onecard.load_model(str(make_family(tmp_path, "bloom")), compute_dtype="float32", device="cpu")
    assert type(model.transformer.h[0].self_attention.dense) is not torch.nn.Linear
    assert "dense" in lora_config(LoraSettings(), model).target_modules


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "gaussian", "orthogonal"])
def test_a_start_of_pefts_works_or_is_refused(start, checkpoint):
    model = onecard.load_model(str(checkpoint), compute_dtype="float32", device="cpu")
    if start == "loftq":
        pytest.importorskip("scipy", reason="peft's config asks for it")
    more = {"loftq_config": {"loftq_bits": 4}} if start == "loftq" else {}
    config = LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=start, task_type="CAUSAL_LM", **more)
    config._register_custom_module(lora_config(LoraSettings())._custom_modules)
    if start not in ("loftq", "corda"):
        ids = torch.tensor([[5, 6, 7, 8]])
        get_peft_model(model, config)(input_ids=ids, labels=ids).loss.backward()
    else:
        with pytest.raises(UserError, match="leave a 4-bit base as it is"):
            get_peft_model(model, config)


def test_a_decoder_stored_as_an_encoder_is_refused(tmp_path):
    from onecard.train.evaluate import choose_loss
    from tests.families.check import rows

    config = transformers.BertConfig(**{**shrunk(transformers.BertConfig(), "bert"), "is_decoder": False})
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    model = onecard.load_model(str(tmp_path), compute_dtype="float32", device="cpu")
    with pytest.raises(UserError, match="bert, whose earlier positions change with what follows"):
        choose_loss(model, rows())


@pytest.mark.parametrize("family", ["qwen2_audio", "voxtral", "clip"])
def test_a_checkpoint_of_text_and_parts_that_no_class_reads_is_refused_by_name(family, tmp_path):
    transformers.CONFIG_MAPPING[family]().save_pretrained(make_checkpoint(tmp_path))
    with pytest.raises(UserError, match=f"{family}, a checkpoint of text and other parts"):
        read_config(find_checkpoint(str(tmp_path)))
    with pytest.raises(UserError, match=f"{family}, a checkpoint of text and other parts"):
        onecard.load_model(str(tmp_path), device="cpu")
