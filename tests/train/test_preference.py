"""The losses on preferences: no worse than trl's own trainers from the same start. Exact: resumes, splits, stores."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import onecard
from onecard.adapter.layers import lora_config
from onecard.config import TrainConfig, make_config
from onecard.data.chat.mask import Example
from onecard.data.packing import collate
from onecard.errors import UserError
from onecard.hf.attention import use_packed_attention
from onecard.nn.linear import Linear4bit
from onecard.train.preference import Preference
from onecard.train.preference_loss import DPO_LOSSES, dpo_losses
from onecard.train.session import run_training
from tests.conftest import make_checkpoint, write_rows
from tests.train.test_loop import adapter_bytes, quiet

STEPS, COUNT = 4, 6
PAIRS = [
    {
        "prompt": f"how many mugs do you want? {i}",
        "chosen": f" {i} blue mugs, please" + " fox" * (i % 3),
        "rejected": " the lazy dog" + " jumps over" * (i % 2),
    }
    for i in range(24)
]
JUDGED = [
    {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
    for i, row in enumerate(PAIRS)
]
# loss: its other settings here; trl's trainer and config there
LOSSES = {
    "dpo": ({}, "DPO", {}),
    "hinge": ({"loss_type": "hinge"}, "DPO", {"loss_type": ["hinge"]}),
    "robust": (
        {"loss_type": "robust", "label_smoothing": 0.1},
        "DPO",
        {"loss_type": ["robust"], "label_smoothing": 0.1},
    ),
    "ipo": ({}, "DPO", {"loss_type": ["ipo"]}),
    "orpo": ({}, "ORPO", {}),
    "simpo": (
        {"beta": 2.0, "cpo_alpha": 0.5, "label_smoothing": 0.05},
        "CPO",
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.5, "label_smoothing": 0.05},
    ),
    "kto": (
        {"desirable_weight": 1.5, "undesirable_weight": 0.8},
        "KTO",
        {"desirable_weight": 1.5, "undesirable_weight": 0.8},
    ),
}


def fields(checkpoint, data, output, **more):
    return {
        "model": str(checkpoint),
        "data": str(data),
        "output": str(output),
        "device": "cpu",
        "compute_dtype": "float32",
        "max_seq_length": 96,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "adam_epsilon": 1e-4,  # AdamW keeps more than a gradient's sign, so that roundings stay small
        "r": 4,
        "sample_prompts": [],
        **more,
    }


def run(checkpoint, data, output, resuming=False, **more):
    return run_training(make_config(TrainConfig, fields(checkpoint, data, output, **more)), resuming, quiet())


def trainer_arguments(output, steps, batch_size):
    """The settings of `fields` for a trainer of trl, one step a batch."""
    common = fields("-", "-", "-")
    return {
        "output_dir": str(output),
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": common["learning_rate"],
        "lr_scheduler_type": "constant",
        "adam_epsilon": common["adam_epsilon"],
        "weight_decay": 0.0,
        "max_length": common["max_seq_length"],
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


def trl_rows(checkpoint, output, name, rows, settings, dtype=torch.float32, seed=42):
    """The rows of trl's log, from the start of our run, on a plain model of the dequantized weights."""
    from datasets import Dataset

    base = onecard.load_model(str(checkpoint), compute_dtype=dtype, device="cpu")
    torch.manual_seed(seed)
    start = get_peft_model(base, lora_config(make_config(TrainConfig, fields(checkpoint, "-", "-"), "test"), base))
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    for path, module in base.named_modules():
        if isinstance(module, Linear4bit):
            weight = plain.get_submodule(path.replace(".base_layer", "")).weight
            weight.data.copy_(module.dequantize())
    names = start.peft_config["default"].target_modules
    model = get_peft_model(plain, LoraConfig(r=4, lora_alpha=32, target_modules=names, task_type="CAUSAL_LM"))
    parts = dict(start.named_parameters())
    for path, parameter in model.named_parameters():
        if "lora_" in path:
            parameter.data = parts[path].detach().clone()
    if name in ("DPO", "KTO"):
        import trl

        trainer, config = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    else:
        from importlib import import_module

        module = import_module(f"trl.experimental.{name.lower()}")
        trainer, config = getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")
    args = config(**trainer_arguments(output, STEPS, len(rows)), **settings)
    made = trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    made.train()
    return [row for row in made.state.log_history if "loss" in row]


