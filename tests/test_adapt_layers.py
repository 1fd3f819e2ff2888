"""`adapt` on single layers and odd modules: each kind, 4 bits, dropout, stacks, what is refused."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge
from safetensors.numpy import load_file, save_file
from test_adapt import moved, run

import vlm_jax
from vlm_jax import LoRA, Quantization, UserError
from vlm_jax.adapters.targets import PRESETS
from vlm_jax.linen.discover import Layer
from vlm_jax.models.layers.dropout import KEEP
from vlm_jax.models.layers.linear import Linear, LoRAScale
from vlm_jax.trees import flatten, unflatten

ALL = LoRA(3, 6, targets="all-linear")
X = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)


def drawn(module, *inputs, seed=3):
    """Return parameters of normal numbers, without running any initialiser."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: (0.3 * rng.normal(size=s.shape)).astype(np.float32), shapes)


def adapted_and_moved(module, params, *methods, **options):
    adapted, variables = vlm_jax.adapt(module, params, *methods, **options)
    return adapted, {**variables, "lora": moved(variables["lora"], 0.3)}


class Attends(nn.Module):
    """Embeds, and is its own head."""

    def setup(self):
        self.embed_tokens = nn.Embed(11, 8)

    def __call__(self, tokens):
        return self.embed_tokens.attend(nn.tanh(self.embed_tokens(tokens)))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(2, name="attn")(nn.Dense(8, name="before")(x))


