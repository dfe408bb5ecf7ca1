"""No worse than plain: the chunked loss. Exact to rounding: packed against apart, and any split of a window."""

import pytest
import torch

import onecard
from onecard.adapter.layers import lora_config
from onecard.config import LoraSettings, TrainConfig, make_config
from onecard.data.load import load_dataset
from onecard.data.packing import collate
from onecard.hf.attention import use_packed_attention
from onecard.hf.load import load_tokenizer
from onecard.memory.inputs import PlanInputs
from onecard.memory.model import find_model
from onecard.memory.terms import logits_term
from onecard.train import loss as loss_module
from onecard.train.evaluate import choose_loss, evaluate
from onecard.train.graphs import DecoderGraphs, size_of
from onecard.train.loss import (
    LogitTransform,
    chunked_cross_entropy,
    chunked_token_losses,
    decode,
    head_loss,
    packed_loss,
    plain_loss,
)
from onecard.train.step import to_device
from tests.conftest import FAMILIES, make_checkpoint

TRANSFORMS = [LogitTransform(), LogitTransform(scale=0.3), LogitTransform(softcap=5.0), LogitTransform(2.0, 5.0)]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained_head", [False, True])
def test_chunked_cross_entropy(transform, dtype, trained_head, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(loss_module, "logits_chunk_bytes", lambda device: 1)  # 64 rows a chunk
    head = torch.nn.Linear(32, 50).to(dtype).requires_grad_(trained_head)
    h, target = torch.randn(150, 32, dtype=dtype, requires_grad=True), torch.randint(0, 50, (150,))
    ours = chunked_cross_entropy(h, head, target, transform, 150)
    (grad,) = torch.autograd.grad(ours, h)

    def plain(to):
        x = h.detach().to(to).requires_grad_()
        z = transform(x @ head.weight.detach().to(to).T + head.bias.detach().to(to))
        value = torch.nn.functional.cross_entropy(z if to == torch.float64 else z.float(), target)
        return value, torch.autograd.grad(value, x)[0]

    (truth, true_grad), (same, same_grad) = plain(torch.float64), plain(dtype)
    eps = torch.finfo(dtype).eps
    assert abs(ours - truth) <= 2 * abs(same - truth) + eps * abs(truth)
    worst = (same_grad.double() - true_grad).abs().max()
    assert (grad.double() - true_grad).abs().max() <= 2 * worst + eps * true_grad.abs().max()


@pytest.mark.parametrize("transform", [TRANSFORMS[0], TRANSFORMS[3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained_head", [False, True])
def test_chunked_token_losses(transform, dtype, trained_head, monkeypatch):
    """Each position's loss, and the gradient of any weighted sum of them."""
    torch.manual_seed(0)
    monkeypatch.setattr(loss_module, "logits_chunk_bytes", lambda device: 1)  # 64 rows a chunk
    monkeypatch.setattr(loss_module, "ROWS_SCALED", 37)
    head = torch.nn.Linear(32, 50).to(dtype).requires_grad_(trained_head)
    h, target = torch.randn(150, 32, dtype=dtype, requires_grad=True), torch.randint(0, 50, (150,))
    factors = torch.randn(150, dtype=torch.float64)
    ours = chunked_token_losses(h, head, target, transform)
    (grad,) = torch.autograd.grad((ours.double() * factors).sum(), h)

    def plain(to):
        x = h.detach().to(to).requires_grad_()
        z = transform(x @ head.weight.detach().to(to).T + head.bias.detach().to(to))
        z = z if to == torch.float64 else z.float()
        value = torch.nn.functional.cross_entropy(z, target, reduction="none")
        return value, torch.autograd.grad((value.double() * factors).sum(), x)[0]

    (truth, true_grad), (same, same_grad) = plain(torch.float64), plain(dtype)
    eps = torch.finfo(dtype).eps
    assert ((ours - truth).abs() <= 2 * (same - truth).abs().max() + eps * truth.abs()).all()
    worst = (same_grad.double() - true_grad).abs().max()
    assert (grad.double() - true_grad).abs().max() <= 2 * worst + 2 * eps * true_grad.abs().max()


def test_the_full_logits_never_exist(monkeypatch):
    monkeypatch.setattr(loss_module, "logits_chunk_bytes", lambda device: 4 * 1000 * 64)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    head = torch.nn.Linear(16, 1000, bias=False).requires_grad_(False)
    h = torch.randn(1024, 16, requires_grad=True)
    with Watch():
        target = torch.randint(0, 1000, (1024,))
        chunked_cross_entropy(h, head, target, LogitTransform(), 1024).backward()
        (chunked_token_losses(h, head, target, LogitTransform()) * torch.randn(1024)).sum().backward()
    assert largest <= 64_000  # one chunk; all logits would be 1,024,000


@pytest.mark.parametrize("device, rows", [("cpu", 128), ("cuda", 512)])
def test_a_chunk_has_rows_for_its_device(device, rows):
    V, T = 128_256, 1 << 16
    assert loss_module.chunk_rows(T, V, 2, torch.device(device)) == rows
    fields = {"model": "llama-3-8b", "data": "-", "output": "-", "device": device}
    inputs = PlanInputs(find_model("llama-3-8b"), make_config(TrainConfig, fields, "test"), torch.bfloat16)
    planned = logits_term(inputs, T).num_bytes
    assert rows * V * 2 <= planned < (rows + 64) * V * 2


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Each family with an adapter that does something, and data."""
    from peft import get_peft_model

    made = {}

    def get(family):
        if family not in made:
            extra = {"sliding_window": 8} if family in ("mistral", "gemma2") else {}
            folder = make_checkpoint(tmp_path_factory.mktemp(family), family, **extra)
            model = get_peft_model(
                onecard.load_model(str(folder), compute_dtype="float32", device="cpu"), lora_config(LoraSettings())
            )
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(1))
            made[family] = (model, load_tokenizer(str(folder)))
        return made[family]

    return get


def config_for(chats, **fields):
    return TrainConfig(model="m", data=str(chats), output="o", **fields)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_packed_documents_do_not_see_each_other(family, tuned, chats):
    model, tokenizer = tuned(family)
    dataset = load_dataset(str(chats), tokenizer, config_for(chats))
    base = model.get_base_model()
    batch = to_device(collate(dataset.examples[:4]), torch.device("cpu"))
    num_tokens = sum(example.num_supervised for example in dataset.examples[:4])
    apart = plain_loss(base, batch, num_tokens)
    apart.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with use_packed_attention(base):
        packed = packed_loss(base, batch, num_tokens)
        packed.backward()
    # The same float32 sums in another order.
    assert abs(packed - apart) <= 1e-5 * abs(apart)
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert (p.grad - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-7, name
    model.zero_grad()
    assert choose_loss(model, dataset) == (packed_loss, None)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_row_filled_up_for_a_graph_is_the_row(family, count, tuned, chats):
    """The last document goes on, documents of nothing follow: neither is seen or learned."""
    model, tokenizer = tuned(family)
    examples = load_dataset(str(chats), tokenizer, config_for(chats)).examples[:count]
    base, num_tokens = model.get_base_model(), sum(example.num_supervised for example in examples)
    batch = to_device(collate(examples), torch.device("cpu"))
    graphs = DecoderGraphs(base, [p for p in model.parameters() if p.requires_grad], 0)
    filled = graphs.pad_to(batch, size_of(batch))
    assert filled["input_ids"].shape[1] > batch["input_ids"].shape[1]
    real = batch["input_ids"]  # a padding token's embedding may be zero, where gemma3n's gradient is NaN
    assert (filled["input_ids"][:, real.shape[1] :] == real[:, -1:]).all()
    assert len(filled["cu_seqlens"]) - 1 in (1, 2, 4)
    found = []
    with use_packed_attention(base):
        for row in (batch, filled):
            loss = head_loss(base, decode(base, row), batch, num_tokens)
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in graphs.trainable)])
            model.zero_grad()
    for a, b in zip(*found):
        assert (a - b).norm() <= 1e-4 * a.norm() + 1e-7


def test_evaluate_is_the_models_own_loss(tuned, chats):
    model, tokenizer = tuned("llama")
    dataset = load_dataset(str(chats), tokenizer, config_for(chats))
    total = num_tokens = 0.0
    for example in dataset.examples:
        labels = torch.tensor([example.labels])
        count = example.num_supervised
        total += model(torch.tensor([example.input_ids]), labels=labels).loss.item() * count
        num_tokens += count
    assert abs(evaluate(model, dataset) - total / num_tokens) <= 1e-5 * total / num_tokens
