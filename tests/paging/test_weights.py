"""Exact: a paged base computes the same bits as a resident one, whatever the budget."""

import json
import os
from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

import onecard
from onecard.adapter.layers import lora_config
from onecard.config import LoraSettings, QuantConfig
from onecard.errors import UserError
from onecard.export.merge.quantized import quantize_checkpoint
from onecard.hf.fingerprint import fingerprint
from onecard.kernels.cpu import allocator
from onecard.memory.inputs import MemoryStrategy
from onecard.nn.linear import Linear4bit
from onecard.paging.files import Segment, read_page
from onecard.paging.pager import Page, Pager
from onecard.train.recompute import recompute_layers
from tests.conftest import FAMILIES, make_checkpoint

IDS = torch.randint(5, 200, (1, 24), generator=torch.Generator().manual_seed(0))
DEEP = {"num_hidden_layers": 6, "hidden_size": 128, "intermediate_size": 192}


def least_budget(folder, tmp_path):
    """Bytes of the two largest pages."""
    model = onecard.load_model(str(folder), device="cpu", weights_budget=1 << 40, page_folder=tmp_path / "p")
    return sum(sorted((page.num_bytes for page in model.pager.pages), reverse=True)[:2])


def losses_and_gradients(model, recompute, rounds=2, **settings):
    """Two forward and backward passes with an adapter."""
    torch.manual_seed(1)
    model = get_peft_model(model, lora_config(LoraSettings(r=4, **settings), model))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.train()
    base = model.get_base_model()
    if recompute:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    found = []
    for _ in range(rounds):
        pager = getattr(base, "pager", None)
        if pager is None:
            loss = base(IDS, labels=IDS).loss
        else:
            with pager.saved_as_pages():
                loss = base(IDS, labels=IDS).loss
        loss.backward()
        found.append(loss.detach())
    return found, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", [*FAMILIES])
@pytest.mark.parametrize("recompute", [False, True])
def test_losses_and_gradients_are_those_of_the_resident_base(family, recompute, tmp_path):
    folder = make_checkpoint(tmp_path / "m", family, dtype=torch.bfloat16, **DEEP)
    budget = least_budget(folder, tmp_path)
    resident = onecard.load_model(str(folder), device="cpu")
    paged = onecard.load_model(str(folder), device="cpu", weights_budget=budget, page_folder=tmp_path / "p")
    assert paged.pager.budget_bytes < sum(page.num_bytes for page in paged.pager.pages)
    assert fingerprint(paged) == fingerprint(resident)
    expected, found = losses_and_gradients(resident, recompute), losses_and_gradients(paged, recompute)
    assert all(torch.equal(a, b) for a, b in zip(expected[0], found[0]))
    assert expected[1].keys() == found[1].keys()
    assert all(torch.equal(expected[1][name], found[1][name]) for name in expected[1])
    assert not os.listdir(tmp_path / "p"), "the file without a name must leave nothing behind"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_4bit_checkpoint_is_paged_from_its_own_files(tied, double_quant, tmp_path):
    source = make_checkpoint(tmp_path / "m", dtype=torch.bfloat16, tie_word_embeddings=tied, **DEEP)
    quant = QuantConfig(double_quant=double_quant)
    folder = quantize_checkpoint(str(source), str(tmp_path / "q"), quant)
    resident = onecard.load_model(str(source), double_quant=double_quant, device="cpu")
    loaded = onecard.load_model(str(folder), device="cpu")
    assert fingerprint(loaded) == fingerprint(resident)
    budget = least_budget(folder, tmp_path)
    paged = onecard.load_model(str(folder), device="cpu", weights_budget=budget, page_folder=tmp_path / "p")
    assert paged.paged_base.spill is None
    assert fingerprint(paged) == fingerprint(resident)
    expected, found = losses_and_gradients(resident, True), losses_and_gradients(paged, True)
    assert all(torch.equal(a, b) for a, b in zip(expected[0], found[0]))
    assert all(torch.equal(expected[1][name], found[1][name]) for name in expected[1])


def test_generation_reads_each_page_once_a_token_and_ahead(tmp_path):
    folder = make_checkpoint(tmp_path / "m", dtype=torch.bfloat16, **DEEP)
    model = onecard.load_model(
        str(folder), device="cpu", weights_budget=least_budget(folder, tmp_path), page_folder=tmp_path / "p"
    )
    resident = onecard.load_model(str(folder), device="cpu")
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **settings), resident.generate(IDS, **settings))
    counted = model.pager.take_statistics()
    assert counted.touches >= 8 * 6
    assert counted.bytes_in <= counted.touches * max(page.num_bytes for page in model.pager.pages)


