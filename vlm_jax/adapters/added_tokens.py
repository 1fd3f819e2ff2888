"""Added tokens: trainable rows of embedding and head, beside the frozen ones."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from vlm_jax.errors import refuse
from vlm_jax.model import Model
from vlm_jax.trees import flatten, unflatten

HEAD = "lm_head"


def is_added(path: str) -> bool:
    """Return whether a leaf holds the rows of new tokens."""
    return path.endswith("/added")


def add_tokens(model: Model, params: Mapping[str, Any], count: int) -> tuple[Model, dict[str, Any]]:
    """Return the model and a new tree with `count` more tokens in the embedding and the head.

    Ids run on from the old vocabulary. New rows start at the mean of the old ones, so that they
    change other tokens' probabilities least (https://nlp.stanford.edu/~johnhew/vocab-expansion.html)
    and are float32 leaves of their own, `embed_tokens/added` [count, D] and, where the head is not
    tied, `lm_head/added` [D, count]: train these and leave the old rows frozen. An export holds
    one embedding of all rows.
    """
    flat = flatten(params)
    refuse(
        (count < 1, f"add_tokens was asked for {count} tokens; expected 1 or more."),
        (
            any(is_added(path) for path in flat),
            "These parameters hold added tokens already; export the model first.",
        ),
    )
    embedding = model.config.embedding
    mean_D = jnp.mean(flat[f"{embedding}/embedding"].astype(jnp.float32), axis=0)
    flat[f"{embedding}/added"] = jnp.tile(mean_D[None, :], (count, 1))
    if not model.config.text.tied:
        mean_D = jnp.mean(flat[f"{HEAD}/kernel"].astype(jnp.float32), axis=1)
        flat[f"{HEAD}/added"] = jnp.tile(mean_D[:, None], (1, count))
    size = model.config.text.vocab_size + count
    config = dict(model.hf_config)
    nested = config.get("text_config")
    if nested:
        config["text_config"] = {**nested, "vocab_size": size}
    if not nested or "vocab_size" in config:  # some releases of transformers write it twice
        config["vocab_size"] = size
    return dataclasses.replace(model, hf_config=config), unflatten(dict(sorted(flat.items())))


def spare_tokens(model: Model, tokens: Mapping[str, int]) -> list[str]:
    """Return which tokens lie in rows that the base's own embedding had to spare.

    tokens: what was added to a tokenizer, with ids. A checkpoint's config.json names its last ones
    (those of images and videos), so ids behind all of them are of tokens that it does not know.
    """
    named = [
        id
        for key, value in flatten(model.hf_config).items()
        if key.endswith(("_token_id", "_token_index"))
        for id in (value if isinstance(value, list) else [value])
        if id
    ]
    last = max(named, default=-1)
    return [token for token, id in tokens.items() if last < id < model.config.text.vocab_size]


def fold_added(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat parameters with new rows appended to the embedding and the head."""
    folded = {path: leaf for path, leaf in flat.items() if not is_added(path)}
    for path in filter(is_added, flat):
        base = path.removesuffix("/added")
        leaf, axis = (f"{base}/kernel", 1) if base == HEAD else (f"{base}/embedding", 0)
        old = folded[leaf]
        folded[leaf] = jnp.concatenate([old, flat[path].astype(old.dtype)], axis=axis)
    return folded
