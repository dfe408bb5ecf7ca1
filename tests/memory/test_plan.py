"""Exact: terms against the parameters of real models; public models' sizes against what they are known for."""

import re
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig

import onecard
from onecard.adapter.layers import lora_config
from onecard.config import LoraSettings, ServeConfig, TrainConfig, make_config, parse_bytes
from onecard.errors import UserError
from onecard.hf.skeleton import Model, meta_model
from onecard.kernels.cpu import native
from onecard.memory.inputs import MemoryStrategy, PlanInputs
from onecard.memory.model import find_model, known_config
from onecard.memory.plan import OF_MODEL, changed, plan, plan_model, plan_server
from onecard.memory.shapes import KNOWN
from onecard.memory.strategy import total_bytes
from onecard.memory.terms import plan_terms
from onecard.nn.experts import weights_of
from onecard.optim.adamw import AdamW
from tests.conftest import EXPERT_FAMILIES, make_checkpoint

BILLIONS = {
    "llama-2-7b": 6.74, "llama-2-13b": 13.02, "llama-2-70b": 68.98, "llama-3-8b": 8.03, "llama-3-70b": 70.55,
    "llama-3.1-405b": 405.85, "llama-3.2-1b": 1.24, "llama-3.2-3b": 3.21, "mistral-7b": 7.24,
    "mistral-large-123b": 122.61, "qwen2.5-0.5b": 0.49, "qwen2.5-7b": 7.62, "qwen2.5-72b": 72.71,
    "qwen3-0.6b": 0.60, "qwen3-8b": 8.19, "qwen3-32b": 32.76, "mixtral-8x7b": 46.70, "qwen3-30b-a3b": 30.53,
    "qwen3-235b-a22b": 235.09, "gpt-oss-20b": 20.91, "gpt-oss-120b": 116.83, "llama-33b": 32.53, "llama-65b": 65.29,
    "llama-3.1-8b": 8.03, "llama-3.1-70b": 70.55, "qwen2.5-1.5b": 1.54, "qwen2.5-3b": 3.09, "qwen2.5-14b": 14.77,
    "qwen2.5-32b": 32.76, "qwen3-1.7b": 1.72, "qwen3-4b": 4.02, "qwen3-14b": 14.77,
}  # fmt: skip


@pytest.mark.parametrize("name", BILLIONS)
def test_public_models_have_their_published_size(name):
    count = sum(p.numel() for p in meta_model(known_config(name), name).parameters())
    assert round(count / 1e9, 2) == pytest.approx(BILLIONS[name], abs=0.0101)


@pytest.mark.parametrize("name", BILLIONS)
def test_a_plan_counts_every_weight_of_a_public_model(name):
    """Half a byte for each weight in 4 bits and two for each other one: together the published size."""
    terms = {term.name: term.num_bytes for term in plan(name, compute_dtype="bfloat16").terms}
    in_4_bits = 2 * sum(size for term, size in terms.items() if term.endswith("4-bit codes"))
    others = terms["embeddings, norms, head"] / 2
    assert round((in_4_bits + others) / 1e9, 2) == pytest.approx(BILLIONS[name], abs=0.0101)


def test_every_known_name_has_its_published_size():
    assert KNOWN.keys() == BILLIONS.keys()


@pytest.mark.parametrize("name", ["gpt-oss-20b", "llama-3.2-1b"])
@pytest.mark.parametrize("fields", [{"max_seq_length": 64}, {"per_device_train_batch_size": 7}])
def test_what_a_change_of_rows_does_not_compute_again_is_the_same(name, fields):
    """Some of it has no equality, such as a term's activations: the terms are compared, too."""
    own = {"target_parameters": ["down_proj"]} if name == "gpt-oss-20b" else {"use_dora": True}
    more = {"data": "-", "model": name, "r": 8, **own}
    before = PlanInputs(find_model(name), TrainConfig(**more), torch.bfloat16)
    for each in OF_MODEL:
        getattr(before, each)
    found, fresh = changed(before, **fields), PlanInputs(before.model, TrainConfig(**more, **fields), torch.bfloat16)
    assert set(OF_MODEL) <= vars(found).keys()
    assert all(getattr(found, each) == getattr(fresh, each) for each in OF_MODEL)
    assert plan_terms(found) == plan_terms(fresh) != plan_terms(before)
    assert changed(before, r=16, **fields).num_lora > before.num_lora  # not only rows


