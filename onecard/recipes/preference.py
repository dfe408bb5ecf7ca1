"""The losses on preferences, and reward models, of LLaMA-Factory and Axolotl, as our settings.

A key is mapped where the other tool computes what we compute. The equations that were compared: LLaMA-Factory's own
trainers for dpo, kto and rm, and trl's trainers, which Axolotl runs (`train/preference_loss.py` has ours).
"""

from __future__ import annotations

from typing import Any

from onecard.recipes.recipe import Reader, as_number

NO_DROPOUT = "lora_dropout: this loss trains without dropout, there as here"
OWN_REFERENCE = "there the reference is the base without this adapter, here the adapter: merge it into the base first"
SMOOTHING = "smooths the labels of loss_type sigmoid, which trl and onecard do not"
PREF_LOSSES = {"sigmoid": ("dpo", "sigmoid"), "hinge": ("dpo", "hinge"), "ipo": ("ipo", None), "simpo": ("simpo", None)}
RL = ("dpo", "ipo", "kto", "orpo", "simpo")  # of Axolotl, with our names


def put_stage(reader: Reader, stage: str) -> None:
    """Set the loss of LLaMA-Factory's stages dpo, kto and rm, after all other fields."""
    if stage == "rm":
        reader.put("task", "stage", "reward")
        reader.notes.append("stage rm: the head is a linear layer without the dropout of 0.1 of their value head")
        return
    if stage not in ("dpo", "kto"):
        return
    loss, kind = stage, None
    if stage == "dpo":
        asked = str(reader.take("pref_loss", "sigmoid"))
        if asked == "orpo":
            reader.refuse("pref_loss", "its nll leaves the prompt out and is a mean of each answer's; ours is trl's")
        elif asked not in PREF_LOSSES:
            reader.refuse("pref_loss", f"onecard has {', '.join(PREF_LOSSES)}")
        loss, kind = PREF_LOSSES.get(asked, ("dpo", None))
    reader.put("loss", "stage", loss)
    reader.put("loss_type", "pref_loss", kind)
    reader.put("beta", "pref_beta", as_number(reader.take("pref_beta", 0.1)))
    if loss == "simpo":
        reader.put("simpo_gamma", "simpo_gamma", reader.take("simpo_gamma", 0.5))
    if loss == "kto":
        reader.put("desirable_weight", "kto_chosen_weight", reader.take("kto_chosen_weight", 1.0))
        reader.put("undesirable_weight", "kto_rejected_weight", reader.take("kto_rejected_weight", 1.0))
    ftx = "adds the mean loss of each chosen answer, which no loss of onecard has"
    nothing = (0, 0.0)
    smooths = {"dpo_label_smoothing": (nothing, SMOOTHING)} if stage == "dpo" else {}
    reader.refuse_unless({"pref_ftx": (nothing, ftx), "pref_bco_weight": (nothing, "adds another loss"), **smooths})
    reader.refuse_unless({"ld_alpha": ((), "weights the tokens of long answers")})
    if loss != "simpo":
        put_reference(reader)
    drop_dropout(reader)


def put_reference(reader: Reader) -> None:
    """Check that the reference is ours: the base, or the adapter that the run goes on from."""
    model, adapter = (reader.raw.get(key) for key in ("model_name_or_path", "adapter_name_or_path"))
    reference, of_reference = reader.take("ref_model"), reader.take("ref_model_adapters")
    reader.take("ref_model_quantization_bit")
    if reference not in (None, model):
        reader.refuse("ref_model", "the reference is the base itself")
    elif of_reference is not None and (reference is None or of_reference != adapter):
        reader.refuse("ref_model_adapters", "the reference is the base, or with ref_model the adapter it goes on from")
    elif adapter is not None and of_reference is None:
        reader.refuse("adapter_name_or_path", OWN_REFERENCE)


def put_rl(reader: Reader, rl: str) -> None:
    """Set the loss of Axolotl's `rl`, which is trl's, after all other fields."""
    if rl not in RL:
        reader.refuse("rl", f"onecard has {', '.join(RL)}")
        return
    reader.put("loss", "rl", rl)
    trl = dict(reader.take("trl", {}))
    inner, beta, alpha = trl.pop("beta", None), reader.take("rl_beta"), reader.take("orpo_alpha")
    if any(value not in (None, False) for value in trl.values()):
        reader.refused.append(f"trl: {', '.join(trl)}: for other values of rl")
    found = next(((key, value) for key, value in (("trl", inner), ("rl_beta", beta), ("orpo_alpha", alpha))
                  if value is not None), ("rl_beta", 0.1))  # fmt: skip
    reader.put("beta", found[0], as_number(found[1]))
    if rl == "dpo":
        reader.put("loss_type", "dpo_norm_loss", "sigmoid_norm" if reader.take("dpo_norm_loss", False) else "sigmoid")
        reader.refuse_unless({"dpo_label_smoothing": ((0, 0.0), SMOOTHING)})
    if rl in ("dpo", "ipo"):
        reader.refuse_unless({"dpo_use_weighting": ((), "weights the pairs (WPO)")})
    if rl == "simpo":
        reader.put("simpo_gamma", "simpo_gamma", reader.take("simpo_gamma", 0.5))
        reader.put("cpo_alpha", "cpo_alpha", as_number(reader.take("cpo_alpha", 1.0)))
    if rl == "kto":
        reader.put("desirable_weight", "kto_desirable_weight", reader.take("kto_desirable_weight") or 1.0)
        reader.put("undesirable_weight", "kto_undesirable_weight", reader.take("kto_undesirable_weight") or 1.0)
    reader.refuse_unless({key: ((), "another loss") for key in ("rpo_alpha", "dpo_loss_type", "dpo_loss_weights")})
    if rl in ("dpo", "ipo", "kto") and reader.raw.get("lora_model_dir"):
        reader.refuse("lora_model_dir", "the reference of a run from an adapter differs by release: merge it first")
    drop_dropout(reader)


