"""GPTQ and AWQ files, read by a reader in plain numpy that shares nothing with the exporter but the format's facts.

Exact: bits, files, what stays. Bound from the maths: least output errors. No worse than plain: round-to-nearest.
"""

import hashlib
import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig, Glm4MoeConfig

from onecard.config import CalibrationConfig, DataConfig
from onecard.data.load import load_dataset
from onecard.errors import UserError
from onecard.export.calibrated import awq, gptq, routed, writer
from onecard.export.calibrated.calibration import calibrate, first_batches
from onecard.export.calibrated.layers import LayeredModel
from onecard.export.calibrated.writer import export_folder
from onecard.export.merge.merged import merge, open_merged
from onecard.hf.load import load_tokenizer
from onecard.quant.grouped import Grouped, pick_group_size, round_to_nearest
from tests import conftest
from tests.conftest import FAMILIES, make_checkpoint
from tests.export.merge.test_merged import make_adapter

CPU = torch.device("cpu")
EVERY = [*FAMILIES, "gemma3"]  # whose sliding and full layers have rotary embeddings of their own
CONFIG = CalibrationConfig(max_seq_length=128, group_size=32)


@pytest.fixture(autouse=True)
def gemma3(monkeypatch):
    monkeypatch.setitem(FAMILIES, "gemma3", Gemma3TextConfig)


def nibbles(words, order):
    """int32 (..., n) -> (..., 8 n): value order[i] of each word stands in its bits 4 i ... 4 i + 3."""
    out = np.empty((*words.shape, 8), np.int64)
    for i, place in enumerate(order):
        out[..., place] = words.view(np.uint32) >> np.uint32(4 * i) & 15
    return out.reshape(*words.shape[:-1], -1)


def read_gptq(get):
    codes = nibbles(np.ascontiguousarray(get("qweight").T), range(8)).T  # (K, N)
    zeros, scales, groups = nibbles(get("qzeros"), range(8)) + 1, get("scales").astype(np.float32), get("g_idx")
    return ((codes - zeros[groups]) * scales[groups]).T


def read_awq(get):
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    codes, zeros, scales = nibbles(get("qweight"), order), nibbles(get("qzeros"), order), get("scales")
    repeat = len(codes) // len(zeros)
    return ((codes - zeros.repeat(repeat, 0)) * scales.astype(np.float32).repeat(repeat, 0)).T


READERS = {"gptq": read_gptq, "awq": read_awq}


def read_checkpoint(folder):
    """A plain float32 model with the file's weights, dequantized."""
    raw = json.loads((folder / "config.json").read_text())
    reader = READERS[raw["quantization_config"]["quant_method"]]
    state = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            state |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in [n.removesuffix(".qweight") for n in state if n.endswith(".qweight")]:
        found = reader(lambda key, name=name: state[f"{name}.{key}"].numpy())
        state[f"{name}.weight"] = torch.from_numpy(found)
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    own = model.state_dict()
    missing = model.load_state_dict({n: t for n, t in state.items() if n in own}, strict=False).missing_keys
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    return model.eval()


def make_rounded(folder, group_size, sym):
    """The model with every linear of its layers rounded to nearest."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = round_to_nearest(module.weight.data, group_size, sym).dequantize()
    return model


def calibration_rows(base, chats, num_rows=128):
    dataset = load_dataset(str(chats), load_tokenizer(str(base)), DataConfig(max_seq_length=CONFIG.max_seq_length))
    return dataset, [batch["input_ids"] for batch in first_batches(dataset.examples, 128, False, num_rows)[0]]


def run_layers(merged, dataset, num_rows=2):
    """The layers of `calibrate`, and its model."""
    layered = LayeredModel(merged, CPU)
    chosen, _ = first_batches(dataset.examples, CONFIG.max_seq_length, layered.is_packed, num_rows)
    return calibrate(layered, layered.first_rows(chosen)), layered.model


@torch.no_grad()
def distance(model, other, rows):
    """Of logits, over rows."""
    return sum((model(ids).logits - other(ids).logits).square().sum().item() for ids in rows) ** 0.5


def correlated(K, num_tokens, seed=0):
    """H of inputs with strong correlations, a few large channels and one that is always zero."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, K, generator=rng) @ torch.randn(K, K, generator=rng) / K**0.5
    x = (x + torch.randn(num_tokens, 1, generator=rng)) * (1 + 9 * (torch.rand(K, generator=rng) > 0.95))
    x[:, 3] = 0
    return x.T @ x, x