KINDS = {
    "Dense": (nn.Dense(4), X),
    "Dense without bias, in bfloat16": (nn.Dense(4, use_bias=False, dtype=jnp.bfloat16), X),
    "DenseGeneral, many features": (nn.DenseGeneral((3, 2)), X),
    "DenseGeneral, many axes": (nn.DenseGeneral(3, axis=(-2, -1)), X),
    "DenseGeneral, axes apart and turned": (nn.DenseGeneral((2, 3), axis=(2, 0)), X),
    "Einsum": (nn.Einsum((8, 3), "btd,df->btf"), X),
    "Einsum, outputs first and moved": (nn.Einsum((3, 8, 2), "btd,cdh->cbth"), X),
    "Einsum that sums x alone": (nn.Einsum((8, 3), "btd,df->bf", use_bias=False), X),
    "Einsum with dots": (nn.Einsum((8, 3), "...d,df->...f", use_bias=False), X),
    "attention": (Attention(), X),
    "Embed": (nn.Embed(11, 8), np.array([[1, 4, 10]])),
    "Embed with attend": (Attends(), np.array([[1, 4, 10]])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_starts_as_the_base_and_equals_its_merged_self(kind):
    module, x = KINDS[kind]
    params = drawn(module, x)
    lora = ALL if "Embed" not in kind else LoRA(3, 6, targets=".*")
    adapted, fresh = vlm_jax.adapt(module, params, lora, inputs=x)
    base = module.apply({"params": params}, x)
    np.testing.assert_array_equal(adapted.apply(fresh, x), base)
    variables = {**fresh, "lora": moved(fresh["lora"], 0.3)}
    out = adapted.apply(variables, x)
    assert out.dtype == base.dtype and out.shape == base.shape
    half = out.dtype == jnp.bfloat16
    assert np.abs(np.asarray(out - base, np.float32)).max() > 0.1
    merged = vlm_jax.merge(adapted, variables)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)
    tolerance = 0.03 if half else 1e-5
    error = np.asarray(module.apply({"params": merged}, x) - out, np.float32)
    assert np.abs(error).max() < tolerance * np.abs(np.asarray(out, np.float32)).max()


def test_the_mathematics_is_our_own_layer_s():
    """The same numbers, gradients included, as `layers.linear.Linear` of the same matrices."""
    params = drawn(nn.Dense(4), X)
    adapted, variables = adapted_and_moved(nn.Dense(4), params, LoRA(3, 7, targets="all-linear"))
    ours = Linear(4, True, jnp.float32, LoRAScale(7.0))

    def theirs(lora):
        return jnp.sum(jnp.sin(ours.apply({"params": {**params, **lora}}, X)))

    def foreign(lora):
        return jnp.sum(jnp.sin(adapted.apply({**variables, "lora": lora}, X)))

    for one, other in zip(
        jax.tree.leaves(jax.value_and_grad(theirs)(variables["lora"])),
        jax.tree.leaves(jax.value_and_grad(foreign)(variables["lora"])),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_embeddings_are_peft_s(tmp_path):
    """A tied embedding and head, in the file too, where the embedding is called embed_tokens."""
    import peft
    import torch
    import transformers
    from references import quiet

    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    tokens = np.array([[1, 4, 10]])
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for layer in model.model.layers:  # of the model, embedding, norm and head are left
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()

    class Head(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(11, 8, name="embed_tokens")
            return embed.attend(nn.RMSNorm(1e-6, name="norm")(embed(tokens)))

    params = {
        "embed_tokens": {"embedding": model.model.embed_tokens.weight.detach().numpy()},
        "norm": {"scale": model.model.norm.weight.detach().numpy()},
    }
    adapted, variables = adapted_and_moved(Head(), params, LoRA(2, 6, targets=("embed_tokens",)))
    names = [("(.*)", r"model.\1")]
    vlm_jax.save_lora(adapted, variables, tmp_path, names=names)
    with quiet(), torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(model, str(tmp_path))
        expected = theirs(torch.tensor(tokens)).logits.numpy()
        theirs.save_pretrained(tmp_path / "theirs")
    np.testing.assert_allclose(adapted.apply(variables, tokens), expected, atol=1e-4)
    for folder in (tmp_path, tmp_path / "theirs"):
        again, read = vlm_jax.load_lora(Head(), params, folder, names=names)
        np.testing.assert_allclose(again.apply(read, tokens), expected, atol=1e-4)
    with pytest.raises(UserError, match="is the head too.*merge"):
        vlm_jax.save_lora(adapted, variables, tmp_path, names=[("embed_tokens", "wte")])
    # peft may write a copy of the embedding beside; of another base it is refused.
    held = load_file(tmp_path / "adapter_model.safetensors")
    copy = params["embed_tokens"]["embedding"]
    for change in (0, 1):
        held["base_model.model.model.embed_tokens.base_layer.weight"] = copy + change
        save_file(held, tmp_path / "adapter_model.safetensors")
        if not change:
            vlm_jax.load_lora(Head(), params, tmp_path, names=names)
    with pytest.raises(UserError, match="another base"):
        vlm_jax.load_lora(Head(), params, tmp_path, names=names)


@pytest.mark.parametrize(
    ("kind", "storage"), [("attention", "nf4-dq"), ("Einsum, outputs first and moved", "nf4")]
)
def test_4_bit_kernels_are_decoded_in_the_layer(kind, storage):
    module, x = KINDS[kind]
    params = drawn(module, x)
    adapted, variables = adapted_and_moved(module, params, Quantization(storage), ALL, inputs=x)
    held = flatten(variables["params"])
    codes = {path for path, leaf in held.items() if isinstance(leaf, vlm_jax.NF4)}
    assert codes == {path for path in held if path.endswith("kernel")}
    # The reference: the plain module with decoded kernels, and the same LoRA.
    dense, _ = vlm_jax.adapt(module, params, Quantization(storage), inputs=x)
    decoded = vlm_jax.merge(dense, {"params": variables["params"]})
    assert jax.tree.map(jnp.shape, decoded) == jax.tree.map(jnp.shape, params)
    error = jax.tree.map(lambda a, b: np.abs(a - b).max(), decoded, params)
    assert max(jax.tree.leaves(error)) > 1e-3
    plain, _ = vlm_jax.adapt(module, decoded, ALL, inputs=x)

    def outcome(adapted, params):
        def loss(lora, x):
            y = adapted.apply({"params": params, "lora": lora}, x)
            return jnp.sum(jnp.sin(y)), y

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        return step(variables["lora"], x)

    # LoRA can come later, on what is in 4 bits already.
    later, _ = vlm_jax.adapt(module, variables["params"], ALL, inputs=x)
    assert (later.layers, later.quantized) == (adapted.layers, adapted.quantized)
    got, expected = outcome(later, variables["params"]), outcome(plain, decoded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)
    merged = vlm_jax.merge(adapted, variables)
    np.testing.assert_allclose(run(module, {"params": merged}, x), got[0][1], atol=1e-4)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.DenseGeneral((2, 4), name="up")(nn.tanh(x)).reshape(x.shape), None


class Stack(nn.Module):
    axis: int | None = 0
    rngs: tuple = ("params",)

    @nn.compact
    def __call__(self, x):
        if self.axis is None:
            for i in range(3):
                x, _ = Block(name=f"layers_{i}")(x)
            return x
        block = nn.scan(
            Block,
            variable_axes={"params": self.axis},
            split_rngs=dict.fromkeys(self.rngs, True),
            length=3,
        )
        return block(name="layers")(x, None)[0]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_stack_of_any_axis_is_its_layers(axis, tmp_path):
    loop = Stack(axis=None)
    params = drawn(loop, X)
    adapted, variables = adapted_and_moved(loop, params, ALL)

    def stacked(layers, axis):
        trees = [layers[f"layers_{i}"] for i in range(3)]
        return {"layers": jax.tree.map(lambda *leaves: np.stack(leaves, axis), *trees)}

    params3 = stacked(params, axis)
    scan, fresh = vlm_jax.adapt(Stack(axis=axis), params3, ALL)
    assert scan.layers[0].stack.axis == axis and scan.layers[0].size == (8, 8)
    assert jax.tree.map(jnp.shape, fresh["lora"]) == {
        "layers": {"up": {"lora_A": (3, 8, 3), "lora_B": (3, 3, 8)}}
    }
    variables3 = {"params": params3, "lora": stacked(variables["lora"], 0)}
    expected = adapted.apply(variables, X)
    np.testing.assert_allclose(scan.apply(variables3, X), expected, atol=1e-5)
    merged = vlm_jax.merge(scan, variables3)
    np.testing.assert_allclose(Stack(axis).apply({"params": merged}, X), expected, atol=1e-5)
    vlm_jax.save_lora(scan, variables3, tmp_path)
    names = [(r"layers_(\d)\.(.*)", r"layers.\1.\2")]
    _, read = vlm_jax.load_lora(loop, params, tmp_path, names=names)
    jax.tree.map(np.testing.assert_array_equal, read["lora"], variables["lora"])


class Square(nn.Module):
    """As many layers as they are wide: shapes do not tell the axis."""

    axis: int
    kind: str

    @nn.compact
    def __call__(self, x):
        kind = {
            "dense": lambda: nn.Dense(8),
            "no bias": lambda: nn.Dense(8, use_bias=False),
            "heads": lambda: nn.DenseGeneral((8, 8), use_bias=False),
        }[self.kind]

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                y = kind()(x)
                return nn.tanh(y if y.shape == x.shape else y.mean(-1)), None

        layers = nn.scan(
            nn.remat(Layer), variable_axes={"params": self.axis}, split_rngs={"params": True},
            length=8,
        )  # fmt: skip
        return layers(name="layers")(x, None)[0]


@pytest.mark.parametrize("kind", ["dense", "no bias", "heads"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_the_axis_is_found_where_shapes_fit_several(kind, axis):
    module = Square(axis, kind)
    params = drawn(module, X)
    adapted, variables = adapted_and_moved(module, params, ALL)
    (layer,) = adapted.layers
    assert layer.stack.axis == axis and layer.stack.root == "layers"
    flat, lora = flatten(params), flatten(variables["lora"])
    x = X
    for i in range(8):
        kernel, *bias = (
            np.take(flat[f"{layer.path}/{name}"], i, axis)
            for name in ("kernel", "bias")
            if f"{layer.path}/{name}" in flat
        )
        a, b = (lora[f"{layer.path}/lora_{letter}"][i] for letter in "AB")
        y = x @ kernel.reshape(8, -1) + 2 * (x @ a) @ b
        y = y + bias[0][None, None] if bias else y
        x = np.tanh(y if y.shape == x.shape else y.reshape(*x.shape, -1).mean(-1))
    np.testing.assert_allclose(adapted.apply(variables, X), x, atol=1e-5)
    merged = vlm_jax.merge(adapted, variables)
    np.testing.assert_allclose(module.apply({"params": merged}, X), x, atol=1e-5)


def test_an_axis_that_matrices_have_not_is_refused():
    module = Square(3, "heads")
    with pytest.raises(UserError, match="stacked along axis 3, and matrices of two axes"):
        vlm_jax.adapt(module, drawn(module, X), LoRA(targets=r"layers.*"))


def test_4_bits_in_a_stack():
    params = drawn(Stack(), X)
    adapted, variables = adapted_and_moved(Stack(), params, Quantization("nf4-dq"), ALL)
    assert variables["params"]["layers"]["up"]["kernel"].shape == (3, 8, 8)
    merged = vlm_jax.merge(adapted, variables)
    out = jax.jit(adapted.apply)(variables, X)
    np.testing.assert_allclose(Stack().apply({"params": merged}, X), out, atol=1e-5)
    with pytest.raises(UserError, match="along axis 1.*variable_axes"):
        vlm_jax.adapt(Stack(axis=1), drawn(Stack(axis=1), X), Quantization("nf4"))


def test_dropout_in_a_scan_is_told_or_acts():
    lora = LoRA(3, 6, dropout=0.5, targets="all-linear")
    params, rngs = drawn(Stack(), X), {"dropout": jax.random.key(0)}
    with pytest.warns(UserWarning, match="does not act.*layers.up.*split_rngs.*dropout=0"):
        deaf, variables = adapted_and_moved(Stack(), params, lora)
    still = deaf.apply(variables, X)
    np.testing.assert_array_equal(deaf.apply(variables, X, rngs=rngs), still)
    hearing, _ = vlm_jax.adapt(Stack(rngs=("params", "dropout")), params, lora)
    np.testing.assert_array_equal(hearing.apply(variables, X), still)
    assert np.abs(hearing.apply(variables, X, rngs=rngs) - still).max() > 0.01


@pytest.mark.parametrize("rng", KEEP)
def test_dropout_is_peft_s(rng):
    """On the input of A alone, zero or scaled up, where there is an rng."""
    x = X[:1, 0, :6]
    params = drawn(nn.Dense(5), x)
    lora = LoRA(2, 4, dropout=0.25, targets="all-linear")
    adapted, fresh = vlm_jax.adapt(nn.Dense(5), params, lora)
    assert adapted.dropout_rng == "threefry"
    adapted = dataclasses.replace(adapted, dropout_rng=rng)
    base = nn.Dense(5).apply({"params": params}, x)
    key = jax.random.key(2)
    np.testing.assert_array_equal(adapted.apply(fresh, x, rngs={"dropout": key}), base)
    lora = moved(fresh["lora"], 0.3)
    a, b = lora["lora_A"], lora["lora_B"]
    variables = {**fresh, "lora": lora}
    np.testing.assert_allclose(adapted.apply(variables, x), base + 2 * x @ a @ b, atol=1e-5)
    outs = jax.jit(jax.vmap(lambda key: adapted.apply(variables, x, rngs={"dropout": key})))
    outs = np.asarray(outs(jax.random.split(key, 64)))[:, 0]
    masks = (np.arange(64)[:, None] >> np.arange(6)[None]) & 1  # every one that there is
    possible = np.asarray(base + 2 * ((masks * x / 0.75) @ a) @ b)
    distance = np.abs(outs[:, None] - possible[None]).max(-1)
    assert distance.min(1).max() < 1e-5
    assert 0.65 < masks[distance.argmin(1)].mean() < 0.85
    bare = adapted.apply(variables, x, rngs=key)  # Linen takes one key for every stream
    assert np.abs(bare - possible).max(-1).min() < 1e-5 < np.abs(bare - outs).max()


def test_lifted_layers_shared_ones_and_raw_scans():
    class Lifted(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.remat(nn.Dense)(8, name="remat")(x)
            x = nn.jit(nn.Dense)(8, name="jit")(x)
            shared = nn.scan(
                lambda layer, x, _: (layer(x), None),
                variable_broadcast="params", split_rngs={"params": False}, length=2,
            )  # fmt: skip
            x, _ = shared(nn.Dense(8, name="shared"), x, None)
            experts = nn.vmap(
                nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True},
                in_axes=None, axis_size=3,
            )  # fmt: skip
            return experts(4, name="experts")(x).sum(0)

    params = drawn(Lifted(), X)
    adapted, variables = adapted_and_moved(Lifted(), params, ALL)
    stacks = {layer.name: layer.layers for layer in adapted.layers}
    assert stacks == {"remat": (), "jit": (), "shared": (), "experts": (3,)}
    merged = vlm_jax.merge(adapted, variables)
    out = adapted.apply(variables, X)
    np.testing.assert_allclose(Lifted().apply({"params": merged}, X), out, atol=1e-4)
    # Another alpha of the same shapes is another program, whatever nn.jit has kept.
    twice, _ = vlm_jax.adapt(Lifted(), params, LoRA(3, 12, targets="all-linear"))
    merged = vlm_jax.merge(twice, variables)
    again = twice.apply(variables, X)
    assert np.abs(again - out).max() > 0.1
    np.testing.assert_allclose(Lifted().apply({"params": merged}, X), again, atol=1e-4)


def test_a_subclass_is_met_once_and_other_weights_are_refused():
    class Doubled(nn.Dense):
        def __call__(self, x):
            return 2 * super().__call__(x)

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", nn.initializers.normal(), (8, 8))

    class Both(nn.Module):
        @nn.compact
        def __call__(self, x, own=False):
            return Own(name="own")(x) if own else Doubled(8, name="doubled")(x)

    params = {"doubled": drawn(Doubled(8), X), "own": drawn(Own(), X)}
    adapted, variables = adapted_and_moved(Both(), params, LoRA(3, 6, targets=("doubled",)))
    merged = vlm_jax.merge(adapted, variables)
    out = adapted.apply(variables, X)
    np.testing.assert_allclose(Both().apply({"params": merged}, X), out, atol=1e-5)
    with pytest.raises(UserError, match="'own', which cannot be adapted: it is a Own"):
        vlm_jax.adapt(Both(), params, LoRA(3, targets=("own",)), inputs=(X, True))
    # Not reached by the call that was traced: `apply` finds out.
    adapted, variables = vlm_jax.adapt(Both(), params, LoRA(3, targets=("own",)), inputs=X)
    with pytest.raises(UserError, match="'own' is a Own, whose __call__ uses its weights"):
        adapted.apply(variables, X, True)


class Names(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Conv(8, (4, 4), (4, 4), name="proj")(images).reshape(images.shape[0], -1, 8)
        attended = nn.MultiHeadDotProductAttention(2, name="attn")(x)
        return nn.Dense(3, name="head")(nn.BatchNorm(True, name="norm")(x + attended))


IMAGE = np.random.default_rng(4).normal(size=(2, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def named():
    return Names(), drawn(Names(), IMAGE)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("attn",), ["attn.key", "attn.out", "attn.query", "attn.value"]),
        (("query", "attn.out"), ["attn.out", "attn.query"]),
        (r"attn\.(key|value)", ["attn.key", "attn.value"]),
        ("bert", ["attn.query", "attn.value"]),
        ("all-linear", ["attn.key", "attn.out", "attn.query", "attn.value", "head"]),
    ],
)
def test_targets(named, targets, expected):
    adapted, _ = vlm_jax.adapt(*named, LoRA(2, targets=targets))
    assert sorted(layer.name for layer in adapted.layers) == expected


@pytest.mark.parametrize("preset", ["llama", "qwen"])
def test_presets_of_decoders(preset):
    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in PRESETS["llama"]:
                x = nn.Dense(8, use_bias=False, name=name)(x)
            return nn.Dense(3, name="lm_head")(x)

    adapted, _ = vlm_jax.adapt(Decoder(), drawn(Decoder(), X), LoRA(2, targets=preset))
    assert sorted(layer.name for layer in adapted.layers) == sorted(
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    )


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([LoRA(targets=("qurey",))], "'qurey' matches no linear layer.*did you mean 'query'"),
        ([LoRA(targets="vit")], "'qkv' matches no linear layer"),
        ([LoRA(targets=("proj",))], "'proj', which cannot be adapted: it is a Conv"),
        ([LoRA(targets=r"attn\.(")], "not a regular expression"),
        ([LoRA(targets=r"attn")], "matches no linear layer.*whole names"),
        ([LoRA(targets=())], "empty"),
        ([LoRA(rank=0, targets="bert")], "1 or more"),
        ([LoRA(dropout=1.0, targets="bert")], "dropout"),
        ([LoRA(targets="bert", dora=True)], "dora=True, but DoRA is not supported"),
        ([LoRA(targets="bert", modules_to_save=("head",))], "modules_to_save.*not supported"),
        ([LoRA(targets="bert", components=("vision",))], "components.*not supported"),
        ([], "expected LoRA"),
        ([LoRA(), LoRA()], "one of each"),
        (["nf4"], "methods \\('nf4'\\); expected LoRA"),
        ([Quantization("nf5")], "storage 'nf5'.*did you mean 'nf4'"),
        ([Quantization("nf4", components=("vision",))], "components"),
        ([Quantization("nf4", skip=("haed",))], "skip.*'haed' matches no"),
    ],
)
def test_refused(named, methods, message):
    with pytest.raises(UserError, match=message):
        vlm_jax.adapt(*named, *methods)


def test_foreign_matrices_are_refused(named, tmp_path):
    module, params = named
    adapted, variables = vlm_jax.adapt(module, params, LoRA(2, targets="bert"))
    stats = {"batch_stats": {"norm": {"mean": np.zeros(8), "var": np.ones(8)}}}
    _, other_rank = vlm_jax.adapt(module, params, LoRA(3, targets="bert"))
    _, other_targets = vlm_jax.adapt(module, params, LoRA(2, targets=("attn",)))
    flat = flatten(variables["lora"])
    lacking = unflatten(dict(list(flat.items())[1:]))
    for lora, message in (
        (other_rank["lora"], "rank 2 and its kernel ask for.*another base or another rank"),
        (other_targets["lora"], "hold 'attn/(key|out)/lora_.'.*other targets"),
        (lacking, "lack 'attn/query/lora_A'"),
    ):
        with pytest.raises(UserError, match=message):
            adapted.apply({**variables, **stats, "lora": lora}, IMAGE)
        with pytest.raises(UserError, match=message):
            vlm_jax.merge(adapted, {**variables, "lora": lora})
    with pytest.raises(UserError, match="no collection 'lora'"):
        adapted.apply({"params": params, **stats}, IMAGE)
    with pytest.raises(UserError, match="another\\s+module's"):
        adapted.apply({**variables, **stats, "params": {"head": params["head"]}}, IMAGE)
    with pytest.raises(UserError, match="requantize"):
        vlm_jax.merge(adapted, variables, requantize=True)
    vlm_jax.save_lora(adapted, variables, tmp_path)
    wider = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf]), params)
    with pytest.raises(UserError, match="shape.*another base or rank"):
        vlm_jax.load_lora(nn.Dense(3), {"attn": {"query": wider["head"], "value": wider["head"]}},
                          tmp_path)  # fmt: skip
    with pytest.raises(UserError, match="'base_model.model.attn.query.*no place.*`names`"):
        vlm_jax.load_lora(nn.Dense(3), {"head": params["head"]}, tmp_path)
    with pytest.raises(UserError, match="to two layers"):
        vlm_jax.save_lora(adapted, variables, tmp_path, names=[(".*", "query")])
    with pytest.raises(UserError, match="No row of the table of names"):
        vlm_jax.save_lora(adapted, variables, tmp_path, names=[("head", "query")])
    with pytest.raises(UserError, match="There is no"):
        vlm_jax.load_lora(module, params, tmp_path / "nowhere")


