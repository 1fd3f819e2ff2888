"""4-bit leaves go through orbax as packed bytes and come back to the bit."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from vlm_jax import nf4


@pytest.mark.parametrize("shape", [(64, 10), (48, 7), (3, 128, 6)])
@pytest.mark.parametrize("double", [False, True])
def test_a_leaf_goes_through_orbax(tmp_path, shape, double):
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    leaf = nf4.quantize(kernel, double=double)
    packed = nf4.storable(leaf)
    assert packed.codes.dtype == np.uint8
    if shape[-1] % 2 == 0:
        assert packed.codes.size == leaf.codes.size // 2
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "leaf", {"kernel": packed})
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "leaf", {"kernel": packed})["kernel"]
    again = nf4.restored(back, shape[-1])
    for one, other in zip(jax.tree.leaves(leaf), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    np.testing.assert_array_equal(nf4.dequantize(leaf), nf4.dequantize(again))
