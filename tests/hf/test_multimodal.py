"""Exact: a multimodal checkpoint's text part trains. All other parts stay as they are, also in the merge."""

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

import onecard
from onecard.adapter.layers import lora_config
from onecard.adapter.origin import origin_of
from onecard.config import LoraSettings
from onecard.export.merge.merged import merge
from onecard.nn.experts import weights_of
from onecard.nn.linears import beside_text
from onecard.train.loss import LogitTransform
from onecard.train.session import save_adapter
from tests.families.build import make_family


@pytest.fixture
def base(tmp_path):
    return make_family(tmp_path / "base", "mistral3")


def test_only_the_text_part_is_quantized_and_adapted(base, tmp_path):
    model = onecard.load_model(str(base), compute_dtype="float32", device="cpu")
    quantized = {f"{path}.{name}" for path, module in model.named_modules() for name, _ in weights_of(module)}
    assert quantized and all(name.startswith("model.language_model.layers.") for name in quantized)
    tuned = get_peft_model(model, lora_config(LoraSettings(target_modules=["q_proj", "v_proj"]), model))
    learned = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert learned and all(name.startswith("base_model.model.model.language_model.layers.") for name in learned)
    for name, parameter in tuned.named_parameters():
        parameter.data += 0.1 if "lora_B" in name else 0
    save_adapter(tuned, tmp_path / "adapter", origin_of(model, str(base)))
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.model.language_model.layers.") for key in keys)
    merged = merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    vision = [name for name in before if "vision_tower" in name or "projector" in name]
    assert len(vision) > 10 and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in vision)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == len(quantized)


def test_the_parts_beside_the_text_are_those_of_images(base):
    model = onecard.load_model(str(base), compute_dtype="float32", device="cpu")
    assert beside_text(model) == ["model.multi_modal_projector", "model.vision_tower"]


@pytest.mark.parametrize("family, cap", [("gemma3", None), ("gemma4", 3.0), ("gemma2", 3.0)])
def test_a_cap_counts_only_where_the_model_s_own_class_reads_it(family, cap, tmp_path):
    model = onecard.load_model(str(make_family(tmp_path, family)), compute_dtype="float32", device="cpu")
    assert model.config.get_text_config().final_logit_softcapping == 3.0
    assert LogitTransform.of(model).softcap == cap
