"""Adapters in and out of peft, gradients and whole training runs against torch + peft."""

import dataclasses
import json
import re

import jax
import numpy as np
import optax
import pytest
import torch
from draws import shaken
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from references import (
    gemma3,
    gemma3_inputs,
    llava,
    llava_inputs,
    our_logits,
    quiet,
    qwen2_5_vl,
    qwen2_5_vl_inputs,
    qwen2_vl,
    qwen2_vl_inputs,
    qwen3_vl,
    qwen3_vl_inputs,
    tensors,
)
from tiers import fast

import vlm_jax
from vlm_jax.adapters.modules_to_save import saved_modules
from vlm_jax.names import current_name, disk_places, to_tree
from vlm_jax.train.trainable import training_table
from vlm_jax.trees import flatten, unflatten

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava"]
MADE = {
    "qwen2_vl": (qwen2_vl, qwen2_vl_inputs),
    "qwen2_5_vl": (qwen2_5_vl, qwen2_5_vl_inputs),
    "qwen3_vl": (qwen3_vl, qwen3_vl_inputs),
    "gemma3": (gemma3, gemma3_inputs),
}
KINDS = {"LoRA": {}, "rsLoRA": {"rslora": True}, "DoRA": {"dora": True}}
PROJECTOR = {
    "qwen2_vl": ["merger"],
    "qwen2_5_vl": ["merger"],
    "qwen3_vl": ["merger", "deepstack_merger_list.0", "deepstack_merger_list.1"],
    "gemma3": ["multi_modal_projector"],
    "llava": ["multi_modal_projector"],
}


def build(family, directory, factor=6.0):
    """Return (reference, model, params, inputs) of one family."""
    if family in MADE:
        make, inputs = MADE[family]
        reference = make(directory, factor=factor)
        return reference, *vlm_jax.load(directory), inputs("mixed")
    reference = llava(directory, "clip", "llama", factor=factor)
    model, params = vlm_jax.load(directory)
    return reference, model, params, llava_inputs(model.config.image_tokens())


def moved(params, seed=3, parts=("lora_B", "merger", "projector")):
    """Return the tree with B and the projector away from their start."""
    return shaken(params, lambda path: any(part in path for part in parts), seed=seed)


def assert_equal_logits(reference, model, params, inputs):
    with torch.no_grad(), quiet():
        expected = reference.eval()(**tensors(inputs)).logits.numpy()
    logits = our_logits(model, params, inputs)
    real = inputs["attention_mask"] == 1
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-4, rtol=0)


TARGETS = {
    "suffixes": ("q_proj", "v_proj", "down_proj"),
    "preset": "llama",
    "all-linear": "all-linear",
    "head": ("o_proj", "lm_head"),
    "regex into the tower": r"model\.vis.*(layers|blocks).*\.(fc1|qkv|q_proj|up_proj|linear_fc2)"
    r"|.*layers.*\.o_proj",
}


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        (family, targets)
        for family in FAMILIES
        for targets in TARGETS
        if (family, targets) != ("gemma3", "head")  # which is tied
    ],
)
def test_our_adapter_in_peft(tmp_path, family, targets):
    reference, model, params, inputs = build(family, tmp_path / "base")
    lora = vlm_jax.LoRA(rank=3, alpha=5, targets=TARGETS[targets], modules_to_save=("projector",))
    model, params = vlm_jax.add_lora(model, params, lora, jax.random.key(0))
    base_logits = our_logits(model, params, inputs)
    params = moved(params)
    assert np.abs(our_logits(model, params, inputs) - base_logits).max() > 0.1
    vlm_jax.save_peft(model, params, tmp_path / "adapter")
    with quiet():
        adapted = PeftModel.from_pretrained(reference, tmp_path / "adapter")
    found = {n for n, _ in adapted.named_parameters() if "lora_A" in n}
    ours = sum(
        leaf.shape[0] if leaf.ndim == 3 else 1
        for path, leaf in flatten(params).items()
        if path.endswith("lora_A")
    )
    assert len(found) == ours, "peft adapts other modules than we do"
    assert_equal_logits(adapted, model, params, inputs)


def test_a_list_of_modules_stands_for_its_members(tmp_path):
    """PEFT holds no list of modules in full."""
    _, model, params, _ = build("qwen3_vl", tmp_path)
    names = ("deepstack_merger_list", "merger")
    found = saved_modules(model, params, names).names
    assert set(found) == set(PROJECTOR["qwen3_vl"])


