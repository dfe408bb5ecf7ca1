"""Axolotl's YAML of a training run (`axolotl train FILE`)."""

from __future__ import annotations

from typing import Any

from onecard.recipes.preference import TEMPLATES, columns_of_type, put_reward, put_rl
from onecard.recipes.recipe import (
    TRANSFORMERS,
    Reader,
    Recipe,
    as_number,
    names_of,
    open_recipe,
    put_interval,
    put_loggers,
    put_optim,
    put_sources,
    put_split,
    put_streaming,
)

SAME = {  # their key -> our field, their default
    **TRANSFORMERS,
    "output_dir": ("output", "./model-out"),
    "lora_r": ("r", 8),
    "lora_alpha": ("lora_alpha", 8),
    "lora_dropout": ("lora_dropout", 0.0),
    "lora_modules_to_save": ("modules_to_save", None),
    "lora_target_parameters": ("target_parameters", None),
    "lora_model_dir": ("adapter", None),
    "peft_use_rslora": ("use_rslora", False),
    "peft_use_dora": ("use_dora", False),
    "peft_layers_to_transform": ("layers_to_transform", None),
    "peft_layers_pattern": ("layers_pattern", None),
    "peft_init_lora_weights": ("init_lora_weights", None),
    "sequence_len": ("max_seq_length", 512),
    "sample_packing": ("packing", False),
    "num_epochs": ("num_train_epochs", 1.0),
    "max_steps": ("max_steps", None),
    "lr_scheduler": ("lr_scheduler_type", "cosine"),
    "early_stopping_patience": ("early_stopping_patience", None),
    "logging_steps": ("logging_steps", None),
    "eval_batch_size": ("per_device_eval_batch_size", None),
}
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {  # key -> values without effect, why others are refused
    "load_in_8bit": ((), "the frozen base is stored in 4 bits"),
    "gptq": ((), "the frozen base is stored in 4 bits as bitsandbytes stores it"),
    "process_reward_model": ((), "another task"),
    "qat": ((), "another training of the base"),
    "relora": ((), "merges the adapter during the run"),
    "relora_steps": ((), "merges the adapter during the run"),
    "unfrozen_parameters": ((), "for full training"),
    "peft_layer_replication": ((), "changes the model"),
    "peft_trainable_token_indices": ((), "trains rows of the embedding"),
    "added_tokens_overrides": ((), "changes the vocabulary"),
    "overrides_of_model_config": ((), "changes the model: set it in a copy of config.json"),
    "model_config": ((), "changes the model: set it in a copy of config.json"),
    "use_pose": ((), "changes the positions"),
    "s2_attention": ((), "another attention than the model's"),
    "pretraining_dataset": ((), "pass --data with rows of text"),
    "train_on_eos": (("turn",), "the end token of each learned turn is learned"),
    "curriculum_sampling": ((), "rows go in random order"),
    "default_system_message": ((), "write the system message into the rows"),
    "dataset_exact_deduplication": ((), "remove doubles from the file"),
    "shuffle_merged_datasets": ((True,), "rows go in random order"),
    "embedding_lr": ((), "one learning rate for all weights"),
    "embedding_lr_scale": ((), "one learning rate for all weights"),
    "lr_groups": ((), "one learning rate for all weights"),
    "cosine_min_lr_ratio": ((), "pass lr_scheduler_type cosine_with_min_lr"),
    "cosine_constant_lr_ratio": ((), "another schedule"),
    "lr_quadratic_warmup": ((), "another schedule"),
    "optim_args": ((), "set the optimizer's own fields"),
}
WITHOUT_EFFECT = frozenset(
    "model_type tokenizer_type tokenizer_config is_llama_derived_model is_mistral_derived_model strict "
    "trust_remote_code load_in_4bit dataset_prepared_path dataset_processes pad_to_sequence_len "
    "eval_sample_packing group_by_length flash_attention xformers_attention sdp_attention flex_attention "
    "eager_attention attn_implementation tf32 gradient_checkpointing gradient_checkpointing_kwargs wandb_project "
    "wandb_entity wandb_watch wandb_name wandb_run_id wandb_log_model wandb_mode mlflow_tracking_uri "
    "mlflow_experiment_name resume_from_checkpoint auto_resume_from_checkpoints local_rank deepspeed fsdp "
    "fsdp_config ddp_timeout debug xformers flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_qkv "
    "flash_attn_fuse_mlp lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_fan_in_fan_out "
    "unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o liger_rope liger_rms_norm "
    "liger_glu_activation liger_fused_linear_cross_entropy liger_layer_norm plugins torch_compile "
    "torch_compile_backend save_safetensors save_only_model lora_on_cpu low_cpu_mem_usage eval_table_size "
    "eval_max_new_tokens eval_causal_lm_metrics do_causal_lm_eval hf_use_auth_token push_dataset_to_hub "
    "base_model_config base_model_ignore_patterns revision_of_model peft_autocast_adapter_dtype "
    "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor gc_steps sample_packing_group_size "
    "sample_packing_bin_size loss_watchdog_threshold loss_watchdog_patience multipack_real_batches device_map "
    "max_memory merge_lora hub_strategy loraplus_lr_embedding include_tokens_per_second profiler_steps "
    "dpo_use_logits_to_keep dpo_padding_free dpo_generate_during_eval dpo_use_liger_kernel precompute_ref_log_probs "
    "rl_adapter_ref_model remove_unused_columns rl_beta orpo_alpha simpo_gamma cpo_alpha kto_desirable_weight "
    "kto_undesirable_weight dpo_label_smoothing dpo_use_weighting dpo_norm_loss center_rewards_coefficient "
    "num_labels".split()
)


