"""Check the modules that LoRA's settings name in a model, before its weights load."""

from __future__ import annotations

import re
from typing import Any

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from onecard.adapter.layers import adapted_linears, as_pattern
from onecard.config import LoraSettings
from onecard.errors import UserError, did_you_mean
from onecard.hf.skeleton import Model
from onecard.hf.tokens import NewTokens
from onecard.patterns import check_time, first_match


def check_names(model: Model, lora: LoraSettings) -> None:
    """Raise UserError unless target_modules are linears, modules_to_save modules without 4-bit weights, and
    target_parameters experts' weights."""
    check_targets(model.modules, lora, bool(model.stacks))
    check_patterns(model, lora)
    for name in lora.modules_to_save or ():
        paths = [path for path, _ in model.modules.named_modules() if f".{path}".endswith(f".{name}")]
        if not paths:
            found = f'none is called "{name}"'
            must = "modules_to_save must name modules of the model"
            raise UserError(must, found, "correct it", "modules_to_save")
        if any(f"{weight}.".startswith(f"{path}.") for path in paths for weight in model.quantized):
            found = f'"{name}" is in 4 bits'
            must = "modules_to_save must name modules that are not in 4 bits, like embed_tokens and lm_head"
            raise UserError(must, found, "name it in target_modules instead", "modules_to_save")
    for name in lora.target_parameters or ():
        if not any(f".{path}".endswith(f".{name}") for path in model.stacks):
            found = f'none is called "{name}"; there are {", ".join(sorted(model.stacks)) or "no experts"}'
            must = "target_parameters must name stacked weights of the model's experts"
            raise UserError(must, found[:200], "correct it", "target_parameters")


def check_new_tokens(model: Model, lora: LoraSettings, new: NewTokens, size_before: int) -> None:
    """Check that a model can get rows for new tokens.

    Args:
        size_before: tokens of the tokenizer without the new ones.

    Raises:
        UserError: an embedding or a head of another kind, or with LoRA; other tables of as many rows; fewer rows than
            the tokenizer has tokens; one of embedding and head in modules_to_save without the other.
    """
    modules, where = model.modules, "add_tokens"
    embedding, head = modules.get_input_embeddings(), modules.get_output_embeddings()
    names = {module: name for name, module in modules.named_modules()}
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear) or head.bias is not None:
        must = "new tokens need an embedding, and a head that is a linear without a bias"
        raise UserError(must, f"{type(embedding).__name__} and {head}", "leave add_tokens out", where)
    tables = [m for m in names if isinstance(m, nn.Embedding) and m is not embedding]
    for table in tables:
        if table.num_embeddings >= embedding.num_embeddings:
            must = "new tokens need a model with one table of tokens"
            raise UserError(must, f"{names[table]} too", "leave add_tokens out", where)
    if size_before > embedding.num_embeddings:
        must = "the model must have a row for each token of its tokenizer, before others are added"
        found = f"{size_before:,} tokens for {embedding.num_embeddings:,} rows"
        raise UserError(must, found, "resize its embeddings with transformers, and save it", where)
    targets = lora.target_modules
    if targets != "all-linear" and any(matches(names[head], t, isinstance(targets, str)) for t in as_list(targets)):
        must = "new tokens need a head without LoRA, as their rows in it are trained"
        raise UserError(must, f"{names[head]} in target_modules", "leave it out", where)
    saved = [f".{names[end]}".endswith(tuple(f".{n}" for n in lora.modules_to_save or ())) for end in (embedding, head)]
    if any(saved) and not all(saved):
        must = "with new tokens, modules_to_save must have embedding and head, or neither"
        found, both = ", ".join(lora.modules_to_save or ()), f"{names[embedding]} and {names[head]}"
        raise UserError(must, found, f"name {both}", "modules_to_save")


def as_list(names: list[str] | str) -> list[str]:
    return [names] if isinstance(names, str) else names


