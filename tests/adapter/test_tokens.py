"""No worse than plain: rows of new tokens beside peft's layer. Exact: their start, and several adapters on a base."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import onecard
from onecard.adapter.layers import lora_config
from onecard.adapter.load import use_adapter, with_adapter
from onecard.adapter.origin import origin_of
from onecard.adapter.save import save_adapter
from onecard.adapter.tokens import TokenRows, add_adapter, layers_of, vocabulary_of
from onecard.config import LoraSettings
from onecard.data.chat.mask import Example
from onecard.data.packing import collate
from onecard.errors import UserError
from onecard.hf.attention import use_packed_attention
from onecard.hf.tokens import NewTokens
from onecard.nn.embedding import NewRows
from onecard.train import loss as loss_module
from onecard.train.loss import packed_loss, plain_loss, to_device
from tests.conftest import make_checkpoint
from tests.hf.test_load import dequantized_twin

SIZE = 304  # tokens of the checkpoints' tokenizer
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def new_tokens(first=SIZE, count=3):
    pieces = {first + i: list(range(20 + i, 24 + 2 * i)) for i in range(count)}
    return NewTokens({i: f"<t{i}>" for i in pieces}, pieces)


def adapted(folder, new, dtype="float32", **kwargs):
    """A 4-bit base with a new adapter, whose B and rows are not what they start from."""
    base = onecard.load_model(str(folder), compute_dtype=dtype, device="cpu", **kwargs)
    torch.manual_seed(2)
    model = add_adapter(base, lora_config(LoraSettings(r=4), base), new)
    for name, p in model.named_parameters():
        if "lora_B" in name or "trainable_tokens" in name:
            p.data.add_(0.1 * torch.randn_like(p)).copy_(p.data.bfloat16())
    return model.eval()


def row(new):
    """Two documents in which new tokens are read and predicted."""
    generator = torch.Generator().manual_seed(0)
    documents = []
    for length in (23, 17):
        ids = torch.randint(5, 200, (length,), generator=generator)
        ids[3:14:3] = torch.tensor([*new.texts, min(new.texts)])[:4]
        documents.append(Example(ids.tolist(), [-100, -100, *ids[2:].tolist()], "here", False))
    batch = to_device(collate(documents), torch.device("cpu"))
    return batch, int((batch["labels"] != -100).sum())


def pefts(live, folder, new, dtype, row_dtype):
    """peft's own model of the dequantized base in `dtype`, with the adapter of `live`."""
    twin = dequantized_twin(live.get_base_model(), folder, ".base_layer").to(dtype)
    if new.num_rows > twin.config.vocab_size:
        twin.resize_token_embeddings(new.num_rows, mean_resizing=False)
    tied = twin.config.tie_word_embeddings
    indices = list(new.texts)
    rows = indices if tied else {"embed_tokens": indices, "lm_head": indices}
    plain = get_peft_model(twin, LoraConfig(r=4, lora_alpha=32, target_modules=TARGETS, trainable_token_indices=rows))
    values = dict(live.named_parameters())
    learned = [(name, p) for name, p in plain.named_parameters() if p.requires_grad]
    assert {name for name, _ in learned} == {name for name, p in live.named_parameters() if p.requires_grad}
    for name, p in learned:
        p.data = values[name].detach().to(row_dtype)
    return plain.eval()


