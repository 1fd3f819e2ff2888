"""A checkpoint's config.json alone: from a directory, a known checkpoint, or the hub."""

import copy
from pathlib import Path
from typing import Any

from vlm_jax.errors import UserError
from vlm_jax.files.limits import read_json
from vlm_jax.hub.load import resolve
from vlm_jax.models.reference_configs import KNOWN


def read_hf_config(
    path_or_repo_id: str, revision: str | None = None, token: str | None = None
) -> dict[str, Any]:
    """Return the config.json of a checkpoint directory or hub id; no other file is fetched.

    The hub ids of `models.reference_configs`, at their default revision, need no network. Raises
    `UserError` where there is neither a directory nor such a repository.
    """
    is_known = path_or_repo_id in KNOWN and revision is None
    if is_known and not Path(path_or_repo_id).expanduser().is_dir():
        return copy.deepcopy(KNOWN[path_or_repo_id])
    try:
        directory = resolve(path_or_repo_id, revision, token, files=("config.json",))
    except UserError as error:
        raise UserError(f"{error} Known without a network: {', '.join(KNOWN)}.") from error
    return read_json(directory / "config.json")
