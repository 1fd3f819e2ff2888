"""Kernels of attention: the same numbers as plain attention, and which of them is chosen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from jax.extend.core import jaxprs_in_params

import vlm_jax
from vlm_jax import config
from vlm_jax.cli import main
from vlm_jax.config.choices import CHOICES
from vlm_jax.models.layers.attention import KERNELS, attention, chunked, recorded, splash, xla
from vlm_jax.models.layers.attention.choice import Case, choose
from vlm_jax.models.layers.attention.mask import Form, Mask, Side, blocks_seen, seen
from vlm_jax.models.layers.attention.spread import spread
from vlm_jax.models.layers.partition import rows_over
from vlm_jax.models.layers.remat import REMAT
from vlm_jax.sharding import make_mesh
from vlm_jax.train.results import open_run

BLOCK = 128
OTHERS = {
    "chunked": chunked.attend,
    "splash": functools.partial(splash.attend, interpret=True),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of which a short row has several."""
    monkeypatch.setitem(chunked.BLOCKS, "cpu", (BLOCK, BLOCK))
    for name in ("QUERIES", "KEYS", "AT_ONCE"):
        monkeypatch.setattr(splash, name, BLOCK)


def segments(*rows, length):
    """Return int32 [rows, length] of segments of these lengths one after another, then padding."""
    made = np.zeros((len(rows), length), np.int32)
    for row, lengths in zip(made, rows, strict=True):
        numbers = np.repeat(np.arange(len(lengths)) + 1, lengths)
        row[: len(numbers)] = numbers
    return jnp.asarray(made)


def draw(T, heads, kv_heads, width, rows=2):
    """Return q, k, v, and the cotangent of what attention gives."""
    rng = np.random.default_rng(0)
    shapes = [(rows, T, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def gradients(attend, arrays, mask, form, real):
    """Return what attention gives and its gradients, of the places that are real."""
    *qkv, cotangent = arrays

    def loss(*qkv):
        out = jnp.where(real, attend(*qkv, mask, form), 0)
        return (out * cotangent).sum(), out

    (_, out), found = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*qkv)
    return dict(zip(("out", "q", "k", "v"), (out, *found), strict=True))


def check_equal(found, expected):
    for name, value in expected.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-6 * scale, err_msg=name)


ODD = segments([1, BLOCK, BLOCK + 1], [200, 50], length=300)  # and padding
WHOLE = segments([100, 284], [384], length=384)
CASES = {
    "packed": ((300, 7, 1, 80), ODD, Form(True, 0.1), None),
    "full length": ((384, 2, 2, 64), WHOLE, Form(False, 0.2), None),
    "one image": ((300, 2, 1, 72), None, Form(False, 0.1), None),
    "unpacked": ((300, 4, 2, 72), None, Form(True, 0.1), None),
    "window": ((300, 2, 2, 128), ODD, Form(True, 0.1), 40),
    "soft cap": ((300, 4, 2, 64), ODD, Form(True, 0.5, soft_cap=2.0), 250),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """(q, k, v and a cotangent, mask, form, real places, what plain attention gives)."""
    sizes, numbers, form, window = CASES[request.param]
    arrays, T = draw(*sizes), sizes[0]
    side = Side(jnp.arange(T, dtype=jnp.int32), numbers)
    mask = Mask(side, side, None if window is None else jnp.int32(window))
    real = jnp.ones((2, T, 1, 1), bool) if numbers is None else (numbers > 0)[:, :, None, None]
    return arrays, mask, form, real, gradients(xla.attend, arrays, mask, form, real)


@pytest.mark.parametrize("name", OTHERS)
def test_a_kernel_gives_plain_attentions_values_and_gradients(case, name):
    *given, expected = case
    check_equal(gradients(OTHERS[name], *given), expected)


def test_chunks_of_a_gpu_whose_loops_are_whole(monkeypatch):
    monkeypatch.setattr(chunked, "WHOLE", ("cpu",))
    arrays, side = draw(300, 4, 2, 64), Side(jnp.arange(300, dtype=jnp.int32), ODD)
    given = arrays, Mask(side, side), Form(True, 0.1), (ODD > 0)[:, :, None, None]
    check_equal(gradients(chunked.attend, *given), gradients(xla.attend, *given))


@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "unbounded"])
def test_two_way_blocks_by_chunks_and_in_plain_attention(bounded):
    """Tokens 20 to 150 of each row, image tokens say, see one another, in the window or not."""
    arrays, T = draw(300, 4, 2, 64), 300
    blocks = np.zeros((2, T), np.int32)
    blocks[:, 20:150], blocks[:, 180:190] = 1, 2
    side = Side(jnp.arange(T, dtype=jnp.int32), ODD, jnp.asarray(blocks))
    mask, form = Mask(side, side, jnp.int32(33)), Form(True, 0.1, None, bounded)
    real = (ODD > 0)[:, :, None, None]
    expected = gradients(xla.attend, arrays, mask, form, real)
    check_equal(gradients(chunked.attend, arrays, mask, form, real), expected)
    sees = np.asarray(seen(mask, form))[1]  # its first segment is its tokens 0 to 199
    assert sees[100, 132] and not sees[100, 150] and not sees[185, 150 - 1]
    assert sees[140, 21] == (not bounded) and sees[185, 189] and not sees[179, 180]