def read_axolotl(path: str) -> Recipe:
    """Read a file. Raises UserError for keys that cannot be honoured."""
    reader = open_recipe(path)
    reader.refuse_unless(REFUSED)
    if reader.take("adapter") not in ("lora", "qlora"):
        reader.refuse("adapter", "onecard trains lora and qlora, not the whole model")
    elif reader.raw.get("adapter") == "lora" and not reader.raw.get("load_in_4bit"):
        reader.notes.append("the file trains over a 16-bit base: onecard stores the frozen base in 4 bits")
    reader.put("model", "base_model", reader.take("base_model"))
    reader.rename(SAME)
    whole, named = reader.take("lora_target_linear", False), reader.take("lora_target_modules")
    reader.put("target_modules", "lora_target_linear", "all-linear" if whole else names_of(named) or None)
    if not whole and not named:
        reader.refuse("lora_target_modules", "peft's own choice for the family: name the modules")
    special = dict(reader.take("special_tokens", {}))
    reader.put("add_special_tokens", "special_tokens", special.pop("additional_special_tokens", None) or None)
    reader.put("add_tokens", "tokens", reader.take("tokens"))
    if reader.fields.keys() & {"add_tokens", "add_special_tokens"}:
        reader.notes.append("new tokens: a row starts at the mean of its pieces, not at random")
    if special:
        reader.notes.append(f"special_tokens {special}: the tokenizer's own are used")
    rate = reader.take("learning_rate")
    if rate is None:
        reader.refuse("learning_rate", "it must be given")
    reader.put("learning_rate", "learning_rate", as_number(rate))
    reader.put("adam_epsilon", "adam_epsilon", as_number(reader.take("adam_epsilon", 1e-8)))
    put_optim(reader, "optimizer", str(reader.take("optimizer", "adamw_torch_fused")))
    steps = reader.take("warmup_steps")
    if steps is not None:
        reader.put("warmup_steps", "warmup_steps", steps)
    else:
        reader.put("warmup_ratio", "warmup_ratio", reader.take("warmup_ratio", 0.03))
    put_batch(reader)
    put_intervals(reader)
    put_data(reader)
    bf16, fp16 = reader.take("bf16", "auto"), reader.take("fp16", False)
    dtype = "float16" if fp16 and bf16 in ("auto", False) else "bfloat16" if bf16 is True else None
    reader.put("compute_dtype", "bf16", dtype)
    loggers = {"wandb": reader.raw.get("wandb_project"), "mlflow": reader.raw.get("mlflow_tracking_uri")}
    loggers["tensorboard"] = reader.take("use_tensorboard", False)
    put_loggers(reader, [name for name, on in loggers.items() if on])
    reader.put("push_to_hub", "hub_model_id", True if reader.raw.get("hub_model_id") else None)
    if rl := reader.take("rl"):
        put_rl(reader, str(rl))
    if reader.take("reward_model", False):
        put_reward(reader)
    return reader.finish(WITHOUT_EFFECT)