def test_other_collections_methods_and_boxes_pass_through(named):
    module, params = named
    adapted, variables = adapted_and_moved(module, params, LoRA(2, targets="bert"))
    stats = {"norm": {"mean": jnp.zeros(8), "var": jnp.ones(8)}}
    variables["batch_stats"] = stats
    options = dict(mutable=["params", "intermediates"], capture_intermediates=True)
    out, state = jax.eval_shape(lambda v: adapted.apply(v, IMAGE, **options), variables)
    assert flatten(state["params"]).keys() == flatten(params).keys()
    assert "attn" in state["intermediates"] and out.shape == (2, 4, 3)

    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.normal(0.3), (None, "tensor"))
            return self.down(nn.Dense(6, kernel_init=init, name="up")(x))

        def down(self, x):
            return x[..., :2]

    boxed = drawn(Boxed(), X)
    adapted, variables = adapted_and_moved(Boxed(), boxed, ALL)
    assert adapted.layers == (Layer("up", "kernel", (8, 6), (0,), (1,), takes_dropout=True),)
    merged = vlm_jax.merge(adapted, variables)
    assert isinstance(merged["up"]["kernel"], nn.Partitioned)
    np.testing.assert_allclose(
        Boxed().apply({"params": merged}, X), adapted.apply(variables, X), atol=1e-5
    )
    np.testing.assert_array_equal(adapted.apply(variables, X, method="down"), X[..., :2])


