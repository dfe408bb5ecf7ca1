"""Exact, and no worse than plain: what LoRA starts from, and that each start ends as a plain LoRA over the base."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import onecard
from onecard.adapter.layers import LoraLinear4bit, lora_config
from onecard.adapter.load import with_adapter
from onecard.adapter.origin import origin_of
from onecard.adapter.save import save_adapter
from onecard.adapter.start import set_loftq
from onecard.adapter.targets import check_names
from onecard.config import LoraSettings, TrainConfig, make_config
from onecard.errors import UserError
from onecard.export.merge.merged import merge
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.load import load_tokenizer
from onecard.hf.skeleton import read_model
from onecard.memory.inputs import MemoryStrategy, PlanInputs
from onecard.memory.terms import start_terms
from tests.adapter.test_lora_settings import IDS, gap, logits
from tests.conftest import make_checkpoint
from tests.families.check import dequantized
from tests.train.test_loop import adapter_bytes, copy_at, run

FROZEN = [
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_4", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}},
    {"init_lora_weights": "olora", "use_rslora": True, "rank_pattern": {"k_proj": 6}, "alpha_pattern": {"q_proj": 5.0}},
    {"init_lora_weights": "olora", "modules_to_save": ["lm_head"]},
]  # fmt: skip


def tune(checkpoint, dtype=torch.float32, **fields):
    settings = make_config(LoraSettings, {"r": 4, "lora_alpha": 8, **fields})
    model = onecard.load_model(str(checkpoint), compute_dtype=dtype, device="cpu")
    torch.manual_seed(3)
    return get_peft_model(model, lora_config(settings, model)).eval()


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"])
def test_a_start_is_peft_s_own_and_the_base_computes_as_before(start, checkpoint):
    """A and B are those that peft makes on the dequantized weights with the same random numbers, to the bit."""
    tuned = tune(checkpoint, init_lora_weights=start)
    twin = dequantized(tuned.get_base_model(), checkpoint)
    settings = tuned.peft_config["default"]
    torch.manual_seed(3)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": settings.target_modules, "init_lora_weights": start}
    plain = get_peft_model(twin, LoraConfig(**fields))
    found, expected = ({name: p for name, p in model.named_parameters() if p.requires_grad} for model in (tuned, plain))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    live = logits(tuned)
    with tuned.disable_adapter():
        before = logits(tuned)
    # The start cancels but for float32's roundings; where B is zero or B A is, likewise.
    assert (live - before).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize("fields", FROZEN, ids=str)
def test_a_frozen_start_is_saved_as_plain_lora_of_twice_the_rank(fields, checkpoint, tmp_path):
    """Merged, read by us, and read by plain peft, it is the live adapter within 1e-4 of its effect."""
    tuned = tune(checkpoint, **fields)
    with tuned.disable_adapter():
        before = logits(tuned)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    live = logits(tuned)
    save_adapter(tuned, tmp_path / "adapter", origin_of(tuned.get_base_model(), str(checkpoint)))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and config["r"] == 8
    model = onecard.load_model(str(checkpoint), compute_dtype=torch.float32, device="cpu")
    assert gap(logits(with_adapter(model, str(tmp_path / "adapter"))), live, before) < 1e-4
    plain = PeftModel.from_pretrained(dequantized(tuned.get_base_model(), checkpoint), tmp_path / "adapter")
    assert gap(logits(plain), live, before) < 1e-4
    merge(str(checkpoint), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert gap(logits(merged), live, before) < 1e-4


def test_gradients_are_those_of_a_linear_over_the_residual_weight(checkpoint):
    """The frozen start is not in them: peft trains over W - s B0 A0, and so does this."""
    tuned = tune(checkpoint, init_lora_weights="pissa")
    twin = dequantized(tuned.get_base_model(), checkpoint)
    torch.manual_seed(3)
    targets = tuned.peft_config["default"].target_modules
    plain = get_peft_model(twin, LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights="pissa"))
    grads = []
    for model in (tuned, plain):
        model(IDS, labels=IDS).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, found in grads[0].items():
        expected = grads[1][name]
        assert (found - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("start", ["pissa_niter_4", "loftq", pytest.param("orthogonal", marks=pytest.mark.slow)])
def test_a_run_with_a_start_resumes_to_the_bit(start, checkpoint, chats, tmp_path):
    settings = {"init_lora_weights": start, "lora_dropout": 0.0, "max_steps": 4}
    run(checkpoint, chats, tmp_path / "a", **settings)
    copy_at(tmp_path / "a", tmp_path / "b", 2)
    run(checkpoint, chats, tmp_path / "b", resuming=True, **settings)
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_loftq_is_the_best_of_its_rank_for_what_rounding_left(family, tmp_path):
    """The error of W_4bit + s B A, in W's norm, is that of the truncated singular value decomposition in float64."""
    base = make_checkpoint(tmp_path, family)
    tuned = tune(base, init_lora_weights="loftq", lora_alpha=3, rank_pattern={"down_proj": 2})
    W = {name: p.double() for name, p in AutoModelForCausalLM.from_pretrained(base).named_parameters()}
    set_loftq(tuned, base)
    layers = {n: m for n, m in tuned.named_modules() if isinstance(m, LoraLinear4bit)}
    assert layers
    for name, layer in layers.items():
        rounded, D = layer.base_layer.dequantize().double(), W[f"{name.removeprefix('base_model.model.')}.weight"]
        D = D - rounded
        error = (D - layer.get_delta_weight("default").double()).norm()
        rest = torch.linalg.svdvals(D)[layer.r["default"] :].norm()
        assert error <= 1.0001 * rest and rest < 0.99 * D.norm()
        A, B = layer.lora_A["default"].weight, layer.scaling["default"] * layer.lora_B["default"].weight
        assert (A.norm(dim=1) / B.norm(dim=0) - 1).abs().max() < 1e-4  # each has half of the strength, as in peft