def put_batch(reader: Reader) -> None:
    """Set the micro-batch and the accumulation, of which batch_size is the product."""
    micro, total = reader.take("micro_batch_size", 1), reader.take("batch_size")
    steps = reader.take("gradient_accumulation_steps", total // micro if total else 1)
    reader.put("per_device_train_batch_size", "micro_batch_size", micro)
    reader.put("gradient_accumulation_steps", "gradient_accumulation_steps", max(1, steps))


def put_intervals(reader: Reader) -> None:
    """Set when to evaluate and to save. Numbers per epoch are mapped where they are 0 or 1."""
    for verb, key in (("eval", "evals_per_epoch"), ("save", "saves_per_epoch")):
        number = reader.take(key)
        if number is None:
            steps = reader.raw.get(f"{verb}_steps")
            put_interval(reader, verb, "steps" if steps else "epoch", None)
            continue
        reader.put(f"{verb}_strategy", key, "epoch" if number else "no")
        if number > 1:
            reader.notes.append(f"{key} {number}: once an epoch; give {verb}_steps for more")
            if verb == "eval" and reader.raw.get("early_stopping_patience"):
                reader.refuse(key, "early stopping counts evaluations: give eval_steps")


def put_data(reader: Reader) -> None:
    """Set the data, what of it is learned, and the chat template."""
    put_sources(reader, "datasets", "data", [s for d in reader.take("datasets", []) if (s := source_of(reader, d))])
    held = [s for d in reader.take("test_datasets", []) if (s := source_of(reader, d))]
    put_sources(reader, "test_datasets", "eval_data", held)
    put_split(reader, "val_set_size", bool(held))
    put_streaming(reader, "streaming_multipack_buffer_size", 10_000)
    if reader.take("train_on_inputs", False):
        reader.put("train_on", "train_on_inputs", "all")
    template = str(reader.take("chat_template", "tokenizer_default"))
    jinja = reader.take("chat_template_jinja")
    if jinja is not None and ("{" in str(jinja) or "\n" in str(jinja)):
        reader.refuse("chat_template_jinja", "write the template into a file and name it")
    elif jinja is not None:
        reader.put("chat_template", "chat_template_jinja", jinja)
    elif not template.startswith("tokenizer_default"):
        reader.notes.append(f"chat_template {template}: rows are written with the tokenizer's own chat template")


def source_of(reader: Reader, entry: dict[str, Any]) -> dict[str, Any]:
    """Return our source of a dataset; empty if it was refused."""
    path, kind = str(entry.get("path")), entry.get("type")
    objective = "reward" if reader.raw.get("reward_model") else reader.raw.get("rl")
    ranked = columns_of_type(entry, str(objective)) if objective else {}
    if ranked is None:
        reader.refused.append(f"dataset {path}: type {kind!r} with {objective}")
        return {}
    formats = {"alpaca": "alpaca", "completion": "text", "chat_template": None, "sharegpt": None, None: None}
    base = str(kind).split(":")[0].split(".")[0] if isinstance(kind, str) else kind
    if objective:
        base = None
        if str(kind).split(".")[0] in TEMPLATES:
            reader.notes.append(f"{path}: type {kind}: rows are written with the tokenizer's own chat template")
    if not isinstance(base, str | None) or base not in formats:
        reader.refused.append(f"dataset {path}: type {kind!r}")
        return {}
    if base == "alpaca":
        reader.notes.append(f"{path}: alpaca rows are written with the tokenizer's chat template, where it has one")
    source: dict[str, Any] = {"path": path}
    files = entry.get("data_files")
    if files and path in ("json", "csv", "parquet", "text"):
        source["path"] = str(files if isinstance(files, str) else files[0])
        if not isinstance(files, str) and len(files) > 1:
            reader.refused.append(f"dataset {path}: data_files {files}: give an entry for each")
    elif entry.get("name"):
        source["path"] = f"{path}:{entry['name']}"
    if split := entry.get("split"):
        source["split"] = split
    messages, text = entry.get("field_messages"), entry.get("field")
    if ranked:
        source["columns"] = ranked
    elif objective:
        pass
    elif messages and messages not in ("messages", "conversations"):
        source["columns"] = {"messages": messages}
    elif text and text != "text":
        source["columns"] = {"text": text}
    if formats[base] and len(reader.raw.get("datasets", [])) == 1:
        reader.put("format", "datasets", formats[base])
    elif formats[base]:
        source["format"] = formats[base]
    if entry.get("roles_to_train") not in (None, ["assistant"], ["gpt"]):
        reader.refused.append(f"dataset {path}: roles_to_train {entry['roles_to_train']}: the assistant's are learned")
    if entry.get("train_on_eos") not in (None, "turn"):
        reader.refused.append(
            f"dataset {path}: train_on_eos {entry['train_on_eos']}: the end of each answer is learned"
        )
    known = "path type ds_type data_files name split field_messages field roles_to_train train_on_eos".split()
    known += ["field_chosen", "field_rejected"] if objective else []
    known += ["message_property_mappings", "message_field_role", "message_field_content", "roles", "chat_template"]
    if unknown := sorted(key for key, value in entry.items() if key not in known and value not in (None, False)):
        reader.notes.append(f"{path}: not used: {', '.join(unknown)}")
    return source