def loss_and_gradients(model, batch, count, loss):
    model.zero_grad()
    value = loss(model.get_base_model(), batch, count)
    value.backward()
    return value.detach().double(), {n: p.grad.double() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("first", [SIZE, SIZE - 1], ids=["behind", "across"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_and_gradients_are_pefts(dtype, tied, first, paged, tmp_path, monkeypatch):
    """No worse than plain: error against float64 at most twice that of peft in the same dtype, plus some roundings."""
    monkeypatch.setattr(loss_module, "logits_chunk_bytes", lambda device: 1)  # several chunks
    to = getattr(torch, dtype)
    folder, new = make_checkpoint(tmp_path, tie_word_embeddings=tied, dtype=to, vocab_size=SIZE), new_tokens(first)
    budget = {"weights_budget": 1 << 20, "page_folder": tmp_path / "pages"} if paged else {}
    live = adapted(folder, new, dtype, **budget)
    assert len(layers_of(live)) == 2 and vocabulary_of(live.get_base_model()) == new.num_rows
    batch, count = row(new)
    with use_packed_attention(live.get_base_model()):
        loss, grads = loss_and_gradients(live, batch, count, packed_loss)
    same, same_grads = loss_and_gradients(pefts(live, folder, new, to, torch.float32), batch, count, plain_loss)
    exact = pefts(live, folder, new, torch.float64, torch.float64)
    truth, true_grads = loss_and_gradients(exact, batch, count, plain_loss)
    eps = torch.finfo(to).eps
    assert abs(loss - truth) <= 2 * abs(same - truth) + eps * truth
    assert sum("trainable_tokens" in name for name in grads) == (1 if tied else 2)
    for name, true_grad in true_grads.items():
        worst = 2 * (same_grads[name] - true_grad).norm() + 4 * eps * true_grad.norm()
        assert (grads[name] - true_grad).norm() <= worst, name
    plain, plain_grads = loss_and_gradients(live, batch, count, plain_loss)  # the head through autograd
    assert abs(plain - truth) <= 2 * abs(same - truth) + eps * truth
    for name, true_grad in true_grads.items():
        worst = 2 * (same_grads[name] - true_grad).norm() + 4 * eps * true_grad.norm()
        assert (plain_grads[name] - true_grad).norm() <= worst, name


def test_a_row_starts_at_the_mean_of_its_pieces_and_is_used_as_it_is_merged(tmp_path):
    folder, new = make_checkpoint(tmp_path, dtype=torch.bfloat16, vocab_size=SIZE), new_tokens()
    base = onecard.load_model(str(folder), compute_dtype="float32", device="cpu")
    W = base.get_input_embeddings().weight.float()
    model = add_adapter(base, lora_config(LoraSettings(r=4), base), new)
    layer, head = layers_of(model)
    assert head.base_layer is base.get_output_embeddings().token_adapter.base_layer
    for number, (index, pieces) in enumerate(new.pieces.items()):
        mean = W[pieces].mean(0)
        assert torch.equal(layer.trainable_tokens_delta["default"][number], mean)
        assert torch.equal(layer(torch.tensor([index]))[0], mean.bfloat16().float())
        assert not torch.equal(layer(torch.tensor([index]))[0], mean)
    with pytest.raises(IndexError):
        layer(torch.tensor([new.num_rows]))
    assert layer.get_merged_weights(["default"]).shape == (new.num_rows, 64)


def test_disabled_the_reference_has_the_rows_of_the_start(tmp_path):
    model = adapted(make_checkpoint(tmp_path, vocab_size=SIZE), new := new_tokens())
    ids = torch.tensor([[7, *new.texts, 9]])
    layer = layers_of(model)[0]
    with torch.no_grad():
        learned = layer(ids)
        with model.disable_adapter():
            start, logits = layer(ids), model(ids).logits
    assert logits.shape[-1] == new.num_rows and logits.isfinite().all()
    assert torch.equal(start[0, 1:4], layer.trainable_tokens_original["default"])
    assert torch.equal(start[0, 0], learned[0, 0]) and (start[0, 1:4] != learned[0, 1:4]).any()


def save(model, folder, name):
    base = model.get_base_model()
    save_adapter(model, folder / name, origin_of(base, str(base.name_or_path)))
    return str(folder / name)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_plain_peft_and_other_adapters_on_the_same_base(tied, tmp_path):
    """Saved adapters: in peft's own model the same logits; on one base each with its own tokens, the base with none."""
    folder = make_checkpoint(tmp_path / "base", tie_word_embeddings=tied, vocab_size=SIZE)
    found = {}
    for name, count in (("a", 3), ("b", 1), ("c", 0)):
        new = new_tokens(count=count)
        model = adapted(folder, new)
        ids = torch.tensor([[7, *new.texts, 9, 30]])
        found[name] = ids, model(ids).logits, new, save(model, tmp_path, name)
    served = onecard.load_model(str(folder), compute_dtype="float32", device="cpu")
    plain_ids = torch.tensor([[7, 9, 30]])
    alone = served(plain_ids).logits
    for name, (_, _, _, path) in found.items():
        served = with_adapter(served, path, name)
    for name, (ids, logits, new, _) in [*found.items(), *reversed(found.items())]:
        use_adapter(served, name)
        assert torch.equal(served(ids).logits, logits) and logits.shape[-1] == max(new.num_rows, SIZE)
        assert vocabulary_of(served.get_base_model()) == logits.shape[-1] == vocabulary_of(served, [name])
        use_adapter(served, None)
        assert torch.equal(served(plain_ids).logits, alone)
    for ids, logits, new, path in found.values():
        theirs = dequantized_twin(onecard.load_model(str(folder), compute_dtype="float32", device="cpu"), folder)
        theirs.resize_token_embeddings(max(new.num_rows, SIZE), mean_resizing=False)
        theirs = PeftModel.from_pretrained(theirs, path).eval()
        assert (theirs(ids).logits - logits).norm() <= 1e-5 * logits.norm()


def test_a_gap_is_refused_and_nothing_is_changed(tmp_path):
    folder = make_checkpoint(tmp_path, vocab_size=SIZE)
    base = onecard.load_model(str(folder), device="cpu")
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    with pytest.raises(UserError, match="without a gap"):
        add_adapter(base, lora_config(LoraSettings(r=4), base), new_tokens(SIZE + 1))
    with pytest.raises(ValueError):
        add_adapter(base, LoraConfig(target_modules=["none"]), new_tokens())
    assert ends == (base.get_input_embeddings(), base.get_output_embeddings())
    assert not any(isinstance(module, TokenRows) for module in base.modules())


def test_a_tie_that_the_config_does_not_say_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path, tie_word_embeddings=False, vocab_size=SIZE)
    base = onecard.load_model(str(folder), device="cpu")
    base.config.tie_word_embeddings = True
    with pytest.raises(UserError, match="whether the head is the embedding"):
        add_adapter(base, lora_config(LoraSettings(r=4), base), new_tokens())


def test_plain_peft_adapters_with_trained_rows_of_the_model_alone(tmp_path):
    """An adapter that peft has trained, on rows of the embedding alone, in its own order."""
    folder = make_checkpoint(tmp_path / "base", vocab_size=SIZE)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [40, 7, 9]})
    plain = get_peft_model(plain, config)
    layer = plain.get_input_embeddings().token_adapter
    layer.trainable_tokens_delta["default"].data.normal_()
    plain.save_pretrained(tmp_path / "adapter")
    live = with_adapter(
        onecard.load_model(str(folder), device="cpu", compute_dtype="float32"), str(tmp_path / "adapter")
    )
    (ours,) = layers_of(live)
    ids = torch.tensor([[5, 7, 9, 40, 41]])
    assert torch.equal(ours(ids), layer(ids))
    z = live(ids).logits
    assert z.shape[-1] == SIZE


def test_new_rows_of_a_head():
    """The parts of a gradient are those of autograd, for rows that take a place and rows that follow."""
    torch.manual_seed(0)
    x, W, rows = torch.randn(9, 8, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64), torch.randn(3, 8)
    index, low = torch.tensor([20, 4, 21]), torch.tensor([4])
    new = NewRows(rows.double().requires_grad_(), index, low, 2, torch.float64)
    own = (x @ W.T).requires_grad_()
    z = new.extend(own * 1.0, x)
    whole = torch.cat([W, torch.zeros(2, 8, dtype=torch.float64)])
    whole[index] = new.rows_NH.detach()
    assert torch.allclose(z, x @ whole.T, rtol=1e-12)
    g = torch.randn_like(z)
    wanted = torch.autograd.grad(z, (own, new.rows_NH), g)
    g_PV, g_PN = new.split_(g.clone())
    assert torch.equal(g_PV, wanted[0]) and torch.allclose(g_PN.T @ x, wanted[1], rtol=1e-12)
