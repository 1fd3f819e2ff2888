"""The 8-bit optimizer keeps the codes that bitsandbytes' AdamW8bit keeps, step by step."""

import bitsandbytes as bnb
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import vlm_jax
from vlm_jax.train.moments import Store, pages_of, store_of
from vlm_jax.trees import flatten, unflatten
from vlm_jax.weights.blocks import Blocks
from vlm_jax.weights.dynamic8 import dequantize, dynamic_map, quantize

pytestmark = pytest.mark.exact

# Blocks down whole columns, in one and in several pages; over row ends; of stacked layers;
# embeddings; a vector; and what is too small to have eight bits.
SHAPES = {
    "wide/kernel": (256, 400),
    "odd/kernel": (300, 70),
    "stack/lora_A": (3, 256, 48),
    "stack/lora_B": (3, 48, 300),
    "paged/lora_A": (4, 512, 64),
    "even/embedding": (40, 512),
    "uneven/embedding": (550, 190),
    "long/bias": (5000,),
    "small/kernel": (60, 60),
    "layers/kernel": (4, 40, 40),
    "short/bias": (70,),
}


def tensors(path, leaf):
    """Return the leaf as PyTorch's tensors: one a layer, matrices the other way round."""
    rank = 1 if path.endswith("bias") else 2
    layers = leaf.reshape(-1, *leaf.shape[leaf.ndim - rank :])
    turned = path.endswith(("kernel", "lora_A", "lora_B"))
    return [np.ascontiguousarray(layer.T if turned else layer) for layer in np.asarray(layers)]


def unpaged(path, kept):
    """Return (codes, absmax) in the leaf's shape of what the state keeps."""
    store = store_of(path, SHAPES[path], True)
    pages = pages_of(store, SHAPES[path], False)
    codes, absmax = np.asarray(kept.codes), np.asarray(kept.absmax)
    absmax = np.broadcast_to(absmax, codes.shape)
    if pages is not None:
        codes, absmax = (
            pages.merge_axis(np.moveaxis(x, 0, pages.axis + 1)) for x in (codes, absmax)
        )
    return store.restore(codes), store.restore(absmax)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_states_and_parameters_equal_bitsandbytes_after_20_steps(decay):
    rng = np.random.default_rng(0)
    params = {
        path: (0.1 * rng.normal(size=shape)).astype(np.float32) for path, shape in SHAPES.items()
    }
    trainable = jax.tree.map(jnp.asarray, unflatten(params))
    training = {"optim": "adamw_8bit", "learning_rate": 1e-3, "weight_decay": decay}
    tx = vlm_jax.optimizer(trainable, [(".*", "full")], {**training, "max_grad_norm": 0.0})
    state = tx.init(trainable)

    theirs = {
        path: [torch.nn.Parameter(torch.tensor(t)) for t in tensors(path, leaf)]
        for path, leaf in params.items()
    }
    adamw = bnb.optim.AdamW8bit(
        [
            {"params": layers, "weight_decay": 0.0 if path.endswith("bias") else decay}
            for path, layers in theirs.items()
        ],
        lr=1e-3,
    )
    update = jax.jit(tx.update)
    for _ in range(20):
        grads = {p: rng.standard_normal(shape, np.float32) ** 3 for p, shape in SHAPES.items()}
        for path, layers in theirs.items():
            for parameter, grad in zip(layers, tensors(path, grads[path]), strict=True):
                parameter.grad = torch.tensor(grad)
        adamw.step()
        updates, state = update(jax.tree.map(jnp.asarray, unflatten(grads)), state, trainable)
        trainable = optax.apply_updates(trainable, updates)

    adam = state[1].inner_states["full"].inner_state[0]
    quantized = set()
    for path, layers in theirs.items():
        for ours, parameter in zip(tensors(path, flatten(trainable)[path]), layers, strict=True):
            np.testing.assert_allclose(ours, parameter.detach().numpy(), rtol=1e-5, atol=1e-6)
        for moments, name in ((adam.mu, "1"), (adam.nu, "2")):
            kept = flatten(moments)[path]
            their_state = [adamw.state[parameter] for parameter in layers]
            if isinstance(kept, jax.Array):
                assert all(s[f"state{name}"].dtype == torch.float32 for s in their_state), path
                continue
            quantized.add(path)
            codes, absmax = (tensors(path, x) for x in unpaged(path, kept))
            for mine, scale, their in zip(codes, absmax, their_state, strict=True):
                apart = np.abs(mine.astype(int) - their[f"state{name}"].numpy().astype(int))
                assert (apart == 0).mean() >= 0.999 and apart.max() <= 1, (path, name)
                blocks = their[f"absmax{name}"].numpy().repeat(256)[: scale.size]
                np.testing.assert_allclose(scale.reshape(-1), blocks, rtol=1e-5)
    assert quantized == set(SHAPES) - {"small/kernel", "layers/kernel", "short/bias"}


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_code_is_bitsandbytes_bit_for_bit(signed):
    theirs = bnb.functional.create_dynamic_map(signed=signed)
    np.testing.assert_array_equal(dynamic_map(signed), theirs.numpy())
    # Every value that codes are looked up by, a block of zeros, and numbers of all sizes.
    rng = np.random.default_rng(0)
    grid = (np.arange(65535, dtype=np.float32) / np.float32(65535) * 2 - 1).reshape(257, 255)
    grid = np.concatenate([grid, np.ones((257, 1), np.float32)], 1)
    drawn = rng.normal(size=(300, 256)) ** 3 * 10 ** rng.uniform(-20, 10, size=(300, 1))
    x = np.concatenate([grid, np.zeros((1, 256)), drawn]).astype(np.float32)
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(torch.tensor(x), theirs, 256)
    back = torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, theirs, 256, torch.float32)
    for ours in (x, jnp.asarray(x)):
        got, scale = quantize(ours, -1, signed)
        np.testing.assert_array_equal(got, codes.numpy())
        np.testing.assert_array_equal(scale[:, 0], absmax.numpy())
        np.testing.assert_array_equal(dequantize(got, scale, signed), back.numpy())


@pytest.mark.parametrize("path", SHAPES)
def test_blocks_run_along_torch_tensors_and_can_be_undone(path):
    x = np.random.default_rng(0).normal(size=SHAPES[path]).astype(np.float32)
    blocks = Blocks.of(path, x.shape, 64)
    view = blocks.view(x)
    assert jax.eval_shape(blocks.view, x).shape == view.shape and view.shape[blocks.axis] == 64
    assert len(blocks.origin) == view.ndim and blocks.origin[blocks.axis] == ()
    assert sorted(axis for axes in blocks.origin for axis in axes) == list(range(x.ndim))
    np.testing.assert_array_equal(blocks.restore(view), x)
    np.testing.assert_array_equal(blocks.view(jnp.asarray(x)), view)
    wanted = sorted(
        tuple(np.sort(np.pad(part, (0, 64 - part.size))))
        for tensor in tensors(path, x)
        for part in np.split(tensor.reshape(-1), range(64, tensor.size, 64))
    )
    ours = np.moveaxis(view, blocks.axis, -1).reshape(-1, 64)
    assert sorted(tuple(np.sort(block)) for block in ours) == wanted


def test_what_a_leaf_is_kept_as():
    assert store_of("a/kernel", (64, 64), True) == Store((64, 64), Blocks((64, 64), 256, 2, True))
    assert store_of("a/kernel", (64, 63), True) == Store((64, 63))
    assert store_of("a/kernel", (64, 64), False) == Store((64, 64))
