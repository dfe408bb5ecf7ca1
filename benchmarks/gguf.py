"""The demo's tuned model as GGUF files in llama.cpp: task accuracy, and its tokens compared with the live adapter's.

    python -m benchmarks.gguf [--adapter DIR]        needs llama-cpp-python

For accuracy, llama.cpp does everything: it renders the chat template, tokenizes, computes and detokenizes. "Same
tokens" counts the answers with exactly the live adapter's tokens when both get the same prompt ids.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp  # type: ignore
import torch
from rich.console import Console

from benchmarks.measure import table, write_result
from onecard.adapter.load import with_adapter
from onecard.config import GgufConfig
from onecard.data.chat.mask import prompt_ids
from onecard.demo.run import SETTINGS, read_rows, run_demo
from onecard.export.gguf.writer import export_gguf
from onecard.hf.load import load_model, load_tokenizer

BASE, HELDOUT = str(SETTINGS["model"]), Path(SETTINGS["eval_data"])
MAX_NEW_TOKENS = 96
OUTTYPES = ("bf16", "f16", "q8_0", "q4_0")


def write_files(adapter: str, folder: Path) -> Iterator[tuple[str, Path, Path | None]]:
    """Write the files. Yield a label, the model's file, and the adapter's file if it is separate."""
    for outtype in OUTTYPES:
        file = folder / f"{outtype}.gguf"
        export_gguf(BASE, adapter, str(file), GgufConfig.model_validate({"outtype": outtype}))
        yield f"merged, {outtype.upper()}", file, None
    base, lora = folder / "base.gguf", folder / "lora.gguf"
    export_gguf(BASE, None, str(base), GgufConfig())
    export_gguf(BASE, adapter, str(lora), GgufConfig(adapter_only=True))
    yield "base, BF16, and adapter", base, lora
    yield "base, BF16, without it", base, None


@torch.no_grad()
def live_answers(adapter: str, tokenizer: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Return greedy tokens of the 4-bit base with its adapter, one prompt at a time, without the end token."""
    model = with_adapter(load_model(BASE, device="cpu"), adapter)
    made = []
    for ids in prompts:
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        made.append([token for token in out[0, len(ids) :].tolist() if token != tokenizer.eos_token_id])
    return made


def answer(model: Any, ids: list[int], end: int) -> list[int]:
    """Return llama.cpp's greedy tokens, without the end token."""
    made = []
    for token in model.generate(ids, temp=0.0):
        if token == end or len(made) == MAX_NEW_TOKENS:
            return made
        made.append(token)
    return made


def said(model: Any, messages: list[dict[str, str]]) -> str:
    """Return llama.cpp's answer to a chat."""
    done = model.create_chat_completion(messages=messages, temperature=0.0, max_tokens=MAX_NEW_TOKENS)
    return done["choices"][0]["message"]["content"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapter", help="of the demo; without it the demo is run")
    args = parser.parse_args()
    tokenizer, rows = load_tokenizer(BASE), read_rows(HELDOUT)
    chats, wanted = [row["messages"][:-1] for row in rows], [row["messages"][-1]["content"] for row in rows]
    prompts = [prompt_ids(chat, tokenizer) for chat in chats]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter = args.adapter or str(run_demo(str(folder / "demo"), Console()).adapter)
        live = live_answers(adapter, tokenizer, prompts)
        hits = sum(tokenizer.decode(a, skip_special_tokens=True) == w for a, w in zip(live, wanted))
        lines = [["live adapter, onecard", f"{hits / len(rows):.1%}", "", ""]]
        for what, file, lora in write_files(adapter, folder):
            threads = {"n_threads": 1, "n_threads_batch": 1}  # at this size more threads only wait for each other
            model = llama_cpp.Llama(str(file), lora_path=lora and str(lora), n_ctx=1024, verbose=False, **threads)
            hits = sum(said(model, chat) == w for chat, w in zip(chats, wanted))
            same = sum(answer(model, ids, tokenizer.eos_token_id) == a for ids, a in zip(prompts, live))
            model.close()
            lines.append([what, f"{hits / len(rows):.1%}", f"{same / len(rows):.1%}", f"{file.stat().st_size:,}"])
            print("  ".join(lines[-1]), flush=True)
    note = f"{len(rows)} held-out messages; llama-cpp-python {llama_cpp.__version__}."
    content = table(["model", "exact match", "same tokens as live", "bytes"], lines)
    print(write_result("gguf", "GGUF files, read by llama.cpp", f"{note}\n\n{content}"))


if __name__ == "__main__":
    main()