@pytest.mark.parametrize("family", FAMILIES)
def test_our_dora_in_peft(tmp_path, family):
    reference, model, params, inputs = build(family, tmp_path / "base")
    plain = our_logits(model, params, inputs)
    targets = TARGETS["regex into the tower"]
    lora = vlm_jax.LoRA(3, 5, targets=targets, modules_to_save=("projector",), dora=True)
    model, params = vlm_jax.add_lora(model, params, lora, jax.random.key(0))
    np.testing.assert_allclose(our_logits(model, params, inputs), plain, atol=1e-4)
    flat = flatten(moved(params))
    flat |= {path: 1.1 * leaf for path, leaf in flat.items() if path.endswith("magnitude")}
    params = unflatten(flat)
    vlm_jax.save_peft(model, params, tmp_path / "adapter")
    with quiet():
        adapted = PeftModel.from_pretrained(reference, tmp_path / "adapter")
    assert_equal_logits(adapted, model, params, inputs)
    again, read = vlm_jax.load_peft(*vlm_jax.load(tmp_path / "base"), tmp_path / "adapter")
    assert again.lora.dora
    jax.tree.map(np.testing.assert_array_equal, dict(read), dict(params))
    merged = our_logits(model, vlm_jax.merge(model, params), inputs)
    np.testing.assert_allclose(merged, our_logits(model, params, inputs), atol=1e-4)


@pytest.mark.parametrize(
    ("layout", "family"),
    [
        (layout, family)
        for layout in ("current", "legacy", "DoRA")
        for family in FAMILIES
        if (layout, family) != ("legacy", "qwen3_vl")  # younger than the names of today
    ],
)
def test_peft_adapter_here(tmp_path, family, layout):
    reference, model, params, inputs = build(family, tmp_path / "base")
    config = LoraConfig(
        r=4,
        lora_alpha=7,
        use_rslora=True,
        use_dora=layout == "DoRA",
        target_modules=r".*language_model.*(q_proj|down_proj)",
        modules_to_save=PROJECTOR[family],
    )
    with quiet():
        adapted = get_peft_model(reference, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if re.search("lora_B|lora_magnitude|modules_to_save", name):
                    parameter.add_(0.1 * torch.randn_like(parameter))
        adapted.save_pretrained(tmp_path / "adapter")
    if layout == "legacy":
        to_legacy(tmp_path / "adapter" / "adapter_model.safetensors", family)
    model, params = vlm_jax.load_peft(model, params, tmp_path / "adapter")
    assert_equal_logits(adapted, model, params, inputs)


def to_legacy(file, family):
    """Rename an adapter's keys to what transformers before 4.52 called the modules."""
    from safetensors.numpy import load_file, save_file

    renames = {
        "qwen": [("model.language_model.", "model."), ("model.visual.", "visual.")],
        "llava": [
            ("model.language_model.", "language_model.model."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
        ],
    }["llava" if family in ("llava", "gemma3") else "qwen"]
    renamed = {}
    for key, tensor in load_file(file).items():
        name = key.removeprefix("base_model.model.")
        for new, old in renames:
            name = name.replace(new, old) if name.startswith(new) else name
        renamed[f"base_model.model.{name}"] = tensor
    save_file(renamed, file, metadata={"format": "pt"})


def test_an_adapter_of_another_model_is_refused(tmp_path):
    _, model, params, _ = build("qwen2_vl", tmp_path / "qwen")
    _, other, other_params, _ = build("llava", tmp_path / "llava")
    other, other_params = vlm_jax.add_lora(
        other, other_params, vlm_jax.LoRA(2, 2, modules_to_save=("projector",)), jax.random.key(0)
    )
    vlm_jax.save_peft(other, other_params, tmp_path / "adapter")
    with pytest.raises(vlm_jax.UserError, match="no place"):
        vlm_jax.load_peft(model, params, tmp_path / "adapter")


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_equals_adapted_and_loads_in_transformers(tmp_path, family):
    reference, model, params, inputs = build(family, tmp_path / "base")
    lora = vlm_jax.LoRA(rank=3, alpha=5, targets="llama", modules_to_save=("projector",))
    model, params = vlm_jax.add_lora(model, params, lora, jax.random.key(0))
    params = moved(params)
    before = jax.tree.map(np.array, params)
    merged = vlm_jax.merge(model, params)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, params))
    assert not any("lora" in path for path in flatten(merged))
    vlm_jax.save_pretrained(model, params, tmp_path / "merged", merge=True)
    with quiet():
        loaded, info = type(reference).from_pretrained(
            tmp_path / "merged", output_loading_info=True
        )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_equal_logits(loaded, model, params, inputs)


