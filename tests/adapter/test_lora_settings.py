"""Exact, and no worse than plain: each LoRA setting trains what peft trains, and every way out of it is the same."""

import gguf
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import onecard
from onecard.adapter.layers import LoraLinear4bit, lora_config
from onecard.adapter.load import with_adapter
from onecard.adapter.origin import origin_of
from onecard.adapter.save import save_adapter
from onecard.adapter.targets import check_names
from onecard.config import GgufConfig, LoraSettings, TrainConfig, make_config
from onecard.errors import UserError
from onecard.export.gguf.writer import export_gguf
from onecard.export.merge.merged import merge
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.skeleton import read_model
from onecard.memory.inputs import PlanInputs
from tests.conftest import make_checkpoint
from tests.families.check import dequantized

IDS = torch.arange(5, 45)[None]
QKV = ["q_proj", "k_proj", "v_proj"]
VARIANTS = [
    {"layers_to_transform": [1]},
    {"layers_to_transform": 0, "layers_pattern": "layers", "target_modules": ["q_proj", "down_proj"]},
    {"exclude_modules": ["k_proj", "mlp.up_proj"]},
    {"exclude_modules": r".*\.0\..*"},
    {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.\w+": 7}, "alpha_pattern": {"v_proj": 32.0}},
    {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"q_proj": 4.0}, "use_rslora": True},
    {"lora_bias": True, "target_modules": QKV},
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Qwen 2: its q, k and v have a bias, its other linears have none."""
    return make_checkpoint(tmp_path_factory.mktemp("base") / "qwen2", "qwen2")


def settings_of(variant):
    return make_config(LoraSettings, {"r": 4, "lora_alpha": 8, **variant})


def tuned_model(base, settings, seed=1):
    """A live adapter of some strength on a 4-bit base."""
    model = onecard.load_model(str(base), compute_dtype=torch.float32, device="cpu")
    torch.manual_seed(seed)
    tuned = get_peft_model(model, lora_config(settings, model))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return tuned.eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def gap(found, live, before):
    """Share of the adapter's effect that is missed."""
    return ((found - live).norm() / (live - before).norm()).item()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_setting_is_peft_s_own_and_comes_out_of_every_way(variant, base, tmp_path):
    """float32 sums of the same products: within 1e-4 of the adapter's effect."""
    settings = settings_of(variant)
    tuned = tuned_model(base, settings)
    live = logits(tuned)
    with tuned.disable_adapter():
        before = logits(tuned)
    assert any(isinstance(module, LoraLinear4bit) and module.plain_adapter() for module in tuned.modules())
    save_adapter(tuned, tmp_path / "adapter", origin_of(tuned.get_base_model(), str(base)))
    # Plain peft, on transformers' model of the same weights, adapts the same modules.
    plain = get_peft_model(dequantized(tuned.get_base_model(), base), LoraConfig(**peft_fields(settings)))
    shapes = {name: p.shape for name, p in plain.named_parameters() if p.requires_grad}
    assert shapes == {name: p.shape for name, p in tuned.named_parameters() if p.requires_grad}
    read = PeftModel.from_pretrained(dequantized(tuned.get_base_model(), base), tmp_path / "adapter")
    assert gap(logits(read), live, before) < 1e-4
    model = onecard.load_model(str(base), compute_dtype=torch.float32, device="cpu")
    assert torch.equal(logits(with_adapter(model, str(tmp_path / "adapter"))), live)
    merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert gap(logits(merged), live, before) < 1e-4
    # The plan's count, from the checkpoint's headers alone, is that of the weights that learn.
    fields = {"model": str(base), "data": "-", "output": "-", **settings.model_dump()}
    inputs = PlanInputs(read_model(inspect_checkpoint(base)), make_config(TrainConfig, fields), torch.float32)
    assert inputs.num_lora == sum(p.numel() for p in tuned.parameters() if p.requires_grad)


def peft_fields(settings):
    """peft's fields for the same, where "all-linear" is written out: peft refuses it with layers_to_transform."""
    fields = {key: value for key, value in settings.model_dump().items() if value and key != "init_lora_weights"}
    if settings.target_modules == "all-linear":
        fields["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return {**fields, "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("variant", VARIANTS[:6], ids=str)
def test_an_adapter_in_gguf_has_each_module_s_scale(variant, base, tmp_path):
    """llama.cpp adds alpha / rank * B A with one alpha for the file: exact but for the scale's rounding into B."""
    tuned = tuned_model(base, settings_of(variant))
    save_adapter(tuned, tmp_path / "adapter", origin_of(tuned.get_base_model(), str(base)))
    export_gguf(str(base), str(tmp_path / "adapter"), str(tmp_path / "a.gguf"), GgufConfig(adapter_only=True))
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    layers = {n: m for n, m in tuned.named_modules() if isinstance(m, LoraLinear4bit)}
    assert len(tensors) == 2 * len(layers)
    name = next(n for n in layers if n.endswith("down_proj"))
    number = name.split(".layers.")[1].split(".")[0]
    A, B = (tensors[f"blk.{number}.ffn_down.weight.{part}"] for part in ("lora_a", "lora_b"))
    expected = layers[name].get_delta_weight("default")
    assert (alpha / A.shape[0] * (B @ A) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_bias_has_no_place_in_a_gguf_adapter(base, tmp_path):
    tuned = tuned_model(base, settings_of(VARIANTS[-1]))
    save_adapter(tuned, tmp_path / "adapter", origin_of(tuned.get_base_model(), str(base)))
    with pytest.raises(UserError, match="lora_bias"):
        export_gguf(str(base), str(tmp_path / "adapter"), str(tmp_path / "a.gguf"), GgufConfig(adapter_only=True))


@pytest.mark.parametrize(
    "variant, said",
    [
        ({"lora_bias": True}, "lora_bias needs linears with a bias"),
        ({"exclude_modules": ["w_proj"]}, "'w_proj' has no effect"),
        ({"layers_to_transform": [0, 2]}, "2: no target is in that layer"),
        ({"rank_pattern": {"qq_proj": 2}}, "'qq_proj' has no effect"),
        ({"alpha_pattern": {"q_proj": 2}, "target_modules": ["v_proj"]}, "'q_proj' has no effect"),
        ({"exclude_modules": r".*_proj"}, "leave none"),
    ],
)
def test_what_has_no_effect_is_refused_before_the_weights_load(variant, said, base):
    with pytest.raises(UserError, match=said):
        check_names(read_model(inspect_checkpoint(base)), settings_of(variant))


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"layers_pattern": "layers"}, "needs layers_to_transform"),
        ({"layers_to_transform": [0], "target_modules": r".*q_proj"}, "not a pattern"),
        ({"rank_pattern": {"(q": 2}}, "regular expression"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern"),
        ({"lora_bias": True, "use_dora": True}, "do not go together"),
    ],
)
def test_settings_that_contradict_each_other(fields, said):
    with pytest.raises(UserError, match=said):
        make_config(LoraSettings, fields)
