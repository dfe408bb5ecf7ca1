"""Exact: tensors and numbers of more families. No worse than F16: logits in llama.cpp, where it is installed."""

import json
from importlib.util import find_spec

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from onecard.config import DataConfig, ExportConfig, GgufConfig
from onecard.data.load import load_dataset
from onecard.errors import UserError
from onecard.export.gguf.families import FAMILIES as KNOWN
from onecard.export.gguf.importance import importance_of
from onecard.export.gguf.writer import export_gguf
from onecard.hf.load import load_tokenizer
from tests import conftest
from tests.conftest import PLAIN_ROPE, make_checkpoint, make_tokenizer
from tests.export.gguf.test_gguf import CASES
from tests.families.build import make_family
from tests.mxfp4 import make_mxfp4

GRANITE = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 3.0,
}
FEW = {"num_experts": 8, "num_experts_per_tok": 3}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
SETTINGS = {
    "llama": {},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 16},
    "olmo2": {},
    "smollm3": {"num_hidden_layers": 5, "use_sliding_window": False},
    "glm4": {},
    "ernie4_5": {},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "cohere2": {"num_hidden_layers": 5, "sliding_window": 16, "logit_scale": 0.25},
    "starcoder2": {},
    "gpt_neox": {"num_key_value_heads": None},
    "gpt_oss": {**LOCAL, "sliding_window": 16, "rope_parameters": PLAIN_ROPE},
    "granite": GRANITE,
    "granitemoe": {**GRANITE, **LOCAL},
    "mixtral": LOCAL,
    "qwen3_moe": {**FEW, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "olmoe": {**FEW, "num_key_value_heads": 4},
}
READ = ("starcoder2", "qwen3_moe")  # by transformers
EXPERTS = [family for family, settings in SETTINGS.items() if "num_experts_per_tok" in settings and family != "gpt_oss"]
WINDOWED = {"num_hidden_layers": 64, "sliding_window": 16, "layer_types": None}  # llama.cpp windows 64 layers only


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes a checkpoint of a family whose norms are not all 1."""

    def make(family, dtype=torch.bfloat16, **settings):
        monkeypatch.setitem(conftest.EXPERT_FAMILIES, family, CONFIG_MAPPING[family])
        folder = make_checkpoint(tmp_path / "model", family, dtype, **{**SETTINGS[family], **settings})
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        return folder

    return make


def export(model, output, outtype="bf16"):
    return export_gguf(str(model), None, str(output), GgufConfig(outtype=outtype))


def tensors_of(file):
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}


def fields_of(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@torch.no_grad()
def logits(model, ids):
    return model(torch.tensor([ids])).logits[0].float().numpy()


def in_llama_cpp(file, ids):
    """Logits of llama.cpp."""
    import llama_cpp  # type: ignore

    threads = {"n_threads": 1, "n_threads_batch": 1}
    model = llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, verbose=False, **threads)
    model.eval(ids)
    found = np.array(model.scores[: len(ids)])
    model.close()
    return found


@pytest.mark.parametrize("family", READ)
def test_transformers_reads_the_same_model(family, make, tmp_path):
    model = make(family)
    export(model, tmp_path / "m.gguf")
    config = AutoConfig.from_pretrained(model)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", config=config, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = list(range(5, 65))
    assert np.array_equal(logits(read, ids), logits(plain, ids))


@pytest.mark.parametrize(("family", "more"), [*((family, {}) for family in SETTINGS), ("exaone4", WINDOWED)])
def test_llama_cpp_computes_the_same_logits(family, more, make, tmp_path):
    """Its products have factors in F16: errors of 2^-11 of a logit's size, of some 20 products one after another, and
    more in a model of 64 layers. Without its window that one is off by more than a third."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    folder = make(family, **more)
    export(folder, tmp_path / "m.gguf", "f16")
    ids = [(7 * i * i + 3 * i + 5) % 300 for i in range(60)]
    wanted = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids)
    found, products = in_llama_cpp(tmp_path / "m.gguf", ids), 3 * more.get("num_hidden_layers", 2) + 14
    assert np.sqrt(np.square(found - wanted).mean()) < products * 2**-11 * wanted.std()


