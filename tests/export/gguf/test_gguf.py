"""Exact: GGUF files read by transformers and the gguf package, by llama.cpp where it is installed."""

import json
import re
from random import Random

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GemmaConfig,
    PreTrainedTokenizerFast,
)
from transformers.tokenization_utils_base import generate_merges

from onecard.config import GgufConfig
from onecard.errors import UserError
from onecard.export.gguf import vocabulary
from onecard.export.gguf.modelfile import find_chat, modelfile
from onecard.export.gguf.writer import export_gguf
from onecard.export.merge.merged import merge, open_merged, read_adapter
from tests.conftest import CHATML, FAMILIES, TEXT, make_checkpoint, make_tokenizer
from tests.export.merge.test_merged import make_adapter
from tests.forks import onecard

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 16}
CASES = {
    "llama": ("llama", {"hidden_size": 64}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", {**GEMMA, "num_hidden_layers": 7}),
    "phi3": ("phi3", {}),
}
TEXTS = [
    *TEXT,
    "two  blue\tmugs\n\n  please, don't 12345",
    "<|im_start|>user\nhow many?<|im_end|>\n",
    "北京 é 🙂",
    "the lazy",
]


@pytest.fixture(autouse=True)
def more_families(monkeypatch):
    monkeypatch.setitem(FAMILIES, "gemma3_text", Gemma3TextConfig)
    monkeypatch.setitem(FAMILIES, "gemma", GemmaConfig)


def export(model, output, outtype="bf16", adapter=None, adapter_only=False, base="original"):
    config = GgufConfig(adapter_only=True) if adapter_only else GgufConfig(outtype=outtype)
    return export_gguf(str(model), None if adapter is None else str(adapter), str(output), config, base)


def fields_of(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def values_of(file):
    """Every tensor, dequantized by the gguf package."""
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_the_same_model(tmp_path, case):
    """bfloat16 in, bfloat16 out: the same logits to the bit."""
    family, settings = CASES[case]
    model = make_checkpoint(tmp_path / "model", family, torch.bfloat16, **settings)
    export(model, tmp_path / "m.gguf")
    config = None if family == "mistral" else AutoConfig.from_pretrained(model)  # of which transformers reads parts
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", config=config, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.arange(5, 65)[None]
    assert torch.equal(logits(read, ids), logits(plain, ids))


def test_numbers_of_a_model(tmp_path):
    settings = {**GEMMA, "num_hidden_layers": 4, "final_logit_softcapping": 30.0}
    layers = ["full_attention", *["sliding_attention"] * 3]
    model = make_checkpoint(tmp_path / "model", "gemma3_text", layer_types=layers, **settings)
    export(model, tmp_path / "m.gguf", "q8_0")
    expected = {
        "general.architecture": "gemma3",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q8_0,
        "gemma3.block_count": 4,
        "gemma3.context_length": 256,
        "gemma3.embedding_length": 64,
        "gemma3.feed_forward_length": 96,
        "gemma3.attention.head_count": 4,
        "gemma3.attention.head_count_kv": 2,
        "gemma3.attention.key_length": 16,
        "gemma3.attention.sliding_window": 16,
        "gemma3.attention.sliding_window_pattern": [False, True, True, True],
        "gemma3.rope.freq_base": 1_000_000.0,
        "gemma3.rope.freq_base_swa": 10_000.0,
        "gemma3.final_logit_softcapping": 30.0,
    }
    found = fields_of(tmp_path / "m.gguf")
    assert {name: found.get(name) for name in expected} == expected


def test_llama3_s_rotary_factors(tmp_path):
    """Long wavelengths are divided by the factor, short ones kept, those between by something between.

    Each is the quotient of two float32 frequencies, a few roundings from it.
    """
    model = make_checkpoint(tmp_path / "model", rope_parameters=LLAMA3_ROPE)
    export(model, tmp_path / "m.gguf")
    factors = values_of(tmp_path / "m.gguf")["rope_freqs.weight"]
    waves = 2 * np.pi * 10000.0 ** (np.arange(0, 16, 2) / 16)
    short, long = waves < 64 / 4, waves > 64 / 1
    off = factors / np.where(short, 1, 8) - 1
    assert factors.shape == (8,) and (np.abs(off[short | long]) <= 4 * 2**-24).all()
    assert ((factors > 1) & (factors < 8))[~short & ~long].all()


@pytest.mark.parametrize(("outtype", "levels"), [("f16", None), ("q8_0", 127), ("q4_0", 8)])
def test_rounding_is_the_format_s(tmp_path, outtype, levels):
    """Within half a level of each block of 32 (a whole one at the far end of Q4_0's lopsided range), F16's own 2^-11.

    The scale is stored as F16 too, which moves a value by its share of 2^-11.
    """
    model = make_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    export(model, tmp_path / "m.gguf", outtype)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == outtype.upper() and kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["output.weight"] == ("F16" if outtype == "f16" else "Q8_0")
    W = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).model.layers[0].mlp.down_proj.weight
    W = W.detach().numpy().reshape(-1, 32)
    off = np.abs(values_of(tmp_path / "m.gguf")["blk.0.ffn_down.weight"].reshape(-1, 32) - W)
    largest = np.abs(W).max(1, keepdims=True)
    bound = np.abs(W) * 2**-11 if levels is None else largest / levels * (0.5 if levels == 127 else 1.0)
    assert (off <= bound + largest * 2**-11).all()


def test_rows_that_no_block_fits_are_f16(tmp_path):
    model = make_checkpoint(tmp_path / "model", intermediate_size=72)
    export(model, tmp_path / "m.gguf", "q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q8_0"


def test_an_adapter_is_merged(tmp_path):
    base = make_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    make_adapter(tmp_path / "adapter", base, modules_to_save=["embed_tokens", "lm_head"])
    export(base, tmp_path / "m.gguf", adapter=tmp_path / "adapter", base="dequantized")
    merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.arange(5, 65)[None]
    assert torch.equal(logits(read, ids), logits(plain, ids))


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 32}, "rank_pattern": {"v_proj": 2}}],
    ids=str,
)
def test_an_adapter_alone_has_the_true_scale(tmp_path, settings):
    """alpha / rank * B A as llama.cpp adds it is the update that merging adds, under the base's names and row order.

    float32 products of the same numbers, the scale in another place: three roundings.
    """
    base = make_checkpoint(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, **settings)
    export(base, tmp_path / "a.gguf", adapter=tmp_path / "adapter", adapter_only=True)
    found, values = fields_of(tmp_path / "a.gguf"), values_of(tmp_path / "a.gguf")
    assert (found["general.type"], found["adapter.type"]) == ("adapter", "lora")
    updates = read_adapter(tmp_path / "adapter").updates
    assert len(values) == 2 * len(updates)
    export(base, tmp_path / "m.gguf")
    rows = values_of(tmp_path / "m.gguf")["blk.1.attn_q.weight"]
    W = open_merged(str(base), None, "original").read("model.layers.1.self_attn.q_proj.weight")
    order = [next(i for i, row in enumerate(W.bfloat16().float().numpy()) if (row == given).all()) for given in rows]
    for module, name, picked in (("self_attn.q_proj", "attn_q", order), ("self_attn.v_proj", "attn_v", slice(None))):
        update = updates[f"model.layers.1.{module}.weight"]
        A, B = (torch.from_numpy(values[f"blk.1.{name}.weight.lora_{part}"].copy()) for part in "ab")
        delta, expected = found["adapter.lora.alpha"] / A.shape[0] * (B @ A), update.scaling * update.B_NR @ update.A_RK
        assert (delta - expected[picked]).abs().max() <= 8 * 2**-24 * (B.abs() @ A.abs()).max() * update.scaling
        if not settings:
            assert torch.equal(B, update.B_NR[picked])


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_what_an_adapter_file_cannot_hold_is_refused(tmp_path, settings):
    base = make_checkpoint(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, **settings)
    with pytest.raises(UserError, match="leave out --adapter-only"):
        export(base, tmp_path / "a", adapter=tmp_path / "adapter", adapter_only=True)
    assert not list(tmp_path.glob("*a*.tmp")) and not (tmp_path / "a").exists()


