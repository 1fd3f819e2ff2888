"""4-bit weights against bitsandbytes on the CPU: codes, scales and values, to the bit."""

import dataclasses

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import vlm_jax
from vlm_jax import nf4
from vlm_jax.weights import FORMATS, dense
from vlm_jax.weights.bnb import from_tensors, to_bnb, to_tensors
from vlm_jax.weights.decode import decode, implementation, lookup, select
from vlm_jax.weights.fourbit import BLOCKS
from vlm_jax.weights.packing import flatten_layer
from vlm_jax.weights.quantize import quantize, quantize_scales

pytestmark = pytest.mark.exact

TYPES = {
    "float32": (torch.float32, np.float32),
    "bfloat16": (torch.bfloat16, ml_dtypes.bfloat16),
    "float16": (torch.float16, np.float16),
}
# [in, out]: blocks along columns and over their ends, odd counts, partial last blocks, single rows
# and columns, columns of more than 256 scales.
SHAPES = [
    (64, 1), (64, 8), (128, 100), (256, 130), (640, 40), (1536, 24), (4096, 16), (3584, 40),
    (48, 48), (192, 193), (100, 64), (96, 31), (1000, 77),
    (65, 7), (63, 33), (33, 65), (3, 5), (17, 64), (1, 1), (1, 70), (1, 64), (127, 1), (2, 1),
    (18944, 5), (20000, 3),
]  # fmt: skip


def weights(shape, dtype, seed=0):
    """Return a torch weight [out, in] with a block of zeros and a stretch of small values."""
    rng = np.random.default_rng(seed)
    weight = torch.tensor(rng.standard_normal(shape[::-1]) * 0.02, dtype=torch.float32)
    flat = weight.view(-1)
    if flat.numel() > 400:
        flat[64:130] = 0
        flat[256:300] *= 1e-5  # subnormal in float16
    return weight.to(TYPES[dtype][0])


def kernel_of(weight, dtype):
    """Return the kernel [in, out] of a torch weight, as numpy."""
    return weight.to(torch.float32).numpy().astype(TYPES[dtype][1]).T


def theirs(weight, name, block, double):
    return bnb.quantize_4bit(weight, blocksize=block, quant_type=name, compress_statistics=double)


def bits(array):
    array = np.ascontiguousarray(array)
    return array.view({2: np.uint16, 4: np.uint32}[array.itemsize])


def ulps(one, other):
    return abs(np.float64(one) - np.float64(other)) / np.spacing(np.abs(np.float32(other)))


def with_state(leaf, state):
    """Return the leaf with bitsandbytes' scales in place of ours."""
    absmax = state.absmax.numpy()
    if leaf.aligned:
        absmax = absmax.reshape(leaf.shape[1], -1).T
    if not leaf.double:
        return dataclasses.replace(leaf, absmax=jnp.asarray(absmax))
    nested, offset = state.state2.absmax.numpy(), state.offset.numpy()
    return dataclasses.replace(
        leaf,
        absmax=jnp.asarray(absmax),
        nested=jnp.asarray(nested),
        offset=jnp.asarray(offset),
    )


def expected_values(leaf, state, dtype):
    """Return float32 code times float32 scale, rounded once, computed by torch."""
    absmax = state.absmax
    if leaf.double:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    codes = torch.tensor(flatten_layer(leaf).codes.astype(np.int64))
    scales = absmax.repeat_interleave(leaf.block)[: codes.numel()]
    values = (state.code[codes] * scales).to(TYPES[dtype][0])
    return values.to(torch.float32).reshape(leaf.shape[::-1]).T.numpy()


decoded = jax.jit(dense, static_argnums=1)


