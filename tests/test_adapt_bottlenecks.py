"""`adapt` with bottleneck adapters: by hand, as torch's, in scans and meshes; what is refused."""

import dataclasses
import json

import flax.linen as nn
import flax_models
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from flax.nnx import bridge
from safetensors.numpy import load_file, save_file
from test_adapt import TOKENS, make_pair, moved, run

import vlm_jax
from vlm_jax import Adapter, LoRA, Quantization, UserError
from vlm_jax.train.optimizers import promoting
from vlm_jax.trees import flatten, unflatten

X = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
TARGETS = {"gpt": ("attn", "mlp"), "bert": ("attention", "output"), "vit": ("proj", "fc2")}
WHOLE = r"(?!.)"  # the module itself: its name is empty
F = {"relu": lambda x: np.maximum(x, 0), "swish": lambda x: x / (1 + np.exp(-x)), "tanh": np.tanh}


def by_hand(leaves, z, f, scaling):
    """A(z), as the papers have it, in float64."""
    leaves = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(leaves).items()}
    z = np.asarray(z, np.float64)
    if "adapter_norm_before/scale" in leaves:
        z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)
        scale, bias = (leaves[f"adapter_norm_before/{name}"] for name in ("scale", "bias"))
        z = np.einsum("...d,d->...d", z, scale) + np.broadcast_to(bias, z.shape)
    for part, then in (("down", F[f]), ("up", lambda x: scaling * x)):
        y = np.einsum("...i,io->...o", z, leaves[f"adapter_{part}/kernel"])
        z = then(y + np.broadcast_to(leaves[f"adapter_{part}/bias"], y.shape))
    return z


def drawn(module, *inputs):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda s: (0.3 * rng.normal(size=s.shape)).astype(np.float32), shapes)


def adapted_and_moved(module, params, *methods, size=0.3, **options):
    adapted, variables = vlm_jax.adapt(module, params, *methods, **options)
    return adapted, {**variables, "adapter": moved(variables["adapter"], size)}


def outcome(adapted, variables, x):
    """Return the output and the gradient of a number made of it."""

    def loss(leaves, variables):
        y = adapted.apply({**variables, "adapter": leaves}, x)
        return jnp.sum(jnp.sin(y)), y

    (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        variables["adapter"], variables
    )
    return y, gradient


def close(one, other, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=atol), one, other)


@pytest.fixture(scope="module", params=list(TARGETS))
def pair(request):
    return make_pair(request.param)


@pytest.fixture(scope="module")
def gpt():
    return make_pair("gpt")


@pytest.fixture(scope="module")
def gpt_moved(gpt):
    return adapted_and_moved(gpt.module, gpt.params, Adapter("houlsby", 4, targets=TARGETS["gpt"]))


@pytest.mark.parametrize("init", ["mam_adapter", "bert"])
def test_it_starts_as_the_base_and_trains_the_adapter_alone(pair, init):
    adapter = Adapter("houlsby", 4, init_weights=init, targets=TARGETS[pair.preset])
    adapted, variables = vlm_jax.adapt(pair.module, pair.params, adapter)
    base = run(pair.module, {"params": pair.params}, pair.x)
    held = flatten(variables["params"])
    assert all(held[path] is leaf for path, leaf in flatten(pair.params).items())
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables["adapter"]))
    assert len(adapted.sites) == 4
    y, gradient = outcome(adapted, variables, pair.x)
    flat = {path: float(np.abs(leaf).max()) for path, leaf in flatten(gradient).items()}
    if init == "mam_adapter":
        # Op by op: compiled, fusions differ where more is computed, and with them the last bits.
        plain = pair.module.apply({"params": pair.params}, pair.x)
        np.testing.assert_array_equal(adapted.apply(variables, pair.x), plain)
        assert all((size > 0) == ("adapter_up" in path) for path, size in flat.items())
    else:
        assert 0 < np.abs(y - base).max() < 1
    after = {**variables, "adapter": moved(variables["adapter"])}
    assert all(
        np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(outcome(adapted, after, pair.x)[1])
    )


