"""The tokenizer and chat template of a checkpoint directory, from the files it has."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_jax.errors import UserError, explained
from vlm_jax.files.file_types import refuse_lost
from vlm_jax.files.limits import is_file_name, read_json


def rename_tokens(tokenizer: Any, names: dict[str, str]) -> Any:
    """Return a copy of a `tokenizers.Tokenizer` in which some tokens have other names.

    The ids stay; the old names are plain text to the copy. Nothing is truncated or padded.
    """
    from tokenizers import Tokenizer

    raw = json.loads(tokenizer.to_str())
    for token in raw["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    vocabulary = raw["model"]["vocab"]
    raw["model"]["vocab"] = (
        {names.get(name, name): i for name, i in vocabulary.items()}
        if isinstance(vocabulary, dict)
        else [[names.get(name, name), score] for name, score in vocabulary]  # Unigram
    )
    raw["truncation"] = raw["padding"] = None
    return Tokenizer.from_str(json.dumps(raw))


VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def has_tokenizer(directory: str | Path) -> bool:
    """Return whether a directory holds a tokenizer: settings alone are none."""
    return any(Path(directory, name).is_file() for name in VOCABULARIES)


def load_tokenizer(directory: str | Path) -> Any:
    """Return the checkpoint's fast tokenizer; raise `UserError` where there is none."""
    from transformers import AutoTokenizer

    if not has_tokenizer(directory):
        raise UserError(
            f"'{directory}' has no tokenizer (none of {', '.join(VOCABULARIES)}). Copy the "
            f"checkpoint's tokenizer files there: text cannot be encoded without them."
        )
    for name in (*VOCABULARIES, "tokenizer_config.json"):
        refuse_lost(Path(directory, name), f"The tokenizer file '{Path(directory, name)}'")
    settings = Path(directory, "tokenizer_config.json")
    given = read_json(settings) if settings.is_file() else {}
    files = given.get("fast_tokenizer_files") or []
    if not isinstance(files, list) or not all(map(is_file_name, files)):
        raise UserError(
            f"'{settings}' has fast_tokenizer_files = {files!r:.200}; expected names of files in "
            f"its own directory. Delete the key: tokenizer.json is read without it."
        )
    with explained(
        Exception,  # the tokenizers library raises bare ones for a damaged file
        lambda error: f"The tokenizer in '{directory}' cannot be loaded: {error}",
    ):  # a tokenizer's own code (auto_map) is never run, and nobody is asked whether to
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UserError(
            f"The tokenizer in '{directory}' has no fast form (tokenizer.json), which telling "
            f"answers from prompts needs. Load it with transformers where sentencepiece is "
            f"installed and save it again."
        )
    return tokenizer


def find_template(places: Sequence[str | Path], home: str | Path, tokenizer: Any) -> str:
    """Return the chat template: chat_template.jinja, then chat_template.json, then the
    tokenizer's own (tokenizer_config.json), which is the order of transformers' processors.

    places: directories, those of an earlier one first; home: the one that the tokenizer is of.
    """
    for place in places:
        path = Path(place, "chat_template.jinja")
        if path.is_file():
            refuse_lost(path, f"The chat template '{path}'")
            return path.read_text(encoding="utf-8")
        path = Path(place, "chat_template.json")
        template = tokenizer.chat_template if place == home else None
        if path.is_file():
            template = read_json(path).get("chat_template")
            if not isinstance(template, str):
                raise UserError(f"The chat_template in '{path}' is not a text: {template!r:.80}.")
        if isinstance(template, dict):
            template = template.get("default")
        if template:
            return template
    raise UserError(
        f"'{places[-1]}' has no chat template (chat_template.jinja, chat_template.json, or "
        f"chat_template in tokenizer_config.json). A base model has none: take that of its "
        f"instruction-tuned sister and put it there as chat_template.jinja."
    )
