"""Exact: a sharded base has the bytes of a whole one, although each process sees its own part of the weights only."""

import math
import os
import re
import shutil
from functools import partial

import torch
from safetensors.torch import load_file, save_file

import onecard
from onecard.hf.fingerprint import fingerprint
from onecard.train.ranks import join
from tests.conftest import make_checkpoint
from tests.forks import ranks
from tests.hf.test_int4_base import make_int4
from tests.hf.test_nvfp4_base import make_nvfp4

COUNT = 3
NF4 = {"quant_type": "nf4", "blocksize": 64, "double_quant": True}
CASES = [
    ("llama", NF4),
    ("llama", {"quant_type": "fp4", "blocksize": 128, "double_quant": False}),
    ("llama", {"quant_type": "nf4", "blocksize": 4096, "double_quant": True}),  # fewer blocks than processes
    ("mixtral", NF4),  # its experts are stored one by one, and the two parts of a weight apart
    ("gpt_oss", {"quant_type": "mxfp4", "blocksize": 32, "double_quant": False}),
    ("nvfp4", NF4),  # its linears stay as they are stored, so each process reads all of them
    ("awq", NF4),
]


def poison(folder, number, blocksize):
    """Make all values of the 4-bit weights NaN that process `number` has no need to read."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, W in tensors.items():
        if W.ndim < 2 or re.search("embed|lm_head|router|gate.weight", name) or name.endswith("_bias"):
            continue
        expert = re.search(r"experts\.(\d)\.", name)
        if expert:  # 4 in 3 processes: the first has a third of expert 1, the last two thirds of expert 2
            begin, end = (0, W.numel()) if int(expert[1]) in (number, number + 1) else (0, 0)
        else:
            rows = math.ceil(math.ceil(W.numel() / blocksize) / COUNT)
            begin, end = number * rows * blocksize, (number + 1) * rows * blocksize
        is_turned = W.ndim == 3 and blocksize == 32  # in MXFP4, a matrix of gpt_oss has its inputs along its rows
        W = W.mT.contiguous() if is_turned else W
        flat = torch.full_like(W, float("nan")).view(-1)
        flat[begin:end] = W.view(-1)[begin:end]
        tensors[name] = (flat.view_as(W).mT if is_turned else flat.view_as(W)).contiguous()
    save_file(tensors, path, {"format": "pt"})


def load(folder, found):
    join("cpu")
    number = os.environ["RANK"]
    for case, (_, quant) in enumerate(CASES):
        model = onecard.load_model(
            str(folder / f"{case}-{number}"), **quant, compute_dtype="float32", device="cpu", sharded=True
        )
        (found / f"{case}-{number}").write_text(fingerprint(model))


def test_each_process_reads_its_own_part(tmp_path):
    expected = []
    for case, (family, quant) in enumerate(CASES):
        made = {"nvfp4": partial(make_nvfp4, scheme="modelopt"), "awq": partial(make_int4, scheme="awq")}.get(family)
        whole = make_checkpoint(tmp_path / family, family) if made is None else made(tmp_path / f"{family} twins")[0]
        expected.append(fingerprint(onecard.load_model(str(whole), **quant, compute_dtype="float32", device="cpu")))
        for number in range(COUNT):
            copy = shutil.copytree(whole, tmp_path / "parts" / f"{case}-{number}")
            if made is None:
                poison(copy, number, quant["blocksize"])
    (tmp_path / "found").mkdir()
    for process in ranks(COUNT, load, tmp_path / "parts", tmp_path / "found"):
        end = process.wait()
        assert end.code == 0, end.err
    found = [[(tmp_path / "found" / f"{case}-{n}").read_text() for n in range(COUNT)] for case in range(len(CASES))]
    assert found == [[fingerprint] * COUNT for fingerprint in expected]