def test_a_plan_without_its_searches_is_the_same_plan():
    known, config = find_model("llama-3.2-1b"), TrainConfig(data="-", model="llama-3.2-1b")
    fast, whole = (plan_model(known, config, "qlora", 3 << 30, searches) for searches in (False, True))
    assert fast.terms == whole.terms and fast.choice == whole.choice and fast.time == whole.time
    assert fast.largest_length is None and whole.largest_length


def test_the_terms_of_a_loaded_model(checkpoint):
    """What the model holds is what the plan says, to the byte."""
    found = {term.name: term.num_bytes for term in plan(str(checkpoint), r=4, compute_dtype="bfloat16").terms}
    model = onecard.load_model(str(checkpoint), compute_dtype=torch.bfloat16, device="cpu")
    quantized = [module for module in model.modules() if hasattr(module, "quant_state")]
    assert found["base, 4-bit codes"] == sum(module.weight.nbytes for module in quantized)
    assert found["base, scales"] == sum(module.loaded_state.nbytes for module in quantized)
    others = sum(p.nbytes for p in model.parameters() if p.is_floating_point())
    assert found["embeddings, norms, head"] == others
    assert found["LoRA weights"] == sum(4 * 4 * (m.in_features + m.out_features) for m in quantized)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_terms_of_modules_saved(dtype, checkpoint):
    fields = {"r": 4, "compute_dtype": dtype, "gradient_accumulation_steps": 2, "modules_to_save": ["lm_head"]}
    found = {term.name: term.num_bytes for term in plan(str(checkpoint), **fields).terms}
    base = onecard.load_model(str(checkpoint), compute_dtype=getattr(torch, dtype), device="cpu")
    model = get_peft_model(base, lora_config(LoraSettings(r=4, modules_to_save=["lm_head"])))
    learned = [p for p in model.parameters() if p.requires_grad]
    assert found["LoRA weights"] + found["modules saved"] == sum(p.nbytes for p in learned) == found["gradients"]
    optimizer = AdamW(learned, 1e-3)
    for p in learned:
        p.grad = torch.ones_like(p)
    optimizer.step()
    states = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert found["AdamW states"] == sum(t.nbytes for t in states)


def test_modules_saved_are_not_paged():
    fields = {"max_seq_length": 512, "modules_to_save": ["lm_head"]}
    found = plan("llama-2-7b", device_memory_bytes=3 * 10**9, **fields)
    assert not found.fits and "paged" not in found.choice
    with pytest.raises(UserError, match="weights_budget"):
        plan("llama-2-7b", weights_budget="2GiB", **fields)


@pytest.mark.parametrize("fields, match", [
    ({"modules_to_save": ["nothing"]}, "none is called"),
    ({"modules_to_save": ["mlp"]}, "in 4 bits"),
    ({"target_parameters": ["gate_up_proj"]}, "no experts"),
    ({"weights_budget": "1KiB"}, "two largest pages"),
    ({"device": "tpu"}, "cuda"),
])  # fmt: skip
def test_what_train_refuses_plan_does_too(fields, match):
    with pytest.raises(UserError, match=match):
        plan("llama-2-7b", **fields)


def test_a_budget_counts_without_a_limit():
    assert {term.name for term in plan("llama-2-7b", weights_budget="1GiB").terms} >= {"base, pages"}


