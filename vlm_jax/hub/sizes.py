"""A checkpoint's config.json alone: from a directory, a known checkpoint, or the hub."""

import copy
from pathlib import Path
from typing import Any

from vlm_jax.errors import UserError
from vlm_jax.files.limits import read_json
from vlm_jax.models.reference_configs import KNOWN


def read_hf_config(
    path_or_repo_id: str, revision: str | None = None, token: str | None = None
) -> dict[str, Any]:
    """Return the config.json of a checkpoint directory or hub id; no other file is fetched.

    The hub ids of `models.reference_configs`, at their default revision, need no network. Raises
    `UserError` where there is neither a directory nor such a repository.
    """
    path = Path(path_or_repo_id).expanduser()
    if path.is_dir():
        return read_json(path / "config.json")
    if path_or_repo_id in KNOWN and revision is None:
        return copy.deepcopy(KNOWN[path_or_repo_id])
    known = f"Known without a network: {', '.join(KNOWN)}."
    if (
        path.is_absolute()
        or path_or_repo_id.startswith((".", "~"))
        or path_or_repo_id.count("/") != 1
    ):
        raise UserError(
            f"There is no checkpoint directory '{path_or_repo_id}'. Expected a directory with "
            f"config.json, or a Hugging Face hub id. {known}"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        file = hf_hub_download(path_or_repo_id, "config.json", revision=revision, token=token)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"'{path_or_repo_id}' is not a local directory, and its config.json could not be "
            f"fetched from the Hugging Face hub (revision {revision or 'main'}): "
            f"{str(error).splitlines()[0]} Check the spelling, the network, and for gated models "
            f"your token. {known}"
        ) from error
    return read_json(Path(file))
