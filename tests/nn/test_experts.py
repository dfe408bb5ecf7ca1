"""No worse than plain: experts in 4 bits against transformers on the dequantized weights. Exact: peft's format."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import onecard
from onecard.adapter.layers import LoraLinear4bit, ParamWrapper, lora_config, register_fused
from onecard.config import LoraSettings, TrainConfig, make_config
from onecard.errors import UserError
from onecard.kernels import dequantize as dequantize_module
from onecard.kernels import ops
from onecard.kernels.cpu import native
from onecard.nn import experts as experts_module
from onecard.nn.experts import Experts4bit, Factors, by_expert, weights_of
from onecard.quant.state import part_of
from tests.conftest import EXPERT_FAMILIES, make_checkpoint

IDS = torch.randint(5, 200, (2, 17), generator=torch.Generator().manual_seed(0))
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
WHOLE_GROUPS = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128}


def plain_model(folder, model=None, dtype=torch.float32):
    """transformers' own in 16 or 32 bits; with a model of ours, on what that dequantizes to."""
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()
    for path, module in model.named_modules() if model is not None else ():
        for name, weight in weights_of(module):
            getattr(twin.get_submodule(path.replace(".base_layer", "")), name).data = weight.dequantize().to(dtype)
    return twin


def set_adapter(model):
    """Values for every adapter tensor that follow from its name."""
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            seed = sum(map(ord, name.replace(".default", "")))
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
    return model


def no_worse(ours, plain, exact, dtype):
    """Error at most twice that of the plain computation in the same dtype, plus one rounding of the largest value."""
    floor = exact.abs().max() * torch.finfo(dtype).eps
    return (ours.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + floor


def test_pairs_are_sorted_by_expert():
    pairs, counts = by_expert(torch.tensor([[3, 0], [1, 3], [0, 3]]), 5)
    assert pairs.tolist() == [1, 4, 2, 0, 3, 5] and counts == [2, 1, 0, 3, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_layer_waits_for_the_gpu_once():
    index = torch.randint(0, 8, (100, 2), device="cuda")
    with pytest.warns(UserWarning, match="synchronizing") as seen:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            by_expert(index, 8)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("called a synchronizing" in str(warning.message) for warning in seen) == 1


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
@pytest.mark.parametrize("size", [{}, WHOLE_GROUPS])
def test_logits_are_those_of_the_dequantized_weights(family, size, tmp_path):
    folder = make_checkpoint(tmp_path, family, **size)
    model = onecard.load_model(str(folder), compute_dtype="float32", device="cpu")
    assert sum(isinstance(m, Experts4bit) for m in model.modules()) == 2
    twin = plain_model(folder, model)
    for ids in (IDS, IDS[:1, :1]):  # one token: straight from the codes, where the kernel can
        ours, theirs = model(ids).logits, twin(ids).logits
        assert no_worse(ours, theirs, plain_model(folder, model, torch.float64)(ids).logits, torch.float32)


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_gradients_are_those_of_the_dequantized_weights(family, tmp_path):
    """Of the input, and of every A and B, experts' included."""
    folder = make_checkpoint(tmp_path, family)
    base = onecard.load_model(str(folder), compute_dtype="float32", device="cpu")
    config = lora_config(LoraSettings(r=4, target_parameters=STACKS), base)
    plain, exact = plain_model(folder, base), plain_model(folder, base, torch.float64)
    found = []
    for model in (base, plain, exact):
        tuned = set_adapter(get_peft_model(model, config, autocast_adapter_dtype=False))
        if model is exact:
            tuned.double()
        config._custom_modules = None  # for peft's own layers around the others
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        logits = tuned(inputs_embeds=embedded).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        grads = {name: p.grad for name, p in tuned.named_parameters() if p.requires_grad}
        found.append({"x": embedded.grad, "logits": logits.detach(), **grads})
    ours, theirs, truth = found
    assert ours.keys() == theirs.keys() == truth.keys()
    assert sum("experts" in name for name in ours) == 8  # A and B of two stacks in two layers
    for name, gradient in truth.items():
        assert gradient.abs().max() > 0
        assert no_worse(ours[name], theirs[name], gradient, torch.float32), name


def test_a_layer_in_bfloat16_is_no_worse_than_transformers(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3_moe", dtype=torch.bfloat16, num_hidden_layers=1, **WHOLE_GROUPS)
    model = onecard.load_model(str(folder), compute_dtype="bfloat16", device="cpu")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 128, generator=generator).bfloat16()
    w, index = torch.rand(40, 8, generator=generator).topk(3)
    g = torch.randn(40, 128, generator=generator).bfloat16()
    results = []
    for module, dtype in (
        (model, torch.bfloat16),
        (plain_model(folder, model, torch.bfloat16), torch.bfloat16),
        (plain_model(folder, model, torch.float64), torch.float64),
    ):
        leaves = [x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()]
        y = module.model.layers[0].mlp.experts(leaves[0], index, leaves[1])
        results.append([y, *torch.autograd.grad(y, leaves, g.to(dtype))])
    for ours, theirs, exact in zip(*results):
        assert no_worse(ours, theirs, exact, torch.bfloat16)


@pytest.mark.parametrize("adapted", [("gate_up_proj", "down_proj"), ("gate_up_proj",), ("down_proj",)])
def test_a_lora_term_on_tiles_is_no_worse_than_one_beside_them(adapted, tmp_path, monkeypatch):
    """Of the layer in bfloat16, against the same in float32."""
    folder = make_checkpoint(tmp_path, "qwen3_moe", dtype=torch.bfloat16, num_hidden_layers=1, **WHOLE_GROUPS)
    experts = onecard.load_model(str(folder), compute_dtype="bfloat16", device="cpu").model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    x, g, (w, index) = random(200, 128).bfloat16(), random(200, 128).bfloat16(), random(200, 8).softmax(-1).topk(3)
    sizes = {name: experts.weights[name].shape for name in adapted}
    terms = {name: (0.1 * random(E, 4, K), 0.1 * random(N, 4, E)) for name, (E, N, K) in sizes.items()}
    results = []
    for dtype, fused in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False)):
        if not fused:
            monkeypatch.setattr(native, "can_fuse", lambda *_: False)
        experts.compute_dtype = dtype
        factors = {name: [term.clone().requires_grad_() for term in pair] for name, pair in terms.items()}
        experts.factors = {name: Factors(*pair, 2.0) for name, pair in factors.items()}
        leaves = [x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()]
        leaves += [term for pair in factors.values() for term in pair]
        y = experts(leaves[0], index, leaves[1])
        results.append([y, *torch.autograd.grad(y, leaves, g.to(dtype))])
    for ours, beside, exact in zip(*results):
        assert no_worse(ours, beside, exact, torch.bfloat16)