def test_inputs_are_asked_for_where_no_call_is_guessed():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, pair, *, flag):
            assert flag == "on"
            return nn.MultiHeadDotProductAttention(2, name="attn")(pair["a"])

    inputs = {"pair": {"a": jax.ShapeDtypeStruct((1, 4, 8), jnp.float32)}, "flag": "on"}
    params = jax.eval_shape(lambda x: Odd().init(jax.random.key(0), x, flag="on"), {"a": X})
    params = jax.tree.map(lambda s: np.ones(s.shape, np.float32), params["params"])
    with pytest.raises(UserError, match="'attn.query'.*give adapt `inputs="):
        vlm_jax.adapt(Odd(), params, LoRA(2, targets="bert"))
    with pytest.raises(UserError, match="could not be called with the `inputs`"):
        vlm_jax.adapt(Odd(), params, LoRA(2, targets="bert"), inputs=X)
    adapted, _ = vlm_jax.adapt(Odd(), params, LoRA(2, targets="bert"), inputs=inputs)
    assert len(adapted.layers) == 2


def test_nnx_is_refused_by_name():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            return self.layer(x)

    class Empty(nnx.Module):
        pass

    with pytest.raises(UserError, match="'Empty' is an NNX module.*to_nnx__module"):
        vlm_jax.adapt(Empty(), {}, LoRA(targets="all-linear"))
    wrapped = bridge.ToNNX(nn.Dense(4), nnx.Rngs(0))
    with pytest.raises(UserError, match="to_nnx__module"):
        vlm_jax.adapt(wrapped, {}, LoRA(targets="all-linear"))
    params = drawn(nn.Dense(4), X)
    vlm_jax.adapt(wrapped.to_nnx__module, params, LoRA(targets="all-linear"))
    inside = bridge.ToLinen(Net)
    params = {"layer": drawn(nn.Dense(8), X)}
    with pytest.raises(UserError, match="'layer', which cannot be adapted: .*NNX"):
        vlm_jax.adapt(inside, params, LoRA(targets=("layer",)), inputs=X)
    with pytest.raises(UserError, match="a flax.linen module; this is a dict"):
        vlm_jax.adapt({}, {}, LoRA())
    with pytest.raises(UserError, match="class Dense"):
        vlm_jax.adapt(nn.Dense, {}, LoRA())
    adapted, _ = vlm_jax.adapt(nn.Dense(4), drawn(nn.Dense(4), X), LoRA(targets="all-linear"))
    with pytest.raises(UserError, match="adapted already"):
        vlm_jax.adapt(adapted, {}, LoRA())
