"""The training table says what the recipe means, for tiny models and at full size."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import vlm_jax
from vlm_jax import UserError, config
from vlm_jax.models.reference_configs import KNOWN
from vlm_jax.sharding import make_mesh
from vlm_jax.train.adapt import adapt_base, check_kept
from vlm_jax.train.compile import abstract_batch
from vlm_jax.train.placement import abstract, abstract_state
from vlm_jax.train.trainable import report, trainable_line
from vlm_jax.trees import flatten, match

CONFIGS = Path(__file__).parents[1] / "configs"


def qwen2_vl(hidden, inner, heads, kv_heads, layers, vocabulary, tied, **vision):
    """Return config.json as the hub has it: flat."""
    return {
        "model_type": "qwen2_vl",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": vision.pop("sections", [16, 24, 24])},
        "max_position_embeddings": 32768,
        "hidden_act": "silu",
        "image_token_id": vocabulary - 3,
        "video_token_id": vocabulary - 2,
        "vision_start_token_id": vocabulary - 5,
        "vision_end_token_id": vocabulary - 4,
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "in_chans": 3,
            "hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            **vision,
        },
    }


# config -> its base's config.json, and the base's parameters as transformers counts them (for
# LLaVA without the tower's last layer norm, 2 x 1024, which nothing reads).
FULL_SIZE = {
    "qwen2_vl_2b_lora": (KNOWN["Qwen/Qwen2-VL-2B-Instruct"], 2_208_985_600),
    "qwen2_vl_2b_full": (KNOWN["Qwen/Qwen2-VL-2B-Instruct"], 2_208_985_600),
    "qwen2_vl_7b_lora": (KNOWN["Qwen/Qwen2-VL-7B-Instruct"], 8_291_375_616),
    "llava15_7b_lora": (KNOWN["llava-hf/llava-1.5-7b-hf"], 7_063_427_072 - 2048),
    "llava15_13b_lora": (KNOWN["llava-hf/llava-1.5-13b-hf"], 13_351_494_656 - 2048),
    "qwen2_vl_7b_qlora": (KNOWN["Qwen/Qwen2-VL-7B-Instruct"], 8_291_375_616),
    **{
        f"qwen2_5_vl_7b_{kind}": (KNOWN["Qwen/Qwen2.5-VL-7B-Instruct"], 8_292_166_656)
        for kind in ("lora", "qlora")
    },
    **{
        f"qwen3_vl_8b_{kind}": (KNOWN["Qwen/Qwen3-VL-8B-Instruct"], 8_767_123_696)
        for kind in ("lora", "qlora")
    },
    "gemma3_4b_lora": (KNOWN["google/gemma-3-4b-it"], 4_300_079_472),
    "gemma3_12b_qlora": (KNOWN["google/gemma-3-12b-it"], 12_187_325_040),
    "qwen2_vl_72b_qlora": (KNOWN["Qwen/Qwen2-VL-72B-Instruct"], 73_405_560_320),
    "llava15_7b_qlora": (KNOWN["llava-hf/llava-1.5-7b-hf"], 7_063_427_072 - 2048),
    "llava15_13b_qlora": (KNOWN["llava-hf/llava-1.5-13b-hf"], 13_351_494_656 - 2048),
}


def test_every_shipped_recipe_is_here():
    assert {path.stem for path in CONFIGS.glob("*.py")} - {"quickstart"} == FULL_SIZE.keys()


@pytest.mark.parametrize("name", FULL_SIZE)
def test_shipped_configs_build_at_full_size_without_allocating_it(name):
    hf_config, parameters = FULL_SIZE[name]
    c = config.load(CONFIGS / f"{name}.py")
    base = vlm_jax.from_config(hf_config, "bfloat16", remat="block")
    found = {}

    def make():
        params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), base.abstract())
        found["model"], params, found["table"] = adapt_base(c, base, params)
        return params

    shapes = jax.eval_shape(make)
    model, table = found["model"], found["table"]
    counted = sum(l.size for path, l in flatten(shapes).items() if "lora_" not in path)
    assert counted == parameters
    trainable, frozen = vlm_jax.split(shapes, table)
    tx = vlm_jax.optimizer(trainable, table, {**dataclasses.asdict(c.training), "max_steps": 10})
    mesh = make_mesh(devices=jax.devices()[:1])
    whole = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), trainable)
    state = abstract_state(abstract(trainable, whole), tx, mesh)
    unit = model.config.patch_unit
    batch = abstract_batch(model, 2, (64, unit * 8), mesh)
    step = vlm_jax.make_step(model, tx, 2)
    after, metrics = jax.eval_shape(step, state, frozen, batch)
    assert jax.tree.map(lambda l: (l.shape, l.dtype), after) == jax.tree.map(
        lambda l: (l.shape, l.dtype), state
    )
    assert metrics["loss"].shape == ()
    rows = {(row["component"], row["trains"]) for row in report(model, shapes, table, 1.0)}
    assert ("projector", "all weights") in rows
    lora = "lora" in name
    assert (("language_model", "LoRA") in rows) == lora
    assert (("vision", "nothing (frozen)") in rows) == lora


def zeros(tree):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def test_a_tied_head_cannot_be_saved_apart():
    model = vlm_jax.from_config({**TINY, "tie_word_embeddings": True})
    lora = vlm_jax.LoRA(2, targets="qwen", modules_to_save=("embed_tokens", "lm_head"))
    with pytest.raises(UserError, match="'lm_head', but .* tied .*name 'embed_tokens' alone"):
        vlm_jax.add_lora(model, zeros(model.abstract()), lora, jax.random.key(0))


TINY = qwen2_vl(
    16, 16, 2, 1, 2, 64, False, depth=1, embed_dim=16, num_heads=2, mlp_ratio=2, patch_size=4,
    sections=[1, 1, 2],
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    model = vlm_jax.from_config(TINY)
    params = zeros(model.abstract())
    lora = vlm_jax.LoRA(2, 4, targets="qwen", modules_to_save=("projector",))
    return (model, params), vlm_jax.add_lora(model, params, lora, jax.random.key(0))


def groups(model, params, **options):
    table = vlm_jax.training_table(model, params, **options)
    found = {}
    for row in report(model, params, table, 1.0):
        found.setdefault(row["component"], []).append((row["trains"], row["learning_rate"]))
    return found


def test_the_usual_recipe(tiny):
    _, (model, params) = tiny
    assert groups(model, params) == {
        "vision": [("nothing (frozen)", None)],
        "projector": [("all weights", 1.0)],
        "embeddings": [("nothing (frozen)", None)],
        "language_model": [("nothing (frozen)", None), ("LoRA", 1.0)],
        "head": [("nothing (frozen)", None)],
    }
    table = vlm_jax.training_table(model, params)
    trainable, _ = vlm_jax.split(params, table)
    size = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    line = trainable_line(model, params, table)
    assert line.startswith(f"trainable params: {size:,d} || all params: ")


def test_scales_and_full_training(tiny):
    (model, params), (adapted, tree) = tiny
    found = groups(adapted, tree, vision_encoder_lr_scale=0.1, projector_lr_scale=0.5)
    assert found["vision"] == [("all weights", 0.1)]
    assert found["projector"] == [("all weights", 0.5)]
    found = groups(model, params, lora_enabled=False)
    assert {rows[0][0] for name, rows in found.items() if name != "vision"} == {"all weights"}
    found = groups(model, params, lora_enabled=False, language_model_lr_scale=0.0)
    assert [name for name, rows in found.items() if rows[0][1]] == ["projector"]


def test_contradictions_are_refused(tiny):
    (model, params), (adapted, tree) = tiny
    with pytest.raises(UserError, match="Nothing is left to train"):
        vlm_jax.training_table(model, params, projector_lr_scale=0.0)
    with pytest.raises(UserError, match="modules_to_save names 'merger'.*projector_lr_scale"):
        vlm_jax.training_table(adapted, tree, projector_lr_scale=0.0)
    with pytest.raises(UserError, match="LoRA targets layers of the language_model"):
        vlm_jax.training_table(adapted, tree, language_model_lr_scale=0.0)
    reaching = vlm_jax.LoRA(2, 4, targets=r".*visual.*\.qkv")
    model, params = vlm_jax.add_lora(model, params, reaching, jax.random.key(0))
    with pytest.raises(UserError, match="layers of the vision.*vision_encoder_lr_scale is 0.0"):
        vlm_jax.training_table(model, params)
    found = groups(model, params, vision_encoder_lr_scale=0.5)
    assert found["vision"] == [("nothing (frozen)", None), ("LoRA", 0.5)]


@pytest.mark.parametrize(
    ("targets", "scales", "trains", "saved"),
    [
        (r".*visual.*\.(qkv|proj)", (0.5, 1.0), {"vision": "LoRA", "projector": "all weights"},
         ("projector",)),
        (r".*visual\.merger.*", (0.0, 1.0), {"projector": "LoRA"}, ()),
        (r".*visual.*\.(qkv|mlp\.\d)", (0.5, 0.5), {"vision": "LoRA", "projector": "LoRA"}, ()),
        ("llama", (0.5, 0.5), {"vision": "all weights", "language_model": "LoRA"}, ("visual",)),
    ],
)  # fmt: skip
def test_a_config_puts_lora_where_its_targets_are(tiny, targets, scales, trains, saved):
    (model, params), _ = tiny
    c = config.load(
        None,
        {
            "lora.target_modules": targets,
            "model.vision_encoder_lr_scale": scales[0],
            "model.projector_lr_scale": scales[1],
        },
    )
    model, params, table = adapt_base(c, model, params)
    assert model.lora.modules_to_save == saved
    rows = {(row["component"], row["trains"]) for row in report(model, params, table, 1.0)}
    assert rows >= trains.items()


def test_names_of_saved_modules_match_as_in_peft(tiny):
    """ "norm" is every module whose name ends so; each component keeps its own scale."""
    (model, params), _ = tiny
    lora = vlm_jax.LoRA(2, 4, targets="qwen", modules_to_save=("norm", "visual.norm1"))
    with pytest.raises(UserError, match=r"'visual.norm1', but the model has no such module"):
        vlm_jax.add_lora(model, params, lora, jax.random.key(0))
    lora = dataclasses.replace(lora, modules_to_save=("norm", "norm1", "language_model.norm"))
    model, params = vlm_jax.add_lora(model, params, lora, jax.random.key(0))
    scales = dict(vision_encoder_lr_scale=0.5, projector_lr_scale=0.0)
    table = vlm_jax.training_table(model, params, **scales)
    chosen = match(table, flatten(params), "training table")
    layer = "model/language_model/layers"
    for path in (f"{layer}/input_layernorm", f"{layer}/post_attention_layernorm"):
        assert chosen[f"{path}/scale"] == "full"
    assert chosen["model/language_model/norm/scale"] == "full"
    assert chosen["model/visual/blocks/norm1/scale"] == "full(0.5)"
    trained = {path for path, group in chosen.items() if group != "frozen"}
    language = {path for path in trained if "language_model" in path and "lora_" not in path}
    assert len(language) == 3


def test_a_tower_trains_around_a_frozen_projector(tiny):
    """Qwen2-VL's merger lies in the tower, so the adapter holds it, moved or not."""
    (model, params), _ = tiny
    c = config.load(None, {"model.vision_encoder_lr_scale": 0.1, "model.projector_lr_scale": 0.0})
    model, params, table = adapt_base(c, model, params)
    assert model.lora.modules_to_save == ("visual",)
    chosen = match(table, flatten(params), "training table")
    assert chosen["model/visual/merger/mlp/0/kernel"] == "frozen"
    assert chosen["model/visual/blocks/attn/qkv/kernel"] == "full(0.1)"


def test_lora_on_a_frozen_tower_is_refused(tiny):
    c = config.load(None, {"lora.target_modules": r".*visual.*\.qkv"})
    with pytest.raises(UserError, match="layers of the vision.*vision_encoder_lr_scale is 0.0"):
        adapt_base(c, *tiny[0])


def test_a_trained_leaf_that_the_adapter_would_leave_out_is_refused(tiny):
    model, params, table = adapt_base(config.get_config(), *tiny[0])
    check_kept(model, params, table)
    with pytest.raises(UserError, match="norm/scale', but the adapter would not hold it"):
        check_kept(model, params, [("model/language_model/norm/scale", "full"), *table])