def test_a_run_begins_at_loftq_s_start(checkpoint, chats, tmp_path):
    run(checkpoint, chats, tmp_path / "o", init_lora_weights="loftq", max_steps=1, learning_rate=1e-9)
    found = load_file(tmp_path / "o" / "adapter" / "adapter_model.safetensors")
    assert min(tensor.norm() for name, tensor in found.items() if "lora_B" in name) > 0.01  # an update moves 1e-9


def test_loftq_needs_the_weights_that_were_rounded(checkpoint, chats, tmp_path):
    onecard.load_model(str(checkpoint), compute_dtype=torch.float32, device="cpu").save_pretrained(tmp_path / "b")
    load_tokenizer(str(checkpoint)).save_pretrained(tmp_path / "b")
    with pytest.raises(UserError, match="loftq needs the linears' weights") as error:
        run(tmp_path / "b", chats, tmp_path / "o", init_lora_weights="loftq")
    assert "in 4 bits" in error.value.found


def test_the_plan_counts_a_frozen_start(checkpoint):
    tuned = tune(checkpoint, init_lora_weights="pissa")
    frozen = [t for m in tuned.modules() if isinstance(m, LoraLinear4bit) for pair in m.starts.values() for t in pair]
    fields = {"model": str(checkpoint), "data": "-", "output": "-", "init_lora_weights": "pissa", "r": 4}
    inputs = PlanInputs(read_model(inspect_checkpoint(checkpoint)), make_config(TrainConfig, fields), torch.float32)
    (term,) = start_terms(inputs, MemoryStrategy())
    assert term.num_bytes == 3 * sum(tensor.nbytes for tensor in frozen)  # alone, and joined with A and B


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"init_lora_weights": "pissa", "lora_dropout": 0.1}, "no lora_dropout"),
        ({"init_lora_weights": "olora", "use_dora": True}, "no use_dora"),
        ({"init_lora_weights": "orthogonal", "r": 5}, "even rank"),
        ({"init_lora_weights": "pissa_niter_0"}, "pissa_niter_N"),
        ({"init_lora_weights": "corda"}, "must be default"),
        ({"init_lora_weights": "eva"}, "eva"),
        ({"init_lora_weights": "pissa", "target_parameters": ["down_proj"]}, "is for linears"),
    ],
)
def test_starts_that_are_refused(fields, said):
    with pytest.raises(UserError, match=said):
        make_config(LoraSettings, fields)


def test_a_rank_that_a_weight_does_not_have(checkpoint):
    model = read_model(inspect_checkpoint(checkpoint))
    with pytest.raises(UserError, match="a rank that each weight has"):
        check_names(model, make_config(LoraSettings, {"init_lora_weights": "pissa", "r": 33}))
