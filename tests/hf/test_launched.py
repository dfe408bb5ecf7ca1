"""Bound: transformers' Trainer in two processes, and accelerate's FSDP2, make the updates of one process on our 4-bit
models, to rounding. Behaviour: what they cannot do is refused before the weights load.

`accelerate launch` has FSDP on GPUs only, so its own preparation of a model is called."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments, default_data_collator

import onecard
from onecard.adapter.layers import register_fused
from onecard.errors import UserError
from tests.forks import ranks
from tests.hf.test_trainers import COMMON, load, lora

IDS = torch.randint(5, 200, (24, 16), generator=torch.Generator().manual_seed(0))
STEPS = 3


def adapted(folder, fused=False):
    model, _ = load(folder)
    torch.manual_seed(0)
    return get_peft_model(model, register_fused(lora()) if fused else lora())


def train(folder, out):
    """Four rows an update, by transformers' Trainer."""
    rows: Any = [{"input_ids": row, "labels": row} for row in IDS.tolist()]
    size = 4 // int(os.environ.get("WORLD_SIZE", 1))
    args = TrainingArguments(
        str(out), **{**COMMON, "per_device_train_batch_size": size, "max_steps": STEPS, "logging_strategy": "no"}
    )
    trainer = Trainer(model=adapted(folder), args=args, train_dataset=rows, data_collator=default_data_collator)
    trainer.train()
    if int(os.environ.get("RANK", 0)) == 0:
        trainer.save_model(str(out))


def shard(folder, out, fused):
    """Four rows an update, on a model that accelerate has sharded if there are several processes."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch import distributed as dist
    from torch.distributed.tensor import DTensor

    count, number = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    model: Any = adapted(folder, fused)
    if count > 1:
        dist.init_process_group("gloo")
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
        )
        how = {"mixed_precision": "no", "device": torch.device("cpu"), "is_main_process": number == 0}
        fsdp2_prepare_model(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), **how), model)
        codes = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
        assert isinstance(codes, DTensor) and codes.to_local().numel() == codes.numel() // count
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(learned.values(), lr=3e-2)
    model.train()
    for step in range(STEPS):
        ids = IDS[4 * step : 4 * step + 4].chunk(count)[number]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in learned.items()}
    if number == 0:
        out.mkdir()
        save_file(whole, out / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("work, more", [(train, ()), (shard, (False,)), (shard, (True,))])
def test_two_processes_make_the_updates_of_one(work, more, checkpoint, tmp_path):
    pytest.importorskip("accelerate")
    for count in (1, 2):
        for process in ranks(count, work, checkpoint, tmp_path / str(count), *more):
            end = process.wait()
            assert end.code == 0, end.err
    one, two = (load_file(tmp_path / str(count) / "adapter_model.safetensors") for count in (1, 2))
    assert one.keys() == two.keys() and len(one) == 28
    for name, tensor in one.items():  # AdamW divides small gradients by their size, which raises a rounding's share
        assert (two[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
    assert all(tensor.any() for tensor in one.values())


REFUSED = {
    "DeepSpeed": {},
    "fsdp_version 1": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
    "fsdp_cpu_ram_efficient_loading": {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_takes_the_weights_apart_is_refused_by_name(name, checkpoint, monkeypatch):
    for key, value in REFUSED[name].items():
        monkeypatch.setenv(key, value)
    if name == "DeepSpeed":
        monkeypatch.setattr("onecard.hf.quantizer.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UserError, match=name):
        load(checkpoint)
    with pytest.raises(UserError, match=name):
        onecard.load_model(str(checkpoint), device="cpu")