@pytest.fixture(scope="module")
def without_bos(checkpoint, tmp_path_factory):
    """trl's older trainers write a BOS that the tokenizer does not write."""
    folder = tmp_path_factory.mktemp("without-bos") / "llama"
    shutil.copytree(checkpoint, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(folder)
    return folder


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("hinge", "robust", "simpo")]


@pytest.mark.parametrize("name", ["dpo", "ipo", "orpo", "kto", *SLOW])
def test_steps_are_those_of_trl(name, without_bos, tmp_path):
    pytest.importorskip("trl")
    settings, trainer, theirs = LOSSES[name]
    rows = (JUDGED if name == "kto" else PAIRS)[:COUNT]
    loss = "dpo" if name in DPO_LOSSES else name
    more = {"per_device_train_batch_size": COUNT, "packing": False, "max_steps": STEPS, "loss": loss, **settings}
    found = run(without_bos, write_rows(tmp_path / "d.jsonl", rows), tmp_path / "o", **more).metrics
    wanted = trl_rows(without_bos, tmp_path / "trl", trainer, rows, theirs)
    assert len(found) == len(wanted) == STEPS
    assert abs(wanted[-1]["loss"] - wanted[0]["loss"]) > 1e-2 * abs(wanted[0]["loss"])  # the steps do something
    for ours, their in zip(found, wanted):
        assert ours["loss"] == pytest.approx(their["loss"], rel=1e-5)
        shared = [key for key in ours if "/" in key or key in ("kl", "nll_loss")]
        assert len(shared) >= 5
        for key in shared:
            assert ours[key] == pytest.approx(their[key], rel=1e-5, abs=1e-5), key


def test_bfloat16_is_within_its_rounding(without_bos, tmp_path):
    """A logit z rounds by at most 2^-9 |z|, in the target and in the logsumexp, and a hidden state before it. Over N
    tokens of a pair this moves the margin, and the loss, by at most beta N 2^-8 max |z|."""
    pytest.importorskip("trl")
    rows, bfloat16 = PAIRS[:COUNT], torch.bfloat16
    data = write_rows(tmp_path / "d.jsonl", rows)
    more = {"per_device_train_batch_size": COUNT, "packing": False, "max_steps": STEPS, "loss": "dpo"}
    narrow = run(without_bos, data, tmp_path / "o", compute_dtype="bfloat16", **more)
    wanted = trl_rows(without_bos, tmp_path / "trl", "DPO", rows, {}, bfloat16)
    ids = AutoTokenizer.from_pretrained(without_bos)([row["chosen"] + row["rejected"] for row in rows])["input_ids"]
    with torch.no_grad():
        largest = narrow.model(torch.tensor([ids[0]])).logits.abs().max().item()
    bound = 0.1 * (2 + max(map(len, ids))) * 2**-8 * largest
    losses = [row["loss"] for row in narrow.metrics]
    assert losses[0] == pytest.approx(0.693147, abs=1e-6)  # the reference is of the same rows: no rounding at all
    assert bound < 0.5 * (losses[0] - losses[-1])
    for ours, their in zip(narrow.metrics, wanted):
        assert abs(ours["loss"] - their["loss"]) <= bound
        assert abs(ours["rewards/margins"] - their["rewards/margins"]) <= bound


def cross_entropy(p, q):
    return sum(one * (one / other).log() for one, other in ((p, q), (1 - p, 1 - q)))


