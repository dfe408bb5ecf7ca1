"""The calibrated base: a checkpoint that onecard and bitsandbytes read alike, its losses, its start, its identity.

Exact: files, bits, thread counts, resumed runs. Bound from the maths: measured losses, the start's sum.
No worse than plain: distances to the 16-bit model.
"""

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config

import onecard
from onecard.config import DataConfig, LoraSettings, QuantConfig, QuantizeConfig, TrainConfig
from onecard.data.load import load_dataset
from onecard.errors import UserError
from onecard.export.calibrated import base as module
from onecard.export.calibrated import room
from onecard.export.calibrated.base import Source, calibrate_base, quantize_calibrated
from onecard.export.calibrated.bill import CALIBRATED, NEAREST, SIXTEEN, STARTED, read_bill
from onecard.export.calibrated.layers import Workers
from onecard.export.calibrated.rows import choose_rows, general_pieces
from onecard.export.merge.merged import merge, read_4bit
from onecard.export.merge.quantized import quantize_checkpoint
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.load import load_tokenizer
from onecard.kernels import ops
from onecard.train.evaluate import evaluate
from tests.conftest import EXPERT_FAMILIES, FAMILIES, chat_rows, make_checkpoint, write_rows

LENGTH = 128
QUANT = QuantConfig(compute_dtype="float32")
GPT2 = partial(GPT2Config, n_embd=64, n_inner=96, n_layer=2, n_head=4, n_positions=256)
WHOLE = {"intermediate_size": 128}  # rows of whole blocks: bitsandbytes 0.50.2 on a CPU begins a block with each row
EVERY = [*FAMILIES, *EXPERT_FAMILIES, "gemma3", "gpt2"]


@pytest.fixture(autouse=True)
def more_families(monkeypatch):
    monkeypatch.setitem(FAMILIES, "gemma3", Gemma3TextConfig)
    monkeypatch.setitem(FAMILIES, "gpt2", GPT2)


def rows_of(base, chats):
    return load_dataset(str(chats), load_tokenizer(str(base)), DataConfig(max_seq_length=LENGTH))


def calibrated(base, chats, output, lora=None, quant=QUANT, num_tokens=None):
    training, validation = rows_of(base, chats).split(0.25, 0)
    tokenizer = load_tokenizer(str(base))
    source = Source(str(base), quant, training, validation, num_tokens, lora)
    return calibrate_base(source, output, tokenizer, "cpu"), validation


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@torch.no_grad()
def distance(model, folder, rows):
    """Of the logits of a 4-bit folder's model from another's."""
    other = onecard.load_model(str(folder), compute_dtype=torch.float32, device="cpu")
    each = [torch.tensor([example.input_ids]) for example in rows.examples[:12]]
    return sum((model(ids).logits - other(ids).logits).square().sum().item() for ids in each) ** 0.5


@pytest.mark.parametrize("family", EVERY)
def test_families_are_nearer_to_16_bits(tmp_path, chats, family):
    """On held-out rows; and every tensor that is not a 4-bit weight is the one of `onecard quantize`."""
    base = make_checkpoint(tmp_path / "base", family)
    found, validation = calibrated(base, chats, tmp_path / "out")
    quantize_checkpoint(str(base), str(tmp_path / "plain"), QUANT)
    ours, plain = tensors(tmp_path / "out"), tensors(tmp_path / "plain")
    assert {name: (t.shape, t.dtype) for name, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in plain.items()}
    packed = {name.removesuffix(".absmax") for name in plain if name.endswith(".absmax")}
    changed = {name for name in plain if not torch.equal(ours[name], plain[name])}
    assert packed <= changed and all(any(name.startswith(weight) for weight in packed) for name in changed)
    assert found.bill.nearest == [] and found.start == {}
    plain_files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*plain_files, "calibration.json"])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ratio = distance(model, tmp_path / "out", validation) / distance(model, tmp_path / "plain", validation)
    print(f"{family}: {ratio:.3f} of the nearest codes' distance")
    assert ratio < 1


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt_oss", "gpt2"])
def test_the_measured_losses_are_those_of_the_models(tmp_path, chats, family):
    """Each form's loss on the validation rows equals the loss of the whole loaded model, computed another way."""
    base = make_checkpoint(tmp_path / "base", family)
    lora = LoraSettings(r=4, lora_alpha=12)
    found, validation = calibrated(base, chats, tmp_path / "out", lora)
    losses = {form: loss.data for form, loss in found.bill.losses.items()}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    exact = plain_mean(model, validation)
    load = partial(onecard.load_model, compute_dtype=torch.float32, device="cpu")
    expected = {
        SIXTEEN: exact,
        NEAREST: evaluate(load(str(base)), validation),
        CALIBRATED: evaluate(load(str(tmp_path / "out")), validation),
        STARTED: evaluate(started(tmp_path / "out", found.start, lora), validation),
    }
    assert losses.keys() == expected.keys()
    for form, loss in expected.items():
        assert losses[form] == pytest.approx(loss, abs=2e-5), form  # float32 sums in another order
    assert len(set(losses.values())) == 4


