"""4-bit codes in words, as TPUs decode them: exact both ways, by the kernel and without it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from runs import make_base, make_data, same_run, write_recipe

import vlm_jax
from vlm_jax import plan, quantization, sharding
from vlm_jax.cli import main
from vlm_jax.models.reference_configs import KNOWN
from vlm_jax.quantization import Storage
from vlm_jax.sharding import (
    AXES,
    laid_out,
    leaf_sharding,
    make_mesh,
    param_shardings,
    shard_params,
    used_on_mesh,
)
from vlm_jax.train import results
from vlm_jax.train.placement import abstract
from vlm_jax.trees import flatten, unflatten
from vlm_jax.weights import FORMATS, NF4, decode, is_quantized
from vlm_jax.weights.packing import storable
from vlm_jax.weights.quantize import quantize, requantized

# Decoded by tiles of 512, 256, 128 and 64 rows; eight scales lie beside each.
SHAPES = [(512, 128), (768, 256), (128, 384), (2, 192, 128)]
Q, DOWN = "self_attn/q_proj", "mlp/down_proj"  # spread by fsdp x tensor, and by tensor x fsdp
SKIPPED = "[k_proj, v_proj, o_proj, gate_proj, up_proj]"  # kernels take long to interpret
QWEN = KNOWN["Qwen/Qwen2-VL-7B-Instruct"]


@pytest.fixture
def kernel(monkeypatch):
    """The TPU's kernels, interpreted; returns the shapes that they are traced for."""
    calls = []

    def interpreted(run, *arrays, **given):
        calls.append(arrays[0].shape)
        return run(*arrays, interpret=True, **given)

    for table in (decode.WORDS, decode.SCALES):
        monkeypatch.setitem(table, "cpu", functools.partial(interpreted, table["tpu"]))
    return calls


@pytest.fixture
def on_tpu(monkeypatch):
    """Layouts as on a mesh of TPUs."""
    monkeypatch.setattr(sharding, "platform", lambda mesh: "tpu")


def drawn(name, double, shape):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return quantize(FORMATS[name], values, 64, double)


def bits(leaf):
    made = jax.jit(lambda leaf: leaf.dense(jnp.bfloat16))(leaf)
    return np.asarray(made).view(np.uint16)


