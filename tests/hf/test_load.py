"""Behaviour: loading through both doors; six families against transformers on the dequantized weights."""

import hashlib

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from peft import IA3Config, LoraConfig, OFTConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import onecard
from onecard.adapter.layers import LoraLinear4bit, lora_config
from onecard.config import LoraSettings
from onecard.errors import UserError
from onecard.hf.convert import is_mapped, mapped_files
from onecard.hf.load import load_tokenizer
from onecard.memory.measure import begin_peak, peak_memory_bytes
from onecard.nn.linear import Linear4bit
from tests.conftest import FAMILIES, make_checkpoint
from tests.forks import Forked


def hashes(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def dequantized_twin(model, folder, inside=""):
    """transformers' own model whose linears hold what ours dequantize to. `inside`: the end of their names that peft
    has added."""
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            twin.get_submodule(name.removesuffix(inside)).weight.data = module.dequantize().float()
    return twin


@pytest.mark.parametrize("family", list(FAMILIES))
def test_logits_are_those_of_the_dequantized_weights(family, tmp_path):
    folder = make_checkpoint(tmp_path, family)
    model = onecard.load_model(str(folder), compute_dtype="float32", device="cpu")
    twin = dequantized_twin(model, folder)
    ids = torch.randint(5, 200, (2, 17), generator=torch.Generator().manual_seed(0))
    ours, theirs = model(ids).logits, twin(ids).logits
    exact = twin.double()(ids).logits
    # No worse than plain: both are float32 computations of the same function in another order of sums.
    floor = exact.abs().max() * torch.finfo(torch.float32).eps
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + floor
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) == 2 * (4 if family == "phi3" else 7)


def test_a_checkpoint_in_bfloat16_keeps_embeddings_and_head_so(tmp_path):
    folder = make_checkpoint(tmp_path, dtype=torch.bfloat16)
    model = onecard.load_model(str(folder), compute_dtype="float32", device="cpu")
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
    logits = model(torch.tensor([[5, 6, 7]])).logits
    assert logits.dtype == torch.float32
    twin = dequantized_twin(model, folder)
    exact = twin.double()(torch.tensor([[5, 6, 7]])).logits
    assert (logits - exact).abs().max() <= 64 * exact.abs().max() * torch.finfo(torch.float32).eps


def test_tied_embeddings_stay_one_tensor(tmp_path):
    folder = make_checkpoint(tmp_path, dtype=torch.bfloat16, tie_word_embeddings=True)
    model = onecard.load_model(str(folder), compute_dtype="float32", device="cpu")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_small_tensors_leave_the_mapped_file_and_written_pages_stay(tmp_path):
    folder = str(make_checkpoint(tmp_path, "llama"))
    first = onecard.load_model(folder, device="cpu")
    assert not any(is_mapped(tensor, mapped_files()) for tensor in first.state_dict().values())
    whole = load_file(next(tmp_path.rglob("*.safetensors")))["model.embed_tokens.weight"]
    assert is_mapped(whole, mapped_files())
    whole[3] += 1.0  # in the process's own copy of the page
    expected = whole.clone()
    onecard.load_model(folder, device="cpu")  # releases the file's pages
    assert torch.equal(whole, expected)


def test_gpt2_style_transposed_weights(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=32)).save_pretrained(tmp_path)
    model = onecard.load_model(str(tmp_path), compute_dtype="float32", device="cpu")
    original = GPT2LMHeadModel.from_pretrained(tmp_path)
    W = original.transformer.h[0].attn.c_attn.weight.T
    module = model.transformer.h[0].attn.c_attn
    packed, state = onecard.quantize_4bit(W.contiguous())
    assert torch.equal(module.weight, packed) and torch.equal(
        module.dequantize(), onecard.dequantize_4bit(packed, state)
    )
    ids = torch.tensor([[1, 2, 3]])
    assert (model(ids).logits - original.eval()(ids).logits).norm() < 0.5 * original(ids).logits.norm()


