"""Exact and bound from the maths: the numbers that QLoRA is usually told with (docs/article.md), from our own plan."""

import pytest
import torch

import onecard
from onecard.kernels import ops
from onecard.memory.plan import plan
from onecard.quant.codebook import quant_map
from tests.conftest import make_checkpoint

GB, GIB = 1e9, 2**30


def terms(model, method="qlora", **fields):
    return {term.name: term.num_bytes for term in plan(model, method, device="cuda", **fields).terms}


def total(model, method="qlora", **fields):
    return plan(model, method, device="cuda", **fields).total_bytes / GB


SHORT = {"max_seq_length": 512, "gradient_checkpointing": True}
KEPT = {"max_seq_length": 1024}
SNIPPET = {**SHORT, "r": 8, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("method", "fields", "expected"),
    [
        ("full", SHORT, 109.2),
        ("full", KEPT, 113.4),
        ("lora", SHORT, 14.9),
        ("lora", KEPT, 19.2),
        ("qlora", SHORT, 5.5),
        ("qlora", SNIPPET, 4.9),
    ],
    ids=str,
)
def test_a_7b_model_in_full_with_lora_and_in_4_bits(method, fields, expected):
    """112 GB is 16 bytes a weight; 24 GB is the card that LoRA needs; 6 GB the card that QLoRA fits."""
    assert total("llama-2-7b", method, **fields) == pytest.approx(expected, rel=0.01)


def test_33b_and_65b_on_a_consumer_card():
    assert total("llama-33b", **SHORT) < 24 * GIB / GB
    small = plan("llama-65b", "qlora", 24 * GIB, max_seq_length=512, device="cuda")
    assert small.fits and "paged" in (small.choice or "")


def test_the_scales_of_a_65b_model():
    """One float32 for 64 weights takes 4 GB; double quantization takes 3 GB of them away."""
    single, nested = (terms("llama-65b", double_quant=nested)["base, scales"] / GB for nested in (False, True))
    assert single == pytest.approx(4.05, abs=0.01) and single - nested == pytest.approx(3.0, abs=0.05)


def test_double_quantization_adds_an_eighth_of_a_bit():
    """4 + 8/64 + 32/(64 x 256) bits a weight, from the bytes that are stored."""
    W = torch.randn(4096, 4096)
    for nested, expected in ((True, 8 / 64 + 32 / (64 * 256)), (False, 32 / 64)):
        packed, state = onecard.quantize_4bit(W, "nf4", 64, nested)
        offset = 32 / W.numel() if nested else 0.0
        assert 8 * packed.nbytes / W.numel() == 4
        assert 8 * state.nbytes / W.numel() == pytest.approx(expected + offset, rel=1e-12)


def test_nf4_is_dense_around_zero_and_int4_leaves_its_ends_empty():
    levels = {kind: quant_map(kind).double().sort().values for kind in ("nf4", "int4")}
    steps = {kind: found.diff() for kind, found in levels.items()}
    middle, ends = slice(6, 9), [0, 1, -2, -1]
    assert steps["nf4"][middle].max() < 2 / 3 * steps["int4"][middle].min()
    assert steps["nf4"][ends].min() > steps["int4"][ends].max()
    W = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    used = {}
    for kind in ("nf4", "int4"):
        packed, _ = onecard.quantize_4bit(W, kind)
        codes = torch.stack([packed >> 4, packed & 15]).flatten().long()
        counts = torch.bincount(codes, minlength=16)[quant_map(kind).argsort()]
        used[kind] = counts[ends].sum().item() / W.numel()
    assert used["int4"] < 0.5 * used["nf4"]  # 3.8 % and 11.6 % of normal weights on the four outer levels


def test_a_weight_in_16_bits_is_gone_after_its_product():
    """Between and after the steps nothing as large as a weight in 16 bits is held but the one scratch buffer."""
    packed, state = onecard.quantize_4bit(torch.randn(256, 512))
    A, B = torch.randn(8, 512, requires_grad=True), torch.randn(256, 8, requires_grad=True)
    saved = []
    x = torch.randn(4, 512, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ops.qlora_linear(x, packed, state, None, A, B, 2.0, None)
    assert max(t.numel() for t in saved if t.is_floating_point()) <= A.numel()
    before = packed.clone()
    y.float().sum().backward()
    assert torch.equal(packed, before) and packed.grad is None
    assert all(t.grad is not None for t in (x, A, B))


def test_the_article_s_code(tmp_path):
    """The snippet with one import changed, on a CPU: float16 as it says, any device map."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from onecard import BitsAndBytesConfig

    folder = make_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="auto")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    ids = torch.arange(5, 37)[None]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("r", "target", "expected"), [(8, ["q_proj", "v_proj"], 0.017), (64, "all-linear", 0.640)])
def test_the_size_of_an_adapter(r, target, expected):
    found = terms("llama-2-7b", r=r, target_modules=target)["LoRA weights"] / GB
    assert found == pytest.approx(expected, rel=0.02)
