"""Which tokens end an answer: the EOS of a checkpoint's files, and its chat template's own."""

from pathlib import Path
from typing import Any

from vlm_jax.errors import UserError
from vlm_jax.limits import SIZE, read_json
from vlm_jax.model import Model

FILE = "generation_config.json"


def generation_file(model: Model) -> dict[str, Any]:
    """Return what the checkpoint's generation_config.json says; nothing where there is none.

    Raises `UserError` where it holds no object.
    """
    if model.source is None:
        return {}
    file = Path(model.source.directory) / FILE
    if not file.exists():
        return {}
    return read_json(file)


def settings(model: Model) -> dict[str, Any]:
    """Return the checkpoint's fields for generation: those of that file, else of config.json."""
    found: dict[str, Any] = {}
    text = model.hf_config.get("text_config") or {}
    for given in (text, model.hf_config, generation_file(model)):
        found.update({key: value for key, value in given.items() if value is not None})
    return found


def end_tokens(model: Model, turn_end: int | None = None) -> tuple[tuple[int, ...], int]:
    """Return (EOS ids, pad id) of generation_config.json, else of config.json.

    turn_end: what the chat template ends an answer with, which joins the EOS ids. A base model's
    EOS is another, but a model that was trained on conversations writes this one.
    """
    given = settings(model)
    eos, pad = given.get("eos_token_id"), given.get("pad_token_id")
    ids = tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,))
    if turn_end is not None and turn_end not in ids:
        ids = (*ids, turn_end)
    pad = pad if pad is not None else (ids[0] if ids else 0)
    if not all(isinstance(token, int) and abs(token) <= SIZE for token in (*ids, pad)):
        raise UserError(
            f"The checkpoint names eos_token_id {eos!r} and pad_token_id {pad!r}; expected whole "
            f"numbers. Mend its generation_config.json or config.json."
        )
    return ids, pad


def exported(model: Model) -> dict[str, Any] | None:
    """Return the generation_config.json with which others stop where an answer ends.

    None where the checkpoint's own files say so, or no chat template is known.
    """
    ids, pad = end_tokens(model, model.turn_end)
    if ids == end_tokens(model)[0]:
        return None
    # Without the file transformers reads these in config.json; with it, it does not.
    special = {"bos_token_id": settings(model).get("bos_token_id"), "pad_token_id": pad}
    return {**special, **generation_file(model), "eos_token_id": list(ids)}
