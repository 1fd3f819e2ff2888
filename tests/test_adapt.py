"""`adapt` against peft: a GPT-2, a BERT and a ViT in plain Linen, and transformers' own."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax_models
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from references import quiet
from safetensors.numpy import load_file

import vlm_jax
from vlm_jax import LoRA, UserError
from vlm_jax.linen.codec import named_layers
from vlm_jax.train.optimizers import promoting
from vlm_jax.trees import flatten, unflatten

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 8))
IMAGES = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """A Linen module and the transformers model of the same weights."""

    preset: str
    module: Any
    params: Any
    names: Any
    x: np.ndarray
    reference: Callable[[], torch.nn.Module]
    state: dict[str, torch.Tensor]
    targets: list[str]

    def torch_model(self):
        model = self.reference()
        model.load_state_dict(self.state)
        return model.eval()

    def torch_output(self, model):
        if self.preset == "vit":
            out = model(torch.tensor(self.x).permute(0, 3, 1, 2)).last_hidden_state
            return out.permute(0, 2, 3, 1)
        out = model(torch.tensor(self.x))
        return out.logits if self.preset == "gpt" else out.last_hidden_state

    @functools.cached_property
    def adapted(self):
        """Return (adapted, variables) whose B is no longer zero."""
        lora = LoRA(4, 12, targets=self.preset)
        adapted, variables = vlm_jax.adapt(self.module, self.params, lora, inputs=self.x)
        return adapted, {**variables, "lora": moved(variables["lora"])}


@functools.partial(jax.jit, static_argnums=0)
def _compiled(adapted, variables, x):
    return adapted.apply(variables, x)


def run(adapted, variables, x):
    """Return what `apply` gives, compiled, once for each: that takes less time than op by op."""
    return np.asarray(_compiled(adapted, variables, x))


def moved(lora, size=0.1):
    """Return matrices of which none is zero."""
    rng = np.random.default_rng(9)
    flat = flatten(jax.device_get(lora))
    drawn = {path: leaf + size * rng.normal(size=leaf.shape) for path, leaf in flat.items()}
    return unflatten({path: leaf.astype(np.float32) for path, leaf in drawn.items()})


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=16,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=16,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    return transformers.BertModel(config)


def vit():
    config = transformers.VitDetConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=16,
        pretrain_image_size=16, patch_size=4, window_block_indices=[], residual_block_indices=[],
    )  # fmt: skip
    return transformers.VitDetModel(config)


KINDS = {
    "gpt": (flax_models.GPT2(), gpt2, flax_models.gpt2_params, flax_models.GPT2_NAMES, TOKENS),
    "bert": (flax_models.Bert(), bert, flax_models.bert_params, flax_models.BERT_NAMES, TOKENS),
    "vit": (flax_models.ViT(), vit, flax_models.vit_params, flax_models.VIT_NAMES, IMAGES),
}
TARGETS = {"gpt": ["c_attn", "c_proj"], "bert": ["query", "value"], "vit": ["qkv", "proj"]}


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request):
    return make_pair(request.param)


@pytest.fixture(scope="module")
def gpt():
    return make_pair("gpt")


def make_pair(preset):
    module, reference, convert, names, x = KINDS[preset]
    torch.manual_seed(0)
    model = reference()
    for _, parameter in model.named_parameters():  # biases and positions start at zero there
        parameter.data += 0.1 * torch.randn_like(parameter)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    params = convert({name: tensor.numpy() for name, tensor in state.items()})
    return Pair(preset, module, params, names, x, reference, state, TARGETS[preset])


def read_by_peft(pair, adapted, variables, directory, trainable=False):
    fan = pair.preset == "gpt"  # Conv1D holds [in, out]
    vlm_jax.save_lora(adapted, variables, directory, names=pair.names, fan_in_fan_out=fan)
    with quiet():
        return peft.PeftModel.from_pretrained(
            pair.torch_model(), str(directory), is_trainable=trainable
        )


def with_peft(pair, **options):
    fan = pair.preset == "gpt"
    config = peft.LoraConfig(target_modules=pair.targets, fan_in_fan_out=fan, **options)
    with quiet():
        return peft.get_peft_model(pair.torch_model(), config)


def torch_matrices(pair, adapted, model, of=lambda tensor: tensor):
    """Return {our path: [in, R] or [R, out]} of a peft model's matrices."""
    held = dict(model.named_parameters())
    found = {}
    for name, (layer, _) in named_layers(adapted.layers, pair.names).items():
        for letter in "AB":
            tensor = held[f"base_model.model.{name}.lora_{letter}.default.weight"]
            path = f"{layer.path}/lora_{letter}"
            found[path] = of(tensor).detach().numpy().T
    return found


