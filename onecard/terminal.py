"""Code that the commands share: given flags, a terminal without messages from libraries, a loaded model."""

from __future__ import annotations

import errno
import io
import logging as standard
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import UnionType
from typing import Annotated, Any, Literal, Optional, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, create_model

from onecard.errors import one_line, printable
from onecard.torchrun import process_number

# Loggers that may show only errors
NOISY = [standard.getLogger(name) for name in ("torch", "bitsandbytes", "matplotlib")]


def partial(kind: type[BaseModel]) -> type[BaseModel]:
    """Make a model of the same fields, all optional with default None. Flags set it before the merge with a file."""
    fields: dict[str, Any] = {}
    required_first = sorted(kind.model_fields.items(), key=lambda item: not item[1].is_required())
    for name, info in required_first:
        value = info.default if info.default is not None else "none"
        default = "required" if info.is_required() else f"default: {value}"
        if info.default_factory is not None:
            default = "default: none"
        help = "; ".join(part for part in (info.description, default) if part)
        fields[name] = (Optional[flag_kind(info.annotation)], Field(None, description=help))  # noqa: UP045
    return create_model(f"{kind.__name__}Flags", __config__=ConfigDict(protected_namespaces=()), **fields)


def flag_kind(annotation: Any) -> Any:
    """Return the type of a field's flag. If it may be a list, it is one, so that it can be repeated. A mapping of
    texts, and a list that may have mappings, is a list of texts, which the field's own check reads; a choice of numbers
    is a number, as a flag is a text first."""
    kinds = alternatives(annotation)
    if any(get_origin(kind) is Literal and isinstance(get_args(kind)[0], int) for kind in kinds):
        return int
    if dict[str, str] in kinds or dict[int, float] in kinds:
        return list[str]
    found = next((kind for kind in kinds if get_origin(kind) is list), annotation)
    inside = get_args(found)[0] if get_origin(found) is list else None
    return list[str] if str in get_args(inside) else found


