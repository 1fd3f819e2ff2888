"""What every entry of a registry promises: families, optimizers, 4-bit formats, record formats.

That their numbers are the references' is for other tests, one entry at a time; methods have
test_methods.py. Nothing here needs a checkpoint's weights.
"""

import copy
import functools
import itertools
import json
import math
import pkgutil
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_files import qwen2_vl_files

import vlm_jax
from vlm_jax import UserError
from vlm_jax.adapters.targets import PRESETS, target_modules
from vlm_jax.config.choices import OPTIMIZERS
from vlm_jax.data import Encoder
from vlm_jax.data.records.formats import CHATS
from vlm_jax.data.records.formats import FORMATS as RECORDS
from vlm_jax.data.records.record import canonical
from vlm_jax.data.text.tokenizer import load_tokenizer
from vlm_jax.models import MODELS
from vlm_jax.models.family import Family
from vlm_jax.models.hf_config import ACTIVATION_NAMES
from vlm_jax.models.layers.activations import ACTIVATIONS
from vlm_jax.models.reference_configs import KNOWN
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.names import current_name, disk_places, is_unused, to_disk, to_tree
from vlm_jax.sharding import make_mesh, param_shardings, replicate
from vlm_jax.train.placement import on_mesh
from vlm_jax.trees import flatten, match
from vlm_jax.weights import FORMATS, dense, is_quantized
from vlm_jax.weights.quantize import quantize

ROOT = Path(__file__).parents[1]

# Families


@functools.cache
def published(family):
    """Return (model, shapes of its parameters) of a published checkpoint with a head of its own."""
    raw = next(raw for raw in KNOWN.values() if raw["model_type"] == family)
    raw = {**raw, "tie_word_embeddings": False}
    model = vlm_jax.from_config(raw)
    return model, model.abstract()


MAY_BE_NONE = {"video_token_id", "GROUNDING", "IMAGE_MARK", "image_settings"}
MEMBERS = {name for name in (*Family.__annotations__, *vars(Family)) if not name.startswith("_")}


def test_what_is_asked_of_a_family_is_documented():
    lines = (ROOT / "docs/ADD_A_MODEL.md").read_text().splitlines()
    told = [line.split(" | ")[0] for line in lines if line.startswith(("| `", "And these"))]
    assert {name for line in told for name in re.findall(r"`(\w+)", line)} == MEMBERS


@pytest.mark.parametrize("family", MODELS)
def test_a_family_has_what_is_asked_of_it(family):
    model, _ = published(family)
    assert all(getattr(model.config, name, None) is not None for name in MEMBERS - MAY_BE_NONE)
    assert (model.config.image_settings is not None) == model.config.HAS_GRIDS
    assert issubclass(pkgutil.resolve_name(model.config.MODULE), VisionLanguageModel)
    assert set(ACTIVATION_NAMES) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", KNOWN)
def test_a_family_reads_its_config(name):
    raw = copy.deepcopy(KNOWN[name])
    read = MODELS[raw["model_type"]].from_hf
    config = read(raw)
    assert raw == KNOWN[name]  # which is left as it was
    assert config == read(json.loads(json.dumps(raw))) and hash(config) == hash(read(raw))
    with pytest.raises(UserError, match="new_field"):
        read({**raw, "new_field": 3})


@pytest.mark.parametrize("family", MODELS)
def test_a_familys_tables_know_every_leaf(family):
    model, params = published(family)
    flat = flatten(params)
    known = {"vision", "projector", "language_model", "embeddings", "head"}
    assert {model.component(path) for path in flat} == known
    match(model.config.COMPONENTS, list(flat), "component table")  # raises for a row in vain
    for path in flat:
        parts = path.split("/")
        projector = any(f"/{one.replace('.', '/')}/" in path for one in model.config.projectors)
        tower = "projector" if projector else "vision"
        media = projector or model.config.VISION in parts
        assert (model.component(path) in ("vision", "projector")) == media, path
        assert not media or model.component(path) == tower, path
    for prefix, layers in model.config.stacks.items():
        leaves = [leaf for path, leaf in flat.items() if path.startswith(f"{prefix}/")]
        assert leaves and {leaf.shape[0] for leaf in leaves} == {layers}

    # Both axes of every mesh spread something of each component that has matrices.
    specs = flatten(param_shardings(model, params, make_mesh(1, 2, 4)))
    for component in known:
        of = [specs[path].spec for path in flat if model.component(path) == component]
        assert {"fsdp", "tensor"} <= {axis for spec in of for axis in spec if axis}, component