@pytest.mark.parametrize("kind", ["houlsby", "parallel"])
def test_a_gpt_2_is_the_one_written_out(gpt, kind):
    adapter = Adapter(kind, 4, norm=kind == "houlsby", targets=TARGETS["gpt"])
    adapted, variables = adapted_and_moved(gpt.module, gpt.params, adapter)
    params, leaves = gpt.params, variables["adapter"]
    f, scaling = {"houlsby": ("swish", 1.0), "parallel": ("relu", 4.0)}[kind]
    x = params["wte"]["embedding"][TOKENS] + params["wpe"]["embedding"][None, : TOKENS.shape[1]]
    for i in range(2):
        block = params[f"h_{i}"]
        for norm, name, part in (
            ("ln_1", "attn", flax_models.GPT2Attention(4)),
            ("ln_2", "mlp", flax_models.GPT2MLP()),
        ):
            z = nn.LayerNorm(1e-5).apply({"params": block[norm]}, x)
            h = part.apply({"params": block[name]}, z)
            read = h if kind == "houlsby" else z
            x = x + h + by_hand(leaves[f"h_{i}"][name], read, f, scaling).astype(np.float32)
    x = nn.LayerNorm(1e-5).apply({"params": params["ln_f"]}, x)
    expected = x @ params["wte"]["embedding"].T
    np.testing.assert_allclose(run(adapted, variables, TOKENS), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["houlsby", "parallel"])
def test_layers_of_a_vit_are_the_formula(kind):
    pair = make_pair("vit")
    adapter = Adapter(kind, 4, "tanh", 0.5, targets=r"block_\d\.fc2")
    adapted, variables = adapted_and_moved(pair.module, pair.params, adapter)
    assert [site.name for site in adapted.sites] == ["block_0.fc2", "block_1.fc2"]
    down = variables["adapter"]["block_0"]["fc2"]["adapter_down"]["kernel"]
    assert down.shape == ((64 if kind == "parallel" else 32), 8)  # W of what the layer gives
    _, state = adapted.apply(variables, pair.x, capture_intermediates=True)
    for i in range(2):
        seen, params = state["intermediates"][f"block_{i}"], pair.params[f"block_{i}"]["fc2"]
        x = nn.gelu(seen["fc1"]["__call__"][0], approximate=False)
        y = nn.Dense(32).apply({"params": params}, x)
        read = x if kind == "parallel" else y
        added = by_hand(variables["adapter"][f"block_{i}"]["fc2"], read, "tanh", 0.5)
        assert np.abs(added).max() > 0.1
        np.testing.assert_allclose(seen["fc2"]["__call__"][0], y + added, atol=1e-4)


def test_a_bert_is_torch_s_with_hooks_and_so_are_five_steps():
    """Bottlenecks of nn.Sequential behind attention.output.dense and output.dense (houlsby)."""
    pair = make_pair("bert")
    adapter = Adapter("houlsby", 4, "relu", 0.7, targets=("attention.out", "output"))
    adapted, variables = adapted_and_moved(pair.module, pair.params, adapter)
    model, ours = pair.torch_model().requires_grad_(False), {}
    for site, leaves in adapted.bottlenecks(variables):
        layer, part = site.path.split("/")[0].removeprefix("layer_"), site.path.split("/")[1]
        block = model.encoder.layer[int(layer)]
        dense = {"attention": block.attention.output.dense, "output": block.output.dense}[part]
        added = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.ReLU(), torch.nn.Linear(8, 32))
        for linear, name in ((added[0], "adapter_down"), (added[2], "adapter_up")):
            linear.weight.data = torch.tensor(leaves[name]["kernel"].T.copy())
            linear.bias.data = torch.tensor(leaves[name]["bias"])
            ours[f"{site.path}/{name}/kernel"] = linear.weight
            ours[f"{site.path}/{name}/bias"] = linear.bias
        dense.register_forward_hook(lambda module, args, y, added=added: y + 0.7 * added(y))
    theirs = pair.torch_output(model).detach().numpy()
    out = run(adapted, variables, pair.x)
    np.testing.assert_allclose(out, theirs, atol=2e-5)
    assert np.abs(out - run(pair.module, {"params": pair.params}, pair.x)).max() > 0.1
    wanted = np.random.default_rng(5).normal(size=out.shape).astype(np.float32)

    def loss(leaves):
        return jnp.mean((adapted.apply({**variables, "adapter": leaves}, pair.x) - wanted) ** 2)

    tx = promoting(optax.adam(1e-2, eps=1e-4))
    optimizer = torch.optim.Adam(list(ours.values()), lr=1e-2, eps=1e-4)

    @jax.jit
    def step(leaves, state):
        value, gradient = jax.value_and_grad(loss)(leaves)
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(leaves, updates), state, value

    leaves, state, losses = variables["adapter"], tx.init(variables["adapter"]), []
    for _ in range(5):
        leaves, state, value = step(leaves, state)
        optimizer.zero_grad()
        expected = ((pair.torch_output(model) - torch.tensor(wanted)) ** 2).mean()
        expected.backward()
        optimizer.step()
        assert float(value) == pytest.approx(expected.item(), rel=1e-5)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    for path, leaf in flatten(leaves).items():
        np.testing.assert_allclose(leaf, ours[path].detach().numpy().T, atol=1e-4, err_msg=path)


