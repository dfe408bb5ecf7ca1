"""Exact: a large result's memory is used again only when nothing holds the result any more."""

import gc

import pytest
import torch

from onecard.kernels.cpu import allocator

LARGE = (1024, 1024)


@pytest.fixture(autouse=True)
def fresh():
    gc.collect()
    allocator.release()
    yield
    allocator.release()


def test_shapes_and_dtypes():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.uint8):
        for shape in ((), (3, 5), (1100, 1000), (7, 300, 1000)):
            x = allocator.empty(shape, dtype)
            assert x.shape == shape and x.dtype == dtype and x.is_contiguous()
            assert torch.equal(x.fill_(3), torch.full(shape, 3, dtype=dtype))


def test_a_block_waits_for_the_next_of_its_size():
    x = allocator.empty(LARGE, torch.float32)
    place = x.data_ptr()
    del x
    assert allocator.empty(LARGE, torch.float32).data_ptr() == place
    other = allocator.empty((512, 4096), torch.float32)
    assert other.data_ptr() != place
    assert allocator.empty((1024, 1000), torch.float32).data_ptr() == place  # of a size with it


@pytest.mark.parametrize("hold", [lambda x: x[3:], lambda x: x.detach(), lambda x: x.numpy(), torch.nn.Parameter])
def test_what_holds_a_result_holds_its_block(hold):
    x = allocator.empty(LARGE, torch.float32).fill_(1)
    held, place = hold(x), x.data_ptr()
    del x
    others = [allocator.empty(LARGE, torch.float32).fill_(2) for _ in range(3)]
    assert place not in [other.data_ptr() for other in others]
    assert torch.as_tensor(held).eq(1).all()
    del held
    assert allocator.empty(LARGE, torch.float32).data_ptr() == place


def test_autograd_holds_what_it_saves():
    x = allocator.empty(LARGE, torch.float32).fill_(1)
    weight = torch.full((), 2.0, requires_grad=True)
    y = (weight * x).sum()
    place = x.data_ptr()
    del x
    assert allocator.empty(LARGE, torch.float32).fill_(5).data_ptr() != place
    y.backward()
    assert weight.grad == 1024 * 1024


def test_release_gives_them_back():
    x = allocator.empty(LARGE, torch.float32)
    del x
    assert any(allocator._free.values())
    allocator.release()
    assert not allocator._free