def output_error(W, W_hat, H):
    return (((W - W_hat) @ H) * (W - W_hat)).sum().item()


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_packing_is_what_the_format_says(format):
    """Exact: the reader's values of random codes are scale (code - zero), with and without groups in order."""
    rng = torch.Generator().manual_seed(0)
    N, K, g = 24, 64, 32
    codes = torch.randint(0, 16, (N, K), generator=rng, dtype=torch.uint8)
    zeros = torch.randint(1 if format == "gptq" else 0, 16, (N, K // g), generator=rng, dtype=torch.uint8)
    groups = torch.arange(K, dtype=torch.int32) // g
    if format == "gptq":
        groups = groups[torch.randperm(K, generator=rng)]
    weight = Grouped(codes, torch.rand(N, K // g, generator=rng).half(), zeros, groups)
    method = writer.STORAGES[format]
    found = {key: tensor.contiguous() for key, tensor in method.tensors(weight).items()}
    names = {torch.int32: "I32", torch.float16: "F16"}
    assert {k: (names[t.dtype], tuple(t.shape)) for k, t in found.items()} == method.shapes(N, K, CONFIG, "F16")
    index = groups.long()
    expected = (codes.float() - zeros.float()[:, index]) * weight.scales_NG.float()[:, index]
    assert np.array_equal(READERS[format](lambda key: found[key].numpy()), expected.numpy())


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
def test_gptq_is_the_paper_s_update(sym, desc_act):
    """Against the definition in float64: each step inverts the Hessian of the columns that are left."""
    K, g = 64, 32
    W = torch.randn(16, K, generator=torch.Generator().manual_seed(1))
    H, _ = correlated(K, 256)
    config = CalibrationConfig(group_size=g, sym=sym, desc_act=desc_act)
    found = gptq.quantize(W, H, config)
    left, damped = W.double(), H.double()
    damped[3, 3] = H.diagonal().mean()
    damped += config.damp_percent * H.diagonal().mean() * torch.eye(K)
    order = H.diagonal().argsort(descending=True) if desc_act else torch.arange(K)
    differing = 0
    for at, k in enumerate(order):
        if at % g == 0:
            scale, zero = gptq.choose_scales(left[:, order[at : at + g]].float(), sym, gptq.FIRST_ZERO)
        inverse = torch.linalg.inv(damped[order[at:]][:, order[at:]])
        code = ((left[:, k] / scale[:, 0].double()).round() + zero[:, 0]).clamp(0, 15)
        error = (left[:, k] - (code - zero[:, 0]) * scale[:, 0].double()) / inverse[0, 0]
        left[:, order[at:]] -= error[:, None] * inverse[:1]
        differing += int((found.codes_NK[:, k] != code).sum())
    assert differing <= 0.005 * W.numel()  # float32 against float64, where a weight stands between two levels


def test_without_correlations_gptq_is_round_to_nearest():
    W = torch.randn(16, 128, generator=torch.Generator().manual_seed(2))
    found = gptq.quantize(W, torch.eye(128), CalibrationConfig(group_size=64))
    expected = round_to_nearest(W, 64, sym=True)
    assert torch.equal(found.codes_NK, expected.codes_NK) and torch.equal(found.scales_NG, expected.scales_NG)


@pytest.mark.parametrize("sym", [True, False])
def test_round_to_nearest_is_within_half_a_level(sym):
    """|w - w_hat| <= scale / 2, and once more what float16 rounds off a scale, for weights on one side of zero too."""
    W = torch.randn(16, 128, generator=torch.Generator().manual_seed(3))
    W[:4] = W[:4].abs()
    W[4:8] = -W[4:8].abs()
    found = round_to_nearest(W, 32, sym)
    scale = found.scales_NG.float().repeat_interleave(32, 1)
    reach = torch.where(W > 0, 15 - found.zeros_NG.repeat_interleave(32, 1).float(), 0)  # sym: 7 above, 8 below
    beyond = (W - reach * scale).clamp(min=0) if sym else 0
    assert ((W - found.dequantize()).abs() <= scale * (0.5 + 15 * 2**-11) + beyond).all()


@pytest.mark.parametrize("seed", range(4))
def test_output_errors_are_below_round_to_nearest(seed):
    """On correlated inputs, of the output itself, not of H alone."""
    K, g = 128, 32
    W = torch.randn(64, K, generator=torch.Generator().manual_seed(seed))
    H, x = correlated(K, 512, seed)
    errors = {}
    for sym in (True, False):
        rounded = round_to_nearest(W, g, sym).dequantize()
        for desc_act in (True, False):
            config = CalibrationConfig(group_size=g, sym=sym, desc_act=desc_act)
            found = gptq.quantize(W, H, config).dequantize()
            errors[f"gptq sym={sym} desc_act={desc_act}"] = (found, rounded)
    errors["awq's clipping"] = (awq.quantize(W, H, g).dequantize(), round_to_nearest(W, g, False).dequantize())
    for name, (found, rounded) in errors.items():
        ours, plain = ((x @ (W - other).T).square().sum().item() for other in (found, rounded))
        assert ours < plain, (name, ours / plain)
        assert abs(ours - output_error(W, found, H)) < 1e-3 * ours


@pytest.mark.parametrize("family", EVERY)
def test_scales_alone_change_no_logits(tmp_path, chats, family, monkeypatch):
    """Random s in [0.5, 2] on the input of every linear: the model computes what it did, to float32's rounding."""
    rng = torch.Generator().manual_seed(4)
    monkeypatch.setattr(awq, "search", lambda _, inputs, source, g: 4 ** (torch.rand(source.size, generator=rng) - 0.5))
    base = make_checkpoint(tmp_path / "base", family)
    dataset, rows = calibration_rows(base, chats)
    merged = open_merged(str(base), None, "original")
    plain, scaled = (AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval() for _ in range(2))
    for layer in run_layers(merged, dataset)[0]:
        names = {name for inputs in layer.inputs for name in inputs.names}
        scaling = awq.scale_layer(layer, names, 32)
        assert len(layer.inputs) == 4 and set(scaling.columns) == names, "each linear has an s"
        state = {f"{name}.weight": scaling.weight(name) for name in names} | scaling.changed
        scaled.get_submodule(layer.name).load_state_dict(state, strict=False)
    for ids in rows[:4]:
        with torch.no_grad():
            z, expected = scaled(ids).logits, plain(ids).logits
        assert (z - expected).norm() <= 2**-24 * 64 * expected.norm()  # some 20 products a path, of 64 terms each


def test_a_bfloat16_norm_is_divided_exactly(tmp_path, chats):
    """What rounding a norm's weight takes away goes into s: stored weight times s is the weight, to float32."""
    base = make_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    dataset, _ = calibration_rows(base, chats)
    merged = open_merged(str(base), None, "original")
    layer = next(run_layers(merged, dataset)[0])
    gain = layer.module.input_layernorm.weight.float()
    scaling = awq.scale_layer(layer, {n for inputs in layer.inputs for n in inputs.names}, 32)
    stored = scaling.changed["input_layernorm.weight"]
    assert stored.dtype == torch.bfloat16 and not torch.equal(stored.float(), gain)
    assert ((stored.float() * scaling.columns["self_attn.q_proj"] - gain).abs() <= 2**-23 * gain.abs()).all()


@pytest.mark.parametrize("format", ["gptq", "awq"])
@pytest.mark.parametrize("family", EVERY)
def test_families_read_back(tmp_path, chats, family, format):
    """The reader's logits on the calibration rows are nearer to the model's than round-to-nearest's."""
    base = make_checkpoint(tmp_path / "base", family)
    export_folder(format, str(base), None, str(chats), str(tmp_path / "out"), CONFIG)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    _, rows = calibration_rows(base, chats)
    found = distance(plain, read_checkpoint(tmp_path / "out"), rows)
    rounded = distance(plain, make_rounded(base, 32, sym=format == "gptq"), rows)
    print(f"{family} {format}: {found / rounded:.3f} of round-to-nearest's distance")
    assert found < rounded


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_a_merged_model_in_shards(tmp_path, chats, format):
    """An adapter over a sharded, tied bfloat16 base: the files are the base's by name, the base stays as it was."""
    one = make_checkpoint(tmp_path / "one", dtype=torch.bfloat16, tie_word_embeddings=True)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(one, dtype=torch.bfloat16).save_pretrained(base, max_shard_size="60KB")
    load_tokenizer(str(one)).save_pretrained(base)
    hashes = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in base.iterdir()}
    make_adapter(tmp_path / "adapter", base)
    adapter = str(tmp_path / "adapter")
    merge(str(base), adapter, str(tmp_path / "merged"))
    written = export_folder(format, str(base), adapter, str(chats), str(tmp_path / "out"), CONFIG)
    out = written.folder
    assert written.left_out == written.few == []
    assert {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in base.iterdir()} == hashes
    assert sorted(p.name for p in out.glob("*.safetensors")) == sorted(p.name for p in base.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {name for name, place in index.items() if place == path.name} == set(file.keys())
    assert (out / "tokenizer.json").is_file() and (out / "generation_config.json").is_file()
    assert (out / "quantize_config.json").is_file() == (format == "gptq")
    live = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    _, rows = calibration_rows(base, chats)
    found = distance(live, read_checkpoint(out), rows)
    assert found < distance(live, make_rounded(tmp_path / "merged", 32, sym=format == "gptq"), rows)


def test_the_adapter_s_tokenizer_goes_along(tmp_path, chats, monkeypatch):
    """It reads the data, as it did in training, and lies in the result in place of the base's."""
    base = make_checkpoint(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base)
    tokenizer, read = load_tokenizer(str(base)), []
    tokenizer.chat_template += "{# the adapter's #}"
    tokenizer.save_pretrained(tmp_path / "adapter")
    real = writer.load_dataset
    monkeypatch.setattr(writer, "load_dataset", lambda path, own, config: read.append(own) or real(path, own, config))
    where = (str(base), str(tmp_path / "adapter"), str(chats), str(tmp_path / "out"))
    out = export_folder("gptq", *where, CONFIG).folder
    assert [own.chat_template for own in read] == [tokenizer.chat_template]
    assert load_tokenizer(str(out)).chat_template == tokenizer.chat_template


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_linears_that_fit_no_group_stay(tmp_path, chats, format):
    """An intermediate size of 100: down's inputs make no groups of 32, gate's and up's outputs no words of 8."""
    base = make_checkpoint(tmp_path / "base", intermediate_size=100)
    written = export_folder(format, str(base), None, str(chats), str(tmp_path / "out"), CONFIG)
    out, left_out = written.folder, written.left_out
    names = [f"model.layers.{i}.mlp.{name}_proj" for i in range(2) for name in ("gate", "up", "down")]
    assert sorted(left_out) == sorted(names)
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    if format == "awq":
        assert sorted(said["modules_to_not_convert"]) == sorted(names)
    else:
        inside = {f"self_attn.{name}_proj" for name in "qkvo"}
        assert set(said["modules_in_block_to_quantize"][0]) == inside and len(said["dynamic"]) == len(names)
    plain, found = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), read_checkpoint(out)
    for name in names:
        assert torch.equal(found.get_submodule(name).weight, plain.get_submodule(name).weight)


@pytest.mark.parametrize("largest, widths, expected", [(128, (256, 704), 64), (128, (256, 512), 128), (64, (256,), 64)])
def test_the_group_size_is_the_largest_that_all_widths_take(largest, widths, expected):
    assert pick_group_size(widths, largest) == expected


def test_one_layer_is_in_memory_at_a_time(tmp_path, chats):
    base = make_checkpoint(tmp_path / "base", num_hidden_layers=4)
    dataset, _ = calibration_rows(base, chats)
    layers, model = run_layers(open_merged(str(base), None, "original"), dataset)
    seen = []
    for layer in layers:
        real = {n for n, p in model.named_parameters() if p.device.type != "meta"}
        seen.append(layer.name)
        assert real == {f"{layer.name}.{n}" for n, _ in layer.module.named_parameters()}
    assert seen == [f"model.layers.{i}" for i in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_H_is_exact_whatever_the_inputs_dtype(tmp_path, chats, dtype):
    """Against float64, within float32's sum over the tokens. Inputs rounded to bfloat16 would be 2**-9 away."""
    base = make_checkpoint(tmp_path / "base", dtype=dtype)
    dataset, _ = calibration_rows(base, chats)
    layered = LayeredModel(open_merged(str(base), None, "original"), CPU)
    layered.dtype = dtype  # on each CPU
    rows = layered.first_rows(first_batches(dataset.examples, CONFIG.max_seq_length, layered.is_packed, 2)[0])
    layer, received = next(calibrate(layered, rows)), {}
    for name, module in layer.module.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, args, name=name: received.setdefault(name, []).append(args[0]))
    with torch.no_grad(), layered.packing():
        for row in rows:
            layered.run(0, layer.module, row)
    assert len(layer.inputs) == 4 and torch.backends.mkldnn.matmul.fp32_precision != "bf16"
    for one in layer.inputs:
        x = torch.cat([part.reshape(-1, part.shape[-1]) for part in received[one.names[0]]])
        assert x.dtype == dtype
        x = x.double()
        bound = len(x) * 2**-24 * (x.abs().T @ x.abs())
        assert ((one.H_KK - x.T @ x).abs() <= bound).all()


def test_an_interrupted_export_leaves_nothing(tmp_path, chats, monkeypatch):
    base = make_checkpoint(tmp_path / "base")
    real = gptq.quantize

    def stop_in_the_second_layer(W_NK, H_KK, config, dtype, calls=[]):  # noqa: B006  the count of calls
        calls.append(1)
        if len(calls) > 8:
            raise KeyboardInterrupt
        return real(W_NK, H_KK, config, dtype)

    monkeypatch.setattr(gptq, "quantize", stop_in_the_second_layer)
    with pytest.raises(KeyboardInterrupt):
        export_folder("gptq", str(base), None, str(chats), str(tmp_path / "out"), CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_model_with_other_tensors_is_refused(tmp_path, chats):
    base = make_checkpoint(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    with pytest.raises(UserError, match=r"must hold model.layers.0.self_attn.q_proj.bias"):
        export_folder("gptq", str(base), None, str(chats), str(tmp_path / "out"), CONFIG)
    assert not (tmp_path / "out").exists()


def test_experts_in_one_tensor_are_refused_not_left_in_16_bits(tmp_path, chats):
    base = make_checkpoint(tmp_path / "base", "gpt_oss")
    with pytest.raises(UserError, match=r"tensors of their own[^\0]*model\.layers\.0\.mlp\.experts\."):
        export_folder("gptq", str(base), None, str(chats), str(tmp_path / "out"), CONFIG)
    assert not (tmp_path / "out").exists()


def read_experts(folder):
    """A plain float32 model of experts with the file's weights, dequantized, and its tensors."""
    raw = json.loads((folder / "config.json").read_text())
    reader = READERS[raw.pop("quantization_config")["quant_method"]]
    with safe_open(folder / "model.safetensors", "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in [n.removesuffix(".qweight") for n in state if n.endswith(".qweight")]:
        parts = {key: state.pop(f"{name}.{key}", None) for key in ("qweight", "qzeros", "scales", "g_idx")}
        state[f"{name}.weight"] = torch.from_numpy(reader(lambda key, parts=parts: parts[key].numpy()))
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    kind = type(AutoModelForCausalLM.from_config(config))
    return kind.from_pretrained(None, config=config, state_dict=dict(state), dtype=torch.float32).eval(), state


@pytest.mark.parametrize("format", ["gptq", "awq"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_calibrated_on_their_own_tokens(family, format, tmp_path, chats, monkeypatch):
    """transformers' own model of the dequantized file, with an adapter, is nearer to the merge than with the nearest
    codes of experts, which those with few tokens get. They are named."""
    base = make_checkpoint(tmp_path / "base", family)
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "v_proj"])
    adapter = str(tmp_path / "adapter")
    merged = merge(str(base), adapter, str(tmp_path / "merged"))
    plain, untuned = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (merged, base))
    _, rows = calibration_rows(base, chats)
    distances, states = [], []
    for number in range(2):
        if number:  # no expert has enough tokens
            monkeypatch.setattr(routed.RoutedExperts, "inputs", lambda *_: torch.zeros(0, 64))
        out = tmp_path / f"out{number}"
        written = export_folder(format, str(base), adapter, str(chats), str(out), CONFIG)
        model, state = read_experts(out)
        distances.append(distance(plain, model, rows))
        states.append(state)
        count = 2 * model.config.num_local_experts
        assert len(written.few) == count if number else len(written.few) < count, written.few
        assert any("nearest" in line for line in written.lines()) == bool(written.few)
    assert distances[0] < distances[1] < distance(plain, untuned, rows)
    assert any(".experts." in name and not torch.equal(W, states[1][name]) for name, W in states[0].items())
    said = json.loads((tmp_path / "out0" / "config.json").read_text())["quantization_config"]
    kept = said["modules_to_not_convert"] if format == "awq" else [n.replace("[.]", ".")[2:] for n in said["dynamic"]]
    assert len(kept) == 2 and all(name.endswith(".gate") for name in kept), "the routers, as the checkpoint names them"


def test_a_norm_before_experts_is_not_divided(tmp_path, chats, monkeypatch):
    """glm4_moe's shared expert has the very input that router and experts have, which no s of AWQ reaches."""
    make = partial(Glm4MoeConfig, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1)
    monkeypatch.setitem(conftest.EXPERT_FAMILIES, "glm4_moe", partial(make, topk_group=1, first_k_dense_replace=1))
    base = make_checkpoint(tmp_path / "base", "glm4_moe")
    dataset, rows = calibration_rows(base, chats)
    dense, sparse = (
        {one.norm for one in layer.inputs} for layer in run_layers(open_merged(str(base), None, "original"), dataset)[0]
    )
    assert dense == {"input_layernorm", "post_attention_layernorm", ""} and sparse == {"input_layernorm", ""}
    out = export_folder("awq", str(base), None, str(chats), str(tmp_path / "out"), CONFIG).folder
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model, _ = read_experts(out)
    size = sum(plain(ids).logits.square().sum().item() for ids in rows) ** 0.5
    assert distance(plain, model, rows) < 0.5 * size
