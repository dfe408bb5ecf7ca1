"""No worse than plain: a classification head's outputs, losses and steps are transformers', peft's and trl's. Exact:
resumes. Behaviour: what is refused, and the commands that take a head."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import onecard
from onecard.adapter.layers import lora_config
from onecard.adapter.load import with_adapter
from onecard.config import DataConfig, TrainConfig, make_config
from onecard.data.classes import ordered
from onecard.data.load import load_dataset
from onecard.errors import UserError
from onecard.hf.attention import use_packed_attention
from onecard.nn.linear import Linear4bit
from onecard.train.head import REWARD, SequenceHead, choose_outputs, macro_f1
from onecard.train.loss import packed_loss, plain_loss
from onecard.train.session import run_training
from tests.conftest import chat_rows, make_checkpoint, write_rows
from tests.train.test_loop import adapter_bytes, copy_at, quiet
from tests.train.test_preference import PAIRS, fields, trainer_arguments

SAID = ("good fox", "bad dog", "two blue mugs")
REVIEWS = [{"review": f"{SAID[i % 3]} {'jumps over ' * (i % 4)}{i}", "stars": (1, 5, 3)[i % 3]} for i in range(24)]
COLUMNS = "text=review,label=stars"
LABELS = ("1", "3", "5")
SLOW_REWARD = pytest.param("reward", marks=pytest.mark.slow)
CLASSES = {"task": "classification", "columns": COLUMNS}


def run(checkpoint, data, output, resuming=False, **more):
    return run_training(make_config(TrainConfig, fields(checkpoint, data, output, **more)), resuming, quiet())


def settings(task="classification", **more):
    columns = {"columns": COLUMNS} if task == "classification" else {}
    return make_config(TrainConfig, fields("-", "-", "-", task=task, **(columns | more)), "test")


def dequantized(checkpoint, base, config=None):
    """transformers' own model with a head, over the weights that our base has in 4 bits."""
    config = config or AutoConfig.from_pretrained(checkpoint, num_labels=base.score.out_features)
    plain = AutoModelForSequenceClassification.from_pretrained(checkpoint, config=config, dtype=torch.float32).eval()
    for path, module in base.named_modules():
        if isinstance(module, Linear4bit):
            plain.get_submodule(path.replace(".base_layer", "")).weight.data.copy_(module.dequantize())
    return plain


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("reviews") / "reviews.jsonl", REVIEWS)