def put_reward(reader: Reader) -> None:
    """Set the task of Axolotl's `reward_model`."""
    reader.put("task", "reward_model", "reward")
    reader.put("center_rewards_coefficient", "center_rewards_coefficient", reader.take("center_rewards_coefficient"))
    reader.refuse_unless({"num_labels": ((1,), "a reward has one output")})
    drop_dropout(reader)


def drop_dropout(reader: Reader) -> None:
    """Leave lora_dropout out, for a trainer that disables dropout."""
    if reader.fields.pop("lora_dropout", 0):
        reader.notes.append(NO_DROPOUT)


def ranked_columns(columns: dict[str, str], formatting: str, judged: bool) -> dict[str, str] | None:
    """Return our mapping of an entry of dataset_info.json with preferences; None if there is none.

    Args:
        columns: the entry's; what is not named is not read there.
        judged: for kto: an answer with its kto_tag instead of a pair.
    """
    chat = formatting == "sharegpt"
    named = {key: column for key, column in columns.items() if column}
    ours = {"chosen": "chosen", "rejected": "rejected", "system": "system"}
    keep: dict[str, tuple[str, ...]] = {"system": ("system",), "tools": ("tools",), "history": ("history",)}
    keep |= {"chosen": ("chosen",), "rejected": ("rejected",)}
    if judged:
        ours = {"kto_tag": "label", "system": "system"}
        keep["kto_tag"] = ("kto_tag", "label")
    if chat:
        ours["messages"] = "messages"
        named.setdefault("messages", "conversations")
    else:
        if named.get("prompt") != "instruction" and (named.keys() & {"query", "history"} or judged):
            return None  # only instruction has an input, a history, and an answer in output
        ours["prompt"], keep["prompt"], keep["query"] = "messages", ("instruction",), ("input",)
        if judged:
            keep["response"] = ("output",)
    other = {key: column for key, column in named.items() if column not in keep.get(key, ())}
    needed = {"kto_tag"} if judged else {"chosen", "rejected"}
    if not set(other) <= set(ours) or not needed <= set(named):
        return None
    return {ours[key]: column for key, column in other.items()}


TEMPLATES = ("chatml", "llama3")
PAIR_TYPES: dict[str, dict[str, str]] = {  # of Axolotl, without its template -> our columns
    "argilla_chat": {},
    "icr": {"messages": "input"},
    "intel": {"messages": "question"},
    "prompt_pairs": {"messages": "prompt"},
    "ultra": {},
}
JUDGED_TYPES: dict[str, dict[str, str]] = {
    "argilla": {"messages": "instruction"},
    "argilla_chat": {"messages": "completion"},
    "intel": {"messages": "question"},
    "prompt_pairs": {"messages": "prompt"},
    "ultra": {"messages": "prompt"},
}
WHOLE_TYPES = {  # (rl, type) -> our columns
    ("orpo", "chat_template"): {},
    ("orpo", "chat_template.argilla"): {},
    ("reward", "bradley_terry.chat_template"): {"messages": "input"},
    ("pair", "chat_template.argilla_chat"): {},
    ("pair", "passthrough"): {},
    ("pair", "passthrough.default"): {},
}


def columns_of_type(entry: dict[str, Any], objective: str) -> dict[str, str] | None:
    """Return our columns for an entry of Axolotl's datasets of preferences; None for a type that is not known.

    Args:
        objective: rl, or "reward".
    """
    kind = entry.get("type")
    asked = objective if objective in ("orpo", "reward", "kto") else "pair"
    if isinstance(kind, dict):
        return columns_of_fields(kind, judged=objective == "kto") if asked in ("pair", "kto") else None
    if (asked, kind) in WHOLE_TYPES:
        return dict(WHOLE_TYPES[asked, str(kind)])
    if asked == "pair" and kind in ("chat_template", "chat_template.default"):
        names = {name: str(entry.get(f"field_{name}") or name) for name in ("messages", "chosen", "rejected")}
        return {name: column for name, column in names.items() if name == "messages" or name != column}
    template, _, name = str(kind).partition(".")
    types = JUDGED_TYPES if asked == "kto" else PAIR_TYPES if asked == "pair" else {}
    return dict(types[name]) if template in TEMPLATES and name in types else None


def columns_of_fields(kind: dict[str, Any], judged: bool) -> dict[str, str] | None:
    """Return our columns for names and formats of a user's own type: plain texts. None for a format that adds words."""
    roles = ("prompt", "completion", "label") if judged else ("prompt", "chosen", "rejected")
    for name, value in kind.items():
        role = name.removesuffix("_format")
        plain = {f"{{{role}}}", f"{{{kind.get(f'field_{role}') or role}}}"}
        if value and not (name in (*(f"field_{role}" for role in roles), "field_system") or value in plain):
            return None
    return {role: str(kind[f"field_{role}"]) for role in roles if kind.get(f"field_{role}") not in (None, role)}