def seed_snippet(folder, **lora):
    """The article's code with one import changed."""
    from onecard import BitsAndBytesConfig

    bnb_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
    )
    model = AutoModelForCausalLM.from_pretrained(str(folder), quantization_config=bnb_config, device_map="auto")
    peft_config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **lora)
    return get_peft_model(model, peft_config)


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_the_seeds_code_trains_and_plain_peft_reads_its_adapter(lora, tmp_path):
    folder = make_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    before = hashes(folder)
    model = seed_snippet(folder, **lora)
    ids = torch.randint(5, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    model.save_pretrained(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    # The adapter was trained on the 4-bit base; on the 16-bit one it must still take off most of what it learned.
    assert plain(ids, labels=ids).loss.item() < losses[0] - 0.2
    assert hashes(folder) == before


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
        VeraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        OFTConfig(oft_block_size=8, r=0, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_adapters_of_peft_train(config, checkpoint):
    model = get_peft_model(onecard.load_model(str(checkpoint), compute_dtype="float32", device="cpu"), config)
    ids = torch.randint(5, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(2):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[1] < losses[0]


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_the_fused_layer_is_pefts(settings, checkpoint):
    ids = torch.randint(5, 200, (1, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for fused in (True, False):
        model = onecard.load_model(str(checkpoint), compute_dtype="float32", device="cpu")
        config = lora_config(LoraSettings(**settings))
        if not fused:
            config._custom_modules = None
        torch.manual_seed(3)
        model = get_peft_model(model, config)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(4), std=0.1)
        loss = model(ids, labels=ids).loss
        loss.backward()
        found.append((loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
        assert any(isinstance(m, LoraLinear4bit) for m in model.modules()) == fused
    (loss, grads), (other_loss, other_grads) = found
    # The same sums in another order: float32 rounding, grown by two layers.
    assert abs(loss - other_loss) <= 1e-5 * abs(loss)
    for name, grad in grads.items():
        assert (grad - other_grads[name]).norm() <= 1e-4 * other_grads[name].norm() + 1e-7, name


def test_merging_into_4_bits_is_refused(checkpoint):
    model = get_peft_model(onecard.load_model(str(checkpoint), device="cpu"), lora_config(LoraSettings()))
    with pytest.raises(UserError, match="16-bit"):
        model.merge_and_unload()


@pytest.mark.parametrize(
    "kwargs", [{"load_in_8bit": True}, {"load_in_4bit": False}, {"bnb_4bit_quant_type": "nf3"}, {"nonsense": 1}]
)
def test_config_refuses_what_it_cannot_do(kwargs):
    with pytest.raises(UserError):
        onecard.BitsAndBytesConfig(**kwargs)


@pytest.mark.parametrize("weights", [True, False])
def test_of_a_hub_s_files_only_what_is_used_is_fetched(weights, monkeypatch):
    """Weights that lie there again for other programs are not; for its tokenizer none. The README has the licence."""
    there = ["config.json", "tokenizer.model", "tokenizer_config.json", "additional_chat_templates/tool.jinja",
             "model-00001-of-00002.safetensors", "model.safetensors.index.json", "consolidated.safetensors",
             "consolidated.00.pth", "original/model.safetensors", "pytorch_model.bin", "README.md"]  # fmt: skip
    fetched = []

    def snapshot_download(repo_id, **patterns):
        fetched.extend(filter_repo_objects(there, **patterns))
        raise OSError("out of reach")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UserError, match="out of reach"):
        onecard.load_model("org/name", device="cpu") if weights else load_tokenizer("org/name")
    assert fetched == [*there[:4], *(there[4:6] if weights else there[5:6]), "README.md"]


def peak_of_load(warm, folder):
    """Print the peak of a load in bytes beyond what the process had."""
    cpu = torch.device("cpu")
    onecard.load_model(str(warm), device="cpu")  # libraries' own memory
    before = begin_peak(cpu)
    onecard.load_model(str(folder), device="cpu")
    print(peak_memory_bytes(cpu) - before)


def test_an_embedding_and_a_head_are_not_in_memory_at_a_time(tmp_path):
    """The check for NaN reads each of them whole, and leaves it in its file."""
    warm = make_checkpoint(tmp_path / "warm")
    folder = make_checkpoint(
        tmp_path / "wide", dtype=torch.bfloat16, vocab_size=150_000, hidden_size=256, tie_word_embeddings=False
    )
    done = Forked(peak_of_load, warm, folder).wait()
    assert done.code == 0, done.err
    size = 2 * 150_000 * 256
    assert int(done.out.split()[-1]) < 1.5 * size