@pytest.mark.parametrize("outtype", ["bf16", "q4_k_m"])
def test_experts_in_mxfp4_stay_in_it(outtype, tmp_path, monkeypatch):
    """The file's dequantized experts are those of transformers, and their biases and sinks are in float32."""
    folder = make_mxfp4(tmp_path / "model")
    export(folder, tmp_path / "m.gguf", outtype)
    found = tensors_of(tmp_path / "m.gguf")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    stored, place = load_file(folder / "model.safetensors"), "model.layers.1.mlp.experts."
    up, down = (
        convert_moe_packed_tensors(*(stored[f"{place}{name}_{part}"] for part in ("blocks", "scales")))
        .float().mT.numpy()
        for name in ("gate_up_proj", "down_proj")
    )  # fmt: skip
    bias = stored[f"{place}gate_up_proj_bias"].float().numpy()
    expected = {"gate": (up[:, ::2], bias[:, ::2]), "up": (up[:, 1::2], bias[:, 1::2])}
    expected["down"] = (down, stored[f"{place}down_proj_bias"].float().numpy())
    for name, (weight, own) in expected.items():
        assert kinds[f"blk.1.ffn_{name}_exps.weight"] == "MXFP4"
        assert np.array_equal(found[f"blk.1.ffn_{name}_exps.weight"], weight), name
        assert np.array_equal(found[f"blk.1.ffn_{name}_exps.bias"], own), name
    assert np.array_equal(found["blk.1.attn_sinks.weight"], stored["model.layers.1.self_attn.sinks"].float())
    assert kinds["blk.1.ffn_gate_inp.weight"] == kinds["blk.1.attn_sinks.weight"] == "F32"


def test_every_family_is_read_back_somewhere():
    assert set(KNOWN) == {*SETTINGS, *(family for family, _ in CASES.values()), "gemma"}


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_three_tensors_of_a_layer(family, make, tmp_path):
    folder = make(family)
    export(folder, tmp_path / "m.gguf")
    found = tensors_of(tmp_path / "m.gguf")
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    (up,) = [t for name, t in state.items() if ".layers.1." in name and name.endswith("gate_up_proj")]
    (down,) = [t for name, t in state.items() if ".layers.1." in name and name.endswith("experts.down_proj")]
    gate, up = up.chunk(2, 1)
    for name, stack in (("gate", gate), ("up", up), ("down", down)):
        assert np.array_equal(found[f"blk.1.ffn_{name}_exps.weight"], stack.numpy()), name
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.1.ffn_gate_inp.weight"] == "F32"
    fields = {name.partition(".")[2]: value for name, value in fields_of(tmp_path / "m.gguf").items()}
    settings = SETTINGS[family]
    count = settings.get("num_experts", settings.get("num_local_experts"))
    assert (fields["expert_count"], fields["expert_used_count"]) == (count, settings["num_experts_per_tok"])


def test_importance_of_experts_is_of_their_own_tokens(make, tmp_path, chats):
    """Each expert's sums and tokens, beside the rows that the router sends to it in transformers.

    Roundings of float32 in one layer: less than 1e-4 of a sum of positive numbers.
    """
    folder = make("qwen3_moe", torch.float32, num_experts=16)
    place = {"model": str(folder), "output": str(tmp_path / "m.gguf"), "data": str(chats), "outtype": "iq4_nl"}
    config, used = ExportConfig(format="gguf", max_seq_length=128, **place), []
    source = importance_of(config)

    def keep(merged, arch):
        used.append(source(merged, arch))
        return used[0]

    written = export_gguf(config.model, None, config.output, config, importance=keep)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda module, args: seen.append((args[0].flatten(0, -2), args[1])))
    for example in load_dataset(str(chats), load_tokenizer(str(folder)), DataConfig(max_seq_length=128)).examples:
        logits(model, example.input_ids)
    x, index = torch.cat([x for x, _ in seen]), torch.cat([index for _, index in seen])
    counts = torch.bincount(index.flatten(), minlength=16)
    for name in ("gate", "up"):
        sums = used[0].sums[f"blk.0.ffn_{name}_exps.weight"]
        expected = torch.stack([x[(index == i).any(1)].square().sum(0) for i in range(16)])
        assert used[0].counts[f"blk.0.ffn_{name}_exps.weight"].tolist() == counts.tolist()
        assert ((sums - expected).abs() <= 1e-4 * expected).all()
    idle = int(counts.argmin())
    assert counts[idle] == 0, "the settings must leave an expert without tokens"
    assert f"blk.0.ffn_gate_exps.weight, expert {idle}" in written.notes[-1]
    given = used[0].of("blk.0.ffn_up_exps.weight", (16, 32, 64))
    assert [i for i, each in enumerate(given) if each is None] == torch.nonzero(counts == 0).flatten().tolist()
    assert torch.equal(given[0], used[0].sums["blk.0.ffn_up_exps.weight"][0] / counts[0])