def test_a_budget_that_cannot_hold_two_pages_is_an_error(tmp_path):
    folder = make_checkpoint(tmp_path / "m", dtype=torch.bfloat16)
    with pytest.raises(UserError, match="two largest pages"):
        onecard.load_model(str(folder), device="cpu", weights_budget=1000, page_folder=tmp_path / "p")


def test_what_quantize_writes_is_what_bitsandbytes_reads(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    source = make_checkpoint(tmp_path / "m", dtype=torch.bfloat16, **DEEP)
    for number, quant in enumerate([QuantConfig(), QuantConfig(quant_type="fp4", double_quant=False)]):
        folder = quantize_checkpoint(str(source), str(tmp_path / f"q{number}"), quant)
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        ours = onecard.load_model(str(folder), device="cpu")
        compared = 0
        for name, module in ours.named_modules():
            if isinstance(module, Linear4bit):
                weight = theirs.get_submodule(name).weight
                W = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
                assert torch.equal(W, module.dequantize().to(W.dtype)), name
                compared += 1
        assert compared == 42


@pytest.mark.parametrize("quant", [QuantConfig(), QuantConfig(quant_type="fp4", double_quant=False)])
def test_what_bitsandbytes_saves_is_loaded_with_its_own_bits(quant, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    source = make_checkpoint(tmp_path / "m", dtype=torch.bfloat16, **DEEP)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant.quant_type, bnb_4bit_use_double_quant=quant.double_quant
    )
    theirs = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "b", max_shard_size="200KB")
    ours = onecard.load_model(str(tmp_path / "b"), device="cpu")
    paged = onecard.load_model(str(tmp_path / "b"), device="cpu", weights_budget=1 << 30, page_folder=tmp_path / "p")
    assert fingerprint(paged) == fingerprint(ours)
    assert paged.paged_base.spill is None
    for name, module in ours.named_modules():
        if isinstance(module, Linear4bit):
            weight = theirs.get_submodule(name).weight
            W = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(W, module.dequantize().to(W.dtype)), name


def damage_map(tensors):
    key = next(k for k in tensors if k.endswith(".quant_map"))
    tensors[key] = tensors[key] + 1


def damage_state(tensors):
    key = next(k for k in tensors if "quant_state" in k)
    tensors[key] = torch.frombuffer(bytearray(b'{"quant_type": "nf4"}'), dtype=torch.uint8).clone()


def damage_scales(tensors):
    key = next(k for k in tensors if k.endswith(".nested_absmax"))
    tensors[key] = tensors[key] * float("nan")


def damage_shape(tensors):
    key = next(k for k in tensors if "quant_state" in k)
    facts = json.loads(bytes(tensors[key].tolist()))
    facts["shape"] = facts["shape"][::-1] if facts["shape"][0] != facts["shape"][1] else [1, 2]
    tensors[key] = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8).clone()


@pytest.mark.parametrize("damage", [damage_map, damage_state, damage_scales, damage_shape])
def test_damaged_4bit_checkpoints_are_errors(damage, tmp_path):
    from safetensors.torch import save_file

    folder = quantize_checkpoint(str(make_checkpoint(tmp_path / "m")), str(tmp_path / "q"), QuantConfig())
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"a 4-bit weight must have|must have shape|blocksize: Field required"):
        onecard.load_model(str(folder), device="cpu")