def byte_level(steps, **kwargs):
    """make_tokenizer with another way to cut text."""
    tokenizer = make_tokenizer(**kwargs)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|im_end|>")


def split(pattern):
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
        (split(QWEN2), "qwen2"),
        (split(QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), "smaug-bpe"),
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
    ],
)
def test_pre_tokenizers_are_known_by_what_they_do(steps, name):
    backend = byte_level(steps).backend_tokenizer
    assert vocabulary.find_pre_tokenizer(backend, {"vocab": backend.get_vocab()}) == (name, [])


def test_pre_tokenizers_all_differ_on_the_probe():
    cuts = {
        name: tuple(span for _, span in vocabulary.cutter(splits).pre_tokenize_str(vocabulary.PROBE))
        for name, (splits, _) in vocabulary.PRE_TOKENIZERS.items()
        if name != "smaug-bpe"  # cuts as llama-bpe does
    }
    assert len(set(cuts.values())) == len(cuts)


def test_an_unknown_pre_tokenizer_is_said(tmp_path):
    model = make_checkpoint(tmp_path / "model")
    byte_level(split("[a-z]+|[^a-z]+")).save_pretrained(model)
    (note,) = export(model, tmp_path / "m.gguf").notes
    assert "no pre-tokenizer" in note and re.search(r"\d\d\.\d% of", note)


