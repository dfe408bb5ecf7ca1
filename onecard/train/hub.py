"""The upload of an adapter to the hub, with huggingface_hub's own client."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from onecard.config import TrainConfig
from onecard.errors import UserError, first_line


def repository_of(config: TrainConfig) -> str:
    """Return the repository's name; without an account, it is the user's."""
    return config.hub_model_id or Path(config.output).resolve().name


def check_login(config: TrainConfig) -> None:
    """Raise UserError unless a token is there and the repository's name is valid. It asks no server."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not config.push_to_hub:
        return
    try:
        validate_repo_id(repository_of(config))
    except HFValidationError as error:
        do = "give hub_model_id"
        raise UserError("the hub must accept the repository's name", first_line(error), do, "hub_model_id") from None
    if get_token() is None:
        do = "run `hf auth login`, or set HF_TOKEN"
        raise UserError("an upload to the hub needs a token", "none", do, "push_to_hub")


def push(folder: Path, config: TrainConfig) -> str:
    """Upload an adapter's folder. Return its address.

    Raises:
        UserError: the upload failed. The adapter is on the disk, and the error says how to upload it.
    """
    from huggingface_hub import HfApi

    name = repository_of(config)
    try:
        api = HfApi()
        url = api.create_repo(name, private=config.hub_private_repo, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Adapter trained with onecard")
    except Exception as error:  # of the network, the server, or the rights of the token
        found = f"{type(error).__name__}: {first_line(error)}"
        do = f"the adapter is in {folder}; upload it with: hf upload {quote(name)} {quote(str(folder))} ."
        raise UserError("the adapter must reach the hub", found, do, name) from None
    return str(url)