class TestPager:
    """The order of a pass decides what is read ahead and what is let go."""

    def make(self, count, budget):
        reads = []

        def page(number):
            def read():
                reads.append(number)
                return torch.full((100,), number, dtype=torch.uint8)

            return Page(str(number), 100, read)

        pages = [page(number) for number in range(count)]
        return Pager(torch.device("cpu"), budget, pages), pages, reads

    def one_pass(self, pager, pages):
        pager.begin_pass()
        for page in [*pages, *reversed(pages)]:
            assert pager.touch(page)[0] == int(page.name)
            assert pager.held_bytes <= pager.budget_bytes

    def test_reads_are_the_fewest_there_can_be(self):
        pager, pages, reads = self.make(10, 400)
        for _ in range(3):
            self.one_pass(pager, pages)
        del reads[:]
        rounds = 5
        for _ in range(rounds):
            self.one_pass(pager, pages)
        # 10 forward, 10 back; at each turn the last 4 are still there: 2 (10 - 4) reads a pass, and no rule has fewer.
        # One of the four may be on its way out for one on its way in, so up to one read a turn more.
        assert 2 * 6 * rounds <= len(reads) <= 2 * 7 * rounds + 4

    def test_after_the_first_pass_nothing_is_waited_for_unprepared(self):
        pager, pages, _ = self.make(10, 400)
        for _ in range(2):
            self.one_pass(pager, pages)
        pager.take_statistics()
        self.one_pass(pager, pages)
        counted = pager.take_statistics()
        assert counted.hits == counted.touches

    def test_a_pass_of_another_order_is_right_if_slower(self):
        pager, pages, _ = self.make(10, 300)
        self.one_pass(pager, pages)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            pager.begin_pass()
            for number in torch.randint(0, 10, (15,), generator=generator).tolist():
                assert pager.touch(pages[number])[0] == number
                assert pager.held_bytes <= 300

    def test_with_room_for_all_nothing_is_read_twice(self):
        pager, pages, reads = self.make(10, 1000)
        for _ in range(3):
            self.one_pass(pager, pages)
        assert sorted(reads) == list(range(10))

    def test_autograd_holds_no_page(self):
        pager, pages, reads = self.make(4, 200)
        x = torch.ones(100, requires_grad=True)
        total = torch.zeros(())
        with pager.saved_as_pages():
            for page in pages:
                total = total + (x * pager.touch(page).float()).sum() + (x * pager.touch(page)[:100]).sum()
        before = len(reads)
        total.backward()
        assert x.grad is not None and torch.equal(x.grad, torch.full((100,), 2.0 * (0 + 1 + 2 + 3)))
        assert len(reads) > before, "the backward must have brought pages in again"

    def test_a_read_that_fails_is_told_where_it_is_used_and_can_be_tried_again(self):
        pager, pages, _ = self.make(6, 300)
        for _ in range(2):
            self.one_pass(pager, pages)
        pages[3].read, real = (lambda: (_ for _ in ()).throw(UserError("a", "b", "c"))), pages[3].read
        pager.release()
        pager.begin_pass()
        with pytest.raises(UserError):
            for page in pages:
                pager.touch(page)
        assert pager.held_bytes <= pager.budget_bytes
        pages[3].read = real
        for _ in range(2):
            self.one_pass(pager, pages)

    def test_two_models_share_nothing(self):
        first, pages_a, _ = self.make(6, 300)
        second, pages_b, _ = self.make(4, 200)
        for _ in range(3):
            first.begin_pass()
            second.begin_pass()
            for a, b in zip([*pages_a, *reversed(pages_a)], [*pages_b, *reversed(pages_b), *pages_b]):
                assert first.touch(a)[0] == int(a.name) and second.touch(b)[0] == int(b.name)
            assert first.held_bytes <= 300 and second.held_bytes <= 200

    def test_the_first_pass_already_reads_ahead(self):
        pager, pages, _ = self.make(10, 400)
        self.one_pass(pager, pages)
        counted = pager.take_statistics()
        assert counted.hits >= counted.touches - 1

    def test_pages_come_into_the_memory_of_those_let_go(self, tmp_path):
        size = allocator.SMALLEST
        (tmp_path / "f").write_bytes(bytes(size))
        with (tmp_path / "f").open("rb") as file:
            segments = [Segment(file.fileno(), 0, size)]
            pages = [Page(str(n), size, lambda: read_page(segments)) for n in range(6)]
            larger = Page("head", 2 * size, lambda: read_page(2 * segments))
            pager = Pager(torch.device("cpu"), 3 * size, [*pages, larger])
            for _ in range(3):
                pager.begin_pass()
                places = {pager.touch(page).data_ptr() for page in [*pages, *reversed(pages)]}
            assert len(places) <= 4, "three in the budget, and the one in use when another one is read"
            pager.touch(larger)
            assert not any(allocator._free.values()), "the others' memory waits beside it"
            pager.release()
            assert not any(allocator._free.values())


def test_training_and_generating_in_turn(tmp_path):
    """Passes of several kinds, some without a backward, through one pager: the resident model's bits each time."""
    folder = make_checkpoint(tmp_path / "m", dtype=torch.bfloat16, **DEEP)
    budget = least_budget(folder, tmp_path)
    found = []
    for more in ({}, {"weights_budget": budget, "page_folder": tmp_path / "p"}):
        base, results = onecard.load_model(str(folder), device="cpu", **more), []
        torch.manual_seed(1)
        model = get_peft_model(base, lora_config(LoraSettings(r=4)))
        for recompute in (False, True, False):
            results.append(model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, pad_token_id=0))
            model.train()
            recompute_layers(base, MemoryStrategy(6 if recompute else 0))
            with base.pager.saved_as_pages() if more else nullcontext():
                loss = base(IDS, labels=IDS).loss
            loss.backward()
            results += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            model.eval()
            with torch.no_grad():
                results.append(model(input_ids=IDS).logits)
        found.append(results)
        assert not more or base.pager.held_bytes <= budget
    assert len(found[0]) == len(found[1]) and all(torch.equal(a, b) for a, b in zip(*found))