def test_the_base_is_the_reference(pair):
    ours = run(pair.module, {"params": pair.params}, pair.x)
    theirs = pair.torch_output(pair.torch_model()).detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_the_preset_finds_what_peft_finds(pair):
    adapted, variables = pair.adapted
    model = with_peft(pair, r=4)
    matrices = {n: t for n, t in model.named_parameters() if t.requires_grad}
    assert flatten(variables["lora"]).keys() == torch_matrices(pair, adapted, model).keys()
    assert len(matrices) == 2 * len(adapted.layers)
    assert sum(t.numel() for t in matrices.values()) == sum(
        leaf.size for leaf in jax.tree.leaves(variables["lora"])
    )


def test_peft_loads_the_file_and_gives_our_output(pair, tmp_path):
    adapted, variables = pair.adapted
    ours = run(adapted, variables, pair.x)
    model = read_by_peft(pair, adapted, variables, tmp_path)
    theirs = pair.torch_output(model).detach().numpy()
    assert np.abs(ours - run(pair.module, {"params": pair.params}, pair.x)).max() > 0.05
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    again, read = vlm_jax.load_lora(pair.module, pair.params, tmp_path, names=pair.names)
    jax.tree.map(np.testing.assert_array_equal, read["lora"], variables["lora"])
    assert again.layers == adapted.layers
    assert again.lora.scale == adapted.lora.scale and again.lora.rank == adapted.lora.rank


def test_peft_s_own_file_is_read(pair, tmp_path):
    model = with_peft(pair, r=3, lora_alpha=7, use_rslora=True, init_lora_weights=False)
    with quiet():
        model.save_pretrained(tmp_path)
    adapted, variables = vlm_jax.load_lora(pair.module, pair.params, tmp_path, names=pair.names)
    theirs = pair.torch_output(model.eval()).detach().numpy()
    np.testing.assert_allclose(run(adapted, variables, pair.x), theirs, atol=1e-4)
    vlm_jax.save_lora(adapted, variables, tmp_path / "again", names=pair.names)
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again")
    )
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "dora=True, but DoRA"),
        ({"bias": "all"}, "bias='all', but training biases"),
        ({"modules_to_save": ["pooler"]}, "modules_to_save=.*saving further modules"),
        ({"rank_pattern": {"query": 2}}, "rank_pattern=.*differs from layer to layer"),
        ({"alpha_pattern": {"query": 2}}, "alpha_pattern=.*differs from layer to layer"),
    ],
)
def test_what_a_file_of_peft_s_has_and_is_lacking_here_is_named(options, said, tmp_path):
    pair = make_pair("bert")
    with quiet():
        with_peft(pair, r=3, **options).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"cannot be loaded: LoRA has {said}"):
        vlm_jax.load_lora(pair.module, pair.params, tmp_path, names=pair.names)


def test_gradients_and_five_steps_are_peft_s(pair, tmp_path):
    adapted, variables = pair.adapted
    model = read_by_peft(pair, adapted, variables, tmp_path, trainable=True)
    wanted = np.random.default_rng(5).normal(size=run(adapted, variables, pair.x).shape)
    wanted = wanted.astype(np.float32)

    def loss(lora):
        return jnp.mean((adapted.apply({**variables, "lora": lora}, pair.x) - wanted) ** 2)

    tx = promoting(optax.adam(1e-2, eps=1e-4))
    optimizer = torch.optim.Adam(
        [t for t in model.parameters() if t.requires_grad], lr=1e-2, eps=1e-4
    )

    @jax.jit
    def step(lora, state):
        value, gradient = jax.value_and_grad(loss)(lora)
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(lora, updates), state, value, gradient

    lora = variables["lora"]
    state = tx.init(lora)
    for i in range(5):
        lora, state, value, gradient = step(lora, state)
        optimizer.zero_grad()
        theirs = ((pair.torch_output(model) - torch.tensor(wanted)) ** 2).mean()
        theirs.backward()
        assert float(value) == pytest.approx(theirs.item(), rel=1e-5)
        if i == 0:
            expected = torch_matrices(pair, adapted, model, lambda tensor: tensor.grad)
            for path, ours in flatten(gradient).items():
                error = np.linalg.norm(ours - expected[path]) / np.linalg.norm(expected[path])
                assert error < 1e-3, path
        optimizer.step()
    for path, matrix in torch_matrices(pair, adapted, model).items():
        np.testing.assert_allclose(flatten(lora)[path], matrix, atol=1e-4, err_msg=path)