@pytest.mark.parametrize("double", [False, True], ids=["scales", "double"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_words_are_another_layout_of_the_same_leaf(name, double, shape):
    leaf = drawn(name, double, shape)
    words = leaf.to_words()
    assert words.codes.dtype == jnp.int32 and words.codes.nbytes == leaf.codes.size // 2
    assert words.shape == leaf.shape and words.ndim == leaf.ndim and type(words) is type(leaf)
    for one, other in zip(jax.tree.leaves(leaf), jax.tree.leaves(words.from_words()), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    np.testing.assert_array_equal(storable(words).codes, storable(leaf).codes)
    np.testing.assert_array_equal(words.dense(jnp.float32), leaf.dense(jnp.float32))


@pytest.mark.parametrize(
    ("name", "double", "shape"),
    [("nf4", True, (768, 256)), ("fp4", True, (128, 384)), ("fp4", False, (192, 128))],
)
def test_the_kernel_gives_the_bits_of_the_formula(kernel, name, double, shape):
    leaf = drawn(name, double, shape)
    np.testing.assert_array_equal(bits(leaf.to_words()), bits(leaf))


def test_the_kernel_gives_float32_too(kernel):
    leaf = drawn("nf4", True, (2, 128, 128))
    made = jax.jit(lambda leaf: leaf.dense(jnp.float32))(leaf.to_words())
    assert (16, 128) in kernel
    np.testing.assert_array_equal(made, leaf.dense(jnp.float32))


@pytest.mark.parametrize("name", FORMATS)
def test_the_kernel_rounds_every_code_at_every_scale(kernel, name):
    """Zeros, the smallest and the largest numbers, what overflows bfloat16, ties, infinity."""
    largest, smallest = np.finfo(np.float32).max, np.finfo(np.float32).tiny
    scales = np.random.default_rng(0).normal(size=(8, 128)).astype(np.float32)
    scales *= np.float32(2) ** np.linspace(-120, 126, 128, dtype=np.float32)
    edges = [0, smallest, largest, 3.3961775e38, 1.00390625, 1.01171875, 1e-38, np.inf]
    scales[:, : len(edges)] = edges
    codes = np.arange(512 * 128).reshape(512, 128) // 3 % 16
    leaf = FORMATS[name](jnp.asarray(codes, jnp.uint4), jnp.asarray(scales))
    np.testing.assert_array_equal(bits(leaf.to_words()), bits(leaf))


def placed(leaf, axes, mesh):
    where = leaf_sharding(leaf, axes, mesh)
    return jax.device_put(used_on_mesh({"k": leaf}, {"k": where})["k"], where)


@pytest.mark.parametrize("axes", [("embed", "wide"), ("wide", "embed")])
def test_the_kernel_runs_on_each_shard(kernel, axes):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    leaf = drawn("nf4", True, (256, 256))
    words = placed(leaf.to_words(), axes, mesh)
    assert words.codes.addressable_shards[0].data.size == words.codes.size // 4
    np.testing.assert_array_equal(bits(words), bits(leaf))
    text = jax.jit(lambda leaf: leaf.dense(jnp.bfloat16)).lower(words).compile().as_text()
    assert "bf16[256,256]" not in text  # each device has its half of the columns or rows


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_tpu_decodes_by_kernels_without_a_gather(dtype):
    """A gather of one scale at a time takes longer than all else, and no estimate counts it."""
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=plan.devices("v5e:2x2"))
    path = f"model/language_model/layers/{Q}/kernel"
    leaf = Storage(NF4, True).abstract((2, 192, 256), "float32")
    model = vlm_jax.from_config(QWEN)
    shapes = laid_out(model, unflatten({path: leaf}), mesh)
    shardings = param_shardings(model, shapes, mesh)
    (leaf,) = flatten(abstract(used_on_mesh(shapes, shardings), shardings)).values()
    step = jax.jit(lambda leaf: jax.lax.map(lambda layer: layer.dense(dtype), leaf))
    text = step.lower(leaf).compile().as_text()
    assert "nf4_decode" in text and "nf4_scales" in text and " gather(" not in text


def abstract_mesh(fsdp=1, tensor=1):
    return AbstractMesh((1, fsdp, tensor, 1), AXES)


@pytest.mark.parametrize(
    ("module", "shape", "block", "mesh", "words"),
    [
        (Q, (192, 128), 64, (1, 1), True),
        (Q, (256, 128), 128, (1, 1), False),  # another block
        (Q, (160, 128), 64, (1, 1), False),  # blocks run over the ends of columns
        (Q, (192, 192), 64, (1, 1), False),  # a column tile is 128 wide
        (Q, (192, 256), 64, (1, 2), True),
        (Q, (192, 128), 64, (1, 2), False),  # half of the columns are too few
        (Q, (192, 256), 64, (8, 1), True),
        (Q, (192, 256), 64, (16, 1), False),  # fsdp cuts rows that are less than a word
        (Q, (192, 256), 64, (5, 1), True),  # replicated, as 5 does not divide
        (DOWN, (128, 128), 64, (1, 2), True),
        (DOWN, (192, 128), 64, (1, 2), False),  # tensor cuts a block
        (DOWN, (192, 128), 64, (2, 1), True),
    ],
)
def test_a_kernel_lies_in_words_where_its_shards_can(on_tpu, module, shape, block, mesh, words):
    path = f"model/language_model/layers/{module}/kernel"
    leaf = Storage(NF4, True, block).abstract((2, *shape), "float32")
    laid = laid_out(vlm_jax.from_config(QWEN), unflatten({path: leaf}), abstract_mesh(*mesh))
    (found,) = flatten(laid).values()
    assert found.in_words == words and found.shape == leaf.shape


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("mesh", [(1, 1), (4, 1), (16, 1)])
def test_all_kernels_of_known_decoders_lie_in_words(on_tpu, name, mesh):
    model = vlm_jax.from_config(KNOWN[name])
    shapes = flatten(laid_out(model, quantization.abstract(model, "nf4"), abstract_mesh(*mesh)))
    four = [leaf for leaf in shapes.values() if is_quantized(leaf)]
    assert four and all(leaf.in_words for leaf in four)


def test_other_platforms_keep_a_code_an_element():
    leaf = drawn("nf4", True, (1, 128, 128))
    path = f"model/language_model/layers/{Q}/kernel"
    model = vlm_jax.from_config(QWEN)
    for mesh in (make_mesh(), abstract_mesh()):
        assert not flatten(laid_out(model, {path: leaf}, mesh))[path].in_words


def test_a_merged_kernel_keeps_its_layout():
    like = drawn("nf4", True, (128, 128)).to_words()
    values = jnp.asarray(like.dense(jnp.float32)) * 2
    again = requantized(like, values, "k")
    assert again.in_words
    jax.tree.map(np.testing.assert_array_equal, again, quantize(NF4, values, 64).to_words())


def test_a_checkpoint_is_read_into_words_and_written_from_them(tmp_path, on_tpu):
    base = make_base(tmp_path / "base", width=128)
    mesh = make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
    model, words = vlm_jax.load(base, quantize="nf4-dq", mesh=mesh)
    _, columns = vlm_jax.load(base, quantize="nf4-dq")
    moved = shard_params(model, columns, mesh)
    for path, leaf in flatten(words).items():
        if is_quantized(leaf):
            assert leaf.in_words and leaf.codes.sharding.num_devices == 2, path
            jax.tree.map(np.testing.assert_array_equal, leaf, flatten(moved)[path])
    vlm_jax.save_pretrained(model, words, tmp_path / "words", quantized=True)
    vlm_jax.save_pretrained(model, columns, tmp_path / "columns", quantized=True)
    for file in (tmp_path / "columns").iterdir():
        assert file.read_bytes() == (tmp_path / "words" / file.name).read_bytes(), file.name


@pytest.mark.nightly
def test_a_run_in_words_is_the_run_without(tmp_path, monkeypatch, request):
    """QLoRA by the command on a mesh: losses, adapter, and its 4-bit export."""
    base, data = make_base(tmp_path / "base", width=128), make_data(tmp_path / "data")
    mesh = make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
    monkeypatch.setattr(results, "mesh_for_reading", lambda config: mesh)
    runs = []
    for layout in ("columns", "words"):
        if layout == "words":
            calls = request.getfixturevalue("kernel")
            request.getfixturevalue("on_tpu")
        (tmp_path / layout).mkdir()
        recipe = write_recipe(
            tmp_path / layout, base, data, "model.quantize=nf4-dq", "mesh.devices=2",
            "mesh.data=1", "mesh.fsdp=2", "training.bf16=true", "training.max_steps=2",
            "training.per_device_train_batch_size=1", f"model.llm_int8_skip_modules={SKIPPED}",
        )  # fmt: skip
        assert main(["train", "--config", str(recipe)]) == 0
        model, params, _ = results.load_run(tmp_path / layout / "out")
        runs.append([leaf.in_words for leaf in flatten(params).values() if is_quantized(leaf)])
        vlm_jax.save_pretrained(model, params, tmp_path / layout / "merged", quantized=True)
    assert calls and runs == [[False] * 2, [True] * 2]
    same_run(*(tmp_path / layout / "out" for layout in ("columns", "words")))
    for file in (tmp_path / "columns/merged").iterdir():
        assert file.read_bytes() == (tmp_path / "words/merged" / file.name).read_bytes(), file.name
