"""LLaMA-Factory's YAML of a training run (`llamafactory-cli train FILE`), with its dataset_info.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onecard.documents import read_object
from onecard.errors import UserError, did_you_mean
from onecard.recipes.preference import put_stage, ranked_columns
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
    put_warmup,
)

SAME = {  # their key -> our field, their default
    **TRANSFORMERS,
    "output_dir": ("output", None),
    "lora_dropout": ("lora_dropout", 0.0),
    "use_rslora": ("use_rslora", False),
    "use_dora": ("use_dora", False),
    "cutoff_len": ("max_seq_length", 2048),
    "per_device_train_batch_size": ("per_device_train_batch_size", 8),
    "per_device_eval_batch_size": ("per_device_eval_batch_size", None),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", 1),
    "num_train_epochs": ("num_train_epochs", 3.0),
    "lr_scheduler_type": ("lr_scheduler_type", "linear"),
    "early_stopping_steps": ("early_stopping_patience", None),
    "quantization_type": ("quant_type", "nf4"),
    "double_quantization": ("double_quant", True),
    "push_to_hub": ("push_to_hub", None),
    "hub_private_repo": ("hub_private_repo", None),
    "full_determinism": ("deterministic", False),
}
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {  # key -> values without effect, why others are refused
    "stage": (("sft", "pt", "dpo", "kto", "rm"), "onecard has sft, pt, dpo, kto and rm"),
    "finetuning_type": (("lora",), "onecard trains LoRA"),
    "quantization_bit": ((4,), "the frozen base is stored in 4 bits"),
    "quantization_method": (("bnb", "bitsandbytes"), "the frozen base is stored as bitsandbytes stores it"),
    "create_new_adapter": ((), "merge the first adapter, then train a new one"),
    "use_galore": ((), "for full training"),
    "use_apollo": ((), "for full training"),
    "use_badam": ((), "for full training"),
    "use_adam_mini": ((), "onecard has other optimizers"),
    "use_muon": ((), "pass --optim"),
    "use_llama_pro": ((), "adds layers to the base"),
    "use_dft_loss": ((), "another loss"),
    "use_asft_loss": ((), "another loss"),
    "use_eaft_loss": ((), "another loss"),
    "shift_attn": ((), "another attention than the model's"),
    "mixture_of_depths": ((), "changes the model"),
    "rope_scaling": ((), "changes the model: set it in a copy of config.json"),
    "moe_aux_loss_coef": ((0, 0.0), "adds a loss of the router"),
    "label_smoothing_factor": ((0, 0.0), "another loss"),
    "mix_strategy": (("concat",), "give each file a weight in --data"),
    "interleave_probs": ((), "give each file a weight in --data"),
    "tool_format": ((), "the tokenizer's own chat template writes the tools"),
    "default_system": ((), "write the system message into the rows"),
}
WITHOUT_EFFECT = frozenset(
    "do_train do_eval do_predict overwrite_output_dir overwrite_cache preprocessing_num_workers "
    "preprocessing_batch_size dataloader_num_workers plot_loss flash_attn use_unsloth use_unsloth_gc "
    "enable_liger_kernel ddp_timeout deepspeed fsdp fsdp_config include_num_input_tokens_seen "
    "include_effective_tokens_per_second low_cpu_mem_usage trust_remote_code use_fast_tokenizer cache_dir "
    "hf_hub_token ms_hub_token tokenized_path gradient_checkpointing disable_gradient_checkpointing "
    "use_reentrant_gc upcast_layernorm upcast_lmhead_output pure_bf16 save_only_model resume_from_checkpoint "
    "run_name logging_dir logging_first_step remove_unused_columns predict_with_generate infer_backend "
    "optim_target_modules torch_compile group_by_length use_swanlab swanlab_project swanlab_run_name swanlab_mode "
    "swanlab_api_key compute_accuracy print_param_status ignore_pad_token_for_loss save_safetensors "
    "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules freeze_vision_tower "
    "eval_accumulation_steps tf32 disable_tqdm device_map use_cache ray_run_name "
    "loraplus_lr_embedding pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight "
    "kto_rejected_weight simpo_gamma ld_alpha ref_model ref_model_adapters ref_model_quantization_bit".split()
)


def read_llamafactory(path: str) -> Recipe:
    """Read a file. Raises UserError for keys that cannot be honoured."""
    reader = open_recipe(path)
    reader.refuse_unless(REFUSED)
    put_model(reader)
    reader.rename(SAME)
    rank = reader.take("lora_rank", 8)
    reader.put("r", "lora_rank", rank)
    reader.put("lora_alpha", "lora_alpha", reader.take("lora_alpha", 2 * rank))
    iterations = reader.take("pissa_iter", 16)
    if reader.take("pissa_init", False):
        reader.put("init_lora_weights", "pissa_init", "pissa" if iterations == -1 else f"pissa_niter_{iterations}")
    target = reader.take("lora_target", "all")
    reader.put("target_modules", "lora_target", "all-linear" if target == "all" else names_of(target))
    put_tokens(reader)
    reader.put("learning_rate", "learning_rate", as_number(reader.take("learning_rate", 5e-5)))
    reader.put("adam_epsilon", "adam_epsilon", as_number(reader.take("adam_epsilon", 1e-8)))
    max_steps = reader.take("max_steps", -1)
    reader.put("max_steps", "max_steps", max_steps if max_steps > 0 else None)
    put_optim(reader, "optim", str(reader.take("optim", "adamw_torch")))
    put_warmup(reader)
    logging_steps = reader.take("logging_steps", 500)
    reader.put("logging_steps", "logging_steps", logging_steps)
    put_interval(reader, "save", "steps", 500)
    put_interval(reader, "eval", "no", logging_steps)
    put_loggers(reader, reader.take("report_to"))
    put_data(reader)
    put_stage(reader, str(reader.raw.get("stage") or "sft"))
    return reader.finish(WITHOUT_EFFECT)


def put_tokens(reader: Reader) -> None:
    """Set the new tokens, and the modules that are trained in full: with new tokens embedding and head, as there."""
    saved = names_of(reader.take("additional_target"))
    special = [*names_of(reader.take("add_special_tokens")), *names_of(reader.take("new_special_tokens"))]
    added = {"add_tokens": names_of(reader.take("add_tokens")), "add_special_tokens": special}
    resizes = reader.take("resize_vocab", False)
    for name, tokens in added.items():
        reader.put(name, name, tokens or None)
    if any(added.values()) and not saved:
        saved = ["embed_tokens", "lm_head"]
        reader.notes.append("new tokens: embedding and head are trained in full; a row starts at its pieces' mean")
    elif resizes and not any(added.values()):
        reader.refuse("resize_vocab", "no tokens are added: name the modules in additional_target")
    reader.put("modules_to_save", "additional_target", saved or None)


def put_model(reader: Reader) -> None:
    """Set the model, its dtype and the adapter to go on from."""
    reader.put("model", "model_name_or_path", reader.take("model_name_or_path"))
    adapters = names_of(reader.take("adapter_name_or_path"))
    if len(adapters) > 1:
        reader.refuse("adapter_name_or_path", "a run goes on from one adapter")
    reader.put("adapter", "adapter_name_or_path", adapters[0] if adapters else None)
    if reader.raw.get("quantization_bit") is None:
        reader.notes.append("the file trains over a 16-bit base: onecard stores the frozen base in 4 bits")
    template = reader.take("template")
    if template is not None:
        reader.notes.append(f"template {template}: rows are written with the tokenizer's own chat template")
    thinking = reader.take("enable_thinking")
    reader.put("chat_template_kwargs", "enable_thinking", None if thinking is None else {"enable_thinking": thinking})
    dtypes = [name for key, name in (("bf16", "bfloat16"), ("fp16", "float16")) if reader.take(key, False)]
    reader.put("compute_dtype", "bf16", dtypes[0] if dtypes else None)


def put_data(reader: Reader) -> None:
    """Set the data, what of it is learned, and how rows are filled."""
    folder = Path(str(reader.take("dataset_dir", "data")))
    most = reader.take("max_samples")
    names = {key: names_of(reader.take(key)) for key in ("dataset", "eval_dataset")}
    info = dataset_info(folder, [name for found in names.values() for name in found])
    sources = {
        key: [source_of(reader, name, info[name], folder, most) for name in found] for key, found in names.items()
    }
    put_sources(reader, "dataset", "data", sources["dataset"])
    if reader.take("eval_on_each_dataset", False):
        each = {name: source for name, source in zip(names["eval_dataset"], sources["eval_dataset"])}
        reader.put(
            "eval_data", "eval_dataset", {k: v["path"] if set(v) == {"path"} else v for k, v in each.items()} or None
        )
    else:
        put_sources(reader, "eval_dataset", "eval_data", sources["eval_dataset"])
    put_split(reader, "val_size", bool(sources["eval_dataset"]))
    put_streaming(reader, "buffer_size", 16384)
    whole, last = reader.take("train_on_prompt", False), reader.take("mask_history", False)
    reader.put("train_on", "train_on_prompt" if whole else "mask_history", "all" if whole else "last" if last else None)
    neat = reader.take("neat_packing", False)
    packing = neat or reader.take("packing", reader.raw.get("stage") == "pt")
    reader.put("packing", "packing", packing)
    if packing and not neat:
        reader.notes.append("packing: documents of one row never attend to each other, as with neat_packing")
    if reader.raw.get("stage") == "pt":
        reader.put("format", "stage", "text")


def dataset_info(folder: Path, names: list[str]) -> dict[str, Any]:
    """Return the entries of dataset_info.json. Raises UserError for a name that it does not have."""
    if not names:
        return {}
    path = folder / "dataset_info.json"
    found = read_object(path, missing="run from the folder that dataset_dir is relative to, or pass --data")
    for name in names:
        if not isinstance(found.get(name), dict):
            must, do = "each dataset must have an entry in dataset_info.json", "correct the name, or pass --data"
            raise UserError(must, f'"{name}"{did_you_mean(name, found)}', do, str(path))
    return found


def source_of(reader: Reader, name: str, entry: dict[str, Any], folder: Path, most: Any) -> dict[str, Any]:
    """Return our source of a dataset: path, and columns, split and max_rows where the entry has them."""
    for key in ("script_url", "ms_hub_url", "om_hub_url", "cloud_file_name"):
        if entry.get(key):
            reader.refused.append(f"dataset {name}: {key}")
    hub = entry.get("hf_hub_url")
    path = ":".join(filter(None, (str(hub), entry.get("subset")))) if hub else str(folder / str(entry.get("file_name")))
    source: dict[str, Any] = {"path": path}
    ours: dict[str, str] | None = {}
    if hub or entry.get("split"):
        source["split"] = entry.get("split") or "train"
    if number := min((n for n in (entry.get("num_samples"), most) if n), default=None):
        source["max_rows"] = number
    columns = entry.get("columns") or {}
    stage, formatting = reader.raw.get("stage") or "sft", entry.get("formatting", "alpaca")
    if bool(entry.get("ranking")) != (stage in ("dpo", "rm")):
        is_ranking = str(bool(entry.get("ranking"))).lower()
        reader.refused.append(f"dataset {name}: ranking {is_ranking}: stages dpo and rm read pairs, others do not")
    elif stage in ("dpo", "rm", "kto"):
        ours = ranked_columns(columns, formatting, stage == "kto")
    else:
        ours = columns_of(columns, formatting)
    if ours is None:
        reader.refused.append(f"dataset {name}: columns {columns}: rename them in the file")
    elif ours:
        source["columns"] = ours
    return source


def columns_of(columns: dict[str, str], formatting: str) -> dict[str, str] | None:
    """Return our mapping for columns with other names than the format's; None if there is none."""
    if formatting == "sharegpt":
        known = {"messages": ("messages", "conversations"), "system": ("system",), "tools": ("tools",)}
        names = {"messages": "messages", "system": "system"}
    else:
        known = {"prompt": ("instruction",), "query": ("input",), "response": ("output",), "system": ("system",)}
        known |= {"history": ("history",)}
        names = {"prompt": "prompt", "response": "completion", "system": "system"}
    other = {key: column for key, column in columns.items() if column and column not in known.get(key, ())}
    if not other:
        return {}
    if not set(other) <= set(names) or columns.get("query") or columns.get("history"):
        return None
    if formatting == "alpaca":  # the pair is named together
        other = {key: columns.get(key) or known[key][0] for key in dict.fromkeys(["prompt", "response", *other])}
    return {names[key]: column for key, column in other.items()}