@pytest.mark.parametrize("form", ["remat", "scan", "scan, remat"])
def test_remat_and_scan_are_the_plain_module(gpt, gpt_moved, form):
    adapted, variables = gpt_moved
    expected = outcome(adapted, variables, TOKENS)
    if form == "remat":
        remat = dataclasses.replace(adapted, module=flax_models.GPT2(form=form))
        return close(outcome(remat, variables, TOKENS), expected)
    params = flax_models.stacked(gpt.params, 2)
    scan, fresh = vlm_jax.adapt(flax_models.GPT2(form=form), params, adapted.adapter)
    leaves = flax_models.stacked(variables["adapter"], 2)
    assert jax.tree.map(jnp.shape, fresh["adapter"]) == jax.tree.map(jnp.shape, leaves)
    assert fresh["adapter"]["h"]["mlp"]["adapter_down"]["kernel"].shape == (2, 32, 8)
    y, gradient = outcome(scan, {**fresh, "adapter": leaves}, TOKENS)
    close((y, gradient), (expected[0], flax_models.stacked(expected[1], 2)), atol=1e-4)


def test_a_mesh_changes_nothing(gpt_moved):
    from jax.sharding import NamedSharding, PartitionSpec

    adapted, variables = gpt_moved
    mesh = vlm_jax.make_mesh(data=2, tensor=2, devices=jax.devices()[:4])

    def lie(leaf):
        spec = PartitionSpec(None, "tensor") if leaf.ndim == 2 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    spread = jax.tree.map(lie, variables)
    tokens = jax.device_put(TOKENS, NamedSharding(mesh, PartitionSpec("data")))
    y, gradient = outcome(adapted, spread, tokens)
    assert len(jax.tree.leaves(gradient)[0].sharding.device_set) == 4
    expected = outcome(adapted, variables, TOKENS)
    np.testing.assert_allclose(y, expected[0], atol=1e-5)
    close(gradient, expected[1], atol=1e-4)


def test_a_base_in_4_bits_is_its_decoded_self(gpt):
    """Modules around 4-bit layers, and such a layer itself; together or one after the other."""
    module = flax_models.GPT2(layers=1)
    params = {name: leaf for name, leaf in gpt.params.items() if name != "h_1"}
    adapter = Adapter("parallel", 4, targets=("attn", "c_fc", "mlp.c_proj"))
    quantization = Quantization("nf4", skip=("c_attn",))
    adapted, variables = adapted_and_moved(module, params, adapter, quantization)
    assert isinstance(variables["params"]["h_0"]["mlp"]["c_fc"]["kernel"], vlm_jax.NF4)
    only, quantized = vlm_jax.adapt(module, params, quantization)
    decoded = vlm_jax.merge(only, quantized)
    plain, _ = vlm_jax.adapt(module, decoded, adapter)
    later, fresh = vlm_jax.adapt(module, quantized["params"], adapter)
    assert later.sites == adapted.sites == plain.sites and len(later.sites) == 3
    assert later.quantized == adapted.quantized
    expected = outcome(plain, {"params": decoded, "adapter": variables["adapter"]}, TOKENS)
    held = {**fresh, "adapter": variables["adapter"]}
    close(outcome(later, held, TOKENS), expected, atol=1e-4)


