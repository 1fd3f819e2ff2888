"""Several adapters on one base: switching without a compile, and weighted sums as in peft."""

import copy

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from references import our_logits, quiet, tensors
from test_peft import assert_equal_logits, build

import vlm_jax
from vlm_jax.trees import flatten

LM = r".*language_model.*"
# Eight adapters that differ in all that may differ.
CONFIGS = [
    dict(r=2, lora_alpha=4, target_modules=rf"{LM}(q_proj|v_proj)"),
    dict(r=5, lora_alpha=3, target_modules=rf"{LM}(q_proj|v_proj)"),
    dict(r=3, lora_alpha=3, target_modules=rf"{LM}(q_proj|v_proj)", use_rslora=True),
    dict(r=2, lora_alpha=4, target_modules=rf"{LM}(up_proj|down_proj)"),
    dict(r=2, lora_alpha=4, target_modules=rf"{LM}layers\.1\..*q_proj"),
    dict(r=4, lora_alpha=4, target_modules=rf"{LM}q_proj", rank_pattern={r"layers\.0.*": 1}),
    dict(r=2, lora_alpha=4, target_modules=["embed_tokens", "lm_head"]),
    dict(r=2, lora_alpha=4, target_modules=rf"{LM}q_proj", modules_to_save=["merger"]),
]
LARGE = dict(r=9, lora_alpha=4, target_modules=rf"{LM}(q_proj|v_proj)")  # is loaded beside sums


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return (peft model of eight adapters, base model, base params, inputs, directories)."""
    directory = tmp_path_factory.mktemp("eight")
    reference, model, params, inputs = build("qwen2_vl", directory / "base")
    adapted = None
    torch.manual_seed(0)
    with quiet(), torch.no_grad():
        for number, options in enumerate((*CONFIGS, LARGE)):
            one = get_peft_model(copy.deepcopy(reference), LoraConfig(**options))
            for parameter in one.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            one.save_pretrained(directory / str(number))
        adapted = PeftModel.from_pretrained(reference, directory / "0", adapter_name="0")
        for number in range(1, len(CONFIGS)):
            adapted.load_adapter(directory / str(number), adapter_name=str(number))
    directories = {str(number): directory / str(number) for number in range(len(CONFIGS) + 1)}
    return adapted, model, params, inputs, directories


def test_switching_among_eight_compiles_once(place):
    reference, base, params, inputs, directories = place
    directories = dict(list(directories.items())[: len(CONFIGS)])
    model, adapters = vlm_jax.load_peft_adapters(base, params, directories)
    batch = model.batch(**inputs)
    traces = []

    @jax.jit
    def logits(params):
        traces.append(1)
        return model.apply({"params": params}, batch)

    real = inputs["attention_mask"] == 1
    for name in (*directories, *directories):
        with torch.no_grad(), quiet():
            reference.set_adapter(name)
            expected = reference.eval()(**tensors(inputs)).logits.numpy()
        got = np.asarray(logits(adapters[name]))
        np.testing.assert_allclose(got[real], expected[real], atol=1e-4, err_msg=name)
    assert len(traces) == 1 and logits._cache_size() == 1
    shared = [
        path
        for path, leaf in flatten(params).items()
        if all(flatten(tree)[path] is leaf for tree in adapters.values())
    ]
    others = flatten(params).keys() - set(shared)
    assert others and all("merger" in path for path in others)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("cat", {"0": 0.7, "1": -0.4, "2": 1.5}),
        ("svd", {"0": 0.7, "1": -0.4}),
        ("linear", {"0": 0.7, "4": -0.4}),
        ("cat", {"3": 1.0, "4": 0.5}),
    ],
    ids=str,
)
def test_sums_as_pefts(tmp_path, place, kind, weights):
    reference, base, params, inputs, directories = place
    name = f"{kind} {' '.join(weights)}"
    with quiet():
        reference.add_weighted_adapter(list(weights), list(weights.values()), name, kind)
        reference.set_adapter(name)
    model, adapters = vlm_jax.load_peft_adapters(
        base, params, {name: directories[name] for name in (*weights, "8")}
    )
    model, summed = vlm_jax.combine_peft_adapters(model, adapters, weights, kind)
    assert_equal_logits(reference, model, summed, inputs)
    if kind != "linear":
        vlm_jax.save_peft(model, summed, tmp_path / "summed")
        again, read = vlm_jax.load_peft(base, params, tmp_path / "summed")
        np.testing.assert_allclose(
            our_logits(again, read, inputs), our_logits(model, summed, inputs), atol=1e-5
        )


def test_refused(tmp_path, place):
    _, base, params, _, directories = place
    dora = vlm_jax.add_lora(base, params, vlm_jax.LoRA(2, 2, dora=True), jax.random.key(0))
    vlm_jax.save_peft(*dora, tmp_path / "dora")
    with pytest.raises(vlm_jax.UserError, match="one is DoRA's"):
        vlm_jax.load_peft_adapters(base, params, {"a": directories["0"], "b": tmp_path / "dora"})
    with pytest.raises(vlm_jax.UserError, match="no adapter"):
        vlm_jax.load_peft_adapters(base, params, {})
    some = {"a": directories["0"], "b": directories["7"]}
    model, adapters = vlm_jax.load_peft_adapters(base, params, some)
    with pytest.raises(vlm_jax.UserError, match="modules_to_save"):
        vlm_jax.combine_peft_adapters(model, adapters, {"a": 1, "b": 1})
    with pytest.raises(vlm_jax.UserError, match="'lin'; did you mean 'linear'|'lin'.*linear"):
        vlm_jax.combine_peft_adapters(model, adapters, {"a": 1}, "lin")
    both = vlm_jax.load_peft_adapters(base, params, {n: directories[n] for n in "01"})
    assert both[0].lora.rank == 5  # the larger one's
    with pytest.raises(vlm_jax.UserError, match=r"ranks \[2, 5\].*'linear' adds factors"):
        vlm_jax.combine_peft_adapters(*both, {"0": 1, "1": 1}, "linear")
    bare = vlm_jax.LoRA(targets=(), modules_to_save=("projector",))
    bare = vlm_jax.add_lora(base, params, bare, jax.random.key(0))
    vlm_jax.save_peft(*bare, tmp_path / "bare")
    both = vlm_jax.load_peft_adapters(base, params, {"bare": tmp_path / "bare"})
    with pytest.raises(vlm_jax.UserError, match="no LoRA factors"):
        vlm_jax.combine_peft_adapters(*both, {"bare": 1})
    with pytest.raises(vlm_jax.UserError, match="no adapter 'c'"):
        vlm_jax.combine_peft_adapters(model, adapters, {"c": 1})
    with pytest.raises(vlm_jax.UserError, match="another rank|other scales"):
        vlm_jax.save_peft(model, adapters["b"], tmp_path / "no")
