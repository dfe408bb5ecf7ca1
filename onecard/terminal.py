"""What the commands share: flags that were given, a terminal without libraries' noise, a loaded model."""

from __future__ import annotations

import errno
import io
import logging as standard
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from onecard.errors import one_line, printable

NOISY = [standard.getLogger(name) for name in ("torch", "bitsandbytes")]  # loggers that are silent but for errors


def given(flags: Any) -> dict[str, Any]:
    """The fields that were named on the command line."""
    return {} if flags is None else {k: v for k, v in flags.model_dump().items() if v is not None}


def load(model: str, adapter: str | None, quant: Any, device: str) -> tuple[Any, Any]:
    """A 4-bit model with its adapter, and the tokenizer."""
    from onecard.adapter.load import with_adapter

    base = load_base(model, adapter, quant, device)
    from onecard.hf.load import load_tokenizer

    return with_adapter(base, adapter), load_tokenizer(model, adapter)


def load_base(model: str, adapter: str | None, quant: Any, device: str) -> Any:
    """A 4-bit model, stored as the adapter's run had it."""
    from onecard.data.chat.rendering import sandbox

    sandbox.start()  # takes the second that the libraries take
    quiet_libraries()
    from onecard.adapter.origin import stored_as
    from onecard.hf.load import load_model

    config = stored_as(adapter, given(quant))
    return load_model(model, **config.model_dump(), device=device)


def make_console(quiet: bool = False) -> Any:
    """The terminal; libraries' own bars and warnings are kept off it, and it obeys nothing that a file's texts hold.

    Args:
        quiet: show nothing.
    """
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:  # rich would exit with 1
            self.quiet = True
            raise BrokenPipeError(errno.EPIPE, "nobody reads the output")

    quiet_libraries()
    console = Terminal(quiet=quiet)
    console.push_render_hook(EscapeTexts())  # type: ignore[arg-type]  # by rich's protocol, not by its class
    return console


class EscapeTexts:
    """A hook of rich for all that a console prints."""

    def process_renderables(self, renderables: list[Any]) -> list[Any]:
        return [Escaped(renderable) for renderable in renderables]


class Escaped:
    """What rich prints, with the characters that a terminal would obey as their escapes; rich's own codes stay."""

    def __init__(self, inside: Any):
        self.inside = inside

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        for segment in console.render(self.inside, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def run_app(app: Any) -> None:
    """A cyclopts app with the command line's words."""
    ready_streams()
    try:
        app(joined_flags(sys.argv[1:]), exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except BrokenPipeError:
        reader_gone()


def ready_streams() -> None:
    """Characters that the terminal's or log file's encoding lacks become question marks, not tracebacks; libraries
    that log while they are imported stay silent."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    standard.getLogger("bitsandbytes").setLevel(standard.ERROR)  # peft imports it where it is installed


def reader_gone() -> None:
    """Leave quietly where the output is a pipe that nobody reads any more, as programs do that SIGPIPE ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())  # Python flushes it once more at its end
    sys.exit(128 + 13)


def joined_flags(words: list[str]) -> list[str]:
    """`--use-dora true` as `--use-dora=true`, which the parser takes for flags as for values."""
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
    """Inside, `quiet_libraries` holds. After it, the libraries' settings are those of before."""
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


def read_data(path: str, model: str, adapter: str | None, config: Any) -> Any:
    """A data file's dataset, with the adapter's tokenizer; what the user should know of it is told."""
    quiet_libraries()
    from onecard.data.dataset import load_dataset
    from onecard.hf.load import load_tokenizer

    dataset = load_dataset(path, load_tokenizer(model, adapter), config)
    tell(dataset)
    return dataset


def tell(dataset: Any) -> None:
    """What the user should know of how a data file was read, beside the result, not in it."""
    for notice in dataset.notices:
        print(f"note: {one_line(notice)}", file=sys.stderr)


def finish(result: Any, console: Any) -> None:
    """Where everything lies."""
    where = f"adapter  {result.adapter}\nreport   {result.report_path}"
    console.print(where, highlight=False, markup=False, soft_wrap=True)
    console.print("next", style="dim")
    for line in result.report.next_commands:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