@pytest.mark.parametrize("family", MODELS)
def test_a_familys_leaves_have_names_on_disk(family):
    model, params = published(family)
    shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
    places = disk_places(model, shapes)
    sizes = dict.fromkeys(shapes, 0)
    for name, place in places.items():
        assert current_name(model, name) == name and not is_unused(model, name)
        sizes[place.path] += math.prod(place.shape)
    assert sizes == {path: math.prod(shape) for path, shape in shapes.items()}
    assert model.config.disk_shapes.keys() <= shapes.keys()
    for path, shape in model.config.disk_shapes.items():
        (place,) = [place for place in places.values() if place.path == path]
        tensor = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
        leaf = to_tree(path, tensor)
        assert leaf.shape == shapes[path] and place.shape == shape
        np.testing.assert_array_equal(to_disk(place, leaf), tensor)


@pytest.mark.parametrize("family", MODELS)
def test_a_familys_layers_are_adapted_and_it_runs(family):
    model, params = published(family)
    layers = model.config.text.num_layers
    for targets in ("llama", "all-linear"):
        found = target_modules(model, params, vlm_jax.LoRA(rank=2, targets=targets))
        of = {path: model.component(path) for path, taken in found.items() if any(taken)}
        text = [path for path, component in of.items() if component == "language_model"]
        assert {path.split("/")[-2] for path in text} == set(PRESETS["llama"])
        assert all(found[path] == [True] * layers for path in text)
        assert targets == "all-linear" or set(of.values()) == {"language_model"}

    rows, tokens, patches = 2, 8, 2 * model.config.patch_unit
    batch = model.collate([[], []], tokens, patches)
    logits = jax.eval_shape(lambda params: model.apply({"params": params}, batch), params)
    assert logits.shape == (rows, tokens, model.vocab_size) and logits.dtype == jnp.float32


def one_image(model):
    """Return (grid or None, what a processor gives of one image) of drawn pixels."""
    config = model.config
    rng, (channels, frames, size) = np.random.default_rng(0), config.patch_axes
    if config.HAS_GRIDS:
        side = math.isqrt(config.patches_of(1))
        grid = (1, 2 * side, 3 * side)
        return grid, rng.random((math.prod(grid), channels * frames * size), np.float32)
    side = config.vision.image_size
    return None, rng.random((1, channels, side, side), np.float32)


@pytest.mark.parametrize("family", MODELS)
def test_a_family_lays_out_what_it_can_show_again(family):
    model, _ = published(family)
    config = model.config
    grid, values = one_image(model)
    count = config.image_tokens(grid)
    assert len(values) == config.values_per_image(grid)
    tokens = np.array([1, *[config.image_token_id] * count, 2, 3])
    given = {"pixel_values": values}
    if grid is not None:
        given["image_grid_thw"] = np.array([grid])
    laid = config.layout(tokens, given)
    assert laid.keys() == config.layout(tokens[:1], {}).keys()
    assert laid["positions"].shape[-1] == laid["image_index"].shape[0] == len(tokens)
    patches, where = laid["patches"], laid["patch_positions"]
    assert len(patches) == len(where) == len(laid["patch_segments"])
    assert len(patches) % config.patch_unit == 0 and {*laid["patch_segments"]} == {1}
    assert patches.shape[1] == math.prod(config.patch_axes)
    index = laid["image_index"]
    np.testing.assert_array_equal(index >= 0, tokens == config.image_token_id)
    assert len({*index[index >= 0]}) == count
    assert index.max() < config.features(len(patches))

    held = config.holds_pixels(where)
    shown = config.pixels(patches, where)
    assert shown.shape[-1] == config.patch_axes[0]
    np.testing.assert_array_equal(np.sort(shown, None), np.sort(patches[held], None))
    height, width = shown.shape[1:3]
    assert height * width == count * config.cell**2

    with pytest.raises(UserError, match="must agree exactly"):
        config.layout(tokens[1:-1][:-3], given)


