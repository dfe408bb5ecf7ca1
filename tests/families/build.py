"""A tiny checkpoint of any causal language model that the installed transformers can build.

A family's config comes from its own class: each of its fields that has a small value in `SIZES` takes it, lists of
layer kinds keep one layer of each kind, dropout goes, and multipliers and caps get values that are not neutral. What a
family needs beyond that is in `MORE`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCABULARY = 256
SIZES: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"], VOCABULARY),
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim", "word_embed_proj_dim"], 64),
    **dict.fromkeys(["embedding_size", "input_embedding_size", "output_embedding_size", "lru_width"], 64),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "dff"], 128),
    **dict.fromkeys(["ffn_hidden_size", "d_inner", "feed_forward_size", "intermediate_size_mlp"], 128),
    **dict.fromkeys(["dense_intermediate_size", "shared_intermediate_size", "expert_ffn_hidden_size"], 64),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 64),
    **dict.fromkeys(["shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"], 64),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"], 2),
    **dict.fromkeys(["num_encoder_layers", "num_decoder_layers", "num_blocks"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads"], 4),
    **dict.fromkeys(["num_decoder_attention_heads", "swa_num_attention_heads", "index_n_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"], 2),
    **dict.fromkeys(["head_dim", "dim_head", "kv_channels", "attention_head_dim", "swa_head_dim", "d_head"], 16),
    **dict.fromkeys(["v_head_dim", "qk_nope_head_dim", "global_head_dim", "attention_head_size"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "rotary_dim"], 8),
    "qk_head_dim": 24,
    **dict.fromkeys(
        ["q_lora_rank", "kv_lora_rank", "o_lora_rank", "index_head_dim", "laurel_rank", "gated_norm_rank"], 16
    ),
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "n_group", "num_experts_per_token"], 2),
    **dict.fromkeys(["topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["num_expert_group"], 2),
    **dict.fromkeys(["state_size", "mamba_d_state", "ssm_state_size", "time_step_rank", "mamba_dt_rank"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "n_mamba_heads"], 8),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim"], 16),
    **dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"], 4),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"], 16),
    **dict.fromkeys(["chunk_size", "mamba_chunk_size", "block_size"], 16),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "model_max_length"], 128),
    **dict.fromkeys(["max_target_positions", "context_length"], 128),
    **dict.fromkeys(["sliding_window", "window_size", "attention_window_size", "sliding_window_size"], 12),
    **dict.fromkeys(["index_topk", "keep_window_size", "attention_chunk_size", "local_attention"], 12),
    **dict.fromkeys(["depth", "vision_layers"], 2),
    **dict.fromkeys(["embed_dim", "out_hidden_size"], 64),
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "router_hidden_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
}
NOT_NEUTRAL = {
    "residual_multiplier": 0.3, "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "logits_scaling": 2.0,
    "logit_scale": 0.4, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "logits_soft_cap": 3.0,
    "output_logit_soft_cap": 3.0, "lm_head_multiplier": 0.5, "key_multiplier": 0.7, "attention_out_multiplier": 0.6,
    "attention_in_multiplier": 0.8, "ssm_in_multiplier": 0.8, "ssm_out_multiplier": 0.6, "routed_scaling_factor": 1.7,
    "route_scale": 1.7, "router_scaling_factor": 1.7, "moe_routed_scaling_factor": 1.7, "query_pre_attn_scalar": 9,
    "full_attn_alpha_factor": 1.3, "full_attn_beta_factor": 0.7, "linear_attn_alpha_factor": 1.2,
    "linear_attn_beta_factor": 0.8, "mlp_alpha_factor": 1.4, "mlp_beta_factor": 0.6, "attention_value_scale": 0.6,
    "logits_mup_width_multiplier": 2.0, "scale_emb": 2.0, "scale_depth": 1.0, "dim_model_base": 32,
    "clip_qkv": 0.5, "attn_temperature_tuning": True,
}  # fmt: skip
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "indexer_types")
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {**ROPE, "mrope_section": [2, 3, 3]}
QWEN4 = {
    "indexer_budget": 16, "indexer_compress_ratio": 4, "indexer_n_heads": 4, "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 256},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx.attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 0.5},
    "dbrx.ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 24},
    "dots3_note.text_config": {"per_layer_config": {}, "head_dim": 24},
    "dots3_note.vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "dots3_note.audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm2_vl.text_config": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2},
    "moshi": {"sliding_window": 128},  # which transformers' cache has and the model's own forward has not
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 16]},
    "roc_bert": {"shape_embed_dim": 16, "shape_vocab_size": 64, "pronunciation_embed_dim": 16,
                 "pronunciation_vocab_size": 64},
    "qwen4_exp_text": QWEN4,
    "qwen4_exp.text_config": QWEN4,
    **{f"{family}.text_config": {"rope_parameters": MROPE} for family in (
        "qwen2_vl", "qwen2_5_vl", "glm4v", "glm46v", "glmga", "glm_ocr", "cosmos3_edge", "paddleocr_vl",
        "qwen2_5_omni_thinker")},
    "ernie4_5_vl_moe.text_config": {"moe_intermediate_size": [64, 64]},
    "glm4v_moe.text_config": {"rope_parameters": {**MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    "qwen3_omni_moe_thinker.text_config": {"sliding_window": 128},  # as moshi's
    "qwen3_vl_moe.text_config": {"sliding_window": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def families() -> dict[str, str]:
    """The model types that AutoModelForCausalLM or AutoModelForImageTextToText takes, and their classes' names."""
    return {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}