def check(shape, dtype, name, block, double, eager=False):
    """Quantize, compare all arrays, decode, compare, and go through bitsandbytes' tensors."""
    weight = weights(shape, dtype)
    packed, state = theirs(weight, name, block, double)
    leaf = quantize(FORMATS[name], kernel_of(weight, dtype), block, double)
    ours = to_bnb(leaf)
    np.testing.assert_array_equal(ours["weight"], packed.numpy())
    np.testing.assert_array_equal(bits(ours["quant_map"]), bits(state.code.numpy()))
    single = to_bnb(quantize(FORMATS[name], kernel_of(weight, dtype), block, False))["absmax"]
    absmax = theirs(weight, name, block, False)[1].absmax.numpy()
    np.testing.assert_array_equal(bits(single), bits(absmax))
    if double:
        check_nested(ours, state, absmax)
        np.testing.assert_array_equal(
            bits(ours["nested_quant_map"]), bits(state.state2.code.numpy())
        )
    same = with_state(leaf, state)
    values = expected_values(same, state, dtype)
    for function in (decoded, dense) if eager else (decoded,):
        kernel = function(same, dtype)
        assert kernel.dtype == dtype
        np.testing.assert_array_equal(np.asarray(kernel, np.float32), values)
    # bitsandbytes' kernel for processors with AVX-512 is wrong where blocks run over row ends; the
    # values above are computed from its codes and scales.
    if shape[0] % block == 0:
        np.testing.assert_array_equal(
            bnb.dequantize_4bit(packed, state).to(torch.float32).T.numpy(), values
        )
    check_tensors(leaf)


def check_nested(ours, state, absmax):
    """The same given one offset; the mean's last bit moves with torch's threads."""
    codes, nested = quantize_scales(absmax - state.offset.numpy())
    np.testing.assert_array_equal(codes, state.absmax.numpy())
    np.testing.assert_array_equal(bits(nested), bits(state.state2.absmax.numpy()))
    assert ulps(ours["offset"], state.offset.numpy()) <= 2
    apart = np.abs(ours["absmax"].astype(int) - state.absmax.numpy().astype(int))
    if ours["offset"] == state.offset.numpy():
        assert not apart.any()
        np.testing.assert_array_equal(bits(ours["nested_absmax"]), bits(nested))
    assert apart.max() <= 1 and (apart > 0).sum() <= max(1, apart.size / 10_000)


def check_tensors(leaf):
    """Written and read, the arrays are the same, here and as bitsandbytes reads them."""
    tensors = to_tensors(leaf)
    stored = from_tensors(tensors, leaf.shape[::-1], "w")
    assert (stored.format, stored.block, stored.dtype) == (type(leaf), leaf.block, leaf.dtype)
    for one, other in zip(stored.flat, flatten_layer(leaf), strict=True):
        np.testing.assert_array_equal(one, other)
    given = {f"w{suffix}": torch.tensor(array) for suffix, array in tensors.items()}
    packed = given.pop("w")
    state = bnb.QuantState.from_dict(given, device="cpu")
    assert state.shape == leaf.shape[::-1] and str(state.dtype) == f"torch.{leaf.dtype}"
    assert state.blocksize == leaf.block and state.nested == leaf.double
    if leaf.shape[0] % leaf.block == 0:  # see `check`
        values = bnb.dequantize_4bit(packed, state).to(torch.float32).T.numpy()
        np.testing.assert_array_equal(values, np.asarray(decoded(leaf, leaf.dtype), np.float32))


@pytest.mark.parametrize("number", range(len(SHAPES)), ids=lambda number: str(SHAPES[number]))
def test_every_shape_and_type(number):
    shape, types = SHAPES[number], list(TYPES)
    check(shape, types[number % 3], "nf4", 64, number % 4 > 0)
    check(shape, types[(number + 1) % 3], "fp4", 64, number % 2 > 0)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block != 64])
def test_every_block(block):
    check((2 * block, 5), "bfloat16", "nf4", block, True)
    check((block + 3, 7), "float32", "fp4", block, False)


@pytest.mark.parametrize("shape", [(128, 10), (96, 10)], ids=str)
@pytest.mark.parametrize("dtype", TYPES)
def test_decoding_step_by_step_gives_the_same(shape, dtype):
    check(shape, dtype, "nf4", 64, True, eager=True)


