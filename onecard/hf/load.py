"""load_model: loads a checkpoint folder as a frozen 4-bit model, one tensor at a time."""

from __future__ import annotations

import datetime
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from onecard.config import HEAD, QuantConfig, make_config
from onecard.errors import UserError, first_line
from onecard.hf.checkpoint import Checkpoint, as_indexed, inspect_checkpoint, zeros_at_end
from onecard.hf.convert import kept, leave_files, paging, release_file_pages
from onecard.hf.documents import read_model_document, read_processor_template, read_tokenizer_document
from onecard.hf.gguf.folder import check_tokenizer, check_tokens, gguf_folder, is_gguf, source_in
from onecard.hf.head import causal_head_names, is_headed, model_class, set_pad, start_head
from onecard.hf.quantizer import BitsAndBytesConfig, as_dtype
from onecard.hf.report import check_report
from onecard.hf.skeleton import bad_config, kept_packed, meta_model, read_config, stored_dtype
from onecard.hf.stored import Lazy, TensorInfo
from onecard.kernels.cpu_info import product_dtype
from onecard.nn.embedding import Head, cast_output
from onecard.nn.linear import Linear4bit
from onecard.paging.files import Segment
from onecard.paging.sharded import ShardedBase, is_of_exchange
from onecard.paging.weights import PagedBase

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SUSPICIOUS_ZEROS = 1 << 16
STRFTIME_NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "tokenizer*", "README.md")
OTHER_WEIGHTS = ("*/*.safetensors", "consolidated*")  # duplicates for other programs; a hub's * also matches /


def load_model(
    model: str,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype | str = "auto",
    device: str = "auto",
    weights_budget: int | None = None,
    page_folder: str | Path | None = None,
    labels: Sequence[str] = (),
    sharded: bool = False,
    text_only: bool = False,
) -> PreTrainedModel:
    """Load a causal language model with its linears in 4 bits, or one with a classification head.

    Args:
        model: checkpoint folder, or a hub id if there is a network. Its linears are in 16 or 32 bits, or in
            bitsandbytes' 4-bit format. Its experts may be in MXFP4, and its linears in the forms that docs/formats.md
            calls packed; they keep it.
        quant_type, blocksize, double_quant: same as in quantize_4bit. A 4-bit checkpoint keeps its own.
        compute_dtype: dtype that weights are dequantized to. "auto" is bfloat16 if the device multiplies it
            natively, else float16 on GPUs and float32 on CPUs.
        device: "auto", "cpu", "cuda" or "cuda:N".
        weights_budget: bytes of the base that may be on the device at a time. None: all of it.
        page_folder: folder for a 16-bit checkpoint's codes if weights_budget is given. Their file is deleted when the
            process ends. None: the user's cache.
        labels: names of a classification head's outputs. The model is then transformers' ...ForSequenceClassification,
            with a new head of random values if the checkpoint has none. It is not paged.
        sharded: keep only this process's part of each 4-bit weight, and gather a layer's where it computes. All
            processes of torch.distributed must load the model, and make the same passes in the same order.
        text_only: leave out of memory the parts of a multimodal model that text does not pass through. Their tensors
            have no elements then. save_pretrained refuses such a model.

    Returns:
        transformers' model, frozen, in eval mode. Codes are uint8. Embeddings and head have the narrower dtype of the
        checkpoint's and the compute dtype.

    Raises:
        UserError: a damaged, incomplete or pickle-only checkpoint, with the file and the tensor.
    """
    fields = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": double_quant}
    checked = make_config(QuantConfig, fields, "load_model")
    target = pick_device(device)
    dtype = pick_compute_dtype(compute_dtype, target)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=checked.quant_type,
        bnb_4bit_blocksize=checked.blocksize,
        bnb_4bit_use_double_quant=checked.double_quant,
        bnb_4bit_compute_dtype=dtype,
        _text_only=text_only,
    )
    checkpoint = replace(inspect_checkpoint(find_checkpoint(model)), labels=tuple(labels))
    folder = Path(page_folder or Path.home() / ".cache" / "onecard")
    if sharded:
        host = torch.device("cpu")  # where a tensor is a mapped file, of which only what is used is read
        loaded = load_paged(checkpoint, config, host, dtype, ShardedBase(folder, target))
    elif weights_budget is None or labels:
        loaded = from_pretrained(checkpoint, config, target, dtype)
    else:
        loaded = load_paged(checkpoint, config, target, dtype, PagedBase(weights_budget, folder, target))
    loaded.requires_grad_(False)
    loaded.eval()
    return loaded