def test_it_starts_as_the_base_and_merges(pair):
    base = run(pair.module, {"params": pair.params}, pair.x)
    adapted, variables = vlm_jax.adapt(pair.module, pair.params, LoRA(targets="all-linear"))
    np.testing.assert_allclose(run(adapted, variables, pair.x), base, atol=2e-6)
    variables["lora"] = moved(variables["lora"])
    after = run(adapted, variables, pair.x)
    merged = vlm_jax.merge(adapted, variables)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, pair.params)
    np.testing.assert_allclose(run(pair.module, {"params": merged}, pair.x), after, atol=1e-4)
    assert np.abs(after - base).max() > 0.05


def test_what_each_layer_is_needs_no_inputs(pair):
    lora = LoRA(targets="all-linear")
    with_inputs, _ = vlm_jax.adapt(pair.module, pair.params, lora, inputs=pair.x)
    without, _ = vlm_jax.adapt(pair.module, pair.params, lora)
    assert with_inputs.layers == without.layers
    named, _ = vlm_jax.adapt(pair.module, pair.params, lora, inputs=(jnp.asarray(pair.x),))
    assert named.layers == without.layers


def test_remat_and_scan_are_the_plain_module(gpt, tmp_path):
    adapted, variables = gpt.adapted

    def outcome(adapted, variables):
        def loss(lora):
            logits = adapted.apply({**variables, "lora": lora}, TOKENS)
            return jnp.sum(jnp.sin(logits)), logits

        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (_, logits), gradient = step(variables["lora"])
        return jax.device_get((logits, gradient))

    plain = outcome(adapted, variables)
    remat = dataclasses.replace(adapted, module=flax_models.GPT2(form="remat"))
    scanned = flax_models.GPT2(form="scan")
    params = flax_models.stacked(gpt.params, 2)
    lora = LoRA(4, 12, targets="gpt")
    scan, scan_variables = vlm_jax.adapt(scanned, params, lora)
    scan_variables = {**scan_variables, "lora": flax_models.stacked(variables["lora"], 2)}
    results = {
        "remat": outcome(remat, variables),
        "scan": outcome(scan, scan_variables),
    }
    for name, (logits, gradient) in results.items():
        np.testing.assert_allclose(logits, plain[0], atol=1e-5, err_msg=name)
        expected = plain[1] if name != "scan" else flax_models.stacked(plain[1], 2)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradient, expected
        )
    merged = vlm_jax.merge(scan, scan_variables)
    logits = run(scanned, {"params": merged}, TOKENS)
    np.testing.assert_allclose(logits, plain[0], atol=1e-4)
    # The file is the same whether layers are stacked or not.
    names = [(r"h\.(.*)", r"transformer.h.\1")]
    vlm_jax.save_lora(scan, scan_variables, tmp_path / "scan", names=names)
    vlm_jax.save_lora(adapted, variables, tmp_path / "loop", names=gpt.names)
    files = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("scan", "loop")]
    assert files[0].keys() == files[1].keys()
    for key in files[0]:
        np.testing.assert_array_equal(files[0][key], files[1][key])
    again, read = vlm_jax.load_lora(scanned, params, tmp_path / "loop", names=names)
    jax.tree.map(np.testing.assert_array_equal, read["lora"], scan_variables["lora"])
    assert again.layers == scan.layers


def test_a_mesh_changes_nothing(gpt):
    from jax.sharding import NamedSharding, PartitionSpec

    adapted, variables = gpt.adapted
    mesh = vlm_jax.make_mesh(data=2, tensor=2, devices=jax.devices()[:4])

    def lie(leaf):
        wide = leaf.ndim == 2 and leaf.shape[-1] % 2 == 0
        spec = PartitionSpec(None, "tensor") if wide else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    spread = jax.tree.map(lie, variables)
    x = jax.device_put(TOKENS, NamedSharding(mesh, PartitionSpec("data")))

    def loss(lora, variables, x):
        return jnp.sum(jnp.sin(adapted.apply({**variables, "lora": lora}, x)))

    step = jax.jit(jax.value_and_grad(loss))
    value, gradient = step(variables["lora"], variables, TOKENS)
    value4, gradient4 = step(spread["lora"], spread, x)
    assert len(jax.tree.leaves(gradient4)[0].sharding.device_set) == 4
    assert float(value4) == pytest.approx(float(value), rel=1e-5, abs=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradient4, gradient
    )
