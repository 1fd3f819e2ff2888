"""Generation: one prefill, then decoding with a KV cache in one compiled loop, to an end token.

An answer ends at the EOS tokens of the checkpoint's files and at the one that its chat template
writes. Letters: B rows, T prompt tokens, N new tokens, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.batch import Batch
from vlm_jax.distributed import processes
from vlm_jax.errors import UserError, refuse
from vlm_jax.files.limits import SIZE, read_json
from vlm_jax.model import Model
from vlm_jax.models.decoder import empty_cache
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.sharding import BATCH, mesh_under, put, row_parts


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 cut nothing."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


def left_padded(batch: Batch) -> Batch:
    """Return a numpy batch of the same rows whose tokens end in the last slot.

    Then all rows write their next token to the same cache slot. Raises where a row holds more
    than one example.
    """
    batch = jax.tree.map(np.asarray, batch)
    if batch.segments.max(initial=0) > 1:
        raise UserError("generate needs one example a row; this batch holds packed rows.")
    order = np.argsort(batch.segments > 0, axis=1, stable=True)  # empty slots before all others
    axes_order = np.expand_dims(order, tuple(range(1, batch.positions.ndim - 1)))
    return dataclasses.replace(
        batch,
        tokens=np.take_along_axis(batch.tokens, order, 1),
        segments=np.take_along_axis(batch.segments, order, 1),
        positions=np.take_along_axis(batch.positions, axes_order, -1),
        image_index=np.take_along_axis(batch.image_index, order, 1),
    )


def sample(logits_BV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Return the next token of each row, int32 [B]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k:
        kth = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        # Nucleus sampling, https://arxiv.org/abs/1904.09751: the fewest tokens that reach top_p.
        ranked = jnp.sort(logits_BV, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ranked), axis=-1) - jax.nn.softmax(ranked)
        lowest = jnp.min(jnp.where(before < sampling.top_p, ranked, jnp.inf), -1, keepdims=True)
        logits_BV = jnp.where(logits_BV < lowest, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("module", "new_tokens", "sampling", "eos", "pad"))
def _generate(
    params: Any, batch: Batch, key: jax.Array, *, module: VisionLanguageModel,
    new_tokens: int, sampling: Sampling, eos: tuple[int, ...], pad: int,
) -> jax.Array:  # fmt: skip
    variables = {"params": params}
    B, T = batch.tokens.shape
    cache: Any = empty_cache(module.cfg.text, B, T + new_tokens, module.compute.dtype)
    hidden, cache = module.apply(variables, batch, cache, method="hidden")
    logits = module.apply(variables, hidden[:, -1], method="logits")
    # The next position is one past the largest on any axis: after an image they differ.
    axes = tuple(range(1, batch.positions.ndim))
    position = jnp.max(batch.positions, axis=axes, keepdims=True) + 1
    position = jnp.broadcast_to(position, (*batch.positions.shape[:-1], 1))
    one = jnp.ones((B, 1), jnp.int32)

    def body(state):
        step, out, done, logits, position, cache, key = state
        key, now = jax.random.split(key)
        token = jnp.where(done, pad, sample(logits, now, sampling))
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, step))
        for end in eos:
            done = done | (token == end)
        hidden, cache = module.apply(
            variables, token[:, None], position, one, cache, method="decode"
        )
        logits = module.apply(variables, hidden[:, 0], method="logits")
        return step + 1, out, done, logits, position + 1, cache, key

    out = jnp.full((B, new_tokens), pad, jnp.int32)
    done = jnp.all(batch.segments == 0, axis=1)  # rows that only fill the batch up
    state = (jnp.int32(0), out, done, logits, position, cache, key)
    return jax.lax.while_loop(
        lambda state: (state[0] < new_tokens) & ~jnp.all(state[2]), body, state
    )[1]


def generate(
    model: Model,
    params: Mapping[str, Any],
    batch: Batch,
    max_new_tokens: int = 16,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    eos_token_id: int | tuple[int, ...] | None = None,
    pad_token_id: int | None = None,
) -> np.ndarray:
    """Return int32 [B, N]: the new tokens of each row, without the prompt.

    Rows may differ in length and images and be padded on either side; one example a row. A row
    ends with an end token, then the pad id. Compiled once for each shape. On a mesh (that of the
    parameters) rows are spread over data x fsdp where they divide; several processes all call this
    with the same rows, and get the same tokens.

    Args:
        model, params: of `load`.
        batch: the prompts.
        max_new_tokens: N.
        temperature: 0 is greedy.
        top_p, top_k: limits of sampling; 1 and 0 are none.
        seed: of sampling.
        eos_token_id, pad_token_id: by default those of the checkpoint's generation_config.json, and
            the token that ends an answer in its chat template (`Model.turn_end`).
    """
    eos, pad = end_tokens(model, model.turn_end if eos_token_id is None else None)
    if eos_token_id is not None:
        eos = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
    pad = pad if pad_token_id is None else pad_token_id
    refuse(
        (max_new_tokens < 1, f"max_new_tokens is {max_new_tokens}; it must be 1 or more."),
        (
            not 0 <= temperature < float("inf") or not 0 < top_p <= 1 or top_k < 0,
            "Sampling needs temperature >= 0, 0 < top_p <= 1 and top_k >= 0.",
        ),
    )
    batch, key = left_padded(batch), jax.random.key(seed)
    mesh = mesh_under(params)
    if mesh is None:
        batch = jax.tree.map(jnp.asarray, batch)
    else:
        spread = PartitionSpec(BATCH if len(batch.tokens) % row_parts(mesh) == 0 else None)
        batch = jax.tree.map(lambda leaf: put(leaf, NamedSharding(mesh, spread)), batch)
        key = put(key, NamedSharding(mesh, PartitionSpec()))
    return processes.to_host(
        _generate(
            dict(params), batch, key, module=model.module, new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_p, top_k), eos=eos, pad=pad,
        )
    )  # fmt: skip


FILE = "generation_config.json"


def generation_file(model: Model) -> dict[str, Any]:
    """Return what the checkpoint's generation_config.json says; nothing where there is none.

    Raises `UserError` where it holds no object.
    """
    if model.source is None:
        return {}
    file = Path(model.source.directory) / FILE
    return read_json(file) if file.exists() else {}


def settings(model: Model) -> dict[str, Any]:
    """Return the checkpoint's fields for generation: those of that file, else of config.json."""
    files = (model.hf_config.get("text_config") or {}, model.hf_config, generation_file(model))
    return {key: value for file in files for key, value in file.items() if value is not None}


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
            f"numbers. Correct its generation_config.json or config.json."
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
    return {
        "bos_token_id": settings(model).get("bos_token_id"),
        "pad_token_id": pad,
        **generation_file(model),
        "eos_token_id": list(ids),
    }