def torch_twin(reference, directory):
    """Return peft's model of our adapter, trainable, dropout off."""
    with quiet():
        return PeftModel.from_pretrained(reference, directory, is_trainable=True)


def our_tree(model, params, named):
    """Return {our path: array} of torch tensors named as in a peft model."""
    flat = flatten(params)
    places = disk_places(model, {path: x.shape for path, x in flat.items() if "lora" not in path})
    found = {}
    for name, tensor in named.items():
        name = name.removeprefix("base_model.model.").replace(".default", "")
        name = re.sub(r"\.(modules_to_save|base_layer)(?=\.)", "", name)
        if ".lora_" in name:
            name = name.replace("lora_embedding", "lora")
            module, matrix = name.removesuffix(".weight").rsplit(".", 1)
            place = places[current_name(model, f"{module}.weight")]
            path = f"{place.path.rsplit('/', 1)[0]}/{matrix.removesuffix('_vector')}"
            value = tensor.T
        else:
            place = places[current_name(model, name)]
            path, value = place.path, to_tree(place.path, tensor)
        leaf = found.setdefault(path, np.zeros(flat[path].shape, np.float32))
        own = () if place.layer is None else (place.layer,)
        leaf[(*own, *map(slice, value.shape))] = value  # ranks of a stack may differ
    return found


def relative(ours, theirs):
    """Return |ours - theirs| / |theirs| over all leaves at once."""
    assert ours.keys() == theirs.keys()
    difference = sum(float(np.sum((np.asarray(ours[p]) - theirs[p]) ** 2)) for p in ours)
    return (difference / sum(float(np.sum(theirs[p] ** 2)) for p in ours)) ** 0.5


def adapted_pair(family, tmp_path, factor, **kind):
    reference, model, params, inputs = build(family, tmp_path / "base", factor)
    kind = {"modules_to_save": ("projector",), **kind}
    lora = vlm_jax.LoRA(rank=3, alpha=5, targets="llama", **kind)
    model, params = vlm_jax.add_lora(model, params, lora, jax.random.key(0))
    params = moved(params) if lora.modules_to_save else moved(params, parts=("lora_B",))
    vlm_jax.save_peft(model, params, tmp_path / "adapter")
    labels = np.where(
        (inputs["attention_mask"] == 1) & (inputs["input_ids"] < 99), inputs["input_ids"], -100
    )
    return torch_twin(reference, tmp_path / "adapter"), model, params, inputs, labels


def split(model, params):
    rows = [
        (r".*/lora_.*", "lora"),
        (rf".*/({'|'.join(model.config.projectors)})/.*".replace(r"list.", "list/"), "full"),
        (".*", "frozen"),
    ]
    return rows, *vlm_jax.split(params, rows)


def torch_loss(twin, inputs, labels):
    """The token mean over the whole batch, which is also ours."""
    return twin(**tensors(inputs), labels=torch.from_numpy(labels)).loss


EVERY = [(family, kind) for family in FAMILIES for kind in KINDS]
BOTH = [("qwen2_vl", kind) for kind in KINDS] + [("llava", kind) for kind in KINDS]


@pytest.mark.parametrize(
    ("family", "kind"),
    fast([*BOTH, ("qwen2_5_vl", "DoRA"), ("qwen3_vl", "DoRA"), ("gemma3", "DoRA")], EVERY),
)
def test_gradients(tmp_path, family, kind):
    twin, model, params, inputs, labels = adapted_pair(family, tmp_path, 6.0, **KINDS[kind])
    with quiet():
        expected = torch_loss(twin, inputs, labels)
        expected.backward()
    theirs = {n: p.grad.numpy() for n, p in twin.named_parameters() if p.requires_grad}
    _, trainable, frozen = split(model, params)
    batch = model.batch(**inputs, labels=labels)

    def mean(trainable):
        total, tokens = vlm_jax.loss(model, trainable, frozen, batch)
        return total / tokens

    value, grads = jax.value_and_grad(mean)(trainable)
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    assert relative(flatten(grads), our_tree(model, params, theirs)) < 1e-4


