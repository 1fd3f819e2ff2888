"""Keys of a config that say what is quantized."""

import pytest

import vlm_jax
from vlm_jax import config
from vlm_jax.quantization import Quantization
from vlm_jax.train.setup import quantization_of


def settings(**model):
    return config.load(None, [f"model.{key}={value}" for key, value in model.items()])


def test_keys_of_bitsandbytes_mean_the_same():
    for keys, name in [
        (dict(), "fp4"),
        (dict(bnb_4bit_quant_type="nf4"), "nf4"),
        (dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant="true"), "nf4-dq"),
        (dict(bnb_4bit_use_double_quant="true"), "fp4-dq"),
    ]:
        found = quantization_of(settings(load_in_4bit="true", **keys))
        assert found == quantization_of(settings(quantize=name)) == Quantization(name)
    skip = dict(llm_int8_skip_modules="q_proj,lm_head", quantize_components="language_model,head")
    expected = Quantization("nf4", ("language_model", "head"), ("q_proj", "lm_head"))
    assert quantization_of(settings(quantize="nf4", **skip)) == expected
    assert quantization_of(settings()) is None
    with pytest.raises(vlm_jax.UserError, match="model.quantize='nf4' and model.load_in_4bit"):
        settings(quantize="nf4", load_in_4bit="true")
    with pytest.raises(vlm_jax.UserError, match="quantize"):
        settings(quantize="nf5")
    with pytest.raises(vlm_jax.UserError, match="is float16.*needs loss scaling. Use bfloat16"):
        settings(load_in_4bit="true", bnb_4bit_compute_dtype="float16")


def test_another_optimizer_is_named_on_resuming(place):
    """The moments of one are not those of another."""
    from runs import run

    run(place, "optim", "training.max_steps=1")
    with pytest.raises(vlm_jax.UserError, match="training.optim' was 'adamw'.*'adamw_8bit' now"):
        run(place, "optim", "training.max_steps=2", "training.optim=adamw_8bit", resume=True)