def strange_weights():
    """Return {what: float32 weight [out, in]} of blocks whose scales are out of the ordinary."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((6, 128)).astype(np.float32)
    found = {f"{scale:.0e}": normal * np.float32(scale) for scale in (1e-37, 1e-38, 1e-39, 1e-43)}
    found["largest"] = normal / np.abs(normal).max() * np.float32(3.4e38)
    found["smallest"] = (rng.integers(-2, 3, (6, 128)) * np.float32(1e-45)).astype(np.float32)
    found["each block another"] = normal * np.float32(10.0) ** np.repeat(
        np.linspace(-44, 37, 12, dtype=np.float64), 64
    ).reshape(6, 128).astype(np.float32)
    found["within a block"] = normal * np.float32(10.0) ** rng.uniform(-44, 0, (6, 128)).astype(
        np.float32
    )
    found["zeros of both signs"] = np.where(normal > 0, 0.0, -0.0).astype(np.float32)
    found["short last block"] = (normal * np.float32(1e-41))[:, :97]
    found["short last block of zeros"] = np.zeros((3, 33), np.float32)
    assert all(np.isfinite(weight).all() for weight in found.values())
    return found


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("what", strange_weights())
def test_subnormal_and_huge_values(what, name):
    weight = strange_weights()[what]
    packed, state = theirs(torch.tensor(weight), name, 64, False)
    ours = to_bnb(quantize(FORMATS[name], weight.T, 64, False))
    np.testing.assert_array_equal(ours["weight"], packed.numpy())
    np.testing.assert_array_equal(bits(ours["absmax"]), bits(state.absmax.numpy()))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("what", ["1e-39", "within a block"])
def test_values_that_are_subnormal_in_other_types(what, dtype, name):
    scale = 1e33 if dtype == "float16" and what == "1e-39" else 1
    weight = (torch.tensor(strange_weights()[what]) * scale).to(TYPES[dtype][0])
    assert weight.count_nonzero() > 50
    packed, state = theirs(weight, name, 64, False)
    ours = to_bnb(quantize(FORMATS[name], kernel_of(weight, dtype), 64, False))
    np.testing.assert_array_equal(ours["weight"], packed.numpy())
    np.testing.assert_array_equal(bits(ours["absmax"]), bits(state.absmax.numpy()))


def test_a_large_kernel_takes_little_and_stays_near():
    kernel = (np.random.default_rng(0).standard_normal((4096, 4096)) * 0.02).astype(np.float32)
    leaf = nf4.quantize(kernel)
    packed, state = theirs(torch.tensor(kernel.T.copy()), "nf4", 64, True)
    ours = to_bnb(leaf)
    np.testing.assert_array_equal(ours["weight"], packed.numpy())
    absmax = theirs(torch.tensor(kernel.T.copy()), "nf4", 64, False)[1].absmax.numpy()
    check_nested(ours, state, absmax)
    assert 4.12 < 8 * leaf.nbytes / kernel.size <= 4.13
    error = np.asarray(decoded(leaf, "float32")) - kernel
    assert 0.08 < np.sqrt((error**2).mean() / (kernel**2).mean()) <= 0.0925


def test_layers_of_a_stack_are_quantized_each():
    stack = np.stack([weights((100, 8), "float32", seed).numpy().T for seed in range(3)])
    leaf = nf4.quantize(stack)
    values = decoded(leaf, "float32")
    assert leaf.shape == values.shape == stack.shape
    for i, kernel in enumerate(stack):
        one, alone = to_bnb(leaf, i), to_bnb(nf4.quantize(kernel))
        jax.tree.map(np.testing.assert_array_equal, one, alone)
        np.testing.assert_array_equal(values[i], decoded(leaf.layer(i), "float32"))
    with pytest.raises(ValueError, match="give a layer"):
        to_bnb(leaf)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("place", [5, -1])  # in a whole block, and in a shorter last one
def test_inf_and_nan_are_refused_by_name(bad, place):
    kernel = np.ones((100, 3), np.float32)
    kernel.reshape(-1)[place] = bad
    with pytest.raises(vlm_jax.UserError, match="a kernel holds inf or NaN"):
        nf4.quantize(kernel)
    with pytest.raises(vlm_jax.UserError, match="a kernel, layer 1, holds inf or NaN"):
        nf4.quantize(np.stack([np.ones_like(kernel), kernel]))


def test_what_is_no_kernel_is_refused():
    kernel = np.ones((64, 4), np.float32)
    for block in (0, 16, 63, 8192):
        with pytest.raises(vlm_jax.UserError, match=f"blocks of {block}, which bitsandbytes"):
            nf4.quantize(kernel, block)
    with pytest.raises(vlm_jax.UserError, match="quantized already, as nf4"):
        nf4.quantize(nf4.quantize(kernel))
    with pytest.raises(vlm_jax.UserError, match="of type int32; only floats"):
        nf4.quantize(kernel.astype(np.int32))
    for shape in ((4,), (0, 4), (2, 0, 4)):
        with pytest.raises(vlm_jax.UserError, match="only matrices"):
            nf4.quantize(np.ones(shape, np.float32))


@pytest.mark.parametrize("shape", [(128, 40), (100, 30), (65, 7)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_on_the_device_ordinary_values_get_the_same_codes(name, shape):
    kernel = jnp.asarray(kernel_of(weights(shape, "bfloat16"), "bfloat16"))
    for double in (False, True):
        exact = quantize(FORMATS[name], kernel, 64, double)
        made = jax.jit(lambda kernel, double=double: quantize(FORMATS[name], kernel, 64, double))
        leaf = made(kernel)
        np.testing.assert_array_equal(
            np.asarray(leaf.codes, np.uint8), np.asarray(exact.codes, np.uint8)
        )
        assert jax.tree.structure(leaf) == jax.tree.structure(exact)
        if double:
            np.testing.assert_allclose(leaf.offset, exact.offset, rtol=1e-6)
            apart = np.abs(np.asarray(leaf.absmax, int) - np.asarray(exact.absmax, int))
            assert apart.max() <= 1
            np.testing.assert_allclose(leaf.nested, exact.nested, rtol=1e-5)
        else:
            np.testing.assert_array_equal(leaf.absmax, exact.absmax)


@pytest.mark.parametrize("name", FORMATS)
def test_implementations_of_decoding_agree(name):
    codes = jnp.arange(16, dtype=jnp.uint4).reshape(4, 4)
    values = FORMATS[name].VALUES
    table = np.asarray(values, np.float32).reshape(4, 4)
    for function in (select, lookup, decode):
        for one in (function, jax.jit(function, static_argnums=1)):
            np.testing.assert_array_equal(one(codes, values), table)


def test_an_implementation_can_be_chosen():
    def program():
        return str(jax.make_jaxpr(lambda codes: decode(codes, FORMATS["nf4"].VALUES))(codes))

    codes = jnp.zeros(3, jnp.uint4)
    default = program()
    with implementation("lookup"):
        assert "gather" in program() and program() != default
        with implementation("select"):
            assert "select_n" in program() and "gather" not in program()
        assert "gather" in program()
    assert program() == default
    with pytest.raises(ValueError, match="Unknown decode 'tree'"), implementation("tree"):
        pass


def test_what_is_no_matrix_of_floats_is_refused():
    for kernel in (np.zeros((2, 2, 64, 3), np.float32), [[1.0] * 64], np.zeros(64, np.float32)):
        with pytest.raises(vlm_jax.UserError, match="only matrices are quantized"):
            nf4.quantize(kernel)
    with pytest.raises(vlm_jax.UserError, match="of type float8_e4m3fn; only floats"):
        nf4.quantize(jnp.zeros((64, 2), jnp.float8_e4m3fn))
    with pytest.raises(vlm_jax.UserError, match="not a 4-bit leaf"):
        nf4.to_bnb(np.zeros((64, 2), np.float32))


def test_codes_of_float64_stand_for_float32():
    """bitsandbytes has no float64."""
    kernel = np.random.default_rng(0).normal(size=(64, 3))
    leaf = nf4.quantize(kernel)
    assert leaf.dtype == "float32"
    stored = from_tensors(to_tensors(leaf), (3, 64), "x")
    assert stored.dtype == "float32"