# Optimizers

SAME = ("fast", "slow", "part", "other")
RATES = [
    ("slow/.*", "full(0.1)"),
    ("part/.*", "full(1; layers 0*1, 1*1)"),
    (".*", "full"),
]


def drawn(seed):
    """Return a tree of leaves; those of `SAME` are the same."""
    rng = np.random.default_rng(seed)
    leaf = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    layers = leaf(2, 64, 64)
    tree = {name: {"layers": {"kernel": layers}} for name in SAME}
    half = {"kernel": leaf(16, 8).astype(jnp.bfloat16)}
    # The large one has pages, and moments of 8 bits, in the optimizers that have any.
    return {**tree, "half": half, "large": {"kernel": leaf(400, 256)}, "norm": {"scale": leaf(8)}}


@pytest.mark.parametrize("optim", sorted({*OPTIMIZERS.values()}))
def test_an_optimizer(optim):
    settings = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    make = lambda params: vlm_jax.optimizer(params, RATES, {**settings, "optim": optim})  # noqa: E731
    shapes = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]  # noqa: E731
    mesh = make_mesh(devices=jax.devices()[:1])
    grads = drawn(1)
    grads["other"]["layers"]["kernel"] *= jnp.array([1.0, 5.0])[:, None, None]
    params, grads, more = (replicate(tree, mesh) for tree in (drawn(0), grads, drawn(2)))
    tx = make(params)
    state = vlm_jax.TrainState(jnp.int32(0), params, tx.init(params), jax.random.key(0))
    start = on_mesh(state, mesh).opt_state
    where = jax.tree.map(lambda leaf: leaf.sharding, (params, start))
    fast_compile = {"xla_backend_optimization_level": 0}
    step = jax.jit(tx.update, out_shardings=where, compiler_options=fast_compile)
    updates, state = step(grads, start, params)
    moved = optax.apply_updates(params, updates)

    # A state can be planned from shapes, and has the same ones after a step: all compile once.
    planned = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert shapes(make(planned).init(planned)) == shapes(start) == shapes(state)
    assert jax.tree.structure(state) == jax.tree.structure(start)
    assert shapes(moved) == shapes(params) == shapes(updates)
    step(more, state, params)
    assert step._cache_size() == 1

    # All that trains goes down its gradient, as fast as its group says.
    by = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(updates).items()}
    for path, grad in flatten(grads).items():
        assert np.isfinite(by[path]).all() and (by[path] * np.asarray(grad)).sum() < 0, path
    fast, slow, part, other = (by[f"{name}/layers/kernel"] for name in SAME)
    np.testing.assert_allclose(slow, 0.1 * fast, rtol=1e-5, atol=1e-9)

    # Layers do not see one another; a frozen one stays as it is, to the bit.
    np.testing.assert_array_equal(other[0], fast[0])
    np.testing.assert_array_equal(part[1], fast[1])
    np.testing.assert_array_equal(
        moved["part"]["layers"]["kernel"][0], params["part"]["layers"]["kernel"][0]
    )

    # Where there is no gradient yet, as of LoRA's A beside a B of zeros, nothing moves.
    none, _ = step(jax.tree.map(jnp.zeros_like, grads), start, params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(none))


# 4-bit formats

