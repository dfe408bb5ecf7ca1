"""Exact: optimizer states that are sharded over processes change no bit of adapter and checkpoint."""

import pytest
import torch

from onecard.config import TrainConfig, make_config
from onecard.errors import UserError
from onecard.optim.make import largest_share
from onecard.train.owners import Owners
from onecard.train.ranks import Ranks
from tests.conftest import chat_rows, write_rows
from tests.train.test_loop import adapter_bytes, copy_at, fields
from tests.train.test_ranks import finished, started


@pytest.mark.parametrize(
    "parallel, more",
    [
        ("ddp", {"optim": "paged_adamw_8bit", "r": 64, "add_tokens": ["mugs"]}),
        *(
            pytest.param("fsdp", {"optim": optim}, marks=pytest.mark.slow)
            for optim in ("adamw", "lion", "sgd", "muon", "adafactor")
        ),
        pytest.param("ddp", {"modules_to_save": ["lm_head"], "compute_dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
)
def test_sharded_states_change_no_bit(parallel, more, checkpoint, tmp_path):
    """A run whose states are whole goes on with sharded ones."""
    rows, more = write_rows(tmp_path / "d.jsonl", chat_rows(9)), {"parallel": parallel, "packing": False, **more}
    settings = fields(checkpoint, rows, tmp_path / "o", gradient_accumulation_steps=3, **more)
    finished(started(settings, tmp_path / "plain", 2))
    sharded = copy_at(tmp_path / "plain", tmp_path / "sharded", 1)
    finished(started({**settings, "shard_optimizer": True}, sharded, 2, "--resume"))
    assert adapter_bytes(tmp_path / "plain") == adapter_bytes(sharded)
    last = "checkpoints/checkpoint-3/optimizer.safetensors"
    assert (tmp_path / "plain" / last).read_bytes() == (sharded / last).read_bytes()


def test_each_tensor_has_one_owner():
    sizes = [7, 1, 2, 5, 3]
    tensors = {str(n): torch.nn.Parameter(torch.ones(n)) for n in sizes}
    for count in (1, 2, 3):
        parts = [Owners.of(tensors, Ranks(number, count), True).own for number in range(count)]
        assert sorted(name for part in parts for name in part) == sorted(tensors)
        assert [Owners.of(tensors, Ranks(0, count), False).own] == [tensors]
    assert [largest_share(sizes, [10 * n for n in sizes], count) for count in (1, 2, 3)] == [180, 100, 70]
    average = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "shard_optimizer": True}
    with pytest.raises(UserError, match="keeps an average of all weights"):
        make_config(TrainConfig, {"model": "m", "data": "d", **average})
    with pytest.raises(UserError, match="a tensor to update"):
        Owners.of({"A": torch.nn.Parameter(torch.ones(2))}, Ranks(0, 2), True)
