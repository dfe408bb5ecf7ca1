"""The command line. A command parses, makes a config and calls one function. Heavy imports are inside commands."""

from __future__ import annotations

import sys
from contextlib import suppress

from cyclopts import CycloptsError

from onecard.cli import answering, page, training, writing  # noqa: F401  # they register the commands
from onecard.cli.app import app
from onecard.errors import UserError
from onecard.terminal import run_app
from onecard.torchrun import process_number


def main() -> None:
    """Run the command line. A user's mistake prints its three parts and exits with 2."""
    try:
        run_app(app)
    except (UserError, CycloptsError) as error:
        with suppress(OSError):  # the terminal may be closed
            number = process_number()
            print(f"error{f' in process {number}' * (number > 0)}: {error}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, UserError) else 2)
    except KeyboardInterrupt:
        sys.exit(130)
