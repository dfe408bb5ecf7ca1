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


# Llama-2-7B by hand: 32 layers of 4 square and 3 rectangular matrices, and an embedding and a head of 32,000 rows.
LAYERS, D, F, VOCABULARY = 32, 4096, 11008, 32000
MATRICES = LAYERS * (4 * D * D + 3 * D * F)
REST = 2 * VOCABULARY * D + (2 * LAYERS + 1) * D
SIDES = {"all-linear": LAYERS * (4 * 2 * D + 3 * (D + F)), "q and v": LAYERS * 2 * 2 * D}  # of the matrices that learn


def activations(tokens, recomputed):
    """Bytes in 16 bits of what the layers keep for the backward, at least: each layer's input; or all that its products
    and its norms take: inputs, q, k, v, attention's output, gate, up, and their product."""
    return 2 * tokens * LAYERS * (D if recomputed else 4 * D + 4 * D + 3 * F)


@pytest.mark.parametrize(
    ("method", "fields", "by_hand", "told"),
    [
        ("full", SHORT, 16 * (MATRICES + REST), 109.1),
        ("full", KEPT, 16 * (MATRICES + REST), 113.5),
        ("lora", SHORT, 2 * (MATRICES + REST) + 16 * 16 * SIDES["all-linear"], 14.9),
        ("lora", KEPT, 2 * (MATRICES + REST) + 16 * 16 * SIDES["all-linear"], 19.2),
        ("qlora", SHORT, (0.5 + 0.127 / 8) * MATRICES + 2 * REST + 16 * 16 * SIDES["all-linear"], 5.5),
        ("qlora", SNIPPET, (0.5 + 0.127 / 8) * MATRICES + 2 * REST + 16 * 8 * SIDES["q and v"], 4.9),
    ],
    ids=str,
)
def test_a_7b_model_in_full_with_lora_and_in_4_bits(method, fields, by_hand, told):
    """Weights at 16, 2 or 0.516 bytes, 16 bytes a trained one (its value, gradient and two states in float32; in full
    2 + 2 + 4 + 8), layers' activations; beside these at most a gigabyte and a twentieth of them."""
    known = (by_hand + activations(fields["max_seq_length"], "gradient_checkpointing" in fields)) / GB
    found = total("llama-2-7b", method, **fields)
    assert known < found < 1.05 * known + 1.0
    assert round(found, 1) == told  # the page's number


def test_33b_and_65b_on_a_consumer_card():
    assert total("llama-33b", **SHORT) < 24 * GIB / GB
    small = plan("llama-65b", "qlora", 24 * GIB, max_seq_length=512, device="cuda")
    assert small.fits and "paged" in (small.choice or "")


def test_the_scales_of_a_65b_model():
    """One float32 for 64 weights takes 4 GB; double quantization saves 3 GB of them."""
    matrices = 80 * (4 * 8192 * 8192 + 3 * 8192 * 22016)
    single, nested = (terms("llama-65b", double_quant=nested)["base, scales"] for nested in (False, True))
    assert single == 4 * matrices / 64
    assert nested == matrices / 64 + 4 * matrices / (64 * 256) + 4 * 80 * 7  # the scales' codes, scales and means
    assert (round(single / GB, 2), round(nested / GB, 2)) == (4.05, 1.03)  # the page's numbers


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


@pytest.mark.parametrize(
    ("r", "target", "sides", "told"), [(8, ["q_proj", "v_proj"], "q and v", 17), (64, "all-linear", "all-linear", 640)]
)
def test_the_size_of_an_adapter(r, target, sides, told):
    """float32: r rows as wide as a matrix's inputs, and r columns as high as its outputs."""
    found = terms("llama-2-7b", r=r, target_modules=target)["LoRA weights"]
    assert found == 4 * r * SIDES[sides] and round(found / 1e6) == told