def test_tokens_are_the_same(tmp_path):
    model = make_checkpoint(tmp_path / "model", vocab_size=320)
    export(model, tmp_path / "m.gguf")
    tokenizer, read = (AutoTokenizer.from_pretrained(p, **k) for p, k in same(model, tmp_path))
    assert [read(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert (read.bos_token, read.eos_token, read.pad_token) == ("<|bos|>", "<|im_end|>", "<|pad|>")
    assert read.chat_template == tokenizer.chat_template == CHATML
    found = fields_of(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.tokens"][-1] == "[PAD319]" and len(found["tokenizer.ggml.tokens"]) == 320
    assert found["tokenizer.ggml.token_type"][:5] == [3, 3, 3, 3, 1] and found["tokenizer.ggml.token_type"][-1] == 5


def test_an_adapter_s_own_tokenizer_is_the_file_s(tmp_path):
    base = make_checkpoint(tmp_path / "base", vocab_size=320)
    make_adapter(tmp_path / "adapter", base)
    make_tokenizer(specials=("<|tool|>",)).save_pretrained(tmp_path / "adapter")
    export(base, tmp_path / "m.gguf", adapter=tmp_path / "adapter")
    found = fields_of(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.tokens"][4] == "<|tool|>" and found["tokenizer.ggml.token_type"][4] == 3


def same(model, folder):
    """Where transformers finds a tokenizer: the checkpoint, the GGUF file."""
    return (model, {}), (folder, {"gguf_file": "m.gguf"})


def sentencepiece_like():
    """BPE with byte fallback whose merges are every way to make each token, as those read from sentencepiece are."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    specials = ["<unk>", "<s>", "</s>", *byte_tokens]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    trained.train_from_iterator(TEXT * 2, trainer)
    vocab = trained.get_vocab()
    merges = generate_merges(vocab, {token: -i for token, i in vocab.items()})
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_sentencepiece_tokens_are_the_same(tmp_path):
    tokenizer = sentencepiece_like()
    model = make_checkpoint(tmp_path / "model", vocab_size=len(tokenizer))
    for path in model.glob("token*"):
        path.unlink()
    tokenizer.save_pretrained(model)
    assert export(model, tmp_path / "m.gguf").notes == []
    found = fields_of(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"] is True
    assert found["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6] and not found["tokenizer.ggml.add_bos_token"]
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    texts = [text for text in TEXTS if "<|" not in text]
    assert [read(text)["input_ids"] for text in texts] == [tokenizer(text)["input_ids"] for text in texts]


def joined(text, tokens, scores):
    """How llama.cpp tokenizes with scores: join the neighbours whose union scores highest, the first of equals."""
    ids, pieces = {token: i for i, token in enumerate(tokens)}, list("▁" + text.replace(" ", "▁"))
    while True:
        unions = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(zip(pieces, pieces[1:])) if a + b in ids]
        if not unions:
            return [ids[piece] for piece in pieces]
        i = -max(unions)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def test_scores_join_as_merges_do():
    tokenizer = sentencepiece_like()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, _ = vocabulary.list_tokens(state, len(tokenizer))
    scores = vocabulary.merge_scores(state["model"], len(tokenizer))
    rng = Random(0)
    letters = sorted(set("".join(TEXT)) - set("0123456789"))
    for _ in range(300):
        text = "".join(rng.choices(letters, k=12))
        assert joined(text, tokens, scores) == tokenizer(text)["input_ids"], text


def test_a_word_tokenizer_is_refused(tmp_path):
    model = make_checkpoint(tmp_path / "model")
    backend = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    for path in model.glob("token*"):
        path.unlink()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<unk>").save_pretrained(model)
    with pytest.raises(UserError, match="WordLevel"):
        export(model, tmp_path / "m.gguf")


TEMPLATES = {
    "chatml": CHATML,
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
        "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
        "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
    ),
    "gemma3": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' "
        "+ (first if loop.first else '') + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "phi3": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "default system": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
    ),
}
TALK = [("user", "how many?"), ("assistant", "two mugs"), ("user", "which\n\ncolour?")]


def run_go(template, messages):
    """The part of Go's text/template that a Modelfile's TEMPLATE uses here."""
    system = next((m["content"] for m in messages if m["role"] == "system"), "")
    form = re.fullmatch(
        r"(?:\{\{ if \.System \}\}(.*)\{\{ else \}\})?(.*?)(?:\{\{ end \}\})?\{\{ range \.Messages \}\}"
        r'\{\{ if eq \.Role "user" \}\}(.*)\{\{ else if eq \.Role "assistant" \}\}(.*)\{\{ end \}\}\{\{ end \}\}',
        template,
        re.DOTALL,
    )
    with_system, without, user, assistant = form.groups()
    made = with_system.replace("{{ .System }}", system) if system and with_system is not None else without
    for m in messages:
        if m["role"] != "system":
            made += (user if m["role"] == "user" else assistant).replace("{{ .Content }}", m["content"])
    return made


@pytest.mark.parametrize("family", TEMPLATES)
def test_ollama_s_template_writes_what_the_chat_template_writes(family):
    tokenizer = make_tokenizer(TEMPLATES[family])
    text, notes = modelfile("FROM ./m.gguf", tokenizer, [3])
    template = re.search(r'TEMPLATE """(.*)"""', text, re.DOTALL)[1]
    assert text.startswith("FROM ./m.gguf\n") and text.endswith('PARAMETER stop "<|im_end|>"\n')
    talk = [{"role": role, "content": content} for role, content in TALK]
    chats = [talk, talk[:1]]
    if family == "mistral":
        assert "leaves out system messages" in notes[0]
    else:
        assert notes == []
        chats.append([{"role": "system", "content": "Short answers."}, *talk])
    for chat in chats:
        expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert run_go(template, chat) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index ~ ': ' + m['content'] + '\n' }}{% endfor %}",
        "{% for m in messages %}{{ m['role'] + m['content'] | upper }}{% endfor %}",
        "{% for m in messages %}{{ '{{' + m['content'] + '}}' }}{% endfor %}",
        "{% if messages | length > 4 %}{{ raise_exception('too long') }}{% endif %}" + CHATML,
    ],
)
def test_a_template_of_another_form_is_left_out(template):
    text, notes = modelfile("FROM ./m.gguf", make_tokenizer(template), [3])
    assert "TEMPLATE" not in text and "write TEMPLATE" in notes[0]


def test_the_reader_s_own_bos_is_not_written_twice():
    tokenizer = make_tokenizer()
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor()
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert find_chat(tokenizer).head == ""


@pytest.mark.parametrize(
    ("family", "settings", "match"),
    [
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act"),
        ("gemma2", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type"),
    ],
)
def test_what_llama_cpp_would_not_compute_is_refused(tmp_path, family, settings, match):
    model = make_checkpoint(tmp_path / "model", family, **settings)
    with pytest.raises(UserError, match=match):
        export(model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_other_families_are_refused_by_name(tmp_path, monkeypatch):
    model = make_checkpoint(tmp_path / "model")
    config = (model / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "cohere"')
    (model / "config.json").write_text(config)
    with pytest.raises(UserError, match="llama, mistral, mixtral, qwen2"):
        export(model, tmp_path / "out")


def test_beyond_f16_is_an_error_and_leaves_nothing(tmp_path):
    model = make_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    large = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    large.model.layers[1].mlp.up_proj.weight.data[3, 4] = 1e5
    large.save_pretrained(model)
    with pytest.raises(UserError, match=r"1\.\d*e\+05|99\d+|100\d+"):
        export(model, tmp_path / "out", "f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    with pytest.raises(UserError, match="bf16"):
        export(model, tmp_path / "m.gguf", "f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_nothing_is_overwritten_and_room_is_checked(tmp_path, monkeypatch):
    model = make_checkpoint(tmp_path / "model")
    for name in ("out", "m.gguf"):
        export(model, tmp_path / name)
        with pytest.raises(UserError, match="it exists"):
            export(model, tmp_path / name)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["Modelfile", "out-bf16.gguf"]
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("onecard.export.folder.shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="room"):
        export(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_command_says_where_it_is_and_how_to_use_it(tmp_path):
    model = make_checkpoint(tmp_path / "model", "mistral", sliding_window=64)
    code, out, err = onecard("export", "--format", "gguf", "--model", model, "--output", tmp_path / "m.gguf")
    assert code == 0, err
    for said in ("m.gguf  (", "last 64 tokens", "llama-cli -m", "ollama create m -f", "lms import"):
        assert said in out, said


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"])
def test_llama_cpp_writes_the_same_tokens(tmp_path, family):
    """Greedy, from the merged file and from base and adapter; F16, in which llama.cpp computes."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    settings = {"qwen3": {"head_dim": 32}, "gemma2": GEMMA, "gemma3_text": GEMMA}.get(family, {})
    base = make_checkpoint(tmp_path / "base", family, **settings)
    make_adapter(tmp_path / "adapter", base)
    export(base, tmp_path / "m.gguf", "f16", tmp_path / "adapter", base="dequantized")
    export(base, tmp_path / "b.gguf", "f16", base="dequantized")
    export(base, tmp_path / "a.gguf", adapter=tmp_path / "adapter", adapter_only=True)
    merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(TEXT[1])["input_ids"]
    expected = plain.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=None)[0, len(ids) :]
    for file, lora in (("m.gguf", None), ("b.gguf", str(tmp_path / "a.gguf"))):
        model = llama_cpp.Llama(str(tmp_path / file), lora_path=lora, n_ctx=128, n_threads=1, verbose=False)
        assert model.tokenize(TEXT[1].encode(), add_bos=True, special=True) == ids
        found = [token for token, _ in zip(model.generate(ids, temp=0.0), range(16))]
        model.close()
        assert found == expected.tolist(), file


def test_an_adapter_alone_has_no_outtype():
    with pytest.raises(ValueError, match="leave outtype out"):
        GgufConfig(adapter_only=True, outtype="f16")
