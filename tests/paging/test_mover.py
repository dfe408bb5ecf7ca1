"""Exact: what the mover stores comes back with the same bits, from each tier and in any order."""

import os

import pytest
import torch

from onecard.paging.mover import FileTier, HostTier, Mover, new_tier

CPU = torch.device("cpu")
DTYPES = [torch.uint8, torch.int32, torch.float16, torch.bfloat16, torch.float32, torch.float64]


def tensor_of(dtype, seed, shape=(3, 5, 7)):
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), generator=torch.Generator().manual_seed(seed))
    return bits.to(torch.uint8).view(dtype).squeeze(-1)  # NaN and Inf, too


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.fixture(params=["host", "file"])
def tier(request, tmp_path, monkeypatch):
    if request.param == "file":
        return FileTier(tmp_path)
    empty = torch.empty  # without a GPU, no memory can be pinned
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
    return HostTier()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stored_tensor_comes_back_bit_for_bit(dtype, tier):
    first, second, third = (tensor_of(dtype, seed) for seed in range(3))
    stored = [tier.store(first), tier.store(second)]
    stored[0] = tier.store(third, stored[0])  # in the place of the first
    for place, expected in zip(stored, (third, second)):
        assert same_bits(place.read(), expected) and same_bits(place.view(), expected)


def test_a_stored_tensor_does_not_follow_its_source(tier):
    tensor = torch.arange(6.0)
    stored = tier.store(tensor)
    tensor.zero_()
    assert stored.read().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_transfers_come_back_in_any_order_and_more_than_once(tmp_path):
    mover = Mover(CPU)
    tensors = [tensor_of(torch.float32, seed) for seed in range(8)]
    sent = [mover.send(tensor, new_tier(CPU, tmp_path)) for tensor in tensors]
    for number in (7, 0, 3, 3, 5):
        assert same_bits(mover.take(mover.bring(sent[number])), tensors[number])
    assert same_bits(mover.fetch(lambda: tensors[2]).wait(), tensors[2])
    assert not os.listdir(tmp_path), "files without a name leave nothing behind"


def test_the_error_of_a_transfer_reaches_who_waits(tmp_path):
    (tmp_path / "file").write_text("")
    mover = Mover(CPU)
    sent = mover.send(torch.ones(4), FileTier(tmp_path / "file" / "folder"))
    with pytest.raises(NotADirectoryError):
        sent.wait()
    with pytest.raises(NotADirectoryError):
        mover.take(mover.bring(sent))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_transfers_on_a_stream_wait_for_kernels_before_and_after(dtype):
    device = torch.device("cuda")
    mover, tier = Mover(device), new_tier(device, None)
    a = torch.randn(2048, 2048, device=device)
    for seed in range(8):
        expected = tensor_of(dtype, seed, (1 << 16,))
        tensor = torch.zeros_like(expected, device=device)
        a = a @ a / 2048  # the copy below must wait for it
        tensor.view(torch.uint8).copy_(expected.view(torch.uint8).to(device))
        sent = mover.send(tensor, tier)
        sent.wait()
        tensor.zero_()
        back = mover.take(mover.bring(sent))
        assert same_bits((back.view(torch.uint8) + 0).view(dtype).cpu(), expected)
        assert same_bits(mover.take(mover.fetch(lambda e=expected: e.pin_memory())).cpu(), expected)