def test_what_a_part_of_queries_and_a_cache_give():
    """Queries from a slot on, as after a prefill: the last rows of the whole."""
    q, k, v, _ = draw(300, 4, 2, 64)
    whole = attention(q, k, v, ODD, ODD, causal=True, implementation="xla")
    for name in ("xla", "chunked"):
        attend = functools.partial(attention, causal=True, implementation=name)
        part = jax.jit(attend)(q[:, 250:], k, v, ODD[:, 250:], ODD, q_start=jnp.int32(250))
        np.testing.assert_allclose(part[:, :8], whole[:, 250:258], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("sizes", "heads"),
    [({"data": 2, "tensor": 2}, 2), ({"fsdp": 2, "context": 2}, 2), ({"data": 4, "tensor": 2}, 3)],
    ids=["heads spread", "tokens spread", "more devices than rows"],
)
@pytest.mark.parametrize("name", OTHERS)
def test_a_kernel_on_a_mesh_gives_the_same(name, sizes, heads):
    numbers = segments([100, 140], [130, 126], length=256)
    arrays = draw(256, heads * 2, heads, 64)
    side = Side(jnp.arange(256, dtype=jnp.int32), numbers)
    mask, form, real = Mask(side, side), Form(True, 0.1), (numbers > 0)[:, :, None, None]
    expected = gradients(xla.attend, arrays, mask, form, real)
    count = int(np.prod(list(sizes.values())))
    mesh = make_mesh(**{"data": 1, **sizes}, devices=jax.devices()[:count])
    over = jax.sharding.PartitionSpec(("data", "fsdp"), "context")
    with rows_over(jax.sharding.NamedSharding(mesh, over)):
        spread_one = functools.partial(spread, OTHERS[name])
        check_equal(gradients(spread_one, arrays, mask, form, real), expected)