# Each paper's equation, with probabilities instead of the code's logarithms: of b c, b r, and the smoothing e.
EQUATIONS = {
    "sigmoid": lambda c, r, e: -(1 / (1 + (r - c).exp())).log(),
    "hinge": lambda c, r, e: (1 - c + r).clamp(min=0),
    "robust": lambda c, r, e: -((1 - e) * (c - r).sigmoid().log() - e * (r - c).sigmoid().log()) / (1 - 2 * e),
    "exo_pair": lambda c, r, e: cross_entropy(torch.stack([c, r]).softmax(0)[0], torch.tensor(1 - e, dtype=c.dtype)),
    "nca_pair": lambda c, r, e: -c.sigmoid().log() - ((1 - c.sigmoid()).log() + (1 - r.sigmoid()).log()) / 2,
    "bco_pair": lambda c, r, e: -c.sigmoid().log() - (1 - r.sigmoid()).log(),
    "apo_zero": lambda c, r, e: (1 - c.sigmoid()) + r.sigmoid(),
    "apo_down": lambda c, r, e: c.sigmoid() + (1 - (c - r).sigmoid()),
}


@pytest.mark.parametrize("loss_type", list(DPO_LOSSES))
def test_each_loss_type_is_its_papers_equation(loss_type):
    generator = torch.Generator().manual_seed(0)
    c, r = (3 * torch.randn(16, dtype=torch.float64, generator=generator) for _ in "cr")
    smoothing = 0.1 if loss_type in ("robust", "exo_pair") else 0.0
    more = {"loss": "dpo", "loss_type": loss_type, "beta": 0.3, "label_smoothing": smoothing}
    config = make_config(TrainConfig, {"model": "-", "data": "-", "output": "-", **more}, "test")
    found = dpo_losses(config, c, r, c, r)
    assert torch.allclose(found, EQUATIONS[loss_type](0.3 * c, 0.3 * r, smoothing), rtol=1e-9, atol=1e-12)


SLOW_ORPO, SLOW_KTO, SLOW_SIMPO = (pytest.param(name, marks=pytest.mark.slow) for name in ("orpo", "kto", "simpo"))


@pytest.mark.parametrize("loss", ["dpo", SLOW_ORPO, SLOW_KTO])
def test_any_split_of_the_window_is_the_same_update(loss, checkpoint, tmp_path, monkeypatch):
    """Rows of one pair each, so that every split has the same pairs in its window; also parts of a micro-batch."""
    import onecard.train.session as session

    data, adapters, losses = write_rows(tmp_path / "d.jsonl", PAIRS[:16]), [], []
    for batch, accumulation, most in ((8, 1, None), (2, 4, None), (8, 1, 100)):
        output = tmp_path / f"{batch}-{most}"
        with monkeypatch.context() as patch:
            if most is not None:
                own = session.prepare

                def split(*args, own=own, most=most):
                    prepared = own(*args)
                    prepared.strategy = replace(prepared.strategy, max_forward_tokens=most)
                    return prepared

                patch.setattr(session, "prepare", split)
            result = run(
                checkpoint,
                data,
                output,
                loss=loss,
                packing=False,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                max_steps=2,
            )
        losses.append([row["loss"] for row in result.metrics])
        adapters.append(load_file(output / "adapter" / "adapter_model.safetensors"))
    assert all(found == pytest.approx(losses[0], rel=1e-5) for found in losses)
    for other in adapters[1:]:
        for name, tensor in adapters[0].items():
            assert (tensor - other[name]).abs().max() <= 1e-5, name


@pytest.mark.parametrize("loss", ["dpo", SLOW_KTO, SLOW_SIMPO])
def test_straight_is_stop_and_resume(loss, checkpoint, tmp_path):
    """Also where the file of the reference is lost or of another run."""
    data = write_rows(tmp_path / "d.jsonl", PAIRS)
    more = {
        "loss": loss,
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 2,
        "save_steps": 1,
        "save_total_limit": 99,
    }
    straight = tmp_path / "straight"
    steps = run(checkpoint, data, straight, **more).report.num_steps
    assert steps > 6
    reference = straight / "reference.safetensors"
    assert reference.exists() == (loss != "simpo")
    for k, kept in ((1, True), (steps - 1, False)):
        output = tmp_path / f"resumed-{k}"
        shutil.copytree(straight, output)
        shutil.rmtree(output / "adapter")
        for folder in (output / "checkpoints").iterdir():
            if int(folder.name.split("-")[1]) > k:
                shutil.rmtree(folder)
        if reference.exists() and not kept:
            (output / reference.name).write_bytes(reference.read_bytes()[:-8])
        again = run(checkpoint, data, output, resuming=True, **more)
        assert adapter_bytes(output) == adapter_bytes(straight)
        assert len(again.report.metrics) == steps
        if reference.exists():
            assert (output / reference.name).read_bytes() == reference.read_bytes()


