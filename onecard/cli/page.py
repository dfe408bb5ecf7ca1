"""The command of the page."""

from __future__ import annotations

import os

from onecard.cli.app import StudioFields, app
from onecard.config import StudioConfig, make_config
from onecard.errors import UserError
from onecard.terminal import given, quiet_libraries


@app.command
def studio(*, fields: StudioFields = None) -> None:
    """Serve a page on this machine: prepare, start and watch runs, compare models in a chat, export.

    A run that the page starts goes on when the page and this server end. On a machine that others log in to, give
    --api-key: each user of the machine reaches 127.0.0.1.
    """
    config = make_config(StudioConfig, {"api_key": os.environ.get("ONECARD_API_KEY"), **given(fields)}, "studio")
    try:
        from onecard.studio.app import serve_page
    except ImportError as error:
        raise UserError("the page needs fastapi and uvicorn", str(error), "pip install 'onecard[studio]'") from None
    quiet_libraries()
    serve_page(config)
