"""Statistical: a file's document, however it is damaged, is read or refused, soon and in little memory.

Damage is drawn from fixed seeds (tests/mutations.py), so that a case that failed can be run again: its number is told.
"""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import GenerationConfig

import onecard
from onecard.adapter.layers import lora_config
from onecard.adapter.load import check_ranks, peft_config, stored_tensors
from onecard.adapter.origin import Origin, read_origin, write_origin
from onecard.adapter.update import read_adapter
from onecard.config import LoraSettings, SamplingConfig, TrainConfig, make_config
from onecard.documents import read_yaml
from onecard.errors import UserError, printable
from onecard.hf.checkpoint import inspect_checkpoint, read_header, read_index
from onecard.hf.load import check_generation_config, load_tokenizer
from onecard.hf.skeleton import meta_model, read_config
from onecard.infer.decoding import end_tokens
from onecard.infer.sampling import Sampler
from onecard.quant.state import STATE_KEY, from_bnb, to_bnb
from onecard.train.checkpoint import load_newest, numbered, save_state
from onecard.train.metrics import Metrics
from tests.conftest import make_checkpoint
from tests.mutations import mutated

CASES, SLOW_CASES = 2_000, 100_000
MOST_SECONDS = 10
MOST_BYTES = 1 << 30  # that the process grows by, over all cases of a document


class TooSlow(BaseException):
    """Not an Exception, which a reader may take for the document's fault."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TooSlow in the block after so many seconds of work; other programs' do not count."""

    def stop(*_: Any) -> None:
        raise TooSlow(f"more than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


class Documents:
    """A sound file of each kind, and what reads it; a damaged one is put in its place."""

    def __init__(self, root: Path):
        self.root = root
        self.base = make_checkpoint(root / "base", num_hidden_layers=1, tie_word_embeddings=False)
        model = onecard.load_model(str(self.base), device="cpu")
        self.adapter = root / "adapter"
        settings = make_config(LoraSettings, {"r": 4, "target_modules": ["q_proj", "down_proj"]})
        get_peft_model(model, lora_config(settings)).save_pretrained(self.adapter)
        write_origin(
            self.adapter, Origin(model="base", quant_type="nf4", blocksize=64, double_quant=True, sample="0" * 64)
        )
        packed, state = onecard.quantize_4bit(torch.randn(64, 128))
        self.stored = to_bnb(packed, state)
        self.state_key = f".{STATE_KEY}nf4"
        self.checkpoints = root / "checkpoints"
        save_state(self.checkpoints, 7, {"adapter": {"w": torch.ones(2)}}, {"progress": {"step": 7}}, keep=2)

    def kinds(self) -> dict[str, tuple[Any, Callable[[bytes], object]]]:
        """name -> (what a sound document says, what reads its bytes)."""
        config = self.base / "config.json"
        raw = (self.base / "model.safetensors").read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        index = {"metadata": {"total_size": 9}, "weight_map": dict.fromkeys(header, "model.safetensors")}
        generation = {
            "eos_token_id": [3, 1],
            "pad_token_id": 0,
            "temperature": 0.6,
            "top_p": 0.9,
            "top_k": 50,
            "do_sample": True,
            "repetition_penalty": 1.1,
            "max_length": 4096,
            "transformers_version": "5.23.0",
        }
        stored = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "llm_int8_skip_modules": ["lm_head"],
        }
        settings = {
            "model": "m",
            "data": "d",
            "output": "o",
            "r": 8,
            "learning_rate": 2e-4,
            "target_modules": ["q_proj"],
            "loggers": [],
            "sample_prompts": ["hi"],
            "device_memory": "6GiB",
            "packing": True,
            "max_steps": 5,
        }
        manifest = self.checkpoints / "checkpoint-7" / "manifest.json"
        rows = [{"step": 1, "loss": 2.5, "learning_rate": 1e-4}, {"step": 2, "loss": 2.4}]
        peft = json.loads((self.adapter / "adapter_config.json").read_text()) | {
            "alpha_pattern": {"q_proj": 8.0},
            "rank_pattern": {"q_proj": 4},
            "target_modules": ["q_proj", "down_proj"],
        }
        return {
            "header": (header, lambda b: self.header(b, raw[8 + length :])),
            "index": (index, lambda b: placed(self.root / "index.json", b, read_index)),
            "config": (json.loads(config.read_text()), self.config),
            "quantization_config": (
                json.loads(config.read_text()) | {"quantization_config": stored},
                self.config,
            ),
            "generation_config": (generation, self.generation),
            "tokenizer_config": (json.loads((self.base / "tokenizer_config.json").read_text()), self.tokenizer),
            "quant_state": (json.loads(bytes(self.stored[self.state_key].tolist())), self.quant_state),
            "adapter_config": (peft, self.adapter_config),
            "onecard": (json.loads((self.adapter / "onecard.json").read_text()), self.origin),
            "manifest": (json.loads(manifest.read_text()), self.manifest),
            "progress": ({"step": 7}, self.progress),
            "metrics": (rows, self.metrics),
            "yaml": (settings, lambda b: placed(self.root / "run.yaml", b, self.run_settings)),
        }

    def header(self, raw: bytes, data: bytes) -> object:
        path = self.root / "m.safetensors"
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
        return read_header(path)

    def config(self, raw: bytes) -> object:
        def read(path: Path) -> None:
            meta_model(read_config(path.parent), str(path), inspect_checkpoint(path.parent))

        return placed(self.base / "config.json", raw, read)

    def generation(self, raw: bytes) -> object:
        def read(path: Path) -> None:
            inspect_checkpoint(path.parent)
            check_generation_config(path.parent)
            found = GenerationConfig.from_pretrained(path.parent)
            model: Any = type("Model", (), {"generation_config": found})
            for temperature in (0.0, None):
                Sampler(model, SamplingConfig(temperature=temperature)).pick([5, 6], torch.randn(1, 300))
            assert all(type(i) is int for i in end_tokens(found.eos_token_id, type("T", (), {"eos_token_id": 3})))

        return placed(self.base / "generation_config.json", raw, read)

    def tokenizer(self, raw: bytes) -> object:
        def read(path: Path) -> None:
            tokenizer = load_tokenizer(str(path.parent))
            tokenizer("how many mugs do you want?")

        return placed(self.base / "tokenizer_config.json", raw, read)

    def quant_state(self, raw: bytes) -> object:
        parts = {**self.stored, self.state_key: torch.frombuffer(bytearray(raw or b" "), dtype=torch.uint8)}
        return onecard.dequantize_4bit(*from_bnb("w", parts))

    def adapter_config(self, raw: bytes) -> object:
        def read(path: Path) -> None:
            peft_config(path.parent)
            read_adapter(path.parent)

        return placed(self.adapter / "adapter_config.json", raw, read)

    def origin(self, raw: bytes) -> object:
        return placed(self.adapter / "onecard.json", raw, lambda path: read_origin(path.parent))

    def manifest(self, raw: bytes) -> object:
        return placed(self.checkpoints / "checkpoint-7" / "manifest.json", raw, lambda _: load_newest(self.checkpoints))

    def progress(self, raw: bytes) -> object:
        """A document of a checkpoint, whose hash holds."""
        manifest = self.checkpoints / "checkpoint-7" / "manifest.json"
        found = json.loads(manifest.read_text())
        found["files"]["progress.json"] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        text = json.dumps(found).encode()
        path = manifest.with_name("progress.json")
        return placed(path, raw, lambda _: placed(manifest, text, lambda _: load_newest(self.checkpoints)))

    def metrics(self, raw: bytes) -> object:
        folder = self.root / "metrics"
        folder.mkdir(exist_ok=True)
        (folder / "metrics.jsonl").write_bytes(raw.replace(b"[{", b"{").replace(b"}]", b"}").replace(b"}, {", b"}\n{"))
        made = Metrics(folder, [], {}, 5)
        made.log(step=6, loss=1.0)
        return made.close()

    def run_settings(self, path: Path) -> object:
        return make_config(TrainConfig, read_yaml(path), str(path))


