"""Everything that is known before the weights load: checkpoint, data, settings and the memory plan."""

from __future__ import annotations

import datetime
import shutil
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from onecard.adapter.form import form_of, template_digest
from onecard.adapter.head import check_labels, headed_config
from onecard.adapter.load import WEIGHTS
from onecard.adapter.origin import Form
from onecard.adapter.served import check_served
from onecard.adapter.start import check_loftq
from onecard.adapter.targets import check_names, check_new_tokens
from onecard.adapter.trained import check_same_tokens, check_trained
from onecard.config import REFERENCE_BYTES, TrainConfig, parse_bytes
from onecard.data.chat.template import set_template
from onecard.data.dataset import Dataset
from onecard.data.load import load_dataset
from onecard.data.loader import Loader
from onecard.data.sources import name_of
from onecard.data.stream import Stream, StreamLoader
from onecard.errors import UserError
from onecard.files import sha256
from onecard.hf.attention import supports_packing
from onecard.hf.checkpoint import config_fingerprint, inspect_checkpoint, tokenizer_fingerprint
from onecard.hf.head import WEIGHT as HEAD_WEIGHT
from onecard.hf.head import labels_of
from onecard.hf.load import (
    find_checkpoint,
    fix_date,
    load_tokenizer,
    pick_compute_dtype,
    pick_device,
    tokenizer_folder,
)
from onecard.hf.rounding import lines_of_few_bits
from onecard.hf.skeleton import Model, read_config, read_model
from onecard.hf.text_only import leave_out
from onecard.hf.tokens import NewTokens, add_tokens
from onecard.memory.inputs import MemoryStrategy, PlanInputs
from onecard.memory.measure import available_bytes, begin_peak, format_bytes
from onecard.memory.plan import Plan, fitted
from onecard.memory.strategy import strategy_within, total_bytes
from onecard.memory.terms import Term
from onecard.memory.workload import Answers, assumed, known
from onecard.optim.make import check_package
from onecard.paging.weights import layer_of
from onecard.torchrun import num_beside, num_processes
from onecard.train.evaluate import model_size
from onecard.train.head import check_classes, labels_for
from onecard.train.hub import check_login
from onecard.train.metrics import import_logger
from onecard.train.ranks import is_sharded
from onecard.train.reference import FILE
from onecard.train.samples import Sample, make_samples
from onecard.train.scoring import Question, Score, make_questions, make_score

FREE_MEMORY_SHARE = 0.8  # part of the free memory that a run may plan to use


@dataclass
class Prepared:
    """What is known before the weights load."""

    config: TrainConfig
    tokenizer: Any
    training: Dataset
    loader: Loader  # of the training rows, at the first row
    validation: dict[str, Dataset]  # by name; "" without a name
    plan: Plan
    strategy: MemoryStrategy
    why: str
    compute_dtype: torch.dtype
    identity: dict[str, str]
    samples: list[Sample]
    form: Form
    date: str
    process_bytes: int  # memory of the process itself, which the plan does not count
    questions: dict[str, list[Question]]  # of each eval file, what the model answers for the metrics
    scores: list[Score]
    notes: list[str]  # for the screen
    folder: Path  # the checkpoint's
    own_tokenizer: Any = None  # saved with the adapter, as its chat template is not the checkpoint's
    precompute: bool = False  # whether the reference of preferences is computed before the training
    labels: tuple[str, ...] = ()  # of the classification head, if the run trains one
    has_new_head: bool = False  # whether it starts at random
    head_config: Any = None  # transformers' config of the model with the head, saved with the adapter
    unmerged: str | None = None  # a weight for which merge and export will refuse the adapter
    new_tokens: NewTokens = field(default_factory=NewTokens)
    occurrences: list[int] = field(default_factory=list)  # of each new token in the training rows