def test_eight_are_switched_without_compiling(gpt, gpt_moved):
    adapted, variables = gpt_moved
    apply = jax.jit(lambda leaves: adapted.apply({**variables, "adapter": leaves}, TOKENS))
    several = [
        jax.tree.map(lambda leaf, i=i: leaf * (1 + 0.2 * i), variables["adapter"]) for i in range(8)
    ]
    outs = [np.asarray(apply(one)) for one in several]
    assert apply._cache_size() == 1
    assert all(np.abs(outs[0] - out).max() > 1e-3 for out in outs[1:])


@pytest.mark.parametrize("form", ["loop", "scan"])
def test_files_go_out_and_in_unchanged(gpt, tmp_path, form):
    module = flax_models.GPT2(form=form)
    params = gpt.params if form == "loop" else flax_models.stacked(gpt.params, 2)
    adapter = Adapter("houlsby", 3, "relu", 2.0, norm=True, targets=("attn", "mlp"))
    adapted, variables = adapted_and_moved(module, params, adapter)
    vlm_jax.save_adapter(adapted, variables, tmp_path / "out")
    again, read = vlm_jax.load_adapter(module, params, tmp_path / "out", inputs=TOKENS)
    assert again.adapter == adapter
    assert [(s.path, s.stack) for s in again.sites] == [(s.path, s.stack) for s in adapted.sites]
    jax.tree.map(np.testing.assert_array_equal, read["adapter"], variables["adapter"])
    np.testing.assert_array_equal(run(again, read, TOKENS), run(adapted, variables, TOKENS))


def test_files_of_another_are_refused(gpt, gpt_moved, tmp_path):
    adapted, variables = gpt_moved
    vlm_jax.save_adapter(adapted, variables, tmp_path)
    file, config = tmp_path / "adapter.safetensors", tmp_path / "adapter_config.json"
    good, said = load_file(file), json.loads(config.read_text())
    first = "h_0/attn/adapter_down/kernel"
    for change, match in (
        ({"format": None}, "not that of an adapter of a foreign module"),
        ({"gate": True}, "not that of an adapter of a foreign module"),
        ({"targets": ["attm"]}, "'attm' matches no module.*did you mean 'attn'"),
        ({"targets": ["attn"]}, "'h_0/mlp/adapter_down/bias' has no place"),
        ({"reduction_factor": 8}, "has the shape|with the shape"),
    ):
        config.write_text(json.dumps({**said, **change}))
        with pytest.raises(UserError, match=match):
            vlm_jax.load_adapter(gpt.module, gpt.params, tmp_path)
    config.write_text(json.dumps(said))
    save_file({key: value for key, value in good.items() if key != first}, file)
    with pytest.raises(UserError, match=f"'{first}' is missing"):
        vlm_jax.load_adapter(gpt.module, gpt.params, tmp_path)
    with pytest.raises(UserError, match="There is no .*nowhere"):
        vlm_jax.load_adapter(gpt.module, gpt.params, tmp_path / "nowhere")
    with pytest.raises(UserError, match="mean nothing for a foreign module"):
        vlm_jax.save_adapter(adapted, variables, tmp_path, "colors")
    lora, loras = vlm_jax.adapt(gpt.module, gpt.params, LoRA(targets="gpt"))
    with pytest.raises(UserError, match="no bottleneck adapter to save.*save_lora"):
        vlm_jax.save_adapter(lora, loras, tmp_path)
    with pytest.raises(UserError, match="no LoRA to save"):
        vlm_jax.save_lora(adapted, variables, tmp_path)


class Doubled(nn.Dense):
    def __call__(self, x):
        return 2 * super().__call__(x)


class First(nn.Dense):
    def __call__(self, x):
        return super().__call__(x)[..., :3]


class Shared(nn.Module):
    def setup(self):
        self.layer = nn.Dense(8)

    def __call__(self, x):
        return self.layer(nn.tanh(self.layer(x)))


