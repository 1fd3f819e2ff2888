"""One step on eight devices, under every kind of mesh, is the step of one device.

Packed rows with images of several sizes; dense and 4-bit frozen weights; both families.
"""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from draws import shaken
from references import IMAGE, VIDEO, media, quiet, wide
from tiers import fast

import vlm_jax
from vlm_jax.models.layers.partition import rows_over
from vlm_jax.plan import collectives
from vlm_jax.sharding import make_mesh, shard_batch, shard_params
from vlm_jax.train.compile import abstract_batch
from vlm_jax.train.placement import on_mesh
from vlm_jax.trees import flatten

TOKENS = 72
QUICK = {"xla_backend_optimization_level": 0}
MESHES = [
    {"data": 1, "fsdp": 8},
    {"data": 1, "fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 1, "fsdp": 2, "context": 4},
]
KINDS = [("qwen2_vl", "nf4-dq"), ("llava", None), ("qwen2_vl", None), ("llava", "nf4-dq")]
CASES = [(*kind, sizes) for kind in KINDS for sizes in MESHES]
FAST = CASES[:4] + CASES[6:7]
CASES += [(family, "nf4-dq", sizes) for family in ("qwen2_5_vl", "qwen3_vl") for sizes in MESHES]
FAST += CASES[-6:-5] + CASES[-1:]
CASES += [("gemma3", "nf4-dq", sizes) for sizes in MESHES]
FAST += CASES[-2:-1]


def example(model, rng, *parts):
    """Return an example of runs of text (a number of tokens) and of images or videos (a grid)."""
    cfg, tokens = model.config, []
    grids = {IMAGE: [], VIDEO: []}
    images = 0
    for part in parts:
        if isinstance(part, int):
            tokens += rng.integers(3, 90, part).tolist()
        elif model.config.HAS_GRIDS:
            kind = VIDEO if part[0] > 1 else IMAGE
            tokens += media(kind, *part)
            grids[kind].append(part)
        else:
            tokens += [cfg.image_token_id] * cfg.image_tokens()
            images += 1
    given = {}
    for kind, (values, grid) in {
        IMAGE: ("pixel_values", "image_grid_thw"),
        VIDEO: ("pixel_values_videos", "video_grid_thw"),
    }.items():
        if grids[kind]:
            count = sum(t * h * w for t, h, w in grids[kind])
            given[values] = rng.normal(size=(count, cfg.vision.patch_values)).astype(np.float32)
            given[grid] = np.array(grids[kind])
    if images:
        size = (images, 3, *[cfg.vision.image_size] * 2)
        given["pixel_values"] = rng.normal(size=size).astype(np.float32)
    tokens = np.array(tokens)
    placeholder = np.isin(tokens, [cfg.image_token_id, cfg.video_token_id or -1])
    weights = np.where(placeholder, 0, rng.uniform(0.5, 1.5, len(tokens))).astype(np.float32)
    return {"tokens": tokens, "weights": weights, **cfg.layout(tokens, given)}


def packed_batch(model):
    """Return 8 rows of 72 tokens: one to three examples each; the last row is empty."""
    rng = np.random.default_rng(0)
    a, b, c = (1, 4, 6), (1, 2, 2), (3, 2, 4) if model.config.video_token_id else (1, 2, 4)
    rows = [
        [(5, a, 7), (9,), (2, b, 3)],
        [(40,)],
        [(3, b, 2, a, 4), (6, c, 5)],
        [(11, c, 8)],
        [(4, b, 1, b, 3), (13,)],
        [(7, a, 6), (2, c, 4)],
        [(30, b, 9)],
        [],
    ]
    made = [[example(model, rng, *parts) for parts in row] for row in rows]
    unit = model.config.patch_unit
    most = max(sum(len(e["patches"]) for e in row) for row in made)
    return model.collate(made, TOKENS, -(-most // unit) * unit)


def setting(family, directory, quantize):
    """Return (model, trainable, frozen, batch) with a LoRA that is not zero and a projector."""
    with quiet():
        wide(family, directory, factor=3.0)
    model, params = vlm_jax.load(directory, quantize=quantize)
    lora = vlm_jax.LoRA(rank=4, alpha=8, targets="llama", modules_to_save=("projector",))
    model, params = vlm_jax.add_lora(model, params, lora, jax.random.key(0))
    params = shaken(params, lambda path: path.endswith("lora_B"))
    table = vlm_jax.training_table(model, params)
    return model, *vlm_jax.split(params, table), packed_batch(model)


def prepared(model, trainable, frozen, batch, sizes):
    """Return (the jitted step, its arguments on a mesh); `trace` without decay keeps gradients."""
    tx = optax.trace(decay=0.0)
    count = int(np.prod(list(sizes.values())))
    mesh = make_mesh(devices=jax.devices()[:count], **sizes)
    trainable, frozen = (shard_params(model, tree, mesh) for tree in (trainable, frozen))
    state = on_mesh(vlm_jax.init_state(trainable, tx), mesh)
    batch = shard_batch(batch, mesh)
    # LLVM's optimizations are half of the compilation, and of no use to one step.
    step = jax.jit(vlm_jax.make_step(model, tx), compiler_options=QUICK)
    return step, (state, frozen, batch)


def one_step(*parts):
    """Return the step's loss and {path: gradient}."""
    step, arguments = prepared(*parts)
    with rows_over(arguments[2].tokens.sharding, arguments[0].trainable, arguments[1]):
        state, metrics = step(*arguments)
    return float(metrics["loss"]), flatten(jax.device_get(state.opt_state.trace))


def check_equal(found, loss, whole):
    value, gradients = found
    assert value == pytest.approx(loss, rel=1e-5)
    for path, gradient in whole.items():
        difference = np.linalg.norm(gradients[path] - gradient) / np.linalg.norm(gradient)
        assert difference < 1e-4, (path, difference)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return a function that gives a setting, and its loss and gradients on one device."""

    @functools.cache
    def made(family, quantize):
        parts = setting(family, tmp_path_factory.mktemp(family), quantize)
        return parts, *one_step(*parts, {"data": 1})

    return made


@pytest.mark.parametrize(("family", "quantize", "sizes"), fast(FAST, CASES))
def test_every_mesh_gives_the_step_of_one_device(alone, family, quantize, sizes):
    parts, loss, whole = alone(family, quantize)
    assert all(np.abs(gradient).max() > 0 for gradient in whole.values())
    check_equal(one_step(*parts, sizes), loss, whole)


BY_CHUNKS = [(*KINDS[0], {"data": 1, "tensor": 2, "context": 2}), (*KINDS[1], MESHES[3])]


@pytest.mark.parametrize(("family", "quantize", "sizes"), fast(BY_CHUNKS[:1], BY_CHUNKS))
def test_by_chunks_a_mesh_gives_the_step_of_one_device(alone, family, quantize, sizes):
    (model, *rest), loss, whole = alone(family, quantize)
    chunked = dataclasses.replace(model, attention="chunked")
    check_equal(one_step(chunked, *rest, sizes), loss, whole)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_context_shares_the_work_of_decoder_tower_and_head(family, tmp_path):
    parts = setting(family, tmp_path, None)
    flops = {}
    for context in (1, 4):
        step, arguments = prepared(*parts, {"data": 1, "context": context})
        with rows_over(arguments[2].tokens.sharding, arguments[0].trainable, arguments[1]):
            compiled = step.lower(*arguments).compile()
        flops[context] = compiled.cost_analysis()["flops"]
    assert flops[4] < 0.36 * flops[1]
    # In the decoder's layers keys and values alone are gathered, forward and for the gradients.
    inside = [one for one in collectives(compiled) if "language_model/layers" in one.where]
    cfg = parts[0].config.text
    sizes = {one.shape[2:] for one in inside if one.kind == "all-gather"}
    assert sizes == {(cfg.num_kv_heads, cfg.head_dim)}


def test_rows_that_do_not_spread_over_context_are_refused(tmp_path):
    with quiet():
        wide("qwen2_vl", tmp_path)
    model, _ = vlm_jax.load(tmp_path)
    mesh = make_mesh(data=2, context=4)
    with pytest.raises(vlm_jax.UserError, match=r"Rows of 30 tokens .* mesh\.context = 4"):
        abstract_batch(model, 2, (30, 16), mesh)