def test_gpt2_s_turned_linears_are_linears():
    config = AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=4)
    model = Model(meta_model(config, "gpt2"), {})
    assert sum(m.weight.numel() for m in model.linears.values()) == 2 * 12 * 64 * 64


def test_rows_are_filled_up_as_the_loader_does():
    assert plan("llama-2-7b", max_seq_length=520).total_bytes == plan("llama-2-7b", max_seq_length=576).total_bytes


def test_a_name_is_a_whole_one(tmp_path):
    """phi3 has a qkv_proj, which is no v_proj."""
    with pytest.raises(UserError, match="matches none"):
        plan(str(make_checkpoint(tmp_path, "phi3")), target_modules=["v_proj"])


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_the_terms_of_loaded_experts(family, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "has_tiles", lambda: False)
    folder = make_checkpoint(tmp_path, family, dtype=torch.bfloat16)
    lora = LoraSettings(r=4, target_parameters=["gate_up_proj", "down_proj"])
    fields = {"r": 4, "target_parameters": lora.target_parameters, "compute_dtype": "bfloat16"}
    found = {term.name: term.num_bytes for term in plan(str(folder), **fields).terms}
    model = onecard.load_model(str(folder), compute_dtype=torch.bfloat16, device="cpu")
    weights = [weight for module in model.modules() for _, weight in weights_of(module)]
    assert found["base, 4-bit codes"] + found["experts, 4-bit codes"] == sum(w.weight.nbytes for w in weights)
    assert found["base, scales"] == sum(w.loaded_state.nbytes for w in weights)
    assert found["embeddings, norms, head"] == sum(p.nbytes for p in model.parameters() if p.is_floating_point())
    assert found["scratch"] == 2 * max(w.loaded_state.shape[-2:].numel() for w in weights)
    tuned = get_peft_model(model, lora_config(lora, model))
    assert found["LoRA weights"] == sum(p.nbytes for p in tuned.parameters() if p.requires_grad)


def test_experts_are_counted_as_bitsandbytes_would_have_them():
    (term,) = [term for term in plan("gpt-oss-120b").terms if term.name == "experts, 4-bit codes"]
    experts = 36 * 128 * 3 * 2880 * 2880
    assert term.num_bytes == experts // 2 and f"{2 * experts / 2**30:,.1f} GiB in 16 bits" in term.formula


def test_the_article_s_bill():
    """A 7B model: 16 bytes a weight in full, two with LoRA, about half with QLoRA, in at most 6 GB at 512 tokens."""
    fields = {"max_seq_length": 512, "gradient_checkpointing": True}
    full, lora, qlora = (plan("llama-2-7b", method, **fields).total_bytes for method in ("full", "lora", "qlora"))
    assert 107e9 < full < 115e9
    assert 14e9 < lora < 24e9
    assert qlora <= 6e9


def test_what_fits():
    limit = 8 * 10**9
    found = plan("llama-2-7b", device_memory_bytes=limit)
    assert found.fits and found.largest_length and found.largest_batch and not found.changes
    at = plan("llama-2-7b", device_memory_bytes=limit, max_seq_length=found.largest_length)
    assert at.fits or found.largest_length == 4096
    more = plan("llama-2-7b", device_memory_bytes=limit, per_device_train_batch_size=found.largest_batch + 1)
    assert more.fits and "in parts of at most" in more.choice, "beyond the largest batch, it is split"


