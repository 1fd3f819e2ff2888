"""LoRA targets, the parameter count of Llama-2-7B, the start, frozen leaves, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from references import llava, our_logits, qwen2_vl, qwen2_vl_inputs

import vlm_jax
from vlm_jax.adapters.targets import PRESETS, target_kernels
from vlm_jax.models.layers.linear import Linear, LoRAScale
from vlm_jax.trees import flatten, unflatten

LLAVA_7B = {
    "model_type": "llava",
    "text_config": {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5},
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen2_vl")
    qwen2_vl(directory)
    return vlm_jax.load(directory)


def test_count_of_llama_2_7b():
    model = vlm_jax.from_config(LLAVA_7B)
    lora = vlm_jax.LoRA(rank=16, targets="llama")

    def adapted():
        params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), model.abstract())
        return vlm_jax.add_lora(model, params, lora, jax.random.key(0))[1]

    shapes = flatten(jax.eval_shape(adapted))
    trained = sum(int(np.prod(s.shape)) for path, s in shapes.items() if "lora_" in path)
    assert trained == 39_976_960


def test_the_language_model_only_by_default(tmp_path):
    llava(tmp_path, "clip", "llama")
    model, params = vlm_jax.load(tmp_path)
    lora = vlm_jax.LoRA(targets=("q_proj", "v_proj", "k_proj"))
    paths = target_kernels(model, params, lora)
    assert len(paths) == 3 and all("language_model" in path for path in paths)
    assert any("vision_tower" in p and "q_proj" in p for p in flatten(params)), "same names exist"


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (dict(targets=("q_projj",)), "did you mean 'q_proj'"),
        (dict(targets=r"layers\.0\..*q_proj"), "matches no linear layer"),
        (dict(exclude_modules=("lm_hed",)), "exclude_modules.*matches none"),
        (dict(exclude_modules=("q_proj", "v_proj")), "No layer is left"),
        (dict(layers_to_transform=(0, 7)), "names the layer 7.*layers 0 to 1"),
        (dict(layers_to_transform=(0,), layers_pattern=("h",)), "no numbered layer"),
        (dict(layers_pattern=("layers",)), "which is not set"),
        (dict(targets=r".*q_proj", layers_to_transform=(0,)), "target is a regex"),
        (dict(rank_pattern={"k_proj": 4}), "'k_proj' of lora.rank_pattern matches no layer"),
        (dict(alpha_pattern={"proj": 4}), "'proj' of lora.alpha_pattern matches no layer"),
        (dict(rank_pattern={"q_proj": 0}), "1 or more"),
        (dict(rank_pattern={"(": 4}), "not a regular expression"),
        (dict(targets=("embed_tokens",), dora=True), "DoRA.*embed_tokens"),
        (
            dict(targets=("embed_tokens",), modules_to_save=("embed_tokens",)),
            "remove it from one of the two",
        ),
        (dict(targets=r".*("), "not a regular expression"),
        (dict(rank=0), "1 or more"),
        (dict(dropout=1.0), "dropout"),
        (dict(targets="all-linear", components=("head",)), "all-linear.*vision"),
        (dict(targets="all-linear", components=("tower",)), "all-linear.*vision"),
        (dict(targets="all-linear", components=()), "all-linear.*vision"),
        (dict(modules_to_save=("nowhere",)), "no such module"),
        (
            dict(targets=("mm_projector",), modules_to_save=("projector",)),
            "remove it from one of the two",
        ),
    ],
)
def test_refused(qwen, lora, message):
    with pytest.raises(vlm_jax.UserError, match=message):
        vlm_jax.add_lora(*qwen, vlm_jax.LoRA(**lora), jax.random.key(0))


@pytest.mark.parametrize("component", ["vision", "projector", "language_model"])
def test_all_linear_is_every_layer_of_the_named_components(qwen, component):
    model, params = qwen
    lora = vlm_jax.LoRA(targets="all-linear", components=(component, "head"))
    names = {path.split("/")[-2] for path in target_kernels(model, params, lora)}
    assert (
        names
        == {
            "vision": {"qkv", "proj", "fc1", "fc2"},  # its convolution is no linear layer
            "projector": {"0", "2"},
            "language_model": {*PRESETS["qwen"]},
        }[component]
    )
    every = vlm_jax.LoRA(targets="all-linear", components=("vision", "projector", "language_model"))
    assert len(target_kernels(model, params, every)) == 4 + 2 + 7


def test_start_equals_base_and_a_is_kaiming_uniform(qwen):
    model, params = qwen
    inputs = qwen2_vl_inputs("mixed")
    base = our_logits(model, params, inputs)
    adapted, tree = vlm_jax.add_lora(
        model, params, vlm_jax.LoRA(8, targets="qwen"), jax.random.key(0)
    )
    np.testing.assert_array_equal(our_logits(adapted, tree, inputs), base)
    flat = flatten(tree)
    a = np.asarray(flat["model/language_model/layers/mlp/down_proj/lora_A"])
    assert (
        a.shape == (2, 64, 8)
        and np.abs(a).max() <= 1 / 8
        and a.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)
    )


def test_frozen_leaves_are_untouched_and_cost_no_optimizer_state(qwen):
    model, params = qwen
    model, params = vlm_jax.add_lora(
        model, params, vlm_jax.LoRA(4, targets="qwen", modules_to_save=("projector",)),
        jax.random.key(0),
    )  # fmt: skip
    table = vlm_jax.training_table(model, params)
    trainable, frozen = vlm_jax.split(params, table)
    before = jax.tree.map(np.array, frozen)
    tx = vlm_jax.optimizer(
        trainable, table, dict(learning_rate=1e-2, weight_decay=0.1, max_steps=3)
    )
    state = vlm_jax.init_state(trainable, tx)
    step = jax.jit(vlm_jax.make_step(model, tx), donate_argnums=0)
    batch = model.batch(**qwen2_vl_inputs("mixed"))
    for _ in range(3):
        state, _ = step(state, frozen, batch)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, frozen))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if jnp.ndim(leaf))
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(trainable))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), trainable, state.trainable)
    still = [path for path, change in flatten(moved).items() if change == 0]
    assert not still, still
    assert step._cache_size() == 1, "one compilation for one shape"


def test_dropout_acts_only_in_training(qwen):
    model, params = qwen
    model, params = vlm_jax.add_lora(
        model, params, vlm_jax.LoRA(4, dropout=0.5, targets="qwen"), jax.random.key(0)
    )
    flat = flatten(params)
    flat = {p: v + 0.1 if p.endswith("lora_B") else v for p, v in flat.items()}
    variables = {"params": unflatten(flat)}
    batch = model.batch(**qwen2_vl_inputs("text"))
    still = model.apply(variables, batch)
    np.testing.assert_array_equal(still, model.apply(variables, batch))
    one, two = (
        model.apply(variables, batch, train=True, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 1)
    )
    assert float(jnp.abs(one - two).max()) > 1e-3 and float(jnp.abs(one - still).max()) > 1e-3
    with pytest.raises(ValueError, match="rngs"):
        model.apply(variables, batch, train=True)


def test_dropout_acts_on_the_input_of_the_matrices_alone():
    keys = jax.random.split(jax.random.key(0), 4)
    kernel, a, b, x = (
        jax.random.normal(k, s) for k, s in zip(keys, [(6, 5), (6, 2), (2, 5), (9, 6)], strict=True)
    )
    layer = Linear(5, False, jnp.float32, LoRAScale(3, 0.5))

    def dropped(b):
        leaves = {"kernel": kernel, "lora_A": a, "lora_B": b}
        return layer.apply({"params": leaves}, x, rngs={"dropout": jax.random.key(1)})

    np.testing.assert_allclose(dropped(0 * b), x @ kernel, atol=1e-5)
    assert np.abs(dropped(b) - (x @ kernel + 1.5 * x @ a @ b)).max() > 1


def test_loss_is_the_plain_one_and_skips_nothing(qwen):
    """The chunked loss against optax on full logits, with fractional weights."""
    import dataclasses

    model, params = qwen
    batch = model.batch(**qwen2_vl_inputs("mixed"))
    weights = np.random.default_rng(0).choice([0.0, 0.5, 1.0], batch.weights.shape)
    batch = dataclasses.replace(batch, weights=weights.astype(np.float32) * (batch.weights > 0))
    total, tokens = vlm_jax.loss(model, params, {}, batch)
    logits = model.apply({"params": params}, batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(batch.targets))
    assert float(total) == pytest.approx(float((losses * batch.weights).sum()), rel=1e-5)
    assert float(tokens) == batch.weights.sum()


def test_causality_by_gradients(qwen):
    """No logit depends on a later token, nor on another row or padding."""
    model, params = qwen
    batch = jax.tree.map(jnp.asarray, model.batch(**qwen2_vl_inputs("one image")))
    x = model.module.apply({"params": params}, batch, method="embed")
    decoder = model.module

    def hidden(x):
        bound = decoder.bind({"params": params})
        return bound.model.language_model(x, batch.positions, batch.segments)[0]

    jacobian = jax.jacrev(lambda x: hidden(x)[0].sum(-1))(x)[:, 0]  # [T out, T in, D]
    influence = np.abs(np.asarray(jacobian)).max(-1)
    assert np.all(np.triu(influence, 1) == 0)
    assert np.all(np.diag(influence) > 0)


def test_scales_of_layers_do_not_train(qwen):
    """Whatever a table that was written by hand says, decay included."""
    model, params = qwen
    lora = vlm_jax.LoRA(2, 4, targets=("q_proj",), rank_pattern={r"layers\.1\..*q_proj": 1})
    model, params = vlm_jax.add_lora(model, params, lora, jax.random.key(0))
    table = [(r".*/lora_.*", "lora"), (".*", "frozen")]
    trainable, frozen = vlm_jax.split(params, table)
    tx = vlm_jax.optimizer(trainable, table, {"learning_rate": 0.1, "weight_decay": 0.5})
    batch = model.batch(**qwen2_vl_inputs("mixed"))
    state, _ = jax.jit(vlm_jax.make_step(model, tx))(
        vlm_jax.init_state(trainable, tx), frozen, batch
    )
    after, before = flatten(state.trainable), flatten(trainable)
    [scales] = [path for path in before if path.endswith("lora_scale")]
    np.testing.assert_array_equal(before[scales], [2, 4])
    np.testing.assert_array_equal(after[scales], before[scales])
    moved = scales.replace("lora_scale", "lora_B")
    assert np.abs(after[moved] - before[moved]).max() > 0
