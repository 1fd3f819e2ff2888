"""What the forward pass keeps changes memory and never a gradient."""

import dataclasses

import jax
import numpy as np
import pytest
from references import quiet, qwen2_vl, qwen2_vl_inputs

import vlm_jax
from vlm_jax import config, plan
from vlm_jax.models.layers.remat import REMAT
from vlm_jax.train.setup import remat_of
from vlm_jax.trees import flatten

TABLE = [(r"model/visual/.*", "frozen"), (r".*", "full")]


def test_every_policy_gives_the_same_gradients(tmp_path):
    with quiet():
        qwen2_vl(tmp_path, factor=3.0)
    model, params = vlm_jax.load(tmp_path)
    trainable, frozen = vlm_jax.split(params, TABLE)
    batch = model.batch(**qwen2_vl_inputs("mixed"))

    def gradients(policy):
        own = dataclasses.replace(model, remat=policy)
        loss = lambda trainable: vlm_jax.loss(own, trainable, frozen, batch)[0]  # noqa: E731
        return flatten(jax.jit(jax.grad(loss))(trainable))

    kept = gradients("none")
    for policy in REMAT.keys() - {"none"}:
        for path, gradient in gradients(policy).items():
            scale = np.abs(kept[path]).max()
            assert scale > 0
            np.testing.assert_allclose(
                gradient, kept[path], rtol=0, atol=2e-6 * scale, err_msg=f"{policy} {path}"
            )


def test_a_policy_is_named_or_follows_from_gradient_checkpointing():
    c = config.get_config()
    assert remat_of(c) == "block"
    c.training.gradient_checkpointing = False
    assert remat_of(c) == "none"
    for policy in REMAT:
        made = config.load(None, ["model.name_or_path=x", f"training.remat_policy={policy}"])
        assert remat_of(made) == policy
    named = config.load(None, {"model.name_or_path": "x", "training.remat_policy": "none"})
    assert remat_of(named) == "none"
    with pytest.raises(vlm_jax.UserError, match="remat_policy' is 'blok'.*block_save_attention"):
        config.load(None, ["model.name_or_path=x", "training.remat_policy=blok"])


# A decoder of 16 narrow layers.
NARROW = {
    "model_type": "qwen2_vl", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
    "vocab_size": 256, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {"depth": 1, "embed_dim": 64, "num_heads": 2, "hidden_size": 256},
}  # fmt: skip


def test_policies_keep_less_for_the_backward_pass():
    """In bytes of what a forward pass hands to its backward pass, from shapes."""
    kept, programs = {}, {}
    for policy in REMAT:
        model = vlm_jax.from_config(NARROW, "bfloat16", policy)
        trainable, frozen = vlm_jax.split(model.abstract(), TABLE)
        batch = model.collate([[]], 1024, 0)

        def backward(trainable, frozen, batch, model=model):
            loss = lambda t: vlm_jax.loss(model, t, frozen, batch)[0]  # noqa: E731
            return jax.vjp(loss, trainable)[1]

        programs[policy], leaves = jax.make_jaxpr(backward, return_shape=True)(
            trainable, frozen, batch
        )
        leaves = jax.tree.leaves(leaves)
        kept[policy] = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert kept["none"] > kept["dots"] > kept["block_save_attention"] > kept["block"]
    carry = 16 * 1024 * 256 * 2  # bytes of all blocks' inputs
    assert kept["block_save_attention"] - kept["block"] >= carry
    in_host_memory = {policy for policy, made in programs.items() if "<host>" in str(made)}
    assert in_host_memory == {"offload"}


@pytest.mark.nightly
def test_policies_trade_a_chips_memory_for_the_hosts_or_for_work():
    """On one v5e chip, by its compiler."""
    place = jax.sharding.SingleDeviceSharding(plan.devices("v5e:1x1")[0])
    found = {}
    for policy in ("none", "block", "block_save_attention", "offload"):
        model = vlm_jax.from_config(NARROW, "bfloat16", policy, attention="xla")
        trainable, frozen = vlm_jax.split(model.abstract(), TABLE)
        batch = model.collate([[]], 4096, 0)
        given = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            (trainable, frozen, batch),
        )
        grad = jax.grad(lambda t, f, b, model=model: vlm_jax.loss(model, t, f, b)[0])
        compiled = jax.jit(grad).lower(*given).compile()
        found[policy] = plan.memory(compiled), plan.estimated_cycles(compiled)
    carry = 16 * 4096 * 256 * 2  # bytes of all blocks' inputs
    memory = {policy: one.temporary for policy, (one, _) in found.items()}
    assert memory["none"] > memory["block_save_attention"] > memory["block"]
    assert memory["block"] - memory["offload"] > 0.5 * carry
    assert found["offload"][0].host >= carry > found["block"][0].host
    assert found["block_save_attention"][1] < found["block"][1]