def check_patterns(model: Model, lora: LoraSettings) -> None:
    """Raise UserError if exclude_modules, layers_to_transform, rank_pattern or alpha_pattern have an entry without
    effect, if they leave nothing to train, or if lora_bias is wanted for linears without a bias.

    peft warns of the first and trains on. A bias of lora_B on a linear without one cannot be merged.
    """
    names = [name for name, _ in model.modules.named_modules()]
    excluded = as_pattern(lora.exclude_modules) if isinstance(lora.exclude_modules, str) else lora.exclude_modules or []
    layers = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in lora.layers_pattern or ()]
    keys = [rf"(.*\.)?({key})$" for key in (*lora.rank_pattern, *lora.alpha_pattern)]
    whole = excluded if isinstance(lora.exclude_modules, str) else []
    check_time([*whole, *layers, *keys], names, "rank_pattern, alpha_pattern, exclude_modules or layers_pattern")
    for entry in excluded:
        if not any(matches(name, entry, bool(whole)) for name in names):
            raise without_effect("exclude_modules", entry)
    linears = [path.removesuffix(".weight") for path in model.linears]
    for layer in lora.layers_to_transform or ():
        alone = lora.model_copy(update={"layers_to_transform": [layer]})
        if not adapted_linears(alone, linears):
            raise without_effect("layers_to_transform", f"{layer}: no target is in that layer")
    found = adapted_linears(lora, linears)
    if not found and not lora.target_parameters and not model.stacks:
        must, do = "some linear must get a LoRA", "exclude less, or target more"
        raise UserError(must, "exclude_modules and modules_to_save leave none", do, "target_modules")
    ends = tuple(lora.target_parameters or ())
    trained = [*found, *(path for path in model.stacks if not lora.target_parameters or path.endswith(ends))]
    for setting in ("rank_pattern", "alpha_pattern"):
        for key in getattr(lora, setting):
            if not any(first_match({key: True}, name, False) for name in trained):
                raise without_effect(setting, key)
    for name in found if lora.has_frozen_start else ():
        linear, rank = model.linears[f"{name}.weight"], lora.rank_of(name)
        if rank > min(linear.in_features, linear.out_features):
            must = f"init_lora_weights {lora.init_lora_weights} needs a rank that each weight has"
            found_shape = f"r {rank} for {name}, {linear.out_features} x {linear.in_features}"
            raise UserError(must, found_shape, "lower r, or set rank_pattern for it", "r")
    bare = [name for name in found if lora.lora_bias and model.linears[f"{name}.weight"].bias is None]
    if bare:
        others = sorted({name.rpartition(".")[2] for name in set(found) - set(bare)})
        do = f"name {', '.join(others)} in target_modules" if others else "leave lora_bias out"
        must = "lora_bias needs linears with a bias, to which merge adds it"
        raise UserError(must, f"{bare[0]} has none", do, "lora_bias")


def without_effect(setting: str, entry: str) -> UserError:
    must = f"each entry of {setting} must match a module that it changes"
    return UserError(must, f"{entry!r} has no effect", "correct it or leave it out", setting)


def check_targets(modules: Any, lora: LoraSettings, has_experts: bool) -> None:
    """Raise UserError unless every name of target_modules matches linears that LoRA can train and merge can store.

    peft accepts a list in which some name matches nothing, without an error.

    Args:
        modules: transformers' model; its weights may be on the meta device.
        has_experts: whether it has stacked experts, to whose weights peft converts some names.
    """
    wanted = lora.target_modules
    if wanted == "all-linear":
        return
    named = dict(modules.named_modules())
    linears = sorted({name.rpartition(".")[2] for name, m in named.items() if isinstance(m, (nn.Linear, Conv1D))})
    known = f"name them as the model does: {', '.join(linears)}"
    patterns = [wanted] if isinstance(wanted, str) else names_of_modules(wanted, modules, has_experts)
    check_time(patterns if isinstance(wanted, str) else [], named, "target_modules")
    for pattern in patterns:
        found = [name for name in named if name and matches(name, pattern, isinstance(wanted, str))]
        if not found:
            must = "every name of target_modules must match a linear of the model"
            text = f'"{pattern}" matches none{did_you_mean(pattern, linears)}'
            raise UserError(must, text, known, "target_modules")
        for name in found:
            check_target(modules, name, named[name], known)


def names_of_modules(names: list[str], modules: Any, has_experts: bool) -> list[str]:
    """Return the names without those that peft converts to experts' weights."""
    if not has_experts:
        return names
    config = LoraConfig(target_modules=names)
    convert_peft_config_for_transformers(config, modules, None)
    return sorted(set(config.target_modules or ()) & set(names))


def matches(name: str, pattern: str, is_pattern: bool) -> bool:
    """Whether a pattern, or a name of a list, matches a module's name: peft's rule."""
    if is_pattern:
        return re.fullmatch(pattern, name) is not None
    return name == pattern or name.endswith(f".{pattern}")


def check_target(modules: Any, name: str, module: nn.Module, known: str) -> None:
    """Raise UserError for a module that is no linear, and for a head that shares its weight with the embedding."""
    embedding, head = modules.get_input_embeddings(), modules.get_output_embeddings()
    if module is embedding or isinstance(module, nn.Embedding):
        do = f'put "{name.rpartition(".")[2]}" into modules_to_save: it then learns in full, and merges'
        raise UserError("target_modules must name linears", f"{name}, an embedding", do, "target_modules")
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise UserError(
            "target_modules must name linears", f"{name}, a {type(module).__name__}", known, "target_modules"
        )
    if module is head and embedding is not None and tied(modules):
        raise UserError(
            "LoRA's target must have a weight of its own",
            f"{name}, which is tied to the embedding",
            f'put "{name.rpartition(".")[2]}" into modules_to_save: it then learns in full, untied, and merges',
            "target_modules",
        )


def tied(modules: Any) -> bool:
    """Whether the config ties the head to the embedding."""
    head = modules.get_output_embeddings()
    name = next((f"{name}.weight" for name, module in modules.named_modules() if module is head), "")
    return name in modules.all_tied_weights_keys