@pytest.mark.parametrize("loss", ["dpo", SLOW_KTO])
def test_the_reference_in_the_step_is_that_of_before(loss, checkpoint, tmp_path):
    """Exact in one epoch: the rows are the same. The adapter still learns after it was off."""
    data = write_rows(tmp_path / "d.jsonl", PAIRS)
    for name, before in (("before", True), ("step", False)):
        run(checkpoint, data, tmp_path / name, loss=loss, precompute_reference=before, validation_split=0.2)
    assert not (tmp_path / "step" / "reference.safetensors").exists()
    assert load_file(tmp_path / "before" / "reference.safetensors")["training"].dtype == torch.float64
    rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("before", "step")]
    timed = {"seconds", "supervised_tokens_per_second", "memory_bytes"}
    before, step = ([{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines] for lines in rows)
    if loss == "kto":  # its other prompts are packed by the window, and by the row before the training
        assert [row["loss"] for row in step] == pytest.approx([row["loss"] for row in before], rel=1e-6)
    else:
        assert before == step
        assert adapter_bytes(tmp_path / "before") == adapter_bytes(tmp_path / "step")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head", "embed_tokens"]}], ids=str)
def test_the_reference_is_the_base(family, more, tmp_path):
    """Whatever an adapter has learned: experts, DoRA, whole modules."""
    if family == "qwen3_moe":
        more = {**more, "target_parameters": ["gate_up_proj", "down_proj"]}
        if "use_dora" in more:
            pytest.skip("refused: target_parameters take no use_dora")
    folder = make_checkpoint(tmp_path / "m", family)
    config = make_config(TrainConfig, fields(folder, "-", "-", loss="dpo", **more), "test")
    base = onecard.load_model(str(folder), compute_dtype=torch.float32, device="cpu")
    ids = torch.randint(5, 99, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = base(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0].double()
    model = get_peft_model(base, lora_config(config, base))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    half = ids[0].tolist()[:32], ids[0].tolist()[32:]
    example = Example([*half[0], *half[0]], 2 * [*[-100] * 16, *half[0][16:]], "row", second=32)
    preference = Preference(config, model, [example], packed=True)
    batch = preference.to_device({**collate([example], 64), "indices": [0]})
    with use_packed_attention(preference.base):
        found = preference.compute_reference(batch)
        with torch.no_grad():
            learned = preference.log_probs(batch).sum()
    assert found[0].tolist() == pytest.approx([wanted[15:31].sum().item()] * 2, rel=1e-5)
    assert abs(learned - found.sum()) > 1
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora" in name)


def test_a_run_shorter_than_an_epoch_computes_only_its_references(checkpoint, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", PAIRS)
    run(checkpoint, data, tmp_path / "o", loss="dpo", max_steps=2, packing=False)
    table = load_file(tmp_path / "o" / "reference.safetensors")["training"]
    assert (~table.isnan()).all(1).sum() == 2


def test_a_run_learns_what_is_preferred(checkpoint, tmp_path):
    """The metrics are in all places; the adapter merges, and answers, as any other."""
    data, output = write_rows(tmp_path / "d.jsonl", PAIRS), tmp_path / "o"
    result = run(
        checkpoint, data, output, loss="dpo", num_train_epochs=3, validation_split=0.2, sample_prompts=["how?"]
    )
    assert result.loss_before == pytest.approx(0.693147, abs=1e-6)
    assert result.loss_after < 0.2
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(abs(row["rewards/margins"] - (row["rewards/chosen"] - row["rewards/rejected"])) < 1e-9 for row in rows)
    assert rows[-1]["rewards/accuracies"] == rows[-1]["eval_rewards/accuracies"] == 1.0
    assert rows[-1]["logps/chosen"] > rows[0]["logps/chosen"] and rows[-1]["logps/rejected"] < rows[0]["logps/rejected"]
    header = (output / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "rewards/margins" in header and "eval_rewards/margins" in header
    report = (output / "report.md").read_text()
    assert "rewards/accuracies after | 1.0000" in report and "perplexity" not in report and "onecard eval" not in report
    onecard.merge(str(checkpoint), str(result.adapter), str(tmp_path / "merged"))
    ids = torch.tensor([AutoTokenizer.from_pretrained(checkpoint)("how many mugs")["input_ids"]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        difference = (merged(ids).logits - result.model(ids).logits).abs().max()
    assert difference <= 1e-4  # float32 sums in another order


def test_a_trained_adapter_is_the_reference_of_its_run(checkpoint, tmp_path):
    """Exact: the start is the reference, so that the first loss is log 2; a resumed run has the same reference."""
    data = write_rows(tmp_path / "d.jsonl", PAIRS)
    trained = run(checkpoint, data, tmp_path / "first", loss="dpo", max_steps=4).adapter
    more = {"loss": "dpo", "adapter": str(trained), "max_steps": 3, "packing": False}
    found = run(checkpoint, data, tmp_path / "second", save_steps=1, save_total_limit=9, **more).metrics
    assert found[0]["loss"] == pytest.approx(0.693147, abs=1e-6) and found[0]["rewards/margins"] == 0.0
    assert found[-1]["rewards/margins"] != 0.0
    expected = adapter_bytes(tmp_path / "second")
    for lost in ("adapter", "checkpoints/checkpoint-3", "checkpoints/checkpoint-2"):
        shutil.rmtree(tmp_path / "second" / lost)
    (tmp_path / "second" / "reference.safetensors").unlink()
    run(checkpoint, data, tmp_path / "second", resuming=True, save_steps=1, save_total_limit=9, **more)
    assert adapter_bytes(tmp_path / "second") == expected


def test_what_cannot_be_is_refused_before_the_load(checkpoint, tmp_path):
    pairs = write_rows(tmp_path / "p.jsonl", PAIRS)
    judged = write_rows(tmp_path / "j.jsonl", JUDGED)
    refused = [
        (pairs, {"loss": "dpo", "calibrate": True}, "calibrate is for loss sft"),
        (pairs, {"loss": "dpo", "lora_dropout": 0.1}, "leave lora_dropout out"),
        (pairs, {"loss": "orpo", "loss_type": "hinge"}, "loss_type is for loss dpo"),
        (pairs, {"simpo_gamma": 1.0}, "simpo_gamma is for loss simpo, not for sft"),
        (pairs, {"loss": "dpo", "label_smoothing": 0.1}, "robust or exo_pair"),
        (pairs, {"loss": "dpo", "loss_type": "exo_pair"}, "label_smoothing above 0"),
        (pairs, {"loss": "dpo", "format": "messages"}, "rows of format preference"),
        (pairs, {"format": "preference"}, "rows of format messages or"),
        (pairs, {}, "--loss dpo"),
        (pairs, {"loss": "dpo", "train_on": "all"}, "leave train_on out"),
        (pairs, {"loss": "dpo", "adapter": "a", "precompute_reference": False}, "leave precompute_reference out"),
        (judged, {"loss": "dpo"}, "--loss"),
        (write_rows(tmp_path / "one.jsonl", JUDGED[:1]), {"loss": "kto"}, "two answers"),
    ]
    for data, more, words in refused:
        with pytest.raises(UserError, match=words):
            run(checkpoint, data, tmp_path / "o", **more)
    from onecard.config import DataConfig
    from onecard.data.load import load_dataset
    from onecard.hf.load import load_tokenizer

    with pytest.raises(UserError, match="--loss dpo"):  # eval, merge --verify and calibration read their rows so
        load_dataset(str(pairs), load_tokenizer(str(checkpoint)), DataConfig())