@pytest.mark.parametrize(
    ("family", "settings", "match"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1, 1]}, "no_rope_layers"),
        ("cohere2", {"layer_types": ["full_attention"] * 5}, "layer_types"),
        ("exaone4", {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}, "sliding_window"),
        ("exaone4", {"num_hidden_layers": 64, "layer_types": ["full_attention"] * 64}, "sliding_window"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("gpt_oss", {"swiglu_limit": 6.0}, "swiglu_limit"),
        ("starcoder2", {"use_bias": False}, "use_bias"),
        ("olmo2", {"attention_bias": True}, "attention_bias"),
    ],
    ids=str,
)
def test_what_llama_cpp_would_not_compute_is_refused(family, settings, match, make, tmp_path):
    with pytest.raises(UserError, match=match):
        export(make(family, **settings), tmp_path / "m.gguf")


@pytest.fixture
def make_whole(tmp_path):
    """Makes a multimodal checkpoint with our tokenizer; `text` are settings of its text part."""

    def make_whole(family, **text):
        folder = make_family(tmp_path / "whole", family)
        make_tokenizer().save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config["text_config"] |= text
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make_whole


GEMMA3 = {"final_logit_softcapping": None, "attn_logit_softcapping": None, "query_pre_attn_scalar": 16}


@pytest.mark.parametrize(
    ("family", "text"),
    [("gemma3", GEMMA3), ("mistral3", {"sliding_window": None}), ("llava", {}), ("internvl", {})],
    ids=["gemma3", "mistral3", "llava", "internvl"],
)
def test_the_text_part_of_a_multimodal_model(family, text, make_whole, tmp_path):
    """The file has the text part's tensors only; transformers, and llama.cpp if it is there, compute its logits."""
    folder = make_whole(family, **text)
    written = export(folder, tmp_path / "m.gguf", "f16")
    assert f"the text part of {family}" in written.notes[0]
    names = tensors_of(tmp_path / "m.gguf")
    assert all(name.startswith(("blk.", "token_embd.", "output")) for name in names) and len(names) > 18
    ids = [(7 * i * i + 3 * i + 5) % 200 + 20 for i in range(60)]
    wanted = logits(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32), ids)
    config = (
        AutoConfig.from_pretrained(folder).get_text_config() if family == "gemma3" else None
    )  # it reads parts of it
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", config=config, dtype=torch.float32)
    found = [logits(read, ids)]
    if find_spec("llama_cpp"):
        found.append(in_llama_cpp(tmp_path / "m.gguf", ids))
    for each in found:
        assert np.sqrt(np.square(each - wanted).mean()) < 20 * 2**-11 * wanted.std()


@pytest.mark.parametrize(
    ("family", "match"), [("gemma3", "final_logit_softcapping"), ("qwen2_5_vl", "qwen2_5_vl_text")]
)
def test_multimodal_models_that_are_refused(family, match, make_whole, tmp_path):
    with pytest.raises(UserError, match=match):
        export(make_whole(family), tmp_path / "m.gguf")