SHAPES = [(128, 3), (100, 7), (1, 1), (2, 96, 5)]
decoded = jax.jit(dense, static_argnums=1, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize("double", [False, True], ids=["scales", "double"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_4_bit_format(name, double):
    form, rng = FORMATS[name], np.random.default_rng(0)
    values = np.array(form.VALUES, np.float32)
    assert form.NAME == name and len(values) == 16 and np.abs(values).max() == 1
    widest = np.diff(np.sort(values)).max() / 2  # a block's largest error, by its scale
    for shape in SHAPES:
        kernel = rng.normal(size=shape).astype(np.float32)
        leaf = quantize(form, kernel, 64, double)
        assert isinstance(leaf, form) and is_quantized(leaf) and leaf.double == double
        assert leaf.shape == shape and leaf.ndim == len(shape) and leaf.dtype == "float32"

        # Half a byte a value; four bytes, or one and a share of four, for each block's scale.
        layers, one = math.prod(shape[:-2]), math.prod(shape[-2:])
        blocks = -(-one // 64)
        scales = blocks + 4 * -(-blocks // 256) + 4 if double else 4 * blocks
        assert leaf.nbytes == (layers * one + 1) // 2 + layers * scales

        got = np.asarray(decoded(leaf, jnp.float32))
        limit = np.abs(kernel).max() * (widest + (0.01 if double else 1e-6))
        assert np.abs(got - kernel).max() <= limit
        half = decoded(leaf, jnp.bfloat16)
        np.testing.assert_array_equal(half, jnp.asarray(got, jnp.bfloat16), strict=True)
        for layer in range(layers) if len(shape) > 2 else ():
            alone = quantize(form, kernel[layer], 64, double)
            jax.tree.map(np.testing.assert_array_equal, leaf.layer(layer), alone)

    # The format's own values are exact, and so are zeros, whatever else is in their block.
    exact = np.stack([np.resize(values, 128), np.zeros(128), np.resize([0, 1], 128)], axis=1)
    leaf = quantize(form, exact.astype(np.float32), 64, False)
    np.testing.assert_array_equal(decoded(leaf, jnp.float32), exact.astype(np.float32))


def test_no_format_has_the_structure_of_another():
    # JAX would run the program of one for the other.
    kernel = np.ones((64, 1), np.float32)
    kinds = [jax.tree.structure(quantize(form, kernel, 64)) for form in FORMATS.values()]
    assert all(a != b for a, b in itertools.combinations(kinds, 2))


# Record formats


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return Encoder(qwen2_vl_files(tmp_path_factory.mktemp("records")))


def record(name, **more):
    """Return the least row of a format: a question and its answer."""
    turns = [{"role": "user", "content": "color?"}, {"role": "assistant", "content": "red"}]
    asked, *answered = RECORDS[name].needed
    row = {asked: "color?", **dict.fromkeys(answered, "red")}
    return {**({name: turns} if name in CHATS else row), **more}


def words(row):
    return [
        (turn["role"], *(part.get("text", part["type"]) for part in turn["content"]))
        for turn in canonical(row)["messages"]
    ]


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_format(name, encoder):
    row, plain = record(name), [("user", "color?"), ("assistant", "red")]
    assert words(row) == plain and canonical(canonical(row)) == canonical(row)
    assert words({**row, "system": "be brief"}) == [("system", "be brief"), *plain]
    for key in RECORDS[name].optional:
        assert words({**row, key: None}) == plain
    pictured = {**row, "image": "a.png", "id": "x7"}
    assert words(pictured) == [("user", "image", "color?"), plain[1]]
    assert canonical(pictured)["images"] == ["a.png"] and canonical(pictured)["id"] == "x7"

    # A row that lacks a key, or whose content is under a key that nothing reads, is refused.
    for key in RECORDS[name].needed:
        with pytest.raises(UserError, match="expected one of"):
            words({**row, key: None})
        with pytest.raises(UserError, match=rf"'{key}'|no list of turns"):
            words({**row, key: 7})
    with pytest.raises(UserError, match="image_path"):
        words({**row, "image_path": "a.png"})

    # Whatever its format, it is the same example: the answer alone carries loss.
    example = encoder.encode(canonical(row))
    same = encoder.encode(canonical(record("messages")))
    assert all(np.array_equal(example[key], same[key]) for key in same)
    answer = load_tokenizer(encoder.directory).decode(example["tokens"][example["weights"] > 0])
    assert answer.startswith("red") and "color" not in answer