def assert_twenty_equal_steps(
    twin, model, params, inputs, labels, recipe=None, steps=20, adam=None, decay=0.01
):
    """Train some of 20 steps here and in torch: each loss and the last weights must agree."""
    training = dict(
        learning_rate=3e-3, weight_decay=decay, max_grad_norm=0.5, max_steps=20, warmup_steps=4,
        lr_scheduler_type="cosine",
    )  # fmt: skip
    if recipe is None:
        rows, trainable, frozen = split(model, params)
    else:
        rows = training_table(model, params, **recipe)
        trainable, frozen = vlm_jax.split(params, rows)
    tx = vlm_jax.optimizer(trainable, rows, training)
    step = jax.jit(vlm_jax.make_step(model, tx), donate_argnums=0)
    state = vlm_jax.init_state(trainable, tx)
    batch = model.batch(**inputs, labels=labels)

    trained = [(n, p) for n, p in twin.named_parameters() if p.requires_grad]
    groups = [
        dict(params=[p], weight_decay=0.0 if re.search("bias$|norm|ln_q", n) else decay, lr=3e-3)
        for n, p in trained
    ]
    adam = adam or torch.optim.AdamW(groups)
    from transformers import get_cosine_schedule_with_warmup

    schedule = get_cosine_schedule_with_warmup(adam, 4, 20)
    for number in range(steps):
        state, metrics = step(state, frozen, batch)
        with quiet():
            expected = torch_loss(twin, inputs, labels)
            expected.backward()
            torch.nn.utils.clip_grad_norm_([p for _, p in trained], 0.5)
            adam.step()
            schedule.step()
            adam.zero_grad()
        assert float(metrics["loss"]) == pytest.approx(expected.item(), rel=1e-3), number
    theirs = our_tree(model, params, {n: p.detach().numpy() for n, p in trained})
    assert relative(flatten(state.trainable), theirs) < 1e-3
    # It must have moved for that to mean anything.
    assert relative(flatten(trainable), theirs) > 1e-2
    assert isinstance(tx, optax.GradientTransformation)
    return state.trainable


@pytest.mark.parametrize(
    ("family", "kind"),
    fast([*BOTH, ("qwen2_5_vl", "LoRA"), ("qwen3_vl", "LoRA"), ("gemma3", "LoRA")], EVERY),
)
def test_twenty_steps(tmp_path, family, kind):
    assert_twenty_equal_steps(*adapted_pair(family, tmp_path, 3.0, **KINDS[kind]))


def test_twenty_steps_of_lora_plus(tmp_path):
    pair = adapted_pair("qwen2_vl", tmp_path, 3.0, modules_to_save=())
    recipe = {"loraplus_lr_ratio": 4.0, "projector_lr_scale": 0.0}
    assert training_table(*pair[1:3], **recipe)[0] == (".*/lora_B", "lora(4.0)")
    theirs = create_loraplus_optimizer(
        pair[0], torch.optim.AdamW, lr=3e-3, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.01
    )
    assert_twenty_equal_steps(*pair, recipe=recipe, adam=theirs)


def test_a_projector_alone_is_an_adapter_too(tmp_path):
    """LLaVA's first stage: no matrices, only modules_to_save."""
    reference, model, params, inputs = build("llava", tmp_path / "base")
    lora = vlm_jax.LoRA(targets=(), modules_to_save=("projector",))
    model, params = dataclasses.replace(model, lora=lora), moved(params)
    vlm_jax.save_peft(model, params, tmp_path / "adapter")
    with quiet():
        adapted = PeftModel.from_pretrained(reference, tmp_path / "adapter")
    assert_equal_logits(adapted, model, params, inputs)
    again, read = vlm_jax.load_peft(*vlm_jax.load(tmp_path / "base"), tmp_path / "adapter")
    assert again.lora.targets == ()
    assert_equal_logits(adapted, again, read, inputs)


OTHER = [
    dict(init_lora_weights="pissa"),
    dict(use_dora=True),
    dict(rank_pattern={"q_proj": 4}),
    dict(ensure_weight_tying=True, trainable_token_indices=[1]),
    # damaged
    dict(bias="some"),
    *(dict(rank_pattern=value) for value in ("x", {"q_proj": 0}, {"(": 2}, [2])),
    *(dict(alpha_pattern=value) for value in ("x", {"q_proj": "y"})),
    *(dict(r=value) for value in ("x", None, 0, 2.5)),
    *(dict(lora_alpha=value) for value in ("x", None)),
    dict(target_modules=3),
    *(dict(modules_to_save=value) for value in ("projector", [3])),
]


@pytest.mark.parametrize("field", OTHER, ids=str)
def test_adapters_that_mean_something_else_are_refused(tmp_path, field):
    _, model, params, _ = build("llava", tmp_path / "base")
    adapted = vlm_jax.add_lora(model, params, vlm_jax.LoRA(2, 2), jax.random.key(0))
    vlm_jax.save_peft(*adapted, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **field}))
    with pytest.raises(vlm_jax.UserError, match=list(field)[-1]):
        vlm_jax.load_peft(model, params, tmp_path / "adapter")