def load_paged(
    checkpoint: Checkpoint,
    config: BitsAndBytesConfig,
    device: torch.device,
    dtype: torch.dtype,
    base: PagedBase | ShardedBase,
) -> PreTrainedModel:
    """Same as from_pretrained, but move every 4-bit weight to `base` when it is loaded."""
    files = {file: file.open("rb") for file in checkpoint.files}
    base.open += files.values()
    places = {
        name: Segment(files[info.file].fileno(), info.begin, info.nbytes) for name, info in checkpoint.tensors.items()
    }
    token = paging.set((base, places))
    try:
        model = from_pretrained(checkpoint, config, device, dtype)
    finally:
        paging.reset(token)
    modules: tuple[Any, Any] = (model.get_input_embeddings(), model.get_output_embeddings())
    found = []
    for module in modules:
        info = checkpoint.tensors.get(name := next((n for n, p in model.named_parameters() if p is module.weight), ""))
        stored = TORCH_DTYPES.get(info.dtype) if info and info.form is None else None
        if stored is not None:
            found.append((places[name], stored))
        else:  # the checkpoint has another name for it, or another form
            found.append((base.write(module.weight), module.weight.dtype))
        release_file_pages(module.weight)
    base.start(model, dtype, *found)
    return model


def is_hub_id(model: str) -> bool:
    """Whether a name looks like ORG/ID and is not a file or folder."""
    return not Path(model).expanduser().exists() and model.count("/") == 1 and not model.startswith((".", "/", "~"))


def find_checkpoint(model: str, weights: bool = True) -> Path:
    """Return a checkpoint's folder. For a GGUF file, it is made in the cache. For a hub id, download safetensors (if
    `weights`), config and tokenizer."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if is_gguf(path):
        return gguf_folder(path)
    if is_hub_id(model):
        from huggingface_hub import snapshot_download

        wanted = [*SMALL_FILES, *(["*.safetensors"] if weights else [])]
        try:
            return Path(snapshot_download(model, allow_patterns=wanted, ignore_patterns=list(OTHER_WEIGHTS)))
        except Exception as error:
            raise UserError(
                "the model must be a folder or a hub id in reach", first_line(error), "check name and network", model
            ) from None
    must = "the model must be a checkpoint folder or a .gguf file"
    raise UserError(must, "no such folder or file", "check the path", model)


def from_pretrained(
    checkpoint: Checkpoint, config: BitsAndBytesConfig, device: torch.device, compute_dtype: torch.dtype
) -> PreTrainedModel:
    """Load with transformers, and raise an error for every problem in its report."""
    folder = checkpoint.folder
    stored = stored_dtype(folder)
    narrow = stored if stored.itemsize < compute_dtype.itemsize else compute_dtype
    warn_of_zeros(checkpoint)
    check_generation_config(folder)
    model_config, labels = read_config(folder), checkpoint.labels
    was_headed = is_headed(model_config)
    modules = meta_model(model_config, str(folder / "config.json"), checkpoint, labels)
    if labels:
        set_pad(model_config, load_tokenizer(str(folder)), was_headed, str(folder / "config.json"))
    kind: Any = type(modules) if checkpoint.kinds else model_class(model_config, labels)
    packed = kept_packed(modules, checkpoint)
    token = kept.set(packed)
    try:
        with source_of(checkpoint, packed.values()) as source:
            loaded: Any = kind.from_pretrained(
                **source,
                **how_quantized(checkpoint, config, model_config),
                dtype=narrow,
                device_map={"": device},
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # so that the report names them
                output_loading_info=True,
            )
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # from transformers, about a value of the config
        if is_of_exchange(error):
            raise
        raise bad_config(error, str(folder / "config.json")) from error
    finally:
        kept.reset(token)
    model, report = loaded
    model.name_or_path = model.config._name_or_path = str(checkpoint.source)
    if labels and not was_headed:
        settle_head(model, report, folder)
    check_report(report, folder)
    if checkpoint.kinds:
        set_generation_config(model, folder)
    if narrow != compute_dtype:
        compute_in(model, compute_dtype)
    leave_files(model)
    return model


@contextmanager
def source_of(checkpoint: Checkpoint, packed: Collection[TensorInfo] = ()) -> Iterator[dict[str, Any]]:
    """Yield from_pretrained's arguments for the weights: a folder, or tensors that are converted when it reads them.

    Args:
        packed: weights that stay packed.
    """
    if checkpoint.kinds:
        ids = set(map(id, packed))
        tensors = {name: Lazy(info, id(info) in ids) for name, info in checkpoint.tensors.items()}
        yield {"pretrained_model_name_or_path": None, "state_dict": tensors}
    else:
        with as_indexed(checkpoint) as indexed:
            yield {"pretrained_model_name_or_path": indexed, "use_safetensors": True}


def set_generation_config(model: Any, folder: Path) -> None:
    """Set the checkpoint's generation config, which transformers reads itself only with the weights."""
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def settle_head(model: Any, report: dict[str, Any], folder: Path) -> None:
    """Start the head that a causal model's checkpoint lacks, and take the two heads' tensors out of the report."""
    start_head(model, seed=0)  # the same values in each load
    causal = meta_model(read_config(folder), str(folder / "config.json"))
    report["missing_keys"] = {key for key in report["missing_keys"] if not key.startswith(f"{HEAD}.")}
    report["unexpected_keys"] = set(report["unexpected_keys"]) - causal_head_names(causal)


