"""Exact: a run on a base in few bits ends in the bytes of a run on the 16-bit checkpoint that it means.

GGUF files and MXFP4 have runs of their own (tests/hf/test_gguf_base.py, test_load_mxfp4.py).
"""

import shutil
from functools import partial

import pytest
from safetensors.torch import save_file

from onecard.adapter.origin import read_origin
from onecard.config import CalibrationConfig
from onecard.export.calibrated.writer import export_folder
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.load import load_model
from onecard.hf.stored import read_tensor
from tests.conftest import make_checkpoint
from tests.hf.test_fp8 import make_fp8
from tests.hf.test_int4_base import make_int4
from tests.hf.test_nvfp4_base import make_nvfp4
from tests.train.test_loop import adapter_bytes, run


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
    "nvfp4 of modelopt": partial(make_nvfp4, scheme="modelopt"),
    "nvfp4 of compressed-tensors": partial(make_nvfp4, scheme="compressed"),
    "gptq": partial(make_int4, scheme="gptq"),
    "awq": partial(make_int4, scheme="awq"),
    "w4a16": partial(make_int4, scheme="compressed"),
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
