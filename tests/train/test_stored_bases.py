"""Exact: a run on a base in few bits that is converted ends in the bytes of a run on the 16-bit checkpoint that it
means. A base that stays packed trains the same resident, paged and resumed. Its plan counts the bytes that it has.

GGUF files and MXFP4 have runs of their own (tests/hf/test_gguf_base.py, test_load_mxfp4.py).
"""

import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from onecard.adapter.load import with_adapter
from onecard.adapter.origin import read_origin, write_origin
from onecard.adapter.start import check_loftq
from onecard.config import CalibrationConfig, LoraSettings, QuantConfig, TrainConfig
from onecard.data.dataset import Dataset
from onecard.errors import UserError
from onecard.export.calibrated.base import Source
from onecard.export.calibrated.writer import export_folder
from onecard.export.merge.merged import merge
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.fingerprint import fingerprint
from onecard.hf.load import load_model
from onecard.hf.skeleton import read_model
from onecard.hf.stored import read_tensor
from onecard.memory.inputs import PlanInputs
from onecard.memory.plan import plan
from onecard.nn.experts import weights_of
from tests.conftest import make_checkpoint
from tests.hf.test_fp8 import make_fp8
from tests.hf.test_int4_base import make_int4
from tests.hf.test_nvfp4_base import make_nvfp4
from tests.paging.test_weights import least_budget
from tests.train.test_loop import adapter_bytes, copy_at, fields, run


def make_mlx(folder):
    """Our own MLX folder, and the checkpoint of the values that are read from it."""
    base, twin = make_checkpoint(folder / "base", intermediate_size=128), folder / "twin"
    model = export_folder("mlx", str(base), None, None, str(folder / "mlx"), CalibrationConfig()).folder
    shutil.copytree(base, twin)
    tensors = {name: read_tensor(info) for name, info in inspect_checkpoint(model).tensors.items()}
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    return model, twin


MADE = {
    "fp8 in blocks": partial(make_fp8, scheme="blocks"),
    "fp8, a scale a row": partial(make_fp8, scheme="compressed channel"),
    "gptq by desc_act": partial(make_int4, scheme="gptq"),
    "mlx": make_mlx,
}


@pytest.mark.parametrize("form", MADE)
def test_a_run_ends_in_the_bytes_of_a_run_on_16_bits(form, chats, tmp_path):
    model, twin = MADE[form](tmp_path)
    ours, theirs = (run(path, chats, tmp_path / f"on {path.name}", max_steps=2) for path in (model, twin))
    assert [row["loss"] for row in ours.metrics] == [row["loss"] for row in theirs.metrics]
    assert adapter_bytes(tmp_path / f"on {model.name}") == adapter_bytes(tmp_path / f"on {twin.name}")
    origin = read_origin(ours.adapter)
    assert origin is not None and origin.model == str(model)
    found = [sum(t.nbytes for t in load_model(str(path), device="cpu").parameters()) for path in (model, twin)]
    assert found[0] == found[1]  # in memory it is in 4 bits, as any base


KEPT = {
    "nvfp4 of modelopt": partial(make_nvfp4, scheme="modelopt"),
    "nvfp4 of compressed-tensors": partial(make_nvfp4, scheme="compressed"),
    "symmetric gptq": partial(make_int4, scheme="gptq symmetric"),
    "w4a16": partial(make_int4, scheme="compressed"),
    "awq": partial(make_int4, scheme="awq"),
}


@pytest.mark.parametrize("form", KEPT)
def test_a_run_on_a_base_that_stays_packed(form, chats, tmp_path):
    model, twin = KEPT[form](tmp_path)
    whole = run(model, chats, tmp_path / "whole", max_steps=2)
    budget = least_budget(model, tmp_path)
    run(model, chats, tmp_path / "paged", max_steps=2, weights_budget=str(budget))
    again = copy_at(tmp_path / "whole", tmp_path / "resumed", 1)
    run(model, chats, again, resuming=True, max_steps=2)
    assert adapter_bytes(tmp_path / "paged") == adapter_bytes(again) == adapter_bytes(tmp_path / "whole")
    origin = read_origin(whole.adapter)
    assert origin is not None and origin.quant == {"quant_type": "nf4", "blocksize": 64, "double_quant": True}
    with_adapter(load_model(str(model), device="cpu"), str(whole.adapter))
    merge(str(model), str(whole.adapter), str(tmp_path / "merged"))

    older = read_origin(run(twin, chats, tmp_path / "older", max_steps=1).adapter)  # the base was rounded to nf4 then
    assert older is not None
    write_origin(tmp_path / "older" / "adapter", older)
    for take in (
        lambda: with_adapter(load_model(str(model), device="cpu"), str(tmp_path / "older" / "adapter")),
        lambda: merge(str(model), str(tmp_path / "older" / "adapter"), str(tmp_path / "never")),
    ):
        with pytest.raises(UserError, match=r"(?s)stored as the adapter met it.*rounded it to nf4"):
            take()


@pytest.mark.parametrize("form", KEPT)
def test_the_plan_counts_what_is_loaded(form, tmp_path):
    model, _ = KEPT[form](tmp_path)
    found = {term.name: term.num_bytes for term in plan(str(model), compute_dtype="float32", device="cpu").terms}
    loaded = load_model(str(model), device="cpu")
    weights = [weight for module in loaded.modules() for _, weight in weights_of(module)]
    assert found["base, 4-bit codes"] == sum(weight.weight.nbytes for weight in weights)
    assert found["base, scales"] == sum(weight.loaded_state.nbytes for weight in weights)
    inputs = PlanInputs(read_model(inspect_checkpoint(model)), TrainConfig(**fields(model, "d", "o")), torch.float32)
    paged = load_model(str(model), device="cpu", weights_budget=1 << 40, page_folder=tmp_path / "p")
    assert inputs.pages == [page.num_bytes for page in paged.pager.pages]
    assert fingerprint(paged) == fingerprint(loaded)


def test_what_rounds_the_base_again_is_refused(tmp_path):
    model, _ = KEPT["nvfp4 of modelopt"](tmp_path)
    with pytest.raises(UserError, match=r"(?s)a model to calibrate must be in 16 or 32 bits.*NVFP4"):
        Source(str(model), QuantConfig(), Dataset([], "text", 64)).open()
    with pytest.raises(UserError, match=r"(?s)bitsandbytes' format.*nvfp4"):
        load_model(str(model), device="cpu").save_pretrained(tmp_path / "saved")
    known = read_model(inspect_checkpoint(model))
    with pytest.raises(UserError, match=r"(?s)loftq.*is in 4 bits"):
        check_loftq(inspect_checkpoint(model), known.modules, ["model.layers.0.self_attn.q_proj"], LoraSettings())
