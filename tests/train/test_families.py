"""No worse than plain: runs of families that name, shape or attend otherwise than Llama does, from files to an adapter
that peft reads. The losses before and after are those of transformers' own model on the dequantized weights."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

import onecard
from onecard.config import DataConfig, make_config
from onecard.data.load import load_dataset
from onecard.hf.load import load_tokenizer
from tests.families.check import EQUAL, dequantized
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
    settings = {"max_steps": 3, "learning_rate": 1e-2, "lora_dropout": 0.0, "eval_data": str(chats)}
    report = run(tmp_path / "base", chats, tmp_path / "o", **settings).report
    base = onecard.load_model(str(tmp_path / "base"), compute_dtype="float32", device="cpu")
    rows = load_dataset(str(chats), tokenizer, make_config(DataConfig, {"max_seq_length": 96}, "test")).examples
    plain = dequantized(base, tmp_path / "base")
    before = mean_loss(plain, rows)
    after = mean_loss(PeftModel.from_pretrained(plain, tmp_path / "o" / "adapter"), rows)
    assert report.loss_before == pytest.approx(before, rel=EQUAL)
    assert report.loss_after == pytest.approx(after, rel=EQUAL)
    assert after < 0.998 * before


@torch.no_grad()
def mean_loss(model, rows):
    """Of all supervised tokens, by the model's own loss, a document at a time."""
    counts = [row.num_supervised for row in rows]
    losses = [model(torch.tensor([r.input_ids]), labels=torch.tensor([r.labels])).loss.item() for r in rows]
    return sum(loss * count for loss, count in zip(losses, counts)) / sum(counts)