def alternatives(annotation: Any) -> list[Any]:
    """Return the types that a union may have, without what annotates them."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for each in get_args(annotation) for kind in alternatives(each)]
    return [annotation]


def given(flags: Any) -> dict[str, Any]:
    """Return the fields that the command line sets."""
    return {} if flags is None else {k: v for k, v in flags.model_dump().items() if v is not None}


def load(model: str, adapter: str | None, quant: Any, device: str, sharded: bool = False) -> tuple[Any, Any]:
    """Load a 4-bit model with its adapter, and the tokenizer. `sharded`: same as in `load_model`."""
    from onecard.adapter.load import with_adapter

    base = load_base(model, adapter, quant, device, sharded=sharded)
    from onecard.hf.load import load_tokenizer

    return with_adapter(base, adapter), load_tokenizer(model, adapter)


def load_headed(model: str, adapter: str | None, quant: Any, device: str, labels: tuple[str, ...]) -> Any:
    """Load a 4-bit model with the classification head of a checkpoint or an adapter."""
    from onecard.adapter.load import with_adapter

    return with_adapter(load_base(model, adapter, quant, device, labels), adapter)


def load_base(
    model: str, adapter: str | None, quant: Any, device: str, labels: tuple[str, ...] = (), sharded: bool = False
) -> Any:
    """Load a 4-bit model, quantized in the same way as in the adapter's run. An adapter with a classification head is
    refused unless its labels are given. `sharded`: same as in `load_model`."""
    from onecard.data.chat.rendering import sandbox

    sandbox.start()  # starts while the libraries load, which also takes a second
    quiet_libraries()
    from onecard.adapter.head import refuse_head
    from onecard.adapter.origin import stored_as
    from onecard.hf.load import load_model

    config = stored_as(adapter, given(quant))
    if not labels:
        refuse_head(adapter, "this command")
    return load_model(model, **config.model_dump(), device=device, labels=labels, sharded=sharded)


def make_console(quiet: bool = False) -> Any:
    """Make the terminal's console, without libraries' bars and warnings. It escapes control characters from files.

    Args:
        quiet: show nothing; nor does any but the first of several processes.
    """
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:  # rich would exit with 1
            self.quiet = True
            raise BrokenPipeError(errno.EPIPE, "nobody reads the output")

    quiet_libraries()
    console = Terminal(quiet=quiet or process_number() > 0)
    console.push_render_hook(EscapeTexts())  # type: ignore[arg-type]  # follows rich's protocol, not its class
    return console


class EscapeTexts:
    """A hook of rich that escapes all that a console prints."""

    def process_renderables(self, renderables: list[Any]) -> list[Any]:
        return [Escaped(renderable) for renderable in renderables]


class Escaped:
    """A rich renderable in which characters that control a terminal are escaped. rich's own codes stay."""

    def __init__(self, inside: Any):
        self.inside = inside

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        for segment in console.render(self.inside, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def run_app(app: Any) -> None:
    """Run a cyclopts app with the arguments of the command line."""
    ready_streams()
    try:
        app(joined_flags(sys.argv[1:]), exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except BrokenPipeError:
        reader_gone()


def ready_streams() -> None:
    """Write characters that the output's encoding lacks as question marks, instead of a traceback. Silence libraries
    that log on import."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    standard.getLogger("bitsandbytes").setLevel(standard.ERROR)  # peft imports it where it is installed


def reader_gone() -> None:
    """Exit silently if the output is a pipe without a reader, with the status of a program that SIGPIPE ended."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())  # Python flushes it once more at exit
    sys.exit(128 + 13)


def joined_flags(words: list[str]) -> list[str]:
    """Join `--use-dora true` to `--use-dora=true`, which the parser accepts for flags and values."""
    joined: list[str] = []
    for word in words:
        if word.lower() in ("true", "false") and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def quiet_libraries() -> None:
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for logger in NOISY:
        logger.setLevel(standard.ERROR)
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", module=r"onecard\.")
    warnings.formatwarning = lambda message, *args, **kwargs: f"warning: {one_line(str(message))}\n"


@contextmanager
def quiet_process() -> Iterator[None]:
    """Apply `quiet_libraries` inside the block. After it, restore the libraries' settings."""
    import warnings

    from transformers.utils import logging

    levels = [logger.level for logger in NOISY]
    verbosity, bars, line = logging.get_verbosity(), logging.is_progress_bar_enabled(), warnings.formatwarning
    try:
        with warnings.catch_warnings():
            quiet_libraries()
            yield
    finally:
        warnings.formatwarning = line
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        for logger, level in zip(NOISY, levels):
            logger.setLevel(level)


def read_data(data: Any, model: str, adapter: str | None, config: Any, objective: str = "sft") -> Any:
    """Load a dataset with the adapter's tokenizer, and print its notices.

    Args:
        objective: the loss, or the task of a head, that reads it.
    """
    quiet_libraries()
    from onecard.data.chat.template import set_template
    from onecard.data.load import load_dataset
    from onecard.hf.load import load_tokenizer

    tokenizer = load_tokenizer(model, adapter)
    set_template(tokenizer, config.chat_template, config.template_variables)
    dataset = load_dataset(data, tokenizer, config, objective)
    tell(dataset)
    return dataset


def tell(dataset: Any) -> None:
    """Print the notices about how data was read, on stderr and not in the result, by the first process alone."""
    for notice in dataset.notices if process_number() == 0 else ():
        print(f"note: {one_line(notice)}", file=sys.stderr)


def finish(result: Any, console: Any) -> None:
    """Print where the adapter and the report are, and the next commands."""
    where = f"adapter  {result.adapter}\nreport   {result.report_path}"
    console.print(where, highlight=False, markup=False, soft_wrap=True)
    console.print("next", style="dim")
    for line in result.report.next_commands:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