def how_quantized(checkpoint: Checkpoint, config: BitsAndBytesConfig, model_config: Any) -> dict[str, Any]:
    """Return from_pretrained's arguments for a checkpoint to quantize, or for a quantized one."""
    if checkpoint.kinds:
        vars(model_config).pop("quantization_config", None)
        return {"quantization_config": config, "config": model_config}
    if not checkpoint.is_4bit and not checkpoint.is_mxfp4:
        return {"quantization_config": config, **({"config": model_config} if checkpoint.labels else {})}
    if checkpoint.is_4bit:
        stored = checkpoint.config["quantization_config"]
        config.llm_int8_skip_modules = stored.get("llm_int8_skip_modules")
        if checkpoint.labels and config.llm_int8_skip_modules is not None:
            config.llm_int8_skip_modules = [*config.llm_int8_skip_modules, HEAD]
        config.bnb_4bit_quant_type = stored.get("bnb_4bit_quant_type", "fp4")  # also of its 16-bit experts
        config.bnb_4bit_use_double_quant = stored.get("bnb_4bit_use_double_quant", False)
    own = {"_linears_in_16_bits": checkpoint.is_mxfp4, "_text_only": config.text_only}
    fields = {key: value for key, value in vars(config).items() if key != "load_in_4bit" and f"_{key}" not in own}
    # With load_in_4bit or its own method, transformers would use bitsandbytes' or its own quantizer.
    model_config.quantization_config = fields | own
    return {"config": model_config}


def check_generation_config(folder: Path) -> None:
    """Raise UserError for a generation_config.json that transformers would ignore or fail to load."""
    path = folder / "generation_config.json"
    try:
        GenerationConfig.from_pretrained(folder) if path.is_file() else None
    except Exception as error:
        found = f"{type(error).__name__}: {first_line(error)}"
        raise UserError("the file must be a generation config", found, "correct or remove it", str(path)) from None


def warn_of_zeros(checkpoint: Checkpoint) -> None:
    """Warn if a file ends in zeros. An interrupted download whose space was reserved looks like this."""
    for file in checkpoint.files:
        zeros = zeros_at_end(file)
        if zeros >= SUSPICIOUS_ZEROS:
            line = f"{file} ends in {zeros:,} bytes of zeros: if that is no part of the model, fetch the file again"
            warnings.warn(line, stacklevel=2)


def compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Compute in a wider dtype than the stored one: cast all small parameters, and the embedding's output by a hook."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    large = {id(embedding.weight)} | ({id(head.weight)} if head is not None else set())
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in large:
            parameter.data = parameter.data.to(dtype)
    embedding.register_forward_hook(cast_output(dtype))


def resize_vocabulary(model: Any, num_tokens: int) -> None:
    """Resize with transformers. The new embedding and head lack our hook and class; set both again."""
    dtype = next(module.compute_dtype for module in model.modules() if isinstance(module, Linear4bit))
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if dtype is not None and embedding.weight.dtype != dtype:
        embedding.register_forward_hook(cast_output(dtype))
    if type(head) is torch.nn.Linear:
        model.set_output_embeddings(Head(head))


def pick_device(device: str) -> torch.device:
    """Return the device. "auto" is the first GPU, or the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise UserError("device must be auto, cpu, cuda or cuda:N", repr(device), "correct it", "device") from None
    if picked.type not in ("cpu", "cuda"):
        raise UserError("device must be auto, cpu, cuda or cuda:N", repr(device), "correct it", "device")
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda needs a GPU that torch sees", "none", "use --device cpu", "device")
    return picked


def pick_compute_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """Return the compute dtype. "auto" is bfloat16 if it is native, else float16 on GPUs and float32 on CPUs."""
    if dtype != "auto":
        return as_dtype(dtype)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return product_dtype(torch.bfloat16, device.type)


def fix_date(tokenizer: Any, date: datetime.date) -> None:
    """Make the tokenizer's chat templates write `date` instead of today's date.

    A run that resumes on another day must have the same tokens as before.
    """

    def write(call: re.Match[str]) -> str:
        return repr(date.strftime(call[2]))

    found = tokenizer.chat_template
    if isinstance(found, str):
        tokenizer.chat_template = STRFTIME_NOW.sub(write, found)
    elif found:
        tokenizer.chat_template = {name: STRFTIME_NOW.sub(write, text) for name, text in found.items()}


def tokenizer_folder(checkpoint: Path, adapter: str | Path | None) -> Path:
    """Return the tokenizer's folder: the adapter's if it has a tokenizer (for added tokens), else the checkpoint's."""
    names = ("tokenizer_config.json", "tokenizer.json")
    own = adapter is not None and any((Path(adapter) / name).is_file() for name in names)
    return Path(adapter) if own and adapter is not None else checkpoint


def load_tokenizer(model: str, adapter: str | Path | None = None) -> Any:
    """Load the adapter's tokenizer, or else the checkpoint's.

    Args:
        adapter: an adapter's folder, or a folder of a tokenizer only.

    Raises:
        UserError: none works; a GGUF file says not all of its tokenizer, or has other tokens.
    """
    checkpoint = find_checkpoint(model, weights=False)
    folder = tokenizer_folder(checkpoint, adapter)
    file = source_in(checkpoint)
    if file is not None and folder == checkpoint and not (folder / "tokenizer.json").is_file():
        check_tokenizer(file)  # it raises
    read_tokenizer_document(folder)
    if (folder / "config.json").is_file():  # transformers may read it
        read_model_document(folder)
    must, do = "the checkpoint folder must hold a tokenizer", "copy its tokenizer files there"
    with tokenizing(must, do, str(folder)):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer("a")
    if not tokenizer.chat_template:
        tokenizer.chat_template = read_processor_template(folder)  # a processor's, which a tokenizer does not read
    if file is not None and folder != checkpoint:
        check_tokens(file, tokenizer, folder)
    return tokenizer


@contextmanager
def tokenizing(must: str, do: str, where: str) -> Iterator[None]:
    """Raise UserError if a tokenizer fails in the body.

    The tokenizers library is in Rust. An unexpected tokenizer.json causes a panic, which is not an Exception, when the
    file is read or later, when a text is tokenized.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(must, first_line(error), do, where) from None
