"""Runs of families that name, shape or attend otherwise than Llama does: the whole way, checked by their own losses."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from onecard.hf.load import load_tokenizer
from tests.train.test_loop import run

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4}
MLA = {
    "moe_intermediate_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "first_k_dense_replace": 1, "num_key_value_heads": 4, "intermediate_size": 128,
}  # fmt: skip
FAMILIES = {
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 16},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4},
    "opt": {**SMALL, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "falcon": SMALL,
    "gpt_neox": {**SMALL, "intermediate_size": 128},
    "cohere": {**SMALL, "intermediate_size": 128},
    "deepseek_v3": {**SMALL, **MLA},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_of_another_family(family, checkpoint, chats, tmp_path):
    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(checkpoint))
    ids = {"pad_token_id": 0, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **ids, **FAMILIES[family])
    AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    run(tmp_path / "base", chats, tmp_path / "o", max_steps=3, learning_rate=1e-2, lora_dropout=0.0)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert (tmp_path / "o" / "adapter" / "adapter_model.safetensors").is_file()