@torch.no_grad()
def plain_mean(model, rows):
    total = count = 0
    for example in rows.examples:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        kept = labels[0, 1:] != -100
        logits = model(ids).logits[0, :-1][kept]
        total += torch.nn.functional.cross_entropy(logits, labels[0, 1:][kept], reduction="sum").item()
        count += int(kept.sum())
    return total / count


def started(folder, start, lora):
    """The base with LoRA at its start, as a run has it."""
    from peft import get_peft_model

    from onecard.adapter.layers import lora_config
    from onecard.adapter.start import set_start

    model = onecard.load_model(str(folder), compute_dtype=torch.float32, device="cpu")
    tuned = get_peft_model(model, lora_config(lora, model))
    set_start(tuned, start)
    return tuned.eval()


@pytest.mark.parametrize("quant_type, nested", [("nf4", True), ("nf4", False), ("fp4", True)])
def test_bitsandbytes_reads_the_same_bits(tmp_path, chats, quant_type, nested):
    bnb = pytest.importorskip("bitsandbytes.functional")
    base = make_checkpoint(tmp_path / "base", dtype=torch.bfloat16, **WHOLE)
    how = QuantConfig(quant_type=quant_type, double_quant=nested)
    calibrated(base, chats, tmp_path / "out", quant=how)
    checkpoint = inspect_checkpoint(tmp_path / "out")
    names = [name for name in checkpoint.tensors if f"{name}.absmax" in checkpoint.tensors]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert len(names) == 14
    for name in names:
        parts = {key.removeprefix(f"{name}."): t for key, t in stored.items() if key.startswith(f"{name}.")}
        state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
        theirs = bnb.dequantize_4bit(stored[name], state)
        assert torch.equal(theirs, ops.dequantize_4bit(*read_4bit(checkpoint, name))), name