def test_only_experts_with_tokens_are_dequantized_and_nothing_of_them_is_saved(tmp_path, monkeypatch):
    folder = make_checkpoint(tmp_path, "qwen3_moe", num_hidden_layers=1)
    experts = onecard.load_model(str(folder), device="cpu", compute_dtype="float32").model.layers[0].mlp.experts
    seen, saved = [], []
    dequantize = dequantize_module.dequantize_to_scratch

    def counted(*arguments, **more):
        seen.append(1)
        return dequantize(*arguments, **more)

    for module in (experts_module, dequantize_module):
        monkeypatch.setattr(module, "dequantize_to_scratch", counted)
    x = torch.randn(9, 64, requires_grad=True)
    index = torch.tensor([[1, 5]]).expand(9, 2)
    save_weights = dequantize_module.weights_saved(dequantize_module.SAVE_COPY)  # of experts there are too many
    with save_weights, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = experts(x, index, torch.full((9, 2), 0.5))
    assert len(seen) == 4  # two experts, two products
    y.sum().backward()
    assert len(seen) == 8
    assert not any(tensor.numel() >= 32 * 64 for tensor in saved)


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
def test_plain_peft_reads_the_adapter(family, settings, tmp_path):
    """Saved by ours, loaded by peft on transformers' model: the same tensors, and on the same weights equal logits."""
    folder = make_checkpoint(tmp_path / "base", family)
    base = onecard.load_model(str(folder), compute_dtype="float32", device="cpu")
    model = get_peft_model(base, lora_config(LoraSettings(r=4, target_parameters=STACKS, **settings), base))
    set_adapter(model).eval().save_pretrained(tmp_path / "adapter")
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(ParamWrapper) == 4 and kinds.count(LoraLinear4bit) == 8
    twin, exact = (
        PeftModel.from_pretrained(plain_model(folder, base, dtype), tmp_path / "adapter", autocast_adapter_dtype=False)
        for dtype in (torch.float32, torch.float64)
    )
    assert not any(isinstance(module, ParamWrapper) for module in twin.modules())
    mine = {name: p for name, p in model.named_parameters() if "lora_" in name}
    theirs = {name: p for name, p in twin.named_parameters() if "lora_" in name}
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    ours = model(IDS).logits
    assert no_worse(ours, twin(IDS).logits, exact.double()(IDS).logits, torch.float32)
    with model.disable_adapter():
        assert not torch.equal(model(IDS).logits, ours)
        assert torch.equal(model(IDS).logits, base(IDS).logits)
    assert torch.equal(model(IDS).logits, ours)