def test_what_would_make_it_fit_does():
    """Each change by itself, given back to the plan, fits; and less memory than the least does not."""
    small = {"model": "llama-3.2-1b", "max_seq_length": 1024, "r": 64}
    least = plan(**small, device_memory_bytes=1).total_bytes
    none = plan(**small, device_memory_bytes=least - 50 * 2**20)
    assert not none.fits and len(none.changes) >= 4
    for change in none.changes:
        words = change.setting.removeprefix("--").split()
        if words[0] == "device-memory":
            assert plan(**small, device_memory_bytes=parse_bytes(words[1])).fits
        else:
            value = int(words[1]) if words[1].isdigit() else words[1]
            again = {**small, words[0].replace("-", "_"): value}
            assert plan(**again, device_memory_bytes=least - 50 * 2**20).fits, change
        assert change.time > 0
    nothing = plan("llama-2-70b", device_memory_bytes=10**9)
    assert (nothing.fits, nothing.largest_length, nothing.largest_batch) == (False, 0, 0)
    assert [change.setting.split()[0] for change in nothing.changes] == ["--device-memory"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_less_memory_never_takes_less_time(device):
    fields = {"device": device, "max_seq_length": 2048, "per_device_train_batch_size": 4, "optim": "paged_adamw_8bit"}
    plans = [plan("llama-2-7b", device_memory_bytes=gb * 10**9, **fields) for gb in (80, 40, 24, 12, 8, 6, 4)]
    assert all(found.fits for found in plans)
    assert plans[0].time == 1 and plans[0].moved_bytes == 0
    times = [found.time for found in plans]
    assert times == sorted(times) and plans[-1].moved_bytes > 0  # the last one pages: 4 GB for 3.4 GB of base and more


def test_generating_holds_the_cache_of_every_layer(checkpoint):
    """The cache's bytes are those of transformers' own after as many tokens, but for the layer that is growing."""
    found = {
        t.name: t.num_bytes for t in plan(str(checkpoint), "generate", max_seq_length=64, compute_dtype="float32").terms
    }
    model = onecard.load_model(str(checkpoint), compute_dtype=torch.float32, device="cpu")
    cache = model(torch.arange(64)[None], use_cache=True).past_key_values
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert found["KV cache"] == held * 3 // 2, "two layers, and one of them once more"
    assert "LoRA gradients" not in found and "AdamW states" not in found


@pytest.mark.parametrize(
    "device, more", [("cpu", {}), ("cuda", {}), ("cpu", {"init_lora_weights": "pissa", "max_seq_length": 16}),
                     ("cpu", {"train_for": "q4_0"})],
)  # fmt: skip
def test_what_a_search_counts_is_the_sum_of_the_terms(checkpoint, device, more):
    """A search counts the terms that it does not change once."""
    fields = {"model": str(checkpoint), "data": "-", "output": "-", "device": device, "optim": "paged_adamw_8bit"}
    config = make_config(TrainConfig, {"max_seq_length": 2048, **fields, "per_device_train_batch_size": 4, **more})
    inputs = PlanInputs(find_model(str(checkpoint)), config, torch.bfloat16)
    kept = [(0, 0, False), (1, 0, False), (1, 0, True), (2, 1, False), (2, 2, True)]
    budgets = (None, 0, 50_000, inputs.smallest_budget, sum(inputs.pages) - 1, sum(inputs.pages), 1 << 40)
    for budget, (again, offloaded, keeps) in product(budgets, kept):
        for offload, tokens in product((False, True), (None, 2048, 4096)):
            strategy = MemoryStrategy(again, budget, offload, offloaded, tokens, keeps)
            expected = sum(term.num_bytes for term in plan_terms(inputs, "qlora", strategy))
            assert total_bytes(inputs, strategy) == expected, strategy


def test_a_server_s_plan_has_all_answers_and_the_prefix_cache(checkpoint):
    found = plan_server(str(checkpoint), ServeConfig(max_num_seqs=3, prefix_cache="2MiB", max_model_len=64))
    one = plan(str(checkpoint), "generate", max_seq_length=64, per_device_train_batch_size=3)
    assert [vars(t) for t in found.terms if t.name != "prefix cache"] == [vars(term) for term in one.terms]
    assert found.total_bytes == one.total_bytes + (2 << 20)
    longest = plan_server(str(checkpoint), ServeConfig(max_num_seqs=1, prefix_cache="0B"))
    assert longest.terms == plan(str(checkpoint), "generate", max_seq_length=256).terms
    with pytest.raises(UserError, match="a prefix cache is a server's"):
        plan(str(checkpoint), prefix_cache_bytes=1)


def test_every_term_and_its_formula_stand_in_the_docs():
    text = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    kinds = [
        {"method": method, "device": device}
        for method in ("full", "lora", "qlora", "generate")
        for device in ("cpu", "cuda")
    ]
    plans = [plan("llama-2-7b", **kind) for kind in kinds]
    plans.append(plan("llama-2-7b", device_memory_bytes=3 * 10**9, max_seq_length=512))
    plans.append(plan("llama-2-7b", "generate", prefix_cache_bytes=1))
    names = {term.name for found in plans for term in found.terms}
    missing = [name for name in names if name not in text]
    assert not missing, missing
    told = {term.formula for term in plans[0].terms + plans[4].terms if term.name != "activations"}
    fixed = {re.sub(r"^\d+ shapes", "n shapes", formula) for formula in told}
    assert not [formula for formula in fixed if formula not in text.replace("2 P; 2 P; 4 P", "2 P 4 P 8 P")]


def test_a_hub_id_needs_no_more_than_config_and_headers(checkpoint, monkeypatch):
    from safetensors import safe_open

    asked = []

    def config_of(repository, **kwargs):
        asked.append(repository)
        return real(checkpoint, local_files_only=True)

    def headers_of(repository):
        asked.append(repository)
        with safe_open(checkpoint / "model.safetensors", "pt") as file:
            tensors = {name: SimpleNamespace(dtype=file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
        return SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})

    real = AutoConfig.from_pretrained
    expected = plan(str(checkpoint))
    monkeypatch.setattr(AutoConfig, "from_pretrained", config_of)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", headers_of)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("weights were fetched"))
    assert plan("somebody/some-model").terms == expected.terms
    assert asked == ["somebody/some-model"] * 2

    def unreachable(repository):
        raise OSError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", unreachable)
    with pytest.raises(UserError, match="no network"):
        plan("somebody/some-model")


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"max_seq_length": 5000}, "4,096"),
        ({"device_memory_bytes": 0}, "must be some memory"),
        ({"device_memory_bytes": -5}, "must be some memory"),
        ({"max_seq_length": 0}, "max_seq_length"),
        ({"r": 0}, "r:"),
        ({"target_modules": ["no_such_proj"]}, "target_modules"),
    ],
)
def test_nonsense_is_told(fields, match):
    with pytest.raises(UserError, match=match):
        plan("llama-2-7b", **fields)


@pytest.mark.parametrize("fields", [{"model": "llama-2-7"}, {"model": "llama-2-7b", "method": "x"}, {"rr": 3}])
def test_mistakes(fields):
    with pytest.raises(UserError):
        plan(**{"model": "llama-2-7b", **fields})


def test_a_near_name_is_offered():
    with pytest.raises(UserError, match="llama-2-7b"):
        plan("llama-2-7")


@pytest.mark.parametrize("text, expected", [("24GiB", 24 << 30), ("6 GB", 6 * 10**9), ("1.5mb", 1_500_000), ("7", 7)])
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-3GB", "3 parsecs"])
def test_bad_sizes(text):
    with pytest.raises(UserError):
        parse_bytes(text)


def test_a_pattern_names_the_linears_that_peft_takes():
    """Exact: a string is a pattern of whole names, a list ends of names."""
    found, listed = (
        {term.name: term.num_bytes for term in plan("llama-3.2-1b", target_modules=names).terms}["LoRA weights"]
        for names in (r".*\.(q|v)_proj", ["q_proj", "v_proj"])
    )
    assert found == listed > 0
    with pytest.raises(UserError, match="must match a linear"):
        plan("llama-3.2-1b", target_modules=r"(q|v)_proj")  # no whole name
