"""Exact: what files of LLaMA-Factory and Axolotl, as their users write them, become; and what is refused."""

import json

import pytest
import torch
import yaml
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from onecard.adapter.layers import lora_config
from onecard.config import TrainConfig, make_config
from onecard.data.load import load_dataset
from onecard.errors import UserError
from onecard.optim.make import make_optimizer
from onecard.optim.schedule import learning_rate
from onecard.recipes.axolotl import read_axolotl
from onecard.recipes.llamafactory import read_llamafactory
from tests.conftest import make_tokenizer
from tests.forks import onecard

FACTORY = """
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
quantization_bit: 4
quantization_method: bnb
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: shop
template: llama3
cutoff_len: 2048
overwrite_cache: true
preprocessing_num_workers: 16

### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
report_to: none

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000

### eval
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""
AXOLOTL = """
base_model: NousResearch/Meta-Llama-3-8B
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
load_in_8bit: false
load_in_4bit: true
strict: false
datasets:
  - path: data/shop.jsonl
    type: chat_template
    field_messages: messages
    message_property_mappings:
      role: role
      content: content
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
tf32: false
gradient_checkpointing: true
flash_attention: true
warmup_steps: 10
evals_per_epoch: 1
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
  pad_token: "<|end_of_text|>"
"""

INFO = {
    "talk": {"formatting": "sharegpt", "columns": {"messages": "messages"}},
    "named": {"columns": {"prompt": "q", "response": "a", "system": "s"}},
}


def factory(tmp_path, text=FACTORY, entry=None, **more):
    (tmp_path / "data").mkdir(exist_ok=True)
    info = {name: {"file_name": f"{name}.json", **INFO.get(name, {})} for name in ("shop", "other", *INFO)}
    info["shop"] |= entry or {}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(text), "dataset_dir": str(tmp_path / "data"), **more}))
    return read_llamafactory(str(path))


def axolotl(tmp_path, **more):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(AXOLOTL), **more}))
    return read_axolotl(str(path))


def test_a_file_of_llamafactory(tmp_path):
    recipe = factory(tmp_path)
    config = make_config(TrainConfig, recipe.fields)
    expected = {
        "model": "meta-llama/Meta-Llama-3-8B-Instruct", "data": str(tmp_path / "data" / "shop.json"), "r": 8,
        "lora_alpha": 16, "target_modules": "all-linear", "max_seq_length": 2048, "packing": False,
        "output": "saves/llama3-8b/lora/sft", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8,
        "learning_rate": 1e-4, "num_train_epochs": 3, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1,
        "compute_dtype": "bfloat16", "validation_split": 0.1, "eval_steps": 500, "save_steps": 500, "loggers": [],
        "quant_type": "nf4", "double_quant": True, "optim": "adamw", "logging_steps": 10, "seed": 42,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert recipe.notes[0].startswith("template llama3")
    assert "ddp_timeout" in recipe.notes[-1] and recipe.notes[-1].startswith("without effect here")


def test_the_defaults_of_llamafactory(tmp_path):
    """A file that relies on them, and has no eval data."""
    config = make_config(TrainConfig, factory(tmp_path, "model_name_or_path: m\noutput_dir: o\ndataset: shop\n").fields)
    expected = {
        "r": 8, "lora_alpha": 16, "lora_dropout": 0, "max_seq_length": 2048, "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1, "learning_rate": 5e-5, "num_train_epochs": 3, "lr_scheduler_type": "linear",
        "warmup_ratio": 0, "weight_decay": 0, "packing": False, "eval_strategy": "no", "save_steps": 500,
        "logging_steps": 500, "train_on": "completion", "max_steps": None,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


TALK = [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "two mugs"}]
ROWS = {
    "shop": [{"instruction": f"how many {i}?", "input": "", "output": "two blue mugs"} for i in range(4)],
    "other": [{"instruction": "the lazy dog", "output": "jumps"}] * 2,
    "talk": [{"messages": TALK * 2}],
    "named": [{"q": "how many?", "a": "two", "s": "the fox"}],
}
DATA_OPTIONS = [  # keys of the file; rows, the most tokens of a row, and learned turns of the first one
    ({}, 4, 2048, 1),
    ({"dataset": "shop,other"}, 6, 2048, 1),  # concat: each row once
    ({"dataset": "shop,other", "max_samples": 1}, 2, 2048, 1),
    ({"cutoff_len": 30}, 4, 30, 1),
    ({"dataset": "talk"}, 1, 2048, 2),
    ({"dataset": "talk", "mask_history": True}, 1, 2048, 1),
    ({"dataset": "talk", "train_on_prompt": True}, 1, 2048, None),
    ({"dataset": "named"}, 1, 2048, 1),
]


@pytest.mark.parametrize("more, rows, most, turns", DATA_OPTIONS, ids=[" ".join(more) for more, *_ in DATA_OPTIONS])
def test_what_an_option_of_the_data_does(more, rows, most, turns, tmp_path):
    """The table of docs/from-other-tools.md: the rows are read as the run reads them."""
    config = make_config(TrainConfig, factory(tmp_path, **more).fields)
    for name, found in ROWS.items():
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(found))
    dataset = load_dataset(config.data, make_tokenizer(), config, config.objective)
    examples = list(dataset.examples)
    assert len(examples) == rows and max(len(example.input_ids) for example in examples) <= most
    labels = [label != -100 for label in examples[0].labels]
    begins = sum(now and not before for before, now in zip([False, *labels], labels))
    assert begins == (turns or 1) and (turns is not None or all(labels[1:]))
    if more.get("dataset") == "named":
        assert [turn["content"] for turn in next(iter(dataset.records)).messages] == ["the fox", "how many?", "two"]


TRAINING_OPTIONS = [  # keys of the file; what they become in peft and in the optimizer; the rate of the first update
    ({"lora_rank": 6}, {"r": 6, "lora_alpha": 12}, {}, None),
    ({"lora_target": "q_proj,v_proj", "use_rslora": True}, {"target_modules": {"q_proj", "v_proj"},
                                                            "use_rslora": True}, {}, None),
    ({"use_dora": True, "lora_dropout": 0.1}, {"use_dora": True, "lora_dropout": 0.1}, {}, None),
    ({"additional_target": "lm_head", "lora_alpha": 3}, {"modules_to_save": ["lm_head"], "lora_alpha": 3}, {}, None),
    ({"pissa_init": True}, {"init_lora_weights": "pissa_niter_16"}, {}, None),
    ({"pissa_init": True, "pissa_iter": -1}, {"init_lora_weights": "pissa"}, {}, None),
    ({"loraplus_lr_ratio": 16.0}, {}, {"lr": {1e-4, 16e-4}}, None),
    ({"weight_decay": "1e-2", "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": "1e-6"}, {},
     {"weight_decay": {0.01}, "betas": {(0.8, 0.9)}, "eps": {1e-6}}, None),
    ({"optim": "sgd", "learning_rate": "2e-3"}, {}, {"lr": {2e-3}}, None),
    ({"warmup_steps": 10, "warmup_ratio": 0.5, "lr_scheduler_type": "linear"}, {}, {}, 1e-5),
    ({"warmup_ratio": 0.05}, {}, {}, 2e-5),
    ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0, "warmup_ratio": 0.0}, {}, {}, 1e-4),
    ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_ratio": 0.0}, {},
     {}, 1e-4),
]  # fmt: skip


@pytest.mark.parametrize(
    "more, lora, group, rate", TRAINING_OPTIONS, ids=[" ".join(more) for more, *_ in TRAINING_OPTIONS]
)
def test_what_an_option_of_the_training_does(more, lora, group, rate, tmp_path):
    config = make_config(TrainConfig, factory(tmp_path, val_size=0, **more).fields)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    )
    found = lora_config(config, model)
    assert {name: getattr(found, name) for name in lora} == lora
    parameters = {"a.lora_A.weight": nn.Parameter(torch.ones(2, 8)), "a.lora_B.weight": nn.Parameter(torch.ones(8, 2))}
    optimizer = make_optimizer(parameters, config)
    assert {name: {each[name] for each in optimizer.param_groups} for name in group} == group
    if rate is not None:
        assert learning_rate(0, 100, config) == pytest.approx(rate)


def test_datasets_of_llamafactory(tmp_path):
    entry = {"formatting": "sharegpt", "columns": {"messages": "conversations"}}
    assert factory(tmp_path, entry=entry).fields["data"] == str(tmp_path / "data" / "shop.json")
    entry = {"columns": {"prompt": "question", "response": "answer"}, "num_samples": 50}
    (source,) = factory(tmp_path, entry=entry | {"file_name": "shop.json"}).fields["data"]
    assert source["columns"] == {"prompt": "question", "completion": "answer"} and source["max_rows"] == 50
    sources = factory(tmp_path, dataset="shop, other", max_samples=10).fields["data"]
    assert [source["max_rows"] for source in sources] == [10, 10]
    with pytest.raises(UserError, match="did you mean"):
        factory(tmp_path, dataset="shopp")
    with pytest.raises(UserError, match="dataset shop: columns"):
        factory(tmp_path, entry={"columns": {"prompt": "q", "query": "i", "response": "a"}})
    assert factory(tmp_path, train_on_prompt=True).fields["train_on"] == "all"
    assert factory(tmp_path, mask_history=True).fields["train_on"] == "last"
    assert factory(tmp_path, neat_packing=True).fields["packing"] is True
    assert factory(tmp_path, full_determinism=True).fields["deterministic"] is True


@pytest.mark.parametrize(
    "more, said",
    [
        ({"stage": "ppo"}, "stage: 'ppo'"),
        ({"finetuning_type": "full"}, "onecard trains LoRA"),
        ({"quantization_bit": 8}, "quantization_bit: 8"),
        ({"use_galore": True}, "use_galore"),
        ({"rope_scaling": "dynamic"}, "rope_scaling"),
        ({"val_size": 100}, "a share below 1"),
        ({"adapter_name_or_path": "a,b"}, "one adapter"),
        ({"eval_steps": 0.1}, "a number of updates"),
        ({"resize_vocab": True}, "no tokens are added"),
    ],
)
def test_what_changes_the_result_is_refused(more, said, tmp_path):
    with pytest.raises(UserError) as error:
        factory(tmp_path, **more)
    assert said in str(error.value)


def test_harmless_values_of_refused_keys_and_unknown_keys_are_read(tmp_path):
    recipe = factory(tmp_path, use_galore=False, rope_scaling=None, add_tokens="", lora_rnk=4)
    assert "not known and not used: lora_rnk" in recipe.notes


def test_new_tokens_of_llamafactory(tmp_path):
    """There embedding and head are then trained in full, unless the file names other modules."""
    recipe = factory(tmp_path, add_tokens="<a>, <b>", add_special_tokens="<|c|>", resize_vocab=True)
    config = make_config(TrainConfig, recipe.fields)
    assert config.add_tokens == ["<a>", "<b>"] and config.add_special_tokens == ["<|c|>"]
    assert config.modules_to_save == ["embed_tokens", "lm_head"] and any("in full" in note for note in recipe.notes)
    more = {"new_special_tokens": "<|c|>", "additional_target": "embed_tokens,lm_head,norm"}
    config = make_config(TrainConfig, factory(tmp_path, **more).fields)
    assert config.add_special_tokens == ["<|c|>"] and config.modules_to_save == ["embed_tokens", "lm_head", "norm"]
    assert make_config(TrainConfig, factory(tmp_path).fields).modules_to_save is None


def test_new_tokens_of_axolotl(tmp_path):
    special = {"pad_token": "<p>", "additional_special_tokens": ["<|c|>"]}
    recipe = axolotl(tmp_path, tokens=["<a>"], special_tokens=special, lora_modules_to_save=["embed_tokens", "lm_head"])
    config = make_config(TrainConfig, recipe.fields)
    assert (config.add_tokens, config.add_special_tokens) == (["<a>"], ["<|c|>"])
    assert config.modules_to_save == ["embed_tokens", "lm_head"]
    assert any(note.startswith("special_tokens {'pad_token': '<p>'}") for note in recipe.notes)


def test_a_file_of_axolotl(tmp_path):
    recipe = axolotl(tmp_path)
    config = make_config(TrainConfig, recipe.fields)
    expected = {
        "model": "NousResearch/Meta-Llama-3-8B", "data": "data/shop.jsonl", "r": 32, "lora_alpha": 16,
        "lora_dropout": 0.05, "target_modules": "all-linear", "max_seq_length": 4096, "packing": True,
        "output": "./outputs/qlora-out", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
        "learning_rate": 2e-4, "num_train_epochs": 4, "lr_scheduler_type": "cosine", "warmup_steps": 10,
        "validation_split": 0.05, "optim": "paged_adamw_32bit", "eval_strategy": "epoch", "save_strategy": "epoch",
        "compute_dtype": "auto", "train_on": "completion",
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert any("special_tokens" in note for note in recipe.notes)
    assert "pad_to_sequence_len" in recipe.notes[-1]


@pytest.mark.parametrize(
    "more, said",
    [
        ({"adapter": None}, "not the whole model"),
        ({"load_in_8bit": True}, "load_in_8bit: True"),
        ({"rl": "grpo"}, "rl: 'grpo'"),
        ({"datasets": [{"path": "a", "type": "input_output"}]}, "type 'input_output'"),
        ({"datasets": [{"path": "a", "type": {"field_instruction": "x"}}]}, "type {'field_instruction'"),
        ({"lora_target_linear": False}, "name the modules"),
        ({"relora_steps": 10}, "relora_steps"),
        ({"evals_per_epoch": 4, "early_stopping_patience": 2}, "give eval_steps"),
    ],
)
def test_what_changes_the_result_is_refused_of_axolotl(more, said, tmp_path):
    with pytest.raises(UserError) as error:
        axolotl(tmp_path, **more)
    assert said in str(error.value)


def test_batch_and_mappings_of_axolotl(tmp_path):
    fields = axolotl(tmp_path, gradient_accumulation_steps=None, batch_size=16).fields
    assert (fields["per_device_train_batch_size"], fields["gradient_accumulation_steps"]) == (2, 8)
    fields = axolotl(tmp_path, train_on_inputs=True, lora_target_modules=["q_proj"], lora_target_linear=False).fields
    assert fields["train_on"] == "all" and fields["target_modules"] == ["q_proj"]
    data = [{"path": "a", "type": "alpaca"}, {"path": "b.jsonl", "type": "completion", "field": "body"}]
    first, second = axolotl(tmp_path, datasets=data).fields["data"]
    assert first == {"path": "a", "format": "alpaca"}
    assert second == {"path": "b.jsonl", "format": "text", "columns": {"text": "body"}}


def test_the_command_prints_it_as_our_settings(tmp_path):
    factory(tmp_path)
    code, out, err = onecard("config", "--from-llamafactory", tmp_path / "run.yaml", "--r", 4)
    assert code == 0, err
    found = yaml.safe_load(out)
    assert (found["r"], found["lora_alpha"], found["learning_rate"]) == (4, 16, 1e-4)
    assert "note: template llama3" in err and "note: without effect here" in err
    make_config(TrainConfig, found)
    code, _, err = onecard("train", "--from-axolotl", tmp_path / "none.yaml", "--output", tmp_path / "o")
    assert code == 2 and "none.yaml" in err


def test_streams_of_both(tmp_path):
    fields = factory(tmp_path, streaming=True, max_steps=100).fields
    assert (fields["streaming"], fields["buffer_size"], fields["max_steps"]) == (True, 16384, 100)
    fields = axolotl(tmp_path, streaming=True, streaming_multipack_buffer_size=500).fields
    assert (fields["streaming"], fields["buffer_size"]) == (True, 500)
    assert not {"streaming", "buffer_size"} & (factory(tmp_path).fields.keys() | axolotl(tmp_path).fields.keys())


PAIRS = {"ranking": True, "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen",
                                      "rejected": "rejected"}}  # fmt: skip
JUDGED = {"columns": {"prompt": "instruction", "query": "input", "response": "output", "kto_tag": "kto_tag"}}
PREFERENCES = [
    ({"stage": "dpo"}, {"loss": "dpo", "loss_type": "sigmoid", "beta": 0.1, "lora_dropout": 0}),
    ({"stage": "dpo", "pref_loss": "hinge", "pref_beta": "2e-1"}, {"loss": "dpo", "loss_type": "hinge", "beta": 0.2}),
    ({"stage": "dpo", "pref_loss": "ipo"}, {"loss": "ipo"}),
    ({"stage": "dpo", "pref_loss": "simpo", "pref_beta": 2.5, "simpo_gamma": 1.0, "adapter_name_or_path": "a"},
     {"loss": "simpo", "beta": 2.5, "simpo_gamma": 1.0, "cpo_alpha": 0, "adapter": "a"}),
    ({"stage": "dpo", "adapter_name_or_path": "a", "ref_model": "meta-llama/Meta-Llama-3-8B-Instruct",
      "ref_model_adapters": "a"}, {"loss": "dpo", "adapter": "a"}),
    ({"stage": "kto", "kto_chosen_weight": 0.5}, {"loss": "kto", "desirable_weight": 0.5, "undesirable_weight": 1}),
    ({"stage": "rm", "lora_dropout": 0.1}, {"task": "reward", "loss": "sft", "lora_dropout": 0.1}),
    ({"pref_beta": 0.3, "pref_loss": "orpo", "pref_ftx": 1.0}, {"loss": "sft"}),  # stage sft reads none of them
]  # fmt: skip


@pytest.mark.parametrize("more, expected", PREFERENCES, ids=range(len(PREFERENCES)))
def test_preferences_of_llamafactory(more, expected, tmp_path):
    entry = {"stage": more.get("stage"), "dpo": PAIRS, "rm": PAIRS, "kto": JUDGED}.get(more.get("stage"))
    recipe = factory(tmp_path, entry=entry, **{"lora_dropout": 0.05, **more})
    config = make_config(TrainConfig, recipe.fields)
    assert {name: getattr(config, name) for name in expected} == expected
    assert any("without dropout" in note for note in recipe.notes) == (more.get("stage") in ("dpo", "kto"))


@pytest.mark.parametrize(
    "more, said",
    [
        ({"pref_loss": "orpo"}, "its nll leaves the prompt out"),
        ({"pref_loss": "kto_pair"}, "onecard has sigmoid, hinge, ipo, simpo"),
        ({"pref_ftx": 0.5}, "mean loss of each chosen answer"),
        ({"dpo_label_smoothing": 0.1}, "smooths the labels"),
        ({"ld_alpha": 0.5}, "ld_alpha: 0.5"),
        ({"ref_model": "other"}, "the reference is the base itself"),
        ({"adapter_name_or_path": "a"}, "merge it into the base first"),
        ({"ref_model_adapters": "a"}, "the adapter it goes on from"),
        ({"dataset": "other"}, "ranking false"),
    ],
)
def test_preferences_that_differ_are_refused_of_llamafactory(more, said, tmp_path):
    with pytest.raises(UserError) as error:
        factory(tmp_path, entry=PAIRS, stage="dpo", **more)
    assert said in str(error.value)
    with pytest.raises(UserError, match="ranking true"):
        factory(tmp_path, entry=PAIRS)


SAID = [{"from": "human", "value": "how many mugs?"}]
GOOD, BAD = ({"from": "gpt", "value": text} for text in ("two blue mugs", "the lazy dog"))
RANKED = [  # stage, entry of dataset_info.json, row
    ("dpo", PAIRS, {"instruction": "how many mugs?", "input": "", "chosen": "two blue mugs",
                    "rejected": "the lazy dog"}),
    ("rm", {"ranking": True, "formatting": "sharegpt", "columns": {"messages": "talk", "chosen": "chosen",
                                                                   "rejected": "rejected"}},
     {"talk": SAID, "chosen": GOOD, "rejected": BAD}),
    ("dpo", {"ranking": True, "columns": {"prompt": "prompt", "chosen": "yes", "rejected": "no"}},
     {"prompt": "how many mugs?", "yes": "two blue mugs", "no": "the lazy dog"}),
    ("dpo", {"ranking": True, "formatting": "sharegpt", "columns": {"chosen": "chosen", "rejected": "rejected"}},
     {"prompt": "not this one", "conversations": SAID, "chosen": GOOD, "rejected": BAD}),
    ("kto", JUDGED, {"instruction": "how many mugs?", "input": "", "output": "two blue mugs", "kto_tag": True}),
    ("kto", {"formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "label"}},
     {"messages": [*SAID, GOOD], "label": True}),
]  # fmt: skip


@pytest.mark.parametrize("stage, entry, row", RANKED, ids=range(len(RANKED)))
def test_rows_of_preferences_of_llamafactory_are_chats(stage, entry, row, tmp_path):
    """The file of the recipe is read by our own reader, as the run would."""
    config = make_config(TrainConfig, factory(tmp_path, entry=entry, stage=stage).fields)
    assert first_of(config, tmp_path, row) == ["how many mugs?", "two blue mugs"]


def first_of(config, tmp_path, row):
    """The messages of a row, and of the chosen answer, as the data of the settings are read."""
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "shop.json").write_text(json.dumps([row]))
    dataset = load_dataset(config.data, make_tokenizer(), config, config.objective)
    (record,) = dataset.records
    return [turn["content"] for turn in record.messages]


PROMPT = [{"role": "user", "content": "how many mugs?"}]
ANSWER, OTHER = ({"role": "assistant", "content": text} for text in ("two blue mugs", "the lazy dog"))
TEXTS = {"chosen": "two blue mugs", "rejected": "the lazy dog"}
FULL = {"chosen": [*PROMPT, ANSWER], "rejected": [*PROMPT, OTHER]}
TYPED = [  # rl, the dataset's keys, row
    ("dpo", {"type": "chatml.intel"}, {"system": "", "question": "how many mugs?", "prompt": "no", **TEXTS}),
    ("simpo", {"type": "llama3.icr"}, {"input": "how many mugs?", **TEXTS}),
    ("ipo", {"type": "chatml.prompt_pairs"}, {"prompt": "how many mugs?", **TEXTS}),
    ("dpo", {"type": "llama3.ultra"}, {"prompt": "how many mugs?", **FULL}),
    ("dpo", {"type": "chat_template.argilla_chat"}, FULL),
    ("dpo", {"type": "chat_template.default", "field_messages": "talk", "field_chosen": "yes"},
     {"talk": PROMPT, "yes": ANSWER, "rejected": OTHER}),
    ("orpo", {"type": "chat_template.argilla"}, FULL),
    ("kto", {"type": "llama3.ultra"}, {"prompt": "how many mugs?", "completion": "two blue mugs", "label": True}),
    ("kto", {"type": "llama3.argilla_chat"}, {"completion": [*PROMPT, ANSWER], "label": True}),
    ("reward", {"type": "bradley_terry.chat_template"}, {"system": "", "input": "how many mugs?", **TEXTS}),
]  # fmt: skip


@pytest.mark.parametrize("rl, entry, row", TYPED, ids=[f"{rl}-{entry['type']}" for rl, entry, _ in TYPED])
def test_rows_of_preferences_of_axolotl_are_chats(rl, entry, row, tmp_path):
    asked = {"reward_model": True} if rl == "reward" else {"rl": rl}
    path = str(tmp_path / "data" / "shop.json")
    config = make_config(TrainConfig, axolotl(tmp_path, datasets=[{"path": path, **entry}], **asked).fields)
    assert config.objective == rl
    assert first_of(config, tmp_path, row) == ["how many mugs?", "two blue mugs"]


DATA = {"datasets": [{"path": "d.jsonl", "type": "chat_template.default"}]}
RL = [
    ({"rl": "dpo"}, {"loss": "dpo", "beta": 0.1, "loss_type": "sigmoid", "lora_dropout": 0}),
    ({"rl": "dpo", "rl_beta": 0.3, "trl": {"beta": 0.2}, "dpo_norm_loss": True},
     {"loss": "dpo", "beta": 0.2, "loss_type": "sigmoid_norm"}),
    ({"rl": "ipo", "dpo_label_smoothing": 0.1}, {"loss": "ipo", "label_smoothing": 0}),  # not read there either
    ({"rl": "orpo", "orpo_alpha": 0.4, "datasets": [{"path": "d", "type": "chat_template.argilla"}]},
     {"loss": "orpo", "beta": 0.4}),
    ({"rl": "simpo", "simpo_gamma": 1.4, "rl_beta": 2}, {"loss": "simpo", "simpo_gamma": 1.4, "cpo_alpha": 1}),
    ({"rl": "simpo", "simpo_gamma": 1.4, "cpo_alpha": 0}, {"cpo_alpha": 0}),
    ({"rl": "kto", "kto_undesirable_weight": 0.2, "datasets": [{"path": "d", "type": "chatml.intel"}]},
     {"loss": "kto", "desirable_weight": 1, "undesirable_weight": 0.2}),
    ({"reward_model": True, "center_rewards_coefficient": 0.01,
      "datasets": [{"path": "d", "type": "bradley_terry.chat_template"}]},
     {"task": "reward", "center_rewards_coefficient": 0.01, "lora_dropout": 0}),
    ({"rl": "dpo", "datasets": [{"path": "d", "type": {"field_prompt": "q", "field_chosen": "c",
                                                      "chosen_format": "{chosen}"}}]},
     {"loss": "dpo"}),
]  # fmt: skip


@pytest.mark.parametrize("more, expected", RL, ids=range(len(RL)))
def test_preferences_of_axolotl(more, expected, tmp_path):
    recipe = axolotl(tmp_path, **{**DATA, **more})
    config = make_config(TrainConfig, recipe.fields)
    assert {name: getattr(config, name) for name in expected} == expected
    assert any("without dropout" in note for note in recipe.notes)


@pytest.mark.parametrize(
    "more, said",
    [
        ({"dpo_use_weighting": True}, "WPO"),
        ({"dpo_label_smoothing": 0.1}, "smooths the labels"),
        ({"rpo_alpha": 1.0}, "rpo_alpha"),
        ({"trl": {"use_vllm": True}}, "trl: use_vllm"),
        ({"lora_model_dir": "a"}, "merge it first"),
        ({"datasets": [{"path": "a", "type": "zephyr.nectar"}]}, "type 'zephyr.nectar' with dpo"),
        ({"datasets": [{"path": "a", "type": "chatml.argilla"}]}, "type 'chatml.argilla' with dpo"),
        ({"datasets": [{"path": "a", "type": {"prompt_format": "[INST] {prompt}"}}]}, "[INST]"),
        ({"datasets": [{"path": "a", "type": "alpaca"}]}, "type 'alpaca' with dpo"),
    ],
)
def test_preferences_that_differ_are_refused_of_axolotl(more, said, tmp_path):
    with pytest.raises(UserError) as error:
        axolotl(tmp_path, **{**DATA, "rl": "dpo", **more})
    assert said in str(error.value)