def test_an_adapter_of_plain_peft_is_read_by_ours(tmp_path):
    folder = make_checkpoint(tmp_path / "base", "mixtral")
    config = lora_config(LoraSettings(r=4, target_modules=["q_proj"], target_parameters=STACKS))
    config._custom_modules = None
    plain = set_adapter(get_peft_model(plain_model(folder), config)).eval()
    plain.save_pretrained(tmp_path / "adapter")
    base = onecard.load_model(str(folder), compute_dtype="float32", device="cpu")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", config=register_fused(config))
    stored = {name: p for name, p in plain.named_parameters() if "lora_" in name}
    found = {name: p for name, p in loaded.named_parameters() if "lora_" in name}
    assert stored.keys() == found.keys() and all(torch.equal(stored[name], found[name]) for name in stored)
    assert sum(isinstance(module, ParamWrapper) for module in loaded.modules()) == 4


def test_two_adapters_add_up(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3_moe")
    base = onecard.load_model(str(folder), compute_dtype="float32", device="cpu")
    settings = LoraSettings(r=2, target_modules=["q_proj"], target_parameters=["down_proj"])
    model = get_peft_model(base, lora_config(settings, base), "one")
    model.add_adapter("two", lora_config(settings, base))
    set_adapter(model).eval()
    module = next(m for m in model.modules() if isinstance(m, ParamWrapper))
    both = module.factors(["one", "two"])
    summed = sum(
        f.scaling * torch.einsum("nre,erk->enk", f.B_NRE, f.A_ERK)
        for f in (module.factors([name]) for name in ("one", "two"))
    )
    delta = torch.einsum("nre,erk->enk", both.B_NRE, both.A_ERK) * both.scaling
    assert (delta - summed).abs().max() <= 8 * torch.finfo(torch.float32).eps * summed.abs().max()


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_all_linear_is_the_linears(family, tmp_path):
    base = onecard.load_model(str(make_checkpoint(tmp_path, family)), device="cpu")
    model = get_peft_model(base, lora_config(LoraSettings(), base))
    assert {n.split(".lora_A")[0].rpartition(".")[2] for n, _ in model.named_parameters() if "lora_A" in n} == {
        "q_proj", "k_proj", "v_proj", "o_proj",
    }  # fmt: skip


def test_settings_that_experts_cannot_have():
    for more in ({"lora_dropout": 0.1}, {"use_dora": True}):
        fields = {"model": "m", "data": "d", "output": "o", "target_parameters": STACKS, **more}
        with pytest.raises(UserError, match="target_parameters take no"):
            make_config(TrainConfig, fields)


def test_experts_as_a_module_and_merging_are_refused(tmp_path):
    base = onecard.load_model(str(make_checkpoint(tmp_path, "mixtral")), device="cpu")
    with pytest.raises(UserError, match="target_parameters"):
        get_peft_model(base, lora_config(LoraSettings(target_modules=["experts"])))
    base = onecard.load_model(str(tmp_path), device="cpu")
    with pytest.raises(UserError, match="16-bit"):
        get_peft_model(base, lora_config(LoraSettings(target_parameters=STACKS), base)).merge_and_unload()


@pytest.mark.parametrize("shape", [(5, 96, 64), (3, 256, 128)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_part_is_a_slice_of_codes_and_scales(shape, double_quant):
    """Exact: part by part, the bits of the whole; with and without a group of scales over two parts."""
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, state = ops.quantize_stack(W, W.shape, double_quant=double_quant)
    whole_packed, whole_state = ops.quantize_4bit(W, double_quant=double_quant)
    assert torch.equal(packed, whole_packed) and torch.equal(state.absmax, whole_state.absmax)
    assert state.nested_offset is None or torch.equal(state.nested_offset, whole_state.nested_offset)
    whole = ops.dequantize_4bit(packed, state)
    for number in range(shape[0]):
        codes, found, skip = part_of(packed, state, number)
        assert codes.data_ptr() >= packed.data_ptr()
        part = ops.dequantize_4bit(codes, found).view(-1)[skip:]
        assert torch.equal(part, whole[number].view(-1))


def test_a_stack_of_broken_blocks_is_refused():
    with pytest.raises(UserError, match="whole blocks"):
        ops.quantize_stack(torch.randn(2, 3, 8), torch.Size([2, 3, 8]))


def test_bitsandbytes_quantizes_a_stack_to_the_same_bits():
    """bitsandbytes.nn.parametrize reads our codes and scales of a stacked parameter as its own."""
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    from onecard.quant.state import to_bnb

    W = torch.randn(4, 96, 64, generator=torch.Generator().manual_seed(0))
    packed, state = ops.quantize_stack(W, W.shape)
    module = torch.nn.Module()
    module.gate_up_proj = torch.nn.Parameter(packed, requires_grad=False)
    stored = {key.removeprefix("."): tensor for key, tensor in to_bnb(packed, state).items() if key}
    parametrize.replace_parameter_4bit_prequantized(module, "gate_up_proj", stored, torch.device("cpu"))
    assert torch.equal(module.gate_up_proj, ops.dequantize_4bit(packed, state))
