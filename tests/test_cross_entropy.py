"""The vocabulary's loss by chunks against the plain formula on all logits, however the head is."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import qwen2_vl_files
from draws import shaken
from jax.extend.core import jaxprs_in_params

import vlm_jax
from vlm_jax.models.layers.cross_entropy import CHUNK_POSITIONS, chunk_positions, losses_of, summed
from vlm_jax.models.layers.linear import is_lora
from vlm_jax.models.layers.partition import rows_over
from vlm_jax.sharding import make_mesh
from vlm_jax.train.losses import loss
from vlm_jax.trees import flatten, join

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
D, V = 8, 37
# Weighted positions of each row of a batch, all its positions, and those of a chunk.
CASES = {
    "one chunk": ([3, 5], 7, 7),
    "an odd rest": ([7, 2, 4], 7, 3),
    "rows without weights": ([0, 4, 0], 8, 2),
    "empty chunks": ([1, 2], 12, 4),
    "nothing": ([0, 0], 6, 4),
}


def drawn(case, seed=0):
    """Return x [B, T, D], targets and weights [B, T], a head [D, V] and the size of a chunk."""
    counts, T, chunk = CASES[case]
    rng, B = np.random.default_rng(seed), len(counts)
    weights = np.zeros((B, T), np.float32)
    for row, count in enumerate(counts):
        places = rng.permutation(T)[:count]
        weights[row, places] = rng.uniform(0.5, 2, count)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    head = rng.normal(size=(D, V)).astype(np.float32)
    return (head, x, rng.integers(0, V, (B, T)).astype(np.int32), weights), chunk


def of_chunk(smoothing, head, x_BCD, targets_BC, weights_BC):
    return jnp.sum(losses_of(x_BCD @ head, targets_BC, smoothing) * weights_BC, axis=1)


def plain(smoothing, head, x_BTD, targets_BT, weights_BT):
    """Return [B] from all logits, each target written out as a distribution over the vocabulary."""
    wanted_BTV = jax.nn.one_hot(targets_BT, V) * (1 - smoothing) + smoothing / V
    return -jnp.sum(wanted_BTV * jax.nn.log_softmax(x_BTD @ head) * weights_BT[:, :, None], (1, 2))


def close(ours, theirs, rel=1e-6):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=rel * max(1e-9, np.abs(theirs).max()))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_plain_formulas(case, smoothing, per_row):
    """Of a frozen head, and of one that trains; with a cotangent that is not 1."""
    arrays, chunk = drawn(case)
    sizes = dict(per_row=per_row, chunk=chunk)
    rows = lambda *arrays: plain(smoothing, *arrays)  # noqa: E731
    reference = rows if per_row else lambda *arrays: jnp.sum(rows(*arrays))
    ours = functools.partial(summed, functools.partial(of_chunk, smoothing), **sizes)
    scale = np.random.default_rng(1).normal(size=len(arrays[1]) if per_row else ())
    close(ours(*arrays), reference(*arrays))
    for argnums in (1, (0, 1)):
        found, expected = (
            jax.grad(lambda *arrays, run=run: jnp.sum(run(*arrays) * scale.astype("f")), argnums)
            for run in (ours, reference)
        )
        jax.tree.map(close, found(*arrays), expected(*arrays))


def products(function, *args):
    """Return how many products with the head a function's trace holds."""

    def count(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            sizes = [size for each in equation.invars for size in each.aval.shape]
            total += equation.primitive.name == "dot_general" and V in sizes
            total += sum(map(count, jaxprs_in_params(equation.params)))
        return total

    return count(jax.make_jaxpr(function)(*args).jaxpr)


def test_logits_are_made_once():
    arrays, chunk = drawn("an odd rest")

    def total(*arrays, per_row=False):
        losses = summed(functools.partial(of_chunk, 0.0), *arrays, per_row=per_row, chunk=chunk)
        return jnp.sum(losses)

    assert products(total, *arrays) == 1  # of an evaluation
    assert products(jax.grad(total, 1), *arrays) == 2  # logits, and the gradient by x
    assert products(jax.grad(total, (0, 1)), *arrays) == 3  # and by the head
    rows = functools.partial(total, per_row=True)
    assert products(jax.grad(rows, 1), *arrays) == 2
    assert products(jax.grad(rows, (0, 1)), *arrays) == 4  # by a number for each row: logits twice


@pytest.mark.parametrize("context", [1, 2])
def test_several_devices_give_what_one_does(context):
    (head, *of_rows), chunk = drawn("rows without weights")
    arrays = [np.concatenate([array, array[::-1]]) for array in of_rows]  # 6 rows
    total = functools.partial(summed, functools.partial(of_chunk, 0.0), chunk=chunk)
    run = jax.value_and_grad(total, (0, 1))
    mesh = make_mesh(data=1, fsdp=2, context=context, devices=jax.devices()[: 2 * context])
    with rows_over(jax.NamedSharding(mesh, jax.P("fsdp", "context"))):
        shared = jit(run)(head, *arrays)
    jax.tree.map(close, shared, run(head, *arrays))


@pytest.mark.parametrize(
    ("rows", "tokens", "expected"),
    [(1, 100, 100), (2, 512, 128), (1, 2048, 256), (4, 768, 64), (64, 4096, 16), (1, 300, 160)],
)
def test_a_chunk(rows, tokens, expected):
    assert CHUNK_POSITIONS["cpu"] == (256, 256)
    chunk = chunk_positions((rows, tokens))
    assert chunk == expected
    # Of the chunks of a row the last is as full as the others.
    assert math.ceil(tokens / chunk) * chunk - tokens < 16 * math.ceil(tokens / chunk)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return {tied: (model, params)} of one layer, random."""
    directory = qwen2_vl_files(tmp_path_factory.mktemp("heads"))
    found = {}
    for tied in (False, True):
        raw = json.loads((directory / "config.json").read_text())
        raw |= {"tie_word_embeddings": tied}
        raw["text_config"] |= {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
        raw["text_config"] |= {"tie_word_embeddings": tied}
        model = vlm_jax.from_config(raw)
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), model.abstract())
        found[tied] = model, shaken(zeros)
    return found


# How a head can train: (tied, what is added to the model, what of it trains).
def lora(model, params, **options):
    made = vlm_jax.LoRA(rank=2, alpha=4, **options)
    return vlm_jax.add_lora(model, params, made, jax.random.key(0))


def added(model, params):
    return vlm_jax.add_tokens(model, params, 3)


WAYS = {
    "full": (False, None, "lm_head/kernel"),
    "tied": (True, None, ".*/embed_tokens/embedding"),
    "lora": (False, functools.partial(lora, targets=("lm_head",)), ".*/lora_[AB]"),
    "dora": (False, functools.partial(lora, targets=("lm_head",), dora=True), ".*/lora_.*"),
    "rows": (False, added, ".*/added"),
    "tied rows": (True, added, ".*/added"),
    "tied lora": (True, functools.partial(lora, targets=("embed_tokens",)), ".*/lora_[AB]"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_head_that_trains_has_its_gradient(models, way):
    tied, change, trained = WAYS[way]
    model, params = models[tied]
    if change is not None:
        model, params = change(model, params)
        params = shaken(params, is_lora)
    trainable, frozen = vlm_jax.split(params, [(trained, "full"), (".*", "frozen")])
    ids = np.random.default_rng(0).integers(3, 180, (2, 10))
    ids[0, [2, 8]] = model.vocab_size - 1  # an added token, where there is one
    batch = model.batch(input_ids=ids, labels=np.where(np.arange(10) < 6, -100, ids))

    def reference(trainable):
        logits = model.apply({"params": join(trainable, frozen)}, batch)
        picked = jnp.take_along_axis(logits, batch.targets[:, :, None], axis=-1)[:, :, 0]
        return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - picked) * batch.weights)

    found = jit(jax.grad(lambda trainable: loss(model, trainable, frozen, batch)[0]))(trainable)
    expected = flatten(jit(jax.grad(reference))(trainable))
    assert all(np.abs(gradient).max() > 0 for gradient in expected.values())
    jax.tree.map(functools.partial(close, rel=1e-5), flatten(found), expected)
