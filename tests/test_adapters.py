"""Bottleneck adapters: files, several on one base, whole runs, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from draws import shaken
from runs import make_base, make_data, run
from safetensors.numpy import load_file, save_file

import vlm_jax
from vlm_jax import UserError
from vlm_jax.models.layers.bottleneck import is_adapter
from vlm_jax.train.results import export, load_run
from vlm_jax.trees import flatten, unflatten


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters")
    make_base(place / "base")
    make_data(place / "data")
    return place


@pytest.fixture(scope="module")
def base(place):
    return vlm_jax.load(place / "base")


def tokens(model):
    ids = np.arange(1, 13)[None] % 64
    return model.batch(input_ids=ids, attention_mask=np.ones_like(ids))


def logits(model, params, **more):
    return np.asarray(model.apply({"params": params}, tokens(model), **more), np.float32)


def moved(params, seed=1):
    return shaken(params, is_adapter, seed=seed)


@pytest.mark.parametrize("norm", [False, True])
def test_files_go_out_and_in_unchanged(place, base, tmp_path, norm):
    adapter = vlm_jax.Adapter("houlsby", 3, norm=norm, components=("vision", "language_model"))
    adapter = dataclasses.replace(adapter, modules_to_save=("projector",))
    model, params = vlm_jax.add_adapter(*base, adapter, jax.random.key(0))
    params = moved(params)
    flat = flatten(params)
    flat |= {path: leaf * 1.5 for path, leaf in flat.items() if "merger" in path}
    params = unflatten(flat)
    vlm_jax.save_adapter(model, params, tmp_path / "out", name="colors")
    again, read = vlm_jax.load_adapter(*base, tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, read, params)
    np.testing.assert_array_equal(logits(again, read), logits(model, params))
    assert again.adapter.kind == "houlsby" and again.modules_to_save == ("projector",)
    held = load_file(tmp_path / "out" / "adapter.safetensors")
    name = "model.language_model.layers.0.attention_adapters.adapters.colors.adapter_down."
    down = held[f"{name}{int(norm)}.weight"]  # [W, D], as torch has it
    np.testing.assert_array_equal(
        down.T, flat["model/language_model/layers/attention_adapters/adapter_down/kernel"][0]
    )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["config"]["mh_adapter"] and not config["config"]["original_ln_before"]


def test_eight_are_switched_without_compiling(base):
    adapter = vlm_jax.Adapter("pfeiffer", 2, modules_to_save=("projector",))
    model, params = vlm_jax.add_adapter(*base, adapter, jax.random.key(0))
    several = []
    for seed in range(8):
        flat = flatten(moved(params, seed))  # each with a projector of its own
        flat |= {path: leaf + 0.1 * seed for path, leaf in flat.items() if "merger" in path}
        several.append(vlm_jax.take_adapter(model, unflatten(flat)))
    batch = tokens(model)
    apply = jax.jit(lambda params: model.apply({"params": params}, batch))
    trees = [vlm_jax.with_adapter(model, params, one) for one in several]
    outs = [np.asarray(apply(tree)) for tree in trees]
    assert apply._cache_size() == 1
    assert all(np.abs(outs[0] - out).max() > 1e-3 for out in outs[1:])
    # The base's own arrays are in every tree, and each has its own projector.
    held, merger = "model/language_model/layers/mlp/up_proj/kernel", "model/visual/merger/ln_q/bias"
    assert flatten(trees[3])[held] is flatten(params)[held]
    np.testing.assert_allclose(flatten(trees[3])[merger] - flatten(params)[merger], 0.3, atol=1e-6)
    mean = vlm_jax.average_adapters(several[:2], [3, 1])
    for path, leaf in mean.leaves.items():
        expected = 0.75 * several[0].leaves[path] + 0.25 * several[1].leaves[path]
        np.testing.assert_allclose(leaf, expected, atol=1e-6)
    np.testing.assert_array_equal(
        flatten(vlm_jax.with_adapter(model, params, mean))[merger], mean.leaves[merger]
    )
    for other, said in (
        (vlm_jax.Adapter("pfeiffer", 4, modules_to_save=("projector",)), "leaves differ"),
        (vlm_jax.Adapter("pfeiffer", 2), "leaves differ"),
        (vlm_jax.Adapter("parallel", 2, modules_to_save=("projector",)), "reads is 'sum'"),
        (dataclasses.replace(adapter, scaling=2.0), "scaling is 1.0"),
    ):
        taken = vlm_jax.take_adapter(*vlm_jax.add_adapter(*base, other, jax.random.key(0)))
        with pytest.raises(UserError, match=said):
            vlm_jax.with_adapter(model, params, taken)
        with pytest.raises(UserError, match=said):
            vlm_jax.average_adapters([several[0], taken])
    with pytest.raises(UserError, match="sum is not 0"):
        vlm_jax.average_adapters(several[:2], [1, -1])
    with pytest.raises(UserError, match="no bottleneck adapter"):
        vlm_jax.take_adapter(*base)


def test_dropout_acts_in_training_alone(base):
    adapter = vlm_jax.Adapter("parallel", dropout=0.5)
    model, params = vlm_jax.add_adapter(*base, adapter, jax.random.key(0))
    params = moved(params)
    one, two = (
        logits(model, params, train=True, rngs={"dropout": jax.random.key(seed)}) for seed in (1, 2)
    )
    assert np.abs(one - two).max() > 1e-3
    np.testing.assert_array_equal(logits(model, params), logits(model, params, train=False))
    with pytest.raises(ValueError, match="dropout"):
        logits(model, params, train=True)


@pytest.mark.parametrize("quantize", ["none", "nf4-dq"])
def test_a_run_trains_saves_exports_and_is_gone_on_from(place, tmp_path, quantize):
    asked = ("lora.enabled=false", "adapter.type=seq_bn", "adapter.reduction_factor=4")
    asked = (*asked, f"model.quantize={quantize}")
    if quantize == "none":  # the tower too, in another order than files have it
        asked += ("adapter.components=language_model,vision", "model.vision_encoder_lr_scale=0.1")
    *_, text = run(place, tmp_path / "run", *asked)
    assert "adapters" in text
    model, params, _ = load_run(tmp_path / "run")
    assert (tmp_path / "run" / "adapter" / "modules" / "adapter_model.safetensors").is_file()
    assert model.modules_to_save == ("projector",)
    written = [file.read_text() for file in (tmp_path / "run").rglob("meta/metadata")]
    assert written and all('"kind"' in text and '"targets"' not in text for text in written)
    leaves = vlm_jax.take_adapter(model, params).leaves
    assert any(np.abs(leaf).max() > 0 for path, leaf in leaves.items() if "adapter_up" in path)
    report = export(tmp_path / "run", tmp_path / "out", merge=False)
    assert report.difference < 1e-6
    with pytest.raises(UserError, match="cannot be merged"):
        export(tmp_path / "run", tmp_path / "merged", merge=True)
    if quantize == "none":
        more = (*asked, f"model.adapter={tmp_path / 'out'}", "training.learning_rate=1e-30")
        run(place, tmp_path / "second", *more)
        second, after, _ = load_run(tmp_path / "second")
        for path, leaf in vlm_jax.take_adapter(second, after).leaves.items():
            np.testing.assert_allclose(leaf, leaves[path], atol=1e-6)
        with pytest.raises(UserError, match="Set the adapter's own value"):
            run(place, tmp_path / "third", *more, "adapter.reduction_factor=2")


def test_a_directory_holds_one_adapter(base, tmp_path):
    """What an earlier save left there is not read with the next one."""
    saving = vlm_jax.Adapter("pfeiffer", 2, modules_to_save=("projector",))
    with_modules = vlm_jax.add_adapter(*base, saving, jax.random.key(0))
    alone = vlm_jax.add_adapter(*base, vlm_jax.Adapter("pfeiffer", 2), jax.random.key(0))
    vlm_jax.save_adapter(*with_modules, tmp_path)
    (tmp_path / "README.md").write_text("kept")
    vlm_jax.save_adapter(*alone, tmp_path)
    assert vlm_jax.load_adapter(*base, tmp_path)[0].modules_to_save == ()
    vlm_jax.save_peft(*vlm_jax.add_lora(*base, vlm_jax.LoRA(2), jax.random.key(0)), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_what_is_refused(place, base, tmp_path):
    model, params = vlm_jax.add_adapter(*base, vlm_jax.Adapter("houlsby", 2), jax.random.key(0))
    with pytest.raises(UserError, match="did you mean .houlsby."):
        vlm_jax.Adapter("hulsby")
    for wrong, said in (
        ({"non_linearity": "rely"}, "did you mean 'relu'"),
        ({"init_weights": "zero"}, "init_weights 'zero' is not known"),
        ({"reduction_factor": 0.0}, "must be between 0.001 and"),
        ({"components": ("head",)}, "only the blocks"),
        ({"dropout": 1.0}, "must be in"),
        ({"targets": ("mlp",)}, "targets=.*which are for the modules that adapt takes"),
    ):
        with pytest.raises(UserError, match=said):
            vlm_jax.add_adapter(*base, vlm_jax.Adapter(**wrong), jax.random.key(0))
    with pytest.raises(UserError, match="already"):
        vlm_jax.add_adapter(model, params, vlm_jax.Adapter(), jax.random.key(0))
    with pytest.raises(UserError, match="bottleneck adapters"):
        vlm_jax.add_lora(model, params, vlm_jax.LoRA(), jax.random.key(0))
    with pytest.raises(UserError, match="non-linearity"):
        vlm_jax.merge(model, params)
    with pytest.raises(UserError, match="non-linearity"):
        vlm_jax.save_pretrained(model, params, tmp_path / "whole")
    with pytest.raises(UserError, match="no bottleneck adapter to save"):
        vlm_jax.save_adapter(*base, tmp_path / "none")
    with pytest.raises(UserError, match="lora.enabled is true"):
        run(place, tmp_path / "run", "adapter.type=houlsby")
    assert not (tmp_path / "whole").exists() and not (tmp_path / "none").exists()


def test_files_of_another_are_refused(base, tmp_path):
    model, params = vlm_jax.add_adapter(*base, vlm_jax.Adapter("houlsby", 2), jax.random.key(0))
    vlm_jax.save_adapter(model, params, tmp_path / "out")
    file, config = (
        tmp_path / "out" / "adapter.safetensors",
        tmp_path / "out" / "adapter_config.json",
    )
    good, said = load_file(file), json.loads(config.read_text())
    first = sorted(good)[0]
    for change, match in (
        ({"use_gating": True}, "use_gating=True"),
        ({"phm_layer": True}, "phm_layer"),
        ({"leave_out": [0]}, "leave_out"),
        ({"scaling": "learned"}, "scaling"),
        ({"mh_adapter": False, "original_ln_before": False}, "none of the kinds"),
        ({"architecture": "lora"}, "no bottleneck adapter"),
    ):
        config.write_text(json.dumps({**said, "config": {**said["config"], **change}}))
        with pytest.raises(UserError, match=match):
            vlm_jax.load_adapter(*base, tmp_path / "out")
    config.write_text(json.dumps(said))
    for tensors, match in (
        ({**good, "model.visual.x": good[first]}, "not a bottleneck adapter's tensor"),
        ({key: value for key, value in good.items() if key != first}, "is missing"),
        ({**good, first: good[first][..., :1]}, "another base"),
        ({key.replace("layers.0", "layers.7"): v for key, v in good.items()}, "no place"),
    ):
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, file)
        with pytest.raises(UserError, match=match):
            vlm_jax.load_adapter(*base, tmp_path / "out")
    vlm_jax.save_adapter(model, params, tmp_path / "out")
    with pytest.raises(UserError, match="an adapter already"):
        vlm_jax.load_adapter(model, params, tmp_path / "out")
    with pytest.raises(UserError, match="inputs is for foreign modules"):
        vlm_jax.load_adapter(*base, tmp_path / "out", inputs=1)
    with pytest.raises(UserError, match="holds no adapter.safetensors"):
        vlm_jax.load_adapter(*base, tmp_path)