def class_of(folder: Path) -> Any:
    """transformers' class that a checkpoint's config.json names."""
    return getattr(transformers, PreTrainedConfig.get_config_dict(folder)[0]["architectures"][0])


def tiny_config(family: str, **fields: Any) -> Any:
    """The family's config, small and not neutral. `fields` are other values of it."""
    kind = CONFIG_MAPPING[family]
    return kind(**{**shrunk(kind(), family), **fields})


def shrunk(config: Any, family: str) -> dict[str, Any]:
    """Small values for the fields that a config has."""
    fields, names = config.to_dict(), set(config.attribute_map.values())
    found = {name: value for name, value in SIZES.items() if name in fields or name in names}
    for name in list(found):  # one value for a field and its other name
        if config.attribute_map.get(name) in found:
            del found[name]
    if "kv_lora_rank" in found and "num_key_value_heads" in found:  # latent attention has no groups
        found["num_key_value_heads"] = found["num_attention_heads"]
    if "qk_rope_head_dim" in found and "head_dim" in fields:  # which the rotary embedding takes for its width
        found["head_dim"] = found["qk_rope_head_dim"]
    found |= {name: value for name, value in NOT_NEUTRAL.items() if name in fields}
    for name, part in vars(config).items():
        if isinstance(part, PreTrainedConfig):
            found[name] = type(part)(**shrunk(part, f"{family}.{name}"))
    for name, value in fields.items():
        if isinstance(value, float) and ("drop" in name or name.endswith(("_prob", "jitter_noise"))):
            found[name] = 0.0
        elif name in ("initializer_range", "init_std"):
            found[name] = 0.1
    return with_kinds(found, fields) | MORE.get(family, {})


def with_kinds(found: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind, two at least, where a config lists its layers' kinds."""
    lists = {name: fields[name] for name in KINDS if isinstance(fields.get(name), list) and fields[name]}
    if not lists:
        return found
    kinds = {name: list(dict.fromkeys(value)) for name, value in lists.items()}
    count = max(2, *(len(value) for value in kinds.values()))
    cut = {name: [value[i % len(value)] for i in range(count)] for name, value in kinds.items()}
    return {**found, **cut, "num_hidden_layers": count}


def make_family(folder: Path, family: str, **fields: Any) -> Path:
    """Write a family's tiny checkpoint with random norms and biases. `fields` are other values of its config."""
    torch.manual_seed(0)
    config = tiny_config(family, **fields)
    whole = family in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    kind = AutoModelForImageTextToText if whole else AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager").float()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    if type(model.config) is not type(config):  # the text part of a multimodal family, whose checkpoints have it all
        config.save_pretrained(folder)
    return folder