@pytest.fixture(scope="module")
def trained(checkpoint, reviews, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "run"
    more = {"num_train_epochs": 2, "validation_split": 0.25, "eval_steps": 2, "load_best_model_at_end": True}
    return output, run(checkpoint, reviews, output, save_steps=2, metric_for_best_model="f1", **CLASSES, **more)


def test_plain_transformers_and_peft_load_the_adapter(checkpoint, trained):
    """Float32: only the order of the sums differs."""
    adapter = trained[0] / "adapter"
    base = onecard.load_model(str(checkpoint), labels=LABELS, compute_dtype="float32", device="cpu")
    ours = with_adapter(base, str(adapter))
    config = AutoConfig.from_pretrained(adapter)
    assert config.id2label == dict(enumerate(LABELS)) and config.label2id == {"1": 0, "3": 1, "5": 2}
    assert config.architectures == ["LlamaForSequenceClassification"]
    plain = PeftModel.from_pretrained(dequantized(checkpoint, base, config), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = tokenizer([row["review"] for row in REVIEWS], return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        theirs = plain(**rows).logits
        alone = [ours(input_ids=ids[mask > 0][None]).logits[0] for ids, mask in zip(*rows.values())]
    assert (torch.stack(alone) - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert theirs.std(0).min() > 1e-2  # the head tells rows apart
    saved = json.loads((adapter / "adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_CLS" and saved["modules_to_save"] == ["score"]


def test_the_evaluation_is_that_of_plain_logits(checkpoint, trained, reviews):
    """Accuracy and F1 are counts: exact. The loss is a mean of float32 losses."""
    _, result = trained
    rows = [row for row in result.metrics if "eval_loss" in row]
    dataset = load_dataset(str(reviews), result.tokenizer, settings(), "classification").split(0.25, 42)[1]
    with torch.no_grad():
        ids = [torch.tensor([example.input_ids]) for example in dataset.examples]
        logits = torch.cat([result.model(input_ids=each).logits for each in ids])
    targets = torch.tensor([LABELS.index(example.class_name) for example in dataset.examples])
    best = max(rows, key=lambda row: row["eval_f1"])
    assert result.report.after["eval_accuracy"] == (logits.argmax(1) == targets).double().mean().item()
    assert result.report.after["eval_f1"] == best["eval_f1"] == macro_f1(logits.argmax(1), targets)
    expected = torch.nn.functional.cross_entropy(logits, targets).item()
    assert result.report.after["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert 0 <= result.metrics[0]["accuracy"] <= 1


def test_macro_f1_is_its_definition():
    said, true = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 0, 2, 0])
    one, two, three = 2 * 1 / (2 + 3), 2 * 1 / (1 + 2), 2 * 1 / (3 + 1)
    assert macro_f1(said, true) == pytest.approx((one + two + three) / 3, rel=1e-12)
    assert macro_f1(torch.tensor([0, 3]), torch.tensor([0, 0])) == pytest.approx((2 / 3 + 0) / 2, rel=1e-12)


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "gemma2", "phi3"))]
)
@pytest.mark.parametrize("task", ["classification", "reward"])
def test_packed_rows_have_the_outputs_of_rows_alone(family, task, reviews, tmp_path):
    folder = make_checkpoint(tmp_path / family, family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data, labels = (reviews, LABELS) if task == "classification" else (write_rows(tmp_path / "p.jsonl", PAIRS), REWARD)
    dataset = load_dataset(str(data), tokenizer, settings(task), task)
    model = onecard.load_model(str(folder), labels=labels, compute_dtype="float32", device="cpu")
    assert choose_outputs(model, dataset) == (packed_loss, None)
    with use_packed_attention(model):
        packed = SequenceHead(model, dataset, labels, True).all_outputs()
    alone = SequenceHead(model, dataset, labels, False).all_outputs()
    assert (packed - alone).abs().max() <= 1e-5 * alone.abs().max()
    assert packed.std(0).min() > 1e-2


@pytest.mark.parametrize("pad", ["<|im_end|>", None, "<|pad|>"])
def test_the_head_reads_where_transformers_reads(pad, checkpoint, tmp_path):
    """Also where EOS is the pad token, and ends the row."""
    folder = tmp_path / "m"
    shutil.copytree(checkpoint, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(folder)
    data = write_rows(tmp_path / "d.jsonl", PAIRS)
    model = onecard.load_model(str(folder), labels=REWARD, compute_dtype="float32", device="cpu")
    dataset = load_dataset(str(data), AutoTokenizer.from_pretrained(folder), settings("reward"), "reward")
    id_of_pad = model.config.pad_token_id
    assert id_of_pad == tokenizer.convert_tokens_to_ids(pad or "<|im_end|>")
    with use_packed_attention(model):
        packed = SequenceHead(model, dataset, REWARD, True).all_outputs()[:, 0]
    documents = [ids for e in dataset.examples for ids in (e.input_ids[: e.second], e.input_ids[e.second :])]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in documents)
    width = max(map(len, documents))
    rows = torch.tensor([ids + [id_of_pad] * (width - len(ids)) for ids in documents])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in documents])
    with torch.no_grad():
        theirs = model(input_ids=rows, attention_mask=mask).logits[:, 0]
    assert (packed - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_another_place_to_read_is_noticed(checkpoint, reviews):
    """A model whose own forward reads elsewhere goes one document at a time."""
    model = onecard.load_model(str(checkpoint), labels=LABELS, compute_dtype="float32", device="cpu")
    dataset = load_dataset(str(reviews), AutoTokenizer.from_pretrained(checkpoint), settings(), "classification")
    hook = model.score.register_forward_hook(lambda module, args, z: z.roll(1, dims=-2) if z.ndim == 3 else z)
    assert choose_outputs(model, dataset)[0] is plain_loss
    hook.remove()
    assert choose_outputs(model, dataset)[0] is packed_loss


def test_texts_have_the_tokenizers_own_tokens(checkpoint, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = [{"text": row["review"], "label": row["stars"]} for row in REVIEWS]
    dataset = load_dataset(
        str(write_rows(tmp_path / "d.jsonl", rows)), tokenizer, settings(columns=None), "classification"
    )
    assert [e.input_ids for e in dataset.examples] == [tokenizer(row["text"])["input_ids"] for row in rows]
    chats = [{**row, "label": i % 2} for i, row in enumerate(chat_rows(4))]
    chats[0]["messages"] = chats[0]["messages"][:1]  # no answer is needed
    dataset = load_dataset(
        str(write_rows(tmp_path / "c.jsonl", chats)), tokenizer, settings(columns=None), "classification"
    )
    expected = [tokenizer.apply_chat_template(row["messages"])["input_ids"] for row in chats]
    assert [example.input_ids for example in dataset.examples] == expected
    assert all(example.labels[-1] == example.input_ids[-1] for example in dataset.examples)


def test_a_row_of_one_token_has_an_output(checkpoint, tmp_path):
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(("a", "the lazy dog", "b", "two blue mugs", "c"))]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    dataset = load_dataset(
        str(write_rows(tmp_path / "d.jsonl", rows)), tokenizer, settings(columns=None), "classification"
    )
    assert dataset.stored.lengths.tolist()[::2] == [1, 1, 1]
    model = onecard.load_model(str(checkpoint), labels=("0", "1"), compute_dtype="float32", device="cpu")
    assert choose_outputs(model, dataset) == (packed_loss, None)
    with use_packed_attention(model):
        packed = SequenceHead(model, dataset, ("0", "1"), True).all_outputs()
    with torch.no_grad():
        alone = [model(**tokenizer(row["text"], return_tensors="pt")).logits for row in rows]
    assert (packed - torch.cat(alone)).abs().max() <= 1e-5 * packed.abs().max()
    run(checkpoint, tmp_path / "d.jsonl", tmp_path / "o", task="classification", packing=False, max_steps=5)


def test_a_long_row_loses_its_end(checkpoint, reviews):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    dataset = load_dataset(str(reviews), tokenizer, settings(max_seq_length=12), "classification")
    example, ids = dataset.examples[7], tokenizer(REVIEWS[7]["review"])["input_ids"]
    assert example.input_ids == ids[:12] and example.labels[11] == ids[11] and len(ids) > 12
    assert any(line.startswith("texts are cut at their ends to 12 tokens") for line in dataset.notices)
    with pytest.raises(UserError, match="a row must have at most 12 tokens"):
        load_dataset(str(reviews), tokenizer, settings(max_seq_length=12, on_long_rows="error"), "classification")


@pytest.mark.parametrize("center", [pytest.param(None, marks=pytest.mark.slow), 0.1])
def test_reward_steps_are_those_of_trl(center, checkpoint, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    count, steps, rows = 6, 4, PAIRS[:6]
    more = {"per_device_train_batch_size": count, "packing": False, "max_steps": steps, "task": "reward"}
    data = write_rows(tmp_path / "d.jsonl", rows)
    found = run(checkpoint, data, tmp_path / "o", center_rewards_coefficient=center, **more).metrics
    base = onecard.load_model(str(checkpoint), labels=REWARD, compute_dtype="float32", device="cpu")
    from onecard.hf.head import start_head

    start_head(base, 42)
    torch.manual_seed(42)
    start = get_peft_model(base, lora_config(settings("reward"), base))
    names = start.peft_config["default"].target_modules
    lora = LoraConfig(r=4, lora_alpha=32, target_modules=names, task_type="SEQ_CLS")
    model = get_peft_model(dequantized(checkpoint, base), lora)
    parts = dict(start.named_parameters())
    for path, parameter in model.named_parameters():
        if "lora_" in path or "score" in path:
            parameter.data = parts[path].detach().clone()
    how = trainer_arguments(tmp_path / "trl", steps, count)
    args = trl.RewardConfig(**how, center_rewards_coefficient=center)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    made = trl.RewardTrainer(
        model=model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    made.train()
    wanted = [row for row in made.state.log_history if "loss" in row]
    assert len(found) == len(wanted) == steps
    assert abs(wanted[-1]["loss"] - wanted[0]["loss"]) > 1e-2 * abs(wanted[0]["loss"])  # the steps do something
    for ours, theirs in zip(found, wanted):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["accuracy"] == theirs["accuracy"]
        assert ours["margin"] == pytest.approx(theirs["margin"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("task", ["classification", SLOW_REWARD])
def test_any_split_of_the_window_is_the_same_update(task, checkpoint, reviews, tmp_path):
    data = reviews if task == "classification" else write_rows(tmp_path / "d.jsonl", PAIRS)
    losses = []
    for batch, accumulation in ((8, 1), (2, 4)):
        columns = {"columns": COLUMNS} if task == "classification" else {}
        more = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, **columns}
        result = run(checkpoint, data, tmp_path / f"{batch}", task=task, packing=False, max_steps=3, **more)
        losses.append([row["loss"] for row in result.metrics])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("task", [pytest.param("classification", marks=pytest.mark.slow), "reward"])
def test_straight_is_stop_and_resume(task, checkpoint, reviews, tmp_path):
    data = reviews if task == "classification" else write_rows(tmp_path / "d.jsonl", PAIRS)
    more = {"task": task, "validation_split": 0.2, "save_steps": 1, "save_total_limit": 99, "lora_dropout": 0.1}
    more |= {"columns": COLUMNS} if task == "classification" else {}
    straight = tmp_path / "straight"
    steps = run(checkpoint, data, straight, **more).report.num_steps
    output = copy_at(straight, tmp_path / "resumed", steps // 2)
    again = run(checkpoint, data, output, resuming=True, **more)
    assert steps > 2 and len(again.metrics) == steps
    assert adapter_bytes(output) == adapter_bytes(straight)


def test_a_merged_checkpoint_has_its_head(checkpoint, trained, reviews, tmp_path):
    """Plain transformers loads it, with the live model's logits: float32, only the order of the sums differs."""
    output, result = trained
    merged = onecard.merge(str(checkpoint), str(output / "adapter"), str(tmp_path / "merged"))
    plain, report = AutoModelForSequenceClassification.from_pretrained(merged, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert plain.config.id2label == dict(enumerate(LABELS)) and plain.config.pad_token_id == 0
    ids = AutoTokenizer.from_pretrained(merged)(REVIEWS[0]["review"], return_tensors="pt").input_ids
    with torch.no_grad():
        ours, theirs = result.model(input_ids=ids).logits, plain.eval()(input_ids=ids).logits
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
    again = run(merged, reviews, tmp_path / "again", max_steps=1, **CLASSES)  # the head goes on from its own values
    assert torch.equal(again.model.base_model.model.score.original_module.weight, plain.score.weight)
    with pytest.raises(UserError, match="the checkpoint's head must have the labels"):
        other = write_rows(tmp_path / "other.jsonl", [{"text": "a fox", "label": i % 3} for i in range(6)])
        run(merged, other, tmp_path / "not", task="classification")


def test_one_class_alone_is_refused(checkpoint, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", [{"text": text, "label": "x"} for text in ("a fox", "a dog")])
    with pytest.raises(UserError, match="the rows must have two classes or more") as error:
        run(checkpoint, data, tmp_path / "o", task="classification")
    assert error.value.found == "only x" and error.value.where == f"{data}:1"


def test_a_class_of_the_eval_data_alone_is_refused(checkpoint, reviews, tmp_path):
    held = write_rows(tmp_path / "held.jsonl", [REVIEWS[0], {"review": "what a fox", "stars": 4}])
    with pytest.raises(UserError, match="each row must be of a class that is trained: 1, 3, 5") as error:
        run(checkpoint, reviews, tmp_path / "o", eval_data=str(held), **CLASSES)
    assert error.value.found == "4" and error.value.where == f"{held}:2"


def test_integers_are_in_their_order(checkpoint, tmp_path):
    rows = [{"text": f"fox {i}", "label": str(label)} for i, label in enumerate((10, 9, 2, 10, 2))]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    dataset = load_dataset(
        str(write_rows(tmp_path / "d.jsonl", rows)), tokenizer, settings(columns=None), "classification"
    )
    assert dataset.classes == {"2": 2, "9": 1, "10": 2}
    assert SequenceHead(None, dataset, tuple(dataset.classes), True).targets.tolist() == [2, 1, 0, 2, 0]
    names = ["zebra", "10", "fox", "ant", "9", "bee", "cow"]  # a set of them has another order by chance
    assert ordered(names) == ("10", "9", "ant", "bee", "cow", "fox", "zebra")


@pytest.mark.parametrize(
    "more, must",
    [
        ({"loss": "dpo"}, "loss dpo is for task causal_lm"),
        ({"streaming": True, "max_steps": 9}, "streaming is for loss sft: leave it out with classification"),
        ({"metric": "rouge", "eval_data": "x"}, "task classification writes no answers"),
        ({"sample_prompts": ["x"]}, "task classification writes no answers"),
        ({"train_on": "all"}, "task classification reads whole rows"),
        ({"on_long_rows": "split"}, "task classification needs rows as a whole"),
        ({"weights_budget": "1GiB"}, "task classification trains its head in full"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is for task causal_lm"),
        ({"format": "messages"}, "task classification reads rows of format classification"),
        ({"center_rewards_coefficient": 0.1}, "center_rewards_coefficient is for task reward"),
        ({"optim": "sgd"}, "modules_to_save need the float32 masters of AdamW"),
        ({"metric_for_best_model": "margin", "validation_split": 0.1, "eval_steps": 1}, "must be one of eval_loss, ev"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_a_head_does_not_take(more, must):
    with pytest.raises(UserError, match=must):
        settings(**more)


def test_commands_take_or_refuse_a_head(checkpoint, trained, reviews, tmp_path, capsys):
    from onecard.cli.answering import classify, evaluate, generate
    from onecard.config import ExportConfig

    model, adapter = str(checkpoint), str(trained[0] / "adapter")
    classify(model, REVIEWS[0]["review"], adapter, device="cpu")
    printed = capsys.readouterr().out
    assert set(printed.split()[::2]) == set(LABELS) and printed.count("%") == 3
    columns = make_config(DataConfig, {"columns": COLUMNS}, "test")
    evaluate(model, [str(reviews)], adapter=adapter, fields=columns, device="cpu")
    assert "accuracy" in (printed := capsys.readouterr().out) and "over 24 rows" in printed
    refused = "needs an adapter that writes text"
    with pytest.raises(UserError, match=refused):
        generate(model, "a fox", adapter, device="cpu")
    with pytest.raises(UserError, match=refused):
        onecard.export(ExportConfig(format="gguf", model=model, adapter=adapter, output=str(tmp_path / "x.gguf")))
    with pytest.raises(UserError, match="classify needs a classification head"):
        classify(model, "a fox", device="cpu")
    base = onecard.load_model(model, compute_dtype="float32", device="cpu")
    with pytest.raises(UserError, match="must both have a classification head, or neither"):
        with_adapter(base, adapter)


def test_the_plan_counts_the_head(checkpoint):
    plain, headed = (onecard.plan(str(checkpoint), task=task, device="cpu") for task in ("causal_lm", "classification"))
    terms = {term.name: term.num_bytes for term in headed.terms}
    assert terms["modules saved"] in (2 * 2 * 64, 4 * 2 * 64)  # two classes, in 16 or 32 bits
    assert "outputs" in terms and not any(term.name in ("modules saved", "outputs") for term in plain.terms)
