"""Behaviour: transformers' Trainer, and TRL's trainers (SFT, DPO, GRPO, reward) train adapters on our 4-bit models."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import onecard
from onecard.adapter.layers import LoraLinear4bit, register_fused
from tests.conftest import chat_rows

COMMON = {
    "max_steps": 5,
    "per_device_train_batch_size": 2,
    "learning_rate": 3e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "seed": 1,
}


def lora():
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def load(folder):
    """The article's code with one import changed."""
    config = onecard.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(str(folder), quantization_config=config, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def check_learned(trainer, folder, tmp_path, drop):
    """The loss fell, and plain peft reads the adapter onto the 16-bit base."""
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == COMMON["max_steps"] and losses[-1] < losses[0] - drop, losses
    trainer.save_model(str(tmp_path / "adapter"))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    trained = {name: p for name, p in trainer.model.named_parameters() if "lora_B.default" in name}
    found = {name: p for name, p in plain.named_parameters() if "lora_B.default" in name}
    assert found.keys() == trained.keys() and len(found) == 14
    for name, parameter in found.items():
        assert parameter.any() and torch.equal(parameter, trained[name].to(parameter.dtype)), name


@pytest.mark.parametrize("wrapped", [False, True])
def test_sft_trainer(wrapped, checkpoint, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model, tokenizer = load(checkpoint)
    config = {"peft_config": lora()}
    if wrapped:  # with the fused layer
        model, config = get_peft_model(model, register_fused(lora())), {}
        assert any(isinstance(module, LoraLinear4bit) for module in model.modules())
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(tmp_path / "out"), max_length=96, **COMMON),
        train_dataset=Dataset.from_list(chat_rows(24)),
        processing_class=tokenizer,
        **config,
    )
    trainer.train()
    check_learned(trainer, checkpoint, tmp_path, 0.5)


@pytest.mark.parametrize("wrapped", [False, True])
def test_dpo_trainer(wrapped, checkpoint, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model, tokenizer = load(checkpoint)
    config = {"peft_config": lora()}
    if wrapped:  # DPO then keeps a second, frozen adapter beside the one that learns
        model, config = get_peft_model(model, register_fused(lora())), {}
    rows = [
        {
            "prompt": [{"role": "user", "content": f"how many mugs? {i}"}],
            "chosen": [{"role": "assistant", "content": f"{i} blue mugs, please"}],
            "rejected": [{"role": "assistant", "content": "the lazy dog"}],
        }
        for i in range(24)
    ]
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(str(tmp_path / "out"), max_length=96, **{**COMMON, "learning_rate": 1e-2}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **config,
    )
    trainer.train()
    check_learned(trainer, checkpoint, tmp_path, 0.1)


@pytest.mark.slow
def test_grpo_trainer(checkpoint, tmp_path):
    """The reward counts a token's text, so that the adapter learns to write it."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model, tokenizer = load(checkpoint)
    prompts = [{"prompt": [{"role": "user", "content": f"how many mugs? {i}"}]} for i in range(24)]

    def reward(completions, **kwargs):
        return [float(turns[0]["content"].count("mug")) - 0.01 * len(turns[0]["content"]) for turns in completions]

    config = {**COMMON, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=trl.GRPOConfig(str(tmp_path / "out"), num_generations=4, max_completion_length=12, beta=0.05, **config),
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        peft_config=lora(),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    losses = [row for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == COMMON["max_steps"] and all("kl" in row and "reward" in row for row in losses)
    after = dict(trainer.model.named_parameters())
    assert any(not torch.equal(after[name], old) for name, old in before.items() if "lora_B" in name)
    assert all(p.isfinite().all() for name, p in after.items() if "lora" in name)


@pytest.mark.slow
def test_reward_trainer(checkpoint, tmp_path):
    """A model with a head of one number, which learns in full, on our 4-bit linears. trl makes bfloat16 of all weights
    that learn, so it needs autocast."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    quantization = load(checkpoint)[0].config.quantization_config
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        str(checkpoint), quantization_config=quantization, dtype=torch.float32, num_labels=1
    )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = [
        {
            "chosen": [
                {"role": "user", "content": f"{i}?"},
                {"role": "assistant", "content": f"{i} blue mugs, please"},
            ],
            "rejected": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "the lazy dog"}],
        }
        for i in range(24)
    ]
    settings = LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]
    )
    trainer = trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(str(tmp_path / "out"), max_length=96, **{**COMMON, "learning_rate": 1e-2, "bf16": True}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=settings,
    )
    assert any(isinstance(module, onecard.nn.linear.Linear4bit) for module in model.modules())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == COMMON["max_steps"] and losses[-1] < losses[0] - 0.1, losses


def test_transformers_trainer_after_prepare_model_for_kbit_training(checkpoint, tmp_path):
    from datasets import Dataset

    model, tokenizer = load(checkpoint)
    model = get_peft_model(prepare_model_for_kbit_training(model), lora())
    texts = [row["messages"][1]["content"] for row in chat_rows(24)]
    rows = tokenizer(texts, padding="max_length", max_length=24, truncation=True)
    rows["labels"] = [
        [token if seen else -100 for token, seen in zip(ids, mask)]
        for ids, mask in zip(rows["input_ids"], rows["attention_mask"])
    ]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(tmp_path / "out"), gradient_checkpointing=True, **COMMON),
        train_dataset=Dataset.from_dict({key: rows[key] for key in ("input_ids", "attention_mask", "labels")}),
    )
    trainer.train()
    check_learned(trainer, checkpoint, tmp_path, 0.5)
