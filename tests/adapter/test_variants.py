"""No worse than plain: each LoRA variant, trained by each optimizer, is the same adapter in every tool that reads it.

The live model's logits stand against bitsandbytes' own 4-bit model with plain peft, the merge and the GGUF file of the
merge as transformers reads them, our own load, and the GGUF adapter or its refusal. All is float32 over the same NF4
codes: the difference is that of float32 sums, within 1e-4 of the adapter's effect. A GGUF file has the merge's weights
rounded to F16, to the bit.
"""

import gguf
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import onecard
from onecard.adapter.layers import LoraLinear4bit, lora_config
from onecard.adapter.load import with_adapter
from onecard.adapter.origin import origin_of
from onecard.adapter.save import save_adapter
from onecard.adapter.start import set_loftq
from onecard.config import GgufConfig, TrainConfig, make_config
from onecard.errors import UserError
from onecard.export.gguf.writer import export_gguf
from onecard.export.merge.merged import merge
from onecard.optim.make import make_optimizer
from onecard.train.noise import EmbeddingNoise
from tests.adapter.test_lora_settings import IDS, gap, logits
from tests.conftest import make_checkpoint

SOME = ["q_proj", "v_proj", "down_proj"]
VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True, "rank_pattern": {"down_proj": 2}},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32.0}},
    "layers": {"layers_to_transform": [1], "target_modules": SOME},
    "exclude": {"exclude_modules": ["k_proj", "mlp.up_proj"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "olora": {"init_lora_weights": "olora"},
    "loftq": {"init_lora_weights": "loftq", "lora_alpha": 3},
    "pissa": {"init_lora_weights": "pissa", "use_rslora": True},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4", "rank_pattern": {"q_proj": 2}},
    "loraplus": {"loraplus_lr_ratio": 8.0},
    "neftune": {"neftune_noise_alpha": 5.0},
    "schedule_free": {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "learning_rate": 0.05},
    "muon": {"optim": "muon", "use_dora": True},
    "lion": {"optim": "lion", "learning_rate": 0.01},
    "adafactor": {"optim": "adafactor"},
    "sgd": {"optim": "sgd", "learning_rate": 3.0},
    "adamw_8bit": {"optim": "adamw_8bit"},
}
NOT_IN_GGUF = {  # what an adapter file of llama.cpp has no place for
    "dora": "DoRA", "dora-rslora": "DoRA", "muon": "DoRA", "lora_bias": "lora_bias",
    "modules_to_save": "trained in full",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Qwen 2: its q, k and v have a bias, its other linears have none. Rows are whole blocks: bitsandbytes' CPU kernel
    reads others in another way than its CUDA kernel."""
    return make_checkpoint(tmp_path_factory.mktemp("base") / "qwen2", "qwen2", intermediate_size=128)


def trained(base, variant, folder):
    """A live adapter after some updates, which change the logits, as `train` leaves it."""
    fields = {"r": 4, "lora_alpha": 8, "learning_rate": 0.02, "lora_dropout": 0.0, **variant}
    config = make_config(TrainConfig, {"model": str(base), "data": "-", "output": str(folder), **fields})
    model = onecard.load_model(str(base), compute_dtype=torch.float32, device="cpu")
    torch.manual_seed(3)
    tuned = get_peft_model(model, lora_config(config, model)).train()
    if config.init_lora_weights == "loftq":
        set_loftq(tuned, base)
    optimizer = make_optimizer({name: p for name, p in tuned.named_parameters() if p.requires_grad}, config)
    noise = EmbeddingNoise(model, config.neftune_noise_alpha) if config.neftune_noise_alpha else None
    for _ in range(4):
        tuned(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.finish()
    if noise is not None:
        noise.remove()
    return tuned.eval()


def bitsandbytes_model(base):
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)


OPTIMIZERS = ("neftune", "schedule_free", "muon", "lion", "adafactor", "sgd", "adamw_8bit")
SLOW = ("dora-rslora", "layers", "exclude", "gaussian", *OPTIMIZERS)  # what the others say, too


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in VARIANTS])
def test_a_trained_variant_is_the_same_in_every_tool(name, base, tmp_path):
    tuned = trained(base, VARIANTS[name], tmp_path)
    live = logits(tuned)
    with tuned.disable_adapter():
        before = logits(tuned)
    assert (live - before).norm() > 0.05 * before.norm()  # an adapter that is left out is far from live
    adapter = tmp_path / "adapter"
    save_adapter(tuned, adapter, origin_of(tuned.get_base_model(), str(base)))

    # In evaluation mode bitsandbytes' CPU kernel rounds scales to bfloat16. Without dropout, train() changes only that.
    plain = PeftModel.from_pretrained(bitsandbytes_model(base), adapter).train()
    assert gap(logits(plain), live, before) < 1e-4
    ours = with_adapter(onecard.load_model(str(base), compute_dtype=torch.float32, device="cpu"), str(adapter))
    assert gap(logits(ours), live, before) < 1e-4
    merge(str(base), str(adapter), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert gap(logits(merged), live, before) < 1e-4
    export_gguf(str(base), str(adapter), str(tmp_path / "m.gguf"), GgufConfig(outtype="f16"), "dequantized")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    parameters = dict(merged.named_parameters())
    for key, found in read.named_parameters():  # matrices are in F16, the others in F32
        expected = parameters[key].half().float() if found.ndim == 2 else parameters[key]
        assert torch.equal(found, expected), key

    only = GgufConfig(adapter_only=True)
    if name in NOT_IN_GGUF:
        with pytest.raises(UserError, match=NOT_IN_GGUF[name]):
            export_gguf(str(base), str(adapter), str(tmp_path / "a.gguf"), only)
        return
    export_gguf(str(base), str(adapter), str(tmp_path / "a.gguf"), only)
    check_adapter_file(tmp_path / "a.gguf", tuned)


def check_adapter_file(path, tuned):
    """The update of each linear is that of the live layer, with its frozen start, up to float32's roundings."""
    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    layers = {n: m for n, m in tuned.named_modules() if isinstance(m, LoraLinear4bit)}
    assert len(tensors) == 2 * len(layers)
    for name, layer in layers.items():
        if not name.endswith("down_proj"):
            continue
        number = name.split(".layers.")[1].split(".")[0]
        A, B = (tensors[f"blk.{number}.ffn_down.weight.{part}"] for part in ("lora_a", "lora_b"))
        own_A, own_B = layer.factors("default")
        expected = layer.scaling["default"] * own_B @ own_A
        whole = layer.scaling["default"] * own_B.norm() * own_A.norm()  # the parts of a frozen start cancel
        assert (alpha / A.shape[0] * (B @ A) - expected).abs().max() <= 1e-6 * whole
