"""Bound from the maths: a family's calibrated base has the losses that its calibration measured, or it is refused.

The measured losses come from layers that run one at a time. The expected ones are transformers' own model with the
dequantized weights, a document at a time, in float32.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

import onecard
from onecard.config import LoraSettings, QuantConfig
from onecard.data.chat.mask import IGNORE, Example
from onecard.data.dataset import Dataset
from onecard.errors import UserError
from onecard.export.calibrated import rows as module
from onecard.export.calibrated.base import Source, calibrate_base
from onecard.export.calibrated.bill import CALIBRATED, NEAREST, SIXTEEN, STARTED
from tests.export.calibrated.test_base import started
from tests.families.build import class_of, families, make_family
from tests.families.check import dequantized, document_losses, rows

DEFAULT = (
    "aria_text bloom deepseek_v3 doge falcon falcon_h1 gemma3n_text gemma4_text glm4_moe gpt_neox granitemoe "
    "hyperclovax jamba mixtral nemotron opt phimoe qwen3_next rwkv xlnet zamba"
).split()
KINDS = ["sliding_attention", "full_attention"] * 2
SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": KINDS}
QUANT = QuantConfig(compute_dtype="float32")
LORA = LoraSettings(r=4, lora_alpha=12)


def pieces(tokenizer, most):
    """Random documents in place of general text, as the families have no tokenizer."""
    rng = torch.Generator().manual_seed(7)
    sizes = torch.randint(8, 40, (12,), generator=rng).tolist()
    ids = [torch.randint(5, 250, (size,), generator=rng).tolist() for size in sizes]
    return [Example(row, [IGNORE, *row[1:]], "piece") for row in ids]


def move_buffers(folder):
    """Change the float buffers that the checkpoint holds, which new models have at values without an effect."""
    path = folder / "model.safetensors"
    if path.is_file():
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith(("layer_scalar", "e_score_correction_bias")):
                tensors[name] = tensor * 0.6 + 0.01
        save_file(tensors, path, {"format": "pt"})


def calibrated(base, output, monkeypatch):
    """The calibration's losses by form, and its start. The validation rows are the last ones."""
    monkeypatch.setattr(module, "general_pieces", pieces)
    every = rows()
    training, held = (Dataset(part, "text", 64) for part in (every.examples[:4], every.examples[4:]))
    found = calibrate_base(Source(str(base), QUANT, training, held, 100, LORA), output, None, "cpu")
    documents = [(torch.tensor([row.input_ids]), torch.tensor([row.labels])) for row in held.examples]
    return {form: losses.data for form, losses in found.bill.losses.items()}, found.start, documents


@pytest.mark.parametrize(
    "family", [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in families()]
)
def test_a_family_is_calibrated_or_refused(family, tmp_path, monkeypatch):
    try:
        base = make_family(tmp_path / "base", family)
    except UserError as error:
        pytest.skip(str(error))
    move_buffers(base)
    compare(base, tmp_path / "out", monkeypatch)


@pytest.mark.parametrize(
    "family, fields",
    [
        ("gemma4_text", SHARED),
        ("gemma4_text", {**SHARED, "hidden_size_per_layer_input": 16}),
        ("opt", {"word_embed_proj_dim": 32}),
    ],
)
def test_state_between_layers_and_linears_beside_them(family, fields, tmp_path, monkeypatch):
    compare(make_family(tmp_path / "base", family, **fields), tmp_path / "out", monkeypatch)


def compare(base, output, monkeypatch):
    try:
        found, start, documents = calibrated(base, output, monkeypatch)
    except UserError as error:
        print(f"{base}: {error}")
        return
    load = lambda folder: onecard.load_model(str(folder), compute_dtype=torch.float32, device="cpu")  # noqa: E731
    plain = class_of(base).from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    models = {SIXTEEN: plain, NEAREST: dequantized(load(base), base), CALIBRATED: dequantized(load(output), base)}
    models[STARTED] = started(output, start, LORA)
    for form, model in models.items():
        with torch.no_grad():
            expected = float(document_losses(model, documents))
        assert abs(found[form] - expected) <= 1e-4 * max(1.0, abs(expected)), form