def test_transformers_with_bitsandbytes_gives_the_same_loss(tmp_path, chats):
    pytest.importorskip("bitsandbytes")
    base = make_checkpoint(tmp_path / "base", **WHOLE)
    _, validation = calibrated(base, chats, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map="cpu")
    assert type(theirs.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    theirs.train()  # in evaluation mode bitsandbytes repacks its weights on CPUs
    ours = onecard.load_model(str(tmp_path / "out"), compute_dtype=torch.float32, device="cpu")
    assert plain_mean(theirs, validation) == pytest.approx(evaluate(ours, validation), abs=2e-5)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_thread_count_changes_no_bit(tmp_path, chats, family, dtype):
    base = make_checkpoint(tmp_path / "base", family, dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            output = tmp_path / f"with_{threads}"
            result, _ = calibrated(base, chats, output, LoraSettings(r=2))
            found.append(({**tensors(output), **load_file(output / module.START)}, result.bill.losses))
            assert torch.get_num_threads() == threads and Workers(torch.device("cpu")).count == threads
    finally:
        torch.set_num_threads(before)
    for other, losses in found[1:]:
        assert losses == found[0][1]
        assert other.keys() == found[0][0].keys()
        assert all(torch.equal(tensor, found[0][0][name]) for name, tensor in other.items())


def test_experts_without_tokens_are_named(tmp_path, chats):
    """Of 32 experts the rows reach only some. The others are valid and nearest to their weights."""
    base = make_checkpoint(tmp_path / "base", "qwen3_moe", num_experts=32, num_experts_per_tok=1)
    found, _ = calibrated(base, chats, tmp_path / "out", num_tokens=1)
    assert all("mlp.experts: experts " in line for line in found.bill.nearest) and found.bill.nearest
    assert "with the nearest codes" in found.bill.facts()
    onecard.load_model(str(tmp_path / "out"), device="cpu")


def test_measured_rows_are_not_calibration_rows(tmp_path, chats):
    base = make_checkpoint(tmp_path / "base")
    dataset, tokenizer = rows_of(base, chats), load_tokenizer(str(base))
    for validation in (None, dataset.take([0, 1, 2])):
        training = dataset if validation is None else dataset.take(list(range(3, 24)))
        rows = choose_rows(training, validation, tokenizer, True, 10**6)
        seen = [documents(batches) for batches in (rows.calibration, rows.data, rows.general)]
        assert seen[0].isdisjoint(seen[1]) and seen[0].isdisjoint(seen[2])
        texts = {tuple(example.input_ids) for example in dataset.examples}
        assert seen[1] <= texts and len(seen[0] & texts) + len(seen[1]) == len(texts)
        assert len(seen[0] - texts) >= 2, "a part of the calibration is general text"
    rows = choose_rows(dataset.take([5]), None, tokenizer, True, 100)
    assert rows.measured_on == "the row of the calibration" and documents(rows.data) <= documents(rows.calibration)


def documents(batches):
    found = set()
    for batch in batches:
        ends = batch["cu_seqlens"]
        found |= {tuple(batch["input_ids"][0, a:b].tolist()) for a, b in zip(ends, ends[1:])}
    return found


def test_general_text_has_no_control_tokens(tmp_path):
    tokenizer = load_tokenizer(str(make_checkpoint(tmp_path / "base")))
    pieces = general_pieces(tokenizer, 64)
    assert len(pieces) > 50 and all(2 <= len(piece.input_ids) <= 64 for piece in pieces)


# A run


def fields(base, chats, output, **more):
    given = {
        "model": str(base),
        "data": str(chats),
        "output": str(output),
        "calibrate": True,
        "compute_dtype": "float32",
    }
    sizes = {"max_steps": 2, "gradient_accumulation_steps": 1, "max_seq_length": LENGTH, "r": 4, "lora_alpha": 12}
    return TrainConfig(**{**given, **sizes, "device": "cpu", "sample_prompts": [], "validation_split": 0.2, **more})


def test_a_run_trains_on_its_calibrated_base(tmp_path, chats):
    """loss_before is the measured one; the adapter names the base; merge, and plain peft over bitsandbytes, compute the
    same; the 16-bit checkpoint is refused for the adapter."""
    pytest.importorskip("bitsandbytes")
    base = make_checkpoint(tmp_path / "base", **WHOLE)
    result = onecard.train(fields(base, chats, tmp_path / "run", init_lora_weights="loftq"))
    folder = tmp_path / "run" / "base"
    bill = read_bill(folder)
    assert result.loss_before == pytest.approx(bill.losses[STARTED].data, abs=2e-5)
    assert bill.measured_on == "validation rows"
    assert f"{bill.losses[SIXTEEN].data:.4f}" in result.report.facts[f"base in {SIXTEEN}"]
    assert "base in calibrated" in (tmp_path / "run" / "report.md").read_text()
    assert f"--model {folder}" in result.report.next_commands[0]
    origin = json.loads((result.adapter / "onecard.json").read_text())
    config = json.loads((result.adapter / "adapter_config.json").read_text())
    assert origin["model"] == str(folder) and config["base_model_name_or_path"] == str(folder)
    assert config["init_lora_weights"] is True
    merged = merge(str(folder), str(result.adapter), str(tmp_path / "merged"))
    live = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        expected = result.model(ids).logits
        assert (live(ids).logits - expected).norm() <= 1e-5 * expected.norm()
        plain = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu"), result.adapter
        )
        assert (plain.train()(ids).logits - expected).norm() <= 1e-5 * expected.norm(), "plain peft over bitsandbytes"
    assert not (merged / "calibration.json").exists(), "it describes another model"
    with pytest.raises(UserError, match="must be the one that the adapter was trained on"):
        merge(str(base), str(result.adapter), str(tmp_path / "wrong"))


def test_a_base_that_computes_something_else_is_refused(tmp_path, chats, monkeypatch):
    """A wrong weight of the last layer is written, behind the measurement: the run's own check sees it."""
    base = make_checkpoint(tmp_path / "base")
    add = module.Writer4bit.add

    def wrong(self, name, packed, state):
        add(self, name, packed.flip(0) if name == "model.layers.1.mlp.down_proj.weight" else packed, state)

    monkeypatch.setattr(module.Writer4bit, "add", wrong)
    with pytest.raises(UserError, match="must compute what its calibration measured"):
        onecard.train(fields(base, chats, tmp_path / "run"))


@pytest.mark.parametrize(
    "settings",
    [{"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}, {"r": 200}, {"weights_budget": "1MiB"}],
)
def test_the_start_fits_every_kind_of_lora(tmp_path, chats, settings):
    """The scale of rslora, some targets, a rank above every width, a paged base."""
    base = make_checkpoint(tmp_path / "base")
    config = fields(base, chats, tmp_path / "run", init_lora_weights="loftq", max_steps=1, **settings)
    result = onecard.train(config)
    bill = read_bill(tmp_path / "run" / "base")
    assert result.loss_before == pytest.approx(bill.losses[STARTED].data, abs=2e-5)
    if settings.get("r") == 200:
        assert bill.losses[STARTED].data == pytest.approx(bill.losses[SIXTEEN].data, abs=1e-3)


def test_a_resumed_run_has_the_same_base_and_bits(tmp_path, chats):
    base = make_checkpoint(tmp_path / "base")
    whole = onecard.train(fields(base, chats, tmp_path / "whole", max_steps=4, init_lora_weights="loftq"))
    onecard.train(fields(base, chats, tmp_path / "run", max_steps=4, init_lora_weights="loftq", save_steps=2))
    for step in (3, 4):
        newest = tmp_path / "run" / "checkpoints" / f"checkpoint-{step}"
        subprocess.run(["rm", "-rf", str(newest)], check=True)
    before = (tmp_path / "run" / "base" / "model.safetensors").stat().st_mtime_ns
    config = fields(base, chats, tmp_path / "run", max_steps=4, init_lora_weights="loftq", save_steps=2)
    again = onecard.train(config, resume=True)
    assert (tmp_path / "run" / "base" / "model.safetensors").stat().st_mtime_ns == before
    one, other = (load_file(r.adapter / "adapter_model.safetensors") for r in (whole, again))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_base_of_other_rows_or_settings_is_refused(tmp_path, chats):
    base = make_checkpoint(tmp_path / "base")
    onecard.train(fields(base, chats, tmp_path / "run", max_steps=1))
    subprocess.run(["rm", "-rf", str(tmp_path / "run" / "checkpoints")], check=True)
    other = write_rows(tmp_path / "other.jsonl", chat_rows(30))
    with pytest.raises(UserError, match=r"the base that it calibrated[^\0]*other rows"):
        onecard.train(fields(base, other, tmp_path / "run", max_steps=1), resume=True)
    with pytest.raises(UserError, match=r"the base that it calibrated[^\0]*double_quant True, now False"):
        onecard.train(fields(base, chats, tmp_path / "run", max_steps=1, double_quant=False), resume=True)
    with pytest.raises(UserError, match="calibrate is off"):
        onecard.train(fields(base, chats, tmp_path / "run", max_steps=1, calibrate=False), resume=True)
    with pytest.raises(UserError, match="init_lora_weights none, now loftq"):
        onecard.train(fields(base, chats, tmp_path / "run", max_steps=1, init_lora_weights="loftq"), resume=True)
    onecard.train(fields(base, chats, tmp_path / "run", max_steps=1), resume=True)


def test_a_killed_calibration_leaves_nothing_and_begins_again(tmp_path, chats):
    """kill -9 in the second layer. The next run removes the temporary folder and makes the base anew."""
    base = make_checkpoint(tmp_path / "base", num_hidden_layers=3)
    code = (
        "import sys, time; from onecard.export.calibrated.calibrator import Calibrator; import onecard;"
        "from tests.export.calibrated.test_base import fields; whole = Calibrator.quantize;"
        "Calibrator.quantize = lambda self, layer, *rest: (whole(self, layer, *rest),"
        " print('layer', flush=True), time.sleep(60 if layer.index else 0));"
        f"onecard.train(fields({str(base)!r}, {str(chats)!r}, {str(tmp_path / 'run')!r}))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert child.stdout is not None
    assert [child.stdout.readline() for _ in range(2)] == ["layer\n"] * 2
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "run" / "base").exists()
    assert list((tmp_path / "run").glob(".base.*.tmp"))
    result = onecard.train(fields(base, chats, tmp_path / "run"), resume=True)
    assert result.adapter.is_dir() and not list((tmp_path / "run").glob(".base.*.tmp"))


def test_a_plain_quantization_is_calibrated_from_the_command_line(tmp_path, chats):
    base = make_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    command = [sys.executable, "-m", "onecard.cli", "quantize", str(base), str(tmp_path / "out")]
    bad = tmp_path / "rows.jsonl"
    bad.write_text(chats.read_text() + "{}\n")
    flags = ["--calibrate", "--data", str(bad), "--max-seq-length", "128", "--device", "cpu", "--on-bad-rows", "skip"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "base in calibrated: " in done.stdout and "rows held out of the calibration" in done.stdout
    bill = read_bill(tmp_path / "out")
    assert bill.losses[CALIBRATED].data == pytest.approx(bill.losses[SIXTEEN].data, abs=0.5)
    drawn = subprocess.run(
        [*command[:3], "figures", "--output", str(tmp_path / "figures"), "--model", str(tmp_path / "out")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert drawn.returncode == 0 and set(bill.lines()) <= set(drawn.stdout.splitlines()), drawn.stderr
    assert (tmp_path / "figures" / "bill.png").stat().st_size > 10_000
    (tmp_path / "out" / "calibration.json").unlink()
    refused = subprocess.run(drawn.args, capture_output=True, text=True)
    assert refused.returncode == 2 and "a checkpoint in 4 bits" in refused.stderr, "codes are no weights"


@pytest.mark.parametrize(
    "kind, settings, must",
    [
        (QuantizeConfig, {"calibrate": True}, "calibrate needs data"),
        (QuantizeConfig, {"data": "rows.jsonl"}, "calibrate needs data"),
        (QuantizeConfig, {"calibrate": True, "data": "rows.jsonl", "quant_type": "int4"}, "not int4"),
        (TrainConfig, {"init_lora_weights": "loftq", "loss": "dpo"}, "would not start at its reference"),
        (TrainConfig, {"init_lora_weights": "loftq", "calibrate": True, "use_dora": True}, "no use_dora"),
        (TrainConfig, {"calibrate": True, "quant_type": "int4"}, "not int4"),
    ],
)
def test_settings_that_contradict_each_other(kind, settings, must):
    more = {"model": "m", "data": "d", "output": "o"} if kind is TrainConfig else {}
    with pytest.raises(UserError, match=must):
        kind(**{**more, **settings})


def test_a_4_bit_model_is_refused(tmp_path, chats):
    base = make_checkpoint(tmp_path / "base")
    quantize_checkpoint(str(base), str(tmp_path / "small"), QUANT)
    with pytest.raises(UserError, match="must be in 16 or 32 bits"):
        onecard.train(fields(tmp_path / "small", chats, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_weight_that_is_not_finite_is_named(tmp_path, chats):
    base = make_checkpoint(tmp_path / "base", **WHOLE)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.model.layers[1].mlp.up_proj.weight.data[100, 5] = torch.nan
    model.save_pretrained(base)
    with pytest.raises(UserError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: every parameter must be finite"):
        calibrated(base, chats, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_calibration_that_does_not_fit_is_refused(tmp_path, chats, monkeypatch):
    base = make_checkpoint(tmp_path / "base")
    monkeypatch.setattr(room, "available_bytes", lambda device: 1 << 20)
    with pytest.raises(UserError, match="a calibration must fit in memory"):
        calibrated(base, chats, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_gpu_calibrates_as_well_as_a_cpu(tmp_path, chats, family):
    """Other sums give other codes here and there. The losses are those of the CPU's base, to a tenth of the gap."""
    base = make_checkpoint(tmp_path / "base", family)
    training, validation = rows_of(base, chats).split(0.25, 0)
    losses = []
    for device in ("cpu", "cuda"):
        source = Source(str(base), QUANT, training, validation, None, LoraSettings(r=2))
        found = calibrate_base(source, tmp_path / device, load_tokenizer(str(base)), device)
        losses.append({form: loss.data for form, loss in found.bill.losses.items()})
    gap = abs(losses[0][NEAREST] - losses[0][SIXTEEN])
    for form in losses[0]:
        assert abs(losses[0][form] - losses[1][form]) <= max(0.1 * gap, 1e-3), form
    onecard.load_model(str(tmp_path / "cuda"), device="cuda")


def test_an_existing_output_is_refused(tmp_path, chats):
    base = make_checkpoint(tmp_path / "base")
    (tmp_path / "out").mkdir()
    config = QuantizeConfig(calibrate=True, data=str(chats))
    with pytest.raises(UserError, match="the output must be new"):
        quantize_calibrated(str(base), str(tmp_path / "out"), config, rows_of(base, chats), None)


@pytest.mark.parametrize(
    "damage",
    [
        lambda base: (base / "calibration.json").write_text("{}"),
        lambda base: (base / "calibration.json").unlink(),
        lambda base: (base / module.START).unlink(),
        lambda base: (base / module.START).write_bytes(b"short"),
        lambda base: flip(base / "model.safetensors"),
    ],
)
def test_a_damaged_base_is_refused(tmp_path, chats, damage):
    """In a resumed run, also before its first checkpoint."""
    base = make_checkpoint(tmp_path / "base")
    config = fields(base, chats, tmp_path / "run", max_steps=1, init_lora_weights="loftq")
    onecard.train(config)
    subprocess.run(["rm", "-rf", str(tmp_path / "run" / "checkpoints")], check=True)
    damage(tmp_path / "run" / "base")
    with pytest.raises(UserError, match=r"calibration\.json|as the run wrote them"):
        onecard.train(config, resume=True)


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
