"""Bottleneck adapters against their formulas in torch, inside transformers' models."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from draws import shaken
from references import our_logits, quiet, tensors
from test_peft import build

import vlm_jax
from vlm_jax.models.layers.bottleneck import is_adapter
from vlm_jax.names import disk_places, to_disk, to_tree
from vlm_jax.train.trainable import training_table
from vlm_jax.trees import flatten

ADAPTERS = {
    "houlsby": vlm_jax.Adapter("houlsby", 4),
    "pfeiffer": vlm_jax.Adapter("seq_bn", 5, components=("language_model", "vision"), norm=True),
    "parallel": vlm_jax.Adapter("parallel", components=("vision", "language_model")),
}
# A block's parts: attention, the norm before the MLP, the MLP.
PARTS = {
    "model.language_model.layers": ("self_attn", "post_attention_layernorm", "mlp"),
    "model.visual.blocks": ("attn", "norm2", "mlp"),
    "model.vision_tower.vision_model.encoder.layers": ("self_attn", "layer_norm2", "mlp"),
    "model.vision_tower.encoder.layers": ("self_attn", "layer_norm2", "mlp"),
}
# Where what attention and the MLP give is normalised before it is added.
BEHIND = tuple(f"{name}_layernorm" for name in (
    "post_attention", "pre_feedforward", "post_feedforward",
))  # fmt: skip
FUNCTIONS = {"swish": torch.nn.functional.silu, "relu": torch.relu}


def adapters_in(reference, model, params):
    """Put a tree's adapters into a torch model by hooks; return {tensor name: torch parameter}."""
    adapter = model.adapter
    flat = flatten(params)
    held = {path: leaf.shape for path, leaf in flat.items() if is_adapter(path)}
    named = {}
    for name, place in disk_places(model, held).items():
        leaf = np.asarray(flat[place.path])[place.layer]
        value = torch.tensor(to_disk(place, leaf))
        named[name] = torch.nn.Parameter(value)

    def attach(block, prefix, attention, norm, mlp):
        seen = {}

        def bottleneck(where, read):
            def get(part):
                return named[f"{prefix}.{where}.{part}"]

            if adapter.norm:
                weight, bias = get("adapter_norm_before.weight"), get("adapter_norm_before.bias")
                read = torch.nn.functional.layer_norm(read, read.shape[-1:], weight, bias)
            low = read @ get("adapter_down.weight").T + get("adapter_down.bias")
            low = FUNCTIONS[adapter.non_linearity](low)
            return adapter.scaling * (low @ get("adapter_up.weight").T + get("adapter_up.bias"))

        def after_attention(_, __, out):
            h = out[0] if isinstance(out, tuple) else out
            h = h + bottleneck("attention_adapters", h)
            return (h, *out[1:]) if isinstance(out, tuple) else h

        def before_norm(_, given):
            seen["x"] = given[0]

        def after_mlp(_, __, h):
            read = {"houlsby": h, "pfeiffer": seen["x"] + h, "parallel": seen["x"]}[adapter.kind]
            return h + bottleneck("output_adapters", read)

        if adapter.kind == "houlsby":
            getattr(block, attention).register_forward_hook(after_attention)
        getattr(block, norm).register_forward_pre_hook(before_norm)
        getattr(block, mlp).register_forward_hook(after_mlp)

    modules = dict(reference.named_modules())
    for path in model.config.stacks:
        ours = path.replace("/", ".")
        there = next(name for name in modules if name in PARTS and name.split(".")[1] in ours)
        if any(name.startswith(ours) for name in named):
            for number, block in enumerate(modules[there]):
                parts = BEHIND if hasattr(block, BEHIND[-1]) else PARTS[there]
                attach(block, f"{ours}.{number}", *parts)
    return named


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("qwen2_vl", "houlsby"),
        ("llava", "houlsby"),
        ("qwen2_vl", "pfeiffer"),
        ("llava", "parallel"),
        ("qwen2_5_vl", "pfeiffer"),
        ("qwen3_vl", "houlsby"),
        pytest.param("gemma3", "houlsby", marks=pytest.mark.nightly),
    ],
)
def test_logits_and_ten_steps(tmp_path, family, kind):
    reference, model, params, inputs = build(family, tmp_path / "base", factor=3.0)
    plain = our_logits(model, params, inputs)
    adapter = dataclasses.replace(ADAPTERS[kind], modules_to_save=("projector",))
    model, params = vlm_jax.add_adapter(model, params, adapter, jax.random.key(0))
    np.testing.assert_array_equal(our_logits(model, params, inputs), plain)  # exactly the base
    params = shaken(params, is_adapter, scale=0.2, seed=3)
    named = adapters_in(reference, model, params)
    with torch.no_grad(), quiet():
        expected = reference(**tensors(inputs)).logits.numpy()
    real = inputs["attention_mask"] == 1
    ours = our_logits(model, params, inputs)
    np.testing.assert_allclose(ours[real], expected[real], atol=1e-4, rtol=0)
    assert np.abs(ours - plain)[real].max() > 0.1

    labels = np.where(real & (inputs["input_ids"] < 99), inputs["input_ids"], -100)
    scales = {"vision_encoder_lr_scale": 1.0} if "vision" in adapter.components else {}
    rows = training_table(model, params, **scales)
    assert ("adapter" in rows[0][1]) and rows[0][0].endswith("adapter_(down|up|norm_before)/.*")
    trainable, frozen = vlm_jax.split(params, rows)
    training = dict(learning_rate=3e-3, max_steps=10, max_grad_norm=0.5, lr_scheduler_type="linear")
    tx = vlm_jax.optimizer(trainable, rows, training)
    step = jax.jit(vlm_jax.make_step(model, tx))
    state = vlm_jax.init_state(trainable, tx)
    batch = model.batch(**inputs, labels=labels)

    trained = dict(named)
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(any(one in name for one in model.config.projectors))
        if parameter.requires_grad:
            trained[name] = parameter
    adam = torch.optim.AdamW(trained.values(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda done: 1 - done / 10)
    for number in range(10):
        state, metrics = step(state, frozen, batch)
        with quiet():
            loss = reference(**tensors(inputs), labels=torch.from_numpy(labels)).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)
        adam.step()
        schedule.step()
        adam.zero_grad()
        assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-3), number
    flat = flatten(state.trainable)
    places = disk_places(model, {path: leaf.shape for path, leaf in flat.items()})
    difference = norm = moved = 0.0
    before = flatten(trainable)
    for name, place in places.items():
        layer = ... if place.layer is None else place.layer
        theirs = to_tree(place.path, trained[name].detach().numpy())
        difference += float(np.sum((np.asarray(flat[place.path])[layer] - theirs) ** 2))
        moved += float(np.sum((np.asarray(before[place.path])[layer] - theirs) ** 2))
        norm += float(np.sum(theirs**2))
    assert len(places) == len(trained)
    assert (difference / norm) ** 0.5 < 1e-3 < 1e-2 < (moved / norm) ** 0.5