KINDS = (
    "header",
    "index",
    "config",
    "quantization_config",
    "generation_config",
    "tokenizer_config",
    "quant_state",
    "adapter_config",
    "onecard",
    "manifest",
    "progress",
    "metrics",
    "yaml",
)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    return Documents(tmp_path_factory.mktemp("documents"))


SAID = {  # what each must end in, and a word of the error
    "an integer of 5,000 digits": ("yaml", b"r: " + b"9" * 5000, "integer"),
    "an integer of 6,000 hexadecimal digits": ("yaml", b"r: 0x" + b"f" * 6000, "integer"),
    "3,000 levels of YAML": ("yaml", b"a: " + b"[" * 3000, "levels"),
    "a reference": ("yaml", b"model: &a [x]\ndata: *a", "reference"),
    "a reference to itself": ("yaml", b"model: &a [*a]", "reference"),
    "an impossible date": ("yaml", b"seed: 2020-99-99", "month"),
    "a tag": ("yaml", b'model: !!binary "="', "tag"),
    "an infinite alpha": ("yaml", b"{model: m, data: d, output: o, lora_alpha: .inf}", "no float holds"),
    "a key twice": ("onecard", b'{"model": "a", "model": "b"}', "twice"),
    "a key of no version": (
        "onecard",
        b'{"model": "a", "quant_type": "nf4", "blocksize": 64, "double_quant": true, "sample": "%s", "modell": 1}'
        % (b"0" * 64),
        "modell",
    ),
    "100,000 levels of JSON": ("quant_state", b"[" * 4000, "levels"),
    "NaN": ("generation_config", b'{"temperature": NaN}', "NaN"),
    "more than a float holds": ("adapter_config", b'{"peft_type": "LORA", "r": 4, "lora_alpha": 1e999}', "1e999"),
    "alpha as text": ("adapter_config", b'{"peft_type": "LORA", "r": 4, "lora_alpha": "8"}', "lora_alpha"),
    "a pattern that is none": (
        "adapter_config",
        b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "alpha_pattern": {"(": 1}}',
        "regular expression",
    ),
    "a temperature as text": ("generation_config", b'{"temperature": "hot"}', "temperature"),
    "a length as text": ("tokenizer_config", b'{"model_max_length": "long"}', "model_max_length"),
    "half of a surrogate pair": ("header", b'{"\\ud800": {}}', "surrogate"),
}