class Encodes(nn.Module):
    """Its parent calls `encode`, which calls `__call__`."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(x)

    def encode(self, x):
        return self(x) + 1


class Calls(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Encodes(name="layer").encode(x)


class Named(nn.Module):
    """Its layer is called with arguments by name, the first one last."""

    @nn.compact
    def __call__(self, x):
        return Scaled(name="layer")(by=2.0, x=x)


class Scaled(nn.Module):
    @nn.compact
    def __call__(self, x, by):
        return by * nn.Dense(6)(x)


@pytest.mark.parametrize(
    ("module", "kind", "target", "read"),  # read: of the input and the plain output
    [
        (nn.Dense(6, use_bias=False), "houlsby", "", lambda x, y: y),
        (nn.DenseGeneral((2, 3)), "houlsby", "", lambda x, y: y),
        (nn.Dense(6, dtype=jnp.bfloat16), "houlsby", "", lambda x, y: y),
        (Doubled(6), "houlsby", "", lambda x, y: y),
        (First(6), "houlsby", "", lambda x, y: y),
        (nn.remat(nn.Dense)(6), "parallel", "", lambda x, y: x),
        (nn.jit(nn.Dense)(6), "parallel", "", lambda x, y: x),
        (nn.Sequential([nn.Dense(6), nn.tanh]), "parallel", "", lambda x, y: x),
        (Calls(), "houlsby", "layer", lambda x, y: y - 1),
        (Named(), "parallel", "layer", lambda x, y: x),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_each_kind_of_module_is_met_once(module, kind, target, read):
    params = drawn(module, X)
    adapter = Adapter(kind, 2, "tanh", 0.5, targets=target or WHOLE)
    adapted, fresh = vlm_jax.adapt(module, params, adapter, inputs=X)
    base = jnp.asarray(module.apply({"params": params}, X))
    np.testing.assert_array_equal(adapted.apply(fresh, X), base)
    variables = {**fresh, "adapter": moved(fresh["adapter"], 0.3)}
    leaves = variables["adapter"][target] if target else variables["adapter"]
    assert jax.tree.leaves(leaves)[0].dtype == jnp.float32
    expected = base.astype(jnp.float32) + by_hand(leaves, read(X, base), "tanh", 0.5)
    for _ in range(2):  # whatever nn.jit keeps
        out = adapted.apply(variables, X)
        assert out.dtype == base.dtype
        half = out.dtype == jnp.bfloat16
        error = np.abs(np.asarray(out, np.float32) - np.asarray(expected, np.float32))
        assert error.max() < (0.05 if half else 1e-5)
    assert np.abs(np.asarray(out - base, np.float32)).max() > 0.1


def test_a_module_called_twice_has_it_twice():
    params = drawn(Shared(), X)
    adapted, variables = adapted_and_moved(
        Shared(), params, Adapter("parallel", targets=("layer",))
    )
    leaves, dense = variables["adapter"]["layer"], params["layer"]

    def layer(x):
        y = np.einsum("btd,de->bte", x, dense["kernel"]) + np.broadcast_to(dense["bias"], x.shape)
        return y + by_hand(leaves, x, "relu", 4.0)

    expected = layer(np.tanh(layer(X)))
    np.testing.assert_allclose(adapted.apply(variables, X), expected, atol=1e-4)


class Tanh(nn.Module):
    def __call__(self, x):
        return nn.tanh(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(8, name="mlp")(Tanh(name="act")(x)), None


class Stack(nn.Module):
    axis: int = 0
    rngs: tuple = ("params",)
    length: int = 8

    @nn.compact
    def __call__(self, x):
        rngs = dict.fromkeys(self.rngs, True)
        block = nn.scan(
            Block, variable_axes={"params": self.axis}, split_rngs=rngs, length=self.length
        )
        return block(name="layers")(x, None)[0]


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("length", [3, 8])
def test_a_stack_of_any_axis_is_its_layers(axis, length):
    """Of 8 layers of width 8 shapes do not tell the axis."""
    module = Stack(axis, length=length)
    params = drawn(module, X)
    adapted, variables = adapted_and_moved(module, params, Adapter("houlsby", 2, targets=("mlp",)))
    leaves, dense = variables["adapter"]["layers"]["mlp"], params["layers"]["mlp"]
    assert leaves["adapter_up"]["kernel"].shape == (length, 4, 8)
    x = X.astype(np.float64)
    for i in range(length):
        kernel, bias = (np.take(dense[name], i, axis) for name in ("kernel", "bias"))
        y = np.einsum("btd,de->bte", np.tanh(x), kernel) + np.broadcast_to(bias, x.shape)
        x = x + y + by_hand(jax.tree.map(lambda leaf, i=i: leaf[i], leaves), y, "swish", 1.0)
    np.testing.assert_allclose(adapted.apply(variables, X), x, atol=1e-4)


def test_a_module_without_parameters_has_its_own_in_each_layer():
    params = drawn(Stack(length=3), X)
    adapter = Adapter("parallel", targets=("act",))
    adapted, variables = adapted_and_moved(Stack(length=3), params, adapter)
    leaves, dense = variables["adapter"]["layers"]["act"], params["layers"]["mlp"]
    x = X.astype(np.float64)
    for i in range(3):
        added = by_hand(jax.tree.map(lambda leaf, i=i: leaf[i], leaves), x, "relu", 4.0)
        y = np.einsum("btd,de->bte", np.tanh(x) + added, dense["kernel"][i])
        x = x + y + np.broadcast_to(dense["bias"][i], x.shape)
    np.testing.assert_allclose(adapted.apply(variables, X), x, rtol=1e-5, atol=1e-4)


def test_experts_of_a_vmap_have_one_each():
    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            experts = nn.vmap(
                nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True},
                in_axes=None, axis_size=3,
            )  # fmt: skip
            return experts(4, name="experts")(x).sum(0)

    params = drawn(Experts(), X)
    adapted, variables = adapted_and_moved(
        Experts(), params, Adapter("parallel", targets=("experts",))
    )
    (site,) = adapted.sites
    assert site.stack.count == 3
    dense, leaves = params["experts"], variables["adapter"]["experts"]
    expected = 0
    for i in range(3):
        y = np.einsum("btd,de->bte", X, dense["kernel"][i])
        y = y + np.broadcast_to(dense["bias"][i], y.shape)
        expected += y + by_hand(jax.tree.map(lambda leaf, i=i: leaf[i], leaves), X, "relu", 4.0)
    np.testing.assert_allclose(adapted.apply(variables, X), expected, atol=1e-4)


def test_dropout_acts_where_there_is_an_rng_or_is_told():
    adapter = Adapter("houlsby", 2, dropout=0.5, targets=("mlp",))
    params, rngs = drawn(Stack(), X), {"dropout": jax.random.key(0)}
    with pytest.warns(
        UserWarning, match="adapter dropout of 0.5 does not act.*layers.mlp.*split_rngs"
    ):
        deaf, variables = adapted_and_moved(Stack(), params, adapter)
    still = deaf.apply(variables, X)
    np.testing.assert_array_equal(deaf.apply(variables, X, rngs=rngs), still)
    hearing, _ = vlm_jax.adapt(Stack(rngs=("params", "dropout")), params, adapter)
    np.testing.assert_array_equal(hearing.apply(variables, X), still)
    assert np.abs(hearing.apply(variables, X, rngs=rngs) - still).max() > 0.01
    # On what A gives: each of its numbers is zero or twice as large.
    dense = drawn(nn.Dense(8), X)
    adapted, variables = adapted_and_moved(
        nn.Dense(8), dense, dataclasses.replace(adapter, targets=r".*")
    )
    base = nn.Dense(8).apply({"params": dense}, X)
    whole = adapted.apply(variables, X) - base
    parts = (adapted.apply(variables, X, rngs=rngs) - base) / whole
    assert np.minimum(np.abs(parts), np.abs(parts - 2)).max() < 1e-3
    assert 0.3 < np.mean(parts > 1) < 0.7


class Odd(nn.Module):
    """Modules that can have no adapter, or not of each kind."""

    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(8, 8, name="embed")
        x = x + embed(jnp.zeros(x.shape[:-1], jnp.int32))
        third = nn.scan(
            Unbiased, variable_axes={"params": 2}, split_rngs={"params": True}, length=2
        )
        x, _ = third(name="third")(x, None)
        x = nn.remat_scan(Plain, (2, 2))(name="twice")(x)
        x, _ = Block(name="pair")(x)
        y = nn.Dense(8, name="pooled")(x.mean(1))
        if self.is_initializing():
            y = nn.Dense(8, name="skipped")(y)
        both = Tanh(name="both")
        x = both(x) + both(x[..., :1])[..., :1].repeat(8, -1)
        return embed.attend(x + jnp.broadcast_to(y[:, None], x.shape))


class Unbiased(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(8, use_bias=False, name="mlp")(x), None


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Tanh(name="act")(nn.Dense(8, name="mlp")(x))


@pytest.fixture(scope="module")
def odd():
    return Odd(), drawn(Odd(), X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "pfeiffer"}, "reads the sum.*Adapter\\('houlsby', ...\\) with the MLP alone"),
        ({"components": ("vision",)}, "components=.*not supported by adapt"),
        ({"modules_to_save": ("head",)}, "modules_to_save=.*not supported by adapt"),
        ({"targets": ()}, "targets are empty"),
        ({"targets": ("pari",)}, "'pari' matches no module.*did you mean 'pair'"),
        ({"targets": "pair.("}, "not a regular expression"),
        ({"targets": "mlp"}, "'mlp' matches no module.*whole names"),
        ({"targets": ("pair",)}, "'pair', but it is a Block and gives tuple, not one array"),
        ({"targets": ("skipped",)}, "'skipped', but no call that was traced reached.*`inputs="),
        ({"targets": ("twice.mlp",)}, "'twice.mlp', but its parameters are a stack of stacks"),
        ({"targets": ("twice.act",)}, "'twice.act', but its parameters are a stack of stacks"),
        ({"targets": ("third.mlp",)}, "stacked along axis 2, which biases have not"),
        ({"targets": ("both",)}, "'both', but it is a Tanh and gives arrays of several widths"),
        ({"kind": "parallel", "targets": ("embed",)}, r"first argument, which is int32\[2, 5\]"),
        ({"reduction_factor": 0.0}, "must be between 0.001 and"),
        ({"non_linearity": "rely"}, "did you mean 'relu'"),
        ({"dropout": 1.0}, "must be in"),
    ],
)
def test_refused(odd, options, message):
    adapter = Adapter(**{"kind": "houlsby", "targets": ("pair.mlp",), **options})
    with pytest.raises(UserError, match=message):
        vlm_jax.adapt(*odd, adapter, inputs=X)


def test_what_would_do_nothing_or_lose_something_is_refused(odd, gpt, gpt_moved):
    module, params = odd
    adapter = Adapter("houlsby", targets=("pair.mlp",))
    with pytest.raises(UserError, match="a LoRA and an Adapter; a run trains one of the two"):
        vlm_jax.adapt(module, params, LoRA(targets="all-linear"), adapter, inputs=X)
    with pytest.raises(UserError, match="'embed' is a Embed, whose attend was called, and not its"):
        tied = Adapter("houlsby", targets=("embed",))
        adapted, variables = vlm_jax.adapt(module, params, tied, inputs=X)
        adapted.apply(variables, X)
    with pytest.raises(UserError, match="the whole module, but it is a ToLinen and gives what an"):
        layer = {"kernel": np.ones((8, 8), np.float32), "bias": np.ones(8, np.float32)}
        bridged = bridge.ToLinen(nnx.Linear, args=(8, 8))
        vlm_jax.adapt(bridged, layer, Adapter("houlsby", targets=WHOLE), inputs=X)
    adapted, variables = gpt_moved
    with pytest.raises(UserError, match="which no weight can stand for.*save_adapter"):
        vlm_jax.merge(adapted, variables)
    narrow, _ = vlm_jax.adapt(
        gpt.module, gpt.params, Adapter("houlsby", 8, targets=("attn", "mlp"))
    )
    with pytest.raises(UserError, match="reduction_factor 8 and its width ask for"):
        narrow.apply(variables, TOKENS)
    fewer = unflatten({p: x for p, x in flatten(variables["adapter"]).items() if "h_0" in p})
    with pytest.raises(UserError, match="'adapter' lack 'h_1/.*other targets"):
        adapted.apply({**variables, "adapter": fewer}, TOKENS)
    with pytest.raises(UserError, match="no collection 'adapter'"):
        adapted.apply({"params": gpt.params}, TOKENS)
