"""What the forward pass keeps changes memory and never a gradient."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from tiers import fast

import vlm_jax
from vlm_jax import config, plan
from vlm_jax.config.choices import CHOICES
from vlm_jax.config.specs import RunSpec
from vlm_jax.models.decoder import Decoder
from vlm_jax.models.layers.block import Compute
from vlm_jax.models.layers.remat import FASTEST, GATE, KEPT, REMAT, UP
from vlm_jax.models.reference_configs import KNOWN
from vlm_jax.train.estimate import REST, decoder_bytes, tower_bytes
from vlm_jax.trees import flatten

# Two blocks of odd sizes.
TINY = {
    "model_type": "qwen2_vl", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    "vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32},
}  # fmt: skip
TABLE = [(r"model/visual/.*", "frozen"), (r".*", "full")]


@pytest.fixture(scope="module")
def gradients():
    """Return a function that gives {path: gradient} of a decoder with LoRA under a policy.

    Compiled without LLVM's optimizations, which contract products and sums here and there as
    fusions have it.
    """
    base, made = vlm_jax.from_config(TINY), {}

    def adapted(params):
        made["model"], params = vlm_jax.add_lora(
            base, params, vlm_jax.LoRA(rank=4, alpha=8, dropout=0.1), jax.random.key(0)
        )
        return params["model"]["language_model"]

    rng = np.random.default_rng(0)
    draw = lambda shape: rng.normal(size=shape).astype(np.float32) / 4  # noqa: E731
    shapes = jax.eval_shape(adapted, base.abstract())
    params = jax.tree.map(lambda leaf: draw(leaf.shape), shapes)
    config, lora = base.config.text, made["model"].lora.scale
    x, positions = draw((2, 7, 32)), np.broadcast_to(np.arange(7), (2, 3, 7))
    segments = np.array([[1] * 7, [1] * 4 + [2] * 3], np.int32)

    @functools.cache
    def of(policy):
        decoder = Decoder(config, Compute(np.dtype("float32"), lora, policy))

        def value(params):
            rngs = {"dropout": jax.random.key(1)}
            hidden, _ = decoder.apply({"params": params}, x, positions, segments, rngs=rngs)
            return (hidden * x).sum()

        made = jax.jit(jax.grad(value), compiler_options={"xla_backend_optimization_level": 0})
        return flatten(made(params))

    return of


@pytest.mark.parametrize(
    "policy", fast(["residual", "products", "products_offload"], sorted(REMAT.keys() - {"none"}))
)
def test_a_policy_gives_the_same_gradients_to_the_bit(gradients, policy):
    for path, kept in gradients("none").items():
        assert np.abs(kept).max() > 0 or path.startswith("embed_tokens"), path
        np.testing.assert_array_equal(gradients(policy)[path], kept, path)


def products(jaxpr, times=1):
    """Return how many products with weights a program has, those of loops counted by turns."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            count += times * (equation.params["dimension_numbers"][1] == ((), ()))
        turns = times * equation.params.get("length", 1)
        for inner in jaxprs_in_params(equation.params):
            count += products(inner, turns)
    return count


@pytest.mark.parametrize("norms", ["qk_norm", "norms_behind"])
def test_no_product_but_attentions_is_computed_twice(norms):
    """Whatever is normalised behind a product: the norm's gradient needs what went in."""
    config = dataclasses.replace(vlm_jax.from_config(TINY).config.text, **{norms: True})
    x, positions = np.zeros((2, 7, 32), np.float32), np.zeros((2, 3, 7), np.int32)
    inputs = x, positions, np.ones((2, 7), np.int32)
    counts = {}
    for policy in ("none", "products", "block"):
        decoder = Decoder(config, Compute(np.dtype("float32"), remat=policy))
        params = jax.eval_shape(decoder.init, jax.random.key(0), *inputs)
        value = lambda params: decoder.apply(params, *inputs)[0].sum()  # noqa: B023, E731
        counts[policy] = products(jax.make_jaxpr(jax.grad(value))(params).jaxpr)
    assert counts["products"] == counts["none"] < counts["block"]


def test_a_policy_is_named_or_follows_from_gradient_checkpointing():
    c = config.get_config()
    assert RunSpec.of(c).training.remat == "block"
    c.training.gradient_checkpointing = False
    assert RunSpec.of(c).training.remat == "none"
    for policy in REMAT:
        made = config.load(None, ["model.name_or_path=x", f"training.remat_policy={policy}"])
        assert made.training.remat == policy
    named = config.load(None, {"model.name_or_path": "x", "training.remat_policy": "none"})
    assert named.training.remat == "none"
    with pytest.raises(vlm_jax.UserError, match="remat_policy' is 'blok'.*block_save_attention"):
        config.load(None, ["model.name_or_path=x", "training.remat_policy=blok"])


# A decoder of 16 narrow layers.
NARROW = {
    "model_type": "qwen2_vl", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
    "vocab_size": 256, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {"depth": 1, "embed_dim": 64, "num_heads": 2, "hidden_size": 256},
}  # fmt: skip


def test_the_tables_of_policies_name_the_same():
    assert set(KEPT) == set(REMAT) == set(CHOICES["training.remat_policy"]) - {None, "auto"}
    for policies in FASTEST.values():  # each keeps less of a device than the one before
        named = [set(KEPT[policy][0]) for policy in policies if policy not in ("none", "offload")]
        assert all(more > fewer for more, fewer in itertools.pairwise(named))


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
    named = ("block", "qkv", "residual", "gate", "products")
    sizes = decoder_bytes(model)
    for policy, less in zip(named[1:], named, strict=False):  # as estimates have it
        more = sum(sizes[name] for name in set(KEPT[policy][0]) - set(KEPT[less][0]))
        assert kept[policy] - kept[less] == pytest.approx(16 * 1024 * more, rel=0.01), policy
    rest = kept["none"] - kept["products"]
    assert rest == pytest.approx(16 * 1024 * sizes[REST], rel=0.03)
    carry = 16 * 1024 * 256 * 2  # bytes of all blocks' inputs
    assert kept["block_save_attention"] - kept["block"] >= carry
    in_host_memory = {policy for policy, made in programs.items() if "<host>" in str(made)}
    assert in_host_memory == {"offload", "products_offload"}


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


def test_estimates_know_which_towers_have_gates():
    kept = {}
    for name in ("Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"):
        model = vlm_jax.from_config(KNOWN[name], "bfloat16")
        kept[model.config.vision.gated] = tower_bytes(model)
    assert kept[False][GATE] == 0 and kept[True][GATE] == kept[True][UP] == 2 * 3420