@pytest.mark.parametrize("name", list(SAID))
def test_what_is_wrong_is_said(name, documents):
    kind, raw, said = SAID[name]
    with pytest.raises(UserError, match=said):
        documents.kinds()[kind][1](raw)


def test_brackets_that_stay_open_are_refused_at_once(documents):
    """PyYAML alone takes a second, as it looks for a key behind each of them at each of them."""
    with at_most(0.5), pytest.raises(UserError, match="levels"):
        documents.kinds()["yaml"][1](b"[" * 200_000)


@pytest.mark.parametrize("count", [10**4, 10**5, 10**12])
def test_far_more_layers_than_there_are_tensors_are_refused_soon(count, documents):
    config = json.loads((documents.base / "config.json").read_text()) | {"num_hidden_layers": count}
    with at_most(MOST_SECONDS), pytest.raises(UserError, match=r"num_hidden_layers|weights in 12 tensors"):
        documents.config(json.dumps(config).encode())


def test_far_wider_layers_than_there_are_weights_are_refused_before_they_are_made(documents):
    config = json.loads((documents.base / "config.json").read_text()) | {"intermediate_size": 10**9}
    with pytest.raises(UserError, match="weights in 12 tensors"):
        placed(
            documents.base / "config.json",
            json.dumps(config).encode(),
            lambda path: onecard.load_model(str(path.parent), device="cpu"),
        )


def test_a_rank_far_above_that_of_the_tensors_is_refused_before_it_is_made(documents):
    config = json.loads((documents.adapter / "adapter_config.json").read_text()) | {"r": 1 << 16}
    with pytest.raises(UserError, match="rank must be that of the tensors, 4 in"):
        placed(
            documents.adapter / "adapter_config.json",
            json.dumps(config).encode(),
            lambda path: check_ranks(path.parent, stored_tensors(path.parent)),
        )


def test_only_plain_digits_number_a_checkpoint(documents, tmp_path):
    shutil.copytree(documents.checkpoints / "checkpoint-7", tmp_path / "checkpoint-7")
    for digits in ("\u00b2", "\u0669", "08", "9" * 30, "-9", "+9", " 9"):
        (tmp_path / f"checkpoint-{digits}").mkdir()
    assert [path.name for path in numbered(tmp_path)] == ["checkpoint-7"]
    assert load_newest(tmp_path).step == 7


def placed(path: Path, raw: bytes, read: Callable[[Path], Any]) -> Any:
    """What reads the file says of these bytes; the sound ones are put back."""
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(raw)
    try:
        return read(path)
    finally:
        path.write_bytes(before) if before is not None else path.unlink()


def run_case(kind: str, number: int, sound: Any, read: Callable[[bytes], object]) -> str:
    """What came of a case: "read", "refused", or what went wrong."""
    raw = mutated(Random(f"{kind} {number}"), sound)
    try:
        with at_most(MOST_SECONDS):
            read(raw)
    except UserError as error:
        assert printable(str(error)) == str(error) and len(str(error)) < 20_000
        return "refused"
    except (Exception, TooSlow) as error:
        return f"{type(error).__name__} of case {number}: {str(error)[:200]}"
    return "read"


def check(kind: str, documents: Any, numbers: range) -> None:
    sound, read = documents.kinds()[kind]
    read(sound.encode() if isinstance(sound, str) else json.dumps(sound).encode())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = Counter(run_case(kind, number, sound, read) for number in numbers)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert not set(found) - {"read", "refused"}, found.most_common(20)
    assert found["read"] and (found["refused"] or kind == "metrics"), found  # damaged rows of metrics are left out
    assert grown < MOST_BYTES, grown


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_document_is_read_or_refused(kind, documents):
    check(kind, documents, range(CASES))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_documents_are_read_or_refused(kind, documents):
    check(kind, documents, range(CASES, SLOW_CASES))
