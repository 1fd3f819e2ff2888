"""Teaches the tower to see before it is asked to speak: what lies in each cell of a scene.

A caption says one kind and one colour a shape at the end of a long way through the language model,
and a transformer needs some hundred thousand shapes before it tells kinds apart. Here every merged
patch (16 x 16 pixels) is classified by two linear heads, which are thrown away afterwards.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import vlm_jax
from vlm_jax.sharding import replicate, shard_batch

from .scenes import BACKGROUNDS, COLORS, KINDS, Scene, draw_scene

SIDE, CELL = 64, 16
CELLS = SIDE // CELL
ROWS, SHAPES = 32, 6
EASY = 0.3  # the share of the steps with plain backgrounds and no tiny shape
EMPTY_WEIGHT = 0.15  # of cells without a shape, which are the most
LOG_EVERY, SAVE_EVERY = 100, 300


def label_cells(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Return int32 [cells] kinds and colours; 0 where nothing lies, a small shape above a large."""
    kinds = np.zeros((CELLS, CELLS), np.int32)
    colors = np.zeros((CELLS, CELLS), np.int32)
    middle = np.arange(CELLS) * CELL + CELL / 2
    for shape in sorted(scene.shapes, key=lambda shape: -shape.area):
        inside = (np.abs(middle - shape.y) < shape.height / 2 - 2)[:, None] & (
            np.abs(middle - shape.x) < shape.width / 2 - 2
        )[None, :]
        inside[int(shape.y) // CELL, int(shape.x) // CELL] = True
        kinds[inside] = list(KINDS).index(shape.kind) + 1
        colors[inside] = list(COLORS).index(shape.color) + 1
    return kinds.ravel(), colors.ravel()


def draw_batch(processor: Any, seed: int, step: int, steps: int) -> tuple[np.ndarray, ...]:
    """Return pixel values [rows, P, C], kinds and colours [rows, cells] of one step."""
    rng = np.random.default_rng((seed, 1, step))
    easy = step < EASY * steps
    scenes = [
        draw_scene(
            rng, SIDE, SIDE, int(rng.integers(1, SHAPES + 1)),
            9 if easy else 6, 0.55, ("pastel",) if easy else BACKGROUNDS,
        )
        for _ in range(ROWS)
    ]  # fmt: skip
    pixels = processor(images=[scene.image for scene in scenes], return_tensors="np")
    values = np.asarray(pixels["pixel_values"], np.float32)
    kinds, colors = zip(*map(label_cells, scenes), strict=True)
    return values.reshape(ROWS, -1, values.shape[-1]), np.stack(kinds), np.stack(colors)


def ahead(processor: Any, seed: int, first: int, steps: int) -> Iterator[tuple[np.ndarray, ...]]:
    ready: queue.Queue = queue.Queue(maxsize=4)

    def produce() -> None:
        for step in range(first, steps):
            ready.put(draw_batch(processor, seed, step, steps))

    threading.Thread(target=produce, daemon=True).start()
    for _ in range(first, steps):
        yield ready.get()


def teach(
    model: vlm_jax.Model, params: dict, processor: Any, *, steps: int, rate: float, seed: int,
    work: Path,
) -> dict:  # fmt: skip
    """Return the parameters with a trained tower and merger; resumes from `work`."""
    width = model.config.text.hidden_size
    keys = jax.random.split(jax.random.key(seed), 2)
    sizes = {"kind": len(KINDS) + 1, "color": len(COLORS) + 1}
    heads = {
        name: 0.05 * jax.random.normal(key, (width, size))
        for key, (name, size) in zip(keys, sizes.items(), strict=True)
    }
    trained = {"visual": params["model"]["visual"], "heads": heads}
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, 100, steps, 0.05 * rate)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.01)
    )
    state = (jnp.int32(0), trained, tx.init(trained))
    file = work / "sight.npz"
    if file.exists():
        with np.load(file) as saved:
            leaves = [jnp.asarray(saved[name]) for name in saved.files]
        state = jax.tree.unflatten(jax.tree.structure(state), leaves)

    media = {
        "pixel_values": np.zeros((CELLS**2 * 4, model.config.vision.patch_values), np.float32),
        "image_grid_thw": np.array([[1, 2 * CELLS, 2 * CELLS]]),
    }
    example = model.config.layout(np.full(CELLS**2, model.config.image_token_id), media)
    example |= {"tokens": np.zeros(CELLS**2, np.int32), "weights": np.zeros(CELLS**2, np.float32)}
    mesh = vlm_jax.make_mesh()
    blank = shard_batch(model.collate([[example]] * ROWS, CELLS**2, 4 * CELLS**2), mesh)
    state, params = replicate((state, params), mesh)

    def measure(trained: dict, values: jax.Array, kinds: jax.Array, colors: jax.Array):
        variables = {
            "params": {**params, "model": {**params["model"], "visual": trained["visual"]}}
        }
        batch = dataclasses.replace(blank, patches=values)
        seen = model.apply(variables, batch, method="see")
        # The language model's first norm sees it so.
        seen = seen * jax.lax.rsqrt(jnp.mean(seen * seen, axis=-1, keepdims=True) + 1e-6)
        total, right = jnp.float32(0), {}
        weights = jnp.where(kinds > 0, 1.0, EMPTY_WEIGHT)
        for name, labels in (("kind", kinds), ("color", colors)):
            logits = seen @ trained["heads"][name]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            total += jnp.sum(losses * weights) / jnp.sum(weights)
            hit = (logits.argmax(-1) == labels) & (labels > 0)
            right[name] = jnp.sum(hit) / jnp.sum(labels > 0)
        return total, {"loss": total, **right}

    @jax.jit
    def step(state: tuple, values: jax.Array, kinds: jax.Array, colors: jax.Array):
        number, trained, opt_state = state
        grads, seen = jax.grad(measure, has_aux=True)(trained, values, kinds, colors)
        updates, opt_state = tx.update(grads, opt_state, trained)
        return (number + 1, optax.apply_updates(trained, updates), opt_state), seen

    began, history = time.time(), []
    for arrays in ahead(processor, seed, int(state[0]), steps):
        state, seen = step(state, *shard_batch(arrays, mesh))
        history.append(seen)
        number = int(state[0])
        if number % LOG_EVERY == 0:
            history = jax.device_get(history)
            means = {name: np.mean([h[name] for h in history]) for name in history[0]}
            line = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
            print(f"sight {number}  {time.time() - began:.0f} s  {line}", flush=True)
            history = []
        if number % SAVE_EVERY == 0 or number == steps:
            partial = file.with_suffix(".partial.npz")
            np.savez(partial, *[np.asarray(leaf) for leaf in jax.tree.leaves(state)])
            partial.replace(file)
    return {**params, "model": {**params["model"], "visual": state[1]["visual"]}}