def prepare(config: TrainConfig, date: str | None = None, answers: Answers | None = None) -> Prepared:
    """Check checkpoint, data and settings without loading anything large.

    Args:
        date: today's date for chat templates, as YYYY-MM-DD; None for the real date.
        answers: same as in `run_training`.
    """
    for name in config.loggers:
        import_logger(name)
    check_login(config)
    scores = [make_score(metric) for metric in config.metric]
    check_package(config.optim)
    date = date or datetime.date.today().isoformat()
    folder = find_checkpoint(config.model)
    checkpoint = inspect_checkpoint(folder)
    dtype = pick_compute_dtype(config.compute_dtype, pick_device(config.device))
    if config.tokenizer is not None and tokenizer_folder(folder, config.tokenizer) == folder:
        do = "pass one with tokenizer.json or tokenizer_config.json"
        raise UserError("tokenizer must be a folder with a tokenizer", "neither of its files", do, config.tokenizer)
    tokenizer = load_tokenizer(config.model, config.tokenizer)
    own = set_template(tokenizer, config.chat_template, config.template_variables)
    template, size_before = template_digest(tokenizer), len(tokenizer)
    new = add_tokens(tokenizer, config.add_tokens, config.add_special_tokens)
    saved = deepcopy(tokenizer) if own or config.tokenizer or new else None
    fix_date(tokenizer, datetime.date.fromisoformat(date))
    num_rows, longest = model_size(read_config(folder))
    size = (num_rows and max(num_rows, new.num_rows), longest)
    stream = Stream(config, tokenizer, size) if config.streaming else None
    training = stream.first[0] if stream else load_dataset(config.data, tokenizer, config, config.objective)
    validation = {
        name: load_dataset(path, tokenizer, config, config.objective) for name, path in config.eval_sources.items()
    }
    labels = labels_for(training, config.task, labels_of(read_config(folder))) if config.has_head else ()
    for dataset in validation.values():
        check_classes(dataset, labels)
    checkpoint = replace(checkpoint, labels=labels)
    if stream is not None and stream.held is not None:
        validation[""] = stream.held
    elif config.validation_split > 0:
        training, validation[""] = training.split(config.validation_split, config.seed)
    for dataset in (training, *validation.values()):
        dataset.check_fits(*size)
    if config.loss == "kto" and len(training.examples) < 2:
        must = "loss kto needs two answers, as it compares each with the prompt of another"
        raise UserError(must, "one", "add rows", name_of(config.data))
    samples = (
        [] if labels else make_samples(config.sample_prompts, next(iter(validation.values()), training), tokenizer)
    )
    questions = {
        name: make_questions(dataset, tokenizer, config.metric_max_rows)
        for name, dataset in (validation if scores else {}).items()
    }
    identity = {
        "model config": config_fingerprint(checkpoint),
        "tokenizer": tokenizer_fingerprint(tokenizer_folder(folder, config.tokenizer)),
        "data": training.fingerprint() if stream is None else stream.fingerprint(),
    }
    if own:
        identity["chat template"] = str(template)
    if new:
        identity["new tokens"] = new.digest()
    if config.best_metric is not None:  # values on other rows cannot be compared
        identity |= {f"eval data {name}".rstrip(): dataset.fingerprint() for name, dataset in validation.items()}
    model = read_model(checkpoint)
    if config.text_only:
        leave_out(model.modules)
    head_config = headed_config(model, tokenizer, str(folder / "config.json")) if labels else None
    check_names(model, config)
    check_served(model, config)
    if config.init_lora_weights == "loftq" and not config.calibrate:
        linears = [path.removesuffix(".weight") for path in model.linears]
        check_loftq(checkpoint, model.modules, linears, config)
    if new:
        check_new_tokens(model, config, new, size_before)
    loader = make_loader(config, training, stream)
    load = known(loader, config.num_train_epochs, validation.values(), [ids for _, ids in samples])
    load = load.with_rows(assumed(config, config.max_seq_length)) if stream else load
    load = load.with_answers(answers) if answers else load
    if config.has_reference:
        load = replace(load, referenced=sum(len(each.examples) for each in (training, *validation.values())))
    for asked in questions.values():
        lengths = tuple(sorted(len(question.ids) for question in asked))
        size = min(config.per_device_eval_batch_size, len(asked))
        widths = tuple(lengths[min(i + size, len(asked)) - 1] for i in range(0, len(asked), size))
        load = load.with_answers(Answers(size, widths, config.metric_max_new_tokens))
    inputs = PlanInputs(model, config, dtype, load, len(new), num_processes())
    if is_sharded(config):
        check_shardable(model)
    notes = lines_of_few_bits(checkpoint, model, config) + new.notes()
    occurrences = training.stored.count(list(new.texts))
    notes += [
        f"{text} is in none of {rows_of(config)}: all that is learned of it is that it does not come next"
        for text, count in zip(new.texts.values(), occurrences)
        if count == 0
    ]
    if config.adapter is not None:
        check_labels(config.adapter, labels)
        notes += check_trained(config, model, list(inputs.adapted), checkpoint)
        check_same_tokens(tokenizer, new, load_tokenizer(config.model, config.adapter), config.adapter)
        identity["adapter"] = sha256(Path(config.adapter) / WEIGHTS)
    strategy, plan, why = choose_memory(inputs, checkpoint.is_4bit or config.calibrate)
    if config.calibrate:
        plan.disk.append(Term("calibrated base", checkpoint.nbytes // 2, "at most half of the checkpoint"))
    precompute = config.has_reference and config.precompute_reference is not False
    if precompute:
        term = Term("reference", REFERENCE_BYTES * load.referenced, f"{REFERENCE_BYTES} bytes an example")
        must = config.precompute_reference is True or config.adapter is not None
        precompute = must or has_room([*plan.disk, term], Path(config.output))
        plan.disk.extend([term] * precompute)
    check_disk(plan, Path(config.output))
    process = begin_peak(pick_device(config.device))
    form = form_of(training, tokenizer, template)
    form = form.model_copy(update={"end_tokens": ()}) if labels else form  # nothing is written
    unmerged = model.unmerged(checkpoint)
    return Prepared(
        config,
        tokenizer,
        training,
        loader,
        validation,
        plan,
        strategy,
        why,
        dtype,
        identity,
        samples,
        form,
        date,
        process,
        questions,
        scores,
        notes,
        folder,
        saved,
        precompute,
        labels,
        bool(labels) and HEAD_WEIGHT not in model.stored,
        head_config,
        unmerged,
        new,
        occurrences,
    )


def check_shardable(model: Model) -> None:
    """Raise UserError for a model that `parallel fsdp` does not take."""
    paths = [name.rpartition(".")[0] for name in model.quantized]
    outside = next((path for path in paths if layer_of(path) == path), None)
    if outside or not supports_packing(model.modules):
        found = f"{outside} is in 4 bits outside of the layers" if outside else f"{model.text.model_type}'s attention"
        must = "parallel fsdp needs 4-bit weights in decoder layers only, and a model that takes packed rows"
        raise UserError(must, found, "pass --parallel ddp", "parallel")
    layers: dict[Any, set[str]] = {}
    for path, module in model.modules.named_modules(remove_duplicate=False):
        if any(weight.ndim > 1 for weight in module.parameters(recurse=False)):
            layers.setdefault(module, set()).add(layer_of(path))
    shared = next((names for names in layers.values() if len(names) > 1), None)
    if shared:
        must = "parallel fsdp needs layers with weights of their own"
        raise UserError(must, f"{' and '.join(sorted(shared))} share theirs", "pass --parallel ddp", "parallel")


def check_shardable_checkpoint(model: str) -> None:
    """Same as `check_shardable`, of a checkpoint's folder or hub id."""
    check_shardable(read_model(inspect_checkpoint(find_checkpoint(model))))


def rows_of(config: TrainConfig) -> str:
    """Return what new tokens are counted in: a stream's end is not known."""
    return "the first buffer's rows" if config.streaming else "the training rows"


def choose_memory(inputs: PlanInputs, paged_from_file: bool) -> tuple[MemoryStrategy, Plan, str]:
    """Choose what is kept, recomputed, offloaded and paged. Return the strategy, its plan and the reason.

    Raises:
        UserError: no strategy fits in device_memory, or, without that setting, in the free memory.
    """
    config, device = inputs.config, pick_device(inputs.config.device)
    free = available_bytes(device) // (num_beside() if device.type == "cpu" else 1)
    limit = parse_bytes(config.device_memory) if config.device_memory else int(FREE_MEMORY_SHARE * free)
    strategy = strategy_within(inputs, limit)
    plan = fitted(inputs, strategy, limit, paged_from_file)
    of = f"{format_bytes(limit)} given" if config.device_memory else f"{format_bytes(free)} free"
    if plan.total_bytes > (limit if config.device_memory else free):
        raise UserError(
            "the run must fit in memory",
            f"{format_bytes(plan.total_bytes)} with {plan.choice}; {of}",
            "lower max_seq_length or r, or pass --optim paged_adamw_8bit; `onecard plan` with the same settings and "
            "--device-memory says what would fit",
            "device_memory",
        )
    if strategy == MemoryStrategy():
        return strategy, plan, f"everything is kept in memory; {of}"
    kept = f"with everything kept in memory it would be {format_bytes(total_bytes(inputs, MemoryStrategy()))}, {of}"
    return strategy, plan, f"{plan.choice}; {kept}"


def check_disk(plan: Plan, output: Path) -> None:
    """Raise UserError if the run's files do not fit on the disk."""
    free, needed = free_bytes(output), sum(term.num_bytes for term in plan.disk)
    if needed > free:
        parts = ", ".join(f"{term.name} {format_bytes(term.num_bytes)}" for term in plan.disk)
        raise UserError(
            "what the run writes must fit on the disk",
            f"{format_bytes(needed)} ({parts}); {format_bytes(free)} free",
            "free some space, choose another --output, or lower --save-total-limit",
            str(output),
        )


def free_bytes(output: Path) -> int:
    """Return the bytes that a run may write: those that are free, and those of its own files, which a resumed run
    replaces or keeps."""
    there = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.is_dir())
    written = (file for kind in ("checkpoints/*/*", "base/*", FILE) for file in output.glob(kind))
    return shutil.disk_usage(there).free + sum(file.stat().st_size for file in written if file.is_file())


def has_room(terms: list[Term], output: Path) -> bool:
    return sum(term.num_bytes for term in terms) <= free_bytes(output)


def make_loader(config: TrainConfig, training: Dataset, stream: Stream | None = None) -> Loader:
    """Create the loader of the training rows, at the first row."""
    batch = config.per_device_train_batch_size
    row_tokens = config.max_seq_length * config.documents_per_example
    how = (row_tokens, config.packing, batch, config.seed)
    return Loader(training.examples, *how) if stream is None else StreamLoader(stream, *how)