def test_a_packed_row_by_chunks_gives_what_its_examples_give_alone():
    q, k, v, _ = draw(300, 4, 2, 64)
    packed = attention(q, k, v, ODD, ODD, causal=True, implementation="chunked")
    for row, start, end in ((0, 1, 129), (0, 129, 258), (1, 0, 200), (1, 200, 250)):
        alone = (x[row : row + 1, start:end] for x in (q, k, v))
        expected = attention(*alone, None, None, causal=True, implementation="xla")
        np.testing.assert_allclose(packed[row, start:end], expected[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("packed", [True, False])
def test_the_memory_of_chunks_goes_with_the_length_of_a_row(packed):
    """No [T, S], forward or backward: twice the tokens, at most twice the memory."""

    def temporary(T):
        def loss(q, k, v, segments):
            segments = segments if packed else None
            return attention(
                q, k, v, segments, segments, causal=True, implementation="chunked"
            ).sum()

        q, k = (jax.ShapeDtypeStruct((1, T, n, 16), jnp.float32) for n in (4, 2))
        numbers = jax.ShapeDtypeStruct((1, T), jnp.int32)
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, numbers).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one, two = temporary(2048), temporary(4096)
    assert 2048 * 16 * 4 < one < 2 * 2048**2 and two < 2 * one


def test_blocks_that_share_no_segment_are_not_computed():
    """Four images of one block each: 4 blocks of 16, and none is left out that is needed."""
    images = segments([BLOCK] * 4, [BLOCK, BLOCK + 1, BLOCK], length=4 * BLOCK)
    side = Side(jnp.arange(4 * BLOCK, dtype=jnp.int32), images)
    for causal, first, second in ((False, 4, 8), (True, 4, 6)):
        mask, form = Mask(side, side), Form(causal, 1.0)
        met = np.asarray(blocks_seen(mask, form, BLOCK, BLOCK))
        assert [one.sum() for one in met] == [first, second]
        needed = np.asarray(seen(mask, form)).reshape(2, 4, BLOCK, 4, BLOCK).any((2, 4))
        assert not (needed & ~met).any()
        launched = splash.launched(mask, form, heads=3)
        assert launched == dict.fromkeys(("forward", "dkv"), (3 * 2 * 16, 3 * (first + second)))


def test_a_block_without_a_shared_segment_costs_nothing():
    """Keys of other images that are not numbers make no difference: they are never read."""
    images = segments([BLOCK] * 3, length=3 * BLOCK)
    q, k, v, _ = draw(3 * BLOCK, 2, 1, 64, rows=1)
    poisoned = v.at[:, :BLOCK].set(jnp.nan)
    for attend in OTHERS.values():
        side = Side(jnp.arange(3 * BLOCK, dtype=jnp.int32), images)
        mask, form = Mask(side, side), Form(False, 0.1)
        out = attend(q, k, poisoned, mask, form)
        assert np.isfinite(out[:, BLOCK:]).all() and np.isnan(out[:, :BLOCK]).all()
        np.testing.assert_array_equal(out[:, BLOCK:], attend(q, k, v, mask, form)[:, BLOCK:])


def loops(jaxpr, primitive):
    """Return how often a primitive is in a jaxpr and those inside it."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == primitive
        for inner in jaxprs_in_params(equation.params):
            count += loops(inner, primitive)
    return count


@pytest.mark.parametrize(("name", "primitive"), [("chunked", "while"), ("splash", "pallas_call")])
def test_the_forward_kernel_runs_once_where_what_it_gives_is_kept(name, primitive):
    q, k, v, _ = draw(256, 2, 1, 128)
    numbers = segments([100, 156], [256], length=256)
    side = Side(jnp.arange(256, dtype=jnp.int32), numbers)
    mask = Mask(side, side)

    def count(policy):
        def block(q):
            attended = OTHERS[name](jnp.sin(q), k, v, mask, Form(True, 0.1))
            return jnp.sin(attended).sum()

        kept = jax.checkpoint(block, policy=REMAT[policy])
        return loops(jax.make_jaxpr(jax.grad(kept))(q).jaxpr, primitive)

    assert count("block_save_attention") == 2  # forward, backward
    assert count("block") == 3


CASE = Case(
    platform="tpu", T=2048, S=2048, heads=28, kv_heads=4, width=128, dtype="bfloat16",
    form=Form(True, 0.1), window=False, blocks=False, cached=False, whole=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, "splash for causal rows of 2,048, 28 heads (4 KV heads) of width 128"),
        (
            {"platform": "gpu", "T": 1024, "S": 1024},
            "xla for causal rows of 1,024, 28 heads (4 KV heads) of width 128",
        ),
        (
            {"platform": "gpu"},
            "chunked for causal rows of 2,048, 28 heads (4 KV heads) of width 128",
        ),
        (
            {"platform": "cpu", "kv_heads": 28},
            "chunked for causal rows of 2,048, 28 heads of width 128",
        ),
        (
            {"blocks": True},
            "chunked for causal rows of 2,048, 28 heads (4 KV heads) of width 128 "
            "(splash lacks bidirectional blocks)",
        ),
        (
            {"cached": True, "T": 1},
            "xla for cached rows of 1 x 2,048, 28 heads (4 KV heads) of width 128 "
            "(splash lacks the keys of a cache)",
        ),
        (
            {"S": 2**17, "T": 2**17, "window": True},
            "chunked for causal rows of 131,072, 28 heads (4 KV heads) of width 128 "
            "(splash lacks a window in rows of more than 65,536 tokens)",
        ),
        (
            {"form": Form(False, 0.1), "whole": False},
            "chunked for bidirectional rows of 2,048, 28 heads (4 KV heads) of width 128 "
            "(splash lacks arrays on several devices outside of a mesh)",
        ),
    ],
)
def test_the_table_chooses_by_platform_and_features(changes, chosen):
    with recorded() as lines:
        choose(dataclasses.replace(CASE, **changes))
    assert list(lines) == [chosen]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"platform": "cpu"}, "runs on a TPU, and this program is for a CPU"),
        ({"blocks": True}, "lacks bidirectional blocks (causal rows of 2,048, 28 heads (4 KV"),
    ],
)
def test_a_forced_kernel_that_cannot_compute_is_refused(changes, why):
    with pytest.raises(vlm_jax.UserError) as refused:
        choose(dataclasses.replace(CASE, **changes), "splash")
    assert f"model.attention is 'splash', but it {why}" in str(refused.value)
    assert str(refused.value).endswith("or set it to xla or chunked.")


def test_a_forced_kernel_computes_all_but_a_cache_that_it_lacks():
    assert choose(CASE, "xla") == "xla"
    assert choose(dataclasses.replace(CASE, cached=True), "splash") == "chunked"
    images = dataclasses.replace(CASE, form=Form(False, 0.1), whole=False)  # of a generation
    assert choose(images, "splash") == "chunked"
    with pytest.raises(vlm_jax.UserError, match="runs on a TPU"):
        choose(dataclasses.replace(images, platform="cpu"), "splash")
    with pytest.raises(vlm_jax.UserError, match="Unknown attention 'flash'; known: splash"):
        choose(CASE, "flash")


def test_the_config_names_every_kernel():
    assert CHOICES["model.attention"] == (None, *KERNELS)


def test_a_run_with_a_forced_kernel_has_the_same_losses(place, straight):
    _, plain, told = straight
    assert "attention: xla for bidirectional rows" in told and "; xla for causal rows" in told
    _, forced, told = runs.run(place, "chunked", "data.max_shapes=2", "model.attention=chunked")
    assert "attention: chunked for bidirectional rows" in told
    losses = [
        [line["loss"] for line in runs.lines(one / "metrics.jsonl")] for one in (plain, forced)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    # Its result is read on any devices, by what is fastest there.
    assert config.load(forced / "config.json").model.attention == "chunked"
    assert open_run(forced)[0].model.attention is None


def test_the_command_refuses_a_kernel_that_devices_lack(place, tmp_path, capsys):
    recipe = runs.write_recipe(
        tmp_path, place / "base", place / "data/train.jsonl", "model.attention=splash"
    )
    assert main(["train", "--config", str(recipe)]) == 2
    assert "model.attention is 'splash', but it runs on a TPU" in capsys.readouterr().err
